"""Strategies for Hypothesis: what the functions of the library take, at its edges too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    message = "the strategies of shiftkern.testing need hypothesis: pip install 'shiftkern[testing]'"
    raise ModuleNotFoundError(message, name="hypothesis") from None

from shiftkern import _checks
from shiftkern.rotation.givens_rotate import pair_count
from shiftkern.testing.layouts import DTYPES, LAYOUTS, lay_out

__all__ = ["cost_matrices", "probability_vectors", "rotation_parameters", "state_dicts", "tensors"]

_SEEDS = st.integers(0, 2**16)
#: Largest size of every dimension, by the number of dimensions: a few thousand elements in all.
_MOST = {0: 0, 1: 300, 2: 70, 3: 40, 4: 12, 5: 6}
_ROTATIONS = (
    "givens_rotate",
    "givens_mix",
    "householder_reflect",
    "householder_chain",
    "cayley_rotate",
    "butterfly_rotate",
)


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    """Numbers are drawn by a generator: Hypothesis draws its seed, which is much faster than drawing each of them."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _uniform(shape: Sequence[int], seed: int) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dtypes(op: str, dtypes: Sequence[torch.dtype]) -> Sequence[torch.dtype]:
    if not isinstance(dtypes, Sequence) or not dtypes or not all(dtype in DTYPES for dtype in dtypes):
        names = ", ".join(str(dtype) for dtype in DTYPES)
        _checks.refuse(op, "dtypes", f"one or several of {names}", dtypes)
    return dtypes


def _edges(dtype: torch.dtype, finite: bool) -> list[float]:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.eps, info.tiny, info.smallest_normal / 2, info.max, info.min]
    return values if finite else [*values, float("inf"), -float("inf"), float("nan")]


def tensors(
    shape: Sequence[int] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    min_dim: int = 2,
    max_dim: int = 5,
    empty: bool = True,
    edges: str = "none",
) -> st.SearchStrategy[Tensor]:
    """Draw floating-point tensors in every dtype and memory layout.

    Parameters
    ----------
    shape : sequence of int, optional
        None: ``(N, C, *spatial)``, sizes up to a few dozen.
    dtypes : sequence of torch.dtype
        Which to draw from.
    layouts : sequence of str
        Which to draw from, see :func:`lay_out`.
    min_dim, max_dim : int
        Number of dimensions, from 1 to 5, where ``shape`` is None.
    empty : bool
        Sizes of 0 occur, where ``shape`` is None.
    edges : {"none", "finite", "all"}
        Whether some elements are at the edges of the type: both zeros, the smallest and largest numbers, subnormal
        ones; infinities and NaN for ``"all"``.

    Returns
    -------
    SearchStrategy
        Of tensors. Without edges, normal numbers around 0, 3 or -50.

    Raises
    ------
    ArgumentError
        Unknown dtypes, layouts or edges; numbers of dimensions out of range.
    ArgumentTypeError
        Sizes that are no integers.

    Examples
    --------
    >>> import torch
    >>> from hypothesis import given
    >>> from shiftkern.norm import channel_moments
    >>> from shiftkern.testing import tensors
    >>> @given(tensors(dtypes=[torch.float32], edges="finite"))
    ... def test_statistics_do_not_overflow(x):
    ...     assert channel_moments(x).mean.isfinite().all()
    >>> test_statistics_do_not_overflow()  # pytest calls it
    """
    op = "tensors"
    _dtypes(op, dtypes)
    if isinstance(layouts, str) or not layouts:
        _checks.refuse(op, "layouts", f"one or several of {', '.join(LAYOUTS)}", repr(layouts))
    for layout in layouts:
        _checks.one_of(op, "layouts", layout, LAYOUTS)
    _checks.one_of(op, "edges", edges, ("none", "finite", "all"))
    least = 0 if _checks.flag(op, "empty", empty) else 1
    fixed = None if shape is None else [_checks.integer(op, "shape", size, 0) for size in shape]
    if not 1 <= _checks.positive_int(op, "min_dim", min_dim) <= _checks.positive_int(op, "max_dim", max_dim) <= 5:
        _checks.refuse(op, "max_dim", "1 <= min_dim <= max_dim <= 5", f"{min_dim} and {max_dim}")

    @st.composite
    def draw_tensor(draw: st.DrawFn) -> Tensor:
        sizes = fixed
        if sizes is None:
            dim = draw(st.integers(min_dim, max_dim))
            sizes = draw(st.lists(st.integers(least, _MOST[dim]), min_size=dim, max_size=dim))
        dtype = draw(st.sampled_from(dtypes))
        x = (1.5 * _noise(sizes, draw(_SEEDS)) + draw(st.sampled_from([0, 3, -50]))).to(dtype)
        if edges != "none" and x.numel() > 0:
            flat = x.view(-1)
            for _ in range(draw(st.integers(1, 4))):
                value = draw(st.sampled_from(_edges(dtype, edges == "finite")))
                flat[draw(st.integers(0, x.numel() - 1))] = value
        return lay_out(x, draw(st.sampled_from(layouts)))

    return draw_tensor()


