"""Pointing against loops over steps and inputs, and against the plain form that holds every hidden unit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern.attention.pointer import pointer

from helpers.process import output


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(batch: int = 2, steps: int = 3, n: int = 5, e: int = 4, d: int = 3, k: int = 6) -> list[Tensor]:
    shapes = ((batch, n, e), (batch, steps, d), (k, e), (k, d), (k,))
    return [draw(*shape, seed=i) for i, shape in enumerate(shapes)]


def by_loops(e: Tensor, d: Tensor, W1: Tensor, W2: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    batch, steps, n = d.shape[0], d.shape[1], e.shape[1]
    out = torch.zeros(batch, steps, n, dtype=torch.float64)
    rows = [W1.tolist(), W2.tolist()]
    for b in range(batch):
        for i in range(steps):
            scores = {}
            for j in range(n):
                if mask is None or bool(mask[b, i, j]):
                    hidden = [
                        math.tanh(
                            math.fsum(w * x for w, x in zip(left, e[b, j].tolist(), strict=True))
                            + math.fsum(w * x for w, x in zip(right, d[b, i].tolist(), strict=True))
                        )
                        for left, right in zip(*rows, strict=True)
                    ]
                    scores[j] = math.fsum(x * h for x, h in zip(v.tolist(), hidden, strict=True))
            total = math.fsum(math.exp(s) for s in scores.values())
            for j, s in scores.items():
                out[b, i, j] = math.exp(s) / total
    return out


def plain(e: Tensor, d: Tensor, W1: Tensor, W2: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    u = torch.tanh((e @ W1.T).unsqueeze(1) + (d @ W2.T).unsqueeze(2)) @ v
    return u.masked_fill(~mask, -math.inf).softmax(-1)


@given(
    batch=st.integers(1, 3),
    steps=st.integers(1, 4),
    n=st.integers(1, 6),
    budget=st.sampled_from([1, 60, 200, 500, 2**20]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_loops(batch: int, steps: int, n: int, budget: int, masked: bool, seed: int):
    arguments = problem(batch, steps, n)
    mask = torch.rand(batch, steps, n, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    got, want = pointer(*arguments, mask, budget=budget), by_loops(*arguments, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert torch.equal(got == 0, want == 0)
    torch.testing.assert_close(pointer(*arguments, mask, budget=budget, log=True), want.log(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("budget", [1, 100, 2000, None])
def test_gradients_equal_those_of_the_plain_form(budget: int | None):
    arguments = [t.requires_grad_() for t in problem(3, 4, 7)]
    mask = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., 0] = True
    probe = draw(3, 4, 7, seed=9)
    got, want = (
        torch.autograd.grad((p * probe).sum(), arguments)
        for p in (pointer(*arguments, mask, budget=budget), plain(*arguments, mask))
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("log", [False, True])
def test_gradcheck(log: bool):
    arguments = [t.requires_grad_() for t in problem(2, 2, 3, 2, 2, 3)]
    assert torch.autograd.gradcheck(lambda *a: pointer(*a, log=log, budget=48), arguments)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.autograd.gradcheck(lambda *a: pointer(*a, mask).square(), arguments)
    kept = mask[:1].expand(2, -1)
    assert torch.autograd.gradcheck(lambda *a: pointer(*a, kept, log=True)[..., [0, 2]], arguments)


def test_a_second_derivative_is_refused():
    arguments = [t.requires_grad_() for t in problem()]
    (slope,) = torch.autograd.grad(pointer(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError, match="pointer"):
        slope.sum().backward()


def test_rows_are_distributions_and_inputs_can_be_permuted():
    e, d, *weights = problem()
    got = pointer(e, d, *weights)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(pointer(e[:, order], d, *weights), got[..., order])
    # An input that may not be chosen is as good as absent.
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 2] = False
    rest = [0, 1, 3, 4]
    torch.testing.assert_close(pointer(e, d, *weights, mask)[..., rest], pointer(e[:, rest], d, *weights))


def test_one_step_is_a_row_of_several():
    e, d, *weights = problem()
    mask = torch.rand(2, 3, 5) < 0.7
    for kept in (None, mask):
        want = pointer(e, d, *weights, kept)
        for i in range(3):
            got = pointer(e, d[:, i], *weights, None if kept is None else kept[:, i])
            torch.testing.assert_close(got, want[:, i])
    torch.testing.assert_close(
        pointer(e, d, *weights, mask[:, 0]), pointer(e, d, *weights, mask[:, :1].expand(-1, 3, -1))
    )


def test_choosing_every_input_once():
    e, d, *weights = problem(2, 5, 5)
    free = torch.ones(2, 5, dtype=torch.bool)
    tour = []
    for i in range(5):
        p = pointer(e, d[:, i], *weights, free)
        assert bool((p[~free] == 0).all())
        tour.append(p.argmax(-1))
        free = free.scatter(-1, tour[-1].unsqueeze(-1), False)
    assert torch.stack(tour, -1).sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert bool((pointer(e, d[:, 0], *weights, free) == 0).all())
    assert bool((pointer(e, d[:, 0], *weights, free, log=True) == -math.inf).all())


@pytest.mark.parametrize("budget", [1, None])
def test_what_may_not_be_chosen_never_leaks(budget: int | None):
    e, d, *weights = problem(2, 3, 5)
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[0, :, 1], mask[1, 2], mask[1, 0, 3] = False, False, False
    want = pointer(e, d, *weights, mask, budget=budget)
    e[0, 1], d[1, 2] = math.nan, math.nan
    arguments = [t.requires_grad_() for t in (e, d, *weights)]
    got = pointer(*arguments, mask, budget=budget)
    assert torch.equal(got, want)
    for grad in torch.autograd.grad(got.square().sum(), arguments):
        assert bool(grad.isfinite().all())
    # NaN at an input that the other steps may choose.
    with torch.no_grad():
        e[1, 3] = math.nan
    got = pointer(*arguments, mask, budget=budget)
    assert torch.equal(got[1, 0], want[1, 0])
    assert bool(got[1, 1].isnan().all())
    (of_d,) = torch.autograd.grad(got[1, 0].square().sum(), arguments[1])
    assert bool(of_d[1, 0].isfinite().all())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7), (torch.float32, 1e-5)]
)
def test_narrow_types_are_computed_in_float32(dtype: torch.dtype, tolerance: float):
    arguments = [t.to(dtype).requires_grad_() for t in problem(2, 4, 9)]
    got = pointer(*arguments)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), pointer(*(t.double() for t in arguments)), rtol=tolerance, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pointer(*arguments), got)
    for grad in torch.autograd.grad(got.square().sum(), arguments):
        assert grad.dtype == dtype


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
def test_edge_shapes(shape: tuple[int, int, int]):
    arguments = [t.requires_grad_() for t in problem(*shape)]
    for mask in (None, torch.ones(shape, dtype=torch.bool)):
        got = pointer(*arguments, mask)
        assert got.shape == shape
        got.sum().backward()
    assert bool((pointer(*problem(2, 3, 4, 0, 0, 0)) == 0.25).all())


def test_hidden_units_are_never_held():
    # 512 MiB of hidden units, in a process that may grow by 64 MiB in both passes together.
    result = output(
        """
        import resource, torch
        from shiftkern.attention.pointer import pointer
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        def step(steps, n, width=128):
            arguments = [torch.randn(*s, requires_grad=True) for s in
                         ((1, n, 8), (1, steps, 8), (width, 8), (width, 8), (width,))]
            pointer(*arguments).square().sum().backward()
        step(4, 4)
        before = peak()
        step(1024, 1024)
        assert peak() - before < 64, (before, peak())
        print("bounded")
        """
    )
    assert result == "bounded"


E, D, W1, W2, V = torch.ones(2, 5, 4), torch.ones(2, 3, 4), torch.ones(6, 4), torch.ones(6, 4), torch.ones(6)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"encoder_states": E[0]}, "encoder_states", ValueError),
        ({"encoder_states": E.long()}, "encoder_states", TypeError),
        ({"encoder_states": E.numpy()}, "encoder_states", TypeError),
        ({"decoder_states": D[0, 0]}, "decoder_states", ValueError),
        ({"decoder_states": D[:1]}, "decoder_states", ValueError),
        ({"decoder_states": D.double()}, "decoder_states", TypeError),
        ({"decoder_states": D.to("meta")}, "decoder_states", ValueError),
        ({"W1": W1[:5]}, "W1", ValueError),
        ({"W1": W1[:, :3]}, "W1", ValueError),
        ({"W1": None}, "W1", TypeError),
        ({"W2": W2.T}, "W2", ValueError),
        ({"W2": W2.half()}, "W2", TypeError),
        ({"v": W1}, "v", ValueError),
        ({"v": 1.0}, "v", TypeError),
        ({"mask": torch.ones(2, 5)}, "mask", TypeError),
        ({"mask": torch.ones(2, 3).bool()}, "mask", ValueError),
        ({"mask": torch.ones(2, 1, 5).bool()}, "mask", ValueError),
        ({"mask": torch.ones(2, 3, 5).bool(), "decoder_states": D[:, 0]}, "mask", ValueError),
        ({"log": 1}, "log", TypeError),
        ({"budget": 0}, "budget", ValueError),
    ],
)
def test_errors_name_operator_and_argument(change: dict[str, Any], name: str, error: type):
    with pytest.raises(error, match=f"pointer: argument '{name}': expected .*, got ") as caught:
        pointer(**{"encoder_states": E, "decoder_states": D, "W1": W1, "W2": W2, "v": V, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
