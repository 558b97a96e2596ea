"""
How many hours of audio become tokens in an hour: `mimi tokenize` beside a plain loop over stock transformers.

    python tests/benchmarks/corpus_tokens.py                       # two CPU threads, about 10 minutes
    python tests/benchmarks/corpus_tokens.py --device cuda         # one GPU
    python tests/benchmarks/corpus_tokens.py --only memory --hours 100

`corpus`: files to parquet, all of it, beside the model's own encode of the same clips in memory and beside stock; and
where the time goes. `memory`: a synthetic corpus through all but the model. Medians; what is compared takes turns. Run
it on a quiet machine. On a GPU, `gpu.py` measures the model alone.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import soxr
import torch
import transformers
from codecs_under_test import FRAME, NUM_QUANTIZERS, random_model, real_speech
from cpu import table, take_turns
from datasets import Features, Value

from modeling_mimi import MimiConfig, MimiModel
from training.config import SourceConfig
from training.corpus.coverage import Coverage
from training.corpus.encoding import Encoded, Encoder
from training.corpus.reading import Layout, Loaded, blocks, num_frames
from training.corpus.shards import Shards, shard_paths, token_features
from training.corpus.source import Corpus
from training.corpus.tokenize import layout_for, window_frames
from training.corpus.walk import Work, run
from training.corpus.windows import windows
from training.sources import Reference

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "checkpoints" / "mimi_small"
RATE = 24_000
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["float32", "bfloat16", "float16"]}


def main() -> None:
    parts = {"corpus": corpus, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=parts, default=["corpus"])
    parser.add_argument("--minutes", type=float, help="audio of `corpus` (default: 4 on a CPU, 600 on a GPU)")
    parser.add_argument("--batch-seconds", type=float, help="audio of a batch (default: that of `mimi tokenize`)")
    parser.add_argument("--hours", type=float, default=100, help="audio of `memory` (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, help="also write the measurements as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options.minutes = options.minutes or {"cpu": 4, "cuda": 600}[options.device]
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} CPU threads"
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    print(f"{name}, {options.workers} workers, {versions}")
    with torch.inference_mode():
        results = {part: parts[part](options) for part in options.only}
    if options.output:
        options.output.write_text(json.dumps({"device": name, "versions": versions, **results}, indent=2))


def full_size(dtype: str, device: str, folder: Path) -> tuple[MimiModel, torch.nn.Module]:
    """The released architecture with random weights, ours and stock's."""
    if not (folder / "full").exists():
        random_model(NUM_QUANTIZERS).save_pretrained(folder / "full")
    return load(folder / "full", dtype, device)


def load(path: Path, dtype: str, device: str) -> tuple[MimiModel, torch.nn.Module]:
    kinds = (MimiModel, transformers.MimiModel)
    ours, stock = (kind.from_pretrained(path, dtype=getattr(torch, dtype)).eval().to(device) for kind in kinds)
    return ours, stock


# ---- from files to parquet


def corpus(options: argparse.Namespace) -> list[dict]:
    """Files to parquet with each model and dtype, beside its bound and stock."""
    results = []
    with tempfile.TemporaryDirectory(prefix="mimi-benchmark-") as name:
        folder = Path(name)
        seconds = write_files(
            folder / "clips", options.minutes * 60, (10, 30) if options.device == "cuda" else (2, 30)
        )
        jobs = [("full size", dtype) for dtype in DTYPES[options.device]]
        jobs += [("mimi_small", "float32")]
        for model_name, dtype in jobs:
            loader = partial(load, SMALL) if model_name == "mimi_small" else partial(full_size, folder=folder)
            ours, stock = loader(dtype=dtype, device=options.device)
            results.append({"model": model_name, "dtype": dtype, **one_model(folder, ours, stock, seconds, options)})
    hours = [f"{result['speed'][way]:.0f}" for result in results for way in result["speed"]]
    ways = list(results[0]["speed"])
    rows = [hours[index : index + len(ways)] for index in range(0, len(hours), len(ways))]
    table(
        [f"{options.minutes:g} minutes of clips, hours of audio per hour", *ways, "x stock", "of the model's own, %"],
        [
            [
                f"{result['model']}, {result['dtype']}",
                *row,
                f"{result['speed'][ways[0]] / result['speed'][ways[2]]:.2f}",
                f"{100 * result['speed'][ways[0]] / result['speed'][ways[1]]:.0f}",
            ]
            for result, row in zip(results, rows, strict=True)
        ],
    )
    table(
        ["busy, % of the time", "model", "rows", "decoding", "writing", "padding, %", "bytes per second of audio"],
        [
            [
                f"{result['model']}, {result['dtype']}",
                *(f"{100 * result['work'][f'{part}_s'] / result['work']['wall_s']:.0f}" for part in PARTS),
                f"{100 * (1 - result['work']['frames'] / result['work']['padded_frames']):.1f}",
                f"{result['bytes'] / seconds:.0f}",
            ]
            for result in results
        ],
    )
    return results


