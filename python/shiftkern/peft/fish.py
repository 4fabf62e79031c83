"""FISH masks (231): only the weights with the largest Fisher information are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from shiftkern import _checks
from shiftkern._library import computing
from shiftkern.peft._adapter import Adapter, Base, Config, register
from shiftkern.peft._data import batches, examples
from shiftkern.peft._kinds import Place, kind_of
from shiftkern.peft._targets import find

__all__ = ["FISHConfig", "fish_mask"]

Mask = Mapping[str, "Tensor | Sequence[int] | int"]

#: Numbers of per-example gradients that are held at once.
_HELD = 1 << 26


class _Counts(dict[str, int]):
    """Numbers of positions by layer, which files hold, and the positions themselves, where they are known."""

    def __init__(self, places: dict[str, Tensor], counts: dict[str, int]) -> None:
        super().__init__(counts)
        self.places = places


@register("FISH")
@dataclass(frozen=True, kw_only=True)
class FISHConfig(Config):
    """A fixed sparse mask: ``W' = W + D``, where D has k trained entries and zeros elsewhere, and the bias likewise.

    Which entries is decided beforehand by :func:`fish_mask`, over all target layers together. They start at zero.

    Parameters
    ----------
    sparsity : float
        Part of the target layers' weights and biases that is trained, in (0, 1].
    mask : mapping, optional
        For the name of each layer, positions of its trained entries: integers that count through its weight as a
        matrix (out, in), row by row, and on through its bias. :func:`fish_mask` fills it in. The config keeps the
        number of positions of each layer; the positions themselves are a tensor of the adapter and in its file.
    target_modules, modules_to_save
        See :class:`Config`. Linear layers, convolutions, embeddings and normalizations can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; on injection, no mask, or positions that a layer does not have.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    k parameters in all. On linear layers with no more trained entries than outputs, O(k) per token; otherwise D is
    multiplied like a weight.

    References
    ----------
    Sung, Nair, Raffel: Training Neural Networks with Fixed Sparse Masks (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import FISHConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> trainable_parameters(inject(model, FISHConfig(mask={"0": [0, 5, 13]})))
    (3, 18)
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "norm")

    sparsity: float = 0.005
    mask: Mask | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "FISHConfig"
        sparsity = _checks.fraction(op, "sparsity", self.sparsity)
        if sparsity == 0.0:
            _checks.refuse(op, "sparsity", "a number > 0", sparsity)
        self._set(sparsity=sparsity, mask=None if self.mask is None else _counts(self.mask))

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        op = "FISHConfig"
        if self.mask is None:
            _checks.refuse(op, "mask", "positions in each layer (see fish_mask)", "None")
        assert isinstance(self.mask, _Counts)
        # From a file come numbers of positions first: -1 is no position, so that nothing can be computed with these.
        index = self.mask.places.get(place.name, torch.full((self.mask.get(place.name, 0),), -1))
        bias = getattr(place.layer, "bias", None)
        size = place.out_features * place.in_features + (0 if bias is None else place.out_features)
        if len(index) and int(index.max()) >= size:
            _checks.refuse(op, "mask", f"positions below {size} in '{place.name}'", int(index.max()))
        return _FISH(index)


def _counts(mask: Any) -> _Counts:
    """Check the positions in all layers and count them."""
    if isinstance(mask, _Counts):
        return mask
    if not isinstance(mask, Mapping):
        _checks.refuse_type("FISHConfig", "mask", "a mapping from names of layers to positions", _checks.describe(mask))
    places = {name: _positions(given) for name, given in mask.items() if not isinstance(given, int)}
    numbers = {name: _checks.integer("FISHConfig", "mask", n, 0) for name, n in mask.items() if isinstance(n, int)}
    return _Counts(places, {name: len(places[name]) if name in places else numbers[name] for name in mask})


