"""
Live streams on the device: the latency of one, and how many hold real time together.

A step takes an 80 ms frame of each stream from the host's memory, encodes and decodes it, and brings codes and audio
back to the host: all of it is timed. A graph's steps run over states that stay where they are.
"""

import time
from collections.abc import Callable
from itertools import cycle, islice

import torch
from codecs_under_test import FRAME, NUM_QUANTIZERS, real_batch
from gpu_bench import Bench, Graph, percentile, precision
from gpu_clips import check_replay
from gpu_floor import step_floor_s
from torch import Tensor

FRAME_MS = 80
BEFORE = 130  # frames that fill the window of attention
Step = Callable[[Tensor], tuple[Tensor, Tensor]]


class LiveStep:
    """Ours: the steps of both directions, on states that stay where they are."""

    def __init__(self, bench: Bench, name: str, streams: int, compiled: bool = False):
        model = bench.model(name)
        self.device = bench.device
        self.states = model.new_encoder_state(streams, 1), model.new_decoder_state(streams, 1)
        self.tables = model.quantizer.search_tables(NUM_QUANTIZERS)
        self.frame = torch.zeros(streams, model.config.audio_channels, FRAME, device=bench.device)
        self.encode, self.decode = model.encode_frames, model.decode_frames
        if compiled:
            backend = "inductor" if bench.is_cuda else "eager"
            self.encode = torch.compile(self.encode, dynamic=False, backend=backend)
            self.decode = torch.compile(self.decode, dynamic=False, backend=backend)
        self.step: Callable[[], tuple[Tensor, Tensor]] = self._step

    def _step(self) -> tuple[Tensor, Tensor]:
        codes = self.encode(self.frame, self.states[0], self.tables)
        return codes, self.decode(codes, self.states[1])

    def __call__(self, frame: Tensor) -> tuple[Tensor, Tensor]:
        self.frame.copy_(frame)
        return self.step()

    def record(self) -> None:
        """Make a graph of it, and begin anew."""
        self.step = Graph(self._step, self.device)
        for state in self.states:
            state.reset()


def frames_of(bench: Bench, streams: int, count: int = 8) -> list[Tensor]:
    """The next frames of each stream, real speech in the host's memory, (streams, 1, 1920) each."""
    speech = real_batch(min(streams, 64), count * 0.08)[torch.arange(streams) % 64]
    frames = [frame.contiguous() for frame in speech.split(FRAME, -1)]
    return [frame.pin_memory() for frame in frames] if bench.is_cuda else frames


