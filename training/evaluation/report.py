"""What an evaluation says in the end: one JSON file, a table, pictures."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.history import write_summary
from training.metrics import SCORES

from .codec_interface import Codec
from .codecs_neural import CodebookCodec
from .discriminability import shown as discriminability_table
from .parts import Parts
from .pictures import codebook_histograms, quality_against_bitrate
from .runner import family
from .statistics import estimate

PACKAGES = ("open-mimi", "torch", "transformers", "datasets", "evaluate", "numpy", "pystoi", "pesq", "soxr", "jiwer")
PACKAGES += ("visqol-python", "distillmos", "speechmos", "resemblyzer", "av", "pycodec2")
LABELS = {
    "si_sdr": "SI-SDR",
    "stoi": "STOI",
    "estoi": "ESTOI",
    "pesq_wb": "PESQ-WB",
    "pesq_nb": "PESQ-NB",
    "visqol": "ViSQOL",
    "distillmos": "DistillMOS",
    "wer": "WER",
    "cer": "CER",
}
UNTIMED = ("original",)


def report(
    codecs: Sequence[Codec],
    parts: Parts,
    output: Path,
    data: Mapping[str, Any],
    abx: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Sum up the rows of `parts` and write `results.json`, `table.md` and the pictures.

    Args:
        codecs: What was compared, in the order of the table.
        parts: All rows.
        output: Folder to write to.
        data: What describes the data set.
        abx: Phone discriminability of each codebook, if it was measured.

    Returns:
        What `results.json` holds.
    """
    networks = {family(codec): codec.network for codec in codecs if isinstance(codec, CodebookCodec)}
    gathered = _gather(parts, {name: network.codebook_size for name, network in networks.items()})
    results: dict[str, Any] = {
        "command": shlex.join(["mimi", *map(public, sys.argv[1:])]),
        "data": {**data, **gathered["data"]},
        "codecs": [_summary(codec, gathered) for codec in codecs],
        "codebooks": {
            name: _codebooks(counts, networks[name].frame_rate) for name, counts in gathered["counts"].items()
        },
        "scores": {name: _described(name) for name in gathered["scores"]},
        "confidence": "95 % percentile bootstrap over clips, 1000 resamples",
        "versions": _versions(),
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
    }
    if abx is not None:
        results["abx"] = list(abx)
    if torch.cuda.is_available():
        results["machine"]["gpu"] = torch.cuda.get_device_name()
    write_summary(output / "results.json", results)
    text = table(results)
    (output / "table.md.tmp").write_text(text, encoding="utf-8")
    os.replace(output / "table.md.tmp", output / "table.md")
    quality_against_bitrate(results["codecs"], results["scores"], output / "quality_against_bitrate.png")
    for name, counts in gathered["counts"].items():
        title = f"{name}: how often each entry is chosen, most frequent first"
        codebook_histograms(counts, title, output / f"codebooks_{name.replace(' ', '_')}.png")
    return results


