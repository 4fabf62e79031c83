"""What every method promises: reset and resume to the bit, seeds, failed steps, callers' modes, flags, errors."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from shiftkern import tta

CLASSES = 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Hundreds of tiny networks: threads would only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(144, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model.to(dtype)


def stream(batches=3, n=6, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return list((2 * torch.rand(batches, n, 1, 8, 8, generator=generator) + 0.5).to(dtype))


STYLES = {"0": (torch.zeros(2, 4), torch.tensor([[1.0] * 4, [2.0] * 4]))}
REPLAY = (torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(10) % CLASSES)

METHODS = {
    "Source": lambda m, **o: tta.Source(m),
    "BatchNormAdapt": lambda m, **o: tta.BatchNormAdapt(m),
    "AlphaBN": lambda m, **o: tta.AlphaBN(m, source_weight=0.3),
    "UnMix": lambda m, **o: tta.UnMix(m, num_components=4, **o),
    "Tent": lambda m, **o: tta.Tent(m, **o),
    "Tent2": lambda m, **o: tta.Tent(m, steps=2, lr=0.05, **o),
    "Core": lambda m, **o: tta.Tent(m, loss=tta.class_correlation_loss, source_weight=0.5, **o),
    "CoTTA": lambda m, **o: tta.CoTTA(m, num_augmentations=3, confidence_threshold=1.0, restore_probability=0.2, **o),
    "CoTTA2": lambda m, **o: tta.CoTTA(m, num_augmentations=2, steps=2, optimizer=torch.optim.SGD, **o),
    "RMT": lambda m, **o: tta.RMT(m, **o),
    "RMT replay": lambda m, **o: tta.RMT(m, source=REPLAY, steps=2, **o),
    "LAME": lambda m, **o: tta.LAME(m, affinity="linear", weight=0.05),
    "OSUDA": lambda m, **o: tta.OSUDA(m, **o),
    "StyleShifting": lambda m, **o: tta.StyleShifting(m, STYLES, threshold=0.1),
}
SEEDED = ["UnMix", "CoTTA", "RMT", "RMT replay"]
ADAPTS = [name for name in METHODS if name not in ("Source", "LAME", "StyleShifting", "BatchNormAdapt", "AlphaBN")]


@pytest.fixture(params=METHODS)
def make(request):
    return METHODS[request.param]


def bits(value):
    """A comparable picture of a state dict: exact bytes of every tensor."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return (str(value.dtype), tuple(value.shape), bytes(raw.numpy().tobytes()))
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def state(method):
    return copy.deepcopy(method.state_dict())


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_forward_predicts_without_grad(make):
    y = make(make_model())(stream()[0])
    assert y.shape == (6, CLASSES)
    assert y.isfinite().all()
    assert not y.requires_grad


@pytest.mark.parametrize("name", ADAPTS)
def test_state_moves_on_a_stream(name):
    method = METHODS[name](make_model())
    before = {key: value.clone() for key, value in method.model.state_dict().items()}
    for x in stream():
        method(x)
    after = method.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_reset_restores_to_the_bit(make):
    method = make(make_model())
    before = bits(state(method))
    first = [method(x) for x in stream()]
    assert bits(state(method)) != before
    method.train()
    method.reset()
    assert bits(state(method)) == before
    assert bits([method(x) for x in stream()]) == bits(first)
    assert not any(module.training for module in method.model.modules())


def test_reset_restores_flags(make):
    method = make(make_model())
    flags = {name: p.requires_grad for name, p in method.named_parameters()}
    for module in method.modules():
        module.training = True
    for p in method.parameters():
        p.requires_grad_(not p.requires_grad)
    method.reset()
    if isinstance(method, tta.GradientMethod):  # the others train nothing and leave the user's flags alone
        assert {name: p.requires_grad for name, p in method.named_parameters()} == flags
    assert not any(module.training for module in method.model.modules())


@pytest.mark.parametrize("other_weights", [False, True])
def test_resumed_stream_equals_the_uninterrupted_one(make, other_weights):
    batches = stream(5)
    method = make(make_model())
    start = bits(state(method))
    for x in batches[:2]:
        method(x)
    saved = through_file(method.state_dict())
    expected = [method(x) for x in batches[2:]]
    end = bits(state(method))

    resumed = make(make_model(seed=9 if other_weights else 0))
    resumed(batches[0])  # a method that has already been used
    assert resumed.load_state_dict(saved) == ([], [])
    assert bits([resumed(x) for x in batches[2:]]) == bits(expected)
    assert bits(state(resumed)) == end
    assert resumed.collapse_monitor.mean_entropy == method.collapse_monitor.mean_entropy
    resumed.reset()
    assert bits(state(resumed)) == start


