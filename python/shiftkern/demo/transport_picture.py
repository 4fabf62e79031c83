"""The transport demonstration, drawn."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from shiftkern.demo.transport import DIGIT_REGS, PHOTOGRAPHS, Images, Results

__all__ = ["colours_picture", "digits_picture"]

# Okabe and Ito's colour-blind-safe colours.
_BARS = ("0.75", "#0072B2", "#56B4E9", "#E69F00")
_WIDTH = 300  # of a photograph, in pixels


def colours_picture(results: Results, images: Images) -> bytes:
    """Draw both photographs, each in its own and in the other's colours; return a PNG file's content."""
    dpi = 100
    height, width = images.photographs[0][0].shape[:2]
    columns = len(images.photographs[0])
    panel = _WIDTH * height / width
    size = (columns * (_WIDTH + 6) / dpi, (2 * (panel + 22) + 26) / dpi)
    figure = Figure(figsize=size, dpi=dpi)
    figure.text(
        0.004,
        0.993,
        f"Each photograph in the other's colours: plans between {results.pixels} pixels each, seed"
        f" {results.options.seed}",
        va="top",
        fontsize=10,
        fontweight="bold",
    )
    for row, versions in enumerate(images.photographs):
        titles = [
            f"{PHOTOGRAPHS[row]}.jpg",
            *(
                f"reg {c.reg:g}: colour distance {results.distance:.3f} → {c.distance[row]:.3f}"
                for c in results.colours
            ),
        ]
        for column, (version, title) in enumerate(zip(versions, titles, strict=True)):
            left = (column * (_WIDTH + 6) + 3) / dpi / size[0]
            bottom = ((1 - row) * (panel + 22) + 2) / dpi / size[1]
            axes = figure.add_axes((left, bottom, _WIDTH / dpi / size[0], panel / dpi / size[1]))
            axes.imshow(version.numpy(), interpolation="lanczos", aspect="auto")
            axes.set_axis_off()
            axes.set_title(title, loc="left", pad=3, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    # Photographs hardly compress as PNG; 256 dithered colours are a third of the size.
    true = Image.open(content).convert("RGB")
    small = io.BytesIO()
    dithered = true.quantize(palette=true.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)
    dithered.save(small, format="png", optimize=True)
    return small.getvalue()


def _strip(digits: Tensor) -> np.ndarray:
    """Ten digits (10, H, W) side by side."""
    return np.concatenate(list(digits.numpy()), axis=1)


def _digits(axes: Axes, images: Images) -> None:
    """One row per shift: to the left transported, to the right truly shifted; above both the images themselves."""
    height, width = images.source.shape[1:]
    strips: list[np.ndarray] = []
    centres: list[float] = []
    pairs = {"training": (images.source, images.source)}
    pairs |= {name: (images.moved[name], images.shifted[name]) for name in images.moved}
    for left, right in pairs.values():
        centres.append(sum(len(strip) for strip in strips) + height / 2 - 0.5)
        row = np.concatenate([_strip(left), np.full((height, width // 2), np.nan), _strip(right)], axis=1)
        # The first row stands apart.
        strips += [row, np.full((2 if len(centres) > 1 else height // 2, row.shape[1]), np.nan)]
    axes.imshow(np.concatenate(strips[:-1]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for start, words in ((0, f"transported, reg {DIGIT_REGS[0]:g}"), (10.5 * width, "truly shifted")):
        axes.text(start, -4, words, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks(centres, list(pairs), fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _bars(axes: Axes, results: Results) -> None:
    labels = ["no transport", *(f"reg {share:g} of the mean cost" for share in DIGIT_REGS), "exact transport"]
    places = np.arange(len(results.shifts))
    width = 0.8 / len(labels)
    for i, (label, colour) in enumerate(zip(labels, _BARS, strict=True)):
        values = [shift.accuracy[i] for shift in results.shifts.values()]
        bars = axes.barh(places + (i - 1.5) * width, values, width, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_yticks(places, list(results.shifts), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 25))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Nearest neighbour, accuracy in % under each shift", loc="left", fontsize=10)
    axes.figure.legend(loc="outside lower right", ncols=len(labels), frameon=False, fontsize=9)


def digits_picture(results: Results, images: Images, dpi: int = 110) -> bytes:
    """Draw training digits after transport and as the shift would have them, and accuracies; return a PNG's content."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
    _digits(left, images)
    _bars(right, results)
    figure.suptitle(
        f"Training digits transported to shifted, unlabelled ones: {results.images} each, seed {results.options.seed}",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
