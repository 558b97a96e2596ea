# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""Feature extraction: parity with stock transformers, every kind of input, resampling, padding, errors, saving."""

import json
import math
import sys
from collections import UserList
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor, EncodecFeatureExtractor

from modeling_mimi import feature_extraction_mimi
from modeling_mimi.feature_extraction_mimi import MimiFeatureExtractor

RATE = 24_000
extractor = MimiFeatureExtractor()
stereo_extractor = MimiFeatureExtractor(feature_size=2)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Reproducible float32 samples in [-1, 1)."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def tone(frequency: float, rate: float) -> np.ndarray:
    """One second of a cosine of amplitude 0.5 as float32."""
    return (0.5 * np.cos(2 * np.pi * frequency * np.arange(rate) / rate)).astype(np.float32)


def values(clip, rate: float | None = RATE, using: MimiFeatureExtractor = extractor, **kwargs) -> np.ndarray:
    """The `(C, L)` output for one clip."""
    output = using(clip, sampling_rate=rate, **kwargs)["input_values"]
    assert len(output) == 1
    return output[0]


def decoder(data: torch.Tensor, rate: int) -> SimpleNamespace:
    """A stand-in for torchcodec's AudioDecoder."""
    return SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=data, sample_rate=rate))


# Parity with stock


def assert_equal_to_stock(clips, init: dict | None = None, **kwargs):
    init = {"sampling_rate": RATE, **(init or {})}
    expected = EncodecFeatureExtractor(**init)(clips, sampling_rate=RATE, **kwargs)
    actual = MimiFeatureExtractor(**init)(clips, sampling_rate=RATE, **kwargs)
    assert set(actual) == set(expected)
    assert MimiFeatureExtractor.model_input_names == EncodecFeatureExtractor.model_input_names
    for key in expected:
        for ours, stock in zip(actual[key], expected[key], strict=True):
            assert (type(ours), ours.dtype) == (type(stock), stock.dtype)
            np.testing.assert_array_equal(ours, stock)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=4),
    channels=st.sampled_from([1, 2]),
    side=st.sampled_from(["right", "left"]),
    padding_value=st.sampled_from([0.0, 0.25]),
    padding=st.sampled_from([None, True, "longest", "max_length"]),
    return_tensors=st.sampled_from([None, "np", "pt"]),
)
def test_batches_equal_stock(lengths, channels, side, padding_value, padding, return_tensors):
    clips = [noise(length) if channels == 1 else noise(2, length) for length in lengths]
    max_length = 50 if padding == "max_length" else None
    init = {"feature_size": channels, "padding_side": side, "padding_value": padding_value}
    assert_equal_to_stock(clips, init, padding=padding, max_length=max_length, return_tensors=return_tensors)


@pytest.mark.parametrize("clips", [noise(7), np.float64(noise(7)), noise(7).tolist(), [[0.1, 0.2], [0.3]]])
def test_other_clips_that_stock_takes_give_equal_values(clips):
    assert_equal_to_stock(clips)


@pytest.mark.parametrize("return_tensors", [None, "pt"])
def test_unpadded_and_truncated_equal_stock(return_tensors):
    assert_equal_to_stock([noise(9)], padding=False, return_tensors=return_tensors)
    assert_equal_to_stock([noise(9)], padding="max_length", max_length=5, return_tensors=return_tensors)
    clips = [noise(9), noise(6)]
    assert_equal_to_stock(clips, padding=False, truncation=True, max_length=5, return_tensors=return_tensors)
    assert_equal_to_stock(clips, padding=False)


# Kinds, dtypes and channels


@pytest.mark.parametrize(
    "clip",
    [
        torch.from_numpy(noise(50)),
        torch.from_numpy(noise(50)).requires_grad_(),
        noise(50, 1),
        noise(50).tolist(),
        list(noise(50)),
        tuple(noise(50)),
        {"array": noise(50).tolist(), "sampling_rate": np.int64(RATE), "path": None},
        {"array": torch.from_numpy(noise(50)), "sampling_rate": torch.tensor(RATE)},
        {"array": noise(50), "sampling_rate": np.array(RATE)},
        {"array": noise(50), "path": "a.wav"},
        decoder(torch.from_numpy(noise(1, 50)), RATE),
    ],
    ids=lambda clip: type(clip).__name__,
)
def test_every_kind_of_clip_gives_the_same_values(clip):
    expected = noise(1, 50)
    np.testing.assert_array_equal(values(clip), expected)
    both = extractor([clip, noise(60)], sampling_rate=RATE)
    np.testing.assert_array_equal(both["input_values"][0, :, :50], expected)
    assert both["padding_mask"].sum(-1).tolist() == [50, 60]


