"""The merging demonstration, computed: three experts made one, and two strangers aligned."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftkern.demo import digits
from shiftkern.demo.streams import corrupt
from shiftkern.demo.transport import SHIFTS
from shiftkern.merge import (
    ATLAS,
    AdaMerging,
    ConcreteMerging,
    breadcrumbs,
    dare,
    della,
    iso_c,
    iso_cts,
    otfusion,
    pcb,
    sens_merging,
    sequential_spec,
    slerp,
    soup,
    task_arithmetic,
    ties,
    weight_matching,
    widen,
)

__all__ = ["METHODS", "PATHS", "SCALES", "TASKS", "Inputs", "Merge", "Method", "Options", "Path", "Results", "run"]

State: TypeAlias = dict[str, Any]

TASKS: Mapping[str, Callable[[Tensor, int], Tensor]] = MappingProxyType(
    {
        "rotation": lambda x, seed: corrupt(x, "rotation", 3, seed=seed),
        "noise": lambda x, seed: corrupt(x, "noise", 5, seed=seed),
        "faded": SHIFTS["washed out"],
    }
)
"""What the experts specialise in, from ``(images, seed)``."""

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3)
"""Factors of the merged task vector to choose from, on validation images."""

PATHS = ("as trained", "weight matching", "optimal transport")
"""Ways from one independently trained network to another."""

_VALIDATION = 200


@dataclass(frozen=True)
class Inputs:
    """
    What methods that learn may look at.

    Attributes
    ----------
    network : nn.Module
        The architecture.
    unlabelled : list of Tensor
        For each task its test images; no labels.
    validation : list of Tensor
        For each task the validation images, which no network was trained on.
    labels : Tensor
        Of the validation images.
    seed, steps : int
        Seed of draws and number of steps.
    """

    network: nn.Module
    unlabelled: list[Tensor]
    validation: list[Tensor]
    labels: Tensor
    seed: int
    steps: int


@dataclass(frozen=True)
class Method:
    """
    One way to merge.

    Attributes
    ----------
    label : str
        Its name in tables.
    merge : callable
        ``merge(base, models, scale, inputs)``.
    scaled : bool
        Whether validation images choose the scale.
    learns_from : {"", "unlabelled", "validation"}
        What it learns from: nothing, unlabelled test images, or labelled validation images.
    """

    label: str
    merge: Callable[[State, Sequence[State], float, Inputs], State]
    scaled: bool = False
    learns_from: str = ""


def _entropy(method: Any, lr: float) -> Callable[[State, Sequence[State], float, Inputs], State]:
    def merge(base: State, models: Sequence[State], _: float, inputs: Inputs) -> State:
        merging = method(inputs.network, base, models, lr=lr)
        merging.run(list(zip(*(torch.split(images, 32) for images in inputs.unlabelled), strict=True)), inputs.steps)
        merged: State = merging.merged()
        return merged

    return merge


def _atlas(base: State, models: Sequence[State], _: float, inputs: Inputs) -> State:
    merging = ATLAS(inputs.network, base, models, F.cross_entropy)
    images, labels = torch.cat(inputs.validation), inputs.labels.repeat(len(inputs.validation))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(inputs.seed))
    merging.run([(images[part], labels[part]) for part in torch.split(order, 96)], inputs.steps)
    return merging.merged()


def _sens(base: State, models: Sequence[State], scale: float, inputs: Inputs) -> State:
    batches = [(images, inputs.labels) for images in inputs.validation]
    factor = scale * len(models)  # its coefficients sum to 1
    merged: State = sens_merging(inputs.network, base, models, batches, F.cross_entropy, temperature=0.1, scale=factor)
    return merged


def _slerp(first: int, second: int) -> Method:
    names = list(TASKS)
    label = f"Slerp {names[first]}+{names[second]}"
    return Method(label, lambda _base, models, *_: slerp(models[first], models[second], 0.5))


# Where signs are elected, or scores compete, what is left is averaged: times K it is comparable to a sum.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "soup": Method("Average", lambda _base, models, *_: soup(models)),
        "slerp_0_1": _slerp(0, 1),
        "slerp_0_2": _slerp(0, 2),
        "slerp_1_2": _slerp(1, 2),
        "task_arithmetic": Method("Task arithmetic", lambda b, m, s, _: task_arithmetic(b, m, s), True),
        "ties": Method("TIES", lambda b, m, s, _: ties(b, m, scale=s * len(m)), True),
        "dare": Method("DARE", lambda b, m, s, i: dare(b, m, drop_rate=0.5, seed=i.seed, scale=s), True),
        "breadcrumbs": Method("Breadcrumbs", lambda b, m, s, _: breadcrumbs(b, m, scale=s), True),
        "della": Method(
            "DELLA", lambda b, m, s, i: della(b, m, density=0.6, epsilon=0.2, seed=i.seed, scale=s * len(m)), True
        ),
        "pcb": Method("PCB", lambda b, m, s, _: pcb(b, m, ratio=0.5, scale=s * len(m)), True),
        "iso_c": Method("Iso-C", lambda b, m, s, _: iso_c(b, m, scale=s), True),
        "iso_cts": Method("Iso-CTS", lambda b, m, s, _: iso_cts(b, m, scale=s), True),
        "widen": Method("WIDEN", lambda b, m, s, _: widen(b, m, scale=s), True),
        "sens_merging": Method("Sens-Merging", _sens, True, "validation"),
        "atlas": Method("aTLAS", _atlas, False, "validation"),
        "ada_merging": Method("AdaMerging", _entropy(AdaMerging, 3e-3), False, "unlabelled"),
        "concrete": Method("Concrete", _entropy(ConcreteMerging, 3e-2), False, "unlabelled"),
    }
)


@dataclass(frozen=True)
class Options:
    """
    What to run.

    Parameters
    ----------
    seed : int
        Decides split, initial weights, training order and noise.
    quick : bool
        Less training, fewer test images, fewer steps.

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
class Merge:
    """
    One network on all tasks.

    Attributes
    ----------
    accuracy : list of float
        In percent, for each of `TASKS`.
    scale : float or None
        The factor that validation images chose.
    seconds : float
        Wall time of the merge, at one scale.
    """

    accuracy: list[float]
    scale: float | None = None
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        return sum(self.accuracy) / len(self.accuracy)


