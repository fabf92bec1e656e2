"""The face and voice networks of the authors' experiment: IR-50 and VGGish, under the names of their checkpoints.

A network is a sequence of parts, so that :class:`grjca.model.whole.WholeModel` can run the frozen ones at its beginning
without a graph, and the others with recomputation.
"""

from __future__ import annotations

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
"""Pixels of a side: of a face on disk, and of what the network sees of it."""
PATCH = (96, 64)
"""Rows of 10 ms and mel bands of a log-mel patch."""
RANDOM = "random"
"""What :attr:`IR50.origin` says before any weights are loaded."""
WHOLE = {name: f"spatial.{name}.backbone." for name in ("visual", "audio")}
"""What stands before a network's names in the authors' whole model."""


class _Rows(nn.BatchNorm1d):
    """A single row has no variance: in training, running statistics normalise it, and are left as they are."""

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
    """Two convolutions and a way around them: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""

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


class Network(nn.Module):
    """A row of parts, through which a batch of frames passes."""

    size: NetworkSize = "released"
    """Which :data:`STAGES` it has."""
    origin: str = RANDOM
    """Where its weights come from: the name of a file, or "random"."""
    outputs: int
    """Width of a row of the result."""

    def parts(self) -> list[nn.Module]:
        """What a batch passes through, one after the other."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N, outputs]."""
        return nn.Sequential(*self.parts())(x)


class IR50(Network):
    """A face's features: [N, 3, 40, 40] of values in [-1, 1], see :func:`crop`, -> [N, outputs], rows of L2 norm 1.

    Args:
        widths: channels of the first convolution and of the four groups of units.
        units: of each group. The first unit of every group but the first halves height and width.
        outputs: width of the result.

    Weights are random at first, as PyTorch initialises them.
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
    """A sound's features: log-mel patches [N, 96, 64] -> [N, outputs].

    Args:
        widths: channels of the six convolutions.
        hidden: width of the two hidden layers behind them.
        outputs: width of the result.

    Weights are random at first, as PyTorch initialises them.
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
            if k not in (2, 4):  # of the last four convolutions, two in a row
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
"""For each size and each of the three stages of release, the parts of each network that it adds to those trained."""


def make(name: str, size: NetworkSize = "released") -> Network:
    """The network of a modality, "visual" or "audio".

    Args:
        size: "released" has the authors' 37.3 and 72.1 million parameters. "small" is of the same form, with the same
            names and widths of features, and takes a hundredth of the work: for trials and tests.

    Its weights are random, as PyTorch initialises them; its ``origin`` says so until :func:`load` has others.

    Raises:
        ValueError: for another name or size.
    """
    if name not in NETWORKS or size not in _SIZES:
        raise ValueError(f"expected a network of {' or '.join(NETWORKS)} in {' or '.join(_SIZES)}, got {name}, {size}.")
    network = NETWORKS[name](**_SIZES[size][name])
    network.size = size
    return network


def load(network: Network, source: str | Path | Mapping[str, Tensor]) -> None:
    """Give ``network`` the weights of a checkpoint, in the dtype and on the device that it has.

    Args:
        source: as for :func:`grjca.model.checkpoints.read`: the authors' whole model, of which the part of this
            modality is taken, or the network alone, with names that begin with ``backbone.`` or with those of its
            parts. Weights may lie in a dict in it, and under any prefix. A classifier (``logits.*``) and other names
            are not read.

    Raises:
        UserError: for a file that is not there, broken, or would run code; for a key that is missing, does not fit, or
            is of a larger network, naming it; for several networks of the kind in one source.
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


def size_of(name: str, tensors: Mapping[str, Any], prefix: str) -> NetworkSize | None:
    """The size of network all of whose names are among these, after ``prefix``, if there is one."""
    for size in _SIZES:
        with torch.device("meta"):
            expected = {prefix + key: like for key, like in make(name, size).state_dict().items()}
        first = next(iter(expected))
        if expected.keys() <= tensors.keys() and getattr(tensors[first], "shape", None) == expected[first].shape:
            return size
    return None


def filled(name: str, size: NetworkSize, label: str, tensors: Mapping[str, Any], prefix: str) -> Network:
    """A network with copies of these weights, in their dtype and on their device.

    Raises:
        UserError: as :func:`load`.
    """
    with torch.device("meta"):  # nothing is initialised in vain
        network = make(name, size)
    like = checkpoints.find(label, tensors, prefix + next(iter(network.state_dict())))
    network.to(like.dtype).to_empty(device=like.device)
    checkpoints.fill(network, label, tensors, prefix)
    network.origin = label
    return network


def crop(faces: Tensor, offsets: Tensor | None = None, flip: Tensor | None = None) -> Tensor:
    """What the face network sees of pictures, (x / 255 - 0.5) / 0.5.

    Args:
        faces: uint8 [..., 48, 48, 3].
        offsets: integers [B, 2], row and column from 0 to 8 at which the crop of ``faces`` [B, ..., 48, 48, 3] begins,
            one for a whole window; the centre if left out.
        flip: bool [B], whether those pictures are mirrored, left to right, after the crop.

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
