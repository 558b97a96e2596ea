"""Small models and speech-like audio for every test, and the comparison of codes that knows about near-ties."""

import os
from typing import NoReturn

import pytest
import torch

from modeling_mimi import MimiConfig, MimiModel

torch.set_num_threads(1)  # small tensors: a second thread only waits

TINY = {
    "hidden_size": 32,
    "num_filters": 8,
    "upsampling_ratios": [4, 3, 2],
    "vector_quantization_hidden_dimension": 16,
    "codebook_size": 64,
    "num_quantizers": 4,
    "upsample_groups": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "sliding_window": 10,
}


def lacking(reason: str) -> NoReturn:
    """Skip a test for want of what pip does not install; fail it where everything is to be tested."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(reason)


def speech(samples: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    """Voiced syllables over a noise floor, (batch_size, 1, samples) at 24 kHz, peak about 0.5."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 24_000
    pitch = 90 + 120 * torch.rand(batch_size, 1, generator=generator)
    pitch = pitch * (1 + 0.1 * torch.sin(2 * torch.pi * 2.3 * time))
    phase = 2 * torch.pi * torch.cumsum(pitch, -1) / 24_000
    voice = sum(torch.sin(k * phase) / k for k in range(1, 20))
    syllables = torch.relu(torch.sin(2 * torch.pi * 3.7 * time + torch.rand(batch_size, 1, generator=generator)))
    noise = torch.randn(batch_size, samples, generator=generator)
    return (0.2 * voice * syllables + 0.02 * noise)[:, None]


@torch.no_grad()
def draw_codebooks(model: MimiModel, audio: torch.Tensor, seed: int = 0) -> MimiModel:
    """Give every codebook entries spread like what it is asked to quantize, so that all of them are in play."""
    generator = torch.Generator().manual_seed(seed)
    latents = model.encode(audio, output_latents=True).latents.float()
    for branch in (
        model.quantizer.semantic_residual_vector_quantizer,
        model.quantizer.acoustic_residual_vector_quantizer,
    ):
        residual = branch.project_in(latents).flatten(0, 1)
        for layer in branch.layers:
            codebook = layer.codebook
            drawn = torch.randn(codebook.embed_sum.shape, generator=generator)
            usage = 0.5 + 1.5 * torch.rand(codebook.cluster_usage.shape, generator=generator)
            codebook.cluster_usage.copy_(usage)
            codebook.embed_sum.copy_((residual.mean(0) + residual.std(0) * drawn) * usage[:, None])
            residual = residual - codebook.centroids[torch.cdist(residual, codebook.centroids).argmin(-1)]
    return model


def assert_same_codes(model: MimiModel, latents: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """
    Check that codes (B, K, T) differ only where float32 cannot, and return how many frames do.

    At the first level where a frame differs, both entries must be equally near to the residual, within the rounding of
    float32; what the levels after it say then follows from another residual. At most 1 frame in 100 may differ.
    """
    assert ours.shape == theirs.shape
    split = model.config.num_semantic_quantizers
    differing = torch.zeros(ours.shape[0], ours.shape[2], dtype=torch.bool)
    for branch, levels in (
        (model.quantizer.semantic_residual_vector_quantizer, slice(0, split)),
        (model.quantizer.acoustic_residual_vector_quantizer, slice(split, None)),
    ):
        residual = branch.project_in(latents.float()).double()
        undecided = torch.ones_like(differing)
        for layer, a, b in zip(branch.layers, ours[:, levels].unbind(1), theirs[:, levels].unbind(1), strict=False):
            centroids = layer.codebook.centroids.double()
            first = undecided & (a != b)
            distance_a = (residual - centroids[a]).square().sum(-1)
            distance_b = (residual - centroids[b]).square().sum(-1)
            scale = residual.square().sum(-1) + centroids.square().sum(-1).max()
            rounding = 1e-5 * scale
            assert ((distance_a - distance_b).abs() <= rounding)[first].all(), "codes differ beyond float32's rounding"
            differing |= first
            undecided &= ~first
            residual = residual - centroids[a]
    count = int(differing.sum())
    assert count <= max(1, differing.numel() // 100), f"{count} of {differing.numel()} frames differ"
    return count


@pytest.fixture
def tiny_config() -> MimiConfig:
    return MimiConfig(**TINY)


@pytest.fixture(scope="session")
def tiny_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**TINY)).eval()
    for name, parameter in model.named_parameters():  # so that the transformers have a say
        if "layer_scale" in name:
            parameter.data.fill_(0.5)
        elif ".self_attn." in name or ".mlp." in name:
            parameter.data.mul_(10)
    return draw_codebooks(model, speech(24_000)).state_dict()


@pytest.fixture
def tiny_model(tiny_config, tiny_weights) -> MimiModel:
    model = MimiModel(tiny_config).eval()
    model.load_state_dict(tiny_weights)
    return model
