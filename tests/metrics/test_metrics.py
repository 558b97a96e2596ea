"""Metrics as modules of evaluate: closed forms, libraries by hand, known degradations, refusals, and the folders."""

import ast
import functools
import importlib
import io
import itertools
import json
import math
import re
import runpy
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch
import yaml
from scipy.signal import butter, sosfiltfilt

from training.config import ObjectiveConfig
from training.metrics import METRICS, SCORES, load
from training.spectral import MelDistance
from training.validation import si_sdr as si_sdr_of_training

ROOT = Path(__file__).parents[2]
CLIPS = ("nathalie_1010", "nathalie_1110", "nathalie_662")
WAVES = ("si_sdr", "mel_distance", "stft_distance", "stoi", "pesq")
HEAVY = ("visqol", "distillmos", "dnsmos", "speaker_similarity")
SOURCES = sorted(path for path in ROOT.glob("training/metrics/**/*.py") if not path.is_symlink())
FORM = pytest.mark.filterwarnings("ignore:The inplace keyword")
"""How evaluate reads its form's table."""


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


# Words


def test_wer_and_cer_by_hand():
    texts = ["One two,  three FOUR!", "five six", "Seven [laughs] é8"]
    heard = {1: "one too four", 2: "five six seven", 3: "seven é8"}
    metric = load("wer", model=lambda wave, rate: heard[len(wave)], sampling_rate=16_000)
    result = metric.compute(predictions=[np.ones(length, np.float32) for length in heard], references=texts)
    clips = result["per_clip"]
    assert clips["word_errors"] == [2, 1, 0]  # too for two, three missing; seven more
    assert clips["words"] == [4, 2, 2]
    assert clips["characters"] == [18, 8, 8]
    assert clips["character_errors"] == [7, 6, 0]
    assert clips["text"] == ["one too four", "five six seven", "seven é8"]
    assert clips["wer"] == [0.5, 0.5, 0]
    assert result["wer"] == pytest.approx(1 / 3)
    assert result["wer_corpus"] == 3 / 8
    assert result["cer"] == pytest.approx((7 / 18 + 6 / 8) / 3)
    assert result["cer_corpus"] == 13 / 34


def test_wer_normalises_as_it_is_told():
    given = {"predictions": [np.ones(9, np.float32)], "references": ["I'd take twenty"]}
    metric = load("wer", model=lambda wave, rate: "I would take 20", sampling_rate=16_000)
    assert metric.compute(**given)["wer"] == 2 / 4  # i d take twenty
    assert metric.compute(**given, normalizer="english")["wer"] == 0
    assert metric.compute(**given, normalizer=lambda text: "same")["wer"] == 0
    with pytest.raises(ValueError, match="normalizer='french': pass one of"):
        metric.compute(**given, normalizer="french")


@pytest.mark.parametrize(
    ("references", "message"),
    [([" "], r"references\[0\] is ' '"), ([["a"]], r"references\[0\]"), (["..."], "nothing is left"), ([], "1 pred")],
)
def test_wer_needs_words(references, message):
    metric = load("wer", model=lambda wave, rate: "", sampling_rate=16_000)
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[np.ones(9, np.float32)], references=references)


def test_wer_needs_a_model():
    with pytest.raises(ValueError, match="model is missing"):
        load("wer", sampling_rate=16_000).compute(predictions=[np.ones(9, np.float32)], references=["word"])


