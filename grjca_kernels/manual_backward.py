"""The reference forward with a backward written by hand, equation by equation.

``d_x`` is the gradient of the loss with respect to x. Only the features and the iterates are saved; everything else,
above all C, is recomputed, as in the kernels. The tests compare this file with autograd and the kernels with this file,
so a failure shows which layer is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grjca_kernels import dropout as masks
from grjca_kernels import reference
from grjca_kernels.call import Call, Gradients
from grjca_kernels.problem import Layer, Linear, Problem, unflatten
from grjca_kernels.reference import linear


@torch.no_grad()
def forward(call: Call) -> None:
    """Fill the outputs, the iterates and the gate values with those of :func:`grjca_kernels.reference.forward`."""
    outputs, iterates, values = reference.forward(call)
    for to, y in zip(call.outputs, outputs, strict=True):
        to.copy_(y)
    call.iterates.copy_(torch.cat(iterates, dim=-1))
    for to, value in zip(call.gates, values if call.gates else (), strict=True):
        to.copy_(torch.cat(value, dim=-1) if isinstance(value, tuple) else value)


@torch.no_grad()
def backward(call: Call, gradients: Gradients) -> None:
    """Fill the gradients of the features and the parameters."""
    problem, features = call.problem, call.features
    layers, gates = unflatten(problem, call.parameters)
    present = reference.presence(problem.length, call.lengths)
    d_parameters = [torch.zeros_like(parameter) for parameter in call.parameters]
    d_layers, d_gates = unflatten(problem, d_parameters)
    iterates = call.iterates.split(problem.widths, dim=-1)
    states, d_states = [], []  # [m][t]
    for m, x_m in enumerate(features):
        states.append([reference.initial(problem.normalize, x_m, present), *iterates[m]])
        d_y, d_values = _present(gradients.outputs[m], present), _present(gradients.gates[m], present)
        if d_values is not None and problem.gating == "hierarchical":
            d_values = d_values.split(problem.gate_ways, dim=-1)
        d_states.append(gate_backward(problem, states[m], gates[m], d_gates[m], d_y, d_values))
        d_iterates = gradients.iterates[m]
        if d_iterates is not None:
            d_states[m][1:] = [d + d_iterate for d, d_iterate in zip(d_states[m][1:], d_iterates, strict=True)]
    for t in reversed(range(problem.iterations)):
        i = 0 if problem.shared else t
        x, d_next = [of_m[t] for of_m in states], [of_m[t + 1] for of_m in d_states]
        for m, d_x in enumerate(iteration_backward(problem, x, layers[i], d_layers[i], t, present, call.seed, d_next)):
            d_states[m][t] += d_x
    d_features = [initial_backward(problem, x_m, d[0], present) for x_m, d in zip(features, d_states, strict=True)]
    wanted = (*gradients.features, *gradients.parameters)
    for to, gradient in zip(wanted, (*d_features, *d_parameters), strict=True):
        if to is not None:
            to.copy_(gradient)


# ---- X^0


def initial_backward(problem: Problem, x: Tensor, d_x0: Tensor, present: Tensor | None) -> Tensor:
    """Differentiate X^0 = x / max(|x|, eps): remove the part along x, except where eps was the larger."""
    if problem.normalize:
        x = _present(x, present)
        norm = x.norm(dim=-1, keepdim=True)
        length = norm.clamp_min(1e-12)
        x0 = x / length
        along = (d_x0 * x0).sum(dim=-1, keepdim=True) * x0
        d_x0 = (d_x0 - torch.where(norm < 1e-12, 0, along)) / length
    return _present(d_x0, present)


# ---- one iteration


def iteration_backward(
    problem: Problem,
    x: Sequence[Tensor],
    layer: Layer,
    d_layer: Layer,
    t: int,
    present: Tensor | None,
    seed: Tensor | None,
    d_next: Sequence[Tensor],
) -> list[Tensor]:
    """Return d X^t of every modality from d X^(t+1), t from 0; add the parameters' gradients to ``d_layer``."""
    inputs = torch.cat(list(x), dim=-1)
    joint = inputs if layer.query is None else linear(inputs, layer.query)  # J [B, L, d]
    d_joint = torch.zeros_like(joint)
    d_x = []
    for m in range(len(x)):
        d_x_m, d_joint_m = attention_backward(problem, x[m], joint, m, layer, d_layer, t, present, seed, d_next[m])
        d_x.append(d_next[m] + d_x_m)  # the residual
        d_joint += d_joint_m
    d_inputs = d_joint
    if layer.query is not None and d_layer.query is not None:
        d_inputs = linear_backward(d_joint, inputs, layer.query, d_layer.query)
    return [a + b for a, b in zip(d_x, d_inputs.split(problem.widths, dim=-1), strict=True)]


