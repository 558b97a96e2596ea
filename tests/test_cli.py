# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""The `mimi` command, run as a user runs it, on a small model and real files."""

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers
from conftest import assert_same_codes, speech
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from modeling_mimi import MimiModel, audio_files, cli
from modeling_mimi.audio_files import Clip, Job, Size, find_files, in_batches
from modeling_mimi.cli import main

RATE = 24_000
FRAME = 48  # samples of a frame of the tiny model
CODEBOOKS = 4
OFFLINE = (
    "mimi: Could not load the model 'kyutai/mimi': it is not in the local cache and the Hub cannot be reached. "
    "Give a directory with --model, or connect once to download it.\n"
)


@pytest.fixture(autouse=True)
def _quiet_transformers():
    """The command silences transformers for its process: take that back."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def model_dir(tiny_model, tmp_path) -> str:
    tiny_model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def talks(tmp_path) -> Path:
    """A folder with three files at the model's rate, one of them in a folder of its own."""
    folder = tmp_path / "talks"
    (folder / "deep").mkdir(parents=True)
    for number, (name, samples) in enumerate({"one.wav": 12_001, "deep/two.wav": 5_000, "three.wav": 960}.items()):
        write_wav(folder / name, speech(samples, seed=number)[0, 0])
    return folder


def write_wav(path: Path, audio: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio.numpy(), RATE, subtype="FLOAT")
    return path


def read_wav(path: Path) -> torch.Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None, None]


def read_codes(path: Path) -> torch.Tensor:
    return torch.from_numpy(load_file(path)["codes"].astype(np.int64))[None]


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata()


def assert_codes_of(model: MimiModel, audio: torch.Tensor, codes: torch.Tensor) -> None:
    """Check that codes (1, K, T) are those of audio (1, 1, L)."""
    with torch.no_grad():
        whole = model.encode(audio, output_latents=True)
    assert_same_codes(model, whole.latents, codes, whole.audio_codes[:, : codes.shape[1]])


def assert_audio_of(model: MimiModel, codes: torch.Tensor, audio: torch.Tensor, steps: float = 1.51) -> None:
    """Check that 16-bit audio (1, 1, L) is what codes (1, K, T) decode to; libsndfile scales by 32767 and rounds."""
    with torch.no_grad():
        whole = model.decode(codes).audio_values[..., : audio.shape[-1]]
    torch.testing.assert_close(audio, whole.clamp(-1, 1), rtol=0, atol=steps / 32768)


def list_tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- encode, decode, reconstruct


@pytest.mark.parametrize("batch_seconds", ["0.001", "60"])
def test_files_become_what_the_model_says(tiny_model, model_dir, talks, tmp_path, batch_seconds):
    options = ["--model", model_dir, "--batch-seconds", batch_seconds]
    assert main(["encode", str(talks), "-o", str(tmp_path / "codes"), *options]) == 0
    assert main(["decode", str(tmp_path / "codes"), "-o", str(tmp_path / "decoded"), *options]) == 0
    assert list_tree(tmp_path / "codes") == ["deep/two.safetensors", "one.safetensors", "three.safetensors"]
    for name in ("one", "deep/two", "three"):
        audio = read_wav(talks / f"{name}.wav")
        codes = read_codes(tmp_path / "codes" / f"{name}.safetensors")
        decoded = read_wav(tmp_path / "decoded" / f"{name}.wav")
        assert_codes_of(tiny_model, audio, codes)
        assert decoded.shape == audio.shape
        assert_audio_of(tiny_model, codes, decoded)


