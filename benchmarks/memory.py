"""How much memory a call takes, each in a process of its own; what may run out of it has to end without the rest."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DROPOUT, IMPLEMENTATIONS, THREADS, Problem
from benchmarks.row_files import Row
from grjca.measure import Shape
from grjca_kernels import GatedRJCAFused

Call = Callable[[], object]

HANGS = 1800.0  # seconds after which a process is given up


def available_memory() -> int | None:
    """Bytes; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


# ---- a process for everything that may not survive

OUT_OF_MEMORY = "out of memory"


class ProcessError(RuntimeError):
    """What went wrong in a process, in a sentence."""


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh process, whose end is not that of this one. ProcessError if there is none."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torch", "benchmarks.cases"])  # once; nothing computes there, so forks are safe
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(HANGS):
            raise ProcessError(f"no result after {HANGS:g} s.")
        result, error = ours.recv()
    except EOFError:
        process.join()
        hint = ", as the system does when memory runs out" if process.exitcode == -9 else ""
        raise ProcessError(f"the process ended with exit code {process.exitcode}{hint}.") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise ProcessError(error)
    return result


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    limit_memory()
    torch.set_num_threads(THREADS)
    try:
        answer = function(*arguments), None
    except Exception as error:
        answer = None, sentence(error)
    connection.send(answer)


def limit_memory() -> None:
    """Let an allocation beyond what is available fail, before the system kills a process of its own choice."""
    memory = available_memory()
    if sys.platform == "linux" and memory is not None:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (memory if hard < 0 else min(memory, hard), hard))


def sentence(error: Exception) -> str:
    """Type and first line, or that memory ran out."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    without = isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text
    return f"{OUT_OF_MEMORY}: {text}" if without else text


# ---- what runs there


class Raw(Problem):
    """With tensors made without detours, which would leave traces in the peak of memory."""

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.shape.block(GatedRJCAFused, dtype=self.dtype).state_dict()

    @cached_property
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        shape = self.shape
        visual, audio = (
            torch.randn(shape.batch, shape.length, width, dtype=self.dtype, requires_grad=True)
            for width in (shape.dim_visual, shape.dim_audio)
        )
        return [(visual, audio)]

    @cached_property
    def gradient(self) -> Tensor:
        return torch.cat([torch.ones_like(x) for x in self.inputs[0]], dim=-1)


def ready(problem: Problem, implementation: str, training: bool, inputs: Sequence[tuple[Tensor, Tensor]]) -> Call:
    """A call to measure, on inputs that take turns."""
    block = IMPLEMENTATIONS[implementation](problem, dropout=DROPOUT).train(training)
    turns, parameters = itertools.cycle(inputs), list(block.parameters())
    gradient = problem.gradient if training else None

    def call() -> object:
        x = next(turns)
        if gradient is None:
            with torch.no_grad():
                return block(*x)
        return torch.autograd.grad(block(*x), [*x, *parameters], gradient)  # which adds to no gradient that is there

    return call


def weighed(shape: Shape, implementation: str, training: bool, dtype: torch.dtype = torch.float32) -> Row:
    """By how much the first call lifts the peak of the resident set, its results included, and how long it takes."""
    tiny = Raw(replace(shape, length=4, dim_visual=8, dim_audio=4, batch=2), dtype)
    ready(tiny, implementation, training, tiny.inputs)()  # loads code and starts threads, which are no part of a call
    subject = Raw(shape, dtype)
    call = ready(subject, implementation, training, subject.inputs)
    before, start = peak_resident(), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - start, peak_resident()
    return {"peak_bytes": None if before is None or after is None else after - before, "seconds": seconds}


def peak_resident() -> int | None:
    """Bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
