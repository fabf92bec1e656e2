"""``grjca extract``: turn pictures and log-mel patches into features, with networks in evaluation mode.

The output is a data folder: ``annotations/``, ``features/<video>/{visual,audio}.npy`` in float32, and
``extracted.json``, which records what made them. A video's folder appears only once it is complete, so that an
interrupted extraction continues with the missing videos.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grjca import backbones, environment, files
from grjca.config import ExtractConfig
from grjca.data import layout, reading
from grjca.data.layout import Source
from grjca.data.videos import MOST_FRAMES
from grjca.errors import UserError, printable
from grjca.modalities import MODALITIES

NAME = "extracted.json"
FRAME_BYTES = {"released": 1 << 22, "small": 1 << 19}
"""Approximate memory of a frame inside a network, in bytes; more than twice the 64 channels of a patch."""

Function = Callable[[Tensor], Any]
"""A function from rows of an array, uint8 [n, 48, 48, 3] or float32 [n, 96, 64] on ``config.device``, to features
[n, d]."""


def extract(config: ExtractConfig, *, networks: Mapping[str, Function] | None = None, progress: bool = True) -> int:
    """Write features of every video in ``config.data`` to ``config.out``; return the exit code.

    Args:
        networks: functions that replace the face network ("visual") or the voice network ("audio"). Each maps uint8
            pictures [n, 48, 48, 3] or float32 log-mel patches [n, 96, 64], both tensors on ``config.device``, to
            features [n, d], a tensor or an array. No gradient is computed.
        progress: show a progress bar, and print what was made.

    Returns:
        0, or 1 if a video could not be read or its features are not finite. The reason is printed, and the other videos
        are written anyway. All annotations are copied, so that a training names the missing videos.

    Raises:
        UserError: if settings, data or folder are invalid, or an extraction with other settings has begun there.
    """
    device = _device(config.device)
    environment.check_memory(config.batch_size * FRAME_BYTES[config.size], f"a batch of {config.batch_size} frames")
    found = layout.find(Path(config.data))
    if found.problems:
        raise UserError(found.problems[0])
    sources = layout.select(found, "all")
    functions, origins = _functions(config, networks or {}, device)
    made_by = {**origins, "batch_size": config.batch_size, "device": device.type}
    with _claimed(config, made_by), torch.inference_mode():
        names = _random(made_by)
        if names and progress:
            print(
                f"Random weights (seed {config.seed}): {', '.join(names)}, for which no file was given. These features "
                "are for trials, not for results."
            )
        problems = _each(sources, lambda source: _copy_annotation(source, config.out))
        bar = tqdm(sources, "extracting", leave=False, disable=None if progress else True)
        problems |= _each(bar, lambda source: _write_video(source, config, functions, device))
    for problem in problems.values():
        print(f"grjca extract: {printable(problem)}", file=sys.stderr)
    if progress:
        print(f"{config.out}: features of {len(sources) - len(problems)} of {len(sources)} videos.")
    return 1 if problems else 0


def _each(sources: Iterable[Source], act: Callable[[Source], None]) -> dict[str, str]:
    """Call ``act`` on each source; return the reasons of failures by the source's name."""
    problems = {}
    for source in sources:
        try:
            layout.check_name(source.name, source.labels or source.folder)
            act(source)
        except UserError as error:
            problems[source.name] = str(error)
    return problems


def about(folder: Path) -> dict[str, Any] | None:
    """Return the record that :func:`extract` has left in a data folder; None if it did not make the folder.

    "visual" and "audio" each give the ``network`` and its ``weights``: the name of a file (with its "sha256"),
    "random", or None for a function passed in ``networks``.

    Raises:
        UserError: if the record is damaged.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    content = files.read_json(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in MODALITIES):
        raise UserError(f"{path}: expected what grjca extract writes, got something else; extract again.")
    return content


def random_networks(folder: Path) -> list[str]:
    """Return the modalities whose features were made with random weights, according to :func:`about`."""
    return _random(about(folder) or {})


def _random(noted: Mapping[str, Any]) -> list[str]:
    return [name for name in MODALITIES if noted.get(name, {}).get("weights") == backbones.RANDOM]


# ---- networks


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # PyTorch raises the second where it was built without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device: expected one that is here, as cpu or cuda:0, got {name} ({reason}).") from error
    return device


def _functions(
    config: ExtractConfig, given: Mapping[str, Function], device: torch.device
) -> tuple[dict[str, Function], dict[str, dict[str, Any]]]:
    """Return, by modality, the functions from rows to features, and their records."""
    functions: dict[str, Function] = {}
    origins: dict[str, dict[str, Any]] = {}
    if unknown := given.keys() - set(MODALITIES):
        raise UserError(f"networks: expected {' and '.join(MODALITIES)}, got {sorted(unknown)[0]!r}.")
    for name, path in (("visual", config.visual), ("audio", config.audio)):
        if name in given:
            if path is not None:
                raise UserError(f"--{name}: expected no file, because a function takes the network's place.")
            functions[name] = given[name]
            origins[name] = {"network": _qualified(given[name]), "weights": None}
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = backbones.make(name, config.size)
        if path is not None:
            backbones.load(network, path)
        functions[name] = _function(name, network.to(device).eval())
        origins[name] = {"network": type(network).__name__, "size": config.size}
        origins[name] |= {"weights": backbones.RANDOM, "seed": config.seed} if path is None else _file(path)
    origins["visual"].setdefault("crop", "centre" if "visual" not in given else None)
    return functions, origins


def _function(name: str, network: backbones.Network) -> Function:
    return (lambda rows: network(backbones.crop(rows))) if name == "visual" else network


def _qualified(function: Any) -> str:
    """Return the name of a function, or of the class of a callable object."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"weights": path.name, "sha256": digest.hexdigest()}


