"""PASTA (194): vectors that are added to special tokens before each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.peft._adapter import WEIGHTED, Adapter, Base, Config, register
from shiftkern.peft._kinds import Place

__all__ = ["PASTAConfig"]


@register("PASTA")
@dataclass(frozen=True, kw_only=True)
class PASTAConfig(Config):
    """Special token adaptation: before layer l, ``h_i + dropout(v_p^l)`` where token i is the p-th special one.

    Special tokens are counted in each sequence, whatever their kind: of ``[CLS] a [SEP] b [SEP]`` with both kinds
    special, they are the first, second and third. Other tokens are left alone. The vectors start as N(0, std^2), so
    that a fresh adapter is not the identity.

    Parameters
    ----------
    tokens : sequence of int
        Ids of the special tokens; the default is [CLS] and [SEP] of BERT.
    vectors : int
        Number of vectors of each layer: how many special tokens a sequence can have.
    std : float
        Spread of the start, >= 0.
    dropout : float
        Chance in [0, 1) to drop a number of what is added, while training.
    width : int, optional
        Size of the layers' input. None: that of the embedding.
    seed : int, optional
        Of the start. None: another one each time.
    target_modules, modules_to_save
        See :class:`Config`. Exactly one ``nn.Embedding``, the one that gets the token ids, and the layers. The default
        is those of BERT in transformers. Name the classifier in ``modules_to_save``.

    Raises
    ------
    ArgumentError
        A number out of range; on injection, no embedding among the targets or several; in use, a sequence with more
        special tokens than vectors, or layers that are called without the embedding having been called.
    ArgumentTypeError
        An argument of a wrong type.

    Notes
    -----
    ``vectors * width`` parameters per layer; it is no change of weights and cannot be merged. The tokens are counted
    in the ids that the embedding gets: embeddings given from outside and generation in steps do not work.

    References
    ----------
    Yang et al.: Parameter-Efficient Tuning with Special Token Adaptation (2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import PASTAConfig, inject, trainable_parameters
    >>> model = torch.nn.Sequential(torch.nn.Embedding(200, 8), torch.nn.Linear(8, 8))
    >>> model = inject(model, PASTAConfig(target_modules=["0", "1"], std=0.5))
    >>> trainable_parameters(model)
    (24, 1696)
    >>> ids = torch.tensor([[101, 7, 102, 8, 102]])
    >>> from shiftkern.peft import disable_adapter
    >>> with disable_adapter(model):
    ...     base = model(ids)
    >>> (model(ids) != base).any(-1).tolist()
    [[True, False, True, False, True]]
    """

    kinds: ClassVar[tuple[str, ...]] = ("block",)

    target_modules: str | Sequence[str] = r"(.*\.)?(embeddings\.word_embeddings|encoder\.layer\.\d+)"
    tokens: Sequence[int] = (101, 102)
    vectors: int = 3
    std: float = 0.02
    dropout: float = 0.1
    width: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        op = "PASTAConfig"
        if isinstance(self.tokens, str) or not isinstance(self.tokens, Sequence):
            _checks.refuse_type(op, "tokens", "a sequence of token ids", _checks.describe(self.tokens))
        tokens = tuple(_checks.integer(op, "tokens", token, 0) for token in self.tokens)
        if not tokens:
            _checks.refuse(op, "tokens", "at least one token id", "none")
        dropout = _checks.fraction(op, "dropout", self.dropout)
        if dropout == 1.0:
            _checks.refuse(op, "dropout", "a number below 1", dropout)
        self._set(
            tokens=tokens,
            vectors=_checks.positive_int(op, "vectors", self.vectors),
            std=_checks.non_negative(op, "std", self.std),
            dropout=dropout,
            width=None if self.width is None else _checks.positive_int(op, "width", self.width),
        )

    def _shared(self, model: nn.Module, places: Sequence[Place], generator: torch.Generator) -> nn.Module:
        embeddings = [place for place in places if place.kind.name == "embedding"]
        if len(embeddings) != 1 or len(places) == 1:
            expected = "one nn.Embedding, that of the token ids, and layers"
            got = f"{len(embeddings)} of them among {', '.join(repr(place.name) for place in places)}"
            _checks.refuse("PASTAConfig", "target_modules", expected, got)
        return _Tokens(self, self.width or embeddings[0].out_features)

    def _make(self, place: Place, generator: torch.Generator, shared: nn.Module | None) -> Adapter:
        assert isinstance(shared, _Tokens)
        return _Reader(shared) if place.kind.name == "embedding" else _PASTA(self, place.name, shared, generator)


class _Tokens(nn.Module):
    """What the embedding's adapter tells those of the layers: which vector each token gets, if any."""

    def __init__(self, config: PASTAConfig, width: int) -> None:
        super().__init__()
        self.tokens = tuple(config.tokens)
        self.vectors = config.vectors
        self.width = width
        # (..., tokens): p for the p-th special token, `vectors` for all others.
        self.which: Tensor | None = None
        self.served: set[str] = set()

    def read(self, ids: Tensor) -> None:
        special = torch.isin(ids, torch.tensor(self.tokens, device=ids.device))
        place = special.long().cumsum(-1) - 1
        most = int(place.max()) + 1 if place.numel() else 0
        if most > self.vectors:
            _checks.refuse("PASTA", "input_ids", f"at most {self.vectors} special tokens in a sequence", most)
        self.which = torch.where(special, place, self.vectors)
        self.served.clear()

    def serve(self, layer: str, x: Tensor) -> Tensor:
        """Return the vector's number for each token of a layer's input."""
        # A second call means that the model was given embeddings and the ids seen last are not its own. Only in a
        # backward pass it is no news: checkpointing computes the layer again.
        known = self.which is not None and (layer not in self.served or torch._C._current_graph_task_id() != -1)
        if self.which is None or not known:
            expected = "token ids that the adapted embedding sees before each pass through the layers"
            _checks.refuse("PASTA", "input_ids", expected, f"none before '{layer}' was called")
        if x.shape != (*self.which.shape, self.width):
            expected = f"ids of shape {tuple(self.which.shape)} and embeddings of size {self.width} to reach '{layer}'"
            _checks.refuse("PASTA", "input_ids", expected, f"an input of shape {tuple(x.shape)}")
        self.served.add(layer)
        return self.which


class _Reader(Adapter):
    """On the embedding: notes where special tokens are."""

    activations = (*WEIGHTED, "block")
    mergeable = False

    def __init__(self, shared: _Tokens) -> None:
        super().__init__()
        self.shared = shared

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        self.shared.read(x)
        return base(x, *args, **kwargs)


class _PASTA(Adapter):
    activations = (*WEIGHTED, "block")
    mergeable = False

    def __init__(self, config: PASTAConfig, name: str, shared: _Tokens, generator: torch.Generator) -> None:
        super().__init__()
        self.shared = shared
        self.name = name
        start = torch.randn(config.vectors, shared.width, generator=generator, dtype=torch.float64)
        self.vectors = nn.Parameter(config.std * start)
        self.dropout = config.dropout

    def transform(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        which = self.shared.serve(self.name, x)
        added = F.dropout(F.embedding(which, F.pad(self.vectors, (0, 0, 0, 1))), self.dropout, self.training)
        return base(x + added.to(x.dtype), *args, **kwargs)
