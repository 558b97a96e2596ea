"""What a run leaves behind: its history line by line, its summary, its pictures."""

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import speech
from matplotlib.image import imread

from training.history import History, write_summary
from training.pictures import curves, figure_to_image, spectrograms

LEVELS = range(1, 9)


@pytest.fixture
def rows() -> list[dict]:
    """A run of 40 steps as the trainer logs it."""
    losses = "adversarial feature_matching mel waveform commitment distillation feature_reconstruction discriminator"
    keys = [f"loss/{name}" for name in losses.split()]
    keys += [f"gradient_norm/{name}" for name in ("encoder", "quantizer", "decoder", "discriminator")]
    keys += ["balancer/mel", "balancer/adversarial", "discriminator/accuracy_real", "discriminator/accuracy_fake"]
    keys += [f"codebook/{name}_{level}" for name in ("perplexity", "usage") for level in LEVELS]
    keys += ["codebook/replaced", "learning_rate", "discriminator_learning_rate", "audio_seconds_per_second"]
    keys += ["data_wait", "num_quantizers"]
    draw = random.Random(0)
    rows = [{"step": step, "kind": "train", **{key: draw.random() for key in keys}} for step in range(1, 41)]
    rows[7]["loss/mel"] = None
    for row in rows:
        row["skipped_steps"] = 0
    scores = ["si_sdr", "mel_distance", "stoi", *(f"usage_{level}" for level in LEVELS)]
    scores += [f"perplexity_{level}" for level in LEVELS]
    return rows + [{"step": step, "kind": "validation", **{key: draw.random() for key in scores}} for step in (20, 40)]


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_floats_read_back_bit_for_bit(tmp_path):
    draw = random.Random(0)
    values = {f"value_{i}": draw.random() * 10 ** draw.randint(-300, 300) for i in range(100)}
    history = History(tmp_path / "run")
    history.append(10, values)
    history.append(10, {"si_sdr": torch.tensor(0.1), "stoi": np.float32(0.1), "count": torch.tensor(3)}, "validation")
    assert history.read("train") == [{"step": 10, "kind": "train", **values}]
    assert history.read("validation") == [
        {"step": 10, "kind": "validation", "si_sdr": 0.10000000149011612, "stoi": 0.10000000149011612, "count": 3}
    ]
    assert len(history.read()) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float64("inf")])
def test_what_is_not_finite_is_null(tmp_path, value):
    def refuse(constant):
        raise AssertionError(constant)

    History(tmp_path).append(1, {"loss": value})
    assert json.loads((tmp_path / "history.jsonl").read_text(), parse_constant=refuse)["loss"] is None
    write_summary(tmp_path / "summary.json", {"best": {"scores": [value]}})
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse) == {"best": {"scores": [None]}}


