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
Pipelines of Mimi: `audio-to-codes`, `codes-to-audio` and `audio-to-audio`, and how a saved model comes to offer them.

`B` clips of a batch, `C` audio channels, `L` samples at the model's rate, `K` codebooks, `T` frames. Clips are padded
here and not by the collation of transformers, which knows neither `(C, L)` nor `(K, T)`: zeros on the right, which a
causal codec needs no mask for, and what they became is cut off again.
"""

import io
import json
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Pipeline, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME

from .feature_extraction_mimi import AudioDecoder, MimiFeatureExtractor

try:
    import soundfile
except (ImportError, OSError):  # needed only for paths and bytes; without libsndfile it is an OSError
    soundfile = None

# Anything to a type checker: each pipeline gives its methods parameters that the base class does not name.
_Pipeline: Any = Pipeline


class MimiPipeline(_Pipeline):
    """
    What the three pipelines share.

    One input gives one output, and a list (or a tuple) a list. Whatever else can be iterated gives an iterator that
    reads as it goes: a generator, a `KeyDataset`, the column of a data set, streaming or not. `batch_size` clips then
    go through the model at a time; outputs are those that each clip has alone.

    Args:
        model ([`MimiModel`]):
            The model; half of one is enough where only that half is used.
        feature_extractor ([`MimiFeatureExtractor`], *optional*):
            What prepares the audio; made from the config of the model if not given.
        kwargs (*optional*):
            Those of [`Pipeline`] (`device`, `batch_size`, `num_workers`), and defaults for the arguments of a call.

    Raises:
        `TypeError`: If the model is another one, stock transformers' Mimi included.
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    # not loaded either: all that matters of it is in the config, and the files name stock's, which does not resample
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self, model: PreTrainedModel, feature_extractor: MimiFeatureExtractor | None = None, **kwargs
    ) -> None:
        if not hasattr(model, "encode_frames"):  # as remote code, the class is another one than this package's
            raise TypeError(
                f"{type(self).__name__} needs the MimiModel that it came with, got "
                f"{type(model).__module__}.{type(model).__name__}: load it with `trust_remote_code=True`, or call "
                "`modeling_mimi.register()` first."
            )
        if feature_extractor is None:
            feature_extractor = MimiFeatureExtractor(model.config.audio_channels, model.config.sampling_rate)
        super().__init__(model=model, feature_extractor=feature_extractor, **kwargs)

    def __call__(self, inputs: Any, **kwargs) -> Any:
        one = (str, bytes, bytearray, memoryview, Mapping, np.ndarray, Tensor)
        if isinstance(inputs, list | tuple):
            inputs = list(inputs)
            return super().__call__(inputs, **kwargs) if inputs else []
        if isinstance(inputs, Iterable) and not isinstance(inputs, (*one, Dataset, types.GeneratorType)):
            inputs = (item for item in inputs)  # the form of a stream that transformers knows
        return super().__call__(inputs, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Save the model, its feature extractor and all three pipelines, see [`save_pipelines`].

        Args:
            save_directory (`str` or `os.PathLike`):
                Where to; it is made if it is not there.
            kwargs (*optional*):
                Those of the model's `save_pretrained`, without `push_to_hub`.

        Raises:
            `ValueError`: If it is asked to push: only `pipe.push_to_hub(repo_id)` pushes every file.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("`push_to_hub=True` would leave files behind: call `pipe.push_to_hub(repo_id)` instead.")
        self.model.save_pretrained(save_directory, **kwargs)
        self.feature_extractor.save_pretrained(save_directory)
        save_pipelines(save_directory)

    def _stacked(self, clips: np.ndarray | list[np.ndarray]) -> Tensor:
        """Clips (C, L) or (K, T), or the only one, as one padded batch on the device."""
        rows = [torch.from_numpy(clip).T for clip in _listed(clips)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).to(self.device)

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any]:
        """A decoded clip as text-to-audio pipelines give it."""
        audio = model_outputs["audio"][0].numpy().copy()  # (C, L), no longer a part of its batch
        return {"audio": audio[0] if len(audio) == 1 else audio, "sampling_rate": self.model.config.sampling_rate}


