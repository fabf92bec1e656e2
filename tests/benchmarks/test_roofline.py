"""Where the kernels stand below the ceilings of the processor: counts, bounds, what is refused, and the plot."""

import itertools
import shutil
from dataclasses import asdict

import pytest
import torch

from benchmarks import roofline
from benchmarks.cases import provenance
from benchmarks.roofline import Ceilings
from benchmarks.row_files import file_of, keep, read
from grjca.measure import Shape
from grjca_kernels import GatedRJCAFused, cpu

pytest.importorskip("safetensors")

SMALL = {"one": Shape(9, 6, 5, 2, 3, "flat", normalize=True), "two": Shape(4, 7, 6, 1, 2)}


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    values = {"SHAPES": SMALL, "RESULTS": tmp_path, "SECONDS": 0.01, "FEWEST": 2, "COPIED": 1 << 16}
    for name, value in {**values, "SIZES": (32, 64), "VALUES": (64, 128), "THREADS": 1}.items():
        monkeypatch.setattr(roofline, name, value)
    monkeypatch.setattr(roofline, "source", lambda: "these")  # somebody may be editing them


def written():
    return read(file_of(roofline.RESULTS, provenance()))


def points(rows):
    return [row for row in rows if "bounds_ms" in row]


# ---- bounds


def test_bounds_by_hand():
    """L = 2, d_v = 3, d_a = 1, one iteration, no gates.

    Weights: W_q 16 + 4, W_k twice 4 + 2, W_v 9 + 3 and 1 + 1, W_o 12 + 3 and 4 + 1: 66. Inputs and outputs: 8 each.
    Products: J 32, K 12 + 4, V 18 + 2, and K J, V C, U 24 + 8 each: 164, twice. tanh: C 16, V C 8, for two modalities.
    """
    shape = Shape(2, 3, 1, 1, 1)
    found = roofline.bounds(shape, "forward", Ceilings(memory=1.0, matrix=2.0, tanh=0.1))
    assert (found["bytes"], found["flop"], found["tanhs"]) == (4 * 82, 328, 32)
    assert found["bounds_ms"] == {
        "memory": pytest.approx(328e-6),
        "matrix": pytest.approx(164e-6),
        "tanh": pytest.approx(320e-6),
        "matrix + tanh": pytest.approx(484e-6),
    }
    assert (found["binds"], found["bound_ms"]) == ("memory", pytest.approx(328e-6))
    assert roofline.bounds(shape, "forward", Ceilings(2.0, 2.0, 0.1))["binds"] == "tanh"
    found = roofline.bounds(shape, "forward", Ceilings(2.0, 0.5, 0.1))
    assert (found["binds"], found["bound_ms"]) == ("matrix", pytest.approx(656e-6))
    found = roofline.bounds(shape, "training step", Ceilings(2.0, 0.5, 0.1))  # all twice, but the products: three times
    assert (found["bytes"], found["flop"], found["tanhs"]) == (2 * 4 * 82, 3 * 328, 32)


def test_the_fastest_of_a_kind_is_the_ceiling():
    rows = [
        {"row": "ceiling memory, torch copy_", "GB/s": 20.0},
        {"row": "ceiling matrix, torch.mm", "GFLOP/s": 100.0},
        {"row": "ceiling matrix, 1x1 convolution", "GFLOP/s": 200.0},
        {"row": "ceiling tanh, torch.tanh", "G/s": 1.0},
    ]
    by = ("memory, torch copy_", "matrix, 1x1 convolution", "tanh, torch.tanh")
    assert Ceilings.of(rows) == Ceilings(20, 200, 1, by)
    with pytest.raises(SystemExit, match="a ceiling of tanh, got none"):
        Ceilings.of(rows[:3])


# ---- measuring


def test_rows(capsys, monkeypatch):
    assert roofline.main([]) == 0
    rows = written()
    names = [row["row"] for row in points(rows)]
    shapes = [f"{name} {what}" for what in roofline.PASSES for name in ("one B=3", "two B=2")]
    assert names == [f"{shape} {how}" for shape in shapes for how in roofline.COMPARED]
    for row in rows:
        assert row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"] and row["commit"] and row["dtype"] == "float32"
    for row in points(rows):
        expected = roofline.bounds(SMALL[row["shape"]], row["pass"], Ceilings.of(rows))
        assert row["bounds_ms"] == expected["bounds_ms"] and row["binds"] == expected["binds"]
        assert row["fraction"] == pytest.approx(
            max(expected["bounds_ms"][r] for r in roofline.RESOURCES) / row["ms"]["p50"], 1e-3
        )
    out = capsys.readouterr().out
    assert "| one, B = 3 | training step | fused |" in out and "| tanh, torch.tanh |" in out
    assert file_of(roofline.RESULTS, provenance()).with_suffix(".svg").exists()

    monkeypatch.setattr(roofline, "check_forward", lambda *_: pytest.fail("it was there already"))
    monkeypatch.setattr(roofline, "timed", lambda *_: pytest.fail("it was there already"))
    assert roofline.main([]) == 0 and written() == rows