def probability_vectors(
    n: int | None = None, *, max_size: int = 40, zeros: bool = True, dtypes: Sequence[torch.dtype] = (torch.float64,)
) -> st.SearchStrategy[Tensor]:
    """Draw vectors of probabilities: even, random and very uneven ones, and single points.

    Parameters
    ----------
    n : int, optional
        Length, at least 1; None: any up to ``max_size``.
    max_size : int
        At least 1.
    zeros : bool
        Entries of exactly 0 occur.
    dtypes : sequence of torch.dtype
        Which to draw from.

    Returns
    -------
    SearchStrategy
        Of tensors ``(n,)``: at least 0, and 1 in sum but for the rounding of the entries.

    Raises
    ------
    ArgumentError
        Sizes below 1; unknown dtypes.
    ArgumentTypeError
        Sizes that are no integers.

    Examples
    --------
    >>> from hypothesis import given
    >>> from shiftkern.testing import probability_vectors
    >>> @given(probability_vectors(zeros=False))
    ... def test_entropy_is_finite(p):
    ...     assert (p * p.log()).sum().isfinite()
    >>> test_entropy_is_finite()
    """
    op = "probability_vectors"
    fixed = None if n is None else _checks.positive_int(op, "n", n)
    most = _checks.positive_int(op, "max_size", max_size)
    _checks.flag(op, "zeros", zeros)
    _dtypes(op, dtypes)

    @st.composite
    def draw_vector(draw: st.DrawFn) -> Tensor:
        size = draw(st.integers(1, most)) if fixed is None else fixed
        noise = _noise((size,), draw(_SEEDS))
        # From even over random to a few entries that hold nearly everything: down to about e^-20 of the largest.
        p = (draw(st.sampled_from([0.0, 0.5, 2.0])) * noise).softmax(0).clamp(min=1e-7)
        if zeros:
            kept = draw(st.sets(st.integers(0, size - 1), min_size=1)) if draw(st.booleans()) else set(range(size))
            p = torch.where(torch.tensor([i in kept for i in range(size)]), p, 0.0)
        return (p / p.sum()).to(draw(st.sampled_from(dtypes)))

    return draw_vector()


