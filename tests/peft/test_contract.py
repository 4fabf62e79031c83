"""What every method of fine-tuning promises, for each that is registered: add settings to ``helpers.peft.CASES``."""

import copy
import io

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, peft
from shiftkern.peft._adapter import METHODS, Config

from helpers.peft import CASES, Case, cases, train

ALL = cases()
IDS = [f"{method}-{i}" for method in METHODS for i in range(len(CASES.get(method, [Case()])))]
EVERY = pytest.mark.parametrize(("method", "case"), ALL, ids=IDS)


def mergeable(model):
    return all(layer.adapter("default").mergeable for layer in peft.adapted_layers(model).values())


def needs_merging(model):
    if not mergeable(model):
        pytest.skip("no change of weights")


def close(got, want, dtype=torch.float64, factor=1.0):
    """Within a few hundred roundings of the largest value: dozens of operations on a dozen numbers each."""
    scale = max(float(want.detach().abs().max()), 1.0)
    bound = 300 * factor * torch.finfo(dtype).eps * scale
    error = float((got.detach().double() - want.detach().double()).abs().max())
    assert error <= bound, f"off by {error}, more than {bound}"


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@EVERY
def test_a_fresh_adapter_is_the_identity_or_says_that_it_is_not(method, case):
    base, model = case.model(torch.float64), case.injected(method, torch.float64)
    x = case.inputs(torch.float64)
    error = float((model(x) - base(x)).detach().abs().max())
    assert (error < 1e-12) == case.identity


@EVERY
def test_only_adapters_are_trained_and_all_of_them(method, case):
    model = case.injected(method)
    assert peft.trainable_parameters(model)[0] > 0
    inside = {id(p) for layer in peft.adapted_layers(model).values() for p in layer.adapters.parameters()}
    assert {id(p) for p in trainable(model).values()} == inside


@EVERY
def test_training_changes_what_comes_out(method, case):
    x = case.inputs(torch.float64)
    before, after = case.injected(method, torch.float64), case.trained(method, torch.float64)
    assert not torch.allclose(before(x), after(x))


@EVERY
def test_disabled_is_the_base_model_to_the_bit(method, case):
    base, model = case.model(torch.float32), case.trained(method)
    x = case.inputs(torch.float32)
    with peft.disable_adapter(model):
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_is_the_same_function(method, case, dtype):
    model = case.trained(method, dtype)
    needs_merging(model)
    x = case.inputs(dtype)
    want = model(x)
    peft.merge(model)
    close(model(x), want, dtype)


@EVERY
def test_merging_twice_changes_nothing(method, case):
    model = case.trained(method)
    needs_merging(model)
    x = case.inputs(torch.float32)
    merged = peft.merge(model)(x)
    with pytest.warns(UserWarning, match="nothing is left to merge"):
        peft.merge(model)
    assert torch.equal(model(x), merged)


@EVERY
def test_unmerging_gives_the_base_model_back(method, case):
    base, model = case.model(torch.float64), case.trained(method, torch.float64)
    needs_merging(model)
    x = case.inputs(torch.float64)
    want = model(x)
    peft.unmerge(peft.merge(model))
    close(model(x), want)
    peft.unload(model)
    close(model(x), base(x))
    for (name, got), (other, value) in zip(model.state_dict().items(), base.state_dict().items(), strict=True):
        assert name == other
        close(got, value)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stash_gives_the_base_model_back_to_the_bit(method, case, dtype):
    base, model = case.model(dtype), case.trained(method, dtype)
    needs_merging(model)
    peft.unload(peft.merge(model, stash=True))
    for got, value in zip(model.state_dict().values(), base.state_dict().values(), strict=True):
        assert torch.equal(got, value)


@EVERY
def test_unloading_leaves_a_plain_model(method, case):
    base, model = case.model(torch.float32), case.trained(method)
    peft.unload(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    x = case.inputs(torch.float32)
    assert torch.equal(model(x), base(x))


@EVERY
def test_merge_and_unload_leaves_a_plain_model_with_the_same_function(method, case):
    model = case.trained(method, torch.float64)
    needs_merging(model)
    x = case.inputs(torch.float64)
    want = model(x)
    peft.merge_and_unload(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in case.model(torch.float64).modules()]
    close(model(x), want)


@EVERY
def test_saved_and_loaded_it_is_the_same(method, case, tmp_path):
    model = case.trained(method)
    peft.save(model, tmp_path)
    again = peft.load(case.model(torch.float32), tmp_path)
    x = case.inputs(torch.float32)
    assert torch.equal(again(x), model(x))
    assert peft.trainable_parameters(again) == peft.trainable_parameters(model)
    assert sorted(again.state_dict()) == sorted(model.state_dict())


@EVERY
def test_a_config_survives_json(method, case):
    config = case.config(method)
    assert Config.from_dict(config.to_dict()) == config


@EVERY
def test_state_dicts_copies_and_whole_modules(method, case):
    model = case.trained(method)
    x = case.inputs(torch.float32)
    want = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), want)
    train(twin, seed=6)
    assert torch.equal(model(x), want)
    fresh = case.injected(method)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)


