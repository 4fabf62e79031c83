"""Interchange interventions against rotated coordinates exchanged one by one."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import shiftkern
from shiftkern.rotation.boundless_das import BoundlessDAS
from shiftkern.rotation.das import DAS

FORMS = [pytest.param(False, id="full"), pytest.param(True, id="low_rank")]


def moved(module, seed: int = 1, size: float = 0.7):
    """The module in float64, its basis away from the start."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shape = module.rotation.moved.shape
        module.rotation.moved.copy_(size * torch.randn(shape, generator=generator, dtype=torch.float64))
    return module


def pair(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tuple(both.to(dtype).unbind())  # type: ignore[return-value]


def cayley_by_hand(module) -> np.ndarray:
    """(I - A)^-1 (I + A) S with the dense skew matrix."""
    s, p = (t.detach().double().numpy() for t in (module.rotation.start, module.rotation.moved))
    # What float32 keeps of the start, made orthonormal again.
    u, _, v = np.linalg.svd(s, full_matrices=False)
    s = u @ v
    skew = p @ s.T - s @ p.T
    eye = np.eye(len(s))
    return np.linalg.inv(eye - skew) @ (eye + skew) @ s


@pytest.mark.parametrize(("d", "k"), [(2, 1), (5, 1), (5, 4), (12, 3), (9, 8), (40, 2)])
@pytest.mark.parametrize("low_rank", FORMS)
def test_basis_is_the_cayley_transform_and_orthonormal(d: int, k: int, low_rank: bool):
    das = DAS(d, k, low_rank=low_rank)
    torch.testing.assert_close(das.basis(), das.rotation.start, rtol=0, atol=1e-6)
    for size in (0.1, 1.0, 30.0):
        das = moved(DAS(d, k, low_rank=low_rank), size=size)
        w = das.basis().detach().numpy()
        assert w.shape == (d, k if low_rank else d)
        np.testing.assert_allclose(w.T @ w, np.eye(w.shape[1]), atol=1e-12)
        np.testing.assert_allclose(w, cayley_by_hand(das), atol=1e-9)


@pytest.mark.parametrize(("d", "k"), [(2, 1), (5, 2), (12, 11)])
@pytest.mark.parametrize("low_rank", FORMS)
def test_interchange_one_coordinate_at_a_time(d: int, k: int, low_rank: bool):
    das = moved(DAS(d, k, low_rank=low_rank))
    base, source = pair(3, 4, d)
    w = das.basis().detach().numpy()
    # The columns beyond k span what stays; which ones they are does not matter.
    full = w if not low_rank else np.linalg.qr(np.concatenate([w, np.eye(d)], 1))[0][:, :d]
    got = das.interchange(base, source).detach().numpy()
    for at in np.ndindex(3, 4):
        z_base, z_source = base[at].numpy() @ full, source[at].numpy() @ full
        z = [z_source[i] if i < k else z_base[i] for i in range(d)]
        np.testing.assert_allclose(got[at], full @ np.array(z), atol=1e-12)
    torch.testing.assert_close(das(base, source), das.interchange(base, source), rtol=0, atol=0)


def test_both_forms_are_one_map():
    full, low = moved(DAS(7, 3)), DAS(7, 3, low_rank=True).double()
    low.rotation.start = full.basis().detach()[:, :3].clone()
    base, source = pair(10, 7)
    torch.testing.assert_close(low(base, source), full(base, source), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("low_rank", FORMS)
def test_invariants(low_rank: bool):
    das = moved(DAS(8, 3, low_rank=low_rank))
    base, source = pair(20, 8)
    mixed, w = das(base, source), das.basis()[:, :3]
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(das(base, base), base, rtol=0, atol=0)
    torch.testing.assert_close(mixed @ w, source @ w, **close)
    torch.testing.assert_close(mixed - mixed @ w @ w.T, base - base @ w @ w.T, **close)
    torch.testing.assert_close(das(mixed, source), mixed, **close)
    torch.testing.assert_close(das(mixed, base), base, **close)
    # What the two lose and gain in length is the same.
    squares = sum(t.square().sum() for t in (mixed, das(source, base)))
    torch.testing.assert_close(squares, base.square().sum() + source.square().sum(), **close)


@pytest.mark.parametrize("low_rank", FORMS)
def test_finds_the_direction_of_a_planted_variable(low_rank: bool):
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(6, generator=generator), dim=0)
    base, source = torch.randn(2, 256, 6, generator=generator).unbind()
    das = DAS(6, 1, low_rank=low_rank, seed=3)
    optimizer = torch.optim.Adam(das.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        # A frozen model that reads one direction: after the exchange it must say what it says of the source.
        loss = ((das(base, source) - source) @ direction).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-4
    assert (das.basis()[:, 0] @ direction).abs().item() > 0.999


@pytest.mark.parametrize("low_rank", FORMS)
def test_gradients(low_rank: bool):
    das = moved(DAS(5, 2, low_rank=low_rank))
    base, source = pair(3, 5)

    def call(base, source, parameter):
        return torch.func.functional_call(das, {"rotation.moved": parameter}, (base, source))

    inputs = [t.requires_grad_() for t in (base, source)] + [das.rotation.moved]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: DAS(16, 5), lambda: DAS(16, 5, low_rank=True), lambda: BoundlessDAS(16)])
