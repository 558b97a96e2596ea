"""A data set as Arrow tables, shard by shard, in an order that never changes: every row has a place of its own."""

import hashlib
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Features, IterableDataset

from training.config import SourceConfig
from training.sources import FEW_SHARDS, DataError, Reference, _stream, _tidied, keeps, reference

ROWS_AT_ONCE = 16
"""Rows of a table: few, because each may carry minutes of audio."""


class Corpus:
    """What is to become tokens.

    Args:
        config: Where it is.

    Raises:
        DataError: It is not there, or lacks a column that the config names.
    """

    def __init__(self, config: SourceConfig):
        with _tidied():
            self.label, stream, self._root = _stream(config)
        self.config = config
        self._listed = stream.info.builder_name == "audiofolder"
        if not self._listed and stream.num_shards < FEW_SHARDS:
            stream = stream.reshard()
        features = stream.features
        if features is not None:  # else the columns of an archive have another order from row to row
            stream = stream.select_columns(list(features))
        # the rows of a folder are made one by one, and a table of them would guess types anew from each few
        self._stream: IterableDataset = stream if self._listed else stream.with_format("arrow")
        self.num_shards = stream.num_shards
        if features is None:
            first = next(self._tables(0), None)
            features = Features() if first is None else Features.from_arrow_schema(first.schema)
        self._features = features
        self.features = Features({name: kind for name, kind in features.items() if name != config.audio_column})

    def digest(self) -> str:
        """Another one if the rows have moved: of the names of files in a folder, else of the number of shards."""
        hasher = hashlib.blake2b(str(self.num_shards).encode(), digest_size=8)
        if self._listed:
            for table in self._tables(0):
                for path in table.column(self.config.audio_column).to_pylist():
                    hasher.update(f"{os.path.relpath(path, self._root)}\n".encode())
        return hasher.hexdigest()

    def tables(self, shard: int) -> Iterator[pa.Table]:
        """All rows of a shard, in order."""
        for table in self._tables(shard):
            yield table.select([self.config.audio_column, *self.features]).replace_schema_metadata()

    def select(
        self, table: pa.Table, shard: int, start: int, rows: np.ndarray
    ) -> tuple[list[int], list[Reference], pa.Table]:
        """Take rows out of a table of `tables` that begins at row `start` of its shard.

        Args:
            table: Where they are.
            shard: Whose table it is.
            start: Number of its first row.
            rows: Numbers of the rows.

        Returns:
            Of those that `where` keeps: their numbers, their clips and their other columns.
        """
        where = self.config.where
        chosen = table.take(rows - start)
        values = chosen.select(list(where)).to_pylist() if where else [{}] * len(rows)
        kept = np.array([keeps(where, self._stream, row) for row in values], dtype=bool)
        chosen = chosen.filter(pa.array(kept))
        audio = chosen.column(self.config.audio_column).to_pylist()
        numbers = rows[kept].tolist()
        clips = [self._clip(value, f"{shard:05d}-{row:08d}") for value, row in zip(audio, numbers, strict=True)]
        return numbers, clips, chosen.drop_columns([self.config.audio_column])

    def _clip(self, audio: object, name: str) -> Reference:
        clip = reference(audio, name, self._root if self._listed else "")
        # where a file once lay on somebody's machine is no part of its name
        return clip._replace(name=os.path.basename(clip.name)) if os.path.isabs(clip.name) else clip

    def _tables(self, shard: int) -> Iterator[pa.Table]:
        rows = self._stream.shard(self.num_shards, shard).iter(batch_size=ROWS_AT_ONCE)
        try:
            if not self._listed:
                yield from rows
                return
            for columns in rows:
                yield pa.Table.from_pydict(columns, schema=self._features.arrow_schema)
        except Exception as error:  # the builders raise errors of many libraries
            raise DataError(f"{self.label} cannot be read further: {error}") from error
