"""Synthetic footage: faces and voices show what the labels say, in files that anything plays."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
from PIL import Image
from pytest import approx, fixture, mark, raises

from grjca import files
from grjca.cli import main
from grjca.config import SynthConfig
from grjca.data import synthetic_footage
from grjca.data.synth import write
from grjca.data.synthetic import CODES, INVALID, LAGS
from grjca.errors import UserError

FEW = SynthConfig(out=Path(), layout="footage", videos=6, length=(20, 30), weak=0.3)
LONG = replace(FEW, videos=4, length=(200, 200), weak=0.0)
RATE = 16_000


def made(out: Path, config: SynthConfig) -> Path:
    write(replace(config, out=out))
    return out


@fixture(scope="module")
def few(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("synth") / "few", FEW)


@fixture(scope="module")
def long(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("synth") / "long", LONG)


def digests(root: Path) -> dict[str, str]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def labels(root: Path) -> dict[str, np.ndarray]:
    """Return the labels of every video, [N, 2]."""
    paths = sorted(root.glob("annotations/*/*.txt"))
    return {path.stem: np.loadtxt(path, delimiter=",", skiprows=1) for path in paths}


def decoded(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pictures [N, height, width, 3] uint8, their times in seconds, and the samples of the sound."""
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    with av.open(path) as container:
        sound = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return pictures, np.array([frame.time for frame in frames]), np.concatenate(sound)


def crops(root: Path, name: str) -> dict[int, np.ndarray]:
    """Return the crops by their numbers from 0."""
    paths = sorted((root / "cropped_aligned" / name).iterdir())
    return {int(path.stem) - 1: np.asarray(Image.open(path), dtype=int) for path in paths}


def mouth(crop: np.ndarray) -> tuple[float, float]:
    """Return how far the corners of the mouth rise above its middle, and its height."""
    lips = crop[36:, :, 0] - crop[36:, :, 1] > 65
    columns = np.flatnonzero(lips.any(axis=0))
    height = [np.flatnonzero(lips[:, column]).mean() for column in columns]
    across = (columns - columns.mean()) / (np.ptp(columns) / 2)
    return -np.polyfit(across, height, 2)[0], lips.sum() / len(columns)


def loudness(sound: np.ndarray, frames: int, fps: float = 25) -> np.ndarray:
    """Return the root mean square of each frame."""
    edges = (np.arange(frames + 1) * RATE / fps).astype(int)
    return np.array([np.sqrt((sound[a:b] ** 2).mean()) for a, b in pairwise(edges)])


