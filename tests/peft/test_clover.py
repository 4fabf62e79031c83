"""CLOVER against whole products of projections, and against attention written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shiftkern
from shiftkern.peft import (
    CLOVERConfig,
    adapted_layers,
    clover_decompose,
    clover_prune,
    inject,
    load,
    merge,
    save,
    trainable_parameters,
    unmerge,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(x: Tensor) -> Tensor:
    """Rotary embedding: pairs of coordinates turned by an angle that grows with the position."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 3.0 ** torch.arange(half, dtype=x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Attention(nn.Module):
    """Attention with four projections, or three in one; grouped queries and rotary embeddings if asked for."""

    def __init__(self, heads=4, kv_heads=None, width=5, d=14, *, bias=True, rotary=False, fused=False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width, self.rotary = heads, kv_heads or heads, width, rotary
        sizes = [heads * width, self.kv_heads * width, self.kv_heads * width]
        self.sizes = sizes
        if fused:
            self.c_attn = nn.Linear(d, sum(sizes), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, size, bias=bias) for size in sizes)
        self.o_proj = nn.Linear(heads * width, d)
        self.fused = fused
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(draw(*parameter.shape, seed=i) / 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            q, k, v = self.c_attn(x).split(self.sizes, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(-2, -3) for t in (q, k, v))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, -3) for t in (k, v))
        out = (q @ k.mT / math.sqrt(self.width)).softmax(-1) @ v
        return self.o_proj(out.transpose(-2, -3).flatten(-2))


def with_bias(weight: Tensor, bias: Tensor | None) -> np.ndarray:
    w = weight.detach().double().numpy()
    return w if bias is None else np.concatenate([w, bias.detach().double().numpy()[:, None]], 1)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 3), (4, 4, 3), (4, 2, 3), (6, 1, 2), (2, 2, 9)])
@pytest.mark.parametrize("biased", [(False, False), (True, True), (False, True)])
def test_factors_are_the_singular_vectors_of_the_products(heads: int, kv_heads: int, width: int, biased):
    left, right = draw(heads * width, 7), draw(kv_heads * width, 8, seed=1)
    biases = [draw(len(w), seed=9) if b else None for w, b in zip((left, right), biased, strict=True)]
    f = clover_decompose(left, right, *biases, heads=heads, kv_heads=kv_heads)
    a, b = with_bias(left, biases[0]), with_bias(right, biases[1])
    group = heads // kv_heads
    for g in range(kv_heads):
        # The whole products of a group, one under the other.
        products = [
            a[h * width : (h + 1) * width].T @ b[g * width : (g + 1) * width] for h in range(g * group, (g + 1) * group)
        ]
        u = f.left[g * group : (g + 1) * group].numpy()
        rank = u.shape[2]
        for h in range(group):
            np.testing.assert_allclose(u[h] * f.singular[g].numpy() @ f.right[g].numpy().T, products[h], atol=1e-12)
        stacked = u.reshape(-1, rank)
        np.testing.assert_allclose(stacked.T @ stacked, np.eye(rank), atol=1e-12)
        np.testing.assert_allclose(f.right[g].numpy().T @ f.right[g].numpy(), np.eye(rank), atol=1e-12)
        want = np.linalg.svd(np.concatenate(products), compute_uv=False)
        np.testing.assert_allclose(f.singular[g].numpy(), want[:rank], atol=1e-12)
        assert not want[rank:].max(initial=0.0) > 1e-12


def test_decomposition_makes_no_whole_product():
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(result)
            largest.append(max((t.numel() for t in leaves if isinstance(t, Tensor)), default=0))
            return result

    q, k = draw(32, 300), draw(32, 300, seed=1)
    with Watch():
        clover_decompose(q, k, heads=8)
    assert max(largest) <= q.numel()


def weights(block: Attention) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    projections = [block.q_proj, block.k_proj, block.v_proj]
    return (
        [*(p.weight for p in projections), block.o_proj.weight],
        {f"{x}_bias": p.bias for x, p in zip("qkv", projections, strict=True)},
    )


