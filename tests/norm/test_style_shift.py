import pytest
import torch
from hypothesis import given

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.norm import StyleShift, channel_moments, style_shift

from helpers import oracles
from helpers.strategies import DTYPES, LAYOUTS, SHAPES, computing, lay_out, make, roundoff, tensors


def styles(channels, count=3, dtype=torch.float32, mean=1.0):
    return make((count, channels), dtype, 21, mean=mean), make((count, channels), dtype, 22).square() + 0.3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_loop_over_instances(shape, dtype, layout):
    x = lay_out(make(shape, dtype), layout)
    for threshold in (None, 1.5 * shape[1] ** 0.5):
        y = style_shift(x, *styles(shape[1]), threshold=threshold)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        if not x.numel():
            continue
        expected = oracles.style(x, *styles(shape[1]), threshold=threshold)
        scale = float(expected.abs().max()) + 6
        torch.testing.assert_close(
            y.double(), expected, rtol=2 * roundoff(dtype), atol=200 * roundoff(computing(dtype)) * scale
        )
        if layout in ("contiguous", "channels_last"):
            assert y.stride() == x.stride()


@given(tensors(empty=False, dtypes=(torch.float64,)))
def test_a_shifted_instance_has_the_style(x):
    mean, std = styles(x.shape[1], 1, torch.float64)
    y = style_shift(x, mean, std, eps=1e-12)
    before = channel_moments(x, per_instance=True)
    after = channel_moments(y, per_instance=True)
    torch.testing.assert_close(after.mean, mean.expand_as(after.mean), rtol=1e-6, atol=1e-6)
    varies = before.var() > 1e-6
    torch.testing.assert_close(after.var()[varies], std.square().expand_as(after.mean)[varies], rtol=1e-4, atol=1e-6)


@given(tensors(empty=False, dtypes=(torch.float64,)))
def test_shifting_twice_changes_nothing(x):
    single = styles(x.shape[1], 1, torch.float64)
    once = style_shift(x, *single, eps=0.0) if bool((oracles.instance_statistics(x)[1] > 1e-9).all()) else None
    if once is not None:
        torch.testing.assert_close(style_shift(once, *single, eps=0.0), once, rtol=1e-6, atol=1e-6)


@given(tensors(empty=False))
def test_a_wide_threshold_leaves_every_bit(x):
    y = style_shift(x, *styles(x.shape[1]), threshold=1e30)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(y.contiguous().view(kind), x.contiguous().view(kind))


def test_a_negative_zero_is_kept():
    x = torch.tensor([[[-0.0, 0.0, 1.0]]])
    for layout in ("contiguous", "channels_last"):
        for dtype in DTYPES:
            y = style_shift(lay_out(x.to(dtype), layout), torch.zeros(1), torch.ones(1), threshold=1e9)
            assert torch.signbit(y).tolist() == [[[True, False, False]]]


@given(tensors(empty=False, dtypes=(torch.float64,)))
def test_order_of_styles_does_not_matter(x):
    mean, std = styles(x.shape[1], 4, torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(style_shift(x, mean, std), style_shift(x, mean[order], std[order]))


def test_the_threshold_is_strict():
    x = torch.tensor([[[9.0, 11.0]]])  # mean 10, std 1: distance 10 from mean 0, std 1
    mean, std = torch.zeros(1, 1), torch.ones(1, 1)
    assert style_shift(x, mean, std, threshold=10.0, eps=0.0).tolist() == x.tolist()
    assert style_shift(x, mean, std, threshold=9.999, eps=0.0).tolist() == [[[-1.0, 1.0]]]


def test_the_nearest_style_in_mean_and_std_is_taken():
    x = torch.tensor([[[9.0, 11.0]]])
    mean, std = torch.tensor([[10.0], [11.0]]), torch.tensor([[5.0], [1.0]])
    torch.testing.assert_close(style_shift(x, mean, std, eps=0.0), torch.tensor([[[10.0, 12.0]]]))


def test_ties_go_to_the_first_style():
    x = torch.tensor([[[9.0, 11.0]]])
    y = style_shift(x, torch.tensor([[0.0], [20.0]]), torch.ones(2, 1), eps=0.0)
    assert y.tolist() == [[[-1.0, 1.0]]]


def test_one_style_may_be_a_vector():
    x = make((4, 3, 5))
    mean, std = styles(3, 1)
    assert torch.equal(style_shift(x, mean[0], std[0]), style_shift(x, mean, std))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("threshold", [None, 1e9])
def test_a_non_finite_instance_stays_visible_and_alone(value, threshold):
    x = make((4, 3, 5))
    clean = style_shift(x, *styles(3), threshold=threshold)
    x[1, 2, 3] = value
    y = style_shift(x, *styles(3), threshold=threshold)
    others = torch.arange(4) != 1
    assert torch.equal(y[others], clean[others])
    assert not y[1, 2].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_of_a_million_times_the_spread(layout):
    x = lay_out((make((8, 5, 400), torch.float64, mean=0) + 1e6).float(), layout)
    y = style_shift(x, *styles(5))
    torch.testing.assert_close(y.double(), oracles.style(x, *styles(5)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [1e18, 1e-18])
def test_extreme_scales(scale):
    x = (make((8, 5, 40), torch.float64) * scale).float()
    y = style_shift(x, *styles(5), eps=1e-44)
    torch.testing.assert_close(y.double(), oracles.style(x, *styles(5), eps=1e-44), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 6, 10007), (600, 120, 7)])