@pytest.mark.parametrize("name", SEEDED)
def test_reset_after_loading_restores_the_saved_seed(name):
    method = METHODS[name](make_model(), seed=3)
    first = [method(x) for x in stream()]
    resumed = METHODS[name](make_model(), seed=4)
    resumed.load_state_dict(through_file(method.state_dict()))
    resumed.reset()
    assert bits([resumed(x) for x in stream()]) == bits(first)


def test_loading_by_assignment(make):
    batches = stream()
    method = make(make_model())
    method(batches[0])
    saved = through_file(method.state_dict())
    expected = [method(x) for x in batches[1:]]
    resumed = make(make_model(seed=9))
    resumed.load_state_dict(saved, assign=True)
    assert bits([resumed(x) for x in batches[1:]]) == bits(expected)


def test_a_saved_state_does_not_follow_the_stream(make):
    method = make(make_model())
    method(stream()[0])
    extra = method.state_dict()["_extra_state"]
    before = bits(copy.deepcopy(extra))
    method(stream()[1])
    assert bits(extra) == before


def test_a_state_of_another_method_is_refused():
    saved = tta.Source(make_model()).state_dict()
    with pytest.raises(ValueError, match=r"LAME: argument 'state_dict'.*Source"):
        tta.LAME(make_model()).load_state_dict(saved)


def test_deepcopy_is_independent(make):
    method = make(make_model())
    method(stream()[0])
    twin = copy.deepcopy(method)
    saved = bits(state(twin))
    a = method(stream()[1])
    assert bits(state(twin)) == saved
    assert bits(twin(stream()[1])) == bits(a)
    twin.reset()
    method.reset()
    assert bits(state(twin)) == bits(state(method))


@pytest.mark.parametrize("name", SEEDED)
def test_seeds(name):
    def run(seed):
        method = METHODS[name](make_model(), seed=seed)
        return bits([method(x) for x in stream()])

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_global_generator_is_left_alone(make):
    model, batches = make_model(), stream()
    before = torch.get_rng_state()
    method = make(model)
    for x in batches:
        method(x)
    method.load_state_dict(method.state_dict())
    method.reset()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_grad_mode_does_not_matter(make, mode):
    method = make(make_model())
    expected = bits([method(x) for x in stream()])
    model = make_model()
    with mode():
        other = make(model)
        assert bits([other(x.clone()) for x in stream()]) == expected
        other.reset()
        assert bits([other(x.clone()) for x in stream()]) == expected
        saved = copy.deepcopy(other.state_dict())
        other.load_state_dict(saved)
    other.reset()
    assert bits([other(x) for x in stream()]) == expected


def test_train_mode_changes_nothing(make):
    method = make(make_model())
    expected = bits([method(x) for x in stream()])
    other = make(make_model().train())
    other.train()
    assert other.training
    assert bits([other(x) for x in stream()]) == expected


def test_the_batch_is_not_written_and_its_graph_not_touched(make):
    x = stream()[0].requires_grad_()
    before = x.detach().clone()
    y = make(make_model())(x)
    assert torch.equal(x, before)
    assert x.grad is None
    assert not y.requires_grad


def test_monitor_matches_the_predictions(make):
    method = make(make_model())
    outputs = torch.cat([method(x) for x in stream()]).double()
    p = outputs if isinstance(method, tta.LAME) else outputs.softmax(1)
    entropy = sum(-v * math.log(v) for row in p.tolist() for v in row if v > 0) / len(p)
    share = max(p.argmax(1).tolist().count(c) for c in range(CLASSES)) / len(p)
    assert method.collapse_monitor.mean_entropy == pytest.approx(entropy, rel=1e-5)
    assert method.collapse_monitor.top_class_share == share
    method.reset()
    assert math.isnan(method.collapse_monitor.mean_entropy)
    assert math.isnan(method.collapse_monitor.top_class_share)
    assert method.collapse_monitor.predictions == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_batch_raises_and_changes_nothing(make, value):
    method = make(make_model())
    method(stream()[0])
    before = bits(state(method))
    x = stream()[1]
    x[2] = value
    with pytest.raises(ValueError, match=r"argument 'x'.*finite"):
        method(x)
    assert bits(state(method)) == before


