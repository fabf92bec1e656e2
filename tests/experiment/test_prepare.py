"""Footage to arrays: correct results, repairs, refusals, and what a killed process leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import footage_files as make
import signals
from grjca import files
from grjca.cli import main
from grjca.config import PrepareConfig
from grjca.data import audio, faces, footage, isolated, media, prepare, sources
from grjca.data.footage import Source
from grjca.errors import UserError

EACH = isolated.each
VIDEOS, CROPS, LABELS = "videos", "cropped_aligned", "labels"


def in_this_process(function: Any, calls: dict[Any, Any], jobs: int) -> Any:
    """Replace isolated.each, to save the time that processes need to start."""
    for key, arguments in calls.items():
        try:
            yield key, function(*arguments)
        except (UserError, OSError) as error:
            yield key, UserError(str(error))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "each", in_this_process)


def write_footage(root: Path) -> Path:
    """Write two annotated videos, one of them with two faces, and one to test on."""
    make.write_video(root / VIDEOS / "alpha.mp4", 20, sound=make.noise(0.8, 0.4))
    make.write_crops(root / CROPS / "alpha", 20, missing=[7])
    make.write_annotation(root / LABELS / "Train_Set" / "alpha.txt", 20, invalid=[3, 4])
    make.write_video(root / VIDEOS / "duo.mkv", 18, fps=30, sound=make.noise(0.6))
    for side, split, rows in (("left", "Train_Set", 19), ("right", "Validation_Set", 17)):
        make.write_crops(root / CROPS / f"duo_{side}", 18)
        make.write_annotation(root / LABELS / split / f"duo_{side}.txt", rows)
    make.write_video(root / VIDEOS / "omega.avi", 9)
    make.write_wav(root / VIDEOS / "omega.wav", make.noise(0.36), 16_000)
    make.write_crops(root / CROPS / "omega", 9)
    return root


def words(root: Path, out: Path, *more: object) -> list[str]:
    folders = ["--videos", root / VIDEOS, "--faces", root / CROPS, "--annotations", root / LABELS]
    return [str(word) for word in ["prepare", *folders, "--out", out, *more]]


def config(root: Path, out: Path, **options: Any) -> PrepareConfig:
    return PrepareConfig(
        videos=root / VIDEOS, faces=root / CROPS, annotations=root / LABELS, out=out, **({"jobs": 1} | options)
    )


def read(data: Path, name: str) -> dict[str, np.ndarray]:
    """Read the arrays of a video."""
    folder = data / "npy_data" / name
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in folder.glob("*.npy")}


def report(data: Path) -> dict[str, Any]:
    return json.loads((data / prepare.REPORT).read_text())


def levels(pictures: np.ndarray) -> list[int]:
    """Return the grey levels of pictures, up to what JPEG changes."""
    return [round(float(picture.mean())) for picture in pictures]


def greys(count: int, missing: int = 0) -> list[int]:
    return [0 if n == missing else make.grey(n) for n in range(1, count + 1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_footage(tmp_path_factory.mktemp("footage"))


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    """Data that the command has prepared in separate processes."""
    out = root.parent / "data"
    assert main(words(root, out)) == 0
    return out


# ---- a data folder


def test_faces_are_those_of_their_frames(data: Path) -> None:
    """Faces match their frames, also after invalid rows and a missing picture."""
    for name, count in {"alpha": 20, "duo_left": 18, "duo_right": 17, "omega": 9}.items():
        pictures = read(data, name)["video"]
        assert pictures.dtype == np.uint8 and pictures.shape[1:] == (48, 48, 3)
        assert levels(pictures[:count]) == pytest.approx(greys(count, missing=7 if name == "alpha" else 0), abs=1)
    assert len(read(data, "duo_left")["video"]) == 19 and not read(data, "duo_left")["video"][18].any()


def test_labels_keep_every_row(data: Path, root: Path) -> None:
    labels = read(data, "alpha")["VA_continuous_label"]
    assert labels.dtype == np.float64 and labels.shape == (20, 2)
    np.testing.assert_array_equal(labels[3:5], -5)
    np.testing.assert_array_equal(labels[5:, 0], np.arange(5, 20) / 1000)
    assert "VA_continuous_label" not in read(data, "omega")
    for ours, theirs in {"train/alpha": "Train_Set/alpha", "validate/duo_right": "Validation_Set/duo_right"}.items():
        copy = data / "annotations" / f"{ours}.txt"
        assert copy.read_bytes() == (root / LABELS / f"{theirs}.txt").read_bytes()
    assert len(list((data / "annotations").rglob("*.txt"))) == 3


def test_sound_is_that_of_its_frame(data: Path) -> None:
    """The sound becomes loud 0.4 s after the first frame, that is 40 rows of 10 ms."""
    patches = read(data, "alpha")["logmel"]
    assert patches.dtype == np.float16 and patches.shape == (20, 96, 64)
    for n, begins in enumerate(loud(patches)[:10]):
        assert begins == pytest.approx(40 - 4 * n, abs=3)
    np.testing.assert_array_equal(read(data, "duo_left")["logmel"][:17], read(data, "duo_right")["logmel"])
    wav = make.noise(0.36)
    starts = audio.patch_starts(audio.rows(len(wav)), 25, 9)
    np.testing.assert_array_equal(read(data, "omega")["logmel"], audio.patches(wav, starts))


def loud(patches: np.ndarray) -> list[int]:
    """Return the first loud row of each patch."""
    return [int(np.argmax(patch.astype(float).mean(axis=1) > -2)) for patch in patches]


def test_report(data: Path, root: Path, here: None, capsys: pytest.CaptureFixture) -> None:
    said = report(data)
    assert said["failures"] == {} and list(said["videos"]) == ["alpha", "duo_left", "duo_right", "omega"]
    assert said["videos"]["alpha"] == {"frames": 20, "fps": 25, "missing": 1, "notes": []}
    left = said["videos"]["duo_left"]
    assert left["fps"] == pytest.approx(30) and left["missing"] == 1
    assert "19 rows and the video 18 frames" in left["notes"][0]
    before = (data / prepare.REPORT).read_bytes()
    assert main(words(root, data)) == 0
    printed = capsys.readouterr().out
    assert "4 videos, 65 frames, 2 of them without a picture" in printed and "2 videos were mended" in printed
    assert (data / prepare.REPORT).read_bytes() == before


def test_what_is_there_is_not_made_again(data: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "write_folder", lambda *_: pytest.fail("it is made again"))
    assert main(words(root, data, "--jobs", 1)) == 0


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "validate"),
        ("annotations/train", "annotations/validate"),
        ("VA_Estimation_Challenge/Train_Set", "VA_Estimation_Challenge/Validation_Set"),
        ("VA/train", "VA/validate"),
    ],
)
def test_folders_of_annotations_by_names_that_people_have(folders: tuple[str, str], tmp_path: Path) -> None:
    for folder, name in zip(folders, "ab", strict=True):
        make.write_annotation(tmp_path / LABELS / folder / f"{name}.txt", 3)
        (tmp_path / VIDEOS).mkdir(exist_ok=True)
        (tmp_path / VIDEOS / f"{name}.mp4").touch()
        (tmp_path / CROPS / name).mkdir(parents=True)
    found = sources.find(config(tmp_path, tmp_path / "out"))
    assert [(task.name, task.split) for task in found.tasks] == [("a", "train"), ("b", "validate")]


# ---- odd footage


def arrays(tmp_path: Path, **options: Any) -> footage.Arrays:
    """Make the arrays of 20 crops and a source."""
    more = {name: options.pop(name) for name in ("frames", "fps") if name in options}
    crops = options.pop("crops", None) or make.write_crops(tmp_path / CROPS / "x", 20)
    folder = tmp_path / "arrays"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return footage.arrays(Source(crops=crops, **options), folder, **more)


def test_no_sound_is_silence(tmp_path: Path) -> None:
    made = arrays(tmp_path, video=make.write_video(tmp_path / "x.mp4"))
    np.testing.assert_allclose(made.patches, np.log(0.01), atol=2e-3)
    assert made.notes == ("There is no sound: it counts as silence.",)


def test_sound_that_ends_early(tmp_path: Path) -> None:
    video = make.write_video(tmp_path / "x.mp4", 50)
    made = arrays(tmp_path, video=video, sound=make.write_wav(tmp_path / "x.wav", make.noise(0.8)))
    assert "The sound ends 1.2 s before the pictures" in made.notes[0]
    assert not np.array_equal(made.patches[18], made.patches[19])
    assert all(np.array_equal(patch, made.patches[-1]) for patch in made.patches[22:])


def test_sound_that_goes_on(tmp_path: Path) -> None:
    """Sound after the last frame's patch has no influence."""
    video = make.write_video(tmp_path / "x.mp4", 20)
    long = [
        arrays(tmp_path, video=video, sound=make.write_wav(tmp_path / "x.wav", make.noise(s)[: 40 * 1600]))
        for s in (4, 60)
    ]
    assert long[0].notes == ()
    np.testing.assert_array_equal(long[0].patches, long[1].patches)


