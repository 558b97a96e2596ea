"""Losses against numbers worked out by hand, and what a mask and a batch may not change."""

import math

import pytest
import torch
from torch import tensor

from training import losses
from training.distillation import feature_reconstruction, frames_inside
from training.spectral import MelDistance, masked_mean, resample

RATE = 24_000
WINDOWS = (32, 256, 2048)


def noise(*shape: int, seed: int = 0, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_masked_mean_is_the_mean_of_each_clips_own_mean():
    values = tensor([[1.0, 2.0, 9.0, 9.0], [1.0, 1.0, 1.0, 5.0]])
    mask = tensor([[True, True, False, False], [True, True, True, True]])
    assert masked_mean(values, mask) == (1.5 + 2.0) / 2
    assert masked_mean(values, None) == (21 + 8) / 8


def test_masked_mean_averages_what_lies_behind_time():
    values = tensor([[[1.0, 3.0], [100.0, 100.0]]])
    assert masked_mean(values, tensor([[True, False]])) == 2.0
    assert masked_mean(values[..., None], tensor([[True, False]])) == 2.0


def test_masked_mean_ignores_what_is_not_a_number_outside():
    values = tensor([[1.0, math.nan]], requires_grad=True)
    mean = masked_mean(values, tensor([[True, False]]))
    mean.backward()
    assert mean == 1.0
    assert values.grad.tolist() == [[1.0, 0.0]]


def test_masked_mean_of_a_clip_without_audio_is_zero():
    assert masked_mean(tensor([[3.0, 3.0]]), tensor([[False, False]])) == 0.0


def test_waveform_is_l1():
    audio, reconstruction = tensor([[[0.0, 0.5, -0.5, 0.0]]]), tensor([[[0.25, 0.5, 0.5, 8.0]]])
    assert losses.waveform(audio, reconstruction) == (0.25 + 0 + 1 + 8) / 4
    assert losses.waveform(audio, reconstruction, tensor([[True, True, True, False]])) == tensor(1.25 / 3)


def test_commitment_averages_levels_and_widths_and_skips_masked_frames():
    residuals = torch.zeros(1, 2, 3, 2)
    centroids = torch.zeros(1, 2, 3, 2)
    residuals[0, 0, 0] = tensor([1.0, 3.0])  # level 0, frame 0: (1 + 9) / 2 = 5
    centroids[0, 1, 1] = tensor([2.0, 0.0])  # level 1, frame 1: 4 / 2 = 2
    residuals[0, :, 2] = 100.0
    mask = tensor([[True, True, False]])
    assert losses.commitment(residuals, centroids, mask) == (5 + 2) / (2 * 2)
    assert losses.commitment(residuals, centroids) == tensor((5 + 2 + 2 * 10_000) / 6)


def test_commitment_pulls_the_residuals_only():
    residuals, centroids = noise(1, 2, 3, 4).requires_grad_(), noise(1, 2, 3, 4, seed=1).requires_grad_()
    losses.commitment(residuals, centroids).backward()
    assert centroids.grad is None
    torch.testing.assert_close(residuals.grad, 2 * (residuals - centroids).detach() / (2 * 3 * 4))


def test_hinge_of_the_discriminator():
    real = [tensor([[[2.0], [0.5]]]), tensor([[[-1.0]]])]  # relu(1 - r): 0, 0.5; 2
    fake = [tensor([[[-2.0], [0.0]]]), tensor([[[1.0]]])]  # relu(1 + f): 0, 1; 2
    assert losses.discriminator_hinge(real, fake, [None, None]) == ((0.25 + 0.5) + (2 + 2)) / 2
    masks = [tensor([[True, False]]), tensor([[True]])]
    assert losses.discriminator_hinge(real, fake, masks) == ((0 + 0) + (2 + 2)) / 2


def test_hinge_is_two_for_a_judge_without_opinion_and_zero_for_a_sure_one():
    zeros, ones = [torch.zeros(2, 3, 4)], [torch.ones(2, 3, 4)]
    assert losses.discriminator_hinge(zeros, zeros, [None]) == 2
    assert losses.discriminator_hinge(ones, [-ones[0]], [None]) == 0
    assert losses.discriminator_hinge([-ones[0]], ones, [None]) == 4


def test_adversarial_is_minus_the_mean_logit():
    fake = [tensor([[[1.0, 3.0], [8.0, 8.0]]]), tensor([[[-4.0]]])]
    assert losses.adversarial(fake, [tensor([[True, False]]), None]) == (-2 + 4) / 2
    assert losses.adversarial(fake, [None, None]) == (-5 + 4) / 2


def test_feature_matching_averages_maps_then_scales():
    real = [[torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 1)], [torch.zeros(1, 2, 1, 2)]]
    fake = [[torch.full((1, 2, 2, 3), 0.5), torch.full((1, 2, 2, 1), 1.5)], [torch.full((1, 2, 1, 2), -4.0)]]
    assert losses.feature_matching(real, fake, [None, None]) == ((0.5 + 1.5) / 2 + 4) / 2
    fake[0][0][:, :, 1] = 100.0
    fake[0][1][:, :, 1] = 100.0
    assert losses.feature_matching(real, fake, [tensor([[True, False]]), None]) == ((0.5 + 1.5) / 2 + 4) / 2


