"""A mask over the parameters, shared by all task vectors, learned by minimising the entropy of predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.merge._learned import LearnedMerging, OptimizerFactory
from shiftkern.merge._states import check_finite

__all__ = ["ConcreteMerging", "concrete"]


class ConcreteMerging(LearnedMerging):
    """Learn which entries of the task vectors to keep, without labels: concrete subspace learning.

    ``theta = theta_0 + scale * sum_k m tau_k / mean(m)``, tensor by tensor, with one mask for all tasks,
    ``m = sigmoid((x + log u - log(1 - u)) / temperature)``, ``u`` uniform and drawn anew in each step. Each
    :meth:`step` descends the sum over tasks of the mean entropy of the softmax of the merged model's predictions.

    Parameters
    ----------
    model : torch.nn.Module or callable
        The architecture, whose own values of the merged tensors are not used and not changed: it is run in evaluation
        mode on a batch (a dict becomes keyword arguments). Or a function from a dict of merged tensors and a batch to
        the output.
    base : mapping of str to Tensor or numpy.ndarray
        State dict of the common ancestor. It may hold only some of the module's tensors: the others are the module's.
    models : sequence of mappings
        State dicts of the K fine-tuned models, with the names and shapes of ``base``.
    heads : sequence of callables, optional
        One per model, from the output of ``model`` to the logits of its task. They are not trained. Without them the
        outputs are the logits.
    scale : float
        Coefficient of every task vector.
    temperature : float
        Of the mask, > 0: the smaller, the closer a drawn mask is to zeros and ones.
    init : float
        Logits ``x`` at the start.
    lr : float
        Learning rate.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.
    seed : int
        Seed of the draws.

    Attributes
    ----------
    masks : dict of str to Tensor
        ``sigmoid(x)`` of each parameter tensor: the probability that a drawn entry is above one half.
    losses : list of float
        Loss of each step, before its update.

    Raises
    ------
    ArgumentError
        Names or shapes that differ between the state dicts or are not those of the module, NaN or infinities in them,
        a parameter shared within the module and not within the state dicts, or an option out of range.
    ArgumentTypeError
        State dicts, ``model``, ``heads`` or ``optimizer`` are of another kind.

    Notes
    -----
    With the coefficients fixed, the task vectors enter as their sum: a step costs O(parameters) beside the forward and
    backward passes, and memory is that of a few models, whatever K. :meth:`merged` uses ``sigmoid(x)`` as the mask,
    without a draw. Buffers are merged unmasked.

    References
    ----------
    Tang et al.: Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion (2023).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import ConcreteMerging
    >>> base = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    >>> models = [{"weight": torch.tensor(w), "bias": torch.zeros(2)} for w in ([[4.0, 0], [0, 1]], [[0.0, 2], [0, 1]])]
    >>> merging = ConcreteMerging(nn.Linear(2, 2), base, models)
    >>> merging.merged()["weight"]  # equal logits: the mask rescales itself away
    tensor([[1.2000, 0.6000],
            [0.0000, 0.6000]])
    >>> merging.run([torch.eye(2)], steps=3)
    >>> [merging.masks[name].shape for name in ("weight", "bias")]
    [torch.Size([2, 2]), torch.Size([2])]
    """

    _op = "ConcreteMerging"

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        base: Any,
        models: Any,
        *,
        heads: Sequence[Callable[[Any], Tensor]] | None = None,
        scale: float = 0.3,
        temperature: float = 0.5,
        init: float = 0.0,
        lr: float = 1e-3,
        optimizer: OptimizerFactory = torch.optim.Adam,
        seed: int = 0,
    ) -> None:
        op = self._op
        super().__init__(model, base, models, lr=lr, optimizer=optimizer)
        self.heads = self._accept_heads(heads)
        self.scale = _checks.number(op, "scale", scale)
        self.temperature = _checks.positive(op, "temperature", temperature)
        init = _checks.number(op, "init", init)
        self._generator = torch.Generator().manual_seed(_checks.seed(op, "seed", seed))
        self._noise: dict[str, Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            self._sums = {name: self._sum(name, start, ends) for name, start, ends in self._states.each()}
        self._logits = {name: torch.full_like(self._sums[name], init, requires_grad=True) for name in self._trained}
        self._learned = list(self._logits.values())
        self._start()

    def _sum(self, name: str, base: Tensor, models: list[Tensor]) -> Tensor:
        """``scale * sum_k tau_k``, in float32 or better."""
        wide = torch.promote_types(base.dtype, torch.float32)
        start, total = base.to(wide), torch.zeros_like(base, dtype=wide)
        for number, model in enumerate(models):
            delta = model.to(wide) - start
            if not bool(delta.isfinite().all()):
                check_finite(self._op, name, torch.tensor(number))
            total += delta
        return self.scale * total

    @property
    def masks(self) -> dict[str, Tensor]:
        """``sigmoid(x)`` of each parameter tensor."""
        return {name: logits.detach().sigmoid() for name, logits in self._logits.items()}

    def _draw(self) -> None:
        for name, logits in self._logits.items():
            least = torch.finfo(logits.dtype).eps
            uniform = torch.rand(logits.shape, generator=self._generator, dtype=logits.dtype)
            self._noise[name] = uniform.clamp_(least, 1 - least).logit_().to(logits.device)

    def _masked(self, name: str) -> Tensor:
        """What the tensor adds to the base; differentiable in its logits."""
        if name not in self._logits:
            return self._sums[name]
        logits = self._logits[name]
        noise = self._noise.get(name)
        mask = (logits if noise is None else (logits + noise) / self.temperature).sigmoid()
        return self._sums[name] * (mask / mask.mean())

    def _merge(self, name: str, base: Tensor, models: list[Tensor]) -> Tensor:
        return base + self._masked(name)

    def _pull_back(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for name, logits in self._logits.items():
            with torch.enable_grad():
                added = self._masked(name)
            found += torch.autograd.grad(added, logits, gradients[name].to(added.dtype))
        return found

    def step(self, batch: Any) -> float:
        """Learn from one batch of each task, under a newly drawn mask.

        Parameters
        ----------
        batch : Tensor, dict, or sequence of these
            A list or tuple holds one batch for each model; anything else is one batch for all.

        Returns
        -------
        float
            The loss before the update.

        Raises
        ------
        ArgumentError
            Another number of batches, or a loss or gradient that is not finite; nothing was learned then.
        ArgumentTypeError
            The outputs are no logits ``(N, classes, ...)``.
        """
        try:
            return self._descend(self._entropies(batch, self.heads))
        finally:
            self._noise = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, the state of the optimizer and of the draws, and the losses; not the models."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state from :meth:`state_dict`, of a merging of models of the same names and shapes."""
        if isinstance(state, Mapping) and "generator" not in state:
            _checks.refuse(self._op, "state", "a state with the entry 'generator'", f"{sorted(state)}")
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])


