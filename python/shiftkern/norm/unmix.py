"""UnMix-TNS: statistics per instance, mixed with a set of components that follow the stream."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import norm as ops
from shiftkern.norm.batch_norm import BatchNormReplacement, check_channels

__all__ = ["UnMixTNS", "unmix_norm"]


def _arguments(
    op: str,
    x: Tensor,
    component_mean: Tensor,
    component_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    eps: float,
    cross_term: bool,
) -> tuple[Any, ...]:
    check_channels(op, x)
    channels, device = x.shape[1], x.device
    _checks.tensor(op, "component_mean", component_mean, min_dim=1, device=device)
    components = component_mean.shape[0]
    if components < 1:
        expected = f"shape (K, {channels}) with K >= 1"
        _checks.refuse(op, "component_mean", expected, f"shape {tuple(component_mean.shape)}")
    for name, component in (("component_mean", component_mean), ("component_var", component_var)):
        _checks.tensor(op, name, component, shape=(components, channels), device=device)
        if component.requires_grad and torch.is_grad_enabled():
            expected = "a tensor that does not require grad: no gradient flows to components"
            _checks.refuse(op, name, expected, "one that does")
    _checks.optional_per_channel(op, "weight", weight, channels, device)
    _checks.optional_per_channel(op, "bias", bias, channels, device)
    temperature = _checks.positive(op, "temperature", temperature)
    eps = _checks.non_negative(op, "eps", eps)
    return component_mean, component_var, weight, bias, temperature, eps, _checks.flag(op, "cross_term", cross_term)


def unmix_norm(
    x: Tensor,
    component_mean: Tensor,
    component_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    temperature: float = 0.07,
    eps: float = 1e-5,
    cross_term: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise each instance by a mixture of its own statistics and the components'.

    With instance mean ``m_b`` and variance ``v_b``: ``p_bk = softmax_k(cos(m_b, mean_k) / temperature)``; component k
    contributes the mean ``(1 - p_bk) mean_k + p_bk m_b`` and the variance ``(1 - p_bk) var_k + p_bk v_b``; the
    instance is normalised by mean and variance of the equal-weight mixture of these K.

    Parameters
    ----------
    x : Tensor
        ``(B, C, *spatial)``, float.
    component_mean, component_var : Tensor
        Float, shape ``(K, C)``; not changed.
    weight, bias : Tensor, optional
        Scale and offset, float, shape ``(C,)``.
    temperature : float
        Softmax temperature, > 0.
    eps : float
        Added to the variance.
    cross_term : bool
        Add ``p (1 - p) (m_b - mean_k)^2`` to each component's variance, as a mixture of two has. The authors' code
        leaves it out, and so does the default.

    Returns
    -------
    y : Tensor
        In the shape, dtype and memory format of ``x``; differentiable once in ``x``, ``weight`` and ``bias``.
    p : Tensor
        Assignment ``(B, K)``, float64; rows sum to 1; no gradient flows through it.

    Raises
    ------
    ArgumentError
        Wrong rank, shape or device; ``temperature`` not positive; components that require grad.
    ArgumentTypeError
        A dtype that is not float.

    Notes
    -----
    O(numel + B K C) time, O(B (K + C)) extra memory: no ``(B, K, C)`` array is made. Means shorter than 1e-12 have
    cosine 0 with everything, as in ``torch.nn.functional.normalize``.

    References
    ----------
    Tomar et al.: Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import unmix_norm
    >>> y, p = unmix_norm(torch.ones(2, 3, 4, 4), torch.eye(3)[:2], torch.ones(2, 3))
    >>> y.shape, p.sum(1).tolist()
    (torch.Size([2, 3, 4, 4]), [1.0, 1.0])
    """
    arguments = _arguments("unmix_norm", x, component_mean, component_var, weight, bias, temperature, eps, cross_term)
    y, p, *_ = ops.unmix_norm(x, *arguments)
    return y, p


