"""A forked child must never wait for threads that only its parent has."""

from helpers.process import output

_PRELUDE = """
    import os, signal, sys
    import torch, shiftkern
    from shiftkern import norm, ot

    torch.set_num_threads(1)
    shiftkern.set_num_threads(3)
    x = torch.randn(8, 6, 10007, generator=torch.Generator().manual_seed(0))

    def work():
        m = norm.channel_moments(x)
        y = norm.mixed_batch_norm(x, torch.zeros(6), torch.ones(6), source_weight=0.3)
        z, _ = norm.unmix_norm(x, torch.eye(6), torch.ones(6, 6))
        s = norm.style_shift(x, torch.zeros(6), torch.ones(6))
        t = x.clone()
        norm.ema_update_([t], [y], 0.5)
        dense = ot.sinkhorn(None, None, x[0, 0, :6000].view(200, 30).abs(), 0.5)
        sampled = ot.sinkhorn_samples(x[0, 1, :3000].view(-1, 3), x[0, 2, :300].view(-1, 3), 2.0)
        assigned = ot.sinkhorn_assign(x[:, 0, :1000].T)
        return [m.mean, m.m2, y, z, s, t, dense.f, dense.plan(), dense.value, sampled.f, sampled.value, assigned]

    def child(body):
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            try:
                os._exit(0 if body() else 3)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(4)
        return os.waitpid(pid, 0)[1]

    expected = work()
    same = lambda: all(torch.equal(a, b) for a, b in zip(work(), expected))
"""


_BODIES = (
    "same()",
    "shiftkern.get_num_threads() == 1 and same()",
    "shiftkern.set_num_threads(2) or same()",
    "same() and (shiftkern.set_num_threads(2) or same())",
    "(shiftkern.set_num_threads(2) or same()) and child(lambda: same()) == 0",  # a grandchild
    "(shiftkern.set_num_threads(3) or same()) and child(lambda: shiftkern.set_num_threads(3) or same()) == 0",
)


def test_kernels_work_in_a_forked_child():
    # One parent for all children: the pool was used before each fork.
    children = "".join(f"\n    print(child(lambda: {body}), same())" for body in _BODIES)
    assert output(_PRELUDE + children, deadline=90).splitlines() == ["0 True"] * len(_BODIES)


def test_kernels_work_in_a_child_forked_while_others_compute():
    script = f"""{_PRELUDE}
    import threading
    stop = threading.Event()
    def spin():
        while not stop.is_set():
            norm.channel_moments(x)
    threads = [threading.Thread(target=spin, daemon=True) for _ in range(2)]
    [t.start() for t in threads]
    results = [child(lambda: shiftkern.set_num_threads(2) or same()) for _ in range(5)]
    stop.set()
    [t.join() for t in threads]
    print(results, same())
    """
    assert output(script) == "[0, 0, 0, 0, 0] True"


def test_data_loader_workers():
    script = f"""{_PRELUDE}
    from torch.utils.data import DataLoader, Dataset

    class Data(Dataset):
        def __len__(self):
            return 12
        def __getitem__(self, i):
            if i % 2:
                shiftkern.set_num_threads(2)
            return solve(i), shiftkern.get_num_threads()

    def solve(i):
        costs = x[0, 0, :9000].view(300, 30).abs() + i
        return torch.cat([norm.channel_moments(x + i).mean, ot.sinkhorn(None, None, costs, 0.5).f.double()])

    loader = DataLoader(Data(), batch_size=3, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        found = torch.cat([solved for solved, _ in loader])
        assert torch.equal(found, torch.stack([solve(i) for i in range(12)]))
    print("done")
    """
    assert output(script) == "done"


def test_spawned_processes():
    script = """
        import sys, torch, shiftkern
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from shiftkern.norm import channel_moments
        if __name__ == "__main__":
            x = torch.randn(8, 6, 10007)
            with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
                there = pool.submit(channel_moments, x).result(40)
            print(torch.equal(there.m2, channel_moments(x).m2))
    """
    assert output(script, deadline=90) == "True"
