"""The main demonstration, drawn."""

from __future__ import annotations

import io
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shiftkern.demo.adapt import METHODS, Results
from shiftkern.demo.streams import CORRUPTIONS, ORDERS

__all__ = ["picture"]

# Okabe and Ito's colour-blind-safe colours and two dark ones; curves also differ in line style and width.
_STYLES: dict[str, dict[str, Any]] = {
    "source": {"color": "#000000", "linewidth": 2.4},
    "bn": {"color": "#D55E00", "linewidth": 2.4},
    "alpha": {"color": "#0072B2", "linewidth": 2.4},
    "unmix": {"color": "#009E73", "linewidth": 1.3, "linestyle": "--"},
    "osuda": {"color": "#CC79A7", "linewidth": 1.3, "linestyle": "--"},
    "tent": {"color": "#E69F00", "linewidth": 1.3},
    "cotta": {"color": "#56B4E9", "linewidth": 1.3},
    "rmt": {"color": "#5D3A9B", "linewidth": 1.3, "linestyle": "-."},
    "lame": {"color": "#7F7F7F", "linewidth": 1.3, "linestyle": ":"},
    "style": {"color": "#7A4B12", "linewidth": 1.3, "linestyle": "-."},
}
_WINDOW = 4  # batches in the running error


def _heatmap(axes: Axes, results: Results) -> None:
    methods, kinds = list(results.error), list(CORRUPTIONS)
    columns = [f"{kind}/{order}" for order in ORDERS for kind in kinds]
    values = np.array([[results.error[method][column] for column in columns] for method in methods])
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    best = values.round(1) == values.round(1).min(0)
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        axes.text(
            column,
            row,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if value > 55 else "black",
            fontweight="bold" if best[row, column] else "normal",
        )
    axes.set_xticks(range(len(columns)), kinds * len(ORDERS), fontsize=9, va="baseline")
    axes.set_yticks(range(len(methods)), [METHODS[method].label for method in methods])
    axes.tick_params(length=0)
    axes.tick_params(axis="x", pad=14)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(methods) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.axvline(len(kinds) - 0.5, color="white", linewidth=7)
    for index, words in enumerate(("shuffled", "sorted by class")):
        axes.text((index + 0.5) * len(kinds) - 0.5, -0.62, words, ha="center", va="bottom", fontsize=10)
    axes.set_title("Error rate in %, best of each stream in bold", loc="left", pad=22, fontweight="bold", fontsize=11)


def _curves(axes: Axes, results: Results) -> None:
    sizes = np.array(results.batches)
    seen = np.cumsum(sizes)
    ends = list(accumulate(length for _, length in results.segments))
    # The window starts afresh with each segment: it would otherwise draw a sudden change as a slope.
    segment = np.searchsorted(ends, seen)
    windows = [
        [j for j in range(max(0, i - _WINDOW + 1), i + 1) if segment[j] == segment[i]] for i in range(len(sizes))
    ]
    for method, errors in results.continual.items():
        running = [np.average(np.array(errors)[window], weights=sizes[window]) for window in windows]
        axes.plot(seen, running, label=METHODS[method].label, **_STYLES[method])
    for (name, length), end in zip(results.segments, ends, strict=True):
        axes.text(end - length / 2, 101.5, name, ha="center", va="bottom", fontsize=10)
    for end in ends[:-1]:
        axes.axvline(end, color="0.55", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlim(0, ends[-1])
    axes.set_ylim(0, 100)
    axes.set_xlabel("images seen, one stream without a reset")
    axes.set_ylabel(f"error in %, mean of last {_WINDOW} batches")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Error over time on a continual stream", loc="left", pad=22, fontweight="bold", fontsize=11)


def picture(results: Results, dpi: int = 140) -> bytes:
    """Draw error by method and stream (left) and over time (right); return a PNG file's content."""
    # The object interface needs no display and leaves the caller's pyplot state alone.
    figure = Figure(figsize=(15, 0.36 * len(results.error) + 2.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.12, 1))
    _heatmap(left, results)
    _curves(right, results)
    figure.legend(loc="outside lower right", ncols=len(results.error), frameon=False, fontsize=10)
    options = results.options
    figure.suptitle(
        f"A digit classifier on shifted streams: severity {options.severity} of 5, batches of {options.batch_size},"
        f" seed {options.seed}",
        x=0.01,
        ha="left",
        fontsize=13,
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
