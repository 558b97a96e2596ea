"""The clips that an evaluation runs over: in a fixed order, split over processes, decoded one by one.

`L` samples.
"""

import hashlib
import logging
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from modeling_mimi.feature_extraction_mimi import MimiFeatureExtractor
from training.config import SourceConfig
from training.sources import Reference, Unusable, level, measure, read_piece, stream_rows

logger = logging.getLogger(__name__)

MIN_DURATION_S = 0.5
MIN_LOUDNESS_DB = -60.0
Rows = Iterator[tuple[Reference, dict[str, Any]]]


class Clip(NamedTuple):
    """One clip, mono."""

    name: str
    audio: np.ndarray
    """(L,), float32 in [-1, 1]."""
    row: dict[str, Any]
    """The other columns of its row, such as its text or its speaker."""

    @property
    def digest(self) -> str:
        """Equal for equal samples."""
        return hashlib.blake2b(self.audio.tobytes(), digest_size=16).hexdigest()


class Skip(NamedTuple):
    """A clip that cannot be evaluated, and why."""

    name: str
    reason: str


def choose(source: SourceConfig, count: int | None, seed: int = 0) -> Rows:
    """The rows to evaluate, nothing decoded: all, or a fixed random choice of `count`, in the source's order.

    Files of one speaker tend to lie together, so a folder's clips are chosen from all of it. A stream whose rows carry
    their audio would have to be read whole for that: there it is the first `count` clips.

    Raises:
        DataError: The source cannot be opened.
    """
    rows = stream_rows(source)
    first = next(rows, None)
    if first is None:
        return iter(())
    rows = chain([first], rows)
    if count is None:
        return rows
    if first[0].data is not None:
        return islice(rows, count)
    found = list(rows)
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return iter([found[index] for index in sorted(chosen)])


def decode(rows: Rows, sampling_rate: int, max_s: float) -> Iterator[Clip | Skip]:
    """Decode clips one by one, cut to `max_s` seconds; what is broken, too short or silent comes as a `Skip`."""
    extractor = MimiFeatureExtractor(sampling_rate=sampling_rate)
    for reference, row in rows:
        try:
            frames, rate = measure(reference)
            if frames < MIN_DURATION_S * rate:
                raise Unusable("too short")
            audio = read_piece(reference, round(max_s * sampling_rate), extractor)
            if level(audio) < MIN_LOUDNESS_DB:
                raise Unusable("silent")
        except Unusable as reason:
            logger.warning("Skipped %s: %s.", reference.name, reason)
            yield Skip(reference.name, str(reason))
        else:
            yield Clip(reference.name, np.ascontiguousarray(audio, dtype=np.float32), row)
