"""Few-shot classification against the published loop in the kernel domain, and its invariants."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern.ot.pt_map import pt_map


def task(classes=3, shots=2, queries=5, d=8, seed=0, dtype=torch.float64, spread=0.5):
    """Non-negative features around class centres; queries in a random order."""
    g = torch.Generator().manual_seed(seed)
    centres = 2 * torch.rand(classes, d, generator=g, dtype=torch.float64)
    draw = lambda y: (centres[y] + spread * torch.randn(len(y), d, generator=g, dtype=torch.float64)).relu()  # noqa: E731
    known = torch.arange(classes).repeat(shots)
    unknown = torch.arange(classes).repeat(queries)[torch.randperm(classes * queries, generator=g)]
    return draw(known).to(dtype), known, draw(unknown).to(dtype), unknown


def published(support, labels, query, counts, beta=0.5, eps=1e-6, lam=10.0, alpha=0.2, steps=20):
    """The authors' procedure on plain arrays, with Sinkhorn in the kernel domain."""
    k = labels.max() + 1
    sets = []
    for x in (support, query):
        x = (np.asarray(x, dtype=np.float64) + eps) ** beta if beta else np.log(np.asarray(x, dtype=np.float64) + eps)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        x = x - x.mean(0)
        sets.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    data = np.concatenate(sets)
    mus = np.stack([sets[0][labels == c].mean(0) for c in range(k)])
    pinned = np.eye(k)[labels]

    def probabilities():
        p = np.empty((len(query), k))
        for i, x in enumerate(sets[1]):
            for c in range(k):
                p[i, c] = math.exp(-lam * sum((x - mus[c]) ** 2))
        while True:
            p *= (1.0 / p.sum(1))[:, None]
            p *= counts / p.sum(0)
            if np.abs(p.sum(1) - 1).max() < 1e-12:
                break
        return np.concatenate([pinned, p])

    for _ in range(steps):
        p = probabilities()
        mus = mus + alpha * (p.T @ data / p.sum(0)[:, None] - mus)
    return probabilities()[len(labels) :], mus


@pytest.mark.parametrize(
    "options",
    [
        {"lam": 3.0},
        {"lam": 3.0, "beta": 1.0, "eps": 0.0},
        {"lam": 3.0, "beta": 0.0, "eps": 0.1},
        {"lam": 2.0, "alpha": 1.0, "n_steps": 4},
        {"lam": 5.0, "n_steps": 0},
        {"lam": 3.0, "alpha": 0.0, "n_steps": 2},
    ],
)
@pytest.mark.parametrize("seed", [0, 4])
def test_result_is_the_published_one(options, seed):
    support, labels, query, _ = task(seed=seed)
    result = pt_map(support, labels, query, tol=1e-12, max_iter=20_000, **options)
    renamed = {"steps": options["n_steps"]} if "n_steps" in options else {}
    rest = {k: v for k, v in options.items() if k != "n_steps"}
    probs, mus = published(support.numpy(), labels.numpy(), query.numpy(), np.full(3, 5.0), **rest, **renamed)
    np.testing.assert_allclose(result.probs.numpy(), probs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.prototypes.numpy(), mus, rtol=0, atol=1e-9)
    assert result.labels.tolist() == probs.argmax(1).tolist()
    assert result.converged
    assert result.marginal_error <= 1e-12


def test_given_class_counts():
    support, labels, query, _ = task(seed=2)
    counts = np.array([9.0, 5.0, 1.0])
    result = pt_map(support, labels, query, class_counts=torch.from_numpy(counts), lam=3.0, tol=1e-12, max_iter=20_000)
    probs, mus = published(support.numpy(), labels.numpy(), query.numpy(), counts, lam=3.0)
    np.testing.assert_allclose(result.probs.numpy(), probs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.prototypes.numpy(), mus, rtol=0, atol=1e-9)
    empty = pt_map(support, labels, query, class_counts=torch.tensor([7.0, 0.0, 8.0]))
    assert bool((empty.probs[:, 1] == 0).all())
    torch.testing.assert_close(
        empty.probs.sum(0), torch.tensor([7.0, 0.0, 8.0], dtype=torch.float64), rtol=0, atol=1e-5
    )
    # A class without queries keeps the prototype of its examples.
    apart = pt_map(support, labels, query, n_steps=0, lam=3.0).prototypes
    torch.testing.assert_close(empty.prototypes[1], apart[1])


