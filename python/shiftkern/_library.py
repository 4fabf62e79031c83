"""Registration of the operators ``torch.ops.shiftkern.*``.

Each operator has a Rust implementation for CPU tensors, an implementation in torch operations for every other device
(which is also the oracle of the first in tests), a fake one for ``torch.compile`` and ``torch.export``, and either an
autograd formula or a clear refusal. ``torch.library.Library`` is used directly because ``custom_op`` costs two to four
times as much per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils import _pytree as pytree

from shiftkern._checks import refuse
from shiftkern.errors import NotDifferentiableError

__all__ = ["OPERATORS", "computing", "define", "first_order_only", "save", "without_autocast"]

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
    operator = getattr(torch.ops.shiftkern, name).default
    if mutates:
        kernel = _refusing_gradients(name, operator)
    elif backward is None:
        kernel = _without_gradient(name, operator)
    else:
        kernel = _recording(operator, first_order_only(name, backward), setup_context)
    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(qualified, _looped(name, operator, mutates), lib=_LIBRARY)
    OPERATORS.append(name)
    return _direct(name, operator, rust)


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


def _below_autograd(operator: Any, keyset: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)


class _OneLevel(_SingleLevelFunction):
    """A function for one level of torch.func.grad."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def _apply(function: type[_OneLevel], *args: Any) -> Any:
    """Apply a function within an autograd kernel.

    Below torch.func.grad the dispatcher comes here once for each level, so a function of one level is what is needed;
    those of ``torch.library.register_autograd`` would go through all levels, and fail.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[attr-defined]
    with enable_single_level_autograd_function():
        return function.apply(*args)  # type: ignore[attr-defined]


def _recording(operator: Any, formula: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    """The autograd kernel of an operator with a gradient; its tensors are no lists."""

    class Recorded(_OneLevel):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            output = _below_autograd(operator, keyset, tuple(inputs))
            setup_context(ctx, tuple(inputs), output)
            save(ctx, inputs, ctx.to_save or ())
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            results = formula(ctx, *gradients)
            return (*results, None) if isinstance(results, tuple) else (results, None)

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return _apply(Recorded, *args, keyset)
        return _below_autograd(operator, keyset, args)

    return kernel


class _WithoutGradient(_OneLevel):
    """What ``run`` returns; a gradient through it raises."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], tuple[Tensor, ...]], *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return run()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotDifferentiableError(f"{ctx.name}: this operator has no gradient; call it under torch.no_grad()")


def _without_gradient(name: str, operator: Any) -> Callable[..., Any]:
    def kernel(keyset: Any, *args: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(operator, keyset, args)
        structure: list[Any] = []

        def run() -> tuple[Tensor, ...]:
            flat, spec = pytree.tree_flatten(_below_autograd(operator, keyset, args))
            structure.append(spec)
            return tuple(flat)

        sources = (leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))
        return pytree.tree_unflatten(_apply(_WithoutGradient, name, run, *sources), structure[0])

    return kernel


def _looped(name: str, operator: Any, mutates: tuple[int, ...]) -> Callable[..., Any]:
    """The rule for torch.vmap: one instance after the other."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        flat, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)
        if any(dim is None for i in mutates for dim in pytree.tree_leaves(in_dims[i])):
            refuse(name, "in_dims", "an axis for each tensor that is written to", "a tensor for all instances at once")
        if info.batch_size == 0:
            refuse(name, "in_dims", "at least one instance to map over", "none")
        results = []
        for i in range(info.batch_size):
            instance = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(flat, dims, strict=True)]
            results.append(pytree.tree_flatten(operator(*pytree.tree_unflatten(instance, structure))))
        leaves = [leaves for leaves, _ in results]
        outputs = [None if parts[0] is None else torch.stack(parts) for parts in zip(*leaves, strict=True)]
        axes = [None if output is None else 0 for output in outputs]
        return pytree.tree_unflatten(outputs, results[0][1]), pytree.tree_unflatten(axes, results[0][1])

    return rule


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on the first ``count`` tensors; the gradient by any of its inputs raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotDifferentiableError(f"{ctx.name}: gradients of this operator are first-order only")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotDifferentiableError(f"{ctx.name}: gradients of this operator have no forward-mode derivative")


def save(ctx: Any, inputs: Iterable[Any], tensors: Iterable[Tensor | None]) -> None:
    """Save tensors for a formula that is :func:`first_order_only`, and what else its results depend on.

    Of the latter only the place in the graph is kept: to hold on to the tensors would take their purpose from
    checkpoints and offloading, to save them would forbid to write to them.
    """
    tensors = tuple(tensors)
    differentiable = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    rest = [t for t in differentiable if all(t is not s for s in tensors)]
    ctx.sources = [t for t in rest if t.is_leaf]
    # What is compiled has no second derivative anyway.
    if len(rest) > len(ctx.sources) and not torch.compiler.is_compiling():
        with torch.enable_grad():
            ctx.sources.append(_apply(_Place, *(t for t in rest if not t.is_leaf)))
    ctx.save_for_backward(*tensors)


class _Place(_OneLevel):
    """A tensor of nothing, with the inputs behind it in the graph; no gradient ever comes through."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0)


class _Context:
    """A context whose tensors are unpacked already: checkpoints refuse to do it a second time."""

    def __init__(self, ctx: Any, saved: tuple[Any, ...]) -> None:
        self._ctx, self.saved_tensors = ctx, saved

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def first_order_only(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative raise; without this its terms would be missing silently.

    The tensors of the context come from :func:`save`.
    """

    def wrapped(ctx: Any, *gradients: Any) -> Any:
        # After torch.func.vjp has returned, what was saved below it has to be taken out of its wrapper.
        saved = tuple(t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in ctx.saved_tensors)
        with torch.no_grad():
            results = backward(_Context(ctx, saved), *gradients)
        results = (results,) if isinstance(results, Tensor) else results
        if not torch.is_grad_enabled():
            return results
        # create_graph=True: the results depend on these tensors in a way that cannot be differentiated.
        found = [i for i, r in enumerate(results) if r is not None]
        sources = [t for t in (*saved, *ctx.sources, *gradients) if t is not None]
        tied = _NoSecondDerivative.apply(name, len(found), *(results[i] for i in found), *sources)
        return tuple(tied[found.index(i)] if i in found else None for i in range(len(results)))

    return wrapped


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Refuse forward-mode derivatives, which would vanish silently."""
    if forward_ad._current_level >= 0:
        for argument in args:
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(tensor, Tensor) and _has_tangent(tensor):
                    raise NotDifferentiableError(f"{name}: this operator has no forward-mode derivative")


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
    except RuntimeError:
        # Forward mode around vmap, as in torch.func.hessian: torch cannot tell.
        return True


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


def _refusing_gradients(name: str, operator: Any) -> Callable[..., Any]:
    def wrapped(keyset: Any, *args: Any) -> Any:
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in flat):
            raise NotDifferentiableError(
                f"{name}: this in-place operator has no gradient; call it under torch.no_grad()"
            )
        return _below_autograd(operator, keyset, args)

    return wrapped
