"""Files: what is written, what is read back, and that nothing damaged, foreign or ill-fitting gets in."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shiftkern import ArgumentError, ArgumentTypeError
from shiftkern.peft import (
    LoRAConfig,
    SSFConfig,
    adapted_layers,
    inject,
    load,
    merge,
    save,
    set_adapter,
    trainable_parameters,
)

from helpers.peft import cnn, mlp, pictures, rows, train

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(folder, **options):
    model = train(inject(mlp(), LoRAConfig(r=2, target_modules=["0"], **options)))
    save(model, folder)
    return model


def edit(folder, **values):
    path = folder / CONFIG
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps(config))


def rewrite(folder, change, keep_note=True):
    from safetensors import safe_open

    path = folder / TENSORS
    with safe_open(path, "pt") as file:
        note = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, note if keep_note else None)


def refused(folder, match, model=None):
    """The files are refused, by name, and the model is as before."""
    model = model or mlp()
    before = [(name, id(m)) for name, m in model.named_modules()]
    with pytest.raises(ArgumentError, match=match) as error:
        load(model, folder)
    assert str(folder) in str(error.value)
    assert [(name, id(m)) for name, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_the_files_hold_the_config_and_the_adapters_tensors_only(tmp_path):
    model = saved(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config == {
        "format": 1,
        "peft_type": "LORA",
        "target_modules": ["0"],
        "modules_to_save": [],
        "r": 2,
        "alpha": 8.0,
        "dropout": 0.0,
        "freeze_a": False,
        "seed": 0,
        "active": 0,
    }
    tensors = load_file(tmp_path / TENSORS)
    assert sorted(tensors) == ["layers.0.A", "layers.0.B"]
    assert torch.equal(tensors["layers.0.B"], model[0].adapters["default"].B)


def test_several_adapters_with_their_order(tmp_path):
    model = inject(mlp(), LoRAConfig(r=2))
    inject(model, SSFConfig(target_modules=["0"]), "scale")
    inject(model, SSFConfig(target_modules=["2"]), "idle")
    train(model)
    set_adapter(model, ["scale", "default"])
    save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS, "idle", "scale"]
    again = load(mlp(), tmp_path)
    assert again[0].active == ["scale", "default"]
    assert list(again[2].adapters) == ["default", "idle"]
    assert torch.equal(again(rows()), model(rows()))
    assert trainable_parameters(again) == trainable_parameters(model)


def test_one_of_several(tmp_path):
    model = inject(mlp(), LoRAConfig(r=2), "a")
    train(inject(model, SSFConfig(target_modules=["0"]), "b"))
    save(model, tmp_path, "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    save(model, tmp_path)
    again = load(mlp(), tmp_path, "b")
    assert list(adapted_layers(again)) == ["0"]
    set_adapter(model, "b")
    assert torch.equal(again(rows()), model(rows()))


def test_the_default_can_get_another_name(tmp_path):
    saved(tmp_path)
    model = load(mlp(), tmp_path)
    load(model, tmp_path, "second")
    assert list(model[0].adapters) == ["default", "second"]
    with pytest.raises(ArgumentError, match="other than 'default', 'second'"):
        load(model, tmp_path)


def test_copies_trained_in_full_are_saved(tmp_path):
    model = train(inject(cnn(), LoRAConfig(r=1, target_modules=["0"], modules_to_save=["1", "6"])))
    save(model, tmp_path)
    assert "modules.1.running_mean" in load_file(tmp_path / TENSORS)
    assert torch.equal(load(cnn(), tmp_path)(pictures()), model(pictures()))


def test_a_frozen_start_is_saved(tmp_path):
    model = saved(tmp_path, freeze_a=True)
    again = load(mlp(), tmp_path)
    assert torch.equal(again(rows()), model(rows()))
    assert not again[0].adapters["default"].A.requires_grad


def test_a_merged_model_saves_its_adapters(tmp_path):
    model = train(inject(mlp(), LoRAConfig(r=2)))
    want = model(rows())
    save(merge(model), tmp_path)
    assert torch.equal(load(mlp(), tmp_path)(rows()), want)


def test_types_follow_the_model(tmp_path):
    saved(tmp_path)
    assert load(mlp(torch.float64), tmp_path)[0].adapters["default"].A.dtype == torch.float64
    assert load(mlp(torch.bfloat16), tmp_path)[0].adapters["default"].A.dtype == torch.float32


def test_saving_again_replaces(tmp_path):
    saved(tmp_path)
    model = train(inject(mlp(), SSFConfig()), seed=11)
    save(model, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
    assert torch.equal(load(mlp(), str(tmp_path))(rows()), model(rows()))


def test_an_interrupted_saving_leaves_the_old_files(tmp_path, monkeypatch):
    model = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr("shiftkern.peft._files.save_file", broken)
    with pytest.raises(OSError, match="no space"):
        save(train(model), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_files_of_two_savings_are_not_mixed(tmp_path):
    saved(tmp_path)
    tensors = (tmp_path / TENSORS).read_bytes()
    saved(tmp_path, alpha=16.0)
    (tmp_path / TENSORS).write_bytes(tensors)
    refused(tmp_path, "of one saving")


def test_files_can_be_read_by_others(tmp_path):
    saved(tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in tmp_path.iterdir())


def test_missing_files_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "a folder with adapter_config.json")
    refused(tmp_path, "a folder with adapter_config.json")
    saved(tmp_path)
    (tmp_path / TENSORS).unlink()
    refused(tmp_path, "safetensors")
    save(inject(mlp(), LoRAConfig(r=1), "one"), tmp_path / "below")
    with pytest.raises(ArgumentError, match="has none and has only one"):
        load(mlp(), tmp_path / "below", "two")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "open", "bytes", "deep"])
def test_a_damaged_config_is_refused(tmp_path, content):
    saved(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    refused(tmp_path, "JSON")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"format": 2}, "format.*expected 1"),
        ({"format": None}, "format"),
        ({"peft_type": "NOTHING"}, "one of .*LORA"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"ranks": 3}, "'ranks': expected a field of LoRAConfig"),
        ({"r": 0}, "'r'"),
        ({"r": "two"}, "'r'"),
        ({"target_modules": ["nothing"]}, "modules that exist"),
        ({"active": "yes"}, "active"),
        ({"left_out": "0"}, "left_out"),
        ({"left_out": [0]}, "left_out"),
        ({"r": 3}, "of one saving"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field(tmp_path, values, match):
    saved(tmp_path)
    edit(tmp_path, **values)
    refused(tmp_path, match)


def test_a_config_that_is_no_object_is_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / CONFIG).write_text("[1]")
    refused(tmp_path, "a dict")


def test_damaged_tensors_are_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / TENSORS
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path, "safetensors in")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("layers.0.A"), "the tensor 'layers.0.A'"),
        (lambda t: t.update(extra=torch.zeros(2)), "'extra'"),
        (lambda t: t.update({"layers.0.A": torch.zeros(3, 8)}), r"'layers.0.A' of shape \(2, 8\)"),
        (lambda t: t.update({"layers.0.A": torch.zeros(2, 8, dtype=torch.int64)}), "dtype"),
        (lambda t: t["layers.0.B"].fill_(float("nan")), "finite numbers in 'layers.0.B'"),
        (lambda t: t.update({"layers.0.B": torch.full((16, 2), 1e300, dtype=torch.float64)}), "finite numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, match):
    saved(tmp_path)
    rewrite(tmp_path, change)
    refused(tmp_path, match)


def test_another_model_is_refused(tmp_path):
    saved(tmp_path)
    refused(tmp_path, r"'layers.0.A' of shape \(2, 5\)", nn.Sequential(nn.Linear(5, 16)))
    refused(tmp_path, "LORA adapts", nn.Sequential(nn.LayerNorm(3)))


def test_one_bad_adapter_keeps_all_out(tmp_path):
    model = inject(mlp(), LoRAConfig(r=2))
    save(inject(model, SSFConfig(), "z"), tmp_path)
    (tmp_path / "z" / TENSORS).write_bytes(b"")
    refused(tmp_path, "safetensors")


def test_arguments_are_checked(tmp_path):
    model = saved(tmp_path)
    with pytest.raises(ArgumentError, match="one of 'default'"):
        save(model, tmp_path, "other")
    with pytest.raises(ArgumentError, match="see inject"):
        save(mlp(), tmp_path)
    for call in (lambda: save(model, 3), lambda: load(mlp(), None)):
        with pytest.raises(ArgumentTypeError, match="directory"):
            call()
    with pytest.raises(ArgumentTypeError, match="model"):
        load(3, tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ArgumentError, match="a folder"):
        save(model, file)


def test_no_code_runs_from_a_file(tmp_path):
    saved(tmp_path)
    torch.save({"layers.0.A": torch.zeros(2, 8)}, tmp_path / TENSORS)
    refused(tmp_path, "safetensors")


def test_integers_of_another_type_are_refused(tmp_path):
    save(inject(cnn(), LoRAConfig(r=1, target_modules=["0"], modules_to_save=["1"])), tmp_path)
    key = "modules.1.num_batches_tracked"
    rewrite(tmp_path, lambda t: t.update({key: t[key].to(torch.int32)}))
    refused(tmp_path, "num_batches_tracked.*int64", cnn())


def test_infinite_buffers_of_a_trained_module_come_back(tmp_path):
    def make():
        model = mlp()
        model[2].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        return model

    save(train(inject(make(), LoRAConfig(r=1, target_modules=["0"], modules_to_save=["2"]))), tmp_path)
    assert torch.equal(load(make(), tmp_path)[2].mask, torch.tensor([0.0, -torch.inf]))
    rewrite(tmp_path, lambda t: t["modules.2.mask"].fill_(-torch.inf))
    refused(tmp_path, "finite numbers in 'modules.2.mask'", make())


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".", "..", "/etc"])
def test_a_name_is_checked_before_it_is_a_path(tmp_path, name):
    (tmp_path / "inside").mkdir()
    saved(tmp_path / "outside")
    with pytest.raises(ArgumentError, match="'adapter_name': expected a name of letters"):
        load(mlp(), tmp_path / "inside", name)
    with pytest.raises(ArgumentTypeError, match="adapter_name"):
        load(mlp(), tmp_path / "outside", 3)


def test_all_linear_beside_an_adapter_that_trains_a_layer_in_full(tmp_path):
    # "b" adapts all linear layers but the one that "default" trains, also where it is loaded alone.
    model = inject(mlp(), LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    train(inject(model, LoRAConfig(r=1), "b"))
    save(model, tmp_path)
    again = load(mlp(), tmp_path)
    assert list(adapted_layers(again)) == ["0"]
    assert torch.equal(again(rows()), model(rows()))
    set_adapter(model, "b")
    assert torch.equal(load(mlp(), tmp_path, "b")(rows()), model(rows()))


def test_adapters_that_cannot_be_together_are_refused(tmp_path):
    save(inject(mlp(), LoRAConfig(r=2, target_modules=["0"], modules_to_save=["2"])), tmp_path)
    save(inject(mlp(), LoRAConfig(r=2, target_modules=["2"]), "b"), tmp_path)
    refused(tmp_path, "'2' adapted by one and trained in full by another")


def test_one_name_with_two_configs_is_not_saved(tmp_path):
    model = nn.Sequential(mlp(), mlp())
    for part, r in zip(model, (1, 2), strict=True):
        inject(part, LoRAConfig(r=r))
    with pytest.raises(ArgumentError, match="of one injection"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_killed_while_saving_leaves_old_or_new_files(tmp_path, monkeypatch):
    folder = tmp_path / "files"
    old = saved(folder)(rows())
    model = train(load(mlp(), folder))
    left, replace = [], os.replace

    def moving(source, target):
        # What is there at this moment is what a kill would leave.
        left.append(shutil.copytree(folder, tmp_path / str(len(left))))
        replace(source, target)

    monkeypatch.setattr("os.replace", moving)
    save(model, folder)
    assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
    first, second = (load(mlp(), copy) for copy in left)
    assert torch.equal(first(rows()), old)
    assert torch.equal(second(rows()), model(rows()))
    assert list(adapted_layers(second)["0"].adapters) == ["default"]
