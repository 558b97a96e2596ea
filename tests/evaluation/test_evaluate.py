"""`mimi evaluate` on a small model and real clips: what it measures, how it goes on, what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import speech
from pystoi import stoi

from modeling_mimi.cli import main
from training.evaluation import runner
from training.evaluation.parts import Parts, PlanError
from training.evaluation.report import table
from training.evaluation.runner import Share, mine
from training.evaluation.statistics import estimate

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
QUICK = ["--metrics", "stoi", "si_sdr", "--device", "cpu", "--batch-size", "2"]


@pytest.fixture
def checkpoint(tiny_model, tmp_path) -> Path:
    tiny_model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Five clips of two lengths, a silent one and a broken one, with what is said."""
    folder = tmp_path / "corpus" / "test"
    folder.mkdir(parents=True)
    for path in DATA.glob("*.flac"):
        shutil.copy(path, folder)
    for number in (1, 2):
        soundfile.write(folder / f"made_{number}.wav", speech(30_000, seed=number)[0, 0].numpy(), 24_000)
    soundfile.write(folder / "silent.wav", np.zeros(24_000), 24_000)
    (folder / "broken.wav").write_bytes(b"RIFF....not a wave")
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "language"])
        writer.writerows(
            [path.name, "text", "nl" if path.suffix == ".flac" else "xx"] for path in folder.glob("*.*a*")
        )
    return folder.parent


def evaluate(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_every_figure_is_what_the_clips_give_one_by_one(checkpoint, corpus, tmp_path, tiny_model, capsys, monkeypatch):
    output = tmp_path / "out"
    arguments = [checkpoint, corpus, "-o", output, "--num-quantizers", 1, 4, "--beside", "original", *QUICK]
    monkeypatch.setattr("sys.argv", ["mimi", "evaluate", *map(str, arguments)])
    assert evaluate(*arguments) == 0
    found = results(output)
    assert found["command"].startswith("mimi evaluate tiny corpus -o out")
    assert [codec["name"] for codec in found["codecs"]] == ["original", "tiny, 1 codebook", "tiny, 4 codebooks"]
    assert found["data"]["clips"] == 5
    assert found["data"]["skipped"] == {"silent": 1, "undecodable": 1}
    by_hand = []
    for path in sorted((corpus / "test").glob("*.*")):
        if path.stem in ("silent", "broken", "metadata"):
            continue
        audio, rate = soundfile.read(path, dtype="float32")
        padded = torch.nn.functional.pad(torch.from_numpy(audio), (0, -len(audio) % tiny_model.config.frame_size))
        with torch.inference_mode():
            codes = tiny_model.encode(padded[None, None], num_quantizers=1).audio_codes
            wave = tiny_model.decode(codes).audio_values[0, 0, : len(audio)].clamp(-1, 1).numpy()
        by_hand.append(stoi(audio, wave, rate))
    one = found["codecs"][1]
    assert one["scores"]["stoi"]["mean"] == pytest.approx(np.mean(by_hand), abs=1e-4)
    assert one["scores"]["stoi"]["low"] <= one["scores"]["stoi"]["mean"] <= one["scores"]["stoi"]["high"]
    assert one["measured_bitrate"] == pytest.approx(tiny_model.config.bitrate(1), rel=0.05)
    assert found["codecs"][0]["scores"]["stoi"]["mean"] == pytest.approx(1)
    assert found["codecs"][0]["measured_bitrate"] is None
    assert len(found["codebooks"]["tiny"]["usage"]) == 4
    assert found["data"]["path"] == "corpus"  # and not where it lies on this machine
    assert str(tmp_path) not in json.dumps(found)
    assert "| tiny, 4 codebooks |" in capsys.readouterr().out
    for picture in ("quality_against_bitrate", "spectrograms", "codebooks_tiny"):
        assert (output / f"{picture}.png").stat().st_size > 10_000


def test_an_interrupted_evaluation_goes_on_and_ends_alike(checkpoint, corpus, tmp_path, monkeypatch):
    arguments = [checkpoint, corpus, "--num-quantizers", 4, *QUICK]
    assert evaluate(*arguments, "-o", tmp_path / "whole") == 0
    measured, measure = [], runner._measure

    def killed_in_its_second_batch(codecs, clips, scorer):
        measured.extend(clip.name for clip in clips)
        if len(measured) > 2:
            raise KeyboardInterrupt
        return measure(codecs, clips, scorer)

    monkeypatch.setattr(runner, "_measure", killed_in_its_second_batch)
    assert evaluate(*arguments, "-o", tmp_path / "part") == 130
    part = tmp_path / "part" / "parts" / "part-00000.jsonl"
    with part.open("a") as file:
        file.write('{"clip": "cut o')  # what a killed process may leave
    first = list(measured)
    monkeypatch.setattr(runner, "_measure", lambda *rest: measured.extend(c.name for c in rest[1]) or measure(*rest))
    measured.clear()
    assert evaluate(*arguments, "-o", tmp_path / "part") == 0
    assert not {*first[:2]} & {*measured}
    whole, resumed = results(tmp_path / "whole"), results(tmp_path / "part")
    for both in (whole, resumed):
        del both["command"]
    assert whole["data"] == resumed["data"]
    assert whole["codecs"][0]["scores"]["stoi"]["mean"] == pytest.approx(
        resumed["codecs"][0]["scores"]["stoi"]["mean"]
    )
    measured.clear()
    assert evaluate(*arguments, "-o", tmp_path / "part") == 0  # finished: nothing is left to do
    assert not measured


@pytest.mark.slow
def test_two_processes_measure_what_one_does(checkpoint, corpus, tmp_path):
    # clips one by one: in other batches, other roundings decide the ties of a random model's codes
    arguments = [str(checkpoint), str(corpus), "--num-quantizers", "4", *QUICK, "--batch-size", "1", "-o"]
    assert evaluate(*arguments, tmp_path / "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "modeling_mimi.cli", "evaluate", *arguments, str(tmp_path / "two")]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, cwd=ROOT)
    assert len(list((tmp_path / "two" / "parts").glob("part-*.jsonl"))) == 2
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["data"] == two["data"]
    for name, score in one["codecs"][0]["scores"].items():
        assert two["codecs"][0]["scores"][name]["mean"] == pytest.approx(score["mean"], rel=1e-4)
    assert one["codebooks"] == two["codebooks"]


def test_another_evaluation_in_the_same_folder_is_refused_unless_told(checkpoint, corpus, tmp_path, capsys):
    arguments = [checkpoint, corpus, "-o", tmp_path / "out", "--where", "language=xx", *QUICK]
    assert evaluate(*arguments, "--num-quantizers", 1) == 0
    assert evaluate(*arguments, "--num-quantizers", 2) == 2
    assert "holds an evaluation with another codecs" in capsys.readouterr().err
    assert evaluate(*arguments, "--num-quantizers", 2, "--overwrite") == 0
    assert results(tmp_path / "out")["codecs"][0]["name"] == "tiny, 2 codebooks"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--beside", "flac:9"], "'flac:9' is not a codec"),
        (["--metrics", "loudness"], "loudness"),
        (["--where", "language"], "--where takes COLUMN=VALUE"),
        (["--where", "accent=none"], "no column 'accent'"),
        (["--split", "dev"], "dev"),
        (["--num-quantizers", "9"], "1 to 4 codebooks, not 9"),
    ],
)
def test_what_cannot_be_measured_gets_one_sentence(checkpoint, corpus, tmp_path, capsys, change, sentence):
    assert evaluate(checkpoint, corpus, "-o", tmp_path / "out", *QUICK, *change) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert "Traceback" not in message


