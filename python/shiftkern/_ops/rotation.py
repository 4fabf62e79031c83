"""Operators that rotate the rows of a matrix ``x (rows, d)``: pairs of coordinates, blocks, and low-rank updates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shiftkern import _native
from shiftkern._crossing import threads, view
from shiftkern._library import define, without_autocast

#: Blocks wider than this are solved by LAPACK: its blocked elimination is worth more than one call for all.
WIDEST_SOLVE = 128


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- givens -----------------------------------------------------------------------------------------------------------
#
# Pairs of coordinates, stage by stage. `parameters` are angles (n,), whose matrices are rotations, or any matrices
# (n, 2, 2). Rotations are undone on the way back, so that only what came out is kept; other matrices need what went in.


def givens_stages(topology: str, width: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the lower and the upper coordinates of the pairs of each stage, until ``count`` pairs are used up."""
    stage = 0
    while count > 0:
        if topology == "brick":
            lower = torch.arange(stage % 2, width - 1, 2)
            upper = lower + 1
        else:
            stride = 1 << stage
            if topology == "tree":
                lower = torch.arange(0, width - stride, 2 * stride)
            else:
                lower = torch.arange(width - stride)
                lower = lower[(lower // stride) % 2 == 0]
            upper = lower + stride
        yield lower, upper
        count -= lower.numel()
        stage += 1


def _matrices(parameters: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor:
    """The matrix (2, 2) of each pair as it is applied."""
    if parameters.dim() == 1:
        # Sines and cosines in float64: an angle's rounding is the only one.
        angles = parameters.to(torch.float64)
        cosine, sine = angles.cos(), angles.sin()
        matrices = torch.stack([cosine, -sine, sine, cosine], 1).view(-1, 2, 2).to(dtype)
    else:
        matrices = parameters.to(dtype)
    return matrices.mT if transpose else matrices


def _numbered(topology: str, width: int, count: int, ascending: bool) -> list[tuple[Tensor, Tensor, slice]]:
    stages, first = [], 0
    for lower, upper in givens_stages(topology, width, count):
        stages.append((lower, upper, slice(first, first + lower.numel())))
        first += lower.numel()
    return stages if ascending else stages[::-1]


def _apply(x: Tensor, lower: Tensor, upper: Tensor, matrices: Tensor) -> Tensor:
    u, v = x[:, lower], x[:, upper]
    (a, b), (c, d) = (row.unbind(1) for row in matrices.unbind(1))
    return x.index_copy(1, lower, a * u + b * v).index_copy(1, upper, c * u + d * v)


def _givens_fake(x: Tensor, parameters: Tensor, topology: str, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


def _givens_torch(x: Tensor, parameters: Tensor, topology: str, transpose: bool) -> Tensor:
    y = x.to(_wide(x))
    matrices = _matrices(parameters, y.dtype, transpose)
    for lower, upper, span in _numbered(topology, x.shape[1], len(parameters), not transpose):
        y = _apply(y, lower.to(x.device), upper.to(x.device), matrices[span])
    return y.to(x.dtype).clone(memory_format=torch.contiguous_format)


def _givens_rust(x: Tensor, parameters: Tensor, topology: str, transpose: bool) -> Tensor:
    y = _givens_fake(x, parameters, topology, transpose)
    if x.numel() > 0:
        x, parameters = x.contiguous(), parameters.contiguous()
        options = topology, parameters.dim() == 3, transpose
        _native.givens(view(x), view(parameters), x.shape[1], options, view(y), threads())
    return y


def _givens_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parameters, ctx.topology, ctx.transpose = inputs
    ctx.save_for_backward(output if parameters.dim() == 1 else x, parameters)


def _givens_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kept, parameters = ctx.saved_tensors
    return (*givens_backward(grad, kept, parameters, ctx.topology, ctx.transpose), None, None)


givens = define(
    "givens(Tensor x, Tensor parameters, str topology, bool transpose) -> Tensor",
    rust=_givens_rust,
    torch_ops=_givens_torch,
    fake=_givens_fake,
    setup_context=_givens_context,
    backward=_givens_gradient,
)


def _givens_backward_fake(
    grad: Tensor, kept: Tensor, parameters: Tensor, topology: str, transpose: bool
) -> tuple[Tensor, Tensor]:
    return kept.new_empty(kept.shape), parameters.new_empty(parameters.shape)


def _givens_backward_torch(
    grad: Tensor, kept: Tensor, parameters: Tensor, topology: str, transpose: bool
) -> tuple[Tensor, Tensor]:
    g, state = grad.to(_wide(kept)), kept.to(_wide(kept))
    matrices = _matrices(parameters, g.dtype, transpose)
    stages = [
        (lower.to(kept.device), upper.to(kept.device), span)
        for lower, upper, span in _numbered(topology, kept.shape[1], len(parameters), not transpose)
    ]
    angles = parameters.dim() == 1
    inputs = []
    if not angles:
        for lower, upper, span in stages:
            inputs.append((state[:, lower], state[:, upper]))
            state = _apply(state, lower, upper, matrices[span])
    by_parameters = torch.empty(parameters.shape, dtype=torch.float64, device=kept.device)
    for lower, upper, span in reversed(stages):
        gp, gq = (g[:, i].to(torch.float64) for i in (lower, upper))
        if angles:
            p, q = state[:, lower], state[:, upper]
            turn = (gq * p - gp * q).sum(0)
            by_parameters[span] = -turn if transpose else turn
            state = _apply(state, lower, upper, matrices[span].mT)
        else:
            u, v = inputs.pop()
            sums = torch.stack([(a * b).sum(0) for a in (gp, gq) for b in (u, v)], 1).view(-1, 2, 2)
            by_parameters[span] = sums.mT if transpose else sums
        g = _apply(g, lower, upper, matrices[span].mT)
    return g.to(kept.dtype).clone(memory_format=torch.contiguous_format), by_parameters.to(parameters.dtype)


def _givens_backward_rust(
    grad: Tensor, kept: Tensor, parameters: Tensor, topology: str, transpose: bool
) -> tuple[Tensor, Tensor]:
    by_x, by_parameters = _givens_backward_fake(grad, kept, parameters, topology, transpose)
    if kept.numel() == 0:
        return by_x, by_parameters.zero_()
    grad, kept, parameters = grad.contiguous(), kept.contiguous(), parameters.contiguous()
    options = topology, parameters.dim() == 3, transpose
    _native.givens_backward(
        (view(grad), view(kept), view(parameters)), kept.shape[1], options, (view(by_x), view(by_parameters)), threads()
    )
    return by_x, by_parameters


givens_backward = define(
    "givens_backward(Tensor grad, Tensor kept, Tensor parameters, str topology, bool transpose) "
    "-> (Tensor grad_x, Tensor grad_parameters)",
    rust=_givens_backward_rust,
    torch_ops=_givens_backward_torch,
    fake=_givens_backward_fake,
)


# --- block_rotate -----------------------------------------------------------------------------------------------------
#
# Products with blocks (factors, d / b, b, b). Factor i joins units of b / 2 coordinates, w with w + 2^i.


def _grouped(x: Tensor, factor: int, block: int) -> Tensor:
    """The rows as (rows, d / b, b): the coordinates of a block side by side."""
    rows, width = x.shape
    if factor == 0:
        return x.view(rows, width // block, block)
    near, half = 1 << factor, block // 2
    units = x.view(rows, width // (2 * near * half), 2, near, half).transpose(2, 3)
    return units.reshape(rows, width // block, block)


def _ungrouped(x: Tensor, factor: int, block: int) -> Tensor:
    rows, width = x.shape[0], x.shape[1] * block
    if factor > 0:
        near, half = 1 << factor, block // 2
        x = x.reshape(rows, width // (2 * near * half), near, 2, half).transpose(2, 3)
    return x.reshape(rows, width)


def _times(x: Tensor, matrices: Tensor, factor: int) -> Tensor:
    """Multiply each block of each row by its matrix."""
    block = matrices.shape[-1]
    grouped = _grouped(x.contiguous(), factor, block).transpose(0, 1)
    return _ungrouped((grouped @ matrices.mT).transpose(0, 1), factor, block)


def _block_fake(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


def _block_torch(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
    y = x.to(_wide(x))
    blocks = blocks.to(y.dtype)
    order = range(len(blocks))
    for factor in reversed(order) if transpose else order:
        y = _times(y, blocks[factor].mT if transpose else blocks[factor], factor)
    return y.to(x.dtype).clone(memory_format=torch.contiguous_format)


def _block_rust(x: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
    y = _block_fake(x, blocks, transpose)
    if x.numel() > 0:
        x, blocks = x.contiguous(), blocks.contiguous()
        sizes = x.shape[1], blocks.shape[3], blocks.shape[0]
        _native.block_rotate(view(x), view(blocks), sizes, transpose, view(y), threads())
    return y


def _block_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, blocks, ctx.transpose = inputs
    ctx.save_for_backward(x, blocks)


def _block_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, blocks = ctx.saved_tensors
    return (*block_rotate_backward(grad, x, blocks, ctx.transpose), None)


block_rotate = define(
    "block_rotate(Tensor x, Tensor blocks, bool transpose) -> Tensor",
    rust=_block_rust,
    torch_ops=_block_torch,
    fake=_block_fake,
    setup_context=_block_context,
    backward=_block_gradient,
)


def _block_backward_fake(grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), blocks.new_empty(blocks.shape)


def _block_backward_torch(grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    g, state = grad.to(_wide(x)), x.to(_wide(x))
    wide = blocks.to(g.dtype)
    block = blocks.shape[3]
    order = list(range(len(blocks)))
    if transpose:
        order.reverse()
    inputs = []
    for factor in order:
        inputs.append(state)
        state = _times(state, wide[factor].mT if transpose else wide[factor], factor)
    by_blocks = torch.empty_like(wide)
    for factor in reversed(order):
        g_blocks, x_blocks = (_grouped(t.contiguous(), factor, block).transpose(0, 1) for t in (g, inputs.pop()))
        outer = g_blocks.mT @ x_blocks
        by_blocks[factor] = outer.mT if transpose else outer
        g = _times(g, wide[factor] if transpose else wide[factor].mT, factor)
    return g.to(x.dtype).clone(memory_format=torch.contiguous_format), by_blocks.to(blocks.dtype)


def _block_backward_rust(grad: Tensor, x: Tensor, blocks: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    by_x, by_blocks = _block_backward_fake(grad, x, blocks, transpose)
    if x.numel() == 0:
        return by_x, by_blocks.zero_()
    grad, x, blocks = grad.contiguous(), x.contiguous(), blocks.contiguous()
    sizes = x.shape[1], blocks.shape[3], blocks.shape[0]
    _native.block_rotate_backward(
        (view(grad), view(x), view(blocks)), sizes, transpose, (view(by_x), view(by_blocks)), threads()
    )
    return by_x, by_blocks


block_rotate_backward = define(
    "block_rotate_backward(Tensor grad, Tensor x, Tensor blocks, bool transpose) "
    "-> (Tensor grad_x, Tensor grad_blocks)",
    rust=_block_backward_rust,
    torch_ops=_block_backward_torch,
    fake=_block_backward_fake,
)


# --- low_rank_rotate --------------------------------------------------------------------------------------------------
#
# y = x + U^T T U x for each of n blocks of coordinates, U (n, r, d / n) and T (n, r, r): every product of reflections.


def _low_rank_fake(x: Tensor, directions: Tensor, core: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _low_rank_torch(x: Tensor, directions: Tensor, core: Tensor) -> Tensor:
    wide, u, t = x.to(_wide(x)), directions.to(_wide(x)), core.to(_wide(x))
    blocked = wide.reshape(len(x), len(u), u.shape[2]).transpose(0, 1)
    y = blocked + blocked @ u.mT @ t.mT @ u
    return y.transpose(0, 1).reshape(x.shape).to(x.dtype).contiguous()


def _low_rank_sizes(x: Tensor, directions: Tensor) -> tuple[int, int, int]:
    return x.shape[1], directions.shape[0], directions.shape[1]


def _low_rank_rust(x: Tensor, directions: Tensor, core: Tensor) -> Tensor:
    y = _low_rank_fake(x, directions, core)
    if x.numel() > 0:
        x, directions, core = x.contiguous(), directions.contiguous(), core.contiguous()
        sizes = _low_rank_sizes(x, directions)
        _native.low_rank_rotate(view(x), view(directions), view(core), sizes, view(y), threads())
    return y


def _low_rank_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _low_rank_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = low_rank_rotate_backward(grad, *ctx.saved_tensors)
    return result


low_rank_rotate = define(
    "low_rank_rotate(Tensor x, Tensor directions, Tensor core) -> Tensor",
    rust=_low_rank_rust,
    torch_ops=_low_rank_torch,
    fake=_low_rank_fake,
    setup_context=_low_rank_context,
    backward=_low_rank_gradient,
)


def _low_rank_backward_fake(grad: Tensor, x: Tensor, directions: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), directions.new_empty(directions.shape), core.new_empty(core.shape)


def _low_rank_backward_torch(
    grad: Tensor, x: Tensor, directions: Tensor, core: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    u, t = directions.to(_wide(x)), core.to(_wide(x))
    g, blocked = (a.to(_wide(x)).reshape(len(x), len(u), u.shape[2]).transpose(0, 1) for a in (grad, x))
    p = blocked @ u.mT
    q, by_q = p @ t.mT, g @ u.mT
    by_p = by_q @ t
    by_x = (g + by_p @ u).transpose(0, 1).reshape(x.shape).to(x.dtype).contiguous()
    by_u = q.mT @ g + by_p.mT @ blocked
    return by_x, by_u.to(directions.dtype), (by_q.mT @ p).to(core.dtype)


def _low_rank_backward_rust(grad: Tensor, x: Tensor, directions: Tensor, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_x, by_directions, by_core = _low_rank_backward_fake(grad, x, directions, core)
    if x.numel() == 0:
        return by_x, by_directions.zero_(), by_core.zero_()
    grad, x, directions, core = (t.contiguous() for t in (grad, x, directions, core))
    _native.low_rank_rotate_backward(
        (view(grad), view(x), view(directions), view(core)),
        _low_rank_sizes(x, directions),
        (view(by_x), view(by_directions), view(by_core)),
        threads(),
    )
    return by_x, by_directions, by_core


low_rank_rotate_backward = define(
    "low_rank_rotate_backward(Tensor grad, Tensor x, Tensor directions, Tensor core) "
    "-> (Tensor grad_x, Tensor grad_directions, Tensor grad_core)",
    rust=_low_rank_backward_rust,
    torch_ops=_low_rank_backward_torch,
    fake=_low_rank_backward_fake,
)


# --- cayley -----------------------------------------------------------------------------------------------------------
#
# R = (I + Q)(I - Q)^-1 for n matrices Q = upper - upper^T, each given by its strict upper triangle by rows.


def skew_matrices(skew: Tensor, block: int) -> Tensor:
    """``(..., b (b - 1) / 2)`` to ``(..., b, b)``: the strict upper triangles by rows, less their transposes."""
    rows, columns = torch.triu_indices(block, block, 1, device=skew.device)
    upper = skew.new_zeros(*skew.shape[:-1], block, block)
    upper[..., rows, columns] = skew
    return upper - upper.mT


def _cayley_fake(skew: Tensor, block: int) -> Tensor:
    return skew.new_empty((skew.shape[0], block, block))


def _cayley_torch(skew: Tensor, block: int) -> Tensor:
    if skew.shape[0] * block == 0:
        return _cayley_fake(skew, block)
    q = skew_matrices(skew.to(torch.float64), block)
    eye = torch.eye(block, dtype=q.dtype, device=q.device)
    # Both factors are functions of Q and commute, so that (I - Q) R = I + Q has the same solution.
    rotations: Tensor = torch.linalg.solve(eye - q, eye + q)
    return rotations.to(skew.dtype).contiguous()


def _cayley_rust(skew: Tensor, block: int) -> Tensor:
    if block > WIDEST_SOLVE:
        return _cayley_torch(skew, block)
    rotations = _cayley_fake(skew, block)
    if rotations.numel() > 0:
        skew = skew.contiguous()
        _native.cayley(view(skew), block, view(rotations), threads())
    return rotations


def _cayley_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _cayley_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (rotations,) = ctx.saved_tensors
    wide = torch.promote_types(rotations.dtype, torch.float32)
    r, g = rotations.to(wide), grad.to(wide)
    # dR = (I + R) dQ (I - Q)^-1, and (I - Q)^-1 = (I + R) / 2.
    one_more = r + torch.eye(r.shape[-1], dtype=wide, device=r.device)
    with without_autocast(r.device):
        by_q = 0.5 * (one_more.mT @ g @ one_more.mT)
    by_upper = by_q - by_q.mT
    rows, columns = torch.triu_indices(r.shape[-1], r.shape[-1], 1, device=r.device)
    return by_upper[:, rows, columns].to(rotations.dtype), None


cayley = define(
    "cayley(Tensor skew, int block) -> Tensor",
    rust=_cayley_rust,
    torch_ops=_cayley_torch,
    fake=_cayley_fake,
    setup_context=_cayley_context,
    backward=_cayley_gradient,
)
