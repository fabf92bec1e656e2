"""All settings: the command line, config.yaml and the code read the same dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from grjca.errors import UserError
from grjca.modalities import CHANNELS, PLAIN_CHANNELS, WIDTHS, modalities_of

Target = Literal["valence", "arousal"]
Fusion = Literal["concat", "rjca", "rjcma", "dca", "grjca", "hgrjca", "tagf"]
Source = Literal["features", "arrays"]
NetworkSize = Literal["released", "small"]
Precision = Literal["no", "bf16", "fp16"]
WeakKind = Literal["mixed", "noisy", "contradicting", "misaligned", "absent"]
SynthLayout = Literal["plain", "npy_data", "footage"]
Backend = Literal["auto", "cuda", "triton", "cpu", "reference", "eager"]
MOST = 10**9
"""The largest value of a numeric training setting; float32 represents it."""
TARGETS: tuple[Target, ...] = ("valence", "arousal")
FUSIONS: tuple[Fusion, ...] = ("concat", "rjca", "rjcma", "dca", "grjca", "hgrjca", "tagf")
GATING = {
    "rjca": "none",
    "rjcma": "none",
    "dca": "dynamic",
    "grjca": "flat",
    "hgrjca": "hierarchical",
    "tagf": "temporal",
}
"""The gating of the fused block for each fusion."""
STUDIED: tuple[Fusion, ...] = ("concat", "rjca", "dca", "grjca", "hgrjca", "tagf")
"""The fusions that grjca study compares; for two modalities, rjcma differs from rjca only in the projection."""
NORMALISED = ("grjca", "hgrjca", "tagf")
"""The fusions whose authors first divide every frame by its norm."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The content of synthetic data. Emotions depend on the seed alone, not on what is weak, so that studies compare
    like with like."""

    videos: int = 32
    """Number of annotation files; a video with two faces has two of them."""
    seed: int = 0
    """Seed of all random numbers. Asking for more videos with the same seed leaves the first ones unchanged."""
    first: int = 0
    """Number of the first recording. Another number gives other recordings, which show emotions in the same way as
    long as the seed is the same."""
    weak: float = 0.1
    """Share of frames in which one modality is weak."""
    weak_kind: WeakKind = "mixed"
    """The behavior of a weak modality: it is swamped by noise (noisy), shows the negated emotion (contradicting), shows
    the emotion of 1-2 s earlier or later (misaligned), is absent, or any of these (mixed)."""
    visual_features: int = 512
    """Width of the visual features; the layout footage has none."""
    audio_features: int = 128
    """Width of the audio features; the layout footage has none."""
    length: tuple[int, int] = (150, 900)
    """Lengths of the shortest and the longest video, in frames."""
    invalid: float = 0.03
    """Share of frames marked as invalid (-5)."""
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
    """Write synthetic videos of known valence and arousal, and a record of where a modality is weak."""

    out: Path
    """Folder to write; it must be empty or not exist."""
    layout: SynthLayout = "plain"
    """plain: features/<video>/{visual,audio}.npy; npy_data: npy_data/<video>/{video,vggish,VA_continuous_label}.npy;
    footage: videos/<video>.mp4 with a drawn face and a voice-like tone, and cropped_aligned/<video>/00001.jpg."""
    fps: float = 25.0
    """Frame rate of the footage, in frames per second."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "fps", 1 <= self.fps <= 240, "1 to 240 frames a second")