def concrete(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    base: Any,
    models: Any,
    loader: Iterable[Any],
    *,
    steps: int = 2000,
    progress: Callable[[int, float], Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Learn a mask shared by all task vectors from batches without labels, and merge: concrete subspace learning.

    :class:`ConcreteMerging` from the start to the end, for whom its state in between is of no use.

    Parameters
    ----------
    model, base, models
        As in :class:`ConcreteMerging`.
    loader : iterable
        Batches for its ``step``, gone through as often as needed.
    steps : int
        Steps to take; the authors take 2000.
    progress : callable, optional
        Called after each step with the number of steps taken and the loss.
    **options
        Options of :class:`ConcreteMerging`.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        The merged state dict, of the kind that came in.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :class:`ConcreteMerging` and its ``run``.

    Notes
    -----
    Each step costs a forward and a backward pass of one merged model and O(parameters).

    References
    ----------
    Tang et al.: Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion (2023).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.merge import concrete
    >>> model = nn.Linear(4, 3)
    >>> base = model.state_dict()
    >>> tuned = [{name: t + 0.1 * torch.randn_like(t) for name, t in base.items()} for _ in range(2)]
    >>> merged = concrete(model, base, tuned, [torch.randn(8, 4)], steps=3)
    >>> list(merged)
    ['weight', 'bias']
    """
    merging = ConcreteMerging(model, base, models, **options)
    merging.run(loader, steps, progress)
    return merging.merged()
