"""operator.md in PyTorch, in the order of its equations: any dtype, any device, no thought of speed.

Gradients come from autograd, so this is also the backend for what the kernels don't do (double backward, export).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grjca_kernels import dropout as masks
from grjca_kernels.shapes import Gates, Layer, Linear, Problem, check, check_lengths_values


def gated_rjca(
    features: Sequence[Tensor],
    layers: Sequence[Layer],
    gates: Gates = (),
    *,
    iterations: int | None = None,
    gating: str = "flat",
    form: str = "released",
    dropout: float = 0.0,
    temperature: float = 0.1,
    normalize: bool = False,
    lengths: Tensor | None = None,
    seed: Tensor | int | None = None,
    concat: bool = False,
    return_gates: bool = False,
    return_iterates: bool = False,
    backend: str = "reference",
) -> Any:
    """Same signature and result as :func:`grjca_kernels.gated_rjca`; ``backend`` is accepted and ignored."""
    problem = check(
        features,
        layers,
        gates,
        iterations=iterations,
        gating=gating,
        form=form,
        dropout=dropout,
        temperature=temperature,
        normalize=normalize,
        lengths=lengths,
        seed=seed,
    )
    seed = draw_seed(problem, seed, features[0].device)
    outputs, iterates, ways = forward(problem, features, layers, gates, lengths, seed)
    return assemble(outputs, iterates, ways, concat, return_gates, return_iterates)


def draw_seed(problem: Problem, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """The seed as a tensor of one int64 on ``device``, drawn from PyTorch's generator if None; None without dropout."""
    if problem.dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(())
    if seed is not None:
        word = seed & (2**64 - 1)
        return torch.full((), word - 2**64 if word >= 2**63 else word, dtype=torch.int64, device=device)
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def assemble(
    outputs: Sequence[Tensor],
    iterates: Sequence[Tensor],
    gates: Sequence[Any],
    concat: bool,
    return_gates: bool,
    return_iterates: bool,
) -> Any:
    """The public result: the outputs (a tuple, or their concatenation), then a dict of extras if any were asked for."""
    result: tuple[Any, ...] = (torch.cat(list(outputs), dim=-1),) if concat else tuple(outputs)
    extras: dict[str, Any] = {}
    if return_gates:
        extras["gates"] = tuple(gates)
    if return_iterates:
        extras["iterates"] = tuple(iterates)
    if extras:
        return (*result, extras)
    return result[0] if concat else result


def forward(
    problem: Problem,
    features: Sequence[Tensor],
    layers: Sequence[Layer],
    gates: Gates,
    lengths: Tensor | None,
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Y_m [B, L, d_m], the iterates [T, B, L, d_m] and the gate values, each per modality."""
    present = presence(problem, lengths, features[0].device)
    x = [initial(problem, x_m, present) for x_m in features]
    history = [[x_m] for x_m in x]
    for t in range(problem.iterations):
        x = iterate(problem, x, layers[0 if problem.shared else t], t, present, seed)
        for m, x_m in enumerate(x):
            history[m].append(x_m)
    outputs, values = [], []
    for m, states in enumerate(history):
        y, value = gate(problem, states, gates[m] if gates else ())
        outputs.append(y if present is None else torch.where(present, y, 0))
        values.append(_masked(value, present))
    return outputs, [torch.stack(states[1:]) for states in history], values


def presence(problem: Problem, lengths: Tensor | None, device: torch.device) -> Tensor | None:
    """[B, L, 1], true for the frames that exist; None when all do."""
    if lengths is None:
        return None
    if not torch.compiler.is_compiling():
        check_lengths_values(lengths, problem.length)
    return (torch.arange(problem.length, device=device) < lengths[:, None])[..., None]


def initial(problem: Problem, x: Tensor, present: Tensor | None) -> Tensor:
    """X^0: the input with absent frames cleared, normalised per frame if asked for."""
    if present is not None:
        x = torch.where(present, x, 0)
    if not problem.normalize:
        return x
    wide = (
        x if x.dtype == torch.float64 else x.float()
    )  # 1e-12 is 0 in float16, and the norm of large frames is not finite
    return F.normalize(wide, dim=-1, eps=1e-12).to(x.dtype)


def iterate(
    problem: Problem, x: Sequence[Tensor], layer: Layer, t: int, present: Tensor | None, seed: Tensor | None
) -> list[Tensor]:
    """X^(t+1) of every modality from X^t (t counts from 0)."""

    def drop(a: Tensor, modality: int, site: int) -> Tensor:
        if seed is None:
            return a
        shape = (a.shape[0], a.shape[1], a.shape[2])
        return a * masks.scaled_mask(
            seed, problem.dropout, iteration=t, modality=modality, site=site, shape=shape, dtype=a.dtype
        )

    joint = torch.cat(list(x), dim=-1)
    if layer.query is not None:
        joint = linear(joint, layer.query)  # J [B, L, d]
    result = []
    for m, x_m in enumerate(x):
        key = linear(x_m.mT, layer.key[m])  # K_m [B, d_m, L]
        if present is not None:
            key = torch.where(present.mT, key, 0)
        value = linear(x_m, layer.value[m])  # V_m [B, L, d_m]
        correlation = torch.tanh(key @ joint / math.sqrt(problem.width))  # C_m [B, d_m, d]
        attended = value @ drop(correlation, m, masks.SITE_CORRELATION)
        hidden = torch.relu(torch.tanh(attended) if problem.released else attended)  # H_m [B, L, d]
        update = linear(hidden, layer.output[m])
        if problem.released:
            update = drop(torch.relu(update), m, masks.SITE_OUTPUT)  # U_m [B, L, d_m]
        if present is not None:
            update = torch.where(present, update, 0)
        result.append(x_m + update)
    return result


def gate(problem: Problem, states: Sequence[Tensor], gates: Sequence[Linear]) -> tuple[Tensor, Any]:
    """Y_m from X_m^0..T, and the gate values: [B, L, ways], a tuple of them for "hierarchical", None for "none"."""
    last = states[-1]

    def ways(x: Tensor, g: Linear) -> Tensor:
        return torch.softmax(linear(x, g) / problem.temperature, dim=-1)

    def mix(values: Tensor, choices: Sequence[Tensor]) -> Tensor:
        return torch.relu(sum((values[..., i : i + 1] * choice for i, choice in enumerate(choices)), torch.zeros(())))

    if problem.gating == "none":
        return last, None
    if problem.gating == "hierarchical":
        stages = [ways(states[t], gates[t - 1]) for t in range(1, problem.iterations + 1)]
        mixed = [mix(stage, states[: t + 2]) for t, stage in enumerate(stages)]
        final = ways(last, gates[-1])
        return mix(final, mixed), (*stages, final)
    values = ways(last, gates[0])
    return mix(values, states if problem.gating == "flat" else (states[0], last)), values


def linear(x: Tensor, parameters: Linear) -> Tensor:
    """y = x W^T + b."""
    return F.linear(x, parameters.weight, parameters.bias)


def _masked(values: Any, present: Tensor | None) -> Any:
    if present is None or values is None:
        return values
    if isinstance(values, tuple):
        return tuple(torch.where(present, value, 0) for value in values)
    return torch.where(present, values, 0)
