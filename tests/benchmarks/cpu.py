"""
Speed on a CPU, side by side in one run on the same weights and the same real speech.

    python tests/benchmarks/cpu.py                 # the tables of the README, about 12 minutes
    python tests/benchmarks/cpu.py --only frames   # one of them: clips, frames, honesty, batches, growth

Two threads, medians; the implementations take turns, so that a machine that slows down slows all of them. Run it on a
quiet machine. It needs `pip install --no-deps moshi rustymimi` and `pip install einops` beside the package.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from codecs_under_test import FRAME, NUM_QUANTIZERS, Codec, all_codecs, real_speech


def take_turns(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each task, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def table(header: list[str], rows: list[list[object]]) -> None:
    print("\n| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def clips(codecs: list[Codec], seconds: float = 10, repeats: int = 7) -> dict:
    """Whole clips, one at a time."""
    audio = real_speech(seconds)
    codes = codecs[0].encode(audio)
    encode = take_turns({codec.name: lambda c=codec: c.encode(audio) for codec in codecs}, repeats)
    decode = take_turns({codec.name: lambda c=codec: c.decode(codes) for codec in codecs}, repeats)
    base = codecs[0].name
    table(
        [f"{seconds:g} s clip", "encode, x real time", "x stock fp32", "decode, x real time", "x stock fp32"],
        [
            [
                name,
                f"{seconds / encode[name]:.1f}",
                f"{encode[base] / encode[name]:.2f}",
                f"{seconds / decode[name]:.1f}",
                f"{decode[base] / decode[name]:.2f}",
            ]
            for name in encode
        ],
    )
    return {"seconds": seconds, "encode_s": encode, "decode_s": decode}


def frames(codecs: list[Codec]) -> dict:
    """Live: one 80 ms frame after another through encoder and decoder, after 10.4 s that fill the window."""
    results = frame_times(codecs)
    base = results["moshi"]["p50_ms"]
    table(
        ["80 ms frame, encode + decode", "p50, ms", "p99, ms", "moshi's p50 / p50"],
        [[n, f"{r['p50_ms']:.1f}", f"{r['p99_ms']:.1f}", f"{base / r['p50_ms']:.2f}"] for n, r in results.items()],
    )
    return results


def frame_times(codecs: list[Codec], count: int = 100, before: int = 130) -> dict[str, dict[str, float]]:
    """Milliseconds of `count` frames of each codec, after those `before` that are not counted."""
    audio = real_speech((count + before) * 0.08)
    steps = {codec.name: codec.new_stream() for codec in codecs}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in audio.split(10 * FRAME, -1):  # ten frames each, for a stream does not share its caches with others
        for name, step in steps.items():
            for frame in turn.split(FRAME, -1):
                start = time.perf_counter()
                step(frame)
                times[name].append(1000 * (time.perf_counter() - start))
    times = {name: ms[before:] for name, ms in times.items()}
    return {
        name: {"p50_ms": statistics.median(ms), "p99_ms": statistics.quantiles(ms, n=100)[98]}
        for name, ms in times.items()
    }


def honesty(codecs: list[Codec], seconds: float = 24) -> dict:
    """What bfloat16 changes, and what another implementation does."""
    audio = real_speech(seconds)
    reference = next(codec for codec in codecs if codec.name == "ours fp32")
    codes = reference.encode(audio)
    decoded = reference.decode(codes).float()
    results, rows = {}, []
    for codec in codecs:
        if codec is reference:
            continue
        same = (codec.encode(audio) == codes).float().mean(dim=(0, 2))
        error = codec.decode(codes).float() - decoded
        snr = 10 * torch.log10(decoded.square().sum() / error.square().sum()).item()
        results[codec.name] = {"same_codes_per_level": same.tolist(), "decoder_snr_db": snr}
        rows.append([codec.name, *(f"{100 * share:.1f}" for share in same), f"{snr:.1f}"])
    levels = [f"level {k + 1}, %" for k in range(NUM_QUANTIZERS)]
    table([f"codes equal to ours fp32 ({seconds:g} s)", *levels, "decoder SNR, dB"], rows)
    return results


def batches(codecs: list[Codec], repeats: int = 5) -> dict:
    """Eight clips of 2 to 16 s in one padded batch, against one after another: seconds of speech per second."""
    model = next(codec for codec in codecs if codec.name == "ours fp32").model
    audio = real_speech(100)
    seconds = [2, 4, 6, 8, 10, 12, 14, 16]
    singles = [audio[..., i * 24_000 : (i + s) * 24_000] for i, s in enumerate(seconds)]
    batch = torch.cat([torch.nn.functional.pad(clip, (0, 16 * 24_000 - clip.shape[-1])) for clip in singles])
    mask = torch.arange(batch.shape[-1]) < torch.tensor([clip.shape[-1] for clip in singles])[:, None]

    def one_by_one():
        return [model.encode(clip, num_quantizers=NUM_QUANTIZERS) for clip in singles]

    times = take_turns(
        {
            "one padded batch": lambda: model.encode(batch, mask, num_quantizers=NUM_QUANTIZERS),
            "one after another": one_by_one,
        },
        repeats,
    )
    table(
        ["8 clips of 2 to 16 s, encode, ours fp32", "x real time (padding not counted)"],
        [[name, f"{sum(seconds) / value:.1f}"] for name, value in times.items()],
    )
    return {name: sum(seconds) / value for name, value in times.items()}


def growth(codecs: list[Codec]) -> dict:
    """Time and peak memory from a second to an hour, each in a process of its own."""
    results = {}
    for seconds in (1, 10, 60, 600, 3600):
        command = [sys.executable, __file__, "--growth-of", str(seconds)]
        results[seconds] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    table(
        ["length", "encode, x real time", "decode, x real time", "peak memory beyond model and audio, MB"],
        [
            [f"{s} s", f"{s / r['encode_s']:.1f}", f"{s / r['decode_s']:.1f}", f"{r['peak_mb']:.0f}"]
            for s, r in results.items()
        ],
    )
    return results


@torch.inference_mode()
def growth_of(seconds: int) -> None:
    from codecs_under_test import random_model

    def memory_mb(which: str) -> float:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[which].split()[0]) / 1024

    model, audio = random_model(NUM_QUANTIZERS), real_speech(seconds)
    codes = model.encode(audio[..., : 2 * 24_000]).audio_codes
    model.decode(codes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: making the model took more than it holds
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    codes = model.encode(audio).audio_codes
    encoded = time.perf_counter()
    decoded = model.decode(codes).audio_values
    end = time.perf_counter()
    peak = memory_mb("VmHWM") - before - decoded.nbytes / 2**20
    print(json.dumps({"encode_s": encoded - start, "decode_s": end - encoded, "peak_mb": max(0.0, peak)}))


def main() -> None:
    parts = {"clips": clips, "frames": frames, "honesty": honesty, "batches": batches, "growth": growth}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the measurements as JSON")
    parser.add_argument("--growth-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.growth_of:
        return growth_of(arguments.growth_of)
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    print(f"{arguments.threads} threads, {versions}")
    with torch.inference_mode():
        codecs = [] if arguments.only == ["growth"] else all_codecs()
        results = {name: parts[name](codecs) for name in arguments.only}
    if arguments.output:
        arguments.output.write_text(json.dumps({"versions": versions, **results}, indent=2))


if __name__ == "__main__":
    main()
