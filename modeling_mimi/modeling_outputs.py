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
"""What [`MimiModel`] returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput, auto_docstring


@auto_docstring
@dataclass
class MimiEncoderOutput(ModelOutput):
    r"""
    audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`):
        Codes, semantic first; 0 outside the clips.
    audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`):
        True on the frames of the clips.
    latents (`torch.FloatTensor` of shape `(batch_size, num_frames, hidden_size)`, *optional*):
        Latents before quantization, with `output_latents=True`. They, and all that follows, start at the left edge
        whatever the padding side.
    semantic_quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, codebook_dim)`, *optional*):
        What the semantic branch quantized them to, before its output projection, with `output_latents=True`.
    acoustic_quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, codebook_dim)`, *optional*):
        The same of the acoustic branch; `None` when only semantic codebooks are used.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
        Input of the encoder's transformer and output of each layer, `(batch_size, steps, hidden_size)` at 25 Hz.
    attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
        Attention weights of each layer, `(batch_size, num_heads, steps, steps)`; for more than `2 * sliding_window`
        steps `(batch_size, num_heads, steps, 2 * sliding_window)`, over a step's own block of keys and the one before.
    """

    audio_codes: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    semantic_quantized: torch.Tensor | None = None
    acoustic_quantized: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring
@dataclass
class MimiDecoderOutput(ModelOutput):
    r"""
    audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
        Waveform, nominally in [-1, 1] and not clipped; 0 outside the clips.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
        As in [`MimiEncoderOutput`], of the decoder's transformer.
    attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
        As in [`MimiEncoderOutput`], of the decoder's transformer.
    """

    audio_values: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@auto_docstring
@dataclass
class MimiOutput(ModelOutput):
    r"""
    audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`):
        Codes, semantic first; 0 outside the clips.
    audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
        Reconstruction, as long as the input; 0 outside the clips.
    audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`):
        True on the frames of the clips.
    latents (`torch.FloatTensor` of shape `(batch_size, num_frames, hidden_size)`, *optional*):
        As in [`MimiEncoderOutput`], with `output_latents=True` or where gradients are on.
    semantic_quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, codebook_dim)`, *optional*):
        As in [`MimiEncoderOutput`], straight-through: with the gradient of what was quantized.
    acoustic_quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, codebook_dim)`, *optional*):
        As in [`MimiEncoderOutput`], straight-through.
    residuals (`torch.FloatTensor` of shape `(batch_size, num_quantizers, num_frames, codebook_dim)`, *optional*):
        What each codebook was asked to quantize, with gradient, for the commitment loss and the codebook updates;
        returned where gradients are on or in training mode.
    centroids (`torch.FloatTensor` of shape `(batch_size, num_quantizers, num_frames, codebook_dim)`, *optional*):
        What it answered, without gradient.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
        Those of the encoder's transformer, as in [`MimiEncoderOutput`].
    attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
        Those of the encoder's transformer, as in [`MimiEncoderOutput`].
    decoder_hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
        Those of the decoder's transformer.
    decoder_attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
        Those of the decoder's transformer.
    """

    audio_codes: torch.Tensor | None = None
    audio_values: torch.Tensor | None = None
    audio_codes_mask: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    semantic_quantized: torch.Tensor | None = None
    acoustic_quantized: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    centroids: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