def test_dtypes(dtype: torch.dtype, make):
    base, source = pair(9, 16, dtype=dtype)
    for module in (make(), make().to(dtype)):
        got = module(base, source)
        assert got.dtype == dtype
        want = copy.deepcopy(module).double()(base.double(), source.double())
        size = max(float(t.abs().max()) for t in (base, source))
        unit = torch.finfo(dtype).eps
        # The basis of a module in a half type is made from its rounded start: orthonormal to rounding only.
        torch.testing.assert_close(got.double(), want, rtol=unit, atol=16 * max(1e-7, unit) * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_rank", FORMS)
def test_orthogonality_in_narrow_types(dtype: torch.dtype, low_rank: bool):
    das = moved(DAS(64, 20, low_rank=low_rank)).to(dtype)
    w = das.basis()
    assert w.dtype == torch.float32
    w = w.detach().double()
    assert float((w.T @ w - torch.eye(w.shape[1])).abs().max()) < 1e-5


def test_shapes_state_and_seeds():
    das = moved(DAS(6, 2))
    assert das(*pair(6)).shape == (6,)
    assert das(*pair(0, 6)).shape == (0, 6)
    base, source = pair(4, 3, 6)
    wide = torch.stack([base, source], 1).transpose(0, 2)[1].transpose(0, 1)
    torch.testing.assert_close(das(wide, base.transpose(0, 1)[1][:, None].expand(wide.shape)).shape, wide.shape)
    other = DAS(6, 2, seed=9).double()
    assert not torch.equal(other.rotation.start, das.rotation.start)
    other.load_state_dict(das.state_dict())
    for twin in (other, copy.deepcopy(das)):
        assert torch.equal(twin(base, source), das(base, source))
    assert torch.equal(DAS(6, 2, seed=4).rotation.start, DAS(6, 2, seed=4).rotation.start)
    before = torch.get_rng_state()
    DAS(6, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_keeps_the_basis_exact():
    das, (base, source) = DAS(8, 3), pair(4, 8, dtype=torch.float32)
    want = das(base, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(das(base, source), want)


def mask_by_hand(d: int, boundary: float, temperature: float) -> list[float]:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    return [sigmoid(i / temperature) * sigmoid((boundary * d - i) / temperature) for i in range(d)]


@pytest.mark.parametrize("d", [1, 2, 7, 64])
@pytest.mark.parametrize("boundary", [1e-3, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [50.0, 1.0, 0.1])
def test_mask(d: int, boundary: float, temperature: float):
    das = BoundlessDAS(d, boundary=boundary, start_temperature=temperature).double()
    torch.testing.assert_close(
        das.mask(), torch.tensor(mask_by_hand(d, *das.boundary.tolist(), das.temperature.item())), check_dtype=False
    )
    assert das.mask()[0].item() <= 0.5


def test_boundless_interchange_one_coordinate_at_a_time():
    das = moved(BoundlessDAS(6, boundary=0.6, start_temperature=0.8))
    base, source = pair(5, 6)
    w = das.basis().detach().numpy()
    np.testing.assert_allclose(w.T @ w, np.eye(6), atol=1e-12)
    m = mask_by_hand(6, das.boundary.item(), das.temperature.item())
    got = das.interchange(base, source).detach().numpy()
    for n in range(5):
        z_base, z_source = base[n].numpy() @ w, source[n].numpy() @ w
        z = [(1 - m[i]) * z_base[i] + m[i] * z_source[i] for i in range(6)]
        np.testing.assert_allclose(got[n], w @ np.array(z), atol=1e-12)
    torch.testing.assert_close(das(base, base), base, rtol=0, atol=0)


def test_temperature_falls_in_a_line():
    das = BoundlessDAS(4)
    assert das.temperature == 50.0
    found = []
    for step in range(7):
        das.anneal(step, 7)
        found.append(float(das.temperature))
    np.testing.assert_allclose(found, np.linspace(50.0, 0.1, 7), rtol=1e-6)
    das.anneal(0, 1)
    assert float(das.temperature) == pytest.approx(0.1)
    twin = BoundlessDAS(4)
    twin.load_state_dict(das.state_dict())
    assert torch.equal(twin.mask(), das.mask())


def test_temperature_may_be_set_before_the_backward_pass():
    das = BoundlessDAS(4)
    loss = das(*pair(3, 4, dtype=torch.float32)).sum()
    das.anneal(3, 4)
    loss.backward()
    assert torch.isfinite(das.boundary.grad).all()


def test_sparsity_loss_pulls_the_boundary():
    das = BoundlessDAS(10, sparsity=2.0)
    assert das.sparsity_loss().item() == 1.0
    das.sparsity_loss().backward()
    assert das.boundary.grad.tolist() == [2.0]
    with torch.no_grad():
        das.boundary.fill_(1.5)
    das.zero_grad()
    (das.mask().sum() + das.sparsity_loss()).backward()
    assert das.boundary.grad.tolist() == [2.0]


def test_boundless_gradients():
    das = moved(BoundlessDAS(4, start_temperature=1.5))
    base, source = pair(3, 4)

    def call(base, source, parameter, boundary):
        values = {"rotation.moved": parameter, "boundary": boundary}
        return torch.func.functional_call(das, values, (base, source))

    inputs = [t.requires_grad_() for t in (base, source)] + [das.rotation.moved, das.boundary]
    assert torch.autograd.gradcheck(call, inputs)


def test_boundless_finds_how_many_coordinates_matter():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=generator))[0]
    base, source = torch.randn(2, 512, 12, generator=generator).unbind()
    das = BoundlessDAS(12, start_temperature=5.0)
    optimizer = torch.optim.Adam(
        [{"params": das.rotation.parameters(), "lr": 0.05}, {"params": [das.boundary], "lr": 0.01}]
    )
    for step in range(400):
        das.anneal(step, 400)
        optimizer.zero_grad()
        (((das(base, source) - source) @ directions).square().mean() + das.sparsity_loss()).backward()
        optimizer.step()
    # Three directions matter, and the first coordinate is only half exchanged.
    torch.testing.assert_close(das.mask().round(), torch.tensor([0.0] + 3 * [1.0] + 8 * [0.0]))
    assert ((das(base, source) - source) @ directions).square().mean().item() < 0.01


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 1), {}, "DAS: argument 'd': expected an integer >= 2"),
        ((2.5, 1), {}, "argument 'd'"),
        ((4, 4), {}, "argument 'k': expected fewer coordinates than d=4"),
        ((4, 0), {}, "argument 'k'"),
        ((4, True), {}, "argument 'k'"),
        ((4, 2), {"low_rank": 1}, "argument 'low_rank'"),
        ((4, 2), {"seed": -1}, "argument 'seed'"),
    ],
)
def test_das_refuses_options(arguments, options, message: str):
    with pytest.raises(shiftkern.ArgumentError, match=message):
        DAS(*arguments, **options)


