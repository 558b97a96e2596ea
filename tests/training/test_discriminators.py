"""The discriminator: its size, its maps, and which frames of padded audio it is asked about."""

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from training.config import DiscriminatorConfig
from training.discriminators import MultiScaleSTFTDiscriminator

PAPER = (1024, 2048, 512, 256, 128)
REACH = 1 + (1 + 2 + 4) + 1 + 1  # frames that a logit sees to either side


def discriminator(**fields) -> MultiScaleSTFTDiscriminator:
    torch.manual_seed(0)
    return MultiScaleSTFTDiscriminator(DiscriminatorConfig(**fields))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_has_the_papers_size():
    """472 k: weights and biases, and beside them one magnitude per channel of a convolution with weight norm."""
    counts = {False: 0, True: 0}
    for name, parameter in discriminator().named_parameters():
        counts[name.endswith("original0")] += parameter.numel()
    assert counts == {False: 471_685, True: 5 * (4 * 32 + 1)}


def test_all_convolutions_but_the_first_have_weight_norm():
    for judge in discriminator().judges:
        normed = [is_parametrized(convolution, "weight") for convolution in [*judge.convolutions, judge.logit]]
        assert normed == [False, True, True, True, True, True]


def test_convolutions_are_those_of_the_paper():
    judge = discriminator().judges[0]
    layers = [(c.kernel_size, c.stride, c.dilation, c.out_channels) for c in [*judge.convolutions, judge.logit]]
    assert layers == [
        ((3, 9), (1, 1), (1, 1), 32),
        ((3, 9), (1, 2), (1, 1), 32),
        ((3, 9), (1, 2), (2, 1), 32),
        ((3, 9), (1, 2), (4, 1), 32),
        ((3, 3), (1, 1), (1, 1), 32),
        ((3, 3), (1, 1), (1, 1), 1),
    ]


def test_each_scale_gives_logits_and_five_maps():
    judgements = discriminator(num_filters=4)(noise(2, 1, 5000))
    assert len(judgements) == 5
    for window, judgement in zip(PAPER, judgements, strict=True):
        frames, bins = (5000 - window) // (window // 4) + 1, window // 2 + 1
        widths = [bins, -(-bins // 2), -(-bins // 4), -(-bins // 8), -(-bins // 8)]
        assert [tuple(feature.shape) for feature in judgement.features] == [(2, 4, frames, w) for w in widths]
        assert judgement.logits.shape == (2, frames, widths[-1])
        assert judgement.mask is None


@pytest.mark.parametrize("window", PAPER)
def test_white_noise_has_the_same_level_at_every_scale(window):
    judge = discriminator(windows=(window,), num_filters=1).judges[0]
    spectrum = judge.spectrogram(noise(1, 1, 48_000))
    assert spectrum.shape[1] == 2
    power = spectrum.square().sum(1)[..., 1:-1].mean()  # of unit-norm windows: the variance
    torch.testing.assert_close(power, torch.tensor(0.01), rtol=0.05, atol=0)


def test_a_tone_lies_in_its_bin():
    judge = discriminator(windows=(1024,), num_filters=1).judges[0]
    tone = torch.sin(2 * torch.pi * 100 / 1024 * torch.arange(4096))
    spectrum = judge.spectrogram(tone[None, None]).square().sum(1)[0]
    assert spectrum.argmax(-1).tolist() == [100] * 13


def test_the_mask_holds_the_frames_that_lie_on_the_clip():
    """As many as the clip alone would have, whatever the padding; one where it is shorter than the window."""
    lengths = [8000, 5000, 2048, 2047, 600, 10]
    mask = torch.arange(8000) < torch.tensor(lengths)[:, None]
    for window, judgement in zip(PAPER, discriminator(num_filters=1)(noise(6, 1, 8000), mask), strict=True):
        alone = [max(0, (length - window) // (window // 4)) + 1 for length in lengths]
        assert judgement.mask.shape == judgement.logits.shape[:2]
        assert judgement.mask.sum(1).tolist() == alone
        assert judgement.mask[:, 0].all()


def test_padding_changes_only_logits_whose_reach_it_is_in():
    judge = discriminator(windows=(256,), num_filters=4)
    clip = noise(1, 1, 6000)
    length = 4096
    padded = torch.where(torch.arange(6000) < length, clip, 0.0)
    alone = judge(clip[..., :length])[0].logits
    (judgement,) = judge(padded, torch.arange(6000)[None] < length)
    counted = judgement.logits[judgement.mask][None]
    assert counted.shape == alone.shape
    torch.testing.assert_close(counted[:, :-REACH], alone[:, :-REACH])
    assert not torch.allclose(counted[:, -REACH:], alone[:, -REACH:])


def test_clips_of_a_batch_are_judged_apart():
    judge = discriminator(num_filters=4)
    audio = noise(3, 1, 4096)
    for together, alone in zip(judge(audio), judge(audio[1:2]), strict=True):
        torch.testing.assert_close(together.logits[1:2], alone.logits)


def test_audio_shorter_than_the_longest_window_is_refused():
    judge = discriminator(windows=(128, 512), num_filters=1)
    judge(noise(1, 1, 512))
    with pytest.raises(ValueError, match=r"512 samples.*511.*data\.segment_s.*discriminator\.crop_s.*\.windows"):
        judge(noise(1, 1, 511))


def test_gradients_reach_every_weight_and_the_audio():
    judge = discriminator(num_filters=4)
    audio = noise(1, 1, 4096).requires_grad_()
    sum(j.logits.square().sum() for j in judge(audio)).backward()
    assert audio.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in judge.parameters())


def test_the_spectrogram_stays_in_float32_under_autocast():
    judge = discriminator(windows=(256,), num_filters=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert judge.judges[0].spectrogram(noise(1, 1, 512)).dtype == torch.float32
        assert judge(noise(1, 1, 512))[0].logits.dtype == torch.bfloat16
