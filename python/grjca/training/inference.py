"""Prediction of every frame of every video, averaging overlapping windows, in any number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from grjca import environment
from grjca.config import Precision
from grjca.data.videos import Video
from grjca.data.windows import WindowDataset, stitch
from grjca.errors import UserError
from grjca.training.processes import Context


@dataclass(frozen=True)
class Prediction:
    """Prediction for one video of N frames."""

    values: np.ndarray
    """[N] float64, between -1 and 1"""
    gates: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    """For each modality, [N, ways] float64 for every gate of the fusion; empty unless asked for"""


def accelerator(precision: Precision, batch_size: int) -> Accelerator:
    """Set up Accelerate so that ``batch_size`` is that of all processes together.

    Raises:
        UserError: if the batch cannot be divided evenly, or ``precision`` is not available or differs from the
            launcher's.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # set by accelerate launch
    if asked not in ("no", precision):
        raise UserError(
            f"precision: accelerate launch asks for {asked}, the settings for {precision}; make them agree."
        )
    if precision != available(precision):
        raise UserError(f"precision: expected a GPU for {precision}, got none; use bf16 or no.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # left by an earlier call in this process
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=False)
    # Without cpu=True, processes that torchrun starts on a machine without a GPU do not find one another.
    result = Accelerator(cpu=not _has_gpu(), mixed_precision=precision, dataloader_config=loading)
    if batch_size % result.num_processes:
        raise UserError(f"--batch_size: expected a multiple of the {result.num_processes} processes, got {batch_size}.")
    return result


def available(precision: Precision) -> Precision:
    """Return ``precision``, or "no" if this machine cannot compute it: accelerate would silently use float32."""
    return "no" if precision == "fp16" and not _has_gpu() else precision


def _has_gpu() -> bool:
    return getattr(torch, "accelerator", torch.cuda).is_available()


def loader(dataset: WindowDataset, batch_size: int, workers: int, sampler: Sampler[int] | None = None) -> DataLoader:
    """Make a loader of batches with ``workers`` reading processes; UserError if a batch exceeds the memory."""
    count = min(batch_size, len(dataset))
    environment.check_memory(count * dataset.item_bytes, f"a batch of {count} windows of {dataset.size} frames")
    how: dict[str, Any] = {"multiprocessing_context": Context(), "persistent_workers": True} if workers else {}
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, **how)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn errors of a loader's worker processes, whose text includes a traceback, into one sentence."""
    try:
        yield
    except (UserError, RuntimeError) as error:
        text = str(error).strip()
        if "DataLoader worker" not in text:
            raise
        if isinstance(error, UserError):
            raise UserError(text.rpartition("UserError: ")[2]) from error
        raise UserError(
            f"--workers: expected processes that read windows, but one failed ({text.splitlines()[-1]}). They hand "
            "them over in shared memory (in a container, docker run --shm-size); --workers 0 needs none."
        ) from error


class Windows:
    """The windows of ``videos``, for any number of predictions.

    Args:
        size, hop: length of a window and distance to the next, in frames.
        batch_size: windows per batch, over all processes together.
        workers: number of processes that load windows.
    """

    def __init__(
        self, videos: Sequence[Video], size: int, hop: int, batch_size: int, on: Accelerator, *, workers: int = 0
    ) -> None:
        self.videos = videos
        self.dataset = WindowDataset(videos, "valence", size, hop)  # the target does not matter: labels are not used
        self.accelerator = on
        self.loader = on.prepare_data_loader(loader(self.dataset, batch_size, workers))

    @torch.no_grad()
    def predict(self, model: torch.nn.Module, *, gates: bool = False, progress: str | None = None) -> list[Prediction]:
        """Return a Prediction for each video, the same on every process.

        Args:
            model: the model, which is switched to eval mode.
            gates: also return the values of the fusion's gates.
            progress: title of a progress bar; none if None.
        """
        model.eval()
        collected: list[dict[str, Any]] = []
        hide = (
            True if progress is None or not self.accelerator.is_main_process else None
        )  # None shows the bar only on a terminal
        for batch in tqdm(self.loader, progress, leave=False, disable=hide, dynamic_ncols=True):
            out: dict[str, Any] = {"index": batch["index"]}
            features = self.dataset.features(batch)
            if gates:
                values, ways = model(*features, lengths=batch["length"], return_gates=True)
                out |= {f"{m}.{i}": gate for m, of in ways.items() for i, gate in enumerate(_as_tuple(of))}
            else:
                values = model(*features, lengths=batch["length"])
            out = self.accelerator.gather_for_metrics({**out, "values": values})
            collected.append({name: tensor.cpu().double() for name, tensor in out.items()})
        return self._stitch(collected)

    def _stitch(self, collected: list[dict[str, Any]]) -> list[Prediction]:
        lengths = [video.length for video in self.videos]
        together = {name: torch.cat([out[name] for out in collected]) for name in collected[0]}
        order = together.pop("index").long().argsort()
        frames = {name: stitch(self.dataset.spans, lengths, of[order].numpy()) for name, of in together.items()}
        names = [name for name in frames if name != "values"]
        return [
            Prediction(
                frames["values"][v],
                {m: tuple(frames[n][v] for n in names if n.startswith(f"{m}.")) for m in _modalities(names)},
            )
            for v in range(len(self.videos))
        ]


def _modalities(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _as_tuple(gates: Any) -> tuple[Any, ...]:
    if gates is None:
        return ()
    return tuple(gates) if isinstance(gates, (tuple, list)) else (gates,)