def test_a_wrong_shape_raises_and_changes_nothing(make):
    method = make(make_model())
    method(stream()[0])
    before = bits(state(method))
    with pytest.raises(Exception, match=r"."):
        method(torch.rand(6, 1, 9, 9))  # passes the first layers, fails in the Linear
    assert bits(state(method)) == before
    expected = make(make_model())
    expected(stream()[0])
    assert bits(method(stream()[1])) == bits(expected(stream()[1]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_a_failure_anywhere_in_a_step_changes_nothing(name, call):
    model = make_model()
    method = METHODS[name](model)
    method(stream()[0])
    before = bits(state(method))
    calls = 0

    class Fault(Exception):
        pass

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Fault

    handles = [m[-1].register_forward_hook(fail) for m in (method.model, getattr(method, "teacher", None)) if m]
    try:
        method(stream()[1])
    except Fault:
        assert bits(state(method)) == before
    else:
        assert calls < call
    for handle in handles:
        handle.remove()


def test_unwrap_gives_the_model_back(make):
    model = make_model()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    reference = copy.deepcopy(model)
    method = make(model)
    for x in stream():
        method(x)
    back = method.unwrap()
    assert [type(m) for m in back.modules()] == [type(m) for m in reference.modules()]
    assert bits(back.state_dict()) == bits(reference.state_dict())
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in reference.parameters()]
    assert [m.training for m in back.modules()] == [m.training for m in reference.modules()]
    assert torch.equal(back.eval()(stream()[0]), reference.eval()(stream()[0]))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in back.modules())
    with pytest.raises(ValueError, match="unwrap"):
        method(stream()[0])


def test_gradients_of_the_caller_stay(make):
    model = make_model()
    method = make(model)
    spare = torch.ones(3, requires_grad=True)
    spare.sum().backward()
    method(stream()[0])
    assert torch.equal(spare.grad, torch.ones(3))
    assert all(p.grad is None for p in method.parameters())


def test_moving_to_another_dtype(make):
    method = make(make_model()).double()
    outputs = [method(x) for x in stream(dtype=torch.float64)]
    assert outputs[0].dtype == torch.float64
    method.double()  # with optimizer state
    method(stream(dtype=torch.float64)[0])
    method.reset()
    assert bits([method(x) for x in stream(dtype=torch.float64)]) == bits(outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(make, dtype):
    if make is METHODS["StyleShifting"]:
        method = tta.StyleShifting(
            make_model(dtype=dtype), {k: tuple(t.to(dtype) for t in v) for k, v in STYLES.items()}
        )
    else:
        method = make(make_model(dtype=dtype))
    y = [method(x) for x in stream(dtype=dtype)][-1]
    assert y.isfinite().all()
    assert y.dtype == dtype or isinstance(method, tta.LAME)


def test_one_sample(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    method = make(model)
    for x in stream(n=1):
        y = method(x)
        assert y.shape == (1, CLASSES)
        assert y.isfinite().all()


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("StyleShifting", "RMT replay")])
def test_flat_input(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    method = METHODS[name](model)
    for x in torch.rand(3, 7, 5):
        assert method(x).isfinite().all()


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("StyleShifting",)])
def test_shared_layers(name):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Conv2d(1, 4, 3, padding=1)
            self.mix = nn.Conv2d(4, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.same = self.norm
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            x = self.norm(self.stem(x)).relu()
            return self.head(self.same(self.mix(x)).relu().mean((2, 3)))

    method = METHODS[name](Twice())
    before = bits(state(method))
    outputs = [method(x) for x in stream()]
    saved = through_file(method.state_dict())
    assert method.model.norm is method.model.same
    method.reset()
    assert bits(state(method)) == before
    assert bits([method(x) for x in stream()]) == bits(outputs)
    resumed = METHODS[name](Twice())
    resumed.load_state_dict(saved)
    assert bits(resumed(stream()[0])) == bits(method(stream()[0]))


def test_tied_affine_parameters():
    model = make_model()
    model.insert(2, nn.BatchNorm2d(4))
    model[2].weight = model[1].weight
    for name in ("Tent", "OSUDA", "CoTTA", "RMT"):
        method = METHODS[name](copy.deepcopy(model))
        method(stream()[0])
        method(stream()[1])
        assert method.model[1].weight is method.model[2].weight


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_model_must_be_a_module(make):
    with pytest.raises(TypeError, match=r"argument 'model': expected a torch\.nn\.Module"):
        make(lambda x: x)


def test_model_must_not_be_a_method(make):
    with pytest.raises(ValueError, match=r"argument 'model'.*unwrap"):
        make(tta.Source(make_model()))


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("seed", ["0", 1.5, None, True, 2**70])
def test_seed_must_be_an_integer(name, seed):
    with pytest.raises((ValueError, TypeError), match="argument 'seed'"):
        METHODS[name](make_model(), seed=seed)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        ([[1.0]], TypeError),
        (torch.ones(6, 1, 8, 8, dtype=torch.int64), TypeError),
        (torch.ones(0, 1, 8, 8), ValueError),
        (torch.tensor(1.0), ValueError),
    ],
)
def test_batch_must_be_a_filled_float_tensor(make, x, error):
    method = make(make_model())
    before = bits(state(method))
    with pytest.raises(error, match="argument 'x'"):
        method(x)
    assert bits(state(method)) == before


