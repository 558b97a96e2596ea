"""`mimi tokenize` on a small model: every clip once with the codes that it has alone, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from clips_of_all_kinds import BAD, GOOD, errors, mimi, prepared, rows, write_clips, write_corpus
from conftest import assert_same_codes, speech
from datasets import Audio, ClassLabel, Features, List, Value, load_dataset
from killed_run import take_small_steps

from modeling_mimi.pipeline_mimi import MimiCodesToAudioPipeline
from training import commands
from training.corpus import shards, tokenize
from training.corpus.encoding import Encoder
from training.corpus.shards import shard_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def checkpoint(tiny_model, tmp_path) -> Path:
    tiny_model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def small_steps(monkeypatch) -> None:
    for module, name in [(tokenize, "WINDOW_S"), (tokenize, "WINDOW_BATCHES"), (tokenize, "LONG_S")]:
        monkeypatch.setattr(module, name, getattr(module, name))  # so that they come back
    monkeypatch.setattr(shards, "SAVE_EVERY_S", shards.SAVE_EVERY_S)
    take_small_steps()


def assert_whole(folder: Path, names: dict = GOOD) -> None:
    """Every clip is there once, in codes or among the errors, and nothing else is."""
    assert Counter(row["clip_id"] for row in rows(folder)) == dict.fromkeys(names, 1)
    assert errors(folder) == (BAD if names is GOOD else {})
    assert not [path for path in folder.rglob("*") if path.name.endswith(".part")]
    assert json.loads((folder / "tokens.json").read_text())["clips"] == len(names)


def test_columns_keep_their_types_where_many_cells_are_empty(checkpoint, tmp_path):
    """As in most metadata: a transcript here, none for the next twenty clips."""
    folder = tmp_path / "corpus" / "train"
    folder.mkdir(parents=True)
    lines, expected = ["file_name,text,age"], {}
    for number in range(40):
        name, text, age = f"{number:02d}.wav", "word" if number > 20 else None, 30.5 if number == 3 else None
        soundfile.write(folder / name, speech(48, seed=number)[0, 0].numpy(), 24_000)
        lines.append(f"{name},{text or ''},{age or ''}")
        expected[name] = (text, age)
    (folder / "metadata.csv").write_text("\n".join(lines))
    output = tmp_path / "out"
    assert mimi("tokenize", folder.parent, "--to", output, "--model", checkpoint) == 0
    assert {row["clip_id"]: (row["text"], row["age"]) for row in rows(output)} == expected
    features = load_dataset(str(output), split="train", streaming=True).features
    assert (features["text"], features["age"]) == (Value("large_string"), Value("float64"))


@torch.inference_mode()
def test_a_folder_becomes_the_codes_that_each_clip_has_alone(checkpoint, corpus, tmp_path, tiny_model, capsys):
    output = tmp_path / "out"
    assert mimi("tokenize", corpus, "--to", output, "--model", checkpoint) == 0
    printed = capsys.readouterr().out
    assert f"{len(GOOD)} clips, " in printed
    assert f"{len(BAD)} clips could not be encoded (2 empty, 1 not finite" in printed
    assert_whole(output)
    found = load_dataset(str(output), split="train", streaming=True)
    added = {"clip_id": Value("string"), "codes": List(List(Value("uint16")))}
    added |= {"num_frames": Value("int32"), "num_samples": Value("int64")}
    assert found.features.items() >= added.items()
    assert {"text", "speaker"} == found.features.keys() - added.keys()
    by_name = {row["clip_id"]: row for row in found}
    assert list(by_name) == list(GOOD)  # as the metadata lists them, whatever their batches
    decode = MimiCodesToAudioPipeline(model=tiny_model)
    for name in GOOD:
        row, inputs = by_name[name], prepared(corpus / "train" / name)
        assert row["text"] == f"says {name}"
        assert row["num_samples"] == inputs["input_values"].shape[-1]
        alone = tiny_model.encode(inputs["input_values"], output_latents=True)
        codes = torch.tensor(row["codes"])
        assert row["num_frames"] == codes.shape[1]
        assert_same_codes(tiny_model, alone.latents, codes[None], alone.audio_codes)
        decoded = decode({"audio_codes": row["codes"], "num_samples": row["num_samples"]})["audio"]
        assert len(decoded) == row["num_samples"]
    assert json.loads((output / "tokens.json").read_text())["padding"] < 0.05


def test_a_long_clip_in_pieces_is_the_clip(checkpoint, corpus, tmp_path, tiny_model, small_steps):
    assert mimi("tokenize", corpus, "--to", tmp_path / "out", "--model", checkpoint, "--num-quantizers", 2) == 0
    assert_whole(tmp_path / "out")
    assert len(shard_paths(tmp_path / "out")) > 3
    by_name = {row["clip_id"]: row for row in rows(tmp_path / "out")}
    for name in ("anna/long.flac", "bert/three.flac", "carl/three.wav"):
        with torch.inference_mode():
            alone = tiny_model.encode(prepared(corpus / "train" / name)["input_values"], num_quantizers=2)
        assert torch.tensor(by_name[name]["codes"]).equal(alone.audio_codes[0].long())  # bit for bit


def parquet(path: Path, clips: Path, group: int = 3) -> list[str]:
    """A table of clips that carries them, with columns of several kinds, in row groups."""
    kinds = Features({"audio": Audio(), "label": ClassLabel(names=["x", "y"]), "words": List(Value("string"))})
    names = sorted(GOOD)
    audio = [{"bytes": (clips / name).read_bytes(), "path": name} for name in names]
    columns = {"audio": audio, "label": [len(name) % 2 for name in names], "words": [[name, "b"] for name in names]}
    pq.write_table(pa.table(columns).cast(kinds.arrow_schema), path, row_group_size=group)
    return names


def test_parquet_keeps_its_columns_and_their_features(checkpoint, tmp_path):
    write_clips(tmp_path / "clips")
    names = parquet(tmp_path / "clips.parquet", tmp_path / "clips")
    arguments = ["tokenize", tmp_path / "clips.parquet", "--to", tmp_path / "out", "--model", checkpoint]
    assert mimi(*arguments, "--where", "label=x") == 0
    found = load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    assert found.features["label"] == ClassLabel(names=["x", "y"])
    assert found.features["words"] == List(Value("string"))
    assert "audio" not in found.features
    kept = [name for name in names if len(name) % 2 == 0]
    assert kept
    assert [row["clip_id"] for row in found] == kept
    assert [row["words"] for row in found] == [[name, "b"] for name in kept]
    summary = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert summary["source"]["name"] is None
    assert summary["source"]["dataset"] == "clips.parquet"  # and not where it lies on this machine
    assert str(tmp_path) not in json.dumps(summary)


def test_an_archive_of_clips_without_other_columns(checkpoint, tmp_path):
    write_clips(tmp_path / "clips")
    with tarfile.open(tmp_path / "clips-0.tar", "w") as archive:
        for name in ("anna/a.wav", "bert/a.wav"):
            archive.add(tmp_path / "clips" / name, name.replace("/", "_"))
    arguments = ["tokenize", tmp_path / "clips-0.tar", "--to", tmp_path / "out", "--model", checkpoint]
    assert mimi(*arguments, "--audio-column", "wav") == 0
    assert [row["clip_id"] for row in rows(tmp_path / "out")] == ["anna_a.wav", "bert_a.wav"]


def test_killed_it_goes_on_and_finished_it_says_so(checkpoint, corpus, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    arguments = ["tokenize", corpus, "--to", output, "--model", checkpoint]
    command = [sys.executable, str(HERE / "killed_run.py"), "2", *map(str, arguments), "--device", "cpu"]
    killed = subprocess.run(command, timeout=300, capture_output=True, text=True, cwd=ROOT, check=False)
    assert killed.returncode == -9, killed.stderr
    before = {path: path.read_bytes() for path in shard_paths(output)}
    assert len(before) == 2
    assert list((output / "data").glob(".*.part"))
    assert not (output / "tokens.json").exists()
    as_process(monkeypatch, 1, 3)  # another process of another number goes on, and is stopped too
    assert mimi(*arguments) == 0
    as_process(monkeypatch, 0, 1)
    assert mimi(*arguments) == 0
    assert_whole(output)
    assert {path: path.read_bytes() for path in before} == before
    capsys.readouterr()
    monkeypatch.setattr(Encoder, "step", lambda *_: pytest.fail("there was nothing left to do"))
    assert mimi(*arguments) == 0
    assert "Finished before" in capsys.readouterr().out


def as_process(monkeypatch, rank: int, count: int) -> None:
    """Make the next run one of several that share the work; the others are not there."""

    def state(args):
        args.device = "cpu"
        return SimpleNamespace(
            process_index=rank, num_processes=count, is_main_process=count == 1, wait_for_everyone=lambda: None
        )

    monkeypatch.setattr(tokenize, "process_state", state)


@pytest.mark.parametrize("counts", [[(0, 3), (2, 3), (1, 3), (0, 1)], [(3, 4), (1, 2), (1, 2), (0, 1)]], ids=str)
@pytest.mark.parametrize("kind", ["folder", "row groups"])
def test_however_processes_come_and_go_each_clip_is_done_once(
    checkpoint, corpus, tmp_path, monkeypatch, small_steps, counts, kind
):
    source, names = corpus, GOOD
    if kind == "row groups":
        source, names = tmp_path / "clips.parquet", dict.fromkeys(GOOD)
        parquet(source, corpus / "train", group=2)
    for rank, count in counts:
        as_process(monkeypatch, rank, count)
        assert mimi("tokenize", source, "--to", tmp_path / "out", "--model", checkpoint) == 0
    assert_whole(tmp_path / "out", names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_keep_what_is_done(checkpoint, corpus, tmp_path, monkeypatch, small_steps, number, request):
    steps, step = [], Encoder.step
    if number == signal.SIGINT:  # which a shell's background job is born deaf to
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))

    def interrupted(self, loaded):
        steps.append(loaded)
        if len(steps) == 5:
            signal.raise_signal(number)
        return step(self, loaded)

    monkeypatch.setattr(shards, "SAVE_EVERY_S", 1e9)
    monkeypatch.setattr(Encoder, "step", interrupted)
    arguments = ["tokenize", corpus, "--to", tmp_path / "out", "--model", checkpoint, "--workers", 1]
    assert mimi(*arguments) == 130
    done = {row["clip_id"] for row in rows(tmp_path / "out")}
    assert done
    assert mimi(*arguments) == 0
    assert_whole(tmp_path / "out")


@pytest.mark.slow
def test_two_processes_killed_and_one_that_goes_on(checkpoint, corpus, tmp_path):
    arguments = ["tokenize", str(corpus), "--to", str(tmp_path / "two"), "--model", str(checkpoint)]

    def launch(*command: str) -> int:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return subprocess.run([*launcher, *command], timeout=300, env=environment, cwd=ROOT, check=False).returncode

    assert launch(str(HERE / "killed_run.py"), "1", *arguments) != 0
    assert 1 <= len(shard_paths(tmp_path / "two")) <= 2
    assert launch("-m", "modeling_mimi.cli", *arguments) == 0
    assert_whole(tmp_path / "two")
    arguments[3] = str(tmp_path / "one")
    assert mimi(*arguments) == 0
    one, two = ({row["clip_id"]: row["text"] for row in rows(tmp_path / name)} for name in ("one", "two"))
    assert one == two


def test_two_jobs_do_not_mix(checkpoint, corpus, tmp_path, tiny_model, capsys):
    arguments = ["tokenize", corpus, "--to", tmp_path / "out", "--where", "speaker=anna"]
    assert mimi(*arguments, "--model", checkpoint) == 0
    whole = rows(tmp_path / "out")

    def refused(*change: object) -> str:
        capsys.readouterr()
        assert mimi(*arguments, *change) == 2
        assert rows(tmp_path / "out") == whole
        return capsys.readouterr().err

    assert "its codec num quantizers is 4, here it is 2" in refused("--model", checkpoint, "--num-quantizers", 2)
    assert "its source where is" in refused("--model", checkpoint, "--where", "speaker=bert")
    assert "its codec dtype is float32, here it is bfloat16" in refused("--model", checkpoint, "--dtype", "bfloat16")
    with torch.no_grad():
        tiny_model.quantizer.semantic_residual_vector_quantizer.layers[0].codebook.embed_sum.add_(1)
    tiny_model.save_pretrained(checkpoint)
    assert "its codec model is tiny (" in refused("--model", checkpoint)


def test_a_folder_that_has_changed_is_another_data_set(checkpoint, corpus, tmp_path, capsys):
    arguments = ["tokenize", corpus, "--to", tmp_path / "out", "--model", checkpoint, "--where", "speaker=anna"]
    assert mimi(*arguments) == 0
    (corpus / "train" / "anna" / "b.wav").rename(corpus / "train" / "anna" / "0.wav")
    text = (corpus / "train" / "metadata.csv").read_text()
    (corpus / "train" / "metadata.csv").write_text(text.replace("anna/b.wav", "anna/0.wav"))
    assert mimi(*arguments) == 2
    assert "its source digest is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--where", "speaker"], "--where takes COLUMN=VALUE"),
        (["--where", "speaker=nobody"], "has no clip that can be encoded: it is empty"),
        (["--where", "speaker=bad"], "has no clip that can be encoded: {'empty': 2, 'not finite': 1"),
        (["--split", "test"], "has no split 'test'"),
        (["--num-quantizers", "9"], "must be from 1 to 4, the codebooks of this model, got 9"),
        (["--model", "nowhere/at/all"], "Could not load the model 'nowhere/at/all'"),
    ],
)
def test_what_cannot_be_done_gets_one_sentence(checkpoint, corpus, tmp_path, capsys, change, sentence):
    assert mimi("tokenize", corpus, "--to", tmp_path / "out", "--model", checkpoint, *change) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message


def test_a_column_that_tokens_need_is_not_written_over(checkpoint, tmp_path, capsys):
    write_clips(tmp_path / "clips")
    parquet(tmp_path / "clips.parquet", tmp_path / "clips")
    table = pq.read_table(tmp_path / "clips.parquet").replace_schema_metadata()
    pq.write_table(table.append_column("codes", pa.array(range(len(table)))), tmp_path / "clips.parquet")
    assert mimi("tokenize", tmp_path / "clips.parquet", "--to", tmp_path / "out", "--model", checkpoint) == 2
    assert "has a column codes already" in capsys.readouterr().err


def test_a_file_that_is_no_shard_is_named(checkpoint, corpus, tmp_path, capsys):
    (tmp_path / "out" / "data").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "out" / "data" / "mine.parquet")
    assert mimi("tokenize", corpus, "--to", tmp_path / "out", "--model", checkpoint) == 2
    assert "mine.parquet is not a shard that `mimi tokenize` wrote" in capsys.readouterr().err


def test_push_publishes_the_folder_when_all_is_there(checkpoint, corpus, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(
        commands.subprocess, "run", lambda command, **kw: runs.append((command, kw)) or SimpleNamespace(returncode=7)
    )
    arguments = ["tokenize", corpus, "--to", tmp_path / "out", "--model", checkpoint, "--push", "me/tokens"]
    assert mimi(*arguments, "--split", "test") == 2
    assert not runs
    assert mimi(*arguments) == 7
    ((command, options),) = runs
    assert command[1:] == ["-m", "hub_cards", "publish", str(tmp_path / "out"), "me/tokens", "--repo-type", "dataset"]
    assert options["cwd"] == ROOT


def test_a_source_that_breaks_off_is_named_and_what_came_before_is_kept(checkpoint, tmp_path, capsys, small_steps):
    write_clips(tmp_path / "clips")
    parquet(tmp_path / "clips.parquet", tmp_path / "clips")
    whole = (tmp_path / "clips.parquet").read_bytes()
    broken = bytearray(whole)
    metadata = pq.read_metadata(tmp_path / "clips.parquet")
    start = metadata.row_group(2).column(0).dictionary_page_offset or metadata.row_group(2).column(0).data_page_offset
    broken[start : start + 40] = bytes(40)
    (tmp_path / "clips.parquet").write_bytes(broken)
    arguments = ["tokenize", tmp_path / "clips.parquet", "--to", tmp_path / "out", "--model", checkpoint]
    assert mimi(*arguments) == 2
    assert "clips.parquet (train) cannot be read further" in capsys.readouterr().err
    before = {row["clip_id"] for row in rows(tmp_path / "out")}
    assert before
    (tmp_path / "clips.parquet").write_bytes(whole)
    assert mimi(*arguments) == 0
    assert_whole(tmp_path / "out", dict.fromkeys(GOOD))
