"""The self-check behind verdicts.py: whether kernels compute what the reference does, on this very machine.

A check runs the forward and the backward of a few problems (:func:`cases`), which reach both dataflows of the kernels
and the tiles that users' widths get. For each tensor, the error against manual_backward.py in float64 may be at most
twice the error of manual_backward.py in the same dtype on the same device, plus a few ulp of the scale. This is the
rule of operator.md: values are measured by the largest element, and gradients as vectors over both modalities. A second
run must give the same bits.

TF32 exists only in the operands of products. For TF32, manual_backward.py computes in float32 with operands cut to the
10 bits that tensor cores read: Triton leaves the cutting to the tensor cores, and CUDA C++, which rounds, is more
accurate. PyTorch's own TF32 also rounds, and may not be used for small or odd matrices.

A relu whose argument is near 0 would spoil the comparison: rounding flips it, and one element of a gradient is entirely
wrong. In bfloat16 such flips make eager so inexact that it could hide much else; in float32 they occur by chance.
Therefore :func:`make` chooses numbers that leave almost none near 0.
"""

from __future__ import annotations

import contextlib
import math
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grjca_kernels import manual_backward
from grjca_kernels.call import Call, Gradients
from grjca_kernels.modes import allows_tf32
from grjca_kernels.problem import Layer, Linear, Problem, expected_tensors, flatten

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTOR, FEW, DRAWS = 2, 4, 3
SPREAD = 1.0  # the scale of the arguments of tanh and softmax: neither constant nor linear
SEED = 0x1234_5678_9ABC_DEF0 - 2**63  # the seed of the dropout masks

Row = Any  # a row of the table in backends.py, a layer above this one


@dataclass(frozen=True)
class Case:
    """A problem to check.

    With ``extras``, gate values are returned, and gradients also come in for them and for the iterates. Without extras,
    outputs are views of one tensor, as when the caller asks for the concatenation. ``reduced`` is that of Problem.
    """

    batch: int
    length: int
    widths: tuple[int, ...]
    gating: str
    extras: bool
    iterations: int = 2
    reduced: bool = False

    @property
    def problem(self) -> Problem:
        return Problem(
            self.batch, self.length, self.widths, self.iterations, self.gating, "released", 0.3, 0.1, True, False,
            reduced=self.reduced,
        )  # fmt: skip


def cases(device: torch.device) -> tuple[Case, ...]:
    """Return the cases to check on a device."""
    if device.type == "cpu":  # the interpreter is slow
        return Case(1, 6, (5, 3), "hierarchical", True), Case(1, 33, (4, 3), "flat", False, 1)
    return cases_of_gpu(torch.cuda.get_device_properties(device).multi_processor_count)


