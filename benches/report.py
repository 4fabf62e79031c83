"""Run every bench and write docs/benchmarks.md with its plots.

``python benches/report.py OUT.md [family ...]`` from anywhere; plots go to an ``images`` folder beside the page. With
families named, only theirs are measured, and the sections of the others stay as they are in the page.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib as mpl

import bench_attention
import bench_merge
import bench_norm
import bench_ot
import bench_rotation
import bench_sort
import bench_tta
from harness import Result, machine, refuse_debug_build

mpl.use("Agg")
import matplotlib.pyplot as plt

FAMILIES = {
    "norm": bench_norm.results,
    "ot": bench_ot.results,
    "sort": bench_sort.results,
    "tta": bench_tta.results,
    "attention": bench_attention.results,
    "merge": bench_merge.results,
    "rotation": bench_rotation.results,
}


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def asked_table(results: list[Result]) -> list[str]:
    lines = ["| work | size | against | asked | measured |", "|---|---|---|---:|---:|"]
    for r in results:
        for case, peer, ratio in r.asked:
            name = f"best peer ({r.best_peer()})" if peer == "best" else peer
            measured = r.ratio(case, peer)
            verdict = "" if measured >= ratio else " (missed)"
            lines.append(f"| {r.work}, {case} | {r.size} | {name} | {ratio:.3g}x | {measured:.1f}x{verdict} |")
    return lines


def result_table(result: Result) -> list[str]:
    limit = f"times of *{result.limit}*" if result.limit else "of limit"
    lines = [
        f"### {result.work}: {result.size}",
        "",
        f"| case | ms (quartiles) | speed-up | {limit} |",
        "|---|---|---:|---:|",
    ]
    for case, t in result.timings.items():
        ours = case in result.ours
        ratio = f"{result.ratio(case):.1f}x" if ours else ""
        of_limit = result.of_limit(case)
        share = f"{of_limit:.1f}" if ours and of_limit is not None else ""
        name = f"**{case}**" if ours else case
        spread = f"{milliseconds(t.low)} to {milliseconds(t.high)}"
        lines.append(f"| {name} | {milliseconds(t.median)} ({spread}) | {ratio} | {share} |")
    return [*lines, ""]


def plot(family: str, results: list[Result], target: Path) -> None:
    """Draw the speed-up over the best peer for each case of ours."""
    bars = [(f"{r.work}, {r.size}", case, r.ratio(case)) for r in results for case in r.ours]
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(bars) + 1.2), layout="constrained")
    colours = ["#0072b2" if ratio >= 1 else "#d55e00" for *_, ratio in bars]
    labels = [f"{work}\n{case}" if case != "shiftkern" else work for work, case, _ in bars]
    drawn = axes.barh(range(len(bars)), [ratio for *_, ratio in bars], color=colours)
    axes.bar_label(drawn, [f"{ratio:.1f}x" for *_, ratio in bars], padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the fastest peer in the same process (log scale)")
    axes.set_title(f"shiftkern.{family} on CPU")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def section(family: str, results: list[Result], images: Path) -> str:
    """Draw a family's plots and write what the page says of it."""
    plot(family, results, images / f"bench-{family}.png")
    lines = [f"## {family}", "", f"![Speed-up of shiftkern.{family}](images/bench-{family}.png)", ""]
    if family == "attention":
        bench_attention.plot_density(results, images / "bench-attention-density.png")
        lines += ["![Time against density](images/bench-attention-density.png)", ""]
    lines += ["### What was asked for", "", *asked_table(results), ""]
    for result in results:
        lines += result_table(result)
    return "\n".join(lines)


def main(page: Path, chosen: list[str]) -> None:
    """Measure, print as it goes, and write the page when all is done."""
    refuse_debug_build()
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    written = re.split(r"\n(?=## )", page.read_text())[1:] if chosen and page.exists() else []
    sections = {text.partition("\n")[0].removeprefix("## "): text for text in written}
    for family in chosen or FAMILIES:
        results = []
        for result in FAMILIES[family]():
            results.append(result)
            ours = ", ".join(f"{case} {result.ratio(case):.1f}x" for case in result.ours)
            print(f"{result.work}: {result.size}: {ours}", flush=True)
        sections[family] = section(family, results, images)
    head = [
        "# Benchmarks",
        "",
        "Written by `make bench`. All cases of a table run in one process, in turn, on equal threads, dtype and data;",
        "results are checked against each other first. Speed-up is against the fastest peer of the table (medians).",
        "Each target stands against the peer it was set for, and against the fastest peer found since.",
        "",
        *(f"- {name}: {value}" for name, value in machine().items()),
        "",
    ]
    parts = ["\n".join(head), *(sections[family].rstrip() + "\n" for family in FAMILIES if family in sections)]
    page.write_text("\n".join(parts))
    print(f"wrote {page}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(FAMILIES):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
