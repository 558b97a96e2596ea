"""Train a Mimi: `accelerate launch -m training training/recipes/<recipe>.yaml [--field=value ...]`.

The same command resumes; `python -m training --help` lists every field.
"""

import logging
import sys

from transformers.utils.logging import disable_progress_bar

from .config import RecipeError, parse


def main() -> None:
    """Parse, then train."""
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # the run has its own
    config = parse(sys.argv[1:])
    from .data import DataError  # after parsing, so that a mistake in a recipe shows at once
    from .trainer import Trainer

    try:
        Trainer(config).train()
    except (RecipeError, DataError, FloatingPointError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
