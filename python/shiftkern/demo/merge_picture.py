"""The merging demonstration, drawn."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shiftkern.demo.merge import METHODS, PATHS, TASKS, Merge, Results

__all__ = ["picture"]

# Okabe and Ito's colour-blind-safe colours; tasks also differ in their marker, paths in their line style.
_TASK_STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"))
_PATH_STYLES = (("#D55E00", "-"), ("#0072B2", "-"), ("#009E73", "--"))


def _networks(results: Results) -> list[tuple[str, Merge]]:
    rows = [("parent", results.parent)]
    rows += [(f"expert: {name}", expert) for name, expert in results.experts.items()]
    return rows + [(METHODS[name].label, merged) for name, merged in results.methods.items()]


def _accuracies(axes: Axes, results: Results) -> None:
    rows = _networks(results)
    places = np.arange(len(rows), dtype=float)
    # The merged networks stand apart.
    places[1 + len(TASKS) :] += 0.6
    axes.hlines(places, [min(row.accuracy) for _, row in rows], [max(row.accuracy) for _, row in rows], color="0.8")
    for task, (name, (colour, marker)) in enumerate(zip(TASKS, _TASK_STYLES, strict=True)):
        values = [row.accuracy[task] for _, row in rows]
        axes.plot(values, places, linestyle="", marker=marker, markersize=5.5, color=colour, label=name)
    means = [row.mean for _, row in rows]
    axes.plot(means, places, linestyle="", marker="|", markersize=13, markeredgewidth=2.2, color="black", label="mean")
    for place, (_, row) in zip(places, rows, strict=True):
        axes.text(101, place, f"{row.mean:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, [label for label, _ in rows], fontsize=9)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    lowest = min(min(row.accuracy) for _, row in rows)
    axes.set_xlim(max(0, 10 * (lowest // 10) - 5), 100)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title("Accuracy on each task in %, and its mean", loc="left", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.04), ncols=4, frameon=False, fontsize=9)


def _path(axes: Axes, results: Results, measure: str, title: str) -> None:
    for name, (colour, style) in zip(PATHS, _PATH_STYLES, strict=True):
        values = getattr(results.paths[name], measure)
        axes.plot(results.places, values, color=colour, linestyle=style, linewidth=2, label=name)
    axes.set_xlim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.tick_params(labelsize=9)


def picture(results: Results, dpi: int = 110) -> bytes:
    """Draw the accuracies of all networks, and the way between two strangers; return a PNG file's content."""
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    _accuracies(figure.add_subplot(grid[:, 0]), results)
    above = figure.add_subplot(grid[0, 1])
    below = figure.add_subplot(grid[1, 1], sharex=above)
    above.tick_params(labelbottom=False)
    _path(above, results, "loss", "Between two networks trained independently: test loss")
    _path(below, results, "accuracy", "Accuracy in %")
    below.set_xticks([0, 0.5, 1], ["the parent", "half and half", "another network"], fontsize=9)
    above.legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"Experts for {', '.join(TASKS)} merged into one network: {results.images} images each, seed"
        f" {results.options.seed}",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
