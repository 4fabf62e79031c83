"""Hostile calls: valid arguments of every public name, one or two of them spoilt, and what may come of it.

A call is a number: its name, its arguments and what is done to them follow from a seed and that number alone. Calls run
in processes of their own, which tell before each call which one it is; so one that hangs or kills the process is known.
What may come of a call: a result, or an error of this library that names the operator and the argument. Everything else
is a defect, but for the few outcomes in ``ALLOWED``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shiftkern.errors import NotDifferentiableError, ShiftkernError

from helpers.strategies import lay_out

Arguments = dict[str, Any]

#: Seconds for one call of a few hundred numbers, on a machine that does a lot besides.
LIMIT = 30.0
#: Bytes that a process may take beside what it has at its start: an absurd size must fail and not fill the machine.
MEMORY = 3 << 30

#: Arguments for which a huge number is a valid wish for years of work, wherever they occur.
PATIENT = re.compile(
    r"(^|_)(n_iter|max_iter|inner|n_steps|inner_steps|steps|full_steps|num_augmentations|terms|epochs)$"
)


# --- Drawing ----------------------------------------------------------------------------------------------------------


class Draw(random.Random):
    """A seeded source of tensors and choices."""

    def chance(self, share: float) -> bool:
        return self.random() < share

    def dtype(self, half: bool = True) -> torch.dtype:
        """A float type; mostly float32."""
        wide = [torch.float32] * 4 + [torch.float64] * 2
        return self.choice([*wide, torch.float16, torch.bfloat16] if half else wide)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, layouts: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(48))
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if layouts and x.dim() > 0 and self.chance(0.3):
            kinds = ["sliced", "transposed", "offset"] + ["channels_last"] * (x.dim() > 1)
            x = lay_out(x, self.choice(kinds))
        return x

    def positive(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.normal(*shape, dtype=torch.float64).square() + 0.1).to(dtype)

    def weights(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Positive numbers that sum to one along the last axis."""
        return self.normal(*shape, dtype=torch.float64).softmax(-1).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.tensor([self.randrange(low, high) for _ in range(int(np.prod(shape)))]).reshape(shape)

    def state(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {name: self.normal(*shape, dtype=dtype) for name, shape in shapes.items()}

    def options(self, **choices: Any) -> Arguments:
        """About half of some keyword arguments, each from its choices."""
        return {name: self.choice(values) for name, values in choices.items() if self.chance(0.5)}


class CallersError(Exception):
    """The caller's own model or function failed; what it raised passes through."""


# --- Spoiling ---------------------------------------------------------------------------------------------------------


class Stranger:
    """A class where something else is expected; where it is called, that is the caller's own error."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise CallersError


_ALIENS: list[Callable[[Draw], Any]] = [
    lambda d: None,
    lambda d: True,
    lambda d: False,
    lambda d: d.choice(["", "text", "0", "\0", "é" * 40]),
    lambda d: b"bytes",
    lambda d: [],
    lambda d: (),
    lambda d: {},
    lambda d: {1: torch.ones(2)},
    lambda d: object(),
    lambda d: d.choice([float("nan"), float("inf"), -float("inf")]),
    lambda d: d.choice([0, -1, 1, 3, 0.5, -2.5]),
    lambda d: d.choice([2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400]),
    lambda d: 1j,
    lambda d: np.float32(0.5),
    lambda d: np.int64(2),
    lambda d: np.array([1.0, 2.0]),
    lambda d: np.array(["a", "b"]),
    lambda d: np.array([object(), None]),
    lambda d: torch.tensor(1.0),
    lambda d: torch.tensor([1, 2, 3]),
    lambda d: torch.empty(0),
    lambda d: torch.empty(2, 3, device="meta"),
    lambda d: [[1.0, 2.0], [3.0]],
    lambda d: [[1.0, 2.0], [3.0, 4.0]],
    lambda d: iter([1, 2]),
    lambda d: lambda *_, **__: None,
    lambda d: torch.float32,
    lambda d: torch.device("meta"),
    lambda d: Stranger,
    lambda d: nn.Linear(2, 2),
    lambda d: range(3),
    lambda d: Path("nowhere"),
]


def _number(d: Draw, value: float) -> Any:
    odd = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, 2.0, 1e308, -1e308, 1e-308, 5e-324, 1e30, 1e-30]
    near = [-value, value * 2, value / 2, value + 1, int(value), True, np.float32(value), np.float64(value)]
    other = [str(value), complex(value), [value], np.array(value), np.array([value]), torch.tensor(value)]
    tensors = [
        torch.tensor([value, value]),
        torch.tensor(value, requires_grad=True),
        torch.tensor(value, device="meta"),
    ]
    return d.choice([*odd, *near, *other, *tensors])


def _whole(d: Draw, value: int, name: str) -> Any:
    huge = [50] if PATIENT.search(name) else [2**31, 2**31 - 1, 2**63 - 1, 2**63, 2**70]
    return d.choice(
        [-1, 0, 1, 2, 3, -(2**31), -(2**63), value + 1, value - 1, value * 2, value + 7, float(value), value + 0.5]
        + [True, np.int64(value), np.int8(3), np.uint64(2**63), torch.tensor(value), str(value), float("nan"), (value,)]
        + huge * 2
    )


def _text(d: Draw, value: str) -> Any:
    return d.choice(
        ["", "nope", value.upper(), value + " ", value[:-1], value.encode(), [value], "\0", "é", "a" * 10_000]
    )


def _flag(d: Draw, value: bool) -> Any:
    return d.choice([not value, 0, 1, "yes", np.bool_(value), torch.tensor(value), None, 0.5, []])


def _bytes(d: Draw, value: bytes) -> bytes:
    """A file with wrong, missing or repeated bytes."""
    content = bytearray(value)
    for _ in range(d.choice([1, 1, 1, 2, 5])):
        at, length = d.randrange(len(content) + 1), d.choice([1, 1, 2, 8, 40])
        how = d.randrange(7)
        if how == 0:
            content[at : at + length] = d.randbytes(length)
        elif how == 1:
            del content[at : at + length]
        elif how == 2:
            content[at:at] = d.randbytes(length)
        elif how == 3:
            content[at:at] = content[at : at + length] * d.choice([1, 2, 50])
        elif how == 4:
            del content[at:]
        elif how == 5:
            content[at : at + length] = (
                d.choice([b"\0", b"\xff", b'"', b"{", b"}", b"[", b":", b",", b"-", b"9"]) * length
            )
        elif numbers := list(re.finditer(rb"\d+", bytes(content[:4000]))):
            found = d.choice(numbers)
            swap = [b"0", b"-1", b"1e999", b"NaN", b"99999999999999999999", b"null", b'"1"', b"1.5", b"[]", b"true"]
            content[found.start() : found.end()] = d.choice(swap)
    return bytes(content)


_FILLS = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e300, 1e-40, 0.0, -1.0, 1e-8, 65504.0)
_DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
_DTYPES += [torch.complex64, torch.int8, torch.float8_e4m3fn]


def _filled(d: Draw, x: Tensor) -> Tensor:
    """Some entries, a slice or all entries replaced by a number that is hard to compute with."""
    x = x.clone()
    if x.numel() == 0:
        return x
    number = d.choice(_FILLS)
    if not (x.is_floating_point() or x.is_complex()):
        number = d.choice([0, 1, -1, 127, 100]) if x.dtype != torch.bool else d.choice([0, 1])
        if x.dtype in (torch.int64, torch.int32):
            number = d.choice([0, -1, 1, -100, 2**31 - 1, -(2**31)] + [2**63 - 1, -(2**63)] * (x.dtype == torch.int64))
        elif x.dtype == torch.uint8:
            number = abs(number)
    elif number == number and abs(number) < float("inf"):
        number = max(min(number, torch.finfo(x.dtype).max), torch.finfo(x.dtype).min)
    how = d.randrange(4)
    if how == 0 or x.dim() == 0:
        return x.fill_(number)
    if how == 1:
        axis = d.randrange(x.dim())
        x.select(axis, d.randrange(x.shape[axis])).fill_(number)
        return x
    for _ in range(1 if how == 2 else 3):
        x[tuple(d.randrange(size) for size in x.shape)] = number
    return x


def _reshaped(d: Draw, x: Tensor) -> Tensor:
    how = d.randrange(12)
    if how == 0:
        return x.unsqueeze(d.randint(0, x.dim()))
    if x.dim() == 0:
        return x.reshape(1, 1)
    axis = d.randrange(x.dim())
    size = x.shape[axis]
    if how == 1:
        return x.narrow(axis, 0, 0)
    if how == 2:
        return x.narrow(axis, 0, min(1, size))
    if how == 3:
        return x.narrow(axis, 0, max(0, size - 1))
    if how == 4:
        return torch.cat([x, x], axis)
    if how == 5:
        return x.flatten()
    if how == 6:
        return x.select(axis, 0) if size else x
    if how == 7:
        return x.flip(axis)
    if how == 8:
        return x.transpose(axis, d.randrange(x.dim()))
    if how == 9:
        return torch.cat([x, x.narrow(axis, 0, min(1, size))], axis)
    if how == 10:
        return x.new_zeros([0] * x.dim())
    return x.reshape(-1)[:1].reshape(()) if x.numel() else x


def _restrided(d: Draw, x: Tensor) -> Tensor:
    """The same numbers where they can be, in memory that few tensors have."""
    how = d.randrange(6)
    if how == 0 and x.dim() and x.numel():
        return x.narrow(0, 0, 1).expand(x.shape)
    if how == 1 and x.dim() and x.numel():
        return x.reshape(-1)[:1].reshape([1] * x.dim()).expand(x.shape)
    if how == 2 and x.numel() > 1:
        return torch.as_strided(x.contiguous(), x.shape, [1] * x.dim()) if x.numel() >= sum(x.shape) else x.clone()
    if how == 3 and x.dim() > 1:
        return lay_out(x, "transposed")
    return lay_out(x, "sliced") if x.dim() and x.is_floating_point() else x.clone()


def _odd(d: Draw, x: Tensor) -> Any:
    """Tensors of other kinds."""
    how = d.randrange(16)
    floating = x.is_floating_point()
    if how == 0:
        return x.to("meta")
    if how == 1:
        return x.to_sparse() if x.dim() else x.to("meta")
    if how == 2:
        return x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
    if how == 3:
        return x.tolist()
    if how == 4:
        return torch.view_as_complex(torch.stack([x, x], -1)).conj().imag if x.dtype == torch.float32 else x.cfloat()
    if how in (5, 6) and floating:
        return x.detach().clone().requires_grad_()
    if how == 7 and floating:
        return nn.Parameter(x.detach().clone())
    if how == 8:
        with torch.inference_mode():
            return x.clone()
    if how == 9 and floating:
        return torch.nested.nested_tensor([x, x], dtype=x.dtype)
    if how == 10 and floating:
        return x.detach().clone().requires_grad_() * 1.0
    if how == 11:
        return torch.broadcast_to(x, (2, *x.shape))
    if how == 12 and x.dtype == torch.float32:
        return torch.quantize_per_tensor(x.detach().contiguous(), 0.1, 0, torch.qint8)
    return x.to(d.choice(_DTYPES))


def _tensor(d: Draw, x: Tensor) -> Any:
    plain = x.layout is torch.strided and not x.is_nested and not x.is_quantized and x.device.type == "cpu"
    if not plain:
        return None
    with torch.no_grad():
        how = d.random()
        if how < 0.3:
            return _filled(d, x.detach())
        if how < 0.6:
            return _reshaped(d, x)
        if how < 0.75:
            return _restrided(d, x.detach())
    return _odd(d, x)


def _array(d: Draw, x: np.ndarray[Any, Any]) -> Any:
    how = d.randrange(12)
    if how == 0:
        return x.astype(x.dtype.newbyteorder())
    if how == 1:
        x = x.copy()
        x.flags.writeable = False
        return x
    if how == 2:
        return x[::-1] if x.ndim else x
    if how == 3:
        return x.astype(
            d.choice([np.complex128, np.int64, np.float16, np.bool_, np.longdouble, object, "U8", np.uint8])
        )
    if how == 4:
        return np.ma.masked_array(x)
    if how == 5:
        return x.tolist()
    if how == 6:
        return np.array([("a", 1)], dtype=[("x", "U1"), ("y", "i4")])
    if how == 7:
        return x.astype("datetime64[s]") if x.dtype.kind == "i" else x.astype(np.float128)
    if x.dtype.kind not in "fiub":
        return None
    other = (
        _filled(d, torch.from_numpy(np.ascontiguousarray(x))) if how < 10 else _reshaped(d, torch.from_numpy(x.copy()))
    )
    return other.numpy()


def _sequence(d: Draw, value: Any, name: str) -> Any:
    items, how = list(value), d.randrange(9)
    if items and how < 4:
        at = d.randrange(len(items))
        items[at] = mutated(d, name, items[at])
    elif how == 4:
        items = items[1:]
    elif how == 5:
        items = items + items[:1]
    elif how == 6:
        return tuple(items) if isinstance(value, list) else items
    elif how == 7:
        return iter(items)
    else:
        items.append(d.choice(_ALIENS)(d))
    return tuple(items) if isinstance(value, tuple) else items


def _mapping(d: Draw, value: Mapping[Any, Any], name: str) -> Any:
    items, how = dict(value), d.randrange(9)
    key = d.choice(list(items)) if items else None
    if items and how < 4:
        items[key] = mutated(d, name, items[key])
    elif items and how == 4:
        del items[key]
    elif items and how == 5:
        items[d.choice([0, None, "other", ("a", 1)])] = items.pop(key)
    elif how == 6:
        items["more"] = d.choice(_ALIENS)(d)
    elif how == 7:
        return list(items.items())
    else:
        items = dict(reversed(items.items()))
    return items


def _module(d: Draw, value: nn.Module) -> Any:
    how = d.randrange(8)
    parameters = list(value.parameters())
    if how == 0:
        return value.half()
    if how == 1:
        return value.double()
    if how == 2:
        return value.to("meta")
    if how == 3:
        return nn.Identity()
    if how == 4:
        return type(value)
    if how == 5 and parameters:
        with torch.no_grad():
            d.choice(parameters).fill_(d.choice([float("nan"), float("inf"), 0.0, 1e30]))
        return value
    if how == 6:
        return value.requires_grad_(False)
    return nn.Sequential()


def _callable(d: Draw, value: Callable[..., Any]) -> Any:
    alien = d.choice(_ALIENS)(d)
    return d.choice([lambda *_, **__: alien, "no function", lambda *a, **k: (value(*a, **k), 1)])


def mutated(d: Draw, name: str, value: Any) -> Any:
    """What somebody might pass by mistake, or on purpose, instead of ``value``."""
    if value is None or (d.chance(0.2) and not isinstance(value, bytes)):
        alien = d.choice(_ALIENS)(d)
        return 50 if isinstance(alien, int) and alien > 50 and PATIENT.search(name) else alien
    match value:
        case bool():
            return _flag(d, value)
        case int():
            return _whole(d, value, name)
        case float():
            return _number(d, value)
        case str():
            return _text(d, value)
        case bytes():
            return _bytes(d, value)
        case Tensor():
            return _tensor(d, value)
        case np.ndarray():
            return _array(d, value)
        case list() | tuple():
            return _sequence(d, value, name)
        case Mapping():
            return _mapping(d, value, name)
        case nn.Module():
            return _module(d, value)
        case type():
            return d.choice(_ALIENS)(d)
    return _callable(d, value) if callable(value) else d.choice(_ALIENS)(d)


def spoilt(
    d: Draw, arguments: Arguments, fixed: tuple[str, ...] = (), patient: tuple[str, ...] = ()
) -> tuple[Arguments, list[str]]:
    """One or two arguments replaced, now and then one too many or one too few; and the names of those."""
    arguments = dict(arguments)
    names = [name for name in arguments if name not in fixed]
    if d.chance(0.02):
        return {**arguments, "nonsense": 1}, ["nonsense"]
    if names and d.chance(0.02):
        name = d.choice(names)
        del arguments[name]
        return arguments, [name]
    chosen = d.sample(names, min(len(names), 1 if d.chance(0.7) else 2))
    for name in chosen:
        arguments[name] = mutated(d, "steps" if name in patient else name, arguments[name])
    return arguments, chosen or ["made so"]


# --- Recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to call a public name.

    Parameters
    ----------
    name : str
        ``package.name``.
    make : callable
        Draws valid arguments.
    call : callable
        Takes them. It may do more than one call of the library: make an object and use it.
    finite : bool
        Whether finite arguments give finite results.
    like : str, optional
        The argument whose shape and dtype the (first) result has.
    writes : bool
        Whether tensors among the arguments may be written.
    atomic : bool
        Whether modules among the arguments must be as they were when the call is refused.
    arrays : bool
        Whether NumPy arrays may be passed instead of tensors.
    valid : float
        Share of calls whose arguments are left alone.
    fixed : tuple of str
        Arguments that are left alone.
    patient : tuple of str
        Arguments of which a huge number is a valid wish for years of work.
    """

    name: str
    make: Callable[[Draw], Arguments]
    call: Callable[..., Any]
    finite: bool = True
    like: str | None = None
    writes: bool = False
    atomic: bool = False
    arrays: bool = False
    valid: float = 0.1
    fixed: tuple[str, ...] = ()
    patient: tuple[str, ...] = ()


def public_names() -> list[str]:
    packages = ("attention", "merge", "norm", "ot", "peft", "rotation", "tta")
    return [f"{p}.{name}" for p in packages for name in sorted(_package(p).__all__)]


def _package(name: str) -> Any:
    return __import__(f"shiftkern.{name}", fromlist=["__all__"])


@functools.cache
def names() -> list[str]:
    """Names that have recipes, in the order of the numbers of calls; each has as many calls as any other."""
    from helpers.fuzz_recipes import RECIPES

    return sorted(RECIPES)


def prepare(seed: int, number: int) -> tuple[Recipe, Arguments, list[str]]:
    """The recipe of a call, its arguments, and which of them are spoilt."""
    from helpers.fuzz_recipes import RECIPES

    d = Draw(f"{seed}/{number}")
    recipe = d.choice(RECIPES[names()[number % len(names())]])
    arguments = recipe.make(d)
    if recipe.arrays and d.chance(0.25):
        arguments = {
            name: value.numpy() if isinstance(value, Tensor) and value.dtype != torch.bfloat16 else value
            for name, value in arguments.items()
        }
    if d.chance(recipe.valid):
        return recipe, arguments, []
    return recipe, *spoilt(d, arguments, recipe.fixed, recipe.patient)


# --- Judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a call: "result", "refused", "no gradient", "allowed", or a kind of defect."""

    kind: str
    detail: str = ""

    @property
    def defect(self) -> bool:
        return self.kind not in FINE


FINE = ("result", "refused", "no gradient", "allowed")


#: Outcomes that are nobody's defect: name of the recipe, type of the error, its message, and why.
ALLOWED: list[tuple[str, type[BaseException], str, str]] = [
    (
        r".*",
        TypeError,
        r"unexpected keyword argument|required (keyword-only|positional) argument|multiple values for|"
        r"takes .* positional argument|invalid keyword argument",
        "Python's own: the signature",
    ),
    (
        r".*",
        RuntimeError,
        r"can't allocate memory|not enough memory|Storage size calculation overflowed|multiplication overflow",
        "a size that is valid but for this machine",
    ),
    (r".*", TypeError, r"Overflow when unpacking long long", "the same: a product of valid sizes"),
    (r".*", MemoryError, r"", "the same, of NumPy or Python"),
    (r".*", RuntimeError, r"cannot be converted to type float without overflow", "a number beyond float32"),
    (r".*", RuntimeError, r"Inference tensors cannot be saved for backward", "torch's own, and it says what to do"),
    (
        r".*",
        RuntimeError,
        r"item\(\) cannot be called on meta tensors|copy out of meta tensor|nonzero\(\) raises unimplemented|"
        r"with Meta tensors",
        "torch's own: no result without numbers",
    ),
    (r"ot\.wcord_loss", RuntimeError, r"contained non-finite values", "torch's own, of a critic that holds no numbers"),
    (r"(peft|merge|tta)\..*", RuntimeError, r"device meta", "a model of which some parts hold no numbers"),
    (r"merge\.read_config|peft\.(load|save)", OSError, r"", "Python's own: a path that cannot be read or written"),
    (r"attention\.kv_shift_init", TypeError, r"rand\(\) received", "torch's own: options handed on to torch.rand"),
]

#: Unclear errors that are known and wait for their checks; nothing may be added that is silent.
KNOWN: list[tuple[str, type[BaseException], str, str]] = [
    (
        r"merge\..*",
        Exception,
        r"[Nn]ested|unsupported ScalarType|can't convert|inhomogeneous|memory format option|sparse|quantized",
        "sparse, nested or quantized tensors; what NumPy cannot hold",
    ),
    (r"merge\.(iso_c|iso_cts|widen)", TypeError, r"unhashable", "a list of names that holds something else"),
    (r"merge\.grow_cores", ValueError, r"truth value of an array", "an array as dtype"),
    (
        r"merge\.ATLAS|merge\.AdaMerging|merge\.Concrete.*|merge\.concrete",
        TypeError,
        r"keywords must be",
        "names of options",
    ),
    (r"peft\.(AdaLink|Houlsby)Config", RuntimeError, r"shapes cannot be multiplied", "a width that is not the layer's"),
    (r"merge\.iso_cts?", RuntimeError, r"linalg.svd: The algorithm failed to converge", "matrices with huge entries"),
    (r"peft\.TTCConfig", IndexError, r"index out of range", "channels beyond the width of a module of unknown width"),
]

_NAMED = re.compile(r"^[\w.]+: (.*: )?argument '.+': expected .*, got ", re.DOTALL)


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative:
        with contextlib.suppress(TypeError, ValueError):
            yield torch.from_numpy(
                value if value.flags.writeable and min(value.strides, default=0) >= 0 else value.copy()
            )
    elif isinstance(value, (list, tuple)) and depth < 4:
        for item in value:
            yield from _tensors(item, depth + 1)
    elif isinstance(value, Mapping) and depth < 4:
        for item in value.values():
            yield from _tensors(item, depth + 1)


def _plain(x: Tensor) -> bool:
    return x.layout is torch.strided and x.device.type == "cpu" and not x.is_nested and not x.is_quantized


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == torch.float8_e4m3fn:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _modules(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _modules(item)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items() if isinstance(t, Tensor) and _plain(t)}


def _changed(module: nn.Module, before: dict[str, Tensor]) -> bool:
    after = _state(module)
    return list(after) != list(before) or not all(_same(after[name], t) for name, t in before.items())


def attempt(recipe: Recipe, arguments: Arguments, spoilt_names: list[str]) -> Outcome:
    """Make the call and judge what comes of it."""
    watched = [] if recipe.writes else [t for t in _tensors(arguments) if _plain(t)]
    copies = [t.detach().clone() for t in watched]
    modules = [(m, _state(m)) for v in arguments.values() for m in _modules(v)] if recipe.atomic else []
    result = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = recipe.call(**arguments)
        outcome = Outcome("result")
    except NotDifferentiableError as error:
        outcome = Outcome("no gradient", str(error))
    except ShiftkernError as error:
        outcome = Outcome("refused" if _NAMED.match(str(error)) else "unnamed", _where(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = Outcome("allowed" if _allowed(recipe.name, error) else "wrong error", _where(error))
    if outcome.defect:
        return outcome
    if not all(_same(t.detach(), c) for t, c in zip(watched, copies, strict=True)):
        return Outcome("argument written", f"after: {outcome.kind} {outcome.detail}")
    if outcome.kind != "result":
        if any(_changed(m, before) for m, before in modules):
            return Outcome("module changed by a refused call", outcome.detail)
        return outcome if spoilt_names else Outcome("valid call refused", outcome.detail)
    if not spoilt_names:
        found = [t for t in _tensors(result) if _plain(t)]
        if recipe.finite and not all(bool(t.isfinite().all()) for t in found if t.is_floating_point()):
            return Outcome("not finite", "finite arguments")
        if recipe.like is not None:
            x = next(_tensors(arguments[recipe.like]))
            if (x.shape, x.dtype) != (found[0].shape, found[0].dtype):
                return Outcome("wrong shape", f"{tuple(found[0].shape)} {found[0].dtype}")
    return outcome


def _allowed(name: str, error: BaseException) -> bool:
    return (
        isinstance(error, CallersError)
        or _inside_a_model(name, error)
        or any(
            re.fullmatch(names, name) and isinstance(error, kind) and re.search(message, str(error))
            for names, kind, message, _ in [*ALLOWED, *KNOWN]
        )
    )


def _inside_a_model(name: str, error: BaseException) -> bool:
    """Whether the caller's own function, or a layer of the caller's model, raised the error."""
    frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
    own = max((i for i, f in enumerate(frames) if "/shiftkern/" in f), default=len(frames))
    if any(Path(f).name in ("fuzz.py", "fuzz_recipes.py") for f in frames[own + 1 :]):
        return True
    return name.startswith(("merge.", "peft.", "tta.", "rotation.Sandwich")) and any(
        "torch/nn/modules/" in f for f in frames[own:]
    )


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "shiftkern" in f.filename]
    last = own[-1] if own else frames[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:300]}"


def show(arguments: Arguments) -> str:
    def short(value: Any, depth: int = 0) -> str:
        if isinstance(value, Tensor) and not value.is_nested:
            stride = value.stride() if value.layout is torch.strided else value.layout
            return f"Tensor({tuple(value.shape)}, {value.dtype}, {value.device}, strides {stride})"
        if isinstance(value, np.ndarray):
            return f"ndarray({value.shape}, {value.dtype})"
        if isinstance(value, Mapping) and depth < 2:
            return "{" + ", ".join(f"{k!r}: {short(v, depth + 1)}" for k, v in value.items()) + "}"
        if isinstance(value, (list, tuple)) and depth < 2:
            return f"{type(value).__name__}({', '.join(short(v, depth + 1) for v in value)})"
        text = " ".join(repr(value).split())
        return text if len(text) < 120 else text[:117] + "..."

    return "\n".join(f"    {name} = {short(value)}" for name, value in arguments.items())


# --- Running ----------------------------------------------------------------------------------------------------------


def work(seed: int, first: int, stop: int, step: int, limit: float) -> None:
    """Make calls and tell of each before and after, in lines on standard output."""
    channel = os.dup(1)
    os.dup2(2, 1)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # for files with names that come from nowhere
        os.chdir(folder)
        _work(seed, range(first, stop, step), limit, channel)
        os.chdir("/")


def _work(seed: int, numbers: range, limit: float, channel: int) -> None:
    for number in numbers:
        os.write(channel, f"{number}\n".encode())
        faulthandler.dump_traceback_later(limit, exit=True)
        torch.manual_seed(number)
        recipe, arguments, changed = prepare(seed, number)
        outcome = attempt(recipe, arguments, changed)
        faulthandler.cancel_dump_traceback_later()
        os.write(channel, (json.dumps([number, recipe.name, outcome.kind, outcome.detail, changed]) + "\n").encode())


@dataclass
class Report:
    """Outcomes counted by name, and the defects."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    defects: list[tuple[int, str, str, str]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return sum(sum(counter.values()) for counter in self.counts.values())

    def by_package(self) -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for name, counter in self.counts.items():
            found[name.partition(".")[0]].update(counter)
        return dict(sorted(found.items()))

    def grouped(self) -> list[tuple[str, str, str, list[int]]]:
        """Defects of the same name, kind and place together, with the numbers of their calls."""
        groups: dict[tuple[str, str, str], list[tuple[int, str]]] = defaultdict(list)
        for number, name, kind, detail in self.defects:
            groups[name, kind, re.sub(r": .*", "", detail, flags=re.DOTALL)[:80]].append((number, detail))
        return [(n, k, found[0][1], [number for number, _ in found]) for (n, k, _), found in sorted(groups.items())]


def run(
    seed: int,
    calls: range,
    *,
    jobs: int = 1,
    limit: float = LIMIT,
    progress: Callable[[], Any] = lambda: None,
) -> Report:
    """Make the calls of these numbers in processes of their own."""
    report, lock = Report(), threading.Lock()

    def note(number: int, name: str, kind: str, detail: str) -> None:
        with lock:
            report.counts[name][kind] += 1
            if Outcome(kind).defect:
                report.defects.append((number, name, kind, detail))
            progress()

    def share(part: range) -> None:
        first, deaths = part.start, 0
        while first < part.stop:
            done = _worker(seed, range(first, part.stop, part.step), limit, note)
            if done is None:
                return
            number, end, errors = done
            if number is None or (deaths := deaths + 1) > 50:
                note(first, "processes", "failed", errors)
                return
            note(number, names()[number % len(names())], end, errors)
            first = number + part.step

    threads = [threading.Thread(target=share, args=(calls[job::jobs],)) for job in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report


#: What a process runs, but for the arguments.
SCRIPT = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from helpers import fuzz; fuzz.work(%s)"


def _worker(
    seed: int, part: range, limit: float, note: Callable[[int, str, str, str], None]
) -> tuple[int | None, str, str] | None:
    """Run a process; where it ends early, return the number of its last call, how it ended and what it said."""
    arguments = ", ".join(map(str, (seed, part.start, part.stop, part.step, limit)))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT % arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(process.stderr or ()))
    listener.start()
    begun: int | None = None
    started = time.monotonic()
    for line in process.stdout or ():
        if line.startswith("["):
            number, name, kind, detail, _ = json.loads(line)
            note(number, name, kind, detail)
            begun = None
        else:
            begun, started = int(line), time.monotonic()
    process.wait()
    listener.join()
    if process.returncode == 0 and begun is None:
        return None
    hung = time.monotonic() - started >= limit and process.returncode == 1
    return begun, "hang" if hung else f"died ({process.returncode})", "".join(said)[-3000:]


def replay(seed: int, number: int) -> None:
    """Make one call here, and show its arguments and where its error comes from."""
    torch.manual_seed(number)
    recipe, arguments, changed = prepare(seed, number)
    print(f"{number}: {recipe.name}, spoilt: {', '.join(changed) or 'nothing'}\n{show(arguments)}")
    try:
        print("result:", show({"": recipe.call(**arguments)}))
    except BaseException:
        traceback.print_exc()
    torch.manual_seed(number)
    recipe, arguments, changed = prepare(seed, number)
    print("judged:", attempt(recipe, arguments, changed))
