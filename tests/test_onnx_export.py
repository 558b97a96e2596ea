# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""`mimi export`: in onnxruntime the graphs give the model's codes, whole and frame by frame, for every length."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import TINY, speech

from modeling_mimi import MimiConfig, MimiModel, cli_export
from modeling_mimi import export as export_module
from modeling_mimi.cli import main
from modeling_mimi.export import ExportError, export
from modeling_mimi.export_check import Reference, agreement, is_exact
from modeling_mimi.export_graphs import graphs_of

BUNDLED = Path(__file__).parents[1] / "checkpoints" / "mimi_small"
FRAME, CODEBOOKS = 48, 3  # of the exported tiny model, which has a codebook more
GRAPHS = ("encoder_model", "encoder_step", "decoder_model", "decoder_step")


def new_model(weights: dict[str, torch.Tensor]) -> MimiModel:
    model = MimiModel(MimiConfig(**TINY)).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="session")
def exported(tiny_weights, tmp_path_factory):
    """A tiny model and its graphs, checked while they were written: exporting takes most of this file's time."""
    model = new_model(tiny_weights)
    folder = tmp_path_factory.mktemp("export") / "tiny"
    written = export(model, folder, "tiny", CODEBOOKS, audio=speech(30 * FRAME))
    sessions = {name: onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx") for name in GRAPHS}
    return SimpleNamespace(model=model, folder=folder, written=written, sessions=sessions)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("samples", [1, FRAME, FRAME + 1, 5 * FRAME, 11 * FRAME - 7, 40 * FRAME])
@torch.no_grad()
def test_clips_of_any_length(exported, samples, batch_size):
    """Of one frame, of one block of attention (5 frames), and of several."""
    audio = speech(samples, batch_size, seed=samples)
    expected = exported.model.encode(audio, num_quantizers=CODEBOOKS).audio_codes
    (codes,) = exported.sessions["encoder_model"].run(["audio_codes"], {"input_values": audio.numpy()})
    assert np.array_equal(codes, expected)
    (waves,) = exported.sessions["decoder_model"].run(["audio_values"], {"audio_codes": codes})
    torch.testing.assert_close(torch.from_numpy(waves), exported.model.decode(expected).audio_values)


def test_frame_by_frame(exported):
    """As a phone would loop, from what `export.json` says alone, for longer than the ring of the attention."""
    described = {file["graph"]: file for file in json.loads((exported.folder / "export.json").read_text())["files"]}

    def stream(graph: str, frames: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (first, *state), (result, *after) = described[graph]["inputs"], described[graph]["outputs"]
        values = {entry["name"]: np.zeros(entry["shape"], entry["dtype"]) for entry in state}
        outputs = []
        for frame in frames:
            outputs.append(None)
            names = [result["name"], *(entry["name"] for entry in after)]
            outputs[-1], *new = exported.sessions[graph].run(names, {first["name"]: frame.numpy(), **values})
            assert list(outputs[-1].shape) == result["shape"]
            values = {name.removeprefix("next_"): value for name, value in zip(names[1:], new, strict=True)}
        return torch.from_numpy(np.concatenate(outputs, axis=-1))

    audio = speech(30 * FRAME, seed=1)
    live = exported.model.stream(num_quantizers=CODEBOOKS)
    codes = stream("encoder_step", audio.split(FRAME, -1))
    assert codes.equal(live.encode(audio))
    waves = stream("decoder_step", codes.split(1, -1))
    torch.testing.assert_close(waves, live.decode(codes), rtol=1e-4, atol=1e-6)


def test_the_description_is_true(exported):
    written = exported.written
    assert written == json.loads((exported.folder / "export.json").read_text())
    assert [file["graph"] for file in written["files"]] == list(GRAPHS)
    assert written["num_quantizers"] == CODEBOOKS
    for file in written["files"]:
        assert (exported.folder / file["file"]).stat().st_size == file["bytes"]
        session = exported.sessions[file["graph"]]
        for side, actual in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert [entry["name"] for entry in file[side]] == [value.name for value in actual]
            for entry, value in zip(file[side], actual, strict=True):
                dtype = {"float": "float32"}.get(value.type[7:-1], value.type[7:-1])
                assert entry["dtype"] == dtype
                constant = [size for size in entry["shape"] if isinstance(size, int)]
                assert constant == [size for size in value.shape if isinstance(size, int)]
        assert is_exact(file["check"])
    assert written["files"][0]["check"] == {"codes_equal": [1.0] * CODEBOOKS, "frames_wrong": 0}


def test_transformers_js_finds_what_it_looks_for(exported):
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["model_type"] == "mimi"
    assert config["num_quantizers"] == CODEBOOKS
    assert config["transformers.js_config"] == {"dtype": "fp32"}
    assert "auto_map" not in config
    features = json.loads((exported.folder / "preprocessor_config.json").read_text())
    assert features["feature_extractor_type"] == "EncodecFeatureExtractor"
    assert transformers.MimiConfig.from_pretrained(exported.folder).codebook_size == TINY["codebook_size"]


def test_files_name_nothing_of_the_machine(exported):
    home = str(Path(export_module.__file__).parents[1]).encode()
    for file in exported.folder.rglob("*.*"):
        assert home not in file.read_bytes()


def test_weights_are_stored_once(exported):
    """What is stored is what the graph needs: the codebooks that are used, one half, nothing twice."""
    model, size = exported.model, {file["graph"]: file["bytes"] for file in exported.written["files"]}
    for graph, parts in (("encoder_step", model._ENCODER_PARTS), ("decoder_step", model._DECODER_PARTS)):
        weights = sum(p.numel() for part in parts for p in getattr(model, part).parameters())
        codebooks = CODEBOOKS * (TINY["codebook_size"] + 1) * TINY["vector_quantization_hidden_dimension"]
        assert 4 * weights < size[graph] < 4 * (weights + codebooks) + 150_000  # 150 kB for names and nodes


# ---- the check


@torch.no_grad()
def test_the_check_finds_a_wrong_code_and_forgives_a_tie(tiny_model):
    reference = Reference.of(tiny_model, speech(6 * FRAME), 4)
    graph = SimpleNamespace(is_encoder=True, state={}, max_frames=None)

    def checked(codes: torch.Tensor) -> dict:
        return agreement(graph, lambda audio, state: (codes, state), reference)

    assert checked(reference.codes) == {"codes_equal": [1.0] * 4, "frames_wrong": 0}
    codes = reference.codes.clone()
    codes[0, 1, 2] = (codes[0, 1, 2] + 1) % TINY["codebook_size"]
    result = checked(codes)
    assert result["frames_wrong"] == 1
    assert result["codes_equal"] == [1.0, round(5 / 6, 4), 1.0, 1.0]
    assert not is_exact(result)
    # two entries that are the same vector are equally near
    codebook = tiny_model.quantizer.acoustic_residual_vector_quantizer.layers[0].codebook
    for table in (codebook.embed_sum, codebook.cluster_usage):
        table[codes[0, 1, 2]] = table[reference.codes[0, 1, 2]]
    assert checked(codes)["frames_wrong"] == 0


@torch.no_grad()
def test_another_model_does_not_pass(exported, tiny_weights):
    """Graphs that are not this model's, by a thousandth of one layer's weights."""
    other = new_model(tiny_weights)
    for transformer in (other.encoder_transformer, other.decoder_transformer):
        transformer.layers[0].mlp.fc1.weight.mul_(1.001)
    audio = speech(30 * FRAME)
    decoder = next(graph for graph in graphs_of(other, CODEBOOKS) if graph.name == "decoder_step")
    path = exported.folder / "onnx" / "decoder_step.onnx"
    with pytest.raises(ExportError, match=r"decoder_step.onnx differs from the model .* \(SNR "):
        export_module._check(decoder, "fp32", path, Reference.of(other, audio, CODEBOOKS))
    export_module._check(decoder, "fp16", path, Reference.of(other, audio, CODEBOOKS))
    other.encoder_transformer.layers[0].mlp.fc1.weight.mul_(1.5)
    encoder = next(graph for graph in graphs_of(other, CODEBOOKS) if graph.name == "encoder_model")
    path = exported.folder / "onnx" / "encoder_model.onnx"
    with pytest.raises(ExportError, match=r"encoder_model.onnx differs .* frames have other codes"):
        export_module._check(encoder, "fp32", path, Reference.of(other, audio, CODEBOOKS))


def test_a_failed_export_leaves_everything_as_it_was(tiny_model, tmp_path, monkeypatch):
    output = tmp_path / "export"
    output.mkdir()
    (output / "export.json").write_text("{}")

    def fail(graph, dtype, path):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(export_module, "_write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        export(tiny_model, output, "tiny", 4)
    assert [file.name for file in tmp_path.rglob("*")] == ["export", "export.json"]


def test_half_a_model_gives_half_the_graphs(tiny_config, tiny_weights, tmp_path):
    new_model(tiny_weights).save_pretrained(tmp_path)
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        model = MimiModel.from_pretrained(tmp_path, **{f"{other}_config": None}).eval()
        assert [graph.name for graph in graphs_of(model, 4)] == [f"{half}_model", f"{half}_step"]
        reference = Reference.of(model, speech(3 * FRAME), 4)
        assert reference.codes.shape == (1, 4, 3)
        assert (reference.decoded is None) == (half == "encoder")


# ---- the command


@pytest.fixture
def model_dir(tiny_model, tmp_path) -> str:
    tiny_model.save_pretrained(tmp_path / "model")
    yield str(tmp_path / "model")
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


def test_the_command_passes_on_what_it_was_told(model_dir, tmp_path, monkeypatch, capsys):
    calls = []

    def record(model, output, name, num_quantizers, format, dtypes, audio):
        calls.append((output, name, num_quantizers, format, dtypes, audio.shape))
        files = [
            {"file": "onnx/encoder_step.onnx", "bytes": 2e6, "check": {"codes_equal": [1.0, 0.5], "frames_wrong": 1}},
            {"file": "onnx/decoder_step.onnx", "bytes": 1e6, "check": {"snr_db": 120.3}},
        ]
        return {"files": files, "num_quantizers": 2, "checked_s": 11.6}

    monkeypatch.setattr(export_module, "export", record)
    arguments = ["export", model_dir, "-o", str(tmp_path / "out"), "--dtype", "fp32", "int8", "--num-quantizers", "2"]
    assert main(arguments) == 0
    (call,) = calls
    assert call[:5] == (tmp_path / "out", "model", 2, "onnx", ["fp32", "int8"])
    assert 3 * 24_000 < call[5][-1] <= 12 * 24_000
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["onnx/encoder_step.onnx", "2.0", "100.0", "50.0"]
    assert table[2].split() == ["onnx/decoder_step.onnx", "1.0", "120.3", "dB"]


def test_a_graph_that_differs_is_exit_code_1(model_dir, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ExportError("encoder_step.onnx differs from the model.")

    monkeypatch.setattr(export_module, "export", fail)
    assert main(["export", model_dir, "-o", str(tmp_path / "out")]) == 1
    hint = "Nothing was written; --no-check leaves the comparison out."
    assert capsys.readouterr().err == f"mimi: encoder_step.onnx differs from the model. {hint}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "torch", "--dtype", "int8"], "--format torch comes in fp32 and fp16"),
        (["--num-quantizers", "9"], "`num_quantizers` must be from 1 to 4"),
        (["--speech", "nothing.wav"], "Could not read nothing.wav"),
        (["-o", "{model}"], "{model} exists and is no export: name another folder."),
        (["-o", "{exported}"], "{exported} exists already: --overwrite replaces it."),
    ],
)
def test_says_what_is_wrong(model_dir, tmp_path, capsys, options, message):
    there = tmp_path / "there"
    there.mkdir()
    (there / "export.json").write_text("{}")
    places = {"model": model_dir, "exported": str(there)}
    options = [option.format(**places) for option in options]
    assert main(["export", model_dir, "-o", str(tmp_path / "out"), *options]) == 2
    assert message.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_says_what_is_missing(model_dir, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "none"), "-o", out, "--no-check"]) == 2
    assert "Could not load the model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", model_dir, "-o", out, "--format", "tflite"])
    assert "invalid choice: 'tflite'" in capsys.readouterr().err
    monkeypatch.setattr(cli_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", model_dir, "-o", out]) == 2
    message = "mimi: This command needs onnxscript: pip install -e '.[onnx]' in the repository.\n"
    assert capsys.readouterr().err == message


# ---- the bundled checkpoint, for minutes


@pytest.mark.slow
def test_the_bundled_checkpoint(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(BUNDLED), "-o", str(out), "--dtype", "fp32", "fp16", "int8"]) == 0
    written = json.loads((out / "export.json").read_text())
    assert written["checked_s"] > 3
    files = {(file["graph"], file["dtype"]): file for file in written["files"]}
    assert len(files) == 12
    printed = capsys.readouterr().out
    for (graph, dtype), file in files.items():
        assert file["file"] in printed
        fp32 = files[graph, "fp32"]["bytes"]
        if graph.startswith("encoder"):
            # how many codes survive rounding is a matter of the checkpoint; a broken graph keeps one in 2,048
            least = {"fp32": [1.0] * 8, "fp16": [0.9] * 8, "int8": [0.7, 0.7] + [0.1] * 6}[dtype]
            assert all(np.array(file["check"]["codes_equal"]) >= least), file
        else:
            assert file["check"]["snr_db"] > {"fp32": 100, "fp16": 45, "int8": 20}[dtype]
        assert file["bytes"] <= {"fp32": 1, "fp16": 0.62, "int8": 0.75}[dtype] * fp32


@pytest.mark.slow
@torch.no_grad()
def test_programs_for_executorch(tiny_model, tmp_path):
    audio = speech(30 * FRAME)
    written = export(tiny_model, tmp_path / "out", "tiny", 4, "torch", ("fp32", "fp16"), audio)
    assert len(written["files"]) == 8
    assert not (tmp_path / "out" / "config.json").exists()
    module = torch.export.load(tmp_path / "out" / "torch" / "encoder_model.pt2").module()
    least, most = written["files"][0]["frames"]
    for frames in (least, most):
        codes = tiny_model.encode(audio[..., : frames * FRAME]).audio_codes
        assert module(audio[..., : frames * FRAME]).equal(codes)
