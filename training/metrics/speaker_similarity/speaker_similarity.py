"""Cosine of two waves' speaker embeddings, as a module of evaluate."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch

from .audio_metric import AudioMetric, Scale, is_silent, require

INSTALL = "pip install --no-deps resemblyzer==0.1.4 && pip install 'librosa>=0.10' webrtcvad-wheels"


class SpeakerSimilarity(AudioMetric):
    """Cosine of the speaker embeddings of prediction and reference: does it still sound like the same person?

    Computed by resemblyzer's encoder, trained for speaker verification with the GE2E loss, from the voiced parts of
    either wave; samples beyond full scale are clipped. Its embeddings are not negative: two clips of one speaker score
    0.74 to 0.89 and of two speakers 0.40 to 0.66 (8 speakers, 10th to 90th percentile). It hears loudness: bring waves
    to one level. Undefined where no voice is found on either side.
    """

    scales = {"speaker_similarity": Scale("cosine", (0, 1), True)}  # noqa: RUF012
    inputs = f"""{AudioMetric.inputs} 16000.
    device: of the network. Default "cpu"."""
    citation_text = (
        "Wan, Wang, Papir, Moreno (2018): Generalized End-to-End Loss for Speaker Verification, arXiv:1710.10467"
    )
    rates = (16_000,)

    def score(
        self, prediction: np.ndarray, reference: np.ndarray, sampling_rate: int, device: str = "cpu"
    ) -> dict[str, float]:
        """See the class."""
        one, other = _embed(prediction, device), _embed(reference, device)
        return {"speaker_similarity": math.nan if one is None or other is None else float(one @ other)}


def _embed(wave: np.ndarray, device: str) -> np.ndarray | None:
    package = require("resemblyzer", INSTALL)
    encoder = _encoder(device)
    if is_silent(wave):
        return None
    voiced = package.preprocess_wav(np.clip(wave, -1, 1))
    if not len(voiced):
        return None
    with torch.inference_mode():
        return encoder.embed_utterance(voiced)


@cache
def _encoder(device: str) -> Any:
    return require("resemblyzer", INSTALL).VoiceEncoder(device, verbose=False).eval()
