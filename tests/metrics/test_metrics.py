"""Metrics of waves: closed forms, libraries by hand, known degradations, refusals, and how waves go in."""

import functools
import importlib
import io
import itertools
import math
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from scipy.signal import butter, sosfiltfilt

from training.config import ObjectiveConfig
from training.metrics import METRICS, SCORES, load
from training.spectral import MelDistance
from training.validation import si_sdr as si_sdr_of_training

ROOT = Path(__file__).parents[2]
CLIPS = ("nathalie_1010", "nathalie_1110", "nathalie_662")
WAVES = ("si_sdr", "mel_distance", "stft_distance", "stoi", "pesq")
HEAVY = ("visqol", "distillmos", "dnsmos", "speaker_similarity")


@functools.cache
def read(rate: int = 24_000) -> list[np.ndarray]:
    """The sample clips, float32."""
    clips = [soundfile.read(ROOT / "tests" / "data" / f"{name}.flac", dtype="float32")[0] for name in CLIPS]
    return [soxr.resample(clip, 24_000, rate) for clip in clips]


def noisy(wave: np.ndarray, ratio_db: float) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(len(wave))
    scale = np.sqrt(np.mean(wave**2) / np.mean(noise**2)) * 10 ** (-ratio_db / 20)
    return (wave + scale * noise).astype(np.float32)


def low_passed(wave: np.ndarray, rate: int, cutoff: float) -> np.ndarray:
    return sosfiltfilt(butter(8, cutoff, fs=rate, output="sos"), wave).astype(np.float32)


def opus(wave: np.ndarray, rate: int, compression: float) -> np.ndarray:
    """Through Opus: 1 is about 8 kbit/s, 0.8 about 60."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="OGG", subtype="OPUS", compression_level=compression)
    file.seek(0)
    return np.resize(soundfile.read(file, dtype="float32")[0], len(wave))


def module_of(metric):
    return sys.modules[type(metric).__module__]


def score(name: str, predictions, references=None, **options):
    """A score's value and its result, at the rate that it is defined at."""
    rate = SCORES[name].sampling_rate or 24_000
    given = {"references": references} if SCORES[name].needs_reference else {}
    result = load(SCORES[name].metric).compute(predictions=predictions, sampling_rate=rate, **given, **options)
    return result[name], result


def assert_ranked(names, references, *degrees) -> None:
    """From best to worst, every step by more than rounding, and inside the range that is promised."""
    for name in names:
        values = [score(name, degree, references)[0] for degree in degrees]
        for better, worse in itertools.pairwise(values):
            assert better > worse + 1e-3 if SCORES[name].higher_is_better else better < worse - 1e-3, (name, values)
        low, high = SCORES[name].range
        assert all(low <= value <= high for value in values), (name, values)


# What each score says


@pytest.mark.parametrize(
    ("name", "perfect"),
    [
        *(("si_sdr", 100), ("mel_distance", 0), ("stft_distance", 0), ("spectral_convergence", 0)),
        *(("log_magnitude", 0), ("stoi", 1), ("estoi", 1), ("pesq_wb", 4.644), ("pesq_nb", 4.549)),
    ],
)
def test_a_copy_is_perfect(name, perfect):
    clips = read(SCORES[name].sampling_rate or 24_000)
    value, result = score(name, clips, clips)
    assert value == pytest.approx(perfect, abs=1e-3)
    assert result["failed"] == []


@pytest.mark.parametrize("metric", WAVES)
def test_noise_ranks_by_its_level(metric):
    names = [name for name in SCORES if SCORES[name].metric == metric]
    clips = read(SCORES[names[0]].sampling_rate or 24_000)[:2]
    if metric == "pesq":
        names = ["pesq_wb"]
    assert_ranked(names, clips, *([noisy(clip, ratio) for clip in clips] for ratio in (30, 20, 10, 0)))


