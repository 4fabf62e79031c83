"""Reversible networks against the same equations with all activations kept."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import shiftkern
from shiftkern.peft import ReversibleBlock, ReversibleSequence, meft_block, reversible_sequence

D = 6


def part(seed: int, dropout: float = 0.0, width: int = 9) -> nn.Module:
    layers = [nn.LayerNorm(D), nn.Linear(D, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, D)]
    made = nn.Sequential(*layers)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g))
    return made


def chain(count: int, dropout: float = 0.0, **options) -> nn.ModuleList:
    return nn.ModuleList(
        [ReversibleBlock(part(2 * i, dropout), part(2 * i + 1, dropout), **options) for i in range(count)]
    )


def streams(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, 4, 3, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return tuple(t.clone().requires_grad_() for t in both.unbind())  # type: ignore[return-value]


def by_hand(blocks, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """The equations, with everything kept by autograd."""
    for block in blocks:
        y1 = block.lam * x1 + block.f(x2)
        y2 = block.beta * x2 + block.g(y1)
        x1, x2 = (y2, y1) if block.swap else (y1, y2)
    return x1, x2


def results(call, blocks, x1: Tensor, x2: Tensor) -> list[Tensor]:
    """Outputs, and gradients of a loss that sees both streams in different ways."""
    y1, y2 = call(blocks, x1, x2)
    loss = (y1 * y1.detach().roll(1)).sum() + y2.sin().sum()
    inputs = [t for t in (x1, x2, *blocks.parameters()) if t.requires_grad]
    return [y1, y2, *torch.autograd.grad(loss, inputs, allow_unused=True)]


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("lam", "beta"), [(1.0, 1.0), (0.1, 1.0), (1.0, 0.1), (0.1, 0.1), (3.0, 0.5)])
@pytest.mark.parametrize("max_growth", [1.0, 1e3, math.inf])
def test_outputs_and_gradients(count: int, swap: bool, lam: float, beta: float, max_growth: float):
    blocks = chain(count, lam=lam, beta=beta, swap=swap).double()
    want = results(by_hand, blocks, *streams())

    def call(blocks, x1, x2):
        return reversible_sequence(blocks, x1, x2, max_growth=max_growth)

    for got, expected in zip(results(call, blocks, *streams()), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    blocks = chain(2, lam=0.5, swap=True).double()
    names = [name for name, _ in blocks.named_parameters()]

    def call(x1, x2, *values):
        held = {f"blocks.{n}": v for n, v in zip(names, values, strict=True)}
        return torch.func.functional_call(holder, held, (x1, x2))

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x1, x2):
            return reversible_sequence(self.blocks, x1, x2)

    holder = Holder()
    x1, x2 = (t[:1, :1].detach().clone().requires_grad_() for t in streams())
    assert torch.autograd.gradcheck(call, (x1, x2, *blocks.parameters()))


@pytest.mark.parametrize("swap", [False, True])
def test_inverse(swap: bool):
    x1, x2 = streams()
    for block in chain(3, lam=0.3, beta=2.0, swap=swap).double():
        back = block.inverse(*block(x1, x2))
        torch.testing.assert_close(back, (x1, x2), rtol=1e-12, atol=1e-12)
        want = by_hand([block], x1, x2)
        torch.testing.assert_close(block(x1, x2), want, rtol=0, atol=0)


def test_dropout_is_replayed_and_the_generator_goes_on():
    blocks = chain(4, dropout=0.5).double()
    torch.manual_seed(3)
    want = results(by_hand, blocks, *streams())
    after = torch.get_rng_state()
    torch.manual_seed(3)
    got = results(reversible_sequence, blocks, *streams())
    assert torch.equal(torch.get_rng_state(), after)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    # Random numbers drawn between the two passes do not matter.
    torch.manual_seed(3)
    x1, x2 = streams()
    y1, y2 = reversible_sequence(blocks, x1, x2)
    torch.rand(100)
    (slope,) = torch.autograd.grad((y1 * y1.detach().roll(1)).sum() + y2.sin().sum(), x1)
    torch.testing.assert_close(slope, want[2], rtol=1e-9, atol=1e-9)


def kept_bytes(call) -> int:
    """Bytes that autograd keeps between the passes."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def test_memory_does_not_grow_with_the_number_of_blocks():
    def kept(count: int, **options) -> int:
        x1, x2 = streams(torch.float32)
        blocks = chain(count, **options)
        return kept_bytes(lambda: reversible_sequence(blocks, x1, x2))

    assert kept(1) == kept(2) == kept(30)
    pair = 2 * 4 * 3 * D * 4
    assert kept(30) == pair
    # Streams in between, where errors would grow: before every third block.
    assert kept(12, lam=0.1) == 4 * pair
    plain = chain(30)
    assert kept_bytes(lambda: by_hand(plain, *streams(torch.float32))) > 50 * pair


