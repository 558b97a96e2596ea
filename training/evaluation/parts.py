"""What an evaluation has measured so far, on disk: a row per clip, appended as it comes; nothing is measured twice."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.history import write_summary


class PlanError(ValueError):
    """The folder holds another evaluation; the message says what differs."""


class Parts:
    """The rows of an evaluation in `OUT/parts/`, a file of JSON lines for each process.

    A process appends to its own file; all are read together, so any number of processes can go on.
    A line that a killed process left unfinished is dropped.
    """

    def __init__(self, folder: str | os.PathLike, rank: int = 0):
        self.folder = Path(folder) / "parts"
        self.path = self.folder / f"part-{rank:05d}.jsonl"

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Note what is measured, or check that an earlier run in this folder measured the same.

        Raises:
            PlanError: It did not.
        """
        path = self.folder / "plan.json"
        plan = json.loads(json.dumps(plan))
        if not path.exists():
            write_summary(path, plan)
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in plan.keys() | earlier.keys() if plan.get(key) != earlier.get(key))
        if differing:
            raise PlanError(
                f"{self.folder.parent} holds an evaluation with another {', '.join(differing)}: choose another folder "
                "with --output, or --overwrite it."
            )

    def mend(self) -> None:
        """Drop the unfinished last line of this process's file."""
        if self.path.exists():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if whole != text:
                os.truncate(self.path, len(whole))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a clip's row; NaN is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all processes, one clip once."""
        seen = set()
        for path in sorted(self.folder.glob("part-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for line in file:
                    if not line.endswith("\n"):
                        continue
                    row = json.loads(line)
                    if row["clip"] not in seen:
                        seen.add(row["clip"])
                        yield row
