"""Both terms of the distillation loss against loops and linear programmes; the critic's Lipschitz bound."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import shiftkern
from shiftkern.ot.wcord_loss import WCoRDCritic, wcord_loss

COSTS = ["cosine", "euclidean", "sqeuclidean"]
LOCAL = {"global_weight": 0.0, "tol": 1e-11, "max_iter": 50_000}


def problem(batch, d=4, seed=0, dtype=torch.float64, teacher_dim=None):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, d, generator=g, dtype=torch.float64)
    teacher = torch.randn(batch, teacher_dim or d, generator=g, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def make_critic(student_dim=4, teacher_dim=4, seed=0, dtype=torch.float64, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WCoRDCritic(student_dim, teacher_dim, **{"hidden": 8, **options}).to(dtype)


def costs(student, teacher, cost, normalize=True):
    s, t = np.asarray(student, dtype=np.float64), np.asarray(teacher, dtype=np.float64)
    out = np.empty((len(s), len(t)))
    for i, x in enumerate(s):
        for j, y in enumerate(t):
            length = math.sqrt(sum(x * x)), math.sqrt(sum(y * y))
            u, v = (x / length[0], y / length[1]) if normalize else (x, y)
            if cost == "cosine":
                out[i, j] = 1 - sum(x * y) / (length[0] * length[1])
            else:
                out[i, j] = math.sqrt(sum((u - v) ** 2)) ** (1 if cost == "euclidean" else 2)
    return out


def entropic_plan(M, reg):
    kernel, n = np.exp(-M / reg), len(M)
    v = np.ones(n)
    while True:
        u = 1 / n / (kernel @ v)
        v = 1 / n / (kernel.T @ u)
        plan = u[:, None] * kernel * v
        if np.abs(plan.sum(1) - 1 / n).sum() < 1e-13:
            return plan


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("normalize", [True, False])
@settings(max_examples=10)
@given(batch=st.integers(1, 8), d=st.integers(1, 5), seed=st.integers(0, 999))
def test_local_term_is_the_cost_of_the_entropic_plan(cost, normalize, batch, d, seed):
    student, teacher = problem(batch, d, seed)
    M = costs(student, teacher, cost, normalize)
    want = 2.5 * np.sum(entropic_plan(M, 1.0) * M)
    options = {"reg": 1.0, "cost": cost, "local_weight": 2.5, "normalize": normalize}
    assert float(wcord_loss(student, teacher, **options, **LOCAL)) == pytest.approx(want, abs=1e-8)


@pytest.mark.parametrize("cost", COSTS)
def test_small_reg_tends_to_the_best_matching(cost):
    student, teacher = problem(7, seed=3)
    M = costs(student, teacher, cost)
    best = M[linear_sum_assignment(M)].mean()
    got = float(wcord_loss(student, teacher, reg=0.01, cost=cost, tol=1e-4, max_iter=50_000))
    assert got == pytest.approx(best, abs=0.01 * math.log(7))


def test_global_term_is_the_mean_difference_of_scores():
    student, teacher = problem(5, 4, teacher_dim=3)
    critic = make_critic(4, 3)
    s, t = (torch.nn.functional.normalize(x, dim=1) for x in (student, teacher))
    for count in (None, 1, 3):
        own = [critic(s[i], t[i]).item() for i in range(5)]
        shifts = range(1, 5 if count is None else count + 1)
        wrong = [critic(s[(i + k) % 5], t[i]).item() for i in range(5) for k in shifts]
        want = -3.0 * (np.mean(own) - np.mean(wrong))
        got = wcord_loss(student, teacher, critic, local_weight=0.0, global_weight=3.0, negatives=count)
        assert got.item() == pytest.approx(want, abs=1e-12)
    longer = wcord_loss(2 * student, teacher, critic, local_weight=0.0, global_weight=3.0, negatives=3)
    assert longer.item() == pytest.approx(want, abs=1e-12)
    raw = wcord_loss(2 * student, teacher, critic, local_weight=0.0, global_weight=3.0, negatives=3, normalize=False)
    assert raw.item() != pytest.approx(want, abs=1e-3)


@given(seed=st.integers(0, 999), depth=st.integers(0, 4), scale=st.floats(1e-3, 1e3))
def test_critic_is_1_lipschitz_for_any_weights(seed, depth, scale):
    critic = make_critic(3, 2, seed, depth=depth)
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(scale)
    g = torch.Generator().manual_seed(seed)
    x, y = (5 * torch.randn(64, 5, generator=g, dtype=torch.float64) for _ in range(2))
    moved = (critic(x[:, 2:], x[:, :2]) - critic(y[:, 2:], y[:, :2])).abs()
    assert bool((moved <= (x - y).norm(dim=1) * (1 + 1e-12)).all())
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(critic(x[:, 2:], x[:, :2]).sum(), x)
    assert bool((slope.norm(dim=1) <= 1 + 1e-12).all())
    if depth == 0:
        torch.testing.assert_close(slope.norm(dim=1), torch.ones(64, dtype=torch.float64))


def test_the_dual_form_is_below_the_distance_of_the_joint_from_the_product():
    # Kantorovich and Rubinstein: no 1-Lipschitz critic tells pairs apart better than the Euclidean transport cost.
    student, teacher = problem(4, seed=5)
    critic = make_critic(hidden=32)
    s, t = (torch.nn.functional.normalize(x, dim=1) for x in (student, teacher))
    pairs = torch.cat([t, s], 1).repeat_interleave(3, 0)
    others = torch.stack([torch.cat([t[i], s[j]]) for i in range(4) for j in range(4) if i != j])
    M = torch.cdist(pairs, others).numpy()
    bound = M[linear_sum_assignment(M)].mean()
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = wcord_loss(student, teacher, critic, local_weight=0.0)
        loss.backward()
        optimizer.step()
        losses.append(-loss.item())
    assert max(losses) <= bound + 1e-12
    assert losses[-1] > losses[0] + 0.1 * bound


@given(batch=st.integers(2, 7), seed=st.integers(0, 999))
def test_invariants(batch, seed):
    student, teacher = problem(batch, seed=seed)
    critic = make_critic(seed=seed)
    options = {"reg": 0.5, "tol": 1e-11, "max_iter": 50_000}
    both = wcord_loss(student, teacher, critic, **options)
    local = wcord_loss(student, teacher, **options)
    apart = wcord_loss(student, teacher, critic, local_weight=0.0)
    torch.testing.assert_close(both, local + apart)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(wcord_loss(student[order], teacher[order], critic, **options), both, rtol=0, atol=1e-9)
    # The local term sees the batch as a set, in any scale of its features, and is symmetric.
    torch.testing.assert_close(wcord_loss(3 * student[order], teacher, **options), local, rtol=0, atol=1e-9)
    torch.testing.assert_close(wcord_loss(teacher, student, **options), local, rtol=0, atol=1e-9)
    assert 0 <= local.item() <= 2
    constant = make_critic(seed=seed)
    with torch.no_grad():
        constant.layers[-1].bias.add_(7.0)
    shifted = wcord_loss(student, teacher, constant, local_weight=0.0)
    torch.testing.assert_close(shifted, apart)


def test_gradient_is_the_plan_times_the_slopes_of_the_costs():
    student, teacher = problem(5, seed=2)
    M = costs(student, teacher, "euclidean", normalize=False)
    plan = entropic_plan(M, 1.0)
    want = np.zeros((5, 4))
    for i in range(5):
        for j in range(5):
            want[i] += plan[i, j] * (student[i] - teacher[j]).numpy() / M[i, j]
    student.requires_grad_()
    wcord_loss(student, teacher, reg=1.0, cost="euclidean", normalize=False, **LOCAL).backward()
    np.testing.assert_allclose(student.grad.numpy(), want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("cost", COSTS)
def test_gradients(cost):
    student, teacher = (x.requires_grad_() for x in problem(3, seed=1))
    critic = make_critic()
    # So regularised, the plan is constant, which the gradient of the local term takes for granted.
    loss = lambda s, t: wcord_loss(s, t, critic, reg=1e7, cost=cost)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (student, teacher))
    loss(student, teacher).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in critic.layers.parameters())


@pytest.mark.parametrize("cost", COSTS)
def test_features_without_direction_and_equal_ones(cost):
    student, teacher = problem(4, dtype=torch.float32)
    student[1] = 0.0
    student[2] = teacher[2]
    student.requires_grad_()
    wcord_loss(student, teacher, make_critic(dtype=torch.float32), reg=0.5, cost=cost).backward()
    assert bool(torch.isfinite(student.grad).all())


def test_critic_survives_saving_and_weights_of_zero():
    critic, other = make_critic(seed=1), make_critic(seed=2)
    student, teacher = problem(5)
    other.load_state_dict(critic.state_dict())
    assert torch.equal(other(student, teacher), critic(student, teacher))
    with torch.no_grad():
        for layer in other.layers[::2]:
            layer.parametrizations.weight.original.zero_()
    assert bool(torch.isfinite(other(student, teacher)).all())


def test_not_converging_is_said():
    student, teacher = problem(8)
    with pytest.warns(
        shiftkern.ConvergenceWarning, match="wcord_loss: the plan's marginals are off by .* after 2 iter"
    ):
        assert bool(torch.isfinite(wcord_loss(student, teacher, reg=0.01, max_iter=2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    student, teacher = problem(6, dtype=dtype)
    critic = make_critic()
    got = wcord_loss(student, teacher, critic, reg=0.5)
    assert got.dtype == dtype
    want = wcord_loss(student.double(), teacher.double(), critic, reg=0.5)
    torch.testing.assert_close(got.double(), want, rtol=1e-3 if dtype == torch.float32 else 1e-2, atol=1e-3)


def test_numpy_in_numpy_out_and_layouts():
    student, teacher = problem(6, dtype=torch.float32)
    got = wcord_loss(student.numpy(), teacher.numpy(), make_critic(), reg=0.5)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    want = wcord_loss(student, teacher, make_critic(), reg=0.5)
    assert float(got) == want.item()
    laid = wcord_loss(student.T.contiguous().T, teacher.T.contiguous().T, make_critic(), reg=0.5)
    torch.testing.assert_close(laid, want)
    assert wcord_loss(student[:1], student[:1]).item() == pytest.approx(0.0, abs=1e-6)


GOOD = dict(zip(("student", "teacher"), problem(4, dtype=torch.float32), strict=True))
CRITIC = make_critic(dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"student": 3}, "student", TypeError),
        ({"student": GOOD["student"].long()}, "student", TypeError),
        ({"student": GOOD["student"][0]}, "student", ValueError),
        ({"student": GOOD["student"][:0]}, "student", ValueError),
        ({"student": GOOD["student"] * math.nan}, "student", ValueError),
        ({"student": GOOD["student"][:1], "teacher": GOOD["teacher"][:1], "critic": CRITIC}, "student", ValueError),
        ({"teacher": GOOD["teacher"].numpy()}, "teacher", TypeError),
        ({"teacher": GOOD["teacher"][:3]}, "teacher", ValueError),
        ({"teacher": GOOD["teacher"][:, :3]}, "teacher", ValueError),
        ({"teacher": GOOD["teacher"] + math.inf}, "teacher", ValueError),
        ({"critic": torch.nn.Linear(8, 1)}, "critic", TypeError),
        ({"critic": make_critic(3, 4)}, "critic", ValueError),
        ({"reg": 0.0}, "reg", ValueError),
        ({"cost": "manhattan"}, "cost", ValueError),
        ({"local_weight": -1.0}, "local_weight", ValueError),
        ({"global_weight": math.nan}, "global_weight", ValueError),
        ({"critic": CRITIC, "negatives": 0}, "negatives", ValueError),
        ({"critic": CRITIC, "negatives": 4}, "negatives", ValueError),
        ({"normalize": 1}, "normalize", TypeError),
        ({"tol": 0.0}, "tol", ValueError),
        ({"max_iter": 0}, "max_iter", ValueError),
    ],
)
def test_errors_name_operator_and_argument(change, name, error):
    with pytest.raises(error, match=f"wcord_loss: argument '{name}': expected .*, got "):
        wcord_loss(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"student_dim": 0}, "student_dim", ValueError),
        ({"teacher_dim": 2.5}, "teacher_dim", TypeError),
        ({"hidden": 0}, "hidden", ValueError),
        ({"depth": -1}, "depth", ValueError),
    ],
)
def test_critic_refuses_sizes(change, name, error):
    with pytest.raises(error, match=f"WCoRDCritic: argument '{name}': expected .*, got "):
        WCoRDCritic(**{"student_dim": 3, "teacher_dim": 3, **change})


def test_critic_refuses_features():
    for student, teacher, name in (
        (torch.zeros(3, 5), torch.zeros(3, 4), "student"),
        (torch.zeros(3, 4), torch.zeros(3, 5), "teacher"),
        (torch.zeros(3, 4), torch.zeros(2, 4), "teacher"),
    ):
        with pytest.raises(ValueError, match=f"WCoRDCritic: argument '{name}': expected .*, got "):
            CRITIC(student, teacher)
    with pytest.raises(TypeError, match="WCoRDCritic: argument 'student'"):
        CRITIC([0.0] * 4, torch.zeros(4))
