"""How a launch of the Triton kernels divides its work: samples that are walked through at once, and parts of the sums
that are gradients of weights.

These are rules of thumb by counts of tasks. No GPU has measured any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grjca_kernels.problem import Problem

if TYPE_CHECKING:
    from grjca_kernels.triton_kernels.launch_config import Tiles

# ---- samples

WAVES = 4
"""Tasks that the products of rows make for each program of the grid with enough samples at once; half or twice as many
samples will do, see chunk_of."""

WAIT = 512
"""Terms of a product's sum that a program could add up while the grid comes together between two phases."""


def chunk_of(problem: Problem, tile: Tiles, programs: int, streamed: bool) -> int:
    """How many samples to walk at once: of the sizes near ``enough`` (WAVES) that whose rounds of tasks end soonest.

    All chunks are about alike. More than twice ``enough`` would only take memory, and that out of L2.
    """
    columns = sum(-(-width // tile.n) for width in (problem.width, *problem.widths, *problem.widths))
    enough = WAVES * programs * tile.m / (problem.length * columns)
    least, most = (min(problem.batch, max(1, round(size))) for size in (enough / 2, 2 * enough))
    near = {*range(least, most, max(1, round(enough / 8))), most}
    sizes = {-(-problem.batch // -(-problem.batch // size)) for size in near}
    return min(sizes, key=lambda size: (rounds(problem, tile, programs, streamed, size), -size))


def rounds(problem: Problem, tile: Tiles, programs: int, streamed: bool, chunk: int) -> int:
    """Terms that the busiest program adds up in an iteration of all chunks, waiting between phases included."""
    chunks, rest = divmod(problem.batch, chunk)
    total = 0
    for samples, times in ((chunk, chunks), (rest, 1)):
        for phase in phases_of(problem, tile, streamed, samples) if samples else ():
            longest = max(terms for _, terms in phase)
            work = sum(tasks * terms for tasks, terms in phase)
            total += times * (-(-work // (programs * longest)) * longest + WAIT)
    return total


def phases_of(problem: Problem, tile: Tiles, streamed: bool, samples: int) -> list[list[tuple[int, int]]]:
    """Of every phase of an iteration its kinds of tasks: how many there are, and how many terms each sums."""
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
"""Parts of the rows in the gradients of the weights: no more, and none with fewer rows."""


def parts_of(problem: Problem, block: int, programs: int, chunk: int) -> int:
    """So many that the weights of one iteration keep the grid busy; none if all samples and iterations make one sum."""
    of_keys = len(problem.widths) * (-(-problem.length // block)) ** 2
    parts = round(programs / (weight_tiles(problem, block) + of_keys))
    parts = max(1, min(MOST_PARTS, parts, chunk * problem.length // FEWEST_ROWS))
    return 0 if parts == 1 and is_one_sum(problem, chunk) else parts


def is_one_sum(problem: Problem, chunk: int) -> bool:
    """Whether one iteration of one chunk makes the whole gradient of a weight."""
    return chunk >= problem.batch and not (problem.shared and problem.iterations > 1)


MOST_KEY_PARTS = 64
"""Parts of the samples in the gradient of W_k: the reduction adds them one after another."""


def key_parts_of(problem: Problem, chunk: int, parts: int) -> int:
    """So many that a sum of W_k has about as many terms, d_m from each sample, as those of the other weights have rows.

    With few frames W_k has one tile alone, and as one sum it would keep the whole grid waiting.
    """
    samples = round(chunk * problem.length / max(parts, 1) / max(problem.widths))
    samples = max(1, samples, -(-chunk // MOST_KEY_PARTS))
    of_keys = -(-chunk // samples)
    return 0 if of_keys == 1 and is_one_sum(problem, chunk) else of_keys


def weight_block(problem: Problem, tile: Tiles, programs: int) -> int:
    """64 at most where more would leave programs idle, or where rows of W_k are not aligned: see tiles."""
    few = weight_tiles(problem, tile.w) < programs or problem.length % 8 > 0
    return min(64, tile.w) if few else tile.w


def weight_tiles(problem: Problem, block: int) -> int:
    """Tiles of the gradients of all weights of an iteration but W_k, of which there are more with more frames."""
    width = -(-problem.width // block)
    widths = [-(-d_m // block) for d_m in problem.widths]
    return width * width + sum(d_m * d_m + d_m * width for d_m in widths)