@EVERY
def test_gradients(method, case):
    if not case.smooth:
        pytest.skip("gradients that go straight through are not those of finite differences")
    model = case.trained(method, torch.float64)
    x = case.inputs(torch.float64)[:2]
    names, values = zip(*trainable(model).items(), strict=True)

    def function(*given):
        y = torch.func.functional_call(model, dict(zip(names, given, strict=True)), (x,))
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

    given = tuple(v.detach().clone().requires_grad_() for v in values)
    assert torch.autograd.gradcheck(function, given, eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@EVERY
def test_inputs_get_gradients(method, case):
    model = case.trained(method, torch.float64)
    x = case.inputs(torch.float64)[:2]
    if not x.is_floating_point():
        pytest.skip("tokens have none")
    function = lambda x: model(x).square().sum()  # noqa: E731
    assert torch.autograd.gradcheck(function, (x.clone().requires_grad_(),), fast_mode=True)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(method, case, dtype):
    model = case.trained(method, dtype)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    y = model(case.inputs(dtype))
    assert y.dtype == dtype
    # The same rounded base and the same steps of the adapters, in float64.
    exact = case.injected(method, dtype)
    train(exact)
    exact = exact.double()
    x = case.inputs(dtype)
    close(y, exact(x.double() if x.is_floating_point() else x), dtype, 0.1)
    y.float().sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trainable(model).values())


@EVERY
def test_adapters_stay_wide_when_the_model_is_halved(method, case):
    model = case.trained(method).to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in trainable(model).values())
    assert model(case.inputs(torch.bfloat16)).dtype == torch.bfloat16


@EVERY
def test_a_training_step_reduces_a_loss(method, case):
    model = case.injected(method, torch.float64)
    x = case.inputs(torch.float64)
    target = torch.randn(model(x).shape, dtype=torch.float64)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (model(x) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@EVERY
def test_the_start_depends_on_seed_and_layer_alone(method, case):
    torch.manual_seed(1)
    first = case.injected(method).state_dict()
    torch.manual_seed(2)
    second = case.injected(method).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@EVERY
def test_autocast(method, case):
    model = case.trained(method)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(case.inputs(torch.float32))
    close(y, model(case.inputs(torch.float32)), torch.bfloat16, 0.1)
    if mergeable(model):
        want = copy.deepcopy(model)
        peft.merge(want)
        with torch.autocast("cpu", torch.bfloat16):
            peft.merge(model)
        for got, value in zip(model.state_dict().values(), want.state_dict().values(), strict=True):
            assert torch.equal(got, value)


@EVERY
def test_another_adapter_on_top(method, case):
    model = case.trained(method, torch.float64)
    kinds = {layer.kind.name for layer in peft.adapted_layers(model).values()}
    if not kinds <= {"linear", "conv"}:
        pytest.skip("nothing to put LoRA on")
    peft.inject(model, peft.LoRAConfig(r=2, target_modules=list(peft.adapted_layers(model))), "top")
    train(model)
    x = case.inputs(torch.float64)
    both = model(x)
    if mergeable(model):
        peft.merge(model, adapters="default")
        close(model(x), both)
        peft.merge(model)
        close(model(x), both)
        peft.unmerge(model)
    peft.set_adapter(model, ["top", "default"])
    turned = model(x)
    if mergeable(model):
        peft.merge(model)
        close(model(x), turned)
        peft.unmerge(model)
    peft.delete_adapter(model, "top")
    assert [layer.active for layer in peft.adapted_layers(model).values()] == [["default"]] * len(
        peft.adapted_layers(model)
    )


@EVERY
def test_describe_names_the_method(method, case):
    text = peft.describe(case.injected(method))
    assert method in text
    assert all(name in text for name in peft.adapted_layers(case.injected(method)))


@EVERY
def test_an_unknown_argument_is_refused(method, case):
    with pytest.raises(TypeError):
        METHODS[method](**case.options, no_such_option=1)
    with pytest.raises(ArgumentError, match="target_modules"):
        METHODS[method](**{**case.options, "target_modules": []})


def test_every_method_has_settings_for_a_registered_name():
    assert set(CASES) <= set(METHODS)
    assert all(isinstance(case.model(torch.float32), nn.Module) for _, case in ALL)
