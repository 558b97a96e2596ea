"""Pictures of an evaluation: quality against bitrate, spectrograms side by side, use of the codebooks."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from torch import Tensor

from training.drawing import (
    BLUE,
    DPI,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    VERMILLION,
    WINE,
    add_level_bar,
    draw_spectrogram,
    level_db,
    style,
    style_image,
    written,
)

FAMILY_COLOURS = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, WINE)
COLUMNS = 3


def quality_against_bitrate(
    codecs: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, Any]], path: str | os.PathLike | None = None
) -> Figure:
    """A panel per score: every codec at the bitrate it spent, with its 95 % interval; a codec's rates are joined.

    Args:
        codecs: As in the results: `name`, `family`, `measured_bitrate` (bit/s, None for the original) and `scores`,
            each with `mean`, `low` and `high`.
        scores: By name: `label`, `unit` and `higher_is_better`.
        path: Also write the picture here.
    """
    names = [name for name in scores if any(name in codec["scores"] for codec in codecs)]
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(4.8 * COLUMNS, 0.5 + 3.4 * max(rows, 1)), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.14)
    families = list(dict.fromkeys(codec["family"] for codec in codecs if codec["measured_bitrate"]))
    colours = {family: FAMILY_COLOURS[index % len(FAMILY_COLOURS)] for index, family in enumerate(families)}
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        better = "higher is better" if scores[name]["higher_is_better"] else "lower is better"
        style(axes, scores[name]["label"], f"{scores[name]['unit'] or 'no unit'}, {better}")
        _draw_rates(axes, name, codecs, colours)
    if not names:
        figure.text(0.5, 0.5, "No scores", ha="center", color=GREY, fontsize=12)
        return written(figure, path)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=6, frameon=False, fontsize=10, labelcolor=INK)
    return written(figure, path)


def _draw_rates(axes: Axes, name: str, codecs: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate / 1000:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("kbit/s", color=GREY, fontsize=10)
    rates = sorted({round(codec["measured_bitrate"]) for codec in codecs if codec["measured_bitrate"]})
    axes.set_xticks([500, 1000, 2000, 4000, 8000, 16000])
    if rates:
        axes.set_xlim(rates[0] * 0.8, rates[-1] * 1.25)
    for family, colour in colours.items():
        points = [codec for codec in codecs if codec["family"] == family and _mean(codec, name) is not None]
        points.sort(key=lambda codec: codec["measured_bitrate"])
        if not points:
            axes.plot([], [], "o-", color=colour, label=family)
            continue
        found = [codec["scores"][name] for codec in points]
        means = np.array([score["mean"] for score in found])
        spread = [means - [score["low"] for score in found], [score["high"] for score in found] - means]
        at = [codec["measured_bitrate"] for codec in points]
        axes.errorbar(at, means, yerr=np.maximum(spread, 0), fmt="o-", color=colour, capsize=2.5, label=family)
    for codec in codecs:
        score = codec["scores"].get(name)
        if codec["measured_bitrate"] is not None or not score or score["mean"] is None:
            continue
        if score["high"] - score["low"] > 1e-6:  # where it is perfect by definition it would only squeeze the others
            axes.axhline(score["mean"], color=INK, linewidth=1, linestyle=(0, (4, 3)), label=codec["family"])


def _mean(codec: Mapping[str, Any], name: str) -> float | None:
    return codec["scores"].get(name, {}).get("mean")


def spectrograms_side_by_side(
    waves: Mapping[str, np.ndarray], sampling_rate: int, title: str, path: str | os.PathLike | None = None
) -> Figure:
    """Spectrograms of waves (L,) in [-1, 1], one below the other by name, on the 80 dB below the first's peak."""
    figure = Figure(figsize=(11, 0.6 + 1.9 * len(waves)), dpi=DPI)
    figure.set_layout_engine("constrained", h_pad=0.06)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    rows = list(np.atleast_1d(figure.subplots(len(waves), 1, sharex=True)))
    image = _draw_waves(rows, {name: torch.from_numpy(wave) for name, wave in waves.items()}, sampling_rate)
    rows[-1].set_xlabel("seconds", color=GREY, fontsize=10)
    add_level_bar(figure, image, rows)
    return written(figure, path)


