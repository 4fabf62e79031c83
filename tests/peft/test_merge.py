"""Merging: all or nothing, in order, tied weights, stashes, types, created biases, precision."""

import copy

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import (
    BitFitConfig,
    GOFTConfig,
    IA3Config,
    LoRAConfig,
    SSFConfig,
    delete_adapter,
    disable_adapter,
    inject,
    merge,
    merge_and_unload,
    set_adapter,
    unload,
    unmerge,
)

from helpers.peft import mlp, rows, train

FIRST = ["0"]


def stack(dtype=torch.float32):
    """A shift under a rotation under a scale: no two of them commute."""
    model = inject(mlp(dtype), LoRAConfig(r=2, target_modules=FIRST), "a")
    inject(model, GOFTConfig(target_modules=FIRST), "b")
    return train(inject(model, SSFConfig(target_modules=FIRST), "c"))


class Tied(nn.Module):
    """A language model whose head shares its weight with the embedding, as names, ends or storage."""

    def __init__(self, how="parameter"):
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        if how == "parameter":
            self.out.weight = self.embed.weight
        else:
            self.out.weight = nn.Parameter(self.embed.weight.detach())

    def forward(self, tokens):
        return self.out(torch.tanh(self.body(self.embed(tokens))))


def test_merge_is_the_equation_computed_in_float64():
    model = train(inject(mlp(torch.float64), LoRAConfig(r=2, alpha=3.0, target_modules=FIRST)))
    layer = model[0]
    adapter, before = layer.adapters["default"], layer.base_layer.weight.detach().clone()
    merge(model)
    product = adapter.B.detach().numpy() @ adapter.A.detach().numpy()
    torch.testing.assert_close(layer.base_layer.weight.detach(), before + 1.5 * torch.from_numpy(product))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_rounded_once(dtype):
    model = train(inject(mlp(dtype), IA3Config(target_modules=FIRST)))
    layer = model[0]
    exact = layer.adapters["default"].l[:, None] * layer.base_layer.weight.float()
    merge(model)
    assert torch.equal(layer.base_layer.weight, exact.to(dtype))
    assert layer.base_layer.weight.dtype == dtype


def test_a_stack_merges_in_the_order_in_which_it_acts():
    model, x = stack(torch.float64), rows(torch.float64)
    want = model(x)
    for names in ("a", ["a", "b"], None):
        merge(model, adapters=names)
        torch.testing.assert_close(model(x), want)
    assert model[0].merged == ["a", "b", "c"]
    unmerge(model)
    assert model[0].merged == []
    torch.testing.assert_close(model(x), want)


def test_another_order_is_refused():
    model = stack()
    for names in ("b", ["b", "a"], ["a", "c"]):
        with pytest.raises(ArgumentError, match=r"first of the active and unmerged ones, \['a', 'b', 'c'\]"):
            merge(model, adapters=names)
    with pytest.raises(ArgumentError, match="one of 'a', 'b', 'c'"):
        merge(model, adapters=["d"])
    set_adapter(model, "b")
    with pytest.raises(ArgumentError, match="adapters"):
        merge(model, adapters="a")


def test_what_is_merged_already_may_be_named_again():
    model = stack()
    merge(model, adapters="a")
    merge(model, adapters=["a", "b"])
    assert model[0].merged == ["a", "b"]
    with pytest.warns(UserWarning, match="nothing is left"):
        merge(model, adapters=["a", "b"])


def test_nothing_to_unmerge_is_a_warning():
    with pytest.warns(UserWarning, match="nothing is merged"):
        unmerge(stack())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_safe_merge_is_all_or_nothing(bad):
    model = train(inject(mlp(), LoRAConfig(r=1)))
    with torch.no_grad():
        model[2].adapters["default"].B[0] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="every weight stays finite, got NaN or infinity in layer '2'"):
        merge(model)
    with pytest.raises(ArgumentError, match="finite"):
        merge_and_unload(model)
    after = model.state_dict()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert model[0].merged == []
    merge(model, safe=False)
    assert not model[2].base_layer.weight.isfinite().all()


def test_a_safe_merge_sees_what_leaves_the_type():
    model = inject(mlp(torch.float16), IA3Config(target_modules=FIRST))
    with torch.no_grad():
        model[0].adapters["default"].l.fill_(1e6)
    with pytest.raises(ArgumentError, match="finite"):
        merge(model)


