"""Shared by all tests: hypothesis profiles, seeds, markers, and the way to ``tests/helpers``."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from shiftkern import _runtime

# The suite is imported from outside the source tree with --import-mode=importlib, which adds no folder by itself.
sys.path.insert(0, str(Path(__file__).parent))

# A project of its own: test_downstream.py runs its tests.
collect_ignore = ["downstream"]

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
settings.register_profile(
    "fast", max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "ci", max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile("deep", max_examples=600, deadline=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE)
PROFILE = os.environ.get("SHIFTKERN_PROFILE", "ci")
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_device = pytest.mark.skip(reason="no CUDA device")
    shallow = pytest.mark.skip(reason="runs with SHIFTKERN_PROFILE=deep")
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_device)
        if "slow" in item.keywords and PROFILE != "deep":
            item.add_marker(shallow)


@pytest.fixture(autouse=True)
def seed():
    """Seed every generator before each test; the value is there for generators of the test's own."""
    value = 20261120
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  (libraries under test may use the global state)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def _restore_threads():
    chosen = _runtime._chosen
    yield
    _runtime._chosen = chosen


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
