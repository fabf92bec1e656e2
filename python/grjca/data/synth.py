"""``grjca synth``: write synthetic data as a data folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np
from tqdm import tqdm

from grjca import files
from grjca.config import SynthConfig, SynthLayout
from grjca.data import synthetic
from grjca.data.synthetic import Face, SyntheticVideo
from grjca.errors import UserError

FILES: dict[SynthLayout, tuple[str, str, str]] = {
    "plain": ("features", "visual.npy", "audio.npy"),
    "npy_data": ("npy_data", "video.npy", "vggish.npy"),
}
"""Folder of the videos and names of their feature files, by layout; footage has none."""


def synth(config: SynthConfig, *, progress: bool = True) -> int:
    """Run the command: call :func:`write`, then print what was written."""
    write(config, progress=progress)
    if progress:
        print(f"{config.videos} videos in {config.out}; truth/ says where a modality is weak.")
    return 0


def write(config: SynthConfig, *, progress: bool = False) -> None:
    """Write the folder ``config.out`` completely or not at all.

    It holds annotations, features or footage in the chosen layout, ``truth/<video>.npy`` ([N, 2] uint8, the
    :data:`grjca.data.synthetic.CODES` of visual and audio), and the parameters in ``synthetic.json``. Equal parameters
    give equal bytes, for footage only on the same machine; labels and truth are the same in every layout.

    Raises:
        UserError: if ``out`` is not empty or cannot be written, or PyAV lacks an encoder for footage.
    """
    if config.layout not in get_args(SynthLayout):
        raise UserError(f"There is no layout {config.layout!r}: expected one of {', '.join(get_args(SynthLayout))}.")
    recordings = synthetic.recordings(config)
    if config.layout == "footage":
        from grjca.data import synthetic_footage  # features do not need PyAV

        def write_videos(folder: Path) -> Iterable[Face | SyntheticVideo]:
            return synthetic_footage.write(folder, recordings, config.videos, config.fps)
    else:

        def write_videos(folder: Path) -> Iterable[Face | SyntheticVideo]:
            return _write_features(folder, config.layout, synthetic.videos(recordings, config))

    out = Path(config.out)
    files.check_new_folder(out)
    try:
        with files.whole_folder(out) as folder:
            _fill(folder, config, write_videos(folder), progress)
    except OSError as error:
        raise UserError(f"{config.out} cannot be written: {error}.") from error


def _fill(root: Path, config: SynthConfig, written: Iterable[Face | SyntheticVideo], progress: bool) -> None:
    for part in ("annotations/train", "annotations/validate", "truth"):
        (root / part).mkdir(parents=True)
    disable = None if progress else True  # None shows the bar only on a terminal
    for video in tqdm(written, "writing videos", config.videos, leave=False, disable=disable):
        _write_labels(root, video)
    settings = {name: value for name, value in asdict(config).items() if name not in _unused(config.layout)}
    text = json.dumps(settings | {"codes": synthetic.CODES}, indent=2)
    (root / "synthetic.json").write_bytes(text.encode() + b"\n")


def _unused(layout: SynthLayout) -> tuple[str, ...]:
    """Return the settings that do not affect the data."""
    return ("out", "visual_features", "audio_features") if layout == "footage" else ("out", "fps")


def _write_features(root: Path, layout: SynthLayout, videos: Iterable[SyntheticVideo]) -> Iterator[SyntheticVideo]:
    """Yield every video once its features are written."""
    base, visual, audio = FILES[layout]
    for video in videos:
        folder = root / base / video.name
        folder.mkdir(parents=True)
        np.save(folder / visual, video.visual)
        np.save(folder / audio, video.audio)
        if layout == "npy_data":
            np.save(folder / "VA_continuous_label.npy", video.labels)
        yield video


def _write_labels(root: Path, video: Face | SyntheticVideo) -> None:
    np.save(root / "truth" / f"{video.name}.npy", video.truth)
    rows = "".join(f"{valence:.6f},{arousal:.6f}\n" for valence, arousal in video.labels.tolist())
    # Written as bytes, because text mode would change the line ends on Windows.
    (root / "annotations" / video.split / f"{video.name}.txt").write_bytes(f"valence,arousal\n{rows}".encode())
