"""Video and sound files, read by PyAV, which has FFmpeg inside: what they say of themselves, their frames, their sound.

Every file is read to its end once before anything is decoded, so that one that was cut off is refused.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np

from grjca import files
from grjca.data.audio import RATE
from grjca.errors import UserError

MOST_FRAMES = 1_000_000
"""Of a video: nine hours at 30 frames a second."""
MEND = 5
"""Frames by which files of one video may differ in length."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,wav"  # no playlists, which name other files
_EXACT = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # say how long they are; of others, FFmpeg estimates it
_MOST_PIXELS = 1 << 25  # of a frame; 8K has fewer
_CUT = 0.5  # seconds that may be missing at the end
_BUFFER = 1 << 18
_CHUNKS = 1000  # of a .wav, before its sound; programs write a few
_NO_SIZE = 0x7FFF0000  # from here on, the size in a .wav is what programs write that do not know it yet; so is 0
_PACKETS = 100  # a frame, of all streams and empty ones: a small file may claim any number


@dataclass(frozen=True, eq=False)
class Media:
    """What a file says of itself."""

    path: Path
    times: np.ndarray
    """[frames] float64: when each frame is shown, in seconds, in that order; NaN where the file doesn't say. Without
    pictures, [0]."""
    fps: float | None
    """Frames per second, on average; None if it has no pictures, or does not say."""
    has_sound: bool


def read(path: Path) -> Media:
    """Read all packets of a file, and decode none.

    Raises:
        UserError: it is no video and no sound, cut off or damaged, or has too many frames; or it is no regular file, or
            cannot be read.
    """
    with _opened(path) as container:
        picture = _pictures(container)
        moments, packets = array("d"), 0
        ends: dict[int, tuple[float, bool]] = {}  # of every stream: the end of its last packet, whether that is whole
        for number, packet in enumerate(container.demux()):
            if max(packets, number // _PACKETS) > MOST_FRAMES:
                raise UserError(f"{path}: expected at most {MOST_FRAMES} frames, got more.")
            if not packet.size:
                continue
            moment = math.nan if packet.pts is None else float(packet.pts * packet.time_base)
            end = moment + float((packet.duration or 0) * packet.time_base)
            ends[packet.stream.index] = (end, not packet.is_corrupt)
            if picture is not None and packet.stream.index == picture.index:
                packets += 1
                if not packet.is_discard:  # an edit list leaves out what was cut away
                    moments.append(moment)
        if container.format.name == "wav":  # FFmpeg takes what is there for all of it
            _check_wav(path)
            ends = {stream: (end, True) for stream, (end, _) in ends.items()}
        _check_whole(container, path, 0 if picture is None else picture.frames - packets, list(ends.values()))
        if picture is not None and not moments:
            raise UserError(f"{path}: expected at least one frame, got none.")
        rate = None if picture is None else picture.average_rate or picture.guessed_rate
        times = np.sort(np.array(moments, dtype=np.float64))
        return Media(path, times, float(rate) if rate else None, bool(container.streams.audio))


def frames(media: Media) -> Iterator[np.ndarray | None]:
    """[height, width, 3] uint8, red, green, blue, of every frame that :func:`read` has found; None if one is damaged.

    Raises:
        UserError: it cannot be decoded, or a frame has too many pixels.
    """
    timed = not np.isnan(media.times).any()
    following = 0  # the next frame to yield
    with _opened(media.path) as container:
        stream = _pictures(container)
        assert stream is not None
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        stream.thread_type = "NONE"  # videos are prepared in parallel
        for frame in container.decode(stream):
            place = following
            if timed and frame.pts is not None:
                place = int(np.searchsorted(media.times, float(frame.pts * frame.time_base) - 1e-9))
            if not following <= place < len(media.times):
                continue  # a frame that is shown twice
            yield from [None] * (place - following)
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            following = place + 1
    yield from [None] * (len(media.times) - following)


def sound(media: Media, seconds: float) -> Iterator[np.ndarray]:
    """[samples] int16 of one channel at 16 kHz, piece by piece: the sound from the first frame's time on.

    Silence precedes sound that begins later. It ends after ``seconds``, or where the file does.

    Raises:
        UserError: it cannot be decoded.
    """
    left = math.ceil(seconds * RATE)
    first = media.times[0] if len(media.times) else 0.0
    with _opened(media.path) as container:
        for samples in _heard(container, 0.0 if math.isnan(first) else first):
            yield samples[:left]
            left -= len(samples)
            if left <= 0:
                break


def _heard(container: Any, begin: float) -> Iterator[np.ndarray]:
    """[samples] int16 at 16 kHz from ``begin``, in seconds of the file, on."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
    early: int | None = None  # samples that come before ``begin``
    for frame in chain(container.decode(container.streams.best("audio")), [None]):
        if early is None:
            early = 0 if frame is None else round((begin - (frame.time or 0.0)) * RATE)
            yield from (np.zeros(RATE, np.int16) for _ in range(-early // RATE))
            yield np.zeros(-min(early, 0) % RATE, np.int16)
        for piece in resampler.resample(frame):
            samples = piece.to_ndarray()[0]
            yield samples[max(early, 0) :]
            early -= len(samples)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The container; what FFmpeg refuses in the block becomes a UserError."""
    try:
        files.read_start(path, 1)  # refuses what might never end
    except OSError as error:
        got = "a folder" if path.is_dir() else error.strerror
        if isinstance(error, FileNotFoundError):
            got = "a link that leads nowhere" if path.is_symlink() else "no such file"
        raise UserError(f"{path}: expected a file of a video or sound, got {got}; replace or remove it.") from error
    with open(path, "rb") as file:
        try:
            with av.open(
                file,
                "r",
                container_options={"format_whitelist": _FORMATS},
                io_open=_refuse,
                metadata_errors="replace",
                buffer_size=_BUFFER,
            ) as container:
                yield container
        except UserError:
            raise
        # FFmpeg may seek to where no file has bytes, and a resampler refuses that the number of channels changes.
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path}: expected a video or sound, got something else or one that was cut off ({reason})."
            ) from error


