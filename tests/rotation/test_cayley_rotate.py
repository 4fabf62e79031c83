"""Block-diagonal rotations against dense matrices, and the series against the exact transform."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.rotation import cayley_rotate, orthogonality_error, to_matrix

from helpers.rotation import (
    SIZES,
    WIDTHS,
    assert_rows_do_not_meet,
    assert_same_bits_at_any_number_of_threads,
    assert_within,
    cayley_blocks,
    joined,
    lengths,
    skew_matrix,
)
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64


def divisors(d: int) -> list[int]:
    return [b for b in (1, 2, 3, 4, 5, 8, 31, 32, 43, 128, 150) if d % b == 0]


def skew_for(d: int, b: int, dtype: torch.dtype = D, size: float = 1.0) -> Tensor:
    return (make((d // b, b * (b - 1) // 2), D, 3, mean=0.0) * size / math.sqrt(b)).to(dtype)


def series(skew: Tensor, b: int, terms: int) -> Tensor:
    """``I + 2 Q + 2 Q^2 + .. + Q^(terms - 1)`` of each block."""
    found = []
    for entries in skew:
        Q, total = skew_matrix(entries, b), torch.eye(b, dtype=D)
        for n in range(1, terms):
            total = total + (1 if n == terms - 1 else 2) * torch.linalg.matrix_power(Q, n)
        found.append(total)
    return torch.stack(found)


@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_equals_the_dense_matrix(rows: int, d: int):
    for b in divisors(d):
        skew = skew_for(d, b)
        matrix = joined(d, cayley_blocks(skew, b)[None])
        for dtype in DTYPES:
            x = make((rows, d), dtype, 1)
            for transpose in (False, True):
                y = cayley_rotate(x, skew, block_size=b, transpose=transpose)
                assert y.dtype == dtype
                want = x.double() @ (matrix if transpose else matrix.mT)
                assert_within(y, want, lengths(x), 2 * b + 16)


@pytest.mark.parametrize("d", WIDTHS)
def test_orthogonal_and_undone_by_the_transpose(d: int):
    for b in divisors(d):
        skew = skew_for(d, b)
        assert orthogonality_error(to_matrix("cayley_rotate", {"skew": skew, "block_size": b}, d)) < 1e-13
        x = make((9, d), D)
        back = cayley_rotate(cayley_rotate(x, skew, block_size=b), skew, block_size=b, transpose=True)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


def test_wide_blocks():
    """Beyond the width up to which blocks are solved by the library's own elimination."""
    for b in (128, 129, 200):
        skew, x = skew_for(b, b), make((3, b), D)
        torch.testing.assert_close(
            cayley_rotate(x, skew, block_size=b), x @ cayley_blocks(skew, b)[0].mT, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("block_size", [1, 3, 9])
def test_zeros_are_the_identity(block_size: int):
    for dtype in DTYPES:
        x = make((5, 9), dtype)
        skew = torch.zeros(9 // block_size, block_size * (block_size - 1) // 2)
        for method in ("solve", "neumann"):
            assert torch.equal(cayley_rotate(x, skew, block_size=block_size, method=method), x)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6, 9])
