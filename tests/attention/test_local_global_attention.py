"""Mixed attention against loops over keys and a dense form that autograd differentiates; memory and transforms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.attention.local_global_attention import LocalGlobalAttention, _argmax, local_global_attention

from helpers.process import output


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(batch: int, heads: int, n: int, m: int, d: int, e: int, seed: int = 0) -> list[Tensor]:
    shapes = ((batch, heads, n, d), (batch, heads, m, d), (batch, heads, m, e), (batch, heads, n))
    return [draw(*shape, seed=100 * seed + i) for i, shape in enumerate(shapes)]


def by_loops(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, window: int, mask: Tensor | None = None) -> Tensor:
    """The formula in Python's numbers, one query after the other."""
    batch, heads, n, d = q.shape
    out = torch.zeros(batch, heads, n, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        kept = [j for j in range(k.shape[2]) if mask is None or bool(mask[b, j])]
        if not kept:
            continue
        for h in range(heads):
            keys, values = k[b, h].tolist(), v[b, h].double()
            for i in range(n):
                query = q[b, h, i].tolist()
                s = {j: math.fsum(x * y for x, y in zip(query, keys[j], strict=True)) / math.sqrt(d) for j in kept}
                centre = max(kept, key=lambda j, s=s: s[j])
                gate = 1 / (1 + math.exp(-float(gate_logits[b, h, i])))
                for share, places in ((gate, kept), (1 - gate, [j for j in kept if abs(j - centre) <= window])):
                    powers = {j: math.exp(s[j] - s[centre]) for j in places}
                    total = math.fsum(powers.values())
                    for j in places:
                        out[b, h, i] += share * powers[j] / total * values[j]
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, window: int, mask: Tensor | None = None) -> Tensor:
    """With whole matrices, for autograd."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    distance = (torch.arange(k.shape[2]) - scores.detach().argmax(-1, keepdim=True)).abs()
    local = scores.masked_fill(distance > window, -math.inf).softmax(-1)
    gate = gate_logits.sigmoid().unsqueeze(-1)
    return (gate * scores.softmax(-1) + (1 - gate) * local) @ v


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    n=st.integers(1, 6),
    m=st.integers(1, 9),
    window=st.integers(0, 10),
    budget=st.sampled_from([1, 100, 300, 2**20]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_loops_over_keys(
    batch: int, heads: int, n: int, m: int, window: int, budget: int, masked: bool, seed: int
):
    inputs = problem(batch, heads, n, m, 3, 4, seed)
    mask = torch.rand(batch, m, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    got = local_global_attention(*inputs, win_size=window, key_mask=mask, budget=budget)
    torch.testing.assert_close(got, by_loops(*inputs, window, mask), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("budget", [1, 5000, None])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_equal_the_dense_form(budget: int | None, masked: bool):
    inputs = [t.requires_grad_() for t in problem(2, 2, 17, 300, 4, 5)]
    mask = None
    if masked:
        mask = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    got, want = local_global_attention(*inputs, win_size=4, key_mask=mask, budget=budget), dense(*inputs, 4, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    probe = draw(*got.shape, seed=9)
    for ours, theirs in zip(*(torch.autograd.grad((o * probe).sum(), inputs) for o in (got, want)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [0, 1, 8])
@pytest.mark.parametrize("budget", [1, 2**20])
def test_gradcheck(window: int, budget: int):
    inputs = [t.requires_grad_() for t in problem(1, 2, 3, 5, 2, 2)]
    mask = torch.tensor([[True, True, False, True, True]])

    def call(*inputs: Tensor) -> Tensor:
        return local_global_attention(*inputs, win_size=window, key_mask=mask, budget=budget)

    assert torch.autograd.gradcheck(call, inputs)


def test_gradcheck_with_dropout():
    inputs = [t.requires_grad_() for t in problem(1, 2, 3, 5, 2, 2)]

    def call(*inputs: Tensor) -> Tensor:
        source = torch.Generator().manual_seed(3)
        return local_global_attention(*inputs, win_size=1, dropout=0.4, generator=source, budget=100)

    assert torch.autograd.gradcheck(call, inputs)


def test_a_second_derivative_is_refused():
    inputs = [t.requires_grad_() for t in problem(1, 1, 2, 3, 2, 2)]
    (slope,) = torch.autograd.grad(local_global_attention(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError, match="local_global_attention"):
        slope.sum().backward()


def test_the_gate_goes_from_local_to_global():
    q, k, v, gate = problem(1, 2, 5, 40, 4, 3)
    all_keys = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(local_global_attention(q, k, v, gate + 100), all_keys)
    # A window without neighbours returns the value of the best key.
    best = (q @ k.mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 3)
    torch.testing.assert_close(local_global_attention(q, k, v, gate - 100, win_size=0), v.gather(2, best))
    half = local_global_attention(q, k, v, torch.zeros_like(gate), win_size=0)
    torch.testing.assert_close(half, (all_keys + v.gather(2, best)) / 2)
    # A window as wide as the keys makes the gate irrelevant.
    for width in (39, 1000):
        torch.testing.assert_close(local_global_attention(q, k, v, gate, win_size=width), all_keys)


def test_weights_sum_to_one_and_a_shift_of_the_keys_shifts_the_window():
    q, k, v, gate = problem(2, 2, 5, 30, 4, 3)
    ones = torch.ones_like(v)
    torch.testing.assert_close(local_global_attention(q, k, ones, gate), ones[:, :, :5])
    # Keys in reverse have the same neighbours.
    got = local_global_attention(q, k.flip(2), v.flip(2), gate)
    torch.testing.assert_close(got, local_global_attention(q, k, v, gate))
    # Keys of score 0 around the window of the best key change the global part only.
    alone = local_global_attention(q, k, v, gate - 100, win_size=30)
    padded = local_global_attention(
        q, *(torch.nn.functional.pad(t, (0, 0, 31, 31)) for t in (k, v)), gate - 100, win_size=0
    )
    best = local_global_attention(q, k, v, gate - 100, win_size=0)
    torch.testing.assert_close(padded, best)
    assert not torch.allclose(alone, best)


def test_scale():
    q, k, v, gate = problem(1, 2, 5, 9, 4, 3)
    want = local_global_attention(3 * q, k, v, gate)
    torch.testing.assert_close(local_global_attention(q, k, v, gate, scale=1.5), want)


@pytest.mark.parametrize("budget", [1, 200, None])
def test_hidden_keys_never_leak(budget: int | None):
    q, k, v, gate = problem(3, 2, 4, 6, 3, 2)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 2:4], mask[1] = False, False
    want = local_global_attention(q, k, v, gate, key_mask=mask)
    assert bool((want[1] == 0).all())
    k[0, :, 2:4], v[0, :, 2:4], k[1], v[1], q[1], gate[1] = (math.nan,) * 6
    inputs = [t.requires_grad_() for t in (q, k, v, gate)]
    got = local_global_attention(*inputs, key_mask=mask, budget=budget)
    assert torch.equal(got, want)
    for grad in torch.autograd.grad(got.square().sum(), inputs):
        assert bool(grad.isfinite().all())
        assert bool((grad[1] == 0).all())
        if grad.shape[2] == 6:
            assert bool((grad[0, :, 2:4] == 0).all())


def test_attended_nan_propagates():
    q, k, v, gate = problem(1, 1, 3, 300, 3, 2)
    for place in (0, 150, 299):
        broken = k.clone()
        broken[0, 0, place, 0] = math.nan
        assert bool(local_global_attention(q, broken, v, gate).isnan().all())
    q[0, 0, 1, 0] = math.inf
    got = local_global_attention(q, k, v, gate)
    assert got.isnan().any(-1).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("m", [1, 5, 255, 256, 257, 319, 320, 700])
def test_argmax_is_the_first_largest(m: int):
    scores = draw(50, m).mul(2).round()
    assert torch.equal(_argmax(scores), scores.argmax(-1, keepdim=True))
    for place in {0, m // 2, m - 1}:
        scores = draw(3, m)
        scores[0, place], scores[1] = math.nan, -math.inf
        assert torch.equal(_argmax(scores), scores.argmax(-1, keepdim=True))


def test_dropout():
    q, k, v, gate = problem(1, 1, 400, 50, 4, 1)
    eye = torch.eye(50, dtype=torch.float64).expand(1, 1, 50, 50)
    want = local_global_attention(q, k, eye, gate, win_size=2)
    got = local_global_attention(q, k, eye, gate, win_size=2, dropout=0.25, generator=torch.Generator().manual_seed(0))
    dropped = got == 0
    assert abs(float(dropped.double().mean()) - 0.25) < 0.01
    torch.testing.assert_close(got[~dropped], want[~dropped] / 0.75)
    source = torch.Generator().manual_seed(0)
    first, second = (
        local_global_attention(q, k, eye, gate, win_size=2, dropout=0.25, generator=source) for _ in range(2)
    )
    assert torch.equal(first, got)
    assert not torch.equal(second, got)
    # Tiles are not dropped alike.
    rows = local_global_attention(q, k, eye, gate, dropout=0.25, generator=source, budget=1)[0, 0] == 0
    assert len({tuple(row.tolist()) for row in rows}) == 400
    # The global generator is left alone.
    state = torch.get_rng_state()
    local_global_attention(q, k, v, gate, dropout=0.25, generator=source)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 1e-5)]
)
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype, tolerance: float):
    q, k, v, gate = (t.to(dtype) for t in problem(2, 2, 9, 300, 8, 4))
    got = local_global_attention(q, k, v, gate.float())
    assert got.dtype == dtype
    wide = local_global_attention(*(t.double() for t in (q, k, v, gate)))
    torch.testing.assert_close(got.double(), wide, rtol=tolerance, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(local_global_attention(q, k, v, gate.float()), got)
    inputs = [t.requires_grad_() for t in (q, k, v, gate)]
    for grad in torch.autograd.grad(local_global_attention(*inputs).sum(), inputs):
        assert grad.dtype == dtype


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 1, 1)])
def test_edge_shapes(shape: tuple[int, ...]):
    batch, heads, n, m = shape
    inputs = [t.requires_grad_() for t in problem(batch, heads, n, m, 3, 2)]
    for mask in (None, torch.ones(batch, m, dtype=torch.bool)):
        got = local_global_attention(*inputs, key_mask=mask)
        assert got.shape == (batch, heads, n, 2)
        got.sum().backward()
        assert m > 0 or bool((got == 0).all())
    assert local_global_attention(*problem(1, 2, 3, 4, 0, 2)).shape == (1, 2, 3, 2)
    assert local_global_attention(*problem(1, 2, 3, 4, 2, 0)).shape == (1, 2, 3, 0)


def test_memory_order_does_not_matter():
    q, k, v, gate = problem(2, 3, 8, 9, 4, 4)
    want = local_global_attention(q, k, v, gate)
    others = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(local_global_attention(*others, gate), want)
    same = local_global_attention(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), gate)
    torch.testing.assert_close(same[0], want[0])


def test_the_matrix_of_scores_is_never_held():
    # 256 MiB of scores, in a process that may grow by 64 MiB in both passes together.
    result = output(
        """
        import resource, torch
        from shiftkern.attention.local_global_attention import local_global_attention
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        def step(n):
            q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
            local_global_attention(q, k, v, torch.zeros(1, 1, n)).sum().backward()
        step(512)
        before = peak()
        step(8192)
        assert peak() - before < 64, (before, peak())
        print("bounded")
        """
    )
    assert result == "bounded"


def test_the_module_shares_its_gate_between_heads():
    attention = LocalGlobalAttention(4, win_size=2, dropout=0.5)
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == {
        "gate.weight": (1, 4),
        "gate.bias": (1,),
    }
    q, k, v, _ = (t.float() for t in problem(2, 3, 5, 9, 4, 6))
    logits = torch.einsum("bhnd,d->bhn", q / 2, attention.gate.weight[0]) + attention.gate.bias
    want = dense(q, k, v, logits, 2)
    torch.testing.assert_close(attention.eval()(q, k, v), want)
    attention.train()
    got = attention(q, k, v, generator=torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(0)
    torch.testing.assert_close(got, local_global_attention(q, k, v, logits, win_size=2, dropout=0.5, generator=source))
    got.sum().backward()
    assert attention.gate.weight.grad.abs().sum() > 0
    mask = torch.rand(2, 9) < 0.5
    torch.testing.assert_close(attention.eval()(q, k, v, key_mask=mask), dense(q, k, v, logits, 2, mask))
    assert attention(q.half(), k.half(), v.half()).dtype == torch.float16
    assert attention.double()(q.double(), k.double(), v.double()).dtype == torch.float64


Q, GATE = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"q": Q[0]}, "q", ValueError),
        ({"q": Q.long()}, "q", TypeError),
        ({"k": Q[..., :4]}, "k", ValueError),
        ({"k": Q[:, :1], "v": Q[:, :1]}, "k", ValueError),
        ({"k": Q.double()}, "k", TypeError),
        ({"v": Q[:, :, :3]}, "v", ValueError),
        ({"v": None}, "v", TypeError),
        ({"gate_logits": GATE[:, :, :3]}, "gate_logits", ValueError),
        ({"gate_logits": GATE.unsqueeze(-1)}, "gate_logits", ValueError),
        ({"gate_logits": GATE.long()}, "gate_logits", TypeError),
        ({"gate_logits": 0.5}, "gate_logits", TypeError),
        ({"win_size": -1}, "win_size", ValueError),
        ({"win_size": 1.0}, "win_size", TypeError),
        ({"scale": math.nan}, "scale", ValueError),
        ({"scale": "1"}, "scale", TypeError),
        ({"key_mask": torch.ones(2, 4)}, "key_mask", TypeError),
        ({"key_mask": torch.ones(2, 5).bool()}, "key_mask", ValueError),
        ({"key_mask": torch.ones(2, 4, device="meta").bool()}, "key_mask", ValueError),
        ({"dropout": 1.0}, "dropout", ValueError),
        ({"dropout": -0.1}, "dropout", ValueError),
        ({"dropout": 0.5}, "generator", ValueError),
        ({"generator": 0}, "generator", TypeError),
        ({"budget": 0}, "budget", ValueError),
        ({"budget": 1e6}, "budget", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict[str, Any], name: str, error: type):
    with pytest.raises(error, match=f"local_global_attention: argument '{name}': expected .*, got ") as caught:
        local_global_attention(**{"q": Q, "k": Q, "v": Q, "gate_logits": GATE, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"head_dim": 0}, "head_dim", ValueError),
        ({"win_size": -1}, "win_size", ValueError),
        ({"scale": "1"}, "scale", TypeError),
        ({"dropout": 1.0}, "dropout", ValueError),
    ],
)
def test_errors_of_the_module_name_the_argument(change: dict[str, Any], name: str, error: type):
    with pytest.raises(error, match=f"LocalGlobalAttention: argument '{name}': expected .*, got "):
        LocalGlobalAttention(**{"head_dim": 5, **change})
    if name == "head_dim":
        with pytest.raises(ValueError, match=r"LocalGlobalAttention: argument 'q': expected shape .*, 5., got "):
            LocalGlobalAttention(5)(Q[..., :4], Q[..., :4], Q)
