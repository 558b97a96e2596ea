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
Causal convolution and transposed convolution, whole or in steps (Moshi §3.3.1).

Both look back only. Whole, what lies before the clip is padding; in steps, it is the end of the previous step, kept in
a `StreamingState`. `B` batch, `T` steps, `C` channels; activations are (B, T, C).
"""

import torch
from torch import Tensor, nn

from .modeling_kernels import conv1d, join_past, linear
from .modeling_state import StreamingState


class MimiConv1d(nn.Module):
    """
    Causal convolution, (B, T, C_in) to (B, T / stride, C_out), after an ELU if `activate`. `T` is a multiple of the
    stride.

    The window that ends at step `t` begins `(kernel_size - 1) * dilation` steps before: the clip is padded on the left
    by that less `stride - 1`, with zeros or, `pad_mode="replicate"`, with its first step. State: `padding`, and
    whether it has `begun`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        pad_mode: str = "constant",
        activate: bool = False,
    ):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, dilation=dilation, bias=bias)
        self.stride = stride
        self.dilation = dilation
        self.padding = (kernel_size - 1) * dilation + 1 - stride
        self.replicate = pad_mode == "replicate" and self.padding > 0
        self.activate = activate
        self.state_name = ""
        self.channels_last_()

    def channels_last_(self) -> None:
        """Lay the weight out in memory as the kernels take it, (C_out, K, C_in). Its shape stays (C_out, C_in, K)."""
        _lay_out(self.conv, (0, 2, 1))

    def new_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state before the first step, on the weight's device and in its dtype."""
        state = {}
        if self.padding:
            state["padding"] = self.conv.weight.new_zeros(batch_size, self.padding, self.conv.in_channels)
        if self.replicate:
            state["begun"] = torch.zeros(batch_size, dtype=torch.bool, device=self.conv.weight.device)
        return {f"{self.state_name}.{name}": tensor for name, tensor in state.items()}

    def forward(self, x: Tensor, state: StreamingState | None = None, residual: Tensor | None = None) -> Tensor:
        if self.padding or self.activate:
            x = join_past(self._left_padding(x, state), x, self.activate)
        if self.padding and state is not None:
            state.write(f"{self.state_name}.padding", x[:, -self.padding :])
        return conv1d(x, self.conv.weight, self.conv.bias, self.stride, self.dilation, residual)

    def _left_padding(self, x: Tensor, state: StreamingState | None) -> Tensor:
        first = None
        if self.replicate:
            first = nn.functional.elu(x[:, :1]) if self.activate else x[:, :1]
            first = first.expand(-1, self.padding, -1)
        if state is None or not self.padding:
            return x.new_zeros(x.shape[0], self.padding, x.shape[2]) if first is None else first
        padding = state[f"{self.state_name}.padding"]
        if first is None:
            return padding
        begun = state[f"{self.state_name}.begun"]
        padding = torch.where(begun.view(-1, 1, 1), padding, first)
        state.write(f"{self.state_name}.begun", torch.ones_like(begun))
        return padding


class MimiConvTranspose1d(nn.Module):
    """
    Causal transposed convolution with kernel `2 * stride`, (B, T, C_in) to (B, T * stride, C_out), after an ELU if
    `activate`.

    Input step `t` spreads over the output blocks `t` and `t + 1` of `stride` steps each; what would lie beyond the end
    of the clip is trimmed. So a block is the sum of two products: one of its own step, one of the step before.
    State: `overlap`, that step before.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int = 1,
        bias: bool = True,
        activate: bool = False,
    ):
        super().__init__()
        self.conv = nn.ConvTranspose1d(in_channels, out_channels, 2 * stride, stride, groups=groups, bias=bias)
        self.stride = stride
        self.groups = groups
        self.activate = activate
        self.state_name = ""
        self.channels_last_()

    def channels_last_(self) -> None:
        """Lay the weight out in memory as the products take it, (K, C_out, C_in). Its shape stays (C_in, C_out, K)."""
        _lay_out(self.conv, (2, 1, 0))

    def new_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state before the first step, on the weight's device and in its dtype."""
        return {f"{self.state_name}.overlap": self.conv.weight.new_zeros(batch_size, 1, self.conv.in_channels)}

    def forward(self, x: Tensor, state: StreamingState | None = None) -> Tensor:
        before = x.new_zeros(x.shape[0], 1, x.shape[2]) if state is None else state[f"{self.state_name}.overlap"]
        x = join_past(before, x, self.activate)
        if state is not None:
            state.write(f"{self.state_name}.overlap", x[:, -1:])
        x, before = x[:, 1:], x[:, :-1]
        weight = self.conv.weight.permute(2, 1, 0)  # (2 * stride, C_out / groups, C_in)
        own, following = weight[: self.stride], weight[self.stride :]
        if self.groups == 1:
            bias = None if self.conv.bias is None else self.conv.bias.repeat(self.stride)
            x = linear(x, own.flatten(0, 1), bias)
            x = linear(before, following.flatten(0, 1), residual=x)
            return x.unflatten(2, (self.stride, -1)).flatten(1, 2)
        x = self._spread_grouped(x, own) + self._spread_grouped(before, following)
        return x.flatten(1, 2) if self.conv.bias is None else x.flatten(1, 2) + self.conv.bias

    def _spread_grouped(self, x: Tensor, weight: Tensor) -> Tensor:
        """Each step times a (stride, C_out / groups, C_in) half of the kernel: (B, T, stride, C_out)."""
        if self.groups == x.shape[2] == self.conv.out_channels:  # depthwise: nothing to sum
            return x.unsqueeze(2) * weight.squeeze(1)
        x = x.unflatten(2, (self.groups, -1))
        weight = weight.unflatten(2, (self.groups, -1))  # (stride, C_out / groups, groups, C_in / groups)
        return torch.einsum("btgi,sogi->btsgo", x, weight).flatten(3)


def _lay_out(conv: nn.Conv1d | nn.ConvTranspose1d, order: tuple[int, int, int]) -> None:
    """Make `weight.permute(order)` contiguous without changing the weight."""
    if not torch.nn.utils.parametrize.is_parametrized(conv):
        inverse = [order.index(axis) for axis in range(3)]
        conv.weight.data = conv.weight.data.permute(order).contiguous().permute(inverse)
