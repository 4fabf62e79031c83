"""Merging of models that lie in files, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shiftkern import _checks
from shiftkern._runtime import build_info
from shiftkern.merge._files.compute import Job, Worker
from shiftkern.merge._files.output import Item, Partial, Shard, ShardWriter, make_shards, require_posix, sync, warn
from shiftkern.merge._files.ranks import Ranks
from shiftkern.merge._files.reader import FLOATS, Model, open_model
from shiftkern.merge._files.rules import Rule, make_rule

__all__ = ["MergeReport", "merge_files"]

_OP = "merge_files"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
#: Numbers that are copied although merging them would be meant.
_INEXACT = ("F4", "F6_", "F8_", "C64")
#: What belongs to a model besides its weights.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe", ".py")


@dataclass(frozen=True)
class MergeReport:
    """
    What :func:`merge_files` did.

    Attributes
    ----------
    out : Path
        The folder or file that was written.
    tensors : int
        Tensors in it.
    bytes_read : int
        Bytes of the inputs that this process looked at, once for each pass.
    bytes_written : int
        Bytes of weights that this process wrote in this call.
    seconds : float
        How long it took.
    peak : int
        Largest size, in bytes, that the buffers may have had at one time; at most ``memory``.
    """

    out: Path
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    peak: int


def merge_files(
    base: str | os.PathLike[str] | None,
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    method: str = "ties",
    *,
    weights: Sequence[float] | None = None,
    out_dtype: str | torch.dtype | None = None,
    memory: int | str = "1GB",
    resume: bool = True,
    progress: bool = True,
    max_shard_size: int | str = "5GB",
    copy_files: bool = True,
    **options: Any,
) -> MergeReport:
    """
    Merge models that lie in safetensors files, tile by tile.

    With task vectors ``tau_k = model_k - base``, of which a method keeps some entries, ``out = base + scale * sum_k w_k
    tau_k``, over those models that agree with the elected sign where the method elects one, and divided by their number
    or weight there. ``linear`` is ``sum_k w_k model_k``, and ``slerp`` the arc between two models.

    Parameters
    ----------
    base : path or None
        The model that all others were tuned from: a ``.safetensors`` file, or a folder with ``model.safetensors``, or
        with shards and their ``model.safetensors.index.json``. ``linear`` takes only order, dtypes and companion files
        from it, and may have None: then they are those of the first model. ``slerp`` goes from the base to the one
        model, or with None from the first to the second of two.
    models : sequence of paths
        Models with the same names and shapes of tensors.
    out : path
        Where nothing is yet: a folder to make, or a file if it ends in ``.safetensors``.
    method : str
        One of these, with its options and their defaults; ``density``, ``gamma``, ``epsilon`` and ``drop_rate`` are a
        number, or one for each model:

        - ``"linear"``: ``normalize=False``; True divides the weights by their sum;
        - ``"slerp"``: ``t=0.5``, tensor by tensor; on the line where the cosine is beyond 0.9995 either way;
        - ``"task_arithmetic"``: ``scale=1``, ``normalize=False``;
        - ``"ties"``: ``density=0.2``, ``scale=1``, ``trim_scope="tensor"`` or ``"global"``, ``elect="unweighted"`` or
          ``"weighted"``, ``divide_by="count"``, ``"weight"`` or ``"none"``, ``rescale="none"`` or ``"l1"``, and
          ``convention=None``, ``"paper"``, ``"peft"`` or ``"mergekit"``, which decides scope, election and divisor;
        - ``"dare_linear"``: ``drop_rate``, ``seed``, ``rescale="inverse"``, ``"l1"`` or ``"none"``, ``scale=1``,
          ``normalize=False``;
        - ``"dare_ties"``: the same with ``elect`` and ``divide_by`` in place of ``normalize``;
        - ``"breadcrumbs"``: ``density=0.9`` of which the largest ``gamma=0.01`` are not among, ``scale=1``,
          ``rescale="none"`` or ``"l1"``, ``normalize=False``;
        - ``"della"``: ``density``, ``epsilon``, ``seed``: entries are kept with a chance that grows from ``density -
          epsilon / 2`` to ``density + epsilon / 2`` with their rank in the row, a vector being one row; ``rescale``,
          ``scale``, ``elect`` and ``divide_by`` as above.
    weights : sequence of float, optional
        One for each model; default 1, and for ``linear`` 1 over their number.
    out_dtype : str or torch.dtype, optional
        float64, float32, float16 or bfloat16 for all tensors that are merged; default: the base's, tensor by tensor.
    memory : int or str
        Bound on the buffers, in bytes or as ``"512MB"`` or ``"1GiB"``. Mapped pages of the inputs do not count, but are
        given back as soon as they are used.
    resume : bool
        Go on where an equal call was stopped, rather than start anew.
    progress : bool
        Show a progress bar, if standard error is a terminal.
    max_shard_size : int or str
        Largest size of a file's tensors, of which a file has at least one. Not for a single file.
    copy_files : bool
        Copy configuration and tokenizer, but no weights, from the base's folder.
    **options
        Options of the method.

    Returns
    -------
    MergeReport
        Where, how much, how long.

    Raises
    ------
    ArgumentError
        Unknown options; a file that is no whole and valid safetensors file, or tensors that differ in name or shape,
        or hold NaN or an infinity: with file and tensor; a result that ``out_dtype`` cannot hold; an ``out`` that
        exists or lies in an input; a ``memory`` too small for one block.
    OSError
        What could not be read or written, and why. When the disk is full, room can be made and the call repeated.
    NotImplementedError
        Where the system is not a POSIX one.

    Notes
    -----
    Sums are float32, or float64 if a tensor or ``out_dtype`` is, and rounded once. The bytes of the result depend
    neither on ``memory``, nor on threads, processes or interruptions. Time is that of reading all inputs once.
    Trimming a tensor larger than ``memory`` reads it twice more, a global trim always all models, whatever ``memory``
    is (with ``convention="paper"`` three times more). In float64 ranks take four passes in place of two. ``slerp`` and
    ``rescale="l1"`` take one more. No tensor needs to fit anywhere.

    Tensors of integers, booleans and 8-bit floats are copied from the base, in ``linear`` from the first model. A trim
    keeps ``density * n`` entries, rounded, at least one, and all that equal the smallest of them.

    Inputs are mapped to memory and must not be shortened meanwhile. With ``"della"`` a row has to fit into ``memory``.

    The result grows in ``<out>.partial`` and gets its name when it is complete. Under ``torch.distributed`` (with a
    backend for CPU tensors) each process calls this with the same arguments, and merges its share of the files.

    References
    ----------
    Ilharco et al.: Editing Models with Task Arithmetic (2023). Yadav et al.: TIES-Merging (2023). Yu et al.: Language
    Models are Super Mario (2024). Davari and Belilovsky: Model Breadcrumbs (2024). Deep et al.: DELLA-Merging (2024).

    Examples
    --------
    >>> import os, tempfile, torch
    >>> from safetensors.torch import load_file, save_file
    >>> from shiftkern.merge import merge_files
    >>> folder = tempfile.mkdtemp()
    >>> path = lambda name: os.path.join(folder, name + ".safetensors")
    >>> save_file({"w": torch.tensor([1.0, 2.0])}, path("base"))
    >>> save_file({"w": torch.tensor([3.0, 2.0])}, path("tuned"))
    >>> report = merge_files(path("base"), [path("tuned")], path("merged"), "task_arithmetic", scale=0.5)
    >>> load_file(path("merged"))["w"]
    tensor([2., 2.])
    """
    began = time.perf_counter()
    ranks = Ranks()
    try:
        require_posix(_OP)
        budget, largest = _size("memory", memory), _size("max_shard_size", max_shard_size)
        for name, value in (("resume", resume), ("progress", progress), ("copy_files", copy_files)):
            _checks.flag(_OP, name, value)
        target = _target(out)
        opened = None if base is None else open_model(_OP, "base", base)
        if isinstance(models, (str, os.PathLike)) or not isinstance(models, Sequence):
            _checks.refuse_type(_OP, "models", "a list of paths", _checks.describe(models))
        if not models:
            _checks.refuse(_OP, "models", "at least one model", "none")
        tuned = [open_model(_OP, f"models[{k}]", path) for k, path in enumerate(models)]
        rule = make_rule(_OP, method, len(tuned), weights, options)
        merge = _Merge(rule, opened, tuned, target, budget, largest, _dtype(out_dtype), copy_files, ranks)
        written = merge.run(resume, progress)
    except BaseException as error:
        ranks.agree(error)
        raise
    return MergeReport(target, len(merge.items), merge.seen, written, time.perf_counter() - began, merge.worker.peak)


class _Merge:
    """One call: what to write where, and the steps of writing it."""

    def __init__(
        self,
        rule: Rule,
        base: Model | None,
        models: list[Model],
        target: Path,
        memory: int,
        largest: int,
        dtype: str | None,
        copy_files: bool,
        ranks: Ranks,
    ) -> None:
        self._rule, self._target, self._ranks = rule, target, ranks
        self._inputs = models if base is None else [base, *models]
        self._copy_files, self._dtype = copy_files, dtype
        for model in self._inputs:
            folder = Path(os.path.realpath(model.path))
            if folder == target or (folder.is_dir() and folder in target.parents):
                _checks.refuse(_OP, "out", f"a path outside of the inputs, such as '{model.path}'", f"'{target}'")
        self.items = _items(rule, base, models, dtype)
        single = target.suffix == ".safetensors"
        self._shards = make_shards(self.items, None if single else largest, self._inputs[0].files[0].metadata)
        self._partial = Partial(_OP, target, single)
        jobs = [item.job for item in self.items if item.job is not None]
        self._chunk = min(memory, 1 << 24)
        self.worker = Worker(_OP, rule, len(models), memory, jobs, self._see)
        #: Bytes looked at so far.
        self.seen = 0
        self._bar: Any = None

    def _see(self, nbytes: int) -> None:
        self.seen += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)

    def run(self, resume: bool, progress: bool) -> int:
        """Write what is not there yet; return how many bytes."""
        partial, ranks = self._partial, self._ranks
        try:
            if ranks.first(lambda: partial.open(self._plan(), resume)):
                ranks.first(partial.remove)
                return 0
            done, notes = partial.journal()
            # So that none reads a journal to which another writes already.
            ranks.agree()
            written = self._write(done, notes.get("whole"), progress)
            ranks.agree()
            ranks.first(self._finish)
            return written
        finally:
            partial.close()
            for file in (file for model in self._inputs for file in model.files):
                file.close()

    def _plan(self) -> dict[str, Any]:
        """All that the bytes of the output follow from."""
        files = [
            (os.path.realpath(file.path), file.size, file.mtime, file.header_hash)
            for model in self._inputs
            for file in model.files
        ]
        shards = [(shard.file, shard.nbytes, hashlib.sha256(shard.header).hexdigest()) for shard in self._shards]
        version = build_info()["version"]
        return {"version": version, "inputs": files, "rule": asdict(self._rule), "shards": shards}

    def _write(self, done: dict[str, int], whole: dict[str, Any] | None, progress: bool) -> int:
        from tqdm import tqdm

        own = self._shards[self._ranks.rank :: self._ranks.size]
        todo = [
            item for shard in own for begin, item in shard.places() if begin + item.nbytes > done.get(shard.file, 0)
        ]
        share = [item.job for shard in own for item in shard.items if item.job is not None]
        total = sum(self.worker.reads(item.job) if item.job is not None else item.nbytes for item in todo)
        if whole is None:
            total += self.worker.reads_of_all(share)
        quiet = True if not progress or self._ranks.rank else None
        written = 0
        with tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=quiet) as self._bar:
            if self._rule.scope == "global":
                jobs = [item.job for item in self.items if item.job is not None]
                found = self.worker.look_at_all(jobs, share, whole, self._ranks.add)
                if whole is None and self._ranks.rank == 0:
                    self._partial.note(0, {"whole": found})
            for shard in own:
                written += self._write_shard(shard, done.get(shard.file, 0))
        return written

    def _write_shard(self, shard: Shard, done: int) -> int:
        if done == shard.nbytes:
            return 0
        with ShardWriter(self._partial, shard, self._ranks.rank, done) as writer:
            for begin, item in shard.places():
                # Bytes of it that are there already.
                there = min(max(0, writer.position - begin), item.nbytes)
                if there == item.nbytes:
                    continue
                if item.job is None:
                    source = item.source
                    for first in range(source.begin + there, source.end, self._chunk):
                        last = min(first + self._chunk, source.end)
                        writer.write(source.file.bytes(first, last))
                        source.file.advise(first, last, (last, min(last + self._chunk, source.end)))
                        self._see(last - first)
                    continue
                found = self.worker.statistics(item.job)
                for start, stop in self.worker.tiles(item.job, there // item.job.out.itemsize):
                    writer.write(self.worker.merged(item.job, found, start, stop))
            writer.commit()
            return writer.position - done

    def _finish(self) -> None:
        for model in self._inputs:
            for file in model.files:
                if file.changed():
                    _checks.refuse(
                        _OP, model.argument, f"'{file.path}' to stay as it is while it is merged", "a change"
                    )
        result = self._partial.result
        with self._partial.explaining(result):
            if self._target.suffix != ".safetensors":
                if len(self._shards) > 1:
                    names = {item.name: shard.file for shard in self._shards for item in shard.items}
                    size = sum(item.nbytes for item in self.items)
                    index = {"metadata": {"total_size": size}, "weight_map": names}
                    _write_bytes(result / "model.safetensors.index.json", json.dumps(index, indent=2).encode())
                if self._copy_files and self._inputs[0].path.is_dir():
                    self._copy_companions(self._inputs[0].path, result)
        self._partial.finish()

    def _copy_companions(self, folder: Path, result: Path) -> None:
        for path in sorted(folder.iterdir()):
            belongs = path.suffix in _COMPANIONS and not path.name.endswith(".index.json")
            if not path.is_file() or not (belongs or path.name.startswith(("LICENSE", "NOTICE"))):
                continue
            if path.name == "config.json" and self._dtype is not None:
                _write_bytes(result / path.name, _with_dtype(path.read_bytes(), self._dtype))
            else:
                shutil.copyfile(path, result / path.name)
                sync(result / path.name)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """A model's configuration, with the dtype that its weights have now; as it is, where it is no JSON."""
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return config
    given = [key for key in ("dtype", "torch_dtype") if isinstance(values, dict) and key in values]
    if not given:
        return config
    values |= {key: str(FLOATS[dtype]).removeprefix("torch.") for key in given}
    return json.dumps(values, indent=2).encode()


