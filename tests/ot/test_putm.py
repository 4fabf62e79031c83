"""PUTM against a task solved in NumPy, gradients and Adam written out; its parts, behaviour and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import shiftkern
from shiftkern.ot.putm import putm


def task(
    sizes: tuple[int, ...] = (9, 2, 5), shots: int = 1, d: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rectified features around a centre for each class; queries of unequal classes."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), d, generator=g, dtype=torch.float64).clamp(min=0)
    labels, truth = (torch.arange(len(sizes)).repeat_interleave(torch.tensor(n)) for n in ([shots] * len(sizes), sizes))
    truth = truth[torch.randperm(len(truth), generator=g)]
    support, query = (
        (centres[own] + 0.9 * torch.randn(len(own), d, generator=g, dtype=torch.float64)).clamp(min=0)
        for own in (labels, truth)
    )
    return support.to(dtype), labels, query.to(dtype), truth


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small are only slowed down by threads, and very much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 6), nn.LeakyReLU(), nn.Linear(6, 3), nn.LeakyReLU(), nn.Linear(3, 1)).double()


class Twin:
    """The authors' loop for one task: no autograd, no torch."""

    def __init__(self, layers, lr: float):
        self.parameters = [p.detach().numpy().copy() for p in layers.parameters()]
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.parameters]
        self.lr, self.steps = lr, 0

    def forward(self, x):
        self.inputs, self.signs = [x], []
        for i in range(3):
            x = x @ self.parameters[2 * i].T + self.parameters[2 * i + 1]
            if i < 2:
                self.signs.append(np.where(x > 0, 1.0, 0.01))
                x = x * self.signs[-1]
                self.inputs.append(x)
        return x[..., 0]

    def step(self, by_distance):
        self.steps += 1
        by_output, gradients = by_distance[..., None], [None] * 6
        for i in (2, 1, 0):
            gradients[2 * i] = np.einsum("nko,nki->oi", by_output, self.inputs[i])
            gradients[2 * i + 1] = by_output.sum((0, 1))
            if i:
                by_output = (by_output @ self.parameters[2 * i]) * self.signs[i - 1]
        for p, g, (m, v) in zip(self.parameters, gradients, self.moments, strict=True):
            m += 0.5 * (g - m)
            v += 0.01 * (g * g - v)
            p -= self.lr * (m / (1 - 0.5**self.steps)) / (np.sqrt(v / (1 - 0.99**self.steps)) + 1e-8)


def softmax(x, axis: int):
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def solved(support, labels, query, layers, *, n_iter, inner_steps, lr, alpha, rho, theta, power):
    z = np.concatenate([support.numpy(), query.numpy()])
    if power is not None:
        z = (z + 1e-6) ** power
        # The triangular factor of the transposed features, from their inner products.
        z = np.linalg.cholesky(z @ z.T)
        z = z / np.sqrt((z * z).sum(1, keepdims=True))
    shots, classes = len(support), int(labels.max()) + 1
    given_ = np.eye(classes)[labels.numpy()]
    mu = np.stack([z[:shots][labels.numpy() == c].mean(0) for c in range(classes)])
    twin, costs = Twin(layers, lr), []

    def plan():
        for _ in range(inner_steps):
            squares = (z[shots:, None] - mu) ** 2
            cost, d = squares.sum(-1), twin.forward(squares)
            f, b = softmax(-d, 1), softmax(-d, 0)
            ct = rho * (f * cost).sum(1).mean() + (1 - rho) * (b * cost).sum(0).mean()
            s = (rho * f + (1 - rho) * b).sum(0)
            # The authors' target; only its gradient matters here.
            balance = 2 / classes * (s - 1 / classes)
            by_f = (1 - theta) * rho * cost / len(f) + theta * rho * balance
            by_b = (1 - theta) * (1 - rho) * cost / classes + theta * (1 - rho) * balance
            by_d = -f * (by_f - (f * by_f).sum(1, keepdims=True)) - b * (by_b - (b * by_b).sum(0, keepdims=True))
            twin.step(by_d)
        costs.append((1 - theta) * ct + theta * ((s - s.mean()) ** 2).mean())
        return f

    for _ in range(n_iter):
        weights = np.concatenate([given_, plan()])
        mu = mu + alpha * (weights.T @ z / weights.sum(0)[:, None] - mu)
    return plan(), mu, np.array(costs)


