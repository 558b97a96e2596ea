"""Where clips come from: rows of `datasets` streams as light references, and any piece of their audio on demand.

Nothing is decoded before it is asked for, and then by soundfile and soxr. `L` samples at the model's rate; a file has
frames at its own.
"""

import gc
import glob
import hashlib
import os
import warnings
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from math import ceil, gcd
from pathlib import Path
from typing import Any, NamedTuple

import datasets.config
import fsspec
import numpy as np
import soundfile
from datasets import Audio, ClassLabel, IterableDataset, Value, load_dataset
from datasets.distributed import split_dataset_by_node

from modeling_mimi.audio_files import AUDIO_SUFFIXES, FAILURES, UNKNOWN_LENGTH
from modeling_mimi.feature_extraction_mimi import MimiFeatureExtractor

from .config import SourceConfig

MARGIN_S = 0.02
"""Audio read on both sides of a piece, so that resampling it equals resampling the whole file."""

MISSING_TAIL_S = 0.1
"""What a compressed file may lack at its end of the length that its header states, before it counts as cut off."""

FEW_SHARDS = 32
"""Parquet with fewer files than this is shuffled by row groups instead of files; for more, reading every file's
footer first would cost too much."""


SPLITS = {"train", "dev", "validation", "valid", "test"}
"""Names of folders that hold a split each."""


class DataError(ValueError):
    """A source that cannot be trained on; the message says why and what to do."""


class Unusable(Exception):
    """A clip or a piece of one that is skipped; the message is the reason that it is counted under."""


class Reference(NamedTuple):
    """A clip that is not decoded yet: the name to log, where its bytes are, and what keys its random draws."""

    name: str
    path: str | None
    data: bytes | None
    key: int


class Length(NamedTuple):
    """What the header of a clip says."""

    frames: int
    sampling_rate: int


class Share(NamedTuple):
    """The part `index` of `count` disjoint ones that an epoch is split into."""

    epoch: int
    index: int
    count: int


def keyed(*key: int | str) -> np.random.Generator:
    """A random generator that depends on nothing but its key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()  # NumPy's own sequence takes (0,) for (0, 0)
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "big")))


# ---- one clip


def reference(audio: Any, name: str, root: str = "") -> Reference:
    """Take the value of an audio column: a path, bytes, or both in a mapping."""
    if not isinstance(audio, dict):
        audio = {"bytes": audio} if isinstance(audio, bytes) else {"path": audio}
    data, path = audio.get("bytes"), audio.get("path")
    if path:
        name = path if not root or "://" in path else os.path.relpath(path, root)
    content = zlib.crc32(data) if data else 0  # files inside an archive may all have one name
    digest = hashlib.blake2b(f"{name} {content}".encode(), digest_size=8).digest()
    return Reference(name, path, data, int.from_bytes(digest, "big"))


@contextmanager
def opened(clip: Reference) -> Generator[soundfile.SoundFile]:
    """Open a clip's audio; whatever goes wrong inside the block is an `Unusable`."""
    try:
        with ExitStack() as stack:
            file = clip.path
            if clip.data is not None:
                file = BytesIO(clip.data)
            elif not file:
                raise Unusable("no audio")
            elif "://" in file:
                file = stack.enter_context(fsspec.open(file, "rb"))
            elif not os.path.isfile(file):
                raise Unusable("missing file")
            if clip.data == b"" or (file == clip.path and os.path.getsize(file) == 0):
                raise Unusable("empty")
            yield stack.enter_context(soundfile.SoundFile(file))
    except FileNotFoundError as error:
        raise Unusable("missing file") from error
    except (*FAILURES, TypeError) as error:  # soundfile asks for the rate of a file without header by a TypeError
        raise Unusable("undecodable") from error


def measure(clip: Reference) -> Length:
    """Read the header of a clip."""
    with opened(clip) as file:
        if file.frames > UNKNOWN_LENGTH:
            raise Unusable("header without length")
        if file.frames == 0:
            raise Unusable("empty")
        return Length(file.frames, file.samplerate)


