"""What a codec does to held-out speech: quality of its reconstructions and use of its codebooks.

`B` clips, `L` samples, `K` codebooks of `N` entries, `T` frames.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from pystoi import stoi
from torch import Tensor
from tqdm import tqdm

from modeling_mimi import MimiModel

SCORES = ("si_sdr", "mel_distance", "stoi")
LIMIT_DB = 100.0
"""SI-SDR stays within this, in dB to either side."""
SHORTEST_STOI_S = 0.4
"""STOI compares stretches of 384 ms of speech; shorter clips have none."""


def si_sdr(audio: Tensor, reconstruction: Tensor) -> Tensor:
    r"""Scale-invariant signal-to-distortion ratio of waves (..., L), in dB, shaped (...); higher is better.

    With both waves' means taken off, the reconstruction is split into its projection on the audio and the rest:

        target = audio * <reconstruction, audio> / |audio|^2
        SI-SDR = 10 log10(|target|^2 / |reconstruction - target|^2)

    Computed in float64 and kept within -100 to 100 dB, so an exact copy, at any loudness, scores 100. Where nothing of
    the audio can be found, it scores -100: silence on either side too. (Le Roux et al. 2019, arXiv 1811.02508.)
    """
    audio = audio.double() - audio.double().mean(-1, keepdim=True)
    reconstruction = reconstruction.double() - reconstruction.double().mean(-1, keepdim=True)
    tiny = torch.finfo(torch.float64).tiny
    energy = audio.square().sum(-1, keepdim=True).clamp(min=tiny)
    target = audio * ((reconstruction * audio).sum(-1, keepdim=True) / energy)
    distortion = (reconstruction - target).square().sum(-1).clamp(min=tiny)
    return (10 * torch.log10(target.square().sum(-1) / distortion)).clamp(-LIMIT_DB, LIMIT_DB)


def intelligibility(audio: Tensor, reconstruction: Tensor, sampling_rate: int) -> float:
    """STOI of waves (L,), at most 1, higher is better (Taal et al. 2011); NaN with less than 0.4 s of speech."""
    if audio.shape[-1] < SHORTEST_STOI_S * sampling_rate or _is_silent(audio):
        return math.nan
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(stoi(audio.double().numpy(), reconstruction.double().numpy(), sampling_rate))
        except RuntimeWarning:
            return math.nan


@dataclass(frozen=True)
class Validation:
    """What was measured on some clips: raw, so that parts measured by several processes merge into the whole."""

    per_clip: list[dict[str, Any]]
    """Per clip its `name`, length in `seconds`, and scores; NaN where a score is undefined for the clip."""
    counts: Tensor
    """(K, N), int64: how often each entry of each codebook was chosen."""
    reconstructions: dict[str, Tensor]
    """Name to wave (L,), float32 on the CPU, of the first `examples` clips."""
    examples: int = 0
    """Number of clips whose reconstructions are kept, at most."""

    @property
    def scores(self) -> dict[str, float]:
        """Means over the clips where they are defined: `si_sdr` (dB), `mel_distance`, `stoi`; NaN without any."""
        return {name: _mean([clip[name] for clip in self.per_clip if not math.isnan(clip[name])]) for name in SCORES}

    @property
    def undefined(self) -> dict[str, int]:
        """Number of clips left out of each mean: silent ones, and for `stoi` those too short."""
        return {name: sum(math.isnan(clip[name]) for clip in self.per_clip) for name in SCORES}

    @property
    def codebook_usage(self) -> list[float]:
        """Share of each codebook's entries chosen at least once, 0 to 1. Few clips cannot use many entries."""
        return (self.counts > 0).double().mean(1).tolist()

    @property
    def codebook_perplexity(self) -> list[float]:
        """Exponential of the entropy of each codebook's choices: 1 if always the same entry, N if all alike."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True)
        return torch.special.entr(shares).sum(1).exp().tolist()

    def values(self) -> dict[str, float]:
        """Everything as one flat row: the scores, `usage_1`... and `perplexity_1`..., counted from level 1."""
        usage = {f"usage_{level}": value for level, value in enumerate(self.codebook_usage, 1)}
        perplexity = {f"perplexity_{level}": value for level, value in enumerate(self.codebook_perplexity, 1)}
        return {**self.scores, **usage, **perplexity}


def validate(
    model: MimiModel,
    clips: Sequence[tuple[str, Tensor]],
    mel_distance: Callable[[Tensor, Tensor], Tensor],
    batch_size: int = 8,
    num_quantizers: int | None = None,
    examples: int = 0,
    progress: bool = False,
) -> Validation:
    """Encode and decode every clip and score it on its own samples; batches hold clips of similar length.

    A process of several takes `clips[rank::world_size]`, and `merge` joins what they all measured. A reconstruction
    that is not finite gets the worst scores there are: -100 dB, infinite distance, STOI 0.

    Args:
        model: In eval mode, on any device.
        clips: Names, unique among the examples, and waves (L,) in [-1, 1] at the model's rate, L > 0.
        mel_distance: Takes audio (1, L) and reconstruction (1, L) on the model's device, gives (1,).
        batch_size: Clips encoded at a time.
        num_quantizers: Use the first so many codebooks; all if not given.
        examples: Keep the reconstructions of the first so many clips.
        progress: Show a bar.
    """
    num_levels = num_quantizers or model.config.num_quantizers
    counts = torch.zeros(num_levels, model.config.codebook_size, dtype=torch.int64)
    per_clip: list[dict[str, Any]] = [{} for _ in clips]
    kept: dict[int, Tensor] = {}
    longest_first = sorted(range(len(clips)), key=lambda index: -clips[index][1].shape[-1])
    with tqdm(total=len(clips), desc="validation", unit="clip", leave=False, disable=not progress) as bar:
        for start in range(0, len(clips), batch_size):
            batch = longest_first[start : start + batch_size]
            reconstructions, batch_counts = _reconstruct(model, [clips[index][1] for index in batch], num_quantizers)
            counts += batch_counts
            for index, reconstruction in zip(batch, reconstructions, strict=True):
                name, audio = clips[index]
                scores = _score(audio.to(reconstruction.device), reconstruction, mel_distance, model)
                per_clip[index] = {"name": name, "seconds": audio.shape[-1] / model.config.sampling_rate, **scores}
                if index < examples:
                    kept[index] = reconstruction.cpu()
            bar.update(len(batch))
    return Validation(per_clip, counts, {clips[index][0]: kept[index] for index in sorted(kept)}, examples)


def merge(parts: Sequence[Validation]) -> Validation:
    """The whole of what several processes measured, `parts[rank]` on `clips[rank::len(parts)]`; clips in order."""
    rounds = zip_longest(*(part.per_clip for part in parts))
    per_clip = [(clip, part) for one in rounds for clip, part in zip(one, parts, strict=True) if clip is not None]
    examples = parts[0].examples
    kept = {clip["name"]: part.reconstructions[clip["name"]] for clip, part in per_clip[:examples]}
    counts = torch.stack([part.counts for part in parts]).sum(0)
    return Validation([clip for clip, _ in per_clip], counts, kept, examples)


@torch.no_grad()
def _reconstruct(model: MimiModel, waves: list[Tensor], num_quantizers: int | None) -> tuple[list[Tensor], Tensor]:
    """Each wave's reconstruction (L,), float32 on the model's device; and the batch's counts (K, N) on the CPU."""
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True).to(model.device)  # (B, L)
    lengths = torch.tensor([wave.shape[-1] for wave in waves])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(model.device)
    encoded = model.encode(padded[:, None], padding_mask=mask, num_quantizers=num_quantizers)
    decoded = model.decode(encoded.audio_codes, padding_mask=mask).audio_values[:, 0].float()
    codes = encoded.audio_codes.transpose(1, 2)[encoded.audio_codes_mask].cpu()  # (frames of the batch, K)
    size = model.config.codebook_size
    flat = (codes + size * torch.arange(codes.shape[1])).flatten()
    counts = torch.bincount(flat, minlength=size * codes.shape[1]).view(-1, size)
    return [wave[:length] for wave, length in zip(decoded, lengths.tolist(), strict=True)], counts


@torch.no_grad()
def _score(
    audio: Tensor, reconstruction: Tensor, mel_distance: Callable[[Tensor, Tensor], Tensor], model: MimiModel
) -> dict[str, float]:
    if not reconstruction.isfinite().all():
        return {"si_sdr": -LIMIT_DB, "mel_distance": math.inf, "stoi": 0.0}
    return {
        "si_sdr": math.nan if _is_silent(audio) else si_sdr(audio, reconstruction).item(),
        "mel_distance": mel_distance(audio[None], reconstruction[None]).item(),
        "stoi": intelligibility(audio.cpu(), reconstruction.cpu(), model.config.sampling_rate),
    }


def _is_silent(audio: Tensor) -> bool:
    """Nothing but a constant."""
    return bool(audio.min() == audio.max())


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
