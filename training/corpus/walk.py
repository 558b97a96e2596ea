"""The walk over a corpus: reading, the model and writing, all three at a time, each window written when it is done."""

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

from tqdm import tqdm

from modeling_mimi import MimiConfig

from .encoding import Encoded, Encoder
from .reading import Layout, Seconds, read_ahead
from .shards import Shards
from .windows import Window

WINDOWS_TO_WRITE = 2
"""Windows that may wait for the disk."""
BAR = "{desc}: {n:.0f} s of audio [{elapsed}, {postfix}]"


@dataclass
class Work:
    """What processes did, and where their time went."""

    wall_s: float = 0.0
    audio_s: float = 0.0
    clips: int = 0
    errors: int = 0
    frames: int = 0
    padded_frames: int = 0
    rows_s: float = 0.0
    """Reading rows and the headers of their clips; of a thread of its own."""
    decoding_s: float = 0.0
    """Decoding and resampling, of all threads together."""
    model_s: float = 0.0
    """The device computing."""
    writing_s: float = 0.0
    """Writing shards; of a thread of its own."""

    def __str__(self) -> str:
        """One line for people."""
        wall = max(self.wall_s, 1e-9)
        padding = 1 - self.frames / self.padded_frames if self.padded_frames else 0.0
        shares = [("model", self.model_s), ("rows", self.rows_s), ("decoding", self.decoding_s)]
        shares.append(("writing", self.writing_s))
        times = ", ".join(f"{name} {100 * seconds / wall:.0f} %" for name, seconds in shares)
        line = f"{self.audio_s / 3600:.2f} h, {self.audio_s / wall:.1f} x real time, padding {100 * padding:.1f} %"
        return f"{line}, {self.errors} errors; busy: {times}"


def run(
    found: Iterable[Window],
    encoder: Encoder,
    shards: Shards,
    config: MimiConfig,
    layout: Layout,
    workers: int,
    progress: bool = True,
) -> Work:
    """Read, encode and write windows; memory holds a few of them.

    Whatever ends it, the windows that are done are kept.

    Args:
        found: What to encode.
        encoder: What encodes.
        shards: Where codes go.
        config: What the audio is for.
        layout: How it is cut.
        workers: Threads that decode.
        progress: Show a bar.
    """
    seconds, start = Seconds(), time.perf_counter()
    with (
        _stops_in_order(),
        _writing(shards) as write,
        contextlib.closing(read_ahead(found, config, layout, workers, seconds)) as reading,
        tqdm(desc="tokenize", bar_format=BAR, disable=None if progress else True) as bar,
    ):
        settled = _Settled(config.sampling_rate, write)
        work = settled.work
        for loaded in reading:
            settled.add(encoder.step(loaded))
            work.wall_s, work.model_s = time.perf_counter() - start, encoder.busy_s
            work.rows_s, work.decoding_s, work.writing_s = seconds.rows, seconds.decoding, shards.seconds
            bar.set_postfix_str(str(work).split(", ", 1)[1], refresh=False)
            bar.update(work.audio_s - bar.n)
        settled.add(encoder.finish())
    work.wall_s, work.model_s, work.writing_s = time.perf_counter() - start, encoder.busy_s, shards.seconds
    return work


@dataclass
class _Settled:
    """Takes results and hands on the windows that are done, in the order of the source."""

    sampling_rate: int
    write: Callable[[Window], None]
    work: Work = field(default_factory=Work)
    done: dict[int, Window] = field(default_factory=dict)
    """Windows that wait for one before them, by their numbers."""
    next_number: int = 0

    def add(self, results: Iterable[Encoded]) -> None:
        for encoded in results:
            window, work = encoded.batch.window, self.work
            window.codes |= encoded.codes
            window.num_samples |= encoded.num_samples
            window.reasons |= encoded.reasons
            window.padded_frames += encoded.padded_frames
            work.clips += len(encoded.codes)
            work.frames += sum(codes.shape[1] for codes in encoded.codes.values())
            work.padded_frames += encoded.padded_frames
            work.audio_s += sum(encoded.num_samples.values()) / self.sampling_rate
            if window.is_done:
                self.done[window.number] = window
        while window := self.done.pop(self.next_number, None):
            self.work.errors += len(window.reasons)
            self.write(window)
            self.next_number += 1


@contextlib.contextmanager
def _writing(shards: Shards) -> Generator[Callable[[Window], None]]:
    """Lend a function that hands windows to a thread which writes them; at the end all are on disk."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1) as pool:

        def write(window: Window) -> None:
            waiting.append(pool.submit(shards.add, window))
            while len(waiting) > WINDOWS_TO_WRITE:
                waiting.popleft().result()

        try:
            yield write
        finally:
            for future in waiting:
                future.result()
            shards.close()


@contextlib.contextmanager
def _stops_in_order() -> Generator[None]:
    """While inside, SIGTERM, which schedulers send, does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def together(works: Iterable[Mapping[str, Any]]) -> Work:
    """What several processes did at the same time: sums, and the mean share of each one's time."""
    works = list(works)
    total = Work(**{field.name: sum(work[field.name] for work in works) for field in fields(Work)})
    total.wall_s = max(work["wall_s"] for work in works)
    for name in ("rows_s", "decoding_s", "model_s", "writing_s"):
        setattr(total, name, getattr(total, name) / len(works))
    return total
