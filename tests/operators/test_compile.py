"""torch.compile and torch.export of the public functions and modules."""

import pytest
import torch
from torch import nn

from shiftkern import norm, ot

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


_TRANSPORT = {
    "value": lambda M, *_: ot.sinkhorn(None, None, M, 0.5).value,
    "value_dual": lambda M, *_: ot.sinkhorn(None, None, M, 0.5).value_dual,
    "value_of_weights": lambda M, X, Y, a, b: ot.sinkhorn(a, b, M, 0.5, method="auto", reg_init=2.0, omega=1.2).value,
    "value_of_points": lambda M, X, Y, *_: ot.sinkhorn_samples(X, Y, 2.0).value,
    "value_of_directions": lambda M, X, Y, *_: ot.sinkhorn_samples(X, Y, 0.5, cost="cosine").value,
    "value_unbalanced": lambda M, X, Y, a, b: ot.sinkhorn(a, b, M, 0.5, reg_m=1.0, update_order="gf").value,
    "value_partial": lambda M, X, Y, a, b: ot.sinkhorn_partial(a, b, M, 0.5, 0.5).value,
    "value_of_parts": lambda M, *_: (
        ot.sinkhorn_batch(
            torch.stack([M, M * 2]), torch.tensor([0.5, 1.0]), lengths=torch.tensor([[3, 4], [6, 5]])
        ).value
    ),
    "plan": lambda M, X, Y, a, b: ot.sinkhorn(a, b, M, 0.5, grad="implicit").plan(),
    "barycentric": lambda M, X, Y, a, b: ot.sinkhorn(a, b, M, 0.5, grad="implicit").barycentric(Y),
    "apply": lambda M, X, Y, *_: ot.sinkhorn(None, None, M, 0.5).apply(Y),
    "warmstart": lambda M, *_: ot.sinkhorn(None, None, M, 0.5, warmstart=ot.sinkhorn(None, None, M, 0.6)).value,
    "detached": lambda M, *_: ot.sinkhorn(None, None, M, 0.5, grad="detach").plan(),
    "assignment": lambda M, *_: ot.sinkhorn_assign(M.detach()),
}


def _transport():
    M, X, Y, a, b = (make(shape, torch.float64, i) for i, shape in enumerate([(6, 5), (6, 3), (5, 3), (6,), (5,)]))
    return [t.requires_grad_() for t in (M.abs(), X, Y, a.softmax(0), b.softmax(0))]


@pytest.mark.parametrize("name", _TRANSPORT)
def test_compiled_transport_equals_eager(name):
    function = _TRANSPORT[name]
    eager_leaves, compiled_leaves = _transport(), _transport()
    eager = function(*eager_leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled_leaves)
    # Compiled, totals are taken to be equal, not made so.
    torch.testing.assert_close(compiled, eager)
    assert compiled.requires_grad == eager.requires_grad == (name not in ("detached", "assignment"))
    if eager.requires_grad:
        eager.square().sum().backward()
        compiled.square().sum().backward()
        for ours, theirs in zip(compiled_leaves, eager_leaves, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_result_leaves_the_compiled_function():
    M = make((6, 5)).abs()
    solve = torch.compile(lambda M: ot.sinkhorn(None, None, M, 0.5), fullgraph=True, backend="aot_eager")
    compiled, eager = solve(M), ot.sinkhorn(None, None, M, 0.5)
    assert repr(compiled) == repr(eager)
    assert torch.equal(compiled.plan(), eager.plan())
    assert compiled.converged


def test_transport_of_dynamic_size_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounter()

    def value(M, X, Y):
        return ot.sinkhorn(None, None, M, 0.5).value + ot.sinkhorn_samples(X, Y, 2.0).value

    run = torch.compile(value, backend=counter, dynamic=True, fullgraph=True)
    for size in (5, 6, 9):
        arguments = make((size, size + 1)).abs(), make((size, 3)), make((size + 1, 3), seed=1)
        assert torch.equal(run(*arguments), value(*arguments))
    assert counter.frame_count == 1


class _Assigner(nn.Module):
    def __init__(self):
        super().__init__()
        self.prototypes = nn.Linear(4, 5)

    def forward(self, x):
        scores = self.prototypes(x)
        result = ot.sinkhorn(None, None, 1 - scores.tanh(), 0.5)
        return ot.sinkhorn_assign(scores.detach()), result.value, result.plan()


# torch 2.6 does not find the sizes of what an autograd function gets there.
@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6"))]
)
def test_exported_transport_equals_eager(strict):
    torch.manual_seed(0)
    model = _Assigner()
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = torch.export.export(model, (make((6, 4)),), strict=strict, dynamic_shapes=shapes)
    x = make((9, 4), seed=1)
    for ours, theirs in zip(program.module()(x), model(x), strict=True):
        assert torch.equal(ours, theirs)
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    called = {str(node.target) for part in parts for node in part.graph.nodes}
    assert {"shiftkern.sinkhorn.default", "shiftkern.sinkhorn_assign.default"} <= called
