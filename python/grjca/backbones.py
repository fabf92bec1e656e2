"""The face and voice networks of the authors' experiment: IR-50 and VGGish, under the names of their checkpoints.

A network is a sequence of parts, so that :class:`grjca.model.whole.WholeModel` can run its leading frozen parts without
a graph, and the others with recomputation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grjca.config import NetworkSize
from grjca.errors import UserError
from grjca.model import checkpoints

PICTURE, CROP = 48, 40
"""Side of a face on disk, and of the crop that the network reads, in pixels."""
PATCH = (96, 64)
"""Rows (10 ms each) and mel bands of a log-mel patch."""
RANDOM = "random"
"""The value of :attr:`Network.origin` before any weights are loaded."""
WHOLE = {name: f"spatial.{name}.backbone." for name in ("visual", "audio")}
"""Prefix of each network's keys in the authors' whole model."""


class _Rows(nn.BatchNorm1d):
    """Batch normalisation of rows. In training, a single row, which has no variance, is normalised by the running
    statistics, and leaves them unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class _UnitLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class _Flat(nn.Module):
    """[N, channels, time, mel] -> [N, time * mel * channels]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class _Unit(nn.Module):
    """Residual unit of two convolutions: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if inputs == outputs:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class Network(nn.Module, ABC):
    """A sequence of parts through which a batch of frames passes."""

    size: NetworkSize = "released"
    """Size of the network, a key of :data:`STAGES`."""
    origin: str = RANDOM
    """The source of the weights: the name of a file, or "random"."""
    outputs: int
    """Width of the result."""

    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """Return the parts in the order in which a batch passes through them."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N, outputs]."""
        return nn.Sequential(*self.parts())(x)


