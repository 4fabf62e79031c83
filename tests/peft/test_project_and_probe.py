"""Pro^2 against scikit-learn's regressions in an explicit basis of what earlier rows leave."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.peft.project_and_probe import ProjectAndProbe


def task(n: int = 120, d: int = 6, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features that tell of the labels in every direction, less and less."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=g, dtype=torch.float64) * torch.linspace(1.5, 0.3, d)
    return torch.randn(n, d, generator=g, dtype=torch.float64) + centres[labels], labels


def regression(x: np.ndarray, y: np.ndarray, decay: float) -> np.ndarray:
    """Softmax regression of scikit-learn with a ridge on weights and biases; two classes as two rows."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    inputs = np.concatenate([x, np.ones((len(x), 1))], 1)
    binary = len(np.unique(y)) == 2
    # The ridge of one vector w is that of w / 2 and -w / 2 together.
    strength = 2.0 if binary else 1.0
    model = linear_model.LogisticRegression(
        C=strength / (decay * len(x)), fit_intercept=False, tol=1e-13, max_iter=9999
    )
    weights = model.fit(inputs, y).coef_
    return np.concatenate([-weights / 2, weights / 2]) if binary else weights


def projection_by_hand(x: np.ndarray, y: np.ndarray, k: int, decay: float) -> np.ndarray:
    """The constrained problems, solved in coordinates of the space that is orthogonal to all earlier rows."""
    rows = np.zeros((0, x.shape[1]))
    classes = len(np.unique(y))
    while len(rows) < k:
        basis = np.linalg.svd(rows, full_matrices=True)[2][len(rows) :] if len(rows) else np.eye(x.shape[1])
        weights = regression(x @ basis.T, y, decay)[:, :-1] @ basis
        rows = np.concatenate([rows, np.linalg.svd(weights)[2][: min(classes - 1, k - len(rows))]])
    return rows


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_rows_of_two_classes_solve_the_constrained_problems(k: int):
    x, y = task()
    model = ProjectAndProbe(6, 2, k).double().fit_projection(x, y)
    want = projection_by_hand(x.numpy(), y.numpy(), k, 0.01)
    overlaps = (model.projection.numpy() * want).sum(1)
    np.testing.assert_allclose(np.abs(overlaps), 1.0, atol=1e-8)
    # The sign: the higher class has the higher values.
    means = [model.transform(x[y == c]).mean(0) for c in (0, 1)]
    assert bool((means[1] > means[0]).all())