@dataclass
class Path:
    """
    The way from one network to another, on clean test images.

    Attributes
    ----------
    loss, accuracy : list of float
        At each of `Results.places`; the accuracy in percent.
    seconds : float
        Wall time of the alignment.
    """

    loss: list[float]
    accuracy: list[float]
    seconds: float

    def barrier(self, places: Sequence[float]) -> float:
        """How far the loss rises above the straight line between its ends."""
        first, last = self.loss[0], self.loss[-1]
        return max(loss - (1 - t) * first - t * last for t, loss in zip(places, self.loss, strict=True))


@dataclass
class Results:
    """
    Measurements of one run. The only entries that differ between equal runs are seconds.

    Attributes
    ----------
    options : Options
    images : int
        Test images of each task.
    clean : float
        Accuracy of the parent on clean images, in percent.
    parent : Merge
        The network that all experts were fine-tuned from.
    experts : dict
        For each of `TASKS` its expert, on all tasks.
    methods : dict
        For each of `METHODS` the merged network.
    places : list of float
        From 0, the first network, to 1, the second.
    paths : dict
        For each of `PATHS` what lies between two networks that were trained independently.
    """

    options: Options
    images: int
    clean: float
    parent: Merge
    experts: dict[str, Merge] = field(default_factory=dict)
    methods: dict[str, Merge] = field(default_factory=dict)
    places: list[float] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)


def _build_network(seed: int, width: int = 16) -> nn.Sequential:
    """Three convolutions and a linear layer, without normalization; the global generator is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(2 * width * 2 * 2, digits.CLASSES)),
        )


def _measure(network: nn.Module, state: State, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Loss, and accuracy in percent."""
    with torch.no_grad():
        scores = torch.func.functional_call(network, state, (images,))
    loss, right = F.cross_entropy(scores, labels), scores.argmax(1) == labels
    return round(loss.item(), 5), round(100 * right.float().mean().item(), 4)


