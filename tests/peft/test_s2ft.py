"""S2FT: slabs on selected rows and columns, on attention with fewer keys than queries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import S2FTConfig, adapted_layers, inject, load, merge, save, trainable_parameters

from helpers.peft import fixed, rows, train

HEAD = 4


class Block(nn.Module):
    """Four heads of queries on two of keys and values, and a gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 4 * HEAD), nn.Linear(4 * HEAD, 8)
        self.k_proj, self.v_proj = nn.Linear(8, 2 * HEAD), nn.Linear(8, 2 * HEAD)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        split = lambda y: y.unflatten(-1, (-1, HEAD)).transpose(-3, -2)  # noqa: E731
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o_proj(heads.transpose(-3, -2).flatten(-2))
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def block(dtype=torch.float64):
    return fixed(Block(), dtype)


ALL = {"v": 0.5, "o": 0.5, "u": 0.25, "d": 0.1, "head_dim": HEAD}


def test_selected_rows_and_columns_change_and_no_others():
    model = train(inject(block(), S2FTConfig(**ALL)))
    merge(model)
    base = block()
    changed = {}
    for name, layer in adapted_layers(model).items():
        moved = (layer.base_layer.weight != base.get_submodule(name).weight).detach()
        rows_of, columns_of = moved.all(1), moved.all(0)
        assert torch.equal(moved, rows_of[:, None] | columns_of), name
        changed[name] = (rows_of if name in ("v_proj", "up_proj") else columns_of).nonzero().flatten().tolist()
    assert set(changed) == {"v_proj", "o_proj", "up_proj", "down_proj"}
    assert [len(changed[n]) for n in ("v_proj", "o_proj", "up_proj", "down_proj")] == [HEAD, 2 * HEAD, 5, 2]
    for name in ("v_proj", "o_proj"):
        starts = changed[name][::HEAD]
        assert changed[name] == [start + i for start in starts for i in range(HEAD)]
        assert all(start % HEAD == 0 for start in starts)


def test_equals_slabs_added_by_loops():
    model = train(inject(block(), S2FTConfig(**ALL)))
    for name, layer in adapted_layers(model).items():
        adapter = layer.adapter("default")
        weight = block().get_submodule(name).weight.detach().clone()
        for k, i in enumerate(adapter.index.tolist()):
            for j in range(weight.shape[1 if adapter.axis == 0 else 0]):
                if adapter.axis == 0:
                    weight[i, j] += adapter.slab[k, j]
                else:
                    weight[j, i] += adapter.slab[j, k]
        x = torch.randn(3, weight.shape[1], dtype=torch.float64)
        want = nn.functional.linear(x, weight, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-13)


def test_it_trains_what_training_the_slab_in_place_would():
    """One step from the zero start moves the selected entries as a step of full training does, and nothing else."""
    x = rows(torch.float64)
    model, full = inject(block(), S2FTConfig(**ALL)), block()
    for m in (model, full):
        m(x).square().sum().backward()
    for name, layer in adapted_layers(model).items():
        adapter = layer.adapter("default")
        want = full.get_submodule(name).weight.grad.index_select(adapter.axis, adapter.index)
        torch.testing.assert_close(adapter.slab.grad, want, rtol=0, atol=1e-11)


def test_heads_are_taken_from_the_config_of_the_model():
    class Settings:
        hidden_size, num_attention_heads = 16, 4

    model = block()
    model.config = Settings()
    index = adapted_layers(inject(model, S2FTConfig(v=0.5)))["v_proj"].adapter("default").index
    assert len(index) == HEAD
    model = block()
    model.config = Settings()
    model.config.head_dim = 2
    assert len(adapted_layers(inject(model, S2FTConfig(v=0.25)))["v_proj"].adapter("default").index) == 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_selection_depends_on_the_seed_alone(seed):
    first, second, other = (inject(block(), S2FTConfig(d=0.3, o=0.0, seed=s)) for s in (seed, seed, seed + 10))
    index = [adapted_layers(m)["down_proj"].adapter("default").index.tolist() for m in (first, second, other)]
    assert index[0] == index[1] != index[2]
    assert len(set(index[0])) == 6


def test_every_channel_is_selected_alike():
    counts = torch.zeros(20)
    for seed in range(400):
        model = inject(block(), S2FTConfig(d=0.25, o=0.0, seed=seed))
        counts[adapted_layers(model)["down_proj"].adapter("default").index] += 1
    # Binomial with 400 trials of 1/4: standard deviation 8.7; four of them for the largest of twenty.
    assert (counts - 100).abs().max() < 35


def test_a_selection_without_a_seed_is_that_of_the_file(tmp_path):
    model = train(inject(block(torch.float32), S2FTConfig(**ALL, seed=None)))
    save(model, tmp_path)
    again = load(block(torch.float32), tmp_path)
    assert torch.equal(again(rows()), model(rows()))


def test_small_shares_select_one_and_all_select_everything():
    model = inject(block(), S2FTConfig(o=1e-9, d=1.0, head_dim=HEAD))
    layers = adapted_layers(model)
    assert layers["o_proj"].adapter("default").slab.shape == (8, HEAD)
    assert layers["down_proj"].adapter("default").index.tolist() == list(range(20))
    assert trainable_parameters(model)[0] == 8 * HEAD + 8 * 20


@pytest.mark.parametrize("role", ["v", "o", "u", "d"])
def test_refuses_shares(role):
    with pytest.raises(ArgumentError, match=f"'{role}'"):
        S2FTConfig(**{role: 1.5})
    with pytest.raises(ArgumentTypeError, match=f"'{role}'"):
        S2FTConfig(**{role: "1"})
    with pytest.raises(ArgumentTypeError, match=f"'{role}_modules'"):
        S2FTConfig(**{f"{role}_modules": "name"})


def test_refuses():
    with pytest.raises(ArgumentError, match="at least one share"):
        S2FTConfig(o=0, d=0)
    with pytest.raises(ArgumentError, match="'head_dim'"):
        S2FTConfig(head_dim=0)
    with pytest.raises(ArgumentError, match="'seed'"):
        S2FTConfig(seed=-1)
    with pytest.raises(ArgumentError, match="'head_dim': expected the width of a head"):
        inject(block(), S2FTConfig())
    with pytest.raises(ArgumentError, match="'head_dim': expected a divisor of the 16 inputs of 'o_proj', got 3"):
        inject(block(), S2FTConfig(head_dim=3))
    with pytest.raises(ArgumentError, match=r"'target_modules': expected modules named .*'q_proj'"):
        inject(block(), S2FTConfig(target_modules=["q_proj"]))
    with pytest.raises(ArgumentError, match="'v': expected a share above 0 for 'v_proj'"):
        inject(block(), S2FTConfig(target_modules=["v_proj"]))


@pytest.mark.parametrize("shape", [(1, 8), (2, 1, 8), (0, 3, 8)])
def test_shapes(shape):
    assert train(inject(block(), S2FTConfig(**ALL)))(torch.ones(shape, dtype=torch.float64)).shape == shape
