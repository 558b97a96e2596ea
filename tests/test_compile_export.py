"""One graph, no device sync: `torch.compile(fullgraph=True)` and `torch.export` of both directions and of a step."""

import pytest
import torch
from conftest import assert_same_codes, speech
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_mimi.modeling_streaming import MimiDecoderStep, MimiEncoderStep

FRAME = 48
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Encode(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, audio):
        return self.model.encode(audio).audio_codes


class Decode(Encode):
    def forward(self, codes):
        return self.model.decode(codes).audio_values


@pytest.fixture
def compiled():
    torch.compiler.reset()
    # "eager" traces and guards like the default backend, without the minutes that it takes to generate C++
    yield lambda fn: torch.compile(fn, fullgraph=True, backend="eager")
    torch.compiler.reset()


@pytest.mark.parametrize("frames", [6, 30])  # one block of attention, and several
@torch.no_grad()
def test_compiles_both_directions(tiny_model, compiled, frames):
    audio = speech(frames * FRAME - 5, batch_size=2)
    codes = tiny_model.encode(audio).audio_codes
    assert compiled(Encode(tiny_model))(audio).equal(codes)
    torch.testing.assert_close(compiled(Decode(tiny_model))(codes), tiny_model.decode(codes).audio_values)


@torch.no_grad()
def test_compiles_a_padded_batch(tiny_model, compiled):
    audio, mask = speech(6 * FRAME, batch_size=2), torch.ones(2, 6 * FRAME, dtype=torch.long)
    mask[0, : 2 * FRAME + 5] = 0
    expected = tiny_model(audio, mask)
    actual = compiled(tiny_model)(audio, mask)
    assert actual.audio_codes.equal(expected.audio_codes)
    torch.testing.assert_close(actual.audio_values, expected.audio_values)


@torch.no_grad()
def test_compiles_a_streaming_step(tiny_model, compiled):
    audio = speech(12 * FRAME)
    expected = tiny_model.encode(audio).audio_codes
    encoder_state, decoder_state = tiny_model.new_encoder_state(1, 1), tiny_model.new_decoder_state(1, 1)
    encode, decode = compiled(tiny_model.encode_frames), compiled(tiny_model.decode_frames)
    codes = torch.cat([encode(part, encoder_state) for part in audio.split(FRAME, -1)], -1)
    assert codes.equal(expected)
    waves = torch.cat([decode(part, decoder_state) for part in codes.split(1, -1)], -1)
    torch.testing.assert_close(waves, tiny_model.decode(codes).audio_values, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # generates C++ for a minute
@torch.no_grad()
def test_the_default_compiler(tiny_model):
    torch.compiler.reset()
    audio = speech(12 * FRAME)
    whole = tiny_model.encode(audio, output_latents=True)
    expected = tiny_model.decode(whole.audio_codes).audio_values
    encode, decode = (torch.compile(f, fullgraph=True) for f in (tiny_model.encode_frames, tiny_model.decode_frames))
    state = tiny_model.new_encoder_state(1, 1)
    codes = torch.cat([encode(part.contiguous(), state) for part in audio.split(FRAME, -1)], -1)
    assert_same_codes(tiny_model, whole.latents, codes, whole.audio_codes)
    state = tiny_model.new_decoder_state(1, 1)
    waves = torch.cat([decode(part.contiguous(), state) for part in whole.audio_codes.split(1, -1)], -1)
    torch.testing.assert_close(waves, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_compiles_training(tiny_model, compiled):
    tiny_model.train()
    audio = speech(6 * FRAME)
    compiled(tiny_model)(audio, num_quantizers=3).audio_values.square().mean().backward()
    assert all(p.grad is not None for p in tiny_model.decoder.parameters())


@torch.no_grad()
def test_exports_both_directions(tiny_model):
    audio = speech(6 * FRAME)
    codes = tiny_model.encode(audio).audio_codes
    assert torch.export.export(Encode(tiny_model), (audio,)).module()(audio).equal(codes)
    exported = torch.export.export(Decode(tiny_model), (codes,))
    torch.testing.assert_close(exported.module()(codes), tiny_model.decode(codes).audio_values)


@torch.no_grad()
def test_exports_any_number_of_frames(tiny_model):
    frames = torch.export.Dim("frames", min=2, max=10)
    audio = speech(10 * FRAME)
    exported = torch.export.export(Encode(tiny_model), (audio,), dynamic_shapes=({2: FRAME * frames},)).module()
    for n in (2, 5, 10):
        assert exported(audio[..., : n * FRAME]).equal(tiny_model.encode(audio[..., : n * FRAME]).audio_codes)


@torch.no_grad()
def test_exports_the_streaming_step_with_its_state_as_plain_tensors(tiny_model):
    audio = speech(12 * FRAME)
    codes = tiny_model.encode(audio).audio_codes
    state = tiny_model.new_encoder_state(1, 1).tensors
    exported = torch.export.export(MimiEncoderStep(tiny_model), (audio[..., :FRAME], state)).module()
    before = {name: tensor.clone() for name, tensor in state.items()}
    steps = []
    for part in audio.split(FRAME, -1):
        step, state = exported(part, state)
        steps.append(step)
    assert torch.cat(steps, -1).equal(codes)
    assert state.keys() == before.keys()

    state = tiny_model.new_decoder_state(1, 1).tensors
    exported = torch.export.export(MimiDecoderStep(tiny_model), (codes[..., :1], state)).module()
    waves = []
    for part in codes.split(1, -1):
        wave, state = exported(part, state)
        waves.append(wave)
    torch.testing.assert_close(torch.cat(waves, -1), tiny_model.decode(codes).audio_values, rtol=1e-4, atol=1e-6)


class OnMetaAlone(TorchDispatchMode):
    """Fails where a tensor of another device takes part: made on the host, it would be sent to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{func} on {tensor.device}"
        return output


def test_nothing_waits_for_the_device(tiny_model, monkeypatch):
    """Meta tensors have no values: whatever reads one fails. So all of this can be recorded as a CUDA graph."""
    model = tiny_model.to("meta")
    monkeypatch.setattr(torch, "tensor", None)  # its values would be sent to the device
    audio, mask = torch.empty(2, 1, 30 * FRAME - 5, device="meta"), torch.ones(2, 30 * FRAME - 5, device="meta")
    tables, states = model.quantizer.search_tables(), (model.new_encoder_state(2, 1), model.new_decoder_state(2, 1))
    stream = model.stream(batch_size=2)
    with torch.no_grad(), OnMetaAlone():
        output = model(audio, mask)
        assert output.audio_values.shape == audio.shape
        codes = model.encode(audio, chunk_frames=7).audio_codes
        assert model.decode(codes, chunk_frames=7).audio_values.shape == (2, 1, 30 * FRAME)
        codes = model.encode_frames(audio[..., :FRAME], states[0], tables)
        assert model.decode_frames(codes, states[1]).shape == (2, 1, FRAME)
        for _ in range(2):
            codes = stream.encode(audio[..., :FRAME])
            assert stream.decode(codes).shape == (2, 1, FRAME)
        stream.reset()
    model.train()(audio, mask).audio_values.square().mean().backward()


def test_a_new_caller_is_sent_to_the_device_once(tiny_model, monkeypatch):
    stream, rows = tiny_model.stream(batch_size=2), []
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda tensor, index, value: rows.append(index))
    stream.reset(rows=[1])
    assert all(isinstance(index, torch.Tensor) for index in rows), "a list is sent anew for every tensor of the state"
    assert len({id(index) for index in rows}) == 2, "once for each direction"
