"""Publishing a run as it goes: each push sees a whole run so far, and none that fails costs a step."""

import logging
import signal
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from fixed_run import FixedWindows, gradient_descent

import training.__main__
import training.learner
import training.push
import training.reporting
import training.trainer
from training.config import PushConfig, parse
from training.push import Push

ROOT = Path(__file__).parents[2]
RUN = [
    str(ROOT / "training" / "recipes" / "debug.yaml"),
    f"--data.sources=[{{path: {ROOT / 'tests' / 'data'}}}]",
    *("--validation.sources=[]", "--trackers=[]", "--checkpoint_every=2", "--output_dir=run"),
    "--objective.weights={mel: 2.0, adversarial: 0.0, feature_matching: 0.0, distillation: 0.0}",
]
PUBLISH = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
assert (folder / "model" / "model.safetensors").exists()
assert (folder / "curves.png").exists()
with open("attempts", "a") as file:
    print(json.loads((folder / "summary.json").read_text())["steps"], *sys.argv[2:], file=file)
if len(Path("attempts").read_text().splitlines()) in FAILING:
    sys.exit("hub_cards: the Hub is on fire")
print("https://hub/me/mimi")
"""


@pytest.fixture
def pushes(tmp_path, monkeypatch):
    """Train in a folder of its own, with a command in the place of the real one; gives what that was asked for."""

    def train(*overrides: str, failing: tuple[int, ...] = ()) -> list[str]:
        (tmp_path / "command.py").write_text(PUBLISH.replace("FAILING", str(failing)))
        monkeypatch.setattr(sys, "argv", ["training", *RUN, *overrides])
        training.__main__.main()
        attempts = tmp_path / "attempts"
        return attempts.read_text().splitlines() if attempts.exists() else []

    def offer(self, step, write, offer=Push.offer):  # not to depend on how fast a process starts
        if self.process is not None:
            self.process.wait()
        offer(self, step, write)

    def write(self, write=training.trainer.Trainer._write_results):
        assert self.push is None or self.push.process is None, "a push reads what is written now"
        write(self)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Push, "offer", offer)
    monkeypatch.setattr(training.trainer.Trainer, "_write_results", write)
    monkeypatch.setattr(training.push, "COMMAND", [sys.executable, str(tmp_path / "command.py")])
    monkeypatch.setattr(training.trainer, "WindowLoader", FixedWindows)
    monkeypatch.setattr(training.reporting, "curves", lambda rows, path: path.touch())  # it takes its time
    monkeypatch.setattr(training.learner, "build_optimizer", gradient_descent)
    yield train
    AcceleratorState._reset_state(reset_partial_state=True)


def test_it_pushes_every_so_often_and_at_the_end_and_again_what_failed(pushes, tmp_path, caplog):
    options = ("--push.repo=me/mimi", "--push.private=true", "--push.revision=small")
    asked = pushes("--steps=10", "--push.every=4", *options, failing=(1, 4))
    where = "me/mimi --revision small --private"
    assert asked == [f"{step} {where}" for step in (4, 6, 8, 10)]  # 6, for the push of 4 failed
    told = [record.message for record in caplog.records if record.name == "training.push"]
    assert [message.split(":")[0] for message in told] == [
        "Step 4 was not published",
        "Step 6 is published",
        "Step 8 is published",
        "Step 10 was not published",
    ]
    assert "the Hub is on fire. By hand: python" in told[-1]
    assert "https://hub/me/mimi" in told[1]
    assert (tmp_path / "run" / "checkpoints" / "step-00000010").exists()
    assert pushes("--steps=10", "--push.every=4", *options)[-1] == f"10 {where}"  # the run is over, the push was not


def test_by_default_it_pushes_nothing_and_with_a_repository_at_the_end(pushes, tmp_path):
    assert pushes("--steps=4") == []
    assert not (tmp_path / "run" / "push.log").exists()
    assert pushes("--steps=4", "--push.repo=me/mimi") == ["4 me/mimi --revision main"]


def test_a_run_that_is_stopped_leaves_no_push_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(training.push, "COMMAND", [sys.executable, "-c", "import time; time.sleep(600)"])
    push = Push(PushConfig("me/mimi", every=1), tmp_path)
    push.offer(1, lambda: None)
    process = push.process
    start = time.monotonic()
    push.offer(2, lambda: pytest.fail("one is going on"))
    push.stop()
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - start < 60


def test_a_command_that_cannot_start_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(training.push, "COMMAND", [str(tmp_path / "nothing")])
    with caplog.at_level(logging.WARNING):
        Push(PushConfig("me/mimi"), tmp_path).finish(3)
    assert "Step 3 was not published" in caplog.text


@pytest.mark.parametrize("option", ["--push.repo=mimi", "--push.every=0"])
def test_a_push_that_cannot_be_is_named_at_once(option):
    with pytest.raises(SystemExit, match=option[2:].split("=")[0]):
        parse([*RUN, option])
