"""Run a script in a process of its own, with a deadline: a hang is a failure."""

import os
import subprocess
import sys
import textwrap


def run(script: str, *arguments: str, deadline: float = 60.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``script``; the caller looks at the exit status."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=deadline,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
        check=False,
    )


def output(script: str, *arguments: str, deadline: float = 60.0, **environment: str) -> str:
    """Run ``script``, which must succeed, and return what it printed."""
    done = run(script, *arguments, deadline=deadline, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
