"""What torch asks of an operator or a module: transforms, compilers, autocast, memory formats, copies, processes."""

import copy
import gc
import importlib
import inspect
import io
import textwrap
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import shiftkern
from shiftkern import NotDifferentiableError, _library, attention, norm, ot, peft, rotation, tta
from shiftkern.attention import BlockMask

from helpers.peft import cases
from helpers.process import output
from helpers.samples import PATHS, SAMPLES, detached, tensors_of
from helpers.strategies import make

FAMILIES = ("norm", "ot", "tta", "attention", "merge", "rotation", "peft")


def operator(name):
    return getattr(torch.ops.shiftkern, name).default


def written(name):
    """Positions of the arguments that an operator writes to."""
    arguments = operator(name)._schema.arguments
    return [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


# --- torch.vmap ------------------------------------------------------------------------------------------------------


def two_instances(name, arguments):
    """Arguments with an axis for two instances where it matters, and the axes."""
    flat, structure = pytree.tree_flatten(arguments)
    leaves = [leaf for i in written(name) for leaf in pytree.tree_leaves(arguments[i])]
    leaves.append(next(t for t in flat if isinstance(t, torch.Tensor) and t.is_floating_point()))
    batched = [isinstance(t, torch.Tensor) and any(t is leaf for leaf in leaves) for t in flat]
    stacked = [
        torch.stack([t, t.flip(0) if t.dim() else t + 1]) if own else t for t, own in zip(flat, batched, strict=True)
    ]
    axes = pytree.tree_unflatten([0 if own else None for own in batched], structure)
    return pytree.tree_unflatten(stacked, structure), axes


def instance(arguments, axes, i):
    flat, structure = pytree.tree_flatten(arguments)
    chosen = [t if axis is None else t[i].clone() for t, axis in zip(flat, pytree.tree_leaves(axes), strict=True)]
    return pytree.tree_unflatten(chosen, structure)


def _returning(name):
    """The operator, with something to return where it returns nothing, as torch.vmap demands."""

    def call(*arguments):
        result = operator(name)(*arguments)
        return tensors_of([arguments[i] for i in written(name)])[0].clone() if result is None else result

    return call


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_vmap_equals_one_call_for_each_instance(name):
    for sample in SAMPLES[name]():
        arguments, axes = two_instances(name, detached(sample))
        try:
            alone = [instance(arguments, axes, i) for i in range(2)]
            expected = [tensors_of(operator(name)(*own)) + tensors_of([own[i] for i in written(name)]) for own in alone]
        except shiftkern.ShiftkernError as error:
            # What is refused alone is refused together.
            with pytest.raises(type(error)):
                torch.vmap(_returning(name), in_dims=axes)(*arguments)
            continue
        found = torch.vmap(_returning(name), in_dims=axes)(*arguments)
        returned = [] if not operator(name)._schema.returns else tensors_of(found)
        results = returned + tensors_of([arguments[i] for i in written(name)])
        assert len(results) == len(expected[0])
        for i, own in enumerate(expected):
            for a, b in zip(results, own, strict=True):
                torch.testing.assert_close(a[i], b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in _library.OPERATORS if written(name)])
def test_vmap_over_one_target_is_refused(name):
    arguments = detached(SAMPLES[name]()[0])
    flat, structure = pytree.tree_flatten(arguments)
    targets = [leaf for i in written(name) for leaf in pytree.tree_leaves(arguments[i])]
    sources = [isinstance(t, torch.Tensor) and all(t is not leaf for leaf in targets) for t in flat]
    stacked = [torch.stack([t, t]) if source else t for t, source in zip(flat, sources, strict=True)]
    axes = pytree.tree_unflatten([0 if source else None for source in sources], structure)
    with pytest.raises(shiftkern.ArgumentError, match=rf"^{name}: argument 'in_dims'"):
        torch.vmap(_returning(name), in_dims=axes)(*pytree.tree_unflatten(stacked, structure))


# --- torch.func ------------------------------------------------------------------------------------------------------


def _differentiable(name):
    """Samples that ask for gradients, and the positions of the tensors that do."""
    for sample in SAMPLES[name]():
        positions = [i for i, t in enumerate(sample) if isinstance(t, torch.Tensor) and t.requires_grad]
        if positions:
            yield detached(sample), positions


