import threading

import pytest
import torch

import shiftkern
from shiftkern import ArgumentError, ArgumentTypeError, _runtime
from shiftkern.norm import channel_moments, mixed_batch_norm
from shiftkern.ot import sinkhorn

from helpers.process import output, run
from helpers.strategies import affine, make


def test_threads_are_read_back():
    for threads in (1, 2, 3, 64):
        shiftkern.set_num_threads(threads)
        assert shiftkern.get_num_threads() == threads


@pytest.mark.parametrize(
    ("threads", "error"),
    [(0, ArgumentError), (-1, ArgumentError), ("x", ArgumentTypeError), ("2", ArgumentTypeError),
     (1.0, ArgumentTypeError), (True, ArgumentTypeError), (None, ArgumentTypeError)],
)  # fmt: skip
def test_bad_numbers_are_refused_and_change_nothing(threads, error):
    shiftkern.set_num_threads(2)
    with pytest.raises(error, match=r"^set_num_threads: argument 'threads': expected an integer >= 1, got "):
        shiftkern.set_num_threads(threads)
    assert shiftkern.get_num_threads() == 2


def test_more_threads_than_blocks_or_cores():
    x = make((8, 6, 10007))
    expected = channel_moments(x).m2
    shiftkern.set_num_threads(10**6)
    assert torch.equal(channel_moments(x).m2, expected)
    shiftkern.set_num_threads(2**31 - 1)
    assert torch.equal(channel_moments(make((2, 3))).mean, channel_moments(make((2, 3))).mean)
    with pytest.raises(ArgumentError, match=r"^set_num_threads: argument 'threads': "):
        shiftkern.set_num_threads(2**70)


def test_the_default_follows_torch():
    script = """
        import torch, shiftkern
        torch.set_num_threads(3)
        print(shiftkern.get_num_threads())
        torch.set_num_threads(1)
        print(shiftkern.get_num_threads())
        shiftkern.set_num_threads(2)
        print(shiftkern.get_num_threads())
    """
    assert output(script, SHIFTKERN_NUM_THREADS="").split() == ["3", "1", "2"]


@pytest.mark.parametrize(("text", "threads"), [("3", "3"), (" 1 ", "1")])
def test_environment_variable(text, threads):
    assert output("import shiftkern; print(shiftkern.get_num_threads())", SHIFTKERN_NUM_THREADS=text) == threads


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "99999999999999999999"])
def test_bad_environment_variables(text, monkeypatch):
    monkeypatch.setenv("SHIFTKERN_NUM_THREADS", text)
    with pytest.raises(ArgumentError, match=r"^import shiftkern: argument 'SHIFTKERN_NUM_THREADS': expected "):
        _runtime._from_environment()


@pytest.mark.parametrize("text", ["two"])
def test_a_bad_environment_variable_is_named(text):
    done = run("import shiftkern", SHIFTKERN_NUM_THREADS=text)
    assert done.returncode == 1
    assert "ArgumentError: import shiftkern: argument 'SHIFTKERN_NUM_THREADS'" in done.stderr
    assert text in done.stderr.splitlines()[-1]


def test_python_threads_calling_at_once_get_equal_bits():
    x, arguments = make((8, 6, 10007)), affine(6)
    shiftkern.set_num_threads(2)
    expected = channel_moments(x).m2, mixed_batch_norm(x, *arguments, source_weight=0.3)
    costs = x[0, 0, :9000].view(300, 30).abs()
    plan = sinkhorn(None, None, costs, 0.5).plan()
    wrong: list[str] = []

    def work() -> None:
        for _ in range(15):
            if not torch.equal(channel_moments(x).m2, expected[0]):
                wrong.append("moments")
            if not torch.equal(mixed_batch_norm(x, *arguments, source_weight=0.3), expected[1]):
                wrong.append("norm")
            if not torch.equal(sinkhorn(None, None, costs, 0.5).plan(), plan):
                wrong.append("transport")

    workers = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


def test_build_info():
    info = shiftkern.build_info()
    assert info["version"] == shiftkern.__version__
    assert info["profile"] == "release"
