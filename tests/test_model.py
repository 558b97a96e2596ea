"""The model: stock's numbers, padding, gradients, saving and loading, and what transformers expects of a model."""

import copy
import json

import pytest
import torch
import transformers
from conftest import assert_same_codes, draw_codebooks, speech
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from modeling_mimi import MimiConfig, MimiModel

FRAME = 48
SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture
def stock(tiny_model, tmp_path) -> transformers.MimiModel:
    tiny_model.save_pretrained(tmp_path)
    return transformers.MimiModel.from_pretrained(tmp_path).eval()


# ---- stock's numbers


@pytest.mark.parametrize("frames", [1, 4, 5, 9, 10, 11, 40, 77])  # around the window of 10 steps and its blocks
@torch.no_grad()
def test_equals_stock(tiny_model, stock, frames):
    audio = speech(frames * FRAME, batch_size=2)
    ours = tiny_model.encode(audio, output_latents=True)
    theirs = stock.encode(audio).audio_codes
    assert_same_codes(tiny_model, ours.latents, ours.audio_codes, theirs)
    expected = stock.decode(theirs).audio_values
    torch.testing.assert_close(
        tiny_model.decode(theirs).audio_values, expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


@torch.no_grad()
def test_hidden_states_and_attentions_equal_stock(tiny_model, stock):
    audio = speech(8 * FRAME)
    for model in (tiny_model, stock):
        model.set_attn_implementation("eager")
    ours = tiny_model.encode(audio, output_hidden_states=True, output_attentions=True)
    theirs = stock.encode(audio, output_hidden_states=True, output_attentions=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert len(ours.attentions) == len(theirs.attentions) == 2
    for a, b in zip(ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_conv_shortcut": True},
        {"num_residual_layers": 2, "dilation_growth_rate": 3},
        {"pad_mode": "replicate"},
        {"num_key_value_heads": 2},
        {"head_dim": 16},
        {"attention_bias": True},
        {"hidden_act": "relu"},
        {"upsample_groups": 1},
        {"upsample_groups": 8},
        {"compress": 4},
        {"kernel_size": 5, "last_kernel_size": 5, "residual_kernel_size": 5},
        {"num_semantic_quantizers": 2},
        {"vector_quantization_hidden_dimension": 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"sliding_window": 3},
        {"audio_channels": 2},
    ],
    ids=lambda changes: "-".join(changes),
)
@torch.no_grad()
def test_every_field_works_as_in_stock(tiny_config, tmp_path, changes):
    torch.manual_seed(0)
    model = MimiModel(
        MimiConfig(**{**tiny_config.to_dict(), "codebook_dim": None, "head_dim": None, **changes})
    ).eval()
    audio = speech(30 * FRAME).expand(-1, model.config.audio_channels, -1)
    draw_codebooks(model, audio).save_pretrained(tmp_path)
    stock = transformers.MimiModel.from_pretrained(tmp_path).eval()
    ours = model.encode(audio, output_latents=True)
    assert_same_codes(model, ours.latents, ours.audio_codes, stock.encode(audio).audio_codes)
    expected = stock.decode(ours.audio_codes).audio_values
    actual = model.decode(ours.audio_codes).audio_values
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    stream = model.stream(max_frames=4)
    codes = torch.cat([stream.encode(piece) for piece in audio.split(5 * FRAME + 7, -1)] + [stream.flush()], -1)
    assert_same_codes(model, ours.latents, codes, ours.audio_codes)
    torch.testing.assert_close(
        stream.decode(ours.audio_codes), actual, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


@torch.no_grad()
def test_frames_at_seanets_rate(tiny_config):
    """25 Hz in the real model: stock crashes."""
    config = MimiConfig(**{**tiny_config.to_dict(), "frame_rate": tiny_config.seanet_frame_rate})
    model = draw_codebooks(MimiModel(config).eval(), speech(2400))
    assert (model.downsample, model.upsample, config.frame_size) == (None, None, 24)
    output = model(speech(240))
    assert (output.audio_codes.shape, output.audio_values.shape) == ((1, 4, 10), (1, 1, 240))


def test_keys_on_disk_are_stocks(tiny_model, stock, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    tiny_model.save_pretrained(tmp_path / "ours")
    files = [safe_open(tmp_path / name / "model.safetensors", "pt") for name in ("stock", "ours")]
    assert set(files[0].keys()) == set(files[1].keys())
    for key in files[0].keys():  # noqa: SIM118 (not a dict)
        torch.testing.assert_close(files[0].get_tensor(key), files[1].get_tensor(key), rtol=0, atol=0)


# ---- padding


@SETTINGS
@given(
    lengths=st.lists(st.integers(1, 30 * FRAME), min_size=1, max_size=4),
    extra=st.integers(0, 3 * FRAME),
    left=st.booleans(),
    noise=st.booleans(),
)
def test_a_clip_does_not_depend_on_its_padding(tiny_model, lengths, extra, left, noise):
    total = max(lengths) + extra
    audio = torch.full((len(lengths), 1, total), float("nan") if noise else 0.0)
    mask = torch.zeros(len(lengths), total, dtype=torch.long)
    clips = [speech(length, seed=i) for i, length in enumerate(lengths)]
    for row, clip in enumerate(clips):
        place = slice(total - clip.shape[-1], None) if left else slice(0, clip.shape[-1])
        audio[row, 0, place] = clip[0, 0]
        mask[row, place] = 1
    with torch.no_grad():
        batch = tiny_model.encode(audio, mask)
        decoded = tiny_model.decode(batch.audio_codes, mask).audio_values
        by_frames = tiny_model.decode(batch.audio_codes, audio_codes_mask=batch.audio_codes_mask).audio_values
        forward = tiny_model(audio, mask).audio_values
    assert batch.audio_codes_mask.equal(tiny_model.get_audio_codes_mask(mask))
    assert (batch.audio_codes[~batch.audio_codes_mask[:, None].expand_as(batch.audio_codes)] == 0).all()
    assert batch.audio_codes_mask[:, -1 if left else 0].all(), "codes stay on the side where the clip was"
    assert decoded.shape == audio.shape
    for row, clip in enumerate(clips):
        with torch.no_grad():
            alone = tiny_model.encode(clip, output_latents=True)
            expected = tiny_model.decode(alone.audio_codes).audio_values[0]
        codes = batch.audio_codes[row][:, batch.audio_codes_mask[row]][None]
        if assert_same_codes(tiny_model, alone.latents, codes, alone.audio_codes):
            continue  # a near-tie fell the other way: its audio is another
        samples = mask[row].bool()
        length = int(samples.sum())
        tolerance = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
        torch.testing.assert_close(decoded[row][:, samples], expected[:, :length], **tolerance)
        torch.testing.assert_close(forward[row][:, samples], expected[:, :length], **tolerance)
        assert (decoded[row][:, ~samples] == 0).all()
        whole = by_frames[row].unflatten(-1, (-1, FRAME))[:, batch.audio_codes_mask[row]].flatten(1)
        torch.testing.assert_close(whole, expected, **tolerance)


@torch.no_grad()
def test_chunks_equal_the_whole(tiny_model):
    audio = speech(101 * FRAME + 5, batch_size=2)
    whole = tiny_model.encode(audio, output_latents=True, chunk_frames=1000)
    chunked = tiny_model.encode(audio, output_latents=True, chunk_frames=7)
    assert_same_codes(tiny_model, whole.latents, chunked.audio_codes, whole.audio_codes)
    torch.testing.assert_close(chunked.latents, whole.latents, rtol=0, atol=1e-5 * whole.latents.abs().max().item())
    a = tiny_model.decode(whole.audio_codes, chunk_frames=1000).audio_values
    b = tiny_model.decode(whole.audio_codes, chunk_frames=7).audio_values
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * a.abs().max().item())


@SETTINGS
@given(length=st.integers(2, 20 * FRAME), at=st.floats(0, 1, exclude_max=True))
def test_causal(tiny_model, length, at):
    """What comes later changes nothing that came before, in samples and in frames."""
    audio = speech(length)
    cut = int(at * length)
    changed = audio.clone()
    changed[..., cut:] = torch.randn(length - cut)
    with torch.no_grad():
        a, b = (tiny_model.encode(x, output_latents=True) for x in (audio, changed))
        frames = cut // FRAME
        torch.testing.assert_close(a.latents[:, :frames], b.latents[:, :frames], rtol=0, atol=1e-5)
        if not (a.audio_codes[..., :frames] != b.audio_codes[..., :frames]).any():
            a, b = (tiny_model.decode(x.audio_codes).audio_values for x in (a, b))
            torch.testing.assert_close(a[..., : frames * FRAME], b[..., : frames * FRAME], rtol=0, atol=1e-5)


# ---- training


def test_gradients_flow_from_audio_to_audio(tiny_model):
    tiny_model.train()
    audio = speech(20 * FRAME, batch_size=4).requires_grad_()
    before = {name: buffer.clone() for name, buffer in tiny_model.named_buffers()}
    output = tiny_model(audio, num_quantizers=4)
    (output.audio_values.square().mean() + output.residuals.square().mean()).backward()
    assert audio.grad.abs().sum() > 0
    for name, parameter in tiny_model.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"
        assert parameter.grad.abs().sum() > 0, f"no gradient for {name}"
    for name, buffer in tiny_model.named_buffers():
        assert buffer.equal(before[name]), f"forward wrote {name}"


def test_quantizer_dropout_draws_every_number_of_acoustic_codebooks(tiny_model):
    tiny_model.train()
    drawn = {tiny_model(speech(FRAME)).audio_codes.shape[1] for _ in range(60)}
    assert drawn == {2, 3, 4}  # 1 semantic and 1 to 3 acoustic ones
    tiny_model.config.quantizer_dropout = False
    assert tiny_model(speech(FRAME)).audio_codes.shape[1] == 4


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_unquantized_sequences_skip_the_quantizer_in_both_branches(tiny_model, rate):
    """A sequence is either the quantized one or the projected latent, as a whole."""
    tiny_model.config.unquantized_rate = rate
    tiny_model.train()
    audio = speech(5 * FRAME, batch_size=64)
    with torch.no_grad():
        output = tiny_model(audio, num_quantizers=4)
        quantizer = tiny_model.quantizer
        plain = quantizer.decode(output.audio_codes)
        projected = sum(
            branch.project_out(branch.project_in(output.latents))
            for branch in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
        )
        expected = [tiny_model._synthesize(x)[0] for x in (plain, projected)]
    skipped = 0
    for row in range(64):
        errors = [(output.audio_values[row] - x[row]).abs().max() for x in expected]
        assert min(errors) < 1e-4 < max(errors)
        skipped += int(errors[1] < errors[0])
    assert skipped == 64 * rate if rate != 0.5 else 16 < skipped < 48


def test_quantizer_returns_what_a_codebook_update_needs(tiny_model):
    output = tiny_model(speech(6 * FRAME, batch_size=2))
    codes, residuals, centroids = output.audio_codes, output.residuals, output.centroids
    quantizer = tiny_model.quantizer
    branches = (
        (quantizer.semantic_residual_vector_quantizer, slice(0, 1)),
        (
            quantizer.acoustic_residual_vector_quantizer,
            slice(1, 4),
        ),
    )
    for branch, levels in branches:
        expected = branch.project_in(output.latents)
        for k, layer in zip(range(4)[levels], branch.layers, strict=True):
            torch.testing.assert_close(residuals[:, k], expected)
            assert centroids[:, k].equal(layer.codebook.centroids[codes[:, k]])
            distances = torch.cdist(expected, layer.codebook.centroids.expand(2, -1, -1))
            torch.testing.assert_close(
                distances.gather(-1, codes[:, k, :, None])[..., 0], distances.amin(-1), rtol=1e-4, atol=1e-4
            )
            expected = expected - centroids[:, k]
    torch.testing.assert_close(output.semantic_quantized, centroids[:, 0])
    torch.testing.assert_close(output.acoustic_quantized, centroids[:, 1:].sum(1))


def test_weight_norm_trains_and_folds_away(tiny_model, tmp_path):
    audio = speech(4 * FRAME)
    expected = tiny_model(audio).audio_values
    names = set(tiny_model.state_dict())
    tiny_model.apply_weight_norm()
    torch.testing.assert_close(tiny_model(audio).audio_values, expected, rtol=1e-4, atol=1e-6)
    normed = [name for name, _ in tiny_model.named_parameters() if name.endswith("original0")]
    assert (
        len(normed)
        == sum(isinstance(m, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)) for m in tiny_model.modules()) - 6
    )
    tiny_model(audio).audio_values.square().mean().backward()
    assert all(tiny_model.get_parameter(name).grad.abs().sum() > 0 for name in normed)
    copied = copy.deepcopy(tiny_model)
    tiny_model.save_pretrained(tmp_path)
    loaded, info = MimiModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(audio).audio_values, expected, rtol=1e-4, atol=1e-6)
    assert any("original0" in name for name in tiny_model.state_dict()), "saving must not fold the model being trained"
    copied.remove_weight_norm()
    assert set(copied.state_dict()) == names
    torch.testing.assert_close(copied(audio).audio_values, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model):
    tiny_model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_model.activation_checkpointing_enable()
        tiny_model.zero_grad()
        torch.manual_seed(0)
        tiny_model(speech(20 * FRAME)).audio_values.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_overfits_a_tone(tiny_config):
    """The straight-through graph trains: the reconstruction of one clip gets better by an order of magnitude."""
    torch.manual_seed(0)
    model = MimiModel(tiny_config).train()
    model.config.unquantized_rate = 1.0
    audio = torch.sin(torch.arange(20 * FRAME) * 0.2)[None, None] * 0.5
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        loss = (model(audio, num_quantizers=4).audio_values - audio).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- what transformers expects of a model