@pytest.mark.parametrize("power", [None, 0.6])
@pytest.mark.parametrize(("rho", "theta"), [(0.5, 0.0), (1.0, 0.001), (0.3, 0.4), (0.0, 1.0)])
def test_equals_the_loop_written_out(rho: float, theta: float, power: float | None):
    support, labels, query, _ = task(shots=2)
    layers = network(40 if power is None else 22)
    options = {"n_iter": 4, "inner_steps": 6, "lr": 0.01, "rho": rho, "theta": theta, "power": power}
    got = putm(support, labels, query, navigator=layers, alpha=0.3, **options)
    probs, prototypes, costs = solved(support, labels, query, layers, alpha=0.3, **options)
    np.testing.assert_allclose(got.probs, probs, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(got.costs, costs, rtol=1e-8, atol=1e-12)
    # Coordinates of the rotated features are unique up to their signs.
    np.testing.assert_allclose(got.prototypes.abs(), np.abs(prototypes), rtol=1e-8, atol=1e-9)


def test_the_default_step_depends_on_the_shots():
    for shots, alpha in ((1, 0.2), (3, 0.1)):
        support, labels, query, _ = task(shots=shots)
        options = {"n_iter": 3, "inner_steps": 2}
        default = putm(support, labels, query, **options)
        assert torch.equal(default.probs, putm(support, labels, query, alpha=alpha, **options).probs)
        assert not torch.equal(default.prototypes, putm(support, labels, query, alpha=0.15, **options).prototypes)


@given(seed=st.integers(0, 999), n_iter=st.integers(0, 5), shots=st.integers(1, 3), alpha=st.floats(0.05, 1))
def test_a_fixed_navigator_is_plain_expectation_maximisation(seed: int, n_iter: int, shots: int, alpha: float):
    support, labels, query, _ = task(seed=seed, shots=shots)
    got = putm(
        support, labels, query, navigator=lambda s: 0.1 * s.sum(-1), n_iter=n_iter, alpha=alpha, power=None, rho=1.0
    )
    mu = torch.stack([support[labels == c].mean(0) for c in range(3)])
    for step in range(n_iter + 1):
        pi = (-0.1 * torch.cdist(query, mu).square()).softmax(1)
        if step < n_iter:
            for c in range(3):
                own, weight = support[labels == c], pi[:, c]
                mean = (own.sum(0) + weight @ query) / (len(own) + weight.sum())
                mu[c] += alpha * (mean - mu[c])
    torch.testing.assert_close(got.probs, pi, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got.prototypes, mu, rtol=1e-8, atol=1e-10)
    assert len(got.costs) == n_iter + 1


def test_invariants():
    support, labels, query, _ = task(shots=2)
    options = {"n_iter": 5, "inner_steps": 5, "power": None}
    got = putm(support, labels, query, **options)
    torch.testing.assert_close(got.probs.sum(1), torch.ones(len(query)).double())
    assert bool((got.probs >= 0).all())
    assert torch.equal(got.labels, got.classes[got.probs.argmax(1)])
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(putm(support, labels, query[order], **options).probs, got.probs[order])
    order = torch.randperm(len(support), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(putm(support[order], labels[order], query, **options).probs, got.probs)
    named = putm(support, torch.tensor([7, -2, 40])[labels], query, **options)
    assert named.classes.tolist() == [-2, 7, 40]
    torch.testing.assert_close(named.probs[:, [1, 0, 2]], got.probs)
    assert torch.equal(named.labels, torch.tensor([7, -2, 40])[got.labels])
    torch.testing.assert_close(putm(support + 3, labels, query + 3, **options).probs, got.probs)
    # Prototypes are averages of the features.
    features = torch.cat([support, query])
    assert bool((got.prototypes >= features.min(0).values - 1e-9).all())
    assert bool((got.prototypes <= features.max(0).values + 1e-9).all())


def test_the_power_transform_forgets_scale_and_unused_directions():
    support, labels, query, _ = task()
    options = {"n_iter": 3, "inner_steps": 4}
    want = putm(support, labels, query, **options)
    assert want.prototypes.shape == (3, 3 + 16)
    scaled = putm(1e6 * support, labels, 1e6 * query, **options)
    torch.testing.assert_close(scaled.probs, want.probs, rtol=1e-3, atol=1e-3)
    few = putm(support[:, :7], labels, query[:, :7], **options)
    assert few.prototypes.shape == (3, 7)


def test_it_beats_nearest_prototypes_on_unequal_classes():
    right = before = total = 0
    for seed in range(4):
        support, labels, query, truth = task((30, 12, 6, 4, 20), d=60, seed=seed, dtype=torch.float32)
        found = putm(support, labels, query, lr=1e-2, n_iter=12, inner_steps=8)
        unit = nn.functional.normalize
        nearest = torch.cdist(unit(query.pow(0.6)), unit(support.pow(0.6))).argmin(1)
        right += int((found.labels == truth).sum())
        before += int((nearest == truth).sum())
        total += len(truth)
        assert found.costs[-1] < found.costs[0]
    assert right > before + 0.02 * total


def test_seeds_and_modules():
    support, labels, query, _ = task()
    options = {"n_iter": 2, "inner_steps": 3}
    state = torch.get_rng_state()
    first = putm(support, labels, query, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(putm(support, labels, query, seed=3, **options).probs, first.probs)
    assert not torch.equal(putm(support, labels, query, seed=4, **options).probs, first.probs)
    layers = network(19)
    before = [p.clone() for p in layers.parameters()]
    with torch.no_grad():
        inside = putm(support, labels, query, navigator=layers, **options)
    assert torch.equal(inside.probs, putm(support, labels, query, navigator=layers, **options).probs)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(layers.parameters(), before, strict=True))
    frozen = network(19).requires_grad_(False)
    assert putm(support, labels, query, navigator=frozen, **options).probs.shape == (16, 3)


def test_results_are_detached_and_inputs_kept():
    support, labels, query, _ = task()
    before = support.clone(), query.clone()
    got = putm(support.requires_grad_(), labels, query.requires_grad_(), n_iter=1, inner_steps=1)
    assert not got.probs.requires_grad
    assert not got.prototypes.requires_grad
    assert support.grad is None
    assert torch.equal(support.detach(), before[0])
    assert torch.equal(query.detach(), before[1])


def test_numpy_in_numpy_out_and_single_precision():
    support, labels, query, _ = task(dtype=torch.float32)
    options = {"n_iter": 2, "inner_steps": 3}
    got = putm(support.numpy(), labels.numpy(), query.numpy(), **options)
    want = putm(support, labels, query, **options)
    for name in ("probs", "labels", "classes", "prototypes", "costs"):
        assert isinstance(getattr(got, name), np.ndarray)
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name).numpy())
    assert got.probs.dtype == got.prototypes.dtype == np.float32
    assert got.labels.dtype == np.int64
    wide = putm(support.double(), labels, query.double(), **options)
    torch.testing.assert_close(want.probs.double(), wide.probs, rtol=1e-3, atol=1e-4)
    assert len(putm(support, labels, query[:1], **options).labels) == 1


