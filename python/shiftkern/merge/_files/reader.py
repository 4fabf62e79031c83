"""Reading of safetensors files: strict about their headers, piece by piece from mapped memory."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import reprlib
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiftkern._checks import describe, refuse, refuse_type
from shiftkern.errors import ArgumentError

__all__ = ["BITS", "FLOATS", "Entry", "Model", "WeightFile", "open_model"]

#: Bits of an element, by the format's name of its dtype.
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

#: What is merged; everything else is copied.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_LONGEST_HEADER = 100_000_000
#: What NumPy and torch can have.
_MOST_DIMENSIONS = 64
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WHY_NOT = "pickled weights could run any code and are not read"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``begin`` and ``end`` count the file's bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: WeightFile

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def tile(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor: mapped memory, or a copy where that is unaligned."""
        dtype = FLOATS[self.dtype]
        raw = self.file.bytes(self.begin + start * dtype.itemsize, self.begin + stop * dtype.itemsize)
        return (raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()).view(dtype)

    def release(self, start: int, stop: int) -> None:
        """Tell the system that these elements have been used and the same number after them come next."""
        size = BITS[self.dtype] // 8
        ahead = self.begin + stop * size, self.begin + min(2 * stop - start, self.numel) * size
        self.file.advise(self.begin + start * size, self.begin + stop * size, ahead)


class WeightFile:
    """A safetensors file whose header has been checked."""

    def __init__(self, op: str, argument: str, path: Path) -> None:
        self.path = path
        self._op, self.argument = op, argument
        # Opened without waiting: a named pipe would keep us for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            status = os.fstat(file.fileno())
            if not path.is_file():
                self._refuse("a regular file", "something else")
            self.size, self.mtime = status.st_size, status.st_mtime_ns
            self.metadata, self.entries, self.header_hash = self._read_header(file)

    def _refuse(self, expected: str, got: str) -> Any:
        refuse(self._op, self.argument, expected, f"{got} in '{self.path}'")

    def _read_header(self, file: Any) -> tuple[dict[str, str], dict[str, Entry], str]:
        if self.size < 8:
            self._refuse("a safetensors file", f"{self.size} bytes")
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            self._refuse(f"a safetensors header of at most {_LONGEST_HEADER} bytes", f"one of {length} bytes")
        if length > self.size - 8:
            self._refuse("a complete safetensors file", f"a header of {length} bytes and {self.size - 8} bytes")
        raw = file.read(length)
        try:
            header = json.loads(raw.decode(), object_pairs_hook=self._unique, parse_constant=self._no_constant)
        except ArgumentError:
            raise
        except (ValueError, RecursionError) as error:
            self._refuse("a safetensors header in JSON", f"{type(error).__name__}: {str(error)[:100]}")
        if not isinstance(header, dict) or not raw.startswith(b"{"):
            self._refuse("a safetensors header that is a JSON object", describe(header))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._refuse("__metadata__ that maps strings to strings", describe(metadata))
        for text in (*header, *metadata, *metadata.values()):
            self._check_unicode(text)
        entries = [self._entry(name, value, 8 + length) for name, value in header.items()]
        entries.sort(key=lambda entry: (entry.begin, entry.end))
        position = 8 + length
        for entry in entries:
            if entry.begin != position:
                problem = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
                self._refuse("tensors without gaps or overlaps", f"tensor {entry.name!r} that {problem}")
            position = entry.end
        if position != self.size:
            last = f" after tensor {entries[-1].name!r}" if entries else ""
            self._refuse("tensors that fill the file", f"{self.size - position} bytes too many{last}")
        return metadata, {entry.name: entry for entry in entries}, hashlib.sha256(raw).hexdigest()

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            name = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self._refuse("each name once in the safetensors header", f"{name!r} several times")
        return dict(pairs)

    def _check_unicode(self, text: str) -> None:
        # JSON can escape half of a pair of surrogates, which no file can hold.
        try:
            text.encode()
        except UnicodeEncodeError:
            self._refuse("names and metadata in Unicode", describe(text))

    def _no_constant(self, text: str) -> Any:
        self._refuse("whole numbers in the safetensors header", text)

    def _entry(self, name: str, value: Any, data: int) -> Entry:
        what = f"tensor {name!r}"
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            self._refuse(f"dtype, shape and data_offsets of {what}", describe(value))
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            self._refuse(f"a known dtype of {what}", describe(dtype))
        for field, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
                self._refuse(f"whole numbers as {field} of {what}", describe(numbers))
        if len(shape) > _MOST_DIMENSIONS:
            self._refuse(f"at most {_MOST_DIMENSIONS} dimensions of {what}", f"{len(shape)}")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self._refuse(f"data_offsets [begin, end] of {what}", reprlib.repr(offsets))
        if data + offsets[1] > self.size:
            expected = f"a complete safetensors file with {what} up to byte {data + offsets[1]}"
            self._refuse(expected, f"{self.size} bytes")
        if math.prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
            self._refuse(
                f"as many bytes as dtype and shape of {what} make",
                f"{offsets[1] - offsets[0]} bytes for {dtype} of shape {reprlib.repr(shape)}",
            )
        return Entry(name, dtype, tuple(shape), data + offsets[0], data + offsets[1], self)

    def bytes(self, begin: int, end: int) -> Tensor:
        """Bytes of the file, as mapped memory that must not be written."""
        return self._mapped()[1][begin:end]

    def _mapped(self) -> tuple[mmap.mmap, Tensor]:
        found = _MAPPED.pop(self, None)
        if found is None:
            if self.changed():
                self._refuse("a file that stays as it is while it is merged", "a change")
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            with warnings.catch_warnings():
                # torch has no read-only tensors and says so; nothing here writes to its inputs.
                warnings.simplefilter("ignore")
                found = mapped, torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))
            while len(_MAPPED) >= _MOST_MAPPED:
                _MAPPED.pop(next(iter(_MAPPED)))
        # Last in the order of use.
        _MAPPED[self] = found
        return found

    def close(self) -> None:
        """Give back the mapped memory, once nothing sees it any more."""
        _MAPPED.pop(self, None)

    def advise(self, begin: int, end: int, ahead: tuple[int, int]) -> None:
        """Give back the pages of what has been used, and have those of what comes next read."""
        for advice, (first, last) in (("MADV_DONTNEED", (begin, end)), ("MADV_WILLNEED", ahead)):
            first -= first % mmap.PAGESIZE
            if hasattr(mmap, advice) and first < last:
                self._mapped()[0].madvise(getattr(mmap, advice), first, last - first)

    def changed(self) -> bool:
        """Whether the file is another one than when it was opened."""
        status = self.path.stat()
        return (status.st_size, status.st_mtime_ns) != (self.size, self.mtime)


