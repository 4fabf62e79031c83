"""TIES against plain loops, peft, and examples by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.task_arithmetic import task_arithmetic
from shiftkern.merge.ties import ties

from helpers.merging import assert_near, assert_same, kth_largest, make_states, nearest, task_vectors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def by_loops(taus, density, weights, scale, scope, elect, divide, majority=False):
    """Task vector of the merged model, one entry at a time."""
    count = len(next(iter(taus.values())))
    sizes = {name: t[0].size for name, t in taus.items()}
    trimmed = {name: np.zeros_like(t) for name, t in taus.items()}
    for k in range(count):
        whole = np.concatenate([np.abs(t[k]).ravel() for t in taus.values()])
        for name, t in taus.items():
            of = whole if scope == "global" else np.abs(t[k])
            least = kth_largest(of, nearest(density[k], of.size)) if sizes[name] else 0.0
            for i in np.ndindex(t.shape[1:]):
                if abs(t[(k, *i)]) >= least:
                    trimmed[name][(k, *i)] = t[(k, *i)]
    votes = {
        name: sum(t[k] * (weights[k] if elect == "weighted" else 1.0) for k in range(count))
        for name, t in trimmed.items()
    }
    tie = 1.0
    if majority:
        tie = np.sign(sum(np.sign(v).sum() for v in votes.values()))
    merged = {}
    for name, t in trimmed.items():
        merged[name] = np.zeros(t.shape[1:])
        for i in np.ndindex(t.shape[1:]):
            sign = np.sign(votes[name][i]) or tie
            agree = []
            for k in range(count):
                vote = t[(k, *i)] * (weights[k] if elect == "weighted" else 1.0)
                if vote and np.sign(vote) == sign:
                    agree.append(k)
            total = sum(weights[k] * t[(k, *i)] for k in agree)
            divisor = {"count": len(agree), "weight": sum(weights[k] for k in agree), "none": 1}[divide]
            merged[name][i] = scale * total / (divisor if abs(divisor) >= 1e-8 else 1.0)
    return merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scope", "elect", "divide"),
    list(itertools.product(["tensor", "global"], ["unweighted", "weighted"], ["count", "weight", "none"])),
)
def test_equals_the_loops(dtype, scope, elect, divide):
    base, models = make_states(3, dtype)
    weights = [0.5, 1.5, 0.75]
    merged = ties(
        base, models, density=0.4, weights=weights, scale=0.7, trim_scope=scope, elect=elect, divide_by=divide
    )
    expected = by_loops(task_vectors(base, models), [0.4] * 3, weights, 0.7, scope, elect, divide)
    assert_near(merged, base, expected)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_densities_of_each_model(scope):
    base, models = make_states(4, torch.float64)
    densities = [0.0, 0.1, 0.5, 1.0]
    expected = by_loops(task_vectors(base, models), densities, [1.0] * 4, 1.0, scope, "unweighted", "count")
    assert_near(ties(base, models, density=densities, trim_scope=scope), base, expected)


@pytest.mark.parametrize("convention", ["paper", "peft", "mergekit"])
@pytest.mark.parametrize("seed", range(3))
def test_conventions_are_their_options(convention, seed):
    # In few bits sums of zero are common.
    base, models = make_states(2, torch.bfloat16, seed, spread=0.02)
    options = {
        "paper": ("global", "unweighted", "count", True),
        "peft": ("tensor", "unweighted", "count"),
        "mergekit": ("tensor", "weighted", "weight"),
    }[convention]
    expected = by_loops(task_vectors(base, models), [0.5] * 2, [1.0] * 2, 1.0, *options)
    merged = ties(base, models, density=0.5, convention=convention)
    assert_near(merged, base, expected)
    if options[3:]:
        return
    assert_same(
        merged,
        ties(base, models, density=0.5, trim_scope=options[0], elect=options[1], divide_by=options[2]),
    )


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.75])
def test_equals_that_of_peft(density):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    # Sizes whose shares are whole, as peft rounds down.
    base, models = make_states(3, torch.float64, shapes={"a": (10, 20), "b": (40,), "c": (4, 5, 2)})
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    merged = ties(base, models, density=density, weights=weights, convention="peft")
    for name, tensor in base.items():
        deltas = [model[name] - tensor for model in models]
        torch.testing.assert_close(merged[name], tensor + merge_utils.ties(deltas, weights, density))


def _single(values):
    return {"w": torch.tensor(values)}


def test_sums_of_zero_take_the_sign_of_the_convention():
    base = _single([0.0] * 4)
    models = [_single([1.0, -3.0, -3.0, 2.0]), _single([-1.0, -3.0, -3.0, 2.0])]
    for convention in (None, "peft", "mergekit"):
        assert ties(base, models, density=1.0, convention=convention)["w"].tolist() == [1.0, -3.0, -3.0, 2.0]
    assert ties(base, models, density=1.0, convention="paper")["w"].tolist() == [-1.0, -3.0, -3.0, 2.0]


def test_the_majority_is_that_of_the_whole_model():
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    first, second = ({"a": torch.tensor([s, 1.0]), "b": -torch.ones(3)} for s in (1.0, -1.0))
    assert ties(base, [first, second], density=1.0, convention="paper")["a"].tolist() == [-1.0, 1.0]
    # As many entries of either sign: nothing is elected.
    first["b"][:] = second["b"][:] = torch.tensor([-1.0, 0.0, 0.0])
    assert ties(base, [first, second], density=1.0, convention="paper")["a"].tolist() == [0.0, 1.0]


def test_the_majority_counts_what_is_left_after_trimming():
    base = _single([0.0] * 6)
    models = [_single([2.0, 1.5, 0.1, 0.1, 0.1, -3.0]), _single([-2.0, -1.2, -0.05, -0.05, -0.05, -3.0])]
    # All sums but one are positive; of those that are kept, one is positive and one negative.
    assert ties(base, models, density=0.5, convention="paper")["w"].tolist()[0] == 0.0
    assert ties(base, models, density=1.0, convention="paper")["w"].tolist()[0] == 2.0


def test_entries_as_large_as_the_threshold_are_kept():
    merged = ties(_single([0.0] * 5), [_single([1.0, -1.0, 1.0, 0.5, 2.0])], density=0.4)
    assert merged["w"].tolist() == [1.0, -1.0, 1.0, 0.0, 2.0]


@pytest.mark.parametrize(("density", "kept"), [(0.0, 0), (1e-6, 1), (0.24, 1), (0.375, 2), (0.5, 2), (0.64, 3)])
def test_shares_are_rounded_to_the_nearest(density, kept):
    merged = ties(_single([0.0] * 4), [_single([4.0, 3.0, 2.0, 1.0])], density=density)
    assert int((merged["w"] != 0).sum()) == kept


def test_the_base_comes_back():
    base, models = make_states(2, torch.bfloat16)
    for convention in (None, "paper", "peft", "mergekit"):
        assert_same(ties(base, [base, base], convention=convention), base)
        assert_same(ties(base, models, density=0.0, convention=convention), base)
        assert_same(ties(base, models, scale=0.0, convention=convention), base)


def test_a_model_with_itself_is_that_model():
    base, (model,) = make_states(1, torch.float64)
    for count in (1, 2, 4):
        for name, value in ties(base, [model] * count, density=1.0).items():
            torch.testing.assert_close(value, model[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_order_of_models_does_not_matter(scope):
    base, models = make_states(3, torch.float64)
    one = ties(base, models, weights=[1.0, 2.0, 3.0], trim_scope=scope)
    other = ties(base, [models[i] for i in (2, 0, 1)], weights=[3.0, 1.0, 2.0], trim_scope=scope)
    for name in base:
        torch.testing.assert_close(one[name], other[name])


def test_scaled_task_vectors_are_merged_to_scaled_ones():
    base = {name: torch.zeros_like(t) for name, t in make_states(0)[0].items()}
    _, models = make_states(3)
    halves = [{name: t / 2 for name, t in model.items()} for model in models]
    assert_same(ties(base, halves), {name: t / 2 for name, t in ties(base, models).items()})


def test_without_trimming_and_conflicts_it_is_the_mean():
    base = {name: torch.zeros_like(t) for name, t in make_states(0, torch.float64)[0].items()}
    models = [{name: t.abs() for name, t in model.items()} for model in make_states(3, torch.float64)[1]]
    for name, value in ties(base, models, density=1.0).items():
        torch.testing.assert_close(value, task_arithmetic(base, models, 1 / 3)[name])


def test_global_thresholds_over_mixed_types():
    base, models = make_states(2, torch.float64)
    kinds = itertools.cycle([torch.float32, torch.bfloat16, torch.float64])
    types = dict(zip(base, kinds, strict=False))
    base, *models = ({name: t.to(types[name]) for name, t in state.items()} for state in (base, *models))
    expected = by_loops(task_vectors(base, models), [0.3] * 2, [1.0] * 2, 1.0, "global", "unweighted", "count")
    merged = ties(base, models, density=0.3, trim_scope="global")
    assert_near(merged, base, expected)
    assert {name: t.dtype for name, t in merged.items()} == types


def test_errors():
    base, models = make_states(2)
    for name, value in (
        ("density", -0.1),
        ("density", 1.1),
        ("density", [0.5]),
        ("weights", [1.0]),
        ("scale", float("inf")),
        ("trim_scope", "layer"),
        ("elect", "none"),
        ("divide_by", "mean"),
        ("convention", "ours"),
    ):
        with pytest.raises(ArgumentError, match=rf"ties: argument '{name}'"):
            ties(base, models, **{name: value})
    for name, value, convention in (
        ("trim_scope", "tensor", "paper"),
        ("elect", "weighted", "peft"),
        ("divide_by", "count", "mergekit"),
    ):
        with pytest.raises(ArgumentError, match=rf"ties: argument '{name}': .*convention '{convention}'"):
            ties(base, models, convention=convention, **{name: value})
    ties(base, models, convention="paper", trim_scope="global")
    with pytest.raises(ArgumentTypeError, match=r"ties: argument 'density'"):
        ties(base, models, density="much")
