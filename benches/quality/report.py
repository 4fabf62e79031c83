"""The study on paper: tables, a plot, a strip of images, and sentences computed from the numbers."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from quality.model import Config
from quality.study import BLOCK, Run, Schedule, Study
from shiftkern.demo import digits, output

# Okabe and Ito's colour-blind-safe colours; lines also differ in marker and style.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#7F7F7F", "marker": "", "linestyle": "--"},
    {"color": "#000000", "marker": "o", "linestyle": ":"},
    {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    {"color": "#0072B2", "marker": "^", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "v", "linestyle": "-."},
    {"color": "#D55E00", "marker": "D", "linestyle": "-"},
)
# A mean difference is called clear beyond this many of its standard errors.
_CLEAR = 2.0


def _name(schedule: Schedule) -> str:
    return f"{schedule.steps} steps, the first {schedule.full_steps} full"


_MODES = """\
- **full**: dense attention in every step, from which the others are measured.
- **reuse**: the output of the last full step, with no attention at all.
- **sparse**: attention over the kept keys alone.
- **residual**: the same, plus what the mask took away from the output at the last full step.
- **rho**: Re-ttention. It also scales by rho, the share of the attention weights that was kept at the last full step;
  rho grows by `ramp` per step.
- **merge**: attention over the kept keys, merged by log-sum-exp with the output of all others at the last full step."""


def _introduction(study: Study, config: Config, real: float) -> list[str]:
    seeds = len(study.labels) // digits.CLASSES
    first = next(iter(study.full))
    return [
        f"A small diffusion transformer ({config.depth} blocks of width {config.width} with {config.heads} heads,"
        f" trained for {config.train_steps} steps of {config.batch_size} images) draws scikit-learn's handwritten"
        f" digits, enlarged to {config.side} x {config.side}. Its tokens are the pixels: {config.side**2} queries and"
        f" keys. The same {seeds} noises for each of the ten digits are drawn by deterministic DDIM in every mode, so"
        f" each number below rests on {len(study.labels)} images. A mode takes the place of the attention in every"
        " block. A query keeps a window of keys around it, in raster order. Model and images are small: how modes rank"
        " here need not be how they rank on large ones.",
        f"The first steps are full in every mode, and so is one in {first.refresh_every} after them. In the others:",
        _MODES,
        "The error is the norm of the difference to the image of full attention over the norm of that image, pixels"
        " from -1 to 1; its standard error is over images. The digits are recognised by a small convolutional network"
        f" that is right on {100 * real:.1f} % of the real digits held out from it.",
        f"Of the masks, the first table gives the kept pairs of queries and keys, the blocks of {BLOCK} x {BLOCK} pairs"
        " that hold some, which a kernel that works by blocks computes, and its work over a whole sample, full steps"
        " included, as shares of full attention.",
        "Written by `make quality`, which trains the model once and keeps its weights in `build/quality`.",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def sheets(study: Study) -> list[output.Sheet]:
    """What the masks keep, then three tables for each schedule: error, PSNR and recognised digits."""
    steps = [f"computed, {schedule.steps} steps" for schedule in study.full]
    masks = [
        [
            f"{100 * share:g} %",
            _percent(mask.density),
            _percent(mask.block_density),
            *(_percent(study.work(schedule, share)) for schedule in study.full),
        ]
        for share, mask in study.masks.items()
    ]
    tables = [output.Sheet("What is kept", ["window", "pairs", "blocks", *steps], masks)]
    cells: dict[str, Callable[[Run], str]] = {
        "error in %": lambda run: f"{100 * run.error:.2f} ± {100 * run.standard_error:.2f}",
        "PSNR in dB": lambda run: f"{run.psnr:.1f}" if math.isfinite(run.psnr) else "equal",
        "digits recognised in %": lambda run: f"{run.accuracy:.1f}",
    }
    for schedule, full in study.full.items():
        rows = {"full": [full] * len(study.masks)}
        rows |= {mode: [study.runs[mode, schedule, share] for share in study.masks] for mode in study.modes}
        heading = ["mode", *(_percent(mask.density) for mask in study.masks.values())]
        for title, cell in cells.items():
            table = [[mode, *map(cell, runs)] for mode, runs in rows.items()]
            tables.append(output.Sheet(f"{_name(schedule)}: {title}", heading, table))
    return tables


def _scale(study: Study) -> str:
    parts = [
        f"{_percent(study.between_seeds[schedule])} in {schedule.steps} steps ({full.accuracy:.1f} % are recognised)"
        for schedule, full in study.full.items()
    ]
    return f"For scale: with full attention, another seed's image of the same digit is off by {'; '.join(parts)}."


def _closest(study: Study) -> list[str]:
    sentences = []
    for schedule in study.full:
        best = []
        for share, mask in study.masks.items():
            ranked = sorted((study.runs[mode, schedule, share].error, mode) for mode in study.modes)
            (low, first), (_, second) = ranked[:2]
            tied = "" if study.compare(first, second, schedule, share) < -_CLEAR else f", not clearly ahead of {second}"
            best.append(f"{first} at {_percent(mask.density)} ({_percent(low)}{tied})")
        sentences.append(f"Closest to full attention in {schedule.steps} steps: {'; '.join(best)}.")
    return sentences


def _pair(study: Study, mode: str, other: str) -> str:
    settings = [(schedule, share) for schedule in study.full for share in study.masks]
    scores = [study.compare(mode, other, *setting) for setting in settings]
    closer, farther = sum(score < -_CLEAR for score in scores), sum(score > _CLEAR for score in scores)
    logs = [math.log(study.runs[mode, *setting].error / study.runs[other, *setting].error) for setting in settings]
    return (
        f"“{mode}” against “{other}”: clearly closer in {closer} of {len(settings)} settings, clearly farther in"
        f" {farther}; its error is {math.exp(sum(logs) / len(logs)):.2f} times as large (geometric mean,"
        f" {math.exp(min(logs)):.2f} to {math.exp(max(logs)):.2f})."
    )


def _recognised(study: Study) -> str:
    worst = {mode: min(run.accuracy for (m, _, _), run in study.runs.items() if m == mode) for mode in study.modes}
    full = min(run.accuracy for run in study.full.values())
    listed = ", ".join(f"{mode} {accuracy:.1f} %" for mode, accuracy in worst.items())
    return f"Digits recognised at the worst setting of each mode: {listed}; full attention {full:.1f} %."


_PAIRS = (
    ("reuse", "sparse"),
    ("residual", "reuse"),
    ("rho, ramp 0", "reuse"),
    ("merge", "reuse"),
    ("rho, ramp 0", "residual"),
    ("rho, ramp 0.04", "rho, ramp 0"),
    ("merge", "rho, ramp 0"),
    ("merge", "residual"),
)


def findings(study: Study) -> list[str]:
    """What the numbers say, whichever way they came out."""
    return [_scale(study), *_closest(study), *(_pair(study, *pair) for pair in _PAIRS), _recognised(study)]


def _png(figure: Figure, dpi: int) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def _curves(axes: Axes, study: Study, schedule: Schedule) -> None:
    densities = [100 * mask.density for mask in study.masks.values()]
    for mode, style in zip(study.modes, _STYLES, strict=True):
        runs = [study.runs[mode, schedule, share] for share in study.masks]
        errors, spread = [100 * run.error for run in runs], [100 * run.standard_error for run in runs]
        axes.errorbar(densities, errors, spread, label=mode, capsize=2, markersize=5, **style)
    axes.axhline(100 * study.between_seeds[schedule], color="0.6", linewidth=1, zorder=0)
    axes.annotate(
        "another seed",
        (1, 100 * study.between_seeds[schedule]),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
        color="0.4",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(densities, [f"{density:.3g}" for density in densities])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("kept pairs of queries and keys in %")
    axes.set_title(_name(schedule), loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)


def curves_picture(study: Study, dpi: int = 110) -> bytes:
    """Draw error against density, one line per mode and one panel per schedule; return a PNG file's content."""
    figure = Figure(figsize=(5 * len(study.full), 4.4), layout="constrained")
    panels = figure.subplots(1, len(study.full), sharey=True, squeeze=False)[0]
    for axes, schedule in zip(panels, study.full, strict=True):
        _curves(axes, study, schedule)
    panels[0].set_ylabel("difference from full attention's image in %")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(study.modes), frameon=False
    )
    figure.suptitle("Digits drawn with sparse attention: how far from full attention", x=0.01, ha="left", fontsize=12)
    return _png(figure, dpi)


