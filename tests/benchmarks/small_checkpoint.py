"""
How fast the bundled checkpoint is on one CPU core: live, frame by frame, and on whole clips.

    python tests/benchmarks/small_checkpoint.py [MODEL]

Quality is measured by `mimi evaluate`. Run this on a quiet machine.
"""

import argparse
import statistics
import time
from pathlib import Path

import soundfile
import torch

from modeling_mimi import MimiModel

ROOT = Path(__file__).parents[2]
SECONDS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(ROOT / "checkpoints" / "mimi_small"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = MimiModel.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    config = model.config
    clips = [
        torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in (ROOT / "tests/data").glob("*.flac")
    ]
    audio = torch.cat(clips * 10)[: SECONDS * config.sampling_rate].to(model.dtype)[None, None]
    with torch.inference_mode():
        stream, times = model.stream(), []
        for frame in audio.split(config.frame_size, -1):
            start = time.perf_counter()
            stream.decode(stream.encode(frame))
            times.append(1000 * (time.perf_counter() - start))
        times = sorted(times[10:])
        encode, decode = [], []
        for _ in range(5):
            start = time.perf_counter()
            codes = model.encode(audio).audio_codes
            middle = time.perf_counter()
            model.decode(codes)
            encode.append(middle - start)
            decode.append(time.perf_counter() - middle)
    frame_ms = 1000 / config.frame_rate
    p50, p99 = statistics.median(times), times[int(0.99 * len(times))]
    print(f"{Path(arguments.model).name}, {arguments.dtype}, one thread, {SECONDS} s of speech")
    print(
        f"live: {p50:.1f} ms (p50), {p99:.1f} ms (p99) per {frame_ms:.0f} ms frame, {frame_ms / p50:.1f} x real time"
    )
    rates = [SECONDS / statistics.median(times) for times in (encode, decode)]
    print(f"whole: encode {rates[0]:.0f}, decode {rates[1]:.0f} x real time")


if __name__ == "__main__":
    main()
