"""A run as its user sees it: it goes on after a kill, says what it did, and gives a model that stock loads."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from fixed_run import FixedWindows, gradient_descent, window

import training.learner
import training.trainer
from modeling_mimi import MimiConfig, MimiFeatureExtractor, MimiModel
from training.config import parse, read_recipe
from training.data import Batch
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
DEBUG = str(ROOT / "training" / "recipes" / "debug.yaml")
CLIPS = f"--data.sources=[{{path: {ROOT / 'tests' / 'data'}}}]"
NO_VALIDATION = "--validation.sources=[]"
TIMES = {"audio_seconds_per_second", "data_wait"}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate remembers the precision of a process's first run."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def fixed_windows(monkeypatch):
    monkeypatch.setattr(training.trainer, "WindowLoader", FixedWindows)
    monkeypatch.setattr(training.learner, "build_optimizer", gradient_descent)


def run(folder, *overrides, steps=6, every=2) -> Trainer:
    trainer = Trainer(
        parse(
            [
                DEBUG,
                CLIPS,
                NO_VALIDATION,
                "--trackers=[]",
                f"--output_dir={folder}",
                f"--steps={steps}",
                f"--checkpoint_every={every}",
                *overrides,
            ]
        )
    )
    trainer.train()
    return trainer


def history(folder) -> list[dict]:
    rows = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(folder, step: int) -> dict:
    return torch.load(Path(folder) / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)


def assert_equal(one, other, path="state"):
    """Bit for bit, through any nesting; what measures time or names the folder aside."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"elapsed_s", "config"}:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


# ---- going on


class Killed(BaseException):
    """Nothing in the trainer may catch it."""


def test_a_run_killed_between_checkpoints_equals_the_uninterrupted_run(tmp_path, monkeypatch):
    run(tmp_path / "whole", steps=7)
    for attempt, deaths in enumerate((3, 4, 6)):
        with monkeypatch.context() as patch:
            step = training.trainer.Learner.step

            def dying(self, number, batches, step=step, deaths=deaths):
                if number == deaths:
                    raise Killed
                return step(self, number, batches)

            patch.setattr(training.trainer.Learner, "step", dying)
            with pytest.raises(Killed):
                run(tmp_path / "killed", steps=7)
        assert len(history(tmp_path / "killed")) == deaths, attempt
    run(tmp_path / "killed", steps=7)
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert_equal(weights(tmp_path / "killed", 7), weights(tmp_path / "whole", 7))


def test_means_between_log_entries_survive_a_restart(tmp_path):
    run(tmp_path / "whole", "--log_every=4", steps=8, every=3)
    run(tmp_path / "parts", "--log_every=4", steps=3, every=3)
    parts = tmp_path / "parts" / "history.jsonl"
    parts.write_text("")  # the entry of its last step
    run(tmp_path / "parts", "--log_every=4", steps=8, every=3)
    assert history(tmp_path / "parts")[-1] == history(tmp_path / "whole")[-1]


@pytest.mark.slow
def test_a_run_killed_ten_times_at_random_equals_the_uninterrupted_run(tmp_path):
    """SIGKILL, as the machine would: in a step, while a checkpoint is written, while the process starts."""

    def command(folder):
        return [sys.executable, "-m", "training", DEBUG, f"--output_dir={folder}", "--trackers=[]"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), cwd=ROOT, env=environment, check=True, capture_output=True)
    duration = time.monotonic() - started
    generator = torch.Generator().manual_seed(0)
    reached = []
    for _ in range(10):
        process = subprocess.Popen(
            command(tmp_path / "killed"),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(duration * (0.4 + 0.4 * float(torch.rand((), generator=generator))))
        process.send_signal(signal.SIGKILL)
        process.wait()
        log = tmp_path / "killed" / "history.jsonl"
        reached.append(len(log.read_text().splitlines()) if log.exists() else 0)
    subprocess.run(command(tmp_path / "killed"), cwd=ROOT, env=environment, check=True, capture_output=True)
    assert any(reached), "every kill came before the first step"
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert_equal(weights(tmp_path / "killed", 40), weights(tmp_path / "whole", 40))


def test_sigterm_saves_and_leaves(tmp_path, monkeypatch, caplog):
    run(tmp_path / "whole", every=100)
    with monkeypatch.context() as patch:
        step = training.trainer.Learner.step

        def interrupted(self, number, batches):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, number, batches)

        patch.setattr(training.trainer.Learner, "step", interrupted)
        run(tmp_path / "stopped", every=100)
    assert weights(tmp_path / "stopped", 4)["step"] == 4
    assert not (tmp_path / "stopped" / "model").exists()
    assert "Stopped and saved after step 4" in caplog.text
    run(tmp_path / "stopped", every=100)
    assert history(tmp_path / "stopped") == history(tmp_path / "whole")


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    run(tmp_path, steps=3)
    before = history(tmp_path), weights(tmp_path, 3)
    run(tmp_path, steps=3)
    assert_equal((history(tmp_path), weights(tmp_path, 3)), before)


