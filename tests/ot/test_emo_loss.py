"""The earth mover distance of next tokens against loops, linear programmes and the published composition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from shiftkern.ot.emo_loss import emo_loss


def problem(positions, vocabulary=7, d=4, seed=0, dtype=torch.float64, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    shape = (positions,) if isinstance(positions, int) else positions
    logits = scale * torch.randn(*shape, vocabulary, generator=g, dtype=torch.float64)
    labels = torch.randint(vocabulary, shape, generator=g)
    return logits.to(dtype), labels, torch.randn(vocabulary, d, generator=g, dtype=torch.float64).to(dtype)


def loops(logits, labels, embedding):
    """DEMD of each token, one vocabulary entry at a time."""
    embedding = np.asarray(embedding, dtype=np.float64)
    out = []
    for row, y in zip(np.asarray(logits, dtype=np.float64), np.asarray(labels), strict=True):
        top = max(row)
        q = [math.exp(v - top) for v in row]
        total = 0.0
        for v in range(len(row)):
            norms = math.sqrt(sum(embedding[v] ** 2)) * math.sqrt(sum(embedding[y] ** 2))
            total += q[v] / sum(q) * (1 - sum(embedding[v] * embedding[y]) / norms)
        out.append(total)
    return np.array(out)


@given(n=st.integers(1, 8), vocabulary=st.integers(1, 9), d=st.integers(1, 6), seed=st.integers(0, 999))
def test_demd_is_the_loop(n, vocabulary, d, seed):
    logits, labels, embedding = problem(n, vocabulary, d, seed)
    want = loops(logits, labels, embedding)
    for reduction, expected in (("none", want), ("sum", want.sum()), ("mean", want.mean())):
        got = emo_loss(logits, labels, embedding, reduction=reduction)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_it_is_the_optimal_transport_to_the_true_token():
    logits, labels, embedding = problem(3, 5)
    unit = torch.nn.functional.normalize(embedding, dim=1)
    cost = (1 - unit @ unit.T).numpy()
    for row, y, got in zip(logits, labels, emo_loss(logits, labels, embedding, reduction="none"), strict=True):
        rows, columns = np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))
        masses = np.concatenate([row.softmax(0).numpy(), np.eye(5)[y]])
        programme = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=masses)
        assert float(got) == pytest.approx(programme.fun, abs=1e-9)


@given(seed=st.integers(0, 999), offset=st.floats(-50, 50), scale=st.floats(1e-3, 1e3))
def test_invariants(seed, offset, scale):
    logits, labels, embedding = problem(6, seed=seed)
    got = emo_loss(logits, labels, embedding, reduction="none")
    assert bool(((got >= 0) & (got <= 2)).all())
    torch.testing.assert_close(emo_loss(logits + offset, labels, embedding, reduction="none"), got)
    scales = scale * torch.arange(1, 8, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(emo_loss(logits, labels, embedding * scales, reduction="none"), got)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    renamed = emo_loss(logits[:, order], order.argsort()[labels], embedding[order], reduction="none")
    torch.testing.assert_close(renamed, got)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    torch.testing.assert_close(emo_loss(logits, labels, embedding @ rotation, reduction="none"), got)


def test_certainty_costs_nothing_and_synonyms_are_free():
    logits, labels, embedding = problem(5)
    certain = torch.full_like(logits, -math.inf).scatter(1, labels.unsqueeze(1), 0.0)
    assert emo_loss(certain, labels, embedding).item() == 0.0
    alike = embedding[:1] * torch.arange(1, 8, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(emo_loss(logits, labels, alike), torch.zeros((), dtype=torch.float64))
    # Opposite directions: twice the mass in the wrong place.
    opposite = torch.tensor([[1.0], [-3.0]])
    torch.testing.assert_close(emo_loss(torch.zeros(1, 2), torch.tensor([1]), opposite), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_distances_keep_their_digits(dtype):
    logits = torch.tensor([[30.0, 0.0, 1.0]], dtype=dtype)
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=dtype)
    want = (1 + 2 * math.e) / (math.exp(30) + 1 + math.e)
    assert emo_loss(logits, torch.tensor([0]), embedding).item() == pytest.approx(want, rel=10 * torch.finfo(dtype).eps)


def test_rows_without_direction():
    logits, labels, embedding = problem(4)
    embedding[2] = 0.0
    labels[0] = 2
    embedding.requires_grad_()
    got = emo_loss(logits, labels, embedding, reduction="none")
    assert got[0].item() == pytest.approx(1 - logits[0].softmax(0)[2].item())
    (gradient,) = torch.autograd.grad(got.sum(), embedding)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[2] == 0).all())


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_scales_of_the_embedding_whose_squares_leave_float32(scale):
    logits, labels, embedding = problem(4, dtype=torch.float32)
    torch.testing.assert_close(emo_loss(logits, labels, embedding * scale), emo_loss(logits, labels, embedding))


def test_published_composition():
    logits, labels, embedding = problem(6)
    labels[2] = -100
    logits.requires_grad_()
    demd = emo_loss(logits, labels, embedding, reduction="none")
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    want = 0.5 * (ce + (ce / (demd + 1e-10)).detach() * demd)
    got = emo_loss(logits, labels, embedding, reduction="none", cross_entropy=True)
    torch.testing.assert_close(got, want)
    mean = emo_loss(logits, labels, embedding, cross_entropy=True)
    torch.testing.assert_close(mean, want.sum() / 5)
    torch.testing.assert_close(got, ce, rtol=1e-8, atol=0)  # the value is that of the cross-entropy
    wanted, gotten = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (want.sum() / 5, mean))
    torch.testing.assert_close(gotten, wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients(reduction):
    logits, labels, embedding = problem(3, 5, 3)
    labels[1] = -100
    embedding[4] = 0.0
    loss = lambda z, e: emo_loss(z, labels, torch.cat([e, embedding[4:]]), reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), embedding[:4].clone().requires_grad_()))
    z, fixed = logits.detach().requires_grad_(), embedding.detach()
    emo_loss(z, labels, fixed).backward()
    assert fixed.grad is None
    assert bool((z.grad[1] == 0).all())
    torch.testing.assert_close(z.grad.sum(1), torch.zeros(3, dtype=torch.float64))


def test_ignored_positions_have_no_influence():
    logits, labels, embedding = problem((2, 3))
    labels[0, 1] = labels[1, 2] = -7
    kept = labels != -7
    want = emo_loss(logits[kept], labels[kept], embedding)
    spoilt = logits.clone()
    spoilt[0, 1], spoilt[1, 2] = math.nan, math.inf
    spoilt.requires_grad_()
    got = emo_loss(spoilt, labels, embedding, ignore_index=-7)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, spoilt)
    assert bool(torch.isfinite(gradient).all())
    none = emo_loss(spoilt, labels, embedding, ignore_index=-7, reduction="none")
    assert none.shape == (2, 3)
    assert none[0, 1] == none[1, 2] == 0
    every = torch.full((2, 3), -7)
    assert emo_loss(logits, every, embedding, ignore_index=-7, reduction="sum") == 0
    assert not emo_loss(logits, every, embedding, ignore_index=-7, reduction="none").any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    logits, labels, embedding = problem(6, dtype=dtype)
    got = emo_loss(logits, labels.int(), embedding.float())
    assert got.dtype == dtype
    want = emo_loss(logits.double(), labels, embedding.double())
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_numpy_in_numpy_out():
    logits, labels, embedding = problem((2, 3), dtype=torch.float32)
    got = emo_loss(logits.numpy(), labels.numpy(), embedding.numpy(), reduction="none")
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, emo_loss(logits, labels, embedding, reduction="none").numpy())
    assert float(emo_loss([[0.0, 0.0]], [1], [[1.0], [-1.0]])) == 1.0


def test_shapes_and_layouts():
    logits, labels, embedding = problem((2, 3))
    got = emo_loss(logits, labels, embedding, reduction="none")
    laid = logits.transpose(0, 1).contiguous().transpose(0, 1), embedding.T.contiguous().T
    assert torch.equal(emo_loss(laid[0], labels, laid[1], reduction="none"), got)
    one = emo_loss(logits[0, 0], labels[0, 0], embedding)
    torch.testing.assert_close(one, got[0, 0])
    expanded = emo_loss(logits[:1].expand(4, 3, 7), labels[:1].expand(4, 3), embedding, reduction="none")
    torch.testing.assert_close(expanded, got[:1].expand(4, 3))
    assert emo_loss(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), torch.ones(1, 1)) == 0


GOOD = dict(zip(("logits", "labels", "embedding"), problem(3, 5, dtype=torch.float32), strict=True))


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"logits": 3.0}, "logits", TypeError),
        ({"logits": GOOD["logits"].long()}, "logits", TypeError),
        ({"logits": torch.tensor(1.0)}, "logits", ValueError),
        ({"logits": GOOD["logits"][:0], "labels": GOOD["labels"][:0]}, "logits", ValueError),
        ({"logits": GOOD["logits"] * math.nan}, "logits", ValueError),
        ({"logits": GOOD["logits"] + math.inf}, "logits", ValueError),
        ({"logits": GOOD["logits"] - math.inf}, "logits", ValueError),
        ({"labels": GOOD["labels"][:2]}, "labels", ValueError),
        ({"labels": GOOD["labels"].float()}, "labels", TypeError),
        ({"labels": GOOD["labels"].numpy()}, "labels", TypeError),
        ({"labels": torch.tensor([0, 5, 1])}, "labels", ValueError),
        ({"labels": torch.tensor([0, -1, 1])}, "labels", ValueError),
        ({"labels": torch.full((3,), -100)}, "labels", ValueError),
        ({"embedding": GOOD["embedding"][:4]}, "embedding", ValueError),
        ({"embedding": GOOD["embedding"][:, :0]}, "embedding", ValueError),
        ({"embedding": GOOD["embedding"][0]}, "embedding", ValueError),
        ({"embedding": GOOD["embedding"] * math.nan}, "embedding", ValueError),
        ({"embedding": GOOD["embedding"].numpy()}, "embedding", TypeError),
        ({"ignore_index": 1.5}, "ignore_index", TypeError),
        ({"ignore_index": True}, "ignore_index", TypeError),
        ({"reduction": "median"}, "reduction", ValueError),
        ({"reduction": None}, "reduction", TypeError),
        ({"cross_entropy": 1}, "cross_entropy", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change, name, error):
    with pytest.raises(error, match=f"emo_loss: argument '{name}': expected .*, got "):
        emo_loss(**{**GOOD, **change})


@pytest.mark.parametrize("labels", [[0, 1.5, 1], "abc", 4, [[0], [1, 2], [1]]])
def test_labels_beside_arrays(labels):
    with pytest.raises((TypeError, ValueError), match=r"emo_loss: argument 'labels': expected .*, got "):
        emo_loss(GOOD["logits"].numpy(), labels, GOOD["embedding"].numpy())
