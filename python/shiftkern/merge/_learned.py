"""Merging by descent: what is learned is small, and its gradient comes from that of the one merged model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._architecture import Architecture, Runner
from shiftkern.merge._states import accept_states, check_finite
from shiftkern.tta.losses import check_logits, softmax_entropy

__all__ = ["LearnedCoefficients", "LearnedMerging", "OptimizerFactory"]

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class LearnedMerging:
    """What learned merging shares: running the merged model, the step, the loop, saving.

    A step builds the merged tensors without a graph, takes the gradient of the loss by them, and pulls it back to what
    is learned. A subclass gives itself ``self._learned``, calls :meth:`_start`, and implements :meth:`step`,
    :meth:`_merge` and :meth:`_pull_back`.
    """

    def __init__(self, model: nn.Module | Runner, base: Any, models: Any, *, lr: float, optimizer: Any) -> None:
        op = self._op
        with torch.inference_mode(False):
            self._states = accept_states(op, base, models)
        self._architecture = Architecture(op, self._states, model)
        self._lr = _checks.positive(op, "lr", lr)
        if not callable(optimizer):
            _checks.refuse_type(op, "optimizer", "a callable (parameters, lr=) -> Optimizer", type(optimizer).__name__)
        self._make_optimizer: OptimizerFactory = optimizer
        trained = set(self._architecture.trained)
        #: Of the tensors to merge, those with a gradient and a name of their own; the values are of one dtype.
        self._trained = {name: (b, ms) for name, b, ms in self._states.each() if name in trained}
        if not self._trained:
            _checks.refuse(op, "base", "at least one floating-point parameter of the model", "none")
        self.losses: list[float] = []
        """Loss of each step, before its update."""

    _op: str
    _learned: list[Tensor]
    step: Callable[..., float]

    def _start(self) -> None:
        self._optimizer = self._make_optimizer(self._learned, lr=self._lr)
        if not isinstance(self._optimizer, torch.optim.Optimizer):
            got = type(self._optimizer).__name__
            _checks.refuse_type(self._op, "optimizer", "a callable that returns a torch.optim.Optimizer", got)

    # ---- what a subclass implements ----------------------------------------------------------------------------------

    def _merge(self, name: str, base: Tensor, models: list[Tensor]) -> Tensor:
        """Return the merged tensor, in the dtype of ``base``. Runs once per tensor and step, without a graph."""
        raise NotImplementedError

    def _pull_back(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """Return the gradients by what is learned, from those by the merged tensors."""
        raise NotImplementedError

    def _draw(self) -> None:
        """Draw what a step needs before it merges."""

    # ---- the step ----------------------------------------------------------------------------------------------------

    def _merged_tensors(self) -> dict[str, Tensor]:
        dtype = {name: tensor.dtype for name, tensor in self._states.base.items()}
        found = {name: self._merge(name, b, ms).to(dtype[name]) for name, b, ms in self._states.each()}
        return {name: found[self._architecture.same_as.get(name, name)] for name in found}

    def _descend(self, losses: Callable[[dict[str, Tensor]], Iterator[Tensor]]) -> float:
        """Take one optimizer step on the sum of the losses; each is freed before the next is computed."""
        op = self._op
        with torch.inference_mode(False), self._architecture.evaluating(), torch.no_grad():
            self._draw()
            merged = {name: tensor.detach() for name, tensor in self._merged_tensors().items()}
            leaves = {name: merged[name].requires_grad_() for name in self._trained}
            merged |= {name: merged[first] for name, first in self._architecture.same_as.items()}
            merged |= {name: tensor.detach() for name, tensor in self._states.base.items() if name not in merged}
            total, reached = 0.0, False
            gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
            with torch.enable_grad():
                for loss in losses(merged):
                    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
                        got = _checks.describe(loss)
                        _checks.refuse_type(op, "loss_fn", "a function that returns a scalar tensor", got)
                    if not bool(loss.isfinite()):
                        _checks.refuse(
                            op, "batch", "a batch with a finite loss", f"{loss.item()} (nothing was learned)"
                        )
                    total += loss.item()
                    if not loss.requires_grad:
                        continue
                    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                    for name, gradient in zip(leaves, found, strict=True):
                        if gradient is not None:
                            gradients[name] += gradient
                            reached = True
            if not reached:
                expected = "a model whose output depends on the merged parameters"
                _checks.refuse(op, "model", expected, "an output without a gradient")
            for name, gradient in gradients.items():
                if not bool(gradient.isfinite().all()):
                    got = f"NaN or an infinity for tensor {name!r} (nothing was learned)"
                    _checks.refuse(op, "batch", "a batch with a finite gradient", got)
            for tensor, gradient in zip(self._learned, self._pull_back(gradients), strict=True):
                tensor.grad = gradient
            self._optimizer.step()
            for tensor in self._learned:
                tensor.grad = None
        self.losses.append(total)
        return total

    def run(self, loader: Iterable[Any], steps: int, progress: Callable[[int, float], Any] | None = None) -> None:
        """Take many steps.

        Parameters
        ----------
        loader : iterable
            Yields what :meth:`step` takes: a batch, or a tuple where it takes several arguments. It is gone through
            again as often as needed.
        steps : int
            Steps, at least 0.
        progress : callable, optional
            Called after each step with the number of steps taken and the loss.

        Raises
        ------
        ArgumentError
            Fewer than ``steps`` batches in what cannot start again, or whatever :meth:`step` refuses.
        ArgumentTypeError
            ``loader`` is not iterable, or ``progress`` cannot be called.
        """
        op = self._op
        if not isinstance(loader, Iterable):
            _checks.refuse_type(op, "loader", "an iterable of batches", _checks.describe(loader))
        if progress is not None and not callable(progress):
            _checks.refuse_type(op, "progress", "a callable (step, loss) or None", _checks.describe(progress))
        steps = _checks.integer(op, "steps", steps, 0)
        done = 0
        while done < steps:
            before = done
            for batch in loader:
                loss = self._step_on(batch)
                done += 1
                if progress is not None:
                    progress(done, loss)
                if done == steps:
                    return
            if done == before:
                _checks.refuse(op, "loader", f"{steps} batches, or an iterable that can start again", f"{done}")

    def _step_on(self, batch: Any) -> float:
        return self.step(batch)

    def _entropies(self, batch: Any, heads: Sequence[Callable[[Any], Tensor]] | None) -> Any:
        """Return the losses of all tasks: the mean entropy of the predictions on the task's batch, by its head."""
        op, count = self._op, len(self._states.models)
        one_each = isinstance(batch, Sequence) and not isinstance(batch, str)
        if one_each and len(batch) != count:
            _checks.refuse(op, "batch", f"one batch for all tasks, or {count}, one for each task", f"{len(batch)}")

        def losses(merged: dict[str, Tensor]) -> Iterator[Tensor]:
            for task in range(count if one_each or heads is not None else 1):
                output = self._architecture.run(merged, batch[task] if one_each else batch)
                logits = check_logits(op, "model", output if heads is None else heads[task](output))
                wide = torch.promote_types(logits.dtype, torch.float32)
                yield softmax_entropy(logits.to(wide)).mean()

        return losses

    def _accept_heads(self, heads: Any) -> list[Callable[[Any], Tensor]] | None:
        if heads is None:
            return None
        count = len(self._states.models)
        if not isinstance(heads, Iterable) or isinstance(heads, Mapping):
            _checks.refuse_type(self._op, "heads", f"{count} callables", _checks.describe(heads))
        found = list(heads)
        if len(found) != count:
            _checks.refuse(self._op, "heads", f"{count} callables, one for each model", f"{len(found)}")
        for head in found:
            if not callable(head):
                _checks.refuse_type(self._op, "heads", f"{count} callables", _checks.describe(head))
        return found

    def merged(self) -> dict[str, Any]:
        """Return the merged model as it is now: a state dict of the kind, names and dtypes of the base."""
        with torch.inference_mode(False), torch.no_grad():
            # Names of one parameter each get memory of their own.
            found = {name: tensor.clone() for name, tensor in self._merged_tensors().items()}
            return self._states.back(found)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, the optimizer's state and the losses; not the models."""
        return {
            "learned": [tensor.detach().clone() for tensor in self._learned],
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "losses": list(self.losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`, of a merging of models of the same names and shapes."""
        op = self._op
        if not isinstance(state, Mapping) or not {"learned", "optimizer", "losses"} <= state.keys():
            _checks.refuse(op, "state", "a state from state_dict()", _checks.describe(state))
        shapes = [tuple(tensor.shape) for tensor in self._learned]
        got = [tuple(tensor.shape) for tensor in state["learned"]]
        if got != shapes:
            _checks.refuse(op, "state", f"learned tensors of shapes {shapes}", got)
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        with torch.no_grad():
            for tensor, value in zip(self._learned, state["learned"], strict=True):
                tensor.copy_(value)
        self.losses = list(state["losses"])


class LearnedCoefficients(LearnedMerging):
    """``base + sum_k lambda_k tau_k`` with learned lambda, one per model, or one per model and tensor."""

    _bounds = (-math.inf, math.inf)

    def __init__(
        self,
        model: nn.Module | Runner,
        base: Any,
        models: Any,
        *,
        per: Literal["task", "layer"],
        init: float,
        lr: float,
        optimizer: Any,
    ) -> None:
        super().__init__(model, base, models, lr=lr, optimizer=optimizer)
        self.per = _checks.one_of(self._op, "per", per, ("task", "layer"))
        self._init = _checks.number(self._op, "init", init)
        self.names = list(self._trained)
        """Names of the tensors that have coefficients of their own with ``per="layer"``."""
        self._places = {name: place for place, name in enumerate(self.names)}
        count = len(self._states.models)
        shape = (count,) if self.per == "task" else (count, len(self.names))
        self._lambda = torch.full(shape, self._init, dtype=torch.float64, requires_grad=True)
        self._learned = [self._lambda]
        self._start()

    def _used(self) -> Tensor:
        """Return the coefficients as they enter the sum, in the shape in which they are learned."""
        return self._lambda.detach().clamp(*self._bounds)

    @property
    def coefficients(self) -> Tensor:
        """Coefficients in use, float64: ``(K,)``, or ``(K, number of tensors)`` in the order of ``names``."""
        return self._used()

    def _merge(self, name: str, base: Tensor, models: list[Tensor]) -> Tensor:
        used = self._used()
        if used.dim() == 2:
            # Buffers have no gradient, and stay with the coefficients at the start.
            place = self._places.get(name)
            used = used.new_full(used.shape[:1], self._init) if place is None else used[:, place]
        merged, bad = ops.linear(base, models, used.tolist())
        check_finite(self._op, name, bad)
        found: Tensor = merged
        return found

    def _pull_back(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        columns = []
        for name, (base, models) in self._trained.items():
            dots, bad = ops.dots(base, models, gradients[name].to(base.dtype))
            check_finite(self._op, name, bad)
            columns.append(dots.cpu())
        by_weight = torch.stack(columns, 1)
        by_used = by_weight.sum(1) if self.per == "task" else by_weight
        # Not autograd through clamp, whose gradient on the bounds itself depends on the version of torch.
        return [by_used * (self._lambda.detach() == self._used())]
