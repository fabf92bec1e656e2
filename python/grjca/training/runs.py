"""The folder of a run: its files, and how a killed run is resumed.

    config.yaml         all settings; ``grjca train --config`` reproduces the run
    best.safetensors    weights with the best validation CCC
    metrics.jsonl       one line per epoch
    predictions/        predictions for the validation videos, with the best weights
    tensorboard/        curves of metrics.jsonl for TensorBoard
    checkpoint/         state.json and the tensors it names, from which ``--resume`` continues
    .lock               held by the process that trains there

An epoch is committed once ``state.json`` says so. That file is replaced last, in one step; whatever a process killed
before that step has changed, the next one writes again.

A training writes and deletes nothing outside the folder, wherever links in it lead, and deletes only files whose names
it has chosen itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from grjca import backbones, environment, files, settings, tensor_files
from grjca.config import Backend, TrainConfig
from grjca.errors import UserError
from grjca.modalities import MODALITIES
from grjca.model import extract
from grjca.model.audiovisual import AudioVisualModel
from grjca.model.whole import WholeModel

CONFIG, BEST, METRICS, PREDICTIONS, TENSORBOARD = (
    "config.yaml",
    "best.safetensors",
    "metrics.jsonl",
    "predictions",
    "tensorboard",
)
CHECKPOINT, STATE = "checkpoint", "state.json"
Model = AudioVisualModel | WholeModel
_TENSORS, _CURVES = re.compile(r"epoch-(\d{4,9})\.safetensors"), "events.out.tfevents.*"
MAY_DIFFER = ("data", "out", "epochs", "workers", "tensorboard")
"""Settings that a resumed run may change, because they do not affect the result of an epoch.

