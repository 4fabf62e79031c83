"""The main demonstration, presented: tables, files and what they show."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from shiftkern.demo import output
from shiftkern.demo.adapt import METHODS, Options, Results, run
from shiftkern.demo.findings import findings
from shiftkern.demo.picture import picture
from shiftkern.demo.streams import CORRUPTIONS, ORDERS

__all__ = ["main"]

_ORDER_WORDS = {"iid": "shuffled streams", "sorted": "streams sorted by class"}


def _sheet(results: Results, order: str) -> output.Sheet:
    """One table: method, error per corruption, and milliseconds per batch."""
    return output.Sheet(
        f"Error in %, {_ORDER_WORDS[order]}",
        ["Method", *CORRUPTIONS, "ms/batch"],
        [
            [
                METHODS[method].label,
                *(f"{errors[f'{kind}/{order}']:.1f}" for kind in CORRUPTIONS),
                f"{results.ms_per_batch[method]:.1f}",
            ]
            for method, errors in results.error.items()
        ],
    )


def main(options: Options, out: Path) -> int:
    """
    Run, print and write ``results.json``, ``results.md`` and ``adapt.png`` under `out`.

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
    sheets, sentences = [_sheet(results, order) for order in ORDERS], findings(results)
    settings = f"Severity {options.severity} of 5, batches of {options.batch_size}, seed {options.seed}"
    document = output.markdown(
        "shiftkern demo: adaptation on shifted digit streams",
        settings + (", quick run." if options.quick else "."),
        sheets,
        sentences,
    )
    files = {
        "adapt.png": picture(results),
        "results.json": (json.dumps(asdict(results), indent=1) + "\n").encode(),
        "results.md": document.encode(),
    }
    for name, content in files.items():
        output.write(out / name, content)
    output.show(sheets, sentences, out, list(files))
    return 0
