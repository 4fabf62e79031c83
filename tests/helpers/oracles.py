"""Independent float64 forms of every operator, as published: slow, plain, differentiable."""

import math
from itertools import product

import torch
from torch import Tensor


def moments_loop(x: Tensor, dim: int = 1, mask: Tensor | None = None, per_instance: bool = False):
    """Count, mean and M2 by loops over Python floats, two passes with exact sums."""
    x = x.detach().double().movedim(dim, -1)
    instances = x.shape[0] if per_instance else 1
    channels = x.shape[-1]
    positions = list(product(*map(range, x.shape[:-1])))
    count = torch.zeros(instances, 1, dtype=torch.float64)
    mean = torch.zeros(instances, channels, dtype=torch.float64)
    m2 = torch.zeros(instances, channels, dtype=torch.float64)
    for n in range(instances):
        kept = [p for p in positions if (not per_instance or p[0] == n) and (mask is None or bool(mask[p]))]
        count[n] = len(kept)
        rows = [x[p].tolist() for p in kept]
        for c in range(channels):
            values = [row[c] for row in rows]
            if values:
                centre = math.fsum(values) / len(values)
                centre += math.fsum(v - centre for v in values) / len(values)
                mean[n, c] = centre
                m2[n, c] = math.fsum((v - centre) ** 2 for v in values)
    return (count, mean, m2) if per_instance else (count[0, 0], mean[0], m2[0])


def _rest(x: Tensor, first: int) -> list[int]:
    return [d for d in range(x.dim()) if d >= first and d != 1]


def _shape(value: Tensor, x: Tensor) -> Tensor:
    """Reshape (C,) or (N, C) to broadcast with x."""
    lead = (1, *value.shape) if value.dim() == 1 else tuple(value.shape)
    return value.reshape(lead + (1,) * (x.dim() - 2))


def mixed(x, running_mean, running_var, weight=None, bias=None, *, source_weight, eps=1e-5, unbiased=False) -> Tensor:
    x = x.double()
    dims = [0, *range(2, x.dim())]
    count = x.numel() // x.shape[1]
    mean = x.mean(dims)
    var = ((x - _shape(mean, x)) ** 2).sum(dims) / (count - 1 if unbiased else count)
    mean = source_weight * running_mean.double() + (1 - source_weight) * mean
    var = source_weight * running_var.double() + (1 - source_weight) * var
    y = (x - _shape(mean, x)) / torch.sqrt(_shape(var, x) + eps)
    if weight is not None:
        y = y * _shape(weight.double(), x)
    return y if bias is None else y + _shape(bias.double(), x)


def pooled_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double().transpose(0, 1).reshape(x.shape[1], -1)
    return x.mean(1), x.var(1, correction=0)


def instance_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double().reshape(*x.shape[:2], -1)
    mean = x.mean(2)
    return mean, ((x - mean.unsqueeze(2)) ** 2).mean(2)


def assignment(own_mean: Tensor, component_mean: Tensor, temperature: float) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(own_mean.unsqueeze(1), component_mean.double().unsqueeze(0), dim=2)
    return torch.softmax(cosine / temperature, 1)


def unmix(
    x, component_mean, component_var, weight=None, bias=None, *, temperature=0.07, eps=1e-5, cross_term=False
) -> tuple[Tensor, Tensor]:
    """The published form with its B x K x C arrays."""
    x = x.double()
    component_mean, component_var = component_mean.double(), component_var.double()
    own_mean, own_var = instance_statistics(x)
    p = assignment(own_mean, component_mean, temperature).detach()
    q = p.unsqueeze(2)
    own, component = own_mean.unsqueeze(1), component_mean.unsqueeze(0)
    mean_k = (1 - q) * component + q * own
    var_k = (1 - q) * component_var.unsqueeze(0) + q * own_var.unsqueeze(1)
    if cross_term:
        var_k = var_k + q * (1 - q) * (own - component) ** 2
    mean = mean_k.mean(1)
    var = var_k.mean(1) + (mean_k**2).mean(1) - mean**2
    y = (x - _shape(mean, x)) / torch.sqrt(_shape(var, x) + eps)
    if weight is not None:
        y = y * _shape(weight.double(), x)
    return (y if bias is None else y + _shape(bias.double(), x)), p


def style(x, style_mean, style_std, *, threshold=None, eps=1e-5) -> Tensor:
    """Instance by instance."""
    wide = x.double()
    mean, var = instance_statistics(wide)
    std = torch.sqrt(var + eps)
    out = []
    for n in range(x.shape[0]):
        own = torch.cat([mean[n], std[n]])
        others = torch.cat([style_mean.double(), style_std.double()], 1)
        distances = torch.stack([torch.dist(own, other) for other in others])
        nearest = int(distances.detach().argmin())
        if threshold is not None and not distances[nearest] > threshold:
            out.append(wide[n])
            continue
        flat = wide[n].reshape(x.shape[1], -1)
        shifted = (flat - mean[n, :, None]) / std[n, :, None] * style_std[nearest].double()[:, None]
        out.append((shifted + style_mean[nearest].double()[:, None]).reshape(wide[n].shape))
    return torch.stack(out)
