"""What a method of one's own can be: around whole blocks, with a part that layers share, not to be merged."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import (
    Config,
    adapted_layers,
    inject,
    load,
    merge,
    merge_and_unload,
    save,
    set_adapter,
    trainable_parameters,
)
from shiftkern.peft._adapter import METHODS, WEIGHTED, Adapter, map_hidden, register

from helpers.peft import mlp, rows, train


@dataclass(frozen=True, kw_only=True)
class AroundConfig(Config):
    """Adds a trained vector to whatever a module returns."""

    kinds: ClassVar = ("block",)

    width: int = 8

    def _make(self, place, generator, shared):
        return _Around(self.width)


class _Around(Adapter):
    mergeable = False
    activations = (*WEIGHTED, "block")

    def __init__(self, width):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(width))

    def transform(self, x, base, *args, **kwargs):
        return map_hidden(base(x, *args, **kwargs), lambda y: y + self.v)


@dataclass(frozen=True, kw_only=True)
class TogetherConfig(Config):
    """All layers scale their outputs by the same number, and each by one of its own."""

    def _shared(self, model, places, generator):
        return nn.ParameterList([nn.Parameter(torch.ones(())), nn.Parameter(torch.full((), float(len(places))), False)])

    def _make(self, place, generator, shared):
        return _Together(shared)


class _Together(Adapter):
    activations = ("linear",)

    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.own = nn.Parameter(torch.ones(()))

    def merge(self, weight, bias):
        scale = self.own * self.shared[0]
        return scale * weight, None if bias is None else scale * bias

    def unmerge(self, weight, bias):
        scale = self.own * self.shared[0]
        return weight / scale, None if bias is None else bias / scale

    def transform(self, x, base, *args, **kwargs):
        return self.own * self.shared[0] * base(x)


class Talkative(nn.Module):
    """Returns more than a tensor, and takes its input by any name."""

    def __init__(self, kind=tuple):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, hidden_states=None, *, twice=False):
        y = self.inner(hidden_states) if hidden_states is not None else torch.zeros(1, 8)
        y = 2 * y if twice else y
        return y if self.kind is None else self.kind([y, "more"])


@pytest.fixture
def around():
    model = nn.ModuleDict({"block": Talkative()})
    return train(inject(model, AroundConfig(target_modules=["block"])))


def test_any_module_can_be_adapted_as_a_block(around):
    x, v = rows(), around["block"].adapters["default"].v
    base = around["block"].base_layer
    for call in (lambda m: m(x), lambda m: m(hidden_states=x, twice=True), lambda m: m(x, twice=True), lambda m: m()):
        out, more = call(around["block"])
        assert more == "more"
        assert torch.equal(out, call(base)[0] + v)
    set_adapter(around, [])
    assert torch.equal(around["block"](x)[0], base(x)[0])


@pytest.mark.parametrize("kind", [None, list])
def test_outputs_of_other_kinds(kind):
    model = train(inject(nn.ModuleDict({"block": Talkative(kind)}), AroundConfig(target_modules=["block"])))
    out = model["block"](rows())
    assert isinstance(out, torch.Tensor if kind is None else list)


def test_an_output_without_a_tensor_is_refused():
    model = inject(nn.ModuleDict({"block": Talkative(dict.fromkeys)}), AroundConfig(target_modules=["block"]))
    with pytest.raises(ArgumentTypeError, match="a tensor, or a tuple that begins with one"):
        model["block"](rows())


def test_layers_with_weights_can_be_blocks_too():
    model = train(inject(mlp(), AroundConfig(target_modules=["2"])))
    layer = model[2]
    torch.testing.assert_close(layer(torch.ones(16)), layer.base_layer(torch.ones(16)) + layer.adapters["default"].v)
    assert layer.weight is layer.base_layer.weight


def test_blocks_around_adapted_layers_keep_their_names(around):
    from shiftkern.peft import LoRAConfig

    inject(around, LoRAConfig(r=1, target_modules=["block.inner"]), "inside")
    assert list(adapted_layers(around)) == ["block", "block.inner"]


def test_what_is_no_change_of_weights_is_not_merged(around):
    for function in (merge, merge_and_unload):
        with pytest.raises(ArgumentError, match="a change of weights, got 'default' in 'block'"):
            function(around)


def test_a_weight_that_torch_takes_away_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ArgumentError, match=r"nn\.MultiheadAttention takes the weight.*'attention\.out_proj'"):
        inject(model, AroundConfig(target_modules=["out_proj"]))
    assert not adapted_layers(model)


def test_the_fast_path_of_torch_does_not_step_over_a_block():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)}).eval()
    x = rows()
    with torch.no_grad():
        before = model["layer"](x)
        train(inject(model, AroundConfig(target_modules=["linear2"])), 0.5)
        assert not torch.allclose(model["layer"](x), before)


def test_a_shared_part_is_trained_once_and_saved_once(tmp_path, monkeypatch):
    monkeypatch.setattr(TogetherConfig, "peft_type", "")
    monkeypatch.setattr("shiftkern.peft._adapter.METHODS", METHODS)
    register("TOGETHER")(TogetherConfig)
    try:
        model = train(inject(mlp(), TogetherConfig()))
        assert model[0].adapters["default"].shared is model[2].adapters["default"].shared
        assert trainable_parameters(model)[0] == 4
        want = model(rows())
        save(model, tmp_path)
        again = load(mlp(), tmp_path)
        from safetensors.torch import load_file

        names = sorted(load_file(tmp_path / "adapter_model.safetensors"))
        assert names == ["layers.0.own", "layers.2.own", "shared.0", "shared.1"]
        assert torch.equal(again(rows()), want)
        assert again[0].adapters["default"].shared is again[2].adapters["default"].shared
        torch.testing.assert_close(merge(again)(rows()), want)
        inject(model, TogetherConfig(target_modules=["0"]), "idle")
        set_adapter(model, "default")
        assert model[0].adapters["default"].shared[0].requires_grad
        assert not model[0].adapters["idle"].shared[0].requires_grad
    finally:
        METHODS.pop("TOGETHER")


def test_a_method_is_registered_once():
    with pytest.raises(RuntimeError, match="LORA"):
        register("LORA")(AroundConfig)
    assert AroundConfig.peft_type == ""


def test_a_config_alone_is_no_method():
    with pytest.raises(NotImplementedError):
        inject(mlp(), Config())
