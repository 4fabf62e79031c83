"""PEGO against the published sums over whole products, and the memory that it must not take."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shiftkern
from shiftkern.peft import PEGOConfig, adapted_layers, disable_adapter, inject, merge, pego, penalty, set_adapter
from shiftkern.peft.pego import pego_penalty


def problem(out: int, width: int, ranks: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=g, dtype=torch.float64).to(dtype)
    pairs = [
        tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((r, width), (out, r)))
        for r in ranks
    ]
    return weight, pairs


def by_hand(weight: Tensor, pairs) -> float:
    """All products in full, entry by entry."""
    w = weight.detach().double().numpy()
    updates = [b.detach().double().numpy() @ a.detach().double().numpy() for a, b in pairs]
    total = sum(np.abs(w @ u.T).sum() for u in updates)
    for i in range(len(updates)):
        for j in range(i + 1, len(updates)):
            total += np.abs(updates[i] @ updates[j].T).sum()
    return float(total)


@pytest.mark.parametrize("tile", [1, 7, 40, 1 << 20])
@pytest.mark.parametrize(
    ("out", "width", "ranks"),
    [(5, 7, (2,)), (7, 5, (1, 3)), (6, 6, (2, 2, 2, 2)), (1, 1, (1, 1)), (9, 4, (0, 2)), (4, 3, ()), (0, 4, (2,))],
)
def test_equals_the_whole_products(monkeypatch, out: int, width: int, ranks: tuple[int, ...], tile: int):
    monkeypatch.setattr(pego, "_TILE", tile)
    weight, pairs = problem(out, width, ranks)
    assert pego_penalty(weight, pairs).item() == pytest.approx(by_hand(weight, pairs), rel=1e-13)


@pytest.mark.parametrize("tile", [3, 1 << 20])
def test_gradients(monkeypatch, tile: int):
    monkeypatch.setattr(pego, "_TILE", tile)
    weight, pairs = problem(5, 4, (2, 1, 3))
    flat = [t.requires_grad_() for t in (weight, *(t for pair in pairs for t in pair))]
    assert torch.autograd.gradcheck(lambda w, *t: pego_penalty(w, list(zip(t[::2], t[1::2], strict=True))), flat)
    # The same by automatic differentiation of the whole products.
    (3 * pego_penalty(weight, pairs)).backward()
    found = [t.grad.clone() for t in flat]
    for t in flat:
        t.grad = None
    updates = [b @ a for a, b in pairs]
    total = sum((weight @ u.T).abs().sum() for u in updates)
    total = total + sum((updates[i] @ updates[j].T).abs().sum() for i in range(3) for j in range(i + 1, 3))
    (3 * total).backward()
    for got, t in zip(found, flat, strict=True):
        torch.testing.assert_close(got, t.grad, rtol=1e-12, atol=1e-12)


def test_gradient_is_zero_at_the_kink():
    weight, pairs = problem(5, 4, (2, 2))
    pairs = [(a.requires_grad_(), torch.zeros_like(b).requires_grad_()) for a, b in pairs]
    value = pego_penalty(weight, pairs)
    value.backward()
    assert value.item() == 0.0
    for pair in pairs:
        assert not any(bool(t.grad.any()) for t in pair)


def test_invariants():
    weight, pairs = problem(6, 8, (2, 3))
    value = pego_penalty(weight, pairs)
    torch.testing.assert_close(pego_penalty(weight, pairs[::-1]), value)
    # Only the product of a pair counts.
    torch.testing.assert_close(pego_penalty(weight, [(2 * a, b / 2) for a, b in pairs]), value)
    torch.testing.assert_close(pego_penalty(-weight, pairs), value)
    alone = sum(pego_penalty(weight, [pair]) for pair in pairs)
    torch.testing.assert_close(pego_penalty(3 * weight, pairs) - value, 2 * alone)
    # Rows in orthogonal spaces cost nothing.
    eye = torch.eye(8, dtype=torch.float64)
    low = weight @ eye[:, :4] @ eye[:4]
    apart = [(eye[4:6], pairs[0][1]), (eye[6:8], pairs[0][1])]
    assert pego_penalty(low, apart).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    weight, pairs = problem(30, 20, (4, 4), dtype)
    got = pego_penalty(weight, pairs)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # float16 and bfloat16 are widened exactly.
    assert got.item() == pytest.approx(by_hand(weight, pairs), rel=1e-13 if dtype == torch.float64 else 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pego_penalty(weight, pairs), got)
    mixed = [(a.float(), b.float()) for a, b in pairs]
    assert pego_penalty(weight, mixed).item() == pytest.approx(by_hand(weight, mixed), rel=1e-5)


def test_no_product_is_kept(monkeypatch):
    monkeypatch.setattr(pego, "_TILE", 64 * 16)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            largest.append(
                max((t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)), default=0)
            )
            return result

    weight, pairs = problem(512, 64, (4, 4), torch.float32)
    pairs = [tuple(t.requires_grad_() for t in pair) for pair in pairs]
    with Watch():
        pego_penalty(weight, pairs).backward()
    assert max(largest) <= weight.numel()


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(6, 4), "k_proj": nn.Linear(6, 4), "v_proj": nn.Linear(6, 4)}).to(dtype)


def moved(base: nn.Module, config: PEGOConfig) -> nn.Module:
    inject(base, config)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return base


def test_layer_is_the_sum_of_all_updates():
    plain = model()
    adapted = moved(copy.deepcopy(plain), PEGOConfig(r=2, count=3))
    assert list(adapted_layers(adapted)) == ["q_proj", "v_proj"]
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for name in ("q_proj", "v_proj"):
        adapter = adapted_layers(adapted)[name].adapter("default")
        want = plain[name](x)
        pairs = adapter.pairs()
        assert len(pairs) == 3
        for a, b in pairs:
            assert (a.shape, b.shape) == ((2, 6), (4, 2))
            want = want + F.linear(F.linear(x, a), b)
        torch.testing.assert_close(adapted[name](x), want)


def test_start():
    adapter = adapted_layers(inject(model(), PEGOConfig(r=2, count=3)))["q_proj"].adapter("default")
    assert not bool(adapter.B.any())
    assert 0.8 / 6**0.5 < float(adapter.A.detach().abs().max()) <= 1 / 6**0.5
    # Updates that start equal would stay equal but for their places in the penalty.
    starts = [a for a, _ in adapter.pairs()]
    assert not torch.equal(starts[0], starts[1])


def test_penalty_of_a_model_is_the_weighted_sum_over_its_layers():
    plain = model()
    adapted = moved(copy.deepcopy(plain), PEGOConfig(r=2, count=3, weight=0.25))
    want = 0.0
    for name, layer in adapted_layers(adapted).items():
        want += 0.25 * by_hand(plain[name].weight, layer.adapter("default").pairs())
    value = penalty(adapted)
    assert value.item() == pytest.approx(want, rel=1e-12)
    value.backward()
    for layer in adapted_layers(adapted).values():
        assert layer.base_layer.weight.grad is None
        assert bool(layer.adapter("default").A.grad.any())
    with disable_adapter(adapted):
        assert penalty(adapted).item() == 0.0
    # The weight that is to be preserved is the base layer's, whatever acts beside.
    inject(adapted, PEGOConfig(r=1, count=1, weight=0.0), "other")
    set_adapter(adapted, ["other", "default"])
    assert penalty(adapted).item() == pytest.approx(want, rel=1e-12)


def test_penalty_falls_when_it_is_trained():
    adapted = moved(model(torch.float32), PEGOConfig(r=2, count=2, weight=1.0))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(50):
        optimizer.zero_grad()
        value = penalty(adapted)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


def test_merge_adds_the_updates():
    plain = model()
    adapted = moved(copy.deepcopy(plain), PEGOConfig(r=2, count=2))
    update = sum(b @ a for a, b in adapted_layers(adapted)["q_proj"].adapter("default").pairs())
    merge(adapted)
    torch.testing.assert_close(adapted["q_proj"].weight, plain["q_proj"].weight + update)
    assert torch.equal(adapted["k_proj"].weight, plain["k_proj"].weight)


def test_second_derivative_is_refused():
    weight, pairs = problem(3, 3, (1,))
    b = pairs[0][1].requires_grad_()
    (slope,) = torch.autograd.grad(pego_penalty(weight, [(pairs[0][0], b)]), b, create_graph=True)
    with pytest.raises(
        shiftkern.NotDifferentiableError, match="pego_penalty: gradients of this operator are first-order"
    ):
        slope.sum().backward()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"weight": torch.zeros(3)}, "weight"),
        ({"weight": torch.zeros(4, 3).long()}, "weight"),
        ({"weight": None}, "weight"),
        ({"pairs": torch.zeros(2, 3)}, "pairs"),
        ({"pairs": 3}, "pairs"),
        ({"pairs": [torch.zeros(2, 3)]}, r"pairs\[0\]"),
        ({"pairs": [(torch.zeros(2, 3),)]}, r"pairs\[0\]"),
        ({"pairs": [(torch.zeros(2, 4), torch.zeros(4, 2))]}, r"pairs\[0\]\[0\]"),
        (
            {"pairs": [(torch.zeros(2, 3), torch.zeros(4, 2)), (torch.zeros(2, 3), torch.zeros(4, 3))]},
            r"pairs\[1\]\[1\]",
        ),
        ({"pairs": [(torch.zeros(2, 3), torch.zeros(4, 2, device="meta"))]}, r"pairs\[0\]\[1\]"),
    ],
)
def test_arguments_that_do_not_fit(change, name: str):
    arguments = {"weight": torch.zeros(4, 3), "pairs": [], **change}
    with pytest.raises(shiftkern.ArgumentError, match=f"pego_penalty: argument '{name}'"):
        pego_penalty(**arguments)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"r": 0}, "r"), ({"count": 0}, "count"), ({"weight": -1.0}, "weight"), ({"seed": -1}, "seed"), ({"r": 1.5}, "r")],
)
def test_options_out_of_range(options, name: str):
    with pytest.raises(shiftkern.ArgumentError, match=f"PEGOConfig: argument '{name}'"):
        PEGOConfig(**options)
