import copy

import pytest
import torch

import peft as hf
import shiftkern
from shiftkern import peft
from shiftkern.testing import assert_merge_roundtrip, assert_same_bits

from field_station import reports

TOKENS = torch.arange(48).view(4, 12) % 29


def windowed_mask(n):
    offset = torch.arange(n) - torch.arange(n)[:, None]
    return ((offset <= 0) & (offset > -reports.WINDOW))[None, None]


def test_attention_is_that_of_transformers_with_a_mask():
    ours, theirs = reports.writer(), reports.writer("sdpa")
    with torch.no_grad():
        got = ours(TOKENS).logits
        mask = windowed_mask(TOKENS.shape[1]).expand(len(TOKENS), -1, -1, -1)
        torch.testing.assert_close(got, theirs(TOKENS, attention_mask=mask).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, theirs(TOKENS).logits, atol=1e-3)
        assert_same_bits(lambda: ours(TOKENS).logits, threads=(1, 2))


@pytest.mark.parametrize(
    "config", [peft.LoRAConfig(r=2), peft.GOFTConfig(), peft.SSFConfig()], ids=lambda c: c.peft_type
)
def test_adapters_learn_and_merge(config):
    model = reports.writer()
    before = copy.deepcopy(model.state_dict())
    peft.inject(model, config)
    losses = reports.tune(model, TOKENS)
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    with torch.no_grad():
        want = model(TOKENS).logits
        plain = peft.merge_and_unload(copy.deepcopy(model))
        torch.testing.assert_close(plain(TOKENS).logits, want, rtol=1e-3, atol=1e-4)
    assert type(plain) is type(reports.writer())
    back = peft.unload(model).state_dict()
    assert all(torch.equal(back[name], before[name]) for name in before)


def test_the_round_trip_of_a_transformer():
    assert_merge_roundtrip(reports.writer(), peft.LoRAConfig(r=2), TOKENS)


def test_adapters_are_saved_and_loaded(tmp_path):
    model = reports.station(reports.writer(), peft.LoRAConfig(r=2), TOKENS).eval()
    peft.save(model, tmp_path / "adapter")
    other = peft.load(reports.writer(), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_the_same_adapter_in_peft():
    """The numbers of one LoRA, put into the layers of both libraries."""
    ours = peft.inject(reports.writer(), peft.LoRAConfig(r=2, alpha=4.0, target_modules=["q_proj", "v_proj"]))
    theirs = hf.get_peft_model(reports.writer(), hf.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    assert peft.trainable_parameters(ours)[0] == theirs.get_nb_trainable_parameters()[0]
    layers = {name.removeprefix("base_model.model."): layer for name, layer in theirs.named_modules()}
    with torch.no_grad():
        for name, layer in peft.adapted_layers(ours).items():
            numbers = [p for p in layer.adapters["default"].parameters() if p.requires_grad]
            a, b = sorted(numbers, key=lambda p: p.shape[0] != 2)
            b.normal_(generator=torch.Generator().manual_seed(len(name)))
            layers[name].lora_A["default"].weight.copy_(a)
            layers[name].lora_B["default"].weight.copy_(b)
        torch.testing.assert_close(ours.eval()(TOKENS).logits, theirs.eval()(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_stations_become_one_model():
    base = reports.writer().state_dict()
    stations = []
    for seed in range(2):
        model = reports.writer()
        reports.tune(model, (TOKENS + 7 * seed) % 29, steps=5)
        stations.append(model.state_dict())
    merged = reports.writer()
    merged.load_state_dict(reports.one_of_all(base, stations))
    with torch.no_grad():
        losses = [float(m(input_ids=TOKENS, labels=TOKENS).loss) for m in (reports.writer(), merged)]
    assert losses[1] < losses[0]


def test_the_library_is_the_installed_one():
    assert shiftkern.build_info()["profile"] == "release"
    assert shiftkern.__version__
