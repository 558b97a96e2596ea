# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""Feature extraction of Mimi: any clip, at any rate and in any sample format, becomes a padded batch and its mask.

Shapes: `B` clips, `C` audio channels, `L` samples.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType

try:
    import soxr
except ImportError:  # needed only where a rate differs; the other inputs work without it
    soxr = None

# PCM formats: the sample that stands for silence, and the distance from there to full scale.
_PCM = {"uint8": (128, 2**7), "int16": (0, 2**15), "int32": (0, 2**31)}
_DTYPES = (*_PCM, "float16", "float32", "float64")

# A 2-D array with more channels than 7.1 sound has is far more likely a batch.
_MAX_CHANNELS = 8

# At "HQ" soxr's error stays below -120 dB, under the noise of 16-bit sound (-98 dB), so "VHQ" would only cost more.
# It is also the default of librosa and of transformers' `load_audio`: a clip is the same whoever resampled it.
_QUALITY = "HQ"


@runtime_checkable
class AudioDecoder(Protocol):
    """A clip that is decoded on demand: torchcodec's decoder, which `datasets` gives for a row of an audio column."""

    def get_all_samples(self) -> Any:
        """Decode the clip: an object with `data`, a `(C, L)` tensor, and `sample_rate` in Hz."""
        ...


AudioClip = np.ndarray | torch.Tensor | Sequence | Mapping[str, Any] | AudioDecoder


