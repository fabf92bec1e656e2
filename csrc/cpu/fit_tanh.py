"""Fits the coefficients of tanh.h and prints them with the error they leave: ``python csrc/cpu/fit_tanh.py``.

tanh(x) = x P(z) / Q(z), z = x^2, on [0, 9.02], both of degree 4, Q(0) = 1, smallest largest relative error: a linear
program for the numerators at a fixed denominator, repeated with the denominator it found. Needs NumPy and SciPy.
"""

import numpy as np
from scipy.optimize import linprog

DEGREE, LIMIT, POINTS, ROUNDS = 4, 9.02, 4000, 12


def fit() -> tuple[np.ndarray, np.ndarray]:
    nodes = np.cos(np.linspace(0, np.pi, POINTS)) * 0.5 + 0.5
    x = np.sort(LIMIT * np.concatenate([nodes, nodes**2]))
    x = x[x > 1e-6]
    ratio = np.tanh(x) / x
    powers = np.vander((x / LIMIT) ** 2, DEGREE + 1, increasing=True)
    denominator = (1 + x * x) ** (DEGREE / 2)
    for _ in range(ROUNDS):
        weight = 1 / (denominator * ratio)
        columns = np.hstack([powers * weight[:, None], -powers[:, 1:] * (ratio * weight)[:, None]])
        scale = np.abs(columns).max(axis=0)
        target = ratio * weight
        ones = np.ones((len(x), 1))
        result = linprog(
            np.eye(columns.shape[1] + 1)[-1],
            A_ub=np.vstack([np.hstack([columns / scale, -ones]), np.hstack([-columns / scale, -ones])]),
            b_ub=np.concatenate([target, -target]),
            bounds=[(None, None)] * columns.shape[1] + [(0, None)],
            method="highs-ipm",
        )
        solution = result.x[:-1] / scale
        p, q = solution[: DEGREE + 1], np.concatenate([[1.0], solution[DEGREE + 1 :]])
        denominator = powers @ q
    unscale = LIMIT ** (-2.0 * np.arange(DEGREE + 1))
    return p * unscale, q * unscale


def float32_error(p: np.ndarray, q: np.ndarray) -> float:
    """Largest relative error when everything is rounded to float32 after each fused multiply-add."""
    x = np.concatenate([np.linspace(1e-4, LIMIT, 2_000_001), np.logspace(-6, 0.95, 1_000_000)]).astype(np.float32)
    z = x * x

    def horner(coefficients: np.ndarray) -> np.ndarray:
        total = np.full_like(z, coefficients[-1])
        for c in coefficients[-2::-1].astype(np.float32):
            total = (total.astype(np.float64) * z + c).astype(np.float32)
        return total

    y = np.minimum(x * horner(p) / horner(q), np.float32(1))
    exact = np.tanh(x.astype(np.float64))
    return float(np.max(np.abs(y - exact) / exact))


if __name__ == "__main__":
    numerator, denominator = fit()
    for name, values in (("P", numerator), ("Q", denominator)):
        print(f"constexpr float {name}[] = {{{', '.join(f'{np.float32(v):.9g}f' for v in values)}}};")
    print(f"// largest relative error in float32: {float32_error(numerator, denominator):.1e}")