def cases_of_gpu(multiprocessors: int) -> tuple[Case, ...]:
    """Return cases with C streamed and stored, each with large tiles (widths that are multiples of 16) and small ones.

    Tiles depend on the widths, so two cases have those of "clip" and "long". Rows of W_k begin at multiples of 16 bytes
    only for 16 and 256 frames. Large batches pass through the workspace in chunks, and a single sample has smaller
    tiles.
    """
    n = multiprocessors
    return (
        Case(3 * n, 20, (72, 40), "hierarchical", True),
        Case(n, 35, (72, 40), "flat", False, 1),
        Case(n // 2, 140, (160, 96), "flat", False),
        Case(1, 140, (160, 96), "flat", False),
        Case(16, 16, (512, 512), "dynamic", False, 1),
        Case(8, 256, (512, 512), "none", False, 1),
    )


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    where: str
    tensor: str
    error: float
    bound: float

    @property
    def passes(self) -> bool:
        return self.error <= self.bound  # false for NaN

    def __str__(self) -> str:
        return f"{self.where}, {self.tensor}: error {self.error:.2g}, {self.bound:.2g} is allowed"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check.

    ``reason`` says why the kernels must not be used, or is None; ``lasting`` is false if another process may do better.
    """

    reason: str | None
    lasting: bool = True


# ---- numbers


@dataclass(frozen=True)
class Inputs:
    """All inputs of forward and backward; ``iterates`` [T, B, L, d] goes into the backward alone."""

    features: list[Tensor]
    parameters: list[Tensor]
    iterates: Tensor
    incoming: dict[str, list[Tensor]]  # gradients of Y, X and G
    lengths: Tensor
    seed: Tensor

    def call(self, problem: Problem) -> Call:
        """Return the call, without the tensors that a forward fills."""
        return Call(problem, self.features, self.parameters, self.lengths, self.seed, iterates=self.iterates)

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """Return these inputs with ``f`` applied to every floating-point tensor."""
        return replace(
            self,
            features=[f(x) for x in self.features],
            parameters=[f(x) for x in self.parameters],
            iterates=f(self.iterates),
            incoming={name: [f(x) for x in tensors] for name, tensors in self.incoming.items()},
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        moved = self.map(lambda x: x.to(device, dtype))
        return replace(moved, lengths=self.lengths.to(device), seed=self.seed.to(device))

    def half_an_ulp_away(self, ulp: float, generator: torch.Generator) -> Inputs:
        def move(x: Tensor) -> Tensor:
            signs = torch.randint(2, x.shape, generator=generator, device="cpu").to(x.device) * 2 - 1
            return (x.double() * (1 + signs * ulp / 2)).to(x.dtype)

        return self.map(move)


def make(case: Case, dtype: torch.dtype, seed: int, device: torch.device | str = "cpu") -> Inputs:
    """Return numbers that ``dtype`` holds exactly, as float64 on the device; absent frames hold NaN.

    The numbers are random, except for means that decide relu. X is positive or negative by column, and so is J; as K
    and V are positive on average, V C has the sign of J, and half of H is 0. The bias of U outweighs the rest, and
    where U is positive, X is positive, so no mix of the iterates is near 0.

    The random part of K and V must not vanish in the sums over L and d_m, however long they are; otherwise a missing
    term would not show.
    """
    problem, generator = case.problem, torch.Generator("cpu").manual_seed(seed)
    length, width, frames, count = case.length, problem.width, (case.batch, case.length), len(case.widths)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    def signs(size: int) -> Tensor:
        return torch.arange(size, device="cpu") % 2 * 2.0 - 1

    def linear(rows: int, columns: int, mean: Tensor | float, noise: float, inputs: float = 1) -> Linear:
        """Return a linear map whose y has mean ``mean`` and deviation ``noise`` for inputs of size ``inputs``."""
        weight = normal(rows, columns) * noise / inputs / math.sqrt(columns)
        return Linear(weight, normal(rows) * noise / 2 + mean)

    def layer(t: int) -> Layer:
        score = SPREAD * math.sqrt(width) / length
        x = math.sqrt(count / width) if t == 0 else 1  # frames of X^0 have norm 1
        return Layer(
            linear(width, width, signs(width), 0.3, x),
            tuple(linear(length, length, score, 0.5 * score * math.sqrt(length), x) for _ in case.widths),
            tuple(linear(d_m, d_m, 2 / d_m, 0.3 / math.sqrt(d_m), x) for d_m in case.widths),
            tuple(linear(d_m, width, signs(d_m), 0.2) for d_m in case.widths),
        )

    layers = [layer(t) for t in range(problem.iterations)]
    gates = tuple(
        tuple(linear(ways, d_m, 0, SPREAD * problem.temperature) for ways in problem.gate_ways) for d_m in case.widths
    )
    lengths = torch.tensor([(length * 2 // 3, length, 0, length - 1)[b % 4] for b in range(case.batch)], device="cpu")
    absent = torch.arange(length, device="cpu") >= lengths[:, None]
    features = [(normal(*frames, d_m).abs() + 0.3) * signs(d_m) for d_m in case.widths]
    incoming = {"Y": [normal(*frames, d_m) for d_m in case.widths]}
    if case.extras:
        incoming["X"] = [normal(problem.iterations, *frames, width)]
        incoming["G"] = [normal(*frames, sum(problem.gate_ways)) for _ in case.widths]
    inputs = Inputs(
        features=[x.masked_fill(absent[..., None], math.nan) for x in features],
        parameters=flatten(layers, gates),
        iterates=normal(0),
        incoming=incoming,
        lengths=lengths,
        seed=torch.tensor(SEED, device="cpu"),
    ).map(lambda x: x.to(dtype).double())
    inputs = inputs.to(torch.device(device), torch.float64)
    return replace(inputs, iterates=computed_forward(manual_backward.forward, case, inputs)["X"].to(dtype).double())


TF32_ULP = 2.0**-10


class CutOperands(TorchDispatchMode):
    """A mode that cuts the operands of every float32 product to the bits of TF32."""

    PRODUCTS: ClassVar = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}  # -> the first operand

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = self.PRODUCTS.get(function._schema.name)
        if first is not None:
            args = (*args[:first], *map(self.cut, args[first : first + 2]), *args[first + 2 :])
        return function(*args, **(kwargs or {}))

    def cut(self, x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


# ---- runs of a backend or of the reference: results by name, one gradient vector per kind


def computed_forward(forward: Callable[[Call], None], case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Run ``forward`` on tensors allocated as in ops.py but filled with NaN, so that unwritten elements show."""
    problem, like = case.problem, inputs.features[0]
    frames = (case.batch, case.length)

    def new(*size: int) -> Tensor:
        return like.new_full(size, math.nan)

    outputs = [new(*frames, d_m) for d_m in case.widths]
    if not case.extras:
        outputs = list(new(*frames, problem.width).split(case.widths, dim=-1))
    iterates = new(problem.iterations, *frames, problem.width)
    gates = [new(*frames, sum(problem.gate_ways)) for _ in case.widths] if case.extras else []
    forward(inputs.call(problem)._replace(outputs=outputs, iterates=iterates, gates=gates))
    named = {f"Y[{m}]": y for m, y in enumerate(outputs)} | {"X": iterates}
    return named | {f"G[{m}]": g for m, g in enumerate(gates)}


def computed_backward(backward: Callable[[Call, Gradients], None], case: Case, inputs: Inputs) -> dict[str, Tensor]:
    problem, none, incoming = case.problem, [None] * len(case.widths), inputs.incoming
    of_iterates = list(incoming["X"][0].split(problem.widths, dim=-1)) if case.extras else none
    features, parameters = (
        [x.new_full(x.shape, math.nan) for x in tensors] for tensors in (inputs.features, inputs.parameters)
    )
    gradients = Gradients(incoming["Y"], of_iterates, incoming.get("G", none), features, parameters)
    backward(inputs.call(problem), gradients)
    return joined(problem, features, parameters)


LINEAR = r"layers\[(\d+)\]\.(\w+).*"


def joined(problem: Problem, features: Sequence[Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Join the gradients to one float64 CPU vector per kind, and per iteration for weights.

    Those of the first iteration are so small that they would not count among the others.
    """
    names = [name for name, _ in expected_tensors(problem)]
    kinds = ["d features"] * len(features)
    kinds += ["d gates" if name.startswith("gates") else re.sub(LINEAR, r"d \2[\1]", name) for name in names]
    vectors: dict[str, list[Tensor]] = {}
    for kind, gradient in zip(kinds, (*features, *parameters), strict=True):
        vectors.setdefault(kind, []).append(gradient.cpu().double().flatten())
    return {kind: torch.cat(parts) for kind, parts in vectors.items()}


# ---- the check


def in_tf32(dtype: torch.dtype, reduced: bool = False) -> bool:
    """Return whether products use TF32, by PyTorch's settings or under autocast: TF32 kernels are separate kernels."""
    return dtype == torch.float32 and (reduced or allows_tf32())


def precision(dtype: torch.dtype, reduced: bool = False) -> str:
    """Return the dtype as text, and whether float32 products use TF32."""
    return str(dtype).removeprefix("torch.") + (" with TF32" if in_tf32(dtype, reduced) else "")


def compare(row: Row, case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Iterator[Finding]:
    """Yield a finding for every tensor of one case: values, gradients, and whether a second run gives the same bits."""
    exact, tf32 = make(case, dtype, seed, device), in_tf32(dtype, case.reduced)
    inputs, generator = exact.to(device, dtype), torch.Generator("cpu").manual_seed(seed)
    ulp = TF32_ULP if tf32 else torch.finfo(dtype).eps
    draws = [inputs, *(inputs.half_an_ulp_away(ulp, generator) for _ in range(DRAWS - 1))]
    where = f"L = {case.length}, {precision(dtype, case.reduced)}"
    sides: tuple[tuple[Callable[..., dict[str, Tensor]], Any, Any, float], ...] = (
        (computed_forward, manual_backward.forward, row.forward, math.inf),
        (computed_backward, manual_backward.backward, row.backward, 2),
    )
    for computed, derived, of_row, norm in sides:
        truth = computed(derived, case, exact)
        with CutOperands() if tf32 else contextlib.nullcontext():
            eager = [computed(derived, case, draw) for draw in draws]
        ours, again = (computed(of_row, case, inputs) for _ in range(2))
        for name, value in ours.items():
            worst = max(distance(draw[name], truth[name], norm) for draw in eager)
            few = FEW * ulp * float(truth[name].norm(norm))
            yield Finding(where, name, distance(value, truth[name], norm), FACTOR * worst + few)
        changed = sum(not torch.equal(value, again[name]) for name, value in ours.items())
        yield Finding(where, "changed when repeated", changed, 0)


def distance(x: Tensor, truth: Tensor, norm: float) -> float:
    return float((x.cpu().double() - truth.cpu()).norm(norm))


def check(
    row: Row,
    device: torch.device,
    dtype: torch.dtype,
    reduced: bool = False,
    tell: Callable[[Finding | str], None] = lambda line: None,
) -> Verdict:
    """Check one dtype; ``tell`` receives every finding, and the traceback of an exception.

    PyTorch keeps its modes (no_grad, inference, autocast, fake tensors, a default device, transforms, tracing) per
    thread, so the check runs in a thread of its own, which has none.
    """

    def work() -> str | None:
        reason = None
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for case in cases(device):
                for finding in compare(row, replace(case, reduced=reduced), device, dtype):
                    tell(finding)
                    reason = reason or (None if finding.passes else f"{finding}.")
        return reason

    try:
        with ThreadPoolExecutor(1) as thread:
            return Verdict(thread.submit(work).result())
    except Exception as error:
        tell(traceback.format_exc())
        first, *_ = str(error).splitlines() or [""]
        return Verdict(f"it raised {type(error).__name__}: {first[:200]}", lasting=False)
