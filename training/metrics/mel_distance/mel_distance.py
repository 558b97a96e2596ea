"""Multi-scale log-mel distance, as a module of evaluate."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from .audio_metric import AudioMetric, Scale
from .spectral import MelDistance as Distance

WINDOWS = (32, 64, 128, 256, 512, 1024, 2048)


class MelDistance(AudioMetric):
    """Multi-scale mel distance: the mean over window lengths of the L1 distance of log10 mel magnitudes.

    Windows are Hann, hops a quarter, frames centred; a window has `bins` bands, an eighth of its length at most.
    Magnitudes count from `floor` up. 0 for equal waves, about 1 where spectra differ tenfold. The defaults are made
    for 24 kHz; compare scores at one sampling rate and with the same windows only.
    """

    scales = {"mel_distance": Scale("log10", (0, float("inf")), False)}  # noqa: RUF012
    inputs = f"""{AudioMetric.inputs}
    windows: window lengths, in samples. Default {WINDOWS}.
    bins: mel bands of the longest windows. Default 64.
    floor: magnitudes of full scale below which differences do not count. Default 1e-5, which is -100 dB."""
    citation_text = "after Defossez et al. (2022): High Fidelity Neural Audio Compression, arXiv:2210.13438, 3.4"

    def score(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        sampling_rate: int,
        windows: Sequence[int] = WINDOWS,
        bins: int = 64,
        floor: float = 1e-5,
    ) -> dict[str, float]:
        """See the class."""
        distance = _distance(sampling_rate, tuple(windows), bins, floor)
        with torch.inference_mode():
            return {"mel_distance": distance(torch.tensor(reference[None]), torch.tensor(prediction[None])).item()}


@lru_cache(4)
def _distance(*parameters) -> Distance:
    return Distance(*parameters)