def test_a_codes_file_says_what_it_takes_to_decode_it(model_dir, talks, tmp_path):
    assert main(["encode", str(talks / "one.wav"), "-o", str(tmp_path), "--model", model_dir]) == 0
    path = tmp_path / "one.safetensors"
    metadata = read_metadata(path)
    assert load_file(path)["codes"].dtype == np.uint16
    assert len(metadata.pop("model_fingerprint")) == 64
    assert metadata.pop("created")[:2] == "20"
    assert "torch==" in metadata.pop("libraries")
    assert metadata == {
        "format": "mimi-codes",
        "format_version": "1",
        "sampling_rate": "24000",
        "frame_rate": "500.0",
        "frame_size": "48",
        "num_samples": "12001",
        "codebook_size": "64",
        "num_quantizers": "4",
        "model": model_dir,
        "source": "one.wav",
        "source_sampling_rate": "24000",
        "source_channels": "1",
    }


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_any_format_rate_and_channels(tiny_model, model_dir, tmp_path, suffix):
    path = tmp_path / f"stereo.{suffix}"
    audio = torch.cat([speech(20_000), 0.5 * speech(20_000, seed=1)])[:, 0]
    soundfile.write(path, audio.T.numpy(), 44_100)
    assert main(["encode", str(path), "-o", str(tmp_path), "--model", model_dir]) == 0
    mono = soundfile.read(path, dtype="float32")[0].mean(axis=1)
    expected = torch.from_numpy(soxr.resample(mono, 44_100, RATE))[None, None]
    codes = tmp_path / "stereo.safetensors"
    assert_codes_of(tiny_model, expected, read_codes(codes))
    assert read_metadata(codes)["num_samples"] == str(expected.shape[-1])
    assert read_metadata(codes)["source_channels"] == "2"


def test_fewer_codebooks_and_mixed_files(tiny_model, model_dir, talks, tmp_path):
    codes, options = tmp_path / "codes", ["--model", model_dir]
    assert main(["encode", str(talks / "one.wav"), "-o", str(codes), *options]) == 0
    assert main(["encode", str(talks / "three.wav"), "-o", str(codes), "--num-quantizers", "2", *options]) == 0
    one, three = read_codes(codes / "one.safetensors"), read_codes(codes / "three.safetensors")
    assert (one.shape[1], three.shape[1]) == (CODEBOOKS, 2)
    for most in (None, 3):
        output = tmp_path / f"decoded{most}"
        limit = ["--num-quantizers", str(most)] if most else []
        assert main(["decode", str(codes), "-o", str(output), *limit, *options]) == 0
        assert_audio_of(tiny_model, one[:, :most], read_wav(output / "one.wav"))
        assert_audio_of(tiny_model, three, read_wav(output / "three.wav"))


def test_reconstruct_at_several_numbers_of_codebooks(tiny_model, model_dir, talks, tmp_path):
    output = tmp_path / "out"
    command = ["reconstruct", str(talks / "one.wav"), "-o", str(output), "--model", model_dir, "--num-quantizers"]
    assert main([*command, "4", "1"]) == 0
    assert list_tree(output) == ["one.q1.wav", "one.q4.wav"]
    audio = read_wav(talks / "one.wav")
    for count in (1, 4):
        with torch.no_grad():
            codes = tiny_model.encode(audio, num_quantizers=count).audio_codes
        reconstruction = read_wav(output / f"one.q{count}.wav")
        assert reconstruction.shape == audio.shape
        assert_audio_of(tiny_model, codes, reconstruction)
    assert main([*command, "2", "--format", "flac"]) == 0
    assert soundfile.info(output / "one.flac").frames == audio.shape[-1]


def test_a_long_ogg_is_written(tmp_path):
    audio_files.write_audio(tmp_path / "long", torch.zeros(1, 100 * RATE), RATE, "ogg")  # at once, libsndfile crashes
    assert soundfile.info(tmp_path / "long").frames == 100 * RATE


def test_loud_audio_is_clipped(tmp_path):
    audio_files.write_audio(tmp_path / "loud", torch.tensor([[2.0, -2.0, 0.5]]), RATE, "wav")
    assert soundfile.read(tmp_path / "loud", dtype="int16")[0].tolist() == [32767, -32768, 16384]


