"""Log-mel patches match the authors' values, and are the same when computed in parts."""

import tracemalloc

import numpy as np
import pytest

from cases import DATA
from grjca.data import audio
from grjca.errors import UserError


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "logmel.npz") as archive:
        return dict(archive)


def test_log_mel_is_the_authors(golden):
    ours = audio.log_mel(golden["waveform"])
    assert ours.dtype == np.float64 and len(ours) == audio.rows(len(golden["waveform"]))
    np.testing.assert_allclose(ours, golden["log_mel"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("fps", "name"), [(25, "starts_25"), (29.97, "starts_29_97")])
def test_patches_begin_where_the_authors_do(golden, fps, name):
    starts = audio.patch_starts(len(golden["log_mel"]), fps)
    assert starts.dtype == np.int64
    np.testing.assert_array_equal(starts, golden[name])


@pytest.mark.parametrize("fps", [1, 7.5, 23.976, 30, 1000])
def test_all_whole_patches_and_no_other(fps):
    for rows in (96, 97, 348, 1000):
        starts = audio.patch_starts(rows, fps)
        following = round(100 * len(starts) / fps)
        assert starts[0] == 0 and starts[-1] <= rows - 96 < following
        np.testing.assert_array_equal(audio.patch_starts(rows, fps, len(starts)), starts)


def test_the_last_patch_is_repeated(golden):
    starts = audio.patch_starts(348, 25, 100)
    np.testing.assert_array_equal(starts[:64], golden["starts_25"])
    assert (starts[64:] == golden["starts_25"][-1]).all() and len(starts) == 100


def test_times_take_the_place_of_frames_per_second():
    np.testing.assert_array_equal(audio.patch_starts(348, 25, 3, times=np.array([0.0, 0.101, 9.0])), [0, 10, 10])
    np.testing.assert_array_equal(audio.patch_starts(348, 25, 50, times=np.arange(50) / 25), 4 * np.arange(50))


def test_patches_are_rows(golden):
    waveform = golden["waveform"]
    starts = audio.patch_starts(348, 29.97, 200)
    patches = audio.patches(waveform, starts)
    assert patches.dtype == np.float16 and patches.shape == (200, 96, 64)
    rows = audio.log_mel(waveform)
    for start, patch in zip(starts, patches, strict=True):
        np.testing.assert_allclose(patch, rows[start : start + 96], rtol=0, atol=2e-3)  # half an ulp of float16 below 8
    np.testing.assert_array_equal(audio.patches(waveform, starts[70:90]), patches[70:90])


def test_integers_and_floats_are_the_same_sound(golden):
    waveform = golden["waveform"]
    np.testing.assert_allclose(audio.log_mel(waveform / 32768), audio.log_mel(waveform), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000])
def test_another_rate_is_resampled(rate):
    tones = [np.sin(2 * np.pi * 440 * np.arange(2 * r) / r) / 2 for r in (rate, 16_000)]
    ours, expected = audio.log_mel(tones[0], rate), audio.log_mel(tones[1])
    np.testing.assert_allclose(ours[20:150], expected[20:150], rtol=0, atol=1e-3)  # in silent bands, of -4.6
    integers = np.rint(tones[0] * 32768).astype(np.int16)
    np.testing.assert_array_equal(audio.log_mel(integers, rate), audio.log_mel(integers / 32768, rate))


def test_silence_and_a_single_sample():
    assert audio.log_mel(np.zeros(1, np.int16)).shape == (98, 64)
    np.testing.assert_allclose(audio.log_mel(np.zeros(1000)), np.log(0.01))


def test_long_sound_needs_little_memory(tmp_path):
    """Patches of one second are made from ten minutes of sound that are mapped from a file."""
    samples = np.memmap(tmp_path / "sound", np.int16, "w+", shape=(600 * audio.RATE,))
    starts = audio.patch_starts(audio.rows(len(samples)), 25, 600 * 25)
    audio.patches(samples, starts[:1])
    tracemalloc.start()
    for i in range(0, 500, 100):
        audio.patches(samples, starts[-500 + i : len(starts) - 400 + i])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # all of the sound as float64 are 77 MB


SOUND = np.zeros(16_000, np.int16)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: audio.log_mel(np.zeros((2, 100))), r"one channel.*\[2, 100\]"),
        (lambda: audio.log_mel(np.zeros(0)), r"got \[0\]"),
        (lambda: audio.log_mel(np.zeros(9, np.int32)), "int32"),
        (lambda: audio.log_mel(np.array(["a"])), "<U1"),
        (lambda: audio.log_mel(np.full(9, 3000.0)), r"\[-1, 1\]"),
        (lambda: audio.log_mel(np.array([0, np.nan])), "NaN"),
        (lambda: audio.log_mel(SOUND, 0), "rate: .*got 0"),
        (lambda: audio.log_mel(SOUND, float("nan")), "rate: .*got nan"),
        (lambda: audio.patch_starts(95, 25), "at least 96.*got 95"),
        (lambda: audio.patch_starts(348, 0), "fps: .*got 0"),
        (lambda: audio.patch_starts(348, float("inf")), "fps: .*got inf"),
        (lambda: audio.patches(SOUND, np.array([103])), "0 to 102, got 103 to 103"),
        (lambda: audio.patches(SOUND, np.array([-1])), "got -1"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(UserError, match=match):
        call()
