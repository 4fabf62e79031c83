"""The LAME solver against the published form, its invariants and its errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shiftkern
from shiftkern._ops import tta as ops
from shiftkern.tta import lame

AFFINITIES = ["knn", "rbf", "linear"]


def problem(n: int, d: int = 6, classes: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(seed)
    probs = torch.randn(n, classes, generator=g, dtype=torch.float64).mul(1.5).softmax(1)
    return probs.to(dtype), torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)


def published_affinity(features: Tensor, affinity: str, k: int) -> Tensor:
    """W as the authors write it, by differences of all pairs."""
    x = torch.nn.functional.normalize(features.double(), dim=1)
    distance = (x.unsqueeze(0) - x.unsqueeze(1)).norm(dim=-1)
    n = len(x)
    if affinity == "linear":
        return x @ x.T
    if affinity == "rbf":
        sigma = distance.topk(min(k, n), largest=False).values[:, -1].mean()
        return torch.exp(-(distance**2) / (2 * sigma**2))
    w = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        others = sorted((float(distance[i, j]), j) for j in range(n) if j != i)
        for _, j in others[:k]:
            w[i, j] = 1.0
    return w


def published_solver(probs: Tensor, w: Tensor, weight: float, steps: int) -> Tensor:
    unary = -(probs.double() + 1e-10).log()
    y = (-unary).softmax(1)
    for _ in range(steps):
        y = (-unary + weight * (w @ y)).softmax(1)
    return y


@pytest.mark.parametrize("affinity", AFFINITIES)
@given(n=st.integers(2, 30), k=st.integers(2, 7), seed=st.integers(0, 999), weight=st.floats(0, 2))
def test_fixed_point_is_the_published_one(affinity: str, n: int, k: int, seed: int, weight: float):
    probs, features = problem(n, seed=seed)
    result = lame(probs, features, affinity=affinity, k=k, weight=weight, max_iter=500, tol=1e-8, return_info=True)
    want = published_solver(probs, published_affinity(features, affinity, k), weight, result.iterations)
    torch.testing.assert_close(result.probs, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("affinity", ["rbf", "linear"])
@given(n=st.integers(2, 40), seed=st.integers(0, 999), weight=st.floats(0, 3))
def test_energy_is_the_stated_one_and_falls(affinity: str, n: int, seed: int, weight: float):
    probs, features = problem(n, seed=seed)
    info = lame(probs, features, affinity=affinity, weight=weight, max_iter=500, return_info=True)
    w = published_affinity(features, affinity, 5)
    y = info.probs
    unary = -(probs + 1e-10).log()
    energy = (y * unary).sum() - weight / 2 * (y * (w @ y)).sum() + torch.special.xlogy(y, y).sum()
    # The terms cancel: what rounding can do is measured by their size, not by that of the energy.
    rounding = 1e-13 * float((y * unary).abs().sum() + weight * (y * (w.abs() @ y)).sum() + n * math.log(4))
    assert math.isclose(info.energy[-1], energy, rel_tol=0, abs_tol=rounding)
    assert bool((info.energy.diff() <= rounding).all())
    assert info.converged
    assert len(info.energy) == info.iterations + 1


@pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")
@pytest.mark.parametrize("affinity", AFFINITIES)
@given(n=st.integers(1, 30), seed=st.integers(0, 999))
def test_invariants(affinity: str, n: int, seed: int):
    probs, features = problem(n, seed=seed)
    options = {"affinity": affinity, "max_iter": 30, "tol": 0.0}
    y = lame(probs, features, **options)
    torch.testing.assert_close(y.sum(1), torch.ones(n, dtype=torch.float64))
    assert bool((y >= 0).all())
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = lame(probs[order], features[order] * 3.0, **options)
    torch.testing.assert_close(shuffled, y[order], rtol=1e-6, atol=1e-9)
    alone = lame(probs, features, affinity=affinity, weight=0.0)
    torch.testing.assert_close(alone, (probs + 1e-10) / (probs + 1e-10).sum(1, keepdim=True))


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 257])
def test_rust_path_equals_torch_path(affinity: str, n: int):
    probs, features = problem(n, d=37)
    rust = ops._lame_rust(probs, features, affinity, 5, 0.8, 60, 1e-8)
    composed = ops._lame_torch(probs, features, affinity, 5, 0.8, 60, 1e-8)
    torch.testing.assert_close(rust[0], composed[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(rust[1], composed[1], rtol=1e-8, atol=1e-8, equal_nan=True)
    assert torch.equal(rust[2], composed[2])


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_same_bits_for_any_number_of_threads(affinity: str):
    probs, features = problem(611, d=130, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        results.append(lame(probs, features, affinity=affinity, weight=0.1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype):
    probs, features = problem(50, dtype=dtype)
    y = lame(probs, features, weight=0.3)
    assert y.dtype == dtype
    want = lame(probs.double(), features.double(), weight=0.3)
    torch.testing.assert_close(y.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_neighbours_drop_self_by_index():
    # Two pairs of identical features: each instance's nearest other is its twin, not itself.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    probs = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.5, 0.5]])
    y = lame(probs, features, k=1, weight=1.0)
    assert y.argmax(1).tolist() == [0, 0, 1, 1]
    want = published_solver(probs, torch.eye(4)[[1, 0, 3, 2]].double(), 1.0, 200)
    torch.testing.assert_close(y.double(), want, rtol=1e-3, atol=1e-4)


def test_numpy_in_numpy_out():
    probs, features = problem(20, dtype=torch.float32)
    y = lame(probs.numpy(), features.numpy(), weight=0.5)
    assert isinstance(y, np.ndarray)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, lame(probs, features, weight=0.5).numpy())
    reversed_ = lame(probs.numpy()[::-1], features.numpy()[::-1], weight=0.5)
    np.testing.assert_allclose(reversed_, y[::-1], rtol=1e-5)
    swapped = features.numpy().astype(">f4")
    np.testing.assert_array_equal(lame(probs.numpy(), swapped, weight=0.5), y)


def test_layouts_and_empty_batches():
    probs, features = problem(20)
    y = lame(probs, features, weight=0.5)
    assert torch.equal(lame(probs.T.contiguous().T, features.T.contiguous().T, weight=0.5), y)
    assert lame(probs[:0], features[:0]).shape == (0, 4)
    assert lame(probs[:1], features[:1]).shape == (1, 4)


def test_not_converging_is_said():
    probs, features = problem(40)
    with pytest.warns(shiftkern.ConvergenceWarning, match="max_iter=2"):
        info = lame(probs, features, max_iter=2, tol=1e-15, return_info=True)
    assert not info.converged
    assert info.iterations == 2


def test_inputs_are_not_changed_and_gradients_are_refused():
    probs, features = problem(10)
    before = probs.clone(), features.clone()
    lame(probs, features)
    assert torch.equal(probs, before[0])
    assert torch.equal(features, before[1])
    y = lame(probs.requires_grad_(), features)
    with pytest.raises(shiftkern.NotDifferentiableError, match="lame"):
        y.sum().backward()


GOOD = problem(6, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"probs": GOOD[0][0]}, "probs", ValueError),
        ({"probs": GOOD[0].long()}, "probs", TypeError),
        ({"probs": [[0.5, 0.5]]}, "probs", TypeError),
        ({"probs": GOOD[0] - 1}, "probs", ValueError),
        ({"probs": GOOD[0] * math.nan}, "probs", ValueError),
        ({"features": GOOD[1][:5]}, "features", ValueError),
        ({"features": GOOD[1][0]}, "features", ValueError),
        ({"features": GOOD[1] * math.inf}, "features", ValueError),
        ({"features": GOOD[1].numpy()}, "features", TypeError),
        ({"features": GOOD[1].to("meta")}, "features", ValueError),
        ({"affinity": "cosine"}, "affinity", ValueError),
        ({"affinity": 3}, "affinity", TypeError),
        ({"k": 0}, "k", ValueError),
        ({"k": 2.5}, "k", TypeError),
        ({"weight": -1.0}, "weight", ValueError),
        ({"weight": math.nan}, "weight", ValueError),
        ({"max_iter": -1}, "max_iter", ValueError),
        ({"tol": -1e-9}, "tol", ValueError),
        ({"tol": "small"}, "tol", TypeError),
        ({"return_info": 1}, "return_info", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    arguments = {"probs": GOOD[0], "features": GOOD[1], **change}
    with pytest.raises(error, match=f"lame: argument '{name}': expected .*, got ") as caught:
        lame(arguments.pop("probs"), arguments.pop("features"), **arguments)
    assert isinstance(caught.value, shiftkern.ShiftkernError)