def attend(p, x: Tensor, block: Attention, scale: float | None) -> Tensor:
    """Attention with pruned weights."""
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, width)).transpose(-2, -3)
        for w, b, width in (
            (p.q_weight, p.q_bias, p.qk_dim),
            (p.k_weight, p.k_bias, p.qk_dim),
            (p.v_weight, p.v_bias, p.v_dim),
        )
    )
    k, v = (t.repeat_interleave(block.heads // block.kv_heads, -3) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.linear(out.transpose(-2, -3).flatten(-2), p.o_weight, block.o_proj.bias)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_nothing_changes_while_all_directions_are_kept(kv_heads, bias: bool):
    block, x = Attention(kv_heads=kv_heads, bias=bias).double(), draw(2, 6, 14, seed=50)
    given, biases = weights(block)
    for options in ({}, {"qk_dim": 5}, {"v_dim": 5}, {"qk_dim": 5, "v_dim": 5}):
        p = clover_prune(*given, **biases, heads=4, kv_heads=kv_heads, **options)
        assert p.scale == 1 / math.sqrt(5)
        torch.testing.assert_close(attend(p, x, block, p.scale), block(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_directions_that_do_not_matter_are_pruned_without_a_change(kv_heads):
    # Queries, keys, values and outputs whose heads have rank 2 and 3 only.
    block, x = Attention(kv_heads=kv_heads, bias=False).double(), draw(2, 6, 14, seed=50)
    with torch.no_grad():
        for layer, rank in ((block.k_proj, 2), (block.v_proj, 3)):
            rows = layer.weight.unflatten(0, (-1, 5))
            layer.weight.copy_((draw(1, 5, rank, seed=rank) @ draw(1, rank, 5, seed=4) @ rows).flatten(0, 1))
    given, _ = weights(block)
    p = clover_prune(*given, heads=4, kv_heads=kv_heads, qk_dim=2, v_dim=3)
    groups = kv_heads or 4
    shapes = [tuple(t.shape) for t in (p.q_weight, p.k_weight, p.v_weight, p.o_weight)]
    assert shapes == [(8, 14), (2 * groups, 14), (3 * groups, 14), (14, 12)]
    torch.testing.assert_close(attend(p, x, block, p.scale), block(x), rtol=1e-9, atol=1e-9)
    # The attention scale is that of the original width; or it is folded in, for layers that take their own.
    assert p.scale == 1 / math.sqrt(5)
    assert not torch.allclose(attend(p, x, block, None), block(x))
    folded = clover_prune(*given, heads=4, kv_heads=kv_heads, qk_dim=2, v_dim=3, fold_scale=True)
    assert folded.scale == 1 / math.sqrt(2)
    torch.testing.assert_close(attend(folded, x, block, None), block(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_pruned_products_are_the_nearest_of_their_rank(rank: int):
    block = Attention().double()
    given, biases = weights(block)
    p = clover_prune(*given, **biases, heads=4, qk_dim=rank, v_dim=rank)
    q, k, v = (
        with_bias(w, b).reshape(4, rank, -1)
        for w, b in ((p.q_weight, p.q_bias), (p.k_weight, p.k_bias), (p.v_weight, p.v_bias))
    )
    old_q, old_k, old_v = (
        with_bias(layer.weight, layer.bias).reshape(4, 5, -1) for layer in (block.q_proj, block.k_proj, block.v_proj)
    )
    o = p.o_weight.detach().numpy().reshape(14, 4, rank)
    old_o = block.o_proj.weight.detach().numpy().reshape(14, 4, 5)
    for h in range(4):
        for got, whole in ((q[h].T @ k[h], old_q[h].T @ old_k[h]), (o[:, h] @ v[h], old_o[:, h] @ old_v[h])):
            u, s, vt = np.linalg.svd(whole)
            np.testing.assert_allclose(got, u[:, :rank] * s[:rank] @ vt[:rank], atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_of_pruned_weights(dtype: torch.dtype):
    block = Attention().to(dtype)
    given, biases = weights(block)
    p = clover_prune(*given, **biases, heads=4, qk_dim=3, v_dim=2)
    for name in ("q_weight", "q_bias", "k_weight", "k_bias", "v_weight", "v_bias", "o_weight"):
        assert getattr(p, name).dtype == dtype
        assert not getattr(p, name).requires_grad
    wide = clover_prune(
        *(w.double() for w in given), **{n: b.double() for n, b in biases.items()}, heads=4, qk_dim=3, v_dim=2
    )
    torch.testing.assert_close(p.o_weight, wide.o_weight.to(dtype), rtol=0, atol=0)


def shaken(block: nn.Module, size: float = 0.2) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(p for p in block.parameters() if p.requires_grad):
            parameter.copy_(size * draw(*parameter.shape, seed=100 + i))
    return block


def whole_attention(
    block: Attention, x: Tensor, scores: Callable[[int], np.ndarray], outputs: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Attention from the products of each head alone, on inputs with a 1 behind them."""
    values = np.concatenate([x.numpy(), np.ones((len(x), 1))], 1)
    total = np.zeros((len(x), 14)) + block.o_proj.bias.detach().numpy()
    for h in range(block.heads):
        s = values @ scores(h) @ values.T / math.sqrt(block.width)
        p = np.exp(s - s.max(1, keepdims=True))
        total += p / p.sum(1, keepdims=True) @ values @ outputs(h).T
    return total


def test_trained_matrices_stand_between_the_singular_vectors():
    block, x = Attention().double(), draw(6, 14, seed=50)
    plain = copy.deepcopy(block)
    inject(block, CLOVERConfig(heads=4))
    layers = adapted_layers(block)
    assert list(layers) == ["q_proj", "v_proj"]
    assert trainable_parameters(block)[0] == 2 * 4 * 5 * 5
    assert torch.equal(block(x), plain(x))
    shaken(block)
    cores = {n: layers[n].adapter("default").parts[n[0]] for n in layers}
    projections = [plain.q_proj, plain.k_proj, plain.v_proj]
    q, k, v = (with_bias(layer.weight, layer.bias).reshape(4, 5, -1) for layer in projections)
    o = plain.o_proj.weight.detach().numpy().reshape(14, 4, 5)

    def scores(h: int) -> np.ndarray:
        return between(q[h].T @ k[h], cores["q_proj"].core[h].mT, cores["q_proj"].inward[h].numpy() @ q[h])

    def outputs(h: int) -> np.ndarray:
        return between((o[:, h] @ v[h]).T, cores["v_proj"].core[h].mT, cores["v_proj"].inward[h].numpy() @ v[h]).T

    def between(product: np.ndarray, change: Tensor, coordinates: np.ndarray) -> np.ndarray:
        """U (diag(S) + D) V^T from the whole product; the coordinates say how the layer signs its vectors."""
        u, s, vt = np.linalg.svd(product)
        u, s, vt = u[:, :5], s[:5], vt[:5]
        signs = np.diag(coordinates @ u)
        np.testing.assert_allclose(np.abs(signs), 1, atol=1e-8)
        u, vt = u * signs, vt * signs[:, None]
        return u @ (np.diag(s) + change.detach().numpy()) @ vt

    np.testing.assert_allclose(block(x).detach().numpy(), whole_attention(plain, x, scores, outputs), atol=1e-9)


def test_rotary_projections_train_their_triangular_factors():
    block, x = Attention(kv_heads=2, width=4, rotary=True).double(), draw(2, 6, 14, seed=50)
    plain = copy.deepcopy(block)
    inject(block, CLOVERConfig(heads=4, kv_heads=2, rotary=True))
    layers = adapted_layers(block)
    assert list(layers) == ["q_proj", "k_proj", "v_proj"]
    assert trainable_parameters(block)[0] == (4 + 2 + 2) * 4 * 4
    assert torch.equal(block(x), plain(x))
    shaken(block)
    want = copy.deepcopy(plain)
    for name, layer in layers.items():
        part, linear = layer.adapter("default").parts[name[0]], getattr(want, name)
        heads = with_bias(linear.weight, linear.bias).reshape(-1, 4, 15)
        new = []
        for h, rows in enumerate(heads):
            basis, r = np.linalg.qr(rows.T)
            # inward is R^-T up to the signs of the basis.
            signs = np.diag(part.inward[h].numpy() @ rows @ basis)
            np.testing.assert_allclose(np.abs(signs), 1, atol=1e-8)
            basis, r = basis * signs, r * signs[:, None]
            np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-12)
            new.append((basis @ (r + part.core[h].detach().numpy().T)).T)
        flat = torch.from_numpy(np.concatenate(new))
        with torch.no_grad():
            linear.weight.copy_(flat[:, :-1])
            linear.bias.copy_(flat[:, -1])
    torch.testing.assert_close(block(x), want(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_grouped_queries_have_a_matrix_each_with_their_shared_keys(kv_heads: int):
    block, x = Attention(kv_heads=kv_heads).double(), draw(2, 6, 14, seed=50)
    plain = copy.deepcopy(block)
    inject(block, CLOVERConfig(heads=4, kv_heads=kv_heads))
    assert trainable_parameters(block)[0] == (4 + kv_heads) * 25
    assert torch.equal(block(x), plain(x))
    shaken(block)
    part = adapted_layers(block)["q_proj"].adapter("default").parts["q"]
    q, k = (with_bias(layer.weight, layer.bias).reshape(-1, 5, 15) for layer in (plain.q_proj, plain.k_proj))
    new = adapted_layers(block)["q_proj"].weight.detach().numpy().reshape(4, 5, 14)
    for h in range(4):
        u, s, vt = np.linalg.svd(q[h].T @ k[h // (4 // kv_heads)])
        signs = np.diag(part.inward[h].numpy() @ q[h] @ u[:, :5])
        changed = u[:, :5] * signs @ (np.diag(s[:5]) + part.core[h].detach().numpy().T) @ (vt[:5] * signs[:, None])
        np.testing.assert_allclose(new[h].T @ k[h // (4 // kv_heads)], changed[:14], atol=1e-9)


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("rotary", [False, True])
def test_one_layer_for_all_three_is_the_same(kv_heads, rotary: bool):
    apart = Attention(kv_heads=kv_heads, width=4, rotary=rotary).double()
    fused = Attention(kv_heads=kv_heads, width=4, rotary=rotary, fused=True).double()
    with torch.no_grad():
        projections = [apart.q_proj, apart.k_proj, apart.v_proj]
        fused.c_attn.weight.copy_(torch.cat([p.weight for p in projections]))
        fused.c_attn.bias.copy_(torch.cat([p.bias for p in projections]))
        fused.o_proj.load_state_dict(apart.o_proj.state_dict())
    x = draw(2, 6, 14, seed=50)
    shaken(inject(apart, CLOVERConfig(heads=4, kv_heads=kv_heads, rotary=rotary)))
    inject(fused, CLOVERConfig(heads=4, kv_heads=kv_heads, rotary=rotary, fused="c_attn"))
    parts = adapted_layers(fused)["c_attn"].adapter("default").parts
    assert list(parts) == (list("qkv") if rotary else list("qv"))
    with torch.no_grad():
        for name, layer in adapted_layers(apart).items():
            parts[name[0]].core.copy_(layer.adapter("default").parts[name[0]].core)
    torch.testing.assert_close(fused(x), apart(x), rtol=1e-10, atol=1e-10)
    want = fused(x)
    merge(fused)
    torch.testing.assert_close(fused(x), want, rtol=1e-10, atol=1e-10)


def test_merge_takes_biases_along_and_comes_back():
    block, x = Attention().double(), draw(2, 6, 14, seed=50)
    before = copy.deepcopy(block.state_dict())
    shaken(inject(block, CLOVERConfig(heads=4)))
    want = block(x)
    merge(block)
    torch.testing.assert_close(block(x), want, rtol=1e-10, atol=1e-10)
    unmerge(block)
    for name, layer in adapted_layers(block).items():
        for kind in ("weight", "bias"):
            torch.testing.assert_close(getattr(layer.base_layer, kind), before[f"{name}.{kind}"], rtol=1e-9, atol=1e-9)


def test_heads_without_full_rank_start_at_the_identity():
    block, x = Attention().double(), draw(2, 6, 14, seed=50)
    with torch.no_grad():
        block.q_proj.weight[:5] = 0.0
        block.q_proj.bias[:5] = 0.0
        block.v_proj.weight[5] = block.v_proj.weight[6]
        block.v_proj.bias[5] = block.v_proj.bias[6]
    want = block(x)
    inject(block, CLOVERConfig(heads=4))
    assert torch.equal(block(x), want)
    shaken(block)
    block(x).sum().backward()
    for parameter in block.parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


def test_training_reaches_what_a_new_product_asks_for():
    # The target changes how queries meet keys within their spans; the trained matrices can follow exactly.
    block, x = Attention(bias=False).double(), draw(4, 6, 14, seed=50)
    target = copy.deepcopy(block)
    with torch.no_grad():
        mixed = (torch.eye(5) + 0.2 * draw(4, 5, 5, seed=8)) @ target.q_proj.weight.unflatten(0, (4, 5))
        target.q_proj.weight.copy_(mixed.flatten(0, 1))
    inject(block, CLOVERConfig(heads=4, target_modules=["q_proj"]))
    core = [p for p in block.parameters() if p.requires_grad]
    solver = torch.optim.LBFGS(core, max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = (block(x) - target(x)).square().sum()
        value.backward()
        return value

    start = loss().item()
    solver.step(loss)
    assert loss().item() < 1e-5 * start


def test_save_and_load(tmp_path):
    block, x = Attention(), draw(2, 6, 14, seed=50).float()
    plain = copy.deepcopy(block)
    shaken(inject(block, CLOVERConfig(heads=4)))
    save(block, tmp_path)
    again = load(plain, tmp_path)
    assert torch.equal(again(x), block(x))


def test_names_of_bert():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.ModuleDict(
                {
                    "self": nn.ModuleDict({n: nn.Linear(6, 6) for n in ("query", "key", "value")}),
                    "output": nn.ModuleDict({"dense": nn.Linear(6, 6)}),
                }
            )
            self.output = nn.ModuleDict({"dense": nn.Linear(6, 6)})

    names = {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
    }
    model = inject(nn.ModuleList([Layer(), Layer()]), CLOVERConfig(heads=2, **names))
    assert list(adapted_layers(model)) == [f"{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]


def test_gpt2_from_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_head=4, n_layer=2, vocab_size=20, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.arange(8)[None]
    want = model(ids).logits
    inject(model, CLOVERConfig(heads=4, fused="attn.c_attn", o="attn.c_proj"))
    assert torch.equal(model(ids).logits, want)
    shaken(model)
    got = model(ids).logits
    assert not torch.allclose(got, want)
    merge(model)
    torch.testing.assert_close(model(ids).logits, got, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"left": torch.zeros(7, 5)}, "left"),
        ({"left": torch.zeros(6)}, "left"),
        ({"left": torch.zeros(6, 5).long()}, "left"),
        ({"left": torch.full((6, 5), torch.nan)}, "left"),
        ({"left": torch.zeros(6, 0)}, "left"),
        ({"right": torch.zeros(4, 5)}, "right"),
        ({"right": None}, "right"),
        ({"left_bias": torch.zeros(5)}, "left_bias"),
        ({"right_bias": torch.zeros(6).long()}, "right_bias"),
        ({"heads": 0}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv_heads": 1.5}, "kv_heads"),
    ],
)
def test_decomposition_refuses(change, name: str):
    arguments = {"left": torch.ones(6, 5), "right": torch.ones(6, 5), "heads": 2, **change}
    with pytest.raises(shiftkern.ArgumentError, match=f"clover_decompose: argument '{name}'"):
        clover_decompose(**arguments)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"q_weight": torch.zeros(5, 6)}, "q_weight"),
        ({"k_weight": torch.ones(4, 6)}, "k_weight"),
        ({"v_weight": torch.zeros(5, 6)}, "v_weight"),
        ({"o_weight": torch.zeros(6, 5)}, "o_weight"),
        ({"o_weight": torch.ones(6, 4)}, "o_weight"),
        ({"o_weight": torch.ones(6)}, "o_weight"),
        ({"o_weight": 3}, "o_weight"),
        ({"q_bias": torch.zeros(5)}, "q_bias"),
        ({"k_bias": torch.zeros(5)}, "k_bias"),
        ({"v_bias": torch.zeros(5)}, "v_bias"),
        ({"heads": True}, "heads"),
        ({"kv_heads": 4}, "kv_heads"),
        ({"qk_dim": 0}, "qk_dim"),
        ({"qk_dim": 4}, "qk_dim"),
        ({"v_dim": 4}, "v_dim"),
        ({"v_dim": 1.5}, "v_dim"),
        ({"fold_scale": 1}, "fold_scale"),
    ],
)
def test_pruning_refuses(change, name: str):
    arguments = {f"{x}_weight": torch.ones(6, 6) for x in "qkvo"} | {"heads": 2} | change
    with pytest.raises(shiftkern.ArgumentError, match=f"clover_prune: argument '{name}'"):
        clover_prune(**arguments)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"heads": 0}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"rotary": 1}, "rotary"),
        ({"q": ""}, "q"),
        ({"k": None}, "k"),
        ({"fused": 3}, "fused"),
        ({"target_modules": []}, "target_modules"),
    ],
)
def test_config_refuses(options, name: str):
    with pytest.raises(shiftkern.ArgumentError, match=f"CLOVERConfig: argument '{name}'"):
        CLOVERConfig(**{"heads": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "3 heads of equal width in 'q_proj', got 20"),
        ({"heads": 4, "kv_heads": 1}, "heads of 5 rows in 'k_proj', got 20"),
        ({"heads": 4, "k": "key"}, "a linear layer 'key' beside 'q_proj', got none"),
        ({"heads": 4, "target_modules": ["k_proj"]}, "layers whose names end in 'q_proj' or 'v_proj', got 'k_proj'"),
        ({"heads": 5, "fused": "q_proj"}, "rows for 15 heads of queries, keys and values in 'q_proj', got 20"),
    ],
)
def test_layers_that_do_not_fit(options, message: str):
    block = Attention()
    with pytest.raises(shiftkern.ArgumentError, match=message):
        inject(block, CLOVERConfig(**options))
    assert isinstance(block.q_proj, nn.Linear)
