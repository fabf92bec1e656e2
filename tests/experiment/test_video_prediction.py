"""predict --video hears what prepare hears, and draws in time; what it writes is in test_footage_to_values.py."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

import arrays
import footage_files as make
from grjca import files, settings
from grjca.config import NetworksConfig, PredictConfig, PrepareConfig, TrainConfig
from grjca.data.prepare import prepare
from grjca.errors import UserError
from grjca.evaluation.predict import predict
from grjca.training import runs
from small import read_predictions

FRAMES = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains small networks, from random weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = TrainConfig(
        folder, "valence", folder, source="arrays", window=8, hop=8, model=arrays.MODEL,
        networks=NetworksConfig(size="small"),
    )  # fmt: skip
    torch.manual_seed(0)
    files.write_text(folder / runs.CONFIG, settings.to_yaml(config))
    runs.save_best(folder, runs.State(epoch=1, best_ccc=0.1, best_epoch=0), runs.new_model(config).state_dict())
    return folder


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    make.write_crops(tmp_path / "crops" / "x", FRAMES)
    return tmp_path / "crops"


def predicted(run: Path, video: Path, crops: Path, out: Path, **options: bool) -> np.ndarray:
    """[N, 1]"""
    assert predict(PredictConfig(run, out=out, video=video, faces=crops / "x", **options)) == 0
    return read_predictions(out / "predictions")["x"]


@pytest.mark.parametrize("sound", ["x.wav", "x.WAV", None])
def test_sound_is_that_which_prepare_takes(run, crops, tmp_path, capsys, sound):
    """The sound is that of a .wav beside the video, if there is one."""
    video = make.write_video(tmp_path / "videos" / "x.mp4", FRAMES, sound=make.noise(0.3))
    alone = predicted(run, video, crops, tmp_path / "alone")
    if sound:
        make.write_wav(video.with_name(sound), make.noise(0.3, begins=0.2, seed=1))
    capsys.readouterr()
    values = predicted(run, video, crops, tmp_path / "of-the-file")
    assert (f"The sound is that of {video.parent / str(sound)}." in capsys.readouterr().out) == bool(sound)
    assert prepare(PrepareConfig(videos=video.parent, faces=crops, out=tmp_path / "data", jobs=1)) == 0
    assert predict(PredictConfig(run, tmp_path / "data", tmp_path / "of-the-data")) == 0
    np.testing.assert_allclose(values, read_predictions(tmp_path / "of-the-data" / "predictions")["x"], atol=1e-6)
    assert np.array_equal(values, alone) == (sound is None)


def shown(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def test_a_drawn_copy_shows_frames_when_the_video_does(run, crops, tmp_path):
    """The copy has the frame times of the video, and the sound of the .wav beside it."""
    times = [0, 40, 80, 120, 600, 640]
    video = make.write_video(tmp_path / "x.mkv", FRAMES, times=times)
    make.write_wav(tmp_path / "x.wav", make.noise(0.7))
    predicted(run, video, crops, tmp_path / "out", draw=True)
    assert shown(tmp_path / "out" / "x.mp4") == pytest.approx([time / 1000 for time in times], abs=1e-3)
    with av.open(str(tmp_path / "out" / "x.mp4")) as container:
        assert container.streams.audio
        assert container.duration / av.time_base == pytest.approx(0.7, abs=0.1)


def test_a_drawn_copy_of_a_constant_rate(run, crops, tmp_path):
    video = make.write_video(tmp_path / "x.mp4", FRAMES, fps=30000 / 1001)
    predicted(run, video, crops, tmp_path / "out", draw=True)
    assert shown(tmp_path / "out" / "x.mp4") == pytest.approx([n * 1001 / 30000 for n in range(FRAMES)], abs=1e-3)


def test_what_is_no_video_is_refused_in_a_sentence(run, crops, tmp_path):
    (tmp_path / "x.mp4").mkdir()
    with pytest.raises(UserError, match=r"x\.mp4: expected a file of a video or sound, got a folder"):
        predicted(run, tmp_path / "x.mp4", crops, tmp_path / "out")
    with pytest.raises(UserError, match=r"nowhere"):
        predicted(run, tmp_path / "nowhere" / "x.mp4", crops, tmp_path / "out")
    assert not (tmp_path / "out").exists()
