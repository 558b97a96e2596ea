"""Checkpoints that survive a kill at any moment: written under a temporary name, moved into place, pruned."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch


class Checkpoints:
    """The numbered checkpoints of a run: `step-00001000/` and so on, complete or not there at all.

    A checkpoint is one `state.pt` of what all processes share and one `process-<rank>.pt` each.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-????????*"))

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        shared: dict,
        own: dict,
        rank: int,
        wait: Callable[[], None],
        extra: Callable[[Path], None] | None = None,
        best: int | None = None,
    ) -> Path:
        """Write a checkpoint, called by all processes; the first one writes `shared` and what `extra` adds.

        Args:
            step: steps done.
            shared: state that all processes share.
            own: state of this process.
            rank: of this process.
            wait: waits for all processes.
            extra: writes more files into the folder that it is given.
            best: step of the checkpoint that is kept however old.
        """
        temporary = self.folder / ".unfinished"
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        wait()
        _write(own, temporary / f"process-{rank}.pt")
        if rank == 0:
            _write(shared, temporary / "state.pt")
            if extra is not None:
                extra(temporary)
        wait()
        if rank == 0:
            shutil.rmtree(self.path(step), ignore_errors=True)
            temporary.rename(self.path(step))
            _sync(self.folder)
            for old in self.steps()[: -self.keep]:
                if old != best:
                    shutil.rmtree(self.path(old))
        wait()
        return self.path(step)

    def load(self, rank: int) -> tuple[dict, dict] | None:
        """The newest checkpoint's shared state and this process's own; `None` in a new run.

        A process that the run did not have when the checkpoint was written gets the first one's.
        """
        steps = self.steps()
        if not steps:
            return None
        folder = self.path(steps[-1])
        own = folder / f"process-{rank}.pt"
        return _read(folder / "state.pt"), _read(own if own.exists() else folder / "process-0.pt")


def _write(state: dict, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def _sync(folder: Path) -> None:
    """Make the renaming itself last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
