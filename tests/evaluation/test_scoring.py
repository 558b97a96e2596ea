"""How an evaluation asks its metrics: at their rates, with their references, clip by clip."""

import numpy as np
import pytest

from training.evaluation import scoring
from training.evaluation.clips import Clip
from training.evaluation.scoring import Scorer


class Spy:
    """In a metric's place: notes what it is asked, and answers with what it is told."""

    def __init__(self, **answers):
        self.answers = answers
        self.asked = []

    def compute(self, **inputs):
        self.asked.append(inputs)
        return {"per_clip": {name: values[: len(inputs["predictions"])] for name, values in self.answers.items()}}


@pytest.fixture
def clips():
    waves = [np.full(length, 0.1, dtype=np.float32) for length in (24_000, 36_000, 12_000)]
    texts = ["hello", None, " "]
    return [
        Clip(str(number), *pair) for number, pair in enumerate(zip(waves, [{"text": t} for t in texts], strict=True))
    ]


def asked(monkeypatch, clips, name, **answers):
    spy = Spy(**answers)
    monkeypatch.setattr(scoring, "load", lambda _: spy)
    scores = Scorer([name], recogniser="some/recogniser")(clips, [clip.audio / 2 for clip in clips])
    return scores, spy.asked


def test_words_are_compared_where_there_are_any(monkeypatch, clips):
    scores, calls = asked(monkeypatch, clips, "wer", wer=[0.5], words=[1], prediction_text=["hallo"])
    assert scores == [{"wer": 0.5, "words": 1.0, "prediction_text": "hallo"}, {}, {}]
    [call] = calls
    assert call["references"] == ["hello"]
    assert call["model"] == "some/recogniser"
    assert [len(wave) for wave in call["predictions"]] == [16_000]


def test_waves_come_at_the_rates_that_scores_are_defined_at(monkeypatch, clips):
    scores, calls = asked(monkeypatch, clips, "pesq", pesq=[1.0, 2.0, 3.0])
    assert [call["sampling_rate"] for call in calls] == [8_000, 16_000]
    for call in calls:
        assert [len(wave) for wave in call["predictions"]] == [call["sampling_rate"] * s // 2 for s in (2, 3, 1)]
        assert [len(wave) for wave in call["references"]] == [len(wave) for wave in call["predictions"]]
        middle = len(call["references"][0]) // 2
        assert call["references"][0][middle] == pytest.approx(2 * call["predictions"][0][middle], rel=1e-3)
    assert [score["pesq"] for score in scores] == [1.0, 2.0, 3.0]


def test_scores_without_reference_get_none(monkeypatch, clips):
    _, [call] = asked(monkeypatch, clips, "distillmos", distillmos=[3.0, 3.0, 3.0])
    assert "references" not in call
