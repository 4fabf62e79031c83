"""The transport demonstration, computed: colours moved between photographs, training digits moved to shifted ones."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

from shiftkern import ConvergenceWarning
from shiftkern.demo import digits
from shiftkern.demo.streams import CORRUPTIONS, corrupt
from shiftkern.ot import emd_1d, linear_assignment, sinkhorn, sinkhorn_divergence, sinkhorn_samples

__all__ = ["DIGIT_REGS", "PHOTOGRAPHS", "REGS", "SHIFTS", "Colours", "Images", "Options", "Results", "Shift", "run"]

PHOTOGRAPHS = ("china", "flower")
REGS = (0.05, 0.005)
"""Regularisation of the transport between colours, in squared RGB distance."""
DIGIT_REGS = (0.05, 0.01)
"""Regularisation of the transport between digits, as shares of the mean squared distance."""

_SEVERITY = 3
# Over-relaxation: a third of the iterations.
_OMEGA, _MAX_ITER = 1.5, 5000
_THINNED = 7  # the distance of colours looks at every seventh pixel
_DIRECTIONS = 32


def _corrupted(kind: str, images: Tensor, seed: int) -> Tensor:
    return corrupt(images, kind, _SEVERITY, seed=seed)


SHIFTS: Mapping[str, Callable[[Tensor, int], Tensor]] = MappingProxyType(
    {
        **{kind: partial(_corrupted, kind) for kind in CORRUPTIONS},
        "translation": lambda x, _: F.pad(x, (2, -2)),
        "washed out": lambda x, _: 0.5 + 0.5 * x,
        "inverted": lambda x, _: 1 - x,
    }
)
"""What may happen to the target's images: the corruptions at severity 3, and from ``(images, seed)`` three more."""


@dataclass(frozen=True)
class Options:
    """
    What to run.

    Parameters
    ----------
    seed : int
        Decides which pixels are sampled, the split of the digits, and the noise.
    quick : bool
        Fewer pixels and digits.

    Raises
    ------
    ValueError
        For a seed outside its range.
    """

    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        digits.check_seed(self.seed)


@dataclass
class Colours:
    """
    One transport plan between sampled colours, used in both directions.

    Attributes
    ----------
    reg : float
    iterations : int
    converged : bool
    marginal_error : float
        L1.
    cost : float
        Mean squared RGB distance over which the plan moves a colour.
    seconds : float
        Wall time of the solve.
    map_seconds : list of float
        Wall time of recolouring ``PHOTOGRAPHS[0]`` and ``PHOTOGRAPHS[1]`` in full.
    distance : list of float
        What is then left of `Results.distance` for each of them.
    """

    reg: float
    iterations: int
    converged: bool
    marginal_error: float
    cost: float
    seconds: float
    map_seconds: list[float]
    distance: list[float]


@dataclass
class Shift:
    """
    Digits before and after the training images were moved to the shifted ones.

    Attributes
    ----------
    divergence : list of float
        Sinkhorn divergence between training and target images: before, then for each of `DIGIT_REGS`.
    accuracy : list of float
        Of the nearest training image's label, in percent: before, for each of `DIGIT_REGS`, and for exact transport.
    converged : bool
    seconds : float
        Wall time of all transport plans.
    """

    divergence: list[float]
    accuracy: list[float]
    converged: bool
    seconds: float


@dataclass
class Results:
    """
    Measurements of one run. The only entries that differ between equal runs are seconds.

    Attributes
    ----------
    options : Options
    pixels : int
        Sampled of each photograph.
    distance : float
        Sliced Wasserstein distance between the photographs' colours: the mean over directions in RGB.
    colours : list of Colours
        One for each of `REGS`.
    images : int
        Digits on each side.
    shifts : dict
        One `Shift` for each of `SHIFTS`.
    """

    options: Options
    pixels: int
    images: int
    distance: float = 0.0
    colours: list[Colours] = field(default_factory=list)
    shifts: dict[str, Shift] = field(default_factory=dict)


@dataclass
class Images:
    """
    What the pictures show.

    Attributes
    ----------
    photographs : list of list of Tensor
        For each photograph the original and one per `REGS`, (H, W, 3) in [0, 1].
    source : Tensor
        (10, 16, 16), a training image of each class.
    moved, shifted : dict
        Per shift: the same images transported by ``DIGIT_REGS[0]``, and what the shift really makes of them.
    """

    photographs: list[list[Tensor]]
    source: Tensor
    moved: dict[str, Tensor] = field(default_factory=dict)
    shifted: dict[str, Tensor] = field(default_factory=dict)


def _extend(points: Tensor, weights: Tensor, samples: Tensor, potential: Tensor, reg: float) -> Tensor:
    """
    Map points that were not in the plan, (n, 3) with weights (n,), by the potential (m,) of the samples (m, 3).

    The first half of an iteration gives every point the mean of samples that the potential says; the second half
    corrects the potential by what all points now demand.
    """
    start = (torch.zeros_like(weights), potential)
    # Two distributions differ by at most 2 in L1: one iteration is all that is asked for.
    plan = sinkhorn_samples(points, samples, reg, a=weights, warmstart=start, max_iter=1, tol=2.0, grad="detach")
    moved: Tensor = plan.barycentric(samples)
    return moved