class MimiFeatureExtractor(SequenceFeatureExtractor):
    r"""Prepares audio for a [`MimiModel`]: scales PCM, mixes channels, resamples, pads, and marks the padding.

    It takes the place of the stock [`EncodecFeatureExtractor`] that `kyutai/mimi` names: it reads the same
    `preprocessor_config.json`, writes one that stock reads, and gives the same values for the float clips that stock
    takes.

    Args:
        feature_size (`int`, *optional*, defaults to 1):
            Audio channels `C` of the output: 1 for mono, 2 for stereo.
        sampling_rate (`int`, *optional*, defaults to 24000):
            Rate of the output in Hz.
        padding_value (`float`, *optional*, defaults to 0.0):
            Value of the samples that padding adds.
        padding_side (`str`, *optional*, defaults to `"right"`):
            Side that padding is added on, `"right"` or `"left"`.
        chunk_length_s (`float`, *optional*):
            Stock's key; only `None` works.
        overlap (`float`, *optional*):
            Stock's key; only `None` works.
        kwargs (*optional*):
            Further keys of a `preprocessor_config.json`. `return_attention_mask` (`bool`, defaults to `True`) says
            whether the output holds a `padding_mask`.

    Raises:
        `ValueError`: If an argument is out of range, or chunks are asked for.

    Example:
    ```python
    >>> import numpy as np
    >>> from modeling_mimi.feature_extraction_mimi import MimiFeatureExtractor

    >>> feature_extractor = MimiFeatureExtractor()
    >>> clips = [np.zeros(48_000, dtype=np.int16), np.zeros((2, 24_000), dtype=np.float32)]
    >>> inputs = feature_extractor(clips, sampling_rate=48_000, return_tensors="pt")
    >>> inputs["input_values"].shape, inputs["padding_mask"].sum(-1)
    (torch.Size([2, 1, 24000]), tensor([24000, 12000]))
    ```
    """

    model_input_names = ["input_values", "padding_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 24_000,
        padding_value: float = 0.0,
        padding_side: str = "right",
        chunk_length_s: float | None = None,
        overlap: float | None = None,
        **kwargs,
    ):
        if chunk_length_s is not None or overlap is not None:
            raise ValueError(
                "`chunk_length_s` and `overlap` must be None: Mimi is causal and streams exactly, so long audio needs "
                "no overlapping chunks."
            )
        super().__init__(
            feature_size=_check_count(feature_size, "feature_size"),
            sampling_rate=_check_rate(sampling_rate, "`sampling_rate`"),
            padding_value=padding_value,
            padding_side=_check_side(padding_side),
            **kwargs,
        )
        self.chunk_length_s = None
        self.overlap = None

    def __call__(
        self,
        raw_audio: AudioClip | Sequence[AudioClip],
        sampling_rate: float | None = None,
        *,
        padding: bool | str | PaddingStrategy | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        r"""Turn one clip, or a list of clips, into the input of the model.

        A clip is a NumPy array, a torch tensor (on any device), a list of floats, a mapping with the keys `"array"`
        and `"sampling_rate"`, or an audio decoder; the last two are what `datasets` gives. Clips of one list may
        differ in kind, rate, dtype and channels. Samples are floats (`bfloat16` too), which keep their range and
        should be in [-1, 1], or PCM as `uint8`, `int16` or `int32`, which is scaled to [-1, 1].

        A 2-D array is always **one** clip: its shorter axis holds the channels, 8 at most, so both `(C, L)` and
        soundfile's `(L, C)` work. Pass a batch as a list of clips.

        With `feature_size=1` the channels of a clip are averaged. With more, mono is repeated, and other clips must
        have exactly `feature_size` channels. Then soxr resamples what is not at `self.sampling_rate`: `L` samples at
        rate `r` become `L * self.sampling_rate / r`, rounded.

        Args:
            raw_audio (`np.ndarray`, `torch.Tensor`, `Sequence`, `Mapping` or `AudioDecoder`):
                One clip, or a sequence of clips.
            sampling_rate (`float`, *optional*):
                Rate in Hz of every clip that does not carry its own. Unlike stock, which takes such a clip as it is,
                a clip without any rate is an error.
            padding (`bool`, `str` or [`~utils.PaddingStrategy`], *optional*, defaults to `True`):
                `True` or `"longest"` pads to the longest clip; `"max_length"` pads to `max_length`, or to the longest
                clip if that is longer; `False` or `"do_not_pad"` leaves every clip its length.
            truncation (`bool`, *optional*, defaults to `False`):
                Whether clips are cut after `max_length` samples. Unlike in stock, it goes with every `padding`.
            max_length (`int`, *optional*):
                Length in samples at `self.sampling_rate` that `truncation` and `padding="max_length"` use.
            pad_to_multiple_of (`int`, *optional*):
                Round the padded length up to a multiple of this, `max_length` too; 1920 gives whole frames of Mimi.
            padding_side (`str`, *optional*, defaults to `self.padding_side`):
                Side that padding is added on, `"right"` or `"left"`.
            return_tensors (`str` or [`~utils.TensorType`], *optional*):
                `"pt"` for torch tensors, `"np"` or nothing for NumPy arrays.

        Returns:
            [`BatchFeature`]: With the fields

            - **input_values** -- `(B, C, L)`, `float32`. Without padding and without `return_tensors`, a list of
              `(C, L)` arrays.
            - **padding_mask** -- `(B, L)`, `int32`: 1 on samples of the clip, 0 on padding. As in stock it is left out
              without padding, and unlike in stock with `return_attention_mask=False`.

        Raises:
            `ValueError`: If a clip is empty, not finite, of the wrong rank or channel count, without a rate or with
                two; if the batch is empty; if an argument is out of range.
            `TypeError`: If the kind of a clip or its dtype is not supported.
            `ImportError`: If a clip must be resampled and soxr is not installed.
        """
        strategy = self._get_padding_strategies(True if padding is None else padding, max_length)
        side = _check_side(self.padding_side if padding_side is None else padding_side)
        multiple = 1 if pad_to_multiple_of is None else _check_count(pad_to_multiple_of, "pad_to_multiple_of")
        limit = None if max_length is None else _round_up(_check_count(max_length, "max_length"), multiple)
        if truncation and limit is None:
            raise ValueError("`truncation=True` needs `max_length`, the number of samples to keep.")

        waveforms = [
            self._prepare(clip, sampling_rate, f"Clip {index}") for index, clip in enumerate(_split_batch(raw_audio))
        ]
        if truncation:
            waveforms = [waveform[:, :limit] for waveform in waveforms]
        if strategy is PaddingStrategy.DO_NOT_PAD:
            return BatchFeature({"input_values": waveforms}, tensor_type=return_tensors)

        length = _round_up(max(waveform.shape[1] for waveform in waveforms), multiple)
        if strategy is PaddingStrategy.MAX_LENGTH and limit is not None:
            length = max(length, limit)
        return BatchFeature(self._collate(waveforms, length, side), tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, under the class name that makes stock transformers load them."""
        return {**super().to_dict(), "feature_extractor_type": "EncodecFeatureExtractor"}

    def _prepare(self, clip: AudioClip, sampling_rate: float | None, name: str) -> np.ndarray:
        """One clip as `(C, L)` float32 samples at `self.sampling_rate`."""
        samples, own_rate = _unpack(clip, name)
        rate = _choose_rate(own_rate, sampling_rate, name)
        waveform = self._mix(_to_waveform(samples, name), name)
        return _resample(waveform, rate, self.sampling_rate, name)

    def _mix(self, waveform: np.ndarray, name: str) -> np.ndarray:
        """Bring a waveform to `self.feature_size` channels."""
        channels = waveform.shape[0]
        if channels == self.feature_size:
            return waveform
        if self.feature_size == 1:
            return waveform.mean(axis=0, keepdims=True)
        if channels == 1:
            return waveform.repeat(self.feature_size, axis=0)
        raise ValueError(
            f"{name} has {channels} channels and `feature_size` is {self.feature_size}: pass that many channels, or "
            "one, which is repeated."
        )

    def _collate(self, waveforms: list[np.ndarray], length: int, side: str) -> dict[str, np.ndarray]:
        """Pad waveforms of at most `length` samples into one batch."""
        input_values = np.full((len(waveforms), self.feature_size, length), self.padding_value, dtype=np.float32)
        padding_mask = np.zeros((len(waveforms), length), dtype=np.int32)
        for values, mask, waveform in zip(input_values, padding_mask, waveforms, strict=True):
            samples = waveform.shape[1]
            real = slice(samples) if side == "right" else slice(length - samples, length)
            values[:, real] = waveform
            mask[real] = 1
        batch = {"input_values": input_values}
        return {**batch, "padding_mask": padding_mask} if self.return_attention_mask else batch


def _split_batch(raw_audio: AudioClip | Sequence[AudioClip]) -> Sequence[AudioClip]:
    """The clips of `raw_audio`: a sequence is a batch unless it holds numbers."""
    if not isinstance(raw_audio, Sequence) or isinstance(raw_audio, str | bytes):
        return [raw_audio]
    clips = list(raw_audio)  # once, as every look into a column of `datasets` reads the clip anew
    if not clips:
        raise ValueError("The batch is empty: pass at least one clip.")
    return [clips] if isinstance(clips[0], Real) else clips


def _unpack(clip: AudioClip, name: str) -> tuple[Any, Any]:
    """The samples of a clip, and the rate that it carries, if any."""
    if isinstance(clip, Mapping):
        if clip.get("array") is None:
            raise ValueError(
                f'{name} is a mapping without samples under "array" (keys: {list(clip)}): decode it first; in '
                "`datasets` this is `cast_column(..., Audio(decode=True))`."
            )
        return clip["array"], clip.get("sampling_rate")
    if isinstance(clip, AudioDecoder):
        decoded = clip.get_all_samples()
        return decoded.data, decoded.sample_rate
    return clip, None


def _choose_rate(own_rate: Any, given_rate: Any, name: str) -> float:
    """The rate of a clip in Hz: its own, else the one given for the call; they must not differ."""
    if own_rate is None and given_rate is None:
        raise ValueError(
            f'{name} has no sampling rate: pass `sampling_rate=` in Hz, or {{"array": ..., "sampling_rate": ...}} as '
            "the clip."
        )
    given = [rate for rate in (own_rate, given_rate) if rate is not None]
    rates = [_check_rate(rate, f"The sampling rate of {name.lower()}") for rate in given]
    if len(set(rates)) == 2:
        raise ValueError(
            f"{name} carries a sampling rate of {rates[0]:g} Hz and the call says {rates[1]:g} Hz: leave out the "
            "argument, or correct the clip."
        )
    return rates[0]


def _to_array(samples: Any, name: str) -> np.ndarray:
    """Samples of any supported kind as an array, in their dtype as far as NumPy has it."""
    if isinstance(samples, torch.Tensor):
        samples = samples.float() if samples.is_floating_point() else samples  # NumPy has no bfloat16
        return samples.numpy(force=True)
    if isinstance(samples, Sequence) and not isinstance(samples, str | bytes):
        try:
            return np.asarray(samples)
        except ValueError as error:
            raise ValueError(f"{name} is a ragged nested list: give every channel the same length.") from error
    if not isinstance(samples, np.ndarray):
        raise TypeError(
            f"{name} is a {type(samples).__name__}: pass its samples as a NumPy array, a torch tensor or a list of "
            "floats; `soundfile.read` gives those of a file."
        )
    return samples


def _to_waveform(samples: Any, name: str) -> np.ndarray:
    """Samples of any supported kind, dtype and layout as a new `(C, L)` float32 array."""
    array = _to_array(samples, name)
    dtype = array.dtype.name
    if dtype not in _DTYPES:
        raise TypeError(
            f"{name} has samples of dtype {dtype}: convert them to floats in [-1, 1], or to PCM as {', '.join(_PCM)}."
        )
    if array.ndim not in (1, 2):
        raise ValueError(
            f"{name} has {array.ndim} dimensions, shape {array.shape}: a clip is (L,), (C, L) or (L, C); pass a batch "
            "as a list of clips."
        )
    if array.size == 0:
        raise ValueError(f"{name} is empty, shape {array.shape}: remove it from the batch.")

    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is rejected below
        waveform = array.astype(np.float32)
    if dtype in _PCM:
        silence, full_scale = _PCM[dtype]
        waveform = (waveform - silence) / full_scale
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name} has NaN or infinite samples: repair or remove it.")
    return _channels_first(waveform, name)


def _channels_first(waveform: np.ndarray, name: str) -> np.ndarray:
    """`(L,)`, `(C, L)` or `(L, C)` as `(C, L)`; the shorter axis holds the channels."""
    if waveform.ndim == 1:
        return waveform[None]  # (1, L)
    if waveform.shape[0] > waveform.shape[1]:
        waveform = waveform.T  # (C, L)
    if waveform.shape[0] > _MAX_CHANNELS:
        raise ValueError(
            f"{name} would have {waveform.shape[0]} channels, more than {_MAX_CHANNELS}: pass a batch as a list of "
            "clips, not as one 2-D array."
        )
    return waveform


def _resample(waveform: np.ndarray, source_rate: float, target_rate: float, name: str) -> np.ndarray:
    """Bring a `(C, L)` waveform from one rate to another, both in Hz."""
    if source_rate == target_rate:
        return waveform
    if soxr is None:
        raise ImportError(
            f"{name} is at {source_rate:g} Hz and must be resampled to {target_rate:g} Hz: `pip install soxr`, or "
            "pass it at that rate."
        )
    resampled = soxr.resample(waveform.T, source_rate, target_rate, quality=_QUALITY).T  # (C, L')
    if resampled.shape[1] == 0:
        raise ValueError(f"{name} is too short: at {target_rate:g} Hz no sample is left. Remove it from the batch.")
    return resampled


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _check_rate(rate: Any, name: str) -> Any:
    if isinstance(rate, np.ndarray | torch.Tensor) and rate.ndim == 0:
        rate = rate.item()  # a formatted data set of `datasets` wraps its numbers
    if isinstance(rate, bool) or not isinstance(rate, Real) or not math.isfinite(rate) or rate <= 0:
        raise ValueError(f"{name} must be a positive number of Hz, got {rate!r}.")
    return rate


def _check_count(count: Any, name: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {count!r}.")
    return int(count)


def _check_side(side: Any) -> str:
    if side not in ("right", "left"):
        raise ValueError(f"`padding_side` must be 'right' or 'left', got {side!r}.")
    return side


MimiFeatureExtractor.register_for_auto_class()

__all__ = ["MimiFeatureExtractor"]
