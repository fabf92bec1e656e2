"""``grjca synth``: write synthetic data as a data folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from grjca import files, synthetic
from grjca.config import SynthConfig
from grjca.errors import UserError
from grjca.synthetic import SyntheticVideo

Layout = Literal["plain", "npy_data"]
FILES: dict[Layout, tuple[str, str, str]] = {
    "plain": ("features", "visual.npy", "audio.npy"),
    "npy_data": ("npy_data", "video.npy", "vggish.npy"),
}
"""Folder of the videos, and what their features are called."""


def synth(config: SynthConfig, *, progress: bool = True) -> int:
    """The command: :func:`write`, and say what is there."""
    write(config, progress=progress)
    if progress:
        print(f"{config.videos} videos in {config.out}; truth/ says where a modality is weak.")
    return 0


def write(config: SynthConfig, *, progress: bool = False) -> None:
    """Write the folder ``config.out`` as a whole or not at all.

    It holds annotations and features in the chosen layout, ``truth/<video>.npy`` ([N, 2] uint8 for visual and audio, of
    :data:`grjca.synthetic.CODES`), and the parameters in ``synthetic.json``. Equal parameters give equal bytes.

    Raises:
        UserError: ``out`` holds something or cannot be written.
    """
    if config.layout not in FILES:
        raise UserError(f"There is no layout {config.layout!r}: expected one of {', '.join(FILES)}.")
    videos = synthetic.generate(config)
    out = Path(config.out)
    files.check_new_folder(out)
    disable = None if progress else True  # None: unless the output is no terminal
    try:
        with files.whole_folder(out) as folder:
            _fill(folder, config, tqdm(videos, "writing videos", config.videos, leave=False, disable=disable))
    except OSError as error:
        raise UserError(f"{config.out} cannot be written: {error}.") from error


def _fill(root: Path, config: SynthConfig, videos: Iterable[SyntheticVideo]) -> None:
    for part in ("annotations/train", "annotations/validate", FILES[config.layout][0], "truth"):
        (root / part).mkdir(parents=True)
    for video in videos:
        _write_video(root, video, config.layout)
    settings = {name: value for name, value in asdict(config).items() if name != "out"} | {"codes": synthetic.CODES}
    (root / "synthetic.json").write_bytes(json.dumps(settings, indent=2).encode() + b"\n")


def _write_video(root: Path, video: SyntheticVideo, layout: Layout) -> None:
    base, visual, audio = FILES[layout]
    folder = root / base / video.name
    folder.mkdir()
    np.save(folder / visual, video.visual)
    np.save(folder / audio, video.audio)
    if layout == "npy_data":
        np.save(folder / "VA_continuous_label.npy", video.labels)
    np.save(root / "truth" / f"{video.name}.npy", video.truth)
    rows = "".join(f"{valence:.6f},{arousal:.6f}\n" for valence, arousal in video.labels.tolist())
    # As bytes: text mode would write other line ends on Windows.
    (root / "annotations" / video.split / f"{video.name}.txt").write_bytes(f"valence,arousal\n{rows}".encode())
