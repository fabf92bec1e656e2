"""The Triton kernels compiled without a GPU, and what the compiler says of them.

``python tests/support/compiled.py [NAME...]`` compiles the named builds, or else every one, and prints a line of JSON
for each; it fails if one does not do as it must. It is a process of its own, because the tests run with
TRITON_INTERPRET=1, which makes another library of Triton.

The host code is the real one: a build calls launch.forward or launch.backward on tensors of its case, and where they
would launch a kernel, that kernel is compiled for these very arguments instead. Two things stand in for what a machine
without a GPU lacks: Triton's driver, which names the target, and ``launch.device_of``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cases import Case
from grjca_kernels import problem as problems
from grjca_kernels.call import Call, Gradients
from grjca_kernels.triton_kernels import launch_config

PRECISIONS = {  # dtype, and whether products of float32 may use TF32
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "float32": (torch.float32, False),
}


@dataclass(frozen=True)
class Hardware:
    """The limits of a chip; all but ``device`` are those of one multiprocessor."""

    device: launch_config.Device
    shared: int  # bytes
    registers: int = 64 * 1024
    threads: int = 2048
    warp: int = 32
    reserved: int = launch_config.KIB  # bytes of shared memory that a block takes beside its own


def _nvidia(capability: int, multiprocessors: int, shared: int, threads: int = 2048) -> Hardware:
    device = launch_config.Device("cuda", capability, multiprocessors, (shared - 1) * launch_config.KIB)
    return Hardware(device, shared * launch_config.KIB, threads=threads)


HARDWARE = {  # A100, A10, L4, H200, B200, RTX PRO 6000 and MI300X, by the vendors' programming guides
    "sm_80": _nvidia(80, 108, 164),
    "sm_86": _nvidia(86, 72, 100, 1536),
    "sm_89": _nvidia(89, 58, 100, 1536),
    "sm_90": _nvidia(90, 132, 228),
    "sm_100": _nvidia(100, 148, 228),
    "sm_120": _nvidia(120, 188, 100, 1536),
    "gfx942": Hardware(
        launch_config.Device("hip", 0, 304, 64 * launch_config.KIB),
        64 * launch_config.KIB,
        128 * 1024,
        warp=64,
        reserved=0,
    ),
}


# ---- what is compiled


@dataclass(frozen=True)
class Build:
    """One kernel. ``everything``: on request also the gates and iterates, and features that have gaps."""

    target: str
    precision: str
    direction: str
    case: Case
    everything: bool = True

    def __str__(self) -> str:
        return f"{self.target}-{self.precision}-{self.direction}-{self.case}"


def _heavy(name: str, length: int, widths: tuple[int, ...]) -> Case:
    """All that costs registers."""
    lengths = (length,) * 8  # only that there are some is looked at
    return Case(name, 8, length, widths, 3, "hierarchical", normalize=True, dropout=0.5, lengths=lengths)


LONGEST = launch_config.STREAM_FRAMES
STREAMED, STORED = _heavy("streamed", LONGEST, (512, 512)), _heavy("stored", 304, (256, 128))
UNEVEN = (  # no row of W_k is aligned
    _heavy("streamed-uneven", LONGEST - 1, (512, 256)),
    _heavy("stored-uneven", 301, (256, 128)),
)
ODD = (  # nothing is aligned, so that all copies pass through registers
    _heavy("streamed-odd", LONGEST - 1, (101, 67, 33)),
    _heavy("stored-odd", 301, (101, 67, 33)),
)
SHORT = _heavy("streamed-short", 16, (512, 512))
LIGHT = tuple(
    Case(f"{form}-{gating}-{length}", 8, length, (256, 128), iterations, gating, form)
    for form in problems.FORMS
    for gating, iterations, length in (("none", 1, 16), ("flat", 3, 304), ("dynamic", 2, 304), ("hierarchical", 2, 16))
)
DEEP = Case("raw-T16", 8, 16, (64, 32), problems.MAX_ITERATIONS, "hierarchical", joint="raw")
NAMED = (
    Case("abaw", 12, 300, (256, 128), 2, "flat", normalize=True),
    Case("clip", 64, 16, (512, 512), 2, "dynamic", dropout=0.5),
    Case("light", 32, 300, (128, 64), 3, "flat"),
    Case("long", 8, 1024, (512, 512), 2, "flat"),
)


def every_build() -> Iterator[Build]:
    """An hour of compiling."""
    for direction in ("forward", "backward"):
        for target in HARDWARE:
            for precision in PRECISIONS:
                for case in (STREAMED, STORED, SHORT, *UNEVEN, *ODD, DEEP):
                    yield Build(target, precision, direction, case)
            for case in (*LIGHT, *NAMED):
                yield Build(target, "bfloat16", direction, case, everything=False)


def everyday() -> Iterator[Build]:
    """Yield the builds that the tests compile, in minutes.

    Both directions have every precision, dataflow and vendor, and every alignment of rows is there; the others of
    :func:`every_build` are variations. A backward holds the phases of the forward but for the last ones, and takes five
    times as long; those of Hopper take twice as long again.
    """
    for target, precision, *cases in (
        ("sm_80", "float16", STREAMED),
        ("sm_90", "bfloat16", UNEVEN[1], *ODD, DEEP),
        ("sm_90", "tf32", STORED),
        ("sm_90", "float32", STREAMED),
        ("sm_100", "bfloat16", STREAMED),
        ("gfx942", "bfloat16", STORED),
    ):
        for case in cases:
            yield Build(target, precision, "forward", case)
    for target, precision, case in (
        ("sm_80", "float16", STREAMED),
        ("sm_89", "tf32", UNEVEN[0]),
        ("sm_90", "bfloat16", STORED),
        ("gfx942", "float32", STORED),
    ):
        yield Build(target, precision, "backward", case)
    abaw, clip, *_ = NAMED
    paper = next(case for case in LIGHT if case.form == "paper" and case.gating == "none")
    for direction, case in (("forward", abaw), ("forward", clip), ("backward", paper)):
        yield Build("sm_90", "bfloat16", direction, case, everything=False)


# ---- compiling


class Driver:
    """Triton's driver, where there is none. Every target is another device, since Triton keeps kernels by device."""

    def __init__(self, name: str) -> None:
        from triton.backends.compiler import GPUTarget

        device = HARDWARE[name].device
        architecture = device.capability if device.kind == "cuda" else name
        self.target, self.device = GPUTarget(device.kind, architecture, HARDWARE[name].warp), list(HARDWARE).index(name)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class Compiling:
    """Stands for a kernel: what would launch it compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self.programs, self.warps, self.constants = grid[0], options["num_warps"], arguments[-1]
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def call(build: Build) -> Compiling:
    """The kernels that the host code launches."""
    import triton

    from grjca_kernels.triton_kernels import launch

    triton.runtime.driver.set_active(Driver(build.target))
    dtype, tf32 = PRECISIONS[build.precision]
    device = HARDWARE[build.target].device
    device = launch.as_compiled(device) if device.kind == "cuda" else device
    launch.device_of = lambda x: device
    launch.allows_tf32 = lambda: tf32
    name = f"{build.direction}_kernel"
    original = getattr(launch, name)
    kernel = Compiling(original)
    setattr(launch, name, kernel)
    try:
        getattr(launch, build.direction)(*arguments(build, dtype))
    finally:
        setattr(launch, name, original)
    return kernel


def arguments(build: Build, dtype: torch.dtype) -> tuple[Any, ...]:
    """The call, and gradients for a backward: tensors that hold nothing."""
    case, everything = build.case, build.everything
    dropout = case.dropout if case.form == "released" else 0.0
    problem = problems.Problem(
        case.batch, case.length, case.widths, case.iterations, case.gating, case.form, dropout, case.temperature,
        case.normalize, case.shared, case.joint,
    )  # fmt: skip
    like, step = torch.empty(0, dtype=dtype), 2 if everything else 1
    features = [like.new_empty(case.batch, case.length, step * width)[..., ::step] for width in case.widths]
    parameters = [like.new_empty(16) for _ in problems.expected_tensors(problem)]
    lengths = None if case.lengths is None else torch.empty(case.batch, dtype=torch.int64)
    seed = torch.empty(1, dtype=torch.int64) if problem.dropout else None
    iterates = like.new_empty(case.iterations, case.batch, case.length, problem.width)
    gates = [like.new_empty(case.batch, case.length, sum(problem.gate_ways)) for _ in features] * everything
    called = Call(problem, features, parameters, lengths, seed, outputs=features, iterates=iterates, gates=gates)
    if build.direction == "forward":
        return (called,)
    none = [None] * len(features)
    of_iterates = [like.new_empty(case.iterations, *x.shape) for x in features] if everything else none
    return called, Gradients(features, of_iterates, gates or none, features, parameters)


def key_of(build: Build) -> str:
    """Return Triton's cache key of the compiled kernel, without compiling."""
    from triton.runtime.jit import JITFunction

    with mock.patch.object(JITFunction, "_do_compile", lambda kernel, key, *rest: key):
        return call(build).compiled


