"""Plane rotations against pair after pair in float64."""

from __future__ import annotations

import math

import pytest
import torch

import shiftkern
from shiftkern.rotation import givens_pairs, givens_rotate, orthogonality_error

from helpers.rotation import (
    SIZES,
    TOPOLOGIES,
    WIDTHS,
    angles,
    assert_rows_do_not_meet,
    assert_same_bits_at_any_number_of_threads,
    assert_within,
    count,
    lengths,
    mixed,
    stages,
    turns,
)
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_equals_the_product_pair_by_pair(rows: int, d: int, topology: str):
    theta = angles(count(topology, d))
    for dtype in DTYPES if d in (5, 33, 129) else (torch.float32, D):
        x = make((rows, d), dtype, 1)
        for transpose in (False, True):
            y = givens_rotate(x, theta, topology=topology, transpose=transpose)
            assert y.dtype == dtype
            assert y.is_contiguous()
            want = mixed(x, turns(theta), topology, transpose)
            assert_within(y, want, lengths(x), 4 * len(stages(topology, d)))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("d", WIDTHS)
def test_orthogonal_and_undone_by_the_transpose(d: int, topology: str):
    """Also for d > 2, where pairing a coordinate twice in one stage would not be a rotation."""
    theta = angles(count(topology, d))
    matrix = givens_rotate(torch.eye(d, dtype=D), theta, topology=topology).mT
    assert orthogonality_error(matrix) < 1e-14
    assert abs(torch.linalg.det(matrix) - 1) < 1e-12
    x = make((9, d), D)
    back = givens_rotate(givens_rotate(x, theta, topology=topology), theta, topology=topology, transpose=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_quarter_turn_moves_a_unit_vector_as_the_equation_says(topology: str):
    """``y_i = cos x_i - sin x_j`` and ``y_j = sin x_i + cos x_j``, one pair at a time."""
    d = 6
    for n, (i, j) in enumerate(givens_pairs(topology, d, 3 if topology == "brick" else None).tolist()):
        theta = torch.zeros(count(topology, d), dtype=D)
        theta[n] = math.pi / 2
        y = givens_rotate(torch.eye(d, dtype=D), theta, topology=topology)
        assert abs(y[i, j] - 1) < 1e-15
        assert abs(y[j, i] + 1) < 1e-15
        assert y.round().abs().sum() == d


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("d", WIDTHS)
def test_pairs(d: int, topology: str):
    layers = 3 if topology == "brick" else None
    pairs = givens_pairs(topology, d, layers)
    assert pairs.dtype == torch.int64
    assert [tuple(p) for p in pairs.tolist()] == [pair for stage in stages(topology, d) for pair in stage]
    for stage in stages(topology, d):
        assert len({i for pair in stage for i in pair}) == 2 * len(stage)
    if topology == "tree":
        assert len(pairs) == d - 1
    if topology == "brick":
        assert len(givens_pairs("brick", d)) == d * (d - 1) // 2
        assert givens_pairs("brick", d, 0).shape == (0, 2)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_zero_angles_change_no_bit(topology: str):
    for dtype in DTYPES:
        x = make((3, 33), dtype)
        assert torch.equal(givens_rotate(x, torch.zeros(count(topology, 33)), topology=topology), x)


def test_no_layers_and_single_coordinates():
    x = make((4, 5))
    for theta in (torch.zeros(0), torch.zeros(0, dtype=torch.float16)):
        assert torch.equal(givens_rotate(x, theta, topology="brick"), x)
        for topology in TOPOLOGIES:
            assert torch.equal(givens_rotate(x[:, :1], theta, topology=topology, transpose=True), x[:, :1])


@pytest.mark.parametrize("shape", [(33,), (4, 33), (2, 3, 33), (2, 1, 3, 33), (0, 33), (2, 0, 33)])
def test_leading_dimensions(shape: tuple[int, ...]):
    x, theta = make(shape), angles(32)
    y = givens_rotate(x, theta)
    assert y.shape == shape
    assert torch.equal(y.reshape(-1, 33), givens_rotate(x.reshape(-1, 33), theta))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str):
    for dtype in DTYPES:
        x = lay_out(make((6, 3, 9), dtype), layout).requires_grad_()
        theta = lay_out(angles(8, torch.float32)[:, None], "sliced" if layout == "sliced" else "contiguous")[:, 0]
        y = givens_rotate(x, theta)
        plain = x.detach().contiguous().requires_grad_()
        assert torch.equal(y, givens_rotate(plain, theta))
        g = lay_out(make((6, 3, 9), dtype, 5), layout)
        got = torch.autograd.grad(y, x, g)[0]
        assert torch.equal(got, torch.autograd.grad(givens_rotate(plain, theta), plain, g.contiguous())[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_angles_in_other_types_than_the_rows(dtype: torch.dtype):
    x, theta = make((5, 8), torch.float32), angles(7, dtype)
    assert_within(givens_rotate(x, theta), mixed(x, turns(theta), "tree"), lengths(x), 12)


@pytest.mark.parametrize("value", [1e3, 1e8, 1e300])
def test_large_angles_are_reduced_exactly(value: float):
    x, theta = make((5, 8), D), value * angles(7)
    assert_within(givens_rotate(x, theta), mixed(x, turns(theta), "tree"), lengths(x), 12)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30])
def test_tiny_and_huge_rows(size: float):
    x, theta = make((5, 8), torch.float32) * size, angles(7)
    assert_within(givens_rotate(x, theta), mixed(x, turns(theta), "tree"), lengths(x), 12)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("d", [1, 2, 5, 12])
