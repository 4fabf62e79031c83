"""Putting adapters in: freezing, names, several adapters, switching, taking out, copies that are trained in full."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import (
    BitFitConfig,
    HoulsbyConfig,
    IA3Config,
    LoRAConfig,
    MaskTuningConfig,
    SSFConfig,
    adapted_layers,
    delete_adapter,
    describe,
    disable_adapter,
    inject,
    merge,
    penalty,
    set_adapter,
    trainable_parameters,
    unload,
)

from helpers.peft import mlp, rows, train

FIRST = ["0"]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        return self.classifier(self.body(x))


def both():
    """Two adapters on one layer, both moved away from their start."""
    model = inject(mlp(), LoRAConfig(r=2, target_modules=FIRST), "a")
    return train(inject(model, IA3Config(target_modules=FIRST), "b"))


def test_the_model_is_changed_in_place_and_returned():
    model = mlp()
    assert inject(model, LoRAConfig()) is model
    assert list(adapted_layers(model)) == ["0", "2"]


def test_everything_else_is_frozen_and_thawed_again():
    model = mlp()
    model[2].weight.requires_grad_(False)
    inject(model, LoRAConfig(r=1))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{i}.adapters.default.{n}" for i in (0, 2) for n in "AB"]
    inject(model, BitFitConfig(), "b")
    unload(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.weight", "0.bias"}


def test_modes_follow_the_base_layer():
    assert not inject(mlp().eval(), LoRAConfig())[0].training
    model = inject(mlp().train(), LoRAConfig(dropout=0.5))
    assert model[0].adapters["default"].training
    assert not model.eval()[0].adapters["default"].training


def test_a_second_adapter_acts_on_what_the_first_leaves():
    model, x = both(), rows()
    layer = model[0]
    a, scale = layer.adapters["a"], layer.adapters["b"].l
    base = layer.base_layer
    want = scale * (x @ base.weight.T + base.bias + a.scale * x @ a.A.T @ a.B.T)
    torch.testing.assert_close(layer(x), want)
    set_adapter(model, ["b", "a"])
    want = scale * (x @ base.weight.T + base.bias) + a.scale * x @ a.A.T @ a.B.T
    torch.testing.assert_close(layer(x), want)


def test_set_adapter_chooses_who_acts_and_who_is_trained():
    model, x = both(), rows()
    set_adapter(model, "a")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.adapters.a.A", "0.adapters.a.B"]
    alone = copy.deepcopy(model)
    delete_adapter(alone, "b")
    assert torch.equal(model(x), alone(x))
    set_adapter(model, [])
    assert torch.equal(model(x), mlp()(x))
    assert trainable_parameters(model)[0] == 0


def test_a_frozen_start_is_never_trained():
    model = inject(mlp(), LoRAConfig(r=2, freeze_a=True))
    set_adapter(model, [])
    set_adapter(model, "default")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{i}.adapters.default.B" for i in (0, 2)]


def test_adapters_on_different_layers():
    model = inject(mlp(), LoRAConfig(r=1, target_modules=["0"]), "a")
    train(inject(model, SSFConfig(target_modules=["2"]), "b"))
    x = rows()
    full = model(x)
    delete_adapter(model, "b")
    assert type(model[2]) is nn.Linear
    assert not torch.equal(model(x), full)
    delete_adapter(model, "a")
    assert [type(m) for m in model] == [type(m) for m in mlp()]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), mlp()(x))


def test_deleting_the_adapter_that_remembers_what_was_frozen():
    model = inject(mlp(), LoRAConfig(r=1, target_modules=["0"]), "a")
    inject(model, LoRAConfig(r=1, target_modules=["2"]), "b")
    delete_adapter(model, "a")
    unload(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_copy_is_trained_in_full_and_the_original_kept():
    base = Classifier()
    model = inject(copy.deepcopy(base), LoRAConfig(r=1, modules_to_save=["classifier"]))
    x = rows()
    assert torch.equal(model(x), base(x))
    assert trainable_parameters(model)[0] == 27 + (8 + 16) + (16 + 8)
    train(model)
    assert not torch.equal(model(x), base(x))
    assert "in full" in describe(model)
    assert torch.equal(model.classifier.weight, model.classifier.copies["default"].weight)
    with disable_adapter(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(unload(model)(x), base(x))
    assert all(p.requires_grad for p in model.parameters())
    assert list(model.state_dict()) == list(base.state_dict())


def test_each_adapter_has_a_copy_of_its_own():
    model = inject(Classifier(), LoRAConfig(r=1, target_modules=["body.0"], modules_to_save=["classifier"]), "a")
    train(model)
    inject(model, LoRAConfig(r=1, target_modules=["body.2"], modules_to_save=["classifier"]), "b")
    train(model, seed=9)
    x = rows()
    a, b = (model.classifier.copies[name] for name in "ab")
    assert not torch.equal(a.weight, b.weight)
    assert torch.equal(model(x), b(model.body(x)))
    set_adapter(model, "a")
    assert torch.equal(model(x), a(model.body(x)))
    assert not b.weight.requires_grad
    delete_adapter(model, "b")
    assert list(model.classifier.copies) == ["a"]


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "keys", "1a", "training", "forward", "a b"])
def test_names_that_cannot_be_are_refused(name):
    with pytest.raises(ArgumentError, match="adapter_name"):
        inject(mlp(), LoRAConfig(), name)


@pytest.mark.parametrize("name", ["default", "task-1", "_x", "été"])
def test_other_names_are_fine(name):
    assert name in inject(mlp(), LoRAConfig(), name)[0].adapters


def test_a_name_is_taken_once():
    model = inject(mlp(), LoRAConfig(r=1, target_modules=["0"]), "a")
    with pytest.raises(ArgumentError, match="other than 'a'"):
        inject(model, SSFConfig(target_modules=["2"]), "a")
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((3, LoRAConfig()), "model"),
        ((mlp(), {"r": 2}), "config"),
        ((mlp(), LoRAConfig, "x"), "config"),
        ((mlp(), LoRAConfig(), 3), "adapter_name"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(arguments, match):
    with pytest.raises(ArgumentTypeError, match=match):
        inject(*arguments)


@pytest.mark.parametrize("function", [unload, merge, describe, penalty, lambda m: set_adapter(m, "a")])
def test_a_model_without_adapters_is_refused(function):
    with pytest.raises(ArgumentError, match="see inject"):
        function(mlp())
    with pytest.raises(ArgumentTypeError, match=r"torch\.nn\.Module"):
        function(3)


def test_unknown_and_repeated_names_are_refused():
    model = both()
    for function in (set_adapter, delete_adapter):
        with pytest.raises(ArgumentError, match="one of 'a', 'b'"):
            function(model, "c")
    with pytest.raises(ArgumentError, match="each name once"):
        set_adapter(model, ["a", "a"])
    with pytest.raises(ArgumentTypeError, match="adapter_name"):
        set_adapter(model, 3)


def test_disabling_ends_with_an_exception_too_and_nests():
    model, x = both(), rows()
    want = model(x)
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(model(x), want)
    with disable_adapter(model):
        with disable_adapter(model):
            pass
        assert torch.equal(model(x), mlp()(x))
    assert torch.equal(model(x), want)


def test_what_the_base_layer_has_is_read_from_it():
    layer = both()[0]
    assert (layer.in_features, layer.out_features) == (8, 16)
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing
    assert layer.weight.shape == (16, 8)


def test_code_that_takes_a_weight_gets_the_adapted_one():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    inject(model, LoRAConfig(r=2))
    assert list(adapted_layers(model)) == ["attention.out_proj"]
    x = rows()
    before = model["attention"](x, x, x)[0]
    train(model)
    out = model["attention"](x, x, x)[0]
    assert not torch.allclose(out, before)
    assert torch.autograd.grad(out.sum(), model["attention"].out_proj.adapters["default"].B)[0].abs().max() > 0
    merge(model)
    torch.testing.assert_close(model["attention"](x, x, x)[0], out)


@pytest.mark.parametrize("grad", [True, False])
def test_the_fast_path_of_a_transformer_layer(grad):
    torch.manual_seed(0)
    layer = nn.ModuleDict({"block": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)}).eval()
    train(inject(layer, LoRAConfig(r=2)), 0.5)
    x = rows()
    with torch.set_grad_enabled(grad):
        fast = layer["block"](x)
    slow = copy.deepcopy(layer)
    for wrapper in adapted_layers(slow).values():
        wrapper.register_forward_pre_hook(lambda *_: None)
    torch.testing.assert_close(fast, slow["block"](x))


def test_a_weight_that_is_set_belongs_to_the_base_layer():
    model = inject(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)), LoRAConfig(r=1))
    model[1].weight = model[0].weight
    assert model[1].base_layer.weight is model[0].weight
    assert [n for n, _ in model.named_parameters() if n.startswith("1.weight")] == []


def test_hooks_of_the_base_layer_run():
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    inject(model, LoRAConfig(r=1))(rows())
    assert seen == [(3, 5, 16)]


def test_a_layer_called_by_keyword():
    model, x = both(), rows()
    assert torch.equal(model[0](input=x), model[0](x))


def test_compiled():
    model, x = both(), rows()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_checkpointed():
    model, x = both(), rows()
    model(x).sum().backward()
    want = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    got = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_meta_and_moved_models():
    model = inject(mlp().to("meta"), LoRAConfig(r=1))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert inject(mlp(), LoRAConfig(r=1)).double()(rows(torch.float64)).dtype == torch.float64


def test_the_penalty_of_methods_without_one_is_zero():
    assert penalty(both()).item() == 0.0


def test_describe_counts():
    model = both()
    lines = describe(model).splitlines()
    assert lines[0].split() == ["layer", "type", "adapter", "method", "state", "parameters"]
    assert lines[1].split() == ["0", "Linear", "a", "LORA", "active", "48"]
    assert lines[-1].startswith("64 of")
    set_adapter(model, "a")
    assert "idle" in describe(model)


def test_a_model_without_a_layer_left_to_adapt_is_refused():
    model = Classifier()
    with pytest.raises(ArgumentError, match="linear layers that are not trained in full"):
        inject(model, LoRAConfig(modules_to_save=["body", "classifier"]))
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_with_adapters_is_no_model():
    model = inject(Classifier(), LoRAConfig(r=1, target_modules=["0"], modules_to_save=["classifier"]))
    for layer in (model.body[0], model.classifier):
        with pytest.raises(ArgumentError, match="a model, to add adapters"):
            inject(layer, LoRAConfig(r=1), "b")


def test_integers_in_a_module_trained_in_full():
    model = Classifier()
    model.classifier.levels = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    inject(model, LoRAConfig(r=1, target_modules=["0"], modules_to_save=["classifier"]))
    copied = model.classifier.copies["default"]
    assert copied.weight.requires_grad
    assert not copied.levels.requires_grad


def test_an_adapter_that_needs_the_weight_on_one_that_is_no_change_of_weights():
    model = inject(mlp(), HoulsbyConfig(bottleneck=2, target_modules=FIRST), "block")
    inject(model, MaskTuningConfig(target_modules=FIRST), "mask")
    with pytest.raises(ArgumentError, match=r"a change of weights below.*got Houlsby"):
        model(rows())
    set_adapter(model, ["mask", "block"])
    assert model(rows()).isfinite().all()