class MimiAudioPipeline(MimiPipeline):
    """What the two pipelines share that audio goes into."""

    def preprocess(self, input_: Any, sampling_rate: float | None = None) -> dict[str, np.ndarray]:
        """One clip in any form as (C, L) samples at the model's rate."""
        clip = _readable(input_)
        if not isinstance(clip, Mapping | AudioDecoder):
            rate = self.feature_extractor.sampling_rate if sampling_rate is None else sampling_rate
            clip = {"array": clip, "sampling_rate": rate}
        return {"audio": self.feature_extractor([clip], sampling_rate, padding=False)["input_values"][0]}

    def _sanitize_audio_parameters(
        self, sampling_rate: float | None, num_quantizers: int | None, chunk_frames: int | None
    ) -> tuple[dict, dict]:
        self.model.quantizer.check_num_quantizers(num_quantizers)
        return _given(sampling_rate=sampling_rate), _given(num_quantizers=num_quantizers, chunk_frames=chunk_frames)


class MimiAudioToCodesPipeline(MimiAudioPipeline):
    """
    Encodes audio: `pipeline("audio-to-codes", model=...)`.

    A clip is any of

    - the path of an audio file, or the bytes of one, in a format that libsndfile reads;
    - a NumPy array or a torch tensor, `(L,)`, `(C, L)` or `(L, C)`, floats in [-1, 1] or PCM: as in every audio
      pipeline of transformers, it is taken to be at the model's rate unless `sampling_rate` says otherwise;
    - `{"array": ..., "sampling_rate": ...}`, also with the key `"raw"`;
    - what `datasets` gives for an item of an audio column: an audio decoder, or `{"bytes": ..., "path": ...}`.

    Any rate is resampled and channels are averaged, see [`MimiFeatureExtractor`]. A clip of any length works: long
    ones are taken in chunks over a state, with the result of the whole.

    Arguments of a call, or of the constructor as defaults:

        sampling_rate (`float`, *optional*, defaults to the model's rate):
            Rate in Hz of the clips that do not carry one.
        num_quantizers (`int`, *optional*):
            Use the first so many codebooks; all if not given.
        return_timestamps (`bool`, *optional*, defaults to `False`):
            Also say when each frame begins and ends.
        chunk_frames (`int`, *optional*):
            Frames taken at a time; fewer need less memory. Chosen by device if not given.

    Returns for each clip a `dict`:

    - **audio_codes** (`torch.LongTensor` of shape `(K, T)`) -- Codes on the CPU, semantic first.
    - **frame_rate** (`float`) -- Frames per second.
    - **sampling_rate** (`int`) and **num_samples** (`int`) -- Rate in Hz and length of the clip as it was encoded:
      with the latter, `codes-to-audio` gives a clip of the same length back.
    - **timestamps** (`torch.DoubleTensor` of shape `(T, 2)`) -- Beginning and end of each frame in seconds, only with
      `return_timestamps=True`. The last frame ends with the clip.

    Raises:
        `FileNotFoundError`, `ImportError`, `TypeError`, `ValueError`: If a clip cannot be read or an argument does
            not fit; it says why.

    Example:
    ```python
    >>> import numpy as np
    >>> from modeling_mimi import MimiAudioToCodesPipeline, MimiConfig, MimiModel

    >>> encode = MimiAudioToCodesPipeline(MimiModel(MimiConfig()), device="cpu")
    >>> encode(np.zeros(16_000), sampling_rate=16_000, num_quantizers=4)["audio_codes"].shape
    torch.Size([4, 13])
    ```
    """

    def _sanitize_parameters(
        self,
        sampling_rate: float | None = None,
        num_quantizers: int | None = None,
        return_timestamps: bool | None = None,
        chunk_frames: int | None = None,
    ) -> tuple[dict, dict, dict]:
        preprocess, forward = self._sanitize_audio_parameters(sampling_rate, num_quantizers, chunk_frames)
        return preprocess, forward, _given(return_timestamps=return_timestamps)

    def _forward(self, input_tensors: dict[str, Any], **kwargs) -> dict[str, Any]:
        lengths = [clip.shape[1] for clip in _listed(input_tensors["audio"])]
        codes = self.model.encode(self._stacked(input_tensors["audio"]), **kwargs).audio_codes
        frames = map(self.model.config.num_frames, lengths)
        return {
            "audio_codes": [row[:, :count] for row, count in zip(codes, frames, strict=True)],
            "num_samples": torch.tensor(lengths),
        }

    def postprocess(self, model_outputs: dict[str, Any], return_timestamps: bool = False) -> dict[str, Any]:
        config, num_samples = self.model.config, int(model_outputs["num_samples"][0])
        codes = model_outputs["audio_codes"][0].clone()  # (K, T), no longer a part of its batch
        output = {
            "audio_codes": codes,
            "frame_rate": config.frame_rate,
            "sampling_rate": config.sampling_rate,
            "num_samples": num_samples,
        }
        if return_timestamps:
            edges = torch.arange(codes.shape[-1] + 1) * config.frame_size
            edges = edges.clamp(max=num_samples).double() / config.sampling_rate
            output["timestamps"] = torch.stack((edges[:-1], edges[1:]), dim=-1)  # (T, 2)
        return output


