"""Train a Mimi: `accelerate launch -m training training/recipes/<recipe>.yaml [--field=value ...]`.

The same command resumes; `python -m training --help` lists every field.
"""

import logging
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from .config import RecipeError, parse


def main() -> None:
    """Parse, train, publish."""
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # the run has its own
    config = parse(sys.argv[1:])
    from .data import DataError  # after parsing, so that a mistake in a recipe shows at once
    from .push import Push
    from .trainer import Trainer

    push = Push(config.push, Path(config.output_dir)) if config.push.repo else None
    try:
        trainer = Trainer(config, push)
        trainer.train()
        if push is not None and trainer.accelerator.is_main_process and trainer.step == config.steps:
            push.finish(trainer.step)
    except (RecipeError, DataError, FloatingPointError, OSError) as error:
        sys.exit(str(error))
    finally:
        if push is not None:
            push.stop()


if __name__ == "__main__":
    main()
