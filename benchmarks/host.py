"""What a call costs beside its kernel: ``python -m benchmarks.host``.

Blocks so small that the kernel is next to nothing take turns, on one thread, with ``torch.nn.MultiheadAttention`` of
the same size, and with an autograd.Function of as many tensors that computes nothing. Then the rows of the GPU backends
run with launch and allocation stubbed, on tensors of the CPU: what is left is what they make the host do.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import whole_step
from benchmarks.cases import provenance
from benchmarks.row_files import ROOT, Row, file_of, state_of, write
from grjca.measure import threads
from grjca_kernels import GatedRJCAFused, Layer, Linear, cuda, gated_rjca, native
from grjca_kernels.call import Call, Gradients, describe
from grjca_kernels.problem import GATINGS
from grjca_kernels.triton_kernels import launch_config

FOLDER = ROOT / "benchmarks" / "results" / "host"
SOURCES = ("grjca_kernels/**/*.py", "csrc/**/*.*", "benchmarks/host.py")
BATCH, LENGTH, WIDTHS = 1, 4, (8, 4)
THREE = (8, 4, 4)  # modalities, with T = 3 and hierarchical gates: 84 parameters
UNIT, FLOOR, LARGE = "MultiheadAttention", "Function of 34 tensors", "three modalities, 84 parameters"
TURNS, WARM_UPS = 400, 50
PASSES = ("without gradients", "forward", "forward + backward")

Subject = tuple[Callable[[], Any], list[Tensor]]  # a call, and the leaves whose gradients it fills


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=str(__doc__).splitlines()[0])
    parser.add_argument("--turns", type=int, default=TURNS, help="calls of each subject")
    arguments = parser.parse_args(argv)
    rows = [{**row, "source": state_of(SOURCES), **provenance()} for row in measure(arguments.turns)]
    path = file_of(FOLDER, rows[0])
    if arguments.turns >= TURNS:
        write(path, rows)
        print(f"wrote {path.relative_to(ROOT)}")
    print(table(rows))
    return 0


def measure(turns: int) -> Iterator[Row]:
    """Rows of microseconds; of a call also in units of MultiheadAttention, which took its turns with it."""
    with threads(1):
        for what in PASSES:
            times = in_turns({name: step(what, *subject) for name, subject in subjects(what).items()}, turns)
            for name, us in times.items():
                yield {"row": f"{what}, {name}", "us": round(us, 1), "units": round(us / times[UNIT], 2)}
        rows = {name: (call, lambda: None) for name, call in gpu_rows().items()}
        with pretended_gpu():
            times = in_turns(rows, turns)
        yield from ({"row": name, "us": round(us, 1)} for name, us in times.items())


# ---- calls


def subjects(what: str) -> dict[str, Subject]:
    """Of the same size: the unit, the floor, and blocks by their gating; large ones last."""
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(sum(WIDTHS) - WIDTHS[1], 1, batch_first=True), features(WIDTHS)
    blocks = {gating: GatedRJCAFused(*WIDTHS, LENGTH, gating=gating) for gating in GATINGS}
    for block in blocks.values():
        block.train(what != PASSES[0])
    tensors = [*x, *blocks["flat"].parameters()]
    of_three, large = three_modalities()
    return {
        UNIT: (lambda: attention(x[0], x[0], x[0])[0], [*attention.parameters()]),
        FLOOR: (lambda: Nothing.apply(*tensors), tensors),
        **{gating: (lambda block=block: block(*x), [*block.parameters()]) for gating, block in blocks.items()},
        LARGE: (of_three, large),
    }


def features(widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(BATCH, LENGTH, width) for width in widths)


def three_modalities() -> tuple[Callable[[], Any], list[Tensor]]:
    """By the functional form."""
    x, width, gating = features(THREE), sum(THREE), {"gating": "hierarchical", "iterations": 3}
    leaves: list[Tensor] = []

    def linear(rows: int, columns: int) -> Linear:
        leaves.extend((torch.randn(rows, columns).mul_(0.1).requires_grad_(), torch.zeros(rows).requires_grad_()))
        return Linear(*leaves[-2:])

    def layer() -> Layer:
        keys, values = tuple(linear(LENGTH, LENGTH) for _ in THREE), tuple(linear(n, n) for n in THREE)
        return Layer(linear(width, width), keys, values, tuple(linear(n, width) for n in THREE))

    layers = tuple(layer() for _ in range(3))
    gates = tuple(tuple(linear(ways, n) for ways in (2, 3, 4, 3)) for n in THREE)
    return lambda: gated_rjca(x, layers, gates, **gating), leaves


class Nothing(torch.autograd.Function):
    """What PyTorch takes for the tensors of a call whatever is done with them."""

    @staticmethod
    def forward(*tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def step(what: str, call: Callable[[], Any], leaves: list[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What is timed, and what comes before it."""

    def forget() -> None:
        for leaf in leaves:
            leaf.grad = None

    def without_gradients() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        found = call()
        outputs = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return {PASSES[0]: without_gradients, PASSES[1]: call, PASSES[2]: both}[what], forget


