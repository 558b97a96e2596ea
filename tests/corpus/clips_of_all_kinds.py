"""A corpus with every kind of clip, and what the tests of its tokens look at."""

import csv
import json
from pathlib import Path

import numpy as np
import soundfile
from conftest import speech
from datasets import load_dataset

from modeling_mimi import MimiFeatureExtractor
from modeling_mimi.cli import main

GOOD = {  # name: seconds, rate, channels
    "anna/long.flac": (1.3, 16_000, 1),
    "anna/a.wav": (0.205, 24_000, 1),
    "anna/b.wav": (0.2, 24_000, 1),
    "bert/a.wav": (0.21, 44_100, 2),
    "bert/half.wav": (0.1, 8_000, 1),
    "bert/three.flac": (0.61, 48_000, 1),
    "carl/three.wav": (0.6, 24_000, 1),
    "carl/silent.wav": (0.15, 24_000, 1),
}
BAD = {
    "bad/cut.wav": "undecodable",
    "bad/empty.wav": "empty",
    "bad/garbage.wav": "undecodable",
    "bad/header.wav": "empty",
    "bad/infinite.wav": "not finite",
    "bad/slow.wav": "sampling rate of 1 Hz",
}


def write_clips(folder: Path) -> None:
    for seed, (name, (seconds, rate, channels)) in enumerate(GOOD.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        samples = round(seconds * rate)
        audio = np.stack([speech(samples, seed=10 * seed + channel)[0, 0].numpy() for channel in range(channels)], 1)
        soundfile.write(folder / name, 0 * audio if "silent" in name else audio, rate)
    bad = folder / "bad"
    bad.mkdir()
    tone = np.sin(np.arange(24_000) / 10)
    soundfile.write(bad / "cut.flac", tone, 24_000)
    whole = (bad / "cut.flac").read_bytes()
    (bad / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (bad / "cut.flac").rename(bad / "cut.wav")
    (bad / "empty.wav").write_bytes(b"")
    (bad / "garbage.wav").write_bytes(b"RIFF....not a wave")
    soundfile.write(bad / "header.wav", tone[:0], 24_000)
    soundfile.write(bad / "infinite.wav", np.where(tone > 0.9, np.inf, tone), 24_000, "FLOAT")
    soundfile.write(bad / "slow.wav", tone[:20], 1)


def write_corpus(folder: Path) -> Path:
    """The clips with their metadata, as a folder that has a split."""
    write_clips(folder / "train")
    with (folder / "train" / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "speaker"])
        good, bad = list(GOOD), list(BAD)
        names = [*good[:2], *bad[:3], *good[2:], *bad[3:]]
        writer.writerows([name, f"says {name}", name.split("/")[0]] for name in names)
    return folder


def mimi(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu"])


def rows(folder: Path) -> list[dict]:
    """What `load_dataset` streams."""
    return list(load_dataset(str(folder), split="train", streaming=True))


def errors(folder: Path) -> dict[str, str]:
    lines = [line for path in (folder / "errors").glob("*.jsonl") for line in path.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    assert len({error["clip_id"] for error in found}) == len(found)
    return {error["clip_id"]: error["reason"] for error in found}


def prepared(path: Path) -> dict:
    """A file as the feature extractor gives it to the model."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return MimiFeatureExtractor()(audio, sampling_rate=rate, return_tensors="pt")