PARTS = ("model", "rows", "decoding", "writing")


def write_files(folder: Path, seconds: float, limits: tuple[float, float]) -> float:
    """FLAC files of several rates, lengths between the limits; from 200 on they are links to the first ones."""
    folder.mkdir()
    speech, generator = real_speech(600)[0, 0].numpy(), np.random.default_rng(0)
    total, lengths = 0.0, []
    while total < seconds:
        index = len(lengths)
        path = folder / f"{index:06d}.flac"
        if index < 200:
            length, start = generator.uniform(*limits), generator.uniform(0, 500)
            rate = (16_000, RATE, 44_100)[index % 3]
            clip = speech[int(start * RATE) : int((start + length) * RATE)]
            soundfile.write(path, soxr.resample(clip, RATE, rate), rate)
        else:
            length = lengths[index % 200]
            os.link(folder / f"{index % 200:06d}.flac", path)
        lengths.append(length)
        total += length
    return total


def one_model(folder: Path, ours: MimiModel, stock: torch.nn.Module, seconds: float, options) -> dict:
    paths = sorted((folder / "clips").glob("*.flac"))
    works: list[Work] = []
    sizes: list[int] = []

    def tokenized() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            works.append(tokens_of(folder / "clips", Path(output), ours, options))
            sizes.append(sum(path.stat().st_size for path in shard_paths(Path(output))))

    references = [Reference(path.name, str(path), None, 0) for path in paths[:200]]
    layout = layout_for(ours, options.batch_seconds)
    clips = [np.concatenate(list(blocks(clip, ours.config)), 1) for clip in references]
    clips = sorted((clips[index % 200] for index in range(len(paths))), key=lambda clip: clip.shape[1])
    per_batch = max(1, int(layout.batch_frames * FRAME / clips[-1].shape[1]))

    def encoded() -> None:
        for start in range(0, len(clips), per_batch):
            batch = clips[start : start + per_batch]
            audio = torch.zeros(len(batch), 1, batch[-1].shape[1])
            for row, clip in zip(audio, batch, strict=True):
                row[:, : clip.shape[1]] = torch.from_numpy(clip)
            codes = ours.encode(audio.to(ours.device), num_quantizers=NUM_QUANTIZERS).audio_codes
        codes.cpu()

    sample = paths[: max(3, min(len(paths), 60))]  # a loop goes at one speed: it need not go through all

    def looped() -> None:
        for path in sample:
            audio, rate = soundfile.read(path, dtype="float32")
            audio = torch.from_numpy(soxr.resample(audio, rate, RATE))[None, None].to(ours.device, ours._dtype)
            stock.encode(audio, num_quantizers=NUM_QUANTIZERS).audio_codes.cpu()

    times = take_turns(
        {"mimi tokenize": tokenized, "our model alone": encoded, "stock, clip by clip": looped}, options.repeats
    )
    looped_s = sum(soundfile.info(path).duration for path in sample)
    audio_s = {"mimi tokenize": seconds, "our model alone": seconds, "stock, clip by clip": looped_s}
    work = sorted(works[1:], key=lambda work: work.wall_s)[(len(works) - 1) // 2]
    speed = {way: audio_s[way] / time for way, time in times.items()}
    return {"speed": speed, "work": asdict(work), "bytes": sizes[0]}


def tokens_of(source: Path, output: Path, model: MimiModel, options) -> Work:
    """What `mimi tokenize` does once the model is there."""
    found = Corpus(SourceConfig(str(source)))
    return walk(
        found, output, Encoder(model, NUM_QUANTIZERS), model.config, layout_for(model, options.batch_seconds), options
    )


def walk(found, output: Path, encoder, config: MimiConfig, layout: Layout, options) -> Work:
    coverage = Coverage()
    shards = Shards(output, "train", token_features(found.features, config.codebook_size), {})
    with ThreadPoolExecutor(options.workers) as pool:
        lengths = partial(pool.map, partial(num_frames, config))
        portion = coverage.portion(found.num_shards, 0, 1)
        rows = windows(found, coverage, portion, lengths, window_frames(config, layout))
        return run(rows, encoder, shards, config, layout, options.workers, progress=False)


# ---- memory


class Synthetic:
    """A corpus of so many hours, made as it is read: clips of half a second to 20 s, and one in 100 of 10 minutes."""

    num_shards = 1
    features = Features({"text": Value("string")})

    def __init__(self, hours: float):
        self.hours = hours
        self.speech = real_speech(600)[0, 0].numpy()

    def tables(self, shard: int) -> Iterator[pa.Table]:
        generator, total, row = np.random.default_rng(shard), 0.0, 0
        while total < 3600 * self.hours:
            seconds = [600.0 if (row + i) % 100 == 50 else generator.uniform(0.5, 20) for i in range(16)]
            yield pa.table({"seconds": seconds, "text": [f"clip {row + i}" for i in range(16)]})
            row, total = row + 16, total + sum(seconds)

    def select(self, rows: pa.Table, shard: int, start: int, wanted: np.ndarray):
        rows = rows.take(wanted - start)
        clips = []
        for number, seconds in zip(wanted, rows.column("seconds").to_pylist(), strict=True):
            file = BytesIO()
            soundfile.write(file, self.speech[: int(seconds * RATE)], RATE, format="WAV")
            clips.append(Reference(f"{number:07d}.wav", None, file.getvalue(), int(number)))
        return wanted.tolist(), clips, rows.select(["text"])


class StandIn:
    """Takes the place of the model, and watches the memory; the first part goes through the model itself."""

    def __init__(self, model: MimiModel, model_s: float):
        self.encoder = Encoder(model, NUM_QUANTIZERS)
        self.config = model.config
        self.model_s = model_s
        self.audio_s = self.busy_s = 0.0
        self.long: dict[int, int] = {}
        self.rss: list[tuple[float, float]] = []

    def step(self, loaded: Loaded) -> list[Encoded]:
        before = self.audio_s
        self.audio_s += sum(clip.shape[1] for clip in loaded.audio.values()) / RATE
        if self.audio_s // 3600 > before // 3600:
            self.rss.append((self.audio_s / 3600, rss_mb()))
        if before < self.model_s or self.encoder._long:
            return self.encoder.step(loaded)
        samples = {index: clip.shape[1] for index, clip in loaded.audio.items()}
        if loaded.batch.is_long:
            (index,) = loaded.batch.clips
            samples = {index: self.long.pop(index, 0) + samples.get(index, 0)}
            if not loaded.is_last:
                self.long |= samples
                return []
        shape = {index: (NUM_QUANTIZERS, self.config.num_frames(count)) for index, count in samples.items()}
        codes = {index: np.zeros(size, dtype=np.int32) + index % 2048 for index, size in shape.items()}
        padded = sum(frames for _, frames in shape.values())
        return [Encoded(loaded.batch, codes, samples, loaded.reasons, padded)]

    def finish(self) -> list[Encoded]:
        return self.encoder.finish()


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(options: argparse.Namespace) -> dict:
    """Resident memory while many hours go through reading, batching and writing."""
    model = MimiModel.from_pretrained(SMALL).eval()
    stand_in = StandIn(model, model_s=120)
    layout = layout_for(model, options.batch_seconds)
    with tempfile.TemporaryDirectory(prefix="mimi-benchmark-") as folder:
        work = walk(Synthetic(options.hours), Path(folder), stand_in, model.config, layout, options)
        size = sum(path.stat().st_size for path in shard_paths(Path(folder)))
    tenth = max(1, len(stand_in.rss) // 10)
    rows = [[f"{hours:.0f}", f"{rss:.0f}"] for hours, rss in stand_in.rss[::tenth]]
    table(["hours done", "resident memory, MB"], rows)
    print(f"{work}; {work.clips} clips, {size / 2**20:.1f} MB written")
    return {"rss_mb": stand_in.rss, "work": asdict(work)}


if __name__ == "__main__":
    main()
