"""As much of libspeex (Debian's libspeex1) as it takes to code a clip; nothing that is kept up on PyPI has it.

Numbers and the layout of `SpeexBits` are those of `speex.h` and `speex_bits.h`, unchanged since version 1.2.
"""

import ctypes
import ctypes.util
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np

SET_ENHANCEMENT, GET_FRAME_SIZE, SET_QUALITY, SET_COMPLEXITY, GET_LOOKAHEAD = 0, 3, 4, 16, 39
NARROWBAND, WIDEBAND = 0, 1
MOST_COMPLEX = 10
"""Complexity costs time and no bits, so the encoder searches as well as it can."""


class Bits(ctypes.Structure):
    """The bits of a frame, `SpeexBits`."""

    _fields_ = (
        ("chars", ctypes.c_void_p),
        ("num_bits", ctypes.c_int),
        ("char_position", ctypes.c_int),
        ("bit_position", ctypes.c_int),
        ("owner", ctypes.c_int),
        ("overflow", ctypes.c_int),
        ("buffer_size", ctypes.c_int),
        ("reserved_1", ctypes.c_int),
        ("reserved_2", ctypes.c_void_p),
    )


class LibSpeex:
    """The library, loaded.

    Raises:
        FileNotFoundError: It is not installed.
    """

    def __init__(self):
        name = ctypes.util.find_library("speex") or "libspeex.so.1"
        try:
            self.library = ctypes.CDLL(name)
        except OSError as error:
            raise FileNotFoundError("speex needs libspeex: apt-get install libspeex1") from error
        for function in ("speex_lib_get_mode", "speex_encoder_init", "speex_decoder_init"):
            getattr(self.library, function).restype = ctypes.c_void_p

    @contextmanager
    def session(self, wideband: bool, quality: int) -> Generator["Session"]:
        """Lend an encoder and a decoder that have heard nothing yet."""
        library, bits = self.library, Bits()
        mode = ctypes.c_void_p(library.speex_lib_get_mode(WIDEBAND if wideband else NARROWBAND))
        encoder = ctypes.c_void_p(library.speex_encoder_init(mode))
        decoder = ctypes.c_void_p(library.speex_decoder_init(mode))
        library.speex_bits_init(ctypes.byref(bits))
        try:
            session = Session(library, encoder, decoder, bits)
            session.control("encoder", SET_QUALITY, quality)
            session.control("encoder", SET_COMPLEXITY, MOST_COMPLEX)
            session.control("decoder", SET_ENHANCEMENT, 1)
            yield session
        finally:
            library.speex_bits_destroy(ctypes.byref(bits))
            library.speex_encoder_destroy(encoder)
            library.speex_decoder_destroy(decoder)


class Session:
    """One encoder, one decoder, and the bits of a frame between them, for one clip."""

    def __init__(self, library: ctypes.CDLL, encoder: ctypes.c_void_p, decoder: ctypes.c_void_p, bits: Bits):
        self.library, self.encoder, self.decoder, self.bits = library, encoder, decoder, bits

    def control(self, side: str, request: int, value: int = 0) -> int:
        """Set or ask a parameter of the `encoder` or the `decoder`."""
        number = ctypes.c_int(value)
        function = getattr(self.library, f"speex_{side}_ctl")
        if function(getattr(self, side), request, ctypes.byref(number)) != 0:
            raise RuntimeError(f"libspeex does not know request {request} of its {side}")
        return number.value

    @property
    def frame_size(self) -> int:
        """Samples of a frame."""
        return self.control("encoder", GET_FRAME_SIZE)

    @property
    def delay(self) -> int:
        """Samples by which what is decoded comes later than what was encoded."""
        return self.control("encoder", GET_LOOKAHEAD) + self.control("decoder", GET_LOOKAHEAD)

    def code(self, frames: np.ndarray) -> tuple[np.ndarray, int]:
        """Encode and decode (frames, frame_size) int16; returns all samples, delayed, and the number of bits."""
        library, bits, samples, num_bits = self.library, ctypes.byref(self.bits), frames.copy(), 0
        for frame in samples:
            pointer = ctypes.c_void_p(frame.ctypes.data)
            library.speex_bits_reset(bits)
            library.speex_encode_int(self.encoder, pointer, bits)
            num_bits += self.bits.num_bits
            library.speex_bits_rewind(bits)
            if library.speex_decode_int(self.decoder, bits, pointer) != 0:
                raise RuntimeError("libspeex cannot decode what it encoded")
        return samples.reshape(-1), num_bits
