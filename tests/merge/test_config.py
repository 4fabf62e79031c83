"""Configurations of mergekit: what they mean, what is refused, and the command that runs them."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from shiftkern import cli
from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.merge.config import read_config
from shiftkern.merge.files import merge_files

from helpers.merging import assert_same, draws, make_states, plain, task_vectors


def written(tmp_path, text):
    path = tmp_path / "merge.yaml"
    path.write_text(textwrap.dedent(text))
    return path


TWO = """
models:
  - model: base
  - model: a
    parameters: {weight: 0.75, density: 0.5}
  - model: b
    parameters: {weight: 0.25}
base_model: base
"""
MEANT = {
    "linear": (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 2}}, {model: b, parameters: {weight: 1.0}}]",
        (None, ["a", "b"], {"weights": [2.0, 1.0], "normalize": True}),
    ),
    "linear with its base among the models": (
        "{merge_method: linear, models: [{model: a}, {model: b}], base_model: b,"
        " parameters: {weight: 1, normalize: false}, dtype: bfloat16}",
        ("b", ["a", "b"], {"weights": [1.0, 1.0], "normalize": False, "out_dtype": "bfloat16"}),
    ),
    "slerp": (
        "{merge_method: slerp, models: [{model: b}, {model: a}], base_model: a, parameters: {t: 0.3}, dtype: float32,"
        " out_dtype: float16}",
        ("a", ["b"], {"t": 0.3, "out_dtype": "float16"}),
    ),
    "task_arithmetic": (
        "{merge_method: task_arithmetic, base_model: base, models: [{model: a, parameters: {weight: 1}}],"
        " parameters: {lambda: 0.5, int8_mask: true}}",
        ("base", ["a"], {"weights": [1.0], "normalize": False, "scale": 0.5}),
    ),
    "ties": (
        "merge_method: ties\nparameters: {density: 0.2}" + TWO,
        (
            "base",
            ["a", "b"],
            {
                **{"weights": [0.75, 0.25], "density": [0.5, 0.2], "elect": "weighted", "divide_by": "weight"},
                **{"scale": 1.0, "rescale": "none"},
            },
        ),
    ),
    "ties with defaults": (
        "{merge_method: ties, base_model: z, models: [{model: a, parameters: {weight: 1}}],"
        " parameters: {normalize: false, rescale: true}}",
        (
            "z",
            ["a"],
            {
                **{"weights": [1.0], "density": [1.0], "elect": "weighted", "divide_by": "none"},
                **{"scale": 1.0, "rescale": "l1"},
            },
        ),
    ),
    "dare_ties": (
        "merge_method: dare_ties" + TWO,
        (
            "base",
            ["a", "b"],
            {
                **{"weights": [0.75, 0.25], "drop_rate": [0.5, 0.0], "elect": "weighted", "divide_by": "none"},
                **{"scale": 1.0, "rescale": "l1", "seed": 7},
            },
        ),
    ),
    "dare_linear": (
        "merge_method: dare_linear\nparameters: {rescale: false, normalize: true}" + TWO,
        (
            "base",
            ["a", "b"],
            {
                **{"weights": [0.75, 0.25], "drop_rate": [0.5, 0.0], "normalize": True},
                **{"scale": 1.0, "rescale": "none", "seed": 7},
            },
        ),
    ),
    "breadcrumbs": (
        "merge_method: breadcrumbs\nparameters: {gamma: 0.1}" + TWO,
        (
            "base",
            ["a", "b"],
            {
                **{"weights": [0.75, 0.25], "density": [0.5, 1.0], "gamma": [0.1, 0.1], "normalize": False},
                **{"scale": 1.0, "rescale": "none"},
            },
        ),
    ),
    "della": (
        "merge_method: della\nparameters: {epsilon: 0.1, lambda: 2}" + TWO,
        (
            "base",
            ["a", "b"],
            {
                **{"weights": [0.75, 0.25], "density": [0.5, 1.0], "epsilon": [0.2, 0.0]},
                **{"elect": "weighted", "divide_by": "weight", "scale": 2.0, "rescale": "l1", "seed": 7},
            },
        ),
    ),
}


@pytest.mark.parametrize(("text", "meant"), MEANT.values(), ids=MEANT)
def test_what_a_configuration_means(text, meant, tmp_path):
    config = read_config(written(tmp_path, text), seed=7)
    assert (config.base, config.models, config.options) == meant
    assert config.method in text


HEAD = "merge_method: ties\nbase_model: base\n"
ONE = "models: [{model: a, parameters: {weight: 1}}]\n"
REFUSED = {
    "no YAML": ("a: [", "expected YAML in"),
    "no mapping": ("[1]", "expected keys with values in"),
    "nothing": ("", "expected keys with values in"),
    "a tag": ("merge_method: !!python/object/apply:os.system ['true']", "expected YAML in"),
    "a key twice": (HEAD + ONE + "base_model: other", "a key once at 'base_model'.*2 times"),
    "a key twice deep down": (HEAD + "models: [{model: a, parameters: {weight: 1, weight: 2}}]", "once at 'weight'"),
    "no method": ("base_model: a\n" + ONE, "at 'merge_method'"),
    "another method": ("merge_method: model_stock\n" + ONE, "one of linear.*at 'merge_method'.*'model_stock'"),
    "an unknown key": (HEAD + ONE + "merge_speed: 3", "at 'merge_speed'.*an unknown key"),
    "slices": (HEAD + "slices: []", "slices are not supported at 'slices'"),
    "modules": (HEAD + "modules: {}", "not supported at 'modules'"),
    "tokenizer_source": (HEAD + ONE + "tokenizer_source: union", "at 'tokenizer_source'"),
    "tokenizer": (HEAD + ONE + "tokenizer: {}", "at 'tokenizer'"),
    "chat_template": (HEAD + ONE + "chat_template: auto", "at 'chat_template'"),
    "no base": ("merge_method: ties\n" + ONE, "a base, which ties needs at 'base_model'"),
    "a base of linear": ("merge_method: linear\nbase_model: b\n" + ONE, "one of the models, as linear has no base"),
    "a number as base": ("merge_method: ties\nbase_model: 3\n" + ONE, "a path at 'base_model'"),
    "no models": (HEAD, "a list of models at 'models'"),
    "a model without path": (HEAD + "models: [{parameters: {weight: 1}}]", r"a path at 'models\[0\].model'"),
    "a model as text": (HEAD + "models: [a]", r"keys with values at 'models\[0\]'"),
    "more about a model": (HEAD + "models: [{model: a, layer_range: [0, 2]}]", r"at 'models\[0\].layer_range'"),
    "only the base": (HEAD + "models: [{model: base}]", "models besides the base at 'models'"),
    "parameters of the base": (
        HEAD + "models: [{model: base, parameters: {weight: 1}}, {model: a, parameters: {weight: 1}}]",
        r"none for the base, which has no task vector at 'models\[0\].parameters'",
    ),
    "no weight": (
        HEAD + "models: [{model: a}]",
        r"a weight, here or under parameters.*'models\[0\].parameters.weight'",
    ),
    "a gradient": (
        HEAD + "models: [{model: a, parameters: {weight: [0, 1]}}]",
        r"gradients and filters by layer are not supported at 'models\[0\].parameters.weight'",
    ),
    "a filter": (
        HEAD + ONE + "parameters: {density: [{filter: mlp, value: 0.5}, {value: 1}]}",
        r"filters by layer are not supported at 'models\[0\].parameters.density'",
    ),
    "text for a number": (HEAD + ONE + "parameters: {density: high}", "a number at"),
    "true for a number": (HEAD + ONE + "parameters: {lambda: true}", "a number at 'parameters.lambda'"),
    "infinity": (HEAD + ONE + "parameters: {lambda: .inf}", "'lambda': expected a finite number"),
    "a number for true": (HEAD + ONE + "parameters: {normalize: 1}", "true or false at 'parameters.normalize'"),
    "another method's parameter": (HEAD + ONE + "parameters: {gamma: 0.1}", "at 'parameters.gamma'"),
    "a parameter for all at a model": (
        HEAD + "models: [{model: a, parameters: {weight: 1, lambda: 2}}]",
        r"at 'models\[0\].parameters.lambda'",
    ),
    "an unknown dtype": (HEAD + ONE + "dtype: int8", "at 'dtype'"),
    "an unknown output": (HEAD + ONE + "out_dtype: fp16", "at 'out_dtype'"),
    "sums that are wider": (HEAD + ONE + "dtype: float64\nout_dtype: float32", "float64 only with float64 output"),
    "della with a wide range": (
        HEAD.replace("ties", "della") + ONE + "parameters: {density: 0.9, epsilon: 0.15}",
        r"at 'models\[0\].parameters' .* density 0\.9 and epsilon 0\.15$",
    ),
    "della with a range below 0": (
        HEAD.replace("ties", "della") + ONE + "parameters: {density: 0.1}",
        r"density - epsilon above 0 .* density 0\.1 and epsilon 0\.15$",
    ),
    "della with a large density": (
        HEAD.replace("ties", "della") + ONE + "parameters: {density: 1.5}",
        r"density 1\.5 and epsilon 0\.15$",
    ),
    "della with a negative epsilon": (
        HEAD.replace("ties", "della") + ONE + "parameters: {density: 0.5, epsilon: -0.1}",
        r"density 0\.5 and epsilon -0\.1$",
    ),
    "slerp without t": ("{merge_method: slerp, base_model: a, models: [{model: b}]}", "a t, .*at 'parameters.t'"),
    "slerp of three": (
        "{merge_method: slerp, base_model: a, models: [{model: b}, {model: c}], parameters: {t: 0.5}}",
        "one model besides the base",
    ),
    "slerp with weights": (
        "{merge_method: slerp, base_model: a, models: [{model: b, parameters: {weight: 1}}], parameters: {t: 0.5}}",
        "an unknown key",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused(text, message, tmp_path):
    with pytest.raises(ArgumentError, match=rf"(?s)read_config: .*{message}"):
        read_config(written(tmp_path, text))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ArgumentTypeError, match="'path'"):
        read_config(3)
    with pytest.raises(ArgumentError, match="'seed'"):
        read_config(written(tmp_path, MEANT["ties"][0]), seed=-1)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nothing.yaml")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A base and two models as folders in the working directory."""
    base, tuned = make_states(2)
    monkeypatch.chdir(tmp_path)
    for name, state in (("base", base), ("a", tuned[0]), ("b", tuned[1])):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    return base, tuned


