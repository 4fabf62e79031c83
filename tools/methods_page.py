"""Write docs/methods.md from the list of methods: ``python tools/methods_page.py PAGE``; ``make docs`` does."""

from __future__ import annotations

import sys
from pathlib import Path

from shiftkern.methods import METHODS, Method

DOMAINS = {
    "norm": "Normalization statistics",
    "tta": "Test-time adaptation",
    "ot": "Transport, assignment and sorting",
    "attention": "Sparse attention and relatives",
    "merge": "Merging models",
    "peft": "Fine-tuning",
    "rotation": "Rotations",
}

HEAD = """\
# Methods

{count} published methods, by what they do. *Follows* says whether the paper or its authors' code was followed where the
two differ. A method is *works* when its tests hold it to an independent form of its formula, and *partial* until then.
The number is what `shiftkern methods` and the names of tests use; `shiftkern methods --json` adds the tests that hold a
method to its formula.

From Python:

```python
from shiftkern.methods import METHODS

for method in METHODS:
    print(method.id, method.system, method.api, method.status)
```
"""


def row(method: Method) -> str:
    """One line of a table."""
    cells = (str(method.id), method.system, f"`{method.api.removeprefix('shiftkern.')}`", method.paper)
    cells += (method.follows, method.status)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    lines = [HEAD.format(count=len(METHODS))]
    for domain, title in DOMAINS.items():
        lines += [f"## {title}", "", "| id | method | name | paper | follows | status |", "|---:|---|---|---|---|---|"]
        lines += [row(method) for method in METHODS if method.module == domain]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
