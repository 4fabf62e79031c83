"""Re-ttention: what is captured, what steps make of it, the schedule, and the place in a diffusion model."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError, NotDifferentiableError
from shiftkern.attention import (
    BlockMask,
    Reattention,
    ReattentionProcessor,
    ReattentionState,
    attention_lse,
    merge_state,
    reattention_capture,
    reattention_step,
    sparse_attention,
)

from helpers.attention import LAYOUTS, arranged, expected, problem, random_mask
from helpers.strategies import DTYPES, computing, make, roundoff

MODES = ("rho", "merge", "residual")
#: How far results may be apart that are equal but for the order of operations, relative to numbers of order one.
CLOSE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def masked(block: tuple[int, int] = (16, 32), maps: tuple[int, int] = (2, 3), n: tuple[int, int] = (70, 90)):
    """A mask with some rows that keep nothing."""
    _, dense = random_mask(*n, block, maps, seed=5)
    dense[:, :, [0, 33, 69]] = False
    return BlockMask.from_bool(dense, block), dense


def near(dtype: torch.dtype, scale: float = 1.0) -> dict[str, float]:
    return {"rtol": CLOSE[dtype], "atol": scale * CLOSE[dtype]}


# --- capture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(16, 32), (64, 64), (5, 1), (100, 128)])
def test_capture_is_what_it_says(block: tuple[int, int], dtype: torch.dtype):
    """Every part of the state from dense float64 attention over all, kept and other pairs."""
    q, k, v = problem(dtype=dtype, value_width=7)
    mask, dense = masked(block)
    out, state = reattention_capture(q, k, v, mask)
    everything, kept, rest = (expected(q, k, v, m) for m in (torch.ones(70, 90, dtype=torch.bool), dense, ~dense))
    everything.check(out=out, lse=state.lse_full)
    rest.check(lse=state.lse_rest)
    wide = computing(dtype)
    assert state.rho.dtype == state.share.dtype == state.lse_full.dtype == state.lse_rest.dtype == wide
    assert state.rest.dtype == state.residual.dtype == state.difference.dtype == out.dtype == dtype
    rho = np.exp(kept.lse - everything.lse)
    for found, part in ((state.rho, kept), (state.share, rest)):
        want = np.exp(part.lse - everything.lse)
        # Log-sum-exps within `far` of their values, and one exponential.
        far = (part.far["lse"] + everything.far["lse"] + 8 * roundoff(wide)) * want
        assert (np.abs(found.double().numpy() - want) - far).max() <= 0
    rest.check(out=state.rest)
    close = {"rtol": 0, "atol": CLOSE[dtype]}
    torch.testing.assert_close(
        state.residual.double(), torch.from_numpy(everything.out - rho[..., None] * kept.out), **close
    )
    torch.testing.assert_close(state.difference.double(), torch.from_numpy(everything.out - kept.out), **close)
    torch.testing.assert_close(state.lse_kept.double(), torch.from_numpy(kept.lse), **near(wide))
    other, lse = state.complement
    assert other.dtype == dtype
    assert torch.equal(lse, state.lse_rest)
    assert torch.equal(other, state.rest)
    assert state.steps == 0
    assert state.digest == mask.digest


@pytest.mark.parametrize("mode", [None, *MODES])
def test_capture_keeps_what_the_mode_needs(mode: str | None):
    q, k, v = problem()
    mask, _ = masked()
    everything, state = reattention_capture(q, k, v, mask)
    out, own = reattention_capture(q, k, v, mask, mode=mode)
    assert torch.equal(out, everything)
    assert (own.rest is None) == (mode == "residual")
    assert (own.difference is None) == (mode in ("rho", "merge"))
    for name in ("rho", "share", "lse_full", "lse_rest", "rest", "difference"):
        if getattr(own, name) is not None:
            assert torch.equal(getattr(own, name), getattr(state, name))
    if mode == "residual":
        for name in ("complement", "residual"):
            with pytest.raises(
                ArgumentError, match=r"^ReattentionState: argument 'mode': expected a capture for 'rho'"
            ):
                getattr(own, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_mask_leaves_nothing(dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    mask = BlockMask.full(70, 90, block=16)
    out, state = reattention_capture(q, k, v, mask)
    assert torch.equal(out, sparse_attention(q, k, v, mask))
    assert (state.rho == 1).all()
    assert (state.share == 0).all()
    assert (state.residual == 0).all()
    assert (state.difference == 0).all()
    assert (state.lse_rest == -math.inf).all()
    other, lse = state.complement
    assert (other == 0).all()
    assert (lse == -math.inf).all()
    q, k, v = problem(dtype=dtype, seed=1)
    for mode in MODES:
        step = reattention_step(q, k, v, mask, copy.copy(state), mode=mode, ramp=0.0)
        torch.testing.assert_close(step, sparse_attention(q, k, v, mask), **near(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_mask_carries_everything(dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    mask = BlockMask.from_bool(torch.zeros(70, 90, dtype=torch.bool), 16)
    out, state = reattention_capture(q, k, v, mask)
    expected(q, k, v, torch.ones(70, 90, dtype=torch.bool)).check(out=out, lse=state.lse_rest)
    assert (state.rho == 0).all()
    assert (state.share == 1).all()
    assert torch.equal(state.residual, out)
    assert torch.equal(state.difference, out)
    assert torch.equal(state.lse_rest, state.lse_full)
    assert torch.equal(state.complement[0], out)
    other = problem(dtype=dtype, seed=1)
    for mode in MODES:
        state.steps = 0
        assert torch.equal(reattention_step(*other, mask, state, mode=mode), out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout: str):
    mask, _ = masked()
    results = []
    for arrange in (lambda t: t, lambda t: arranged(t, layout)):
        q, k, v = (arrange(t) for t in problem())
        out, state = reattention_capture(q, k, v, mask)
        state.rest = arrange(state.rest)
        state.rho = state.rho.mT.contiguous().mT
        results.append([out, state.rho, reattention_step(q, k, v, mask, state, mode="rho")])
        results[-1].append(reattention_step(q, k, v, mask, state, mode="merge"))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [(16, 32), (64, 64), (5, 1)])
def test_a_step_right_after_the_capture_is_full_attention_to_the_bit(block: tuple[int, int], dtype: torch.dtype):
    q, k, v = problem(dtype=dtype)
    mask, _ = masked(block)
    full, state = reattention_capture(q, k, v, mask)
    assert torch.equal(reattention_step(q, k, v, mask, state, ramp=0.0), full)
    # Nor does the ramp matter in the first step: it comes after use.
    state.steps = 0
    assert torch.equal(reattention_step(q, k, v, mask, state, ramp=0.5), full)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_right_after_the_capture_is_full_attention(dtype: torch.dtype, mode: str):
    q, k, v = problem(dtype=dtype)
    mask, _ = masked()
    full, state = reattention_capture(q, k, v, mask, mode=mode)
    step = reattention_step(q, k, v, mask, state, ramp=0.0, mode=mode)
    assert step.dtype == dtype
    # What is carried is stored in the type of the inputs, and rounded there.
    torch.testing.assert_close(step, full, **near(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ramp", [0.0, 0.04, -0.01, 0.5])
def test_rho_grows_after_use(ramp: float, dtype: torch.dtype):
    mask, dense = masked()
    _, state = reattention_capture(*problem(dtype=dtype), mask)
    before = {name: value.clone() for name, value in state.state_dict().items() if isinstance(value, Tensor)}
    for step in range(4):
        q, k, v = problem(dtype=dtype, seed=1 + step)
        assert state.steps == step
        out = reattention_step(q, k, v, mask, state, ramp=ramp)
        sparse = torch.from_numpy(expected(q, k, v, dense).out)
        want = (state.rho.double() + step * ramp)[..., None] * sparse + state.residual.double()
        torch.testing.assert_close(out.double(), want, rtol=CLOSE[dtype], atol=2 * CLOSE[dtype])
        torch.testing.assert_close(out, reattention_again(q, k, v, mask, state, step, ramp), rtol=0, atol=0)
    assert state.steps == 4
    for name, value in before.items():
        assert torch.equal(getattr(state, name), value), name


def reattention_again(q, k, v, mask, state, steps, ramp) -> Tensor:
    """The same step from a state of its own."""
    own = copy.copy(state)
    own.steps = steps
    return reattention_step(q, k, v, mask, own, ramp=ramp)


@pytest.mark.parametrize("clamp", [1.0, 0.3, 5])
def test_clamp_bounds_the_raised_rho(clamp: float):
    mask, dense = masked()
    _, state = reattention_capture(*problem(dtype=torch.float64), mask)
    for step in range(3):
        q, k, v = problem(dtype=torch.float64, seed=1 + step)
        out = reattention_step(q, k, v, mask, state, ramp=0.4, clamp=clamp)
        rho = (state.rho + 0.4 * step).clamp(max=clamp)
        want = rho[..., None] * torch.from_numpy(expected(q, k, v, dense).out) + state.residual
        torch.testing.assert_close(out, want)


def test_there_is_no_clamp_by_default():
    mask, dense = masked()
    _, state = reattention_capture(*problem(dtype=torch.float64), mask)
    state.steps = 100
    q, k, v = problem(dtype=torch.float64, seed=1)
    want = (state.rho + 4.0)[..., None] * torch.from_numpy(expected(q, k, v, dense).out) + state.residual
    torch.testing.assert_close(reattention_step(q, k, v, mask, state), want)


def test_residual_mode_adds_the_difference():
    mask, dense = masked()
    _, state = reattention_capture(*problem(dtype=torch.float64), mask)
    q, k, v = problem(dtype=torch.float64, seed=1)
    want = torch.from_numpy(expected(q, k, v, dense).out) + state.difference
    for ramp in (0.0, 0.04):
        torch.testing.assert_close(reattention_step(q, k, v, mask, state, mode="residual", ramp=ramp), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_mode_merges_with_the_others_of_then(dtype: torch.dtype):
    mask, dense = masked()
    then = problem(dtype=dtype)
    _, state = reattention_capture(*then, mask)
    q, k, v = problem(dtype=dtype, seed=1)
    kept, rest = expected(q, k, v, dense), expected(*then, ~dense)
    want, _ = merge_state(*(torch.from_numpy(t) for t in (kept.out, kept.lse, rest.out, rest.lse)))
    for _ in range(2):
        torch.testing.assert_close(
            reattention_step(q, k, v, mask, state, mode="merge").double(), want, **near(dtype, 10)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weights_sum_to_one(dtype: torch.dtype):
    """With values that are all the same, every output is that value, whatever became of queries and keys."""
    mask, _ = masked()
    q, k, v = problem(dtype=dtype)
    _, state = reattention_capture(q, k, torch.full_like(v, 3.0), mask)
    for seed in range(1, 4):
        q, k, v = problem(dtype=dtype, seed=seed)
        out = reattention_step(q, k, torch.full_like(v, 3.0), mask, state, mode="merge")
        torch.testing.assert_close(out, torch.full_like(out, 3.0), rtol=CLOSE[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [20.0, 60.0, 85.0, 90.0, 110.0, 300.0, 2000.0])
def test_merging_when_the_kept_pairs_lose_their_weight(gap: float, dtype: torch.dtype):
    """The others weighed next to nothing then, and all there is now."""
    mask = BlockMask.from_bool(torch.tensor([[True, False]]), 1)
    q, v = torch.ones(1, 1, 1, 1, dtype=dtype), torch.tensor([1.0, 3.0], dtype=dtype)[None, None, :, None]
    _, state = reattention_capture(q, q.new_tensor([gap, 0.0])[None, None, :, None], v, mask, scale=1.0)
    out = reattention_step(q, q.new_tensor([-gap, 0.0])[None, None, :, None], v, mask, state, mode="merge", scale=1.0)
    share = 1 / (1 + math.exp(-gap))
    assert abs(out.item() - (1 - share + 3 * share)) <= 3 * CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [20.0, 90.0, 2000.0])
def test_merging_with_nothing(gap: float, dtype: torch.dtype):
    """Nothing is left over from a full mask, however high its log-sum-exp was."""
    mask = BlockMask.full(1, 2)
    q, v = torch.ones(1, 1, 1, 1, dtype=dtype), torch.tensor([1.0, 3.0], dtype=dtype)[None, None, :, None]
    _, state = reattention_capture(q, torch.full_like(v, gap), v, mask, scale=1.0)
    out = reattention_step(q, torch.full_like(v, -gap), v, mask, state, mode="merge", scale=1.0)
    assert abs(out.item() - 2.0) <= 2 * CLOSE[dtype]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_heads(groups: int, mode: str):
    mask, _ = masked(maps=(2, 4))
    q, k, v = problem(heads=4, groups=groups, dtype=torch.float64)
    full, state = reattention_capture(q, k, v, mask, enable_gqa=True)
    expected(q, k, v, torch.ones(70, 90, dtype=torch.bool)).check(out=full)
    apart = [t.repeat_interleave(4 // groups, 1) for t in (k, v)]
    again, other = reattention_capture(q, *apart, mask)
    assert torch.equal(full, again)
    q, k, v = problem(heads=4, groups=groups, dtype=torch.float64, seed=1)
    apart = [t.repeat_interleave(4 // groups, 1) for t in (k, v)]
    step = reattention_step(q, k, v, mask, state, mode=mode, enable_gqa=True)
    assert torch.equal(step, reattention_step(q, *apart, mask, other, mode=mode))
    for function, more in ((reattention_capture, ()), (reattention_step, (state,))):
        with pytest.raises(ArgumentError, match=rf"^{function.__name__}: argument 'k': .*enable_gqa"):
            function(q, k, v, mask, *more)


def test_scale():
    mask, dense = masked()
    q, k, v = problem(dtype=torch.float64)
    full, state = reattention_capture(q, k, v, mask, scale=0.7)
    everything, kept = (expected(q, k, v, m, 0.7) for m in (torch.ones(70, 90, dtype=torch.bool), dense))
    everything.check(out=full, lse=state.lse_full)
    np.testing.assert_allclose(state.rho.numpy(), np.exp(kept.lse - everything.lse), rtol=1e-12)
    assert torch.equal(reattention_step(q, k, v, mask, state, scale=0.7), full)


def test_rho_from_log_sum_exps():
    mask, _ = masked()
    q, k, v = problem(dtype=torch.float64)
    _, state = reattention_capture(q, k, v, mask)
    rho = (attention_lse(q, k, mask) - attention_lse(q, k)).exp()
    torch.testing.assert_close(state.rho, rho)
    assert (state.rho >= 0).all()
    assert (state.rho <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype):
    mask, _ = random_mask(300, 280, (16, 32), (2, 4))
    results = []
    for threads in (1, 2, 3, 5):
        shiftkern.set_num_threads(threads)
        q, k, v = problem(2, 4, 300, 280, 24, 20, dtype=dtype)
        full, state = reattention_capture(q, k, v, mask)
        kept = [value for value in state.state_dict().values() if isinstance(value, Tensor)]
        results.append([full, *kept, *(reattention_step(q, k, v, mask, state, mode=mode) for mode in MODES)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_nan_spreads_to_its_rows_and_other_nan_only_at_the_capture(dtype: torch.dtype):
    mask, dense = masked(maps=(1, 1))
    seen = dense[0, 0, :, 20]
    assert seen.any()
    assert not seen.all()
    q, k, v = problem(dtype=dtype)
    _, state = reattention_capture(q, k, v, mask)
    clean = [reattention_step(q, k, v, mask, copy.copy(state), mode=mode) for mode in MODES]
    for broken in ("k", "v"):
        bad = {"k": k.clone(), "v": v.clone()}
        bad[broken][:, :, 20] = math.nan
        for mode, want in zip(MODES, clean, strict=True):
            out = reattention_step(q, bad["k"], bad["v"], mask, copy.copy(state), mode=mode)
            assert out[:, :, seen].isnan().all()
            assert torch.equal(out[:, :, ~seen], want[:, :, ~seen])
        out, _ = reattention_capture(q, bad["k"], bad["v"], mask)
        assert out.isnan().all()
    q[:, :, 3] = math.nan
    out, state = reattention_capture(q, k, v, mask)
    assert out[:, :, 3].isnan().all()
    assert out[:, :, :3].isfinite().all()
    assert out[:, :, 4:].isfinite().all()
    assert state.rho[:, :, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("batch", "heads", "n_q", "n_k", "width", "value_width"),
    [
        (0, 3, 5, 6, 4, 4),
        (2, 0, 5, 6, 4, 4),
        (2, 3, 0, 6, 4, 4),
        (2, 3, 5, 0, 4, 4),
        (2, 3, 5, 6, 0, 4),
        (2, 3, 5, 6, 4, 0),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_empty_axes(batch, heads, n_q, n_k, width, value_width, mode):
    q, k, v = problem(batch, heads, n_q, n_k, width, value_width)
    mask = BlockMask.from_bool(torch.arange(n_q)[:, None] >= torch.arange(n_k), 4)
    full, state = reattention_capture(q, k, v, mask)
    expected(q, k, v, torch.ones(n_q, n_k, dtype=torch.bool)).check(out=full)
    torch.testing.assert_close(reattention_step(q, k, v, mask, state, mode=mode), full)


def test_no_gradient():
    mask, _ = masked()
    q, k, v = (t.requires_grad_() for t in problem())
    out, state = reattention_capture(q, k, v, mask)
    with pytest.raises(NotDifferentiableError, match=r"^reattention_capture: "):
        out.sum().backward()
    with torch.no_grad():
        _, state = reattention_capture(q, k, v, mask)
    with pytest.raises(NotDifferentiableError, match=r"^reattention_step: "):
        reattention_step(q, k, v, mask, state).sum().backward()


def test_compiled_equals_eager():
    torch.compiler.reset()
    mask, _ = masked()
    first, second = problem(), problem(seed=1)

    def function(first: list[Tensor], second: list[Tensor]) -> tuple[Tensor, ...]:
        full, state = reattention_capture(*first, mask)
        steps = [reattention_step(*second, mask, state, mode=mode) for mode in MODES]
        return full, *steps

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for one, other in zip(function(first, second), compiled(first, second), strict=True):
            assert torch.equal(one, other)


def test_a_fresh_mask_compiles():
    """Whose digest nobody has asked for yet."""
    torch.compiler.reset()
    q, k, v = problem()
    modules = [Reattention(masked()[0], full_steps=1, refresh_every=None) for _ in range(2)]
    compiled = torch.compile(modules[0], backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(q, k, v), modules[1](q, k, v))


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, *MODES])
def test_state_dict_round_trip(mode: str | None):
    mask, _ = masked()
    q, k, v = problem()
    _, state = reattention_capture(q, k, v, mask, mode=mode)
    use = mode or "rho"
    reattention_step(q, k, v, mask, state, mode=use)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    again = ReattentionState.from_state_dict(torch.load(file, weights_only=True))
    assert again.steps == state.steps == 1
    q, k, v = problem(seed=1)
    assert torch.equal(
        reattention_step(q, k, v, mask, again, mode=use), reattention_step(q, k, v, mask, state, mode=use)
    )


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        *[
            ({missing: ...}, "state", ArgumentError)
            for missing in ("rho", "share", "lse_full", "lse_rest", "digest", "steps")
        ],
        ({"rho": None}, "rho", ArgumentTypeError),
        ({"lse_full": [1.0]}, "lse_full", ArgumentTypeError),
        ({"rest": 1.0}, "rest", ArgumentTypeError),
        ({"difference": "x"}, "difference", ArgumentTypeError),
        ({"digest": 5}, "digest", ArgumentTypeError),
        ({"steps": -1}, "steps", ArgumentError),
        ({"steps": 1.0}, "steps", ArgumentTypeError),
    ],
)
def test_errors_of_a_state_dict(change: dict, name: str, error: type):
    _, state = reattention_capture(*problem(), masked()[0])
    entries = {n: x for n, x in {**state.state_dict(), **change}.items() if x is not ...}
    with pytest.raises(error, match=rf"^ReattentionState.from_state_dict: argument '{name}': expected .*, got "):
        ReattentionState.from_state_dict(entries)


@pytest.mark.parametrize("value", [None, 1.5, "rho", torch.zeros(2), [("rho", torch.zeros(2))]])
def test_a_state_dict_is_a_dict(value):
    with pytest.raises(ArgumentError, match=r"^ReattentionState.from_state_dict: argument 'state': expected .*, got "):
        ReattentionState.from_state_dict(value)


def test_the_state_belongs_to_a_mask_a_shape_a_type_and_a_device():
    mask, dense = masked()
    q, k, v = problem()
    _, state = reattention_capture(q, k, v, mask)
    other = dense.clone()
    other[0, 0, 0, 0] ^= True
    for wrong in (BlockMask.from_bool(other, (16, 32)), BlockMask.from_bool(dense, (32, 16))):
        with pytest.raises(
            ArgumentError, match=r"^reattention_step: argument 'mask': expected the mask of the capture"
        ):
            reattention_step(q, k, v, wrong, state)
    reattention_step(q, k, v, BlockMask.from_bool(dense, (16, 32)), state)
    with pytest.raises(ArgumentTypeError, match=r"^reattention_step: argument 'q': expected the dtype of the capture"):
        reattention_step(q.double(), k.double(), v.double(), mask, state)
    with pytest.raises(ArgumentError, match=r"^reattention_step: argument 'q': expected the shape of the capture"):
        reattention_step(q, k, v[..., :5], mask, state)
    single, _ = random_mask(70, 90, (16, 32))
    _, state = reattention_capture(q, k, v, single)
    for part in ((slice(0, 1),), (slice(None), slice(0, 1))):
        with pytest.raises(ArgumentError, match=r"^reattention_step: argument 'q': expected the shape of the capture"):
            reattention_step(q[part], k[part], v[part], single, state)
    with pytest.raises(ArgumentError, match=r"^reattention_step: argument 'q': expected the device of the capture"):
        reattention_step(q.to("meta"), k.to("meta"), v.to("meta"), single, state)
    assert state.steps == 0


@pytest.mark.parametrize("name", ["rho", "share", "lse_rest", "rest", "difference"])
@pytest.mark.parametrize("how", ["dtype", "shape"])
def test_a_state_with_wrong_tensors_is_refused(name: str, how: str):
    mask, _ = masked()
    q, k, v = problem()
    _, state = reattention_capture(q, k, v, mask)
    value = getattr(state, name)
    setattr(state, name, value.double() if how == "dtype" else value[:, :, :-1])
    mode = {"lse_rest": "merge", "difference": "residual"}.get(name, "rho")
    with pytest.raises(ArgumentError, match=r"^reattention_step: argument "):
        reattention_step(q, k, v, mask, state, mode=mode)
    assert state.steps == 0


@pytest.mark.parametrize(
    ("made", "used"), [("rho", "residual"), ("merge", "residual"), ("residual", "rho"), ("residual", "merge")]
)
def test_a_state_for_another_mode_is_refused(made: str, used: str):
    mask, _ = masked()
    q, k, v = problem()
    _, state = reattention_capture(q, k, v, mask, mode=made)
    with pytest.raises(
        ArgumentError, match=rf"^reattention_step: argument 'state': expected a capture for mode '{used}'"
    ):
        reattention_step(q, k, v, mask, state, mode=used)


Q, K, V = problem(1, 2, 8, 9, 4, 3)
MASK = BlockMask.from_bool(torch.arange(8)[:, None] >= torch.arange(9), 4)

WRONG = [
    ({"q": Q.numpy()}, "q", ArgumentTypeError),
    ({"q": Q[0]}, "q", ArgumentError),
    ({"k": K.double()}, "k", ArgumentTypeError),
    ({"k": None}, "k", ArgumentTypeError),
    ({"k": K[..., :2]}, "k", ArgumentError),
    ({"v": V[:, :, :5]}, "v", ArgumentError),
    ({"v": None}, "v", ArgumentTypeError),
    ({"mask": None}, "mask", ArgumentTypeError),
    ({"mask": BlockMask.full(9, 9)}, "mask", ArgumentError),
    ({"mode": "full"}, "mode", ArgumentError),
    ({"mode": 1}, "mode", ArgumentTypeError),
    ({"scale": math.nan}, "scale", ArgumentError),
    ({"enable_gqa": None}, "enable_gqa", ArgumentTypeError),
]


@pytest.mark.parametrize(("change", "name", "error"), WRONG)
def test_errors_of_capture(change: dict, name: str, error: type):
    with pytest.raises(error, match=rf"^reattention_capture: argument '{name}': expected .*, got "):
        reattention_capture(**{"q": Q, "k": K, "v": V, "mask": MASK, **change})


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        *WRONG,
        ({"state": None}, "state", ArgumentTypeError),
        ({"state": {}}, "state", ArgumentTypeError),
        ({"mode": None}, "mode", ArgumentTypeError),
        ({"ramp": math.inf}, "ramp", ArgumentError),
        ({"ramp": None}, "ramp", ArgumentTypeError),
        ({"clamp": 0.0}, "clamp", ArgumentError),
        ({"clamp": -1}, "clamp", ArgumentError),
        ({"clamp": "1"}, "clamp", ArgumentTypeError),
    ],
)
def test_errors_of_step(change: dict, name: str, error: type):
    _, state = reattention_capture(Q, K, V, MASK)
    with pytest.raises(error, match=rf"^reattention_step: argument '{name}': expected .*, got "):
        reattention_step(**{"q": Q, "k": K, "v": V, "mask": MASK, "state": state, **change})
    assert state.steps == 0


# --- schedule ---------------------------------------------------------------------------------------------------------


def scheduled(full_steps: int, refresh_every: int | None, steps: int) -> list[int]:
    """The full steps, as the paper has them."""
    return [
        s
        for s in range(steps)
        if s < full_steps or (refresh_every is not None and (s - full_steps) % refresh_every == 0)
    ]


def test_the_schedule_of_the_paper():
    assert scheduled(5, 5, 20) == [0, 1, 2, 3, 4, 5, 10, 15]
    attention = Reattention(masked()[0])
    assert [s for s in range(20) if attention.is_full(s)] == [0, 1, 2, 3, 4, 5, 10, 15]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("full_steps", "refresh"), [(1, None), (1, 1), (1, 2), (2, 3), (3, None), (5, 5), (4, 1)])
def test_each_step_is_what_is_due(full_steps: int, refresh: int | None, mode: str):
    mask, _ = masked()
    attention = Reattention(mask, full_steps=full_steps, refresh_every=refresh, ramp=0.1, mode=mode, clamp=0.9)
    due = scheduled(full_steps, refresh, 12)
    for _ in range(2):  # two prompts
        state = None
        for s in range(12):
            q, k, v = problem(dtype=torch.float64, seed=s)
            assert attention.is_full(s) == (s in due)
            out = attention(q, k, v)
            if s in due:
                full, state = reattention_capture(q, k, v, mask)
                torch.testing.assert_close(out, full)
            else:
                want = reattention_step(q, k, v, mask, state, ramp=0.1, mode=mode, clamp=0.9)
                assert torch.equal(out, want)
            assert attention.step == s + 1
        attention.reset()
        assert attention.step == 0
        assert attention.state is None


def test_only_the_last_full_step_captures():
    mask, _ = masked()
    attention = Reattention(mask, full_steps=3, refresh_every=4)
    captured = []
    for s in range(9):
        before = attention.state
        attention(*problem(seed=s))
        if attention.state is not before:
            captured.append(s)
    assert captured == [3, 7]
    once = Reattention(mask, full_steps=3, refresh_every=None)
    for s in range(9):
        once(*problem(seed=s))
    assert once.state.steps == 6


def test_no_refresh_goes_on_with_the_first_capture():
    mask, _ = masked()
    attention = Reattention(mask, full_steps=2, refresh_every=None, ramp=0.0)
    assert [s for s in range(1000) if attention.is_full(s)] == [0, 1]


def test_options_reach_the_steps():
    mask, _ = masked(maps=(2, 4))
    q, k, v = problem(heads=4, groups=2, dtype=torch.float64)
    attention = Reattention(mask, full_steps=2, refresh_every=None, scale=0.3, enable_gqa=True, mode="merge")
    want = torch.from_numpy(expected(q, k, v, torch.ones(70, 90, dtype=torch.bool), 0.3).out)
    for _ in range(4):
        torch.testing.assert_close(attention(q, k, v), want)


def test_a_module_without_parameters():
    attention = Reattention(masked()[0])
    assert list(attention.parameters()) == []
    assert attention.state_dict() == {}
    assert "full_steps=5, refresh_every=5" in repr(attention)
    assert "ramp=0.04" in repr(attention)
    attention(*problem())
    again = copy.deepcopy(attention)
    assert again.step == 1
    assert again.mask == attention.mask


def test_a_failed_step_does_not_count():
    attention = Reattention(masked()[0], full_steps=1, refresh_every=None)
    q, k, v = problem()
    for wrong in ((q[0], k, v), (q, k, v[:, :, :3]), (q[:, :, :5], k, v)):
        with pytest.raises(ArgumentError):
            attention(*wrong)
        assert attention.step == 0
    attention(q, k, v)
    with pytest.raises(ArgumentError, match="dtype of the capture"):
        attention(q.double(), k.double(), v.double())
    assert attention.step == 1
    assert attention.state.steps == 0
    attention.step, attention.state = 3, None
    with pytest.raises(ArgumentError, match=r"^Reattention: argument 'step': expected a captured state"):
        attention(q, k, v)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_every_kind_of_step_checks_its_arguments(step: int):
    """Full, captured and sparse steps."""
    mask, _ = masked()
    for wrong in (
        {"q": problem()[0].int()},
        {"k": problem()[1].double()},
        {"v": problem()[2][:, :, :5]},
        {"q": problem()[0][:, :, :9]},
    ):
        attention = Reattention(mask, full_steps=2, refresh_every=None)
        for _ in range(step):
            attention(*problem())
        with pytest.raises(ArgumentError, match=r"argument '(q|k|v|mask)': expected "):
            attention(**{**dict(zip("qkv", problem(), strict=True)), **wrong})


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"mask": None}, "mask", ArgumentTypeError),
        ({"mask": torch.ones(3, 3).bool()}, "mask", ArgumentTypeError),
        ({"full_steps": 0}, "full_steps", ArgumentError),
        ({"full_steps": 1.0}, "full_steps", ArgumentTypeError),
        ({"refresh_every": 0}, "refresh_every", ArgumentError),
        ({"refresh_every": "5"}, "refresh_every", ArgumentTypeError),
        ({"ramp": math.nan}, "ramp", ArgumentError),
        ({"ramp": None}, "ramp", ArgumentTypeError),
        ({"mode": "sparse"}, "mode", ArgumentError),
        ({"mode": None}, "mode", ArgumentTypeError),
        ({"clamp": 0}, "clamp", ArgumentError),
        ({"clamp": []}, "clamp", ArgumentTypeError),
        ({"scale": math.inf}, "scale", ArgumentError),
        ({"enable_gqa": 1}, "enable_gqa", ArgumentTypeError),
    ],
)
def test_errors_of_the_module(change: dict, name: str, error: type):
    with pytest.raises(error, match=rf"^Reattention: argument '{name}': expected .*, got "):
        Reattention(**{"mask": MASK, **change})


# --- in a model -------------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """The attributes of an attention module of diffusers that a processor uses."""

    def __init__(
        self, channels: int = 24, heads: int = 3, *, norm: bool = False, residual: bool = False, rescale: float = 1.0
    ):
        super().__init__()
        self.heads, self.residual_connection, self.rescale_output_factor = heads, residual, rescale
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False).double() for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels).double(), nn.Dropout(0.0)])
        self.group_norm = nn.GroupNorm(4, channels).double() if norm else None
        self.norm_q = nn.LayerNorm(channels // heads).double() if norm else None
        self.norm_k = nn.LayerNorm(channels // heads).double() if norm else None
        self.spatial_norm = None

    def dense(self, x: Tensor) -> Tensor:
        """Full attention, written out."""
        tokens = x.flatten(2).mT if x.dim() == 4 else x
        y = tokens if self.group_norm is None else self.group_norm(tokens.mT).mT
        q, k, v = (torch.stack(part(y).chunk(self.heads, -1), 1) for part in (self.to_q, self.to_k, self.to_v))
        if self.norm_q is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        out = torch.cat(scaled_dot_product_attention(q, k, v).unbind(1), -1)
        out = self.to_out[1](self.to_out[0](out))
        out = out.mT.reshape(x.shape) if x.dim() == 4 else out
        return (out + x if self.residual_connection else out) / self.rescale_output_factor


@pytest.mark.parametrize("picture", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"norm": True}, {"residual": True, "rescale": 2.0}, {"norm": True, "residual": True}]
)
def test_the_processor_is_the_module_with_full_attention(options: dict, picture: bool):
    """When nothing changes from step to step, sparse steps with ramp 0 are full ones."""
    torch.manual_seed(1)
    module = Projections(**options)
    mask = BlockMask.sliding_window(80, 80, 5, 5, block=16)
    processor = ReattentionProcessor(Reattention(mask, full_steps=2, refresh_every=3, ramp=0.0))
    x = make((2, 24, 8, 10) if picture else (2, 80, 24), torch.float64)
    with torch.no_grad():
        want = module.dense(x)
        for _ in range(7):
            out = processor(module, x)
            assert out.shape == x.shape
            torch.testing.assert_close(out, want)
        # Now it changes: the sparse step is not the full one any more, the next full one is.
        processor.attention.reset()
        for _ in range(3):
            processor(module, x)
        y = x.flip(0) * 1.5
        assert not torch.allclose(processor(module, y), module.dense(y))
        processor.attention.reset()
        torch.testing.assert_close(processor(module, y, temb=None, scale=1.0), module.dense(y))


def test_the_processor_uses_a_spatial_norm():
    class Shifted(nn.Module):
        def forward(self, x: Tensor, temb: Tensor) -> Tensor:
            return x + temb

    module = Projections()
    x, temb = make((2, 24, 8, 10), torch.float64), make((2, 24, 1, 1), torch.float64)
    want = module.dense(x + temb)
    module.spatial_norm = Shifted()
    processor = ReattentionProcessor(Reattention(BlockMask.full(80, 80)))
    torch.testing.assert_close(processor(module, x, None, None, temb), want)


def test_the_processor_refuses_what_it_cannot_do():
    module, x = Projections(), make((2, 80, 24), torch.float64)
    processor = ReattentionProcessor(Reattention(BlockMask.full(80, 80)))
    with pytest.raises(ArgumentError, match=r"^ReattentionProcessor: argument 'encoder_hidden_states'"):
        processor(module, x, x[:, :7])
    with pytest.raises(ArgumentError, match=r"^ReattentionProcessor: argument 'attention_mask'"):
        processor(module, x, attention_mask=torch.zeros(2, 80))
    with pytest.raises(ArgumentError, match=r"^Reattention.*: argument 'mask'"):
        processor(module, x[:, :79])
    assert processor.attention.step == 0
    with pytest.raises(ArgumentTypeError, match=r"^ReattentionProcessor: argument 'attention'"):
        ReattentionProcessor(BlockMask.full(80, 80))


@pytest.mark.parametrize("argument", ["image_rotary_emb", "something_else"])
def test_the_processor_refuses_what_it_would_leave_out(argument: str):
    processor = ReattentionProcessor(Reattention(BlockMask.full(12, 12)))
    with pytest.raises(ArgumentError, match=argument):
        processor(Projections(8, 2), torch.randn(1, 12, 8).double(), **{argument: torch.ones(3)})
    processor(Projections(8, 2), torch.randn(1, 12, 8).double(), **{argument: None})


def test_a_state_is_bound_to_its_scale():
    q, k, v = (torch.randn(1, 1, 12, 4) for _ in range(3))
    mask = BlockMask.sliding_window(12, 12, 2, 2)
    _, state = reattention_capture(q, k, v, mask)
    with pytest.raises(ArgumentError, match="scale"):
        reattention_step(q, k, v, mask, state, scale=3.0)
    _, state = reattention_capture(q, k, v, mask, scale=3.0)
    reattention_step(q, k, v, mask, state, scale=3.0)


def test_autocast_does_not_reach_the_torch_path():
    from shiftkern._library import _exactly
    from shiftkern._ops import attention as ops

    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    mask = BlockMask.sliding_window(40, 40, 3, 3)
    arguments = (q, k, v, mask.indptr, mask.indices, mask.inner, mask.patterns, *mask.block, 0.25)
    want = ops._block_sparse_attention_torch(*arguments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = _exactly(ops._block_sparse_attention_torch)(*arguments)[0]
    assert torch.equal(got, want)
