"""The authors' model around a fusion block: a temporal encoder per modality, fusion, and a head with a value per frame.

Absent frames (padding) are cleared on entry, take no part in any statistic, and are 0 on exit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from grjca.config import FUSIONS, GATING, NORMALISED, Backend, Fusion, ModelConfig
from grjca.errors import UserError
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused

LONGEST_REACH = 100_000
"""Number of frames that an encoder may look back, nearly an hour; every window is padded with as many zeros."""


class TemporalConvNet(nn.Module):
    """Causal convolutions over time, block k with dilation 2^k: [B, L, inputs] -> [B, L, channels[-1]].

    A block applies weight-normed convolution, leaky_relu and dropout twice, then adds the residual and applies
    leaky_relu (Bai et al., arXiv 1803.01271, with leaky_relu in place of relu).
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], *, kernel: int = 5, dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                _CausalBlock(before, after, kernel, dilation=2**k, dropout=dropout)
                for k, (before, after) in enumerate(zip((inputs, *channels), channels, strict=False))
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``x`` [B, L, inputs]; a frame sees only itself and earlier frames."""
        return self.blocks(x.transpose(1, 2)).transpose(1, 2)


class _CausalBlock(nn.Module):
    """Residual block of the encoder: [B, inputs, L] -> [B, outputs, L]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = weight_norm(nn.Conv1d(inputs, outputs, kernel, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(outputs, outputs, kernel, dilation=dilation))
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Conv1d(inputs, outputs, 1)
            nn.init.xavier_uniform_(self.downsample.weight, gain=math.sqrt(2))
        self.dropout = nn.Dropout(dropout)
        self.reach = (kernel - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for convolution in (self.conv1, self.conv2):
            y = self.dropout(F.leaky_relu(convolution(F.pad(y, (self.reach, 0)))))
        return F.leaky_relu(y + self.downsample(x))


class FrameNorm(nn.BatchNorm1d):
    """Batch normalisation over the present frames of all samples together.

    A batch of fewer than two frames has no variance: in training, it is normalised by the running statistics and leaves
    them unchanged.
    """

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Normalise ``x`` [B, L, C]; frames where ``present`` [B, L] is false are not read and are 0 in the result."""
        frames = x.flatten(0, 1) if present is None else x[present]
        if len(frames) < 2:
            y = F.batch_norm(frames, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        else:
            y = super().forward(frames)
        return y.reshape(x.shape) if present is None else y.new_zeros(x.shape).index_put((present,), y)


class Head(nn.Module):
    """Linear, batch normalisation, leaky_relu, Linear, tanh: [B, L, inputs] -> [B, L]."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.norm = FrameNorm(hidden)
        self.output = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Return a value from -1 to 1 for every frame of ``x`` [B, L, inputs], 0 where ``present`` [B, L] is false."""
        y = torch.tanh(self.output(F.leaky_relu(self.norm(self.hidden(x), present))).squeeze(-1))
        return y if present is None else torch.where(present, y, 0)


class AudioVisualModel(nn.Module):
    """Predicts valence or arousal of every frame from features of face and voice, or of any two to four modalities.

    Args:
        config: modalities, sizes, dropout and settings of the fusion block.
        fusion: "concat" (no attention), "rjca", "rjcma" (its joint features are not projected), "dca", "grjca",
            "hgrjca" or "tagf".
        length: L, the number of frames of a window. Pad shorter windows and pass ``lengths``.
        backend: what computes the fusion, see :class:`grjca_kernels.GatedRJCAFused`; "eager" is plain PyTorch. All
            backends draw the same dropout masks.

    All weights are initialised as the authors' are.

    Raises:
        UserError: if a setting is invalid; the message names it.
        ValueError: for an unknown backend.
    """

    def __init__(self, config: ModelConfig, *, fusion: Fusion, length: int, backend: Backend = "auto") -> None:
        super().__init__()
        _check(config, fusion, length)
        self.widths = config.widths
        self.length = length
        self.encoders = nn.ModuleDict(
            {
                name: TemporalConvNet(
                    width, tuple(config.encoders[name]), kernel=config.kernel, dropout=config.encoder_dropout
                )
                for name, width in self.widths.items()
            }
        )
        encoded = {name: config.encoders[name][-1] for name in self.widths}
        self.norms = nn.ModuleDict({name: FrameNorm(d_m) for name, d_m in encoded.items()})
        self.fusion = None if fusion == "concat" else _fusion(config, fusion, length, backend)
        self.head = Head(sum(encoded.values()), config.hidden)

    def forward(self, *features: Tensor, lengths: Tensor | None = None, return_gates: bool = False) -> Any:
        """Return a value from -1 to 1 for every frame, [B, L].

        Args:
            features: [B, L, width] for each modality, in the order of the setting and in the model's dtype. ``lengths``
                may follow them as a positional argument.
            lengths: [B] integers, 0 <= length <= L. Frames beyond are absent: their content, NaN included, has no
                influence on anything, and their values are 0.
            return_gates: return (values, gates) instead, where ``gates`` is a dict by modality: [B, L, ways], a tuple
                of these for hgrjca, None for rjca, rjcma and concat.

        Raises:
            ValueError, TypeError: if an argument is wrong; the message names it, what was expected and what came.
        """
        if len(features) == len(self.widths) + 1 and lengths is None:
            *features, lengths = features  # type: ignore[assignment]
        if len(features) != len(self.widths):
            raise TypeError(f"expected features of {', '.join(self.widths)}, got {len(features)} tensors.")
        first = features[0]
        for (name, width), x in zip(self.widths.items(), features, strict=True):
            if x.dim() != 3 or x.shape[1:] != (self.length, width) or len(x) != len(first):
                batch = "B" if x is first else len(first)
                raise ValueError(f"{name}: expected shape [{batch}, {self.length}, {width}], got {list(x.shape)}.")
        present = None if lengths is None else self._presence(lengths, first)
        encoded = [self._encode(name, x, present) for name, x in zip(self.widths, features, strict=True)]
        gates: tuple[Any, ...] = (None,) * len(encoded)
        if self.fusion is None:
            fused = torch.cat(encoded, dim=-1)
        elif return_gates:
            fused, extras = self.fusion(*encoded, lengths=lengths, return_gates=True)
            gates = extras["gates"]
        else:
            fused = self.fusion(*encoded, lengths=lengths)
        values = self.head(fused, present)
        return (values, dict(zip(self.widths, gates, strict=True))) if return_gates else values

    def _encode(self, name: str, x: Tensor, present: Tensor | None) -> Tensor:
        """Encode one modality: [B, L, d_m], 0 where a frame is absent."""
        if present is not None:
            x = torch.where(present[..., None], x, 0)
        return self.norms[name](self.encoders[name](x), present)

    def _presence(self, lengths: Tensor, first: Tensor) -> Tensor:
        """Return [B, L], true for present frames."""
        if lengths.dtype.is_floating_point or lengths.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"lengths: expected an integer dtype, got {lengths.dtype}.")
        if lengths.shape != first.shape[:1] or lengths.device != first.device:
            raise ValueError(
                f"lengths: expected shape [{len(first)}] on {first.device}, "
                f"got {list(lengths.shape)} on {lengths.device}."
            )
        if not torch.compiler.is_compiling() and ((lengths < 0) | (lengths > self.length)).any():
            raise ValueError(f"lengths: expected values from 0 to L = {self.length}, got {lengths.tolist()}.")
        return torch.arange(self.length, device=lengths.device) < lengths[:, None]


def _fusion(config: ModelConfig, fusion: Fusion, length: int, backend: Backend) -> GatedRJCAFused:
    """Make the fusion block, whose output is [B, L, d]."""
    kind = GatedRJCAEager if backend == "eager" else GatedRJCAFused
    block = kind(
        [config.encoders[name][-1] for name in config.widths],
        length=length,
        iterations=config.iterations,
        gating=GATING[fusion],
        joint="raw" if fusion == "rjcma" else "projected",
        dropout=config.dropout,
        gate_dropout=config.gate_dropout,
        temperature=config.temperature,
        normalize=fusion in NORMALISED if config.normalize is None else config.normalize,
        output="concat",
        backend="auto" if backend == "eager" else backend,
    )
    if isinstance(block, GatedRJCAEager):
        block.shared_masks = True
    return block


def _check(config: ModelConfig, fusion: str, length: int) -> None:
    """Refuse invalid settings, each by its name."""
    if fusion not in FUSIONS:
        raise UserError(f"fusion: expected one of {', '.join(FUSIONS)}, got {fusion!r}.")
    if not _is_count(length):
        raise UserError(f"length: expected a whole number of frames above 0, got {length!r}.")
    for names, holds, expected in (
        ("kernel hidden", _is_count, "a whole number above 0"),
        ("iterations", lambda value: _is_count(value) and value <= 16, "a whole number from 1 to 16"),
        ("encoder_dropout dropout gate_dropout", _is_probability, "at least 0 and below 1"),
        ("temperature", lambda value: _is_number(value) and 0 < value < math.inf, "a finite number above 0"),
        ("normalize", lambda value: value is None or isinstance(value, bool), "true, false or null"),
    ):
        for name in names.split():
            if not holds(value := getattr(config, name)):
                raise UserError(f"model.{name}: expected {expected}, got {value!r}.")
    for name, channels in config.encoders.items():
        if hasattr(nn.ModuleDict, name):
            raise UserError(
                f"model.modalities: expected other names than those of PyTorch's own methods, got {name!r}."
            )
        if not _are_counts(channels):
            raise UserError(
                f"model.channels.{name}: expected one whole number above 0 for each block, at least one, "
                f"got {channels!r}."
            )
        blocks = len(channels)
        if blocks > 30 or (config.kernel - 1) * 2 ** (blocks - 1) > LONGEST_REACH:
            raise UserError(
                f"model.channels.{name}: expected blocks of which the last reaches back (kernel - 1) 2^(blocks - 1) <= "
                f"{LONGEST_REACH} frames, got {blocks} blocks and a kernel of {config.kernel}."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_probability(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_counts(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) > 0 and all(map(_is_count, value))
