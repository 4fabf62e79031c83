import copy
import math

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.norm import DecayBatchNorm

from helpers.strategies import affine, make


def source(channels=3, dtype=torch.float32):
    layer = nn.BatchNorm2d(channels, dtype=dtype)
    mean, var, weight, bias = affine(channels, dtype)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("eta0", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (5, 3, 2, 2, 3)])
def test_the_sequence_equals_a_hand_loop(eta0, mode, shape):
    layer = DecayBatchNorm.from_batch_norm(source(dtype=torch.float64), eta0=eta0).train(mode)
    mean, var, weight, bias = affine(3, torch.float64)
    dims = [d for d in range(len(shape)) if d != 1]
    view = (1, 3, *[1] * (len(shape) - 2))
    for k in range(1, 6):
        x = make((shape[0] + k, *shape[1:]), torch.float64, k)
        eta = eta0 * math.exp(-k)
        mean = (1 - eta) * x.mean(dims) + eta * mean
        var = (1 - eta) * x.var(dims, correction=0) + eta * var
        expected = (x - mean.view(view)) / (var.view(view) + 1e-5).sqrt() * weight.view(view) + bias.view(view)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)
        assert layer.step.item() == k


def test_the_past_fades():
    layer = DecayBatchNorm(3)
    for k in range(40):
        x = make((5, 3, 4), seed=k)
        layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2)))


def test_gradients_are_those_of_the_mix():
    layer = DecayBatchNorm.from_batch_norm(source(dtype=torch.float64))
    x = make((4, 3, 5, 2), torch.float64)

    def function(x):
        return copy.deepcopy(layer)(x)

    assert torch.autograd.gradcheck(function, x.requires_grad_())
    layer(x).square().sum().backward()
    assert layer.weight.grad.any()
    assert not layer.running_mean.requires_grad


def test_two_steps_before_one_backward_pass():
    layer = DecayBatchNorm.from_batch_norm(source(dtype=torch.float64))
    twin = copy.deepcopy(layer)
    x, z = make((4, 3, 5, 2), torch.float64).requires_grad_(), make((4, 3, 5, 2), torch.float64, 4)
    expected = torch.autograd.grad(twin(x).square().sum(), x)[0]
    y = layer(x)
    layer(z)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_reset_is_exact():
    original = source()
    layer = DecayBatchNorm.from_batch_norm(original)
    layer(make((4, 3, 5, 2)))
    layer.reset()
    assert torch.equal(layer.running_mean, original.running_mean)
    assert torch.equal(layer.running_var, original.running_var)
    assert layer.step.item() == 0


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0)])
def test_an_empty_batch_changes_nothing(shape):
    layer = DecayBatchNorm(3)
    assert layer(torch.zeros(shape)).shape == shape
    assert layer.step.item() == 0
    assert not layer.running_mean.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_statistics(dtype):
    layer = DecayBatchNorm(3, dtype=dtype)
    assert layer(make((40, 3), dtype)).dtype == dtype
    assert layer.running_mean.dtype == dtype
    assert layer.running_mean.isfinite().all()


def test_state_lives_on_one_device():
    layer = DecayBatchNorm(3, device="meta")
    assert {b.device.type for b in layer.buffers()} == {"meta"}


def test_the_state_dict_resumes_the_stream():
    layer = DecayBatchNorm.from_batch_norm(source())
    layer(make((4, 3, 5, 2)))
    other = DecayBatchNorm(3)
    other.load_state_dict(layer.state_dict())
    x = make((4, 3, 5, 2), seed=9)
    assert torch.equal(layer(x), other(x))
    other.reset()
    assert torch.equal(other.running_mean, source().running_mean)


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"eta0": 1.5}, ArgumentError, "eta0"),
        ({"eta0": float("nan")}, ArgumentError, "eta0"),
        ({"eta0": "x"}, ArgumentTypeError, "eta0"),
        ({"num_features": -1}, ArgumentError, "num_features"),
        ({"eps": -1.0}, ArgumentError, "eps"),
    ],
)
def test_errors(options, error, argument):
    with pytest.raises(error, match=rf"^DecayBatchNorm: argument '{argument}': "):
        DecayBatchNorm(**{"num_features": 3, **options})


def test_bad_input():
    with pytest.raises(ArgumentError, match=r"^DecayBatchNorm: argument 'running_mean': "):
        DecayBatchNorm(3)(torch.zeros(2, 4))
    with pytest.raises(ArgumentTypeError, match=r"^DecayBatchNorm: argument 'x': "):
        DecayBatchNorm(3)(torch.zeros(2, 3, dtype=torch.int64))