def test_rewind_gives_the_history_of_the_checkpoint(tmp_path):
    history = History(tmp_path)
    history.rewind(0)  # nothing there yet
    assert history.read() == []
    for step in (10, 20):
        history.append(step, {"loss": 1 / step})
        history.append(step, {"stoi": step / 100}, "validation")
    until_20 = history.path.read_bytes()
    history.append(30, {"loss": 1 / 30})
    with history.path.open("a") as file:
        file.write('{"step": 40, "kind": "tra')  # killed here
    assert [row["step"] for row in history.read("train")] == [10, 20, 30]
    history.rewind(20)
    assert history.path.read_bytes() == until_20
    history.append(30, {"loss": 1.0})
    assert [row["step"] for row in history.read()] == [10, 10, 20, 20, 30]
    assert list(tmp_path.iterdir()) == [history.path]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    history = History(tmp_path)
    history.path.write_text('{"step": 1, "kind": "train"}')
    history.rewind(1)
    history.append(2, {})
    assert [row["step"] for row in history.read()] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    History(tmp_path).path.write_text('{"step": 1, "kind": "train"}\n{"st\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(ValueError, match="line 2"):
        History(tmp_path).read()


def test_summary_replaces_the_one_before(tmp_path):
    path = tmp_path / "run" / "summary.json"
    write_summary(path, {"steps": 1, "weights": "x" * 100})
    write_summary(path, {"steps": np.int64(2), "folder": tmp_path, 3: (0.1, torch.tensor(0.5))})
    assert json.loads(path.read_text()) == {"steps": 2, "folder": str(tmp_path), "3": [0.1, 0.5]}
    assert list(path.parent.iterdir()) == [path]


def test_curves_have_a_panel_per_question(rows, tmp_path):
    figure = curves(rows, tmp_path / "run" / "curves.png")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["curves.png"]
    assert np.ptp(imread(tmp_path / "run" / "curves.png")) > 0.5
    assert titles(figure) == [
        *("SI-SDR", "Mel distance", "STOI"),
        *("Reconstruction losses", "Adversarial losses", "Quantizer losses"),
        *("Discriminator's accuracy", "Gradient norms", "Loss gradients"),
        *("Codebook usage", "Codebook perplexity", "Replaced entries"),
        *("Learning rate", "Speed", "Waiting for data"),
    ]
    named = {axes.get_title(loc="left"): {text.get_text() for text in axes.texts} for axes in figure.axes}
    assert named["Codebook usage"] >= {"1 semantic", *"2345678"}
    assert named["Gradient norms"] >= {"encoder", "quantizer", "decoder", "discriminator"}
    assert named["Discriminator's accuracy"] >= {"real", "fake"}


def test_curves_leave_out_what_is_not_logged(rows):
    scores = [{**row, "skipped_steps": 1} for row in rows if row["kind"] == "validation"]
    assert titles(curves(scores)) == ["SI-SDR", "Mel distance", "STOI", "Codebook usage", "Codebook perplexity"]
    only = [{"step": 5, "kind": "train", "loss/mel": 0.5, "skipped_steps": 1, "learning_rate": None}]
    assert titles(curves(only)) == ["Reconstruction losses", "Skipped steps"]
    assert titles(curves([])) == []
    frozen = [{"step": 5, "kind": "train", "gradient_norm/quantizer": 0.0, "gradient_norm/decoder": 1.0}]
    (axes,) = curves(frozen).axes  # nothing at zero on a logarithm's scale
    assert len(axes.lines) == 2  # raw and smoothed


def test_curves_show_values_where_they_are(rows):
    axes = {axes.get_title(loc="left"): axes for axes in curves(rows).axes}
    best = max(row["si_sdr"] for row in rows if row["kind"] == "validation")
    assert axes["SI-SDR"].get_title(loc="right") == f"best {best:.3g}"
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates in [line.get_ydata().tolist() for line in axes["Learning rate"].lines]
    mel = [row["loss/mel"] for row in rows[:40] if row["loss/mel"] is not None]
    assert mel in [line.get_ydata().tolist() for line in axes["Reconstruction losses"].lines]


def test_spectrograms_are_on_one_scale(tmp_path):
    time = torch.arange(24_000) / 24_000
    audio = torch.sin(2 * torch.pi * 3000 * time)
    figure = spectrograms(audio, 0.1 * audio, 24_000, "a tone", tmp_path / "tone.png")
    above, below, *_ = figure.axes
    images = [axes.images[0] for axes in (above, below)]
    assert [axes.get_title(loc="left") for axes in (above, below)] == ["Original", "Reconstruction"]
    for image in images:
        assert image.get_clim() == pytest.approx((-80, 0), abs=0.5)
    levels = [image.get_array()[:, 5:-5] for image in images]
    assert levels[0].max() == pytest.approx(0, abs=0.01)
    assert levels[1].max() == pytest.approx(-20, abs=0.01)
    assert (levels[0].argmax(0) == 3000 * 1024 // 24_000).all()
    assert above.get_ylim() == (0, 12)
    assert above.get_xlim() == (0, 1)
    assert np.ptp(imread(tmp_path / "tone.png")) > 0.5


@pytest.mark.parametrize("reconstruction", [torch.zeros(4800), torch.full((4800,), math.nan)])
def test_spectrograms_of_anything(reconstruction):
    image = figure_to_image(spectrograms(speech(4800)[0, 0], reconstruction, 24_000, "speech"))
    assert image.shape == (648, 1200, 3)
    assert image.dtype == np.uint8
    assert np.ptp(image) > 200