def _value(name, arguments, positions):
    """A function of the tensors at ``positions``."""

    def value(*tensors):
        own = list(arguments)
        for i, t in zip(positions, tensors, strict=True):
            own[i] = t
        results = [t for t in tensors_of(operator(name)(*own)) if t.is_floating_point()]
        # Of some operators statistics come along that have no gradient, of channel_moments the first.
        return (results[2] if name == "channel_moments" else results[0]).square().sum()

    return value


_WITH_GRADIENT = [name for name in _library.OPERATORS if next(_differentiable(name), None)]


def test_operators_with_gradients_are_known():
    # soft_order, diffsort, samples_apply .. all ask for gradients in some sample.
    assert len(_WITH_GRADIENT) >= 18


@pytest.mark.parametrize("name", _WITH_GRADIENT)
def test_func_grad_equals_autograd(name):
    for arguments, positions in _differentiable(name):
        value = _value(name, arguments, positions)
        tensors = [arguments[i].clone().requires_grad_() for i in positions]
        expected = torch.autograd.grad(value(*tensors), tensors)
        plain = [t.detach() for t in tensors]
        found = torch.func.grad(value, argnums=tuple(range(len(plain))))(*plain)
        _, pull = torch.func.vjp(value, *plain)
        pulled = pull(torch.ones((), dtype=value(*plain).dtype))
        for a, b, c in zip(expected, found, pulled, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("name", _WITH_GRADIENT)
def test_second_derivatives_by_transform_raise(name):
    for arguments, positions in _differentiable(name):
        value = _value(name, arguments, positions)
        tensors = [arguments[i] for i in positions]

        def slope(*own, value=value):
            return torch.func.grad(value)(*own).square().sum()

        with pytest.raises(NotDifferentiableError):
            torch.func.grad(slope)(*tensors)
        with pytest.raises(NotDifferentiableError):
            torch.func.hessian(value)(*tensors)


@pytest.mark.parametrize("name", [n for n in _library.OPERATORS if n not in _WITH_GRADIENT and not written(n)])
def test_func_grad_of_a_building_block_raises(name):
    arguments = detached(SAMPLES[name]()[0])
    flat, structure = pytree.tree_flatten(arguments)
    at = next(i for i, t in enumerate(flat) if isinstance(t, torch.Tensor) and t.is_floating_point())

    def value(x):
        own = [*flat[:at], x, *flat[at + 1 :]]
        return [t for t in tensors_of(operator(name)(*pytree.tree_unflatten(own, structure))) if t.is_floating_point()]

    if not value(flat[at]):
        pytest.skip("whole numbers only")
    with pytest.raises(NotDifferentiableError, match=rf"^{name}: "):
        torch.func.grad(lambda x: sum(t.sum() for t in value(x)))(flat[at])


def test_per_sample_gradients():
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    xs = make((4, 5, 3, 7), torch.float64)

    def value(x):
        return norm.mixed_batch_norm(x, mean, var, source_weight=0.4).square().sum()

    found = torch.func.vmap(torch.func.grad(value))(xs)
    for x, g in zip(xs, found, strict=True):
        assert torch.equal(torch.func.grad(value)(x), g)


def test_jacobian_by_rows():
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    x = make((3, 2, 2), torch.float64)

    def function(x):
        return norm.mixed_batch_norm(x, mean, var, source_weight=0.4)

    expected = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(torch.func.jacrev(function)(x), expected)


_FUNCTIONS = {
    "sinkhorn": (lambda M: ot.sinkhorn(None, None, M, 0.5).value, (5, 4)),
    "entmax": (lambda x: attention.entmax(x, 1.5).square().sum(), (3, 7)),
    "pointer": (lambda x: attention.pointer(x, x[:, :2], *_POINTER).square().sum(), (2, 5, 4)),
    "polar": (lambda x: (rotation.polar(x) * torch.arange(12.0).view(4, 3)).sum(), (4, 3)),
    "householder_reflect": (lambda x: rotation.householder_reflect(x, torch.ones(4)).square().sum(), (5, 4)),
}
_POINTER = (make((6, 4), seed=1), make((6, 4), seed=2), make((6,), seed=3))


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_func_grad_of_public_functions(name):
    function, shape = _FUNCTIONS[name]
    x = make(shape).abs()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(function)(x), expected)


