"""`mimi demo`: one clip, what was sent, and what comes back."""

import time
from pathlib import Path

import pytest
import soundfile
import torch

from modeling_mimi.audio_files import read_codes
from modeling_mimi.cli import main

DATA = Path(__file__).parent / "data"


def test_the_bundled_clip_goes_through_the_bundled_checkpoint(tmp_path, capsys):
    start = time.monotonic()
    assert main(["demo", "-o", str(tmp_path), "--device", "cpu"]) == 0
    assert time.monotonic() - start < 60
    names = {path.name for path in tmp_path.iterdir()}
    reconstructions = {f"reconstruction.q{level}.wav" for level in (1, 2, 4, 8)}
    assert names == {"original.wav", "codes.safetensors", "picture.png", *reconstructions}
    lengths = {name: soundfile.info(tmp_path / name).frames for name in names if name.endswith(".wav")}
    assert set(lengths.values()) == {soundfile.info(DATA / "nathalie_1110.flac").frames}
    codes = read_codes(tmp_path / "codes.safetensors").data
    assert codes.shape == (8, 51)
    assert (tmp_path / "picture.png").stat().st_size > 50_000
    printed = capsys.readouterr().out
    assert "1.100" in printed
    assert "mimi decode" in printed  # what to try next


def test_its_codes_decode_to_its_reconstruction(tmp_path):
    assert main(["demo", "-o", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    bundled = Path(__file__).parents[1] / "checkpoints" / "mimi_small"
    codes = str(tmp_path / "demo" / "codes.safetensors")
    assert main(["decode", codes, "-o", str(tmp_path / "out"), "--model", str(bundled), "--device", "cpu"]) == 0
    decoded, _ = soundfile.read(tmp_path / "out" / "codes.wav", dtype="float32")
    shown, _ = soundfile.read(tmp_path / "demo" / "reconstruction.q8.wav", dtype="float32")
    assert abs(decoded - shown).max() < 1e-3


def test_a_clip_and_a_model_of_the_user(tmp_path, tiny_model, capsys):
    tiny_model.save_pretrained(tmp_path / "tiny")
    clip = str(DATA / "nathalie_662.flac")
    assert (
        main(["demo", clip, "-o", str(tmp_path / "demo"), "--model", str(tmp_path / "tiny"), "--device", "cpu"]) == 0
    )
    assert not (tmp_path / "demo" / "reconstruction.q8.wav").exists()  # it has four codebooks
    assert (tmp_path / "demo" / "reconstruction.q4.wav").exists()
    assert "nathalie_662.flac through tiny" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["missing.wav", "broken.wav"])
def test_a_clip_that_cannot_be_read_gets_a_sentence(tmp_path, capsys, name):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    assert main(["demo", str(tmp_path / name), "-o", str(tmp_path / "demo")]) == 2
    message = capsys.readouterr().err
    assert name in message
    assert "Traceback" not in message
    assert torch.is_inference_mode_enabled() is False