def test_a_safe_merge_looks_at_biases():
    model = inject(mlp(), BitFitConfig(target_modules=FIRST))
    with torch.no_grad():
        model[0].adapters["default"].delta[0] = float("nan")
    with pytest.raises(ArgumentError, match="every bias stays finite"):
        merge(model)


def test_a_bias_that_was_made_goes_away_again():
    base = mlp()
    model = train(inject(mlp(), SSFConfig(target_modules=["2"])))
    merge(model)
    assert model[2].base_layer.bias.shape == (8,)
    unmerge(model)
    assert model[2].base_layer.bias is None
    assert list(unload(model).state_dict()) == list(base.state_dict())
    merged = merge_and_unload(train(inject(mlp(), BitFitConfig(target_modules=["2"]))))
    assert merged[2].bias is not None


@pytest.mark.parametrize("how", ["parameter", "storage"])
def test_a_tied_weight_stays_with_the_other_layer(how):
    tokens = torch.arange(7)
    model = Tied(how)
    shared = model.embed.weight
    before = shared.detach().clone()
    train(inject(model, LoRAConfig(r=1, target_modules=["out"])))
    want = model(tokens)
    merge(model)
    assert torch.equal(model.embed.weight, before)
    torch.testing.assert_close(model(tokens), want)
    assert not torch.equal(model.out.base_layer.weight, before)
    unmerge(model)
    assert torch.equal(model.out.base_layer.weight, before)
    assert model.out.base_layer.weight.data_ptr() == shared.data_ptr()
    assert torch.equal(model(tokens), want)
    unload(model)
    assert (model.out.weight is model.embed.weight) == (how == "parameter")


def test_both_ends_of_a_tie_can_be_adapted():
    tokens = torch.arange(7)
    model = Tied()
    train(inject(model, LoRAConfig(r=1, target_modules=["out", "embed"])))
    want = model(tokens)
    merge(model)
    torch.testing.assert_close(model(tokens), want)
    assert model.out.base_layer.weight is not model.embed.base_layer.weight
    unmerge(model)
    assert model.out.base_layer.weight is model.embed.base_layer.weight
    assert torch.equal(model(tokens), want)


def test_the_parameter_object_stays_where_nothing_is_tied():
    model = train(inject(mlp(), LoRAConfig(r=1)))
    weight = model[0].base_layer.weight
    merge(model)
    assert model[0].base_layer.weight is weight
    unmerge(model)
    assert model[0].base_layer.weight is weight


def test_another_type_since_the_merge_is_refused_without_a_stash():
    model = train(inject(mlp(), LoRAConfig(r=1)))
    merge(model).half()
    for function in (unmerge, unload):
        with pytest.raises(ArgumentError, match=r"stash=True\), torch.float32, got torch.float16 in layer '0'"):
            function(model)
    with pytest.raises(ArgumentError, match="stash"), disable_adapter(model):
        pass
    assert model[0].merged == ["default"]
    stashed = train(inject(mlp(), LoRAConfig(r=1)))
    unmerge(merge(stashed, stash=True).half())
    assert torch.equal(stashed[0].base_layer.weight, mlp()[0].weight.half())


def test_what_cannot_be_divided_is_kept():
    model = inject(mlp(), IA3Config(target_modules=FIRST))
    with torch.no_grad():
        model[0].adapters["default"].l[3] = 0.0
    merge(model)
    unmerge(model)
    assert torch.equal(model[0].base_layer.weight, mlp()[0].weight)


@pytest.mark.parametrize("stash", [True, False])
def test_disabling_a_merged_model(stash):
    model, x = stack(), rows()
    merged = merge(model, stash=stash)(x)
    weight = model[0].base_layer.weight.detach().clone()
    with disable_adapter(model):
        assert model[0].merged == []
        torch.testing.assert_close(model(x), mlp()(x))
        if stash:
            assert torch.equal(model(x), mlp()(x))
        with pytest.raises(ArgumentError, match="disable_adapter"):
            merge(model)
    assert model[0].merged == ["a", "b", "c"]
    assert torch.equal(model[0].base_layer.weight, weight)
    assert torch.equal(model(x), merged)
    unmerge(model)
    torch.testing.assert_close(unload(model)(x), mlp()(x))


