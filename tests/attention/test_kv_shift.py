"""KV shifting against its formula token by token, and in parts against the whole."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.attention.kv_shift import KVShiftState, kv_shift, kv_shift_init

from helpers.strategies import DTYPES, computing, lay_out, make, roundoff


def expected(x: Tensor, mix: Tensor) -> Tensor:
    """Token by token, in float64 and differentiable."""
    x, mix = x.double(), mix.double()
    tokens = [x[:, :, t] for t in range(x.shape[2])]
    mixed = []
    for t, token in enumerate(tokens):
        before = tokens[t - 1] if t else torch.zeros_like(token)
        mixed.append(mix[:, :1] * token + mix[:, 1:] * before)
    return torch.stack(mixed, 2)


def inputs(shape=(2, 3, 7, 5), dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    width = shape[3] + 2
    tensors = [make(shape, dtype, seed), make((*shape[:3], width), dtype, seed + 1)]
    return tensors + [make((shape[1], 2), torch.float64, seed + i) for i in (2, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 1, 1, 1), (1, 2, 3, 2500), (2, 2, 700, 33), (1, 2, 40, 64)])
def test_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype):
    k, v, alpha, beta = inputs(shape, dtype)
    tolerance = {"rtol": roundoff(dtype) + 4 * roundoff(computing(dtype)), "atol": 16 * roundoff(computing(dtype))}
    for got, x, mix in zip(kv_shift(k, v, alpha, beta), (k, v), (alpha, beta), strict=True):
        assert got.dtype == dtype
        # The factors are rounded to what is computed in.
        torch.testing.assert_close(got.double(), expected(x, mix.to(computing(dtype))), **tolerance)


@given(sizes=st.tuples(*[st.integers(1, n) for n in (2, 3, 20, 40)]), cut=st.integers(0, 20), seed=st.integers(0, 99))
def test_parts_have_the_bits_of_the_whole(sizes, cut: int, seed: int):
    for dtype in DTYPES:
        k, v, alpha, beta = inputs(sizes, dtype, seed)
        whole = kv_shift(k, v, alpha, beta)
        state = KVShiftState()
        cut = min(cut, sizes[2])
        steps = [slice(0, cut), *(slice(t, t + 1) for t in range(cut, sizes[2]))]
        parts = [kv_shift(k[:, :, s], v[:, :, s], alpha, beta, state) for s in steps]
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts], 2), whole[i])
        assert torch.equal(state.k, k[:, :, -1])
        assert torch.equal(state.v, v[:, :, -1])


def test_the_state_holds_tokens_as_they_came_in():
    """Mixing what was mixed before would let the first token reach all that follow."""
    k = torch.zeros(1, 1, 4, 1)
    k[0, 0, 0] = 1.0
    mix, state = torch.tensor([[0.5, 0.5]]), KVShiftState()
    steps = [kv_shift(k[:, :, t : t + 1], k[:, :, t : t + 1], mix, mix, state)[0].item() for t in range(4)]
    assert steps == [0.5, 0.5, 0.0, 0.0]


@given(seed=st.integers(0, 99), tokens=st.integers(1, 12))
def test_invariants(seed: int, tokens: int):
    k, v, alpha, beta = inputs((1, 2, tokens, 3), seed=seed)
    whole = kv_shift(k, v, alpha, beta)[0]
    # (1, 0) changes nothing, (0, 1) is the shift, and the map is linear.
    unit = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    assert torch.equal(kv_shift(k, v, unit, beta)[0], k)
    shifted = kv_shift(k, v, unit.flip(1), beta)[0]
    assert torch.equal(shifted[:, :, 1:], k[:, :, :-1])
    assert shifted[:, :, 0].eq(0).all()
    torch.testing.assert_close(
        kv_shift(k + v[..., :3], v, alpha, beta)[0], whole + kv_shift(v[..., :3], v, alpha, beta)[0]
    )
    # Nothing looks ahead.
    assert torch.equal(kv_shift(k[:, :, :1], v[:, :, :1], alpha, beta)[0], whole[:, :, :1])


@pytest.mark.parametrize("with_state", [False, True])
def test_gradcheck(with_state: bool):
    leaves = [t.requires_grad_() for t in inputs((2, 2, 4, 3))]
    start = inputs((2, 2, 1, 3), seed=9)

    def shifted(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        state = KVShiftState() if with_state else None
        if state is not None:
            kv_shift(*start, state)
        return kv_shift(*leaves, state)

    assert torch.autograd.gradcheck(shifted, leaves)


@pytest.mark.parametrize("shape", [(2, 3, 700, 20), (1, 2, 3, 5000)])
def test_gradients_equal_those_of_the_formula(shape: tuple[int, ...]):
    k, v, alpha, beta = inputs(shape, torch.float32)
    leaves = [t.requires_grad_() for t in (k, v, alpha.float(), beta.float())]
    grads = make(shape), make((*shape[:3], shape[3] + 2), seed=8)
    got = torch.autograd.grad(kv_shift(*leaves), leaves, grads)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(
        (expected(wide[0], wide[2]), expected(wide[1], wide[3])), wide, [g.double() for g in grads]
    )
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-7, atol=2e-6)
    for a, b, x, g in zip(got[2:], want[2:], (k, v), grads, strict=True):
        terms = (x * g).abs().sum((0, 2, 3), dtype=torch.float64).unsqueeze(1)
        assert ((a.double() - b).abs() <= 8e-6 * terms).all()


def test_the_state_carries_no_gradient():
    k, v, alpha, beta = (t.requires_grad_() for t in inputs())
    state = KVShiftState()
    kv_shift(k, v, alpha, beta, state)
    assert not state.k.requires_grad
    assert state.k.data_ptr() != k.data_ptr()


def test_state_is_kept_reset_and_restored():
    k, v, alpha, beta = inputs()
    state = KVShiftState()
    assert state.state_dict() == {}
    first = kv_shift(k, v, alpha, beta, state)[0]
    saved, twin = state.state_dict(), copy.deepcopy(state)
    second = kv_shift(k, v, alpha, beta, state)[0]
    assert not torch.equal(first, second)
    restored = KVShiftState()
    restored.load_state_dict(saved)
    for other in (twin, restored):
        assert torch.equal(kv_shift(k, v, alpha, beta, other)[0], second)
    state.reset()
    assert torch.equal(kv_shift(k, v, alpha, beta, state)[0], first)
    state.load_state_dict({})
    assert state.k is None


def test_no_tokens_leave_the_state_as_it_is():
    k, v, alpha, beta = inputs()
    state = KVShiftState()
    kv_shift(k, v, alpha, beta, state)
    before = state.state_dict()
    assert kv_shift(k[:, :, :0], v[:, :, :0], alpha, beta, state)[0].shape == (2, 3, 0, 5)
    assert torch.equal(state.k, before["k"])


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset", "channels_last"])
def test_memory_layout_does_not_matter(layout: str):
    k, v, alpha, beta = inputs()
    k = lay_out(k, layout)
    assert torch.equal(kv_shift(k, v, alpha, beta)[0], kv_shift(k.contiguous(), v, alpha, beta)[0])


def test_same_bits_at_any_number_of_threads():
    leaves = [t.requires_grad_() for t in inputs((2, 3, 2000, 48), torch.float32)]
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        shifted = kv_shift(*leaves)
        results.append([*shifted, *torch.autograd.grad(shifted, leaves, shifted)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_reach_two_tokens(value: float):
    k, v, alpha, beta = inputs()
    k[1, 2, 3, 4] = value
    spoilt = ~kv_shift(k, v, alpha, beta)[0].isfinite()
    assert spoilt.nonzero().tolist() == [[1, 2, 3, 4], [1, 2, 4, 4]]


def test_initial_factors():
    mix = kv_shift_init(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert mix.shape == (500, 2)
    assert torch.equal(mix.sum(1), torch.ones(500, dtype=torch.float64))
    assert 0 <= mix.min() < 0.05
    assert 0.95 < mix.max() <= 1
    assert abs(mix[:, 0].mean() - 0.5) < 0.05
    assert torch.equal(mix, kv_shift_init(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for wrong, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=r"kv_shift_init: argument 'heads': expected .*, got "):
            kv_shift_init(wrong)


K, MIX = torch.zeros(2, 3, 4, 5), torch.zeros(3, 2)


def begun(k: Tensor) -> KVShiftState:
    state = KVShiftState()
    kv_shift(k, k, torch.zeros(k.shape[1], 2), torch.zeros(k.shape[1], 2), state)
    return state


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"k": K[0]}, "k", ValueError),
        ({"k": K.long()}, "k", TypeError),
        ({"k": K.numpy()}, "k", TypeError),
        ({"v": K[:, :, :3]}, "v", ValueError),
        ({"v": K[0]}, "v", ValueError),
        ({"v": K.double()}, "v", TypeError),
        ({"alpha": MIX[:2]}, "alpha", ValueError),
        ({"alpha": 0.5}, "alpha", TypeError),
        ({"beta": MIX[:, :1]}, "beta", ValueError),
        ({"beta": MIX.int()}, "beta", TypeError),
        ({"state": begun(K[:1])}, "state", ValueError),
        ({"state": begun(K[..., :3])}, "state", ValueError),
        ({"state": begun(K.double())}, "state", TypeError),
        ({"state": {}}, "state", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"kv_shift: argument '{name}': expected .*, got ") as caught:
        kv_shift(**{"k": K, "v": K, "alpha": MIX, "beta": MIX, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize(
    ("state", "name", "error"),
    [
        ([], "state", TypeError),
        ({"k": K[:, :, 0]}, "state", ValueError),
        ({"k": K, "v": K}, "k", ValueError),
        ({"k": K[:, :, 0], "v": K[:1, :, 0]}, "v", ValueError),
        ({"k": K[:, :, 0], "v": None}, "v", TypeError),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state, name: str, error: type):
    with pytest.raises(error, match=rf"KVShiftState.load_state_dict: argument '{name}': expected .*, got "):
        KVShiftState().load_state_dict(state)
