"""``grjca train``: run the authors' experiment and keep the weights with the best validation CCC."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, set_seed
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import RandomSampler
from tqdm import tqdm

from grjca import backbones, environment, files
from grjca.config import TrainConfig
from grjca.data.videos import Video, load
from grjca.data.windows import WindowDataset
from grjca.errors import UserError
from grjca.evaluation.trained import write_predictions
from grjca.model.whole import WholeModel
from grjca.training import inference, runs
from grjca.training.losses import ccc_loss
from grjca.training.metrics import split_scores

T = TypeVar("T")
LOWEST_RATE = 1e-8 * (1 + 1e-6)
"""Learning rate at which a training restarts, with a margin for rounding."""
RESTART_AFTER = 5
"""A training restarts only when more than this number of epochs have passed since its last start."""
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # the rest follows from the settings


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    epochs: int
    best_epoch: int
    """Number of the best epoch, from 1."""
    best_ccc: float
    """CCC of the validation videos in that epoch."""
    stopped_early: bool


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> Result:
    """Train one model; all output goes to the folder ``config.out``, see :mod:`grjca.training.runs`.

    This seeds the random generators of the process and makes cuDNN deterministic.

    Every epoch draws its random numbers from (seed, epoch) and is committed as a whole. A run that is killed and
    resumed on the same machine, with the same numbers of threads and processes, therefore ends with bitwise equal
    weights.

    Raises:
        UserError: if data, settings or folder are invalid, or the training diverges.
    """
    visual, audio = (path and path.absolute() for path in (config.networks.visual, config.networks.audio))
    networks = replace(config.networks, visual=visual, audio=audio)
    # so that config.yaml is valid from any folder
    config = replace(config, data=config.data.absolute(), out=config.out.absolute(), networks=networks)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    on = inference.accelerator(config.precision, config.batch_size)
    if config.fusion != "concat":
        environment.backend_used(config.backend, on.device.type)  # refused here if it cannot run
    _on_main(on, lambda: runs.check(config, resume))
    splits = [
        load(
            config.data,
            split,
            fold=config.fold,
            widths=config.model.widths,
            kind=config.source,
            progress=progress and on.is_main_process,
        )
        for split in ("train", "validate")
    ]
    for split, videos in zip(("train", "validate"), splits, strict=True):
        if not any(video.valid.any() for video in videos):
            raise UserError(
                f"{config.data}: expected valid labels in the {split} split, got none in {len(videos)} videos."
            )
    _say(on, progress, _mended(splits[0] + splits[1]))
    if random := runs.random_networks(config, config.data):
        _say(on, progress, f"The {random} say little of faces and voices: this is a trial.")
    if on.num_processes > 1:
        _say(on, progress, f"{on.num_processes} processes, {config.batch_size // on.num_processes} windows each.")
    set_seed(config.seed)
    model = runs.new_model(config)
    if not (resume and (config.out / runs.CHECKPOINT / runs.STATE).exists()):  # the checkpoint has all weights
        runs.load_networks(config, model)
    training = _Training(config, on, model, *splits, progress=progress)
    lock = files.lock(config.out)
    try:
        _on_main(on, lambda: runs.claim(config, resume, lock))
        training.resume()
        with inference.worker_errors():
            while not training.finished:
                training.epoch()
            training.finish()
    except KeyboardInterrupt:
        _say(on, True, f"Interrupted. Nothing is lost: grjca train --out {config.out} --resume goes on.")
        raise
    finally:
        lock.release()
    state = training.state
    _say(
        on,
        progress,
        f"Best CCC {state.best_ccc:.4f}, epoch {state.best_epoch + 1} of {state.epoch}. "
        f"grjca evaluate --run {config.out} has more.",
    )
    return Result(state.epoch, state.best_epoch + 1, state.best_ccc, state.epoch < config.epochs)


class _Training:
    def __init__(
        self,
        config: TrainConfig,
        on: Accelerator,
        model: runs.Model,
        training: list[Video],
        validation: list[Video],
        *,
        progress: bool,
    ) -> None:
        self.config, self.on, self.progress = config, on, progress
        self.dataset = dataset = WindowDataset(training, config.target, config.window, config.hop)
        self.order = torch.Generator()
        sampler = RandomSampler(dataset, generator=self.order)
        loader = inference.loader(dataset, config.batch_size, config.workers, sampler)
        self.loader = on.prepare(loader)
        self.inner = model
        self.validation = inference.Windows(
            validation, config.window, config.hop, config.batch_size, on, workers=config.workers
        )
        self.state = runs.State(environment=_environment(on, config, (training, validation)))
        self.releases = config.source == "arrays" and config.networks.release
        self.stages = len(backbones.STAGES[config.networks.size])
        if self.releases:
            self.state.stage = 1
        self.best: dict[str, Tensor] = {}
        self.curves: Any = None

    def resume(self) -> None:
        """Continue from the last committed epoch, if there is one, and write config.yaml."""
        shapes = {name: tensor.shape for name, tensor in self.inner.state_dict().items()}
        restored = _on_main(self.on, lambda: runs.restore(self.config.out, shapes))
        if restored:
            state, tensors = restored
            if state.environment["data"] != self.state.environment["data"]:
                raise UserError(f"--data: {self.config.data} is not what {self.config.out} was begun with.")
            _say(self.on, self.progress, _differences(state.environment, self.state.environment))
            self.state = state
            self.inner.load_state_dict(tensors["model"])
            self._begin()
            self.best = {name: tensor.to(self.on.device) for name, tensor in tensors["best"].items()}
            try:
                self._restore_schedule(state, _nested(tensors["optimizer"]))
            except Exception as error:  # PyTorch may raise anything for a state it has not written
                where = self.config.out / runs.CHECKPOINT / runs.STATE
                raise UserError(f"{where}: the checkpoint is damaged ({error}); choose another --out.") from error
        else:
            self._begin()
        _on_main(self.on, lambda: runs.write_config(self.config))  # last: a refused resumption must change nothing
        if self.config.tensorboard and self.on.is_main_process:
            self.curves = runs.curves(self.config.out, self.state.history)

    def _begin(self) -> None:
        """Make a new optimiser and plateau scheduler for the parameters that are trained in this stage."""
        config, model = self.config, self.inner
        if isinstance(model, WholeModel):
            model.release(min(self.state.stage, self.stages))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, config.learning_rate, weight_decay=config.weight_decay)
        self.plateau = ReduceLROnPlateau(
            optimizer, "max", config.plateau_factor, patience=config.plateau_epochs - 1, threshold=0
        )
        self.plateau.best = max(self.plateau.best, self.state.best_ccc)
        self.model, self.optimizer = self.on.prepare(model, optimizer)
        self.inner = self.on.unwrap_model(self.model, keep_fp32_wrapper=True)

    def _restore_schedule(self, state: runs.State, moments: dict[int, dict[str, Tensor]]) -> None:
        """Load optimiser, plateau and scaler; any exception if they do not belong to this training."""
        ours = self.optimizer.state_dict()["param_groups"]
        for group, before in zip(state.optimizer, ours, strict=True):
            same = {name: value for name, value in before.items() if name not in ("lr", "betas")}
            rate = group["lr"]
            if {name: group[name] for name in same} != same or not 0 <= rate <= self.config.learning_rate:
                raise ValueError("its optimiser is another one")
            group["betas"] = before["betas"]
        if state.plateau.keys() != (set(PLATEAU_STATE) if self.config.plateau else set()):
            raise ValueError("its plateau is another one")
        self.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer})
        for parameter, of in self.optimizer.state.items():
            shapes = {of["exp_avg"].shape, of["exp_avg_sq"].shape}
            if shapes != {parameter.shape} or of["step"].dtype != torch.float32 or not float(of["step"]) >= 1:
                raise ValueError("its moments are of another shape")
        self.plateau.load_state_dict(state.plateau)
        if self.on.scaler is not None and state.scaler:
            self.on.scaler.load_state_dict(state.scaler)

    @property
    def finished(self) -> bool:
        """Return whether the last epoch is done, early stopping applies, or a fourth release was due."""
        state, config = self.state, self.config
        begun = state.started - 1  # the last epoch that does not count
        if config.early_stop_from == "warmup" and config.warmup != "none":
            begun += config.warmup_epochs
        waited = state.epoch - 1 - max(state.best_epoch, begun)
        stop = config.early_stop and state.epoch > 0 and waited >= config.early_stop_epochs
        released_all = self.releases and state.stage > self.stages
        return stop or released_all or state.epoch >= config.epochs

    def epoch(self) -> None:
        """Run one epoch: train, validate, adapt, commit."""
        start, epoch = time.perf_counter(), self.state.epoch
        loss = self._pass_over_training_windows(epoch)
        rate = self.optimizer.param_groups[0]["lr"]
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        if self._warms_up(epoch):
            self._set_rate(self.config.learning_rate)
        for buffer in self.inner.buffers():  # each process has its own statistics of batch normalisation
            broadcast(buffer)
        predictions = self.validation.predict(self.inner, progress=self._title("validating") if self.progress else None)
        scores = split_scores([p.values for p in predictions], self.validation.videos, self.config.target).together
        if not math.isfinite(scores.ccc):
            raise self._diverged("a prediction")
        self._adapt(epoch, scores.ccc)
        record = {
            "epoch": epoch + 1,
            "loss": loss,
            **scores.as_json(),
            "best_ccc": self.state.best_ccc,
            "learning_rate": rate,
            "trained": trained,
            "seconds": round(time.perf_counter() - start, 3),
        }
        self._commit(record)

    def _pass_over_training_windows(self, epoch: int) -> float:
        """Train on every window once and return the mean loss."""
        seed = _seed_of(self.config.seed, epoch)
        self.order.manual_seed(seed if self.config.shuffle == "epoch" else self.config.seed)
        self.model.train()
        total = torch.zeros(2, device=self.on.device)  # sum of losses, number of windows
        bar = tqdm(
            self.loader,
            self._title("training"),
            leave=False,
            disable=None if self.progress and self.on.is_main_process else True,  # None: only on a terminal
            dynamic_ncols=True,
        )
        for step, batch in enumerate(bar):
            if step == 0:  # not before the loop: a loader draws a random number when it starts
                set_seed(seed, device_specific=True)
            if self._warms_up(epoch):
                self._set_rate(warmup_rate(self.config, epoch - self.state.started, step, len(self.loader)))
            prediction = self.model(*self.dataset.features(batch), lengths=batch["length"], **self._augmented(batch))
            loss = ccc_loss(prediction, batch["label"], batch["mask"], convention=self.config.loss)
            counted = batch["mask"].any(dim=-1).sum()  # windows
            self.optimizer.zero_grad()
            self.on.backward(loss * self._weight(counted))
            self.optimizer.step()
            total += torch.stack([loss.detach() * counted, counted.to(loss.dtype)])
        total = self.on.reduce(total)
        mean = float(total[0] / total[1].clamp(min=1))
        if not math.isfinite(mean):
            raise self._diverged("the loss")
        return mean

    def _augmented(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Draw a crop and a flip for each window; an empty dict without pictures or augmentation."""
        if not (isinstance(self.inner, WholeModel) and self.config.networks.augment):
            return {}
        count = len(batch["length"])
        offsets = torch.randint(backbones.PICTURE - backbones.CROP + 1, (count, 2))
        flip = torch.rand(count) < 0.5
        return {"offsets": offsets.to(self.on.device), "flip": flip.to(self.on.device)}

    def _weight(self, counted: Tensor) -> Tensor | float:
        """Weight of this process, which has ``counted`` windows, that turns the mean over processes into one over
        windows."""
        if self.on.num_processes == 1:
            return 1.0
        return counted * self.on.num_processes / self.on.reduce(counted).clamp(min=1)

    def _adapt(self, epoch: int, ccc: float) -> None:
        """Save or reload the best weights; reduce the learning rate on a plateau; restart if it is time."""
        self.state.epoch = epoch + 1
        if ccc > self.state.best_ccc:
            self.state.best_ccc, self.state.best_epoch = ccc, epoch
            self.best = {name: tensor.detach().clone() for name, tensor in self.inner.state_dict().items()}
        elif self.config.reload_best:
            self.inner.load_state_dict(self.best)
        if self.config.plateau and self._warms_up(epoch):
            self.plateau.best = max(self.plateau.best, ccc)  # to be beaten, but warm-up epochs do not count as bad
        elif self.config.plateau:
            self.plateau.step(ccc)
        since = self.state.epoch - self.state.started
        fallen = self.optimizer.param_groups[0]["lr"] <= LOWEST_RATE and since > RESTART_AFTER
        if fallen and (self.config.restart or self.releases):
            self._restart()

    def _restart(self) -> None:
        """Restart from the best weights as if they were initial ones, and release more parts of the networks."""
        self.state.started = self.state.epoch
        self.state.stage += self.releases
        self.inner = self.on.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.inner.load_state_dict(self.best)
        self.on.free_memory()  # empties its lists of prepared objects
        self._begin()

    def _commit(self, record: dict[str, Any]) -> None:
        state = self.state
        state.history.append(record)
        optimizer = self.optimizer.state_dict()
        state.optimizer = optimizer["param_groups"]
        state.plateau = {name: getattr(self.plateau, name) for name in PLATEAU_STATE} if self.config.plateau else {}
        state.scaler = self.on.scaler.state_dict() if self.on.scaler is not None else {}
        _on_main(
            self.on,
            lambda: runs.save(self.config.out, state, self.inner.state_dict(), self.best, optimizer["state"]),
        )
        if self.curves is not None:
            runs.add_to_curves(self.curves, record)
        _say(
            self.on,
            self.progress,
            f"epoch {state.epoch:>3}  loss {record['loss']:.4f}  CCC {record['ccc']:.4f}"
            f"  best {state.best_ccc:.4f} (epoch {state.best_epoch + 1})  {record['seconds']:.1f} s",
        )

    def finish(self) -> None:
        """Predict the validation videos with the best weights."""
        self.inner.load_state_dict(self.best)
        predictions = self.validation.predict(self.inner)
        values = {v.name: p.values for v, p in zip(self.validation.videos, predictions, strict=True)}
        folder = self.config.out / runs.PREDICTIONS
        _on_main(self.on, lambda: write_predictions(folder, {self.config.target: values}))
        if self.curves is not None:
            self.curves.close()

    def _warms_up(self, epoch: int) -> bool:
        return self.config.warmup != "none" and epoch - self.state.started < self.config.warmup_epochs

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _title(self, doing: str) -> str:
        return f"epoch {self.state.epoch + 1}/{self.config.epochs} {doing}"

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"epoch {self.state.epoch + 1}: expected finite numbers, but {what} is not; "
            f"{self.config.out} keeps the epochs before. Begin another run with a lower --learning_rate."
        )


