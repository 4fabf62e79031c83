import copy
import io

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.norm import AlphaBatchNorm, DecayBatchNorm, UnMixTNS, convert_norm, mixed_batch_norm, revert_norm

from helpers.strategies import make

KINDS = {"alpha": AlphaBatchNorm, "unmix": UnMixTNS, "decay": DecayBatchNorm}
kinds = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    """BatchNorm of every rank, one without affine, one shared, one nested."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.ReLU())
        self.shared = nn.BatchNorm2d(4, affine=False)
        self.again = self.shared
        self.line = nn.BatchNorm1d(4, momentum=None)
        self.volume = nn.ModuleDict({"norm": nn.BatchNorm3d(2)})
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.again(self.shared(self.body(x)))
        n, _, h, w = x.shape
        x = self.volume["norm"](x.view(n, 2, 2, h, w)).view(n, 4, h, w)
        return self.head(self.line(x.flatten(2).mean(2)))


def trained():
    torch.manual_seed(0)
    model = Net()
    for seed in range(3):
        model(make((6, 3, 8, 8), seed=seed))
    model.body[1].weight.requires_grad_(False)
    return model.eval()


def snapshot(model):
    return {name: (value.clone(), type(value)) for name, value in model.state_dict(keep_vars=True).items()}


def assert_equal_state(model, state):
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(state)
    for name, (value, kind) in state.items():
        assert type(now[name]) is kind
        assert torch.equal(now[name], value), name
        assert now[name].dtype == value.dtype


@kinds
def test_every_layer_is_replaced_and_works(kind):
    model = trained()
    assert convert_norm(model, kind) is model
    found = [m for m in model.modules() if isinstance(m, KINDS[kind])]
    assert len(found) == 4
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert model.shared is model.again
    assert model(make((6, 3, 8, 8))).isfinite().all()
    assert not any(m.training for m in model.modules())
    assert model.body[1].eps == 1e-3
    assert model.line.momentum == 0.1


@kinds
def test_parameters_are_the_same_objects_and_names_stay(kind):
    model = trained()
    parameters, names = dict(model.named_parameters()), set(model.state_dict())
    convert_norm(model, kind)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert names <= set(model.state_dict())
    assert not any("original" in name for name in model.state_dict())
    assert not model.body[1].weight.requires_grad


@kinds
@pytest.mark.parametrize("mode", [True, False])
def test_the_way_back_is_exact_after_adapting_and_training(kind, mode):
    model = trained()
    before, types = snapshot(model), [type(m) for m in model.modules()]
    x = make((6, 3, 8, 8), seed=4)
    expected = copy.deepcopy(model)(x)
    convert_norm(model, kind).train(mode)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(make((6, 3, 8, 8), seed=seed)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        model.body[1].weight.mul_(3.0).requires_grad_(True)
        model.head.weight.copy_(before["head.weight"][0])
        model.head.bias.copy_(before["head.bias"][0])
        model.body[0].weight.copy_(before["body.0.weight"][0])
        model.body[0].bias.copy_(before["body.0.bias"][0])
    assert revert_norm(model) is model
    assert_equal_state(model, before)
    assert [type(m) for m in model.modules()] == types
    assert model.shared is model.again
    assert model.line.momentum is None
    assert model.body[1].momentum == 0.2
    assert model.body[1].eps == 1e-3
    assert not model.body[1].weight.requires_grad
    assert model.line.training is trained().line.training
    assert torch.equal(model.eval()(x), expected)


@kinds
def test_the_optimizer_keeps_its_parameters_on_the_way_back(kind):
    model = trained()
    weight = model.line.weight
    convert_norm(model, kind)
    assert revert_norm(model).line.weight is weight


@kinds
@pytest.mark.parametrize("make_layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_a_model_that_is_itself_a_layer(kind, make_layer):
    layer = make_layer(3)
    before = snapshot(layer)
    converted = convert_norm(layer, kind)
    assert type(converted) is KINDS[kind]
    converted(make({nn.BatchNorm1d: (5, 3), nn.BatchNorm3d: (5, 3, 2, 2, 2)}.get(make_layer, (5, 3, 4, 4))))
    back = revert_norm(converted)
    assert type(back) is make_layer
    assert_equal_state(back, before)


@kinds
def test_deepcopy_is_independent(kind):
    model = convert_norm(trained(), kind)
    state = snapshot(model)
    twin = copy.deepcopy(model)
    twin(make((6, 3, 8, 8)))
    with torch.no_grad():
        twin.body[1].bias.add_(1.0)
    assert_equal_state(model, state)
    assert twin.shared is twin.again
    reverted = revert_norm(twin)
    assert_equal_state(reverted, snapshot(trained()))
    assert reverted.body[1].weight is not model.body[1].weight


@kinds
def test_the_state_dict_round_trips_as_weights_only(kind):
    model, other = convert_norm(trained(), kind), convert_norm(Net().eval(), kind)
    model(make((6, 3, 8, 8)))
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    memory.seek(0)
    other.load_state_dict(torch.load(memory, weights_only=True))
    x = make((6, 3, 8, 8), seed=3)
    assert torch.equal(model(x), other(x))


@kinds
def test_a_whole_model_can_be_saved(kind):
    model = convert_norm(trained(), kind)
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=False)
    x = make((6, 3, 8, 8), seed=3)
    assert torch.equal(model(x), loaded(x))
    assert_equal_state(revert_norm(loaded), snapshot(trained()))


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_way_back_follows_the_dtype_of_the_model(kind, dtype):
    model = convert_norm(trained(), kind).to(dtype)
    assert model(make((6, 3, 8, 8), dtype)).dtype == dtype
    revert_norm(model)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {dtype}
    assert model(make((6, 3, 8, 8), dtype)).dtype == dtype
    expected = trained().to(dtype).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@kinds
def test_revert_and_convert_again(kind):
    model = trained()
    x = make((6, 3, 8, 8))
    first = convert_norm(model, kind)(x)
    again = convert_norm(revert_norm(model), kind)(x)
    assert torch.equal(first, again)


def test_one_kind_after_another():
    model = trained()
    before = snapshot(model)
    for kind in KINDS:
        convert_norm(model, kind)(make((6, 3, 8, 8)))
        revert_norm(model)
    assert_equal_state(model, before)


def test_options_reach_the_layers():
    model = convert_norm(trained(), "alpha", source_weight=0.3, unbiased=True, eps=0.5)
    assert (model.line.source_weight, model.line.unbiased, model.line.eps) == (0.3, True, 0.5)
    model = convert_norm(trained(), "unmix", num_components=3, momentum=0.9, temperature=0.5, cross_term=True, seed=1)
    assert model.line.component_mean.shape == (3, 4)
    assert (model.line.momentum, model.line.temperature, model.line.cross_term) == (0.9, 0.5, True)
    assert convert_norm(trained(), "decay", eta0=0.25).line.eta0 == 0.25


def test_the_converted_layer_computes_the_formula():
    model = nn.Sequential(nn.BatchNorm2d(3))
    for seed in range(3):
        model(make((6, 3, 8, 8), seed=seed))
    layer = model[0]
    parts = [t.clone() for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)]
    x = make((6, 3, 8, 8), seed=9)
    convert_norm(model, "alpha", source_weight=0.3)
    assert torch.equal(model(x), mixed_batch_norm(x, *parts, source_weight=0.3))


def test_equal_layers_start_with_different_components_and_seeds_repeat():
    def components(seed):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        return [m.component_mean for m in convert_norm(model, "unmix", seed=seed)]

    first, second = components(3)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip((first, second), components(3), strict=True))
    assert not torch.equal(first, components(4)[0])


def test_a_parameter_shared_between_layers():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    before = snapshot(model)
    convert_norm(model, "alpha")
    assert model[0].weight is model[1].weight
    with torch.no_grad():
        model[0].weight.add_(1.0)
    revert_norm(model)
    assert model[0].weight is model[1].weight
    assert_equal_state(model, before)


@pytest.mark.parametrize(
    ("model", "kind", "options", "error", "argument"),
    [
        (None, "alpha", {}, ArgumentTypeError, "model"),
        (nn.BatchNorm2d, "alpha", {}, ArgumentTypeError, "model"),
        (nn.Linear(2, 2), "alpha", {}, ArgumentError, "model"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), "alpha", {}, ArgumentError, "model"),
        (nn.Sequential(AlphaBatchNorm(2)), "alpha", {}, ArgumentError, "model"),
        (nn.BatchNorm2d(2), "beta", {}, ArgumentError, "kind"),
        (nn.BatchNorm2d(2), 3, {}, ArgumentTypeError, "kind"),
        (nn.BatchNorm2d(2), "alpha", {"eta0": 1}, ArgumentError, "eta0"),
        (nn.BatchNorm2d(2), "alpha", {"affine": False}, ArgumentError, "affine"),
        (nn.BatchNorm2d(2), "unmix", {"seed": -1}, ArgumentError, "seed"),
        (nn.BatchNorm2d(2), "unmix", {"seed": None}, ArgumentTypeError, "seed"),
    ],
)
def test_errors(model, kind, options, error, argument):
    with pytest.raises(error, match=rf"^convert_norm: argument '{argument}': expected .*, got "):
        convert_norm(model, kind, **options)


@kinds
def test_an_error_leaves_the_model_unchanged(kind):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ArgumentError, match="'1'"):
        convert_norm(model, kind)
    assert [type(m) for m in model] == [nn.BatchNorm1d] * 2
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ArgumentError, match="lazy"):
        convert_norm(model, kind)
    assert type(model[0]) is nn.BatchNorm1d
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match="eps"):
        convert_norm(model, kind, eps=-1.0)
    assert type(model[0]) is nn.BatchNorm1d


@kinds
def test_a_converted_model_is_refused_and_named(kind):
    model = convert_norm(trained(), kind)
    with pytest.raises(ArgumentError, match=r"^convert_norm: argument 'model': .*'body\.1'"):
        convert_norm(model, "alpha")


@pytest.mark.parametrize(
    ("model", "error"),
    [(None, ArgumentTypeError), (nn.BatchNorm2d(2), ArgumentError), (AlphaBatchNorm(2), ArgumentError)],
)
def test_revert_errors(model, error):
    with pytest.raises(error, match=r"^revert_norm: argument 'model': "):
        revert_norm(model)


@pytest.mark.parametrize("cls", KINDS.values())
def test_from_batch_norm_errors(cls):
    name = f"^{cls.__name__}\\.from_batch_norm: argument 'source': "
    with pytest.raises(ArgumentTypeError, match=name):
        cls.from_batch_norm(nn.LayerNorm(3))
    with pytest.raises(ArgumentError, match=name):
        cls.from_batch_norm(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ArgumentError, match=name):
        cls.from_batch_norm(nn.LazyBatchNorm1d())
