"""Pictures of a run: its curves, for people who cannot read GAN curves, and spectrograms of its reconstructions."""

import math
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from .drawing import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    TITLE_PAD,
    VERMILLION,
    WINE,
    add_level_bar,
    draw_spectrogram,
    level_db,
    style,
    written,
)

COLOURS = {
    "adversarial": VERMILLION,
    "feature_matching": BLUE,
    "mel": GREEN,
    "waveform": ORANGE,
    "feature_reconstruction": WINE,
    "commitment": PURPLE,
    "distillation": BLUE,
    "discriminator": INK,
    "encoder": BLUE,
    "quantizer": PURPLE,
    "decoder": GREEN,
    "accuracy_real": BLUE,
    "accuracy_fake": VERMILLION,
    "learning_rate": BLUE,
    "discriminator_learning_rate": INK,
}
LABELS = {
    "accuracy_real": "real",
    "accuracy_fake": "fake",
    "learning_rate": "codec",
    "discriminator_learning_rate": "discriminator",
}
COLUMNS = 3


class Panel(NamedTuple):
    """One panel: where its lines come from and how to read them."""

    title: str
    reading: str
    """Unit, and what is good or usual."""
    keys: Callable[[str], bool] | tuple[str, ...]
    """Which keys of the rows are its lines."""
    kinds: tuple[str, ...] = ("train",)
    """Kinds of rows that have them; the first kind with any is drawn."""
    scale: str = "linear"
    best: Callable[[Sequence[float]], float] | None = None
    """`min` or `max`: mark the best point."""
    limits: tuple[float | None, float | None] = (None, None)
    percent: bool = False
    smooth: bool = True
    """Draw a running mean over faint raw values."""
    if_any: bool = False
    """Leave the panel out while all is zero."""


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda key: key.startswith(prefixes)


VALIDATION = ("validation",)
LEVELS = ("train", "validation")
PANELS = (
    Panel("SI-SDR", "match of held-out waves in dB, higher is better", ("si_sdr",), VALIDATION, best=max),
    Panel("Mel distance", "distance of held-out spectra, lower is better", ("mel_distance",), VALIDATION, best=min),
    Panel("STOI", "intelligibility of held-out clips, at most 1", ("stoi",), VALIDATION, best=max),
    Panel(
        "Reconstruction losses",
        "fall, most of all early; log scale",
        ("loss/feature_matching", "loss/mel", "loss/waveform", "loss/feature_reconstruction"),
        scale="log",
    ),
    Panel(
        "Adversarial losses",
        "a contest: holding level is healthy",
        ("loss/adversarial", "loss/discriminator"),
    ),
    Panel("Quantizer losses", "level off; log scale", ("loss/commitment", "loss/distillation"), scale="log"),
    Panel(
        "Discriminator's accuracy",
        "50 % is guessing; near 100 % it has won",
        _starts("discriminator/accuracy"),
        limits=(0, 1),
        percent=True,
    ),
    Panel("Gradient norms", "steady, without growing spikes; log scale", _starts("gradient_norm/"), scale="log"),
    Panel(
        "Loss gradients", "norm at the decoder's output; log scale", _starts("balancer/"), scale="log", smooth=False
    ),
    Panel(
        "Codebook usage",
        "share of entries in use, by level",
        _starts("codebook/usage_", "usage_"),
        LEVELS,
        limits=(0, 1),
        percent=True,
    ),
    Panel(
        "Codebook perplexity",
        "effective number of entries, by level",
        _starts("codebook/perplexity_", "perplexity_"),
        LEVELS,
        limits=(0, None),
    ),
    Panel("Replaced entries", "near 0 after the start", ("codebook/replaced",), limits=(0, None), smooth=False),
    Panel(
        "Learning rate",
        "per step",
        ("learning_rate", "discriminator_learning_rate"),
        limits=(0, None),
        smooth=False,
    ),
    Panel("Speed", "seconds of audio trained on per second", ("audio_seconds_per_second",), limits=(0, None)),
    Panel("Waiting for data", "share of the time, near 0 is good", ("data_wait",), limits=(0, None), percent=True),
    Panel(
        "Skipped steps",
        "gradients exploded or were not finite",
        ("skipped_steps",),
        limits=(0, None),
        smooth=False,
        if_any=True,
    ),
)


def curves(rows: Sequence[dict[str, Any]], path: str | os.PathLike | None = None) -> Figure:
    """Draw a run's history: a panel for each question that its rows answer, raw values faint and smoothed ones over.

    Args:
        rows: As `History.read` gives them; None and values that are not finite are gaps.
        path: Also write the picture here, replaced as a whole; the suffix names the format.
    """
    panels = [(panel, lines) for panel in PANELS if (lines := _lines_of(panel, rows))]
    height = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 0.3 + 3.0 * max(height, 1)), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.02, hspace=0.03)
    last = max((row["step"] for row in rows), default=1)
    for index, (panel, lines) in enumerate(panels):
        axes = figure.add_subplot(height, COLUMNS, index + 1)
        style(axes, panel.title, panel.reading)
        axes.set_xlim(0, max(last, 1))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if index + COLUMNS >= len(panels):
            axes.set_xlabel("step", color=GREY, fontsize=10)
        _draw(axes, panel, lines)
    if not panels:
        figure.text(0.5, 0.5, "Nothing logged yet", ha="center", color=GREY, fontsize=12)
    return written(figure, path)


