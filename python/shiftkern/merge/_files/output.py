"""Writing of safetensors files that appear under their names only when they are whole, and can be gone on with."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftkern._checks import refuse
from shiftkern.merge._files.compute import Job
from shiftkern.merge._files.reader import BITS, Entry

__all__ = ["Item", "Partial", "Shard", "ShardWriter", "make_shards", "require_posix", "sync", "warn"]

#: What is written is made durable, and noted in the journal, after so many bytes.
COMMIT_BYTES = 1 << 28
#: What a plan says of itself, and the names that may be beside one.
_FORMAT = "shiftkern-merge"
_OWN_NAMES = re.compile(r"lock|plan\.json|plan\.new|journal-\d+\.jsonl|result")


@dataclass(frozen=True)
class Item:
    """A tensor of the output: merged by a job, or copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    job: Job | None
    source: Entry

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """A file of the output, known to the last byte but for its elements."""

    file: str
    items: Sequence[Item]
    header: bytes

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(item.nbytes for item in self.items)

    def places(self) -> Iterator[tuple[int, Item]]:
        """Go through the tensors and where they begin in the file."""
        position = len(self.header)
        for item in self.items:
            yield position, item
            position += item.nbytes


def make_shards(items: Sequence[Item], largest: int | None, metadata: Mapping[str, str]) -> list[Shard]:
    """Divide tensors, in order, among files of at most ``largest`` bytes of tensors, or of one larger tensor."""
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if largest is not None and groups[-1] and size + item.nbytes > largest:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return [_shard(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, items: list[Item], metadata: Mapping[str, str]) -> Shard:
    ends = [0]
    for item in items:
        ends.append(ends[-1] + item.nbytes)
    # Readers that map memory want elements at multiples of their size. Stable, so mostly nothing changes.
    if any(end % max(1, BITS[item.dtype] // 8) for end, item in zip(ends, items, strict=False)):
        return _shard(name, sorted(items, key=lambda item: -BITS[item.dtype]), metadata)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for begin, end, item in zip(ends, ends[1:], items, strict=False):
        header[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(name, items, len(text).to_bytes(8, "little") + text)


class Partial:
    """The folder beside the output that holds what is not yet complete, and a journal of how far it is.

    ``<out>.partial`` has the output so far in ``result``, a ``plan.json`` that says of which call it is, a journal for
    each process, and a lock that one call holds.
    """

    def __init__(self, op: str, out: Path, single: bool) -> None:
        self._op, self._out, self._single = op, out, single
        self.folder = out.with_name(out.name + ".partial")
        self.result = self.folder / "result"
        self._plan = self.folder / "plan.json"
        self._lock: int | None = None

    def open(self, plan: Mapping[str, Any], resume: bool) -> bool:
        """Make the folder or go on with it; return whether the output has been complete before."""
        out = self._out
        if not self.folder.exists():
            if os.path.lexists(out):
                refuse(self._op, "out", "a path where nothing is yet", f"'{out}', which exists")
            if not out.parent.is_dir():
                refuse(self._op, "out", "a path in a folder that exists", f"'{out}'")
        with self.explaining(self.folder):
            # Windows has none; the package can be imported there.
            import fcntl

            self.folder.mkdir(exist_ok=True)
            self._refuse_foreign()
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                refuse(self._op, "out", "a path that no other merge is writing", f"'{out}'")
            text = json.dumps({"format": _FORMAT, **plan}, indent=1, sort_keys=True).encode()
            same = self._same(text)
            if os.path.lexists(out):
                # A call that was stopped after its last step but one: the output has its name already.
                if same and resume and not self._holds_result():
                    return True
                if same is None:
                    self.remove()
                refuse(self._op, "out", "a path where nothing is yet", f"'{out}', which exists")
            if not (same and resume):
                if resume and same is False:
                    warn(f"{self._op}: '{self.folder}' is of another merge (other files or options); starting anew")
                self._empty()
                new = self._plan.with_suffix(".new")
                new.write_bytes(text)
                sync(new)
                new.replace(self._plan)
                sync(self.folder)
            self.result.mkdir(exist_ok=True)
        return False

    def _refuse_foreign(self) -> None:
        """Refuse a folder with anything that no merge has put there, as all that is in it will be removed."""
        names = sorted(path.name for path in self.folder.iterdir())
        if "plan.json" in names:
            foreign = [name for name in names if not _OWN_NAMES.fullmatch(name)]
            if not foreign and not _is_plan(self._plan):
                foreign = ["plan.json"]
        else:
            foreign = [name for name in names if name not in ("lock", "plan.new")]
        if foreign:
            expected = "a path beside which its name with .partial is free"
            refuse(self._op, "out", expected, f"'{self.folder}' with a strange {foreign[0]!r} in it")

    def _same(self, text: bytes) -> bool | None:
        """Whether the folder is of this call; None if it is of none yet."""
        return self._plan.read_bytes() == text if self._plan.exists() else None

    def _holds_result(self) -> bool:
        if not self._single or not self.result.exists():
            return self.result.exists()
        # With both names, for the last step of all is to take away the first one.
        return any(not self._out.exists() or not path.samefile(self._out) for path in self.result.iterdir())

    def _empty(self) -> None:
        # Journals first: without its files a journal would be wrong.
        for journal in self.folder.glob("journal-*.jsonl"):
            journal.unlink()
        if self.result.exists():
            shutil.rmtree(self.result)

    def journal(self) -> tuple[dict[str, int], dict[str, Any]]:
        """Return how many bytes of each file are durable, and what else has been noted."""
        done: dict[str, int] = {}
        notes: dict[str, Any] = {}
        for journal in sorted(self.folder.glob("journal-*.jsonl")):
            for line in journal.read_bytes().split(b"\n")[:-1]:
                try:
                    entry = json.loads(line)
                except ValueError:  # torn by a crash
                    continue
                if "file" in entry:
                    done[entry["file"]] = max(done.get(entry["file"], 0), entry["bytes"])
                else:
                    notes.update(entry)
        for file, size in done.items():
            path = self.result / file
            if not path.is_file() or path.stat().st_size < size:
                done[file] = 0
        return done, notes

    def note(self, rank: int, entry: Mapping[str, Any]) -> None:
        """Add a line to a process's journal."""
        path = self.folder / f"journal-{rank}.jsonl"
        with self.explaining(path):
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            with open(path, "ab") as file:
                file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the output its name, and remove the folder."""
        with self.explaining(self._out):
            sync(self.result)
            try:
                if os.path.lexists(self._out):
                    raise FileExistsError
                if self._single:
                    (source,) = self.result.iterdir()
                    _name_anew(source, self._out)
                else:
                    # Only an empty folder would be replaced.
                    os.rename(self.result, self._out)
            except OSError as error:
                if not isinstance(error, (FileExistsError, NotADirectoryError)) and error.errno != errno.ENOTEMPTY:
                    raise
                refuse(self._op, "out", "a path where nothing is yet", f"'{self._out}', which exists by now")
            sync(self._out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder when the output has its name; last what tells of which call it is."""
        self._empty()
        for name in ("plan.new", "lock", "plan.json"):
            (self.folder / name).unlink(missing_ok=True)
        self.folder.rmdir()

    def close(self) -> None:
        """Let other calls use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def explaining(self, path: Path) -> Iterator[None]:
        """Say what was being written when the system refuses, and what becomes of the part that is there."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                why = f"no room to write '{path}': what there is stays in '{self.folder}', and the same call goes on"
            else:
                why = f"cannot write '{path}'"
            raise OSError(error.errno, f"{self._op}: {why} ({os.strerror(error.errno or 0)})") from error


class ShardWriter:
    """Appends to one file of the output, and notes in the journal what is durable."""

    def __init__(self, partial: Partial, shard: Shard, rank: int, done: int) -> None:
        self._partial, self._shard, self._rank = partial, shard, rank
        self._path = partial.result / shard.file
        with partial.explaining(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._file, done)
        self.position = self._durable = done
        if done < len(shard.header):
            self.position = 0
            self.write(shard.header)

    def write(self, data: Any) -> None:
        """Append the bytes of a tensor, or bytes."""
        rest = memoryview(_bytes(data) if isinstance(data, Tensor) else data)
        with self._partial.explaining(self._path):
            while rest:
                written = os.pwrite(self._file, rest, self.position)
                self.position += written
                rest = rest[written:]
        if self.position - self._durable >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Make durable what has been written so far."""
        with self._partial.explaining(self._path):
            os.fsync(self._file)
        self._durable = self.position
        self._partial.note(self._rank, {"file": self._shard.file, "bytes": self.position})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)


def _name_anew(path: Path, name: Path) -> None:
    """Rename a file, but never over another one, as :func:`os.rename` would."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links: the name is taken first, by nothing.
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(path, name)
    else:
        path.unlink()


def _is_plan(path: Path) -> bool:
    """Whether a file is the plan of a merge."""
    if not path.is_file():
        return False
    try:
        plan = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(plan, dict) and plan.get("format") == _FORMAT


def require_posix(op: str) -> None:
    """Refuse a system that lacks the locks and the writes at a place that are used here."""
    if importlib.util.find_spec("fcntl") is None or not hasattr(os, "pwrite"):
        raise NotImplementedError(f"{op} needs a POSIX system")


def _bytes(values: Tensor) -> Any:
    return values.contiguous().view(torch.uint8).numpy()


def warn(message: str) -> None:
    """Warn at the line that called the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "shiftkern":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
