"""CUDA tensors run in torch operations and must agree with the Rust kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import shiftkern
from shiftkern._library import OPERATORS
from shiftkern.norm import (
    channel_moments,
    convert_norm,
    ema_update_,
    merge_moments,
    mixed_batch_norm,
    mixed_batch_norm_,
    revert_norm,
    style_shift,
    unmix_norm,
)
from shiftkern.ot import sinkhorn, sinkhorn_assign, sinkhorn_batch, sinkhorn_partial, sinkhorn_samples
from shiftkern.tta import LAME, OSUDA, RMT, BatchNormAdapt, CoTTA, Tent, UnMix, lame

from helpers.samples import PATHS, SAMPLES, detached, tensors_of
from helpers.strategies import roundoff

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(8, 5, 7, 9), (33, 6), (4, 3, 11), (2, 3, 4, 5, 6)]


def data(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).add(1).to(dtype)
    )


def stats(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    mean, weight, bias = (torch.randn(channels, generator=g) for _ in range(3))
    return mean, torch.rand(channels, generator=g) + 0.5, weight, bias


def close(cuda: Tensor, cpu: Tensor) -> None:
    assert cuda.is_cuda
    assert cuda.dtype == cpu.dtype
    assert cuda.stride() == cpu.stride()
    # float64 statistics on both sides: only the element-wise pass rounds differently.
    ulps = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[cpu.dtype]
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=ulps, atol=ulps)


def formats(x: Tensor) -> list[Tensor]:
    out = [x]
    if x.dim() == 4:
        out += [x.contiguous(memory_format=torch.channels_last), x[:, :, ::2]]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_functions_agree(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    s = stats(shape[1])
    on = [t.cuda() for t in s]
    components = torch.randn(4, shape[1], generator=torch.Generator().manual_seed(2)), torch.ones(4, shape[1])
    for x in formats(data(shape, dtype)):
        g = x.cuda()
        if not x.is_contiguous():
            g = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda").copy_(x)
        for per_instance in (False, True):
            m, n = channel_moments(x, per_instance=per_instance), channel_moments(g, per_instance=per_instance)
            torch.testing.assert_close(n.mean.cpu(), m.mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(n.var().cpu(), m.var(), rtol=1e-5, atol=1e-9)
            assert torch.equal(n.count.cpu(), m.count)
        for weight in (0.0, 0.3, 1.0):
            close(mixed_batch_norm(g, *on, source_weight=weight), mixed_batch_norm(x, *s, source_weight=weight))
        close(mixed_batch_norm_(g.clone(), *on, source_weight=0.3), mixed_batch_norm_(x.clone(), *s, source_weight=0.3))
        y, p = unmix_norm(g, *(c.cuda() for c in components), *on[2:], cross_term=True)
        want, q = unmix_norm(x, *components, *s[2:], cross_term=True)
        if x.dim() > 2:
            close(y, want)
        torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-5)
        for threshold in (None, 1.5):
            if x.dim() > 2:
                close(
                    style_shift(g, on[0], on[1], threshold=threshold), style_shift(x, s[0], s[1], threshold=threshold)
                )


def test_gradients_agree() -> None:
    s = stats(5)
    components = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)), torch.ones(4, 5)

    def gradients(device: str) -> list[Tensor]:
        x = data((6, 5, 4, 3), torch.float64).to(device).requires_grad_()
        mean, var, w, b = (t.double().to(device) for t in s)
        w.requires_grad_(), b.requires_grad_()
        g = data((6, 5, 4, 3), torch.float64, seed=9).to(device)
        out = list(torch.autograd.grad(mixed_batch_norm(x, mean, var, w, b, source_weight=0.4), (x, w, b), g))
        out += torch.autograd.grad(unmix_norm(x, *(c.double().to(device) for c in components), w, b)[0], (x, w, b), g)
        out += torch.autograd.grad(style_shift(x, mean, var, threshold=1.0), (x,), g)
        out += torch.autograd.grad(merge_moments(channel_moments(x), channel_moments(x * 2)).m2.sum(), (x,))
        return out

    for a, b in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)


def test_ema_over_two_devices() -> None:
    tensors = [torch.zeros(3), torch.zeros(4, device="cuda")]
    ema_update_(tensors, [torch.ones(3), torch.ones(4, device="cuda")], 0.25)
    assert all((t.cpu() == 0.25).all() for t in tensors)
    with pytest.raises(shiftkern.ArgumentError, match="ema_update_: argument 'values"):
        ema_update_([tensors[0]], [tensors[0].cuda()], 0.5)


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
def test_lame_agrees(affinity: str) -> None:
    probs = data((60, 7), torch.float64).softmax(1)
    features = data((60, 20), torch.float64, seed=3)
    want = lame(probs, features, affinity=affinity, weight=0.5)
    torch.testing.assert_close(lame(probs.cuda(), features.cuda(), affinity=affinity, weight=0.5).cpu(), want)


_TRANSPORT = {
    "log": lambda M, X, Y, a, b: sinkhorn(a, b, M, 0.5),
    "scaling": lambda M, X, Y, a, b: sinkhorn(a, b, M, 0.5, method="scaling", omega=1.2),
    "annealed": lambda M, X, Y, a, b: sinkhorn(None, None, M, 0.5, reg_init=4.0, update_order="gf"),
    "implicit": lambda M, X, Y, a, b: sinkhorn(a, b, M, 0.5, grad="implicit"),
    "kl": lambda M, X, Y, a, b: sinkhorn(a, b, M, 0.5, reg_m=(1.0, 2.0), grad="implicit"),
    "tv": lambda M, X, Y, a, b: sinkhorn(a, b, M, 0.5, reg_m=0.5, reg_m_type="tv"),
    "partial": lambda M, X, Y, a, b: sinkhorn_partial(a, b, M, 0.5, 0.6),
    "sqeuclidean": lambda M, X, Y, a, b: sinkhorn_samples(X, Y, 2.0, a, b),
    "euclidean": lambda M, X, Y, a, b: sinkhorn_samples(X, Y, 1.0, a, b, cost="euclidean"),
    "cosine": lambda M, X, Y, a, b: sinkhorn_samples(X, Y, 0.5, a, b, cost="cosine"),
}


@pytest.mark.parametrize("name", _TRANSPORT)
@pytest.mark.parametrize("empty", [False, True])
def test_transport_agrees(name: str, empty: bool) -> None:
    X, Y = data((30, 3), torch.float64), data((20, 3), torch.float64, seed=1)
    a, b = data((30,), torch.float64, seed=2).softmax(0), data((20,), torch.float64, seed=3).softmax(0)
    if empty:
        a[3], b[4] = 0.0, 0.0
        a, b = a / a.sum(), b / b.sum()
    found: list[list[Tensor]] = []
    for move in (Tensor.cuda, Tensor.cpu):
        leaves = [move(t).requires_grad_() for t in ((X[:, None] - Y).abs().sum(2), X, Y, a, b)]
        result = _TRANSPORT[name](*leaves)
        assert result.converged
        total = result.value + result.value_dual + (result.value_linear if result.plan().requires_grad else 0.0)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        tensors = [result.f, result.g, result.value_linear, result.value_kl, result.value_entropy, total]
        tensors += [result.plan(), result.apply(leaves[2].detach()), result.apply_t(leaves[1].detach())]
        tensors += [result.barycentric(leaves[2].detach()), *result.marginals(), result.plan_csr(1e-6).to_dense()]
        found.append([*tensors, *(g for g in gradients if g is not None)])
    for cuda, cpu in zip(*found, strict=True):
        assert cuda.is_cuda
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-7, atol=1e-9, equal_nan=True)


def test_transport_of_batches_and_assignments_agrees() -> None:
    M, lengths = data((4, 6, 5), torch.float64).abs(), torch.tensor([[6, 5], [3, 5], [1, 1], [4, 2]])
    reg = torch.tensor([0.3, 0.5, 1.0, 2.0], dtype=torch.float64)
    cpu = sinkhorn_batch(M, reg, lengths=lengths)
    cuda = sinkhorn_batch(M.cuda(), reg.cuda(), lengths=lengths.cuda())
    assert cuda.status == cpu.status
    torch.testing.assert_close(cuda.plan().cpu(), cpu.plan())
    torch.testing.assert_close(cuda.value.cpu(), cpu.value)
    torch.testing.assert_close(sinkhorn_assign(M[0].cuda()).cpu(), sinkhorn_assign(M[0]))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


@pytest.mark.parametrize("method", [BatchNormAdapt, UnMix, Tent, CoTTA, RMT, LAME, OSUDA])
def test_methods_run_and_reset(method: type) -> None:
    x = data((16, 1, 8, 8), torch.float32).cuda()
    model = network().cuda()
    before = copy.deepcopy(model.state_dict())
    wrapped = method(model)
    first = [wrapped(x).clone() for _ in range(3)]
    assert all(y.is_cuda and y.isfinite().all() for y in first)
    wrapped.reset()
    for y in first:
        torch.testing.assert_close(wrapped(x), y, rtol=1e-4, atol=1e-5)
    wrapped.reset()
    wrapped.unwrap()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_conversion_follows_the_device() -> None:
    model = convert_norm(network(), "unmix", num_components=4).cuda()
    assert model(data((4, 1, 8, 8), torch.float32).cuda()).is_cuda
    assert all(t.is_cuda for t in revert_norm(model).state_dict().values())


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_agrees_with_its_cpu_path(name: str):
    def moved(value: object) -> object:
        if isinstance(value, list):
            return [moved(v) for v in value]
        return value.cuda() if isinstance(value, Tensor) else value

    for arguments in SAMPLES[name]():
        here = detached(arguments)
        there = tuple(moved(value) for value in detached(arguments))
        # Float32 products may run in reduced precision there; the torch path is compared with itself.
        expected = tensors_of(PATHS[name][1](*here)) + tensors_of(here)
        found = tensors_of(getattr(torch.ops.shiftkern, name)(*there)) + tensors_of(there)
        for cuda, cpu in zip(found, expected, strict=True):
            assert cuda.is_cuda
            tolerance = max(1e-4, 4 * roundoff(cpu.dtype)) if cpu.is_floating_point() else 0.0
            torch.testing.assert_close(cuda.cpu(), cpu, rtol=tolerance, atol=tolerance, equal_nan=True)
