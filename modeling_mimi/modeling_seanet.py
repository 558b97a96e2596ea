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

`B` batch, `L` samples, `S` steps at 25 Hz, `C` audio channels, `D` width of the latents; activations are (B, time,
width). Layers stand in one list with their activations between them, so that their indices are those of the files.
"""

from torch import Tensor, nn

from .configuration_mimi import MimiConfig
from .modeling_convolution import MimiConv1d, MimiConvTranspose1d
from .modeling_kernels import elu
from .modeling_state import StreamingState


class MimiELU(nn.Module):
    """ELU; takes the state that it does not need, so that all layers are called alike."""

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        return elu(x)


class MimiResnetBlock(nn.Module):
    """Residual unit: a dilated convolution to a narrower width and a 1x1 convolution back, (B, T, C) to (B, T, C)."""

    def __init__(self, config: MimiConfig, width: int, dilation: int):
        super().__init__()
        hidden = width // config.compress
        pad_mode = config.pad_mode
        self.block = nn.ModuleList(
            [
                MimiELU(),
                MimiConv1d(width, hidden, config.residual_kernel_size, dilation=dilation, pad_mode=pad_mode),
                MimiELU(),
                MimiConv1d(hidden, width, 1),
            ]
        )
        # CODEPATH: kyutai/mimi takes the identity; a stock config can ask for the convolution
        self.shortcut = MimiConv1d(width, width, 1) if config.use_conv_shortcut else None

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        residual = x if self.shortcut is None else self.shortcut(x, state)
        for layer in self.block:
            x = layer(x, state)
        return residual + x


class MimiEncoder(nn.Module):
    """SEANet encoder: (B, L, C) to (B, S, D), `L` a multiple of the product of the strides."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        width, pad_mode = config.num_filters, config.pad_mode
        self.layers = nn.ModuleList([MimiConv1d(config.audio_channels, width, config.kernel_size, pad_mode=pad_mode)])
        for stride in reversed(config.upsampling_ratios):
            self.layers.extend(_residual_units(config, width))
            self.layers.append(MimiELU())
            self.layers.append(MimiConv1d(width, 2 * width, 2 * stride, stride, pad_mode=pad_mode))
            width *= 2
        self.layers.append(MimiELU())
        self.layers.append(MimiConv1d(width, config.hidden_size, config.last_kernel_size, pad_mode=pad_mode))

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, state)
        return x


class MimiDecoder(nn.Module):
    """SEANet decoder: (B, S, D) to (B, L, C)."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        width, pad_mode = config.num_filters * 2 ** len(config.upsampling_ratios), config.pad_mode
        self.layers = nn.ModuleList([MimiConv1d(config.hidden_size, width, config.kernel_size, pad_mode=pad_mode)])
        for stride in config.upsampling_ratios:
            self.layers.append(MimiELU())
            self.layers.append(MimiConvTranspose1d(width, width // 2, stride))
            width //= 2
            self.layers.extend(_residual_units(config, width))
        self.layers.append(MimiELU())
        self.layers.append(MimiConv1d(width, config.audio_channels, config.last_kernel_size, pad_mode=pad_mode))

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, state)
        return x


def _residual_units(config: MimiConfig, width: int) -> list[MimiResnetBlock]:
    return [MimiResnetBlock(config, width, config.dilation_growth_rate**j) for j in range(config.num_residual_layers)]
