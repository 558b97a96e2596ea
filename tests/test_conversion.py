# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversion on made-up weights: names, shapes, values, files and errors. What Kyutai's own readers make of the result
is tested in `test_conversion_native_readers.py`."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modeling_mimi import MimiConfig, MimiFeatureExtractor, MimiModel
from modeling_mimi import conversion as cv


def released_shapes(width=512, filters=64, mlp=2048, inner=256, entries=2048, layers=8, codebooks=32):
    """Names and shapes in `tokenizer-e351c8d8-checkpoint125.safetensors`, written out, at any size."""
    shapes = {
        "downsample.conv.conv.conv.weight": (width, width, 4),
        "upsample.convtr.convtr.convtr.weight": (width, 1, 4),
    }
    w = [filters << i for i in range(5)]
    convolutions = {
        "encoder.model.0.conv.conv": (w[0], 1, 7),
        "encoder.model.3.conv.conv": (w[1], w[0], 8),
        "encoder.model.6.conv.conv": (w[2], w[1], 10),
        "encoder.model.9.conv.conv": (w[3], w[2], 12),
        "encoder.model.12.conv.conv": (w[4], w[3], 16),
        "encoder.model.14.conv.conv": (width, w[4], 3),
        "decoder.model.0.conv.conv": (w[4], width, 7),
        "decoder.model.2.convtr.convtr": (w[4], w[3], 16),
        "decoder.model.5.convtr.convtr": (w[3], w[2], 12),
        "decoder.model.8.convtr.convtr": (w[2], w[1], 10),
        "decoder.model.11.convtr.convtr": (w[1], w[0], 8),
        "decoder.model.14.conv.conv": (1, w[0], 3),
    }
    for i in range(4):
        for unit in (f"encoder.model.{1 + 3 * i}", f"decoder.model.{12 - 3 * i}"):
            convolutions[f"{unit}.block.1.conv.conv"] = (w[i] // 2, w[i], 3)
            convolutions[f"{unit}.block.3.conv.conv"] = (w[i], w[i] // 2, 1)
    for name, shape in convolutions.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[1 if ".convtr." in name else 0],)
    for half in ("encoder", "decoder"):
        for i in range(layers):
            layer = f"{half}_transformer.transformer.layers.{i}"
            shapes[f"{layer}.self_attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{layer}.self_attn.out_proj.weight"] = (width, width)
            shapes[f"{layer}.linear1.weight"] = (mlp, width)
            shapes[f"{layer}.linear2.weight"] = (width, mlp)
            for vector in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
                shapes[f"{layer}.{vector}"] = (width,)
            shapes[f"{layer}.layer_scale_1.scale"] = shapes[f"{layer}.layer_scale_2.scale"] = (width,)
    for branch, count in (("rvq_first", 1), ("rvq_rest", codebooks - 1)):
        shapes[f"quantizer.{branch}.input_proj.weight"] = (inner, width, 1)
        shapes[f"quantizer.{branch}.output_proj.weight"] = (width, inner, 1)
        for i in range(count):
            codebook = f"quantizer.{branch}.vq.layers.{i}._codebook"
            shapes[f"{codebook}._initialized"] = (1,)
            shapes[f"{codebook}.cluster_usage"] = (entries,)
            shapes[f"{codebook}.embedding_sum"] = (entries, inner)
    return shapes


def small_native(seed=0, dtype=torch.float32, width=16, layers=2, codebooks=3):
    shapes = released_shapes(width, filters=2, mlp=6, inner=4, entries=4, layers=layers, codebooks=codebooks)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@st.composite
def models(draw):
    heads, pairs = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 4))
    sizes = {"layers": draw(st.integers(1, 3)), "codebooks": draw(st.integers(2, 4))}
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return small_native(draw(st.integers(0, 2**32)), dtype, width=2 * heads * pairs, **sizes), heads


