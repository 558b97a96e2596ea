"""Live streams: whatever the pieces, the result is that of the whole."""

import pytest
import torch
from conftest import assert_same_codes, speech
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FRAME = 48  # samples of a frame of the tiny model
PIECES = st.lists(st.integers(0, 7 * FRAME), min_size=1, max_size=12)
SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def pieces_of(tensor: torch.Tensor, sizes: list[int]):
    """Cut the last axis into pieces of these sizes, and what is left."""
    start = 0
    for size in sizes:
        yield tensor[..., start : start + size]
        start += size
    yield tensor[..., start:]


@SETTINGS
@given(sizes=PIECES, length=st.integers(1, 40 * FRAME))
def test_encoding_in_pieces_equals_the_whole(tiny_model, sizes, length):
    audio = speech(length)
    with torch.no_grad():
        whole = tiny_model.encode(audio, output_latents=True)
    stream = tiny_model.stream(max_frames=5)
    codes = [stream.encode(piece) for piece in pieces_of(audio, sizes)]
    codes.append(stream.flush())
    assert_same_codes(tiny_model, whole.latents, torch.cat(codes, -1), whole.audio_codes)


@SETTINGS
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), frames=st.integers(1, 60))
def test_decoding_in_pieces_equals_the_whole(tiny_model, sizes, frames):
    codes = torch.randint(64, (2, 4, frames), generator=torch.Generator().manual_seed(frames))
    with torch.no_grad():
        whole = tiny_model.decode(codes).audio_values
    stream = tiny_model.stream(batch_size=2, max_frames=5)
    audio = torch.cat([stream.decode(piece) for piece in pieces_of(codes, sizes)], -1)
    torch.testing.assert_close(audio, whole, rtol=0, atol=1e-5 * whole.abs().max().item())


def test_a_frame_comes_out_as_soon_as_it_is_in(tiny_model):
    stream = tiny_model.stream()
    audio = speech(2 * FRAME)
    assert stream.encode(audio[..., : FRAME - 1]).shape == (1, 4, 0)
    codes = stream.encode(audio[..., FRAME - 1 : FRAME])
    assert codes.shape == (1, 4, 1)
    assert stream.decode(codes).shape == (1, 1, FRAME)
    assert stream.decode(codes[..., :0]).shape == (1, 1, 0)


def test_axes_of_one_may_be_left_out(tiny_model):
    audio = speech(3 * FRAME)
    expected = tiny_model.stream().encode(audio)
    assert tiny_model.stream().encode(audio[0, 0]).equal(expected)
    assert tiny_model.stream().encode(audio[0]).equal(expected)
    assert tiny_model.stream().decode(expected[0]).equal(tiny_model.stream().decode(expected))


@SETTINGS
@given(sizes=st.lists(st.integers(0, 3 * FRAME), min_size=2, max_size=8), at=st.integers(0, 7))
def test_a_row_restarts_anywhere_while_the_others_go_on(tiny_model, sizes, at):
    """Row 1 restarts before piece `at`, in the middle of a frame or not."""
    audio = speech(sum(sizes) + FRAME, batch_size=3)
    restart = sum(sizes[:at])
    stream = tiny_model.stream(batch_size=3, max_frames=4)
    codes = []
    for i, piece in enumerate(pieces_of(audio, sizes)):
        if i == min(at, len(sizes)):
            stream.reset(rows=[1])
            before_restart = sum(c.shape[-1] for c in codes)
        codes.append(stream.encode(piece))
    codes = torch.cat([*codes, stream.flush()], -1)
    for row, begin, first in ((0, 0, 0), (1, restart, before_restart), (2, 0, 0)):
        alone = audio[row : row + 1, :, begin:]
        own = codes[row, :, first:]
        own = own[:, own[0] >= 0]
        if alone.shape[-1]:
            whole = tiny_model.encode(alone, output_latents=True)
            assert_same_codes(tiny_model, whole.latents, own[None], whole.audio_codes)
        else:
            assert own.shape[-1] == 0


