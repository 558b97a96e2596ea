"""The model's side: batches and pieces of long clips to codes, the device kept busy while results come back.

`B` clips, `C` audio channels, `L` samples, `K` codebooks, `T` frames.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling_mimi import MimiModel

from .reading import Loaded
from .windows import Batch


def chunk_frames(model: MimiModel) -> int:
    """Frames that a long clip goes through the model at a time: what `MimiModel` takes, so that codes are equal."""
    return 125 if model.device.type == "cpu" else 1500


class Encoded(NamedTuple):
    """What became of some clips of a window, by their indices there."""

    batch: Batch
    codes: dict[int, np.ndarray]
    """(K, T) of each clip."""
    num_samples: dict[int, int]
    """Their lengths at the model's rate."""
    reasons: dict[int, str]
    """Why the others have no codes."""
    padded_frames: int
    """What the model encoded for them, padding included."""


class _InFlight(NamedTuple):
    """A step that a GPU may still be at."""

    loaded: Loaded
    """Without its audio."""
    codes: Tensor | None
    """(B, K, T), which arrive on the host."""
    num_samples: dict[int, int]
    began: Any
    ended: Any
    """Times, or events of the device."""


@dataclass
class _Long:
    """A long clip, as far as it has come."""

    state: Any
    codes: list[np.ndarray] = field(default_factory=list)
    num_samples: int = 0


class Encoder:
    """Audio to codes, in the order in which it comes.

    On a GPU, the next batch is handed over before the last one's codes are waited for.

    Args:
        model: What encodes.
        num_quantizers: Codebooks to use.
    """

    def __init__(self, model: MimiModel, num_quantizers: int):
        self.busy_s = 0.0
        """Seconds that the device computed."""
        self._model = model
        self._frame_size = model.config.frame_size
        self._num_quantizers = num_quantizers
        self._on_gpu = model.device.type == "cuda"
        self._chunk_frames = chunk_frames(model)
        with torch.inference_mode():
            self._tables = model.quantizer.search_tables(num_quantizers)
        self._in_flight: deque[_InFlight] = deque()
        self._long: dict[int, _Long] = {}

    @torch.inference_mode()
    def step(self, loaded: Loaded) -> list[Encoded]:
        """Take what was loaded and give what is done by now: often an earlier batch."""
        began, codes = self._time(), None
        if loaded.audio and loaded.batch.is_long:
            codes = self._encode_piece(loaded)
        elif loaded.audio:
            codes = self._encode_whole(list(loaded.audio.values()))
        num_samples = {index: audio.shape[-1] for index, audio in loaded.audio.items()}
        codes = None if codes is None else self._to_host(codes)
        self._in_flight.append(_InFlight(loaded._replace(audio={}), codes, num_samples, began, self._time()))
        return list(self._arrived(waiting=1 if self._on_gpu else 0))

    def finish(self) -> list[Encoded]:
        """Wait for what is not done yet."""
        return list(self._arrived(waiting=0))

    def _encode_whole(self, waves: list[np.ndarray]) -> Tensor:
        """Clips (C, L) as one batch; zeros behind the shorter ones need no mask, for the model never looks ahead."""
        length = max(wave.shape[-1] for wave in waves)
        audio = torch.zeros(len(waves), len(waves[0]), length, pin_memory=self._on_gpu)
        for row, wave in zip(audio, waves, strict=True):
            row[:, : wave.shape[-1]] = torch.from_numpy(wave)
        audio = audio.to(self._model.device, non_blocking=True)
        return self._model.encode(audio, num_quantizers=self._num_quantizers).audio_codes

    def _encode_piece(self, loaded: Loaded) -> Tensor:
        """The next piece of a long clip, of whole frames or its last."""
        (wave,) = loaded.audio.values()
        key = id(loaded.batch.clips)
        if key not in self._long:
            self._long[key] = _Long(self._model.new_encoder_state(1, self._chunk_frames))
        audio = torch.from_numpy(wave)[None].to(self._model.device)
        audio = torch.nn.functional.pad(audio, (0, -audio.shape[-1] % self._frame_size))
        parts = audio.split(self._chunk_frames * self._frame_size, dim=-1)
        state = self._long[key].state
        return torch.cat([self._model.encode_frames(part, state, self._tables) for part in parts], dim=-1)

    def _arrived(self, waiting: int) -> Iterator[Encoded]:
        """What has come back, but for the last `waiting` steps."""
        while len(self._in_flight) > waiting:
            step = self._in_flight.popleft()
            self._wait(step)
            batch, codes = step.loaded.batch, None if step.codes is None else step.codes.numpy()
            if batch.is_long:
                yield from self._join(step, codes)
                continue
            found, padded = {}, 0
            if codes is not None:
                padded = codes.shape[0] * codes.shape[2]
                for row, (index, samples) in zip(codes, step.num_samples.items(), strict=True):
                    found[index] = row[:, : -(-samples // self._frame_size)]
            yield Encoded(batch, found, step.num_samples, step.loaded.reasons, padded)

    def _join(self, step: _InFlight, codes: np.ndarray | None) -> Iterator[Encoded]:
        """Keep a piece of a long clip; with the last one, give them all."""
        loaded, key = step.loaded, id(step.loaded.batch.clips)
        (index,) = loaded.batch.clips
        if codes is not None:
            self._long[key].codes.append(codes[0])
            self._long[key].num_samples += step.num_samples[index]
        if loaded.is_last:
            clip = self._long.pop(key, None)
            if loaded.reasons or clip is None:
                yield Encoded(loaded.batch, {}, {}, loaded.reasons, 0)
            else:
                whole = np.concatenate(clip.codes, axis=1)
                yield Encoded(loaded.batch, {index: whole}, {index: clip.num_samples}, {}, whole.shape[1])

    # ---- the device

    def _time(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _to_host(self, codes: Tensor) -> Tensor:
        codes = codes.to(torch.int32)
        if not self._on_gpu:
            return codes.cpu()
        return torch.empty(codes.shape, dtype=codes.dtype, pin_memory=True).copy_(codes, non_blocking=True)

    def _wait(self, step: _InFlight) -> None:
        if self._on_gpu:
            step.ended.synchronize()
            self.busy_s += step.began.elapsed_time(step.ended) / 1000
        else:
            self.busy_s += step.ended - step.began
