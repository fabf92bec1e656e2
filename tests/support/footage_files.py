"""Tiny footage: videos and sound by PyAV, crops and a drawn face by Pillow, and annotations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

RATE = 16_000
WIDTH, HEIGHT = 64, 48


def grey(number: int) -> int:
    """The level of the crop, or of the picture of a video, with this number, from 1."""
    return 20 + 37 * number % 200


def plain(number: int) -> np.ndarray:
    """A grey picture."""
    return np.full((HEIGHT, WIDTH, 3), grey(number), np.uint8)


def noise(seconds: float, begins: float = 0.0, seed: int = 0) -> np.ndarray:
    """[samples] int16: silence, and from ``begins`` on something loud."""
    count = round(seconds * RATE)
    loud = np.random.default_rng(seed).uniform(-12_000, 12_000, count)
    loud[: round(begins * RATE)] = 0
    return loud.astype(np.int16)


def write_video(
    path: Path,
    frames: int = 20,
    *,
    fps: float = 25,
    sound: np.ndarray | None = None,
    delay: float = 0.0,
    times: Sequence[int] | None = None,
    picture: Callable[[int], np.ndarray] = plain,
    rotation: int = 0,
    index_first: bool = False,
) -> Path:
    """A video whose n-th picture, from 1, is ``picture(n)``.

    Args:
        sound: [samples] int16 at 16 kHz; it begins after ``delay`` seconds.
        times: when each picture is shown, in thousandths of a second.
        rotation: degrees, counterclockwise, by which players shall turn the pictures.
        index_first: as files for the web are; what is cut off is then at the end of the pictures and the sound.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options={"movflags": "+faststart"} if index_first else {}) as container:
        video = container.add_stream("mpeg4", rate=rate, options={"threads": "1", "qscale": "2"}) if frames else None
        audio = None if sound is None else container.add_stream("pcm_s16le" if path.suffix != ".mp4" else "aac", RATE)
        if audio is not None:
            audio.layout = "mono"
        if video is not None:
            video.height, video.width = picture(1).shape[:2]
            video.pix_fmt = "yuv420p"
            if rotation:
                video.set_display_rotation(rotation)
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(n + 1), format="rgb24")
            frame.pts, frame.time_base = (n, 1 / rate) if times is None else (times[n], Fraction(1, 1000))
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode())
        if audio is not None:
            for start in range(0, len(sound), 1024):
                piece = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="s16", layout="mono")
                piece.rate, piece.pts = RATE, start + round(delay * RATE)
                piece.time_base = Fraction(1, RATE)
                for ready in av.AudioResampler(audio.format, "mono", RATE).resample(piece):
                    container.mux(audio.encode(ready))
            container.mux(audio.encode())
    return path


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """``samples`` [N] or [N, channels] of int16."""
    import wave

    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def write_crops(folder: Path, count: int, missing: Collection[int] = ()) -> Path:
    """Grey crops of 112 x 112, as the organisers' are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in set(range(1, count + 1)) - set(missing):
        Image.fromarray(np.full((112, 112, 3), grey(number), np.uint8)).save(folder / f"{number:05d}.jpg", quality=95)
    return folder


def write_annotation(path: Path, rows: int, invalid: Collection[int] = ()) -> Path:
    """``rows`` rows, of which ``invalid``, from 0, are -5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["-5,-5" if n in invalid else f"{n / 1000:.3f},{-n / 1000:.3f}" for n in range(rows)]
    path.write_text("\n".join(["valence,arousal", *lines]) + "\n")
    return path


def face(*places: tuple[int, int], size: int = 80, width: int = 320, height: int = 120) -> np.ndarray:
    """[height, width, 3] uint8: drawn faces around these pixels, which a detector takes for faces."""
    fine = 4  # drawn so many times as large, and reduced: edges are smooth
    image = Image.new("RGB", (width * fine, height * fine), (70, 90, 110))
    draw = ImageDraw.Draw(image)
    for x, y in places:

        def shape(kind: str, box: tuple[int, int, int, int], colour: tuple[int, int, int], x: int = x, y: int = y):
            scale = size / 100
            corners = [(place + offset * scale) * fine for offset, place in zip(box, (x, y, x, y), strict=True)]
            getattr(draw, kind)(corners, fill=colour)

        skin = (215, 175, 145)
        shape("ellipse", (-40, -52, 40, 52), skin)
        shape("ellipse", (-42, -60, 42, -26), (50, 35, 25))  # hair
        shape("ellipse", (-36, -42, 36, -14), skin)
        for eye in (-18, 18):
            shape("ellipse", (eye - 13, -16, eye + 13, 0), (120, 85, 70))
            shape("ellipse", (eye - 9, -12, eye + 9, -2), (245, 245, 245))
            shape("ellipse", (eye - 4, -12, eye + 4, -2), (30, 20, 20))
            shape("rectangle", (eye - 12, -22, eye + 12, -18), (60, 40, 30))
        shape("ellipse", (-5, -10, 5, 16), (235, 200, 170))
        shape("ellipse", (-9, 12, 9, 20), (165, 120, 100))
        shape("ellipse", (-18, 26, 18, 36), (140, 50, 50))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
