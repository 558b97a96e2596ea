"""How codebooks follow the latents: running means, k-means at first, dead entries replaced (Moshi §3.3.3).

The quantizer's forward writes nothing. Its answers are collected here over the parts of a step and over processes, and
its buffers are written once per step, by all processes alike: sums go through one collective, and draws come from a
generator that is the same everywhere.

`A` parts of a step, `W` processes, `B` clips, `T` frames, `K` codebooks in use, `N` entries, `Q` width of an entry.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling_mimi.modeling_quantizer import MimiCodebook, MimiSplitResidualVectorQuantizer

from .config import CodebookConfig


class CodebookTrainer:
    """Writes the buffers of a quantizer.

    Use: `observe` each part of a step, then `update`; before it, while a level is not initialised, `observe` and
    `initialize`.
    """

    def __init__(
        self,
        quantizer: MimiSplitResidualVectorQuantizer,
        config: CodebookConfig,
        rank: int = 0,
        world_size: int = 1,
        total: Callable[[Tensor], Tensor] = lambda x: x,
        gather: Callable[[Tensor], Tensor] = lambda x: x,
    ):
        """`total` sums a tensor over processes; `gather` joins theirs along the first axis, in the order of ranks."""
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.total = total
        self.gather = gather
        semantic, acoustic = quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer
        self.branches: list[list[MimiCodebook]] = [
            [layer.codebook for layer in branch.layers] for branch in (semantic, acoustic)
        ]
        self.codebooks = [codebook for branch in self.branches for codebook in branch]
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read from the buffers which levels are initialised; after a checkpoint was loaded into them."""
        self.initialized = [bool(codebook.initialized) for codebook in self.codebooks]

    def restart(self) -> None:
        """Forget the entries of a fresh model: each level will be initialised from a batch."""
        for codebook in self.codebooks:
            codebook.initialized.zero_()
        self.refresh()

    @property
    def ready(self) -> int:
        """How many codebooks a step may use: a level joins once the one before it is initialised."""
        semantic, acoustic = (len(branch) for branch in self.branches)
        done = sum(self.initialized[semantic:] if acoustic else self.initialized)
        return semantic + min(done + 1, acoustic) if acoustic else min(done + 1, semantic)

    def observe(self, codes: Tensor, residuals: Tensor, mask: Tensor) -> None:
        """Note a part's codes (B, K, T), what they stand for (B, K, T, Q), and which frames count (B, T)."""
        self.parts.append((codes.detach(), residuals.detach().float(), mask))

    def discard(self) -> None:
        """Forget what was observed since the last update, in a step that is skipped."""
        self.parts = []

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Start the next level of each branch, if it has not, from what was observed: the k-means of its residuals.

        One level per branch at a time, because the residuals of the next are only known once this one answers.
        """
        codes, residuals, mask = self._taken()
        positions = self._positions(mask)
        for level in self._next_uninitialized(codes.shape[2]):
            vectors = self.total(self._own(residuals[:, :, level], positions))
            if not vectors.isfinite().all():
                return  # a step that will be skipped; the next one may do
            self._start(self.codebooks[level], vectors, generator)
            self.initialized[level] = True

    @torch.no_grad()
    def update(self, step: int, generator: torch.Generator) -> int:
        """Write the codebooks after a step; returns how many dead entries were replaced.

        Args:
            step: number of the step, from 0: dead entries are looked for every `dead_check_every` steps.
            generator: on the CPU, in the same state on all processes.
        """
        codes, residuals, mask = self._taken()
        levels, entries = codes.shape[2], self.codebooks[0].embed_sum.shape[0]
        picks = None
        if step % self.config.dead_check_every == self.config.dead_check_every - 1:
            positions = self._positions(mask)
            if len(positions):
                draws = torch.randint(len(positions), (levels, entries), generator=generator)
                picks = positions[draws.to(positions.device)]
        counts, sums, candidates = self._statistics(codes, residuals, mask, picks)
        replaced = torch.zeros((), dtype=torch.int64, device=mask.device)
        for level, codebook in enumerate(self.codebooks[:levels]):
            codebook.cluster_usage.lerp_(counts[level], 1 - self.config.codebook_decay)
            codebook.embed_sum.lerp_(sums[level], 1 - self.config.codebook_decay)
            if candidates is not None:
                replaced += self._replace_dead(codebook, candidates[level])
        return int(replaced)

    def _taken(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (A, B, K, T), residuals (A, B, K, T, Q) and mask (A, B, T) observed since the last time."""
        codes, residuals, mask = (torch.stack(part) for part in zip(*self.parts, strict=True))
        self.parts = []
        return codes, residuals, mask

    def _next_uninitialized(self, num_quantizers: int) -> set[int]:
        """The first uninitialised level of each branch, among those in use."""
        levels, start = set(), 0
        for branch in self.branches:
            missing = [i for i in range(start, start + len(branch)) if not self.initialized[i]]
            levels |= {i for i in missing[:1] if i < num_quantizers}
            start += len(branch)
        return levels

    def _statistics(
        self, codes: Tensor, residuals: Tensor, mask: Tensor, picks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Counts (K, N) and sums (K, N, Q) per entry and the vectors picked (K, N, Q), in one collective."""
        levels, (entries, width) = codes.shape[2], self.codebooks[0].embed_sum.shape
        inside = mask.flatten()
        sums = residuals.new_zeros(levels, entries, width + 1)
        for level in range(levels):
            vectors = residuals[:, :, level].flatten(0, 2)[inside]
            ones = vectors.new_ones(len(vectors), 1)
            sums[level].index_add_(0, codes[:, :, level].flatten()[inside], torch.cat([vectors, ones], dim=1))
        flat = [sums.flatten()]
        if picks is not None:
            flat += [self._own(residuals[:, :, level], picks[level]).flatten() for level in range(levels)]
        flat = self.total(torch.cat(flat))
        sums = flat[: sums.numel()].view_as(sums)
        candidates = None if picks is None else flat[sums.numel() :].view(levels, entries, width)
        return sums[..., width], sums[..., :width], candidates

    def _positions(self, mask: Tensor) -> Tensor:
        """Positions in the joined batch, (A, W, B, T) in a row, of all frames that count; (n,)."""
        joined = self.gather(mask.unsqueeze(0)).transpose(0, 1)
        return joined.flatten().nonzero().squeeze(1)

    def _own(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """Vectors at positions of the joined batch, (n, Q), zero where another process has them.

        `vectors` are this process's, (A, B, T, Q).
        """
        parts, per_part = vectors.shape[0], vectors.shape[1] * vectors.shape[2]
        part, process = positions // (self.world_size * per_part), positions // per_part % self.world_size
        place = positions % per_part
        chosen = vectors.reshape(parts * per_part, -1)[part * per_part + place]
        return torch.where((process == self.rank).unsqueeze(1), chosen, 0)

    def _start(self, codebook: MimiCodebook, vectors: Tensor, generator: torch.Generator) -> None:
        """Entries are the k-means of `vectors`; one that attracts none is soon replaced."""
        centroids, counts = kmeans(vectors, len(codebook.embed_sum), self.config.kmeans_iterations, generator)
        usage = counts.clamp(min=self.config.dead_threshold * float(counts.mean()))
        codebook.cluster_usage.copy_(usage)
        codebook.embed_sum.copy_(centroids * usage[:, None])
        codebook.initialized.fill_(1)

    def _replace_dead(self, codebook: MimiCodebook, candidates: Tensor) -> Tensor:
        """Dead entries start again on vectors of the batch, with the mean usage: sum and usage both, so it lasts."""
        usage = codebook.cluster_usage
        mean = usage.mean()
        dead = usage < self.config.dead_threshold * mean
        codebook.embed_sum.copy_(torch.where(dead[:, None], candidates * mean, codebook.embed_sum))
        codebook.cluster_usage.copy_(torch.where(dead, mean, usage))
        return dead.sum()

    @torch.no_grad()
    def statistics(self) -> dict[str, list[float]]:
        """Per level, of the running usage: perplexity, and the share of entries above the threshold of death."""
        shares = torch.stack([codebook.cluster_usage for codebook in self.codebooks])
        shares = shares / shares.sum(dim=1, keepdim=True)
        perplexity = torch.special.entr(shares).sum(1).exp()
        used = (shares * shares.shape[1] > self.config.dead_threshold).float().mean(1)
        return {"perplexity": perplexity.tolist(), "usage": used.tolist()}


def kmeans(vectors: Tensor, entries: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from random vectors; centroids (N, Q) and how many vectors (n, Q) each has, (N,).

    With fewer vectors than entries some begin twice; an entry without vectors stays where it is.
    """
    n = len(vectors)
    if n == 0:
        raise ValueError("No frame of the batch is audio: the codebooks cannot be initialised from it.")
    chosen = torch.randperm(n, generator=generator)[:entries]
    if n < entries:
        chosen = torch.cat([chosen, torch.randint(n, (entries - n,), generator=generator)])
    centroids = vectors[chosen.to(vectors.device)]
    counts = vectors.new_zeros(entries)
    for _ in range(max(iterations, 1)):
        nearest = (vectors @ centroids.T - 0.5 * centroids.square().sum(1)).argmax(1)
        counts = torch.bincount(nearest, minlength=entries).to(vectors.dtype)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    return centroids, counts
