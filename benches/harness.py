"""Side-by-side timing: every case in one process, in turn, on equal threads, dtype and data.

Machines are noisy and clocks drift, so cases are interleaved round by round and compared as ratios of medians.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import shiftkern

ROUNDS = int(os.environ.get("SHIFTKERN_BENCH_ROUNDS", "9"))


@dataclass
class Timing:
    """Median and quartiles of one case, in milliseconds."""

    median: float
    low: float
    high: float


@dataclass
class Result:
    """One piece of work, timed for every case.

    ``asked`` holds (our case, peer, ratio): what was set out to be reached; the peer "best" is the fastest one.
    ``limit`` is a case that moves as many bytes as the work must: what the machine allows.
    """

    work: str
    size: str
    timings: dict[str, Timing]
    ours: list[str]
    peers: list[str]
    limit: str | None = None
    asked: list[tuple[str, str, float]] = field(default_factory=list)

    def best_peer(self) -> str:
        """Name of the fastest peer."""
        return min(self.peers, key=lambda p: self.timings[p].median)

    def ratio(self, case: str, peer: str = "best") -> float:
        """How many times faster ``case`` is than ``peer``."""
        peer = self.best_peer() if peer == "best" else peer
        return self.timings[peer].median / self.timings[case].median

    def of_limit(self, case: str) -> float | None:
        """How many times the limit's time ``case`` takes."""
        return None if self.limit is None else self.timings[case].median / self.timings[self.limit].median


def interleave(cases: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time each case ``rounds`` times, in turn; cases under 2 ms are repeated within a round."""
    repeats = {}
    for name, run in cases.items():
        start = time.perf_counter()
        run()
        if (first := time.perf_counter() - start) < 1.0:
            # The first run of a short case is mostly warming up.
            start = time.perf_counter()
            run()
            first = time.perf_counter() - start
        repeats[name] = max(1, min(2000, int(0.002 / max(first, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            # The thread pools of some libraries keep turning for a while after a call; let them come to rest.
            time.sleep(0.02)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            samples[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median, low, high)
    return timings


def refuse_debug_build() -> None:
    """Timings of a debug build would say nothing."""
    if shiftkern.build_info()["profile"] != "release":
        raise SystemExit("this is a debug build of shiftkern; build with --release to measure it")


def machine() -> dict[str, str]:
    """Return what the numbers depend on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass
    return {
        "CPU": f"{model}, {os.cpu_count()} cores",
        "Threads": str(torch.get_num_threads()),
        "SIMD": shiftkern.build_info()["simd"],
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "shiftkern": shiftkern.__version__,
        "Rounds": str(ROUNDS),
    }
