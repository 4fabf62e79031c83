"""Mango: a large model's weights as a multilinear map of a small one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shiftkern import _checks
from shiftkern._crossing import accept

__all__ = ["grow", "grow_cores"]

_MODES = ("blocks", "inputs", "outputs", "layers")


def grow(params: Any, cores: Any) -> Any:
    """Grow the weights of a model along four modes at once.

    With blocks ``b``, inputs ``i``, outputs ``o`` and layers ``l``, small ones on the left of the cores,
    ``M'[b',i',o',l'] = sum_{b,i,o,l} sum_{p,q,r,s} B[p,b,b',q] I[q,i,i',r] O[r,o,o',s] L[s,l,l',p] M[b,i,o,l]``:
    a linear map of all weights to all new weights, kept as a ring of four small cores.

    Parameters
    ----------
    params : Tensor or numpy.ndarray
        ``(blocks, inputs, outputs, layers)``: the matrices of each layer, of equal shapes, stacked. In a transformer
        the query, key, value and output matrices are one block each, and feed-forward ones several.
    cores : sequence of Tensor or numpy.ndarray
        Four cores ``(R_m, old_m, new_m, R_m+1)``, in the order of the modes; the last rank is the first one. Those of
        :func:`grow_cores` start close to copying.

    Returns
    -------
    Tensor or numpy.ndarray
        ``(blocks', inputs', outputs', layers')`` in the widest dtype. Differentiable in everything.

    Raises
    ------
    ArgumentError
        Shapes or ranks that do not fit.
    ArgumentTypeError
        No float tensors or arrays, or a mixture of both.

    Notes
    -----
    Mode by mode: O(R^3) times the largest intermediate tensor, of R^2 times the size of weights, some modes grown.
    The full map is never formed.

    References
    ----------
    Pan et al.: Reusing Pretrained Models by Multi-linear Operators for Efficient Training (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import grow, grow_cores
    >>> small = torch.arange(4.0).view(1, 2, 2, 1)
    >>> cores = grow_cores((1, 2, 2, 1), (1, 2, 3, 2), rank=1, std=0.0)
    >>> grow(small, cores).detach()[0, :, :, 1]
    tensor([[0., 1., 0.],
            [2., 3., 2.]])
    """
    op = "grow"
    if not isinstance(cores, Sequence) or isinstance(cores, str) or len(cores) != len(_MODES):
        _checks.refuse_type(op, "cores", "a list of four cores", _checks.describe(cores))
    (params, *given), back = accept(op, params=params, **{f"cores[{m}]": core for m, core in enumerate(cores)})
    _checks.tensor(op, "params", params)
    if params.dim() != len(_MODES):
        _checks.refuse(op, "params", "shape (blocks, inputs, outputs, layers)", f"shape {tuple(params.shape)}")
    for m, core in enumerate(given):
        name = f"cores[{m}]"
        _checks.tensor(op, name, core, device=params.device)
        before = given[m - 1]
        if core.dim() != 4 or core.shape[1] != params.shape[m]:
            _checks.refuse(op, name, f"shape (R, {params.shape[m]}, new, R')", f"shape {tuple(core.shape)}")
        if before.dim() == 4 and core.shape[0] != before.shape[3]:
            _checks.refuse(op, name, f"a first rank of {before.shape[3]}, as the core before ends", core.shape[0])
    dtype = params.dtype
    for core in given:
        dtype = torch.promote_types(dtype, core.dtype)
    b, i, o, layers = (core.to(dtype) for core in given)
    grown = torch.einsum("biol,pbcq->pcqiol", params.to(dtype), b)
    grown = torch.einsum("pcqiol,qijr->pcjrol", grown, i)
    grown = torch.einsum("pcjrol,rons->pcjnsl", grown, o)
    return back(torch.einsum("pcjnsl,slmp->cjnm", grown, layers))


def grow_cores(
    small: Sequence[int],
    large: Sequence[int],
    rank: int = 1,
    *,
    std: float = 1e-3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[torch.nn.Parameter]:
    """Make cores for :func:`grow` that start close to copying, to be trained.

    In the first channel of the ring new blocks, inputs and outputs are the old ones over again, and new layers the old
    ones stretched. Inputs that are there several times share their weight, so that a layer whose inputs are repeated
    gives its old outputs, repeated. Everything else is noise.

    Parameters
    ----------
    small, large : sequence of int
        Old and new numbers of blocks, inputs, outputs and layers, at least 1.
    rank : int
        Rank of the ring, at least 1.
    std : float
        Standard deviation of the noise, at least 0; with 0 and equal sizes :func:`grow` is the identity. With a rank
        above 1 it must not be 0 to be trained: the other channels have gradients through each other only.
    seed : int
        Seed of the noise.
    dtype : torch.dtype
        float32 or float64.

    Returns
    -------
    list of torch.nn.Parameter
        Four cores ``(rank, old, new, rank)``.

    Raises
    ------
    ArgumentError
        Another number of modes, or an option out of range.

    Examples
    --------
    >>> from shiftkern.merge import grow_cores
    >>> [tuple(core.shape) for core in grow_cores((6, 64, 64, 4), (6, 96, 96, 8), rank=2)]
    [(2, 6, 6, 2), (2, 64, 96, 2), (2, 64, 96, 2), (2, 4, 8, 2)]
    """
    op = "grow_cores"
    sizes = []
    for name, given in (("small", small), ("large", large)):
        if not isinstance(given, Sequence) or len(given) != len(_MODES):
            _checks.refuse_type(op, name, f"four sizes: {', '.join(_MODES)}", _checks.describe(given))
        sizes.append([_checks.positive_int(op, name, size) for size in given])
    rank = _checks.positive_int(op, "rank", rank)
    std = _checks.non_negative(op, "std", std)
    generator = torch.Generator().manual_seed(_checks.seed(op, "seed", seed))
    if dtype not in (torch.float32, torch.float64):
        _checks.refuse_type(op, "dtype", "torch.float32 or torch.float64", repr(dtype))
    cores = []
    for mode, old, new in zip(_MODES, *sizes, strict=True):
        core = std * torch.randn(rank, old, new, rank, generator=generator, dtype=dtype)
        places = torch.arange(new)
        source = places * old // new if mode == "layers" else places % old
        share = 1.0 / source.bincount(minlength=old)[source] if mode == "inputs" else torch.ones(new)
        core[0, source, places, 0] += share.to(dtype)
        cores.append(torch.nn.Parameter(core))
    return cores
