"""DNSMOS, speech quality without a reference, as a module of evaluate."""

import numpy as np

from .audio_metric import WAVES, AudioMetric, Scale, require

NAMES = {
    "dnsmos_overall": "ovrl_mos",
    "dnsmos_speech": "sig_mos",
    "dnsmos_background": "bak_mos",
    "dnsmos_p808": "p808_mos",
}


class Dnsmos(AudioMetric):
    """DNSMOS: mean opinion scores as networks made for judging noise suppression hear them, without a reference.

    `dnsmos_overall`, `dnsmos_speech` and `dnsmos_background` are the three ratings of ITU-T P.835, `dnsmos_p808` is
    that of P.808. Computed by speechmos from windows of 9.01 s a second apart; shorter clips are repeated, and samples
    beyond full scale are clipped. It was not made for codecs: it ranks some coded speech above its original.
    """

    scales = dict.fromkeys(NAMES, Scale("MOS", (1, 5), True))
    inputs = """    predictions: waves, 1-D arrays or lists of floats in [-1, 1], one per clip.
    sampling_rate: of all waves, in Hz: 16000."""
    citation_text = (
        "Reddy, Gopal, Cutler (2022): DNSMOS P.835: A Non-Intrusive Perceptual Objective Speech Quality Metric to "
        "Evaluate Noise Suppressors, arXiv:2110.01763"
    )
    columns = {"predictions": WAVES}  # noqa: RUF012
    rates = (16_000,)

    def score(self, prediction: np.ndarray, reference: None, sampling_rate: int) -> dict[str, float]:
        """See the class."""
        dnsmos = require("speechmos.dnsmos", "pip install speechmos==0.0.1.1 'librosa>=0.10' onnxruntime")
        found = dnsmos.run(np.clip(prediction, -1, 1), sampling_rate)
        return {name: float(found[theirs]) for name, theirs in NAMES.items()}
