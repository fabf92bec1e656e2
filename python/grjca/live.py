"""Prediction on a live stream: frames are pushed as they arrive, and the newest value is returned."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grjca.backbones import crop
from grjca.data.reading import ARRAYS
from grjca.model.audiovisual import AudioVisualModel
from grjca.model.whole import WholeModel


class Live:
    """Predicts the newest value of a stream from its last window of frames.

    Args:
        model: as :func:`grjca.training.runs.load_best` returns it; it is put into evaluation mode. The networks of a
            whole model read every frame once, and the model after them reads the whole window for every value.
        every: h, the number of frames from one value to the next. A value takes as long as the prediction of one
            window, whatever h is.

    Raises:
        ValueError: if ``every`` is not a whole number above 0.

    The value of a frame is the model's value for the last frame of the window of L frames that ends with it. At the
    start of the stream, the window is shorter.
    """

    def __init__(self, model: AudioVisualModel | WholeModel, *, every: int = 1) -> None:
        if not isinstance(every, int | np.integer) or every < 1:
            raise ValueError(f"every: expected a whole number of frames above 0, got {every}.")
        self.whole = model.eval() if isinstance(model, WholeModel) else None
        self.model: AudioVisualModel = (self.whole.model if self.whole else model).eval()  # type: ignore[assignment]
        self.every = int(every)
        self.reset()

    def reset(self) -> None:
        """Forget all frames, to start another stream."""
        self.frames: deque[tuple[Tensor, ...]] = deque(maxlen=self.model.length)
        self.seen = 0

    @torch.inference_mode()
    def push(self, *frame: Any) -> float | None:
        """Add a frame; return its value from -1 to 1 if it is the h-th, 2h-th, ..., else None.

        Args:
            frame: the features [d_m] of each modality, in the order of the model; or for a whole model the face uint8
                [48, 48, 3] and the log-mel patch [96, 64]. Tensors or arrays.

        Raises:
            ValueError, TypeError: if the frame has another form or is not finite; it is then not added.
        """
        self.frames.append(self._features(frame))
        self.seen += 1
        if self.seen % self.every:
            return None
        count, length = len(self.frames), self.model.length
        features = [torch.stack(of) for of in zip(*self.frames, strict=True)]
        window = [torch.cat([x, x.new_zeros(length - count, x.shape[1])])[None] for x in features]
        values = self.model(*window, lengths=torch.tensor([count], device=window[0].device))
        return float(values[0, count - 1])

    def _features(self, frame: tuple[Any, ...]) -> tuple[Tensor, ...]:
        like = next(self.model.parameters())
        tensors = [self._tensor(x).to(like.device) for x in frame]
        expected = [[width] for width in self.model.widths.values()]
        if self.whole is not None:
            expected = [list(form.row) for form in ARRAYS.values()]
        if [list(x.shape) for x in tensors] != expected:
            got = [list(x.shape) for x in tensors]
            raise ValueError(f"frame: expected {', '.join(self.model.widths)} of shapes {expected}, got {got}.")
        if self.whole is not None and tensors[0].dtype != torch.uint8:
            raise TypeError(f"frame: expected a face in torch.uint8, got {tensors[0].dtype}.")
        for name, x in zip(self.model.widths, tensors, strict=True):
            if not x.to(like.dtype).isfinite().all():
                raise ValueError(f"frame: expected finite numbers, got others for {name}; leave the frame out.")
        if self.whole is not None:
            inputs = {"visual": crop(tensors[0]), "audio": tensors[1]}
            tensors = [self.whole.backbones[name](x[None].to(like.dtype))[0] for name, x in inputs.items()]
        return tuple(x.to(like.dtype) for x in tensors)

    def _tensor(self, x: Any) -> Tensor:
        try:
            return torch.as_tensor(x)
        except (RuntimeError, TypeError, ValueError) as error:  # which one depends on the type of x
            expected = f"tensors or arrays of numbers for {', '.join(self.model.widths)}"
            raise TypeError(f"frame: expected {expected}, got {type(x).__name__}.") from error
