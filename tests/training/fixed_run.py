"""The trainer on batches that do not depend on how many processes share them.

`python tests/training/fixed_run.py RECIPE [--field=value ...]`, or the same below a launcher.
"""

import sys

import torch

import training.learner
import training.trainer
from training.config import parse
from training.data import Batch

SAMPLES = 15_360


class FixedWindows:
    """Stands in for `WindowLoader`: step by step the same joined batch, of which each process takes its rows."""

    def __init__(self, config, sampling_rate, batch_size, seed=0, rank=0, world_size=1):
        self.rows = config.batch_size
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.given = 0

    def __iter__(self):
        while True:
            # parts of a step come one after the other, each with all processes' rows side by side
            first = self.given * self.batch_size * self.world_size + self.rank * self.batch_size
            self.given += 1
            audio, masks = zip(*map(window, range(first, first + self.batch_size)), strict=True)
            yield Batch(torch.stack(audio), torch.stack(masks))

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]

    def report(self):
        return {"wait_s": 0.0}

    def close(self):
        pass


def window(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A chord of its own, every third one shorter than the window."""
    generator = torch.Generator().manual_seed(number)
    time = torch.arange(SAMPLES) / 24_000
    pitches = 80 + 1000 * torch.rand(5, 1, generator=generator)
    audio = 0.1 * torch.sin(2 * torch.pi * pitches * time).sum(0) + 0.01 * torch.randn(SAMPLES, generator=generator)
    mask = torch.arange(SAMPLES) < (SAMPLES * 2 // 3 if number % 3 == 2 else SAMPLES)
    return (audio * mask).unsqueeze(0), mask


def gradient_descent(modules, config) -> torch.optim.Optimizer:
    """Moves in proportion to gradients: Adam would blow their rounding errors up wherever they are nearly zero."""
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=config.learning_rate)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    training.trainer.WindowLoader = FixedWindows
    training.learner.build_optimizer = gradient_descent
    training.trainer.Trainer(parse(arguments)).train()


if __name__ == "__main__":
    main(sys.argv[1:])