@pytest.mark.skipif(not cpu.instruction_sets() or not shutil.which("c++"), reason="no kernels, or no compiler")
@pytest.mark.parametrize("loop, unit", [(roofline.kernel_tanh, "G/s"), (roofline.one_tile, "GFLOP/s")])
def test_loops_of_the_kernels_run_alone(loop, unit, monkeypatch):
    monkeypatch.setattr(roofline, "THREADS", 2)
    row = loop()
    assert row[unit] > 0 and row["instruction_set"] == cpu.instruction_sets()[0]


def test_a_rate():
    assert roofline._rate("GFLOP/s", 6_000_000, [3.0, 2.0, 4.0])["GFLOP/s"] == 2


def test_a_wrong_block_has_no_row(monkeypatch, capsys):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            return super().forward(visual, audio) * 1.0001

    place = {"row": "one B=3 forward fused", "of": "an older commit"}
    keep(file_of(roofline.RESULTS, provenance()), place)
    made = {**roofline.IMPLEMENTATIONS, "fused": lambda problem, **options: problem.block(Wrong, **options)}
    monkeypatch.setattr(roofline, "IMPLEMENTATIONS", made)
    assert (
        roofline.measure_shape(file_of(roofline.RESULTS, provenance()), "one", "forward", Ceilings(1.0, 1.0, 1.0)) == 1
    )
    assert [row["row"] for row in written()] == ["one B=3 forward eager"]
    assert "one B=3 forward fused: no time" in (said := capsys.readouterr().err) and "is allowed" in said


def test_a_wrong_ceiling_has_no_row(monkeypatch, capsys):
    keep(file_of(roofline.RESULTS, provenance()), {"row": "ceiling tanh, torch.tanh", "G/s": 1e9})
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x, out: tanh(x, out=out).mul_(1.0001))
    monkeypatch.setattr(roofline, "CEILINGS", {"tanh, torch.tanh": roofline.torch_tanh})
    with pytest.raises(SystemExit, match="Expected a ceiling of memory"):
        roofline.main([])
    assert "tanh: an error of" in capsys.readouterr().err and written() == []


def test_flags_are_those_of_setup():
    assert "-O3" in roofline._of_setup("FLAGS") and "avx512" in roofline._of_setup("INSTRUCTION_SETS")
    with pytest.raises(AssertionError, match="expected a constant nothing"):
        roofline._of_setup("nothing")


# ---- the plot


def invented(name, how, ms, what="forward"):
    """A row; its figures are not measured."""
    ceilings = Ceilings(25.0, 240.0, 6.0)
    found = roofline.bounds(SMALL[name], what, ceilings)
    times = {"p20": ms, "p50": ms, "p80": ms}
    about = {"device": "A CPU ($)", "threads": 2, "torch": "2", "commit": "abc"}
    return {
        "row": f"{name} {how}",
        "shape": name,
        "pass": what,
        "implementation": how,
        **asdict(SMALL[name]),
        **found,
        "ceilings": asdict(ceilings),
        "ms": times,
        "fraction": found["bound_ms"] / ms,
        **about,
    }


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [invented(name, how, ms) for name in SMALL for how, ms in (("eager", 2e-3), ("fused", 1e-3))]
    figure = roofline._figure(rows)
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    roof = axes.lines[0].get_xydata()
    assert roof[1] == pytest.approx([240 / 25, 240]) and roof[0][1] == pytest.approx(25 * roof[0][0])
    drawn = {tuple(line.get_xydata()[0]) for line in axes.lines[1:]}
    assert drawn >= {(row["flop"] / row["bytes"], row["flop"] / row["ms"]["p50"] / 1e6) for row in rows}
    texts = [text.get_text() for text in axes.texts]
    for name in SMALL:
        for how in roofline.COMPARED:
            assert any(text.startswith(f"{name}, {how}:") for text in texts)
    figure.canvas.draw()
    boxes = sorted(text.get_window_extent().y0 for text in axes.texts[2:])
    assert all(above - below > 8 for below, above in itertools.pairwise(boxes)), "labels on one another"

    for name in ("a", "b"):
        roofline.plot([{"row": "ceiling copy"}, *rows], tmp_path / f"{name}.svg")
    text = (tmp_path / "a.svg").read_bytes()
    assert text == (tmp_path / "b.svg").read_bytes() and b"<dc:date>" not in text
    with pytest.raises(ValueError, match="expected at least one time"):
        roofline.plot([], tmp_path / "none.svg")
