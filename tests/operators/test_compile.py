"""torch.compile and torch.export of the public functions and modules."""

import pytest
import torch
from torch import nn

from shiftkern import norm

from helpers.strategies import affine, lay_out, make


def _functions():
    mean, var, weight, bias = affine(3)
    components = make((4, 3)), make((4, 3)).square() + 1
    return {
        "channel_moments": lambda x: norm.channel_moments(x).var(),
        "channel_moments_dim": lambda x: norm.channel_moments(x, dim=-1, per_instance=True).mean,
        "channel_moments_mask": lambda x: norm.channel_moments(x, mask=x[:, 0] > 0).m2,
        "merge_moments": lambda x: norm.merge_moments(norm.channel_moments(x[:1]), norm.channel_moments(x[1:])).m2,
        "mixed_batch_norm": lambda x: norm.mixed_batch_norm(x * 2, mean, var, weight, bias, source_weight=0.3),
        "mixed_batch_norm_": lambda x: norm.mixed_batch_norm_(x.clone(), mean, var, weight, bias, source_weight=0.3),
        "unmix_norm": lambda x: norm.unmix_norm(x, *components, weight)[0],
        "style_shift": lambda x: norm.style_shift(x, mean.expand(2, 3), var.expand(2, 3), threshold=1.0),
    }


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("name", _functions())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled_functions_equal_eager(name, layout):
    function = _functions()[name]
    x = lay_out(make((4, 3, 5, 6)), layout)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.set_grad_enabled(name != "mixed_batch_norm_"):
        eager, result = function(eager_x), compiled(compiled_x)
        assert result.stride() == eager.stride()
        assert torch.equal(result, eager)
    if eager.requires_grad:
        eager.square().sum().backward()
        result.square().sum().backward()
        assert torch.equal(compiled_x.grad, eager_x.grad)


def _model(kind, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, 3, 6, 6))
    return norm.convert_norm(model, kind, **options)


@pytest.mark.parametrize("kind", ["alpha", "unmix"])
def test_a_converted_model_compiles_whole_and_adapts_alike(kind):
    eager, compiled = _model(kind), _model(kind)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = make((5, 3, 6, 6), seed=seed)
        a, b = eager(x), run(x)
        torch.testing.assert_close(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(eager.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_a_decaying_model_compiles_with_a_break_at_its_step():
    eager, compiled = _model("decay"), _model("decay")
    run = torch.compile(compiled, backend="aot_eager")
    for seed in range(3):
        x = make((5, 3, 6, 6), seed=seed)
        torch.testing.assert_close(eager(x), run(x))
    assert compiled[1].step.item() == 3
    torch.testing.assert_close(eager[1].running_var, compiled[1].running_var)


def test_style_shift_layer_compiles():
    layer = norm.StyleShift(make((2, 3)), make((2, 3)).square() + 1, threshold=0.5)
    x = make((4, 3, 5, 6))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("kind", ["alpha", "unmix"])
def test_exported_model_equals_eager(kind):
    model = _model(kind).eval()
    x = make((5, 3, 6, 6))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    program = torch.export.export(model, (x,))
    model.load_state_dict(state)
    with torch.no_grad():
        expected = model(x)
        model.load_state_dict(state)  # the program may share the model's buffers
        torch.testing.assert_close(program.module()(x), expected)
    assert any("shiftkern" in str(node.target) for node in program.graph.nodes)


def test_dynamic_batch_size_does_not_recompile():
    mean, var, weight, bias = affine(3)
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(
        lambda x: norm.mixed_batch_norm(x, mean, var, weight, bias, source_weight=0.4),
        backend=counter,
        dynamic=True,
        fullgraph=True,
    )
    for size in (5, 6, 9):
        x = make((size, 3, 4))
        assert torch.equal(run(x), norm.mixed_batch_norm(x, mean, var, weight, bias, source_weight=0.4))
    assert counter.frame_count == 1
