import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.norm import AlphaBatchNorm, mixed_batch_norm, mixed_batch_norm_

from helpers import oracles
from helpers.strategies import DTYPES, LAYOUTS, SHAPES, affine, computing, lay_out, make, roundoff, tensors

WEIGHTS = (0.0, 0.25, 1.0)


def close(y, expected, x, *arguments, source_weight):
    """Few roundings of the computing type on the product and the sum, one of the storage type."""
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    u, stored = roundoff(computing(x.dtype)), roundoff(x.dtype)
    _, var, *rest = arguments
    weight = max((float(t.abs().max()) for t in rest[:1] if t is not None and t.numel()), default=1.0)
    bias = max((float(t.abs().max()) for t in rest[1:] if t is not None and t.numel()), default=0.0)
    if not x.numel():
        return
    # The bound of the mean, 3 u |mean|, is scaled like the data; it shows where a channel is almost constant.
    own_mean, own_var = oracles.pooled_statistics(x)
    scale = weight / (source_weight * var.double() + (1 - source_weight) * own_var + 1e-5).sqrt()
    terms = float(expected.abs().max()) + 2 * bias + weight + 0.03 * float((own_mean.abs() * scale).max())
    error = (y.double() - expected).abs()
    assert float((error - stored * expected.abs()).max()) <= 100 * u * terms + torch.finfo(x.dtype).smallest_normal


def test_example():
    x = torch.tensor([[0.0], [4.0]])
    y = mixed_batch_norm(x, torch.zeros(1), torch.ones(1), source_weight=0.5, eps=0.0)
    torch.testing.assert_close(y, (x - 1.0) / 2.5**0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape, dtype, layout):
    x = lay_out(make(shape, dtype), layout)
    arguments = affine(shape[1])
    for source_weight in WEIGHTS:
        y = mixed_batch_norm(x, *arguments, source_weight=source_weight)
        if x.numel():
            expected = oracles.mixed(x, *arguments, source_weight=source_weight)
            close(y, expected, x, *arguments, source_weight=source_weight)
        assert y.shape == x.shape
        if layout in ("contiguous", "channels_last"):
            assert y.numel() == 0 or y.stride() == x.stride()


@given(tensors(empty=False), st.floats(0, 1), st.booleans(), st.booleans(), st.booleans())
def test_equals_the_formula_for_any_options(x, source_weight, with_weight, with_bias, unbiased):
    mean, var, weight, bias = affine(x.shape[1], torch.float64)
    weight, bias = weight if with_weight else None, bias if with_bias else None
    unbiased = unbiased and x.numel() > x.shape[1]
    options = {"source_weight": source_weight, "eps": 1e-3, "unbiased": unbiased}
    y = mixed_batch_norm(x, mean, var, weight, bias, **options)
    expected = oracles.mixed(x, mean, var, weight, bias, **options)
    offset = x.double().abs().max() / 0.03  # a shift is subtracted before it is scaled
    largest = expected.abs().max()
    bound = 100 * roundoff(computing(x.dtype)) * (largest + offset + 6) + 2 * roundoff(x.dtype) * largest
    assert float((y - expected).abs().max()) <= float(bound)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source_weight", [0.0, 1.0])
def test_the_ends_are_torch_batch_norm(rank, dtype, source_weight):
    x = make((6, 3, 4, 5, 2)[:rank], dtype)
    mean, var, weight, bias = affine(3, dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = mixed_batch_norm(ours, mean, var, weight, bias, source_weight=source_weight)
    b = torch.nn.functional.batch_norm(
        theirs, mean.clone(), var.clone(), weight, bias, training=source_weight == 0.0, eps=1e-5
    )
    torch.testing.assert_close(a, b)
    gradient = torch.randn_like(x)
    a.backward(gradient)
    b.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad)


@given(tensors(empty=False, dtypes=(torch.float64,)))
def test_batch_statistics_give_mean_zero_and_variance_one(x):
    y = mixed_batch_norm(x, *affine(x.shape[1], torch.float64)[:2], source_weight=0.0, eps=0.0)
    dims = [d for d in range(x.dim()) if d != 1]
    varies = x.var(dims, correction=0) > 1e-12
    torch.testing.assert_close(y.mean(dims)[varies], torch.zeros(int(varies.sum())).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        y.var(dims, correction=0)[varies], torch.ones(int(varies.sum())).double(), atol=1e-9, rtol=0
    )


