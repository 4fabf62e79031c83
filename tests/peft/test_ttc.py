import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import SSFConfig, TTCConfig, adapted_layers, inject, merge, ttc_channels, unmerge

from helpers.peft import cnn, fixed, mlp, pictures, rows, train


def test_the_equation():
    model = train(inject(mlp(torch.float64), TTCConfig(target_modules=["0"], channels={"0": [9, 2, 5]})), 0.5)
    adapter = model[0].adapters["default"]
    assert adapter.index.tolist() == [2, 5, 9]
    h = mlp(torch.float64)[0](rows(torch.float64))
    want = h.detach().clone()
    for i, row in enumerate((2, 5, 9)):
        want[..., row] += adapter.c[i].item()
        for j, column in enumerate((2, 5, 9)):
            want[..., row] += adapter.M[i, j].item() * h[..., column].detach()
    torch.testing.assert_close(model[0](rows(torch.float64)), want, rtol=1e-12, atol=1e-12)
    untouched = [i for i in range(16) if i not in (2, 5, 9)]
    assert torch.equal(model[0](rows(torch.float64))[..., untouched], h[..., untouched])


def test_channels_of_convolutions_are_the_second_dimension():
    model = train(inject(cnn(torch.float64), TTCConfig(target_modules=["0"], channels={"0": [1, 6]})), 0.5)
    adapter = model[0].adapters["default"]
    h = cnn(torch.float64)[0](pictures(torch.float64))
    want = h.clone()
    want[:, [1, 6]] += torch.einsum("ij,njhw->nihw", adapter.M, h[:, [1, 6]]) + adapter.c[:, None, None]
    torch.testing.assert_close(model[0](pictures(torch.float64)), want, rtol=1e-12, atol=1e-12)


def test_unmerging_needs_no_copy_unless_singular():
    model = train(inject(mlp(torch.float64), TTCConfig(target_modules=["0"], channels={"0": [1, 2]})))
    layer, want = model[0], mlp(torch.float64)[0].weight
    merge(model)
    assert layer.merges[0].kept is None
    unmerge(model)
    torch.testing.assert_close(layer.base_layer.weight, want, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        layer.adapters["default"].M.copy_(torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
    merge(model)
    assert layer.merges[0].kept is not None
    unmerge(model)
    torch.testing.assert_close(layer.base_layer.weight, want, rtol=1e-12, atol=1e-13)


def by_hand(model, x):
    """Importance of the channels of a linear layer before ``tanh`` and a sum of squares, example by example."""
    total = torch.zeros(16, dtype=torch.float64)
    for example in x:
        h = model[0](example).detach()
        y = torch.tanh(h) @ model[2].weight.detach().T
        gradient = (2 * y @ model[2].weight.detach()) * (1 - torch.tanh(h) ** 2)
        total += (h * gradient).sum(0) ** 2
    return total


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("each", [True, False])
def test_channels_have_the_largest_taylor_terms(frozen, each):
    model = mlp(torch.float64).requires_grad_(not frozen)
    x = rows(torch.float64)
    function = (lambda m, b: m(b).square().sum((1, 2))) if each else (lambda m, b: m(b).square().sum())
    config = ttc_channels(model, TTCConfig(k=5, target_modules=["0"]), [x[:2], x[2:]], function, quiet=True)
    want = by_hand(mlp(torch.float64), x).topk(5).indices
    assert config.channels == {"0": sorted(want.tolist())}
    assert config.target_modules == ("0",)
    assert not model[0]._forward_hooks
    assert all(p.grad is None for p in model.parameters())


def test_positions_are_summed_before_the_square_and_examples_after():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    # Channel 0 cancels over positions; channel 1 cancels over examples only.
    x = torch.tensor([[[9.0, 1.0], [-9.0, 1.0]], [[9.0, -1.0], [-9.0, -1.0]]])
    assert ttc_channels(model, TTCConfig(k=1), [x], lambda m, b: m(b).sum((1, 2)), quiet=True).channels == {"0": [1]}


def test_the_importance_predicts_what_removing_a_channel_does():
    """With a loss that is linear in the channels, the first-order term is all there is."""
    model = fixed(nn.Sequential(nn.Linear(4, 6)), torch.float64)
    x = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = torch.tensor([1.0, -3.0, 0.2, 0.0, 5.0, -0.5], dtype=torch.float64)
    function = lambda m, b: m(b) @ slope  # noqa: E731
    removed = []
    for channel in range(6):
        h = model(x).detach()
        h[:, channel] = 0
        removed.append(abs((h @ slope - function(model, x)).item()))
    best = sorted(sorted(range(6), key=lambda c: -removed[c])[:2])
    assert ttc_channels(model, TTCConfig(k=2), [x], function, quiet=True).channels == {"0": best}


def test_two_stages():
    """Normalizations first, then channels beside them; the second stage is chosen on the aligned model."""
    model = fixed(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)), torch.float64)
    x, y = rows(torch.float64)[:, 0], torch.tensor([0, 1, 2])
    loss = lambda m, batch: F.cross_entropy(m(batch[0]), batch[1], reduction="none")  # noqa: E731
    inject(model, SSFConfig(std=0.0, target_modules=["1"]), "alignment")

    def fit():
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            value = loss(model, (x, y)).sum()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    first = fit()
    config = ttc_channels(model, TTCConfig(k=4, target_modules=["0", "1"]), [(x, y)], loss, quiet=True)
    assert list(config.channels) == ["0", "1"]
    before = model(x)
    inject(model, config, "channels")
    assert torch.equal(model(x), before)
    second = fit()
    assert first[0] > first[-1] >= second[0] > second[-1]
    assert adapted_layers(model)["1"].active == ["alignment", "channels"]


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"k": 0}, ArgumentError, "k"),
        ({"channels": [1]}, ArgumentTypeError, "channels"),
        ({"channels": {"0": 3}}, ArgumentTypeError, "channels"),
        ({"channels": {"0": []}}, ArgumentError, "channels"),
        ({"channels": {"0": [1, 1]}}, ArgumentError, "channels"),
        ({"channels": {"0": [-1]}}, ArgumentError, "channels"),
        ({"channels": {"0": [0.5]}}, ArgumentTypeError, "channels"),
    ],
)
def test_errors_of_the_config(options, error, name):
    with pytest.raises(error, match=rf"TTCConfig: argument '{name}': expected .*, got "):
        TTCConfig(**options)


