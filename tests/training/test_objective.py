"""Each loss reaches exactly its own networks; crops lie on the clips; weights add up the same for every batch size."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, draw_codebooks, speech
from torch import Tensor, nn
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
)
from transformers.utils import logging

from modeling_mimi import MimiConfig, MimiModel
from training.config import (
    DiscriminatorConfig,
    ObjectiveConfig,
    TeacherConfig,
    TrainingConfig,
    WeightsConfig,
)
from training.discriminators import Judgement, MultiScaleSTFTDiscriminator
from training.distillation import Distillation
from training.objective import Example, Objective

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

SIZES = {"upsampling_ratios": [8, 6, 5, 4], "num_filters": 2}  # 12.5 Hz, as the teacher's rate asks for
SAMPLES = 15_360  # 8 frames
NONE = dict.fromkeys(vars(WeightsConfig()), 0.0)
ALL = dict.fromkeys(NONE, 1.0)
SEMANTIC, ACOUSTIC = (f"quantizer.{branch}_residual_vector_quantizer" for branch in ("semantic", "acoustic"))
ENCODER = {"encoder", "encoder_transformer", "downsample"}
DECODER = {"upsample", "decoder_transformer", "decoder"}
PROJECTIONS_IN = {f"{SEMANTIC}.input_proj", f"{ACOUSTIC}.input_proj"}
PROJECTIONS_OUT = {f"{SEMANTIC}.output_proj", f"{ACOUSTIC}.output_proj"}
PARTS = ENCODER | DECODER | PROJECTIONS_IN | PROJECTIONS_OUT


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> str:
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    folder = str(tmp_path_factory.mktemp("wavlm"))
    WavLMModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    logging.enable_progress_bar()
    return folder


@pytest.fixture(scope="module")
def codec() -> MimiModel:
    torch.manual_seed(0)
    model = draw_codebooks(MimiModel(MimiConfig(**(TINY | SIZES))), speech(24_000)).train()
    model.apply_weight_norm()
    return model


@pytest.fixture
def networks(codec):
    """The codec, a discriminator and a projection, without gradients."""
    torch.manual_seed(1)
    discriminator = MultiScaleSTFTDiscriminator(DISCRIMINATOR)
    distillation = Distillation(codec.config.codebook_dim, 16)
    codec.zero_grad()
    return codec, discriminator, distillation


DISCRIMINATOR = DiscriminatorConfig(windows=(1024, 256), num_filters=4)


def settings(teacher: str = "", weights: dict | None = None, crop_s: float | None = None, **fields) -> TrainingConfig:
    weights = WeightsConfig(**(NONE | (weights or {})))
    return TrainingConfig(
        teacher=TeacherConfig(teacher),
        objective=ObjectiveConfig(weights=weights, mel_windows=(64, 1024), mel_bins=32, **fields),
        discriminator=replace(DISCRIMINATOR, crop_s=crop_s),
    )


def example(clips: int = 2, short: int = 9_600) -> Example:
    """Speech; the first clip is padded."""
    mask = torch.ones(clips, SAMPLES, dtype=torch.bool)
    mask[0, short:] = False
    audio = speech(SAMPLES, clips) * mask[:, None]
    frames = torch.arange(SAMPLES // 1920) < (mask.sum(1, keepdim=True) / 1920)
    return Example(audio, mask, frames, torch.tensor([0.0, 0.999, 0.5, 0.25])[:clips])


def run(codec: MimiModel, given: Example):
    """One clip with quantized latents, one without, as in training."""
    unquantized = torch.arange(len(given.audio)) % 2 == 1
    output = codec(given.audio, num_quantizers=4, unquantized=unquantized)
    return output, output.audio_values * given.mask[:, None]


def reached(codec: MimiModel) -> set[str]:
    """Parts of the codec with a gradient that is not zero."""
    return {part for part in PARTS if any(has_gradient(p) for p in codec.get_submodule(part).parameters())}


def has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


def test_parts_of_these_tests_are_all_of_the_codec(codec):
    named = {id(p) for part in PARTS for p in codec.get_submodule(part).parameters()}
    assert named == {id(p) for p in codec.parameters()}


# ---- which networks a loss reaches


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adversarial", PARTS),
        ("feature_matching", PARTS),
        ("mel", PARTS),
        ("waveform", PARTS),
        ("feature_reconstruction", PARTS),
        ("commitment", ENCODER | PROJECTIONS_IN),
        ("distillation", ENCODER | {f"{SEMANTIC}.input_proj"}),
    ],
)
def test_each_loss_reaches_exactly_its_own_networks(name, expected, networks, teacher_folder):
    codec, discriminator, distillation = networks
    objective = Objective(settings(teacher_folder, ALL), codec.config)
    buffers = [buffer.clone() for buffer in codec.buffers()]
    given = example()
    output, reconstruction = run(codec, given)
    discriminator.requires_grad_(False)
    losses = objective.codec_losses(output, reconstruction, given, discriminator, distillation)
    assert losses.keys() == ALL.keys()
    losses[name].backward()
    assert reached(codec) == expected
    assert has_gradient(distillation.projection.weight) == (name == "distillation")
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.grad is None for parameter in objective.teacher.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(buffers, codec.buffers(), strict=True))


def test_every_weight_of_the_codec_gets_a_gradient(networks, teacher_folder):
    codec, discriminator, distillation = networks
    objective = Objective(settings(teacher_folder, ALL, balancer=False), codec.config)
    given = example()
    output, reconstruction = run(codec, given)
    losses = objective.codec_losses(output, reconstruction, given, discriminator, distillation)
    objective.backward(losses, reconstruction).backward()
    missing = [name for name, parameter in codec.named_parameters() if not has_gradient(parameter)]
    assert not missing


def test_the_discriminators_loss_reaches_the_discriminator_only(networks):
    codec, discriminator, _ = networks
    objective = Objective(settings(weights={"adversarial": 1.0}), codec.config)
    given = example()
    _, reconstruction = run(codec, given)
    loss, _ = objective.discriminator_loss(discriminator, given, reconstruction)
    loss.backward()
    assert all(has_gradient(parameter) for parameter in discriminator.parameters())
    assert all(parameter.grad is None for parameter in codec.parameters())


def test_distillation_is_always_on_quantized_vectors(networks, teacher_folder):
    codec, _, distillation = networks
    objective = Objective(settings(teacher_folder, {"distillation": 1.0}), codec.config)
    given, values = example(), []
    for unquantized in (False, True):
        output = codec(given.audio, num_quantizers=4, unquantized=torch.full((2,), unquantized))
        values.append(objective.codec_losses(output, output.audio_values, given, None, distillation)["distillation"])
        student = output.semantic_quantized
    assert torch.equal(*values)
    target = objective.teacher.features(given.audio, 24_000, given.mask)
    assert target.shape[1] == 31
    padded = torch.cat([target[:, :1]] * 2 + [target] + [target[:, -1:]] * 3, dim=1)
    pooled = torch.stack([padded[:, 4 * frame : 4 * frame + 8].mean(1) for frame in range(8)], dim=1)
    torch.testing.assert_close(values[0], distillation(student, pooled, given.frame_mask))


def test_padding_does_not_enter_losses_of_the_reconstruction(networks):
    """Whatever the codec says behind the end of a clip: the trainer silences it, and masks skip it."""
    codec, _, _ = networks
    objective = Objective(settings(weights={"mel": 1.0, "waveform": 1.0, "commitment": 1.0}), codec.config)
    given = example()
    output, reconstruction = run(codec, given)
    values = objective.codec_losses(output, reconstruction, given, None, None)
    for name in ("residuals", "centroids"):
        output[name] = torch.where(given.frame_mask[:, None, :, None], output[name], torch.randn(()))
    changed = objective.codec_losses(output, reconstruction, given, None, None)
    assert values == changed


def test_a_batch_counts_as_the_mean_of_its_clips(networks, teacher_folder):
    """So a batch may be taken in parts; the teacher sees the clips of a batch apart."""
    codec, discriminator, distillation = networks
    objective = Objective(settings(teacher_folder, ALL), codec.config)
    given = example(4)

    def values(rows: slice) -> dict[str, Tensor]:
        part = Example(*(tensor[rows] for tensor in vars(given).values()))
        with torch.no_grad():
            output = codec(part.audio, num_quantizers=4, unquantized=torch.zeros(len(part.audio), dtype=torch.bool))
            reconstruction = output.audio_values * part.mask[:, None]
            own = objective.codec_losses(output, reconstruction, part, discriminator, distillation)
            own["discriminator"] = objective.discriminator_loss(discriminator, part, reconstruction)[0]
        return own

    whole, parts = values(slice(0, 4)), [values(slice(0, 2)), values(slice(2, 4))]
    for name, value in whole.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6, msg=name)


# ---- which losses there are


def test_only_losses_with_a_weight_are_computed(networks):
    codec, discriminator, _ = networks
    for weights in ({"mel": 2.0, "waveform": 0.1}, {"adversarial": 1.0}, {"feature_matching": 1.0, "commitment": 1.0}):
        objective = Objective(settings(weights=weights), codec.config)
        given = example()
        output, reconstruction = run(codec, given)
        judge = discriminator if objective.has_discriminator else None
        assert objective.codec_losses(output, reconstruction, given, judge, None).keys() == weights.keys()
        assert objective.weights == weights
        assert objective.teacher is None


def test_without_a_discriminator_its_losses_are_left_out(networks):
    codec, *_ = networks
    objective = Objective(settings(weights={"adversarial": 1.0, "mel": 1.0}), codec.config)
    given = example()
    output, reconstruction = run(codec, given)
    assert objective.codec_losses(output, reconstruction, given, None, None).keys() == {"mel"}


def test_the_discriminator_begins_at_its_step():
    objective = Objective(settings(weights={"feature_matching": 1.0}, adversarial_start_step=3), MimiConfig())
    assert [objective.is_adversarial(step) for step in range(5)] == [False, False, False, True, True]
    assert not Objective(settings(weights={"mel": 1.0}), MimiConfig()).is_adversarial(10)


def test_comparing_features_needs_a_teacher_that_passes_gradients(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    Wav2Vec2BertModel(Wav2Vec2BertConfig(**sizes)).save_pretrained(tmp_path)
    SeamlessM4TFeatureExtractor().save_pretrained(tmp_path)
    Objective(settings(str(tmp_path), {"distillation": 1.0}), MimiConfig())
    with pytest.raises(ValueError, match=r"objective\.weights\.feature_reconstruction needs a teacher"):
        Objective(settings(str(tmp_path), {"feature_reconstruction": 1.0}), MimiConfig())


# ---- how they add up


def test_without_the_balancer_weighted_losses_are_added():
    objective = Objective(settings(weights={"mel": 2.0, "commitment": 0.5}, balancer=False), MimiConfig())
    assert objective.balancer is None
    total = objective.backward({"mel": torch.tensor(3.0), "commitment": torch.tensor(4.0)}, torch.zeros(1, 1, 1))
    assert total == 2 * 3 + 0.5 * 4


def balanced_gradients(batch_size: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of a step for two weights: of the reconstruction by the balancer, and of the commitment beside it."""
    objective = Objective(settings(weights={"waveform": 1.0, "commitment": 1.0}, total_norm=3.0), MimiConfig())
    for _ in range(2):
        reconstruction = torch.zeros(batch_size, 1, 100, requires_grad=True)
        residual = torch.ones(batch_size, requires_grad=True)
        for wave, direct in zip(reconstruction.chunk(parts), residual.chunk(parts), strict=True):
            values = {"waveform": (wave - 1).abs().mean(), "commitment": direct.square().mean()}
            (objective.backward(values, wave) / parts).backward()
        objective.balancer.update(lambda x: x)
    return reconstruction.grad, residual.grad


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_balanced_gradient_has_its_norm_per_clip_whatever_the_batch_size(batch_size):
    """As a mean over clips: 1 / B of `total_norm` for each, as 1 / B of the gradient of any other loss."""
    balanced, direct = balanced_gradients(batch_size)
    torch.testing.assert_close(batch_size * balanced.flatten(1).norm(dim=1), torch.full((batch_size,), 3.0))
    torch.testing.assert_close(batch_size * direct, torch.full((batch_size,), 2.0))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_has_the_gradient_of_the_whole(parts):
    for whole, in_parts in zip(balanced_gradients(4), balanced_gradients(4, parts), strict=True):
        torch.testing.assert_close(in_parts, whole)


