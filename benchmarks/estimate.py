"""The estimated cost of a launch on an H200: ``python -m benchmarks.gpu --estimate``.

Both backends run the same phases, and one model counts them: csrc/cuda/costs.h, which also chooses the tiles of the
CUDA C++ kernels. ``python -m benchmarks.gpu_phases`` measures the same phases on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from grjca.measure import SHAPES, Shape
from grjca_kernels import cuda, native
from grjca_kernels.problem import Problem
from grjca_kernels.triton_kernels import launch_config

if TYPE_CHECKING:
    from grjca_kernels._native import PhaseCost

CELLS = [("abaw", 12), ("abaw", 64), ("clip", 64), ("clip", 128), ("light", 32), ("long", 8)]
MULTIPROCESSORS, CLOCK = 132, "1.755 GHz"
LEGEND = f"""ESTIMATES by count, of an H200 ({MULTIPROCESSORS} multiprocessors at {CLOCK}), bfloat16, dropout 0.1. No
GPU has confirmed the constants of the model (csrc/cuda/costs.h). A multiprocessor does 1200 multiply-adds by mma and
16 tanh per clock, and gets 24 bytes per clock from L2; a task waits 1500 clocks (600 where it has frames and no
product), and 375 for every trip to L2 that it cannot hide; two blocks of a multiprocessor wait at the same time and
work one after another; a barrier takes 1.5 us within a team and 1.9 us of the grid. The launch itself is not in it.
tasks: of the grid; turns, trips: of the block that has most; MB: through L2; us: of all times together."""
COLUMNS = "phase                 tiles     times  tasks  turns  trips      MB   us each       us"


def problem_of(shape: Shape, batch: int) -> Problem:
    widths = shape.dim_visual, shape.dim_audio
    options = shape.iterations, shape.gating, "released", 0.1, 0.1, shape.normalize, False
    return Problem(batch, shape.length, widths, *options)


def cuda_table(problem: Problem, backward: bool) -> list[PhaseCost]:
    """The plan that the CUDA C++ kernels would run with."""
    blocks = 2 * MULTIPROCESSORS
    return cuda.plan(problem, torch.bfloat16, blocks, tf32=False, backward=backward, weights=backward).table()


def triton_table(problem: Problem, backward: bool) -> list[PhaseCost]:
    """The configuration that the Triton kernels would run with, counted as if it were a plan of the others."""
    device = launch_config.Device("cuda", 90, MULTIPROCESSORS, 227 * launch_config.KIB)
    launch = launch_config.launch(
        problem, torch.bfloat16, device, backward=backward, weights=backward, tf32=False, lengths=False
    )
    return native.library.cost_table(
        native.problem_of(problem, torch.bfloat16),
        backward=backward,
        weights=backward,
        programs=launch.programs,
        multiprocessors=MULTIPROCESSORS,
        chunk=launch.chunk,
        rows=launch.tiles.m,
        columns=launch.tiles.n,
        tile_weights=launch.constants.block_w,
        parts=launch.parts,
        key_parts=max(launch.parts, launch.key_parts, 1),
    )


TABLES: dict[str, Callable[[Problem, bool], list[PhaseCost]]] = {"cuda": cuda_table, "triton": triton_table}


def lines() -> Iterator[str]:
    """The tables, or why there are none."""
    if native.missing or not native.library.cuda_architectures:
        yield "benchmarks.gpu --estimate: the model is a part of the CUDA C++ kernels, and they are not built here."
        return
    yield LEGEND
    for name, batch in CELLS:
        problem = problem_of(SHAPES[name], batch)
        for direction in ("forward", "backward"):
            for backend, table in TABLES.items():
                rows = table(problem, direction == "backward")
                total = sum(row.times * row.microseconds for row in rows)
                yield f"\n{name} B={batch} {direction}, {backend}: {total:.0f} us"
                yield COLUMNS
                for row in rows:
                    tiles = f"{row.rows} x {row.columns}" if row.rows else ""
                    counts = (
                        f"{row.times:5.0f} {row.tasks:6.0f} {row.turns:6.0f} {row.trips:6.0f} {row.bytes / 1e6:7.1f}"
                    )
                    us = f"{row.microseconds:9.1f} {row.times * row.microseconds:8.1f}"
                    yield f"{row.phase:<20}  {tiles:<9} {counts} {us}"
