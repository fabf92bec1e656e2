"""The CUDA C++ kernels as nvcc made them: all are there, spill nothing, and two blocks fit on a multiprocessor."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import cuda_build
from cuda_build import KERNELS, KIB, REGISTERS, SHARED, Built, count
from grjca_kernels import cuda, native
from grjca_kernels.problem import Problem

pytestmark = [
    pytest.mark.skipif(cuda_build.nvcc() is None, reason="needs nvcc, which compiles the CUDA C++ kernels"),
    pytest.mark.skipif(not Path(__file__).parents[2].joinpath("csrc").exists(), reason="needs the sources"),
]
NAMES = getattr(native.library, "cuda_architectures", "") or "80;90"
ALL = [f"{kernel}-sm_{name}" for kernel in KERNELS for name in NAMES.split(";")]
OLDEST = min((name for name in NAMES.split(";") if name.isdecimal()), key=int, default=None)


def test_where_nvcc_is_the_kernels_are_built():
    assert native.missing is None
    assert native.library.cuda_architectures, "nvcc is here, and there is no CUDA part; see what the install said"


@pytest.fixture(scope="module")
def kernels() -> dict[str, Built]:
    return {str(one): one for one in cuda_build.built()}


@pytest.fixture(scope="module")
def ptx() -> dict[tuple[str, str], Counter[str]]:
    return cuda_build.ptx()


def test_all_are_there(kernels, ptx):
    assert sorted(kernels) == sorted(ALL)
    assert set(ptx) == {(kernel, f"sm_{OLDEST}") for kernel in KERNELS if OLDEST}, "PTX, for later chips"


@pytest.fixture(scope="module")
def block() -> dict[str, int]:
    """The resources of a block, by any plan."""
    problem = Problem(1, 1, (1, 1), 1, "none", "paper", 0.0, 1.0, False, False)
    return cuda.plan(problem, torch.float32, 1, tf32=False, backward=False, weights=False).plan()


@pytest.mark.parametrize("name", ALL)
def test_it_fits_into_registers(kernels, block, name):
    one = kernels[name]
    assert (one.stack, one.local) == (0, 0), "there are too few registers"
    granted = -(-one.registers // 8) * 8
    assert block["sharing"] * block["threads"] * granted <= REGISTERS


def test_it_fits_into_shared_memory(kernels, block):
    static = max(one.shared for one in kernels.values())
    assert static <= KIB, "what a block takes beside its own"
    for architecture, (kib, shared_by_two) in SHARED.items():
        blocks = block["sharing"] if shared_by_two else 1
        assert blocks * (block["shared"] + KIB) <= kib * KIB, architecture


@pytest.mark.parametrize("kernel", KERNELS)
def test_later_chips_have_ptx_of_the_right_instructions(ptx, kernel):
    """Products on tensor cores, operands copied past the registers, an approximate tanh for 16 bits alone."""
    words, precision = ptx[kernel, f"sm_{OLDEST}"], kernel.partition("-")[2]
    operand = {"bfloat16": "bf16", "float16": "f16"}.get(precision, "tf32")  # float32: of several TF32 parts
    products = [word for word in words if word.startswith("mma.sync")]
    assert products and all(f".{operand}.{operand}." in word for word in products), products
    short = precision in ("bfloat16", "float16")
    assert (count(words, "ldmatrix") > 0) == (count(words, "tanh.approx") > 0) == short
    assert count(words, "cp.async.cg") > 0
    atomics = count(words, "atom") + count(words, "red")
    assert 1 <= atomics <= 2, "the barrier's alone: sums are taken in a fixed order"


def test_the_runtime_is_nobody_elses():
    """PyTorch brings a CUDA runtime of its own; symbols that are visible would be taken from it."""
    symbols = subprocess.run(["nm", "-D", cuda_build.library()], capture_output=True, text=True, check=True).stdout
    assert "PyInit__native" in symbols
    assert [line for line in symbols.splitlines() if " cuda" in line or "grjca" in line] == []