@settings(max_examples=25, deadline=None)
@given(models())
def test_both_roundtrips_give_every_bit_back(model):
    native, heads = model
    before = {name: tensor.clone() for name, tensor in native.items()}
    flat = cv.from_native(native, heads)
    again = cv.to_native(flat, heads)
    assert_same(again, native)
    assert_same(cv.from_native(again, heads), flat)
    assert_same(native, before)  # inputs are left alone


def test_each_kind_of_tensor_lands_under_its_name():
    native = small_native()
    flat = cv.from_native(native)
    acoustic = "quantizer.acoustic_residual_vector_quantizer"
    for native_name, our_name in [
        ("encoder.model.3.conv.conv.weight", "encoder.layers.3.conv.weight"),
        ("encoder.model.4.block.3.conv.conv.bias", "encoder.layers.4.block.3.conv.bias"),
        ("decoder.model.5.convtr.convtr.bias", "decoder.layers.5.conv.bias"),
        ("decoder.model.14.conv.conv.weight", "decoder.layers.14.conv.weight"),
        ("downsample.conv.conv.conv.weight", "downsample.conv.weight"),
        ("upsample.convtr.convtr.convtr.weight", "upsample.conv.weight"),
        ("quantizer.rvq_rest.input_proj.weight", f"{acoustic}.input_proj.weight"),
        ("quantizer.rvq_rest.output_proj.weight", f"{acoustic}.output_proj.weight"),
        ("quantizer.rvq_rest.vq.layers.1._codebook._initialized", f"{acoustic}.layers.1.codebook.initialized"),
        ("quantizer.rvq_rest.vq.layers.1._codebook.cluster_usage", f"{acoustic}.layers.1.codebook.cluster_usage"),
        ("quantizer.rvq_rest.vq.layers.1._codebook.embedding_sum", f"{acoustic}.layers.1.codebook.embed_sum"),
    ]:
        assert flat[our_name] is native[native_name], our_name
    for half in ("encoder", "decoder"):
        for native_name, our_name in [
            ("norm1.weight", "input_layernorm.weight"),
            ("norm2.bias", "post_attention_layernorm.bias"),
            ("self_attn.out_proj.weight", "self_attn.o_proj.weight"),
            ("layer_scale_1.scale", "self_attn_layer_scale.scale"),
            ("layer_scale_2.scale", "mlp_layer_scale.scale"),
            ("linear1.weight", "mlp.fc1.weight"),
            ("linear2.weight", "mlp.fc2.weight"),
        ]:
            ours = flat[f"{half}_transformer.layers.1.{our_name}"]
            assert ours is native[f"{half}_transformer.transformer.layers.1.{native_name}"], our_name


def test_heads_are_deinterleaved_one_by_one():
    native = small_native(width=8)
    name = "encoder_transformer.transformer.layers.1.self_attn.in_proj_weight"
    native[name] = torch.arange(24.0)[:, None].expand(24, 8)
    flat = cv.from_native(native, num_attention_heads=2)
    rows = {x: flat[f"encoder_transformer.layers.1.self_attn.{x}_proj.weight"][:, 0].tolist() for x in "qkv"}
    assert rows["q"] == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rows["k"] == [8, 10, 9, 11, 12, 14, 13, 15]
    assert rows["v"] == [16, 17, 18, 19, 20, 21, 22, 23]


def test_names_are_those_of_stock_files(tmp_path):
    full_depth = {"upsampling_ratios": [8, 6, 5, 4], "num_hidden_layers": 8, "num_quantizers": 32}
    config = transformers.MimiConfig(**{**TINY, **full_depth}, codebook_dim=16, head_dim=8)
    transformers.MimiModel(config).save_pretrained(tmp_path)
    stock = load_file(tmp_path / "model.safetensors")
    native = cv.to_native(stock, config.num_attention_heads)
    expected = released_shapes(width=32, filters=8, mlp=64, inner=16, entries=64)
    assert {name: tuple(tensor.shape) for name, tensor in native.items()} == expected
    assert_same(cv.from_native(native, config.num_attention_heads), stock)


