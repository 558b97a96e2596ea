# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""Mimi as four graphs for other runtimes.

`encoder_model` and `decoder_model` take whole clips; their names, inputs and outputs are those that transformers.js
looks for. `encoder_step` and `decoder_step` take one frame and a state, whose tensors go in as `state.NAME` and come
back as `next_state.NAME`: all shapes are constant, so a phone or a browser can loop over them.

`B` batch, `C` audio channels, `L` samples, `T` frames, `K` codebooks.
"""

import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .modeling_mimi import MimiModel
from .modeling_streaming import MimiDecoderStep, MimiEncoderStep

State = dict[str, Tensor]


@dataclass(frozen=True)
class Graph:
    """
    A module to export, and what goes in and comes out.

    `example` is an input to trace it with, and `axes` names those of its axes that stay open. `state` is the state
    before the first frame, zeros; a graph of whole clips has none. `max_frames`: the longest clip, `None` for any.
    """

    name: str
    module: nn.Module
    example: Tensor
    axes: dict[int, str] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    max_frames: int | None = None

    @property
    def output(self) -> Tensor:
        """The first output, a tensor without values; where an axis is open, so is its size."""
        return self.program.graph.output_node().args[0][0].meta["val"]

    @property
    def is_encoder(self) -> bool:
        """Whether audio goes in and codes come out, not the reverse."""
        return self.name.startswith("encoder")

    @property
    def input_names(self) -> list[str]:
        """What goes in: audio or codes, then the state."""
        return ["input_values" if self.is_encoder else "audio_codes", *(f"state.{name}" for name in self.state)]

    @property
    def output_names(self) -> list[str]:
        """What comes out: codes or audio, then the next state in the order of the state."""
        return ["audio_codes" if self.is_encoder else "audio_values", *(f"next_state.{name}" for name in self.state)]

    @cached_property
    def program(self) -> ExportedProgram:
        """The module traced: one graph of PyTorch's operators."""
        with torch.no_grad():
            if self.state:
                return torch.export.export(self.module, (self.example, self.state))
            axes = dict.fromkeys(self.axes, Dim.DYNAMIC)
            return torch.export.export(self.module, (self.example,), dynamic_shapes=(axes,))


class EncodeClips(nn.Module):
    """Whole clips, (B, C, L) of any length, to codes (B, K, T)."""

    def __init__(self, model: MimiModel, num_quantizers: int):
        super().__init__()
        self.model = model
        self.tables = model.quantizer.search_tables(num_quantizers)

    def forward(self, audio: Tensor) -> Tensor:
        frame_size, length = self.model.config.frame_size, audio.shape[-1]
        num_frames = (length + frame_size - 1) // frame_size  # of positive numbers only: ONNX divides towards zero
        audio = nn.functional.pad(audio, (0, num_frames * frame_size - length))
        return self.model.encode_frames(audio, None, self.tables)


class DecodeClips(nn.Module):
    """Codes (B, K, T) to audio (B, C, T * frame_size), in float32 whatever the weights are."""

    def __init__(self, model: MimiModel):
        super().__init__()
        self.model = model

    def forward(self, audio_codes: Tensor) -> Tensor:
        return self.model.decode_frames(audio_codes).float()


class DecodeFrame(MimiDecoderStep):
    """The codes of a frame (1, K, 1) and a state to audio (1, C, frame_size), in float32 too, and the next state."""

    def forward(self, audio_codes: Tensor, state: State) -> tuple[Tensor, State]:
        audio, state = super().forward(audio_codes, state)
        return audio.float(), state


@torch.no_grad()
def graphs_of(model: MimiModel, num_quantizers: int, half: bool = False, any_length: bool = True) -> list[Graph]:
    """
    The graphs of the halves that a model has.

    Args:
        model: in float32, on the CPU; it is left as it is.
        num_quantizers: codebooks to use.
        half: weights, activations and states in float16. The quantizer stays in float32, and so do audio in and out.
        any_length: whole clips attend in blocks, so that memory grows with the length, not with its square. The
            program then only takes clips longer than `2 * sliding_window` steps; ONNX keeps no such conditions. If
            not, clips attend at once and are at most that long.
    """
    if half:
        model = copy.deepcopy(model).half()
    encoder, decoder = _without(model, model._DECODER_PARTS), _without(model, model._ENCODER_PARTS)
    config = model.config
    longest = 2 * config.sliding_window // config.latent_stride
    frames, limit = (longest + 1, None) if any_length else (3, longest)
    graphs = []
    if encoder.encoder is not None:
        audio = torch.zeros(2, config.audio_channels, frames * config.frame_size)
        axes = {0: "batch_size", 2: "num_samples"}
        graphs.append(Graph("encoder_model", EncodeClips(encoder, num_quantizers), audio, axes, max_frames=limit))
        state = encoder.new_encoder_state(batch_size=1, max_frames=1).tensors
        frame = audio[:1, :, : config.frame_size].clone()
        graphs.append(Graph("encoder_step", MimiEncoderStep(encoder, num_quantizers), frame, state=state))
    if decoder.decoder is not None:
        codes = torch.zeros(2, num_quantizers, frames, dtype=torch.int64)
        axes = {0: "batch_size", 2: "num_frames"}
        graphs.append(Graph("decoder_model", DecodeClips(decoder), codes, axes, max_frames=limit))
        state = decoder.new_decoder_state(batch_size=1, max_frames=1).tensors
        graphs.append(Graph("decoder_step", DecodeFrame(decoder), codes[:1, :, :1].clone(), state=state))
    return graphs


def _without(model: MimiModel, parts: tuple[str, ...]) -> MimiModel:
    """The same weights without those of the other half: a program keeps all that its module has."""
    model = copy.copy(model)
    model._modules = {name: None if name in parts else module for name, module in model._modules.items()}
    return model
