"""
What a training step costs: the codec's step alone, and with the discriminator's, eager and compiled.

    python tests/benchmarks/training_step.py training/recipes/small.yaml  # a CPU, about 2 minutes
    python tests/benchmarks/training_step.py training/recipes/mimi_24khz.yaml --batch-sizes 16 32 64 --compile  # a GPU

The recipe's networks, random data and a random teacher of the size of the recipe's own, so nothing is fetched. The
variants take turns; medians. On a GPU it also gives the peak memory, the share of the matrix peak that the same run
measured, and what the recipe would cost in days of one GPU. Run it on a quiet machine.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from training.config import TrainingConfig, parse
from training.data import Batch
from training.learner import Learner

MATRIX = 8192
DAY_S = 86_400


def random_teacher(config: TrainingConfig, folder: str) -> str:
    """A teacher of the kind and size that the recipe names, with random weights."""
    if "whisper" in config.teacher.pretrained:
        sizes = {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}
        WhisperModel(WhisperConfig(**sizes, decoder_layers=1)).save_pretrained(folder)
        WhisperFeatureExtractor().save_pretrained(folder)
    else:
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        wavlm = WavLMConfig(**sizes, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=False)
        WavLMModel(wavlm).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


class Variant:
    """A learner on one batch, ready to be timed."""

    def __init__(self, name: str, config: TrainingConfig):
        self.name, self.step = name, 0
        accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
        torch.manual_seed(config.seed)
        self.device = accelerator.device
        self.learner = Learner(config, accelerator)
        samples = round(config.data.segment_s * self.learner.codec.config.sampling_rate)
        audio = 0.1 * torch.randn(config.data.batch_size, 1, samples)
        self.batch = Batch(audio, torch.ones(config.data.batch_size, samples, dtype=torch.bool))
        self.seconds = config.data.batch_size * config.data.segment_s
        self.times: list[float] = []

    def run(self) -> None:
        self.learner.step(self.step, [self.batch])
        self.step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self) -> None:
        start = time.perf_counter()
        self.run()
        self.times.append(time.perf_counter() - start)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def with_objective(config: TrainingConfig, adversarial: bool) -> TrainingConfig:
    """The recipe with the discriminator from the first step, at EnCodec's weights, or without it."""
    weights = config.objective.weights
    if not adversarial:
        weights = dataclasses.replace(weights, adversarial=0.0, feature_matching=0.0, mel=weights.mel or 2.0)
    elif not weights.adversarial:
        weights = dataclasses.replace(weights, adversarial=4.0, feature_matching=4.0)
    objective = dataclasses.replace(
        config.objective, weights=weights, discriminator_start_step=0, adversarial_start_step=0
    )
    return dataclasses.replace(config, objective=objective)


def matrix_peak(device: torch.device, precision: str) -> float:
    """Operations per second of a large square product, the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = MATRIX if device.type == "cuda" else MATRIX // 8
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def costs(variant: Variant) -> list[tuple[str, float]]:
    """The three operations that take the most of a step, with their share."""
    gpu = variant.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiled:
        variant.run()
    column = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = sorted(profiled.key_averages(), key=lambda row: -getattr(row, column))
    total = sum(getattr(row, column) for row in rows)
    return [(row.key, getattr(row, column) / total) for row in rows[:3]]


def measure(config: TrainingConfig, arguments: argparse.Namespace) -> None:
    """All variants of one batch size, as rows of a table."""
    variants = []
    for compiled in (False, True) if arguments.compile else (False,):
        model = dataclasses.replace(config.model, compile=compiled)
        for adversarial in (False, True):
            name = ("codec and discriminator" if adversarial else "codec alone") + (", compiled" if compiled else "")
            variants.append(Variant(name, dataclasses.replace(with_objective(config, adversarial), model=model)))
    for _ in range(arguments.warmup):
        for variant in variants:
            variant.run()
    for _ in range(arguments.steps):
        for variant in variants:
            variant.time()
    peak = matrix_peak(variants[0].device, config.precision)
    for variant in variants:
        with FlopCounterMode(display=False) as counter:
            variant.run()
        operations = counter.get_total_flops()
        memory = "-"
        if variant.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            variant.run()
            memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
        largest = ", ".join(f"{name} {100 * share:.0f} %" for name, share in costs(variant))
        speed = variant.seconds / variant.median
        days = config.steps * config.data.batch_size * config.data.segment_s / speed / DAY_S
        cells = (
            f"{config.data.batch_size} x {config.data.segment_s:g} s, {config.precision}",
            variant.name,
            f"{variant.median:.3f}",
            f"{speed:.1f}",
            f"{100 * operations / variant.median / peak:.0f} %",
            memory,
            f"{days:.2g}",
            largest,
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="windows per step (default: the recipe's)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="measure compiled variants, too")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    arguments = parser.parse_args()
    config = parse([arguments.recipe, "--data.sources=[{path: unused}]", f"--precision={arguments.precision}"])
    with tempfile.TemporaryDirectory() as folder:
        teacher = dataclasses.replace(config.teacher, pretrained=random_teacher(config, str(Path(folder) / "teacher")))
        config = dataclasses.replace(config, teacher=teacher)
        print("| batch | step | s | audio s / s | of matrix peak | peak GiB | days for the recipe | largest costs |")
        print("|" + " --- |" * 8)
        for batch_size in arguments.batch_sizes or [config.data.batch_size]:
            data = dataclasses.replace(config.data, batch_size=batch_size)
            try:
                measure(dataclasses.replace(config, data=data), arguments)
            except torch.OutOfMemoryError:
                print(f"{batch_size} windows do not fit.", file=sys.stderr)
                break


if __name__ == "__main__":
    main()