def test_each_row_is_a_minimum_on_its_own_sphere_of_directions():
    # Without scikit-learn: the gradient of the loss by a row lies in the span of the earlier rows.
    x, y = task()
    model = ProjectAndProbe(6, 2, 3).double().fit_projection(x, y)
    p = model.projection
    for i in range(3):
        # The best length and bias along the row.
        free = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        row = p[i].clone().requires_grad_()
        optimizer = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

        def loss(row=row, free=free):
            logit = free[0] * (x @ row) + free[1]
            data = torch.nn.functional.binary_cross_entropy_with_logits(logit, y.double())
            return data + 0.0025 * ((free[0] * row).square().sum() + free[1] ** 2)

        def closure(optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        (slope,) = torch.autograd.grad(loss(), row)
        allowed = slope - p[:i].T @ (p[:i] @ slope)
        assert float(allowed.abs().max()) < 1e-7
        assert float(slope.abs().max()) > 1e-3 or i == 0


@pytest.mark.parametrize(("classes", "k"), [(3, 1), (3, 2), (3, 5), (4, 4), (5, 3)])
def test_more_classes_take_the_span_of_a_softmax_regression(classes: int, k: int):
    x, y = task(200, 6, classes)
    model = ProjectAndProbe(6, classes, k).double().fit_projection(x, y)
    want = projection_by_hand(x.numpy(), y.numpy(), k, 0.01)
    np.testing.assert_allclose(np.abs((model.projection.numpy() * want).sum(1)), 1.0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_probe_is_a_regression_on_the_projected_features(classes: int):
    x, y = task(classes=classes)
    model = ProjectAndProbe(6, classes, 3, target_decay=0.05).double().fit_projection(x, y)
    target, labels = task(40, classes=classes, seed=5)
    model.fit_probe(target, labels)
    weights = regression(target.numpy() @ model.projection.numpy().T, labels.numpy(), 0.05)
    np.testing.assert_allclose(model.weight.numpy(), weights[:, :-1], atol=1e-7)
    np.testing.assert_allclose(model.bias.numpy(), weights[:, -1], atol=1e-7)
    logits = target.numpy() @ model.projection.numpy().T @ weights[:, :-1].T + weights[:, -1]
    np.testing.assert_allclose(model(target).numpy(), logits, atol=1e-6)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(target).numpy(), shares, atol=1e-6)
    assert model.predict(target).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(("d", "classes", "k"), [(6, 2, 6), (6, 4, 5), (40, 2, 20)])
def test_rows_are_orthonormal(d: int, classes: int, k: int):
    x, y = task(300, d, classes)
    p = ProjectAndProbe(d, classes, k).double().fit_projection(x, y).projection
    torch.testing.assert_close(p @ p.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)


def test_invariants():
    x, y = task()
    full = ProjectAndProbe(6, 2, 6).double().fit_projection(x, y).projection
    # More rows do not change the first ones, nor does the order of the examples.
    torch.testing.assert_close(ProjectAndProbe(6, 2, 2).double().fit_projection(x, y).projection, full[:2])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = ProjectAndProbe(6, 2, 6).double().fit_projection(x[order], y[order]).projection
    torch.testing.assert_close(shuffled, full, rtol=0, atol=1e-7)
    # A rotation of the space rotates the rows; the other classes' names turn their signs.
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turned = ProjectAndProbe(6, 2, 6).double().fit_projection(x @ turn, y).projection
    torch.testing.assert_close(turned, full @ turn, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        ProjectAndProbe(6, 2, 6).double().fit_projection(x, 1 - y).projection, -full, rtol=0, atol=1e-7
    )
    # The source is predicted less and less well by later rows.
    gaps = [full[i] @ (x[y == 1].mean(0) - x[y == 0].mean(0)) for i in range(6)]
    assert gaps[0] == max(gaps)


def test_adapts_with_few_labels_where_the_predictive_feature_changes():
    def shifted(n: int, first: float, second: float, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        labels = torch.arange(n) % 2
        x = torch.randn(n, 50, generator=g)
        # A small clean feature and a large noisy one.
        x[:, 0] = 0.3 * x[:, 0] + first * (2 * labels - 1)
        x[:, 1] = 1.5 * x[:, 1] + second * (2 * labels - 1)
        return x, labels

    source, test = shifted(2000, 0.45, 1.5, 0), shifted(1000, -0.45, 2.0, 1)
    right = dict.fromkeys((1, 3, 50), 0.0)
    for k in right:
        model = ProjectAndProbe(50, 2, k).fit_projection(*source)
        for seed in range(8):
            model.fit_probe(*shifted(12, -0.45, 2.0, 2 + seed))
            right[k] += (model.predict(test[0]) == test[1]).float().mean().item() / 8
    assert right[3] > right[1] + 0.04
    assert right[3] > right[50] + 0.04


def test_separable_and_missing_classes():
    x, y = task(20, 30)
    model = ProjectAndProbe(30, 2, 2).double().fit_projection(x, y)
    assert (model.transform(x)[:, 0] > model.transform(x)[:, 0].median()).long().tolist() == y.tolist()
    three = ProjectAndProbe(6, 3, 2).double().fit_projection(*task(classes=3))
    some, labels = task(12)
    three.fit_probe(some, labels)
    shares = three.predict_proba(some)
    assert bool(torch.isfinite(three.weight).all())
    assert bool((shares[:, 2] < shares[:, :2].amax(1)).all())
    assert ProjectAndProbe(6, 2, 2).double().fit_projection(*task()).fit_probe(some[:1], labels[:1]).stage == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    x, y = task()
    x = x.to(dtype)
    model = ProjectAndProbe(6, 2, 3).fit_projection(x, y).fit_probe(x, y)
    wide = ProjectAndProbe(6, 2, 3).double().fit_projection(x.double(), y).fit_probe(x.double(), y)
    assert model.projection.dtype == torch.float32
    torch.testing.assert_close(model.projection.double(), wide.projection, rtol=0, atol=1e-6)
    unit = torch.finfo(dtype).eps
    for name in ("transform", "forward", "predict_proba"):
        got = getattr(model, name)(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), getattr(wide, name)(x.double()), rtol=unit, atol=1e-5)
    assert model.predict(x).dtype == torch.int64
    assert model.transform(x.reshape(4, 30, 6)).shape == (4, 30, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), model(x))