def test_the_series_has_these_terms(terms: int, transpose: bool):
    skew, x = skew_for(12, 4), make((7, 12), D)
    matrix = joined(12, series(skew, 4, terms)[None])
    y = cayley_rotate(x, skew, block_size=4, method="neumann", terms=terms, transpose=transpose)
    torch.testing.assert_close(y, x @ (matrix if transpose else matrix.mT), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("transpose", [False, True])
def test_the_series_goes_to_the_exact_transform_and_not_to_its_transpose(transpose: bool):
    skew, x = skew_for(12, 4, size=0.2), make((7, 12), D)
    options = {"block_size": 4, "transpose": transpose}
    exact = cayley_rotate(x, skew, **options)
    norm = max(float(torch.linalg.matrix_norm(skew_matrix(s, 4), 2)) for s in skew)
    assert norm < 0.6
    errors = []
    for terms in (2, 5, 10, 20, 60):
        y = cayley_rotate(x, skew, method="neumann", terms=terms, **options)
        errors.append(float((y - exact).norm() / x.norm()))
        # What the series leaves out: Q^(terms - 1) and twice all powers from there on.
        assert errors[-1] <= norm ** (terms - 1) * (1 + 2 * norm / (1 - norm)) + 1e-13
    assert errors == sorted(errors, reverse=True)
    other = cayley_rotate(x, skew, block_size=4, transpose=not transpose)
    assert (other - exact).norm() / x.norm() > 0.05


def test_the_series_is_no_rotation():
    params = {"skew": skew_for(8, 4), "block_size": 4, "method": "neumann"}
    assert orthogonality_error(to_matrix("cayley_rotate", params, 8)) > 0.01


@pytest.mark.parametrize("method", ["solve", "neumann"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_are_widened(dtype: torch.dtype, method: str):
    x, skew = make((5, 12)), skew_for(12, 4, dtype, 0.3)
    options = {"block_size": 4, "method": method}
    assert torch.equal(cayley_rotate(x, skew, **options), cayley_rotate(x, skew.float(), **options))
    wide = cayley_rotate(x.double(), skew, **options)
    assert torch.equal(wide, cayley_rotate(x.double(), skew.double(), **options))
    leaf = skew.requires_grad_()
    assert torch.autograd.grad(cayley_rotate(x, leaf, **options).sum(), leaf)[0].dtype == dtype


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12), (2, 0, 12)])
def test_leading_dimensions(shape: tuple[int, ...]):
    x, skew = make(shape), skew_for(12, 3)
    y = cayley_rotate(x, skew, block_size=3)
    assert y.shape == shape
    assert torch.equal(y.reshape(-1, 12), cayley_rotate(x.reshape(-1, 12), skew, block_size=3))


@pytest.mark.parametrize("method", ["solve", "neumann"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str, method: str):
    x, skew = lay_out(make((6, 4, 12)), layout), lay_out(skew_for(12, 4, torch.float32), layout)
    g = lay_out(make((6, 4, 12), seed=5), layout)
    results = []
    for leaves in ([x, skew], [x.contiguous(), skew.contiguous()]):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = cayley_rotate(*leaves, block_size=4, method=method)
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("method", ["solve", "neumann"])
@pytest.mark.parametrize(("d", "b"), [(1, 1), (2, 2), (5, 5), (12, 3)])
def test_gradcheck(d: int, b: int, method: str, transpose: bool):
    x, skew = make((3, d), D).requires_grad_(), skew_for(d, b).requires_grad_()
    options = {"block_size": b, "method": method, "transpose": transpose}
    assert torch.autograd.gradcheck(lambda x, skew: cayley_rotate(x, skew, **options), (x, skew))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "b"), [(1, 33, 11), (33, 129, 43), (500, 256, 32), (0, 6, 3), (40, 136, 136)])
def test_gradients_equal_those_of_the_dense_matrix(rows: int, d: int, b: int, dtype: torch.dtype):
    transpose = d == 129
    parameters = D if dtype == D else torch.float32
    x, skew = make((rows, d), dtype).requires_grad_(), skew_for(d, b, parameters).requires_grad_()
    grad = make((rows, d), dtype, 9)
    got = torch.autograd.grad(cayley_rotate(x, skew, block_size=b, transpose=transpose), (x, skew), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, skew)]
    matrix = joined(d, cayley_blocks(wide[1], b)[None])
    want = torch.autograd.grad(wide[0] @ (matrix if transpose else matrix.mT), wide, grad.double())
    assert [g.dtype for g in got] == [dtype, parameters]
    assert_within(got[0], want[0], lengths(grad), 2 * b + 16)
    assert_within(got[1], want[1], 2 * (lengths(grad) * lengths(x.detach())).sum(), b + 64)