def test_k_has_no_default():
    with pytest.raises(TypeError):
        DAS(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 0}, "BoundlessDAS: argument 'd'"),
        ({"boundary": 0.0}, r"argument 'boundary': expected a number in \[1e-3, 1\]"),
        ({"boundary": 1.1}, "argument 'boundary'"),
        ({"start_temperature": 0.0}, "argument 'start_temperature'"),
        ({"end_temperature": -1.0}, "argument 'end_temperature'"),
        ({"sparsity": -1.0}, "argument 'sparsity'"),
        ({"seed": 0.5}, "argument 'seed'"),
    ],
)
def test_boundless_das_refuses_options(options, message: str):
    with pytest.raises(shiftkern.ArgumentError, match=message):
        BoundlessDAS(**{"d": 4, **options})


@pytest.mark.parametrize(
    ("step", "steps", "name"), [(-1, 4, "step"), (4, 4, "step"), (0.5, 4, "step"), (0, 0, "steps")]
)
def test_anneal_refuses(step, steps, name: str):
    with pytest.raises(shiftkern.ArgumentError, match=f"BoundlessDAS.anneal: argument '{name}'"):
        BoundlessDAS(4).anneal(step, steps)


@pytest.mark.parametrize("make", [lambda: DAS(4, 2), lambda: BoundlessDAS(4)])
def test_representations_that_do_not_fit(make):
    module, (base, source) = make(), pair(3, 4, dtype=torch.float32)
    for bad, name in (
        ((base[:, :3], source), "base"),
        ((base.long(), source), "base"),
        ((base.numpy(), source), "base"),
        ((base[0, 0], source), "base"),
        ((base, source[:2]), "source"),
        ((base, source.double()), "source"),
        ((base, None), "source"),
        ((base.to("meta"), source), "base"),
    ):
        with pytest.raises(shiftkern.ArgumentError, match=f"argument '{name}'"):
            module(*bad)
