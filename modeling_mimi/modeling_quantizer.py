# Copyright 2026 The open Mimi contributors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Split residual vector quantization (Moshi §3.3.3): a semantic codebook beside a stack of acoustic ones, outputs summed.

The quantizer lives in float32, whatever the model is cast to: the search compares distances that bfloat16 cannot tell
apart. Its forward writes nothing; it returns what a codebook update needs. Nothing is cached, so nothing goes stale:
the centroids are computed from the buffers when a search begins, and a stream holds them for as long as it lives.

`B` batch, `T` frames, `D` width of the latents, `Q` width of a codebook entry, `K` codebooks, `N` entries.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, auto_docstring
from transformers.utils.generic import maybe_autocast

from .configuration_mimi import MimiConfig
from .modeling_kernels import linear


class SearchTable(NamedTuple):
    """A codebook ready to be searched: `centroids` (N, Q) and `offsets` (N,), half their squared norms, negated."""

    centroids: Tensor
    offsets: Tensor


@auto_docstring
@dataclass
class MimiQuantizerOutput(ModelOutput):
    r"""
    audio_codes (`torch.LongTensor` of shape `(batch_size, num_quantizers, num_frames)`):
        Codes, semantic first.
    quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, hidden_size)`):
        What the decoder gets: both branches, projected back and summed. Straight-through: its gradient reaches the
        latents as if nothing had been quantized.
    semantic_quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, codebook_dim)`):
        The semantic branch before its output projection, always quantized, straight-through.
    acoustic_quantized (`torch.FloatTensor` of shape `(batch_size, num_frames, codebook_dim)`, *optional*):
        The acoustic branch likewise; `None` when only semantic codebooks are used.
    residuals (`torch.FloatTensor` of shape `(batch_size, num_quantizers, num_frames, codebook_dim)`):
        What each codebook was asked to quantize, with gradient.
    centroids (`torch.FloatTensor` of shape `(batch_size, num_quantizers, num_frames, codebook_dim)`):
        What it answered, without gradient.
    """

    audio_codes: Tensor | None = None
    quantized: Tensor | None = None
    semantic_quantized: Tensor | None = None
    acoustic_quantized: Tensor | None = None
    residuals: Tensor | None = None
    centroids: Tensor | None = None


