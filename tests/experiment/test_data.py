"""Data on disk: what is read, what is repaired, what is refused; windows and folds."""

import math
import pickle
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytest import fixture, mark, raises
from torch.utils.data import DataLoader

from grjca.data.layout import folds
from grjca.data.reading import annotation
from grjca.data.videos import Video, load, problems
from grjca.data.windows import WindowDataset, stitch, windows
from grjca.errors import UserError
from grjca.evaluation.predict import read_template

WIDTHS = {"visual": 6, "audio": 3}
LENGTHS = {"train": {"a": 20, "b_left": 31, "b_right": 31}, "validate": {"c": 12}}


def write_features(folder: Path, length: int, names=("visual.npy", "audio.npy"), seed=0, dtype=np.float32):
    rng = np.random.default_rng([seed, length])
    folder.mkdir(parents=True)
    for name, width in zip(names, WIDTHS.values(), strict=True):
        np.save(folder / name, rng.standard_normal((length, width)).astype(dtype))


def labels_of(length: int) -> np.ndarray:
    return np.round(np.random.default_rng(length).uniform(-1, 1, (length, 2)), 6)


def write_annotation(path: Path, labels: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("valence,arousal\n" + "".join(f"{v:.6f},{a:.6f}\n" for v, a in labels), newline="\n")


@fixture
def root(tmp_path) -> Path:
    """Three videos to train on and one to validate on, in the plain layout."""
    for split, videos in LENGTHS.items():
        for name, length in videos.items():
            write_annotation(tmp_path / "annotations" / split / f"{name}.txt", labels_of(length))
            write_features(tmp_path / "features" / name, length)
    return tmp_path


@fixture
def npy_root(tmp_path_factory) -> Path:
    """The same videos as npy_data/{train,validate}/<video>/, without annotations/."""
    root = tmp_path_factory.mktemp("npy")
    for split, videos in LENGTHS.items():
        for name, length in videos.items():
            folder = root / "npy_data" / split / name
            write_features(folder, length, ("video.npy", "vggish.npy"))
            np.save(folder / "VA_continuous_label.npy", labels_of(length))
    return root


def refusal(root: Path, split="train", **options) -> str:
    """Return the message of load, one sentence or two, after checking that problems reports it too."""
    with raises(UserError) as caught:
        load(root, split, widths=WIDTHS, **options)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 600
    assert message in problems(root, widths=WIDTHS).problems
    return message


class TestWindows:
    @mark.parametrize(
        ("length", "expected"),
        [
            (0, []),
            (1, [(0, 1)]),
            (299, [(0, 299)]),
            (300, [(0, 300)]),
            (301, [(0, 300), (1, 301)]),
            (499, [(0, 300), (199, 499)]),
            (500, [(0, 300), (200, 500)]),
            (501, [(0, 300), (200, 500), (201, 501)]),
            (700, [(0, 300), (200, 500), (400, 700)]),
        ],
    )
    def test_table(self, length, expected):
        assert windows(length) == expected

    @given(st.data())
    def test_every_frame_is_covered_by_as_few_windows_as_the_hop_allows(self, data):
        length, size = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 60))
        hop = data.draw(st.integers(1, size))
        spans = windows(length, size, hop)
        assert {frame for start, stop in spans for frame in range(start, stop)} == set(range(length))
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert {stop - start for start, stop in spans} == {min(size, length)}
        assert len(spans) == 1 + math.ceil(max(0, length - size) / hop)
        assert [start for start, _ in spans[:-1]] == [i * hop for i in range(len(spans) - 1)]

    @mark.parametrize("arguments", [(-1,), (10, 0), (10, 5, 0), (10, 5, 6), (10, 5, -1)])
    def test_gaps_and_nonsense_are_refused(self, arguments):
        with raises(UserError, match="expected"):
            windows(*arguments)


TRAIN = [f"t{i:03d}" for i in range(356)]
VALIDATE = [f"v{i:02d}" for i in range(76)]


