"""operator.md in PyTorch, in the order of its equations: any dtype, any device, and no optimisation.

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
from grjca_kernels.call import Call, answers, describe
from grjca_kernels.problem import Layer, Linear, Problem, check_lengths_values, unflatten


def assemble(call: Call, outputs: Sequence[Tensor], iterates: Sequence[Tensor], gates: Sequence[Any]) -> Any:
    """Assemble the public result of a call."""
    extras: dict[str, Any] = {}
    if call.return_gates:
        extras["gates"] = tuple(gates)
    if call.return_iterates:
        extras["iterates"] = tuple(iterates)
    return with_extras(outputs, extras, call.concat)


def with_extras(outputs: Sequence[Any], extras: dict[str, Any], concat: bool) -> Any:
    """Return the outputs (a tuple, or the concatenation alone), followed by the extras if there are any."""
    if extras:
        return (*outputs, extras)
    return outputs[0] if concat else tuple(outputs)


def answer(call: Call) -> Any:
    """Compute the public result of a call in PyTorch."""
    outputs, iterates, gates = forward(call)
    return assemble(call, [torch.cat(outputs, dim=-1)] if call.concat else outputs, iterates, gates)


@answers(describe)
def gated_rjca(call: Call) -> Any:
    """Compute :func:`grjca_kernels.gated_rjca` with the same signature and result; ``backend`` is accepted and
    ignored."""
    return answer(call)


def forward(call: Call) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """Return Y_m [B, L, d_m], the iterates [T, B, L, d_m] and the gate values, each per modality, in new tensors."""
    problem, seed = call.problem, call.seed
    layers, gates = unflatten(problem, call.parameters)
    if call.lengths is not None and not torch.compiler.is_compiling():
        check_lengths_values(call.lengths, problem.length)
    present = presence(problem.length, call.lengths)
    x = [initial(problem.normalize, x_m, present) for x_m in call.features]
    history = [[x_m] for x_m in x]
    for t in range(problem.iterations):
        x = iterate(problem, x, layers[0 if problem.shared else t], t, present, seed)
        for m, x_m in enumerate(x):
            history[m].append(x_m)
    outputs, values = [], []
    for m, states in enumerate(history):
        y, value = gate(problem, states, gates[m])
        outputs.append(y if present is None else torch.where(present, y, 0))
        values.append(_masked(value, present))
    return outputs, [torch.stack(states[1:]) for states in history], values


def presence(length: int, lengths: Tensor | None) -> Tensor | None:
    """Return a mask [B, L, 1], true for the frames that exist, or None when all do."""
    if lengths is None:
        return None
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[..., None]


def initial(normalize: bool, x: Tensor, present: Tensor | None) -> Tensor:
    """Return X^0: the input with absent frames cleared, and each frame normalised if requested."""
    if present is not None:
        x = torch.where(present, x, 0)
    if not normalize:
        return x
    wide = x if x.dtype == torch.float64 else x.float()  # 1e-12 and squared large norms do not fit float16
    return F.normalize(wide, dim=-1, eps=1e-12).to(x.dtype)


def iterate(
    problem: Problem, x: Sequence[Tensor], layer: Layer, t: int, present: Tensor | None, seed: Tensor | None
) -> list[Tensor]:
    """Compute X^(t+1) of every modality from X^t (t counts from 0)."""
    joint = torch.cat(list(x), dim=-1)
    if layer.query is not None:
        joint = linear(joint, layer.query)  # J [B, L, d]
    result = []
    for m, x_m in enumerate(x):
        *_, update = attend(problem, x_m, joint, m, layer, t, present, seed)
        if problem.released:
            update = masks.drop(torch.relu(update), seed, problem.dropout, t, m, masks.SITE_OUTPUT)  # U_m [B, L, d_m]
        if present is not None:
            update = torch.where(present, update, 0)
        result.append(x_m + update)
    return result


def attend(
    problem: Problem,
    x: Tensor,
    joint: Tensor,
    m: int,
    layer: Layer,
    t: int,
    present: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return K_m, V_m, C_m, C_m after dropout, H_m, and H_m W_h^T + b_h, from which U_m follows."""
    key = linear(x.mT, layer.key[m])  # [B, d_m, L]
    if present is not None:
        key = torch.where(present.mT, key, 0)
    value = linear(x, layer.value[m])  # [B, L, d_m]
    correlation = torch.tanh(key @ joint / math.sqrt(problem.width))  # [B, d_m, d]
    dropped = masks.drop(correlation, seed, problem.dropout, t, m, masks.SITE_CORRELATION)
    attended = value @ dropped
    hidden = torch.relu(torch.tanh(attended) if problem.released else attended)  # [B, L, d]
    return key, value, correlation, dropped, hidden, linear(hidden, layer.output[m])


def gate(problem: Problem, states: Sequence[Tensor], gates: Sequence[Linear]) -> tuple[Tensor, Any]:
    """Return Y_m from X_m^0..T, and the gate values.

    The values are [B, L, ways], a tuple of such tensors for "hierarchical", or None for "none".
    """
    last = states[-1]

    def ways(x: Tensor, g: Linear) -> Tensor:
        return torch.softmax(linear(x, g) / problem.temperature, dim=-1)

    def mix(values: Tensor, choices: Sequence[Tensor]) -> Tensor:
        return torch.relu(sum(values[..., i : i + 1] * choice for i, choice in enumerate(choices)))  # type: ignore[arg-type]

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
    """Compute y = x W^T + b."""
    return F.linear(x, parameters.weight, parameters.bias)


def _masked(values: Any, present: Tensor | None) -> Any:
    if present is None or values is None:
        return values
    if isinstance(values, tuple):
        return tuple(torch.where(present, value, 0) for value in values)
    return torch.where(present, values, 0)
