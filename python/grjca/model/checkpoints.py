"""Reading of checkpoints from elsewhere. Only tensors are read; no code in a file runs."""

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
    "_codecs.encode",  # how PyTorch 2.4 pickles bytes
    "argparse.Namespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
)
"""Types that training scripts save beside the weights and that torch.load refuses."""

AVERAGED = re.compile("ema|averag|swa", re.IGNORECASE)
"""Pattern in the prefixes of averaged weights."""
_COUNT = "num_batches_tracked"
_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read(source: str | Path | Mapping[str, Tensor]) -> tuple[str, Mapping[Any, Any]]:
    """Return the name of the source for messages, and its content.

    Args:
        source: a .safetensors file; a torch.save file, from which only tensors are read; or a state_dict.

    Raises:
        UserError: if the file is missing, broken, not a state_dict, or would run code.
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
    """Yield ``content`` and the mappings nested in it, each with its prefix. The depth is limited, because a checkpoint
    may contain itself."""
    yield place, {str(key): value for key, value in content.items()}
    for key, value in content.items():
        if isinstance(value, Mapping) and depth:
            yield from mappings(value, f"{place}{key}.", depth - 1)


def unwrapped(key: str) -> str:
    """Strip from a key what torch.compile, DataParallel and the like add to it."""
    return _WRAPPED.sub("", key)


def modules(content: Mapping[Any, Any], first: str) -> dict[str, dict[str, Any]]:
    """Return the tensors of each module in a checkpoint that has a key ``first``, by the prefix of that key."""
    found: dict[str, dict[str, Any]] = {}
    for place, values in mappings(content):
        plain = {unwrapped(key): value for key, value in values.items()}
        for match in filter(None, (re.fullmatch(rf"((?:.*\.)?){re.escape(first)}", key) for key in plain)):
            found[place + match[1]] = {place + key: plain[key] for key in plain if key.startswith(match[1])}
    return found


def fill(module: nn.Module, label: str, tensors: Mapping[str, Any], prefix: str) -> None:
    """Copy the tensors whose keys begin with ``prefix`` to ``module``. Missing counts of batches become 0.

    Raises:
        UserError: if a tensor is missing, does not fit, or does not belong to such a module.
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
    """Return the tensors for the keys of ``expected``, found under ``prefix``, after checking their shapes.

    A count of batches may be missing: old versions of PyTorch do not save it, and no result depends on it.

    Raises:
        UserError: if any other tensor is missing, or one does not fit.
    """
    wanted = {k: like for k, like in expected.items() if prefix + k in tensors or not k.endswith(_COUNT)}
    return {key: find_like(label, tensors, prefix + key, like) for key, like in wanted.items()}


def find(label: str, tensors: Mapping[str, Any], name: str) -> Tensor:
    """Return the tensor of this name; a UserError, which calls the checkpoint ``label``, if there is none."""
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor):
        kind = "a NumPy value" if isinstance(tensor, _StandIn) else type(tensor).__name__
        got = kind if name in tensors else "no such key"
        raise UserError(f"{label}: {name}: expected a tensor of the authors' model, got {got}.")
    return tensor


def find_like(label: str, tensors: Mapping[str, Any], name: str, like: Tensor) -> Tensor:
    """Return the tensor of this name; UserError unless its shape and kind (floating-point or not) are those of
    ``like``."""
    tensor = find(label, tensors, name)
    if tensor.shape != like.shape:
        raise UserError(f"{label}: {name}: expected shape {list(like.shape)}, got {list(tensor.shape)}.")
    if tensor.is_floating_point() != like.is_floating_point():
        kind = "a floating dtype" if like.is_floating_point() else "an integer dtype"
        raise UserError(f"{label}: {name}: expected {kind}, got {tensor.dtype}.")
    return tensor


class _StandIn:
    """Placeholder for a value that is not read: none of its code runs, and its content is dropped."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(path: str) -> type[_StandIn]:
    """Make a placeholder that torch.load (2.4 and later) takes for the object at ``path``."""
    module, _, name = path.rpartition(".")
    return type(name, (_StandIn,), {"__module__": module})


_STAND_INS = [_stand_in(path) for path in NOT_READ]
_LOCK = Lock()  # torch.load has one list of accepted types per process


@contextmanager
def _standing_in() -> Iterator[None]:
    """Have torch.load accept :data:`NOT_READ`, in addition to what the user has declared safe."""
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
    except Exception as error:  # torch.load may raise anything for a broken file
        foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign:
            raise UserError(
                f"{path}: expected tensors alone, got {foreign[1]} as well, whose loading could run code, so nothing "
                "was loaded; have its state_dict saved instead."
            ) from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason.startswith("Weights only load failed"):  # the rest says how to load it anyway
            reason = "not what torch.save writes"
        raise UserError(
            f"{path}: expected a whole checkpoint, got a broken file ({reason}); fetch it again."
        ) from error
