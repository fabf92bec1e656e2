"""Loading of the authors' full model: face and voice networks, encoders, GRJCA or HGRJCA, and head.

The authors' "video" is our visual, their "logmel" our audio. ``network.k.net.0`` and ``net.4`` are the same tensors as
``conv1`` and ``conv2``; weight_norm calls its two tensors ``weight_g`` and ``weight_v``, or since PyTorch 2.0
``parametrizations.weight.original0`` and ``original1``.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grjca import backbones
from grjca.config import FUSIONS, GATING, Backend, ModelConfig, NetworkSize
from grjca.errors import UserError
from grjca.modalities import MODALITIES
from grjca.model import checkpoints
from grjca.model.audiovisual import AudioVisualModel
from grjca.model.whole import WholeModel
from grjca_kernels import GatedRJCAFused

WEIGHT_NORM = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))
RENAMED = (
    *WEIGHT_NORM,
    ("encoders.visual.blocks.", "temporal.video.network."),
    ("encoders.audio.blocks.", "temporal.logmel.network."),
    ("norms.visual.", "bn.video."),
    ("norms.audio.", "bn.logmel."),
    ("head.hidden.", "regressor1."),
    ("head.norm.", "bn1."),
    ("head.output.", "regressor2."),
)
"""Parts of our keys and their counterparts in the authors'. The fusion block has its own converter."""

_MODEL = re.compile(r"((?:.*\.)?)H?GRJCA\.(?:.*\.)?(?:weight|bias)")
_ALIASES = ((".net.0.", ".conv1."), (".net.4.", ".conv2."))
_BLOCK = re.compile(r"(H?GRJCA\.)(?:coattn\.dcn_layers\.|(?:video|audio)_gating_fc_layer)")
_WITHOUT_EFFECT = re.compile(
    r"(temporal\.bert|bn\.bert|spatial|(?:.*\.)?(?:text_gating_fc_layer\w*|vregressor|aregressor|Joint))\."
)


def load_model(
    source: str | Path | Mapping[str, Tensor], *, backend: Backend = "auto"
) -> AudioVisualModel | WholeModel:
    """Load the authors' trained model, in eval mode.

    A checkpoint with both networks (``spatial.visual.backbone.*`` and ``spatial.audio.backbone.*``) gives a
    :class:`grjca.model.whole.WholeModel`, which reads pictures and log-mel patches. A checkpoint without networks gives
    an :class:`grjca.model.audiovisual.AudioVisualModel`, which reads features. So does a checkpoint with a single
    network, because its fusion model is complete and features may come from elsewhere; a warning says that the network
    is left out (:func:`grjca.backbones.load` reads it). A network with a key that is missing or does not fit is
    refused.

    Args:
        source: a .safetensors file; a torch.save file, from which only tensors are read; or a state_dict. The weights
            may be in a nested dict ("state_dict", "net", ...), under a prefix ("model.", ...), and saved from
            torch.compile, DataParallel or AveragedModel. If there are averaged weights too ("ema", ...), the others
            are loaded, and a warning says so.
        backend: what computes the fusion, as in :class:`grjca.model.audiovisual.AudioVisualModel`.

    Sizes, L, T and the gating are read from the shapes. The model has copies of the weights, in their dtype and on
    their device. Keys without effect on the output (parts of networks, the text modality, leftovers) are ignored and
    named in one warning.

    Raises:
        UserError: if the file is missing, broken, or would run code; if a key is missing or its tensor does not fit
            (the message names it); or if the source holds several models.
    """
    checkpoint = _Checkpoint(source)
    block = checkpoint.block()
    config = checkpoint.config(block)
    fusion = next(name for name in FUSIONS if GATING.get(name) == block.gating)
    with torch.device("meta"):  # only shapes are needed: skips the initialisation
        model = AudioVisualModel(config, fusion=fusion, length=block.length, backend=backend)
    weights = {f"fusion.{name}": tensor for name, tensor in block.state_dict().items()}
    for name, like in model.state_dict().items():
        if name not in weights:
            weights[name] = checkpoint.tensor(_replaced(name, RENAMED), like)
    parameter = next(block.parameters())
    model.to(parameter.dtype).to_empty(device=parameter.device)
    model.load_state_dict(weights)
    networks = checkpoint.networks()
    if note := checkpoint.note():
        warnings.warn(note, stacklevel=2)
    return (WholeModel(model, networks) if networks else model).eval()