class MimiAudioToAudioPipeline(MimiAudioPipeline):
    """
    Encodes audio and decodes it again, to hear what the codec makes of it: `pipeline("audio-to-audio", model=...)`.

    Takes the clips of [`MimiAudioToCodesPipeline`], and its arguments `sampling_rate`, `num_quantizers` and
    `chunk_frames`. Raises the same errors.

    Returns for each clip a `dict`:

    - **audio** (`np.ndarray` of shape `(L,)`, `(C, L)` if the model has several channels) -- `float32`, nominally in
      [-1, 1], as long as the clip is at the model's rate.
    - **sampling_rate** (`int`) -- The model's rate in Hz.
    """

    def _sanitize_parameters(
        self, sampling_rate: float | None = None, num_quantizers: int | None = None, chunk_frames: int | None = None
    ) -> tuple[dict, dict, dict]:
        return *self._sanitize_audio_parameters(sampling_rate, num_quantizers, chunk_frames), {}

    def _forward(
        self, input_tensors: dict[str, Any], num_quantizers: int | None = None, chunk_frames: int | None = None
    ) -> dict[str, Any]:
        audio = self._stacked(input_tensors["audio"])
        codes = self.model.encode(audio, num_quantizers=num_quantizers, chunk_frames=chunk_frames).audio_codes
        waves = self.model.decode(codes, chunk_frames=chunk_frames).audio_values
        return _cut(waves, [clip.shape[1] for clip in _listed(input_tensors["audio"])])