Labels are compared to check that ``data`` still holds the same videos.
"""


@dataclass
class State:
    """State of a run between two epochs."""

    epoch: int = 0
    """Number of epochs that are done."""
    best_ccc: float = -2.0  # below any CCC
    best_epoch: int = -1
    started: int = 0
    """Epoch in which the training began or was last restarted from the best weights."""
    stage: int = 0
    """Number of times that parts of the networks have been released."""
    plateau: dict[str, Any] = field(default_factory=dict)
    optimizer: list[dict[str, Any]] = field(default_factory=list)
    """The optimiser's param_groups."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the gradient scaler in fp16 training."""
    environment: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl."""


def check(config: TrainConfig, resume: bool) -> None:
    """Check that the training may use its folder.

    Raises:
        UserError: if the folder is not empty and ``resume`` is false; if it is not a run, or one with other settings;
            or if its folders are links that lead elsewhere.
    """
    folder = config.out
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder or nothing, got a file; choose another --out.")
    if not any(folder.iterdir()):
        return
    if not resume:
        raise UserError(f"{folder}: exists already; go on with it by --resume, or choose another --out.")
    if (folder / CONFIG).is_file():
        _compare(folder, settings.from_yaml(TrainConfig, folder / CONFIG), config)
    elif any(path.name != files.LOCK and not files.is_partial(path) for path in folder.iterdir()):
        raise UserError(f"{folder}: expected a run, but it has no {CONFIG}; choose another --out.")
    if (folder / METRICS).exists() and not (folder / CHECKPOINT / STATE).exists():
        raise UserError(f"{folder}: cannot go on, because {CHECKPOINT}/{STATE} is gone; choose another --out.")
    _check_inner(folder)


def _check_inner(folder: Path) -> None:
    """Refuse links, through which a training would write and delete elsewhere, and folders in place of its files."""
    for name in (CHECKPOINT, PREDICTIONS, TENSORBOARD):
        path = folder / name
        if path.is_symlink():
            raise UserError(f"{path}: expected no link, got one; a run stays in its own folder. Remove it.")
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: expected a folder or nothing, got a file; remove it.")
    inner = [path for name in (CHECKPOINT, PREDICTIONS) for path in folder.glob(f"{name}/*")]
    for path in [folder / CONFIG, folder / BEST, folder / METRICS, *inner]:
        if path.is_dir() and not files.is_partial(path):
            raise UserError(f"{path}: expected a file or nothing, got a folder; remove it.")


def claim(config: TrainConfig, resume: bool, lock: FileLock) -> None:
    """Make the run's folder and take its lock.

    Raises:
        UserError: if another process trains there, or as :func:`check`.
    """
    check(config, resume)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        files.take(lock, "trains")
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{config.out}: expected a folder or nothing, got a file; choose another --out.") from error
    for name in (CHECKPOINT, PREDICTIONS):
        files.remove_partial(config.out / name)


def write_config(config: TrainConfig) -> None:
    """Write config.yaml: at the start of a new run, or once the checkpoint of a resumed run has been accepted."""
    networks = random_networks(config, config.data)
    remark = f"# Trained with the {networks}.\n" if networks else ""
    files.write_text(config.out / CONFIG, remark + settings.to_yaml(config))


def _compare(folder: Path, old: TrainConfig, new: TrainConfig) -> None:
    for option in dataclasses.fields(TrainConfig):
        before, now = getattr(old, option.name), getattr(new, option.name)
        reordered = option.name == "model" and list(before.widths) != list(now.widths)
        if (before != now or reordered) and option.name not in MAY_DIFFER:
            raise UserError(
                f"--resume: {folder} was begun with {option.name}={before}, got {now}; "
                "leave the option out, or begin a new run with another --out."
            )


def save(
    folder: Path, state: State, model: dict[str, Tensor], best: dict[str, Tensor], optimizer: dict[int, dict[str, Any]]
) -> None:
    """Commit an epoch. ``model`` and ``best`` are state_dicts; ``optimizer`` is the "state" of one."""
    if state.best_epoch == state.epoch - 1:
        save_best(folder, state, best)
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items() if not torch.equal(tensor, model[name])}
    tensors |= {f"optimizer.{i}.{name}": tensor for i, of in optimizer.items() for name, tensor in of.items()}
    checkpoint = folder / CHECKPOINT
    checkpoint.mkdir(exist_ok=True)
    name = _tensors(state.epoch)
    tensor_files.write(checkpoint / name, tensors, {"epoch": state.epoch})
    files.write_json(checkpoint / STATE, dataclasses.asdict(state))
    _after_commit(folder, state)


def save_best(folder: Path, state: State, weights: dict[str, Tensor]) -> None:
    """Write best.safetensors, with ``epoch`` (from 1) and ``ccc`` for :func:`grjca.tensor_files.read_about`."""
    tensor_files.write(folder / BEST, weights, {"epoch": state.best_epoch + 1, "ccc": state.best_ccc})


def restore(folder: Path, shapes: Mapping[str, torch.Size]) -> tuple[State, dict[str, dict[str, Tensor]]] | None:
    """Return the state of the last committed epoch and its "model", "best" and "optimizer" tensors; None if none is.

    This completes what a killed process left undone: metrics.jsonl and best.safetensors become those of that epoch.
    ``shapes`` are those of the model's state_dict.

    Raises:
        UserError: if the checkpoint is damaged.
    """
    path = folder / CHECKPOINT / STATE
    if not path.exists():
        return None
    try:
        state = _state(files.read_json(path))
        groups = _groups(tensor_files.read(path.with_name(_tensors(state.epoch))))
        for weights in (groups["model"], groups["best"]):
            if {name: tensor.shape for name, tensor in weights.items()} != shapes:
                raise ValueError("its weights are not those of the model")
        if groups["optimizer"] and groups["optimizer"].keys() != _moments(state):  # fp16 may skip its first steps
            raise ValueError("the optimiser's moments are not those of the weights")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{path}: the checkpoint is damaged ({error}); begin a new run with another --out.") from error
    save_best(folder, state, groups["best"])
    _after_commit(folder, state)
    return state, groups


def _state(content: Any) -> State:
    """Parse the state that :func:`save` has written; any exception if ``content`` is something else."""
    state = State(**content)
    numbers = [state.epoch, state.best_epoch, state.best_ccc, state.started, state.stage, *state.plateau.values()]
    numbers += [value for record in state.history for value in record.values() if value is not None]
    if not all(type(number) in (int, float) for number in numbers):
        raise TypeError("something else stands where a number should")
    if not 0 <= state.best_epoch < state.epoch or len(state.history) != state.epoch:
        raise ValueError(
            f"it is of {state.epoch} epochs, with {len(state.history)} lines and {state.best_epoch} as best"
        )
    if any(record["epoch"] != i for i, record in enumerate(state.history, start=1)):
        raise ValueError("a line of an epoch is missing")
    if type(state.environment["data"]) is not str:
        raise TypeError("it does not say which data it is of")
    return state


def _groups(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor.clone()  # not a view of the file, which is deleted after the next epoch
    groups["best"] = groups["model"] | groups["best"]
    return groups


def _moments(state: State) -> set[str]:
    """Return the names of Adam's tensors."""
    kinds = ("step", "exp_avg", "exp_avg_sq")
    return {f"{i}.{kind}" for group in state.optimizer for i in group["params"] for kind in kinds}


