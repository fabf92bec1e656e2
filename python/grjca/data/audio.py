"""Log-mel patches of sound, the input of the voice network: protocol.md, "From footage to arrays"."""

from __future__ import annotations

from functools import cache

import numpy as np

from grjca.errors import UserError

RATE = 16_000
"""Samples per second of all sound in this package."""
FRAME, STEP, FFT = 400, 160, 512
"""Samples of a row, samples from one row to the next, and length of the Fourier transform."""
ROWS_PER_SECOND = RATE // STEP
BANDS, LOWEST, HIGHEST = 64, 125.0, 7500.0
"""Number of mel bands, and their lowest and highest frequency in Hz."""
PATCH = 96
"""Number of rows of a patch."""
PADDING = RATE
"""Number of copies of the last sample that are appended to the sound."""

_CHUNK, _PATCHES = 4096, 64  # rows and patches computed at a time: at most 200 MB, usually 10


def log_mel(waveform: np.ndarray, rate: float = RATE) -> np.ndarray:
    """Compute a log-mel spectrogram: log(mel + 0.01) of magnitudes, in bands that are linear in mel.

    Args:
        waveform: [samples] of one channel, at least one sample, int16 or floating-point in [-1, 1].
        rate: samples per second; soxr resamples other rates to 16 kHz.

    Returns:
        [rows, 64] float64, a row every 10 ms; the last sample is repeated for one more second.

    Raises:
        UserError: if ``waveform`` or ``rate`` is anything else.
    """
    samples = _checked(waveform)
    if not (np.isfinite(rate) and rate > 0):
        raise UserError(f"rate: expected samples per second, a positive number, got {rate}.")
    if rate != RATE:
        import soxr

        samples = soxr.resample(_scaled(samples), rate, RATE)
    starts = range(0, rows(len(samples)), _CHUNK)
    return np.concatenate([_rows(samples, np.arange(i, min(i + _CHUNK, starts.stop))) for i in starts])


def rows(samples: int) -> int:
    """Number of rows that :func:`log_mel` makes of ``samples`` samples at 16 kHz."""
    return 1 + (samples + PADDING - FRAME) // STEP


def patch_starts(rows: int, fps: float, frames: int | None = None, *, times: np.ndarray | None = None) -> np.ndarray:
    """Return the first row of the patch of every video frame: round(100 n / fps) for frame n = 0, 1, ...

    Args:
        rows: number of rows of the :func:`log_mel`.
        fps: frames per second.
        frames: number of frames of the video; where the sound ends early, the last whole patch is repeated. None
            returns all whole patches.
        times: [frames] float64, the time in seconds at which each frame is shown; replaces n / fps.

    Returns:
        [frames] int64.

    Raises:
        UserError: if there are too few rows for one patch, or ``fps`` is not a positive number.
    """
    if not (np.isfinite(fps) and fps > 0):
        raise UserError(f"fps: expected frames per second, a positive number, got {fps}.")
    if rows < PATCH:
        raise UserError(f"rows: expected at least {PATCH}, those of one patch, got {rows}.")
    if times is None:
        count = int((rows - PATCH + 1) * fps / ROWS_PER_SECOND) + 1 if frames is None else frames
        starts = np.rint(ROWS_PER_SECOND * np.arange(count) / fps).astype(np.int64)
    else:
        starts = np.rint(ROWS_PER_SECOND * np.maximum(times, 0)).astype(np.int64)
    whole = starts[starts <= rows - PATCH]
    return whole if frames is None else np.minimum(starts, whole.max(initial=0))


def patches(waveform: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Compute patches of the :func:`log_mel` of ``waveform``, with bounded memory besides the result.

    Args:
        waveform: [samples] at 16 kHz, as for :func:`log_mel`; it may be mapped from a file.
        starts: [N] int64, the first row of each patch, as :func:`patch_starts` returns them, or some of them.

    Returns:
        [N, 96, 64] float16.

    Raises:
        UserError: as :func:`log_mel`, or if a patch would end after the last row.
    """
    samples = _checked(waveform)
    last = rows(len(samples)) - PATCH
    if len(starts) and not 0 <= starts.min() <= starts.max() <= last:
        raise UserError(f"starts: expected first rows from 0 to {last}, got {starts.min()} to {starts.max()}.")
    result = np.empty((len(starts), PATCH, BANDS), np.float16)
    for i in range(0, len(starts), _PATCHES):
        wanted = starts[i : i + _PATCHES, None] + np.arange(PATCH)
        unique, place = np.unique(wanted, return_inverse=True)
        result[i : i + _PATCHES] = _rows(samples, unique)[place.reshape(wanted.shape)]
    return result


def _checked(waveform: np.ndarray) -> np.ndarray:
    if waveform.ndim != 1 or not len(waveform) or not (waveform.dtype == np.int16 or waveform.dtype.kind == "f"):
        raise UserError(
            "waveform: expected one channel, [samples], of int16 or floating-point numbers, got "
            f"{list(waveform.shape)} of {waveform.dtype}."
        )
    if waveform.dtype.kind == "f" and not np.abs(waveform).max() <= 2:  # decoders and resamplers overshoot a little
        raise UserError(
            "waveform: expected floating-point numbers in [-1, 1], got larger ones or NaN; keep int16 as it is."
        )
    return waveform


def _scaled(samples: np.ndarray) -> np.ndarray:
    return samples / 32768.0 if samples.dtype == np.int16 else samples.astype(np.float64)


def _rows(samples: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Compute the ``wanted`` rows of the log-mel spectrogram, [len(wanted), 64] float64."""
    places = STEP * wanted[:, None] + np.arange(FRAME)
    frames = _scaled(samples[np.minimum(places, len(samples) - 1)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    return np.log(np.abs(np.fft.rfft(frames * window, FFT)) @ _bands() + 0.01)


@cache
def _bands() -> np.ndarray:
    """Weight of each frequency in each band, [257, 64]. The triangles are linear in mel, not in Hz."""

    def mel(hertz: np.ndarray) -> np.ndarray:
        return 1127 * np.log1p(hertz / 700)

    lowest, highest = mel(np.array([LOWEST, HIGHEST]))
    edges = np.linspace(lowest, highest, BANDS + 2)
    bins = mel(np.linspace(0, RATE / 2, FFT // 2 + 1))[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    weights[0] = 0
    return weights
