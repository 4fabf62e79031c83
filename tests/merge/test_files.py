"""Merging of files against plain NumPy, and against itself in other pieces."""

from __future__ import annotations

import json
import math
import mmap
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shiftkern
from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge._files import reader
from shiftkern.merge._files.radix import kth_magnitudes
from shiftkern.merge.breadcrumbs import breadcrumbs
from shiftkern.merge.dare import dare
from shiftkern.merge.della import della
from shiftkern.merge.files import merge_files
from shiftkern.merge.slerp import slerp
from shiftkern.merge.soup import soup
from shiftkern.merge.task_arithmetic import task_arithmetic
from shiftkern.merge.ties import ties

from helpers.merging import assert_near, assert_same, draws, kth_largest, make_states, nearest, plain, task_vectors
from helpers.process import output

WEIGHTS = [0.9, -0.4, 0.7]
#: Method and options.
CALLS = {
    "linear": ("linear", {"weights": WEIGHTS}),
    "linear of equal weights": ("linear", {}),
    "linear normalized": ("linear", {"weights": WEIGHTS, "normalize": True}),
    "task_arithmetic": ("task_arithmetic", {"weights": WEIGHTS, "scale": 0.5}),
    "task_arithmetic normalized": ("task_arithmetic", {"weights": WEIGHTS, "normalize": True}),
    "ties": ("ties", {}),
    "ties of densities": ("ties", {"density": [0.1, 0.0, 1.0], "weights": WEIGHTS, "scale": 1.5}),
    "ties rescaled": ("ties", {"density": 0.4, "rescale": "l1"}),
    "ties global": ("ties", {"density": 0.3, "trim_scope": "global"}),
    "ties paper": ("ties", {"convention": "paper", "density": 0.6}),
    "ties peft": ("ties", {"convention": "peft", "weights": WEIGHTS}),
    "ties mergekit": ("ties", {"convention": "mergekit", "weights": WEIGHTS, "density": 0.5}),
    "ties undivided": ("ties", {"elect": "weighted", "divide_by": "none", "weights": WEIGHTS}),
    "dare_linear": ("dare_linear", {"drop_rate": 0.5, "seed": 3, "weights": WEIGHTS}),
    "dare_linear of rates": ("dare_linear", {"drop_rate": [0.5, 0.0, 0.8], "seed": 3, "normalize": True}),
    "dare_linear plain": ("dare_linear", {"drop_rate": 0.5, "seed": 3, "rescale": "none"}),
    "dare_ties": ("dare_ties", {"drop_rate": 0.3, "seed": 4, "rescale": "l1", "elect": "weighted", "weights": WEIGHTS}),
    "breadcrumbs": ("breadcrumbs", {"density": [0.6, 0.9, 1.0], "gamma": 0.1, "weights": WEIGHTS}),
    "breadcrumbs rescaled": ("breadcrumbs", {"density": 0.5, "gamma": [0.1, 0.0, 0.9], "rescale": "l1"}),
    "della": ("della", {"density": [0.5, 0.7, 1.0], "epsilon": [0.3, 0.2, 0.0], "seed": 5}),
    "della rescaled": ("della", {"density": 0.5, "epsilon": 0.3, "seed": 5, "rescale": "l1", "divide_by": "none"}),
}
every = pytest.mark.parametrize(("method", "options"), CALLS.values(), ids=CALLS)


def write(folder, base, models):
    """Files of a base and of models; returns their paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / "base.safetensors", *(folder / f"model{k}.safetensors" for k in range(len(models)))]
    for path, state in zip(paths, [base, *models], strict=True):
        save_file(state, path)
    return paths[0], paths[1:]


def write_shards(folder, state, count):
    """A folder of shards that have every count-th tensor."""
    folder.mkdir()
    names = {name: f"part-{i % count}.safetensors" for i, name in enumerate(state)}
    for file in set(names.values()):
        save_file({name: state[name] for name in state if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def read(path):
    """All tensors of a file or of a folder, by the safetensors package."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    state = {}
    for file in files:
        state |= load_file(file)
    return state


