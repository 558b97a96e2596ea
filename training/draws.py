"""The randomness of a step: a function of seed and step alone, so that there is none to restore."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling_mimi import MimiConfig


@dataclass(frozen=True)
class Draws:
    """What one step draws, the same on all of `W` processes; `A` parts of a step, `B` clips of a part."""

    num_quantizers: int
    """Codebooks that the step uses."""
    unquantized: Tensor
    """(A, W, B): clips whose decoder gets unquantized latents."""
    crop: Tensor
    """(A, W, B) in [0, 1): place of the discriminator's crop."""
    generator: torch.Generator
    """For draws of the codebooks."""


def draw(codec: MimiConfig, seed: int, step: int, shape: tuple[int, int, int], ready: int) -> Draws:
    """Draw for a step of `shape` (A, W, B); `ready` codebooks have entries, or get them in this step.

    Quantizer dropout keeps the semantic levels and at least one acoustic one, the same on all processes. Where all
    levels are semantic, as in the ablations without a split, it keeps at least one of them.
    """
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    levels, semantic = codec.num_quantizers, codec.num_semantic_quantizers
    num_quantizers = levels
    if codec.quantizer_dropout:
        lowest = codec.least_quantizers + (semantic < levels)
        num_quantizers = int(torch.randint(lowest, levels + 1, (), generator=generator))
    unquantized = torch.rand(shape, generator=generator) < codec.unquantized_rate
    return Draws(min(num_quantizers, ready), unquantized, torch.rand(shape, generator=generator), generator)


def step_seed(seed: int, step: int) -> int:
    """A seed for a step, far from those of its neighbours."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