@pytest.mark.parametrize("name", ["BatchNormAdapt", "AlphaBN", "UnMix", "OSUDA"])
def test_a_model_without_batch_norm_is_refused(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="argument 'model': expected a model with BatchNorm"):
        METHODS[name](model)


def test_a_model_wrapped_twice_is_refused():
    model = make_model()
    tta.AlphaBN(model)
    with pytest.raises(ValueError, match="unwrap"):
        tta.UnMix(model)


@pytest.mark.parametrize("name", ["Tent", "CoTTA", "RMT", "LAME", "Source"])
def test_a_model_without_batch_norm_works(name):
    torch.manual_seed(0)
    method = METHODS[name](nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    before = bits(state(method))
    for x in torch.rand(2, 5, 3):
        method(x)
    method.reset()
    assert bits(state(method)) == before


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "output", [lambda x: (x, x), lambda x: {"logits": x}, lambda x: x[:, 0], lambda x: x.argmax(1), lambda x: x[:0]]
)
def test_a_model_must_return_logits(name, output):
    class Odd(nn.Sequential):
        def forward(self, x):
            return output(super().forward(x))

    method = METHODS[name](Odd(*make_model()))
    before = bits(state(method))
    with pytest.raises((ValueError, TypeError), match="argument 'model': expected a model that returns"):
        method(stream()[0])
    assert bits(state(method)) == before


GRADIENT = ["Tent", "CoTTA", "RMT", "OSUDA"]


@pytest.mark.parametrize("name", GRADIENT)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("lr", v) for v in (0, -1.0, math.nan, math.inf, "x", None)],
        *[("steps", v) for v in (0, -1, 1.5, "x", None, True)],
        ("optimizer", "adam"),
    ],
)
def test_options_of_gradient_methods(name, option, value):
    model = make_model()
    before = [type(m) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=f"{name}: argument '{option}'"):
        getattr(tta, name)(model, **{option: value})
    assert [type(m) for m in model.modules()] == before  # refused before the model is touched
    assert model.training


@pytest.mark.parametrize("name", GRADIENT)
def test_a_model_that_does_not_use_its_parameters(name):
    class Constant(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            return torch.zeros(len(x), CLASSES)

    method = getattr(tta, name)(Constant(*make_model()))
    if name in ("OSUDA", "RMT"):  # their other loss terms still depend on parameters
        method(stream()[0])
        return
    with pytest.raises(ValueError, match="depend on the trained parameters"):
        method(stream()[0])


@pytest.mark.parametrize("name", ["LAME", "RMT"])
@pytest.mark.parametrize(("features", "error"), [("nope", ValueError), ("", ValueError), (3, TypeError)])
def test_features_must_name_a_submodule(name, features, error):
    with pytest.raises(error, match="argument 'features'") as info:
        getattr(tta, name)(make_model(), features=features)
    if features == "nope":
        assert "'0'" in str(info.value)  # lists candidates


@pytest.mark.parametrize("name", ["LAME", "RMT"])
def test_a_model_without_linear_needs_features(name):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="argument 'features'"):
        getattr(tta, name)(model)
    options = {"prototypes": torch.eye(3)} if name == "RMT" else {}
    method = getattr(tta, name)(model, features="2", **options)
    assert method(stream()[0]).shape == (6, 3)


@pytest.mark.parametrize("name", ["LAME", "RMT"])
def test_a_features_layer_that_is_not_run_is_refused(name):
    class Spare(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.add_module("spare", nn.Linear(8, CLASSES))

        def forward(self, x):
            for layer in list(self)[:-1]:
                x = layer(x)
            return x

    method = getattr(tta, name)(Spare(*make_model()))
    with pytest.raises(ValueError, match=r"features of 'spare'.*no call"):
        method(stream()[0])


@pytest.mark.parametrize("method", [tta.Tent, tta.CoTTA, tta.RMT, tta.OSUDA])
def test_float16_parameters_are_refused_before_anything_changes(method):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).half()
    wrapped = method(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{method.__name__}: argument 'model': .*float16"):
        wrapped(torch.randn(5, 3).half())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