def samples_picture(study: Study, dpi: int = 110) -> bytes:
    """Draw each digit's first seed under every mode, at two densities of the first schedule; return a PNG's content."""
    schedule, full = next(iter(study.full.items()))
    shares = [list(study.masks)[len(study.masks) // 2 - 1], list(study.masks)[-1]]
    seeds = len(study.labels) // digits.CLASSES

    def strip(run: Run) -> np.ndarray:
        return torch.cat(list(run.images[::seeds, 0]), dim=1).numpy()

    figure = Figure(figsize=(11, 0.55 * (1 + len(study.modes)) + 0.7), layout="constrained")
    panels = figure.subplots(1 + len(study.modes), len(shares), squeeze=False)
    for column, share in enumerate(shares):
        runs = {"full": full} | {mode: study.runs[mode, schedule, share] for mode in study.modes}
        for axes, (mode, run) in zip(panels[:, column], runs.items(), strict=True):
            axes.imshow(strip(run), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(mode, rotation=0, ha="right", va="center", fontsize=9)
        panels[0, column].set_title(f"{_percent(study.masks[share].density)} of the pairs kept", loc="left", fontsize=9)
    figure.suptitle(f"The same noise under every mode: {_name(schedule)}", x=0.01, ha="left", fontsize=11)
    return _png(figure, dpi)


def write(page: Path, study: Study, config: Config, real: float) -> None:
    """Write the page, and both pictures into a folder ``images`` beside it; ``real``: accuracy on real digits."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = {
        f"{page.stem}.png": ("Error against density", curves_picture(study)),
        f"{page.stem}-samples.png": ("The same noise under every mode", samples_picture(study)),
    }
    for name, (_, content) in pictures.items():
        output.write(images / name, content)
    paragraphs = [
        text if text is _MODES else textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
        for text in _introduction(study, config, real)
    ]
    paragraphs += [f"![{title}](images/{name})" for name, (title, _) in pictures.items()]
    text = output.markdown("Image quality with Re-ttention", "\n\n".join(paragraphs), sheets(study), findings(study))
    output.write(page, text.encode())
