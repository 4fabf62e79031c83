"""What a method of fine-tuning consists of: a config, and an adapter for each layer that it adapts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import computing, without_autocast
from shiftkern.peft._kinds import Kind, Place

__all__ = ["FORMAT", "METHODS", "WEIGHTED", "Adapter", "Base", "Config", "map_hidden", "names_of_modules", "register"]

#: Kinds of layers that have a weight; "block" is any other module.
WEIGHTED = ("linear", "conv", "embedding", "norm")

#: Version of the files that :func:`shiftkern.peft.save` writes.
FORMAT = 1

#: Config classes by the name of their method.
METHODS: dict[str, type[Config]] = {}

C = TypeVar("C", bound="type[Config]")


def register(method: str) -> Callable[[C], C]:
    """Make a config class known under the name of its method, so that files can name it."""

    def wrapped(cls: C) -> C:
        if method in METHODS:
            raise RuntimeError(f"two methods named {method}")
        cls.peft_type = method
        METHODS[method] = cls
        return cls

    return wrapped


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all methods have in common: which modules to adapt.

    Parameters
    ----------
    target_modules : str or sequence of str
        A sequence: every module whose name is one of these or ends in ``"." +`` one of them. "all-linear": every
        ``nn.Linear`` and ``Conv1D`` of transformers but the output head. Any other string: a regular expression that
        a module's whole name must match.
    modules_to_save : sequence of str
        Modules, found like those of a sequence above, that are trained in full and saved with the adapter, such as a
        classifier.
    """

    #: Name in files; set by :func:`register`.
    peft_type: ClassVar[str] = ""
    #: Names of the kinds of layers that the method can adapt.
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    target_modules: str | Sequence[str] = "all-linear"
    modules_to_save: Sequence[str] = ()

    def __post_init__(self) -> None:
        op = type(self).__name__
        targets = self.target_modules
        if not isinstance(targets, str):
            targets = names_of_modules(op, "target_modules", targets)
        if not targets:
            _checks.refuse(op, "target_modules", "at least one name", repr(targets))
        self._set(target_modules=targets, modules_to_save=names_of_modules(op, "modules_to_save", self.modules_to_save))
        # Methods with a random start have a field of this name.
        seed = getattr(self, "seed", None)
        if seed is not None:
            self._set(seed=_checks.seed(op, "seed", seed))

    def _set(self, **values: Any) -> None:
        """Write checked values back, which a frozen dataclass allows only this way."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        """Return a fresh adapter for one layer; methods override this.

        ``generator`` is on the CPU and seeded by the config's ``seed`` and the layer's name.
        """
        raise NotImplementedError

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module | None:
        """Return what the adapters of all layers have in common, or None; methods with such a part override this.

        It is made once for each injection, handed to :meth:`_make`, and saved once. An adapter keeps it as a
        submodule of the name ``shared``.
        """
        return None

    def _generator(self, name: str) -> torch.Generator:
        """Return the generator of one layer: the same start for the same seed and name, in any order of layers."""
        generator = torch.Generator()
        seed = getattr(self, "seed", 0)
        if seed is None:
            generator.seed()
            return generator
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        return generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name, the version of the format and all fields, ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"format": FORMAT, "peft_type": self.peft_type, **plain}

    @staticmethod
    def from_dict(values: dict[str, Any], source: str = "the dict") -> Config:
        """Return the config that :meth:`to_dict` described; ``source`` names it in errors."""
        op = "Config.from_dict"
        if not isinstance(values, dict):
            _checks.refuse_type(op, "values", f"a dict in {source}", _checks.describe(values))
        values = dict(values)
        version, method = values.pop("format", None), values.pop("peft_type", None)
        if version != FORMAT:
            _checks.refuse(op, "format", f"{FORMAT} in {source}", repr(version))
        if not isinstance(method, str) or method not in METHODS:
            _checks.refuse(op, "peft_type", f"one of {', '.join(sorted(METHODS))} in {source}", repr(method))
        cls = METHODS[method]
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                _checks.refuse(
                    op, name, f"a field of {cls.__name__} ({', '.join(known)}) in {source}", "an unknown one"
                )
        return cls(**values)


def names_of_modules(op: str, name: str, value: Any) -> tuple[str, ...]:
    """Return a sequence of names of modules as a tuple."""
    if isinstance(value, str) or not isinstance(value, (Sequence, set, frozenset)):
        _checks.refuse_type(op, name, "a sequence of names", _checks.describe(value))
    names = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    for entry in names:
        if not isinstance(entry, str) or not entry:
            _checks.refuse_type(op, name, "names of modules", _checks.describe(entry))
    return names


class Base:
    """What an adapter stands on: the base layer and the adapters that act before it.

    ``base(x)`` evaluates it; ``base.parameters()`` is its weight, as a matrix (out, in), and its bias, and
    ``base.bias()`` the bias alone.
    """

    def __init__(self, layer: nn.Module, kind: Kind, adapters: Sequence[Adapter]) -> None:
        self.layer = layer
        self.kind = kind
        self.adapters = adapters

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the layer as the adapters below leave it."""
        if not self.adapters:
            return self.layer(x, *args, **kwargs)
        return self.adapters[-1](x, Base(self.layer, self.kind, self.adapters[:-1]), *args, **kwargs)

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias as the adapters below leave them, float32 for half types."""
        weight, bias = layer_parameters(self.layer, self.kind)
        for adapter in self.adapters:
            if not adapter.mergeable:
                expected = "a change of weights below an adapter that needs the layer's weight (see set_adapter)"
                _checks.refuse("AdaptedLayer", "adapters", expected, type(adapter).__name__.lstrip("_"))
            weight, bias = adapter.merge(weight, bias)
        return weight, bias

    def bias(self) -> Tensor | None:
        """Return the bias alone, at no cost where no adapter is below."""
        bias: Tensor | None = getattr(self.layer, "bias", None)
        return self.parameters()[1] if self.adapters else bias

    def call(self, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Evaluate the layer with another weight (out, in) and bias, each rounded once to the layer's type."""
        own, kind = self.layer.weight, self.kind
        assert isinstance(own, Tensor)
        weight = kind.stored(weight, own).to(own.dtype)
        return kind.call(self.layer, x, weight, None if bias is None else bias.to(own.dtype))


