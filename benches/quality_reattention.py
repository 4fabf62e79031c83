"""Measure what Re-ttention costs in image quality, on a small diffusion transformer that is trained here.

``python benches/quality_reattention.py OUT.md`` from anywhere; pictures go to an ``images`` folder beside the page. The
trained weights are kept in ``build/quality``, so that later runs only draw. `quality.model` is an ordinary diffusion
transformer; `quality.study` shows what it takes to give it another attention.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from quality import report
from quality.model import Config, trained
from quality.study import measure
from shiftkern.demo import digits, output

CACHE = Path(__file__).resolve().parent.parent / "build" / "quality"
SEEDS = 8


def main(page: Path) -> None:
    """Train the model or load it, measure, and write page and pictures."""
    config = Config()
    data = digits.load(config.seed)
    classifier = digits.build_network(config.seed)
    digits.train(classifier, data.train_images, data.train_labels, seed=config.seed, epochs=30)
    with torch.no_grad():
        real = (classifier(data.test_images).argmax(1) == data.test_labels).double().mean().item()
    images, labels = torch.cat([data.train_images, data.test_images]), torch.cat([data.train_labels, data.test_labels])
    with output.progress() as progress:
        model = trained(config, 2 * images - 1, labels, CACHE, progress)
        study = measure(model, classifier, seeds=SEEDS, progress=progress)
    report.write(page, study, config, real)
    print(f"wrote {page}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
