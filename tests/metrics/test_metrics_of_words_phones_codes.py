"""WER with recognisers of all kinds, ABX against plain loops, use of codebooks: closed forms and refusals."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_metrics import module_of, read

from training.metrics import load

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


def test_of_equally_good_paths_the_one_ahead_in_both_counts():
    found = module_of(load("abx")).token_distances([unit([0, 0, 60])], [unit([0, 0, 0])])
    assert found[0, 0] == pytest.approx((0 + 0 + 1 / 3) / 3)


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
