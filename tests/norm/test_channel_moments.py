import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern._ops import norm as ops
from shiftkern.norm import Moments, channel_moments, merge_moments

from helpers.oracles import moments_loop
from helpers.strategies import DTYPES, LAYOUTS, SHAPES, computing, lay_out, make, roundoff, tensors


def close(m, expected, x, u=None):
    """The documented bound (and the oracle's own u |mean|): mean within 64 u max|x - mean| + u |mean|, M2 100 u."""
    count, mean, m2 = expected
    u = roundoff(computing(x.dtype)) if u is None else u
    assert torch.equal(m.count, count)
    assert m.mean.dtype == m.m2.dtype == m.count.dtype == torch.float64
    spread = (m2 / count.clamp(min=1)).sqrt()
    farthest = (x.double().abs().max() + mean.abs().max()) if x.numel() else torch.tensor(0.0)
    assert bool(((m.mean - mean).abs() <= 64 * u * torch.minimum(farthest, 40 * spread) + 2 * u * mean.abs()).all())
    assert bool(((m.m2 - m2).abs() <= 100 * u * m2 + 1e-300).all())


def test_example():
    m = channel_moments(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
    assert (m.count.item(), m.mean.tolist(), m.m2.tolist()) == (2.0, [2.0, 10.0], [2.0, 0.0])
    assert m.var().tolist() == [1.0, 0.0]
    assert m.var(unbiased=True).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_loop(shape, dtype, layout):
    x = lay_out(make(shape, dtype), layout)
    close(channel_moments(x), moments_loop(x), x)
    close(channel_moments(x, per_instance=True), moments_loop(x, per_instance=True), x)


@given(tensors(max_dim=4), st.booleans(), st.integers(0, 3), st.floats(0, 1))
def test_equals_a_loop_for_any_mask_and_dim(x, per_instance, dim, share):
    dim %= x.dim()
    per_instance = per_instance and dim > 0
    positions = x.shape[:dim] + x.shape[dim + 1 :]
    mask = torch.rand(positions, generator=torch.Generator().manual_seed(3)) < share
    close(
        channel_moments(x, dim=dim, mask=mask, per_instance=per_instance),
        moments_loop(x, dim, mask, per_instance),
        x,
    )
    close(channel_moments(x, dim=dim - x.dim()), moments_loop(x, dim), x)


@given(tensors(empty=False), st.data())
@example(make((3, 2, 2)), None)
def test_streaming_any_split_equals_pooled(x, data):
    cut = 1 if data is None else data.draw(st.integers(0, x.shape[0]))
    merged = merge_moments(channel_moments(x[:cut]), channel_moments(x[cut:]))
    whole = channel_moments(x)
    scale = whole.mean.abs().max() + whole.var().sqrt().max()
    u = roundoff(computing(x.dtype))
    assert torch.equal(merged.count, whole.count)
    assert bool(((merged.mean - whole.mean).abs() <= 200 * u * scale).all())
    torch.testing.assert_close(merged.m2, whole.m2, rtol=400 * u, atol=float(400 * u * whole.m2.max()))


@given(tensors(empty=False))
def test_shift_moves_the_mean_and_keeps_m2(x):
    x = x.double()
    a, b = channel_moments(x), channel_moments(x + 2.0)
    torch.testing.assert_close(b.mean, a.mean + 2.0)
    torch.testing.assert_close(b.m2, a.m2, rtol=1e-9, atol=1e-9)


@given(tensors(empty=False), st.sampled_from([-4.0, 0.5, 1024.0]))
def test_scaling_by_a_power_of_two_scales_exactly(x, factor):
    x = x.double()
    a, b = channel_moments(x), channel_moments(x * factor)
    assert torch.equal(b.mean, a.mean * factor)
    assert torch.equal(b.m2, a.m2 * factor**2)


@given(tensors(empty=False))
def test_order_of_instances_does_not_matter(x):
    a, b = channel_moments(x.double()), channel_moments(x.double().flip(0))
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.m2, b.m2, rtol=1e-11, atol=1e-11)


