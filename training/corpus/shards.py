"""Tokens on disk: parquet shards that appear as wholes, and say themselves what they hold.

`K` codebooks, `T` frames.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value

from .coverage import as_runs
from .windows import Window

FORMAT = {"format": "mimi-tokens", "format_version": "1"}
META = b"mimi_tokens"
SHARD_FRAMES = 100 * 45_000
"""Frames after which a shard is closed: 100 hours, some 50 MB of 8 codebooks."""
SAVE_EVERY_S = 300.0
"""Seconds after which a shard is closed, whatever it holds: what a killed job may have to do again."""
GROUP_FRAMES = 45_000
"""Frames of a row group: an hour. Codes are written as indices of 11 bits into a dictionary, one for each group."""


class ShardError(ValueError):
    """A folder whose shards cannot be used; the message says why and what to do."""


def token_features(others: Features, codebook_size: int) -> Features:
    """Columns of tokens: those of the source, and what the codec adds.

    Raises:
        ShardError: The source has a column of the same name as one that is added.
    """
    dtype = "uint16" if codebook_size <= 1 << 16 else "uint32"
    added = {
        "clip_id": Value("string"),
        "codes": List(List(Value(dtype))),  # (K, T)
        "num_frames": Value("int32"),
        "num_samples": Value("int64"),
    }
    if taken := sorted(added.keys() & others.keys()):
        raise ShardError(f"The data set has a column {', '.join(taken)} already, as tokens do: rename it first.")
    return Features({**others, **added})


class Shards:
    """Writes windows into shards.

    A shard is `data/SPLIT-SHARD-ROW.parquet`, after the first row of the source that it holds, and has a hidden name
    until it is whole. The clips that could not be encoded are in `errors/`, in a file of the same name, which counts
    while the shard is there.

    Args:
        folder: Where to.
        split: What the shards are called.
        features: Columns, as `token_features` gives them.
        job: What makes these tokens what they are; every shard says it.
    """

    def __init__(self, folder: Path, split: str, features: Features, job: Mapping[str, Any]):
        self.folder = folder
        self.seconds = 0.0
        """How long writing took."""
        self._split = split.replace("/", "_")
        self._schema = features.arrow_schema
        self._job = job
        self._clear()

    def _clear(self) -> None:
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []
        self._waiting_frames = 0
        self._opened = time.monotonic()
        self._name = ""
        self._rows: dict[int, list[int]] = {}
        self._ends: dict[int, int] = {}
        self._errors: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter(clips=0, frames=0, samples=0, padded_frames=0)

    def add(self, window: Window) -> None:
        """Append what became of a window; the shard is closed when it is large or old enough."""
        start = time.perf_counter()
        if not self._name:
            # a window without rows only says where shards end, and nothing comes after it
            shard, row = next(((shard, rows[0]) for shard, rows in window.rows.items()), None) or min(
                window.ends.items()
            )
            self._name = f"{self._split}-{shard:05d}-{row:08d}"
            self._opened = time.monotonic()
        for shard, rows in window.rows.items():
            self._rows.setdefault(shard, []).extend(rows)
        self._ends |= window.ends
        for index, reason in sorted(window.reasons.items()):
            shard, row = window.places[index]
            self._errors.append({"clip_id": window.clips[index].name, "reason": reason, "shard": shard, "row": row})
        table = _table(window, self._schema)
        frames = sum(codes.shape[1] for codes in window.codes.values())
        self._counts.update(clips=len(window.codes), frames=frames, samples=sum(window.num_samples.values()))
        self._counts.update(padded_frames=window.padded_frames)
        self._waiting.append(table)
        self._waiting_frames += frames
        if self._waiting_frames >= GROUP_FRAMES:
            self._write_group()
        if self._counts["frames"] >= SHARD_FRAMES or time.monotonic() - self._opened >= SAVE_EVERY_S:
            self._close()
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """Close the shard that is open, if any."""
        if self._name:
            start = time.perf_counter()
            self._close()
            self.seconds += time.perf_counter() - start

    def _write_group(self) -> None:
        if self._writer is None:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            # of the columns of a corpus, most repeat themselves, and codes have few values
            self._writer = pq.ParquetWriter(self._part, self._schema, compression="zstd")
        if any(table.num_rows for table in self._waiting):  # `datasets` cannot read a row group without rows
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._waiting_frames = [], 0

    def _close(self) -> None:
        self._write_group()
        record = {
            **FORMAT,
            "job": self._job,
            "rows": {shard: as_runs(rows) for shard, rows in self._rows.items()},
            "ends": self._ends,
            "counts": self._counts,
            "errors": Counter(error["reason"] for error in self._errors),
        }
        assert self._writer is not None
        self._writer.add_key_value_metadata({META: json.dumps(record)})
        self._writer.close()
        if self._errors:  # before the shard that makes it count
            path = self.folder / "errors" / f"{self._name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            part.write_text("".join(json.dumps(error) + "\n" for error in self._errors), encoding="utf-8")
            part.replace(path)
        self._part.replace(self.folder / "data" / f"{self._name}.parquet")
        self._clear()

    @property
    def _part(self) -> Path:
        return self.folder / "data" / f".{self._name}.{os.getpid()}.part"


def _table(window: Window, schema: pa.Schema) -> pa.Table:
    """The clips of a window that have codes, in the order of the source."""
    done = sorted(window.codes)
    columns: dict[str, Any] = {}
    if done:
        others = pa.concat_tables(window.columns).combine_chunks().take(done) if window.columns[0].num_columns else {}
        columns = {name: others[name] for name in getattr(others, "column_names", ())}
    codes = [window.codes[index] for index in done]
    columns["clip_id"] = pa.array([window.clips[index].name for index in done], pa.string())
    columns["codes"] = _nested(codes, schema.field("codes").type)
    columns["num_frames"] = pa.array([rows.shape[1] for rows in codes], pa.int32())
    columns["num_samples"] = pa.array([window.num_samples[index] for index in done], pa.int64())
    empty = {field.name: pa.array([], field.type) for field in schema}
    return pa.table({**({} if done else empty), **columns}).select(schema.names).cast(schema)


def _nested(codes: list[np.ndarray], kind: pa.ListType) -> pa.ListArray:
    """Arrays (K, T) as lists of lists."""
    sizes = [rows.shape[1] for rows in codes for _ in rows]
    flat = np.concatenate([rows.reshape(-1) for rows in codes] or [np.zeros(0, dtype=np.int32)])
    values = pa.array(flat.astype(kind.value_type.value_type.to_pandas_dtype()))
    inner = pa.ListArray.from_arrays(np.cumsum([0, *sizes], dtype=np.int32), values)
    outer = np.cumsum([0, *(len(rows) for rows in codes)], dtype=np.int32)
    return pa.ListArray.from_arrays(outer, inner).cast(kind)


# ---- what is there


def shard_paths(folder: Path) -> list[Path]:
    """The shards in a folder, in the order of the source."""
    return sorted((folder / "data").glob("[!.]*.parquet"))


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """What the shards in a folder say of themselves.

    Raises:
        ShardError: A file is not a shard of tokens.
    """
    for path in shard_paths(folder):
        try:
            record = json.loads((pq.read_metadata(path).metadata or {})[META])
        except (KeyError, OSError, pa.ArrowException, ValueError) as error:
            raise ShardError(f"{path} is not a shard that `mimi tokenize` wrote: move it away.") from error
        if record["format_version"] != FORMAT["format_version"]:
            raise ShardError(f"{path} has the format version {record['format_version']}: a newer `mimi` reads it.")
        yield record


def sweep(folder: Path) -> None:
    """Remove what a killed process left: shards that are not whole, and errors whose shard never came."""
    for path in (folder / "data").glob(".*.part"):
        path.unlink()
    for path in (folder / "errors").glob("*.jsonl"):
        if not (folder / "data" / f"{path.stem}.parquet").exists():
            path.unlink()


def check_job(folder: Path, found: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Raise a `ShardError` that names what differs between the job of the shards in a folder and this one.

    A model is known by its fingerprint; what it is called does not matter.
    """
    for part, facts in job.items():
        for name in dict.fromkeys([*facts, *found[part]]):
            there, here = found[part].get(name), facts.get(name)
            if name == "model" or there == here:
                continue
            if name == "fingerprint":
                name = "model"
                there, here = f"{found[part][name]} ({there[:8]})", f"{facts[name]} ({here[:8]})"
            raise ShardError(
                f"{folder} holds the tokens of another job: its {part} {name.replace('_', ' ')} is {there}, here it "
                f"is {here}. Choose another folder with --to."
            )
