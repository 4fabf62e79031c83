"""State dicts that belong together, and plain forms of what merging is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
Array = np.ndarray

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (7, 5),
    "block.conv": (3, 2, 2, 3),
    "block.weight": (33, 17),
    "block.bias": (33,),
    "one": (1,),
    "scalar": (),
    "empty": (0, 4),
}


def make_states(
    models: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    spread: float = 0.1,
) -> tuple[State, list[State]]:
    """A base, and models near it."""
    g = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    tuned = [
        {n: (t + spread * torch.randn(t.shape, generator=g, dtype=torch.float64)).to(dtype) for n, t in base.items()}
        for _ in range(models)
    ]
    return base, tuned


def plain(tensor: Any) -> Array:
    return tensor.detach().double().numpy() if isinstance(tensor, Tensor) else np.asarray(tensor, dtype=np.float64)


def task_vectors(base: State, models: list[State]) -> dict[str, Array]:
    """(K, ...) for each tensor: differences rounded as those of the tensors' computing type, then float64."""
    found = {}
    for name, tensor in base.items():
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        found[name] = np.stack([plain(model[name].to(wide) - tensor.to(wide)) for model in models])
    return found


def kth_largest(magnitudes: Array, rank: int) -> float:
    return float(np.sort(magnitudes.ravel())[::-1][rank - 1]) if rank else float("inf")


def nearest(share: float, n: int) -> int:
    return max(1, int(share * n + 0.5)) if share > 0 else 0


def philox_words(key: int, count: int) -> Array:
    """Philox-4x32-10 in Python's whole numbers, from its definition."""
    found = []
    for block in range((count + 3) // 4):
        x = [block & 0xFFFFFFFF, block >> 32, 0, 0]
        k = [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            p, q = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
            low = 0xFFFFFFFF
            x = [(q >> 32) ^ x[1] ^ k[0], q & low, (p >> 32) ^ x[3] ^ k[1], p & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        found += x
    return np.array(found[:count], dtype=np.uint64)


def draws(seed: int, model: int, name: str, shape: tuple[int, ...]) -> Array:
    """Draws in [0, 1) for the entries of a tensor of a model."""
    digest = hashlib.blake2b(f"{seed}/{model}/{name}".encode(), digest_size=8).digest()
    return philox_words(int.from_bytes(digest, "little"), int(np.prod(shape))).reshape(shape) / 2**32


def assert_near(merged: Any, base: State, expected: Mapping[str, Array], slack: float = 8.0) -> None:
    """Hold merged tensors to task vectors added to the base; a few roundings of the largest number met."""
    for name, tensor in base.items():
        want = plain(tensor) + expected[name]
        unit = torch.finfo(tensor.dtype).eps
        far = slack * unit * max(1e-30, np.abs(plain(tensor)).max(initial=0.0), np.abs(want).max(initial=0.0))
        np.testing.assert_allclose(plain(merged[name]), want, rtol=0, atol=far, err_msg=name)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Same names in the same order, dtypes, and bits."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        got, want = (t if isinstance(t, Tensor) else torch.from_numpy(np.asarray(t)) for t in (found[name], value))
        assert got.dtype == want.dtype, name
        assert torch.equal(got, want), name