def test_second_derivatives_are_refused():
    x, skew = make((3, 6), D).requires_grad_(), skew_for(6, 3).requires_grad_()
    (first,) = torch.autograd.grad(cayley_rotate(x, skew, block_size=3).square()[0].sum(), skew, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


@pytest.mark.parametrize(("b", "rows"), [(3, 5003), (32, 1003), (128, 301)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_number_of_threads(b: int, rows: int, dtype: torch.dtype):
    d = 384
    assert_same_bits_at_any_number_of_threads(
        lambda x, skew: cayley_rotate(x, skew, block_size=b), [make((rows, d), dtype), skew_for(d, b, torch.float32)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [1, 3, 12])
def test_rows_do_not_meet(b: int, dtype: torch.dtype):
    skew = skew_for(12, b, torch.float32)
    assert_rows_do_not_meet(lambda x: cayley_rotate(x, skew, block_size=b), 12, dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_block(value: float):
    x, skew = make((40, 6)), skew_for(6, 3, torch.float32).requires_grad_()
    x[35, 1] = value
    y = cayley_rotate(x, skew, block_size=3)
    assert not y[35, :3].isfinite().any()
    assert y[35, 3:].isfinite().all()
    (grad,) = torch.autograd.grad(y.sum(), skew)
    assert not grad[0].isfinite().any()
    assert grad[1].isfinite().all()
    bad = skew.detach().clone()
    bad[0, 1] = value
    for method in ("solve", "neumann"):
        y = cayley_rotate(make((2, 6)), bad, block_size=3, method=method)
        assert not y[:, :3].isfinite().all(1).any()
        assert y[:, 3:].isfinite().all()


@pytest.mark.parametrize("method", ["solve", "neumann"])
def test_autocast_changes_nothing(method: str):
    x, skew = make((3, 9)), skew_for(9, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cayley_rotate(x, skew, block_size=3, method=method)
    assert torch.equal(inside, cayley_rotate(x, skew, block_size=3, method=method))


@pytest.mark.parametrize("b", [1, 3, 4, 12])
def test_agrees_with_peft(b: int):
    """Its exact path; its series belongs to the transposed rotation."""
    layers = pytest.importorskip("peft.tuners.oft.layer")
    x, skew = make((5, 12)), skew_for(12, b, torch.float32, 0.2)
    for neumann in (False, True):
        module = layers.OFTRotationModule(12 // b, b * (b - 1) // 2, b, 12, use_cayley_neumann=neumann)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.weight.copy_(skew)
            theirs = module(x)
        method = "neumann" if neumann else "solve"
        ours = cayley_rotate(x, skew, block_size=b, method=method, transpose=neumann)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


X, SKEW = torch.zeros(2, 6), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": X.long()}, "x", TypeError),
        ({"x": None}, "x", TypeError),
        ({"x": X[0, 0]}, "x", ValueError),
        ({"x": X[:, :0], "skew": SKEW[:0]}, "x", ValueError),
        ({"skew": SKEW[:1]}, "skew", ValueError),
        ({"skew": SKEW.reshape(-1)}, "skew", ValueError),
        ({"skew": SKEW[:, :2]}, "skew", ValueError),
        ({"skew": torch.zeros(2, 3, 3)}, "skew", ValueError),
        ({"skew": SKEW.int()}, "skew", TypeError),
        ({"skew": SKEW.tolist()}, "skew", TypeError),
        ({"skew": SKEW.to("meta")}, "skew", ValueError),
        ({"block_size": 4}, "block_size", ValueError),
        ({"block_size": 12}, "block_size", ValueError),
        ({"block_size": 0}, "block_size", ValueError),
        ({"block_size": -3}, "block_size", ValueError),
        ({"block_size": 3.0}, "block_size", TypeError),
        ({"block_size": True}, "block_size", TypeError),
        ({"method": "exact"}, "method", ValueError),
        ({"method": None}, "method", TypeError),
        ({"terms": 0}, "terms", ValueError),
        ({"terms": 5.0}, "terms", TypeError),
        ({"transpose": 0}, "transpose", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"cayley_rotate: argument '{name}': expected .*, got ") as caught:
        cayley_rotate(**{"x": X, "skew": SKEW, "block_size": 3, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