@given(
    sizes=st.lists(st.tuples(st.sampled_from([2, 4]), st.floats(0.1, 30)), max_size=30),
    limit=st.floats(1, 60),
)
@settings(derandomize=True, deadline=None)
def test_batches_hold_every_file_once_within_the_limit(sizes, limit):
    sized = [(Job(Path(str(number)), ()), Size(*size)) for number, size in enumerate(sizes)]
    batches = list(in_batches(sized, limit))
    assert sorted(item for batch in batches for item in batch) == sorted(sized)
    for batch in batches:
        assert len({size.codebooks for _, size in batch}) == 1
        longest = max(size.seconds for _, size in batch)
        assert len(batch) == 1 or longest * len(batch) <= limit
    for batch, following in itertools.pairwise(batches):  # and none is shorter than it has to be
        (_, first), (_, refused) = batch[0], following[0]
        assert first.seconds * (len(batch) + 1) > limit or first.codebooks != refused.codebooks


# ---- what is there already, what is broken


def test_what_is_done_is_skipped(model_dir, talks, tmp_path, monkeypatch, capsys):
    output = tmp_path / "codes"
    command = ["encode", str(talks), "-o", str(output), "--model", model_dir]
    (output / "deep").mkdir(parents=True)
    (output / "deep/two.safetensors").write_text("mine")
    assert main(command) == 0
    assert "1 skipped" in capsys.readouterr().err
    assert (output / "deep/two.safetensors").read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "load_model", lambda args: pytest.fail("nothing to do"))
        assert main(command) == 0
    assert "3 skipped" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert read_metadata(output / "deep/two.safetensors")["source"] == "two.wav"


def test_only_what_is_missing_of_a_file_is_made(model_dir, talks, tmp_path):
    (tmp_path / "one.q1.wav").write_text("mine")
    command = ["reconstruct", str(talks / "one.wav"), "-o", str(tmp_path), "--model", model_dir]
    assert main([*command, "--num-quantizers", "1", "2"]) == 0
    assert (tmp_path / "one.q1.wav").read_text() == "mine"
    assert soundfile.info(tmp_path / "one.q2.wav").frames == 12_001


def test_broken_files_stop_no_other(model_dir, talks, tmp_path, capsys):
    (talks / "text.wav").write_text("not audio")
    write_wav(talks / "empty.wav", torch.zeros(0))
    write_wav(talks / "nan.wav", torch.full((4_000,), torch.nan))
    soundfile.write(talks / "cut.mp3", speech(48_000)[0, 0].numpy(), RATE)
    (talks / "cut.mp3").write_bytes((talks / "cut.mp3").read_bytes()[:3_000])
    command = ["encode", str(talks), str(tmp_path / "gone.wav"), "-o", str(tmp_path / "codes"), "--model", model_dir]
    assert main(command) == 1
    assert list_tree(tmp_path / "codes") == ["deep/two.safetensors", "one.safetensors", "three.safetensors"]
    report = capsys.readouterr().err
    assert "3 done" in report
    assert "5 failed:" in report
    for name, reason in {
        "text.wav": "Format not recognised",
        "empty.wav": "is empty",
        "nan.wav": "NaN",
        "cut.mp3": "cut off",
        "gone.wav": "No such file",
    }.items():
        assert any(f"{name}: " in line and reason in line for line in report.splitlines()), name


def test_a_header_without_a_length_is_reported(tmp_path):
    path = tmp_path / "piped.flac"
    soundfile.write(path, np.zeros(4_000), RATE)
    header = bytearray(path.read_bytes())
    header[21] &= 0xF0  # the 36 bits of the number of samples
    header[22:26] = bytes(4)
    path.write_bytes(header)
    with pytest.raises(ValueError, match="does not say how long"):
        audio_files.measure_audio(path)


def test_a_batch_that_fails_is_reported_file_by_file(model_dir, talks, tmp_path, monkeypatch, capsys):
    def out_of_memory(self, clips):
        if len(clips) > 1:
            raise RuntimeError("out of memory")
        return encode(self, clips)

    encode = audio_files.EncodeFiles.run
    monkeypatch.setattr(audio_files.EncodeFiles, "run", out_of_memory)
    command = ["encode", str(talks), "-o", str(tmp_path / "codes"), "--model", model_dir, "--batch-seconds", "0.5"]
    assert main(command) == 1  # "one" is longer than a batch and goes alone
    assert list_tree(tmp_path / "codes") == ["one.safetensors"]
    assert capsys.readouterr().err.count("out of memory") == 2