def test_in_its_first_step_a_balanced_loss_moves_nothing(networks):
    codec, *_ = networks
    objective = Objective(settings(weights={"mel": 1.0}), codec.config)
    given = example()
    output, reconstruction = run(codec, given)
    objective.backward(objective.codec_losses(output, reconstruction, given, None, None), reconstruction).backward()
    assert reached(codec) == set()


# ---- where the discriminator looks


class Listener(nn.Module):
    """A discriminator that notes what it was given, and says 0."""

    def __init__(self):
        super().__init__()
        self.heard: list[tuple[Tensor, Tensor]] = []

    def forward(self, audio: Tensor, mask: Tensor) -> list[Judgement]:
        self.heard.append((audio, mask))
        logits = audio[:, 0, :, None]
        return [Judgement(logits, (audio[..., None],), mask)]


def numbered(crop: Tensor, lengths: Tensor) -> tuple[Example, Tensor]:
    """Every sample of the audio is its place; of the reconstruction, minus its place."""
    mask = torch.arange(SAMPLES) < lengths[:, None]
    audio = torch.arange(1.0, SAMPLES + 1).expand(len(crop), 1, -1) * mask[:, None]
    return Example(audio, mask, torch.ones(len(crop), 8, dtype=torch.bool), crop), -audio