def public(word: str) -> str:
    """A word of a command as others may read it: of an absolute path its last part only."""
    return Path(word).name if Path(word).is_absolute() else word


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table: a codec per line, a score per column, the best coded value in bold."""
    names = list(results["scores"])
    header = ["codec", "kbit/s", *(f"{results['scores'][name]['label']} {_arrow(results, name)}" for name in names)]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    best = {name: _best(results, name) for name in names}
    for codec in results["codecs"]:
        rate = codec["measured_bitrate"]
        cells = [codec["name"], "-" if rate is None else f"{rate / 1000:.2f}"]
        for name in names:
            score = codec["scores"].get(name)
            if score is None or score["mean"] is None:
                cells.append("-")
                continue
            spread = max(score["high"] - score["mean"], score["mean"] - score["low"])
            cell = f"{score['mean']:.3g} ± {spread:.2g}"
            cells.append(f"**{cell}**" if best[name] == codec["name"] else cell)
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    return f"{text}\n{discriminability_table(results['abx'])}" if results.get("abx") else text


def _gather(parts: Parts, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Columns from rows: scores per codec, counts of codes per family with codebooks of `sizes`, facts of the data."""
    columns: dict[str, dict[str, list]] = {}
    counts: dict[str, np.ndarray] = {}
    skipped: Counter[str] = Counter()
    digests, seconds, clips = [], 0.0, 0
    for row in parts.rows():
        if "skipped" in row:
            skipped[row["skipped"]] += 1
            continue
        clips, seconds = clips + 1, seconds + row["seconds"]
        digests.append(row["digest"])
        for codec, measured in row["codecs"].items():
            column = columns.setdefault(codec, {"bits": [], "seconds": []})
            column["bits"].append(measured["bits"])
            column["seconds"].append(row["seconds"])
            for name, value in measured["scores"].items():
                column.setdefault(name, []).append(value)
        for name, levels in row["codes"].items():
            kept = counts.setdefault(name, np.zeros((len(levels), sizes[name]), dtype=np.int64))
            for level, codes in enumerate(levels):
                kept[level] += np.bincount(codes, minlength=sizes[name])
    fingerprint = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]
    data = {"clips": clips, "hours": seconds / 3600, "fingerprint": fingerprint, "skipped": dict(skipped)}
    present = {name for column in columns.values() for name in column}
    return {"columns": columns, "counts": counts, "data": data, "scores": [n for n in SCORES if n in present]}


def _codebooks(counts: np.ndarray, frame_rate: float) -> dict[str, Any]:
    """How codebooks (K, N) are used: per level, and the bitrate that an ideal coder of single codes would reach."""
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -np.sum(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0), axis=1)
    return {
        "frames": int(counts[0].sum()),
        "usage": (counts > 0).mean(1).tolist(),
        "perplexity": (2**entropy).tolist(),
        "entropy_bits": entropy.tolist(),
        "entropy_bitrate": float(entropy.sum() * frame_rate),
    }


def _summary(codec: Codec, gathered: Mapping[str, Any]) -> dict[str, Any]:
    column = gathered["columns"].get(codec.name, {"bits": [], "seconds": []})
    original = codec.name in UNTIMED
    rate = None if original or not column["seconds"] else sum(column["bits"]) / sum(column["seconds"])
    found: dict[str, Any] = {
        "name": codec.name,
        "family": family(codec),
        "bitrate": None if original else codec.bitrate,
        "measured_bitrate": rate,
        "scores": {},
    }
    for name in gathered["scores"]:
        if name in column:
            found["scores"][name] = estimate(column[name], _weights(name, column))._asdict()
    return found


def _weights(name: str, column: Mapping[str, list]) -> list[float] | None:
    """What a clip counts for: error rates are those of the corpus, so a clip counts by its words or characters."""
    return column.get({"wer": "words", "cer": "characters"}.get(name, ""))


def _described(name: str) -> dict[str, Any]:
    score = SCORES[name]
    label = LABELS.get(name, name.replace("_", " "))
    return {"label": label, "unit": score.unit, "range": list(score.range), "higher_is_better": score.higher_is_better}


def _best(results: Mapping[str, Any], name: str) -> str | None:
    """The name of the codec with the best mean, the original aside."""
    coded = [codec for codec in results["codecs"] if codec["measured_bitrate"] is not None]
    means = {c["name"]: c["scores"].get(name, {}).get("mean") for c in coded}
    means = {codec: mean for codec, mean in means.items() if mean is not None and np.isfinite(mean)}
    choose = max if results["scores"][name]["higher_is_better"] else min
    return choose(means, key=lambda codec: means[codec]) if len(means) > 1 else None


def _arrow(results: Mapping[str, Any], name: str) -> str:
    return "↑" if results["scores"][name]["higher_is_better"] else "↓"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
