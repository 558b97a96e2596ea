"""Distillation by hand, and tiny teachers of every form: what they hear is what their own extractor says."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.utils import logging

from training.config import TeacherConfig
from training.distillation import Distillation, Teacher, pool
from training.spectral import resample

# WavLM in transformers passes masks of two types to torch
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")

RATE, HEARD = 24_000, 16_000
WIDTH, LAYERS = 16, 2
WAVE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def wavlm():
    """As WavLM-large: normalised, with an attention mask."""
    config = WavLMConfig(**WAVE, feat_extract_norm="layer", do_stable_layer_norm=True)
    return WavLMModel(config), Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


def hubert():
    """As HuBERT-base: not normalised by layers, without an attention mask."""
    return HubertModel(HubertConfig(**WAVE)), Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)


def wav2vec2():
    """As it comes, without normalisation."""
    extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False)
    return Wav2Vec2Model(Wav2Vec2Config(**WAVE)), extractor


def w2v_bert():
    config = Wav2Vec2BertConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=16
    )
    return Wav2Vec2BertModel(config), SeamlessM4TFeatureExtractor()


def whisper():
    """An encoder that hears at most 2 s."""
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=100,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperModel(config), WhisperFeatureExtractor(chunk_length=2)


KINDS = {"wavlm": wavlm, "hubert": hubert, "wav2vec2": wav2vec2, "w2v_bert": w2v_bert, "whisper": whisper}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    """Directories of tiny random teachers, as `save_pretrained` writes them."""
    logging.disable_progress_bar()
    folders = {}
    for name, make in KINDS.items():
        torch.manual_seed(0)
        model, extractor = make()
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        extractor.save_pretrained(folders[name])
    yield folders
    logging.enable_progress_bar()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.02


def padded(*lengths: int, total: int = RATE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clips (B, 1, L) of such lengths, zeros behind them, and the mask (B, L)."""
    mask = torch.arange(total) < torch.tensor(lengths)[:, None]
    return noise(len(lengths), 1, total, seed=seed) * mask[:, None], mask


# ---- pooling


def test_pooling_by_hand():
    """Window 8, stride 4; the first and the last feature are repeated twice."""
    features = torch.arange(1.0, 17.0).view(1, 16, 1)  # 4 frames at 50 Hz over 12.5 Hz
    pooled = pool(features, 4, 4.0)[0, :, 0]
    expected = [
        (1 + 1 + 1 + 2 + 3 + 4 + 5 + 6) / 8,
        (3 + 4 + 5 + 6 + 7 + 8 + 9 + 10) / 8,
        (7 + 8 + 9 + 10 + 11 + 12 + 13 + 14) / 8,
        (11 + 12 + 13 + 14 + 15 + 16 + 16 + 16) / 8,
    ]
    assert pooled.tolist() == expected


def test_pooling_is_centred_on_the_frame():
    """A feature equally far from both ends of a frame's window is that frame's middle: no delay, no lead."""
    ramp = (torch.arange(400.0) + 0.5).view(1, 400, 1) / 4  # time in frames
    pooled = pool(ramp, 100, 4.0)[0, 1:-1, 0]
    torch.testing.assert_close(pooled, torch.arange(1.0, 99.0) + 0.5)


@pytest.mark.parametrize("frames", [1, 2, 13, 150])
@pytest.mark.parametrize("missing", [0, 1, -1])
def test_pooling_keeps_constants_and_gives_every_frame(frames, missing):
    features = torch.full((2, max(1, 4 * frames - missing), 3), 7.0)
    pooled = pool(features, frames, 4.0)
    assert pooled.shape == (2, frames, 3)
    torch.testing.assert_close(pooled, torch.full_like(pooled, 7.0))


def test_pooling_takes_a_teacher_that_gives_a_little_less_than_its_rate():
    """WavLM gives 599 features of 12 s: 49.9 Hz, 3.993 for each frame."""
    ramp = (torch.arange(599.0) + 0.5).view(1, 599, 1) / 4
    pooled = pool(ramp, 150, 599 * 1920 / (12 * RATE))[0, :, 0]
    torch.testing.assert_close(pooled[1:-1], torch.arange(1.0, 149.0) + 0.5)
    repeated = [594, 595, 596, 597, 598, 598, 598, 598]
    torch.testing.assert_close(pooled[-1], ramp[0, repeated, 0].mean())


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_pooling_at_other_whole_ratios(ratio):
    pooled = pool(torch.arange(10.0 * ratio).view(1, -1, 1), 10, float(ratio))[0, :, 0]
    assert pooled.shape == (10,)
    torch.testing.assert_close(pooled.diff()[1:-1], torch.full((7,), float(ratio)))


