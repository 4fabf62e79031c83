import pytest
import torch

import shiftkern
from shiftkern import ArgumentTypeError
from shiftkern.norm import all_reduce_moments, channel_moments

from helpers.process import output
from helpers.strategies import make

_TWO_RANKS = """
    import sys
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from shiftkern.norm import Moments, all_reduce_moments, channel_moments, merge_moments

    torch.set_num_threads(1)

    def data(seed, shape, mean=0.0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean

    # Per case: what each rank holds, and how it is measured.
    CASES = {
        "unequal": ([data(0, (3, 5, 4)), data(1, (40, 5, 2))], {}),
        "one rank without data": ([data(0, (3, 5, 4)), data(1, (0, 5, 4))], {}),
        "no data at all": ([data(0, (0, 5)), data(1, (0, 5))], {}),
        "no channels": ([data(0, (3, 0, 4)), data(1, (2, 0, 4))], {}),
        "large mean": ([data(0, (3, 5, 4), 1e9), data(1, (40, 5, 2), 1e9)], {}),
        "means apart": ([data(0, (3, 5), 1e6), data(1, (4, 5), -1e6)], {}),
        "per instance": ([data(0, (3, 5, 4)), data(1, (3, 5, 9))], {"per_instance": True}),
        "per instance, one without data": ([data(0, (3, 5, 4)), data(1, (3, 5, 0))], {"per_instance": True}),
        "float32": ([data(0, (3, 5, 4)).float(), data(1, (7, 5, 2)).float()], {}),
    }

    def work(rank, store, out):
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        group = dist.new_group([0, 1])
        results = {}
        for name, (parts, options) in CASES.items():
            own = channel_moments(parts[rank], **options)
            kept = own.mean.clone(), own.m2.clone()
            m = all_reduce_moments(own)
            again = all_reduce_moments(own, group)
            assert torch.equal(own.mean, kept[0]) and torch.equal(own.m2, kept[1]), "the input was changed"
            assert torch.equal(m.mean, again.mean) and torch.equal(m.m2, again.m2)
            results[name] = (m.count, m.mean, m.m2)
        poisoned = channel_moments(torch.full((2, 1), float("inf") if rank == 0 else 1.0))
        assert not all_reduce_moments(poisoned).mean.isfinite().any()
        torch.save(results, f"{out}.{rank}")
        dist.destroy_process_group()

    if __name__ == "__main__":
        store, out = sys.argv[1:]
        mp.start_processes(work, (store, out), nprocs=2, start_method="fork")
        ranks = [torch.load(f"{out}.{rank}") for rank in range(2)]
        for name, (parts, options) in CASES.items():
            moments = [channel_moments(p, **options) for p in parts]
            pooled = merge_moments(*moments)
            for ours in ranks:
                count, mean, m2 = ours[name]
                assert count.shape == pooled.count.shape and torch.equal(count, pooled.count), name
                assert mean.shape == pooled.mean.shape and m2.shape == pooled.m2.shape, name
                torch.testing.assert_close(mean, pooled.mean, rtol=1e-12, atol=1e-12, msg=name)
                torch.testing.assert_close(m2, pooled.m2, rtol=1e-9, atol=1e-9, msg=name)
                assert all(torch.equal(a, b) for a, b in zip(ours[name], ranks[0][name])), name
        whole = torch.cat([p.transpose(0, 1).flatten(1) for p in CASES["large mean"][0]], 1)
        variance = ranks[0]["large mean"][2] / ranks[0]["large mean"][0]
        torch.testing.assert_close(variance, whole.var(1, correction=0), rtol=1e-5, atol=0)
        print("equal")
"""


def test_two_processes_equal_pooling_their_data(tmp_path):
    script = tmp_path / "ranks.py"
    import textwrap

    script.write_text(textwrap.dedent(_TWO_RANKS))
    runner = f"import runpy, sys; sys.argv = sys.argv; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert output(runner, str(tmp_path / "store"), str(tmp_path / "out"), deadline=90).endswith("equal")


def test_one_process(tmp_path):
    script = """
        import sys, torch
        from shiftkern.norm import all_reduce_moments, channel_moments
        torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
        x = torch.randn(4, 3, requires_grad=True)
        m = channel_moments(x)
        r = all_reduce_moments(m)
        torch.testing.assert_close(r.mean, m.mean.detach())
        torch.testing.assert_close(r.m2, m.m2.detach())
        assert not r.mean.requires_grad
        print("equal")
    """
    assert output(script, str(tmp_path / "store")) == "equal"


def test_without_a_process_group():
    with pytest.raises(shiftkern.ShiftkernError, match=r"^all_reduce_moments: torch\.distributed is not initialised"):
        all_reduce_moments(channel_moments(make((2, 3))))


@pytest.mark.parametrize("value", [None, torch.zeros(3), (1, 2, 3)])
def test_errors(value):
    with pytest.raises(ArgumentTypeError, match=r"^all_reduce_moments: argument 'm': expected .*, got "):
        all_reduce_moments(value)
