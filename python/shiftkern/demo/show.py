"""The main demonstration, presented: progress, table, files and what they show."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shiftkern.demo.adapt import METHODS, Options, Results, run
from shiftkern.demo.findings import findings
from shiftkern.demo.picture import picture
from shiftkern.demo.streams import CORRUPTIONS, ORDERS

__all__ = ["main", "markdown"]

_ORDER_WORDS = {"iid": "shuffled streams", "sorted": "streams sorted by class"}


def _rows(results: Results, order: str) -> list[list[str]]:
    """Cells of one table: method, error per corruption, and milliseconds per batch."""
    return [
        [
            METHODS[method].label,
            *(f"{errors[f'{kind}/{order}']:.1f}" for kind in CORRUPTIONS),
            f"{results.ms_per_batch[method]:.1f}",
        ]
        for method, errors in results.error.items()
    ]


def _tables(results: Results) -> Iterator[Table]:
    for order in ORDERS:
        table = Table(title=f"Error in %, {_ORDER_WORDS[order]}", title_justify="left", title_style="bold")
        table.add_column("Method", no_wrap=True)
        for heading in (*CORRUPTIONS, "ms/batch"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in _rows(results, order):
            table.add_row(*row)
        yield table


def markdown(results: Results) -> str:
    """The tables and the findings as a Markdown document."""
    options = results.options
    lines = [
        "# shiftkern demo: adaptation on shifted digit streams",
        "",
        f"Severity {options.severity} of 5, batches of {options.batch_size}, seed {options.seed}"
        + (", quick run." if options.quick else "."),
    ]
    heading = ["Method", *CORRUPTIONS, "ms/batch"]
    for order in ORDERS:
        lines += ["", f"## Error in %, {_ORDER_WORDS[order]}", ""]
        lines += ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in _rows(results, order)]
    lines += ["", "## What to see", ""]
    lines += [f"- {sentence}" for sentence in findings(results)]
    return "\n".join(lines) + "\n"


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: readers see the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; elsewhere, one plain line per step."""
    if console.is_terminal:
        columns = (TextColumn("{task.description:16}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
        with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda message, share: bar.update(task, description=message, completed=share)
        return
    last = ""

    def line(message: str, _share: float) -> None:
        nonlocal last
        if message != last:
            console.print(message, highlight=False)
            last = message

    yield line


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
    # Progress goes to stderr, so that stdout holds the result alone and can be piped.
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    with _progress(Console(stderr=True)) as progress:
        results = run(options, progress)
    _write(out / "results.json", (json.dumps(asdict(results), indent=1) + "\n").encode())
    _write(out / "results.md", markdown(results).encode())
    _write(out / "adapt.png", picture(results))
    for table in _tables(results):
        console.print(table)
    console.print("\nWhat to see", style="bold")
    for sentence in findings(results):
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(
        f"\nWritten: {', '.join(str(out / name) for name in ('adapt.png', 'results.json', 'results.md'))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