class TestFolds:
    def test_table_of_the_published_sizes(self):
        chunks = {5: (0, 71), 4: (71, 142), 3: (142, 213), 2: (213, 284), 1: (284, 356)}
        shuffled = sorted(TRAIN, key=lambda name: name[::-1])
        assert folds(shuffled, VALIDATE[::-1], 0) == (TRAIN, VALIDATE)
        for fold, (start, stop) in chunks.items():
            train, validate = folds(shuffled, VALIDATE[::-1], fold)
            assert validate == TRAIN[start:stop]
            assert train == TRAIN[:start] + TRAIN[stop:] + VALIDATE

    @mark.parametrize("count", [5, 6, 9, 23])
    def test_every_training_video_is_validated_once(self, count):
        names = TRAIN[:count]
        parts = [folds(names, ["v"], fold) for fold in range(1, 6)]
        assert sorted(name for _, validate in parts for name in validate) == names
        assert all(validate and sorted(train + validate) == [*names, "v"] for train, validate in parts)

    def test_refusals(self):
        for fold in (-1, 6):
            with raises(UserError, match=f"no fold {fold}"):
                folds(TRAIN, VALIDATE, fold)
        with raises(UserError, match="at least 5 training videos, there are 4"):
            folds(TRAIN[:4], VALIDATE, 2)


