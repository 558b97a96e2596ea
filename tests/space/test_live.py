"""The live line: what comes back is the stream's output, each connection has its own, and odd messages end it."""

import json

import numpy as np
import pytest
import soxr
import torch
from conftest import speech
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hub_cards.space import live

FRAME = 48


@pytest.fixture
def client(tiny_model):
    app = FastAPI()
    live.add_live(app, tiny_model)
    with TestClient(app) as client:
        yield client


def samples(count: int, seed: int) -> np.ndarray:
    return (speech(count, seed=seed)[0, 0].numpy().clip(-1, 1) * 32767).astype("<i2")


def heard(socket, message: np.ndarray) -> np.ndarray:
    socket.send_bytes(message.tobytes())
    wave = np.frombuffer(socket.receive_bytes(), "<i2")
    facts = json.loads(socket.receive_text())
    assert facts["frames"] == len(wave) / FRAME
    assert facts["ms"] > 0
    return wave


@torch.inference_mode()
def expected(model, audio: np.ndarray, num_quantizers: int) -> np.ndarray:
    stream = model.stream(num_quantizers=num_quantizers)
    wave = stream.decode(stream.encode(torch.from_numpy(audio.astype(np.float32) / 32768)[None, None]))
    return (wave[0, 0].clamp(-1, 1) * 32767).round().numpy()


def test_two_people_hear_themselves_and_nobody_else(client, tiny_model):
    anna, bert = samples(12 * FRAME, 1), samples(12 * FRAME, 2)
    with client.websocket_connect("/live?codebooks=4") as one, client.websocket_connect("/live?codebooks=2") as other:
        got = {"anna": [], "bert": []}
        for start in range(0, 12 * FRAME, 2 * FRAME):
            got["anna"].append(heard(one, anna[start : start + 2 * FRAME]))
            got["bert"].append(heard(other, bert[start : start + 2 * FRAME]))
    np.testing.assert_allclose(np.concatenate(got["anna"]), expected(tiny_model, anna, 4), atol=1)
    np.testing.assert_allclose(np.concatenate(got["bert"]), expected(tiny_model, bert, 2), atol=1)


def test_pieces_may_have_any_size(client, tiny_model):
    audio = samples(4 * FRAME, 3)
    with client.websocket_connect("/live") as socket:
        socket.send_bytes(audio[:30].tobytes())  # no frame yet, no answer
        got = [heard(socket, audio[30:100]), heard(socket, audio[100:])]
    np.testing.assert_allclose(np.concatenate(got), expected(tiny_model, audio, 4), atol=1)


def test_a_microphone_keeps_its_own_rate(client, tiny_model):
    audio = samples(40 * FRAME, 4)
    pieces = np.array_split(audio, 11)
    with client.websocket_connect("/live?rate=48000") as socket:
        for piece in pieces:
            socket.send_bytes(piece.tobytes())
        got = []
        while sum(map(len, got)) < 15 * FRAME:  # half of 40 frames, less what the resampler still holds
            got.append(np.frombuffer(socket.receive_bytes(), "<i2"))
            socket.receive_text()
    whole = soxr.resample(audio.astype(np.float32) / 32768, 48_000, 24_000)
    got = np.concatenate(got)
    np.testing.assert_allclose(got, expected(tiny_model, 32768 * whole, 4)[: len(got)], atol=2)


@pytest.mark.parametrize(
    ("address", "message", "reason"),
    [
        ("/live", b"odd", "16-bit samples"),
        ("/live", bytes(2 * 24_001), "a second of them at most"),
        ("/live?codebooks=9", None, "There are 1 to 4 codebooks."),
        ("/live?rate=400", None, "from 8000 to 192000 Hz"),
    ],
)
def test_what_is_refused(client, address, message, reason):
    with client.websocket_connect(address) as socket:
        if message is not None:
            socket.send_bytes(message)
        assert reason in json.loads(socket.receive_text())["error"]


def test_lines_are_freed_when_somebody_leaves(client, monkeypatch):
    monkeypatch.setattr(live, "MAX_STREAMS", 1)
    message = samples(FRAME, 0)
    for _ in range(3):
        with client.websocket_connect("/live") as socket:
            heard(socket, message)
            with client.websocket_connect("/live") as second:
                assert "All 1 live lines are taken" in json.loads(second.receive_text())["error"]