def layer_parameters(layer: nn.Module, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """Return weight, as a matrix, and bias of a base layer in the type that merging computes in."""
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    dtype = computing(weight.dtype)
    return kind.matrix(weight).to(dtype), None if bias is None else bias.to(dtype)


class Adapter(nn.Module):
    """The parameters of one method on one layer, and nothing of the layer itself.

    A method overrides :meth:`merge` and :meth:`unmerge`, the equation on the weight, and :meth:`transform`, the
    equation on activations, for the kinds of layers named in ``activations``; on other kinds the weight form serves.
    Every ``nn.Parameter`` is trained while the adapter is active; what is never trained is a buffer. Parameters are
    float64 on float64 layers and float32 on others.
    """

    #: Kinds of layers on which :meth:`transform` computes the equation.
    activations: tuple[str, ...] = ()
    #: Whether the method can be folded into the weight and bias of its layer.
    mergeable: bool = True

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias with the adapter folded in; differentiable, in the type of ``weight``."""
        raise NotImplementedError

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what :meth:`merge` was given. A bias that it created may come back as zeros."""
        raise NotImplementedError

    def invertible(self) -> bool:
        """Say whether :meth:`unmerge` is accurate at the present parameters; if not, merging keeps the original."""
        return True

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Return the adapted output for input ``x``, in the type of the base's output."""
        raise NotImplementedError

    def penalty(self, base: Base) -> Tensor | None:
        """Return what the method adds to the loss for this layer, or None."""
        return None

    def forward(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the adapted layer: on activations where the method can, otherwise with a merged weight."""
        if base.kind.name in self.activations:
            return self.transform(x, base, *args, **kwargs)
        with without_autocast(next(base.layer.parameters()).device):
            weight, bias = self.merge(*base.parameters())
        return base.call(x, weight, bias)

    def own_state(self) -> Iterator[tuple[str, Tensor]]:
        """Go through the tensors that are this layer's, without those that are shared."""
        for name, value in self.state_dict(keep_vars=True).items():
            if not name.startswith("shared."):
                yield name, value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        # model.half() is meant for the base: adapters stay in the type they are trained in.
        super()._apply(lambda t: keep_wide(fn, t), recurse)  # type: ignore[no-untyped-call]
        return self


def keep_wide(fn: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Move a tensor as ``fn`` does, but never to half precision."""
    moved = fn(value)
    if value.is_floating_point() and moved.dtype in (torch.float16, torch.bfloat16):
        return value.to(device=moved.device, dtype=torch.float32)
    return moved


def map_hidden(output: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``fn`` to a block's output: a tensor, or the first of a tuple or list, as transformers return them."""
    if isinstance(output, Tensor):
        return fn(output)
    if not isinstance(output, (tuple, list)) or not output or not isinstance(output[0], Tensor):
        expected = "a tensor, or a tuple that begins with one"
        _checks.refuse_type("forward", "output", expected, _checks.describe(output))
    rest = output[1:]
    return (fn(output[0]), *rest) if isinstance(output, tuple) else [fn(output[0]), *rest]