@pytest.mark.parametrize("ratio", [0.1, 0.7, 1.5, 2.3, 3.6])
def test_rates_that_do_not_fit_are_refused(ratio):
    with pytest.raises(ValueError, match=f"{ratio:.2f} features per frame"):
        pool(torch.zeros(1, round(100 * ratio), 1), 100, ratio)


# ---- the loss


def identity(width: int) -> Distillation:
    distillation = Distillation(width, width)
    nn.init.eye_(distillation.projection.weight)
    return distillation


@pytest.mark.parametrize(
    ("target", "loss"),
    [((3.0, 0.0), 0.0), ((0.0, 5.0), 1.0), ((-0.5, 0.0), 2.0), ((1.0, 1.0), 1 - math.sqrt(0.5))],
)
def test_distillation_is_one_minus_the_cosine(target, loss):
    student = torch.tensor([[[2.0, 0.0]]])
    assert identity(2)(student, torch.tensor([[target]])).item() == pytest.approx(loss, abs=1e-6)


def test_distillation_averages_frames_of_the_clips():
    student = torch.tensor([[[1.0, 0.0]] * 3, [[1.0, 0.0]] * 3])
    target = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    assert identity(2)(student, target, mask).item() == pytest.approx(((0 + 2) / 2 + 1) / 2)


def test_the_projection_is_one_linear_map_without_bias_on_the_students_side():
    distillation = Distillation(256, 1024)
    assert {name: tuple(p.shape) for name, p in distillation.named_parameters()} == {"projection.weight": (1024, 256)}


# ---- teachers