def test_every_weight_and_buffer_is_initialised(tiny_config, tmp_path):
    """Loading goes by way of the meta device: what a file lacks must be made again."""
    model = MimiModel(tiny_config)
    model.save_pretrained(
        tmp_path, state_dict={"quantizer.acoustic_residual_vector_quantizer.input_proj.weight": torch.zeros(16, 32, 1)}
    )
    loaded = MimiModel.from_pretrained(tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.endswith("scale"):
            assert (tensor == 0.01).all(), name
        elif name.endswith(("cluster_usage", "initialized")):
            assert (tensor == 1).all(), name
        elif name.endswith("conv.weight"):
            bound = tensor[0].numel() ** -0.5 if "decoder.layers" not in name and "upsample" not in name else 1
            assert 0.1 * bound < tensor.abs().max() <= bound or tensor.std() > 0, name
    with torch.no_grad():
        assert loaded(speech(100)).audio_values.isfinite().all()


def test_attention_implementations_agree(tiny_model):
    audio = speech(50 * FRAME)
    results = []
    for implementation in ("eager", "sdpa"):
        tiny_model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(tiny_model.encode(audio, output_latents=True, chunk_frames=100).latents)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attentions_of_long_clips_are_banded(tiny_model):
    output = tiny_model(speech(30 * FRAME), output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in output.attentions] == [(1, 4, 60, 20)] * 2
    assert [a.shape for a in output.decoder_attentions] == [(1, 4, 60, 20)] * 2
    assert [h.shape for h in output.decoder_hidden_states] == [(1, 60, 32)] * 3
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 60))


