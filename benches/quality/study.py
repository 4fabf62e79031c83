"""What is measured: the same noise, drawn with full attention and with every way to save some of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from quality.model import DiT, FullAttention, Progress, sample
from shiftkern.attention import BlockMask, Reattention, sparse_attention
from shiftkern.demo import digits

#: Side of the blocks of pairs that are computed or skipped.
BLOCK = 8
_BATCH = 20


@dataclass(frozen=True)
class Schedule:
    """When a sample attends to everything: in its first steps, and in every ``refresh_every``-th one after them."""

    steps: int
    full_steps: int
    refresh_every: int = 5

    def is_full(self, step: int) -> bool:
        return step < self.full_steps or (step - self.full_steps) % self.refresh_every == 0


SCHEDULES = (Schedule(20, 5), Schedule(50, 10))
#: Shares of the keys that a query keeps.
KEPT = (0.25, 0.125, 0.0625, 0.03125)


class Scheduled(nn.Module):
    """Full attention in the full steps of a schedule, and something cheaper in the others."""

    def __init__(self, mask: BlockMask, schedule: Schedule):
        super().__init__()
        self.mask, self.schedule = mask, schedule
        self.full = FullAttention()
        self.reset()

    def reset(self) -> None:
        """Begin a new sample."""
        self.step = 0
        self.last: Tensor | None = None

    def cheaper(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        full = self.schedule.is_full(self.step)
        self.step += 1
        if not full:
            return self.cheaper(q, k, v)
        self.last = self.full(q, k, v)
        return self.last


class MaskOnly(Scheduled):
    """Attend to the kept keys as if there were no others."""

    def cheaper(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, self.mask)


class Reuse(Scheduled):
    """Take the output of the last full step, whatever is kept: what sparse attention has to be better than."""

    def cheaper(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.last is not None
        return self.last


#: From a mask and a schedule to the attention of one layer.
Make = Callable[[BlockMask, Schedule], nn.Module]


def _reattention(mode: str, ramp: float = 0.0) -> Make:
    def make(mask: BlockMask, schedule: Schedule) -> nn.Module:
        return Reattention(
            mask, full_steps=schedule.full_steps, refresh_every=schedule.refresh_every, ramp=ramp, mode=mode
        )

    return make


MODES: Mapping[str, Make] = MappingProxyType(
    {
        "reuse": Reuse,
        "sparse": MaskOnly,
        "residual": _reattention("residual"),
        "rho, ramp 0": _reattention("rho"),
        "rho, ramp 0.04": _reattention("rho", ramp=0.04),
        "merge": _reattention("merge"),
    }
)


@dataclass(frozen=True)
class Run:
    """The images (B, 1, side, side) of one mode, and how far they are from full attention's."""

    images: Tensor
    errors: Tensor  # (B,), norm of the difference over the norm of full attention's image
    psnr: float  # of all images together, in dB
    accuracy: float  # of the classifier, in %

    @property
    def error(self) -> float:
        """Mean over images."""
        return self.errors.mean().item()

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return (self.errors.std() / len(self.errors) ** 0.5).item()


@dataclass
class Study:
    """All runs, by mode, schedule and kept share; full attention has no share."""

    labels: Tensor
    masks: dict[float, BlockMask]
    full: dict[Schedule, Run] = field(default_factory=dict)
    runs: dict[tuple[str, Schedule, float], Run] = field(default_factory=dict)
    between_seeds: dict[Schedule, float] = field(default_factory=dict)

    @property
    def modes(self) -> list[str]:
        """In the order of measurement."""
        return list(dict.fromkeys(mode for mode, _, _ in self.runs))

    def work(self, schedule: Schedule, share: float) -> float:
        """Blocks computed over a whole sample, full steps included: share of those of full attention."""
        full = sum(map(schedule.is_full, range(schedule.steps)))
        return (full + (schedule.steps - full) * self.masks[share].block_density) / schedule.steps

    def compare(self, mode: str, other: str, schedule: Schedule, share: float) -> float:
        """Mean difference of two modes' errors, image by image, in standard errors; negative: the first is closer."""
        difference = self.runs[mode, schedule, share].errors - self.runs[other, schedule, share].errors
        spread = difference.std() / len(difference) ** 0.5
        return (difference.mean() / spread).item() if spread > 0 else 0.0


def window(tokens: int, share: float) -> BlockMask:
    """Keep the ``share * tokens`` keys around each query, in raster order."""
    width = round(share * tokens)
    return BlockMask.sliding_window(tokens, tokens, width // 2, (width - 1) // 2, block=BLOCK)


def _draw(model: DiT, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
    """Batch by batch, as one draws prompts: the sampler resets what attention remembers of the last one."""
    batches = zip(labels.split(_BATCH), noise.split(_BATCH), strict=True)
    return torch.cat([sample(model, *batch, steps) for batch in batches])


def _judge(images: Tensor, reference: Tensor, labels: Tensor, classifier: nn.Module) -> Run:
    difference = images - reference
    errors = difference.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    # Images go from -1 to 1: the peak is 2.
    psnr = 10 * torch.log10(4 / difference.square().mean()).item()
    guesses = classifier(((images + 1) / 2).clamp(0, 1)).argmax(1)
    return Run(images, errors, psnr, 100 * (guesses == labels).double().mean().item())


def _between_seeds(images: Tensor, seeds: int) -> float:
    """Mean error of what another seed gives for the same digit."""
    same = images.view(digits.CLASSES, seeds, -1)
    distances = torch.cdist(same, same, compute_mode="donot_use_mm_for_euclid_dist") / same.norm(dim=2, keepdim=True)
    return (distances.sum() / (digits.CLASSES * seeds * (seeds - 1))).item()


@torch.no_grad()
def measure(
    model: DiT,
    classifier: nn.Module,
    *,
    seeds: int,
    schedules: Sequence[Schedule] = SCHEDULES,
    shares: Sequence[float] = KEPT,
    progress: Progress,
) -> Study:
    """Draw every digit from ``seeds`` noises with full attention and with every mode, schedule and kept share."""
    masks = {share: window(model.side**2, share) for share in shares}
    labels = torch.arange(digits.CLASSES).repeat_interleave(seeds)
    noise = torch.randn(len(labels), 1, model.side, model.side, generator=torch.Generator().manual_seed(1))
    study = Study(labels, masks)
    rounds = len(schedules) * len(MODES) * len(masks)
    for schedule in schedules:
        progress(f"{schedule.steps} steps, full", len(study.runs) / rounds)
        model.use(FullAttention)
        reference = _draw(model, labels, noise, schedule.steps)
        study.full[schedule] = _judge(reference, reference, labels, classifier)
        study.between_seeds[schedule] = _between_seeds(reference, seeds)
        for mode, make in MODES.items():
            for share, mask in masks.items():
                progress(f"{schedule.steps} steps, {mode}, {100 * share:g} %", len(study.runs) / rounds)
                model.use(make, mask, schedule)
                images = _draw(model, labels, noise, schedule.steps)
                study.runs[mode, schedule, share] = _judge(images, reference, labels, classifier)
    return study
