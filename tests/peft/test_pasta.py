import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import PASTAConfig, adapted_layers, disable_adapter, inject, merge

from helpers.peft import fixed

CLS, SEP = 7, 9


class Layer(nn.Module):
    """A layer that mixes tokens, called as transformers calls it; a tuple comes back."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, hidden_states, mask=None):
        return (hidden_states + torch.tanh(self.dense(hidden_states.mean(-2, keepdim=True) + hidden_states)),)


class Encoder(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.layer = nn.ModuleList([Layer(), Layer()])
        self.recompute = recompute

    def forward(self, ids=None, embeddings=None):
        h = self.words(ids) if embeddings is None else embeddings
        h = h + self.positions(torch.arange(h.shape[-2]))
        for layer in self.layer:
            h = checkpoint(layer, h, use_reentrant=False)[0] if self.recompute else layer(hidden_states=h)[0]
        return h


IDS = torch.tensor([[CLS, 1, SEP, 2, SEP, 0], [CLS, 3, 4, 5, SEP, 0], [1, 2, 3, 4, 5, 6]])
CONFIG = PASTAConfig(target_modules=["words", "layer.0", "layer.1"], tokens=[CLS, SEP], dropout=0.0)


def encoder(**kwargs):
    return fixed(Encoder(**kwargs), torch.float64)


def test_each_occurrence_gets_its_vector_before_each_layer():
    model = inject(encoder(), CONFIG)
    base = encoder()
    h = base.words(IDS) + base.positions(torch.arange(6))
    for i in range(2):
        v = adapted_layers(model)[f"layer.{i}"].adapter("default").vectors
        assert v.shape == (3, 8)
        assert 0.01 < float(v.std()) < 0.03
        h = h.clone()
        for row in range(3):
            count = 0
            for t in range(6):
                if IDS[row, t] in (CLS, SEP):
                    h[row, t] += v[count]
                    count += 1
        h = base.layer[i](h)[0]
    torch.testing.assert_close(model(IDS), h, rtol=1e-12, atol=1e-12)


def test_rows_without_special_tokens_are_the_base_model():
    model = inject(encoder(), CONFIG)
    assert torch.equal(model(IDS)[2], encoder()(IDS)[2])
    assert not torch.equal(model(IDS)[1], encoder()(IDS)[1])


def test_gradients_reach_the_vectors_that_were_used():
    model = inject(encoder(), CONFIG)
    model(IDS[1:2]).square().sum().backward()
    grad = adapted_layers(model)["layer.0"].adapter("default").vectors.grad
    assert (grad.abs().sum(1) > 0).tolist() == [True, True, False]


def test_dropout_acts_in_training_only_and_on_what_is_added_only():
    config = PASTAConfig(target_modules=CONFIG.target_modules, tokens=[CLS, SEP], dropout=0.5, std=1.0)
    model = inject(encoder(), config)
    assert torch.equal(model(IDS), model(IDS))
    torch.manual_seed(0)
    model.train()
    seen = []
    hook = model.layer[0].base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(IDS)
    hook.remove()
    base = encoder()
    added = seen[0] - (base.words(IDS) + base.positions(torch.arange(6)))
    special = torch.isin(IDS, torch.tensor([CLS, SEP]))
    assert added[~special].abs().max() < 1e-12
    v = model.layer[0].adapters["default"].vectors
    kept = added[0, 0] / v[0]
    assert all(min(abs(k), abs(k - 2)) < 1e-6 for k in kept.tolist())
    share = float((added[special].abs() > 1e-12).double().mean())
    assert 0.2 < share < 0.8


def test_checkpointing_gives_the_same_gradients():
    models = [inject(encoder(recompute=r), CONFIG) for r in (False, True)]
    for model in models:
        model(IDS).square().sum().backward()
    plain, recomputed = (m.layer[0].adapters["default"].vectors.grad for m in models)
    torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


def test_embeddings_from_outside_are_refused_and_never_get_old_positions():
    model = inject(encoder(), CONFIG)
    outside = encoder().words(IDS)
    with pytest.raises(ArgumentError, match="token ids"):
        model(embeddings=outside)
    model(IDS)
    with pytest.raises(ArgumentError, match="token ids"):
        model(embeddings=outside)
    with disable_adapter(model):
        assert torch.equal(model(embeddings=outside), encoder()(IDS))
    # And it works again afterwards.
    assert torch.equal(model(IDS), inject(encoder(), CONFIG)(IDS))


def test_other_shapes_are_refused():
    model = inject(encoder(), CONFIG)
    model.words(IDS)
    with pytest.raises(ArgumentError, match="shape"):
        model.layer[0](torch.zeros(3, 4, 8, dtype=torch.float64))


def test_more_special_tokens_than_vectors_are_refused():
    model = inject(encoder(), CONFIG)
    with pytest.raises(ArgumentError, match="at most 3 special tokens in a sequence, got 4"):
        model(torch.tensor([[CLS, SEP, SEP, SEP]]))


def test_copies_do_not_share_positions():
    model = inject(encoder(), CONFIG)
    want = model(IDS)
    twin = copy.deepcopy(model)
    twin(IDS[:, :3])
    assert torch.equal(model(IDS), want)
    assert torch.equal(twin(IDS), want)


def test_it_cannot_be_merged():
    with pytest.raises(ArgumentError, match="PASTA"):
        merge(inject(encoder(), CONFIG))


@pytest.mark.parametrize("targets", [["layer.0"], ["words"], ["words", "positions", "layer.0"]])
def test_exactly_one_embedding_and_layers_are_needed(targets):
    with pytest.raises(ArgumentError, match=r"one nn\.Embedding"):
        inject(encoder(), PASTAConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"tokens": []}, ArgumentError, "tokens"),
        ({"tokens": 101}, ArgumentTypeError, "tokens"),
        ({"tokens": [-1]}, ArgumentError, "tokens"),
        ({"vectors": 0}, ArgumentError, "vectors"),
        ({"std": -0.1}, ArgumentError, "std"),
        ({"dropout": 1.0}, ArgumentError, "dropout"),
        ({"width": 0}, ArgumentError, "width"),
        ({"seed": -1}, ArgumentError, "seed"),
    ],
)
def test_errors(options, error, name):
    with pytest.raises(error, match=rf"PASTAConfig: argument '{name}': expected .*, got "):
        PASTAConfig(**options)