@given(tensors(empty=False))
def test_instances_merge_to_the_batch(x):
    each = channel_moments(x.double(), per_instance=True)
    total = None
    for n in range(x.shape[0]):
        part = Moments(each.count[n, 0], each.mean[n], each.m2[n])
        total = part if total is None else merge_moments(total, part)
    whole = channel_moments(x.double())
    torch.testing.assert_close(total.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.m2, whole.m2, rtol=1e-11, atol=1e-11)
    assert torch.equal(total.count, whole.count)


@given(tensors(empty=False))
def test_a_full_mask_changes_nothing_and_an_empty_one_gives_the_identity(x):
    positions = (x.shape[0], *x.shape[2:])
    full = channel_moments(x, mask=torch.ones(positions, dtype=torch.bool))
    plain = channel_moments(x)
    u = roundoff(computing(x.dtype))
    torch.testing.assert_close(full.mean, plain.mean, rtol=100 * u, atol=float(100 * u * x.double().abs().max()))
    torch.testing.assert_close(full.m2, plain.m2, rtol=200 * u, atol=1e-300)
    nothing = channel_moments(x, mask=torch.zeros(positions, dtype=torch.bool))
    assert nothing.count.item() == 0
    assert not nothing.mean.any()
    assert not nothing.m2.any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_instance", [False, True])
def test_what_is_masked_out_never_leaks(layout, dtype, per_instance):
    x = make((4, 5, 6, 7), dtype)
    mask = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.6
    for poison in (float("nan"), float("inf"), -float("inf")):
        dirty = torch.where(mask.unsqueeze(1), x, torch.tensor(poison, dtype=dtype))
        a = channel_moments(lay_out(x, layout), mask=mask, per_instance=per_instance)
        leaf = lay_out(dirty, layout).requires_grad_()
        b = channel_moments(leaf, mask=mask, per_instance=per_instance)
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.m2, b.m2)
        (b.mean.sum() + b.m2.sum()).backward()
        assert leaf.grad.isfinite().all()
        assert not leaf.grad[~mask.unsqueeze(1).expand_as(leaf)].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_show_in_their_channel_only(layout, dtype, value):
    for shape in ((4, 5, 6, 7), (40, 70), (2, 3, 9000)):
        x = make(shape, dtype)
        clean = channel_moments(lay_out(x, layout))
        x[(1, 2) + (0,) * (len(shape) - 2)] = value
        m = channel_moments(lay_out(x, layout))
        assert not m.mean[2].isfinite()
        assert not m.m2[2].isfinite()
        others = torch.arange(shape[1]) != 2
        assert torch.equal(m.mean[others], clean.mean[others])
        assert torch.equal(m.m2[others], clean.m2[others])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 5, 33), (300, 70), (3, 2, 20000)])
def test_mean_of_a_million_times_the_spread(shape, layout):
    x = lay_out((make(shape, torch.float64, mean=0) + 1e6).float(), layout)
    m = channel_moments(x)
    dims = [d for d in range(x.dim()) if d != 1]
    reference = x.double()
    torch.testing.assert_close(m.mean, reference.mean(dims), rtol=1e-11, atol=0)
    torch.testing.assert_close(m.var(), reference.var(dims, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e18, 1e-18, 1e37, 1e-37])