def _refuse(url: str, *_: object) -> None:
    raise UserError(f"expected a file that is complete in itself, got one that refers to {url[:200]!r}.")


def _pictures(container: Any) -> Any:
    """The stream of pictures, or None; the cover of a piece of music is none."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    best = container.streams.best("video")
    return best if best in streams else next(iter(streams), None)


def _check_whole(container: Any, path: Path, lost: int, ends: list[tuple[float, bool]]) -> None:
    """Refuse what ends before it should: by its number of frames, by its duration, or within a packet."""
    if not ends:
        raise UserError(f"{path}: expected pictures or sound, got none.")
    missing = 0.0
    if container.format.name in _EXACT and container.duration is not None:
        missing = container.duration / av.time_base - max((e for e, _ in ends if not math.isnan(e)), default=math.inf)
    if lost > MEND or missing > _CUT or not all(whole for _, whole in ends):
        raise UserError(
            f"{path}: expected a whole file, got one that was cut off: {max(lost, 0)} frames and {max(missing, 0):.1f} "
            "seconds are missing, or the end of the last frame. Copy or download it again."
        )


def _check_wav(path: Path) -> None:
    """Refuse a .wav that holds less sound than its header says. One of 4 GiB and more, RF64, is not looked at."""
    with open(path, "rb") as file:
        chunks = _CHUNKS if file.read(12)[:4] == b"RIFF" else 0
        for _ in range(chunks):
            name, size = file.read(4), int.from_bytes(file.read(4), "little")
            if name != b"data":
                file.seek(size + size % 2, os.SEEK_CUR)
                continue
            lacks = file.tell() + size - os.fstat(file.fileno()).st_size
            if lacks > 0 and size < _NO_SIZE:
                raise UserError(
                    f"{path}: expected the {size} bytes of sound that its header promises, got one that was cut off: "
                    f"{lacks} are missing. Copy or download it again."
                )
            return
