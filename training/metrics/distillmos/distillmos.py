"""DistillMOS, speech quality without a reference, as a module of evaluate."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Generator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from .audio_metric import WAVES, AudioMetric, Scale, require

INSTALL = "pip install --no-deps distillmos==0.9.1 xls-r-sqa==0.1.0"


class Distillmos(AudioMetric):
    """DistillMOS: the mean opinion score of speech as a small network hears it, without a reference.

    Distilled from a wav2vec 2.0 based model. It hears windows of 7.68 s, brought to one peak, and pads shorter clips
    with silence; longer clips get the mean of windows at most a second apart. Silence gets a number too: leave out
    clips without speech.
    """

    scales = {"distillmos": Scale("MOS", (1, 5), True)}  # noqa: RUF012
    inputs = """    predictions: waves, 1-D arrays or lists of floats in [-1, 1], one per clip.
    sampling_rate: of all waves, in Hz: 16000.
    device: of the network. Default "cpu"."""
    citation_text = (
        "Stahl, Gamper (2025): Distillation and Pruning for Scalable Self-Supervised Speech Quality Assessment"
    )
    columns = {"predictions": WAVES}  # noqa: RUF012
    rates = (16_000,)

    def score(
        self, prediction: np.ndarray, reference: None, sampling_rate: int, device: str = "cpu"
    ) -> dict[str, float]:
        """See the class."""
        model = _model(device)
        with torch.inference_mode():
            return {"distillmos": model(torch.tensor(prediction[None], device=device)).item()}


@cache
def _model(device: str) -> Any:
    with _without_torchaudio():
        package = require("distillmos", INSTALL)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights lie
        return package.ConvTransformerSQAModel().eval().to(device)


@contextlib.contextmanager
def _without_torchaudio() -> Generator[None, None, None]:
    """Import the package where torchaudio is not installed: it imports it for its command line only."""
    missing = "torchaudio" not in sys.modules and importlib.util.find_spec("torchaudio") is None
    if missing:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        yield
    finally:
        if missing:
            del sys.modules["torchaudio"]
