"""Merges described as mergekit describes them, in YAML."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shiftkern import _checks
from shiftkern.errors import ArgumentError

__all__ = ["MergeConfig", "read_config"]

_OP = "read_config"
#: What each method takes for each model, besides its weight, and for all; with mergekit's defaults.
_TASK = {"normalize": False, "lambda": 1.0, "int8_mask": False}
_METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {"normalize": True}),
    "slerp": ({}, {"t": None}),
    "task_arithmetic": ({}, _TASK),
    "ties": ({"density": 1.0}, {**_TASK, "normalize": True, "rescale": False}),
    "dare_linear": ({"density": 1.0}, {**_TASK, "rescale": True}),
    "dare_ties": ({"density": 1.0}, {**_TASK, "rescale": True}),
    "breadcrumbs": ({"density": 1.0, "gamma": 0.01}, {**_TASK, "rescale": False}),
    "della": ({"density": 1.0, "epsilon": 0.15}, {**_TASK, "normalize": True, "rescale": True}),
}
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_TOP = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
_UNSUPPORTED = {
    "slices": "whole models under 'models'; merges of slices are not supported",
    "modules": "whole models under 'models'; merges of modules are not supported",
    "tokenizer": "no such key: the tokenizer is copied from the base",
    "tokenizer_source": "no such key: the tokenizer is copied from the base",
    "chat_template": "no such key: the template is copied from the base",
}


@dataclass(frozen=True)
class MergeConfig:
    """
    Arguments of :func:`shiftkern.merge.merge_files`.

    Attributes
    ----------
    base : str or None
        The base model.
    models : list of str
        The models to merge.
    method : str
        The method.
    options : dict
        Weights, ``out_dtype`` where the file has one, and the method's options.
    """

    base: str | None
    models: list[str]
    method: str
    options: dict[str, Any]


def read_config(path: str | os.PathLike[str], *, seed: int = 0) -> MergeConfig:
    """
    Read a merge that is described as mergekit describes it.

    Understood are ``merge_method`` (linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, della),
    ``base_model``, ``models`` with ``parameters``, ``parameters`` for all of them, ``dtype`` and ``out_dtype``, with
    mergekit's defaults and meaning: signs are elected on weighted task vectors, ``normalize`` divides by the sum of
    weights, ``rescale`` restores the L1 norm of what was thinned out. Anything else is an error, never ignored.

    Parameters
    ----------
    path : path
        The YAML file. Models in it are paths, relative to the working directory.
    seed : int
        Seed for the methods that draw, which mergekit takes from its command line.

    Returns
    -------
    MergeConfig
        What to pass to :func:`shiftkern.merge.merge_files`.

    Raises
    ------
    ArgumentError
        No YAML, or keys or values that are not supported: with the place in the file.
    OSError
        A file that cannot be read.

    Notes
    -----
    ``dtype``, which in mergekit is that of the arithmetic, is that of the output where there is no ``out_dtype``; the
    arithmetic is in float32 at least. Counts of kept entries are rounded to the nearest where mergekit rounds down.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from shiftkern.merge.config import read_config
    >>> path = pathlib.Path(tempfile.mkdtemp(), "merge.yaml")
    >>> _ = path.write_text("{merge_method: linear, parameters: {weight: 1}, models: [{model: a}, {model: b}]}")
    >>> read_config(path)
    MergeConfig(base=None, models=['a', 'b'], method='linear', options={'weights': [1.0, 1.0], 'normalize': True})
    """
    seed = _checks.seed(_OP, "seed", seed)
    if not isinstance(path, (str, os.PathLike)):
        _checks.refuse_type(_OP, "path", "a path", _checks.describe(path))
    return _Reader(Path(path)).read(seed)


class _Reader:
    """Reads one file, and knows its name for errors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _refuse(self, where: str, expected: str, got: object) -> NoReturn:
        _checks.refuse(_OP, "path", f"{expected} at '{where}' in '{self._path}'", got)

    def _load(self) -> Any:
        import yaml

        class Loader(yaml.SafeLoader):
            """Plain values only, and each key once."""

        def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, count in keys.items():
                if count > 1:
                    self._refuse(key, "a key once", f"it {count} times")
            return loader.construct_mapping(node, deep=True)

        Loader.add_constructor("tag:yaml.org,2002:map", mapping)
        try:
            return yaml.load(self._path.read_bytes(), Loader)
        except ArgumentError:
            raise
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            _checks.refuse(_OP, "path", f"YAML in '{self._path}'", " ".join(str(error).split()))

    def _mapping(self, where: str, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self._refuse(where, "keys with values", _checks.describe(value))
        return value

    def _known(self, where: str, values: dict[str, Any], known: Any) -> None:
        for key in values:
            if key not in known:
                self._refuse(f"{where}{key}", f"one of {', '.join(known)}", "an unknown key")

    def read(self, seed: int) -> MergeConfig:
        """Read the file."""
        top = self._load()
        if not isinstance(top, dict):
            _checks.refuse(_OP, "path", f"keys with values in '{self._path}'", _checks.describe(top))
        top = self._mapping("", top)
        for key, expected in _UNSUPPORTED.items():
            if key in top:
                self._refuse(key, expected, "this key")
        self._known("", top, _TOP)
        method = top.get("merge_method")
        if method not in tuple(_METHODS):
            self._refuse("merge_method", f"one of {', '.join(_METHODS)}", _checks.describe(method))
        of_model, of_all = _METHODS[method]
        of_model = {"weight": None, **of_model} if method != "slerp" else {}
        base = top.get("base_model")
        if base is not None and not isinstance(base, str):
            self._refuse("base_model", "a path", _checks.describe(base))

        common = self._mapping("parameters", top.get("parameters"))
        self._known("parameters.", common, [*of_model, *of_all])
        models, own = self._models(top.get("models"), of_model)
        models, own = self._without_base(method, base, models, own)
        each = {
            name: [
                self._number(f"models[{k}].parameters.{name}", name, values.get(name, common.get(name, default)))
                for k, values in enumerate(own)
            ]
            for name, default in of_model.items()
        }
        if method == "della":
            for k, (density, epsilon) in enumerate(zip(each["density"], each["epsilon"], strict=True)):
                # At density 1 nothing is dropped, whatever epsilon is.
                outside = density < 1.0 and (density <= epsilon or 1.0 - density < epsilon)
                if outside or density > 1.0 or epsilon < 0.0:
                    expected = "density - epsilon above 0 and density + epsilon up to 1, or density 1"
                    self._refuse(f"models[{k}].parameters", expected, f"density {density} and epsilon {epsilon}")
        options: dict[str, Any] = {}
        for name, default in of_all.items():
            value = common.get(name, default)
            kind = self._number if name in ("lambda", "t") else self._flag
            options[name] = kind(f"parameters.{name}", name, value)
        return MergeConfig(base, models, method, _arguments(method, each, options, seed) | self._dtypes(top))

    def _models(self, models: Any, known: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
        if not isinstance(models, list) or not models:
            self._refuse("models", "a list of models", _checks.describe(models))
        paths, own = [], []
        for k, model in enumerate(models):
            model = self._mapping(f"models[{k}]", model)
            self._known(f"models[{k}].", model, ("model", "parameters"))
            if not isinstance(model.get("model"), str):
                self._refuse(f"models[{k}].model", "a path", _checks.describe(model.get("model")))
            values = self._mapping(f"models[{k}].parameters", model.get("parameters"))
            self._known(f"models[{k}].parameters.", values, known)
            paths.append(model["model"])
            own.append(values)
        return paths, own

    def _without_base(
        self, method: str, base: str | None, models: list[str], own: list[dict[str, Any]]
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Drop the base from the models, among which mergekit allows it, but for linear, where it is one of them."""
        if base is None:
            if method != "linear":
                self._refuse("base_model", f"a base, which {method} needs", "none")
            return models, own
        if method == "linear":
            if base not in models:
                self._refuse("base_model", "one of the models, as linear has no base", repr(base))
            return models, own
        for k, (model, values) in enumerate(zip(models, own, strict=True)):
            if model == base and values:
                self._refuse(f"models[{k}].parameters", "none for the base, which has no task vector", values)
        others = [(model, values) for model, values in zip(models, own, strict=True) if model != base]
        if not others or (method == "slerp" and len(others) != 1):
            expected = "one model besides the base" if method == "slerp" else "models besides the base"
            self._refuse("models", expected, f"{len(others)}")
        return [model for model, _ in others], [values for _, values in others]

    def _number(self, where: str, name: str, value: Any) -> float:
        if value is None:
            self._refuse(where, f"a {name}, here or under parameters for all", "none")
        if isinstance(value, list):
            self._refuse(where, "a number; gradients and filters by layer are not supported", _checks.describe(value))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._refuse(where, "a number", _checks.describe(value))
        return _checks.number(_OP, name, value)

    def _flag(self, where: str, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self._refuse(where, "true or false", _checks.describe(value))
        return value

    def _dtypes(self, top: dict[str, Any]) -> dict[str, Any]:
        for key in ("dtype", "out_dtype"):
            if top.get(key) is not None and top[key] not in _DTYPES:
                self._refuse(key, f"one of {', '.join(_DTYPES)}", _checks.describe(top[key]))
        inner = top.get("dtype")
        result = top.get("out_dtype") or inner
        if inner == "float64" and result != inner:
            self._refuse("dtype", "float64 only with float64 output", f"out_dtype {result}")
        return {} if result is None else {"out_dtype": result}


def _arguments(method: str, each: dict[str, list[float]], of_all: dict[str, Any], seed: int) -> dict[str, Any]:
    """Translate mergekit's parameters into arguments of ``merge_files``."""
    if method == "slerp":
        return {"t": of_all["t"]}
    options: dict[str, Any] = {"weights": each["weight"]}
    if method in ("linear", "task_arithmetic", "dare_linear", "breadcrumbs"):
        options["normalize"] = of_all["normalize"]
    else:
        options["elect"] = "weighted"
        options["divide_by"] = "weight" if of_all["normalize"] else "none"
    if "lambda" in of_all:
        options["scale"] = of_all["lambda"]
    if "rescale" in of_all:
        options["rescale"] = "l1" if of_all["rescale"] else "none"
    if method in ("dare_linear", "dare_ties"):
        options["drop_rate"] = [1.0 - density for density in each["density"]]
    options |= {
        name: each[name] for name in ("density", "gamma", "epsilon") if name in each and "drop_rate" not in options
    }
    if method == "della":
        # Half the width of the range there, the width here.
        options["epsilon"] = [
            2.0 * epsilon if density < 1.0 else 0.0
            for density, epsilon in zip(each["density"], each["epsilon"], strict=True)
        ]
    if method in ("dare_linear", "dare_ties", "della"):
        options["seed"] = seed
    return options
