"""What results of the library promise, as assertions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiftkern import _checks, _runtime

__all__ = [
    "assert_marginals",
    "assert_merge_roundtrip",
    "assert_orthogonal",
    "assert_same_bits",
    "assert_streaming_equals_pooled",
]


def _wide(op: str, name: str, value: Any) -> Tensor:
    """Numbers as float64, from a tensor or an array."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor) or value.is_complex():
        _checks.refuse_type(op, name, "a real tensor or array", _checks.describe(value))
    return value.detach().to("cpu", torch.float64)


def assert_marginals(plan: Any, a: Any, b: Any, *, tol: float = 1e-4) -> None:
    """Assert that a transport plan moves the weights ``a`` onto the weights ``b``.

    No entry is negative, NaN or infinite, and ``|P 1 - a|_1 + |P^T 1 - b|_1 <= tol * sum(a)``.

    Parameters
    ----------
    plan : Tensor or ndarray
        ``(..., n, m)``.
    a : Tensor or ndarray, optional
        ``(..., n)``; None for uniform weights ``1 / n``.
    b : Tensor or ndarray, optional
        ``(..., m)``; None for uniform weights ``1 / m``.
    tol : float
        At least 0; the default is that of :func:`shiftkern.ot.sinkhorn` for float32.

    Raises
    ------
    AssertionError
        They are not met; names the entry, row or column that is furthest off.
    ArgumentError
        Shapes that do not fit, ``tol`` below 0.
    ArgumentTypeError
        No real numbers.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.ot import sinkhorn
    >>> from shiftkern.testing import assert_marginals
    >>> result = sinkhorn(None, None, torch.rand(5, 4), 0.1)
    >>> assert_marginals(result.plan(), None, None)
    """
    op = "assert_marginals"
    tol = _checks.non_negative(op, "tol", tol)
    plan = _wide(op, "plan", plan)
    if plan.dim() < 2 or plan.numel() == 0:
        _checks.refuse(op, "plan", "shape (..., n, m) with n, m >= 1", f"shape {tuple(plan.shape)}")
    sides = []
    for name, given, dim in (("a", a, -1), ("b", b, -2)):
        shape = plan.sum(dim).shape
        weights = torch.full(shape, 1.0 / shape[-1], dtype=torch.float64) if given is None else _wide(op, name, given)
        if weights.shape[-1:] != shape[-1:] or weights.dim() > len(shape):
            _checks.refuse(op, name, f"shape {tuple(shape)}", f"shape {tuple(weights.shape)}")
        sides.append((plan.sum(dim) - weights, weights))
    bad = ~(plan.isfinite() & (plan >= 0))
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(f"the plan is {plan[at].item()} at {at}: expected finite numbers >= 0")
    (rows, wanted), (columns, _) = sides
    error = rows.abs().sum(-1) + columns.abs().sum(-1)
    allowed = tol * wanted.sum(-1)
    if bool((error > allowed).any()):
        kind, off = ("row", rows) if rows.abs().max() >= columns.abs().max() else ("column", columns)
        at = tuple(int(i) for i in np.unravel_index(int(off.abs().argmax()), off.shape))
        raise AssertionError(
            f"the plan misses its marginals by {error.max().item():.3g} in L1, more than tol = {tol:.3g} of the mass; "
            f"{kind} {at if len(at) > 1 else at[0]} is off by {off[at].item():+.3g}"
        )


def assert_orthogonal(R: Tensor, *, tol: float | None = None) -> None:
    """Assert that matrices are orthogonal: the largest entry of ``|R R^T - I|`` is at most ``tol``.

    Parameters
    ----------
    R : Tensor
        ``(..., d, d)``, float.
    tol : float, optional
        At least 0; None: ``4 d eps`` of the dtype.

    Raises
    ------
    AssertionError
        They are not, or hold NaN or infinities.
    ArgumentError
        Matrices that are not square, ``tol`` below 0.
    ArgumentTypeError
        No float tensor.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import to_matrix
    >>> from shiftkern.testing import assert_orthogonal
    >>> assert_orthogonal(to_matrix("givens_rotate", {"theta": torch.randn(6)}, 7))
    """
    from shiftkern.rotation import orthogonality_error

    op = "assert_orthogonal"
    R = _checks.tensor(op, "R", R, min_dim=2)
    if R.shape[-1] != R.shape[-2]:
        _checks.refuse(op, "R", "square matrices (..., d, d)", f"shape {tuple(R.shape)}")
    limit = 4 * R.shape[-1] * torch.finfo(R.dtype).eps if tol is None else _checks.non_negative(op, "tol", tol)
    error = orthogonality_error(R)
    # Not `error > limit`, which NaN would pass.
    if not error <= limit:
        raise AssertionError(f"R R^T is off the identity by {error:.3g}, more than {limit:.3g}")