def _after_commit(folder: Path, state: State) -> None:
    for path in (folder / CHECKPOINT).iterdir():
        of = _TENSORS.fullmatch(path.name)
        if of and path.name != _tensors(state.epoch) and int(of[1]) <= state.epoch + 1:
            path.unlink()
    files.write_json_lines(folder / METRICS, state.history)


def _tensors(epoch: int) -> str:
    return f"epoch-{epoch:04d}.safetensors"


def read_config(folder: Path) -> TrainConfig:
    """Read the settings of a run.

    Raises:
        UserError: if ``folder`` is not a run.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: expected the folder of a run, with {CONFIG}; grjca train --out makes one.")
    return settings.from_yaml(TrainConfig, folder / CONFIG)


def new_model(config: TrainConfig, *, backend: Backend | None = None) -> Model:
    """Make the model of these settings, with initial weights; ``backend`` overrides that of the settings.

    Raises:
        UserError: if a setting is invalid (the message names it), or memory cannot hold the weights.
    """

    def make() -> Model:
        model = AudioVisualModel(
            config.model, fusion=config.fusion, length=config.window, backend=backend or config.backend
        )
        if config.source == "features":
            return model
        of = config.networks
        networks = {name: backbones.make(name, of.size) for name in MODALITIES}
        return WholeModel(model, networks, statistics=of.statistics, chunk=of.chunk)

    try:
        with torch.device("meta"):  # only sizes are needed
            weights = make().state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # which one PyTorch raises depends on the size
        reason = str(error).partition("\n")[0]
        raise UserError(f"model: expected sizes that a tensor can have, got larger ones ({reason}).") from error
    largest = max(weights, key=lambda name: weights[name].nbytes)
    environment.check_memory(
        sum(tensor.nbytes for tensor in weights.values()),
        f"a model with {largest} {list(weights[largest].shape)} for windows of {config.window} frames",
    )
    return make()


def load_networks(config: TrainConfig, model: Model) -> None:
    """Load the weights that the settings name into the face and voice networks.

    Raises:
        UserError: if a file is invalid.
    """
    if isinstance(model, WholeModel):
        for name, path in (("visual", config.networks.visual), ("audio", config.networks.audio)):
            if path is not None:
                backbones.load(model.backbones[name], path)


def random_networks(config: TrainConfig, data: Path) -> str:
    """Say which networks started from random weights, which every result must mention; empty if none is known to."""
    if config.source == "arrays":
        given = {"visual": config.networks.visual, "audio": config.networks.audio}
        names = [name for name, path in given.items() if path is None]
    else:
        names = extract.random_networks(data)
    return f"{' and '.join(names)} network{'s' * (len(names) > 1)} of random weights" if names else ""


def load_best(folder: Path, *, backend: Backend | None = None) -> tuple[TrainConfig, Model]:
    """Return the settings and the trained model of a run, with the best weights, in eval mode.

    Args:
        backend: backend of the model; None is that of the training.

    Raises:
        UserError: if ``folder`` is not a run, or has no weights yet.
    """
    config = read_config(folder)
    path = folder / BEST
    model = new_model(config, backend=backend)
    try:
        model.load_state_dict(tensor_files.read(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file, because no epoch is done yet; go on with grjca train --resume --out {folder}."
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: expected the weights of the model in {CONFIG}, got: {reason}") from error
    return config, model.eval()


def curves(folder: Path, history: list[dict[str, Any]]) -> Any:
    """Make a TensorBoard writer that holds only ``history``; :func:`add_to_curves` adds an epoch."""
    from torch.utils.tensorboard import SummaryWriter

    for old in (folder / TENSORBOARD).glob(_CURVES):  # a killed process may have left half a record
        old.unlink()
    writer = SummaryWriter(str(folder / TENSORBOARD))
    for record in history:
        add_to_curves(writer, record)
    return writer


def add_to_curves(writer: Any, record: dict[str, Any]) -> None:
    """Add the numbers of one line of metrics.jsonl."""
    for name, value in record.items():
        if name != "epoch" and value is not None:
            writer.add_scalar(name, value, record["epoch"])
    writer.flush()
