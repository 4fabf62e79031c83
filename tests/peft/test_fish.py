import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import FISHConfig, adapted_layers, fish_mask, inject, load, merge, save, trainable_parameters
from shiftkern.peft._adapter import Config

from helpers.peft import cnn, fixed, mlp, pictures, rows, train


def classifier(dtype=torch.float64):
    return fixed(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), dtype)


def labelled(count=10):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return [(x[:4], torch.arange(4) % 3), (x[4:], torch.arange(count - 4) % 3)]


def log_likelihood(model, batch):
    return -F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def fisher_by_hand():
    """Scores of a two-layer classifier by the chain rule, one example at a time."""
    model = classifier()
    w1, b1, w2 = model[0].weight.detach(), model[0].bias.detach(), model[2].weight.detach()
    first, second = torch.zeros(6 * 4 + 6, dtype=torch.float64), torch.zeros(3 * 6, dtype=torch.float64)
    count = 0
    for xs, ys in labelled():
        for x, y in zip(xs, ys, strict=True):
            h = torch.tanh(w1 @ x + b1)
            to_logits = F.one_hot(y, 3) - torch.softmax(w2 @ h, 0)
            to_middle = (w2.T @ to_logits) * (1 - h**2)
            first += torch.cat([torch.outer(to_middle, x).reshape(-1), to_middle]) ** 2
            second += torch.outer(to_logits, h).reshape(-1) ** 2
            count += 1
    return first / count, second / count


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_mask_has_the_largest_scores_of_all_layers_together(vectorize):
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = fish_mask(model, FISHConfig(sparsity=0.3), labelled(), log_likelihood, vectorize=vectorize, quiet=True)
    first, second = fisher_by_hand()
    k = round(0.3 * (len(first) + len(second)))
    best = torch.cat([first, second]).argsort(descending=True)[:k]
    want = {"0": sorted(best[best < 30].tolist()), "2": sorted((best[best >= 30] - 30).tolist())}
    assert 0 < len(want["0"]) < k
    assert config.mask == {name: len(places) for name, places in want.items()}
    assert config.target_modules == ("0", "2")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    layers = adapted_layers(inject(model, config))
    assert {name: layer.adapter("default").index.tolist() for name, layer in layers.items()} == want


def test_gradients_are_of_single_examples():
    # The gradient of the batch vanishes in both layers, so that the first would be chosen each time.
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    data = [torch.tensor([[1.0], [-1.0]])]
    scores = []
    for signs in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
        two = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
        function = lambda m, x, s=signs: (s[0] * m[0](x) + s[1] * 1e-3 * m[1](x)).sum()  # noqa: E731
        scores.append(fish_mask(two, FISHConfig(sparsity=0.5), data, function, quiet=True).mask)
    assert scores == [{"0": 1}, {"1": 1}]
    assert fish_mask(model, FISHConfig(sparsity=1.0), data, lambda m, x: m(x), quiet=True).mask == {"0": 1}


def test_what_vmap_cannot_do_is_done_one_by_one():
    def branching(model, batch):
        y = log_likelihood(model, batch)
        return 2 * y if y.item() < -100 else y

    plain = fish_mask(classifier(), FISHConfig(sparsity=0.3), labelled(), log_likelihood, quiet=True)
    other = fish_mask(classifier(), FISHConfig(sparsity=0.3), labelled(), branching, quiet=True)
    assert other == plain
    assert all(torch.equal(other.mask.places[name], plain.mask.places[name]) for name in plain.mask)


def test_entries_with_equal_scores_are_taken_in_order():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    config = fish_mask(model, FISHConfig(sparsity=0.5), [torch.ones(1, 2)], lambda m, x: m(x).sum(), quiet=True)
    assert config.mask.places["0"].tolist() == [0, 1]


def test_scores_of_a_model_with_convolutions_and_normalizations():
    model = cnn(torch.float64)
    names = ["0", "1", "3", "4", "6", "7"]
    function = lambda m, x: m(x).square().sum()  # noqa: E731
    config = FISHConfig(sparsity=0.1, target_modules=names)
    one, many = (
        fish_mask(model, config, [pictures(torch.float64)], function, vectorize=v, quiet=True) for v in (False, True)
    )
    assert one.mask == many.mask
    assert sum(one.mask.values()) == round(0.1 * sum(p.numel() for p in model.parameters()))


