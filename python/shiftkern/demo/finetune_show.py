"""The fine-tuning demonstration, presented: tables, files and what they show."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path as FilePath

from shiftkern.demo import output
from shiftkern.demo.finetune import BUDGET, DEGREES, FAMILIES, METHODS, Fit, Options, Results, run
from shiftkern.demo.finetune_picture import picture

__all__ = ["findings", "main"]

# Percentage points. With 896 images, twice the standard error of a rate near 80 % is about 2.7.
_CLEAR = 3.0
# A rotation that was computed in float32.
_ROUNDING = 1e-5


def _row(label: str, fit: Fit, *, trained: bool) -> list[str]:
    accuracies = [f"{fit.target:.1f}", f"{fit.source:.1f}"]
    if not trained:
        return [label, "", *accuracies, "", "", ""]
    error = "" if fit.off_orthogonal is None else f"{fit.off_orthogonal:.0e}"
    return [label, f"{fit.parameters:,}", *accuracies, f"{fit.rate:g}", f"{fit.seconds:.2f}", error]


def _sheets(results: Results) -> list[output.Sheet]:
    heading = ["Method", "numbers", "turned", "upright", "rate", "s", "|RR'-I|"]
    rows = [_row("before", results.before, trained=False)]
    rows += [
        _row(METHODS[name].label + " *" * METHODS[name].fixed, fit, trained=True)
        for name, fit in results.methods.items()
    ]
    return [output.Sheet(f"Accuracy in % (* does not come in a size near {BUDGET})", heading, rows)]


def _adapters(results: Results) -> dict[str, Fit]:
    return {name: fit for name, fit in results.methods.items() if fit.switched_off is not None}


def _best(results: Results) -> str:
    full, adapters = results.methods["full"], _adapters(results)
    best = max(adapters, key=lambda name: adapters[name].target)
    fit = adapters[best]
    gap = full.target - fit.target
    verdict = f"{gap:.1f} points less" if gap > _CLEAR else "not clearly less" if gap >= 0 else "not less"
    return (
        f"Images turned by {DEGREES:g} degrees: {results.before.target:.1f} % before, {full.target:.1f} % after"
        f" training all {full.parameters:,} numbers. The best adapter, {METHODS[best].label}, has {fit.target:.1f} %"
        f" with {fit.parameters:,} ({fit.parameters / full.parameters:.1%}): {verdict}."
    )


def _families(results: Results) -> str:
    """What families do with equally many numbers."""
    groups: dict[str, list[float]] = {}
    for name, fit in results.methods.items():
        if not METHODS[name].fixed:
            groups.setdefault(METHODS[name].family, []).append(fit.target)
    ranges = [
        f"{family} {min(values):.1f} to {max(values):.1f} %" if len(values) > 1 else f"{family} {values[0]:.1f} %"
        for family, values in groups.items()
    ]
    turned = min(groups[FAMILIES[1]])
    above = [family for family, values in groups.items() if turned > max(values) + _CLEAR]
    start = f"With about {BUDGET} numbers each: {', '.join(ranges)}."
    if not above:
        return f"{start} The shift is a rotation, but methods that rotate are not all clearly ahead."
    return f"{start} The shift is a rotation itself; of these, all that rotate are ahead of {' and '.join(above)}."


def _forgetting(results: Results) -> str:
    """Whether what is learned is paid for on the source."""
    fits = list(results.methods.values())
    agreement = _rank_correlation([fit.target for fit in fits], [fit.source for fit in fits])
    full = results.methods["full"]
    gain = (full.target - results.before.target) / 2
    good = [name for name, fit in results.methods.items() if fit.target - results.before.target >= gain]
    least = min(good, key=results.forgotten)
    verdict = (
        "Who learns the new task better forgets more of the old one"
        if agreement < -0.5
        else "How much is forgotten does not follow from how much is learned"
    )
    return (
        f"{verdict} (rank correlation of the two accuracies {agreement:+.2f}). Of methods that gain at least half of"
        f" what full fine-tuning does, {METHODS[least].label} forgets least: upright images fall from"
        f" {results.before.source:.1f} to {results.methods[least].source:.1f} %; with full fine-tuning to"
        f" {full.source:.1f} %."
    )


def _ranks(values: list[float]) -> list[float]:
    """Ranks from 0; equal values share their mean rank."""
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def _rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    a, b = _ranks(x), _ranks(y)
    middle = (len(x) - 1) / 2
    both = sum((p - middle) * (q - middle) for p, q in zip(a, b, strict=True))
    size = (sum((p - middle) ** 2 for p in a) * sum((q - middle) ** 2 for q in b)) ** 0.5
    return both / size if size > 0 else 0.0


def _rotations(results: Results) -> str:
    errors = {name: fit.off_orthogonal for name, fit in results.methods.items() if fit.off_orthogonal is not None}
    kept = {name: error for name, error in errors.items() if error < _ROUNDING}
    free = [f"{METHODS[name].label} {error:.1e}" for name, error in errors.items() if name not in kept]
    names = ", ".join(METHODS[name].label for name in kept)
    start = f"After training {names} are orthogonal up to {max(kept.values()):.0e}"
    return f"{start}; relaxed forms are not ({', '.join(free)})." if free else f"{start}."


def _taken_out(results: Results) -> str:
    """What is left of the adapters when they are switched off or merged."""
    adapters = _adapters(results)
    off = [METHODS[n].label for n, fit in adapters.items() if fit.switched_off != results.before.source]
    source = f"the {results.before.source:.1f} % on upright images are back"
    switched = f"Adapters switched off, {source}" + (f" but with {', '.join(off)}." if off else " with every method.")
    merged = {n: fit.relabelled for n, fit in adapters.items() if fit.relabelled is not None}
    changed = [f"{METHODS[n].label} {count}" for n, count in merged.items() if count]
    outside = [METHODS[n].label for n in adapters if n not in merged]
    labels = f"of {results.images} turned images, {', '.join(changed)} get" if changed else "no image gets"
    never = f" {', '.join(outside)} cannot be merged." if outside else ""
    return f"{switched} Merged into the weights, {labels} another label.{never}"


def findings(results: Results) -> list[str]:
    """What a run shows, in words computed from the measurements, absent effects included."""
    return [rule(results) for rule in (_best, _families, _forgetting, _rotations, _taken_out)]


def main(options: Options, out: FilePath) -> int:
    """
    Run, print and write ``finetune.png``, ``finetune.json`` and ``finetune.md`` under `out`.

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
        f"Seed {options.seed}{', quick run' if options.quick else ''}. A network trained on upright digits learns from"
        f" {results.examples} labelled ones that are turned by {DEGREES:g} degrees; {results.images} test images of"
        " each kind. Learning rates are chosen on validation images. |RR'-I| is the largest entry over the layers."
    )
    files = {
        "finetune.png": picture(results),
        "finetune.json": (json.dumps(asdict(results), indent=1) + "\n").encode(),
        "finetune.md": output.markdown("shiftkern demo: fine-tuning", settings, sheets, sentences).encode(),
    }
    for name, content in files.items():
        output.write(out / name, content)
    output.show(sheets, sentences, out, list(files))
    return 0
