"""Costs that are counted instead of timed, against a record: ``python -m benchmarks.cost_baseline``.

They are the same on every run and under any load: memory, operators, FLOP, Python functions that a call runs, and
instructions of the native kernels under valgrind. The command prints every count that differs from
``cost_baseline.json``, and its exit status is then 1: a count that grew is a regression or has a reason, and one that
shrank has to be recorded, so that it cannot grow back. ``--update`` rewrites the file;
``tests/benchmarks/test_cost_baseline.py`` compares with it in CI.

A count is compared only where it depends on the same PyTorch, or the same compiler, as the recorded one. PyTorch's
operators are those that reach the dispatcher below autograd, views among them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grjca_kernels
from benchmarks.cases import DROPOUT
from grjca.measure import SHAPES, Shape, saved_bytes, threads
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused, cpu, cuda, keeping, native
from grjca_kernels import problem as problems
from grjca_kernels.triton_kernels import launch_config

RECORDED = Path(__file__).with_name("cost_baseline.json")
UPDATE = "python -m benchmarks.cost_baseline --update"
GATINGS = ("none", "flat", "hierarchical")
BATCH = 2  # of what autograd does: its memory is per sample, and its operators are the same for any
DTYPES = (torch.float32, torch.bfloat16)

Counts = dict[str, int]


@dataclass(frozen=True)
class Section:
    """Counts that depend on the same things.

    ``why_not()`` tells why they cannot be counted here, or None; ``made_by()`` what they depend on besides the sources.
    They may differ by a share of ``allowed``.
    """

    count: Callable[[], Counts]
    why_not: Callable[[], str | None]
    made_by: Callable[[], dict[str, str]]
    allowed: float = 0.0


def main(argv: list[str] | None = None) -> int:
    """Print every count that changed; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_baseline", description="Compare counts with the record."
    )
    parser.add_argument("--update", action="store_true", help=f"rewrite {RECORDED.name}")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="SECTION")
    arguments = parser.parse_args(argv)
    with threads(1):  # on these sizes, more would wait for each other
        return run(arguments.only, arguments.update)


def run(names: Iterable[str], update: bool) -> int:
    """Compare these sections, and record them if ``update``; the exit status."""
    recorded, changed = read(), 0
    for name in names:
        reason = why_not(name, {} if update else recorded)
        if reason is not None:
            print(f"{name}: not compared: {reason}")
            continue
        counts = SECTIONS[name].count()
        if name not in recorded:
            sentences = [f"{name}: nothing is recorded. Run {UPDATE}."]
        else:
            sentences = changes(name, recorded[name]["counts"], counts)
        print("\n".join(sentences) if sentences else f"{name}: {len(counts)} counts, as recorded")
        changed += len(sentences)
        if update:
            recorded[name] = {"made_by": SECTIONS[name].made_by(), "counts": counts}
    if update:
        kept = {name: recorded[name] for name in SECTIONS if name in recorded}
        RECORDED.write_text(json.dumps(kept, indent=2) + "\n")
        print(f"wrote {RECORDED}")
    return 0 if update else int(changed > 0)


# ---- the record


def read() -> dict[str, Any]:
    """Section -> what made its counts, and the counts."""
    return json.loads(RECORDED.read_text()) if RECORDED.exists() else {}


def why_not(name: str, recorded: dict[str, Any]) -> str | None:
    """Why a section cannot be counted here, or not be compared with what is recorded; or None."""
    section = SECTIONS[name]
    reason = section.why_not()
    if reason is not None or name not in recorded:
        return reason
    was, now = recorded[name]["made_by"], section.made_by()
    if was == now:
        return None
    made, here = (", ".join(f"{name} {value}" for name, value in by.items()) for by in (was, now))
    return f"the record was made by {made}, and here is {here}."


