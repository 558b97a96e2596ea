"""The codecs that an evaluation compares, from words on its command line, and all of them on the same clips.

`K` codebooks.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from .codec_interface import Codec, Coded
from .codecs_classical import Codec2, Opus, Original, Speex
from .codecs_neural import CodebookCodec, Dac, Encodec, Mimi, Network, at_levels

SPECS = {
    "DIRECTORY or OWNER/NAME": "a Mimi checkpoint, here or on the Hub",
    "stock:CHECKPOINT": "the same through stock transformers",
    "encodec:CHECKPOINT@1.5": "EnCodec at 1.5 kbit/s",
    "dac:CHECKPOINT@4": "DAC with 4 codebooks",
    "opus:6": "Opus at 6 kbit/s",
    "speex:4": "Speex at 3.95 kbit/s; speex-wb:9.8 for its wideband",
    "codec2:1200": "Codec 2 at 1200 bit/s",
    "original": "the clip itself",
}
"""What is understood, and what it means."""


def parse_codec(
    spec: str,
    *,
    num_quantizers: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Codec]:
    """Make the codecs that a word asks for, see `SPECS`.

    Args:
        spec: One word. `@` takes several settings, `encodec:facebook/encodec_24khz@1.5,3`, which share the network.
        num_quantizers: Numbers of codebooks of Mimi, one codec each, which share the network; all if not given.
        device: Where networks run.
        dtype: What networks compute in.

    Raises:
        ValueError: The word is not understood, or asks for what there is not; it names what there is.
        FileNotFoundError: A checkpoint or a library of the system is missing.
        ImportError: A package is missing; it says how to install it.
    """
    kind, _, rest = spec.partition(":")
    if spec == "original":
        return [Original()]
    if (spec and Path(spec).is_dir()) or re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return [*at_levels(Mimi(spec, device, dtype), num_quantizers)]
    if kind == "stock" and rest:
        return [*at_levels(Mimi(rest, device, dtype, stock=True), num_quantizers)]
    if kind == "encodec":
        path, bandwidths = _split_settings(spec, rest)
        network = Encodec(path, device, dtype)
        return [network.at_bandwidth(bandwidth) for bandwidth in bandwidths]
    if kind == "dac":
        path, numbers = _split_settings(spec, rest)
        return [*at_levels(Dac(path, device, dtype), [_whole(spec, number) for number in numbers])]
    if kind == "opus":
        return [Opus(_number(spec, rest))]
    if kind in ("speex", "speex-wb"):
        return [Speex(_number(spec, rest), wideband=kind == "speex-wb")]
    if kind == "codec2":
        return [Codec2(_whole(spec, _number(spec, rest)))]
    raise _not_understood(spec)


def reconstruct_each(codecs: Sequence[Codec], audio: list[np.ndarray]) -> Iterator[tuple[Codec, list[Coded]]]:
    """What each codec makes of a batch of clips, in order; codecs that share a network have it encode the batch once.

    The codes live as long as the iteration, what is decoded until the next codec's turn.
    """
    shared = [codec for codec in codecs if isinstance(codec, CodebookCodec)]
    most = {
        network: max(codec.num_quantizers for codec in shared if codec.network is network)
        for network in (codec.network for codec in shared)
    }
    encoded: dict[Network, list[np.ndarray]] = {}
    for codec in codecs:
        if isinstance(codec, CodebookCodec):
            if codec.network not in encoded:
                encoded[codec.network] = codec.network.encode(audio, most[codec.network])
            yield codec, codec.reconstruct_from(encoded[codec.network], audio)
        else:
            yield codec, codec.reconstruct(audio)


def _split_settings(spec: str, rest: str) -> tuple[str, list[float]]:
    """`CHECKPOINT@1.5,3` to the checkpoint and the numbers."""
    path, _, settings = rest.rpartition("@")
    if not path:
        raise _not_understood(spec)
    return path, [_number(spec, setting) for setting in settings.split(",")]


def _number(spec: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _not_understood(spec) from None


def _whole(spec: str, number: float) -> int:
    if number % 1 != 0:
        raise _not_understood(spec)
    return int(number)


def _not_understood(spec: str) -> ValueError:
    lines = [f"  {form:24} {meaning}" for form, meaning in SPECS.items()]
    return ValueError("\n".join([f"{spec!r} is not a codec. There are:", *lines]))
