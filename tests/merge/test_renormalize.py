"""Renormalized networks: statistics on the data are the goals, and the correction is the one layer by layer."""

import copy

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.merge.renormalize import renormalize

from helpers.networks import convnet, filled, mlp
from helpers.strategies import make


def averaged(a, b, alpha=0.5):
    merged = copy.deepcopy(a)
    states = a.state_dict(), b.state_dict()
    mixed = {k: torch.lerp(v.double(), states[1][k].double(), alpha).to(v.dtype) for k, v in states[0].items()}
    merged.load_state_dict(mixed)
    return merged


def outputs(net, x):
    """Outputs of all layers with weights, by name."""
    found = {}
    hooks = [
        layer.register_forward_hook(lambda _, i, o, name=name: found.update({name: o.detach().double()}))
        for name, layer in net.named_modules()
        if hasattr(layer, "weight")
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return found


def statistics(values):
    rows = values.movedim(1, 0).reshape(values.shape[1], -1)
    return rows.mean(1), rows.std(1, correction=0)


def double(net):
    return net.double().eval()


NETWORKS = {
    "deep": (lambda s: double(mlp(4, 9, 8, 7, 3, seed=s)), (4,), ("0", "2", "4")),
    "images": (lambda s: double(convnet(seed=s, norm=False)), (2, 8, 8), ("0", "3", "7")),
}
BATCHES = (30, 1, 25)


def case(name, alpha=0.5):
    make_net, shape, layers = NETWORKS[name]
    parents = [make_net(s) for s in (0, 1)]
    batches = [make((n, *shape), torch.float64, seed=n) for n in BATCHES]
    return averaged(*parents, alpha), batches, parents, layers


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_on_the_data_are_the_goals(name, alpha):
    merged, batches, parents, layers = case(name, alpha)
    fixed = renormalize(merged, batches, parents, alpha=alpha)
    x = torch.cat(batches)
    before, after, first, second = (outputs(net, x) for net in (merged, fixed, *parents))
    for layer in layers:
        (mean, std), (mean_1, std_1), (mean_2, std_2) = (statistics(o[layer]) for o in (after, first, second))
        torch.testing.assert_close(mean, (1 - alpha) * mean_1 + alpha * mean_2, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(std, (1 - alpha) * std_1 + alpha * std_2, rtol=1e-9, atol=1e-9)
        if 0 < alpha < 1:
            assert not torch.allclose(statistics(before[layer])[1], std, rtol=1e-2)
    last = [key for key in merged.state_dict() if key.split(".")[0] not in layers]
    assert last
    assert all(torch.equal(fixed.state_dict()[key], merged.state_dict()[key]) for key in last)


@pytest.mark.parametrize(("rescale", "reshift"), [(True, True), (True, False), (False, True)])
def test_equals_the_formula_layer_by_layer(rescale, reshift):
    merged, batches, parents, layers = case("deep", 0.3)
    fixed = renormalize(merged, batches, parents, alpha=0.3, rescale=rescale, reshift=reshift)
    x = torch.cat(batches)
    goals = [outputs(parent, x) for parent in parents]
    value = x
    for index, layer in enumerate(merged):
        value = layer(value)
        if str(index) in layers:
            mean, std = statistics(value)
            (mean_1, std_1), (mean_2, std_2) = (statistics(goal[str(index)]) for goal in goals)
            goal_mean, goal_std = 0.7 * mean_1 + 0.3 * mean_2, 0.7 * std_1 + 0.3 * std_2
            if rescale and reshift:
                value = (value - mean) / std * goal_std + goal_mean
            elif rescale:
                value = value * goal_std / std
            else:
                value = value - mean + goal_mean
    torch.testing.assert_close(fixed(x), value)


def test_a_network_that_needs_nothing_is_left_as_it_is():
    merged, batches, _, _ = case("images")
    for parents in (merged, [merged], (merged, copy.deepcopy(merged))):
        for key, value in renormalize(merged, batches, parents).state_dict().items():
            torch.testing.assert_close(value, merged.state_dict()[key], rtol=1e-9, atol=1e-9)


def test_scales_and_shifts_of_channels_are_undone():
    net = double(mlp(4, 9, 8, 3))
    spoilt = copy.deepcopy(net)
    with torch.no_grad():
        for layer in (spoilt[0], spoilt[2]):
            factor = 0.2 + torch.rand(layer.bias.shape[0])
            layer.weight.mul_(factor[:, None])
            layer.bias.mul_(factor).sub_(1.0)
    batches = [make((40, 4), torch.float64)]
    assert not torch.allclose(spoilt(batches[0]), net(batches[0]), atol=1e-2)
    torch.testing.assert_close(renormalize(spoilt, batches, net)(batches[0]), net(batches[0]))


def test_pruned_network_gets_its_statistics_back():
    net = double(mlp(6, 30, 30, 3))
    pruned = copy.deepcopy(net)
    with torch.no_grad():
        for layer in (pruned[0], pruned[2]):
            layer.weight.mul_(layer.weight.abs() > layer.weight.abs().median(1, keepdim=True).values)
    x = make((100, 6), torch.float64)
    fixed = outputs(renormalize(pruned, [x], net), x)
    for layer in ("0", "2"):
        for got, wanted in zip(statistics(fixed[layer]), statistics(outputs(net, x)[layer]), strict=True):
            torch.testing.assert_close(got, wanted)
    zeros = pruned[0].weight == 0
    assert (renormalize(pruned, [x], net)[0].weight[zeros] == 0).all()


def test_batch_normalization_is_reset():
    parents = [double(convnet(seed=s)) for s in (0, 1)]
    merged = averaged(*parents)
    batches = [make((n, 2, 8, 8), torch.float64, seed=n) for n in BATCHES]
    fixed = renormalize(merged, batches, parents)
    found = outputs(fixed, torch.cat(batches))
    for conv, norm in (("0", "1"), ("4", "5")):
        mean, std = statistics(found[conv])
        torch.testing.assert_close(fixed.get_submodule(norm).running_mean, mean)
        torch.testing.assert_close(fixed.get_submodule(norm).running_var, std.square())
        torch.testing.assert_close(statistics(found[norm])[0], merged.get_submodule(norm).bias.detach())
        for key in ("weight", "bias"):
            for layer in (conv, norm):
                own = getattr(fixed.get_submodule(layer), key)
                assert torch.equal(own, getattr(merged.get_submodule(layer), key))
    # The linear layer behind them is corrected as usual.
    goals = [statistics(outputs(parent, torch.cat(batches))["9"]) for parent in parents]
    torch.testing.assert_close(statistics(found["9"])[1], (goals[0][1] + goals[1][1]) / 2)


@pytest.mark.parametrize("shape", [(7, 5, 4), (7, 4)])
def test_linear_layers_on_sequences(shape):
    parents = [double(mlp(4, 6, 3, seed=s)) for s in (0, 1)]
    x = make(shape, torch.float64)
    fixed = renormalize(averaged(*parents), [x], parents)
    rows = [net[0](x).detach().reshape(-1, 6) for net in (fixed, *parents)]
    torch.testing.assert_close(rows[0].std(0), (rows[1].std(0) + rows[2].std(0)) / 2)


def test_channels_that_do_not_vary_are_only_shifted():
    parents = [mlp(4, 6, 3, seed=s) for s in (0, 1)]
    merged = averaged(*parents)
    with torch.no_grad():
        merged[0].weight[2] = 0
    x = make((50, 4))
    fixed = renormalize(merged, [x], parents)
    goal = sum(parent[0](x).detach().mean(0) for parent in parents) / 2
    torch.testing.assert_close(fixed[0](x).detach().mean(0), goal)
    assert (fixed[0].weight[2] == 0).all()
    assert all(value.isfinite().all() for value in fixed.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    parents = [mlp(4, 9, 8, 3, seed=s, dtype=dtype) for s in (0, 1)]
    x = make((200, 4), dtype)
    fixed = renormalize(averaged(*parents), [x], parents)
    assert {value.dtype for value in fixed.state_dict().values()} == {dtype}
    goals = [statistics(outputs(parent, x)["2"]) for parent in parents]
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(statistics(outputs(fixed, x)["2"])[1], (goals[0][1] + goals[1][1]) / 2, **close)


def test_kinds_of_data():
    merged, batches, parents, _ = case("deep")
    wanted = renormalize(merged, batches, parents).state_dict()
    labelled = [(x, torch.zeros(len(x))) for x in batches]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(batches)), batch_size=8)
    for data in (labelled, iter(batches), (x for x in labelled), loader):
        for key, value in renormalize(merged, data, parents).state_dict().items():
            torch.testing.assert_close(value, wanted[key])


def test_nothing_given_is_changed():
    merged, batches, parents, _ = case("images")
    nets = (merged, *parents)
    for net in nets:
        net.train()
        net[1].eval()
    before = [{key: value.clone() for key, value in net.state_dict().items()} for net in nets]
    fixed = renormalize(merged, batches, parents)
    for net, state in zip(nets, before, strict=True):
        assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    for net in (*nets, fixed):
        assert [m.training for m in net.modules()] == [m.training for m in merged.modules()]
        assert not any(m._forward_hooks for m in net.modules())
    assert fixed.training
    assert not fixed[1].training
    assert all(p.requires_grad for p in fixed.parameters())


def test_chosen_layers():
    merged, batches, parents, _ = case("deep")
    fixed = renormalize(merged, batches, parents, layers=["6", "2"])
    changed = {key for key, value in fixed.state_dict().items() if not torch.equal(value, merged.state_dict()[key])}
    assert changed == {"2.weight", "2.bias", "6.weight", "6.bias"}


def test_without_bias_scales_only():
    parents = [double(mlp(4, 9, 3, seed=s, bias=False)) for s in (0, 1)]
    batches, merged = [make((50, 4), torch.float64)], averaged(*parents)
    with pytest.raises(ArgumentError, match="argument 'reshift': expected False, as the layer '0' has no bias"):
        renormalize(merged, batches, parents)
    fixed = renormalize(merged, batches, parents, reshift=False)
    stds = [statistics(net[0](batches[0]).detach())[1] for net in (fixed, *parents)]
    torch.testing.assert_close(stds[0], (stds[1] + stds[2]) / 2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.inner(self.inner(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.last(self.two(self.one(x)))


NET, X = mlp(4, 6, 3), make((8, 4))
PARAMETRIZED = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
NORMED = filled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "argument", "error"),
    [
        ({"model": 3}, "model", ArgumentTypeError),
        ({"model": Twice(), "models": Twice()}, "model", ArgumentError),
        ({"model": Tied(), "models": Tied()}, "model", ArgumentError),
        ({"model": PARAMETRIZED, "models": PARAMETRIZED}, "model", ArgumentError),
        ({"data": 3}, "data", ArgumentTypeError),
        ({"data": X}, "data", ArgumentTypeError),
        ({"data": []}, "data", ArgumentError),
        ({"data": iter(())}, "data", ArgumentError),
        ({"data": [3]}, "data", ArgumentTypeError),
        ({"data": [X / 0]}, "models.*", ArgumentError),
        ({"models": 3}, "models", ArgumentTypeError),
        ({"models": []}, "models", ArgumentError),
        ({"models": [NET] * 3}, "models", ArgumentError),
        ({"models": [NET, 3]}, "models", ArgumentTypeError),
        ({"models": nn.Sequential(nn.Sequential(nn.Linear(4, 3)))}, "models", ArgumentError),
        ({"models": mlp(4, 7, 3)}, "models", ArgumentError),
        ({"alpha": 2}, "alpha", ArgumentError),
        ({"rescale": 1}, "rescale", ArgumentTypeError),
        ({"reshift": None}, "reshift", ArgumentTypeError),
        ({"rescale": False, "reshift": False}, "rescale", ArgumentError),
        ({"layers": "0"}, "layers", ArgumentTypeError),
        ({"layers": ["1"]}, "layers", ArgumentError),
        ({"model": NORMED, "models": NORMED, "layers": ["0"]}, "layers", ArgumentError),
    ],
)
def test_errors(change, argument, error):
    given = {"model": NET, "data": [X], "models": [NET, NET]} | change
    with pytest.raises(error, match=rf"^renormalize: argument '{argument}': expected .*, got "):
        renormalize(**given)