def test_a_column_is_a_batch_and_read_once():
    class Column(UserList):
        reads = 0

        def __getitem__(self, index):
            clip = super().__getitem__(index)
            self.reads += 1
            return clip

    column = Column([decoder(torch.zeros(1, 3), RATE), noise(4)])
    assert extractor(column, sampling_rate=RATE)["padding_mask"].sum(-1).tolist() == [3, 4]
    assert column.reads == 2


@pytest.mark.parametrize(
    ("dtype", "samples", "expected"),
    [
        (np.uint8, [0, 64, 128, 255], [-1, -0.5, 0, 127 / 128]),
        (np.int16, [-(2**15), -(2**14), 0, 2**15 - 1], [-1, -0.5, 0, 1 - 2**-15]),
        (np.int32, [-(2**31), -(2**30), 0, 2**30 + 2**20], [-1, -0.5, 0, 0.5 + 2**-11]),
        (np.float16, [-1, -0.5, 0, 2.5], [-1, -0.5, 0, 2.5]),
        (np.float32, [-1, -0.1, 0, 2.5], [-1, -0.1, 0, 2.5]),
        (np.float64, [-1, -0.1, 0, 2.5], [-1, -0.1, 0, 2.5]),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_dtypes(dtype, samples, expected):
    array = np.array(samples, dtype=dtype)
    for clip in (array, torch.from_numpy(array), array.astype(array.dtype.newbyteorder(">"))):
        output = values(clip)
        assert output.dtype == np.float32
        np.testing.assert_array_equal(output[0], np.array(expected, dtype=np.float32))


def test_bfloat16():
    clip = torch.tensor([-1, -0.5, 0, 2.5], dtype=torch.bfloat16)
    np.testing.assert_array_equal(values(clip), [clip.tolist()])


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_channels_are_averaged_in_either_layout(channels):
    clip = noise(channels, 30)
    expected = clip.mean(axis=0, keepdims=True)
    np.testing.assert_array_equal(values(clip), expected)
    np.testing.assert_allclose(values(clip.T), expected, atol=1e-7)


def test_as_many_samples_as_channels_reads_as_channels_first():
    np.testing.assert_array_equal(values(np.array([[1.0, 2.0], [3.0, 4.0]])), [[2.0, 3.0]])


@pytest.mark.parametrize("padding", [True, False])
def test_stereo_output_keeps_stereo_and_repeats_mono(padding):
    stereo, mono = noise(2, 30), noise(30)
    nested = [stereo.tolist()]  # a batch of one clip
    for clip, expected in [(stereo, stereo), (stereo.T, stereo), (nested, stereo), (mono, np.stack([mono, mono]))]:
        np.testing.assert_array_equal(values(clip, using=stereo_extractor, padding=padding), expected)


@pytest.mark.parametrize("padding", [True, False])
def test_the_output_is_a_copy(padding):
    clip = noise(30)
    values(clip, padding=padding)[:] = 7
    np.testing.assert_array_equal(clip, noise(30))


# Resampling


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, np.float64(44_100)])
def test_a_tone_stays_that_tone(rate):
    output = values(tone(440, rate), rate)[0]
    assert len(output) == RATE
    assert np.abs(np.fft.rfft(output)).argmax() == 440  # the bins of one second are 1 Hz apart
    # Sample by sample, so pitch, level and alignment in time all hold. The edges ring, as the tone starts abruptly.
    np.testing.assert_allclose(output[1200:-1200], tone(440, RATE)[1200:-1200], atol=2e-6)


