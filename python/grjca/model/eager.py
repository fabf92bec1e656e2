"""The block in plain PyTorch: the baseline that the fused block replaces and is measured against."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grjca_kernels import GatedRJCAFused, Layer, Linear, dropout_mask

SITE_CORRELATION, SITE_OUTPUT = 0, 1  # sites of a mask, as dropout_mask numbers them


class GatedRJCAEager(GatedRJCAFused):
    """Block with the arguments, parameters and state_dict of GatedRJCAFused, in which every step is a PyTorch operator.

    It has only the released form, without iterates. ``backend`` is ignored, and arguments of ``forward`` are not
    checked.
    """

    shared_masks: bool = False
    """Use the dropout masks that the fused block draws after the same ``torch.manual_seed``, so that both train alike.

    Otherwise dropout is PyTorch's own, which is faster and serves as the baseline of measurements.
    """

    def forward(  # type: ignore[override]
        self, *features: Tensor, lengths: Tensor | None = None, return_gates: bool = False, **unsupported: Any
    ) -> Any:
        """Fuse ``features``, [B, L, d_m] for each modality, as the authors' code does.

        ``lengths``, ``return_gates`` and the result are those of :meth:`GatedRJCAFused.forward`.

        Raises:
            ValueError: for the paper form and for ``return_iterates``.
        """
        if self.form != "released" or self.output == "iterates" or any(unsupported.values()):
            raise ValueError("GatedRJCAEager: expected the released form, and no extras but the gates.")
        if len(features) > len(self.dims):
            *features, lengths = features  # type: ignore[assignment]
        present = None if lengths is None else _presence(lengths, features[0].shape[1])
        seed = self._draw_seed(features[0].device)
        states = [self._initial(x, present) for x in features]
        history = [[x] for x in states]
        layers, gates = self.parameters_by_role()
        for t in range(self.iterations):
            states = self._iterate(states, layers[0 if self.share_weights else t], t, present, seed)
            for of_modality, x in zip(history, states, strict=True):
                of_modality.append(x)
        if self._by_pytorch:
            return self._mixed(features, lengths, [torch.stack(of[1:]) for of in history], return_gates, False)
        mixed = [self._gate(states, gates[m], present) for m, states in enumerate(history)]
        outputs, values = zip(*mixed, strict=True)
        result = (torch.cat(outputs, dim=-1),) if self.output == "concat" else outputs
        if return_gates:
            return (*result, {"gates": values})
        return result[0] if self.output == "concat" else result

    def _draw_seed(self, device: torch.device) -> Tensor | None:
        """Draw the seed that the fused block would draw at this point; None if no shared mask is needed."""
        if not (self.shared_masks and self.training and self.dropout):
            return None
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)

    def _initial(self, x: Tensor, present: Tensor | None) -> Tensor:
        x = _clear(x, present)
        if not self.normalize:
            return x
        if x.dtype == torch.float16:  # F.normalize's smallest norm, 1e-12, is 0 in float16
            return F.normalize(x.float(), dim=-1).half()
        return F.normalize(x, dim=-1)

    def _iterate(
        self, states: list[Tensor], layer: Layer, t: int, present: Tensor | None, seed: Tensor | None
    ) -> list[Tensor]:
        joint = torch.cat(states, dim=-1)
        if layer.query is not None:
            joint = F.linear(joint, *layer.query)
        result = []
        for m, x in enumerate(states):
            key = _clear(F.linear(x.transpose(1, 2), *layer.key[m]), None if present is None else present.mT)
            value = F.linear(x, *layer.value[m])
            correlation = torch.tanh(torch.bmm(key, joint) / math.sqrt(joint.shape[-1]))
            correlation = self._drop(correlation, seed, t, m, SITE_CORRELATION)
            hidden = torch.relu(torch.tanh(torch.bmm(value, correlation)))
            update = self._drop(torch.relu(F.linear(hidden, *layer.output[m])), seed, t, m, SITE_OUTPUT)
            result.append(x + _clear(update, present))
        return result

    def _drop(self, x: Tensor, seed: Tensor | None, iteration: int, modality: int, site: int) -> Tensor:
        if seed is None:
            return F.dropout(x, self.dropout, self.training)
        shape = (x.shape[0], x.shape[1], x.shape[2])
        return x * dropout_mask(
            seed, self.dropout, iteration=iteration, modality=modality, site=site, shape=shape, dtype=x.dtype
        )

    def _gate(self, states: list[Tensor], gates: tuple[Linear, ...], present: Tensor | None) -> tuple[Tensor, Any]:
        """Return Y_m, and the gate values as the fused block returns them."""
        last = states[-1]
        if self.gating == "none":
            return last, None
        if self.gating == "hierarchical":
            stages = [self._mix(states[t + 1], gates[t], states[: t + 2], present) for t in range(self.iterations)]
            output, final = self._mix(last, gates[-1], [mixed for mixed, _ in stages], present)
            return output, (*(weights for _, weights in stages), final)
        return self._mix(last, gates[0], states if self.gating == "flat" else [states[0], last], present)

    def _mix(self, x: Tensor, gate: Linear, choices: list[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
        weights = _clear(torch.softmax(F.linear(x, *gate) / self.temperature, dim=-1), present)
        return torch.relu((torch.stack(choices, dim=-1) * weights.unsqueeze(-2)).sum(dim=-1)), weights


def _presence(lengths: Tensor, frames: int) -> Tensor:
    """Return [B, L, 1], true for present frames."""
    return (torch.arange(frames, device=lengths.device) < lengths[:, None])[..., None]


def _clear(x: Tensor, present: Tensor | None) -> Tensor:
    """Return ``x`` with 0 where ``present`` is false, even where ``x`` is NaN."""
    return x if present is None else torch.where(present, x, 0)