class TestLoad:
    def test_what_was_written_is_read(self, root):
        videos = load(root, "train", widths=WIDTHS)
        assert [(video.name, video.length) for video in videos] == list(LENGTHS["train"].items())
        for video in videos:
            assert video.labels.dtype == np.float64 and video.valid.all() and video.notes == ()
            np.testing.assert_array_equal(video.labels, labels_of(video.length))
            visual, audio = video.read(3, 9).values()
            assert visual.dtype == audio.dtype == np.float32
            np.testing.assert_array_equal(visual, np.load(root / "features" / video.name / "visual.npy")[3:9])
            np.testing.assert_array_equal(audio, np.load(root / "features" / video.name / "audio.npy")[3:9])

    def test_splits(self, root):
        write_features(root / "features" / "z", 9)
        names = {split: [v.name for v in load(root, split, widths=WIDTHS)] for split in ("validate", "test", "all")}
        assert names == {"validate": ["c"], "test": ["z"], "all": ["a", "b_left", "b_right", "c", "z"]}
        (video,) = load(root, "test", widths=WIDTHS)
        assert video.labels is None and video.length == 9 and not video.valid.any()

    def test_folds(self, root):
        for i in range(4):
            write_annotation(root / "annotations" / "train" / f"d{i}.txt", labels_of(8))
            write_features(root / "features" / f"d{i}", 8)
        assert [v.name for v in load(root, "validate", fold=5, widths=WIDTHS)] == ["a"]
        assert [v.name for v in load(root, "validate", fold=1, widths=WIDTHS)] == ["d2", "d3"]
        assert [v.name for v in load(root, "train", fold=1, widths=WIDTHS)] == [
            "a",
            "b_left",
            "b_right",
            "c",
            "d0",
            "d1",
        ]

    def test_both_layouts_are_equal(self, root, npy_root):
        flat = npy_root.parent / "flat"
        shutil.copytree(root / "annotations", flat / "annotations")
        for folder in npy_root.glob("npy_data/*/*"):
            shutil.copytree(folder, flat / "npy_data" / folder.name)
        for split in LENGTHS:
            plain = load(root, split, widths=WIDTHS)
            for other in (npy_root, flat):
                for a, b in zip(plain, load(other, split, widths=WIDTHS), strict=True):
                    assert (a.name, a.length) == (b.name, b.length)
                    for x, y in zip(
                        (a.labels, *a.read(0, 12).values()), (b.labels, *b.read(0, 12).values()), strict=True
                    ):
                        np.testing.assert_array_equal(x, y)

    @mark.parametrize(
        ("holder", "names"),
        [
            ("annotations", ("Train_Set", "Validation_Set")),
            (".", ("Train_Set", "Validation_Set")),
            ("VA_Estimation_Challenge", ("Train_Set", "Validation_Set")),
            ("annotations/VA_Estimation_Challenge", ("Train_Set", "Validation_Set")),
            ("VA", ("train", "validate")),
            ("VA_Set", ("Train_Set", "Validation_Set")),
            ("Annotations", ("TRAIN", "val")),
            ("annotations", ("train set", "validation-set")),
            (".", ("training", "valid")),
        ],
    )
    def test_names_of_folders(self, root, npy_root, holder, names):
        expected = {split: [(v.name, v.length) for v in load(root, split, widths=WIDTHS)] for split in LENGTHS}
        (root / "annotations").rename(root / "before")
        (root / holder).mkdir(parents=True, exist_ok=True)
        for split, name in zip(LENGTHS, names, strict=True):
            shutil.move(root / "before" / split, root / holder / name)
            (npy_root / "npy_data" / split).rename(npy_root / "npy_data" / name)
        for folder in (root, npy_root):
            for split in LENGTHS:
                videos = load(folder, split, widths=WIDTHS)
                assert [(video.name, video.length) for video in videos] == expected[split]
                assert all(video.valid.all() for video in videos)
        found = problems(root, widths=WIDTHS)
        assert (found.problems, found.notes) == ([], [])
        places = [f"Labels, {split}: {root / holder / name}" for split, name in zip(LENGTHS, names, strict=True)]
        assert sorted(found.folders) == sorted([*places, f"Features: {root / 'features'}"])

    def test_labels_of_other_tasks_and_folders_of_other_things_are_let_alone(self, root):
        shutil.copytree(root / "annotations", root / "EXPR_Recognition_Challenge")
        (root / "train").mkdir()
        (root / "train" / "z.mp4").touch()
        write_features(root / "features" / "z", 9)
        assert [v.name for v in load(root, "train", widths=WIDTHS)] == ["a", "b_left", "b_right"]
        assert problems(root, widths=WIDTHS).problems == []

    def test_annotations_that_end_in_csv(self, root):
        for path in root.glob("annotations/*/*.txt"):
            path.rename(path.with_suffix(".CSV" if path.stem == "a" else ".csv"))
        assert [(v.name, v.length) for v in load(root, "train", widths=WIDTHS)] == list(LENGTHS["train"].items())
        shutil.copy(root / "annotations/train/a.CSV", root / "annotations/train/a.txt")
        assert "is there twice, as annotation" in refusal(root)

    @mark.parametrize("written", ["NFC", "NFD"])
    def test_names_in_either_form_of_unicode(self, root, written):
        other = {"NFC": "NFD", "NFD": "NFC"}[written]
        composed, name, features = (unicodedata.normalize(form, "René") for form in ("NFC", written, other))
        write_annotation(root / "annotations/train" / f"{name}.txt", labels_of(9))
        write_features(root / "features" / features, 9)
        video = load(root, "train", widths=WIDTHS)[0]
        assert (video.name, video.length) == (composed, 9) and problems(root, widths=WIDTHS).problems == []
        (root / "template.txt").write_text(f"image_location\n{name}/00001.jpg\n", encoding="utf-8")
        (row,) = read_template(root / "template.txt", {video.name})
        assert row == (f"{name}/00001.jpg", composed, 1)
        write_annotation(root / "annotations/validate" / f"{features}.txt", labels_of(9))
        message = refusal(root)
        assert "is there twice" in message and "so do the ways in which Unicode" in message

    def test_flat_npy_data_without_labels_is_for_testing(self, tmp_path):
        write_features(tmp_path / "npy_data" / "x", 7, ("video.npy", "logmel.npy"))
        (video,) = load(tmp_path, "test", widths=WIDTHS)
        assert video.files["audio"].name == "logmel.npy"
        with raises(UserError, match=r"create annotations/train/<video>\.txt.*or move.*into npy_data/train/"):
            load(tmp_path, "train", widths=WIDTHS)
        assert problems(tmp_path, widths=WIDTHS).problems == []

    def test_flat_labels_of_no_split_are_not_taken_for_a_test(self, tmp_path):
        write_features(tmp_path / "npy_data" / "x", 7, ("video.npy", "vggish.npy"))
        np.save(tmp_path / "npy_data" / "x" / "VA_continuous_label.npy", labels_of(7))
        assert "npy_data/train/" in refusal(tmp_path, "train")
        with raises(UserError, match="none to test on"):
            load(tmp_path, "test", widths=WIDTHS)
        (video,) = load(tmp_path, "all", widths=WIDTHS)
        assert video.valid.all()

    def test_a_label_that_is_out_of_range_masks_its_frame_even_if_the_other_is_fine(self, root):
        labels = labels_of(20)
        labels[3], labels[5, 0], labels[7, 1], labels[9] = -5, -5, -5, (1.000001, 0)
        labels[11] = (-1, 1)
        write_annotation(root / "annotations/train/a.txt", labels)
        video = load(root, "train", widths=WIDTHS)[0]
        assert np.flatnonzero(~video.valid).tolist() == [3, 5, 7, 9]
        assert math.isclose(problems(root, widths=WIDTHS).splits["train"].invalid_share, 4 / 82)
        item = WindowDataset([video], "valence", 30, 20)[0]
        assert not item["mask"][[3, 5, 7, 9]].any() and item["mask"].sum() == 16
        assert (item["label"][[3, 5, 7, 9]] == 0).all()

    @mark.parametrize("difference", [-5, -1, 2, 5])
    def test_lengths_are_mended(self, root, difference):
        shutil.rmtree(root / "features/a")
        write_features(root / "features/a", 20 + difference)
        video = load(root, "train", widths=WIDTHS)[0]
        stored = np.load(root / "features/a/visual.npy")
        visual, audio = video.read(0, 20).values()
        assert video.length == len(visual) == len(audio) == 20
        kept = min(20, len(stored))
        np.testing.assert_array_equal(visual[:kept], stored[:kept])
        assert (visual[kept:] == stored[-1]).all()
        np.testing.assert_array_equal(video.read(18, 20)["visual"], visual[18:])
        assert len(video.notes) == 2 and f"has {20 + difference} frames instead of 20" in video.notes[0]
        assert set(video.notes) <= set(problems(root, widths=WIDTHS).notes)

    def test_without_annotation_the_visual_length_counts(self, root):
        write_features(root / "features/z", 9)
        np.save(root / "features/z/audio.npy", np.ones((7, 3), np.float32))
        (video,) = load(root, "test", widths=WIDTHS)
        assert video.length == 9 and video.read(8, 9)["audio"].shape == (1, 3)

    @mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
    def test_float_dtypes(self, root, dtype):
        shutil.rmtree(root / "features/a")
        write_features(root / "features/a", 20, dtype=dtype)
        visual = load(root, "train", widths=WIDTHS)[0].read(0, 20)["visual"]
        assert visual.dtype == np.float32 and visual.flags.writeable
        np.testing.assert_array_equal(visual, np.load(root / "features/a/visual.npy").astype(np.float32))

    def test_features_stay_on_disk(self, root):
        shutil.rmtree(root / "features/a")
        write_features(root / "features/a", 20)
        np.save(root / "features/a/visual.npy", np.zeros((20, 50_000), np.float32))  # 4 MB
        for name in ("b_left", "b_right"):
            (root / f"annotations/train/{name}.txt").unlink()
        (video,) = load(root, "train", widths={"visual": 50_000, "audio": 3})
        assert len(pickle.dumps(video)) < 10_000 + video.labels.nbytes
        np.save(root / "features/a/visual.npy", np.ones((20, 50_000), np.float32))
        assert (pickle.loads(pickle.dumps(video)).read(0, 2)["visual"] == 1).all()
        (root / "features/a/visual.npy").unlink()
        with raises(UserError, match=r"visual\.npy is missing"):
            video.read(0, 2)

    def test_frames_outside_of_a_video(self, root):
        video = load(root, "train", widths=WIDTHS)[0]
        for span in ((-1, 3), (0, 21), (5, 4)):
            with raises(ValueError, match="frames 0 to 20"):
                video.read(*span)

    def test_hidden_files_are_ignored(self, root):
        (root / "annotations/train/.DS_Store").write_bytes(b"\xff")
        (root / "features/.DS_Store").write_bytes(b"\xff")
        (root / "features/._a").mkdir()
        assert len(load(root, "train", widths=WIDTHS)) == 3
        assert problems(root, widths=WIDTHS).notes == []


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def saved(array, **options):
    return lambda path: np.save(path, array, **options)


