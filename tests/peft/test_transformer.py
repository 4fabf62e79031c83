"""Models of transformers: names, tied heads, transposed layers, weights read in passing; training, merging, saving."""

import pytest
import torch

from shiftkern.peft import (
    BOFTConfig,
    GOFTConfig,
    HRAConfig,
    IA3Config,
    LoRAConfig,
    adapted_layers,
    disable_adapter,
    inject,
    load,
    merge,
    merge_and_unload,
    save,
    unload,
    unmerge,
)

from helpers.peft import train

transformers = pytest.importorskip("transformers")

TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 4]])


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=11, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def logits(model):
    more = {"decoder_input_ids": TOKENS} if isinstance(model, transformers.T5ForConditionalGeneration) else {}
    return model(input_ids=TOKENS, **more).logits


@pytest.mark.parametrize("make", [bert, gpt2, t5])
@pytest.mark.parametrize(
    "config", [LoRAConfig(r=2), GOFTConfig(), IA3Config(), HRAConfig(r=2), BOFTConfig(block_size=4, factors=2)]
)
def test_all_linear_layers(make, config, tmp_path):
    # Frozen as the adapted model is: torch chooses another kernel of attention, and other roundings, where something
    # before it is trained.
    base, model = make().requires_grad_(False), inject(make(), config)
    want = logits(base)
    assert not any("lm_head" in name for name in adapted_layers(model))
    torch.testing.assert_close(logits(model), want)
    train(model, 0.2)
    out = logits(model)
    assert not torch.allclose(out, want, atol=1e-3)
    with disable_adapter(model):
        assert torch.equal(logits(model), want)
    save(model, tmp_path)
    assert torch.equal(logits(load(make(), tmp_path)), out)
    merge(model)
    torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-4)
    unmerge(model)
    torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(unload(model)), want)


def test_a_classifier_is_fine_tuned_and_merged():
    model = bert()
    inject(model, LoRAConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]))
    assert len(adapted_layers(model)) == 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    labels = torch.tensor([2, 0])
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(logits(model), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits(model).argmax(1).tolist() == labels.tolist()
    want = logits(model)
    merge_and_unload(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert [type(m) for m in model.modules()] == [type(m) for m in bert().modules()]


def test_a_tied_head():
    model = gpt2()
    want = logits(model)
    train(inject(model, LoRAConfig(r=2, target_modules=["lm_head"])))
    out = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), out)
    unload(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(logits(model), want)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_generation_and_gradient_checkpointing():
    model = train(inject(gpt2(), LoRAConfig(r=2)), 0.3)
    greedy = model.generate(TOKENS[:, :2], max_new_tokens=4, do_sample=False, pad_token_id=0)
    merge(model)
    assert torch.equal(model.generate(TOKENS[:, :2], max_new_tokens=4, do_sample=False, pad_token_id=0), greedy)
    unmerge(model)
    model.train()
    for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    logits(model).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(plain) == 2 * len(adapted_layers(model))
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logits(model).square().sum().backward()
    for name, p in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(p.grad, plain[name])