def save_whisper(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    vocabulary = {"<|end|>": 0, "<|start|>": 1, **{f"word{i}": i for i in range(2, 40)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<|end|>")), eos_token="<|end|>", pad_token="<|end|>"
    )
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 100}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    config = WhisperConfig(vocab_size=40, max_target_positions=12, num_mel_bins=20, **sizes, **widths, **special)
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(max_length=10, suppress_tokens=None, begin_suppress_tokens=None, **special)
    for parameter in model.parameters():
        parameter.data.mul_(8)
    model.half().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=20, chunk_length=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_ctc(folder: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder.mkdir()
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(16, 16), conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    model.lm_head.weight.data.mul_(50)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)


@pytest.mark.parametrize("save", [save_whisper, save_ctc])
def test_wer_with_models_of_transformers(save, tmp_path):
    from transformers import AutoFeatureExtractor, AutoTokenizer, Wav2Vec2ForCTC, WhisperForConditionalGeneration

    save(tmp_path / "model")
    clips = [clip[: 16_000 + 4000 * index] for index, clip in enumerate(read(16_000))]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    kind = WhisperForConditionalGeneration if save is save_whisper else Wav2Vec2ForCTC
    model = kind.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    texts = []
    for clip in clips:
        given = extractor(clip, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
        with torch.no_grad():
            tokens = model.generate(**given) if save is save_whisper else model(**given).logits.argmax(-1)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=save is save_whisper))
    assert len(set(texts)) > 1, "the model hears nothing"
    result = load("wer", sampling_rate=16_000).compute(
        predictions=clips, references=texts, model=tmp_path / "model", normalizer=str
    )
    assert result["per_clip"]["text"] == [text.strip() for text in texts]
    assert result["wer_corpus"] == result["cer"] == 0


# Phones


def items(*labels: str, speaker: str = "s", length_s: float = 0.2, gap_s: float = 0.0) -> list[dict]:
    return [
        {
            "onset_s": i * (length_s + gap_s),
            "offset_s": i * (length_s + gap_s) + length_s,
            "label": label,
            "speaker": speaker,
        }
        for i, label in enumerate(labels)
    ]


def unit(degrees) -> np.ndarray:
    """Features (T, 2) at these angles."""
    radians = np.radians(np.asarray(degrees, float))
    return np.stack([np.cos(radians), np.sin(radians)], -1)


@pytest.mark.parametrize("distance", ["angular", "cosine"])
def test_abx_of_separable_and_of_equal_features(distance):
    references = [items(*"abab", speaker="s"), items(*"babb", speaker="t")]
    separable = [unit([0, 3, 90, 95, 5, 1, 93, 92]), unit([90, 95, 5, 1, 93, 92, 95, 89]) * 7]
    metric = load("abx", frame_rate=10, distance=distance)
    result = metric.compute(predictions=separable, references=references)
    assert (result["abx_within"], result["abx_across"]) == (0, 0)
    equal = [np.random.default_rng(0).standard_normal((1, 33)).repeat(8, 0) * scale for scale in (1, 3)]
    result = metric.compute(predictions=equal, references=references)
    assert (result["abx_within"], result["abx_across"]) == (0.5, 0.5)


