"""Everything that wants a GPU, in one command: ``python -m benchmarks.gpu``.

It checks, times and takes apart the kernels, most valuable first: a process per stage, so that a crash or a hang costs
no more than its stage, and a line of JSON per row as soon as it is known. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

from benchmarks import cases, ledger
from benchmarks.ledger import ROOT, Row

Plan = dict[str, Callable[[], Row]]
NO_GPU = "benchmarks.gpu: PyTorch sees no GPU here, and nothing is timed without one; --dry-run shows what would be."
PASSES = {"forward": False, "training": True}
KERNELS = {"cuda": "cuda", "fused": "triton"}
"""Implementations with kernels of their own, and their backends. "fused" is what rows call the Triton kernels."""
PROCESS = f"{os.getpid()} since {time.time():.0f}"
"""Times that are compared should be of one process: of one machine, in one state."""
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"

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
    """Ours and eager first: torch.compile takes a minute each time."""
    plain = (*KERNELS, "eager")
    groups = ((*plain, *(f"{how}-graph" for how in plain)), ("compiled",))
    return _times([(name, batch, "bfloat16", how, what) for group in groups for what in passes for how in group])


def _precisions() -> Plan:
    dtypes, kinds = ("float16", "tf32", "float32"), (*KERNELS, "eager")
    return _times([("abaw", 12, dtype, how, what) for dtype in dtypes for what in PASSES for how in kinds])


def _batches() -> Plan:
    sizes, kinds = (1, 2, 4, 8, 16, 32), (*KERNELS, "eager")
    return _times([("abaw", batch, "bfloat16", how, what) for batch in sizes for what in PASSES for how in kinds])


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

    cells = [(*of, how) for of in (("abaw", 12), ("clip", 64), ("light", 8), ("long", 8)) for how in KERNELS]
    return {"{} B={} phases {}".format(*of): functools.partial(row, *of) for of in cells}


def _variants() -> Plan:
    def row(name: str, batch: int, of_variant: str, what: str) -> Row:
        from benchmarks.gpu_parts import tried

        return tried(name, batch, of_variant, PASSES[what])

    cells = [("abaw", 12, of, what) for what in PASSES for of in VARIANTS]
    return {"{} B={} variant {} {}".format(*of): functools.partial(row, *of) for of in cells}


def _sanitizer() -> Plan:
    cells = [(tool, backend) for backend in KERNELS.values() for tool in SANITIZERS]
    return {"sanitizer {} {}".format(*of): functools.partial(sanitized, *of) for of in cells}


def _environment() -> Plan:
    checks = {f"self-check {backend}": functools.partial(self_check, backend) for backend in KERNELS.values()}
    return {"environment": environment, **checks}


def stages() -> dict[str, tuple[int, Plan]]:
    """Name -> seconds that it may take at most, and its rows.

    Every test of the CUDA C++ kernels comes early: nothing compiles. Those of Triton wait for the times, each of which
    has a check of its own.
    """
    return {
        "environment": (230, _environment()),
        "tests cuda": (190, {"tests cuda": functools.partial(tests, "gpu", "cuda", 180)}),
        "abaw": (270, _shape("abaw", 12)),
        "large": (90, _large()),
        "ceilings": (90, _ceilings()),
        "clip": (270, _shape("clip", 64)),
        "memory": (60, _memory()),
        "tests triton": (240, {"tests triton": functools.partial(tests, "gpu and not slow", "not cuda", 230)}),
        "light": (240, {**_shape("light", 1, ("forward",)), **_shape("light", 8, ("forward",))}),
        "long": (240, _shape("long", 8)),
        "phases": (120, _phases()),
        "sanitizer": (520, _sanitizer()),
        "precisions": (240, _precisions()),
        "batches": (180, _batches()),
        "variants": (400, _variants()),
        "slow tests": (560, {"slow tests": functools.partial(tests, "gpu and slow", "not cuda", 550)}),
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


def self_check(backend: str) -> Row:
    """grjca_kernels.self_check, which prints what it finds."""
    code = f"import grjca_kernels; print(grjca_kernels.self_check({backend!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=110)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return {"kind": "self-check", "backend": backend, "says": done.stdout.strip().splitlines()}


def tests(marks: str, names: str, seconds: int) -> Row:
    """pytest -m -k, in as many processes as can compile at once; a failure is a result, and is named."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", f"--junitxml={report}"]
        command += ["-m", marks, "-k", names]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(max(1, (os.cpu_count() or 2) * 3 // 4))]
        if importlib.util.find_spec("pytest_timeout"):
            command += ["--timeout", str(min(200, seconds))]
        subprocess.run(command, cwd=ROOT, timeout=seconds)
        return outcome(report)


def outcome(report: Path) -> Row:
    """Counts of a junit file, and what did not pass."""
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}
    return {"kind": "tests", **counts}


SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
NAMES = {"cuda": "grjca", "triton": "ward_kernel"}  # parts of the names of our kernels, and of no others


def sanitized(tool: str, backend: str) -> Row:
    """compute-sanitizer over a short run of all paths of our kernels; initcheck must see what PyTorch's write, too."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RuntimeError("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "99"]
    if tool != "initcheck":
        command += ["--kernel-name", f"kns={NAMES[backend]}"]
    code = f"from benchmarks import gpu; from benchmarks.gpu_parts import exercise; exercise({backend!r})"
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    says = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-12:]
    of = {"kind": "sanitizer", "tool": tool, "backend": backend}
    return {**of, "clean": done.returncode == 0, "exit": done.returncode, "says": says}


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


def run_all(chosen: dict[str, tuple[int, Plan]], out: Path, commit: str, seconds: float) -> None:
    """A process per stage, as far as the time goes."""
    end = time.monotonic() + seconds
    for name, (most, plan) in chosen.items():
        left = end - time.monotonic()
        if left < 20:
            print(f"out of time before {name}; run the same command again to go on", flush=True)
            return
        if set(plan) <= ledger.done(ledger.read(out), ledger.source()):
            continue
        print(f"---- {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--out", str(out), "--commit", commit]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(min(most, left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = -9
        if code not in (0, 1):
            failure = {"row": f"stage {name}", "stage": name, "error": f"ended with {code}", "commit": commit}
            ledger.append(out, {**failure, "source": ledger.source()})
            print(f"{name}: ended with {code}", flush=True)


def end_with(parent: int) -> None:
    """End this process and its group once ``parent`` has: what went on would spoil the times of the next run."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def dry_run(chosen: dict[str, tuple[int, Plan]], out: Path) -> int:
    """What would be measured; rows without figures go through a file of their own, as the real ones do."""
    source = ledger.source()
    known = ledger.done(ledger.read(out), source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        for name, (most, plan) in chosen.items():
            print(f"{name}, at most {most} s")
            for row in plan:
                print(f"  {row}{' (known)' if row in known else ''}")
            empty: Plan = {row: (lambda: {"kind": "dry"}) for row in plan}
            run = functools.partial(run_stage, name, empty, path, lambda: {"source": source}, dict)
            with contextlib.redirect_stdout(io.StringIO()):
                run()
                run()  # finds all of them known
        written = ledger.read(path)
    print(f"{len(written)} rows")
    print("\n".join(ledger.lines(ledger.verdicts([]))))
    return 0 if len(written) == sum(len(plan) for _, plan in chosen.values()) else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and time all on a GPU.")
    parser.add_argument("--minutes", type=float, default=9, help="no stage goes on after that (default: 9)")
    parser.add_argument("--out", type=Path, help="JSON lines; default: benchmarks/results/<gpu>.jsonl")
    parser.add_argument("--commit", help="what the rows say was measured; default: what git says")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"some of: {', '.join(stages())}")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="only show what would be measured")
    given = parser.parse_args(argv)
    unknown = {*(given.only or []), *([given.stage] if given.stage else [])} - set(stages())
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(stages())}")
    chosen = {name: of for name, of in stages().items() if given.only is None or name in given.only}
    if given.dry_run:
        return dry_run(chosen, given.out or ROOT / "benchmarks" / "results" / "none.jsonl")

    import torch

    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    out = (given.out or default_out(torch.cuda.get_device_name(0))).resolve()
    commit = given.commit or str(cases.provenance()["commit"])
    if given.stage:
        if os.getpgrp() == os.getpid():  # as run_all starts it
            threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        described = functools.partial(provenance, commit)
        return run_stage(given.stage, stages()[given.stage][1], out, described, lambda: query(CLOCKS))
    run_all(chosen, out, commit, 60 * given.minutes)
    table = ledger.verdicts(ledger.current(ledger.read(out)))
    goals = {"row": "goals", "kind": "goals", "goals": table, "commit": commit, "source": ledger.source()}
    ledger.append(out, goals)
    print("\n".join(ledger.lines(table)))
    return 0


def default_out(device: str) -> Path:
    """A file for every kind of GPU."""
    return ROOT / "benchmarks" / "results" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
