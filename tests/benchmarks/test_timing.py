"""Every path that is timed runs, at a tiny size; and what pytest-benchmark saves is what the report shows."""

import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest, report, test_block, test_full, whole_step
from benchmarks.cases import IMPLEMENTATIONS, ROOT, Problem, of_block
from grjca.config import ModelConfig
from grjca.measure import Shape
from grjca_kernels import GatedRJCAFused

TINY = {"abaw": Shape(9, 6, 5, 2, 3, "flat", normalize=True), "clip": Shape(4, 7, 6, 1, 2)}


@pytest.fixture
def measured():
    """Stands for the fixture ``measure``, and notes what is to be measured."""

    def measure(call, **about):
        call()
        measure.rows.append(about)

    measure.rows = []
    return measure


@pytest.fixture(autouse=True)
def quick_compile(monkeypatch):
    """torch.compile captures, and compiles nothing."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda block, mode, dynamic: compile(block, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_both_passes(implementation, measured):
    problem = Problem(TINY["abaw"])
    test_block.time_forward("abaw", problem, implementation, measured)
    test_block.time_training("abaw", problem, implementation, measured)
    forward, training = measured.rows
    shared = {"shape": "abaw, B = 3", "dtype": "float32", "implementation": implementation}
    assert forward == {**shared, "pass": "forward"}
    assert (training.pop("saved_bytes", 0) > 0) == (implementation != "compiled")
    assert training == {**shared, "pass": "training step"}


def test_failing_blocks_are_not_timed(measured, monkeypatch):
    class Wrong(GatedRJCAFused):
        def forward(self, *features):
            return super().forward(*features) * 1.0001

    monkeypatch.setitem(IMPLEMENTATIONS, "fused", partial(of_block, kind=Wrong))
    for time in (test_block.time_forward, test_block.time_training):
        with pytest.raises(AssertionError, match="is allowed"):
            time("abaw", Problem(TINY["abaw"]), "fused", measured)
    assert not measured.rows


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", [*test_full.COMPARED, "MultiheadAttention"])
def test_call_overhead(implementation, training, measured):
    test_full.test_call_overhead(implementation, training, measured)
    assert [row["implementation"] for row in measured.rows] == [implementation]


def test_growth_and_one_sample(measured, monkeypatch):
    monkeypatch.setattr(test_full, "SHAPES", TINY)
    test_full.test_growth({"length": 5}, "fused", "training step", measured)
    test_full.test_one_sample("clip", "fused", measured)
    assert [row["shape"] for row in measured.rows] == ["abaw, L = 5, B = 3", "clip, B = 1"]


@pytest.fixture
def small_model(monkeypatch):
    config = ModelConfig(
        modalities={"visual": 9, "audio": 7}, channels={"visual": (8, 6), "audio": (5,)}, kernel=3, hidden=8
    )
    monkeypatch.setattr(whole_step, "CONFIG", config)
    monkeypatch.setattr(whole_step, "LENGTH", 11)


@pytest.mark.parametrize("implementation", whole_step.BACKENDS)
@pytest.mark.parametrize("fusion", whole_step.FUSIONS)
def test_whole_model(fusion, implementation, measured, small_model):
    test_full.test_whole_model(fusion, implementation, measured)
    model = whole_step.make_model(fusion, implementation)
    assert model.training and not getattr(model.fusion, "shared_masks", False), "PyTorch's own dropout is timed"


@pytest.mark.parametrize("wrong", ["value", "masks"])
def test_a_wrong_model_is_not_timed(wrong, small_model, monkeypatch):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio, lengths=None):
            if wrong == "masks":
                torch.rand(1)
            y = super().forward(visual, audio, lengths)
            return y * torch.linspace(1, 1.0003, y.shape[-1]) if wrong == "value" else y  # a norm would undo a scale

    monkeypatch.setattr("grjca.model.audiovisual.GatedRJCAFused", Wrong)
    with pytest.raises(AssertionError, match="is allowed"):
        whole_step.check("grjca")


def test_rounds(monkeypatch):
    """The number of rounds fits the seconds, with a few for slow calls; the first call is not timed."""
    clock, calls, seen = iter(range(0, 1000)), [], []
    monkeypatch.setattr(conftest.time, "perf_counter", lambda: next(clock) * 0.25)
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call, rounds: seen.append(rounds))
    measure = conftest.measure.__wrapped__(benchmark)
    measure(lambda: calls.append(1), shape="a", implementation="b", **{"pass": "c"})
    assert (benchmark.group, seen, len(calls)) == ("a, float32, c", [round(conftest.SECONDS / 0.25)], 2)
    monkeypatch.setattr(conftest.time, "perf_counter", lambda: next(clock) * 10.0)
    measure(lambda: calls.append(1), shape="a", implementation="b", **{"pass": "c"})
    assert seen[1] == conftest.FEWEST and len(calls) == 3


SHRINK = """
import benchmarks.conftest, grjca.measure
grjca.measure.SHAPES.clear()
grjca.measure.SHAPES["abaw"] = grjca.measure.Shape(20, 24, 12, 2, 3, "flat", True)
benchmarks.conftest.SECONDS = 0.001
"""


def test_what_is_saved_is_what_the_report_shows(tmp_path):
    """The README's command runs, with tiny shapes."""
    pytest.importorskip("psutil")
    (tmp_path / "shrink.py").write_text(SHRINK)
    file = tmp_path / "saved.json"
    options = ["--benchmark-only", f"--benchmark-json={file}", "-k", "eager or fused", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests" / "support")))}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "shrink", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'abaw, B = 3, float32, forward': 2 tests" in done.stdout and "Median" in done.stdout
    run = report.Run.read(file)
    assert len(run.places) == 2 and all({*rows} == {"eager", "fused"} for rows in run.places.values())
    text = report.tables([run])
    assert "| abaw, B = 3 | float32 | training step |" in text and "saved: fused" in text
    assert report.headline([run]).count("| abaw, B = 3 |") == 1
