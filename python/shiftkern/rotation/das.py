"""DAS (338): interchange interventions in a learned rotated subspace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern._library import computing, without_autocast
from shiftkern.rotation._basis import Basis, check_pair

__all__ = ["DAS"]


class DAS(nn.Module):
    """Exchange of ``k`` rotated coordinates between two representations.

    With ``W`` orthogonal, ``z = h W`` and ``h' = [z_source[:k], z_base[k:]] W^T``: the first ``k`` coordinates in the
    basis are those of ``source``, the others stay. Only the first ``k`` columns of ``W`` matter, so this is computed as
    ``h' = h_base + (h_source - h_base) W_k W_k^T``, without a product of size ``d x d`` per representation.

    The model that the representations come from stays frozen; ``W`` is trained so that what the model makes of ``h'``
    agrees with the counterfactual label of a causal model.

    Parameters
    ----------
    d : int
        Width of the representations, at least 2.
    k : int
        Coordinates to exchange, from 1 to ``d - 1``. There is no default: with ``k = d`` the whole vector would be
        replaced, and nothing learned.
    low_rank : bool
        Train only the ``k`` columns that matter (O(d k) numbers and O(d k^2) time for the basis) instead of a whole
        orthogonal matrix (O(d^2) and O(d^3)). Every map of one form is a map of the other.
    seed : int
        Of the random orthonormal start, which is uniform over all of them.

    Raises
    ------
    ArgumentError
        ``d``, ``k`` or ``seed`` out of range.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    The basis is the Cayley transform of a skew matrix times a fixed random start. It is orthonormal for any value of
    the parameter, up to rounding, so that a plain optimizer may train it; the parameter starts at zero, and weight
    decay pulls towards the start. ``(I - A)`` is never singular, and a step costs one linear solve, where a matrix
    exponential takes about ten products.

    float16 and bfloat16 representations are computed in float32. Where the types of representation and basis differ,
    the wider one is used; the result has the type of ``base``. Differentiable in everything, any number of times.

    References
    ----------
    Geiger et al.: Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations
    (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import DAS
    >>> das = DAS(4, 1)
    >>> base, source = torch.randn(2, 8, 4).unbind()
    >>> mixed = das(base, source)
    >>> w = das.basis()[:, :1]
    >>> torch.allclose(mixed @ w, source @ w, atol=1e-6)
    True
    """

    def __init__(self, d: int, k: int, *, low_rank: bool = False, seed: int = 0) -> None:
        super().__init__()
        op = "DAS"
        self.d = _checks.integer(op, "d", d, 2)
        self.k = _checks.positive_int(op, "k", k)
        if self.k >= self.d:
            expected = f"fewer coordinates than d={self.d} (all of them would replace the whole vector)"
            _checks.refuse(op, "k", expected, self.k)
        self.low_rank = _checks.flag(op, "low_rank", low_rank)
        self.rotation = Basis(self.d, self.k if self.low_rank else self.d, _checks.seed(op, "seed", seed))

    def basis(self) -> Tensor:
        """Return ``W``: shape ``(d, d)``, or ``(d, k)`` with ``low_rank``; its first ``k`` columns are exchanged."""
        basis: Tensor = self.rotation()
        return basis

    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        """Return ``base`` with the learned coordinates of ``source``; the same as :meth:`interchange`."""
        return self.interchange(base, source)

    def interchange(self, base: Tensor, source: Tensor) -> Tensor:
        """Return ``base`` with the learned coordinates of ``source``.

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
        check_pair("DAS", base, source, self.rotation.start)
        columns = self.basis()[:, : self.k]
        dtype = torch.promote_types(computing(base.dtype), columns.dtype)
        with without_autocast(base.device):
            columns = columns.to(dtype)
            difference = source.to(dtype) - base.to(dtype)
            return (base.to(dtype) + (difference @ columns) @ columns.mT).to(base.dtype)

    def extra_repr(self) -> str:
        """Describe the options."""
        return f"d={self.d}, k={self.k}, low_rank={self.low_rank}"
