"""What a run shows, in words. Every sentence is computed from the measured error rates, absent effects included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shiftkern.demo.adapt import METHODS, SOURCE_WEIGHT, UNMIX_COMPONENTS, UNMIX_MOMENTUM, Results
from shiftkern.demo.streams import CORRUPTIONS

__all__ = ["findings"]

# Percentage points. With 896 images, twice the standard error of a rate near 5 % is about 1.5.
_CLEAR = 3.0
_SMALL = 2.0


def _mean(results: Results, method: str, order: str) -> float:
    return sum(results.error[method][f"{kind}/{order}"] for kind in CORRUPTIONS) / len(CORRUPTIONS)


def _contrast(results: Results) -> str:
    source, batch = results.error["source"]["contrast/iid"], results.error["bn"]["contrast/iid"]
    numbers = f"{source:.1f} % error without adaptation, {batch:.1f} % with batch statistics"
    if source - batch > _CLEAR:
        return f"Batch statistics repair the contrast shift: {numbers}."
    return f"Batch statistics do not help under this contrast shift: {numbers}."


def _class_order(results: Results) -> str:
    iid, sorted_ = results.error["bn"]["clean/iid"], results.error["bn"]["clean/sorted"]
    source = results.error["source"]["clean/sorted"]
    numbers = f"{iid:.1f} % shuffled, {sorted_:.1f} % sorted by class (source model: {source:.1f} %)"
    if sorted_ - max(iid, source) > _CLEAR:
        return f"The same statistics fail when classes arrive in a row, even on clean images: {numbers}."
    return f"Class order does not hurt batch statistics here: {numbers}."


def _compromise(results: Results) -> str:
    iid, sorted_ = results.error["alpha"]["clean/iid"], results.error["alpha"]["clean/sorted"]
    source, batch = results.error["source"], results.error["bn"]
    contrast = results.error["alpha"]["contrast/iid"]
    numbers = f"clean {iid:.1f} % shuffled, {sorted_:.1f} % sorted"
    if max(iid - source["clean/iid"], sorted_ - source["clean/sorted"]) <= _SMALL:
        verdict = f"AlphaBN with source_weight={SOURCE_WEIGHT} is safe in both orders: {numbers}."
    else:
        verdict = f"AlphaBN with source_weight={SOURCE_WEIGHT} does not keep both orders here: {numbers}."
    price = (
        f" It repairs contrast only in part ({source['contrast/iid']:.1f} -> {contrast:.1f} %)."
        if contrast - batch["contrast/iid"] > _CLEAR
        else f" Contrast shift: {source['contrast/iid']:.1f} -> {contrast:.1f} %."
    )
    return verdict + price


def _unmix(results: Results) -> str:
    source, unmix = results.error["source"], results.error["unmix"]
    numbers = (
        f"clean {unmix['clean/iid']:.1f} %, source {source['clean/iid']:.1f} %; mean over the shuffled streams"
        f" {_mean(results, 'unmix', 'iid'):.1f} %, source {_mean(results, 'source', 'iid'):.1f} %"
    )
    # A component takes part in one of K instances on average, and moves by `momentum` per 64 instances.
    way = 1 - (1 - UNMIX_MOMENTUM / UNMIX_COMPONENTS) ** (results.images / 64)
    if way < 0.25:
        return (
            f"UnMix-TNS ({numbers}) has no time to adapt: on {results.images} images its components go about"
            f" {100 * way:.0f} % of the way to the stream. It differs from the source model mainly by the"
            f" random start of its {UNMIX_COMPONENTS} components."
        )
    return f"UnMix-TNS: {numbers}."


def _output(results: Results) -> str:
    iid, sorted_ = _mean(results, "lame", "iid"), _mean(results, "lame", "sorted")
    numbers = f"mean error {iid:.1f} % shuffled, {sorted_:.1f} % sorted"
    if iid - sorted_ > _SMALL:
        return f"LAME, which smooths predictions between similar images, gains from class order: {numbers}."
    return f"LAME, which smooths predictions between similar images, does not gain from class order here: {numbers}."


def _ranking(results: Results) -> str:
    parts = []
    for order, words in (("iid", "shuffled"), ("sorted", "class-sorted")):
        errors = {name: _mean(results, name, order) for name in results.error}
        best = min(errors, key=errors.__getitem__)
        parts.append(f"{METHODS[best].label} on {words} streams ({errors[best]:.1f} %)")
    return "Lowest mean error: " + ", ".join(parts) + "."


_RULES: Sequence[tuple[tuple[str, ...], Callable[[Results], str]]] = (
    (("source", "bn"), _contrast),
    (("source", "bn"), _class_order),
    (("source", "bn", "alpha"), _compromise),
    (("source", "unmix"), _unmix),
    (("lame",), _output),
    ((), _ranking),
)


def findings(results: Results) -> list[str]:
    """Sentences for the effects that the methods of this run allow to judge."""
    return [rule(results) for needed, rule in _RULES if set(needed) <= set(results.error)]
