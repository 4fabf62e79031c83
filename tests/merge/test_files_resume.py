"""Merges that are stopped, and go on."""

from __future__ import annotations

import errno
import json
import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

from shiftkern.errors import ArgumentError
from shiftkern.merge._files import output as writing
from shiftkern.merge.files import merge_files

from helpers.merging import make_states
from helpers.process import output


@pytest.fixture
def inputs(tmp_path):
    base, models = make_states(2, torch.bfloat16, shapes={"a": (300, 400), "b": (50_000,), "c": (7,)})
    base["ids"] = torch.arange(10)
    for model in models:
        model["ids"] = base["ids"]
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "first", "second")]
    for path, state in zip(paths, [base, *models], strict=True):
        save_file(state, path)
    return paths[0], paths[1:]


#: Tiles of 32768 elements, and a file for each tensor or two.
SMALL = {"memory": "8MB", "max_shard_size": "250KB", "progress": False}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at(monkeypatch, number):
    """Let the write of this number fail, after half of it, as if the disk were full."""
    write, calls = os.pwrite, []

    def pwrite(file, data, place):
        calls.append(len(data))
        if len(calls) == number:
            write(file, data[: len(data) // 2], place)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"trim_scope": "global"}, {"convention": "paper"}], ids=["", "global", "paper"]
)
@pytest.mark.parametrize("commit", [1, 100_000, 1 << 28])
def test_every_write_may_be_the_last(commit, options, inputs, tmp_path, monkeypatch):
    options = {**SMALL, **options, "memory": "12MB"}
    merge_files(*inputs, tmp_path / "whole", **options)
    expected = contents(tmp_path / "whole")
    monkeypatch.setattr(writing, "COMMIT_BYTES", commit)
    number, failed = 0, True
    while failed:
        number += 1
        out = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            try:
                merge_files(*inputs, out, **options)
                failed = False
            except OSError:
                assert not out.exists()
        if failed:
            merge_files(*inputs, out, **options)
        assert contents(out) == expected
        assert not out.with_name(out.name + ".partial").exists()
    assert number > 5


def test_what_is_durable_is_not_done_again(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "COMMIT_BYTES", 1)
    with monkeypatch.context() as patch:
        fail_at(patch, 6)
        with pytest.raises(OSError, match="no room"):
            merge_files(*inputs, tmp_path / "out", "linear", **SMALL)
    calls = fail_at(monkeypatch, 1000)
    report = merge_files(*inputs, tmp_path / "out", "linear", **SMALL)
    assert report.bytes_written == sum(calls)
    assert report.bytes_written < sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) / 2


def stop(inputs, out, monkeypatch, number=4, **options):
    """Leave a merge behind that has been stopped half way."""
    with monkeypatch.context() as patch:
        patch.setattr(writing, "COMMIT_BYTES", 1)
        fail_at(patch, number)
        with pytest.raises(OSError, match="no room"):
            merge_files(*inputs, out, **SMALL, **options)