def test_sound_that_begins_late(tmp_path: Path) -> None:
    """Sound starts when the file says, after silence."""
    made = arrays(tmp_path, video=make.write_video(tmp_path / "x.mkv", sound=make.noise(1), delay=0.3))
    assert loud(made.patches)[0] == pytest.approx(30, abs=3)


def test_stereo_of_another_rate(tmp_path: Path) -> None:
    """The patch is that of the mean of both channels, resampled by another library than FFmpeg.

    Mel values are compared, not their logarithms, which enlarge noise in silent bands. Rounding samples to int16 adds
    white noise of 1 / (32768 sqrt(12)), about 1e-4 in each bin of the spectrum, of which a band sums up to 9. A patch
    holds logarithms up to 3.2 in float16, whose half ulp is 1e-3.
    """
    left, right = (8000 * np.sin(2 * np.pi * f * np.arange(44_100) / 44_100) for f in (300, 1100))
    channels = np.stack([left, right], axis=1).astype(np.int16)
    sound = make.write_wav(tmp_path / "x.wav", channels, 44_100)
    made = arrays(tmp_path, video=make.write_video(tmp_path / "x.mp4"), sound=sound)
    expected = audio.log_mel(channels.mean(axis=1) / 32768, 44_100)[:96]
    np.testing.assert_allclose(mel(made.patches[0]), mel(expected), rtol=1e-3, atol=2e-3)


