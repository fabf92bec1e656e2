"""Pictures of faces: the organisers' crops, or faces detected in frames."""

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
"""Side of a face, in pixels."""
Side = Literal["left", "right"] | None
"""Which of two faces, according to the video's name; None is the only one, or the largest."""

_NAME = re.compile(r"([0-9]{5}|[1-9][0-9]{5,6})\.jpg", re.ASCII)
_MOST_BYTES, _MOST_PIXELS = 1 << 24, 1 << 24  # limits of a crop
_CASCADE = "haarcascade_frontalface_alt2.xml"
_SEARCHED = 640  # longer edge of the detector's input, in pixels: its time grows with the area
_SMALLEST = 0.06  # smallest face, as a share of the shorter edge
_HELD = 10  # frames for which a lost face is assumed to stay where it was


def numbers(folder: Path) -> set[int]:
    """Return the numbers, from 1, of the frames with a picture (``00001.jpg`` and so on) in a folder of crops.

    Raises:
        UserError: if there is no picture, or the folder cannot be read.
    """
    try:
        found = {int(path.stem) for path in folder.iterdir() if _NAME.fullmatch(path.name)} - {0}
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}.") from error
    if not found:
        raise UserError(f"{folder}: expected pictures of faces with the names 00001.jpg and so on, got none.")
    return found


def crop(folder: Path, number: int) -> np.ndarray:
    """Read the picture of this number, resized to [48, 48, 3] uint8.

    A truncated file is refused. Damage in its middle is refused only where libjpeg cannot continue: otherwise libjpeg
    decodes what it can and warns, and Pillow does not pass the warning on.

    Raises:
        UserError: if the file is not a JPEG file, is damaged, or is implausibly large.
    """
    path = folder / f"{number:05d}.jpg"
    try:
        with Image.open(io.BytesIO(files.read_bytes(path, _MOST_BYTES)), formats=["JPEG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            return resized(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow does not document what it raises for damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{path}: expected a JPEG picture of a face, got something else ({_without_addresses(reason)}). Replace "
            "it, or delete it, and the frame counts as one without a picture."
        ) from error


def resized(image: Image.Image) -> np.ndarray:
    """Resize an image to [48, 48, 3] uint8."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


class Detector:
    """Finds one face in the frames of a video, with the Haar cascade in OpenCV's wheel.

    Raises:
        UserError: if OpenCV is not installed, or has no cascades.
    """

    def __init__(self, side: Side = None) -> None:
        self.side = side
        self._cascade, self._cv2 = _cascade()
        self._last: tuple[float, float, float] | None = None
        self._lost = 0

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        """Return the face in ``image`` [height, width, 3] uint8 as [48, 48, 3] uint8, or None.

        A lost face is assumed to stay where it was for ten more frames.
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
        """Find the centre and half the side of the face, in pixels."""
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
    """Raise UserError if face detection is not available here."""
    _cascade()


def crops(folder: Path, count: int, there: set[int]) -> Iterator[np.ndarray | None]:
    """Yield the pictures, [48, 48, 3] uint8, of frames 1 to ``count``, or None where :func:`numbers` found none."""
    for number in range(1, count + 1):
        yield crop(folder, number) if number in there else None


def _cascade() -> tuple[Any, Any]:
    """Return the classifier and the module cv2."""
    try:
        import cv2
        import cv2.data

        cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / _CASCADE))
        if cascade.empty():
            raise AttributeError(_CASCADE)
    except (ImportError, AttributeError) as error:  # OpenCV 5.0 and later have neither
        raise UserError(
            "Finding faces in a video needs OpenCV 4 with its cascades, which is not installed; "
            "pip install 'grjca-kernels[faces]' brings it. Or give cropped faces."
        ) from error
    cv2.setNumThreads(1)  # frames are small, and videos are prepared in parallel
    return cascade, cv2


def _without_addresses(reason: object) -> str:
    """Remove the address of the object that Pillow could not read."""
    return re.sub(r" <[^>]*>", "", str(reason))
