"""Normalization against the best torch compositions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shiftkern.norm import (
    channel_moments,
    ema_update_,
    mixed_batch_norm,
    mixed_batch_norm_,
    style_shift,
    unmix_norm,
)

from harness import Result, interleave

SIZES = {"in L2": (8, 32, 28, 28), "in L3": (200, 16, 32, 32), "beyond": (64, 64, 56, 56)}


def label(name: str, shape: tuple[int, ...]) -> str:
    return f"{name}: {'x'.join(map(str, shape))} f32"


# --- peers: the same result in torch operations -----------------------------------------------------------------------


def mixed_naive(x: Tensor, rm: Tensor, rv: Tensor, w: Tensor, b: Tensor, weight: float, eps: float = 1e-5) -> Tensor:
    """As published code writes it: one full-size tensor per operation."""
    s = (1, -1, 1, 1)
    mean = weight * rm + (1 - weight) * x.mean((0, 2, 3))
    var = weight * rv + (1 - weight) * x.var((0, 2, 3), unbiased=False)
    return (x - mean.view(s)) / (var.view(s) + eps).sqrt() * w.view(s) + b.view(s)


def mixed_batch(x: Tensor, rm: Tensor, rv: Tensor, w: Tensor, b: Tensor, weight: float, eps: float = 1e-5) -> Tensor:
    """var_mean, then torch's own fused batch_norm."""
    var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
    return F.batch_norm(x, torch.lerp(mean, rm, weight), torch.lerp(var, rv, weight), w, b, False, 0.0, eps)


def mixed_native(x: Tensor, rm: Tensor, rv: Tensor, w: Tensor, b: Tensor, weight: float, eps: float = 1e-5) -> Tensor:
    """Statistics from a training-mode batch_norm's running buffers, then torch's fused batch_norm."""
    mean, var = torch.zeros_like(rm), torch.ones_like(rv)
    torch.batch_norm_update_stats(x, mean, var, 1.0)
    n = x.numel() // x.shape[1]
    var = var * ((n - 1) / n)
    return F.batch_norm(x, torch.lerp(mean, rm, weight), torch.lerp(var, rv, weight), w, b, False, 0.0, eps)


def mixed_inplace(x: Tensor, rm: Tensor, rv: Tensor, w: Tensor, b: Tensor, weight: float, eps: float = 1e-5) -> Tensor:
    """var_mean, then multiply and add in place."""
    var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
    scale = w * torch.rsqrt(torch.lerp(var, rv, weight) + eps)
    shift = b - torch.lerp(mean, rm, weight) * scale
    return x.mul_(scale.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))


def unmix_published(x: Tensor, cm: Tensor, cv: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """The published form, with its B x K x C arrays."""
    im, iv = x.mean((2, 3)), x.var((2, 3), unbiased=False)
    p = (F.normalize(im, dim=1) @ F.normalize(cm, dim=1).T / 0.07).softmax(1).unsqueeze(-1)
    means = (1 - p) * cm + p * im.unsqueeze(1)
    variances = (1 - p) * cv + p * iv.unsqueeze(1)
    mean = means.mean(1)
    var = variances.mean(1) + (means**2).mean(1) - mean**2
    s = (*mean.shape, 1, 1)
    return (x - mean.view(s)) / torch.sqrt(var.view(s) + eps) * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1)


def unmix_gemm(x: Tensor, cm: Tensor, cv: Tensor, w: Tensor, b: Tensor, eps: float = 1e-5) -> Tensor:
    """The best torch form: matrix products instead of B x K x C arrays, one fused multiply-add over x."""
    iv, im = torch.var_mean(x, (2, 3), unbiased=False)
    p = (F.normalize(im, dim=1) @ F.normalize(cm, dim=1).T / 0.07).softmax(1)
    k, q = cm.shape[0], 1 - p
    mean = (q @ cm + im) / k
    squares = q.square() @ cm.square() + 2 * im * ((p * q) @ cm) + im.square() * p.square().sum(1, keepdim=True)
    var = (q @ cv + iv + squares) / k - mean.square()
    scale = w * torch.rsqrt(var + eps)
    return torch.addcmul((b - mean * scale)[:, :, None, None], x, scale[:, :, None, None])