def test_other_options_start_anew_with_a_warning(inputs, tmp_path, monkeypatch):
    merge_files(*inputs, tmp_path / "whole", "task_arithmetic", **SMALL)
    stop(inputs, tmp_path / "out", monkeypatch, method="task_arithmetic", scale=0.5)
    with pytest.warns(UserWarning, match=r"out.partial' is of another merge .* starting anew") as caught:
        merge_files(*inputs, tmp_path / "out", "task_arithmetic", **SMALL)
    assert caught[0].filename == __file__
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["content", "time"])
def test_other_inputs_start_anew_with_a_warning(change, inputs, tmp_path, monkeypatch):
    stop(inputs, tmp_path / "out", monkeypatch, method="linear")
    path = inputs[1][0]
    if change == "content":
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 1
        path.write_bytes(raw)
    else:
        os.utime(path, ns=(1, 1))
    with pytest.warns(UserWarning, match="starting anew"):
        merge_files(*inputs, tmp_path / "out", "linear", **SMALL)
    merge_files(*inputs, tmp_path / "whole", "linear", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_without_resume_everything_is_done_again(inputs, tmp_path, monkeypatch):
    stop(inputs, tmp_path / "out", monkeypatch, method="linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge_files(*inputs, tmp_path / "out", "linear", resume=False, **SMALL)
    assert report.bytes_written == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_other_memory_and_shown_progress_go_on(inputs, tmp_path, monkeypatch):
    merge_files(*inputs, tmp_path / "whole", "linear", **SMALL)
    stop(inputs, tmp_path / "out", monkeypatch, method="linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge_files(*inputs, tmp_path / "out", "linear", max_shard_size="250KB", memory="1GB")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert 0 < report.bytes_written < sum(map(len, contents(tmp_path / "out").values())) - 10_000


def test_a_torn_journal(inputs, tmp_path, monkeypatch):
    merge_files(*inputs, tmp_path / "whole", "linear", **SMALL)
    stop(inputs, tmp_path / "out", monkeypatch, method="linear")
    journal = tmp_path / "out.partial" / "journal-0.jsonl"
    with open(journal, "ab") as file:
        file.write(b'{"file": "model-00001-of')
    stop(inputs, tmp_path / "out", monkeypatch, number=2, method="linear")
    lines = journal.read_bytes().split(b"\n")
    assert b'{"file": "model-00001-of' in lines
    assert all(line.endswith(b"}") for line in lines[-2:] if line)
    merge_files(*inputs, tmp_path / "out", "linear", **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_journal_whose_file_is_gone_or_short(inputs, tmp_path, monkeypatch):
    merge_files(*inputs, tmp_path / "whole", "linear", **SMALL)
    for damage in (os.unlink, lambda path: os.truncate(path, 10)):
        out = tmp_path / "out"
        stop(inputs, out, monkeypatch, method="linear")
        for path in (tmp_path / "out.partial" / "result").iterdir():
            damage(path)
        merge_files(*inputs, out, "linear", **SMALL)
        assert contents(out) == contents(tmp_path / "whole")
        out.rename(tmp_path / f"done{damage is os.unlink}")


def test_one_merge_at_a_time(inputs, tmp_path, monkeypatch):
    finish = writing.Partial.finish

    def meanwhile(self):
        with pytest.raises(ArgumentError, match="'out': expected a path that no other merge is writing"):
            merge_files(*inputs, tmp_path / "out", "linear", **SMALL)
        finish(self)

    monkeypatch.setattr(writing.Partial, "finish", meanwhile)
    merge_files(*inputs, tmp_path / "out", "linear", **SMALL)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_stopped_after_the_last_rename(name, inputs, tmp_path, monkeypatch):
    out = tmp_path / name
    with monkeypatch.context() as patch:
        patch.setattr(writing.Partial, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            merge_files(*inputs, out, "linear", **SMALL)
    assert out.exists()
    with pytest.raises(ArgumentError, match="where nothing is yet"):
        merge_files(*inputs, out, "task_arithmetic", **SMALL)
    report = merge_files(*inputs, out, "linear", **SMALL)
    assert report.bytes_written == 0
    assert not out.with_name(name + ".partial").exists()
    with pytest.raises(ArgumentError, match="where nothing is yet"):
        merge_files(*inputs, out, "linear", **SMALL)


def test_killed_at_any_moment(tmp_path):
    base, models = make_states(2, torch.bfloat16, shapes={"a": (900, 500), "b": (200_000,), "c": (7,)})
    for name, state in (("base", base), ("first", models[0]), ("second", models[1])):
        save_file(state, tmp_path / f"{name}.safetensors")
    script = """
        import json, os, pathlib, random, signal, sys, time, warnings
        from shiftkern.merge._files import output
        from shiftkern.merge.files import merge_files
        import tqdm
        folder = pathlib.Path(sys.argv[1])
        output.COMMIT_BYTES = 100_000
        paths = [folder / f"{name}.safetensors" for name in ("base", "first", "second")]
        options = dict(trim_scope="global", memory="12MB", max_shard_size="600KB", progress=False)
        steps = 0

        def dying(function, last):
            def step(*arguments, **more):
                global steps
                steps += 1
                if steps == last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **more)
            return step

        def merge(out, last=None):
            # In a child, which gets as far as its last step.
            child = os.fork()
            if child == 0:
                warnings.simplefilter("error")
                for name in ("pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open", "ftruncate"):
                    setattr(os, name, dying(getattr(os, name), last))
                merge_files(paths[0], paths[1:], folder / out, **options)
                (folder / "steps").write_text(str(steps))
                os._exit(0)
            return child

        began = time.perf_counter()
        assert os.waitpid(merge("whole"), 0)[1] == 0
        seconds = time.perf_counter() - began
        count = int((folder / "steps").read_text())
        random.seed(0)
        moments = sorted({*random.sample(range(1, count), 6), *range(count - 5, count + 1)})
        for last in moments:
            assert os.waitpid(merge(f"step{last}", last), 0)[1] == signal.SIGKILL
            # Without its last file nothing is left to go on with: then the output is complete.
            over = (folder / f"step{last}").exists() and not (folder / f"step{last}.partial" / "plan.json").exists()
            assert (os.waitpid(merge(f"step{last}"), 0)[1] == 0) != over
        # And from outside, again and again.
        for _ in range(6):
            child = merge("timed")
            time.sleep(random.uniform(0, 0.5) * seconds)
            os.kill(child, signal.SIGKILL)
            if os.waitpid(child, 0)[1] == 0 or (folder / "timed").exists():
                break
        else:
            assert os.waitpid(merge("timed"), 0)[1] == 0
        print(json.dumps([f"step{last}" for last in moments]))
    """
    names = json.loads(output(script, str(tmp_path), OMP_NUM_THREADS="1", SHIFTKERN_NUM_THREADS="1"))
    expected = contents(tmp_path / "whole")
    assert len(names) >= 8
    for name in [*names, "timed"]:
        assert contents(tmp_path / name) == expected, name
    for name in names:
        assert not (tmp_path / f"{name}.partial").exists()


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("links", [True, False])
def test_what_appears_under_the_name_at_the_last_moment_is_not_overwritten(name, links, inputs, tmp_path, monkeypatch):
    out = tmp_path / name

    def without(*_):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", without)
    exists = os.path.lexists

    def appears_after_the_check(path):
        found = exists(path)
        if path == out and (out.with_name(name + ".partial") / "plan.json").exists():
            if out.suffix:
                out.write_bytes(b"somebody else's")
            else:
                out.mkdir()
                (out / "other").write_bytes(b"somebody else's")
        return found

    monkeypatch.setattr(os.path, "lexists", appears_after_the_check)
    with pytest.raises(ArgumentError, match="which exists by now"):
        merge_files(*inputs, out, memory="64MB", progress=False)
    assert (out if out.suffix else out / "other").read_bytes() == b"somebody else's"
    monkeypatch.undo()
    if not links:
        monkeypatch.setattr(os, "link", without)
    out.unlink() if out.suffix else (out / "other").unlink()
    if out.is_dir():
        out.rmdir()
    merge_files(*inputs, out, memory="64MB", progress=False)
    assert not out.with_name(name + ".partial").exists()
    merge_files(*inputs, tmp_path / ("again" + out.suffix), memory="64MB", progress=False)
    again = tmp_path / ("again" + out.suffix)
    assert out.read_bytes() == again.read_bytes() if out.suffix else contents(out) == contents(again)


def test_stopped_between_the_two_names_of_a_single_file(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    link = os.link

    def link_and_stop(*names):
        link(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", link_and_stop)
    with pytest.raises(KeyboardInterrupt):
        merge_files(*inputs, out, memory="64MB", progress=False)
    monkeypatch.undo()
    assert merge_files(*inputs, out, memory="64MB", progress=False).bytes_written == 0
    assert not out.with_name("out.safetensors.partial").exists()
    assert out.stat().st_nlink == 1
