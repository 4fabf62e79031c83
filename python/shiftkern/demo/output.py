"""What all demonstrations share of their output: progress, tables, findings and files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["Sheet", "markdown", "progress", "show", "write"]


@dataclass(frozen=True)
class Sheet:
    """A table: the first column holds names, the others numbers."""

    title: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]


def markdown(title: str, settings: str, sheets: Sequence[Sheet], findings: Sequence[str]) -> str:
    """The tables and the findings as a Markdown document."""
    lines = [f"# {title}", "", settings]
    for sheet in sheets:
        lines += ["", f"## {sheet.title}", ""]
        lines += ["| " + " | ".join(sheet.heading) + " |", "|---|" + "---:|" * (len(sheet.heading) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in sheet.rows]
    lines += ["", "## What to see", ""]
    lines += [f"- {sentence}" for sentence in findings]
    return "\n".join(lines) + "\n"


def show(sheets: Sequence[Sheet], findings: Sequence[str], out: Path, files: Sequence[str]) -> None:
    """Print tables, findings and the names of the written files to stdout."""
    console = Console()
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        table.add_column(sheet.heading[0], no_wrap=True)
        for heading in sheet.heading[1:]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    console.print("\nWhat to see", style="bold")
    for sentence in findings:
        console.print(f"- {sentence}", highlight=False, markup=False)
    written = ", ".join(str(out / name) for name in files)
    console.print(f"\nWritten: {written}", highlight=False, markup=False, soft_wrap=True)


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: readers see the old file or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; elsewhere, one plain line per step."""
    # On stderr, so that stdout holds the result alone and can be piped.
    console = Console(stderr=True)
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