def by_numpy(taus, method, options, magnitudes_of=None):
    """Merged task vectors in float64, one tensor at a time."""
    count = len(next(iter(taus.values())))
    each = lambda name, default: np.broadcast_to(options.get(name, default), count).tolist()  # noqa: E731
    weights, density, gamma = each("weights", 1.0), each("density", {"ties": 0.2}.get(method, 1.0)), each("gamma", 0.0)
    drop, epsilon, seed = each("drop_rate", 0.0), each("epsilon", 0.0), options.get("seed", 0)
    convention = options.get("convention")
    everywhere = options.get("trim_scope") == "global" or convention == "paper"
    rescale = options.get("rescale", "inverse" if "seed" in options else "none")
    elect = "none" if method not in ("ties", "dare_ties", "della") else options.get("elect", "unweighted")
    divide = "none" if elect == "none" else options.get("divide_by", "count")
    if convention == "mergekit":
        elect, divide = "weighted", "weight"
    kept = {}
    for name, tau in taus.items():
        kept[name] = np.zeros_like(tau)
        for k in range(count):
            size = np.abs(tau[k])
            whole = np.concatenate([np.abs(t[k]).ravel() for t in taus.values()]) if everywhere else size.ravel()
            if not size.size:
                continue
            chance = np.full(size.shape, 1.0 - drop[k])
            if method == "della":
                rows = size.reshape(len(size) if size.ndim > 1 else 1, -1)
                n = rows.shape[1]
                rank = rows.argsort(1, kind="stable").argsort(1, kind="stable")
                share = (rank - (n - 1) / 2) / max(1, n - 1)
                chance = (density[k] + epsilon[k] * share).reshape(size.shape)
                keep = np.full(size.shape, True)
            else:
                keep_count = nearest(density[k], whole.size)
                cut = min(whole.size - keep_count, int(gamma[k] * whole.size + 0.5))
                keep = size >= kth_largest(whole, keep_count and keep_count + cut)
                if cut:
                    keep &= size <= kth_largest(whole, cut + 1)
            if "seed" in options:
                keep &= draws(seed, k, name, size.shape) >= np.round((1.0 - chance) * 2**32) / 2**32
            kept[name][k] = np.where(keep, tau[k], 0.0)
            if rescale == "inverse":
                kept[name][k] /= chance
            elif rescale == "l1" and np.abs(kept[name][k]).sum() > 0:
                kept[name][k] *= size.sum() / np.abs(kept[name][k]).sum()
    column = np.array(weights)
    votes = {n: (column.reshape(-1, *[1] * (t.ndim - 1)) if elect == "weighted" else 1.0) * t for n, t in kept.items()}
    tie = 1.0
    if convention == "paper":
        tie = np.sign(sum(np.sign(v.sum(0)).sum() for v in votes.values()))
    merged = {}
    for name, t in kept.items():
        w = column.reshape(-1, *[1] * (t.ndim - 1))
        total = votes[name].sum(0)
        sign = np.where(total == 0, tie, np.sign(total))
        agree = np.ones_like(t) if elect == "none" else (np.sign(votes[name]) == sign) & (votes[name] != 0)
        divisor = {"none": 1.0, "count": agree.sum(0), "weight": (w * agree).sum(0)}[divide]
        divisor = np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
        merged[name] = options.get("scale", 1.0) * (w * t * agree).sum(0) / divisor
        if options.get("normalize"):
            merged[name] /= column.sum()
    return merged


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_methods_match_numpy(method, options, dtype, tmp_path):
    base, models = make_states(3, dtype)
    origin, paths = write(tmp_path, base, models)
    merge_files(None if method == "linear" else origin, paths, tmp_path / "out", method, progress=False, **options)
    merged = read(tmp_path / "out")
    if method == "linear":
        weights = np.array(options.get("weights", [1 / 3] * 3))
        weights = weights / weights.sum() if options.get("normalize") else weights
        expected = {
            name: sum(w * plain(m[name]) for w, m in zip(weights, models, strict=True)) - plain(base[name])
            for name in base
        }
    else:
        expected = by_numpy(task_vectors(base, models), method, options)
    assert_near(merged, base, expected)
    assert {name: t.dtype for name, t in merged.items()} == dict.fromkeys(base, dtype)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("with_base", [False, True])
