"""Which modules are meant: names, ends of names, regular expressions, "all-linear", shared and unknown modules."""

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import BitFitConfig, LoRAConfig, adapted_layers, inject


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.xq_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.v_proj(self.q_proj(x)) + self.xq_proj(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(4, 7)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def names(targets, model=None):
    return list(adapted_layers(inject(model or Model(), LoRAConfig(r=1, target_modules=targets))))


def test_a_list_holds_names_or_ends_of_names_at_a_dot():
    assert names(["q_proj"]) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert names(["layers.1.q_proj", "embed"]) == ["embed", "layers.1.q_proj"]
    assert names(("v_proj", "lm_head")) == ["layers.0.v_proj", "layers.1.v_proj", "lm_head"]


def test_a_string_is_an_expression_for_the_whole_name():
    assert names(r"layers\.\d+\.[qv]_proj") == [f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qv"]
    assert names(r".*\.1\.x?q_proj") == ["layers.1.q_proj", "layers.1.xq_proj"]
    with pytest.raises(ArgumentError, match="modules that exist"):
        names(r"q_proj")


def test_all_linear_leaves_the_head_out():
    assert names("all-linear") == [f"layers.{i}.{n}_proj" for i in (0, 1) for n in ("q", "xq", "v")]


def test_all_linear_takes_everything_where_there_is_no_head():
    assert names("all-linear", nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))) == ["0", "2"]


def test_all_linear_asks_the_model_for_its_head():
    class Speaking(Model):
        def get_output_embeddings(self):
            return self.layers[1].v_proj

    found = names("all-linear", Speaking())
    assert "layers.1.v_proj" not in found
    assert "lm_head" in found


def test_the_head_can_be_named():
    assert names(["lm_head"]) == ["lm_head"]


def test_what_is_trained_in_full_is_not_adapted_as_well():
    model = inject(Model(), LoRAConfig(r=1, modules_to_save=["layers.1"]))
    assert list(adapted_layers(model)) == [f"layers.0.{n}_proj" for n in ("q", "xq", "v")]
    with pytest.raises(ArgumentError, match=r"'layers\.1\.q_proj'"):
        inject(Model(), LoRAConfig(r=1, target_modules=["q_proj"], modules_to_save=["layers.1"]))


def test_unknown_names_are_refused_with_the_closest_ones_first():
    with pytest.raises(ArgumentError, match=r"modules that exist: 'layers\.0\.q_proj'.*got 'q_prj'"):
        names(["v_proj", "q_prj"])
    with pytest.raises(ArgumentError, match="modules_to_save"):
        inject(Model(), LoRAConfig(modules_to_save=["classifier"]))


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ArgumentError, match="linear layers"):
        inject(nn.Sequential(nn.ReLU()), LoRAConfig())


def test_a_model_that_is_a_layer_itself_is_refused():
    with pytest.raises(ArgumentError, match="linear layers"):
        inject(nn.Linear(2, 2), LoRAConfig())
    with pytest.raises(ArgumentError, match="no parent"):
        inject(nn.Linear(2, 2), LoRAConfig(target_modules=["weight"]))


def test_an_unsupported_layer_is_refused_by_name_and_type_and_nothing_is_changed():
    model = Model()
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    with pytest.raises(ArgumentError, match=r"BITFIT adapts \(linear, conv, norm\), got 'embed', a Embedding"):
        inject(model, BitFitConfig(target_modules=["q_proj", "embed"]))
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("layer", [nn.Bilinear(2, 2, 2), nn.ConvTranspose2d(2, 2, 1), nn.LSTM(2, 2), nn.LazyLinear(2)])
def test_other_layers_are_refused(layer):
    with pytest.raises(ArgumentError, match=type(layer).__name__):
        inject(nn.Sequential(layer), LoRAConfig(target_modules=["0"]))


def test_a_layer_under_two_names_is_adapted_once():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    inject(model, LoRAConfig(r=1))
    assert model[0] is model[2]
    assert list(adapted_layers(model)) == ["0"]
    with torch.no_grad():
        model[0].adapters["default"].B.fill_(1.0)
    x = torch.randn(2, 3)
    layer = model[0]
    torch.testing.assert_close(model(x), layer(torch.relu(layer(x))))
    assert names(["2"], nn.Sequential(shared, nn.ReLU(), shared)) == ["0"]


def test_a_block_under_two_names_is_adapted_once():
    block = Block()
    model = nn.Sequential(block, block)
    inject(model, LoRAConfig(r=1, target_modules=["1.q_proj"]))
    assert list(adapted_layers(model)) == ["0.q_proj"]
    assert model[1].q_proj is model[0].q_proj


def test_names_stay_those_of_the_base_model():
    model = inject(Model(), LoRAConfig(r=1, target_modules=["q_proj"]))
    inject(model, BitFitConfig(target_modules=["q_proj", "v_proj"]), "b")
    assert list(adapted_layers(model)) == [f"layers.{i}.{n}_proj" for i in (0, 1) for n in "qv"]
    with pytest.raises(ArgumentError, match="modules that exist"):
        inject(model, BitFitConfig(target_modules=["base_layer"]), "c")


@pytest.mark.parametrize("targets", [3, None, [3], [""], {"q": 1}])
def test_targets_of_a_wrong_type_are_refused(targets):
    with pytest.raises(ArgumentTypeError, match="target_modules"):
        LoRAConfig(target_modules=targets)


def test_a_broken_expression_is_refused():
    with pytest.raises(ArgumentError, match="regular expression"):
        names("layers.(")


@pytest.mark.parametrize("value", ["classifier", 3, [None]])
def test_modules_to_save_of_a_wrong_type_are_refused(value):
    with pytest.raises(ArgumentTypeError, match="modules_to_save"):
        LoRAConfig(modules_to_save=value)
