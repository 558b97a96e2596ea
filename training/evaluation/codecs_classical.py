"""Codecs without a network: Opus, Codec 2, Speex, and no codec at all, one clip at a time.

What each library keeps of a clip is dropped with it, and what it delays is cut off. `L` samples of a clip.
"""

import math
from abc import ABC, abstractmethod
from importlib import import_module
from types import ModuleType

import numpy as np

from .codec_interface import RATE, Coded, check_clips, resample, to_clip
from .libspeex import LibSpeex

OPUS_KBIT_S = (6, 256)
"""Least and most that libopus is asked for on one channel; below, it has no room for a frame."""

CODEC2_DELAYS = {3200: 160, 2400: 160, 1600: 160, 1400: 160, 1300: 160, 1200: 160, 700: 240}
"""Modes of Codec 2 (bit/s; 700 is 700C) and their delays in samples at 8 kHz.

A frame's parameters are those of speech 20 ms before its end, in the middle of the window that they are estimated on;
700C interpolates towards them 10 ms late. Over shifts of real speech, STOI peaks at the same delays.
"""

SPEEX_RATES = {0: 2.15, 1: 3.95, 2: 5.95, 3: 8.0, 5: 11.0, 7: 15.0, 9: 18.2, 10: 24.6}
"""Quality settings of narrowband Speex (8 kHz) and what they take, in kbit/s."""
SPEEX_WIDEBAND_RATES = dict(enumerate((3.95, 5.75, 7.75, 9.8, 12.8, 16.8, 20.6, 23.8, 27.8, 34.2, 42.2)))
"""The same for wideband (16 kHz)."""


class ClassicalCodec(ABC):
    """A codec that takes one clip at a time at its own rate."""

    def __init__(self, name: str, sampling_rate: int, bitrate: float):
        self.name = name
        self.sampling_rate = sampling_rate
        self.bitrate = bitrate

    @abstractmethod
    def code(self, wave: np.ndarray) -> tuple[np.ndarray, int]:
        """Encode and decode (L,) float32 at the codec's rate: (at least L,), in time with it, and its bits."""

    def reconstruct(self, audio: list[np.ndarray]) -> list[Coded]:
        """See `Codec`."""
        check_clips(audio)
        return [self._reconstruct(clip) for clip in audio]

    def _reconstruct(self, clip: np.ndarray) -> Coded:
        decoded, bits = self.code(resample(clip, RATE, self.sampling_rate))
        return Coded(to_clip(decoded, self.sampling_rate, len(clip), self.name), bits)


class Original(ClassicalCodec):
    """The clip itself, counted as 16-bit PCM: the ceiling of every score."""

    def __init__(self):
        super().__init__("original", RATE, 16.0 * RATE)

    def code(self, wave: np.ndarray) -> tuple[np.ndarray, int]:
        """See `ClassicalCodec`."""
        return wave, 16 * len(wave)


class Opus(ClassicalCodec):
    """Opus in 20 ms frames for speech (`voip`) at its own variable rate, fed with 24 kHz (RFC 6716).

    libopus chooses the bandwidth: at 6 kbit/s it keeps 4 kHz. Its variable rate, the default, is understood better
    than its constant one and takes no more (STOI 0.91 at 5.8 kbit/s, 0.87 at 6.1). Bits are those of the packets.
    """

    FRAME_MS = 20
    DECODED_RATE = 48_000

    def __init__(self, kbit_s: float):
        """Prepare for `kbit_s` kbit/s.

        Raises:
            ImportError: PyAV is missing.
            ValueError: There is no such rate.
        """
        low, high = OPUS_KBIT_S
        if not low <= kbit_s <= high:
            raise ValueError(f"opus takes {low} to {high} kbit/s, not {kbit_s:g}")
        self.av = _import("av", "pip install av")
        super().__init__(f"opus {kbit_s:g} kbit/s", RATE, 1000 * kbit_s)

    def code(self, wave: np.ndarray) -> tuple[np.ndarray, int]:
        """See `ClassicalCodec`. The delay is what the encoder says in its header, the pre-skip of RFC 7845."""
        encoder = self.av.CodecContext.create("libopus", "w")
        encoder.sample_rate, encoder.format, encoder.layout = RATE, "flt", "mono"
        encoder.bit_rate = round(self.bitrate)
        encoder.options = {"application": "voip", "vbr": "on", "frame_duration": str(self.FRAME_MS)}
        frame = self.av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        packets = [*encoder.encode(frame), *encoder.encode(None)]
        pre_skip = int.from_bytes(encoder.extradata[10:12], "little")  # at 48 kHz
        decoder = self.av.CodecContext.create("libopus", "r")
        decoder.sample_rate, decoder.layout = self.DECODED_RATE, "mono"
        frames = [frame.to_ndarray()[0] for packet in [*packets, None] for frame in decoder.decode(packet)]
        decoded = _from_int16(np.concatenate(frames)[pre_skip:])
        return resample(decoded, self.DECODED_RATE, RATE), 8 * sum(packet.size for packet in packets)