@pytest.mark.parametrize(
    ("ending", "spelling"),
    [
        ("self_attn.in_proj_weight", "self_attn.in_projs.0.weight"),
        ("self_attn.in_proj_weight", "self_attn.in_proj.weight"),
        ("self_attn.out_proj.weight", "self_attn.out_projs.0.weight"),
        ("_codebook._initialized", "_codebook.inited"),
        ("_codebook.cluster_usage", "_codebook.cluster_size"),
        ("_codebook.embedding_sum", "_codebook.embed_avg"),
        ("_codebook.embedding_sum", "_codebook.embed_sum"),
    ],
)
def test_other_spellings_are_read(ending, spelling):
    native = small_native()
    respelled = {name.replace(ending, spelling): tensor for name, tensor in native.items()}
    assert respelled.keys() != native.keys()
    assert_same(cv.from_native(respelled), cv.from_native(native))


def test_weight_norm_is_folded():
    native = small_native()
    normed = dict(native)
    for name in ("encoder.model.3.conv.conv", "decoder.model.2.convtr.convtr"):
        weight = normed.pop(f"{name}.weight")
        in_width, out_width, kernel = weight.shape
        convolution = torch.nn.Conv1d(out_width, in_width, kernel)
        convolution.weight.data = weight
        torch.nn.utils.parametrizations.weight_norm(convolution)
        normed[f"{name}.weight_g"] = 3 * convolution.parametrizations.weight.original0.detach()
        normed[f"{name}.weight_v"] = 5 * convolution.parametrizations.weight.original1.detach()
    flat, expected = cv.from_native(normed), cv.from_native(native)
    assert flat.keys() == expected.keys()
    for name in ("encoder.layers.3.conv.weight", "decoder.layers.2.conv.weight"):
        torch.testing.assert_close(flat[name], 3 * expected[name])


def test_format_is_told_by_names(tmp_path):
    native = small_native()
    save_file(native, tmp_path / "native.safetensors")
    assert cv.detect_format(native) == "native"
    assert cv.detect_format(str(tmp_path / "native.safetensors")) == "native"
    assert cv.detect_format(cv.from_native(native)) == "transformers"
    with pytest.raises(ValueError, match="text_emb"):
        cv.detect_format(["text_emb.weight"])
    in_memory = transformers.MimiModel(transformers.MimiConfig(**TINY, head_dim=8)).state_dict()
    with pytest.raises(ValueError, match="save_pretrained"):
        cv.detect_format(in_memory)


