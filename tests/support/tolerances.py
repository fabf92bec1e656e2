"""How far from the reference in float64 a result may be. No other file of the tests derives a tolerance.

**The rule** (operator.md): at most twice the error that eager PyTorch makes in the same dtype, plus a few ulp of the
scale.

*Eager* is reference.py in that dtype, operator by operator; test_reference.py holds it against the eager module. One
run is one draw of its rounding errors, and on small tensors luck decides, so the worst of ``DRAWS`` counts: one on
the inputs themselves, the others on inputs that are perturbed by half an ulp, as storing them already does.

*A few* is 4. On short sums eager may make no error at all; what then remains of ours is tanh, good to about 2 ulp,
the rounding of each X^t to storage and the rounding of the result: half an ulp each, and T is about 2.

*Values* are compared element by element: they are continuous functions of the input.

*Gradients* are compared as vectors, all of one kind together (the d W_k and d b_k of every iteration and modality,
say). relu makes them jump where rounding changes the sign of its argument, so that one element says nothing, and
where tanh is saturated the whole of a tensor can be rounding error. The measure is the relative L2 error e. It bounds
the angle and the bias as well: 1 - cos <= e^2 / 2, and a common factor 1 + b has e = b.

**float64** has no eager error to speak of: both sides compute the same sums in another order. An ulp of 2e-16 grows
with the terms of a sum (up to 10^3), with the gates' 1 / tau (10) and with saturation (10), which leaves 1e-11; a
mistake in a formula is never that small. At full size, where there are 10^6 elements to be unlucky, it is 1e-9.

**One step** of a kernel whose storage is coarser than its arithmetic is its result rounded once: half an ulp of every
element. What arithmetic adds, which has 2^13 times the precision or more, stays below a sixteenth of an ulp of the
scale; gradients, as vectors, need no such allowance: the roundings of their elements add up to less than half an ulp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cases import Case, Inputs, Result, make, run
from grjca_kernels import reference

FACTOR, FEW, DRAWS = 2, 4, 4
FLOAT64, FULL_SIZE = 1e-11, 1e-9


@lru_cache(maxsize=256)
def exact(case: Case, dtype: torch.dtype) -> Result:
    """The reference in float64 on what ``dtype`` holds of the inputs and of the incoming gradients."""
    return run(reference.gated_rjca, case, make(case, dtype).to(torch.float64), rounded=dtype)


@lru_cache(maxsize=256)
def eager(case: Case, dtype: torch.dtype) -> tuple[Result, ...]:
    """Draws of eager's rounding errors."""
    inputs = make(case, dtype)
    return tuple(run(reference.gated_rjca, case, inputs if i == 0 else perturbed(inputs, i)) for i in range(DRAWS))


def check_rule(ours: Result, case: Case, dtype: torch.dtype, gradients: bool = True) -> None:
    """Values, and gradients unless told otherwise, against the rule."""
    truth, draws = exact(case, dtype), eager(case, dtype)
    assert ours.values.keys() == truth.values.keys()
    for name, value in truth.values.items():
        check_draws(name, ours.values[name], value, [draw.values[name] for draw in draws], largest)
    if gradients:
        by_kind = joined(truth.gradients)
        of_draws, of_ours = [joined(draw.gradients) for draw in draws], joined(ours.gradients)
        for kind, vector in by_kind.items():
            drawn = [draw[kind] for draw in of_draws]
            check_draws(f"d {kind}", of_ours[kind], vector, drawn, length, torch.finfo(dtype).eps)


def check_draws(
    name: str,
    ours: Tensor,
    truth: Tensor,
    draws: Sequence[Tensor],
    size: Callable[[Tensor], float],
    ulp: float | None = None,
) -> None:
    """One tensor against the rule: ``truth`` in float64, ``draws`` of eager; ``ulp`` is that of ``ours`` if None."""
    worst = max(size(draw.double() - truth) for draw in draws)
    few = FEW * (torch.finfo(ours.dtype).eps if ulp is None else ulp) * size(truth)
    _check(name, size(ours.double() - truth), FACTOR * worst + few)


def check_float64(ours: Result, truth: Result, tolerance: float = FLOAT64) -> None:
    """Equal up to the order of sums. Every tensor is compared, against the largest value among those of its kind."""
    assert ours.values.keys() == truth.values.keys()
    for name, value in truth.values.items():
        _check(name, largest(ours.values[name] - value), tolerance * largest(value))
    scales = {kind: largest(vector) for kind, vector in joined(truth.gradients).items()}
    assert ours.gradients.keys() == truth.gradients.keys()
    for name, value in truth.gradients.items():
        _check(name, largest(ours.gradients[name] - value), tolerance * scales[kind_of(name)])


def check_close(name: str, ours: Tensor, truth: Tensor, tolerance: float = FLOAT64) -> None:
    """One tensor of float64."""
    assert ours.shape == truth.shape, f"{name}: {list(ours.shape)} instead of {list(truth.shape)}"
    _check(name, largest(ours.double() - truth), tolerance * largest(truth))


def check_one_step(name: str, ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Values that were computed in finer arithmetic and rounded once."""
    ulp = torch.finfo(dtype).eps
    excess = (ours.double() - truth).abs() - ulp / 2 * truth.abs()
    assert not excess.isnan().any(), name
    _check(f"{name}, beyond the rounding", float(excess.max()) if excess.numel() else 0.0, ulp / 16 * largest(truth))


def check_one_step_gradients(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """The same for gradients, as vectors."""
    of_ours = joined(ours)
    for kind, vector in joined(truth).items():
        _check(f"d {kind}", length(of_ours[kind] - vector), torch.finfo(dtype).eps / 2 * length(vector))


def joined(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One vector of float64 per kind: features, query, key, value, output, gates."""
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        parts.setdefault(kind_of(name), []).append(gradient.double().flatten())
    return {kind: torch.cat(tensors) for kind, tensors in parts.items()}


def kind_of(name: str) -> str:
    """``d layers[1].key[0].weight`` -> ``key``, ``d gates[0][1].bias`` -> ``gates``."""
    first, _, rest = name.removeprefix("d ").partition(".")
    return (rest if first.startswith("layers") else first).partition("[")[0].partition(".")[0]


def perturbed(inputs: Inputs, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        signs = torch.randint(2, x.shape, generator=generator) * 2.0 - 1
        return (x.double() * (1 + signs * torch.finfo(x.dtype).eps / 2)).to(x.dtype)

    return inputs.map(move)


def _check(name: str, error: float, bound: float) -> None:
    assert error <= bound, f"{name}: an error of {error:.3g}, {bound:.3g} is allowed"  # false for NaN


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def length(x: Tensor) -> float:
    return float(x.norm())
