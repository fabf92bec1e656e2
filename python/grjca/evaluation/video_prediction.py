"""``grjca predict --video``: predict valence and arousal of a video file over time.

<video>.csv         time in seconds and a column for each target, with a row for each frame
<video>.png         the values of the table as curves
<video>.mp4         with --draw true: the video, with the curves below it
predictions/        as for a data folder

As in ``grjca prepare``, a ``<video>.wav`` beside the video replaces its sound.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw

from grjca import backbones, files
from grjca.config import TARGETS, ExtractConfig, PredictConfig, Target
from grjca.data import audio, footage, layout, media, sources
from grjca.errors import UserError
from grjca.evaluation import plots
from grjca.evaluation.trained import Trained, infer, write_predictions
from grjca.modalities import WIDTHS
from grjca.model import extract
from grjca.training import runs

STRIP = 0.35
"""Height of the curves below a video, as a share of the video's height."""
ENCODER = {"preset": "veryfast", "crf": "20"}
TICKS = 90_000
"""Ticks per second in a drawn video: its frames are shown at whole ticks."""


@dataclass(frozen=True)
class Prediction:
    """Predictions for a video of N frames."""

    seconds: np.ndarray
    """[N], time from the first frame"""
    values: Mapping[Target, np.ndarray]
    """[N] each, between -1 and 1"""
    notes: Sequence[str]
    """Sentences on what was repaired"""


def predict_video(config: PredictConfig, on: Accelerator, trained: Sequence[Trained]) -> int:
    """Write the table, the plot and, if asked for, the drawn video; return the exit code.

    Raises:
        UserError: if the video cannot be read or has no face, or the weights of a network are missing.
    """
    assert config.video is not None
    name = layout.composed(config.video.stem)
    layout.check_name(name, config.video)
    for of in trained:
        if of.widths.keys() != WIDTHS.keys():
            raise UserError(f"--video: expected runs of {' and '.join(WIDTHS)}, but {of.folder} reads {of.widths}.")
    if on.num_processes > 1:
        raise UserError("--video: expected one process, got several; a single video is not shared out.")
    source = footage.Source(config.video, sources.sound_beside(config.video), config.faces)
    with files.whole_folder(config.folder) as folder:
        found = _predicted(config, on, trained, name, source)
        values = found.values
        write_predictions(folder / runs.PREDICTIONS, {target: {name: of} for target, of in values.items()})
        columns = np.column_stack([found.seconds, *values.values()])
        header = ",".join(["seconds", *values])
        files.write(
            folder / f"{name}.csv",
            lambda file: np.savetxt(file, columns, "%.4f", ",", header=header, comments=""),
        )
        warnings = [runs.random_networks(of.settings, of.settings.data) for of in trained]
        title = f"{name}, {' and '.join(of.settings.fusion for of in trained)}" + "".join(
            f" ({warning})" for warning in dict.fromkeys(filter(None, warnings))
        )
        plots.save(plots.curves(title, found.seconds, values), folder / f"{name}.png")
        if config.draw:
            video, heard = media.read(config.video), media.read(source.sound or config.video)
            files.write(folder / f"{name}.mp4", lambda file: _draw(file, video, heard, found))
    print(f"{config.folder}: {name}.csv and plot of {len(found.seconds)} frames.", *found.notes, sep="\n")
    return 0


def _predicted(
    config: PredictConfig, on: Accelerator, trained: Sequence[Trained], name: str, source: footage.Source
) -> Prediction:
    assert source.video is not None
    with tempfile.TemporaryDirectory(prefix="grjca-", ignore_cleanup_errors=True) as scratch:
        arrays = Path(scratch) / "arrays"
        about = footage.write_folder(source, arrays / "npy_data" / name, None, None)
        values: dict[Target, np.ndarray] = {}
        for of in trained:
            root = arrays if of.settings.source == "arrays" else _extracted(config, of, arrays, Path(scratch))
            (prediction,) = infer(on, of, of.videos(root, "all"), config.batch_size)
            values[of.settings.target] = prediction.values
    ordered = {target: values[target] for target in TARGETS if target in values}
    times = media.read(source.video).times
    seconds = np.arange(about["frames"]) / about["fps"] if np.isnan(times).any() else times - times[0]
    sound = [f"The sound is that of {source.sound}."] if source.sound else []
    return Prediction(seconds, ordered, [*sound, *about["notes"]])


