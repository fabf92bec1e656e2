"""How a launch of the Triton kernels divides its work: samples processed at once, and parts of the weights' gradients.

These are rules of thumb based on counts of tasks. They have not been measured on any GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grjca_kernels.problem import Problem

if TYPE_CHECKING:
    from grjca_kernels.triton_kernels.launch_config import Tiles

# ---- samples

WAVES = 4
"""How many tasks per program the products of rows should make, so that enough samples are processed at once.

Half or twice as many samples will do; see chunk_of.
"""

WAIT = 512
"""The terms of a sum that a program could add while the grid waits between two phases."""


def chunk_of(problem: Problem, tile: Tiles, programs: int, streamed: bool) -> int:
    """Return how many samples to process at once: a size near ``enough`` (WAVES) with the fewest rounds of tasks.

    All chunks are about equal. More than twice ``enough`` would only take memory outside L2.
    """
    columns = sum(-(-width // tile.n) for width in (problem.width, *problem.widths, *problem.widths))
    enough = WAVES * programs * tile.m / (problem.length * columns)
    least, most = (min(problem.batch, max(1, round(size))) for size in (enough / 2, 2 * enough))
    near = {*range(least, most, max(1, round(enough / 8))), most}
    sizes = {-(-problem.batch // -(-problem.batch // size)) for size in near}
    return min(sizes, key=lambda size: (rounds(problem, tile, programs, streamed, size), -size))


def rounds(problem: Problem, tile: Tiles, programs: int, streamed: bool, chunk: int) -> int:
    """Return how many terms the busiest program adds in an iteration of all chunks, including waits between phases."""
    chunks, rest = divmod(problem.batch, chunk)
    total = 0
    for samples, times in ((chunk, chunks), (rest, 1)):
        for phase in phases_of(problem, tile, streamed, samples) if samples else ():
            longest = max(terms for _, terms in phase)
            work = sum(tasks * terms for tasks, terms in phase)
            total += times * (-(-work // (programs * longest)) * longest + WAIT)
    return total


def phases_of(problem: Problem, tile: Tiles, streamed: bool, samples: int) -> list[list[tuple[int, int]]]:
    """Return the kinds of tasks of every phase of an iteration, each as its number of tasks and the terms each sums."""
    length, width, widest = problem.length, problem.width, max(problem.widths)
    rows, of_sample = -(-samples * length // tile.m), samples * -(-length // tile.m)
    columns, all_columns = sum(-(-d_m // tile.n) for d_m in problem.widths), -(-width // tile.n)
    project = [(rows * columns, widest), (of_sample * columns, length)] + problem.projected * [
        (rows * all_columns, width)
    ]
    if streamed:
        attend = [[(samples * len(problem.widths) * -(-width // tile.m), widest)]]
    else:
        of_correlations = samples * all_columns * sum(-(-d_m // tile.m) for d_m in problem.widths)
        attend = [[(of_correlations, length)], [(of_sample * len(problem.widths) * all_columns, widest)]]
    return [project, *attend, [(rows * columns, width)]]


# ---- gradients of weights

MOST_PARTS, FEWEST_ROWS = 8, 256
"""The most parts of the rows in the gradients of the weights, and the fewest rows in a part."""


def parts_of(problem: Problem, block: int, programs: int, chunk: int) -> int:
    """Return how many parts keep the grid busy with one iteration's weights, or 0 if all rows make one sum."""
    of_keys = len(problem.widths) * (-(-problem.length // block)) ** 2
    parts = round(programs / (weight_tiles(problem, block) + of_keys))
    parts = max(1, min(MOST_PARTS, parts, chunk * problem.length // FEWEST_ROWS))
    return 0 if parts == 1 and is_one_sum(problem, chunk) else parts


def is_one_sum(problem: Problem, chunk: int) -> bool:
    """Return whether one iteration of one chunk makes the whole gradient of a weight."""
    return chunk >= problem.batch and not (problem.shared and problem.iterations > 1)


MOST_KEY_PARTS = 64
"""The most parts of the samples in the gradient of W_k; the reduction adds them one after another."""


def key_parts_of(problem: Problem, chunk: int, parts: int) -> int:
    """Return how many parts give a sum of W_k about as many terms (d_m per sample) as the other weights' sums have
    rows.

    With few frames W_k has only one tile, and as one sum it would keep the whole grid waiting.
    """
    samples = round(chunk * problem.length / max(parts, 1) / max(problem.widths))
    samples = max(1, samples, -(-chunk // MOST_KEY_PARTS))
    of_keys = -(-chunk // samples)
    return 0 if of_keys == 1 and is_one_sum(problem, chunk) else of_keys


def weight_block(problem: Problem, tile: Tiles, programs: int) -> int:
    """Return the block size: 64 at most if more would leave programs idle, or if rows of W_k are not aligned (see
    tiles)."""
    few = weight_tiles(problem, tile.w) < programs or problem.length % 8 > 0
    return min(64, tile.w) if few else tile.w


def weight_tiles(problem: Problem, block: int) -> int:
    """Return the number of gradient tiles of all weights of an iteration except W_k, whose number grows with L."""
    width = -(-problem.width // block)
    widths = [-(-d_m // block) for d_m in problem.widths]
    return width * width + sum(d_m * d_m + d_m * width for d_m in widths)
