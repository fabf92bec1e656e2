"""The block as one writes it in plain PyTorch: what the fused one replaces, and is measured against."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grjca_kernels import GatedRJCAFused, Linear


class GatedRJCAEager(GatedRJCAFused):
    """Same arguments, parameters and state_dict as GatedRJCAFused; every step is a PyTorch operator.

    Dropout is PyTorch's own, so its masks are not those of the fused block. The released form only; no ``lengths`` and
    no extras.
    """

    def forward(self, visual: Tensor, audio: Tensor, lengths: Tensor | None = None, **unsupported: Any) -> Any:
        """Fuse ``visual`` [B, L, d_v] and ``audio`` [B, L, d_a] as the authors' code does."""
        if self.form != "released" or lengths is not None or any(unsupported.values()):
            raise ValueError("GatedRJCAEager: expected the released form without lengths or extras.")
        states = [F.normalize(x, dim=-1) if self.normalize else x for x in (visual, audio)]
        history = [[x] for x in states]
        layers, gates = self.parameters_by_role()
        for t in range(self.iterations):
            layer = layers[0 if self.share_weights else t]
            assert layer.query is not None
            joint = F.linear(torch.cat(states, dim=-1), *layer.query)
            for m, x in enumerate(list(states)):
                key = F.linear(x.transpose(1, 2), *layer.key[m])
                value = F.linear(x, *layer.value[m])
                correlation = torch.tanh(torch.bmm(key, joint) / math.sqrt(joint.shape[-1]))
                hidden = torch.relu(torch.tanh(torch.bmm(value, self._drop(correlation))))
                states[m] = x + self._drop(torch.relu(F.linear(hidden, *layer.output[m])))
                history[m].append(states[m])
        outputs = [self._gate(states, gates[m]) for m, states in enumerate(history)]
        return torch.cat(outputs, dim=-1) if self.output == "concat" else tuple(outputs)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _gate(self, states: list[Tensor], gates: tuple[Linear, ...]) -> Tensor:
        last = states[-1]
        if self.gating == "none":
            return last
        if self.gating == "hierarchical":
            mixed = [self._mix(states[t + 1], gates[t], states[: t + 2]) for t in range(self.iterations)]
            return self._mix(last, gates[-1], mixed)
        return self._mix(last, gates[0], states if self.gating == "flat" else [states[0], last])

    def _mix(self, x: Tensor, gate: Linear, choices: list[Tensor]) -> Tensor:
        weights = torch.softmax(F.linear(x, *gate) / self.temperature, dim=-1)
        return torch.relu((torch.stack(choices, dim=-1) * weights.unsqueeze(-2)).sum(dim=-1))
