"""Boundless DAS (504): how many rotated coordinates to exchange is learned as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import computing, without_autocast
from shiftkern.rotation._basis import Basis, check_pair

__all__ = ["BoundlessDAS"]


class BoundlessDAS(nn.Module):
    """Exchange of a learned share of rotated coordinates between two representations.

    With ``W`` orthogonal and ``z = h W``: ``h' = ((1 - m) z_base + m z_source) W^T``, with the mask
    ``m_i = sigmoid(i / T) sigmoid((b d - i) / T)`` for ``i = 0, .., d - 1``. The share ``b`` is learned along with
    ``W``; ``T`` falls while training, so that the mask goes from soft to hard.

    Parameters
    ----------
    d : int
        Width of the representations, at least 1.
    boundary : float
        Start of ``b``, in [1e-3, 1].
    start_temperature, end_temperature : float
        ``T`` at the first and at the last step of training; positive.
    sparsity : float
        Weight of the loss that keeps ``b`` small, at least 0.
    seed : int
        Of the random orthogonal start.

    Attributes
    ----------
    boundary : Parameter
        ``b``, a single number. :meth:`mask` clamps it to [1e-3, 1].
    temperature : Tensor
        ``T``, a buffer.

    Raises
    ------
    ArgumentError
        A number out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    The left edge of the mask lies at 0, so ``m_0`` is ``sigmoid(0)`` times something below one: **the first coordinate
    is exchanged by at most one half**, at any temperature. That is the published equation. Training can leave this
    coordinate to a direction that does not matter.

    Where ``b`` leaves [1e-3, 1], the mask passes no gradient to it. From above, :meth:`sparsity_loss` brings it back,
    as it is a sum over the parameter itself; from below, nothing does.

    The basis is that of :class:`DAS`; O(d^3) time for it and O(d^2) per representation. Computed in float32, or in
    float64 where an input is.

    References
    ----------
    Wu et al.: Interpretability at Scale: Identifying Causal Mechanisms in Alpaca (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import BoundlessDAS
    >>> das = BoundlessDAS(8)
    >>> base, source = torch.randn(2, 5, 8).unbind()
    >>> for step in range(10):
    ...     das.anneal(step, 10)
    ...     loss = das(base, source).square().mean() + das.sparsity_loss()
    >>> das.mask().round(decimals=2)
    tensor([0.5000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000, 0.0000, 0.0000],
           grad_fn=<RoundBackward1>)
    """

    temperature: Tensor

    def __init__(
        self,
        d: int,
        *,
        boundary: float = 0.5,
        start_temperature: float = 50.0,
        end_temperature: float = 0.1,
        sparsity: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        op = "BoundlessDAS"
        self.d = _checks.positive_int(op, "d", d)
        share = _checks.number(op, "boundary", boundary)
        if not 1e-3 <= share <= 1.0:
            _checks.refuse(op, "boundary", "a number in [1e-3, 1]", share)
        self.start_temperature = _checks.positive(op, "start_temperature", start_temperature)
        self.end_temperature = _checks.positive(op, "end_temperature", end_temperature)
        self.sparsity = _checks.non_negative(op, "sparsity", sparsity)
        self.rotation = Basis(self.d, self.d, _checks.seed(op, "seed", seed))
        self.boundary = nn.Parameter(torch.tensor([share]))
        self.register_buffer("temperature", torch.tensor(self.start_temperature))

    def basis(self) -> Tensor:
        """Return ``W``, shape ``(d, d)``."""
        basis: Tensor = self.rotation()
        return basis

    def anneal(self, step: int, steps: int) -> None:
        """Set the temperature for a step of training: linear from the start (step 0) to the end (step ``steps - 1``).

        Parameters
        ----------
        step : int
            From 0 to ``steps - 1``.
        steps : int
            Steps of the whole training, at least 1; a training of one step runs at the end temperature.

        Raises
        ------
        ArgumentError
            A step that is not in the training.
        ArgumentTypeError
            No integers.
        """
        op = "BoundlessDAS.anneal"
        steps = _checks.positive_int(op, "steps", steps)
        step = _checks.integer(op, "step", step, 0)
        if step >= steps:
            _checks.refuse(op, "step", f"an integer below steps={steps}", step)
        passed = step / (steps - 1) if steps > 1 else 1.0
        self.temperature.fill_((1.0 - passed) * self.start_temperature + passed * self.end_temperature)

    def mask(self) -> Tensor:
        """Return ``m``, shape ``(d,)``: the share of each coordinate that comes from the source."""
        dtype = computing(self.boundary.dtype)
        boundary = self.boundary.to(dtype).clamp(1e-3, 1.0)
        # A copy, as the backward pass may come after the temperature of the next step is set.
        temperature = self.temperature.to(dtype, copy=True)
        index = torch.arange(self.d, dtype=dtype, device=boundary.device)
        return torch.sigmoid(index / temperature) * torch.sigmoid((boundary * self.d - index) / temperature)

    def sparsity_loss(self) -> Tensor:
        """Return ``sparsity * b``, a scalar to be added to the loss of the task."""
        return self.sparsity * self.boundary.sum()

    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        """Return ``base`` with the learned coordinates of ``source``; the same as :meth:`interchange`."""
        return self.interchange(base, source)

    def interchange(self, base: Tensor, source: Tensor) -> Tensor:
        """Return ``base`` with the learned coordinates of ``source``, at the present temperature.

        Parameters
        ----------
        base, source : Tensor
            ``(..., d)``, float, of equal shape, dtype and device.

        Returns
        -------
        Tensor
            Shape and dtype of ``base``.

        Raises
        ------
        ArgumentError
            Shapes or devices that do not fit.
        ArgumentTypeError
            No float tensors, or different dtypes.
        """
        check_pair("BoundlessDAS", base, source, self.rotation.start)
        basis = self.basis()
        dtype = torch.promote_types(computing(base.dtype), basis.dtype)
        with without_autocast(base.device):
            basis = basis.to(dtype)
            difference = source.to(dtype) - base.to(dtype)
            return (base.to(dtype) + (self.mask().to(dtype) * (difference @ basis)) @ basis.mT).to(base.dtype)

    def extra_repr(self) -> str:
        """Describe the options."""
        temperatures = f"start_temperature={self.start_temperature}, end_temperature={self.end_temperature}"
        return f"d={self.d}, {temperatures}, sparsity={self.sparsity}"
