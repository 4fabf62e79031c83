"""Ctrl-C stops a long kernel, and the library works on."""

import pytest

from helpers.process import output

_SCRIPT = """
    import os, signal, threading, time
    import torch, shiftkern
    from shiftkern import norm, ot

    shiftkern.set_num_threads({threads})
    small = torch.randn(8, 6, 10007)
    expected = norm.channel_moments(small).m2
    {setup}
    sent = []

    def interrupt():
        time.sleep(0.5)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    try:
        {call}
        print("finished in", time.monotonic() - start)
    except KeyboardInterrupt:
        delay = time.monotonic() - sent[0]
        assert delay < 1.5, delay
        assert torch.equal(norm.channel_moments(small).m2, expected)
        print("interrupted")
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_one_long_call(threads):
    # 512 instances x 512 channels x 8000 components: many seconds in one kernel.
    script = _SCRIPT.format(
        threads=threads,
        setup="x, mean = torch.randn(512, 512), torch.randn(8000, 512); var = torch.ones_like(mean)",
        call="norm.unmix_norm(x, mean, var)",
    )
    assert output(script) == "interrupted"


@pytest.mark.parametrize("threads", [1, 2])
def test_many_short_kernels_in_one_call(threads):
    # Each tensor takes well under the 20 ms after which a kernel asks; together they take seconds.
    script = _SCRIPT.format(
        threads=threads,
        setup="t = torch.zeros(4_000_000); v = torch.ones(4_000_000)",
        call="norm.ema_update_([t] * 8_000, [v] * 8_000, 0.5)",
    )
    assert output(script) == "interrupted"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(2000, 2000), (20, 30)])
def test_many_iterations(threads, shape):
    # Annealed so slowly that the solve can end neither well nor badly.
    script = _SCRIPT.format(
        threads=threads,
        setup=f"M = torch.rand{shape}",
        call="ot.sinkhorn(None, None, M, 1e-4, reg_init=1.0, reg_decay=1 - 1e-9, max_iter=100_000_000)",
    )
    assert output(script) == "interrupted"


# Annealing that never arrives keeps a problem of any size busy.
_ENDLESS = "reg_init=1e3, reg_decay=0.999999999, max_iter=100_000_000"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("setup", "call"),
    [
        ("M = torch.rand(2000, 2000)", f"ot.sinkhorn(None, None, M, 0.1, {_ENDLESS})"),
        ("M = torch.rand(3, 3)", f"ot.sinkhorn(None, None, M, 0.1, {_ENDLESS})"),
        ("M = torch.rand(200, 16, 16)", f"ot.sinkhorn_batch(M, 0.1, {_ENDLESS.replace('00_000_000', '_000_000')})"),
        ("M = torch.rand(3, 300, 300)", f"ot.sinkhorn_batch(M, 0.1, {_ENDLESS})"),
        ("X = torch.randn(3000, 16)", f"ot.sinkhorn_samples(X, X, 0.1, {_ENDLESS})"),
        ("X = torch.randn(5, 2)", f"ot.sinkhorn_samples(X, X, 0.1, {_ENDLESS})"),
        ("M = torch.rand(40, 50)", f"ot.sinkhorn_partial(None, None, M, 0.1, 0.5, {_ENDLESS})"),
        # One pass over the pairs of points takes seconds.
        ("X = torch.randn(60_000, 256)", "ot.sinkhorn_samples(X, X, 0.1, max_iter=1)"),
        ("S = torch.rand(5000, 4000)", "ot.sinkhorn_assign(S, 0.01, n_iter=10_000)"),
    ],
    ids=["dense", "tiny", "batch", "large batch", "samples", "few samples", "partial", "one pass", "assign"],
)
def test_transport(threads, setup, call):
    script = _SCRIPT.format(threads=threads, setup=setup, call=call)
    assert output(script) == "interrupted"


def test_many_short_calls():
    script = _SCRIPT.format(
        threads=2,
        setup="x = torch.randn(8, 6, 10007)",
        call="[norm.channel_moments(x) for _ in range(1_000_000)]",
    )
    assert output(script) == "interrupted"


def test_a_handler_of_the_users_own_sees_its_exception():
    script = """
        import os, signal, threading, time, torch
        from shiftkern import norm

        class Stop(Exception):
            pass

        def handler(*_):
            raise Stop

        signal.signal(signal.SIGINT, handler)
        x, mean = torch.randn(512, 512), torch.randn(8000, 512)
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            norm.unmix_norm(x, mean, torch.ones_like(mean))
        except Stop:
            print("stopped")
    """
    assert output(script) == "stopped"
