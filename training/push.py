"""Publishing a run as it goes: `python -m hub_cards publish` beside it, so that a slow Hub holds up no step."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .config import PushConfig

logger = logging.getLogger(__name__)

COMMAND = [sys.executable, "-m", "hub_cards", "publish"]


class Push:
    """What the first process of a run calls after its checkpoints and at its end. Nothing that fails here raises.

    `push.log` in the run's folder has what the newest attempt said.

    Args:
        config: where to, and how often.
        folder: the run's, which holds what is published.
    """

    def __init__(self, config: PushConfig, folder: Path):
        self.every = config.every
        self.folder = folder
        self.command = [*COMMAND, str(folder), str(config.repo)]
        self.command += ["--revision", config.revision, *(["--private"] if config.private else [])]
        self.process: subprocess.Popen | None = None
        self.step = self.pushed = 0

    def offer(self, step: int, write: Callable[[], None]) -> None:
        """Start a push if one is due and none is going on; one that failed is due until it succeeds.

        Args:
            step: steps done.
            write: writes what is published into the run's folder.
        """
        if self.process is not None and self.process.poll() is not None:
            self.wait()
        if self.process is None and self.every and step // self.every > self.pushed // self.every:
            write()
            self._start(step)

    def finish(self, step: int) -> None:
        """Push what the run has written at its end, and wait for that."""
        self.wait()
        self._start(step)
        self.wait()

    def wait(self) -> None:
        """Wait for the push that is going on, and say how it went."""
        if self.process is None:
            return
        failed, self.process = self.process.wait() != 0, None
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        if failed:
            again = " ".join(self.command[1:])
            logger.warning("Step %d was not published: %s. By hand: python %s", self.step, said, again)
        else:
            self.pushed = self.step
            logger.warning("Step %d is published: %s", self.step, said)

    def stop(self) -> None:
        """End the push that is going on: what it has not committed shows nowhere, and the next one goes on with it."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    @property
    def log(self) -> Path:
        """What the newest attempt said."""
        return self.folder / "push.log"

    def _start(self, step: int) -> None:
        self.step = step
        try:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                    start_new_session=True,  # Ctrl-C is for the run, which then stops this
                )
        except OSError as error:
            logger.warning("Step %d was not published: %s", step, error)
