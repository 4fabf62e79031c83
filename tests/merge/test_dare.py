"""DARE against masks made of the published generator, and its expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shiftkern
from shiftkern.errors import ArgumentError
from shiftkern.merge.dare import dare
from shiftkern.merge.task_arithmetic import task_arithmetic

from helpers.merging import assert_near, assert_same, draws, make_states, task_vectors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def dropped(taus, rates, seed, rescale):
    found = {}
    for name, t in taus.items():
        kept = np.stack([t[k] * (draws(seed, k, name, t.shape[1:]) >= rates[k]) for k in range(len(rates))])
        for k, rate in enumerate(rates):
            before, after = np.abs(t[k]).sum(), np.abs(kept[k]).sum()
            kept[k] = kept[k] / (1 - rate) if rescale == "inverse" else kept[k] * (before / after if after else 1.0)
        found[name] = kept
    return found


def elected(kept):
    found = {}
    for name, t in kept.items():
        agree = (np.sign(t) == np.where(t.sum(0) >= 0, 1.0, -1.0)) & (t != 0)
        found[name] = (t * agree).sum(0) / np.maximum(agree.sum(0), 1)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rates", [[0.5, 0.5], [0.3, 0.9]])
@pytest.mark.parametrize("rescale", ["inverse", "l1"])
@pytest.mark.parametrize("then", ["linear", "ties"])
def test_equals_the_definition(dtype, rates, rescale, then):
    base, models = make_states(2, dtype)
    rate = rates if rates[0] != rates[1] else rates[0]
    merged = dare(base, models, drop_rate=rate, seed=7, rescale=rescale, then=then, scale=0.5)
    kept = dropped(task_vectors(base, models), rates, 7, rescale)
    summed = elected(kept) if then == "ties" else {name: t.sum(0) for name, t in kept.items()}
    assert_near(merged, base, {name: 0.5 * t for name, t in summed.items()})


def test_weights():
    base, models = make_states(2, torch.float64)
    kept = dropped(task_vectors(base, models), [0.4, 0.4], 1, "inverse")
    merged = dare(base, models, drop_rate=0.4, seed=1, weights=[0.25, -2.0])
    assert_near(merged, base, {name: 0.25 * t[0] - 2 * t[1] for name, t in kept.items()})


@pytest.mark.parametrize("rescale", ["inverse", "l1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_dropped_at_rate_zero(dtype, rescale):
    base, models = make_states(3, dtype)
    assert_same(dare(base, models, drop_rate=0.0, seed=0, rescale=rescale), task_arithmetic(base, models))


def test_the_expectation_is_the_task_vector():
    base = {"w": torch.zeros(1, dtype=torch.float64).expand(40_000)}
    for rate in (0.1, 0.5, 0.9, 0.99):
        merged = dare(base, [{"w": torch.ones(40_000, dtype=torch.float64)}], drop_rate=rate, seed=3)["w"]
        kept = merged[merged != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
        deviation = (rate / (1 - rate) / 40_000) ** 0.5
        assert abs(merged.mean().item() - 1.0) < 5 * deviation


def test_l1_norms_are_kept():
    base, (model,) = make_states(1, torch.float64)
    merged = dare(base, [model], drop_rate=0.6, seed=3, rescale="l1")
    for name in ("embed.weight", "block.weight", "block.bias"):
        before, after = ((state[name] - base[name]).abs().sum() for state in (model, merged))
        torch.testing.assert_close(before, after)


def test_draws_depend_on_seed_model_name_and_place_alone():
    base, models = make_states(2, torch.float64)
    merged = dare(base, models, drop_rate=0.5, seed=5)
    backwards = dict(reversed(base.items()))
    found = dare(backwards, [dict(reversed(m.items())) for m in models], drop_rate=0.5, seed=5)
    assert list(found) == list(backwards)
    for name in base:
        assert torch.equal(found[name], merged[name])
        alone = dare({name: base[name]}, [{name: m[name]} for m in models], drop_rate=0.5, seed=5)
        assert torch.equal(alone[name], merged[name])
    assert not torch.equal(dare(base, models, drop_rate=0.5, seed=6)["block.weight"], merged["block.weight"])
    same = dare(base, [models[0], models[0]], drop_rate=0.5, seed=5, weights=[1.0, -1.0])["block.weight"]
    assert not torch.equal(same, base["block.weight"])


def test_same_bits_for_any_number_of_threads():
    base, models = make_states(2, shapes={"w": (300, 400)})
    found = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        found.append(
            [
                dare(base, models, drop_rate=r, seed=5, rescale=s)["w"]
                for r in (0.5, [0.2, 0.8])
                for s in ("inverse", "l1")
            ]
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_peft_s_dare_has_the_same_expectation_and_values():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    base, (model,) = make_states(1, torch.float64, shapes={"w": (100, 100)})
    delta = model["w"] - base["w"]
    theirs = merge_utils.dare_linear([delta], torch.ones(1), 0.25)
    ours = dare(base, [model], drop_rate=0.75, seed=0)["w"] - base["w"]
    both = (theirs != 0) & (ours.abs() > 1e-12)
    torch.testing.assert_close(ours[both], theirs[both])
    assert abs((ours.abs() > 1e-12).double().mean() - (theirs != 0).double().mean()) < 0.05


def test_errors():
    base, models = make_states(2)
    for rate in (-0.1, 1.0, float("nan"), [0.5]):
        with pytest.raises(ArgumentError, match=r"dare: argument 'drop_rate'"):
            dare(base, models, drop_rate=rate, seed=0)
    for name, value in (
        ("seed", -1),
        ("seed", 0.5),
        ("rescale", "l2"),
        ("then", "sum"),
        ("weights", [1.0]),
        ("scale", float("nan")),
        ("elect", "weighted"),
        ("divide_by", "count"),
    ):
        with pytest.raises(ArgumentError, match=rf"dare: argument '{name}'"):
            dare(base, models, **{"drop_rate": 0.5, "seed": 0, name: value})
    for name in ("elect", "divide_by"):
        with pytest.raises(ArgumentError, match=rf"dare: argument '{name}'"):
            dare(base, models, drop_rate=0.5, seed=0, then="ties", **{name: "mean"})
    for rate in (0.5, [0.5, 0.6]):
        with pytest.raises(ArgumentError, match=r"dare: .*'one' of model 1"):
            dare(base, [models[0], {**models[1], "one": torch.tensor([torch.nan])}], drop_rate=rate, seed=0)
