"""The block on a GPU: made, checked, timed, weighed, and taken apart into its phases."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from benchmarks.cases import DROPOUT, ROTATED, Problem, flop, tanhs
from benchmarks.gate import DRAWS, kind
from benchmarks.gpu import KERNELS
from grjca.measure import SHAPES, Shape
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused
from tolerances import check_draws, largest, length

Call = Callable[[list[Tensor]], list[Tensor]]
"""Inputs to an output, followed by all gradients if it is a training step."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}
TF32_ULP = 2.0**-10
SEED = 1
DEVICE = "cuda"


@dataclass(frozen=True)
class Subject:
    """A shape in a dtype with its tensors. ``precision`` names the dtype, or is "tf32"."""

    shape: Shape
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        weights = Problem(replace(self.shape, batch=min(2, self.shape.batch))).weights
        return {name: value.to(DEVICE, self.dtype) for name, value in weights.items()}

    @cached_property
    def inputs(self) -> list[list[Tensor]]:
        sets = [self.shape.inputs(seed) for seed in range(ROTATED)]
        return [[x.to(DEVICE, self.dtype).requires_grad_() for x in one] for one in sets]

    @cached_property
    def gradient(self) -> Tensor:
        return Problem(self.shape).gradient.to(DEVICE, self.dtype)

    def block(self, kind: type[GatedRJCAFused], dtype: torch.dtype | None = None, **options: Any) -> GatedRJCAFused:
        """A block with these weights, as the dtype of the subject holds them."""
        block = self.shape.block(kind, device=DEVICE, dtype=dtype or self.dtype, **options)
        block.load_state_dict(self.weights)
        return block


# ---- implementations


def plain(block: nn.Module, gradient: Tensor | None) -> Call:
    """As PyTorch runs it; a training step if there is a gradient of the output."""
    block.train(gradient is not None)
    parameters = list(block.parameters())

    def call(x: list[Tensor]) -> list[Tensor]:
        if gradient is None:
            with torch.no_grad():
                return [block(*x)]
        y = block(*x)
        return [y.detach(), *torch.autograd.grad(y, [*x, *parameters], gradient)]

    return call


def compiled(block: nn.Module, gradient: Tensor | None) -> Call:
    """torch.compile at its best, with CUDA graphs."""
    call = plain(torch.compile(block, mode="max-autotune", dynamic=False), gradient)

    def marked(x: list[Tensor]) -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return call(x)

    return marked