def changes(name: str, recorded: Counts, counts: Counts) -> list[str]:
    """A sentence for every count that is not the recorded one, or further off than is allowed."""
    result = []
    for key in dict.fromkeys([*recorded, *counts]):
        was, now = recorded.get(key), counts.get(key)
        if was is None or now is None:
            fate = f"is not recorded, and is {now}" if was is None else f"was {was}, and is no longer counted"
            result.append(f"{name}: {key} {fate}. If that is meant, run {UPDATE}.")
        elif abs(now - was) > SECTIONS[name].allowed * was:
            percent = f" ({100 * (now - was) / was:+.1f} %)" if was else ""
            result.append(f"{name}: {key} was {was}, and is {now}{percent}. {GREW if now > was else SHRANK}")
    return result


GREW = f"It grew: repair that, or, if it is meant, run {UPDATE} and say why in the commit."
SHRANK = f"It shrank: run {UPDATE}, so that it cannot grow back."


# ---- PyTorch


class Operators(TorchDispatchMode):
    """Counts the calls that reach the dispatcher, below autograd, within a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def eager() -> Counts:
    return dict(_of_autograd(GatedRJCAEager))


def fused() -> Counts:
    return dict(_of_autograd(GatedRJCAFused, backend="cpu"))


def _of_autograd(kind: type[GatedRJCAFused], **options: Any) -> Iterator[tuple[str, int]]:
    """Count the operators of a training step with dropout, without those that accumulate gradients."""
    for name, shape in _shapes():
        shape = replace(shape, batch=BATCH)
        block = shape.block(kind, dropout=DROPOUT, **options).train()
        inputs = shape.inputs(0, requires_grad=True)
        yield f"{name}, saved bytes", saved_bytes(lambda block=block, inputs=inputs: block(*inputs), block.parameters())
        with Operators() as operators, FlopCounterMode(display=False) as flop:
            output = block(*inputs)
        yield f"{name}, operators of the forward", operators.total
        yield f"{name}, FLOP of the forward", flop.get_total_flops()
        gradient, leaves = torch.ones_like(output), (*inputs, *block.parameters())
        with Operators() as operators, FlopCounterMode(display=False) as flop:
            torch.autograd.grad(output, leaves, gradient)
        yield f"{name}, operators of the backward", operators.total
        yield f"{name}, FLOP of the backward", flop.get_total_flops()


def python_calls() -> Counts:
    """Functions of the package that a call runs in Python, once what can be remembered is."""
    result: Counts = {}
    for gating in GATINGS:
        block, inputs = replace(TINY, gating=gating).block(GatedRJCAFused, backend="cpu"), TINY.inputs(0)
        for name, training in (("inference", False), ("training", True)):
            block.train(training)
            with torch.set_grad_enabled(training):
                before = block(*inputs)
                with calls_of_package() as called:
                    output = block(*inputs)
            result[f"{gating}, {name}"] = len(called)
        gradient = torch.ones_like(output)
        before.backward(gradient)
        with calls_of_package() as called:
            output.backward(gradient)
        result[f"{gating}, backward"] = len(called)
    return result


@contextlib.contextmanager
def calls_of_package() -> Iterator[list[str]]:
    """Names of the functions that run within a ``with`` block, on this thread."""
    called, folder = [], str(Path(grjca_kernels.__file__).parent)

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            called.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        yield called
    finally:
        sys.setprofile(None)


def _shapes() -> Iterator[tuple[str, Shape]]:
    for name, shape in SHAPES.items():
        for gating in GATINGS:
            yield f"{name} {gating}", replace(shape, gating=gating)


# ---- workspaces: of the whole batch, for they are only computed


def cpu_workspaces() -> Counts:
    """Bytes by thread count, of the instruction set that every processor has."""
    return {
        f"{name}, {count} threads, bytes": native.library.cpu_workspace(
            native.problem_of(described(shape), dtype), backward, count, "baseline"
        )
        for name, shape, dtype, backward in _launches()
        for count in (1, 2)
    }


DEVICE = launch_config.Device("cuda", 90, 132, 227 * launch_config.KIB)
RESIDENT = 2 * DEVICE.multiprocessors
"""An H100, and blocks of the CUDA C++ kernels that it holds at once, by two on a multiprocessor. Assumed: no plan asks
for a device."""


def triton_plans() -> Counts:
    """Bytes of the workspace, and how often the grid waits."""
    result = {}
    for name, shape, dtype, backward in _launches():
        options = {"backward": backward, "weights": backward, "tf32": False, "lengths": False}
        launch = launch_config.launch(described(shape), dtype, DEVICE, **options)
        result[f"{name}, bytes"] = (
            launch.activation_workspace * dtype.itemsize + 4 * launch.fp32_workspace + launch.bits
        )
        result[f"{name}, steps"] = launch.steps
    return result


def cuda_plans() -> Counts:
    """The same of the CUDA C++ kernels."""
    result = {}
    for name, shape, dtype, backward in _launches():
        options = {"tf32": False, "backward": backward, "weights": backward}
        launch = cuda.plan(described(shape), dtype, RESIDENT, **options)
        result[f"{name}, bytes"] = launch.workspace_bytes
        result[f"{name}, steps"] = launch.plan()["all_steps"]
    return result


def _launches() -> Iterator[tuple[str, Shape, torch.dtype, bool]]:
    for name, shape in _shapes():
        for dtype in DTYPES:
            for backward in (False, True):
                yield f"{name} {str(dtype).removeprefix('torch.')} {_direction(backward)}", shape, dtype, backward


def described(shape: Shape) -> problems.Problem:
    """The problem of a training step."""
    widths = (shape.dim_visual, shape.dim_audio)
    options = (shape.iterations, shape.gating, "released", DROPOUT, 0.1, shape.normalize, False)
    return problems.Problem(shape.batch, shape.length, widths, *options)


def _direction(backward: bool) -> str:
    return "backward" if backward else "forward"


# ---- instructions

TINY = Shape(20, 24, 12, 2, 2, normalize=True)
_MOST = keeping.all_pieces(described(TINY))
WITHOUT_AVX512 = ("avx2", "baseline")  # valgrind 3.19 does not know AVX-512
PROGRAM = r"""
# The native code without PyTorch, which under valgrind would take a minute to import.
import importlib.util, json, math, sys
from array import array
from types import SimpleNamespace

