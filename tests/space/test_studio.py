"""What the page does with a clip: read or refuse it, code it, compare it, show it, and keep nothing."""

import base64
import html
import io
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import speech
from matplotlib.image import imread

from hub_cards.space import studio as studio_module
from hub_cards.space.page import CLIP
from hub_cards.space.player import letter, notice, show_answer, show_blind, show_take, spectrogram
from hub_cards.space.studio import MAX_SECONDS, ClipError, Source, Studio
from modeling_mimi.audio_files import Clip, read_codes

RATE, FRAME = 24_000, 48


@pytest.fixture
def studio(tiny_model) -> Studio:
    return Studio(tiny_model, "tiny")


@pytest.fixture
def source() -> Source:
    audio = speech(30 * FRAME + 7, seed=3)[0]
    return Source(Clip(audio, audio.shape[-1], {"source": "talk.wav"}), is_codes=False)


def write(path: Path, samples: int, rate: int = RATE, **options) -> Path:
    soundfile.write(path, speech(samples)[0, 0].numpy(), rate, **options)
    return path


@pytest.mark.parametrize(
    ("name", "rate"), [("a.wav", 16_000), ("b.flac", 48_000), ("c.ogg", 24_000), ("d.mp3", 44_100)]
)
def test_reads_what_the_command_line_reads(studio, tmp_path, name, rate):
    found = studio.read(write(tmp_path / name, rate // 2, rate))
    assert not found.is_codes
    assert found.audio.shape[0] == pytest.approx(RATE / 2, rel=0.1)


def test_refuses_with_one_sentence(studio, tmp_path, monkeypatch):
    (tmp_path / "essay.wav").write_text("not a wave")
    with pytest.raises(ClipError, match=r"^essay.wav is neither speech nor codes that can be read here: .*\.$"):
        studio.read(tmp_path / "essay.wav")
    with pytest.raises(
        ClipError, match=rf"^long.wav lasts {MAX_SECONDS + 1} s; this page takes up to {MAX_SECONDS} s"
    ):
        studio.read(write(tmp_path / "long.wav", (MAX_SECONDS + 1) * 8000, 8000))
    with pytest.raises(ClipError, match=r"^nothing.wav is empty\.$"):
        studio.read(write(tmp_path / "nothing.wav", 0))
    monkeypatch.setattr(studio_module, "MAX_BYTES", 1_000_000)
    with pytest.raises(ClipError, match=r"^large.wav is larger than 1 MB"):
        studio.read(write(tmp_path / "large.wav", 600_000))


def test_a_clip_becomes_tracks_that_are_what_the_model_gives(studio, source, tiny_model):
    take = studio.process(source, 3)
    assert [track.label for track in take.tracks] == ["Original", "1 codebook", "2 codebooks", "3 codebooks"]
    with torch.inference_mode():
        codes = tiny_model.encode(source.clip.data[None], num_quantizers=3).audio_codes
        expected = tiny_model.decode(codes[:, :2]).audio_values[0, 0, : source.clip.num_samples]
    assert take.codes.equal(codes[0])
    assert take.tracks[2].audio.equal(expected)
    assert {len(track.audio) for track in take.tracks} == {source.clip.num_samples}
    assert take.tracks[3].bitrate == tiny_model.config.bitrate(3)
    assert take.seconds == source.clip.num_samples / RATE
    assert take.tracks[0].mel_distance is None
    assert all(track.mel_distance > 0 for track in take.tracks[1:])


def test_downloaded_codes_are_heard_again(studio, source, tmp_path):
    take = studio.process(source, 2)
    path = tmp_path / "codes.safetensors"
    path.write_bytes(take.codes_file)
    found = studio.read(path)
    assert found.is_codes
    again = studio.process(found, 4)
    assert [track.label for track in again.tracks] == ["1 codebook", "2 codebooks"]
    assert again.tracks[1].audio.equal(take.tracks[2].audio)
    assert again.tracks[1].stoi is None
    assert read_codes(path).metadata["model"] == "tiny"
    with pytest.raises(ClipError, match="A comparison needs speech"):
        studio.rivals(found, 0)


def test_codes_of_another_codec_are_refused(studio, source, tmp_path, tiny_model):
    path = tmp_path / "codes.safetensors"
    path.write_bytes(studio.process(source, 2).codes_file)
    for codebook in tiny_model.quantizer.semantic_residual_vector_quantizer.layers:
        codebook.codebook.embed_sum.mul_(2)
    with pytest.raises(ClipError, match=r"^codes.safetensors was made with other codebooks, those of tiny\.$"):
        studio.read(path)


def test_a_comparison_has_every_codec_once_in_an_order_of_its_own(studio):
    source = studio.read(CLIP)
    tracks, missing = studio.rivals(source, seed=1)
    labels = [track.label for track in tracks]
    assert {"Original", "1 codebook", "2 codebooks", "4 codebooks"} < set(labels)
    assert len(labels) + len(missing) == 6
    assert len({tuple(track.label for track in studio.rivals(source, seed)[0]) for seed in (1, 2, 3)}) > 1
    blind = show_blind(studio, tracks)
    assert not any(label in blind for label in labels)
    answer = show_answer(tracks, "B")
    assert all(label in answer for label in labels)
    assert answer.index("your choice") > answer.index(labels[1])
    assert blind.count("<audio") == len(tracks)


def test_what_is_shown(studio, source):
    take = studio.process(source, 4)
    shown = show_take(studio, take)
    facts = json.loads(html.unescape(re.search(r'data-facts="([^"]*)"', shown)[1]))
    assert facts["levels"] == [None, 1, 2, 4]
    assert facts["chosen"] == 3
    assert len(set(facts["spectra"])) == 4
    sounds = re.findall(r'src="data:audio/flac;base64,([^"]+)"', shown)
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[2])), dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(audio, take.tracks[2].audio.clamp(-1, 1), atol=1e-4)
    assert "codes.safetensors" in shown
    assert notice("<b>") == '<p class="notice" role="alert">&lt;b&gt;</p>'
    assert notice("") == ""
    assert letter(2) == "C"


def test_a_spectrogram_shows_a_tone_where_it_is(studio):
    tone = 0.5 * torch.sin(torch.arange(RATE) * 2 * torch.pi * 1000 / RATE)
    picture = imread(io.BytesIO(spectrogram(studio, torch.cat([tone, 0 * tone]))))
    light = picture[..., :3].sum(-1)
    left, right = light[:, : light.shape[1] // 2 - 8], light[:, light.shape[1] // 2 + 8 :]
    assert left.max() > 2 > 0.1 > right.max()
    assert len(light) / 2 < left.mean(1).argmax() < len(light)  # low frequencies are below


def test_nothing_is_left_on_disk(studio, source, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    show_take(studio, studio.process(source, 2))
    assert list(tmp_path.iterdir()) == []