def test_nothing_half_written_stays(model_dir, talks, tmp_path, monkeypatch, capsys):
    def disk_full(path, codes, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audio_files, "write_codes", disk_full)
    assert main(["encode", str(talks), "-o", str(tmp_path / "codes"), "--model", model_dir]) == 1
    assert list_tree(tmp_path / "codes") == []
    assert capsys.readouterr().err.count("No space left on device") == 3


def test_codes_of_another_model(tiny_model, model_dir, talks, tmp_path, capsys):
    assert main(["encode", str(talks / "one.wav"), "-o", str(tmp_path), "--model", model_dir]) == 0
    tiny_model.quantizer.acoustic_residual_vector_quantizer.layers[-1].codebook.embed_sum[3] += 1
    tiny_model.save_pretrained(tmp_path / "other")
    command = ["decode", str(tmp_path / "one.safetensors"), "-o", str(tmp_path), "--model", str(tmp_path / "other")]
    assert main(command) == 1
    assert f"other codebooks, those of {model_dir}" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert soundfile.info(tmp_path / "one.wav").frames == 12_001


def test_codes_do_not_mind_the_dtype_of_the_model(model_dir, talks, tmp_path):
    command = ["-o", str(tmp_path), "--model", model_dir, "--dtype"]
    assert main(["encode", str(talks / "one.wav"), *command, "bfloat16"]) == 0
    assert main(["decode", str(tmp_path / "one.safetensors"), *command, "float32"]) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other"}, "not a codes file"),
        ({"format_version": "2"}, "a newer `mimi`"),
        ({"num_samples": None}, "lacks num_samples"),
        ({"num_samples": "99999"}, "metadata says (4, 2084)"),
        ({"codebook_size": "2"}, "its codebooks have 2 entries"),
        ({"codebook_size": "128"}, "the model's 64"),
    ],
)
def test_codes_files_that_do_not_fit(model_dir, talks, tmp_path, capsys, change, reason):
    path = tmp_path / "one.safetensors"
    assert main(["encode", str(talks / "one.wav"), "-o", str(tmp_path), "--model", model_dir]) == 0
    metadata = {key: value for key, value in (read_metadata(path) | change).items() if value is not None}
    save_file(load_file(path), path, metadata)
    assert main(["decode", str(path), "-o", str(tmp_path), "--model", model_dir]) == 1
    assert f"{path}: " in (report := capsys.readouterr().err)
    assert reason in report


def test_large_codebooks_take_more_bits(tmp_path):
    codes = torch.tensor([[0, 70_000]])
    metadata = {"codebook_size": str(2**17), "num_quantizers": "1", "num_samples": "2", "frame_size": "1"}
    audio_files.write_codes(tmp_path / "codes", codes, {**metadata, "sampling_rate": "1", "model_fingerprint": "x"})
    clip = audio_files.read_codes(tmp_path / "codes")
    assert isinstance(clip, Clip)
    assert clip.data.tolist() == codes.tolist()


# ---- which files


def test_inputs_are_files_folders_and_globs(talks, tmp_path):
    for name in ("notes.txt", ".hidden.wav", ".cache/old.wav", "out/made.wav"):
        (talks / name).parent.mkdir(exist_ok=True)
        (talks / name).touch()
    for name in ("odd[1].xyz", "odd1.xyz"):
        (tmp_path / name).touch()

    def places(*inputs, output=talks / "out"):
        return sorted(map(str, find_files(list(map(str, inputs)), audio_files.AUDIO_SUFFIXES, output).values()))

    assert places(talks) == ["deep/two.wav", "one.wav", "three.wav"]
    assert places(talks, talks / "one.wav", f"{talks}/*.wav") == ["deep/two.wav", "one.wav", "three.wav"]
    assert places(talks, output=Path(os.path.relpath(talks / "out"))) == ["deep/two.wav", "one.wav", "three.wav"]
    for elsewhere in (talks, tmp_path):  # the folder itself, and one around it
        assert places(talks, output=elsewhere) == ["deep/two.wav", "one.wav", "out/made.wav", "three.wav"]
    assert places(f"{talks}/t*.wav") == ["three.wav"]
    assert places(f"{talks}/**/t*.wav") == ["three.wav", "two.wav"]
    assert places(tmp_path / "odd[1].xyz") == ["odd[1].xyz"]
    assert places(f"{talks}/none*.wav") == ["none*.wav"]


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_two_inputs_with_one_output(talks, tmp_path, capsys, command):
    write_wav(talks / "other/one.wav", torch.zeros(9))
    arguments = [command, str(talks / "one.wav"), str(talks / "other"), "-o", str(tmp_path / "out"), "--model", "none"]
    assert main(arguments) == 2
    assert "would both become" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_input_is_never_written_over(talks, capsys):
    before = (talks / "one.wav").read_bytes()
    command = ["reconstruct", str(talks / "one.wav"), "-o", str(talks), "--overwrite", "--model", "none"]
    assert main(command) == 2
    assert "is an input and would be written over" in capsys.readouterr().err
    assert (talks / "one.wav").read_bytes() == before


