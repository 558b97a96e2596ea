"""Which rows of a data set have their tokens already: read off the shards that hold them, exact to the row."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class CoverageError(ValueError):
    """Shards that do not fit together; the message says why."""


class Portion(NamedTuple):
    """What one of several processes does of what is left."""

    shards: list[int]
    """Shards of the source that it reads."""
    first: int
    """Of the rows left in them, it takes this one ..."""
    step: int
    """... and every so many-th after it."""
    notes_ends: bool
    """Whether it says how many rows a shard has."""


class Coverage:
    """Rows of the source's shards, as the records of finished work tell them."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self._seen: dict[int, np.ndarray] = {}
        self._ends: dict[int, int] = {}
        for record in records:
            self._add(record)

    def _add(self, record: Mapping[str, Any]) -> None:
        for shard, runs in record["rows"].items():
            for start, stop, step in runs:
                seen = self._seen.get(int(shard), np.zeros(0, dtype=bool))
                seen = np.pad(seen, (0, max(stop - len(seen), 0)))
                if seen[start:stop:step].any():
                    raise CoverageError(
                        f"Two shards hold the same rows, among {start} to {stop - 1} of the source's shard {shard}: "
                        "did two jobs write here at once? Move away what one of them wrote."
                    )
                seen[start:stop:step] = True
                self._seen[int(shard)] = seen
        for shard, end in record["ends"].items():
            if self._ends.setdefault(int(shard), end) != end:
                raise CoverageError(
                    f"The source's shard {shard} had {self._ends[int(shard)]} rows once and {end} another time: the "
                    "data set has changed. Choose another folder with --to."
                )

    def left(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Numbers of the rows from `start` to before `stop` that have no tokens yet."""
        seen = self._seen.get(shard, np.zeros(0, dtype=bool))[start:stop]
        return start + np.flatnonzero(~np.pad(seen, (0, stop - start - len(seen))))

    def is_complete(self, shard: int) -> bool:
        """Whether every row of a shard is there, and its end is known."""
        end = self._ends.get(shard)
        return end is not None and not len(self.left(shard, 0, end))

    def portion(self, num_shards: int, rank: int, world_size: int) -> Portion:
        """What process `rank` of `world_size` is to do.

        Whole shards where there are enough, else every so many-th row of those left. The portions are disjoint,
        whoever did what is there already.
        """
        shards = [shard for shard in range(num_shards) if not self.is_complete(shard)]
        if len(shards) >= world_size:
            return Portion(shards[rank::world_size], 0, 1, True)
        return Portion(shards, rank, world_size, rank == 0)

    def is_whole(self, num_shards: int) -> bool:
        """Whether every row of every shard is there."""
        return all(self.is_complete(shard) for shard in range(num_shards))


def as_runs(rows: Iterable[int]) -> list[list[int]]:
    """Rising numbers as few runs `[start, stop, step]`, each a `range`."""
    runs: list[list[int]] = []
    for row in rows:
        if runs:
            start, stop, step = runs[-1]
            last = stop - 1
            if start == last:  # one number so far, which any second one goes on from
                runs[-1] = [start, row + 1, row - start]
                continue
            if row == last + step:
                runs[-1][1] = row + 1
                continue
        runs.append([row, row + 1, 1])
    return runs
