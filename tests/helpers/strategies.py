"""Hypothesis strategies and examples of tensors, in every memory layout."""

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "offset")

#: Odd tails, ones and zeros in every position, ranks 2 to 5.
SHAPES = (
    (1, 1),
    (5, 3),
    (33, 257),
    (1, 1, 1),
    (2, 3, 7),
    (4, 2, 33),
    (3, 5, 4, 6),
    (2, 65, 3, 3),
    (2, 3, 2, 3, 5),
    (0, 3),
    (2, 0),
    (0, 3, 4),
    (2, 0, 4),
    (2, 3, 0),
    (2, 3, 0, 5),
    (0, 0, 0),
)


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def computing(dtype: torch.dtype) -> torch.dtype:
    """The type in which the kernels compute."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return a tensor equal to ``x`` (but for "expanded", which repeats the first instance) in another layout."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded":
        return x[:1].expand(x.shape) if x.shape[0] else x
    if layout == "offset":
        memory = x.new_full((x.numel() + 1,), float("nan"))
        memory[1:] = x.reshape(-1)
        return memory[1:].view(x.shape)
    return x.contiguous()


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, *, mean: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + mean).to(dtype)


@st.composite
def tensors(
    draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES, empty: bool = True, max_dim: int = 5
) -> Tensor:
    """``(N, C, *spatial)`` with sizes from 0 (or 1) to a few dozen, in any dtype and layout."""
    least = 0 if empty else 1
    dim = draw(st.integers(2, max_dim))
    most = {2: 70, 3: 40, 4: 12, 5: 6}[dim]
    shape = tuple(draw(st.lists(st.integers(least, most), min_size=dim, max_size=dim)))
    x = make(shape, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**16)), mean=draw(st.sampled_from([0, 3, -50])))
    return lay_out(x, draw(st.sampled_from(LAYOUTS)))


def affine(channels: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """running_mean, running_var, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    mean, var, weight, bias = torch.randn((4, channels), generator=generator, dtype=torch.float64).to(dtype)
    return mean, var.square() + 0.3, weight + 1.5, bias