# ---- live


def run_stream(monkeypatch, capfdbinary, tmp_path, data: bytes, *arguments: str) -> bytes:
    """Run `mimi stream` in this process and give its output."""
    path = tmp_path / "stdin"
    path.write_bytes(data)
    with path.open() as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        assert main(["stream", *arguments]) == 0
    return capfdbinary.readouterr().out


def parse_codes(text: bytes) -> torch.Tensor:
    return torch.tensor([[int(word) for word in line.split()] for line in text.splitlines()]).T[None]


@pytest.mark.parametrize("chunk_bytes", [1 << 16, 77])
def test_a_stream_equals_the_whole(tiny_model, model_dir, tmp_path, monkeypatch, capfdbinary, chunk_bytes):
    monkeypatch.setattr(cli, "CHUNK_BYTES", chunk_bytes)
    samples = (32768 * speech(4_001)[0, 0]).to(torch.int16).numpy()
    run = [monkeypatch, capfdbinary, tmp_path]
    lines = run_stream(*run, samples.tobytes(), "--model", model_dir, "--to", "codes")
    codes = parse_codes(lines)
    assert_codes_of(tiny_model, torch.from_numpy(samples / np.float32(32768))[None, None], codes)
    whole_frames = FRAME * codes.shape[-1]
    for count, length, output in (
        (4, len(samples), run_stream(*run, samples.tobytes(), "--model", model_dir)),
        (4, whole_frames, run_stream(*run, lines, "--model", model_dir, "--from", "codes")),
        (2, whole_frames, run_stream(*run, lines, "--model", model_dir, "--from", "codes", "--num-quantizers", "2")),
    ):
        pcm = np.frombuffer(output, "<i2") / np.float32(32768)
        assert len(pcm) == length
        assert_audio_of(tiny_model, codes[:, :count], torch.from_numpy(pcm)[None, None], steps=0.51)


def test_a_loud_stream_is_clipped(tiny_model, tmp_path, monkeypatch, capfdbinary):
    with torch.no_grad():
        list(tiny_model.decoder.parameters())[-2].mul_(1000)  # the weight of the last convolution
    tiny_model.save_pretrained(tmp_path / "loud")
    output = run_stream(
        monkeypatch, capfdbinary, tmp_path, b"1 2\n3 4\n", "--from", "codes", "--model", str(tmp_path / "loud")
    )
    pcm = torch.from_numpy(np.frombuffer(output, "<i2") / np.float32(32768))
    assert pcm.abs().max() > 0.99
    assert_audio_of(tiny_model, torch.tensor([[[1, 3], [2, 4]]]), pcm[None, None])


