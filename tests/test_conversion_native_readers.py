# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""Kyutai's own readers, `moshi` and `rustymimi`, on files that we wrote: the same codes and the same audio as ours.

They are imported where they are used, so that only these tests need them; without them these tests fail.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, assert_same_codes, draw_codebooks, speech
from safetensors.torch import load_file
from test_conversion import assert_same, released_shapes

from modeling_mimi import MimiConfig, MimiModel
from modeling_mimi import conversion as cv

pytestmark = pytest.mark.slow

FRAME = 1920
RUSTYMIMI_FRAMES = 120  # 9.6 s: past 10 s rustymimi's window of attention shows, at 251 steps one longer than moshi's


@torch.no_grad()
def save_telling_model(folder, audio, **config):
    """Save a model in which attention, its rotation and every codebook matter, with its answers to some audio."""
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.uniform_(0.2, 0.8)
        elif "layernorm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif ".self_attn." in name or ".mlp." in name:
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        elif name.endswith("conv.bias"):
            parameter.mul_(0.1)  # or a small model answers nearly the same to all audio
    draw_codebooks(model, audio).save_pretrained(folder / "ours")
    encoded = model.encode(audio, output_latents=True)
    decoded = model.decode(encoded.audio_codes).audio_values
    return SimpleNamespace(model=model, path=folder / "ours", audio=audio, encoded=encoded, decoded=decoded)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """All as in the released model but the values, on more audio than the window of attention."""
    ours = save_telling_model(tmp_path_factory.mktemp("released"), speech(160 * FRAME), num_quantizers=32)
    ours.native = cv.convert(ours.path, ours.path.parent / "native.safetensors")  # and no warning
    return ours


@pytest.fixture(scope="module")
def loaders():
    import moshi.models.loaders

    return moshi.models.loaders


@pytest.fixture(scope="module")
def rustymimi():
    import rustymimi

    return rustymimi


def assert_reads_alike(ours, codes, decoded):
    """Compare what another reader made of our audio and of our codes, on as many frames as it was given."""
    frames = codes.shape[-1]
    latents, expected = ours.encoded.latents[:, :frames], ours.encoded.audio_codes[..., :frames]
    assert_same_codes(ours.model, latents, expected, codes)
    assert decoded.shape[-1] == frames * ours.model.config.frame_size
    difference = decoded - ours.decoded[..., : decoded.shape[-1]]
    assert difference.abs().max() <= 1e-5 * ours.decoded.abs().max()


def test_moshi_has_the_names_and_shapes_that_we_know(loaders):
    moshi_state = loaders.get_mimi(None).state_dict()  # spells its attention the newer way
    native = cv.to_native(cv.from_native(moshi_state))
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == released_shapes()


def test_full_size_roundtrip(released, tmp_path):
    cv.convert(released.native, tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), load_file(released.path / "model.safetensors"))


@torch.no_grad()
def test_moshi(released, loaders):
    mimi = loaders.get_mimi(released.native, num_codebooks=32)
    assert_reads_alike(released, mimi.encode(released.audio), mimi.decode(released.encoded.audio_codes))


def test_rustymimi(released, rustymimi):
    tokenizer = rustymimi.Tokenizer(str(released.native), num_codebooks=32)
    codes = tokenizer.encode(released.audio[..., : RUSTYMIMI_FRAMES * FRAME].contiguous().numpy())
    decoded = tokenizer.decode(released.encoded.audio_codes[..., :RUSTYMIMI_FRAMES].numpy().astype("uint32"))
    assert_reads_alike(released, torch.from_numpy(codes.astype("int64")), torch.from_numpy(decoded))


def test_eight_codebooks_are_read_when_told(loaders, rustymimi, tmp_path):
    """The paper's number of codebooks: `rustymimi` asks for as many unless told, `moshi` for 32."""
    ours = save_telling_model(tmp_path, speech(20 * FRAME), num_quantizers=8)
    with pytest.warns(UserWarning, match=r"this one has num_quantizers=8 \(32\)\."):
        native = cv.convert(ours.path, tmp_path / "native.safetensors")
    tokenizer = rustymimi.Tokenizer(str(native))
    codes = torch.from_numpy(tokenizer.encode(ours.audio.numpy()).astype("int64"))
    decoded = torch.from_numpy(tokenizer.decode(ours.encoded.audio_codes.numpy().astype("uint32")))
    assert_reads_alike(ours, codes, decoded)
    with pytest.raises(RuntimeError, match="rvq_rest"):
        loaders.get_mimi(native)
    config = copy.deepcopy(loaders._mimi_config)
    config["quantizer"]["n_q"] = 8
    assert loaders.get_mimi(native, config).total_codebooks == 8


@torch.no_grad()
def test_moshi_reads_other_sizes_when_told(loaders, tmp_path):
    unlike = {
        "num_semantic_quantizers": 2,
        "num_residual_layers": 2,
        "dilation_growth_rate": 3,
        "use_conv_shortcut": True,
        "kernel_size": 5,
        "compress": 4,
        "pad_mode": "replicate",
        "frame_rate": 250.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    ours = save_telling_model(tmp_path, speech(40 * 96), **TINY, **unlike)
    with pytest.warns(UserWarning, match="sliding_window=10"):
        native = cv.convert(ours.path, tmp_path / "native.safetensors")
    config = copy.deepcopy(loaders._mimi_config)
    config["frame_rate"] = 250
    config["seanet"] |= {"dimension": 32, "n_filters": 8, "n_residual_layers": 2, "dilation_base": 3, "kernel_size": 5}
    config["seanet"] |= {"ratios": [4, 3, 2], "true_skip": False, "compress": 4, "pad_mode": "replicate"}
    config["transformer"] |= {"d_model": 32, "num_heads": 4, "num_layers": 2, "dim_feedforward": 64, "context": 10}
    config["transformer"] |= {"max_period": 500, "input_dimension": 32, "output_dimensions": [32]}
    config["quantizer"] |= {"dimension": 16, "n_q": 4, "n_q_semantic": 2, "bins": 64}
    config["quantizer"] |= {"input_dimension": 32, "output_dimension": 32}
    mimi = loaders.get_mimi(native, config, num_codebooks=4)
    assert_reads_alike(ours, mimi.encode(ours.audio), mimi.decode(ours.encoded.audio_codes))