def run_command(*arguments):
    try:
        return cli.main(["merge", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("name", ["linear", "slerp", "ties", "dare_ties", "dare_linear", "breadcrumbs", "della"])
def test_the_command_merges_as_the_function(name, models, tmp_path, capsys):
    path = written(tmp_path, MEANT[name][0])
    assert run_command(path, "out", "--seed", 7, "--memory", "30MB", "--threads", 1) == 0
    assert "out: 7 tensors, " in capsys.readouterr().out
    base, paths, options = MEANT[name][1]
    merge_files(base, paths, "expected.safetensors", name, progress=False, **options)
    assert_same(load_file("out/model.safetensors"), load_file("expected.safetensors"))


def test_ties_as_mergekit_has_it(models, tmp_path):
    assert run_command(written(tmp_path, MEANT["ties"][0]), "out", "--quiet") == 0
    merged = load_file("out/model.safetensors")
    for name, tau in task_vectors(*models).items():
        trimmed = np.zeros_like(tau)
        for k, density in enumerate([0.5, 0.2]):
            kept = max(1, int(density * tau[k].size + 0.5)) if tau[k].size else 0
            least = np.sort(np.abs(tau[k]).ravel())[::-1][:kept].min(initial=np.inf)
            trimmed[k] = np.where(np.abs(tau[k]) >= least, tau[k], 0.0)
        weights = np.array([0.75, 0.25]).reshape(-1, *[1] * (tau.ndim - 1))
        weighted = weights * trimmed
        agree = np.sign(weighted) == np.where(weighted.sum(0) >= 0, 1, -1)
        divisor = (weights * agree).sum(0)
        want = plain(models[0][name]) + (weighted * agree).sum(0) / np.where(divisor == 0, 1, divisor)
        np.testing.assert_allclose(plain(merged[name]), want, rtol=0, atol=1e-6)


def test_dare_as_mergekit_has_it(models, tmp_path):
    text = "merge_method: dare_linear\nparameters: {lambda: 0.5, density: 0.25}" + TWO.replace(", density: 0.5", "")
    assert run_command(written(tmp_path, text), "out", "--quiet", "--seed", 3) == 0
    merged = load_file("out/model.safetensors")
    for name, tau in task_vectors(*models).items():
        want = plain(models[0][name])
        for k, weight in enumerate([0.75, 0.25]):
            kept = tau[k] * (draws(3, k, name, tau[k].shape) >= 0.75)
            norm = np.abs(kept).sum()
            want = want + 0.5 * weight * kept * (np.abs(tau[k]).sum() / norm if norm else 1.0)
        np.testing.assert_allclose(plain(merged[name]), want, rtol=0, atol=2e-6)


def test_the_command_fails_in_one_line(models, tmp_path, capsys):
    good = written(tmp_path, MEANT["ties"][0])
    (tmp_path / "taken").mkdir()
    hub = tmp_path / "hub.yaml"
    hub.write_text(MEANT["ties"][0].replace("model: b\n", "model: mistralai/Mistral-7B\n"))
    for arguments, code, message in (
        (["nothing.yaml", "out"], 1, "nothing.yaml"),
        ([hub, "out"], 2, "'models[1]': expected a safetensors file or a folder"),
        ([good, "taken"], 2, "'out': expected a path where nothing is yet"),
        ([good, "out", "--memory", "lots"], 2, "'memory'"),
        ([good, "out", "--memory", "1"], 2, "'memory': expected at least"),
        ([good, "out", "--threads", "0"], 2, "'threads'"),
        ([good, "out", "--seed", "-1"], 2, "'seed'"),
        ([good, "out", "--max-shard-size", "x"], 2, "'max_shard_size'"),
    ):
        assert run_command(*arguments) == code
        errors = capsys.readouterr().err
        assert errors.startswith("shiftkern: error: ")
        assert message in errors
        assert errors.count("\n") == 1
    assert run_command(good) == 2
    assert not (tmp_path / "out").exists()


def test_the_command_goes_on_and_starts_anew(models, tmp_path, capsys, monkeypatch):
    path = written(tmp_path, MEANT["ties"][0])
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run_command(path, "out") == 130
    assert run_command(path, "out") == 0
    assert "0 MB written" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run_command(path, "new") == 130
    assert run_command(path, "new", "--no-resume", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert_same(load_file("new/model.safetensors"), load_file("out/model.safetensors"))