def replaced(old: bytes, new: bytes):
    """Return a function that replaces text in a header, padded with blanks to the same number of bytes."""

    def spoil(path):
        data = path.read_bytes()
        path.write_bytes(data.replace(old + b" " * (len(new) - len(old)), new))
        assert path.read_bytes() != data

    return spoil


BAD_FEATURES = {
    "a truncated file": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "no readable .npy file"),
    "a truncated header": (lambda path: path.write_bytes(path.read_bytes()[:30]), "no readable .npy file"),
    "an overlong header": (
        lambda path: path.write_bytes(b"\x93NUMPY\x02\x00\x00\x00\x01\x00" + b" " * 2**16),
        "no readable .npy file",
    ),
    "an empty file": (lambda path: path.write_bytes(b""), "no readable .npy file"),
    "text": (lambda path: path.write_text("1,2,3"), "no readable .npy file"),
    "a huge shape": (replaced(b"(20, 6), }", b"(" + b"9" * 22 + b", 6), }"), "no readable .npy file"),
    "a negative shape": (replaced(b"(20, 6), }", b"(-20, -6), }"), "no readable .npy file"),
    "two arrays": (lambda path: path.write_bytes(path.read_bytes() * 2), "608 bytes more than"),
    "wrong width": (saved(np.zeros((20, 7), np.float32)), r"holds \[20, 7\]; expected visual \[N, 6\]"),
    "wrong ndim": (saved(np.zeros((20, 2, 3), np.float32)), r"holds \[20, 2, 3\]; expected"),
    "transposed": (saved(np.zeros((6, 20), np.float32)), r"holds \[6, 20\]; expected.*Transpose the array"),
    "one number": (saved(np.float32(3)), r"holds \[\]; expected"),
    "images": (saved(np.zeros((20, 3, 8, 8), np.uint8)), "holds .*face or voice network"),
    "integers": (saved(np.zeros((20, 6), np.int32)), "holds int32 numbers; expected.*float32"),
    "complex": (saved(np.zeros((20, 6), complex)), "holds complex128 numbers"),
    "no frames": (saved(np.zeros((0, 6), np.float32)), "holds no frames"),
    "objects": (saved(np.full((20, 6), {}), allow_pickle=True), "no readable .npy file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
    "nothing": (lambda path: path.unlink(), "is missing"),
}


