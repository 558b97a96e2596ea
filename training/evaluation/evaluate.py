"""`mimi evaluate` as a function: codecs and clips from words, the walk on every process, the report on the first."""

import argparse
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from training.config import SourceConfig

from .clips import Clip, choose, decode
from .codec_interface import RATE, Codec
from .codecs import parse_codec, reconstruct_each
from .codecs_neural import CodebookCodec, Mimi
from .discriminability import discriminability, read_items
from .parts import Parts
from .pictures import spectrograms_side_by_side
from .report import public, report, table
from .runner import Share, mine, plan, run
from .scoring import Scorer

__all__ = ["evaluate", "table"]

EXAMPLE_S = 6.0


def evaluate(args: argparse.Namespace, where: Mapping[str, list[str]]) -> dict[str, Any] | None:
    """Measure what the arguments of `mimi evaluate` ask for; the results, on the first process.

    Raises:
        ValueError: A codec, a metric or the data set is not there, or the folder holds another evaluation.
        ImportError: A package is missing; it says how to install it.
    """
    disable_progress_bar()
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    share = Share(state.process_index, state.num_processes)
    if args.overwrite and state.is_main_process:
        shutil.rmtree(args.output, ignore_errors=True)
    state.wait_for_everyone()
    codecs = _codecs(args, state)
    scorer = Scorer(args.metrics, args.recogniser, args.text_column)
    source = SourceConfig(
        args.dataset, name=args.name, split=args.split, audio_column=args.audio_column, where=dict(where)
    )
    parts = Parts(args.output, share.rank)
    data = {"path": public(args.dataset), "name": args.name, "split": args.split, "where": dict(where)}
    data |= {"chosen": args.clips, "clip_seconds": args.clip_seconds}
    if state.is_main_process:
        parts.begin(plan(codecs, args.metrics, data=data, recogniser=public(args.recogniser)))
    state.wait_for_everyone()
    parts.mend()
    state.wait_for_everyone()
    done = {row["clip"] for row in parts.rows()}
    state.wait_for_everyone()
    left = mine(choose(source, args.clips), share, done)
    run(codecs, decode(left, RATE, args.clip_seconds), scorer, parts, args.batch_size, state.is_main_process)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    _draw_example(codecs, source, args)
    networks = {codec.network for codec in codecs if isinstance(codec, CodebookCodec)}
    abx = None
    if args.phones is not None:
        mimis = [network for network in networks if isinstance(network, Mimi) and not network.stock]
        abx = discriminability(mimis, choose(source, None), read_items(args.phones), args.clip_seconds)
    return report(codecs, parts, args.output, data, abx)


def _codecs(args: argparse.Namespace, state: PartialState) -> list[Codec]:
    """The codecs in the order of the table, those beside first."""
    device, dtype = str(args.device or state.device), getattr(torch, args.dtype)
    codecs = [
        codec
        for spec in [*args.beside, args.model]
        for codec in parse_codec(spec, num_quantizers=args.num_quantizers, device=device, dtype=dtype)
    ]
    names = [codec.name for codec in codecs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two codecs are called {', '.join(twice)}: rename a directory, or name a codec once.")
    return codecs


def _draw_example(codecs: list[Codec], source: SourceConfig, args: argparse.Namespace) -> None:
    """Spectrograms of the first usable clip from every codec."""
    clips = decode(choose(source, args.clips), RATE, min(args.clip_seconds, EXAMPLE_S))
    clip = next((item for item in clips if isinstance(item, Clip)), None)
    if clip is None:
        raise ValueError(f"There is no usable clip in {args.dataset} ({args.split}).")
    waves = {"original": clip.audio}
    waves |= {codec.name: coded[0].audio for codec, coded in reconstruct_each(codecs, [clip.audio])}
    spectrograms_side_by_side(waves, RATE, clip.name, args.output / "spectrograms.png")