def test_a_choice_of_clips_is_the_same_each_time(checkpoint, corpus, tmp_path):
    for name in ("a", "b"):
        assert evaluate(checkpoint, corpus, "-o", tmp_path / name, "--clips", 3, *QUICK) == 0
    a, b = (sorted(row["clip"] for row in Parts(tmp_path / name).rows()) for name in ("a", "b"))
    assert a == b
    assert len(a) == 3


def test_processes_share_what_is_left_without_gaps_or_repeats():
    class Row:
        def __init__(self, name):
            self.name = name

    rows = [(Row(str(number)), {}) for number in range(17)]
    done = {"3", "4", "11"}
    shares = [[row[0].name for row in mine(rows, Share(rank, 3), done)] for rank in range(3)]
    assert sorted(name for names in shares for name in names) == sorted(set(map(str, range(17))) - done)


def test_rows_of_several_processes_are_read_once(tmp_path):
    for rank, names in enumerate((["a", "b"], ["b", "c"])):
        for name in names:
            Parts(tmp_path, rank).append({"clip": name, "value": float("nan")})
    assert [row["clip"] for row in Parts(tmp_path).rows()] == ["a", "b", "c"]


def test_a_plan_names_what_differs(tmp_path):
    Parts(tmp_path).begin({"codecs": ["a"], "metrics": ["stoi"]})
    Parts(tmp_path).begin({"codecs": ["a"], "metrics": ["stoi"]})
    with pytest.raises(PlanError, match="another metrics"):
        Parts(tmp_path).begin({"codecs": ["a"], "metrics": ["pesq"]})


def test_estimates_are_weighted_means_that_leave_out_what_is_undefined():
    plain = estimate([1.0, 2.0, float("nan"), 3.0])
    assert plain.mean == 2.0
    assert plain.clips == 3
    assert 1.0 <= plain.low < 2.0 < plain.high <= 3.0
    assert estimate([0.5, 0.1], weights=[10, 30]).mean == pytest.approx((5 + 3) / 40)
    assert estimate([1.0, 2.0, 5.0]) == estimate([1.0, 2.0, 5.0])
    assert estimate([]).clips == 0


def test_intervals_hold_the_mean_as_often_as_they_say():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = estimate(generator.normal(1.0, 2.0, 80))
        inside += found.low <= 1.0 <= found.high
    assert 0.90 <= inside / 200 <= 0.98


def test_the_best_coded_value_stands_out_and_the_original_never():
    def codec(name, rate, mean):
        score = {"mean": mean, "low": mean, "high": mean, "clips": 2}
        return {"name": name, "measured_bitrate": rate, "scores": {"si_sdr": score}}

    shown = {
        "scores": {"si_sdr": {"label": "SI-SDR", "higher_is_better": True, "unit": "dB"}},
        "codecs": [codec("original", None, 100.0), codec("a", 1100.0, 3.0), codec("b", 1200.0, 5.0)],
    }
    lines = table(shown).splitlines()
    assert lines[2].startswith("| original | - | 100")
    assert "**" not in lines[2] + lines[3]
    assert "**5 ± 0**" in lines[4]
