"""The tuner behind :mod:`shiftkern.peft.hf`; importing it imports ``peft``."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from peft import PeftConfig, mapping
from shiftkern import _checks
from shiftkern._library import without_autocast
from shiftkern.peft._adapter import Adapter, Base, Config, layer_parameters
from shiftkern.peft._kinds import kind_of, place_of
from shiftkern.peft.ether import ETHERConfig
from shiftkern.peft.goft import GOFTConfig, Topology

__all__ = ["ETHERPeftConfig", "GOFTPeftConfig", "penalty", "register"]

# Older versions leave more to the methods, and look for the name of an adapter in one place of a tensor's name only.
if BaseTuner.__abstractmethods__ - {"_create_and_replace"} or not hasattr(BaseTuner, "_remove_adapter_name_from_key"):
    raise ImportError("shiftkern.peft.hf needs a newer version of Hugging Face's peft: pip install -U peft")


class _Name(str):
    """Name of a method where peft expects a member of its enumeration, which is a string with a value."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)


@dataclass
class _MethodConfig(PeftConfig):
    """Fields of peft; the derived classes have those of our config as well."""

    own: ClassVar[type[Config]]

    target_modules: str | list[str] | None = field(default="all-linear")
    exclude_modules: str | list[str] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = _Name(self.own.peft_type)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.method()

    def method(self) -> Config:
        """Return our config with the method's fields, checked."""
        shared = {f.name for f in dataclasses.fields(Config)}
        own = [f.name for f in dataclasses.fields(self.own) if f.name not in shared]
        return self.own(**{name: getattr(self, name) for name in own})


@dataclass
class GOFTPeftConfig(_MethodConfig):
    """:class:`shiftkern.peft.GOFTConfig` for ``peft``.

    Parameters
    ----------
    quasi, topology, layers, scale, penalty
        As there.
    target_modules, exclude_modules, modules_to_save
        As in the configs of peft.
    """

    own: ClassVar[type[Config]] = GOFTConfig

    quasi: bool = False
    topology: Topology = "tree"
    layers: int | None = None
    scale: bool = False
    penalty: float = 1.0


@dataclass
class ETHERPeftConfig(_MethodConfig):
    """:class:`shiftkern.peft.ETHERConfig` for ``peft``.

    Parameters
    ----------
    blocks, plus, two_sided, seed
        As there.
    target_modules, exclude_modules, modules_to_save
        As in the configs of peft.
    """

    own: ClassVar[type[Config]] = ETHERConfig

    blocks: int = 4
    plus: bool = False
    two_sided: bool = False
    seed: int | None = 0


