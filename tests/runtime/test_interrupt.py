"""Ctrl-C stops a long kernel, and the library works on."""

import pytest

from helpers.process import output

_SCRIPT = """
    import os, signal, threading, time
    import torch, shiftkern
    from shiftkern import norm

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
