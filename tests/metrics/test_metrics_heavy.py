"""Metrics whose packages are large or go in with --no-deps: copies, degradations, the libraries by hand, and cards."""

import contextlib
import importlib
import io
import math
import os
import sys
import warnings
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from test_metrics import HEAVY, SCORES, assert_ranked, low_passed, noisy, opus, read, score
from test_metrics_folders import FORM, run_app, run_card

from training.metrics import load

PACKAGES = {"visqol": "visqol", "distillmos": "distillmos", "dnsmos": "speechmos", "speaker_similarity": "resemblyzer"}
MAIN = {
    "visqol": "visqol",
    "distillmos": "distillmos",
    "dnsmos": "dnsmos_overall",
    "speaker_similarity": "speaker_similarity",
}


def is_missing(name: str) -> bool:
    """Whether to skip a metric whose package goes in by hand; never where everything is to be tested."""
    return "CI" not in os.environ and find_spec(PACKAGES[name]) is None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize(
        "metric",
        [
            pytest.param(name, marks=pytest.mark.skipif(is_missing(name), reason=f"no {PACKAGES[name]}"))
            for name in HEAVY
        ],
    ),
]


def by_hand(metric: str, original: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """What the library says, called without the metric."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with pytest.MonkeyPatch.context() as patch:
            if metric == "distillmos" and not find_spec("torchaudio"):
                patch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
            package = importlib.import_module(PACKAGES[metric])
        if metric == "visqol":
            api = package.VisqolApi()
            api.create(mode="speech", use_lattice_model=True)
            result = api.measure_from_arrays(original.astype(float), decoded.astype(float), 16_000)
            return {"visqol": result.moslqo}
        if metric == "distillmos":
            with torch.no_grad():
                return {"distillmos": package.ConvTransformerSQAModel().eval()(torch.tensor(decoded)[None]).item()}
        if metric == "dnsmos":
            found = importlib.import_module("speechmos.dnsmos").run(decoded, 16_000)
            names = {"overall": "ovrl", "speech": "sig", "background": "bak", "p808": "p808"}
            return {f"dnsmos_{ours}": found[f"{theirs}_mos"] for ours, theirs in names.items()}
        encoder = package.VoiceEncoder("cpu", verbose=False)
        one, other = (encoder.embed_utterance(package.preprocess_wav(wave, 16_000)) for wave in (original, decoded))
        return {"speaker_similarity": float(one @ other)}


def test_numbers_are_those_of_the_library_by_hand(metric):
    originals = read(16_000)[:2]
    decoded = [low_passed(clip, 16_000, 2000) for clip in originals]
    value, result = score(MAIN[metric], decoded, originals)
    expected = [by_hand(metric, *pair) for pair in zip(originals, decoded, strict=True)]
    for name in expected[0]:
        assert result["per_clip"][name] == pytest.approx([clip[name] for clip in expected], rel=1e-4)
        assert result[name] == pytest.approx(np.mean([clip[name] for clip in expected]), rel=1e-4)
    assert value == result[MAIN[metric]]
    assert set(result) == {*expected[0], "per_clip", "failed"}


def test_a_copy_is_best_and_noise_ranks_by_its_level(metric):
    clips = read(16_000)[: 1 if metric == "dnsmos" else 3]
    degrees = [clips, *([noisy(clip, ratio) for clip in clips] for ratio in (30, 20, 10, 0))]
    assert_ranked([MAIN[metric]], clips, *degrees)
    best = {"visqol": 4.6, "distillmos": 4.2, "dnsmos": 3.1, "speaker_similarity": 0.999999}
    assert score(MAIN[metric], clips, clips)[0] > best[metric]


def test_coding_and_missing_treble_rank_by_degree(metric):
    names = ["dnsmos_p808"] if metric == "dnsmos" else [MAIN[metric]]
    clips = read(16_000)[: 1 if metric == "dnsmos" else 3]
    assert_ranked(
        names, clips, *([low_passed(clip, 16_000, cutoff) for clip in clips] for cutoff in (6000, 3000, 1500))
    )
    assert_ranked(names, clips, *([opus(clip, 16_000, level) for clip in clips] for level in (0.8, 1.0)))


def test_clips_without_a_score_are_left_out_and_named(metric):
    clip = read(16_000)[0]
    silence = np.zeros_like(clip)
    pairs = [(clip, clip), (clip, silence), (silence, clip), (clip[:500], clip[:500])]
    value, result = score(MAIN[metric], [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    scored = result["per_clip"][MAIN[metric]]
    if metric in ("distillmos", "dnsmos"):  # they give every wave a number
        assert result["failed"] == []
        assert value == pytest.approx(np.mean(scored))
    else:
        assert result["failed"] == [1, 2, 3]
        assert [math.isnan(one) for one in scored] == [False, True, True, True]
        assert value == scored[0]


def test_samples_beyond_full_scale_go_in(metric):
    clip = read(16_000)[0]
    value, result = score(MAIN[metric], [clip / np.abs(clip).max() * 1.1], [clip])
    assert result["failed"] == []
    assert value > 0.85 * score(MAIN[metric], [clip], [clip])[0]


def test_the_model_is_loaded_once(metric, monkeypatch):
    clip = read(16_000)[0]
    first = score(MAIN[metric], [clip], [clip])[0]
    module = sys.modules[type(load(metric)).__module__]
    cached = [getattr(module, name) for name in ("_api", "_model", "_encoder") if hasattr(module, name)]
    before = [one.cache_info().misses for one in cached]
    assert score(MAIN[metric], [clip], [clip])[0] == first
    assert [one.cache_info().misses for one in cached] == before


def test_blocks_of_the_card_run(metric, monkeypatch, capsys, request):
    monkeypatch.chdir(request.config.rootpath)
    run_card(metric)
    assert capsys.readouterr().out.strip()


@FORM
def test_the_app_runs_with_its_folder_first_on_the_path(metric, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == metric]:
        monkeypatch.delitem(sys.modules, name)
    wave = read(16_000)[0].tolist()
    columns = {"predictions": [wave]} | ({"references": [wave]} if SCORES[MAIN[metric]].needs_reference else {})
    assert run_app(metric, monkeypatch, **columns)["failed"] == []