def style_torch(x: Tensor, sm: Tensor, ss: Tensor, eps: float = 1e-5) -> Tensor:
    var, mean = torch.var_mean(x, (2, 3), unbiased=False)
    std = (var + eps).sqrt()
    nearest = torch.cdist(torch.cat([mean, std], 1), torch.cat([sm, ss], 1)).argmin(1)
    scale = ss[nearest] / std
    return torch.addcmul((sm[nearest] - mean * scale)[:, :, None, None], x, scale[:, :, None, None])


# --- the rows ---------------------------------------------------------------------------------------------------------


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    c = shape[1]
    x = torch.randn(shape, generator=generator)
    # Weight 1 and bias 0, so that values stay as they are when a case works in place, again and again.
    return x, (torch.zeros(c), torch.ones(c), torch.ones(c), torch.zeros(c))


@torch.no_grad()
def forward() -> Iterator[Result]:
    """Yield the forward rows at three sizes."""
    for name, shape in SIZES.items():
        x, stats = inputs(shape)
        out, scratch = torch.empty_like(x), x.clone()
        expected = mixed_naive(x, *stats, 0.8)
        for peer in (mixed_batch, mixed_native, lambda *a: mixed_batch_norm(*a[:5], source_weight=a[5])):
            torch.testing.assert_close(peer(x, *stats, 0.8), expected, rtol=1e-4, atol=1e-4)
        # The targets were set against var_mean + batch_norm; update_stats, found later, is a faster peer.
        composed = "torch var_mean + batch_norm"
        targets = {
            "in L2": [],
            "in L3": [("shiftkern", 6.0)],
            "beyond": [("shiftkern", 3.0), ("shiftkern in place", 6.0)],
        }[name]
        asked = [(case, peer, ratio) for case, ratio in targets for peer in (composed, "best")]
        yield Result(
            "mixed_batch_norm",
            label(name, shape),
            interleave(
                {
                    "shiftkern": lambda x=x, s=stats: mixed_batch_norm(x, *s, source_weight=0.8),
                    "shiftkern out=": lambda x=x, s=stats, o=out: mixed_batch_norm(x, *s, source_weight=0.8, out=o),
                    "shiftkern in place": lambda x=scratch, s=stats: mixed_batch_norm_(x, *s, source_weight=0.8),
                    "torch naive": lambda x=x, s=stats: mixed_naive(x, *s, 0.8),
                    "torch var_mean + batch_norm": lambda x=x, s=stats: mixed_batch(x, *s, 0.8),
                    "torch update_stats + batch_norm": lambda x=x, s=stats: mixed_native(x, *s, 0.8),
                    "torch in place": lambda x=scratch, s=stats: mixed_inplace(x, *s, 0.8),
                    "copy into used memory": lambda x=x, o=out: o.copy_(x),
                }
            ),
            ["shiftkern", "shiftkern out=", "shiftkern in place"],
            ["torch naive", "torch var_mean + batch_norm", "torch update_stats + batch_norm", "torch in place"],
            "copy into used memory",
            asked,
        )
        yield Result(
            "channel_moments",
            label(name, shape),
            interleave(
                {
                    "shiftkern": lambda x=x: channel_moments(x),
                    "torch var_mean": lambda x=x: torch.var_mean(x, (0, 2, 3)),
                    "torch update_stats": lambda x=x, s=stats: torch.batch_norm_update_stats(x, s[0], s[1], 0.0),
                    "sum (one read)": lambda x=x: x.sum(),
                }
            ),
            ["shiftkern"],
            ["torch var_mean", "torch update_stats"],
            "sum (one read)",
            [("shiftkern", "torch var_mean", 12.0), ("shiftkern", "best", 12.0)] if name == "beyond" else [],
        )
        components = torch.randn(16, shape[1], generator=torch.Generator().manual_seed(1)), torch.ones(16, shape[1])
        affine = stats[2:]
        torch.testing.assert_close(
            unmix_norm(x, *components, *affine)[0], unmix_published(x, *components, *affine), rtol=1e-3, atol=1e-3
        )
        yield Result(
            "unmix_norm, K=16",
            label(name, shape),
            interleave(
                {
                    "shiftkern": lambda x=x, c=components, a=affine: unmix_norm(x, *c, *a),
                    "torch published form": lambda x=x, c=components, a=affine: unmix_published(x, *c, *a),
                    "torch without B x K x C": lambda x=x, c=components, a=affine: unmix_gemm(x, *c, *a),
                    "copy into used memory": lambda x=x, o=out: o.copy_(x),
                }
            ),
            ["shiftkern"],
            ["torch published form", "torch without B x K x C"],
            "copy into used memory",
            [("shiftkern", "torch published form", 6.0), ("shiftkern", "best", 6.0)] if name == "beyond" else [],
        )
        styles = torch.randn(4, shape[1]), torch.rand(4, shape[1]) + 0.5
        yield Result(
            "style_shift, 4 styles",
            label(name, shape),
            interleave(
                {
                    "shiftkern": lambda x=x, s=styles: style_shift(x, *s),
                    "torch": lambda x=x, s=styles: style_torch(x, *s),
                    "copy into used memory": lambda x=x, o=out: o.copy_(x),
                }
            ),
            ["shiftkern"],
            ["torch"],
            "copy into used memory",
        )