def graph(block: nn.Module, gradient: Tensor | None, like: list[Tensor]) -> Call:
    """Captured once; inputs are copied in at every call, as torch.compile does it with its own."""
    call, static = plain(block, gradient), [x.detach().clone().requires_grad_() for x in like]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = call(static)

    def replay(x: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            torch._foreach_copy_(static, x)
        captured.replay()
        return results

    return replay


def make(subject: Subject, implementation: str, training: bool, dropout: float = DROPOUT) -> Call:
    """``cuda``, ``fused``, ``eager``, each also with ``-graph``, or ``compiled``."""
    kind, _, as_graph = implementation.partition("-")
    options: dict[str, Any] = {"dropout": dropout}
    if kind in KERNELS:
        options["backend"] = KERNELS[kind]
    block = subject.block(GatedRJCAFused if kind in KERNELS else GatedRJCAEager, **options)
    gradient = subject.gradient if training else None
    if as_graph:
        return graph(block, gradient, subject.inputs[0])
    return compiled(block, gradient) if kind == "compiled" else plain(block, gradient)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """float32 products in TF32, or truly in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the correctness gate: the rule of tests/support/tolerances.py, with truth and yardstick made on the device


def check(call: Call, subject: Subject, training: bool, dropout: float = 0.0) -> None:
    """AssertionError unless output and gradients are as exact as the rule asks; a gradient on any of the inputs.

    Rounding may flip a relu, which makes an element of a gradient wrong as a whole. That comes and goes with the
    inputs, and a mistake stays. With dropout the masks must be those of the fused block.
    """
    ulp = TF32_ULP if subject.precision == "tf32" else None
    kinds, failures = kinds_of(subject), {}
    failing = list(dict.fromkeys(kinds)) if training else []
    for turn in range(ROTATED):
        torch.manual_seed(SEED)
        results = [value.clone() for value in call(subject.inputs[turn])]
        truth, draws = expected(subject, turn, training, dropout)
        check_draws("output", results[0], truth[0], [draw[0] for draw in draws], largest, ulp)
        for name in list(failing):
            try:
                vectors = [joined(values, kinds, name) for values in (results, truth, *draws)]
                eps = torch.finfo(subject.dtype).eps if ulp is None else ulp
                check_draws(f"d {name}", vectors[0], vectors[1], vectors[2:], length, eps)
                failing.remove(name)
            except AssertionError as failure:
                failures[name] = failure
        if not failing:
            return
    raise failures[failing[0]]


def kinds_of(subject: Subject) -> list[str]:
    """Of every gradient that a training step returns."""
    return ["features", "features", *(kind(name) for name in subject.weights)]


def joined(values: Sequence[Tensor], kinds: Sequence[str], name: str) -> Tensor:
    chosen = [value.double().flatten() for value, kind in zip(values[1:], kinds, strict=True) if kind == name]
    return torch.cat(chosen)


@lru_cache(maxsize=2 * ROTATED)
def expected(subject: Subject, turn: int, training: bool, dropout: float) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The reference in float64, and in the dtype: on the inputs, and moved by half an ulp."""
    results = []
    for draw in range(-1, DRAWS):
        dtype = torch.float64 if draw < 0 else subject.dtype
        block = subject.block(GatedRJCAFused, dtype, backend="reference", dropout=dropout)
        x = [value.detach().to(dtype) for value in subject.inputs[turn]]
        if draw > 0:
            x = [moved(value, draw) for value in x]
            with torch.no_grad():
                for parameter in block.parameters():
                    parameter.copy_(moved(parameter, draw))
        torch.manual_seed(SEED)
        call = plain(block, subject.gradient.to(dtype) if training else None)
        results.append(call([value.requires_grad_() for value in x]))
    return results[0], results[1:]


def moved(x: Tensor, seed: int) -> Tensor:
    """By half an ulp, up or down."""
    generator = torch.Generator(x.device).manual_seed(seed)
    signs = torch.randint(2, x.shape, generator=generator, device=x.device) * 2 - 1
    return (x.double() * (1 + signs * torch.finfo(x.dtype).eps / 2)).to(x.dtype)


# ---- time


class Clock:
    """Times calls on the device: the cache emptied before each, and the queue held until the host has said all."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def once(self, call: Callable[[], object], host: float) -> float:
        """Milliseconds of one call, whose launches take the host ``host`` seconds."""
        self.flush.zero_()
        torch.cuda._sleep(int(2 * max(host, 50e-6) * 2e9))  # cycles
        self.events[0].record()
        call()
        self.events[1].record()
        torch.cuda.synchronize()
        return self.events[0].elapsed_time(self.events[1])

    def median(self, call: Callable[[], object]) -> float:
        """Milliseconds of a call, after two to warm up."""
        host = max(host_seconds(call) for _ in range(2))
        return statistics.median(self.once(call, host) for _ in range(7))


def host_seconds(call: Callable[[], object]) -> float:
    """Until the call returns, with nothing left to do on the device before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def measure(call: Call, inputs: Sequence[list[Tensor]], repetitions: int = 40) -> dict[str, float]:
    """Device time, host time, and time per call in a row, on inputs that take turns."""
    clock, turns = Clock(), [inputs[i % len(inputs)] for i in range(repetitions)]
    for x in inputs:
        call(x)
    host = statistics.median(host_seconds(lambda x=x: call(x)) for x in turns)  # type: ignore[misc]
    device = [clock.once(lambda x=x: call(x), host) for x in turns]  # type: ignore[misc]
    start = time.perf_counter()
    for x in turns:
        call(x)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / repetitions
    p20, p50, p80 = (float(f"{value:.4g}") for value in numpy.percentile(device, [20, 50, 80]))
    times = {"device_ms": p50, "device_ms_p20": p20, "device_ms_p80": p80}
    return {**times, "host_us": round(1e6 * host, 1), "wall_us": round(1e6 * wall, 1), "rounds": repetitions}


def timed(name: str, batch: int, of_precision: str, implementation: str, training: bool) -> dict[str, Any]:
    """A row: checked, then timed.

    What is compiled is compiled once. So of its training step, whose masks are its own, only that it is finite is
    checked.
    """
    subject = Subject(replace(SHAPES[name], batch=batch), of_precision)
    with precision(of_precision):
        call = make(subject, implementation, training)
        if not training:  # nothing is dropped
            check(call, subject, training)
        elif implementation == "compiled":
            if not all(bool(value.isfinite().all()) for value in call(subject.inputs[0])):
                raise AssertionError("torch.compile: a gradient is not finite")
        else:
            check(make(subject, implementation, training, dropout=0.0), subject, training)
            if implementation in KERNELS:
                check(call, subject, training, DROPOUT)
        figures: dict[str, Any] = measure(call, subject.inputs)
    if not training:
        figures |= {"GFLOP": flop(subject.shape) / 1e9, "Gtanh": tanhs(subject.shape) / 1e9}
    return {"kind": "time", **described(name, batch, of_precision, implementation, training), **figures}


def described(name: str, batch: int, of_precision: str, implementation: str, training: bool) -> dict[str, Any]:
    what = "training" if training else "forward"
    return {"shape": name, "batch": batch, "dtype": of_precision, "implementation": implementation, "pass": what}


# ---- memory


def weighed(name: str, batch: int, implementation: str) -> dict[str, Any]:
    """Bytes that a training step needs at its peak beyond inputs, weights and the gradients that it returns."""
    subject = Subject(replace(SHAPES[name], batch=batch), "bfloat16")
    call, x = make(subject, implementation, training=True), subject.inputs[0]
    call(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = call(x)[1:]
    peak = torch.cuda.max_memory_allocated() - before - sum(value.nbytes for value in gradients)
    return {"kind": "memory", **described(name, batch, "bfloat16", implementation, True), "bytes": peak}