def _leaves(value: Any, path: str = "result") -> Iterator[tuple[str, Any]]:
    """Every tensor, number or other thing in a result, with the way to it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _leaves(part, f"{path}[{i}]")
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield path, torch.as_tensor(value)
    else:
        yield path, value


def _pairs(left: Any, right: Any, names: tuple[str, str]) -> Iterator[tuple[str, Any, Any]]:
    one, other = dict(_leaves(left)), dict(_leaves(right))
    if one.keys() != other.keys():
        odd = sorted(one.keys() ^ other.keys())
        raise AssertionError(f"{names[0]} and {names[1]} have different parts: {', '.join(odd[:5])}")
    for path, value in one.items():
        twin = other[path]
        if isinstance(value, Tensor) != isinstance(twin, Tensor):
            raise AssertionError(
                f"{path}: {_checks.describe(value)} for {names[0]}, {_checks.describe(twin)} for {names[1]}"
            )
        if isinstance(value, Tensor) and (value.shape, value.dtype) != (twin.shape, twin.dtype):
            raise AssertionError(
                f"{path}: {_checks.describe(value)} for {names[0]}, {_checks.describe(twin)} for {names[1]}"
            )
        yield path, value, twin


def _bits(value: Tensor) -> Tensor:
    """The bytes of each element, so that equal NaN are equal and 0 is not -0."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).reshape(value.numel(), -1)


def assert_same_bits(fn: Callable[[], Any], *, threads: Sequence[int] = (1, 2, 3, 5)) -> None:
    """Assert that a call returns the same bits on any number of the library's threads.

    Parameters
    ----------
    fn : callable
        Takes nothing; returns tensors, arrays or numbers, or dataclasses, mappings, lists and tuples of them. Called
        once for each number of threads, so it must not change what it works on.
    threads : sequence of int
        At least two numbers.

    Raises
    ------
    AssertionError
        Some bits differ; names the part of the result and the first element.
    ArgumentError
        Fewer than two numbers of threads, or one below 1.
    ArgumentTypeError
        ``fn`` cannot be called; numbers of threads that are no integers.

    Notes
    -----
    :func:`shiftkern.set_num_threads` is as before afterwards. Operations of torch run on torch's own threads, which are
    left alone.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import channel_moments
    >>> from shiftkern.testing import assert_same_bits
    >>> x = torch.randn(64, 8, 100)
    >>> assert_same_bits(lambda: channel_moments(x))
    """
    op = "assert_same_bits"
    _callable(op, "fn", fn)
    if isinstance(threads, str) or not isinstance(threads, Sequence):
        _checks.refuse_type(op, "threads", "a sequence of integers", _checks.describe(threads))
    counts = [_checks.positive_int(op, "threads", n) for n in threads]
    if len(counts) < 2:
        _checks.refuse(op, "threads", "at least two numbers", counts)
    before, results = _runtime._chosen, []
    try:
        for n in counts:
            _runtime.set_num_threads(n)
            results.append(fn())
    finally:
        _runtime._chosen = before
    for n, other in zip(counts[1:], results[1:], strict=True):
        for path, one, two in _pairs(results[0], other, (_on(counts[0]), _on(n))):
            if isinstance(one, Tensor):
                differ = (_bits(one) != _bits(two)).any(1)
                if bool(differ.any()):
                    at = int(differ.nonzero()[0])
                    values = f"{one.flatten()[at].item()!r} and {two.flatten()[at].item()!r}"
                    raise AssertionError(
                        f"{path}: {int(differ.sum())} of {one.numel()} elements differ between {_on(counts[0])} and "
                        f"{_on(n)}, first element {at}: {values}"
                    )
            elif one != two and not (one != one and two != two):
                raise AssertionError(f"{path}: {one!r} on {_on(counts[0])}, {two!r} on {_on(n)}")


