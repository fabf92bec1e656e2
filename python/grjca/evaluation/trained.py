"""Trained models of runs, and what they say of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from accelerate import Accelerator

from grjca import environment, files
from grjca.config import TARGETS, Backend, Target, TrainConfig
from grjca.data.videos import Video, load
from grjca.errors import UserError
from grjca.training import inference, runs

Values = Mapping[Target, Mapping[str, np.ndarray]]
"""target -> video -> [N]"""


class Trained(NamedTuple):
    """The model of a run."""

    folder: Path
    settings: TrainConfig
    model: runs.Model
    backend: Backend
    """Asked for; "auto" still is "auto"."""

    @classmethod
    def load(cls, folder: Path, backend: Backend | None = None) -> Trained:
        """With the best weights, and with the backend of the training if None; UserError if ``folder`` is no run."""
        settings, model = runs.load_best(folder, backend=backend)
        settings = replace(settings, precision=inference.available(settings.precision))
        return cls(folder, settings, model, backend or settings.backend)

    @property
    def widths(self) -> dict[str, int]:
        """Of the features it reads, by modality."""
        return self.settings.model.widths

    def videos(self, root: Path, split: str, *, progress: bool = False) -> list[Video]:
        """Videos of a data folder, with what the model reads; a split is by the fold of the training."""
        of = self.settings
        return load(root, split, fold=of.fold, widths=self.widths, kind=of.source, progress=progress)

    def backend_used(self, device: str) -> str | None:
        """What computes the fusion, None if there is nothing to compute; UserError if it cannot."""
        return None if self.settings.fusion == "concat" else environment.backend_used(self.backend, device)


def infer(
    on: Accelerator, trained: Trained, videos: Sequence[Video], batch_size: int, *, gates: bool = False
) -> list[inference.Prediction]:
    """What a model says of each video, by the windows and in the precision of its training.

    Raises:
        UserError: if a value is not finite, or the backend cannot run here.
    """
    settings = trained.settings
    trained.backend_used(on.device.type)
    windows = inference.Windows(videos, settings.window, settings.hop, batch_size, on)
    model = on.prepare_model(trained.model, evaluation_mode=True)
    predictions = windows.predict(model, gates=gates, progress=f"predicting {settings.target}")
    for video, prediction in zip(videos, predictions, strict=True):
        finite = np.isfinite(prediction.values)
        if not finite.all():
            raise UserError(
                f"{trained.folder}: expected finite predictions, got {prediction.values[np.argmin(finite)]} for "
                f"{video.name}, frame {np.argmin(finite) + 1}; train anew, or try --backend reference."
            )
    return predictions


def write_predictions(folder: Path, values: Values) -> None:
    """``<folder>/<video>.txt`` for each video: a column per target that is there, under its name; a row per frame."""
    targets = [target for target in TARGETS if target in values]
    folder.mkdir(parents=True, exist_ok=True)
    for name in values[targets[0]]:
        columns = np.column_stack([values[target][name] for target in targets])

        def fill(file: IO[bytes], columns: np.ndarray = columns) -> None:
            np.savetxt(file, columns, "%.8f", ",", header=",".join(targets), comments="")

        files.write(folder / f"{name}.txt", fill)
