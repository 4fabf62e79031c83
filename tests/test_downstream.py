"""A project of its own passes its tests with the shiftkern that is installed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent / "downstream"


def test_a_project_that_uses_the_library_passes_its_tests(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft", minversion="0.21")
    # Away from this repository, so that nothing but what is installed is found.
    project = tmp_path / "field-station"
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=project,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 16, done.stdout
    assert "skipped" not in done.stdout