def test_disabling_a_merged_tied_model():
    model, tokens = Tied(), torch.arange(7)
    base = copy.deepcopy(model)
    merge(train(inject(model, LoRAConfig(r=1, target_modules=["out"]))))
    want = model(tokens)
    with disable_adapter(model):
        assert torch.equal(model(tokens), base(tokens))
    assert torch.equal(model(tokens), want)
    unload(model)
    assert model.out.weight is model.embed.weight


@pytest.mark.parametrize("merged", [True, False])
def test_a_disabled_model_is_not_changed(merged):
    model, x = stack(), rows()
    if merged:
        merge(model)
    want = model(x)
    operations = [
        lambda: inject(model, LoRAConfig(), "new"),
        lambda: set_adapter(model, "a"),
        lambda: delete_adapter(model, "a"),
        lambda: unload(model),
        lambda: merge(model),
        lambda: merge_and_unload(model),
    ]
    with disable_adapter(model):
        for operation in operations:
            with pytest.raises(ArgumentError, match="disable_adapter"):
                operation()
    assert torch.equal(model(x), want)


def test_switching_and_deleting_wait_for_unmerge():
    model = merge(stack())
    for function in (set_adapter, delete_adapter):
        with pytest.raises(ArgumentError, match="see unmerge"):
            function(model, "a")


def test_an_adapter_put_on_a_merged_model():
    model, x = stack(torch.float64), rows(torch.float64)
    merge(model)
    train(inject(model, LoRAConfig(r=2, target_modules=FIRST), "d"), seed=8)
    want = model(x)
    merge(model)
    torch.testing.assert_close(model(x), want)
    unmerge(model)
    torch.testing.assert_close(model(x), want)


def test_a_copy_of_a_merged_model_unmerges_alone():
    model, x = stack(), rows()
    merge(model, stash=True)
    twin = copy.deepcopy(model)
    want = model(x)
    unload(twin)
    assert torch.equal(model(x), want)
    assert torch.equal(twin(x), mlp()(x))


def test_a_stash_moves_with_the_model():
    model = train(inject(mlp(), LoRAConfig(r=1)))
    merge(model, stash=True).double()
    assert model[0].merges[0].kept[0].dtype == torch.float32
    unmerge(model)
    assert torch.equal(model[0].base_layer.weight, mlp()[0].weight.double())


def test_merge_and_unload_takes_the_trained_copy():
    model = inject(mlp(), LoRAConfig(r=1, target_modules=["0"], modules_to_save=["2"]))
    train(model)
    x = rows()
    want, trained = model(x), model[2].copies["default"].weight
    merge_and_unload(model)
    assert type(model[2]) is nn.Linear
    assert model[2].weight is trained
    torch.testing.assert_close(model(x), want)


def test_merge_and_unload_drops_what_is_not_active():
    model, x = stack(torch.float64), rows(torch.float64)
    set_adapter(model, ["c", "a"])
    want = model(x)
    torch.testing.assert_close(merge_and_unload(model)(x), want)


def test_merge_and_unload_with_nothing_active_is_the_base():
    model = stack()
    set_adapter(model, [])
    assert torch.equal(merge_and_unload(model)(rows()), mlp()(rows()))


@pytest.mark.parametrize(("options", "match"), [({"safe": 1}, "safe"), ({"stash": None}, "stash")])
def test_flags_are_flags(options, match):
    with pytest.raises(ArgumentError, match=match):
        merge(stack(), **options)


def test_gradients_flow_through_a_merged_layer_to_its_input():
    model = merge(stack(torch.float64))
    x = rows(torch.float64).requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("first", [False, True])
def test_parts_of_a_model_that_were_injected_by_themselves(first):
    model = nn.Sequential(mlp(), mlp())
    for part, name in zip(model, "ab", strict=True):
        inject(part, LoRAConfig(r=2), name)
    train(model)
    want = model(rows())
    if first:
        merge(model[0])
    merge_and_unload(model)
    torch.testing.assert_close(model(rows()), want, atol=1e-5, rtol=1e-5)


def test_the_same_name_in_two_parts_of_which_one_is_merged():
    model = nn.Sequential(mlp(), mlp())
    for part in model:
        inject(part, LoRAConfig(r=2))
    train(model)
    want = model(rows())
    merge(model[0])
    merge_and_unload(model)
    torch.testing.assert_close(model(rows()), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapters", [5, {"default"}])
def test_adapters_are_a_name_or_a_sequence(adapters):
    with pytest.raises(ArgumentTypeError, match="adapters"):
        merge(inject(mlp(), LoRAConfig(r=1)), adapters=adapters)
