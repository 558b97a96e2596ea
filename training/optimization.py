"""Which parameters move how, at a learning rate that is a function of the step (Moshi §3.3.5)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import OptimizerConfig
from .muon import MuonAdamW, is_matrix


def build_optimizer(modules: Iterable[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of the parameters of `modules` that train.

    Only weights of a transformer decay: matrices below a module named `*transformer`, neither norms nor scales.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                decays = "transformer." in name and parameter.dim() > 1
                kind = (config.algorithm == "muon" and is_matrix(parameter), decays)
                groups.setdefault(kind, []).append(parameter)
    listed = [
        {"params": groups[kind], "weight_decay": config.weight_decay if kind[1] else 0.0, "muon": kind[0]}
        for kind in ((False, True), (False, False), (True, True), (True, False))
        if kind in groups
    ]
    optimizer = MuonAdamW if config.algorithm == "muon" else torch.optim.AdamW
    return optimizer(listed, lr=config.learning_rate, betas=config.betas)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of a step, from 0, in a run of so many: linear warm-up, then constant or a cosine to the final rate.

    A function of the step alone, so there is no schedule to restore, and a longer run may go on from a shorter one.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    fall = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + fall * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use a rate in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device | str = "cpu") -> Tensor:
    """Norm of all gradients together, a scalar on the device; 0 where there are none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).norm()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)
