"""The choice of activations that a forward saves besides X^t, so that the backward need not recompute them.

The ``keep`` of a call is "least" (X^t alone), "most" (all pieces) or "auto". By the counts below, "auto" takes the
pieces that save the most multiply-adds among those that, together with X^t, fit into half of what an eager block saves,
or into 16 MiB. The choice is a pure function of the shape and the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import torch

from grjca_kernels.problem import Problem

CHOICES = ("auto", "least", "most")

JOINT, KEY, VALUE, HIDDEN, CORRELATION, SIGNS = (1 << bit for bit in range(6))
"""Bits of :attr:`Problem.keep`, as in csrc/grjca.h: J, K, V, H, C before dropout, and the sign of U."""

ALLOWED = 1 << 24
"""The number of bytes that "auto" may always save."""

LINE = 64
PAGE = 1024


class Piece(NamedTuple):
    """One kind of activation: its elements, and the multiply-adds that saving it spares the backward, per sample and
    iteration."""

    bit: int
    elements: int
    saves: int


def _pieces(problem: Problem) -> Iterator[Piece]:
    """Yield all pieces except the signs, which take one bit per element of X."""
    length, width = problem.length, problem.width
    row = length * width
    if problem.projected:
        yield Piece(JOINT, row, row * width)
    yield Piece(KEY, row, row * length)
    yield Piece(VALUE, row, length * sum(d_m**2 for d_m in problem.widths))
    yield Piece(HIDDEN, len(problem.widths) * row, row * width)
    yield Piece(CORRELATION, width**2, row * width)


def _eager(problem: Problem, item: int) -> int:
    """Return how many elements per sample the best known eager block saves (benchmarks/baselines.py), without masks.

    Each iteration saves X, J, K, V, U and the joint X, V C and H of every modality, and C. Where C of the batch takes
    more than 4 MiB, the block works on it in chunks and saves H once more. In addition the block saves the features,
    normalised or not, and the operands of the gates.
    """
    row, batch = problem.length * problem.width, problem.batch
    chunked = sum(batch * d_m * problem.width * item > 4 << 20 for d_m in problem.widths)
    of_iteration = (6 + 2 * len(problem.widths) + chunked) * row + problem.width**2
    return problem.iterations * of_iteration + (3 * bool(problem.gate_ways) + problem.normalize) * row


def all_pieces(problem: Problem) -> int:
    """Return the bits of all pieces that the problem has."""
    return sum(piece.bit for piece in _pieces(problem)) + (SIGNS if problem.released else 0)


def choose(problem: Problem, keep: str, dtype: torch.dtype, held: int | None = None) -> int:
    """Return the bits that ``keep`` stands for.

    ``held`` is how many bytes one saved element takes; by default that is the size of the dtype, and 4 for float16.
    Batch 0 stands for any batch size, as in compiled programs: "auto" is then J, K, V and the signs, which always fit.
    """
    pieces, signs = tuple(_pieces(problem)), SIGNS if problem.released else 0
    if keep == "least":
        return 0
    if keep == "most":
        return all_pieces(problem)
    if not problem.batch:
        return all_pieces(problem) & (JOINT | KEY | VALUE | SIGNS)
    states = (problem.iterations + 1) * problem.length * problem.width  # saved in any case
    room = (_eager(problem, dtype.itemsize) / 2 - states) / problem.iterations
    room = max(room, ALLOWED / (problem.batch * problem.iterations * dtype.itemsize))
    room *= dtype.itemsize / (held or (4 if dtype == torch.float16 else dtype.itemsize))
    best: tuple[Any, ...] = (0, 0, 0)
    for count in range(len(pieces) + 1):
        for chosen in combinations(pieces, count):
            elements, saves = (sum(getattr(piece, name) for piece in chosen) for name in ("elements", "saves"))
            found = (saves, -elements, sum(piece.bit for piece in chosen))
            if elements <= room and found > best:  # not max(), which torch.compile cannot trace with symbols
                best = found
    return best[2] + signs


choose_once = lru_cache(maxsize=512)(choose)
"""Cached version of :func:`choose`. Code under torch.compile must call :func:`choose`, because tracing ignores
caches."""


def kept_bytes(problem: Problem, item: int) -> int:
    """Return how many bytes the pieces in ``problem.keep`` take, laid out as in saved_activations.h.

    ``item`` is the size of an element in bytes.
    """
    width, rows = problem.width, problem.batch * problem.length
    hidden = _leading(len(problem.widths) * width, item)
    each: tuple[tuple[int, Callable[[], int]], ...] = (
        (JOINT, lambda: rows * _leading(width, item)),
        (KEY, lambda: rows * _leading(width, item)),
        (VALUE, lambda: rows * _leading(width, item)),
        (HIDDEN, lambda: rows * hidden),
        (CORRELATION, lambda: problem.batch * width * _leading(width, item)),
        (SIGNS, lambda: problem.batch * (-(-problem.length // 8)) * width),
    )
    of_iteration = LINE + sum(-(-size() // LINE) * LINE for bit, size in each if problem.keep & bit)
    return problem.iterations * of_iteration if problem.keep else 0


def _leading(columns: int, item: int) -> int:
    """Return the bytes from row to row: whole cache lines, but no multiple of the page, or rows would share a cache
    set."""
    size = -(-columns * item // LINE) * LINE
    return size if size % PAGE else size + LINE