def mel(log_mel: np.ndarray) -> np.ndarray:
    """Undo the logarithm of :func:`audio.log_mel`."""
    return np.exp(log_mel.astype(np.float64)) - 0.01


def test_one_frame(tmp_path: Path) -> None:
    made = arrays(tmp_path, video=make.write_video(tmp_path / "x.mp4", 1, sound=make.noise(0.1)))
    assert made.faces.shape == (1, 48, 48, 3) and made.patches.shape == (1, 96, 64)
    assert made.notes == ("Pictures after the last frame, 1, are left out: 19.",)


@pytest.mark.parametrize("fps", [25, 30000 / 1001, 30])
def test_frames_per_second_of_the_file(tmp_path: Path, fps: float) -> None:
    video = make.write_video(tmp_path / "x.mp4", 20, fps=fps, sound=make.noise(0.7))
    made = arrays(tmp_path, video=video)
    assert made.fps == pytest.approx(fps)
    expected = arrays(tmp_path, video=video, fps=fps, sound=write_sound_of(video, tmp_path))
    np.testing.assert_array_equal(made.patches, expected.patches)


def write_sound_of(video: Path, tmp_path: Path) -> Path:
    samples = np.concatenate(list(media.sound(media.read(video), 10)))
    return make.write_wav(tmp_path / "copy.wav", samples)


def test_variable_frame_rate(tmp_path: Path) -> None:
    """Pictures keep their numbers; their sound starts when they are shown, unless --fps is given."""
    times = [0, 40, 80, 120, 600, 640]
    video = make.write_video(tmp_path / "x.mp4", 6, times=times, sound=make.noise(1.0, 0.7))
    made = arrays(tmp_path, video=video)
    assert "The frame rate varies" in made.notes[0]
    assert levels(made.faces) == pytest.approx(greys(6), abs=1)
    assert loud(made.patches) == pytest.approx([70 - t / 10 for t in times], abs=3)
    longer = arrays(tmp_path, video=video, frames=8)
    np.testing.assert_array_equal(longer.patches[:6], made.patches)
    assert loud(longer.patches)[6] < loud(longer.patches)[5]
    fixed = arrays(tmp_path, video=video, fps=25)
    assert loud(fixed.patches) == pytest.approx([70 - 4 * n for n in range(6)], abs=3)


