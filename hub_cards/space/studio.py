"""What the page does with a clip, without the page: speech or codes in, reconstructions with their facts out.

`K` codebooks, `T` frames, `L` samples.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modeling_mimi import MimiFeatureExtractor, MimiModel
from modeling_mimi.audio_files import (
    Clip,
    DecodeFiles,
    EncodeFiles,
    fingerprints,
    is_codes_file,
    measure_audio,
    measure_codes,
    read_audio,
    write_audio,
)
from training.evaluation.codec_interface import Codec
from training.evaluation.codecs import parse_codec
from training.spectral import MelDistance
from training.validation import intelligibility

MAX_SECONDS = 60
MAX_BYTES = 20_000_000
LEVELS = (1, 2, 4, 8)
RIVALS = ("opus:6", "codec2:1200")
"""The nearest rates of others: what people can use today."""


class ClipError(ValueError):
    """A clip that the page does not take; the message says why, and what it takes."""


class Source(NamedTuple):
    """What somebody brought: a clip of speech, (1, L) in [-1, 1] at the model's rate, or of codes, (K, T)."""

    clip: Clip
    is_codes: bool

    @property
    def audio(self) -> Tensor | None:
        """The speech, (L,)."""
        return None if self.is_codes else self.clip.data[0]


class Track(NamedTuple):
    """Something to hear."""

    label: str
    audio: Tensor
    """(L,)."""
    bitrate: float | None
    """Bit/s; `None` of the original."""
    num_quantizers: int | None = None
    stoi: float | None = None
    mel_distance: float | None = None


class Take(NamedTuple):
    """A clip after its way through the codec."""

    tracks: list[Track]
    """The original first, if there is one."""
    codes: Tensor
    """(K, T)."""
    codes_file: bytes
    """As `mimi decode` and this page read it."""
    seconds: float
    encode_s: float | None
    decode_s: float


class Studio:
    """A model and what the page does with it. Nothing is kept between calls.

    Args:
        model: In eval mode, with one audio channel.
        name: What codes files say of it.
    """

    def __init__(self, model: MimiModel, name: str):
        self.model = model
        self.name = name
        self.config = model.config
        self.extractor = MimiFeatureExtractor(sampling_rate=self.config.sampling_rate)
        self.mel_distance = MelDistance(self.config.sampling_rate)

    def read(self, path: Path) -> Source:
        """Read a file of speech, in anything that libsndfile reads, or of codes.

        Raises:
            ClipError: It is neither, too long or too large, or its codes are those of another codec.
        """
        if path.stat().st_size > MAX_BYTES:
            raise ClipError(f"{path.name} is larger than {MAX_BYTES // 10**6} MB, which is what this page takes.")
        is_codes = is_codes_file(path)
        try:
            seconds = (measure_codes if is_codes else measure_audio)(path).seconds
            if not seconds:
                raise ClipError(f"{path.name} is empty.")
            if seconds > MAX_SECONDS:
                raise ClipError(
                    f"{path.name} lasts {seconds:.0f} s; this page takes up to {MAX_SECONDS} s, the command line "
                    "files of any length."
                )
            clip = self._read_codes(path) if is_codes else read_audio(path, self.extractor)
        except ClipError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).replace(str(path), path.name).split()).rstrip(".")
            raise ClipError(f"{path.name} is neither speech nor codes that can be read here: {reason}.") from error
        return Source(clip, is_codes)

    @torch.inference_mode()
    def process(self, source: Source, num_quantizers: int) -> Take:
        """Encode speech with so many codebooks and decode it, with fewer of them too; or decode codes.

        Args:
            source: What to process.
            num_quantizers: Codebooks; of codes, at most so many as they have.
        """
        clip, encode_s = source.clip, None
        if source.is_codes:
            codes = clip.data[:num_quantizers]
        else:
            start = time.perf_counter()
            codes = self.model.encode(clip.data[None], num_quantizers=num_quantizers).audio_codes[0]
            encode_s = time.perf_counter() - start
        tracks = [] if source.audio is None else [Track("Original", source.audio, None)]
        decode_s = 0.0
        for level in [level for level in LEVELS if level < len(codes)] + [len(codes)]:
            start = time.perf_counter()
            audio = self.model.decode(codes[None, :level]).audio_values[0, 0, : clip.num_samples]
            decode_s = time.perf_counter() - start
            label = f"{level} codebook{'s' if level > 1 else ''}"
            tracks.append(self._scored(Track(label, audio, self.config.bitrate(level), level), source.audio))
        seconds = clip.num_samples / self.config.sampling_rate
        return Take(tracks, codes, self._codes_file(codes, clip), seconds, encode_s, decode_s)

    @torch.inference_mode()
    def rivals(self, source: Source, seed: int) -> tuple[list[Track], list[str]]:
        """The clip through several codecs in an order drawn from `seed`, the original among them.

        Returns:
            The tracks, and a sentence for each codec that is not installed.

        Raises:
            ClipError: There is no original to compare with.
        """
        if source.audio is None:
            raise ClipError("A comparison needs speech, not codes: take a clip first.")
        take, missing = self.process(source, self.config.num_quantizers), []
        tracks = [track for track in take.tracks if track.num_quantizers in (None, *LEVELS)]
        for codec in _installed(RIVALS, missing):
            [coded] = codec.reconstruct([source.audio.numpy()])
            bitrate = coded.bits / take.seconds
            tracks.append(self._scored(Track(codec.name, torch.from_numpy(coded.audio), bitrate), source.audio))
        random.Random(seed).shuffle(tracks)
        return tracks, missing

    def flac(self, audio: Tensor) -> bytes:
        """A wave (L,) as a 16-bit FLAC file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.flac")
            write_audio(path, audio[None], self.config.sampling_rate, "flac")
            return path.read_bytes()

    def _scored(self, track: Track, original: Tensor | None) -> Track:
        if original is None:
            return track
        stoi = intelligibility(original, track.audio, self.config.sampling_rate)
        distance = float(self.mel_distance(original[None], track.audio[None]))
        return track._replace(stoi=stoi, mel_distance=distance)

    def _read_codes(self, path: Path) -> Clip:
        clip = DecodeFiles(self.model, "wav", None, force=True).read(path)
        if clip.metadata["model_fingerprint"] != fingerprints(self.model)[len(clip.data) - 1]:
            raise ClipError(f"{path.name} was made with other codebooks, those of {clip.metadata['model']}.")
        return clip

    def _codes_file(self, codes: Tensor, clip: Clip) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "codes.safetensors")
            EncodeFiles(self.model, "safetensors", self.name, len(codes)).write(path, codes, clip)
            return path.read_bytes()


def _installed(specs: Sequence[str], missing: list[str]) -> list[Codec]:
    codecs: list[Codec] = []
    for spec in specs:
        try:
            codecs += parse_codec(spec)
        except (ImportError, OSError) as error:
            missing.append(" ".join(str(error).split()))
    return codecs