def test_names_that_do_not_fit_are_named():
    native = small_native()
    flat = cv.from_native(native)
    with pytest.raises(ValueError, match="looks like the transformers one"):
        cv.from_native(flat)
    with pytest.raises(ValueError, match="looks like the native one"):
        cv.to_native(native)
    lost = "decoder_transformer.transformer.layers.1.norm2.bias"
    with pytest.raises(ValueError, match=f"missing: {lost}; unexpected: none"):
        cv.from_native({name: tensor for name, tensor in native.items() if name != lost})
    with pytest.raises(ValueError, match=r"missing: none; unexpected: quantizer\.logvar"):
        cv.from_native({**native, "quantizer.logvar": torch.ones(1)})
    with pytest.raises(ValueError, match=r"unexpected: encoder_transformer\.layers\.0\.self_attn\.q_proj\.bias"):
        cv.to_native({**flat, "encoder_transformer.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    with pytest.raises(
        ValueError, match=r"missing: decoder\.layers\.0\.conv\.bias, .* and \d+ more; unexpected: none"
    ):
        cv.to_native({name: tensor for name, tensor in flat.items() if not name.startswith(("decoder", "upsample"))})


def test_attention_that_native_readers_lack_is_refused():
    native = small_native()
    flat = cv.from_native(native)
    with pytest.raises(ValueError, match="3 heads"):
        cv.from_native(native, num_attention_heads=3)
    with pytest.raises(ValueError, match="3 heads"):
        cv.to_native(flat, num_attention_heads=3)
    name = "encoder_transformer.layers.0.self_attn.{}_proj.weight"
    grouped = {**flat, name.format("k"): torch.ones(8, 16), name.format("v"): torch.ones(8, 16)}
    with pytest.raises(ValueError, match="in_proj_weight cannot be made"):
        cv.to_native(grouped)
    native["encoder_transformer.transformer.layers.0.self_attn.in_proj_weight"] = torch.ones(32, 16)
    with pytest.raises(ValueError, match=r"in_proj_weight of shape \(32, 16\)"):
        cv.from_native(native)


def test_shapes_of_the_released_file_give_the_released_config():
    meta = {name: torch.empty(shape, device="meta") for name, shape in released_shapes().items()}
    released = MimiConfig(num_quantizers=32)
    fields = cv.infer_config_fields(meta)
    assert len(fields) > 20
    for name, value in fields.items():
        assert value == getattr(released, name), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"upsampling_ratios": [4, 3], "num_residual_layers": 2, "use_conv_shortcut": True, "audio_channels": 2},
        {"kernel_size": 5, "last_kernel_size": 4, "residual_kernel_size": 2, "compress": 4},
        {"num_semantic_quantizers": 2, "num_quantizers": 6, "frame_rate": 250.0},
        {"frame_rate": 1000.0},
        {"upsample_groups": 4, "num_hidden_layers": 1},
    ],
)
def test_shapes_show_the_config_of_a_small_model(changes):
    config = MimiConfig(**{**TINY, **changes})
    native = cv.to_native(MimiModel(config).state_dict(), config.num_attention_heads)
    fields = cv.infer_config_fields(native, num_attention_heads=4, sliding_window=10)
    if config.latent_stride == 1:  # without resampling, its groups are nowhere
        fields["upsample_groups"] = config.upsample_groups
    for name, value in fields.items():
        assert value == getattr(config, name), name
    assert cv.infer_config_fields(native, sampling_rate=48_000)["frame_rate"] == 2 * config.frame_rate


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """A small model of ours, saved, with everything that shapes do not show unlike the released one."""
    rope = {"rope_type": "default", "rope_theta": 500.0}
    unseen = {"rope_parameters": rope, "pad_mode": "replicate", "sampling_rate": 16_000, "dilation_growth_rate": 3}
    model = MimiModel(MimiConfig(**TINY, **unseen))
    model.load_state_dict(tiny_model.state_dict())
    model.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def convert_to_native(source, target, **kwargs):
    with pytest.warns(UserWarning, match=r"num_quantizers=4 \(32\)"):
        return cv.convert(source, target, **kwargs)


def test_convert_there_and_back(checkpoint, tmp_path):
    native = convert_to_native(checkpoint, tmp_path / "new" / "native.safetensors", to="native")
    assert native == tmp_path / "new" / "native.safetensors"
    assert cv.detect_format(native) == "native"
    back = cv.convert(native, tmp_path / "back", to="transformers")
    assert_same(load_file(back / "model.safetensors"), load_file(checkpoint / "model.safetensors"))
    original, config = MimiConfig.from_pretrained(checkpoint), MimiConfig.from_pretrained(back)
    for name in ("hidden_size", "upsampling_ratios", "num_quantizers", "frame_rate", *cv.UNSEEN_FIELDS):
        assert getattr(config, name) == getattr(original, name), name
    assert MimiFeatureExtractor.from_pretrained(back).sampling_rate == 16_000
    # nothing is left beside the targets
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "new", "ours"]
    assert [path.name for path in native.parent.iterdir()] == ["native.safetensors"]


def test_stock_reads_what_convert_writes(checkpoint, tmp_path):
    native = convert_to_native(checkpoint, tmp_path / "native.safetensors")
    cv.convert(native, tmp_path / "back")
    ours = MimiModel.from_pretrained(tmp_path / "back").eval()
    stock = transformers.MimiModel.from_pretrained(tmp_path / "back").eval()
    codes = torch.randint(64, (1, 4, 20))
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(codes).audio_values, stock.decode(codes).audio_values)


