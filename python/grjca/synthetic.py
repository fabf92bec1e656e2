"""Synthetic audio-visual sequences of known valence and arousal, whose modalities do not always complement."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

PACE = 20.0  # frames over which the emotion, and the quality of a modality, keep their value
SENSITIVITY = (
    (1.0, 0.5),
    (0.5, 1.0),
)  # of visual, audio to valence, arousal: a face shows one better, a voice the other
NUISANCES = 4  # what else a modality shows: pose and lighting, pitch and background


class Sequences(NamedTuple):
    """N sequences of L frames."""

    visual: Tensor
    """[N, L, d_v]"""
    audio: Tensor
    """[N, L, d_a]"""
    labels: Tensor
    """[N, L, 2]: valence and arousal, between -1 and 1"""
    clear: Tensor
    """[N, L, 2]: whether visual and audio show the emotion in a frame; where false they hold noise alone"""

    def part(self, start: int, stop: int) -> Sequences:
        """Sequences ``start`` to ``stop``. Those to train on and those held out must come from one call: one world."""
        return Sequences(*(tensor[start:stop] for tensor in self))


def sequences(
    count: int,
    length: int = 300,
    dim_visual: int = 512,
    dim_audio: int = 128,
    *,
    seed: int = 0,
    lags: tuple[int, int] = (0, 4),
    noise: tuple[float, float] = (0.5, 0.8),
    blind: tuple[float, float] = (0.15, 0.15),
) -> Sequences:
    """``count`` sequences; equal arguments give equal sequences.

    Args:
        lags: frames by which visual and audio trail behind the labels.
        noise: their typical standard deviation, which wanders along a sequence; the signal's is about 1.
        blind: their shares of frames without the emotion: a face that is turned away, a voice that is silent.
    """
    generator = torch.Generator().manual_seed(seed)
    emotion = _wander(count, length + max(lags), 2, generator)  # begins max(lags) frames before the labels
    labels = torch.tanh(emotion[:, max(lags) :])
    features, clear = [], []
    for m, width in enumerate((dim_visual, dim_audio)):
        start = max(lags) - lags[m]
        sees = _wander(count, length, 1, generator) > _quantile(blind[m])
        shown = sees * emotion[:, start : start + length] * torch.tensor(SENSITIVITY[m])
        hidden = torch.cat([shown, _wander(count, length, NUISANCES, generator)], dim=-1)
        mixing = torch.randn(hidden.shape[-1], width, generator=generator) / math.sqrt(hidden.shape[-1] / 2)
        level = noise[m] * torch.exp(0.5 * _wander(count, length, 1, generator))
        features.append(hidden @ mixing + level * torch.randn(count, length, width, generator=generator))
        clear.append(sees)
    return Sequences(features[0], features[1], labels, torch.cat(clear, dim=-1))


def _wander(count: int, length: int, channels: int, generator: torch.Generator) -> Tensor:
    """Smooth random curves [count, length, channels] of mean 0 and variance 1: noise through a Gaussian low-pass."""
    period = length + math.ceil(4 * PACE)  # the filter works on a ring, whose two ends must not meet
    response = torch.exp(-((torch.fft.rfftfreq(period) * PACE) ** 2) * math.pi)
    power = torch.cat([response, response[1 : (period + 1) // 2]]).square().mean()
    white = torch.randn(count, channels, period, generator=generator)
    smooth = torch.fft.irfft(torch.fft.rfft(white) * response, n=period)[..., :length]
    return (smooth / power.sqrt()).transpose(1, 2)


def _quantile(share: float) -> float:
    """What a standard normal variable stays below with this probability."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * share - 1)))
