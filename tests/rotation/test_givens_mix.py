"""Free 2 x 2 blocks against pair after pair in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.rotation import givens_mix, givens_rotate, invert_blocks

from helpers.rotation import (
    SIZES,
    TOPOLOGIES,
    angles,
    assert_rows_do_not_meet,
    assert_same_bits_at_any_number_of_threads,
    assert_within,
    count,
    mixed,
    stages,
    turns,
)
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64


def blocks_for(topology: str, d: int, dtype: torch.dtype = D) -> Tensor:
    """Far from orthogonal, but not so far that products of many leave the range."""
    n = count(topology, d)
    return torch.eye(2, dtype=dtype) * 0.8 + make((n, 2, 2), dtype, 4, mean=0.0) / 4


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_equals_the_product_pair_by_pair(rows: int, d: int, topology: str):
    blocks = blocks_for(topology, d)
    for dtype in DTYPES if d in (5, 33, 129) else (torch.float32, D):
        x = make((rows, d), dtype, 1)
        for transpose in (False, True):
            y = givens_mix(x, blocks, topology=topology, transpose=transpose)
            assert y.dtype == dtype
            want = mixed(x, blocks, topology, transpose)
            # The same product of magnitudes bounds every rounding on the way.
            size = mixed(x.abs(), blocks.abs(), topology, transpose)
            assert_within(y, want, size, 3 * len(stages(topology, d)))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("transpose", [False, True])
def test_rotations_are_a_special_case(topology: str, transpose: bool):
    x, theta = make((5, 33), D), angles(count(topology, 33))
    mine = givens_mix(x, turns(theta), topology=topology, transpose=transpose)
    torch.testing.assert_close(
        mine, givens_rotate(x, theta, topology=topology, transpose=transpose), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_transpose_is_the_adjoint_and_not_the_inverse(topology: str):
    blocks = blocks_for(topology, 33)
    x, y = make((5, 33), D), make((5, 33), D, 2)
    left = (givens_mix(x, blocks, topology=topology) * y).sum()
    right = (x * givens_mix(y, blocks, topology=topology, transpose=True)).sum()
    torch.testing.assert_close(left, right)
    back = givens_mix(givens_mix(x, blocks, topology=topology), blocks, topology=topology, transpose=True)
    assert (back - x).abs().max() > 0.1


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("d", [1, 2, 5, 33, 128])
def test_inverse_blocks_undo_it(topology: str, d: int):
    blocks = torch.eye(2, dtype=D) + 0.1 * make((count(topology, d), 2, 2), D, 4, mean=0.0)
    x = make((5, d), D)
    y = givens_mix(x, blocks, topology=topology)
    back = givens_mix(y, invert_blocks(blocks).mT, topology=topology, transpose=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


def test_identity_blocks_change_no_bit():
    for dtype in DTYPES:
        x = make((3, 33), dtype)
        assert torch.equal(givens_mix(x, torch.eye(2).expand(32, 2, 2)), x)
        assert torch.equal(givens_mix(x, torch.empty(0, 2, 2), topology="brick"), x)
        assert torch.equal(givens_mix(x[:, :1], torch.empty(0, 2, 2)), x[:, :1])


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (2, 1, 3, 9), (0, 9), (2, 0, 9)])
def test_leading_dimensions(shape: tuple[int, ...]):
    x, blocks = make(shape), blocks_for("tree", 9)
    y = givens_mix(x, blocks)
    assert y.shape == shape
    assert torch.equal(y.reshape(-1, 9), givens_mix(x.reshape(-1, 9), blocks))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str):
    x, blocks = lay_out(make((6, 3, 9)), layout), lay_out(blocks_for("tree", 9), layout)
    g = lay_out(make((6, 3, 9), seed=5), layout)
    results = []
    for leaves in ([x, blocks], [x.contiguous(), blocks.contiguous()]):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = givens_mix(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("d", [1, 2, 5, 12])
def test_gradcheck(d: int, topology: str, transpose: bool):
    x, blocks = make((3, d), D).requires_grad_(), blocks_for(topology, d).requires_grad_()
    options = {"topology": topology, "transpose": transpose}
    assert torch.autograd.gradcheck(lambda x, blocks: givens_mix(x, blocks, **options), (x, blocks))


def test_singular_blocks_have_gradients():
    """The inputs of a stage are kept and not recovered from its outputs."""
    blocks = torch.zeros(4, 2, 2, dtype=D).requires_grad_()
    x = make((3, 5), D).requires_grad_()
    assert torch.autograd.gradcheck(givens_mix, (x, blocks))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("rows", "d"), [(1, 33), (33, 129), (100, 300), (0, 5)])
def test_gradients_equal_those_of_the_product(rows: int, d: int, topology: str, dtype: torch.dtype):
    transpose = d == 129
    parameters = D if dtype == D else torch.float32
    x, blocks = make((rows, d), dtype), blocks_for(topology, d, parameters)
    grad = make((rows, d), dtype, 9)

    def gradients(function, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors[:2]]
        return torch.autograd.grad(function(*leaves, topology=topology, transpose=transpose), leaves, tensors[2])

    got = gradients(givens_mix, x, blocks, grad)
    want = gradients(mixed, x.double(), blocks.double(), grad.double())
    size = gradients(mixed, x.double().abs(), blocks.double().abs(), grad.double().abs())
    assert [g.dtype for g in got] == [dtype, parameters]
    depth = 3 * len(stages(topology, d))
    assert_within(got[0], want[0], size[0], depth)
    assert_within(got[1], want[1], size[1], depth + 16)


def test_half_parameters_get_half_gradients():
    x, blocks = make((3, 5)), blocks_for("tree", 5, torch.float16).requires_grad_()
    (got,) = torch.autograd.grad(givens_mix(x, blocks).sum(), blocks)
    assert got.dtype == torch.float16
    wide = blocks.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(mixed(x, wide, "tree").sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5)


def test_second_derivatives_are_refused():
    x, blocks = make((3, 5), D).requires_grad_(), blocks_for("tree", 5).requires_grad_()
    (first,) = torch.autograd.grad(givens_mix(x, blocks).square().sum(), blocks, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits_at_any_number_of_threads(topology: str, dtype: torch.dtype):
    x, blocks = make((5003, 129), dtype) / 8, blocks_for(topology, 129, torch.float32)
    assert_same_bits_at_any_number_of_threads(lambda x, blocks: givens_mix(x, blocks, topology=topology), [x, blocks])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rows_do_not_meet(topology: str, dtype: torch.dtype):
    blocks = blocks_for(topology, 12, torch.float32)
    assert_rows_do_not_meet(lambda x: givens_mix(x, blocks, topology=topology), 12, dtype)


def test_non_finite_values_reach_the_gradient_of_the_blocks():
    x, blocks = make((40, 4)), blocks_for("tree", 4, torch.float32).requires_grad_()
    x[35, 1] = math.nan
    found = torch.autograd.grad(givens_mix(x, blocks).sum(), blocks)[0]
    assert found[0, :, 1].isnan().all()
    assert found[1].isfinite().all()
    assert found[2, :, 0].isnan().all()


def test_autocast_changes_nothing():
    x, blocks = make((3, 9)), blocks_for("tree", 9, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = givens_mix(x, blocks), invert_blocks(blocks)
    assert torch.equal(inside[0], givens_mix(x, blocks))
    assert torch.equal(inside[1], invert_blocks(blocks))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_of_blocks(dtype: torch.dtype):
    blocks = torch.eye(2, dtype=dtype) + make((40, 2, 2), dtype, 3, mean=0.0) / 8
    got = invert_blocks(blocks)
    assert got.dtype == dtype
    want = torch.linalg.inv(blocks.double())
    assert_within(got, want, want.abs(), 8)
    assert invert_blocks(blocks[:0]).shape == (0, 2, 2)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_inverse_of_tiny_and_huge_blocks(size: float):
    blocks = size * torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    torch.testing.assert_close(invert_blocks(blocks), torch.tensor([[[1.0, -1.0], [-1.0, 2.0]]]) / size)


def test_gradcheck_of_the_inverse():
    blocks = (torch.eye(2, dtype=D) + make((4, 2, 2), D, 3, mean=0.0) / 8).requires_grad_()
    assert torch.autograd.gradcheck(invert_blocks, blocks)


X, BLOCKS = torch.zeros(2, 5), torch.zeros(4, 2, 2)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": X.int()}, "x", TypeError),
        ({"x": X.tolist()}, "x", TypeError),
        ({"x": X[0, 0]}, "x", ValueError),
        ({"x": X[:, :0], "blocks": BLOCKS[:0]}, "x", ValueError),
        ({"blocks": BLOCKS[:3]}, "blocks", ValueError),
        ({"blocks": BLOCKS[..., 0]}, "blocks", ValueError),
        ({"blocks": BLOCKS.reshape(4, 4)}, "blocks", ValueError),
        ({"blocks": torch.zeros(4, 2, 3)}, "blocks", ValueError),
        ({"blocks": BLOCKS.bool()}, "blocks", TypeError),
        ({"blocks": None}, "blocks", TypeError),
        ({"blocks": BLOCKS.to("meta")}, "blocks", ValueError),
        ({"blocks": BLOCKS[:3], "topology": "brick"}, "blocks", ValueError),
        ({"topology": "Tree"}, "topology", ValueError),
        ({"topology": 2}, "topology", TypeError),
        ({"transpose": "no"}, "transpose", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"givens_mix: argument '{name}': expected .*, got ") as caught:
        givens_mix(**{"x": X, "blocks": BLOCKS, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize(
    ("blocks", "error", "text"),
    [
        (torch.zeros(2, 2), ValueError, "shape"),
        (torch.zeros(4, 2, 3), ValueError, "shape"),
        (torch.zeros(4, 2, 2).long(), TypeError, "int64"),
        ([[[1.0, 0.0], [0.0, 1.0]]], TypeError, "list"),
        (torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [2.0, 4.0]]]), ValueError, "determinant 0.0 at 1"),
        (torch.full((1, 2, 2), math.nan), ValueError, "determinant nan at 0"),
    ],
)
def test_inverse_errors(blocks, error: type, text: str):
    with pytest.raises(error, match=f"invert_blocks: argument 'blocks': expected .*, got .*{text}"):
        invert_blocks(blocks)
