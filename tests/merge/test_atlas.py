"""ATLAS against autograd through the explicit sum, and on problems whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftkern.merge.atlas import ATLAS


def family(k: int = 3) -> tuple[nn.Sequential, dict[str, Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(7)
    models = [
        {n: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in base.items()}
        for _ in range(k)
    ]
    return model, base, models


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 4, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def composed(base, models, coefficients):
    """Plain loops over names and models; one column of coefficients per name, or one for all."""
    merged = {}
    for place, (name, start) in enumerate(base.items()):
        merged[name] = start
        for k, model in enumerate(models):
            weight = coefficients[k] if coefficients.dim() == 1 else coefficients[k, place]
            merged[name] = merged[name] + weight * (model[name] - start)
    return merged


@pytest.mark.parametrize("per", ["task", "layer"])
def test_training_is_that_of_autograd_through_the_sum(per):
    model, base, models = family()
    x, y = data()
    merging = ATLAS(model, base, models, F.cross_entropy, per=per, lr=0.05)
    leaf = torch.zeros(3 if per == "task" else (3, 4), dtype=torch.float64, requires_grad=True)
    assert torch.equal(merging.coefficients, leaf)
    optimizer = torch.optim.Adam([leaf], lr=0.05)
    for _ in range(8):
        loss = F.cross_entropy(torch.func.functional_call(model, composed(base, models, leaf), (x,)), y)
        optimizer.zero_grad()
        loss.backward()
        assert merging.step(x, y) == pytest.approx(loss.item(), rel=1e-9)
        optimizer.step()
        torch.testing.assert_close(merging.coefficients, leaf.detach(), rtol=1e-7, atol=1e-9)
    assert leaf.abs().min() > 0.05
    expected = composed(base, models, leaf.detach())
    for name, value in merging.merged().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


def test_it_starts_at_the_base_exactly():
    model, base, models = family()
    assert all(
        torch.equal(value, base[name]) for name, value in ATLAS(model, base, models, F.mse_loss).merged().items()
    )


def test_a_planted_composition_is_found():
    model, base, models = family(2)
    planted = torch.tensor([[0.8, -0.5, 0.3, 1.2], [-0.7, 0.4, 1.0, -0.2]], dtype=torch.float64)
    x, _ = data()
    x = torch.cat([x, 2 * x.flip(0)])
    target = torch.func.functional_call(model, composed(base, models, planted), (x,)).detach()
    merging = ATLAS(model, base, models, F.mse_loss, lr=0.05)
    merging.run([(x, target)], steps=600)
    torch.testing.assert_close(merging.coefficients, planted, rtol=0, atol=5e-3)
    assert merging.losses[-1] < 1e-6 * merging.losses[0]


def test_a_loss_without_targets():
    merging = ATLAS(*family(), lambda output: output.square().mean())
    merging.run([data()[0]], steps=20)
    assert merging.losses[-1] < merging.losses[0]


def test_buffers_stay_with_the_base():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merging = ATLAS(model, base, [{n: t + 1 for n, t in base.items()}], F.cross_entropy, lr=0.1)
    merging.run([(torch.eye(2), torch.tensor([0, 1]))], steps=3)
    merged = merging.merged()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(merged[name], base[name])
    assert not torch.equal(merged["0.weight"], base["0.weight"])


def test_a_saved_state_goes_on_to_the_bit():
    one, other = (ATLAS(*family(), F.cross_entropy) for _ in range(2))
    one.run([data()], steps=3)
    other.load_state_dict(one.state_dict())
    for merging in (one, other):
        merging.run([data()], steps=2)
    assert torch.equal(one.coefficients, other.coefficients)
    assert one.losses == other.losses


def test_a_gradient_that_is_not_finite_learns_nothing():
    base, models = ({"w": torch.zeros(2)}, [{"w": torch.ones(2)}])
    merging = ATLAS(lambda tensors, x: tensors["w"] * x, base, models, lambda out: out.abs().sqrt().sum(), lr=0.1)
    with pytest.raises(ValueError, match=r"expected a batch with a finite gradient, got NaN.*tensor 'w'"):
        merging.step(torch.ones(2))
    assert torch.equal(merging.coefficients, torch.zeros(1, 1, dtype=torch.float64))
    assert merging.losses == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": None}, TypeError, "argument 'loss_fn'"),
        ({"per": "row"}, ValueError, "argument 'per'"),
        ({"init": "x"}, TypeError, "argument 'init'"),
        ({"lr": -1}, ValueError, "argument 'lr'"),
        ({"optimizer": None}, TypeError, "argument 'optimizer'"),
        ({"models": []}, ValueError, "argument 'models'"),
        ({"base": 1}, TypeError, "argument 'base'"),
        ({"model": 1}, TypeError, "argument 'model'"),
    ],
)
def test_wrong_arguments_are_errors(options, error, message):
    model, base, models = family()
    given = {"model": model, "base": base, "models": models, "loss_fn": F.cross_entropy, **options}
    with pytest.raises(error, match=f"ATLAS: {message}"):
        ATLAS(**given)


@pytest.mark.parametrize("result", [1.0, torch.zeros(2), torch.tensor(1)])
def test_a_loss_that_is_no_scalar_is_an_error(result):
    with pytest.raises(TypeError, match="ATLAS: argument 'loss_fn'"):
        ATLAS(*family(), lambda *_: result).step(*data())