def _extracted(config: PredictConfig, of: Trained, arrays: Path, scratch: Path) -> Path:
    """Extract features of the arrays, with the networks that made the features of the training."""
    out = scratch / f"features-{of.settings.target}"
    noted = extract.about(of.settings.data) if of.settings.data.is_dir() else None
    settings: dict[str, Any] = {}
    for name in ("visual", "audio"):
        made_by, given = (noted or {}).get(name, {}), getattr(config, name)
        weights = made_by.get("weights")
        if noted and weights is None:
            raise UserError(
                f"--video: expected features of the face and voice networks, but {of.folder} was trained on those of "
                f"{made_by.get('network')}; extract features of the video by the same, and give them by --data."
            )
        if given is None and weights != backbones.RANDOM:
            raise UserError(
                f"--{name}: expected the file of the network's weights, because {of.folder} was trained on its "
                f"features{f' ({weights})' if weights else ''}; got none."
            )
        settings[name] = given
        settings["size"] = made_by.get("size", "released")
        settings["seed"] = made_by.get("seed", settings.get("seed", 0))
    extract.extract(ExtractConfig(data=arrays, out=out, **settings), progress=False)
    now = extract.about(out) or {}
    for name in ("visual", "audio"):
        before = (noted or {}).get(name, {})
        if "sha256" in before and before["sha256"] != now[name].get("sha256"):
            raise UserError(
                f"--{name}: expected the weights that made the features of the training, {before['weights']}, got "
                "others."
            )
    return out


def _draw(file: IO[bytes], video: media.Media, heard: media.Media, found: Prediction) -> None:
    """Write the video as mp4 with its own frame times and the curves below it; the sound is mono at 16 kHz."""
    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(video.fps or 25).limit_denominator(1001)
        out = container.add_stream("libx264", rate, options=ENCODER)
        out.codec_context.time_base = Fraction(1, TICKS)
        sound = container.add_stream("aac", audio.RATE, layout="mono") if heard.has_sound else None
        pictures = _drawn(video, found.values)
        first = next(pictures)
        out.width, out.height, out.pix_fmt = first.width, first.height, "yuv420p"
        for picture, moment in zip(chain([first], pictures), _moments(found.seconds), strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = moment, out.codec_context.time_base
            container.mux(out.encode(frame))
        container.mux(out.encode())
        if sound is not None:
            begin = 0
            for samples in media.sound(heard, float(found.seconds[-1]) + float(1 / rate)):
                if not len(samples):
                    continue
                block = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
                block.sample_rate, block.pts = audio.RATE, begin
                begin += len(samples)
                container.mux(sound.encode(block))
            container.mux(sound.encode())


def _moments(seconds: np.ndarray) -> list[int]:
    """Return the times of the frames in ticks, all different, as an encoder requires."""
    order = np.arange(len(seconds))
    moments: list[int] = (np.maximum.accumulate(np.rint(seconds * TICKS).astype(np.int64) - order) + order).tolist()
    return moments


def _drawn(video: media.Media, values: Mapping[Target, np.ndarray]) -> Iterator[Image.Image]:
    """Yield pictures of one size; a damaged frame is replaced by the one before it, or black."""
    first = next((frame for frame in media.frames(video) if frame is not None), np.zeros((64, 64, 3), np.uint8))
    height, width = (size - size % 2 for size in first.shape[:2])  # the encoder needs even sizes
    count = len(next(iter(values.values())))
    strip = _strip(values, width, max(40, round(STRIP * height / 2) * 2))
    shown = Image.new("RGB", (width, height))
    for n, frame in zip(range(count), media.frames(video), strict=False):
        if frame is not None:
            shown = Image.fromarray(frame).resize((width, height))
        picture = Image.new("RGB", (width, height + strip.height))
        picture.paste(shown, (0, 0))
        picture.paste(strip, (0, height))
        at = round((n + 0.5) * width / count)
        ImageDraw.Draw(picture).line((at, height, at, height + strip.height), "black")
        yield picture


def _strip(values: Mapping[Target, np.ndarray], width: int, height: int) -> Image.Image:
    """Draw the curves, from -1 at the bottom to 1 at the top."""
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    draw.line((0, height / 2, width, height / 2), "#999999")
    for i, (target, of) in enumerate(values.items()):
        x = (np.arange(len(of)) + 0.5) * width / len(of)
        y = (1 - of) / 2 * (height - 1)
        draw.line([*zip(x.tolist(), y.tolist(), strict=True)], plots.COLOURS[target], 2)
        draw.text((3, 2 + 11 * i), target, plots.COLOURS[target])
    return strip
