"""Video and sound files, read with PyAV (FFmpeg): their metadata, frames and sound.

Every file is read to its end once before anything is decoded, so that a truncated file is refused.
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
"""Maximum number of frames of a video, nine hours at 30 frames per second."""
MEND = 5
"""Number of frames by which files of one video may differ in length."""

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,wav"  # no playlists, which name other files
_EXACT = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # these store their duration; for others FFmpeg estimates it
_MOST_PIXELS = 1 << 25  # pixels of a frame; 8K has fewer
_CUT = 0.5  # seconds that may be missing at the end
_BUFFER = 1 << 18
_CHUNKS = 1000  # chunks before the sound of a .wav; programs write a few
_NO_SIZE = 0x7FFF0000  # programs that do not know a .wav's size yet write 0, or a size from here on
_PACKETS = 100  # packets per frame, over all streams, empty ones included: a small file may claim any number


@dataclass(frozen=True, eq=False)
class Media:
    """Metadata of a file."""

    path: Path
    times: np.ndarray
    """[frames] float64, sorted: the time at which each frame is shown, in seconds; NaN where the file does not say.
    Shape [0] without pictures."""
    fps: float | None
    """Average frames per second; None if the file has no pictures or does not say."""
    has_sound: bool


def read(path: Path) -> Media:
    """Read all packets of a file without decoding them.

    Raises:
        UserError: if the file is neither video nor sound, is truncated or damaged, has too many frames, is not a
            regular file, or cannot be read.
    """
    with _opened(path) as container:
        picture = _pictures(container)
        moments, packets = array("d"), 0
        ends: dict[int, tuple[float, bool]] = {}  # the end of each stream's last packet, and whether it is complete
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
                if not packet.is_discard:  # an edit list drops these
                    moments.append(moment)
        if container.format.name == "wav":  # FFmpeg does not notice that one is truncated
            _check_wav(path)
            ends = {stream: (end, True) for stream, (end, _) in ends.items()}
        _check_whole(container, path, 0 if picture is None else picture.frames - packets, list(ends.values()))
        if picture is not None and not moments:
            raise UserError(f"{path}: expected at least one frame, got none.")
        rate = None if picture is None else picture.average_rate or picture.guessed_rate
        times = np.sort(np.array(moments, dtype=np.float64))
        return Media(path, times, float(rate) if rate else None, bool(container.streams.audio))


def frames(media: Media) -> Iterator[np.ndarray | None]:
    """Yield every frame that :func:`read` has found as RGB [height, width, 3] uint8, or None if it is damaged.

    Raises:
        UserError: if the file cannot be decoded, or a frame has too many pixels.
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
    """Yield the sound from the first frame's time on, piece by piece: [samples] int16 of one channel at 16 kHz.

    Sound that begins later is preceded by silence. It ends after ``seconds``, or at the end of the file.

    Raises:
        UserError: if the file cannot be decoded.
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
    """Yield the sound from ``begin`` (seconds in the file) on, [samples] int16 at 16 kHz."""
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
    """Open a container; errors of FFmpeg inside the block become a UserError."""
    try:
        files.read_start(path, 1)  # refuses pipes and devices, which may never end
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
        # FFmpeg may seek to an impossible position, and a resampler refuses a change in the number of channels.
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path}: expected a video or sound, got something else or one that was cut off ({reason})."
            ) from error


def _refuse(url: str, *_: object) -> None:
    raise UserError(f"expected a file that is complete in itself, got one that refers to {url[:200]!r}.")


def _pictures(container: Any) -> Any:
    """Return the video stream, or None; cover art does not count."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    best = container.streams.best("video")
    return best if best in streams else next(iter(streams), None)


def _check_whole(container: Any, path: Path, lost: int, ends: list[tuple[float, bool]]) -> None:
    """Refuse a truncated file, judging by its number of frames, its duration, and its last packet."""
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
    """Refuse a .wav that holds less sound than its header says. RF64 files (4 GiB and more) are not checked."""
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
