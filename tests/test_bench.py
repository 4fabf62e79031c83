"""The short bench: it compares like with like, and says what the times depend on."""

import os
import subprocess
import sys

import pytest
import torch

import shiftkern
from shiftkern import bench, cli

WORK = list(bench.work(quick=True))


def test_every_family_with_kernels_is_there():
    assert {item.family for item in WORK} == {"attention", "merge", "norm", "ot", "rotation", "sort", "tta"}


@pytest.mark.parametrize("item", WORK, ids=lambda item: item.name)
def test_both_sides_compute_the_same(item):
    torch.testing.assert_close(item.ours(), item.torch(), rtol=item.rtol, atol=item.atol)


def test_times_are_medians_and_the_ratio_is_theirs(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: (10 + next(clock)) ** 2 / 1000)
    monkeypatch.setattr(bench.time, "sleep", lambda _: None)
    item = bench.Work("norm", "nothing", "0", lambda: 0, lambda: 0)
    found = bench.compare(item, 5)
    # Reading k is (10 + k)^2 ms: four to see how often to repeat, then two for each side in turn, five times.
    assert found.shiftkern_ms == pytest.approx(23.0**2 - 22.0**2)
    assert found.torch_ms == pytest.approx(25.0**2 - 24.0**2)
    assert found.ratio == found.torch_ms / found.shiftkern_ms


def test_sides_that_differ_are_not_timed():
    item = bench.Work("norm", "wrong", "1", lambda: torch.zeros(1), lambda: torch.ones(1))
    with pytest.raises(AssertionError):
        bench.compare(item, 5)


def test_the_command_prints_machine_and_ratios():
    pytest.importorskip("rich")
    done = subprocess.run(
        [sys.executable, "-m", "shiftkern", "bench", "--quick", "--rounds", "5", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    assert f"shiftkern {shiftkern.__version__}, torch {torch.__version__}" in done.stdout
    assert "1, of torch 1" in done.stdout
    assert "Medians of 5 rounds" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == len(WORK)
    assert all(float(row.split("│")[-2].strip().removesuffix("x")) > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--rounds", "4"], "expected at least 5, got 4"), (["--threads", "0"], "expected an integer >= 1, got 0")],
)
def test_wrong_arguments_are_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["bench", "--quick"]) == 2
    assert capsys.readouterr().err == "shiftkern: error: the bench needs rich: pip install 'shiftkern[demo]'\n"
