"""``python -m benchmarks.roofline --phases``: what each phase has to do, and the table."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import phases, roofline
from grjca.measure import Shape
from grjca_kernels import cpu, flops, keeping, native
from grjca_kernels.problem import GATINGS, Problem

needs_native = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
TINY = Problem(5, 2, (3, 1), 2, "flat", "released", 0.6, 1.0, False, False)
LIGHT = {"pack", "load"}
CSRC = Path(__file__).parents[2] / "csrc" / "cpu"


def kept(problem, how):
    return replace(problem, keep=keeping.choose(problem, how, torch.float32))


def counted(problem, name):
    """Multiply-adds of one sample, where there are any."""
    return {
        phase: count / (2 * problem.batch) for phase, count in phases.flop(problem)[name].items() if phase not in LIGHT
    }


def test_counts_by_hand():
    """L = 2, d = 3 + 1, two iterations, one gate of three ways for each modality.

    In an iteration J takes 2 * 16, K 4 * 4, V 2 * (9 + 1), and K J, V C and U 2 * 16 each; the gates take 2 * 4 * 3.
    """
    least, most = kept(TINY, "least"), kept(TINY, "most")
    forward = {"project_joint": 64, "project_key": 32, "project_value": 40, "attend": 128, "output": 64, "gate": 24}
    assert counted(least, "forward") == counted(most, "forward") == forward
    always = {
        "gates_backward": 48,
        "attended_backward": 64,
        "value_backward": 40,
        "key_backward": 32,
        "joint_backward": 64,
        "sum_weights": 64 + 32 + 40 + 64 + 24,
    }
    of_least = {"project_joint": 64, "project_key": 32, "project_value": 40, "attend": 128, "output_backward": 64}
    assert counted(least, "backward") == {**always, **of_least, "correlation_backward": 5 * 64}
    of_most = dict.fromkeys(of_least, 0)
    assert counted(most, "backward") == {**always, **of_most, "correlation_backward": 4 * 64}


def test_what_is_held_is_not_computed_again():
    """C is held from attend() on, where the sequence is long enough; without attend() nothing holds it."""
    long = replace(TINY, length=phases.HELD_FROM)
    product = 2 * long.length * 16
    hidden, correlation = keeping.HIDDEN, keeping.CORRELATION
    for keep, attend, backward in ((0, 2, 4), (hidden, 0, 5), (correlation, 1, 4), (hidden + correlation, 0, 4)):
        found = counted(replace(long, keep=keep), "backward")
        assert (found["attend"], found["correlation_backward"]) == (attend * product, backward * product)


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("joint", ["projected", "raw"])
@pytest.mark.parametrize("length", [2, 64])
def test_phases_add_up_to_what_a_call_costs(gating, joint, length):
    problem = replace(TINY, gating=gating, joint=joint, length=length)
    needed = [True] * 100
    for keep in range(64):
        problem = replace(problem, keep=keep if joint == "projected" else keep & ~keeping.JOINT)
        found = {name: sum(of_phase.values()) for name, of_phase in phases.flop(problem).items()}
        assert found["forward"] == flops.forward(problem)
        again = length < phases.HELD_FROM and not problem.keep & (keeping.HIDDEN | keeping.CORRELATION)  # K J
        extra = again * 2 * problem.batch * problem.iterations * length * problem.width**2
        assert found["backward"] == flops.backward(problem, needed) + extra


@needs_native
def test_every_phase_is_known():
    known = {phase for of_phase in phases.flop(TINY).values() for phase in of_phase}
    assert known == set(native.library.PhaseTimes().seconds)


@pytest.mark.skipif(not CSRC.exists(), reason="needs the sources")
@pytest.mark.parametrize(
    ("file", "constant", "value"),
    [("backward_memory.h", "kHeldFrom", phases.HELD_FROM), ("workspace.h", "kGroup", phases.GROUP)],
)
def test_constants_are_those_of_the_kernels(file, constant, value):
    found = re.findall(rf"\b{constant} = (\d+);", (CSRC / file).read_text())
    assert found == [str(value)]


def test_who_takes_samples():
    """Groups of samples have about 256 frames. There are four for each thread, or as many for one thread as for all."""
    small = replace(TINY, length=128, batch=4)  # two groups
    assert [phases.of_own(small, threads) for threads in (1, 2, 3)] == [True, True, False]
    by_batch = {batch: phases.of_own(replace(small, batch=batch), 2) for batch in (0, 1, 3, 5, 13, 15, 17)}
    assert by_batch == {0: False, 1: False, 3: True, 5: False, 13: False, 15: True, 17: True}


@needs_native
def test_the_table(monkeypatch, capsys):
    pytest.importorskip("psutil")
    monkeypatch.setattr(roofline, "SHAPES", {"one": Shape(9, 6, 5, 2, 3, "flat"), "two": Shape(4, 7, 6, 1, 2)})
    monkeypatch.setattr(roofline, "one_tile", lambda: 100.0)
    monkeypatch.setattr(roofline, "THREADS", 1)
    monkeypatch.setattr(phases, "SECONDS", 0)
    assert roofline.main(["--phases", "one"]) == 0
    out = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| one")]
    assert {tuple(row[:3]) for row in cells} == {
        ("one, B = 3", dtype, name) for dtype in ("float32", "bfloat16") for name in ("forward", "backward")
    }
    for row in cells:
        if row[3].startswith("total"):
            assert float(row[4]) <= 1.01 * float(row[3].split()[2])  # the parts take no longer than the whole
            assert row[6] and row[7]
    assert [row[3] for row in cells].count("correlation_backward") == 2
    assert "torch " in out.splitlines()[0] and "100 GFLOP/s" in out and "| two" not in out
