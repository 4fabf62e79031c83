import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern import peft as own
from shiftkern.peft import ETHERConfig, GOFTConfig, hf

from helpers.peft import cnn, mlp, pictures, rows

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")

METHODS = [
    ("GOFT", {}),
    ("GOFT", {"quasi": True, "scale": True, "topology": "butterfly"}),
    ("ETHER", {"blocks": 2}),
    ("ETHER", {"blocks": 4, "plus": True, "two_sided": True}),
]
EVERY = pytest.mark.parametrize(("method", "options"), METHODS)
IDS = torch.arange(2, 14).view(2, 6)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf.register()


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).eval()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


MODELS = pytest.mark.parametrize(
    ("make", "targets"), [(bert, ["query", "output.dense"]), (llama, ["q_proj", "down_proj"])]
)


def output(model):
    result = model(IDS)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def config(method, options, **shared):
    return {"GOFT": hf.GOFTPeftConfig, "ETHER": hf.ETHERPeftConfig}[method](**options, **shared)


def own_config(method, options, **shared):
    return {"GOFT": GOFTConfig, "ETHER": ETHERConfig}[method](**options, **shared)


def move(model, seed=0):
    """Move what is trained by the same steps, whatever the names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def close(got, want):
    """A few layers of products of a dozen numbers: a few hundred roundings of the largest."""
    bound = 300 * torch.finfo(torch.float32).eps * float(want.detach().abs().max())
    assert float((got - want).detach().abs().max()) <= bound


@EVERY
@MODELS
def test_the_same_function_as_our_own_injection(method, options, make, targets):
    theirs = peft.get_peft_model(make(), config(method, options, target_modules=targets))
    ours = own.inject(make(), own_config(method, options, target_modules=targets))
    assert theirs.get_nb_trainable_parameters()[0] == own.trainable_parameters(ours)[0]
    assert torch.equal(output(theirs), output(ours))
    assert torch.equal(output(move(theirs)), output(move(ours)))
    if method == "GOFT":
        assert torch.equal(hf.penalty(theirs), own.penalty(ours))
    output(theirs).square().sum().backward()
    output(ours).square().sum().backward()
    grads = [[p.grad for p in model.parameters() if p.requires_grad] for model in (theirs, ours)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@EVERY
@pytest.mark.parametrize("lazily", [False, True])
def test_saved_and_loaded(method, options, lazily, tmp_path):
    model = move(peft.get_peft_model(bert(), config(method, options, target_modules=["query", "value"])))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not any("default" in name for name in file.keys())  # noqa: SIM118  (no mapping)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["peft_type"] == method
    assert options.items() <= described.items()
    again = peft.PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=lazily)
    assert torch.equal(output(again), output(model))
    assert not any(p.requires_grad for p in again.parameters())
    trained = peft.PeftModel.from_pretrained(bert(), tmp_path, adapter_name="other", is_trainable=True)
    assert torch.equal(output(trained), output(model))
    assert trained.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@EVERY
@MODELS
@pytest.mark.parametrize("safe", [False, True])
def test_merging(method, options, make, targets, safe):
    model = move(peft.get_peft_model(make(), config(method, options, target_modules=targets)))
    want, before = output(model), output(make())
    model.merge_adapter(safe_merge=safe)
    close(output(model), want)
    model.unmerge_adapter()
    close(output(model), want)
    model.merge_adapter()
    with model.disable_adapter():
        close(output(model), before)
    plain = model.merge_and_unload(safe_merge=safe)
    assert [type(m) for m in plain.modules()] == [type(m) for m in make().modules()]
    close(output(plain), want)


@EVERY
def test_unloading_and_disabling_give_the_base_model_to_the_bit(method, options):
    model = move(peft.get_peft_model(bert(), config(method, options)))
    before = output(bert())
    assert not torch.equal(output(model), before)
    with model.disable_adapter():
        assert torch.equal(output(model), before)
    assert torch.equal(output(model.unload()), before)


def test_the_merged_weight_is_the_one_of_our_own_injection():
    for method, options in METHODS:
        theirs = move(peft.get_peft_model(mlp(), config(method, options, target_modules=["0"]))).merge_and_unload()
        ours = own.merge_and_unload(move(own.inject(mlp(), own_config(method, options, target_modules=["0"]))))
        assert torch.equal(theirs[0].weight, ours[0].weight)


def test_convolutions():
    theirs = peft.get_peft_model(cnn(), hf.ETHERPeftConfig(blocks=2, target_modules=["0", "3"]))
    ours = own.inject(cnn(), ETHERConfig(blocks=2, target_modules=["0", "3"]))
    assert torch.equal(theirs(pictures()), ours(pictures()))


def test_several_adapters():
    first, second = hf.GOFTPeftConfig(target_modules=["query"]), hf.GOFTPeftConfig(quasi=True, target_modules=["key"])
    model = move(peft.get_peft_model(bert(), first))
    one = output(model)
    model.add_adapter("other", second)
    assert torch.equal(output(model), one)
    model.set_adapter("other")
    assert torch.equal(output(model), output(bert()))
    other = output(move(model, 1))
    model.base_model.set_adapter(["default", "other"])
    both = output(model)
    model.merge_adapter()
    close(output(model), both)
    model.unmerge_adapter()
    model.set_adapter("default")
    close(output(model), one)
    model.delete_adapter("default")
    model.set_adapter("other")
    close(output(model), other)


def test_two_adapters_on_one_layer_act_in_order():
    model = move(peft.get_peft_model(mlp(), hf.GOFTPeftConfig(target_modules=["0"])))
    model.add_adapter("other", hf.GOFTPeftConfig(topology="brick", layers=2, target_modules=["0"]))
    model.set_adapter("other")
    move(model, 1)
    model.base_model.set_adapter(["default", "other"])
    ours = move(own.inject(mlp(), GOFTConfig(target_modules=["0"])))
    own.inject(ours, GOFTConfig(topology="brick", layers=2, target_modules=["0"]), "other")
    own.set_adapter(ours, "other")
    move(ours, 1)
    own.set_adapter(ours, ["default", "other"])
    assert torch.equal(model(rows()), ours(rows()))
    model.merge_adapter()
    close(model(rows()), ours(rows()))


def test_modules_to_save_are_trained():
    options = {"target_modules": ["query"], "modules_to_save": ["pooler"]}
    model = peft.get_peft_model(bert(), hf.GOFTPeftConfig(**options))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("pooler" in name for name in names) == 2
    assert sum("goft_adapters" in name for name in names) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    model = peft.get_peft_model(bert().to(dtype), hf.GOFTPeftConfig())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert output(move(model)).dtype == dtype


def test_nan_is_not_merged():
    model = peft.get_peft_model(mlp(), hf.GOFTPeftConfig(target_modules=["0"]))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.unload()[0].weight, mlp()[0].weight)


def test_a_relaxed_reflection_without_inverse_keeps_the_weight():
    model = peft.get_peft_model(mlp(), hf.ETHERPeftConfig(blocks=1, plus=True, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        reflection = layer.ether_adapters["default"].inputs
        reflection.u.copy_(torch.eye(8)[:1])
        reflection.v.copy_(torch.eye(8)[1:2])
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, mlp()[0].weight)


def test_registering_twice_changes_nothing():
    before = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    hf.register()
    assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert before["GOFT"] is hf.GOFTPeftConfig


def test_a_method_of_that_name_in_peft_is_not_replaced(monkeypatch):
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "GOFT", peft.LoraConfig)
    with pytest.raises(RuntimeError, match="GOFT"):
        hf.register()


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for use in (hf.register, lambda: hf.GOFTPeftConfig):
        with pytest.raises(ImportError, match=r"pip install 'shiftkern\[peft\]'"):
            use()


def test_importing_the_module_does_not_import_peft():
    code = "import sys, shiftkern.peft.hf; print('peft' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


def test_errors():
    with pytest.raises(ArgumentError, match="'topology'"):
        hf.GOFTPeftConfig(topology="star")
    with pytest.raises(ArgumentError, match="'blocks'"):
        hf.ETHERPeftConfig(blocks=0)
    with pytest.raises(ArgumentError, match="a divisor of the 8 inputs"):
        peft.get_peft_model(mlp(), hf.ETHERPeftConfig(blocks=3, target_modules=["0"]))
    with pytest.raises(ArgumentError, match="'1', a Tanh"):
        peft.get_peft_model(mlp(), hf.GOFTPeftConfig(target_modules=["1"]))
    with pytest.raises(ArgumentError, match="penalty: argument 'model'"):
        hf.penalty(nn.Linear(2, 2))
    with pytest.raises(ArgumentTypeError, match="penalty: argument 'model'"):
        hf.penalty(None)
    with pytest.raises(AttributeError):
        _ = hf.NoSuchConfig
