"""The gates of TAGF, which PyTorch's own layers compute over the iterates from the kernels.

A gate receives X^0..X^T of one modality and gives each a share of the output Y = sum_t G_t X^t, which has no relu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TemporalGate(nn.Module):
    """The LSTM gate of TAGF: G = softmax(score / tau), from a bidirectional LSTM over the T + 1 iterates of each frame.

    The score of an iterate is the mean of its projected, L2-normalised features.

    Args:
        width: d_m.
        dropout: p on the LSTM's output joined with its input.
    """

    def __init__(self, width: int, dropout: float, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.init_hidden = nn.Parameter(torch.empty(4, width, device=device, dtype=dtype))  # h of both ways, then c
        self.rnn = nn.LSTM(width, width, bidirectional=True, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(3 * width, 2 * width, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights with xavier_uniform, the bias with zero, and the LSTM as PyTorch does."""
        for weight in (self.init_hidden, self.linear.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.linear.bias)
        self.rnn.reset_parameters()

    def forward(self, states: Tensor, temperature: float) -> Tensor:
        """Return G [B, L, T + 1] from ``states`` [T + 1, B, L, d_m]."""
        steps = states.flatten(1, 2)  # [T + 1, B L, d_m]: every frame is a sequence
        if not steps.numel():  # an LSTM refuses an empty batch
            return steps.new_zeros(*states.shape[1:3], len(states)) + 0 * self.init_hidden.sum()
        h, c = self.init_hidden[:, None].expand(-1, steps.shape[1], -1).chunk(2)
        found, _ = self.rnn(steps, (h.contiguous(), c.contiguous()))
        read = self.linear(self.dropout(torch.cat([steps, found], dim=-1)))
        scores = F.normalize(read, dim=-1).mean(dim=-1)
        return torch.softmax(scores / temperature, dim=0).unflatten(1, states.shape[1:3]).movedim(0, -1)


class ScoreGate(nn.Module):
    """TAGF's simple gate: Linear(d_m, d_m / 2), ReLU, Linear(d_m / 2, 1) scores each iterate, and G =
    softmax(score)."""

    def __init__(self, width: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, max(1, width // 2), device=device, dtype=dtype)
        self.score = nn.Linear(max(1, width // 2), 1, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise weights with xavier_uniform and biases with zero."""
        for linear in (self.hidden, self.score):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor, temperature: float) -> Tensor:
        """Return G [B, L, T + 1] from ``states`` [T + 1, B, L, d_m]; ``temperature`` is not used."""
        scores = self.score(torch.relu(self.hidden(states)))[..., 0]
        return torch.softmax(scores, dim=0).movedim(0, -1)


def mix(gate: nn.Module, states: Sequence[Tensor], temperature: float, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return Y [B, L, d_m] and G [B, L, T + 1]; both are 0 for absent frames, where ``states`` are 0."""
    stacked = torch.stack(list(states))
    values = gate(stacked, temperature).to(stacked.dtype)
    if present is not None:
        values = torch.where(present, values, 0)
    return (values.movedim(-1, 0)[..., None] * stacked).sum(dim=0), values
