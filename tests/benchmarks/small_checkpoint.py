"""
How fast the bundled checkpoint is on one CPU core: live, frame by frame, and on whole clips.

    python tests/benchmarks/small_checkpoint.py [MODEL] [-o MODEL/benchmark.json]

Quality is measured by `mimi evaluate`. Run this on a quiet machine; the model card shows what `-o` writes.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import soundfile
import torch
import transformers
from torch import Tensor

from modeling_mimi import MimiModel

ROOT = Path(__file__).parents[2]
SECONDS = 30
THREADS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "checkpoints" / "mimi_small"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write the measurements as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    model = MimiModel.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    clips = [
        torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in (ROOT / "tests/data").glob("*.flac")
    ]
    audio = torch.cat(clips * 10)[: SECONDS * model.config.sampling_rate].to(model.dtype)[None, None]
    with torch.inference_mode():
        live, whole = measure_live(model, audio), measure_whole(model, audio)
    print(f"{Path(arguments.model).name}, {arguments.dtype}, one thread, {SECONDS} s of speech")
    print(
        f"live: {live['p50_ms']:.1f} ms (p50), {live['p99_ms']:.1f} ms (p99) per {live['frame_ms']:.0f} ms frame, "
        f"{live['times_real_time']:.1f} x real time"
    )
    rates = whole["encode_times_real_time"], whole["decode_times_real_time"]
    print(f"whole: encode {rates[0]:.0f}, decode {rates[1]:.0f} x real time")
    if arguments.output:
        found = {"seconds": SECONDS, "dtype": arguments.dtype, "live": live, "whole": whole}
        write(arguments.output, {"command": command(), **found, **surroundings()})


def measure_live(model: MimiModel, audio: Tensor) -> dict[str, float]:
    """Frames there and back, one at a time, of audio (1, 1, L)."""
    stream, times = model.stream(), []
    for frame in audio.split(model.config.frame_size, -1):
        start = time.perf_counter()
        stream.decode(stream.encode(frame))
        times.append(1000 * (time.perf_counter() - start))
    times = sorted(times[10:])
    p50, frame_ms = statistics.median(times), 1000 / model.config.frame_rate
    p99 = times[int(0.99 * len(times))]
    return {"frame_ms": frame_ms, "p50_ms": p50, "p99_ms": p99, "times_real_time": frame_ms / p50}


def measure_whole(model: MimiModel, audio: Tensor) -> dict[str, float]:
    """All of audio (1, 1, L) at once, encoded and decoded five times."""
    encode, decode = [], []
    for _ in range(5):
        start = time.perf_counter()
        codes = model.encode(audio).audio_codes
        middle = time.perf_counter()
        model.decode(codes)
        encode.append(middle - start)
        decode.append(time.perf_counter() - middle)
    seconds = audio.shape[-1] / model.config.sampling_rate
    return {
        "encode_times_real_time": seconds / statistics.median(encode),
        "decode_times_real_time": seconds / statistics.median(decode),
    }


def command() -> str:
    """What was typed, without the folders of this machine."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", Path(__file__).relative_to(ROOT).as_posix(), *words])


def surroundings() -> dict[str, Any]:
    """What the figures hold for."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "machine": {"processor": processor, "cpus": os.cpu_count(), "threads": THREADS},
        "versions": {**versions, "transformers": transformers.__version__},
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """As a whole, or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
