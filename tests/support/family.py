"""The family of blocks as it stands in people's models, written from the equations of operator.md.

Names of attributes are those of the authors, so that state_dicts have their keys. ``p`` is the dropout of C and U.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grjca_kernels import GatedRJCAFused

NAMES = ("video", "audio", "text")
L, D_V, D_A = 4, 5, 3  # sizes of the blocks unless others are given
D = D_V + D_A


def load(source: Any, **options: Any) -> GatedRJCAFused:
    """from_released where nothing is to be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return GatedRJCAFused.from_released(source, **options)


class Attention(nn.Module):
    """The linear maps; ``raw``: query_linear is there, and is not used."""

    def __init__(self, widths: tuple[int, ...], length: int, p: float, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.query_linear = nn.Linear(sum(widths), sum(widths))
        for m, d_m in enumerate(widths, 1):
            setattr(self, f"key{m}_linear", nn.Linear(length, length))
            setattr(self, f"value{m}_linear", nn.Linear(d_m, d_m))
        self.drop = nn.Dropout(p)

    def forward(self, *x: Tensor) -> list[Tensor]:
        """H_m of every modality."""
        joint = torch.cat(x, dim=-1)
        scale = math.sqrt(joint.shape[-1])
        joint = joint if self.raw else self.query_linear(joint)
        found = []
        for m, x_m in enumerate(x, 1):
            key = getattr(self, f"key{m}_linear")(x_m.transpose(1, 2))
            correlation = self.drop(torch.tanh(torch.bmm(key, joint) / scale))
            found.append(F.relu(torch.tanh(torch.bmm(getattr(self, f"value{m}_linear")(x_m), correlation))))
        return found


class DenseLayer(nn.Module):
    def __init__(self, widths: tuple[int, ...], length: int, p: float, raw: bool) -> None:
        super().__init__()
        self.dense_coattn = Attention(widths, length, p, raw)
        self.linears = nn.ModuleList(
            nn.Sequential(nn.Linear(sum(widths), d_m), nn.ReLU(), nn.Dropout(p)) for d_m in widths
        )

    def forward(self, *x: Tensor) -> list[Tensor]:
        hidden = self.dense_coattn(*x)
        return [x_m + linear(h) for x_m, linear, h in zip(x, self.linears, hidden, strict=True)]


class DCNLayer(nn.Module):
    """RJCA, and with three widths and ``raw`` RJCMA; ``lists``: all iterates are returned."""

    def __init__(
        self,
        widths=(5, 3),
        length: int = 4,
        iterations: int = 2,
        p: float = 0.6,
        raw: bool = False,
        lists: bool = False,
    ) -> None:
        super().__init__()
        self.lists = lists
        self.dcn_layers = nn.ModuleList(DenseLayer(widths, length, p, raw) for _ in range(iterations))

    def forward(self, *x: Tensor):
        iterates = []
        for layer in self.dcn_layers:
            x = tuple(layer(*x))
            iterates.append(x)
        return tuple(map(list, zip(*iterates, strict=True))) if self.lists else x


class Block(nn.Module):
    """GRJCA, HGRJCA and DCA, by their gates; ``coattn`` returns lists."""

    normalize = True
    dead: tuple[tuple[str, int], ...] = ()

    def __init__(self, iterations: int = 2, widths=(5, 3), length: int = 4, p: float = 0.6, raw: bool = False) -> None:
        super().__init__()
        self.coattn = DCNLayer(widths, length, iterations, p, raw, lists=True)
        for name, d_m in zip(NAMES, widths, strict=False):
            for suffix, ways in self.ways(iterations):
                setattr(self, f"{name}_gating_fc_layer{suffix}", nn.Linear(d_m, ways))
        for name, width in self.dead:
            setattr(self, f"{name}_gating_fc_layer", nn.Linear(width, iterations + 1))

    def ways(self, iterations: int) -> list[tuple[str, int]]:
        return [("", iterations + 1)]

    def gate(self, name: str, suffix: str, x: Tensor, choices: list[Tensor]) -> Tensor:
        """relu(sum_i G_i choices_i), G from x."""
        values = torch.softmax(getattr(self, f"{name}_gating_fc_layer{suffix}")(x) / 0.1, dim=-1)
        return F.relu((torch.stack(choices, dim=-1) * values.unsqueeze(-2)).sum(dim=-1))

    def mixed(self, name: str, states: list[Tensor]) -> Tensor:
        return self.gate(name, "", states[-1], states)

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        x = [F.normalize(of, dim=-1) if self.normalize else of for of in (visual, audio)]
        states = [[x_m, *after] for x_m, after in zip(x, self.coattn(*x), strict=True)]
        return torch.cat([self.mixed(name, of) for name, of in zip(NAMES, states, strict=False)], dim=-1)


class GRJCA(Block):
    pass


class DCA(Block):
    normalize = False

    def ways(self, iterations: int) -> list[tuple[str, int]]:
        return [("", 2)]

    def mixed(self, name: str, states: list[Tensor]) -> Tensor:
        return self.gate(name, "", states[-1], [states[0], states[-1]])


class HGRJCA(Block):
    def ways(self, iterations: int) -> list[tuple[str, int]]:
        return [*((f"_stage{t}", t + 1) for t in range(1, iterations + 1)), ("_stage", iterations)]

    def mixed(self, name: str, states: list[Tensor]) -> Tensor:
        stages = [self.gate(name, f"_stage{t}", states[t], states[: t + 1]) for t in range(1, len(states))]
        return self.gate(name, "_stage", states[-1], stages)


class TemporalEncoder(nn.Module):
    def __init__(self, width: int, p: float) -> None:
        super().__init__()
        self.init_hidden = nn.Parameter(torch.randn(4, width))
        self.rnn = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(3 * width, 2 * width)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, T + 1, 2 d_m] of iterates [N, T + 1, d_m]."""
        h = self.init_hidden.unsqueeze(1).repeat(1, len(x), 1)
        found, _ = self.rnn(x, (h[:2].contiguous(), h[2:].contiguous()))
        return F.normalize(self.linear(self.drop(torch.cat([x, found], dim=-1))), dim=-1)


class TAGF(Block):
    """TAGF, whose gate is an LSTM over the iterates, or, ``simple``, two linear maps."""

    def __init__(self, *args, simple: bool = False, gate_p: float = 0.1, **options) -> None:
        widths = options.get("widths", (5, 3))
        super().__init__(*args, **options)
        for name, d_m in zip(NAMES, widths, strict=False):
            if simple:
                mlp = nn.Sequential(nn.Linear(d_m, d_m // 2), nn.ReLU(), nn.Linear(d_m // 2, 1))
                setattr(self, f"{name}_gate_mlp", mlp)
            else:
                setattr(self, f"{name}_temporal_encoder", TemporalEncoder(d_m, gate_p))

    def ways(self, iterations: int) -> list[tuple[str, int]]:
        return []

    def mixed(self, name: str, states: list[Tensor]) -> Tensor:
        stacked = torch.stack(states, dim=2)  # [B, L, T + 1, d_m]
        if hasattr(self, f"{name}_gate_mlp"):
            values = torch.softmax(getattr(self, f"{name}_gate_mlp")(stacked), dim=2)
        else:
            features = getattr(self, f"{name}_temporal_encoder")(stacked.flatten(0, 1))
            values = torch.softmax(features.mean(dim=-1) / 0.1, dim=-1).unflatten(0, stacked.shape[:2]).unsqueeze(-1)
        return (values * stacked).sum(dim=2)
