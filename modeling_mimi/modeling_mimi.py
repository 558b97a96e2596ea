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
Mimi: 24 kHz speech to 12.5 frames per second of 8 codes, and back (Moshi §3.3, arXiv 2410.00037).

The attribute tree is the layout of the files, so a `kyutai/mimi` directory loads key by key and what we save loads in
stock transformers. `B` batch, `C` audio channels, `L` samples, `T` frames, `K` codebooks, `D` width of the latents.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_mimi import MimiConfig
from .modeling_convolution import MimiConv1d, MimiConvTranspose1d
from .modeling_outputs import MimiDecoderOutput, MimiEncoderOutput, MimiOutput
from .modeling_padding import Span, from_left_edge, to_left_edge
from .modeling_pretrained import MimiPreTrainedModel
from .modeling_quantizer import MimiSplitResidualVectorQuantizer, SearchTable
from .modeling_seanet import MimiDecoder, MimiEncoder, MimiSEANet
from .modeling_state import StreamingState
from .modeling_streaming import MimiStream
from .modeling_transformer import MimiTransformer


@auto_docstring(custom_intro="The Mimi neural speech codec.")
class MimiModel(MimiPreTrainedModel):
    _ENCODER_PARTS = ("encoder", "encoder_transformer", "downsample")
    _DECODER_PARTS = ("upsample", "decoder_transformer", "decoder")

    def __init__(self, config: MimiConfig):
        super().__init__(config)
        width, stride = config.hidden_size, config.latent_stride
        self.encoder = self.encoder_transformer = self.downsample = None
        self.decoder = self.decoder_transformer = self.upsample = None
        # CODEPATH: kyutai/mimi has both halves; one saved from half a model, or loaded as half, has one
        if config.encoder_config is not None:
            self.encoder = MimiEncoder(config)
            self.encoder_transformer = MimiTransformer(config)
            if stride > 1:
                self.downsample = MimiConv1d(width, width, 2 * stride, stride, bias=False, pad_mode="replicate")
        # CODEPATH: as above
        if config.decoder_config is not None:
            if stride > 1:
                self.upsample = MimiConvTranspose1d(width, width, stride, groups=config.upsample_groups, bias=False)
            self.decoder_transformer = MimiTransformer(config)
            self.decoder = MimiDecoder(config)
        self.quantizer = MimiSplitResidualVectorQuantizer(config)
        missing = () if self.encoder else self._ENCODER_PARTS
        missing += () if self.decoder else self._DECODER_PARTS
        self._keys_to_ignore_on_load_unexpected = [rf"^{part}\." for part in missing]
        for name, module in self.named_modules():
            if hasattr(module, "state_name"):
                module.state_name = name
        self.post_init()

    def get_encoded_length(self, input_length: Tensor | int) -> Tensor | int:
        """Frames that so many samples encode to."""
        return -(-input_length // self.config.frame_size)

    def get_audio_codes_mask(self, padding_mask: Tensor) -> Tensor:
        """Mask of the frames, (B, T), from that of the samples, (B, L). Left padding gives left padding."""
        num_frames = self.config.num_frames(padding_mask.shape[-1])
        return Span.of_mask(padding_mask).in_frames(self.config.frame_size, num_frames).mask(num_frames)

    # One step of each direction: whole clips, the chunks of long ones and the frames of a stream all come through
    # here.

    def encode_frames(
        self,
        audio: Tensor,
        state: StreamingState | None = None,
        tables: list[SearchTable] | None = None,
        num_quantizers: int | None = None,
    ) -> Tensor:
        """Whole frames of audio, (B, C, T * frame_size), to codes (B, K, T); a state makes it a step of a stream."""
        tables = self.quantizer.search_tables(num_quantizers) if tables is None else tables
        return self.quantizer.encode(self._latents(audio, state)[0], tables)

    def decode_frames(self, audio_codes: Tensor, state: StreamingState | None = None) -> Tensor:
        """Codes (B, K, T) to audio (B, C, T * frame_size). A state makes it the next step of a stream."""
        return self._synthesize(self.quantizer.decode(audio_codes), state)[0]

    def _latents(self, audio: Tensor, state: StreamingState | None = None, **record):
        """(B, C, T * frame_size) to latents (B, T, D) and the transformer's output."""
        if audio.shape[-1] == 0:
            return audio.new_zeros(audio.shape[0], 0, self.config.hidden_size), BaseModelOutput()
        encoder, transformer = self._need("encoder")
        x = encoder(audio.to(self._dtype).transpose(1, 2).contiguous(), state)
        x = transformed = transformer(x, state, **record)
        x = x.last_hidden_state if self.downsample is None else self.downsample(x.last_hidden_state, state)
        if state is not None:
            state.advance(x.shape[1])
        return x, transformed

    def _synthesize(self, quantized: Tensor, state: StreamingState | None = None, **record):
        """Quantized latents (B, T, D) to audio (B, C, T * frame_size) and the transformer's output."""
        frames = quantized.shape[1]
        if frames == 0:
            return quantized.new_zeros(quantized.shape[0], self.config.audio_channels, 0), BaseModelOutput()
        decoder, transformer = self._need("decoder")
        x = quantized.to(self._dtype)
        x = x if self.upsample is None else self.upsample(x, state)
        x = transformed = transformer(x, state, **record)
        x = decoder(x.last_hidden_state, state).transpose(1, 2)
        if state is not None:
            state.advance(frames)
        return x, transformed

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of everything but the quantizer."""
        _, transformer = self._need("decoder" if self.encoder is None else "encoder")
        return transformer.layers[0].mlp.fc1.weight.dtype

    # ---- states and streams

    def new_encoder_state(self, batch_size: int, max_frames: int) -> StreamingState:
        """The state of `batch_size` fresh streams that encode up to `max_frames` at a time."""
        self._need("encoder")
        return self._new_state(self._ENCODER_PARTS, batch_size, max_frames)

    def new_decoder_state(self, batch_size: int, max_frames: int) -> StreamingState:
        """The state of `batch_size` fresh streams that decode up to `max_frames` at a time."""
        self._need("decoder")
        return self._new_state(self._DECODER_PARTS, batch_size, max_frames)

    def _new_state(self, parts: tuple[str, ...], batch_size: int, max_frames: int) -> StreamingState:
        tensors = {"position": torch.zeros(batch_size, dtype=torch.int64, device=self.device)}
        for part in (getattr(self, name) for name in parts):
            for module in () if part is None else part.modules():
                if isinstance(module, MimiTransformer):
                    tensors |= module.new_state(batch_size, max_frames * self.config.latent_stride)
                elif isinstance(module, (MimiConv1d, MimiConvTranspose1d)):
                    tensors |= module.new_state(batch_size)
        return StreamingState(tensors)

    def stream(self, batch_size: int = 1, num_quantizers: int | None = None, max_frames: int = 25) -> MimiStream:
        """
        Begin `batch_size` live streams, see [`MimiStream`]. Longer inputs are taken `max_frames` frames at a time.

        A stream holds the codebooks as they are now: after changing the weights, begin a new one.
        """
        return MimiStream(self, batch_size, num_quantizers, max_frames)

    def _need(self, half: str) -> tuple[MimiSEANet, MimiTransformer]:
        """SEANet and the transformer of a half; `ValueError` if the model was loaded without it."""
        seanet, transformer = getattr(self, half), getattr(self, f"{half}_transformer")
        if seanet is None:
            raise ValueError(
                f"This model was loaded without its {half} (`{half}_config=None`): load it with both halves."
            )
        return seanet, transformer

    def _chunk_frames(self, chunk_frames: int | None, recording: bool) -> int | None:
        """Frames per chunk, `None` for the whole at once."""
        if recording or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        # 10 s are enough to read the weights rarely; elsewhere it takes more to keep the device busy
        return chunk_frames or (125 if self.device.type == "cpu" else 1500)

    # ---- the public directions

    @can_return_tuple
    def encode(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        output_latents: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        chunk_frames: int | None = None,
    ) -> MimiEncoderOutput:
        r"""
        Encode audio to codes.

        A clip's codes do not depend on its batch or on its padding, left or right. Without gradients, long audio is
        taken in chunks over a state: the result is that of the whole, in bounded memory.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`):
                Waveform in [-1, 1] at `config.sampling_rate` Hz, any length.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*):
                True or 1 on the samples of a clip.
            num_quantizers (`int`, *optional*):
                Use the first so many codebooks; all if not given.
            output_latents (`bool`, *optional*):
                Also return the latents before quantization and what each branch made of them.
            output_hidden_states, output_attentions (`bool`, *optional*):
                Also return those of the transformer; the clip is then taken whole.
            chunk_frames (`int`, *optional*):
                Frames per chunk; chosen by device if not given.

        Raises:
            ValueError: the model has no encoder, or a shape, a dtype or `num_quantizers` does not fit; it says which.
        """
        self._need("encoder")
        self._check_audio(input_values, padding_mask)
        record = self._record(output_hidden_states, output_attentions)
        audio, span, num_frames = self._aligned_audio(input_values, padding_mask)
        tables = self.quantizer.search_tables(num_quantizers)
        chunk = self._chunk_frames(chunk_frames, any(record.values())) or num_frames
        state = self.new_encoder_state(audio.shape[0], chunk) if num_frames > chunk else None
        codes, latents, semantic, acoustic = [], [], [], []
        for part in audio.split(max(chunk, 1) * self.config.frame_size, dim=-1):
            part_latents, transformed = self._latents(part, state, **record)
            quantized = self.quantizer(part_latents, tables)
            codes.append(quantized.audio_codes)
            if output_latents:
                latents.append(part_latents)
                semantic.append(quantized.semantic_quantized)
                acoustic.append(quantized.acoustic_quantized)
        codes = torch.cat(codes, dim=-1)
        return MimiEncoderOutput(
            audio_codes=codes if padding_mask is None else from_left_edge(codes, span, num_frames),
            audio_codes_mask=span.mask(num_frames),
            latents=_joined(latents),
            semantic_quantized=_joined(semantic),
            acoustic_quantized=_joined(acoustic),
            hidden_states=transformed.hidden_states,
            attentions=transformed.attentions,
        )

    @can_return_tuple
    def decode(
        self,
        audio_codes: Tensor,
        padding_mask: Tensor | None = None,
        audio_codes_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        chunk_frames: int | None = None,
    ) -> MimiDecoderOutput:
        r"""
        Decode codes to audio, `config.frame_size` samples per frame.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`):
                Codes of the first `num_quantizers` codebooks, all of them or fewer.
            padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*):
                The mask that the audio was encoded with: the output then lies as the input did, cut to its length.
            audio_codes_mask (`torch.Tensor` of shape `(batch_size, num_frames)`, *optional*):
                True on the frames of a clip, where only that is known.
            output_hidden_states, output_attentions (`bool`, *optional*):
                Also return those of the transformer; the clip is then taken whole.
            chunk_frames (`int`, *optional*):
                Frames per chunk; chosen by device if not given.

        Raises:
            ValueError: the model has no decoder, or a shape, a dtype or a code does not fit; it says which.
        """
        self._need("decoder")
        self._check_codes(audio_codes)
        audio_codes = audio_codes.long()
        record = self._record(output_hidden_states, output_attentions)
        num_frames, frame_size = audio_codes.shape[-1], self.config.frame_size
        samples = frames = None
        if padding_mask is not None:
            samples = Span.of_mask(_per_sample(padding_mask))
            frames = samples.in_frames(frame_size, num_frames)
        if audio_codes_mask is not None:
            frames = Span.of_mask(audio_codes_mask)
        if frames is not None:
            audio_codes = to_left_edge(audio_codes, frames)
            samples = samples or frames.in_samples(frame_size)
        chunk = self._chunk_frames(chunk_frames, any(record.values())) or num_frames
        state = self.new_decoder_state(audio_codes.shape[0], chunk) if num_frames > chunk else None
        audio = []
        for part in audio_codes.split(max(chunk, 1), dim=-1):
            part_audio, transformed = self._synthesize(self.quantizer.decode(part), state, **record)
            audio.append(part_audio)
        audio = torch.cat(audio, dim=-1)
        if samples is not None:
            length = num_frames * frame_size if padding_mask is None else padding_mask.shape[-1]
            audio = from_left_edge(audio, samples, length)
        return MimiDecoderOutput(
            audio_values=audio, hidden_states=transformed.hidden_states, attentions=transformed.attentions
        )

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_values: Tensor | None = None,
        padding_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        audio_codes: Tensor | None = None,
        output_latents: bool = False,
        unquantized: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MimiOutput:
        r"""
        input_values (`torch.FloatTensor` of shape `(batch_size, audio_channels, num_samples)`, *optional*):
            Waveform in [-1, 1] at `config.sampling_rate` Hz. Not needed with `audio_codes`, which are then decoded.
        padding_mask (`torch.Tensor` of shape `(batch_size, num_samples)`, *optional*):
            True or 1 on the samples of a clip.
        num_quantizers (`int`, *optional*):
            Use the first so many codebooks. If not given: all; in training mode, with `config.quantizer_dropout`, the
            semantic ones and a random number of acoustic ones. Give it when several processes must draw alike.
        audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`, *optional*):
            Codes to decode instead of encoding `input_values`.
        output_latents (`bool`, *optional*):
            Also return what lies between the encoder and the decoder.
        unquantized (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
            Only in training mode: clips whose decoder gets the projected latents themselves (Moshi §3.3.3). Drawn at
            `config.unquantized_rate` if not given.

        Example:

        ```python
        >>> import torch
        >>> from modeling_mimi import MimiConfig, MimiModel

        >>> model = MimiModel(MimiConfig()).eval()
        >>> with torch.no_grad():
        ...     output = model(torch.zeros(1, 1, 24000))
        >>> output.audio_codes.shape, output.audio_values.shape
        (torch.Size([1, 8, 13]), torch.Size([1, 1, 24000]))
        ```"""
        record = {name: kwargs.pop(name, None) for name in ("output_hidden_states", "output_attentions")}
        if kwargs:
            raise TypeError(f"MimiModel does not take {sorted(kwargs)}.")
        if audio_codes is not None:
            decoded = self.decode(audio_codes, padding_mask, **record)
            return _output_of(MimiEncoderOutput(audio_codes=audio_codes), decoded)
        if input_values is None:
            raise ValueError("Give `input_values` to encode and decode, or `audio_codes` to decode.")
        if self.training or torch.is_grad_enabled():
            record = self._record(**record)
            return self._forward_with_gradients(input_values, padding_mask, num_quantizers, unquantized, record)
        encoded = self.encode(input_values, padding_mask, num_quantizers, output_latents, **record)
        decoded = self.decode(encoded.audio_codes, padding_mask, encoded.audio_codes_mask, **record)
        decoded.audio_values = decoded.audio_values[..., : input_values.shape[-1]]
        return _output_of(encoded, decoded)

    def _forward_with_gradients(
        self,
        input_values: Tensor,
        padding_mask: Tensor | None,
        num_quantizers: int | None,
        unquantized: Tensor | None,
        record: dict[str, bool],
    ) -> MimiOutput:
        """Audio to audio in one graph, through the straight-through quantizer and, in training, its noise."""
        self._need("encoder")
        self._need("decoder")
        self._check_audio(input_values, padding_mask)
        audio, span, num_frames = self._aligned_audio(input_values, padding_mask)
        latents, encoded = self._latents(audio, None, **record)
        if not self.training:
            unquantized = None
        else:
            # CODEPATH: a switch of training; checkpoints do not differ in it
            if num_quantizers is None and self.config.quantizer_dropout:
                split = self.config.num_semantic_quantizers < self.config.num_quantizers
                least = self.config.least_quantizers + split
                # on the CPU's generator: no device sync
                num_quantizers = int(torch.randint(least, self.config.num_quantizers + 1, ()))
            if unquantized is None:
                unquantized = torch.rand(latents.shape[0], device=latents.device) < self.config.unquantized_rate
        quantization = self.quantizer(latents, self.quantizer.search_tables(num_quantizers), unquantized)
        reconstruction, decoded = self._synthesize(quantization.quantized, None, **record)
        length = input_values.shape[-1]
        codes = quantization.audio_codes
        if padding_mask is not None:
            codes = from_left_edge(codes, span, num_frames)
            reconstruction = from_left_edge(reconstruction, Span.of_mask(_per_sample(padding_mask)), length)
        return MimiOutput(
            audio_codes=codes,
            audio_values=reconstruction[..., :length],
            audio_codes_mask=span.mask(num_frames),
            latents=latents,
            semantic_quantized=quantization.semantic_quantized,
            acoustic_quantized=quantization.acoustic_quantized,
            residuals=quantization.residuals,
            centroids=quantization.centroids,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
        )

    # ---- arguments

    def _aligned_audio(self, input_values: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Span, int]:
        """The clips on the left edge, filled up to whole frames; where their frames belong; and how many."""
        batch_size, _, length = input_values.shape
        num_frames = self.config.num_frames(length)
        if padding_mask is None:
            zeros = torch.zeros(batch_size, dtype=torch.int64, device=input_values.device)
            span = Span(zeros, zeros + num_frames)
        else:
            samples = Span.of_mask(_per_sample(padding_mask))
            input_values = to_left_edge(input_values, samples)
            span = samples.in_frames(self.config.frame_size, num_frames)
        missing = num_frames * self.config.frame_size - length
        return nn.functional.pad(input_values, (0, missing)), span, num_frames

    def _record(self, output_hidden_states: bool | None, output_attentions: bool | None) -> dict[str, bool]:
        """What to record, from the arguments or else the config."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return {"with_hidden_states": bool(output_hidden_states), "with_attentions": bool(output_attentions)}

    def _check_audio(self, audio: Tensor, padding_mask: Tensor | None) -> None:
        channels = self.config.audio_channels
        if audio.dim() != 3 or audio.shape[1] != channels:
            raise ValueError(
                f"`input_values` must have shape (batch_size, {channels}, num_samples), got {tuple(audio.shape)}: "
                "`MimiFeatureExtractor` makes it from any audio."
            )
        if not audio.is_floating_point():
            raise ValueError(f"`input_values` must be floating point in [-1, 1], got {audio.dtype}: scale it first.")
        if padding_mask is not None and _per_sample(padding_mask).shape != (audio.shape[0], audio.shape[-1]):
            raise ValueError(
                f"`padding_mask` must have shape {(audio.shape[0], audio.shape[-1])}, got {tuple(padding_mask.shape)}."
            )

    def _check_codes(self, codes: Tensor) -> None:
        least, most, size = self.config.least_quantizers, self.config.num_quantizers, self.config.codebook_size
        if codes.dim() != 3 or not least <= codes.shape[1] <= most:
            raise ValueError(
                f"`audio_codes` must have shape (batch_size, {least} to {most} codebooks, num_frames), "
                f"got {tuple(codes.shape)}."
            )
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"`audio_codes` must be integers, got {codes.dtype}.")
        # elsewhere the check would wait for the device
        if codes.device.type == "cpu" and not torch.compiler.is_compiling() and codes.numel():
            low, high = codes.aminmax()
            if low < 0 or high >= size:
                raise ValueError(f"`audio_codes` must be from 0 to {size - 1}, got {low} to {high}.")


def _per_sample(mask: Tensor) -> Tensor:
    """A mask as (B, L); stock also knows (B, C, L)."""
    return mask[:, 0] if mask.dim() == 3 else mask


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim=1) if present else None


def _output_of(encoded: MimiEncoderOutput, decoded: MimiDecoderOutput) -> MimiOutput:
    return MimiOutput(
        **encoded,
        audio_values=decoded.audio_values,
        decoder_hidden_states=decoded.hidden_states,
        decoder_attentions=decoded.attentions,
    )


MimiModel.register_for_auto_class("AutoModel")

__all__ = ["MimiModel", "MimiPreTrainedModel"]
