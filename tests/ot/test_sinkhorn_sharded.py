import textwrap

import pytest
import torch

import shiftkern
from shiftkern.ot import sinkhorn_sharded

from helpers.process import output

_TWO_RANKS = """
    import sys
    import warnings
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from shiftkern import ArgumentError, ConvergenceWarning
    from shiftkern.ot import sinkhorn, sinkhorn_sharded

    torch.set_num_threads(1)

    def problem(n, m, dtype, seed=0):
        noise = lambda *shape: torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        a, b = noise(n) + 0.1, noise(m) + 0.2
        return a / a.sum(), b / b.sum(), noise(n, m).to(dtype)

    # Per case: the whole problem, how many rows the first rank holds, and reg.
    CASES = {
        "even": (problem(40, 30, torch.float64), 20, 0.05),
        "uneven": (problem(41, 130, torch.float64), 7, 0.02),
        "one rank without rows": (problem(20, 30, torch.float64), 0, 0.05),
        "float32": (problem(300, 70, torch.float32), 130, 0.05),
        "zero weights": (problem(40, 30, torch.float64), 20, 0.05),
        "shards of different columns": (problem(40, 30, torch.float64), 20, 0.05),
        "far apart": (problem(40, 30, torch.float64), 20, 0.05),
    }
    a, b, M = CASES["zero weights"][0]
    a[3], a[30], b[5] = 0.0, 0.0, 0.0
    a /= a.sum()
    b /= b.sum()
    a, b, M = CASES["shards of different columns"][0]
    M[:20, 15:] = torch.inf
    M[20:, :15] = torch.inf
    b *= torch.cat([(a[:20].sum() / b[:15].sum()).expand(15), (a[20:].sum() / b[15:].sum()).expand(15)])
    CASES["far apart"][0][2][20:, 15:] += 500.0

    def work(rank, store, out):
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        group = dist.new_group([0, 1])
        results = {}
        for name, ((a, b, M), rows, reg) in CASES.items():
            own = slice(0, rows) if rank == 0 else slice(rows, None)
            r = sinkhorn_sharded(a[own], b, M[own], reg, max_iter=3000, group=group)
            assert r.converged, name
            columns = r.plan().double().sum(0)
            rows = (r.plan().double().sum(1) - a[own]).abs().sum()
            totals = torch.cat([columns, rows[None]])
            dist.all_reduce(totals)
            explicit = float((totals[:-1] - b).abs().sum() + totals[-1])
            tol = 1e-4 if M.dtype == torch.float32 else 1e-7
            assert abs(r.marginal_error - explicit) < 0.01 * tol and explicit <= 1.01 * tol
            assert r.plan().dtype == M.dtype
            results[name] = (r.f, r.g, r.n_iter, r.error_history)
        a, b, M = CASES["even"][0]
        own = slice(0, 20) if rank == 0 else slice(20, None)
        # What one process refuses, all do; nobody waits.
        for poison in ("a", "M", "cost", "b"):
            shard = [a[own].clone(), b, M[own].clone()]
            if rank == 1:
                if poison == "a":
                    shard[0][0] = -1.0
                elif poison == "M":
                    shard[1:] = b[1:], shard[2][:, 1:]
                elif poison == "b":
                    shard[1] = b.flip(0)
                else:
                    shard[2][2, 3] = torch.nan
            try:
                sinkhorn_sharded(*shard, 0.1)
            except ArgumentError as error:
                assert str(error).startswith("sinkhorn_sharded: argument"), error
            else:
                raise AssertionError("accepted")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert sinkhorn_sharded(a[own], b, M[own], 0.01, max_iter=3).status == "max_iter"
        assert any(issubclass(w.category, ConvergenceWarning) for w in seen)
        torch.save(results, f"{out}.{rank}")
        dist.destroy_process_group()

    if __name__ == "__main__":
        store, out = sys.argv[1:]
        mp.start_processes(work, (store, out), nprocs=2, start_method="fork")
        ranks = [torch.load(f"{out}.{rank}") for rank in range(2)]
        for name, ((a, b, M), rows, reg) in CASES.items():
            whole = sinkhorn(a, b, M, reg, max_iter=3000)
            (f0, g, n_iter, errors), (f1, g1, _, _) = (r[name] for r in ranks)
            assert torch.equal(g, g1), name
            single = M.dtype == torch.float32
            assert n_iter == whole.n_iter or single, (name, n_iter, whole.n_iter)
            tight = dict(rtol=0, atol=1e-4 if single else 1e-10)
            torch.testing.assert_close(torch.cat([f0, f1]).to(M.dtype), whole.f, **tight)
            torch.testing.assert_close(g.to(M.dtype), whole.g, **tight)
            if not single:
                torch.testing.assert_close(errors, whole.error_history, rtol=1e-6, atol=1e-12)
        print("equal", len(CASES))
"""


def test_two_processes_give_the_answer_of_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(_TWO_RANKS))
    runner = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert output(runner, str(tmp_path / "store"), str(tmp_path / "out"), deadline=90).endswith("equal 7")


def test_without_a_process_group():
    weights = torch.full((2,), 0.5)
    with pytest.raises(shiftkern.ShiftkernError, match=r"^sinkhorn_sharded: torch\.distributed is not initialised"):
        sinkhorn_sharded(weights, weights, torch.zeros(2, 2), 0.1)