class MimiCodesToAudioPipeline(MimiPipeline):
    """
    Decodes codes: `pipeline("codes-to-audio", model=...)`.

    The codes of a clip are integers of shape `(K, T)` in a torch tensor or a NumPy array, or a mapping with such
    `"audio_codes"`, like the output of [`MimiAudioToCodesPipeline`]; its `"num_samples"`, if there, is the length that
    the audio is cut to. A tensor or an array `(B, K, T)` by itself is a batch and gives a list of `B` outputs; in a
    list or a mapping `(1, K, T)` and nested lists work, too. Clips of a list may differ in length and in the number of
    codebooks.

    Arguments of a call, or of the constructor as defaults:

        num_quantizers (`int`, *optional*):
            Use at most the first so many codebooks; all that a clip has if not given.
        chunk_frames (`int`, *optional*):
            Frames taken at a time; fewer need less memory. Chosen by device if not given.

    Returns for each clip what [`MimiAudioToAudioPipeline`] returns; without `"num_samples"`, `L` is `T` whole frames.

    Raises:
        `TypeError`, `ValueError`: If codes have the wrong shape or dtype, too many codebooks or codes out of range, or
            an argument does not fit; it says which.
    """

    def __call__(self, inputs: Any, **kwargs) -> Any:
        if isinstance(inputs, np.ndarray | Tensor) and inputs.ndim == 3:
            inputs = list(inputs)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self, num_quantizers: int | None = None, chunk_frames: int | None = None
    ) -> tuple[dict, dict, dict]:
        self.model.quantizer.check_num_quantizers(num_quantizers)
        return _given(num_quantizers=num_quantizers), _given(chunk_frames=chunk_frames), {}

    def preprocess(self, input_: Any, num_quantizers: int | None = None) -> dict[str, Any]:
        """Codes in any form as (K, T), checked, and the length of their audio in samples."""
        fields = input_ if isinstance(input_, Mapping) else {"audio_codes": input_}
        if "audio_codes" not in fields:
            raise ValueError(f'A mapping of codes needs the key "audio_codes", got {list(fields)}.')
        codes = _to_codes(fields["audio_codes"])[:num_quantizers]
        self.model._check_codes(torch.from_numpy(codes)[None])
        num_frames, num_samples = codes.shape[1], fields.get("num_samples")
        if num_samples is None:
            num_samples = num_frames * self.model.config.frame_size
        elif num_frames != (fitting := self.model.config.num_frames(int(num_samples))):
            raise ValueError(
                f"`num_samples` of {int(num_samples)} goes with {fitting} frames, and the codes have {num_frames}: "
                "leave it out if they were changed."
            )
        return {"audio_codes": codes, "num_samples": int(num_samples)}

    def _forward(self, input_tensors: dict[str, Any], chunk_frames: int | None = None) -> dict[str, Any]:
        clips, lengths = _listed(input_tensors["audio_codes"]), _listed(input_tensors["num_samples"])
        waves: dict[int, Tensor] = {}
        for num_quantizers in {len(clip) for clip in clips}:  # 0 is a code: what is missing cannot be padded
            rows = [row for row, clip in enumerate(clips) if len(clip) == num_quantizers]
            codes = self._stacked([clips[row] for row in rows])
            waves |= dict(zip(rows, self.model.decode(codes, chunk_frames=chunk_frames).audio_values, strict=True))
        return _cut([waves[row] for row in range(len(clips))], lengths)


PIPELINES: dict[str, type[MimiPipeline]] = {
    "audio-to-codes": MimiAudioToCodesPipeline,
    "codes-to-audio": MimiCodesToAudioPipeline,
    "audio-to-audio": MimiAudioToAudioPipeline,
}
"""The pipeline of each task."""