class TestBadFeatures:
    @mark.parametrize(("spoil", "expected"), BAD_FEATURES.values(), ids=BAD_FEATURES)
    def test_is_refused_by_name(self, root, spoil, expected):
        path = root / "features/a/visual.npy"
        spoil(path)
        message = refusal(root)
        assert message.startswith(str(path)) and re.search(expected, message)

    @mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
    def test_numbers_that_are_not_finite(self, root, value):
        array = np.zeros((5020, 3))
        array[5003, 1] = value
        np.save(root / "features/a/audio.npy", array)
        write_annotation(root / "annotations/train/a.txt", labels_of(5020))
        np.save(root / "features/a/visual.npy", np.zeros((5020, 6)))
        message = refusal(root)
        assert message.startswith(
            f"{root / 'features/a/audio.npy'}, frame 5003 (counted from 0): column 1 holds {value}"
        )

    def test_nothing_is_executed(self, root, tmp_path_factory):
        trap = tmp_path_factory.mktemp("trap") / "executed"
        path = root / "features/a/visual.npy"
        attacks = [
            lambda: path.write_bytes(pickle.dumps(Malicious(trap))),
            lambda: np.save(path, np.full((20, 6), Malicious(trap)), allow_pickle=True),
        ]
        for attack in attacks:
            attack()
            assert str(path) in refusal(root)
            assert not trap.exists()
        np.load(path, allow_pickle=True)
        assert trap.exists(), "the attack would have worked"

    def test_missing_audio_and_missing_folder(self, root):
        (root / "features/a/audio.npy").unlink()
        assert refusal(root).startswith(f"{root / 'features/a/audio.npy'} is missing; expected audio [N, 3]")
        shutil.rmtree(root / "features/a")
        message = refusal(root)
        assert str(root / "annotations/train/a.txt") in message and str(root / "features/a") in message

    def test_npy_data_names(self, npy_root):
        folder = npy_root / "npy_data/train/a"
        (folder / "vggish.npy").unlink()
        assert "vggish.npy is missing" in refusal(npy_root)
        np.save(folder / "logmel.npy", np.zeros((20, 1, 96, 64), np.float32))
        assert "logmel.npy holds [20, 1, 96, 64]; expected audio [N, 3]" in refusal(npy_root)
        (folder / "VA_continuous_label.npy").unlink()
        assert "VA_continuous_label.npy is missing; expected labels [N, 2]" in refusal(npy_root)

    @mark.parametrize("difference", [-6, 6])
    def test_lengths_that_differ_by_more(self, root, difference):
        np.save(root / "features/a/audio.npy", np.zeros((20 + difference, 3), np.float32))
        message = refusal(root)
        assert f"{root / 'features/a/audio.npy'} has {20 + difference} frames" in message
        assert f"{root / 'annotations/train/a.txt'} has 20" in message


