"""Valid calls of every public name, to be spoilt by ``helpers.fuzz``."""

from __future__ import annotations

import copy
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn

import shiftkern
from shiftkern import attention, merge, norm, ot, peft, rotation, tta
from shiftkern.attention import BlockMask
from shiftkern.errors import ShiftkernError
from shiftkern.peft._adapter import METHODS

from helpers.fuzz import Arguments, CallersError, Draw, Recipe
from helpers.peft import CASES, Case, train

#: Recipes by name; several where a class or function has several sides.
RECIPES: dict[str, list[Recipe]] = defaultdict(list)

#: Public names without a recipe, and why: results of functions, which are made by those functions alone.
WITHOUT: dict[str, str] = {
    "attention.KVShiftState": "is an empty state; kv_shift fills it, and is called with one",
    "attention.SelectedMask": "a tuple of results of select_mask",
    "merge.ActivationMatch": "a record of results of activation_matching",
    "merge.FusedLayer": "a tuple of results of otfusion_layer",
    "merge.MergeConfig": "a record of results of read_config",
    "merge.MergeReport": "a record of results of merge_files",
    "merge.SensMergingResult": "a record of results of sens_merging",
    "merge.SignedTaskVector": "made by bitdelta_compress",
    "merge.TernaryTaskVector": "made by compeft_compress",
    "merge.WeightMatchingResult": "a record of results of weight_matching",
    "ot.PTMapResult": "a record of results of pt_map",
    "ot.PutmResult": "a record of results of putm",
    "ot.ShardedSinkhornResult": "made by sinkhorn_sharded",
    "ot.SwapResult": "a record of results of swap_prune",
    "peft.CloverFactors": "a record of results of clover_decompose",
    "peft.CloverPruned": "a record of results of clover_prune",
    "tta.GradientMethod": "a base class to derive from",
    "tta.Method": "a base class to derive from",
}