def save_pipelines(directory: str | os.PathLike) -> None:
    """
    Let a saved model offer the pipelines: `pipeline(task, model=directory, trust_remote_code=True)`, without this
    package and from the Hub, too.

    The code is copied beside the model's, and `custom_pipelines` in `config.json` names it, next to what is there.
    Files take their places whole, the config last; doing it again changes nothing. How the model itself loads, stock
    or as remote code, stays as it is.

    Args:
        directory (`str` or `os.PathLike`):
            Where [`MimiModel.save_pretrained`] wrote.

    Raises:
        `FileNotFoundError`: If there is no `config.json`.
        `ValueError`: If it is not that of a Mimi whose code was saved along, or another pipeline has one of the tasks.
    """
    directory = Path(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{directory} has no {CONFIG_NAME}: save a MimiModel there first.")
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    if config.get("model_type") != "mimi" or "AutoModel" not in config.get("auto_map", {}):
        raise ValueError(
            f"{directory} does not hold a Mimi with its code: save one there with this package's MimiModel."
        )
    offered = config.setdefault("custom_pipelines", {})
    for task, pipeline_class in PIPELINES.items():
        implementation = f"{__name__.rsplit('.', 1)[-1]}.{pipeline_class.__name__}"
        other = offered.get(task, {}).get("impl", implementation)
        if other.split("--")[-1] != implementation:  # a model from the Hub says `repository--file.class`
            raise ValueError(
                f"{directory} has another pipeline for {task}, {other}: take it out of {CONFIG_NAME} first."
            )
        offered[task] = {"impl": implementation, "pt": ["AutoModel"]}
    with TemporaryDirectory(dir=directory, prefix=".") as part:
        files = [Path(file) for file in custom_object_save(MimiPipeline, part)]
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers writes it
        Path(part, CONFIG_NAME).write_text(text, encoding="utf-8")
        for file in (*files, Path(part, CONFIG_NAME)):
            file.replace(directory / file.name)


def _readable(clip: Any) -> Any:
    """A clip as the feature extractor takes it: files, and bytes of files, are read."""
    holder = "This clip"
    if isinstance(clip, Mapping):
        for key in ("array", "raw"):
            if clip.get(key) is not None:
                return {"array": clip[key], "sampling_rate": clip.get("sampling_rate")}
        holder = f"A clip with the keys {list(clip)}"
        clip = clip.get("bytes") or clip.get("path")
    if clip is None:
        raise ValueError(
            f'{holder} has no audio, nor any under "array", "raw", "bytes" or "path": leave it out, and of a data set '
            'pass the column that holds audio, `dataset["audio"]`.'
        )
    if isinstance(clip, str | os.PathLike):
        return _read(Path(clip).read_bytes(), str(clip))
    return _read(clip, "The bytes") if isinstance(clip, bytes | bytearray | memoryview) else clip


def _read(file: bytes | bytearray | memoryview, name: str) -> dict[str, Any]:
    """Decode an audio file."""
    if soundfile is None:
        raise ImportError(f"{name} must be decoded: `pip install soundfile`, or pass samples and their rate.")
    try:
        samples, rate = soundfile.read(io.BytesIO(file), dtype="float32", always_2d=True)  # (L, C)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}: not audio that libsndfile reads: {error.error_string}") from error
    return {"array": samples, "sampling_rate": rate}


def _to_codes(codes: Any) -> np.ndarray:
    """Codes in any form as an int64 array (K, T), as far as they are integers; the model checks the rest."""
    array = codes.numpy(force=True) if isinstance(codes, Tensor) else np.asarray(codes)
    if array.dtype.kind not in "iu" or array.ndim == 0:
        raise TypeError(
            f"Codes must be integers of shape (K, T), got {array.dtype.name if array.ndim else type(codes).__name__}: "
            'pass a tensor, an array, {"audio_codes": ...}, or the tensor "codes" of a file that `mimi encode` wrote.'
        )
    array = array.astype(np.int64)  # a copy, which can be written to
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def _cut(waves: Iterable[Tensor], lengths: Iterable[int]) -> dict[str, list[Tensor]]:
    """Decoded clips (C, at least L), each cut to its length."""
    return {"audio": [wave[:, :length].float() for wave, length in zip(waves, lengths, strict=True)]}


def _listed(items: Any) -> list[Any]:
    """Items of a batch; without batching, transformers hands on the one itself."""
    return items if isinstance(items, list) else [items]


def _given(**parameters: Any) -> dict[str, Any]:
    """The parameters that a caller gave: the others keep what the constructor was told."""
    return {name: value for name, value in parameters.items() if value is not None}


__all__ = [
    "PIPELINES",
    "MimiAudioToAudioPipeline",
    "MimiAudioToCodesPipeline",
    "MimiCodesToAudioPipeline",
    "save_pipelines",
]