@dataclass(frozen=True)
class ModelConfig:
    """The model around the fusion block. The defaults are the sizes of the authors' experiment."""

    modalities: dict[str, int] | str = field(default_factory=lambda: dict(WIDTHS))
    """Two to four modalities in order, each with the width of its features, as in "visual:512, audio:128, text:768".
    The feature files of a video have these names."""
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Channels of each block of a modality's encoder; block k has dilation 2^k, and the last width is d_m. A modality
    that is left out gets the authors' channels: 512, 512, 256, 256 for visual, and 128 in each of four blocks for audio
    and all others."""
    kernel: int = 5
    """Kernel size of the encoders' convolutions, in frames."""
    encoder_dropout: float = 0.1
    """Dropout rate inside the encoders."""
    iterations: int = 2
    """Number of iterations of the fusion block, T."""
    dropout: float = 0.6
    """Dropout rate inside the fusion block."""
    gate_dropout: float = 0.1
    """Dropout rate inside the gates of tagf."""
    temperature: float = 0.1
    """Temperature of the gates' softmax."""
    normalize: bool | None = None
    """Divide every frame by its L2 norm before the fusion; null does so for grjca, hgrjca and tagf, as the authors
    do."""
    hidden: int = 256
    """Width of the head's hidden layer."""

    def __post_init__(self) -> None:
        # The dataclass is frozen, but modalities given as text are parsed here, once.
        object.__setattr__(self, "modalities", modalities_of("model.modalities", self.modalities))
        unknown = self.channels.keys() - self.widths.keys()
        if unknown:
            raise UserError(f"--model.channels: expected names of --model.modalities; got {sorted(unknown)[0]!r}.")

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality's features."""
        assert isinstance(self.modalities, dict)
        return self.modalities

    @property
    def encoders(self) -> dict[str, tuple[int, ...]]:
        """Channels of each modality's encoder."""
        return {name: self.channels.get(name, CHANNELS.get(name, PLAIN_CHANNELS)) for name in self.widths}


