"""How near the kernels come to what this processor can do at best: ``python -m benchmarks.roofline``.

First the ceilings, with the threads of the other benchmarks: memory by a large copy, products by one tile
that caches hold, tanh by the loop of the kernels over a vector in the cache. Then, for every shape, how long each
resource alone must take for a forward and for a training step, and how long eager and fused did.

A ceiling is what some program reached. Another one may be faster, which shows as more than 100 % of the bound.

With ``--phases [SHAPE ...]`` it prints instead how long each phase of the native kernels takes.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import phases
from benchmarks.cases import DROPOUT, ROOT, SCORES, THREADS, Problem, flop, tanhs, where
from benchmarks.gate import at_small_batch, check
from grjca.measure import SHAPES, Shape, alternate
from grjca_kernels import GatedRJCAFused, cpu
from tolerances import check_draws, largest

COMPARED = ("eager", "fused")
PASSES = {"forward": False, "training step": True}
SECONDS = 3.0  # of measuring, for each ceiling and each implementation of a shape
FEWEST, MOST = 5, 200
COPIED = 1 << 29  # bytes, many times the largest cache
VALUES = 1 << 14  # of tanh per thread: 64 KiB
TERMS = (64, 128, 256)  # of the sums of a tile
HEAD = """| shape | pass | implementation | memory ms | matrix ms | tanh ms | ms | of the bound | of matrix + tanh |
|---|---|---|--:|--:|--:|--:|--:|--:|"""

LOOP = """
#include "cpu/matrix.h"
#include "cpu/tanh.h"
using namespace grjca::GRJCA_ISA;
extern "C" int lanes() { return kLanes<float>; }
extern "C" void values(const float* x, float* y, int64_t count, int64_t repeats) {
  for (; repeats; --repeats) {
    for (int64_t i = 0; i < count; i += kLanes<float>) store(y + i, tanh(load(x + i)));
    asm volatile("" ::: "memory");  // or one of the repeats would do for all
  }
}
extern "C" int rows() { return kTileRows; }
extern "C" int columns() { return kPanel<float>; }
extern "C" void one_tile(const float* a, const float* b, float* y, int64_t terms, int64_t repeats) {
  const float* row[kTileRows];
  for (int r = 0; r < kTileRows; ++r) row[r] = a + r * terms;
  for (; repeats; --repeats) {
    Vector<float> acc[kTileRows][2] = {};
    multiply<float, 2, 1>(acc, row, b, terms);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < 2; ++v) store(y + r * kPanel<float> + v * kLanes<float>, acc[r][v]);
    asm volatile("" ::: "memory");
  }
}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Measure against ceilings.")
    about = "print the time of each phase of the native kernels; by default for all of " + ", ".join(SHAPES)
    parser.add_argument("--phases", nargs="*", choices=list(SHAPES), metavar="SHAPE", help=about)
    asked = parser.parse_args(argv).phases
    torch.set_num_threads(THREADS)
    if cpu.why_not():
        raise SystemExit(f"benchmarks.roofline: expected the native CPU kernels, got none: {cpu.why_not()}")
    if asked is not None:
        print(phases.table({name: SHAPES[name] for name in asked or SHAPES}, one_tile()))
        return 0
    ceilings = Ceilings(copy(), one_tile(), kernel_tanh())
    print(f"{where()}, float32: {ceilings}\n\n{HEAD}")
    for name, shape in SHAPES.items():
        for what in PASSES:
            print("\n".join(rows(name, shape, what, ceilings)), flush=True)
    return 0


# ---- ceilings


@dataclass(frozen=True)
class Ceilings:
    """Measure the processor's ceilings, in 10^9 per second."""

    memory: float  # bytes, read and written
    matrix: float  # FLOP
    tanh: float  # values

    def __str__(self) -> str:
        return f"{self.memory:.3g} GB/s, {self.matrix:.3g} GFLOP/s, {self.tanh:.3g} G tanh/s at best"


