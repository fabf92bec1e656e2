"""Everything that wants a GPU, in one command: ``python -m benchmarks.gpu``.

Stages run most valuable first, each in a process of its own that is killed when its time is over, so that a crash or a
hang costs no more than its stage.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys

import torch

from benchmarks import estimate
from benchmarks.cases import RESULTS, ROOT

BACKENDS = ("cuda", "triton")
Stage = tuple[int, list[str]]  # seconds at most, and the arguments of python


def stages(device: str = "gpu") -> dict[str, Stage]:
    """The stages by name. Those that compile, by torch.compile or Triton, take minutes."""
    tests = ["-m", "pytest", "tests/kernels/test_gpu.py", "-v"]
    file = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    full = file.with_name(f"{file.stem}-full.json")
    benchmarks = ["-m", "pytest", "benchmarks", "--benchmark-only"]
    phases = ["-m", "benchmarks.gpu_phases"]
    return {
        "doctor": (120, ["-m", "grjca", "doctor"]),
        **{f"self-check-{backend}": (300, [*phases, "--self-check", backend]) for backend in BACKENDS},
        "tests-cuda": (400, [*tests, "-m", "gpu", "-k", "cuda"]),
        "benchmarks": (1200, [*benchmarks, f"--benchmark-json={file}"]),
        "phases": (300, phases),
        "tests-triton": (1200, [*tests, "-m", "gpu and not slow", "-k", "not cuda"]),
        **{f"memcheck-{backend}": (300, [*phases, "--exercise", backend]) for backend in BACKENDS},
        "slow-tests-triton": (1800, [*tests, "-m", "gpu and slow", "-k", "not cuda"]),
        "full": (1800, [*benchmarks, "--full", "-k", "not test_block", f"--benchmark-json={full}"]),
    }


def run(name: str, stage: Stage) -> bool:
    """Return whether a stage ended well, and in time."""
    seconds, arguments = stage
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99"] if "memcheck" in name else []
    print(f"---- {name}, at most {seconds} s", flush=True)
    try:
        code: int | str = subprocess.run([*sanitizer, sys.executable, *arguments], cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = f"nothing within {seconds} s"
    except OSError as error:
        code = str(error)
    print(f"---- {name}: {'passed' if code == 0 else f'failed, with {code}'}", flush=True)
    return code == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and time all on a GPU.")
    parser.add_argument("--only", nargs="+", choices=stages(), default=[*stages()], metavar="STAGE")
    parser.add_argument("--list", action="store_true", help="only show the stages")
    parser.add_argument("--estimate", action="store_true", help="only show what launches should cost, by count")
    given = parser.parse_args(argv)
    if given.estimate:
        print("\n".join(estimate.lines()))
        return 0
    if given.list:
        print("\n".join(f"{name}, at most {seconds} s" for name, (seconds, _) in stages().items()))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here; --list shows what would run.", file=sys.stderr)
        return 2
    chosen = {name: stage for name, stage in stages(torch.cuda.get_device_name(0)).items() if name in given.only}
    ended_well = [run(name, stage) for name, stage in chosen.items()]
    return 0 if all(ended_well) else 1


if __name__ == "__main__":
    sys.exit(main())
