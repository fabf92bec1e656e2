"""Synthetic footage: drawn faces and a voice-like tone that show the emotions of the recordings in synthetic.py.

The corners of the mouth follow valence; eyes, brows and the opening of the mouth follow arousal. So do pitch and
loudness, while valence changes the timbre. An absent face is neither drawn nor cropped; an absent voice is silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw

from grjca.data.synthetic import CODES, EMOTION_PACE, Face, Recording, wander
from grjca.errors import UserError

SIDE, CROP = 96, 64  # sides of a picture with one face and of a crop, in pixels
FINE = 4  # pictures are drawn this many times larger, then reduced, for smooth edges
QUALITY = 90  # JPEG quality of the crops
ENCODER = {
    "preset": "ultrafast",
    "crf": "18",
    "threads": "1",
}  # one thread: the bytes must not depend on the number of cores
RATE = 16_000  # samples per second
SYLLABLES = 4.0  # per second
HARMONICS = np.arange(1, 13)
TIMBRES = np.stack([HARMONICS**-1.6, HARMONICS**-0.6], axis=1)  # dull and bright: amplitudes of the harmonics
TIMBRES *= np.sqrt(2 / (TIMBRES**2).sum(axis=0))  # so that the root mean square of a tone is 1
ACROSS = np.linspace(-1, 1, 13)  # positions from the left corner of the mouth to the right one
SKIN, BACKGROUND, EYE, DARK, LIPS = np.array(  # red, green, blue; the first two drift
    [[205, 160, 130], [90, 110, 130], [240, 240, 240], [40, 30, 25], [120, 20, 30]]
)

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the picture."""


def write(root: Path, recordings: Iterable[Recording], videos: int, fps: float) -> Iterator[Face]:
    """Write ``videos/<recording>.mp4`` and ``cropped_aligned/<face>/00001.jpg``, and yield every face once written.

    Args:
        videos: number of faces to crop; if the last one is the first of two, the mp4 still shows both.
        fps: frames per second.

    Raises:
        UserError: if PyAV lacks an encoder.
        OSError: if something cannot be written.
    """
    missing = {"libx264", "aac"} - av.codecs_available
    if missing:
        raise UserError(f"PyAV has no encoder {' and no '.join(sorted(missing))} here; pip install av brings both.")
    (root / "videos").mkdir()
    for recording in recordings:
        faces = recording.faces[:videos]
        folders = [root / "cropped_aligned" / face.name for face in faces]
        for folder in folders:
            folder.mkdir(parents=True)
        with open(root / "videos" / f"{recording.name}.mp4", "xb") as file:
            _write_recording(file, recording, folders, Fraction(fps).limit_denominator(1001))
        yield from faces
        videos -= len(faces)
        if not videos:
            return


def _write_recording(file: IO[bytes], recording: Recording, folders: list[Path], fps: Fraction) -> None:
    looks = [_looks(recording, face) for face in recording.faces]
    sound = _sound(recording, fps)
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("libx264", fps, options=ENCODER)
        video.width, video.height, video.pix_fmt = SIDE * len(looks), SIDE, "yuv420p"
        audio = container.add_stream("aac", RATE, layout="mono", options={"threads": "1"})
        samples = 0
        for n, (shown, heard) in enumerate(zip(zip(*looks, strict=True), sound, strict=True), 1):
            picture, boxes = _picture(shown)
            for folder, box in zip(folders, boxes, strict=False):
                if box:
                    crop = picture.resize((CROP, CROP), Image.Resampling.BILINEAR, box)
                    crop.save(folder / f"{n:05d}.jpg", quality=QUALITY)
            container.mux(video.encode(av.VideoFrame.from_image(picture)))
            block = av.AudioFrame.from_ndarray(heard[None], format="fltp", layout="mono")
            block.sample_rate, block.pts = RATE, samples
            container.mux(audio.encode(block))
            samples += len(heard)
        for stream in (video, audio):
            container.mux(stream.encode())


# ---- what is seen


class Look(NamedTuple):
    """A face in one picture."""

    present: bool
    valence: float
    arousal: float
    """Valence and arousal as the face shows them, in [-1, 1]"""
    x: float
    y: float
    size: float
    light: float
    skin: float
    background: float
    """Other variations of the picture, also in [-1, 1]; 0 is the average"""


def _looks(recording: Recording, face: Face) -> Iterator[Look]:
    """Yield the look of a face in each of the N pictures."""
    present = recording.truth[:, 0] != CODES["absent"]
    shown = recording.seen(face)[: len(present)]
    others = wander(len(present), len(Look._fields) - 3, EMOTION_PACE, recording.look)
    values = np.tanh(np.concatenate([shown, others], axis=1))
    return (Look(bool(there), *row.tolist()) for there, row in zip(present, values, strict=True))


