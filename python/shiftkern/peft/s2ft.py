"""S2FT (78): some heads and channels trained in full, everything else frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import Adapter, Base, Config, names_of_modules, register
from shiftkern.peft._kinds import Place
from shiftkern.peft._targets import ends_in

__all__ = ["S2FTConfig"]

#: Default of ``target_modules``: the modules of all roles with a share.
_BY_ROLE = "by-role"
_ROLES = ("v", "o", "u", "d")


@register("S2FT")
@dataclass(frozen=True, kw_only=True)
class S2FTConfig(Config):
    """Structured sparse fine-tuning: a dense slab on selected rows or columns of each weight.

    Attention heads are selected in the projections to values (v) and from heads to outputs (o), channels of the
    feed-forward network in its layers up (u) and down (d). On v and u, ``y[S] += D x``, ``D`` ``(|S|, in)``: selected
    outputs. On o and d, ``y += D x[S]``, ``D`` ``(out, |S|)``: selected inputs. Every ``D`` starts at zero. ``S`` is
    drawn anew for each layer, of all heads or channels alike.

    Parameters
    ----------
    v, o, u, d : float
        Shares, in [0, 1], of heads (v, o) or channels (u, d) that are trained; at least one is, where a share is not 0.
    head_dim : int, optional
        Width of a head. None: ``head_dim`` of the ``config`` that transformers' models have, or else its
        ``hidden_size / num_attention_heads``.
    v_modules, o_modules, u_modules, d_modules : sequence of str
        Names of the modules of each role; a module's name is one of them or ends in one, at a dot.
    seed : int, optional
        Of the selection. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. "by-role" is every module of a role whose share is not 0; others must be such modules.
        Linear layers can be adapted.

    Raises
    ------
    ArgumentError
        A number out of range; shares that are all 0; a module without a role, or of one whose share is 0; a width that
        is no multiple of that of a head, or unknown.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    O(|S| in) or O(|S| out) per token and in parameters. The paper permutes heads and channels of the model so that the
    selected ones lie together; that changes nothing in the function of the model and is left out, as rows and columns
    are taken by their indices here. Heads are counted in each projection by itself, so that models whose queries share
    keys and values (grouped-query attention) have fewer of them in v than in o.

    References
    ----------
    Yang et al.: S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import S2FTConfig, inject
    >>> model = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(12, 8), "down_proj": torch.nn.Linear(20, 8)})
    >>> model = inject(model, S2FTConfig(o=0.3, d=0.1, head_dim=4))  # one head of three, two channels of twenty
    >>> [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    [(8, 4), (8, 2)]
    """

    target_modules: str | Sequence[str] = _BY_ROLE
    v: float = 0.0
    o: float = 0.05
    u: float = 0.0
    d: float = 0.05
    head_dim: int | None = None
    v_modules: Sequence[str] = ("v_proj",)
    o_modules: Sequence[str] = ("o_proj",)
    u_modules: Sequence[str] = ("up_proj",)
    d_modules: Sequence[str] = ("down_proj",)
    seed: int | None = 0

    def __post_init__(self) -> None:
        op = "S2FTConfig"
        for role in _ROLES:
            share = _checks.fraction(op, role, getattr(self, role))
            names = names_of_modules(op, f"{role}_modules", getattr(self, f"{role}_modules"))
            self._set(**{role: share, f"{role}_modules": names})
        used = [role for role in _ROLES if getattr(self, role)]
        if not used:
            _checks.refuse(op, "v, o, u, d", "at least one share above 0", "0 for all")
        if self.target_modules == _BY_ROLE:
            self._set(target_modules=tuple(name for role in used for name in getattr(self, f"{role}_modules")))
        if self.head_dim is not None:
            self._set(head_dim=_checks.positive_int(op, "head_dim", self.head_dim))
        super().__post_init__()

    def _role(self, place: Place) -> str:
        role = next((role for role in _ROLES if ends_in(place.name, getattr(self, f"{role}_modules"))), None)
        if role is None:
            names = [name for role in _ROLES for name in getattr(self, f"{role}_modules")]
            _checks.refuse("S2FTConfig", "target_modules", f"modules named {', '.join(names)}", repr(place.name))
        if not getattr(self, role):
            _checks.refuse("S2FTConfig", role, f"a share above 0 for '{place.name}'", 0)
        return role

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module | None:
        heads = [place for place in places if self._role(place) in ("v", "o")]
        if not heads:
            return None
        size = self.head_dim or _head_dim(model)
        if size is None:
            expected = "the width of a head, as the model has no config that tells it"
            _checks.refuse("S2FTConfig", "head_dim", expected, "None")
        return _Heads(size)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        role = self._role(place)
        rows = role in ("v", "u")
        width = place.out_features if rows else place.in_features
        size = shared.size if isinstance(shared, _Heads) and role in ("v", "o") else 1
        if width % size:
            what = "outputs" if rows else "inputs"
            _checks.refuse("S2FTConfig", "head_dim", f"a divisor of the {width} {what} of '{place.name}'", size)
        units = width // size
        count = max(1, round(getattr(self, role) * units))
        chosen = torch.randperm(units, generator=generator)[:count].sort().values
        index = (chosen[:, None] * size + torch.arange(size)).flatten()
        return _S2FT(place, index, rows)


class _Heads(nn.Module):
    """Carries the width of a head from the model to its layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def _head_dim(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    size = getattr(config, "head_dim", None)
    if isinstance(size, int) and size > 0:
        return size
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        return None
    return width // heads


class _S2FT(Adapter):
    activations = ("linear",)

    index: Tensor

    def __init__(self, place: Place, index: Tensor, rows: bool) -> None:
        super().__init__()
        shape = (len(index), place.in_features) if rows else (place.out_features, len(index))
        self.slab = nn.Parameter(torch.zeros(shape))
        self.register_buffer("index", index)
        self.axis = 0 if rows else 1

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_add(self.axis, self.index, self.slab), bias

    def unmerge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_add(self.axis, self.index, self.slab, alpha=-1), bias

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)
        x = x.to(self.slab.dtype)
        if self.axis == 0:
            return y.index_add(-1, self.index, F.linear(x, self.slab).to(y.dtype))
        return y + F.linear(x.index_select(-1, self.index), self.slab).to(y.dtype)
