"""Codecs with residual codebooks: Mimi, ours and stock, EnCodec and DAC.

The codes of the first K codebooks are the first K rows of all codes, so one encoding serves every K. `B` clips, `L`
samples, `K` codebooks, `T` frames.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import modeling_mimi

from .codec_interface import RATE, Coded, check_clips, resample, to_clip


class Network(ABC):
    """A loaded codec, shared by the `CodebookCodec`s that differ in nothing but their number of codebooks."""

    model: Any
    name: str
    sampling_rate: int
    frame_size: int
    """Samples of a frame at that rate."""
    codebook_size: int
    num_quantizers: int
    """Codebooks that there are."""

    @abstractmethod
    def encode_waves(self, waves: list[Tensor], num_quantizers: int) -> list[Tensor]:
        """Whole frames of audio, each (T * frame_size,) at the network's rate, to codes (K, T)."""

    @abstractmethod
    def decode_codes(self, codes: list[Tensor]) -> list[Tensor]:
        """Codes, each (K, T), to audio, each about (T * frame_size,)."""

    @property
    def bits_per_code(self) -> float:
        """What a code takes where all are written alike."""
        return math.log2(self.codebook_size)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sampling_rate / self.frame_size

    @torch.inference_mode()
    def encode(self, audio: list[np.ndarray], num_quantizers: int) -> list[np.ndarray]:
        """Clips, each (L,) at 24 kHz, to codes, each (K, T) int64, by the first `num_quantizers` codebooks."""
        check_clips(audio)
        waves = [resample(clip, RATE, self.sampling_rate) for clip in audio]
        whole = [np.pad(wave, (0, -len(wave) % self.frame_size)) for wave in waves]
        parameter = next(self.model.parameters())
        tensors = [torch.from_numpy(wave).to(parameter.device, parameter.dtype) for wave in whole]
        return [codes.cpu().numpy() for codes in self.encode_waves(tensors, num_quantizers)]

    @torch.inference_mode()
    def decode(self, codes: list[np.ndarray], lengths: list[int]) -> list[np.ndarray]:
        """Codes, each (K, T), to clips at 24 kHz of the given numbers of samples."""
        device = next(self.model.parameters()).device
        waves = self.decode_codes([torch.from_numpy(rows).to(device) for rows in codes])
        return [
            to_clip(wave.float().cpu().numpy(), self.sampling_rate, length, self.name)
            for wave, length in zip(waves, lengths, strict=True)
        ]


class CodebookCodec:
    """The first `num_quantizers` codebooks of a network."""

    def __init__(self, network: Network, num_quantizers: int, setting: str | None = None):
        """Choose a number of codebooks, which tables show if there is no other `setting`.

        Raises:
            ValueError: The network does not have so many.
        """
        if not 1 <= num_quantizers <= network.num_quantizers:
            raise ValueError(f"{network.name} has 1 to {network.num_quantizers} codebooks, not {num_quantizers}")
        self.network = network
        self.num_quantizers = num_quantizers
        setting = setting or ("1 codebook" if num_quantizers == 1 else f"{num_quantizers} codebooks")
        self.name = f"{network.name}, {setting}"
        self.sampling_rate = network.sampling_rate
        self.bitrate = num_quantizers * network.frame_rate * network.bits_per_code

    def reconstruct(self, audio: list[np.ndarray]) -> list[Coded]:
        """See `Codec`."""
        return self.reconstruct_from(self.network.encode(audio, self.num_quantizers), audio)

    def reconstruct_from(self, codes: list[np.ndarray], audio: list[np.ndarray]) -> list[Coded]:
        """Decode what the network encoded clips to, (K, T) with at least this codec's number of codebooks."""
        codes = [rows[: self.num_quantizers] for rows in codes]
        waves = self.network.decode(codes, [len(clip) for clip in audio])
        bits = [math.ceil(rows.size * self.network.bits_per_code) for rows in codes]
        return [Coded(*values) for values in zip(waves, bits, codes, strict=True)]