def _picture(looks: tuple[Look, ...]) -> tuple[Image.Image, list[Box | None]]:
    """Draw the faces side by side in RGB, and return the box of each face that is present."""
    canvas = Image.new("RGB", (SIDE * FINE * len(looks), SIDE * FINE))
    draw = ImageDraw.Draw(canvas)
    boxes = []
    for place, look in enumerate(looks):
        edge = SIDE * place
        background = _lit(BACKGROUND + 40 * look.background, look)
        draw.rectangle((edge * FINE, 0, (edge + SIDE) * FINE - 1, SIDE * FINE - 1), background)
        size = SIDE * 0.36 * (1 + 0.08 * look.size)
        x, y = edge + SIDE * (0.5 + 0.04 * look.x), SIDE * (0.5 + 0.04 * look.y)
        if look.present:
            _draw_face(draw, look, FINE * np.array([x, y]), FINE * size)
        boxes.append((x - size, y - size, x + size, y + size) if look.present else None)
    return canvas.reduce(FINE), boxes


def _draw_face(draw: ImageDraw.ImageDraw, look: Look, centre: np.ndarray, size: float) -> None:
    """Draw a face. Lengths are in units of ``size``, half the height of the head."""

    def ellipse(x: float, y: float, width: float, height: float, colour: Colour) -> None:
        middle, half = centre + size * np.array([x, y]), size * np.array([width, height]) / 2
        draw.ellipse((*(middle - half).tolist(), *(middle + half).tolist()), colour)

    def ribbon(x: np.ndarray, y: np.ndarray, half: np.ndarray | float, colour: Colour) -> None:
        outline = [*zip(x, y - half, strict=True), *zip(x[::-1], (y + half)[::-1], strict=True)]
        draw.polygon([*map(tuple, (centre + size * np.array(outline)).tolist())], colour)

    awake, bow = (1 + look.arousal) / 2, 1 - ACROSS**2
    skin, opening = SKIN + 30 * look.skin, 0.08 + 0.22 * awake
    ellipse(0, 0, 1.6, 2, _lit(skin, look))
    for side in (-0.34, 0.34):
        ellipse(side, -0.24, 0.5, 0.4, _lit(0.6 * skin, look))
        ellipse(side, -0.2, 0.36, opening, _lit(EYE, look))
        ellipse(side, -0.2, min(0.15, opening), min(0.15, opening), _lit(DARK, look))
        ribbon(side + 0.22 * ACROSS, -0.36 - 0.2 * awake - 0.06 * bow, 0.045, _lit(DARK, look))
    ellipse(0, 0.16, 0.2, 0.12, _lit(0.75 * skin, look))
    smile, gape = 0.52 + 0.24 * look.valence * (bow - 0.5), 0.04 + 0.12 * awake * bow
    ribbon(0.4 * ACROSS, smile, gape, _lit(LIPS, look))


def _lit(colour: np.ndarray, look: Look) -> Colour:
    red, green, blue = np.clip(colour * (1 + 0.15 * look.light), 0, 255).astype(int).tolist()
    return red, green, blue


# ---- what is heard


def _sound(recording: Recording, fps: Fraction) -> Iterator[np.ndarray]:
    """Yield the samples of each frame, float32 in [-1, 1]."""
    absent = recording.truth[:, 1] == CODES["absent"]
    voice, phase = _voice(recording), 0.0
    for n, silent in enumerate(absent):
        start, stop = (int(RATE * moment / fps) for moment in (n, n + 1))
        moments = np.arange(start, stop) / RATE
        ramp = np.linspace(0, 1, stop - start, endpoint=False)[:, None]
        pitch, loudness, bright, noise = (voice[n] + (voice[n + 1] - voice[n]) * ramp).T
        phases = phase + 2 * np.pi / RATE * np.cumsum(pitch)
        phase = float(phases[-1])
        dull_tone, bright_tone = (np.sin(phases[:, None] * HARMONICS) @ TIMBRES).T
        syllables = 1 + 0.3 * np.sin(2 * np.pi * SYLLABLES * moments)
        tone = loudness * syllables * (dull_tone + bright * (bright_tone - dull_tone))
        samples = tone + noise * recording.sound.standard_normal(len(tone))
        yield (0 if silent else 1) * np.clip(samples, -1, 1).astype(np.float32)


def _voice(recording: Recording) -> np.ndarray:
    """Compute pitch (Hz), loudness, share of the bright timbre, and noise, [N + 1, 4], at the start of each frame and
    the end of the last. Loudness and noise are root mean squares, at most 1."""
    frames = len(recording.truth) + 1
    valence, arousal = np.tanh(recording.heard()[:frames]).T
    pitch, gain, noise = np.tanh(wander(frames, 3, EMOTION_PACE, recording.sound)).T
    columns = [
        150 * 2 ** (0.8 * arousal + 0.15 * pitch),
        0.08 * 2 ** (1.2 * arousal + 0.3 * gain),
        (1 + valence) / 2,
        0.005 * 2**noise,
    ]
    return np.stack(columns, axis=1)
