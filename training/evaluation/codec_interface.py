"""What a codec under evaluation is: waves at 24 kHz in, waves as long and in time with them out, and what they cost.

`L` samples of a clip, `K` codebooks, `T` frames.
"""

from typing import NamedTuple, Protocol

import numpy as np
import soxr

RATE = 24_000
"""Rate of every wave that goes into a codec or comes out of it, in Hz."""


class Coded(NamedTuple):
    """What a codec made of one clip."""

    audio: np.ndarray
    """(L,) float32 in [-1, 1] at 24 kHz: as long as the clip, without delay against it."""
    bits: int
    """What the clip took: everything that its decoder needs, without the headers of a container."""
    codes: np.ndarray | None = None
    """(K, T) int64, from a codec with codebooks."""


class Codec(Protocol):
    """One codec at one setting: one row of a table. It keeps nothing from one call to the next."""

    name: str
    """As tables show it: `mimi_small, 8 codebooks`."""
    sampling_rate: int
    """The rate it works at, in Hz; nothing above half of it comes through."""
    bitrate: float
    """What it is asked to take, in bit/s; a variable rate, or a last frame filled up, may take another."""

    def reconstruct(self, audio: list[np.ndarray]) -> list[Coded]:
        """Encode and decode clips, each (L,) floats in [-1, 1] at 24 kHz and of its own length.

        Raises:
            ValueError: A clip is empty, has another shape or dtype, or samples that are not finite.
        """
        ...


def check_clips(audio: list[np.ndarray]) -> None:
    """Raise a `ValueError` that names the first clip which is not (L,) finite floats with L > 0."""
    for index, clip in enumerate(audio):
        if clip.ndim != 1 or clip.size == 0:
            raise ValueError(f"clip {index} must have shape (samples,) with at least one, and has {clip.shape}")
        if not np.issubdtype(clip.dtype, np.floating):
            raise ValueError(f"clip {index} must be floats in [-1, 1], and is {clip.dtype}: scale it first")
        if not np.isfinite(clip).all():
            raise ValueError(f"clip {index} has samples that are not finite")


def resample(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample (L,) without delay, as float32."""
    return soxr.resample(np.asarray(wave, dtype=np.float32), from_rate, to_rate)


def to_clip(wave: np.ndarray, rate: int, length: int, name: str) -> np.ndarray:
    """Bring what a codec decoded at its own rate to 24 kHz, (`length`,), in [-1, 1]; zeros fill up what lacks.

    Raises:
        RuntimeError: The codec `name` gave samples that are not finite.
    """
    wave = resample(wave, rate, RATE)[:length]
    if not np.isfinite(wave).all():
        raise RuntimeError(f"{name} gave samples that are not finite")
    return np.pad(wave.clip(-1, 1), (0, length - len(wave)))
