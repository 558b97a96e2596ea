"""
Batches of whole clips on the device: how fast each implementation is at its best batch, and whose codes they are.

Audio and codes are on the device before the clock starts. `B` clips, `K` codebooks, `T` frames.
"""

from collections.abc import Callable
from functools import partial

import torch
from codecs_under_test import NUM_QUANTIZERS
from cpu import take_turns
from gpu_bench import Bench, Graph, Unfaithful, precision, same_codes, snr_db
from gpu_floor import direction_floor_s
from torch import Tensor

DIRECTIONS = ("encode", "decode")
CLIP_S = 20
BATCHES = (1, 4, 16, 32, 64)  # 64 clips of 20 s: near 2^31 numbers in the widest activation
LEAST_SAME, LEAST_SNR_DB = 0.99, 40

Tasks = dict[str, Callable[[Tensor], Tensor]]
Speeds = dict[tuple[str, str, str], dict[str, dict[int, float]]]
"""Kind, precision and way to direction to batch size to seconds of audio per second."""


def clip_s(bench: Bench) -> float:
    """Seconds of a clip."""
    return 0.4 if bench.tiny else CLIP_S


def recorded(task: Callable[[Tensor], Tensor], x: Tensor, bench: Bench) -> Graph:
    """The task on `x` as a graph: recorded on other numbers in its place, and checked against the task itself."""
    expected, place = task(x), torch.zeros_like(x)
    expected = expected.clone()
    graph = Graph(partial(task, place), bench.device)
    place.copy_(x)
    check_replay(graph(), expected)
    return graph


def check_replay(actual: Tensor, expected: Tensor) -> None:
    """`Unfaithful` if a replay's codes or audio are not those of the call that was recorded."""
    if expected.is_floating_point():
        if not snr_db(actual, expected) >= LEAST_SNR_DB:
            raise Unfaithful(f"a replay's audio has {snr_db(actual, expected):.1f} dB SNR against the call's")
    elif (share := (actual == expected).double().mean().item()) < LEAST_SAME:
        raise Unfaithful(f"only {100 * share:.1f} % of a replay's codes are the call's")


def clips(bench: Bench) -> dict:
    """Every implementation, precision and way at each batch size; then the compiled ones, which take longest."""
    batches = (1, 2) if bench.tiny else BATCHES
    speeds: Speeds = {}
    ways = [(kind, name, "eager") for kind in bench.kinds for name in bench.precisions if (kind, name) in _compared()]
    ways += [("ours", name, "CUDA graph") for name in bench.precisions]
    for kind, name, how in sorted(ways, key=lambda way: way[1] != bench.half):  # what matters most, first
        for direction in DIRECTIONS:
            with precision(name):
                found = _at_each_batch(bench, kind, name, how, direction, batches)
            if found:
                speeds.setdefault((kind, name, how), {})[direction] = found
    lengths = _lengths(bench, speeds)
    _compiled(bench, speeds)
    fastest = {direction: _fastest(speeds, "stock", direction) for direction in DIRECTIONS}
    rows = []
    for kind, name, how in sorted(speeds, key=lambda way: (bench.kinds.index(way[0]), way[2], way[1])):
        cells = [f"{kind} {name}, {how}"]
        for direction in DIRECTIONS:
            found = speeds[kind, name, how].get(direction)
            cells += _cells(bench, name, direction, found, fastest[direction]) if found else ["-"] * 4
        rows.append(cells)
    columns = ["x real time", "clips", "x stock's best", "of the floor, %"]
    bench.table(
        [f"clips of {clip_s(bench):g} s, each at its best batch"]
        + [f"{direction}, {column}" for direction in DIRECTIONS for column in columns],
        rows,
    )
    return {
        "clip_s": clip_s(bench),
        "speeds": {f"{kind} {name}, {how}": found for (kind, name, how), found in speeds.items()},
        "lengths": lengths,
    }


def _compared() -> set[tuple[str, str]]:
    """TF32 is measured for ours alone: the others are faster in half precision."""
    plain = {(kind, name) for kind in ("stock", "moshi", "ours") for name in ("fp32", "bf16", "fp16")}
    return plain | {("ours", "tf32")}


