"""Rotations against torch operations, dense products, and the adapters of PEFT on one linear layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern.peft import BOFTConfig, Config, ETHERConfig, GOFTConfig, HRAConfig, LoRAConfig, OFTConfig, inject
from shiftkern.rotation import butterfly_rotate, cayley_rotate, givens_rotate, householder_chain, to_matrix

from harness import Result, interleave


def numbers(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_ways(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward with the same gradient each time."""
    gradient = numbers(*run().shape, seed=9)
    return lambda: torch.autograd.grad(run(), inputs, gradient)


def check(cases: dict[str, Callable[[], Any]], names: list[str]) -> None:
    """The cases must compute the same thing."""
    want = cases[names[0]]()
    for name in names[1:]:
        torch.testing.assert_close(cases[name](), want, atol=5e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def butterfly_in_torch(x: Tensor, theta: Tensor) -> Tensor:
    """Stage by stage on views: each reads and writes everything."""
    rows, d = x.shape
    cosine, sine = theta.cos(), theta.sin()
    stride, first = 1, 0
    while stride < d:
        low, high = x.view(rows, -1, 2, stride).unbind(2)
        c, s = (t[first : first + d // 2].view(-1, stride) for t in (cosine, sine))
        x = torch.stack((c * low - s * high, s * low + c * high), 2).view(rows, d)
        first += d // 2
        stride *= 2
    return x


def butterfly(rows: int, d: int) -> Result:
    x = numbers(rows, d)
    theta = numbers(d // 2 * (d.bit_length() - 1), seed=1)
    dense = to_matrix("givens_rotate", {"theta": theta, "topology": "butterfly"}, d)
    cases: dict[str, Callable[[], Any]] = {
        "shiftkern": lambda: givens_rotate(x, theta, topology="butterfly"),
        "torch, stage by stage": lambda: butterfly_in_torch(x, theta),
        "dense product": lambda: x @ dense.T,
        "copy": x.clone,
    }
    with torch.no_grad():
        check(cases, ["torch, stage by stage", "shiftkern", "dense product"])
        timings = interleave(cases, 7)
    asked = [("shiftkern", "torch, stage by stage", 30.0), ("shiftkern", "dense product", 10.0)]
    return Result(
        "butterfly of rotations, no gradient",
        f"{rows} x {d}",
        timings,
        ["shiftkern"],
        ["torch, stage by stage", "dense product"],
        "copy",
        asked if rows == d == 4096 else [],
    )


def tree_in_torch(x: Tensor, theta: Tensor) -> Tensor:
    """Each stage on the coordinates that still go on, half of those before; what is done is put aside."""
    cosine, sine = theta.cos(), theta.sin()
    heads, done, first = x, [], 0
    while heads.shape[1] > 1:
        pairs = heads.shape[1] // 2
        c, s = (t[first : first + pairs] for t in (cosine, sine))
        low, high = heads.view(len(x), pairs, 2).unbind(2)
        done.append(s * low + c * high)
        heads = c * low - s * high
        first += pairs
    y = heads
    for upper in reversed(done):
        y = torch.stack((y, upper), 2).view(len(x), -1)
    return y


def tree(rows: int, d: int) -> Result:
    x, theta = numbers(rows, d).requires_grad_(), numbers(d - 1, seed=1).requires_grad_()
    cases: dict[str, Callable[[], Any]] = {
        "shiftkern": both_ways(lambda: givens_rotate(x, theta), [x, theta]),
        "torch, stage by stage": both_ways(lambda: tree_in_torch(x, theta), [x, theta]),
    }
    check(cases, ["torch, stage by stage", "shiftkern"])
    return Result(
        "GOFT tree, forward and backward",
        f"{rows} x {d}",
        interleave(cases),
        ["shiftkern"],
        ["torch, stage by stage"],
        None,
        [("shiftkern", "torch, stage by stage", 3.0)] if d == 2048 else [],
    )


def chain_in_torch(x: Tensor, U: Tensor) -> Tensor:
    """Reflections on the activations, one after the other."""
    unit = U / U.norm(dim=0)
    for u in reversed(unit.unbind(1)):
        x = x - 2.0 * torch.outer(x @ u, u)
    return x


def chain(rows: int, d: int, r: int) -> Result:
    x, U = numbers(rows, d).requires_grad_(), numbers(d, r, seed=1).requires_grad_()

    def through_a_matrix() -> Tensor:
        unit, R = U / U.norm(dim=0), torch.eye(d)
        for u in unit.unbind(1):
            R = R - 2.0 * torch.outer(R @ u, u)
        return x @ R.T

    cases: dict[str, Callable[[], Any]] = {
        "shiftkern": both_ways(lambda: householder_chain(x, U), [x, U]),
        "torch, on activations": both_ways(lambda: chain_in_torch(x, U), [x, U]),
        "torch, d x d matrix as in PEFT": both_ways(through_a_matrix, [x, U]),
    }
    check(cases, list(cases))
    return Result(
        "HRA, forward and backward",
        f"{rows} x {d}, r={r}",
        interleave(cases, 5),
        ["shiftkern"],
        list(cases)[1:],
        None,
        [("shiftkern", "torch, on activations", 2.0)] if d == 2048 else [],
    )


def blocks(rows: int, d: int, side: int, factors: int) -> Result:
    x = numbers(rows, d).requires_grad_()
    skew = numbers(factors, d // side, side * (side - 1) // 2, seed=1, size=0.1).requires_grad_()
    upper = torch.triu_indices(side, side, 1)

    def in_torch() -> Tensor:
        square = torch.zeros(factors, d // side, side, side)
        square[:, :, upper[0], upper[1]] = skew
        Q = square - square.mT
        eye = torch.eye(side)
        R = torch.linalg.solve(eye - Q, eye + Q)
        y = x
        for i in range(factors):
            if i == 0:
                y = torch.einsum("nkc,krc->nkr", y.view(rows, -1, side), R[0]).reshape(rows, d)
                continue
            near, half = 1 << i, side // 2
            units = y.view(rows, -1, 2, near, half).transpose(2, 3).reshape(rows, -1, side)
            turned = torch.einsum("nkc,krc->nkr", units, R[i])
            y = turned.view(rows, -1, near, 2, half).transpose(2, 3).reshape(rows, d)
        return y

    def ours() -> Tensor:
        if factors == 1:
            return cayley_rotate(x, skew[0], block_size=side)
        return butterfly_rotate(x, skew, block_size=side, factors=factors)

    cases: dict[str, Callable[[], Any]] = {
        "shiftkern": both_ways(ours, [x, skew]),
        "torch, batched products": both_ways(in_torch, [x, skew]),
    }
    check(cases, list(cases))
    name = "OFT" if factors == 1 else f"BOFT, {factors} factors"
    return Result(
        f"{name}, forward and backward",
        f"{rows} x {d}, blocks of {side}",
        interleave(cases),
        ["shiftkern"],
        ["torch, batched products"],
    )


def adapted_layer(tokens: int, d: int) -> Result:
    """One linear layer, d to d: the input needs a gradient, as in the middle of a network."""
    import peft

    x = numbers(tokens, d).requires_grad_()
    linear = nn.Linear(d, d).requires_grad_(False)
    gradient = numbers(tokens, d, seed=2)

    def step(model: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(model(x), [x, *trained], gradient)

    def ours(config: Config) -> Callable[[], tuple[Tensor, ...]]:
        fresh = nn.Sequential(nn.Linear(d, d))
        fresh[0].load_state_dict(linear.state_dict())
        return step(inject(fresh, config))

    def theirs(config: Any) -> Callable[[], tuple[Tensor, ...]]:
        fresh = nn.Sequential(nn.Linear(d, d))
        fresh[0].load_state_dict(linear.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return step(peft.get_peft_model(fresh, config))

    targets = ["0"]
    mine = {
        "GOFT": ours(GOFTConfig()),
        "qGOFT": ours(GOFTConfig(quasi=True)),
        "OFT, blocks of 32": ours(OFTConfig(block_size=32)),
        "BOFT, 2 factors of 8": ours(BOFTConfig(block_size=8, factors=2)),
        "HRA, r=8": ours(HRAConfig(r=8)),
        "ETHER, 4 blocks": ours(ETHERConfig(blocks=4)),
        "LoRA, r=8": ours(LoRAConfig(r=8)),
    }
    peers = {
        "PEFT LoRA, r=8": theirs(peft.LoraConfig(r=8, target_modules=targets)),
        "PEFT OFT, blocks of 32": theirs(peft.OFTConfig(oft_block_size=32, target_modules=targets)),
        "PEFT HRA, r=8": theirs(peft.HRAConfig(r=8, target_modules=targets)),
        "PEFT BOFT, blocks of 8": theirs(peft.BOFTConfig(boft_block_size=8, target_modules=targets)),
    }
    cases = {**mine, **peers, "the layer alone": lambda: torch.autograd.grad(linear(x), [x], gradient)}
    # All start at the identity but ETHER, so that the gradients by x agree.
    want = cases["the layer alone"]()[0]
    for name, case in cases.items():
        if not name.startswith("ETHER"):
            torch.testing.assert_close(case()[0], want, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    asked = [("GOFT", "PEFT LoRA, r=8", 1.0)] if d == 1024 else []
    return Result(
        "adapted linear layer, forward and backward",
        f"{d} to {d}, {tokens} tokens",
        interleave(cases, 9),
        list(mine),
        list(peers),
        "the layer alone",
        asked,
    )


def results() -> Iterator[Result]:
    for n in (256, 1024, 4096):
        yield butterfly(n, n)
    for rows, d in ((16, 512), (256, 2048), (2048, 4096)):
        yield tree(rows, d)
    for rows, d in ((16, 512), (256, 2048), (1024, 4096)):
        yield chain(rows, d, 8)
    for side, factors in ((8, 1), (32, 1), (8, 2), (32, 2)):
        yield blocks(256, 2048, side, factors)
    for tokens, d in ((128, 256), (2048, 1024)):
        yield adapted_layer(tokens, d)