def _items(rule: Rule, base: Model | None, models: list[Model], dtype: str | None) -> list[Item]:
    """The tensors of the output in order, each with what it is made from."""
    if rule.needs_base and base is None:
        _checks.refuse_type(_OP, "base", f"a model, which {rule.method} needs", "None")
    inputs = models if base is None else [base, *models]
    if rule.method == "slerp" and len(inputs) != 2:
        expected = "one model with a base, or two without" if base is None else "one model, as there is a base"
        _checks.refuse(_OP, "models", expected, f"{len(models)}")
    layout = inputs[0]
    for model in inputs[1:]:
        for kind, names in (
            ("lacks", layout.tensors.keys() - model.tensors.keys()),
            ("adds", model.tensors.keys() - layout.tensors.keys()),
        ):
            if names:
                expected = f"the tensors of '{layout.path}'"
                _checks.refuse(_OP, model.argument, expected, f"'{model.path}', which {kind} {sorted(names)[:3]}")
    items = []
    for name, first in layout.tensors.items():
        entries = [model.tensors[name] for model in inputs]
        for model, entry in zip(inputs, entries, strict=True):
            if entry.shape != first.shape:
                expected = f"shape {first.shape} for tensor {name!r}, as in '{first.file.path}'"
                _checks.refuse(_OP, model.argument, expected, f"{entry.shape} in '{entry.file.path}'")
            if entry.dtype != first.dtype and not (entry.dtype in FLOATS and first.dtype in FLOATS):
                expected = f"dtype {first.dtype} for tensor {name!r}, as in '{first.file.path}'"
                _checks.refuse_type(_OP, model.argument, expected, f"{entry.dtype} in '{entry.file.path}'")
        own = entries if base is None else entries[1:]
        if first.dtype not in FLOATS:
            items.append(Item(name, first.dtype, first.shape, None, own[0] if rule.method == "linear" else first))
            continue
        result = first.dtype if dtype is None else dtype
        if rule.needs_base:
            job = Job(name, first, own, FLOATS[result])
        else:
            job = Job(name, None, own if rule.method == "linear" else entries, FLOATS[result])
        items.append(Item(name, result, first.shape, job, first))
    copied = [item.name for item in items if item.dtype.startswith(_INEXACT)]
    if copied:
        warn(f"{_OP}: {len(copied)} tensors of narrow or complex floats, such as {copied[0]!r}, are copied, not merged")
    return items


def _target(out: Any) -> Path:
    if not isinstance(out, (str, os.PathLike)):
        _checks.refuse_type(_OP, "out", "a path", _checks.describe(out))
    folder, name = os.path.split(os.path.abspath(os.fsdecode(out)))
    return Path(os.path.realpath(folder)) / name


def _size(name: str, value: Any) -> int:
    """Bytes, from a number or a text with a unit."""
    if not isinstance(value, str):
        return _checks.positive_int(_OP, name, value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", value, re.IGNORECASE)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None:
        _checks.refuse(_OP, name, "bytes, or a text such as '512MB' or '1GiB'", repr(value))
    return _checks.positive_int(_OP, name, int(float(match[1]) * unit))


def _dtype(value: Any) -> str | None:
    """The format's name of a float dtype."""
    if value is None:
        return None
    names = {str(dtype).removeprefix("torch."): name for name, dtype in FLOATS.items()}
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    return names[_checks.one_of(_OP, "out_dtype", value, names)]
