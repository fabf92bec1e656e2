"""What a forward keeps for its backward beside X^t, so that the backward does not compute it anew.

``keep`` of a call is "least" (X^t alone), "most" (all pieces) or "auto": the pieces that save most multiply-adds among
those that, with X^t, fit into half of what an eager block saves, by the counts below, or into 16 MiB. The choice is a
pure function of the shape and the dtype.
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
"""Bits of :attr:`Problem.keep`, the same as in csrc/grjca.h: J, K, V, H, C before dropout, and the sign of U."""

ALLOWED = 1 << 24
"""Bytes that "auto" keeps in any case."""

LINE = 64
PAGE = 1024


class Piece(NamedTuple):
    """Of one sample and iteration: elements to keep, and multiply-adds that the backward then saves."""

    bit: int
    elements: int
    saves: int


def _pieces(problem: Problem) -> Iterator[Piece]:
    """All but the signs, which take a bit for each element of X."""
    length, width = problem.length, problem.width
    row = length * width
    if problem.projected:
        yield Piece(JOINT, row, row * width)
    yield Piece(KEY, row, row * length)
    yield Piece(VALUE, row, length * sum(d_m**2 for d_m in problem.widths))
    yield Piece(HIDDEN, len(problem.widths) * row, row * width)
    yield Piece(CORRELATION, width**2, row * width)


def _eager(problem: Problem, item: int) -> int:
    """Elements that the best eager block that we know saves of one sample (benchmarks/baselines.py), masks aside.

    X, J, K, V, U and the joined X of every iteration, V C and H of every modality, and C; H once more where C of the
    batch takes more than 4 MiB, because it is then worked on in chunks; beside the iterations the features, normalised
    or not, and what the gates multiply.
    """
    row, batch = problem.length * problem.width, problem.batch
    chunked = sum(batch * d_m * problem.width * item > 4 << 20 for d_m in problem.widths)
    of_iteration = (6 + 2 * len(problem.widths) + chunked) * row + problem.width**2
    return problem.iterations * of_iteration + (3 * bool(problem.gate_ways) + problem.normalize) * row


def all_pieces(problem: Problem) -> int:
    """The bits of all pieces that there are."""
    return sum(piece.bit for piece in _pieces(problem)) + (SIGNS if problem.released else 0)


def choose(problem: Problem, keep: str, dtype: torch.dtype, held: int | None = None) -> int:
    """The bits that ``keep`` stands for, where an element of a piece takes ``held`` bytes: by default as many as one of
    the dtype, or of float32 in float16.

    A problem of batch 0 stands for one of any size, as compiled programs are: "auto" then is J, K, V and the signs,
    which always fit.
    """
    pieces, signs = tuple(_pieces(problem)), SIGNS if problem.released else 0
    if keep == "least":
        return 0
    if keep == "most":
        return all_pieces(problem)
    if not problem.batch:
        return all_pieces(problem) & (JOINT | KEY | VALUE | SIGNS)
    states = (problem.iterations + 1) * problem.length * problem.width  # which are saved in any case
    room = (_eager(problem, dtype.itemsize) / 2 - states) / problem.iterations
    room = max(room, ALLOWED / (problem.batch * problem.iterations * dtype.itemsize))
    room *= dtype.itemsize / (held or (4 if dtype == torch.float16 else dtype.itemsize))
    best: tuple[Any, ...] = (0, 0, 0)
    for count in range(len(pieces) + 1):
        for chosen in combinations(pieces, count):
            elements, saves = (sum(getattr(piece, name) for piece in chosen) for name in ("elements", "saves"))
            found = (saves, -elements, sum(piece.bit for piece in chosen))
            if elements <= room and found > best:  # not max(), which torch.compile cannot trace of symbols
                best = found
    return best[2] + signs


choose_once = lru_cache(maxsize=512)(choose)
"""The same, remembered; not for torch.compile, which traces through what remembers."""


def kept_bytes(problem: Problem, item: int) -> int:
    """Bytes of what ``problem.keep`` names, as saved_activations.h lays it out in elements of ``item`` bytes."""
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
    """Bytes from row to row: whole lines, and never a multiple of the page, where rows would share a cache set."""
    size = -(-columns * item // LINE) * LINE
    return size if size % PAGE else size + LINE
