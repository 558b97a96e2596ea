"""The log of a run that outlives it: `history.jsonl`, one JSON object per line, and JSON files replaced as wholes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Kind = Literal["train", "validation"]
Row = dict[str, Any]


class History:
    """Rows `{"step": 10, "kind": "train", "loss/mel": 0.41, ...}` in `history.jsonl` in a run's folder.

    Floats are written so that they read back bit for bit, and a row never has a time of day in it: two histories are
    equal if the runs were. What is not finite is written as null, which every JSON reader knows.

    Use: `rewind` to the checkpoint's step before a run goes on, then `append`. Reading is safe at any time, from other
    processes too. One process writes.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / "history.jsonl"

    def append(self, step: int, values: Mapping[str, float], kind: Kind = "train") -> None:
        """Add a row and hand it to the operating system; numbers may be of Python, NumPy or PyTorch."""
        line = json.dumps(_plain({"step": step, "kind": kind, **values}), allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:  # opened anew: `rewind` puts another file in its place
            file.write(line + "\n")

    def read(self, kind: Kind | None = None) -> list[Row]:
        """The rows of a kind, or all, in the order written; none if there is no file yet.

        Raises:
            ValueError: a line other than the last is not JSON.
        """
        return [row for _, row in self._lines() if kind is None or row["kind"] == kind]

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, and a last line that was cut off while it was written."""
        if self.path.exists():
            _replace(self.path, "".join(line + "\n" for line, row in self._lines() if row["step"] <= step))

    def _lines(self) -> list[tuple[str, Row]]:
        """Each line as written, and its row."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append((line, json.loads(line)))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise ValueError(f"{self.path}, line {number}, is not JSON: {error}.") from error
        return found


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole: whoever reads it sees the old or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(_plain(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """What JSON knows of it: scalars as Python's, paths as text, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