def test_abx_by_hand():
    """One frame per token at these angles; s: a 0, a 20, b 30, b 100; t: a 15, b 24."""
    predictions = [unit([0, 20, 30, 100]), unit([15, 24])]
    references = [items(*"aabb", length_s=0.1), items(*"ab", speaker="t", length_s=0.1)]
    result = load("abx", frame_rate=10).compute(predictions=predictions, references=references)
    # within s: X = a 20 is nearer to b 30 than to a 0, the other three (X, A, B) of a are right: 1 / 4;
    # X = b 30 is 70 from b 100, so both a win, and X = b 100 is 70 from b 30 but 80 and 100 from the a: 2 / 4
    assert result["abx_within"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    # across: X = a 15 of t, A in s at 15 and 5, B at 15 and 85: a tie and 3 right, 1 / 8; X = a 0 of s: 15 against 24,
    # right, a 20: 5 against 4, wrong: 1 / 2, and so (1 / 8 + 1 / 2) / 2 for (a, b);
    # X = b 24 of t, B' in s at 6 and 76, a at 24 and 4: 6 < 24, 6 > 4, 76 > both: 3 / 4; X = b 30 and 100 of s,
    # B' of t at 6 and 76, a of t at 15 and 85: right, right: 0
    assert result["abx_across"] == pytest.approx(((1 / 8 + 1 / 2) / 2 + (3 / 4 + 0) / 2) / 2)
    assert result["per_speaker"]["s"]["abx_within"] == result["abx_within"]
    assert math.isnan(result["per_speaker"]["t"]["abx_within"])
    assert result["per_speaker"]["t"]["abx_across"] == pytest.approx((1 / 8 + 3 / 4) / 2)


def warp_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Over every path, the one of the least sum: that sum over its number of steps."""
    local = np.arccos(np.clip(x @ y.T, -1, 1)) / np.pi
    best = {(0, 0): (local[0, 0], 1)}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        ways = [best[way] for way in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if way in best]
        if ways:
            cost, steps = min(ways, key=lambda way: way[0])
            best[i, j] = cost + local[i, j], steps + 1
    cost, steps = best[len(x) - 1, len(y) - 1]
    return cost / steps


def test_warping_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal((length, 5)) for length in (1, 1, 2, 3, 3, 5, 8, 8)]
    tokens = [token / np.linalg.norm(token, axis=1, keepdims=True) for token in tokens]
    found = module_of(load("abx")).token_distances(tokens[:5], tokens[3:])
    expected = [[warp_by_loops(x, y) for y in tokens[3:]] for x in tokens[:5]]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_abx_is_that_of_every_triple_in_turn(seed):
    rng = np.random.default_rng(seed)
    labels = {speaker: rng.choice(list("abc"), 8) for speaker in "stu"}
    predictions = [rng.standard_normal((16, 3)) for _ in labels]
    references = [items(*labels[speaker], speaker=speaker) for speaker in labels]
    tokens = [
        (label, speaker, clip[2 * i : 2 * i + 2] / np.linalg.norm(clip[2 * i : 2 * i + 2], axis=1, keepdims=True))
        for clip, speaker in zip(predictions, labels, strict=True)
        for i, label in enumerate(labels[speaker])
    ]
    cells: dict = {}
    for a, b, x in itertools.permutations(range(len(tokens)), 3):
        (la, sa, ta), (lb, sb, tb), (lx, sx, tx) = tokens[a], tokens[b], tokens[x]
        if la == lx != lb and sa == sb:
            wrong = warp_by_loops(tx, ta) > warp_by_loops(tx, tb)
            cells.setdefault((sa == sx, la, lb), {}).setdefault((sa, sx), []).append(wrong)
    result = load("abx").compute(predictions=predictions, references=references, frame_rate=10, max_per_group=None)
    for name, within in (("abx_within", True), ("abx_across", False)):
        pairs = [np.mean([np.mean(one) for one in cells[key].values()]) for key in cells if key[0] == within]
        assert result[name] == pytest.approx(np.mean(pairs))


def test_abx_takes_the_frames_whose_middle_lies_in_the_token():
    tokens = module_of(load("abx"))._tokens
    clip = unit([0, 10, 20, 30])
    for onset, offset, frames in (
        (0.0, 0.2, [0, 1]),
        (0.06, 0.24, [1]),
        (0.05, 0.25, [0, 1]),
        (0.06, 0.09, [0]),
        (0.36, 0.4, [3]),
    ):
        item = {"onset_s": onset, "offset_s": offset, "label": "a", "speaker": "s"}
        (token,) = tokens([clip], [[item]], 10)["a", "s"]
        np.testing.assert_allclose(token, clip[frames])


def test_abx_draws_the_same_tokens_each_time():
    rng = np.random.default_rng(0)
    given = {
        "predictions": [rng.standard_normal((60, 3))],
        "references": [items(*(list("ab") * 15))],
        "frame_rate": 10,
    }
    metric = load("abx", max_per_group=4)
    first = metric.compute(**given)["abx_within"]
    assert metric.compute(**given)["abx_within"] == first
    assert metric.compute(**given, seed=1)["abx_within"] != first
    assert metric.compute(**given, max_per_group=15) == metric.compute(**given, max_per_group=None)
    assert math.isnan(metric.compute(**given)["abx_across"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": []}, "1 references|empty"),
        ({"predictions": [np.ones(4)]}, r"predictions\[0\] has shape \(4,\): pass features \(T, D\)"),
        ({"predictions": [np.full((4, 2), math.nan)]}, r"predictions\[0\] holds NaN"),
        ({"references": [[{"onset_s": 0, "offset_s": 1, "label": "a"}]]}, r"references\[0\]\[0\] has no speaker"),
        ({"references": [items("a", length_s=-1)]}, r"references\[0\]\[0\] lasts from -?0"),
        ({"references": [items("a", length_s=9)]}, r"references\[0\]\[0\] ends at 9.0 s, beyond the 4 frames"),
        ({"references": [items("a"), items("b")]}, "1 predictions and 2 references"),
        ({"frame_rate": None}, "frame_rate=None: pass"),
        ({"distance": "l2"}, "distance='l2': pass"),
    ],
)
def test_abx_refuses_what_it_cannot_compare(change, message):
    given = {"predictions": [unit([0, 1, 2, 3])], "references": [items("a", "b")], "frame_rate": 10}
    with pytest.raises(ValueError, match=message):
        load("abx").compute(**{**given, **change})


# Codes


def test_codebook_usage_in_closed_form():
    even, constant, biased = np.arange(64) % 16, np.full(64, 3), np.where(np.arange(64) % 4, 0, 9)
    codes = np.stack([even, constant, biased])
    metric = load("codebook_usage", codebook_size=16, frame_rate=12.5)
    metric.add_batch(predictions=[codes[:, :20].tolist(), codes[:, 20:50]])
    result = metric.compute(predictions=[torch.tensor(codes[:, 50:])])
    entropy = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert result["per_level"]["usage"] == [1, 1 / 16, 2 / 16]
    assert result["per_level"]["entropy"] == pytest.approx([4, 0, entropy])
    assert result["per_level"]["perplexity"] == pytest.approx([16, 1, 2**entropy])
    assert result["entropy_bitrate"] == pytest.approx(12.5 * (4 + entropy))
    assert result["nominal_bitrate"] == 12.5 * 3 * 4
    for name in ("usage", "perplexity", "entropy"):
        assert result[name] == pytest.approx(np.mean(result["per_level"][name]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": []}, "empty"),
        ({"predictions": [np.zeros((2, 3))]}, r"predictions\[0\] holds float64: pass codes as integers"),
        ({"predictions": [np.zeros(3, int)]}, r"predictions\[0\] has shape \(3,\)"),
        ({"predictions": [np.zeros((2, 3), int), np.zeros((3, 3), int)]}, r"predictions\[1\] has 3 codebooks"),
        ({"predictions": [np.full((2, 3), -1)]}, r"predictions\[0\] has the code -1: cut padding"),
        ({"codebook_size": 4}, r"predictions\[0\] has the code 4, but codebook_size=4"),
        ({"codebook_size": None}, "codebook_size=None: pass"),
        ({"frame_rate": None}, "frame_rate=None: pass"),
    ],
)
def test_codebook_usage_refuses_what_are_no_codes(change, message):
    given = {"predictions": [np.full((2, 3), 4)], "codebook_size": 8, "frame_rate": 12.5}
    with pytest.raises(ValueError, match=message):
        load("codebook_usage").compute(**{**given, **change})


# The folders


@pytest.mark.parametrize("name", METRICS)
def test_the_table_says_what_the_metric_says(name):
    metric = load(name)
    scores = {key: value for key, value in SCORES.items() if value.metric == name}
    assert list(scores) == list(metric.scales)
    for key, value in scores.items():
        assert (value.unit, value.range, value.higher_is_better) == tuple(metric.scales[key])
        assert value.needs_reference == ("references" in metric.features)
        if rates := getattr(metric, "rates", ()):
            assert value.sampling_rate in rates
        direction = {True: "higher is better", False: "lower is better", None: "neither end is better"}
        assert f"\n- `{key}`: {metric.scales[key]}\n" in metric.description
        assert direction[value.higher_is_better] in metric.description
    assert metric.citation
    assert "predictions: " in metric.compute.__doc__ if metric.compute.__doc__ else metric.inputs_description


@pytest.mark.parametrize("name", METRICS)
def test_a_folder_is_complete(name):
    folder = METRICS[name]
    assert (folder / "audio_metric.py").resolve() == folder.parent / "audio_metric.py"
    _, front, card = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["sdk"] == "gradio"
    assert front["tags"] == ["evaluate", "metric"]
    assert (folder / front["app_file"]).is_file()
    for score_name, value in SCORES.items():
        if value.metric == name:
            assert f"`{score_name}`" in card
    for option in re.findall(r"^    (\w+):", load(name).inputs, re.M):
        assert f"\n- `{option}`: " in card
    needed = (folder / "requirements.txt").read_text().split()
    for line in (folder / f"{name}.py").read_text().splitlines():
        if match := re.match(r"(?:import|from) (\w+)", line):
            package = match[1]
            assert (
                package in sys.stdlib_module_names
                or any(need.startswith(package) for need in needed)
                or (package == "pyarrow")
            ), package  # datasets brings it


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_and_functions_can_be_read(path):
    text = path.read_text()
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, node.name


def run_card(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (METRICS[name] / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{name}/README.md", "exec"), {})


@pytest.mark.parametrize("name", [name for name in METRICS if name not in HEAVY])
def test_blocks_of_a_card_run(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run_card(name)
    assert capsys.readouterr().out.strip()


def run_app(name: str, monkeypatch, **columns: list) -> dict:
    """The Space of a metric, as a Space runs it: its folder first on the path. What its form gives for these rows."""
    import pandas

    forms = []
    parts = SimpleNamespace(Dataframe=lambda **kwargs: None, Textbox=lambda **kwargs: None)
    interface = lambda **kwargs: forms.append(kwargs) or SimpleNamespace(launch=lambda: None)  # noqa: E731
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Interface=interface, inputs=parts, outputs=parts))
    monkeypatch.syspath_prepend(METRICS[name])
    runpy.run_path(str(METRICS[name] / "app.py"), run_name="__main__")
    assert "## How to use" in forms[0]["article"]
    return forms[0]["fn"](pandas.DataFrame({key: [json.dumps(row) for row in rows] for key, rows in columns.items()}))


@FORM
def test_the_app_of_a_metric_that_is_called_like_its_package(monkeypatch):
    """`pesq.py` of the Space comes before the package `pesq` on its path."""
    for module in [module for module in sys.modules if module.split(".")[0] == "pesq"]:
        monkeypatch.delitem(sys.modules, module)
    wave = read(16_000)[0].tolist()
    assert run_app("pesq", monkeypatch, predictions=[wave], references=[wave])["pesq_wb"] == pytest.approx(
        4.644, abs=1e-3
    )


@FORM
def test_the_apps_of_metrics_of_other_things(monkeypatch):
    assert run_app("codebook_usage", monkeypatch, predictions=[[[0, 1], [2, 2]]])["nominal_bitrate"] == 275
    found = run_app(
        "abx", monkeypatch, predictions=[unit([0, 90, 0, 90]).tolist()], references=[items(*"abab", length_s=0.08)]
    )
    assert found["abx_within"] == 0


@pytest.mark.parametrize("name", METRICS)
def test_every_app_loads_its_own_metric_ready_for_its_form(name):
    tree = ast.parse((METRICS[name] / "app.py").read_text())
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load"
    ]
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    metric = load(name, **options)
    if hasattr(metric, "rates"):
        assert metric.check_rate(metric.options["sampling_rate"])
    assert f'with_name("{name}.py")' in (METRICS[name] / "app.py").read_text()