def test_feature_matching_does_not_move_the_real_maps():
    real, fake = noise(1, 2, 3, 4).requires_grad_(), noise(1, 2, 3, 4, seed=1).requires_grad_()
    losses.feature_matching([[real]], [[fake]], [None]).backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, (fake - real).detach().sign() / 24)


def test_feature_reconstruction_is_l1_and_does_not_move_the_target():
    real, fake = torch.zeros(1, 2, 2).requires_grad_(), tensor([[[1.0, -3.0], [9.0, 9.0]]], requires_grad=True)
    loss = feature_reconstruction(real, fake, tensor([[True, False]]))
    loss.backward()
    assert loss == 2.0
    assert real.grad is None
    assert fake.grad.tolist() == [[[0.5, -0.5], [0.0, 0.0]]]


def test_frames_count_where_their_middle_is_audio():
    mask = torch.arange(100) < tensor([[100], [50], [46], [44], [4]])
    inside = frames_inside(mask, 10)  # middles at 5, 15, ... 95
    assert inside.sum(1).tolist() == [10, 5, 5, 4, 0]
    assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in inside)


class TestMelDistance:
    mel = MelDistance(RATE, WINDOWS, 64)

    def test_equal_waves_are_at_distance_zero(self):
        audio = noise(2, 4800)
        assert self.mel(audio, audio).tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(("factor", "distance"), [(10.0, 1.0), (0.1, 1.0), (1000.0, 3.0), (2.0, math.log10(2))])
    def test_a_factor_in_level_is_its_logarithm(self, factor, distance):
        audio = noise(2, 4800, scale=1.0)  # all bands far above the floor
        torch.testing.assert_close(self.mel(audio, factor * audio), torch.full((2,), distance), rtol=0, atol=2e-4)

    def test_below_the_floor_all_is_equal(self):
        quiet = noise(1, 4800, scale=1e-7)
        torch.testing.assert_close(self.mel(quiet, 10 * quiet), torch.zeros(1), rtol=0, atol=1e-4)
        torch.testing.assert_close(self.mel(torch.zeros(1, 4800), quiet), torch.zeros(1), rtol=0, atol=1e-4)

    def test_is_symmetric(self):
        audio, other = noise(2, 4800), noise(2, 4800, seed=1)
        assert torch.equal(self.mel(audio, other), self.mel(other, audio))
        assert (self.mel(audio, other) > 0.05).all()

    @pytest.mark.parametrize("length", [2500, 4096, 7999, 8000])
    def test_a_padded_clip_counts_as_the_clip_alone(self, length):
        audio, other = torch.zeros(2, 8000), torch.zeros(2, 8000)
        audio[0, :length], other[0, :length] = noise(length), noise(length, seed=1)
        audio[1], other[1] = noise(8000, seed=2), noise(8000, seed=3)
        mask = torch.arange(8000) < tensor([[length], [8000]])
        padded = self.mel(audio, other, mask)
        torch.testing.assert_close(padded[:1], self.mel(audio[:1, :length], other[:1, :length]), rtol=1e-6, atol=0)
        torch.testing.assert_close(padded[1:], self.mel(audio[1:], other[1:]), rtol=1e-6, atol=0)

    def test_is_the_mean_over_windows(self):
        audio, other = noise(1, 4800), noise(1, 4800, seed=1)
        alone = [MelDistance(RATE, [window], 64)(audio, other) for window in WINDOWS]
        torch.testing.assert_close(self.mel(audio, other), sum(alone) / 3)

    def test_gradients_are_finite_in_silence(self):
        reconstruction = torch.zeros(1, 4800, requires_grad=True)
        self.mel(noise(1, 4800), reconstruction).sum().backward()
        assert torch.isfinite(reconstruction.grad).all()

    def test_a_tone_lies_in_the_band_of_its_pitch(self):
        """Band centres of the scale by Slaney: linear below 1 kHz, then logarithmic."""
        time = torch.arange(RATE) / RATE
        peaks = []
        for pitch in (500.0, 1000.0, 4000.0):
            frames = self.mel.mel(torch.sin(2 * torch.pi * pitch * time)[None], 2048)[0]
            assert frames.shape == (RATE // 512 + 1, 64)
            peaks.append(int(frames.mean(0).argmax()))
        highest = 15 + 27 * math.log(12) / math.log(6.4)  # 12 kHz in mel
        mels = [7.5, 15.0, 15 + 27 * math.log(4) / math.log(6.4)]
        for peak, mel in zip(peaks, mels, strict=True):
            assert abs(peak - (mel / highest * 65 - 1)) <= 1

    def test_magnitudes_count_relative_to_the_audio(self):
        """Half as loud: half of every magnitude is missing, on top of log10(2)."""
        audio = noise(2, 4800)
        mask = torch.arange(4800) < tensor([[4800], [3000]])
        audio = audio * mask
        plain, both = self.mel(audio, audio / 2, mask), self.mel(audio, audio / 2, mask, magnitude_weight=3.0)
        torch.testing.assert_close(both - plain, torch.full((2,), 1.5), rtol=1e-4, atol=0)
        torch.testing.assert_close(self.mel(audio, audio, mask, magnitude_weight=3.0), torch.zeros(2))

    def test_what_lies_below_the_floor_does_not_count(self):
        quiet = 1e-3 * noise(1, 4800)
        assert MelDistance(RATE, [512], 64, floor=1e-1)(quiet, torch.zeros_like(quiet)) == 0
        assert MelDistance(RATE, [512], 64, floor=1e-5)(quiet, torch.zeros_like(quiet)) > 0.1

    def test_short_windows_have_fewer_bands_and_none_is_empty(self):
        assert self.mel.mel(noise(1, 4800), 32).shape[-1] == 4
        for window in WINDOWS:
            assert (getattr(self.mel, f"filters_{window}").sum(0) > 0).all()

    def test_nothing_of_it_is_saved(self):
        assert not self.mel.state_dict()


def test_resampling_keeps_a_sine():
    time = torch.arange(RATE) / RATE
    low = resample(torch.sin(2 * torch.pi * 440 * time), RATE, 16_000)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)
    assert low.shape == (16_000,)
    torch.testing.assert_close(low[500:-500], expected[500:-500], rtol=0, atol=2e-3)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    time = torch.arange(RATE) / RATE
    assert resample(torch.sin(2 * torch.pi * 10_000 * time), RATE, 16_000)[500:-500].abs().max() < 1e-2


def test_resampling_passes_gradients():
    audio = noise(1, 2400).requires_grad_()
    resample(audio, RATE, 16_000).square().sum().backward()
    assert audio.grad.abs().max() > 0
