import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.norm import UnMixTNS, channel_moments, unmix_norm

from helpers import oracles
from helpers.strategies import DTYPES, LAYOUTS, SHAPES, affine, computing, lay_out, make, roundoff, tensors


def components(channels, k=4, dtype=torch.float32, seed=11):
    return make((k, channels), dtype, seed), make((k, channels), dtype, seed + 1).square() + 0.2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_published_form(shape, dtype, layout):
    x = lay_out(make(shape, dtype), layout)
    _, _, weight, bias = affine(shape[1])
    for cross_term in (False, True):
        y, p = unmix_norm(x, *components(shape[1]), weight, bias, cross_term=cross_term)
        assert (y.shape, y.dtype, p.shape, p.dtype) == (x.shape, dtype, (shape[0], 4), torch.float64)
        if not x.numel():
            continue
        expected, q = oracles.unmix(x, *components(shape[1]), weight, bias, cross_term=cross_term)
        u = roundoff(computing(dtype))
        torch.testing.assert_close(p, q, rtol=4000 * u, atol=4000 * u)  # softmax(cos / 0.07) amplifies by 2 / 0.07
        scale = float(expected.abs().max()) + 6
        torch.testing.assert_close(y.double(), expected, rtol=2 * roundoff(dtype), atol=2000 * u * scale)
        if layout in ("contiguous", "channels_last"):
            assert y.stride() == x.stride()


@given(tensors(empty=False), st.integers(1, 9), st.sampled_from([0.01, 0.07, 1.0, 50.0]), st.booleans())
def test_rows_of_p_sum_to_one_and_lie_in_the_simplex(x, k, temperature, cross_term):
    y, p = unmix_norm(x, *components(x.shape[1], k), temperature=temperature, cross_term=cross_term)
    torch.testing.assert_close(p.sum(1), torch.ones(x.shape[0]).double())
    assert bool((p >= 0).all())
    assert y.shape == x.shape
    assert bool(y.isfinite().all())


@given(tensors(empty=False, dtypes=(torch.float64,)), st.booleans())
def test_order_of_components_does_not_matter(x, cross_term):
    mean, var = components(x.shape[1], 5, torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    a, p = unmix_norm(x, mean, var, cross_term=cross_term)
    b, q = unmix_norm(x, mean[order], var[order], cross_term=cross_term)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p[:, order], q, rtol=1e-9, atol=1e-12)


@given(tensors(empty=False, dtypes=(torch.float32,)))
def test_instances_do_not_see_each_other(x):
    whole, p = unmix_norm(x, *components(x.shape[1]))
    for n in range(x.shape[0]):
        y, q = unmix_norm(x[n : n + 1], *components(x.shape[1]))
        torch.testing.assert_close(y[0], whole[n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(q[0], p[n], rtol=1e-4, atol=1e-5)


@given(tensors(empty=False, dtypes=(torch.float64,)))
def test_one_component_is_instance_normalization(x):
    # p = 1, so the component has no part.
    y, p = unmix_norm(x, *components(x.shape[1], 1))
    assert bool((p == 1).all())
    mean, var = oracles.instance_statistics(x)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    torch.testing.assert_close(y, (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt(), rtol=1e-8, atol=1e-7)


def test_zero_means_are_assigned_evenly():
    x = torch.zeros(2, 3, 4)
    y, p = unmix_norm(x, *components(3))
    torch.testing.assert_close(p, torch.full((2, 4), 0.25).double())
    assert y.isfinite().all()
    _, p = unmix_norm(make((2, 3, 4)), torch.zeros(4, 3), torch.ones(4, 3))
    torch.testing.assert_close(p, torch.full((2, 4), 0.25).double())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_of_a_million_times_the_spread(layout):
    x = lay_out((make((8, 5, 400), torch.float64, mean=0) + 1e6).float(), layout)
    mean, var = components(5, dtype=torch.float64)
    mean = mean + 1e6
    y, _ = unmix_norm(x, mean, var, temperature=1.0)
    expected, _ = oracles.unmix(x, mean, var, temperature=1.0)
    # The oracle squares means of 1e6 in float64, which costs it 1e12 * 1e-16 = 1e-4.
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


def test_means_shorter_than_1e_minus_12_count_as_zero():
    # As in torch's normalize: the cosine of what is almost nothing is no direction.
    mean, var = components(5, dtype=torch.float64)
    y, p = unmix_norm(make((8, 5, 40)) * 1e-18, mean * 1e-18, var * 1e-36, eps=1e-44)
    torch.testing.assert_close(p, torch.full((8, 4), 0.25).double())
    assert y.isfinite().all()


@pytest.mark.parametrize("scale", [1e18, 1e-9])
def test_extreme_scales(scale):
    x = (make((8, 5, 40), torch.float64) * scale).float()
    mean, var = components(5, dtype=torch.float64)
    mean, var = mean * scale, var * scale**2
    y, p = unmix_norm(x, mean, var, eps=1e-44)
    expected, q = oracles.unmix(x.double() / scale, mean / scale, var / scale**2, eps=1e-44 / scale**2)
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_instances_stay_alone(value):
    x = make((4, 3, 5))
    clean, p = unmix_norm(x, *components(3))
    x[1, 2, 3] = value
    y, q = unmix_norm(x, *components(3))
    others = torch.arange(4) != 1
    assert torch.equal(y[others], clean[others])
    assert torch.equal(q[others], p[others])
    assert not y[1].isfinite().all()
    assert not q[1].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 6, 10007), (3, 40, 5000), (500, 130, 9), (3000, 101)])
