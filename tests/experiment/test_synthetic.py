"""Synthetic data have the properties that they claim, and the readers accept what is written."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from pytest import approx, fixture, mark, raises

from grjca.config import Scenario, SynthConfig
from grjca.data import synthetic
from grjca.data.synth import synth, write
from grjca.data.synthetic import CODES, INVALID, JITTER, SyntheticVideo, generate
from grjca.data.videos import load, problems
from grjca.errors import UserError

SMALL = Scenario(videos=8, visual_features=24, audio_features=16, length=(80, 200))
PROBE = replace(SMALL, videos=60, length=(200, 400), weak=0.2)
WIDTHS = {"visual": 24, "audio": 16}
FEW = dict(videos=8, visual_features=24, audio_features=16, length=(80, 200))


@cache
def made(scenario: Scenario) -> list[SyntheticVideo]:
    return list(generate(scenario))


def aligned(video: SyntheticVideo, m: int) -> np.ndarray:
    """Align features with the annotation in time."""
    array = (video.visual, video.audio)[m]
    return array[np.minimum(np.arange(len(video.labels)), len(array) - 1)]


def design(videos, modalities, context: int) -> np.ndarray:
    """Return the features of ``modalities`` in ``context`` frames on either side, and a constant."""
    rows = []
    for video in videos:
        frames = np.arange(len(video.labels))
        near = [np.clip(frames + shift, 0, len(frames) - 1) for shift in range(-context, context + 1, 3)]
        columns = [aligned(video, m)[index] for m in modalities for index in near]
        rows.append(np.concatenate([*columns, np.ones((len(frames), 1))], axis=1))
    return np.concatenate(rows).astype(np.float64)


def targets(videos) -> np.ndarray:
    return np.concatenate([video.labels for video in videos]).astype(np.float64)


def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)


def read_out(scenario: Scenario, modalities, context=0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit a linear readout to training videos; return labels, readout and truth of the others."""
    parts = {split: [v for v in made(scenario) if v.split == split] for split in ("train", "validate")}
    weights = fit(design(parts["train"], modalities, context), targets(parts["train"]))
    prediction = design(parts["validate"], modalities, context) @ weights
    return targets(parts["validate"]), prediction, np.concatenate([v.truth for v in parts["validate"]])


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "plain"
    write(SynthConfig(out=out, **FEW))
    return out


class TestSignal:
    def test_both_modalities_tell_more_than_one(self):
        scenario = replace(PROBE, invalid=0.0)
        r2 = {}
        for name, modalities in {"visual": [0], "audio": [1], "both": [0, 1]}.items():
            labels, prediction, _ = read_out(scenario, modalities, context=9)
            r2[name] = 1 - ((labels - prediction) ** 2).mean(axis=0) / labels.var(axis=0)
        assert (r2["both"] > 0.6).all()
        assert (r2["both"] > np.maximum(r2["visual"], r2["audio"]) + 0.05).all()
        assert r2["visual"][0] > r2["audio"][0] and r2["audio"][1] > r2["visual"][1]

    def test_audio_trails(self):
        videos = made(replace(PROBE, weak=0.0, invalid=0.0))
        weights = [fit(design(videos, [m], 0), targets(videos)) for m in (0, 1)]

        def best_shift(m: int) -> int:
            """Find the shift by which the readout lags behind the labels."""
            scores = []
            for shift in range(-3, 10):
                pairs = [
                    (v.labels[: len(v.labels) - 20], np.roll(design([v], [m], 0) @ weights[m], -shift, 0))
                    for v in videos
                ]
                x, y = (np.concatenate([p[i][10 : len(p[0])] for p in pairs]) for i in (0, 1))
                scores.append(np.corrcoef(x[:, m], y[:, m])[0, 1])
            return int(np.argmax(scores)) - 3

        assert abs(best_shift(0)) <= 1 and abs(best_shift(1) - 4) <= 1

    def test_labels_vary_within_a_window_and_are_smooth(self):
        videos = made(replace(PROBE, invalid=0.0))
        assert np.mean([video.labels[:200].std(axis=0) for video in videos]) > 0.3
        assert max(np.abs(np.diff(video.labels, axis=0)).max() for video in videos) < 0.25
        assert np.abs(targets(videos)).max() <= 1


