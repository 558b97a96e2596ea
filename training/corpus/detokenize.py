"""`mimi detokenize` as a function: shards of tokens to a folder of audio, a file for each clip.

`B` clips, `C` audio channels, `L` samples, `K` codebooks, `T` frames.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from soundfile import SoundFile
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modeling_mimi import MimiModel
from modeling_mimi.audio_files import atomic, fingerprints, write_audio
from modeling_mimi.cli import CommandError, load_model

from .encoding import chunk_frames
from .names import Names
from .reading import Layout
from .shards import ShardError, records, shard_paths
from .tokenize import SUMMARY, layout_for, process_state
from .windows import group

CLIPS_AT_ONCE = 512
"""Clips among which those of like length are decoded together."""


class Clip(NamedTuple):
    """A clip that is to become a file."""

    path: Path
    codes: Tensor
    """(K, T)."""
    num_samples: int


def detokenize(args: argparse.Namespace) -> int | None:
    """Decode a folder of tokens, or of a data set of the Hub; files that are there already are kept.

    Args:
        args: Those of `mimi detokenize`.

    Returns:
        How many files there are for these tokens, on the first process.

    Raises:
        ValueError: There are no tokens, or they are another model's; the message says which.
    """
    state = process_state(args)
    folder = _local(args.tokens)
    paths = shard_paths(folder)
    count = _check_columns(paths, args)
    model = _load_model(next(records(folder))["job"]["codec"], args)
    names = Names(name for path in paths for name in _names(path, args.id_column))
    layout = layout_for(model, args.batch_seconds)
    with (
        ThreadPoolExecutor(args.workers) as pool,
        tqdm(desc="detokenize", total=count, unit="clip", disable=None if state.is_main_process else True) as bar,
    ):
        for turn, table in enumerate(_tables(paths, args.id_column)):
            if turn % state.num_processes == state.process_index:
                clips = [clip for clip in _clips(table, turn * CLIPS_AT_ONCE, names, args) if not clip.path.exists()]
                _decode(clips, model, layout, args.format, pool)
            bar.update(table.num_rows)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    _write_metadata(paths, names, args)
    return count


def _local(name: str) -> Path:
    """The folder of tokens: its own, or a copy of what the Hub has."""
    folder = Path(name).expanduser()
    if not folder.exists():
        try:
            wanted = ["data/*.parquet", SUMMARY]
            folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
        except (HFValidationError, OSError) as error:
            raise ShardError(f"There are no tokens at {name}: give a folder or the id of a Hub data set.") from error
    if not shard_paths(folder):
        raise ShardError(f"There are no tokens in {name}: `mimi tokenize` writes them to data/*.parquet.")
    if not (folder / SUMMARY).exists():
        raise ShardError(f"The tokens in {name} are not all there yet: let `mimi tokenize` finish first.")
    return folder


def _check_columns(paths: list[Path], args: argparse.Namespace) -> int:
    """The number of clips; `ShardError` if there is no column to name files after."""
    names = pq.read_schema(paths[0]).names
    if args.id_column not in names:
        raise ShardError(f"{args.tokens} has no column {args.id_column!r} for --id-column; it has {', '.join(names)}.")
    return sum(pq.read_metadata(path).num_rows for path in paths)


def _load_model(codec: dict, args: argparse.Namespace) -> MimiModel:
    """The model that made the tokens."""
    count = codec["num_quantizers"]
    if (args.num_quantizers or 1) > count:
        raise ShardError(f"{args.tokens} has {count} codebooks, not {args.num_quantizers}.")
    given, args.model = args.model, args.model or codec["model"]
    try:
        model = load_model(args)
    except CommandError as error:
        hint = "" if given else " It made these tokens: say with --model where it is."
        raise CommandError(f"{error}{hint}") from error
    if fingerprints(model)[:count][-1] != codec["fingerprint"]:
        raise ShardError(f"{args.tokens} was made with other codebooks, those of {codec['model']}: give that --model.")
    return model


# ---- reading


def _names(path: Path, column: str) -> Iterator[str]:
    for batch in pq.ParquetFile(path).iter_batches(columns=[column]):
        yield from map(str, batch.column(0).to_pylist())


def _tables(paths: list[Path], id_column: str) -> Iterator[pa.Table]:
    """All clips in their order, so many at a time whatever the shards and their row groups."""
    waiting = None
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(CLIPS_AT_ONCE, columns=[id_column, "codes", "num_samples"]):
            table = pa.Table.from_batches([batch])
            waiting = table if waiting is None else pa.concat_tables([waiting, table])
            while waiting.num_rows >= CLIPS_AT_ONCE:
                yield waiting.slice(0, CLIPS_AT_ONCE)
                waiting = waiting.slice(CLIPS_AT_ONCE)
    if waiting is not None and waiting.num_rows:
        yield waiting


def _clips(table: pa.Table, first: int, names: Names, args: argparse.Namespace) -> Iterator[Clip]:
    ids, samples = table.column(args.id_column).to_pylist(), table.column("num_samples").to_pylist()
    for row, (name, num_samples) in enumerate(zip(ids, samples, strict=True)):
        levels = table.column("codes")[row].values
        flat = levels.flatten().to_numpy().astype(np.int64)
        codes = torch.from_numpy(flat.reshape(len(levels), -1)[: args.num_quantizers])
        yield Clip(_path(args, names, str(name), first + row), codes, num_samples)


def _path(args: argparse.Namespace, names: Names, name: str, number: int) -> Path:
    """Where clip `number` goes; it may have a folder of its own in its name."""
    return args.to / f"{names.stem(name, number)}.{args.format}"


# ---- writing


@torch.inference_mode()
def _decode(clips: list[Clip], model: MimiModel, layout: Layout, ending: str, pool: ThreadPoolExecutor) -> None:
    """Decode clips in batches of like length, long ones in pieces, while other threads write."""
    lengths = {index: clip.codes.shape[1] for index, clip in enumerate(clips)}
    waiting = []
    for indices in group(lengths, layout.batch_frames, layout.long_frames):
        chosen = [clips[index] for index in indices]
        if lengths[indices[0]] > layout.long_frames:
            _write_long(chosen[0], model, ending)
            continue
        codes = pad_sequence([clip.codes.T for clip in chosen], batch_first=True).transpose(1, 2)  # (B, K, T)
        audio = model.decode(codes.to(model.device)).audio_values.float().cpu()
        for clip, wave in zip(chosen, audio, strict=True):
            waiting.append(pool.submit(_write, clip, wave[:, : clip.num_samples], model.config.sampling_rate, ending))
    for future in waiting:
        future.result()


def _write(clip: Clip, audio: Tensor, sampling_rate: int, ending: str) -> None:
    with atomic(clip.path) as part:
        write_audio(part, audio, sampling_rate, ending)


def _write_long(clip: Clip, model: MimiModel, ending: str) -> None:
    """Decode a clip in pieces and write each as it comes, so that an hour takes no more memory than a piece."""
    config, chunk, left = model.config, chunk_frames(model), clip.num_samples
    state = model.new_decoder_state(1, chunk)
    with atomic(clip.path) as part:
        file = SoundFile(part, "w", config.sampling_rate, config.audio_channels, "PCM_16", format=ending.upper())
        with file:
            for codes in clip.codes[None].split(chunk, dim=-1):
                audio = model.decode_frames(codes.to(model.device), state)[0, :, :left].float().cpu()
                file.write(audio.T.numpy())
                left -= audio.shape[1]


def _write_metadata(paths: list[Path], names: Names, args: argparse.Namespace) -> None:
    """`metadata.parquet`: the file of each clip and its other columns, so that the folder is a data set too."""
    number, writer = 0, None
    with atomic(args.to / "metadata.parquet") as part, ExitStack() as stack:
        for path in paths:
            source = pq.ParquetFile(path)
            columns = [name for name in source.schema_arrow.names if name not in ("codes", "file_name")]
            for batch in source.iter_batches(columns=columns):
                table = pa.Table.from_batches([batch]).replace_schema_metadata()
                ids = map(str, table.column(args.id_column).to_pylist())
                files = [str(_path(args, names, name, number + row)) for row, name in enumerate(ids)]
                files = [Path(file).relative_to(args.to).as_posix() for file in files]
                table = table.add_column(0, "file_name", pa.array(files))
                number += table.num_rows
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(part, table.schema))
                writer.write_table(table)
