"""
One full-size Mimi with random weights, read by every implementation there is: stock, moshi, rustymimi, ours.

Random weights cost what trained ones cost. They are drawn so that attention and every codebook matter, because the
agreement between implementations and dtypes is reported, too.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from modeling_mimi import MimiConfig, MimiModel
from modeling_mimi.conversion import convert

CLIPS = Path(__file__).parent.parent / "data"
NUM_QUANTIZERS = 8
FRAME = 1920


@dataclass
class Codec:
    """
    An implementation: whole clips, (B, 1, L) to (B, K, T) and back; and streams, as many as asked for (one if nothing
    is said), whose step takes a live frame of each, (B, 1, 1920), and gives its codes and its audio.
    """

    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    new_stream: Callable[..., Callable[[Tensor], tuple[Tensor, Tensor]]]
    model: torch.nn.Module | None = None


def real_speech(seconds: float) -> Tensor:
    """The sample clips end to end, again and again, (1, 1, L) at 24 kHz."""
    clips = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in sorted(CLIPS.glob("*.flac"))])
    samples = int(seconds * 24_000)
    return torch.from_numpy(np.resize(clips, samples))[None, None]


def real_batch(clips: int, seconds: float) -> Tensor:
    """Clips from as many places of that speech, (clips, 1, L)."""
    apart, length = 7 * FRAME, int(seconds * 24_000)
    speech = real_speech(seconds + clips * apart / 24_000)[0, 0]
    return torch.stack([speech[row * apart : row * apart + length] for row in range(clips)])[:, None]


@torch.no_grad()
def random_model(num_quantizers: int = 32, **config) -> MimiModel:
    """
    The released architecture, or another, with weights that were never trained, but that treat speech as if it
    mattered.
    """
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(num_quantizers=num_quantizers, **config)).eval()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.uniform_(0.2, 0.8)
        elif ".self_attn." in name or ".mlp." in name:
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        elif name.endswith("conv.bias"):
            parameter.mul_(0.1)
    latents = model.encode(real_speech(11), output_latents=True).latents
    quantizer = model.quantizer
    for branch in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        residual = branch.project_in(latents).flatten(0, 1)
        for layer in branch.layers:
            codebook = layer.codebook
            # near what it will be asked, so that many entries get used; not too near, so that something is left
            drawn = residual[torch.randint(len(residual), (len(codebook.embed_sum),))]
            codebook.embed_sum.normal_().mul_(0.5 * residual.std(0)).add_(0.7 * drawn)
            residual = residual - codebook.centroids[torch.cdist(residual, codebook.centroids).argmin(-1)]
    return model


def ours(model: MimiModel, name: str) -> Codec:
    def new_stream(batch_size=1):
        stream = model.stream(batch_size, NUM_QUANTIZERS)

        def step(frame):
            codes = stream.encode(frame)
            return codes, stream.decode(codes)

        return step

    return Codec(
        name,
        lambda audio: model.encode(audio, num_quantizers=NUM_QUANTIZERS).audio_codes,
        lambda codes: model.decode(codes).audio_values,
        new_stream,
        model,
    )


def stock(directory: Path, dtype: torch.dtype, name: str, device: str = "cpu") -> Codec:
    """Stock transformers. Its live frames: caches for the encoder; its decoder keeps no convolution state at all."""
    import transformers

    model = transformers.MimiModel.from_pretrained(directory, dtype=dtype).eval().to(device)

    def new_stream(batch_size=1):
        cache: dict = {"encoder_past_key_values": None, "padding_cache": None}
        past = None

        def step(frame):
            nonlocal past
            encoded = model.encode(frame.to(dtype), num_quantizers=NUM_QUANTIZERS, use_streaming=True, **cache)
            cache.update({name: getattr(encoded, name) for name in cache})
            decoded = model.decode(encoded.audio_codes, decoder_past_key_values=past, use_cache=True)
            past = decoded.decoder_past_key_values
            return encoded.audio_codes, decoded.audio_values

        return step

    return Codec(
        name,
        lambda audio: model.encode(audio.to(dtype), num_quantizers=NUM_QUANTIZERS).audio_codes,
        lambda codes: model.decode(codes).audio_values,
        new_stream,
        model,
    )


def moshi(native: Path, dtype: torch.dtype = torch.float32, name: str = "moshi", device: str = "cpu") -> Codec:
    """Kyutai's PyTorch package. On a GPU its streams run as CUDA graphs of its own making."""
    from moshi.models import loaders

    def load():
        return loaders.get_mimi(native, num_codebooks=NUM_QUANTIZERS, device=device).to(dtype)

    model = load()

    def new_stream(batch_size=1):
        live = load()
        live.streaming_forever(batch_size)

        def step(frame):
            codes = live.encode(frame.to(dtype))
            return codes, live.decode(codes)

        return step

    return Codec(name, lambda audio: model.encode(audio.to(dtype)), model.decode, new_stream, model)


def rustymimi(native: Path) -> Codec:
    """Kyutai's Rust package."""
    from rustymimi import Tokenizer

    whole = Tokenizer(str(native), num_codebooks=NUM_QUANTIZERS)

    def new_stream(batch_size=1):
        live = Tokenizer(str(native), num_codebooks=NUM_QUANTIZERS)

        def step(frame):
            codes = live.encode_step(frame.numpy())
            return codes, None if codes is None else live.decode_step(codes)

        return step

    def encode(audio):
        return torch.from_numpy(whole.encode(audio.contiguous().numpy()).astype(np.int64))

    def decode(codes):
        return torch.from_numpy(whole.decode(codes.numpy().astype(np.uint32)))

    return Codec("rustymimi", encode, decode, new_stream)


def save_weights(model: MimiModel, folder: Path) -> None:
    """Write the model as `model` and, if moshi knows its architecture, as `native.safetensors`."""
    model.save_pretrained(folder / "model")
    if model.num_parameters() == 79_308_609:
        convert(folder / "model", folder / "native.safetensors")


def all_codecs() -> list[Codec]:
    """Every implementation on the same weights; stock in float32, which all ratios refer to, is the first."""
    folder = Path(tempfile.mkdtemp(prefix="mimi-benchmark-"))
    save_weights(random_model(), folder)
    half = MimiModel.from_pretrained(folder / "model", dtype=torch.bfloat16).eval()
    return [
        stock(folder / "model", torch.float32, "stock fp32"),
        stock(folder / "model", torch.bfloat16, "stock bf16"),
        moshi(folder / "native.safetensors"),
        rustymimi(folder / "native.safetensors"),
        ours(MimiModel.from_pretrained(folder / "model").eval(), "ours fp32"),
        ours(half, "ours bf16"),
    ]
