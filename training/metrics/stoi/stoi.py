"""Short-time objective intelligibility, as a module of evaluate."""

import math
import warnings

import numpy as np

from .audio_metric import AudioMetric, Scale, is_silent, require

SHORTEST_S = 0.4


class Stoi(AudioMetric):
    """Short-time objective intelligibility: how much of the reference's envelopes listeners will find again.

    `stoi` correlates the envelopes of third-octave bands over 384 ms, `estoi` the spectra of those stretches with each
    other, which tells modulated noise better. Computed by pystoi, at 10 kHz. Undefined for clips with less than 0.4 s
    of speech, and for a silent reference.
    """

    scales = {"stoi": Scale("", (-1, 1), True), "estoi": Scale("", (-1, 1), True)}  # noqa: RUF012
    citation_text = (
        "Taal, Hendriks, Heusdens, Jensen (2011): An Algorithm for Intelligibility Prediction of Time-Frequency "
        "Weighted Noisy Speech; Jensen, Taal (2016): An Algorithm for Predicting the Intelligibility of Speech Masked "
        "by Modulated Noise Maskers"
    )

    def score(self, prediction: np.ndarray, reference: np.ndarray, sampling_rate: int) -> dict[str, float]:
        """See the class."""
        stoi = require("pystoi", "pip install 'pystoi>=0.4'").stoi
        if len(reference) < SHORTEST_S * sampling_rate or is_silent(reference):
            return dict.fromkeys(self.scales, math.nan)
        waves = reference.astype(np.float64), prediction.astype(np.float64)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
            try:
                return {name: float(stoi(*waves, sampling_rate, extended=name == "estoi")) for name in self.scales}
            except RuntimeWarning:
                return dict.fromkeys(self.scales, math.nan)