class TestTruth:
    @mark.parametrize("m", [0, 1])
    @mark.parametrize("kind", list(CODES)[1:])
    def test_a_weak_modality_behaves_as_the_truth_says(self, kind, m):
        scenario = replace(PROBE, weak=0.0, invalid=0.0)
        weights = fit(design(made(scenario), [m], 0), targets(made(scenario)))
        videos = made(replace(scenario, weak=0.5, weak_kind=kind))
        labels, shown = targets(videos)[:, m], (design(videos, [m], 0) @ weights)[:, m]
        truth = np.concatenate([video.truth[:, m] for video in videos])
        assert set(np.unique(truth)) == {0, CODES[kind]}

        def correlation(code: int) -> float:
            return np.corrcoef(labels[truth == code], shown[truth == code])[0, 1]

        assert correlation(CODES["clean"]) > 0.7
        low, high = {"noisy": (0.0, 0.5), "contradicting": (-1.0, -0.7)}.get(kind, (-0.3, 0.3))
        assert low < correlation(CODES[kind]) < high
        spread = shown[truth == CODES[kind]].std() / shown[truth == 0].std()
        expected = {"noisy": (1.8, 9), "absent": (0, 0.2)}.get(kind, (0.8, 1.2))
        assert expected[0] < spread < expected[1]

    def test_misaligned_shows_another_time(self):
        scenario = replace(PROBE, weak=0.0, invalid=0.0)
        weights = fit(design(made(scenario), [0], 0), targets(made(scenario)))
        found = []
        for video in made(replace(scenario, weak=0.3, weak_kind="misaligned")):
            shown, truth = design([video], [0], 0) @ weights, video.truth[:, 0]
            for run in np.split(np.arange(len(truth)), np.flatnonzero(np.diff(truth)) + 1):
                if truth[run[0]] and len(run) > 30 and run[0] >= 60 and run[-1] + 60 < len(truth):
                    error = [np.square(shown[run] - video.labels[run + shift]).mean() for shift in range(-60, 61)]
                    found.append(abs(int(np.argmin(error)) - 60))
        assert len(found) > 20 and np.mean([27 <= shift <= 60 for shift in found]) > 0.8

    @mark.parametrize("weak", [0.0, 0.2, 0.5, 1.0])
    def test_share(self, weak):
        truth = np.concatenate([video.truth for video in made(replace(PROBE, weak=weak))])
        assert ((truth > 0).sum(axis=1) <= 1).all(), "never both modalities"
        assert (truth > 0).any(axis=1).mean() == approx(weak, abs=0.005)
        if weak:
            shares = [(truth == code).any(axis=1).mean() / weak for code in range(1, 5)]
            assert shares == approx([0.25] * 4, abs=0.12)
            assert (truth[:, 0] > 0).mean() / weak == approx(0.5, abs=0.15)
        runs = [np.flatnonzero(np.diff(video.truth.any(axis=1))) for video in made(replace(PROBE, weak=weak))]
        assert sum(map(len, runs)) <= 2 * len(truth) * weak / 30, "stretches, not single frames"

    def test_what_is_weak_changes_no_label(self):
        for other in ({"weak": 0.0}, {"weak_kind": "absent"}, {"weak": 0.9}):
            for a, b in zip(made(SMALL), made(replace(SMALL, **other)), strict=True):
                np.testing.assert_array_equal(a.labels, b.labels)
                assert len(a.visual) == len(b.visual) and len(a.audio) == len(b.audio)


