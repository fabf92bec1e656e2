"""``grjca predict``: files per video and the challenge file, with and without a template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from grjca.config import PredictConfig
from grjca.errors import UserError
from grjca.evaluation.predict import Row, challenge, predict, read_template
from grjca.training import runs
from small import HOP, LENGTHS, MODEL, WINDOW, read_predictions, write_data, write_run

HEADER = "image_location,valence,arousal"
FRAMES = {name: length for of in LENGTHS.values() for name, length in of.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def valence(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "valence", data)


@pytest.fixture(scope="module")
def arousal(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "arousal", data, target="arousal", fusion="hgrjca")


def by_hand(run: Path, data: Path, name: str) -> np.ndarray:
    """Predict a video window by window, [N]."""
    _, model = runs.load_best(run)
    visual, audio = (torch.from_numpy(np.load(data / "features" / name / f"{m}.npy")) for m in ("visual", "audio"))
    frames = len(visual)
    starts = [0] if frames <= WINDOW else sorted({*range(0, frames - WINDOW + 1, HOP), frames - WINDOW})
    total, count = np.zeros(frames), np.zeros(frames)
    for start in starts:
        part = [x[start : start + WINDOW] for x in (visual, audio)]
        padded = [torch.nn.functional.pad(x, (0, 0, 0, WINDOW - len(x)))[None] for x in part]
        with torch.no_grad():
            values = model(*padded, torch.tensor([len(part[0])]))[0, : len(part[0])].numpy()
        total[start : start + WINDOW] += values
        count[start : start + WINDOW] += 1
    return total / count


def read_challenge(path: Path) -> tuple[str, list[str], np.ndarray]:
    """Return the header, the image locations and the values [rows, 2]."""
    header, *lines = path.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    return header, [row[0] for row in cells], np.array([row[1:] for row in cells], float)


def test_predicts_every_video_and_frame(
    valence: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert predict(PredictConfig(valence, data, tmp_path / "out")) == 0
    found = read_predictions(tmp_path / "out" / "predictions")
    assert {name: len(of) for name, of in found.items()} == FRAMES
    for name, of in found.items():
        np.testing.assert_allclose(of[:, 0], by_hand(valence, data, name), rtol=0, atol=1e-6)
    assert (tmp_path / "out" / "predictions" / "delta.txt").read_text().startswith("valence\n")

    header, images, values = read_challenge(tmp_path / "out" / "challenge.txt")
    assert header == HEADER
    assert images == [f"{name}/{i:05d}.jpg" for name in sorted(FRAMES) for i in range(1, FRAMES[name] + 1)]
    np.testing.assert_array_equal(values[:, 0], np.concatenate([found[name][:, 0] for name in sorted(FRAMES)]))
    assert not values[:, 1].any()
    assert "The column arousal is 0" in capsys.readouterr().out


def test_joins_two_runs(
    valence: Path, arousal: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").mkdir()  # an empty folder will do
    predict(PredictConfig(arousal, data, tmp_path / "out", other=valence, split="test", batch_size=2))
    assert "column" not in capsys.readouterr().out
    path = tmp_path / "out" / "predictions" / "omega.txt"
    assert [path.name for path in path.parent.iterdir()] == ["omega.txt"]
    assert path.read_text().splitlines()[0] == "valence,arousal"
    expected = np.stack([by_hand(run, data, "omega") for run in (valence, arousal)], axis=1)
    np.testing.assert_allclose(read_predictions(path.parent)["omega"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(read_challenge(tmp_path / "out" / "challenge.txt")[2], expected, rtol=0, atol=1e-6)


def test_challenge_clips_and_counts_from_one() -> None:
    values = {"valence": {"a": np.array([-1.5, 0.25, 1.0000001])}, "arousal": {"a": np.array([0.0, -2, 3])}}
    rows = [Row(f"a/{i}.jpg", "a", i) for i in (2, 1, 3, 4, 99)]
    assert challenge(rows, values).splitlines() == [
        HEADER,
        "a/2.jpg,0.25000000,-1.00000000",
        "a/1.jpg,-1.00000000,0.00000000",
        *(f"a/{i}.jpg,1.00000000,1.00000000" for i in (3, 4, 99)),
    ]


def test_template_decides_on_rows(valence: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = ["omega/00026.jpg", "delta/00003.jpg", "omega/00027.jpg", "delta/00001.jpg", "delta/00105.jpg"]
    placeholders = ["", ",", ",,", ",-5,-5", ",0.1,0.2"]
    template = tmp_path / "template.txt"
    template.write_bytes(
        "\r\n".join([HEADER, *(i + p for i, p in zip(images, placeholders, strict=True)), ""]).encode()
    )
    predict(PredictConfig(valence, data, tmp_path / "out", template=template))

    found = read_predictions(tmp_path / "out" / "predictions")
    assert sorted(found) == ["delta", "omega"]
    header, rows, values = read_challenge(tmp_path / "out" / "challenge.txt")
    assert (header, rows) == (HEADER, images)
    delta, omega = found["delta"][:, 0], found["omega"][:, 0]
    np.testing.assert_array_equal(values[:, 0], [omega[25], delta[2], omega[-1], delta[0], delta[-1]])
    assert f"{len(FRAMES) - 2} of {len(FRAMES)} videos are not in {template}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the header"),
        ("a/00001.jpg\n", "line 1: expected the header"),
        (f"{HEADER}\n", "only the header"),
        (f"{HEADER}\na/00001.jpg\nb/00001.jpg\n", "line 3: there are no features of 'b'"),
        (f"{HEADER}\na/00001.jpg\na/00002.jpg\na/1.jpg,0,0\n", "line 4: expected each frame once, but line 2"),
        (f"{HEADER}\na/00001.jpg\n\na/00002.jpg\n", "line 3: expected <video>/00001.jpg"),
        (f"{HEADER}\na/00000.jpg\n", "line 2: expected <video>/00001.jpg"),
        (f"{HEADER}\na/00001.png\n", "line 2: expected <video>/00001.jpg"),
        (f"{HEADER}\na/x.jpg\n", "line 2: expected <video>/00001.jpg"),
        (f"{HEADER}\na\n", "line 2: expected <video>/00001.jpg"),
        (f"{HEADER}\na/00001.jpg,0,0,0\n", "line 2: expected <video>/00001.jpg"),
        (f"{HEADER}\na/00001.jpg,0,high\n", "line 2: expected <video>/00001.jpg"),
        (f"{HEADER}\na/00001.jpg\n\xff", "line 3: expected text in UTF-8"),
    ],
)
def test_template_is_read_strictly(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as refused:
        read_template(path, {"a"})
    assert str(path) in str(refused.value)
    assert message in str(refused.value)


def test_template_without_placeholders_or_with_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_bytes(b"\xef\xbb\xbfimage_location\na/00017.jpg\n\n")
    assert read_template(path, {"a"}) == [Row("a/00017.jpg", "a", 17)]
    with pytest.raises(UserError, match="missing"):
        read_template(tmp_path / "missing", {"a"})


def test_never_overwrites(valence: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for out in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(UserError, match="exists already"):
            predict(PredictConfig(valence, data, out))
    with pytest.raises(UserError, match="cannot be made"):
        predict(PredictConfig(valence, data, tmp_path / "out" / "mine" / "below"))
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_nothing_is_left_of_a_failure(
    valence: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("grjca.evaluation.predict.challenge", full)
    with pytest.raises(OSError, match="No space"):
        predict(PredictConfig(valence, data, tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_refuses_runs_that_do_not_fit(valence: Path, arousal: Path, data: Path, tmp_path: Path) -> None:
    def refusal(run: Path, **options: object) -> str:
        with pytest.raises(UserError) as refused:
            predict(PredictConfig(run, data, tmp_path / "out", **options))  # type: ignore[arg-type]
        return str(refused.value)

    assert "both predict valence" in refusal(valence, other=valence)
    wider = write_run(
        tmp_path / "wider", data, target="arousal", model=replace(MODEL, modalities={"visual": 6, "audio": 9})
    )
    assert "the same modalities in the same order" in refusal(valence, other=wider)
    assert "cannot run" in refusal(valence, backend="cuda")
    assert "expected the folder of a run" in refusal(tmp_path)

    _, model = runs.load_best(arousal)
    weights = model.state_dict()
    weights["head.output.bias"] += torch.nan
    broken = write_run(tmp_path / "broken", data, target="arousal", fusion="hgrjca")
    runs.save_best(broken, runs.State(best_epoch=1), weights)
    assert "frame 1" in refusal(valence, other=broken)
    assert not (tmp_path / "out").exists()