def recipe(
    name: str, make: Callable[[Draw], Arguments], call: Callable[..., Any] | None = None, **settings: Any
) -> None:
    package, _, function = name.partition(".")
    settings.setdefault("arrays", package == "ot")
    call = call or getattr(getattr(shiftkern, package), function)
    RECIPES[name].append(Recipe(name, make, call, **settings))


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function in a group of one process."""

    def call(**arguments: Any) -> Any:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            return function(**arguments)
        finally:
            dist.destroy_process_group()

    return call


def as_the_model(model: Any, x: Any, call: Callable[[], Any]) -> Any:
    """Make a call that applies a model to ``x``; an error that the bare model raises for ``x``, too, is its own."""
    if not isinstance(model, nn.Module):
        return call()
    bare = copy.deepcopy(model)
    try:
        return call()
    except ShiftkernError:
        raise
    except Exception as error:
        try:
            bare(x)
        except Exception as own:
            raise CallersError from own
        raise error


# --- norm -------------------------------------------------------------------------------------------------------------


def activations(d: Draw) -> Tensor:
    shape = d.choice([(4, 3), (2, 3, 5), (2, 3, 4, 4), (3, 4, 2, 3), (1, 2, 3, 2, 2), (5, 1), (2, 33, 3)])
    return d.normal(*shape, dtype=d.dtype())


def batch_norm(d: Draw) -> Arguments:
    x = activations(d)
    c = x.shape[1]
    affine = {"weight": d.normal(c), "bias": d.normal(c)} if d.chance(0.5) else {}
    chosen = d.options(eps=[1e-5, 1e-3], unbiased=[False, True])
    statistics = {"running_mean": d.normal(c), "running_var": d.positive(c)}
    return {"x": x, **statistics, **affine, "source_weight": d.choice([0.0, 0.3, 1.0]), **chosen}


def layer(d: Draw, **choices: Any) -> Arguments:
    x = d.choice([d.normal(4, 3), d.normal(2, 3, 5), d.normal(2, 3, 4, 4)])
    return {"num_features": 3, "x": x, **d.options(eps=[1e-5, 1e-3], affine=[True, False], **choices)}


def styles(d: Draw) -> Arguments:
    x = d.choice([d.normal(2, 3, 5, dtype=d.dtype()), d.normal(2, 3, 4, 4)])
    some = {"style_mean": d.normal(2, 3), "style_std": d.positive(2, 3)}
    return {"x": x, **some, **d.options(threshold=[0.5, 4.0, None], eps=[1e-5, 1e-2])}


def unmix(d: Draw) -> Arguments:
    x = activations(d)
    c = x.shape[1]
    affine = {"weight": d.normal(c), "bias": d.normal(c)} if d.chance(0.5) else {}
    some = {"component_mean": d.normal(4, c), "component_var": d.positive(4, c)}
    return {"x": x, **some, **affine, **d.options(temperature=[0.07, 1.0], eps=[1e-5], cross_term=[False, True])}


def moments(d: Draw) -> Arguments:
    x = activations(d)
    mask = {"mask": d.normal(x.shape[0], *x.shape[2:], layouts=False) > -0.5} if d.chance(0.3) else {}
    return {"x": x, **mask, **d.options(dim=[1], per_instance=[False, True])}


def cnn(d: Draw) -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3)).eval()


def images(d: Draw) -> Tensor:
    return d.normal(5, 1, 6, 6).sigmoid()


def used(kind: Callable[..., Callable[[Tensor], Any]]) -> Callable[..., Any]:
    return lambda x, **options: as_the_model(options.get("model"), x, lambda: kind(**options)(x))


recipe("norm.AlphaBatchNorm", lambda d: layer(d, source_weight=[0.0, 0.8], unbiased=[True]), used(norm.AlphaBatchNorm))
recipe("norm.DecayBatchNorm", lambda d: layer(d, eta0=[0.0, 1.0]), used(norm.DecayBatchNorm))
recipe("norm.StyleShift", styles, used(norm.StyleShift), like="x")
recipe(
    "norm.UnMixTNS",
    lambda d: layer(d, num_components=[1, 4], temperature=[0.07, 1.0], cross_term=[False, True], seed=[0, 3]),
    used(norm.UnMixTNS),
)
recipe(
    "norm.Moments",
    lambda d: {
        "count": torch.tensor(4.0),
        "mean": d.normal(3),
        "m2": d.positive(3),
        "unbiased": d.choice([True, False]),
    },
    lambda unbiased, **parts: norm.Moments(**parts).var(unbiased=unbiased),
)
recipe(
    "norm.all_reduce_moments",
    lambda d: {"m": norm.channel_moments(d.normal(4, 3)), "group": None},
    alone(norm.all_reduce_moments),
)
recipe("norm.channel_moments", moments)
recipe(
    "norm.merge_moments",
    lambda d: {"a": norm.channel_moments(d.normal(4, 3)), "b": norm.channel_moments(d.normal(2, 3, 2))},
)
recipe(
    "norm.ema_update_",
    lambda d: {
        "tensors": [d.normal(3), d.normal(2, 5), d.normal()],
        "values": [d.normal(3), d.normal(2, 5), d.normal()],
        "momentum": d.choice([0.0, 0.3, 1.0]),
    },
    writes=True,
)
recipe("norm.mixed_batch_norm", batch_norm, like="x")
recipe("norm.mixed_batch_norm_", batch_norm, like="x", writes=True)
recipe("norm.style_shift", styles, like="x")
recipe("norm.unmix_norm", unmix, like="x")
for kind, choices in (
    ("alpha", {"source_weight": [0.3]}),
    ("unmix", {"num_components": [3]}),
    ("decay", {"eta0": [0.5]}),
):
    recipe(
        "norm.convert_norm",
        lambda d, kind=kind, choices=choices: {"model": cnn(d), "kind": kind, **d.options(**choices)},  # type: ignore[misc]
        atomic=True,
    )
recipe("norm.revert_norm", lambda d: {"model": norm.convert_norm(cnn(d), "alpha")}, atomic=True)


# --- ot ---------------------------------------------------------------------------------------------------------------


def transport(d: Draw, least: float = 0.3) -> Arguments:
    dtype = d.dtype(half=False)
    n, m = d.randint(1, 7), d.randint(1, 7)
    weights = {"a": d.weights(n, dtype=dtype), "b": d.weights(m, dtype=dtype)}
    return {**weights, "M": d.positive(n, m, dtype=dtype), "reg": d.choice([least, 1.0])}


_SOLVER = {
    "max_iter": [5, 50],
    "tol": [1e-3, None],
    "omega": [1.0, 1.3],
    "method": ["log", "auto", "scaling"],
    "update_order": ["fg", "gf"],
    "grad": ["envelope", "detach", "implicit"],
}
_UNBALANCED = {"reg_m": [1.0, (0.5, 2.0), None], "reg_m_type": ["kl"]}


def points(d: Draw, width: int = 3, most: int = 7) -> Tensor:
    return d.normal(d.randint(2, most), width, dtype=d.dtype(half=False))


def pair(d: Draw, width: int = 3) -> tuple[Tensor, Tensor]:
    dtype = d.dtype(half=False)
    return d.normal(d.randint(2, 7), width, dtype=dtype), d.normal(d.randint(2, 7), width, dtype=dtype)


def samples(d: Draw) -> Arguments:
    X, Y = pair(d)
    weights = {"a": d.weights(len(X), dtype=X.dtype), "b": d.weights(len(Y), dtype=X.dtype)} if d.chance(0.5) else {}
    return {"X": X, "Y": Y, "reg": d.choice([0.5, 2.0]), **weights}


def batch(d: Draw) -> Arguments:
    size, n, m, dtype = d.randint(1, 3), d.randint(1, 5), d.randint(1, 5), d.dtype(half=False)
    weights = {"a": d.weights(size, n, dtype=dtype), "b": d.weights(size, m, dtype=dtype)} if d.chance(0.5) else {}
    reg = d.choice([0.5, torch.full((size,), 0.7, dtype=dtype)])
    return {"M": d.positive(size, n, m, dtype=dtype), "reg": reg, **weights}


def outcome(a: Any, b: Any, M: Any, reg: Any, V: Any, threshold: Any) -> Any:
    result = ot.sinkhorn(a, b, M, reg, max_iter=20)
    first = result.apply(V), result.barycentric(V), result.apply_t(result.apply(V))
    return [*first, result.plan(), result.value, result.plan_csr(threshold), result.marginal_error, result.log_u]


def matrix(d: Draw) -> Tensor:
    return d.normal(*d.choice([(5,), (3, 4), (2, 3, 5), (1, 1)]), dtype=d.dtype(half=False))


def few_shots(d: Draw) -> Arguments:
    labels = d.choice([torch.tensor([0, 1]), torch.tensor([1, 0])])
    return {"support": d.positive(2, 3), "support_labels": labels, "query": d.positive(d.choice([4, 6]), 3)}


recipe(
    "ot.SinkhornResult",
    lambda d: {**(p := transport(d)), "V": d.normal(p["M"].shape[1], 2, dtype=p["M"].dtype), "threshold": 1e-8},
    outcome,
    finite=False,
)
recipe(
    "ot.ProximalResult",
    lambda d: {"a": d.weights(3), "b": d.weights(4), "M": d.positive(3, 4), "n_iter": 5},
    lambda **options: ot.proximal_ot(**options).plan(),
)
recipe(
    "ot.SparseShiftMap",
    lambda d: {"X": (X := d.normal(8, 3)), "Y": X + 1.0, "k": 2, "method": d.choice(["sparse", "mean", "cluster"])},
    lambda X, **options: ot.sparse_shift_map(X, **options).transform(X),
)
recipe(
    "ot.WCoRDCritic",
    lambda d: {"student_dim": 4, "teacher_dim": 6, "hidden": 8, "depth": 2, "s": d.normal(3, 4), "t": d.normal(3, 6)},
    lambda s, t, **options: ot.WCoRDCritic(**options)(s, t),
    arrays=False,
)
recipe("ot.cubic_sparsity", lambda d: {"step": 3, "total": 10, "final": 0.8, **d.options(initial=[0.1])})
recipe(
    "ot.conditional_transport",
    lambda d: dict(zip("XY", pair(d), strict=True)) | d.options(rho=[0.0, 0.3], reg=[0.5], return_plans=[True]),
)
recipe(
    "ot.diffsort",
    lambda d: (
        {"x": d.normal(*d.choice([(5,), (3, 4), (1, 1)]), dtype=d.dtype(half=False))}
        | d.options(
            network=["bitonic", "odd_even"],
            steepness=[1.0, 20.0],
            distribution=["cauchy", "logistic", "reciprocal", "optimal"],
            error_free=[False],
        )
    ),
    like="x",
)
recipe(
    "ot.emd_1d",
    lambda d: (
        {"x": d.normal(n := d.randint(1, 6)), "y": d.normal(m := d.randint(1, 6))}
        | d.options(a=[d.weights(n)], b=[d.weights(m)], p=[1, 2, 1.5])
    ),
)
recipe(
    "ot.emo_loss",
    lambda d: (
        {"logits": d.normal(4, 6), "labels": d.integers(0, 6, 4), "embedding": d.normal(6, 3)}
        | d.options(ignore_index=[-100, 2], reduction=["mean", "sum", "none"], cross_entropy=[True])
    ),
    finite=False,
)
recipe(
    "ot.linear_assignment", lambda d: {"C": d.normal(*d.choice([(3, 3), (2, 4), (4, 2)])), **d.options(maximize=[True])}
)
recipe(
    "ot.multi_assign",
    lambda d: (
        {"scores": d.normal(4, 6), "anchors": 2}
        | d.options(reg=[0.07, 1.0], n_iter=[2, 20], scales=["two"], return_plan=[True])
    ),
)
recipe(
    "ot.proximal_ot",
    lambda d: (
        {"a": d.weights(3), "b": d.weights(4), "M": d.positive(3, 4)}
        | {"n_iter": d.choice([2, 20])}
        | d.options(beta=[0.5], inner=[1, 5], tol=[1e-3])
    ),
    finite=False,
)
recipe(
    "ot.pt_map",
    lambda d: (
        few_shots(d) | d.options(beta=[0.5, 1.0], lam=[10.0], alpha=[0.2], n_steps=[2], tol=[1e-4], max_iter=[50])
    ),
)
recipe(
    "ot.putm",
    lambda d: (
        few_shots(d)
        | {"n_iter": 2, "inner_steps": 2, "hidden": 4}
        | d.options(lr=[1e-2], alpha=[0.5, None], rho=[0.3], theta=[0.1], power=[None, 0.5], seed=[1])
    ),
)
recipe(
    "ot.sela_assign",
    lambda d: {
        "log_probs": d.weights(5, 3).log(),
        "lam": d.choice([2.0, 25.0]),
        **d.options(tol=[0.01], max_iter=[50]),
    },
)
recipe(
    "ot.sinkhorn",
    lambda d: transport(d) | d.options(**_SOLVER),
    lambda **o: [(r := ot.sinkhorn(**o)).plan(), r.value],
    finite=False,
)
recipe(
    "ot.sinkhorn",
    lambda d: (
        transport(d)
        | {"method": "log"}
        | d.options(**_UNBALANCED, max_iter=[5, 50])
        | ({"reg_init": 5.0, "reg_decay": 0.5} if d.chance(0.3) else {})
    ),
    lambda **o: [(r := ot.sinkhorn(**o)).plan(), r.value_linear],
    finite=False,
)
recipe(
    "ot.sinkhorn_assign",
    lambda d: {
        "scores": d.normal(5, 3, dtype=d.dtype(half=False)),
        **d.options(reg=[0.05, 1.0], n_iter=[1, 5], hard=[True]),
    },
)
recipe(
    "ot.sinkhorn_batch",
    lambda d: batch(d) | d.options(max_iter=[20], tol=[1e-3]),
    lambda **o: ot.sinkhorn_batch(**o).plan(),
)
recipe(
    "ot.sinkhorn_divergence",
    lambda d: samples(d) | d.options(cost=["sqeuclidean", "euclidean", "cosine"], debias=[False], max_iter=[20]),
)
recipe(
    "ot.sinkhorn_partial",
    lambda d: transport(d) | {"mass": 0.5} | d.options(max_iter=[20], tol=[1e-3]),
    lambda **o: ot.sinkhorn_partial(**o).plan(),
)
recipe(
    "ot.sinkhorn_samples",
    lambda d: samples(d) | d.options(cost=["sqeuclidean", "euclidean", "cosine"], max_iter=[20], omega=[1.2]),
    lambda **o: [(r := ot.sinkhorn_samples(**o)).plan(), r.value],
)
recipe("ot.sinkhorn_sharded", lambda d: {**transport(d), "group": None}, alone(ot.sinkhorn_sharded), arrays=False)
for sort in ("soft_rank", "soft_sort"):
    recipe(
        f"ot.{sort}",
        lambda d: (
            {"x": matrix(d)}
            | d.options(regularization=["l2", "kl"], regularization_strength=[0.1, 3.0], dim=[0, -1], descending=[True])
        ),
        like="x",
    )
recipe(
    "ot.sparse_shift_map",
    lambda d: (
        {"X": (X := d.normal(d.randint(4, 12), 3)), "Y": X + torch.tensor([0.0, 3.0, 0.0]), "k": 1}
        | d.options(method=["sparse", "mean", "cluster"], seed=[3])
        | ({"rank": None})
    ),
    lambda **o: ot.sparse_shift_map(**o).mapped,
)
recipe(
    "ot.style_projection",
    lambda d: {"content": d.normal(2, 3, 5), "style": d.normal(2, 3, 5), **d.options(alpha=[0.3])},
)
recipe(
    "ot.swap_prune",
    lambda d: (
        {"gradients": d.normal(8, 5), "weights": d.normal(5), "keep": d.choice([2, 3])}
        | {"n_steps": 3, "max_iter": 50}
        | d.options(reg=[1.0, 10.0], lam=[0.1], transport=[False], tol=[1e-3], sinkhorn_tol=[1e-2])
    ),
    lambda **o: ot.swap_prune(**o).weights,
)
recipe(
    "ot.wcord_loss",
    lambda d: (
        {"student": d.normal(5, 4), "teacher": d.normal(5, 4)}
        | {"global_weight": 0.0}
        | d.options(
            reg=[0.1, 1.0], cost=["cosine", "sqeuclidean"], local_weight=[0.5], normalize=[False], max_iter=[50]
        )
    ),
)
recipe(
    "ot.wcord_loss",
    lambda d: (
        {"student": d.normal(5, 4), "teacher": d.normal(5, 6), "critic": ot.WCoRDCritic(4, 6, hidden=8)}
        | {"local_weight": 0.0}
        | d.options(negatives=[2], global_weight=[0.5])
    ),
    arrays=False,
)


# --- tta --------------------------------------------------------------------------------------------------------------


def adapting(d: Draw, **choices: Any) -> Arguments:
    return {"model": cnn(d), "x": images(d), **d.options(seed=[0, 5], **choices)}


_STEPS = {"lr": [1e-3, 0.1], "steps": [1, 2], "optimizer": [torch.optim.SGD, torch.optim.Adam]}

for method, choices in {
    "AlphaBN": {"source_weight": [0.0, 0.3, 1.0]},
    "BatchNormAdapt": {},
    "CoTTA": {
        **_STEPS,
        "teacher_momentum": [0.9],
        "restore_probability": [0.0, 0.5],
        "confidence_threshold": [0.0, 1.0],
    },
    "LAME": {"affinity": ["knn", "rbf", "linear"], "k": [2], "weight": [0.1], "max_iter": [5], "features": ["5"]},
    "OSUDA": {**_STEPS, "eta0": [0.5], "entropy_weight": [0.0, 1.0]},
    "RMT": {
        **_STEPS,
        "temperature": [0.5],
        "projection_dim": [4],
        "contrastive_weight": [0.0],
        "teacher_momentum": [0.5],
    },
    "Source": {},
    "Tent": {**_STEPS, "source_weight": [0.5], "loss": [tta.softmax_entropy, tta.class_correlation_loss]},
    "UnMix": {"num_components": [2, 4], "momentum": [0.1, None]},
}.items():
    always: Arguments = {"num_augmentations": 2} if method == "CoTTA" else {}
    recipe(
        f"tta.{method}",
        lambda d, choices=choices, always=always: adapting(d, **choices) | always,  # type: ignore[misc]
        used(getattr(tta, method)),
    )
recipe(
    "tta.StyleShifting",
    lambda d: (
        {"model": cnn(d), "styles": {"0": (d.normal(2, 4), d.positive(2, 4))}, "x": images(d)}
        | d.options(threshold=[0.5], eps=[1e-3], seed=[1])
    ),
    used(tta.StyleShifting),
)
recipe(
    "tta.Augment",
    lambda d: (
        {"x": images(d), "generator": torch.Generator().manual_seed(d.randrange(99))}
        | d.options(
            degrees=[0.0, 30.0], translate=[0.1], zoom=[0.2], contrast=[0.0], brightness=[0.1], noise=[0.1], flip=[0.5]
        )
    ),
    lambda x, generator, **options: tta.Augment(**options)(x, generator),
    like="x",
)


def monitored(probs: Any) -> Any:
    monitor = tta.CollapseMonitor()
    monitor.update(probs)
    return monitor.mean_entropy, monitor.top_class_share


recipe("tta.CollapseMonitor", lambda d: {"probs": d.weights(4, 3)}, monitored)
recipe("tta.class_correlation_loss", lambda d: {"logits": d.normal(4, 3, dtype=d.dtype())})
recipe("tta.softmax_entropy", lambda d: {"logits": d.normal(4, 3, dtype=d.dtype())})
recipe("tta.symmetric_cross_entropy", lambda d: {"logits": d.normal(4, 3), "teacher_logits": d.normal(4, 3)})
recipe(
    "tta.collect_styles",
    lambda d: {
        "model": cnn(d),
        "layers": ["0"],
        "domains": [[images(d)], [images(d), images(d)]],
        **d.options(eps=[1e-3]),
    },
)
recipe(
    "tta.lame",
    lambda d: (
        {"probs": d.weights(6, 3), "features": d.normal(6, 4)}
        | d.options(
            affinity=["knn", "rbf", "linear"], k=[1, 3], weight=[0.1], max_iter=[5], tol=[1e-3], return_info=[True]
        )
    ),
    arrays=True,
    finite=False,
)


# --- attention --------------------------------------------------------------------------------------------------------


def heads(d: Draw, n: int = 9, m: int = 9, width: int = 4) -> Arguments:
    dtype, h, batch = d.dtype(), d.choice([1, 2]), d.choice([1, 2])
    shapes = (("q", n), ("k", m), ("v", m))
    return {name: d.normal(batch, h, tokens, width, dtype=dtype) for name, tokens in shapes}


def masked(d: Draw) -> Arguments:
    return {**heads(d), "mask": block_mask(d)}


def block_mask(d: Draw) -> BlockMask:
    return d.choice(
        [BlockMask.sliding_window(9, 9, 2, 1, block=(4, 4)), BlockMask.full(9, 9, (4, 4)), BlockMask.causal(9)]
    )


_SCALED: Arguments = {"scale": [0.5, None], "enable_gqa": [False]}


def attending(d: Draw) -> Arguments:
    some = masked(d)
    _, state = attention.reattention_capture(*(some[x] for x in "qkv"), some["mask"])
    return {**some, "state": state}


def windows(d: Draw) -> Arguments:
    dtype = d.dtype()
    return {name: d.normal(1, 2, 5, 6, 4, dtype=dtype) for name in "qkv"}


def aggregated(d: Draw) -> Arguments:
    some = {name: d.normal(1, 2, 4, 4, 3) for name in "qkv"} | {
        "k_pool": d.normal(1, 2, 3, 3),
        "v_pool": d.normal(1, 2, 3, 3),
    }
    more = {"bias": [d.normal(2, 3, 3)], "pool_bias": [d.normal(2, 16, 3)], "query_embedding": [d.normal(2, 3)]}
    tokens = {"tokens": d.normal(2, 3, 9), "token_bias": d.normal(2, 9)} if d.chance(0.3) else {}
    return {**some, "temperature": d.positive(2), **d.options(kernel_size=[3], **more), **tokens}


def cached(steps: int, batch: int, **options: Any) -> Any:
    layer = attention.GatedCache(lambda hidden, text: hidden + text, **options)
    both = torch.ones(batch, 3)
    return [layer(both[: batch if step < layer.gate_step else batch // 2], torch.zeros(1)) for step in range(steps)]


def reattending(x: Any, steps: int, **options: Any) -> Any:
    layer = attention.Reattention(**options)
    return [layer(x, x, x) for _ in range(steps)]


for name in ("GatedCache", "gated_cache"):
    recipe(
        f"attention.{name}",
        lambda d: (
            {"steps": 3, "batch": 4}
            | d.options(gate_step=[1, 2], kind=["cross"], guided=[True], warm_up=[1], sp_interval=[2], fi_interval=[1])
        ),
        cached,
        fixed=("steps", "batch"),
        finite=False,
    )
recipe(
    "attention.BlockMask",
    lambda d: {
        name: getattr(BlockMask.sliding_window(9, 9, 2, 1, block=(4, 4)), name)
        for name in ("shape", "block", "indptr", "indices", "inner", "patterns")
    },
    lambda **parts: BlockMask(**parts).to_dense(),
)
for made, make in {
    "from_bool": lambda d: {"mask": d.normal(1, 2, 9, 7, layouts=False) > 0, **d.options(block=[(4, 4), 2])},
    "sliding_window": lambda d: {"n_q": 9, "n_k": 9, "left": 2, "right": 1, **d.options(block=[(4, 4), 4])},
    "full": lambda d: {"n_q": 9, "n_k": 5, **d.options(block=[4])},
    "causal": lambda d: {"n_q": 9, **d.options(n_k=[12], block=[4])},
    "stack": lambda d: {"masks": [BlockMask.full(9, 9, 4), BlockMask.causal(9, block=4)]},
    "from_state_dict": lambda d: {"state": block_mask(d).state_dict()},
}.items():
    recipe("attention.BlockMask", make, lambda made=made, **o: getattr(BlockMask, made)(**o).to_dense())  # type: ignore[misc]
recipe(
    "attention.LocalGlobalAttention",
    lambda d: {
        "head_dim": 4,
        "q": d.normal(1, 2, 3, 4),
        "k": d.normal(1, 2, 5, 4),
        **d.options(win_size=[1], scale=[0.5]),
    },
    lambda q, k, **options: attention.LocalGlobalAttention(**options)(q, k, k),
)
recipe(
    "attention.PolyEncoder",
    lambda d: {
        "dim": 4,
        "context": d.normal(2, 3, 4),
        "candidates": d.normal(5, 4),
        **d.options(n_codes=[3], kind=["codes"]),
    },
    lambda context, candidates, **options: attention.PolyEncoder(**options)(context, candidates),
)
recipe(
    "attention.Reattention",
    lambda d: (
        {"x": d.normal(1, 2, 9, 4), "steps": 3, "mask": BlockMask.sliding_window(9, 9, 2, 1, block=(4, 4))}
        | d.options(
            full_steps=[1], refresh_every=[2, None], ramp=[0.1], mode=["rho", "merge"], clamp=[2.0], scale=[0.5]
        )
    ),
    reattending,
    fixed=("steps",),
)
recipe("attention.ReattentionProcessor", lambda d: {"attention": attention.Reattention(block_mask(d))})
recipe(
    "attention.ReattentionState",
    lambda d: {"state": attending(d)["state"].state_dict()},
    lambda state: attention.ReattentionState.from_state_dict(state),
)
recipe("attention.aggregated_attention", aggregated, like="q")
recipe(
    "attention.arm_gate",
    lambda d: (
        {"q": d.normal(2, 3), "x": d.normal(4, 5, 3), "values": d.normal(2, 5)}
        | d.options(alpha=[1.0, 1.5, 2.0], return_weights=[True])
    ),
)
recipe(
    "attention.attention_lse",
    lambda d: {x: t for x, t in masked(d).items() if x != "v"} | d.options(**_SCALED),
)
recipe(
    "attention.bilevel_positions",
    lambda d: {"tokens_or_is_sep": d.integers(0, 5, 2, 7), "separators": d.choice([[1], [1, 2], torch.tensor([3])])},
)
recipe("attention.bilevel_positions", lambda d: {"tokens_or_is_sep": d.normal(6, layouts=False) > 0})
recipe(
    "attention.cross_covariance_attention",
    lambda d: {name: d.normal(2, 2, 5, 3) for name in "qkv"} | d.options(temperature=[2.0, d.positive(2)], eps=[1e-6]),
    like="q",
)
recipe(
    "attention.entmax",
    lambda d: {"x": d.normal(2, 5, dtype=d.dtype()), **d.options(alpha=[1.0, 1.5, 2.0, 3.0], dim=[0, -1])},
    like="x",
)
recipe(
    "attention.fold_adapter",
    lambda d: (
        {"weight": d.normal(4, 4), "bias": d.choice([None, d.normal(4)]), "down": d.normal(2, 4), "up": d.normal(4, 2)}
        | d.options(scale=[0.1], where=["before", "after"])
    ),
)
recipe(
    "attention.kv_shift",
    lambda d: (
        {"k": d.normal(1, 2, 5, 4), "v": d.normal(1, 2, 5, 4), "alpha": d.normal(2, 2), "beta": d.normal(2, 2)}
        | d.options(state=[attention.KVShiftState()])
    ),
    like="k",
)
recipe("attention.kv_shift_init", lambda d: {"heads": 4, **d.options(generator=[torch.Generator().manual_seed(0)])})
recipe(
    "attention.local_global_attention",
    lambda d: (
        {
            "q": d.normal(1, 2, 3, 4),
            "k": d.normal(1, 2, 5, 4),
            "v": d.normal(1, 2, 5, 3),
            "gate_logits": d.normal(1, 2, 3),
        }
        | d.options(
            win_size=[0, 1], scale=[0.5], key_mask=[torch.tensor([[True, True, False, True, False]])], budget=[64]
        )
        | ({"dropout": 0.5, "generator": torch.Generator().manual_seed(0)} if d.chance(0.3) else {})
    ),
)
recipe(
    "attention.merge_state",
    lambda d: {"o_a": d.normal(2, 3, 4), "lse_a": d.normal(2, 3), "o_b": d.normal(2, 3, 4), "lse_b": d.normal(2, 3)},
    like="o_a",
)
recipe("attention.merge_states", lambda d: {"o": d.normal(3, 2, 4), "lse": d.normal(3, 2)})
recipe(
    "attention.neighborhood",
    lambda d: (
        windows(d)
        | {"kernel_size": d.choice([1, 3, (3, 5)])}
        | d.options(dilation=[1], border=["clamp", "mask"], scale=[0.5], return_lse=[True])
    ),
    like="q",
)
recipe(
    "attention.pointer",
    lambda d: (
        {"encoder_states": d.normal(2, 5, 3), "decoder_states": d.choice([d.normal(2, 4), d.normal(2, 2, 4)])}
        | {"W1": d.normal(6, 3), "W2": d.normal(6, 4), "v": d.normal(6)}
        | d.options(mask=[torch.tensor([[True] * 5, [True, False] * 2 + [True]])], budget=[64])
    ),
)
recipe(
    "attention.poly_encoder",
    lambda d: (
        {"context": d.normal(2, 4, 3), "candidates": d.normal(5, 3), "codes": d.choice([2, d.normal(3, 3)])}
        | d.options(mask=[torch.ones(2, 4, dtype=torch.bool)])
    ),
)
recipe(
    "attention.reattention_capture", lambda d: masked(d) | d.options(mode=["rho", "merge", None], **_SCALED), like="q"
)
recipe(
    "attention.reattention_step",
    lambda d: attending(d) | d.options(ramp=[0.0, 0.1], mode=["rho"], clamp=[1.0], enable_gqa=[False]),
    like="q",
)
recipe(
    "attention.select_mask",
    lambda d: (
        heads(d)
        | {"masks": [BlockMask.sliding_window(9, 9, 2, 1, block=(4, 4)), BlockMask.full(9, 9, (4, 4))]}
        | d.options(n_rows=[3], max_error=[0.5], seed=[1], **_SCALED)
    ),
    finite=False,
)
recipe(
    "attention.shifted_heads",
    lambda d: {
        "k": (k := d.normal(4, 6, 3, 2)),
        "v": k.clone(),
        "n_frames": 4,
        **d.options(shift_div=[3], stride=[1, 2]),
    },
    like="k",
)
recipe(
    "attention.sliding_window_attention",
    lambda d: heads(d) | {"window_size": (2, 1)} | d.options(n_global=[1], causal=[True], return_lse=[True], **_SCALED),
    like="q",
)
recipe("attention.sparse_attention", lambda d: masked(d) | d.options(return_lse=[True], **_SCALED), like="q")
recipe(
    "attention.topk_block_mask",
    lambda d: (
        {x: t for x, t in heads(d).items() if x != "v"}
        | {"keep": 0.5, "block": (4, 4)}
        | d.options(causal=[True], local=[1])
    ),
)


# --- merge ------------------------------------------------------------------------------------------------------------

_SHAPES: dict[str, tuple[int, ...]] = {"up.weight": (6, 4), "up.bias": (6,), "scale": (), "down": (4, 6)}
_LINEAR: dict[str, tuple[int, ...]] = {"weight": (3, 4), "bias": (3,)}


def states(d: Draw, count: int = 2, shapes: dict[str, tuple[int, ...]] = _SHAPES) -> Arguments:
    dtype = d.dtype()
    found = [d.state(shapes, dtype) for _ in range(count + 1)]
    if d.chance(0.2) and dtype != torch.bfloat16:
        found = [{name: t.numpy() for name, t in state.items()} for state in found]  # type: ignore[misc]
    return {"base": found[0], "models": found[1:]}


def merging(name: str, **choices: Any) -> None:
    always = {key: value for key, value in choices.items() if not isinstance(value, list)}
    some = {key: value for key, value in choices.items() if isinstance(value, list)}
    recipe(f"merge.{name}", lambda d: states(d) | always | d.options(**some))


_COMBINED: Arguments = {"weights": [[0.5, 1.0], None], "scale": [0.5]}
merging("breadcrumbs", density=[0.5], gamma=[0.1], then=["linear", "ties"], **_COMBINED)
merging("dare", drop_rate=0.5, seed=3, rescale=["inverse", "l1"], then=["linear", "ties"], **_COMBINED)
merging("della", density=0.6, epsilon=0.2, seed=3, then=["linear", "ties"], **_COMBINED)
merging("iso_c", scale=[0.5], rank_tol=[1e-3], average=[["down"]])
merging("iso_cts", scale=[0.5], common_fraction=[0.5, 1.0], average=[["down"]])
merging("pcb", ratio=[0.5], scale=[0.5])
merging("task_arithmetic", weights=[0.5, [0.3, 0.2]], negate=[[0], ()])
merging("ties", density=[0.5, [0.2, 0.9]], trim_scope=["tensor", "global"], convention=[None], **_COMBINED)
merging("widen", scale=[0.5], above_average=[0.5], calibration=[0.5], embeddings=[["down"]])
for pairwise in ("bitdelta", "bitdelta_compress", "compeft_compress"):
    recipe(
        f"merge.{pairwise}",
        lambda d, name=pairwise: (
            {"base": (s := states(d, 1))["base"], "model": s["models"][0]}  # type: ignore[misc]
            | (d.options(density=[0.5], alpha=[2.0], scope=["global", "tensor"]) if "compeft" in name else {})
        ),
    )
recipe(
    "merge.bitdelta_decompress",
    lambda d: {"base": (s := states(d, 1))["base"], "compressed": merge.bitdelta_compress(s["base"], s["models"][0])},
)
recipe(
    "merge.compeft_decompress",
    lambda d: {"base": (s := states(d, 1))["base"], "compressed": merge.compeft_compress(s["base"], s["models"][0])},
)
recipe(
    "merge.delta_edit",
    lambda d: (
        {"base": (s := states(d, 1))["base"], "model": s["models"][0]}
        | d.choice(
            [
                {"method": "bitdelta", "blocks": 2},
                {"method": "top", "density": 0.5},
                {"method": "expo", "alpha": 0.5},
            ]
        )
    ),
)
recipe("merge.slerp", lambda d: {"a": (s := states(d, 1))["base"], "b": s["models"][0], "t": d.choice([0.0, 0.3, 1.0])})
recipe("merge.soup", lambda d: {"models": states(d)["models"], **d.options(weights=[[0.3, 0.7], None])})
recipe(
    "merge.wise_ft",
    lambda d: {"a": (s := states(d, 1))["base"], "b": s["models"][0], "alpha": 0.3, **d.options(fisher_floor=[1e-6])},
)
recipe(
    "merge.MomentumInterpolation",
    lambda d: {
        "weights": (s := states(d, 1))["base"],
        "tau": 0.75,
        "current": s["models"][0],
        **d.options(every=[1, 2]),
    },
    lambda current, **o: ((m := merge.MomentumInterpolation(**o)).update(current), m.weights()),
)


def loss(y: Any, wanted: Any) -> Any:
    return nn.functional.mse_loss(y, wanted)


def learned(d: Draw, **choices: Any) -> Arguments:
    some = [d.state(_LINEAR) for _ in range(3)]
    return {"model": nn.Linear(4, 3), "base": some[0], "models": some[1:], **d.options(lr=[0.1], **choices)}


recipe(
    "merge.ATLAS",
    lambda d: (
        learned(d, per=["layer", "task"], init=[0.1]) | {"loss_fn": loss, "batch": (d.normal(5, 4), d.normal(5, 3))}
    ),
    lambda batch, **o: ((m := merge.ATLAS(**o)).run([batch], steps=1), m.merged()),
)
recipe(
    "merge.AdaMerging",
    lambda d: learned(d, per=["layer", "task"], init=[0.1]) | {"batch": d.normal(5, 4)},
    lambda batch, **o: ((m := merge.AdaMerging(**o)).run([batch], steps=1), m.merged()),
)
recipe(
    "merge.ConcreteMerging",
    lambda d: learned(d, scale=[0.5], temperature=[1.0], init=[0.5], seed=[1]) | {"batch": d.normal(5, 4)},
    lambda batch, **o: ((m := merge.ConcreteMerging(**o)).run([batch], steps=1), m.merged()),
)
recipe("merge.concrete", lambda d: learned(d, scale=[0.5]) | {"loader": [d.normal(5, 4)], "steps": 1})
recipe(
    "merge.sens_merging",
    lambda d: (
        {x: v for x, v in learned(d).items() if x != "lr"}
        | {"batches": [(d.normal(5, 4), d.normal(5, 3))] * 2, "loss_fn": loss}
        | d.options(temperature=[0.5], scale=[0.5], return_info=[True])
    ),
)
recipe(
    "merge.activation_matching",
    lambda d: {"acts_a": d.normal(9, 4), "acts_b": d.normal(9, 4), **d.options(method=["semi_matching"])},
    arrays=True,
)
_SPEC = {"up": ("hidden", None), "down": (None, "hidden")}


def matched(d: Draw) -> dict[str, Tensor]:
    return d.state({"up": (3, 2), "down": (2, 3)})


recipe(
    "merge.apply_permutation",
    lambda d: {"spec": dict(_SPEC), "perms": {"hidden": torch.tensor([2, 0, 1])}, "params": matched(d)},
)
recipe(
    "merge.weight_matching",
    lambda d: (
        {"spec": dict(_SPEC), "params_a": matched(d), "params_b": matched(d)}
        | d.options(
            seed=[1], max_iter=[3], tol=[1e-6], return_params=[True], init=[{"hidden": torch.tensor([1, 0, 2])}]
        )
    ),
)
recipe(
    "merge.transfer_trajectory",
    lambda d: (
        {
            "spec": {"w": ("units",)},
            "trajectory": [{"w": torch.zeros(3)}, {"w": d.normal(3)}],
            "start": {"w": torch.zeros(3)},
        }
        | {"grad_1": lambda p: {"w": p["w"] - 1.0}, "grad_2": lambda p: {"w": p["w"] - torch.arange(3.0)}}
        | d.options(fast=[False], seed=[1], max_iter=[5])
    ),
)
recipe(
    "merge.atm",
    lambda d: {
        "base": d.state(_LINEAR),
        "tune": [lambda s: {n: t + 1.0 for n, t in s.items()}],
        "steps": 2,
        **d.options(scale=[0.5]),
    },
)
recipe(
    "merge.branch_train_mix",
    lambda d: (
        {
            "models": [d.state({"0.attention": (2, 2), "0.mlp.up": (4, 2)}) for _ in range(2)],
            "feed_forward": r"\d+\.mlp",
            "width": 2,
        }
        | d.options(router_std=[0.1], seed=[1])
    ),
)
recipe(
    "merge.cross_layer_alignment",
    lambda d: {"cost": d.positive(2, 4), **d.options(fixed_first=[0, 1], fixed_last=[0, 1])},
    arrays=True,
)
recipe(
    "merge.edit_ridge",
    lambda d: {"keys": d.normal(3, 4), "shifts": d.normal(3, 5), **d.options(log_ridge=[0.0, 2.0], form=["auto"])},
    arrays=True,
)
recipe(
    "merge.grow",
    lambda d: {"params": d.normal(1, 2, 2, 1), "cores": merge.grow_cores((1, 2, 2, 1), (1, 2, 3, 2), std=0.1)},
)
recipe(
    "merge.grow_cores",
    lambda d: {
        "small": (1, 2, 2, 1),
        "large": (1, 2, 3, 2),
        **d.options(rank=[1, 2], std=[0.0], seed=[1], dtype=[torch.float64]),
    },
)
recipe(
    "merge.layer_costs",
    lambda d: {
        "acts_a": [d.normal(6, 3), d.normal(6, 2)],
        "acts_b": [d.normal(6, 4)],
        **d.options(metric=["cka", "wasserstein", "width"]),
    },
)
recipe(
    "merge.otfusion",
    lambda d: (
        {"params_a": d.state({"0.weight": (4, 2), "0.bias": (4,), "2.weight": (1, 4), "2.bias": (1,)})}
        | {"params_b": d.state({"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3), "2.bias": (1,)})}
        | d.options(metric=["euclidean", "cosine", "sqeuclidean"], exact=[True], alpha=[0.3], return_plans=[True])
    ),
)
recipe(
    "merge.otfusion_layer",
    lambda d: {
        "w_a": d.normal(4, 3),
        "w_b": d.normal(5, 3),
        **d.options(metric=["cosine"], reg=[0.5], alpha=[0.3], match=[True]),
    },
)
recipe(
    "merge.pad_layers",
    lambda d: (
        {
            "params": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).state_dict(),
            "layers": ["0", "2"],
            "mapping": [0],
        }
        | {"like": nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)).state_dict()}
        | {"like_layers": ["0", "2", "4"]}
    ),
)
recipe(
    "merge.renormalize",
    lambda d: (
        {"model": (m := nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), "data": [d.normal(8, 3)]}
        | {"models": [copy.deepcopy(m), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))]}
        | d.options(alpha=[0.3], rescale=[True], reshift=[False])
    ),
)
recipe(
    "merge.sequential_spec",
    lambda d: {"module": nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))},
)
recipe(
    "merge.sparse_prediction",
    lambda d: {"acts_a": d.normal(9, 4), "acts_b": d.normal(9, 3), **d.options(decay=[0.1], max_iter=[20], tol=[1e-4])},
    arrays=True,
)


def merged_files(base: bytes, model: bytes, method: Any, **options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.safetensors") for name in ("base", "model", "out")]
        for path, content in zip(paths, (base, model), strict=False):
            path.write_bytes(content)
        try:
            merge.merge_files(paths[0], [paths[1]], paths[2], method, progress=False, **options)
        except Exception:
            assert not paths[2].exists()
            raise
        return None


def file(d: Draw) -> bytes:
    state = d.state({"a": (3, 2), "b": (4,), "c": ()}, d.dtype())
    return save({name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"})


recipe(
    "merge.merge_files",
    lambda d: {"base": file(d), "model": file(d), "method": d.choice(["ties", "task_arithmetic", "linear"])},
    lambda **o: merged_files(**o),
    fixed=("method",),
)
recipe(
    "merge.merge_files",
    lambda d: (
        {"base": file(d), "model": file(d), "method": "ties"}
        | d.options(
            weights=[[0.5]], out_dtype=["float16", torch.float32], memory=["16MB", 10**7], resume=[False], density=[0.5]
        )
        | d.options(max_shard_size=["1GB"], copy_files=[False])
    ),
    merged_files,
    fixed=("base", "model"),
)
_YAML = b"""merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5, density: 0.4}
  - model: b
    parameters:
      weight: [0.1, 0.9]
