"""The study of image quality runs and measures what it says, on an untrained model of 64 tokens."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benches"))

from quality import report
from quality.model import Config, DiT, sample, trained
from quality.study import MODES, Schedule, measure, window

CONFIG = Config(side=8, width=16, depth=2, heads=2, train_steps=2, batch_size=4)
SCHEDULES = (Schedule(7, 2, refresh_every=3), Schedule(6, 3))
SHARES = (0.25, 0.125)


def untrained() -> DiT:
    """Random weights everywhere: fresh ones would close every gate, and attention would not matter."""
    model = DiT(CONFIG).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weights in model.parameters():
        weights.normal_(0.0, 0.3, generator=generator)
    return model


def measured(shares=SHARES, schedules=SCHEDULES):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return measure(
        untrained(), classifier, seeds=2, schedules=schedules, shares=shares, progress=lambda message, share: None
    )


@pytest.fixture(scope="module")
def study():
    return measured()


def test_full_attention_is_where_errors_are_measured_from(study):
    for run in study.full.values():
        assert torch.equal(run.errors, torch.zeros(20))
        assert run.psnr == math.inf


def test_every_mode_is_measured_in_every_setting(study):
    assert list(study.runs) == [(m, schedule, share) for schedule in SCHEDULES for m in MODES for share in SHARES]
    for run in study.runs.values():
        assert run.images.isfinite().all()
        assert (run.errors > 0).all()
        assert math.isfinite(run.psnr)
        assert 0 <= run.accuracy <= 100
    errors = {(mode, run.error) for (mode, _, _), run in study.runs.items()}
    # What is kept is nothing to the mode that reuses everything.
    assert len(errors) == len(study.runs) - len(SCHEDULES)


def test_errors_are_relative_to_full_attention(study):
    (_, schedule, _), run = next(iter(study.runs.items()))
    reference = study.full[schedule].images.double().flatten(1)
    difference = run.images.double().flatten(1) - reference
    expected = difference.square().sum(1).sqrt() / reference.square().sum(1).sqrt()
    torch.testing.assert_close(run.errors.double(), expected, rtol=1e-5, atol=0)
    assert run.psnr == pytest.approx(10 * math.log10(4 / difference.square().mean().item()), rel=1e-5)
    assert run.standard_error == pytest.approx(expected.std().item() / math.sqrt(20), rel=1e-4)


def test_a_study_repeats(study):
    again = measured()
    assert all(torch.equal(run.images, again.runs[key].images) for key, run in study.runs.items())


def test_a_window_over_everything_changes_nothing():
    # Twice the tokens: the window reaches every key from every query.
    wide = measured(shares=(2.0,), schedules=SCHEDULES[:1])
    assert wide.masks[2.0].density == wide.masks[2.0].block_density == 1
    errors = {mode: run.error for (mode, _, _), run in wide.runs.items()}
    assert errors.pop("reuse") > 1e-3
    # With everything kept rho is 1, and a ramp takes it above.
    assert errors.pop("rho, ramp 0.04") > 1e-3
    assert all(error < 1e-4 for error in errors.values()), errors


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", [Schedule(20, 5), Schedule(12, 2, refresh_every=3)], ids=str)
def test_every_mode_is_full_when_the_schedule_says_so(mode, schedule, generator):
    attend = MODES[mode](window(64, 0.25), schedule)
    for _ in range(2):
        attend.reset()
        for step in range(schedule.steps):
            q, k, v = torch.randn(3, 2, 2, 64, 8, generator=generator)
            near = torch.allclose(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5)
            assert near == schedule.is_full(step), step


def test_the_window_keeps_the_share_away_from_the_edges():
    kept = window(64, 0.125).to_dense()[0, 0]
    assert (kept.sum(1)[8:-8] == 8).all()
    assert kept.diagonal().all()
    assert window(64, 0.125).density == kept.double().mean()


class Knowing:
    """Predicts the velocity towards known images."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def reset(self) -> None:
        pass

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        signal, spread = (
            torch.cos(t * math.pi / 2)[:, None, None, None],
            torch.sin(t * math.pi / 2)[:, None, None, None],
        )
        noise = (x - signal * self.images) / spread
        return signal * noise - spread * self.images


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_sampler_arrives_where_an_exact_model_leads(steps, generator):
    images = torch.rand(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sample(Knowing(images), torch.arange(3), noise, steps), images, rtol=0, atol=1e-6)


def test_the_sampler_forgets_the_last_sample(generator):
    model, labels = untrained(), torch.arange(3)
    model.use(MODES["rho, ramp 0.04"], window(64, 0.125), Schedule(6, 1))
    noise, other = torch.randn(2, 3, 1, 8, 8, generator=generator)
    first = sample(model, labels, noise, 6)
    sample(model, labels, other, 4)
    assert torch.equal(sample(model, labels, noise, 6), first)


def test_weights_are_trained_once(tmp_path, generator):
    images, labels = torch.rand(6, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(6)
    told = []
    first = trained(CONFIG, images, labels, tmp_path / "cache", lambda message, share: told.append(message))
    assert len(told) == 1
    again = trained(CONFIG, images, labels, tmp_path / "cache", lambda message, share: pytest.fail("trained again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.unembed.weight, torch.zeros_like(first.unembed.weight))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_page_and_its_pictures_are_written(study, tmp_path):
    page = tmp_path / "docs" / "quality-reattention.md"
    report.write(page, study, CONFIG, 0.5)
    text = page.read_text()
    for mode in ("full", *MODES):
        assert text.count(f"| {mode} |") == 3 * len(SCHEDULES)
    for picture in ("quality-reattention.png", "quality-reattention-samples.png"):
        assert f"(images/{picture})" in text
        assert (page.parent / "images" / picture).read_bytes().startswith(b"\x89PNG\r\n")
    for run in study.runs.values():
        assert f"{100 * run.error:.2f} ± {100 * run.standard_error:.2f}" in text


def test_comparisons_are_computed_from_the_errors(study):
    for schedule in SCHEDULES:
        for share in SHARES:
            forth, back = (study.compare(*pair, schedule, share) for pair in (("sparse", "merge"), ("merge", "sparse")))
            assert forth == -back
            sign = study.runs["sparse", schedule, share].error - study.runs["merge", schedule, share].error
            assert forth * sign > 0