def test_annotations_of_other_lengths(tmp_path: Path) -> None:
    video = make.write_video(tmp_path / "x.mp4", sound=make.noise(0.8))
    assert len(arrays(tmp_path, video=video, frames=25).patches) == 25
    assert len(arrays(tmp_path, video=video, frames=15).faces) == 15
    for rows in (14, 26):
        with pytest.raises(UserError, match=rf"x\.mp4 has 20 frames, but its annotation has {rows} rows"):
            arrays(tmp_path, video=video, frames=rows)


def test_sound_alone_needs_frames_per_second(tmp_path: Path) -> None:
    sound = make.write_wav(tmp_path / "x.wav", make.noise(0.8))
    with pytest.raises(UserError, match=r"x\.wav: .* grjca prepare takes them by --fps"):
        arrays(tmp_path, sound=sound)
    made = arrays(tmp_path, sound=sound, fps=25)
    assert len(made.faces) == 20 and "by the last picture" in made.notes[0]
    assert len(arrays(tmp_path, sound=sound, fps=25, frames=22).faces) == 22


# ---- the detector


def portrait(number: int) -> np.ndarray:
    """Draw a picture with a face on the left, except in picture 1, and another on the right."""
    return make.face(*([] if number == 1 else [(80, 60)]), (240, 60))


@pytest.fixture
def two_faces(tmp_path: Path) -> Path:
    pytest.importorskip("cv2")
    return make.write_video(tmp_path / "x.mp4", 4, picture=portrait)


def test_faces_are_found(two_faces: Path, tmp_path: Path) -> None:
    made = footage.arrays(Source(two_faces, side="left"), tmp_path)
    assert made.missing == 1 and not made.faces[0].any()
    expected = np.asarray(Image.fromarray(make.face((80, 60))).crop((38, 20, 124, 106)).resize((48, 48)))
    for found in made.faces[1:]:
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8


def test_the_side_is_that_of_the_name(two_faces: Path, tmp_path: Path) -> None:
    (tmp_path / "right").mkdir()
    assert footage.arrays(Source(two_faces, side="right"), tmp_path / "right").missing == 0


def test_pictures_are_turned_as_players_do(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    lying = lambda _: np.rot90(make.face((80, 60), width=160), -1)  # noqa: E731
    made = footage.arrays(Source(make.write_video(tmp_path / "x.mp4", 2, picture=lying, rotation=90)), tmp_path)
    assert made.missing == 0


def test_a_face_that_is_lost_is_held_for_a_moment() -> None:
    pytest.importorskip("cv2")
    detector = faces.Detector()
    with_face, without = make.face((80, 60)), make.face()
    assert detector(without) is None
    assert detector(with_face) is not None
    found = [detector(without) is not None for _ in range(12)]
    assert found == [True] * 10 + [False] * 2


def test_no_detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["prepare", "--videos", str(tmp_path), "--out", str(tmp_path / "out"), "--detect", "true"]) == 1
    assert "pip install 'grjca-kernels[faces]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- bad files


