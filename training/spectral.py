"""Spectra and rates: short-time Fourier transforms, mel distance, resampling. All in float32.

`B` clips, `L` samples, `T` frames of a spectrum, `F` frequencies, `M` mel bands.
"""

from collections.abc import Sequence

import julius
import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank


def resample(audio: Tensor, sampling_rate: int, new_sampling_rate: int) -> Tensor:
    """Waves (..., L) at another rate, band-limited and differentiable."""
    if sampling_rate == new_sampling_rate:
        return audio
    return julius.resample_frac(audio.float(), sampling_rate, new_sampling_rate)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over clips of each clip's mean over its own time, a scalar.

    So a clip counts the same whatever its padding, its batch or the number of parts that a batch is taken in.

    Args:
        values: (B, T, ...).
        mask: (B, T), true on what counts; everything if not given.
    """
    if values.dim() > 2:
        values = values.mean(dim=tuple(range(2, values.dim())))
    if mask is None:
        return values.mean()
    return (torch.where(mask, values, 0).sum(1) / mask.sum(1).clamp(min=1)).mean()


MEL_WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)
MEL_BINS = 64
MEL_FLOOR = 1e-5


class MelDistance(nn.Module):
    """Multi-scale mel distance: the mean over window lengths of the L1 distance of log10 mel magnitudes.

    0 for equal waves; about 1 where spectra differ tenfold. Windows are Hann, hops a quarter, frames centred, and
    magnitudes count from 1e-5 up. (Moshi §3.3.4 takes EnCodec's reconstruction losses; EnCodec adds an L2 distance
    of the same spectra, left out here: with the balancer it changes little but the scale.)
    """

    def __init__(
        self,
        sampling_rate: int,
        windows: Sequence[int] = MEL_WINDOWS,
        bins: int = MEL_BINS,
        floor: float = MEL_FLOOR,
    ):
        """Windows in samples; `bins` bands on the longest, an eighth of the length on shorter ones."""
        super().__init__()
        self.windows = tuple(windows)
        self.floor = floor
        for window in self.windows:
            self.register_buffer(f"hann_{window}", torch.hann_window(window), persistent=False)
            filters = mel_filter_bank(
                num_frequency_bins=window // 2 + 1,
                num_mel_filters=min(bins, window // 8),
                min_frequency=0.0,
                max_frequency=sampling_rate / 2,
                sampling_rate=sampling_rate,
                norm=None,
                mel_scale="slaney",
            )
            self.register_buffer(f"filters_{window}", torch.tensor(filters, dtype=torch.float32), persistent=False)

    def mel(self, audio: Tensor, window: int) -> Tensor:
        """Waves (B, L) to mel magnitudes (B, T, M), 1 for a sine of full scale in the middle of a band's window."""
        hann = getattr(self, f"hann_{window}")
        spectrum = torch.stft(
            audio.float(), window, window // 4, window=hann, center=True, pad_mode="constant", return_complex=True
        )
        # the root of the square with a floor: |.| has no gradient at 0, where silence lies
        magnitude = (spectrum.real.square() + spectrum.imag.square() + self.floor**2).sqrt() / hann.sum()
        return magnitude.transpose(1, 2) @ getattr(self, f"filters_{window}")

    def forward(
        self, audio: Tensor, reconstruction: Tensor, mask: Tensor | None = None, magnitude_weight: float = 0.0
    ) -> Tensor:
        """Distance of each clip, (B,), between waves (B, L); `mask` (B, L) is true on the clip, then false.

        `magnitude_weight` adds so much of the L1 distance of the magnitudes themselves, relative to the sum of the
        audio's: what is loud counts there, where the logarithm counts loud and soft alike.
        """
        distances = []
        for window in self.windows:
            real, fake = self.mel(audio, window), self.mel(reconstruction, window)
            position = torch.arange(real.shape[1], device=real.device) * (window // 4)
            inside = torch.ones_like(real[..., 0], dtype=torch.bool)  # (B, T)
            if mask is not None:
                inside = position <= mask.sum(1, keepdim=True)
            frames = (real.clamp(min=self.floor).log10() - fake.clamp(min=self.floor).log10()).abs().mean(2)
            distance = torch.where(inside, frames, 0).sum(1) / inside.sum(1)
            if magnitude_weight:
                differing = torch.where(inside, (real - fake).abs().sum(2), 0).sum(1)
                total = torch.where(inside, real.sum(2), 0).sum(1)
                distance = distance + magnitude_weight * differing / total.clamp(min=self.floor)
            distances.append(distance)
        return torch.stack(distances).mean(0)
