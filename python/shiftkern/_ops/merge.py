"""Operators of the ``merge`` domain.

All work on task vectors, ``model - base`` in float32 (float64 for float64), tensor by tensor and with all models in one
pass. Next to its result each returns ``bad``: the number of the first model in which it met NaN or an infinity, or -1.

Which entries of a task vector count is told by ``low`` and ``high``, the least and the largest magnitude for each
model, and by ``drop_rate``: entry ``i`` of a model is dropped if draw ``offset + i`` of the Philox stream of its key
is below the rate, so draws do not depend on how tensors are cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._checks import refuse
from shiftkern._crossing import optional_view, threads, type_code, view
from shiftkern._library import define

_KEEP = "float[] low, float[] high, float drop_rate, int[] keys, int offset"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _contiguous(base: Tensor | None, models: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    if not models:
        refuse("merge", "models", "at least one model", "none")
    return None if base is None else base.contiguous(), [m.contiguous() for m in models]


def _bad(number: int | None, like: Tensor) -> Tensor:
    return torch.tensor(-1 if number is None else number, device=like.device)


def _bad_fake(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


def _deltas(base: Tensor | None, models: list[Tensor]) -> Tensor:
    """Task vectors (K, ...)."""
    wide = _wide(models[0].dtype)
    stacked = torch.stack([m.to(wide) for m in models])
    return stacked if base is None else stacked - base.to(wide)


def _by_model(x: Tensor) -> Tensor:
    """One row for each model, also where tensors are scalars or empty."""
    return x.reshape(x.shape[0], x[0].numel())


def _first_bad(deltas: Tensor) -> Tensor:
    finite = _by_model(deltas.isfinite()).all(1)
    return torch.where(finite.all(), -1, finite.int().argmin())


# --- draws ---------------------------------------------------------------------------------------------------------


def philox(key: int, offset: int, count: int, device: torch.device) -> Tensor:
    """Draws number ``offset`` to ``offset + count`` of a Philox-4x32-10 stream: whole numbers below 2**32 as int64."""
    low = 0xFFFF_FFFF
    first = offset // 4
    counter = torch.arange(first, (offset + count + 3) // 4 + 1, device=device)
    x = [counter & low, counter >> 32 & low, torch.zeros_like(counter), torch.zeros_like(counter)]
    keys = [key & low, key >> 32 & low]
    for _ in range(10):
        products = x[0] * 0xD251_1F53, x[2] * 0xCD9E_8D57
        # int64 wraps where a product passes 2**63; its bits are right all the same.
        high = [p >> 32 & low for p in products]
        x = [high[1] ^ x[1] ^ keys[0], products[1] & low, high[0] ^ x[3] ^ keys[1], products[0] & low]
        keys = [keys[0] + 0x9E37_79B9 & low, keys[1] + 0xBB67_AE85 & low]
    return torch.stack(x, 1).flatten()[offset - 4 * first :][:count]


def _kept(
    deltas: Tensor, low: list[float], high: list[float], drop_rate: float, keys: list[int], offset: int
) -> Tensor:
    """Task vectors with 0 for what does not count."""
    kept = []
    limit = round(drop_rate * 2**32)
    for delta, least, most, key in zip(deltas, low, high, keys, strict=True):
        counts = (delta.abs() >= least) & (delta.abs() <= most)
        if drop_rate > 0.0:
            counts &= (philox(key, offset, delta.numel(), delta.device) >= limit).view(delta.shape)
        kept.append(torch.where(counts, delta, 0.0))
    return torch.stack(kept)


def _keep_options(
    low: list[float], high: list[float], drop_rate: float, keys: list[int], offset: int
) -> dict[str, Any]:
    # Keys are 64 bits; torch passes them as signed numbers.
    unsigned = [key % 2**64 for key in keys]
    return {"low": list(low), "high": list(high), "drop_rate": drop_rate, "keys": unsigned, "offset": offset}


# --- weighted sums -------------------------------------------------------------------------------------------------


def _linear_rust(base: Tensor | None, models: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    base, models = _contiguous(base, models)
    out = torch.empty_like(models[0] if base is None else base)
    bad = _native.merge_linear(optional_view(base), list(map(view, models)), list(weights), view(out), threads())
    return out, _bad(bad, out)


def _linear_torch(base: Tensor | None, models: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    deltas = _deltas(base, models)
    combined = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        combined = combined + weight * delta
    out = combined if base is None else base.to(combined.dtype) + combined
    return out.to(models[0].dtype), _first_bad(deltas)


def _like_models(base: Tensor | None, models: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return models[0].new_empty(models[0].shape), _bad_fake(models[0])


linear = define(
    "merge_linear(Tensor? base, Tensor[] models, float[] weights) -> (Tensor out, Tensor bad)",
    rust=_linear_rust,
    torch_ops=_linear_torch,
    fake=_like_models,
)


# --- magnitudes ----------------------------------------------------------------------------------------------------


def _thresholds_rust(bases: list[Tensor], models: list[Tensor], ranks: list[int]) -> tuple[Tensor, Tensor]:
    bases, models = [t.contiguous() for t in bases], [t.contiguous() for t in models]
    if not models or not ranks:
        refuse("merge_thresholds", "models", "at least one model", "none")
    given = list(map(view, bases)) if bases else None
    code = type_code(models[0])
    found, bad = _native.merge_thresholds(given, list(map(view, models)), list(ranks), code, threads())
    return torch.tensor(found, dtype=_wide(models[0].dtype)), _bad(bad, models[0])


def _thresholds_torch(bases: list[Tensor], models: list[Tensor], ranks: list[int]) -> tuple[Tensor, Tensor]:
    tensors = len(models) // len(ranks)
    flat = []
    for k in range(len(ranks)):
        own = models[k * tensors : (k + 1) * tensors]
        origins: list[Tensor | None] = [*bases] or [None] * tensors
        pieces = [_deltas(base, [m])[0] for base, m in zip(origins, own, strict=True)]
        flat.append(torch.cat([p.flatten() for p in pieces]))
    found = [
        delta.new_tensor(torch.inf)
        if rank == 0 or not delta.numel()
        else delta.abs().kthvalue(delta.numel() + 1 - min(rank, delta.numel())).values
        for delta, rank in zip(flat, ranks, strict=True)
    ]
    return torch.stack(found), _first_bad(torch.stack(flat))


thresholds = define(
    "merge_thresholds(Tensor[] bases, Tensor[] models, int[] ranks) -> (Tensor thresholds, Tensor bad)",
    rust=_thresholds_rust,
    torch_ops=_thresholds_torch,
    fake=lambda bases, models, ranks: (
        models[0].new_empty((len(ranks),), dtype=_wide(models[0].dtype)),
        _bad_fake(models[0]),
    ),
)


def _magnitude_sums_rust(base: Tensor | None, models: list[Tensor], *keep: Any) -> tuple[Tensor, Tensor]:
    base, models = _contiguous(base, models)
    options, code = _keep_options(*keep), type_code(models[0])
    sums, bad = _native.merge_magnitude_sums(optional_view(base), list(map(view, models)), options, code, threads())
    return torch.tensor(sums, dtype=torch.float64).view(-1, 2), _bad(bad, models[0])


def _magnitude_sums_torch(base: Tensor | None, models: list[Tensor], *keep: Any) -> tuple[Tensor, Tensor]:
    deltas = _deltas(base, models)
    sums = [_by_model(t.double().abs()).sum(1) for t in (deltas, _kept(deltas, *keep))]
    return torch.stack(sums, 1), _first_bad(deltas)


magnitude_sums = define(
    f"merge_magnitude_sums(Tensor? base, Tensor[] models, {_KEEP}) -> (Tensor sums, Tensor bad)",
    rust=_magnitude_sums_rust,
    torch_ops=_magnitude_sums_torch,
    fake=lambda base, models, *_: (
        models[0].new_empty((len(models), 2), dtype=torch.float64),
        _bad_fake(models[0]),
    ),
)


# --- combinations of task vectors ----------------------------------------------------------------------------------


def _masked_rust(base: Tensor | None, models: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    base, models = _contiguous(base, models)
    keep, (weights, rescale, scale, elect, divide, tie) = options[:5], options[5:]
    combine = {
        "weights": list(weights),
        "rescale": list(rescale),
        "scale": scale,
        "elect": elect,
        "divide": divide,
        "tie": tie,
    }
    out = torch.empty_like(models[0] if base is None else base)
    bad = _native.merge_masked(
        optional_view(base), list(map(view, models)), _keep_options(*keep), combine, view(out), threads()
    )
    return out, _bad(bad, out)


def _masked_torch(base: Tensor | None, models: list[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    keep, (weights, rescale, scale, elect, divide, tie) = options[:5], options[5:]
    deltas = _deltas(base, models)
    kept = _kept(deltas, *keep)
    column = (-1, *(1,) * (deltas.dim() - 1))
    kept = kept * deltas.new_tensor(rescale).view(column)
    weight = deltas.new_tensor(weights).view(column)
    votes = kept * weight if elect == "weighted" else kept
    total = votes.sum(0)
    sign = torch.where(total == 0, tie, total).sign()
    agrees = torch.ones_like(kept) if elect == "none" else ((votes.sign() == sign) & (votes != 0)).to(kept.dtype)
    combined = (weight * kept * agrees).sum(0)
    if divide != "none":
        divisor = (agrees * (weight if divide == "weight" else 1.0)).sum(0)
        combined = combined / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    combined = scale * combined
    out = combined if base is None else base.to(combined.dtype) + combined
    return out.to(models[0].dtype), _first_bad(deltas)


masked = define(
    f"merge_masked(Tensor? base, Tensor[] models, {_KEEP}, float[] weights, float[] rescale, float scale, str elect, "
    "str divide, float tie) -> (Tensor out, Tensor bad)",
    rust=_masked_rust,
    torch_ops=_masked_torch,
    fake=_like_models,
)


# --- gradients of coefficients -------------------------------------------------------------------------------------


def _dots_rust(base: Tensor | None, models: list[Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
    base, models = _contiguous(base, models)
    gradient = gradient.contiguous()
    dots, bad = _native.merge_dots(optional_view(base), list(map(view, models)), view(gradient), threads())
    return torch.tensor(dots, dtype=torch.float64), _bad(bad, gradient)


def _dots_torch(base: Tensor | None, models: list[Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
    deltas = _deltas(base, models)
    return _by_model(deltas.double() * gradient.double()).sum(1), _first_bad(deltas)


dots = define(
    "merge_dots(Tensor? base, Tensor[] models, Tensor gradient) -> (Tensor dots, Tensor bad)",
    rust=_dots_rust,
    torch_ops=_dots_torch,
    fake=lambda base, models, gradient: (
        models[0].new_empty((len(models),), dtype=torch.float64),
        _bad_fake(models[0]),
    ),
)


# --- competition ---------------------------------------------------------------------------------------------------


def _compete_rust(bases: list[Tensor], models: list[Tensor], rank: int, scale: float) -> tuple[list[Tensor], Tensor]:
    bases, models = [t.contiguous() for t in bases], [t.contiguous() for t in models]
    outs = [torch.empty_like(base) for base in bases]
    bad = _native.merge_compete(
        list(map(view, bases)), list(map(view, models)), rank, scale, list(map(view, outs)), threads()
    )
    return outs, _bad(bad, bases[0])


def _compete_torch(bases: list[Tensor], models: list[Tensor], rank: int, scale: float) -> tuple[list[Tensor], Tensor]:
    count = len(models) // len(bases)
    deltas = [_by_model(_deltas(base, models[t :: len(bases)])) for t, base in enumerate(bases)]
    flat = torch.cat(deltas, 1)
    magnitudes = flat.abs()
    if flat.numel():
        least, most = magnitudes.aminmax(dim=1, keepdim=True)
        magnitudes = torch.where(most > least, (magnitudes - least) / (most - least), 0.0)
    scores = ((magnitudes.square() - 1.0) * count).exp() * (flat * flat.sum(0)).tanh()
    weights = torch.zeros_like(scores)
    if rank and flat.numel():
        least = scores.kthvalue(scores.shape[1] + 1 - rank, dim=1, keepdim=True).values
        most = scores.amax(1, keepdim=True)
        ahead = (scores - least).clamp(min=0.0) / (most - least)
        weights = torch.where(most > least, ahead, ((scores >= least) & (scores > 0.0)).to(scores.dtype))
    below = weights.sum(0)
    merged = torch.where(below > 0.0, (weights * flat).sum(0) / below, 0.0)
    parts = torch.split(merged, [base.numel() for base in bases])
    outs = [
        (base.to(part.dtype) + scale * part.view(base.shape)).to(base.dtype).contiguous()
        for base, part in zip(bases, parts, strict=True)
    ]
    return outs, _first_bad(flat)


def _compete_fake(bases: list[Tensor], models: list[Tensor], rank: int, scale: float) -> tuple[list[Tensor], Tensor]:
    return [base.new_empty(base.shape) for base in bases], _bad_fake(bases[0])


compete = define(
    "merge_compete(Tensor[] bases, Tensor[] models, int rank, float scale) -> (Tensor[] outs, Tensor bad)",
    rust=_compete_rust,
    torch_ops=_compete_torch,
    fake=_compete_fake,
)


# --- digits --------------------------------------------------------------------------------------------------------


def _count_digits_rust(base: Tensor, models: list[Tensor], shift: int, prefixes: list[int], counts: Tensor) -> None:
    _native.merge_count_digits(view(base), list(map(view, models)), shift, list(prefixes), view(counts), threads())


def _count_digits_torch(base: Tensor, models: list[Tensor], shift: int, prefixes: list[int], counts: Tensor) -> None:
    for row, delta, prefix in zip(counts, _by_model(_deltas(base, models)), prefixes, strict=True):
        bits = delta.abs().view(torch.int64 if delta.dtype == torch.float64 else torch.int32).long()
        found = bits[bits >> shift >> 16 == prefix] >> shift & 0xFFFF
        row += torch.bincount(found, minlength=1 << 16)


count_digits_ = define(
    "merge_count_digits_(Tensor base, Tensor[] models, int shift, int[] prefixes, Tensor(a!) counts) -> ()",
    rust=_count_digits_rust,
    torch_ops=_count_digits_torch,
    fake=lambda base, models, shift, prefixes, counts: None,
    mutates=(4,),
)


# --- ranks ---------------------------------------------------------------------------------------------------------


def _ranks_rust(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.int64)
    _native.merge_ranks(view(x), x.shape[1], view(out), threads())
    return out


def _ranks_torch(x: Tensor) -> Tensor:
    order = x.abs().argsort(dim=1, stable=True)
    places = torch.arange(x.shape[1], device=x.device).expand_as(order)
    return torch.empty_like(order, memory_format=torch.contiguous_format).scatter_(1, order, places)


ranks = define(
    "merge_ranks(Tensor x) -> Tensor",
    rust=_ranks_rust,
    torch_ops=_ranks_torch,
    fake=lambda x: x.new_empty(x.shape, dtype=torch.int64),
)


def _rank_drop_rust(
    base: Tensor | None,
    models: list[Tensor],
    row: int,
    density: list[float],
    epsilon: list[float],
    rescale: list[float],
    keys: list[int],
    offset: int,
) -> tuple[Tensor, Tensor]:
    base, models = _contiguous(base, models)
    out = _rank_drop_fake(base, models)[0]
    drop = {
        "density": list(density),
        "epsilon": list(epsilon),
        "rescale": list(rescale),
        "keys": [key % 2**64 for key in keys],
        "offset": offset,
    }
    bad = _native.merge_rank_drop(optional_view(base), list(map(view, models)), row, drop, view(out), threads())
    return out, _bad(bad, out)


def _rank_drop_torch(
    base: Tensor | None,
    models: list[Tensor],
    row: int,
    density: list[float],
    epsilon: list[float],
    rescale: list[float],
    keys: list[int],
    offset: int,
) -> tuple[Tensor, Tensor]:
    deltas = _deltas(base, models).contiguous()
    bad = _first_bad(deltas)
    if deltas.numel() == 0:
        return deltas, bad
    # The way from the smallest to the largest, -1/2 to 1/2; a single entry is in the middle.
    steps = (torch.arange(row, dtype=torch.float64, device=deltas.device) - (row - 1) / 2) / max(1, row - 1)
    kept = []
    for delta, share, width, factor, key in zip(deltas, density, epsilon, rescale, keys, strict=True):
        rows = delta.view(-1, row)
        rates = (1.0 - share - width * steps)[_ranks_torch(rows)]
        factors = (1.0 / (1.0 - rates)).to(delta.dtype) if factor == 0.0 else factor
        draws = philox(key, offset, delta.numel(), delta.device).view(rows.shape)
        kept.append(torch.where(draws >= (rates * 2**32).round(), rows * factors, 0.0).view(delta.shape))
    return torch.stack(kept), bad


def _rank_drop_fake(base: Tensor | None, models: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    out = models[0].new_empty((len(models), *models[0].shape), dtype=_wide(models[0].dtype))
    return out, _bad_fake(models[0])


#: Task vectors (K, ...) with 0 for what is dropped, by chances that follow the ranks within rows of ``row`` elements;
#: ``rescale`` is the factor of what is kept, 0 for one by the chance to be kept.
rank_drop = define(
    "merge_rank_drop(Tensor? base, Tensor[] models, int row, float[] density, float[] epsilon, float[] rescale, "
    "int[] keys, int offset) -> (Tensor kept, Tensor bad)",
    rust=_rank_drop_rust,
    torch_ops=_rank_drop_torch,
    fake=_rank_drop_fake,
)


# --- columns -------------------------------------------------------------------------------------------------------


def _column_changes_rust(base: Tensor, models: list[Tensor], by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    base, models = base.contiguous(), [m.contiguous() for m in models]
    sizes, turns, _ = _column_changes_fake(base, models, by_row)
    shape = base.shape[0], base.shape[1], by_row
    bad = _native.merge_column_changes(view(base), list(map(view, models)), shape, view(sizes), view(turns), threads())
    return sizes, turns, _bad(bad, base)


def _column_changes_torch(base: Tensor, models: list[Tensor], by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    matrices = torch.stack([base, *models]).double()
    along = 2 if by_row else 1
    sizes = matrices.norm(dim=along, keepdim=True)
    directions = matrices / sizes.clamp(min=torch.finfo(torch.float64).tiny)
    turns = (directions[1:] - directions[0]).square().sum(along)
    return (sizes[1:] - sizes[0]).abs().squeeze(along), turns, _first_bad(_deltas(base, models))


def _column_changes_fake(base: Tensor, models: list[Tensor], by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = len(models), base.shape[0 if by_row else 1]
    sizes, turns = (base.new_empty(shape, dtype=torch.float64) for _ in range(2))
    return sizes, turns, _bad_fake(base)


#: Of each model and column, or row, of a matrix: how much its length and its direction differ from the base's.
column_changes = define(
    "merge_column_changes(Tensor base, Tensor[] models, bool by_row) -> (Tensor sizes, Tensor turns, Tensor bad)",
    rust=_column_changes_rust,
    torch_ops=_column_changes_torch,
    fake=_column_changes_fake,
)


def _by_columns_rust(
    base: Tensor, models: list[Tensor], weights: Tensor, by_row: bool, scale: float
) -> tuple[Tensor, Tensor]:
    base, models = base.contiguous(), [m.contiguous() for m in models]
    weights, out = weights.contiguous(), torch.empty_like(base)
    shape = base.shape[0], base.shape[1], by_row
    bad = _native.merge_by_columns(
        view(base), list(map(view, models)), shape, view(weights), scale, view(out), threads()
    )
    return out, _bad(bad, base)


def _by_columns_torch(
    base: Tensor, models: list[Tensor], weights: Tensor, by_row: bool, scale: float
) -> tuple[Tensor, Tensor]:
    deltas = _deltas(base, models)
    combined = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        combined = combined + (weight[:, None] if by_row else weight) * delta
    return (base.to(combined.dtype) + scale * combined).to(base.dtype).contiguous(), _first_bad(deltas)


#: Task vectors of matrices, weighted by model and column, or row; weights are of the type of task vectors.
by_columns = define(
    "merge_by_columns(Tensor base, Tensor[] models, Tensor weights, bool by_row, float scale) "
    "-> (Tensor out, Tensor bad)",
    rust=_by_columns_rust,
    torch_ops=_by_columns_torch,
    fake=lambda base, models, *_: (base.new_empty(base.shape), _bad_fake(base)),
)