def _run(bench: Bench, step: Step, frames: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Codes and audio of some frames."""
    some = islice(cycle(frames), 8 if bench.tiny else 24)
    outputs = [[x.cpu() for x in step(frame.to(bench.device))] for frame in some]
    codes, audio = zip(*outputs, strict=True)
    return torch.cat(codes, -1), torch.cat(audio, -1)


def step_times(bench: Bench, step: Step, frames: list[Tensor], before: int, count: int, limit_s: float) -> list[float]:
    """Milliseconds of each of up to `count` steps, host to host, after those that are not counted."""
    codes, audio = (torch.empty_like(x, device="cpu") for x in step(frames[0].to(bench.device)))
    if bench.is_cuda:
        codes, audio = codes.pin_memory(), audio.pin_memory()
    times: list[float] = []
    for index, frame in zip(range(before + count), cycle(frames), strict=False):
        start = time.perf_counter()
        for target, output in zip((codes, audio), step(frame.to(bench.device, non_blocking=True)), strict=True):
            target.copy_(output, non_blocking=True)
        bench.wait()
        if index >= before:
            times.append(1000 * (time.perf_counter() - start))
        if sum(times) > 1000 * limit_s:
            break
    return times


def streams(bench: Bench) -> dict:
    """One stream in every way, then more and more of them; compiled at the end, if there is time."""
    one: dict[str, list[float]] = {}
    for kind in bench.kinds:
        how = "graphs of its own" if kind == "moshi" and bench.is_cuda else "eager"
        for name in ("fp32", bench.half) if kind != "ours" else bench.precisions:
            _one(bench, one, f"{kind} {name}, {how}", name, lambda k=kind, n=name: bench.codec(k, n).new_stream())
    for name in bench.precisions:
        _one(bench, one, f"ours {name}, CUDA graph", name, lambda n=name: recorded_step(bench, n, 1))
    _print_latency(bench, one)
    names = ["ours", *(kind for kind in bench.kinds if kind == "moshi")]
    probes = {kind: _most(bench, kind) for kind in names}
    many = {kind: max((n for n, times in found.items() if _holds(times)), default=0) for kind, found in probes.items()}
    print(f"streams that hold real time together: {many}")
    compiled: dict[str, list[float]] = {}
    what, name = f"ours {bench.half}, compiled, CUDA graph", bench.half
    _one(bench, compiled, what, name, lambda: recorded_step(bench, name, 1, compiled=True))
    _print_latency(bench, compiled)
    return {"one_ms": one | compiled, "many_ms": probes, "real_time": many}


def recorded_step(bench: Bench, name: str, count: int, compiled: bool = False) -> LiveStep:
    """
    A graph of the step. `Unfaithful` unless it gives on real speech what `model.stream()` gives, or, compiled, what
    the compiled step gives before it is recorded.
    """
    frames = frames_of(bench, count)
    if compiled:
        step = LiveStep(bench, name, count, compiled)
        expected = _run(bench, step, frames)
    else:  # one set of states after the other: many streams may not fit twice
        stream = bench.model(name).stream(count, NUM_QUANTIZERS, max_frames=1)
        expected = _run(bench, lambda frame: (codes := stream.encode(frame), stream.decode(codes)), frames)
        del stream
        bench.free()
        step = LiveStep(bench, name, count)
    step.record()
    for actual, reference in zip(_run(bench, step, frames), expected, strict=True):
        check_replay(actual, reference)
    for state in step.states:
        state.reset()
    return step


def _one(bench: Bench, results: dict, what: str, name: str, make: Callable[[], Step]) -> None:
    if bench.is_over(what):
        return
    with bench.attempt(what), precision(name):
        before, count = (2, 5) if bench.tiny else (BEFORE, 300)
        results[what] = step_times(bench, make(), frames_of(bench, 1), before, count, limit_s=3)


def _print_latency(bench: Bench, results: dict[str, list[float]]) -> None:
    rows = []
    for what, times in results.items():
        p50, floor_ms = percentile(times, 0.5), 1000 * step_floor_s(bench, what.split(",")[0].split()[-1], 1)
        cells = [f"{p50:.2f}", f"{percentile(times, 0.99):.2f}", f"{floor_ms:.3f}", f"{100 * floor_ms / p50:.0f}"]
        rows.append([what, str(len(times)), *cells])
    header = ["one stream, 80 ms there and back, host to host", "frames", "p50, ms", "p99, ms"]
    bench.table([*header, "floor, ms", "of the floor, %"], rows)


def _holds(times: list[float]) -> bool:
    return percentile(times, 0.99) <= FRAME_MS


def _most(bench: Bench, kind: str) -> dict[int, list[float]]:
    """Times of a step by number of streams: doubled while they hold real time, then in between, to an eighth."""
    name = bench.half if kind == "ours" else "fp32"
    found: dict[int, list[float]] = {}
    good, bad, count, most = 0, None, 1 if bench.tiny else 64, 2 if bench.tiny else 2**16
    while count <= most and (bad is None or bad - good > max(1, good // 8)):
        what = f"{kind} {name}, {count} streams"
        if bench.is_over(what):
            break
        with bench.attempt(what), precision(name):
            found[count] = _probe(bench, kind, name, count)
        bench.free()
        if count in found and _holds(found[count]):
            good = count
        else:
            bad = count
        count = 2 * count if bad is None else (good + bad) // 2
    rows = []
    for count, times in sorted(found.items()):
        p50, floor_ms = percentile(times, 0.5), 1000 * step_floor_s(bench, name, count)
        cells = [f"{p50:.1f}", f"{percentile(times, 0.99):.1f}", "yes" if _holds(times) else "no"]
        rows.append([str(count), *cells, f"{floor_ms:.2f}", f"{100 * floor_ms / p50:.0f}"])
    header = [f"streams at once, {kind} {name}, in graphs", "p50, ms", "p99, ms", f"p99 within {FRAME_MS} ms"]
    bench.table([*header, "floor, ms", "of the floor, %"], rows)
    return found


def _probe(bench: Bench, kind: str, name: str, count: int) -> list[float]:
    step = recorded_step(bench, name, count) if kind == "ours" else bench.codec(kind, name).new_stream(count)
    return step_times(bench, step, frames_of(bench, count), 3, 5 if bench.tiny else 120, limit_s=5)
