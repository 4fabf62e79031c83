"""Gradients of the entropic solvers: by finite differences, and against autograd through an unrolled loop."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad, gradcheck

import shiftkern
from shiftkern import ArgumentError, NotDifferentiableError
from shiftkern.ot import sinkhorn, sinkhorn_batch, sinkhorn_partial, sinkhorn_samples

from helpers.strategies import make

pytestmark = pytest.mark.filterwarnings("ignore::shiftkern.ConvergenceWarning")

METRICS = ("sqeuclidean", "euclidean", "cosine")
#: Solve to rounding, so that finite differences see the minimum.
TIGHT = {"tol": 1e-14, "max_iter": 2000}
REG = 0.6


def wide(*shape: int, seed: int = 0) -> Tensor:
    return make(shape, torch.float64, seed, mean=0.0).requires_grad_()


def costs(n: int = 5, m: int = 4, seed: int = 0) -> Tensor:
    return make((n, m), torch.float64, seed).abs().requires_grad_()


def weights(n: int, seed: int = 1) -> Tensor:
    return make((n,), torch.float64, seed).softmax(0)


def distances(X: Tensor, Y: Tensor, metric: str) -> Tensor:
    """The costs with plain differences, one pair at a time."""
    rows = []
    for x in X:
        row = []
        for y in Y:
            if metric == "cosine":
                row.append(1.0 - (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())
            else:
                square = (x - y).square().sum()
                row.append(square if metric == "sqeuclidean" else square.sqrt())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def unrolled(
    M: Tensor, a: Tensor, b: Tensor, reg: float = REG, rho: tuple[float, float] | None = None, steps: int = 300
):
    """Potentials of Sinkhorn's iteration, every step of it on autograd's tape."""
    tau = [1.0 if rho is None or r == float("inf") else r / (r + reg) for r in rho or (1.0, 1.0)]
    g = torch.zeros_like(b)
    for _ in range(steps):
        f = -reg * tau[0] * torch.logsumexp((g - M) / reg, 1) + reg * a.log()
        g = -reg * tau[1] * torch.logsumexp((f[:, None] - M) / reg, 0) + reg * b.log()
    return f, g


def objective(P: Tensor, M: Tensor, a: Tensor, b: Tensor, reg: float = REG) -> Tensor:
    ab = a[:, None] * b
    return (P * M).sum() + reg * ((P * (P / ab).log()).sum() - P.sum() + ab.sum())


# --- grad="envelope" -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["value", "value_dual"])
@pytest.mark.parametrize("options", [{}, {"method": "scaling"}, {"update_order": "gf"}, {"omega": 1.3}])
def test_the_value_is_differentiable_in_costs_and_weights(which, options):
    def value(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return getattr(sinkhorn(a.softmax(0), b.softmax(0), M, REG, **TIGHT, **options), which)

    assert gradcheck(value, (costs(), wide(5, seed=1), wide(4, seed=2)))


@pytest.mark.parametrize("grad_mode", ["envelope", "implicit"])
def test_weights_whose_totals_change_together(grad_mode):
    def value(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
        a, b = total.exp() * a.softmax(0), total.exp() * b.softmax(0)
        return sinkhorn(a, b, costs().detach(), REG, grad=grad_mode, **TIGHT).value

    assert gradcheck(value, (wide(5, seed=1), wide(4, seed=2), torch.tensor(0.3, dtype=torch.float64).requires_grad_()))


def test_the_gradient_is_that_of_the_unrolled_loop():
    M, a, b = costs(), weights(5).requires_grad_(), weights(4, 2).requires_grad_()
    ours = grad(sinkhorn(a, b, M, REG, **TIGHT).value, [M, a, b])
    f, g = unrolled(M, a, b)
    theirs = grad(objective(((f[:, None] + g - M) / REG).exp(), M, a, b), [M, a, b])
    torch.testing.assert_close(ours[0], theirs[0])
    # Totals are equal: only differences along a and b together, or within one, mean something.
    gauge = (ours[1] - theirs[1]).mean()
    torch.testing.assert_close(ours[1] - gauge, theirs[1])
    torch.testing.assert_close(ours[2] + gauge, theirs[2])


def test_the_gradient_by_the_costs_is_the_plan():
    M = costs(30, 20)
    result = sinkhorn(None, None, M, 0.1, **TIGHT)
    result.value.backward()
    assert torch.equal(M.grad, result.plan())


@pytest.mark.parametrize(("rho", "kind"), [(0.8, "kl"), ((0.5, 2.0), "kl"), ((0.7, float("inf")), "kl"), (0.6, "tv")])
@pytest.mark.parametrize("which", ["value", "value_dual"])
def test_unbalanced_values(rho, kind, which):
    def value(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result = sinkhorn(a.exp() / 5, b.exp() / 4, M, REG, reg_m=rho, reg_m_type=kind, **TIGHT)
        return getattr(result, which)

    assert gradcheck(value, (costs(), wide(5, seed=1), wide(4, seed=2)), fast_mode=True)


@pytest.mark.parametrize("which", ["value", "value_dual"])
def test_partial_values(which):
    def value(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return getattr(sinkhorn_partial(a.softmax(0), b.softmax(0) * 1.2, M, REG, 0.55, **TIGHT), which)

    assert gradcheck(value, (costs(), wide(5, seed=1), wide(4, seed=2)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("options", [{}, {"reg_m": 1.5}])
def test_the_value_is_differentiable_in_points(metric, options):
    def value(X: Tensor, Y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result = sinkhorn_samples(X, Y, REG, a.softmax(0), b.softmax(0), cost=metric, **TIGHT, **options)
        return result.value

    assert gradcheck(value, (wide(5, 3), wide(4, 3, seed=1), wide(5, seed=2), wide(4, seed=3)))


@pytest.mark.parametrize("metric", METRICS)
def test_points_give_the_gradient_of_their_costs(metric):
    X, Y = wide(5, 3).detach(), wide(4, 3, seed=1).detach()
    X[0, 0] = X[1, 1:] = 0.0  # on a plane and on an axis
    X.requires_grad_()
    Y.requires_grad_()
    ours = grad(sinkhorn_samples(X, Y, REG, cost=metric, **TIGHT).value, [X, Y])
    theirs = grad(sinkhorn(None, None, distances(X, Y, metric), REG, **TIGHT).value, [X, Y])
    torch.testing.assert_close(ours, theirs)


def test_coincident_points_pull_nowhere():
    X = wide(5, 3)
    Y = torch.cat([X.detach()[1:3], make((2, 3), torch.float64, 1)]).requires_grad_()
    result = sinkhorn_samples(X, Y, REG, cost="euclidean", **TIGHT)
    ours = grad(result.value, [X, Y])
    apart = torch.ones(5, 4, dtype=torch.float64)
    apart[1, 0] = apart[2, 1] = 0.0
    lengths = ((X[:, None] - Y).square().sum(2) + (1.0 - apart)).sqrt()
    theirs = grad((result.plan() * apart * lengths).sum(), [X, Y])
    torch.testing.assert_close(ours, theirs)
    alone = X[:1].detach().clone().requires_grad_()
    sinkhorn_samples(alone, X[:1].detach(), REG, cost="euclidean").value.backward()
    assert torch.equal(alone.grad, torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_at_the_origin_have_no_direction(dtype):
    X, Y = make((5, 3), dtype), make((4, 3), dtype, 1)
    X[2], Y[0] = 0.0, 0.0
    X.requires_grad_()
    Y.requires_grad_()
    result = sinkhorn_samples(X, Y, REG, cost="cosine")
    by_x, by_y = grad(result.value, [X, Y])
    assert torch.equal(by_x[2], torch.zeros(3, dtype=dtype))
    assert torch.equal(by_y[0], torch.zeros(3, dtype=dtype))
    assert 0.0 < by_x.abs().max() < 1.0
    assert 0.0 < by_y.abs().max() < 1.0


def test_forbidden_cells_have_gradient_zero():
    M = costs().detach()
    M[1, 2] = M[3, 0] = torch.inf
    M.requires_grad_()
    for mode in ("envelope", "implicit"):
        result = sinkhorn(None, None, M, REG, grad=mode, **TIGHT)
        (by_m,) = grad(result.value + result.value_dual, M)
        assert by_m.isfinite().all()
        assert by_m[1, 2] == by_m[3, 0] == 0.0
    (by_m,) = grad(sinkhorn(None, None, M, REG, grad="implicit", **TIGHT).plan().square().sum(), M)
    assert by_m.isfinite().all()
    assert by_m[1, 2] == by_m[3, 0] == 0.0

    def plan(shift: Tensor) -> Tensor:
        return sinkhorn(None, None, M.detach() + shift, REG, grad="implicit", **TIGHT).plan()

    assert gradcheck(plan, (wide(5, 4, seed=3),))


_SOLVERS = {
    "balanced": lambda a, b, **o: sinkhorn(a, b, costs().detach(), REG, **o),
    "kl": lambda a, b, **o: sinkhorn(a, b, costs().detach(), REG, reg_m=(1.2, float("inf")), **o),
    "tv": lambda a, b, **o: sinkhorn(a, b, costs().detach(), REG, reg_m=0.4, reg_m_type="tv", **o),
    "partial": lambda a, b, **o: sinkhorn_partial(a, b, costs().detach(), REG, 0.6, **o),
    "points": lambda a, b, **o: sinkhorn_samples(wide(5, 2).detach(), wide(4, 2, seed=1).detach(), REG, a, b, **o),
}


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("solver", _SOLVERS)
def test_a_weight_of_zero_has_its_one_sided_derivative(side, solver):
    a, b = weights(5), weights(4, 2)
    mine = a if side == "a" else b
    mine[1] = 0.0
    mine /= mine.sum()
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    by_a, by_b = grad(_SOLVERS[solver](a, b, **TIGHT).value, [a, b])
    towards = torch.zeros_like(mine)
    towards[1], towards[2] = 1.0, -1.0
    expected = float(((by_a if side == "a" else by_b) * towards).sum())

    def value(step: float) -> float:
        moved = mine + step * towards
        pair = (moved, b.detach()) if side == "a" else (a.detach(), moved)
        return float(_SOLVERS[solver](*pair, **TIGHT).value)

    step = 1e-5
    measured = (4 * value(step) - value(2 * step) - 3 * value(0.0)) / (2 * step)
    assert by_a.isfinite().all()
    assert by_b.isfinite().all()
    assert measured == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", ["envelope", "implicit"])
def test_padding_has_gradient_zero_and_is_never_looked_at(mode):
    lengths = torch.tensor([[5, 4], [3, 4], [2, 1]])
    M = make((3, 5, 4), torch.float64).abs()
    inside = (torch.arange(5) < lengths[:, :1])[:, :, None] & (torch.arange(4) < lengths[:, 1:])[:, None, :]
    M[~inside] = torch.nan
    M.requires_grad_()
    a, b = (make((3, size), torch.float64, 5).softmax(1) for size in (5, 4))
    a = torch.where(torch.arange(5) < lengths[:, :1], a, 0.0)
    b = torch.where(torch.arange(4) < lengths[:, 1:], b, 0.0)
    a = (a / a.sum(1, keepdim=True)).requires_grad_()
    b = (b / b.sum(1, keepdim=True)).requires_grad_()
    reg = torch.tensor([0.4, 0.7, 1.0], dtype=torch.float64)
    for uniform in (False, True):
        pair = (None, None) if uniform else (a, b)
        result = sinkhorn_batch(M, reg, *pair, lengths=lengths, grad=mode, **TIGHT)
        by_m, *rest = grad(result.value.sum(), [M] if uniform else [M, a, b])
        assert torch.equal(by_m[~inside], torch.zeros_like(by_m[~inside]))
        for part, mask in zip(rest, (inside.any(2), inside.any(1)), strict=False):
            assert torch.equal(part[~mask], torch.zeros_like(part[~mask]))
        for i, (n, m) in enumerate(lengths.tolist()):
            part = M.detach()[i, :n, :m].clone().requires_grad_()
            alone = (None, None) if uniform else (a[i, :n].detach(), b[i, :m].detach())
            sinkhorn(*alone, part, float(reg[i]), grad=mode, **TIGHT).value.backward()
            torch.testing.assert_close(by_m[i, :n, :m], part.grad)


def test_a_batch_is_differentiable():
    def value(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sinkhorn_batch(M, torch.tensor([0.5, 0.9]).double(), a.softmax(1), b.softmax(1), **TIGHT).value

    M = make((2, 4, 3), torch.float64).abs().requires_grad_()
    assert gradcheck(value, (M, wide(2, 4, seed=1), wide(2, 3, seed=2)))


# --- grad="implicit" -------------------------------------------------------------------------------------------------


def potentials(result):
    # f + t and g - t are the same solution.
    return result.f[:, None] + result.g


OUTPUTS = {
    "plan": lambda r: r.plan(),
    "potentials": potentials,
    "value": lambda r: r.value,
    "value_linear": lambda r: r.value_linear,
    "value_entropy": lambda r: r.value_entropy,
    "value_kl": lambda r: r.value_kl,
    "value_dual": lambda r: r.value_dual,
    "apply": lambda r: r.apply(make((len(r.g), 2), torch.float64, 7)),
    "apply_t": lambda r: r.apply_t(make((len(r.f),), torch.float64, 7)),
    "barycentric": lambda r: r.barycentric(make((len(r.g), 2), torch.float64, 7)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_follows_from_the_solution_is_differentiable(name):
    def output(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return OUTPUTS[name](sinkhorn(a.softmax(0), b.softmax(0), M, REG, grad="implicit", **TIGHT))

    assert gradcheck(output, (costs(), wide(5, seed=1), wide(4, seed=2)))


@pytest.mark.parametrize("name", ["plan", "potentials", "value", "value_linear", "value_dual"])
@pytest.mark.parametrize("rho", [0.8, (0.5, 2.0), (0.7, float("inf")), (float("inf"), 1.3)])
@pytest.mark.parametrize("order", ["fg", "gf"])
def test_unbalanced_solutions_are_differentiable(name, rho, order):
    def output(M: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result = sinkhorn(a.exp() / 5, b.exp() / 4, M, REG, reg_m=rho, grad="implicit", update_order=order, **TIGHT)
        return OUTPUTS[name](result)

    assert gradcheck(output, (costs(), wide(5, seed=1), wide(4, seed=2)), fast_mode=True)


@pytest.mark.parametrize("rho", [(0.8, 1.3), (0.7, float("inf"))])
def test_single_potentials_are_differentiable_where_they_are_unique(rho):
    def output(M: Tensor) -> tuple[Tensor, Tensor]:
        result = sinkhorn(None, None, M, REG, reg_m=rho, grad="implicit", **TIGHT)
        return result.f, result.g

    assert gradcheck(output, (costs(),))


@pytest.mark.parametrize("shape", [(5, 4), (4, 6), (1, 3), (3, 1), (1, 1)])
def test_the_plan_has_the_gradient_of_the_unrolled_loop(shape):
    M, a, b = costs(*shape), wide(shape[0], seed=1), wide(shape[1], seed=2)
    direction = make(shape, torch.float64, 3)
    result = sinkhorn(a.softmax(0), b.softmax(0), M, REG, grad="implicit", **TIGHT)
    ours = grad((result.plan() * direction).sum(), [M, a, b])
    f, g = unrolled(M, a.softmax(0), b.softmax(0))
    theirs = grad((((f[:, None] + g - M) / REG).exp() * direction).sum(), [M, a, b])
    torch.testing.assert_close(ours, theirs)


def test_the_unbalanced_plan_has_the_gradient_of_the_unrolled_loop():
    M, a, b = costs(), weights(5).requires_grad_(), (weights(4, 2) * 2).requires_grad_()
    direction = make((5, 4), torch.float64, 3)
    result = sinkhorn(a, b, M, REG, reg_m=(0.5, 2.0), grad="implicit", **TIGHT)
    ours = grad((result.plan() * direction).sum(), [M, a, b])
    f, g = unrolled(M, a, b, rho=(0.5, 2.0))
    theirs = grad((((f[:, None] + g - M) / REG).exp() * direction).sum(), [M, a, b])
    torch.testing.assert_close(ours, theirs)


def test_a_batch_of_plans_has_the_gradients_of_each():
    M, reg = make((3, 5, 4), torch.float64).abs().requires_grad_(), torch.tensor([0.4, 0.7, 1.0], dtype=torch.float64)
    direction = make((3, 5, 4), torch.float64, 3)
    (together,) = grad((sinkhorn_batch(M, reg, grad="implicit", **TIGHT).plan() * direction).sum(), M)
    for i in range(3):
        part = M[i].detach().clone().requires_grad_()
        (sinkhorn(None, None, part, float(reg[i]), grad="implicit", **TIGHT).plan() * direction[i]).sum().backward()
        torch.testing.assert_close(together[i], part.grad)


def test_plans_with_weights_of_zero():
    M, a, b = costs(), weights(5), weights(4, 2)
    a[1] = b[3] = 0.0
    a, b = (a / a.sum()).requires_grad_(), (b / b.sum()).requires_grad_()
    direction = make((5, 4), torch.float64, 3)
    kept = torch.tensor([0, 2, 3, 4])
    ours = grad((sinkhorn(a, b, M, REG, grad="implicit", **TIGHT).plan() * direction).sum(), [M, a, b])
    part = M.detach()[kept, :3].clone().requires_grad_()
    plan = sinkhorn(a.detach()[kept], b.detach()[:3], part, REG, grad="implicit", **TIGHT).plan()
    (theirs,) = grad((plan * direction[kept, :3]).sum(), part)
    torch.testing.assert_close(ours[0][kept, :3], theirs)
    assert ours[0][1].abs().sum() == ours[0][:, 3].abs().sum() == 0.0
    assert all(t.isfinite().all() for t in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reg", [1e-2, 1e-3])
def test_plans_that_are_nearly_permutations_have_finite_gradients(dtype, reg):
    x = torch.linspace(0, 1, 8, dtype=dtype)
    M = (x[:, None] - x.flip(0)).square().requires_grad_()
    a, b = (torch.full((8,), 0.125, dtype=dtype).requires_grad_() for _ in range(2))
    result = sinkhorn(a, b, M, reg, grad="implicit")
    gradients = grad((result.plan() * make((8, 8), dtype)).sum(), [M, a, b])
    assert all(t.isfinite().all() for t in gradients)


def test_implicit_value_equals_envelope():
    M, a, b = costs(), weights(5).requires_grad_(), weights(4, 2).requires_grad_()
    by_envelope = grad(sinkhorn(a, b, M, REG, **TIGHT).value, [M, a, b])
    by_solution = grad(sinkhorn(a, b, M, REG, grad="implicit", **TIGHT).value, [M, a, b])
    torch.testing.assert_close(by_envelope[0], by_solution[0])
    gauge = (by_envelope[1] - by_solution[1]).mean()
    torch.testing.assert_close(by_envelope[1] - gauge, by_solution[1])
    torch.testing.assert_close(by_envelope[2] + gauge, by_solution[2])


# --- What has none ---------------------------------------------------------------------------------------------------


def _everything(result) -> dict[str, Tensor]:
    values = ("f", "g", "log_u", "log_v", "value", "value_linear", "value_kl", "value_entropy", "value_dual")
    out = {name: getattr(result, name) for name in values}
    rows, columns = result.marginals()
    V = torch.ones(len(result.g), 2, dtype=result.g.dtype)
    return out | {
        "plan": result.plan(), "apply": result.apply(V), "barycentric": result.barycentric(V), "rows": rows,
        "columns": columns, "history": result.error_history,
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "differentiable"), [("detach", set()), ("envelope", {"value", "value_dual"})])
def test_nothing_else_requires_gradients(mode, differentiable):
    M, a, b = costs(), weights(5).requires_grad_(), weights(4, 2).requires_grad_()
    found = {name for name, t in _everything(sinkhorn(a, b, M, REG, grad=mode)).items() if t.requires_grad}
    assert found == differentiable
    X, Y = wide(5, 2), wide(4, 2, seed=1)
    found = {name for name, t in _everything(sinkhorn_samples(X, Y, 2.0, a, b, grad=mode)).items() if t.requires_grad}
    assert found == differentiable
    with torch.no_grad():
        result = sinkhorn(a, b, M, REG, grad=mode)
        assert not any(t.requires_grad for t in _everything(result).values())


def test_nothing_requires_gradients_where_no_argument_does():
    for mode in ("envelope", "implicit", "detach"):
        result = sinkhorn(weights(5), weights(4, 2), costs().detach(), REG, grad=mode)
        assert not any(t.requires_grad for t in _everything(result).values())


@pytest.mark.parametrize(
    ("solve", "op"),
    [
        (lambda: sinkhorn(None, None, costs(), REG, grad="implicit", reg_m=1.0, reg_m_type="tv"), "sinkhorn"),
        (lambda: sinkhorn_samples(wide(5, 2), wide(4, 2), REG, grad="implicit"), "sinkhorn_samples"),
        (lambda: sinkhorn_partial(None, None, costs(), REG, 0.5, grad="implicit"), "sinkhorn_partial"),
        (lambda: sinkhorn(None, None, costs(), REG, grad="unrolled"), "sinkhorn"),
    ],
)
def test_gradients_that_do_not_exist_are_refused(solve, op):
    with pytest.raises(ArgumentError, match=rf"^{op}: argument 'grad': expected .*, got "):
        solve()


@pytest.mark.parametrize("mode", ["envelope", "implicit"])
def test_second_derivatives_raise(mode):
    M, a, b = costs(), weights(5).requires_grad_(), weights(4, 2).requires_grad_()
    first = grad(sinkhorn(a, b, M, REG, grad=mode, **TIGHT).value, [M, a, b], create_graph=True)
    plain = grad(sinkhorn(a, b, M, REG, grad=mode, **TIGHT).value, [M, a, b])
    torch.testing.assert_close(first, plain, rtol=0, atol=0)
    for part in first:
        with pytest.raises(NotDifferentiableError, match=r"^sinkhorn: .*first-order"):
            grad(part.square().sum() + M.sum(), M, retain_graph=True)


def test_second_derivatives_by_points_raise():
    X, Y = wide(5, 2), wide(4, 2, seed=1)
    (first,) = grad(sinkhorn_samples(X, Y, 2.0).value, X, create_graph=True)
    with pytest.raises(NotDifferentiableError, match=r"^sinkhorn: .*first-order"):
        grad(first.square().sum(), X)


@pytest.mark.parametrize("mode", ["envelope", "implicit"])
def test_forward_mode_raises(mode):
    M, a, b = costs().detach(), weights(5), weights(4, 2)
    for i, t in enumerate((a, b, M)):
        with forward_ad.dual_level():
            arguments = [a, b, M]
            arguments[i] = forward_ad.make_dual(t, torch.ones_like(t))
            with pytest.raises(NotDifferentiableError, match="forward-mode"):
                _ = sinkhorn(*arguments, REG, grad=mode).value
    with forward_ad.dual_level():
        X = forward_ad.make_dual(wide(5, 2).detach(), torch.ones(5, 2, dtype=torch.float64))
        with pytest.raises(NotDifferentiableError, match="forward-mode"):
            _ = sinkhorn_samples(X, wide(4, 2).detach(), REG).value


def test_numpy_has_no_gradients():
    result = sinkhorn(None, None, costs().detach().numpy(), REG)
    assert isinstance(result.value, float)
    assert isinstance(result.plan(), np.ndarray)


# --- Around them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["envelope", "implicit"])
def test_float32_gradients_are_the_float64_ones(mode):
    M, a, b = costs(30, 20), weights(30), weights(20, 2)
    names = ("value",) if mode == "envelope" else ("value", "plan", "barycentric")
    for name in names:
        found = []
        for dtype in (torch.float64, torch.float32):
            arguments = [t.detach().to(dtype).requires_grad_() for t in (a, b, M)]
            output = OUTPUTS[name](sinkhorn(*arguments, REG, grad=mode, tol=1e-5))
            output = output if output.dim() == 0 else (output * make(tuple(output.shape), dtype, 5)).sum()
            gradients = grad(output, arguments)
            assert all(t.dtype == dtype for t in gradients)
            found.append([t.double() for t in gradients])
        # Weights in the same gauge.
        found = [[by_a - by_a.mean(), by_b - by_b.mean(), by_m] for by_a, by_b, by_m in found]
        for left, right in zip(*found, strict=True):
            torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-4 * float(left.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_get_half_precision_gradients(dtype):
    M = costs().detach().to(dtype).requires_grad_()
    result = sinkhorn(None, None, M, REG)
    result.value.backward()
    assert M.grad.dtype == dtype
    torch.testing.assert_close(M.grad, result.plan().to(dtype))


def test_gradients_do_not_depend_on_the_number_of_threads():
    found = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        M, X, Y = make((300, 257)).abs(), make((300, 7)), make((257, 7), seed=1)
        leaves = [t.requires_grad_() for t in (M, X, Y)]
        value = sinkhorn(None, None, M, REG).value
        for metric in METRICS:
            value = value + sinkhorn_samples(X, Y, 5.0, cost=metric).value
        value = value + sinkhorn(None, None, M, REG, grad="implicit").plan().square().sum()
        found.append(grad(value, leaves))
    for other in found[1:]:
        assert all(torch.equal(t, u) for t, u in zip(found[0], other, strict=True))


@pytest.mark.parametrize("mode", ["envelope", "implicit"])
def test_values_can_be_asked_for_again(mode):
    M = costs()
    result = sinkhorn(None, None, M, REG, grad=mode, **TIGHT)
    with torch.no_grad():
        assert not result.value.requires_grad
    # The way through a solution is one graph, as in torch; that of the envelope is made anew.
    (first,) = grad(result.value, M, retain_graph=mode == "implicit")
    (again,) = grad(result.value, M, retain_graph=mode == "implicit")
    (twice,) = grad(result.value + result.value_dual, M)
    assert torch.equal(first, again)
    torch.testing.assert_close(twice, 2 * first)


def test_gradients_reach_through_what_made_the_costs():
    X, Y = wide(5, 3), wide(4, 3, seed=1)

    def value(X: Tensor, Y: Tensor) -> Tensor:
        M = (X[:, None] - Y).square().sum(2)
        return 3.0 * sinkhorn(None, None, M.T, 2.0, **TIGHT).value

    assert gradcheck(value, (X, Y))


def test_a_cost_matrix_that_is_not_contiguous():
    M = make((8, 10), torch.float64).abs().requires_grad_()
    ours = grad(sinkhorn(None, None, M[::2, 1::3].T, REG, **TIGHT).value, M)[0]
    part = M.detach()[::2, 1::3].T.contiguous().requires_grad_()
    sinkhorn(None, None, part, REG, **TIGHT).value.backward()
    assert torch.equal(ours[::2, 1::3], part.grad.T)
    assert ours.count_nonzero() == part.grad.count_nonzero()


def test_tensors_of_a_result_are_saved_and_loaded():
    result = sinkhorn(None, None, costs(), REG)
    state = {"f": result.f, "g": result.g, "plan": result.plan(), "value": result.value.detach()}
    memory = io.BytesIO()
    torch.save(state, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=True)
    assert all(torch.equal(loaded[name], t) for name, t in state.items())
    again = sinkhorn(None, None, costs(), REG, warmstart=(loaded["f"], loaded["g"]))
    assert again.n_iter <= 2


# --- Writes, copies, modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["envelope", "implicit", "detach"])
def test_writing_to_the_arguments_is_noticed(mode):
    M, a = costs().detach(), weights(5)
    result = sinkhorn(a, None, M, REG, grad=mode)
    value, f = result.value, result.f
    M.mul_(2.0)
    for read in (lambda: result.value, result.plan, lambda: result.apply(torch.ones(4)), result.plan_csr):
        with pytest.raises(ArgumentError, match=r"^SinkhornResult: argument 'M': .*written to in place"):
            read()
    assert torch.equal(result.f, f)
    torch.testing.assert_close(value, sinkhorn(a, None, M / 2, REG).value)
    result = sinkhorn(a, None, M, REG, grad=mode)
    a[0] = 0.0
    with pytest.raises(ArgumentError, match=r"^SinkhornResult: argument 'a': "):
        _ = result.value
    X, Y = wide(5, 2).detach(), wide(4, 2, seed=1).detach()
    result = sinkhorn_samples(X, Y, 2.0, grad="detach")
    Y[0] += 1.0
    with pytest.raises(ArgumentError, match=r"^SinkhornResult: argument 'Y': "):
        result.plan()


def test_a_write_between_value_and_gradient():
    leaf = costs()
    M = leaf * 1.0
    result = sinkhorn(None, None, M, REG)
    value, plan = result.value, result.plan()
    M.mul_(2.0)
    # The slopes were taken with the value.
    assert torch.equal(grad(value, leaf)[0], plan)
    M = leaf * 1.0
    value = sinkhorn(None, None, M, REG, grad="implicit").value
    M.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(value, leaf)


def test_a_step_of_an_optimiser_after_the_value():
    X, Y = wide(5, 2).detach().requires_grad_(), wide(4, 2, seed=1).detach()
    optimiser = torch.optim.SGD([X], lr=0.2)
    values = []
    for _ in range(30):
        optimiser.zero_grad()
        value = sinkhorn_samples(X, Y, 0.1).value
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.2 * values[0]


@pytest.mark.parametrize("numpy", [False, True])
def test_results_are_copied_and_pickled(numpy):
    M = costs().detach()
    result = sinkhorn(None, None, M.numpy() if numpy else M, REG)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert repr(other) == repr(result)
        assert float(other.value) == float(result.value)
        assert np.array_equal(other.plan(), result.plan())


def test_inference_mode():
    M = costs().detach()
    with torch.inference_mode():
        result = sinkhorn(None, None, M.clone(), REG)
        assert not result.value.requires_grad
    assert torch.equal(result.plan(), sinkhorn(None, None, M, REG).plan())


def test_autocast_changes_nothing():
    X, Y, V = make((40, 3)), make((30, 3), seed=1), make((30, 4), seed=2)
    M = (X[:, None] - Y).abs().sum(2)

    leaves = [t.detach().clone().requires_grad_() for t in (M, X, Y)]

    def everything() -> list[Tensor]:
        result = sinkhorn(None, None, leaves[0], REG, grad="implicit")
        found = [result.plan(), result.apply(V), result.apply_t(X), result.barycentric(Y), result.value]
        for metric in METRICS:
            result = sinkhorn_samples(*leaves[1:], REG, cost=metric)
            found += [result.value, result.plan(), result.apply(V), result.barycentric(V)]
        return found

    def slopes(found: list[Tensor]) -> tuple[Tensor, ...]:
        return grad(sum(t.square().sum() for t in found if t.requires_grad), leaves)

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = everything()
    for ours, theirs in zip([*cast, *slopes(cast)], [*plain, *slopes(plain)], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs)


def test_vectorised_jacobians():
    M = costs()

    def plan(M: Tensor) -> Tensor:
        return sinkhorn(None, None, M, REG, grad="implicit", **TIGHT).plan()

    both = [torch.autograd.functional.jacobian(plan, M, vectorize=way) for way in (False, True)]
    torch.testing.assert_close(*both)