class UnMixTNS(BatchNormReplacement):
    """Batch normalization by :func:`unmix_norm` with components that follow the stream.

    After each batch ``mean_k <- mean_k + eta * avg_b p_bk (m_b - mean_k)``, the variances likewise, with
    ``eta = 1 - (1 - momentum)^(B / 64)`` and B the size of the batch; in training and evaluation mode alike. The
    components start at ``mean_k ~ N(mean_s, K / (2 (K - 1)) var_s)`` and ``var_k = var_s / 2`` (one component: at the
    source statistics).

    Parameters
    ----------
    num_features : int
        Number of channels C.
    num_components : int
        K, at least 1.
    momentum : float
        Update rate for a batch of 64, in [0, 1].
    temperature, cross_term
        As in :func:`unmix_norm`.
    seed : int or torch.Generator
        For the initial components.
    eps, affine, device, dtype
        As in ``nn.BatchNorm2d``.

    Attributes
    ----------
    component_mean, component_var : Tensor
        Buffers of shape ``(K, C)``.
    component_noise : Tensor
        The draw that the components start from, so that :meth:`reset` is exact after ``load_state_dict``.

    References
    ----------
    Tomar et al.: Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.norm import UnMixTNS
    >>> layer = UnMixTNS(3, num_components=4, seed=0)
    >>> layer(torch.zeros(2, 3, 4, 4)).shape, layer.component_mean.shape
    (torch.Size([2, 3, 4, 4]), torch.Size([4, 3]))
    """

    component_mean: Tensor
    component_var: Tensor
    component_noise: Tensor

    def __init__(
        self,
        num_features: int,
        num_components: int = 16,
        *,
        temperature: float = 0.07,
        cross_term: bool = False,
        seed: int | torch.Generator = 0,
        **options: Any,
    ) -> None:
        op = "UnMixTNS"
        super().__init__(num_features, **options)
        self.num_components = _checks.positive_int(op, "num_components", num_components)
        self.temperature = _checks.positive(op, "temperature", temperature)
        self.cross_term = _checks.flag(op, "cross_term", cross_term)
        if not isinstance(seed, torch.Generator):
            seed = torch.Generator().manual_seed(_checks.seed(op, "seed", seed))
        shape = (self.num_components, self.num_features)
        # The draw itself is kept: a generator in a module could neither be copied nor saved.
        noise = torch.randn(shape, generator=seed, dtype=torch.float64, device=seed.device)
        self.register_buffer("component_noise", noise.to(self.running_mean.device))
        for name in ("component_mean", "component_var"):
            self.register_buffer(name, self.running_mean.new_empty(shape))
        self.start()

    def start(self) -> None:
        """Put the components around the source statistics, by the module's own draw."""
        k = self.num_components
        mean, var = self.running_mean.double(), self.running_var.double()
        spread = 0.0 if k == 1 else 0.5
        noise = self.component_noise.double() * (math.sqrt(spread * k / max(k - 1, 1)) * var.sqrt())
        self.component_mean.copy_(mean + noise)
        self.component_var.copy_(((1.0 - spread) * var).expand_as(noise))

    reset = start

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` of shape ``(B, C, *spatial)`` and move the components."""
        arguments = _arguments(
            "UnMixTNS",
            x,
            self.component_mean,
            self.component_var,
            self.weight,
            self.bias,
            self.temperature,
            self.eps,
            self.cross_term,
        )
        y: Tensor
        y, p, instance_mean, instance_var, *_ = ops.unmix_norm(x, *arguments)
        if x.numel() > 0:
            with torch.no_grad():
                eta = 1.0 - (1.0 - self.momentum) ** (x.shape[0] / 64)
                ops.unmix_update_(self.component_mean, instance_mean, p, eta)
                ops.unmix_update_(self.component_var, instance_var, p, eta)
        return y

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"{super().extra_repr()}, num_components={self.num_components}, momentum={self.momentum}"
