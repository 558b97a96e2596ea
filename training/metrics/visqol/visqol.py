"""ViSQOL in its speech mode, as a module of evaluate."""

import math
from functools import cache
from typing import Any

import numpy as np

from .audio_metric import AudioMetric, Scale, is_silent, quietly, require

INSTALL = "pip install 'visqol-python>=3.8,<4' ai-edge-litert"


class Visqol(AudioMetric):
    """ViSQOL, speech mode: similarity of the waves' spectrograms, mapped to a mean opinion score.

    Computed by visqol-python, version 3's lattice model. It hears magnitudes in bands, so it is nearly blind to a
    destroyed phase. Undefined for silence on either side, and for clips shorter than about half a second.
    """

    scales = {"visqol": Scale("MOS-LQO", (1, 5), True)}  # noqa: RUF012
    citation_text = "Chinen et al. (2020): ViSQOL v3, arXiv:2004.09584"
    rates = (16_000,)

    def score(self, prediction: np.ndarray, reference: np.ndarray, sampling_rate: int) -> dict[str, float]:
        """See the class."""
        measure = quietly(_api().measure_from_arrays, "invalid value encountered", "divide by zero encountered")
        if is_silent(prediction) or is_silent(reference):
            return {"visqol": math.nan}
        try:
            result = measure(reference.astype(np.float64), prediction.astype(np.float64), sampling_rate)
        except (IndexError, ValueError):  # too short for its spectrogram or its patches
            return {"visqol": math.nan}
        return {"visqol": float(result.moslqo)}


@cache
def _api() -> Any:
    require("ai_edge_litert", INSTALL)  # without it the package falls back to another mapping
    api = require("visqol", INSTALL).VisqolApi()
    api.create(mode="speech", use_lattice_model=True)
    return api
