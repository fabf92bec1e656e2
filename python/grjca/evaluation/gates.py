"""Weights of the iterates from the gates of a fusion, in one form for all fusions."""

from __future__ import annotations

import numpy as np


def iterate_weights(fusion: str, gates: tuple[np.ndarray, ...], iterations: int) -> np.ndarray:
    """Compute the weight of each iterate X^0 (the input), ..., X^T in the output: [..., T + 1], rows that sum to 1.

    dca weighs only X^0 and X^T. hgrjca mixes in two steps, whose weights multiply: sum over t of G_t S^t. The relu
    between the two steps is ignored.

    Args:
        fusion: dca, grjca, hgrjca or tagf.
        gates: gates of one modality, as AudioVisualModel returns them: one [..., 2] or [..., T + 1], or for hgrjca
            stages t = 1..T [..., t + 1] and a last one [..., T].
        iterations: T.

    Raises:
        ValueError: for a fusion without gates, or gates of other shapes.
    """
    shapes = {
        "dca": [2],
        "grjca": [iterations + 1],
        "tagf": [iterations + 1],
        "hgrjca": [*range(2, iterations + 2), iterations],
    }
    ways = [np.shape(gate)[-1] for gate in gates]
    if fusion not in shapes or ways != shapes[fusion]:
        raise ValueError(f"gates of {fusion}, T = {iterations}: expected {shapes.get(fusion)} ways, got {ways}.")
    if fusion in ("grjca", "tagf"):
        return np.asarray(gates[0])
    weights = np.zeros((*np.shape(gates[0])[:-1], iterations + 1))
    if fusion == "dca":
        weights[..., [0, -1]] = gates[0]
        return weights
    *stages, last = gates
    for t, stage in enumerate(stages, start=1):
        weights[..., : t + 1] += last[..., t - 1 : t] * stage
    return weights
