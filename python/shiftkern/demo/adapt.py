"""The main demonstration, computed: one network, every adaptation method, every shifted stream."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType

import torch
from torch import Tensor, nn

from shiftkern import ConvergenceWarning, tta
from shiftkern.demo import digits
from shiftkern.demo.streams import Stream, continual_stream, make_streams

__all__ = ["METHODS", "SOURCE_WEIGHT", "UNMIX_COMPONENTS", "UNMIX_MOMENTUM", "Method", "Options", "Results", "run"]

SOURCE_WEIGHT = 0.8
UNMIX_COMPONENTS = 16
UNMIX_MOMENTUM = 0.05


@dataclass(frozen=True)
class Method:
    """How a method is called in tables, and how it is put around a trained network (second argument: source images)."""

    label: str
    wrap: Callable[[nn.Module, Tensor], tta.Method]


def _style_shifting(model: nn.Module, source: Tensor) -> tta.Method:
    """Shift every image's style, at the first convolution, to that of the source images."""
    return tta.StyleShifting(model, tta.collect_styles(model, ["0"], [torch.split(source, 64)]))


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "source": Method("Source", lambda model, _: tta.Source(model)),
        "bn": Method("Batch statistics", lambda model, _: tta.BatchNormAdapt(model)),
        "alpha": Method(f"AlphaBN {SOURCE_WEIGHT}", lambda model, _: tta.AlphaBN(model, source_weight=SOURCE_WEIGHT)),
        "unmix": Method("UnMix-TNS", lambda model, _: tta.UnMix(model, UNMIX_COMPONENTS, UNMIX_MOMENTUM)),
        "osuda": Method("OSUDA", lambda model, _: tta.OSUDA(model)),
        "tent": Method("Tent", lambda model, _: tta.Tent(model)),
        # The paper averages 32 augmentations; 8 keep the demo short.
        "cotta": Method("CoTTA", lambda model, _: tta.CoTTA(model, num_augmentations=8)),
        "rmt": Method("RMT", lambda model, _: tta.RMT(model)),
        "lame": Method("LAME", lambda model, _: tta.LAME(model)),
        "style": Method("Style shifting", _style_shifting),
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
    severity : int
        1 to 5.
    batch_size : int
        Images per step of a test stream.
    methods : sequence of str
        Keys of `METHODS`; empty means all.
    quick : bool
        Less training and fewer test images.

    Raises
    ------
    ValueError
        For a value outside its range or an unknown method.
    """

    seed: int = 0
    severity: int = 3
    batch_size: int = 64
    methods: Sequence[str] = ()
    quick: bool = False

    def __post_init__(self) -> None:
        digits.check_seed(self.seed)
        if self.severity not in range(1, 6):
            raise ValueError(f"severity: expected 1 to 5, got {self.severity}")
        if self.batch_size < 2:
            raise ValueError(f"batch size: expected at least 2, got {self.batch_size}")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"methods: unknown {', '.join(map(repr, unknown))}; known are {', '.join(METHODS)}")
        object.__setattr__(self, "methods", tuple(dict.fromkeys(self.methods)) or tuple(METHODS))


@dataclass
class Results:
    """
    Measurements of one run.

    Attributes
    ----------
    options : Options
    streams : list of str
        Stream names, ``"corruption/order"``.
    error : dict
        ``error[method][stream]``: share of wrong predictions in percent.
    ms_per_batch : dict
        Median wall time of one forward call on one thread, adaptation included. The only entry that differs between
        equal runs.
    images : int
        Length of each of these streams.
    segments : list of (str, int)
        Parts of the continual stream: corruption and number of images.
    continual : dict
        ``continual[method]``: error in percent of each successive batch of the continual stream.
    batches : list of int
        Sizes of those batches; none spans two segments.
    """

    options: Options
    streams: list[str]
    images: int
    segments: list[tuple[str, int]]
    batches: list[int]
    error: dict[str, dict[str, float]] = field(default_factory=dict)
    ms_per_batch: dict[str, float] = field(default_factory=dict)
    continual: dict[str, list[float]] = field(default_factory=dict)


def _predict(adapted: tta.Method, stream: Stream, batch_size: int) -> Iterator[tuple[Tensor, float]]:
    """Correctness of each prediction and seconds needed, batch by batch: every image is predicted once, on arrival."""
    for images, labels in stream.batches(batch_size):
        start = time.perf_counter()
        scores = adapted(images)
        seconds = time.perf_counter() - start
        yield scores.detach().argmax(1) == labels, seconds


@digits.one_thread()
def run(options: Options, progress: Callable[[str, float], None] = lambda _message, _share: None) -> Results:
    """
    Train the network, then run every method over every stream.

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
    data = digits.load(options.seed)
    network = digits.build_network(options.seed)
    digits.train(network, data.train_images, data.train_labels, seed=options.seed, epochs=8 if options.quick else 12)
    size, part = (640, 192) if options.quick else (len(data.test_images),) * 2
    images, labels = data.test_images, data.test_labels
    streams = make_streams(images[:size], labels[:size], options.severity, seed=options.seed)
    long = continual_stream(images[:part], labels[:part], options.severity, seed=options.seed)
    results = Results(
        options,
        streams=[stream.name for stream in streams],
        images=size,
        segments=list(long.segments),
        batches=[len(labels) for _, labels in long.batches(options.batch_size)],
    )
    total = len(options.methods) * sum(len(stream.labels) for stream in (*streams, long))
    done = 0
    for name in options.methods:
        method = METHODS[name]
        # A method may draw from torch's global generator (dropout in the model does): make that repeatable too.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # On some batches LAME stops at its 100 updates, as the paper's does: no news amid a progress bar.
            warnings.simplefilter("ignore", ConvergenceWarning)
            torch.manual_seed(options.seed)
            adapted = method.wrap(copy.deepcopy(network), data.train_images)
            seconds: list[float] = []
            results.error[name] = {}
            for stream in (*streams, long):
                correct: list[Tensor] = []
                for right, spent in _predict(adapted, stream, options.batch_size):
                    correct.append(right)
                    seconds.append(spent)
                    done += len(right)
                    progress(method.label, done / total)
                if stream is long:
                    results.continual[name] = [round(100 * (1 - c.float().mean().item()), 4) for c in correct]
                else:
                    share = torch.cat(correct).float().mean().item()
                    results.error[name][stream.name] = round(100 * (1 - share), 4)
                adapted.reset()  # every stream starts from the source model
            results.ms_per_batch[name] = round(1000 * median(seconds), 4)
    progress("done", 1.0)
    return results