parameters: {normalize: true}
dtype: bfloat16
"""
_PLAIN_YAML = b"{merge_method: linear, parameters: {weight: 1}, models: [{model: a}, {model: b}]}\n"


def configured(text: bytes, seed: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "merge.yaml")
        path.write_bytes(text)
        return merge.read_config(path, seed=seed)


recipe("merge.read_config", lambda d: {"text": _PLAIN_YAML, "seed": 3}, configured)
recipe("merge.read_config", lambda d: {"text": _YAML, "seed": 3}, configured, valid=0.0, fixed=("seed",))
recipe("merge.read_config", lambda d: {"path": "nowhere.yaml", "seed": 0}, valid=0.0)


# --- rotation ---------------------------------------------------------------------------------------------------------


def rows(d: Draw, width: int) -> Tensor:
    return d.normal(*d.choice([(width,), (3, width), (2, 3, width)]), dtype=d.dtype())


def both(d: Draw) -> Arguments:
    return {"base": d.normal(2, 5, 6), "source": d.normal(2, 5, 6)}


recipe(
    "rotation.BoundlessDAS",
    lambda d: {
        "d": 6,
        **both(d),
        **d.options(boundary=[0.3], start_temperature=[10.0], end_temperature=[0.5], sparsity=[0.1], seed=[1]),
    },
    lambda base, source, **o: rotation.BoundlessDAS(**o)(base, source),
)
recipe(
    "rotation.DAS",
    lambda d: {"d": 6, "k": 2, **both(d), **d.options(low_rank=[True], seed=[1])},
    lambda base, source, **o: rotation.DAS(**o)(base, source),
)
recipe(
    "rotation.SandwichLinear",
    lambda d: {
        "in_features": 3,
        "out_features": 5,
        "x": d.normal(4, 3),
        **d.options(activation=["relu", "tanh"], bias=[False], seed=[0]),
    },
    used(rotation.SandwichLinear),
)
recipe(
    "rotation.SandwichNet",
    lambda d: {
        "widths": [3, 4, 2],
        "x": d.normal(4, 3),
        **d.options(gamma=[0.5], activation=["relu", "tanh"], seed=[0]),
    },
    used(rotation.SandwichNet),
)
recipe(
    "rotation.butterfly_rotate",
    lambda d: {
        "x": rows(d, 8),
        "skew": d.normal(3, 4, 1),
        "block_size": 2,
        "factors": 3,
        **d.options(transpose=[True]),
    },
    like="x",
)
recipe("rotation.cayley", lambda d: {"M": d.normal(*d.choice([(4, 4), (2, 3, 3), (1, 1)]), dtype=d.dtype())})
recipe(
    "rotation.cayley_rotate",
    lambda d: (
        {"x": rows(d, 6), "skew": d.normal(2, 3), "block_size": 3}
        | d.options(method=["solve", "neumann"], terms=[1, 5], transpose=[True])
    ),
    like="x",
)
for topology, pairs in (("tree", 7), ("butterfly", 12), ("brick", 14)):
    recipe(
        "rotation.givens_mix",
        lambda d, topology=topology, pairs=pairs: {
            "x": rows(d, 8),
            "blocks": d.normal(pairs, 2, 2),
            "topology": topology,
            **d.options(transpose=[True]),
        },  # type: ignore[misc]
        like="x",
    )
    recipe(
        "rotation.givens_rotate",
        lambda d, topology=topology, pairs=pairs: {
            "x": rows(d, 8),
            "theta": d.normal(pairs),
            "topology": topology,
            **d.options(transpose=[True]),
        },  # type: ignore[misc]
        like="x",
    )
recipe(
    "rotation.givens_pairs",
    lambda d: {"topology": "brick", "d": 6, "layers": d.choice([2, 3])},
    patient=("d", "layers"),
)
recipe("rotation.givens_pairs", lambda d: {"topology": "tree", "d": 5}, patient=("d",))
recipe(
    "rotation.householder_chain",
    lambda d: {"x": rows(d, 6), "U": d.normal(6, 4), **d.options(orthogonalize=[True], transpose=[True])},
    like="x",
)
recipe(
    "rotation.householder_reflect",
    lambda d: {"x": rows(d, 6), "u": d.normal(6), **d.options(v=[d.normal(6)], blocks=[1, 2], transpose=[True])},
    like="x",
)
recipe("rotation.invert_blocks", lambda d: {"blocks": d.normal(3, 2, 2) + 3 * torch.eye(2)}, like="blocks")
recipe("rotation.orthogonality_error", lambda d: {"R": d.normal(4, 4, dtype=d.dtype())})
recipe("rotation.orthogonality_penalty", lambda d: {"blocks": d.normal(3, 2, 2)})
recipe("rotation.polar", lambda d: {"M": d.normal(*d.choice([(3, 3), (2, 4, 4)]), dtype=d.dtype())}, like="M")
recipe(
    "rotation.to_matrix",
    lambda d: d.choice(
        [
            {"fn_name": "givens_rotate", "params": {"theta": d.normal(4)}, "d": 5},
            {"fn_name": "cayley_rotate", "params": {"skew": d.normal(2, 3), "block_size": 3}, "d": 6},
            {"fn_name": "householder_chain", "params": {"U": d.normal(6, 2)}, "d": 6},
        ]
    ),
)


# --- peft -------------------------------------------------------------------------------------------------------------


def perceptron(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, width, bias=False)).eval()


def adapted(d: Draw, **options: Any) -> nn.Module:
    return peft.inject(perceptron(), peft.LoRAConfig(r=2, **options))


def injecting(method: str) -> None:
    config = METHODS[method]
    cases = CASES.get(method, [Case()])

    def make(d: Draw) -> Arguments:
        case = d.choice(cases)
        return {**case.options, "model": case.model(torch.float32), "x": case.inputs(torch.float32)}

    def call(model: Any, x: Any, **options: Any) -> Any:
        bare = copy.deepcopy(model)
        model = peft.inject(model, config(**options))
        y = as_the_model(bare, x, lambda: model(x))
        if all(layer.adapter("default").mergeable for layer in peft.adapted_layers(model).values()):
            peft.unload(peft.merge(model, stash=True))
        return y

    recipe(f"peft.{config.__name__}", make, call, patient=("layers",))


for registered in METHODS:
    injecting(registered)
recipe("peft.Config", lambda d: {"target_modules": ["0"], **d.options(modules_to_save=[["1"], ()])})


def model_only(name: str, **choices: Any) -> None:
    always = {key: value for key, value in choices.items() if not isinstance(value, list)}
    some = {key: value for key, value in choices.items() if isinstance(value, list)}
    recipe(f"peft.{name}", lambda d: {"model": adapted(d), **always, **d.options(**some)}, atomic=True)


model_only("adapted_layers")
model_only("delete_adapter", adapter_name="default")
model_only("describe")
model_only("merge", safe=[True, False], stash=[True], adapters=["default", ["default"]])
model_only("merge_and_unload", safe=[False])
model_only("penalty")
model_only("set_adapter", adapter_name="default")
model_only("trainable_parameters")
model_only("unload")
recipe("peft.unmerge", lambda d: {"model": peft.merge(adapted(d))}, atomic=True)
recipe(
    "peft.inject", lambda d: {"model": adapted(d), "config": peft.LoRAConfig(r=1), "adapter_name": "more"}, atomic=True
)


def disabled(model: Any, x: Any) -> Any:
    with peft.disable_adapter(model):
        return model(x)


recipe("peft.disable_adapter", lambda d: {"model": adapted(d), "x": d.normal(3, 8)}, disabled, fixed=("x",))
recipe(
    "peft.finalize_diff_pruning",
    lambda d: {
        "model": train(peft.inject(perceptron(), peft.DiffPruningConfig())),
        "sparsity": 0.5,
        **d.options(adapter_name=["default"]),
    },
    atomic=True,
)
recipe(
    "peft.set_sparsity",
    lambda d: {
        "model": peft.inject(perceptron(), peft.SparsePSTConfig(r=2, mask_r=2)),
        "sparsity": 0.5,
        **d.options(adapter_name=["default"]),
    },
    atomic=True,
)
recipe(
    "peft.set_task",
    lambda d: {
        "model": peft.inject(perceptron(), peft.PolyConfig(n_tasks=3, r=2)),
        "task": d.choice([0, torch.tensor([0, 2])]),
    },
    atomic=True,
)
recipe(
    "peft.cubic_sparsity",
    lambda d: {"step": 3, "steps": 10, "final": 0.8, **d.options(initial=[0.1], warmup=[0.2], cooldown=[0.1])},
)
recipe(
    "peft.clover_decompose",
    lambda d: {
        "left": d.normal(6, 5),
        "right": d.normal(6, 5),
        "heads": 2,
        **d.options(left_bias=[d.normal(6)], kv_heads=[2]),
    },
    lambda **o: vars(peft.clover_decompose(**o)),
)
recipe(
    "peft.clover_prune",
    lambda d: (
        {f"{name}_weight": d.normal(6, 6) for name in "qkvo"}
        | {"heads": 2}
        | d.options(qk_dim=[2], v_dim=[1, 3], fold_scale=[True], q_bias=[d.normal(6)], kv_heads=[2])
    ),
    lambda **o: vars(peft.clover_prune(**o)),
)


def log_likelihood(model: nn.Module, batch: Any) -> Tensor:
    return -nn.functional.cross_entropy(model(batch[0]), batch[1])


recipe(
    "peft.fish_mask",
    lambda d: (
        {
            "model": perceptron(),
            "config": peft.FISHConfig(sparsity=0.4),
            "data": [(d.normal(2, 8), torch.tensor([0, 1]))],
        }
        | {"log_likelihood": log_likelihood, "quiet": True}
        | d.options(vectorize=[False])
    ),
    atomic=True,
)
recipe(
    "peft.ttc_channels",
    lambda d: (
        {"model": perceptron(), "config": peft.TTCConfig(k=1, target_modules=["0"]), "data": [d.normal(4, 8)]}
        | {"loss": lambda model, x: model(x)[:, 0] ** 2, "quiet": True}
    ),
    atomic=True,
)


def masked_loss(model: Any, x: Any, strength: Any, generator: Any) -> Any:
    logits = model(x)
    peft.mask_backward(model, logits.square().mean(), logits.abs().mean(), strength=strength, generator=generator)


recipe(
    "peft.mask_backward",
    lambda d: (
        {"model": peft.inject(perceptron(), peft.MaskTuningConfig(target_modules=["0"])), "x": d.normal(3, 8)}
        | {"strength": 0.3, "generator": torch.Generator().manual_seed(0)}
    ),
    masked_loss,
    fixed=("model", "x"),
)
recipe(
    "peft.mask_backward",
    lambda d: (
        {"model": (m := peft.inject(perceptron(), peft.MaskTuningConfig(target_modules=["0"])))}
        | {"loss": (y := m(d.normal(3, 8))).square().mean(), "divergence": y.abs().mean(), "strength": 0.3}
    ),
    fixed=("model",),
)
recipe(
    "peft.pego_penalty",
    lambda d: {"weight": d.normal(3, 3), "pairs": [(d.normal(1, 3), d.normal(3, 1)), (d.normal(1, 3), d.normal(3, 1))]},
)
recipe(
    "peft.PHMLinear",
    lambda d: {
        "in_features": 8,
        "out_features": 12,
        "n": 4,
        "x": d.normal(2, 8),
        **d.options(bias=[False], seed=[1], dtype=[torch.float32]),
    },
    used(peft.PHMLinear),
)


def probed(features: Any, labels: Any, **options: Any) -> Any:
    model = peft.ProjectAndProbe(**options).fit_projection(features, labels).fit_probe(features, labels)
    return model.predict_proba(features), model.predict(features)


recipe(
    "peft.ProjectAndProbe",
    lambda d: (
        {"in_features": 4, "classes": 2, "k": 2, "features": d.normal(12, 4), "labels": torch.arange(12) % 2}
        | d.options(source_decay=[0.1], target_decay=[0.1], max_iter=[5])
    ),
    probed,
)


def there_and_back(x1: Any, x2: Any, **options: Any) -> Any:
    block = peft.ReversibleBlock(**options)
    return block.inverse(*block(x1, x2))


recipe(
    "peft.ReversibleBlock",
    lambda d: {
        "f": nn.Linear(4, 4),
        "g": nn.Tanh(),
        "x1": d.normal(3, 4),
        "x2": d.normal(3, 4),
        **d.options(lam=[0.5], beta=[0.5], swap=[True]),
    },
    there_and_back,
)
recipe(
    "peft.ReversibleSequence",
    lambda d: {
        "blocks": [peft.meft_block(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)],
        "x": d.normal(3, 4),
        **d.options(max_growth=[100.0]),
    },
    used(peft.ReversibleSequence),
)
recipe(
    "peft.reversible_sequence",
    lambda d: {
        "blocks": [peft.ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)],
        "x1": d.normal(3, 4),
        "x2": d.normal(3, 4),
    },
)
recipe("peft.meft_block", lambda d: {"first": nn.Linear(4, 4), "second": nn.Identity(), **d.options(variant=[1, 2, 3])})


def saved(model: Any, adapter_name: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        try:
            peft.save(model, folder, adapter_name)
        except Exception:
            left = [path.name for path in Path(folder).rglob("*")]
            assert not left, left
            raise


recipe("peft.save", lambda d: {"model": adapted(d), "adapter_name": d.choice([None, "default"])}, saved, atomic=True)
recipe("peft.save", lambda d: {"model": adapted(d), "directory": 3}, valid=0.0)


def loaded(model: Any, tensors: Any, config: Any, adapter_name: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_model.safetensors").write_bytes(tensors)
        Path(folder, "adapter_config.json").write_bytes(config)
        peft.load(model, folder, adapter_name)


def adapter_files(d: Draw) -> Arguments:
    method = d.choice(sorted(METHODS))
    case = CASES.get(method, [Case()])[0]
    with tempfile.TemporaryDirectory() as folder:
        peft.save(case.injected(method), folder)
        tensors, config = (Path(folder, n).read_bytes() for n in ("adapter_model.safetensors", "adapter_config.json"))
    return {"model": case.model(torch.float32), "tensors": tensors, "config": config, "adapter_name": "default"}


def other_values(d: Draw) -> Arguments:
    """A configuration whose JSON is well-formed and whose values are not."""
    files = adapter_files(d)
    config = json.loads(files["config"])
    for _ in range(d.choice([1, 2])):
        config[d.choice([*config, "more"])] = d.choice(
            [None, True, -1, 0, 2**70, 1e400, "", "x", [], {}, [[1]], {"0": -1}, "("]
        )
    return {**files, "config": json.dumps(config).encode()}


recipe("peft.load", adapter_files, loaded, atomic=True, fixed=("model", "adapter_name"))
recipe("peft.load", other_values, loaded, atomic=True, fixed=("model", "adapter_name", "tensors", "config"), valid=0.0)
recipe("peft.load", lambda d: {"model": perceptron(), "directory": "nowhere"}, atomic=True, valid=0.0)
