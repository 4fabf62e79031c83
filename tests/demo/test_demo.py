import json
import os
import signal
import subprocess
import sys
from itertools import pairwise

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from shiftkern.demo import output
from shiftkern.demo.adapt import METHODS, Options, Results, run
from shiftkern.demo.findings import findings
from shiftkern.demo.streams import CORRUPTIONS, ORDERS

STREAMS = [f"{kind}/{order}" for order in ORDERS for kind in CORRUPTIONS]
FILES = ["adapt.png", "results.json", "results.md"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of the command with every method, its output not a terminal."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    done = subprocess.run(
        [sys.executable, "-m", "shiftkern", "demo", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "results.json").read_text()), done


def test_files_are_written_and_nothing_else(quick):
    out, _, _ = quick
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "adapt.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "## What to see" in (out / "results.md").read_text()


def test_results_hold_every_method_on_every_stream(quick):
    _, results, _ = quick
    assert results["streams"] == STREAMS
    assert list(results["error"]) == list(METHODS)
    for errors in results["error"].values():
        assert list(errors) == STREAMS
        assert all(0 <= error <= 100 for error in errors.values())
    assert all(ms > 0 for ms in results["ms_per_batch"].values())
    assert sum(results["batches"]) == sum(length for _, length in results["segments"])
    assert all(len(errors) == len(results["batches"]) for errors in results["continual"].values())


def test_output_is_plain_without_a_terminal(quick):
    _, _, done = quick
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert done.stderr.splitlines() == ["training", *(method.label for method in METHODS.values()), "done"]
    for method in METHODS.values():
        assert method.label in done.stdout
    assert "What to see" in done.stdout


def test_output_fits_eighty_columns(quick):
    out, _, done = quick
    assert max(len(line) for line in done.stdout.splitlines() if str(out) not in line) <= 80


# 640 images: the standard error of a rate near 1 % is 0.4 points, near 5 % 0.9, near 50 % 2.0. Over seeds 0 to 3 the
# effects were at least: contrast 34, blur 14, noise 5, class order 4.7; AlphaBN within 1.9 of the source.
def test_known_effects_show(quick):
    _, results, _ = quick
    error = results["error"]
    source, batch, alpha = error["source"], error["bn"], error["alpha"]
    assert source["clean/iid"] < 5
    assert source["contrast/iid"] - batch["contrast/iid"] > 30
    assert source["blur/iid"] - batch["blur/iid"] > 10
    assert source["noise/iid"] - batch["noise/iid"] > 10
    assert batch["clean/sorted"] - batch["clean/iid"] > 3
    assert abs(alpha["clean/iid"] - source["clean/iid"]) < 1
    assert abs(alpha["clean/sorted"] - source["clean/sorted"]) < 2


def test_a_method_without_memory_does_not_see_the_order(quick):
    _, results, _ = quick
    for kind in CORRUPTIONS:
        assert results["error"]["source"][f"{kind}/iid"] == results["error"]["source"][f"{kind}/sorted"]


def test_a_run_repeats_by_seed_and_methods_do_not_influence_each_other(quick):
    _, results, _ = quick
    shares = []
    again = run(Options(quick=True, methods=("tent", "alpha")), lambda _, share: shares.append(share))
    for method in ("tent", "alpha"):
        assert again.error[method] == results["error"][method]
        assert again.continual[method] == results["continual"][method]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert all(a <= b for a, b in pairwise(shares))


def test_another_seed_gives_another_run_with_the_same_effects(quick):
    _, results, _ = quick
    other = run(Options(seed=1, quick=True, methods=("source", "bn", "alpha")))
    assert other.error["source"] != results["error"]["source"]
    assert other.error["source"]["contrast/iid"] - other.error["bn"]["contrast/iid"] > 20
    assert other.error["bn"]["clean/sorted"] - other.error["bn"]["clean/iid"] > 2
    assert other.error["alpha"]["clean/sorted"] - other.error["source"]["clean/sorted"] < 2.5


def made_up(**errors: dict[str, float]) -> Results:
    results = Results(Options(), streams=STREAMS, images=896, segments=[("clean", 896)], batches=[64] * 14)
    results.error = {method: dict.fromkeys(STREAMS, 50.0) | given for method, given in errors.items()}
    return results


def test_findings_report_an_effect_that_is_absent():
    text = "\n".join(findings(made_up(source={}, bn={}, alpha={"clean/sorted": 60.0}, lame={})))
    assert "do not help under this contrast shift: 50.0 %" in text
    assert "Class order does not hurt batch statistics here" in text
    assert "does not keep both orders here" in text
    assert "does not gain from class order here" in text


def test_findings_report_an_effect_that_is_present():
    text = "\n".join(
        findings(
            made_up(
                source={"contrast/iid": 90.0, "clean/iid": 1.0, "clean/sorted": 1.0},
                bn={"contrast/iid": 5.0, "clean/iid": 1.0, "clean/sorted": 9.0},
                alpha={"contrast/iid": 70.0, "clean/iid": 1.0, "clean/sorted": 1.5},
                unmix={"clean/iid": 3.0},
                lame={"clean/sorted": 0.0},
            )
        )
    )
    assert "repair the contrast shift: 90.0 % error without adaptation, 5.0 %" in text
    assert "1.0 % shuffled, 9.0 % sorted by class" in text
    assert "safe in both orders: clean 1.0 % shuffled, 1.5 % sorted" in text
    assert "repairs contrast only in part (90.0 -> 70.0 %)" in text
    assert "UnMix-TNS (clean 3.0 %, source 1.0 %" in text
    assert "components go about 4 % of the way" in text
    assert "gains from class order: mean error 50.0 % shuffled, 40.0 % sorted" in text


def test_findings_skip_what_was_not_run():
    (only,) = findings(made_up(rmt={}))
    assert only.startswith("Lowest mean error: RMT")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"severity": 6}, "severity: expected 1 to 5, got 6"),
        ({"batch_size": 1}, "batch size"),
        ({"seed": -1}, "seed"),
        ({"methods": ["source", "nope"]}, "unknown 'nope'; known are source, bn"),
    ],
)
def test_wrong_options_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        Options(**wrong)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_bytes(b"old")

    def fail(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        output.write(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_with_130_and_leaves_no_file(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-m", "shiftkern", "demo", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stderr is not None
        assert child.stderr.readline() == "training\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 130
    assert errors.strip() == "shiftkern: interrupted"
    assert list(tmp_path.iterdir()) == []
