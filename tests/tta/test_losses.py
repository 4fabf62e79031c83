"""Losses against float64 loops over samples, classes and positions."""

import math

import pytest
import torch

from shiftkern.tta import class_correlation_loss, softmax_entropy, symmetric_cross_entropy

SHAPES = [(1, 2), (5, 3), (4, 1), (2, 3, 4), (2, 3, 2, 5)]


def softmax(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def rows(logits):
    """Per sample, the list of class rows, one for each position."""
    n, k = logits.shape[:2]
    return [sample.reshape(k, -1).T.tolist() for sample in logits.reshape(n, k, -1)]


def draw(shape, seed=0, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_is_the_sum_over_classes(shape):
    logits = draw(shape)
    expected = [sum(-p * math.log(p) for row in sample for p in softmax(row)) / len(sample) for sample in rows(logits)]
    assert softmax_entropy(logits).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_cross_entropy_is_the_sum_over_classes(shape):
    a, b = draw(shape, 1), draw(shape, 2)
    expected = []
    for one, two in zip(rows(a), rows(b), strict=True):
        total = 0.0
        for r, s in zip(one, two, strict=True):
            p, q = softmax(r), softmax(s)
            total += sum(-0.5 * y * math.log(x) - 0.5 * x * math.log(y) for x, y in zip(p, q, strict=True))
        expected.append(total / len(one))
    got = symmetric_cross_entropy(a, b)
    assert got.shape == (shape[0],)
    assert got.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_symmetric_cross_entropy_invariants():
    a, b = draw((6, 4), 1), draw((6, 4), 2)
    assert torch.equal(symmetric_cross_entropy(a, b), symmetric_cross_entropy(b, a))
    torch.testing.assert_close(symmetric_cross_entropy(a, a), softmax_entropy(a), rtol=1e-14, atol=0)
    torch.testing.assert_close(symmetric_cross_entropy(a + 7, b - 3), symmetric_cross_entropy(a, b))
    torch.testing.assert_close(
        symmetric_cross_entropy(a[:, [2, 0, 1, 3]], b[:, [2, 0, 1, 3]]), symmetric_cross_entropy(a, b)
    )
    # At least the mean of the two entropies, by Gibbs.
    assert (symmetric_cross_entropy(a, b) >= (softmax_entropy(a) + softmax_entropy(b)) / 2).all()


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 1])
def test_class_correlation_is_the_mean_off_diagonal_product(shape):
    logits = draw(shape)
    flat = [softmax(row) for sample in rows(logits) for row in sample]
    k = shape[1]
    pairs = [sum(p[i] * p[j] for p in flat) / len(flat) for i in range(k) for j in range(k) if i != j]
    assert float(class_correlation_loss(logits)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_class_correlation_limits():
    assert float(class_correlation_loss(torch.zeros(3, 4))) == pytest.approx(1 / 16)
    assert float(class_correlation_loss(1e4 * torch.eye(3))) == 0
    # 1 - sum p^2 would cancel to zero here
    small = class_correlation_loss(torch.tensor([[30.0, 0.0]]))
    assert float(small) == pytest.approx(math.exp(-30), rel=1e-5)


def test_gradients():
    a, b = draw((3, 4), 1).requires_grad_(), draw((3, 4), 2).requires_grad_()
    assert torch.autograd.gradcheck(softmax_entropy, a)
    assert torch.autograd.gradcheck(symmetric_cross_entropy, (a, b))
    assert torch.autograd.gradcheck(class_correlation_loss, a)


@pytest.mark.parametrize("loss", [softmax_entropy, class_correlation_loss, lambda x: symmetric_cross_entropy(x, x)])
def test_large_logits_stay_finite(loss):
    assert loss(torch.tensor([[1e30, -1e30], [3e38, 3e38]])).isfinite().all()


@pytest.mark.parametrize("loss", [softmax_entropy, class_correlation_loss, lambda x: symmetric_cross_entropy(x, x)])
def test_nan_propagates(loss):
    assert loss(torch.tensor([[float("nan"), 1.0]])).isnan().all()


@pytest.mark.parametrize("loss", [softmax_entropy, class_correlation_loss, lambda x: symmetric_cross_entropy(x, x)])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([[1.0, 2.0]], TypeError),
        (torch.ones(2, 3, dtype=torch.int64), TypeError),
        (torch.ones(3), ValueError),
        (torch.ones(0, 3), ValueError),
        (torch.ones(3, 0), ValueError),
    ],
)
def test_logits_errors(loss, value, error):
    with pytest.raises(error, match="argument 'logits'"):
        loss(value)


def test_other_errors():
    with pytest.raises(ValueError, match="argument 'teacher_logits': expected shape"):
        symmetric_cross_entropy(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(TypeError, match="argument 'teacher_logits'"):
        symmetric_cross_entropy(torch.ones(2, 3), [[1.0]])
    with pytest.raises(ValueError, match="at least 2 classes"):
        class_correlation_loss(torch.ones(2, 1))