def _input(bench: Bench, direction: str, batch: int, seconds: float) -> Tensor:
    return bench.audio(batch, seconds) if direction == "encode" else bench.codes(batch, seconds)


def _at_each_batch(
    bench: Bench, kind: str, name: str, how: str, direction: str, batches: tuple[int, ...]
) -> dict[int, float]:
    """Seconds of audio per second by batch size, until it falls, does not fit or the time is over."""
    found: dict[int, float] = {}
    for batch in batches:
        what = f"{kind} {name}, {how}, {direction} of {batch} clips"
        if bench.is_over(what):
            break
        with bench.attempt(what):
            task = getattr(bench.codec(kind, name), direction)
            found[batch] = _speed(bench, task, how, direction, batch)
        if batch not in found or found[batch] < 0.9 * max(found.values()):
            break
    return found


def _speed(bench: Bench, task: Callable[[Tensor], Tensor], how: str, direction: str, batch: int) -> float:
    """Seconds of audio per second."""
    x = _input(bench, direction, batch, clip_s(bench))
    call = recorded(task, x, bench) if "graph" in how else partial(task, x)
    return batch * clip_s(bench) / bench.seconds(call)


def _compiled(bench: Bench, speeds: Speeds) -> None:
    """Ours through `torch.compile`, and that as a graph, at the batch that is best eagerly."""
    name, backend = bench.half, "inductor" if bench.is_cuda else "eager"
    torch.compiler.reset()
    for direction, found in speeds.get(("ours", name, "eager"), {}).items():
        batch = max(found, key=lambda size: found[size])
        what = f"ours {name}, compiled, {direction}"
        if bench.is_over(what):
            continue
        with bench.attempt(what), precision(name):
            task = torch.compile(getattr(bench.codec("ours", name), direction), dynamic=False, backend=backend)
            for how in ("compiled", "compiled, CUDA graph"):
                speed = _speed(bench, task, how, direction, batch)
                speeds.setdefault(("ours", name, how), {})[direction] = {batch: speed}
                bench.compiled[direction] = task, batch


def _fastest(speeds: Speeds, kind: str, direction: str) -> float | None:
    """Seconds of audio per second of an implementation at its best."""
    every = [max(ways[direction].values()) for way, ways in speeds.items() if way[0] == kind and direction in ways]
    return max(every, default=None)


def _cells(bench: Bench, name: str, direction: str, found: dict[int, float], stock: float | None) -> list[str]:
    batch = max(found, key=lambda size: found[size])
    floor_s = direction_floor_s(bench, direction, name, batch, clip_s(bench))
    share = floor_s * found[batch] / (batch * clip_s(bench))
    ratio = f"{found[batch] / stock:.2f}" if stock else "-"
    return [f"{found[batch]:.0f}", str(batch), ratio, f"{100 * share:.0f}"]


def _lengths(bench: Bench, speeds: Speeds) -> list[dict]:
    """Stock and ours, each at its best of `eager` and graph, in turns on clips of other lengths."""
    rows, results = [], []
    for seconds in (0.2, 0.4) if bench.tiny else (10, 20, 30):
        for direction in DIRECTIONS:
            what = f"clips of {seconds} s, {direction}"
            if bench.is_over(what):
                continue
            with bench.attempt(what):
                tasks, audio_s = {}, {}
                for kind in ("stock", "ours"):
                    task, audio_s[kind] = _best_way(bench, speeds, kind, direction, seconds)
                    tasks[kind] = task
                times = take_turns(tasks, 3)
                speed = {kind: audio_s[kind] / times[kind] for kind in tasks}
                results.append({"seconds": seconds, "direction": direction, **speed})
                cells = [f"{speed[kind]:.0f}" for kind in tasks]
                rows.append([f"{direction}, {seconds:g} s", *cells, f"{speed['ours'] / speed['stock']:.2f}"])
    bench.table(["clips of other lengths, x real time", "stock at its best", "ours at its best", "ratio"], rows)
    return results


