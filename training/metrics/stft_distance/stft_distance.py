"""Multi-resolution distance of short-time Fourier magnitudes, as a module of evaluate."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from .audio_metric import AudioMetric, Scale, is_silent

RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
FLOOR = 1e-7


class StftDistance(AudioMetric):
    """Multi-resolution distance of STFT magnitudes |P| of the prediction and |R| of the reference.

    At each resolution, spectral convergence is the norm of |R| - |P| over that of |R|, and log magnitude the mean of
    |log |R| - log |P||, natural, with powers from 1e-7 up. Either is the mean over the resolutions, and the STFT
    distance is their sum. The resolutions are Parallel WaveGAN's: it was defined at 24 kHz; compare scores at one
    sampling rate only. Undefined for a silent reference.
    """

    scales = {  # noqa: RUF012
        "stft_distance": Scale("", (0, math.inf), False),
        "spectral_convergence": Scale("", (0, math.inf), False),
        "log_magnitude": Scale("ln", (0, math.inf), False),
    }
    inputs = f"""{AudioMetric.inputs}
    resolutions: triples of FFT size, hop and window length, in samples. Default {RESOLUTIONS}."""
    citation_text = "Yamamoto, Song, Kim (2020): Parallel WaveGAN, arXiv:1910.11480"

    def score(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        sampling_rate: int,
        resolutions: Sequence[Sequence[int]] = RESOLUTIONS,
    ) -> dict[str, float]:
        """See the class."""
        if is_silent(reference):
            return dict.fromkeys(self.scales, math.nan)
        waves = torch.stack([torch.tensor(prediction), torch.tensor(reference)])
        with torch.inference_mode():
            pairs = torch.tensor([_distances(waves, *resolution) for resolution in resolutions], dtype=torch.float64)
        convergence, log_magnitude = pairs.mean(0).tolist()
        return {
            "stft_distance": convergence + log_magnitude,
            "spectral_convergence": convergence,
            "log_magnitude": log_magnitude,
        }


def _distances(waves: torch.Tensor, size: int, hop: int, length: int) -> tuple[float, float]:
    """Spectral convergence and log magnitude of waves (2, L)."""
    window = torch.hann_window(length)
    spectra = torch.stft(waves, size, hop, length, window, pad_mode="constant", return_complex=True)
    prediction, reference = (spectra.real.square() + spectra.imag.square()).clamp(min=FLOOR).sqrt().double()
    convergence = (reference - prediction).norm() / reference.norm()
    return convergence.item(), (reference.log() - prediction.log()).abs().mean().item()
