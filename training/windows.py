"""From clips to windows: one reader's share of one source, cut, shuffled and decoded, resumable after any window.

A reader's state says which block of clips it is in and which of the block's windows comes next. Reading that block
again restores the rest, since every draw is keyed by what it is for: the same clip in the same epoch gives the same
windows, whoever reads it and when. `L` samples of a window.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np

from modeling_mimi.feature_extraction_mimi import MimiFeatureExtractor

from .config import DataConfig
from .sources import DataError, Folder, Reference, Share, Stream, Unusable, keyed, level, measure, read_piece

CLIPS, WINDOWS, PIECES = range(3)
"""What a random draw is for; part of its key."""

NAMES_KEPT = 5
"""Skipped clips that are named per reason."""


class Skip(NamedTuple):
    """A clip or window that was left out."""

    reason: str
    name: str


class Window(NamedTuple):
    """What a window is cut from: one clip, or several that are joined; `index` counts the windows of the clip."""

    clips: tuple[Reference, ...]
    index: int


class Reader:
    """The windows of one share of a source, epoch after epoch without end.

    The part takes another share in every epoch, so clips that are few or mostly broken come to every part: one that
    has nothing in an epoch goes on to the next.

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
        self.epoch, self.position, self.index, self.given = first_epoch, None, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last window, as plain values."""
        names = ("first_epoch", "epoch", "position", "index", "given")
        return {name: deepcopy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the window that the state was taken at."""
        vars(self).update(deepcopy(state))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Windows (L,), shorter where the clip is.

        Raises:
            DataError: Nothing in a whole epoch of the source, whoever's share it is, can be used.
        """
        while True:
            yield from self._windows()
            if not self.given:
                self._check_others()
            self.epoch += 1
            self.position, self.index, self.given = None, 0, 0

    def _windows(self) -> Iterator[np.ndarray]:
        """The rest of the epoch."""
        index = (self.part + self.epoch - self.first_epoch) % self.parts
        share = Share(self.epoch, index, self.parts)
        key = (self.seed, CLIPS, self.number)
        for position, clips in self.source.blocks(key, share, self.config.shuffle_clips, self.position):
            self.position = position
            windows = self._plan(clips, index, position["block"])
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
        left_out = f"{self.source.left_out} left out by `where`" if self.source.left_out else ""
        reasons = "; ".join(filter(None, [summary(self.skipped), left_out]))
        raise DataError(f"{self.source.label} gave no usable window in a whole epoch: {reasons or 'it is empty'}.")

    def _plan(self, clips: list[Reference], share: int, block: int) -> list[Window]:
        """The windows of a block of clips, shuffled, with short clips joined if that is asked for."""
        windows: list[tuple[Window, int]] = []  # and the length of its clip
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
            windows.extend((Window((clip,), index), length) for index in range(count))
        shuffler = keyed(self.seed, WINDOWS, self.number, self.epoch, share, block)
        windows = [windows[place] for place in shuffler.permutation(len(windows))]
        return self._joined(windows) if self.config.short_clips == "join" else [window for window, _ in windows]

    def _joined(self, windows: list[tuple[Window, int]]) -> list[Window]:
        """Put short clips together until they fill a window; the last of the block may stay short."""
        joined, waiting, filled = [], [], 0
        for window, length in windows:
            if length >= self.samples:
                joined.append(window)
                continue
            waiting.extend(window.clips)
            filled += length
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


def summary(skipped: list[Skip]) -> str:
    """How many were skipped for each reason, with the first names."""
    names: dict[str, list[str]] = {}
    for reason, name in skipped:
        names.setdefault(reason, []).append(name)
    return "; ".join(
        f"{len(found)} {reason} ({', '.join(found[:NAMES_KEPT])}{', ...' if len(found) > NAMES_KEPT else ''})"
        for reason, found in names.items()
    )