def spectra(sound: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each frame's pitch in hertz, by autocorrelation, and the centre of gravity of its spectrum."""
    step, pitches, centres = RATE // 25, [], []
    for n in range(frames):
        part = sound[n * step : (n + 2) * step]
        power = np.abs(np.fft.rfft(part * np.hanning(len(part)), 4 * step)) ** 2
        echo = np.fft.irfft(power)
        pitches.append(RATE / (50 + np.argmax(echo[50:250])))
        centres.append((power[:800] * np.arange(800)).sum() / power[:800].sum() / pitches[-1])
    return np.array(pitches), np.array(centres)


def correlation(x, y) -> float:
    return float(np.corrcoef(x, y)[0, 1])


class TestExpression:
    def test_the_mouth_follows_both(self, long):
        smiles, gapes, truth = [], [], []
        for name, rows in labels(long).items():
            for n, crop in crops(long, name).items():
                if (rows[n] > INVALID).all():
                    smile, gape = mouth(crop)
                    smiles, gapes, truth = [*smiles, smile], [*gapes, gape], [*truth, rows[n]]
        valence, arousal = np.transpose(truth)
        assert correlation(smiles, valence) > 0.8 and correlation(gapes, arousal) > 0.6
        assert abs(correlation(smiles, arousal)) < 0.4 and abs(correlation(gapes, valence)) < 0.4
        assert np.mean(np.sign(smiles) == np.sign(valence)) > 0.75

    def test_the_voice_follows_arousal_and_a_little_valence(self, long):
        heard, truth = [], []
        for name, rows in labels(long).items():
            sound = decoded(long / "videos" / f"{name}.mp4")[2]
            count, lag = len(rows) - 2, LAGS[1]
            heard.append(np.stack([np.log(loudness(sound, count)), *spectra(sound, count)])[:, lag:])
            truth.append(rows[: count - lag])
        (loud, pitch, bright), (valence, arousal) = np.concatenate(heard, axis=1), np.concatenate(truth).T
        valid = (valence > INVALID) & (arousal > INVALID)
        assert correlation(loud[valid], arousal[valid]) > 0.7 and correlation(pitch[valid], arousal[valid]) > 0.7
        assert correlation(bright[valid], valence[valid]) > 0.4

    def test_other_things_vary_too(self, long):
        corners = np.stack([crop[0, 0] for crop in crops(long, "video001").values()])
        cheeks = np.stack([crop[38:42, 14:18].mean(axis=(0, 1)) for crop in crops(long, "video001").values()])
        assert corners.std(axis=0).min() > 5 and cheeks.std(axis=0).min() > 5
        pictures = decoded(long / "videos" / "video001.mp4")[0].astype(int)
        faces = (pictures[..., 0] > pictures[..., 2] + 20).any(axis=1)  # skin is red, what is behind it blue
        left, right = faces.argmax(axis=1), 96 - faces[:, ::-1].argmax(axis=1)
        assert (left > 5).all() and (right < 91).all(), "the face is in the picture"
        assert np.ptp(left + right) >= 6 and np.ptp(right - left) >= 4


class TestWeak:
    @mark.parametrize("weak", [0.5, 1.0])
    def test_absent(self, tmp_path, weak):
        root = made(tmp_path / "out", replace(FEW, weak=weak, weak_kind="absent", length=(60, 80), videos=4))
        seen = set()
        for name, rows in labels(root).items():
            truth = np.load(root / "truth" / f"{name}.npy") == CODES["absent"]
            pictures, _, sound = decoded(root / "videos" / f"{name}.mp4")
            assert set(crops(root, name)) == set(np.flatnonzero(~truth[:, 0]))
            flat = np.ptp(pictures.astype(int), axis=(1, 2)).max(axis=1) < 30
            assert (flat == truth[:, 0]).all()
            silent = loudness(sound, len(rows)) < 5e-3
            inside = np.convolve(truth[:, 1], np.ones(7), mode="same")  # the encoder blurs the borders
            assert silent[inside == 7].all() and not silent[3:-3][inside[3:-3] == 0].any()
            seen |= {tuple(row) for row in truth.tolist()}
        assert {(True, False), (False, True)} <= seen

    @mark.parametrize("kind", ["noisy", "contradicting", "misaligned"])
    def test_the_face_behaves_as_the_truth_says(self, tmp_path, kind):
        root = made(tmp_path / "out", replace(LONG, weak=0.6, weak_kind=kind, invalid=0.0))
        smiles, valence, weak, steps = [], [], [], []
        for name, rows in labels(root).items():
            smile = np.array([mouth(crop)[0] for crop in crops(root, name).values()])
            smiles, steps = [*smiles, *smile], [*steps, *np.abs(np.gradient(smile))]
            valence, weak = [*valence, *rows[:, 0]], [*weak, *np.load(root / "truth" / f"{name}.npy")[:, 0]]
        smiles, valence, weak, steps = map(np.array, (smiles, valence, weak, steps))
        assert set(weak) == {0, CODES[kind]}
        assert correlation(smiles[weak == 0], valence[weak == 0]) > 0.8
        low, high = {"noisy": (-0.1, 0.5), "contradicting": (-1, -0.8), "misaligned": (-0.6, 0.6)}[kind]
        assert low < correlation(smiles[weak > 0], valence[weak > 0]) < high
        assert (steps[weak > 0].mean() > 2 * steps[weak == 0].mean()) == (kind == "noisy")


class TestFiles:
    def test_labels_and_truth_are_those_of_other_layouts(self, few, tmp_path):
        plain = made(tmp_path / "plain", replace(FEW, layout="plain"))
        for part in ("annotations", "truth"):
            assert digests(few / part) == digests(plain / part) != {}
        ours, others = (json.loads((root / "synthetic.json").read_text()) for root in (few, plain))
        assert ours["fps"] == 25 and "visual_features" not in ours and "audio_features" not in ours
        assert "fps" not in others and others["visual_features"] == 512
        names = ("layout", "fps", "visual_features", "audio_features")
        assert {k: v for k, v in ours.items() if k not in names} == {k: v for k, v in others.items() if k not in names}
        assert {path.name for path in few.iterdir()} == {
            "annotations", "cropped_aligned", "synthetic.json", "truth", "videos"
        }  # fmt: skip

    @mark.parametrize("fps", [25, 29.97, 1, 240])
    def test_lengths(self, tmp_path, fps):
        root = made(tmp_path / "out", replace(FEW, videos=2, fps=fps, weak=0.0))
        for name, rows in labels(root).items():
            path = root / "videos" / f"{name}.mp4"
            with av.open(path) as container:
                assert float(container.streams.video[0].average_rate) == approx(fps, rel=1e-6)
                assert container.streams.audio[0].rate == RATE
            pictures, times, sound = decoded(path)
            assert pictures.shape == (len(rows), 96, 96, 3)
            assert times == approx(np.arange(len(rows)) / fps, abs=1e-3)
            assert 0 <= len(sound) - int(RATE * len(rows) / fps) < 1024, "the encoder fills its last block"
            assert list(crops(root, name)) == list(range(len(rows)))
            assert all(crop.shape == (64, 64, 3) for crop in crops(root, name).values())

    def test_sound_and_picture_begin_together(self, tmp_path):
        root = made(tmp_path / "out", replace(FEW, weak=0.5, weak_kind="absent", length=(60, 80)))
        checked = 0
        for name in labels(root):
            truth = np.load(root / "truth" / f"{name}.npy")[:, 1]
            sound = decoded(root / "videos" / f"{name.split('_')[0]}.mp4")[2]
            for n in np.flatnonzero(np.diff(truth.astype(int)) < 0) + 1:  # here the voice sets in
                heard = np.flatnonzero(np.abs(sound[(n - 5) * 640 :]) > 0.02)[0] + (n - 5) * 640
                assert abs(heard - 640 * n) < 320
                checked += 1
        assert checked

    def test_two_faces(self, few):
        assert {path.stem for path in (few / "videos").iterdir()} == {f"video{n:03d}" for n in range(5)}
        sides = [crops(few, f"video004_{side}") for side in ("left", "right")]
        pictures = decoded(few / "videos" / "video004.mp4")[0].astype(int)
        assert pictures.shape[1:] == (96, 192, 3)
        away = np.zeros((2, 2))
        for half in (0, 1):
            for n in sides[half]:
                seen = pictures[n, 50:54, 96 * half + 36 : 96 * half + 40].mean(axis=(0, 1))
                away[half] += [np.abs(side[n][34:38, 20:24].mean(axis=(0, 1)) - seen).mean() for side in sides]
        away /= len(sides[0])
        assert np.diag(away).max() < 8 < np.diag(away[::-1]).min(), "each crop shows the skin of its own side"

    def test_where_the_last_video_is_the_first_of_two_faces(self, few, tmp_path):
        root = made(tmp_path / "out", replace(FEW, videos=5))
        ours, both = digests(root), digests(few)
        assert not any("_right" in name for name in ours)
        for part in ("cropped_aligned/video004_left/00001.jpg", "videos/video004.mp4", "videos/video000.mp4"):
            assert ours[part] == both[part]

    def test_equal_seeds_give_equal_bytes(self, few, tmp_path):
        words = ["--videos", "6", "--length", "[20, 30]", "--weak", "0.3", "--layout", "footage"]
        command = [sys.executable, "-m", "grjca", "synth", *words, "--out", str(tmp_path / "again")]
        subprocess.run(command, check=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "1"})
        assert digests(tmp_path / "again") == digests(few)
        other = digests(made(tmp_path / "other", replace(FEW, seed=1)))
        assert other["videos/video000.mp4"] != digests(few)["videos/video000.mp4"]

    @mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
    def test_memory_does_not_grow_with_the_length(self, tmp_path):
        # Not by getrusage, in which a process has also what its parent had.
        code = (
            "import sys; from pathlib import Path\n"
            "from grjca.config import SynthConfig; from grjca.data.synth import write\n"
            "for n in (20, 800):\n"
            "    write(SynthConfig(out=Path(sys.argv[1]) / str(n), layout='footage', videos=2, length=(n, n)))\n"
            "    print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        printed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
        short, long = map(int, printed.stdout.split())  # KiB
        assert long - short < 8 << 10, "less than half of what 800 pictures take"


class TestFailures:
    @mark.parametrize("failure", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=repr)
    @mark.parametrize("part", ["crop", "picture"])
    def test_nothing_is_half_written(self, tmp_path, monkeypatch, part, failure):
        owner, name = {"crop": (Image.Image, "save"), "picture": (synthetic_footage, "_picture")}[part]
        real, calls = getattr(owner, name), []

        def fails(*arguments, **options):
            calls.append(name)
            if len(calls) == 30:
                raise failure
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, fails)
        with raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError):
            made(tmp_path / "deep" / "out", FEW)
        assert list((tmp_path / "deep").iterdir()) == []

    @mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
    def test_a_disk_that_is_full(self, tmp_path):
        code = (
            "import resource, sys; from grjca.cli import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
            "sys.exit(main(['synth', '--layout', 'footage', '--videos', '2', '--length', '[100, 100]', *sys.argv[1:]]))"
        )
        command = [sys.executable, "-c", code, "--out", str(tmp_path / "deep" / "out")]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1
        assert "out cannot be written" in ended.stderr and "too large" in ended.stderr
        assert list((tmp_path / "deep").iterdir()) == []

    @mark.skipif(sys.platform == "win32", reason="Windows has no signals")
    @mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
    def test_killed(self, tmp_path, number, code):
        command = [sys.executable, "-m", "grjca", "synth", "--layout", "footage", "--out", str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 30
        while not any(tmp_path.glob("*/cropped_aligned/video001/*.jpg")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == code and "Traceback" not in said
        left = list(tmp_path.iterdir())
        assert all(map(files.is_partial, left)) and len(left) == (number == signal.SIGKILL)
        made(tmp_path / "out", replace(FEW, videos=2))

    @mark.parametrize("fps", [0, -25, 0.5, 241, float("nan"), float("inf")])
    def test_bad_rates(self, fps):
        with raises(UserError, match="--fps: expected 1 to 240 frames a second, got"):
            replace(FEW, fps=fps)

    def test_bad_words(self, tmp_path, capsys):
        for option, value in {"--fps": "fast", "--layout": "zip"}.items():
            with raises(SystemExit) as caught:
                main(["synth", "--out", str(tmp_path / "out"), option, value])
            assert caught.value.code == 2 and f"{option}: " in capsys.readouterr().err
        assert main(["synth", "--out", str(tmp_path / "out"), "--layout", "footage", "--fps", "1000"]) == 1
        assert "got 1000" in capsys.readouterr().err and list(tmp_path.iterdir()) == []

    def test_an_encoder_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(synthetic_footage, "av", SimpleNamespace(codecs_available={"aac"}))
        with raises(UserError, match="PyAV has no encoder libx264 here"):
            made(tmp_path / "out", FEW)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_is_overwritten(self, few):
        before = digests(few)
        with raises(UserError, match="exists already; choose another, or delete it"):
            made(few, FEW)
        assert digests(few) == before
