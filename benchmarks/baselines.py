"""The baselines: the block written as efficiently as plain PyTorch allows, and compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grjca.model.eager import GatedRJCAEager
from grjca_kernels import Layer, Linear

CHUNK = 4 << 20  # bytes of C that a processor works on at a time, so that they stay in its caches
DRAWN = 16  # random bits for each element of a mask, as many as the fused block takes


class GatedRJCAStrong(GatedRJCAEager):
    """GatedRJCAEager with fewer and cheaper operators: same parameters, same results.

    Scales are folded into weights, biases into products, K_m is computed as its transpose so that nothing is copied,
    and all that autograd allows happens in place. On a processor a large C is worked on in chunks of the batch, and
    masks come from 16 random bits each, because ``bernoulli_`` takes longer than tanh and product together; elsewhere,
    and in torch.compile, PyTorch's own dropout is the faster one. Neither lengths nor extras.
    """

    def forward(self, visual: Tensor, audio: Tensor, lengths: Tensor | None = None, **unsupported: Any) -> Any:
        """Fuse ``visual`` [B, L, d_v] and ``audio`` [B, L, d_a] as the authors' code does.

        Raises:
            ValueError: for the paper form, shared masks, lengths and extras.
        """
        if self.form != "released" or self.shared_masks or lengths is not None or any(unsupported.values()):
            raise ValueError(
                "GatedRJCAStrong: expected the released form with PyTorch's own dropout, no lengths and no extras; "
                "take GatedRJCAEager for these."
            )
        states = [self._initial(x, None) for x in (visual, audio)]
        history = [[x] for x in states]
        layers, gates = self.parameters_by_role()
        for t in range(self.iterations):
            states = self._step(states, layers[0 if self.share_weights else t])
            for of_modality, x in zip(history, states, strict=True):
                of_modality.append(x)
        outputs = [self._gated(of_modality, gates[m]) for m, of_modality in enumerate(history)]
        return torch.cat(outputs, dim=-1) if self.output == "concat" else tuple(outputs)

    def _step(self, states: list[Tensor], layer: Layer) -> list[Tensor]:
        assert layer.query is not None
        width = sum(self.dims)
        kept = 1 / (1 - self.dropout) if self._draws_bits(states[0]) else 1.0
        joint = _linear(torch.cat(states, dim=-1), layer.query, 1 / math.sqrt(width))  # J / sqrt(d)
        result = []
        for m, x in enumerate(states):
            weight, bias = layer.key[m]
            assert bias is not None
            key = torch.baddbmm(bias[:, None], weight.expand(len(x), -1, -1), x)  # K_m transposed, [B, L, d_m]
            value = _linear(x, layer.value[m], kept)
            samples = max(1, CHUNK // (x.shape[-1] * width * x.element_size()))
            if samples >= len(x) or x.device.type != "cpu" or torch.compiler.is_compiling():
                hidden = self._attend(key, joint, value)
            else:
                chunks = zip(*(tensor.split(samples) for tensor in (key, joint, value)), strict=True)
                hidden = torch.cat([self._attend(*chunk) for chunk in chunks])
            update = _linear(hidden, layer.output[m], kept)
            if self._draws_bits(update):
                update = update.mul_(self._mask(update)).relu_()
            else:
                update = F.dropout(update.relu_(), self.dropout, self.training)
            result.append(x + update)
        return result

    def _attend(self, key: Tensor, joint: Tensor, value: Tensor) -> Tensor:
        """H_m; a mask of 0 and 1 may come before tanh, and relu too, because tanh(0) = 0: so both are in place."""
        scores = torch.bmm(key.mT, joint)
        if self._draws_bits(scores):
            correlation = scores.mul_(self._mask(scores)).tanh_()
        else:
            correlation = F.dropout(scores.tanh_(), self.dropout, self.training)
        return torch.bmm(value, correlation).relu_().tanh()

    def _draws_bits(self, x: Tensor) -> bool:
        """Return whether masks are of 0 and 1, and 1 / (1 - p) is in the weights: V_m for C_m, W_h for U_m."""
        dropped = self.training and 0 < self.dropout < 1
        return dropped and x.device.type == "cpu" and not torch.compiler.is_compiling()

    def _mask(self, x: Tensor) -> Tensor:
        """True for the elements that are kept."""
        words = torch.empty(-(-x.numel() * DRAWN // 64), dtype=torch.int64).random_(-(2**63), None)
        lowest = min(2**DRAWN - 1, round(self.dropout * 2**DRAWN)) - 2 ** (DRAWN - 1)
        return (words.view(torch.int16)[: x.numel()] >= lowest).view(x.shape)

    def _gated(self, states: list[Tensor], gates: Sequence[Linear]) -> Tensor:
        last = states[-1]
        if self.gating == "none":
            return last
        if self.gating == "hierarchical":
            stages = [self._weighted(states[t + 1], gates[t], states[: t + 2]) for t in range(self.iterations)]
            return self._weighted(last, gates[-1], stages)
        return self._weighted(last, gates[0], states if self.gating == "flat" else [states[0], last])

    def _weighted(self, x: Tensor, gate: Linear, choices: Sequence[Tensor]) -> Tensor:
        weights = torch.softmax(_linear(x, gate, 1 / self.temperature), dim=-1).split(1, dim=-1)
        mixed = weights[0] * choices[0]
        for weight, choice in zip(weights[1:], choices[1:], strict=True):
            mixed = mixed.addcmul_(weight, choice)
        return mixed.relu_()


def _linear(x: Tensor, parameters: Linear, scale: float = 1.0) -> Tensor:
    """scale (x W^T + b). The scale goes into the weights: as alpha and beta it would cost the backward more. Not in
    float16, where the gradient of scaled weights, which is that of the weights over the scale, overflows.
    """
    weight, bias = parameters
    assert bias is not None
    if scale != 1 and x.dtype == torch.float16:
        return F.linear(x, weight, bias).mul_(scale)
    if scale != 1:
        weight, bias = weight * scale, bias * scale
    return torch.addmm(bias, x.flatten(0, 1), weight.t()).unflatten(0, x.shape[:2])