@pytest.mark.parametrize("shape", [(64, 5, 33), (300, 70), (3, 2, 20000)])
def test_extreme_scales(shape, scale, layout):
    x = lay_out((make(shape, torch.float64, mean=0.25) * scale).float(), layout)
    m = channel_moments(x)
    dims = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(m.mean, x.double().mean(dims), rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(m.var(), x.double().var(dims, correction=0), rtol=1e-5, atol=0)


def test_float16_does_not_overflow():
    x = torch.full((3, 2, 5000), 60000.0, dtype=torch.float16)
    x[:, :, ::2] = -60000.0
    m = channel_moments(x)
    assert m.mean.abs().max() < 1e-9
    expected = torch.full((2,), float(x.double().var(correction=0)), dtype=torch.float64)
    torch.testing.assert_close(m.var(), expected, rtol=100 * roundoff(torch.float32), atol=0)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 65535), (1, 2, 65536), (1, 2, 65537), (2, 1, 131073),
        (5, 3, 2047), (5, 3, 2048), (5, 3, 2049), (3, 2, 4095), (3, 2, 4096), (3, 2, 4097),
        (31, 255), (32, 256), (33, 257), (65, 63), (1025, 64), (70000, 3), (9, 7000), (1000, 1), (4, 3, 1023),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_block_boundaries(shape, dtype):
    x = make(shape, dtype)
    mask = torch.rand(shape[:1] + shape[2:], generator=torch.Generator().manual_seed(1)) < 0.5
    for layout in ("contiguous", "channels_last"):
        for per_instance in (False, True) if shape[0] < 1000 else (False,):
            for kept in (None, mask):
                m = channel_moments(lay_out(x, layout), mask=kept, per_instance=per_instance)
                twin = Moments(*ops._moments_torch(x.double(), kept, 1, per_instance))
                close(m, (twin.count, twin.mean, twin.m2), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 6, 10007), (3, 300000), (40000, 13), (16, 130, 12, 15)])
def test_same_bits_at_any_number_of_threads(shape, dtype, layout):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    mask = torch.rand(shape[:1] + shape[2:]) < 0.5
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        results.append([
            channel_moments(x), channel_moments(x, mask=mask),
            channel_moments(x, per_instance=True), channel_moments(x, mask=mask, per_instance=True),
        ])  # fmt: skip
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.count, b.count)
            assert torch.equal(a.mean, b.mean)
            assert torch.equal(a.m2, b.m2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("per_instance", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient(layout, per_instance, masked):
    x = lay_out(make((3, 2, 4, 3), torch.float64), layout).requires_grad_()
    mask = torch.rand(3, 4, 3) < 0.5 if masked else None
    if masked:
        mask[0, 0, 0] = True

    def function(x):
        m = channel_moments(x, mask=mask, per_instance=per_instance)
        return m.mean, m.m2, m.var()

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradcheck(lambda x: channel_moments(x, dim=-1, per_instance=per_instance).m2, x)


def test_gradient_of_one_output_only():
    x = make((3, 2, 4), torch.float64).requires_grad_()
    for pick in ("mean", "m2"):
        (ours,) = torch.autograd.grad(getattr(channel_moments(x), pick).sum(), x)
        reference = x.mean((0, 2)) if pick == "mean" else x.var((0, 2), correction=0) * 12
        (theirs,) = torch.autograd.grad(reference.sum(), x)
        torch.testing.assert_close(ours, theirs)
    assert not channel_moments(x).count.requires_grad


def test_no_gradient_is_kept_without_need():
    x = make((3, 2)).requires_grad_()
    with torch.no_grad():
        assert not channel_moments(x).mean.requires_grad
    with torch.inference_mode():
        assert channel_moments(x).mean.is_inference()


def test_input_is_not_changed():
    x = make((3, 2, 5))
    before, version = x.clone(), x._version
    channel_moments(x)
    assert torch.equal(x, before)
    assert x._version == version


def test_negative_and_conjugated_views():
    x = torch.randn(4, 3, 2, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(channel_moments(x).mean, x.mean((0, 2)).double())


X = torch.zeros(2, 3, 4)
ERRORS = [
    (lambda: channel_moments([1.0]), ArgumentTypeError, "x"),
    (lambda: channel_moments(X.numpy()), ArgumentTypeError, "x"),
    (lambda: channel_moments(X.int()), ArgumentTypeError, "x"),
    (lambda: channel_moments(X.to(torch.complex64)), ArgumentTypeError, "x"),
    (lambda: channel_moments(X.to_sparse()), ArgumentTypeError, "x"),
    (lambda: channel_moments(torch.tensor(1.0)), ArgumentError, "x"),
    (lambda: channel_moments(X, dim=3), ArgumentError, "dim"),
    (lambda: channel_moments(X, dim=-4), ArgumentError, "dim"),
    (lambda: channel_moments(X, dim=2**70), ArgumentError, "dim"),
    (lambda: channel_moments(X, dim=1.0), ArgumentTypeError, "dim"),
    (lambda: channel_moments(X, dim=True), ArgumentTypeError, "dim"),
    (lambda: channel_moments(X, mask=torch.ones(2, 3, dtype=torch.bool)), ArgumentError, "mask"),
    (lambda: channel_moments(X, mask=torch.ones(2, 4)), ArgumentTypeError, "mask"),
    (lambda: channel_moments(X, mask=[True]), ArgumentTypeError, "mask"),
    (lambda: channel_moments(X, mask=torch.ones(2, 4, dtype=torch.bool, device="meta")), ArgumentError, "mask"),
    (lambda: channel_moments(X, per_instance=1), ArgumentTypeError, "per_instance"),
    (lambda: channel_moments(X, dim=0, per_instance=True), ArgumentError, "per_instance"),
]


@pytest.mark.parametrize(("call", "error", "argument"), ERRORS)
def test_errors(call, error, argument):
    with pytest.raises(error, match=rf"^channel_moments: argument '{argument}': expected .*, got "):
        call()


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: channel_moments(X).var(unbiased=1), ArgumentTypeError, "unbiased"),
        (lambda: channel_moments(X[:1, :, :1]).var(unbiased=True), ArgumentError, "unbiased"),
        (lambda: channel_moments(X[:0]).var(unbiased=True), ArgumentError, "unbiased"),
    ],
)
def test_var_errors(call, error, argument):
    with pytest.raises(error, match=rf"^Moments\.var: argument '{argument}': "):
        call()


