"""Pictures of faces: the organisers' crops, or those that a detector finds in frames."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from grjca import files
from grjca.errors import UserError

SIZE = 48
"""Pixels of a face's edge."""
Side = Literal["left", "right"] | None
"""Which of two faces, as a video's name says; None: the only one, or the largest."""

_NAME = re.compile(r"([0-9]{5}|[1-9][0-9]{5,6})\.jpg", re.ASCII)
_MOST_BYTES, _MOST_PIXELS = 1 << 24, 1 << 24  # of a crop
_CASCADE = "haarcascade_frontalface_alt2.xml"
_SEARCHED = 640  # pixels of the longer edge of what the detector sees: its time grows with the area
_SMALLEST = 0.06  # share of the shorter edge
_HELD = 10  # frames for which a face that is no longer found is expected where it was


def numbers(folder: Path) -> set[int]:
    """The frames, from 1, that a folder of crops has pictures of, ``00001.jpg`` and so on.

    Raises:
        UserError: there is none, or the folder cannot be read.
    """
    try:
        found = {int(path.stem) for path in folder.iterdir() if _NAME.fullmatch(path.name)} - {0}
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    if not found:
        raise UserError(f"{folder}: expected pictures of faces with the names 00001.jpg and so on, got none.")
    return found


def crop(folder: Path, number: int) -> np.ndarray:
    """[48, 48, 3] uint8: the picture of this number, resized.

    A file that was cut off is refused. Damage in its middle is refused only where libjpeg cannot go on: otherwise it
    makes a picture of what it understands and warns, which Pillow does not pass on.

    Raises:
        UserError: it is no JPEG file, damaged, or implausibly large.
    """
    path = folder / f"{number:05d}.jpg"
    try:
        with Image.open(io.BytesIO(files.read_bytes(path, _MOST_BYTES)), formats=["JPEG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            return resized(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # what Pillow raises for a damaged file is not documented
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{path}: expected a JPEG picture of a face, got something else ({_without_addresses(reason)}). Replace "
            "it, or delete it, and the frame counts as one without a picture."
        ) from error


def resized(image: Image.Image) -> np.ndarray:
    """[48, 48, 3] uint8."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


class Detector:
    """Finds one face in the frames of a video, by the Haar cascade that OpenCV's wheel brings.

    Raises:
        UserError: OpenCV is not installed, or is one without cascades.
    """

    def __init__(self, side: Side = None) -> None:
        self.side = side
        self._cascade, self._cv2 = _cascade()
        self._last: tuple[float, float, float] | None = None
        self._lost = 0

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        """[48, 48, 3] uint8, the face in ``image`` [height, width, 3] uint8, or None.

        A face that is lost is expected where it was for ten frames more.
        """
        found = self._find(image)
        self._lost = 0 if found else self._lost + 1
        self._last = found or (self._last if self._lost <= _HELD else None)
        if self._last is None:
            return None
        x, y, half = self._last
        box = (round(x - half), round(y - half), round(x + half), round(y + half))
        return resized(Image.fromarray(image).crop(box))  # black beyond the frame

    def _find(self, image: np.ndarray) -> tuple[float, float, float] | None:
        """Centre and half the edge of the face, in pixels."""
        height, width = image.shape[:2]
        scale = min(1.0, _SEARCHED / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        grey = self._cv2.cvtColor(image, self._cv2.COLOR_RGB2GRAY)
        grey = self._cv2.resize(grey, size, interpolation=self._cv2.INTER_AREA)
        least = max(20, round(_SMALLEST * min(size)))
        boxes = [
            ((x + w / 2) / scale, (y + h / 2) / scale, max(w, h) / 2 / scale)
            for x, y, w, h in self._cascade.detectMultiScale(grey, 1.1, 4, minSize=(least, least))
        ]
        if self.side:
            boxes = [box for box in boxes if (box[0] < width / 2) == (self.side == "left")]
        return max(boxes, key=lambda box: box[2], default=None)


def check_detector() -> None:
    """Raise UserError if faces cannot be looked for here."""
    _cascade()


def crops(folder: Path, count: int, there: set[int]) -> Iterator[np.ndarray | None]:
    """[48, 48, 3] uint8 of frames 1 to ``count``, or None where :func:`numbers` has found no picture."""
    for number in range(1, count + 1):
        yield crop(folder, number) if number in there else None


def _cascade() -> tuple[Any, Any]:
    """The classifier, and the module cv2."""
    try:
        import cv2
        import cv2.data

        cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / _CASCADE))
        if cascade.empty():
            raise AttributeError(_CASCADE)
    except (ImportError, AttributeError) as error:  # from 5.0 on, OpenCV has neither
        raise UserError(
            "Finding faces in a video needs OpenCV 4 with its cascades, which is not installed; "
            "pip install 'grjca-kernels[faces]' brings it. Or give cropped faces."
        ) from error
    cv2.setNumThreads(1)  # frames are small, and there are other processes
    return cascade, cv2


def _without_addresses(reason: object) -> str:
    """Pillow names the object in memory that it could not read."""
    return re.sub(r" <[^>]*>", "", str(reason))
