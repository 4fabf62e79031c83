"""The collapse monitor against counts by hand."""

import math

import pytest
import torch

from shiftkern.tta import CollapseMonitor


def test_counts_over_batches_and_positions():
    monitor = CollapseMonitor()
    monitor.update(torch.tensor([[0.75, 0.25, 0.0]]))
    dense = torch.tensor([[[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]]])  # one sample, two positions
    monitor.update(dense)
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert monitor.predictions == 3
    assert monitor.mean_entropy == pytest.approx((first + math.log(2)) / 3, rel=1e-7)
    assert monitor.top_class_share == pytest.approx(2 / 3)
    monitor.clear()
    assert math.isnan(monitor.mean_entropy)


def test_uniform_and_collapsed():
    monitor = CollapseMonitor()
    monitor.update(torch.full((10, 4), 0.25))
    assert monitor.mean_entropy == pytest.approx(math.log(4))
    monitor.clear()
    monitor.update(torch.tensor([[0.0, 1.0]]).expand(10, 2))
    assert (monitor.mean_entropy, monitor.top_class_share) == (0.0, 1.0)


def test_state_round_trip_does_not_alias():
    monitor = CollapseMonitor()
    assert monitor.state() == {}
    monitor.update(torch.tensor([[0.5, 0.5]]))
    saved = monitor.state()
    monitor.update(torch.tensor([[0.0, 1.0]]))
    other = CollapseMonitor()
    other.load_state(saved)
    assert (other.predictions, other.top_class_share) == (1, 1.0)
    assert monitor.predictions == 2
    other.load_state({})
    assert other.predictions == 0
