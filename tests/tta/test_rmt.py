"""RMT against its losses written out in loops, and its options."""

import math

import pytest
import torch
from torch import nn

from shiftkern.tta import RMT, symmetric_cross_entropy


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.normal_(model[1].bias)
    return model


def batches(n=3):
    return list(torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def run(params, x):
    """Features and logits with BatchNorm on the batch, from the six parameters."""
    w1, b1, gamma, beta, w2, b2 = params
    h = x @ w1.T + b1
    h = (h - h.mean(0)) / (((h - h.mean(0)) ** 2).mean(0) + 1e-5).sqrt() * gamma + beta
    h = h.clamp(min=0)
    return h, h @ w2.T + b2


def augment(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def contrast(views, temperature):
    """Supervised-contrastive form: views is a list of samples, each a list of its views (unit vectors)."""
    anchors = [(i, j) for i in range(len(views)) for j in range(len(views[i]))]
    total = 0.0
    for i, j in anchors:
        similar = {(a, b): views[i][j] @ views[a][b] / temperature for a, b in anchors if (a, b) != (i, j)}
        log_sum = torch.stack(list(similar.values())).logsumexp(0)
        positives = [similar[i, b] - log_sum for b in range(len(views[i])) if b != j]
        total = total - sum(positives) / len(positives)
    return total / len(anchors)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("replay", [False, True])
def test_a_stream_written_out(given, replay):
    lr, momentum, temperature, weight = 0.05, 0.9, 0.2, 0.7
    prototypes = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) if given else None
    inputs, labels = (
        torch.randn(9, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
        torch.arange(9) % 3,
    )
    method = RMT(
        make(),
        prototypes=prototypes,
        source=(inputs, labels) if replay else None,
        replay_weight=0.5,
        lr=lr,
        temperature=temperature,
        projection_dim=7,
        contrastive_weight=weight,
        teacher_momentum=momentum,
        augment=augment,
        optimizer=torch.optim.SGD,
        seed=5,
    )
    assert [tuple(p.shape) for p in method.projector.parameters()] == [(7, 6), (7,), (7, 7), (7,)]
    projector = [p.detach().clone() for p in method.projector.parameters()]
    generator = torch.Generator()
    generator.set_state(method.generator.get_state())
    student = [p.detach().clone() for p in make().parameters()]
    teacher = [p.clone() for p in student]
    anchors = student[4].clone() if prototypes is None else prototypes

    for x in batches():
        params = [p.detach().requires_grad_() for p in [*student, *projector]]
        student, (a1, c1, a2, c2) = params[:6], params[6:]
        features, logits = run(student, x)
        features_aug, logits_aug = run(student, augment(x, generator))
        target = run(teacher, x)[1]
        loss = 0.0
        for z in (logits, logits_aug):
            for p, q in zip(z.softmax(1), target.softmax(1), strict=True):
                loss = loss + 0.5 * (-0.5 * (q * p.log()).sum() - 0.5 * (p * q.log()).sum()) / len(x)
        views = []
        for f, g in zip(features, features_aug, strict=True):
            cosine = [float((f @ a / f.norm() / a.norm()).detach()) for a in anchors]
            three = (anchors[cosine.index(max(cosine))], f, g)
            projected = [(a1 @ v + c1).clamp(min=0) @ a2.T + c2 for v in three]
            views.append([v / v.norm() for v in projected])
        loss = loss + weight * contrast(views, temperature)
        if replay:
            rows = torch.randint(9, (5,), generator=generator)
            log_p = run(student, inputs[rows])[1].log_softmax(1)
            loss = loss + 0.5 * -sum(log_p[i, labels[rows[i]]] for i in range(5)) / 5
        expected = (logits + target).detach()
        gradients = torch.autograd.grad(loss, params)
        params = [(p - lr * g).detach() for p, g in zip(params, gradients, strict=True)]
        student, projector = params[:6], params[6:]
        teacher = [momentum * t + (1 - momentum) * p for t, p in zip(teacher, student, strict=True)]
        torch.testing.assert_close(method(x), expected, rtol=1e-8, atol=1e-9)

    for module, values in ((method.model, student), (method.projector, projector), (method.teacher, teacher)):
        for p, q in zip(module.parameters(), values, strict=True):
            torch.testing.assert_close(p.data, q, rtol=1e-8, atol=1e-9)


def test_the_defaults_are_the_papers():
    method = RMT(make())
    assert (method.temperature, method.teacher_momentum, method.contrastive_weight) == (0.1, 0.999, 1.0)
    assert [p.shape[0] for p in method.projector.parameters()] == [128] * 4
    assert len(method.optimizer.param_groups[0]["params"]) == 6 + 4


def test_prediction_is_student_plus_teacher():
    method = RMT(make())
    _, logits = run([p.detach() for p in make().parameters()], batches()[0])
    torch.testing.assert_close(method(batches()[0]), 2 * logits, rtol=1e-9, atol=1e-9)


def test_without_contrast_only_the_consistency_is_trained():
    method = RMT(make(), contrastive_weight=0, augment=lambda x, g: x.clone())
    before = [p.detach().clone() for p in method.projector.parameters()]
    with torch.no_grad():
        method.model[3].weight.mul_(2)
    teacher = run([p.detach() for p in make().parameters()], batches()[0])[1]
    last = None
    for _ in range(30):
        logits = method(batches()[0]) - teacher
        value = float(symmetric_cross_entropy(logits, teacher).mean())
        assert last is None or value < last + 1e-9
        last = value
    assert all(torch.equal(p, q) for p, q in zip(method.projector.parameters(), before, strict=True))


def test_one_sample_has_only_positives():
    method = RMT(make(), projection_dim=4)
    views = torch.randn(1, 6, dtype=torch.float64)
    value = method._contrast(views, views.clone())
    # three rows; with two positives of similarity a and b the loss is log(e^a + e^b) - (a + b) / 2 >= log 2
    assert float(value.detach()) >= math.log(2) - 1e-9


def test_projector_draws_like_torch():
    method = RMT(make(), projection_dim=4000)
    weight = method.projector[0].weight.detach()
    assert float(weight.abs().max()) <= 1 / math.sqrt(6)
    assert abs(float(weight.var()) - 1 / 6 / 3) < 0.005


def test_features_by_name():
    method = RMT(make(), features="2")
    default = RMT(make())
    for x in batches():
        torch.testing.assert_close(method(x), default(x), rtol=1e-12, atol=1e-12)


def test_prototypes_must_fit_the_features():
    method = RMT(make(), prototypes=torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"argument 'prototypes': expected a tensor \(P, 6\)"):
        method(batches()[0])


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("temperature", (0, -1, math.nan, "x")),
        ("projection_dim", (0, 1.5, "x")),
        ("contrastive_weight", (-1, math.nan, math.inf, "x", None)),
        ("replay_weight", (-1, math.nan, "x")),
        ("teacher_momentum", (-0.1, 1.1, math.nan)),
        ("augment", ("flip",)),
        (
            "prototypes",
            ([[1.0]], torch.ones(3), torch.ones(0, 6), torch.ones(3, 6).long(), torch.full((3, 6), math.nan)),
        ),
        (
            "source",
            (
                torch.ones(3),
                (torch.ones(3, 4),),
                (torch.ones(3, 4), torch.ones(2).long()),
                (torch.ones(3, 4), torch.ones(3)),
                (torch.ones(0, 4), torch.ones(0).long()),
            ),
        ),
    ],
)
def test_option_errors(option, values):
    for value in values:
        model = make()
        with pytest.raises((ValueError, TypeError), match=f"RMT: argument '{option}'"):
            RMT(model, **{option: value})
        assert type(model[1]) is nn.BatchNorm1d