@pytest.mark.parametrize("frequency", [12_500, 15_000, 20_000])
def test_what_the_output_rate_cannot_hold_disappears(frequency):
    output = values(tone(frequency, 48_000), 48_000)[0]
    assert np.abs(output[1200:-1200]).max() < 1e-6


@settings(deadline=None, max_examples=50)
@given(length=st.integers(100, 3000), rate=st.integers(8_000, 96_000))
def test_length_after_resampling(length, rate):
    assert values(noise(length), rate).shape == (1, int(length * RATE / rate + 0.5))


def test_channels_are_resampled_separately():
    clip = np.stack([tone(440, 48_000), tone(1000, 48_000)])
    output = values(clip, 48_000, stereo_extractor)
    for mono, channel in zip(clip, output, strict=True):
        np.testing.assert_allclose(channel, values(mono, 48_000)[0], atol=1e-6)


def test_a_batch_of_mixed_rates():
    batch = [
        {"array": tone(440, 16_000), "sampling_rate": 16_000},
        decoder(torch.from_numpy(tone(440, 48_000)).expand(2, -1), 48_000),
        {"array": tone(440, RATE), "sampling_rate": RATE},
    ]
    output = extractor(batch)
    assert output["padding_mask"].all()
    first, second, third = output["input_values"][:, 0, 1200:-1200]
    np.testing.assert_allclose(first, third, atol=1e-5)
    np.testing.assert_allclose(second, third, atol=1e-5)


def test_the_target_is_the_extractors_own_rate():
    low = MimiFeatureExtractor(sampling_rate=16_000)
    np.testing.assert_array_equal(values(noise(50), 16_000, low), noise(1, 50))
    assert values(noise(150), RATE, low).shape == (1, 100)


def test_without_soxr_only_resampling_fails(monkeypatch):
    monkeypatch.setattr(feature_extraction_mimi, "soxr", None)
    np.testing.assert_array_equal(values(noise(50)), noise(1, 50))
    with pytest.raises(ImportError, match=r"Clip 0 is at 16000 Hz.*24000 Hz.*pip install soxr"):
        values(noise(50), 16_000)


# Padding and truncation


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    side=st.sampled_from(["right", "left"]),
    padding=st.sampled_from([True, "longest", "max_length"]),
    truncation=st.booleans(),
    max_length=st.integers(1, 40),
    multiple=st.sampled_from([1, 8]),
)
def test_padding_adds_exactly_what_the_mask_marks(lengths, side, padding, truncation, max_length, multiple):
    clips = [noise(length, seed=length) for length in lengths]
    lengthening = {"padding": padding, "pad_to_multiple_of": multiple, "padding_side": side}
    output = extractor(clips, RATE, truncation=truncation, max_length=max_length, **lengthening)
    limit = math.ceil(max_length / multiple) * multiple
    kept = [min(length, limit) if truncation else length for length in lengths]
    padded = math.ceil(max(kept) / multiple) * multiple
    padded = max(padded, limit) if padding == "max_length" else padded

    assert output["input_values"].shape == (len(clips), 1, padded)
    assert output["padding_mask"].shape == (len(clips), padded)
    for clip, length, wave, mask in zip(clips, kept, output["input_values"], output["padding_mask"], strict=True):
        ordered = mask if side == "right" else mask[::-1]
        assert ordered.tolist() == [1] * length + [0] * (padded - length)
        np.testing.assert_array_equal(wave[0][mask == 1], clip[:length])
        assert not wave[0][mask == 0].any()


def test_the_padding_side_is_the_extractors_unless_the_call_says_otherwise():
    left = MimiFeatureExtractor(padding_side="left")
    assert left([noise(2), noise(1)], RATE)["padding_mask"].tolist() == [[1, 1], [0, 1]]
    assert left([noise(2), noise(1)], RATE, padding_side="right")["padding_mask"].tolist() == [[1, 1], [1, 0]]
    assert left.padding_side == "left"


def test_unpadded_clips_come_as_a_list():
    output = extractor([noise(5), noise(3)], sampling_rate=RATE, padding=False)
    assert [wave.shape for wave in output["input_values"]] == [(1, 5), (1, 3)]
    with pytest.raises(ValueError, match="padding=True"):
        extractor([noise(5), noise(3)], sampling_rate=RATE, padding=False, return_tensors="pt")