class TestVideos:
    def test_shapes(self):
        lengths = set()
        for video in made(PROBE):
            n = len(video.labels)
            lengths |= {len(video.visual) - n, len(video.audio) - n}
            assert 200 <= n <= 400 and video.truth.shape == video.labels.shape == (n, 2)
            assert video.visual.shape[1:] == (24,) and video.audio.shape[1:] == (16,)
            assert video.visual.dtype == video.audio.dtype == np.float32 and video.labels.dtype == np.float64
            assert video.truth.dtype == np.uint8
            assert np.isfinite(video.visual).all() and np.isfinite(video.audio).all()
        assert lengths == set(range(-JITTER, JITTER + 1))
        assert any(len(video.labels) % 2 for video in made(PROBE))

    def test_invalid_frames(self):
        labels = targets(made(PROBE))
        invalid = labels == INVALID
        assert (invalid[:, 0] == invalid[:, 1]).all() and invalid[:, 0].mean() == approx(0.03, abs=0.005)
        assert not (targets(made(replace(SMALL, invalid=0.0))) == INVALID).any()

    def test_two_faces(self):
        videos = {video.name: video for video in made(SMALL)}
        left, right = videos["video004_left"], videos["video004_right"]
        np.testing.assert_array_equal(left.audio, right.audio)
        assert left.split == right.split and len(left.labels) == len(right.labels)
        valid = (left.labels > INVALID) & (right.labels > INVALID)
        assert np.abs(left.labels - right.labels)[valid].mean() > 0.01
        assert not np.array_equal(left.visual[:50], right.visual[:50])

    @mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
    @mark.parametrize("count", [2, 3, 5, 6, 32, 61])
    def test_splits(self, share, count):
        videos = made(replace(SMALL, videos=count, validate=share, length=(10, 12)))
        assert len(videos) == len({video.name for video in videos}) == count
        held_out = [video.split == "validate" for video in videos]
        assert 1 <= sum(held_out) < count
        assert abs(sum(held_out) - share * count) < 3
        recordings = {(video.name.split("_")[0], video.split) for video in videos}
        assert len(recordings) == len({name for name, _ in recordings})

    def test_more_videos_leave_the_first_as_they_are(self):
        more = made(replace(SMALL, videos=12))
        for count in (5, 6, 8):
            for a, b in zip(made(replace(SMALL, videos=count)), more, strict=False):
                assert a.name == b.name
                for name in ("visual", "audio", "labels", "truth"):
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))

    def test_later_videos_are_others_of_the_same_world(self):
        later = made(replace(SMALL, first=4, videos=4))
        assert [v.name for v in later] == ["video004_left", "video004_right", "video005", "video006"]
        np.testing.assert_array_equal(later[2].visual, made(SMALL)[6].visual)

    def test_another_seed_is_another_world(self):
        a, b = made(SMALL)[0], made(replace(SMALL, seed=1))[0]
        assert not np.array_equal(a.labels[:80], b.labels[:80])

    @mark.parametrize(
        "wrong",
        [
            {"videos": 1}, {"seed": -1}, {"first": -1}, {"weak": 1.1}, {"weak": float("nan")}, {"weak_kind": "loud"},
            {"visual_features": 0}, {"audio_features": 0}, {"length": (10, 9)}, {"length": (2, 9)}, {"invalid": 1.0},
            {"validate": 0.0}, {"validate": 1.0},
        ],
        ids=str,
    )  # fmt: skip
    def test_refusals(self, wrong, tmp_path):
        (name,) = wrong
        with raises(UserError, match=name):
            generate(replace(SMALL, **wrong))
        with raises(UserError, match=name):
            write(SynthConfig(out=tmp_path / "out", **(FEW | wrong)))
        assert list(tmp_path.iterdir()) == []

    def test_two_faces_alone_cannot_be_split(self):
        with raises(UserError, match="ask for more than 2"):
            generate(replace(SMALL, first=4, videos=2))


