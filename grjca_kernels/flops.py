"""The floating-point operations of a call, as torch.utils.flop_counter counts: a product [m, k] [k, n] takes 2mkn.

K J comes first and then V C, as in every backend. Frames that ``lengths`` marks as absent count too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from grjca_kernels import keeping
from grjca_kernels.problem import Problem


class Product(NamedTuple):
    """One product per sample.

    ``size`` is m k n; ``reads`` is t if an operand is X^t; ``weight`` is the index of the weight.
    """

    size: int
    reads: int | None = None
    weight: int | None = None
    recomputed: bool = True


def forward(problem: Problem) -> int:
    """Return the operations of all iterations and gates."""
    return 2 * problem.batch * sum(product.size for product in _products(problem))


def backward(problem: Problem, needed: Sequence[bool]) -> int:
    """Return the operations of the backward: recomputation, and two products for each of the forward's.

    Products whose gradients are not needed do not count. ``needed`` says for every feature and parameter, in the order
    of :func:`problem.flatten`, whether its gradient is needed.
    """
    of_features, of_parameters = needed[: len(problem.widths)], needed[len(problem.widths) :]
    of_weights = of_parameters[:: 2 if problem.released else 1]

    def times(product: Product) -> int:
        into_features = product.reads != 0 or any(of_features)
        into_weight = product.weight is None or of_weights[product.weight]
        return product.recomputed + into_features + into_weight

    return 2 * problem.batch * sum(product.size * times(product) for product in _products(problem))


def _products(problem: Problem) -> Iterator[Product]:
    length, width, widths = problem.length, problem.width, problem.widths
    weight = 0

    def anew(bit: int) -> bool:
        return not problem.keep & bit

    for t in range(problem.iterations):
        weight = 0 if problem.shared else weight
        sizes = [(length * width**2, keeping.JOINT)] * problem.projected
        sizes += [(length**2 * d_m, keeping.KEY) for d_m in widths]
        sizes += [(length * d_m**2, keeping.VALUE) for d_m in widths]
        for size, bit in sizes:
            yield Product(size, reads=t, weight=weight, recomputed=anew(bit))
            weight += 1
        for d_m in widths:
            of_joint = None if problem.projected else t
            yield Product(length * d_m * width, reads=of_joint, recomputed=anew(keeping.CORRELATION))  # K J
            yield Product(length * d_m * width, recomputed=anew(keeping.HIDDEN))  # V C
            # U is recomputed for the sign in its relu.
            signless = problem.released and anew(keeping.SIGNS)
            yield Product(length * width * d_m, weight=weight, recomputed=signless)
            weight += 1
    for d_m in widths:
        for ways in problem.gate_ways:
            yield Product(length * d_m * ways, reads=problem.iterations, weight=weight)
            weight += 1