BAD_TEXTS = {
    "a text cell": (b"valence,arousal\n0.1,0.2\n0.1,happy\n", 3, "two numbers"),
    "a missing column": (b"valence,arousal\n0.1,0.2\n0.1\n", 3, "two numbers"),
    "an extra column": (b"valence,arousal\n0.1,0.2,0.3\n", 2, "two numbers"),
    "a blank line": (b"valence,arousal\n0.1,0.2\n\n0.1,0.2\n", 3, "two numbers.*''"),
    "blank line, CRLF": (b"valence,arousal\r\n0.1,0.2\r\n\r\n0.1,0.2\r\n", 3, "two numbers.*''"),
    "a comment": (b"valence,arousal\n0.1,0.2\n# pause\n", 3, "two numbers"),
    "nan": (b"valence,arousal\nnan,0.2\n", 2, "two numbers"),
    "inf": (b"valence,arousal\n0.1,0.2\n0.2,-inf\n", 3, "two numbers"),
    "beyond float32": (b"valence,arousal\n0.1,1e300\n", 2, "two numbers"),
    "underscore": (b"valence,arousal\n0.1,0_2\n", 2, "two numbers"),
    "a long line": (b"valence,arousal\n" + b"x" * 9999, 2, "two numbers"),
    "a wrong header": (b"arousal,valence\n0.1,0.2\n", 1, "header valence,arousal, got 'arousal,valence'"),
    "no header": (b"0.1,0.2\n", 1, "header"),
    "nothing": (b"", 1, "header"),
    "bytes": (b"valence,arousal\n0.1,0.2\n0.1,\xff\n", 3, "not UTF-8"),
    "UTF-16": ("valence,arousal\n0.1,0.2\n".encode("utf-16"), 1, "not UTF-8"),
}


class TestAnnotation:
    @mark.parametrize(("content", "line", "expected"), BAD_TEXTS.values(), ids=BAD_TEXTS)
    def test_is_refused_by_line(self, root, content, line, expected):
        path = root / "annotations/train/a.txt"
        path.write_bytes(content)
        message = refusal(root)
        assert message.startswith(f"{path}, line {line}: ") and re.search(expected, message)

    def test_header_only(self, root):
        (root / "annotations/train/a.txt").write_text("valence,arousal\n")
        assert refusal(root).startswith(f"{root / 'annotations/train/a.txt'} has a header but no frames")

    @mark.parametrize(
        "content",
        [
            b"valence,arousal\n0.5,-5\n1,1e-1\n",
            b"valence,arousal\n0.5,-5\n1,1e-1",
            b"\xef\xbb\xbfvalence,arousal\r\n0.5, -5\r\n1,1e-1\r\n",
            b"valence,arousal\r0.5,-5\r1,.1\r",
            b"valence,arousal\n0.5,-5\n1,.1\n\n",
        ],
    )
    def test_ways_to_write_the_same(self, tmp_path, content):
        (tmp_path / "x.txt").write_bytes(content)
        np.testing.assert_array_equal(annotation(tmp_path / "x.txt"), np.array([[0.5, -5], [1, 0.1]]))