@given(tensors(empty=False, dtypes=(torch.float64,)), st.sampled_from([-8.0, 0.25, 64.0]))
def test_batch_statistics_forget_scale_and_offset(x, factor):
    arguments = affine(x.shape[1], torch.float64)[:2]
    dims = [d for d in range(x.dim()) if d != 1]
    varies = (x.var(dims, correction=0) > 1e-12).reshape(1, -1, *[1] * (x.dim() - 2))
    y = mixed_batch_norm(x, *arguments, source_weight=0.0, eps=0.0)
    z = mixed_batch_norm(x * factor + 3.0, *arguments, source_weight=0.0, eps=0.0) * (1 if factor > 0 else -1)
    torch.testing.assert_close(torch.where(varies, y, 0.0), torch.where(varies, z, 0.0), rtol=1e-8, atol=1e-8)


@given(tensors(empty=False, dtypes=(torch.float32,)))
def test_source_weight_one_treats_instances_apart(x):
    arguments = affine(x.shape[1])
    whole = mixed_batch_norm(x, *arguments, source_weight=1.0)
    each = torch.cat([mixed_batch_norm(row, *arguments, source_weight=1.0) for row in x.split(1)])
    assert torch.equal(whole, each)


@given(tensors(empty=False, dtypes=(torch.float64,)), st.floats(0, 1))
def test_affine_comes_last(x, source_weight):
    mean, var, weight, bias = affine(x.shape[1], torch.float64)
    plain = mixed_batch_norm(x, mean, var, source_weight=source_weight)
    full = mixed_batch_norm(x, mean, var, weight, bias, source_weight=source_weight)
    shape = (1, -1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(full, plain * weight.view(shape) + bias.view(shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6, 5, 7), (2, 64, 33, 9), (3, 5, 4, 3, 2)])
def test_channels_last_equals_contiguous(shape, dtype):
    x, arguments = make(shape, dtype), affine(shape[1])
    a = mixed_batch_norm(x, *arguments, source_weight=0.4)
    b = mixed_batch_norm(lay_out(x, "channels_last"), *arguments, source_weight=0.4)
    assert b.stride() == lay_out(x, "channels_last").stride()
    torch.testing.assert_close(a, b, rtol=2 * roundoff(dtype), atol=100 * roundoff(computing(dtype)))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d])
def test_torch_memory_formats_are_kept(memory_format):
    shape = (2, 3, 4, 5) if memory_format is torch.channels_last else (2, 3, 4, 5, 2)
    x = make(shape).to(memory_format=memory_format).requires_grad_()
    y = mixed_batch_norm(x, *affine(3), source_weight=0.4)
    assert y.is_contiguous(memory_format=memory_format)
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_of_a_million_times_the_spread(layout):
    x = lay_out((make((64, 5, 33), torch.float64, mean=0) + 1.5e6).float(), layout)
    mean, var, weight, bias = affine(5, torch.float64)
    mean = mean + 1.5e6
    for source_weight in WEIGHTS:
        y = mixed_batch_norm(x, mean, var, weight, bias, source_weight=source_weight)
        torch.testing.assert_close(
            y.double(), oracles.mixed(x, mean, var, weight, bias, source_weight=source_weight), rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e18, 1e-18])
def test_extreme_scales(scale, layout):
    x = lay_out((make((64, 5, 33), torch.float64) * scale).float(), layout)
    mean, var = (t.float() for t in (affine(5, torch.float64)[0] * scale, affine(5, torch.float64)[1] * scale**2))
    for source_weight in WEIGHTS:
        y = mixed_batch_norm(x, mean, var, source_weight=source_weight, eps=1e-44)
        expected = oracles.mixed(x, mean, var, source_weight=source_weight, eps=1e-44)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_non_finite_values_stay_in_their_channel(value, layout):
    x, arguments = make((4, 5, 6)), affine(5)
    clean = mixed_batch_norm(x, *arguments, source_weight=0.5)
    x[1, 2, 3] = value
    y = mixed_batch_norm(lay_out(x, layout), *arguments, source_weight=0.5)
    others = torch.arange(5) != 2
    torch.testing.assert_close(y[:, others], clean[:, others], rtol=1e-6, atol=1e-6)
    assert y[:, 2].isnan().any()