def test_return_attention_mask_switches_the_mask_off():
    output = MimiFeatureExtractor(return_attention_mask=False)([noise(5), noise(3)], sampling_rate=RATE)
    assert set(output) == {"input_values"}


# Errors


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "is empty, shape"),
        (np.zeros((2, 0)), ValueError, r"is empty, shape \(2, 0\)"),
        (np.array([0.0, np.nan]), ValueError, "has NaN or infinite"),
        (np.array([0.0, -np.inf]), ValueError, "has NaN or infinite"),
        (np.array([0.0, 1e300]), ValueError, "has NaN or infinite"),
        (torch.tensor([0.0, 1e300], dtype=torch.float64), ValueError, "has NaN or infinite"),
        (np.float32(0.5), TypeError, "is a float32: pass its samples"),
        (np.array(0.5), ValueError, r"has 0 dimensions, shape \(\).*list of clips"),
        (np.zeros((2, 1, 9)), ValueError, "has 3 dimensions.*list of clips"),
        (np.zeros((9, 9)), ValueError, "would have 9 channels, more than 8.*list of clips"),
        ([[0.0, 0.1], [0.2]], ValueError, "is a ragged nested list"),
        ([0.0, [0.1]], ValueError, "is a ragged nested list"),
        ([0, 1], TypeError, "has samples of dtype int64: convert them to floats.*uint8, int16, int32"),
        (np.zeros(3, dtype=bool), TypeError, "has samples of dtype bool"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "has samples of dtype complex64"),
        ([0.0, None], TypeError, "has samples of dtype object"),
        ([0.0, "a"], TypeError, "has samples of dtype str"),
        ("speech.wav", TypeError, "is a str: pass its samples.*soundfile.read"),
        (b"RIFF", TypeError, "is a bytes"),
        (None, TypeError, "is a NoneType"),
        ({"path": "a.wav"}, ValueError, r"is a mapping without samples .*keys: \['path'\].*decode=True"),
        ({"array": None, "path": "a.wav"}, ValueError, "is a mapping without samples"),
        ({"array": "a.wav", "sampling_rate": RATE}, TypeError, "is a str"),
    ],
)
def test_a_bad_clip_is_named(bad, error, message):
    with pytest.raises(error, match=f"^Clip 1 {message}"):
        extractor([noise(9), bad], sampling_rate=RATE)


@pytest.mark.parametrize("bad", ["speech.wav", b"RIFF", torch.zeros(4, 1, 9), [0.0, [0.1]]])
def test_a_bad_clip_alone_is_clip_0(bad):
    with pytest.raises((TypeError, ValueError), match=r"^Clip 0 (is a str|is a bytes|has 3 dimensions|is a ragged)"):
        extractor(bad, sampling_rate=RATE)


@pytest.mark.parametrize(
    ("raw_audio", "rate", "message"),
    [
        ([], RATE, "The batch is empty: pass at least one clip"),
        (noise(3, 30), RATE, "Clip 0 has 3 channels and `feature_size` is 2.*repeated"),
        (noise(1), 192_000, "Clip 0 is too short: at 24000 Hz no sample is left"),
    ],
    ids=["empty", "channels", "short"],
)
def test_nothing_to_make_of_it(raw_audio, rate, message):
    with pytest.raises(ValueError, match=message):
        stereo_extractor(raw_audio, sampling_rate=rate)


def test_a_clip_without_a_rate():
    for clip in (noise(9), {"array": noise(9)}, {"array": noise(9), "sampling_rate": None}):
        with pytest.raises(ValueError, match="Clip 0 has no sampling rate: pass `sampling_rate=` in Hz"):
            extractor(clip)
    with pytest.raises(ValueError, match="Clip 1 has no sampling rate"):
        extractor([{"array": noise(9), "sampling_rate": RATE}, noise(9)])