@torch.no_grad()
def test_halves_load_alone(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "both")
    audio = speech(9 * FRAME)
    codes = tiny_model.encode(audio).audio_codes
    encoder, info = MimiModel.from_pretrained(tmp_path / "both", decoder_config=None, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert encoder.num_parameters() < tiny_model.num_parameters()
    assert encoder.encode(audio).audio_codes.equal(codes)
    assert encoder.stream().encode(audio).equal(codes)
    with pytest.raises(ValueError, match="without its decoder"):
        encoder.decode(codes)
    decoder = MimiModel.from_pretrained(tmp_path / "both", encoder_config=None)
    torch.testing.assert_close(decoder.decode(codes).audio_values, tiny_model.decode(codes).audio_values)
    with pytest.raises(ValueError, match="without its encoder"):
        decoder.encode(audio)
    encoder.save_pretrained(tmp_path / "encoder")
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["decoder_config"] is None
    again = MimiModel.from_pretrained(tmp_path / "encoder")
    assert again.decoder is None
    assert again.encode(audio).audio_codes.equal(codes)
    assert transformers.MimiModel.from_pretrained(tmp_path / "encoder").encode(audio).audio_codes.equal(codes)


def test_quantizer_stays_in_float32(tiny_model, tmp_path):
    before = tiny_model.quantizer.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    tiny_model.save_pretrained(tmp_path)
    for model in (tiny_model.to(torch.bfloat16), MimiModel.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        assert model.dtype == torch.bfloat16
        for name, tensor in model.quantizer.state_dict().items():
            assert tensor.dtype == torch.float32
            assert tensor.equal(before[name]), name
        with torch.no_grad():
            output = model(speech(5 * FRAME))
        assert output.audio_values.dtype == torch.bfloat16


def test_nothing_goes_stale(tiny_model):
    """Codes follow the buffers at once: after loading, after an in-place update, after `.data` is written."""
    audio = speech(20 * FRAME)
    codebook = tiny_model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook
    order = torch.arange(63, -1, -1)
    with torch.no_grad():
        codes = tiny_model.encode(audio).audio_codes[:, 0]
        codebook.embed_sum.data.copy_(codebook.embed_sum[order].clone())
        codebook.cluster_usage.data.copy_(codebook.cluster_usage[order].clone())
        assert tiny_model.encode(audio).audio_codes[:, 0].equal(63 - codes)


def test_memory_layout_survives_loading_and_casting(tiny_model, tmp_path):
    """The kernels are fast on channels-last weights only, and nothing would fail if the layout were lost."""
    tiny_model.save_pretrained(tmp_path)
    loaded = MimiModel.from_pretrained(tmp_path)
    for model in (tiny_model, loaded, copy.deepcopy(loaded), loaded.to(torch.bfloat16)):
        assert model.encoder.layers["3"].conv.weight.transpose(1, 2).is_contiguous()
        assert model.decoder.layers["2"].conv.weight.permute(2, 1, 0).is_contiguous()


def test_bad_input_is_named(tiny_model):
    with pytest.raises(ValueError, match="MimiFeatureExtractor"):
        tiny_model.encode(torch.zeros(100))
    with pytest.raises(ValueError, match="floating point"):
        tiny_model.encode(torch.zeros(1, 1, 100, dtype=torch.int16))
    with pytest.raises(ValueError, match="padding_mask"):
        tiny_model.encode(torch.zeros(1, 1, 100), torch.ones(1, 99))
    with pytest.raises(ValueError, match="from 1 to 4"):
        tiny_model.encode(torch.zeros(1, 1, 100), num_quantizers=9)
    with pytest.raises(ValueError, match="codebooks"):
        tiny_model.decode(torch.zeros(1, 5, 100, dtype=torch.long))
    with pytest.raises(ValueError, match="integers"):
        tiny_model.decode(torch.zeros(1, 4, 100))
    with pytest.raises(ValueError, match="0 to 63"):
        tiny_model.decode(torch.full((1, 4, 1), 64))
    with pytest.raises(ValueError, match="input_values"):
        tiny_model()


@torch.no_grad()
def test_no_samples_give_no_frames(tiny_model):
    assert tiny_model.encode(torch.zeros(2, 1, 0)).audio_codes.shape == (2, 4, 0)
    assert tiny_model.decode(torch.zeros(2, 4, 0, dtype=torch.long)).audio_values.shape == (2, 1, 0)
