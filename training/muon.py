"""Muon: steps whose matrices are orthogonal, so that every direction of a layer learns at the same speed.

(Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; step sizes as in Liu et al., 2025,
https://arxiv.org/abs/2502.16982. Not in the Moshi paper, which trains with AdamW.) `torch.optim.Muon` takes
matrices only; most of a codec is convolutions.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that takes singular values between 0 and 1 near 1 within five rounds (Jordan)."""
ROUNDS = 5
RMS = 0.2
"""Root mean square of an update, about AdamW's, so learning rates have AdamW's scale (Liu et al., §2.2)."""


def is_matrix(parameter: Tensor) -> bool:
    """Whether it maps several inputs to several outputs: not so biases, norms, magnitudes and depthwise filters."""
    return parameter.dim() > 1 and min(parameter.shape[:2]) > 1


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix (M, N) with its singular values brought to about 1 (0.7 to 1.2), by Newton and Schulz's iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class MuonAdamW(torch.optim.AdamW):
    """Muon in parameter groups marked `"muon": True`, AdamW in the others.

    A convolution's weight (O, I, W) counts as the matrix (O, I x W). Matrices have `muon_momentum` in the place of
    AdamW's moments.
    """

    def __init__(self, groups: list[dict], *, muon_momentum: float = 0.95, **adamw):
        """Groups as for AdamW; `adamw` are its arguments."""
        super().__init__(groups, **adamw)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("muon_momentum", muon_momentum)

    @torch.no_grad()
    def step(self, closure=None):
        """One step of all groups."""
        groups = self.param_groups
        for group in (group for group in groups if group["muon"]):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._muon_step(parameter, parameter.grad, group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _muon_step(self, parameter: Tensor, gradient: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            # AdamW, which restores states, looks for the number of the step
            state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["momentum"].mul_(group["muon_momentum"]).add_(gradient)
        ahead = gradient.add(momentum, alpha=group["muon_momentum"]).flatten(1)  # Nesterov's
        update = orthogonalized(ahead) * (RMS * max(ahead.shape) ** 0.5)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view(parameter.shape), alpha=-group["lr"])
