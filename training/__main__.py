"""Train a Mimi: `accelerate launch -m training training/recipes/<recipe>.yaml [--field=value ...]`.

The same command resumes; `python -m training --help` lists every field.
"""

import logging
import sys

from .config import parse


def main() -> None:
    """Parse, then train."""
    logging.basicConfig(format="%(message)s")
    config = parse(sys.argv[1:])
    from .trainer import Trainer  # after parsing, so that a mistake in a recipe shows at once

    Trainer(config).train()


if __name__ == "__main__":
    main()
