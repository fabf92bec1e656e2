"""The commands from video files to valence and arousal, with networks of random weights."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from grjca import backbones
from grjca.cli import main
from grjca.config import PredictConfig
from grjca.errors import UserError
from grjca.evaluation.predict import predict
from grjca.live import Live
from grjca.model import extract
from grjca.training import runs
from small import read_predictions

pytestmark = pytest.mark.slow
MODEL = "--model.channels '{visual: [48, 32], audio: [32, 24]}' --model.hidden 32"
SCHEDULE = "--window 80 --hop 40 --learning_rate 2e-3 --warmup_epochs 1 --tensorboard false"
COMMANDS = f"""
synth --layout footage --out ROOT/footage --videos 14 --length [80,110] --weak 0
prepare --videos ROOT/footage/videos --faces ROOT/footage/cropped_aligned --annotations ROOT/footage/annotations
    --out ROOT/data
extract --data ROOT/data --out ROOT/features --size small
train --from arrays --data ROOT/data --target valence --out ROOT/loop --networks.size small --epochs 1 --batch_size 4
    {MODEL} {SCHEDULE}
train --data ROOT/features --target valence --out ROOT/valence --epochs 20 --batch_size 6 {MODEL} {SCHEDULE}
train --data ROOT/features --target arousal --out ROOT/arousal --epochs 20 --batch_size 6 {MODEL} {SCHEDULE}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make footage, arrays, features, a run on features for each target, and a run that trains the networks."""
    root = tmp_path_factory.mktemp("footage")
    for command in COMMANDS.replace("\n    ", " ").split("\n")[1:-1]:
        assert main([word.replace("ROOT", str(root)) for word in shlex.split(command)]) == 0
    return root


@pytest.mark.parametrize("target", ["valence", "arousal"])
def test_a_target_is_learnt_from_pixels_and_sound(folder, target):
    lines = [json.loads(line) for line in (folder / target / runs.METRICS).read_text().splitlines()]
    assert max(line["ccc"] for line in lines) >= 0.6


def test_random_weights_are_said_in_every_figure(folder, capsys):
    assert main(["evaluate", "--run", str(folder / "valence"), "--plotted_videos", "0"]) == 0
    assert "visual and audio networks of random weights" in capsys.readouterr().out
    metrics = json.loads((folder / "valence" / "evaluation" / "validate" / "metrics.json").read_text())
    assert metrics["random_networks"] == "visual and audio networks of random weights"
    for run in ("valence", "loop"):
        first = (folder / run / runs.CONFIG).read_text().partition("\n")[0]
        assert first == "# Trained with the visual and audio networks of random weights."


def test_the_networks_in_the_loop_predict_what_their_parts_do(folder, tmp_path):
    """The command predicts the validation videos from arrays as the networks and the model do by hand."""
    config, model = runs.load_best(folder / "loop")
    assert main(["predict", "--run", str(folder / "loop"), "--data", str(folder / "data"), "--split", "validate",
                 "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    for name, values in read_predictions(tmp_path / "out" / "predictions").items():
        arrays = folder / "data" / "npy_data" / name
        faces = torch.from_numpy(np.load(arrays / "video.npy"))[: config.window]
        patches = torch.from_numpy(np.load(arrays / "logmel.npy"))[: config.window].float()
        with torch.no_grad():
            seen, heard = model.backbones["visual"](backbones.crop(faces)), model.backbones["audio"](patches)
            by_hand = model.model(seen[None], heard[None])[0]
        until = len(values) - config.window or len(values)  # from there on, values are means of two windows
        np.testing.assert_allclose(values[:until, 0], by_hand[:until], atol=1e-5)


def predicted(folder, out, run="valence", **options):
    video = folder / "footage" / "videos" / "video001.mp4"
    faces = folder / "footage" / "cropped_aligned" / "video001"
    config = PredictConfig(folder / run, out=out, video=video, faces=faces)
    return predict(replace(config, **options))


def test_a_video_file_is_predicted(folder, tmp_path):
    """The command writes a table, a plot and a drawn copy; the values are those of the data folder."""
    out = tmp_path / "out"
    assert predicted(folder, out, other=folder / "arousal", draw=True) == 0
    assert {path.name for path in out.iterdir()} == {"video001.csv", "video001.png", "video001.mp4", "predictions"}
    header, *rows = (out / "video001.csv").read_text().splitlines()
    assert header == "seconds,valence,arousal"
    table = np.array([row.split(",") for row in rows], float)
    with (
        av.open(str(folder / "footage" / "videos" / "video001.mp4")) as before,
        av.open(str(out / "video001.mp4")) as after,
    ):
        assert before.streams.video[0].frames == after.streams.video[0].frames == len(table)
        assert after.streams.video[0].width == before.streams.video[0].width
        assert after.streams.video[0].height > before.streams.video[0].height
        assert after.streams.audio
    assert table[1, 0] == pytest.approx(1 / 25)
    for column, target in enumerate(("valence", "arousal"), start=1):
        words = ["predict", "--run", folder / target, "--data", folder / "features", "--out", tmp_path / target]
        assert main(list(map(str, words))) == 0
        values = read_predictions(tmp_path / target / "predictions")["video001"][:, 0]
        np.testing.assert_allclose(table[:, column], values, atol=1e-3)


def test_a_video_is_predicted_by_networks_in_the_loop(folder):
    """Without --out, the files go to the folder of the run."""
    assert predicted(folder, None, run="loop") == 0
    assert (folder / "loop" / "predicted" / "video001" / "video001.csv").read_text().startswith("seconds,valence\n")


def test_a_face_is_found_where_no_pictures_are_given(folder, tmp_path):
    pytest.importorskip("cv2")
    assert predicted(folder, tmp_path / "out", faces=None) == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"video": None}, "--data, --video: expected one of the two, got none"),
        ({"data": Path("x")}, "--data, --video: expected one of the two, got both"),
        ({"video": Path("nowhere.mp4")}, "nowhere"),
        ({"faces": Path("nowhere")}, "nowhere"),
        ({"template": Path("x")}, "--template: expected it with --data alone"),
    ],
)
def test_what_cannot_be_predicted_is_refused(folder, tmp_path, options, match):
    with pytest.raises((UserError, OSError), match=match):
        predicted(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_video_that_was_cut_off_leaves_nothing(folder, tmp_path):
    video = tmp_path / "cut.mp4"
    content = (folder / "footage" / "videos" / "video001.mp4").read_bytes()
    video.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        predicted(folder, tmp_path / "out", video=video)
    assert {path.name for path in tmp_path.iterdir()} == {"cut.mp4"}


def test_features_of_unknown_networks_need_their_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "about", lambda folder: None)
    with pytest.raises(UserError, match="--visual: expected the file of the network's weights"):
        predicted(folder, tmp_path / "out")


# ---- live


def test_live_values_are_those_of_windows(folder):
    config, model = runs.load_best(folder / "valence")
    features = [torch.randn(100, width) for width in model.widths.values()]
    live = Live(model, every=3)
    values = [live.push(*(x[n] for x in features)) for n in range(100)]
    assert [n for n, value in enumerate(values) if value is not None] == list(range(2, 100, 3))
    for n in (2, 50, 98):
        start = max(0, n + 1 - config.window)
        window = [torch.zeros(1, config.window, x.shape[1]) for x in features]
        for padded, x in zip(window, features, strict=True):
            padded[0, : n + 1 - start] = x[start : n + 1]
        with torch.no_grad():
            expected = model(*window, lengths=torch.tensor([n + 1 - start]))[0, n - start]
        assert values[n] == pytest.approx(float(expected), abs=1e-6)
    live.reset()
    assert [live.push(*(x[n] for x in features)) for n in range(100)] == values


def test_live_with_networks_sees_every_frame_once(folder, monkeypatch):
    _, model = runs.load_best(folder / "loop")
    arrays = folder / "data" / "npy_data" / "video001"
    faces, patches = np.load(arrays / "video.npy"), np.load(arrays / "logmel.npy")
    seen = []
    network = model.backbones["visual"]
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    live = Live(model, every=10)
    value = [live.push(faces[n], patches[n]) for n in range(20)][-1]
    assert seen == [1] * 20
    window = torch.zeros(1, model.model.length, 48, 48, 3, dtype=torch.uint8)
    sound = torch.zeros(1, model.model.length, 96, 64)
    window[0, :20], sound[0, :20] = torch.from_numpy(faces[:20]), torch.from_numpy(patches[:20]).float()
    with torch.no_grad():
        assert value == pytest.approx(float(model(window, sound, torch.tensor([20]))[0, 19]), abs=1e-5)


def test_live_refuses_what_does_not_fit(folder):
    _, model = runs.load_best(folder / "valence")
    with pytest.raises(ValueError, match="every: expected"):
        Live(model, every=0)
    with pytest.raises(ValueError, match=r"frame: expected visual, audio of shapes \[\[512\], \[128\]\], got \[\[3\]"):
        Live(model).push(torch.zeros(3), torch.zeros(128))
    _, whole = runs.load_best(folder / "loop")
    with pytest.raises(TypeError, match=r"expected a face in torch\.uint8"):
        Live(whole).push(torch.zeros(48, 48, 3), torch.zeros(96, 64))
