"""Products of reflections against dense matrices multiplied one after the other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.rotation import householder_chain, orthogonality_error

from helpers.rotation import (
    SIZES,
    assert_rows_do_not_meet,
    assert_same_bits_at_any_number_of_threads,
    assert_within,
    lengths,
    reflection,
)
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64


def dense(U: Tensor, orthogonalize: bool = False, transpose: bool = False) -> Tensor:
    """``H_1 H_2 .. H_r`` or ``I - 2 Q Q^T``, whose reflections commute."""
    columns = list(U.double().unbind(1))
    if orthogonalize:
        for k, column in enumerate(columns):
            for before in columns[:k]:
                column = column - (before @ column) / (before @ before) * before
            columns[k] = column
    matrix = torch.eye(len(U), dtype=D)
    for column in columns:
        matrix = matrix @ reflection(column)
    return matrix.mT if transpose else matrix


def ranks(d: int) -> list[int]:
    return [r for r in (0, 1, 2, 5, 8, 9) if r <= d]


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_equals_the_dense_matrix(rows: int, d: int, orthogonalize: bool):
    for r in ranks(d) + ([d + 2] if d < 5 and not orthogonalize else []):
        U = make((d, r), D, 3, mean=0.0)
        for dtype in DTYPES:
            x = make((rows, d), dtype, 1)
            for transpose in (False, True):
                y = householder_chain(x, U, orthogonalize=orthogonalize, transpose=transpose)
                assert y.dtype == dtype
                want = x.double() @ dense(U, orthogonalize, transpose).mT
                assert_within(y, want, lengths(x), d + 16 * r + 16)


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize(("d", "r"), [(1, 1), (3, 2), (8, 8), (33, 16), (129, 32), (300, 7)])
def test_orthogonal_and_undone_by_the_transpose(d: int, r: int, orthogonalize: bool):
    U = make((d, r), D, 3, mean=0.0)
    matrix = householder_chain(torch.eye(d, dtype=D), U, orthogonalize=orthogonalize).mT
    assert orthogonality_error(matrix) < 1e-13
    torch.testing.assert_close(torch.linalg.det(matrix), torch.tensor((-1.0) ** r, dtype=D))
    x = make((9, d), D)
    y = householder_chain(x, U, orthogonalize=orthogonalize)
    back = householder_chain(y, U, orthogonalize=orthogonalize, transpose=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13 * d)


def test_the_last_column_acts_first():
    """Reflections at (1, 0) and (1, 1): the order decides the sense of the quarter turn."""
    U = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=D)
    y = householder_chain(torch.tensor([1.0, 0.0], dtype=D), U)
    # H_2 swaps and negates: (1, 0) to (0, -1); H_1 leaves that alone.
    torch.testing.assert_close(y, torch.tensor([0.0, -1.0], dtype=D), rtol=0, atol=1e-15)
    back = householder_chain(torch.tensor([1.0, 0.0], dtype=D), U, transpose=True)
    torch.testing.assert_close(back, torch.tensor([0.0, 1.0], dtype=D), rtol=0, atol=1e-15)


def test_equal_columns_in_pairs_are_the_identity():
    """The start that adapters of reflections use."""
    for dtype in (torch.float32, D):
        U = make((33, 4), dtype, 3).repeat_interleave(2, 1)
        x = make((5, 33), dtype)
        assert_within(householder_chain(x, U), x.double(), lengths(x), 64)


def test_nearly_parallel_columns_stay_orthogonal():
    base = make((64, 1), D, 3)
    for spread in (0.0, 1e-15, 1e-8, 1e-3):
        U = base + spread * make((64, 16), D, 4, mean=0.0)
        assert orthogonality_error(householder_chain(torch.eye(64, dtype=D), U)) < 1e-13


def test_orthogonalize_sees_only_the_span():
    U, x = make((12, 3), D, 3), make((5, 12), D)
    mixed = U @ (torch.eye(3, dtype=D) + 0.3 * make((3, 3), D, 5))
    y = householder_chain(x, U, orthogonalize=True)
    torch.testing.assert_close(householder_chain(x, mixed, orthogonalize=True), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(householder_chain(U.mT, U, orthogonalize=True), -U.mT, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dependent_columns_are_refused_where_they_are_made_orthogonal(dtype: torch.dtype):
    plain = make((8, 3), dtype, 3)
    parallel = plain.clone()
    parallel[:, 2] = 2.0 * parallel[:, 0]
    for U, at in ((parallel, 2), (torch.cat([torch.zeros(8, 1, dtype=dtype), plain], 1), 0)):
        with pytest.raises(ValueError, match=rf"argument 'U': expected .* independent, got column {at}"):
            householder_chain(make((2, 8)), U, orthogonalize=True)
        householder_chain(make((2, 8)), U)
    householder_chain(make((2, 8)), plain, orthogonalize=True)


def test_what_the_type_of_the_columns_cannot_tell_from_dependent_is_refused():
    """In float64, beside such rows, the rounding of the sum would look like a direction."""
    U = make((8, 3), seed=3)
    U[:, 2] = 0.3 * U[:, 0] + 0.7 * U[:, 1]
    with pytest.raises(ValueError, match="argument 'U': expected columns that are linearly independent"):
        householder_chain(make((2, 8), D), U, orthogonalize=True)


def test_a_column_of_zeros_is_left_out():
    U, x = make((8, 3), D, 3), make((5, 8), D)
    U[:, 1] = 0.0
    U.requires_grad_()
    y = householder_chain(x, U)
    torch.testing.assert_close(y, householder_chain(x, U[:, [0, 2]]), rtol=0, atol=1e-14)
    (grad,) = torch.autograd.grad((y * make((5, 8), D, 8)).sum(), U)
    assert grad[:, 1].eq(0).all()
    assert grad[:, 0].ne(0).any()


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_columns(size: float):
    x, U = make((3, 8)), (make((8, 3), D) * size).float()
    for orthogonalize in (False, True):
        want = x.double() @ dense(U.double() / size, orthogonalize).mT
        y = householder_chain(x, U, orthogonalize=orthogonalize)
        assert_within(y, want, lengths(x), 200 if orthogonalize else 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_columns(dtype: torch.dtype):
    x, U = make((3, 8)), make((8, 3), dtype)
    for orthogonalize in (False, True):
        y = householder_chain(x, U, orthogonalize=orthogonalize)
        # The columns are widened before anything is computed.
        assert torch.equal(y, householder_chain(x, U.float(), orthogonalize=orthogonalize))
        wide = householder_chain(x.double(), U, orthogonalize=orthogonalize)
        assert torch.equal(wide, householder_chain(x.double(), U.double(), orthogonalize=orthogonalize))


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12), (2, 0, 12)])
def test_leading_dimensions(shape: tuple[int, ...]):
    x, U = make(shape), make((12, 3), seed=3)
    y = householder_chain(x, U)
    assert y.shape == shape
    assert torch.equal(y.reshape(-1, 12), householder_chain(x.reshape(-1, 12), U))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_memory_layout_does_not_matter(layout: str, orthogonalize: bool):
    x = lay_out(make((6, 4, 12)), layout)
    U = make((12, 3), seed=3) if layout == "expanded" else lay_out(make((12, 3), seed=3), layout)
    g = lay_out(make((6, 4, 12), seed=5), layout)
    results = []
    for leaves in ([x, U], [x.contiguous(), U.contiguous()]):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = householder_chain(*leaves, orthogonalize=orthogonalize)
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize(("d", "r"), [(1, 1), (2, 2), (5, 3), (12, 1)])
def test_gradcheck(d: int, r: int, orthogonalize: bool, transpose: bool):
    x, U = make((3, d), D).requires_grad_(), make((d, r), D, 3, mean=0.0).requires_grad_()
    options = {"orthogonalize": orthogonalize, "transpose": transpose}
    assert torch.autograd.gradcheck(lambda x, U: householder_chain(x, U, **options), (x, U))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d", "r"), [(1, 33, 1), (33, 129, 4), (1000, 300, 8), (0, 5, 2), (5, 8, 0)])
def test_gradients_equal_those_of_the_dense_matrix(rows: int, d: int, r: int, dtype: torch.dtype):
    parameters = D if dtype == D else torch.float32
    x, U = make((rows, d), dtype).requires_grad_(), make((d, r), parameters, 3, mean=0.0).requires_grad_()
    grad = make((rows, d), dtype, 9)
    got = torch.autograd.grad(householder_chain(x, U), (x, U), grad, materialize_grads=True)
    wide = [t.detach().double().requires_grad_() for t in (x, U)]
    want = torch.autograd.grad(wide[0] @ dense(wide[1]).mT, wide, grad.double(), materialize_grads=True)
    assert [g.dtype for g in got] == [dtype, parameters]
    assert_within(got[0], want[0], lengths(grad), d + 16 * r + 16)
    if r:
        size = 4 * (lengths(grad) * lengths(x.detach())).sum() / lengths(U.detach().mT).min()
        assert_within(got[1], want[1], size, d + 16 * r + 64)


def test_second_derivatives_are_refused():
    x, U = make((3, 5), D).requires_grad_(), make((5, 2), D, 3).requires_grad_()
    (first,) = torch.autograd.grad(householder_chain(x, U).square().sum(), x, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype):
    assert_same_bits_at_any_number_of_threads(householder_chain, [make((5003, 129), dtype), make((129, 5), seed=3)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 5])
def test_rows_do_not_meet(r: int, dtype: torch.dtype):
    U = make((12, r), seed=3)
    assert_rows_do_not_meet(lambda x: householder_chain(x, U), 12, dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_not_hidden(value: float):
    x, U = make((40, 6)), make((6, 2), seed=3).requires_grad_()
    x[35, 1] = value
    assert not torch.autograd.grad(householder_chain(x, U).sum(), U)[0].isfinite().any()
    bad = U.detach().clone()
    bad[1, 0] = value
    assert householder_chain(make((2, 6)), bad).isnan().all()


def test_autocast_changes_nothing():
    x, U = make((3, 9)), make((9, 4), seed=3)
    for options in ({}, {"transpose": True}, {"orthogonalize": True}):
        with torch.autocast("cpu", torch.bfloat16):
            inside = householder_chain(x, U, **options)
        assert torch.equal(inside, householder_chain(x, U, **options))


def test_inference_mode():
    x, U = make((3, 9)), make((9, 4), seed=3).requires_grad_()
    with torch.inference_mode():
        inside = householder_chain(x, U)
    assert torch.equal(inside, householder_chain(x, U).detach())


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_agrees_with_peft(orthogonalize: bool):
    peft = pytest.importorskip("peft", minversion="0.21")
    config = peft.HRAConfig(r=4, apply_GS=orthogonalize, init_weights=False, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(9, 3, bias=False)).double(), config).double()
    layer = model.base_model.model[0]
    x, U = make((5, 9), D), layer.hra_u["default"].detach()
    ours = householder_chain(x, U, orthogonalize=orthogonalize) @ layer.base_layer.weight.mT
    torch.testing.assert_close(ours, model(x))


X, U = torch.zeros(2, 6), torch.eye(6)[:, :3]


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": X.long()}, "x", TypeError),
        ({"x": X.numpy()}, "x", TypeError),
        ({"x": X[0, 0]}, "x", ValueError),
        ({"x": X[:, :0], "U": U[:0]}, "x", ValueError),
        ({"U": U[:5]}, "U", ValueError),
        ({"U": U[:, 0]}, "U", ValueError),
        ({"U": U[None]}, "U", ValueError),
        ({"U": U.mT}, "U", ValueError),
        ({"U": U.int()}, "U", TypeError),
        ({"U": U.tolist()}, "U", TypeError),
        ({"U": U.to("meta")}, "U", ValueError),
        ({"U": torch.zeros(6, 7), "orthogonalize": True}, "U", ValueError),
        ({"orthogonalize": 1}, "orthogonalize", TypeError),
        ({"transpose": "T"}, "transpose", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"householder_chain: argument '{name}': expected .*, got ") as caught:
        householder_chain(**{"x": X, "U": U, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
