"""The multi-scale STFT discriminator (EnCodec §3.4, used by Moshi §3.3.4): one convolutional judge per window length.

`B` clips, `L` samples, `T` frames, `F` frequencies, `C` channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import weight_norm

from .config import DiscriminatorConfig


@dataclass(frozen=True)
class Judgement:
    """What one sub-discriminator says about a batch."""

    logits: Tensor
    """(B, T, F): above 0 where the audio looks real."""
    features: tuple[Tensor, ...]
    """The maps on the way there, each (B, C, T, F')."""
    mask: Tensor | None
    """(B, T): true on frames that lie on the clip; the first always does."""


class STFTDiscriminator(nn.Module):
    """One judge: a complex spectrogram, real and imaginary parts as channels, through 2-D convolutions."""

    def __init__(self, window_samples: int, num_filters: int):
        super().__init__()
        self.window_samples = window_samples
        self.hop_samples = window_samples // 4
        window = torch.hann_window(window_samples)
        # normalised by the window's norm, so that white noise has the same level at every scale
        self.window: Tensor
        self.register_buffer("window", window / window.norm(), persistent=False)
        convolutions = [nn.Conv2d(2, num_filters, (3, 9), padding=(1, 4))]
        for dilation in (1, 2, 4):
            convolutions.append(
                weight_norm(
                    nn.Conv2d(
                        num_filters,
                        num_filters,
                        (3, 9),
                        stride=(1, 2),
                        dilation=(dilation, 1),
                        padding=(dilation, 4),
                    )
                )
            )
        convolutions.append(weight_norm(nn.Conv2d(num_filters, num_filters, (3, 3), padding=(1, 1))))
        self.convolutions = nn.ModuleList(convolutions)
        self.logit = weight_norm(nn.Conv2d(num_filters, 1, (3, 3), padding=(1, 1)))

    def spectrogram(self, audio: Tensor) -> Tensor:
        """Waves (B, 1, L) to (B, 2, T, F), in float32 whatever the networks compute in."""
        with torch.autocast(audio.device.type, enabled=False):
            spectrum = torch.stft(
                audio.squeeze(1).float(),
                self.window_samples,
                self.hop_samples,
                window=self.window,
                center=False,
                return_complex=True,
            )
        return torch.stack([spectrum.real, spectrum.imag], dim=1).transpose(2, 3)

    def forward(self, audio: Tensor, mask: Tensor | None = None) -> Judgement:
        """Judge waves (B, 1, L); `mask` (B, L) is true on the clip, then false."""
        x, features = self.spectrogram(audio), []
        for convolution in self.convolutions:
            x = leaky_relu(convolution(x), 0.3)
            features.append(x)
        logits = self.logit(x).squeeze(1)
        frames = None
        if mask is not None:
            inside = (mask.sum(1, keepdim=True) - self.window_samples) // self.hop_samples
            frames = torch.arange(logits.shape[1], device=logits.device) <= inside.clamp(min=0)
        return Judgement(logits, tuple(features), frames)


class MultiScaleSTFTDiscriminator(nn.Module):
    """Judges at several window lengths, side by side: 472 k parameters at the paper's sizes."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.judges: Any = nn.ModuleList([STFTDiscriminator(w, config.num_filters) for w in config.windows])

    def forward(self, audio: Tensor, mask: Tensor | None = None) -> list[Judgement]:
        """One judgement per scale of waves (B, 1, L).

        Raises:
            ValueError: the waves are shorter than the longest window.
        """
        longest = max(judge.window_samples for judge in self.judges)
        if audio.shape[-1] < longest:
            raise ValueError(
                f"The discriminator's longest window has {longest} samples, the audio {audio.shape[-1]}: "
                "lengthen data.segment_s or discriminator.crop_s, or drop the window from discriminator.windows."
            )
        return [judge(audio, mask) for judge in self.judges]
