"""Running means between two log entries, kept on the device so that no step waits for them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Meters:
    """Means by name over the steps since the last `take`. Use: `add` within a step, then `commit` or `discard`."""

    def __init__(self):
        self.pending: list[tuple[str, Tensor | float]] = []
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Note scalars of the step."""
        self.pending.extend(values.items())

    def commit(self) -> None:
        """The step counts."""
        for name, value in self.pending:
            value = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        self.pending = []

    def discard(self) -> None:
        """The step was skipped: what it noted would make every mean NaN."""
        self.pending = []

    def take(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means, over processes too by `mean`, and start again. All processes have noted the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        values = mean(torch.stack([self.sums[name].cpu() / self.counts[name] for name in names]))
        self.sums, self.counts = {}, {}
        return dict(zip(names, values.tolist(), strict=True))

    def state_dict(self) -> dict:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