#: Mapped files in the order of their last use. A mapping takes a file descriptor, of which there are few.
_MAPPED: dict[WeightFile, tuple[mmap.mmap, Tensor]] = {}
_MOST_MAPPED = 200


@dataclass(frozen=True)
class Model:
    """Weights in one file or in the shards of a folder; tensors in the order of their bytes."""

    argument: str
    path: Path
    files: tuple[WeightFile, ...]
    tensors: dict[str, Entry]


def open_model(op: str, argument: str, path: Any) -> Model:
    """Open a safetensors file, or a folder with ``model.safetensors`` or shards and their index."""
    if not isinstance(path, (str, os.PathLike)):
        refuse_type(op, argument, "the path of a safetensors file or of a folder with such files", describe(path))
    path = Path(path)
    if not path.exists():
        refuse(op, argument, "a safetensors file or a folder with such files", f"'{path}', which does not exist")
    if not path.is_dir():
        if path.suffix in _PICKLED:
            refuse(
                op, argument, "safetensors weights", f"'{path}': pickled weights could run any code and are not read"
            )
        names: dict[str, str] | None = None
        paths = [path]
    else:
        names, paths = _shards(op, argument, path)
    files = tuple(WeightFile(op, argument, name) for name in paths)
    tensors: dict[str, Entry] = {}
    for file in files:
        for name, entry in file.entries.items():
            if name in tensors:
                other = tensors[name].file.path
                refuse(op, argument, "each tensor once", f"{name!r} both in '{other}' and in '{file.path}'")
            tensors[name] = entry
            if names is not None and names.get(name) != file.path.name:
                where = f"to '{names[name]}'" if name in names else "nowhere"
                refuse(op, argument, f"{path / _INDEX} to assign {name!r} to '{file.path.name}', which has it", where)
    for name in (names or {}).keys() - tensors.keys():
        refuse(op, argument, f"tensor {name!r} in '{path / (names or {})[name]}', as the index says", "none there")
    return Model(argument, path, files, tensors)


def _shards(op: str, argument: str, folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """Names by tensor as the index has them, if there is one, and the files."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists() and index.exists():
        refuse(op, argument, f"either {_SINGLE} or {_INDEX}", f"both in '{folder}'")
    if single.exists():
        return None, [single]
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) == 1:
            return None, found
        pickled = sorted(name.name for name in folder.iterdir() if name.suffix in _PICKLED)
        got = f"{len(found)} other safetensors files" if found else "no safetensors files"
        if pickled:
            got += f", but '{pickled[0]}' ({_WHY_NOT})"
        refuse(op, argument, f"{_SINGLE}, or shards with {_INDEX}", f"{got} in '{folder}'")
    try:
        if index.stat().st_size > _LONGEST_HEADER:
            refuse(op, argument, f"an index of at most {_LONGEST_HEADER} bytes", f"'{index}'")
        weights = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in weights.items()}
        "".join((*names, *names.values())).encode()
    except ArgumentError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        refuse(op, argument, "an index in JSON with a weight_map", f"{type(error).__name__} in '{index}'")
    files = sorted(set(names.values()))
    for file in files:
        # A name with a folder in it could lead anywhere.
        if Path(file).name != file or not file.endswith(".safetensors"):
            refuse(op, argument, "names of safetensors files beside the index", f"{file!r} in '{index}'")
        if not (folder / file).is_file():
            refuse(op, argument, f"the shards that '{index}' names", f"no file '{folder / file}'")
    return names, [folder / file for file in files]
