"""Scale-invariant signal-to-distortion ratio, as a module of evaluate."""

import math

import numpy as np

from .audio_metric import AudioMetric, Scale, is_silent

LIMIT_DB = 100.0


class SiSdr(AudioMetric):
    """Scale-invariant signal-to-distortion ratio of waves, in dB: how much of the prediction is the reference.

    Both waves' means are taken off. The prediction is then split into its projection on the reference and the rest,
    and the ratio of their energies is the score, kept within -100 to 100 dB: an exact copy, at any loudness, scores
    100, and where nothing of the reference is found, it is -100. Undefined for a silent reference.
    """

    scales = {"si_sdr": Scale("dB", (-LIMIT_DB, LIMIT_DB), True)}  # noqa: RUF012
    citation_text = "Le Roux, Wisdom, Erdogan, Hershey (2019): SDR - Half-baked or Well Done? arXiv:1811.02508"

    def score(self, prediction: np.ndarray, reference: np.ndarray, sampling_rate: int) -> dict[str, float]:
        """See the class."""
        if is_silent(reference):
            return {"si_sdr": math.nan}
        prediction = prediction.astype(np.float64) - prediction.mean(dtype=np.float64)
        reference = reference.astype(np.float64) - reference.mean(dtype=np.float64)
        target = reference * (prediction @ reference / (reference @ reference))
        rest = prediction - target
        with np.errstate(divide="ignore"):
            ratio_db = 10 * (np.log10(target @ target) - np.log10(rest @ rest)) if target.any() else -LIMIT_DB
        return {"si_sdr": float(np.clip(ratio_db, -LIMIT_DB, LIMIT_DB))}
