"""Concrete masks against autograd through the whole formula, with the draws repeated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shiftkern.merge.concrete import ConcreteMerging, concrete


def family(k: int = 3, dtype=torch.float64) -> tuple[nn.Sequential, dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    models = [
        {
            n: t + (0.4 * torch.rand(t.shape, generator=generator)).to(dtype) if t.is_floating_point() else t
            for n, t in base.items()
        }
        for _ in range(k)
    ]
    return model, base, models


def batches(k: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(k)]


def explicit(model, base, models, logits, uniforms, data, temperature=0.5, scale=0.3):
    """Loss of the formula, every model masked and rescaled on its own; a graph over all of them."""
    merged = {}
    for name, start in base.items():
        if not start.is_floating_point():
            continue
        taus = [m[name] - start for m in models]
        if name in logits:
            u = uniforms[name]
            mask = torch.sigmoid((logits[name] + torch.log(u) - torch.log(1 - u)) / temperature)
            taus = [mask * tau / mask.mean() for tau in taus]
        merged[name] = start + scale * sum(taus)
    loss = 0.0
    for x in data:
        p = torch.func.functional_call(model, merged, (x,)).softmax(1)
        loss = loss - (p * p.log()).sum(1).mean()
    return loss


@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 0.3), (0.9, -0.6)])
def test_training_is_that_of_autograd_through_the_formula(temperature, scale):
    model, base, models = family()
    merging = ConcreteMerging(model, base, models, temperature=temperature, scale=scale, lr=0.05, seed=11)
    model.eval()
    logits = {n: torch.zeros_like(p, requires_grad=True) for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(logits.values(), lr=0.05)
    generator = torch.Generator().manual_seed(11)
    for _ in range(5):
        uniforms = {n: torch.rand(x.shape, generator=generator, dtype=torch.float64) for n, x in logits.items()}
        loss = explicit(model, base, models, logits, uniforms, batches(), temperature, scale)
        optimizer.zero_grad()
        loss.backward()
        assert merging.step(batches()) == pytest.approx(loss.item(), rel=1e-9)
        optimizer.step()
    masks = merging.masks
    assert list(masks) == list(logits)
    for name, x in logits.items():
        torch.testing.assert_close(masks[name], x.detach().sigmoid(), rtol=1e-6, atol=1e-8)
    assert (masks["0.weight"] - 0.5).abs().max() > 0.02


def test_merged_uses_the_mask_without_a_draw():
    model, base, models = family()
    merging = ConcreteMerging(model, base, models, lr=0.2)
    merging.run([batches()], steps=4)
    merged, masks = merging.merged(), merging.masks
    for name, start in base.items():
        if not start.is_floating_point():
            assert torch.equal(merged[name], start)
            continue
        mask = masks.get(name, torch.ones_like(start))
        expected = start + 0.3 * sum(mask * (m[name] - start) for m in models) / mask.mean()
        torch.testing.assert_close(merged[name], expected, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(value, merged[name]) for name, value in merging.merged().items())


def test_equal_logits_are_task_arithmetic():
    for init in (0.0, 5.0, -3.0):
        model, base, models = family()
        merged = ConcreteMerging(model, base, models, init=init).merged()
        for name in ("0.weight", "3.bias", "1.running_var"):
            expected = base[name] + 0.3 * sum(m[name] - base[name] for m in models)
            torch.testing.assert_close(merged[name], expected, rtol=1e-12, atol=1e-14)


def test_defaults_are_those_of_the_paper():
    merging = ConcreteMerging(*family())
    assert (merging.scale, merging.temperature) == (0.3, 0.5)
    assert all((mask == 0.5).all() for mask in merging.masks.values())
    (group,) = merging._optimizer.param_groups
    assert isinstance(merging._optimizer, torch.optim.Adam)
    assert group["lr"] == 1e-3


def test_entropy_falls():
    merging = ConcreteMerging(*family(), lr=0.1)
    merging.run([batches()], steps=60)
    assert sum(merging.losses[-10:]) < sum(merging.losses[:10]) - 0.1


def test_the_seed_decides():
    runs = []
    for seed in (0, 0, 1):
        merging = ConcreteMerging(*family(), seed=seed)
        merging.run([batches()], steps=2)
        runs.append(merging.losses)
    assert runs[0] == runs[1] != runs[2]


def test_heads_and_one_batch_for_all():
    model, base, models = family(2)
    x = batches(1)[0]
    one = ConcreteMerging(model, base, models).step(x)
    assert ConcreteMerging(model, base, models, heads=[nn.Identity()] * 2).step(x) == pytest.approx(2 * one, rel=1e-12)
    assert ConcreteMerging(model, base, models).step([x, x]) == pytest.approx(2 * one, rel=1e-12)


def test_a_saved_state_goes_on_to_the_bit():
    one, other = ConcreteMerging(*family(), seed=1), ConcreteMerging(*family(), seed=2)
    one.run([batches()], steps=3)
    other.load_state_dict(one.state_dict())
    for merging in (one, other):
        merging.run([batches()], steps=2)
    assert one.losses == other.losses
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())
    state = one.state_dict()
    del state["generator"]
    with pytest.raises(ValueError, match="entry 'generator'"):
        other.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    model, base, models = family(2, dtype)
    merging = ConcreteMerging(model, base, models, lr=0.05)
    merging.run([[x.to(dtype) for x in batches(2)]], steps=2)
    assert merging.merged()["0.weight"].dtype == dtype
    assert merging.masks["0.weight"].dtype == torch.float32
    exact = base["0.weight"].double() + 0.3 * sum(m["0.weight"].double() - base["0.weight"].double() for m in models)
    start = ConcreteMerging(model, base, models).merged()["0.weight"]
    torch.testing.assert_close(start, exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)


def test_empty_and_scalar_tensors():
    base = {"w": torch.eye(2), "none": torch.empty(0, 3), "s": torch.tensor(1.0)}
    models = [{name: value + 0.5 for name, value in base.items()} for _ in range(2)]
    merging = ConcreteMerging(lambda t, x: x @ t["w"] * t["s"], base, models)
    merging.run([torch.eye(2)], steps=3)
    merged = merging.merged()
    assert merged["none"].shape == (0, 3)
    assert merged["s"] == pytest.approx(1.3)  # a mask of one entry rescales itself away
    assert merging.masks["s"] == 0.5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": "x"}, TypeError, "argument 'scale'"),
        ({"temperature": 0}, ValueError, "argument 'temperature'"),
        ({"init": float("inf")}, ValueError, "argument 'init'"),
        ({"lr": 0}, ValueError, "argument 'lr'"),
        ({"seed": -1}, ValueError, "argument 'seed'"),
        ({"optimizer": 1}, TypeError, "argument 'optimizer'"),
        ({"heads": []}, ValueError, "argument 'heads'"),
        ({"models": [{}]}, ValueError, "argument 'models'"),
        ({"base": []}, TypeError, "argument 'base'"),
        ({"model": "x"}, TypeError, "argument 'model'"),
    ],
)
def test_wrong_arguments_are_errors(options, error, message):
    model, base, models = family()
    given = {"model": model, "base": base, "models": models, **options}
    with pytest.raises(error, match=f"ConcreteMerging: {message}"):
        ConcreteMerging(**given)


def test_values_that_are_not_finite_are_errors():
    model, base, models = family()
    models[1]["0.bias"][2] = torch.nan
    with pytest.raises(ValueError, match=r"tensor '0.bias' of model 1"):
        ConcreteMerging(model, base, models)
    model, base, models = family()
    with pytest.raises(ValueError, match="a batch with a finite loss"):
        ConcreteMerging(model, base, models).step(batches()[0] * torch.nan)
    with pytest.raises(ValueError, match="argument 'batch'"):
        ConcreteMerging(model, base, models).step(batches(2))


def test_the_function_is_the_class_from_start_to_end():
    model, base, models = family()
    merging = ConcreteMerging(model, base, models, lr=0.1, seed=4)
    merging.run([batches()[0]], 5)
    seen = []
    merged = concrete(
        model, base, models, [batches()[0]], steps=5, lr=0.1, seed=4, progress=lambda step, loss: seen.append(step)
    )
    assert seen == [1, 2, 3, 4, 5]
    for name, tensor in merging.merged().items():
        assert torch.equal(merged[name], tensor)