def kernels_of_batches(target: str = "sm_90", precision: str = "bfloat16") -> dict[str, list[list[int]]]:
    """For every model of ``NAMED`` and direction its batch sizes, those together that run the same kernel.

    Each with another dropout rate, if there is dropout: of 0.5 the threshold is 2^15.
    """
    found = {}
    for case in NAMED:
        for direction in ("forward", "backward"):
            sharing: dict[str, list[int]] = {}
            for i, batch in enumerate((1, 2, 3, 7, 12, 16, 31, 32, 64, 100, 512)):
                varied = replace(case, batch=batch, dropout=(0.1, 0.3, 0.5)[i % 3] if case.dropout else 0.0)
                build = Build(target, precision, direction, varied, everything=False)
                sharing.setdefault(key_of(build), []).append(batch)
            found[f"{case}-{direction}"] = list(sharing.values())
    return found


def compile_one(build: Build) -> dict[str, Any]:
    """The content of one line of JSON."""
    kernel = call(build)
    asm = kernel.compiled.asm
    code = asm.get("ptx") or asm["amdgcn"]
    atomics = re.findall(r"\b(?:atom|red)\.\S+ +.*?\[ *(%\w+)", code) or re.findall(
        r"atomicrmw \w+ ptr\S* (?:addrspace\(1\) )?(%\w+)", asm["llir"]
    )
    found = {
        "name": str(build),
        "rows": kernel.constants.block_m,
        "warps": kernel.warps,
        "programs": -(-kernel.programs // HARDWARE[build.target].device.multiprocessors),
        "shared": kernel.compiled.metadata.shared,
        **(_of_cubin(asm["cubin"]) if "cubin" in asm else _of_amdgcn(code)),
        "entries": len(re.findall(r"^\s*(?:\.visible )?\.(?:entry|amdhsa_kernel) ", code, re.MULTILINE)),
        "counters": len(set(atomics)),
        "atomics": len(atomics),
        "stores": "cubin" in asm or waits_for_stores(code),
        "fenced": fenced(code),
        "tanh": "tanh.approx" in code,
        "products": sorted(set(re.findall(PRODUCTS, code))),
    }
    return {**found, "faults": list(faults(build, found))}


PRODUCTS = r"\b(wgmma|tcgen05\.mma|mma\.sync|v_mfma\w*xf32|v_mfma)|[.:](tf32)\b"
"""Instructions of tensor cores, and what says that they round their operands to TF32."""


def _of_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers of a thread, and what went to memory for want of them."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage.pop("REG"), "spilled": usage}


def _of_amdgcn(code: str) -> dict[str, Any]:
    notes = {name: int(number) for name, number in re.findall(r"\.(\w+): +(\d+)$", code, re.MULTILINE)}
    spilled = ("vgpr_spill_count", "private_segment_fixed_size")  # scalars go to vector registers, not to memory
    return {"registers": notes["vgpr_count"], "spilled": {name: notes[name] for name in spilled}}


def fenced(ptx: str) -> bool:
    """Return whether every wgmma that comes after a wait for cp.async comes after a fence, too."""
    pending = False
    for found in re.finditer(r"\b(cp\.async\.wait_group|fence\.proxy\.async|wgmma\.mma_async|tcgen05\.mma)\b", ptx):
        if pending and found[1] in ("wgmma.mma_async", "tcgen05.mma"):
            return False
        pending = found[1] == "cp.async.wait_group" or (pending and found[1] != "fence.proxy.async")
    return True


def waits_for_stores(amdgcn: str) -> bool:
    """Return whether in every wave no more than local code stands between a wait for its stores and the barrier of the
    program, before the atomic that tells the grid."""
    before = amdgcn[: re.search(r"\b(?:global|flat)_atomic_\w+", amdgcn).start()].splitlines()  # type: ignore[union-attr]
    barrier = max(i for i, line in enumerate(before) if "s_barrier" in line)
    since = before[max(i for i, line in enumerate(before[:barrier]) if "vmcnt(0)" in line) : barrier]
    return not any(re.search(r"(?:global|flat|buffer)_store|s_c?branch|^\S+:", line) for line in since)


# ---- what must hold

MOST_SPILLED = 40
"""Bytes of a thread on Hopper. Phases that are called instead of inlined, or smaller tiles, would cost more."""


def faults(build: Build, found: dict[str, Any]) -> Iterator[str]:
    """The faults of a build, in words."""
    hardware, programs = HARDWARE[build.target], found["programs"]
    most = MOST_SPILLED if build.target == "sm_90" else 0
    for name, number in found["spilled"].items():
        if number > most:
            yield f"{name} is {number}: there are too few registers"
    if found["shared"] > hardware.device.shared_memory:
        yield f"{found['shared']} bytes of shared memory, {hardware.device.shared_memory} can be had"
    # A cooperative launch fails unless all programs of a multiprocessor are resident at once.
    if programs * (found["shared"] + hardware.reserved) > hardware.shared:
        yield f"{programs} programs on a multiprocessor, too many for its shared memory"
    threads = programs * found["warps"] * hardware.warp
    if threads > hardware.threads or threads * -(-found["registers"] // 8) * 8 > hardware.registers:
        yield f"{threads} threads with {found['registers']} registers on a multiprocessor, too many"
    if found["entries"] != 1:
        yield f"{found['entries']} entry points"
    if found["counters"] != 1 or found["atomics"] > 2:
        yield f"{found['atomics']} atomics on {found['counters']} addresses; the barrier needs two, on one"
    short = build.precision in ("bfloat16", "float16")
    if not found["stores"]:
        yield "a wave reaches the grid barrier before its stores are done"
    if not found["fenced"]:
        yield "no fence between cp.async and wgmma"
    if found["tanh"] != (short and hardware.device.kind == "cuda"):
        yield f"the approximate tanh is {'used' if found['tanh'] else 'not used'}"
    used = {instruction for pair in found["products"] for instruction in pair if instruction}
    yield from _products(build, found["rows"], used)


WHOLE_WARPGROUPS = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}  # for tiles of 64 rows or more


def _products(build: Build, rows: int, used: set[str]) -> Iterator[str]:
    """16-bit and TF32 products are on tensor cores, true float32 is not rounded for them."""
    rounded = {"tf32", "v_mfma_xf32"} & used
    if build.precision == "float32" and (rounded or used - {"v_mfma"}):
        yield f"float32 is computed by {', '.join(sorted(used))}"
    expected = "v_mfma" if build.target == "gfx942" else "mma.sync"
    expected = WHOLE_WARPGROUPS.get(build.target, expected) if rows >= 64 else expected
    if build.precision in ("bfloat16", "float16") and expected not in used:
        yield f"products are computed by {', '.join(sorted(used)) or 'no tensor core'}"
    if build.precision == "tf32" and build.target != "gfx942" and "tf32" not in used:
        yield "no product uses TF32"


# ---- the process


def _line(build: Build) -> str:
    torch.set_num_threads(1)
    try:
        return json.dumps(compile_one(build))
    except Exception as error:  # of a compiler: reported with the build, and the others go on
        while error.__cause__ is not None:
            error = error.__cause__
        return json.dumps({"name": str(build), "faults": [f"{type(error).__name__}: {str(error)[-500:]}"]})


def main(names: list[str]) -> int:
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a sixth of the time
    os.environ.pop("TRITON_INTERPRET", None)
    builds = {str(build): build for build in every_build()} | {str(build): build for build in everyday()}
    failed = False
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool,
    ):
        os.environ["TRITON_CACHE_DIR"] = cache
        for line in pool.map(_line, [builds[name] for name in names or builds]):
            print(line, flush=True)
            failed = failed or bool(json.loads(line)["faults"])
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