def test_absent_frames_leave_a_stream_as_it_was(tiny_model):
    codes = torch.randint(64, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = tiny_model.decode(codes).audio_values
    gaps = torch.full((2, 4, 9), -1)
    gaps[0, :, [0, 2, 3, 5, 6, 8]] = codes[0]
    gaps[1, :, :6] = codes[1]
    for sizes in ([9], [1] * 9, [2, 3]):
        stream = tiny_model.stream(batch_size=2)
        audio = torch.cat([stream.decode(piece) for piece in pieces_of(gaps, sizes)], -1).unflatten(-1, (9, FRAME))
        for row in range(2):
            present = gaps[row, 0] >= 0
            torch.testing.assert_close(audio[row, :, present].flatten(1), whole[row], rtol=0, atol=1e-6)
            assert (audio[row, :, ~present] == 0).all()


def test_rows_end_alone(tiny_model):
    audio = speech(5 * FRAME, batch_size=2)
    stream = tiny_model.stream(batch_size=2)
    first = stream.encode(audio[..., : 2 * FRAME + 7])
    last = stream.flush(rows=[0])
    rest = torch.cat([stream.encode(audio[..., 2 * FRAME + 7 :]), stream.flush()], -1)
    assert (last[1] == -1).all()
    assert (rest[0] == -1).all()
    short = tiny_model.encode(audio[:1, :, : 2 * FRAME + 7]).audio_codes
    assert torch.cat([first[0], last[0]], -1).equal(short[0])
    assert torch.cat([first[1], rest[1]], -1).equal(tiny_model.encode(audio[1:]).audio_codes[0])


def test_state_is_of_fixed_size_and_in_place(tiny_model):
    stream = tiny_model.stream(batch_size=2)
    before = {name: (t.data_ptr(), t.shape) for name, t in stream._encoder_state.tensors.items()}
    before |= {"d" + name: (t.data_ptr(), t.shape) for name, t in stream._decoder_state.tensors.items()}
    for _ in range(30):
        stream.decode(stream.encode(speech(3 * FRAME + 5, batch_size=2)))
    after = {name: (t.data_ptr(), t.shape) for name, t in stream._encoder_state.tensors.items()}
    after |= {"d" + name: (t.data_ptr(), t.shape) for name, t in stream._decoder_state.tensors.items()}
    assert before == after


def test_state_can_be_saved_and_restored(tiny_model):
    audio = speech(40 * FRAME, batch_size=2)
    stream = tiny_model.stream(batch_size=2)
    stream.decode(stream.encode(audio[..., : 13 * FRAME + 5]))
    stream.reset(rows=[1])
    saved = stream.state_dict()
    expected = stream.encode(audio[..., 13 * FRAME + 5 :])
    expected_audio = stream.decode(expected)
    other = tiny_model.stream(batch_size=2)
    other.load_state_dict(saved)
    codes = other.encode(audio[..., 13 * FRAME + 5 :])
    assert codes.equal(expected)
    assert other.decode(codes).equal(expected_audio)
    with pytest.raises(ValueError, match="another model"):
        tiny_model.stream(batch_size=3).load_state_dict(saved)


def test_a_stream_that_has_run_for_months_is_as_exact_as_a_new_one(tiny_model):
    audio = speech(40 * FRAME)
    new, old = tiny_model.stream(max_frames=40), tiny_model.stream(max_frames=40)
    old._encoder_state.tensors["position"] += 100_000_000
    latents = []
    for stream in (new, old):
        stream.encode(audio)  # longer than the window: what lay before is forgotten
        latents.append(tiny_model._latents(audio, stream._encoder_state)[0])
    torch.testing.assert_close(*latents, rtol=0, atol=1e-5 * latents[0].abs().max().item())


def test_fewer_codebooks(tiny_model):
    audio = speech(5 * FRAME)
    assert tiny_model.stream(num_quantizers=2).encode(audio).equal(tiny_model.encode(audio).audio_codes[:, :2])


def test_bad_input_is_named(tiny_model):
    stream = tiny_model.stream(batch_size=2)
    with pytest.raises(ValueError, match="batch_size=2"):
        stream.encode(speech(10))
    with pytest.raises(ValueError, match="shape"):
        stream.encode(torch.zeros(2, 3, 10))
    with pytest.raises(ValueError, match="floating point"):
        stream.encode(torch.zeros(2, 1, 10, dtype=torch.int16))
    with pytest.raises(ValueError, match="0 to 63"):
        stream.decode(torch.full((2, 4, 1), 64))
    with pytest.raises(ValueError, match="`rows`"):
        stream.reset(rows=[2])
    with pytest.raises(ValueError, match="num_quantizers"):
        tiny_model.stream(num_quantizers=5)
    stream.flush()
    with pytest.raises(ValueError, match="reset"):
        stream.encode(speech(10, batch_size=2))
