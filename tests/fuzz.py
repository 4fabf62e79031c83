"""Hostile calls of every public function and class, counted: ``make fuzz``.

``python tests/fuzz.py --calls 100000`` makes calls and exits with 1 if one of them shows a defect, which it describes
with the number of a call; ``python tests/fuzz.py --replay NUMBER`` makes that call again, with its arguments and where
its error comes from.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))

from helpers import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=fuzz.LIMIT, help="seconds for one call")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="make this call alone, and show it")
    options = parser.parse_args()
    if options.replay is not None:
        fuzz.replay(options.seed, options.replay)
        return 0
    with tqdm(total=options.calls, unit=" calls") as bar:
        report = fuzz.run(
            options.seed, range(options.calls), jobs=options.jobs, limit=options.limit, progress=lambda: bar.update()
        )
    kinds = [*fuzz.FINE, "defect"]
    print(f"\n{'':12}" + "".join(f"{kind:>13}" for kind in ("calls", *kinds)))
    for package, counter in [
        *report.by_package().items(),
        ("all", sum(report.by_package().values(), start=fuzz.Counter())),
    ]:
        numbers = [counter[kind] for kind in fuzz.FINE]
        total = sum(counter.values())
        print(f"{package:12}" + "".join(f"{number:>13}" for number in (total, *numbers, total - sum(numbers))))
    for name, kind, detail, numbers in report.grouped():
        print(f"\n{name}: {kind}, {len(numbers)} times; --seed {options.seed} --replay {numbers[0]}\n    {detail}")
    return 1 if report.defects else 0


if __name__ == "__main__":
    sys.exit(main())
