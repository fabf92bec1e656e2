"""Synthetic videos of known valence and arousal, in which modalities fail to complement each other at known times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng

from grjca.config import Scenario
from grjca.errors import UserError

CODES: dict[str, int] = {"clean": 0, "noisy": 1, "contradicting": 2, "misaligned": 3, "absent": 4}
"""Codes of the truth: the state of a modality at a frame."""
INVALID = -5.0

# Numbers of frames assume 30 frames per second.
LAGS = (0, 4)  # frames by which visual and audio lag behind the emotion
SENSITIVITY = (
    (1.0, 0.75),
    (0.75, 1.0),
)  # of visual and audio, each to valence and arousal: a face shows valence better, a voice arousal
DRIFT = 0.25  # amplitude of signal unrelated to the emotion but as slow: only the other modality can tell them apart
NOISE = 0.3  # amplitude of fast noise
SWAMPED = 3.0  # amplitude of fast noise where a modality is noisy
GRAIN = 0.3  # noise of each feature, whose signal is about 1
NUISANCES = 4  # other factors in a modality's features: pose and lighting, pitch and background
EMOTION_PACE, NOISE_PACE = 30.0, 3.0  # correlation time, in frames
COMMON = 0.85  # share of the emotion's variance common to two people in one video, which their audio shows
DROPOUT = 0.05  # share of frames in which a modality briefly shows nothing, whether clean or weak
WEAK_FRAMES, DROPOUT_FRAMES, INVALID_FRAMES = 45, 5, 12  # typical lengths of stretches, in frames
SHIFT = (30, 60)  # smallest and largest number of frames by which a misaligned stretch is early or late
MARGIN = SHIFT[1] + max(LAGS)
JITTER = 2  # frames by which features may be shorter or longer than the annotation
JITTER_SHARE = 0.25  # share of feature files whose length differs
TWO_FACES = (8, 4)  # every eighth recording, starting with the fifth, has two faces


@dataclass(frozen=True, eq=False)
class SyntheticVideo:
    """One face as features; ``visual`` and ``audio`` may be up to :data:`JITTER` frames shorter or longer than N."""

    name: str
    split: Literal["train", "validate"]
    visual: np.ndarray
    """[about N, d_v] float32"""
    audio: np.ndarray
    """[about N, d_a] float32"""
    labels: np.ndarray
    """[N, 2] float64, valence and arousal in [-1, 1] with 6 digits; both -5 where invalid"""
    truth: np.ndarray
    """[N, 2] uint8, the :data:`CODES` of visual and audio"""


class Face(NamedTuple):
    """One face of a recording and its emotion; the other fields are as in :class:`SyntheticVideo`."""

    name: str
    split: Literal["train", "validate"]
    labels: np.ndarray
    truth: np.ndarray
    emotion: np.ndarray
    """[MARGIN + N + JITTER + MARGIN, 2], of mean 0 and variance 1; row MARGIN + n belongs to frame n"""


class Recording(NamedTuple):
    """One or two faces and their shared sound, as features or as footage. Both faces have the same truth."""

    name: str
    """Name of its face, or of its two faces without ``_left`` and ``_right``"""
    faces: list[Face]
    shifts: np.ndarray
    """[N] int, the number of frames by which a modality is late where it is misaligned"""
    look: Generator
    """Random generator of everything else that is seen, used for one face after the other"""
    sound: Generator
    """Random generator of everything else that is heard"""

    @property
    def truth(self) -> np.ndarray:
        """Truth of the faces, [N, 2] uint8, as in :class:`SyntheticVideo`."""
        return self.faces[0].truth

    def seen(self, face: Face) -> np.ndarray:
        """Return valence and arousal as a face shows them, [N + JITTER, 2] float64. Every call draws from ``look``."""
        return _shown(0, face.emotion, self.truth, self.shifts, self.look)

    def heard(self) -> np.ndarray:
        """Return valence and arousal as the sound of all faces shows them, [N + JITTER, 2] float64. Every call draws
        from ``sound``."""
        faces = len(self.faces)
        emotion = np.mean([face.emotion for face in self.faces], axis=0)
        return _shown(1, emotion / math.sqrt((1 + (faces - 1) * COMMON) / faces), self.truth, self.shifts, self.sound)


class _World(NamedTuple):
    """How a modality mixes what it shows into features; all videos of a seed share it."""

    mixing: np.ndarray  # [2 + NUISANCES, d]
    blank: np.ndarray  # [d], features of an absent modality


def generate(scenario: Scenario) -> Iterator[SyntheticVideo]:
    """Yield the videos of a scenario. Asking for more videos leaves the first ones unchanged, except perhaps the split
    of the last one.

    Both faces of a recording are in the same split.

    Raises:
        UserError: as :func:`recordings`.
    """
    return videos(recordings(scenario), scenario)


def videos(sources: Iterable[Recording], scenario: Scenario) -> Iterator[SyntheticVideo]:
    """Yield the videos of recordings, as features."""
    rng = default_rng(SeedSequence([scenario.seed]))
    worlds = [_world(width, rng) for width in (scenario.visual_features, scenario.audio_features)]
    return islice((video for source in sources for video in _videos(source, worlds)), scenario.videos)


def recordings(scenario: Scenario) -> Iterator[Recording]:
    """Return the recordings of a scenario. The second face of the last one may be a video more than asked for.

    Raises:
        UserError: immediately, if there are only two videos and both are faces of one recording.
    """
    splits = _splits(scenario)
    if len(splits) < 2:
        raise UserError(f"Video {scenario.first} has two faces, which belong to one split; ask for more than 2 videos.")
    return (_recording(number, split, scenario) for number, split in enumerate(splits, scenario.first))


def _splits(scenario: Scenario) -> list[Literal["train", "validate"]]:
    """Assign a split to every recording, keeping the share of validation videos from the first recording on."""
    splits: list[Literal["train", "validate"]] = []
    count = validated = 0
    while count < scenario.videos:
        faces = _faces(scenario.first + len(splits))
        count += faces
        held_out = bool(splits) and validated < math.floor(scenario.validate * count)
        validated += faces * held_out
        splits.append("validate" if held_out else "train")
    if not validated:
        splits[-1] = "validate"
    return splits


def _faces(recording: int) -> int:
    period, first = TWO_FACES
    return 2 if recording % period == first else 1


def _world(width: int, rng: Generator) -> _World:
    channels = 2 + NUISANCES
    return _World(rng.standard_normal((channels, width)) / math.sqrt(channels / 2), rng.standard_normal(width))


def _recording(recording: int, split: Literal["train", "validate"], scenario: Scenario) -> Recording:
    # Each purpose has its own random stream, so that labels do not depend on what is weak.
    seeds = SeedSequence([scenario.seed, recording]).spawn(5)
    life, schedule, gaps, look, sound = map(default_rng, seeds)
    sides = ("",) if _faces(recording) == 1 else ("_left", "_right")
    name = f"video{recording:03d}"
    length = int(life.integers(*scenario.length, endpoint=True))
    truth, shifts = _schedule(length, scenario, schedule)
    faces = []
    for side, emotion in zip(sides, _emotions(length, len(sides), life), strict=True):
        labels = np.round(np.tanh(emotion[MARGIN : MARGIN + length]), 6)
        for start, stop in _stretches(length, scenario.invalid, INVALID_FRAMES, gaps):
            labels[start:stop] = INVALID
        faces.append(Face(name + side, split, labels, truth, emotion))
    return Recording(name, faces, shifts, look, sound)


def _videos(recording: Recording, worlds: list[_World]) -> Iterator[SyntheticVideo]:
    """Yield the one or two videos of a recording, which share their audio."""
    audio = _features(1, recording.heard(), recording.truth, worlds[1], recording.sound)
    for face in recording.faces:
        visual = _features(0, recording.seen(face), recording.truth, worlds[0], recording.look)
        yield SyntheticVideo(face.name, face.split, visual, audio, face.labels, face.truth)


def _emotions(length: int, faces: int, rng: Generator) -> np.ndarray:
    """Draw the emotions of all faces, [faces, MARGIN + length + JITTER + MARGIN, 2], of mean 0 and variance 1."""
    total = length + JITTER + 2 * MARGIN
    own = [wander(total, 2, EMOTION_PACE, rng) for _ in range(faces)]
    if faces == 1:
        return np.stack(own)
    common = wander(total, 2, EMOTION_PACE, rng)
    return np.stack([math.sqrt(COMMON) * common + math.sqrt(1 - COMMON) * each for each in own])


def _schedule(length: int, scenario: Scenario, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw what is weak: codes [length, 2] uint8, and the frames [length] int by which it is late if misaligned."""
    truth, shifts = np.zeros((length, 2), np.uint8), np.zeros(length, int)
    for start, stop in _stretches(length, scenario.weak, WEAK_FRAMES, rng):
        modality, code = rng.integers(2), rng.integers(1, len(CODES))
        shifts[start:stop] = rng.choice((-1, 1)) * rng.integers(*SHIFT, endpoint=True)
        truth[start:stop, modality] = code if scenario.weak_kind == "mixed" else CODES[scenario.weak_kind]
    return truth, shifts


