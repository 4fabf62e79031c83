"""Registration of the operators ``torch.ops.shiftkern.*``.

Each operator has a Rust implementation for CPU tensors, an implementation in torch operations for every other device
(which is also the oracle of the first in tests), a fake one for ``torch.compile`` and ``torch.export``, and either an
autograd formula or a clear refusal. ``torch.library.Library`` is used directly because ``custom_op`` costs two to four
times as much per call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from shiftkern.errors import NotDifferentiableError

__all__ = ["OPERATORS", "computing", "define", "first_order_only", "without_autocast"]

_LIBRARY: Any = torch.library.Library("shiftkern", "DEF")  # type: ignore[no-untyped-call]

#: Names of all registered operators, in order; tests enumerate them.
OPERATORS: list[str] = []


def define(
    schema: str,
    *,
    rust: Callable[..., Any],
    torch_ops: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] = lambda ctx, inputs, output: None,
    mutates: tuple[int, ...] = (),
) -> Any:
    """Register one operator and return it.

    Parameters
    ----------
    schema : str
        ``name(arguments) -> results`` in torch's schema language.
    rust, torch_ops, fake : callable
        Implementations for CPU tensors, for all other devices, and for shapes only.
    backward, setup_context : callable, optional
        The autograd formula; without one, asking for a gradient raises :class:`NotDifferentiableError`.
    mutates : tuple of int
        Positions of the arguments (tensors or lists of tensors) that are written.
    """
    name = schema.partition("(")[0]
    qualified = f"shiftkern::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if mutates:
        rust = _noting_writes(rust, mutates)
    _LIBRARY.impl(name, _refusing_tangents(name, rust), "CPU")
    _LIBRARY.impl(name, _refusing_tangents(name, _exactly(torch_ops)), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if mutates:
        _LIBRARY.impl(name, _refusing_gradients(name), "Autograd", with_keyset=True)
    else:
        if backward is None:
            torch.library.register_autograd(qualified, _refusal(name), lib=_LIBRARY)
        else:
            formula, context = first_order_only(name, backward), _noting_inputs(setup_context)
            torch.library.register_autograd(qualified, formula, setup_context=context, lib=_LIBRARY)
    OPERATORS.append(name)
    return _direct(name, getattr(torch.ops.shiftkern, name).default, rust)


def _exactly(torch_ops: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast out: the implementations choose the type they compute in."""

    def wrapped(*args: Any) -> Any:
        flat = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor))
        with without_autocast(next((t.device for t in flat), torch.device("cpu"))):
            return torch_ops(*args)

    return wrapped


def computing(dtype: torch.dtype) -> torch.dtype:
    """Return the type that numbers of ``dtype`` are computed in: float32 for half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast out of a computation that chooses its types itself."""
    kind = device.type
    # Meta tensors have no autocast, and refuse the question.
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


_PLAIN = (Tensor, torch.nn.Parameter)


def _direct(name: str, operator: Callable[..., Any], rust: Callable[..., Any]) -> Callable[..., Any]:
    """Call the Rust path at once where torch's dispatcher could only come to the same end.

    That is eager code on plain CPU tensors without a gradient, a transform, a mode or a tracer. The way through the
    dispatcher and its autograd wrapper costs more than the work on a small layer.
    """

    def call(*args: Any) -> Any:
        if (
            not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._len_torch_function_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None
            and forward_ad._current_level < 0
        ):
            gradients = torch.is_grad_enabled()
            for argument in args:
                for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                    if isinstance(tensor, Tensor) and not (
                        type(tensor) in _PLAIN
                        and tensor.is_cpu
                        and not tensor.is_neg()
                        and not (gradients and tensor.requires_grad)
                    ):
                        return operator(*args)
            return rust(*args)
        if not torch.compiler.is_compiling():
            # Below torch.func.jvp the dispatcher shows an implementation no tangents.
            _refuse_tangents(name, args)
        return operator(*args)

    return call


def _refusal(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotDifferentiableError(f"{name}: this operator has no gradient; call it under torch.no_grad()")

    return backward


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on the first ``count`` tensors; the gradient by any of its inputs raises."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotDifferentiableError(f"{ctx.name}: gradients of this operator are first-order only")


def _noting_inputs(setup_context: Callable[..., None]) -> Callable[..., None]:
    """Keep the differentiable inputs at hand, for :func:`first_order_only`."""

    def wrapped(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.differentiable = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        setup_context(ctx, inputs, output)

    return wrapped


def first_order_only(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative raise; without this its terms would be missing silently."""

    def wrapped(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *gradients)
        results = (results,) if isinstance(results, Tensor) else results
        if not torch.is_grad_enabled():
            return results
        # create_graph=True: the results depend on these tensors in a way that cannot be differentiated.
        found = [i for i, r in enumerate(results) if r is not None]
        sources = [*ctx.differentiable, *(g for g in gradients if g is not None)]
        tied = _NoSecondDerivative.apply(name, len(found), *(results[i] for i in found), *sources)
        return tuple(tied[found.index(i)] if i in found else None for i in range(len(results)))

    return wrapped


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Refuse forward-mode derivatives, which would vanish silently."""
    if forward_ad._current_level >= 0:
        for argument in args:
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
                    raise NotDifferentiableError(f"{name}: this operator has no forward-mode derivative")


def _refusing_tangents(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        _refuse_tangents(name, args)
        return implementation(*args)

    return wrapped


def _noting_writes(implementation: Callable[..., Any], mutates: tuple[int, ...]) -> Callable[..., Any]:
    """Tell autograd that tensors were written: it cannot see writes through an address."""

    def wrapped(*args: Any) -> Any:
        result = implementation(*args)
        for position in mutates:
            written = args[position]
            tensors = written if isinstance(written, (list, tuple)) else (written,)
            torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])
        return result

    return wrapped


def _refusing_gradients(name: str) -> Callable[..., Any]:
    def wrapped(keyset: Any, *args: Any) -> Any:
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in flat):
            raise NotDifferentiableError(
                f"{name}: this in-place operator has no gradient; call it under torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.shiftkern, name).default.redispatch(
                keyset & torch._C._after_autograd_keyset, *args
            )

    return wrapped
