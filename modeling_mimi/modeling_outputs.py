# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""What [`MimiModel`] returns."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput, auto_docstring


@dataclass
@auto_docstring
class MimiEncoderOutput(ModelOutput):
    r"""
    audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`):
        Codes, semantic first; 0 outside the clips.
    audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`):
        True on the frames of the clips.
    latents (`torch.FloatTensor` of shape `(batch_size, num_frames, hidden_size)`, *optional*, returned when `output_latents=True`):
        Latents before quantization. They, and all that follows, start at the left edge whatever the padding side.
    semantic_quantized, acoustic_quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, codebook_dim)`, *optional*, returned when `output_latents=True`):
        What each branch quantized them to, before its output projection.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
        Input of the encoder's transformer and output of each layer, `(batch_size, steps, hidden_size)` at 25 Hz.
    attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
        Attention weights of each layer, `(batch_size, num_heads, steps, steps)`; for more than `2 * sliding_window`
        steps `(batch_size, num_heads, steps, 2 * sliding_window)`, over a step's own block of keys and the one before.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    latents: torch.FloatTensor | None = None
    semantic_quantized: torch.FloatTensor | None = None
    acoustic_quantized: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
@auto_docstring
class MimiDecoderOutput(ModelOutput):
    r"""
    audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
        Waveform, nominally in [-1, 1] and not clipped; 0 outside the clips.
    hidden_states (`tuple(torch.FloatTensor)`, *optional*, returned when `output_hidden_states=True`):
        As in [`MimiEncoderOutput`], of the decoder's transformer.
    attentions (`tuple(torch.FloatTensor)`, *optional*, returned when `output_attentions=True`):
        As in [`MimiEncoderOutput`], of the decoder's transformer.
    """

    audio_values: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
@auto_docstring
class MimiOutput(ModelOutput):
    r"""
    audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`):
        Codes, semantic first; 0 outside the clips.
    audio_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
        Reconstruction, as long as the input; 0 outside the clips.
    audio_codes_mask (`torch.BoolTensor` of shape `(batch_size, num_frames)`):
        True on the frames of the clips.
    latents, semantic_quantized, acoustic_quantized (`torch.FloatTensor`, *optional*, returned when `output_latents=True` or in training mode):
        As in [`MimiEncoderOutput`].
    residuals, centroids (`torch.FloatTensor` of shape `(batch_size, num_quantizers, num_frames, codebook_dim)`, *optional*, returned when `output_latents=True` or in training mode):
        What each codebook was asked to quantize, with gradient, and what it answered: the commitment loss and the
        codebook updates need them.
    hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
        Those of the encoder's transformer, as in [`MimiEncoderOutput`].
    decoder_hidden_states, decoder_attentions (`tuple(torch.FloatTensor)`, *optional*):
        Those of the decoder's transformer.
    """

    audio_codes: torch.LongTensor | None = None
    audio_values: torch.FloatTensor | None = None
    audio_codes_mask: torch.BoolTensor | None = None
    latents: torch.FloatTensor | None = None
    semantic_quantized: torch.FloatTensor | None = None
    acoustic_quantized: torch.FloatTensor | None = None
    residuals: torch.FloatTensor | None = None
    centroids: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    decoder_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    decoder_attentions: tuple[torch.FloatTensor, ...] | None = None