@pytest.mark.parametrize("clip", [{"array": noise(9), "sampling_rate": 16_000}, decoder(torch.zeros(1, 9), 16_000)])
def test_a_clip_with_two_rates(clip):
    with pytest.raises(ValueError, match="Clip 1 carries a sampling rate of 16000 Hz and the call says 24000 Hz"):
        extractor([noise(9), clip], sampling_rate=RATE)
    assert extractor(clip, sampling_rate=16_000.0)["input_values"].shape == (1, 1, 14)


@pytest.mark.parametrize("rate", [0, -1, np.nan, np.inf, "24000", True, [RATE], np.array([RATE])], ids=repr)
def test_an_impossible_rate(rate):
    for clip, given_rate in [(noise(9), rate), ({"array": noise(9), "sampling_rate": rate}, None)]:
        with pytest.raises(ValueError, match="sampling rate of clip 0 must be a positive number of Hz, got"):
            extractor(clip, sampling_rate=given_rate)
    with pytest.raises(ValueError, match="`sampling_rate` must be a positive number of Hz, got"):
        MimiFeatureExtractor(sampling_rate=rate)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"truncation": True}, "`truncation=True` needs `max_length`"),
        ({"padding": "max_length"}, "max_length is defined"),
        ({"padding": "shortest"}, "shortest.*not a valid PaddingStrategy"),
        ({"padding_side": "both"}, "`padding_side` must be 'right' or 'left', got 'both'"),
        ({"max_length": 0, "truncation": True}, "`max_length` must be a positive integer, got 0"),
        ({"max_length": 1.5}, "`max_length` must be a positive integer, got 1.5"),
        ({"pad_to_multiple_of": True}, "`pad_to_multiple_of` must be a positive integer, got True"),
        ({"return_tensors": "tf"}, "tf"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_call(kwargs, message):
    with pytest.raises(ValueError, match=message):
        extractor(noise(9), sampling_rate=RATE, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chunk_length_s": 1.0}, "must be None: Mimi is causal and streams exactly"),
        ({"overlap": 0.01}, "must be None: Mimi is causal and streams exactly"),
        ({"feature_size": 0}, "`feature_size` must be a positive integer, got 0"),
        ({"padding_side": "top"}, "`padding_side` must be 'right' or 'left', got 'top'"),
    ],
    ids=str,
)
def test_bad_settings(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MimiFeatureExtractor(**kwargs)


# Saving and loading


@pytest.fixture
def module_cache(tmp_path, monkeypatch):
    """Keep the code that `trust_remote_code` copies out of the user's cache, and the import path as it was."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_saved_extractor_loads_three_ways(tmp_path, module_cache):
    saved = MimiFeatureExtractor(feature_size=2, sampling_rate=16_000, padding_value=0.5, padding_side="left")
    saved.save_pretrained(tmp_path)

    ours = MimiFeatureExtractor.from_pretrained(tmp_path)
    stock = AutoFeatureExtractor.from_pretrained(tmp_path)
    remote = AutoFeatureExtractor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(ours) is MimiFeatureExtractor
    assert type(stock) is EncodecFeatureExtractor
    assert type(remote).__name__ == "MimiFeatureExtractor"
    assert type(remote).__module__.startswith("transformers_modules.")

    clips = [noise(2, 5), noise(2, 9)]
    for loaded in (ours, stock, remote):
        assert loaded.to_dict() == saved.to_dict()
        output = loaded(clips, sampling_rate=16_000, return_tensors="np")
        for key, expected in saved(clips, sampling_rate=16_000).items():
            np.testing.assert_array_equal(output[key], expected)


def test_the_saved_file_is_stocks_plus_an_auto_map(tmp_path):
    MimiFeatureExtractor().save_pretrained(tmp_path / "ours")
    EncodecFeatureExtractor(sampling_rate=RATE).save_pretrained(tmp_path / "stock")
    ours, stock = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/preprocessor_config.json")))
    assert ours.pop("auto_map") == {"AutoFeatureExtractor": "feature_extraction_mimi.MimiFeatureExtractor"}
    assert ours == stock

    assert MimiFeatureExtractor.from_pretrained(tmp_path / "stock").to_dict() == stock
    with pytest.raises(ValueError, match="must be None"):
        MimiFeatureExtractor.from_pretrained(tmp_path / "stock", chunk_length_s=1.0)
