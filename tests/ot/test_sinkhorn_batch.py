"""Many problems at once: each must get the answer, stop and status that it gets alone."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError, ConvergenceWarning
from shiftkern.ot import sinkhorn, sinkhorn_batch

from helpers.transport import explicit_error, problem

DTYPES = [np.float32, np.float64]
VALUES = ("value", "value_linear", "value_kl", "value_entropy", "value_dual", "marginal_error", "n_iter", "converged")
unfinished = pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")


def problems(batch: int, n: int, m: int, dtype: type = np.float64):
    each = [problem(n, m, seed, dtype) for seed in range(batch)]
    return tuple(np.stack(parts) for parts in zip(*each, strict=True))


def same(batch, alone, i: int, n: int | None = None, m: int | None = None) -> None:
    """Problem ``i`` of a batch has the bits of the problem alone."""
    np.testing.assert_array_equal(batch.f[i, :n], alone.f)
    np.testing.assert_array_equal(batch.g[i, :m], alone.g)
    np.testing.assert_array_equal(batch.log_u[i, :n], alone.log_u)
    np.testing.assert_array_equal(batch.plan()[i, :n, :m], alone.plan())
    assert batch.status[i] == alone.status
    steps = alone.n_iter
    np.testing.assert_array_equal(batch.error_history[i, :steps], alone.error_history)
    assert np.isnan(batch.error_history[i, steps:]).all()


def nearly_same_values(batch, alone, i: int) -> None:
    for name in VALUES:
        assert getattr(batch, name)[i] == pytest.approx(getattr(alone, name), rel=1e-12, abs=1e-12), name


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["log", "scaling", "auto"])
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("shape", [(7, 5, 6), (3, 1, 9), (3, 33, 1), (2, 65, 130), (2, 260, 257)])
def test_is_the_loop_to_the_bit(dtype: type, method: str, order: str, shape: tuple[int, int, int]):
    # The last shape runs on all threads, one problem after the other; the others side by side.
    a, b, M = problems(*shape, dtype)
    reg = np.geomspace(0.02, 1.0, shape[0])
    options = {"method": method, "update_order": order, "max_iter": 60}
    result = sinkhorn_batch(M, reg, a, b, **options)
    for i in range(shape[0]):
        alone = sinkhorn(a[i], b[i], M[i], reg[i], **options)
        same(result, alone, i)
        nearly_same_values(result, alone, i)
    assert len(set(np.asarray(result.n_iter).tolist())) > 1 or 1 in shape[1:]


@unfinished
@pytest.mark.parametrize(
    "options",
    [
        {"omega": 1.4},
        {"reg_init": 2.0, "reg_decay": 0.7},
        {"reg_m": 0.5},
        {"reg_m": (0.5, math.inf)},
        {"reg_m": 0.3, "reg_m_type": "tv"},
        {"tol": 1e-3},
    ],
    ids=str,
)
def test_every_option_is_that_of_the_loop(options: dict):
    a, b, M = problems(4, 12, 9)
    result = sinkhorn_batch(M, 0.05, a, b, **options)
    for i in range(4):
        alone = sinkhorn(a[i], b[i], M[i], 0.05, **options)
        same(result, alone, i)
        nearly_same_values(result, alone, i)


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["fg", "gf"])
@pytest.mark.parametrize("method", ["log", "scaling"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ragged_problems_with_nan_beyond_their_ends(dtype: type, order: str, method: str, weighted: bool):
    lengths = np.array([[1, 1], [5, 40], [33, 17], [40, 33], [16, 1], [40, 40]])
    batch, n, m = 6, 40, 40
    M = np.full((batch, n, m), np.nan, dtype=dtype)
    a, b = np.full((batch, n), np.nan), np.full((batch, m), np.nan)
    for i, (rows, columns) in enumerate(lengths):
        a[i, :rows], b[i, :columns], M[i, :rows, :columns] = problem(rows, columns, i, dtype)
    weights = (a, b) if weighted else (None, None)
    options = {"update_order": order, "method": method, "max_iter": 200}
    result = sinkhorn_batch(M, 0.05, *weights, lengths=lengths, **options)
    P = result.plan()
    rows_met, columns_met = result.marginals()
    for i, (rows, columns) in enumerate(lengths):
        own = (a[i, :rows], b[i, :columns]) if weighted else (None, None)
        alone = sinkhorn(*own, M[i, :rows, :columns], 0.05, **options)
        same(result, alone, i, rows, columns)
        nearly_same_values(result, alone, i)
        assert (result.f[i, rows:] == -np.inf).all()
        assert (result.g[i, columns:] == -np.inf).all()
        assert not P[i, rows:].any()
        assert not P[i, :, columns:].any()
        assert not rows_met[i, rows:].any()
        assert not columns_met[i, columns:].any()
    V = np.random.default_rng(0).random((batch, m, 2)).astype(dtype)
    np.testing.assert_allclose(result.apply(V), P @ V, rtol=1e-5)
    np.testing.assert_allclose(result.apply_t(V), P.transpose(0, 2, 1) @ V, rtol=1e-5)
    tensor = sinkhorn_batch(torch.from_numpy(M), 0.05, lengths=torch.from_numpy(lengths), **options)
    assert tensor.plan().isfinite().all()


@unfinished
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_the_length_of_the_padding_does_not_change_a_bit(dtype: type, seed: int):
    # Sums of weights must not depend on how many zeros follow.
    rng = np.random.default_rng(seed)
    rows, columns = (int(k) for k in rng.integers(1, 200, 2))
    a, b, M = problem(rows, columns, seed, dtype)
    a, b = rng.uniform(0.5, 2) * a, b
    b *= a.sum() / b.sum()
    alone = sinkhorn(a, b, M, 0.05, max_iter=20)
    for extra in (1, 7, 64, 100):
        wide = np.full((2, rows + extra, columns + extra), np.nan, dtype=dtype)
        wide[:, :rows, :columns] = M
        left, right = np.zeros((2, rows + extra)), np.zeros((2, columns + extra))
        left[:, :rows], right[:, :columns] = a, b
        batch = sinkhorn_batch(wide, 0.05, left, right, lengths=[[rows, columns]] * 2, max_iter=20)
        same(batch, alone, 1, rows, columns)


def test_what_lies_beyond_the_end_has_no_influence():
    _a, _b, M = problems(3, 10, 12)
    lengths = [[10, 5], [3, 12], [7, 7]]
    results = []
    for junk in [0.0, math.nan, math.inf, -math.inf, 1e300]:
        dirty = M.copy()
        for i, (rows, columns) in enumerate(lengths):
            dirty[i, rows:], dirty[i, :, columns:] = junk, junk
        results.append(sinkhorn_batch(dirty, 0.1, lengths=lengths))
    for other in results[1:]:
        np.testing.assert_array_equal(other.plan(), results[0].plan())
        np.testing.assert_array_equal(other.value, results[0].value)
        np.testing.assert_array_equal(other.marginal_error, results[0].marginal_error)


def test_each_problem_has_its_own_end():
    M = np.random.default_rng(0).random((4, 30, 30)).astype(np.float32)
    M[2] = [0.5] * 30
    blocked = np.full((30, 30), 3.0, dtype=np.float32)
    blocked[:2, 1:] = np.inf
    M[3] = blocked
    with pytest.warns(ConvergenceWarning, match=r"^sinkhorn_batch: 2 of 4 problems did not converge \(") as caught:
        result = sinkhorn_batch(M, np.array([1.0, 0.002, 0.1, 0.1]), max_iter=50)
    assert caught[0].filename == __file__
    assert result.status == ["converged", "max_iter", "converged", "max_iter"]
    assert result.converged.tolist() == [True, False, True, False]
    assert result.n_iter[2] == 1
    assert result.n_iter.tolist()[1] == 50
    assert "1 problems" not in repr(result)
    assert result.marginal_error[3] > 0.05


def test_one_end_early_changes_nothing_for_the_others():
    a, b, M = problems(5, 20, 15)
    together = sinkhorn_batch(M, 0.02, a, b)
    easy = np.array([10.0, 0.02, 10.0, 0.02, 10.0])
    mixed = sinkhorn_batch(M, easy, a, b)
    for i in (1, 3):
        np.testing.assert_array_equal(mixed.f[i], together.f[i])
    order = [3, 1, 4, 0, 2]
    shuffled = sinkhorn_batch(M[order], 0.02, a[order], b[order])
    np.testing.assert_array_equal(shuffled.plan(), together.plan()[order])


def test_many_small_problems():
    M = torch.rand(600, 8, 9, generator=torch.Generator().manual_seed(0))
    result = sinkhorn_batch(M, 0.1)
    assert bool(result.converged.all())
    for i in (0, 299, 599):
        alone = sinkhorn(None, None, M[i], 0.1)
        assert torch.equal(alone.plan(), result.plan()[i])


@pytest.mark.parametrize("shape", [(9, 30, 40), (3, 260, 270)])
@pytest.mark.parametrize("method", ["log", "scaling"])
def test_same_bits_for_any_number_of_threads(shape: tuple[int, int, int], method: str):
    a, b, M = problems(*shape, np.float32)
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        results.append(sinkhorn_batch(M, 0.05, a, b, method=method))
    for other in results[1:]:
        np.testing.assert_array_equal(other.f, results[0].f)
        np.testing.assert_array_equal(other.g, results[0].g)
        np.testing.assert_array_equal(other.error_history, results[0].error_history)
        np.testing.assert_array_equal(other.value, results[0].value)


def test_warm_start():
    a, b, M = problems(3, 20, 25)
    cold = sinkhorn_batch(M, 0.02, a, b, tol=1e-9, max_iter=20_000)
    for start in (cold, (cold.f, cold.g)):
        warm = sinkhorn_batch(M * 1.001, 0.02, a, b, tol=1e-9, max_iter=20_000, warmstart=start)
        again = sinkhorn_batch(M * 1.001, 0.02, a, b, tol=1e-9, max_iter=20_000)
        assert (warm.n_iter < again.n_iter).all()
        np.testing.assert_allclose(warm.plan(), again.plan(), atol=1e-8)
    lengths = [[20, 25], [11, 9], [4, 25]]
    ragged = sinkhorn_batch(M, 0.05, lengths=lengths)
    assert (sinkhorn_batch(M, 0.05, lengths=lengths, warmstart=ragged).n_iter <= 3).all()


def test_kinds_and_dtypes():
    a, b, M = problems(3, 6, 5, np.float32)
    result = sinkhorn_batch(M, 0.1, a, b)
    assert result.f.shape == (3, 6)
    assert result.g.shape == (3, 5)
    assert result.plan().shape == (3, 6, 5)
    for name in ("value", "value_dual", "value_kl", "value_linear", "value_entropy"):
        value = getattr(result, name)
        assert isinstance(value, np.ndarray)
        assert value.shape == (3,)
        assert value.dtype == np.float32
    assert result.marginal_error.shape == (3,)
    assert result.n_iter.dtype == np.int64
    assert result.converged.dtype == np.bool_
    assert result.error_history.shape == (3, result.n_iter.max())
    assert result.apply(np.ones((3, 5))).shape == (3, 6)
    assert result.apply(np.ones((3, 5, 4))).shape == (3, 6, 4)
    assert result.apply_t(np.ones((3, 6, 4))).shape == (3, 5, 4)
    assert result.barycentric(np.ones((3, 5, 2))).shape == (3, 6, 2)
    np.testing.assert_allclose(result.barycentric(np.ones((3, 5))), 1.0, rtol=1e-6)
    tensors = [torch.from_numpy(x) for x in (M, a, b)]
    turned = sinkhorn_batch(tensors[0], torch.tensor([0.1] * 3), *tensors[1:])
    np.testing.assert_allclose(turned.plan().numpy(), result.plan(), rtol=1e-3, atol=1e-8)
    assert isinstance(turned.value, torch.Tensor)
    assert torch.equal(
        sinkhorn_batch(tensors[0].half(), 0.1).plan(), sinkhorn_batch(tensors[0].half().float(), 0.1).plan()
    )
    strided = torch.from_numpy(M).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(sinkhorn_batch(strided, 0.1).plan(), sinkhorn_batch(tensors[0], 0.1).plan())
    one = torch.from_numpy(M[:1]).expand(4, 6, 5)
    assert torch.equal(sinkhorn_batch(one, 0.1).plan()[3], sinkhorn_batch(one, 0.1).plan()[0])


def test_inputs_are_not_modified():
    a, b, M = problems(2, 6, 5)
    M[0, 4:] = np.nan
    reg, lengths = np.array([0.1, 0.2]), np.array([[4, 5], [6, 3]])
    before = [x.copy() for x in (a, b, M, reg, lengths)]
    sinkhorn_batch(M, reg, lengths=lengths).plan()
    for now, old in zip((a, b, M, reg, lengths), before, strict=True):
        np.testing.assert_array_equal(now, old)


_A, _B, _M = problems(2, 4, 5)
_BAD = [
    ("M", {"M": _M[0]}, ArgumentError),
    ("M", {"M": _M[:0], "a": None, "b": None}, ArgumentError),
    ("M", {"M": _M[:, :0], "a": None}, ArgumentError),
    ("M", {"M": np.where(_M.max() == _M, np.nan, _M)}, ArgumentError),
    ("M", {"M": np.full((2, 4, 5), np.inf)}, ArgumentError),
    ("M", {"M": 3}, ArgumentTypeError),
    ("a", {"a": _A[0]}, ArgumentError),
    ("a", {"a": -_A}, ArgumentError),
    ("a", {"a": np.array([[0.25] * 4, [0.0] * 4])}, ArgumentError),
    ("b", {"b": _B * [[1.0], [2.0]]}, ArgumentError),
    ("b", {"b": _B * np.nan}, ArgumentError),
    ("reg", {"reg": np.ones(3)}, ArgumentError),
    ("reg", {"reg": np.array([1.0, 0.0])}, ArgumentError),
    ("reg", {"reg": np.array([1.0, np.nan])}, ArgumentError),
    ("reg", {"reg": np.array([1.0, np.inf])}, ArgumentError),
    ("reg", {"reg": -1.0}, ArgumentError),
    ("reg", {"reg": "1"}, ArgumentTypeError),
    ("reg", {"reg": None}, ArgumentTypeError),
    ("reg", {"reg": torch.ones(2)}, ArgumentTypeError),
    ("lengths", {"lengths": np.array([[4, 5]])}, ArgumentError),
    ("lengths", {"lengths": np.array([4, 5])}, ArgumentError),
    ("lengths", {"lengths": np.array([[4, 6], [4, 5]])}, ArgumentError),
    ("lengths", {"lengths": np.array([[0, 5], [4, 5]])}, ArgumentError),
    ("lengths", {"lengths": np.array([[-1, 5], [4, 5]])}, ArgumentError),
    ("lengths", {"lengths": np.array([[4.0, 5.0], [4.0, 5.0]])}, None),
    ("lengths", {"lengths": np.ones((2, 2), dtype=bool)}, None),
    ("lengths", {"lengths": "long"}, ArgumentTypeError),
    ("lengths", {"lengths": [[1, 2], [3]]}, None),
    (r"warmstart\[0\]", {"warmstart": (_A[0], _B[0])}, ArgumentError),
    ("max_iter", {"max_iter": 0}, ArgumentError),
    ("tol", {"tol": -1.0}, ArgumentError),
    ("method", {"method": "x"}, ArgumentError),
    ("omega", {"omega": 2.5}, ArgumentError),
]


@pytest.mark.parametrize(("name", "change", "error"), _BAD)
def test_what_does_not_fit_is_refused_by_name(name: str, change: dict, error: type | None):
    arguments = {"M": _M, "reg": 0.1, "a": _A, "b": _B, **change}
    # ArgumentTypeError where none is given: a TypeError or a ValueError are both right.
    with pytest.raises(error or (ArgumentError, ArgumentTypeError), match=rf"^sinkhorn_batch: argument '{name}': "):
        sinkhorn_batch(**arguments)


def test_the_failing_problem_is_named():
    M = _M.copy()
    M[1, 2] = np.inf
    with pytest.raises(ArgumentError, match=r"^sinkhorn_batch: argument 'M': .* row 2 of problem 1$"):
        sinkhorn_batch(M, 0.1)
    M[1, 2] = np.nan
    with pytest.raises(ArgumentError, match=r"^sinkhorn_batch: argument 'M': .* of problem 1$"):
        sinkhorn_batch(M, 0.1)


def test_unknown_options_are_refused():
    for name in ("mass", "batched", "iterations", "cost"):
        with pytest.raises(TypeError, match=name):
            sinkhorn_batch(_M, 0.1, **{name: 0.5})


@unfinished
@given(
    batch=st.integers(1, 6),
    n=st.integers(1, 30),
    m=st.integers(1, 30),
    seed=st.integers(0, 999),
    ragged=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_properties(batch: int, n: int, m: int, seed: int, ragged: bool, dtype: type):
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(batch, n, m)).astype(dtype)
    reg = rng.uniform(0.05, 2, batch)
    lengths = np.stack([rng.integers(1, n + 1, batch), rng.integers(1, m + 1, batch)], 1) if ragged else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = sinkhorn_batch(M, reg, lengths=lengths)
    P = result.plan()
    assert np.isfinite(P).all()
    assert (P >= 0).all()
    for i in range(batch):
        rows, columns = lengths[i] if ragged else (n, m)
        a = (np.arange(n) < rows) / rows
        b = (np.arange(m) < columns) / columns
        error = explicit_error(P[i], a, b)
        assert result.marginal_error[i] == pytest.approx(error, abs=1e-4 if dtype == np.float32 else 1e-12)
        if result.converged[i]:
            assert error <= (1.1e-4 if dtype == np.float32 else 1.001e-7)


def test_plain_sequences_are_arrays():
    _, _, M = problem(4, 3)
    lists = sinkhorn_batch([M.tolist(), (2 * M).tolist()], [0.1, 0.2], [], [])
    arrays = sinkhorn_batch(np.stack([M, 2 * M]), np.array([0.1, 0.2]))
    np.testing.assert_array_equal(lists.f, arrays.f)
