"""One clip to 1.1 kbit/s and back: what you hear, what was sent, what it looks like, how good it is."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modeling_mimi import MimiFeatureExtractor, MimiModel
from modeling_mimi.audio_files import Clip, EncodeFiles, ReconstructFiles, Task, atomic, read_audio

from .evaluation.pictures import speech_and_codes
from .spectral import MelDistance
from .validation import intelligibility

LEVELS = (1, 2, 4, 8)


class Line(NamedTuple):
    """What one number of codebooks gives."""

    num_quantizers: int
    bitrate: float
    """Nominal, bit/s."""
    num_bytes: float
    """Size of the clip's codes."""
    stoi: float
    mel_distance: float
    path: Path


@torch.inference_mode()
def demonstrate(model: MimiModel, name: str, path: Path, output: Path, mel_distance: MelDistance) -> list[Line]:
    """Write the original, the codes, reconstructions from 1, 2, 4 and 8 codebooks, and a picture of it all.

    Args:
        model: In eval mode.
        name: The model's, for the codes file.
        path: A clip of speech, in anything libsndfile reads, at any rate.
        output: Folder; what is there by the same names is replaced.
        mel_distance: At the model's rate.

    Raises:
        ValueError, OSError: The clip cannot be read.
    """
    config = model.config
    clip = read_audio(path, MimiFeatureExtractor(sampling_rate=config.sampling_rate))
    encoder = EncodeFiles(model, "safetensors", name, None)
    [[codes]] = encoder.run([clip])
    _write(encoder, output / "codes.safetensors", codes, clip)
    levels = [level for level in LEVELS if level <= config.num_quantizers]
    decoder = ReconstructFiles(model, "wav", levels)
    _write(decoder, output / "original.wav", clip.data, clip)
    audio, lines = clip.data[0], []
    [waves] = decoder.run([clip])
    for level, wave in zip(levels, waves, strict=True):
        target = output / f"reconstruction.q{level}.wav"
        _write(decoder, target, wave, clip)
        stoi = intelligibility(audio, wave[0], config.sampling_rate)
        rate = config.bitrate(level)
        num_bytes = rate * codes.shape[-1] / config.frame_rate / 8
        lines.append(Line(level, rate, num_bytes, stoi, float(mel_distance(audio[None], wave)), target))
    title = f"{path.name} at {lines[-1].bitrate / 1000:.1f} kbit/s"
    rates = config.sampling_rate, config.frame_rate
    speech_and_codes(audio, wave[0], codes, *rates, title, output / "picture.png")
    return lines


def _write(task: Task, path: Path, data: Tensor, clip: Clip) -> None:
    with atomic(path) as part:
        task.write(part, data, clip)