def test_same_bits_at_any_number_of_threads(shape, dtype, layout):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    gradient, results = torch.randn(shape).to(dtype), []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        leaf = x.detach().requires_grad_()
        y = style_shift(leaf, *styles(shape[1]), threshold=2.0)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, gradient)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("some", [False, True])
def test_gradient(layout, some):
    x = make((4, 2, 5, 3), torch.float64)
    x[:2] += 3.0
    x = lay_out(x, layout).requires_grad_()
    mean, std = (t.requires_grad_() for t in styles(2, 2, torch.float64))
    own_mean, own_var = oracles.instance_statistics(x.detach())
    own = torch.cat([own_mean, (own_var + 1e-3).sqrt()], 1)
    distance = torch.cdist(own, torch.cat([mean, std], 1).detach()).amin(1).sort().values
    threshold = float(distance[1:3].mean()) if some else None
    shifted = (style_shift(x, mean, std, threshold=threshold, eps=1e-3) != x).flatten(1).any(1)
    assert int(shifted.sum()) == (2 if some else 4)
    assert torch.autograd.gradcheck(lambda *a: style_shift(*a, threshold=threshold, eps=1e-3), (x, mean, std))


X = torch.zeros(2, 3, 4)
GOOD = {"x": X, "style_mean": torch.zeros(2, 3), "style_std": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("x", [1.0], ArgumentTypeError),
        ("x", X.int(), ArgumentTypeError),
        ("x", torch.zeros(3), ArgumentError),
        ("style_mean", None, ArgumentTypeError),
        ("style_mean", torch.zeros(()), ArgumentError),
        ("style_std", torch.zeros(3, 3), ArgumentError),
        ("style_std", torch.ones(2, 3, device="meta"), ArgumentError),
        ("style_std", torch.ones(2, 3).long(), ArgumentTypeError),
        ("threshold", -1.0, ArgumentError),
        ("threshold", float("nan"), ArgumentError),
        ("threshold", "far", ArgumentTypeError),
        ("eps", -1.0, ArgumentError),
    ],
)
def test_errors(argument, value, error):
    with pytest.raises(error, match=rf"^style_shift: argument '{argument}': expected .*, got "):
        style_shift(**{**GOOD, argument: value})


@pytest.mark.parametrize("shape", [(2, 4), (0, 3), (1, 2, 3)])
def test_styles_of_a_wrong_shape(shape):
    with pytest.raises(ArgumentError, match=r"^style_shift: argument 'style_mean': "):
        style_shift(X, torch.zeros(shape), torch.ones(shape))
    with pytest.raises(ArgumentError, match=r"^style_shift: argument 'style_mean': "):
        style_shift(X, torch.zeros(2, 3, device="meta"), torch.ones(2, 3, device="meta"))


class TestModule:
    def test_is_the_function(self):
        layer = StyleShift(*styles(3), threshold=1.0)
        x = make((4, 3, 5))
        for mode in (True, False):
            assert torch.equal(layer.train(mode)(x), style_shift(x, *styles(3), threshold=1.0))
        assert set(layer.state_dict()) == {"style_mean", "style_std"}

    def test_copies_its_styles(self):
        mean, std = styles(3)
        layer = StyleShift(mean, std)
        mean.zero_()
        assert layer.style_mean.any()
        assert not list(layer.parameters())

    def test_moves_with_the_model(self):
        assert StyleShift(*styles(3)).double()(make((2, 3, 4), torch.float64)).dtype == torch.float64

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "argument"),
        [
            ((1, torch.ones(3)), {}, ArgumentTypeError, "style_mean"),
            ((torch.zeros(1, 2, 3), torch.ones(1, 2, 3)), {}, ArgumentError, "style_mean"),
            ((torch.zeros(0, 3), torch.ones(0, 3)), {}, ArgumentError, "style_mean"),
            ((torch.zeros(3), torch.ones(2)), {}, ArgumentError, "style_std"),
            ((torch.zeros(3), torch.ones(3)), {"threshold": -1}, ArgumentError, "threshold"),
            ((torch.zeros(3), torch.ones(3)), {"eps": "x"}, ArgumentTypeError, "eps"),
        ],
    )
    def test_errors(self, arguments, options, error, argument):
        with pytest.raises(error, match=rf"^StyleShift: argument '{argument}': "):
            StyleShift(*arguments, **options)


def test_an_infinite_threshold_shifts_nothing():
    x = torch.randn(3, 2, 5)
    assert torch.equal(style_shift(x, torch.zeros(2), torch.ones(2), threshold=float("inf")), x)
    assert torch.equal(StyleShift(torch.zeros(2), torch.ones(2), threshold=float("inf"))(x), x)