@pytest.mark.parametrize("length", [SAMPLES, 10_000])
def test_crops_lie_on_the_clip_and_reach_both_its_ends(length):
    objective = Objective(settings(weights={"adversarial": 1.0}, crop_s=0.25), MimiConfig())
    places = torch.tensor([0.0, 0.25, 0.5, 1 - 1e-7])
    given, reconstruction = numbered(places, torch.full((4,), length))
    listener = Listener()
    objective.discriminator_loss(listener, given, reconstruction)
    ((audio, mask),) = listener.heard
    assert audio.shape == (8, 1, 6000)
    assert mask.all()
    first, room = audio[:4, 0, 0] - 1, length - 6000
    torch.testing.assert_close(first, (places * (room + 1)).floor().clamp(max=room))
    assert first[0] == 0
    assert first[3] == room
    assert torch.equal(audio[:4].diff(), torch.ones(4, 1, 5999))
    assert torch.equal(audio[4:], -audio[:4])


def test_a_clip_shorter_than_the_crop_is_taken_from_its_start():
    objective = Objective(settings(weights={"adversarial": 1.0}, crop_s=0.25), MimiConfig())
    given, reconstruction = numbered(torch.tensor([0.9]), torch.tensor([4000]))
    listener = Listener()
    objective.discriminator_loss(listener, given, reconstruction)
    ((audio, mask),) = listener.heard
    assert audio[0, 0, 0] == 1
    assert mask.sum(1).tolist() == [4000, 4000]


