"""Every registered operator: opcheck, shapes and strides without data, writes that autograd sees, both paths."""

import pytest
import torch

import shiftkern
from shiftkern import _library

from helpers.samples import PATHS, SAMPLES, detached, tensors_of
from helpers.strategies import roundoff

MUTATING = [name for name in _library.OPERATORS if "!" in str(getattr(torch.ops.shiftkern, name).default._schema)]


def operator(name):
    return getattr(torch.ops.shiftkern, name).default


def test_every_operator_has_samples_and_two_paths():
    assert set(SAMPLES) == set(PATHS) == set(_library.OPERATORS)
    assert all(SAMPLES[name]() for name in _library.OPERATORS)


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_opcheck(name):
    for arguments in SAMPLES[name]():
        torch.library.opcheck(operator(name), arguments)


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_meta_shapes_and_strides_are_the_real_ones(name):
    for arguments in SAMPLES[name]():
        arguments = detached(arguments)
        real = tensors_of(operator(name)(*detached(arguments)))
        meta = tensors_of(
            operator(name)(
                *[
                    [t.to("meta") if isinstance(t, torch.Tensor) else t for t in a]
                    if isinstance(a, list)
                    else a.to("meta")
                    if isinstance(a, torch.Tensor)
                    else a
                    for a in arguments
                ]
            )
        )
        assert len(real) == len(meta)
        for r, m in zip(real, meta, strict=True):
            assert (r.shape, r.dtype) == (m.shape, m.dtype)
            assert r.numel() == 0 or r.stride() == m.stride()


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_fake_shapes_and_strides_are_the_real_ones(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for arguments in SAMPLES[name]():
        arguments = detached(arguments)
        with FakeTensorMode() as mode:
            fakes = [
                [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in a]
                if isinstance(a, list)
                else mode.from_tensor(a)
                if isinstance(a, torch.Tensor)
                else a
                for a in arguments
            ]
            shapes = [(t.shape, t.stride(), t.dtype) for t in tensors_of(operator(name)(*fakes))]
        real = tensors_of(operator(name)(*arguments))
        for r, (shape, stride, dtype) in zip(real, shapes, strict=True):
            assert (r.shape, r.dtype) == (shape, dtype)
            assert r.numel() == 0 or r.stride() == tuple(stride)


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_rust_equals_torch_operations(name):
    rust, reference = PATHS[name]
    for arguments in SAMPLES[name]():
        ours, theirs = detached(arguments), detached(arguments)
        left = tensors_of(rust(*ours)) + tensors_of(ours)
        right = tensors_of(reference(*theirs)) + tensors_of(theirs)
        lowest = min((roundoff(t.dtype) for t in tensors_of(arguments)[:1] if t.is_floating_point()), default=1e-7)
        compute = min(max(lowest, 2**-53), 2**-24)  # what the pass runs in: float32 for half types
        for a, b in zip(left, right, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if a.numel() == 0 or tensors_of(arguments)[0].numel() == 0:
                continue
            stored = roundoff(a.dtype) if a.is_floating_point() and a.dtype != torch.float64 else compute
            tolerance = 64 * compute + 2 * stored
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", MUTATING)
def test_autograd_notices_a_write(name):
    for arguments in SAMPLES[name]():
        arguments = detached(arguments)
        schema = operator(name)._schema
        written = [
            t
            for argument, value in zip(schema.arguments, arguments, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tensors_of(value)
        ]
        kept = [t for t in tensors_of(arguments) if all(t is not w for w in written)]
        before = [t._version for t in written], [t._version for t in kept]
        operator(name)(*arguments)
        assert all(t._version > v for t, v in zip(written, before[0], strict=True))
        assert [t._version for t in kept] == before[1]


@pytest.mark.parametrize("name", MUTATING)
def test_a_gradient_through_a_write_is_refused(name):
    arguments = detached(SAMPLES[name]()[0])
    first = tensors_of(arguments)[-1 if name == "ema_update_" else 0].requires_grad_()
    with pytest.raises(shiftkern.NotDifferentiableError, match=rf"^{name}: "):
        operator(name)(*arguments)
    before = first.detach().clone()
    with torch.no_grad():
        operator(name)(*arguments)
    assert first.grad is None
    assert first.shape == before.shape


@pytest.mark.parametrize("name", MUTATING)
def test_a_write_works_in_inference_mode(name):
    with torch.inference_mode():
        for arguments in SAMPLES[name]():
            inside, outside = detached(arguments), detached(arguments)
            operator(name)(*inside)
            PATHS[name][0](*outside)
            for a, b in zip(tensors_of(inside), tensors_of(outside), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


_BLOCKS = ["channel_affine", "channel_dot", "channel_combine", "sinkhorn_samples", "transport_sums", "samples_sums"]
_BLOCKS += ["sinkhorn_assign", "sinkhorn_half_step", "block_sparse_attention_backward", "reattention_capture"]
_BLOCKS += ["reattention_step", "givens_backward", "block_rotate_backward", "low_rank_rotate_backward"]


@pytest.mark.parametrize("name", _BLOCKS)
def test_building_blocks_have_no_gradient(name):
    arguments = detached(SAMPLES[name]()[0])
    arguments[0].requires_grad_()
    result = [t for t in tensors_of(operator(name)(*arguments)) if t.is_floating_point()][-1]
    with pytest.raises(shiftkern.NotDifferentiableError, match=rf"^{name}: "):
        result.sum().backward()


_DIFFERENTIABLE = ["channel_moments", "mixed_batch_norm", "unmix_norm", "style_shift", "sinkhorn", "transport_plan"]
_DIFFERENTIABLE += ["neighborhood", "token_shift", "givens", "block_rotate", "low_rank_rotate", "cayley"]
_DIFFERENTIABLE += ["transport_apply", "samples_apply", "block_sparse_attention", "merge_state", "merge_states"]


@pytest.mark.parametrize("name", _DIFFERENTIABLE)
def test_a_second_derivative_is_refused_not_wrong(name):
    samples = [(arguments, t) for arguments in SAMPLES[name]() for t in tensors_of(arguments) if t.requires_grad]
    assert samples
    for arguments, x in samples:
        outputs = operator(name)(*arguments)
        value = outputs[2 if name == "channel_moments" else 0]
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        with pytest.raises(shiftkern.NotDifferentiableError):
            first.sum().backward()
