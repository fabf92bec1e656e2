"""The CUDA C++ kernels without a GPU: g++ compiles their source, and every lane runs on the CPU.

``forward`` and ``backward`` are those of :mod:`grjca_kernels.cuda` for tensors of the CPU. The work is done by
tests/support/cuda_emulator/worker.cpp, a process of its own for each type of elements, built with
AddressSanitizer and UBSan.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grjca_kernels import problem as problems
from grjca_kernels.call import Call, Gradients

ROOT = Path(__file__).parents[2]
FLAGS = (
    "-std=c++17 -O1 -g1 -Wall -Wextra -Werror -ffp-contract=fast -fno-strict-aliasing"
    " -fsanitize=address,undefined -fno-sanitize-recover=all"
)
ELEMENTS = {
    "float32": ("float", 1), "tf32": ("float", 0), "bfloat16": ("BFloat16", 0), "float16": ("Float16", 0)
}  # fmt: skip


@dataclass(frozen=True)
class LaunchOverrides:
    """How to launch. ``resident``: blocks of the GPU; 0 leaves a number to the plan; ``order``: of the schedule."""

    resident: int = 3
    chunk: int = 0
    tile: int = 0
    parts: int = -1
    order: int = 0
    apart: bool = False
    tf32: bool = False


_wish = LaunchOverrides()


@contextmanager
def overrides(**changes: Any) -> Iterator[None]:
    """Launch so within a ``with`` block."""
    global _wish
    before = _wish
    _wish = replace(before, **changes)
    try:
        yield
    finally:
        _wish = before


# ---- the worker


@cache
def compiler() -> str | None:
    """A C++17 compiler that has the sanitizers."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]:
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
            command = [*shlex.split(name), *FLAGS.split(), "-x", "c++", "-", "-o", f"{folder}/probe"]
            if subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0:
                return name
    return None


def build(name: str, source: str | None = None, *flags: str) -> Path:
    """The program of ``source``, or of cuda_emulator/``name``.cpp; compiled anew if any source has changed since."""
    target = ROOT / "build" / "cuda-emulator" / name
    sources = [
        *sorted(ROOT.glob("csrc/cuda/*.h")),
        *sorted(ROOT.glob("tests/support/cuda_emulator/*")),
        ROOT / "csrc/grjca.h",
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + FLAGS.encode()).hexdigest()
    stamp = target.with_suffix(".sources")
    if not (target.exists() and stamp.exists() and stamp.read_text() == digest):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        folders = [f"-I{ROOT / folder}" for folder in ("csrc/cuda", "tests/support/cuda_emulator")]
        path = ROOT / "tests/support/cuda_emulator" / f"{source or name}.cpp"
        command = [*shlex.split(compiler() or "g++"), *FLAGS.split(), *flags, *folders, str(path), "-o", str(part)]
        subprocess.run(command, check=True)
        part.replace(target)
        stamp.write_text(digest)
    return target


def executable(name: str) -> Path:
    element, exact = ELEMENTS[name]
    return build(name, "worker", f"-DGRJCA_EMULATOR_ELEMENT={element}", f"-DGRJCA_EMULATOR_EXACT={exact}")


@cache
def worker(name: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return subprocess.Popen([executable(name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


# ---- requests


class Request:
    """Numbers and buffers; a buffer is the whole storage of a tensor, once."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.storages: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def add(self, *numbers: int) -> None:
        self.numbers += map(int, numbers)

    def real(self, x: float) -> None:
        self.add(*struct.unpack("q", struct.pack("d", x)))

    def tensor(self, x: Tensor | None) -> None:
        if x is None or x.numel() == 0:
            return self.add(-1, 0)
        storage = x.untyped_storage()
        index, _ = self.storages.setdefault(storage.data_ptr(), (len(self.storages), storage))
        self.add(index, x.data_ptr() - storage.data_ptr())

    def views(self, tensors: Sequence[Tensor | None], count: int) -> None:
        for x in tensors or [None] * count:
            self.tensor(x)
            self.add(*(x.stride()[-3:] if x is not None else (0, 0, 0)))

    def run(self, name: str) -> None:
        process, buffers = worker(name), [_bytes(storage) for _, storage in self.storages.values()]
        assert process.stdin and process.stdout
        head = [len(self.numbers), len(buffers), *self.numbers, *(len(buffer) for buffer in buffers)]
        try:
            process.stdin.write(b"".join([struct.pack(f"{len(head)}q", *head), *map(bytes, buffers)]))
            process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = process.stdout.read(8)
        if len(answer) < 8:
            worker.cache_clear()
            raise RuntimeError("the kernels broke off; the sanitizer's report stands in the captured output")
        fault = process.stdout.read(struct.unpack("q", answer)[0])
        if fault:
            raise RuntimeError(fault.decode())
        for buffer in buffers:
            buffer[:] = process.stdout.read(len(buffer))


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy()).cast("B")


def _begin(direction: int, called: Call) -> tuple[Request, str]:
    problem, request = called.problem, Request()
    request.add(direction, problem.batch, problem.length, len(problem.widths), *problem.widths, problem.iterations)
    request.add(problems.GATINGS.index(problem.gating), problem.released, problem.projected)
    request.add(problem.normalize, problem.shared)
    request.real(problem.dropout)
    request.real(problem.temperature)
    request.add(_wish.resident, _wish.chunk, _wish.tile, _wish.parts, _wish.order, _wish.apart)
    request.views(called.features, len(called.features))
    request.add(len(called.parameters))
    request.kept = [parameter.contiguous() for parameter in called.parameters]  # type: ignore[attr-defined]
    for tensor in (*request.kept, called.lengths, called.seed, called.iterates):  # type: ignore[attr-defined]
        request.tensor(tensor)
    name = str(called.iterates.dtype).removeprefix("torch.")
    return request, "tf32" if name == "float32" and (_wish.tf32 or problem.reduced) else name


def forward(called: Call) -> None:
    request, name = _begin(0, called)
    request.views(called.outputs, len(called.features))
    request.views(called.gates, len(called.features))
    request.run(name)


def backward(called: Call, gradients: Gradients) -> None:
    request, name = _begin(1, called)
    request.views(gradients.outputs, len(called.features))
    request.views([None if g is None else g[0] for g in gradients.iterates], len(called.features))
    request.add(*(0 if g is None else g.stride(0) for g in gradients.iterates))
    request.views(gradients.gates, len(called.features))
    request.views(gradients.features, len(called.features))
    request.add(len(gradients.parameters))
    for gradient in gradients.parameters:
        request.tensor(gradient)
    request.run(name)
