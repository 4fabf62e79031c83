"""The fine-tuning demonstration, drawn."""

from __future__ import annotations

import io
from itertools import count
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from shiftkern.demo.finetune import BUDGET, DEGREES, FAMILIES, METHODS, Results

__all__ = ["picture", "place_labels"]

# Okabe and Ito's colour-blind-safe colours; families also differ in their marker.
_STYLES = dict(
    zip(
        FAMILIES,
        (("#000000", "*"), ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v")),
        strict=True,
    )
)
_GAP = 10.5  # pixels from the middle of a marker to its label
_FARTHEST = 200  # rings to look for a place within the axes

Boxes: TypeAlias = NDArray[np.float64]


def place_labels(points: Boxes, sizes: Boxes, area: Boxes, blocked: Boxes) -> Boxes:
    """
    Find places for labels beside points, so that no label covers another one, a point or what is blocked.

    Parameters
    ----------
    points, sizes : array
        (N, 2), in pixels: the points, and width and height of their labels.
    area : array
        (4,): left, bottom, right and top of where labels should lie.
    blocked : array
        (M, 4): boxes in the way.

    Returns
    -------
    array
        (N, 4), the labels' boxes: each the first that is free in growing rings around its point.
    """
    taken = np.concatenate([points - _GAP, points + _GAP], axis=1)
    taken = np.concatenate([taken, blocked])
    boxes = np.empty((len(points), 4))
    angles = np.radians(np.arange(0, 360, 20))
    # A box touches the ring from outside: at its left side where the angle is 0, at its top where it is -90 degrees.
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Crowded points first: they have the least choice.
    distances = np.sort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)
    for i in np.argsort(distances[:, :4].sum(1), kind="stable"):
        for ring in count():
            corners = points[i] + (_GAP + 3.0 * ring) * directions + (directions - 1) / 2 * sizes[i]
            tried = np.concatenate([corners, corners + sizes[i]], axis=1)
            free = ~_overlap(tried[:, None], taken[None]).any(1)
            if ring < _FARTHEST:  # rather outside than nowhere
                free &= (tried[:, :2] >= area[:2]).all(1) & (tried[:, 2:] <= area[2:]).all(1)
            if free.any():
                boxes[i] = tried[free.argmax()]
                taken = np.concatenate([taken, boxes[i : i + 1]])
                break
    return boxes


def _overlap(a: Boxes, b: Boxes) -> NDArray[np.bool_]:
    return np.asarray(((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1))


def _trade(axes: Axes, results: Results) -> list[tuple[float, float]]:
    """Draw what is learned against what is forgotten; return the points in the order of the methods."""
    before = results.before
    points = [(results.forgotten(name), fit.target) for name, fit in results.methods.items()]
    for family, (colour, marker) in _STYLES.items():
        own = [p for p, name in zip(points, results.methods, strict=True) if METHODS[name].family == family]
        size = 130 if marker == "*" else 48
        x, y = zip(*own, strict=True)
        axes.scatter(x, y, s=size, c=colour, marker=marker, label=family, zorder=3, linewidths=0)
    axes.scatter([0], [before.target], s=60, facecolors="none", edgecolors="black", label="before", zorder=3)
    points.append((0.0, before.target))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    width = max(x for x, _ in points) - min(x for x, _ in points)
    axes.set_xlim(min(x for x, _ in points) - 0.06 * width, max(x for x, _ in points) + 0.08 * width)
    axes.margins(y=0.07)
    axes.invert_xaxis()
    axes.set_xlabel("forgotten: points of accuracy lost on upright digits   (less is to the right)", fontsize=9)
    axes.set_title(f"Accuracy in % on digits turned by {DEGREES:g} degrees", loc="left", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.legend(loc="lower left", frameon=False, fontsize=9)
    return points


def _bars(axes: Axes, results: Results) -> None:
    names = sorted(results.methods, key=lambda name: results.methods[name].target)
    places = np.arange(len(names))
    counts = [results.methods[name].parameters for name in names]
    axes.barh(places, counts, color=[_STYLES[METHODS[name].family][0] for name in names], height=0.62)
    for place, name, value in zip(places.tolist(), names, counts, strict=True):
        number = axes.text(value * 1.12, place, f"{value:,}", va="center", fontsize=8)
        number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.text(
            1.0,
            place,
            f"{results.methods[name].target:.1f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            ha="right",
            fontsize=8,
            fontweight="bold",
        )
    axes.axvline(BUDGET, color="0.6", linewidth=0.9, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(100, max(counts) * 25)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_yticks(places, [METHODS[name].label for name in names], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Trained numbers, and accuracy", loc="left", fontsize=10)


def _label(figure: Figure, axes: Axes, results: Results, points: list[tuple[float, float]]) -> None:
    """Write each method's name beside its point, with a thin line where it had to go further away."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]  # only then is it known where everything lies
    methods = [METHODS[name] for name in results.methods]
    texts = [axes.text(0, 0, m.label, fontsize=8.5, color=_STYLES[m.family][0], va="bottom") for m in methods]
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    sizes = np.array([text.get_window_extent(renderer).size for text in texts])
    pixels = np.asarray(axes.transData.transform(np.array(points)))
    own, before = pixels[:-1], pixels[-1]
    legend = axes.get_legend()
    assert legend is not None
    blocked = np.stack([legend.get_window_extent().extents, np.concatenate([before - _GAP, before + _GAP])])
    boxes = place_labels(own, sizes, np.array(axes.get_window_extent().extents), blocked)
    back = axes.transData.inverted()
    for text, point, box in zip(texts, own, boxes, strict=True):
        x, y = back.transform(box[:2])
        text.set_position((x, y))
        near = np.clip(point, box[:2], box[2:])
        if np.linalg.norm(near - point) > 2 * _GAP:
            axes.plot(*back.transform(np.stack([point, near])).T, color="0.6", linewidth=0.7, zorder=2)


def picture(results: Results, dpi: int = 110) -> bytes:
    """Draw what each method learns and forgets, and how many numbers it trains; return a PNG file's content."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    figure.set_dpi(dpi)
    left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
    points = _trade(left, results)
    _bars(right, results)
    figure.suptitle(
        f"One network fine-tuned by {len(results.methods)} methods: {results.examples} turned digits to learn from,"
        f" {results.images} to test, seed {results.options.seed}",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    _label(figure, left, results, points)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()
