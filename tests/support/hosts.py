"""Models of other people, in which the block is a guest: small, with the authors' names, and blocks that run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import family
from family import D_A, D_V, D, L
from grjca.model.audiovisual import TemporalConvNet
from grjca_kernels import Layer, Linear, reference

VISUAL, AUDIO, HIDDEN = 6, 5, 4  # widths of what a host is given, and of its head
Batch = tuple[Tensor, Tensor, Tensor]


class Runs(nn.Module):
    """The equations by their modules, in plain PyTorch; [B, L, d_v + d_a]. ``coattn`` and the gates are theirs."""

    gating: str

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        def linear(module: nn.Module) -> Linear:
            return Linear(module.weight, module.bias)

        def pair(*modules: nn.Module) -> tuple[Linear, ...]:
            return tuple(map(linear, modules))

        layers = []
        for layer in self.coattn.dcn_layers:
            of = layer.dense_coattn
            output = pair(layer.linears[0][0], layer.linears[1][0])
            keys, values = pair(of.key1_linear, of.key2_linear), pair(of.value1_linear, of.value2_linear)
            layers.append(Layer(linear(of.query_linear), keys, values, output))
        suffixes = [suffix for suffix, _ in self.ways(len(layers))]
        gates = tuple(
            pair(*(getattr(self, f"{name}_gating_fc_layer{suffix}") for suffix in suffixes))
            for name in ("video", "audio")
        )
        normalize = self.gating != "dynamic"
        return reference.gated_rjca((video, audio), layers, gates, gating=self.gating, normalize=normalize, concat=True)


class GRJCA(Runs, family.GRJCA):
    gating = "flat"
    dead = (("text", 7),)  # parameters without effect, which their checkpoints and optimisers hold


class HGRJCA(Runs, family.HGRJCA):
    gating = "hierarchical"


class DCA(Runs, family.DCA):
    gating = "dynamic"


class TCNModel(nn.Module):
    """GRJCA's model: an encoder of convolutions and BatchNorm for each modality, the block, a head; [B, L]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.temporal = nn.ModuleDict({
            "video": TemporalConvNet(VISUAL, (D_V,), kernel=3, dropout=0.0),
            "audio": TemporalConvNet(AUDIO, (D_A,), kernel=3, dropout=0.0),
        })  # fmt: skip
        self.bn = nn.ModuleDict({"video": nn.BatchNorm1d(D_V), "audio": nn.BatchNorm1d(D_A)})
        self.fusion = block
        self.regressor1, self.bn1, self.regressor2 = nn.Linear(D, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        def normalized(norm: nn.Module, x: Tensor) -> Tensor:
            return norm(x.flatten(0, 1)).view(x.shape)

        encoded = [
            normalized(self.bn[name], self.temporal[name](x)) for name, x in (("video", video), ("audio", audio))
        ]
        hidden = normalized(self.bn1, self.regressor1(self.fusion(*encoded)))
        return torch.tanh(self.regressor2(F.leaky_relu(hidden))).squeeze(-1)


class LSTMModel(nn.Module):
    """DCA's model: a bidirectional LSTM for each modality, the block, a head; [B, L]."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.video = nn.LSTM(VISUAL, 3, bidirectional=True, batch_first=True)
        self.audio = nn.LSTM(AUDIO, 2, bidirectional=True, batch_first=True)
        self.to_video, self.to_audio = nn.Linear(6, D_V), nn.Linear(4, D_A)
        self.fusion = block
        self.regressor = nn.Linear(D, 1)

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        encoded = self.to_video(self.video(video)[0]), self.to_audio(self.audio(audio)[0])
        return torch.tanh(self.regressor(self.fusion(*encoded))).squeeze(-1)


HOSTS = {"TCN, GRJCA": (TCNModel, GRJCA), "TCN, HGRJCA": (TCNModel, HGRJCA), "BiLSTM, DCA": (LSTMModel, DCA)}


def build(host: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with the authors' block, the same one every time."""
    torch.manual_seed(0)
    model, block = HOSTS[host]
    return model(block()).to(dtype)


def batches(count: int, size: int = 3, dtype: torch.dtype = torch.float64) -> Iterator[Batch]:
    """Video, audio and target; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        shapes = (size, L, VISUAL), (size, L, AUDIO), (size, L)
        video, audio, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        yield video.to(dtype), audio.to(dtype), target.tanh().to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Batch]) -> list[float]:
    """A step for every batch; the losses."""
    losses = []
    for video, audio, target in data:
        loss = F.mse_loss(model(video, audio).to(target.dtype), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
