"""Shift maps against their definitions with POT and linear programmes; invariants, pictures and errors."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

import shiftkern
from shiftkern.ot.sparse_shift_map import sparse_shift_map

METHODS = ["sparse", "mean", "cluster"]


def samples(n: int, m: int, d: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    scale, offset = np.linspace(0.5, 2.0, d), np.linspace(2.0, -1.0, d)
    return g.normal(size=(n, d)), g.normal(size=(m, d)) * scale + offset


def transport(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Barycentric map and squared W2 from the linear programme with plain constraints."""
    n, m = len(x), len(y)
    cost = np.array([[sum((p - q) ** 2 for p, q in zip(u, v, strict=True)) for v in y] for u in x])
    sums = np.concatenate([np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))])
    totals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    solved = linprog(cost.ravel(), A_eq=sums[:-1], b_eq=totals[:-1])
    return n * solved.x.reshape(n, m) @ y, float(solved.fun)


def w2(x: np.ndarray, y: np.ndarray) -> float:
    ot = pytest.importorskip("ot", minversion="0.9")
    return float(ot.emd2([], [], ot.dist(x, y)))


@pytest.mark.parametrize(("n", "m"), [(12, 12), (8, 12), (12, 9), (7, 1), (1, 6)])
@pytest.mark.parametrize("rank", [None, "displacement", "mean"])
@pytest.mark.parametrize("method", ["sparse", "mean"])
def test_maps_of_features_are_the_defined_ones(method: str, rank: str | None, n: int, m: int):
    x, y = samples(n, m, seed=n * m)
    z, before = transport(x, y)
    by_mean = rank == "mean" or (rank is None and method == "mean")
    strength = abs(y.mean(0) - x.mean(0)) if by_mean else ((z - x) ** 2).sum(0)
    for k in (1, 3, 5):
        got = sparse_shift_map(x, y, k, method=method, rank=rank)
        chosen = sorted(range(5), key=lambda j: -strength[j])[:k]
        want = x.copy()
        for j in chosen:
            want[:, j] = z[:, j] if method == "sparse" else x[:, j] + y[:, j].mean() - x[:, j].mean()
        assert got.features.tolist() == chosen
        np.testing.assert_allclose(got.mapped, want, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(got.shift, (want - x).mean(0), rtol=1e-7, atol=1e-7)
        assert math.isclose(got.cost, ((want - x) ** 2).sum(), rel_tol=1e-7)
        after = transport(want, y)[1]
        assert math.isclose(got.w2_before, before, rel_tol=1e-7)
        assert math.isclose(got.w2_after, after, rel_tol=1e-6, abs_tol=1e-7)
        assert math.isclose(got.percent_explained, 100 * (before - after) / before, rel_tol=1e-6, abs_tol=1e-5)
        assert got.labels is None


@pytest.mark.parametrize(("n", "m"), [(20, 20), (24, 16)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_clusters_move_as_a_whole(k: int, n: int, m: int):
    cluster = pytest.importorskip("sklearn.cluster")
    x, y = samples(n, m, d=3)
    z, _ = transport(x, y)
    got = sparse_shift_map(x, y, k, method="cluster", seed=5)
    pairs = np.concatenate([x, z], 1)
    labels = cluster.KMeans(k, n_init=10, random_state=5).fit_predict(pairs)
    np.testing.assert_array_equal(got.labels, labels)
    for c in range(k):
        own = labels == c
        np.testing.assert_allclose(got.shift[c], (z[own] - x[own]).mean(0), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(got.mapped[own], x[own] - x[own].mean(0) + z[own].mean(0), rtol=1e-7, atol=1e-9)
    assert math.isclose(got.percent_explained, 100 * (w2(x, y) - w2(got.mapped, y)) / w2(x, y), rel_tol=1e-6)
    assert sorted(got.features.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 45), (31, 17)])
def test_distances_equal_pot(n: int, m: int):
    x, y = samples(n, m)
    for method in ("sparse", "mean"):
        got = sparse_shift_map(x, y, 2, method=method)
        assert math.isclose(got.w2_before, w2(x, y), rel_tol=1e-10)
        assert math.isclose(got.w2_after, w2(got.mapped, y), rel_tol=1e-10)


@given(n=st.integers(2, 25), d=st.integers(1, 6), seed=st.integers(0, 999))
def test_invariants(n: int, d: int, seed: int):
    x, y = samples(n, n, d, seed)
    full = sparse_shift_map(x, y, d)
    assert full.percent_explained == 100.0
    assert full.w2_after == 0.0
    assert math.isclose(full.cost / n, full.w2_before, rel_tol=1e-10)
    # Every map costs at least what it gains, by the triangle inequality; sparser maps cost less.
    costs = [sparse_shift_map(x, y, k).cost for k in range(1, d + 1)]
    assert costs == sorted(costs)
    for method in ("sparse", "mean"):
        got = sparse_shift_map(x, y, 1, method=method)
        assert math.sqrt(got.cost / n) + math.sqrt(got.w2_after) >= math.sqrt(got.w2_before) - 1e-9
        assert np.array_equal(np.delete(got.mapped, got.features, 1), np.delete(x, got.features, 1))
        moved = sparse_shift_map(3 * x + 7, 3 * y + 7, 1, method=method)
        np.testing.assert_allclose(moved.mapped, 3 * got.mapped + 7, rtol=1e-9, atol=1e-9)
        assert math.isclose(moved.percent_explained, got.percent_explained, rel_tol=1e-6, abs_tol=1e-6)
        assert math.isclose(moved.cost, 9 * got.cost, rel_tol=1e-9)
        order = np.random.default_rng(seed).permutation(d)
        assert order[sparse_shift_map(x[:, order], y[:, order], 1, method=method).features].tolist() == list(
            got.features
        )
    # A mean shift of everything leaves the means equal and explains |difference|^2 exactly.
    mean = sparse_shift_map(x, y, d, method="mean")
    np.testing.assert_allclose(mean.mapped.mean(0), y.mean(0), atol=1e-10)
    gained = ((y.mean(0) - x.mean(0)) ** 2).sum()
    assert math.isclose(mean.w2_before - mean.w2_after, gained, rel_tol=1e-7, abs_tol=1e-9)


def test_one_cluster_is_the_mean_shift_and_many_are_the_full_map():
    pytest.importorskip("sklearn")
    x, y = samples(15, 15)
    one, mean = sparse_shift_map(x, y, 1, method="cluster"), sparse_shift_map(x, y, 5, method="mean")
    np.testing.assert_allclose(one.mapped, mean.mapped, atol=1e-12)
    every = sparse_shift_map(x, y, 15, method="cluster")
    np.testing.assert_allclose(every.percent_explained, 100.0, rtol=1e-9)


def test_a_planted_shift_is_found():
    x = np.random.default_rng(0).normal(size=(80, 6))
    y = x.copy()
    y[:, 2] += 4.0
    y[:, 4] -= 2.0
    for method in ("sparse", "mean"):
        found = sparse_shift_map(x, y, 2, method=method)
        assert found.features.tolist() == [2, 4]
        np.testing.assert_allclose(found.percent_explained, 100.0, rtol=1e-9)
        np.testing.assert_allclose(sparse_shift_map(x, y, 1, method=method).w2_after, 4.0, rtol=1e-9)
    # A shift without a difference in the means is seen by displacements alone.
    wide = x * np.array([1.0, 1.0, 1.0, 5.0, 1.0, 1.0])
    wide -= wide.mean(0) - x.mean(0)
    assert sparse_shift_map(x, wide, 1).features.tolist() == [3]
    assert sparse_shift_map(x, wide, 1, method="mean").percent_explained == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_new_points_move_as_their_nearest_neighbours(method: str):
    if method == "cluster":
        pytest.importorskip("sklearn")
    x, y = samples(20, 14)
    found = sparse_shift_map(x, y, 2, method=method)
    np.testing.assert_allclose(found.transform(x), found.mapped, atol=1e-12)
    new = samples(9, 1, seed=7)[0]
    for point, moved in zip(new, found(new), strict=True):
        nearest = min(range(20), key=lambda i: ((x[i] - point) ** 2).sum())
        np.testing.assert_allclose(moved - point, found.mapped[nearest] - x[nearest], atol=1e-12)
    assert found(torch.from_numpy(new).float()).dtype == torch.float32


def test_equal_samples_have_nothing_to_explain():
    x, _ = samples(6, 6)
    found = sparse_shift_map(x, x[::-1], 1)
    assert math.isnan(found.percent_explained)
    assert found.cost == found.w2_before == 0.0
    assert math.isnan(sparse_shift_map(x, np.repeat(x, 2, axis=0), 1).percent_explained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_numpy_in_numpy_out(method: str, dtype: torch.dtype):
    if method == "cluster":
        pytest.importorskip("sklearn")
    x, y = (torch.from_numpy(v).to(dtype) for v in samples(10, 10))
    before = x.clone()
    got = sparse_shift_map(x, y, 2, method=method)
    arrays = sparse_shift_map(x.numpy(), y.numpy(), 2, method=method)
    for name in ("features", "shift", "mapped", "labels"):
        if getattr(got, name) is not None:
            assert isinstance(getattr(got, name), torch.Tensor)
            assert isinstance(getattr(arrays, name), np.ndarray)
            np.testing.assert_array_equal(getattr(arrays, name), getattr(got, name).numpy())
    assert got.mapped.dtype == got.shift.dtype == dtype
    assert got.features.dtype == torch.int64
    assert torch.equal(x, before)
    assert arrays.percent_explained == got.percent_explained
    x += 100.0
    assert torch.equal(got.transform(before), got.transform(before.clone()))
    torch.testing.assert_close(got.transform(before), got.mapped)


@pytest.mark.parametrize("method", METHODS)
def test_pictures(method: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    figure = pytest.importorskip("matplotlib.figure")
    pytest.importorskip("sklearn")
    x, y = samples(20, 20, d=25)
    found = sparse_shift_map(x, y, 3, method=method)
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    names = [f"f{j}" for j in range(25)]
    found.plot(tmp_path / "shift.png", names=names, dpi=60)
    found.plot(str(tmp_path / "shift.svg"))
    assert (tmp_path / "shift.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "shift.svg").stat().st_size > 1000
    axes = drawn[0].axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == 20
    assert f"{found.percent_explained:.1f} %" in axes.get_title("left")
    bars = [[bar.get_width() for bar in group] for group in axes.containers]
    if method == "cluster":
        rows = [names.index(label) for label in labels]
        np.testing.assert_allclose(bars, found.shift[:, rows])
    else:
        assert labels[:3] == [names[j] for j in found.features]
        want = found.shift if method == "mean" else np.sqrt(((found.mapped - x) ** 2).mean(0))
        np.testing.assert_allclose(bars[0], want[found.features])
        assert len(bars[1]) == 17


def test_missing_packages_are_named(tmp_path, monkeypatch: pytest.MonkeyPatch):
    x, y = samples(5, 5)
    found = sparse_shift_map(x, y, 1)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install shiftkern\[demo\]"):
        sparse_shift_map(x, y, 1, method="cluster")
    with pytest.raises(ImportError, match=r"matplotlib: pip install shiftkern\[demo\]"):
        found.plot(tmp_path / "x.png")


X, Y = (torch.from_numpy(v) for v in samples(6, 5, d=3))


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"X": X[0]}, "X", ValueError),
        ({"X": X[:0]}, "X", ValueError),
        ({"X": X * math.nan}, "X", ValueError),
        ({"X": X.long()}, "X", TypeError),
        ({"X": None}, "X", TypeError),
        ({"Y": Y[:, :2]}, "Y", ValueError),
        ({"Y": Y[:0]}, "Y", ValueError),
        ({"Y": Y * math.inf}, "Y", ValueError),
        ({"Y": Y.numpy()}, "Y", TypeError),
        ({"k": 0}, "k", ValueError),
        ({"k": 4}, "k", ValueError),
        ({"k": 1.0}, "k", TypeError),
        ({"k": 7, "method": "cluster"}, "k", ValueError),
        ({"X": X[:1].repeat(6, 1), "Y": Y[:1].repeat(5, 1), "k": 2, "method": "cluster"}, "k", ValueError),
        ({"method": "median"}, "method", ValueError),
        ({"method": None}, "method", TypeError),
        ({"rank": "size"}, "rank", ValueError),
        ({"rank": 1}, "rank", TypeError),
        ({"seed": -1}, "seed", ValueError),
        ({"seed": 1 << 32}, "seed", ValueError),
        ({"seed": 0.5}, "seed", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    if change.get("method") == "cluster":
        pytest.importorskip("sklearn")
    with pytest.raises(error, match=f"sparse_shift_map: argument '{name}': expected .*, got ") as caught:
        sparse_shift_map(**{"X": X, "Y": Y, "k": 2, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize(
    ("call", "name", "error"),
    [
        (lambda found: found.transform(X[:, :2]), "X", ValueError),
        (lambda found: found.transform(X[:0]), "X", ValueError),
        (lambda found: found.transform(X * math.nan), "X", ValueError),
        (lambda found: found.transform("x"), "X", TypeError),
        (lambda found: found.plot(3), "path", TypeError),
        (lambda found: found.plot("x.png", names=["a"]), "names", ValueError),
        (lambda found: found.plot("x.png", names="abc"), "names", TypeError),
        (lambda found: found.plot("x.png", names=[1, 2, 3]), "names", TypeError),
        (lambda found: found.plot("x.png", names=5), "names", TypeError),
        (lambda found: found.plot("x.png", dpi=0), "dpi", ValueError),
    ],
)
def test_errors_of_the_result(call, name: str, error: type):
    found = sparse_shift_map(X, Y, 1)
    with pytest.raises(error, match=rf"SparseShiftMap\.\w+: argument '{name}': expected .*, got ") as caught:
        call(found)
    assert isinstance(caught.value, shiftkern.ShiftkernError)