def _best_way(
    bench: Bench, speeds: Speeds, kind: str, direction: str, seconds: float
) -> tuple[Callable[[], None], float]:
    """The fastest way of an implementation, the compiler aside, on as much audio of another length; and how much."""
    ways = {way: found[direction] for way, found in speeds.items() if way[0] == kind and direction in found}
    ways = {way: found for way, found in ways.items() if "compiled" not in way[2]}
    if not ways:
        raise RuntimeError(f"{kind} was not measured")
    way = max(ways, key=lambda way: max(ways[way].values()))
    batch = max(ways[way], key=lambda size: ways[way][size])
    batch = max(1, round(batch * clip_s(bench) / seconds))
    x, task = _input(bench, direction, batch, seconds), getattr(bench.codec(kind, way[1]), direction)
    with precision(way[1]):
        call = partial(task, x) if way[2] == "eager" else recorded(task, x, bench)

    def and_wait():
        with precision(way[1]):
            call()
        bench.wait()

    return and_wait, batch * seconds


# ---- whose codes they are


def agreement(bench: Bench) -> dict:
    """Codes per level and decoder, each against ours in strict float32 on the same device."""
    clips, seconds = (2, 0.8) if bench.tiny else (8, 24)
    rows: list[list[str]] = []
    results: dict[str, dict] = {}
    codecs = [(kind, name, "") for kind in bench.kinds for name in bench.precisions if (kind, name) in _compared()]
    codecs += [("ours", name, ", CUDA graph") for name in bench.precisions]
    codecs += [(kind, name, "") for kind in ("stock small", "small") for name in bench.precisions if name != "tf32"]
    for kind, name, how in codecs:
        if (kind, name, how) in (("ours", "fp32", ""), ("small", "fp32", "")) or bench.is_over(f"{kind} {name}{how}"):
            continue
        with bench.attempt(f"{kind} {name}{how}"), precision(name):
            codec, reference = bench.codec(kind, name), "small" if kind.endswith("small") else "ours"
            tasks = {direction: getattr(codec, direction) for direction in DIRECTIONS}
            if how:
                tasks = {direction: _replayed(task, bench) for direction, task in tasks.items()}
            found = _compare(bench, tasks, clips, seconds, reference)
            results[f"{kind} {name}{how}"] = found
    for direction, (task, batch) in bench.compiled.items():
        what = f"ours {bench.half}, compiled {direction}"
        if not bench.is_over(what):
            with bench.attempt(what), precision(bench.half):
                found = _compare(bench, {direction: task}, batch, clip_s(bench))
                results.setdefault(f"ours {bench.half}, compiled", {}).update(found)
    for what, found in results.items():
        same = [f"{100 * share:.1f}" for share in found.get("same_codes_per_level", [])] or ["-"] * NUM_QUANTIZERS
        decoder = f"{found['decoder_snr_db']:.1f}" if "decoder_snr_db" in found else "-"
        rows.append([what.replace("small", "mimi_small (trained)"), *same, decoder])
    levels = [f"level {level + 1}, %" for level in range(NUM_QUANTIZERS)]
    bench.table([f"codes equal to ours fp32 ({clips} x {seconds:g} s)", *levels, "decoder SNR, dB"], rows)
    return results


def _compare(bench: Bench, tasks: Tasks, clips: int, seconds: float, reference: str = "ours") -> dict:
    """One direction or both, against the reference on the same clips."""
    found, codes = {}, bench.codes(clips, seconds, reference)
    if "encode" in tasks:
        found["same_codes_per_level"] = same_codes(tasks["encode"](bench.audio(clips, seconds)), codes)
    if "decode" in tasks:
        found["decoder_snr_db"] = snr_db(tasks["decode"](codes), bench.decoded(clips, seconds, reference))
    return found


def _replayed(task: Callable[[Tensor], Tensor], bench: Bench) -> Callable[[Tensor], Tensor]:
    """The same through a graph, recorded when it is called."""
    return lambda x: recorded(task, x, bench)()