def test_the_equation():
    """Few entries go through a sparse product, many through a dense one; both are W + D."""
    for count in (5, 40):
        places = torch.randperm(144, generator=torch.Generator().manual_seed(1))[:count]
        places[0] = 143
        mask = {"0": places.unique(), "2": [7]}
        model = train(inject(mlp(torch.float64), FISHConfig(mask=mask)), 0.5)
        base = mlp(torch.float64)
        x = rows(torch.float64)
        weight, bias = base[0].weight.detach().clone(), base[0].bias.detach().clone()
        adapter = model[0].adapters["default"]
        for place, value in zip(adapter.index.tolist(), adapter.values.tolist(), strict=True):
            if place < 128:
                weight[place // 8, place % 8] += value
            else:
                bias[place - 128] += value
        torch.testing.assert_close(model[0](x), F.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
        merge(model)
        torch.testing.assert_close(model[0].base_layer.weight.detach(), weight, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(model[0].base_layer.bias.detach(), bias, rtol=1e-15, atol=1e-15)


def test_only_the_mask_is_trained_and_the_rest_stays_to_the_bit():
    model = inject(
        classifier(), fish_mask(classifier(), FISHConfig(sparsity=0.2), labelled(), log_likelihood, quiet=True)
    )
    assert trainable_parameters(model)[0] == round(0.2 * 48)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = -sum(log_likelihood(model, batch) for batch in labelled())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merge(model)
    changed = 0
    for name in ("0", "2"):
        layer, base = adapted_layers(model)[name], classifier()[int(name)]
        for got, want in zip(layer.base_layer.parameters(), base.parameters(), strict=True):
            changed += int((got != want).sum())
    assert changed == round(0.2 * 48)


def test_a_file_holds_the_positions(tmp_path):
    config = FISHConfig(mask={"0": [3, 77]}, target_modules=["0"])
    model = train(inject(mlp(), config))
    save(model, tmp_path)
    again = load(mlp(), tmp_path)
    assert again[0].adapters["default"].index.tolist() == [3, 77]
    assert torch.equal(again(rows()), model(rows()))


@pytest.mark.parametrize("count", [2, 100])
def test_numbers_of_positions_alone_compute_nothing(count):
    described = json.loads(json.dumps(FISHConfig(mask={"0": range(count)}, target_modules=["0"]).to_dict()))
    assert described["mask"] == {"0": count}
    model = inject(mlp(), Config.from_dict(described))
    with pytest.raises((IndexError, RuntimeError)):
        model(rows())
    with pytest.raises((IndexError, RuntimeError)):
        merge(model)


def test_a_config_without_a_mask_is_refused():
    with pytest.raises(ArgumentError, match="see fish_mask"):
        inject(mlp(), FISHConfig())


def test_positions_survive_replacing_other_fields():
    config = dataclasses.replace(FISHConfig(mask={"0": [9, 3]}), modules_to_save=["2"], target_modules=["0"])
    assert inject(mlp(), config)[0].adapters["default"].index.tolist() == [3, 9]


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"sparsity": 0.0}, ArgumentError, "sparsity"),
        ({"sparsity": 1.5}, ArgumentError, "sparsity"),
        ({"sparsity": "all"}, ArgumentTypeError, "sparsity"),
        ({"mask": [1, 2]}, ArgumentTypeError, "mask"),
        ({"mask": {"0": [1, 1]}}, ArgumentError, "mask"),
        ({"mask": {"0": [-1]}}, ArgumentError, "mask"),
        ({"mask": {"0": [0.5]}}, ArgumentTypeError, "mask"),
        ({"mask": {"0": "12"}}, ArgumentTypeError, "mask"),
        ({"mask": {"0": torch.zeros(2)}}, ArgumentTypeError, "mask"),
        ({"mask": {"0": torch.zeros(2, 2, dtype=torch.int64)}}, ArgumentError, "mask"),
    ],
)
def test_errors_of_the_config(options, error, name):
    with pytest.raises(error, match=rf"FISHConfig: argument '{name}': expected .*, got "):
        FISHConfig(**options)


def test_positions_that_a_layer_does_not_have():
    with pytest.raises(ArgumentError, match="positions below 144"):
        inject(mlp(), FISHConfig(mask={"0": [144]}))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"model": None}, ArgumentTypeError, "model"),
        ({"config": None}, ArgumentTypeError, "config"),
        ({"config": FISHConfig(target_modules=["1"])}, ArgumentError, "target_modules"),
        ({"config": FISHConfig(target_modules=["none"])}, ArgumentError, "target_modules"),
        ({"data": []}, ArgumentError, "data"),
        ({"data": 3}, ArgumentTypeError, "data"),
        ({"data": torch.zeros(2, 4)}, ArgumentTypeError, "data"),
        ({"data": [(torch.zeros(2, 4), torch.zeros(3))]}, ArgumentError, "data"),
        ({"log_likelihood": None}, ArgumentTypeError, "log_likelihood"),
        ({"log_likelihood": lambda m, b: m(b[0])}, ArgumentError, "log_likelihood"),
        ({"log_likelihood": lambda m, b: m(b[0]).sum() * float("inf")}, ArgumentError, "log_likelihood"),
        ({"vectorize": 1}, ArgumentTypeError, "vectorize"),
        ({"quiet": 1}, ArgumentTypeError, "quiet"),
    ],
)
def test_errors_of_the_mask(change, error, name):
    given = {"model": classifier(), "config": FISHConfig(), "data": labelled(), "log_likelihood": log_likelihood}
    given |= {"quiet": True} | change
    model, config, data, function = (given.pop(key) for key in ("model", "config", "data", "log_likelihood"))
    with pytest.raises(error, match=rf"fish_mask: argument '{name}': expected .*, got "):
        fish_mask(model, config, data, function, **given)