def test_teachers_are_frozen_and_in_no_state_dict(saved):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = Teacher(TeacherConfig(saved["wavlm"]))
            self.distillation = Distillation(4, self.teacher.hidden_size)

    holder = Holder().train()
    assert list(holder.state_dict()) == ["distillation.projection.weight"]
    assert len(list(holder.parameters())) == 1
    assert not any(module.training for module in holder.teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in holder.teacher.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_teachers_say_what_they_hear_and_give(saved, kind):
    teacher = Teacher(TeacherConfig(saved[kind]))
    assert teacher.sampling_rate == HEARD
    assert teacher.hidden_size == WIDTH
    assert teacher.differentiable == (kind != "w2v_bert")
    features = teacher.features(noise(2, 1, 2 * RATE), RATE)
    assert features.dtype == torch.float32
    assert features.shape == (2, 100 if kind == "whisper" else 99, WIDTH)
    assert pool(features, 25, features.shape[1] * 1920 / (2 * RATE)).shape == (2, 25, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_model_behind_its_own_extractor(saved, kind):
    """At the teacher's own rate, on 2 s, Whisper's whole window."""
    teacher = Teacher(TeacherConfig(saved[kind]))
    audio = noise(2, 1, 2 * HEARD)
    inputs = teacher.extractor(list(audio[:, 0].numpy()), sampling_rate=HEARD, return_tensors="pt")
    torch.testing.assert_close(
        teacher.features(audio, HEARD), teacher.model(**inputs).last_hidden_state, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_features_follow_a_resampled_clip(saved, kind):
    """At 24 kHz they are those of the clip at 16 kHz."""
    teacher = Teacher(TeacherConfig(saved[kind]))
    audio = noise(1, 1, 2 * RATE)
    low = resample(audio, RATE, HEARD)
    torch.testing.assert_close(teacher.features(audio, RATE), teacher.features(low, HEARD))


def test_normalised_waves_are_the_extractors_own(saved):
    """Padding does not enter the mean or the variance, and stays zero."""
    teacher = Teacher(TeacherConfig(saved["wavlm"]))
    wave, lengths = noise(2, 8000), torch.tensor([8000, 5000])
    inputs = teacher._inputs(wave, lengths)
    clips = [clip[:length].numpy() for clip, length in zip(wave, lengths, strict=True)]
    expected = teacher.extractor(clips, sampling_rate=HEARD, padding=True, return_tensors="pt")
    assert inputs.keys() == expected.keys() == {"input_values", "attention_mask"}
    torch.testing.assert_close(inputs["input_values"], expected["input_values"], rtol=1e-4, atol=1e-5)
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"].long())


def test_without_an_attention_mask_each_clip_is_normalised_as_if_alone(saved):
    """The extractor's own would take the padding in: features of a clip would depend on its batch."""
    teacher = Teacher(TeacherConfig(saved["hubert"]))
    wave, lengths = noise(2, 8000), torch.tensor([8000, 5000])
    inputs = teacher._inputs(wave, lengths)
    assert inputs.keys() == {"input_values"}
    for row, clip, length in zip(inputs["input_values"], wave, lengths, strict=True):
        alone = teacher.extractor(clip[:length].numpy(), sampling_rate=HEARD, return_tensors="pt")["input_values"][0]
        torch.testing.assert_close(row[:length], alone, rtol=1e-4, atol=1e-5)
        assert not row[length:].any()


def test_waves_are_left_as_they_are_where_the_extractor_leaves_them(saved):
    teacher = Teacher(TeacherConfig(saved["wav2vec2"]))
    wave = noise(2, 800)
    inputs = teacher._inputs(wave, torch.tensor([800, 800]))
    assert inputs.keys() == {"input_values"}
    assert torch.equal(inputs["input_values"], wave)


def test_features_of_a_padded_clip_are_those_of_the_clip_alone(saved):
    """With an attention mask; up to the last feature, whose window reaches over the end."""
    teacher = Teacher(TeacherConfig(saved["wavlm"]))
    audio, mask = padded(RATE, RATE // 2)
    together = teacher.features(audio, RATE, mask)[1:]
    alone = teacher.features(audio[1:, :, : RATE // 2], RATE)
    assert alone.shape[1] == 24
    torch.testing.assert_close(together[:, :20], alone[:, :20], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_features_span_the_window_even_if_no_clip_fills_it(saved, kind):
    """So that they lie on the codec's frames whatever the clips of a batch are."""
    teacher = Teacher(TeacherConfig(saved[kind]))
    audio, mask = padded(RATE // 2, RATE // 3)
    full = teacher.features(audio, RATE)
    features = teacher.features(audio, RATE, mask)
    assert features.shape == full.shape
    assert pool(features, 13, features.shape[1] * 1920 / RATE).shape == (2, 13, WIDTH)


@pytest.mark.parametrize("samples", [2 * HEARD, HEARD, 9_600])
def test_whispers_spectrum_is_the_extractors_own(saved, samples):
    """Without the padding to the whole window, and its reflection at the end; each clip from its own loudest down."""
    teacher = Teacher(TeacherConfig(saved["whisper"]))
    wave = noise(2, samples) * torch.tensor([[1.0], [1e-4]])
    ours = teacher._whisper_log_mel(wave)
    theirs = teacher.extractor(list(wave.numpy()), sampling_rate=HEARD, return_tensors="pt")["input_features"]
    frames = samples // 160
    assert ours.shape == (2, 80, frames)
    assert theirs.shape == (2, 80, 200)
    whole = samples == 2 * HEARD
    compared = frames if whole else frames - 2
    torch.testing.assert_close(ours[..., :compared], theirs[..., :compared], rtol=1e-3, atol=1e-3)


def test_whispers_position_table_is_cut_to_the_clip(saved):
    teacher = Teacher(TeacherConfig(saved["whisper"]))
    table = teacher.model.embed_positions.weight.clone()
    for samples, frames in ((HEARD, 50), (2 * HEARD, 100), (HEARD + 1, 51), (320, 1), (2 * HEARD, 100)):
        assert teacher.features(noise(1, 1, samples), HEARD).shape == (1, frames, WIDTH)
        assert torch.equal(teacher.model.embed_positions.weight, table[:frames])
        assert not teacher.model.embed_positions.weight.requires_grad


def test_audio_that_whisper_cannot_hear_at_once_is_refused(saved):
    teacher = Teacher(TeacherConfig(saved["whisper"]))
    with pytest.raises(ValueError, match=r"at most 2 s.*data\.segment_s"):
        teacher.features(noise(1, 1, 2 * HEARD + 1), HEARD)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_that_hidden_state(saved, kind):
    audio = noise(1, 1, 2 * HEARD)
    default = Teacher(TeacherConfig(saved[kind]))
    states = default.model(
        **default._inputs(audio[:, 0], torch.tensor([2 * HEARD])), output_hidden_states=True
    ).hidden_states
    assert len(states) == LAYERS + 1
    for layer in range(LAYERS + 1):
        features = Teacher(TeacherConfig(saved[kind], layer=layer)).features(audio, HEARD)
        assert torch.equal(features, states[layer])
    assert not torch.equal(states[0], states[1])


@pytest.mark.parametrize("layer", [-1, LAYERS + 1])
def test_a_layer_out_of_range_is_refused(saved, layer):
    with pytest.raises(ValueError, match=rf"teacher\.layer must be from 0 to {LAYERS}.*got {layer}"):
        Teacher(TeacherConfig(saved["wavlm"], layer=layer))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "w2v_bert"])
def test_gradients_reach_the_audio_and_not_the_teacher(saved, kind):
    teacher = Teacher(TeacherConfig(saved[kind]))
    audio = noise(1, 1, RATE).requires_grad_()
    teacher.features(audio, RATE).square().mean().backward()
    assert audio.grad.abs().max() > 0
    assert torch.isfinite(audio.grad).all()
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_gradients_are_finite_where_the_audio_is_silent(saved):
    for kind in ("wavlm", "whisper"):
        audio = torch.zeros(1, 1, RATE, requires_grad=True)
        Teacher(TeacherConfig(saved[kind])).features(audio, RATE).square().mean().backward()
        assert torch.isfinite(audio.grad).all()
