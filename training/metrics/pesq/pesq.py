"""Perceptual evaluation of speech quality, as a module of evaluate."""

import math
from typing import Literal

import numpy as np

from .audio_metric import AudioMetric, Scale, is_silent, require


class Pesq(AudioMetric):
    """Perceptual evaluation of speech quality: the mean opinion score that a listening panel would give.

    `pesq_wb` is the wide-band score of ITU-T P.862.2, `pesq_nb` the narrow-band one of P.862.1. At 16 kHz it is the
    first, at 8 kHz the second; `mode` asks for either or both. Computed by the package pesq from waves brought to one
    peak. Undefined where no speech is found, for silence on either side, and below a quarter of a second.
    """

    scales = {  # noqa: RUF012
        "pesq_wb": Scale("MOS-LQO", (1, 4.65), True),
        "pesq_nb": Scale("MOS-LQO", (1, 4.55), True),
    }
    inputs = f"""{AudioMetric.inputs} 16000, or 8000 for the narrow band.
    mode: "wb", "nb" or "both"; by default the one of the sampling rate. 8 kHz has the narrow band only."""
    citation_text = "ITU-T Recommendations P.862 (2001), P.862.1 (2003) and P.862.2 (2007)"
    rates = (16_000, 8_000)

    def score(
        self,
        prediction: np.ndarray,
        reference: np.ndarray,
        sampling_rate: int,
        mode: Literal["wb", "nb", "both"] | None = None,
    ) -> dict[str, float]:
        """See the class."""
        pesq = require("pesq", "pip install 'pesq>=0.0.4'")
        mode = mode or ("wb" if sampling_rate == 16_000 else "nb")
        if mode not in ("wb", "nb", "both"):
            raise ValueError(f"mode={mode!r}: pass 'wb', 'nb' or 'both'")
        if sampling_rate == 8_000 and mode != "nb":
            raise ValueError("8000 Hz has the narrow band only: pass mode='nb', or waves at 16000 Hz")
        scores = dict.fromkeys([f"pesq_{band}" for band in ("wb", "nb") if mode in (band, "both")], math.nan)
        if is_silent(prediction) or is_silent(reference):
            return scores
        try:
            return {name: float(pesq.pesq(sampling_rate, reference, prediction, name[-2:])) for name in scores}
        except pesq.PesqError:
            return scores
