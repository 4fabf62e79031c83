"""Attention over a union of keys from its parts, against float64 sums and dense attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError, NotDifferentiableError
from shiftkern.attention import merge_state, merge_states

from helpers.strategies import DTYPES, computing, make, roundoff


def states(
    parts: int = 3, shape: tuple[int, ...] = (2, 3, 70, 16), dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Outputs, and log-sum-exps of which some are -inf, in one place all of them."""
    o, lse = make((parts, *shape), dtype, seed), 3 * make((parts, *shape[:-1]), computing(dtype), seed + 1)
    nothing = torch.rand(lse.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
    if lse[0].numel() and len(shape) > 1:
        nothing[(slice(None),) + (-1,) * (len(shape) - 1)] = True
    return o, lse.masked_fill(nothing, -math.inf)


def by_loops(o: Tensor, lse: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs, log-sum-exps, and the magnitudes that outputs are sums of, row by row."""
    wide, level = o.detach().double().numpy(), lse.detach().double().numpy()
    out, total, size = np.zeros(wide.shape[1:]), np.full(level.shape[1:], -np.inf), np.zeros(wide.shape[1:])
    for at in np.ndindex(*total.shape):
        used = [s for s in range(len(level)) if level[(s, *at)] > -np.inf]
        if not used:
            continue
        peak = max(level[(s, *at)] for s in used)
        weights = [math.exp(level[(s, *at)] - peak) for s in used]
        total[at] = peak + math.log(math.fsum(weights))
        for s, weight in zip(used, weights, strict=True):
            share = weight / math.fsum(weights)
            out[at] += share * wide[(s, *at)]
            size[at] += share * np.abs(wide[(s, *at)])
    return out, total, size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("shape", [(2, 3, 70, 16), (1,), (64, 1), (65, 33), (3, 129, 2), (1, 1, 1, 1)])
def test_equals_loops(parts: int, shape: tuple[int, ...], dtype: torch.dtype):
    o, lse = states(parts, shape, dtype)
    u, stored = roundoff(computing(dtype)), roundoff(dtype)
    want, total, size = by_loops(o, lse)
    results = [merge_states(o, lse)]
    if parts == 2:
        results.append(merge_state(o[0], lse[0], o[1], lse[1]))
    for out, merged in results:
        assert (out.dtype, out.shape) == (dtype, o.shape[1:])
        assert (merged.dtype, merged.shape) == (lse.dtype, lse.shape[1:])
        # Weights are float64, from exponentials of 3 ulp; each term has a rounding of weight, product and sum.
        far = (
            ((parts + 3) * u + (parts + 16) * 2.0**-53) * size
            + stored * np.abs(want)
            + stored * torch.finfo(dtype).smallest_normal
        )
        assert (np.abs(out.double().numpy() - want) - far).max() <= 0
        got, some = merged.double().numpy(), total > -np.inf
        assert (got[~some] == -np.inf).all()
        far = u * np.abs(total[some]) + (parts + 16) * 2.0**-53
        assert (np.abs(got[some] - total[some]) - far).max(initial=0) <= 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_at_once_are_two_of_many(dtype: torch.dtype):
    o, lse = states(2, dtype=dtype)
    for one, other in zip(merge_state(o[0], lse[0], o[1], lse[1]), merge_states(o, lse), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_nothing_is_the_identity(value: float, dtype: torch.dtype):
    """Whatever its output holds."""
    o, lse = states(1, dtype=dtype)
    nothing = torch.full_like(o[0], value), torch.full_like(lse[0], -math.inf)
    want = torch.where(lse[0][..., None] == -math.inf, 0.0, o[0])
    for out, merged in (
        merge_state(o[0], lse[0], *nothing),
        merge_state(*nothing, o[0], lse[0]),
        merge_states(torch.stack([nothing[0], o[0], nothing[0]]), torch.stack([nothing[1], lse[0], nothing[1]])),
    ):
        assert torch.equal(out, want)
        assert torch.equal(merged, lse[0])
    out, merged = merge_state(*nothing, *nothing)
    assert (out == 0).all()
    assert (merged == -math.inf).all()


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 130), width=st.integers(1, 40))
def test_commutative_and_associative(seed: int, rows: int, width: int):
    (a, b, c), (la, lb, lc) = states(3, (rows, width), seed=seed)
    close = {"rtol": 1e-13, "atol": 1e-13}
    one, other = merge_state(a, la, b, lb), merge_state(b, lb, a, la)
    torch.testing.assert_close(one, other, **close)
    left = merge_state(*one, c, lc)
    right = merge_state(a, la, *merge_state(b, lb, c, lc))
    at_once = merge_states(torch.stack([a, b, c]), torch.stack([la, lb, lc]))
    torch.testing.assert_close(left, right, **close)
    torch.testing.assert_close(left, at_once, **close)


@given(seed=st.integers(0, 2**16), shift=st.floats(-300, 300))
def test_a_common_shift_shifts_the_result(seed: int, shift: float):
    o, lse = states(3, (20, 5), seed=seed)
    out, merged = merge_states(o, lse)
    moved, moved_lse = merge_states(o, lse + shift)
    torch.testing.assert_close(moved, out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(moved_lse, merged + shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 4, 5])
def test_keys_in_parts_are_all_keys(parts: int):
    q, k, v = (
        make((1, 2, 20, 8), torch.float64),
        make((1, 2, 61, 8), torch.float64, 1),
        make((1, 2, 61, 4), torch.float64, 2),
    )
    found = []
    for keys, values in zip(k.tensor_split(parts, 2), v.tensor_split(parts, 2), strict=True):
        score = q @ keys.mT
        found.append((score.softmax(-1) @ values, score.logsumexp(-1)))
    out, lse = merge_states(torch.stack([o for o, _ in found]), torch.stack([s for _, s in found]))
    score = q @ k.mT
    torch.testing.assert_close(out, score.softmax(-1) @ v)
    torch.testing.assert_close(lse, score.logsumexp(-1))
    by_pairs = found[0]
    for part in found[1:]:
        by_pairs = merge_state(*by_pairs, *part)
    torch.testing.assert_close(by_pairs, (out, lse))


def test_levels_far_apart():
    o = torch.tensor([[[1.0], [2.0], [3.0]], [[5.0], [6.0], [7.0]]])
    lse = torch.tensor([[1e30, -1e30, 80.0], [-1e30, -2e30, -80.0]])
    out, merged = merge_states(o, lse)
    assert out.flatten().tolist() == [1.0, 2.0, 3.0]
    assert merged.tolist() == lse[0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spreads_to_its_own_row_only(dtype: torch.dtype):
    o, lse = states(3, (4, 70, 6), dtype)
    want, want_lse = merge_states(o, lse)
    lse[1, 2, 65], o[1, 1, 3, 2] = math.nan, math.nan
    lse[1, 1, 3] = 0.0
    want, want_lse = want.clone(), want_lse.clone()
    out, merged = merge_states(o, lse)
    assert out[2, 65].isnan().all()
    assert merged[2, 65].isnan()
    assert out[1, 3].isnan().tolist() == [False, False, True, False, False, False]
    hit = torch.zeros(4, 70, dtype=torch.bool)
    hit[2, 65] = hit[1, 3] = True
    assert torch.equal(out[~hit], want[~hit])
    assert torch.equal(merged[~hit], want_lse[~hit])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (2, 0, 3), (0,)])
def test_empty(shape: tuple[int, ...]):
    o, lse = states(3, shape)
    out, merged = merge_states(o.requires_grad_(), lse.requires_grad_())
    assert (out.shape, merged.shape) == (shape, shape[:-1])
    torch.testing.assert_close(merged.detach(), lse.detach().logsumexp(0))
    (out.sum() + merged[merged > -math.inf].sum()).backward()
    assert o.grad.shape == o.shape


def test_layout_does_not_matter():
    o, lse = states(3, (2, 3, 70, 16), torch.float32)
    want = merge_states(o, lse)
    spread = o.transpose(2, 3).contiguous().transpose(2, 3), lse.transpose(0, 2).contiguous().transpose(0, 2)
    for one, other in zip(merge_states(*spread), want, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        merge_states(o[:, :1].expand(-1, 2, -1, -1, -1), lse[:, :1].expand(-1, 2, -1, -1)), want, strict=True
    ):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[0])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradcheck(parts: int):
    o, lse = states(parts, (2, 3, 4))
    some = (lse > -math.inf).any(0)

    def both(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        out, merged = merge_states(o, torch.where(lse > -50, lse, -math.inf))
        return out, merged[some]

    finite = lse.clamp(min=-100).requires_grad_()
    assert torch.autograd.gradcheck(both, (o.requires_grad_(), finite))
    if parts == 2:
        a, b = (t.detach().clone().requires_grad_() for t in o)
        la, lb = (torch.where(t > -math.inf, t, 0.0).requires_grad_() for t in lse.detach())
        assert torch.autograd.gradcheck(merge_state, (a, la, b, lb))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_those_of_torch(dtype: torch.dtype):
    o, lse = states(3, dtype=dtype)
    leaves = o.requires_grad_(), lse.requires_grad_()
    grads = make(tuple(o.shape[1:]), dtype, 5), make(tuple(lse.shape[1:]), lse.dtype, 6)
    found = torch.autograd.grad(merge_states(*leaves), leaves, grads)
    wide_o, level = o.detach().double(), lse.detach().double()
    total = level.logsumexp(0)
    seen = total > -math.inf
    share = torch.where(seen, (level - total).exp(), 0.0)
    up, down = (g.double() for g in grads)
    merged = (share[..., None] * wide_o).sum(0)
    want = share[..., None] * up, share * ((up * (wide_o - merged)).sum(-1) + down)
    u, stored = roundoff(computing(dtype)), roundoff(dtype)
    # The merged output and log-sum-exp were rounded on their way here.
    rough = (2 * u * total.abs().nan_to_num(0, posinf=0) + 16 * u) * share
    size = (up.abs() * (wide_o.abs() + merged.abs())).sum(-1) + down.abs()
    far = rough[..., None] * up.abs() + stored * want[0].abs() + stored * torch.finfo(dtype).smallest_normal
    assert ((found[0].double() - want[0]).abs() - far).max() <= 0
    far = rough * size + share * stored * (up.abs() * merged.abs()).sum(-1) + u * want[1].abs()
    assert ((found[1].double() - want[1]).abs() - far).max() <= 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parts_without_keys_have_no_gradient(value: float):
    o, lse = states(3)
    nothing = lse == -math.inf
    o[nothing] = value
    grads = make(tuple(o.shape[1:]), torch.float64, 5), make(tuple(lse.shape[1:]), torch.float64, 6)
    grads[0][nothing.all(0)] = value
    leaves = o.requires_grad_(), lse.requires_grad_()
    do, dlse = torch.autograd.grad(merge_states(*leaves), leaves, grads)
    assert (do[nothing] == 0).all()
    assert (dlse[nothing] == 0).all()
    assert do.isfinite().all()
    assert dlse.isfinite().all()


def test_gradients_of_one_result_alone():
    o, lse = (t.requires_grad_() for t in states(2))
    out, merged = merge_states(o, lse)
    do, dlse = torch.autograd.grad(merged[merged > -math.inf].sum(), (o, lse), retain_graph=True)
    assert (do == 0).all()
    share = torch.where(merged > -math.inf, (lse - merged).exp(), 0.0)
    torch.testing.assert_close(dlse, share.detach())
    (alone,) = torch.autograd.grad(out.sum(), o)
    torch.testing.assert_close(alone, share.detach()[..., None].expand(o.shape))
    a, la, b, lb = (t.detach() for t in (o[0], lse[0], o[1], lse[1]))
    (db,) = torch.autograd.grad(merge_state(a, la, b.requires_grad_(), lb)[0].sum(), b)
    torch.testing.assert_close(db, alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype):
    o, lse = states(3, (2, 4, 700, 33), dtype)
    results = []
    for threads in (1, 2, 3, 5):
        shiftkern.set_num_threads(threads)
        leaves = o.clone().requires_grad_(), lse.clone().requires_grad_()
        out, merged = merge_states(*leaves)
        (out.float().square().sum() + torch.where(merged > -math.inf, merged, 0.0).sum()).backward()
        results.append([out.detach(), merged.detach(), *(t.grad for t in leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivatives_raise():
    o, lse = (t.requires_grad_() for t in states(2))
    (g,) = torch.autograd.grad(merge_states(o, lse)[0].square().sum(), o, create_graph=True)
    with pytest.raises(NotDifferentiableError, match=r"merge_states: .*first-order"):
        g.sum().backward()
    a, la, b, lb = (t.detach().requires_grad_() for t in (o[0], lse[0], o[1], lse[1]))
    (g,) = torch.autograd.grad(merge_state(a, la, b, lb)[0].square().sum(), a, create_graph=True)
    with pytest.raises(NotDifferentiableError, match=r"merge_state: .*first-order"):
        g.sum().backward()


def test_compiled_equals_eager():
    torch.compiler.reset()
    o, lse = states(2, dtype=torch.float32)

    def function(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return merge_states(torch.stack(merge_state(o[0], lse[0], o[1], lse[1])[:1]), lse[:1])

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = o.clone().requires_grad_()
        out, merged = call(leaf, lse)
        out.square().sum().backward()
        results.append((out, merged, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


OUT, LSE = states(2, (3, 4), torch.float32)
PAIR = {"o_a": OUT[0], "lse_a": LSE[0], "o_b": OUT[1], "lse_b": LSE[1]}


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"o_a": None}, "o_a", ArgumentTypeError),
        ({"o_a": OUT[0].int()}, "o_a", ArgumentTypeError),
        ({"o_a": torch.tensor(1.0)}, "o_a", ArgumentError),
        ({"lse_a": LSE[0].tolist()}, "lse_a", ArgumentTypeError),
        ({"lse_a": LSE[0].double()}, "lse_a", ArgumentTypeError),
        ({"lse_a": LSE[0].half()}, "lse_a", ArgumentTypeError),
        ({"lse_a": LSE[0][:2]}, "lse_a", ArgumentError),
        ({"lse_a": LSE[0][:, None]}, "lse_a", ArgumentError),
        ({"lse_a": LSE[0].to("meta")}, "lse_a", ArgumentError),
        ({"o_a": OUT[0].half(), "lse_a": LSE[0].half()}, "lse_a", ArgumentTypeError),
        ({"o_b": OUT[1].double(), "lse_b": LSE[1].double()}, "o_b", ArgumentTypeError),
        ({"o_b": OUT[1].half()}, "o_b", ArgumentTypeError),
        ({"o_b": OUT[1][:, :2]}, "o_b", ArgumentError),
        ({"o_b": OUT[1][:2], "lse_b": LSE[1][:2]}, "o_b", ArgumentError),
        ({"o_b": OUT[1].T, "lse_b": LSE[1][[0, 1, 2, 0]]}, "o_b", ArgumentError),
        ({"lse_b": LSE[1][:2]}, "lse_b", ArgumentError),
        ({"lse_b": 1.0}, "lse_b", ArgumentTypeError),
    ],
)
def test_errors_of_two(change: dict, name: str, error: type):
    with pytest.raises(error, match=rf"^merge_state: argument '{name}': expected .*, got "):
        merge_state(**{**PAIR, **change})


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"o": [OUT[0], OUT[1]]}, "o", ArgumentTypeError),
        ({"o": OUT.long()}, "o", ArgumentTypeError),
        ({"o": OUT[0, 0], "lse": LSE[0, 0]}, "o", ArgumentError),
        ({"o": OUT[:0], "lse": LSE[:0]}, "o", ArgumentError),
        ({"lse": None}, "lse", ArgumentTypeError),
        ({"lse": LSE.double()}, "lse", ArgumentTypeError),
        ({"lse": LSE[:1]}, "lse", ArgumentError),
        ({"lse": LSE.T}, "lse", ArgumentError),
    ],
)
def test_errors_of_many(change: dict, name: str, error: type):
    with pytest.raises(error, match=rf"^merge_states: argument '{name}': expected .*, got "):
        merge_states(**{"o": OUT, "lse": LSE, **change})


@pytest.mark.parametrize(
    "arguments",
    [
        ([OUT[0]], []),
        ([OUT[0], OUT[1]], [LSE[0], LSE[1].double()]),
        ([OUT[0], OUT[1].double()], [LSE[0], LSE[1]]),
        ([OUT[0], OUT[1][:2]], [LSE[0], LSE[1]]),
        ([OUT[0], OUT[1]], [LSE[0], LSE[1][:2]]),
        ([OUT[0].int(), OUT[1].int()], [LSE[0], LSE[1]]),
    ],
)
def test_hostile_parts_are_refused_by_the_operator(arguments: tuple[list[Tensor], list[Tensor]]):
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        torch.ops.shiftkern.merge_states_backward(*arguments, OUT[0], LSE[0], OUT[0], None)
    assert isinstance(caught.value, Exception), caught.value