def test_variance_of_nothing_is_zero():
    assert channel_moments(X[:0]).var().tolist() == [0.0] * 3


class TestMerge:
    def test_example(self):
        merged = merge_moments(channel_moments(torch.tensor([[1.0]])), channel_moments(torch.tensor([[3.0]])))
        assert (merged.count.item(), merged.mean.item(), merged.m2.item()) == (2.0, 2.0, 2.0)

    @pytest.mark.parametrize("value", [1.5, -0.0, float("inf"), float("nan")])
    def test_nothing_is_the_identity_to_the_bit(self, value):
        x = make((4, 3))
        x[1, 1] = value
        x[:, 2] = value
        some, nothing = channel_moments(x), channel_moments(x[:0])
        for merged in (merge_moments(some, nothing), merge_moments(nothing, some)):
            for a, b in ((merged.count, some.count), (merged.mean, some.mean), (merged.m2, some.m2)):
                assert torch.equal(a.view(torch.int64), b.view(torch.int64))

    @given(tensors(empty=False, dtypes=(torch.float64,)))
    def test_commutes(self, x):
        a, b = channel_moments(x), channel_moments(x * 2 + 1)
        left, right = merge_moments(a, b), merge_moments(b, a)
        torch.testing.assert_close(left.mean, right.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(left.m2, right.m2, rtol=1e-13, atol=1e-13)

    @given(tensors(empty=False, dtypes=(torch.float64,)))
    def test_is_associative(self, x):
        a, b, c = channel_moments(x), channel_moments(x * 2 + 1), channel_moments(x - 3)
        left, right = merge_moments(merge_moments(a, b), c), merge_moments(a, merge_moments(b, c))
        torch.testing.assert_close(left.mean, right.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(left.m2, right.m2, rtol=1e-12, atol=1e-12)

    def test_a_stream_of_many_pieces_equals_numpy(self):
        x = make((1000, 4), mean=1000.0)
        total = channel_moments(x[:0])
        for piece in x.split(7):
            total = merge_moments(total, channel_moments(piece))
        reference = x.numpy().astype("float64")
        torch.testing.assert_close(total.mean, torch.from_numpy(reference.mean(0)), rtol=1e-9, atol=0)
        torch.testing.assert_close(total.var(), torch.from_numpy(reference.var(0)), rtol=1e-5, atol=0)

    def test_large_means_do_not_cancel(self):
        x = make((200, 3), torch.float64, mean=1e9)
        merged = merge_moments(channel_moments(x[:50]), channel_moments(x[50:]))
        torch.testing.assert_close(merged.var(), x.var(0, correction=0), rtol=1e-6, atol=0)

    def test_per_instance(self):
        x = make((3, 2, 8), torch.float64)
        merged = merge_moments(
            channel_moments(x[..., :3], per_instance=True), channel_moments(x[..., 3:], per_instance=True)
        )
        whole = channel_moments(x, per_instance=True)
        torch.testing.assert_close(merged.m2, whole.m2)
        assert torch.equal(merged.count, whole.count)

    def test_gradient(self):
        x = make((5, 3), torch.float64).requires_grad_()

        def function(x):
            m = merge_moments(channel_moments(x[:2]), channel_moments(x[2:]))
            return m.mean, m.m2

        assert torch.autograd.gradcheck(function, x)

    @pytest.mark.parametrize(
        ("a", "b", "error", "argument"),
        [
            (1, channel_moments(X), ArgumentTypeError, "a"),
            (channel_moments(X), None, ArgumentTypeError, "b"),
            (channel_moments(X), channel_moments(X[:, :2]), ArgumentError, "b"),
            (channel_moments(X), channel_moments(X, per_instance=True), ArgumentError, "b"),
            (channel_moments(X), channel_moments(X.to("meta")), ArgumentError, "b"),
        ],
    )
    def test_errors(self, a, b, error, argument):
        with pytest.raises(error, match=rf"^merge_moments: argument '{argument}': expected .*, got "):
            merge_moments(a, b)


class TestMoments:
    @pytest.mark.parametrize("count", [4, 4.0, torch.tensor(4), torch.tensor(4.0)])
    def test_a_plain_number_is_a_fine_count(self, count):
        m = Moments(count, torch.zeros(3), torch.ones(3))
        assert m.var().tolist() == [0.25] * 3
        assert merge_moments(m, m).count.item() == 8

    @pytest.mark.parametrize(
        ("fields", "error", "argument"),
        [
            ((1, 2, 3), ArgumentTypeError, "mean"),
            ((1, torch.zeros(3).long(), torch.zeros(3)), ArgumentTypeError, "mean"),
            ((1, torch.zeros(3), 3), ArgumentTypeError, "m2"),
            ((1, torch.zeros(3), torch.zeros(2)), ArgumentError, "m2"),
            ((1, torch.zeros(3), torch.zeros(3, device="meta")), ArgumentError, "m2"),
            (("many", torch.zeros(3), torch.zeros(3)), ArgumentTypeError, "count"),
            ((-1, torch.zeros(3), torch.zeros(3)), ArgumentError, "count"),
        ],
    )
    def test_errors(self, fields, error, argument):
        with pytest.raises(error, match=rf"^Moments: argument '{argument}': expected .*, got "):
            Moments(*fields)


def test_a_count_per_channel_merges():
    x = torch.randn(6, 3, dtype=torch.float64)
    whole, identity = channel_moments(x), Moments(torch.zeros(3), torch.zeros(3).double(), torch.zeros(3).double())
    for merged in (merge_moments(whole, identity), merge_moments(identity, whole)):
        assert torch.equal(merged.mean, whole.mean)
        assert torch.equal(merged.m2, whole.m2)
        assert torch.equal(merged.count, torch.full((3,), 6.0, dtype=torch.float64))
