"""Merging against torch, PEFT and mergekit: 20 M parameters in memory, and files of a large model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from shiftkern._ops import merge as ops
from shiftkern.merge import dare, task_arithmetic, ties

from harness import Result, Timing, interleave

State = dict[str, Tensor]
TENSORS, ELEMENTS, MODELS = 20, 1_000_000, 4
#: Layers, width, inner width and vocabulary of the model in files, by default of 1.05 billion parameters.
LLAMA = json.loads(os.environ.get("SHIFTKERN_BENCH_LLAMA", "[24, 1792, 4864, 32000]"))
#: A folder with mergekit, installed without its pins: ``pip install --no-deps --target FOLDER mergekit ...``.
MERGEKIT = os.environ.get("SHIFTKERN_BENCH_MERGEKIT")


def states() -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(0)
    base = {f"w{i}": torch.randn(ELEMENTS, generator=generator) for i in range(TENSORS)}
    models = [
        {name: t + 0.01 * torch.randn(ELEMENTS, generator=generator) for name, t in base.items()} for _ in range(MODELS)
    ]
    return base, models


def torch_task_arithmetic(base: State, models: list[State], weight: float) -> State:
    merged = {}
    for name, start in base.items():
        merged[name] = start * (1.0 - weight * len(models))
        for model in models:
            merged[name].add_(model[name], alpha=weight)
    return merged


def torch_sum_of_task_vectors(base: State, models: list[State], weight: float) -> State:
    return {name: start + weight * sum(model[name] - start for model in models) for name, start in base.items()}


def torch_ties(base: State, models: list[State], density: float) -> State:
    merged = {}
    for name, start in base.items():
        deltas = torch.stack([model[name] - start for model in models])
        rank = start.numel() - round(density * start.numel()) + 1
        limits = deltas.abs().kthvalue(rank, dim=1, keepdim=True).values
        deltas.masked_fill_(deltas.abs() < limits, 0.0)
        total = deltas.sum(0)
        agree = deltas.sign() == torch.where(total >= 0, 1.0, -1.0)
        merged[name] = start + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


def peft_ties(base: State, models: list[State], density: float) -> State:
    merged = {}
    for name, start in base.items():
        deltas = [model[name] - start for model in models]
        merged[name] = start + merge_utils.ties(deltas, torch.ones(len(models)), density)
    return merged


def torch_dare(base: State, models: list[State], rate: float) -> State:
    merged = {}
    for name, start in base.items():
        merged[name] = start.clone()
        for model in models:
            keep = torch.rand_like(start) >= rate
            merged[name] += (model[name] - start) * keep / (1.0 - rate)
    return merged


def agree(ours: State, theirs: State) -> None:
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-5)


def agree_files(inputs: list[State], density: float, ours: State, theirs: State) -> None:
    """Hold a merged model to mergekit's, but for what it does otherwise.

    In bfloat16 about one magnitude in a hundred equals the least that is kept: all are kept here, some of them there.
    So entries at the threshold of any model may differ. Of the others up to one in a thousand may, where votes cancel
    but for the roundings of mergekit's sums in bfloat16, or a sum is much smaller than what is added up.
    """
    if ours.keys() != theirs.keys():
        raise SystemExit(f"the merged models have other tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    base, *models = inputs
    differing = entries = 0
    for name, tensor in ours.items():
        a, b = tensor.float(), theirs[name].float()
        clear = torch.ones_like(tensor, dtype=torch.bool)
        for model in models:
            delta = (model[name].float() - base[name].float()).abs()
            rank = max(1, round(density * delta.numel()))
            least = delta.flatten().kthvalue(delta.numel() + 1 - rank).values
            clear &= (delta - least).abs() > 2**-7 * least
        far = (a - b).abs() > 2**-6 * a.abs().clamp(min=1e-3)
        differing, entries = differing + int((far & clear).sum()), entries + int(clear.sum())
    if differing > 1e-3 * entries:
        raise SystemExit(f"{differing / entries:.2%} of the entries beside all thresholds differ from mergekit's")


def in_memory() -> Iterator[Result]:
    base, models = states()
    size = f"{MODELS} x {TENSORS * ELEMENTS // 10**6} M, float32"
    everything = [*base.values(), *(t for model in models for t in model.values())]
    cases: dict[str, Callable[[], Any]] = {
        "shiftkern": lambda: task_arithmetic(base, models, weights=0.3),
        "torch, in place": lambda: torch_task_arithmetic(base, models, 0.3),
        "torch, as written": lambda: torch_sum_of_task_vectors(base, models, 0.3),
    }
    peers = [name for name in cases if name != "shiftkern"]
    for peer in peers:
        agree(cases["shiftkern"](), cases[peer]())
    asked = [("shiftkern", "torch, in place", 4.0)]
    yield Result("task arithmetic", size, interleave(cases, 5), ["shiftkern"], peers, None, asked)
    cases = {
        "shiftkern": lambda: ties(base, models, density=0.2),
        "torch, kthvalue": lambda: torch_ties(base, models, 0.2),
        "PEFT": lambda: peft_ties(base, models, 0.2),
    }
    agree(cases["shiftkern"](), cases["torch, kthvalue"]())
    yield Result(
        "ties",
        size,
        interleave(cases, 3),
        ["shiftkern"],
        ["torch, kthvalue", "PEFT"],
        None,
        [("shiftkern", "best", 20.0)],
    )
    reading = "reading all twice"
    cases = {
        "shiftkern, thresholds alone": lambda: ops.thresholds(
            list(base.values()), [t for m in models for t in m.values()], [TENSORS * ELEMENTS // 5] * MODELS
        ),
        "shiftkern": lambda: ties(base, models, density=0.2, trim_scope="global"),
        reading: lambda: [t.sum() for t in everything for _ in range(2)],
    }
    ours = [name for name in cases if name != reading]
    yield Result(
        "ties, global trim",
        size,
        interleave(cases, 3),
        ours,
        [reading],
        reading,
        [("shiftkern, thresholds alone", reading, 0.5)],
    )
    yield Result(
        "dare",
        size,
        interleave(
            {
                "shiftkern": lambda: dare(base, models, drop_rate=0.5, seed=0),
                "torch": lambda: torch_dare(base, models, 0.5),
            },
            3,
        ),
        ["shiftkern"],
        ["torch"],
    )


def torch_forms(
    base: list[Tensor], models: list[list[Tensor]], columns: int
) -> dict[str, dict[str, Callable[[], list[Tensor]]]]:
    """Methods by ranks and scores, by the operators and by the best that torch has for each step."""
    flat = [t for model in models for t in model]
    rank = sum(t.numel() for t in base) // 5
    chances = [0.5] * MODELS, [0.2] * MODELS, [0.0] * MODELS, list(range(MODELS)), 0
    pairs = [(start, list(others)) for start, *others in zip(base, *models, strict=True)]

    def widened(changes: Callable[..., Any], ranks: Callable[..., Any], add: Callable[..., Any]) -> list[Tensor]:
        merged = []
        for start, others in pairs:
            found = [ranks(change) for change in changes(start, others, False)[:2]]
            by_size, by_turn = ((r.double() / columns).softmax(0).masked_fill(r > columns / 2, 1.0) for r in found)
            merged.append(add(start, others, ((by_size + by_turn) / 2).float(), False, 1.0)[0])
        return merged

    return {
        "pcb": {
            "shiftkern": lambda: ops.compete(base, flat, rank, 1.0)[0],
            "torch": lambda: ops._compete_torch(base, flat, rank, 1.0)[0],
        },
        "widen": {
            "shiftkern": lambda: widened(ops.column_changes, ops.ranks, ops.by_columns),
            "torch": lambda: widened(ops._column_changes_torch, ops._ranks_torch, ops._by_columns_torch),
        },
        "della, drops by rank": {
            "shiftkern": lambda: [ops.rank_drop(t, own, columns, *chances)[0] for t, own in pairs],
            "torch": lambda: [ops._rank_drop_torch(t, own, columns, *chances)[0] for t, own in pairs],
        },
    }


def ranked() -> Iterator[Result]:
    for rows, columns in ((64, 1024), (512, 1024), (2048, 2048)):
        generator = torch.Generator().manual_seed(0)
        base = [torch.randn(rows, columns, generator=generator) for _ in range(4)]
        models = [[t + 0.01 * torch.randn(t.shape, generator=generator) for t in base] for _ in range(MODELS)]
        for work, cases in torch_forms(base, models, columns).items():
            for a, b in zip(cases["shiftkern"](), cases["torch"](), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            size = f"{MODELS} x 4 x {rows} x {columns}, float32"
            yield Result(work, size, interleave(cases, 5), ["shiftkern"], ["torch"])


def write_model(folder: Path, seed: int) -> None:
    """A model with the tensor names of a Llama, in bfloat16; the seed 0 is the base of the others."""
    layers, width, inner, words = LLAMA
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for i in range(layers):
        part = f"model.layers.{i}"
        shapes |= {f"{part}.self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{part}.mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        shapes |= {f"{part}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{part}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    tensors = {}
    for number, (name, shape) in enumerate(shapes.items()):
        tensor = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(number))
        if seed:
            tensor += 0.002 * torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + number))
        tensors[name] = tensor.bfloat16()
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": words,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def run(command: list[str], path: str | None) -> tuple[float, float]:
    """Seconds and peak memory in MB of a command; pages of mapped files that it touched count as memory."""
    environment = dict(os.environ) if path is None else {**os.environ, "PYTHONPATH": path}
    script = (
        "import resource, subprocess, sys, time; start = time.perf_counter();"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, env=environment, capture_output=True, text=True
    )
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def files() -> Iterator[Result]:
    """``shiftkern merge`` and mergekit on the same YAML and files, each in a process of its own, in turn."""
    if MERGEKIT is None:
        print("files: SHIFTKERN_BENCH_MERGEKIT names no folder with mergekit; left out", flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for seed in range(4):
            write_model(folder / f"m{seed}", seed)
        size = (folder / "m0" / "model.safetensors").stat().st_size
        lines = ["merge_method: ties", f"base_model: {folder / 'm0'}", "models:"]
        for seed in range(1, 4):
            lines += [f"  - model: {folder / f'm{seed}'}", "    parameters: {weight: 1.0, density: 0.2}"]
        (folder / "ties.yaml").write_text("\n".join([*lines, "parameters: {normalize: true}", "dtype: bfloat16", ""]))
        commands = {
            "shiftkern merge": ["-m", "shiftkern", "merge", "--memory", "1GB"],
            "mergekit": ["-m", "mergekit.scripts.run_yaml", "--no-copy-tokenizer"],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, float] = {}
        outs: dict[str, State] = {}
        for turn in range(3):
            for name, command in commands.items():
                if sum(seconds[name]) > 60e3:
                    continue
                out = folder / f"out-{turn}-{name.split()[0]}"
                path = MERGEKIT if name == "mergekit" else None
                took, peak = run([sys.executable, *command, str(folder / "ties.yaml"), str(out)], path)
                seconds[name].append(1e3 * took)
                peaks[name] = max(peaks.get(name, 0.0), peak)
                if turn == 0:
                    outs[name] = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
                subprocess.run(["rm", "-r", str(out)], check=True)
        inputs = [load_file(folder / f"m{seed}" / "model.safetensors") for seed in range(4)]
        agree_files(inputs, 0.2, outs["shiftkern merge"], outs["mergekit"])
        named = {name: f"{name} (peak {peaks[name]:.0f} MB)" for name in commands}
        ours, theirs = named["shiftkern merge"], named["mergekit"]
        timings = {named[n]: Timing(median(s), min(s), max(s)) for n, s in seconds.items()}
        work = f"ties of 3 models in files, {size / 2e9:.2f} G parameters, bfloat16"
        yield Result(work, "memory 1 GB", timings, [ours], [theirs], None, [(ours, theirs, 3.0)])


def results() -> Iterator[Result]:
    yield from in_memory()
    yield from ranked()
    yield from files()
