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
"""What a stream remembers: a dictionary of plain tensors, one row per stream, of a size that never changes."""

import torch
from torch import Tensor


class StreamingState:
    r"""
    The state of one direction (encoder or decoder) of `batch_size` independent streams.

    A layer that looks back names its tensors after itself (`"encoder.layers.3.padding"`), reads them at the start of a
    step and writes them at its end, in place: the memory is allocated once.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            Name to tensor, every one with the streams as its first axis. `"position"`, int64 of shape `(batch_size,)`,
            counts the frames that each stream has seen.
        active (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
            The rows that take part in the coming step; the others keep their state, and their output means nothing.
            All of them if not given.
    """

    def __init__(self, tensors: dict[str, Tensor], active: Tensor | None = None):
        self.tensors = tensors
        self.active = active

    @property
    def position(self) -> Tensor:
        """Frames seen so far, (B,)."""
        return self.tensors["position"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def write(self, name: str, value: Tensor) -> None:
        """Replace a tensor of the state in the active rows."""
        state = self.tensors[name]
        if self.active is not None:
            value = torch.where(self.active.view(-1, *[1] * (state.dim() - 1)), value, state)
        state.copy_(value)

    def advance(self, frames: int) -> None:
        """Count `frames` more frames in the active rows."""
        self.write("position", self.position + frames)

    def reset(self, rows: list[int] | Tensor | None = None) -> None:
        """Forget everything in the given rows, in all of them if not given."""
        if isinstance(rows, list):  # to the device once, not for every tensor
            rows = torch.tensor(rows, dtype=torch.int64, device=self.position.device)
        for tensor in self.tensors.values():
            if rows is None:
                tensor.zero_()
            else:
                tensor[rows] = 0