def test_state_goes_on_elsewhere():
    x, y = task()
    model = ProjectAndProbe(6, 2, 3).fit_projection(x, y).fit_probe(x, y)
    twin = ProjectAndProbe(6, 2, 3)
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model)):
        assert torch.equal(other(x.float()), model(x.float()))
    assert not list(model.parameters())
    # The same bits again, and no random numbers.
    before = torch.get_rng_state()
    again = ProjectAndProbe(6, 2, 3).fit_projection(x, y).fit_probe(x, y)
    assert torch.equal(again.projection, model.projection)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        assert torch.equal(ProjectAndProbe(6, 2, 3).fit_projection(x, y).projection, model.projection)
    # A new projection forgets the probe.
    model.fit_projection(x, y)
    with pytest.raises(shiftkern.ArgumentError, match="argument 'weight': expected a probe learned by fit_probe"):
        model(x)


def test_gradient_by_features():
    x, y = task()
    model = ProjectAndProbe(6, 3, 3).double().fit_projection(*task(classes=3)).fit_probe(x, y)
    inputs = x[:4].clone().requires_grad_()
    for call in (model.transform, model, model.predict_proba):
        assert torch.autograd.gradcheck(call, (inputs,))


def test_too_few_iterations_are_reported():
    x, y = task()
    with pytest.warns(shiftkern.ConvergenceWarning, match="after max_iter=1 iterations"):
        ProjectAndProbe(6, 2, 1, max_iter=1).fit_projection(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProjectAndProbe(6, 2, 1).fit_projection(x, y)


def test_rows_beyond_what_tells_of_the_labels_complete_the_basis():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    # Two features that tell, one that is the same for both classes, one that is constant.
    pair = torch.randn(50, 4, generator=g, dtype=torch.float64).repeat_interleave(2, 0)
    pair[:, :2] += labels[:, None] * torch.tensor([2.0, 1.0])
    pair[:, 3] = 0.0
    model = ProjectAndProbe(4, 2, 4).double().fit_projection(pair, labels)
    p = model.projection
    torch.testing.assert_close(p @ p.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
    # A full basis is a rotation: the probe is then that of the features themselves.
    model.fit_probe(pair, labels)
    weights = regression(pair.numpy(), labels.numpy(), 0.01)
    np.testing.assert_allclose((model.weight @ p).numpy(), weights[:, :-1], atol=1e-7)
    with_nothing = ProjectAndProbe(6, 2, 5).double().fit_projection(torch.zeros(10, 6), torch.arange(10) % 2).projection
    torch.testing.assert_close(with_nothing @ with_nothing.T, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"in_features": 0}, "in_features"),
        ({"classes": 1}, "classes"),
        ({"k": 0}, "k"),
        ({"k": 7}, "k"),
        ({"source_decay": 0.0}, "source_decay"),
        ({"target_decay": -1.0}, "target_decay"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_options_out_of_range(options, name: str):
    with pytest.raises(shiftkern.ArgumentError, match=f"ProjectAndProbe: argument '{name}'"):
        ProjectAndProbe(**{"in_features": 6, "classes": 2, "k": 2, **options})


@pytest.mark.parametrize("fit", ["fit_projection", "fit_probe"])
def test_examples_that_do_not_fit(fit: str):
    x, y = task()
    model = ProjectAndProbe(6, 2, 2).fit_projection(x, y)
    nan = x.clone()
    nan[3, 2] = torch.nan
    for bad, name in (
        ((x[:, :5], y), "features"),
        ((x[0], y), "features"),
        ((x[:0], y[:0]), "features"),
        ((nan, y), "features"),
        ((x.long(), y), "features"),
        ((x.numpy(), y), "features"),
        ((x, y[:5]), "labels"),
        ((x, y.double()), "labels"),
        ((x, y + 1), "labels"),
        ((x, y - 1), "labels"),
    ):
        with pytest.raises(shiftkern.ArgumentError, match=f"ProjectAndProbe.{fit}: argument '{name}'"):
            getattr(model, fit)(*bad)
    if fit == "fit_projection":
        with pytest.raises(shiftkern.ArgumentError, match="at least two classes"):
            model.fit_projection(x, torch.zeros_like(y))


@pytest.mark.parametrize("name", ["transform", "forward", "predict", "predict_proba"])
def test_use_before_learning_and_inputs_that_do_not_fit(name: str):
    x, y = task()
    model = ProjectAndProbe(6, 2, 2)
    with pytest.raises(shiftkern.ArgumentError, match="argument 'projection': expected one learned by fit_projection"):
        getattr(model, name)(x)
    with pytest.raises(shiftkern.ArgumentError, match="argument 'projection'"):
        model.fit_probe(x, y)
    model.fit_projection(x, y).fit_probe(x, y)
    for bad in (x[:, :5], x.long(), None):
        with pytest.raises(shiftkern.ArgumentError, match="argument 'features'"):
            getattr(model, name)(bad)