def _shown(m: int, emotion: np.ndarray, truth: np.ndarray, shifts: np.ndarray, rng: Generator) -> np.ndarray:
    """Compute valence and arousal [N + JITTER, 2] as visual (m = 0) or audio (1) shows them, weak parts included."""
    length = len(truth) + JITTER
    code, shift = (np.pad(array, (0, JITTER), mode="edge") for array in (truth[:, m], shifts))
    frames = MARGIN - LAGS[m] + np.arange(length) - np.where(code == CODES["misaligned"], shift, 0)
    shown = emotion[frames] * SENSITIVITY[m]
    shown[code == CODES["contradicting"]] *= -1
    for start, stop in _stretches(length, DROPOUT, DROPOUT_FRAMES, rng):
        shown[start:stop] = 0
    shown += DRIFT * wander(length, 2, EMOTION_PACE, rng)
    noise = np.where(code == CODES["noisy"], SWAMPED, NOISE)
    return shown + noise[:, None] * wander(length, 2, NOISE_PACE, rng)


def _features(m: int, shown: np.ndarray, truth: np.ndarray, world: _World, rng: Generator) -> np.ndarray:
    """Make features, float32 [about N, d], of the modality m from what it shows."""
    length = len(shown)
    hidden = np.concatenate([shown, wander(length, NUISANCES, EMOTION_PACE, rng)], axis=1)
    grain = GRAIN * rng.standard_normal((length, len(world.blank)), dtype=np.float32)
    features = (hidden @ world.mixing).astype(np.float32) + grain
    absent = np.pad(truth[:, m], (0, JITTER), mode="edge") == CODES["absent"]
    features[absent] = world.blank.astype(np.float32) + 0.1 * grain[absent]
    jitter = int(rng.integers(1, JITTER, endpoint=True) * rng.choice((-1, 1)) * (rng.random() < JITTER_SHARE))
    return features[: len(truth) + jitter]


