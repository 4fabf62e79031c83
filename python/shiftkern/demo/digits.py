"""Real data and a small BatchNorm network: scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CLASSES", "Digits", "build_network", "check_seed", "load", "one_thread", "train"]

CLASSES = 10
_TEST = 896  # half of the 1797 images, and a multiple of the default batch size 64


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 16, 16) in [0, 1] and labels (N,), split into a training and a test half."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that torch's generators do not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed}")


def load(seed: int) -> Digits:
    """
    Load, upsample and split the digits.

    Parameters
    ----------
    seed : int
        Decides which images are test images, and their order.

    Returns
    -------
    Digits
        The 8 x 8 images are doubled to 16 x 16, so that blur and rotation move more than a pixel.
    """
    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32).div_(16).unsqueeze(1)
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train_ = order[:_TEST], order[_TEST:]
    return Digits(images[train_], labels[train_], images[test], labels[test])


@contextmanager
def one_thread() -> Iterator[None]:
    """Images this small gain nothing from more threads, and results then do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build_network(seed: int, width: int = 16) -> nn.Sequential:
    """Three blocks of convolution, BatchNorm2d and ReLU, then one linear layer; the global generator is not touched."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *block(1, width),
            nn.MaxPool2d(2),
            *block(width, 2 * width),
            nn.MaxPool2d(2),
            *block(2 * width, 2 * width),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, CLASSES),
        )


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    epochs: int,
    batch_size: int = 64,
    max_lr: float = 1e-2,
    weight_decay: float = 1e-2,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> None:
    """
    Train in place what can be trained, with a penalty if there is one, and leave the network in eval mode.

    The only augmentation is a shift by up to one pixel: the network must not meet the demo's corruptions beforehand.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = len(labels) // batch_size
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=epochs * steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for index in torch.split(order[: steps * batch_size], batch_size):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(network(torch.roll(images[index], shift, (2, 3))), labels[index])
            if penalty is not None:
                loss = loss + penalty(network)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    network.eval()
