"""The walk over a data set: every codec on the same clips, every clip scored once, whatever interrupts it."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from .clips import Clip, Skip
from .codec_interface import RATE, Codec, Coded
from .codecs import reconstruct_each
from .codecs_neural import CodebookCodec
from .parts import Parts
from .scoring import Scorer


@dataclass(frozen=True)
class Share:
    """This process among those that evaluate together."""

    rank: int = 0
    world_size: int = 1


def family(codec: Codec) -> str:
    """What the codecs that differ in nothing but their bitrate have in common."""
    return codec.network.name if isinstance(codec, CodebookCodec) else codec.name.split()[0]


def run(
    codecs: Sequence[Codec],
    clips: Iterable[Clip | Skip],
    scorer: Scorer,
    parts: Parts,
    batch_size: int = 8,
    progress: bool = True,
) -> None:
    """Measure the clips and append a row for each to `parts`; memory holds one batch.

    Args:
        codecs: What to compare.
        clips: This process's clips, without those that `parts` has already.
        scorer: What to measure.
        parts: Where rows go.
        batch_size: Clips that are encoded together.
        progress: Show a bar.
    """
    clips = iter(clips)
    with tqdm(desc="evaluate", unit="clip", disable=not progress) as bar:
        start, seconds = time.perf_counter(), 0.0
        while batch := list(islice(clips, batch_size)):
            for skip in (item for item in batch if isinstance(item, Skip)):
                parts.append({"clip": skip.name, "skipped": skip.reason})
            usable = [item for item in batch if isinstance(item, Clip)]
            for row in _measure(codecs, usable, scorer):
                parts.append(row)
                seconds += row["seconds"]
            bar.set_postfix({"x real time": f"{seconds / (time.perf_counter() - start):.2f}"}, refresh=False)
            bar.update(len(batch))


def mine(rows: Iterable[Any], share: Share, done: set[str]) -> Iterator[Any]:
    """Every so many-th row, without the clips that are done; so processes, however many, share what is left."""
    left = (row for row in rows if row[0].name not in done)
    return islice(left, share.rank, None, share.world_size)


def _measure(codecs: Sequence[Codec], clips: list[Clip], scorer: Scorer) -> list[dict[str, Any]]:
    """Rows of a batch."""
    rows: list[dict[str, Any]] = [
        {"clip": clip.name, "seconds": len(clip.audio) / RATE, "digest": clip.digest, "codecs": {}, "codes": {}}
        for clip in clips
    ]
    if not clips:
        return rows
    for codec, coded in reconstruct_each(codecs, [clip.audio for clip in clips]):
        scores = scorer(clips, [item.audio for item in coded])
        for row, item, values in zip(rows, coded, scores, strict=True):
            row["codecs"][codec.name] = {"bits": item.bits, "scores": values}
            _keep_codes(row["codes"], family(codec), item)
    return rows


def _keep_codes(kept: dict[str, list[list[int]]], name: str, coded: Coded) -> None:
    """Keep the codes of a family's codec with the most codebooks, which hold those of the others."""
    if coded.codes is not None and len(coded.codes) > len(kept.get(name, ())):
        kept[name] = np.asarray(coded.codes).tolist()


def plan(codecs: Sequence[Codec], metrics: Sequence[str], **settings: Any) -> dict[str, Any]:
    """What makes two evaluations the same, in JSON's types."""
    named = {"codecs": [codec.name for codec in codecs], "metrics": sorted(metrics)}
    return json.loads(json.dumps({**named, **settings}))
