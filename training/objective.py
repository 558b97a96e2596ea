"""What is optimised: the discriminator's loss, and the codec's named losses with their weights (Moshi §3.3.4).

`B` clips, `L` samples, `T` frames.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling_mimi import MimiConfig

from .balancer import Balancer
from .config import BALANCED, RecipeError, TrainingConfig
from .discriminators import Judgement
from .distillation import Teacher, feature_reconstruction, frames_inside, pool
from .losses import adversarial, commitment, discriminator_hinge, feature_matching, waveform
from .spectral import MelDistance, masked_mean

ADVERSARIAL = ("adversarial", "feature_matching")
DIRECT = ("commitment", "distillation")


@dataclass(frozen=True)
class Example:
    """A part of a batch: windows, where they are audio, and where the discriminator looks."""

    audio: Tensor
    """(B, 1, L)."""
    mask: Tensor
    """(B, L), true on audio, then false."""
    frame_mask: Tensor
    """(B, T), true on frames that hold audio."""
    crop: Tensor
    """(B,) in [0, 1): place of the discriminator's crop within the audio."""


class Objective:
    """Names each loss, computes those with a weight, and says how they add up."""

    def __init__(
        self,
        config: TrainingConfig,
        codec: MimiConfig,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`autocast` is what the teacher runs in; losses are computed in float32."""
        settings = config.objective
        self.weights = {name: weight for name, weight in vars(settings.weights).items() if weight > 0}
        self.discriminator_start = settings.discriminator_start_step
        self.adversarial_start = settings.adversarial_start_step
        self.sampling_rate, self.frame_size = codec.sampling_rate, codec.frame_size
        crop_s = config.discriminator.crop_s
        self.crop_samples = None if crop_s is None else round(crop_s * codec.sampling_rate)
        self.mel = MelDistance(codec.sampling_rate, settings.mel_windows, settings.mel_bins, settings.mel_floor).to(
            device
        )
        self.mel_magnitude_weight = settings.mel_magnitude_weight
        self.autocast = autocast
        self.teacher = None
        if "distillation" in self.weights or "feature_reconstruction" in self.weights:
            self.teacher = Teacher(config.teacher, device)
            if "feature_reconstruction" in self.weights and not self.teacher.differentiable:
                raise RecipeError(
                    f"objective.weights.feature_reconstruction needs a teacher that gradients pass through, and the "
                    f"feature extractor of {config.teacher.pretrained} is not: WavLM, HuBERT, wav2vec 2.0 and Whisper "
                    "are."
                )
        balanced = {name: self.weights[name] for name in BALANCED if name in self.weights}
        self.balancer = Balancer(balanced, settings.total_norm, settings.norm_decay) if settings.balancer else None

    @property
    def has_discriminator(self) -> bool:
        """Whether any loss asks for a discriminator."""
        return any(name in self.weights for name in ADVERSARIAL)

    def discriminator_learns(self, step: int) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.has_discriminator and step >= self.discriminator_start

    def is_adversarial(self, step: int) -> bool:
        """Whether the codec hears the discriminator in this step."""
        return self.has_discriminator and step >= self.adversarial_start

    def discriminator_loss(
        self, discriminator: nn.Module, example: Example, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss of the discriminator, and its accuracies; no gradient reaches the codec.

        Audio and reconstruction go through it together: one forward pass, as data-parallel wrappers expect.
        """
        mask, audio, fake = self._cropped(example, example.audio, reconstruction.detach())
        judgements = discriminator(torch.cat([audio, fake]), torch.cat([mask, mask]))
        real = [judgement.logits[: len(audio)].float() for judgement in judgements]
        fake = [judgement.logits[len(audio) :].float() for judgement in judgements]
        masks = [judgement.mask[: len(audio)] for judgement in judgements]
        accuracies = {
            "discriminator/accuracy_real": _share(real, masks, lambda logits: logits > 0),
            "discriminator/accuracy_fake": _share(fake, masks, lambda logits: logits < 0),
        }
        return discriminator_hinge(real, fake, masks), accuracies

    def codec_losses(
        self,
        output: Any,
        reconstruction: Tensor,
        example: Example,
        discriminator: nn.Module | None,
        distillation: nn.Module | None,
    ) -> dict[str, Tensor]:
        """Every loss that has a weight, by name; the adversarial ones if a discriminator is given.

        `output` is the codec's `MimiOutput` in training mode.
        """
        values = {}
        if discriminator is not None:
            values |= self._adversarial_losses(discriminator, example, reconstruction)
        if "mel" in self.weights:
            wave, fake = example.audio.squeeze(1), reconstruction.squeeze(1)
            values["mel"] = self.mel(wave, fake, example.mask, self.mel_magnitude_weight).mean()
        if "waveform" in self.weights:
            values["waveform"] = waveform(example.audio, reconstruction, example.mask)
        if "commitment" in self.weights:
            values["commitment"] = commitment(output.residuals, output.centroids, example.frame_mask)
        if self.teacher is not None:
            values |= self._teacher_losses(self.teacher, output, reconstruction, example, distillation)
        return values

    def backward(self, values: dict[str, Tensor], reconstruction: Tensor) -> Tensor:
        """The scalar whose gradient is the step: weighted losses, the balanced ones through the balancer."""
        if self.balancer is None:
            return sum(self.weights[name] * value for name, value in values.items())
        total = sum(
            (self.weights[name] * values[name] for name in DIRECT if name in values), reconstruction.new_zeros(())
        )
        balanced = {name: values[name] for name in BALANCED if name in values}
        if balanced:
            gradient = self.balancer.balance(balanced, reconstruction)
            total = total + (reconstruction * gradient).sum()
        return total

    def _adversarial_losses(
        self, discriminator: nn.Module, example: Example, reconstruction: Tensor
    ) -> dict[str, Tensor]:
        mask, audio, fake = self._cropped(example, example.audio, reconstruction)
        judgements: list[Judgement] = discriminator(fake, mask)
        masks, values = [judgement.mask for judgement in judgements], {}
        if "adversarial" in self.weights:
            values["adversarial"] = adversarial([j.logits.float() for j in judgements], masks)
        if "feature_matching" in self.weights:
            with torch.no_grad():
                real: list[Judgement] = discriminator(audio, mask)
            values["feature_matching"] = feature_matching(
                [[feature.float() for feature in j.features] for j in real],
                [[feature.float() for feature in j.features] for j in judgements],
                masks,
            )
        return values

    def _teacher_losses(
        self,
        teacher: Teacher,
        output: Any,
        reconstruction: Tensor,
        example: Example,
        distillation: nn.Module | None,
    ) -> dict[str, Tensor]:
        values = {}
        with torch.no_grad(), self.autocast():
            real = teacher.features(example.audio, self.sampling_rate, example.mask)
        if distillation is not None:
            frames = output.residuals.shape[2]
            per_frame = real.shape[1] * self.frame_size / example.audio.shape[-1]
            # the first level, always quantized, straight-through
            projected = output.residuals[:, 0]
            student = projected + (output.centroids[:, 0] - projected).detach()
            values["distillation"] = distillation(student, pool(real, frames, per_frame), example.frame_mask)
        if "feature_reconstruction" in self.weights:
            with self.autocast():
                fake = teacher.features(reconstruction, self.sampling_rate, example.mask)
            mask = frames_inside(example.mask, real.shape[1])
            values["feature_reconstruction"] = feature_reconstruction(real, fake, mask)
        return values

    def _cropped(self, example: Example, *waves: Tensor) -> tuple[Tensor, ...]:
        """The mask, and waves (B, 1, L), where the discriminator looks."""
        length = example.audio.shape[-1]
        if self.crop_samples is None or self.crop_samples >= length:
            return example.mask, *waves
        room = (example.mask.sum(1) - self.crop_samples).clamp(min=0)
        start = (example.crop * (room + 1)).long().unsqueeze(1)  # (B, 1)
        places = start + torch.arange(self.crop_samples, device=start.device)
        return example.mask.gather(1, places), *(wave.squeeze(1).gather(1, places).unsqueeze(1) for wave in waves)


@torch.no_grad()
def _share(logits: list[Tensor], masks: list[Tensor], right: Callable[[Tensor], Tensor]) -> Tensor:
    """Share of the logits that are right, averaged over clips and scales."""
    shares = [masked_mean(right(scale).float(), mask) for scale, mask in zip(logits, masks, strict=True)]
    return torch.stack(shares).mean()