def test_a_changed_recipe_is_named_when_a_run_goes_on(tmp_path, caplog):
    run(tmp_path, steps=2)
    with caplog.at_level(logging.WARNING):
        run(tmp_path, "--optimizer.learning_rate=1e-5", steps=4)
    assert "optimizer.learning_rate 0.0008 -> 1e-05" in caplog.text
    assert "steps 2 -> 4" in caplog.text


def test_checkpoints_of_other_networks_are_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(ValueError, match="not of this recipe's networks"):
        run(tmp_path, "--discriminator.num_filters=8", steps=4)
    with pytest.raises(ValueError, match="output_dir"):
        run(tmp_path, "--discriminator.windows=[512, 256, 128]", steps=4)


def test_old_checkpoints_are_pruned_but_not_the_best(tmp_path):
    trainer = run(
        tmp_path,
        f"--validation.sources=[{{path: {ROOT / 'tests' / 'data'}}}]",
        "--validation.every=1",
        "--validation.clips=1",
        "--keep_checkpoints=2",
        "--optimizer.learning_rate=0.0",
        "--model.trainable=[decoder]",  # nothing moves: the first stays the best
        steps=5,
        every=1,
    )
    assert trainer.best["step"] == 1
    assert trainer.checkpoints.steps() == [1, 4, 5]


# ---- one batch, however it is taken


