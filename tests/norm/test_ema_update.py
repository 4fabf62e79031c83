import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.norm import ema_update_

from helpers.strategies import DTYPES, make, roundoff, tensors

SHAPES = [(), (0,), (1,), (3, 5), (2, 3, 4), (1023,), (1024,), (1025,), (32769,)]


def pairs(dtype):
    return [make(s, dtype, 1) for s in SHAPES], [make(s, dtype, 2) for s in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_equals_the_formula(dtype, momentum):
    tensors_, values = pairs(dtype)
    expected = [(1 - momentum) * t.double() + momentum * v.double() for t, v in zip(tensors_, values, strict=True)]
    kept = [v.clone() for v in values]
    assert ema_update_(tensors_, values, momentum) is None
    for t, v, k, e in zip(tensors_, values, kept, expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=2 * roundoff(dtype), atol=4 * roundoff(dtype) if momentum else 0)
        assert torch.equal(v, k)


@given(tensors(), st.floats(0, 1))
def test_equals_torch_for_any_layout(x, momentum):
    target = x.clone(memory_format=torch.preserve_format)
    strided = torch.stack([target, target], -1)[..., 0]
    value = (x * 0.5 + 1).to(x.dtype)
    expected = (1 - momentum) * strided.double() + momentum * value.double()
    ema_update_([strided], [value], momentum)
    torch.testing.assert_close(
        strided.double(), expected, rtol=2 * roundoff(x.dtype), atol=1e-3 * roundoff(x.dtype) + 200 * roundoff(x.dtype)
    )


@given(tensors(empty=False))
def test_momentum_zero_keeps_and_one_takes_every_bit(x):
    a, b = x.clone(), (x * 3 + 1).to(x.dtype)
    before = a.clone()
    ema_update_([a], [b], 0.0)
    assert torch.equal(a, before)
    ema_update_([a], [b], 1.0)
    assert torch.equal(a, b)


@given(tensors(empty=False, dtypes=(torch.float64,)), st.floats(0, 1))
def test_a_constant_stream_is_a_fixed_point(x, momentum):
    a = x.clone()
    ema_update_([a], [x], momentum)
    torch.testing.assert_close(a, x, rtol=4e-16, atol=0)


@given(tensors(empty=False, dtypes=(torch.float64,)), st.floats(0, 1))
def test_stays_between_old_and_new(x, momentum):
    a, b = x.clone(), x.flip(0).clone()
    ema_update_([a], [b], momentum)
    slack = 4e-16 * torch.maximum(x.abs(), b.abs())
    assert bool((a <= torch.maximum(x, b) + slack).all())
    assert bool((a >= torch.minimum(x, b) - slack).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_layers_in_one_call_equal_one_at_a_time(dtype):
    a, values = pairs(dtype)
    b = [t.clone() for t in a]
    ema_update_(a, values, 0.1)
    for t, v in zip(b, values, strict=True):
        ema_update_([t], (v,), 0.1)
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_a_value_may_overlap_its_tensor():
    for momentum in (0.5, 1.0):
        memory = torch.arange(3000.0)
        expected = (1 - momentum) * memory[1:] + momentum * memory[:-1]
        ema_update_([memory[1:]], [memory[:-1]], momentum)
        assert torch.equal(memory[1:], expected)
        memory = torch.arange(3000.0)
        ema_update_([memory], [memory], momentum)
        assert torch.equal(memory, torch.arange(3000.0))


def test_a_tensor_listed_twice_is_updated_twice():
    for target in (torch.zeros(3, 2), torch.zeros(2, 3).T, torch.zeros(3, 4)[:, ::2]):
        ema_update_([target, target], [torch.ones(3, 2)] * 2, 0.5)
        assert bool((target == 0.75).all())


def test_mixed_dtypes_and_nothing():
    ema_update_([], [], 0.5)
    a = [torch.zeros(3), torch.zeros(2, dtype=torch.float16), torch.zeros(1).double()]
    ema_update_(a, [torch.ones_like(t) for t in a], 0.25)
    assert all(bool((t == 0.25).all()) for t in a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_at_any_number_of_threads(dtype):
    results = []
    for threads in (1, 2, 3):
        shiftkern.set_num_threads(threads)
        a = make((700001,), dtype)
        ema_update_([a], [make((700001,), dtype, 5)], 0.3)
        results.append(a)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_teacher_follows_its_student():
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    ema_update_(list(teacher.parameters()), list(student.parameters()), 0.1)
    for t, e in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(t, e)
        assert t.requires_grad
        assert t.grad_fn is None


def test_autograd_notices_the_write():
    leaf, running = torch.ones(3, requires_grad=True), torch.ones(3)
    product = leaf * running
    ema_update_([running], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_inference_mode():
    outside = torch.zeros(3)
    with torch.inference_mode():
        inside = torch.zeros(3)
        ema_update_([inside, outside], [torch.ones(3), torch.ones(3)], 0.5)
    assert inside.tolist() == outside.tolist() == [0.5] * 3


def test_non_finite_values_stay_where_they_are():
    a = torch.zeros(5)
    ema_update_([a], [torch.tensor([1.0, float("nan"), float("inf"), 1.0, -1.0])], 0.5)
    assert a[1].isnan()
    assert a[2].isinf()
    assert a[[0, 3, 4]].tolist() == [0.5, 0.5, -0.5]


T, V = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    ("tensors_", "values", "momentum", "error", "argument"),
    [
        (T, [V], 0.1, ArgumentTypeError, "tensors"),
        (None, [V], 0.1, ArgumentTypeError, "tensors"),
        ([1.0], [V], 0.1, ArgumentTypeError, r"tensors\[0\]"),
        ([T.long()], [V], 0.1, ArgumentTypeError, r"tensors\[0\]"),
        ([T[:1].expand(3)], [V], 0.1, ArgumentError, r"tensors\[0\]"),
        ([T], V, 0.1, ArgumentTypeError, "values"),
        ([T], [V, V], 0.1, ArgumentError, "values"),
        ([T], [None], 0.1, ArgumentTypeError, r"values\[0\]"),
        ([T], [V[:2]], 0.1, ArgumentError, r"values\[0\]"),
        ([T], [V.long()], 0.1, ArgumentTypeError, r"values\[0\]"),
        ([T], [V.to("meta")], 0.1, ArgumentError, r"values\[0\]"),
        ([T], [V], 1.5, ArgumentError, "momentum"),
        ([T], [V], float("nan"), ArgumentError, "momentum"),
        ([T], [V], "0.1", ArgumentTypeError, "momentum"),
    ],
)
def test_errors(tensors_, values, momentum, error, argument):
    with pytest.raises(error, match=rf"^ema_update_: argument '{argument}': expected .*, got "):
        ema_update_(tensors_, values, momentum)


def test_an_error_leaves_every_tensor_unwritten():
    a, b = torch.zeros(3), torch.zeros(3)
    for bad in (torch.ones(2), torch.ones(3).long(), torch.ones(3, device="meta"), "x"):
        with pytest.raises(shiftkern.ShiftkernError):
            ema_update_([a, b], [torch.ones(3), bad], 0.5)
        assert not a.any()


def test_generators_are_lists_too():
    model = torch.nn.Linear(2, 2)
    teacher = torch.nn.Linear(2, 2)
    old = [p.detach().clone() for p in teacher.parameters()]
    ema_update_(teacher.parameters(), model.parameters(), 0.25)
    for p, before, new in zip(teacher.parameters(), old, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), 0.75 * before + 0.25 * new.detach())


def test_values_of_another_float_type_are_rounded_first():
    running = torch.tensor([1.0, 2.0])
    ema_update_([running], [torch.tensor([3.0, 1.0 / 3.0], dtype=torch.float64)], 0.5)
    assert running.dtype == torch.float32
    torch.testing.assert_close(running, torch.tensor([2.0, 0.5 * 2.0 + 0.5 / 3.0]))