def test_the_ends_ignore_the_other_side_even_in_gradients():
    mean, var, weight, bias = affine(3)
    x = make((4, 3, 5))
    x[0, 1, 2] = float("nan")
    leaf = x.clone().requires_grad_()
    y = mixed_batch_norm(leaf, mean, var, weight, bias, source_weight=1.0)
    assert y.isnan().sum() == 1
    y.nansum().backward()
    assert leaf.grad.isfinite().all()
    bad = torch.full((3,), float("nan"))
    leaf = make((4, 3, 5)).requires_grad_()
    y = mixed_batch_norm(leaf, bad, bad, weight, bias, source_weight=0.0)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 6, 10007), (40000, 13), (3, 70, 40, 41)])
def test_same_bits_at_any_number_of_threads(shape, dtype, layout):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    gradient, arguments, results = torch.randn(shape).to(dtype), affine(shape[1]), []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        leaf, weight = x.detach().requires_grad_(), arguments[2].clone().requires_grad_()
        y = mixed_batch_norm(leaf, *arguments[:2], weight, arguments[3], source_weight=0.3)
        results.append((y.detach(), *torch.autograd.grad(y, (leaf, weight), gradient)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("affine_parts", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("source_weight", WEIGHTS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_gradient(layout, affine_parts, source_weight, unbiased):
    x = lay_out(make((3, 2, 4, 2), torch.float64), layout).detach().clone(memory_format=torch.preserve_format)
    mean, var, weight, bias = affine(2, torch.float64)
    inputs = [x, mean, var]
    inputs += [weight] if affine_parts in ("weight", "both") else [None]
    inputs += [bias] if affine_parts in ("bias", "both") else [None]
    inputs = [None if t is None else t.requires_grad_() for t in inputs]

    def function(x, mean, var, weight, bias):
        return mixed_batch_norm(x, mean, var, weight, bias, source_weight=source_weight, eps=1e-2, unbiased=unbiased)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("of_x", "of_gradient"), [("channels_last", "contiguous"), ("contiguous", "channels_last")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_in_another_layout_than_x(of_x, of_gradient, dtype):
    x = make((4, 3, 5, 6), dtype)
    gradient = make((4, 3, 5, 6), dtype, seed=5)
    arguments = affine(3, torch.float64)
    results = []
    for a, b in (("contiguous", "contiguous"), (of_x, of_gradient)):
        leaf = lay_out(x, a).detach().requires_grad_()
        weight = arguments[2].clone().requires_grad_()
        y = mixed_batch_norm(leaf, *arguments[:2], weight, arguments[3], source_weight=0.3)
        y.backward(lay_out(gradient, b))
        results.append((leaf.grad, weight.grad))
    u = roundoff(computing(dtype))
    (ours, ours_weight), (theirs, theirs_weight) = results
    torch.testing.assert_close(ours, theirs, rtol=2 * roundoff(dtype), atol=100 * u)
    # A sum: 100 u of the sum of magnitudes.
    magnitude = float(gradient.double().abs().sum((0, 2, 3)).max())
    torch.testing.assert_close(ours_weight, theirs_weight, rtol=0, atol=100 * u * magnitude)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_half_types_is_the_float64_one_rounded(dtype):
    x, gradient, arguments = make((8, 3, 50), dtype), make((8, 3, 50), dtype, 3), affine(3)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    mixed_batch_norm(leaf, *arguments, source_weight=0.3).backward(gradient)
    oracles.mixed(wide, *arguments, source_weight=0.3).backward(gradient.double())
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=2 * roundoff(dtype), atol=1e-5)


def test_one_dimensional_statistics_in_any_memory():
    x = make((6, 4), torch.float32)
    mean, var, weight, bias = affine(4)
    strided = [torch.stack([t, t * 0 - 9], 1)[:, 0] for t in (mean, var, weight, bias)]
    assert not strided[0].is_contiguous()
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        parts = [t.to(kind) for t in strided]
        a = mixed_batch_norm(x, *parts, source_weight=0.4)
        b = mixed_batch_norm(x, *[t.contiguous() for t in parts], source_weight=0.4)
        assert torch.equal(a, b)
        close(a, oracles.mixed(x, *parts, source_weight=0.4), x, *parts, source_weight=0.4)


def test_source_statistics_may_change_before_the_backward_pass():
    for dtype in (torch.float32, torch.float64):
        for source_weight in WEIGHTS:
            mean, var, weight, bias = affine(3, dtype)
            x = make((4, 3, 5), dtype).requires_grad_()
            expected = torch.autograd.grad(
                mixed_batch_norm(x, mean, var, weight, bias, source_weight=source_weight).square().sum(), x
            )[0]
            y = mixed_batch_norm(x, mean, var, weight, bias, source_weight=source_weight)
            mean.add_(1.0)
            var.mul_(3.0)
            assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_a_write_to_x_before_the_backward_pass_is_noticed():
    x = make((4, 3, 5)).requires_grad_()
    z = x * 1.0
    y = mixed_batch_norm(z, *affine(3), source_weight=0.5)
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class TestOut:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "sliced"])
    @pytest.mark.parametrize("out_layout", ["contiguous", "channels_last", "sliced"])
    def test_equals_the_fresh_result(self, dtype, x_layout, out_layout):
        x = lay_out(make((4, 3, 5, 6), dtype), x_layout)
        out = lay_out(torch.full((4, 3, 5, 6), float("nan"), dtype=dtype), out_layout)
        result = mixed_batch_norm(x, *affine(3), source_weight=0.4, out=out)
        assert result is out
        assert torch.equal(out, mixed_batch_norm(x, *affine(3), source_weight=0.4))

    def test_may_be_x_or_overlap_it(self):
        expected = mixed_batch_norm(make((4, 3, 5)), *affine(3), source_weight=0.4)
        x = make((4, 3, 5))
        assert torch.equal(mixed_batch_norm(x, *affine(3), source_weight=0.4, out=x), expected)
        memory = torch.zeros(5, 3, 5)
        memory[:4] = make((4, 3, 5))
        mixed_batch_norm(memory[:4], *affine(3), source_weight=0.4, out=memory[1:])
        assert torch.equal(memory[1:], expected)

    def test_autograd_notices_the_write(self):
        leaf, out = torch.ones(4, 3, requires_grad=True), torch.ones(4, 3)
        product = leaf * out
        mixed_batch_norm(make((4, 3)), *affine(3), source_weight=0.4, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    @pytest.mark.parametrize(
        ("out", "error"),
        [
            (1, ArgumentTypeError),
            (torch.zeros(4, 2), ArgumentError),
            (torch.zeros(4, 3).double(), ArgumentTypeError),
            (torch.zeros(4, 3, device="meta"), ArgumentError),
            (torch.zeros(1, 3).expand(4, 3), ArgumentError),
            (torch.zeros(4, 3, requires_grad=True), ArgumentError),
        ],
    )
    def test_errors(self, out, error):
        with pytest.raises(error, match=r"^mixed_batch_norm: argument 'out': "):
            mixed_batch_norm(make((4, 3)), *affine(3), source_weight=0.4, out=out)

    def test_is_refused_where_a_gradient_is_needed(self):
        x = make((4, 3)).requires_grad_()
        with pytest.raises(ArgumentError, match=r"^mixed_batch_norm: argument 'out': "):
            mixed_batch_norm(x, *affine(3), source_weight=0.4, out=torch.zeros(4, 3))
        with torch.no_grad():
            mixed_batch_norm(x, *affine(3), source_weight=0.4, out=torch.zeros(4, 3))


class TestInPlace:
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "offset"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_equals_the_pure_form(self, shape, dtype, layout):
        x = lay_out(make(shape, dtype), layout)
        expected = mixed_batch_norm(x, *affine(shape[1]), source_weight=0.3)
        stride, version = x.stride(), x._version
        assert mixed_batch_norm_(x, *affine(shape[1]), source_weight=0.3) is x
        assert torch.equal(x, expected)
        assert x.stride() == stride
        assert x._version > version

    def test_touches_nothing_beside_a_slice(self):
        memory = torch.full((4, 3, 11), 7.0)
        mixed_batch_norm_(memory[..., 1::2], *affine(3), source_weight=0.3)
        assert bool((memory[..., ::2] == 7.0).all())

    def test_a_leaf_is_refused(self):
        x = make((4, 3)).requires_grad_()
        with pytest.raises(ArgumentError, match=r"^mixed_batch_norm_: argument 'x': .* leaf"):
            mixed_batch_norm_(x, *affine(3), source_weight=0.3)
        with torch.no_grad():
            assert mixed_batch_norm_(x, *affine(3), source_weight=0.3) is x

    @pytest.mark.parametrize("take", [lambda x: x[:2], lambda x: x.view(2, 6)[:, :3], lambda x: (x * 1).chunk(2)[0]])
    def test_views_that_autograd_does_not_let_change_are_refused(self, take):
        x = make((4, 3)).requires_grad_()
        with pytest.raises(ArgumentError, match=r"^mixed_batch_norm_: argument 'x': "):
            mixed_batch_norm_(take(x), *affine(3), source_weight=0.3)

    def test_an_expanded_tensor_is_refused(self):
        with pytest.raises(ArgumentError, match=r"^mixed_batch_norm_: argument 'x': .*expanded"):
            mixed_batch_norm_(torch.zeros(1, 3).expand(4, 3), *affine(3), source_weight=0.3)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
    def test_gradient_of_a_non_leaf(self, layout):
        x = lay_out(make((3, 2, 4, 2), torch.float64), layout).requires_grad_()
        parts = [t.requires_grad_() for t in affine(2, torch.float64)]

        def function(x, *parts):
            z = x * 2.0
            return mixed_batch_norm_(z, *parts, source_weight=0.3).square(), z

        assert torch.autograd.gradcheck(function, (x, *parts))

    def test_gradient_through_a_view(self):
        x = make((4, 3), torch.float64).requires_grad_()

        def function(x):
            z = x * 2.0
            mixed_batch_norm_(z[1:], *affine(3, torch.float64), source_weight=0.3)
            return z.square()

        assert torch.autograd.gradcheck(function, x)

    def test_gradient_of_weight_alone(self):
        x = make((4, 3), torch.float64)
        weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
        before = x.clone()
        y = mixed_batch_norm_(x, *affine(3, torch.float64)[:2], weight, source_weight=0.3)
        assert y is x
        y.sum().backward()
        expected = oracles.mixed(before, *affine(3, torch.float64)[:2], source_weight=0.3).sum(0)
        torch.testing.assert_close(weight.grad, expected)

    def test_autograd_notices_the_write(self):
        leaf, x = torch.ones(4, 3, requires_grad=True), torch.ones(4, 3)
        product = leaf * x
        mixed_batch_norm_(x, *affine(3), source_weight=0.3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()

    def test_inference_mode(self):
        expected = mixed_batch_norm(make((4, 3)), *affine(3), source_weight=0.3)
        outside = make((4, 3))
        with torch.inference_mode():
            inside = make((4, 3))
            assert torch.equal(mixed_batch_norm_(inside, *affine(3), source_weight=0.3), expected)
            assert torch.equal(mixed_batch_norm_(outside, *affine(3), source_weight=0.3), expected)
        weight = torch.ones(3, requires_grad=True)
        with pytest.raises(ArgumentError, match=r"^mixed_batch_norm_: argument 'x': "):
            mixed_batch_norm_(inside, *affine(3)[:2], weight, source_weight=0.3)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits_at_any_number_of_threads(self, dtype):
        for layout in ("contiguous", "channels_last"):
            results = []
            for threads in (1, 2, 3):
                shiftkern.set_num_threads(threads)
                x = lay_out(make((8, 6, 10007), dtype), layout)
                results.append(mixed_batch_norm_(x, *affine(6), source_weight=0.3))
            assert all(torch.equal(results[0], other) for other in results[1:])


X, ZERO, ONE = torch.zeros(2, 3, 4), torch.zeros(3), torch.ones(3)
GOOD = {"x": X, "running_mean": ZERO, "running_var": ONE, "source_weight": 0.5}
ERRORS = [
    ("x", [[1.0]], ArgumentTypeError),
    ("x", X.numpy(), ArgumentTypeError),
    ("x", X.int(), ArgumentTypeError),
    ("x", X.to_sparse(), ArgumentTypeError),
    ("x", torch.zeros(3), ArgumentError),
    ("x", torch.zeros(()), ArgumentError),
    ("running_mean", None, ArgumentTypeError),
    ("running_mean", torch.zeros(2), ArgumentError),
    ("running_mean", torch.zeros(1, 3), ArgumentError),
    ("running_mean", ZERO.to("meta"), ArgumentError),
    ("running_var", torch.zeros(4), ArgumentError),
    ("running_var", ONE.long(), ArgumentTypeError),
    ("weight", torch.zeros(2), ArgumentError),
    ("weight", 1.0, ArgumentTypeError),
    ("bias", torch.zeros(2), ArgumentError),
    ("bias", ONE.bool(), ArgumentTypeError),
    ("source_weight", 1.5, ArgumentError),
    ("source_weight", -0.1, ArgumentError),
    ("source_weight", float("nan"), ArgumentError),
    ("source_weight", "0.5", ArgumentTypeError),
    ("source_weight", None, ArgumentTypeError),
    ("source_weight", True, ArgumentTypeError),
    ("source_weight", 1j, ArgumentTypeError),
    ("source_weight", torch.tensor([0.5, 0.5]), ArgumentTypeError),
    ("source_weight", torch.empty((), device="meta"), ArgumentTypeError),
    ("eps", -1e-5, ArgumentError),
    ("eps", float("inf"), ArgumentError),
    ("eps", [1e-5], ArgumentTypeError),
    ("unbiased", 1, ArgumentTypeError),
]


@pytest.mark.parametrize(("argument", "value", "error"), ERRORS)
@pytest.mark.parametrize("function", [mixed_batch_norm, mixed_batch_norm_], ids=lambda f: f.__name__)
def test_errors(function, argument, value, error):
    with pytest.raises(error, match=rf"^{function.__name__}: argument '{argument}': expected .*, got "):
        function(**{**GOOD, argument: value})


@pytest.mark.parametrize("function", [mixed_batch_norm, mixed_batch_norm_], ids=lambda f: f.__name__)
def test_unbiased_needs_two_elements(function):
    with pytest.raises(ArgumentError, match=rf"^{function.__name__}: argument 'unbiased': "):
        function(torch.zeros(1, 3), ZERO, ONE, source_weight=0.5, unbiased=True)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)], layout=torch.jagged)
    with pytest.raises(ArgumentTypeError, match=r"^mixed_batch_norm: argument 'x': "):
        mixed_batch_norm(nested, ZERO, ONE, source_weight=0.5)


def test_one_element_per_channel():
    y = mixed_batch_norm(torch.full((1, 3), 5.0), ZERO, ONE, source_weight=0.0)
    assert y.tolist() == [[0.0] * 3]


class TestAlphaBatchNorm:
    @pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (5, 3, 2, 2, 3)])
    def test_is_the_function_in_train_and_eval_mode(self, shape):
        layer = AlphaBatchNorm(3, source_weight=0.7)
        layer.running_mean.copy_(affine(3)[0])
        layer.running_var.copy_(affine(3)[1])
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        x = make(shape)
        expected = oracles.mixed(x, *affine(3)[:2], source_weight=0.7)
        for mode in (True, False):
            layer.train(mode)
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())

    def test_the_direction_is_that_of_the_source(self):
        x = make((5, 3), mean=30.0)
        assert AlphaBatchNorm(3, source_weight=1.0)(x).mean() > 20
        assert AlphaBatchNorm(3, source_weight=0.0)(x).mean().abs() < 1e-5

    def test_trains(self):
        layer = AlphaBatchNorm(3)
        layer(make((5, 3))).square().sum().backward()
        assert layer.weight.grad.abs().sum() > 0
        assert layer.bias.grad.abs().sum() > 0

    def test_unbiased(self):
        x = make((5, 3))
        y = AlphaBatchNorm(3, source_weight=0.2, unbiased=True)(x)
        expected = oracles.mixed(x, ZERO, ONE, source_weight=0.2, unbiased=True)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)

    def test_without_affine(self):
        assert not list(AlphaBatchNorm(3, affine=False).parameters())

    @pytest.mark.parametrize(
        ("options", "error", "argument"),
        [
            ({"num_features": 0}, ArgumentError, "num_features"),
            ({"num_features": "3"}, ArgumentTypeError, "num_features"),
            ({"source_weight": 2.0}, ArgumentError, "source_weight"),
            ({"source_weight": float("nan")}, ArgumentError, "source_weight"),
            ({"unbiased": 1}, ArgumentTypeError, "unbiased"),
            ({"eps": -1.0}, ArgumentError, "eps"),
            ({"momentum": 2.0}, ArgumentError, "momentum"),
            ({"momentum": None}, ArgumentTypeError, "momentum"),
            ({"affine": "yes"}, ArgumentTypeError, "affine"),
            ({"dtype": torch.int32}, ArgumentTypeError, "dtype"),
            ({"dtype": "float"}, ArgumentTypeError, "dtype"),
            ({"device": "nowhere"}, ArgumentError, "device"),
        ],
    )
    def test_errors(self, options, error, argument):
        with pytest.raises(error, match=rf"^AlphaBatchNorm: argument '{argument}': "):
            AlphaBatchNorm(**{"num_features": 3, **options})

    def test_a_wrong_number_of_channels_is_an_error(self):
        with pytest.raises(ArgumentError, match="running_mean"):
            AlphaBatchNorm(3)(torch.zeros(2, 4))