@given(classes=st.integers(1, 5), shots=st.integers(1, 3), queries=st.integers(1, 6), seed=st.integers(0, 999))
def test_invariants(classes, shots, queries, seed):
    support, labels, query, _ = task(classes, shots, queries, seed=seed)
    result = pt_map(support, labels, query, lam=2.0, n_steps=5, tol=1e-8, max_iter=20_000)
    n = classes * queries
    assert bool((result.probs >= 0).all())
    torch.testing.assert_close(result.probs.sum(1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-8 * n)
    even = torch.full((classes,), float(queries), dtype=torch.float64)
    torch.testing.assert_close(result.probs.sum(0), even, rtol=0, atol=1e-8 * n)
    g = torch.Generator().manual_seed(seed)
    order, names = torch.randperm(n, generator=g), torch.randperm(classes, generator=g)
    shuffled = pt_map(support, names[labels], query[order], lam=2.0, n_steps=5, tol=1e-8, max_iter=20_000)
    torch.testing.assert_close(shuffled.probs[:, names], result.probs[order], rtol=0, atol=1e-5)
    features = torch.randperm(query.shape[1], generator=g)
    torch.testing.assert_close(
        pt_map(support[:, features], labels, query[:, features], lam=2.0, n_steps=5, tol=1e-8, max_iter=20_000).probs,
        result.probs,
        rtol=0,
        atol=1e-9,
    )


def test_transport_beats_nearest_prototypes_where_they_lie_badly():
    right, nearest, total = 0, 0, 0
    for seed in range(8):
        support, labels, query, truth = task(5, 1, 15, 16, seed, spread=1.0)
        right += int((pt_map(support, labels, query).labels == truth).sum())
        start = pt_map(support, labels, query, n_steps=0, lam=1e-6)
        unknown = torch.nn.functional.normalize((query + 1e-6).sqrt(), dim=1)
        unknown = torch.nn.functional.normalize(unknown - unknown.mean(0), dim=1)
        nearest += int((torch.cdist(unknown, start.prototypes).argmin(1) == truth).sum())
        total += len(truth)
    assert right > nearest + 0.05 * total


def test_vectors_without_direction():
    # One query is its own mean, and a row of zeros has no direction where nothing is added to it.
    support, labels, query, _ = task()
    one = pt_map(support, labels, query[:1])
    torch.testing.assert_close(one.probs, torch.full((1, 3), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-6)
    query[0] = 0.0
    assert bool(torch.isfinite(pt_map(support, labels, query, eps=0.0).probs).all())


def test_not_converging_is_said():
    support, labels, query, _ = task(spread=2.0)
    with pytest.warns(shiftkern.ConvergenceWarning, match="pt_map: 3 of 3 transport problems missed tol=1e-12 in 1"):
        result = pt_map(support, labels, query, n_steps=2, tol=1e-12, max_iter=1)
    assert not result.converged
    assert result.marginal_error > 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    support, labels, query, _ = task(dtype=dtype)
    result = pt_map(support, labels.short(), query)
    assert result.probs.dtype == result.prototypes.dtype == dtype
    want = pt_map(support.double(), labels, query.double())
    assert torch.equal(result.probs, want.probs.to(dtype))
    assert torch.equal(result.labels, want.labels)


def test_numpy_in_numpy_out():
    support, labels, query, _ = task(dtype=torch.float32)
    result = pt_map(support.numpy(), labels.numpy(), query.numpy(), class_counts=[5, 5, 5])
    assert all(isinstance(x, np.ndarray) for x in (result.labels, result.probs, result.prototypes))
    assert result.probs.dtype == np.float32
    np.testing.assert_array_equal(result.probs, pt_map(support, labels, query).probs.numpy())


def test_layouts_and_gradients():
    support, labels, query, _ = task()
    before = query.clone()
    want = pt_map(support, labels, query).probs
    got = pt_map(support.T.contiguous().T, labels, query.T.contiguous().T.requires_grad_()).probs
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert not got.requires_grad
    assert torch.equal(query, before)


GOOD = dict(zip(("support", "support_labels", "query"), task()[:3], strict=True))


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"support": 3}, "support", TypeError),
        ({"support": GOOD["support"].long()}, "support", TypeError),
        ({"support": GOOD["support"][0]}, "support", ValueError),
        ({"support": GOOD["support"][:0]}, "support", ValueError),
        ({"support": GOOD["support"] - 1}, "support", ValueError),
        ({"support": GOOD["support"] * math.nan}, "support", ValueError),
        ({"query": GOOD["query"].numpy()}, "query", TypeError),
        ({"query": GOOD["query"][:, :7]}, "query", ValueError),
        ({"query": GOOD["query"][:0]}, "query", ValueError),
        ({"query": GOOD["query"] + math.inf}, "query", ValueError),
        ({"query": -GOOD["query"]}, "query", ValueError),
        ({"support_labels": GOOD["support_labels"][:5]}, "support_labels", ValueError),
        ({"support_labels": GOOD["support_labels"].double()}, "support_labels", TypeError),
        ({"support_labels": GOOD["support_labels"] * 2}, "support_labels", ValueError),
        ({"support_labels": GOOD["support_labels"] * 10**15}, "support_labels", ValueError),
        ({"support_labels": GOOD["support_labels"] - 1}, "support_labels", ValueError),
        ({"support_labels": [0, 1, 2, 0, 1, 2]}, "support_labels", TypeError),
        ({"class_counts": torch.tensor([5.0, 10.0])}, "class_counts", ValueError),
        ({"class_counts": torch.tensor([5.0, 5.0, 6.0])}, "class_counts", ValueError),
        ({"class_counts": torch.tensor([-5.0, 10.0, 10.0])}, "class_counts", ValueError),
        ({"class_counts": [5, 5, 5]}, "class_counts", TypeError),
        ({"beta": -0.5}, "beta", ValueError),
        ({"eps": -1e-6}, "eps", ValueError),
        ({"eps": 0.0, "beta": 0.0}, "eps", ValueError),
        ({"lam": 0.0}, "lam", ValueError),
        ({"alpha": 1.5}, "alpha", ValueError),
        ({"n_steps": -1}, "n_steps", ValueError),
        ({"n_steps": 2.0}, "n_steps", TypeError),
        ({"tol": 0.0}, "tol", ValueError),
        ({"max_iter": 0}, "max_iter", ValueError),
    ],
)
def test_errors_name_operator_and_argument(change, name, error):
    with pytest.raises(error, match=f"pt_map: argument '{name}': expected .*, got "):
        pt_map(**{**GOOD, **change})
