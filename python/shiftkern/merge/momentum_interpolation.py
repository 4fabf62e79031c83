"""The moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.merge._states import accept_states
from shiftkern.norm.ema import ema_update_

__all__ = ["MomentumInterpolation"]


class MomentumInterpolation:
    """Follow a model that is being fine-tuned by a moving average of its weights, and evaluate that.

    ``average <- tau average + (1 - tau) theta`` at every ``every``-th call of :meth:`update`, from the zero-shot
    weights on.

    Parameters
    ----------
    weights : dict of str to Tensor or numpy.ndarray
        State dict to start from, finite; copied.
    tau : float
        Weight of the average, in [0, 1].
    every : int
        Steps between updates, at least 1.

    Raises
    ------
    ArgumentError
        ``tau`` outside [0, 1], ``every`` below 1, a tensor that is not finite.
    ArgumentTypeError
        No state dict of tensors or of arrays, or both kinds.

    Notes
    -----
    The average is float32 (float64 for float64) whatever the weights are: in half types most updates would round to
    nothing. One trip to memory for an update.

    References
    ----------
    Stojanovski, Roth and Akata: Momentum-based Weight Interpolation of Strong Zero-Shot Models for Continual Learning
    (2022).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import MomentumInterpolation
    >>> average = MomentumInterpolation({"w": torch.tensor([0.0])}, tau=0.75)
    >>> average.update({"w": torch.tensor([4.0])})
    True
    >>> average.weights()["w"].tolist()
    [1.0]
    """

    def __init__(self, weights: Any, tau: float, every: int = 1) -> None:
        op = "MomentumInterpolation"
        states = accept_states(op, weights, [weights], "weights")
        self.tau = _checks.fraction(op, "tau", tau)
        self.every = _checks.positive_int(op, "every", every)
        #: Calls of :meth:`update` so far.
        self.steps = 0
        self._dtypes = {name: tensor.dtype for name, tensor in states.base.items()}
        self._numpy = any(isinstance(value, np.ndarray) for value in weights.values())
        self._floating = states.floating
        self._average = self._widened(op, "weights", states.base)

    def _widened(self, op: str, argument: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in the types of the average."""
        self._check_finite(op, argument, tensors)
        wide = {n: torch.promote_types(t, torch.float32) if n in self._floating else t for n, t in self._dtypes.items()}
        layout = torch.contiguous_format
        return {n: tensors[n].detach().to(wide[n], copy=True, memory_format=layout) for n in self._dtypes}

    def _check_finite(self, op: str, argument: str, tensors: Mapping[str, Tensor]) -> None:
        for name in self._floating:
            if not bool(tensors[name].isfinite().all()):
                _checks.refuse(op, argument, "finite values", f"NaN or an infinity in tensor {name!r}")

    def update(self, current: Any) -> bool:
        """Take the model's weights after a step into the average.

        Parameters
        ----------
        current : dict of str to Tensor or numpy.ndarray
            State dict with the names and shapes of the first, finite. Integer and boolean tensors are taken over.

        Returns
        -------
        bool
            Whether this was a step that updates the average.
        """
        op = "MomentumInterpolation.update"
        states = accept_states(op, self._outside(self._average), [current], "current")
        due = (self.steps + 1) % self.every == 0
        if due:
            # Everything is checked before the first tensor changes.
            fresh, names = states.models[0], self._floating
            self._check_finite(op, "current", fresh)
            ema_update_([self._average[name] for name in names], [fresh[name] for name in names], 1.0 - self.tau)
            rest = fresh.keys() - set(names)
            self._average.update({name: fresh[name].detach().to(self._dtypes[name], copy=True) for name in rest})
        self.steps += 1
        return due

    def weights(self) -> dict[str, Any]:
        """Return the average as a state dict of its own, in the dtypes of the first weights."""
        return self._outside({name: t.to(self._dtypes[name], copy=True) for name, t in self._average.items()})

    def _outside(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {name: tensor.numpy() for name, tensor in tensors.items()} if self._numpy else dict(tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes: the average in full precision, and the number of steps."""
        return {"average": {name: t.clone() for name, t in self._average.items()}, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken.

        Parameters
        ----------
        state : dict
            With the names and shapes of this object's weights.
        """
        op = "MomentumInterpolation.load_state_dict"
        if not isinstance(state, Mapping) or state.keys() != {"average", "steps"}:
            _checks.refuse_type(op, "state", "a dict with 'average' and 'steps'", _checks.describe(state))
        steps = _checks.integer(op, "state", state["steps"], 0)
        given = accept_states(op, self._average, [state["average"]], "state").models[0]
        self._average = self._widened(op, "state", given)
        self.steps = steps