def test_slerp_matches_numpy(t, with_base, tmp_path):
    a, (b,) = make_states(1, spread=1.0)
    b["block.bias"], b["scalar"] = a["block.bias"] * 1.5, torch.zeros(())
    first, (second,) = write(tmp_path, a, [b])
    base, models = (first, [second]) if with_base else (None, [first, second])
    merge_files(base, models, tmp_path / "out", "slerp", t=t, progress=False)
    merged = read(tmp_path / "out")
    for name in a:
        x, y = plain(a[name]).ravel(), plain(b[name]).ravel()
        length = np.linalg.norm(x) * np.linalg.norm(y)
        cosine = x @ y / length if length else 1.0
        if abs(cosine) > 0.9995:
            want = (1 - t) * x + t * y
        else:
            angle = math.acos(cosine)
            want = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
        np.testing.assert_allclose(plain(merged[name]).ravel(), want, atol=3e-6, rtol=0)


IN_MEMORY = {
    "linear": ("linear", {}, lambda b, m: soup(m)),
    "linear weighted": ("linear", {"weights": WEIGHTS}, lambda b, m: soup(m, WEIGHTS)),
    "slerp": ("slerp", {"t": 0.25}, lambda b, m: slerp(b, m[0], 0.25)),
    "task_arithmetic": ("task_arithmetic", {"weights": WEIGHTS}, lambda b, m: task_arithmetic(b, m, WEIGHTS)),
    "ties": ("ties", {"density": 0.3}, lambda b, m: ties(b, m, density=0.3)),
    "ties paper": ("ties", {"convention": "paper"}, lambda b, m: ties(b, m, convention="paper")),
    "dare": ("dare_linear", {"drop_rate": 0.4, "seed": 2}, lambda b, m: dare(b, m, drop_rate=0.4, seed=2)),
    "dare ties": (
        "dare_ties",
        {"drop_rate": [0.4, 0.2, 0.9], "seed": 2},
        lambda b, m: dare(b, m, drop_rate=[0.4, 0.2, 0.9], seed=2, then="ties"),
    ),
    "breadcrumbs": ("breadcrumbs", {}, lambda b, m: breadcrumbs(b, m)),
    "della": (
        "della",
        {"density": 0.5, "epsilon": 0.4, "seed": 2},
        lambda b, m: della(b, m, density=0.5, epsilon=0.4, seed=2),
    ),
}


