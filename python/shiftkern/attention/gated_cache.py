"""TGATE (369): attention that is computed while a picture is laid out, and remembered after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks

__all__ = ["GatedCache", "gated_cache"]


class GatedCache(nn.Module):
    """An attention layer of a diffusion model that stops being computed once its outputs have settled.

    Each call is one sampling step, counted from 0. Up to step ``gate_step - 1`` a batch holds both branches of
    classifier-free guidance, ``[unconditional; conditional]``. At that step the mean of the two halves of the output
    is kept, and from the next step on the sampler runs one branch without guidance, so that the batch is half as large.

    ``kind="cross"``: computed at steps 0 to ``gate_step - 1``; every later step returns what was kept, without a call
    of the attention.

    ``kind="self"`` (the method's second version): computed and returned at steps below ``warm_up``; between
    ``warm_up`` and the gate, computed and kept at step ``warm_up`` and whenever the step is a multiple of
    ``sp_interval``, remembered otherwise; at step ``gate_step - 1`` as above; after it, computed and kept whenever the
    step is a multiple of ``fi_interval``, remembered otherwise.

    Parameters
    ----------
    attention : callable
        The layer: takes hidden states ``(B, ...)`` and whatever else, and returns a tensor ``(B, ...)``, the output
        after its output projection and before the residual is added.
    gate_step : int
        First step that runs one branch, at least 1.
    kind : {"cross", "self"}
        Which schedule to follow.
    guided : bool
        Whether batches hold two branches up to the gate. False, for models without guidance: the batch keeps its size,
        and what is kept is the output itself.
    warm_up : int
        Steps of self-attention before anything is kept, at least 0.
    sp_interval, fi_interval : int
        Steps between two computations of self-attention before and after the gate, at least 1; ``fi_interval=1``
        computes each.

    Raises
    ------
    ArgumentError
        A number out of range, an unknown ``kind``.
    ArgumentTypeError
        ``attention`` cannot be called; an argument of a wrong type.

    Notes
    -----
    Call :meth:`reset` before each prompt. The shape, dtype and device of the first step's hidden states hold for the
    prompt: a batch that does not fit, or that has not been halved at the gate, raises.

    What is kept belongs to a prompt and not to the model: it is not in the ``state_dict``, and loading one does not
    touch it. It is handed out as a copy, so that the caller may write to it. With gradients enabled it keeps its graph,
    so that gradients of later steps reach the step it comes from.

    A sampler that evaluates the model several times in a step counts as that many steps.

    References
    ----------
    Zhang et al.: Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import GatedCache
    >>> layer = GatedCache(lambda hidden, text: hidden + text, gate_step=2)
    >>> both, text = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [10.0]])
    >>> [layer(both, text).flatten().tolist() for _ in range(2)]
    [[1.0, 13.0], [1.0, 13.0]]
    >>> layer(both[1:], text[1:])  # the mean of both branches, whatever the input
    tensor([[7.]])
    >>> layer.reset()
    """

    def __init__(
        self,
        attention: Callable[..., Tensor],
        *,
        gate_step: int = 10,
        kind: str = "cross",
        guided: bool = True,
        warm_up: int = 2,
        sp_interval: int = 5,
        fi_interval: int = 1,
    ) -> None:
        super().__init__()
        op = "GatedCache"
        if not callable(attention):
            _checks.refuse_type(op, "attention", "a callable", _checks.describe(attention))
        self.attention = attention
        self.gate_step = _checks.positive_int(op, "gate_step", gate_step)
        self.kind = _checks.one_of(op, "kind", kind, ("cross", "self"))
        self.guided = _checks.flag(op, "guided", guided)
        self.warm_up = _checks.integer(op, "warm_up", warm_up, 0)
        self.sp_interval = _checks.positive_int(op, "sp_interval", sp_interval)
        self.fi_interval = _checks.positive_int(op, "fi_interval", fi_interval)
        self.reset()

    def reset(self) -> None:
        """Forget the prompt: the next call is step 0."""
        self._step = 0
        self._kept: Tensor | None = None
        self._first: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @property
    def step(self) -> int:
        """Step of the next call."""
        return self._step

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of this step, computed or remembered, and go on to the next step.

        Parameters
        ----------
        hidden_states : Tensor
            ``(B, ...)``, float: both branches up to step ``gate_step - 1``, ``(B / 2, ...)`` after it.
        *args, **kwargs
            For the attention, at the steps that call it.

        Returns
        -------
        Tensor
            As the attention returns it.

        Raises
        ------
        ArgumentError
            Hidden states that do not fit those of the prompt's first step, or an attention that returns another batch.
        ArgumentTypeError
            No float tensor, or an attention that returns none.
        """
        self._check(hidden_states)
        if self._kept is not None and self._remembers():
            out = self._kept.clone()
        else:
            out = self.attention(hidden_states, *args, **kwargs)
            _checks.tensor("GatedCache", "attention", out, min_dim=1)
            if out.shape[0] != hidden_states.shape[0]:
                expected = f"a layer that returns a batch of {hidden_states.shape[0]}, as it is given"
                _checks.refuse("GatedCache", "attention", expected, f"shape {tuple(out.shape)}")
            self._kept = self._to_keep(out)
        self._step += 1
        return out

    def _remembers(self) -> bool:
        """Whether this step returns what an earlier one kept."""
        if self.step >= self.gate_step:
            return self.kind == "cross" or self.step % self.fi_interval != 0
        if self.step == self.gate_step - 1 or self.kind == "cross":
            return False
        return self.step > self.warm_up and self.step % self.sp_interval != 0

    def _to_keep(self, out: Tensor) -> Tensor | None:
        """What later steps return, if any of them does not compute."""
        if self.step < self.gate_step - 1:
            keeps = self.kind == "self" and self.step >= self.warm_up
        else:
            keeps = self.kind == "cross" or self.fi_interval > 1
        if not keeps:
            return None
        if self.step == self.gate_step - 1 and self.guided:
            return out.reshape(2, out.shape[0] // 2, *out.shape[1:]).mean(0)
        # The caller gets the same tensor and may write to it.
        return out.clone()

    def _check(self, hidden_states: Tensor) -> None:
        op, name = "GatedCache", "hidden_states"
        _checks.tensor(op, name, hidden_states, min_dim=1)
        if self._first is None or self.step == 0:
            if self.guided and hidden_states.shape[0] % 2:
                expected = "two branches, an even batch (or guided=False)"
                _checks.refuse(op, name, expected, f"shape {tuple(hidden_states.shape)}")
            self._first = (hidden_states.shape, hidden_states.dtype, hidden_states.device)
        shape, dtype, device = self._first
        half = self.guided and self.step >= self.gate_step
        wanted = (shape[0] // 2, *shape[1:]) if half else tuple(shape)
        if (tuple(hidden_states.shape), hidden_states.dtype, hidden_states.device) != (wanted, dtype, device):
            origin = "one branch of the first step" if half else "as in the first step"
            expected = f"a {dtype} tensor of shape {wanted} on {device} at step {self.step}, {origin} (or reset())"
            _checks.refuse(op, name, expected, _checks.describe(hidden_states))


#: The class under the name that the other methods of the family follow.
gated_cache = GatedCache
