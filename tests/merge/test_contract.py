"""What holds for every method that merges entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import shiftkern
from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge._states import round_to
from shiftkern.merge.breadcrumbs import breadcrumbs
from shiftkern.merge.dare import dare
from shiftkern.merge.della import della
from shiftkern.merge.iso_c import iso_c
from shiftkern.merge.iso_cts import iso_cts
from shiftkern.merge.pcb import pcb
from shiftkern.merge.slerp import slerp
from shiftkern.merge.soup import soup
from shiftkern.merge.task_arithmetic import task_arithmetic
from shiftkern.merge.ties import ties
from shiftkern.merge.widen import widen
from shiftkern.merge.wise_ft import wise_ft

from helpers.merging import assert_same, make_states

#: Methods on a base and a list of models.
METHODS: dict[str, Callable[..., Any]] = {
    "soup": lambda base, models: soup([base, *models]),
    "soup of weights": lambda base, models: soup([base, *models], [0.5] * (len(models) + 1)),
    "wise_ft": lambda base, models: wise_ft(base, models[-1], 0.3),
    "slerp": lambda base, models: slerp(base, models[-1], 0.3),
    "task_arithmetic": lambda base, models: task_arithmetic(base, models, 0.4),
    "ties": ties,
    "ties of the paper": lambda base, models: ties(base, models, convention="paper"),
    "ties of mergekit": lambda base, models: ties(base, models, convention="mergekit"),
    "dare": lambda base, models: dare(base, models, drop_rate=0.5, seed=1),
    "dare of rates": lambda base, models: dare(base, models, drop_rate=[0.5, 0.3], seed=1, rescale="l1"),
    "dare ties": lambda base, models: dare(base, models, drop_rate=0.5, seed=1, then="ties"),
    "breadcrumbs": lambda base, models: breadcrumbs(base, models, density=0.6, gamma=0.1),
    "della": lambda base, models: della(base, models, density=0.6, epsilon=0.2, seed=3),
    "pcb": pcb,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "widen": widen,
}
#: Those of which merging the base with itself is the base, bit for bit.
EXACT = set(METHODS) - {"soup of weights"}

every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def with_integers(state, number):
    return {"steps": torch.tensor([number]), **state, "on": torch.tensor(number > 0)}


@every
@pytest.mark.parametrize("dtype", DTYPES)
def test_names_shapes_dtypes_and_integers_are_those_of_the_base(method, dtype):
    base, models = make_states(2, dtype)
    base, models = with_integers(base, 7), [with_integers(model, 9) for model in models]
    merged = method(base, models)
    assert list(merged) == list(base)
    for name, value in merged.items():
        assert (value.shape, value.dtype) == (base[name].shape, base[name].dtype), name
        assert bool(value.isfinite().all()), name
    assert merged["steps"].item() == 7


@pytest.mark.parametrize("name", sorted(EXACT))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_base_with_itself_is_the_base(name, dtype):
    base, _ = make_states(0, dtype)
    assert_same(METHODS[name](base, [base, base]), base)


@every
def test_arguments_stay_and_nothing_is_shared(method):
    base, models = make_states(2)
    base, models = with_integers(base, 7), [with_integers(model, 9) for model in models]
    copies = [{name: t.clone() for name, t in state.items()} for state in (base, *models)]
    merged = method(base, models)
    for value in merged.values():
        value.zero_()
    for state, copy in zip((base, *models), copies, strict=True):
        assert_same(state, copy)


@every
def test_arrays_in_arrays_out(method):
    base, models = make_states(2)
    expected = method(base, models)
    arrays = [{name: t.numpy() for name, t in state.items()} for state in (base, *models)]
    for state in arrays:
        for array in state.values():
            array.flags.writeable = False
    merged = method(arrays[0], arrays[1:])
    assert all(isinstance(value, np.ndarray) for value in merged.values())
    assert_same(merged, expected)


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 2])
def test_what_is_not_finite_is_refused_by_name(method, bad, which):
    states = make_states(2)
    states = [states[0], *states[1]]
    states[which]["block.weight"][20, 3] = bad
    with pytest.raises(ArgumentError, match=r"NaN or an infinity in tensor 'block.weight' of model \d or of the base"):
        method(states[0], states[1:])


@every
def test_other_layouts_and_tied_tensors(method):
    base, models = make_states(2, shapes={"w": (12, 20), "again": (12, 20), "conv": (4, 3, 5, 2)})
    for state in (base, *models):
        state["again"] = state["w"]
    expected = method(base, models)
    odd = [
        {
            "w": state["w"].t().contiguous().t().requires_grad_(),
            "again": torch.stack([state["w"], -state["w"]], 2)[..., 0],
            "conv": state["conv"].contiguous(memory_format=torch.channels_last),
        }
        for state in (base, *models)
    ]
    merged = method(odd[0], odd[1:])
    assert_same(merged, expected)
    assert not any(value.requires_grad for value in merged.values())


@every
def test_models_of_another_type_are_merged_in_the_type_of_the_base(method):
    base, models = make_states(2, torch.bfloat16)
    wide = [{name: t.float() for name, t in model.items()} for model in models]
    assert_same(method(base, wide), method(base, models))


@every
def test_same_bits_for_any_number_of_threads(method):
    base, models = make_states(2, shapes={"w": (150, 400), "b": (70_000,)})
    found = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        found.append(method(base, models))
    for other in found[1:]:
        assert_same(other, found[0])


@every
def test_states_that_do_not_belong_together(method):
    base, models = make_states(2)
    with pytest.raises(ArgumentError, match=r"expected the names of (the base|model 0|'a'), got missing"):
        method(base, [models[0], {name: t for name, t in models[1].items() if name != "one"}])
    with pytest.raises(ArgumentError, match=r"expected the names of (the base|model 0|'a'), got unknown"):
        method(base, [models[0], {**models[1], "more": torch.ones(1)}])
    with pytest.raises(ArgumentError, match=r"expected shape \(1,\) for tensor 'one'"):
        method(base, [models[0], {**models[1], "one": torch.ones(2)}])
    with pytest.raises(ArgumentTypeError, match="a tensor or array for 'one'"):
        method(base, [models[0], {**models[1], "one": 1.0}])
    with pytest.raises(ArgumentTypeError, match="tensors throughout or NumPy arrays throughout"):
        method(base, [models[0], {**models[1], "one": np.ones(1)}])
    with pytest.raises(ArgumentTypeError, match="a mapping of names to tensors"):
        method(base, [models[0], [1]])


OVERFLOWS = ["soup of weights", "task_arithmetic", "ties", "dare", "breadcrumbs", "della", "pcb", "widen", "iso_c"]


@pytest.mark.parametrize("name", OVERFLOWS)
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_a_result_that_its_dtype_cannot_hold_is_refused(name, dtype, large):
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    base = {"a": torch.ones(2, 2, dtype=dtype), "b": torch.zeros(3, 3, dtype=dtype)}
    peak = {"a": base["a"].to(wide), "b": torch.eye(3, dtype=wide) * large * (1.0 if dtype == torch.bfloat16 else 8.0)}
    models = [peak, peak] if dtype != torch.bfloat16 else [{n: t.double() * 8.0 for n, t in peak.items()}] * 2
    methods = {
        "soup of weights": lambda: soup([base, *models], [1.0, 4.0, 4.0]),
        "task_arithmetic": lambda: task_arithmetic(base, models, 4.0),
        "ties": lambda: ties(base, models, scale=8.0),
        "dare": lambda: dare(base, models, drop_rate=0.0, seed=1, scale=8.0),
        "breadcrumbs": lambda: breadcrumbs(base, models, scale=8.0, gamma=0.0),
        "della": lambda: della(base, models, density=1.0, epsilon=0.0, seed=3, scale=8.0),
        "pcb": lambda: pcb(base, models, scale=8.0),
        "widen": lambda: widen(base, models, scale=8.0),
        "iso_c": lambda: iso_c(base, models, scale=64.0),
    }
    with pytest.raises(ArgumentError, match=rf"expected a result of tensor 'b' that {str(dtype)[6:]} can hold, got an"):
        methods[name]()


def test_sums_beyond_a_dtype_do_not_look_like_an_overflow():
    base = {"w": torch.full((100,), 6e4, dtype=torch.float16), "v": torch.full((4,), 3e38)}
    assert_same(task_arithmetic(base, [base]), base)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_float64_is_rounded_to_half_types_once(dtype, bits):
    # Just beside the middle between two numbers, nearer than float32 can tell.
    ulp = 2.0 ** (1 - bits)
    values = [1.0 + ulp / 2 + tiny for tiny in (2.0**-40, -(2.0**-40), 0.0)]
    values += [-value for value in values] + [1e-9, 0.0, 1e300, -1e300, torch.inf]
    found = round_to(torch.tensor(values, dtype=torch.float64), dtype).double().tolist()
    near = torch.tensor([1e-9], dtype=dtype).double().item()
    expected = [1.0 + ulp, 1.0, 1.0]
    assert found == [*expected, *(-v for v in expected), near, 0.0, torch.inf, -torch.inf, torch.inf]
    base, model = {"w": torch.zeros(1, dtype=dtype)}, {"w": torch.tensor(values[:1], dtype=torch.float64)}
    assert task_arithmetic(base, [model])["w"].item() == 1.0 + ulp


def test_errors_of_the_first_model_name_it():
    state = {"w": torch.ones(2)}
    with pytest.raises(ArgumentTypeError, match=r"soup: argument 'models': .* of model 0"):
        soup([{"w": 1.0}, state])
    with pytest.raises(ArgumentTypeError, match="slerp: argument 'a': "):
        slerp({"w": 1.0}, state, 0.5)


TAKES_LISTS = [name for name in METHODS if name not in ("wise_ft", "slerp", "soup", "soup of weights")]


@pytest.mark.parametrize("name", TAKES_LISTS)
def test_lists_of_models(name):
    base, models = make_states(1)
    with pytest.raises(ArgumentTypeError, match="a list of state dicts"):
        METHODS[name](base, models[0])
    if name != "dare of rates":
        METHODS[name](base, models)
        with pytest.raises(ArgumentError, match="at least one model"):
            METHODS[name](base, [])
