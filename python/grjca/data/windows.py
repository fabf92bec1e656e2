"""Windows of videos: cutting videos into windows, loading them, and averaging predictions where they overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from grjca.config import TARGETS, Target
from grjca.data.videos import Video
from grjca.errors import UserError

Span = tuple[int, int, int]  # index of a video, start, stop


def windows(length: int, size: int = 300, hop: int = 200) -> list[tuple[int, int]]:
    """Return (start, stop) of the windows that cover ``length`` frames.

    Windows start at 0, hop, 2 hop, ...; if they do not cover the tail, the last ``size`` frames are one more window. A
    video of fewer than ``size`` frames is one window; a video without frames has none.

    Raises:
        UserError: if the length is negative, if size or hop is below 1, or if hop exceeds size, which would leave gaps.
    """
    if length < 0:
        raise UserError(f"A video cannot have {length} frames; expected 0 or more.")
    if size < 1 or not 1 <= hop <= size:
        raise UserError(
            f"Windows of {size} frames, one every {hop}: expected 1 <= hop <= window, so that none is lost."
        )
    if length <= size:
        return [(0, length)] if length else []
    starts = list(range(0, length - size + 1, hop))
    if starts[-1] + size < length:
        starts.append(length - size)
    return [(start, start + size) for start in starts]


class WindowDataset(Dataset[dict[str, Tensor]]):
    """All windows of some videos. Features are read from disk when a window is asked for.

    An item holds:
        each modality under its name: [size, d_m] float32, or arrays in their own dtype; 0 after the end of the video.
        label: [size] float32, 0 where ``mask`` is false.
        mask: [size] bool, true where the frame exists and both its labels are valid.
        length: int64, the number of frames of the window that exist.
        index: int64, the position of the window in ``spans``.
    """

    def __init__(self, videos: Sequence[Video], target: Target, size: int = 300, hop: int = 200) -> None:
        self.videos, self.target, self.size = list(videos), target, size
        self.column = TARGETS.index(target)
        self.spans: list[Span] = [
            (i, start, stop) for i, video in enumerate(self.videos) for start, stop in windows(video.length, size, hop)
        ]

    @property
    def item_bytes(self) -> int:
        """Memory that a window takes, in bytes."""
        forms = self.videos[0].forms.values() if self.videos else ()
        return self.size * (sum(form.row_bytes for form in forms) + 4 + 1)  # float32 label and bool mask

    def features(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the modalities of a batch, in the order of the model."""
        return [batch[name] for name in self.videos[0].forms]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Return window ``i``; UserError if a file can no longer be read."""
        index, start, stop = self.spans[i]
        video = self.videos[index]
        valid = video.valid[start:stop]
        label = np.zeros(stop - start, np.float32)
        if video.labels is not None:
            label[valid] = video.labels[start:stop, self.column][valid]
        arrays = {**video.read(start, stop), "label": label, "mask": valid}
        item = {name: _padded(array, self.size) for name, array in arrays.items()}
        return item | {"length": torch.tensor(stop - start), "index": torch.tensor(i)}


def stitch(spans: Sequence[Span], lengths: Sequence[int], values: Iterable[Any]) -> list[np.ndarray]:
    """Average the values of overlapping windows: for each video, [N, ...] float64.

    Args:
        spans: the spans of a :class:`WindowDataset`.
        lengths: N of every video.
        values: an array or tensor [size, ...] for each span; rows beyond the span are padding.

    Raises:
        ValueError: if the numbers of windows and spans differ, a window is too short, or no window covers a frame.
    """
    windows = [torch.as_tensor(value).detach().cpu().double().numpy() for value in values]
    if len(windows) != len(spans):
        raise ValueError(f"There are values of {len(windows)} windows for {len(spans)} spans; expected one each.")
    trailing = windows[0].shape[1:] if windows else ()
    totals = [np.zeros((length, *trailing)) for length in lengths]
    counts = [np.zeros((length, *(1 for _ in trailing))) for length in lengths]
    for (video, start, stop), value in zip(spans, windows, strict=True):
        if not 0 <= start < stop <= lengths[video] or len(value) < stop - start:
            raise ValueError(f"A window of {len(value)} rows for frames {start} to {stop} of {lengths[video]}.")
        totals[video][start:stop] += value[: stop - start]
        counts[video][start:stop] += 1
    for video, count in enumerate(counts):
        if not count.all():
            raise ValueError(f"No window covers frame {int(count.argmin())} of video {video}; every frame needs one.")
    return [total / count for total, count in zip(totals, counts, strict=True)]


def _padded(array: np.ndarray, size: int) -> Tensor:
    """Pad ``array`` with zeros at the end to [size, ...]."""
    padded = np.zeros((size, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    return torch.from_numpy(padded)
