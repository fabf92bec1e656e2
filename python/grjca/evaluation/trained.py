"""Trained models of runs, and their predictions for videos."""

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
    """The backend asked for, which may be "auto"."""

    @classmethod
    def load(cls, folder: Path, backend: Backend | None = None) -> Trained:
        """Load a run with its best weights; ``backend`` None is that of the training. UserError if it is not a run."""
        settings, model = runs.load_best(folder, backend=backend)
        settings = replace(settings, precision=inference.available(settings.precision))
        return cls(folder, settings, model, backend or settings.backend)

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the features that the model reads, by modality."""
        return self.settings.model.widths

    def videos(self, root: Path, split: str, *, progress: bool = False) -> list[Video]:
        """Load the videos of a split, in the fold of the training, with the files that the model reads."""
        of = self.settings
        return load(root, split, fold=of.fold, widths=self.widths, kind=of.source, progress=progress)

    def backend_used(self, device: str) -> str | None:
        """Return the backend that computes the fusion, None for concat; UserError if it cannot run."""
        return None if self.settings.fusion == "concat" else environment.backend_used(self.backend, device)


def infer(
    on: Accelerator, trained: Trained, videos: Sequence[Video], batch_size: int, *, gates: bool = False
) -> list[inference.Prediction]:
    """Predict each video, with the windows and in the precision of the training.

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
                f"{video.name}, frame {np.argmin(finite) + 1}; train again, or try --backend reference."
            )
    return predictions


def write_predictions(folder: Path, values: Values) -> None:
    """Write ``<folder>/<video>.txt`` for each video: a column per predicted target, a row per frame, and a header."""
    targets = [target for target in TARGETS if target in values]
    folder.mkdir(parents=True, exist_ok=True)
    for name in values[targets[0]]:
        columns = np.column_stack([values[target][name] for target in targets])

        def fill(file: IO[bytes], columns: np.ndarray = columns) -> None:
            np.savetxt(file, columns, "%.8f", ",", header=",".join(targets), comments="")

        files.write(folder / f"{name}.txt", fill)
