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
Padding undone: every clip of a batch is moved to the left edge, and its result moved back to where the clip stood.

The codec is causal, so what follows a clip cannot reach it; only what stands before it, and a partly filled last
frame, can. Positions are computed on the device, without a sync. `B` batch, `C` channels, `L` samples or frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Where each clip of a batch lies: `starts` and `lengths`, int64 of shape (B,)."""

    starts: Tensor
    lengths: Tensor

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Span":
        """From the first to the last true entry of a (B, L) mask."""
        mask = mask.to(torch.uint8)
        starts = mask.argmax(dim=-1)
        ends = mask.shape[-1] - mask.flip(-1).argmax(dim=-1)
        return cls(starts, torch.where(mask.amax(-1) > 0, ends - starts, 0))

    def in_frames(self, frame_size: int, num_frames: int) -> "Span":
        """The frames of these samples, among `num_frames`: on the right edge where the clip was padded on the left."""
        lengths = (self.lengths + frame_size - 1) // frame_size
        return Span(torch.where(self.starts > 0, num_frames - lengths, 0), lengths)

    def in_samples(self, frame_size: int) -> "Span":
        """The samples of these frames."""
        return Span(self.starts * frame_size, self.lengths * frame_size)

    def mask(self, length: int) -> Tensor:
        """(B, length), true on the clips."""
        index = torch.arange(length, device=self.starts.device) - self.starts[:, None]
        return (index >= 0) & (index < self.lengths[:, None])


def to_left_edge(x: Tensor, span: Span) -> Tensor:
    """Move each clip of (B, C, L) to the left edge, zeros after it."""
    index = torch.arange(x.shape[-1], device=x.device) + span.starts[:, None]
    moved = x.gather(-1, index.clamp(max=x.shape[-1] - 1)[:, None].expand_as(x))
    return moved.masked_fill(~Span(torch.zeros_like(span.starts), span.lengths).mask(x.shape[-1])[:, None], 0)


def from_left_edge(x: Tensor, span: Span, length: int) -> Tensor:
    """Move each clip of (B, C, any) from the left edge to its place in (B, C, length), zeros around it."""
    index = torch.arange(length, device=x.device) - span.starts[:, None]
    inside = span.mask(length) & (index < x.shape[-1])
    moved = x.gather(-1, index.clamp(0, x.shape[-1] - 1)[:, None].expand(-1, x.shape[1], -1))
    return moved.masked_fill(~inside[:, None], 0)