def cut(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def a_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def a_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def a_device(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


def a_dangling_link(path: Path) -> Path:
    path.symlink_to(path.with_name("gone"))
    return path


def a_folder(path: Path) -> Path:
    path.mkdir()
    return path


def with_a_chunk(path: Path) -> bytes:
    """Return the content of a .wav with a chunk of three bytes and one byte of padding before the sound."""
    content = path.read_bytes()
    return content[:36] + b"LIST\x03\x00\x00\x00abc\x00" + content[36:]


def sounding(path: Path, frames: int = 50, **options: Any) -> Path:
    return make.write_video(path, frames, sound=make.noise(2), **options)


PLAYLIST = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:2,\n/etc/passwd\n#EXT-X-ENDLIST\n"
BAD_VIDEOS = {
    "cut off, index first": lambda p: cut(sounding(p / "x.mp4", index_first=True)),
    "cut off, index last": lambda p: cut(sounding(p / "x.mp4")),
    "cut off at the end": lambda p: cut(sounding(p / "x.mp4", index_first=True), 0.97),
    "cut off, mkv": lambda p: cut(sounding(p / "x.mkv")),
    "cut off, avi": lambda p: cut(sounding(p / "x.avi")),
    "text": lambda p: a_file(p / "x.mp4", b"this is no video\n" * 100),
    "nothing": lambda p: a_file(p / "x.mp4", b""),
    "a playlist": lambda p: a_file(p / "x.mp4", PLAYLIST),
    "a list": lambda p: a_file(p / "x.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"),
    "bytes": lambda p: a_file(p / "x.mp4", random.Random(0).randbytes(100_000)),
    "sound alone": lambda p: make.write_video(p / "x.mp4", 0, sound=make.noise(1)),
    "a pipe": lambda p: a_pipe(p / "x.mp4"),
    "a device": lambda p: a_device(p / "x.mp4"),
    "a folder": lambda p: a_folder(p / "x.mp4"),
    "a dangling link": lambda p: a_dangling_link(p / "x.mp4"),
    "not there": lambda p: p / "x.mp4",
}
BAD_SOUNDS = {
    "text": lambda p: a_file(p, b"no sound"),
    "a pipe": a_pipe,
    "a device": a_device,
    "a folder": a_folder,
    "pictures alone": lambda p: make.write_video(p.with_suffix(".avi")).rename(p),
    "a dangling link": a_dangling_link,
    "cut off": lambda p: cut(make.write_wav(p, make.noise(1)), 0.501),
    "cut off between packets": lambda p: a_file(p, make.write_wav(p, make.noise(1)).read_bytes()[: 44 + 3 * 4096]),
    "cut off, after another chunk": lambda p: a_file(p, with_a_chunk(make.write_wav(p, make.noise(1)))[:-4096]),
}
WRONG_KINDS = {"a folder": "got a folder", "a dangling link": "a link that leads nowhere", "not there": "no such file"}
BAD_CROPS = {
    "text": lambda p: a_file(p, b"no picture"),
    "nothing": lambda p: a_file(p, b""),
    "cut off": lambda p: cut((Image.fromarray(make.face((80, 60))).save(p, "JPEG"), p)[1], 0.5),
    "a png": lambda p: (Image.fromarray(make.face((80, 60))).save(p, "PNG"), p)[1],
    "many pixels": lambda p: (Image.new("L", (5000, 5000)).save(p, "JPEG"), p)[1],
    "a large file": lambda p: a_file(p, b"\xff\xd8" + bytes(1 << 25)),
    "a pipe": a_pipe,
    "a device": a_device,
    "a folder": a_folder,
}


def assert_refused(source: Source, path: Path, tmp_path: Path) -> str:
    """Check that it is refused within five seconds, with the file's name, and leaves nothing."""
    start = time.perf_counter()
    (tmp_path / "npy_data").mkdir()
    with pytest.raises(UserError) as error:
        footage.write_folder(source, tmp_path / "npy_data" / "x", None, None)
    assert path.name in str(error.value) and " at 0x" not in str(error.value)
    assert not list((tmp_path / "npy_data").iterdir())
    assert time.perf_counter() - start < 5
    return str(error.value)


@pytest.mark.parametrize("kind", BAD_VIDEOS)
def test_bad_videos(kind: str, tmp_path: Path) -> None:
    path = BAD_VIDEOS[kind](tmp_path)
    said = assert_refused(Source(path, None, make.write_crops(tmp_path / "crops", 2)), path, tmp_path)
    assert "cut off" in said or not kind.startswith("cut off")
    assert WRONG_KINDS.get(kind, "") in said and "Errno" not in said


@pytest.mark.parametrize("kind", BAD_SOUNDS)
def test_bad_sounds(kind: str, tmp_path: Path) -> None:
    path = BAD_SOUNDS[kind](tmp_path / "x.wav")
    video = make.write_video(tmp_path / "x.mp4", 2)
    said = assert_refused(Source(video, path, make.write_crops(tmp_path / "crops", 2)), path, tmp_path)
    assert "cut off" in said or not kind.startswith("cut off")
    assert WRONG_KINDS.get(kind, "") in said


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_sound_that_was_streamed_says_no_size(size: int, tmp_path: Path) -> None:
    content = make.write_wav(tmp_path / "x.wav", make.noise(1)).read_bytes()
    path = a_file(tmp_path / "x.wav", content[:40] + size.to_bytes(4, "little") + content[44:])
    assert sum(map(len, media.sound(media.read(path), 10))) == 16_000


@pytest.mark.parametrize("kind", BAD_CROPS)
def test_bad_crops(kind: str, tmp_path: Path) -> None:
    path = BAD_CROPS[kind](make.write_crops(tmp_path / "crops", 2, missing=[2]) / "00002.jpg")
    assert_refused(Source(make.write_video(tmp_path / "x.mp4", 2), None, path.parent), path, tmp_path)


def test_frames_of_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    monkeypatch.setattr(media, "_MOST_PIXELS", make.WIDTH * make.HEIGHT // 2)
    path = make.write_video(tmp_path / "x.mp4", 2)
    assert_refused(Source(path), path, tmp_path)


def test_frames_that_are_hours_apart(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "x.mkv", 3, times=[0, 40, 36_000_000])
    assert "frame" in assert_refused(Source(path, None, make.write_crops(tmp_path / "crops", 2)), path, tmp_path)


def test_crops_by_other_names(tmp_path: Path) -> None:
    crops = a_folder(tmp_path / "crops")
    for name in ("1.jpg", "00000.jpg", "000001.jpg", "00001.png", "frame_00001.jpg"):
        (crops / name).touch()
    video = make.write_video(tmp_path / "x.mp4", 2)
    assert "00001.jpg and so on, got none" in assert_refused(Source(video, None, crops), crops, tmp_path)


# ---- videos that fail


def test_a_bad_video_does_not_stop_the_others(
    root: Path, data: Path, here: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_footage(tmp_path)
    picture = tmp_path / CROPS / "alpha" / "00005.jpg"
    picture.write_bytes(b"no picture")
    make.write_annotation(tmp_path / LABELS / "Train_Set" / "lost.txt", 5)
    assert main(words(tmp_path, tmp_path / "data")) == 1
    said = report(tmp_path / "data")
    assert said["failures"].keys() == {"alpha", "lost"} and said["videos"].keys() == {"duo_left", "duo_right", "omega"}
    assert str(picture) in said["failures"]["alpha"] and "lost.mp4" in said["failures"]["lost"]
    printed = capsys.readouterr().out
    assert "2 videos failed" in printed and str(picture) in printed
    assert not (tmp_path / "data" / "annotations" / "train" / "alpha.txt").exists()
    (tmp_path / LABELS / "Train_Set" / "lost.txt").unlink()
    picture.write_bytes((root / CROPS / "alpha" / picture.name).read_bytes())
    assert main(words(tmp_path, tmp_path / "data")) == 0
    assert arrays_of(tmp_path / "data") == arrays_of(data)


def arrays_of(data: Path) -> dict[str, bytes]:
    """Read all files except the report, which names folders."""
    return {name: text for name, text in signals.content(data).items() if name != prepare.REPORT}


@pytest.mark.parametrize(
    "name", ["a,b", "a\nb", "a\x1b[2Jb", "train", "val", "Alpha", "n" * 246, os.fsdecode(b"a\xff")]
)
def test_names_that_cannot_be_used(name: str, root: Path, here: None, tmp_path: Path, capsys: Any) -> None:
    write_footage(tmp_path)
    make.write_video(tmp_path / VIDEOS / f"{name}.mp4", 2)
    make.write_crops(tmp_path / CROPS / name, 2)
    sys.stdout.reconfigure(errors="backslashreplace")  # as grjca.__main__ does
    assert main(words(tmp_path, tmp_path / "data")) == 1
    assert name in report(tmp_path / "data")["failures"]
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "Traceback" not in printed
    assert not (tmp_path / "data" / "npy_data" / name).exists()


def test_two_files_of_one_video(here: None, tmp_path: Path) -> None:
    write_footage(tmp_path)
    make.write_video(tmp_path / VIDEOS / "alpha.avi", 2)
    make.write_annotation(tmp_path / LABELS / "Validation_Set" / "duo_left.txt", 19)
    assert main(words(tmp_path, tmp_path / "data")) == 1
    failures = report(tmp_path / "data")["failures"]
    assert failures.keys() == {"alpha", "duo_left"} and all("are of the same video" in f for f in failures.values())


@pytest.mark.parametrize("bad", [b"a,b\n1,1\n", b"valence,arousal\n", b"valence,arousal\n1,x\n", b"\xff\xfe"])
def test_bad_annotations(bad: bytes, here: None, tmp_path: Path) -> None:
    write_footage(tmp_path)
    path = a_file(tmp_path / LABELS / "Train_Set" / "alpha.txt", bad)
    assert main(words(tmp_path, tmp_path / "data")) == 1
    assert str(path) in report(tmp_path / "data")["failures"]["alpha"]


@pytest.mark.parametrize("replace", [a_pipe, a_device, a_folder])
def test_annotations_that_are_no_files(replace: Any, here: None, tmp_path: Path) -> None:
    write_footage(tmp_path)
    path = tmp_path / LABELS / "Train_Set" / "alpha.txt"
    path.unlink()
    replace(path)
    assert main(words(tmp_path, tmp_path / "data")) == 1
    assert str(path) in report(tmp_path / "data")["failures"]["alpha"]


def test_an_annotation_that_has_changed(here: None, tmp_path: Path) -> None:
    write_footage(tmp_path)
    assert main(words(tmp_path, tmp_path / "data")) == 0
    make.write_annotation(tmp_path / LABELS / "Train_Set" / "alpha.txt", 20, invalid=[9])
    make.write_annotation(tmp_path / LABELS / "Train_Set" / "omega.txt", 9)
    assert main(words(tmp_path, tmp_path / "data")) == 1
    failures = report(tmp_path / "data")["failures"]
    assert failures.keys() == {"alpha", "omega"} and all("has changed since" in f for f in failures.values())


def test_a_process_that_dies_is_one_failure() -> None:
    (_, outcome), *others = isolated.each(os._exit, {"x": (3,)}, 1)
    assert isinstance(outcome, UserError) and "exit code 3" in str(outcome) and not others


def test_calls_return_or_say_why_not(tmp_path: Path) -> None:
    path = a_file(tmp_path / "five", b"12345")
    outcomes = dict(isolated.each(os.path.getsize, {"a": (path,), "b": (tmp_path / "gone",), "c": (path,)}, 2))
    assert outcomes["a"] == outcomes["c"] == 5 and "gone" in str(outcomes["b"])


# ---- folders


def refused(capsys: Any, *arguments: str) -> str:
    """Run a command that must fail before it does anything, and return its message."""
    assert main(list(arguments)) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("grjca prepare: ") and printed.err.count("\n") == 1 and not printed.out
    return printed.err


def test_other_settings_are_refused(root: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    before = signals.content(data)
    assert "--fps: " in refused(capsys, *words(root, data, "--fps", 25))
    assert "--faces: " in refused(capsys, *words(root, data, "--faces", root))
    assert signals.content(data) == before


@pytest.mark.parametrize("content", ["[]", "{}", "", '{"settings": 1}', "[" * 200_000, '{"settings": {"fps": NaN}}'])
def test_a_report_of_another_make(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: str) -> None:
    (tmp_path / prepare.REPORT).write_text(content)
    assert str(tmp_path) in refused(capsys, *words(root, tmp_path))
    assert (tmp_path / prepare.REPORT).read_text() == content


@pytest.mark.parametrize("replace", [a_pipe, a_device, a_folder])
def test_a_report_that_is_no_file(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, replace: Any) -> None:
    replace(tmp_path / prepare.REPORT)
    assert prepare.REPORT in refused(capsys, *words(root, tmp_path))


def test_other_folders_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = a_file(tmp_path / "thesis.txt", b"mine")
    assert "has not made it" in refused(capsys, *words(root, tmp_path))
    assert "is a file" in refused(capsys, *words(root, path))
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["npy_data", "annotations", "annotations/train", ".lock"])
def test_links_in_the_folder_are_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    out, outside = a_folder(tmp_path / "out"), a_folder(tmp_path / "outside")
    files.write_json(out / prepare.REPORT, {"settings": prepare._settings(config(root, out))})
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).symlink_to(outside)
    assert "link" in refused(capsys, *words(root, out))
    assert not list(outside.iterdir())


def test_what_is_in_the_place_of_a_video(root: Path, here: None, tmp_path: Path) -> None:
    out, outside = a_folder(tmp_path / "out"), a_folder(tmp_path / "outside")
    files.write_json(out / prepare.REPORT, {"settings": prepare._settings(config(root, out))})
    (out / "npy_data" / "omega").mkdir(parents=True)
    a_file(out / "npy_data" / "omega" / "mine.txt", b"precious")
    (out / "npy_data" / "alpha").symlink_to(outside)
    a_file(out / "npy_data" / "duo_left", b"precious")
    assert main(words(root, out)) == 1
    assert report(out)["failures"].keys() == {"alpha", "duo_left", "omega"}
    assert not list(outside.iterdir()) and (out / "npy_data" / "omega" / "mine.txt").exists()
    assert (out / "npy_data" / "duo_left").read_bytes() == b"precious"


def test_folders_that_hold_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, empty = tmp_path / "out", a_folder(tmp_path / "empty")
    for option, match in (("videos", "holds no video"), ("annotations", "holds no annotations")):
        assert match in refused(capsys, *words(root, out, f"--{option}", empty))
    for option in ("videos", "faces", "annotations"):
        assert "cannot be read" in refused(capsys, *words(root, out, f"--{option}", tmp_path / "nowhere"))
    assert not out.exists()


def test_one_process_a_folder(root: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    with files.alone(data, "prepares data"):
        assert "another process prepares data there" in refused(capsys, *words(root, data))


def test_a_full_disk(root: Path, here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, a video fails and leaves nothing."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(footage.os, "fsync", full)
    monkeypatch.setattr(files, "write_json", lambda *_: None)
    assert main(words(root, tmp_path / "out")) == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != files.LOCK]


# ---- signals


def begin(of: PrepareConfig) -> Any:
    """Start the command in a fork of this process, which saves the time of imports."""

    def quietly() -> None:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            os._exit(prepare.prepare(of))

    process = multiprocessing.get_context("fork").Process(target=quietly)
    process.start()
    return process


def written(folder: Path) -> int:
    """Count the bytes of all files at this moment."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_size
    return total


def test_kill_and_go_on(tmp_path: Path, here: None) -> None:
    """Kills at ten random moments leave only complete files, and continuing ends in the same bytes."""
    root, moments = tmp_path / "root", random.Random(21)
    for name in ("one", "two"):
        make.write_video(root / VIDEOS / f"{name}.mp4", 100, sound=make.noise(4))
        make.write_crops(root / CROPS / name, 100)
        make.write_annotation(root / LABELS / "train" / f"{name}.txt", 100)
    assert main(words(root, tmp_path / "whole")) == 0
    expected = arrays_of(tmp_path / "whole")
    size = written(tmp_path / "whole")
    kills = kept = 0
    for n in range(20):
        out = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(isolated, "each", EACH)
            process = begin(config(root, out, jobs=1 + n % 2))
        share = moments.uniform(0, 1)
        while process.is_alive() and written(out) < share * size:
            time.sleep(0.001)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        for name, content in arrays_of(out).items():
            assert content == expected[name]
            kept += 1
        assert main(words(root, out)) == 0
        assert arrays_of(out) == expected
        assert not list(filter(files.is_partial, out.rglob("*")))
        if kills == 10:
            break
    assert kills == 10 and kept


def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    """Even if that is killed: the child waits for a pipe that nobody writes to, and then no longer holds it open."""
    pipe = a_pipe(tmp_path / "pipe")
    process = multiprocessing.get_context("fork").Process(target=lambda: list(EACH(Path.read_bytes, {"x": (pipe,)}, 1)))
    process.start()
    writer = os.open(pipe, os.O_WRONLY)  # waits for the child to read
    process.kill()
    process.join()
    deadline = time.monotonic() + 10
    with pytest.raises(BrokenPipeError):
        while time.monotonic() < deadline:
            os.write(writer, b".")
            time.sleep(0.01)
    os.close(writer)


def test_a_command_that_is_stopped_leaves_nothing_unfinished(tmp_path: Path) -> None:
    make.write_video(tmp_path / VIDEOS / "long.mkv", 2000, sound=make.noise(80))
    make.write_crops(tmp_path / CROPS / "long", 1)
    folders = ["--videos", str(tmp_path / VIDEOS), "--faces", str(tmp_path / CROPS)]
    numbers = [signal.SIGINT, signal.SIGTERM]
    outs = [tmp_path / number.name for number in numbers]
    processes = [signals.begin(["prepare", *folders, "--out", str(out)]) for out in outs]
    waiting = list(zip(numbers, outs, processes, strict=True))
    while waiting:
        number, out, process = waiting.pop(0)
        if process.poll() is not None or list(out.glob("npy_data/*/video.npy")):
            process.send_signal(number)
        else:
            waiting.append((number, out, process))
            time.sleep(0.001)
    for number, out, process in zip(numbers, outs, processes, strict=True):
        printed = "".join(process.communicate(timeout=30))
        assert process.returncode == signals.CODES[number], printed
        assert "Traceback" not in printed
        assert not list(filter(files.is_partial, out.rglob("*")))