def test_both_sides_of_the_game_hear_the_same_crop():
    """It depends on `Example.crop` alone, so audio and reconstruction, and both updates, agree on it."""
    weights = {"adversarial": 1.0, "feature_matching": 1.0}
    objective = Objective(settings(weights=weights, crop_s=0.25), MimiConfig())
    given, reconstruction = numbered(torch.tensor([0.3, 0.8]), torch.tensor([SAMPLES, 12_000]))
    listener = Listener()
    objective.discriminator_loss(listener, given, reconstruction)
    torch.manual_seed(123)
    objective.codec_losses(None, reconstruction, given, listener, None)
    (both, _), (fake, mask), (real, _) = listener.heard
    assert torch.equal(both, torch.cat([real, fake]))
    assert torch.equal(fake, -real)
    assert mask.shape == (2, 6000)


@pytest.mark.parametrize("crop_s", [None, 10.0])
def test_without_a_crop_the_discriminator_hears_the_whole_window(crop_s):
    objective = Objective(settings(weights={"adversarial": 1.0}, crop_s=crop_s), MimiConfig())
    given, reconstruction = numbered(torch.tensor([0.5]), torch.tensor([9000]))
    listener = Listener()
    objective.discriminator_loss(listener, given, reconstruction)
    ((audio, mask),) = listener.heard
    assert torch.equal(audio, torch.cat([given.audio, reconstruction]))
    assert torch.equal(mask, torch.cat([given.mask, given.mask]))


def test_gradients_of_a_crop_stay_inside_it():
    objective = Objective(settings(weights={"adversarial": 1.0}, crop_s=0.25), MimiConfig())
    given, reconstruction = numbered(torch.tensor([0.5]), torch.tensor([SAMPLES]))
    reconstruction.requires_grad_()
    objective.codec_losses(None, reconstruction, given, Listener(), None)["adversarial"].backward()
    inside = reconstruction.grad[0, 0].nonzero()[:, 0]
    assert inside.tolist() == list(range(int(inside[0]), int(inside[0]) + 6000))


def test_hinge_and_accuracies_of_a_judge_known_by_hand():
    """Its logits are the samples: real ones above 0 and fakes below, but for the first half of the second clip."""
    objective = Objective(settings(weights={"adversarial": 1.0}), MimiConfig())
    audio = torch.full((2, 1, SAMPLES), 0.5)
    fake = torch.full((2, 1, SAMPLES), -3.0)
    audio[1, :, : SAMPLES // 2] = -0.5
    given = Example(audio, torch.ones(2, SAMPLES, dtype=torch.bool), None, torch.zeros(2))
    loss, accuracies = objective.discriminator_loss(Listener(), given, fake)
    assert loss == (0.5 + (0.5 + 1.5) / 2) / 2
    assert accuracies == {"discriminator/accuracy_real": 0.75, "discriminator/accuracy_fake": 1.0}