class TestBadFolders:
    def test_root(self, tmp_path):
        assert "does not exist" in refusal(tmp_path / "nowhere")
        (tmp_path / "file").touch()
        assert "is not a folder" in refusal(tmp_path / "file")
        assert "none of the folders annotations, features and npy_data" in refusal(tmp_path)
        (tmp_path / "annotations").mkdir()
        assert "has annotations but no features" in refusal(tmp_path)
        (tmp_path / "features").mkdir()
        for split in ("train", "validate"):
            assert "There is no video" in refusal(tmp_path, split)

    def test_empty_split(self, root):
        (root / "annotations/validate/c.txt").unlink()
        assert re.search(r"validate split of .* is empty: create annotations/validate", refusal(root, "validate"))
        with raises(UserError, match=r"no split 'val': expected one of train, validate, test, all"):
            load(root, "val")

    @mark.parametrize("path", ["labels/train/a.txt", "annotations/a.txt", "annotations/fold1/train/a.csv"])
    def test_labels_in_a_folder_of_another_name(self, root, path):
        shutil.rmtree(root / "annotations")
        write_annotation(root / path, labels_of(20))
        write_annotation(root / "run/predictions/a.txt", labels_of(20))
        (root / "run/challenge.txt").write_text("image_location,valence,arousal\n")
        wrong = [text for text in problems(root, widths=WIDTHS).problems if "look like labels" in text]
        assert len(wrong) == 1 and f"{(root / path).parent} holds files" in wrong[0]
        assert "the train or the validate split" in wrong[0] and "expected annotations/{train,validate}" in wrong[0]
        assert problems(root, widths=WIDTHS).folders[0] == "Labels: none"

    def test_labels_of_one_split_in_a_folder_of_another_name(self, root):
        (root / "annotations/validate").rename(root / "annotations/held_out")
        empty, lost = problems(root, widths=WIDTHS).problems
        assert "validate split" in empty
        assert "for the validate split" in lost and str(root / "annotations/held_out") in lost and "c.txt" in lost

    def test_labels_among_features(self, root):
        shutil.rmtree(root / "annotations")
        assert problems(root, widths=WIDTHS).problems == []  # all for testing
        np.save(root / "features/a/VA_continuous_label.npy", labels_of(20))
        (wrong,) = problems(root, widths=WIDTHS).problems
        assert f"{root / 'features'} holds files that look like labels" in wrong and "a/VA_cont" in wrong

    @mark.parametrize("name", ["a.npy", "a.json", "a", "a.tsv"])
    def test_annotations_of_a_kind_that_is_not_read(self, root, name):
        (root / "annotations/train/a.txt").rename(root / "annotations/train" / name)
        assert f"{root / 'annotations/train' / name} is not read, so that a would count as" in refusal(root)

    def test_a_folder_of_annotations_of_a_video(self, root):
        (root / "annotations/train/a.txt").unlink()
        (root / "annotations/train/a").mkdir()
        assert "got a folder. Write it as text" in refusal(root)

    def test_other_files_beside_annotations_are_noted(self, root):
        (root / "annotations/train/a.json").touch()
        (root / "annotations/train/readme").touch()
        found = problems(root, widths=WIDTHS)
        assert found.problems == [] and len(found.notes) == 2
        assert all("is ignored" in note for note in found.notes)

    def test_a_fold_of_no_training_videos(self, root):
        shutil.rmtree(root / "annotations/train")
        assert "train split" in refusal(root, "validate", fold=1)

    def test_video_in_both_splits(self, root):
        shutil.copy(root / "annotations/train/a.txt", root / "annotations/validate/a.txt")
        message = refusal(root)
        assert str(root / "annotations/train/a.txt") in message and str(root / "annotations/validate/a.txt") in message
        assert refusal(root, "validate") == message

    def test_features_in_both_layouts(self, root):
        write_features(root / "npy_data/a", 20, ("video.npy", "vggish.npy"))
        message = refusal(root)
        assert str(root / "features/a") in message and str(root / "npy_data/a") in message

    def test_names_that_differ_in_case(self, root):
        (root / "annotations/train/a.txt").rename(root / "annotations/train/A.txt")
        assert "differ in case" in refusal(root)
        shutil.copytree(root / "features/a", root / "features/A", dirs_exist_ok=True)
        assert len(list((root / "features").glob("[aA]"))) == 1 or "is there twice" in refusal(root)

    def test_problems_are_all_named(self, root):
        (root / "features/a/audio.npy").unlink()
        (root / "annotations/train/a.txt").write_text("valence,arousal\nx\n")
        np.save(root / "features/b_left/visual.npy", np.zeros((3, 6)))
        write_annotation(root / "annotations/validate/d.txt", labels_of(5))
        write_features(root / "features/z", 5)
        (root / "features/readme.md").touch()
        found = problems(root, widths=WIDTHS)
        expected = ["a.txt, line 2", "audio.npy is missing", "has 3 frames", "d is missing"]
        assert all(part in text for part, text in zip(expected, found.problems, strict=True))
        assert any("readme.md is ignored" in note for note in found.notes)
        assert any("for testing only: 1 (z)" in note for note in found.notes)
        counts = {split: (summary.videos, summary.frames) for split, summary in found.splits.items()}
        assert counts == {"train": (1, 31), "validate": (1, 12), "test": (1, 5)}


