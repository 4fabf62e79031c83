"""Methods that act on outputs of modules, or look at data first, in models of transformers."""

import pytest
import torch
import torch.nn.functional as F

from shiftkern import peft
from shiftkern.peft import AdaLinkConfig, DiffPruningConfig, FISHConfig, HoulsbyConfig, PASTAConfig, TTCConfig

transformers = pytest.importorskip("transformers")

CLS, SEP = 101, 102
IDS = torch.tensor([[CLS, 5, 9, SEP, 2, 7, SEP], [CLS, 3, 8, 4, SEP, 0, 0], [CLS, 1, 1, SEP, 6, 6, SEP]])
MASK = (IDS != 0).long()
LABELS = torch.tensor([0, 2, 1])
DATA = [(IDS[:2], MASK[:2], LABELS[:2]), (IDS[2:], MASK[2:], LABELS[2:])]


def bert():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.4,
    }
    config = transformers.BertConfig(vocab_size=110, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


def losses(model, batch):
    ids, mask, labels = batch
    return F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels, reduction="none")


def total(model):
    return losses(model, (IDS, MASK, LABELS)).sum()


def improves(model):
    """Train for a few steps; every adapted layer that has parameters must take part, and the loss fall."""
    adapters = [layer.adapter("default") for layer in peft.adapted_layers(model).values()]
    before = [[p.detach().clone() for p in adapter.parameters()] for adapter in adapters]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = total(model)
        value.backward()
        optimizer.step()
        values.append(value.item())
    for adapter, old in zip(adapters, before, strict=True):
        moved = [not torch.equal(*pair) for pair in zip(adapter.parameters(), old, strict=True)]
        assert any(moved) or not moved
    return values[-1] < values[0] - 1e-3


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (HoulsbyConfig(bottleneck=4, width=16, modules_to_save=["LayerNorm", "classifier"]), 4),
        (AdaLinkConfig(r=4, modules_to_save=["classifier"]), 1),
        (PASTAConfig(modules_to_save=["classifier"], dropout=0.0), 3),
        (DiffPruningConfig(modules_to_save=["classifier"]), 13),
    ],
)
def test_default_targets_are_trained_saved_and_taken_out(config, count, tmp_path):
    model = peft.inject(bert(), config)
    assert len(peft.adapted_layers(model)) == count
    assert improves(model)
    want = total(model)
    peft.save(model, tmp_path)
    assert torch.equal(total(peft.load(bert(), tmp_path)), want)
    peft.unload(model)
    assert torch.equal(total(model), total(bert()))


def test_adalink_finds_the_embeddings_of_a_decoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes))
    want = model.eval()(IDS % 40).logits
    peft.inject(model, AdaLinkConfig(r=2))
    assert list(peft.adapted_layers(model)) == ["model.embed_tokens"]
    torch.testing.assert_close(model(IDS % 40).logits, want)
    with torch.no_grad():
        model.model.embed_tokens.adapters["default"].up.add_(0.1)
    adapted = model(IDS % 40).logits
    assert not torch.allclose(adapted, want)
    # The head keeps the weight that it shares with the embeddings.
    peft.merge(model)
    torch.testing.assert_close(model(IDS % 40).logits, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vectorize", [False, True])
def test_a_fish_mask(vectorize):
    model = bert()
    config = FISHConfig(sparsity=0.02, target_modules=r".*(dense|query|LayerNorm|word_embeddings)")
    config = peft.fish_mask(model, config, DATA, lambda m, b: -losses(m, b), vectorize=vectorize, quiet=True)
    slow = peft.fish_mask(model, FISHConfig(sparsity=0.02), DATA, losses, vectorize=False, quiet=True)
    assert sum(slow.mask.values()) < sum(config.mask.values())
    assert improves(peft.inject(model, config))


def test_channels_of_layers():
    model = bert()
    config = TTCConfig(k=4, target_modules=r".*\.layer\.\d+", modules_to_save=["classifier"])
    config = peft.ttc_channels(model, config, DATA, losses, quiet=True)
    assert [len(c) for c in config.channels.values()] == [4, 4]
    assert improves(peft.inject(model, config))