def _draw_waves(rows: Sequence[Axes], waves: Mapping[str, Tensor], sampling_rate: int) -> Any:
    levels = [level_db(wave) for wave in waves.values()]
    top, image = max(float(levels[0].max()), -60.0), None
    for axes, level, (name, wave) in zip(rows, levels, waves.items(), strict=True):
        image = draw_spectrogram(axes, level, top, sampling_rate, name)
        axes.set_xlim(0, len(wave) / sampling_rate)
    return image


def speech_and_codes(
    audio: Tensor,
    reconstruction: Tensor,
    codes: Tensor,
    sampling_rate: int,
    frame_rate: float,
    title: str,
    path: str | os.PathLike | None = None,
) -> Figure:
    """What a codec hears, keeps and says: both spectrograms, and between them the codes at their times.

    Args:
        audio: (L,) in [-1, 1].
        reconstruction: (L,).
        codes: (K, T); equal colours in a row are equal codes.
        sampling_rate: Of the waves, in Hz.
        frame_rate: Of the codes, in Hz.
        title: Of the whole picture.
        path: Also write the picture here.
    """
    figure = Figure(figsize=(11, 7.6), dpi=DPI)
    figure.set_layout_engine("constrained", h_pad=0.07)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 3])
    image = _draw_waves([top, bottom], {"Original": audio, "Reconstruction": reconstruction}, sampling_rate)
    levels, frames = codes.shape
    # shuffled, so that neighbouring codes, which mean nothing to each other, do not look alike
    colours = np.random.default_rng(0).permutation(colormaps["turbo"](np.linspace(0.05, 0.95, 2048)))
    middle.imshow(
        codes.cpu().numpy() % len(colours),
        aspect="auto",
        cmap=ListedColormap(colours),
        vmin=0,
        vmax=len(colours),
        interpolation="nearest",
        extent=(0, frames / frame_rate, levels + 0.5, 0.5),
    )
    style_image(middle, f"Codes: {levels} per frame, {frame_rate:g} frames per second", "codebook")
    middle.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=levels))
    middle.set_xlim(0, audio.shape[-1] / sampling_rate)
    bottom.set_xlabel("seconds", color=GREY, fontsize=10)
    add_level_bar(figure, image, [top, middle, bottom])
    return written(figure, path)


def codebook_histograms(counts: np.ndarray, title: str, path: str | os.PathLike | None = None) -> Figure:
    """How often each entry of each codebook was chosen, sorted: flat is good, a cliff means entries nobody uses.

    Args:
        counts: (K, N) integers.
        title: Of the whole picture.
        path: Also write the picture here.
    """
    levels, size = counts.shape
    columns = min(levels, 4)
    rows = math.ceil(levels / columns)
    figure = Figure(figsize=(3.6 * columns, 0.6 + 2.6 * rows), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    highest = counts.max(initial=1) / max(counts.sum(1).max(), 1)
    for level in range(levels):
        axes = figure.add_subplot(rows, columns, level + 1)
        shares = np.sort(counts[level])[::-1] / max(counts[level].sum(), 1)
        used = int((counts[level] > 0).sum())
        style(axes, f"Level {level + 1}", f"{100 * used / size:.0f} % of {size} entries used")
        axes.fill_between(np.arange(size), shares, color=VERMILLION if level == 0 else BLUE, step="mid", linewidth=0)
        axes.axhline(1 / size, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set(xlim=(0, size), ylim=(0.1 / max(counts[level].sum(), 10), highest), yscale="log")
        axes.spines["bottom"].set_color(FAINT)
    return written(figure, Path(path) if path is not None else None)
