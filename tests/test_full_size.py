"""The released architecture on real speech: stock's numbers, long audio in bounded memory."""

import resource
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_same_codes

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from codecs_under_test import NUM_QUANTIZERS, random_model, real_speech

from modeling_mimi import MimiModel

pytestmark = pytest.mark.slow
FRAME = 1920


@pytest.fixture(scope="module")
def model() -> MimiModel:
    return random_model(NUM_QUANTIZERS)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("full-size")
    model.save_pretrained(path)
    return path


def test_parameters_are_the_papers(model):
    assert model.num_parameters() == 79_308_609
    assert sum(p.numel() for p in model.encoder.parameters()) == 12_628_256
    assert sum(p.numel() for p in model.decoder.parameters()) == 14_724_641


@torch.no_grad()
def test_equals_stock_on_real_speech(model, directory):
    stock = transformers.MimiModel.from_pretrained(directory).eval()
    audio = real_speech(11)[..., : 137 * FRAME]
    ours = model.encode(audio, output_latents=True)
    assert min(len(level.unique()) for level in ours.audio_codes[0]) > 40
    assert_same_codes(model, ours.latents, ours.audio_codes, stock.encode(audio).audio_codes)
    expected = stock.decode(ours.audio_codes).audio_values
    difference = model.decode(ours.audio_codes).audio_values - expected
    assert difference.abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_streams_real_speech_exactly(model):
    audio = real_speech(24)  # past two windows
    whole = model.encode(audio, output_latents=True)
    stream = model.stream()
    codes = torch.cat([stream.encode(piece) for piece in audio.split(4321, -1)] + [stream.flush()], -1)
    assert_same_codes(model, whole.latents, codes, whole.audio_codes)
    expected = model.decode(whole.audio_codes).audio_values
    decoded = torch.cat([stream.decode(piece) for piece in whole.audio_codes.split(3, -1)], -1)
    assert (decoded - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_long_audio_takes_bounded_memory(model):
    """Four times the length takes only what four times the input and output take."""
    audio = real_speech(480)

    def peak_of(seconds: int) -> float:
        codes = model.encode(audio[..., : seconds * 24_000]).audio_codes
        model.decode(codes)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    short, long = peak_of(120), peak_of(480)
    assert long - short < 3 * 360 * 24_000 * 4 / 2**20, "MB beyond input and output"
