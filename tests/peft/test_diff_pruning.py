import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import (
    DiffPruningConfig,
    LoRAConfig,
    adapted_layers,
    finalize_diff_pruning,
    inject,
    load,
    merge,
    penalty,
    save,
    unmerge,
)

from helpers.peft import mlp, rows, train, words


def gate(alpha, u, low=-1.5, high=1.5):
    """One hard-concrete gate, in plain floats."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + alpha)))
    return min(max((high - low) * s + low, 0.0), 1.0)


def spread(model, size=2.0):
    """Move alphas to where gates are shut, open and between, and w away from zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                centre = 1.0 if name.endswith("alpha_all") else 0.0
                p.copy_(centre + size * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def test_the_equation_in_eval_mode():
    model = spread(inject(mlp(torch.float64), DiffPruningConfig()))
    adapter = adapted_layers(model)["0"].adapter("default")
    part, base = adapter.weight, mlp(torch.float64)[0]
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    gates = []
    for part, into in ((adapter.weight, weight), (adapter.bias, bias)):
        common = gate(part.alpha_all.item(), 0.5)
        for i, (w, alpha) in enumerate(zip(part.w.flatten().tolist(), part.alpha.flatten().tolist(), strict=True)):
            gates.append(gate(alpha, 0.5))
            into.view(-1)[i] += gates[-1] * common * w
    assert 0 < gates.count(0.0) < len(gates)
    assert 0 < gates.count(1.0) < len(gates)
    x = rows(torch.float64)
    torch.testing.assert_close(model[0](x), F.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
    merge(model)
    torch.testing.assert_close(model[0].base_layer.weight.detach(), weight, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("seed", [None, 3])
def test_gates_in_training_have_the_published_distribution(seed):
    config = DiffPruningConfig(structured=False, start=0.4, seed=seed)
    model = inject(nn.Sequential(nn.Linear(100, 200, bias=False)), config).train()
    adapter = adapted_layers(model)["0"].adapter("default")
    with torch.no_grad():
        adapter.weight.w.fill_(1.0)
    torch.manual_seed(0)
    z = adapter.weight.value(adapter._drawn()).detach()
    n = z.numel()
    # P(z = 0) = sigmoid(log(-low / high) - alpha) and P(z = 1) = 1 - sigmoid(log((1 - low) / (high - 1)) - alpha).
    shut = 1 / (1 + math.exp(0.4))
    full = 1 - 1 / (1 + math.exp(-(math.log(2.5 / 0.5) - 0.4)))
    for share, want in ((float((z == 0).double().mean()), shut), (float((z == 1).double().mean()), full)):
        assert abs(share - want) < 5 * math.sqrt(want * (1 - want) / n)
    assert abs(float(adapter.weight.open_gates().detach()) / n - (1 - shut)) < 1e-5
    # The mean, by the midpoint rule over u.
    mean = sum(gate(0.4, (i + 0.5) / 20000) for i in range(20000)) / 20000
    assert abs(float(z.mean()) - mean) < 5 * float(z.std()) / math.sqrt(n)


def test_structured_gates_are_products():
    adapter = adapted_layers(spread(inject(mlp(torch.float64), DiffPruningConfig(seed=1))))["2"].adapter("default")
    generator = torch.Generator().manual_seed(9)
    first = torch.rand(8, 16, generator=generator, dtype=torch.float64).clamp(1e-4, 0.9999)
    second = torch.rand((), generator=generator, dtype=torch.float64).clamp(1e-4, 0.9999)
    want = adapter.weight.w.detach().clone()
    for i in range(8):
        for j in range(16):
            want[i, j] *= gate(adapter.weight.alpha[i, j].item(), first[i, j].item())
    want *= gate(adapter.weight.alpha_all.item(), second.item())
    got = adapter.weight.value(torch.Generator().manual_seed(9))
    torch.testing.assert_close(got.detach(), want, rtol=1e-10, atol=1e-12)


def test_gradients_reach_w_and_the_gates():
    model = spread(inject(mlp(torch.float64), DiffPruningConfig(seed=0)), 1.0)
    part = adapted_layers(model)["0"].adapter("default").weight
    function = lambda w, alpha, every: torch.func.functional_call(  # noqa: E731
        part, {"w": w, "alpha": alpha, "alpha_all": every}, (), strict=False
    )
    part.forward = lambda: part.value(torch.Generator().manual_seed(2))
    given = [p.detach().clone().requires_grad_() for p in (part.w, part.alpha, part.alpha_all)]
    assert torch.autograd.gradcheck(function, tuple(given), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("structured", [True, False])
def test_the_penalty_counts_open_gates(structured):
    config = DiffPruningConfig(structured=structured, penalty=0.25, low=-0.1, high=1.1)
    model = spread(inject(mlp(torch.float64), config))
    total = 0.0
    for layer in adapted_layers(model).values():
        for part in layer.adapter("default").differences():
            alphas = part.alpha.flatten().tolist() + ([part.alpha_all.item()] if structured else [])
            total += sum(1 / (1 + math.exp(-(alpha - math.log(0.1 / 1.1)))) for alpha in alphas)
    value = penalty(model)
    assert value.item() == pytest.approx(0.25 * total, rel=1e-12)
    value.backward()
    assert all((p.grad > 0).all() for name, p in model.named_parameters() if "alpha" in name)


def test_own_seed_resumes_where_it_stopped():
    make = lambda: spread(inject(mlp(), DiffPruningConfig(seed=5)))  # noqa: E731
    first, second = make().train(), make().train()
    x = rows()
    torch.manual_seed(1)
    outputs = [first(x) for _ in range(3)]
    torch.manual_seed(2)
    assert torch.equal(second(x), outputs[0])
    assert torch.equal(second(x), outputs[1])
    third = make().train()
    third.load_state_dict(second.state_dict())
    assert torch.equal(third(x), outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(first.eval()(x), first(x))


def test_checkpointing_without_a_seed():
    grads = []
    for recompute in (False, True):
        model = spread(inject(mlp(torch.float64), DiffPruningConfig())).train()
        x = rows(torch.float64).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


def test_finalizing_keeps_the_largest_of_all_layers():
    model = spread(inject(mlp(torch.float64), DiffPruningConfig()))
    parts = [p for layer in adapted_layers(model).values() for p in layer.adapter("default").differences()]
    values = [part.value(False).detach().clone() for part in parts]
    sizes = sorted((abs(v) for value in values for v in value.flatten().tolist()), reverse=True)
    k = round(0.2 * len(sizes))
    assert sizes[k - 1] > 0
    assert finalize_diff_pruning(model, 0.2) == k
    for part, value in zip(parts, values, strict=True):
        want = torch.where(value.abs() >= sizes[k - 1], value, 0.0)
        assert torch.equal(part.w.detach(), want)
        assert torch.equal(part.value(False).detach(), want)
        assert torch.equal(part.value(True).detach(), want)


def test_after_finalizing_what_was_kept_is_trained_on_and_nothing_else(tmp_path):
    model = spread(inject(mlp(torch.float64), DiffPruningConfig()))
    k = finalize_diff_pruning(model, 0.1)
    assert penalty(model).item() == 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(rows(torch.float64)).square().sum().backward()
        optimizer.step()
    changed = {name: int((value != before[name]).sum()) for name, value in model.state_dict().items()}
    assert sum(changed.values()) == k
    assert all(name.endswith(".w") for name, count in changed.items() if count)
    save(model, tmp_path)
    again = load(mlp(torch.float64), tmp_path)
    assert torch.equal(again(rows(torch.float64)), model(rows(torch.float64)))
    base = mlp(torch.float64)
    merge(model)
    entries = zip(adapted_layers(model).values(), (base[0], base[2]), strict=True)
    different = sum(
        int((a != b).sum())
        for layer, own in entries
        for a, b in zip(layer.base_layer.parameters(), own.parameters(), strict=True)
    )
    assert different == k
    unmerge(model)


def test_zeros_are_not_kept():
    model = inject(nn.Sequential(nn.Linear(3, 2, bias=False)), DiffPruningConfig())
    with torch.no_grad():
        model[0].adapters["default"].weight.w[0, 1] = 2.0
    assert finalize_diff_pruning(copy.deepcopy(model), 1.0) == 1


def test_embeddings_draw_gates_in_training_too():
    model = spread(inject(words(torch.float64), DiffPruningConfig(target_modules=["0"], seed=0))).train()
    ids = torch.tensor([[1, 2]])
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"structured": 1}, ArgumentTypeError, "structured"),
        ({"start": float("nan")}, ArgumentError, "start"),
        ({"low": 0.0}, ArgumentError, "low"),
        ({"high": 1.0}, ArgumentError, "high"),
        ({"penalty": -1.0}, ArgumentError, "penalty"),
        ({"seed": -1}, ArgumentError, "seed"),
    ],
)
def test_errors_of_the_config(options, error, name):
    with pytest.raises(error, match=rf"DiffPruningConfig: argument '{name}': expected .*, got "):
        DiffPruningConfig(**options)


def test_errors_of_finalizing():
    message = r"finalize_diff_pruning: argument '{}': expected .*, got "
    model = inject(mlp(), DiffPruningConfig())
    with pytest.raises(ArgumentError, match=message.format("model") + "one whose differences are all zero"):
        finalize_diff_pruning(model, 0.5)
    train(model)
    for value in (0.0, 1.5):
        with pytest.raises(ArgumentError, match=message.format("sparsity")):
            finalize_diff_pruning(model, value)
    with pytest.raises(ArgumentTypeError, match=message.format("sparsity")):
        finalize_diff_pruning(model, "half")
    with pytest.raises(ArgumentError, match=message.format("adapter_name")):
        finalize_diff_pruning(model, 0.5, "other")
    with pytest.raises(ArgumentError, match=message.format("adapter_name")):
        finalize_diff_pruning(inject(mlp(), LoRAConfig()), 0.5)
    with pytest.raises(ArgumentError, match=message.format("model")):
        finalize_diff_pruning(merge(copy.deepcopy(model)), 0.5)
    with pytest.raises(ArgumentError, match=message.format("model")):
        finalize_diff_pruning(mlp(), 0.5)
    with pytest.raises(ArgumentTypeError, match=message.format("model")):
        finalize_diff_pruning(None, 0.5)
    finalize_diff_pruning(model, 0.5)
    with pytest.raises(ArgumentError, match=message.format("adapter_name")):
        finalize_diff_pruning(model, 0.5)
