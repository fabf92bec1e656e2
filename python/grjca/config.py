"""Every setting, once: the command line, config.yaml and the code read the same dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from grjca.errors import UserError

Target = Literal["valence", "arousal"]
Fusion = Literal["concat", "rjca", "dca", "grjca", "hgrjca", "tagf"]
Precision = Literal["no", "bf16", "fp16"]
WeakKind = Literal["mixed", "noisy", "contradicting", "misaligned", "absent"]
Backend = Literal["auto", "cuda", "triton", "cpu", "reference", "eager"]
MOST = 10**9
"""The largest number that a setting of a training may be; float32 holds it."""
TARGETS: tuple[Target, ...] = ("valence", "arousal")
MODALITIES = ("visual", "audio")
FUSIONS: tuple[Fusion, ...] = ("concat", "rjca", "dca", "grjca", "hgrjca", "tagf")
GATING = {"rjca": "none", "dca": "dynamic", "grjca": "flat", "hgrjca": "hierarchical", "tagf": "temporal"}
"""What the fused block calls them."""
NORMALISED = ("grjca", "hgrjca", "tagf")
"""Those whose authors divide every frame by its norm first."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What synthetic data show. Emotions depend on the seed alone, whatever is weak: studies compare like with like."""

    videos: int = 32
    """Annotation files; a video with two faces has two of them."""
    seed: int = 0
    """Of everything; more videos of a seed leave the first ones as they are."""
    first: int = 0
    """Number of the first recording. From another one on, the same seed gives others that show emotions alike."""
    weak: float = 0.1
    """Share of frames at which one modality is weak."""
    weak_kind: WeakKind = "mixed"
    """How: swamped by noise, showing the negated emotion, showing that of 1-2 s earlier or later, or absent."""
    visual_features: int = 512
    """Width of a row of the visual features."""
    audio_features: int = 128
    """Width of a row of the audio features."""
    length: tuple[int, int] = (150, 900)
    """Frames of the shortest and of the longest video."""
    invalid: float = 0.03
    """Share of frames marked as invalid, -5."""
    validate: float = 0.25
    """Share of videos in the validation split."""

    def __post_init__(self) -> None:
        for name in ("visual_features", "audio_features"):
            _require(self, name, getattr(self, name) >= 1, "a whole number above 0")
        for name in ("seed", "first"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        _require(self, "videos", self.videos >= 2, "at least 2, to train and to validate on")
        _require(self, "weak", 0 <= self.weak <= 1, "a share from 0 to 1")
        _require(self, "weak_kind", self.weak_kind in get_args(WeakKind), f"one of {', '.join(get_args(WeakKind))}")
        _require(self, "length", 3 <= self.length[0] <= self.length[1], "shortest and longest, of 3 frames or more")
        _require(self, "invalid", 0 <= self.invalid < 1, "a share from 0 to below 1")
        _require(self, "validate", 0 < self.validate < 1, "a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SynthConfig(Scenario):
    """Write synthetic videos of known valence and arousal, with the truth on where a modality is weak."""

    out: Path
    """Folder to write; it must not exist, or be empty."""
    layout: Literal["plain", "npy_data"] = "plain"
    """features/<video>/{visual,audio}.npy, or npy_data/<video>/{video,vggish,VA_continuous_label}.npy."""


@dataclass(frozen=True)
class ModelConfig:
    """The model around the fusion block, with the sizes of the authors' experiment as defaults."""

    visual_features: int = 512
    """Width of a row of the visual features."""
    audio_features: int = 128
    """Width of a row of the audio features."""
    visual_channels: tuple[int, ...] = (512, 512, 256, 256)
    """Channels of the visual encoder's blocks; block k has dilation 2^k. The last is d_v."""
    audio_channels: tuple[int, ...] = (128, 128, 128, 128)
    """The same of the audio encoder; the last is d_a."""
    kernel: int = 5
    """Frames that one convolution sees."""
    encoder_dropout: float = 0.1
    """Dropout inside the encoders."""
    iterations: int = 2
    """T of the fusion block."""
    dropout: float = 0.6
    """Dropout inside the fusion block."""
    gate_dropout: float = 0.1
    """Dropout inside the gates of tagf."""
    temperature: float = 0.1
    """Of the gates' softmax."""
    normalize: bool | None = None
    """Divide every frame by its L2 norm before the fusion; null does as the authors: for grjca, hgrjca and tagf."""
    hidden: int = 256
    """Width inside the head."""


@dataclass(frozen=True)
class TrainConfig:
    """One training; the defaults are the authors' experiment."""

    data: Path
    """Folder with annotations/ and features/ or npy_data/."""
    target: Target
    """What to predict: one model for valence, another for arousal."""
    out: Path
    """Folder of the run. It must not exist, unless the run is resumed."""
    fusion: Fusion = "grjca"
    """How the modalities are fused; concat has no attention at all."""
    backend: Backend = "auto"
    """What computes the fusion. eager is the block in plain PyTorch."""
    epochs: int = 100
    """At most so many."""
    seed: int = 3407
    """Of initial weights, order of windows and dropout."""
    fold: int = 0
    """0 is the official split; 1 to 5 validate on a fifth of the training videos each."""
    window: int = 300
    """Frames of a window, L."""
    hop: int = 200
    """Frames from one window to the next."""
    batch_size: int = 12
    """Windows of an optimiser step, all processes together."""
    learning_rate: float = 1e-4
    """Of Adam, after the warm-up."""
    weight_decay: float = 1e-3
    """Of Adam, coupled."""
    loss: Literal["population", "released"] = "population"
    """Convention of the CCC in the loss; released divides the variances by N - 1, as the authors' code does."""
    warmup: Literal["linear", "released", "none"] = "linear"
    """How the learning rate rises; released is the authors' saw-tooth."""
    warmup_epochs: int = 5
    """Epochs of it."""
    plateau: bool = True
    """Reduce the learning rate when the validation CCC stops rising."""
    plateau_epochs: int = 6
    """After so many epochs without a better one."""
    plateau_factor: float = 0.1
    """To this share."""
    reload_best: bool = True
    """Load the best weights so far after every epoch; the optimiser keeps its moments."""
    early_stop: bool = True
    """Stop when the validation CCC has not risen for long."""
    early_stop_epochs: int = 50
    """After so many epochs without a better one."""
    precision: Precision = "no"
    """Mixed precision; no is full float32."""
    workers: int = 0
    """Processes that read windows ahead, per training process."""
    tensorboard: bool = True
    """Write curves for TensorBoard as well."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the model."""

    def __post_init__(self) -> None:
        for name in ["epochs", "window", "hop", "batch_size", "warmup_epochs", "plateau_epochs", "early_stop_epochs"]:
            _require(self, name, getattr(self, name) >= 1, "a whole number above 0")
            _require(self, name, getattr(self, name) <= MOST, f"at most {MOST}")
        _require(self, "hop", self.hop <= self.window, f"at most --window, {self.window}, or frames are lost")
        _require(self, "fold", 0 <= self.fold <= 5, "0 to 5")
        _require(self, "seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1")
        _require(self, "workers", 0 <= self.workers <= 1024, "0 to 1024")
        _require(self, "learning_rate", 0 < self.learning_rate <= MOST, f"a positive number up to {MOST}")
        _require(self, "weight_decay", 0 <= self.weight_decay <= MOST, f"0 to {MOST}")
        _require(self, "plateau_factor", 0 < self.plateau_factor < 1, "a number between 0 and 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a run on the labelled videos of a split."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Folder with annotations and features; that of the training if left out."""
    split: Literal["train", "validate"] = "validate"
    """Which videos, by the fold of the training."""
    out: Path | None = None
    """Folder for figures and plots; RUN/evaluation/SPLIT if left out. What an earlier evaluation left is replaced."""
    backend: Backend | None = None
    """What computes the fusion; that of the training if left out."""
    compare: Backend | None = None
    """A second backend, to see how far the two are apart."""
    batch_size: int = 12
    """Windows at once, all processes together."""
    plots: bool = True
    """Draw plots as well."""
    plotted_videos: int = 3
    """Videos drawn over time: of lowest, median and highest CCC first."""

    def __post_init__(self) -> None:
        _require(self, "batch_size", self.batch_size >= 1, "a whole number above 0")
        _require(self, "plotted_videos", self.plotted_videos >= 0, "0 or more")


@dataclass(frozen=True)
class PredictConfig:
    """Write a value for every frame: a file per video, and the challenge file."""

    run: Path
    """Folder of the run."""
    data: Path
    """Folder with features, and annotations if there are any."""
    out: Path
    """Folder for the files. It must not exist, or be empty."""
    other: Path | None = None
    """Run of the other target: the challenge file has a column for each."""
    template: Path | None = None
    """The organisers' file, whose rows decide which frames the challenge file lists, and in which order."""
    split: Literal["all", "train", "validate", "test"] = "all"
    """Which videos; test are those without annotation."""
    backend: Backend | None = None
    """What computes the fusion; that of the training if left out."""
    batch_size: int = 12
    """Windows at once, all processes together."""

    def __post_init__(self) -> None:
        _require(self, "batch_size", self.batch_size >= 1, "a whole number above 0")


@dataclass(frozen=True)
class DoctorConfig:
    """Tell what runs here and how fast, and what is wrong with a data folder; exit with 1 if something is."""

    data: Path | None = None
    """Folder to inspect."""
    visual_features: int = 512
    """Expected width of a row of the visual features."""
    audio_features: int = 128
    """Expected width of a row of the audio features."""
    speed: bool = True
    """Measure each backend."""


@dataclass(frozen=True)
class StudyConfig:
    """Study whether gates help when face and voice don't complement each other, on synthetic data."""

    out: Path
    """Folder for data, runs and results. A study that was interrupted goes on there."""
    preset: Literal["small", "full"] = "small"
    """small ends within ten minutes on 2 cores; full has the authors' sizes, and wants a GPU or days."""
    jobs: int = 2
    """Trainings at the same time, each with one thread."""

    def __post_init__(self) -> None:
        _require(self, "jobs", self.jobs >= 1, "a whole number above 0")


@dataclass(frozen=True)
class DemoConfig:
    """Make data, train, evaluate, predict and plot, all in a few minutes."""

    out: Path | None = None
    """Folder for everything; a new temporary one if left out."""
    seed: int = 0
    """Of data and training."""


def _require(config: Any, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"--{name}: expected {expected}, got {getattr(config, name)}.")