def read_piece(clip: Reference, samples: int, extractor: MimiFeatureExtractor, draw: float = 0.0) -> np.ndarray:
    """Decode a piece of a clip, mono at the extractor's rate, peaks above 1 scaled down; only its frames are read.

    Args:
        clip: What to read.
        samples: Length of the piece; a shorter clip is read whole.
        extractor: What resamples.
        draw: Where the piece lies among the places where it can, in [0, 1).

    Returns:
        (L,) float32 in [-1, 1], at most `samples` long.

    Raises:
        Unusable: The clip is missing, broken, cut off or has samples that are not finite.
    """
    target = extractor.sampling_rate
    with opened(clip) as file:
        rate, frames = file.samplerate, file.frames
        common = gcd(rate, target)
        frames_per_step, samples_per_step = rate // common, target // common  # both grids meet once per step
        places = max(frames * target // rate - samples, 0) // samples_per_step + 1
        start, margin = int(draw * places), ceil(MARGIN_S * rate / frames_per_step)
        lead = min(start, margin)
        first = (start - lead) * frames_per_step
        wanted = (lead + ceil(samples / samples_per_step) + margin) * frames_per_step
        wanted = min(wanted, frames - first)
        file.seek(first)
        audio = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
    if len(audio) < max(wanted - MISSING_TAIL_S * rate, 1):
        raise Unusable("cut off")
    if not np.isfinite(audio).all():
        raise Unusable("not finite")
    try:
        audio = extractor([audio], sampling_rate=rate, padding=False)["input_values"][0][0]
    except ValueError as error:  # nothing is left of it at the target rate
        raise Unusable("too short") from error
    audio = audio[lead * samples_per_step :][:samples]
    return audio / max(1.0, float(np.abs(audio).max(initial=0.0)))


def level(audio: np.ndarray) -> float:
    """Root mean square in dB of full scale; -inf for digital silence."""
    power = float(np.mean(np.square(audio, dtype=np.float64))) if len(audio) else 0.0
    return 10 * float(np.log10(power)) if power else float("-inf")


# ---- one source


class Folder:
    """Audio files by name: their references are in memory and shuffled as a whole every epoch."""

    def __init__(self, label: str, clips: list[Reference], left_out: int):
        self.label = label
        self.clips = clips
        self.left_out = left_out
        if not clips:
            raise DataError(f"{label} has no clip to train on: `where` left out all of its {left_out} rows.")
        self.digest = hashlib.blake2b("\n".join(c.name for c in clips).encode(), digest_size=8).hexdigest()

    def blocks(
        self, key: Sequence[int], share: Share, size: int, position: dict | None = None
    ) -> Iterator[tuple[dict, list[Reference]]]:
        """Give the share's clips in blocks of `size`, each with its position.

        Args:
            key: What keys the order, together with the epoch.
            share: Which clips.
            size: Clips per block.
            position: Where to begin, from an earlier call; the block at that position is given again.
        """
        order = keyed(*key, share.epoch).permutation(len(self.clips))[share.index :: share.count]
        for block in range(position["block"] if position else 0, ceil(len(order) / size)):
            yield {"block": block}, [self.clips[row] for row in order[block * size :][:size]]


class Stream:
    """Rows that carry their audio, read one after another; the order of the shards changes every epoch."""

    def __init__(self, label: str, stream: IterableDataset, config: SourceConfig, shares: int):
        few = stream.num_shards < max(shares, FEW_SHARDS)
        self.label = label
        self.stream = stream.reshard() if few else stream
        self.config = config
        self.left_out = 0
        self.digest = ""

    def blocks(
        self, key: Sequence[int], share: Share, size: int, position: dict | None = None
    ) -> Iterator[tuple[dict, list[Reference]]]:
        """As `Folder.blocks`; a share is made of whole shards where there are enough, else of every so many-th row."""
        by_shards = self.stream.num_shards >= share.count
        node = (share.index, share.count) if by_shards else (0, 1)
        stream = split_dataset_by_node(self.stream, *node, strategy="shards")  # a fresh one: a stream has one position
        stream.set_epoch(int(keyed(*key, share.epoch).integers(1, 2**31)))  # epochs from 1 on shuffle the shards
        block, row = 0, 0
        if position:
            block, row = position["block"], position["row"]
            if position["stream"]:
                stream.load_state_dict(position["stream"])
        else:
            self.left_out = 0  # counts the rows of one epoch
        here = {"block": block, "row": row, "stream": position and position["stream"]}
        clips: list[Reference] = []
        # `iter` does not split by torch worker, unlike `__iter__`: each share is one worker's already
        for values in stream.iter(batch_size=1):
            if not keeps(self.config.where, stream, {name: value[0] for name, value in values.items()}):
                self.left_out += 1
                continue
            if by_shards or row % share.count == share.index:
                clips.append(reference(values[self.config.audio_column][0], f"row {row}"))
            row += 1
            if len(clips) == size:
                yield here, clips
                block += 1
                here, clips = {"block": block, "row": row, "stream": stream.state_dict()}, []
        if clips:
            yield here, clips


def keeps(where: dict[str, list[str]], stream: IterableDataset, row: dict[str, Any]) -> bool:
    """Whether a row has one of the listed values in each of the listed columns; an empty cell is ''."""
    for column, values in where.items():
        value, feature = row[column], stream.features and stream.features[column]
        if isinstance(feature, ClassLabel) and value is not None:
            value = feature.int2str(value)
        if ("" if value is None else str(value)) not in values:
            return False
    return True


def open_source(config: SourceConfig, shares: int = 1) -> Folder | Stream:
    """Open a source for `shares` readers; `DataError` if it is not there or lacks a column that the config names."""
    with _tidied():
        return _open(config, shares)


@contextmanager
def _tidied() -> Generator[None]:
    """Keep `datasets` from two habits: it tells a server of each opening, local files too, and leaves files open."""
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # without a network every telling takes seconds
    collecting = gc.isenabled()
    gc.disable()  # so that what is left at the end is all in the youngest generation, which is quickly collected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield
        finally:
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
            gc.collect(0)  # closes the metadata files
            if collecting:
                gc.enable()


def stream_rows(config: SourceConfig) -> Iterator[tuple[Reference, dict[str, Any]]]:
    """Every clip of a source that `where` keeps with its row's other columns, once, in the source's own order.

    Raises:
        DataError: As `open_source`.
    """
    with _tidied():
        label, stream, root = _stream(config)
    rows = (row for rows in stream.iter(batch_size=16) for row in _transposed(rows))
    for number, row in enumerate(row for row in rows if keeps(config.where, stream, row)):
        yield reference(row.pop(config.audio_column), f"{label}, row {number}", root), row


def _transposed(columns: dict[str, list]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _open(config: SourceConfig, shares: int) -> Folder | Stream:
    label, stream, root = _stream(config)
    stream = stream.select_columns(list(dict.fromkeys([config.audio_column, *config.where])))
    if stream.info.builder_name != "audiofolder":
        return Stream(label, stream, config, shares)
    rows = [row for columns in stream.iter(batch_size=256) for row in _transposed(columns)]
    kept = [row[config.audio_column] for row in rows if keeps(config.where, stream, row)]
    return Folder(label, [reference(path, "", root) for path in kept], len(rows) - len(kept))


def _stream(config: SourceConfig) -> tuple[str, IterableDataset, str]:
    """What to call a source, its stream with the audio not decoded, and the folder that its file names start from."""
    label = f"{config.path}{f'/{config.name}' if config.name else ''} ({config.split})"
    try:
        stream, root = _load(config)
    except DataError:
        raise
    except Exception as error:  # the builders raise errors of many libraries
        raise DataError(f"{label} cannot be opened: {error}") from error
    columns = stream.column_names or list(next(iter(stream.take(1)), {}))
    for column, field in [(config.audio_column, "audio_column"), *((column, "where") for column in config.where)]:
        if column not in columns:
            raise DataError(f"{label} has no column {column!r}, which `{field}` names; it has {', '.join(columns)}.")
    if stream.features and isinstance(stream.features[config.audio_column], Audio):
        # what `Audio(decode=False)` holds: the type itself asks for torchcodec even where it does not decode
        listed = stream.info.builder_name == "audiofolder"
        raw = Value("string") if listed else {"bytes": Value("binary"), "path": Value("string")}
        stream = stream.cast_column(config.audio_column, raw)
    return label, stream, root


def _load(config: SourceConfig) -> tuple[IterableDataset, str]:
    """The stream of a source, and the folder that the names of its files are relative to."""
    path = os.path.expanduser(config.path)
    options: dict[str, Any] = {"split": config.split, "streaming": True}
    if os.path.isdir(path):
        folder = os.path.join(path, config.split)
        if not os.path.isdir(folder):
            if splits := sorted(SPLITS & set(os.listdir(path))):
                raise DataError(f"{path} has no split {config.split!r}, but {', '.join(splits)}.")
            folder = path
        if "audiofolder" not in _kinds(folder):
            return load_dataset(path, config.name, **options), path
        # naming the files keeps `datasets` from guessing splits from words like "test" in their names
        files = {config.split: os.path.join(glob.escape(folder), "**")}
        return load_dataset("audiofolder", data_files=files, **options), folder
    kind = _kind(path)
    if "://" in path and kind:
        return load_dataset(kind, data_files={config.split: path}, **options), ""
    files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    files = files or ([path] if os.path.isfile(path) else [])
    if files:
        kind = kind or _kind(files[0])
        if not kind:
            raise DataError(f"{config.path}: cannot tell what {files[0]} is; name audio files, .parquet or .tar.")
        names = [glob.escape(os.path.abspath(file)) for file in files]
        return load_dataset(kind, data_files={config.split: names}, **options), os.path.dirname(os.path.abspath(path))
    if kind or glob.has_magic(path) or path.startswith((".", "/")):
        raise DataError(f"There is nothing at {config.path}: give a folder, files, or the id of a Hub data set.")
    return load_dataset(path, config.name, revision=config.revision, **options), ""


def _kinds(folder: str) -> set[str | None]:
    """What a folder holds: a sample beside tables or archives does not make it a folder of audio."""
    kinds = {_kind(name) for _, _, names in os.walk(folder) for name in names if not name.startswith("metadata.")}
    return kinds & {"parquet", "webdataset"} or kinds


def _kind(name: str) -> str | None:
    """The builder of `datasets` for a file of this name, if it has an ending that says."""
    endings = {".parquet": "parquet", ".tar": "webdataset", **dict.fromkeys(AUDIO_SUFFIXES, "audiofolder")}
    return endings.get(Path(name).suffix.lower())