@dataclass(frozen=True)
class NetworksConfig:
    """The face and voice networks, when they are part of a training."""

    size: NetworkSize = "released"
    """Size of both networks: released is the authors', small is about a hundred times cheaper and meant for trials."""
    visual: Path | None = None
    """File with the weights of the face network or of one of the authors' whole models; random weights if left out."""
    audio: Path | None = None
    """File with the weights of the voice network or of one of the authors' whole models; random weights if left
    out."""
    statistics: Literal["batch", "frozen"] = "batch"
    """batch keeps the networks in training mode, with batch statistics and dropout, as the authors do; frozen keeps
    them in evaluation mode."""
    release: bool = True
    """Train parts of the networks in three stages, as the authors do: the first from epoch 0, and the next whenever
    the learning rate has fallen to 1e-8 and more than five epochs have passed since the last stage began. A fourth
    time ends the training."""
    augment: bool = True
    """Crop and flip the faces of each window at random."""
    chunk: int = 0
    """Number of faces or patches that pass through a network at once and are recomputed in the backward pass, to save
    memory; 0 passes the whole batch and recomputes nothing."""

    def __post_init__(self) -> None:
        _require(self, "chunk", self.chunk >= 0, "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """Train a model; the defaults are the authors' experiment."""

    data: Path
    """Folder with annotations/ and features/ or npy_data/."""
    target: Target
    """Target to predict; valence and arousal each need their own model."""
    out: Path
    """Folder of the run. It must not exist unless the run is resumed."""
    source: Source = "features"
    """Input of the model: features, or the arrays of grjca prepare, which train the face and voice networks too."""
    fusion: Fusion = "grjca"
    """How the modalities are fused; concat concatenates them without attention."""
    backend: Backend = "auto"
    """Backend that computes the fusion; eager is the block in plain PyTorch."""
    epochs: int = 100
    """Maximum number of epochs."""
    seed: int = 3407
    """Seed of the initial weights, the order of windows and dropout."""
    fold: int = 0
    """Fold of the data: 0 is the official split; each of 1 to 5 validates on another fifth of the training videos."""
    window: int = 300
    """Window length L, in frames."""
    hop: int = 200
    """Distance from the start of one window to the next, in frames."""
    batch_size: int = 12
    """Windows per optimiser step, over all processes together."""
    learning_rate: float = 1e-4
    """Adam's learning rate after the warm-up."""
    weight_decay: float = 1e-3
    """Adam's weight decay (L2, not decoupled)."""
    loss: Literal["population", "released"] = "population"
    """Variances of the CCC in the loss: population divides by N; released divides by N - 1, as the authors' code
    does."""
    warmup: Literal["linear", "released", "none"] = "linear"
    """How the learning rate rises during the warm-up; released is the authors' saw-tooth."""
    warmup_epochs: int = 5
    """Length of the warm-up, in epochs."""
    plateau: bool = True
    """Reduce the learning rate when the validation CCC stops rising."""
    plateau_epochs: int = 6
    """Number of epochs without a better validation CCC after which the learning rate is reduced."""
    plateau_factor: float = 0.1
    """Factor by which each reduction multiplies the learning rate."""
    reload_best: bool = True
    """Load the best weights so far after every epoch; the optimiser keeps its moments."""
    early_stop: bool = True
    """Stop the training when the validation CCC has not risen for --early_stop_epochs epochs."""
    early_stop_epochs: int = 50
    """Number of epochs without a better validation CCC after which the training stops."""
    early_stop_from: Literal["best", "warmup"] = "best"
    """The start of that count: best is the best epoch; warmup does not start before the end of the warm-up, as the
    authors do."""
    restart: bool = False
    """Restart from the best weights, with a new optimiser and warm-up, when the learning rate has fallen to 1e-8 and
    more than five epochs have passed since the last start, as the authors do; otherwise the rate stays at 1e-8.
    --networks.release implies a restart."""
    shuffle: Literal["epoch", "once"] = "epoch"
    """Shuffle the windows in every epoch, or only once, as the authors do."""
    precision: Precision = "no"
    """Mixed precision of the training; no is full float32."""
    workers: int = 0
    """Number of processes that load windows, per training process; 0 loads them in the training process."""
    tensorboard: bool = True
    """Also write curves for TensorBoard."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the model."""
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    """The face and voice networks; only with --from arrays."""

    def __post_init__(self) -> None:
        if self.source == "features" and self.networks != NetworksConfig():
            raise UserError("--networks: expected its settings with --from arrays alone; features need no networks.")
        expected = f"{WIDTHS}, what the networks put out, with --from arrays"
        if self.source == "arrays" and list(self.model.widths.items()) != list(WIDTHS.items()):
            raise UserError(f"--model.modalities: expected {expected}, got {self.model.modalities}.")
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
class PrepareConfig:
    """Make arrays of faces and sound from videos, cropped faces and annotations; an interrupted run continues."""

    videos: Path
    """Folder with videos (<video>.mp4 or another format), sound (<video>.wav), or both; a .wav replaces the sound of
    its video."""
    out: Path
    """Folder for annotations/ and npy_data/<video>/{video,logmel,VA_continuous_label}.npy."""
    faces: Path | None = None
    """Folder with cropped faces, <video>/00001.jpg and so on; a missing face becomes a black frame."""
    annotations: Path | None = None
    """Folder with {train,validate}/<video>.txt, or with the folder names as downloaded; videos without an annotation
    are for testing."""
    fps: float | None = None
    """Frame rate, in frames per second; each video file's own rate if left out. Sound without video needs it."""
    jobs: int = 2
    """Number of videos prepared at the same time, each in its own process."""
    detect: bool = False
    """Detect faces with OpenCV in the videos that have no cropped faces."""

    def __post_init__(self) -> None:
        _require(self, "fps", self.fps is None or 1 <= self.fps <= 1000, "1 to 1000")
        _require(self, "jobs", 1 <= self.jobs <= 1024, "1 to 1024")


@dataclass(frozen=True)
class ExtractConfig:
    """Turn the arrays of grjca prepare into features, with the face and voice networks in evaluation mode."""

    data: Path
    """Folder that grjca prepare has written."""
    out: Path
    """Folder for annotations and features. An interrupted extraction continues there."""
    visual: Path | None = None
    """File with the weights of the face network or of one of the authors' whole models; random weights, meant only
    for trials, if left out."""
    audio: Path | None = None
    """File with the weights of the voice network or of one of the authors' whole models; random weights, meant only
    for trials, if left out."""
    size: NetworkSize = "released"
    """Size of both networks: released is the authors', small is about a hundred times cheaper and meant for trials."""
    batch_size: int = 64
    """Frames that pass through a network at once."""
    device: str | None = None
    """Device that computes, such as cpu or cuda:1; if left out, a GPU if there is one, else the CPU."""
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self) -> None:
        _require(self, "batch_size", 1 <= self.batch_size <= MOST, f"a whole number from 1 to {MOST}")
        _require(self, "seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a run on the labelled videos of a split."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Folder with annotations and features; the training's data folder if left out."""
    split: Literal["train", "validate"] = "validate"
    """Split to score, in the fold of the training."""
    out: Path | None = None
    """Folder for figures and plots; RUN/evaluation/SPLIT if left out. The results of an earlier evaluation are
    replaced."""
    backend: Backend | None = None
    """Backend that computes the fusion; the training's backend if left out."""
    compare: Backend | None = None
    """A second backend, whose predictions are compared with those of the first."""
    batch_size: int = 12
    """Windows per batch, over all processes together."""
    plots: bool = True
    """Also draw plots."""
    plotted_videos: int = 3
    """Number of videos plotted over time, starting with those of the lowest, the median and the highest CCC."""

    def __post_init__(self) -> None:
        _require(self, "batch_size", self.batch_size >= 1, "a whole number above 0")
        _require(self, "plotted_videos", self.plotted_videos >= 0, "0 or more")


@dataclass(frozen=True)
class PredictConfig:
    """Write a predicted value for every frame: one file per video, and the challenge file."""

    run: Path
    """Folder of the run."""
    data: Path | None = None
    """Folder with features or arrays, and annotations if there are any. Give either --data or --video."""
    out: Path | None = None
    """Folder for the files. It must be empty or not exist; RUN/predicted/NAME if left out, where NAME is that of the
    data or video."""
    video: Path | None = None
    """Video file to predict, with a table and a plot of its values over time. A .wav of the same name beside it
    replaces its sound."""
    faces: Path | None = None
    """Folder with cropped faces of --video, 00001.jpg and so on; if left out, OpenCV detects them."""
    draw: bool = False
    """Also write a copy of --video with the curves below the picture."""
    visual: Path | None = None
    """File with the weights of the face network, for --video and a run that was trained on its features."""
    audio: Path | None = None
    """File with the weights of the voice network, for --video and a run that was trained on its features."""
    other: Path | None = None
    """Run of the other target, whose predictions fill the other column of the challenge file."""
    template: Path | None = None
    """The organisers' file, whose rows decide which frames the challenge file lists and in which order."""
    split: Literal["all", "train", "validate", "test"] = "all"
    """Split to predict; test holds the videos without annotation."""
    backend: Backend | None = None
    """Backend that computes the fusion; the training's backend if left out."""
    batch_size: int = 12
    """Windows per batch, over all processes together."""

    def __post_init__(self) -> None:
        _require(self, "batch_size", self.batch_size >= 1, "a whole number above 0")
        if (self.data is None) == (self.video is None):
            raise UserError(f"--data, --video: expected one of the two, got {'none' if self.data is None else 'both'}.")
        for name in ("faces", "visual", "audio", "template"):
            wanted = "data" if name == "template" else "video"
            if getattr(self, name) is not None and getattr(self, wanted) is None:
                raise UserError(f"--{name}: expected it with --{wanted} alone.")

    @property
    def folder(self) -> Path:
        """The folder to which the files are written."""
        of = (self.video or self.data or Path()).absolute()
        return self.out or self.run / "predicted" / (of.stem if self.video else of.name)


@dataclass(frozen=True)
class DoctorConfig:
    """Check which backends run here, how fast, and whether a data folder is valid; exit with 1 on any problem."""

    data: Path | None = None
    """Data folder to check."""
    modalities: dict[str, int] | str = field(default_factory=lambda: dict(WIDTHS))
    """Expected modalities and the widths of their features."""
    source: Source = "features"
    """Content of the data folder: features, or the arrays of grjca prepare."""
    speed: bool = True
    """Measure the speed of each backend."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", modalities_of("modalities", self.modalities))

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality's features."""
        assert isinstance(self.modalities, dict)
        return self.modalities


@dataclass(frozen=True)
class StudyConfig:
    """Study on synthetic data whether gates help when face and voice do not complement each other."""

    out: Path
    """Folder for data, runs and results. An interrupted study continues there."""
    preset: Literal["small", "full"] = "small"
    """small takes less than ten minutes on 2 cores; full has a block of the authors' sizes and takes more than an
    hour."""
    jobs: int = 2
    """Number of trainings at the same time, each with one thread."""

    def __post_init__(self) -> None:
        _require(self, "jobs", self.jobs >= 1, "a whole number above 0")


@dataclass(frozen=True)
class DemoConfig:
    """Generate data, train, evaluate, predict and plot, all in a few minutes."""

    out: Path | None = None
    """Folder for all output; a new temporary folder if left out."""
    seed: int = 0
    """Seed of the data and the training."""


def _require(config: Any, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"--{name}: expected {expected}, got {getattr(config, name)}.")