S, L, Q, _ = task(dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"support": S[0]}, "support", ValueError),
        ({"support": S[:0]}, "support", ValueError),
        ({"support": S - 5}, "support", ValueError),
        ({"support": S * math.nan}, "support", ValueError),
        ({"support": S.half()}, "support", TypeError),
        ({"support": None}, "support", TypeError),
        ({"support_labels": L[:2]}, "support_labels", ValueError),
        ({"support_labels": L * 0}, "support_labels", ValueError),
        ({"support_labels": L.float()}, "support_labels", TypeError),
        ({"support_labels": L.numpy()}, "support_labels", TypeError),
        ({"query": Q[:, :3]}, "query", ValueError),
        ({"query": Q[:0]}, "query", ValueError),
        ({"query": -Q}, "query", ValueError),
        ({"query": Q * math.inf}, "query", ValueError),
        ({"query": Q.double()}, "query", TypeError),
        ({"query": Q.numpy()}, "query", TypeError),
        ({"n_iter": -1}, "n_iter", ValueError),
        ({"n_iter": 1.0}, "n_iter", TypeError),
        ({"inner_steps": 0}, "inner_steps", ValueError),
        ({"inner_steps": "3"}, "inner_steps", TypeError),
        ({"lr": 0.0}, "lr", ValueError),
        ({"lr": None}, "lr", TypeError),
        ({"alpha": 0.0}, "alpha", ValueError),
        ({"alpha": 1.1}, "alpha", ValueError),
        ({"alpha": "x"}, "alpha", TypeError),
        ({"rho": -0.1}, "rho", ValueError),
        ({"theta": 2.0}, "theta", ValueError),
        ({"power": 0.0}, "power", ValueError),
        ({"power": "x"}, "power", TypeError),
        ({"hidden": 1}, "hidden", ValueError),
        ({"navigator": 3}, "navigator", TypeError),
        ({"navigator": lambda squares: squares}, "navigator", ValueError),
        ({"navigator": lambda squares: squares.sum(-1) / 0.0}, "navigator", ValueError),
        ({"seed": -1}, "seed", ValueError),
        ({"seed": None}, "seed", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"putm: argument '{name}': expected .*, got ") as caught:
        putm(**{"support": S, "support_labels": L, "query": Q, "n_iter": 1, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)
