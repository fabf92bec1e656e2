"""A program of calls that ask native code for memory which is not theirs. It is a process of its own, as it may crash.

It prints the name of each attack before it makes it, and ends with 1 at the first that is not refused in a sentence.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from grjca_kernels import GatedRJCAFused
from grjca_kernels.problem import flatten

B, L, WIDTHS = 3, 40, (24, 16)
LARGE = 1 << 24
"""A number of elements so large that whoever reads them leaves the heap."""
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
Attack = Callable[[], object]


def module() -> GatedRJCAFused:
    return GatedRJCAFused(*WIDTHS, L, gating="hierarchical", dropout=0.5, backend="cpu", output="concat")


def features() -> list[Tensor]:
    return [torch.randn(B, L, width, requires_grad=True) for width in WIDTHS]


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def freed() -> Iterator[tuple[str, Attack]]:
    """Free each feature and parameter before the forward, or before the backward, and free what else is read."""
    count = len(WIDTHS) + len(list(module().parameters()))
    for index, between in itertools.product(range(count), (False, True)):

        def attack(index: int = index, between: bool = between) -> None:
            block, x = module(), features()
            victim = [*x, *block.parameters()][index]
            if not between:
                free(victim)
            y = block(*x)
            free(victim)
            y.sum().backward()

        yield f"tensor {index} freed {'between' if between else 'before'}", attack

    def lengths() -> None:
        x = torch.full((B,), L)
        free(x)
        module()(*features(), x)

    def gradient() -> None:
        y = module()(*features())
        incoming = torch.ones_like(y)
        free(incoming)
        y.backward(incoming)

    class Subclass(Tensor):
        pass

    wrong = torch.full((B,), 2**40)
    for name, x in {
        "a parameter": torch.nn.Parameter(wrong, requires_grad=False),
        "a subclass": wrong.as_subclass(Subclass),
        "a lazy negation": torch._neg_view(wrong),
    }.items():
        yield f"lengths as {name}", lambda x=x: module()(*features(), x)

    def repacked() -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x if x.is_floating_point() else x.int(), lambda x: x):
            y = module()(*features(), torch.full((B,), L))
        y.sum().backward()

    yield "lengths saved as int32", repacked
    yield "lengths freed", lengths
    yield "gradient freed", gradient


# ---- raw operators


def arguments() -> dict[str, Any]:
    """The arguments of grjca::backward by name, as a forward leaves them."""
    given: dict[str, Any] = {
        "features": [x.detach() for x in features()],
        "parameters": [x.detach() for x in flatten(*module().parameters_by_role())],
        "lengths": torch.full((B,), L),
        "seed": torch.tensor(7),
    }
    options = (2, "hierarchical", "released", 0.5, 0.1, False, False, True, True)
    results = torch.ops.grjca.forward(*given.values(), *options, "cpu")
    needed = [True] * (len(given["features"]) + len(given["parameters"]))
    grads = [torch.ones_like(result) for result in results]
    return {"grads": grads, **given, "iterates": results[1], "needed": needed, "options": options, "backend": "cpu"}


def backward(given: dict[str, Any]) -> Any:
    *tensors, options, backend = given.values()
    return torch.ops.grjca.backward(*tensors, *options, backend)


def forward(given: dict[str, Any]) -> Any:
    tensors = (given[name] for name in ("features", "parameters", "lengths", "seed"))
    return torch.ops.grjca.forward(*tensors, *given["options"], given["backend"])


def without_memory(x: Tensor) -> Tensor:
    y = x.clone()
    free(y)
    return y


BENT: dict[str, Callable[[Tensor], Any]] = {
    "cut": lambda x: x[..., :1] if x.dim() else x.new_empty(0),
    "longer": lambda x: x.new_zeros(*x.shape[:-1], x.shape[-1] + LARGE // x.numel()) if x.dim() else x.new_zeros(2),
    "without an axis": lambda x: x[0] if x.dim() else x.new_zeros(1, 1),
    "with an axis": lambda x: x[None].expand(3, *x.shape),
    "float64": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "bool": Tensor.bool,
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse() if x.dim() else x.to("meta"),
    "freed": without_memory,
    "five axes": lambda x: x.reshape(*x.shape, *[1] * (5 - x.dim())),
}


def bent() -> Iterator[tuple[str, Attack]]:
    """Bend each kind of tensor in every way, in both directions."""
    for name, how in itertools.product(["grads", "features", "parameters", "lengths", "seed", "iterates"], BENT):
        if (name, how) in (("seed", "without an axis"), ("seed", "five axes")):  # these still hold one value
            continue
        for index in (0, -1) if name in ("grads", "features", "parameters") else (None,):

            def attack(name: str = name, how: str = how, index: int | None = index, call: Any = backward) -> None:
                given = arguments()
                if index is None:
                    given[name] = BENT[how](given[name])
                else:
                    given[name][index] = BENT[how](given[name][index])
                call(given)

            yield f"backward: {name}[{index}] {how}", attack
            if name not in ("grads", "iterates"):
                yield f"forward: {name}[{index}] {how}", lambda attack=attack: attack(call=forward)


OPTIONS = {
    "no features": {"features": []},
    "one feature": {"features": [torch.zeros(B, L, WIDTHS[0])]},
    "five features": {"features": [torch.zeros(B, L, 8)] * 5},
    "no parameters": {"parameters": []},
    "no grads": {"grads": []},
    "needed too short": {"needed": [True]},
    "needed too long": {"needed": [True] * 999},
    "T = 0": {"options": (0, "hierarchical", "released", 0.5, 0.1, False, False, True, True)},
    "T = 10^9": {"options": (10**9, "hierarchical", "released", 0.5, 0.1, False, False, True, True)},
    "other T": {"options": (3, "hierarchical", "released", 0.5, 0.1, False, False, True, True)},
    "other gating": {"options": (2, "flat", "released", 0.5, 0.1, False, False, True, True)},
    "no such gating": {"options": (2, "nosuch", "released", 0.5, 0.1, False, False, True, True)},
    "no such form": {"options": (2, "hierarchical", "nosuch", 0.5, 0.1, False, False, True, True)},
    "dropout 1": {"options": (2, "hierarchical", "released", 1.0, 0.1, False, False, True, True)},
    "temperature NaN": {"options": (2, "hierarchical", "released", 0.5, float("nan"), False, False, True, True)},
    **{f"backend {name}": {"backend": name} for name in ("reference", "auto", "nosuch", "cuda", "triton", "")},
    **{
        f"lengths {lengths.tolist()} {lengths.dtype}": {"lengths": lengths}
        for lengths in (
            torch.tensor([L + 1, 0, 0]),
            torch.tensor([-1, 0, 0]),
            torch.tensor([2**62, 0, 0]),
            torch.tensor([-(2**63), 0, 0]),
            torch.tensor([L, L, 2**64 - 1], dtype=torch.uint64),
            torch.tensor([L, L, 2**32 - 1], dtype=torch.uint32),
            torch.tensor([-1, L, L], dtype=torch.int8),
            torch.tensor([L + 1, L, L], dtype=torch.uint8),
        )
    },
}


def misfits() -> Iterator[tuple[str, Attack]]:
    for name, change in OPTIONS.items():
        yield f"backward: {name}", lambda change=change: backward(arguments() | change)
        if not change.keys() & {"grads", "needed"} and name not in ("other T", "other gating"):
            yield f"forward: {name}", lambda change=change: forward(arguments() | change)


# ---- what is no attack


def accepted() -> Iterator[tuple[str, Attack]]:
    """Calls that look like the attacks, and must succeed."""

    def racing() -> None:
        """Another thread writes into lengths while kernels read them."""
        lengths, stop = torch.full((B,), L), threading.Event()

        def write() -> None:
            while not stop.is_set():
                lengths.fill_(2**40)
                lengths.fill_(L)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            block, x = module(), features()
            done = 0
            for _ in range(500):
                try:
                    block(*x, lengths).sum().backward()
                    done += 1
                except ValueError:  # the values were wrong at the moment of the check
                    continue
            assert done
        finally:
            stop.set()
            thread.join()

    def unsigned() -> None:
        for dtype in (torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.int8):
            module()(*features(), torch.tensor([L, 0, 7]).to(dtype)).sum().backward()

    def raw() -> None:
        given = arguments()
        forward(given)
        assert len(backward(given)) == len(given["needed"])

    def changed() -> None:
        """Values that a hook returns count as the nearest that are legal."""
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: x, lambda x: x if x.is_floating_point() else x + 2**40
        )
        with hooks:
            y = module()(*features(), torch.full((B,), L))
        y.sum().backward()

    def of_other_types() -> None:
        block, x, plain = module().eval(), features(), torch.full((B,), 10)
        same = [torch.nn.Parameter(plain.int(), requires_grad=False), torch._neg_view(-plain)]
        assert all(torch.equal(block(*x, lengths), block(*x, plain)) for lengths in same)

    yield "lengths that a hook changes", changed
    yield "lengths of other types", of_other_types
    yield "lengths that change", racing
    yield "unsigned lengths", unsigned
    yield "raw operators", raw


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    count = 0
    for name, attack in itertools.chain(freed(), bent(), misfits()):
        print(name, end=": ", flush=True)
        try:
            attack()
        except REFUSALS as error:
            print(str(error).partition("\n")[0], flush=True)
            if not str(error) or "not implemented for" in str(error):
                return 1
        else:
            print("ACCEPTED", flush=True)
            return 1
        count += 1
    for name, call in accepted():
        print(name, flush=True)
        call()
    print(f"{count} refused", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