def test_foreign_native_file_takes_the_released_values_unless_told(tmp_path):
    save_file(small_native(), tmp_path / "foreign.safetensors")
    fields, flat = cv.load_native(tmp_path / "foreign.safetensors")
    assert {name: fields[name] for name in cv.UNSEEN_FIELDS} == cv.UNSEEN_FIELDS
    told, other = cv.load_native(tmp_path / "foreign.safetensors", num_attention_heads=2, sliding_window=7)
    assert (told["num_attention_heads"], told["num_key_value_heads"], told["sliding_window"]) == (2, 2, 7)
    query = "encoder_transformer.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(flat[query], other[query])


def test_both_layouts_are_found_on_the_hub(checkpoint, monkeypatch, tmp_path):
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        return checkpoint / filename

    monkeypatch.setattr(cv, "hf_hub_download", download)
    native = convert_to_native("kyutai/mimi", checkpoint / "mimi.safetensors")
    assert asked == [("kyutai/mimi", "model.safetensors"), ("kyutai/mimi", "config.json")]
    assert_same(cv.load_native("kyutai/moshiko-pytorch-bf16/mimi.safetensors")[1], cv.load_native(native)[1])
    assert asked[2:] == [("kyutai/moshiko-pytorch-bf16", "mimi.safetensors")]


def test_existing_targets_are_kept_unless_overwritten(checkpoint, tmp_path):
    target = tmp_path / "native.safetensors"
    target.write_text("precious")
    with pytest.raises(FileExistsError, match="overwrite"):
        cv.convert(checkpoint, target)
    assert target.read_text() == "precious"
    convert_to_native(checkpoint, target, overwrite=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    cv.convert(target, folder)  # an empty directory is no loss
    (folder / "README.md").write_text("precious")
    (folder / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="overwrite"):
        cv.convert(target, folder)
    cv.convert(target, folder, overwrite=True)
    assert (folder / "README.md").read_text() == "precious"
    assert MimiConfig.from_pretrained(folder).hidden_size == 32


def test_failure_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def fail(state_dict, path, metadata):
        Path(path).write_text("half of it")
        raise OSError("disk full")

    monkeypatch.setattr(cv, "save_file", fail)
    with pytest.raises(OSError, match="disk full"), pytest.warns(UserWarning, match="num_quantizers"):
        cv.convert(checkpoint, tmp_path / "native.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_sources_that_do_not_convert(checkpoint, tmp_path):
    native, pickled, text = (tmp_path / name for name in ("n.safetensors", "pytorch_model.bin", "text.safetensors"))
    save_file(small_native(), native)
    torch.save({}, pickled)
    text.write_text("not a tensor")
    for source, target, message in [
        (native, "a.safetensors", "file in the native layout"),
        (checkpoint / "model.safetensors", "a.safetensors", "file in the transformers layout"),
        (checkpoint / "model.safetensors", "a", "looks like the transformers one"),
        (checkpoint, "a", "is a directory"),
        (pickled, "a", "pickles can run any code"),
        (text, "a", "not a safetensors file"),
    ]:
        with pytest.raises(ValueError, match=message):
            cv.convert(source, tmp_path / target)
    (tmp_path / "bare").mkdir()
    save_file(cv.from_native(small_native()), tmp_path / "bare" / "model.safetensors")
    for source, target, message in [
        (tmp_path / "missing.safetensors", "a", r"missing\.safetensors"),
        (tmp_path / "missing", "a.safetensors", r"model\.safetensors"),
        (tmp_path / "bare", "a.safetensors", r"config\.json"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            cv.convert(source, tmp_path / target)
    with pytest.raises(ValueError, match="to='native'"):
        cv.convert(native, tmp_path / "a", to="native")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"norm_eps": 1e-3}, {"upsample_groups": 4}])
def test_models_that_no_native_reader_builds_are_refused(changes, tmp_path):
    MimiModel(MimiConfig(**{**TINY, **changes})).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=next(iter(changes))):
        cv.convert(tmp_path / "ours", tmp_path / "native.safetensors")
