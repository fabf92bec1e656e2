"""``grjca doctor``: an exit code that tells good machines and data from bad ones."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grjca import doctor as module
from grjca.config import GATING, DoctorConfig
from grjca.doctor import doctor
from grjca.environment import BACKEND_VARIABLE, backend_used, has_amx, refusal
from grjca.errors import UserError
from grjca.measure import Shape
from grjca_kernels import backends
from small import LENGTHS, MODEL, write_data

needs_native = pytest.mark.skipif(backends()["cpu"] is not None, reason="the native code was not built")
WIDTHS = {"modalities": MODEL.widths}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@needs_native
def test_all_is_well(data: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor(DoctorConfig(data, **WIDTHS, speed=False)) == 0
    printed = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in printed
    assert "On cpu, auto takes cpu." in printed
    rows = {words[0]: words[1:] for line in printed.splitlines() if (words := line.split())}
    for name, lengths in LENGTHS.items():
        assert rows[name][:2] == [str(len(lengths)), str(sum(lengths.values()))]
    assert rows["train"][2] == f"{12 / 51:.1%}"  # five at the end of each, and one in between
    assert {"eager", "cpu", "reference", "allowed"} <= rows.keys()
    assert "No problems." in printed


@needs_native
def test_measures_speed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPEED", Shape(30, 8, 6, 2, 2, "flat", normalize=True))
    assert doctor(DoctorConfig()) == 0
    rows = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split())}
    assert rows["eager"][3] == "1.00x"
    milliseconds = {name: float(rows[name][2]) for name in ("eager", "cpu", "reference")}
    assert all(time > 0 for time in milliseconds.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: one\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512_bf16 amx_tile amx_int8\nbugs\t\t: amx_bf16\n", False),
        (None, False),
    ],
)
def test_amx_is_a_flag_of_the_processor(text: str | None, expected: bool, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert has_amx(tmp_path / "cpuinfo") is expected


@needs_native
def test_bfloat16_is_measured_where_there_is_amx(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPEED", Shape(30, 8, 6, 2, 2, "flat", normalize=True))
    for there in (False, True):
        monkeypatch.setattr(module.environment, "has_amx", lambda there=there: there)
        assert doctor(DoctorConfig()) == 0
        assert ("samples of bfloat16 takes eager" in capsys.readouterr().out) == there
        assert doctor(DoctorConfig(speed=False)) == 0
        assert "AMX" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "advice"),
    [
        ({"eager": 3.0, "cpu": 1.0, "reference": 2.0}, "cpu is the fastest, so keep --backend auto."),
        (
            {"eager": 1.0, "cpu": 3.0, "reference": 2.0},
            "eager is the fastest, so with --precision bf16 use --backend eager, or stay in float32. A block of your "
            'own takes backend="reference" for that.',
        ),
        (
            {"eager": 1.0, "cpu": 2.0, "reference": 3.0},
            "eager is the fastest, so with --precision bf16 use --backend eager, or stay in float32.",
        ),
    ],
)
def test_advice_on_bfloat16(seconds: dict[str, float], advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "times", lambda *given: seconds)
    assert module._compare_bfloat16().endswith(advice)
    assert f"eager {seconds['eager'] * 1e3:.1f} ms" in module._compare_bfloat16()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: (root / "features" / "beta" / "audio.npy").unlink(), "beta/audio.npy"),
        (lambda root: np.save(root / "features" / "alpha" / "visual.npy", np.zeros((31, 9), "f4")), "alpha/visual.npy"),
        (lambda root: (root / "annotations/train/alpha.txt").write_text("valence,arousal\n0,x\n"), "alpha.txt, line 2"),
    ],
)
def test_bad_data(damage: Any, named: str, data: Path, capsys: pytest.CaptureFixture) -> None:
    damage(data)
    assert doctor(DoctorConfig(data, **WIDTHS, speed=False)) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM: ")]
    assert len(problems) == 1
    assert named in problems[0]


def test_folders_that_are_named_as_downloaded(data: Path, capsys: pytest.CaptureFixture) -> None:
    expected = int(backends()["cpu"] is not None)
    for split, name in (("train", "Train_Set"), ("validate", "Validation_Set")):
        (data / "annotations" / split).rename(data / "annotations" / name)
    assert doctor(DoctorConfig(data, **WIDTHS, speed=False)) == expected
    lines = capsys.readouterr().out.splitlines()
    rows = {words[0]: words[1:] for line in lines if (words := line.split())}
    assert [rows[name][0] for name in LENGTHS] == [str(len(videos)) for videos in LENGTHS.values()]
    assert f"Labels, train: {data / 'annotations' / 'Train_Set'}" in lines
    assert f"Labels, validate: {data / 'annotations' / 'Validation_Set'}" in lines
    assert f"Features: {data / 'features'}" in lines


def test_labels_that_are_not_read(data: Path, capsys: pytest.CaptureFixture) -> None:
    (data / "annotations").rename(data / "ground_truth")
    assert doctor(DoctorConfig(data, **WIDTHS, speed=False)) == 1
    printed = capsys.readouterr().out
    assert "Labels: none" in printed and "No problems." not in printed
    for split in ("train", "validate"):
        assert f"{data / 'ground_truth' / split} holds files that look like labels" in printed


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor(DoctorConfig(tmp_path / "nowhere", speed=False)) == 1
    assert "does not exist" in capsys.readouterr().out


def test_mended_data_is_a_note(data: Path, capsys: pytest.CaptureFixture) -> None:
    path = data / "features" / "alpha" / "visual.npy"
    np.save(path, np.load(path)[:-2])
    assert doctor(DoctorConfig(data, **WIDTHS, speed=False)) == int(backends()["cpu"] is not None)
    assert f"Note: {path} has 29 frames instead of 31" in capsys.readouterr().out


@needs_native
@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize("part", [0, 1])
def test_wrong_backend(
    factor: float, part: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module.run

    def run(name: str, *given: Any) -> Any:
        result = right(name, *given)
        if name == "cpu":
            result[part][0] *= factor
        return result

    monkeypatch.setattr(module, "run", run)
    assert doctor(DoctorConfig(speed=False)) == 1
    assert "PROBLEM: cpu, on cpu: wrong by" in capsys.readouterr().out


def test_wrong_eager(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.run

    def run(name: str, *given: Any) -> Any:
        result = right(name, *given)
        if name == "eager":
            result[1][-1] *= 1 + 1e-9
        return result

    monkeypatch.setattr(module, "run", run)
    assert doctor(DoctorConfig(speed=False)) == 1
    assert "PROBLEM: eager, on cpu" in capsys.readouterr().out


def test_missing_native_code(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "its native code was not built; install a C++17 compiler, then this package again."
    monkeypatch.setattr(module, "backends", lambda device=None: {"triton": "no GPU.", "cpu": reason, "reference": None})
    assert doctor(DoctorConfig(speed=False)) == 1
    printed = capsys.readouterr().out
    assert "triton cannot run: no GPU." in printed
    problems = [line for line in printed.splitlines() if line.startswith("PROBLEM: ")]
    assert len(problems) == 1
    assert reason in problems[0]


def test_a_missing_gpu_is_no_problem(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "backends", lambda device=None: {"triton": "no GPU.", "reference": None})
    assert doctor(DoctorConfig(speed=False)) == 0


def test_the_environment_decides_on_auto(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    assert backend_used("auto", "cpu") == "reference"
    assert backend_used("eager", "cpu") == "eager"
    monkeypatch.setenv(BACKEND_VARIABLE, "nonsense")
    with pytest.raises(UserError, match="nonsense"):
        backend_used("auto", "cpu")
    assert doctor(DoctorConfig(speed=False)) == 1
    assert "PROBLEM: auto, on cpu" in capsys.readouterr().out


def test_trying_backends_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    for name in backends():
        assert (refusal(name, "cpu") is None) == (backends()[name] is None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("gating", GATING.values())
def test_rounding_cannot_make_the_small_case_jump(gating: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A correct backend may have another gradient where relu's argument is near 0; the small case has no such place."""
    still = module.run("reference", gating, torch.float64, "cpu")
    inputs = Shape.inputs
    for sign in (-1, 1):
        monkeypatch.setattr(
            Shape, "inputs", lambda shape, seed, by=1 + sign * 1e-5: tuple(x * by for x in inputs(shape, seed))
        )
        moved = module.run("reference", gating, torch.float64, "cpu")
        for a, b in zip(still[0] + still[1], moved[0] + moved[1], strict=True):
            assert module._apart(b, a) < 1e-3
