"""C-Poly against loops over skills and examples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import LoRAConfig, PolyConfig, adapted_layers, inject, load, merge, save, set_task, unmerge

from helpers.peft import mlp, rows, train


def by_skills(layer, x, task, scale):
    """The sum over the skills of a task, one by one."""
    adapter = layer.adapter("default")
    gates = torch.sigmoid(adapter.logits[task])
    out = layer.base_layer(x)
    for i in range(adapter.common):
        out = out + scale * gates[i] / gates.sum() * x @ adapter.A[i].T @ adapter.B[i].T
    for s in range(len(adapter.own)):
        for j in range(adapter.specific):
            k = adapter.common + s * adapter.specific + j
            if s == task:
                out = out + scale * adapter.own[s, j] * x @ adapter.A[k].T @ adapter.B[k].T
            elif adapter.others is not None:
                out = out + scale * adapter.others[task, k - adapter.common] * x @ adapter.A[k].T @ adapter.B[k].T
    return out


CONFIGS = [
    {"common": 3, "specific": 1},
    {"common": 2, "specific": 2, "cross": True},
    {"common": 0, "specific": 2},
    {"common": 2, "specific": 0},
    {"common": 1, "specific": 1, "cross": True},
]


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("task", [0, 1, 2])
def test_one_task_is_the_sum_over_its_skills(options, task):
    model = train(inject(mlp(torch.float64), PolyConfig(n_tasks=3, r=2, alpha=5.0, **options)))
    set_task(model, task)
    for layer in adapted_layers(model).values():
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), by_skills(layer, x, task, 2.5), rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", CONFIGS)
def test_a_task_for_each_example(options):
    model = train(inject(mlp(torch.float64), PolyConfig(n_tasks=3, r=2, **options)))
    x = rows(torch.float64)
    set_task(model, torch.tensor([2, 0, 2]))
    mixed = model(x)
    for i, task in enumerate((2, 0, 2)):
        set_task(model, task)
        torch.testing.assert_close(mixed[i], model(x)[i], rtol=0, atol=1e-13)


def test_a_task_has_no_gradient_for_what_others_own():
    model = train(inject(mlp(torch.float64), PolyConfig(n_tasks=3, common=2, r=1, task=1)))
    model(rows(torch.float64)).sum().backward()
    adapter = adapted_layers(model)["0"].adapter("default")
    moved = [bool(adapter.B.grad[k].abs().max() > 0) for k in range(5)]
    assert moved == [True, True, False, True, False]
    assert [bool(g.abs().max() > 0) for g in adapter.logits.grad] == [False, True, False]
    assert [bool(g.abs().max() > 0) for g in adapter.own.grad] == [False, True, False]


def test_training_samples_gates_and_evaluation_does_not():
    model = train(inject(mlp(torch.float64), PolyConfig(n_tasks=2, r=2, task=0)))
    x = rows(torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    set_task(model, torch.tensor([0, 1, 0]))
    assert not torch.equal(model(x), model(x))
    adapter = adapted_layers(model)["0"].adapter("default")
    with torch.no_grad():
        adapter.logits.copy_(torch.tensor([[4.0, 0.0, -4.0], [0.0, 0.0, 0.0]]))
        shares = torch.stack([adapter.shares(noise=True) for _ in range(2000)])
    torch.testing.assert_close(shares.sum(-1), torch.ones(2000, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    # The median of a Gumbel-sigmoid is the sigmoid; before the division, which shares of equal logits do not show.
    mean = shares.mean(0)
    assert mean[0, 0] > mean[0, 1] > mean[0, 2]
    # Three equal ones: standard error about 0.25 / sqrt(2000) = 0.006.
    assert (mean[1] - 1 / 3).abs().max() < 0.03


def test_one_common_skill_alone_is_lora():
    poly = train(inject(mlp(torch.float64), PolyConfig(n_tasks=1, common=1, specific=0, r=2, alpha=3.0)))
    lora = inject(mlp(torch.float64), LoRAConfig(r=2, alpha=3.0))
    for one, other in zip(adapted_layers(poly).values(), adapted_layers(lora).values(), strict=True):
        with torch.no_grad():
            other.adapter("default").A.copy_(one.adapter("default").A[0])
            other.adapter("default").B.copy_(one.adapter("default").B[0])
    x = rows(torch.float64)
    torch.testing.assert_close(poly(x), lora(x), rtol=0, atol=1e-13)


def test_merging_folds_one_task_in(tmp_path):
    model = train(inject(mlp(torch.float64), PolyConfig(n_tasks=3, r=2)))
    x = rows(torch.float64)
    set_task(model, 2)
    want = model(x)
    merge(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-13)
    with pytest.raises(ArgumentError, match="unmerge"):
        set_task(model, 0)
    unmerge(model)
    set_task(model, torch.tensor([0, 1, 2]))
    with pytest.raises(ArgumentError, match="'task': expected one task for all examples"):
        merge(model)
    assert torch.equal(model(x), model(x))


def test_the_task_of_the_config_acts_after_loading(tmp_path):
    model = train(inject(mlp(), PolyConfig(n_tasks=2, r=1, task=1)))
    save(model, tmp_path)
    assert torch.equal(load(mlp(), tmp_path)(rows()), model(rows()))


def test_without_a_task_it_is_not_evaluated():
    model = inject(mlp(), PolyConfig(n_tasks=2))
    with pytest.raises(ArgumentError, match="'task': expected a task chosen with set_task, got None"):
        model(rows())
    with pytest.raises(ArgumentError, match="'task'"):
        merge(model)
    set_task(model, 0)
    assert torch.equal(model(rows()), mlp()(rows()))
    assert torch.equal(inject(mlp(), PolyConfig(n_tasks=1))(rows()), mlp()(rows()))


def test_copies_have_tasks_of_their_own():
    model = train(inject(mlp(), PolyConfig(n_tasks=2, r=1, task=0)))
    twin = copy.deepcopy(model)
    set_task(twin, 1)
    assert not torch.equal(twin(rows()), model(rows()))


def test_two_adapters_have_tasks_of_their_own():
    model = inject(mlp(), PolyConfig(n_tasks=2, r=1, task=0))
    inject(model, PolyConfig(n_tasks=4, r=1), "other")
    train(model)
    set_task(model, 3, "other")
    first = model(rows())
    set_task(model, 1)
    assert not torch.equal(model(rows()), first)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_tasks", 0),
        ("common", -1),
        ("specific", -1),
        ("r", 0),
        ("alpha", 0.0),
        ("task", 3),
        ("task", -1),
        ("seed", -1),
    ],
)
def test_refuses_values(name, value):
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        PolyConfig(**{"n_tasks": 3, name: value})


@pytest.mark.parametrize("name", ["n_tasks", "common", "specific", "r", "alpha", "cross", "task", "seed"])
def test_refuses_types(name):
    with pytest.raises(ArgumentTypeError, match=f"'{name}'"):
        PolyConfig(**{"n_tasks": 3, name: "1"})


def test_refuses_no_skills():
    with pytest.raises(ArgumentError, match="'specific': expected at least 1 where common is 0"):
        PolyConfig(n_tasks=2, common=0, specific=0)


def test_setting_the_task_refuses():
    model = inject(mlp(), PolyConfig(n_tasks=2))
    for task in (2, -1, torch.tensor([0, 2]), torch.tensor([[0, 1]]), torch.tensor(1)):
        with pytest.raises(ArgumentError, match="'task'"):
            set_task(model, task)
    for task in (1.0, "0", torch.tensor([0.0]), None):
        with pytest.raises(ArgumentTypeError, match="'task'"):
            set_task(model, task)
    with pytest.raises(ArgumentError, match="'adapter_name'"):
        set_task(model, 0, "other")
    with pytest.raises(ArgumentError, match="'adapter_name'"):
        set_task(inject(mlp(), LoRAConfig()), 0)
    with pytest.raises(ArgumentTypeError, match="'model'"):
        set_task(None, 0)
    set_task(model, torch.tensor([0, 1]))
    with pytest.raises(ArgumentError, match="'x': expected an input whose first axis has the 2 examples"):
        model(rows())
    with pytest.raises(ArgumentError, match="'x'"):
        model(torch.ones(8))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (1, 1, 8)])
def test_shapes(shape):
    model = train(inject(mlp(), PolyConfig(n_tasks=2, task=1)))
    assert model(torch.ones(shape)).shape == (*shape[:-1], 8)
    if len(shape) > 1:
        set_task(model, torch.zeros(shape[0], dtype=torch.int64))
        assert model(torch.ones(shape)).shape == (*shape[:-1], 8)


def test_skills_of_a_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = train(inject(layer, PolyConfig(n_tasks=2, target_modules=["linear1", "linear2"])))
    set_task(model, torch.tensor([0, 1]))
    assert model.train()(torch.randn(2, 4, 8)).shape == (2, 4, 8)
