"""Butterfly factors against dense matrices written block by block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import shiftkern
from shiftkern.rotation import butterfly_rotate, cayley_rotate, orthogonality_error, to_matrix

from helpers.rotation import (
    assert_rows_do_not_meet,
    assert_same_bits_at_any_number_of_threads,
    assert_within,
    cayley_blocks,
    joined,
    lengths,
    members,
)
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64

#: Width, block size and number of factors.
SHAPES = [
    (1, 1, 1),
    (2, 2, 1),
    (3, 3, 1),
    (5, 1, 1),
    (4, 2, 2),
    (8, 2, 3),
    (8, 4, 2),
    (12, 2, 2),
    (24, 6, 2),
    (32, 2, 5),
    (33, 11, 1),
    (96, 8, 3),
    (128, 2, 7),
    (128, 64, 2),
    (129, 43, 1),
    (256, 8, 4),
    (256, 2, 8),
    (264, 6, 3),
    (300, 10, 2),
]


def skew_for(d: int, b: int, m: int, dtype: torch.dtype = D) -> Tensor:
    return (make((m, d // b, b * (b - 1) // 2), D, 3, mean=0.0) / math.sqrt(b)).to(dtype)


@pytest.mark.parametrize(("d", "b", "m"), SHAPES)
def test_equals_the_dense_matrix(d: int, b: int, m: int):
    skew = skew_for(d, b, m)
    matrix = joined(d, cayley_blocks(skew, b))
    for rows in (0, 1, 31, 32, 33, 100):
        for dtype in DTYPES:
            x = make((rows, d), dtype, 1)
            for transpose in (False, True):
                y = butterfly_rotate(x, skew, block_size=b, factors=m, transpose=transpose)
                assert y.dtype == dtype
                want = x.double() @ (matrix if transpose else matrix.mT)
                assert_within(y, want, lengths(x), m * (2 * b + 16))


@pytest.mark.parametrize(("d", "b", "m"), SHAPES)
def test_orthogonal_and_undone_by_the_transpose(d: int, b: int, m: int):
    skew = skew_for(d, b, m)
    matrix = to_matrix("butterfly_rotate", {"skew": skew, "block_size": b, "factors": m}, d)
    assert orthogonality_error(matrix) < 1e-13
    x, options = make((9, d), D), {"block_size": b, "factors": m}
    back = butterfly_rotate(butterfly_rotate(x, skew, **options), skew, transpose=True, **options)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("d", "b"), [(12, 3), (32, 8), (5, 5)])
def test_one_factor_is_block_diagonal(d: int, b: int):
    x, skew = make((5, d)), skew_for(d, b, 1, torch.float32)
    for transpose in (False, True):
        y = butterfly_rotate(x, skew, block_size=b, factors=1, transpose=transpose)
        assert torch.equal(y, cayley_rotate(x, skew[0], block_size=b, transpose=transpose))


def test_enough_factors_join_every_pair_of_coordinates():
    skew = skew_for(32, 2, 5)
    assert to_matrix("butterfly_rotate", {"skew": skew, "block_size": 2, "factors": 5}, 32).abs().min() > 1e-12
    fewer = to_matrix("butterfly_rotate", {"skew": skew[:4], "block_size": 2, "factors": 4}, 32)
    assert fewer[:16, 16:].eq(0).all()


@pytest.mark.parametrize(("d", "b", "m"), [(16, 4, 3), (24, 6, 2), (12, 2, 2)])
def test_a_factor_joins_units_so_far_apart(d: int, b: int, m: int):
    """One block at a time moves exactly its own coordinates."""
    half = b // 2
    for factor in range(m):
        for number in range(d // b):
            skew = torch.zeros(m, d // b, b * (b - 1) // 2, dtype=D)
            skew[factor, number] = 1.0
            matrix = to_matrix("butterfly_rotate", {"skew": skew, "block_size": b, "factors": m}, d)
            moved = (matrix - torch.eye(d, dtype=D)).abs().amax(1).gt(1e-12).nonzero().flatten().tolist()
            assert moved == members(factor, number, b)
            assert moved[half] // half - moved[0] // half == 1 << factor


def test_zeros_are_the_identity():
    for dtype in DTYPES:
        x = make((5, 16), dtype)
        assert torch.equal(butterfly_rotate(x, torch.zeros(3, 4, 6), block_size=4, factors=3), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_are_widened(dtype: torch.dtype):
    x, skew, options = make((5, 16)), skew_for(16, 4, 3, dtype), {"block_size": 4, "factors": 3}
    assert torch.equal(butterfly_rotate(x, skew, **options), butterfly_rotate(x, skew.float(), **options))


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)])
def test_leading_dimensions(shape: tuple[int, ...]):
    x, skew, options = make(shape), skew_for(8, 2, 3), {"block_size": 2, "factors": 3}
    y = butterfly_rotate(x, skew, **options)
    assert y.shape == shape
    assert torch.equal(y.reshape(-1, 8), butterfly_rotate(x.reshape(-1, 8), skew, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str):
    x, skew = lay_out(make((6, 4, 16)), layout), lay_out(skew_for(16, 4, 2, torch.float32), layout)
    g = lay_out(make((6, 4, 16), seed=5), layout)
    results = []
    for leaves in ([x, skew], [x.contiguous(), skew.contiguous()]):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = butterfly_rotate(*leaves, block_size=4, factors=2)
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("d", "b", "m"), [(1, 1, 1), (6, 3, 1), (4, 2, 2), (8, 4, 2), (8, 2, 3)])
def test_gradcheck(d: int, b: int, m: int, transpose: bool):
    x, skew = make((3, d), D).requires_grad_(), skew_for(d, b, m).requires_grad_()
    options = {"block_size": b, "factors": m, "transpose": transpose}
    assert torch.autograd.gradcheck(lambda x, skew: butterfly_rotate(x, skew, **options), (x, skew))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "b", "m"), [(1, 32, 2, 5), (33, 96, 8, 3), (300, 264, 6, 3), (0, 4, 2, 2)])
def test_gradients_equal_those_of_the_dense_matrix(rows: int, d: int, b: int, m: int, dtype: torch.dtype):
    transpose = d == 96
    parameters = D if dtype == D else torch.float32
    x, skew = make((rows, d), dtype).requires_grad_(), skew_for(d, b, m, parameters).requires_grad_()
    grad, options = make((rows, d), dtype, 9), {"block_size": b, "factors": m, "transpose": transpose}
    got = torch.autograd.grad(butterfly_rotate(x, skew, **options), (x, skew), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, skew)]
    matrix = joined(d, cayley_blocks(wide[1], b))
    want = torch.autograd.grad(wide[0] @ (matrix if transpose else matrix.mT), wide, grad.double())
    assert [g.dtype for g in got] == [dtype, parameters]
    assert_within(got[0], want[0], lengths(grad), m * (2 * b + 16))
    assert_within(got[1], want[1], 2 * (lengths(grad) * lengths(x.detach())).sum(), m * (b + 16) + 64)


def test_second_derivatives_are_refused():
    x, skew = make((3, 8), D).requires_grad_(), skew_for(8, 2, 3).requires_grad_()
    y = butterfly_rotate(x, skew, block_size=2, factors=3)
    (first,) = torch.autograd.grad(y.square()[0].sum(), skew, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


@pytest.mark.parametrize(("b", "m"), [(2, 7), (16, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_at_any_number_of_threads(b: int, m: int, dtype: torch.dtype):
    leaves = [make((3003, 128), dtype), skew_for(128, b, m, torch.float32)]
    assert_same_bits_at_any_number_of_threads(lambda *t: butterfly_rotate(*t, block_size=b, factors=m), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "m"), [(2, 4), (8, 2)])
def test_rows_do_not_meet(b: int, m: int, dtype: torch.dtype):
    skew = skew_for(16, b, m, torch.float32)
    assert_rows_do_not_meet(lambda x: butterfly_rotate(x, skew, block_size=b, factors=m), 16, dtype)


def test_non_finite_values_reach_the_gradient_of_the_parameters():
    x, skew = make((40, 8)), skew_for(8, 2, 3, torch.float32).requires_grad_()
    x[35, 1] = math.nan
    (grad,) = torch.autograd.grad(butterfly_rotate(x, skew, block_size=2, factors=3).sum(), skew)
    assert grad[0].isnan().flatten().tolist() == [True, False, False, False]
    assert grad[2].isnan().all()


def test_autocast_changes_nothing():
    x, skew, options = make((3, 16)), skew_for(16, 4, 3, torch.float32), {"block_size": 4, "factors": 3}
    with torch.autocast("cpu", torch.bfloat16):
        inside = butterfly_rotate(x, skew, **options)
    assert torch.equal(inside, butterfly_rotate(x, skew, **options))


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly_factor")
def test_agrees_with_peft_for_one_factor():
    """All it computes without a CUDA compiler."""
    peft = pytest.importorskip("peft", minversion="0.21")
    model = nn.Sequential(nn.Linear(12, 3, bias=False))
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, init_weights=False, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config)
    layer = wrapped.base_model.model[0]
    with torch.no_grad():
        layer.boft_s["default"].fill_(1.0)
        q = layer.boft_R["default"] - layer.boft_R["default"].mT
        x = make((5, 12))
        skew = torch.stack([b[i, j] / 2 for b in q[0] for i in range(4) for j in range(i + 1, 4)]).view(1, 3, 6)
        # It applies the transposed matrix to the transposed weight.
        matrix = to_matrix("butterfly_rotate", {"skew": skew, "block_size": 4, "factors": 1}, 12)
        theirs = layer.get_delta_weight("default")[0]
        torch.testing.assert_close(matrix.mT, theirs, rtol=1e-5, atol=1e-5)
        ours = butterfly_rotate(x, skew, block_size=4, factors=1) @ layer.base_layer.weight.mT
        torch.testing.assert_close(ours, wrapped(x), rtol=1e-5, atol=1e-5)


X, SKEW = torch.zeros(2, 8), torch.zeros(2, 2, 6)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": X.long()}, "x", TypeError),
        ({"x": X.numpy()}, "x", TypeError),
        ({"x": X[0, 0]}, "x", ValueError),
        ({"x": X[:, :0], "skew": SKEW[:, :0]}, "x", ValueError),
        ({"skew": SKEW[:1]}, "skew", ValueError),
        ({"skew": SKEW[0]}, "skew", ValueError),
        ({"skew": SKEW[..., :5]}, "skew", ValueError),
        ({"skew": SKEW.long()}, "skew", TypeError),
        ({"skew": 0.0}, "skew", TypeError),
        ({"skew": SKEW.to("meta")}, "skew", ValueError),
        ({"block_size": 3}, "block_size", ValueError),
        ({"block_size": 3, "factors": 1}, "block_size", ValueError),
        ({"block_size": 0}, "block_size", ValueError),
        ({"block_size": -2}, "block_size", ValueError),
        ({"block_size": 4.0}, "block_size", TypeError),
        ({"block_size": True}, "block_size", TypeError),
        ({"factors": 3}, "factors", ValueError),
        ({"factors": 0}, "factors", ValueError),
        ({"factors": 10**9}, "factors", ValueError),
        ({"block_size": 10**18, "factors": 2}, "factors", ValueError),
        ({"factors": 2.0}, "factors", TypeError),
        ({"factors": None}, "factors", TypeError),
        ({"transpose": 1}, "transpose", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"butterfly_rotate: argument '{name}': expected .*, got ") as caught:
        butterfly_rotate(**{"x": X, "skew": SKEW, "block_size": 4, "factors": 2, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
