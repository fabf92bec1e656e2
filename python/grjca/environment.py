"""The environment of a computation: versions, processors, memory, and the backend that is used."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil
import torch

from grjca.errors import UserError
from grjca_kernels import GatedRJCAFused, backends

BACKEND_VARIABLE = "GRJCA_BACKEND"
LIBRARIES = ("grjca-kernels", "torch", "numpy", "accelerate", "safetensors", "triton")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with + if files have changed; None if it is not a
    checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:  # the first call fails if the surrounding repository does not track this file
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True
        )
        return described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def devices() -> list[str]:
    """Return the device types on which backends may compute here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


CPUINFO = Path("/proc/cpuinfo")


@cache
def has_amx(cpuinfo: Path = CPUINFO) -> bool:
    """Return whether the CPU has AMX for bfloat16, which PyTorch uses and the native kernels do not."""
    try:
        return re.search(r"^flags\b.*\bamx_bf16\b", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:  # not Linux
        return False


def processor() -> str:
    """Return the name of the CPU."""
    try:  # platform.processor() is empty on most Linux systems
        lines = CPUINFO.read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def check_memory(needed: int, what: str) -> None:
    """Refuse an allocation for which the system would kill the process.

    Raises:
        UserError: if ``what``, of ``needed`` bytes, is larger than the memory of this machine.
    """
    total = psutil.virtual_memory().total
    if needed > total:
        raise UserError(
            f"expected sizes that fit into the {total / 2**30:.1f} GiB of this machine's memory, got {what}, "
            f"{needed / 2**30:.4g} GiB alone; choose smaller ones."
        )


def refusal(backend: str, device: str) -> str | None:
    """Try ``backend`` on this device type; return why it cannot compute, or None if it can."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.zeros(1, 1, 1, device=device)
        try:
            GatedRJCAFused(1, 1, 1, iterations=1, gating="none", backend=backend).to(device)(x, x)
        except (RuntimeError, ValueError) as error:
            return str(error)
    return None


def backend_used(asked: str, device: str) -> str:
    """Return the backend that computes the fusion on this device type: ``asked``, or the choice of "auto".

    Raises:
        UserError: if it cannot run.
    """
    if asked == "eager":
        return asked
    name = (os.environ.get(BACKEND_VARIABLE) or asked) if asked == "auto" else asked
    if name == "auto":
        return next(candidate for candidate, reason in backends(device).items() if reason is None)
    reason = refusal(name, device)
    if reason is not None:
        raise UserError(reason)
    return name