def test_same_bits_at_any_number_of_threads(shape, dtype, layout):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    gradient, results = torch.randn(shape).to(dtype), []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        leaf, weight = x.detach().requires_grad_(), torch.ones(shape[1], requires_grad=True)
        y, p = unmix_norm(leaf, *components(shape[1], 16), weight)
        results.append((y.detach(), p, *torch.autograd.grad(y, (leaf, weight), gradient)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("cross_term", [False, True])
@pytest.mark.parametrize("affine_parts", ["none", "weight", "bias", "both"])
def test_gradient_equals_that_of_the_published_form(layout, cross_term, affine_parts):
    x = lay_out(make((3, 2, 4, 2), torch.float64), layout)
    _, _, weight, bias = affine(2, torch.float64)
    weight = weight if affine_parts in ("weight", "both") else None
    bias = bias if affine_parts in ("bias", "both") else None
    gradient = make((3, 2, 4, 2), torch.float64, 8)
    results = []
    for function in (unmix_norm, oracles.unmix):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        y, _ = function(
            leaves[0], *components(2, dtype=torch.float64), *leaves[1:], eps=1e-3, temperature=0.5,
            cross_term=cross_term,
        )  # fmt: skip
        results.append(torch.autograd.grad(y, [t for t in leaves if t is not None], gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cross_term", [False, True])
def test_gradcheck_where_the_assignment_is_constant(cross_term):
    # No gradient flows through p, so finite differences agree only where p does not move: a vast temperature.
    x = make((3, 2, 4), torch.float64).requires_grad_()
    _, _, weight, bias = affine(2, torch.float64)

    def function(x, weight, bias):
        parts = components(2, dtype=torch.float64)
        return unmix_norm(x, *parts, weight, bias, eps=1e-2, temperature=1e12, cross_term=cross_term)[0]

    assert torch.autograd.gradcheck(function, (x, weight.requires_grad_(), bias.requires_grad_()))


def test_p_carries_no_gradient():
    _, p = unmix_norm(make((3, 2)).requires_grad_(), *components(2))
    assert not p.requires_grad


X = torch.zeros(2, 3, 4)
GOOD = {"x": X, "component_mean": torch.zeros(5, 3), "component_var": torch.ones(5, 3)}


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("x", [1.0], ArgumentTypeError),
        ("x", X.long(), ArgumentTypeError),
        ("x", torch.zeros(3), ArgumentError),
        ("component_mean", None, ArgumentTypeError),
        ("component_mean", torch.zeros(()), ArgumentError),
        ("component_mean", torch.zeros(3), ArgumentError),
        ("component_mean", torch.zeros(0, 3), ArgumentError),
        ("component_mean", torch.zeros(5, 4), ArgumentError),
        ("component_mean", torch.zeros(5, 3, device="meta"), ArgumentError),
        ("component_mean", torch.zeros(5, 3, requires_grad=True), ArgumentError),
        ("component_var", torch.zeros(4, 3), ArgumentError),
        ("component_var", torch.zeros(5, 3).int(), ArgumentTypeError),
        ("component_var", torch.zeros(5, 3, requires_grad=True), ArgumentError),
        ("weight", torch.zeros(2), ArgumentError),
        ("bias", torch.zeros(2), ArgumentError),
        ("temperature", 0.0, ArgumentError),
        ("temperature", float("nan"), ArgumentError),
        ("temperature", "hot", ArgumentTypeError),
        ("eps", -1.0, ArgumentError),
        ("cross_term", 1, ArgumentTypeError),
    ],
)
def test_errors(argument, value, error):
    with pytest.raises(error, match=rf"^unmix_norm: argument '{argument}': expected .*, got "):
        unmix_norm(**{**GOOD, argument: value})


class TestModule:
    @pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2), (5, 3, 2, 2, 3)])
    @pytest.mark.parametrize("mode", [True, False])
    def test_the_stream_follows_the_formula(self, shape, mode):
        layer = UnMixTNS(3, num_components=4, momentum=0.3, seed=5).double().train(mode)
        mean, var = layer.component_mean.clone(), layer.component_var.clone()
        for step in range(4):
            x = make((shape[0] + step, *shape[1:]), torch.float64, step)
            expected, p = oracles.unmix(x, mean, var)
            torch.testing.assert_close(layer(x), expected)
            own_mean, own_var = oracles.instance_statistics(x)
            eta = 1 - (1 - 0.3) ** (x.shape[0] / 64)
            for state, own in ((mean, own_mean), (var, own_var)):
                pull = (p.unsqueeze(2) * (own.unsqueeze(1) - state.unsqueeze(0))).mean(0)
                state += eta * pull
            torch.testing.assert_close(layer.component_mean, mean)
            torch.testing.assert_close(layer.component_var, var)

    def test_a_batch_of_64_moves_by_momentum(self):
        layer = UnMixTNS(2, num_components=1, momentum=0.25)
        x = make((64, 2, 3), mean=5.0)
        own = channel_moments(x, per_instance=True).mean.mean(0)
        layer(x)
        torch.testing.assert_close(layer.component_mean[0].double(), 0.25 * own, rtol=1e-5, atol=1e-6)

    def test_the_components_start_as_published(self):
        source = torch.nn.BatchNorm2d(2000)
        source.running_mean.fill_(3.0)
        source.running_var.fill_(4.0)
        k = 16
        layer = UnMixTNS.from_batch_norm(source, num_components=k, seed=1)
        assert bool((layer.component_var == 2.0).all())
        assert abs(layer.component_mean.mean().item() - 3.0) < 0.05
        assert abs(layer.component_mean.var().item() - 0.5 * k / (k - 1) * 4.0) < 0.05
        # The mixture of all components has the source's statistics.
        mixture = layer.component_var.mean(0) + layer.component_mean.var(0, correction=0)
        assert abs(mixture.mean().item() - 4.0) < 0.05

    def test_one_component_starts_at_the_source(self):
        source = torch.nn.BatchNorm1d(3)
        source.running_mean.copy_(affine(3)[0])
        source.running_var.copy_(affine(3)[1])
        layer = UnMixTNS.from_batch_norm(source, num_components=1)
        assert torch.equal(layer.component_mean[0], source.running_mean)
        assert torch.equal(layer.component_var[0], source.running_var)

    def test_a_seed_determines_the_components(self):
        a, b, c = (UnMixTNS(5, seed=s).component_mean for s in (1, 1, 2))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        state = torch.get_rng_state()
        UnMixTNS(5, seed=1)
        assert torch.equal(torch.get_rng_state(), state)

    def test_reset_is_exact_also_in_copies(self):
        layer = UnMixTNS(3, seed=torch.Generator().manual_seed(4))
        start = layer.component_mean.clone(), layer.component_var.clone()
        twin = copy.deepcopy(layer)
        for module in (layer, twin):
            module(make((9, 3, 4)))
            assert not torch.equal(module.component_mean, start[0])
            module.reset()
            assert torch.equal(module.component_mean, start[0])
            assert torch.equal(module.component_var, start[1])

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
    def test_an_empty_batch_leaves_the_state(self, shape):
        layer = UnMixTNS(3)
        state = {k: v.clone() for k, v in layer.state_dict().items()}
        assert layer(torch.zeros(shape)).shape == shape
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())

    def test_the_state_dict_resumes_the_stream(self):
        layer = UnMixTNS(3, seed=1)
        layer(make((4, 3, 5)))
        memory = io.BytesIO()
        torch.save(layer.state_dict(), memory)
        memory.seek(0)
        other = UnMixTNS(3, seed=2)
        other.load_state_dict(torch.load(memory, weights_only=True))
        x = make((4, 3, 5), seed=7)
        assert torch.equal(layer(x), other(x))
        assert torch.equal(layer.component_var, other.component_var)

    def test_gradients_reach_weight_bias_and_input(self):
        layer = UnMixTNS(3)
        x = make((4, 3, 5)).requires_grad_()
        layer(x).square().sum().backward()
        assert all(t.grad.isfinite().all() and t.grad.any() for t in (x, layer.weight, layer.bias))

    def test_the_backward_pass_uses_the_statistics_of_its_forward_pass(self):
        layer = UnMixTNS(3).double()
        x = make((4, 3, 5), torch.float64).requires_grad_()
        parts = layer.component_mean.clone(), layer.component_var.clone()
        y = layer(x)
        layer(make((4, 3, 5), torch.float64, 9))
        (ours,) = torch.autograd.grad(y.square().sum(), x)
        (theirs,) = torch.autograd.grad(oracles.unmix(x, *parts)[0].square().sum(), x)
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("threads", [2, 3])
    def test_updates_have_the_same_bits_at_any_number_of_threads(self, threads):
        layers = [UnMixTNS(257, num_components=16) for _ in range(2)]
        x = torch.randn(200, 257, 9)
        for layer, count in zip(layers, (1, threads), strict=True):
            shiftkern.set_num_threads(count)
            layer(x)
        assert torch.equal(layers[0].component_mean, layers[1].component_mean)
        assert torch.equal(layers[0].component_var, layers[1].component_var)

    @pytest.mark.parametrize(
        ("options", "error", "argument"),
        [
            ({"num_components": 0}, ArgumentError, "num_components"),
            ({"num_components": 2.0}, ArgumentTypeError, "num_components"),
            ({"momentum": 1.5}, ArgumentError, "momentum"),
            ({"temperature": 0}, ArgumentError, "temperature"),
            ({"cross_term": 0}, ArgumentTypeError, "cross_term"),
            ({"seed": "x"}, ArgumentTypeError, "seed"),
            ({"seed": -1}, ArgumentError, "seed"),
            ({"seed": 2**70}, ArgumentError, "seed"),
            ({"eps": -1.0}, ArgumentError, "eps"),
        ],
    )
    def test_errors(self, options, error, argument):
        with pytest.raises(error, match=rf"^UnMixTNS: argument '{argument}': "):
            UnMixTNS(**{"num_features": 3, **options})

    def test_bad_input(self):
        with pytest.raises(ArgumentError, match=r"^UnMixTNS: argument 'component_mean': "):
            UnMixTNS(3)(torch.zeros(2, 4))
        with pytest.raises(ArgumentTypeError, match=r"^UnMixTNS: argument 'x': "):
            UnMixTNS(3)(None)


def test_reset_is_exact_after_loading_another_seed():
    first, second = UnMixTNS(3, 4, seed=1), UnMixTNS(3, 4, seed=2)
    start = first.component_mean.clone()
    first(torch.randn(5, 3, 2, 2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.component_mean, first.component_mean)
    second.reset()
    assert torch.equal(second.component_mean, start)
