"""Hostile calls of everything public, a few thousand of them; ``make fuzz`` makes more."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from shiftkern import attention, norm, ot, peft, tta
from shiftkern.errors import ArgumentError, ArgumentTypeError

from helpers import fuzz
from helpers.fuzz_recipes import RECIPES, WITHOUT

SEED, CALLS, PARTS = 20261121, 3000, 2


def test_every_public_name_has_a_recipe_or_a_reason():
    assert set(fuzz.public_names()) == set(RECIPES) | set(WITHOUT)
    assert not set(RECIPES) & set(WITHOUT)
    assert all(WITHOUT.values())


@pytest.mark.parametrize("part", range(PARTS))
def test_hostile_calls_give_results_or_clear_errors(part):
    report = fuzz.run(SEED, range(part, CALLS, PARTS))
    found = [
        f"{kind} in {name}: --seed {SEED} --replay {n[0]}\n  {detail}" for name, kind, detail, n in report.grouped()
    ]
    assert not found, "\n".join(found)
    assert report.calls == CALLS // PARTS
    outcomes = sum((counter for counter in report.counts.values()), start=fuzz.Counter())
    assert outcomes["result"] > report.calls // 5
    assert outcomes["refused"] > report.calls // 5


@pytest.mark.parametrize("name", fuzz.names())
def test_recipes_are_valid(name):
    for recipe in RECIPES[name]:
        if recipe.valid:
            outcome = fuzz.attempt(recipe, recipe.make(fuzz.Draw("valid")), [])
            assert outcome.kind == "result", outcome


def judged(call, spoilt=("x",), **settings):
    recipe = fuzz.Recipe("norm.nothing", lambda d: {"x": torch.ones(2)}, call, **settings)
    arguments = recipe.make(fuzz.Draw(1))
    return fuzz.attempt(recipe, arguments, list(spoilt)).kind


def raising(error):
    def call(x):
        raise error

    return call


def test_the_judge_sees_each_kind_of_defect():
    assert judged(lambda x: x) == "result"
    assert judged(raising(ArgumentError("op: argument 'x': expected 1, got 2"))) == "refused"
    assert judged(raising(ArgumentError("something is wrong"))) == "unnamed"
    for error in (AttributeError("x"), IndexError("x"), RuntimeError("x"), NotImplementedError("x"), ValueError("x")):
        assert judged(raising(error), spoilt=()) == "wrong error"
    assert judged(raising(ArgumentError("op: argument 'x': expected 1, got 2")), spoilt=()) == "valid call refused"
    assert judged(lambda x: x / 0, spoilt=()) == "not finite"
    assert judged(lambda x: x.double(), spoilt=(), like="x") == "wrong shape"
    assert judged(lambda x: x.zero_()) == "argument written"
    assert judged(lambda x: x.zero_(), writes=True) == "result"


def test_a_module_that_a_refused_call_has_changed_is_seen():
    def call(model):
        nn.init.zeros_(model.weight)
        raise ArgumentError("op: argument 'model': expected 1, got 2")

    recipe = fuzz.Recipe("norm.nothing", lambda d: {}, call, atomic=True)
    assert fuzz.attempt(recipe, {"model": nn.Linear(2, 2)}, ["model"]).kind == "module changed by a refused call"


def test_a_call_is_its_number():
    for number in range(40):
        first, second = (fuzz.prepare(7, number) for _ in range(2))
        assert first[0] is second[0]
        assert first[2] == second[2]
        shown = [re.sub(r"0x[0-9a-f]+", "", fuzz.show(call[1])) for call in (first, second)]
        assert shown[0] == shown[1]


@pytest.mark.parametrize(("end", "kind"), [("import os; os.abort()", "died"), ("import time; time.sleep(60)", "hang")])
def test_processes_that_die_or_hang_are_known_by_the_call(end, kind, monkeypatch):
    # The call is replaced in the process that makes it: the script is part of the environment of this test alone.
    script = fuzz.SCRIPT.replace("fuzz.work(", f"fuzz.attempt = lambda *_: exec({end!r}); fuzz.work(")
    monkeypatch.setattr(fuzz, "SCRIPT", script)
    report = fuzz.run(1, range(5, 6), limit=3.0)
    ((number, name, found, _),) = report.defects
    assert (number, name) == (5, fuzz.names()[5])
    assert found.startswith(kind)


# --- What it has found ------------------------------------------------------------------------------------------------


def test_whole_numbers_beyond_an_index_are_refused():
    for call in (
        lambda n: norm.UnMixTNS(n),
        lambda n: attention.PolyEncoder(n),
        lambda n: attention.kv_shift_init(n),
        lambda n: ot.WCoRDCritic(n, 3),
        lambda n: peft.LoRAConfig(r=n),
    ):
        with pytest.raises(
            ArgumentError, match=r"argument '\w+': expected an integer below 2\*\*63, got 9223372036854775808"
        ):
            call(2**63)


def test_generators_are_checked():
    for call in (
        lambda g: attention.kv_shift_init(4, generator=g),
        lambda g: tta.Augment()(torch.rand(2, 1, 4, 4), g),
    ):
        with pytest.raises(ArgumentTypeError, match=r"argument 'generator': expected a torch.Generator, got int 3"):
            call(3)


def test_negative_views_are_not_written():
    x = torch.view_as_complex(torch.rand(4, 3, 2)).conj().imag
    assert x.is_neg()
    with pytest.raises(ArgumentError, match=r"mixed_batch_norm_: argument 'x': .* got a negative view"):
        norm.mixed_batch_norm_(x, torch.zeros(3), torch.ones(3), source_weight=0.5)
    with pytest.raises(ArgumentError, match=r"ema_update_: argument 'tensors\[0\]': .* got a negative view"):
        norm.ema_update_([x], [torch.rand(4, 3)], 0.5)


def test_weights_without_dimensions_are_refused():
    X = np.ones((3, 2))
    with pytest.raises(ArgumentError, match="sinkhorn_samples: argument 'a'"):
        ot.sinkhorn_samples(X, X, 0.5, np.array(1.0))


def test_points_beyond_the_range_of_float64_are_refused():
    X = torch.full((3, 2), 1e300, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="argument 'X': expected squared distances to Y within the range"):
        ot.sinkhorn_samples(X, -X, 0.5)


def test_huge_bounds_bound_nothing():
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    mask = attention.BlockMask.sliding_window(9, 9, 2, 1, block=(4, 4))
    found = []
    for clamp in (None, 1e308):
        _, state = attention.reattention_capture(q, k, v, mask)
        found.append(attention.reattention_step(q, k, v, mask, state, clamp=clamp))
    assert torch.equal(*found)
    every = attention.topk_block_mask(q, k, keep=0.5, block=(4, 4), local=2**63 - 1)
    assert every == attention.topk_block_mask(q, k, keep=0.5, block=(4, 4), local=100)


def test_the_monitor_checks_predictions():
    monitor = tta.CollapseMonitor()
    for probs in (None, torch.ones(3), torch.ones(0, 3), torch.ones(2, 3, dtype=torch.int64)):
        with pytest.raises(ArgumentError, match="CollapseMonitor: argument 'probs'"):
            monitor.update(probs)
    assert monitor.predictions == 0


def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


def test_callables_of_methods_must_return_what_they_should():
    with pytest.raises(ArgumentTypeError, match=r"Tent: argument 'loss': .* floating-point tensor, got int"):
        tta.Tent(model(), loss=lambda logits: 3)(torch.rand(5, 1, 6, 6))
    with pytest.raises(ArgumentTypeError, match=r"Tent: argument 'optimizer': .* torch optimizer, got NoneType"):
        tta.Tent(model(), optimizer=lambda parameters, lr: None)


def test_pictures_have_pixels_and_logits_are_dense():
    with pytest.raises(ArgumentError, match="Augment: argument 'x': expected pictures"):
        tta.Augment()(torch.rand(2, 1, 0, 4), torch.Generator())
    with pytest.raises(ArgumentTypeError, match=r"Source: argument 'model': .* dense"):
        tta.Source(nn.Identity())(torch.rand(2, 3).to_sparse())


def test_patterns_of_a_mask_are_bytes():
    mask = attention.BlockMask.sliding_window(9, 9, 2, 1, block=(4, 4))
    parts = [getattr(mask, name) for name in ("shape", "block", "indptr", "indices", "inner", "patterns")]
    assert attention.BlockMask(*parts) == mask
    with pytest.raises(ArgumentTypeError, match="BlockMask: argument 'patterns'"):
        attention.BlockMask(*parts[:-1], parts[-1].bfloat16())


def test_collected_styles_are_of_models_and_batches():
    x = torch.rand(5, 1, 6, 6)
    for arguments, name in (
        ((3, ["0"], [[x]]), "model"),
        ((model(), ["0"], 3), "domains"),
        ((model(), ["0"], [3]), "domains"),
    ):
        with pytest.raises(ArgumentTypeError, match=f"collect_styles: argument '{name}'"):
            tta.collect_styles(*arguments)
    with pytest.raises(ArgumentTypeError, match="collect_styles: argument 'domains': expected batches"):
        tta.collect_styles(model(), ["0"], [["text"]])


def test_counts_of_moments_are_checked():
    mean = torch.zeros(3)
    with pytest.raises(ArgumentError, match=r"Moments: argument 'count'.*meta"):
        norm.Moments(torch.ones((), device="meta"), mean, mean)
    with pytest.raises(ArgumentTypeError, match="Moments: argument 'count'"):
        norm.Moments(torch.ones(3, dtype=torch.complex64), mean, mean)
    with pytest.raises(ArgumentError, match=r"Moments: argument 'count': expected a shape that broadcasts .* \(2,\)"):
        norm.Moments(torch.ones(2), mean, mean)
    assert norm.Moments(torch.ones(2, 1), torch.zeros(2, 3), torch.zeros(2, 3)).var().shape == (2, 3)


def test_the_critic_takes_features_of_its_own_dtype():
    with pytest.raises(ArgumentTypeError, match="WCoRDCritic: argument 'teacher'"):
        ot.WCoRDCritic(4, 6)(torch.rand(3, 4), torch.rand(3, 6, dtype=torch.float64))
    assert ot.WCoRDCritic(4, 6).half()(torch.rand(3, 4).half(), torch.rand(3, 6).half()).isfinite().all()


def test_nested_tensors_are_refused_by_name():
    nested = torch.nested.nested_tensor([torch.rand(2), torch.rand(3)])
    with pytest.raises(ArgumentTypeError, match=r"ema_update_: argument 'tensors\[0\]': expected a dense"):
        norm.ema_update_([nested], [nested], 0.5)
    with pytest.raises(ArgumentTypeError, match="class_correlation_loss: argument 'logits': expected a dense"):
        tta.class_correlation_loss(nested)


def test_adapters_check_names_and_models():
    adapted = peft.inject(nn.Sequential(nn.Linear(4, 4)), peft.LoRAConfig(r=2))
    names = np.array(["default", "b"])
    with pytest.raises(ArgumentError, match="save: argument 'adapter_name'"):
        peft.save(adapted, "nowhere", names)
    with pytest.raises(ArgumentError, match="delete_adapter: argument 'adapter_name'"):
        peft.delete_adapter(adapted, names)
    with pytest.raises(ArgumentTypeError, match="adapted_layers: argument 'model'"):
        peft.adapted_layers(3)
    with pytest.raises(ArgumentTypeError, match="PHMLinear: argument 'dtype'"):
        peft.PHMLinear(8, 8, 2, dtype=torch.int64)
    with pytest.raises(ArgumentTypeError, match="argument 'blocks'"):
        peft.ReversibleSequence(torch.tensor(1.0))


def test_groups_are_groups_of_processes():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    half = torch.tensor([0.5, 0.5])
    try:
        with pytest.raises(ArgumentTypeError, match="all_reduce_moments: argument 'group'"):
            norm.all_reduce_moments(norm.channel_moments(torch.rand(4, 3)), group=3)
        with pytest.raises(ArgumentTypeError, match="sinkhorn_sharded: argument 'group'"):
            ot.sinkhorn_sharded(half, half, torch.eye(2), 0.5, group=True)
    finally:
        dist.destroy_process_group()
