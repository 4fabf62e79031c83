"""Matrices of rotations: the same map as the function, and its dense product."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

import shiftkern
from shiftkern import rotation
from shiftkern.rotation import to_matrix

from helpers.rotation import angles, cayley_blocks, joined, mixed, reflection, turns
from helpers.strategies import make

D = torch.float64
NAMES = ("givens_rotate", "givens_mix", "householder_reflect", "householder_chain", "cayley_rotate", "butterfly_rotate")

EYE = torch.eye(8, dtype=D)
THETA, BLOCKS = angles(7), make((7, 2, 2), D)
U, SKEW = make((8, 3), D), make((2, 2, 6), D) / 2


def cases() -> dict[str, tuple[dict, torch.Tensor]]:
    """Parameters and the dense product ``R`` of each function, for 8 coordinates."""
    half = [reflection(U[span, 0]) for span in (slice(0, 4), slice(4, 8))]
    return {
        "givens_rotate": ({"theta": THETA}, mixed(EYE, turns(THETA), "tree").mT),
        "givens_mix": ({"blocks": BLOCKS, "transpose": True}, mixed(EYE, BLOCKS, "tree", True).mT),
        "householder_reflect": ({"u": U[:, 0], "blocks": 2}, torch.block_diag(*half)),
        "householder_chain": ({"U": U}, reflection(U[:, 0]) @ reflection(U[:, 1]) @ reflection(U[:, 2])),
        "cayley_rotate": ({"skew": SKEW[0], "block_size": 4}, joined(8, cayley_blocks(SKEW[:1], 4))),
        "butterfly_rotate": ({"skew": SKEW, "block_size": 4, "factors": 2}, joined(8, cayley_blocks(SKEW, 4))),
    }


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_product(name: str):
    params, want = cases()[name]
    R = to_matrix(name, params, 8)
    assert R.dtype == D
    torch.testing.assert_close(R, want, rtol=0, atol=1e-13)
    x = make((5, 8), D)
    torch.testing.assert_close(getattr(rotation, name)(x, **params), x @ R.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_differentiable(name: str):
    params, _ = cases()[name]
    key = next(iter(params))
    leaf = params[key].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: to_matrix(name, {**params, key: t}, 8), leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_type_of_the_parameters(dtype: torch.dtype):
    R = to_matrix("givens_rotate", MappingProxyType({"theta": THETA.to(dtype), "transpose": True}), 8)
    assert R.dtype == dtype
    torch.testing.assert_close(R.double(), cases()["givens_rotate"][1].mT, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_one_coordinate():
    assert to_matrix("givens_rotate", {"theta": torch.zeros(0)}, 1).tolist() == [[1.0]]
    assert to_matrix("householder_chain", {"U": torch.ones(1, 3)}, 1).tolist() == [[-1.0]]


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"fn_name": "polar"}, "fn_name", ValueError),
        ({"fn_name": "__init__"}, "fn_name", ValueError),
        ({"fn_name": rotation.givens_rotate}, "fn_name", TypeError),
        ({"params": [THETA]}, "params", TypeError),
        ({"params": {}}, "params", TypeError),
        ({"params": {"theta": 0.5}}, "params", TypeError),
        ({"params": {"theta": THETA, "angle": 1}}, "params", ValueError),
        ({"params": {"theta": THETA, "x": EYE}}, "params", ValueError),
        ({"params": {"transpose": False, "topology": THETA}}, "params", ValueError),
        ({"params": {0: THETA}}, "params", ValueError),
        ({"d": 0}, "d", ValueError),
        ({"d": 8.0}, "d", TypeError),
        ({"d": True}, "d", TypeError),
        ({"params": {"theta": THETA.long()}}, "params", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"to_matrix: argument '{name}': expected .*, got ") as caught:
        to_matrix(**{"fn_name": "givens_rotate", "params": {"theta": THETA}, "d": 8, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


def test_the_function_refuses_its_own_arguments():
    with pytest.raises(ValueError, match="givens_rotate: argument 'theta': expected 8 pairs"):
        to_matrix("givens_rotate", {"theta": THETA}, 9)
    with pytest.raises(TypeError, match="cayley_rotate: argument 'block_size'"):
        to_matrix("cayley_rotate", {"skew": SKEW[0], "block_size": "4"}, 8)