@pytest.mark.parametrize("metric", WAVES)
def test_missing_treble_and_coding_rank_by_degree(metric):
    names = [name for name in SCORES if SCORES[name].metric == metric and name != "pesq_nb"]
    rate = SCORES[names[0]].sampling_rate or 24_000
    clips = read(rate)[:2]
    assert_ranked(names, clips, *([low_passed(clip, rate, cutoff) for clip in clips] for cutoff in (5000, 3000, 1500)))
    assert_ranked(names, clips, clips, *([opus(clip, rate, level) for clip in clips] for level in (0.8, 1.0)))


def test_numbers_are_those_of_the_trainer_and_of_the_libraries_by_hand():
    pesq, pystoi = importlib.import_module("pesq"), importlib.import_module("pystoi")
    clips = read()
    decoded = [noisy(clip, ratio) for clip, ratio in zip(clips, (25, 15, 5), strict=True)]
    for name, by_hand in {
        "si_sdr": lambda one, other: si_sdr_of_training(torch.tensor(one), torch.tensor(other)).item(),
        "stoi": lambda one, other: pystoi.stoi(one.astype(float), other.astype(float), 24_000),
        "estoi": lambda one, other: pystoi.stoi(one.astype(float), other.astype(float), 24_000, extended=True),
    }.items():
        value, result = score(name, decoded, clips)
        expected = [by_hand(*pair) for pair in zip(clips, decoded, strict=True)]
        assert result["per_clip"][name] == pytest.approx(expected, rel=1e-6)
        assert value == pytest.approx(np.mean(expected))
    for rate, mode in ((16_000, "wb"), (8_000, "nb")):
        one, other = read(rate), [soxr.resample(wave, 24_000, rate) for wave in decoded]
        value, result = score(f"pesq_{mode}", other, one)
        assert result["per_clip"] == {
            f"pesq_{mode}": [pesq.pesq(rate, *pair, mode) for pair in zip(one, other, strict=True)]
        }


@pytest.mark.parametrize("options", [{}, {"windows": [64, 1024], "bins": 40, "floor": 1e-3}])
def test_mel_distance_is_the_trainers(options):
    clips = read()
    decoded = [low_passed(noisy(clip, 30), 24_000, 4000) for clip in clips]
    config = ObjectiveConfig()
    defaults = {"windows": config.mel_windows, "bins": config.mel_bins, "floor": config.mel_floor}
    distance = MelDistance(24_000, **{**defaults, **options})
    expected = [
        distance(torch.tensor(one)[None], torch.tensor(other)[None]).item()
        for one, other in zip(clips, decoded, strict=True)
    ]
    assert score("mel_distance", decoded, clips, **options)[1]["per_clip"]["mel_distance"] == expected


def test_si_sdr_in_closed_form():
    time = np.arange(8000) / 8000
    tone, other = np.sin(2 * np.pi * 100 * time), np.sin(2 * np.pi * 250 * time)
    metric = load("si_sdr", sampling_rate=8000)
    predictions = [0.3 * (tone + 0.1 * other) + 0.2, -tone + other, tone, other, np.zeros(8000), tone[:1]]
    found = metric.compute(predictions=predictions, references=[tone] * 5 + [tone[:1]])
    assert found["per_clip"]["si_sdr"][:5] == pytest.approx([20, 0, 100, -100, -100], abs=1e-4)
    assert found["failed"] == [5]


def test_stft_distance_in_closed_form():
    wave = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    result = load("stft_distance").compute(predictions=[wave / 2], references=[wave], sampling_rate=24_000)
    assert result["spectral_convergence"] == pytest.approx(0.5, abs=1e-4)
    assert result["log_magnitude"] == pytest.approx(math.log(2), abs=1e-3)
    assert result["stft_distance"] == pytest.approx(result["spectral_convergence"] + result["log_magnitude"])


def test_pesq_has_the_bands_that_are_asked_for():
    clips = read(16_000)[:1]
    metric = load("pesq", sampling_rate=16_000)
    both = metric.compute(predictions=clips, references=clips, mode="both")
    assert both["pesq_wb"] == pytest.approx(4.644, abs=1e-3)
    assert both["pesq_nb"] == pytest.approx(4.549, abs=1e-3)
    assert set(metric.compute(predictions=clips, references=clips, mode="nb")["per_clip"]) == {"pesq_nb"}
    with pytest.raises(ValueError, match="8000 Hz has the narrow band only"):
        metric.compute(predictions=clips, references=clips, sampling_rate=8_000, mode="both")
    with pytest.raises(ValueError, match="mode='swb': pass"):
        metric.compute(predictions=clips, references=clips, mode="swb")


