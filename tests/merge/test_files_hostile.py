"""Files that are broken, or made to do harm; outputs that must not be written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from shiftkern.errors import ArgumentError
from shiftkern.merge._files import output as writing
from shiftkern.merge._files.reader import open_model
from shiftkern.merge.files import merge_files

from helpers.merging import make_states
from helpers.process import output


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x01\x00", "2 bytes"),
    "header longer than the file": (file_of(b"{}", length=50), "a header of 50 bytes and 2 bytes"),
    "header of a terabyte": (file_of(b"{}", length=2**40), "at most 100000000 bytes"),
    "no JSON": (file_of(b"{nope"), "in JSON"),
    "no UTF-8": (file_of(b'{"\xff\xfe": 1}'), "in JSON"),
    "deep JSON": (file_of(b'{"a":' + b"[" * 100_000), "in JSON"),
    "huge number": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "in JSON"),
    "a list": (file_of(b"[]"), "a JSON object"),
    "space before": (file_of(b" {}"), "a JSON object"),
    "NaN": (file_of(b'{"a": NaN}'), "whole numbers"),
    "no object": (file_of({"w": 3}), "dtype, shape and data_offsets of tensor 'w'"),
    "missing field": (file_of({"w": {"dtype": "F32", "shape": []}}), "of tensor 'w'"),
    "more fields": (file_of({"w": {**entry(0, 4), "x": 1}}, bytes(4)), "of tensor 'w'"),
    "unknown dtype": (file_of({"w": entry(0, 4, dtype="F33")}, bytes(4)), "a known dtype of tensor 'w'"),
    "dtype no text": (file_of({"w": entry(0, 4, dtype=["F32"])}, bytes(4)), "a known dtype of tensor 'w'"),
    "negative size": (file_of({"w": entry(0, 4, (-1,))}, bytes(4)), "shape of tensor 'w'"),
    "fractional size": (file_of({"w": entry(0, 4, (1.0,))}, bytes(4)), "shape of tensor 'w'"),
    "true as size": (file_of({"w": entry(0, 4, (True,))}, bytes(4)), "shape of tensor 'w'"),
    "huge sizes": (file_of({"w": entry(0, 4, (2**62, 2**62))}, bytes(4)), "as many bytes as .* 'w'"),
    "wrong length": (file_of({"w": entry(0, 8)}, bytes(8)), "as many bytes as .* 'w' .* 8 bytes for F32"),
    "backwards": (file_of({"w": entry(4, 0)}, bytes(4)), "begin, end. of tensor 'w'"),
    "one offset": (file_of({"w": {**entry(0, 4), "data_offsets": [0]}}, bytes(4)), "of tensor 'w'"),
    "truncated": (file_of({"v": entry(0, 4), "w": entry(4, 8)}, bytes(6)), "complete .* tensor 'w'"),
    "too long": (file_of({"w": entry(0, 4)}, bytes(6)), "2 bytes too many after tensor 'w'"),
    "data without tensors": (file_of({}, bytes(6)), "6 bytes too many"),
    "overlap": (file_of({"v": entry(0, 4), "w": entry(2, 6)}, bytes(6)), "tensor 'w' that overlaps"),
    "shared": (file_of({"v": entry(0, 4), "w": entry(0, 4)}, bytes(4)), "tensor 'w' that overlaps"),
    "hole": (file_of({"v": entry(0, 4), "w": entry(8, 12)}, bytes(12)), "tensor 'w' that leaves a hole"),
    "twice": (file_of(b'{"w": {}, "w": {}}'), "'w' several times"),
    "many dimensions": (
        file_of({"w": entry(0, 4, (2**62,) * 100_000)}, bytes(4)),
        "at most 64 dim.* 'w', got 100000 in",
    ),
    "many offsets": (file_of({"w": {**entry(0, 4), "data_offsets": [0] * 1000}}, bytes(4)), r"got \[0, .*\.\.\.\] in"),
    "half a surrogate": (file_of({"a\ud800": entry(0, 4)}, bytes(4)), "in Unicode, got str 'a.ud800'"),
    "half a surrogate in metadata": (file_of({"__metadata__": {"a": "\udfff"}}), "in Unicode, got str '.udfff'"),
    "half a surrogate as key": (file_of({"__metadata__": {"\udfff": "a"}}), "in Unicode, got str '.udfff'"),
    "half bytes": (file_of({"w": entry(0, 1, (1,), "F4")}, bytes(1)), "as many bytes as .* 'w'"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "pickle": (pickle.dumps({"w": 1}), "header"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_by_name(content, message, tmp_path):
    base, _ = make_states(0)
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ArgumentError, match=rf"(?s)'models\[0\]'.*{message}") as found:
        merge_files(tmp_path / "base.safetensors", [tmp_path / "bad.safetensors"], tmp_path / "out")
    assert "bad.safetensors" in str(found.value)
    assert len(str(found.value)) < 500 + len(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "base.safetensors"]


GOOD = file_of({"v": entry(0, 8, (2,)), "w": entry(8, 10, (1, 1), "BF16"), "__metadata__": {"a": "b"}}, bytes(10))


@given(place=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_any_byte_may_be_wrong(place, value, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    for content in (GOOD[:place] + bytes([value]) + GOOD[place + 1 :], GOOD[:cut]):
        path.write_bytes(content)
        try:
            model = open_model("merge_files", "base", path)
        except ArgumentError as error:
            named = "x.safetensors" in str(error)
        else:
            named = sum(e.end - e.begin for e in model.tensors.values()) == 10
        assert named


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_read(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "folder").mkdir()
    for path in (tmp_path / name, tmp_path / "folder" / name):
        path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ArgumentError, match="pickled weights could run any code"):
            merge_files(path if path.parent == tmp_path else path.parent, ["x"], tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


def index_of(folder, names, **more):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names, **more}))
    return folder


def test_folders_that_do_not_fit_together(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"v": torch.ones(1)}, tmp_path / "outside.safetensors")
    cases = [
        (lambda: None, "no safetensors files in"),
        (lambda: index_of(folder, {"v": "../outside.safetensors"}), "names of safetensors files beside the index"),
        (lambda: index_of(folder, {"v": str(tmp_path / "outside.safetensors")}), "beside the index"),
        (lambda: index_of(folder, {"v": "a.safetensors"}), "no file '.*a.safetensors'"),
        (lambda: save_file({"w": torch.ones(1)}, folder / "a.safetensors"), "assign 'w' to 'a.safetensors'.*nowhere"),
        (lambda: index_of(folder, {"v": "a.safetensors", "w": "a.safetensors"}), "tensor 'v' in '.*a.safetensors'"),
        (lambda: save_file({"w": torch.ones(1)}, folder / "b.safetensors"), "tensor 'v' in"),
        (lambda: index_of(folder, {"w": "a.safetensors", "v": "b.safetensors"}), "'w' both in '.*a.*' and in '.*b"),
        (lambda: index_of(folder, ["w"]), "an index in JSON with a weight_map"),
        (lambda: (folder / "model.safetensors.index.json").write_text("{"), "an index in JSON"),
        (lambda: save_file({"w": torch.ones(1)}, folder / "model.safetensors"), "either model.safetensors or"),
        (lambda: [(folder / "model.safetensors").unlink(), *map(os.unlink, folder.glob("*.json"))], "2 other safeten"),
    ]
    for prepare, message in cases:
        prepare()
        with pytest.raises(ArgumentError, match=message):
            merge_files(folder, [folder], tmp_path / "out")


def test_named_pipes_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ArgumentError, match="a regular file"):
        merge_files(tmp_path / "pipe.safetensors", ["x"], tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "della"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("in_base", [False, True])
def test_values_that_are_not_finite_name_file_tensor_and_place(method, value, in_base, tmp_path):
    base, models = make_states(2)
    (base if in_base else models[1])["block.weight"][3, 4] = value
    for name, state in (("base", base), ("a", models[0]), ("b", models[1])):
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    origin = tmp_path / "base.safetensors"
    options = {"dare_linear": {"drop_rate": [0.9, 0.8], "seed": 1}, "ties": {"density": 0.01}}.get(method, {})
    if method == "della":
        options = {"density": 0.5, "epsilon": 0.1, "seed": 1}
    if method == "linear":
        origin, paths = None, [origin, *paths]
    if method == "slerp":
        paths = paths[1:]
    bad = "base" if in_base else "b"
    with pytest.raises(ArgumentError, match=rf"element 55 of tensor 'block.weight' in '.*/{bad}.safetensors'"):
        merge_files(origin, paths, tmp_path / "out", method, progress=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "large"), [("float16", 7e4), ("bfloat16", 3.4e38), ("float32", 3e38)])
def test_results_that_the_type_cannot_hold(dtype, large, tmp_path):
    save_file({"w": torch.tensor([0.0, 1.0])}, tmp_path / "base.safetensors")
    save_file({"w": torch.tensor([large, 1.0])}, tmp_path / "tuned.safetensors")
    paths = [tmp_path / "tuned.safetensors"] * 2
    with pytest.raises(ArgumentError, match=f"'out_dtype': expected a result of tensor 'w' that {dtype} can hold"):
        merge_files(tmp_path / "base.safetensors", paths, tmp_path / "out", "task_arithmetic", out_dtype=dtype)


def test_differences_that_overflow(tmp_path):
    save_file({"w": torch.tensor([-3e38])}, tmp_path / "base.safetensors")
    save_file({"w": torch.tensor([3e38])}, tmp_path / "tuned.safetensors")
    with pytest.raises(ArgumentError, match="differences to the base that float32 can hold"):
        merge_files(tmp_path / "base.safetensors", [tmp_path / "tuned.safetensors"], tmp_path / "out", density=0.5)


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """A base in a folder, and a model in a file."""
    base, models = make_states(1)
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    save_file(models[0], tmp_path / "tuned.safetensors")
    return tmp_path / "base", [tmp_path / "tuned.safetensors"]


def test_what_exists_is_not_overwritten(pair, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.safetensors").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file.safetensors", "dangling"):
        with pytest.raises(ArgumentError, match=f"'out': expected a path where nothing is yet, got '.*{name}'"):
            merge_files(*pair, tmp_path / name, progress=False)
    assert (tmp_path / "file.safetensors").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_an_output_inside_an_input(pair, tmp_path):
    (tmp_path / "link").symlink_to(pair[0], target_is_directory=True)
    for out in (pair[0], pair[0] / "out", tmp_path / "link", tmp_path / "link" / "out", pair[0] / "x.safetensors"):
        with pytest.raises(ArgumentError, match="'out': expected a path"):
            merge_files(*pair, out, progress=False)
    assert [path.name for path in pair[0].iterdir()] == ["model.safetensors"]


def test_a_folder_that_does_not_exist(pair, tmp_path):
    with pytest.raises(ArgumentError, match="'out': expected a path in a folder that exists"):
        merge_files(*pair, tmp_path / "a" / "b", progress=False)


def test_a_folder_that_must_not_be_written(pair, tmp_path, monkeypatch):
    def refuse(path, mode=0o777):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"merge_files: cannot write '.*out.partial' \(Permission denied\)"):
        merge_files(*pair, tmp_path / "out", progress=False)


def test_a_full_disk_keeps_what_is_there(pair, tmp_path):
    expected = tmp_path / "expected.safetensors"
    merge_files(*pair, expected, progress=False)
    script = """
        import resource, sys
        from shiftkern.merge.files import merge_files
        base, tuned, out = sys.argv[1:]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            merge_files(base, [tuned], out, progress=False)
        except OSError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(merge_files(base, [tuned], out, progress=False).tensors)
    """
    out = tmp_path / "out.safetensors"
    first, second = output(script, str(pair[0]), str(pair[1][0]), str(out)).splitlines()
    assert "merge_files: no room to write" in first
    assert "out.safetensors.partial/result/model.safetensors" in first
    assert "the same call goes on" in first
    assert int(second) == 7
    assert out.read_bytes() == expected.read_bytes()


def test_no_space_left_is_an_os_error_with_its_number(pair, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"no room to write '.*': what there is stays in") as found:
        merge_files(*pair, tmp_path / "out", progress=False)
    assert found.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").is_dir()


def test_a_folder_of_somebody_else_in_the_way(pair, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"'thesis\.txt' in it"):
        merge_files(*pair, tmp_path / "out", progress=False)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("plan", "more", "strange"),
    [
        ("{}", None, "plan.json"),
        ('{"version": "1", "inputs": [], "rule": {}, "shards": []}', None, "plan.json"),
        ('["shiftkern-merge"]', None, "plan.json"),
        ("dear diary", None, "plan.json"),
        ('{"format": "shiftkern-merge"}', "thesis.txt", "thesis.txt"),
        ('{"format": "shiftkern-merge"}', "journal-mine.jsonl", "journal-mine.jsonl"),
        ('{"format": "shiftkern-merge"}', "result.old", "result.old"),
    ],
)
def test_a_plan_of_somebody_else_in_the_way(plan, more, strange, resume, pair, tmp_path):
    folder = tmp_path / "out.partial"
    (folder / "result").mkdir(parents=True)
    for name in ("plan.json", "journal-0.jsonl", "result/model.safetensors", *filter(None, [more])):
        (folder / name).write_text(plan)
    before = {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}
    with pytest.raises(ArgumentError, match=rf"'out': .* with a strange '{strange}' in it"):
        merge_files(*pair, tmp_path / "out", resume=resume, progress=False)
    assert {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")} == before


def test_systems_without_locks_import_the_package_and_are_refused_at_the_call():
    script = """
        import os, sys
        import torch
        sys.modules["fcntl"] = None
        del os.pwrite, os.O_NONBLOCK
        import shiftkern, shiftkern.merge
        from shiftkern.merge._files.reader import open_model
        from safetensors.torch import save_file
        save_file({"w": torch.ones(2)}, sys.argv[1])
        print(list(open_model("x", "base", sys.argv[1]).tensors))
        try:
            shiftkern.merge.merge_files("a", ["b"], "c")
        except NotImplementedError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as folder:
        assert output(script, f"{folder}/x.safetensors").splitlines() == ["['w']", "merge_files needs a POSIX system"]


def test_an_input_that_changes_meanwhile(pair, tmp_path, monkeypatch):
    commit = writing.ShardWriter.commit

    def touch(self):
        os.utime(pair[1][0], ns=(1, 1))
        commit(self)

    monkeypatch.setattr(writing.ShardWriter, "commit", touch)
    with pytest.raises(ArgumentError, match=r"tuned\.safetensors' to stay as it is"):
        merge_files(*pair, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