def test_a_stream_of_another_rate_and_format(tiny_model, model_dir, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.setattr(cli, "CHUNK_BYTES", 5_001)
    samples = speech(16_000)[0, 0].numpy()
    samples[5_000] = np.nan  # silence, not the end of everything
    run = [monkeypatch, capfdbinary, tmp_path, samples.tobytes(), "--model", model_dir, "--sampling-rate", "16000"]
    codes = parse_codes(run_stream(*run, "--sample-format", "f32", "--to", "codes", "--num-quantizers", "2"))
    assert codes.shape[1] == 2
    resampled = soxr.resample(np.nan_to_num(samples), 16_000, RATE)
    assert_codes_of(tiny_model, torch.from_numpy(resampled)[None, None], codes)
    output = np.frombuffer(run_stream(*run, "--sample-format", "f32"), "<f4")
    assert output.shape == samples.shape


def test_live_a_frame_comes_out_as_soon_as_it_is_in(model_dir):
    command = [sys.executable, "-m", "modeling_mimi.cli", "stream", "--model", model_dir, "--to", "codes"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, bufsize=0, **pipes) as process:
        too_late = threading.Timer(60, process.kill)
        too_late.start()
        for _ in range(2):
            process.stdin.write(bytes(2 * FRAME))
            assert len(process.stdout.readline().split()) == CODEBOOKS
        process.stdout.close()  # as `head` does
        process.stdin.write(bytes(200 * FRAME))
        process.stdin.close()
        report = process.stderr.read().decode()
        assert process.wait() == 0
        too_late.cancel()
    assert "Traceback" not in report
    assert "Exception" not in report
    assert "s streamed" in report


@pytest.mark.parametrize("line", ["1 2 x", "1 2 3 4 5", "1 -1", "64"])
def test_lines_that_are_no_codes(model_dir, tmp_path, monkeypatch, capfdbinary, line):
    (tmp_path / "lines").write_text(f"1 2\n{line}\n")
    with (tmp_path / "lines").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["stream", "--model", model_dir, "--from", "codes"]) == 2
    report = capfdbinary.readouterr().err.decode()
    assert f"Line 2 is not 1 to 4 integers from 0 to 63: '{line}" in report


def test_codes_to_codes_is_nothing(capsys):
    assert main(["stream", "--from", "codes", "--to", "codes"]) == 2
    assert "nothing to do" in capsys.readouterr().err


# ---- models


@pytest.fixture
def _offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_offline")
def test_one_sentence_without_network(talks, tmp_path, capsys):
    assert main(["encode", str(talks), "-o", str(tmp_path / "codes")]) == 2
    assert capsys.readouterr().err == OFFLINE
    assert main(["info"]) == 2
    assert capsys.readouterr().err == OFFLINE
    assert main(["convert", "kyutai/mimi/native.safetensors", str(tmp_path / "model")]) == 2
    assert "the Hub cannot be reached" in capsys.readouterr().err


@pytest.mark.usefixtures("_offline")
def test_a_copy_of_the_hub_is_found_without_network(model_dir, tmp_path, capsys):
    cache = tmp_path / "cache/models--some--mimi"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    Path(model_dir).rename(cache / "snapshots" / ("0" * 40))
    assert main(["info", "--model", "some/mimi", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "some/mimi"


def test_a_missing_network_is_noticed_at_once(monkeypatch, capsys):
    def refuse(repository, allow_patterns):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)  # the only thing that may ask the Hub
    assert main(["info"]) == 2
    assert capsys.readouterr().err == OFFLINE


def test_only_what_is_needed_comes_from_the_hub(model_dir, tmp_path, monkeypatch, capsys):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return model_dir

    assert main(["convert", model_dir, f"{model_dir}/deep/native.safetensors"]) == 0
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main(["convert", "some/mimi/deep/native.safetensors", str(tmp_path / "back")]) == 0
    assert main(["info", "some/mimi"]) == 0
    assert asked == [("some/mimi", ["deep/native.safetensors"]), ("some/mimi", ["config.json"])]
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(list_tree(tmp_path / "back"))


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        (lambda folder: folder / "nowhere", "there is no such file or directory"),
        (lambda folder: folder / "model.safetensors", "Not a directory"),
        (lambda folder: os.remove(folder / "config.json") or folder, "No such file or directory"),
        (lambda folder: os.remove(folder / "model.safetensors") or folder, "has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_text("junk") and folder, "header"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}') and folder, "type 'bert'"),
        (lambda folder: drop_weights(folder), "2 of its weights are missing"),
    ],
)
def test_models_that_do_not_load(model_dir, talks, tmp_path, capsys, breakage, reason):
    name = breakage(Path(model_dir))
    assert main(["encode", str(talks), "-o", str(tmp_path / "codes"), "--model", str(name)]) == 2
    report = capsys.readouterr().err
    assert report.startswith(f"mimi: Could not load the model '{name}': ")
    assert report.count("\n") == 1
    assert reason in report


