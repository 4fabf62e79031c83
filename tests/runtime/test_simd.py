"""Every instruction set gives the same bits where docs/numerics.md says so, and elsewhere the same up to rounding."""

from pathlib import Path

import torch

from shiftkern import _library

from helpers.process import output
from helpers.strategies import roundoff

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

    tests, file = sys.argv[1:]
    sys.path.insert(0, tests)
    from helpers.large_samples import LARGE_SAMPLES
    from helpers.samples import PATHS, SAMPLES, detached, tensors_of

    found = {}
    for name, (rust, _) in PATHS.items():
        torch.manual_seed(0)  # some samples are drawn from the global generator
        found[name] = []
        for arguments in [*SAMPLES[name](), *LARGE_SAMPLES[name]()[:1]]:
            arguments = detached(arguments)
            dtypes = [t.dtype for t in tensors_of(arguments) if t.is_floating_point()]
            found[name].append((dtypes[0], tensors_of(rust(*arguments)) + tensors_of(arguments)))
    torch.save(found, file)
"""

#: Statistics, normalizations, sums over models and what sorts: sums in one order, without fused multiply-add.
_SAME_BITS = {
    *("channel_moments", "channel_affine", "channel_dot", "channel_combine"),
    *("mixed_batch_norm", "mixed_batch_norm_", "mixed_batch_norm_out"),
    *("unmix_norm", "unmix_update_", "style_shift", "ema_update_", "soft_order", "soft_order_backward"),
    *("merge_linear", "merge_thresholds", "merge_magnitude_sums", "merge_masked", "merge_dots", "merge_count_digits_"),
    *("merge_ranks", "merge_rank_drop", "merge_column_changes", "merge_by_columns"),
}


def _bytes(t):
    return t.contiguous().reshape(-1).view(torch.uint8)


def _check(name, ours, theirs):
    """Compare what an operator gave for all its samples."""
    assert len(ours) == len(theirs) > 0
    for (dtype, left), (_, right) in zip(ours, theirs, strict=True):
        compute = min(max(roundoff(dtype), 2**-53), 2**-24)
        for a, b in zip(left, right, strict=True):
            if a.numel() == 0:
                continue
            if name in _SAME_BITS or not a.is_floating_point():
                assert torch.equal(_bytes(a), _bytes(b)), name
                continue
            # float64 results may be statistics of what was computed in float32.
            stored = compute if a.dtype == torch.float64 else roundoff(a.dtype)
            size = max(b.double().masked_fill(~b.isfinite(), 0.0).abs().max().item(), 1.0)
            tolerance = (64 * compute + 2 * stored) * size
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True, msg=lambda m: f"{name}: {m}")


# One test, so that no two processes of the suite do the same work.
def test_levels_agree(tmp_path):
    def run(level):
        file = tmp_path / f"{level or 'default'}.pt"
        digest = output(_SCRIPT, str(Path(__file__).parents[1]), str(file), deadline=180.0, SHIFTKERN_SIMD=level)
        return digest, torch.load(file)

    digest, expected = run("")
    assert set(expected) == set(_library.OPERATORS)
    for level in ("scalar", "v3"):
        own, found = run(level)
        assert own == digest, level
        for name in _library.OPERATORS:
            _check(name, found[name], expected[name])


def test_the_scalar_level_is_reported():
    script = "import shiftkern; print(shiftkern.build_info()['simd'])"
    assert output(script, SHIFTKERN_SIMD="scalar") == "scalar"
