"""What holds for all rotations whatever the shapes, types, layouts and parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from shiftkern import rotation
from shiftkern.rotation import givens_pairs, orthogonality_error, polar, to_matrix

from helpers.rotation import TOPOLOGIES, assert_within, lengths
from helpers.strategies import DTYPES, LAYOUTS, lay_out, make

D = torch.float64

sizes = st.one_of(st.integers(1, 12), st.sampled_from([31, 32, 33, 64, 65, 127, 128, 129]))
counts = st.one_of(st.integers(0, 5), st.sampled_from([31, 32, 33, 65]))


class Rotation(NamedTuple):
    """A function, its parameters, the other arguments, and how many roundings add up in it."""

    name: str
    d: int
    key: str
    parameters: Tensor
    options: dict[str, Any]
    depth: int

    def __call__(self, x: Tensor, parameters: Tensor | None = None, transpose: bool = False) -> Tensor:
        parameters = self.parameters if parameters is None else parameters
        return getattr(rotation, self.name)(x, **{self.key: parameters}, **self.options, transpose=transpose)

    def matrix(self) -> Tensor:
        return to_matrix(self.name, {self.key: self.parameters, **self.options}, self.d)


@st.composite
def rotations(draw: st.DrawFn) -> Rotation:
    """Any of the functions, orthogonal, in float64."""
    name = draw(st.sampled_from(["givens", "reflect", "chain", "cayley", "butterfly"]))
    seed, size = draw(st.integers(0, 2**16)), draw(st.sampled_from([1e-8, 0.3, 1.0, 3.0]))

    def random(*shape: int) -> Tensor:
        return size * make(shape, D, seed, mean=0.0)

    if name == "givens":
        d, topology = draw(sizes), draw(st.sampled_from(TOPOLOGIES))
        pairs = givens_pairs(topology, d, draw(st.integers(0, 5)) if topology == "brick" else None)
        return Rotation("givens_rotate", d, "theta", random(len(pairs)), {"topology": topology}, 40)
    blocks = draw(st.integers(1, 5))
    if name == "reflect":
        d = blocks * draw(st.integers(1, 30))
        return Rotation("householder_reflect", d, "u", random(d), {"blocks": blocks}, d + 16)
    if name == "chain":
        d, r = draw(sizes), draw(st.integers(0, 9))
        orthogonalize = r <= d // 2 and draw(st.booleans())
        return Rotation("householder_chain", d, "U", random(d, r), {"orthogonalize": orthogonalize}, d + 16 * r + 16)
    if name == "cayley":
        side = draw(st.one_of(st.integers(1, 9), st.sampled_from([31, 33, 64])))
        skew, options = random(blocks, side * (side - 1) // 2), {"block_size": side}
        return Rotation("cayley_rotate", blocks * side, "skew", skew, options, 4 * side + 16)
    side, factors = 2 * draw(st.integers(1, 5)), draw(st.integers(1, 4))
    d = side * blocks * 2 ** (factors - 1)
    skew, options = random(factors, d // side, side * (side - 1) // 2), {"block_size": side, "factors": factors}
    return Rotation("butterfly_rotate", d, "skew", skew, options, factors * (4 * side + 16))


@given(turn=rotations())
def test_orthogonal_at_the_rounding_of_float64(turn: Rotation):
    assert orthogonality_error(turn.matrix()) < 1e-13


@given(turn=rotations(), rows=counts, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_equals_its_matrix_in_every_type_and_layout(turn: Rotation, rows: int, dtype: torch.dtype, layout: str):
    x, matrix = lay_out(make((rows, turn.d), dtype, 1), layout), turn.matrix()
    for transpose in (False, True):
        y = turn(x, transpose=transpose)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert_within(y, x.double() @ (matrix if transpose else matrix.mT), lengths(x), turn.depth + turn.d)


@given(turn=rotations(), rows=counts, seed=st.integers(0, 99))
def test_keeps_inner_products_and_is_undone_by_its_transpose(turn: Rotation, rows: int, seed: int):
    x, other = make((rows, turn.d), D, seed), make((rows, turn.d), D, seed + 1)
    y, z = turn(x), turn(other)
    torch.testing.assert_close((y * z).sum(1), (x * other).sum(1), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(turn(y, transpose=True), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(turn(turn(x, transpose=True)), x, rtol=0, atol=1e-12)
    # Linear, and rows by themselves.
    torch.testing.assert_close(turn(x - 2.0 * other), y - 2.0 * z, rtol=0, atol=1e-11)
    if rows:
        torch.testing.assert_close(turn(x[-1]), y[-1], rtol=0, atol=1e-13)


@given(turn=rotations(), rows=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_rows_do_not_depend_on_their_neighbours(turn: Rotation, rows: int, dtype: torch.dtype):
    """To the bit, forward and backward: also where another row is not finite."""
    x, grad = make((rows + 1, turn.d), dtype, 2), make((rows + 1, turn.d), dtype, 3)
    spoilt, spoilt_grad = x.clone(), grad.clone()
    spoilt[-1], spoilt_grad[-1] = float("nan"), float("inf")
    results = []
    for leaf, g in ((x.requires_grad_(), grad), (spoilt.requires_grad_(), spoilt_grad)):
        y = turn(leaf)
        results.append((y[:-1], torch.autograd.grad(y, leaf, g)[0][:-1]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@given(turn=rotations(), rows=counts, transpose=st.booleans())
def test_gradient_by_the_rows_is_the_transpose(turn: Rotation, rows: int, transpose: bool):
    x, grad = make((rows, turn.d), D, 2).requires_grad_(), make((rows, turn.d), D, 3)
    (by_x,) = torch.autograd.grad(turn(x, transpose=transpose), x, grad)
    torch.testing.assert_close(by_x, turn(grad, transpose=not transpose), rtol=0, atol=1e-12)


@given(turn=rotations(), rows=st.integers(1, 40), transpose=st.booleans(), seed=st.integers(0, 99))
def test_gradient_by_the_parameters_is_the_slope(turn: Rotation, rows: int, transpose: bool, seed: int):
    """Along a random direction, against central differences."""
    assume(turn.parameters.numel() > 0)
    x, grad = make((rows, turn.d), D, 2), make((rows, turn.d), D, 3)
    along, size = make(tuple(turn.parameters.shape), D, seed, mean=0.0), x.norm() * grad.norm()
    if turn.key in ("u", "U"):
        # Only where normals point to matters: a step is as long as it turns the shortest of them.
        normals = turn.parameters.view(turn.options["blocks"], -1) if turn.key == "u" else turn.parameters.mT
        along = along * normals.norm(dim=1).min()
    if turn.options.get("orthogonalize"):
        size = size * torch.linalg.cond(turn.parameters) ** 3
    leaf = turn.parameters.clone().requires_grad_()
    (by_parameters,) = torch.autograd.grad(turn(x, leaf, transpose), leaf, grad)
    step = 1e-6
    with torch.no_grad():
        ends = [turn(x, turn.parameters + sign * step * along, transpose) for sign in (1.0, -1.0)]
        slope = ((ends[0] - ends[1]) * grad).sum() / (2.0 * step)
    torch.testing.assert_close((by_parameters * along).sum(), slope, rtol=1e-5, atol=1e-8 * float(size))


@given(d=sizes, topology=st.sampled_from(TOPOLOGIES), layers=st.integers(0, 9))
def test_every_pair_is_in_range_and_every_stage_disjoint(d: int, topology: str, layers: int):
    pairs = givens_pairs(topology, d, layers if topology == "brick" else None)
    assert ((pairs[:, 0] < pairs[:, 1]) & (pairs[:, 0] >= 0) & (pairs[:, 1] < d)).all()
    if topology == "tree":
        # Every coordinate but the root is merged once.
        assert sorted(pairs[:, 1].tolist()) == list(range(1, d))


@given(turn=rotations())
def test_polar_leaves_rotations_alone(turn: Rotation):
    matrix = turn.matrix()
    torch.testing.assert_close(polar(matrix), matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@given(d=sizes, seed=st.integers(0, 99))
def test_blocks_of_rotations_mix_as_rotations_turn(topology: str, d: int, seed: int):
    pairs = givens_pairs(topology, d, 3 if topology == "brick" else None)
    theta, x = make((len(pairs),), D, seed), make((3, d), D, seed + 1)
    blocks = torch.stack([theta.cos(), -theta.sin(), theta.sin(), theta.cos()], 1).view(-1, 2, 2)
    mixed = rotation.givens_mix(x, blocks, topology=topology)
    torch.testing.assert_close(mixed, rotation.givens_rotate(x, theta, topology=topology), rtol=0, atol=1e-13)


#: Every function of rows: name, parameters for 8 coordinates, other arguments.
FUNCTIONS = [
    ("givens_rotate", {"theta": (7,)}, {}),
    ("givens_mix", {"blocks": (7, 2, 2)}, {}),
    ("householder_reflect", {"u": (8,), "v": (8,)}, {"blocks": 2}),
    ("householder_chain", {"U": (8, 3)}, {}),
    ("cayley_rotate", {"skew": (2, 6)}, {"block_size": 4}),
    ("cayley_rotate", {"skew": (2, 6)}, {"block_size": 4, "method": "neumann"}),
    ("butterfly_rotate", {"skew": (2, 2, 6)}, {"block_size": 4, "factors": 2}),
]


@pytest.mark.parametrize(("name", "shapes", "options"), FUNCTIONS)
def test_meta_tensors_give_shapes(name: str, shapes: dict[str, tuple[int, ...]], options: dict[str, Any]):
    leaves = {key: torch.empty(shape, device="meta", requires_grad=True) for key, shape in shapes.items()}
    y = getattr(rotation, name)(torch.empty(3, 5, 8, device="meta", dtype=torch.bfloat16), **leaves, **options)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (3, 5, 8))
    for key, grad in zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.shape == shapes[key]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("name", "shapes", "options"), FUNCTIONS)
def test_vmap_over_parameters(name: str, shapes: dict[str, tuple[int, ...]], options: dict[str, Any]):
    x = make((5, 8), D)
    many = [make((3, *shape), D, i + 1, mean=0.0) for i, shape in enumerate(shapes.values())]

    def rotated(*parameters: Tensor) -> Tensor:
        return getattr(rotation, name)(x, **dict(zip(shapes, parameters, strict=True)), **options)

    together = torch.func.vmap(rotated)(*many)
    for i in range(3):
        torch.testing.assert_close(together[i], rotated(*(t[i] for t in many)), rtol=0, atol=1e-13)
