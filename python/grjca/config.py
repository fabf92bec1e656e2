"""Every setting, once: the command line, config.yaml and the code read the same dataclasses."""

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
"""The largest number that a setting of a training may be; float32 holds it."""
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
"""What the fused block calls them."""
STUDIED: tuple[Fusion, ...] = ("concat", "rjca", "dca", "grjca", "hgrjca", "tagf")
"""Those that grjca study compares; of two modalities, rjcma is rjca but for the projection."""
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
    """Width of a row of the visual features, which layout footage does not have."""
    audio_features: int = 128
    """Width of a row of the audio features, which layout footage does not have."""
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
    layout: SynthLayout = "plain"
    """plain: features/<video>/{visual,audio}.npy; npy_data: npy_data/<video>/{video,vggish,VA_continuous_label}.npy;
    footage: videos/<video>.mp4, a drawn face and a tone like a voice, and cropped_aligned/<video>/00001.jpg."""
    fps: float = 25.0
    """Frames a second of the footage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, "fps", 1 <= self.fps <= 240, "1 to 240 frames a second")


@dataclass(frozen=True)
class ModelConfig:
    """The model around the fusion block, with the sizes of the authors' experiment as defaults."""

    modalities: dict[str, int] | str = field(default_factory=lambda: dict(WIDTHS))
    """Two to four modalities in order, each with the width of its features, as in "visual:512, audio:128, text:768".
    The features of a video are in files with these names."""
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Channels of the blocks of a modality's encoder; block k has dilation 2^k, and the last is d_m. A modality that is
    left out has the authors': 512, 512, 256, 256 for visual, and four times 128 for audio and all others."""
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

    def __post_init__(self) -> None:
        # Frozen, but what was written as text is read once, here.
        object.__setattr__(self, "modalities", modalities_of("model.modalities", self.modalities))
        unknown = self.channels.keys() - self.widths.keys()
        if unknown:
            raise UserError(f"--model.channels: expected names of --model.modalities; got {sorted(unknown)[0]!r}.")

    @property
    def widths(self) -> dict[str, int]:
        """Of each modality's features."""
        assert isinstance(self.modalities, dict)
        return self.modalities

    @property
    def encoders(self) -> dict[str, tuple[int, ...]]:
        """Channels of each modality's encoder."""
        return {name: self.channels.get(name, CHANNELS.get(name, PLAIN_CHANNELS)) for name in self.widths}


