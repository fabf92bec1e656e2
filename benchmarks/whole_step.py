"""A training step of the whole model, as grjca.training.train does it: model, CCC loss, backward, Adam."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import gate
from benchmarks.cases import ROTATED
from grjca.config import ModelConfig, TrainConfig
from grjca.model.audiovisual import AudioVisualModel
from grjca.model.eager import GatedRJCAEager
from grjca.training.losses import ccc_loss
from tolerances import check_draws, largest, length

CONFIG = ModelConfig()
LENGTH = TrainConfig.window
FUSIONS = ("grjca", "hgrjca")
BACKENDS = {"eager": "eager", "fused": "auto"}
SEED = TrainConfig.seed


class Batch(NamedTuple):
    """A batch as the loader of grjca.training.train yields it."""

    visual: Tensor
    audio: Tensor
    lengths: Tensor
    label: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def make_model(fusion: str, implementation: str, *, shared_masks: bool = False) -> AudioVisualModel:
    """The model in training mode, with the weights that SEED gives."""
    torch.manual_seed(SEED)
    model = AudioVisualModel(CONFIG, fusion=fusion, length=LENGTH, backend=BACKENDS[implementation])
    if isinstance(model.fusion, GatedRJCAEager):
        model.fusion.shared_masks = shared_masks  # PyTorch's own dropout is faster: the masks are for the gate alone
    return model.train()


def make_batch(size: int, seed: int) -> Batch:
    """Windows without a gap: random features and labels."""
    generator = torch.Generator().manual_seed(seed)
    visual, audio = (torch.randn(size, LENGTH, width, generator=generator) for width in CONFIG.widths.values())
    label = 2 * torch.rand(size, LENGTH, generator=generator) - 1
    return Batch(visual, audio, torch.full((size,), LENGTH), label, torch.ones(size, LENGTH, dtype=torch.bool))


def loss_of(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    values = model(batch.visual, batch.audio, batch.lengths)
    return values, ccc_loss(values, batch.label, batch.mask)


def stepping(fusion: str, implementation: str, batch: int) -> Callable[[], None]:
    """A call that trains the model on, by one batch."""
    model = make_model(fusion, implementation)
    settings = {"lr": TrainConfig.learning_rate, "weight_decay": TrainConfig.weight_decay}
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    turns = itertools.cycle([make_batch(batch, seed) for seed in range(ROTATED)])

    def step() -> None:
        _, loss = loss_of(model, next(turns))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# ---- the gate


def check(fusion: str) -> None:
    """Check values, loss and gradients of the fused model; a gradient has to pass on one of several batches.

    Eager in float64 is the truth, eager in float32 the yardstick, all with one seed and the masks of the fused block.

    Raises:
        AssertionError: if an error is larger than tolerances.py allows.
    """
    fused, failing, failures = make_model(fusion, "fused"), [], {}
    for seed in range(ROTATED):
        data = make_batch(gate.BATCH, seed)
        truth, draws = expected(fusion, data)
        ours, failures = run(fused, data), {}
        for name in failing or truth:
            size = length if name.startswith("d ") else largest
            try:
                check_draws(name, ours[name], truth[name], [draw[name] for draw in draws], size)
            except AssertionError as failure:
                failures[name] = failure
        failing = list(failures)
        if not failing:
            return
        if not failing[0].startswith("d "):
            break  # values do not jump where rounding flips a relu
    raise failures[failing[0]]


def expected(fusion: str, data: Batch) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Eager in float64, and draws of its errors in float32: at the weights, and half an ulp away."""
    truth = run(make_model(fusion, "eager", shared_masks=True).double(), data.to(torch.float64))
    eager, draws = make_model(fusion, "eager", shared_masks=True), []
    for draw in range(gate.DRAWS):
        draws.append(run(eager, data))
        gate.move_weights(eager, draw)
    return truth, draws


def run(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Values, loss, and the gradients, one vector per kind."""
    model.zero_grad()
    torch.manual_seed(SEED)
    values, loss = loss_of(model, batch)
    loss.backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        kind = f"d {first} {gate.kind(rest)}" if first == "fusion" else f"d {first}"
        parts.setdefault(kind, []).append(parameter.grad.flatten())
    gradients = {kind: torch.cat(vectors) for kind, vectors in parts.items()}
    return {"values": values.detach(), "loss": loss.detach(), **gradients}
