"""The batch augmentation: seeded, exact at its limits, geometry against hand-made cases."""

import math

import pytest
import torch

from shiftkern.tta import Augment

OFF = {"degrees": 0, "translate": 0, "zoom": 0, "contrast": 0, "brightness": 0, "noise": 0, "flip": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, c=2, h=7, w=5, dtype=torch.float64):
    return torch.rand(n, c, h, w, generator=generator(9)).to(dtype)


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (1, 3, 5, 9), (6, 10), (1, 10), (3, 2, 12), (2, 1, 4, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_seed(shape, dtype):
    x = torch.rand(shape, generator=generator(3)).to(dtype)
    before = x.clone()
    y = Augment()(x, generator())
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert torch.equal(x, before)
    assert torch.equal(y, Augment()(x, generator()))
    if shape != (1, 10):
        assert not torch.equal(y, Augment()(x, generator(1)))
        assert not torch.equal(y, x)


def test_everything_off_is_the_identity():
    x = images()
    torch.testing.assert_close(Augment(**OFF)(x, generator()), x, rtol=1e-12, atol=1e-12)


def test_flip_mirrors_each_image():
    x = images()
    y = Augment(**{**OFF, "flip": 1})(x, generator())
    torch.testing.assert_close(y, x.flip(3), rtol=1e-12, atol=1e-12)


def test_flip_probability():
    x = images(n=2000, c=1, h=2, w=2)
    y = Augment(**{**OFF, "flip": 0.3})(x, generator())
    flipped = (y - x).abs().flatten(1).amax(1) > 1e-9
    assert abs(flipped.double().mean() - 0.3) < 0.04


def test_rotation_keeps_lengths_in_a_wide_image():
    # A disc stays a disc under a rotation about the centre, but not under the shear that forgetting the aspect gives.
    h, w = 41, 81
    ys, xs = torch.meshgrid(torch.arange(h) - h // 2, torch.arange(w) - w // 2, indexing="ij")
    disc = torch.exp(-((xs**2 + ys**2) / 50.0)).double().expand(8, 1, h, w)
    y = Augment(**{**OFF, "degrees": 90})(disc, generator())
    torch.testing.assert_close(y, disc, rtol=0, atol=0.01)


def test_contrast_and_brightness_are_affine_per_sample():
    x = images()
    y = Augment(**{**OFF, "contrast": 0.5, "brightness": 0.5})(x, generator())
    for a, b in zip(x, y, strict=True):
        a, b = a.flatten(), b.flatten()
        slope = ((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()) ** 2).sum()
        assert 0.5 <= slope <= 1.5
        assert abs(b.mean() - a.mean()) <= 0.5 * x.std(correction=0) + 1e-12
        torch.testing.assert_close(b, slope * (a - a.mean()) + b.mean(), rtol=1e-9, atol=1e-9)


def test_noise_of_a_flat_batch_follows_each_features_spread():
    x = torch.randn(4000, 2, generator=generator(1), dtype=torch.float64) * torch.tensor([1.0, 100.0])
    d = Augment(noise=0.1)(x, generator()) - x
    torch.testing.assert_close(d.std(0) / x.std(0), torch.full((2,), 0.1, dtype=torch.float64), rtol=0.05, atol=0)
    single = x[:1]
    assert torch.equal(Augment(noise=0.1)(single, generator()), single)


@pytest.mark.parametrize("name", list(OFF))
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "x", None])
def test_errors(name, value):
    with pytest.raises(ValueError, match=f"argument '{name}'"):
        Augment(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("zoom", 1.0), ("flip", 1.1)])
def test_limits(name, value):
    with pytest.raises(ValueError, match=f"argument '{name}'"):
        Augment(**{name: value})
