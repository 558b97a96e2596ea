"""The running average of a model's weights, which is what is evaluated and published (Moshi §3.3.5)."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential average of a module's parameters and buffers, codebooks included, over all steps so far.

    After `t` updates, the weights of step `s` count by `decay ** (t - s)`, normalised: no start value remains in it.
    Flags, the buffers of one element, are copied.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.total = 0.0
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}
        parameters = {name for name, _ in module.named_parameters()}
        self.flags = {name for name, value in self.average.items() if name not in parameters and value.numel() == 1}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of this step."""
        self.total = 1.0 + self.decay * self.total
        state = module.state_dict()
        names = [name for name in self.average if name not in self.flags]
        averages: list[Tensor] = [self.average[name] for name in names]
        torch._foreach_lerp_(averages, [state[name].detach() for name in names], 1.0 / self.total)
        for name in self.flags:
            self.average[name].copy_(state[name])

    def state_dict(self) -> dict:
        return {"total": self.total, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        if state["average"].keys() != self.average.keys():
            odd = sorted(state["average"].keys() ^ self.average.keys())
            raise ValueError(f"The checkpoint's averaged weights are of another model: {odd[:4]} differ.")
        self.total = state["total"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