class Codec2(ClassicalCodec):
    """Codec 2, the vocoder of amateur radio, at 8 kHz. Bits are those of its frames, before they fill whole bytes.

    The library draws phases from one generator of the process that cannot be seeded: the same clip sounds slightly
    different each time, and scores move in the third decimal.
    """

    def __init__(self, bit_s: int):
        """Prepare for the mode of `bit_s` bit/s.

        Raises:
            ImportError: pycodec2 is missing.
            ValueError: There is no such mode.
        """
        if bit_s not in CODEC2_DELAYS:
            raise ValueError(f"codec2 has no mode of {bit_s} bit/s: it has {', '.join(map(str, CODEC2_DELAYS))}")
        self.pycodec2 = _import("pycodec2", "pip install pycodec2 (Python 3.11 or newer)")
        self.mode = bit_s
        super().__init__(f"codec2 {bit_s} bit/s", 8000, bit_s)

    def code(self, wave: np.ndarray) -> tuple[np.ndarray, int]:
        """See `ClassicalCodec`."""
        codec, delay = self.pycodec2.Codec2(self.mode), CODEC2_DELAYS[self.mode]
        frames = _in_frames(wave, delay, codec.samples_per_frame())
        decoded = np.concatenate([codec.decode(packet) for packet in [codec.encode(frame) for frame in frames]])
        return _from_int16(decoded[delay:]), len(frames) * codec.bits_per_frame()


class Speex(ClassicalCodec):
    """Speex at a constant rate, 20 ms frames: narrowband at 8 kHz, or wideband at 16 kHz.

    Straight through libspeex: whether `speexdec` takes the delay off depends on how many pages a file has, FFmpeg
    decodes wideband differently and not as well, and a file fills frames of 43 bits up to 48.
    """

    def __init__(self, kbit_s: float, wideband: bool = False):
        """Prepare for `kbit_s` kbit/s; 4 and 6 find 3.95 and 5.95.

        Raises:
            FileNotFoundError: libspeex is missing.
            ValueError: There is no such rate.
        """
        kind, rates = ("speex wideband", SPEEX_WIDEBAND_RATES) if wideband else ("speex", SPEEX_RATES)
        quality = min(rates, key=lambda quality: abs(rates[quality] - kbit_s))
        if not math.isclose(rates[quality], kbit_s, abs_tol=0.06):
            raise ValueError(f"{kind} has no rate of {kbit_s:g} kbit/s: it has {', '.join(map(str, rates.values()))}")
        self.library, self.wideband, self.quality = LibSpeex(), wideband, quality
        super().__init__(f"{kind} {rates[quality]:g} kbit/s", 16_000 if wideband else 8000, 1000 * rates[quality])

    def code(self, wave: np.ndarray) -> tuple[np.ndarray, int]:
        """See `ClassicalCodec`. The delay is what the library says of its encoder and its decoder."""
        with self.library.session(self.wideband, self.quality) as session:
            delay = session.delay
            decoded, bits = session.code(_in_frames(wave, delay, session.frame_size))
        return _from_int16(decoded[delay:]), bits


def _in_frames(wave: np.ndarray, delay: int, size: int) -> np.ndarray:
    """(L,) floats to (frames, size) int16, with zeros after it that push the delay out."""
    missing = delay + -(len(wave) + delay) % size
    samples = np.rint(wave * 32768).clip(-32768, 32767).astype(np.int16)
    return np.pad(samples, (0, missing)).reshape(-1, size)


def _from_int16(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / 32768


def _import(package: str, command: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"this codec needs {package}: {command}") from error