def warmup_rate(config: TrainConfig, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of batch ``step`` of ``steps`` in an ``epoch`` of the warm-up, both from 0."""
    epochs = config.warmup_epochs
    if config.warmup == "released":
        return config.learning_rate * step * (epoch + 1) / (epochs**2 * steps)
    return config.learning_rate * (epoch * steps + step + 1) / (epochs * steps)


def _seed_of(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _environment(on: Accelerator, config: TrainConfig, splits: tuple[list[Video], ...]) -> dict[str, Any]:
    """Record what the last bit of the result depends on besides the settings."""
    labels = hashlib.sha256()
    for video in (video for split in splits for video in split):
        labels.update(f"{video.name} {video.length}\n".encode())
        labels.update(b"" if video.labels is None else video.labels.tobytes())
    return {
        "data": labels.hexdigest(),
        "torch": torch.__version__,
        "device": str(on.device.type),
        "backend": None if config.fusion == "concat" else environment.backend_used(config.backend, on.device.type),
        "processes": on.num_processes,
        "threads": torch.get_num_threads(),
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [f"{name} {before.get(name)} then, {now[name]} now" for name in now if before.get(name) != now[name]]
    if not changed:
        return ""
    return f"The run was begun elsewhere ({'; '.join(changed)}): it goes on, but not bit for bit."


def _mended(videos: list[Video]) -> str:
    notes = [note for video in videos for note in video.notes]
    more = [f"... and {len(notes) - 3} more; grjca doctor --data lists them."] if len(notes) > 3 else []
    return "\n".join(notes[:3] + more)


def _nested(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    result: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, kind = name.partition(".")
        result.setdefault(int(index), {})[kind] = tensor
    return result


def _on_main(on: Accelerator, call: Callable[[], T]) -> T:
    """Run ``call`` on the main process; return or raise its result on every process."""
    outcome: list[Any] = [None, None]
    if on.is_main_process:
        try:
            outcome[0] = call()
        except (UserError, OSError) as error:
            outcome[1] = error
    if on.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _say(on: Accelerator, aloud: bool, text: str) -> None:
    if aloud and text and on.is_main_process:
        tqdm.write(text)