def cost_matrices(
    n: int | None = None,
    m: int | None = None,
    *,
    max_size: int = 40,
    forbidden: bool = False,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    layouts: Sequence[str] = ("contiguous", "transposed", "sliced", "offset"),
) -> st.SearchStrategy[Tensor]:
    """Draw costs of transport: random ones, distances of points, equal ones, and ones of very different size.

    Parameters
    ----------
    n, m : int, optional
        Sizes, at least 1; None: any up to ``max_size``.
    max_size : int
        At least 1.
    forbidden : bool
        Some cells are ``+inf``, but no whole row or column: the first ones are free. Not all weights can be met.
    dtypes : sequence of torch.dtype
        Which to draw from.
    layouts : sequence of str
        Which to draw from, see :func:`lay_out`.

    Returns
    -------
    SearchStrategy
        Of tensors ``(n, m)`` of numbers >= 0, at most 1000.

    Raises
    ------
    ArgumentError
        Sizes below 1; unknown dtypes or layouts.
    ArgumentTypeError
        Sizes that are no integers.

    Examples
    --------
    >>> from hypothesis import given
    >>> from shiftkern.ot import linear_assignment
    >>> from shiftkern.testing import cost_matrices
    >>> @given(cost_matrices(6, 6))
    ... def test_assignment_is_a_permutation(costs):
    ...     rows, columns = linear_assignment(costs)
    ...     assert sorted(columns.tolist()) == rows.tolist() == list(range(6))
    >>> test_assignment_is_a_permutation()
    """
    op = "cost_matrices"
    sizes = [None if s is None else _checks.positive_int(op, name, s) for name, s in (("n", n), ("m", m))]
    most = _checks.positive_int(op, "max_size", max_size)
    _checks.flag(op, "forbidden", forbidden)
    _dtypes(op, dtypes)
    for layout in layouts:
        _checks.one_of(op, "layouts", layout, LAYOUTS)

    @st.composite
    def draw_costs(draw: st.DrawFn) -> Tensor:
        rows, columns = (draw(st.integers(1, most)) if size is None else size for size in sizes)
        seed, kind = draw(_SEEDS), draw(st.sampled_from(["random", "distances", "equal", "uneven"]))
        costs = _uniform((rows, columns), seed)
        if kind == "distances":
            costs = torch.cdist(_noise((rows, 2), seed), _noise((columns, 2), seed + 1))
        elif kind == "equal":
            costs = torch.full((rows, columns), draw(st.sampled_from([0.0, 1.0, 7.5])), dtype=torch.float64)
        elif kind == "uneven":
            costs = 10.0 ** (6.0 * costs - 3.0)
        if forbidden:
            free = _uniform((rows, columns), seed + 2) < draw(st.sampled_from([0.3, 0.7, 1.0]))
            free[0], free[:, 0] = True, True
            costs = costs.masked_fill(~free, float("inf"))
        return lay_out(costs.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(layouts)))

    return draw_costs()


def state_dicts(
    count: int = 1, *, dtypes: Sequence[torch.dtype] = DTYPES, buffers: bool = True, max_tensors: int = 5
) -> st.SearchStrategy[list[dict[str, Tensor]]]:
    """Draw state dicts that belong together: a base and its fine-tunes, as :mod:`shiftkern.merge` takes them.

    Parameters
    ----------
    count : int
        How many, at least 1: the first is the base, the others are the base and noise, in all or in some entries.
    dtypes : sequence of torch.dtype
        Which to draw from, for each tensor.
    buffers : bool
        Integer tensors occur, equal in all.
    max_tensors : int
        Most floating-point tensors in each, at least 1.

    Returns
    -------
    SearchStrategy
        Of lists of ``count`` dicts from names to tensors, with the same names, shapes and dtypes.

    Raises
    ------
    ArgumentError
        Numbers below 1; unknown dtypes.
    ArgumentTypeError
        Numbers that are no integers.

    Examples
    --------
    >>> from hypothesis import given
    >>> from shiftkern.merge import soup
    >>> from shiftkern.testing import state_dicts
    >>> @given(state_dicts(3))
    ... def test_names_stay(models):
    ...     assert soup(models).keys() == models[0].keys()
    >>> test_names_stay()
    """
    op = "state_dicts"
    count = _checks.positive_int(op, "count", count)
    most = _checks.positive_int(op, "max_tensors", max_tensors)
    _dtypes(op, dtypes)
    _checks.flag(op, "buffers", buffers)

    @st.composite
    def draw_states(draw: st.DrawFn) -> list[dict[str, Tensor]]:
        models: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for i in range(draw(st.integers(1, most))):
            shape = draw(st.lists(st.integers(1, 9), max_size=3))
            name = f"layers.{i}.{draw(st.sampled_from(['weight', 'bias', 'scale']))}"
            dtype, seed = draw(st.sampled_from(dtypes)), draw(_SEEDS)
            # 0: a tensor that was frozen; 1: all entries trained.
            share = draw(st.sampled_from([0.0, 0.3, 1.0]))
            base = _noise(shape, seed)
            for k, model in enumerate(models):
                change = 0.1 * _noise(shape, seed + k) * (_uniform(shape, seed + k) < share)
                model[name] = (base + change if k else base).to(dtype)
        if buffers and draw(st.booleans()):
            for model in models:
                model["norm.num_batches_tracked"] = torch.tensor(7)
        return models

    return draw_states()


