"""How the block grows: rows that are complete and go on, exponents that are known, plots that repeat.

Figures that no test measures are invented.
"""

import itertools
import json
import os
import time

import pytest
import torch

from benchmarks import gate, memory, scaling
from benchmarks.cases import IMPLEMENTATIONS, Problem, flop
from grjca.measure import Shape, saved_bytes
from grjca_kernels import GatedRJCAFused

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="FlopCounterMode of PyTorch 2.4 cannot count within autograd.grad"
)

TINY = Shape(6, 8, 4, 1, 3, "flat", normalize=True)
SIZES = {"B": (1, 2, 4), "L": (4, 8), "width": (4, 8), "T": (1, 2)}
FIGURES = {"rounds", "ms", "ms_p20", "ms_p80", "peak_bytes", "operators", "bytes_moved", "flop", "checked"}
ABOUT = {"dtype": "float32", "dropout": 0.6, "device": "A CPU", "threads": 2, "torch": "2", "commit": "abc"}


@pytest.fixture
def tiny(monkeypatch):
    """Points that take no time, in this process."""
    monkeypatch.setattr(scaling, "BASE", TINY)
    monkeypatch.setattr(scaling, "SIZES", SIZES)
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    monkeypatch.setattr(scaling, "apart", inline)


def inline(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        raise memory.ProcessError(memory.sentence(error)) from None


def in_an_hour():
    return time.monotonic() + 3600


def invented(time_of=lambda shape: shape.batch**1.5, saved=lambda shape: 100 * shape.batch * shape.length, **others):
    """A row of every point at the sizes that are measured."""
    rows = []
    for shape, axes in scaling.plan(list(scaling.SIZES)).items():
        for what in scaling.PASSES:
            for factor, name in enumerate(scaling.COMPARED, 1):
                ms = time_of(shape) * factor
                row = {
                    "axes": axes,
                    **scaling.described(shape),
                    "pass": what,
                    "implementation": name,
                    **ABOUT,
                    "ms": ms,
                }
                row |= {"ms_p20": 0.9 * ms, "ms_p80": 1.1 * ms, "peak_bytes": 7 * shape.batch**2, **others}
                rows.append(row | ({"saved_bytes": saved(shape) * factor} if scaling.PASSES[what] else {}))
    return rows


# ---- measuring


def test_rows_are_complete_and_a_rerun_measures_nothing(tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "folder" / "rows.json"
    assert scaling.run(path, ["T"], in_an_hour())
    rows = scaling.read(path)
    sizes = [(row["B"], row["T"]) for row in rows if row["implementation"] == "fused" and row["pass"] == "forward"]
    assert sizes == [(3, 1), (3, 2)], "the base first, and once"
    assert len(rows) == 4 * len(sizes)
    for row in rows:
        training = row["pass"] == "training step"
        assert row.keys() >= FIGURES | ({"saved_bytes"} if training else set()), row
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["rounds"] == scaling.FEWEST
        assert row.keys() >= {
            "commit",
            "device",
            "clock_mhz",
            "threads",
            "torch",
            "python",
            "numpy",
            "source",
            "dtype",
            "dropout",
        }
    assert rows[0]["axes"] == ["B", "L", "width", "T"] and rows[-1]["axes"] == ["T"]
    monkeypatch.setattr(scaling, "measured", lambda *_: pytest.fail("it was there"))
    before = path.read_bytes()
    assert scaling.run(path, ["T"], in_an_hour()) and path.read_bytes() == before
    monkeypatch.setattr(scaling, "source", lambda: "others")
    with pytest.raises(pytest.fail.Exception):
        scaling.run(path, ["T"], in_an_hour())


def test_a_killed_run_goes_on(tiny, tmp_path, monkeypatch):
    path, measured, points = tmp_path / "rows.json", scaling.measured, []

    def killed(shape, names, training):
        if len(points) == 3:
            raise KeyboardInterrupt
        points.append((shape, training))
        return measured(shape, names, training)

    monkeypatch.setattr(scaling, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        scaling.run(path, ["T"], in_an_hour())
    assert len(scaling.read(path)) == 6
    again = []
    monkeypatch.setattr(scaling, "measured", lambda *of: (again.append((of[0], of[2])), measured(*of))[1])
    assert scaling.run(path, ["T"], in_an_hour())
    assert len(again) == 1 and not {*again} & {*points} and len(scaling.read(path)) == 8
    assert not scaling.run(path, ["L"], time.monotonic() - 1), "no time is left for what is missing"


def test_no_time_for_what_fails_the_gate(tiny, tmp_path, monkeypatch):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            return super().forward(visual, audio) * (1.0001 if visual.shape[0] > 2 else 1)  # in large batches only

    monkeypatch.setitem(IMPLEMENTATIONS, "fused", lambda problem, **options: problem.block(Wrong, **options))
    path = tmp_path / "rows.json"
    scaling.run(path, [], in_an_hour())
    for row in scaling.read(path):
        if row["implementation"] == "fused":
            assert "ms" not in row and row["error"].startswith("AssertionError: output: an error of"), row
            assert not scaling.settled(row), "a rerun tries again"
        else:
            assert row["ms"] > 0


def test_wrong_gradients_fail(monkeypatch):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.0001 * gradient

    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            return Scaled.apply(super().forward(visual, audio))

    monkeypatch.setitem(IMPLEMENTATIONS, "fused", lambda problem, **options: problem.block(Wrong, **options))
    scaling.check(Problem(TINY), "fused", training=False)
    with pytest.raises(AssertionError, match=r"d .*is allowed"):
        scaling.check(Problem(TINY), "fused", training=True)


def test_the_ends_of_a_batch_are_a_problem_of_their_own():
    whole = Problem(Shape(5, 6, 4, 2, 7, "flat"))
    ends = scaling.Ends.of(whole)
    output = gate.run(IMPLEMENTATIONS["eager"](whole, dropout=0.0), whole, torch.float32).output
    ours = gate.run(IMPLEMENTATIONS["eager"](ends, dropout=0.0), ends, torch.float32).output
    torch.testing.assert_close(ours, output[[0, 6]], rtol=1e-4, atol=1e-5)
    assert scaling.Ends.of(Problem(Shape(5, 6, 4, 2, 1))).places == [0]


def test_what_is_left_out_says_why(tiny, tmp_path, monkeypatch):
    path, asked = tmp_path / "rows.json", []

    def measured(shape, names, training):
        asked.append((shape.batch, tuple(names)))
        ms = {"eager": 1000.0 * shape.batch, "fused": 1.0 * shape.batch}
        return {name: {"ms": ms[name], "peak_bytes": int(1e6 * ms[name])} for name in names}

    monkeypatch.setattr(scaling, "measured", measured)
    assert scaling.run(path, ["B"], in_an_hour(), limit=3.5)
    assert (4, ("fused",)) in asked and (4, ("eager", "fused")) not in asked
    left_out = [row for row in scaling.read(path) if "left_out" in row]
    assert [(row["B"], row["implementation"]) for row in left_out] == [(4, "eager")] * 2
    assert left_out[0]["left_out"].startswith("left out: 4 s a call predicted") and "ms" not in left_out[0]
    count = len(asked)
    scaling.run(path, ["B"], in_an_hour(), limit=3.5)
    assert len(asked) == count
    monkeypatch.setattr(scaling, "available_memory", lambda: 3 * 10**9)
    scaling.run(path, ["B"], in_an_hour(), limit=100)
    assert "4 GB predicted" in next(row for row in scaling.read(path) if "left_out" in row)["left_out"]
    monkeypatch.setattr(scaling, "available_memory", lambda: None)
    scaling.run(path, ["B"], in_an_hour(), limit=100)
    assert not any("left_out" in row for row in scaling.read(path))
    assert asked[count:] == [(4, ("eager", "fused"))] * 2, "both anew, so that they take turns"


def test_who_runs_out_of_memory_has_a_row(tiny, tmp_path, monkeypatch):
    def weighed(shape, implementation, training):
        if implementation == "eager":
            torch.empty(1 << 60)
        return {"peak_bytes": 1, "seconds": 1.0}

    monkeypatch.setattr(scaling, "weighed", weighed)
    path = tmp_path / "rows.json"
    scaling.run(path, [], in_an_hour())
    for row in scaling.read(path):
        if row["implementation"] == "eager":
            assert row["error"].startswith("out of memory: ") and "ms" not in row and scaling.settled(row)
        else:
            assert row["ms"] > 0


def test_a_process_of_its_own():
    """Results come back, errors as a sentence, and a death as well."""
    peak = memory.apart(memory.weighed, TINY, "eager", True)
    assert peak["seconds"] > 0 and (peak["peak_bytes"] is None or 0 <= peak["peak_bytes"] < 1 << 30)
    with pytest.raises(memory.ProcessError, match="out of memory: RuntimeError"):
        memory.apart(torch.empty, 1 << 60)
    with pytest.raises(memory.ProcessError, match="exit code 3"):
        memory.apart(os._exit, 3)


def test_peak_is_that_of_the_call():
    if memory.peak_resident() is None:
        pytest.skip("the system does not say")
    shape = Shape(64, 64, 32, 2, 128, "flat", normalize=True)
    block = IMPLEMENTATIONS["eager"](memory.Raw(shape)).train()
    saved = saved_bytes(lambda: block(*shape.inputs(0, requires_grad=True)), block.parameters())
    peak = memory.apart(memory.weighed, shape, "eager", True)["peak_bytes"]
    assert 0.8 * saved < peak < 3 * saved


def test_counts():
    problem = Problem(TINY)
    eager, fused = (scaling.counted(problem, name, False) for name in scaling.COMPARED)
    assert eager["flop"] == fused["flop"] == flop(TINY)
    assert fused["operators"] < eager["operators"] and fused["bytes_moved"] < eager["bytes_moved"]
    x, counter = torch.ones(4, 5), scaling.Counter()
    with counter:
        torch.empty_like(x)
        (x.t()[:2] @ x).add_(1)
    assert (counter.operators, counter.bytes) == (2, 4 * (8 + 20 + 10) + 4 * (10 + 10))
    steps = [scaling.counted(problem, name, True) for name in scaling.COMPARED]
    assert all(step["flop"] > eager["flop"] and step["operators"] > 2 for step in steps)


# ---- exponents and capacity


def test_exponents_are_found():
    assert scaling.fit([(1, 3.0)]) is None
    two = scaling.fit([(1, 3.0), (4, 48.0)])
    assert two.exponent == pytest.approx(2) and two.error is None and str(two) == "2.00"
    noisy = scaling.fit([(1, 1.0), (2, 2.2), (4, 3.6), (8, 8.0)])
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in ([1, 2, 4, 8], [1.0, 2.2, 3.6, 8.0]))
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx * dy).sum() / dx.square().sum()
    error = ((dy - slope * dx).square().sum() / 2 / dx.square().sum()).sqrt()
    assert noisy.exponent == pytest.approx(float(slope)) and noisy.error == pytest.approx(float(error))

    def time_of(shape):  # flat, then quadratic in L
        return shape.batch**0.5 * (1 if shape.length <= 128 else (shape.length / 128) ** 2)

    rows = invented(time_of)
    found = scaling.exponents(rows)
    upper, whole = found["B", "forward", "eager"]
    assert upper.exponent == pytest.approx(0.5) and upper.error == pytest.approx(0, abs=1e-6)
    assert (whole.low, whole.high, whole.points, upper.points) == (1, 512, 11, 6)
    upper, whole = found["L", "training step", "fused"]
    assert upper.exponent == pytest.approx(2) and 0.5 < whole.exponent < 1.9
    assert scaling.exponents(rows, "saved_bytes")["B", "training step", "eager"][0].exponent == pytest.approx(1)
    assert scaling.exponents(rows, "peak_bytes")["B", "forward", "eager"][0].exponent == pytest.approx(2)


def test_tables():
    table = scaling.exponents_table(invented())
    assert "| B | forward | eager | 1.50 ± 0.00 | 1.50 ± 0.00 |  | 2.00 ± 0.00 | 1 to 512, 11 points |" in table
    assert len(table.splitlines()) == 2 + 16
    assert len(scaling.exponents_table([]).splitlines()) == 2


def test_capacity():
    rows = invented(saved=lambda shape: 1000 + 100 * shape.batch * shape.length)
    shape = scaling.BASE
    parameters = sum(x.numel() for x in shape.block(GatedRJCAFused).parameters())
    for axis, size, sample in (("B", 40, shape.length), ("L", 500, shape.batch)):
        model = scaling.capacity(rows, axis, "eager")
        assert model.residual < 1e-6
        if axis == "B":
            bytes_of = 1000 + 100 * size * sample + 8 * parameters + 12 * size * sample * 384
            assert model.needed(size) == pytest.approx(bytes_of)
        assert model.largest(model.needed(size) / 1e9 + 1e-9) == size and model.largest(0) == 0
    assert scaling.capacity(rows, "L", "eager").needed(4000) > 8 * 2 * 2 * 4000**2, "W_k of T = 2 and two modalities"
    text = scaling.capacity_table(rows)
    assert text.startswith("Extrapolated from counted bytes") and "| B | fused |" in text and "80 GB" in text
    assert scaling.capacity(rows[:4], "B", "eager") is None


def test_saved_bytes_are_linear_in_length():
    """What capacity() fits."""
    for name in scaling.COMPARED:
        saved = []
        for length in (64, 128, 192):  # whole words of the signs of U
            shape = Shape(length, 8, 4, 2, 2, "flat", normalize=True)
            block = IMPLEMENTATIONS[name](memory.Raw(shape), dropout=0.6).train()
            inputs = shape.inputs(0, requires_grad=True)
            saved.append(saved_bytes(lambda b=block, x=inputs: b(*x), block.parameters()))
        assert saved[2] - saved[1] == saved[1] - saved[0]


# ---- plots


def test_plots_repeat_and_show_every_series(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    rows = invented()
    paths = [plots.write_all(json.loads(json.dumps(rows)), tmp_path / folder) for folder in "ab"]
    for a, b in zip(*paths, strict=True):
        assert a.read_bytes() == b.read_bytes()
    drawn = {path.name: path.read_text() for path in paths[0]}
    for axis in scaling.SIZES:
        for what in scaling.PASSES:
            for name in scaling.COMPARED:
                assert f'id="{axis}, {what}, {name}"' in drawn["scaling.svg"]
    for axis in ("B", "L"):
        for name in scaling.COMPARED:
            assert f'id="{axis}, training step, {name}"' in drawn["memory.svg"]
    plots.save(plots.memory, invented(saved=lambda shape: shape.batch**2 * shape.length), paths[0][1])
    assert paths[0][1].read_bytes() != paths[1][1].read_bytes(), "other rows, another plot"


def test_plots_of_some_rows(tmp_path):
    """A run that has just begun, and points without a time."""
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    rows = invented()
    rows[-1] = {name: value for name, value in rows[-1].items() if not name.startswith("ms")} | {"left_out": "why"}
    assert plots._absent(rows, "T", ["training step"]) == ["fused training at 8"]
    for some in (rows[:1], rows):
        assert all(path.stat().st_size for path in plots.write_all(some, tmp_path))


def test_labels_do_not_overlap():
    from benchmarks import plots

    heights = {("forward", str(i)): height for i, height in enumerate((0.5, 0.51, 0.52, 0.9))}
    places = plots.spread(heights, 0.1)
    assert sorted(places, key=places.get) == sorted(heights, key=heights.get)
    inner = sorted(places.values())
    assert all(b - a >= 0.0999 for a, b in itertools.pairwise(inner)) and inner[3] == 0.9
    assert plots.ahead([(1, 1.0), (2, 4.0)], 4) == pytest.approx(16) and plots.ahead([(1, 3.0)], 4) == 3
    assert plots.ticks([1, 2, 4, 8, 12, 16, 32, 64]) == [1, 4, 16, 64] and plots.ticks([1, 2, 3]) == [1, 2, 3]


def test_command(tiny, tmp_path, capsys):
    folder = tmp_path / "out"
    assert scaling.main(["--axis", "T", "--minutes", "5", "--out", str(folder)]) == 0
    (path,) = folder.glob("*.json")
    printed = capsys.readouterr().out
    assert "| T | forward | fused |" in printed and "Extrapolated" in printed and str(path) in printed
    assert scaling.main(["--minutes", "-1", "--out", str(tmp_path / "none")]) == 1
    assert "no row yet" in capsys.readouterr().err