def backward() -> Iterator[Result]:
    """Yield forward and backward together."""
    for name, shape in SIZES.items():
        x, stats = inputs(shape)
        x.requires_grad_()
        affine = tuple(t.clone().requires_grad_() for t in stats[2:])
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        wanted = (x, *affine)

        def ours(x: Tensor = x, s: tuple = stats, a: tuple = affine, g: Tensor = grad, w: tuple = wanted) -> object:
            return torch.autograd.grad(mixed_batch_norm(x, *s[:2], *a, source_weight=0.8), w, g)

        def peer(x: Tensor = x, s: tuple = stats, a: tuple = affine, g: Tensor = grad, w: tuple = wanted) -> object:
            return torch.autograd.grad(mixed_naive(x, *s[:2], *a, 0.8), w, g)

        for a, b in zip(ours(), peer(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        yield Result(
            "mixed_batch_norm, forward + backward",
            label(name, shape),
            interleave({"shiftkern": ours, "torch autograd": peer}),
            ["shiftkern"],
            ["torch autograd"],
        )


@torch.no_grad()
def many_layers() -> Iterator[Result]:
    """Yield the running-statistics update of a deep network, and the price of one call."""
    for name, width, count in (("106 layers of 64 to 2048", None, 106), ("53 tensors of 512x512", 512 * 512, 53)):
        sizes = [width or 64 * 2 ** (i % 6) for i in range(count)]
        tensors, values = [torch.zeros(n) for n in sizes], [torch.ones(n) for n in sizes]
        yield Result(
            "ema_update_",
            name,
            interleave(
                {
                    "shiftkern": lambda t=tensors, v=values: ema_update_(t, v, 0.1),
                    "torch loop": lambda t=tensors, v=values: [a.lerp_(b, 0.1) for a, b in zip(t, v, strict=True)],
                    "torch foreach": lambda t=tensors, v=values: torch._foreach_lerp_(t, v, 0.1),
                }
            ),
            ["shiftkern"],
            ["torch loop", "torch foreach"],
        )
    x, stats = inputs((4, 8, 2, 2))
    yield Result(
        "one call on almost nothing",
        "4x8x2x2 f32",
        interleave(
            {
                "mixed_batch_norm": lambda: mixed_batch_norm(x, *stats, source_weight=0.8),
                "channel_moments": lambda: channel_moments(x),
                "torch var_mean + batch_norm": lambda: mixed_batch(x, *stats, 0.8),
                "torch batch_norm alone": lambda: F.batch_norm(x, *stats),
            }
        ),
        ["mixed_batch_norm", "channel_moments"],
        ["torch var_mean + batch_norm"],
    )


def results() -> Iterator[Result]:
    """Yield every row of this family."""
    yield from forward()
    yield from backward()
    yield from many_layers()
