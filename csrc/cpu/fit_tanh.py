"""Fits the coefficients of tanh.h and prints them with the error they leave: ``python csrc/cpu/fit_tanh.py``.

Both are minimax polynomials, found as linear programs on Chebyshev nodes. Needs NumPy and SciPy.
"""

import numpy as np
from scipy.optimize import linprog

SMALL, POINTS = 0.625, 2000


def minimax(basis: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Coefficients c that make the largest |weight * (basis @ c - target)| smallest."""
    columns, ones = basis * weight[:, None], np.ones((len(target), 1))
    result = linprog(
        np.eye(basis.shape[1] + 1)[-1],
        A_ub=np.vstack([np.hstack([columns, -ones]), np.hstack([-columns, -ones])]) * 1e8,
        b_ub=np.concatenate([target * weight, -target * weight]) * 1e8,
        bounds=[(None, None)] * basis.shape[1] + [(0, None)],
        method="highs-ipm",
    )
    return result.x[:-1]


def near_zero(degree: int) -> np.ndarray:
    """P of tanh(x) = x + x z P(z), z = x^2, for |x| < 0.625."""
    x = SMALL * (np.cos(np.linspace(0, np.pi, POINTS)) * 0.499 + 0.501)
    z = x * x
    return minimax(np.vander(z, degree + 1, increasing=True), (np.tanh(x) / x - 1) / z, z * x / np.tanh(x))


def power_of_two(degree: int) -> np.ndarray:
    """Q of 2^f = 1 + f Q(f), |f| <= 1/2."""
    f = 0.5 * np.cos(np.linspace(0, np.pi, POINTS))
    f = f[np.abs(f) > 1e-4]
    return minimax(np.vander(f, degree + 1, increasing=True), (2**f - 1) / f, np.abs(f) / 2**f)


def float32_errors(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """Largest error in units in the last place, and its root mean square, when every operation rounds to float32."""

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def horner(coefficients: np.ndarray, at: np.ndarray) -> np.ndarray:
        total = np.full_like(at, coefficients[-1])
        for c in coefficients[-2::-1].astype(np.float32):
            total = fma(total, at, np.full_like(at, c))
        return total

    x = np.concatenate([np.linspace(1e-4, 9.1, 2_000_001), np.logspace(-6, 0.95, 1_000_000)]).astype(np.float32)
    small = fma(x * (x * x), horner(p, x * x), x)
    r = np.minimum(x, np.float32(9.1)) * np.float32(2 / np.log(2))
    k = np.round(r).astype(np.float32)
    power = fma(r - k, horner(q, r - k), np.float32(1)) * np.exp2(k)
    large = np.float32(1) - np.float32(2) / (power + np.float32(1))
    y = np.where(x >= np.float32(SMALL), large, small)
    exact = np.tanh(x.astype(np.float64))
    error = (y - exact) / np.spacing(exact.astype(np.float32))
    return float(np.abs(error).max()), float(np.sqrt(np.mean(error**2)))


if __name__ == "__main__":
    small, power = near_zero(4), power_of_two(5)
    for name, values in (("kSmall", small), ("kPower", power)):
        print(f"constexpr float {name}[] = {{{', '.join(f'{np.float32(v):.9g}f' for v in values)}}};")
    print(
        "// error in units in the last place: at most {:.2f}, root mean square {:.2f}".format(
            *float32_errors(small, power)
        )
    )
