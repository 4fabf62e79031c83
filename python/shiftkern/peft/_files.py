"""Adapters as files: tensors in safetensors, the config in JSON, no pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.errors import ArgumentError
from shiftkern.peft._adapter import Adapter, Config
from shiftkern.peft._layer import TrainedCopies
from shiftkern.peft._model import Plan, active_names, adapted_layers, check_name, commit, injected, names_of, plan
from shiftkern.peft._targets import base_slots, find

__all__ = ["load", "save"]

M = TypeVar("M", bound=nn.Module)

_TENSORS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_TOP = "default"


def save(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write adapters to a folder, without the base model.

    Each adapter is two files, ``adapter_model.safetensors`` and ``adapter_config.json``: those of "default" in the
    folder itself, those of others in a folder of their name below it. Each file appears complete or not at all, and
    one from an interrupted saving is recognised by :func:`load`. Merged adapters are saved like others. What the folder
    holds of adapters with other names stays there.

    Parameters
    ----------
    model : nn.Module
        A model after :func:`inject`.
    directory : str or path
        The folder; made if need be.
    adapter_name : str, optional
        Which one. None: all.

    Raises
    ------
    ArgumentError
        A model without adapters, a name that it does not have, a path that is a file.

    Examples
    --------
    >>> import tempfile, torch
    >>> from shiftkern.peft import LoRAConfig, inject, load, save
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 2).requires_grad_(False))
    >>> model = inject(make(), LoRAConfig(r=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder)
    ...     again = load(make(), folder)
    >>> torch.equal(again[0].adapters["default"].A, model[0].adapters["default"].A)
    True
    """
    op = "save"
    injected(op, model)
    names = names_of(model)
    if adapter_name is not None:
        if not isinstance(adapter_name, str) or adapter_name not in names:
            _checks.refuse(op, "adapter_name", f"one of {', '.join(map(repr, names))}", repr(adapter_name))
        names = [adapter_name]
    folder = _path(op, directory)
    if folder.exists() and not folder.is_dir():
        _checks.refuse(op, "directory", "a folder", f"the file '{folder}'")
    active = active_names(model)
    for name in names:
        adapters = {place: layer.adapter(name) for place, layer in _layers(model, name)}
        config, *others = (layer.configs[name] for _, layer in _layers(model, name))
        if any(other != config for other in others):
            _checks.refuse(op, "model", f"adapters {name!r} of one injection", "several configs of that name")
        wrappers = [(s.name, s.module) for s in base_slots(model)]
        copies = {n: w.copies[name] for n, w in wrappers if isinstance(w, TrainedCopies) and name in w.copies}
        tensors = {key: value.detach().to("cpu").clone().contiguous() for key, value in _state(adapters, copies)}
        described = config.to_dict()
        values = {**described, "active": active.index(name) if name in active else None}
        if config.target_modules == "all-linear":
            # Such as those that another adapter trains in full, which a model may be loaded without.
            linear = find(op, "model", model, "all-linear")
            values["left_out"] = [slot.name for slot in linear if slot.name not in adapters]
        text = json.dumps(values, indent=2)
        target = folder if name == _TOP else folder / name
        target.mkdir(parents=True, exist_ok=True)
        # The tensors carry the config as well, so that files of two savings are not taken for one.
        note = {"format": "pt", "config": json.dumps(described, sort_keys=True)}
        _replace(target / _TENSORS, lambda path, t=tensors, n=note: save_file(t, path, n))  # type: ignore[misc]
        _replace(target / _CONFIG, lambda path, t=text: path.write_text(t + "\n", encoding="utf-8"))  # type: ignore[misc]


def load(model: M, directory: str | os.PathLike[str], adapter_name: str | None = None) -> M:
    """Put the adapters of a folder that :func:`save` wrote into a base model, in place.

    They act in the order in which they did. The model is left as it was if anything is refused.

    Parameters
    ----------
    model : nn.Module
        The base model; it may have adapters of other names.
    directory : str or path
        The folder.
    adapter_name : str, optional
        Which one: the folder of that name below ``directory`` or, where there is none, the files in ``directory``
        itself, whose adapter gets that name. None: all that are there.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    ArgumentError
        Files that are missing, damaged, of another version or method, or that do not fit the model or each other;
        names that are taken; values that are not finite.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.peft import LoRAConfig, inject, load, save
    >>> model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2))
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder)
    ...     fresh = load(torch.nn.Sequential(torch.nn.Linear(4, 4)), folder)
    >>> type(fresh[0]).__name__
    'AdaptedLayer'
    """
    op = "load"
    folder = _path(op, directory)
    if adapter_name is not None:
        # Before it is made a part of a path.
        check_name(op, adapter_name)
    found = _folders(op, folder, adapter_name)
    plans = [_read(op, model, name, place) for name, place in found]
    whole = {id(inner) for made, _ in plans for slot, _ in made.copies for inner in slot.base.modules()}
    for made, _ in plans:
        for slot, _ in made.adapters:
            if id(slot.base) in whole:
                got = f"{slot.name!r} adapted by one and trained in full by another"
                _checks.refuse(op, "directory", f"adapters that fit each other in '{folder}'", got)
    order = sorted(plans, key=lambda entry: (entry[1] is None, entry[1] or 0))
    for made, position in order:
        commit(model, made, active=position is not None)
    return model


