import json
import subprocess
import sys

import pytest
import torch

import shiftkern
from shiftkern import cli
from shiftkern.methods import METHODS


def shiftkern_command(*arguments, code=None, cwd=None):
    """Run the command line in a fresh interpreter, from an unrelated folder."""
    start = [sys.executable, "-c", code] if code else [sys.executable, "-m", "shiftkern"]
    return subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=cwd)


def exit_code(arguments):
    """Run in this process; argparse leaves by SystemExit, everything else by a returned code."""
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code


def test_module_runs_and_lists_its_commands(tmp_path):
    done = shiftkern_command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("demo", "merge", "methods", "info", "--version"):
        assert command in done.stdout


def test_unknown_command_is_a_usage_error_without_traceback(tmp_path):
    done = shiftkern_command("frobnicate", cwd=tmp_path)
    assert done.returncode == 2
    assert "frobnicate" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_command_is_a_usage_error(capsys):
    assert exit_code([]) == 2
    assert "usage: shiftkern" in capsys.readouterr().err


def test_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"shiftkern {shiftkern.__version__}\n"


def test_methods_json_has_exactly_the_fixed_keys(capsys):
    assert exit_code(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [method.id for method in METHODS]
    for row in rows:
        assert list(row) == ["id", "system", "paper", "module", "api", "tests", "follows", "status"]


def test_methods_table_has_one_line_per_method(capsys):
    assert exit_code(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["id", "system", "api", "follows", "status"]
    assert len(lines) == 1 + len(METHODS)


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    code = "import sys; from shiftkern.cli import main; sys.exit(main(['methods', '--json']))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=60) == 0
    assert errors == ""


def test_info_names_version_build_threads_and_torch(capsys):
    assert exit_code(["info"]) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, value = line.partition("  ")
        rows[name] = value.strip()
    assert rows["version"] == shiftkern.__version__
    assert rows["threads"] == str(shiftkern.get_num_threads())
    assert rows["torch"] == torch.__version__
    assert rows["torch threads"] == str(torch.get_num_threads())
    assert rows.keys() >= shiftkern.build_info().keys()


def test_demo_help_lists_demos_and_adapt_help_lists_options(capsys):
    assert exit_code(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "adapt" in text
    assert "transport" in text
    assert "merge" in text
    assert "finetune" in text
    for demo in ("transport", "merge", "finetune"):
        assert exit_code(["demo", demo, "--help"]) == 0
        text = capsys.readouterr().out
        for option in ("--seed", "--out", "--quick"):
            assert option in text
    assert exit_code(["demo", "adapt", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--seed", "--severity", "--batch-size", "--methods", "--out", "--quick"):
        assert option in text


def test_merge_help_lists_its_options(capsys):
    assert exit_code(["merge", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("CONFIG", "OUT", "--memory", "--max-shard-size", "--seed", "--threads", "--no-resume", "--quiet"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--severity", "6"], "--severity"),
        (["demo", "adapt", "--severity", "x"], "--severity"),
        (["demo", "--batch-size", "0"], "batch size: expected at least 2, got 0"),
        (["demo", "--seed", "-1"], "seed"),
        (["demo", "--methods", "source,nope"], "unknown 'nope'; known are source"),
        (["demo", "nope"], "nope"),
        (["demo", "transport", "--seed", "-1"], "seed: expected a whole number"),
        (["demo", "transport", "--seed", "x"], "--seed"),
        (["demo", "transport", "--methods", "tent"], "--methods"),
        (["demo", "merge", "--seed", "-1"], "seed: expected a whole number"),
        (["demo", "merge", "--severity", "3"], "--severity"),
        (["demo", "finetune", "--seed", "-1"], "seed: expected a whole number"),
        (["demo", "finetune", "--methods", "lora"], "--methods"),
    ],
)
def test_wrong_demo_arguments_are_usage_errors(arguments, message, capsys, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)
    assert exit_code(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "rich"])
@pytest.mark.parametrize("demo", ["adapt", "transport", "merge", "finetune"])
def test_a_missing_optional_package_is_one_line(package, demo, tmp_path):
    run = f"from shiftkern.cli import main; sys.exit(main(['demo', {demo!r}]))"
    code = f"import sys; sys.modules[{package!r}] = None; {run}"
    done = shiftkern_command(code=code, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"shiftkern: error: the demo needs {package}: pip install 'shiftkern[demo]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("demo", ["adapt", "transport", "merge", "finetune"])
def test_an_output_folder_that_cannot_be_made_is_one_line(demo, capsys, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    (tmp_path / "file").write_text("")
    assert exit_code(["demo", demo, "--quick", "--out", str(tmp_path / "file" / "out")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("shiftkern: error: ")
    assert errors.count("\n") == 1


def test_interrupt_exits_130(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_methods", interrupted)
    assert exit_code(["methods"]) == 130
    assert capsys.readouterr().err == "shiftkern: interrupted\n"