@dataclass(frozen=True)
class NetworksConfig:
    """The face and voice networks in the loop of a training."""

    size: NetworkSize = "released"
    """The authors' sizes, or a small pair for trials, about a hundred times cheaper."""
    visual: Path | None = None
    """File with the weights of the face network, or of a whole model of the authors; random weights if left out."""
    audio: Path | None = None
    """The same of the voice network."""
    statistics: Literal["batch", "frozen"] = "batch"
    """batch: train mode throughout, with statistics of the batch and dropout, as the authors do. frozen: evaluation
    mode throughout."""
    release: bool = True
    """Train parts of them from epoch 0 on, and more whenever the learning rate has fallen to 1e-8 and more than five
    epochs have gone by since the last time, in three stages, as the authors do; a fourth time ends the training."""
    augment: bool = True
    """Crop and flip the faces of each window at random."""
    chunk: int = 0
    """Faces and patches that pass through a network at once and are computed anew in the backward, to save memory; 0
    is all of a batch, and keeps everything."""

    def __post_init__(self) -> None:
        _require(self, "chunk", self.chunk >= 0, "0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """One training; the defaults are the authors' experiment."""

    data: Path
    """Folder with annotations/ and features/ or npy_data/."""
    target: Target
    """What to predict: one model for valence, another for arousal."""
    out: Path
    """Folder of the run. It must not exist, unless the run is resumed."""
    source: Source = "features"
    """What the model reads: features, or the arrays of grjca prepare, with the face and voice networks in the loop."""
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
    early_stop_from: Literal["best", "warmup"] = "best"
    """Count those epochs from the best one alone, or, as the authors do, not before the end of the warm-up."""
    restart: bool = False
    """Begin anew from the best weights, with a new optimiser and a warm-up, when the learning rate has fallen to 1e-8
    and more than five epochs have gone by since the beginning, as the authors do; otherwise the rate stays there.
    Releasing networks implies it."""
    shuffle: Literal["epoch", "once"] = "epoch"
    """Shuffle the windows in every epoch, or, as the authors do, once."""
    precision: Precision = "no"
    """Mixed precision; no is full float32."""
    workers: int = 0
    """Processes that read windows ahead, per training process."""
    tensorboard: bool = True
    """Write curves for TensorBoard as well."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the model."""
    networks: NetworksConfig = field(default_factory=NetworksConfig)
    """The face and voice networks, where the model reads arrays."""

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
    """Make arrays of faces and sound from videos, cropped faces and annotations; what was interrupted goes on."""

    videos: Path
    """Folder with <video>.mp4 or another kind of video, or <video>.wav, or both; then the .wav is the sound."""
    out: Path
    """Folder for annotations/ and npy_data/<video>/{video,logmel,VA_continuous_label}.npy."""
    faces: Path | None = None
    """Folder with cropped faces, <video>/00001.jpg and so on; a missing one is a black frame."""
    annotations: Path | None = None
    """Folder with {train,validate}/<video>.txt, or by the names as downloaded; videos without one are for testing."""
    fps: float | None = None
    """Frames per second; what each video file says if left out. Sound alone does not say."""
    jobs: int = 2
    """Videos at the same time, each in a process of its own."""
    detect: bool = False
    """Find faces in the videos that have no cropped ones, with OpenCV."""

    def __post_init__(self) -> None:
        _require(self, "fps", self.fps is None or 1 <= self.fps <= 1000, "1 to 1000")
        _require(self, "jobs", 1 <= self.jobs <= 1024, "1 to 1024")


@dataclass(frozen=True)
class ExtractConfig:
    """Turn the arrays of prepare into features, by the face and voice networks in evaluation mode."""

    data: Path
    """Folder that grjca prepare has written."""
    out: Path
    """Folder for annotations and features. An extraction that was interrupted goes on there."""
    visual: Path | None = None
    """File with the weights of the face network, or of a whole model of the authors; random weights if left out, which
    are for trials alone."""
    audio: Path | None = None
    """The same of the voice network."""
    size: NetworkSize = "released"
    """The networks: those of the authors, or a small pair for trials, about a hundred times cheaper."""
    batch_size: int = 64
    """Frames that pass through a network at once."""
    device: str | None = None
    """Where to compute, as cpu or cuda:1; a GPU if there is one and this is left out."""
    seed: int = 0
    """Of random weights."""

    def __post_init__(self) -> None:
        _require(self, "batch_size", 1 <= self.batch_size <= MOST, f"a whole number from 1 to {MOST}")
        _require(self, "seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1")


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
    data: Path | None = None
    """Folder with features or arrays, and annotations if there are any; or give --video."""
    out: Path | None = None
    """Folder for the files. It must not exist, or be empty; RUN/predicted/NAME if left out, by the name of the data or
    video."""
    video: Path | None = None
    """A video file: a table and a plot of its values over time. Its sound is that of a .wav of its name, if one is
    beside it."""
    faces: Path | None = None
    """Folder with cropped faces of that video, 00001.jpg and so on; if left out, OpenCV looks for them."""
    draw: bool = False
    """Write a copy of that video with the curves below it as well."""
    visual: Path | None = None
    """File with the weights of the face network, for a run that was trained on its features."""
    audio: Path | None = None
    """The same of the voice network."""
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
        if (self.data is None) == (self.video is None):
            raise UserError(f"--data, --video: expected one of the two, got {'none' if self.data is None else 'both'}.")
        for name in ("faces", "visual", "audio", "template"):
            wanted = "data" if name == "template" else "video"
            if getattr(self, name) is not None and getattr(self, wanted) is None:
                raise UserError(f"--{name}: expected it with --{wanted} alone.")

    @property
    def folder(self) -> Path:
        """Where the files go."""
        of = (self.video or self.data or Path()).absolute()
        return self.out or self.run / "predicted" / (of.stem if self.video else of.name)


@dataclass(frozen=True)
class DoctorConfig:
    """Tell what runs here and how fast, and what is wrong with a data folder; exit with 1 if something is."""

    data: Path | None = None
    """Folder to inspect."""
    modalities: dict[str, int] | str = field(default_factory=lambda: dict(WIDTHS))
    """Expected modalities and widths of their features."""
    source: Source = "features"
    """What the folder holds: features, or the arrays of grjca prepare."""
    speed: bool = True
    """Measure each backend."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", modalities_of("modalities", self.modalities))

    @property
    def widths(self) -> dict[str, int]:
        """Of each modality's features."""
        assert isinstance(self.modalities, dict)
        return self.modalities


@dataclass(frozen=True)
class StudyConfig:
    """Study whether gates help when face and voice don't complement each other, on synthetic data."""

    out: Path
    """Folder for data, runs and results. A study that was interrupted goes on there."""
    preset: Literal["small", "full"] = "small"
    """small ends within ten minutes on 2 cores; full has a block of the authors' sizes, and takes an hour and more."""
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
