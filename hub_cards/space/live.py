"""Live over a websocket: samples in, the codec's output back, frame by frame, a stream for each connection."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soxr
import torch
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from modeling_mimi import MimiModel

MAX_STREAMS = 4
LONGEST_MESSAGE_S = 1.0
RATES = (8_000, 192_000)


def add_live(app: FastAPI, model: MimiModel, threads: int = 2) -> None:
    """Add `/live?codebooks=K&rate=R` to an app.

    A client sends binary messages of 16-bit samples, little-endian, at `rate` Hz (8,000 to 192,000, the model's own by
    default), in pieces of any size up to a second. Once frames are complete it gets their samples, at the model's
    rate, and then `{"ms", "frames"}` as text: how long the codec took, and for how many frames. `{"error"}` comes
    before a connection is closed.
    """
    pool = ThreadPoolExecutor(threads)
    open_streams = 0

    @app.websocket("/live")
    async def live(
        socket: WebSocket, codebooks: int = model.config.num_quantizers, rate: int = model.config.sampling_rate
    ) -> None:
        nonlocal open_streams
        await socket.accept()
        if open_streams >= MAX_STREAMS:
            return await _refuse(socket, f"All {MAX_STREAMS} live lines are taken: try again in a minute.")
        if not model.config.least_quantizers <= codebooks <= model.config.num_quantizers:
            return await _refuse(socket, f"There are 1 to {model.config.num_quantizers} codebooks.")
        if not RATES[0] <= rate <= RATES[1]:
            return await _refuse(socket, f"`rate` is from {RATES[0]} to {RATES[1]} Hz, not {rate}.")
        open_streams += 1
        try:
            line = Line(model, codebooks, rate)
            while True:
                data = await socket.receive_bytes()
                if len(data) % 2 or len(data) > 2 * LONGEST_MESSAGE_S * rate:
                    return await _refuse(socket, "A message holds 16-bit samples, a second of them at most.")
                heard, facts = await asyncio.get_running_loop().run_in_executor(pool, line.pass_on, data)
                if facts["frames"]:
                    await socket.send_bytes(heard)
                    await socket.send_text(json.dumps(facts))
        except (WebSocketDisconnect, KeyError):  # a text message has no bytes
            return None
        finally:
            open_streams -= 1


class Line:
    """One person's stream, and the resampler of their microphone."""

    def __init__(self, model: MimiModel, num_quantizers: int, rate: int):
        self.frame_size = model.config.frame_size
        self.stream = model.stream(num_quantizers=num_quantizers)
        self.resampler = soxr.ResampleStream(rate, model.config.sampling_rate, 1, dtype="float32")

    @torch.inference_mode()
    def pass_on(self, data: bytes) -> tuple[bytes, dict[str, float]]:
        """16-bit samples to those that are now complete, and what it took."""
        start = time.perf_counter()
        audio = self.resampler.resample_chunk(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
        wave = self.stream.decode(self.stream.encode(torch.from_numpy(audio)[None, None]))[0, 0]
        samples = (wave.clamp(-1, 1) * 32767).round().numpy().astype("<i2")
        return samples.tobytes(), {
            "ms": 1000 * (time.perf_counter() - start),
            "frames": len(samples) // self.frame_size,
        }


async def _refuse(socket: WebSocket, reason: str) -> None:
    await socket.send_text(json.dumps({"error": reason}))
    await socket.close()
