"""Growth along four modes against the full map, and cores that copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.grow import grow, grow_cores

SMALL, LARGE = (2, 3, 4, 2), (3, 5, 4, 3)


def problem(rank=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    params = torch.randn(SMALL, generator=g, dtype=torch.float64).to(dtype)
    cores = [
        torch.randn(rank + m, a, b, rank + (m + 1) % 4, generator=g, dtype=torch.float64).to(dtype)
        for m, (a, b) in enumerate(zip(SMALL, LARGE, strict=True))
    ]
    return params, cores


def by_loops(params, cores):
    """Each entry of the full map is the trace of a product of four matrices."""
    b, i, o, ell = (core.double().numpy() for core in cores)
    grown = np.zeros(LARGE)
    for new in np.ndindex(LARGE):
        for old in np.ndindex(SMALL):
            ring = b[:, old[0], new[0]] @ i[:, old[1], new[1]] @ o[:, old[2], new[2]] @ ell[:, old[3], new[3]]
            grown[new] += np.trace(ring) * params.double().numpy()[old]
    return grown


@pytest.mark.parametrize("rank", [1, 2])
def test_equals_the_full_map(rank):
    params, cores = problem(rank)
    np.testing.assert_allclose(grow(params, cores), by_loops(params, cores), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    params, cores = problem(dtype=dtype)
    found = grow(params, cores)
    assert found.dtype == dtype
    exact = by_loops(params, cores)
    np.testing.assert_allclose(found.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps * np.abs(exact).max())


def test_it_is_linear_in_the_weights():
    params, cores = problem()
    other = problem(seed=1)[0]
    torch.testing.assert_close(grow(params + 2 * other, cores), grow(params, cores) + 2 * grow(other, cores))


def test_gradients():
    params, cores = problem(1)
    inputs = [t.requires_grad_() for t in (params, *cores)]
    assert torch.autograd.gradcheck(lambda p, *c: grow(p, c), inputs)


@pytest.mark.parametrize("rank", [1, 3])
def test_cores_of_equal_sizes_are_the_identity(rank):
    params, _ = problem()
    assert torch.equal(grow(params, grow_cores(SMALL, SMALL, rank, std=0.0, dtype=torch.float64)), params)
    near = grow(params, grow_cores(SMALL, SMALL, rank, std=1e-3, dtype=torch.float64))
    assert 0 < (near - params).abs().max() < 0.1


def test_a_layer_of_repeated_units_computes_what_it_did():
    params, _ = problem()
    grown = grow(params, grow_cores(SMALL, (2, 7, 6, 5), std=0.0, dtype=torch.float64))
    x = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    repeated = x[torch.arange(7) % 3]
    for layer in range(5):
        for block in range(2):
            out = repeated @ grown[block, :, :, layer]
            torch.testing.assert_close(out, (x @ params[block, :, :, layer * 2 // 5])[torch.arange(6) % 4])


def test_cores_are_trained_in_all_channels():
    params, _ = problem()
    cores = grow_cores(SMALL, LARGE, 2, std=0.1, dtype=torch.float64)
    grow(params, cores).square().sum().backward()
    assert all(isinstance(core, torch.nn.Parameter) and bool((core.grad != 0).any(1).all()) for core in cores)


def test_noise_comes_from_the_seed():
    one, same, other = (grow_cores(SMALL, LARGE, 2, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_arrays_in_arrays_out():
    params, cores = problem()
    found = grow(params.numpy(), [core.numpy() for core in cores])
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, grow(params, cores).numpy())


def test_errors():
    params, cores = problem()
    with pytest.raises(ArgumentTypeError, match=r"grow: argument 'cores': expected a list of four"):
        grow(params, cores[:3])
    with pytest.raises(ArgumentError, match=r"grow: argument 'params'"):
        grow(params[0], cores)
    with pytest.raises(ArgumentError, match=r"grow: argument 'cores\[1\]': expected shape"):
        grow(params, [cores[0], cores[1][:, :2], *cores[2:]])
    with pytest.raises(ArgumentError, match=r"grow: argument 'cores\[0\]': expected a first rank"):
        grow(params, [cores[0][:1], *cores[1:]])
    with pytest.raises(ArgumentTypeError, match=r"grow: argument 'cores\[2\]'"):
        grow(params, [*cores[:2], cores[2].numpy(), cores[3]])
    for name, value in (("small", (1, 2)), ("large", 3), ("dtype", torch.float16)):
        with pytest.raises(ArgumentTypeError, match=rf"grow_cores: argument '{name}'"):
            grow_cores(**{"small": SMALL, "large": LARGE, name: value})
    for name, value in (("small", (0, 1, 1, 1)), ("rank", 0), ("std", -1.0), ("seed", -1)):
        with pytest.raises(ArgumentError, match=rf"grow_cores: argument '{name}'"):
            grow_cores(**{"small": SMALL, "large": LARGE, name: value})
