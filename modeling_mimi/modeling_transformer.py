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
The transformer on either side of Mimi's quantizer (Moshi §3.3.1): pre-norm, RoPE, LayerScale, and attention in a
window.

`B` batch, `S` steps at 25 Hz, `D` width, `H` heads, `W` window: a step sees itself and the `W - 1` steps before it. No
mask is ever S x S: short clips attend at once, longer ones in blocks of `W` that each see the block before, and
streams attend to a ring of the last keys and values. Everything that the layers share (angles, mask, ring slots) is
made once per call.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mimi import MimiConfig
from .modeling_kernels import linear
from .modeling_state import StreamingState


@dataclass
class AttentionContext:
    """
    What all layers of one call share.

    `cos` and `sin`, (B or 1, S, 1, head_dim): angles of the steps. `mask`, bool, broadcastable to (B, H, queries,
    keys), true where a query sees a key. `block`: steps per block if attention runs in blocks. `slots`, (B, S): where
    in the ring a stream writes its keys and values.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor
    block: int | None = None
    slots: Tensor | None = None


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """
    Cosines and signed sines of the rotary embedding, (B, S) to twice (B, S, 1, head_dim), in the half-split layout.

    The angles are taken in float64: an hour into a stream they are near 1e5, where float32 has lost three digits.
    """
    exact = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.to(exact)[..., None, None] * (1.0 / theta**exponents).to(exact)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs `(i, i + head_dim / 2)` of the last axis by their angles."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def eager_attention_forward(
    module: "MimiAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: (B, H, queries, head_dim) to (B, queries, H, head_dim), and its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MimiAttention(nn.Module):
    """Windowed attention, (B, S, D) to (B, S, D). State: `keys` and `values`, rings of (B, H, ring, head_dim)."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # the mask says it
        self.state_name = ""
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bias)

    def new_state(self, batch_size: int, ring: int) -> dict[str, Tensor]:
        """The state before the first step, on the weights' device and in their dtype, for `ring` keys."""
        shape = batch_size, self.num_key_value_heads, ring, self.head_dim
        return {f"{self.state_name}.{part}": self.k_proj.weight.new_zeros(shape) for part in ("keys", "values")}

    def forward(
        self, x: Tensor, context: AttentionContext, state: StreamingState | None = None, with_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        batch_size, steps, _ = x.shape
        query, key, value = (
            linear(x, proj.weight, proj.bias).view(batch_size, steps, -1, self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        both = rotate(torch.cat([query, key], dim=2), context.cos, context.sin).transpose(1, 2)
        query, key = both.split([self.num_heads, self.num_key_value_heads], dim=1)
        value = value.transpose(1, 2)
        if state is not None and context.slots is not None:
            key, value = self._remember(key, value, context.slots, state)
        elif context.block:
            query, key, value = _to_blocks(query, key, value, context.block)

        attend = eager_attention_forward
        if not with_weights:  # the fused kernels do not give them
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        x, weights = attend(self, query, key, value, context.mask, dropout=dropout, scaling=self.scaling)
        x = x.reshape(batch_size, -1, self.num_heads * self.head_dim)[:, :steps]
        if weights is not None and context.block:
            weights = weights.unflatten(0, (batch_size, -1)).transpose(1, 2).flatten(2, 3)[:, :, :steps]
        return linear(x, self.o_proj.weight, self.o_proj.bias), weights if with_weights else None

    def _remember(self, key: Tensor, value: Tensor, slots: Tensor, state: StreamingState) -> tuple[Tensor, Tensor]:
        """Write the new steps into the ring and give all of it. An inactive row's slots are written again later."""
        slots = slots[:, None, :, None].expand_as(key)
        keys, values = state[f"{self.state_name}.keys"], state[f"{self.state_name}.values"]
        return keys.scatter_(2, slots, key), values.scatter_(2, slots, value)


class MimiMLP(nn.Module):
    """(B, S, D) to (B, S, D) by way of `intermediate_size`."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.activation_fn(linear(x, self.fc1.weight)), self.fc2.weight)


class MimiLayerScale(nn.Module):
    """Adds a branch to its residual, scaled per channel (Touvron et al. 2021)."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_initial_scale))

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(residual, branch, self.scale)


class MimiTransformerLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a layer norm and added through a LayerScale, (B, S, D) to (B, S, D)."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.self_attn = MimiAttention(config)
        self.mlp = MimiMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn_layer_scale = MimiLayerScale(config)
        self.mlp_layer_scale = MimiLayerScale(config)

    def forward(
        self, x: Tensor, context: AttentionContext, state: StreamingState | None = None, with_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        branch, weights = self.self_attn(self.input_layernorm(x), context, state, with_weights)
        x = self.self_attn_layer_scale(x, branch)
        x = self.mlp_layer_scale(x, self.mlp(self.post_attention_layernorm(x)))
        return x, weights


class MimiTransformer(nn.Module):
    """A stack of layers without a final norm, (B, S, D) to (B, S, D)."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.config = config
        self.window = config.sliding_window
        self.layers: Any = nn.ModuleList([MimiTransformerLayer(config) for _ in range(config.num_hidden_layers)])

    def new_state(self, batch_size: int, max_steps: int) -> dict[str, Tensor]:
        """The state before the first step, for steps of up to `max_steps` at a time."""
        ring = self.window + max_steps
        states = (layer.self_attn.new_state(batch_size, ring) for layer in self.layers)
        return {name: tensor for state in states for name, tensor in state.items()}

    def forward(
        self,
        x: Tensor,
        state: StreamingState | None = None,
        with_hidden_states: bool = False,
        with_attentions: bool = False,
    ) -> BaseModelOutput:
        """Attention weights are (B, H, S, S), or (B, H, S, 2W) over the own block and the one before if S > 2W."""
        context = self._whole_context(x) if state is None else self._streaming_context(x, state)
        hidden_states, attentions = (x,), ()
        for layer in self.layers:
            x, weights = layer(x, context, state, with_attentions)
            if with_hidden_states:
                hidden_states += (x,)
            attentions += (weights,)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=hidden_states if with_hidden_states else None,
            attentions=attentions if with_attentions else None,
        )

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rotary_angles(positions, self.config.head_dim, self.config.rope_parameters["rope_theta"], dtype)

    def _whole_context(self, x: Tensor) -> AttentionContext:
        batch_size, steps, _ = x.shape
        window = self.window
        cos, sin = self._angles(torch.arange(steps, device=x.device)[None], x.dtype)
        if steps <= 2 * window:
            positions = torch.arange(steps, device=x.device)
            return AttentionContext(cos, sin, _sees(positions[:, None], positions, window)[None, None])
        # block n holds the queries n W .. (n + 1) W - 1, which see keys from (n - 1) W on; before the clip there are
        # none
        offsets = torch.arange(window, device=x.device)
        starts = torch.arange(0, steps, window, device=x.device)[:, None, None]
        keys = starts + torch.arange(-window, window, device=x.device)
        mask = _sees(starts + offsets[:, None], keys, window) & (keys >= 0)  # (blocks, W, 2W)
        mask = mask.expand(batch_size, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        return AttentionContext(cos, sin, mask, block=window)

    def _streaming_context(self, x: Tensor, state: StreamingState) -> AttentionContext:
        steps = x.shape[1]
        ring = state[f"{self.layers[0].self_attn.state_name}.keys"].shape[2]
        if steps > ring - self.window:
            raise ValueError(f"A step of {steps} is too long for this state: at most {ring - self.window} at a time.")
        start = state.position[:, None] * self.config.latent_stride
        queries = start + torch.arange(steps, device=x.device)  # (B, S)
        cos, sin = self._angles(queries, x.dtype)
        # slot j holds the last position that is congruent to j, negative if there was none
        last = queries[:, -1:]
        keys = last - (last - torch.arange(ring, device=x.device)) % ring  # (B, ring)
        mask = _sees(queries[..., None], keys[:, None], self.window) & (keys >= 0)[:, None]
        return AttentionContext(cos, sin, mask[:, None], slots=queries % ring)


def _sees(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Whether a query at one position sees a key at another."""
    return (keys <= queries) & (queries - keys < window)


def _to_blocks(query: Tensor, key: Tensor, value: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut (B, H, S, head_dim) into (B * blocks, H, block, head_dim), keys and values with the block before."""
    steps = query.shape[2]
    blocks = (steps + block - 1) // block  # of positive numbers only: ONNX divides towards zero

    def cut(x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, blocks * block - steps))
        return x.unflatten(2, (blocks, block)).transpose(1, 2)  # (B, blocks, H, block, head_dim)

    def with_block_before(x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return torch.cat([before, x], dim=3)

    query, key, value = cut(query), with_block_before(cut(key)), with_block_before(cut(value))
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