def _positions(given: Any) -> Tensor:
    """Return the positions in one layer in order."""
    op = "FISHConfig"
    if not isinstance(given, Tensor):
        if isinstance(given, str) or not isinstance(given, Sequence):
            _checks.refuse_type(op, "mask", "positions", _checks.describe(given))
        given = torch.tensor([_checks.integer(op, "mask", value, 0) for value in given], dtype=torch.int64)
    integers = (torch.int64, torch.int32)
    index = _checks.tensor(op, "mask", given, shape=(given.numel(),), dtypes=integers).cpu().long().sort().values
    if len(index) and (int(index[0]) < 0 or bool((index[1:] == index[:-1]).any())):
        _checks.refuse(op, "mask", "different positions >= 0", _checks.describe(given))
    return index


class _FISH(Adapter):
    activations = ("linear",)

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.values = nn.Parameter(torch.zeros(len(index)))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._added(weight, bias, self.values)

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._added(weight, bias, -self.values)

    def _added(self, weight: Tensor, bias: Tensor | None, values: Tensor) -> tuple[Tensor, Tensor | None]:
        size = weight.numel()
        if bias is None:
            return weight.reshape(-1).index_add(0, self.index, values).view(weight.shape), None
        both = torch.cat([weight.reshape(-1), bias]).index_add(0, self.index, values)
        return both[:size].view(weight.shape), both[size:]

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        rows, columns = y.shape[-1], x.shape[-1]
        x = x.to(self.values.dtype)
        size = rows * columns
        if len(self.values) > rows:
            change = self.values.new_zeros(size + rows).index_add(0, self.index, self.values)
            return y + F.linear(x, change[:size].view(rows, columns), change[size:]).to(y.dtype)
        # The bias is a column of its own, whose input is 1.
        of_bias = self.index >= size
        row = torch.where(of_bias, self.index - size, self.index // columns)
        column = torch.where(of_bias, columns, self.index % columns)
        products = self.values * F.pad(x, (0, 1), value=1.0).index_select(-1, column)
        return y + products.new_zeros(y.shape).index_add(-1, row, products).to(y.dtype)


def fish_mask(
    model: nn.Module,
    config: FISHConfig,
    data: Iterable[Any],
    log_likelihood: Callable[[nn.Module, Any], Tensor],
    *,
    vectorize: bool = True,
    quiet: bool = False,
) -> FISHConfig:
    """Choose the entries with the largest empirical Fisher information, over all target layers together.

    The score of an entry is ``1/N sum_n (d log p(y_n | x_n) / d w)^2``, with one gradient for each example.

    Parameters
    ----------
    model : nn.Module
        The model before :func:`inject`, in the mode (train or eval) in which it shall be looked at. Not changed.
    config : FISHConfig
        ``target_modules`` and ``sparsity``; a ``mask`` is not looked at.
    data : iterable
        Batches: tensors, or tuples, lists and dicts of them, whose first dimension goes through the examples.
    log_likelihood : callable
        ``log_likelihood(model, batch)``, the log-likelihood of the one example in a batch of one (a negated loss is as
        good). It must use the model that it is given.
    vectorize : bool
        Compute several examples' gradients at once by ``torch.func.vmap`` if the model can be, else one by one.
    quiet : bool
        No progress bar.

    Returns
    -------
    FISHConfig
        ``config`` with the mask, and with the layers that have trained entries as ``target_modules``. Entries with
        equal scores are taken in the order of the model.

    Raises
    ------
    ArgumentError
        No data, targets that do not exist, scores that are not finite, a log-likelihood that is not one number.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    One forward and backward pass per example. Memory for the scores of all entries, and vectorized for the gradients
    of several examples, up to 2^26 numbers.

    References
    ----------
    Sung, Nair, Raffel: Training Neural Networks with Fixed Sparse Masks (2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import FISHConfig, fish_mask, inject
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> data = [(torch.eye(4)[:2], torch.tensor([0, 1]))]
    >>> def log_likelihood(model, batch):
    ...     return -torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> config = fish_mask(model, FISHConfig(sparsity=0.4), data, log_likelihood, quiet=True)
    >>> config.mask
    {'0': 6}
    >>> model = inject(model, config)
    """
    op = "fish_mask"
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    if not isinstance(config, FISHConfig):
        _checks.refuse_type(op, "config", "a FISHConfig", _checks.describe(config))
    if not callable(log_likelihood):
        _checks.refuse_type(op, "log_likelihood", "a function of model and batch", _checks.describe(log_likelihood))
    vectorize, quiet = _checks.flag(op, "vectorize", vectorize), _checks.flag(op, "quiet", quiet)
    layers = {slot.name: slot.base for slot in find(op, "target_modules", model, config.target_modules)}
    for name, layer in layers.items():
        if kind_of(layer).name not in config.kinds:
            expected = f"layers of the kinds that FISH adapts ({', '.join(config.kinds)})"
            _checks.refuse(op, "target_modules", expected, f"'{name}', a {type(layer).__name__}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wanted = {names[id(p)]: p for layer in layers.values() for p in _weight_and_bias(layer)}
    squares = _squared_gradients(op, model, wanted, data, log_likelihood, vectorize, quiet)
    scores: dict[str, Tensor] = {}
    for name, layer in layers.items():
        weight, *bias = (squares[names[id(p)]] for p in _weight_and_bias(layer))
        scores[name] = torch.cat([kind_of(layer).matrix(weight).reshape(-1), *bias])
        if not bool(torch.isfinite(scores[name]).all()):
            _checks.refuse(op, "log_likelihood", "finite gradients", f"NaN or infinity in layer '{name}'")
    flat = torch.cat([score.to(next(iter(scores.values()))) for score in scores.values()])
    k = max(1, round(config.sparsity * len(flat)))
    least = flat.topk(k).values[-1]
    chosen = flat > least
    ties = torch.nonzero(flat == least).squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    parts = torch.split(chosen, [len(score) for score in scores.values()])
    mask = {name: torch.nonzero(part).squeeze(1) for name, part in zip(scores, parts, strict=True) if bool(part.any())}
    return dataclasses.replace(config, mask=mask, target_modules=tuple(mask))


def _weight_and_bias(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in (layer.weight, getattr(layer, "bias", None)) if isinstance(p, nn.Parameter)]


class _Scored(nn.Module):
    """A model and a function of it as one module, for ``functional_call``."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)


def _squared_gradients(
    op: str,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    data: Iterable[Any],
    log_likelihood: Callable[[nn.Module, Any], Tensor],
    vectorize: bool,
    quiet: bool,
) -> dict[str, Tensor]:
    """Return the mean over examples of each parameter's squared gradient."""
    training = model.training
    scored = _Scored(model, log_likelihood)
    scored.training = training
    values = {name: p.detach() for name, p in parameters.items()}

    def one(values: dict[str, Tensor], batch: Any) -> Tensor:
        result = functional_call(scored, {f"model.{name}": value for name, value in values.items()}, (batch,))
        if not isinstance(result, Tensor) or result.numel() != 1:
            _checks.refuse(op, "log_likelihood", "one number for a batch of one example", _checks.describe(result))
        return result.sum()

    def alone(values: dict[str, Tensor], example: Any) -> Tensor:
        return one(values, pytree.tree_map(lambda leaf: leaf.unsqueeze(0), example))

    several = vmap(grad(alone), in_dims=(None, 0), randomness="different")
    at_once = max(1, _HELD // max(sum(value.numel() for value in values.values()), 1))
    sums = {name: torch.zeros_like(value, dtype=computing(value.dtype)) for name, value in values.items()}
    seen = 0
    for batch, size in batches(op, data, quiet):
        start = 0
        while start < size:
            stop = min(size, start + at_once) if vectorize else start + 1
            part = examples(batch, start, stop)
            if vectorize:
                try:
                    grads = several(values, part)
                except Exception:
                    # What vmap cannot do has no common type of error; a fault of the caller's shows again below.
                    vectorize = False
                    continue
            else:
                leaves = {name: value.requires_grad_() for name, value in values.items()}
                with torch.enable_grad():
                    found = torch.autograd.grad(one(leaves, part), list(leaves.values()), allow_unused=True)
                grads = {name: g.unsqueeze(0) for name, g in zip(leaves, found, strict=True) if g is not None}
            for name, g in grads.items():
                sums[name] += g.to(sums[name].dtype).square().sum(0)
            start = stop
        seen += size
    return {name: total / seen for name, total in sums.items()}
