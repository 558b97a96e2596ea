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
The three operations that Mimi's time goes into, each with the kernel that suits the device: one place decides.

Activations are channels-last everywhere, (B, T, C): a convolution is then a matrix product over windows that are
views, and nothing is ever re-laid-out. `B` batch, `T` steps, `C` channels, `K` kernel size.

On a CPU, inference calls oneDNN directly. PyTorch sends float32 products to MKL, which packs the weight in every call:
with the few rows of a streaming step that takes 2 to 3 times as long as oneDNN's product on the plain weight, and on
long audio oneDNN is 1.2 to 1.5 times as fast. oneDNN has no autograd here, and `torch.compile` picks its own kernels,
so both of those (and every other device) take PyTorch's functions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN_DTYPES = {torch.float32} if _has_onednn() else set()
if _ONEDNN_DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _ONEDNN_DTYPES.add(torch.bfloat16)


def calls_kernels_directly(x: Tensor) -> bool:
    """Whether this is inference on a CPU, outside of `torch.compile`."""
    return x.is_cpu and not (
        torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`residual + x @ weight.T + bias` over the last axis: (..., C_in) and (C_out, C_in) give (..., C_out)."""
    if x.dtype in _ONEDNN_DTYPES and calls_kernels_directly(x) and weight.dtype == x.dtype and x.numel():
        weight = weight.detach()
        rows = x.numel() // x.shape[-1]
        if 1 < rows < 4 and x.shape[-1] <= 1024 and x.dtype == torch.float32 and bias is residual is None:
            # a streaming step of the transformer: turned round, MKL's product reads the weight in place, at full
            # bandwidth
            return torch.mm(weight, x.reshape(rows, -1).t()).t().reshape(*x.shape[:-1], -1)
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    x = F.linear(x, weight, bias)
    return x if residual is None else residual + x


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    dilation: int = 1,
    residual: Tensor | None = None,
) -> Tensor:
    """
    Convolution without padding, plus a residual: (B, T_in, C_in) and (C_out, C_in, K) give (B, T_out, C_out).

    The weight is best kept channels-last too, (C_out, K, C_in) in memory (see `channels_last_`): then every form below
    takes it as it lies. Where a window holds more numbers than there are windows, the weight is what costs: one
    product over the windows reads it once, while a convolution kernel would first re-order it. Everywhere else the
    convolution kernel wins, because the windows are never written out.
    """
    batch_size, steps, channels = x.shape
    kernel_size = weight.shape[2]
    if kernel_size == stride == 1:
        return linear(x, weight.squeeze(2), bias, residual)
    windows = (steps - (kernel_size - 1) * dilation - 1) // stride + 1
    if calls_kernels_directly(x) and batch_size * windows < kernel_size * channels:
        row, step, channel = x.stride()
        x = x.as_strided((batch_size, windows, kernel_size, channels), (row, stride * step, dilation * step, channel))
        return linear(x.flatten(2), weight.transpose(1, 2).flatten(1), bias, residual)
    # a 2D convolution of height 1: the 1D one would make its input contiguous, channels first
    x = x.transpose(1, 2).unsqueeze(2)
    x = F.conv2d(x, weight.unsqueeze(2), bias, stride=(1, stride), dilation=(1, dilation))
    x = x.squeeze(2).transpose(1, 2)
    return x if residual is None else residual + x


def join_past(past: Tensor, x: Tensor, activate: bool) -> Tensor:
    """
    `cat([past, elu(x)])` along time, (B, P, C) and (B, T, C) to (B, P + T, C), writing `x` once; without ELU unless
    `activate`.

    For x < 0, ELU is 2^(x log2 e) - 1, and `exp2` is four times as fast as the `expm1` that PyTorch's ELU spends its
    time on; the difference is below 1e-7. It is taken in float32, whatever the dtype.
    """
    if not calls_kernels_directly(x):
        return torch.cat([past, F.elu(x) if activate else x], dim=1)
    steps = past.shape[1]
    joined = x.new_empty(x.shape[0], steps + x.shape[1], x.shape[2])
    joined[:, :steps] = past
    new = joined[:, steps:]
    if not activate:
        new.copy_(x)
    else:
        x = x.float()
        wide = new if new.dtype == torch.float32 else torch.empty_like(x)
        torch.mul(x, math.log2(math.e), out=wide).clamp_(max=0).exp2_().sub_(1)
        torch.maximum(x, wide, out=wide)
        if wide is not new:
            new.copy_(wide)
    return joined
