"""Several processes"""

import subprocess
import sys

import pytest
import torch
from pytest import fixture, mark

import two_processes
from two_processes import WORLD, one_process


@fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    """Of every job, on every process."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, two_processes.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True) for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f"outcomes-{rank}.pt") for rank in range(WORLD)]


def of(outcomes, job: str) -> list[dict[str, torch.Tensor]]:
    found = [outcome[job] for outcome in outcomes]
    for outcome in found:
        if isinstance(outcome, str) and "ImportError" in outcome:
            pytest.skip(f"this PyTorch has no FSDP2: {outcome}")
        assert not isinstance(outcome, str), outcome
    return found


@mark.parametrize("job", ["ddp", "ddp-static"])
def test_ddp(outcomes, job):
    """`DistributedDataParallel`, two processes over gloo: the weights of one process on the joint batch"""
    for outcome in of(outcomes, job):
        torch.testing.assert_close(outcome, one_process(), rtol=1e-9, atol=1e-9)


@mark.parametrize("job", ["fsdp2", "fsdp2-kept"])
def test_fsdp2(outcomes, job):
    """FSDP2, `fully_shard` of block and model, two processes: the weights of one process on the joint batch"""
    for outcome in of(outcomes, job):
        # A gradient that is all but 0 is rounding, of which Adam makes a step.
        torch.testing.assert_close(outcome, one_process(clip=True), rtol=1e-7, atol=1e-7)


def test_fsdp2_mixed_precision(outcomes):
    """FSDP2 with `MixedPrecisionPolicy(param_dtype=torch.bfloat16)`: trains, with parameters in float32"""
    for outcome in of(outcomes, "fsdp2-mixed"):
        losses = outcome.pop("losses")
        assert losses[-1] < 0.8 * losses[0]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in outcome.values())


def test_sharded_projection(outcomes):
    """`fully_shard` of one projection alone: refused with a sentence that says to shard the whole block"""
    for outcome in of(outcomes, "sharded-projection"):
        assert outcome, "not refused"
        words = bytes(outcome["words"].tolist()).decode()
        assert "got a DTensor" in words and "fully_shard to the whole block" in words