def spectrograms(
    audio: Tensor, reconstruction: Tensor, sampling_rate: int, title: str, path: str | os.PathLike | None = None
) -> Figure:
    """Spectrograms of waves (L,) in [-1, 1], the original above its reconstruction, on the same 80 dB of colour.

    0 Hz to half of `sampling_rate`; magnitudes in dB, 0 is a sine of full scale.
    """
    figure = Figure(figsize=(10, 5.4), dpi=DPI)
    figure.set_layout_engine("constrained", h_pad=0.08)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    levels = [level_db(wave) for wave in (audio, reconstruction)]
    top = max(float(levels[0].max()), -60.0)
    rows = list(figure.subplots(2, 1, sharex=True))
    for axes, level, name in zip(rows, levels, ("Original", "Reconstruction"), strict=True):
        image = draw_spectrogram(axes, level, top, sampling_rate, name)
        axes.set_xlim(0, audio.shape[-1] / sampling_rate)
    rows[-1].set_xlabel("seconds", color=GREY, fontsize=10)
    add_level_bar(figure, image, rows)
    return written(figure, path)


def figure_to_image(figure: Figure) -> np.ndarray:
    """The figure as pixels (H, W, 3), uint8, for trackers that take images."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _lines_of(panel: Panel, rows: Sequence[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each of the panel's lines: its name, its steps and its values; left out what cannot be drawn."""
    above = 0.0 if panel.scale == "log" else -math.inf
    for kind in panel.kinds:
        of_kind = [row for row in rows if row["kind"] == kind]
        present = dict.fromkeys(key for row in of_kind for key in row)
        keys = [key for key in present if (panel.keys(key) if callable(panel.keys) else key in panel.keys)]
        lines = {}
        for key in keys:
            points = [(row["step"], row[key]) for row in of_kind if _is_finite(row.get(key)) and row[key] > above]
            if points:
                lines[key.rpartition("/")[2]] = tuple(np.array(points, dtype=float).T)
        if any(values.any() or not panel.if_any for _, values in lines.values()):
            return lines
    return {}


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _draw(axes: Axes, panel: Panel, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Lines, each named at its end where there are several."""
    axes.set_yscale(panel.scale)
    by_level = panel.kinds == LEVELS
    ends = []
    for name, (steps, values) in lines.items():
        level = int(name.rpartition("_")[2]) if by_level else 0
        colour = _level_colour(level, len(lines)) if by_level else COLOURS.get(name, BLUE)
        smooth = values
        if panel.kinds == VALIDATION:
            axes.plot(steps, values, "o", color=colour, markersize=3.5, clip_on=False)
        elif panel.smooth:
            smooth = _smoothed(values)
            axes.plot(steps, values, color=colour, alpha=0 if by_level else 0.22, linewidth=0.8)
        axes.plot(steps, smooth, color=colour, linewidth=1.7)
        ends.append((smooth[-1], _level_label(level, len(lines)) if by_level else _label(name), colour))
        if panel.best:
            _mark_best(axes, steps, values, panel.best)
    axes.set_ylim(*panel.limits)
    _set_ticks(axes, panel)
    if len(ends) > 1:
        _name_ends(axes, ends)


def _set_ticks(axes: Axes, panel: Panel) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if panel.scale == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 50 * low else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    percent = "{:g} %" if panel.percent else "{:g}"
    factor = 100 if panel.percent else 1
    axes.yaxis.set_major_formatter(lambda value, _: percent.format(factor * value).replace("-", "\N{MINUS SIGN}"))


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the run, centred, smaller at the edges."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _level_colour(level: int, levels: int) -> Any:
    """The semantic level stands out; the acoustic ones go from dark to light."""
    return VERMILLION if level == 1 else colormaps["viridis"]((level - 2) / max(levels - 2, 1) * 0.75)


def _level_label(level: int, levels: int) -> str:
    """Of many levels only the ends have room for a name."""
    return "1 semantic" if level == 1 else str(level) if levels <= 8 or level in (2, levels) else ""


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", "\n"))


def _mark_best(axes: Axes, steps: np.ndarray, values: np.ndarray, best: Callable) -> None:
    index = int(np.argmax(values == best(values)))
    axes.plot(steps[index], values[index], "o", color=VERMILLION, markersize=7, zorder=4, clip_on=False)
    text = f"best {values[index]:.3g}"
    axes.set_title(text, loc="right", color=VERMILLION, fontsize=10.5, fontweight="bold", pad=TITLE_PAD)


def _name_ends(axes: Axes, ends: list[tuple[float, str, Any]]) -> None:
    """Write each line's name beside its end, moved apart where they would overlap."""
    ends = sorted((end for end in ends if end[1]), key=lambda end: end[0])
    spots = axes.transAxes.inverted().transform(axes.transData.transform([(0, value) for value, _, _ in ends]))[:, 1]
    heights = [0.1 * (1 + label.count("\n")) for _, label, _ in ends]
    gaps = [(low + high) / 2 for low, high in pairwise(heights)]
    up, down = list(spots), list(spots)
    for index, gap in enumerate(gaps):
        up[index + 1] = max(up[index + 1], up[index] + gap)
    for index, gap in reversed(list(enumerate(gaps))):
        down[index] = min(down[index], down[index + 1] - gap)
    places = (np.array(up) + np.array(down)) / 2  # both keep the gaps, and so does their mean
    places -= max(places[-1] + heights[-1] / 2 - 1.05, 0)
    for place, (_, label, colour) in zip(places, ends, strict=True):
        axes.text(1.02, place, label, color=colour, fontsize=9.5, va="center", transform=axes.transAxes)
