"""The data stream of the trainer: batches of speech, shuffled, weighted, shared out to workers, resumable bit for bit.

Every process has `num_workers` workers (or does their work itself), and each of all these parts takes its own share
of every epoch of every source. `B` windows, `L` samples of a window.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from modeling_mimi.feature_extraction_mimi import MimiFeatureExtractor

from .config import DataConfig, SourceConfig
from .sources import DataError, Folder, Share, Stream, Unusable, keyed, level, measure, open_source, read_piece
from .windows import NAMES_KEPT, Reader, Skip, summary

__all__ = ["Batch", "Clip", "DataError", "WindowLoader", "load_clips"]

logger = logging.getLogger("training.data")


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


class Delivery(NamedTuple):
    """A batch, and the state of the worker that made it after it."""

    batch: Batch
    worker: int
    state: dict[str, Any]
    skipped: list[Skip]
    seconds: float


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
                number = keyed(self.seed, "mix", part, drawn).choice(len(weights), p=weights / weights.sum())
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
        self._skipped: dict[str, dict[str, Any]] = {}
        self._context = _worker_context() if config.num_workers else None

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present position on; an earlier iterator of this loader ends."""
        self.close()
        running = self._running = self._start()
        try:
            while self._running is running:
                begin = time.perf_counter()
                delivery = next(running)
                self._wait_s += time.perf_counter() - begin
                if isinstance(delivery, DataError):
                    raise delivery
                self._account(delivery)
                yield delivery.batch
        finally:
            if self._running is running:
                self.close()

    def _start(self) -> Iterator[Delivery | DataError]:
        loader = DataLoader(
            Part(self),
            batch_size=None,
            num_workers=self.config.num_workers,
            prefetch_factor=max(1, self.config.prefetch_batches) if self._context else None,
            multiprocessing_context=self._context,
            worker_init_fn=partial(_begin_worker, os.getpid()),
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # PyTorch's own would move with every start, and the run's draws with it
        )
        return iter(loader)

    def _account(self, delivery: Delivery) -> None:
        """Take note of a batch that is about to be handed out."""
        self._states[delivery.worker] = delivery.state
        self._next_worker = (delivery.worker + 1) % self.workers
        self._windows += len(delivery.batch.mask)
        self._seconds += delivery.seconds
        for reason, name in delivery.skipped:
            found = self._skipped.setdefault(reason, {"count": 0, "names": []})
            found["count"] += 1
            if name not in found["names"] and len(found["names"]) < NAMES_KEPT:
                found["names"].append(name)
                more = "; more of these are only counted" if len(found["names"]) == NAMES_KEPT else ""
                logger.warning("Skipped %s: %s%s.", name, reason, more)

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
            "skipped": deepcopy(self._skipped),
            "epochs": _epochs(self._states, self._first_epochs),
            "wait_s": self._wait_s,
        }

    def close(self) -> None:
        """Stop the workers; iterating again goes on after the last batch handed out."""
        running, self._running = self._running, None
        # PyTorch does this when the iterator is freed, which a traceback that somebody keeps can put off
        getattr(running, "_shutdown_workers", lambda: None)()

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
        paths = ", ".join(source.path for source in sources)
        raise DataError(f"There is no usable clip in {paths}: {summary(skipped) or 'nothing is there'}.")
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


def _worker_context() -> BaseContext:
    """How workers start: forked from a server that has imported this module and done nothing else.

    A fork of this process could hang on locks that its threads or CUDA hold; a spawned worker would import PyTorch
    anew, every time. The server's own imports begin here, while the caller builds its model.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    forkserver.ensure_running()
    return context


def _begin_worker(run: int, _worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the run: it may need its workers while it saves.

    And die with the run, process `run`: after `kill -9` the server that the worker was forked from would live on, and
    the worker with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(run,), daemon=True).start()


def _die_with(run: int, seconds: float = 2.0) -> None:
    server = os.getppid()
    while True:
        time.sleep(seconds)
        try:
            os.kill(run, 0)
        except ProcessLookupError:
            if os.getppid() == server != 1:
                os.kill(server, signal.SIGKILL)
            os._exit(1)


def _unchanged(delivery: Any) -> Any:
    return delivery
