"""ABX of codebooks and MFCCs in an evaluation, and the phones that it needs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from pocketsphinx import Decoder

from modeling_mimi.cli import main
from training.evaluation.discriminability import centroids, mfcc, read_items
from training.evaluation.phones import Phone, align, item_lines, spelled

DATA = Path(__file__).parents[1] / "data"
CLIP = "nathalie_1110.flac"


def test_each_codebook_is_measured_beside_mfccs(tiny_model, tmp_path, capsys):
    tiny_model.save_pretrained(tmp_path / "tiny")
    generator = np.random.default_rng(0)
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    for name in (CLIP, "nathalie_662.flac"):
        for onset in np.arange(0.2, 3.4, 0.1):
            lines.append(f"{name} {onset:.2f} {onset + 0.1:.2f} {generator.choice(['a', 'b', 'c'])} x x speaker")
    items = tmp_path / "test.item"
    items.write_text("\n".join(lines) + "\n")
    arguments = ["evaluate", tmp_path / "tiny", DATA, "-o", tmp_path / "out", "--phones", items, "--device", "cpu"]
    assert main([*map(str, arguments), "--metrics", "si_sdr"]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["abx"]
    assert [(row["codec"], row["features"]) for row in found] == [
        ("original", "MFCC"),
        *(("tiny", f"level {level}") for level in (1, 2, 3, 4)),
    ]
    for row in found:  # phones drawn at random
        assert row["abx_within"] == pytest.approx(0.5, abs=0.12)
        assert row["abx_across"] is None  # there is one speaker
    assert "| tiny | level 4 |" in capsys.readouterr().out


def test_centroids_are_in_the_order_of_the_codes(tiny_model):
    audio = torch.from_numpy(soundfile.read(DATA / CLIP, dtype="float32")[0])[None, None]
    with torch.no_grad():
        output = tiny_model.encode(audio, output_latents=True)
    entries = centroids(tiny_model)
    assert len(entries) == tiny_model.config.num_quantizers
    for branch, levels in (("semantic", slice(0, 1)), ("acoustic", slice(1, None))):
        quantizer = getattr(tiny_model.quantizer, f"{branch}_residual_vector_quantizer")
        residual = quantizer.project_in(output.latents)[0].numpy(force=True)
        for codes, level in zip(output.audio_codes[0, levels].numpy(), entries[levels], strict=True):
            nearer = np.linalg.norm(residual - level[codes], axis=1)
            assert (nearer <= np.linalg.norm(residual - level[np.roll(codes, 7)], axis=1) + 1e-4).all()
            residual = residual - level[codes]


def test_mfccs_do_not_hear_loudness_and_are_in_time():
    audio, _ = soundfile.read(DATA / CLIP, dtype="float32")
    features = mfcc(audio)
    assert features.shape == (len(audio) // 240 + 1, 13)
    louder = mfcc(2 * audio)
    loud = np.abs(soundfile.read(DATA / CLIP)[0][: 240 * (len(features) - 1)]).reshape(-1, 240).max(1) > 0.05
    np.testing.assert_allclose(features[:-1][loud], louder[:-1][loud], atol=1e-2)
    later = mfcc(np.concatenate([np.zeros(2400, dtype=np.float32), audio]))
    np.testing.assert_allclose(later[15:200], features[5:190], atol=1e-3)


def test_a_broken_item_file_names_the_line(tmp_path):
    path = tmp_path / "a.item"
    path.write_text("#file\na b.flac 0.1 0.2 a x x s\nb.flac 0.1\n")
    with pytest.raises(ValueError, match="line 3"):
        read_items(path)


def test_names_of_files_may_have_spaces(tmp_path):
    (tmp_path / "a.item").write_text("a b.flac 0.1 0.2 a x x s\n")
    item = {"onset_s": 0.1, "offset_s": 0.2, "label": "a", "speaker": "s"}
    assert read_items(tmp_path / "a.item") == {"a b.flac": [item]}


def test_numbers_are_spelled_and_marks_dropped():
    assert spelled("I'd like a 16-ounce, dark-roast Coffee!") == [
        *("i'd", "like", "a", "sixteen", "ounce", "dark", "roast", "coffee")
    ]


def test_phones_of_a_text_come_in_order_within_the_clip():
    audio, rate = soundfile.read(DATA / CLIP, dtype="float32")
    phones = align(Decoder(lm=None, loglevel="FATAL"), soxr.resample(audio, rate, 16_000), "is a man")
    labels = [phone.label for phone in phones if phone.label != "SIL"]
    assert re.fullmatch("IH Z (AH|EY) M AE N", " ".join(labels))
    ends = [time for phone in phones for time in (phone.onset_s, phone.offset_s)]
    assert ends == sorted(ends)
    assert 0 <= ends[0] < ends[-1] <= len(audio) / rate + 0.02


def test_words_without_pronunciation_are_named():
    with pytest.raises(ValueError, match="zwijgplicht"):
        align(Decoder(lm=None, loglevel="FATAL"), np.zeros(16_000, dtype=np.float32), "a zwijgplicht")


def test_silences_are_context_and_no_items():
    phones = [Phone("SIL", 0, 0.1), Phone("M", 0.1, 0.2), Phone("AE", 0.2, 0.35), Phone("SIL", 0.35, 0.5)]
    assert list(item_lines("a.wav", phones, "s")) == ["a.wav 0.10 0.20 M SIL AE s", "a.wav 0.20 0.35 AE M SIL s"]
