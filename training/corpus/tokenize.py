"""`mimi tokenize` as a function: what is left of a corpus, through the model on every process, into shards."""

import argparse
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Features

from modeling_mimi import MimiConfig, MimiModel
from modeling_mimi.audio_files import fingerprints
from modeling_mimi.cli import load_model
from training.config import SourceConfig
from training.history import write_summary

from .coverage import Coverage
from .encoding import Encoder
from .reading import Layout, num_frames
from .shards import FORMAT, Shards, check_job, records, shard_paths, sweep, token_features
from .source import Corpus
from .walk import Work, run, together
from .windows import windows

SUMMARY = "tokens.json"
BATCH_S = {"cpu": 10.0, "cuda": 240.0}
"""Audio of a batch unless told otherwise, by device; a CPU gains nothing from more."""
LONG_S = 120.0
"""Longer clips go through the model in pieces of this length."""
WINDOW_S = 600.0
"""Audio of a window at least ..."""
WINDOW_BATCHES = 15
"""... and in batches, so that clips of like length find each other."""


def tokenize(args: argparse.Namespace, where: Mapping[str, list[str]]) -> tuple[dict[str, Any], Work | None] | None:
    """Encode what the arguments of `mimi tokenize` name, as far as that is not done yet.

    Args:
        args: Those of the command.
        where: Rows to keep.

    Returns:
        On the first process, the summary of all tokens in the folder, and what this run did; None for that if there
        was nothing left to do.

    Raises:
        ValueError: The data set is not there, none of its clips can be read, or the folder holds another job's
            tokens; the message says which.
    """
    state = process_state(args)
    model = load_model(args)
    path = os.path.expanduser(args.dataset)
    source = SourceConfig(
        path, args.name, args.revision, args.split, audio_column=args.audio_column, where=dict(where)
    )
    corpus = Corpus(source)
    features = token_features(corpus.features, model.config.codebook_size)
    job = describe_job(corpus, model, args)
    if state.is_main_process:
        sweep(args.to)
    state.wait_for_everyone()
    earlier = list(records(args.to))
    for record in earlier:
        check_job(args.to, record["job"], job)
    coverage = Coverage(earlier)
    finished = (args.to / SUMMARY).exists() and coverage.is_whole(corpus.num_shards)
    state.wait_for_everyone()  # nobody writes while somebody looks
    if finished:
        return (summarise(args.to), None) if state.is_main_process else None
    layout = layout_for(model, args.batch_seconds)
    portion = coverage.portion(corpus.num_shards, state.process_index, state.num_processes)
    encoder, shards = Encoder(model, job["codec"]["num_quantizers"]), Shards(args.to, args.split, features, job)
    with ThreadPoolExecutor(args.workers) as pool:
        lengths = partial(pool.map, partial(num_frames, model.config))
        found = windows(corpus, coverage, portion, lengths, window_frames(model.config, layout))
        try:
            work = run(found, encoder, shards, model.config, layout, args.workers, state.is_main_process)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"The memory of {args.device} is too small: give a smaller --batch-seconds.") from error
    state.wait_for_everyone()
    works = gather_object([asdict(work)])
    if not state.is_main_process:
        return None
    summary = summarise(args.to)
    if not Coverage(records(args.to)).is_whole(corpus.num_shards):
        raise ValueError(
            f"Not every row of {corpus.label} is in {args.to}: has it changed, or did another job write there too? "
            "The same command does what is left."
        )
    if not summary["clips"]:
        raise ValueError(f"{corpus.label} has no clip that can be encoded: {summary['errors'] or 'it is empty'}.")
    write_summary(args.to / SUMMARY, summary)
    return summary, together(works)


def process_state(args: argparse.Namespace) -> PartialState:
    """This process among those that work together; it also chooses the device, unless the arguments do."""
    # some may have to wait long for the others' last clips
    state = PartialState(args.device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
    args.device = args.device or str(state.device)
    return state


def describe_job(corpus: Corpus, model: MimiModel, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What makes tokens what they are: the codec, and the data."""
    config, source = model.config, corpus.config
    count = args.num_quantizers or config.num_quantizers
    names = ("sampling_rate", "frame_rate", "frame_size", "codebook_size")
    codec = {
        "model": _public(args.model),
        "num_quantizers": count,
        "dtype": args.dtype,
        **{name: getattr(config, name) for name in names},
        "fingerprint": fingerprints(model)[count - 1],
    }
    data: dict[str, Any] = {"dataset": _public(source.path), "name": source.name, "revision": source.revision}
    data |= {"split": source.split, "audio_column": source.audio_column, "where": source.where}
    data |= {"columns": list(corpus.features)}
    return {"codec": codec, "source": {**data, "shards": corpus.num_shards, "digest": corpus.digest()}}


def _public(name: str) -> str:
    """What is on this machine by its last name, what is on the Hub by its id."""
    return Path(name).resolve().name if Path(name).exists() or Path(name).is_absolute() else name


def layout_for(model: MimiModel, batch_seconds: float | None) -> Layout:
    """How audio is cut for a model where it is."""
    rate = model.config.frame_rate
    return Layout(round((batch_seconds or BATCH_S.get(model.device.type, 10.0)) * rate), round(LONG_S * rate))


def window_frames(config: MimiConfig, layout: Layout) -> int:
    """Frames that make a window full."""
    return max(round(WINDOW_S * config.frame_rate), WINDOW_BATCHES * layout.batch_frames)


# ---- the summary


def summarise(folder: Path) -> dict[str, Any]:
    """What the shards in a folder hold together, as `tokens.json` says it."""
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    found = list(records(folder))
    for record in found:
        counts.update(record["counts"])
        errors.update(record["errors"])
    paths = shard_paths(folder)
    job, features = found[0]["job"], Features.from_arrow_schema(pq.read_schema(paths[0]))
    frames, padded = counts["frames"], counts["padded_frames"]
    return {
        **FORMAT,
        **job,
        "clips": counts["clips"],
        "hours": counts["samples"] / job["codec"]["sampling_rate"] / 3600,
        "frames": frames,
        "shards": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
        "padding": 1 - frames / padded if padded else 0.0,
        "errors": dict(sorted(errors.items())),
        "features": features.to_dict(),
        "libraries": {name: version(name) for name in ("open-mimi", "torch", "transformers", "datasets")},
    }


def describe(summary: Mapping[str, Any], folder: Path) -> str:
    """The summary in two lines for people."""
    codec, errors = summary["codec"], sum(summary["errors"].values())
    rate = summary["bytes"] / max(3600 * summary["hours"], 1e-9)
    lines = [
        f"{summary['clips']} clips, {summary['hours']:.2f} h in {summary['shards']} shards of {folder}/data/: "
        f"{codec['num_quantizers']} codebooks of {codec['model']}, {rate:.0f} bytes per second of audio."
    ]
    if errors:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary["errors"].items())
        lines.append(f"{errors} clips could not be encoded ({reasons}): {folder}/errors/ lists them.")
    return "\n".join(lines)