# ---- the folder


@contextmanager
def _claimed(config: ExtractConfig, made_by: Mapping[str, Any]) -> Iterator[None]:
    """Hold the lock of the folder, after writing extracted.json."""
    _check_folder(config, made_by)
    files.make_folder(config.out)
    with files.alone(config.out, "extracts"):
        _check_folder(config, made_by)  # again: another process may have been faster
        for folder in (config.out / "features", *(config.out / "annotations").glob("*")):
            files.remove_partial(folder)
        for path in (config.out / "features").glob(".*"):
            if files.is_partial(path) and path.is_dir():  # this process holds the lock, so no other is filling it
                shutil.rmtree(path)
        if not (config.out / NAME).exists():
            files.write_json(config.out / NAME, {**made_by, "versions": environment.versions()})
        yield


def _check_folder(config: ExtractConfig, made_by: Mapping[str, Any]) -> None:
    out = config.out
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out: {out}: expected a folder or nothing, got a file; choose another.")
    if out.resolve() == Path(config.data).resolve():
        raise UserError(f"--out: expected another folder than --data, got {out} for both.")
    annotations = out / "annotations"
    for path in (out / NAME, out / "features", annotations, *annotations.glob("*")):
        if path.is_symlink():
            raise UserError(f"{path}: expected no link, got one; an extraction stays in its own folder. Remove it.")
    before = about(out)
    if before is None and any(path.name != files.LOCK and not files.is_partial(path) for path in out.iterdir()):
        raise UserError(f"--out: {out} holds something, but no {NAME}; choose another folder.")
    for name, now in made_by.items():
        if before is not None and before.get(name) != now:
            raise UserError(
                f"--out: {out} was begun with {name} {before.get(name)}, got {now}; choose another folder, or the same "
                "settings to go on."
            )


def _copy_annotation(source: Source, out: Path) -> None:
    if source.labels is None or source.split is None:
        return
    if source.labels.suffix == ".npy":
        rows = "".join(f"{valence!r},{arousal!r}\n" for valence, arousal in reading.labels(source.labels).tolist())
        content = f"{reading.HEADER}\n{rows}".encode()
    else:
        content = files.read_bytes(source.labels)
    folder = out / "annotations" / source.split
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / f"{source.name}.txt", lambda file: file.write(content))


# ---- videos


def _write_video(
    source: Source, config: ExtractConfig, functions: Mapping[str, Function], device: torch.device
) -> None:
    arrays = {name: _array(source.arrays(name), reading.ARRAYS[name]) for name in functions}
    folder = config.out / "features" / source.name
    if folder.is_symlink() or folder.exists():
        return _check_done(folder, {name: len(array) for name, array in arrays.items()})
    with files.whole_folder(folder) as partial:
        for name, array in arrays.items():
            batches = _features(functions[name], array, config.batch_size, device, f"{source.name}: {name}")
            files.write(partial / f"{name}.npy", functools.partial(_save, length=len(array), batches=batches))


def _array(path: Path, form: reading.Form) -> np.ndarray:
    array = reading.rows(path, form)
    if len(array) > MOST_FRAMES:
        raise UserError(f"{path} holds {len(array)} frames; expected at most {MOST_FRAMES}.")
    if array.dtype.kind == "f":
        reading.check_finite(array, path)
    return array


def _check_done(folder: Path, lengths: Mapping[str, int]) -> None:
    """Check by their lengths that existing features belong to these arrays."""
    for name, length in lengths.items():
        path, got = folder / f"{name}.npy", "something else"
        try:
            if not folder.is_symlink() and path.is_file():
                got = f"{len(np.lib.format.open_memmap(path, mode='r'))} frames"
        except Exception:  # NumPy does not document what it raises for a broken header
            got = "a broken file"
        if got != f"{length} frames":
            raise UserError(f"{path}: expected features of {length} frames, got {got}; delete the folder.")


def _features(
    function: Function, array: np.ndarray, batch_size: int, device: torch.device, what: str
) -> Iterator[np.ndarray]:
    """Yield the features of each batch of rows, [n, d] float32."""
    width = None
    for start in range(0, len(array), batch_size):
        rows = torch.from_numpy(np.array(array[start : start + batch_size]))
        result = function((rows if rows.dtype == torch.uint8 else rows.float()).to(device))
        result = torch.as_tensor(result).detach().to("cpu", torch.float32).numpy()
        if result.ndim != 2 or len(result) != len(rows) or result.shape[1] != (width or result.shape[1]):
            expected = f"[{len(rows)}, {width or 'd'}]"
            raise UserError(f"{what}: expected features {expected} from the network, got {list(result.shape)}.")
        width = result.shape[1]
        finite = np.isfinite(result).all(axis=1)
        if not finite.all():
            frame = start + int(finite.argmin())
            raise UserError(f"{what}, frame {frame} (counted from 0): expected finite features; check the weights.")
        yield result


def _save(file: IO[bytes], length: int, batches: Iterator[np.ndarray]) -> None:
    """Write an .npy file, batch by batch."""
    for i, batch in enumerate(batches):
        if not i:
            header = {"descr": "<f4", "fortran_order": False, "shape": (length, batch.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(batch, "<f4").tobytes())