class TestWrite:
    def test_the_readers_find_no_fault(self, folder):
        found = problems(folder, widths=WIDTHS)
        assert found.problems == []
        assert found.splits["train"].videos + found.splits["validate"].videos == 8 and found.splits["test"].videos == 0
        expected = {video.name: video for video in made(SMALL)}
        for video in load(folder, "all", widths=WIDTHS):
            source = expected.pop(video.name)
            np.testing.assert_array_equal(video.labels, source.labels)
            np.testing.assert_array_equal(video.valid, (source.labels != INVALID).all(axis=1))
            np.testing.assert_array_equal(np.load(folder / "truth" / f"{video.name}.npy"), source.truth)
            for m, features in enumerate(video.read(0, video.length).values()):
                np.testing.assert_array_equal(features, aligned(source, m))
        assert not expected

    def test_parameters_are_written(self, folder):
        parameters = json.loads((folder / "synthetic.json").read_text())
        assert parameters["codes"] == CODES and parameters["weak"] == 0.1 and parameters["length"] == [80, 200]
        assert "out" not in parameters

    def test_both_layouts_hold_the_same(self, folder, tmp_path):
        write(SynthConfig(out=tmp_path / "npy", layout="npy_data", **FEW))
        for split in ("train", "validate"):
            for a, b in zip(*(load(root, split, widths=WIDTHS) for root in (folder, tmp_path / "npy")), strict=True):
                assert (a.name, a.length) == (b.name, b.length)
                pairs = zip(
                    (a.labels, *a.read(0, a.length).values()), (b.labels, *b.read(0, a.length).values()), strict=True
                )
                for x, y in pairs:
                    np.testing.assert_array_equal(x, y)
                path = tmp_path / "npy" / "npy_data" / a.name / "VA_continuous_label.npy"
                np.testing.assert_array_equal(np.load(path), a.labels)

    def test_equal_bytes_in_another_process(self, folder, tmp_path):
        code = (
            "import sys; from pathlib import Path; from grjca.config import SynthConfig; "
            "from grjca.data.synth import write; "
            f"write(SynthConfig(out=Path(sys.argv[1]), **{FEW!r}))"
        )
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment)
        assert digests(tmp_path / "again") == digests(folder) != {}

    def test_nothing_is_overwritten(self, folder, tmp_path):
        before = digests(folder)
        for out in (folder, folder / "synthetic.json"):
            with raises(UserError, match="exists already; choose another, or delete it"):
                write(SynthConfig(out=out, **FEW))
        assert digests(folder) == before
        write(SynthConfig(out=tmp_path, **FEW))  # an empty folder
        assert digests(tmp_path) == before

    @mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
    def test_nothing_is_half_written(self, tmp_path, monkeypatch, failure):
        real = np.save
        calls = []

        def save(*arguments):
            calls.append(arguments)
            if len(calls) == 5:
                raise failure
            real(*arguments)

        monkeypatch.setattr(np, "save", save)
        with raises((UserError, KeyboardInterrupt)) as caught:
            write(SynthConfig(out=tmp_path / "deep" / "out", **FEW))
        assert isinstance(failure, KeyboardInterrupt) or "out cannot be written: disk full" in str(caught.value)
        assert list((tmp_path / "deep").iterdir()) == []

    def test_wrong_layout(self, tmp_path):
        with raises(UserError, match="no layout 'zip': expected one of plain, npy_data"):
            write(SynthConfig(out=tmp_path / "out", layout="zip"))

    def test_the_command_says_what_is_there(self, tmp_path, capsys):
        assert synth(SynthConfig(out=tmp_path / "out", **FEW)) == 0
        assert str(tmp_path / "out") in capsys.readouterr().out


def test_module_constants_are_consistent():
    assert list(CODES.values()) == list(range(5)) and synthetic.SHIFT[1] + max(synthetic.LAGS) <= synthetic.MARGIN