def copy() -> float:
    """A copy that no cache holds; bytes that are read and bytes that are written count, as the caller sees them."""
    a = torch.arange(COPIED // 4, dtype=torch.float32)
    b = torch.zeros_like(a)
    return rate(2 * COPIED, lambda: b.copy_(a))


def one_tile() -> float:
    """The inner loop of csrc/cpu/matrix.h on one tile per thread, whose operands stay next to the core: nothing but
    multiplying and adding."""
    with compiled_loop() as (native, pool):
        rows, columns = native.rows(), native.columns()

        def at(terms: int) -> float:
            a, b = torch.randn(THREADS, rows, terms), torch.randn(THREADS, terms, columns)
            y = torch.empty(THREADS, rows, columns)

            def run(repeats: int) -> None:
                on_every_core(pool, native.one_tile, (a, b, y), terms, repeats)

            run(1)
            check_draws(f"a tile of {terms} terms", y, a.double() @ b.double(), [a @ b], largest)
            flop_of_one = 2 * rows * columns * terms
            repeats = (1 << 31) // flop_of_one
            return rate(repeats * flop_of_one * THREADS, lambda: run(repeats))

        return max(map(at, TERMS))


def kernel_tanh() -> float:
    """csrc/cpu/tanh.h, as the kernels use it, in a loop of its own over a vector per thread that its core holds."""
    with compiled_loop() as (native, pool):
        x = SCORES * torch.randn(THREADS, VALUES)
        y = torch.empty_like(x)

        def run(repeats: int) -> None:
            on_every_core(pool, native.values, (x, y), VALUES, repeats)

        run(1)
        check_draws("tanh", y, x.double().tanh(), [x.tanh()], largest)
        repeats = (1 << 25) // VALUES
        return rate(repeats * VALUES * THREADS, lambda: run(repeats))


def rate(work: int, call: Callable[[], object]) -> float:
    """10^9 units of work per second, by the median time of a call."""
    call()
    times: list[float] = []
    deadline = time.perf_counter() + SECONDS / len(TERMS)
    while len(times) < FEWEST or (time.perf_counter() < deadline and len(times) < MOST):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return work / median(times) / 1e9


def on_every_core(
    pool: ThreadPoolExecutor, function: Callable[..., None], tensors: Sequence[Tensor], *sizes: int
) -> None:
    """A native function of pointers and sizes, on the first dimension of the tensors, without Python's lock."""
    integers = [ctypes.c_int64(size) for size in sizes]
    pointers = [[ctypes.c_void_p(tensor[i].data_ptr()) for tensor in tensors] for i in range(THREADS)]
    for call in [pool.submit(function, *row, *integers) for row in pointers]:
        call.result()


@contextmanager
def compiled_loop() -> Iterator[tuple[ctypes.CDLL, ThreadPoolExecutor]]:
    """LOOP for the instruction set that the kernels choose here, with the flags of setup.py; and a thread per core."""
    isa = cpu.instruction_sets()[0]
    flags = f"{_of_setup('FLAGS')} {_of_setup('INSTRUCTION_SETS')[isa]} -fvisibility=default"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *shlex.split(flags), f"-DGRJCA_ISA={isa}", "-shared"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        library = Path(folder, "loop.so")
        command += ["-I", str(ROOT / "csrc"), "-x", "c++", "-", "-o", str(library)]
        subprocess.run(command, input=LOOP, text=True, check=True, stderr=subprocess.DEVNULL)
        yield ctypes.CDLL(str(library)), pool


def _of_setup(name: str) -> Any:
    """A constant of setup.py, which builds when it is imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py: expected a constant {name}, got none; benchmarks/roofline.py compiles by it.")


# ---- shapes


def bounds(shape: Shape, what: str, ceilings: Ceilings) -> tuple[float, float, float]:
    """Milliseconds that memory, products and tanh must take at least, each alone.

    Bytes are those of inputs, outputs and weights, once each, and in a training step of all their gradients. Its
    backward is two products for each one of the forward, and no tanh: what an implementation computes anew is not among
    what must be done.
    """
    training = PASSES[what]
    frames = shape.batch * shape.length * (shape.dim_visual + shape.dim_audio)
    weights = sum(p.numel() for p in shape.block(GatedRJCAFused, device="meta").parameters())
    moved = 4 * (2 * frames + weights) * (2 if training else 1)
    work = (moved, flop(shape) * (3 if training else 1), tanhs(shape))
    memory, matrix, tanh = (amount / best / 1e6 for amount, best in zip(work, astuple(ceilings), strict=True))
    return memory, matrix, tanh


def rows(name: str, shape: Shape, what: str, ceilings: Ceilings) -> Iterator[str]:
    """Lines of the table, by eager and fused taking turns.

    On a processor products and tanh share the vector units, so their sum is nearer the truth than the greater of them.
    """
    problem, training = Problem(shape), PASSES[what]
    few, calls = at_small_batch(problem), {}
    for how in COMPARED:
        check(few.call(how, training, dropout=0.0), few, training)
        calls[how] = problem.in_turns(problem.call(how, training, dropout=DROPOUT))
    seconds = sum(sum(times) for times in alternate(calls, 1).values())
    rounds = min(max(int(SECONDS * len(calls) / seconds), FEWEST), MOST)
    of = bounds(shape, what, ceilings)
    for how, times in alternate(calls, rounds).items():
        ms = 1e3 * median(times)
        cells = [f"{name}, B = {shape.batch}", what, how, *(f"{value:.3g}" for value in (*of, ms))]
        cells += [f"{100 * bound / ms:.0f} %" for bound in (max(of), of[1] + of[2])]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