path, calls = sys.argv[1], json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("grjca_kernels._native", path)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
values = array("f", (math.sin(7 * i) for i in range(8192)))
made = 0

class Tensor:
    # As much of one as the native code asks for: contiguous, and never the same numbers twice.
    dtype = "torch.int64"  # the native code asks it of lengths and the seed alone
    def __init__(self, *shape, items=None):
        global made
        self.shape, made = shape, made + 1
        self.items = values[made : made + math.prod(shape)] if items is None else items
        assert len(self.items) == math.prod(shape)

    def stride(self):
        return tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def data_ptr(self):
        return self.items.buffer_info()[0]

native.use_tensors(Tensor, Tensor, False)
for of in calls:
    problem, isa, none = native.Problem(*of["problem"]), of["instruction_set"], [None, None]
    _, batch, length, widths, iterations, *_ = of["problem"]
    given, taken = ([Tensor(batch, length, d) for d in widths] for _ in range(2))
    count = native.cpu_workspace(problem, of["backward"], 1, isa)
    host = Tensor(count, items=array("b", bytes(count))), 1, isa, None
    count = native.cpu_kept_bytes(problem, isa)
    kept = Tensor(count, items=array("b", bytes(count))) if count else None
    call = SimpleNamespace(
        features=given, parameters=[Tensor(*shape) for shape in of["parameters"]], lengths=None,
        seed=Tensor(1, items=array("q", [1])), iterates=Tensor(iterations, batch, length, sum(widths)),
        outputs=taken, gates=[], kept=kept,
    )
    if of["backward"]:
        parameters = [Tensor(*shape) for shape in of["parameters"]]
        gradients = SimpleNamespace(outputs=given, iterates=none, gates=none, features=taken, parameters=parameters)
        native.cpu_backward(problem, call, gradients, host)
    else:
        native.cpu_forward(problem, call, host)