class Mimi(Network):
    """Mimi, ours or with `stock=True` that of transformers; a batch of clips at a time.

    It is causal, so zeros behind a clip of a batch do not reach it. A last, partly filled frame is completed with
    zeros for both: stock by itself would pad it inside the network.
    """

    def __init__(self, path: str, device: torch.device | str, dtype: torch.dtype, stock: bool = False):
        """Load a checkpoint.

        Raises:
            FileNotFoundError: There is none at `path`.
            ValueError: It is one of something else, of half a Mimi or of a stereo one.
        """
        _check_model_type(path, "mimi")
        config = modeling_mimi.MimiConfig.from_pretrained(path)
        if config.encoder_config is None or config.decoder_config is None:
            raise ValueError(f"{path} holds half of a Mimi, without its encoder or without its decoder")
        _check_mono(path, config.audio_channels)
        self.stock = stock
        library = transformers if stock else modeling_mimi
        self.model = library.MimiModel.from_pretrained(path, dtype=dtype).eval().to(device)
        self.name = f"stock {_short(path)}" if stock else _short(path)
        self.sampling_rate = config.sampling_rate
        self.frame_size = config.frame_size
        self.codebook_size = config.codebook_size
        self.num_quantizers = config.num_quantizers

    def encode_waves(self, waves: list[Tensor], num_quantizers: int) -> list[Tensor]:
        """See `Network`."""
        batch = nn.utils.rnn.pad_sequence(waves, batch_first=True)[:, None]
        codes = self.model.encode(batch, num_quantizers=num_quantizers).audio_codes  # (B, K, T)
        return [rows[:, : len(wave) // self.frame_size] for rows, wave in zip(codes, waves, strict=True)]

    def decode_codes(self, codes: list[Tensor]) -> list[Tensor]:
        """See `Network`."""
        batch = nn.utils.rnn.pad_sequence([rows.T for rows in codes], batch_first=True).transpose(1, 2)
        waves = self.model.decode(batch).audio_values[:, 0]  # (B, T * frame_size)
        return [wave[: rows.shape[1] * self.frame_size] for wave, rows in zip(waves, codes, strict=True)]


class Encodec(Network):
    """EnCodec for one channel (Défossez et al. 2022, arXiv 2210.13438), a clip at a time."""

    def __init__(self, path: str, device: torch.device | str, dtype: torch.dtype):
        """Load a checkpoint.

        Raises:
            FileNotFoundError: There is none at `path`.
            ValueError: It is one of something else, or one for stereo or for normalized chunks.
        """
        _check_model_type(path, "encodec")
        self.model = transformers.EncodecModel.from_pretrained(path, dtype=dtype).eval().to(device)
        config = self.model.config
        _check_mono(path, config.audio_channels)
        if config.normalize or config.chunk_length_s is not None:
            raise ValueError(f"{path} codes normalized or separate chunks, whose bits are not counted here")
        self.name = _short(path)
        self.sampling_rate = config.sampling_rate
        self.frame_size = config.hop_length
        self.codebook_size = config.codebook_size
        self.num_quantizers = config.num_quantizers
        self.codebooks_of = {
            bandwidth: self.model.quantizer.get_num_quantizers_for_bandwidth(bandwidth)
            for bandwidth in config.target_bandwidths
        }
        """Bandwidths in kbit/s and their numbers of codebooks."""

    def at_bandwidth(self, kbit_s: float) -> CodebookCodec:
        """The codec at one of its bandwidths; a `ValueError` names them if that is not one."""
        if kbit_s not in self.codebooks_of:
            known = ", ".join(f"{bandwidth:g}" for bandwidth in self.codebooks_of)
            raise ValueError(f"{self.name} has bandwidths of {known} kbit/s, not {kbit_s:g}")
        return CodebookCodec(self, self.codebooks_of[kbit_s], f"{kbit_s:g} kbit/s")

    def encode_waves(self, waves: list[Tensor], num_quantizers: int) -> list[Tensor]:
        """See `Network`."""
        bandwidth = min(kbit_s for kbit_s, number in self.codebooks_of.items() if number >= num_quantizers)
        codes = [self.model.encode(wave[None, None], bandwidth=bandwidth).audio_codes[0, 0] for wave in waves]
        return [rows[:num_quantizers] for rows in codes]

    def decode_codes(self, codes: list[Tensor]) -> list[Tensor]:
        """See `Network`."""
        return [self.model.decode(rows[None, None], [None]).audio_values[0, 0] for rows in codes]


class Dac(Network):
    """The Descript Audio Codec (Kumar et al. 2023, arXiv 2306.06546), a clip at a time."""

    def __init__(self, path: str, device: torch.device | str, dtype: torch.dtype):
        """Load a checkpoint.

        Raises:
            FileNotFoundError: There is none at `path`.
            ValueError: It is one of something else.
        """
        _check_model_type(path, "dac")
        self.model = transformers.DacModel.from_pretrained(path, dtype=dtype).eval().to(device)
        config = self.model.config
        self.name = _short(path)
        self.sampling_rate = config.sampling_rate
        self.frame_size = config.hop_length
        self.codebook_size = config.codebook_size
        self.num_quantizers = config.n_codebooks

    def encode_waves(self, waves: list[Tensor], num_quantizers: int) -> list[Tensor]:
        """See `Network`."""
        return [self.model.encode(wave[None, None], n_quantizers=num_quantizers).audio_codes[0] for wave in waves]

    def decode_codes(self, codes: list[Tensor]) -> list[Tensor]:
        """See `Network`."""
        return [self.model.decode(audio_codes=rows[None]).audio_values[0] for rows in codes]


def at_levels(network: Network, num_quantizers: Sequence[int] | None) -> list[CodebookCodec]:
    """One codec per number of codebooks; one with all of them if no number is given."""
    return [CodebookCodec(network, number) for number in num_quantizers or [network.num_quantizers]]


def _check_model_type(path: str, expected: str) -> None:
    """Read the configuration of a checkpoint and see what it is for."""
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no config.json")
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(path)
    except OSError as error:
        raise FileNotFoundError(f"{path} is no directory, and the Hub does not give it: {error}") from error
    if config.get("model_type") != expected:
        raise ValueError(f"{path} is a checkpoint of {config.get('model_type')!r}, not of {expected!r}")


def _check_mono(path: str, channels: int) -> None:
    if channels != 1:
        raise ValueError(f"{path} codes {channels} channels, and clips have one")


def _short(path: str) -> str:
    """The last part of a path that says something: trainers call what they publish `model`."""
    if not os.path.isdir(path):
        return path
    return [part for part in Path(os.path.abspath(path)).parts if part != "model"][-1]
