"""Branch-Train-MiX: experts of one seed model become one mixture."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern import _checks
from shiftkern._ops import merge as ops
from shiftkern.merge._combine import checked
from shiftkern.merge._states import accept_states, stream_keys

__all__ = ["branch_train_mix"]


def branch_train_mix(
    models: Any, feed_forward: str, width: int, *, router_std: float = 0.02, seed: int = 0
) -> dict[str, Any]:
    r"""Make the state dict of a mixture of experts from copies of one model that were trained apart.

    The feed-forward tensors of model ``k`` become expert ``k`` of their block, each block gets a router with random
    weights, and all other tensors are averaged. The mixture is then to be fine-tuned as a whole.

    Parameters
    ----------
    models : list of dict of str to Tensor or numpy.ndarray
        State dicts of the same names and shapes, finite.
    feed_forward : str
        Regular expression of feed-forward blocks: a tensor belongs to one if its name matches from the start up to a
        dot. ``r"layers\.\d+\.mlp"`` finds ``layers.3.mlp.up.weight`` in the block ``layers.3.mlp``.
    width : int
        Size of the token vectors that routers see, at least 1.
    router_std : float
        Standard deviation of routers' weights, at least 0.
    seed : int
        Seed of routers' weights; those of a block depend on its name, not on other blocks.

    Returns
    -------
    dict of str to Tensor or numpy.ndarray
        In the kind and dtypes of the first model, and in its order, with blocks in the place of their first tensor:
        ``<block>.router.weight`` ``(K, width)``, and ``<block>.experts.<k>.<rest of the name>``, bit for bit as they
        were. Others keep their names: floating ones are averaged, others are those of the first model.

    Raises
    ------
    ArgumentError
        No models, names or shapes that differ, no feed-forward tensors, names that are taken, an option out of range,
        an entry that is not finite.
    ArgumentTypeError
        No state dicts of tensors or of arrays, or both kinds.

    Notes
    -----
    One copy of all tensors. Routing is the model's: a token goes to the experts of the (two) largest
    ``router.weight @ token``.

    References
    ----------
    Sukhbaatar et al.: Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.merge import branch_train_mix
    >>> a = {"0.attention": torch.zeros(2, 2), "0.mlp.up": torch.ones(4, 2)}
    >>> b = {"0.attention": torch.ones(2, 2), "0.mlp.up": torch.zeros(4, 2)}
    >>> mixture = branch_train_mix([a, b], r"\d+\.mlp", width=2)
    >>> {name: tuple(tensor.shape) for name, tensor in mixture.items()}
    {'0.attention': (2, 2), '0.mlp.router.weight': (2, 2), '0.mlp.experts.0.up': (4, 2), '0.mlp.experts.1.up': (4, 2)}
    >>> mixture["0.attention"].unique()
    tensor([0.5000])
    """
    op = "branch_train_mix"
    states = accept_states(
        op, models[0] if isinstance(models, (list, tuple)) and models else {}, models, base_name="models"
    )
    width = _checks.positive_int(op, "width", width)
    router_std = _checks.non_negative(op, "router_std", router_std)
    seed = _checks.seed(op, "seed", seed)
    if not isinstance(feed_forward, str):
        _checks.refuse_type(op, "feed_forward", "a regular expression", _checks.describe(feed_forward))
    try:
        pattern = re.compile(rf"({feed_forward})\.(.+)")
    except re.error as error:
        _checks.refuse(op, "feed_forward", "a regular expression", f"{feed_forward!r}: {error}")

    block_of = {name: found[1] for name in states.base if (found := pattern.fullmatch(name))}
    if not block_of:
        _checks.refuse(op, "feed_forward", "an expression that names of tensors match", repr(feed_forward))
    count = len(states.models)
    averages: dict[str, Tensor] = {}
    for name, first, tensors in states.each():
        # From the first model on, the average of equal tensors is exact. Experts are only looked at.
        average = checked(op, name, ops.linear(first, tensors, [1.0 / count] * count))
        averages[name] = average.to(states.base[name].dtype)

    mixture: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        if name in mixture:
            _checks.refuse(op, "feed_forward", "blocks whose new names are free", f"{name!r} twice")
        mixture[name] = tensor

    for name, first in states.base.items():
        block = block_of.get(name)
        if block is None:
            add(name, averages[name] if name in averages else first.detach().clone())
        elif f"{block}.router.weight" not in mixture:
            generator = torch.Generator().manual_seed(stream_keys(seed, 1, block)[0] % 2**63)
            weights = router_std * torch.randn(count, width, generator=generator)
            add(f"{block}.router.weight", weights.to(first.device, first.dtype if name in averages else torch.float32))
            for k, model in enumerate(states.models):
                for part in (n for n in states.base if block_of.get(n) == block):
                    tensor = model[part].detach().to(states.base[part].dtype, copy=True)
                    add(f"{block}.experts.{k}.{part[len(block) + 1 :]}", tensor)
    if any(isinstance(value, np.ndarray) for value in models[0].values()):
        return {name: tensor.numpy() for name, tensor in mixture.items()}
    return mixture