@pytest.mark.parametrize(("method", "options", "function"), IN_MEMORY.values(), ids=IN_MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_bits_as_in_memory(method, options, function, dtype, tmp_path):
    base, models = make_states(3, dtype)
    origin, paths = write(tmp_path, base, models)
    paths = paths[:1] if method == "slerp" else paths
    merge_files(None if method == "linear" else origin, paths, tmp_path / "out", method, progress=False, **options)
    merged = read(tmp_path / "out")
    expected = function(base, models)
    assert_same({name: merged[name] for name in expected}, expected)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Tensors of several tiles when memory is short, with many equal magnitudes."""
    folder = tmp_path_factory.mktemp("large")
    shapes = {"first": (1100, 1001), "second": (77, 1003), "third": (5,)}
    base, models = make_states(3, torch.bfloat16, shapes=shapes)
    return write(folder, base, models)


@pytest.mark.parametrize(
    "name",
    [
        *("linear", "task_arithmetic", "ties", "ties paper", "ties rescaled", "dare_linear", "dare_ties"),
        *("dare_linear of rates", "breadcrumbs", "della rescaled"),
    ],
)
def test_bytes_do_not_depend_on_memory_threads_or_shards(name, large, tmp_path):
    method, options = CALLS[name]
    base, models = large
    base = None if method == "linear" else base
    shiftkern.set_num_threads(2)
    wide = merge_files(base, models, tmp_path / "wide.safetensors", method, progress=False, **options)
    shiftkern.set_num_threads(1)
    tight = "30MB" if method == "della" else "13MB"
    narrow = merge_files(
        base, models, tmp_path / "narrow", method, memory=tight, max_shard_size=1000, progress=False, **options
    )
    assert narrow.peak <= 30_000_000
    assert narrow.bytes_read >= wide.bytes_read
    assert len(list((tmp_path / "narrow").glob("*.safetensors"))) == 3
    assert_same(read(tmp_path / "narrow"), read(tmp_path / "wide.safetensors"))


@pytest.mark.parametrize("size", [1e-170, 1e170, 1e300])
def test_slerp_of_sizes_whose_squares_leave_float64(size, tmp_path):
    a, b = ({"w": size * torch.tensor(v, dtype=torch.float64)} for v in ([1.0, 0.0, 1.0], [0.0, 1.0, 1.0]))
    base, models = write(tmp_path, a, [b])
    merge_files(base, models, tmp_path / "out", "slerp", t=0.5, progress=False)
    found = read(tmp_path / "out")["w"]
    torch.testing.assert_close(found, slerp(a, b, 0.5)["w"], rtol=1e-14, atol=0.0)
    torch.testing.assert_close((found / size).norm(), torch.tensor(2.0, dtype=torch.float64).sqrt())


def test_slerp_does_not_depend_on_memory(large, tmp_path):
    base, models = large
    for memory in ("4MB", "1GB"):
        merge_files(base, models[:1], tmp_path / memory, "slerp", memory=memory, progress=False)
    assert_same(read(tmp_path / "4MB"), read(tmp_path / "1GB"))


@pytest.mark.parametrize("name", ["ties rescaled", "dare_ties", "della rescaled", "slerp"])
def test_sums_do_not_depend_on_memory_in_float64(name, tmp_path):
    base, models = make_states(3, torch.float64, shapes={"w": (500, 600)}, spread=1.0)
    origin, paths = write(tmp_path, base, models)
    method, options = CALLS.get(name, (name, {}))
    for memory in ("22MB", "1GB"):
        given = paths[:1] if method == "slerp" else paths
        merge_files(origin, given, tmp_path / memory, method, memory=memory, progress=False, **options)
    assert_same(read(tmp_path / "22MB"), read(tmp_path / "1GB"))


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        *((dtype, torch.float32) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        *((dtype, torch.float64) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_streamed_ranks_match_a_sort(dtype, wide, generator):
    base = torch.randn(5000, generator=generator, dtype=torch.float64).to(dtype)
    models = [(base.double() + s * torch.randn(5000, generator=generator).double()).to(dtype) for s in (0.01, 1.0, 0.0)]
    pieces = [(base[i : i + 700], [m[i : i + 700] for m in models]) for i in range(0, 5000, 700)]
    for ranks in ([1, 2500, 7], [5000, 1, 5000], [0, 4999, 1]):
        found = kth_magnitudes(lambda: pieces, wide, ranks)
        for model, rank, value in zip(models, ranks, found, strict=True):
            magnitudes = (model.to(wide) - base.to(wide)).abs().double().numpy()
            assert value == kth_largest(magnitudes, rank)


# --- kinds of tensors and files --------------------------------------------------------------------------------------


def test_integers_come_from_the_base_and_for_linear_from_the_first_model(tmp_path):
    base, models = make_states(2)
    states = [{**s, "ids": torch.full((3,), k), "on": torch.tensor([k == 1])} for k, s in enumerate([base, *models])]
    origin, paths = write(tmp_path, states[0], states[1:])
    merge_files(origin, paths, tmp_path / "a", "ties", progress=False)
    merge_files(origin, paths, tmp_path / "b", "linear", progress=False)
    assert read(tmp_path / "a")["ids"].tolist() == [0, 0, 0]
    assert read(tmp_path / "b")["ids"].tolist() == [1, 1, 1]
    assert read(tmp_path / "b")["on"].tolist() == [True]


def test_narrow_floats_are_copied_with_a_warning(tmp_path):
    base = {"w": torch.ones(4).to(torch.float8_e4m3fn), "v": torch.ones(2)}
    tuned = {"w": (2 * torch.ones(4)).to(torch.float8_e4m3fn), "v": 2 * torch.ones(2)}
    origin, paths = write(tmp_path, base, [tuned])
    with pytest.warns(UserWarning, match=r"1 tensors .* such as 'w', are copied"):
        merge_files(origin, paths, tmp_path / "out", "task_arithmetic", progress=False)
    merged = read(tmp_path / "out")
    assert merged["w"].float().tolist() == [1.0] * 4
    assert merged["v"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_mixed_dtypes_are_computed_in_the_widest(method, tmp_path):
    base, models = make_states(2, torch.bfloat16)
    models = [
        {n: t.to(d) + 1 for n, t in m.items()} for m, d in zip(models, (torch.float16, torch.float32), strict=True)
    ]
    origin, paths = write(tmp_path, base, models)
    merge_files(origin, paths, tmp_path / "out", method, progress=False)
    merged = read(tmp_path / "out")
    expected = by_numpy(task_vectors(base, models), method, {})
    assert_near(merged, base, expected)
    assert merged["block.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("convention", [None, "paper"])
@pytest.mark.parametrize("density", [0.003, 0.1, 0.35, 0.8, 1.0])
def test_a_global_trim_of_mixed_tensors_is_that_in_memory(density, convention, tmp_path):
    options = {"trim_scope": "global", "density": density, "convention": convention}
    for seed in range(4):
        # So far from the base that differences are not exact in float32, and most tensors in it.
        base, models = make_states(3, torch.float64, seed=seed, spread=3.0)
        for state in (base, *models):
            for name in list(state)[: 3 + seed]:
                state[name] = state[name].float()
        origin, paths = write(tmp_path / f"{seed}", base, models)
        merge_files(origin, paths, tmp_path / f"out{seed}", "ties", progress=False, **options)
        merged, expected = read(tmp_path / f"out{seed}"), ties(base, models, **options)
        assert_same({name: merged[name] for name in expected}, expected)


def test_a_threshold_in_float64_keeps_the_float32_entry_that_has_it(tmp_path):
    # The difference, 1 + 2**-30, is above 1 in float64 and rounds to it in float32.
    base = {"a": torch.tensor([-(2.0**-30), 0.0]), "b": torch.zeros(2, dtype=torch.float64)}
    model = {"a": torch.tensor([1.0, 0.25]), "b": torch.tensor([2.0, 0.5], dtype=torch.float64)}
    origin, paths = write(tmp_path, base, [model])
    merge_files(origin, paths, tmp_path / "out", trim_scope="global", density=0.5, progress=False)
    merged = read(tmp_path / "out")
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([1.0, 0.0], [2.0, 0.0])


@pytest.mark.parametrize("dtype", ["float64", torch.float32, "float16", torch.bfloat16])
def test_out_dtype_rounds_once(dtype, tmp_path):
    base, models = make_states(2, torch.float32)
    origin, paths = write(tmp_path, base, models)
    merge_files(origin, paths, tmp_path / "out", "task_arithmetic", weights=[0.3, 0.2], out_dtype=dtype, progress=False)
    merged = read(tmp_path / "out")
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    wide = torch.float64 if kind == torch.float64 else torch.float32
    expected = task_arithmetic(
        {n: t.to(wide) for n, t in base.items()},
        [{n: t.to(wide) for n, t in m.items()} for m in models],
        [0.3, 0.2],
    )
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name].to(kind))


def test_tensors_of_differing_sizes_stay_aligned(tmp_path):
    base = {
        "a": torch.ones(3, dtype=torch.bool),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.ones(2, dtype=torch.float64),
        "d": torch.ones(3),
    }
    # Laid out by hand, in an order in which nothing is aligned.
    header, data = {}, b""
    for name, code, raw in (
        ("a", "BOOL", b"\1\1\1"),
        ("d", "F32", np.ones(3, "<f4").tobytes()),
        ("b", "BF16", b"\x80\x3f" * 5),
        ("c", "F64", np.ones(2, "<f8").tobytes()),
    ):
        header[name] = {"dtype": code, "shape": [len(base[name])], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    crooked = tmp_path / "crooked.safetensors"
    crooked.write_bytes(len(text).to_bytes(8, "little") + text + data)
    merge_files(crooked, [crooked, crooked], tmp_path / "out", "ties", density=1.0, progress=False)
    merged = read(tmp_path / "out")
    assert_same({name: merged[name] for name in base}, base)
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for entry in (e for n, e in json.loads(raw[8 : 8 + length]).items() if n != "__metadata__"):
        size = {"BOOL": 1, "BF16": 2, "F32": 4, "F64": 8}[entry["dtype"]]
        assert entry["data_offsets"][0] % size == 0


def test_folders_of_shards(tmp_path):
    base, models = make_states(2)
    origin = write_shards(tmp_path / "base", base, 3)
    paths = [write_shards(tmp_path / "a", models[0], 2), write_shards(tmp_path / "b", models[1], 1)]
    report = merge_files(origin, paths, tmp_path / "out", max_shard_size="1KB", progress=False)
    out = tmp_path / "out"
    assert_same(dict(sorted(read(out).items())), dict(sorted(ties(base, models).items())))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in base.values())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118  (not a dict)
            assert shard.metadata() == {"format": "pt"}
    assert report.tensors == len(base)
    assert report.bytes_written == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert report.out == out
    assert not (tmp_path / "out.partial").exists()


def test_more_shards_than_may_be_mapped_at_a_time(tmp_path, monkeypatch):
    base, models = make_states(2)
    origin = write_shards(tmp_path / "base", base, 7)
    paths = [write_shards(tmp_path / f"model{k}", model, 5 - k) for k, model in enumerate(models)]
    mapped = []
    monkeypatch.setattr(reader, "_MOST_MAPPED", 2)
    real = mmap.mmap
    monkeypatch.setattr(reader.mmap, "mmap", lambda *a, **k: mapped.append(len(reader._MAPPED)) or real(*a, **k))
    merge_files(origin, paths, tmp_path / "out", progress=False)
    merged = read(tmp_path / "out")
    assert_same({name: merged[name] for name in base}, ties(base, models))
    assert max(mapped) == 2
    assert not reader._MAPPED


def test_a_single_file(tmp_path):
    base, models = make_states(1)
    origin, paths = write(tmp_path, base, models)
    report = merge_files(origin, paths, tmp_path / "one.safetensors", max_shard_size=10, progress=False)
    assert report.out.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("base.safetensors", "model0.safetensors", "one.safetensors")
    ]


def test_no_tensors_at_all(tmp_path):
    origin, paths = write(tmp_path, {}, [{}])
    assert merge_files(origin, paths, tmp_path / "out", progress=False).tensors == 0
    assert read(tmp_path / "out") == {}


def test_configuration_and_tokenizer_are_copied_but_no_weights(tmp_path):
    base, models = make_states(1)
    origin, paths = write(tmp_path / "base", base, []), write(tmp_path / "tuned", models[0], [])
    folder = tmp_path / "base"
    (folder / "config.json").write_text('{"torch_dtype": "float32", "layers": 2}')
    for name in ("tokenizer.json", "merges.txt", "spiece.model", "LICENSE"):
        (folder / name).write_text(name)
    for name in ("pytorch_model.bin", "notes.md", "flax.msgpack", "pytorch_model.bin.index.json"):
        (folder / name).write_text(name)
    (folder / "runs.json").mkdir()
    del origin, paths
    merge_files(folder, [tmp_path / "tuned"], tmp_path / "out", out_dtype="bfloat16", progress=False)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"model.safetensors", "config.json", "tokenizer.json", "merges.txt", "spiece.model", "LICENSE"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "bfloat16", "layers": 2}
    merge_files(folder, [tmp_path / "tuned"], tmp_path / "bare", copy_files=False, progress=False)
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "config",
    [b'{"dtype": "float32", "by": "\xe9"}', b"{nope", b"[" * 100_000, b"[1]", '{"by": "\u00e9"}\r\n'.encode()],
    ids=["no UTF-8", "no JSON", "deep", "a list", "no dtype"],
)
def test_a_configuration_that_names_no_dtype_is_copied_as_it_is(config, tmp_path):
    base, models = make_states(1)
    write(tmp_path / "base", base, [])
    (tmp_path / "base" / "config.json").write_bytes(config)
    origin, paths = write(tmp_path / "tuned", base, models)
    del origin
    merge_files(tmp_path / "base", paths, tmp_path / "out", out_dtype="bfloat16", progress=False)
    assert (tmp_path / "out" / "config.json").read_bytes() == config


def test_no_bar_without_a_terminal_and_no_warnings(tmp_path, capfd):
    base, models = make_states(1)
    origin, paths = write(tmp_path, base, models)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_files(origin, paths, tmp_path / "out")
    assert capfd.readouterr().err == ""


# --- memory and processes --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("options", ["", ", trim_scope='global'"])
def test_resident_memory_stays_bounded(options, tmp_path):
    shapes = {"big": (24_000_000,), "small": (2_000_000,)}
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in shapes.items()}
    write(tmp_path, base, [{n: t * s for n, t in base.items()} for s in (1.5, 0.5, -1.0)])
    script = f"""
        import sys, pathlib, torch, tqdm
        from shiftkern.merge.files import merge_files
        folder = pathlib.Path(sys.argv[1])
        models = [folder / f"model{{k}}.safetensors" for k in range(3)]
        def peak():
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        before = peak()
        report = merge_files(
            folder / "base.safetensors", models, folder / "out", memory="40MB", progress=False{options}
        )
        print(report.peak, peak() - before)
    """
    buffers, growth = map(int, output(script, str(tmp_path), OMP_NUM_THREADS="1").split())
    assert buffers <= 40_000_000
    # All inputs together have 208 MB. Slack is for allocators and for mapped pages of a tile.
    assert growth <= 40_000_000 + 60_000_000


def test_two_processes_share_the_work(tmp_path):
    base, models = make_states(2)
    write(tmp_path, base, models)
    script = """
        import sys, pathlib, os, torch.distributed as dist
        from shiftkern.merge.files import merge_files
        folder, port = pathlib.Path(sys.argv[1]), sys.argv[2]
        child = os.fork()
        rank = int(child == 0)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        models = [folder / f"model{k}.safetensors" for k in range(2)]
        for scope in ("tensor", "global"):
            options = dict(max_shard_size=800, trim_scope=scope, progress=False)
            report = merge_files(folder / "base.safetensors", models, folder / scope, **options)
            assert 0 < report.bytes_written < 6000
        try:
            wrong = models if rank else models[:1] + [folder / "nowhere"]
            merge_files(folder / "base.safetensors", wrong, folder / "fails", progress=False)
        except (ValueError, RuntimeError) as error:
            if rank:
                assert "process 0 failed" in str(error), error
                os._exit(0)
            assert "nowhere" in str(error)
        assert os.waitpid(child, 0)[1] == 0
        print("both")
    """
    assert output(script, str(tmp_path), "0", OMP_NUM_THREADS="1") == "both"
    for scope in ("tensor", "global"):
        expected = ties(base, models, trim_scope=scope)
        merged = read(tmp_path / scope)
        assert_same({name: merged[name] for name in expected}, expected)
    assert not (tmp_path / "fails").exists()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("tie", {}, ArgumentError, "'method': expected one of 'linear'"),
        (3, {}, ArgumentTypeError, "'method'"),
        ("ties", {"densty": 0.5}, ArgumentTypeError, "'densty': expected one of the options of ties: density"),
        ("linear", {"density": 0.5}, ArgumentTypeError, "'density': expected one of the options of linear"),
        ("ties", {"density": 1.5}, ArgumentError, "'density'"),
        ("ties", {"density": [0.5]}, ArgumentError, "'density': expected a number, or 2 numbers"),
        ("ties", {"scale": math.nan}, ArgumentError, "'scale'"),
        ("ties", {"elect": "none"}, ArgumentError, "'elect'"),
        ("ties", {"divide_by": "sum"}, ArgumentError, "'divide_by'"),
        ("ties", {"trim_scope": "row"}, ArgumentError, "'trim_scope'"),
        ("ties", {"rescale": "inverse"}, ArgumentError, "'rescale'"),
        ("ties", {"convention": "mine"}, ArgumentError, "'convention'"),
        ("ties", {"convention": "paper", "trim_scope": "tensor"}, ArgumentError, "'trim_scope': expected 'global'"),
        ("ties", {"weights": [1.0]}, ArgumentError, "'weights'"),
        ("ties", {"weights": "ab"}, ArgumentTypeError, "'weights'"),
        ("task_arithmetic", {"normalize": 1}, ArgumentTypeError, "'normalize'"),
        ("task_arithmetic", {"normalize": True, "weights": [1, -1]}, ArgumentError, "'weights': expected a sum other"),
        ("dare_linear", {"seed": 1}, ArgumentTypeError, "'drop_rate': expected a value"),
        ("dare_linear", {"drop_rate": 0.5}, ArgumentTypeError, "'seed': expected a value"),
        ("dare_linear", {"drop_rate": 1.0, "seed": 1}, ArgumentError, "'drop_rate'"),
        ("dare_ties", {"drop_rate": 0.5, "seed": -1}, ArgumentError, "'seed'"),
        ("breadcrumbs", {"gamma": -0.1}, ArgumentError, "'gamma'"),
        ("della", {"density": 0.9, "epsilon": 0.3, "seed": 1}, ArgumentError, "'epsilon'"),
        ("slerp", {}, ArgumentError, "'models': expected one model, as there is a base, got 2"),
        ("slerp", {"t": 1.5}, ArgumentError, "'t'"),
        ("slerp", {"weights": [1, 1]}, ArgumentError, "'weights': expected none"),
        ("ties", {"memory": "much"}, ArgumentError, "'memory': expected bytes"),
        ("ties", {"memory": 0}, ArgumentError, "'memory'"),
        ("ties", {"memory": 1000}, ArgumentError, "'memory': expected at least [0-9]+ bytes, for tensor"),
        ("ties", {"memory": 1.5}, ArgumentTypeError, "'memory'"),
        ("ties", {"max_shard_size": "0GB"}, ArgumentError, "'max_shard_size'"),
        ("ties", {"out_dtype": "int8"}, ArgumentError, "'out_dtype'"),
        ("ties", {"out_dtype": torch.int8}, ArgumentError, "'out_dtype'"),
        ("ties", {"resume": 1}, ArgumentTypeError, "'resume'"),
        ("ties", {"progress": None}, ArgumentTypeError, "'progress'"),
        ("ties", {"copy_files": "no"}, ArgumentTypeError, "'copy_files'"),
    ],
)
def test_wrong_options_name_the_argument(method, options, error, message, tmp_path):
    base, models = make_states(2)
    origin, paths = write(tmp_path, base, models)
    with pytest.raises(error, match=f"merge_files: argument {message}"):
        merge_files(origin, paths, tmp_path / "out", method, **options)
    assert not list(tmp_path.glob("out*"))


def test_wrong_models_name_the_argument(tmp_path):
    base, models = make_states(2)
    origin, paths = write(tmp_path, base, models)
    with pytest.raises(ArgumentTypeError, match="'models': expected a list of paths"):
        merge_files(origin, str(paths[0]), tmp_path / "out")
    with pytest.raises(ArgumentError, match="'models': expected at least one model"):
        merge_files(origin, [], tmp_path / "out")
    with pytest.raises(ArgumentTypeError, match="'base': expected a model, which ties needs"):
        merge_files(None, paths, tmp_path / "out")
    with pytest.raises(ArgumentTypeError, match=r"'models\[1\]'"):
        merge_files(origin, [paths[0], 3], tmp_path / "out")
    with pytest.raises(ArgumentTypeError, match="'out'"):
        merge_files(origin, paths, 3)
    with pytest.raises(ArgumentError, match=r"'models': expected one model with a base, or two without, got 3"):
        merge_files(None, [*paths, origin], tmp_path / "out", "slerp")


def test_differing_tensors_name_model_and_tensor(tmp_path):
    base, models = make_states(1)
    origin, (path,) = write(tmp_path, base, models)
    for change, message in (
        (lambda s: s.pop("one"), "lacks .'one'.$"),
        (lambda s: s.update(extra=torch.ones(2)), "adds .'extra'.$"),
        (lambda s: s.update(one=torch.ones(2)), r"shape \(1,\) for tensor 'one'.*got \(2,\)"),
        (lambda s: s.update(one=torch.ones(1).int()), "dtype F32 for tensor 'one'.*got I32"),
    ):
        state = dict(models[0])
        change(state)
        save_file(state, path)
        with pytest.raises(ArgumentError, match=rf"'models\[0\]'.*{message}" if "$" in message else message) as found:
            merge_files(origin, [path], tmp_path / "out")
        assert "model0.safetensors" in str(found.value)
