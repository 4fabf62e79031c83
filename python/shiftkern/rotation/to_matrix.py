"""The matrix of a rotation that is given by its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern.rotation.butterfly_rotate import butterfly_rotate
from shiftkern.rotation.cayley_rotate import cayley_rotate
from shiftkern.rotation.givens_mix import givens_mix
from shiftkern.rotation.givens_rotate import givens_rotate
from shiftkern.rotation.householder_chain import householder_chain
from shiftkern.rotation.householder_reflect import householder_reflect

__all__ = ["to_matrix"]

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (givens_rotate, givens_mix, householder_reflect, householder_chain, cayley_rotate, butterfly_rotate)
}


def to_matrix(fn_name: str, params: Mapping[str, Any], d: int) -> Tensor:
    """Write a rotation as a matrix ``R (d, d)``, so that ``y = R x`` for each row.

    Parameters
    ----------
    fn_name : str
        ``"givens_rotate"``, ``"givens_mix"``, ``"householder_reflect"``, ``"householder_chain"``, ``"cayley_rotate"``
        or ``"butterfly_rotate"``.
    params : mapping
        The arguments of that function but ``x``, by name.
    d : int
        Number of coordinates, at least 1.

    Returns
    -------
    Tensor
        ``(d, d)``, of the dtype of the first tensor among the parameters. Differentiable in the parameters.

    Raises
    ------
    ArgumentError
        An unknown function, arguments that it does not have or lacks, or what the function itself refuses.
    ArgumentTypeError
        ``params`` is no mapping, or has no float tensor.

    Notes
    -----
    ``O(d)`` times the cost of one row: for tests and pictures, not for training.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.rotation import orthogonality_error, to_matrix
    >>> R = to_matrix("givens_rotate", {"theta": torch.randn(4, dtype=torch.float64)}, 5)
    >>> R.shape, orthogonality_error(R) < 1e-14
    (torch.Size([5, 5]), True)
    """
    op = "to_matrix"
    _checks.one_of(op, "fn_name", fn_name, _FUNCTIONS)
    d = _checks.positive_int(op, "d", d)
    if not isinstance(params, Mapping):
        _checks.refuse_type(op, "params", "a mapping of arguments", _checks.describe(params))
    tensors = [value for value in params.values() if isinstance(value, Tensor)]
    if not tensors:
        _checks.refuse_type(op, "params", "at least one tensor", f"the arguments {sorted(map(str, params))}")
    like = _checks.tensor(op, "params", tensors[0])
    function = _FUNCTIONS[fn_name]
    try:
        inspect.signature(function).bind(None, **params)
    except TypeError as error:
        _checks.refuse(op, "params", f"the arguments of {fn_name} but x", error)
    eye = torch.eye(d, dtype=like.dtype, device=like.device)
    # Row i of the result is R e_i, a column of R.
    return function(eye, **params).mT