def rotation_parameters(
    functions: Sequence[str] = _ROTATIONS, *, max_width: int = 33, dtypes: Sequence[torch.dtype] = (torch.float64,)
) -> st.SearchStrategy[tuple[str, dict[str, Any], int]]:
    """Draw functions of :mod:`shiftkern.rotation` with parameters that make their matrix orthogonal.

    Parameters
    ----------
    functions : sequence of str
        Which to draw from: those that :func:`shiftkern.rotation.to_matrix` takes.
    max_width : int
        Largest number of coordinates, at least 2.
    dtypes : sequence of torch.dtype
        Which to draw from.

    Returns
    -------
    SearchStrategy
        Of name, parameters by name, and number of coordinates: the arguments of :func:`shiftkern.rotation.to_matrix`.

    Raises
    ------
    ArgumentError
        Unknown functions or dtypes, a width below 2.
    ArgumentTypeError
        A width that is no integer.

    Examples
    --------
    >>> import torch
    >>> from hypothesis import given
    >>> from shiftkern.rotation import to_matrix
    >>> from shiftkern.testing import assert_orthogonal, rotation_parameters
    >>> @given(rotation_parameters())
    ... def test_rotations_are_orthogonal(arguments):
    ...     assert_orthogonal(to_matrix(*arguments), tol=1e-12)
    >>> test_rotations_are_orthogonal()
    """
    op = "rotation_parameters"
    if isinstance(functions, str) or not functions:
        _checks.refuse(op, "functions", f"one or several of {', '.join(_ROTATIONS)}", repr(functions))
    for function in functions:
        _checks.one_of(op, "functions", function, _ROTATIONS)
    most = _checks.integer(op, "max_width", max_width, 2)
    _dtypes(op, dtypes)

    @st.composite
    def draw_rotation(draw: st.DrawFn) -> tuple[str, dict[str, Any], int]:
        function = draw(st.sampled_from(functions))
        d, dtype, seed = draw(st.integers(2, most)), draw(st.sampled_from(dtypes)), draw(_SEEDS)
        size = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))

        def numbers(*shape: int) -> Tensor:
            return (size * _noise(shape, seed)).to(dtype)

        params: dict[str, Any]
        if function in ("givens_rotate", "givens_mix"):
            topology = draw(st.sampled_from(["tree", "butterfly", "brick"]))
            angles = size * _noise((pair_count(topology, d, draw(st.integers(0, 4))),), seed)
            params = {"topology": topology}
            if function == "givens_rotate":
                params["theta"] = angles.to(dtype)
            else:
                cosine, sine = angles.cos(), angles.sin()
                params["blocks"] = torch.stack([cosine, -sine, sine, cosine], -1).view(-1, 2, 2).to(dtype)
        elif function == "householder_reflect":
            blocks = draw(st.sampled_from([k for k in range(1, d + 1) if d % k == 0]))
            params = {"u": numbers(d), "blocks": blocks}
        elif function == "householder_chain":
            params = {"U": numbers(d, draw(st.integers(1, 4)))}
        else:
            factors = draw(st.integers(1, 3)) if function == "butterfly_rotate" else 1
            block = 2 * draw(st.integers(1, 3))
            # Factor k joins halves of blocks that are 2^k apart.
            unit = block // 2 * 2**factors if function == "butterfly_rotate" else block
            d = unit * max(1, d // unit)
            entries = block * (block - 1) // 2
            lead = (factors, d // block) if function == "butterfly_rotate" else (d // block,)
            params = {"skew": numbers(*lead, entries), "block_size": block}
            if function == "butterfly_rotate":
                params["factors"] = factors
        params["transpose"] = draw(st.booleans())
        return function, params, d

    return draw_rotation()
