"""Audio read ahead of the model: one thread plans batches, others decode and resample, and bounded queues hold both.

`C` audio channels, `L` samples at the model's rate.
"""

import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import soxr

from modeling_mimi.configuration_mimi import MimiConfig
from training.sources import MISSING_TAIL_S, Reference, Unusable, measure, opened

from .windows import Batch, Window, batches

RATES = (2_000, 768_000)
"""Sampling rates in Hz that a header may state; what is outside is no audio."""
BLOCK_S = 10
"""Seconds of a file that are decoded at a time."""
BATCHES_AHEAD = 4
"""Decoded batches, or pieces of long clips, that wait for the model."""


@dataclass(frozen=True)
class Layout:
    """How audio is cut for a model on a device, in frames."""

    batch_frames: int
    """Of a batch, padding included."""
    long_frames: int
    """Of a piece of a long clip; a clip that is not longer goes whole."""


class Loaded(NamedTuple):
    """Decoded audio on its way to the model."""

    batch: Batch
    audio: dict[int, np.ndarray]
    """(C, L) of each clip that could be read, or the next piece of a long one."""
    reasons: dict[int, str]
    """Why the others could not."""
    is_last: bool = True
    """Whether nothing of the batch comes after this."""


@dataclass
class Seconds:
    """Where the time of reading went, in seconds of all threads together."""

    rows: float = 0.0
    """Rows read from the source, headers included."""
    decoding: float = 0.0
    """Audio decoded and resampled."""