def test_entmax_below_vmap():
    x = make((3, 4, 5))
    for alpha in (1.3, 1.5, 2.0):
        found = torch.vmap(lambda row, alpha=alpha: attention.entmax(row, alpha))(x)
        assert torch.equal(found, attention.entmax(x, alpha))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_free_what_an_operator_saved():
    mean, var = torch.zeros(3), torch.ones(3)
    seen = []

    def part(x):
        hidden = x * 2.0
        seen.append(weakref.ref(hidden))
        return norm.mixed_batch_norm(hidden, mean, var, source_weight=0.4)

    x = make((4, 3, 5)).requires_grad_()
    y = checkpoint(part, x, use_reentrant=False)
    gc.collect()
    assert seen[0]() is None
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(part(x).square().sum(), x)
    assert torch.equal(found, expected)


def test_a_source_that_is_not_needed_may_be_written_to():
    # cayley saves its result: what it came from is free.
    skew = make((2, 6), torch.float64).requires_grad_()
    hidden = skew * 1.0
    turned = operator("cayley")(hidden, 4)
    with torch.no_grad():
        hidden.zero_()
    (found,) = torch.autograd.grad(turned[:, 0, 1].sum(), skew)
    (expected,) = torch.autograd.grad(operator("cayley")(skew, 4)[:, 0, 1].sum(), skew)
    assert torch.equal(found, expected)
    hidden = skew * 1.0
    (first,) = torch.autograd.grad(operator("cayley")(hidden, 4)[:, 0, 1].sum(), skew, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="cayley"):
        first.sum().backward()


# --- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_autocast_changes_no_operator(name):
    for sample in SAMPLES[name]():
        for run in PATHS[name][0], operator(name):
            ours, theirs = detached(sample), detached(sample)
            with torch.no_grad():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    left = tensors_of(run(*ours)) + tensors_of(ours)
                right = tensors_of(run(*theirs)) + tensors_of(theirs)
            for a, b in zip(left, right, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# --- models of each family -------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Attention of several kinds, one after the other, over tokens of a grid."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)
        # Each of 16 queries keeps the keys of its own block of 4.
        self.mask = BlockMask.from_bool(torch.block_diag(*[torch.ones(4, 4)] * 4)[None, None] > 0, (4, 4))
        self.local = attention.LocalGlobalAttention(4)
        self.codes = attention.PolyEncoder(8, 3)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        sparse = attention.sparse_attention(q, k, v, self.mask)
        grid = [t.unflatten(2, (4, 4)) for t in (q, k, v)]
        near = attention.neighborhood(*grid, 3).flatten(2, 3)
        merged = (sparse + near + self.local(q, k, v)).transpose(1, 2).flatten(2)
        return self.codes(merged, merged[:, :2])


class _Rotation(nn.Module):
    def __init__(self):
        super().__init__()
        self.sandwich = rotation.SandwichLinear(8, 8, seed=0)
        self.skew = nn.Parameter(0.3 * make((2, 6)))
        self.theta = nn.Parameter(make((7,)))
        self.u = nn.Parameter(make((8, 2)))

    def forward(self, x):
        x = rotation.cayley_rotate(self.sandwich(x), self.skew, block_size=4)
        return rotation.householder_chain(rotation.givens_rotate(x, self.theta), self.u)


def _convnet(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))


def _adapted(config):
    torch.manual_seed(0)
    model = peft.inject(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * make(tuple(p.shape), p.dtype, 3))
    return model


def _build(make_model):
    torch.manual_seed(0)
    return make_model()


IMAGES, ROWS, TOKENS = make((5, 3, 6, 6)), make((5, 8)), make((2, 16, 8))
MODELS = {
    "norm alpha": (lambda: _convnet(norm.AlphaBatchNorm(6)), IMAGES),
    "norm unmix": (lambda: _convnet(norm.UnMixTNS(6, 4)).eval(), IMAGES),
    "norm style": (lambda: _convnet(norm.StyleShift(make((2, 6)), make((2, 6)).square() + 1)), IMAGES),
    "tta alpha": (lambda: tta.AlphaBN(_convnet(nn.BatchNorm2d(6)).eval()).model, IMAGES),
    "attention": (_Attention, TOKENS),
    "rotation": (_Rotation, ROWS),
    **{
        f"peft {type(config).__name__}": (lambda config=config: _adapted(config), ROWS)
        for config in (
            peft.LoRAConfig(r=2, target_modules=["0", "2"]),
            peft.OFTConfig(block_size=4, target_modules=["0", "2"]),
            peft.BOFTConfig(block_size=4, target_modules=["0", "2"]),
            peft.GOFTConfig(target_modules=["0", "2"]),
            peft.HRAConfig(r=2, target_modules=["0", "2"]),
            peft.SSFConfig(target_modules=["0", "2"]),
            peft.IA3Config(target_modules=["0", "2"]),
        )
    },
}


