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
SEANet, the convolutional outside of Mimi (Moshi §3.3.1): audio to 25 Hz steps, and back.

The files number the layers with the activations between them; ours are part of the convolutions that follow them, so
the numbering has gaps. `B` batch, `L` samples, `S` steps at 25 Hz, `C` audio channels, `D` width of the latents;
activations are (B, time, width).
"""

import math

import torch
from torch import Tensor, nn

from .configuration_mimi import MimiConfig
from .modeling_convolution import MimiConv1d, MimiConvTranspose1d
from .modeling_kernels import calls_kernels_directly
from .modeling_state import StreamingState

CACHED_SAMPLES = 6 * 1920
"""Samples of audio whose widest activations stay in a CPU's cache, 3 MB in float32."""


class MimiResnetBlock(nn.Module):
    """Residual unit: a dilated convolution to a narrower width and a 1x1 convolution back, (B, T, C) to (B, T, C)."""

    def __init__(self, config: MimiConfig, width: int, dilation: int):
        super().__init__()
        hidden, kernel_size, pad_mode = width // config.compress, config.residual_kernel_size, config.pad_mode
        self.block = nn.ModuleDict(
            {
                "1": MimiConv1d(width, hidden, kernel_size, dilation=dilation, pad_mode=pad_mode, activate=True),
                "3": MimiConv1d(hidden, width, 1, activate=True),
            }
        )
        # CODEPATH: kyutai/mimi takes the identity; a stock config can ask for the convolution
        self.shortcut = MimiConv1d(width, width, 1) if config.use_conv_shortcut else None

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x, state)
        return self.block["3"](self.block["1"](x, state), state, residual)


class MimiSEANet(nn.Module):
    """
    Layers between audio and 25 Hz steps, in either direction.

    Near the audio activations are large and weights small, far from it the reverse. So on a CPU the two stages nearest
    to the audio walk through it in blocks whose activations stay in cache, and the others take everything at once.
    """

    def __init__(self, layers: dict[str, nn.Module], near: int, audio_stride: int):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.near = near  # layers of the two stages nearest to the audio
        self.audio_stride = audio_stride  # audio samples per step of what those layers take in

    def new_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state before the first step of all convolutions."""
        convolutions = (m for m in self.modules() if isinstance(m, (MimiConv1d, MimiConvTranspose1d)))
        return {name: tensor for m in convolutions for name, tensor in m.new_state(batch_size).items()}

    def _through(self, layers: list[nn.Module], x: Tensor, state: StreamingState | None) -> Tensor:
        for layer in layers:
            x = layer(x, state)
        return x

    def _in_blocks(self, layers: list[nn.Module], x: Tensor, state: StreamingState | None, frame: int) -> Tensor:
        """Run layers over blocks of whole frames of `frame` steps, as a stream that lasts as long as the clip."""
        if not calls_kernels_directly(x):
            return self._through(layers, x, state)
        block = frame * max(1, CACHED_SAMPLES // (frame * self.audio_stride * x.shape[0]))
        if x.shape[1] <= block:
            return self._through(layers, x, state)
        state = StreamingState(self.new_state(x.shape[0])) if state is None else state
        return torch.cat([self._through(layers, part, state) for part in x.split(block, dim=1)], dim=1)


class MimiEncoder(MimiSEANet):
    """SEANet encoder: (B, L, C) to (B, S, D), `L` a multiple of the product of the strides."""

    def __init__(self, config: MimiConfig):
        width, pad_mode = config.num_filters, config.pad_mode
        layers: list[nn.Module | None] = [
            MimiConv1d(config.audio_channels, width, config.kernel_size, pad_mode=pad_mode)
        ]
        for stride in reversed(config.upsampling_ratios):
            layers += _residual_units(config, width)
            down = MimiConv1d(width, 2 * width, 2 * stride, stride, pad_mode=pad_mode, activate=True)
            layers += [None, down]
            width *= 2
        last = MimiConv1d(width, config.hidden_size, config.last_kernel_size, pad_mode=pad_mode, activate=True)
        layers += [None, last]
        super().__init__(_numbered(layers), near=1 + 2 * (config.num_residual_layers + 1), audio_stride=1)
        self.hop = math.prod(config.upsampling_ratios)

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        layers = list(self.layers.values())
        x = self._in_blocks(layers[: self.near], x, state, self.hop)
        return self._through(layers[self.near :], x, state)


class MimiDecoder(MimiSEANet):
    """SEANet decoder: (B, S, D) to (B, L, C)."""

    def __init__(self, config: MimiConfig):
        width, pad_mode = config.num_filters * 2 ** len(config.upsampling_ratios), config.pad_mode
        layers: list[nn.Module | None] = [MimiConv1d(config.hidden_size, width, config.kernel_size, pad_mode=pad_mode)]
        for stride in config.upsampling_ratios:
            layers += [None, MimiConvTranspose1d(width, width // 2, stride, activate=True)]
            width //= 2
            layers += _residual_units(config, width)
        last = MimiConv1d(width, config.audio_channels, config.last_kernel_size, pad_mode=pad_mode, activate=True)
        layers += [None, last]
        near = 1 + 2 * (config.num_residual_layers + 1)
        super().__init__(_numbered(layers), near, audio_stride=math.prod(config.upsampling_ratios[-2:]))
        self.steps = math.prod(config.upsampling_ratios[:-2])

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        layers = list(self.layers.values())
        x = self._through(layers[: -self.near], x, state)
        return self._in_blocks(layers[-self.near :], x, state, self.steps)


def _residual_units(config: MimiConfig, width: int) -> list[MimiResnetBlock]:
    return [MimiResnetBlock(config, width, config.dilation_growth_rate**j) for j in range(config.num_residual_layers)]


def _numbered(layers: list[nn.Module | None]) -> dict[str, nn.Module]:
    """Layers under the numbers that the files give them; an activation is a gap."""
    return {str(i): layer for i, layer in enumerate(layers) if layer is not None}
