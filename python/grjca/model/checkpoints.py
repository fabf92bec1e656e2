"""Checkpoints that others have saved: opened, and nothing but tensors read."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn, serialization

from grjca.errors import UserError

NOT_READ = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    "_codecs.encode",  # bytes, as PyTorch 2.4 sees them
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
)
"""What training scripts save beside the weights, and torch.load refuses."""

AVERAGED = re.compile("ema|averag|swa", re.IGNORECASE)
"""Found in what stands before the names of averaged weights."""
_COUNT = "num_batches_tracked"
_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read(source: str | Path | Mapping[str, Tensor]) -> tuple[str, Mapping[Any, Any]]:
    """What to call the source in messages, and its content.

    Args:
        source: a .safetensors file; a file of torch.save, of which nothing but tensors is read; or a state_dict.

    Raises:
        UserError: for a file that is not there, broken, no state_dict, or would run code.
    """
    if isinstance(source, Mapping):
        return "source", source
    if not isinstance(source, str | Path):
        raise TypeError(f"source: expected a path or a state_dict, got {type(source).__name__}.")
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{path}: expected a checkpoint, got no such file.")
    content = _read(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a state_dict, got {type(content).__name__}.")
    return str(path), content


def mappings(content: Mapping[Any, Any], place: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, Any]]]:
    """It and those in it, with where they stand; no deeper, because a checkpoint may hold itself."""
    yield place, {str(key): value for key, value in content.items()}
    for key, value in content.items():
        if isinstance(value, Mapping) and depth:
            yield from mappings(value, f"{place}{key}.", depth - 1)


def unwrapped(key: str) -> str:
    """A name without what torch.compile, DataParallel and the like put into it."""
    return _WRAPPED.sub("", key)


def modules(content: Mapping[Any, Any], first: str) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds of each module that has a tensor of the name ``first``, by what stands before it."""
    found: dict[str, dict[str, Any]] = {}
    for place, values in mappings(content):
        plain = {unwrapped(key): value for key, value in values.items()}
        for match in filter(None, (re.fullmatch(rf"((?:.*\.)?){re.escape(first)}", key) for key in plain)):
            found[place + match[1]] = {place + key: plain[key] for key in plain if key.startswith(match[1])}
    return found


def fill(module: nn.Module, label: str, tensors: Mapping[str, Any], prefix: str) -> None:
    """Copy the tensors whose names begin with ``prefix`` to ``module``; counts of batches that are missing are 0.

    Raises:
        UserError: for one that is missing or does not fit, or that such a module does not have.
    """
    expected = module.state_dict()
    weights = matching(label, tensors, prefix, expected)
    parts = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    for key in tensors.keys() - {prefix + key for key in expected}:
        if key.startswith(parts):
            raise UserError(f"{label}: {key}: expected no such key in a {type(module).__name__}; is it a larger one?")
    counts = {key: torch.zeros_like(expected[key]) for key in expected.keys() - weights.keys()}
    module.load_state_dict(weights | counts)


def matching(label: str, tensors: Mapping[str, Any], prefix: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``tensors`` that ``expected`` names without ``prefix``, with its shapes.

    A count of batches, which nothing that we compute depends on and old versions of PyTorch do not save, may be
    missing.

    Raises:
        UserError: for another one that is missing, or one that does not fit.
    """
    wanted = {k: like for k, like in expected.items() if prefix + k in tensors or not k.endswith(_COUNT)}
    return {key: find_like(label, tensors, prefix + key, like) for key, like in wanted.items()}


def find(label: str, tensors: Mapping[str, Any], name: str) -> Tensor:
    """The tensor of this name; UserError, in which the checkpoint is called ``label``, if there is none."""
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor):
        kind = "a NumPy value" if isinstance(tensor, _StandIn) else type(tensor).__name__
        got = kind if name in tensors else "no such key"
        raise UserError(f"{label}: {name}: expected a tensor of the authors' model, got {got}.")
    return tensor


def find_like(label: str, tensors: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    """The tensor of this name, with the shape of ``like``, and floating like it; UserError if it is not."""
    tensor = find(label, tensors, name)
    if tensor.shape != like.shape:
        raise UserError(f"{label}: {name}: expected shape {list(like.shape)}, got {list(tensor.shape)}.")
    if tensor.is_floating_point() != like.is_floating_point():
        kind = "a floating dtype" if like.is_floating_point() else "an integer dtype"
        raise UserError(f"{label}: {name}: expected {kind}, got {tensor.dtype}.")
    return tensor


class _StandIn:
    """Takes the place of a value that is not read: none of its code runs, and nothing of it is kept."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(path: str) -> type[_StandIn]:
    """One that torch.load, from its version 2.4 on, takes for what is at ``path``."""
    module, _, name = path.rpartition(".")
    return type(name, (_StandIn,), {"__module__": module})


_STAND_INS = [_stand_in(path) for path in NOT_READ]
_LOCK = Lock()  # what torch.load accepts is a list for the whole process


@contextmanager
def _standing_in() -> Iterator[None]:
    """Have torch.load accept what is :data:`NOT_READ`, beside what the user has declared safe."""
    with _LOCK:
        before = serialization.get_safe_globals()
        paths = [f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__name__}" for f in before]
        others = [f for f, path in zip(before, paths, strict=True) if path not in NOT_READ]
        serialization.clear_safe_globals()
        serialization.add_safe_globals([*others, *_STAND_INS])
        try:
            yield
        finally:
            meanwhile = [f for f in serialization.get_safe_globals() if f not in [*before, *_STAND_INS]]
            serialization.clear_safe_globals()
            serialization.add_safe_globals([*before, *meanwhile])


def _read(path: Path) -> Any:
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with _standing_in():
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a broken file can make torch.load raise anything
        foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign:
            raise UserError(
                f"{path}: expected tensors alone, got {foreign[1]} as well, whose loading could run code, so nothing "
                "was loaded; have its state_dict saved instead."
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only load failed"):  # goes on with how to load it all the same
            reason = "not what torch.save writes"
        raise UserError(
            f"{path}: expected a whole checkpoint, got a broken file ({reason}); fetch it again."
        ) from error
