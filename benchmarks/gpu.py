"""Everything that wants a GPU, in one command: ``python -m benchmarks.gpu``.

It checks, times and takes apart the kernels, most valuable first: a process per stage, so that a crash or a hang costs
no more than its stage, and a line of JSON per row as soon as it is known. What tests and tools print goes into a log
beside the rows, as it comes. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import cases, ledger
from benchmarks.ledger import ROOT, Row

Plan = dict[str, Callable[[], Row]]
NO_GPU = "benchmarks.gpu: PyTorch sees no GPU here, and nothing is timed without one; --dry-run shows what would be."
PASSES = {"forward": False, "training": True}
KERNELS = {"cuda": "cuda", "fused": "triton"}
"""Implementations with kernels of their own, and their backends. "fused" is what rows call the Triton kernels."""
PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
LAUNCHES = ("launch by launch", "in one launch")
"""First without the barrier of the grid, in which kernels may hang, then with it."""
PROCESS = f"{os.getpid()} since {time.time():.0f}"
"""Times that are compared should be of one process: of one machine, in one state."""
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
TEST_SECONDS = 120  # after which a test counts as hanging

VARIANTS: dict[str, dict[str, int]] = {
    "64 x 64 x 64, two programs of 4 warps": {"m": 64, "n": 64, "k": 64, "warps": 4, "stages": 3, "programs": 2},
    "128 x 64 x 64": {"m": 128, "n": 64, "k": 64},
    "64 x 128 x 64": {"m": 64, "n": 128, "k": 64},
    "64 x 64 x 64": {"m": 64, "n": 64, "k": 64},
    "128 x 128 x 32": {"m": 128, "n": 128, "k": 32},
    "2 stages": {"stages": 2},
    "3 stages": {"stages": 3},
    "weights by 128 x 128": {"w": 128},
    "phases inlined": {"calls": 0},
    "all samples at once": {"chunk": 1 << 20},
    "few samples at once": {"chunk": 4},
}
"""Against the configuration as it is: fields of config.Tiles, samples of a chunk, and whether phases are called."""


# ---- stages: name -> rows


def _times(rows: list[tuple[str, int, str, str, str]]) -> Plan:
    def row(name: str, batch: int, dtype: str, implementation: str, what: str) -> Row:
        from benchmarks.gpu_block import timed

        return timed(name, batch, dtype, implementation, PASSES[what])

    return {ledger.time_row(*cells): functools.partial(row, *cells) for cells in rows}


def _shape(name: str, batch: int, passes: tuple[str, ...] = tuple(PASSES)) -> Plan:
    implementations = [f"{how}{graph}" for graph in ("", "-graph") for how in (*KERNELS, "eager")]
    return _times([(name, batch, "bfloat16", how, what) for what in passes for how in implementations])


def _large() -> Plan:
    """Where the GPU has enough to do: what is held against its ceilings."""
    cells = [("abaw", 64, what) for what in PASSES] + [("clip", 128, "forward")]
    return _times([(name, batch, "bfloat16", how, what) for name, batch, what in cells for how in (*KERNELS, "eager")])


def _memory() -> Plan:
    def row(name: str, batch: int, implementation: str) -> Row:
        from benchmarks.gpu_block import weighed

        return weighed(name, batch, implementation)

    cells = [(name, batch, how) for name, batch in (("abaw", 12), ("clip", 64)) for how in (*KERNELS, "eager")]
    return {ledger.memory_row(*of): functools.partial(row, *of) for of in cells}


def _ceilings() -> Plan:
    def row(name: str) -> Row:
        from benchmarks.ceilings import CEILINGS
        from benchmarks.gpu_block import Clock

        return {"kind": "ceiling", "of": name, **CEILINGS[name](Clock().median)}

    def host(implementation: str) -> Row:
        from benchmarks.gpu_parts import overhead

        return {"kind": "host", "implementation": implementation, **overhead(implementation)}

    names = ("copy", "matrix bfloat16", "matrix float16", "tanh.approx.f32", "tanh accurate")
    names += ("grid barrier", "launch", "cooperative launch")
    hosts = {ledger.host_row(how): functools.partial(host, how) for how in KERNELS}
    return {**hosts, **{f"ceiling {name}": functools.partial(row, name) for name in names}}


def _phases() -> Plan:
    def row(name: str, batch: int, implementation: str) -> Row:
        from benchmarks import gpu_parts

        return (gpu_parts.cuda_phases if implementation == "cuda" else gpu_parts.phases)(name, batch)

    cells = [(*of, how) for how in KERNELS for of in (("abaw", 12), ("abaw", 64), ("clip", 64), ("clip", 128))]
    return {"{} B={} phases {}".format(*of): functools.partial(row, *of) for of in cells}


def _variants() -> Plan:
    def row(name: str, batch: int, of_variant: str, what: str) -> Row:
        from benchmarks.gpu_parts import tried

        return tried(name, batch, of_variant, PASSES[what])

    cells = [("abaw", 12, of, what) for what in PASSES for of in VARIANTS]
    return {"{} B={} variant {} {}".format(*of): functools.partial(row, *of) for of in cells}


def _self_check(backend: str, log: Path, first: int = 60) -> tuple[int, Plan]:
    """``first``: seconds of the first row, which may compile."""
    rows = zip(LAUNCHES, (first, 60), strict=True)
    plan: Plan = {
        f"self-check {backend} {launches}": functools.partial(self_check, backend, launches, seconds, log)
        for launches, seconds in rows
    }
    return first + 80, plan


def _tests(backend: str, marks: str, seconds: int, log: Path) -> tuple[int, Plan]:
    names = backend if backend == "cuda" else "not cuda"
    what = f"{'slow tests' if marks == 'gpu and slow' else 'tests'} {backend}"
    return seconds + 20, {what: functools.partial(tests, marks, names, seconds, log)}


def stages(log: Path = Path(os.devnull)) -> dict[str, tuple[int, Plan]]:
    """Name -> seconds that it may take at most, and its rows. First what a first hour on a GPU must tell."""
    sanitizer: Plan = {
        f"sanitizer {tool} {backend}": functools.partial(sanitized, tool, backend, 110, log)
        for backend in KERNELS.values()
        for tool in SANITIZERS
    }
    compiled = {  # torch.compile takes minutes: one compilation for a stage
        f"compiled {name} B={batch} {what}": (280, _times([(name, batch, "bfloat16", "compiled", what)]))
        for name, batch in (("abaw", 12), ("clip", 64), ("long", 8), ("light", 1), ("light", 8))
        for what in (PASSES if name != "light" else ("forward",))
    }
    first = "compiled abaw B=12 forward"
    return {
        "installed": (60, {"environment": environment, **_installed()}),
        "self-check cuda": _self_check("cuda", log),
        "self-check triton": _self_check("triton", log, first=220),
        "phases": (150, _phases()),
        "abaw": (200, _shape("abaw", 12)),
        "clip": (200, _shape("clip", 64)),
        first: compiled.pop(first),
        "sanitizer": (460, sanitizer),
        "tests cuda": _tests("cuda", "gpu", 240, log),
        "tests triton": _tests("triton", "gpu and not slow", 400, log),
        "large": (90, _large()),
        "ceilings": (90, _ceilings()),
        "memory": (60, _memory()),
        "light": (200, {**_shape("light", 1, ("forward",)), **_shape("light", 8, ("forward",))}),
        "long": (200, _shape("long", 8)),
        **compiled,
        "variants": (400, _variants()),
        "slow tests triton": _tests("triton", "gpu and slow", 500, log),
    }


# ---- rows that are no times


def environment() -> Row:
    """What the machine says of itself, and who can compute on it."""
    import torch

    import grjca_kernels
    from grjca_kernels import native

    of = torch.cuda.get_device_properties(0)
    names = ("multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin")
    known = {name: getattr(of, name, None) for name in names}
    known |= {"backends": grjca_kernels.backends(), "architectures": getattr(native.library, "cuda_architectures", "")}
    return {"kind": "environment", **known, "nvidia-smi": query("name,driver_version,pstate," + CLOCKS)}


def _installed() -> Plan:
    """An install without a compiler succeeds without kernels: then there is nothing to measure."""

    def row(backend: str) -> Row:
        import grjca_kernels

        reason = grjca_kernels.backends()[backend]
        if reason is not None:
            raise RuntimeError(f"the {backend} backend cannot run here, and nothing of it would be measured: {reason}")
        return {"kind": "installed", "backend": backend}

    return {f"installed {backend}": functools.partial(row, backend) for backend in KERNELS.values()}


def logged(command: list[str], log: Path, seconds: float, **environment: str) -> tuple[int | None, str]:
    """How a command ended, None if it was killed after ``seconds``, and what the log got from it, as it came."""
    with log.open("ab+") as file:
        begin = file.seek(0, os.SEEK_END)
        given = {"stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, **environment}}
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = subprocess.run(command, cwd=ROOT, timeout=seconds, **given).returncode  # type: ignore[call-overload]
        file.seek(begin)
        return code, file.read().decode(errors="replace")


def self_check(backend: str, launches: str, seconds: int, log: Path) -> Row:
    """What does not pass, and why: all precisions at once, a process for each."""

    def one(precision: str) -> str:
        code = f"from benchmarks import gpu_parts; gpu_parts.self_check({backend!r}, {launches!r}, {precision!r})"
        _, said = logged([sys.executable, "-c", code], log, seconds)
        of_it = [line for line in said.splitlines() if line.startswith(f"{precision}: ")]
        return of_it[-1].removeprefix(f"{precision}: ") if of_it else f"no verdict within {seconds} s"

    with ThreadPoolExecutor(len(PRECISIONS)) as threads:
        said = dict(zip(PRECISIONS, threads.map(one, PRECISIONS), strict=True))
    failed = {precision: verdict for precision, verdict in said.items() if verdict != "passed"}
    return {"kind": "self-check", "backend": backend, "launches": launches, "failed": failed}


def tests(marks: str, names: str, seconds: float, log: Path, file: str = "tests/kernels/test_gpu.py") -> Row:
    """pytest -m -k, in as many processes as can compile at once; a failure is a result, and is named.

    A test that hangs ends its process, and another goes on with the rest. What is cut off counts as far as it came.
    """
    command = [sys.executable, "-m", "pytest", file, "-v", "-m", marks, "-k", names, "--max-worker-restart", "1000"]
    command += ["-n", str(max(1, (os.cpu_count() or 2) * 3 // 4))]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method=thread"]
    code, said = logged(command, log, seconds)
    finished = {} if code in (0, 1) else {"error": f"cut off after {seconds} s" if code is None else f"exit {code}"}
    return {"kind": "tests", **outcome(said), **finished}


def outcome(said: str) -> Row:
    """Counts of what pytest -v -n said of each test, and what did not pass."""
    found = re.findall(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) (.*?) *$", said, re.MULTILINE)
    of = {name: verdict for verdict, name in found}
    failed = [name.rpartition("::")[2] for name, verdict in of.items() if verdict in ("FAILED", "ERROR")]
    count = [*of.values()].count
    return {"passed": count("PASSED"), "failed": failed, "skipped": count("SKIPPED")}


SANITIZERS = ("memcheck", "racecheck")
NAMES = {"cuda": "grjca", "triton": "ward_kernel"}  # parts of the names of our kernels, and of no others


def sanitized(tool: str, backend: str, seconds: int, log: Path) -> Row:
    """compute-sanitizer over a short run of all paths of our kernels."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RuntimeError("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "99", "--kernel-name", f"kns={NAMES[backend]}"]
    command += [sys.executable, "-c", f"from benchmarks.gpu_parts import exercise; exercise({backend!r})"]
    code, said = logged(command, log, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    says = [line for line in said.splitlines() if line.strip()][-12:]
    return {"kind": "sanitizer", "tool": tool, "backend": backend, "clean": code == 0, "exit": code, "says": says}


def query(fields: str) -> dict[str, str]:
    """What nvidia-smi says; nothing where it is not."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (value.strip() for value in done.stdout.strip().split(",")), strict=False))


@functools.lru_cache
def provenance(commit: str) -> Row:
    import torch
    import triton

    return {
        "source": ledger.source(),
        "commit": commit,
        "dirty": commit.endswith("-dirty"),
        "device": torch.cuda.get_device_name(0),
        "driver": query("driver_version").get("driver_version"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


# ---- running


def run_stage(name: str, plan: Plan, out: Path, described: Callable[[], Row], clocks: Callable[[], Row]) -> int:
    """Every row of a stage that is not there yet; what fails is noted, and the next is tried."""
    known, code = ledger.done(ledger.read(out), described()["source"]), 0
    for row, measure in plan.items():
        if row in known:
            print(f"{row}: known", flush=True)
            continue
        start = time.perf_counter()
        head = {"row": row, "stage": name, "process": PROCESS}
        try:
            figures = measure()
        except Exception as error:
            traceback.print_exc()
            figures, code = {"error": f"{type(error).__name__}: {error}"[:1500]}, 1
        seconds = {"seconds": round(time.perf_counter() - start, 1)}
        ledger.append(out, {**head, **figures, **seconds, "clocks": clocks(), **described()})
        print(f"{row}: {brief(figures)}", flush=True)
    return code


def brief(figures: Row) -> str:
    shown = ("device_ms", "host_us", "bytes", "error", "passed", "failed", "clean", "TB/s", "TFLOP/s", "G/s", "us")
    shown += ("forward us", "training us")
    return ", ".join(f"{key} {figures[key]}" for key in shown if key in figures) or "noted"


def run_all(chosen: dict[str, tuple[int, Plan]], out: Path, commit: str, seconds: float) -> bool:
    """A process per stage, as far as the time goes; whether all that was to be measured is installed."""
    end = time.monotonic() + seconds
    for name, (most, plan) in chosen.items():
        if set(plan) <= ledger.done(ledger.read(out), ledger.source()):
            continue
        if end - time.monotonic() < most:
            print(f"no time for {name}; run the same command again to go on", flush=True)
            continue
        print(f"---- {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--out", str(out), "--commit", commit]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(most)
        with contextlib.suppress(ProcessLookupError):  # nothing that a stage has started outlives it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if code not in (0, 1):
            error = f"ended with {code}" if code is not None else f"did not end within {most} s"
            failure = {"row": f"stage {name}", "stage": name, "error": error, "commit": commit}
            ledger.append(out, {**failure, "source": ledger.source()})
            print(f"{name}: {error}", flush=True)
        if name == "installed" and code != 0:
            print("Not all that was to be measured is installed: see above. --only goes on with chosen stages.")
            return False
    return True


def end_with(parent: int) -> None:
    """End this process and its group once ``parent`` has: what went on would spoil the times of the next run."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def dry_run(chosen: dict[str, tuple[int, Plan]], out: Path) -> int:
    """What would be measured."""
    known = ledger.done(ledger.read(out), ledger.source())
    for name, (most, plan) in chosen.items():
        print(f"{name}, at most {most} s", *(f"  {row}{' (known)' if row in known else ''}" for row in plan), sep="\n")
    print(*ledger.lines(ledger.verdicts([])), sep="\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and time all on a GPU.")
    parser.add_argument("--minutes", type=float, default=9, help="no stage goes on after that (default: 9)")
    parser.add_argument(
        "--out", type=Path, help="JSON lines, with a .log beside; default: benchmarks/results/<gpu>.jsonl"
    )
    parser.add_argument("--commit", help="what the rows say was measured; default: what git says")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"some of: {', '.join(stages())}")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="only show what would be measured")
    parser.add_argument("--estimate", action="store_true", help="only show what launches should cost, by count")
    given = parser.parse_args(argv)
    unknown = {*(given.only or []), *([given.stage] if given.stage else [])} - set(stages())
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages())}")
    chosen = {name: of for name, of in stages().items() if given.only is None or name in given.only}
    if given.estimate:
        from benchmarks import estimate

        print("\n".join(estimate.lines()))
        return 0
    if given.dry_run:
        return dry_run(chosen, given.out or ROOT / "benchmarks" / "results" / "none.jsonl")

    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    out = (given.out or default_out(torch.cuda.get_device_name(0))).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    commit = given.commit or str(cases.provenance()["commit"])
    if given.stage:
        if os.getpgrp() == os.getpid():  # as run_all starts it
            threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        described = functools.partial(provenance, commit)
        plan = stages(out.with_suffix(".log"))[given.stage][1]
        return run_stage(given.stage, plan, out, described, lambda: query(CLOCKS))
    installed = run_all(chosen, out, commit, 60 * given.minutes)
    table = ledger.verdicts(ledger.current(ledger.read(out)))
    goals = {"row": "goals", "kind": "goals", "goals": table, "commit": commit, "source": ledger.source()}
    ledger.append(out, goals)
    print("\n".join(ledger.lines(table)))
    return 0 if installed else 1


def default_out(device: str) -> Path:
    """A file for every kind of GPU."""
    return ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