def _on(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _callable(op: str, name: str, value: object) -> None:
    if not callable(value):
        _checks.refuse_type(op, name, "a function", _checks.describe(value))


def assert_streaming_equals_pooled(
    fn: Callable[[list[Tensor]], Any],
    chunks: Sequence[Tensor],
    *,
    dim: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Assert that going through a stream chunk by chunk gives what all of it at once does.

    Parameters
    ----------
    fn : callable
        Takes a list of tensors, the chunks in order, and returns tensors or what holds them. Called with ``chunks``
        and with one chunk that is all of them, joined.
    chunks : sequence of Tensor
        At least one.
    dim : int
        Along which they are joined.
    rtol : float, optional
        See :func:`torch.testing.assert_close`, as for ``atol``. Give both or none; None: by the dtypes of the results.
    atol : float, optional
        Likewise.

    Raises
    ------
    AssertionError
        The results differ by more.
    ArgumentError
        No chunks, or ones that cannot be joined.
    ArgumentTypeError
        ``fn`` cannot be called; chunks that are no tensors.

    Examples
    --------
    >>> import functools, torch
    >>> from shiftkern.norm import channel_moments, merge_moments
    >>> from shiftkern.testing import assert_streaming_equals_pooled
    >>> def stream(chunks):
    ...     return functools.reduce(merge_moments, map(channel_moments, chunks))
    >>> assert_streaming_equals_pooled(stream, torch.randn(100, 3).split(7))
    """
    op = "assert_streaming_equals_pooled"
    _callable(op, "fn", fn)
    if not isinstance(chunks, Sequence) or not all(isinstance(chunk, Tensor) for chunk in chunks):
        _checks.refuse_type(op, "chunks", "a sequence of tensors", _checks.describe(chunks))
    if not chunks:
        _checks.refuse(op, "chunks", "at least one tensor", "none")
    if (rtol is None) != (atol is None):
        _checks.refuse(op, "rtol", "both rtol and atol, or none", f"rtol = {rtol}, atol = {atol}")
    try:
        whole = torch.cat(list(chunks), dim)
    except (RuntimeError, IndexError) as error:
        _checks.refuse(op, "chunks", f"tensors that can be joined along dimension {dim}", error)
    streamed, pooled = fn(list(chunks)), fn([whole])
    for path, one, two in _pairs(streamed, pooled, ("the stream", "the pool")):
        try:
            torch.testing.assert_close(one, two, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{path} differs between {len(chunks)} chunks and one: {error}") from None


def assert_merge_roundtrip(
    model: nn.Module, config: Any, *inputs: Any, size: float = 0.05, seed: int = 0, tol: float | None = None
) -> None:
    """Assert that an adapter can be merged into a model and taken out again without a trace.

    On a copy of ``model``: adapters are injected and moved from their start by random steps; merging computes the same
    function, if ``inputs`` are given; unmerging restores the weights within rounding, and to the bit where they were
    stashed; and :func:`shiftkern.peft.unload` gives back the model, bit by bit.

    Parameters
    ----------
    model : nn.Module
        Stays as it is. Compared in evaluation mode.
    config : Config
        A method of :mod:`shiftkern.peft` whose adapters can be merged.
    *inputs
        Arguments for a call of the model that returns tensors or what holds them.
    size : float
        Deviation of the random steps, above 0.
    seed : int
        Decides the steps.
    tol : float, optional
        At least 0, relative to the largest magnitude of the weight or the output; None: ``1000 eps`` of its dtype.

    Raises
    ------
    AssertionError
        One of these does not hold; names which, and the tensor.
    ArgumentError
        What :func:`shiftkern.peft.inject` and :func:`shiftkern.peft.merge` refuse.
    ArgumentTypeError
        Likewise.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig
    >>> from shiftkern.testing import assert_merge_roundtrip
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> assert_merge_roundtrip(model, LoRAConfig(r=2), torch.randn(5, 8))
    """
    from shiftkern import peft

    op = "assert_merge_roundtrip"
    size = _checks.positive(op, "size", size)
    seed = _checks.seed(op, "seed", seed)
    limit = None if tol is None else _checks.non_negative(op, "tol", tol)
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    original = {name: value.detach().clone() for name, value in model.state_dict().items()}
    adapted = peft.inject(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * step).to(parameter))
        layers = {name: layer.base_layer for name, layer in peft.adapted_layers(adapted).items()}
        weights = _copies(layers)
        before = copy.deepcopy(adapted(*inputs)) if inputs else None
        for stash in (False, True):
            peft.merge(adapted, stash=stash)
            if inputs:
                _close(before, adapted(*inputs), limit, "merged, the model computes something else")
            peft.unmerge(adapted)
            # A stashed weight comes back as it was.
            allowed = 0.0 if stash else limit
            _close(weights, _copies(layers), allowed, f"unmerged (stash={stash}), a weight is not what it was")
            _restore(layers, weights)
        back = peft.unload(adapted).state_dict()
    for path, one, two in _pairs(original, dict(back), ("the model", "what unload returned")):
        if not torch.equal(_bits(one), _bits(two)):
            raise AssertionError(f"{path}: unload did not give it back to the bit")


def _copies(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": value.detach().clone()
        for name, layer in layers.items()
        for part, value in layer.named_parameters()
    }


def _restore(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    for name, layer in layers.items():
        for part, value in layer.named_parameters():
            value.copy_(weights[f"{name}.{part}"])


def _close(left: Any, right: Any, tol: float | None, message: str) -> None:
    """Compare by the largest magnitude of each tensor."""
    for path, one, two in _pairs(left, right, ("one", "the other")):
        if not isinstance(one, Tensor) or not one.is_floating_point() or one.numel() == 0:
            continue
        relative = 1000 * torch.finfo(one.dtype).eps if tol is None else tol
        wide, twin = one.detach().to(torch.float64), two.detach().to(torch.float64)
        error, scale = float((wide - twin).abs().max()), float(wide.abs().max())
        if not error <= relative * scale:
            raise AssertionError(f"{message}: {path} is off by {error:.3g} of {scale:.3g}, more than {relative:.3g}")
