"""The Triton kernels for every architecture: they compile, spill next to nothing, and fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.6")

import compiled

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
BUILDS = tuple(compiled.everyday())
FIRST = {
    "sm_80-float16-forward-streamed", "sm_90-bfloat16-forward-stored-odd", "sm_90-tf32-forward-stored",
    "sm_100-bfloat16-forward-streamed", "gfx942-bfloat16-forward-stored", "sm_90-bfloat16-backward-stored",
}  # fmt: skip
"""Each vendor, dataflow and direction; the other builds take minutes."""
PARAMETERS = [
    pytest.param(build, id=str(build), marks=[] if str(build) in FIRST else pytest.mark.exhaustive) for build in BUILDS
]


def run(code: list[str], **environment: str) -> str:
    """Standard output of Python with Triton proper: this process has its interpreter."""
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(SUPPORT)]).strip(os.pathsep)
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, *code], env={**environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    return process.stdout


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Of the builds that this session tests."""
    here = [item for item in request.session.items if item.fspath == request.node.fspath]
    names = [str(item.callspec.params["build"]) for item in here if "build" in getattr(item, "fixturenames", ())]
    return {line["name"]: line for line in map(json.loads, run([str(SUPPORT / "compiled.py"), *names]).splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("build", PARAMETERS)
def test_compiles_and_fits(build: compiled.Build, lines: dict[str, dict[str, Any]]) -> None:
    assert lines[str(build)]["faults"] == [], lines[str(build)]


GOOD = {
    "rows": 64, "warps": 4, "programs": 2, "shared": 100 * 1024, "registers": 248,
    "spilled": {"STACK": 0, "LOCAL": 0}, "entries": 1, "counters": 1, "atomics": 2, "stores": True, "fenced": True,
    "tanh": True, "products": [["wgmma", ""], ["mma.sync", ""]],
}  # fmt: skip
BAD = [
    {"spilled": {"STACK": 48, "LOCAL": 0}}, {"shared": 114 * 1024}, {"shared": 228 * 1024, "programs": 1},
    {"registers": 255, "warps": 8}, {"warps": 32, "registers": 24, "programs": 3}, {"entries": 2}, {"counters": 2},
    {"counters": 0, "atomics": 0}, {"atomics": 3}, {"tanh": False}, {"stores": False}, {"fenced": False},
    {"products": [["mma.sync", ""]]}, {"products": []},
]  # fmt: skip


def test_a_few_spilled_bytes_are_allowed_on_hopper() -> None:
    found = {**GOOD, "spilled": {"STACK": compiled.MOST_SPILLED, "LOCAL": 0}}
    build = compiled.Build("sm_90", "bfloat16", "forward", compiled.STORED)
    assert not list(compiled.faults(build, found))
    others = {**found, "programs": 1, "shared": 64 * 1024, "products": [["mma.sync", ""]]}
    assert len(list(compiled.faults(replace(build, target="sm_80"), others))) == 1


@pytest.mark.parametrize("change", BAD, ids=str)
def test_faults_are_found(change: dict[str, Any]) -> None:
    build = compiled.Build("sm_90", "bfloat16", "forward", compiled.STORED)
    assert not list(compiled.faults(build, GOOD))
    assert list(compiled.faults(build, {**GOOD, **change}))


def test_true_float32_is_not_rounded() -> None:
    build, found = compiled.Build("sm_90", "float32", "forward", compiled.STORED), {**GOOD, "tanh": False}
    assert not list(compiled.faults(build, {**found, "products": []}))
    assert list(compiled.faults(build, {**found, "products": [["wgmma", ""], ["", "tf32"]]}))
    assert not list(
        compiled.faults(replace(build, precision="tf32"), {**found, "products": [["mma.sync", ""], ["", "tf32"]]})
    )
    assert list(compiled.faults(replace(build, precision="tf32"), {**found, "products": []}))


def test_another_batch_or_dropout_rate_is_not_another_kernel() -> None:
    """Triton compiles anew for an argument that becomes 1, or a multiple of 16; the last batch of an epoch is small."""
    found = json.loads(run(["-c", "import compiled, json; print(json.dumps(compiled.kernels_of_batches()))"]))
    assert {name: sharing for name, sharing in found.items() if len(sharing) > 1} == {}