def test_gradcheck(d: int, topology: str, transpose: bool):
    x, theta = make((3, d), D).requires_grad_(), angles(count(topology, d)).requires_grad_()
    options = {"topology": topology, "transpose": transpose}
    assert torch.autograd.gradcheck(lambda x, theta: givens_rotate(x, theta, **options), (x, theta))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("rows", "d"), [(1, 33), (33, 129), (100, 300), (0, 5)])
def test_gradients_equal_those_of_the_product(rows: int, d: int, topology: str, dtype: torch.dtype):
    transpose = d == 129
    parameters = D if dtype == D else torch.float32
    x, theta = make((rows, d), dtype).requires_grad_(), angles(count(topology, d), parameters).requires_grad_()
    grad = make((rows, d), dtype, 9)
    got = torch.autograd.grad(givens_rotate(x, theta, topology=topology, transpose=transpose), (x, theta), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, theta)]
    out = mixed(wide[0], turns(wide[1]), topology, transpose)
    want = torch.autograd.grad(out, wide, grad.double())
    assert [g.dtype for g in got] == [dtype, parameters]
    depth = 4 * len(stages(topology, d))
    assert_within(got[0], want[0], lengths(grad), depth)
    # The inputs of the stages come from the rounded result, which in half types is the larger error.
    size = (lengths(grad) * lengths(x.detach())).sum()
    slack = 2 * depth + 32 + (torch.finfo(dtype).eps / torch.finfo(parameters).eps if dtype != parameters else 0)
    assert_within(got[1], want[1], size, slack)


def test_second_derivatives_are_refused():
    x, theta = make((3, 5), D).requires_grad_(), angles(4).requires_grad_()
    (first,) = torch.autograd.grad(givens_rotate(x, theta).square().sum(), theta, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError):
        first.sum().backward()


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_number_of_threads(topology: str, dtype: torch.dtype):
    x, theta = make((5003, 129), dtype), angles(count(topology, 129), torch.float32)
    assert_same_bits_at_any_number_of_threads(lambda x, theta: givens_rotate(x, theta, topology=topology), [x, theta])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_rows_do_not_meet(topology: str, dtype: torch.dtype):
    theta = angles(count(topology, 12), torch.float32)
    assert_rows_do_not_meet(lambda x: givens_rotate(x, theta, topology=topology), 12, dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_reach_the_gradient_of_the_angles(value: float):
    x, theta = make((40, 4)), angles(3, torch.float32).requires_grad_()
    x[35, 1] = value
    assert not torch.autograd.grad(givens_rotate(x, theta).sum(), theta)[0].isfinite().any()


def test_a_non_finite_angle_spoils_its_coordinates_only():
    theta = torch.tensor([math.inf, 0.0, 0.0, 0.0])
    y = givens_rotate(torch.ones(1, 5), theta, topology="brick")
    assert y.isnan().tolist() == [[True, True, True, False, False]]


def test_autocast_changes_nothing():
    x, theta = make((3, 9)), angles(8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = givens_rotate(x, theta)
    assert torch.equal(inside, givens_rotate(x, theta))


def test_inference_mode():
    x, theta = make((3, 9)), angles(8, torch.float32).requires_grad_()
    with torch.inference_mode():
        inside = givens_rotate(x, theta)
    assert torch.equal(inside, givens_rotate(x, theta).detach())


X, THETA = torch.zeros(2, 5), torch.zeros(4)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"x": X.long()}, "x", TypeError),
        ({"x": X.numpy()}, "x", TypeError),
        ({"x": X.to_sparse()}, "x", TypeError),
        ({"x": X.to(torch.complex64)}, "x", TypeError),
        ({"x": X[0, 0]}, "x", ValueError),
        ({"x": X[:, :0], "theta": THETA[:0]}, "x", ValueError),
        ({"theta": THETA[:3]}, "theta", ValueError),
        ({"theta": torch.zeros(5)}, "theta", ValueError),
        ({"theta": THETA[:, None]}, "theta", ValueError),
        ({"theta": THETA.int()}, "theta", TypeError),
        ({"theta": [0.0] * 4}, "theta", TypeError),
        ({"theta": THETA.to("meta")}, "theta", ValueError),
        ({"theta": torch.zeros(6), "topology": "butterfly"}, "theta", ValueError),
        ({"theta": torch.zeros(3), "topology": "brick"}, "theta", ValueError),
        ({"x": X[:, :1], "theta": torch.zeros(1), "topology": "brick"}, "theta", ValueError),
        ({"topology": "star"}, "topology", ValueError),
        ({"topology": None}, "topology", TypeError),
        ({"transpose": 1}, "transpose", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"givens_rotate: argument '{name}': expected .*, got ") as caught:
        givens_rotate(**{"x": X, "theta": THETA, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize(
    ("arguments", "name", "error"),
    [
        (("star", 4), "topology", ValueError),
        ((1, 4), "topology", TypeError),
        (("tree", 0), "d", ValueError),
        (("tree", 2.0), "d", TypeError),
        (("tree", True), "d", TypeError),
        (("brick", 4, -1), "layers", ValueError),
        (("brick", 4, 1.5), "layers", TypeError),
        (("tree", 4, 2), "layers", ValueError),
    ],
)
def test_pairs_errors(arguments: tuple, name: str, error: type):
    with pytest.raises(error, match=f"givens_pairs: argument '{name}': expected .*, got "):
        givens_pairs(*arguments)