def drop_weights(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("encoder.layers.0.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_more_codebooks_than_there_are(model_dir, talks, tmp_path, capsys):
    command = ["reconstruct", str(talks), "-o", str(tmp_path / "out"), "--model", model_dir, "--num-quantizers"]
    assert main([*command, "2", "5"]) == 2
    assert "from 1 to 4" in capsys.readouterr().err


def test_a_device_that_is_not_there(model_dir, talks, tmp_path, capsys):
    command = ["encode", str(talks), "-o", str(tmp_path / "codes"), "--model", model_dir, "--device", "abacus"]
    assert main(command) == 2
    report = capsys.readouterr().err
    assert report.startswith("mimi: Could not load the model")
    assert "abacus" in report


# ---- convert, info, usage


@pytest.mark.filterwarnings("error")
def test_convert_there_and_back(tiny_model, model_dir, tmp_path, capsys):
    config = tiny_model.config
    native, back = str(tmp_path / "native.safetensors"), str(tmp_path / "back")
    assert main(["convert", model_dir, native]) == 0
    assert f"num_filters={config.num_filters}" in capsys.readouterr().err  # unlike the released model
    assert main(["convert", native, back]) == 0
    ours, theirs = load_file(Path(model_dir, "model.safetensors")), load_file(Path(back, "model.safetensors"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert main(["convert", native, back]) == 2
    assert "exists already: --overwrite" in capsys.readouterr().err
    assert main(["convert", native, back, "--overwrite"]) == 0
    assert main(["convert", str(tmp_path / "model/config.json"), str(tmp_path / "x")]) == 2
    assert "Could not convert" in capsys.readouterr().err


def test_info_of_a_model(tiny_model, model_dir, tmp_path, capsys):
    assert main(["info", model_dir, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "model"
    assert facts["parameters"]["total"] == sum(p.numel() for p in tiny_model.parameters())
    assert facts["parameters"]["encoder"] == sum(p.numel() for p in tiny_model.encoder.parameters())
    assert facts["frame_size"] == FRAME
    assert facts["latency_ms"] == 2.0
    assert facts["bitrates"] == {"1": 3000.0, "2": 6000.0, "3": 9000.0, "4": 12000.0}
    assert main(["convert", model_dir, str(tmp_path / "native.safetensors")]) == 0
    assert main(["info", str(tmp_path / "native.safetensors"), "--json"]) == 0
    native = json.loads(capsys.readouterr().out)
    assert native["kind"] == "native weights"
    assert native["parameters"] == facts["parameters"]


def test_info_of_a_codes_file(model_dir, talks, tmp_path, capsys):
    assert main(["encode", str(talks / "one.wav"), "-o", str(tmp_path), "--model", model_dir]) == 0
    path = str(tmp_path / "one.safetensors")
    assert main(["info", path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["duration_s"], facts["source"]) == ("codes", 12_001 / RATE, "one.wav")
    assert main(["info", path]) == 0
    assert "model fingerprint" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gone/far/away", "one.wav", "."])
def test_info_of_nothing(talks, monkeypatch, capsys, name):
    monkeypatch.chdir(talks)
    assert main(["info", name]) == 2
    assert capsys.readouterr().err.startswith("mimi: Could not ")


@pytest.mark.parametrize(
    "arguments", [[], ["sing"], ["encode", "a.wav"], ["encode", "a.wav", "-o", "out", "--num-quantizers", "0"]]
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: mimi")


def test_a_folder_without_audio(tmp_path, capsys):
    assert main(["encode", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "There is no file to encode" in capsys.readouterr().err


def test_ctrl_c(monkeypatch, talks, tmp_path, capsys):
    def press(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", press)
    assert main(["encode", str(talks), "-o", str(tmp_path / "codes")]) == 130
    assert "interrupted" in capsys.readouterr().err