def _folders(op: str, folder: Path, name: str | None) -> list[tuple[str, Path]]:
    """Names of adapters and the folders that hold their files."""
    if name is not None and name != _TOP and (folder / name / _CONFIG).is_file():
        return [(name, folder / name)]
    here = (folder / _CONFIG).is_file()
    if name is not None and here:
        return [(name, folder)]
    below = sorted(path.parent for path in folder.glob(f"*/{_CONFIG}")) if folder.is_dir() else []
    found = ([(_TOP, folder)] if here else []) + [(path.name, path) for path in below]
    if name is not None or not found:
        names = f" and has only {', '.join(n for n, _ in found)}" if found else ""
        _checks.refuse(op, "directory", f"a folder with {_CONFIG}", f"'{folder}', which has none{names}")
    return found


def _read(op: str, model: nn.Module, name: str, folder: Path) -> tuple[Plan, int | None]:
    """Prepare the injection of one adapter, with the tensors of its file."""
    source = folder / _CONFIG
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        _checks.refuse(op, "directory", f"JSON in '{source}'", str(error))
    position = values.pop("active", 0) if isinstance(values, dict) else 0
    if position is not None and (isinstance(position, bool) or not isinstance(position, int)):
        _checks.refuse(op, "directory", f"an integer or null as 'active' in '{source}'", repr(position))
    left_out = values.pop("left_out", []) if isinstance(values, dict) else []
    if not isinstance(left_out, list) or not all(isinstance(entry, str) for entry in left_out):
        _checks.refuse(op, "directory", f"names of modules as 'left_out' in '{source}'", repr(left_out))
    try:
        config = Config.from_dict(values, f"'{source}'")
        made = plan(op, model, config, name, left_out)
    except ArgumentError as error:
        raise type(error)(f"{op}: '{source}': {error}") from error
    adapters = {slot.name: adapter for slot, adapter in made.adapters}
    expected = dict(_state(adapters, {slot.name: copy for slot, copy in made.copies}))
    _fill(op, folder / _TENSORS, config, expected)
    return made, position


def _fill(op: str, path: Path, config: Config, expected: dict[str, Tensor]) -> None:
    """Copy a file's tensors into those that are expected; every one must be there, fit, and be finite."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            note = (file.metadata() or {}).get("config")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, SafetensorError) as error:
        _checks.refuse(op, "directory", f"safetensors in '{path}'", str(error))
    if note is not None and note != json.dumps(config.to_dict(), sort_keys=True):
        expected_note = f"'{path}' and '{_CONFIG}' of one saving"
        _checks.refuse(op, "directory", expected_note, f"tensors that were saved with {note}")
    for key in expected.keys() - tensors.keys():
        _checks.refuse(op, "directory", f"the tensor {key!r} in '{path}', as the model needs it", "none of that name")
    for key in tensors.keys() - expected.keys():
        _checks.refuse(op, "directory", f"tensors in '{path}' for which the model has a place", repr(key))
    for key, value in expected.items():
        given = tensors[key]
        same_type = given.dtype == value.dtype or (given.is_floating_point() and value.is_floating_point())
        if given.shape != value.shape or not same_type:
            fits = f"{key!r} of shape {tuple(value.shape)} and dtype {value.dtype} in '{path}'"
            _checks.refuse(op, "directory", fits, _checks.describe(given))
        # In the type that they get, in which a large number may be infinite. Buffers of the model may be so themselves.
        bad = ~torch.isfinite(given.to(value.dtype))
        if bool(bad.any()) and (value.is_meta or bool((bad & torch.isfinite(value).to(bad.device)).any())):
            _checks.refuse(op, "directory", f"finite numbers in {key!r} in '{path}'", "NaN or infinity")
    with torch.no_grad():
        for key, value in expected.items():
            value.copy_(tensors[key])


def _state(adapters: dict[str, Adapter], copies: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Go through all tensors of one adapter with their names in the file."""
    for place, adapter in adapters.items():
        for key, value in adapter.own_state():
            yield f"layers.{place}.{key}", value
    shared = next((a.shared for a in adapters.values() if isinstance(getattr(a, "shared", None), nn.Module)), None)
    if isinstance(shared, nn.Module):
        for key, value in shared.state_dict(keep_vars=True).items():
            yield f"shared.{key}", value
    for place, copy in copies.items():
        for key, value in copy.state_dict(keep_vars=True).items():
            yield f"modules.{place}.{key}", value


def _layers(model: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    return ((place, layer) for place, layer in adapted_layers(model).items() if name in layer.adapters)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place and move it there when it is complete."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = Path(folder) / "new"
        # Those who may read other new files may read this one; safetensors makes files for their owner alone.
        beside.touch()
        mode = beside.stat().st_mode
        write(beside)
        beside.chmod(mode)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)


def _path(op: str, directory: Any) -> Path:
    if not isinstance(directory, (str, os.PathLike)):
        _checks.refuse_type(op, "directory", "a path", _checks.describe(directory))
    return Path(directory)
