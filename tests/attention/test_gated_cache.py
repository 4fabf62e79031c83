"""The cache against schedules written out step by step, with a layer that counts its calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import shiftkern
from shiftkern.attention.gated_cache import GatedCache


class Counting(nn.Module):
    """A layer with an output of its own at each step, and a record of them."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 4).double()
        self.steps: list[int] = []
        self.now = 0

    def forward(self, hidden: Tensor, text: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
        self.steps.append(self.now)
        out = self.projection(hidden) * (self.now + 1) * factor
        return out if text is None else out + text


def draw(step: int, batch: int) -> Tensor:
    return torch.randn(batch, 5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def sample(cache: GatedCache, steps: int, batch: int = 4) -> tuple[list[int], list[Tensor]]:
    """Run a sampler that drops to one branch at the gate; which steps computed, and what each returned."""
    layer = cache.attention
    layer.steps.clear()
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            layer.now = step
            assert cache.step == step
            outputs.append(cache(draw(step, batch // 2 if cache.guided and step >= cache.gate_step else batch)))
    return layer.steps[:], outputs


def at(layer: Counting, step: int, batch: int) -> Tensor:
    with torch.no_grad():
        return layer.projection(draw(step, batch)) * (step + 1)


@pytest.mark.parametrize("gate", [1, 2, 10, 30])
def test_cross_attention_is_the_mean_of_both_branches_after_the_gate(gate: int):
    cache = GatedCache(Counting(), gate_step=gate)
    computed, outputs = sample(cache, 25)
    assert computed == list(range(min(gate, 25)))
    for step, out in enumerate(outputs):
        if step < gate:
            assert torch.equal(out, at(cache.attention, step, 4))
        else:
            full = at(cache.attention, gate - 1, 4)
            assert torch.equal(out, (full[:2] + full[2:]) / 2)


def test_by_default_the_gate_is_at_ten_of_25_steps():
    computed, _ = sample(GatedCache(Counting()), 25)
    assert computed == list(range(10))
    # Second version, by the authors' schedule: kept at step 2, again at 5; the gate at 9; each step after it.
    computed, outputs = sample(cache := GatedCache(Counting(), kind="self"), 25)
    assert computed == [0, 1, 2, 5, 9, *range(10, 25)]
    for step, source in ((3, 2), (4, 2), (6, 5), (8, 5)):
        assert torch.equal(outputs[step], at(cache.attention, source, 4))
    for step in range(10, 25):
        assert torch.equal(outputs[step], at(cache.attention, step, 2))


def test_self_attention_after_the_gate_starts_from_the_mean():
    cache = GatedCache(Counting(), kind="self", fi_interval=4)
    computed, outputs = sample(cache, 20)
    assert computed == [0, 1, 2, 5, 9, 12, 16]
    full = at(cache.attention, 9, 4)
    assert torch.equal(outputs[9], full)
    for step in (10, 11):
        assert torch.equal(outputs[step], (full[:2] + full[2:]) / 2)
    for step in (12, 13, 15):
        assert torch.equal(outputs[step], at(cache.attention, 12, 2))
    for step in (16, 19):
        assert torch.equal(outputs[step], at(cache.attention, 16, 2))


@given(
    gate=st.integers(1, 15),
    warm_up=st.integers(0, 6),
    before=st.integers(1, 6),
    after=st.integers(1, 6),
    guided=st.booleans(),
    kind=st.sampled_from(["cross", "self"]),
)
def test_any_schedule(gate: int, warm_up: int, before: int, after: int, guided: bool, kind: str):
    layer = Counting()
    options: dict[str, Any] = {"warm_up": warm_up, "sp_interval": before, "fi_interval": after, "guided": guided}
    cache = GatedCache(layer, gate_step=gate, kind=kind, **options)
    computed, outputs = sample(cache, 20)
    want, kept = [], None
    for step in range(20):
        batch = 2 if guided and step >= gate else 4
        if kind == "cross":
            due = step < gate
        elif step < gate - 1:
            due = step <= warm_up or step % before == 0
        else:
            due = step == gate - 1 or step % after == 0
        if due:
            want.append(step)
            kept = at(layer, step, batch)
        assert torch.equal(outputs[step], kept)
        if step == gate - 1 and guided:
            kept = (kept[:2] + kept[2:]) / 2
    assert computed == want


def test_reset_starts_a_prompt_of_any_shape():
    cache = GatedCache(Counting(), gate_step=3)
    first = sample(cache, 6)
    cache.reset()
    assert cache.step == 0
    assert all(torch.equal(a, b) for a, b in zip(sample(cache, 6)[1], first[1], strict=True))
    cache.reset()
    assert sample(cache, 6, batch=8)[1][-1].shape == (4, 5, 4)


def test_the_layer_gets_every_argument_and_a_call_that_fails_is_no_step():
    cache = GatedCache(Counting(), gate_step=2)
    text = torch.ones(4, dtype=torch.float64)
    out = cache(draw(0, 4), text, factor=3.0)
    assert torch.equal(out, cache.attention.projection(draw(0, 4)) * 3 + 1)
    cache.reset()
    with pytest.raises(RuntimeError):
        cache(torch.zeros(4, 5, 7))
    assert cache.step == 0
    cache(draw(0, 4))
    assert cache.step == 1


def test_writing_to_an_output_does_not_reach_what_is_kept():
    for options in ({}, {"guided": False}, {"kind": "self", "fi_interval": 3}):
        cache, clean = (GatedCache(Counting(), gate_step=4, **options) for _ in range(2))
        clean.load_state_dict(cache.state_dict())
        want = sample(clean, 8)[1]
        with torch.no_grad():
            for step in range(8):
                cache.attention.now = step
                out = cache(draw(step, 2 if cache.guided and step >= 4 else 4))
                assert torch.equal(out, want[step])
                out.zero_()


def test_what_is_kept_is_no_part_of_the_models_state():
    cache = GatedCache(Counting(), gate_step=2)
    sample(cache, 4)
    assert set(cache.state_dict()) == {"attention.projection.weight", "attention.projection.bias"}
    other = copy.deepcopy(cache)
    assert other.step == 4
    assert torch.equal(other(draw(9, 2)), cache(draw(9, 2)))
    other.reset()
    assert (other.step, cache.step) == (0, 5)
    assert set(dict(cache.named_parameters())) == set(cache.state_dict())
    assert GatedCache(torch.nn.functional.relu).state_dict() == {}


def test_gradients_reach_the_step_that_was_kept():
    cache = GatedCache(lambda x: x * x, gate_step=2)
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64, requires_grad=True)

    def last(x: Tensor) -> Tensor:
        cache.reset()
        cache(x), cache(x)
        return cache(x[:2])

    assert torch.autograd.gradcheck(last, x)
    last(x).sum().backward()
    assert torch.equal(x.grad, x.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mean_is_rounded_once_and_does_not_overflow(dtype: torch.dtype):
    cache = GatedCache(lambda x: x, gate_step=1)
    x = torch.tensor([[60000.0, 1.0], [60000.0, 2.0]], dtype=dtype)
    cache(x)
    assert torch.equal(cache(x[:1]), x.double().mean(0, keepdim=True).to(dtype))


def test_an_inference_sampler():
    cache = GatedCache(nn.MultiheadAttention(4, 2, batch_first=True), gate_step=1)
    layer = GatedCache(lambda x, text: cache.attention(x, text, text)[0], gate_step=1)
    x, text = torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    with torch.inference_mode():
        full = layer(x, text)
        torch.testing.assert_close(layer(x[:1], text[:1]), full.mean(0, keepdim=True))


@pytest.mark.parametrize(
    ("step", "given", "error"),
    [
        (0, torch.zeros(3, 5, 3), ValueError),
        (0, torch.zeros(()), ValueError),
        (0, torch.zeros(4, 5, 3).long(), TypeError),
        (0, None, TypeError),
        (1, torch.zeros(6, 5, 3).double(), ValueError),
        (1, torch.zeros(4, 6, 3).double(), ValueError),
        (1, torch.zeros(4, 5, 3), ValueError),
        (1, torch.zeros(4, 5, 3, device="meta").double(), ValueError),
        (2, torch.zeros(4, 5, 3).double(), ValueError),
        (2, torch.zeros(2, 9, 3).double(), ValueError),
        (2, torch.zeros(2, 5, 3), ValueError),
    ],
)
def test_hidden_states_that_do_not_fit_are_refused(step: int, given: Any, error: type):
    cache = GatedCache(Counting(), gate_step=2)
    sample(cache, step)
    with pytest.raises(error, match=r"GatedCache: argument 'hidden_states': expected .*, got "):
        cache(given)
    assert cache.step == step


def test_the_message_at_the_gate_says_what_to_do():
    cache = GatedCache(Counting(), gate_step=2)
    sample(cache, 2)
    with pytest.raises(
        ValueError, match=r"shape \(2, 5, 3\) .* at step 2, one branch of the first step .or reset.*got .*\(4, 5, 3\)"
    ):
        cache(draw(2, 4))


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"attention": None}, "attention", TypeError),
        ({"gate_step": 0}, "gate_step", ValueError),
        ({"gate_step": 2.0}, "gate_step", TypeError),
        ({"kind": "both"}, "kind", ValueError),
        ({"kind": None}, "kind", TypeError),
        ({"guided": 1}, "guided", TypeError),
        ({"warm_up": -1}, "warm_up", ValueError),
        ({"sp_interval": 0}, "sp_interval", ValueError),
        ({"fi_interval": 0}, "fi_interval", ValueError),
        ({"fi_interval": "1"}, "fi_interval", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"GatedCache: argument '{name}': expected .*, got ") as caught:
        GatedCache(**{"attention": Counting(), **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize("returned", [None, (torch.zeros(4, 2), None), torch.zeros(3, 2), torch.tensor(1.0)])
def test_a_layer_that_returns_something_else_is_refused(returned: Any):
    with pytest.raises(ValueError, match=r"GatedCache: argument 'attention': expected .*, got "):
        GatedCache(lambda x: returned)(torch.zeros(4, 2))
