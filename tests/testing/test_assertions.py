"""Each assertion passes on what the library makes and fails, with a message that helps, on what is broken."""

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.norm import channel_moments, merge_moments
from shiftkern.ot import sinkhorn
from shiftkern.peft import HRAConfig, LoRAConfig, MaskTuningConfig, SSFConfig
from shiftkern.peft.lora import _LoRA
from shiftkern.testing import (
    assert_marginals,
    assert_merge_roundtrip,
    assert_orthogonal,
    assert_same_bits,
    assert_streaming_equals_pooled,
)

PLAN = torch.tensor([[0.3, 0.2], [0.1, 0.4]], dtype=torch.float64)
A, B = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64)


def changed(value, *at):
    spoilt = PLAN.clone()
    spoilt[at] = value
    return spoilt


def test_marginals_that_are_met():
    assert_marginals(PLAN, A, B, tol=1e-15)
    assert_marginals(PLAN, None, B, tol=1e-15)
    assert_marginals(PLAN.numpy(), A.numpy(), B, tol=1e-15)
    assert_marginals(torch.stack([PLAN, PLAN.mT]), torch.stack([A, B]), torch.stack([B, A]), tol=1e-15)
    costs = torch.rand(30, 20)
    assert_marginals(sinkhorn(None, None, costs, 0.05).plan(), None, None)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (changed(0.31, 0, 0), r"misses its marginals by 0\.02 in L1, .* row 0 is off by \+0\.01"),
        (changed(-0.1, 1, 0), r"is -0\.1 at \(1, 0\)"),
        (changed(float("nan"), 0, 1), r"is nan at \(0, 1\)"),
        (changed(float("inf"), 0, 1), r"is inf at \(0, 1\)"),
        (torch.stack([PLAN, changed(0.0, 1, 1)]), r"row \(1, 1\) is off by -0\.4"),
    ],
)
def test_marginals_that_are_missed(plan, message):
    with pytest.raises(AssertionError, match=message):
        assert_marginals(plan, A, B)


def test_the_tolerance_of_marginals_is_of_the_mass():
    with pytest.raises(AssertionError):
        assert_marginals(changed(0.31, 0, 0), A, B, tol=0.0199)
    assert_marginals(changed(0.31, 0, 0), A, B, tol=0.0201)
    assert_marginals(1000 * changed(0.31, 0, 0), 1000 * A, 1000 * B, tol=0.0201)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((PLAN[0], A, B), ArgumentError, "plan"),
        ((PLAN[:0], A[:0], B), ArgumentError, "plan"),
        (("plan", A, B), ArgumentTypeError, "plan"),
        ((PLAN, A[:1], B), ArgumentError, "a"),
        ((PLAN, A, [0.4, 0.6]), ArgumentTypeError, "b"),
    ],
)
def test_wrong_marginals_are_refused(arguments, error, name):
    with pytest.raises(error, match=rf"^assert_marginals: argument '{name}': "):
        assert_marginals(*arguments)
    with pytest.raises(ArgumentError, match="'tol'"):
        assert_marginals(PLAN, A, B, tol=-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orthogonal_matrices(dtype):
    q = torch.linalg.qr(torch.randn(3, 20, 20, dtype=torch.float64))[0].to(dtype)
    assert_orthogonal(q)
    with pytest.raises(AssertionError, match=r"off the identity by .*, more than "):
        assert_orthogonal(1.5 * q)
    with pytest.raises(AssertionError):
        assert_orthogonal(q, tol=0.0)
    q[1, 2, 3] = float("nan")
    with pytest.raises(AssertionError, match="nan"):
        assert_orthogonal(q)


def test_matrices_that_are_not_square_are_refused():
    with pytest.raises(ArgumentError, match=r"^assert_orthogonal: argument 'R': "):
        assert_orthogonal(torch.eye(3)[:2])
    with pytest.raises(ArgumentTypeError, match=r"^assert_orthogonal: argument 'R': "):
        assert_orthogonal(np.eye(3))
    with pytest.raises(ArgumentError, match=r"^assert_orthogonal: argument 'tol': "):
        assert_orthogonal(torch.eye(3), tol=-1.0)


@dataclass
class Parts:
    numbers: torch.Tensor
    more: dict


def by_threads(make):
    """A function of the number of threads, which no kernel is."""
    return lambda: Parts(torch.zeros(3), {"x": [make(shiftkern.get_num_threads())]})


def test_same_bits_of_a_kernel():
    x = torch.randn(64, 8, 1000)
    seen = Counter()

    def call():
        seen[shiftkern.get_num_threads()] += 1
        return channel_moments(x)

    shiftkern.set_num_threads(7)
    assert_same_bits(call)
    assert seen == Counter([1, 2, 3, 5])
    assert shiftkern.get_num_threads() == 7


def test_same_bits_counts_nan_as_themselves():
    assert_same_bits(lambda: (torch.tensor([float("nan"), -0.0]), float("nan"), "words", np.arange(3), None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda n: torch.tensor([1.0, 1.0 + (n == 3) * 2**-23]),
            r"\['x'\]\[0\]: 1 of 2 elements .*3 threads.* 1: 1\.0",
        ),
        (lambda n: torch.tensor(0.0 if n == 1 else -0.0), r"elements differ between 1 thread and 2 threads"),
        (lambda n: n, r"result\.more\['x'\]\[0\]: 1 on 1 thread, 2 on 2 threads"),
        (lambda n: torch.zeros(n), r"shape \(1,\) .* shape \(2,\)"),
        (lambda n: torch.zeros(1) if n == 1 else 0.0, r"torch\.float32 tensor .* float 0\.0"),
        (lambda n: list(range(n)), r"have different parts"),
    ],
)
def test_other_bits_are_found_and_named(make, message):
    before = shiftkern.get_num_threads()
    with pytest.raises(AssertionError, match=message):
        assert_same_bits(by_threads(make))
    assert shiftkern.get_num_threads() == before