# What cannot be scored


def bad_waves():
    good, zeros = np.ones(100, np.float32), np.zeros
    return [
        ([], [], "predictions is empty"),
        ([good, zeros(0)], [good, good], r"predictions\[1\] has no samples: leave the clip out"),
        ([good], [zeros((1, 100))], r"references\[0\] has shape \(1, 100\): pass one channel"),
        ([good, [0.0, math.nan]], [good, good], r"predictions\[1\] has 1 samples that are NaN"),
        ([good], [good * math.inf], r"references\[0\] has 100 samples that are NaN or infinite"),
        ([good, good[1:]], [good, good], r"predictions\[1\] has 99 samples and references\[1\] has 100: align"),
        ([good], [good, good], "1 predictions and 2 references"),
        ([good * 3000], [good], r"predictions\[0\] has a peak of 3000: scale samples"),
        (good, good, r"predictions\[0\] is a single number: pass a list"),
        (["sound.wav"], [good], r"predictions\[0\] is no array of numbers"),
        ([None], [good], r"predictions\[0\]"),
        (None, [good], "no predictions: pass one entry per clip"),
        ([good], None, "no references: pass one entry per clip"),
        (None, None, "nothing to score"),
    ]


@pytest.mark.parametrize(("predictions", "references", "message"), bad_waves())
def test_bad_waves_are_refused_by_name(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        load("si_sdr").compute(predictions=predictions, references=references, sampling_rate=24_000)


@pytest.mark.parametrize("metric", [*WAVES, *HEAVY, "wer"])
def test_rates_that_do_not_fit_are_refused(metric):
    wave = np.ones(100, np.float32)
    given = {"predictions": [wave]}
    if metric not in ("distillmos", "dnsmos"):
        given["references"] = ["word"] if metric == "wer" else [wave]
    loaded = load(metric)
    takes = " or ".join(map(str, loaded.rates)) or "8000 or more"
    with pytest.raises(ValueError, match=f"sampling_rate is missing: {metric} takes waves at {takes} Hz; pass"):
        loaded.compute(**given)
    with pytest.raises(ValueError, match=f"sampling_rate=4000: {metric} takes waves at {takes} Hz; resample"):
        loaded.compute(**given, sampling_rate=4000)


@pytest.mark.parametrize("name", ["si_sdr", "spectral_convergence", "stoi", "estoi", "pesq_wb"])
def test_clips_without_a_score_are_left_out_and_named(name):
    rate = SCORES[name].sampling_rate or 24_000
    clip, short = read(rate)[0], read(rate)[1][: rate // 10]
    silence = np.zeros_like(clip)
    undefined = {"pesq_wb": [silence, short], "stoi": [silence, short], "estoi": [silence, short]}.get(name, [silence])
    references = [clip, *undefined, clip]
    value, result = score(
        name, [noisy(wave, 20) if wave.any() else noisy(clip, 20) for wave in references], references
    )
    scored = result["per_clip"][name]
    assert result["failed"] == list(range(1, 1 + len(undefined)))
    assert [math.isnan(one) for one in scored] == [False, *[True] * len(undefined), False]
    assert value == pytest.approx((scored[0] + scored[-1]) / 2)
    value, result = score(name, undefined, undefined)
    assert math.isnan(value)
    assert result["failed"] == list(range(len(undefined)))


@pytest.mark.parametrize(("name", "worst"), [("si_sdr", -100), ("stoi", 0), ("pesq_wb", math.nan)])
def test_a_silent_prediction(name, worst):
    clip = read(SCORES[name].sampling_rate or 24_000)[0]
    value = score(name, [np.zeros_like(clip)], [clip])[0]
    assert value == pytest.approx(worst, nan_ok=True)


@pytest.mark.parametrize(
    ("metric", "package", "install"),
    [
        ("stoi", "pystoi", r"pip install 'pystoi>=0.4'"),
        ("pesq", "pesq", r"pip install 'pesq>=0.0.4'"),
        ("wer", "jiwer", r"pip install 'jiwer>=4,<5'"),
        ("visqol", "visqol", r"pip install 'visqol-python>=3.8,<4' ai-edge-litert"),
        ("distillmos", "distillmos", r"pip install --no-deps distillmos==0.9.1 xls-r-sqa==0.1.0"),
        ("dnsmos", "speechmos", r"pip install speechmos==0.0.1.1 'librosa>=0.10' onnxruntime"),
        ("speaker_similarity", "resemblyzer", r"pip install --no-deps resemblyzer==0.1.4 && pip install "),
    ],
)
def test_a_missing_package_is_named_with_its_command(metric, package, install, monkeypatch):
    loaded = load(metric, sampling_rate=16_000)
    for cached in ("_api", "_model", "_encoder"):
        if hasattr(module_of(loaded), cached):
            getattr(module_of(loaded), cached).cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    given = {"predictions": read(16_000)[:1]}
    if "references" in loaded.features:
        given["references"] = ["word"] if metric == "wer" else given["predictions"]
    with pytest.raises(ImportError, match=re.escape(install)):
        loaded.compute(**given, **({"model": lambda wave, rate: ""} if metric == "wer" else {}))


# How waves go in


def test_waves_go_in_as_lists_arrays_and_tensors_and_in_parts():
    clips = [clip[:24_000] for clip in read()]
    decoded = [noisy(clip, 10) for clip in clips]
    metric = load("si_sdr", sampling_rate=24_000)
    expected = metric.compute(predictions=decoded, references=clips)
    for convert in (lambda wave: wave.tolist(), lambda wave: wave.astype(np.float64), torch.tensor):
        given = {"predictions": [convert(one) for one in decoded], "references": [convert(one) for one in clips]}
        assert metric.compute(**given) == expected
    assert metric.compute(predictions=np.stack(decoded), references=np.stack(clips)) == expected
    metric.add_batch(predictions=decoded[:2], references=clips[:2])
    with pytest.raises(ValueError, match="no samples"):
        metric.add_batch(predictions=[[]], references=[[]])
    metric.add(prediction=decoded[2], reference=clips[2])
    assert metric.compute() == expected


def test_evaluates_own_visit_to_every_sample_is_avoided(monkeypatch):
    import datasets

    def visit(*args):
        raise AssertionError("samples are visited one by one")

    monkeypatch.setattr(datasets.Features, "encode_batch", visit)
    monkeypatch.setattr(datasets.Features, "encode_example", visit)
    clips = read()
    assert score("si_sdr", clips, clips)[0] == 100


def test_it_also_works_through_evaluates_cache_on_disk_and_without_a_network(monkeypatch, tmp_path):
    import evaluate

    def connect(*args):
        raise AssertionError("no network is needed")

    monkeypatch.setattr(socket.socket, "connect", connect)
    clips = read()
    metric = evaluate.load(str(METRICS["si_sdr"]), cache_dir=str(tmp_path))
    for _ in range(2):
        assert metric.compute(predictions=clips, references=clips, sampling_rate=24_000)["si_sdr"] == 100
    with pytest.raises(ValueError, match="sampling_rate is missing"):
        metric.compute(predictions=clips, references=clips)
    assert metric.compute(predictions=clips, references=clips, sampling_rate=24_000)["si_sdr"] == 100


def test_unknown_names_are_refused():
    wave = np.ones(100, np.float32)
    with pytest.raises(ValueError, match="no metric 'snr': there are si_sdr, "):
        load("snr")
    with pytest.raises(ValueError, match=r"takes \['predictions', 'references'\], not \['sources'\]"):
        load("si_sdr").add_batch(predictions=[wave], references=[wave], sources=[wave])
    with pytest.raises(TypeError, match="bins"):
        load("si_sdr").compute(predictions=[wave], references=[wave], sampling_rate=8000, bins=3)