def test_a_batch_in_two_parts_equals_the_whole_batch(tmp_path, fixed_windows):
    """Losses, gradients, codebooks, balancer: all but the order of additions."""
    whole = run(tmp_path / "whole", steps=4)
    parts = run(tmp_path / "parts", "--accumulation_steps=2", steps=4)
    assert_close(parts, whole)
    assert_close_histories(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(tmp_path, fixed_windows):
    # more frames than entries: of entries that are alike, rounding would choose
    clear = ("--data.batch_size=12", "--seed=1")
    whole = run(tmp_path / "one", *clear, steps=4)
    launch_two(tmp_path / "two", *clear, "--steps=4")
    state = weights(tmp_path / "two", 4)
    for name, value in whole.learner.codec.state_dict().items():
        torch.testing.assert_close(
            state["codec"][name], value, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert state["balancer"]["sums"] == pytest.approx(whole.learner.objective.balancer.sums, rel=1e-3)
    assert_close_histories(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(tmp_path, caplog):
    """On real windows: the stream says what changes."""
    launch_two(tmp_path, "--steps=2", real=True)
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path, steps=4)
    assert trainer.step == 4
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3, 4]
    assert "saved with another world_size" in caplog.text


def test_gradient_checkpointing_changes_nothing(tmp_path, fixed_windows):
    plain = run(tmp_path / "plain", steps=3)
    assert_close(run(tmp_path / "checkpointed", "--model.gradient_checkpointing=true", steps=3), plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the tracer looks
@pytest.mark.slow
def test_compiling_changes_nothing(tmp_path, fixed_windows, monkeypatch):
    """As far as the graphs go; what makes kernels of them is PyTorch's."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
    run(tmp_path / "plain", steps=2)
    run(tmp_path / "compiled", "--model.compile=true", steps=2)
    # later, entries that lie equally near part their ways
    first, expected = history(tmp_path / "compiled")[0], history(tmp_path / "plain")[0]
    for name in ("loss/mel", "loss/commitment", "loss/discriminator", "gradient_norm/decoder"):
        assert first[name] == pytest.approx(expected[name], rel=1e-3), name


def test_bfloat16_trains_networks_and_leaves_the_quantizer_alone(tmp_path, fixed_windows):
    plain = run(tmp_path / "plain", steps=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = run(tmp_path / "half", "--precision=bf16", steps=4)
    assert half.skipped == 0
    assert {value.dtype for value in half.learner.codec.state_dict().values()} == {torch.float32}
    first, expected = history(tmp_path / "half")[0], history(tmp_path / "plain")[0]
    assert first["loss/mel"] == pytest.approx(expected["loss/mel"], rel=0.05)
    assert first["loss/mel"] != expected["loss/mel"]
    assert plain.step == half.step


def launch_two(folder, *overrides, real=False):
    script = ["-m", "training"] if real else [str(ROOT / "tests" / "training" / "fixed_run.py")]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(*script, DEBUG, CLIPS, NO_VALIDATION, "--trackers=[]", f"--output_dir={folder}", "--checkpoint_every=2"),
            *overrides,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(list((Path(folder) / "checkpoints").glob("*/process-1.pt"))) >= 1, "there was but one process"


def assert_close(one: Trainer, other: Trainer):
    state = other.learner.codec.state_dict()
    for name, value in one.learner.codec.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_close_histories(one, other):
    for row, expected in zip(history(one), history(other), strict=True):
        assert row.pop("kind") == expected.pop("kind")
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-5)


# ---- what goes wrong


class BrokenWindows(FixedWindows):
    """Not a number, from the third batch for as long as `broken` says."""

    broken = 2

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            bad = 2 <= number < 2 + self.broken
            yield Batch(batch.audio * torch.nan, batch.mask) if bad else batch


def test_a_step_without_finite_gradients_is_skipped_and_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(training.trainer, "WindowLoader", BrokenWindows)
    trainer = run(tmp_path)
    assert trainer.skipped == 2
    assert trainer.skipped_in_a_row == 0
    assert caplog.text.count("was skipped") == 2
    assert [row["skipped_steps"] for row in history(tmp_path)] == [0, 0, 1, 2, 2, 2]
    assert all(value.isfinite().all() for value in trainer.learner.codec.state_dict().values())
    assert all(value.isfinite().all() for value in trainer.learner.average.average.values())


def test_many_skipped_steps_in_a_row_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(training.trainer, "WindowLoader", BrokenWindows)
    monkeypatch.setattr(BrokenWindows, "broken", 100)
    with pytest.raises(FloatingPointError, match=r"the last 3 steps up to 4 .* lower learning rate"):
        run(tmp_path, "--max_skipped_steps=3")


def test_an_exploding_norm_skips_too(tmp_path, fixed_windows):
    trainer = run(tmp_path, "--exploding_norm=1e-12", "--max_skipped_steps=100", steps=3)
    assert trainer.skipped == 3


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.batch_size 4 does not divide over 1 processes with 3"):
        run(tmp_path, "--accumulation_steps=3")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such.yaml"], "There is no recipe no_such.yaml"),
        ([DEBUG, "--data.sources=[{path: no/such/corpus}]"], "no/such/corpus"),
        ([DEBUG, "--accumulation_steps=3"], "does not divide"),
        ([DEBUG, "--model.pretrained=no/such/model"], "no/such/model"),
    ],
)
def test_a_mistake_ends_in_a_sentence(tmp_path, arguments, sentence, monkeypatch):
    from training.__main__ import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["training", *arguments, f"--output_dir={tmp_path}", "--trackers=[]"])
    with pytest.raises(SystemExit, match=sentence):
        main()


# ---- what comes out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = [DEBUG, f"--output_dir={folder}", CLIPS, f"--validation.sources=[{{path: {ROOT / 'tests' / 'data'}}}]"]
    trainer = Trainer(parse([*arguments, "--steps=20", "--validation.every=10", "--checkpoint_every=10"]))
    trainer.train()
    return folder, trainer


def test_the_export_gives_equal_codes_in_stock_and_ours(finished):
    folder, trainer = finished
    stock, report = transformers.MimiModel.from_pretrained(folder / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = MimiModel.from_pretrained(folder / "model").eval()
    audio = torch.stack([window(n)[0] for n in range(4)])
    with torch.no_grad():
        codes = ours.encode(audio).audio_codes
        assert torch.equal(stock.eval().encode(audio).audio_codes, codes)
        assert torch.equal(trainer.learner.averaged().encode(audio).audio_codes, codes)
    assert MimiFeatureExtractor.from_pretrained(folder / "model").sampling_rate == 24_000
    assert not any("parametrizations" in name for name in ours.state_dict())


def test_every_checkpoint_holds_a_model_and_its_recipe(finished):
    folder, _ = finished
    newest = folder / "checkpoints" / "step-00000020"
    MimiModel.from_pretrained(newest / "model")
    assert read_recipe(newest / "config.yaml")["steps"] == 20


def test_a_person_can_judge_the_run(finished):
    folder, _ = finished
    rows = history(folder)
    assert {row["step"] for row in rows if row["kind"] == "validation"} == {10, 20}
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert {"loss/mel", "loss/adversarial", "loss/feature_matching", "loss/commitment", "loss/discriminator"} <= set(
        last
    )
    assert {"gradient_norm/encoder", "gradient_norm/decoder", "gradient_norm/discriminator"} <= set(last)
    assert {"discriminator/accuracy_real", "codebook/perplexity_8", "codebook/usage_1", "learning_rate"} <= set(last)
    assert (folder / "curves.png").stat().st_size > 10_000
    assert list((folder / "validation" / "step-00000020").glob("*.flac"))
    assert list((folder / "validation" / "step-00000020").glob("*.png"))
    assert list(folder.rglob("events.out.tfevents.*"))


def test_the_summary_holds_what_a_card_needs(finished):
    folder, trainer = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["audio_hours"] == pytest.approx(20 * 4 * 0.64 / 3600)
    assert summary["last_validation"]["step"] == 20
    assert summary["best_checkpoint"]["step"] in (10, 20)
    assert summary["parameters"]["codec"] == sum(p.numel() for p in trainer.learner.codec.parameters())
    assert summary["recipe"]["data"]["segment_s"] == 0.64
    assert summary["hardware"]["device"] == "cpu"


def test_it_learns_a_window(tmp_path, monkeypatch):
    """A codec that sees the same chord again and again soon sounds like it."""

    class OneWindow(FixedWindows):
        def __iter__(self):
            audio, mask = window(0)
            while True:
                yield Batch(audio.expand(self.batch_size, 1, -1), mask.expand(self.batch_size, -1))

    monkeypatch.setattr(training.trainer, "WindowLoader", OneWindow)
    weights = "{mel: 2.0, adversarial: 0.0, feature_matching: 0.0, distillation: 0.0}"
    run(tmp_path, f"--objective.weights={weights}", "--optimizer.learning_rate=3e-3", steps=60, every=60)
    mel = [row["loss/mel"] for row in history(tmp_path)]
    assert mel[-1] < 0.4 * mel[0]


# ---- fine-tuning


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, finished):
    return finished[0] / "model"


def test_fine_tuning_the_decoder_keeps_the_codes(tmp_path, pretrained, fixed_windows):
    before = MimiModel.from_pretrained(pretrained).state_dict()
    run(
        tmp_path,
        f"--model.pretrained={pretrained}",
        "--model.config={unquantized_rate: 0.0}",
        "--model.trainable=[decoder]",
        "--objective.weights.commitment=0.0",
    )
    after = MimiModel.from_pretrained(tmp_path / "model").state_dict()
    moved = {
        name.split(".")[0] for name in before if not torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-7)
    }
    assert moved == {"upsample", "decoder", "decoder_transformer"}


def test_fine_tuning_all_parts_moves_all_parts(tmp_path, pretrained, fixed_windows):
    before = MimiModel.from_pretrained(pretrained).state_dict()
    run(tmp_path, f"--model.pretrained={pretrained}", "--model.config={}")
    after = MimiModel.from_pretrained(tmp_path / "model").state_dict()
    moved = {
        name.split(".")[0] for name in before if not torch.allclose(before[name], after[name], rtol=1e-5, atol=1e-7)
    }
    assert moved == {name.split(".")[0] for name in before}


def test_a_stock_directory_can_be_fine_tuned(tmp_path, fixed_windows):
    config = read_recipe(DEBUG)["model"]["config"]
    stock = transformers.MimiModel(transformers.MimiConfig(**{**MimiConfig(**config).to_dict(), "model_type": "mimi"}))
    stock.save_pretrained(tmp_path / "stock")
    trainer = run(tmp_path / "run", f"--model.pretrained={tmp_path / 'stock'}", "--model.config={}", steps=2)
    assert trainer.step == 2