def test_threads_are_restored_after_an_error():
    before = shiftkern.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        assert_same_bits(lambda: 1 // 0)
    assert shiftkern.get_num_threads() == before


@pytest.mark.parametrize(
    ("fn", "threads", "error", "name"),
    [
        (torch.zeros(3), (1, 2), ArgumentTypeError, "fn"),
        (int, 3, ArgumentTypeError, "threads"),
        (int, "12", ArgumentTypeError, "threads"),
        (int, (2,), ArgumentError, "threads"),
        (int, (0, 1), ArgumentError, "threads"),
    ],
)
def test_wrong_arguments_of_same_bits_are_refused(fn, threads, error, name):
    with pytest.raises(error, match=rf"^assert_same_bits: argument '{name}': "):
        assert_same_bits(fn, threads=threads)


def moments(chunks):
    return functools.reduce(merge_moments, map(channel_moments, chunks))


def test_streaming_moments_equal_pooled_ones():
    x = 3.0 + torch.randn(200, 5)
    assert_streaming_equals_pooled(moments, x.split(17))

    def largest(parts):
        return torch.cat([part.amax(1) for part in parts], 1)

    assert_streaming_equals_pooled(largest, x.view(2, 20, 5, 5).split(1, 2), dim=2, rtol=0, atol=0)


@pytest.mark.parametrize("broken", ["mean of means", "forgets the first"])
def test_a_stream_that_differs_is_named(broken):
    def stream(chunks):
        if broken == "mean of means":
            return {"mean": torch.stack([chunk.mean(0) for chunk in chunks]).mean(0)}
        return {"mean": moments(chunks[1:] or chunks).mean}

    with pytest.raises(AssertionError, match=r"result\['mean'\] differs between 3 chunks and one"):
        assert_streaming_equals_pooled(stream, torch.randn(50, 4).split(20))


@pytest.mark.parametrize(
    ("fn", "chunks", "options", "error", "name"),
    [
        (None, [torch.zeros(2)], {}, ArgumentTypeError, "fn"),
        (len, torch.zeros(2), {}, ArgumentTypeError, "chunks"),
        (len, [1.0], {}, ArgumentTypeError, "chunks"),
        (len, [], {}, ArgumentError, "chunks"),
        (len, [torch.zeros(2, 3), torch.zeros(2, 4)], {}, ArgumentError, "chunks"),
        (len, [torch.zeros(2)], {"dim": 5}, ArgumentError, "chunks"),
        (len, [torch.zeros(2)], {"rtol": 0.1}, ArgumentError, "rtol"),
    ],
)
def test_wrong_streams_are_refused(fn, chunks, options, error, name):
    with pytest.raises(error, match=rf"^assert_streaming_equals_pooled: argument '{name}': "):
        assert_streaming_equals_pooled(fn, chunks, **options)


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 8))


@pytest.mark.parametrize(
    "config", [LoRAConfig(r=2), HRAConfig(r=2), SSFConfig(), MaskTuningConfig(target_modules=["0"])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_make_the_round_trip(config, dtype):
    model = network().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert_merge_roundtrip(model, config, torch.randn(5, 8, dtype=dtype))
    assert_merge_roundtrip(model, config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    ("method", "broken", "message"),
    [
        ("transform", lambda self, x, base, *_: base(x), "merged, the model computes something else"),
        (
            "unmerge",
            lambda self, weight, bias: (weight, bias),
            r"unmerged \(stash=False\), a weight is not what it was",
        ),
    ],
)
def test_a_broken_adapter_is_found(method, broken, message, monkeypatch):
    monkeypatch.setattr(_LoRA, method, broken)
    with pytest.raises(AssertionError, match=message):
        assert_merge_roundtrip(network(), LoRAConfig(r=2, target_modules=["0", "3"]), torch.randn(5, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"size": 0.0}, ArgumentError, "size"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"tol": "x"}, ArgumentTypeError, "tol"),
        ({"model": None}, ArgumentTypeError, "model"),
    ],
)
def test_wrong_round_trips_are_refused(arguments, error, name):
    given = {"model": network(), "config": LoRAConfig(r=2), **arguments}
    with pytest.raises(error, match=rf"^assert_merge_roundtrip: argument '{name}': "):
        assert_merge_roundtrip(given.pop("model"), given.pop("config"), **given)
