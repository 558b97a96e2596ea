"""What all pictures share: colours, the look of axes, spectrograms, writing to a file.

Drawn on figures of their own, without pyplot: no window, no global state, any thread. People with any colour vision
can tell the colours of a panel apart (after Okabe and Ito, and Tol).
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, WINE = "#0072B2", "#D55E00", "#008F68", "#AA4499", "#C98500", "#882255"
INK, GREY, FAINT = "#222222", "#6B6B6B", "#E3E3E3"
DPI = 120
TITLE_PAD = 20
HOP = 256
"""Samples between the columns of a spectrogram."""


def level_db(wave: Tensor) -> np.ndarray:
    """Wave (L,) to dB of full scale (frequencies, frames); Hann windows of 1024 samples, hop 256."""
    window = torch.hann_window(1024)
    wave = wave.detach().float().cpu()
    spectrum = torch.stft(wave, 1024, HOP, window=window, pad_mode="constant", return_complex=True)
    return (20 * (2 * spectrum.abs() / window.sum()).clamp(min=1e-7).log10()).numpy()


def draw_spectrogram(axes: Axes, level: np.ndarray, top: float, sampling_rate: int, title: str) -> Any:
    """A spectrogram from `level_db`, 80 dB down from `top`, over seconds and kHz; the image, for a colour bar."""
    hop_s = HOP / sampling_rate
    image = axes.imshow(
        level,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=top - 80,
        vmax=top,
        extent=(-hop_s / 2, (level.shape[1] - 0.5) * hop_s, 0, sampling_rate / 2000),
    )
    style_image(axes, title, "kHz")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return image


def style_image(axes: Axes, title: str, unit: str) -> None:
    """The look of an axes that holds an image; `unit` is that of its height."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_ylabel(unit, color=GREY, fontsize=10)
    axes.tick_params(colors=GREY, labelsize=10)
    axes.spines[:].set_visible(False)


def add_level_bar(figure: Figure, image: Any, rows: list[Axes]) -> None:
    """The scale of spectrograms, in dB, beside them."""
    bar = figure.colorbar(image, ax=rows, aspect=30, pad=0.015)
    bar.set_label("dB", color=GREY, fontsize=10)
    bar.ax.tick_params(colors=GREY, labelsize=10)
    bar.outline.set_visible(False)


def style(axes: Axes, title: str, reading: str) -> None:
    """The look of an axes that holds lines or bars; `reading` says the unit, and what is good."""
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=TITLE_PAD)
    axes.text(0, 1.03, reading, transform=axes.transAxes, fontsize=10, color=GREY, va="bottom")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelsize=10, length=0)


def written(figure: Figure, path: str | os.PathLike | None) -> Figure:
    """The figure, written as a whole if a path is given."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
        figure.savefig(temporary, dpi=DPI)
        os.replace(temporary, path)
    return figure
