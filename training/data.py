"""The data stream of the trainer: fixed-length windows of speech, shuffled, weighted, resumable to the window.

Every process has `num_workers` workers (or one, in itself), and each of all these parts takes its own share of every
epoch. A part keeps one `Reader` per source, whose state says which block of clips it is in and which of the block's
windows comes next; reading that block again restores the rest, since every draw is keyed by what it is for.

`B` windows, `L` samples of a window.
"""

import hashlib
import json
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from modeling_mimi.feature_extraction_mimi import MimiFeatureExtractor

from .config import DataConfig, SourceConfig
from .sources import (
    DataError,
    Folder,
    Reference,
    Share,
    Stream,
    Unusable,
    keyed,
    level,
    measure,
    open_source,
    read_piece,
)

logger = logging.getLogger("training.data")

CLIPS, WINDOWS, PIECES, MIX = range(4)
"""What a random draw is for; part of its key."""

NAMES_KEPT = 5
"""Skipped clips that are named per reason."""


class Batch(NamedTuple):
    """Windows, and where they are audio."""

    audio: Tensor
    """(B, 1, L), float32 in [-1, 1]."""
    mask: Tensor
    """(B, L), bool: True on audio, False on the padding at the end."""


class Clip(NamedTuple):
    """A whole clip, for validation."""

    name: str
    """Path inside its source."""
    audio: Tensor
    """(L,), float32 in [-1, 1]."""


class Skip(NamedTuple):
    """A clip or window that was left out."""

    reason: str
    name: str


class Window(NamedTuple):
    """What a window is cut from: one clip, or several that are joined; `index` counts the windows of the clip."""

    clips: tuple[Reference, ...]
    index: int


class Delivery(NamedTuple):
    """A batch, and the state of the worker that made it after it."""

    batch: Batch
    worker: int
    state: dict[str, Any]
    skipped: list[Skip]
    seconds: float


