"""`mimi tokenize` in small steps, killed at the worst moment: errors written, and the shard not yet by its name.

`python tests/corpus/killed_run.py SHARDS ARGUMENT...`, where SHARDS is how many shards it may finish.
"""

import os
import signal
import sys
from pathlib import Path

from modeling_mimi.cli import main
from training.corpus import shards, tokenize

finished = 0
replace = Path.replace


def take_small_steps() -> None:
    """Windows of 0.3 s, a shard for each, and long clips from half a second on."""
    tokenize.WINDOW_S, tokenize.WINDOW_BATCHES, tokenize.LONG_S, shards.SAVE_EVERY_S = 0.3, 0, 0.5, 0.0


def replace_or_die(self: Path, target: Path) -> Path:
    global finished
    if Path(target).suffix == ".parquet":
        if finished == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        finished += 1
    return replace(self, target)


if __name__ == "__main__":
    take_small_steps()
    Path.replace = replace_or_die
    sys.exit(main(sys.argv[2:]))
