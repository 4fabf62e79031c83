"""The transport demonstration, presented: tables, files and what they show."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from shiftkern.demo import output
from shiftkern.demo.transport import DIGIT_REGS, PHOTOGRAPHS, Options, Results, run
from shiftkern.demo.transport_picture import colours_picture, digits_picture

__all__ = ["findings", "main"]

# Percentage points. With 896 images, twice the standard error of a rate near 90 % is about 2.
_CLEAR = 2.0


def _sheets(results: Results) -> list[output.Sheet]:
    colours = [
        [
            f"{PHOTOGRAPHS[side]} -> {PHOTOGRAPHS[1 - side]}",
            f"{found.reg:g}",
            str(found.iterations),
            f"{found.marginal_error:.0e}",
            f"{found.cost:.4f}",
            f"{found.distance[side]:.3f}",
            f"{found.seconds:.2f}",
            f"{found.map_seconds[side]:.2f}",
        ]
        for found in results.colours
        for side in range(2)
    ]
    regs = [f"reg {share:g}" for share in DIGIT_REGS]
    shifts = results.shifts.items()
    return [
        output.Sheet(
            f"Colours: {results.pixels} pixels in the plan, distance {results.distance:.3f} before",
            ["Photographs", "reg", "steps", "error", "cost", "distance", "plan s", "map s"],
            colours,
        ),
        output.Sheet(
            "Digits: accuracy of the nearest neighbour in %",
            ["Shift", "before", *regs, "exact", "plans s"],
            [[name, *(f"{x:.1f}" for x in shift.accuracy), f"{shift.seconds:.2f}"] for name, shift in shifts],
        ),
        output.Sheet(
            "Digits: Sinkhorn divergence of both sides",
            ["Shift", "before", *regs],
            [[name, *(f"{x:.2f}" for x in shift.divergence)] for name, shift in shifts],
        ),
    ]


def _colours(results: Results) -> str:
    after = {found.reg: sum(found.distance) / len(found.distance) for found in results.colours}
    soft, sharp = max(after), min(after)
    numbers = f"{results.distance:.3f} before, {after[soft]:.3f} with reg {soft:g}, {after[sharp]:.3f} with {sharp:g}"
    if not after[sharp] < results.distance:
        return f"The photographs' colours do not come closer: {numbers}."
    if not after[sharp] < after[soft]:
        return f"The photographs' colours come closer, but no more so with less regularisation: {numbers}."
    steps = {found.reg: found.iterations for found in results.colours}
    return (
        f"The photographs' colours come closer, and closer with less regularisation: distance {numbers}, at the price"
        f" of {steps[sharp]} iterations instead of {steps[soft]}."
    )


def _gains(results: Results) -> str:
    """Which shifts transport repairs, and where it does harm, at the larger of the two regularisations."""
    changes = {name: (shift.accuracy[0], shift.accuracy[1]) for name, shift in results.shifts.items()}

    def listed(names: list[str]) -> str:
        return ", ".join(f"{name} {changes[name][0]:.1f} -> {changes[name][1]:.1f} %" for name in names) or "nowhere"

    better = [name for name, (before, after) in changes.items() if after - before > _CLEAR]
    worse = [name for name, (before, after) in changes.items() if before - after > _CLEAR]
    rest = [name for name in changes if name not in better and name not in worse]
    return (
        f"With reg {DIGIT_REGS[0]:g} transport helps the nearest neighbour by more than {_CLEAR:g} points:"
        f" {listed(better)}. It hurts: {listed(worse)}. It changes little: {listed(rest)}."
    )


def _smoothing(results: Results) -> str:
    soft = [name for name, shift in results.shifts.items() if shift.accuracy[1] > shift.accuracy[-1]]
    clean = results.shifts["clean"].accuracy
    return (
        f"Reg {DIGIT_REGS[0]:g} is better than exact transport on {len(soft)} of {len(results.shifts)} shifts: exact"
        " transport pairs images one to one, whatever their class. Without any shift it turns"
        f" {clean[0]:.1f} % into {clean[-1]:.1f} %, reg {DIGIT_REGS[0]:g} into {clean[1]:.1f} %."
    )


def _blind(results: Results) -> str | None:
    """Shifts under which the two sides come together without their classes doing so."""
    names = [
        name
        for name, shift in results.shifts.items()
        if shift.divergence[1] < shift.divergence[0] / 2 and shift.accuracy[1] < 50
    ]
    if not names:
        return None
    numbers = "; ".join(
        f"{name}: divergence {shift.divergence[0]:.1f} -> {shift.divergence[1]:.1f}, accuracy {shift.accuracy[0]:.1f}"
        f" -> {shift.accuracy[1]:.1f} %"
        for name, shift in ((name, results.shifts[name]) for name in names)
    )
    reason = (
        " Transport by squared distances keeps brighter what was brighter; inversion is the opposite."
        if "inverted" in names
        else ""
    )
    return f"Close is not the same as right: {numbers}.{reason}"


def _unfinished(results: Results) -> str | None:
    plans = [f"colours {found.reg:g}" for found in results.colours if not found.converged]
    plans += [name for name, shift in results.shifts.items() if not shift.converged]
    return f"Not converged: {', '.join(plans)}." if plans else None


def findings(results: Results) -> list[str]:
    """What a run shows, in words computed from the measurements, absent effects included."""
    sentences = (_colours(results), _gains(results), _smoothing(results), _blind(results), _unfinished(results))
    return [sentence for sentence in sentences if sentence is not None]


def main(options: Options, out: Path) -> int:
    """
    Run, print and write ``transport.json``, ``transport.md`` and two pictures under `out`.

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
        results, images = run(options, progress)
    sheets, sentences = _sheets(results), findings(results)
    settings = (
        f"Seed {options.seed}{', quick run' if options.quick else ''}. The digits classified are those transported to,"
        f" {results.images} on each side; the plans do not see labels. reg of digits: share of the mean cost."
    )
    files = {
        "transport-colours.png": colours_picture(results, images),
        "transport-digits.png": digits_picture(results, images),
        "transport.json": (json.dumps(asdict(results), indent=1) + "\n").encode(),
        "transport.md": output.markdown("shiftkern demo: optimal transport", settings, sheets, sentences).encode(),
    }
    for name, content in files.items():
        output.write(out / name, content)
    output.show(sheets, sentences, out, list(files))
    return 0