class TestWindowDataset:
    def test_items(self, root):
        videos = load(root, "train", widths=WIDTHS)
        dataset = WindowDataset(videos, "arousal", 25, 10)
        assert dataset.spans == [(0, 0, 20), (1, 0, 25), (1, 6, 31), (2, 0, 25), (2, 6, 31)] and len(dataset) == 5
        for i, (video, start, stop) in enumerate(dataset.spans):
            item, n = dataset[i], stop - start
            visual, audio = videos[video].read(start, stop).values()
            for name, expected in {
                "visual": visual,
                "audio": audio,
                "label": videos[video].labels[start:stop, 1].astype(np.float32),
                "mask": np.ones(n, bool),
            }.items():
                assert len(item[name]) == 25
                np.testing.assert_array_equal(item[name][:n], expected)
                assert not item[name][n:].any()
            assert (int(item["length"]), int(item["index"])) == (n, i)
        types = {name: tensor.dtype for name, tensor in dataset[0].items()}
        f32, i64 = torch.float32, torch.int64
        assert types == {"visual": f32, "audio": f32, "label": f32, "mask": torch.bool, "length": i64, "index": i64}

    def test_without_labels(self, root):
        write_features(root / "features/z", 9)
        item = WindowDataset(load(root, "test", widths=WIDTHS), "valence", 12, 8)[0]
        assert not item["mask"].any() and not item["label"].any() and item["length"] == 9

    def test_in_worker_processes(self, root):
        dataset = WindowDataset(load(root, "train", widths=WIDTHS), "valence", 25, 10)
        (batch,) = DataLoader(dataset, batch_size=5, num_workers=1)
        torch.testing.assert_close(batch["visual"][3], dataset[3]["visual"], rtol=0, atol=0)


class TestStitch:
    @mark.parametrize("trailing", [(), (2, 3)])
    @mark.parametrize("kind", ["tensor", "arrays"])
    def test_mean_over_windows(self, trailing, kind):
        lengths, size, hop = [7, 25, 10, 41], 10, 4
        spans = [(v, a, b) for v, length in enumerate(lengths) for a, b in windows(length, size, hop)]
        values = np.random.default_rng(0).standard_normal((len(spans), size, *trailing)).astype(np.float32)
        stitched = stitch(
            spans, lengths, torch.tensor(values, requires_grad=True) if kind == "tensor" else list(values)
        )
        for v, length in enumerate(lengths):
            assert stitched[v].shape == (length, *trailing) and stitched[v].dtype == np.float64
            for frame in range(length):
                seen = [values[i][frame - a] for i, (w, a, b) in enumerate(spans) if w == v and a <= frame < b]
                np.testing.assert_allclose(
                    stitched[v][frame], np.mean(seen, axis=0, dtype=np.float64), rtol=1e-14, atol=1e-14
                )

    def test_refusals(self):
        ones = np.ones((2, 5))
        with raises(ValueError, match="2 windows for 1 spans"):
            stitch([(0, 0, 5)], [5], ones)
        with raises(ValueError, match="No window covers frame 5 of video 0"):
            stitch([(0, 0, 5), (0, 6, 11)], [11], ones)
        with raises(ValueError, match="No window covers frame 0 of video 1"):
            stitch([(0, 0, 5), (0, 2, 7)], [7, 3], ones)
        with raises(ValueError, match="window of 5 rows for frames 0 to 6 of 6"):
            stitch([(0, 0, 6), (0, 0, 5)], [6], ones)
        assert stitch([], [], []) == []


def test_a_video_compares_and_hashes_by_identity(root):
    first, second = (load(root, "validate", widths=WIDTHS)[0] for _ in range(2))
    assert isinstance(first, Video) and first != second and len({first, second}) == 2