class _Checkpoint:
    """The tensors of a checkpoint under the authors' keys, without aliases, and which of them are still unused."""

    def __init__(self, source: str | Path | Mapping[str, Tensor]) -> None:
        self.label, content = checkpoints.read(source)
        models = _models(content)
        places = [place for place in models if not checkpoints.AVERAGED.search(place)] or list(models)
        if len(places) > 1:
            raise UserError(
                f"{self.label}: expected the weights of one model, got those of {len(places)}, under "
                f"{' and '.join(map(repr, places))}; pass a dict of the weights of one alone."
            )
        self.others = models.keys() - places
        self.place = places[0]
        content = {checkpoints.unwrapped(key): value for key, value in models[self.place].items()}
        primary_last = sorted(content, key=lambda key: _replaced(key, _ALIASES) == key)
        self.tensors = {_primary(key): content[key] for key in primary_last}
        self.unused = set(self.tensors)
        self.alone: str | None = None
        """The modality whose network is there without the other one."""

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """Return the tensor ``name``, which must have the shape of ``like`` and be floating-point if ``like`` is."""
        tensor = checkpoints.find_like(self.label, self.tensors, name, like)
        self.unused.discard(name)
        return tensor

    def block(self) -> GatedRJCAFused:
        """Build the fusion block."""
        keys = {name: match[1] for name in self.tensors if (match := _BLOCK.match(name))}
        prefixes = sorted(set(keys.values()))
        if len(prefixes) != 1:
            raise UserError(
                f"{self.label}: expected the authors' full model, with one fusion block under GRJCA. or HGRJCA., "
                f"got {' and '.join(prefixes) or 'neither'} among {len(self.tensors)} keys "
                f"({', '.join([*list(self.tensors)[:3], '...'])})."
            )
        for name in (f"{prefixes[0]}coattn.dcn_layers.0.dense_coattn.query_linear.weight", *keys):
            if name.endswith("weight"):
                self._shape(name, "[out, in]")
        self.unused.difference_update(keys)
        weights = {name: self._find(name) for name in keys}
        try:
            return GatedRJCAFused.from_released(weights, prefix=prefixes[0], output="concat")
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.label}: in the fusion block, {error}") from error

    def config(self, block: GatedRJCAFused) -> ModelConfig:
        """Derive the sizes from the shapes."""
        (visual_features, visual, kernel), (audio_features, audio, _) = map(self._encoder, ("video", "logmel"))
        if (visual[-1], audio[-1]) != block.dims:
            raise UserError(
                f"{self.label}: expected encoders (temporal.*) that end in the widths of the fusion block, "
                f"{block.dims[0]} and {block.dims[1]}, got {visual[-1]} and {audio[-1]}."
            )
        return ModelConfig(
            modalities={"visual": visual_features, "audio": audio_features},
            channels={"visual": visual, "audio": audio},
            kernel=kernel,
            iterations=block.iterations,
            normalize=block.normalize,
            hidden=self._shape("regressor1.weight", "[hidden, d]")[0],
        )

    def networks(self) -> dict[str, backbones.Network]:
        """Return the networks by modality if both are there, else an empty dict."""
        there = [name for name in MODALITIES if any(key.startswith(backbones.WHOLE[name]) for key in self.tensors)]
        sizes = {name: self._network_size(name) for name in there}
        self.unused = {key for key in self.unused if not key.startswith(tuple(backbones.WHOLE.values()))}
        if len(there) < len(MODALITIES):
            self.alone = next(iter(there), None)
            return {}
        return {
            name: backbones.filled(name, size, self.label, self.tensors, backbones.WHOLE[name])
            for name, size in sizes.items()
        }

    def _network_size(self, name: str) -> NetworkSize:
        """Return the size that most of a network's tensors fit; UserError if any tensor is missing or does not fit."""
        prefix = backbones.WHOLE[name]
        with torch.device("meta"):
            expected = {size: backbones.make(name, size).state_dict() for size in backbones.STAGES}

        def fitting(size: NetworkSize) -> int:
            shapes = ((self.tensors.get(prefix + key), like.shape) for key, like in expected[size].items())
            return sum(getattr(tensor, "shape", None) == shape for tensor, shape in shapes)

        size = max(expected, key=fitting)
        checkpoints.matching(self.label, self.tensors, prefix, expected[size])
        return size

    def note(self) -> str:
        """Say what was ignored; empty if nothing was."""
        known = Counter(f"{match[1]}.*" for name in self.unused if (match := _WITHOUT_EFFECT.match(name)))
        unknown = sorted(name for name in self.unused if not _WITHOUT_EFFECT.match(name))
        parts = []
        if known:
            listed = ", ".join(f"{name} ({count} key{'s' * (count > 1)})" for name, count in sorted(known.items()))
            parts.append(f"without effect on the output: {listed}")
        if unknown:
            parts.append(f"unknown: {', '.join(unknown)}")
        notes = [f"ignored keys {'; '.join(parts)}."] if parts else []
        if self.alone:
            (missing,) = (prefix for name, prefix in backbones.WHOLE.items() if name != self.alone)
            notes.append(
                f"expected both networks or none, got {backbones.WHOLE[self.alone]}* without {missing}*: the model "
                f"reads features, and the {self.alone} network is left out."
            )
        if self.others:
            notes.append(
                f"Loaded the weights under {self.place!r}, and not the averaged ones under "
                f"{' and '.join(map(repr, sorted(self.others)))}; for those, pass a dict of them alone."
            )
        return f"{self.label}: {' '.join(notes)}" if notes else ""

    def _encoder(self, name: str) -> tuple[int, tuple[int, ...], int]:
        """Return the feature width, the channels and the kernel size of an encoder."""
        numbers = (re.match(rf"temporal\.{name}\.network\.(\d+)\.", key) for key in self.tensors)
        blocks = 1 + max((int(number[1]) for number in numbers if number), default=0)
        shapes = [
            self._shape(f"temporal.{name}.network.{k}.conv1.weight_v", "[out, in, kernel]") for k in range(blocks)
        ]
        return shapes[0][1], tuple(shape[0] for shape in shapes), shapes[0][2]

    def _shape(self, name: str, expected: str) -> torch.Size:
        shape = self._find(name).shape
        if len(shape) != len(expected.split()) or 0 in shape:
            raise UserError(f"{self.label}: {name}: expected shape {expected}, got {list(shape)}.")
        return shape

    def _find(self, name: str) -> Tensor:
        return checkpoints.find(self.label, self.tensors, name)


def _models(content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return the weights of each model in ``content`` by the prefix of their keys; if there is no model, the largest
    mapping."""
    models: dict[str, dict[str, Any]] = {}
    mappings = list(checkpoints.mappings(content))
    for place, values in mappings:
        weights = (_MODEL.fullmatch(name) for name, value in values.items() if not isinstance(value, Mapping | tuple))
        prefixes = sorted({match[1] for match in weights if match}, key=len)
        for name, value in values.items():
            for prefix in [prefix for prefix in prefixes if name.startswith(prefix)][-1:]:
                models.setdefault(place + prefix, {})[name.removeprefix(prefix)] = value
    return models or {"": max((values for _, values in mappings), key=len)}


def _primary(key: str) -> str:
    """Return the first of the keys that an encoder's tensor can have."""
    if not key.startswith(("temporal.video.", "temporal.logmel.")):
        return key
    return _replaced(key, (*_ALIASES, *WEIGHT_NORM))


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for before, after in pairs:
        name = name.replace(before, after)
    return name
