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
"""Configuration of Mimi: every constant of the codec, with the paper's value as default; rates are derived once."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import auto_docstring

_Derived: Any = None
"""Beside a field's type: `None` may be passed and is derived, so that readers, and type checkers, never meet it."""

_POSITIVE = (
    "sampling_rate",
    "audio_channels",
    "hidden_size",
    "num_filters",
    "num_residual_layers",
    "kernel_size",
    "last_kernel_size",
    "residual_kernel_size",
    "dilation_growth_rate",
    "compress",
    "codebook_size",
    "num_quantizers",
    "num_semantic_quantizers",
    "vector_quantization_hidden_dimension",
    "upsample_groups",
    "num_hidden_layers",
    "intermediate_size",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "norm_eps",
    "frame_rate",
)


@auto_docstring(
    checkpoint="kyutai/mimi",
    custom_intro="""
    The defaults give the codec of the paper (Moshi §3.3, arXiv 2410.00037): 24 kHz mono, 12.5 frames per second, 8
    codebooks of 2,048 entries, 1.1 kbit/s. Keys that stock transformers also has keep their names, so the
    `config.json` of `kyutai/mimi` loads as it is, and stock reads ours.
    """,
)
@strict
class MimiConfig(PreTrainedConfig):
    r"""
    sampling_rate (`int`, *optional*, defaults to 24000):
        Rate of the audio in Hz.
    audio_channels (`int`, *optional*, defaults to 1):
        Number of audio channels.
    hidden_size (`int`, *optional*, defaults to 512):
        Width of the latents and of both transformers.
    num_filters (`int`, *optional*, defaults to 64):
        Width of the first SEANet convolution; it doubles at every downsampling.
    num_residual_layers (`int`, *optional*, defaults to 1):
        Residual units per SEANet block.
    upsampling_ratios (`list[int]`, *optional*, defaults to `[8, 6, 5, 4]`):
        Strides of the SEANet decoder, in its order; the encoder uses them reversed.
    kernel_size (`int`, *optional*, defaults to 7):
        Kernel of the first convolution of SEANet's encoder and decoder.
    last_kernel_size (`int`, *optional*, defaults to 3):
        Kernel of the last convolution of SEANet's encoder and decoder.
    residual_kernel_size (`int`, *optional*, defaults to 3):
        Kernel of the dilated convolution in a residual unit.
    dilation_growth_rate (`int`, *optional*, defaults to 2):
        Residual unit `j` of a block has dilation `dilation_growth_rate ** j`.
    use_causal_conv (`bool`, *optional*, defaults to `True`):
        Only `True` works: everything here is causal.
    pad_mode (`str`, *optional*, defaults to `"constant"`):
        How SEANet's convolutions are padded on the left: `"constant"` (zeros) or `"replicate"`.
    compress (`int`, *optional*, defaults to 2):
        A residual unit narrows its width by this factor inside.
    trim_right_ratio (`float`, *optional*, defaults to 1.0):
        Only `1.0` works: a causal transposed convolution is trimmed on the right.
    codebook_size (`int`, *optional*, defaults to 2048):
        Entries per codebook, a power of two.
    codebook_dim (`int`, *optional*, defaults to 256):
        Width of a codebook entry; must equal `vector_quantization_hidden_dimension`.
    num_quantizers (`int`, *optional*, defaults to 8):
        Number of codebooks, semantic ones included. The released checkpoint has 32.
    use_conv_shortcut (`bool`, *optional*, defaults to `False`):
        Whether the skip connection of a residual unit is a 1x1 convolution instead of the identity.
    vector_quantization_hidden_dimension (`int`, *optional*, defaults to 256):
        Width of the space in which a branch quantizes.
    num_semantic_quantizers (`int`, *optional*, defaults to 1):
        Codebooks of the semantic branch; the other branch holds the rest, if any: with all of them here the quantizer
        is not split.
    upsample_groups (`int`, *optional*, defaults to 512):
        Groups of the transposed convolution that leads from frames back to SEANet's rate.
    num_hidden_layers (`int`, *optional*, defaults to 8):
        Layers of each transformer.
    intermediate_size (`int`, *optional*, defaults to 2048):
        Width of the transformers' MLP.
    num_attention_heads (`int`, *optional*, defaults to 8):
        Query heads.
    num_key_value_heads (`int`, *optional*, defaults to 8):
        Key and value heads; must divide `num_attention_heads`.
    head_dim (`int`, *optional*):
        Width of a head, even; `hidden_size // num_attention_heads` if not given.
    hidden_act (`str`, *optional*, defaults to `"gelu"`):
        Activation of the MLP, a key of `transformers.activations.ACT2FN`.
    max_position_embeddings (`int`, *optional*, defaults to 8000):
        Kept for stock's sake. It bounds nothing: attention is windowed and positions are relative.
    initializer_range (`float`, *optional*, defaults to 0.02):
        Standard deviation of freshly initialised linear layers.
    norm_eps (`float`, *optional*, defaults to 1e-5):
        Epsilon of the layer norms.
    use_streaming (`bool`, *optional*, defaults to `False`):
        Only `False` works: a stream is made by `model.stream()`, which keeps its own state.
    rope_parameters (`dict`, *optional*, defaults to `{"rope_type": "default", "rope_theta": 10000.0}`):
        Rotary embedding; only the type `"default"` works, with any `rope_theta`.
    sliding_window (`int`, *optional*, defaults to 250):
        A step sees itself and the `sliding_window - 1` steps before it. The paper says both "250 frames, 20 s"
        and "10 s"; the released weights run their transformers at 25 Hz, where 250 steps are 10 s.
    attention_dropout (`float`, *optional*, defaults to 0.0):
        Dropout of the attention weights while training.
    layer_scale_initial_scale (`float`, *optional*, defaults to 0.01):
        Initial LayerScale.
    attention_bias (`bool`, *optional*, defaults to `False`):
        Whether the attention projections have biases.
    frame_rate (`float`, *optional*):
        Frames per second. Must divide SEANet's rate (`sampling_rate / prod(upsampling_ratios)`, 25 Hz) by a whole
        number; half of that rate if not given: 12.5 Hz.
    quantizer_dropout (`bool`, *optional*, defaults to `True`):
        While training, keep a random number of acoustic codebooks, uniform in 1..K-1, drawn once per batch.
    unquantized_rate (`float`, *optional*, defaults to 0.5):
        While training, the share of sequences whose decoder input skips the quantizer (Moshi §3.3.3).

    Example:

    ```python
    >>> from modeling_mimi import MimiConfig, MimiModel

    >>> config = MimiConfig()
    >>> config.frame_rate, config.frame_size, config.bitrate()
    (12.5, 1920, 1100.0)

    >>> model = MimiModel(config)  # random weights
    ```"""

    model_type = "mimi"

    sampling_rate: int = 24_000
    audio_channels: int = 1
    hidden_size: int = 512
    num_filters: int = 64
    num_residual_layers: int = 1
    upsampling_ratios: list[int] | _Derived = None
    kernel_size: int = 7
    last_kernel_size: int = 3
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = True
    pad_mode: str = "constant"
    compress: int = 2
    trim_right_ratio: float | int = 1.0
    codebook_size: int = 2048
    codebook_dim: int | _Derived = None
    num_quantizers: int = 8
    use_conv_shortcut: bool = False
    vector_quantization_hidden_dimension: int = 256
    num_semantic_quantizers: int = 1
    upsample_groups: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 2048
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int | _Derived = None
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8000
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    use_cache: bool = False
    use_streaming: bool = False
    rope_parameters: dict | _Derived = None
    sliding_window: int = 250
    attention_dropout: float | int = 0.0
    layer_scale_initial_scale: float = 0.01
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    frame_rate: float | int | _Derived = None
    quantizer_dropout: bool = True
    unquantized_rate: float | int = 0.5

    def __post_init__(self, **kwargs):
        self.upsampling_ratios = list(self.upsampling_ratios or [8, 6, 5, 4])
        self.codebook_dim = self.codebook_dim or self.vector_quantization_hidden_dimension
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.frame_rate = self.frame_rate or self.seanet_frame_rate / 2
        self._without_encoder = self._without_decoder = False
        kwargs.pop("_frame_rate", None)  # stock's private spelling of the same field
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the `@strict` validation: reject, naming the field, what this codec cannot do."""
        for name in _POSITIVE:
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        self._validate_convolutions()
        self._validate_transformer()
        self._validate_quantizer()

    def _validate_convolutions(self):
        _require(
            all(r > 0 for r in self.upsampling_ratios), "upsampling_ratios", self.upsampling_ratios, "must be > 0"
        )
        _require(self.use_causal_conv, "use_causal_conv", False, "must be True: only the causal codec exists")
        _require(self.trim_right_ratio == 1, "trim_right_ratio", self.trim_right_ratio, "must be 1.0: causal trimming")
        _require(
            self.pad_mode in ("constant", "replicate"),
            "pad_mode",
            self.pad_mode,
            "must be 'constant' or 'replicate': other modes look into the future",
        )
        _require(self.num_filters % self.compress == 0, "compress", self.compress, "must divide num_filters")
        _require(
            self.hidden_size % self.upsample_groups == 0,
            "upsample_groups",
            self.upsample_groups,
            f"must divide hidden_size={self.hidden_size}",
        )
        _require(
            math.isclose(self.latent_stride * self.frame_rate, self.seanet_frame_rate),
            "frame_rate",
            self.frame_rate,
            f"must divide SEANet's rate of {self.seanet_frame_rate:g} Hz by a whole number",
        )

    def _validate_transformer(self):
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "must be even for rotary embeddings")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_attention_heads={self.num_attention_heads}",
        )
        _require(self.hidden_act in ACT2FN, "hidden_act", self.hidden_act, "must be a key of ACT2FN")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        _require(
            rope_type == "default",
            "rope_parameters",
            rope_type,
            "must have rope_type 'default': positions never leave the window, so there is nothing to scale",
        )
        streams = "must be False: a stream is made by `model.stream()`, which keeps its state itself"
        _require(not self.use_streaming, "use_streaming", True, streams)
        _require(not self.use_cache, "use_cache", True, streams)
        _require(0 <= self.attention_dropout < 1, "attention_dropout", self.attention_dropout, "must be in [0, 1)")

    def _validate_quantizer(self):
        _require(
            self.codebook_size & (self.codebook_size - 1) == 0,
            "codebook_size",
            self.codebook_size,
            "must be a power of two",
        )
        _require(
            self.codebook_dim == self.vector_quantization_hidden_dimension,
            "codebook_dim",
            self.codebook_dim,
            f"must equal vector_quantization_hidden_dimension={self.vector_quantization_hidden_dimension}",
        )
        _require(
            self.num_semantic_quantizers <= self.num_quantizers,
            "num_semantic_quantizers",
            self.num_semantic_quantizers,
            f"must not exceed num_quantizers={self.num_quantizers}",
        )
        _require(0 <= self.unquantized_rate <= 1, "unquantized_rate", self.unquantized_rate, "must be in [0, 1]")

    @property
    def least_quantizers(self) -> int:
        """The fewest codebooks that audio can be coded with: the semantic ones, or one where nothing is split off."""
        return self.num_semantic_quantizers if self.num_semantic_quantizers < self.num_quantizers else 1

    @property
    def seanet_frame_rate(self) -> float:
        """SEANet steps per second, in Hz (25)."""
        return self.sampling_rate / math.prod(self.upsampling_ratios)

    @property
    def encodec_frame_rate(self) -> int:
        """Stock's name for [`seanet_frame_rate`], rounded up as there."""
        return math.ceil(self.seanet_frame_rate)

    @property
    def latent_stride(self) -> int:
        """SEANet steps per frame (2)."""
        return round(self.seanet_frame_rate / self.frame_rate)

    @property
    def frame_size(self) -> int:
        """Audio samples per frame (1920)."""
        return math.prod(self.upsampling_ratios) * self.latent_stride

    @property
    def bits_per_codebook(self) -> int:
        """Bits that one code takes (11)."""
        return self.codebook_size.bit_length() - 1

    @property
    def num_codebooks(self) -> int:
        """Stock's alias of `num_quantizers`."""
        return self.num_quantizers

    def bitrate(self, num_quantizers: int | None = None) -> float:
        """Bits per second with the first `num_quantizers` codebooks, all of them if not given."""
        return self.frame_rate * self.bits_per_codebook * (num_quantizers or self.num_quantizers)

    def num_frames(self, num_samples: int) -> int:
        """Frames that `num_samples` audio samples encode to: the last one may be partly padding."""
        return -(-num_samples // self.frame_size)

    # A dropped half is spelled as in stock transformers: `encoder_config=None`, `"encoder_config": null` on disk.
    @property
    def encoder_config(self) -> "MimiConfig | None":
        """`None` if the model has no encoder, else this config: both halves share every field."""
        return None if self._without_encoder else self

    @encoder_config.setter
    def encoder_config(self, value: None):
        self._drop_half("encoder", value)

    @property
    def decoder_config(self) -> "MimiConfig | None":
        """`None` if the model has no decoder, else this config: both halves share every field."""
        return None if self._without_decoder else self

    @decoder_config.setter
    def decoder_config(self, value: None):
        self._drop_half("decoder", value)

    def _drop_half(self, half: str, value: None):
        _require(value is None, f"{half}_config", value, "can only be None, which drops that half of the model")
        other = "decoder" if half == "encoder" else "encoder"
        _require(
            not getattr(self, f"_without_{other}"),
            f"{half}_config",
            None,
            f"cannot be dropped too: the {other} is gone",
        )
        setattr(self, f"_without_{half}", True)

    def to_dict(self) -> dict:
        """The config as plain values; a dropped half is written as stock does, `"encoder_config": null`."""
        output = super().to_dict()
        for half in ("encoder", "decoder"):
            if output.pop(f"_without_{half}", False):
                output[f"{half}_config"] = None
        return output


def _require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"MimiConfig: `{field}` {rule}, got {value!r}.")


MimiConfig.register_for_auto_class()

__all__ = ["MimiConfig"]
