"""A small diffusion transformer that draws digits: the network, its training and a deterministic sampler.

Its tokens are the pixels, so that a 16 x 16 image has 256. Every block calls its module ``attend(q, k, v)``, and an
attention method is tried by putting another module there; nothing else of the model knows of it.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftkern.demo import digits

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Config:
    """What decides the trained weights."""

    side: int = 16
    width: int = 96
    depth: int = 4
    heads: int = 4
    train_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 2e-3
    ema_decay: float = 0.998
    seed: int = 0


class FullAttention(nn.Module):
    """Dense attention, from which everything else is measured."""

    def reset(self) -> None:
        """Begin a new sample: nothing to forget."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def _waves(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions (N,) at ``width / 2`` frequencies from 1 to 1/10000, as (N, width)."""
    rates = torch.exp(torch.linspace(0, -math.log(1e4), width // 2))
    angles = positions[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates start closed (adaLN-Zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attend: nn.Module = FullAttention()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=1)
        qkv = self.qkv(_modulate(self.norm(x), shift_a, scale_a))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = self.attend(q, k, v)
        x = x + gate_a[:, None] * self.project(heads.transpose(1, 2).flatten(2))
        return x + gate_m[:, None] * self.mlp(_modulate(self.norm(x), shift_m, scale_m))


class DiT(nn.Module):
    """From noisy images (B, 1, side, side), times (B,) in [0, 1] and classes (B,) to the velocity of the diffusion."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.width
        self.side = config.side
        self.embed = nn.Linear(1, width)
        place = torch.arange(config.side, dtype=torch.float32)
        rows, columns = torch.meshgrid(place, place, indexing="ij")
        half = width // 2
        self.register_buffer("places", torch.cat([_waves(rows.flatten(), half), _waves(columns.flatten(), half)], 1))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(digits.CLASSES, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.unembed = nn.Linear(width, 1)
        for layer in (self.modulation, self.unembed):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        condition = F.silu(self.time(_waves(1000 * t, self.label.embedding_dim)) + self.label(labels))
        h = self.embed(x.flatten(1)[:, :, None]) + self.places
        for block in self.blocks:
            h = block(h, condition)
        h = _modulate(self.norm(h), *self.modulation(condition).chunk(2, dim=1))
        return self.unembed(h).view_as(x)

    def use(self, make: Callable[..., nn.Module], *args: Any) -> None:
        """Give every block a module ``make(*args)`` of its own as attention: what it remembers belongs to one block."""
        for block in self.blocks:
            block.attend = make(*args)

    def reset(self) -> None:
        """Begin a new sample: what was remembered of the last one does not fit it."""
        for block in self.blocks:
            block.attend.reset()


def _schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """How much image and how much noise there is at time ``t``: the cosine schedule, from image (0) to noise (1)."""
    angle = (t * (math.pi / 2)).view(-1, 1, 1, 1)
    return angle.cos(), angle.sin()


def train(config: Config, images: Tensor, labels: Tensor, progress: Progress) -> DiT:
    """Train on images in [-1, 1] and return the running average of the weights."""
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = DiT(config)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.train_steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(config.train_steps):
        chosen = torch.randint(len(images), (config.batch_size,), generator=generator)
        clean, noise = images[chosen], torch.randn(images[chosen].shape, generator=generator)
        # One time from each of equal slices of [0, 1]: the loss varies less between steps than with independent ones.
        t = (torch.arange(config.batch_size) + torch.rand(config.batch_size, generator=generator)) / config.batch_size
        signal, spread = _schedule(t)
        velocity = signal * noise - spread * clean
        loss = F.mse_loss(model(signal * clean + spread * noise, t, labels[chosen]), velocity)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # The first steps would otherwise weigh in for long.
        share = 1 - min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, share)
        if step % 100 == 0:
            progress(f"training: loss {loss.item():.3f}", step / config.train_steps)
    return average.eval()


def trained(config: Config, images: Tensor, labels: Tensor, cache: Path, progress: Progress) -> DiT:
    """Load the weights of this configuration from ``cache``, or train and store them there."""
    path = cache / f"digits-{hashlib.sha256(repr(config).encode()).hexdigest()[:12]}.npz"
    if not path.exists():
        model = train(config, images, labels, progress)
        cache.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        np.savez(draft, **{name: value.numpy() for name, value in model.state_dict().items()})
        draft.rename(path)
    model = DiT(config).requires_grad_(False).eval()
    with np.load(path) as stored:
        model.load_state_dict({name: torch.from_numpy(stored[name]) for name in stored.files})
    return model


@torch.no_grad()
def sample(model: DiT, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Deterministic DDIM from ``noise`` (B, 1, side, side) to images in about [-1, 1], in ``steps`` equal steps."""
    model.reset()
    x = noise
    times = torch.linspace(1, 0, steps + 1)
    for now, after in pairwise(times):
        velocity = model(x, now.expand(len(x)), labels)
        signal, spread = _schedule(now)
        image, residue = signal * x - spread * velocity, spread * x + signal * velocity
        signal, spread = _schedule(after)
        x = signal * image + spread * residue
    return x