def test_every_family_with_modules_is_among_the_models():
    assert {name.split()[0] for name in MODELS} | {"ot", "merge"} == set(FAMILIES)  # ot is in test_compile.py


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_compiles_whole(name, fresh_compiler):
    make_model, x = MODELS[name]
    eager, model = _build(make_model), _build(make_model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, theirs = compiled(x), eager(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_exported(name):
    make_model, x = MODELS[name]
    program = torch.export.export(_build(make_model), (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), _build(make_model)(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_under_autocast(name):
    make_model, x = MODELS[name]
    exact = _build(make_model)(x)
    model = _build(make_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1 * float(exact.detach().abs().max()))
    y.float().square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in trained)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][1] is IMAGES])
def test_channels_last_stays_channels_last(name):
    make_model, x = MODELS[name]
    model = _build(make_model)
    expected = model[:2](x)
    last = _build(make_model).to(memory_format=torch.channels_last)
    found = last[:2](x.to(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)


# --- modules ---------------------------------------------------------------------------------------------------------


HEADS = tuple(make((1, 2, 8, 4), seed=i) for i in range(3))


def _classifier(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return model.eval()


def _mask():
    return BlockMask.from_bool(torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(), (4, 4))


_STYLES = {"1": (torch.zeros(2, 4), torch.ones(2, 4))}

#: For every public module: how to make it from a seed, and what it is called with.
MODULES = {
    "norm.AlphaBatchNorm": (lambda s: norm.AlphaBatchNorm(3), (IMAGES,)),
    "norm.DecayBatchNorm": (lambda s: norm.DecayBatchNorm(3), (IMAGES,)),
    "norm.StyleShift": (lambda s: norm.StyleShift(make((2, 3), seed=s), torch.ones(2, 3)), (IMAGES,)),
    "norm.UnMixTNS": (lambda s: norm.UnMixTNS(3, 4, seed=s), (IMAGES,)),
    "ot.WCoRDCritic": (lambda s: ot.WCoRDCritic(8, 8, hidden=4), (ROWS, ROWS.flip(0))),
    "attention.GatedCache": (lambda s: attention.GatedCache(nn.Linear(8, 8)), (TOKENS,)),
    "attention.gated_cache": (lambda s: attention.gated_cache(nn.Linear(8, 8)), (TOKENS,)),
    "attention.LocalGlobalAttention": (lambda s: attention.LocalGlobalAttention(4), HEADS),
    "attention.PolyEncoder": (lambda s: attention.PolyEncoder(8, 3), (TOKENS, TOKENS[:, :2])),
    "attention.Reattention": (lambda s: attention.Reattention(_mask()), HEADS),
    "rotation.DAS": (lambda s: rotation.DAS(8, 2, seed=s), (ROWS, ROWS.flip(0))),
    "rotation.BoundlessDAS": (lambda s: rotation.BoundlessDAS(8, seed=s), (ROWS, ROWS.flip(0))),
    "rotation.SandwichLinear": (lambda s: rotation.SandwichLinear(8, 4, seed=s), (ROWS,)),
    "rotation.SandwichNet": (lambda s: rotation.SandwichNet([8, 6, 3], seed=s), (ROWS,)),
    "peft.PHMLinear": (lambda s: peft.PHMLinear(8, 4, 2, seed=s), (ROWS,)),
    "peft.ReversibleBlock": (lambda s: peft.ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8)), (ROWS, ROWS.flip(0))),
    "peft.ReversibleSequence": (
        lambda s: peft.ReversibleSequence([peft.ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8))]),
        (ROWS,),
    ),
    **{
        f"tta.{name}": (lambda s, method=method: method(_classifier(s)), (IMAGES,))
        for name, method in {
            "Source": tta.Source,
            "BatchNormAdapt": tta.BatchNormAdapt,
            "AlphaBN": tta.AlphaBN,
            "UnMix": lambda m: tta.UnMix(m, num_components=3),
            "Tent": tta.Tent,
            "CoTTA": lambda m: tta.CoTTA(m, num_augmentations=2),
            "RMT": lambda m: tta.RMT(m, prototypes=torch.eye(3, 64)),
            "OSUDA": tta.OSUDA,
            "LAME": tta.LAME,
            "StyleShifting": lambda m: tta.StyleShifting(m, _STYLES),
        }.items()
    },
}
_WITHOUT = {
    "tta.Method": "abstract",
    "tta.GradientMethod": "abstract",
    "peft.ProjectAndProbe": "fits itself to features; tests/peft/test_project_and_probe.py",
}


