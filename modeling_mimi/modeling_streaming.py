# Copyright 2026 The open Mimi contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Live streams: audio in pieces of any size to codes and back, equal to the whole, over a state of fixed size.

`B` streams, `C` audio channels, `L` samples, `T` frames, `K` codebooks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .modeling_state import StreamingState

ABSENT = -1
"""Code of a frame that a stream of the batch does not have."""


class MimiStream:
    r"""
    `batch_size` live streams, encoding and decoding; made by [`MimiModel.stream`].

    Each input may have any length, none included. The streams of a batch are fed together, and each may begin anew at
    any time: where one has no complete frame while others do, its codes are -1, and a frame of -1 decodes to silence
    and leaves its stream as it was.

    ```python
    >>> stream = model.stream()
    >>> for chunk in microphone:  # (1, 1, any number of samples)
    ...     codes = stream.encode(chunk)  # (1, K, frames now complete)
    ...     play(stream.decode(codes))  # (1, 1, frames * 1920)
    >>> last = stream.flush()  # the frame that was not yet complete
    ```
    """

    def __init__(self, model: Any, batch_size: int, num_quantizers: int | None, max_frames: int):
        if batch_size < 1 or max_frames < 1:
            raise ValueError(f"`batch_size` and `max_frames` must be at least 1, got {batch_size} and {max_frames}.")
        self.model = model  # a `MimiModel`, whose file imports this one
        self.config = model.config
        self.batch_size = batch_size
        self.max_frames = max_frames
        with torch.no_grad():
            self.num_quantizers = model.quantizer.check_num_quantizers(num_quantizers)
            self._encoder_state: StreamingState | Any = None  # stays None without that half: see `model._need`
            self._decoder_state: StreamingState | Any = None
            if model.config.encoder_config is not None:
                self._tables = model.quantizer.search_tables(num_quantizers)
                self._encoder_state = model.new_encoder_state(batch_size, max_frames)
            if model.config.decoder_config is not None:
                self._decoder_state = model.new_decoder_state(batch_size, max_frames)
        # samples of the frame that is not yet complete, and how many they are, per stream
        self._pending = torch.zeros(
            batch_size, self.config.audio_channels, self.config.frame_size, device=model.device
        )
        self._pending_samples = [0] * batch_size
        self._ended = [False] * batch_size

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        r"""
        Take the next samples and give the codes of the frames now complete.

        Args:
            audio (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
                Waveform in [-1, 1], any number of samples. The channel axis may be left out for mono, and the batch
                axis for one stream.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`, `num_frames` possibly 0.

        Raises:
            ValueError: the shape does not fit, all streams have ended, or the model has no encoder.
        """
        self.model._need("encoder")
        audio = self._with_all_axes(audio)
        if all(self._ended):
            raise ValueError("The stream has ended with `flush()`: begin anew with `reset()`.")
        frame_size = self.config.frame_size
        going = [row for row in range(self.batch_size) if not self._ended[row]]
        if len({self._pending_samples[row] for row in going}) == 1:
            pending = self._pending_samples[going[0]]
            audio = torch.cat([self._pending[..., :pending], audio], dim=-1)
            samples = [audio.shape[-1]] * self.batch_size
        else:
            audio, samples = self._after_pending(audio)
        complete = [0 if self._ended[row] else samples[row] // frame_size for row in range(self.batch_size)]
        codes = self._encode_complete(audio, complete)
        for row in going:
            rest = samples[row] - complete[row] * frame_size
            if rest:
                self._pending[row, :, :rest] = audio[row, :, complete[row] * frame_size : samples[row]]
            self._pending_samples[row] = rest
        return codes

    @torch.no_grad()
    def flush(self, rows: list[int] | None = None) -> Tensor:
        r"""
        End the input of the given streams (of all if not given), as the whole encode would: the frame that is not yet
        complete is filled up with zeros. An ended stream takes no more audio until it is reset.

        Returns:
            `torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`, `num_frames` 0 or 1.
        """
        self.model._need("encoder")
        rows = [row for row in self._rows(rows) if not self._ended[row]]
        waiting = [row for row in rows if self._pending_samples[row]]
        for row in waiting:
            self._pending[row, :, self._pending_samples[row] :] = 0
        codes = self._encode_complete(self._pending, [int(row in waiting) for row in range(self.batch_size)])
        for row in rows:
            self._ended[row] = True
            self._pending_samples[row] = 0
        return codes

    @torch.no_grad()
    def decode(self, audio_codes: Tensor) -> Tensor:
        r"""
        Take the next frames and give their audio.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`):
                Codes of any number of frames. The batch axis may be left out for one stream. A frame whose semantic
                code is -1 is absent.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, audio_channels, num_frames * frame_size)`; 0 where frames are
            absent.

        Raises:
            ValueError: a shape or a code does not fit, or the model has no decoder.
        """
        self.model._need("decoder")
        if audio_codes.dim() == 2 and self.batch_size == 1:
            audio_codes = audio_codes[None]
        present = audio_codes[:, 0] != ABSENT if audio_codes.dim() == 3 else None
        if present is not None:
            audio_codes = audio_codes.where(present[:, None], 0).long()
        self.model._check_codes(audio_codes)
        self._check_batch(audio_codes)
        steps = self.max_frames
        if audio_codes.device.type == "cpu" or audio_codes.shape[-1] > 1:  # a single frame never waits for the device
            if present is None or present.all():
                present = None
            else:
                steps = 1
        audio = [self._pending.new_zeros(self.batch_size, self.config.audio_channels, 0, dtype=self.model._dtype)]
        for start in range(0, audio_codes.shape[-1], steps):
            self._decoder_state.active = None if present is None else present[:, start]
            audio.append(self.model.decode_frames(audio_codes[..., start : start + steps], self._decoder_state))
            if present is not None:
                audio[-1] = audio[-1].where(present[:, start, None, None], 0)
        return torch.cat(audio, dim=-1)

    def reset(self, rows: list[int] | None = None) -> None:
        """Begin the given streams anew (all if not given), encoder and decoder; the others go on."""
        own = self._rows(rows)
        for state in (self._encoder_state, self._decoder_state):
            if state is not None:
                state.reset(rows if rows is None else own)
        for row in own:
            self._pending_samples[row] = 0
            self._ended[row] = False

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the streams remember, as copies: `load_state_dict` of a like stream goes on from here."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on from what [`state_dict`] gave. `ValueError` if it is of another kind of stream."""
        own = self._tensors()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state_dict.items()}:
            raise ValueError(
                "This state belongs to another model, `batch_size` or `max_frames`: "
                "make the stream as it was made then."
            )
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        self._pending_samples = state_dict["pending_samples"].tolist()
        self._ended = state_dict["ended"].bool().tolist()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "pending": self._pending,
            "pending_samples": torch.tensor(self._pending_samples),
            "ended": torch.tensor(self._ended),
        }
        for half, state in (("encoder", self._encoder_state), ("decoder", self._decoder_state)):
            if state is not None:
                tensors |= {f"{half}:{name}": tensor for name, tensor in state.tensors.items()}
        return tensors

    def _encode_complete(self, audio: Tensor, complete: list[int]) -> Tensor:
        """Encode the first `complete[row]` frames of each row: all rows together, then the rows that have one more."""
        frame_size = self.config.frame_size
        codes = [torch.empty(self.batch_size, self.num_quantizers, 0, dtype=torch.int64, device=audio.device)]
        start = 0
        for end in sorted({frames for frames in complete if frames}):
            rows = None  # everyone: the usual case, in which nothing is sent to the device
            if min(complete) < end:
                rows = torch.tensor([frames >= end for frames in complete], device=audio.device)
            self._encoder_state.active = rows
            for first in range(start, end, self.max_frames):
                part = audio[..., first * frame_size : min(first + self.max_frames, end) * frame_size]
                part = self.model.encode_frames(part, self._encoder_state, self._tables)
                codes.append(part if rows is None else part.where(rows[:, None, None], ABSENT))
            start = end
        return torch.cat(codes, dim=-1)

    def _after_pending(self, audio: Tensor) -> tuple[Tensor, list[int]]:
        """Each row's samples behind those that it still had, from the left edge, and how many they are now."""
        samples = [pending + audio.shape[-1] for pending in self._pending_samples]
        joined = audio.new_zeros(*audio.shape[:-1], max(samples))
        for row, pending in enumerate(self._pending_samples):
            joined[row, :, :pending] = self._pending[row, :, :pending]
            joined[row, :, pending : samples[row]] = audio[row]
        return joined, samples

    def _with_all_axes(self, audio: Tensor) -> Tensor:
        if audio.dim() == 1 and self.batch_size == 1:
            audio = audio[None]
        # CODEPATH: kyutai/mimi is mono; with more channels their axis cannot be left out
        if audio.dim() == 2 and self.config.audio_channels == 1:
            audio = audio[:, None]
        self.model._check_audio(audio, None)
        self._check_batch(audio)
        return audio.to(self._pending)

    def _check_batch(self, tensor: Tensor) -> None:
        if tensor.shape[0] != self.batch_size:
            raise ValueError(f"This stream has `batch_size={self.batch_size}`, got {tensor.shape[0]} rows.")

    def _rows(self, rows: list[int] | None) -> list[int]:
        rows = list(range(self.batch_size) if rows is None else rows)
        if not all(0 <= row < self.batch_size for row in rows):
            raise ValueError(f"`rows` must be from 0 to {self.batch_size - 1}, got {rows}.")
        return rows


class MimiEncoderStep(nn.Module):
    """
    One streaming step of the encoder with its state as plain tensors in and out, for `torch.export`. It holds the
    codebooks as they are now.
    """

    def __init__(self, model: Any, num_quantizers: int | None = None):
        super().__init__()
        self.model = model
        self.tables = model.quantizer.search_tables(num_quantizers)

    def forward(self, audio: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Audio (B, C, T * frame_size) and a state to codes (B, K, T) and the next state."""
        after = StreamingState({name: tensor.clone() for name, tensor in state.items()})
        codes = self.model.encode_frames(audio, after, self.tables)
        return codes, after.tensors


class MimiDecoderStep(nn.Module):
    """One streaming step of the decoder with its state as plain tensors in and out, for `torch.export`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, audio_codes: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes (B, K, T) and a state to audio (B, C, T * frame_size) and the next state."""
        after = StreamingState({name: tensor.clone() for name, tensor in state.items()})
        audio = self.model.decode_frames(audio_codes, after)
        return audio, after.tensors
