import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from shiftkern.demo import digits, merge
from shiftkern.demo.merge import METHODS, PATHS, SCALES, TASKS, Inputs, Merge, Method, Options, Path, Results, run
from shiftkern.demo.merge_show import findings
from shiftkern.demo.streams import corrupt

FILES = ["merge.json", "merge.md", "merge.png"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of the command, its output not a terminal."""
    out = tmp_path_factory.mktemp("merge") / "made" / "here"
    done = subprocess.run(
        [sys.executable, "-m", "shiftkern", "demo", "merge", "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "merge.json").read_text()), done


@pytest.fixture(scope="module")
def again():
    """The same run in this process."""
    shares = []
    results = run(Options(quick=True), lambda _, share: shares.append(share))
    return results, shares


def without_seconds(results):
    results = json.loads(json.dumps(results))
    for found in (*results["methods"].values(), *results["paths"].values()):
        found.pop("seconds")
    return results


def table_rows(text):
    """Cells of the lines of a Markdown table, without the bars of bold text."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_files_are_written_and_nothing_else(quick):
    out, _, _ = quick
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "merge.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (out / "merge.png").stat().st_size < 300_000


def test_tables_say_what_was_measured(quick):
    out, results, done = quick
    rows = {row[0].rstrip(" *+"): row[1:] for row in table_rows((out / "merge.md").read_text())}
    assert list(results["methods"]) == list(METHODS)
    networks = {"parent": results["parent"]}
    networks |= {f"expert: {name}": results["experts"][name] for name in TASKS}
    networks |= {METHODS[name].label: found for name, found in results["methods"].items()}
    for label, found in networks.items():
        values = [*found["accuracy"], sum(found["accuracy"]) / len(TASKS)]
        assert rows[label][:4] == [f"{value:.1f}" for value in values]
    for name, path in results["paths"].items():
        assert rows[name][0] == f"{path['loss'][5]:.2f}"
        assert rows[name][2] == f"{path['accuracy'][5]:.1f}"
    for label in rows:
        if not label.startswith("-"):
            assert label in done.stdout


def test_output_is_plain_and_fits_eighty_columns(quick):
    out, _, done = quick
    assert "\x1b" not in done.stdout + done.stderr
    labels = [method.label for method in METHODS.values()]
    assert done.stderr.splitlines() == ["training", *TASKS, *labels, "aligning", "done"]
    assert max(len(line) for line in done.stdout.splitlines() if str(out) not in line) <= 80
    assert "…" not in done.stdout
    assert "What to see" in done.stdout


def test_a_run_repeats_by_seed(quick, again):
    _, results, _ = quick
    assert without_seconds(asdict(again[0])) == without_seconds(results)


def test_progress_goes_from_nothing_to_all(again):
    _, shares = again
    assert (shares[0], shares[-1]) == (0, 1)
    assert all(a <= b for a, b in pairwise(shares))


# Over seeds 0 to 3 experts gained at least 18 points by rotation, 5 by noise and 40 by fading; the average of the three
# was better than the parent by at least 4 points; the barrier fell from at least 1.5 to at most 0.25 and 0.34.
def test_known_effects_show(again):
    results, _ = again
    for task, name in enumerate(TASKS):
        own = results.experts[name].accuracy[task]
        assert own > results.parent.accuracy[task] + 3
        assert all(own > other.accuracy[task] for key, other in results.experts.items() if key != name)
    assert results.methods["soup"].mean > results.parent.mean + 3
    assert results.clean > 85
    plain, *aligned = (results.paths[name] for name in PATHS)
    assert plain.barrier(results.places) > 1.2
    assert max(path.barrier(results.places) for path in aligned) < 0.5
    for path in aligned:
        assert (path.loss[-1], path.accuracy[-1]) == (plain.loss[-1], plain.accuracy[-1])
    assert aligned[0].loss[0] == plain.loss[0] == aligned[1].loss[0]


def test_scales_are_chosen_where_there_is_one(again):
    results, _ = again
    for name, found in results.methods.items():
        assert (found.scale in SCALES) == METHODS[name].scaled
        assert found.scale is not None or not METHODS[name].scaled
        assert found.seconds > 0


def test_the_best_scale_on_validation_images_is_taken():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    state = {"0.weight": torch.zeros(2, 2)}
    x, y = torch.eye(2), torch.tensor([0, 1])
    inputs = Inputs(network, [x], [x], y, seed=0, steps=1)
    seen = []

    def turned(base, models, scale, _):
        seen.append(scale)
        # Right at the scale 0.5 alone.
        return {"0.weight": torch.eye(2) if scale == 0.5 else -torch.eye(2)}

    merged, scale, _ = merge._merge(Method("x", turned, True), state, [state], (0.2, 0.5, 1.0), inputs)
    assert torch.equal(merged["0.weight"], torch.eye(2))
    assert (scale, seen) == (0.5, [0.2, 0.5, 1.0])
    assert merge._merge(Method("x", turned), state, [state], (0.2, 0.5), inputs)[1] is None


def test_the_barrier_is_the_rise_above_the_straight_line():
    places = np.linspace(0, 1, 5).tolist()
    assert Path([1.0, 3.0, 4.0, 2.0, 2.0], [0.0] * 5, 0.0).barrier(places) == pytest.approx(2.5)
    assert Path([1.0, 1.25, 1.5, 1.75, 2.0], [0.0] * 5, 0.0).barrier(places) == pytest.approx(0.0)


def test_tasks_do_what_their_names_say():
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(TASKS["rotation"](images, 1), corrupt(images, "rotation", 3, seed=0))
    assert torch.equal(TASKS["noise"](images, 1), corrupt(images, "noise", 5, seed=1))
    assert not torch.equal(TASKS["noise"](images, 1), TASKS["noise"](images, 2))
    torch.testing.assert_close(2 * TASKS["faded"](images, 0) - 1, images)


def test_the_rate_of_learning_can_be_chosen():
    data = digits.load(0)
    moved = []
    for max_lr in (1e-3, 1e-2):
        network = digits.build_network(0, width=2)
        before = network[-1].weight.detach().clone()
        digits.train(
            network, data.train_images[:128], data.train_labels[:128], seed=0, epochs=2, batch_size=32, max_lr=max_lr
        )
        moved.append((network[-1].weight - before).norm().item())
    assert moved[0] < moved[1] / 2


def made_up(merged, blind, barriers=(2.0, 0.2, 0.3)):
    """Results in which merged networks, those that learn from entropy, and barriers are those given."""
    results = Results(Options(), 10, 95.0, Merge([60.0] * 3))
    results.experts = {name: Merge([90.0 if task == i else 50.0 for task in range(3)]) for i, name in enumerate(TASKS)}
    for name, method in METHODS.items():
        accuracy = [merged] * 3
        if method.learns_from == "unlabelled":
            accuracy = [merged, blind, merged]
        if name.startswith("slerp"):
            accuracy = [merged - 20 * (str(task) not in name) for task in range(3)]
        results.methods[name] = Merge(accuracy)
    results.places = [0.0, 0.5, 1.0]
    results.paths = {
        name: Path([0.1, 0.1 + b, 0.1], [99.0, 100 / (1 + b), 99.0], 0.0)
        for name, b in zip(PATHS, barriers, strict=True)
    }
    return results


def test_findings_report_an_effect_that_is_present():
    text = "\n".join(findings(made_up(merged=80.0, blind=40.0)))
    assert "On its own task an expert has 90.0 % on average, on those of others 50.0 %" in text
    assert "the best, Average, has 80.0 %, more than the expert that is best on all of them (rotation, 63.3 %)" in text
    assert "AdaMerging 66.7 %, but less than the parent on noise 40.0 < 60.0 %" in text
    assert "Sure is not the same as right" in text
    assert "in 3 of 3 pairs" in text
    assert "barrier of 2.00. With their units aligned: 0.20 and 83.3 % with weight matching" in text


def test_findings_report_an_effect_that_is_absent():
    results = made_up(merged=60.0, blind=60.0, barriers=(2.0, 1.9, 0.1))
    for name in ("slerp_0_1", "slerp_0_2"):
        results.methods[name].accuracy = [10.0, 50.0, 50.0]
    text = "\n".join(findings(results))
    assert "not clearly more than the expert" in text
    assert "AdaMerging 60.0 %; Concrete 60.0 %." in text
    assert "Sure is not" not in text
    assert "in 1 of 3 pairs" in text
    assert "aligning their units does not help: 1.90 and" in text


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_wrong_seed_is_an_error(seed):
    with pytest.raises(ValueError, match="seed: expected a whole number"):
        Options(seed=seed)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_with_130_and_leaves_no_file(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-m", "shiftkern", "demo", "merge", "--out", str(tmp_path)],
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
    assert errors.splitlines()[-1] == "shiftkern: interrupted"
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