def attention_backward(
    problem: Problem,
    x: Tensor,
    joint: Tensor,
    m: int,
    layer: Layer,
    d_layer: Layer,
    t: int,
    present: Tensor | None,
    seed: Tensor | None,
    d_next: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what d U_m = d X_m^(t+1) contributes to d X_m^t and to d J, through U_m, H_m, C_m, V_m and K_m."""
    drop = partial(masks.drop, seed=seed, p=problem.dropout, iteration=t, modality=m)
    key, value, correlation, dropped, hidden, update = reference.attend(problem, x, joint, m, layer, t, present, seed)
    d_update = _present(d_next, present)
    if problem.released:
        d_update = _where_positive(update, drop(d_update, site=masks.SITE_OUTPUT))
    d_hidden = linear_backward(d_update, hidden, layer.output[m], d_layer.output[m])
    d_attended = _where_positive(hidden, d_hidden * (1 - hidden.square()) if problem.released else d_hidden)
    d_value = d_attended @ dropped.mT
    d_correlation = drop(value.mT @ d_attended, site=masks.SITE_CORRELATION)
    d_score = d_correlation * (1 - correlation.square()) / math.sqrt(problem.width)  # d (K J)
    d_joint = key.mT @ d_score
    d_key = d_score @ joint.mT
    if present is not None:
        d_key = torch.where(present.mT, d_key, 0)
    d_x = linear_backward(d_value, x, layer.value[m], d_layer.value[m])
    return d_x + linear_backward(d_key, x.mT, layer.key[m], d_layer.key[m]).mT, d_joint


# ---- gates


def gate_backward(
    problem: Problem,
    states: Sequence[Tensor],
    gates: Sequence[Linear],
    d_gates: Sequence[Linear],
    d_y: Tensor | None,
    d_values: Any,
) -> list[Tensor]:
    """Return d X_m^0..T from d Y_m and the gradients of the gate values; add the parameters' gradients to
    ``d_gates``."""
    last = problem.iterations
    d_states = [torch.zeros_like(x) for x in states]
    d_y = torch.zeros_like(states[last]) if d_y is None else d_y

    def through(g: int, t: int, choices: Sequence[Tensor], d_output: Tensor, d_value: Tensor | None) -> list[Tensor]:
        """Return d choices; gate g is computed from X^t."""
        d_x, d_choices = mix_backward(problem, states[t], choices, gates[g], d_gates[g], d_output, d_value)
        d_states[t] += d_x
        return d_choices

    if problem.gating == "none":
        d_states[last] += d_y
    elif problem.gating == "hierarchical":
        d_values = (None,) * (last + 1) if d_values is None else d_values
        mixed = [mix(problem, states[t], states[: t + 1], gates[t - 1])[0] for t in range(1, last + 1)]  # Z^1..T
        d_mixed = through(last, last, mixed, d_y, d_values[last])
        for t in range(1, last + 1):
            for s, d_x in enumerate(through(t - 1, t, states[: t + 1], d_mixed[t - 1], d_values[t - 1])):
                d_states[s] += d_x
    else:
        chosen = range(last + 1) if problem.gating == "flat" else (0, last)
        for s, d_x in zip(chosen, through(0, last, [states[s] for s in chosen], d_y, d_values), strict=True):
            d_states[s] += d_x
    return d_states


def mix(problem: Problem, x: Tensor, choices: Sequence[Tensor], gate: Linear) -> tuple[Tensor, Tensor]:
    """Return relu(sum_i G_i choices_i) and G = softmax((x W_g^T + b_g) / tau)."""
    values = torch.softmax(linear(x, gate) / problem.temperature, dim=-1)
    return torch.relu((torch.stack(list(choices), dim=-1) @ values[..., None])[..., 0]), values


def mix_backward(
    problem: Problem,
    x: Tensor,
    choices: Sequence[Tensor],
    gate: Linear,
    d_gate: Linear,
    d_output: Tensor,
    d_values: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Return d x and d choices."""
    output, values = mix(problem, x, choices, gate)
    d_sum = _where_positive(output, d_output)
    d_choices = [values[..., i : i + 1] * d_sum for i in range(len(choices))]
    d_value = torch.stack([(d_sum * choice).sum(dim=-1) for choice in choices], dim=-1)
    if d_values is not None:
        d_value = d_value + d_values
    d_logits = values * (d_value - (values * d_value).sum(dim=-1, keepdim=True)) / problem.temperature
    return linear_backward(d_logits, x, gate, d_gate), d_choices


# ---- pieces


def linear_backward(d_y: Tensor, x: Tensor, parameters: Linear, d_parameters: Linear) -> Tensor:
    """Differentiate y = x W^T + b: return d x = d_y W, add d_y^T x to d W and the sum of d_y to d b."""
    d_parameters.weight.add_(torch.einsum("bro,bri->oi", d_y, x))
    if d_parameters.bias is not None:
        d_parameters.bias.add_(d_y.sum(dim=(0, 1)))
    return d_y @ parameters.weight


def _where_positive(x: Tensor, d: Tensor) -> Tensor:
    """Return d through a relu whose argument or value is x; a NaN in x passes d on, as in autograd."""
    return torch.where(x <= 0, 0, d)


def _present(x: Tensor | None, present: Tensor | None) -> Any:
    """Clear the absent frames of x, which is [B, L, ...] or None."""
    return x if x is None or present is None else torch.where(present, x, 0)
