"""A value for every frame of every video, once, by windows whose overlaps are averaged; in any number of processes."""

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
    """Of one video of N frames."""

    values: np.ndarray
    """[N] float64, between -1 and 1"""
    gates: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    """Per modality [N, ways] float64, one for every gate of the fusion; empty unless asked for"""


def accelerator(precision: Precision, batch_size: int) -> Accelerator:
    """Accelerate, set up so that ``batch_size`` is that of all processes together.

    Raises:
        UserError: if it cannot be shared out evenly, or ``precision`` cannot be had or differs from the launcher's.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # of accelerate launch
    if asked not in ("no", precision):
        raise UserError(
            f"precision: accelerate launch asks for {asked}, the settings for {precision}; make them agree."
        )
    if precision != available(precision):
        raise UserError(f"precision: expected a GPU for {precision}, got none; use bf16 or no.")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # of an earlier call in this process
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=False)
    # Without cpu=True, the processes that torchrun starts on a machine without GPU don't find one another.
    result = Accelerator(cpu=not _has_gpu(), mixed_precision=precision, dataloader_config=loading)
    if batch_size % result.num_processes:
        raise UserError(f"--batch_size: expected a multiple of the {result.num_processes} processes, got {batch_size}.")
    return result


def available(precision: Precision) -> Precision:
    """``precision``, or "no" where there is nothing to compute it: accelerate would take float32 without a word."""
    return "no" if precision == "fp16" and not _has_gpu() else precision


def _has_gpu() -> bool:
    return getattr(torch, "accelerator", torch.cuda).is_available()


def loader(dataset: WindowDataset, batch_size: int, workers: int, sampler: Sampler[int] | None = None) -> DataLoader:
    """Batches of windows, read by ``workers`` other processes if there are any; UserError if one exceeds the memory."""
    count = min(batch_size, len(dataset))
    environment.check_memory(count * dataset.item_bytes, f"a batch of {count} windows of {dataset.size} frames")
    how: dict[str, Any] = {"multiprocessing_context": Context(), "persistent_workers": True} if workers else {}
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, **how)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the errors of a loader's other processes, which come with a traceback in their text, into one sentence."""
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
    """The windows of ``videos``, ready to be predicted again and again.

    Args:
        size, hop: of a window, in frames.
        batch_size: windows at once, all processes together.
        workers: processes that read ahead.
    """

    def __init__(
        self, videos: Sequence[Video], size: int, hop: int, batch_size: int, on: Accelerator, *, workers: int = 0
    ) -> None:
        self.videos = videos
        self.dataset = WindowDataset(videos, "valence", size, hop)  # of either target: the labels are not used
        self.accelerator = on
        self.loader = on.prepare_data_loader(loader(self.dataset, batch_size, workers))

    @torch.no_grad()
    def predict(self, model: torch.nn.Module, *, gates: bool = False, progress: str | None = None) -> list[Prediction]:
        """One Prediction for each video, the same on every process.

        Args:
            model: switched to eval mode.
            gates: also what the fusion's gates chose.
            progress: title of a progress bar; none if None.
        """
        model.eval()
        collected: list[dict[str, Any]] = []
        hide = True if progress is None or not self.accelerator.is_main_process else None  # None: unless a terminal
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