class _Layer(nn.Module, BaseTunerLayer):
    """A base layer with its adapters, as peft wants it.

    ``originals`` has, for each merge, the names that were folded in, and the weight before where the method cannot
    compute it back.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.kind = kind_of(base_layer)
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.originals: list[tuple[list[str], Tensor | None]] = []

    @property
    def own(self) -> nn.Parameter:
        """The base layer's weight."""
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def adapter(self, name: str) -> Adapter | None:
        """Return one of the adapters, if this layer has it."""
        # nn.ModuleDict has no get.
        found: dict[str, Adapter] = dict(getattr(self, self.adapter_layer_names[0]).items())
        return found.get(name)

    def acting(self) -> list[Adapter]:
        """Return the active adapters, in the order in which they act."""
        found = [self.adapter(name) for name in self.active_adapters]
        return [adapter for adapter in found if adapter is not None]

    def update_layer(self, name: str, config: _MethodConfig, key: str) -> None:
        """Add an adapter."""
        method, place = config.method(), place_of(key, self.base_layer, self.base_layer)
        adapter = method._make(place, method._generator(key), None)
        if not any(parameter.is_meta for parameter in adapter.parameters()):
            adapter.to(device=place.device, dtype=place.dtype)
        getattr(self, self.adapter_layer_names[0])[name] = adapter.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the layer; as in peft's own methods, merged adapters are all that acts, and go when disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else self.acting()
        return Base(self.base_layer, self.kind, adapters)(x, *args, **kwargs)

    # Neither method changes the bias.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weight, in place."""
        named = [(name, self.adapter(name)) for name in check_adapters_to_merge(self, adapter_names)]
        chosen = {name: adapter for name, adapter in named if adapter is not None}
        if not chosen:
            return
        own = self.own
        with torch.no_grad(), without_autocast(own.device):
            matrix, bias = layer_parameters(self.base_layer, self.kind)
            for adapter in chosen.values():
                matrix, bias = adapter.merge(matrix, bias)
            merged = self.kind.stored(matrix, own).to(own.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaN or infinity in the merged weights with the adapters {', '.join(chosen)}")
            kept = None if all(adapter.invertible() for adapter in chosen.values()) else own.clone()
            own.copy_(merged)
        self.originals.append((list(chosen), kept))
        self.merged_adapters.extend(chosen)

    def unmerge(self) -> None:
        """Take all merges back, the last one first."""
        if not self.merged:
            warnings.warn("unmerge: nothing is merged", stacklevel=2)
        own = self.own
        with torch.no_grad(), without_autocast(own.device):
            while self.originals:
                names, kept = self.originals.pop()
                if kept is None:
                    matrix, bias = layer_parameters(self.base_layer, self.kind)
                    for name in reversed(names):
                        adapter = self.adapter(name)
                        assert adapter is not None
                        matrix, bias = adapter.unmerge(matrix, bias)
                    kept = self.kind.stored(matrix, own)
                own.copy_(kept)
        self.merged_adapters.clear()


class _GOFTLayer(_Layer):
    adapter_layer_names = ("goft_adapters",)


class _ETHERLayer(_Layer):
    adapter_layer_names = ("ether_adapters",)


class _Model(BaseTuner):
    """What puts the layers into a model."""

    tuner_layer_cls: type[_Layer]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (as peft declares it)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: _MethodConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        kinds = peft_config.own.kinds
        if kind_of(target).name not in kinds:
            expected = f"layers of the kinds that {peft_config.own.peft_type} adapts ({', '.join(kinds)})"
            got = f"'{current_key}', a {type(target).__name__}"
            _checks.refuse(type(peft_config).__name__, "target_modules", expected, got)
        layer = self.tuner_layer_cls(target, adapter_name).train(target.training)
        layer.update_layer(adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # peft's own expects at most one name after the adapter's; our adapters have modules inside.
        container = cls.tuner_layer_cls.adapter_layer_names[0]
        before, found, after = key.rpartition(f".{container}.{adapter_name}.")
        return f"{before}.{container}.{after}" if found else key


class _GOFTModel(_Model):
    prefix = "goft_"
    tuner_layer_cls = _GOFTLayer


class _ETHERModel(_Model):
    prefix = "ether_"
    tuner_layer_cls = _ETHERLayer


def register() -> None:
    """Enter both methods into peft's tables."""
    # peft's own function takes names of its enumeration only.
    configs: dict[Any, Any] = dict(mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    prefixes = {prefix: name for name, prefix in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    entries: list[tuple[type[_MethodConfig], type[_Model]]] = [
        (GOFTPeftConfig, _GOFTModel),
        (ETHERPeftConfig, _ETHERModel),
    ]
    for config, model in entries:
        name: Any = _Name(config.own.peft_type)
        if configs.get(name, config) is not config or prefixes.get(model.prefix, name) != name:
            raise RuntimeError(f"peft has a method called {name} of its own")
    for config, model in entries:
        name = _Name(config.own.peft_type)
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = model
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = model.prefix


def penalty(model: nn.Module) -> Tensor:
    """Sum the penalties of the active adapters."""
    layers = [module for module in model.modules() if isinstance(module, _Layer)]
    if not layers:
        _checks.refuse("penalty", "model", "a model of peft with GOFT or ETHER", f"a {type(model).__name__}")
    total = next(model.parameters()).new_zeros(())
    for layer in layers:
        acting = layer.acting()
        for i, adapter in enumerate(acting):
            part = adapter.penalty(Base(layer.base_layer, layer.kind, acting[:i]))
            if part is not None:
                total = total + part
    return total
