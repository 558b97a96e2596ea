"""Windows of a corpus: rows that are read, encoded in batches of like length, and written in the source's order.

`K` codebooks, `T` frames.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from training.sources import Reference

from .coverage import Coverage, Portion
from .source import Corpus

MAX_WASTE = 0.05
"""Share of a batch that may be padding."""
MAX_BYTES = 128 << 20
"""Encoded audio that a window holds in memory."""
MAX_CLIPS = 8192
"""Clips of a window."""


@dataclass
class Window:
    """Consecutive work, and what became of it."""

    number: int
    """Its place among the windows of this run."""
    rows: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Rows of each shard that are dealt with, rising; those included that `where` leaves out."""
    ends: dict[int, int] = field(default_factory=dict)
    """How many rows a shard has, of those that ended here."""
    clips: list[Reference] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """Shard and row of each clip."""
    columns: list[pa.Table] = field(default_factory=list)
    """The other columns of each clip, a table of one row."""
    num_frames: list[int] = field(default_factory=list)
    """Of each clip by its header; 0 where it cannot be read."""
    total_frames: int = 0
    total_bytes: int = 0
    """Encoded audio that the clips carry."""
    codes: dict[int, np.ndarray] = field(default_factory=dict)
    """(K, T) of each clip that is done."""
    num_samples: dict[int, int] = field(default_factory=dict)
    """Length of each clip that is done, at the model's rate."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Why a clip has no codes."""
    padded_frames: int = 0
    """Frames that the model encoded, padding included."""

    def add(self, clip: Reference, place: tuple[int, int], columns: pa.Table, length: int | str) -> None:
        """Add a clip with its length in frames, or the reason why it has none."""
        if isinstance(length, str):
            self.reasons[len(self.clips)] = length
            length = 0
        self.clips.append(clip)
        self.places.append(place)
        self.columns.append(columns)
        self.num_frames.append(length)
        self.total_frames += length
        self.total_bytes += len(clip.data or b"")

    def is_full(self, frames: int) -> bool:
        """Whether it holds so many frames, or as much as memory is given to it."""
        return self.total_frames >= frames or self.total_bytes >= MAX_BYTES or len(self.clips) >= MAX_CLIPS

    @property
    def is_done(self) -> bool:
        """Whether every clip has codes or a reason."""
        return len(self.codes) + len(self.reasons) == len(self.clips)


class Batch(NamedTuple):
    """Clips of a window that go through the model together, or one long clip that goes through it in pieces."""

    window: Window
    clips: list[int]
    """Their indices in the window."""
    is_long: bool = False


def windows(
    corpus: Corpus,
    coverage: Coverage,
    portion: Portion,
    lengths: Callable[[Sequence[Reference]], Iterable[int | str]],
    full_frames: int,
) -> Iterator[Window]:
    """Read what a portion holds, a window at a time.

    Args:
        corpus: What to read.
        coverage: Rows that are done.
        portion: What to do of the others.
        lengths: Frames of clips, or the reason why one cannot be read.
        full_frames: A window ends when it holds so many; or `MAX_BYTES`, or `MAX_CLIPS`.
    """
    window, passed = Window(0), 0
    for shard in portion.shards:
        start = 0
        for table in corpus.tables(shard):
            left = coverage.left(shard, start, start + table.num_rows)
            mine = left[(np.arange(passed, passed + len(left)) % portion.step) == portion.first]
            passed += len(left)
            kept, clips, columns = corpus.select(table, shard, start, mine)
            found = dict(zip(kept, zip(clips, lengths(clips), range(len(kept)), strict=True), strict=True))
            for row in mine.tolist():
                if window.is_full(full_frames):  # not before there is another row, so that this may be the shard's end
                    yield window
                    window = Window(window.number + 1)
                window.rows[shard].append(row)
                if row in found:
                    clip, length, index = found[row]
                    window.add(clip, (shard, row), columns.slice(index, 1), length)
            start += table.num_rows
        if portion.notes_ends:
            window.ends[shard] = start
    if window.rows or window.ends:
        yield window


def batches(window: Window, batch_frames: int, long_frames: int) -> list[Batch]:
    """The batches of a window, as `group` makes them; clips that cannot be read are in none."""
    lengths = {index: frames for index, frames in enumerate(window.num_frames) if index not in window.reasons}
    groups = group(lengths, batch_frames, long_frames)
    return [Batch(window, clips, lengths[clips[0]] > long_frames) for clips in groups]


def group(lengths: Mapping[int, int], batch_frames: int, long_frames: int) -> list[list[int]]:
    """Group clips of like length, longest first.

    A batch ends before its padding exceeds `MAX_WASTE`; so on a CPU, where a padded frame costs what any other does,
    batches help short clips and cost nobody anything.

    Args:
        lengths: Frames of each clip.
        batch_frames: Frames of a batch, padding included; a longer clip goes alone.
        long_frames: Clips longer than this go alone, whatever a batch may hold.
    """
    found: list[list[int]] = []
    longest = total = 0
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        frames = lengths[index]
        padded = longest * (len(found[-1]) + 1) if found else 0
        fits = padded <= batch_frames and total + frames >= (1 - MAX_WASTE) * padded
        if found and longest <= long_frames and fits:
            found[-1].append(index)
            total += frames
        else:
            found.append([index])
            longest = total = frames
    return found
