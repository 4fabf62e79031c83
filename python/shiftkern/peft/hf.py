"""GOFT and ETHER in Hugging Face's ``peft``: the same methods for models that are adapted by ``get_peft_model``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shiftkern import _checks

if TYPE_CHECKING:
    from shiftkern.peft._hf import ETHERPeftConfig, GOFTPeftConfig

__all__ = ["ETHERPeftConfig", "GOFTPeftConfig", "penalty", "register"]


def register() -> None:
    """Make GOFT and ETHER known to ``peft``; a second call changes nothing.

    Then ``GOFTPeftConfig`` and ``ETHERPeftConfig`` of this module, with the fields of :class:`GOFTConfig` and
    :class:`ETHERConfig`, can be given to ``peft.get_peft_model``, and everything works as with peft's own methods:
    ``save_pretrained``, ``PeftModel.from_pretrained``, ``merge_and_unload``, ``disable_adapter``, several adapters.
    Call it before a saved adapter is loaded, too.

    Raises
    ------
    ImportError
        peft is not installed, or too old.
    RuntimeError
        peft has a method of one of these names already.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import hf
    >>> hf.register()
    >>> import peft
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 3))
    >>> model = peft.get_peft_model(model, hf.GOFTPeftConfig(target_modules=["0"]))
    >>> model.get_nb_trainable_parameters()
    (7, 34)
    """
    _implementation().register()


def penalty(model: nn.Module) -> Tensor:
    """Return what :func:`shiftkern.peft.penalty` does, for a model of ``peft``: the penalty of qGOFT.

    Parameters
    ----------
    model : nn.Module
        A model that ``peft.get_peft_model`` gave.

    Returns
    -------
    Tensor
        The sum over layers and active adapters, a scalar; 0 where there is nothing.

    Raises
    ------
    ArgumentError
        A model without layers of GOFT or ETHER.
    ArgumentTypeError
        No module.
    ImportError
        peft is not installed, or too old.
    """
    if not isinstance(model, nn.Module):
        _checks.refuse_type("penalty", "model", "a torch.nn.Module", _checks.describe(model))
    result: Tensor = _implementation().penalty(model)
    return result


def _implementation() -> Any:
    try:
        importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("shiftkern.peft.hf needs Hugging Face's peft: pip install 'shiftkern[peft]'") from error
    return importlib.import_module("shiftkern.peft._hf")


def __getattr__(name: str) -> Any:
    # The configs derive from a class of peft, which is not imported before they are needed.
    if name in __all__:
        return getattr(_implementation(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
