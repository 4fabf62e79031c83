"""The fine-tuning demonstration, computed: one network, adapted to turned images by methods with equally many numbers.

Ranks, block sizes and shares are chosen so that a method trains about as many numbers as LoRA of rank 1 does. Methods
that have one count for given layers, or whose least count is larger, are marked. Methods that train as much as the
network has (gates or scores for every weight), or that need attention heads or several tasks, are not here.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftkern.demo import digits
from shiftkern.demo.streams import SEVERITIES, corrupt
from shiftkern.peft import (
    BitFitConfig,
    BOFTConfig,
    Config,
    ETHERConfig,
    FISHConfig,
    GOFTConfig,
    HoulsbyConfig,
    HRAConfig,
    IA3Config,
    IntrinsicDimensionConfig,
    KroneckerConfig,
    LoRAConfig,
    MELoRAConfig,
    OFTConfig,
    S2FTConfig,
    SALTConfig,
    SSFConfig,
    adapted_layers,
    disable_adapter,
    fish_mask,
    inject,
    merge_and_unload,
    penalty,
    trainable_parameters,
)
from shiftkern.rotation import orthogonality_error

__all__ = ["BUDGET", "DEGREES", "FAMILIES", "METHODS", "RATES", "Fit", "Method", "Options", "Results", "run"]

_SEVERITY = 5
DEGREES = SEVERITIES["rotation"][_SEVERITY - 1]
"""How far the target's images are turned."""

BUDGET = 778
"""Trained numbers of LoRA of rank 1 on the three layers: the sum of their inputs and outputs."""

RATES = (0.01, 0.04, 0.16, 0.64)
"""Learning rates to choose from, on validation images of the target."""

FAMILIES = ("weights", "rotations", "low rank", "sparse, subspace", "scales, biases", "bottleneck")
"""Kinds of methods."""

_VALIDATION = 200
_WIDTH = 128
_WEIGHTS = 50_698


@dataclass(frozen=True)
class Method:
    """
    One way to fine-tune.

    Attributes
    ----------
    label : str
        Its name in tables.
    family : str
        One of `FAMILIES`.
    prepare : callable
        ``prepare(network, images, labels)`` returns the network with what is to be trained, all else frozen.
    fixed : bool
        Whether it has no count near `BUDGET`: the layers decide it, or it is the least there is.
    turn : str
        The adapter's function that turns the input, for methods with one.
    """

    label: str
    family: str
    prepare: Callable[[nn.Sequential, Tensor, Tensor], nn.Module]
    fixed: bool = False
    turn: str = ""


def _adapter(label: str, family: str, config: Config, *, fixed: bool = False, turn: str = "") -> Method:
    return Method(label, family, lambda network, *_: inject(network, config), fixed, turn)


_rotation = partial(_adapter, family="rotations", turn="turn")


def _last_layer(network: nn.Sequential, *_: Tensor) -> nn.Module:
    network.requires_grad_(False)
    network[-1].requires_grad_(True)
    return network


def _fish(network: nn.Sequential, images: Tensor, labels: Tensor) -> nn.Module:
    def log_likelihood(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -F.cross_entropy(model(batch[0]), batch[1])

    config = FISHConfig(sparsity=BUDGET / _WEIGHTS)
    return inject(network, fish_mask(network, config, [(images, labels)], log_likelihood, quiet=True))


_S2FT = S2FTConfig(o=0.0, u=2 / _WIDTH, d=2 / _WIDTH, u_modules=["1"], d_modules=["3"])
_KRONECKER = KroneckerConfig(terms=2, size=2, scale=10.0, bias=False, target_modules="all-linear")
_HOULSBY = HoulsbyConfig(bottleneck=1, width=_WIDTH, std=0.01, target_modules=["2", "4"])

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "full": Method("full fine-tuning", FAMILIES[0], lambda network, *_: network, True),
        "last": Method("last layer", FAMILIES[0], _last_layer, True),
        "goft": _rotation("GOFT", config=GOFTConfig(), fixed=True),
        "goft_brick": _rotation("GOFT brick", config=GOFTConfig(topology="brick", layers=3)),
        "qgoft": _rotation("qGOFT", config=GOFTConfig(quasi=True), fixed=True),
        "oft": _rotation("OFT", config=OFTConfig(block_size=4)),
        "boft": _rotation("BOFT", config=BOFTConfig(block_size=2, factors=2)),
        "hra": _rotation("HRA", config=HRAConfig(r=2), fixed=True),
        "ether": _rotation("ETHER", config=ETHERConfig(blocks=4), fixed=True, turn="inputs"),
        "ether_plus": _rotation("ETHER+", config=ETHERConfig(blocks=4, plus=True), fixed=True, turn="inputs"),
        "lora": _adapter("LoRA", FAMILIES[2], LoRAConfig(r=1, alpha=4.0)),
        "lora_frozen": _adapter("LoRA, A frozen", FAMILIES[2], LoRAConfig(r=3, alpha=12.0, freeze_a=True)),
        "melora": _adapter("MELoRA", FAMILIES[2], MELoRAConfig(r=1, n=2, alpha=4.0)),
        "kronecker": _adapter("KAdaptation", FAMILIES[2], _KRONECKER),
        "salt": _adapter("SALT", FAMILIES[2], SALTConfig(r=0.5, rank=2)),
        "s2ft": _adapter("S2FT", FAMILIES[3], _S2FT),
        "fish": Method("FISH", FAMILIES[3], _fish),
        "intrinsic": _adapter("random subspace", FAMILIES[3], IntrinsicDimensionConfig(d=BUDGET)),
        "ssf": _adapter("SSF", FAMILIES[4], SSFConfig(), fixed=True),
        "ia3": _adapter("(IA)3", FAMILIES[4], IA3Config(), fixed=True),
        "bitfit": _adapter("BitFit", FAMILIES[4], BitFitConfig(), fixed=True),
        "houlsby": _adapter("Houlsby", FAMILIES[5], _HOULSBY),
    }
)


