"""The processor's ceilings: bounds on the kernels, and that every ceiling can be measured."""

import shutil

import pytest

from benchmarks import roofline
from benchmarks.roofline import Ceilings
from grjca.measure import Shape
from grjca_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.instruction_sets() or not shutil.which("c++"), reason="no kernels or compiler")


def test_bounds_by_hand():
    """L = 2, d_v = 3, d_a = 1, one iteration, no gates.

    Weights: W_q 16 + 4, W_k twice 4 + 2, W_v 9 + 3 and 1 + 1, W_o 12 + 3 and 4 + 1: 66. Inputs and outputs: 8 each.
    Products: J 32, K 12 + 4, V 18 + 2, and K J, V C, U 24 + 8 each: 164, twice. tanh: C 16, V C 8, for two modalities.
    """
    shape = Shape(2, 3, 1, 1, 1)
    forward = roofline.bounds(shape, "forward", Ceilings(memory=1.0, matrix=2.0, tanh=0.1))
    assert forward == pytest.approx((328e-6, 164e-6, 320e-6))
    training = roofline.bounds(shape, "training step", Ceilings(1.0, 1.0, 1.0))  # all twice, but products three times
    assert training == pytest.approx((2 * 328e-6, 3 * 328e-6, 32e-6))


def test_the_table(monkeypatch, capsys):
    pytest.importorskip("psutil")
    small = {"one": Shape(9, 6, 5, 2, 3, "flat", normalize=True), "two": Shape(4, 7, 6, 1, 2)}
    values = {"SHAPES": small, "SECONDS": 0.01, "FEWEST": 2, "MOST": 2, "COPIED": 1 << 16, "VALUES": 64, "TERMS": (64,)}
    for name, value in {**values, "THREADS": 2}.items():
        monkeypatch.setattr(roofline, name, value)
    assert roofline.main([]) == 0
    out = capsys.readouterr().out
    assert " GB/s, " in out and " G tanh/s at best" in out
    lines = [line.split(" | ")[:3] for line in out.splitlines() if line.startswith(("| one", "| two"))]
    assert ["| one, B = 3", "training step", "fused"] in lines and len(lines) == 8
