"""Specs of chains: any permutation of theirs leaves what the network computes alone."""

import pytest
import torch
from torch import nn

from shiftkern import ArgumentError
from shiftkern.merge.apply_permutation import apply_permutation
from shiftkern.merge.sequential_spec import sequential_spec

from helpers.networks import convnet, filled, mlp
from helpers.strategies import make


def test_layers_by_hand():
    assert sequential_spec(mlp(3, 4, 2)) == {
        "0.weight": ("0", None),
        "0.bias": ("0",),
        "2.weight": (None, "0"),
        "2.bias": (None,),
    }
    spec = sequential_spec(convnet())
    assert spec["4.weight"] == ("4", "0", None, None)
    assert spec["5.running_var"] == ("4",)
    assert spec["9.weight"] == ("9", ("4", 4))
    assert spec["12.weight"] == (None, "9")
    assert "5.num_batches_tracked" not in spec


CHAINS = {
    "deep": (mlp(4, 9, 8, 7, 3), (6, 4)),
    "images": (convnet(), (3, 2, 8, 8)),
    "nested": (
        nn.Sequential(
            nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2))
        ),
        (4, 3),
    ),
    "pooled": (
        nn.Sequential(
            nn.Conv1d(2, 5, 3),
            nn.InstanceNorm1d(5, affine=True),
            nn.PReLU(5),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(5, 2),
        ),
        (4, 2, 9),
    ),
    "slopes": (
        nn.Sequential(nn.Linear(3, 5, bias=False), nn.PReLU(), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(5, 2)),
        (4, 3),
    ),
    "volumes": (
        nn.Sequential(
            nn.Conv3d(1, 3, 2), nn.ELU(), nn.Conv3d(3, 2, 2), nn.Flatten(), nn.Linear(2 * 8, 4), nn.Identity()
        ),
        (2, 1, 4, 4, 4),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_permutations_change_nothing(name, generator):
    net, shape = CHAINS[name]
    filled(net, generator).eval()
    spec = sequential_spec(net)
    names = {entry if isinstance(entry, str) else entry[0] for axes in spec.values() for entry in axes if entry}
    state = net.state_dict()
    perms = {p: torch.randperm(state[f"{p}.weight"].shape[0], generator=generator) for p in names}
    assert len(perms) == sum(value.dim() > 1 for value in state.values()) - 1
    x = make(shape)
    before = net(x)
    moved = apply_permutation(spec, perms, state)
    assert any(not torch.equal(moved[key], state[key]) for key in state)
    net.load_state_dict(moved)
    torch.testing.assert_close(net(x), before)


SHARED = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 2),
        nn.Sequential(),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.Softmax(1), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 3)),
        nn.Sequential(nn.Linear(2, 4), nn.Linear(5, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.Linear(8, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.MaxPool1d(2), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.Conv1d(4, 2, 1)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(8, 2)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(9, 2)),
        nn.Sequential(SHARED, nn.ReLU(), SHARED, nn.Linear(4, 2)),
    ],
)
def test_errors(module):
    with pytest.raises(ArgumentError, match=r"^sequential_spec: argument 'module': expected .*, got "):
        sequential_spec(module)
