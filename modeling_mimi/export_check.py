# Copyright 2026 The open Mimi contributors
# SPDX-License-Identifier: Apache-2.0
"""What exported graphs do with real speech, beside the model: whole, and frame by frame over their state.

`B` batch, `C` audio channels, `L` samples, `T` frames, `K` codebooks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .export_graphs import Graph, State
from .modeling_mimi import MimiModel

Run = Callable[[Tensor, State], tuple[Tensor, State]]
"""A graph at work: an input and a state to an output and the next state."""
ROUNDING = 1e-5
"""Two entries are equally near if their squared distances differ by less than this share of the vectors' own."""
LEAST_SNR = 80.0
"""dB, for audio decoded in float32. Another order of sums gives about 120 dB, an error of one bit in a code 10 dB."""


def open_onnx(path: Path, graph: Graph) -> Run:
    """An ONNX file in onnxruntime, on as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        inputs = dict(zip(graph.input_names, [x.numpy(), *(tensor.numpy() for tensor in state.values())], strict=True))
        output, *after = map(torch.from_numpy, session.run(graph.output_names, inputs))
        return output, dict(zip(state, after, strict=True))

    return run


def open_torch(path: Path, graph: Graph) -> Run:
    """A program of `torch.export`."""
    module = torch.export.load(path).module()
    return module if graph.state else lambda x, state: (module(x), state)


@dataclass(frozen=True)
class Reference:
    """
    What the model itself makes of a clip: `audio` (1, C, L) of whole frames to `codes` (1, K, T), over the `latents`
    that were quantized, and these to `decoded` (1, C, L). A half that the model does not have gives `None`.
    """

    model: MimiModel
    audio: Tensor
    codes: Tensor
    latents: Tensor | None
    decoded: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: MimiModel, audio: Tensor, num_quantizers: int) -> "Reference":
        """Of whole frames of `audio`. A model without encoder is asked to decode codes drawn at random."""
        frames = audio.shape[-1] // model.config.frame_size
        audio, latents, decoded = audio[..., : frames * model.config.frame_size], None, None
        if model.encoder is not None:
            encoded = model.encode(audio, num_quantizers=num_quantizers, output_latents=True)
            codes, latents = encoded.audio_codes, encoded.latents
        else:
            generator = torch.Generator().manual_seed(0)
            codes = torch.randint(model.config.codebook_size, (1, num_quantizers, frames), generator=generator)
        if model.decoder is not None:
            decoded = model.decode(codes).audio_values
        return cls(model, audio, codes, latents, decoded)


@torch.no_grad()
def agreement(graph: Graph, run: Run, reference: Reference) -> dict:
    """
    How an exported graph compares with the model, over the clip.

    Returns, of an encoder, `codes_equal`: the share of equal codes per codebook, and `frames_wrong`: frames whose
    first different code is not one of two entries equally near; of a decoder, `snr_db`.
    """
    given = reference.audio if graph.is_encoder else reference.codes
    if graph.state:
        output = _frame_by_frame(graph, run, given)
    else:
        per_frame = given.shape[-1] // reference.codes.shape[-1]
        output, _ = run(given[..., : per_frame * (graph.max_frames or given.shape[-1])].contiguous(), {})
    length = output.shape[-1]  # the model is causal: the start of a clip is as it is without its end
    if graph.is_encoder:
        assert reference.latents is not None
        expected = reference.codes[..., :length]
        wrong = _beyond_rounding(reference.model, reference.latents[:, :length], output, expected)
        equal = (output == expected).float().mean(dim=(0, 2))
        return {"codes_equal": [round(share, 4) for share in equal.tolist()], "frames_wrong": int(wrong.sum())}
    assert reference.decoded is not None
    expected = reference.decoded[..., :length].double()
    error = (output - expected).square().sum()
    snr = 10 * torch.log10(expected.square().sum() / error).item() if error else math.inf
    return {"snr_db": round(snr, 1)}


def is_exact(result: dict) -> bool:
    """Whether a result of `agreement` is what float32 must give."""
    return result.get("frames_wrong", 0) == 0 and result.get("snr_db", math.inf) >= LEAST_SNR


def _frame_by_frame(graph: Graph, run: Run, given: Tensor) -> Tensor:
    state, outputs = graph.state, []
    for frame in given.split(graph.example.shape[-1], dim=-1):
        output, state = run(frame.contiguous(), state)
        outputs.append(output)
    return torch.cat(outputs, dim=-1)


def _beyond_rounding(model: MimiModel, latents: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """
    Frames, (B, T), where codes (B, K, T) differ though float32 could tell.

    Where a frame first differs, both entries may be equally near to what was left to quantize. The codes after it then
    belong to another residual, and say nothing.
    """
    quantizer, split = model.quantizer, model.config.num_semantic_quantizers
    wrong = torch.zeros_like(ours[:, 0], dtype=torch.bool)
    for branch, levels in (
        (quantizer.semantic_residual_vector_quantizer, slice(0, split)),
        (quantizer.acoustic_residual_vector_quantizer, slice(split, None)),
    ):
        residual = branch.project_in(latents.float()).double()
        agreed = torch.ones_like(wrong)
        for layer, a, b in zip(branch.layers, ours[:, levels].unbind(1), theirs[:, levels].unbind(1), strict=False):
            centroids = layer.codebook.centroids.double()
            gap = (residual - centroids[a]).square().sum(-1) - (residual - centroids[b]).square().sum(-1)
            scale = residual.square().sum(-1) + centroids.square().sum(-1).max()
            wrong |= agreed & (gap.abs() > ROUNDING * scale)
            agreed &= a == b
            residual = residual - centroids[b]
    return wrong