def test_every_public_module_is_known():
    found = set()
    for family in FAMILIES:
        package = importlib.import_module(f"shiftkern.{family}")
        for name in package.__all__:
            if inspect.isclass(thing := getattr(package, name)) and issubclass(thing, nn.Module):
                found.add(f"{family}.{name}")
    assert found == set(MODULES) | set(_WITHOUT)


def _made(name, seed):
    torch.manual_seed(seed)
    module = MODULES[name][0](seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.01 * make(tuple(p.shape), p.dtype, seed))
    return module


def _outputs(name, module):
    torch.manual_seed(9)
    results = pytree.tree_leaves(module(*(t.clone() for t in MODULES[name][1])))
    return [t.detach().clone() for t in results if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", MODULES)
def test_a_copy_is_independent_and_equal(name):
    module = _made(name, 0)
    twin = copy.deepcopy(module)
    for _ in range(2):  # what a module learns from a batch is copied, too
        expected, found = _outputs(name, module), _outputs(name, twin)
        assert expected
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert p.data_ptr() != q.data_ptr() or p.numel() == 0
    again = copy.deepcopy(module)  # after calls, which leave graphs and caches behind
    assert all(torch.equal(a, b) for a, b in zip(_outputs(name, again), _outputs(name, module), strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_a_state_passes_through_a_file_that_holds_no_code(name):
    module = _made(name, 0)
    _outputs(name, module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = _made(name, 1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(_outputs(name, other), _outputs(name, module), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("method", "case"), cases(), ids=[method for method, _ in cases()])
def test_an_adapted_state_passes_through_a_file_that_holds_no_code(method, case):
    model, twin = case.trained(method), case.injected(method)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = case.inputs(torch.float32)
    assert torch.equal(twin(x), model(x))


# --- several processes -----------------------------------------------------------------------------------------------

_TWO_RANKS = """
    import sys
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from shiftkern import norm, peft

    torch.set_num_threads(1)

    def build(config):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), norm.AlphaBatchNorm(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.Linear(12, 4)
        )
        model = peft.inject(model, config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        model[1].requires_grad_(True)  # the normalization learns as well
        return model

    CONFIGS = [
        peft.LoRAConfig(r=2, target_modules=["4", "5"], seed=0),
        peft.OFTConfig(block_size=4, target_modules=["4", "5"]),
        peft.HRAConfig(r=2, target_modules=["4", "5"], seed=0),
    ]
    X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(2))

    def gradients(model, x):
        model.zero_grad()
        model(x).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    def work(rank, store, out):
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        results = []
        for config in CONFIGS:
            parallel = DistributedDataParallel(build(config))
            own = gradients(parallel, X[4 * rank : 4 * rank + 4])
            results.append({name.removeprefix("module."): g for name, g in own.items()})
            optimizer = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], 0.1)
            optimizer.step()
            results.append({n: p.detach().clone() for n, p in parallel.module.named_parameters()})
        torch.save(results, f"{out}.{rank}")
        dist.destroy_process_group()

    if __name__ == "__main__":
        store, out = sys.argv[1:]
        mp.start_processes(work, (store, out), nprocs=2, start_method="fork")
        first, second = (torch.load(f"{out}.{rank}") for rank in range(2))
        for i, config in enumerate(CONFIGS):
            halves = [gradients(build(config), part) for part in X.chunk(2)]
            assert len(halves[0]) >= 4, halves[0].keys()
            for name in halves[0]:
                mean = (halves[0][name] + halves[1][name]) / 2
                torch.testing.assert_close(first[2 * i][name], mean)
                assert torch.equal(first[2 * i][name], second[2 * i][name]), name
            for name, value in first[2 * i + 1].items():
                assert torch.equal(value, second[2 * i + 1][name]), name
        print("equal", len(CONFIGS))
"""


def test_two_processes_train_adapters_as_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(_TWO_RANKS))
    runner = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert output(runner, str(tmp_path / "store"), str(tmp_path / "out"), deadline=90).endswith("equal 3")