class Reader:
    """The windows of one share of a source, epoch after epoch without end.

    With fewer clips than parts, the parts that would share a clip take turns: each of them reads every k-th epoch.

    Args:
        source: What to read.
        number: Place of the source among the sources, for the keys of random draws.
        config: Lengths, shuffling, gain and loudness.
        sampling_rate: Rate of the windows in Hz.
        seed: What all draws depend on.
        part: Which part of the parts this is.
        parts: Workers of all processes.
        first_epoch: Epoch to begin with.
    """

    def __init__(
        self,
        source: Folder | Stream,
        number: int,
        config: DataConfig,
        sampling_rate: int,
        seed: int,
        part: int = 0,
        parts: int = 1,
        first_epoch: int = 0,
    ):
        self.source, self.number, self.config, self.seed = source, number, config, seed
        self.part, self.parts, self.first_epoch = part, parts, first_epoch
        self.extractor = MimiFeatureExtractor(sampling_rate=sampling_rate)
        self.samples = round(config.segment_s * sampling_rate)
        self.skipped: list[Skip] = []
        self.rows = len(source.clips) if isinstance(source, Folder) else None
        turn = self._turns()[0]
        self.epoch, self.position, self.index, self.given = first_epoch + turn, None, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last window, as plain values."""
        names = ("first_epoch", "epoch", "position", "index", "given", "rows")
        return {name: deepcopy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the window that the state was taken at."""
        vars(self).update(deepcopy(state))

    def _turns(self) -> tuple[int, int, int]:
        """Epochs to wait before the first one, epochs from one to the next, and shares that an epoch has."""
        shares = min(self.parts, self.rows or self.parts)
        return self.part // shares, len(range(self.part % shares, self.parts, shares)), shares

    def __iter__(self) -> Iterator[np.ndarray]:
        """Windows (L,), shorter where the clip is.

        Raises:
            DataError: Nothing in a whole epoch of the source, whoever's share it is, can be used.
        """
        while True:
            yield from self._windows()
            turn, step, _ = self._turns()
            waited = turn > 0 and self.epoch == self.first_epoch  # found only now that others come first
            if not self.given and not waited:
                self._check_others()
            self.epoch += turn if waited else step
            self.position, self.index, self.given = None, 0, 0

    def _windows(self) -> Iterator[np.ndarray]:
        """The rest of the epoch."""
        shares = self._turns()[2]
        # a share that has nothing usable comes to another part in the next epoch
        index = (self.part % shares + self.epoch - self.first_epoch) % shares
        blocks = self.source.blocks(
            (self.seed, CLIPS, self.number),
            Share(self.epoch, index, shares),
            self.config.shuffle_clips,
            self.position,
        )
        while True:
            try:
                self.position, clips = next(blocks)
            except StopIteration as end:
                self.rows = end.value
                return
            windows = self._plan(clips, index, self.position["block"])
            while self.index < len(windows):
                self.index += 1
                audio = self._read(windows[self.index - 1])
                if audio is not None:
                    self.given += 1
                    yield audio
            self.index = 0

    def _check_others(self) -> None:
        """Raise `DataError` unless another part finds something in the epoch in which this one found nothing."""
        if self.parts > 1:
            whole = Reader(self.source, self.number, self.config, self.extractor.sampling_rate, self.seed)
            whole.epoch = self.epoch
            next(iter(whole))
            return
        reasons = [
            f"{entry['count']} {reason} ({', '.join(entry['names'])})" for reason, entry in _count(self.skipped)
        ]
        if self.source.left_out:
            reasons.append(f"{self.source.left_out} left out by `where`")
        raise DataError(
            f"{self.source.label} gave no usable window in a whole epoch: {'; '.join(reasons) or 'it is empty'}."
        )

    def _plan(self, clips: list[Reference], share: int, block: int) -> list[Window]:
        """The windows of a block of clips, shuffled, with short clips joined if that is asked for."""
        lengths: dict[Window, int] = {}
        for clip in clips:
            try:
                frames, rate = measure(clip)
                if frames < self.config.min_duration_s * rate:
                    raise Unusable("too short")
            except Unusable as reason:
                self.skipped.append(Skip(str(reason), clip.name))
                continue
            length = frames * self.extractor.sampling_rate // rate
            count = max(1, length // self.samples)
            lengths.update((Window((clip,), index), length) for index in range(count))
        windows = list(lengths)
        shuffler = keyed(self.seed, WINDOWS, self.number, self.epoch, share, block)
        windows = [windows[place] for place in shuffler.permutation(len(windows))]
        return windows if self.config.short_clips == "pad" else self._joined(windows, lengths)

    def _joined(self, windows: list[Window], lengths: dict[Window, int]) -> list[Window]:
        """Put short clips together until they fill a window; the last of the block may stay short."""
        joined, waiting, filled = [], [], 0
        for window in windows:
            if lengths[window] >= self.samples:
                joined.append(window)
                continue
            waiting.extend(window.clips)
            filled += lengths[window]
            if filled >= self.samples:
                joined.append(Window(tuple(waiting), 0))
                waiting, filled = [], 0
        return [*joined, Window(tuple(waiting), 0)] if waiting else joined

    def _read(self, window: Window) -> np.ndarray | None:
        """Decode a window; None if nothing of it can be used."""
        pieces: list[np.ndarray] = []
        gain_db = 0.0
        for clip in window.clips:
            draws = keyed(self.seed, PIECES, self.number, clip.key, self.epoch, window.index)
            gain, place = draws.uniform(*self.config.gain_db), draws.random()
            try:
                room = self.samples - sum(map(len, pieces))
                piece = read_piece(clip, room, self.extractor, place)
                if level(piece) < self.config.min_loudness_db:
                    raise Unusable("silent")
            except Unusable as reason:
                self.skipped.append(Skip(str(reason), clip.name))
                continue
            gain_db = gain_db if pieces else gain
            pieces.append(piece)
        if not pieces:
            return None
        audio = np.concatenate(pieces)
        loudest = float(np.abs(audio).max(initial=0.0))
        return np.clip(audio * min(10 ** (gain_db / 20), 1 / max(loudest, 1e-9)), -1, 1)  # clips rounding only


class Part(IterableDataset):
    """What one worker does: batches from its share of every source; picklable."""

    def __init__(self, loader: "WindowLoader"):
        self.sources, self.config, self.seed = loader.sources, loader.config, loader.seed
        self.sampling_rate, self.batch_size = loader.sampling_rate, loader.batch_size
        self.rank, self.world_size, self.workers = loader.rank, loader.world_size, loader.workers
        self.states, self.first_epochs = deepcopy(loader._states), loader._first_epochs
        self.next_worker = loader._next_worker

    def __iter__(self) -> Iterator[Delivery | DataError]:
        """Batches without end; or an error to raise in the process that asked, as a worker's own is hard to read."""
        process = get_worker_info()
        worker = (self.next_worker + (process.id if process else 0)) % self.workers  # round robin goes on as it was
        try:
            yield from self._deliveries(worker)
        except DataError as error:
            yield error

    def _deliveries(self, worker: int) -> Iterator[Delivery]:
        part, parts = self.rank * self.workers + worker, self.world_size * self.workers
        readers = [
            Reader(source, number, self.config, self.sampling_rate, self.seed, part, parts, self.first_epochs[number])
            for number, source in enumerate(self.sources)
        ]
        state = self.states[worker]
        drawn = state["drawn"] if state else 0
        for reader, saved in zip(readers, state["readers"] if state else [], strict=False):
            reader.load_state_dict(saved)
        weights = np.array([source.weight for source in self.config.sources])
        windows = [iter(reader) for reader in readers]
        samples = readers[0].samples
        while True:
            batch = Batch(
                torch.zeros(self.batch_size, 1, samples), torch.zeros(self.batch_size, samples, dtype=torch.bool)
            )
            for audio, mask in zip(*batch, strict=True):
                number = keyed(self.seed, MIX, part, drawn).choice(len(weights), p=weights / weights.sum())
                drawn += 1
                window = next(windows[number])
                audio[0, : len(window)] = torch.from_numpy(window)
                mask[: len(window)] = True
            state = {"drawn": drawn, "readers": [reader.state_dict() for reader in readers]}
            skipped = [skip for reader in readers for skip in reader.skipped]
            for reader in readers:
                reader.skipped = []
            yield Delivery(batch, worker, state, skipped, int(batch.mask.sum()) / self.sampling_rate)


class WindowLoader:
    """Endless batches of windows for one process of a run, resumable bit for bit.

    Args:
        config: Sources and what becomes of them.
        sampling_rate: Rate of the windows in Hz.
        batch_size: Windows per batch of this process.
        seed: What the order and all draws depend on; the same in all processes.
        rank: This process among the `world_size` of the run.
        world_size: Processes that share every epoch.

    Raises:
        DataError: A source is not there, lacks a column or has nothing to train on.
    """

    def __init__(
        self,
        config: DataConfig,
        sampling_rate: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        weights = [source.weight for source in config.sources]
        if not weights or min(weights) < 0 or max(weights) <= 0:
            raise DataError("data.sources: name at least one source with a weight above 0, and none below.")
        self.config, self.sampling_rate, self.batch_size = config, sampling_rate, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.workers = max(1, config.num_workers)
        self.sources = [open_source(source, world_size * self.workers) for source in config.sources]
        self._states: list[dict | None] = [None] * self.workers
        self._first_epochs = [0] * len(self.sources)
        self._next_worker = 0
        self._running: Iterator[Delivery | DataError] | None = None
        self._windows, self._seconds, self._wait_s = 0, 0.0, 0.0
        self._skipped: list[Skip] = []
        self._counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on; an earlier iterator of this loader ends."""
        self.close()
        running = self._running = self._start()
        own = id(running)
        del running  # the loader holds the only reference, so that `close` ends the workers
        try:
            while id(self._running) == own:
                begin = time.perf_counter()
                delivery = next(self._running)
                self._wait_s += time.perf_counter() - begin
                if isinstance(delivery, DataError):
                    raise delivery
                self._account(delivery)
                yield delivery.batch
        finally:
            if id(self._running) == own:
                self.close()

    def _start(self) -> Iterator[Delivery | DataError]:
        options: dict[str, Any] = {}
        if self.config.num_workers:
            # A fork of a process that has threads or CUDA can hang; a fork of a clean server that has imported this
            # module cannot, and starts at once, where a spawned worker would import PyTorch anew.
            clean = "forkserver" in multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if clean else "spawn")
            if clean:
                context.set_forkserver_preload([__name__])
            options = {"multiprocessing_context": context, "prefetch_factor": max(1, self.config.prefetch_batches)}
        loader = DataLoader(
            Part(self),
            batch_size=None,
            num_workers=self.config.num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # PyTorch's own would move with every start, and the run's draws with it
            **options,
        )
        return iter(loader)

    def _account(self, delivery: Delivery) -> None:
        """Take note of a batch that is about to be handed out."""
        self._states[delivery.worker] = delivery.state
        self._next_worker = (delivery.worker + 1) % self.workers
        self._windows += len(delivery.batch.mask)
        self._seconds += delivery.seconds
        for skip in delivery.skipped:
            self._counts[skip.reason] += 1
            if self._counts[skip.reason] <= NAMES_KEPT:
                self._skipped.append(skip)
                more = "; more of these are only counted" if self._counts[skip.reason] == NAMES_KEPT else ""
                logger.warning("Skipped %s: %s%s.", skip.name, skip.reason, more)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch handed out: small, plain values."""
        return deepcopy(
            {
                "layout": self._layout(),
                "first_epochs": self._first_epochs,
                "next_worker": self._next_worker,
                "workers": self._states,
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that the state was taken at; call it before iterating.

        Where the data or the number of processes or workers changed, every source goes on with an epoch that it has
        not begun yet, and the log says so.
        """
        self.close()
        state, layout = deepcopy(state), self._layout()
        changed = [name for name in layout if state["layout"].get(name) != layout[name]]
        if not changed:
            self._first_epochs, self._next_worker = state["first_epochs"], state["next_worker"]
            self._states = state["workers"]
            return
        seen = dict(zip(state["layout"]["sources"], _epochs(state["workers"], state["first_epochs"]), strict=True))
        self._first_epochs = [seen[source] + 1 if source in seen else 0 for source in layout["sources"]]
        self._states, self._next_worker = [None] * self.workers, 0
        logger.warning(
            "The data position was saved with another %s: the order of windows changes, and every source begins its "
            "next epoch (%s), without the rest of the one that it was in.",
            ", ".join(changed),
            ", ".join(map(str, self._first_epochs)),
        )

    def report(self) -> dict[str, Any]:
        """Counts since the start of this process.

        Returns:
            `windows` and `seconds` of audio handed out; `skipped`: for each reason the `count` and the first `names`;
            `epochs`: the newest epoch of each source; `wait_s`: seconds that the caller waited for batches.
        """
        return {
            "windows": self._windows,
            "seconds": self._seconds,
            "skipped": {
                reason: {"count": self._counts[reason], "names": entry["names"]}
                for reason, entry in _count(self._skipped)
            },
            "epochs": _epochs(self._states, self._first_epochs),
            "wait_s": self._wait_s,
        }

    def close(self) -> None:
        """Stop the workers; iterating again goes on after the last batch handed out."""
        self._running = None  # PyTorch ends them with the iterator

    def _layout(self) -> dict[str, Any]:
        """What a position has a meaning for: with any of it changed, the same position is another one."""
        config = self.config
        names = ("segment_s", "min_duration_s", "short_clips", "shuffle_clips")
        return {
            "world_size": self.world_size,
            "rank": self.rank,
            "num_workers": self.workers,
            "seed": self.seed,
            "sampling_rate": self.sampling_rate,
            **{name: getattr(config, name) for name in names},
            "sources": [
                _fingerprint(number, source, opened.digest)
                for number, (source, opened) in enumerate(zip(config.sources, self.sources, strict=True))
            ],
        }


def load_clips(sources: Sequence[SourceConfig], sampling_rate: int, count: int, max_s: float) -> list[Clip]:
    """The first usable clips of the sources, as many of each as its weight says; always the same.

    A folder's clips are taken in a fixed shuffled order, since files of one speaker tend to lie together.

    Args:
        sources: Where to look.
        sampling_rate: Rate of the clips in Hz.
        count: Clips in all; fewer if the sources do not have them.
        max_s: Longer clips are cut to this.

    Raises:
        DataError: A source cannot be opened, or none has a usable clip.
    """
    skipped: list[Skip] = []
    found = [_usable(open_source(source), sampling_rate, max_s, skipped) for source in sources]
    taken = [0.0] * len(sources)  # clips over weight: the source that is furthest behind is next
    open_numbers = [number for number, source in enumerate(sources) if source.weight > 0]
    clips: list[Clip] = []
    while len(clips) < count and open_numbers:
        number = min(open_numbers, key=lambda number: (taken[number], number))
        clip = next(found[number], None)
        if clip is None:
            open_numbers.remove(number)
            continue
        taken[number] += 1 / sources[number].weight
        clips.append(clip)
    if not clips:
        reasons = [f"{entry['count']} {reason} ({', '.join(entry['names'])})" for reason, entry in _count(skipped)]
        raise DataError(f"No usable clip in {', '.join(s.path for s in sources)}: {'; '.join(reasons) or 'empty'}.")
    return clips


def _usable(source: Folder | Stream, sampling_rate: int, max_s: float, skipped: list[Skip]) -> Iterator[Clip]:
    defaults = DataConfig()
    extractor = MimiFeatureExtractor(sampling_rate=sampling_rate)
    for _, block in source.blocks((0,), Share(0, 0, 1), 1):
        for clip in block:
            try:
                frames, rate = measure(clip)
                if frames < defaults.min_duration_s * rate:
                    raise Unusable("too short")
                audio = read_piece(clip, round(max_s * sampling_rate), extractor)
                if level(audio) < defaults.min_loudness_db:
                    raise Unusable("silent")
                yield Clip(clip.name, torch.from_numpy(audio))
            except Unusable as reason:
                skipped.append(Skip(str(reason), clip.name))
                logger.warning("Skipped %s: %s.", clip.name, reason)


def _count(skipped: list[Skip]) -> list[tuple[str, dict[str, Any]]]:
    """How many were skipped for each reason, and the first names."""
    names: dict[str, list[str]] = {}
    for reason, name in skipped:
        names.setdefault(reason, []).append(name)
    return [(reason, {"count": len(all_), "names": all_[:NAMES_KEPT]}) for reason, all_ in names.items()]


def _epochs(states: list[dict | None], first_epochs: list[int]) -> list[int]:
    """The newest epoch of each source over the workers."""
    return [
        max([first, *(state["readers"][number]["epoch"] for state in states if state)])
        for number, first in enumerate(first_epochs)
    ]


def _fingerprint(number: int, source: SourceConfig, digest: str) -> str:
    """What makes a source's clips and their order: all but its weight; and its place, which keys the draws."""
    fields = {name: value for name, value in vars(source).items() if name != "weight"}
    text = json.dumps([number, fields, digest], sort_keys=True)
    return f"{source.path} {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _unchanged(delivery: Any) -> Any:
    return delivery
