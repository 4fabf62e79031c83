"""Reordered units against loops over entries, and against networks that compute the same."""

from itertools import product

import numpy as np
import pytest
import torch

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.merge.apply_permutation import apply_permutation
from shiftkern.merge.sequential_spec import sequential_spec

from helpers.networks import convnet, mlp, reordered
from helpers.strategies import make

SPEC = {"w": ("p", ("q", 3), None), "v": ("q",), "none": (None, None), "scalar": ()}
PERMS = {"p": [2, 0, 1, 3], "q": [1, 0]}


def params(dtype=torch.float32):
    shapes = {"w": (4, 6, 2), "v": (2,), "none": (2, 2), "scalar": (), "other": (3,)}
    return {name: make(shape, dtype) for name, shape in shapes.items()} | {"count": torch.tensor(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_entry_comes_from_its_place(dtype):
    given = params(dtype)
    moved = apply_permutation(SPEC, {k: torch.tensor(v) for k, v in PERMS.items()}, given)
    p, q = PERMS["p"], PERMS["q"]
    for i, j, k in product(range(4), range(6), range(2)):
        assert moved["w"][i, j, k] == given["w"][p[i], q[j // 3] * 3 + j % 3, k]
    assert moved["v"].tolist() == given["v"][[1, 0]].tolist()
    assert list(moved) == list(given)
    for name in ("none", "scalar", "other", "count"):
        assert torch.equal(moved[name], given[name])
        assert moved[name].data_ptr() != given[name].data_ptr()
    assert all(moved[name].dtype == given[name].dtype for name in given)


@pytest.mark.parametrize("net", [mlp(3, 7, 5, 2), convnet()])
def test_the_network_computes_the_same(net):
    twin, orders = reordered(net, seed=3)
    moved = apply_permutation(sequential_spec(net), orders, net.state_dict())
    assert all(torch.equal(moved[name], value) for name, value in twin.state_dict().items())
    x = make((5, 3) if isinstance(net[0], torch.nn.Linear) else (5, 2, 8, 8))
    torch.testing.assert_close(twin(x), net(x))


def test_inverse_brings_back_and_input_stays():
    given = params()
    before = {name: value.clone() for name, value in given.items()}
    perms = {name: torch.tensor(value) for name, value in PERMS.items()}
    back = apply_permutation(SPEC, {k: v.argsort() for k, v in perms.items()}, apply_permutation(SPEC, perms, given))
    assert all(torch.equal(back[name], given[name]) and torch.equal(given[name], before[name]) for name in given)


def test_numpy_in_numpy_out():
    arrays = {name: value.numpy() for name, value in params().items()}
    moved = apply_permutation(SPEC, {k: np.array(v, dtype=np.int32) for k, v in PERMS.items()}, arrays)
    wanted = apply_permutation(SPEC, {k: torch.tensor(v) for k, v in PERMS.items()}, params())
    for name, value in moved.items():
        assert isinstance(value, np.ndarray)
        assert np.array_equal(value, wanted[name].numpy())
    frozen = {name: value[::-1] if value.ndim else value for name, value in arrays.items()}
    for value in frozen.values():
        value.flags.writeable = False
    again = apply_permutation(SPEC, PERMS, frozen)
    assert np.array_equal(again["v"], frozen["v"][[1, 0]])


def test_gradient():
    def moved(w, v):
        given = {"w": w, "v": v, "none": torch.zeros(2, 2), "scalar": torch.zeros(())}
        result = apply_permutation(SPEC, PERMS, given)
        return result["w"], result["v"]

    inputs = make((4, 6, 2), torch.float64).requires_grad_(), make((2,), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(moved, inputs)


def test_a_permutation_on_two_axes_of_one_tensor():
    w = make((3, 3))
    order = torch.tensor([2, 0, 1])
    moved = apply_permutation({"w": ("p", "p")}, {"p": order}, {"w": w})
    assert torch.equal(moved["w"], w[order][:, order])


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"spec": [("p",)]}, "spec"),
        ({"spec": {}}, "spec"),
        ({"spec": {"w": (None, None, None)}}, "spec"),
        ({"spec": {"w": "pqr"}}, r"spec\['w'\]"),
        ({"spec": {"w": ("p", ("q", 3, 1), None)}}, r"spec\['w'\]"),
        ({"spec": {"w": ("p", ("q", 0), None)}}, r"spec\['w'\]"),
        ({"spec": {"w": ("p", ("q", 1.5), None)}}, r"spec\['w'\]"),
        ({"spec": {"w": ("p", 3, None)}}, r"spec\['w'\]"),
        ({"spec": {"w": ("p", None)}}, r"params\['w'\]"),
        ({"spec": {"lost": ("p",)}}, "params"),
        ({"spec": {"w": ("p", ("q", 4), None)}}, r"params\['w'\]"),
        ({"spec": {"w": ("p", "q", None), "v": ("q",)}}, r"params\['v'\]"),
        ({"perms": [1, 0]}, "perms"),
        ({"perms": {"p": PERMS["p"]}}, "perms"),
        ({"perms": PERMS | {"r": [0]}}, "perms"),
        ({"perms": PERMS | {"q": [0, 0]}}, r"perms\['q'\]"),
        ({"perms": PERMS | {"q": [0, 1, 2]}}, r"perms\['q'\]"),
        ({"perms": PERMS | {"q": [0.0, 1.0]}}, r"perms\['q'\]"),
        ({"perms": PERMS | {"q": [[0, 1]]}}, r"perms\['q'\]"),
        ({"params": [1]}, "params"),
        ({"params": {}}, "params"),
        ({"params": {1: torch.zeros(3)}}, "params"),
        ({"params": params() | {"v": [1.0, 2.0]}}, r"params\['v'\]"),
        ({"params": params() | {"v": np.zeros(2)}}, r"params\['v'\]"),
        ({"params": params() | {"v": torch.zeros(2, dtype=torch.complex64)}}, r"params\['v'\]"),
        ({"params": params() | {"v": torch.tensor([0.0, float("nan")])}}, r"params\['v'\]"),
    ],
)
def test_errors(change, argument):
    given = {"spec": SPEC, "perms": PERMS, "params": params()} | change
    with pytest.raises(ArgumentError, match=rf"^apply_permutation: argument '{argument}': expected .*, got "):
        apply_permutation(**given)


def test_numpy_of_other_kinds_is_refused():
    arrays = {"w": np.array(["a", "b"])}
    with pytest.raises(ArgumentTypeError, match="argument 'params"):
        apply_permutation({"w": ("p",)}, {"p": [0, 1]}, arrays)