@dataclass(frozen=True)
class Options:
    """
    What to run.

    Parameters
    ----------
    seed : int
        Decides split, initial weights and training order.
    quick : bool
        Less training, fewer images, fewer learning rates.

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
class Fit:
    """
    A network on both tasks, accuracies in percent of the test images.

    Attributes
    ----------
    target, source : float
        Accuracy on turned and on upright images.
    parameters : int
        Numbers that were trained.
    rate : float
        The learning rate that validation images chose.
    seconds : float
        Wall time of the training at that rate.
    off_orthogonal : float or None
        Largest entry of ``|R R^T - I|`` over the layers, for methods that turn the input by R.
    switched_off : float or None
        Accuracy on upright images with the adapters disabled.
    relabelled : int or None
        Turned images that get another label when the adapters are merged into the weights; None if they cannot be.
    """

    target: float
    source: float
    parameters: int = 0
    rate: float = 0.0
    seconds: float = 0.0
    off_orthogonal: float | None = None
    switched_off: float | None = None
    relabelled: int | None = None


@dataclass
class Results:
    """
    Measurements of one run. The only entries that differ between equal runs are seconds.

    Attributes
    ----------
    options : Options
    images : int
        Test images of each task.
    examples : int
        Labelled images of the target that all methods learn from.
    before : Fit
        The network as it was trained on upright images.
    methods : dict
        For each of `METHODS` the adapted network.
    """

    options: Options
    images: int
    examples: int
    before: Fit
    methods: dict[str, Fit] = field(default_factory=dict)

    def forgotten(self, name: str) -> float:
        """Points of accuracy on upright images that a method has lost."""
        return self.before.source - self.methods[name].source


def _build_network(seed: int) -> nn.Sequential:
    """Three linear layers, which all methods can adapt; the global generator is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Flatten(), nn.Linear(256, _WIDTH), nn.ReLU()),
            *(nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, digits.CLASSES)),
        )


@torch.no_grad()
def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return round(100 * float((network(images).argmax(1) == labels).float().mean()), 4)


@torch.no_grad()
def _off_orthogonal(network: nn.Module, turn: str) -> float:
    error = 0.0
    for layer in adapted_layers(network).values():
        turned = getattr(layer.adapter("default"), turn)(torch.eye(layer.in_features))
        error = max(error, orthogonality_error(turned))
    return error


@torch.no_grad()
def _inspect(fit: Fit, method: Method, network: nn.Module, target: Tensor, source: Tensor, labels: Tensor) -> None:
    """Look into the adapters, then merge them."""
    layers = adapted_layers(network)
    if not layers:
        return
    if method.turn:
        fit.off_orthogonal = _off_orthogonal(network, method.turn)
    with disable_adapter(network):
        fit.switched_off = _accuracy(network, source, labels)
    if all(layer.adapter("default").mergeable for layer in layers.values()):
        apart = network(target).argmax(1)
        fit.relabelled = int((merge_and_unload(network)(target).argmax(1) != apart).sum())


@digits.one_thread()
def run(options: Options, progress: Callable[[str, float], None] = lambda _message, _share: None) -> Results:
    """
    Train a network on upright images and adapt it to turned ones, by every method at every learning rate.

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
    rates, epochs = (RATES[::2], 8) if quick else (RATES, 12)
    data = digits.load(seed)
    turned = partial(corrupt, kind="rotation", severity=_SEVERITY, seed=seed)
    images, labels = data.train_images[_VALIDATION:], data.train_labels[_VALIDATION:]
    validation, validation_labels = turned(data.train_images[:_VALIDATION]), data.train_labels[:_VALIDATION]
    size, examples = (448, 256) if quick else (len(data.test_labels), len(labels))
    upright, test_labels = data.test_images[:size], data.test_labels[:size]
    target = turned(upright)
    base = _build_network(seed)
    digits.train(base, images, labels, seed=seed, epochs=16)
    before = Fit(_accuracy(base, target, test_labels), _accuracy(base, upright, test_labels))
    results = Results(options, size, examples, before)
    images, labels = turned(images[:examples]), labels[:examples]
    done, total = 1, 1 + len(METHODS) * len(rates)
    for name, method in METHODS.items():
        tried: list[tuple[float, nn.Module, Fit]] = []
        for rate in rates:
            progress(method.label, done / total)
            done += 1
            start = time.perf_counter()
            network = method.prepare(copy.deepcopy(base), images, labels)
            parameters = trainable_parameters(network)[0]
            added = penalty if adapted_layers(network) else None
            digits.train(
                network, images, labels, seed=seed, epochs=epochs, max_lr=rate, weight_decay=0.0, penalty=added
            )
            seconds = time.perf_counter() - start
            fit = Fit(
                _accuracy(network, target, test_labels),
                _accuracy(network, upright, test_labels),
                parameters,
                rate,
                seconds,
            )
            tried.append((_accuracy(network, validation, validation_labels), network, fit))
        _, network, fit = max(tried, key=lambda entry: entry[0])
        _inspect(fit, method, network, target, upright, test_labels)
        results.methods[name] = fit
    progress("done", 1.0)
    return results