def in_turns(calls: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]], turns: int) -> dict[str, float]:
    """Median microseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + WARM_UPS):
        for name, (call, before) in calls.items():
            before()
            start = time.perf_counter_ns()
            call()
            if turn >= WARM_UPS:
                times[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: median(values) for name, values in times.items()}


# ---- the rows of the GPU backends


def gpu_rows() -> dict[str, Callable[[], None]]:
    """Forward and backward of 32 parameters, for every backend whose Python part is there."""
    called, gradients = a_call()
    rows = {"CUDA C++": cuda} if native.missing is None and native.library.cuda_architectures else {}
    with contextlib.suppress(ImportError):
        from grjca_kernels.triton_kernels import launch

        rows["Triton"] = launch
    found: dict[str, Callable[[], None]] = {}
    for name, row in rows.items():
        found[f"{name}, forward"] = partial(row.forward, called)
        found[f"{name}, backward"] = partial(row.backward, called, gradients)
    return found


def a_call() -> tuple[Call, Gradients]:
    """With dropout, and all gradients wanted."""
    block, x = GatedRJCAFused(*WIDTHS, LENGTH, gating="flat"), features(WIDTHS)
    call = describe(x, *block.parameters_by_role(), gating="flat", dropout=block.dropout)
    new = [torch.empty_like(tensor) for tensor in (*x, *call.parameters)]
    iterates = torch.empty(2, BATCH, LENGTH, sum(WIDTHS))
    none, count = [None] * len(WIDTHS), len(WIDTHS)
    return (
        call._replace(outputs=new[:count], iterates=iterates),
        Gradients([torch.ones_like(y) for y in x], none, none, new[:count], new[count:]),
    )


@contextlib.contextmanager
def pretended_gpu() -> Iterator[list[Any]]:
    """An H100 that launches nothing, and whose memory is always the same tensor; what was to be launched."""
    launched: list[Any] = []
    memory, device = torch.empty(16, dtype=torch.uint8), launch_config.Device("cuda", 90, 132, 227 * launch_config.KIB)

    def launch_nothing(*arguments: Any) -> bool:
        launched.append(arguments)
        return True

    planned = SimpleNamespace(workspace_bytes=1, counters=1, forward=launch_nothing, backward=launch_nothing)

    class Kernel:
        """Stands for one of Triton's, compiled or not."""

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *arguments, **options: launched.append((arguments, options)) or self

    with contextlib.ExitStack() as stack:
        swap = partial(patch.object, create=True)
        patches = [
            swap(cuda, "_launch", lru_cache(lambda *of: planned)),
            swap(torch.cuda, "device", lambda device: contextlib.nullcontext()),
            swap(torch.cuda, "is_current_stream_capturing", lambda: False),
            swap(torch._C, "_cuda_getCurrentRawStream", lambda index: 0),
            swap(torch, "empty", lambda *size, **options: memory),
            swap(Tensor, "new_empty", lambda *size, **options: memory),
        ]
        with contextlib.suppress(ImportError):
            from grjca_kernels.triton_kernels import launch

            patches += [
                swap(launch, "_prepare", lru_cache(launch._prepare.__wrapped__)),
                swap(launch, "device_of", lambda x: device),
                swap(launch, "counter", lambda device: memory),
                swap(launch, "forward_kernel", Kernel()),
                swap(launch, "backward_kernel", Kernel()),
            ]
        for one in patches:
            stack.enter_context(one)
        yield launched


# ---- what is shown


def table(rows: list[Row]) -> str:
    """Markdown."""
    first, names = rows[0], [UNIT, FLOOR, *GATINGS, LARGE]
    cells = {row["row"]: row for row in rows}
    lines = [
        f"{first['device']}, 1 thread, torch {first['torch']}, {whole_step.commits(rows)}: median microseconds of "
        f"calls that take turns, and how many times {UNIT}'s that is. B = {BATCH}, L = {LENGTH}, d = {WIDTHS[0]} + "
        f"{WIDTHS[1]}, T = 2, float32; dropout in training.",
        "",
        f"| | {' | '.join(PASSES)} |",
        "|---|" + "--:|" * len(PASSES),
    ]
    for name in names:
        of_name = [cells[f"{what}, {name}"] for what in PASSES]
        lines.append(f"| {name} | {' | '.join(_cell(row) for row in of_name)} |")
    on_gpus = [row for row in rows if "units" not in row]
    if on_gpus:
        lines += ["", "Microseconds of the rows of GPU backends at 32 parameters, launch and allocation stubbed:", ""]
        lines += ["| row | us |", "|---|--:|", *(f"| {row['row']} | {row['us']:.1f} |" for row in on_gpus)]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    return f"{row['us']:.0f} ({row['units']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