"""


# Of patterns, valgrind 3.19 follows the first for --toggle-collect and none for --dump-after.
CALLGRIND = [
    "--toggle-collect=grjca::cpu::*ward(*",
    *(
        f"--dump-after=grjca::cpu::{name}(grjca::Problem const&, grjca::Tensors const&, grjca::{results} const&, "
        "grjca::Resources const&)"
        for name, results in (("forward", "ForwardOutputs"), ("backward", "BackwardTensors"))
    ),
]


def instructions() -> Counts:
    """Count the native instructions of one call each, on one thread."""
    calls = {
        f"{gating}{', most is kept' * kept} {_direction(backward)}, {isa}": {
            "problem": ["float32", *astuple(replace(described(replace(TINY, gating=gating)), keep=kept * _MOST))],
            "parameters": [shape for _, shape in problems.expected_tensors(described(replace(TINY, gating=gating)))],
            "backward": backward,
            "instruction_set": isa,
        }
        for isa in WITHOUT_AVX512
        if isa in cpu.instruction_sets()
        for gating in GATINGS
        for kept in ((False, True) if gating == "flat" else (False,))
        for backward in (False, True)
    }
    return dict(zip(calls, callgrind([*calls.values()]), strict=True))


def callgrind(calls: list[dict[str, Any]]) -> list[int]:
    """Instructions of each call; RuntimeError with what valgrind said, where it did not count all."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--callgrind-out-file={folder}/counts", *CALLGRIND]
        program = [sys.executable, "-I", "-S", "-c", PROGRAM, native.library.__file__, json.dumps(calls)]
        ran = subprocess.run(["valgrind", "--tool=callgrind", *options, *program], capture_output=True, text=True)
        parts = [Path(folder, f"counts.{part}") for part in range(1, 1 + len(calls))]
        if (
            ran.returncode
            or Path(folder, f"counts.{1 + len(calls)}").exists()
            or not all(part.exists() for part in parts)
        ):
            raise RuntimeError(
                f"instructions: expected valgrind to count {len(calls)} calls of {native.library.__file__}, got status "
                f"{ran.returncode}. It needs the symbols of the library, which strip takes away. It said:\n"
                f"{ran.stderr[-2000:]}"
            )
        return [_total(part) for part in parts]


def _total(part: Path) -> int:
    found = re.search(r"^(?:summary|totals): (\d+)", part.read_text(), re.MULTILINE)
    if found is None or found[1] == "0":
        raise RuntimeError(f"instructions: expected a total in what callgrind wrote, got {found and found[0]!r}.")
    return int(found[1])


# ---- what decides


def of_torch() -> dict[str, str]:
    return {"torch": torch.__version__.partition("+")[0]}


def of_python() -> dict[str, str]:
    """The way to a tensor's memory is another before PyTorch 2.11; and up to 3.11 a comprehension is a function."""
    return {**of_torch(), "Python": ".".join(platform.python_version_tuple()[:2])}


def of_compiler() -> dict[str, str]:
    """The compiler has left its name in the library; the first is that of what it was linked by."""
    name = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", Path(native.library.__file__).read_bytes())
    compiler = name[0].decode() if name else "unknown"
    sets = " and ".join(isa for isa in WITHOUT_AVX512 if isa in cpu.instruction_sets())
    return {"processor": platform.machine(), "instruction sets": sets, "compiler": compiler}


def without_valgrind() -> str | None:
    return cpu.why_not() or (None if shutil.which("valgrind") else "valgrind is not installed.")


def without_cuda() -> str | None:
    built = cpu.why_not() is None and hasattr(native.library, "CudaLaunch")
    return None if built else "the CUDA C++ kernels are not built; that takes nvcc."


SECTIONS = {
    "eager": Section(eager, lambda: None, of_torch),
    "fused": Section(fused, cpu.why_not, of_torch),
    "python calls": Section(python_calls, cpu.why_not, of_python),
    "cpu workspace": Section(cpu_workspaces, cpu.why_not, lambda: {"processor": platform.machine()}),
    "triton plan": Section(triton_plans, lambda: None, dict),
    "cuda plan": Section(cuda_plans, without_cuda, dict),
    "instructions": Section(instructions, without_valgrind, of_compiler, allowed=0.02),
}

if __name__ == "__main__":
    sys.exit(main())
