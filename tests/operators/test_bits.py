"""Every registered operator has the same bits for any number of threads."""

import sys
import time
from pathlib import Path

import pytest
import torch

import shiftkern
from shiftkern import _library

from helpers.large_samples import LARGE_SAMPLES
from helpers.samples import PATHS, SAMPLES, detached, tensors_of


def bits(name, arguments, threads):
    """What an operator returns and what it leaves in its arguments, as bytes."""
    shiftkern.set_num_threads(threads)
    arguments = detached(arguments)
    results = tensors_of(PATHS[name][0](*arguments)) + tensors_of(arguments)
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in results if t.numel()]


def test_every_operator_has_large_samples():
    assert set(LARGE_SAMPLES) == set(_library.OPERATORS)


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_bits_do_not_depend_on_the_number_of_threads(name):
    for arguments in [*LARGE_SAMPLES[name](), *SAMPLES[name]()]:
        expected = bits(name, arguments, 1)
        for threads in (2, 3, 5):
            found = bits(name, arguments, threads)
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), threads


def _work_of_helpers():
    """Nanoseconds for which the threads of the pool have run, once they are asleep."""
    last, since = -1, time.monotonic()
    while time.monotonic() < since + 0.01:
        total = 0
        for task in Path("/proc/self/task").iterdir():
            if (task / "comm").read_text().startswith("shiftkern-"):
                total += int((task / "schedstat").read_text().split()[0])
        if total != last:
            last, since = total, time.monotonic()
        time.sleep(0.001)
    return last


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are looked at in /proc")
@pytest.mark.parametrize("name", _library.OPERATORS)
def test_large_samples_run_on_several_threads(name):
    # A loop wakes all helpers or none of them.
    for arguments in LARGE_SAMPLES[name]():
        before = _work_of_helpers()
        bits(name, arguments, 3)
        assert _work_of_helpers() > before, [t.shape for t in tensors_of(arguments)]
