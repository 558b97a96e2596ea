"""Scores of reconstructed clips by the project's `evaluate` modules, each at the rate that it is defined at."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.metrics import SCORES, load

from .clips import Clip
from .codec_interface import RATE, resample

RECOGNISED = "wer"
"""The metric that compares with the text of a clip instead of its audio."""


class Scorer:
    """Loaded metrics and their settings."""

    def __init__(self, metrics: Sequence[str], recogniser: str | None = None, text_column: str = "text"):
        """Load metrics by name.

        Args:
            metrics: Names of folders in `training/metrics`.
            recogniser: Hub id or directory of a speech recogniser, for `wer`.
            text_column: Column that holds what is said; clips without text have no `wer`.

        Raises:
            ImportError: A metric's package is missing; it says how to install it.
        """
        self.modules = {name: load(name) for name in metrics}
        self.recogniser = recogniser
        self.text_column = text_column

    def __call__(self, clips: Sequence[Clip], reconstructions: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """All that metrics say of every clip, scores and texts; NaN where undefined. Waves (L,) are at 24 kHz."""
        scores: list[dict[str, Any]] = [{} for _ in clips]
        for name, rate in [(metric, rate) for metric in self.modules for rate in _rates(metric)]:
            chosen = [index for index, clip in enumerate(clips) if name != RECOGNISED or self._text(clip)]
            if not chosen:
                continue
            inputs: dict[str, Any] = {
                "predictions": [resample(reconstructions[index], RATE, rate) for index in chosen],
                "sampling_rate": rate,
            }
            if name == RECOGNISED:
                inputs |= {"references": [self._text(clips[index]) for index in chosen], "model": self.recogniser}
            elif any(score.needs_reference for score in SCORES.values() if score.metric == name):
                inputs["references"] = [resample(clips[index].audio, RATE, rate) for index in chosen]
            for score, values in self.modules[name].compute(**inputs)["per_clip"].items():
                for index, value in zip(chosen, values, strict=True):
                    scores[index][score] = value if isinstance(value, str) else float(value)
        return scores

    def _text(self, clip: Clip) -> str:
        return str(clip.row.get(self.text_column) or "").strip()


def _rates(metric: str) -> list[int]:
    """The rates to bring waves to for a metric, in Hz: one that takes any gets them as they are."""
    return sorted({score.sampling_rate or RATE for score in SCORES.values() if score.metric == metric})
