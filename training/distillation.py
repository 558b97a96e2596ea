"""Distillation: the semantic codebook learns the features of a speech encoder (Moshi §3.3.3).

`B` clips, `L` samples, `T` frames of the codec, `T'` and `H` frames and width of the teacher's features, `Q` width of
a codebook entry.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, cosine_similarity, pad
from transformers import AutoFeatureExtractor, AutoModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from .config import TeacherConfig
from .spectral import masked_mean, resample


class Teacher:
    """A frozen speech encoder: WavLM, HuBERT, wav2vec 2.0, w2v-BERT, Whisper's encoder, or another of their form.

    Not a module, so it appears in no state dict, no optimizer and no `train()`.
    """

    def __init__(self, config: TeacherConfig, device: torch.device | str = "cpu"):
        """Load it; `OSError` of transformers if there is none."""
        self.extractor = AutoFeatureExtractor.from_pretrained(config.pretrained, revision=config.revision)
        model = AutoModel.from_pretrained(config.pretrained, revision=config.revision, dtype=torch.float32)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model = model.eval().requires_grad_(False).to(device)
        self.layer = config.layer
        layers = self.model.config.num_hidden_layers
        if self.layer is not None and not 0 <= self.layer <= layers:
            raise ValueError(f"teacher.layer must be from 0 to {layers} for {config.pretrained}, got {self.layer}.")

    @property
    def sampling_rate(self) -> int:
        """Rate of the audio that the teacher hears, in Hz."""
        return self.extractor.sampling_rate

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.model.config.hidden_size

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the audio through `features`."""
        return isinstance(self.extractor, (Wav2Vec2FeatureExtractor, WhisperFeatureExtractor))

    def features(self, audio: Tensor, sampling_rate: int, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T', H) of waves (B, 1, L) at `sampling_rate` Hz; `mask` (B, L) is true on the clip."""
        wave = resample(audio.squeeze(1), sampling_rate, self.sampling_rate)
        if mask is None:
            lengths = torch.full((wave.shape[0],), wave.shape[1], device=wave.device)
        else:
            lengths = (mask.sum(1) * self.sampling_rate / sampling_rate).long().clamp(min=1)
        inputs = self._inputs(wave, lengths)
        output = self.model(**inputs, output_hidden_states=self.layer is not None)
        features = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        return features.float()

    def _inputs(self, wave: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """What the model takes, of waves (B, L) at its own rate."""
        if isinstance(self.extractor, Wav2Vec2FeatureExtractor):
            inside = torch.arange(wave.shape[1], device=wave.device) < lengths[:, None]
            if self.extractor.do_normalize:
                mean = (wave * inside).sum(1, keepdim=True) / lengths[:, None]
                variance = ((wave - mean).square() * inside).sum(1, keepdim=True) / lengths[:, None]
                wave = torch.where(inside, (wave - mean) / (variance + 1e-7).sqrt(), 0)
            masked = {"attention_mask": inside.long()} if self.extractor.return_attention_mask else {}
            return {"input_values": wave, **masked}
        if isinstance(self.extractor, WhisperFeatureExtractor):
            return {"input_features": self._whisper_log_mel(wave)}
        clips = [clip[:length].detach().cpu().numpy() for clip, length in zip(wave, lengths.tolist(), strict=True)]
        # one more, as long as the window, so that features are padded to what the window would give
        clips.append(torch.zeros(wave.shape[1]).numpy())
        inputs = self.extractor(clips, sampling_rate=self.sampling_rate, padding=True, return_tensors="pt")
        return {name: value[:-1].to(wave.device) for name, value in inputs.items()}

    def _whisper_log_mel(self, wave: Tensor) -> Tensor:
        """Log-mel frames (B, M, 2 T') of waves (B, L) as they are, without the padding to 30 s.

        Differentiable, which the extractor's own is not; the encoder's table of positions is cut to match.
        """
        extractor = self.extractor
        step = 2 * extractor.hop_length
        wave = pad(wave.float(), (0, -wave.shape[1] % step))
        self._cut_positions(wave.shape[1] // step)
        window = torch.hann_window(extractor.n_fft, device=wave.device)
        spectrum = torch.stft(wave, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)
        power = spectrum[..., :-1].real.square() + spectrum[..., :-1].imag.square()
        filters = torch.tensor(extractor.mel_filters, dtype=torch.float32, device=wave.device)
        log_mel = (filters.T @ power).clamp(min=1e-10).log10()
        return (log_mel.maximum(log_mel.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0

    def _cut_positions(self, frames: int) -> None:
        """Let Whisper's encoder take `frames` frames: the first rows of its table, which it otherwise insists on."""
        encoder = self.model
        if not hasattr(self, "_positions"):
            self._positions = encoder.embed_positions.weight.detach()
        if frames > len(self._positions):
            limit = len(self._positions) * 2 * self.extractor.hop_length / self.sampling_rate
            raise ValueError(f"The teacher hears at most {limit:g} s at a time: lower data.segment_s.")
        if encoder.config.max_source_positions != frames:
            encoder.config.max_source_positions = frames
            encoder.embed_positions = nn.Embedding.from_pretrained(self._positions[:frames], freeze=True)


def pool(features: Tensor, frames: int, features_per_frame: float) -> Tensor:
    """Teacher's features (B, T', H) averaged to the codec's frames, (B, T, H); not causal (Moshi §3.3.3).

    At 50 Hz over 12.5 Hz the window is 8 features wide and moves by 4: half a frame before, half a frame after.
    The ends are repeated.

    Args:
        features: what the teacher says.
        frames: T.
        features_per_frame: features per frame of audio, a whole number but for what a front end loses at the ends.

    Raises:
        ValueError: the teacher's rate is not a multiple of the codec's.
    """
    ratio = round(features_per_frame)
    # a front end without padding loses a feature or two at the ends; another rate loses more and more
    if ratio < 1 or abs(features_per_frame - ratio) * frames > 2.5:
        raise ValueError(
            f"The teacher gives {features_per_frame:.2f} features per frame of the codec: "
            "choose one whose rate is a whole multiple of the codec's."
        )
    left = ratio // 2
    missing = (frames + 1) * ratio - features.shape[1] - left
    x = pad(features.transpose(1, 2), (left, max(missing, 0)), mode="replicate")[..., : (frames + 1) * ratio]
    return avg_pool1d(x, 2 * ratio, ratio).transpose(1, 2)


class Distillation(nn.Module):
    """One linear map from the semantic branch's quantized vectors to the teacher's width, and the cosine there.

    The map has no bias and is on the student's side only: on the teacher's side it could map all to one point.
    """

    def __init__(self, codebook_dim: int, teacher_size: int):
        super().__init__()
        self.projection = nn.Linear(codebook_dim, teacher_size, bias=False)

    def forward(self, semantic_quantized: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over frames of 1 - cosine, a scalar in [0, 2], of (B, T, Q) and (B, T, H); `mask` (B, T)."""
        student = self.projection(semantic_quantized).float()
        return masked_mean(1 - cosine_similarity(student, target.float(), dim=-1), mask)


def feature_reconstruction(real: Tensor, fake: Tensor, mask: Tensor | None = None) -> Tensor:
    """L1 between the teacher's features (B, T', H) of audio and reconstruction; `mask` (B, T')."""
    return masked_mean((fake - real.detach()).abs(), mask)


def frames_inside(mask: Tensor, frames: int) -> Tensor:
    """(B, L) to (B, `frames`): true where a frame's middle lies on the clip."""
    length = mask.shape[1]
    middle = (torch.arange(frames, device=mask.device) + 0.5) * (length / frames)
    return middle < mask.sum(1, keepdim=True)
