"""Verdicts on kernels without a test record: "auto" uses them only if they passed their self-check on this device.

Verdicts are kept in this process and in a small file in the user's cache folder. They hold for the device, the versions
and the exact sources with which they were found.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
from importlib import metadata
from pathlib import Path

import torch

from grjca_kernels import verification
from grjca_kernels.modes import allows_tf32
from grjca_kernels.verification import Row

RECORDS: dict[str, str] = {}
"""GPUs that need no check: maps the name from torch.cuda.get_device_name to the file in benchmarks/results/ with the
full test record. There is none yet."""

_log = logging.getLogger("grjca_kernels")


# ---- storage

_verdicts: dict[str, verification.Verdict] = {}
_lock = threading.RLock()


@functools.cache
def key_of(backend: str, index: int, precision: str) -> str:
    """Return everything that a verdict depends on, as JSON."""
    properties = torch.cuda.get_device_properties(index)
    driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    key = {
        "backend": backend,
        "precision": precision,
        "device": properties.name,
        "capability": getattr(properties, "gcnArchName", None) or f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "driver": None if driver is None else driver(),
        "runtime": torch.version.hip or torch.version.cuda,
        "torch": torch.__version__,
        "triton": next((found.version for found in metadata.distributions(name="triton")), None),
        "grjca_kernels": sources(),
    }
    return json.dumps(key, indent=1)


@functools.cache
def sources() -> str:
    """Return a digest of this package: its Python files and its compiled libraries."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".so", ".pyd"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def file_of(key: str) -> Path:
    """Return the file for a key. Every key has its own, so processes never write one file with different content."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return folder / "grjca_kernels" / f"self-check-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def recall(key: str) -> verification.Verdict | None:
    """Return the verdict of this or an earlier process, or None; ignore files that are unreadable or for another
    key."""
    if key not in _verdicts and json.loads(key)["device"] in RECORDS:
        _verdicts[key] = verification.Verdict(None)
    elif key not in _verdicts:
        with contextlib.suppress(OSError, ValueError, RuntimeError, TypeError, KeyError):  # RuntimeError: no home
            content = json.loads(file_of(key).read_text())
            if content["key"] == json.loads(key) and isinstance(content["reason"], (str, type(None))):
                _verdicts[key] = verification.Verdict(content["reason"])
    return _verdicts.get(key)


def remember(key: str, verdict: verification.Verdict) -> None:
    """Store a verdict in this process, and on disk if it is lasting and there is a place to write."""
    _verdicts[key] = verdict
    if not verdict.lasting:
        return
    with contextlib.suppress(OSError, RuntimeError):
        path, content = file_of(key), {"key": json.loads(key), "reason": verdict.reason}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            part.write_text(json.dumps(content, indent=1))
            os.replace(part, path)  # atomic: the file is complete or not there


# ---- queries


def passed(row: Row, device: str, index: int | None, dtype: torch.dtype, reduced: bool = False) -> bool:
    """Return whether "auto" may use ``row`` for tensors of this device and dtype, and check it if nobody has.

    ``reduced`` is that of Problem. On the CPU, where Triton's interpreter computes, the answer is always no. The logger
    "grjca_kernels" reports each message once per process.
    """
    if device == "cpu":
        return False
    index = torch.cuda.current_device() if index is None else index
    key = key_of(row.name, index, verification.precision(dtype, reduced))
    verdict = _verdicts.get(key)
    if verdict is None:
        with _lock:
            verdict = recall(key) or first_verdict(row, device, index, dtype, reduced, key)
    if verdict is None:
        return False
    if verdict.reason is not None:
        precision = verification.precision(dtype, reduced)
        say(
            f"backend='auto' does not use the {row.name} kernels for {precision} on {name_of(key)}, because they "
            f"failed their self-check: {verdict.reason} It takes the next backend; "
            f"grjca_kernels.self_check({row.name!r}) prints all errors, and please report them."
        )
    return verdict.reason is None


def first_verdict(
    row: Row, device: str, index: int, dtype: torch.dtype, reduced: bool, key: str
) -> verification.Verdict | None:
    """Check ``row``, unless a CUDA graph is being captured, during which nothing else may run."""
    what = f"the {row.name} kernels have no test record for {verification.precision(dtype, reduced)} on {name_of(key)}"
    if torch.cuda.is_current_stream_capturing():
        say(
            f"{what}, and a CUDA graph is being captured, so backend='auto' takes the next backend; call "
            f"grjca_kernels.self_check({row.name!r}), or the model, before the capture."
        )
        return None
    say(f"{what}; backend='auto' now checks them, once and for {row.checking}, and uses them only if they pass.")
    verdict = verification.check(row, torch.device(device, index), dtype, reduced)
    remember(key, verdict)
    return verdict


@functools.cache  # logs each sentence only once
def say(sentence: str) -> None:
    _log.warning(sentence)


def name_of(key: str) -> str:
    return str(json.loads(key)["device"])


def report(row: Row, device: torch.device | str | int | None) -> bool:
    """Check ``row`` now in every dtype that it computes, print the findings, and remember the verdict for "auto"."""
    device = find_device(row, device)
    failures = []

    def tell(line: verification.Finding | str) -> None:
        if isinstance(line, verification.Finding):
            verdict = "" if line.passes else "  FAILED"
            line = f"{line.where:18} {line.tensor:22} error {line.error:8.2e}  allowed {line.bound:8.2e}{verdict}"
        print(line, flush=True)

    under_autocast = [(torch.float32, True)] if device.type == "cuda" and not allows_tf32() else []
    for dtype, reduced in [*((dtype, False) for dtype in verification.DTYPES), *under_autocast]:
        refusal = row.refusal(device.type, dtype)
        if refusal is not None:
            print(f"{str(dtype).removeprefix('torch.')}: not checked, {refusal}")
            continue
        verdict = verification.check(row, device, dtype, reduced, tell)
        if device.type == "cuda":
            with _lock:
                remember(key_of(row.name, device.index, verification.precision(dtype, reduced)), verdict)
        if verdict.reason is not None:
            failures.append(verdict.reason)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"The {row.name} kernels {'failed' if failures else 'passed'} on {name}.", *failures)
    return not failures


def find_device(row: Row, given: torch.device | str | int | None) -> torch.device:
    """Return the device to check on: by default a GPU, or the CPU if that is where ``row`` computes."""
    candidates = [torch.device(kind) for kind in ("cuda", "cpu")] if given is None else [torch.device(given)]
    for device in candidates:
        if row.refusal(device.type, torch.float32) is None:
            unnumbered = device.type == "cuda" and device.index is None
            return torch.device("cuda", torch.cuda.current_device()) if unnumbered else device
    raise RuntimeError(f"backend {row.name!r} cannot be checked: {row.refusal(candidates[0].type, torch.float32)}")