def read_ahead(
    found: Iterable[Window], config: MimiConfig, layout: Layout, workers: int, seconds: Seconds
) -> Generator[Loaded]:
    """Decode windows in batches, a few ahead of whoever iterates; closing the generator ends the threads.

    Pieces of one long clip come in order; whole batches and pieces of several long clips come as they are ready.

    Args:
        found: What to read; it is iterated in a thread.
        config: What the audio is for.
        layout: How it is cut.
        workers: Threads that decode.
        seconds: Where the time is counted.
    """
    reader = _Reader(config, layout, seconds)
    threads = [threading.Thread(target=reader.plan, args=(found, workers), daemon=True)]
    threads += [threading.Thread(target=reader.decode, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(workers):  # each says once that it has ended
            while (item := reader.loaded.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        if reader.failed is not None:  # what came before it is not lost
            raise reader.failed
    finally:
        reader.stopped.set()
        for thread in threads:
            thread.join()


@dataclass
class _Reader:
    """The threads of `read_ahead` and the queues between them."""

    config: MimiConfig
    layout: Layout
    seconds: Seconds
    planned: "queue.Queue[Batch | None]" = field(default_factory=lambda: queue.Queue(2 * BATCHES_AHEAD))
    loaded: "queue.Queue[Loaded | BaseException | None]" = field(default_factory=lambda: queue.Queue(BATCHES_AHEAD))
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    failed: BaseException | None = None
    """Why there are no more windows."""

    def plan(self, found: Iterable[Window], workers: int) -> None:
        """Group the clips of one window after another."""
        try:
            start = time.perf_counter()
            for window in found:
                self.seconds.rows += time.perf_counter() - start
                planned = batches(window, self.layout.batch_frames, self.layout.long_frames)
                for batch in planned:
                    self._put(self.planned, batch)
                if not planned:  # nothing of it can be encoded
                    self._put(self.loaded, Loaded(Batch(window, []), {}, {}))
                if self.stopped.is_set():
                    return
                start = time.perf_counter()
        except BaseException as error:
            self.failed = error
        for _ in range(workers):
            self._put(self.planned, None)

    def decode(self) -> None:
        """Decode one planned batch after another."""
        try:
            while (batch := self._get(self.planned)) is not None:
                items, start = self._long(batch) if batch.is_long else self._whole(batch), time.perf_counter()
                for item in items:
                    self._count(start)
                    self._put(self.loaded, item)
                    start = time.perf_counter()
        except BaseException as error:
            self._put(self.loaded, error)
        self._put(self.loaded, None)

    def _whole(self, batch: Batch) -> Iterator[Loaded]:
        """All clips of a batch, as one item."""
        audio, reasons = {}, {}
        for index in batch.clips:
            try:
                audio[index] = np.concatenate(list(blocks(batch.window.clips[index], self.config)), axis=1)
            except Unusable as reason:
                reasons[index] = str(reason)
            _release(batch, index)
        yield Loaded(batch, audio, reasons)

    def _long(self, batch: Batch) -> Iterator[Loaded]:
        """A long clip in pieces of whole frames."""
        (index,) = batch.clips
        size = self.layout.long_frames * self.config.frame_size
        waiting = np.zeros((self.config.audio_channels, 0), dtype=np.float32)
        try:
            for block in blocks(batch.window.clips[index], self.config):
                waiting = np.concatenate([waiting, block], axis=1)
                while waiting.shape[1] > size:
                    yield Loaded(batch, {index: waiting[:, :size]}, {}, is_last=False)
                    waiting = waiting[:, size:]
        except Unusable as reason:
            yield Loaded(batch, {}, {index: str(reason)})
        else:
            yield Loaded(batch, {index: waiting}, {})
        _release(batch, index)

    def _count(self, start: float) -> None:
        with self.lock:
            self.seconds.decoding += time.perf_counter() - start

    def _put(self, target: queue.Queue, item: object) -> None:
        """Wait for a place, unless all has ended."""
        while not self.stopped.is_set():
            try:
                return target.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _get(self, source: "queue.Queue[Batch | None]") -> Batch | None:
        while not self.stopped.is_set():
            try:
                return source.get(timeout=0.1)
            except queue.Empty:
                continue
        return None


def _release(batch: Batch, index: int) -> None:
    """Let go of a clip's bytes, which its window would otherwise keep until it is written."""
    batch.window.clips[index] = batch.window.clips[index]._replace(data=None)


def num_frames(config: MimiConfig, clip: Reference) -> int | str:
    """Frames of a clip by its header, or the reason why it cannot be read."""
    try:
        length = measure(clip)
        if not RATES[0] <= length.sampling_rate <= RATES[1]:
            raise Unusable(f"sampling rate of {length.sampling_rate} Hz")
    except Unusable as reason:
        return str(reason)
    return config.num_frames(-(-length.frames * config.sampling_rate // length.sampling_rate))


def blocks(clip: Reference, config: MimiConfig) -> Iterator[np.ndarray]:
    """Decode a clip from beginning to end, resampled as it goes: together equal to the whole, resampled at once.

    Args:
        clip: What to read.
        config: Rate and channels to bring it to.

    Yields:
        (C, L) float32, of any length.

    Raises:
        Unusable: The clip is missing, broken, cut off or has samples that are not finite, or nothing is left of it.
    """
    target, channels = config.sampling_rate, config.audio_channels
    with opened(clip) as file:
        rate, size, read, given, last = file.samplerate, BLOCK_S * file.samplerate, 0, 0, False
        resampler = soxr.ResampleStream(rate, target, channels, dtype="float32")
        while not last:
            block = file.read(size, dtype="float32", always_2d=True)
            read, last = read + len(block), len(block) < size
            if not np.isfinite(block).all():
                raise Unusable("not finite")
            block = _mixed(block, channels)
            if rate != target:
                block = resampler.resample_chunk(block, last=last)
            given += len(block)
            yield np.ascontiguousarray(block.T)
        if read < file.frames - MISSING_TAIL_S * rate:
            raise Unusable("cut off")
        if not given:
            raise Unusable("too short")


def _mixed(block: np.ndarray, channels: int) -> np.ndarray:
    """Samples (L, any channels) as (L, C)."""
    if channels == 1:
        return block.mean(axis=1, keepdims=True)
    if block.shape[1] == 1:
        return block.repeat(channels, axis=1)
    if block.shape[1] != channels:
        raise Unusable(f"{block.shape[1]} channels")
    return block
