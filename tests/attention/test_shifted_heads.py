"""Shifted keys and values against loops over channels; folded adapters against the two layers they replace."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import shiftkern
from shiftkern.attention.shifted_heads import fold_adapter, shifted_heads


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_loops(x: Tensor, frames: int, shift_div: int, stride: int = 1) -> Tensor:
    """Channel by channel, frame by frame, with heads side by side as channels."""
    rows, heads, n, width = x.shape
    flat = x.transpose(1, 2).reshape(rows, n, heads * width)
    out = torch.empty_like(flat)
    block = heads * width // shift_div
    for row in range(rows):
        t = row % frames
        for c in range(heads * width):
            source = t - stride if c < block else t + stride if c < 2 * block else t
            out[row, :, c] = flat[row + source - t if 0 <= source < frames else row, :, c]
    return out.reshape(rows, n, heads, width).transpose(1, 2)


@given(
    clips=st.integers(1, 2),
    frames=st.integers(1, 5),
    heads=st.integers(1, 5),
    d=st.integers(1, 5),
    shift_div=st.integers(2, 12),
    stride=st.integers(1, 4),
)
@example(clips=2, frames=4, heads=12, d=2, shift_div=12, stride=1)
@example(clips=1, frames=3, heads=3, d=5, shift_div=2, stride=1)
@example(clips=1, frames=3, heads=5, d=4, shift_div=3, stride=2)
def test_equals_loops_over_channels(clips: int, frames: int, heads: int, d: int, shift_div: int, stride: int):
    if heads * d < shift_div:
        return
    k, v = draw(clips * frames, heads, 3, d), draw(clips * frames, heads, 3, 2 * d, seed=1)
    kept = k.clone()
    got = shifted_heads(k, v, frames, shift_div=shift_div, stride=stride)
    assert torch.equal(got[0], by_loops(k, frames, shift_div, stride))
    assert torch.equal(got[1], by_loops(v, frames, shift_div, stride))
    assert torch.equal(k, kept)


def test_by_default_one_head_of_twelve_moves_each_way():
    k = draw(8, 12, 5, 4)
    got, _ = shifted_heads(k, k, 4)
    clips, shifted = k.unflatten(0, (2, 4)), got.unflatten(0, (2, 4))
    assert torch.equal(shifted[:, 1:, 0], clips[:, :-1, 0])
    assert torch.equal(shifted[:, :-1, 1], clips[:, 1:, 1])
    assert torch.equal(shifted[:, 0, 0], clips[:, 0, 0])
    assert torch.equal(shifted[:, -1, 1], clips[:, -1, 1])
    assert torch.equal(shifted[:, :, 2:], clips[:, :, 2:])


def test_a_frame_sees_its_neighbours_of_its_own_clip_only():
    k, v = draw(8, 12, 5, 4), draw(8, 12, 5, 4, seed=1)
    want = shifted_heads(k, v, 4)
    for frame in range(8):
        changed = v.clone()
        changed[frame] = math.nan
        got = shifted_heads(k, changed, 4)[1]
        reached = {i for i in range(8) if bool(got[i].isnan().any())}
        assert reached == {i for i in (frame - 1, frame, frame + 1) if 0 <= i < 8 and i // 4 == frame // 4}
        for i in set(range(8)) - reached:
            assert torch.equal(got[i], want[1][i])


def test_frames_that_are_all_the_same_stay():
    frame = draw(1, 12, 5, 4).expand(6, -1, -1, -1)
    got, _ = shifted_heads(frame, frame, 6)
    assert torch.equal(got, frame)
    # A clip of one frame has no neighbours.
    k = draw(6, 12, 5, 4)
    for frames, stride in ((1, 1), (3, 3), (3, 50)):
        got, _ = shifted_heads(k, k, frames, stride=stride)
        assert torch.equal(got, k)
        assert got.data_ptr() != k.data_ptr()


def test_reversing_time_swaps_the_two_blocks():
    k = draw(5, 4, 3, 2)
    got, _ = shifted_heads(k, k, 5, shift_div=4)
    swapped = k[:, [1, 0, 2, 3]].flip(0)
    back, _ = shifted_heads(swapped, swapped, 5, shift_div=4)
    assert torch.equal(back.flip(0)[:, [1, 0, 2, 3]], got)


@pytest.mark.parametrize("shift_div", [2, 3, 5, 12])
def test_gradcheck(shift_div: int):
    k, v = draw(6, 3, 2, 5).requires_grad_(), draw(6, 3, 2, 4, seed=1).requires_grad_()
    call = lambda k, v: shifted_heads(k, v, 3, shift_div=shift_div)  # noqa: E731
    assert torch.autograd.gradcheck(call, (k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_memory_orders(dtype: torch.dtype):
    k = draw(4, 3, 5, 4, dtype=dtype)
    want = by_loops(k, 4, 3)
    strided = k.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (k, strided, strided.requires_grad_()):
        got, _ = shifted_heads(x, x, 4, shift_div=3)
        assert got.dtype == dtype
        assert torch.equal(got.detach(), want)
    assert shifted_heads(k[:0], k[:0], 4)[0].shape == (0, 3, 5, 4)
    assert shifted_heads(k[:, :, :0], k[:, :, :0], 4)[0].shape == (4, 3, 0, 4)


K = torch.ones(4, 3, 2, 4)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"k": K[0]}, "k", ValueError),
        ({"k": K[:3]}, "k", ValueError),
        ({"k": K.long()}, "k", TypeError),
        ({"k": K.numpy()}, "k", TypeError),
        ({"k": K[:, :2]}, "k", ValueError),
        ({"v": K[..., :3]}, "v", ValueError),
        ({"v": K[:, :, :1]}, "v", ValueError),
        ({"v": K[:2]}, "v", ValueError),
        ({"v": K.double()}, "v", TypeError),
        ({"v": K.to("meta")}, "v", ValueError),
        ({"v": None}, "v", TypeError),
        ({"n_frames": 3}, "k", ValueError),
        ({"n_frames": 0}, "n_frames", ValueError),
        ({"n_frames": 2.0}, "n_frames", TypeError),
        ({"shift_div": 1}, "shift_div", ValueError),
        ({"shift_div": 13}, "k", ValueError),
        ({"shift_div": "12"}, "shift_div", TypeError),
        ({"stride": 0}, "stride", ValueError),
        ({"stride": True}, "stride", TypeError),
    ],
)
def test_errors_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"shifted_heads: argument '{name}': expected .*, got ") as caught:
        shifted_heads(**{"k": K, "v": K, "n_frames": 2, **change})
    assert isinstance(caught.value, shiftkern.ShiftkernError)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("biases", [(), ("bias",), ("down_bias",), ("up_bias",), ("bias", "down_bias", "up_bias")])
@pytest.mark.parametrize("scale", [0.5, -2.0, 0.0])
def test_the_folded_layer_returns_what_both_layers_did(where: str, biases: tuple[str, ...], scale: float):
    features_in, features_out, rank = 5, 7, 2
    n = features_in if where == "before" else features_out
    weight, down, up = draw(features_out, features_in), draw(rank, n, seed=1), draw(n, rank, seed=2)
    sizes = {"bias": features_out, "down_bias": rank, "up_bias": n}
    given = {name: draw(sizes[name], seed=3 + i) if name in biases else None for i, name in enumerate(sizes)}

    def layer(x: Tensor) -> Tensor:
        return F.linear(x, weight, given["bias"])

    def adapter(x: Tensor) -> Tensor:
        return x + scale * F.linear(F.linear(x, down, given["down_bias"]), up, given["up_bias"])

    x = draw(11, features_in, seed=9)
    want = layer(adapter(x)) if where == "before" else adapter(layer(x))
    folded, bias = fold_adapter(weight, down=down, up=up, scale=scale, where=where, **given)
    torch.testing.assert_close(F.linear(x, folded, bias), want, rtol=1e-12, atol=1e-12)
    assert (bias is None) == (not biases)


def test_on_small_whole_numbers_the_equality_is_exact():
    g = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randint(-4, 5, s, generator=g).float() for s in ((6, 4), (2, 4), (4, 2)))
    down_after, up_after = (torch.randint(-4, 5, s, generator=g).float() for s in ((2, 6), (6, 2)))
    bias, inner, outer, x = (torch.randint(-4, 5, s, generator=g).float() for s in ((6,), (2,), (4,), (9, 4)))
    folded = fold_adapter(weight, bias, down, up, down_bias=inner, up_bias=outer)
    want = F.linear(x + 0.5 * F.linear(F.linear(x, down, inner), up, outer), weight, bias)
    assert torch.equal(F.linear(x, *folded), want)
    folded = fold_adapter(weight, bias, down_after, up_after, where="after", down_bias=inner)
    y = F.linear(x, weight, bias)
    assert torch.equal(F.linear(x, *folded), y + 0.5 * F.linear(F.linear(y, down_after, inner), up_after))


def test_a_block_with_adapters_on_both_sides():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6).double()
    sides = [(nn.Linear(6, 2).double(), nn.Linear(2, 6).double()) for _ in range(2)]
    x = draw(3, 6)

    def adapted(x: Tensor, side: int) -> Tensor:
        down, up = sides[side]
        return x + 0.5 * up(down(x))

    want = adapted(layer(adapted(x, 0)), 1)
    weight, bias = layer.weight, layer.bias
    for (down, up), where in zip(sides, ("before", "after"), strict=True):
        weight, bias = fold_adapter(
            weight, bias, down.weight, up.weight, where=where, down_bias=down.bias, up_bias=up.bias
        )
    torch.testing.assert_close(F.linear(x, weight, bias), want, rtol=1e-12, atol=1e-13)


def test_an_adapter_that_starts_at_zero_changes_nothing():
    weight, bias, down = draw(4, 3, dtype=torch.float32), draw(4, dtype=torch.float32), draw(2, 3, dtype=torch.float32)
    folded, moved = fold_adapter(weight, bias, down, torch.zeros(3, 2))
    assert torch.equal(folded, weight)
    assert torch.equal(moved, bias)
    none = fold_adapter(weight, bias, down[:0], torch.zeros(3, 0))
    assert torch.equal(none[0], weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_folding_rounds_once(dtype: torch.dtype):
    weight, bias, down, up = (draw(*s, seed=i, dtype=dtype) for i, s in enumerate(((6, 4), (6,), (2, 4), (4, 2))))
    folded, moved = fold_adapter(weight, bias, down, up, up_bias=up[:, 0])
    wide = fold_adapter(weight.double(), bias.double(), down.double(), up.double(), up_bias=up[:, 0].double())
    assert folded.dtype == moved.dtype == dtype
    assert torch.equal(folded, wide[0].to(dtype))
    assert torch.equal(moved, wide[1].to(dtype))


@pytest.mark.parametrize("where", ["before", "after"])
def test_folding_is_differentiable(where: str):
    n = 3 if where == "before" else 4
    inputs = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(((4, 3), (4,), (2, n), (n, 2), (2,), (n,)))]

    def call(weight: Tensor, bias: Tensor, down: Tensor, up: Tensor, inner: Tensor, outer: Tensor):
        return fold_adapter(weight, bias, down, up, where=where, down_bias=inner, up_bias=outer)

    assert torch.autograd.gradcheck(call, inputs)


W, DOWN, UP = torch.ones(4, 3), torch.ones(2, 3), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("change", "name", "error"),
    [
        ({"weight": W[0]}, "weight", ValueError),
        ({"weight": W.long()}, "weight", TypeError),
        ({"bias": torch.ones(3)}, "bias", ValueError),
        ({"bias": 0.0}, "bias", TypeError),
        ({"down": torch.ones(2, 4)}, "down", ValueError),
        ({"down": DOWN[0]}, "down", ValueError),
        ({"down": DOWN.to("meta")}, "down", ValueError),
        ({"where": "after"}, "down", ValueError),
        ({"up": UP.T}, "up", ValueError),
        ({"up": None}, "up", TypeError),
        ({"scale": math.nan}, "scale", ValueError),
        ({"scale": "1"}, "scale", TypeError),
        ({"where": "inside"}, "where", ValueError),
        ({"where": None}, "where", TypeError),
        ({"down_bias": torch.ones(3)}, "down_bias", ValueError),
        ({"up_bias": torch.ones(2)}, "up_bias", ValueError),
        ({"up_bias": torch.ones(3).bool()}, "up_bias", TypeError),
    ],
)
def test_errors_of_folding_name_operator_and_argument(change: dict, name: str, error: type):
    with pytest.raises(error, match=f"fold_adapter: argument '{name}': expected .*, got "):
        fold_adapter(**{"weight": W, "bias": None, "down": DOWN, "up": UP, **change})
