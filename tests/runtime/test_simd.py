"""Sums have the same bits on every instruction set."""

import pytest

from helpers.process import output

_SCRIPT = """
    import hashlib, sys
    import torch, shiftkern
    from shiftkern import norm

    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for shape in ((5, 3, 7), (8, 6, 10007), (33, 257), (4000, 13), (3, 64, 9, 11)):
            for layout in ("contiguous", "channels_last"):
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(shape, generator=generator).to(dtype)
                if layout == "channels_last":
                    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                x.requires_grad_()
                c = shape[1]
                m = norm.channel_moments(x)
                k = norm.channel_moments(x, mask=x.detach()[:, 0] > 0, per_instance=True)
                y = norm.mixed_batch_norm(x, torch.zeros(c), torch.ones(c), torch.full((c,), 1.5), source_weight=0.3)
                (g,) = torch.autograd.grad(y.float().square().sum(), x)
                s = norm.style_shift(x, torch.zeros(c), torch.ones(c))
                for t in (m.mean, m.m2, k.mean, k.m2, y, g, s):
                    t = t.detach().contiguous()
                    digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
    print(shiftkern.build_info()["simd"], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def default():
    return output(_SCRIPT, SHIFTKERN_SIMD="")


@pytest.mark.parametrize("level", ["scalar", "v3"])
def test_bits_equal_those_of_the_default(default, level):
    assert output(_SCRIPT, SHIFTKERN_SIMD=level) == default


def test_the_scalar_level_is_reported():
    script = "import shiftkern; print(shiftkern.build_info()['simd'])"
    assert output(script, SHIFTKERN_SIMD="scalar") == "scalar"