def _distance(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Sliced Wasserstein distance between the colours (n, 3) and (m, 3), rounded."""
    return round(float(emd_1d(x[::_THINNED] @ directions, y[::_THINNED] @ directions).mean()), 6)


def _colours(results: Results, images: Images, step: Callable[[str], None]) -> None:
    generator = torch.Generator().manual_seed(results.options.seed)
    photographs = [row[0] for row in images.photographs]
    pixels = [photograph.flatten(0, 1) for photograph in photographs]
    samples = [p[torch.randperm(len(p), generator=generator)[: results.pixels]] for p in pixels]
    directions = F.normalize(torch.randn(3, _DIRECTIONS, generator=generator), dim=0)
    results.distance = _distance(pixels[0], pixels[1], directions)
    # A colour that occurs often is mapped once.
    distinct = [torch.unique(p, dim=0, return_inverse=True, return_counts=True) for p in pixels]
    for reg in REGS:
        step(f"colours {reg}")
        start = time.perf_counter()
        plan = sinkhorn_samples(samples[0], samples[1], reg, omega=_OMEGA, max_iter=_MAX_ITER, grad="detach")
        found = Colours(
            reg=reg,
            iterations=int(plan.n_iter),
            converged=bool(plan.converged),
            marginal_error=float(plan.marginal_error),
            cost=float(plan.value_linear),
            seconds=time.perf_counter() - start,
            map_seconds=[],
            distance=[],
        )
        for side, potential in enumerate((plan.g, plan.f)):
            step(f"colours {reg}")
            start = time.perf_counter()
            colours, index, counts = distinct[side]
            recoloured = _extend(colours, counts / counts.sum(), samples[1 - side], potential, reg)[index]
            found.map_seconds.append(time.perf_counter() - start)
            found.distance.append(_distance(recoloured, pixels[1 - side], directions))
            images.photographs[side].append(recoloured.view_as(photographs[side]).clamp(0, 1))
        results.colours.append(found)


def _accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Of the label of the nearest training image, in percent."""
    nearest = torch.cdist(test, train).argmin(1)
    return round(100 * (train_labels[nearest] == test_labels).float().mean().item(), 4)


@digits.one_thread()
def _digits(results: Results, images: Images, data: digits.Digits, shown: Tensor, step: Callable[[str], None]) -> None:
    size, seed = results.images, results.options.seed
    source_images, labels, target_labels = data.train_images[:size], data.train_labels[:size], data.test_labels[:size]
    source = source_images.flatten(1)
    for name, shift in SHIFTS.items():
        step(name)
        target = shift(data.test_images[:size], seed).flatten(1)
        costs = torch.cdist(source, target).square()
        unit = float(costs.mean())
        # A third of the images is enough to see how far apart the two sides are; the plans use all.
        divergence = partial(_divergence, target=target[: size // 3], reg=DIGIT_REGS[0] * unit)
        found = Shift([divergence(source[: size // 3])], [_accuracy(source, labels, target, target_labels)], True, 0.0)
        for share in DIGIT_REGS:
            start = time.perf_counter()
            plan = sinkhorn(None, None, costs, share * unit, method="auto", omega=_OMEGA, max_iter=_MAX_ITER)
            moved = plan.barycentric(target)
            found.seconds += time.perf_counter() - start
            found.converged &= bool(plan.converged)
            found.divergence.append(divergence(moved[: size // 3]))
            found.accuracy.append(_accuracy(moved, labels, target, target_labels))
            images.moved.setdefault(name, moved[shown].view_as(images.source))
        start = time.perf_counter()
        _, partner = linear_assignment(costs)
        found.seconds += time.perf_counter() - start
        found.accuracy.append(_accuracy(target[partner], labels, target, target_labels))
        results.shifts[name] = found
        images.shifted[name] = shift(source_images[shown], seed)[:, 0]


def _divergence(source: Tensor, target: Tensor, reg: float) -> float:
    return round(float(sinkhorn_divergence(source, target, reg, max_iter=_MAX_ITER)), 4)


def run(
    options: Options, progress: Callable[[str, float], None] = lambda _message, _share: None
) -> tuple[Results, Images]:
    """
    Move colours between two photographs, and training digits to shifted test digits.

    Parameters
    ----------
    options : Options
    progress : callable
        Called with what is being done and the share of the whole, 0 to 1.

    Returns
    -------
    results : Results
    images : Images
    """
    progress("loading", 0.0)
    done, total = 0, 3 * len(REGS) + len(SHIFTS)

    def step(message: str) -> None:
        nonlocal done
        progress(message, done / total)
        done += 1

    thin = 4 if options.quick else 1
    photographs = [[torch.from_numpy(image[::thin, ::thin] / 255.0).float()] for image in load_sample_images().images]
    data = digits.load(options.seed)
    results = Results(options, *((600, 500) if options.quick else (3000, len(data.test_labels))))
    labels = data.train_labels[: results.images]
    shown = torch.stack([(labels == kind).nonzero()[0, 0] for kind in range(digits.CLASSES)])
    images = Images(photographs, data.train_images[shown, 0])
    # Results say which plans did not converge; amid a progress bar a warning would be lost.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        _colours(results, images, step)
        _digits(results, images, data, shown, step)
    progress("done", 1.0)
    return results, images