def _merge(
    method: Method, base: State, models: list[State], scales: Sequence[float], inputs: Inputs
) -> tuple[State, float | None, float]:
    """Merge at the scale that is best on validation images; return it, and the seconds of one merge."""
    start = time.perf_counter()
    candidates = scales if method.scaled else (1.0,)
    found = [(method.merge(base, models, scale, inputs), scale) for scale in candidates]
    seconds = (time.perf_counter() - start) / len(found)
    if not method.scaled:
        return found[0][0], None, seconds

    def validated(candidate: tuple[State, float]) -> float:
        measured = [_measure(inputs.network, candidate[0], images, inputs.labels) for images in inputs.validation]
        return sum(accuracy for _, accuracy in measured)

    return (*max(found, key=validated), seconds)


def _paths(results: Results, network: nn.Sequential, one: State, other: State, images: Tensor, labels: Tensor) -> None:
    start = time.perf_counter()
    _, matched = weight_matching(sequential_spec(network), one, other, seed=results.options.seed, return_params=True)
    matching = time.perf_counter() - start
    start = time.perf_counter()
    otfusion(one, other)
    transport = time.perf_counter() - start
    ways: dict[str, tuple[Callable[[float], State], float]] = {
        PATHS[0]: (lambda t: soup([one, other], [1 - t, t]), 0.0),
        PATHS[1]: (lambda t: soup([one, matched], [1 - t, t]), matching),
        PATHS[2]: (lambda t: otfusion(one, other, alpha=t), transport),
    }
    for name, (between, seconds) in ways.items():
        found = [_measure(network, between(t), images, labels) for t in results.places]
        results.paths[name] = Path([loss for loss, _ in found], [accuracy for _, accuracy in found], seconds)


@digits.one_thread()
def run(options: Options, progress: Callable[[str, float], None] = lambda _message, _share: None) -> Results:
    """
    Train a parent, three experts and a stranger; merge the experts in every way, align the stranger with the parent.

    Parameters
    ----------
    options : Options
    progress : callable
        Called with what is being done and the share of the whole, 0 to 1.

    Returns
    -------
    Results
    """
    progress("training", 0.0)
    seed, quick = options.seed, options.quick
    done, total = 3, 3 + len(TASKS) + len(METHODS) + 4

    def step(message: str) -> None:
        nonlocal done
        progress(message, done / total)
        done += 1

    data = digits.load(seed)
    train = partial(digits.train, seed=seed, epochs=8 if quick else 16)
    images, labels = data.train_images[_VALIDATION:], data.train_labels[_VALIDATION:]
    parent = _build_network(seed)
    train(parent, images, labels)
    size = 256 if quick else len(data.test_labels)
    test_images, test_labels = data.test_images[:size], data.test_labels[:size]
    tests = [task(test_images, seed) for task in TASKS.values()]
    # Neither noise nor images are those that were trained on.
    validation = [task(data.train_images[:_VALIDATION], seed + 1) for task in TASKS.values()]
    inputs = Inputs(parent, tests, validation, data.train_labels[:_VALIDATION], seed, 30 if quick else 200)

    def on_tasks(state: State) -> list[float]:
        return [_measure(parent, state, x, test_labels)[1] for x in tests]

    base: State = parent.state_dict()
    results = Results(options, size, _measure(parent, base, test_images, test_labels)[1], Merge(on_tasks(base)))
    models: list[State] = []
    for name, task in TASKS.items():
        step(name)
        expert = copy.deepcopy(parent)
        train(expert, task(images, seed + 2), labels, epochs=3 if quick else 5, max_lr=3e-3)
        models.append(expert.state_dict())
        results.experts[name] = Merge(on_tasks(models[-1]))
    for name, method in METHODS.items():
        step(method.label)
        merged, scale, seconds = _merge(method, base, models, SCALES[1::3] if quick else SCALES, inputs)
        results.methods[name] = Merge(on_tasks(merged), scale, seconds)
    step("aligning")
    stranger = _build_network(seed + 1)
    train(stranger, images, labels)
    results.places = [i / 10 for i in range(11)]
    _paths(results, parent, base, stranger.state_dict(), test_images, test_labels)
    progress("done", 1.0)
    return results
