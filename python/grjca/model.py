"""A small model around a fusion block: encoders over time, fusion, and a head with one value per frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TemporalEncoder(nn.Module):
    """Causal convolutions with residuals, then batch normalisation: [B, L, inputs] -> [B, L, outputs]."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 5, dilations: Sequence[int] = (1, 2)) -> None:
        super().__init__()
        self.project = nn.Conv1d(inputs, outputs, 1)
        self.convolutions = nn.ModuleList(nn.Conv1d(outputs, outputs, kernel, dilation=d) for d in dilations)
        self.reach = [(kernel - 1) * d for d in dilations]
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``x`` [B, L, inputs]; a frame sees itself and earlier ones."""
        x = self.project(x.transpose(1, 2))
        for convolution, reach in zip(self.convolutions, self.reach, strict=True):
            x = x + F.leaky_relu(convolution(F.pad(x, (reach, 0))))
        return self.norm(x).transpose(1, 2)


class Head(nn.Module):
    """Linear, batch normalisation over (batch, time), leaky_relu, Linear, tanh: [B, L, inputs] -> [B, L]."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """One value between -1 and 1 for every frame of ``x`` [B, L, inputs]."""
        x = F.leaky_relu(self.norm(self.hidden(x).flatten(0, 1))).unflatten(0, x.shape[:2])
        return torch.tanh(self.output(x).squeeze(-1))


class AudioVisualModel(nn.Module):
    """Valence or arousal from features of face and voice.

    Args:
        dim_visual, dim_audio: widths of the features.
        fusion: maps encoded features [B, L, widths[0]], [B, L, widths[1]] to [B, L, sum(widths)]; GatedRJCAFused with
            output="concat" does.
        widths: what the encoders put out.
        hidden: width inside the head.
    """

    def __init__(
        self, dim_visual: int, dim_audio: int, fusion: nn.Module, *, widths: tuple[int, int], hidden: int
    ) -> None:
        super().__init__()
        self.visual = TemporalEncoder(dim_visual, widths[0])
        self.audio = TemporalEncoder(dim_audio, widths[1])
        self.fusion = fusion
        self.head = Head(sum(widths), hidden)

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        """A value for every frame, [B, L], from ``visual`` [B, L, dim_visual] and ``audio`` [B, L, dim_audio]."""
        return self.head(self.fusion(self.visual(visual), self.audio(audio)))