class MimiCodebook(nn.Module):
    """A codebook as its running sums: entry `n` is `embed_sum[n] / cluster_usage[n]`."""

    def __init__(self, config: MimiConfig, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon = epsilon
        self.initialized = nn.Buffer(torch.ones(1))
        self.cluster_usage = nn.Buffer(torch.ones(config.codebook_size))
        self.embed_sum = nn.Buffer(torch.zeros(config.codebook_size, config.codebook_dim))

    @property
    def centroids(self) -> Tensor:
        """The entries, (N, Q)."""
        return self.embed_sum / self.cluster_usage.clamp(min=self.epsilon)[:, None]

    def search_table(self) -> SearchTable:
        """The entries with what their distance to any vector needs."""
        centroids = self.centroids
        return SearchTable(centroids, -0.5 * centroids.square().sum(-1))

    def decode(self, codes: Tensor) -> Tensor:
        """Entries of the given codes: (B, T) to (B, T, Q). Only the entries asked for are computed."""
        usage = self.cluster_usage[codes].clamp(min=self.epsilon)
        return nn.functional.embedding(codes, self.embed_sum) / usage.unsqueeze(-1)


def nearest(x: Tensor, table: SearchTable) -> Tensor:
    """
    Codes of the nearest entries, (..., Q) to (...).

    |x - c|^2 / 2 is |x|^2 / 2 - (x . c - |c|^2 / 2), and |x| is the same for all entries: one product finds the
    nearest.
    """
    return linear(x, table.centroids, table.offsets).argmax(dim=-1)


class MimiVectorQuantization(nn.Module):
    """One level. A module of its own because the files say `layers.0.codebook`."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.codebook = MimiCodebook(config)


class MimiResidualVectorQuantizer(nn.Module):
    """One branch: a projection to `codebook_dim`, codebooks that each quantize what the last one left, and back."""

    def __init__(self, config: MimiConfig, num_quantizers: int):
        super().__init__()
        self.layers: Any = nn.ModuleList([MimiVectorQuantization(config) for _ in range(num_quantizers)])
        width, inner = config.hidden_size, config.vector_quantization_hidden_dimension
        self.input_proj = nn.Conv1d(width, inner, 1, bias=False) if inner != width else None
        self.output_proj = nn.Conv1d(inner, width, 1, bias=False) if inner != width else None

    def project_in(self, latents: Tensor) -> Tensor:
        """(B, T, D) to (B, T, Q)."""
        return latents if self.input_proj is None else linear(latents, self.input_proj.weight.squeeze(-1))

    def project_out(self, quantized: Tensor) -> Tensor:
        """(B, T, Q) to (B, T, D)."""
        return quantized if self.output_proj is None else linear(quantized, self.output_proj.weight.squeeze(-1))

    def quantize(self, x: Tensor, tables: list[SearchTable]) -> tuple[Tensor, Tensor, Tensor]:
        """
        Quantize (B, T, Q) with the given codebooks, each taking what the last one left.

        Returns the codes (B, K, T), and each codebook's residual and chosen entry, (B, K, T, Q).
        """
        codes, residuals, centroids = [], [], []
        for table in tables:
            codes.append(nearest(x.detach(), table))
            residuals.append(x)
            centroids.append(nn.functional.embedding(codes[-1], table.centroids))
            x = x - centroids[-1]
        return torch.stack(codes, dim=1), torch.stack(residuals, dim=1), torch.stack(centroids, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, K, T) to (B, T, D)."""
        entries = [layer.codebook.decode(level) for layer, level in zip(self.layers, codes.unbind(1), strict=False)]
        return self.project_out(sum(entries[1:], entries[0]))


class MimiSplitResidualVectorQuantizer(nn.Module):
    """The semantic and the acoustic branch, side by side on the same latents."""

    def __init__(self, config: MimiConfig):
        super().__init__()
        self.config = config
        self.num_semantic_quantizers = config.num_semantic_quantizers
        self.num_quantizers = config.num_quantizers
        self.semantic_residual_vector_quantizer = MimiResidualVectorQuantizer(config, config.num_semantic_quantizers)
        self.acoustic_residual_vector_quantizer = MimiResidualVectorQuantizer(
            config, config.num_quantizers - config.num_semantic_quantizers
        )

    def _apply(self, fn, recurse=True):
        """Follow the model to another device, but stay in float32."""

        def keep_float32(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def search_tables(self, num_quantizers: int | None = None) -> list[SearchTable]:
        """The first `num_quantizers` codebooks (all if not given), semantic first, ready to be searched."""
        semantic, acoustic = self.semantic_residual_vector_quantizer, self.acoustic_residual_vector_quantizer
        layers = [*semantic.layers, *acoustic.layers][: self.check_num_quantizers(num_quantizers)]
        return [layer.codebook.search_table() for layer in layers]

    def check_num_quantizers(self, num_quantizers: int | None) -> int:
        """The number asked for, all if `None`; `ValueError` if this quantizer cannot give it."""
        if num_quantizers is None:
            return self.num_quantizers
        least = self.config.least_quantizers
        if not least <= num_quantizers <= self.num_quantizers:
            raise ValueError(
                f"`num_quantizers` must be from {least} to {self.num_quantizers}, "
                f"the codebooks of this model, got {num_quantizers}."
            )
        return num_quantizers

    def forward(
        self, latents: Tensor, tables: list[SearchTable] | None = None, unquantized: Tensor | None = None
    ) -> MimiQuantizerOutput:
        r"""
        Quantize latents; nothing is written.

        Args:
            latents (`torch.FloatTensor` of shape `(batch_size, num_frames, hidden_size)`):
                Latents before quantization.
            tables (`list[SearchTable]`, *optional*):
                The codebooks to use, from [`search_tables`]; all of them if not given.
            unquantized (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
                Sequences whose `quantized` is the projected latent itself (Moshi §3.3.3: half of them while training).
        """
        tables = self.search_tables() if tables is None else tables
        with maybe_autocast(latents.device.type, enabled=False):
            outputs, vectors, levels = [], [], []
            for branch, projected, branch_tables in self._branches(latents, tables):
                levels.append(branch.quantize(projected, branch_tables))
                vectors.append(projected + (levels[-1][2].sum(1) - projected).detach())  # straight-through
                chosen = vectors[-1]
                if unquantized is not None:
                    chosen = torch.where(unquantized.view(-1, 1, 1), projected, chosen)
                outputs.append(branch.project_out(chosen))
            quantized = sum(outputs[1:], outputs[0])
        codes, residuals, centroids = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return MimiQuantizerOutput(
            audio_codes=codes,
            quantized=quantized,
            semantic_quantized=vectors[0],
            acoustic_quantized=vectors[1] if len(vectors) > 1 else None,
            residuals=residuals,
            centroids=centroids,
        )

    def encode(self, latents: Tensor, tables: list[SearchTable]) -> Tensor:
        """The codes of [`forward`], without what only training and `quantized` need: (B, T, D) to (B, K, T)."""
        with maybe_autocast(latents.device.type, enabled=False):
            levels = [
                branch.quantize(projected, branch_tables)[0]
                for branch, projected, branch_tables in self._branches(latents, tables)
            ]
        return torch.cat(levels, dim=1)

    def _branches(
        self, latents: Tensor, tables: list[SearchTable]
    ) -> list[tuple[MimiResidualVectorQuantizer, Tensor, list[SearchTable]]]:
        """Each branch that these codebooks reach, with the latents projected for it, (B, T, Q), and its codebooks."""
        split = self.num_semantic_quantizers
        parts = (
            (self.semantic_residual_vector_quantizer, tables[:split]),
            (self.acoustic_residual_vector_quantizer, tables[split:]),
        )
        return [(branch, branch.project_in(latents.float()), own) for branch, own in parts if own]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes of the first `K` codebooks, (B, K, T), to float32 latents (B, T, D)."""
        split = self.num_semantic_quantizers
        with maybe_autocast(codes.device.type, enabled=False):
            quantized = self.semantic_residual_vector_quantizer.decode(codes[:, :split])
            if codes.shape[1] > split:
                quantized = quantized + self.acoustic_residual_vector_quantizer.decode(codes[:, split:])
        return quantized