def test_channels_that_are_missing_or_do_not_exist():
    with pytest.raises(ArgumentError, match="see ttc_channels"):
        inject(mlp(), TTCConfig())
    with pytest.raises(ArgumentError, match="channels below 16"):
        inject(mlp(), TTCConfig(target_modules=["0"], channels={"0": [16]}))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"model": None}, ArgumentTypeError, "model"),
        ({"config": None}, ArgumentTypeError, "config"),
        ({"config": TTCConfig(k=17, target_modules=["0"])}, ArgumentError, "k"),
        ({"config": TTCConfig(target_modules=["none"])}, ArgumentError, "target_modules"),
        ({"data": []}, ArgumentError, "data"),
        ({"data": torch.zeros(2, 8)}, ArgumentTypeError, "data"),
        ({"loss": 1}, ArgumentTypeError, "loss"),
        ({"loss": lambda m, b: m(b)}, ArgumentError, "loss"),
        ({"loss": lambda m, b: b.sum()}, ArgumentError, "loss"),
        ({"loss": lambda m, b: m(b).detach().sum()}, ArgumentError, "loss"),
        ({"loss": lambda m, b: (b * torch.ones((), requires_grad=True)).sum()}, ArgumentError, "loss"),
        ({"loss": lambda m, b: m(b).sum() * float("nan")}, ArgumentError, "loss"),
        ({"quiet": 0}, ArgumentTypeError, "quiet"),
    ],
)
def test_errors_of_the_choice(change, error, name):
    given = {"model": mlp(), "config": TTCConfig(k=2), "data": [rows()], "loss": lambda m, b: m(b).sum()}
    given |= {"quiet": True} | change
    model, config, data, function = (given.pop(key) for key in ("model", "config", "data", "loss"))
    with pytest.raises(error, match=rf"ttc_channels: argument '{name}': expected .*, got "):
        ttc_channels(model, config, data, function, **given)
    assert model is None or not any(m._forward_hooks for m in model.modules())
