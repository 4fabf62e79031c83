"""CoTTA against a whole stream written out by hand, and its parts one by one."""

import copy
import math

import pytest
import torch
from torch import nn

from shiftkern.norm import convert_norm
from shiftkern.tta import Augment, CoTTA


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.normal_(model[1].bias)
    return model


def batches(n=3):
    return list(torch.randn(n, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def run(params, x):
    """The network with BatchNorm on the batch, from its six parameters."""
    w1, b1, gamma, beta, w2, b2 = params
    h = x @ w1.T + b1
    h = (h - h.mean(0)) / (((h - h.mean(0)) ** 2).mean(0) + 1e-5).sqrt() * gamma + beta
    return h.clamp(min=0) @ w2.T + b2


def augment(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_stream_written_out(threshold, steps):
    lr, momentum, restore, augmentations = 0.1, 0.9, 0.3, 4
    source = [p.detach().clone() for p in make().parameters()]
    student, teacher = [p.clone() for p in source], [p.clone() for p in source]
    generator = torch.Generator().manual_seed(5)
    expected = []
    for x in batches():
        for _ in range(steps):
            student = [p.detach().requires_grad_() for p in student]
            log_p = run(student, x).log_softmax(1)
            confidence = run(source, x).softmax(1).max(1).values.mean()
            if confidence < threshold:
                target = sum(run(teacher, augment(x, generator)) for _ in range(augmentations)) / augmentations
            else:
                target = run(teacher, x)
            loss = sum(-(q * lp).sum() for q, lp in zip(target.softmax(1), log_p, strict=True)) / len(x)
            gradients = torch.autograd.grad(loss, student)
            student = [(p - lr * g).detach() for p, g in zip(student, gradients, strict=True)]
            teacher = [momentum * t + (1 - momentum) * p for t, p in zip(teacher, student, strict=True)]
            for i, p in enumerate(student):
                mask = torch.rand(p.shape, generator=generator) < restore
                student[i] = torch.where(mask, source[i], p)
        expected.append(target)

    method = CoTTA(
        make(),
        lr=lr,
        steps=steps,
        teacher_momentum=momentum,
        restore_probability=restore,
        num_augmentations=augmentations,
        confidence_threshold=threshold,
        augment=augment,
        optimizer=torch.optim.SGD,
        seed=5,
    )
    for x, y in zip(batches(), expected, strict=True):
        torch.testing.assert_close(method(x), y, rtol=1e-8, atol=1e-9)
    for p, q in zip(method.model.parameters(), student, strict=True):
        torch.testing.assert_close(p.data, q, rtol=1e-8, atol=1e-9)
    for p, q in zip(method.teacher.parameters(), teacher, strict=True):
        torch.testing.assert_close(p.data, q, rtol=1e-8, atol=1e-9)


def count_teacher_calls(method):
    calls = []
    method.teacher.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_defaults_are_the_papers():
    method = CoTTA(make())
    assert (method.teacher_momentum, method.restore_probability) == (0.999, 0.01)
    assert (method.num_augmentations, method.confidence_threshold) == (32, 0.92)
    assert isinstance(method.optimizer, torch.optim.Adam)
    assert method.optimizer.param_groups[0]["lr"] == 1e-3
    assert sum(len(g["params"]) for g in method.optimizer.param_groups) == 6
    calls = count_teacher_calls(method)
    method(batches()[0])  # a random network is never that sure
    assert len(calls) == 32


def test_augments_only_below_the_source_confidence():
    x = batches()[0]
    source = [p.detach() for p in make().parameters()]
    confidence = float(run(source, x).softmax(1).max(1).values.mean())
    for threshold, expected in ((confidence - 1e-6, 1), (confidence + 1e-6, 5)):
        method = CoTTA(make(), confidence_threshold=threshold, num_augmentations=5)
        # the student's confidence must not matter, only the source's
        with torch.no_grad():
            method.model[3].weight.mul_(100)
        calls = count_teacher_calls(method)
        method(x)
        assert len(calls) == expected


def test_restoration_returns_source_values_at_its_rate():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 5))
    source = copy.deepcopy(model)
    method = CoTTA(model, restore_probability=0.2, num_augmentations=1, lr=0.1)
    method(torch.randn(4, 100))
    same = (method.model[0].weight == source[0].weight).double().mean()
    assert abs(float(same) - 0.2) < 0.02


@pytest.mark.parametrize(("probability", "changed"), [(1.0, False), (0.0, True)])
def test_restoration_limits(probability, changed):
    method = CoTTA(make(), restore_probability=probability, num_augmentations=1)
    method(batches()[0])
    for p, q in zip(method.model.parameters(), make().parameters(), strict=True):
        assert torch.equal(p, q) != changed or not changed
    assert torch.equal(method.model[3].weight, make()[3].weight) is not changed
    # the teacher averages the student before it is restored
    assert not torch.equal(method.teacher[3].weight, make()[3].weight)


def test_returns_the_teachers_prediction():
    method = CoTTA(make(), confidence_threshold=0)
    source = [p.detach() for p in make().parameters()]
    torch.testing.assert_close(method(batches()[0]), run(source, batches()[0]), rtol=1e-9, atol=1e-9)


def test_segmentation_logits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    method = CoTTA(model, num_augmentations=2, augment=Augment(degrees=0, translate=0, zoom=0))
    assert method(torch.rand(2, 1, 6, 6)).shape == (2, 3, 4, 4)


def test_the_model_is_not_left_with_the_sources_values():
    method = CoTTA(make(), restore_probability=0, num_augmentations=2, lr=0.1)
    method(batches()[0])
    moved = [p.detach().clone() for p in method.model.parameters()]
    method._source_output(batches()[1])
    assert all(torch.equal(p, q) for p, q in zip(method.model.parameters(), moved, strict=True))
    assert all(isinstance(p, nn.Parameter) for p in method.model.parameters())


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("teacher_momentum", (-0.1, 1.1, math.nan, "x")),
        ("restore_probability", (-0.1, 1.1, math.nan, "x")),
        ("confidence_threshold", (-0.1, 1.1, math.nan, "x")),
        ("num_augmentations", (0, -1, 1.5, "x")),
        ("augment", ("flip", 3)),
    ],
)
def test_option_errors(option, values):
    for value in values:
        model = make()
        with pytest.raises((ValueError, TypeError), match=f"CoTTA: argument '{option}'"):
            CoTTA(model, **{option: value})
        assert type(model[1]) is nn.BatchNorm1d


@pytest.mark.parametrize("result", [None, torch.tensor(1.0), torch.ones(2, 4)])
def test_what_augment_returns_is_checked(result):
    method = CoTTA(make(), augment=lambda x, g: result)
    with pytest.raises(ValueError, match="CoTTA: argument 'augment'"):
        method(batches()[0])


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="argument 'model'"):
        CoTTA(nn.Flatten())


def test_layers_with_moving_statistics_do_not_move_the_source():
    method = CoTTA(convert_norm(make(), "unmix", num_components=2, momentum=0.5), num_augmentations=1)
    start = {name: value.clone() for name, value in method.model.state_dict().items()}
    for x in batches():
        method(x)
    assert not torch.equal(method.model[1].component_mean, start["1.component_mean"])
    method.reset()
    assert all(torch.equal(start[name], value) for name, value in method.model.state_dict().items())
