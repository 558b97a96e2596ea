"""Scores of reconstructions and codebooks: closed forms, and that neither batches nor processes change them."""

import math
import pickle
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import speech

from training.validation import Validation, intelligibility, merge, si_sdr, validate

RATE = 24_000
DATA = Path(__file__).parent / "data"


def distance(audio: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Stands in for the mel distance: mean absolute difference per clip."""
    return (audio - reconstruction).abs().mean(1)


@pytest.fixture
def clips() -> list[tuple[str, torch.Tensor]]:
    lengths = [30_000, 12_345, 20_000, 31_111, 9_000, 24_000, 15_001]
    return [(f"clip {i}", speech(length, seed=i)[0, 0]) for i, length in enumerate(lengths)]


@pytest.fixture
def spoken() -> torch.Tensor:
    return torch.tensor(soundfile.read(DATA / "nathalie_1010.flac", dtype="float32")[0])


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (-0.3, 0.7), (1e-4, -5.0)])
@pytest.mark.parametrize("ratio_db", [-20.0, 0.0, 12.5])
def test_si_sdr_of_a_signal_and_orthogonal_noise(gain, offset, ratio_db):
    time = torch.arange(1000, dtype=torch.float64)
    audio = 3 * torch.sin(2 * torch.pi * 10 * time / 1000)
    noise = 3 * 10 ** (-ratio_db / 20) * torch.sin(2 * torch.pi * 25 * time / 1000)
    batch = torch.stack([audio + noise, audio - noise])
    scores = si_sdr(audio + 0.2, gain * batch + offset)
    torch.testing.assert_close(scores, torch.full((2,), ratio_db, dtype=torch.float64))


def test_si_sdr_is_finite_at_its_ends():
    audio, silence = speech(2400)[0, 0], torch.zeros(2400)
    assert si_sdr(audio, audio) == si_sdr(audio, 0.01 * audio) == 100
    assert si_sdr(audio, silence) == si_sdr(silence, audio) == si_sdr(silence, silence) == -100


def test_stoi_of_speech(spoken):
    noise = torch.randn(len(spoken), generator=torch.Generator().manual_seed(0))
    scores = [intelligibility(spoken, spoken + level * noise, RATE) for level in (0, 0.01, 0.1)]
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert 1 > scores[1] > scores[2] > 0
    assert intelligibility(spoken, torch.zeros_like(spoken), RATE) == 0


@pytest.mark.parametrize("speech_s", [0.0, 0.001, 0.1, 0.3])
@pytest.mark.parametrize("silence_s", [0.001, 2.0])
def test_stoi_is_undefined_with_too_little_speech(spoken, speech_s, silence_s):
    audio = torch.cat([spoken[24_000 : 24_000 + int(speech_s * RATE)], torch.zeros(int(silence_s * RATE))])
    assert math.isnan(intelligibility(audio, audio, RATE))


def test_usage_and_perplexity():
    counts = torch.zeros(4, 8, dtype=torch.int64)
    counts[0] = 5  # all alike
    counts[1, 3] = 7  # always the same
    counts[2, :2] = torch.tensor([3, 1])
    counts[3, :4] = 2
    measured = Validation([], counts, {})
    assert measured.codebook_usage == [1, 1 / 8, 2 / 8, 4 / 8]
    biased = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert measured.codebook_perplexity == pytest.approx([8, 1, biased, 4])


@pytest.fixture
def exact_model(tiny_model):
    """In float64, where the rounding of another batch does not decide between two entries."""
    return tiny_model.double()


def test_a_perfect_codec_is_perfect(tiny_model, monkeypatch, spoken):
    def copy(self, audio_codes, padding_mask):
        return type("Decoded", (), {"audio_values": self.given})

    def remember(self, input_values, **kwargs):
        self.given = input_values
        return encode(self, input_values, **kwargs)

    encode = type(tiny_model).encode
    monkeypatch.setattr(type(tiny_model), "encode", remember)
    monkeypatch.setattr(type(tiny_model), "decode", copy)
    clips = [("short", spoken[12_000:30_000]), ("long", spoken)]
    scores = validate(tiny_model, clips, distance).scores
    assert scores == {"si_sdr": 100, "mel_distance": 0, "stoi": pytest.approx(1, abs=1e-6)}


@pytest.mark.parametrize("num_quantizers", [None, 2])
def test_each_clip_is_scored_on_its_own_samples(exact_model, clips, num_quantizers):
    measured = validate(exact_model, clips, distance, 3, num_quantizers, examples=2)
    counts = torch.zeros(num_quantizers or 4, 64, dtype=torch.int64)
    assert [clip["name"] for clip in measured.per_clip] == [name for name, _ in clips]
    for (_, audio), clip in zip(clips, measured.per_clip, strict=True):
        with torch.no_grad():
            codes = exact_model.encode(audio[None, None].double(), num_quantizers=num_quantizers).audio_codes
            alone = exact_model.decode(codes).audio_values[0, 0, : len(audio)].float()
        for level, chosen in enumerate(codes[0]):
            counts[level] += torch.bincount(chosen, minlength=64)
        assert clip["seconds"] == len(audio) / RATE
        assert clip["mel_distance"] == pytest.approx((audio - alone).abs().mean().item(), rel=1e-6)
        assert clip["si_sdr"] == pytest.approx(si_sdr(audio, alone).item(), abs=1e-3)
        assert clip["stoi"] == pytest.approx(intelligibility(audio, alone, RATE), abs=1e-6, nan_ok=True)
        if clip["name"] in measured.reconstructions:
            torch.testing.assert_close(measured.reconstructions[clip["name"]], alone, rtol=0, atol=1e-6)
    assert torch.equal(measured.counts, counts)
    assert list(measured.reconstructions) == ["clip 0", "clip 1"]


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_what_processes_measured_merges_into_the_whole(exact_model, clips, processes):
    whole = validate(exact_model, clips, distance, examples=4)
    parts = [validate(exact_model, clips[rank::processes], distance, examples=4) for rank in range(processes)]
    merged = merge(pickle.loads(pickle.dumps(parts)))
    assert [clip["name"] for clip in merged.per_clip] == [name for name, _ in clips]
    assert torch.equal(merged.counts, whole.counts)
    assert merged.values() == pytest.approx(whole.values(), abs=1e-3)
    assert list(merged.reconstructions) == list(whole.reconstructions) == [name for name, _ in clips[:4]]
    torch.testing.assert_close(merged.reconstructions, whole.reconstructions, rtol=0, atol=1e-6)


def test_undefined_scores_are_left_out_and_counted(tiny_model, clips):
    silent, short = ("silence", torch.zeros(24_000)), ("word", clips[0][1][:4000])
    measured = validate(tiny_model, [*clips[:2], silent, short], distance)
    assert measured.undefined == {"si_sdr": 1, "mel_distance": 0, "stoi": 2}
    defined = [clip["stoi"] for clip in measured.per_clip[:2]]
    assert measured.scores["stoi"] == pytest.approx(sum(defined) / 2)
    assert set(measured.values()) == {
        *("si_sdr", "mel_distance", "stoi"),
        *(f"{name}_{level}" for name in ("usage", "perplexity") for level in range(1, 5)),
    }
    assert all(math.isnan(score) for score in validate(tiny_model, [], distance).scores.values())


def test_a_reconstruction_that_is_not_finite_scores_worst(tiny_model, clips):
    with torch.no_grad():
        next(tiny_model.decoder.parameters()).fill_(math.nan)
    measured = validate(tiny_model, clips[:1], distance)
    assert measured.scores == {"si_sdr": -100, "mel_distance": math.inf, "stoi": 0}
