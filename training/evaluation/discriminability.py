"""How well each codebook alone tells phones apart, beside the MFCCs of the audio: ABX (Moshi §3.3.3, Table 3).

`T` frames, `D` dimensions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from modeling_mimi import MimiModel
from training.metrics import load

from .clips import Clip, Rows, decode
from .codec_interface import RATE
from .codecs_neural import Mimi

MFCC_RATE = 100
MFCC_BANDS, MFCC_COEFFICIENTS = 40, 13
Items = dict[str, list[dict[str, Any]]]


def read_items(path: str | Path) -> Items:
    """The phones of each file of an item file, as `training.evaluation.phones` writes them.

    Raises:
        ValueError: A line is not `file onset offset phone previous next speaker`.
    """
    items: Items = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        try:
            name, onset, offset, label, _, _, speaker = line.rsplit(" ", 6)
            item = {"onset_s": float(onset), "offset_s": float(offset), "label": label, "speaker": speaker}
        except ValueError:
            raise ValueError(f"{path}, line {number}, is not an item: {line[:60]!r}") from None
        items.setdefault(name, []).append(item)
    return items


def discriminability(networks: Sequence[Mimi], rows: Rows, items: Items, max_s: float) -> list[dict[str, Any]]:
    """ABX errors of MFCCs and of each codebook of each network, over the clips that `items` names.

    Raises:
        ValueError: `items` names none of the clips.
    """
    features: dict[tuple[str, str], list[np.ndarray]] = {}
    rates = {("original", "MFCC"): float(MFCC_RATE)}
    references = []
    named = ((reference, row) for reference, row in rows if reference.name in items)
    for clip in decode(named, RATE, max_s):
        if not isinstance(clip, Clip):
            continue
        references.append([item for item in items[clip.name] if item["offset_s"] <= len(clip.audio) / RATE])
        features.setdefault(("original", "MFCC"), []).append(mfcc(clip.audio))
        for network in networks:
            codes = network.encode([clip.audio], network.num_quantizers)[0]
            for level, (row, entries) in enumerate(zip(codes, centroids(network.model), strict=True), 1):
                key = (network.name, f"level {level}")
                features.setdefault(key, []).append(entries[row])
                rates[key] = network.frame_rate
    if not references:
        raise ValueError("The item file names no clip of the data set: its first column holds their file names.")
    metric = load("abx")
    return [
        {"codec": codec, "features": name, **_errors(metric, waves, references, rates[codec, name])}
        for (codec, name), waves in features.items()
    ]


def _errors(metric: Any, features: list[np.ndarray], references: list[Any], frame_rate: float) -> dict[str, float]:
    found = metric.compute(predictions=features, references=references, frame_rate=frame_rate)
    return {name: found[name] for name in ("abx_within", "abx_across")}


def centroids(model: MimiModel) -> list[np.ndarray]:
    """The entries of each codebook, (N, D), levels in the order of the codes."""
    quantizer = model.quantizer
    branches = (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer)
    layers = [layer for branch in branches for layer in branch.layers]
    with torch.no_grad():
        return [layer.codebook.centroids.float().cpu().numpy() for layer in layers]


def mfcc(audio: np.ndarray) -> np.ndarray:
    """Mel-frequency cepstral coefficients of (L,) at 24 kHz: (T, 13), 100 per second, without the loudness."""
    window = 600  # 25 ms
    bank = mel_filter_bank(513, MFCC_BANDS, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    log_mel = spectrogram(
        audio,
        window_function(window, "hann"),
        frame_length=window,
        hop_length=RATE // MFCC_RATE,
        fft_length=1024,
        power=2.0,
        mel_filters=bank,
        log_mel="log10",
    )  # (M, T)
    return dct(log_mel, axis=0, norm="ortho")[1 : MFCC_COEFFICIENTS + 1].T.astype(np.float32)


def shown(errors: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, in per cent."""
    lines = ["| codec | features | ABX within speaker, % ↓ | ABX across speakers, % ↓ |", "| --- | --- | --- | --- |"]
    for row in errors:
        values = " | ".join(f"{100 * row[name]:.1f}" for name in ("abx_within", "abx_across"))
        lines.append(f"| {row['codec']} | {row['features']} | {values} |")
    return "\n".join(lines) + "\n"