def _stretches(length: int, share: float, typical: int, rng: Generator) -> list[tuple[int, int]]:
    """Draw disjoint stretches of about ``typical`` frames, in order, that cover a ``share`` of ``length``."""
    total = math.floor(length * share + rng.random())  # unbiased even if the share is less than a frame
    total = min(total, length)
    count = math.ceil(total / typical)
    if not count:
        return []
    sizes = 1 + rng.multinomial(total - count, np.full(count, 1 / count))
    cuts = np.sort(rng.integers(0, length - total, count, endpoint=True))
    stops = cuts + np.cumsum(sizes)
    return [(int(stop - size), int(stop)) for size, stop in zip(sizes, stops, strict=True)]


def wander(length: int, channels: int, pace: float, rng: Generator) -> np.ndarray:
    """Draw smooth random curves [length, channels] of mean 0 and variance 1: noise through a Gaussian low-pass."""
    period = length + math.ceil(4 * pace)  # the filter is circular: the extra frames keep the two ends independent
    response = np.exp(-math.pi * (np.fft.rfftfreq(period) * pace) ** 2)
    power = (np.concatenate([response, response[1 : (period + 1) // 2]]) ** 2).mean()
    white = rng.standard_normal((period, channels))
    smooth = np.fft.irfft(np.fft.rfft(white, axis=0) * response[:, None], n=period, axis=0)
    return smooth[:length] / math.sqrt(power)
