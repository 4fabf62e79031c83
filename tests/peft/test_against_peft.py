"""Hugging Face's peft with the same parameters: the same outputs and the same gradients."""

import pytest
import torch
from torch import nn

from shiftkern.peft import BOFTConfig, HRAConfig, IA3Config, LoRAConfig, OFTConfig, adapted_layers, inject, merge

from helpers.peft import cnn, mlp, pictures, rows, train

peft = pytest.importorskip("peft", minversion="0.21")
D = torch.float64


def theirs(config, model):
    return peft.get_peft_model(model, config).base_model.model.to(D).eval()


def same(ours, other, x, pairs):
    """Equal outputs, merged too, and equal gradients of ``pairs`` of parameters."""
    want = other(x)
    got = ours(x)
    torch.testing.assert_close(got, want)
    weights = torch.linspace(-1, 1, want.numel(), dtype=D).view_as(want)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad.reshape(-1), q.grad.reshape(-1))
    merge(ours)
    torch.testing.assert_close(ours(x), want)


def copied(pairs):
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p.reshape(q.shape))
    return pairs


def zero_padded(dtype):
    # peft's A pads with zeros whatever the layer does, so that its merged model is another one.
    model = cnn(dtype)
    model[0].padding_mode = "zeros"
    return model


@pytest.mark.parametrize(("make", "x", "names"), [(mlp, rows, ["0", "2"]), (zero_padded, pictures, ["0", "6"])])
def test_lora(make, x, names):
    ours = train(inject(make(D), LoRAConfig(r=2, alpha=6.0, target_modules=names)))
    other = theirs(peft.LoraConfig(r=2, lora_alpha=6, target_modules=names), make(D))
    pairs = []
    for name, layer in adapted_layers(ours).items():
        them, us = other.get_submodule(name), layer.adapters["default"]
        pairs += [(us.A, them.lora_A["default"].weight), (us.B, them.lora_B["default"].weight)]
    same(ours, other, x(D), copied(pairs))


def test_lora_on_an_embedding():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).to(D)

    ours = train(inject(make(), LoRAConfig(r=2, alpha=6.0, target_modules=["0"])))
    other = theirs(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), make())
    us, them = ours[0].adapters["default"], other[0]
    pairs = [(us.A, them.lora_embedding_A["default"]), (us.B, them.lora_embedding_B["default"])]
    same(ours, other, torch.tensor([[0, 3, 6, 3]]), copied(pairs))


def test_lora_starts_with_the_same_spread():
    ours = inject(nn.Sequential(nn.Linear(400, 3)), LoRAConfig(r=50))[0].adapters["default"].A
    other = theirs(peft.LoraConfig(r=50, target_modules=["0"]), nn.Sequential(nn.Linear(400, 3)))
    them = other[0].lora_A["default"].weight
    assert abs(ours.std().item() / them.std().item() - 1) < 0.05
    assert abs(ours.abs().max().item() / them.abs().max().item() - 1) < 0.01


@pytest.mark.parametrize("feedforward", [[], ["2"]])
def test_ia3(feedforward):
    ours = train(inject(mlp(D), IA3Config(feedforward_modules=feedforward)))
    other = theirs(peft.IA3Config(target_modules=["0", "2"], feedforward_modules=feedforward), mlp(D))
    pairs = [
        (layer.adapters["default"].l, other.get_submodule(name).ia3_l["default"])
        for name, layer in adapted_layers(ours).items()
    ]
    same(ours, other, rows(D), copied(pairs))


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_oft_on_the_exact_path(block_size):
    ours = train(inject(mlp(D), OFTConfig(block_size=block_size)))
    config = peft.OFTConfig(
        oft_block_size=block_size, target_modules=["0", "2"], use_cayley_neumann=False, module_dropout=0.0
    )
    other = theirs(config, mlp(D))
    pairs = [
        (layer.adapters["default"].skew, other.get_submodule(name).oft_R["default"].weight)
        for name, layer in adapted_layers(ours).items()
    ]
    same(ours, other, rows(D), copied(pairs))


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_hra(orthogonalize):
    ours = train(inject(mlp(D), HRAConfig(r=4, orthogonalize=orthogonalize)), 0.5)
    config = peft.HRAConfig(r=4, apply_GS=orthogonalize, target_modules=["0", "2"], init_weights=False)
    other = theirs(config, mlp(D))
    pairs = [
        (layer.adapters["default"].U, other.get_submodule(name).hra_u["default"])
        for name, layer in adapted_layers(ours).items()
    ]
    same(ours, other, rows(D), copied(pairs))


@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor")
def test_boft_with_one_factor(monkeypatch):
    # Without its CUDA extension peft computes one factor, whatever is asked. It would try to compile it here.
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    ours = train(inject(mlp(D), BOFTConfig(block_size=4, factors=1)))
    other = theirs(peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["0", "2"]), mlp(D))
    x = rows(D)
    with torch.no_grad():
        for name, layer in adapted_layers(ours).items():
            us, them = layer.adapters["default"], other.get_submodule(name)
            upper = torch.zeros(us.skew.shape[1], 4, 4, dtype=D)
            i, j = torch.triu_indices(4, 4, 1)
            upper[:, i, j] = us.skew[0]
            them.boft_R["default"].copy_((upper - upper.mT)[None])
            them.boft_s["default"].copy_(us.scale[:, None])
    torch.testing.assert_close(ours(x), other(x))
    merge(ours)
    torch.testing.assert_close(ours(x), other(x))