def test_errors_do_not_grow_beyond_the_limit():
    blocks = chain(12, lam=0.1, swap=True)
    x1, x2 = streams(torch.float32)
    want = results(by_hand, copy.deepcopy(blocks).double(), *streams())

    def error(max_growth: float) -> float:
        got = results(lambda b, *x: reversible_sequence(b, *x, max_growth=max_growth), blocks, x1, x2)
        return max(((a - b).norm() / (b.norm() + 1e-9)).item() for a, b in zip(got, want, strict=True))

    assert error(1e3) < 1e-4
    # What the limit is good for.
    assert not error(math.inf) < 1e-3


def test_frozen_parts():
    blocks = chain(5).double()
    for i, block in enumerate(blocks):
        block.requires_grad_(i in (2, 4))
        block.f.requires_grad_(i == 4)
    x1, x2 = (t.detach() for t in streams())
    ran = []
    for i, block in enumerate(blocks):
        block.f.register_forward_hook(lambda *_, i=i: ran.append(i))
    got = results(reversible_sequence, blocks, x1, x2)
    # Blocks below the first one with something to train are not run again.
    assert ran == [0, 1, 2, 3, 4, 4, 3, 2]
    for a, b in zip(got, results(by_hand, blocks, x1, x2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    blocks.requires_grad_(False)
    y1, y2 = reversible_sequence(blocks, x1, x2)
    assert not y1.requires_grad
    assert not y2.requires_grad


def test_one_module_in_several_blocks():
    shared = part(0).double()
    blocks = nn.ModuleList(
        [ReversibleBlock(shared, part(i).double()) for i in (1, 2)] + [ReversibleBlock(shared, shared)]
    )
    for a, b in zip(
        results(reversible_sequence, blocks, *streams()), results(by_hand, blocks, *streams()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_parts_without_gradients():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(x)

    blocks = nn.ModuleList([ReversibleBlock(Constant(), nn.Identity()), ReversibleBlock(nn.Identity(), Constant())])
    for a, b in zip(
        results(reversible_sequence, blocks, *streams()), results(by_hand, blocks, *streams()), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    blocks = chain(3).to(dtype)
    got = results(reversible_sequence, blocks, *streams(dtype))
    want = results(
        by_hand, copy.deepcopy(blocks).double(), *(t.detach().double().requires_grad_() for t in streams(dtype))
    )
    unit = torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm().item() <= 60 * unit * (b.norm().item() + 1)


def test_autocast_is_replayed():
    blocks, (x1, x2) = chain(3), streams(torch.float32)

    def cast(call):
        def wrapped(*arguments):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(*arguments)

        return wrapped

    seen = []
    for block in blocks:
        block.f[1].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    got = results(cast(reversible_sequence), blocks, x1, x2)
    assert seen == 6 * [torch.bfloat16]
    assert got[0].dtype == torch.float32
    for a, b in zip(got, results(cast(by_hand), blocks, x1, x2), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_sequence_is_the_mean_of_both_streams():
    h = streams()[0]
    net = ReversibleSequence(chain(3, lam=0.5).double())
    y1, y2 = by_hand(net.blocks, h, h)
    torch.testing.assert_close(net(h), (y1 + y2) / 2)
    (got,) = torch.autograd.grad(net(h).sin().sum(), h)
    (want,) = torch.autograd.grad(((y1 + y2) / 2).sin().sum(), h)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    twin = ReversibleSequence(chain(3, lam=0.5).double())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(h), net(h))
    assert torch.equal(copy.deepcopy(net)(h), net(h))


def test_variants_of_the_paper():
    layer, adapter = part(0), part(1)
    one, two, three = (meft_block(layer, adapter, variant) for variant in (1, 2, 3))
    assert (one.f, one.g, one.lam, one.beta, one.swap) == (layer, adapter, 0.1, 1.0, True)
    assert (two.f, two.g, two.lam, two.beta, two.swap) == (adapter, layer, 1.0, 0.1, True)
    assert (three.f, three.g, three.lam, three.beta, three.swap) == (layer, adapter, 0.1, 0.1, False)


def test_second_derivative_is_refused():
    blocks, (x1, x2) = chain(1).double(), streams()
    y1, _ = reversible_sequence(blocks, x1, x2)
    (slope,) = torch.autograd.grad(y1.square().sum(), x1, create_graph=True)
    with pytest.raises(shiftkern.NotDifferentiableError, match="reversible_sequence"):
        slope.sum().backward()


def test_writing_to_an_output_before_the_backward_pass_is_noticed():
    y1, y2 = reversible_sequence(chain(1).double(), *streams())
    loss = (y1 * y2).sum()
    with torch.no_grad():
        y1.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"f": torch.tanh}, "f"),
        ({"g": None}, "g"),
        ({"lam": 0.0}, "lam"),
        ({"beta": -1.0}, "beta"),
        ({"swap": 1}, "swap"),
    ],
)
def test_block_refuses(options, name: str):
    with pytest.raises(shiftkern.ArgumentError, match=f"ReversibleBlock: argument '{name}'"):
        ReversibleBlock(**{"f": nn.Identity(), "g": nn.Identity(), **options})


def test_parts_that_change_the_shape_are_refused():
    x1, x2 = streams(torch.float32)
    for block, name in (
        (ReversibleBlock(nn.Linear(D, 2), part(0)), "f"),
        (ReversibleBlock(part(0), nn.Flatten()), "g"),
    ):
        with pytest.raises(shiftkern.ArgumentError, match=f"ReversibleBlock: argument '{name}'"):
            block(x1, x2)
        with pytest.raises(shiftkern.ArgumentError, match=f"ReversibleBlock: argument '{name}'"):
            reversible_sequence([block], x1, x2)


def test_arguments_that_do_not_fit():
    x1, x2 = streams(torch.float32)
    block = ReversibleBlock(part(0), part(1))
    for bad, name in (
        (([], x1, x2), "blocks"),
        ((block, x1, x2), "blocks"),
        (([nn.Identity()], x1, x2), r"blocks\[0\]"),
        (([block], x1.long(), x2), "x1"),
        (([block], x1, x2[:2]), "x2"),
        (([block], x1, x2.double()), "x2"),
        (([block], x1, None), "x2"),
    ):
        with pytest.raises(shiftkern.ArgumentError, match=f"reversible_sequence: argument '{name}'"):
            reversible_sequence(*bad)
    for growth in (0.5, "much", None):
        with pytest.raises(shiftkern.ArgumentError, match="argument 'max_growth'"):
            reversible_sequence([block], x1, x2, max_growth=growth)
        with pytest.raises(shiftkern.ArgumentError, match="ReversibleSequence: argument 'max_growth'"):
            ReversibleSequence([block], max_growth=growth)
    for call in (block, block.inverse):
        with pytest.raises(shiftkern.ArgumentError, match=r"argument '[xy]2'"):
            call(x1, x2[:1])
    with pytest.raises(shiftkern.ArgumentError, match="argument 'h'"):
        ReversibleSequence([block])(None)
    for bad in (
        (nn.Identity(), nn.Identity(), 4),
        (nn.Identity(), 3, 1),
        (3, nn.Identity(), 1),
        (part(0), part(1), 1.5),
    ):
        with pytest.raises(shiftkern.ArgumentError, match="meft_block: argument"):
            meft_block(*bad)
