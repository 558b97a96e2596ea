"""
What one GPU gives: clips, live streams, and how far from the floor, beside stock and moshi on the same weights.

    python tests/benchmarks/gpu.py                        # an H100, 8 minutes
    python tests/benchmarks/gpu.py --only floor clips     # some of it
    python tests/benchmarks/gpu.py --device cpu --tiny    # to try the command itself, seconds on a CPU

`floor`: the measured bandwidth and matrix peak, what each part of the model needs of them, and what it takes.
`clips`: batches of clips, encode and decode, stock, moshi and ours, eager, compiled and as CUDA graphs, each at its
best batch. `agreement`: codes per level and decoder against ours in float32. `streams`: the latency of one live
stream, and how many hold real time together. `cost`: GPU-hours of a million hours of speech.

Random weights at full size, real speech. `fp32` is strict, for all; `tf32` says what the matrix units' fast form
changes. A graph is timed only if its codes are those of the calls that it recorded. Parts share the minutes: what does
not fit is left out and listed below its table, as is what fails. Run it on a GPU that nobody else uses; moshi takes
part if it is installed (`pip install --no-deps moshi einops`).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
from gpu_bench import Bench
from gpu_clips import agreement, clips
from gpu_floor import floor
from gpu_streams import streams

CORPUS_HOURS = 1_000_000


def cost(bench: Bench) -> dict:
    """GPU-hours of a corpus at the best encode of each implementation, of those that `clips` has measured."""
    speeds = bench.results.get("clips", {}).get("speeds", {})
    best: dict[str, tuple[float, str]] = {}
    for way, found in speeds.items():
        speed = max(found.get("encode", {}).values(), default=0.0)
        kind = way.split()[0]
        if speed > best.get(kind, (0.0, ""))[0]:
            best[kind] = speed, way
    if not best:
        bench.notes.append("cost: needs the part `clips` in the same run")
    rows = [
        [kind, way, f"{speed:.0f}", f"{CORPUS_HOURS / speed:.0f}"]
        for kind, (speed, way) in sorted(best.items(), key=lambda item: -item[1][0])
    ]
    bench.table(["a million hours of speech", "at", "encode, x real time", "GPU-hours (the model alone)"], rows)
    return {kind: CORPUS_HOURS / speed for kind, (speed, _) in best.items()}


PARTS = {
    "floor": (floor, 0.1),
    "clips": (clips, 0.45),
    "cost": (cost, 0.0),
    "agreement": (agreement, 0.1),
    "streams": (streams, 0.35),
}
"""What each part calls, and its share of the time. What a part leaves goes to those after it."""


def write(path: Path, results: dict) -> None:
    """Write the measurements, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=2))
    partial.replace(path)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts (default: all)")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all parts together (default: %(default)s)")
    parser.add_argument("--half", choices=("bf16", "fp16"), default="bf16", help="of `floor`, streams and compiler")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short clips, to try the command itself")
    parser.add_argument("--output", type=Path, help="also write the measurements as JSON, after each part")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; `--device cpu --tiny` tries the command without one.")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    end = time.monotonic() + 60 * options.minutes
    chosen = [name for name in PARTS if name in options.only]
    with tempfile.TemporaryDirectory(prefix="mimi-benchmark-") as folder, torch.inference_mode():
        bench = Bench(options, Path(folder))
        print(bench.title(), flush=True)
        bench.results["device"] = bench.title()
        for index, name in enumerate(chosen):
            part, share = PARTS[name]
            shares = sum(PARTS[other][1] for other in chosen[index:])
            bench.deadline = time.monotonic() + (end - time.monotonic()) * (share / shares if shares else 1)
            bench.results[name] = part(bench)
            if options.output:
                write(options.output, bench.results)
    return bench.results


if __name__ == "__main__":
    main()