class IR50(Network):
    """The face network: pictures [N, 3, 40, 40] in [-1, 1], see :func:`crop`, -> [N, outputs], rows of L2 norm 1.

    Args:
        widths: channels of the first convolution and of the four groups of units.
        units: number of units in each group. The first unit of every group but the first halves height and width.
        outputs: width of the result.

    PyTorch initialises the weights at random.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, int, int, int, int] = (64, 64, 128, 256, 512),
        units: tuple[int, int, int, int] = (3, 4, 14, 3),
        outputs: int = 512,
    ) -> None:
        super().__init__()
        first, last, side = widths[0], widths[-1], CROP // 8
        self.outputs = outputs
        convolution = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.input_layer = nn.Sequential(convolution, nn.BatchNorm2d(first), nn.PReLU(first))
        body: list[nn.Module] = []
        for group, ((before, after), count) in enumerate(zip(pairwise(widths), units, strict=True)):
            body += [_Unit(after if k else before, after, 1 if k or not group else 2) for k in range(count)]
        self.body = nn.Sequential(*body)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last), nn.Dropout(0.4), nn.Flatten(), nn.Linear(last * side * side, outputs), _Rows(outputs)
        )

    def parts(self) -> list[nn.Module]:
        return [self.input_layer, *self.body, self.output_layer, _UnitLength()]


class VGGish(Network):
    """The voice network: log-mel patches [N, 96, 64] -> [N, outputs].

    Args:
        widths: channels of the six convolutions.
        hidden: width of the two hidden layers after them.
        outputs: width of the result.

    PyTorch initialises the weights at random.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, int, int, int, int, int] = (64, 128, 256, 256, 512, 512),
        hidden: int = 4096,
        outputs: int = 128,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        layers: list[nn.Module] = []
        for k, (before, after) in enumerate(pairwise((1, *widths))):
            layers += [nn.Conv2d(before, after, 3, 1, 1), nn.ReLU(inplace=True)]
            if k not in (2, 4):  # the last four convolutions come in pairs
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        rows, bands = (side // 16 for side in PATCH)
        self.embeddings = nn.Sequential(
            nn.Linear(rows * bands * widths[-1], hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, outputs),
        )

    def parts(self) -> list[nn.Module]:
        return [nn.Unflatten(1, (1, PATCH[0])), *self.features, _Flat(), *self.embeddings]


NETWORKS: dict[str, type[IR50] | type[VGGish]] = {"visual": IR50, "audio": VGGish}
_SIZES: dict[NetworkSize, dict[str, dict[str, Any]]] = {
    "released": {"visual": {}, "audio": {}},
    "small": {
        "visual": {"widths": (8, 8, 16, 32, 64), "units": (1, 1, 2, 1)},
        "audio": {"widths": (8, 16, 32, 32, 64, 64), "hidden": 256},
    },
}
STAGES: dict[NetworkSize, tuple[dict[str, tuple[str, ...]], ...]] = {
    "released": (
        {"visual": ("output_layer",), "audio": ("embeddings.4",)},
        {"visual": ("body.21", "body.22", "body.23"), "audio": ("embeddings.2",)},
        {"visual": ("body.18", "body.19", "body.20"), "audio": ("embeddings.0",)},
    ),
    "small": (
        {"visual": ("output_layer",), "audio": ("embeddings.4",)},
        {"visual": ("body.4",), "audio": ("embeddings.2",)},
        {"visual": ("body.3",), "audio": ("embeddings.0",)},
    ),
}
"""For each size, the parts of each network that each of the three stages of release adds to those trained."""


def make(name: str, size: NetworkSize = "released") -> Network:
    """Make the network of a modality, "visual" or "audio", with random weights.

    Args:
        size: "released" has the authors' 37.3 and 72.1 million parameters. "small", for trials and tests, has the same
            structure, feature names and feature widths, and takes a hundredth of the work.

    The ``origin`` of the network is "random" until :func:`load` gives it other weights.

    Raises:
        ValueError: for another name or size.
    """
    if name not in NETWORKS or size not in _SIZES:
        raise ValueError(f"expected a network of {' or '.join(NETWORKS)} in {' or '.join(_SIZES)}, got {name}, {size}.")
    network = NETWORKS[name](**_SIZES[size][name])
    network.size = size
    return network


def load(network: Network, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load the weights of a checkpoint into ``network``, which keeps its dtype and device.

    Args:
        source: as for :func:`grjca.model.checkpoints.read`: the authors' whole model, from which this modality's
            network is taken, or the network alone, whose keys begin with ``backbone.`` or with the names of its parts.
            Weights may be in a nested dict and under any prefix. A classifier (``logits.*``) and other keys are
            ignored.

    Raises:
        UserError: if the file is missing, broken, or would run code; if a key is missing, does not fit, or belongs to a
            larger network (the message names it); or if the source holds several networks of this kind.
    """
    label, content = checkpoints.read(source)
    first = next(iter(network.state_dict()))
    found = checkpoints.modules(content, first)
    places = [place for place in found if not checkpoints.AVERAGED.search(place)] or list(found)
    if len(places) != 1:
        among = max((values for _, values in checkpoints.mappings(content)), key=len)
        several = f"got {len(places)}, under {' and '.join(map(repr, places))}; pass a dict of one alone"
        none = f"got none among {len(among)} keys ({', '.join([*list(among)[:3], '...'])})"
        kind = type(network).__name__
        raise UserError(f"{label}: expected one {kind}, with a key {first}, {several if places else none}.")
    checkpoints.fill(network, label, found[places[0]], places[0])
    network.origin = label


def filled(name: str, size: NetworkSize, label: str, tensors: Mapping[str, Any], prefix: str) -> Network:
    """Make a network with copies of the weights in ``tensors``, in their dtype and on their device.

    Raises:
        UserError: as :func:`load`.
    """
    with torch.device("meta"):  # skips the initialisation
        network = make(name, size)
    like = checkpoints.find(label, tensors, prefix + next(iter(network.state_dict())))
    network.to(like.dtype).to_empty(device=like.device)
    checkpoints.fill(network, label, tensors, prefix)
    network.origin = label
    return network


def crop(faces: Tensor, offsets: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """Crop faces to the input of the face network, and scale them to (x / 255 - 0.5) / 0.5.

    Args:
        faces: uint8 [..., 48, 48, 3].
        offsets: integers [B, 2], row and column from 0 to 8 at which the crop of each window in ``faces``
            [B, ..., 48, 48, 3] begins; None crops the centre.
        flip: bool [B], whether the pictures of each window are mirrored, left to right, after the crop.

    Returns:
        [..., 3, 40, 40] in torch's default dtype.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if faces.dtype != torch.uint8 or faces.shape[-3:] != (PICTURE, PICTURE, 3):
        raise ValueError(
            f"faces: expected uint8 [..., {PICTURE}, {PICTURE}, 3], got {faces.dtype} {list(faces.shape)}."
        )
    for option, given, shape in (("offsets", offsets, (*faces.shape[:1], 2)), ("flip", flip, faces.shape[:1])):
        if given is not None and (faces.dim() < 4 or given.shape != shape):
            raise ValueError(f"{option}: expected shape {list(shape)}, got {list(given.shape)}.")
    border = PICTURE - CROP
    if offsets is None:
        cut = faces[..., border // 2 : -border // 2, border // 2 : -border // 2, :]
    else:
        corners = offsets.tolist()
        if not all(type(at) is int and 0 <= at <= border for corner in corners for at in corner):
            raise ValueError(f"offsets: expected whole numbers from 0 to {border}, got {corners}.")
        windows = zip(faces, corners, strict=True)
        cut = torch.stack([x[..., row : row + CROP, column : column + CROP, :] for x, (row, column) in windows])
    if flip is not None:
        cut = torch.where(flip.to(cut.device).view(-1, *[1] * (cut.dim() - 1)), cut.flip(-2), cut)
    return (cut.movedim(-1, -3) / 255 - 0.5) / 0.5
