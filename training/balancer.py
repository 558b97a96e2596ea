"""The loss balancer (EnCodec §3.4): each loss gets its weight's share of the gradient at the decoder's output."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Balancer:
    r"""Rescales the gradients of losses with respect to the reconstruction so that weights mean shares.

    With g_i the gradient of loss i, n_i the running mean over clips of its norm per clip, and w_i its weight, the
    balanced gradient is

        G = total_norm * sum_i (w_i / sum_j w_j) * g_i / n_i

    so a clip gets `total_norm` on average, whatever the losses' own scales and the batch size. Norms are averaged
    over clips, accumulation steps and processes, and act one step later: so a batch taken in parts gives exactly the
    gradients of the whole one. In the first step in which a loss appears it is only measured.

    Use: `balance` on each part of a batch, `update` once per step.
    """

    def __init__(self, weights: Mapping[str, float], total_norm: float = 1.0, norm_decay: float = 0.999):
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.total_norm = total_norm
        self.norm_decay = norm_decay
        self.sums = dict.fromkeys(self.weights, 0.0)
        """Decayed sum of each loss's norms."""
        self.counts = dict.fromkeys(self.weights, 0.0)
        """Decayed number of norms in it: their quotient has no start value in it."""
        self.measured: dict[str, list[Tensor]] = {}

    def norms(self) -> dict[str, float]:
        """Running gradient norm per clip of each loss seen so far."""
        return {name: self.sums[name] / count for name, count in self.counts.items() if count > 0}

    def balance(self, losses: Mapping[str, Tensor], reconstruction: Tensor) -> Tensor:
        """The balanced gradient, shaped like `reconstruction` (B, 1, L), of losses that are means over clips.

        Raises:
            KeyError: a loss has no weight here.
        """
        batch_size = reconstruction.shape[0]
        norms = self.norms()
        share = self.total_norm / sum(self.weights[name] for name in losses)
        balanced = torch.zeros_like(reconstruction)
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, reconstruction, retain_graph=True)
            # a mean over clips holds 1 / B of each clip's own gradient
            norm = batch_size * gradient.flatten(1).norm(dim=1).mean()
            self.measured.setdefault(name, []).append(norm.detach().float())
            if name in norms:
                balanced += gradient * (share * self.weights[name] / max(norms[name], 1e-12))
        return balanced

    def update(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Take in the norms of this step; `mean` averages a tensor over processes."""
        if not self.measured:
            return
        names = list(self.measured)
        step = mean(torch.stack([torch.stack(self.measured[name]).mean() for name in names])).tolist()
        for name, norm in zip(names, step, strict=True):
            self.sums[name] = self.norm_decay * self.sums[name] + norm
            self.counts[name] = self.norm_decay * self.counts[name] + 1.0
        self.discard()

    def discard(self) -> None:
        """Forget the norms measured since the last update, those of a step that is skipped."""
        self.measured = {}

    def state_dict(self) -> dict:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict) -> None:
        """Norms of losses that this run does not have are dropped; new ones are measured first."""
        for name in self.weights:
            self.sums[name] = state["sums"].get(name, 0.0)
            self.counts[name] = state["counts"].get(name, 0.0)
