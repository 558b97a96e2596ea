"""The losses of a reconstruction, each a scalar: the mean over clips of each clip's mean over its own time.

`B` clips, `L` samples, `T` frames, `K` codebooks, `Q` width of a codebook entry.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu

from .spectral import masked_mean


def waveform(audio: Tensor, reconstruction: Tensor, mask: Tensor | None = None) -> Tensor:
    """L1 between waves (B, 1, L) (EnCodec §3.4); `mask` (B, L)."""
    return masked_mean((audio - reconstruction).abs().squeeze(1), mask)


def commitment(residuals: Tensor, centroids: Tensor, mask: Tensor | None = None) -> Tensor:
    """MSE between what codebooks were asked and what they answered, (B, K, T, Q), averaged over levels (Moshi §3.3.3).

    As every level counts the same, each branch counts by its number of levels. `mask` (B, T).
    """
    error = (residuals - centroids.detach()).square().mean(dim=(1, 3))
    return masked_mean(error, mask)


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """The discriminator's loss: logits (B, T, F) of real audio are pushed above 1, of fakes below -1.

    Averaged over the sub-discriminators; `masks` (B, T), one for each.
    """
    losses = [
        masked_mean(relu(1 - r), mask) + masked_mean(relu(1 + f), mask)
        for r, f, mask in zip(real, fake, masks, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial(fake: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """The codec's side of the hinge game, -mean(logit), averaged over the sub-discriminators."""
    return -torch.stack([masked_mean(f, mask) for f, mask in zip(fake, masks, strict=True)]).mean()


def feature_matching(
    real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]], masks: Sequence[Tensor | None]
) -> Tensor:
    """L1 between the discriminator's maps (B, C, T, F) of audio and reconstruction (EnCodec §3.4).

    Averaged over the maps of a sub-discriminator, then over the sub-discriminators. No gradient to the real maps.
    """
    scales = []
    for real_maps, fake_maps, mask in zip(real, fake, masks, strict=True):
        distances = [
            masked_mean((f - r.detach()).abs().mean(dim=(1, 3)), mask)
            for r, f in zip(real_maps, fake_maps, strict=True)
        ]
        scales.append(torch.stack(distances).mean())
    return torch.stack(scales).mean()
