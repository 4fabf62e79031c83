"""The merging demonstration, presented: tables, files and what they show."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path as FilePath

from shiftkern.demo import output
from shiftkern.demo.merge import METHODS, PATHS, TASKS, Merge, Options, Results, run
from shiftkern.demo.merge_picture import picture

__all__ = ["findings", "main"]

# Percentage points. With three times 896 images, twice the standard error of a mean rate near 80 % is about 1.5.
_CLEAR = 1.5
_MARKS = {"": "", "unlabelled": " *", "validation": " +"}


def _row(label: str, network: Merge, timed: bool) -> list[str]:
    scale = "" if network.scale is None else f"{network.scale:g}"
    numbers = [f"{value:.1f}" for value in (*network.accuracy, network.mean)]
    return [label, *numbers, scale, f"{network.seconds:.3f}" if timed else ""]


def _sheets(results: Results) -> list[output.Sheet]:
    heading = ["Network", *TASKS, "mean", "scale", "s"]
    alone = [_row("parent", results.parent, False)]
    alone += [_row(f"expert: {name}", expert, False) for name, expert in results.experts.items()]
    merged = [
        _row(METHODS[name].label + _MARKS[METHODS[name].learns_from], network, True)
        for name, network in results.methods.items()
    ]
    middle = len(results.places) // 2
    paths = [
        [
            name,
            f"{path.loss[middle]:.2f}",
            f"{path.barrier(results.places):.2f}",
            f"{path.accuracy[middle]:.1f}",
            f"{path.seconds:.3f}",
        ]
        for name, path in results.paths.items()
    ]
    return [
        output.Sheet("Accuracy in %, before merging", heading[:-2], [row[:-2] for row in alone]),
        output.Sheet("Merged: accuracy in % (* saw test inputs, + validation labels)", heading, merged),
        output.Sheet(
            "Half way between two networks trained independently",
            ["Alignment", "loss", "barrier", "accuracy %", "s"],
            paths,
        ),
    ]


def _experts(results: Results) -> str:
    tasks = range(len(TASKS))
    experts = [expert.accuracy for expert in results.experts.values()]
    own = sum(experts[i][i] for i in tasks) / len(tasks)
    other = sum(experts[i][j] for i in tasks for j in tasks if i != j) / (len(tasks) * (len(tasks) - 1))
    return (
        f"On its own task an expert has {own:.1f} % on average, on those of others {other:.1f} %; the parent has"
        f" {results.parent.mean:.1f} %."
    )


def _merged(results: Results) -> str:
    """Whether one network stands for three, and how much the method matters."""
    expert = max(results.experts, key=lambda name: results.experts[name].mean)
    alone = results.experts[expert].mean
    means = {METHODS[name].label: network.mean for name, network in results.methods.items()}
    best = max(means, key=lambda label: means[label])
    average = means[METHODS["soup"].label]
    verdict = "more than" if means[best] > alone + _CLEAR else "not clearly more than"
    return (
        f"One network for all tasks: the plain average has {average:.1f} %; the best, {best}, has {means[best]:.1f} %,"
        f" {verdict} the expert that is best on all of them ({expert}, {alone:.1f} %)."
    )


def _blind(results: Results) -> str:
    """Of methods that see no labels at all: where the surest predictions are not the right ones."""
    names = [name for name in results.methods if METHODS[name].learns_from == "unlabelled"]
    found = []
    for name in names:
        accuracy = results.methods[name].accuracy
        below = [
            f"{task} {now:.1f} < {before:.1f} %"
            for task, now, before in zip(TASKS, accuracy, results.parent.accuracy, strict=True)
            if now < before - _CLEAR
        ]
        fell = f", but less than the parent on {', '.join(below)}" if below else ""
        found.append(f"{METHODS[name].label} {results.methods[name].mean:.1f} %{fell}")
    moral = " Sure is not the same as right." if any("but less" in words for words in found) else ""
    return f"Learning from the entropy of predictions on unlabelled test images: {'; '.join(found)}.{moral}"


def _pairs(results: Results) -> str:
    names = [name for name in results.methods if name.startswith("slerp")]
    short = [
        name
        for name in names
        if str(min(range(len(TASKS)), key=lambda task: results.methods[name].accuracy[task])) not in name.split("_")
    ]
    return f"Slerp takes two networks: in {len(short)} of {len(names)} pairs the task left out is the worst."


def _strangers(results: Results) -> str:
    middle = len(results.places) // 2
    plain, *aligned = (results.paths[name] for name in PATHS)
    numbers = ", ".join(
        f"{path.barrier(results.places):.2f} and {path.accuracy[middle]:.1f} % with {name}"
        for name, path in zip(PATHS[1:], aligned, strict=True)
    )
    start = (
        f"Half way between two networks that were trained independently, accuracy is {plain.accuracy[middle]:.1f} %,"
        f" behind a loss barrier of {plain.barrier(results.places):.2f}"
    )
    better = all(path.barrier(results.places) < plain.barrier(results.places) / 2 for path in aligned)
    if not better:
        return f"{start}; aligning their units does not help: {numbers}."
    return f"{start}. With their units aligned: {numbers}."


def findings(results: Results) -> list[str]:
    """What a run shows, in words computed from the measurements, absent effects included."""
    return [_experts(results), _merged(results), _blind(results), _pairs(results), _strangers(results)]


def main(options: Options, out: FilePath) -> int:
    """
    Run, print and write ``merge.png``, ``merge.json`` and ``merge.md`` under `out`.

    Returns
    -------
    int
        The exit code, 0.

    Raises
    ------
    OSError
        Where `out` cannot be created or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with output.progress() as progress:
        results = run(options, progress)
    sheets, sentences = _sheets(results), findings(results)
    settings = (
        f"Seed {options.seed}{', quick run' if options.quick else ''}. {results.images} test images of each task; the"
        f" parent has {results.clean:.1f} % on clean ones. Scales are chosen on validation images."
    )
    files = {
        "merge.png": picture(results),
        "merge.json": (json.dumps(asdict(results), indent=1) + "\n").encode(),
        "merge.md": output.markdown("shiftkern demo: merging networks", settings, sheets, sentences).encode(),
    }
    for name, content in files.items():
        output.write(out / name, content)
    output.show(sheets, sentences, out, list(files))
    return 0
