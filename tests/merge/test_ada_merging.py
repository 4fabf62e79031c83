"""AdaMerging against autograd through the explicit sum, and against steps written out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shiftkern.merge.ada_merging import AdaMerging


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)


def family(k: int = 3, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, dict[str, Tensor], list]:
    """A base and k models around it, running statistics included."""
    model = network(dtype=dtype)
    generator = torch.Generator().manual_seed(7)

    def near(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor + 5
        return tensor + 0.3 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(dtype)

    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model, base, [{name: near(tensor) for name, tensor in base.items()} for _ in range(k)]


def batches(k: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(k)]


def explicit(model, base, models, coefficients, data, per, heads=None):
    """Loss and gradient by autograd through base + sum lambda tau, in plain torch; no clamping."""
    leaf = coefficients.clone().requires_grad_()
    trained = [name for name, _ in model.named_parameters()]
    merged = {}
    for name, start in base.items():
        if not start.is_floating_point():
            continue
        taus = torch.stack([m[name] - start for m in models])
        if per == "task":
            # What is a statistic and no parameter follows the coefficients, but they are not learned from it.
            weights = leaf if name in trained else leaf.detach()
        else:
            weights = (
                leaf[:, trained.index(name)]
                if name in trained
                else torch.full((len(models),), 0.3, dtype=torch.float64)
            )
        merged[name] = start + torch.tensordot(weights, taus, 1)
    loss = 0.0
    quiet = copy.deepcopy(model).eval()
    for k, x in enumerate(data):
        output = torch.func.functional_call(quiet, merged, (x,))
        p = (output if heads is None else heads[k](output)).softmax(1)
        loss = loss - (p * p.log()).sum(1).mean()
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


class Recorder(torch.optim.SGD):
    """Keeps the gradients it is given."""

    seen: list[Tensor]

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


@pytest.mark.parametrize("per", ["task", "layer"])
@pytest.mark.parametrize("k", [1, 3])
def test_gradient_is_that_of_autograd_through_the_sum(per, k):
    model, base, models = family(k)
    merging = AdaMerging(model, base, models, per=per, optimizer=Recorder, lr=0.5)
    start = merging.coefficients
    assert torch.equal(start, torch.full((k,) if per == "task" else (k, 6), 0.3, dtype=torch.float64))
    loss, gradient = explicit(model, base, models, start, batches(k), per)
    assert merging.step(batches(k)) == pytest.approx(loss, rel=1e-12)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(merging._optimizer.seen[0], gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(merging.coefficients, (start - 0.5 * gradient).clamp(0, 1), rtol=1e-10, atol=1e-13)
    assert merging.losses == [pytest.approx(loss)]


def test_adam_steps_written_out():
    model, base, models = family(2)
    merging = AdaMerging(model, base, models, per="layer", lr=1e-2)
    value = torch.full((2, 6), 0.3, dtype=torch.float64)
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for t in range(1, 6):
        _, gradient = explicit(model, base, models, value, batches(2), "layer")
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        value = value - 1e-2 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        merging.step(batches(2))
    torch.testing.assert_close(merging.coefficients, value, rtol=1e-8, atol=1e-10)


def test_defaults_are_those_of_the_paper():
    merging = AdaMerging(*family(2))
    assert merging.per == "layer"
    assert isinstance(merging._optimizer, torch.optim.Adam)
    (group,) = merging._optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 0, (0.9, 0.999))


@pytest.mark.parametrize(("start", "used"), [(-0.25, 0.0), (1.5, 1.0)])
def test_no_gradient_outside_the_unit_interval(start, used):
    model, base, models = family(2)
    merging = AdaMerging(model, base, models, per="task", init=start, optimizer=Recorder, lr=1.0)
    assert torch.equal(merging.coefficients, torch.full((2,), used, dtype=torch.float64))
    loss, _ = explicit(model, base, models, torch.full((2,), used, dtype=torch.float64), batches(2), "task")
    assert merging.step(batches(2)) == pytest.approx(loss, rel=1e-12)
    assert torch.equal(merging._optimizer.seen[0], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_a_gradient_on_the_bounds(bound):
    model, base, models = family(2)
    merging = AdaMerging(model, base, models, per="task", init=bound, optimizer=Recorder)
    merging.step(batches(2))
    assert (merging._optimizer.seen[0] != 0).all()


def test_merged_is_the_sum_that_the_coefficients_say():
    model, base, models = family(3)
    merging = AdaMerging(model, base, models, lr=0.05)
    merging.run([batches(3)], steps=4)
    merged, found = merging.merged(), merging.coefficients
    assert list(merged) == list(base)
    assert merging.names == [name for name, _ in model.named_parameters()]
    assert found.std() > 0.01
    for name, start in base.items():
        if name in merging.names:
            weights = found[:, merging.names.index(name)]
        else:
            weights = torch.full((3,), 0.3, dtype=torch.float64)
        if start.is_floating_point():
            expected = start + sum(w * (m[name] - start) for w, m in zip(weights, models, strict=True))
            torch.testing.assert_close(merged[name], expected, rtol=1e-12, atol=1e-14)
        else:
            assert torch.equal(merged[name], start)
    model.load_state_dict(merged)


def test_entropy_falls():
    model, base, models = family(3)
    merging = AdaMerging(model, base, models, per="layer", lr=0.02)
    merging.run([batches(3)], steps=30)
    assert merging.losses[-1] < merging.losses[0] - 0.05
    assert len(merging.losses) == 30


def test_nothing_given_is_changed():
    model, base, models = family(3)
    model.train()
    model[3].eval()
    states = copy.deepcopy([model.state_dict(), base, *models])
    merging = AdaMerging(model, base, models, lr=0.1)
    merging.run([batches(3)], steps=3)
    merging.merged()["0.weight"].zero_()
    for now, before in zip([model.state_dict(), base, *models], states, strict=True):
        assert all(torch.equal(now[name], before[name]) for name in before)
    assert [m.training for m in model.modules()] == [True, True, True, True, False, True]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_heads_turn_features_into_logits():
    model, base, models = family(2)
    torch.manual_seed(1)
    heads = [nn.Linear(3, 4).double(), nn.Linear(3, 2).double()]
    merging = AdaMerging(model, base, models, heads=heads, optimizer=Recorder)
    loss, gradient = explicit(model, base, models, merging.coefficients, batches(2), "layer", heads)
    assert merging.step(batches(2)) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(merging._optimizer.seen[0], gradient, rtol=1e-10, atol=1e-13)
    assert all(p.grad is None for head in heads for p in head.parameters())
    # One batch for all tasks goes through every head.
    x = batches(1)[0]
    loss, _ = explicit(model, base, models, merging.coefficients, [x, x], "layer", heads)
    assert merging.step(x) == pytest.approx(loss, rel=1e-12)


def test_one_batch_for_all_tasks_is_one_loss():
    model, base, models = family(3)
    x = batches(1)[0]
    expected, _ = explicit(model, base, models, torch.full((3, 6), 0.3, dtype=torch.float64), [x], "layer")
    assert AdaMerging(model, base, models).step(x) == pytest.approx(expected, rel=1e-12)


def test_a_function_of_tensors_instead_of_a_module():
    model, base, models = family(2)

    def forward(tensors, x):
        assert list(tensors) == list(base)
        return torch.func.functional_call(copy.deepcopy(model).eval(), {k: tensors[k] for k in merging.names}, (x,))

    parameters = [name for name, _ in model.named_parameters()]
    small = [{name: state[name] for name in parameters} for state in (base, *models)]
    base, models = small[0], small[1:]
    merging = AdaMerging(forward, base, models)
    other = AdaMerging(model, base, models)
    for _ in range(3):
        assert merging.step(batches(2)) == pytest.approx(other.step(batches(2)), rel=1e-13)
    torch.testing.assert_close(merging.coefficients, other.coefficients, rtol=1e-12, atol=0)


def test_keyword_batches_and_tensors_that_only_the_module_has():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3).double()
            self.head = nn.Linear(3, 2).double()

        def forward(self, *, x, shift):
            return self.head(self.body(x).tanh()) + shift

    torch.manual_seed(0)
    model = Named()
    body = {f"body.{name}": value.clone() for name, value in model.body.state_dict().items()}
    models = [{name: value + i for name, value in body.items()} for i in (0.5, -0.5)]
    merging = AdaMerging(model, body, models)
    x = {"x": batches(1)[0], "shift": 1.0}
    logits = model.head((torch.nn.functional.linear(x["x"], *body.values())).tanh()) + 1.0
    p = logits.softmax(1)
    assert merging.step(x) == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-12)
    assert list(merging.merged()) == list(body)


def test_a_shared_parameter_has_one_coefficient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.outer.weight = self.inner.weight
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.outer(self.inner(x).tanh()) + self.bias

    torch.manual_seed(0)
    model = Tied().double()
    base = model.state_dict()
    models = [{name: value + 0.2 * i for name, value in base.items()} for i in (1, 2)]
    merging = AdaMerging(model, base, models, optimizer=Recorder)
    assert merging.names == ["bias", "inner.weight"]
    merging.step(batches(2))
    leaf = torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True)
    weight = base["inner.weight"] + leaf[0, 1] * 0.2 + leaf[1, 1] * 0.4
    bias = base["bias"] + leaf[0, 0] * 0.2 + leaf[1, 0] * 0.4
    loss = 0.0
    for x in batches(2):
        p = ((x @ weight.T).tanh() @ weight.T + bias).softmax(1)
        loss = loss - (p * p.log()).sum(1).mean()
    torch.testing.assert_close(merging._optimizer.seen[0], torch.autograd.grad(loss, leaf)[0], rtol=1e-10, atol=1e-13)
    merged = merging.merged()
    assert torch.equal(merged["inner.weight"], merged["outer.weight"])
    assert merged["inner.weight"].data_ptr() != merged["outer.weight"].data_ptr()
    models[1]["outer.weight"] = models[1]["outer.weight"] + 1
    with pytest.raises(ValueError, match=r"equal values in 'inner.weight' and 'outer.weight'.*in model 1"):
        AdaMerging(model, base, models)


@pytest.mark.parametrize("per", ["task", "layer"])
def test_a_saved_state_goes_on_to_the_bit(per, tmp_path):
    one = AdaMerging(*family(2), per=per, lr=0.01)
    one.run([batches(2)], steps=3)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    one.run([batches(2)], steps=2)
    other = AdaMerging(*family(2), per=per, lr=0.01)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.run([batches(2)], steps=2)
    assert torch.equal(one.coefficients, other.coefficients)
    assert one.losses == other.losses
    with pytest.raises(ValueError, match="learned tensors of shapes"):
        AdaMerging(*family(3), per=per).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="a state from state_dict"):
        other.load_state_dict({})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_narrow_dtypes_follow_float64(dtype, tolerance):
    narrow = family(2, dtype)
    wide = [
        copy.deepcopy(narrow[0]).double(),
        *({k: v.double() for k, v in s.items()} for s in (narrow[1], *narrow[2])),
    ]
    merging = AdaMerging(*narrow, per="task", optimizer=Recorder)
    merging.step(batches(2, dtype))
    reference = AdaMerging(wide[0], wide[1], wide[2:], per="task", optimizer=Recorder)
    reference.step([x.double() for x in batches(2, dtype)])
    assert merging.losses == pytest.approx(reference.losses, rel=tolerance)
    got, expected = merging._optimizer.seen[0], reference._optimizer.seen[0]
    assert (got - expected).norm() <= 10 * tolerance * expected.norm()
    assert {v.dtype for v in merging.merged().values()} == {dtype, torch.int64}


def test_numpy_in_numpy_out():
    model, base, models = family(2)
    arrays = [{name: value.numpy() for name, value in state.items()} for state in (base, *models)]
    one, other = AdaMerging(model, base, models), AdaMerging(model, arrays[0], arrays[1:])
    for merging in (one, other):
        merging.run([batches(2)], steps=2)
    for name, value in other.merged().items():
        assert isinstance(value, np.ndarray)
        assert np.array_equal(value, one.merged()[name].numpy())


def test_works_within_no_grad_and_inference_mode():
    expected = AdaMerging(*family(2))
    expected.run([batches(2)], steps=2)
    for mode in (torch.no_grad, torch.inference_mode):
        merging = AdaMerging(*family(2))
        data = batches(2)
        with mode():
            merging.run([data], steps=2)
            merged = merging.merged()
        assert torch.equal(merging.coefficients, expected.coefficients)
        assert not merged["0.weight"].is_inference()


def test_empty_and_scalar_tensors():
    base = {"w": torch.eye(2), "none": torch.empty(0, 3), "s": torch.tensor(1.0)}
    models = [{name: value + 0.5 for name, value in base.items()} for _ in range(2)]
    merging = AdaMerging(lambda t, x: x @ t["w"] * t["s"], base, models)
    merging.run([torch.eye(2)], steps=2)
    assert merging.merged()["none"].shape == (0, 3)
    assert torch.equal(merging.coefficients[:, 1], torch.full((2,), 0.3, dtype=torch.float64))
    assert (merging.coefficients[:, 2] > 0.3).all()


def test_run_goes_round_and_reports_progress():
    merging = AdaMerging(*family(2))
    seen = []
    merging.run([batches(2), batches(2)], 5, lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(merging.losses, 1))
    merging.run(iter([]), 0)
    with pytest.raises(ValueError, match="argument 'loader': expected 3 batches, or an iterable that can start again"):
        merging.run(iter([batches(2)]), 3)
    assert len(merging.losses) == 6


def test_wrong_arguments_of_run_are_errors():
    merging = AdaMerging(*family(2))
    with pytest.raises(TypeError, match="argument 'loader'"):
        merging.run(7, 1)
    with pytest.raises(ValueError, match="argument 'steps'"):
        merging.run([], -1)
    with pytest.raises(TypeError, match="argument 'progress'"):
        merging.run([], 1, progress=True)


def test_a_step_that_fails_learns_nothing():
    model, base, models = family(2)
    merging = AdaMerging(model, base, models, lr=0.1)
    merging.step(batches(2))
    before = merging.state_dict()
    spoilt = batches(2)
    spoilt[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"argument 'batch': expected a batch with a finite loss, got nan"):
        merging.step(spoilt)
    with pytest.raises(RuntimeError):
        merging.step([torch.zeros(5, 9).double()] * 2)
    after = merging.state_dict()
    assert torch.equal(before["learned"][0], after["learned"][0])
    assert before["losses"] == after["losses"]
    assert model.training


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_batches_is_an_error(count):
    with pytest.raises(ValueError, match=rf"AdaMerging: argument 'batch': expected .* 3, .* got {count}"):
        AdaMerging(*family(3)).step(batches(1) * count)


def test_outputs_that_are_no_logits_are_errors():
    _, base, models = family(1)
    for output, message in (
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 2, dtype=torch.int64), "dtype float32"),
        ("text", "Tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"AdaMerging: argument 'model'.*{message}"):
            AdaMerging(lambda *_, output=output: output, base, models).step(batches(1)[0])
    with pytest.raises(ValueError, match="an output without a gradient"):
        AdaMerging(lambda *_: torch.zeros(2, 2), base, models).step(batches(1)[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per": "tensor"}, ValueError, "argument 'per': expected one of 'task', 'layer'"),
        ({"init": float("nan")}, ValueError, "argument 'init'"),
        ({"lr": 0}, ValueError, "argument 'lr': expected a number > 0"),
        ({"lr": "x"}, TypeError, "argument 'lr'"),
        ({"optimizer": 3}, TypeError, "argument 'optimizer'"),
        ({"optimizer": lambda p, lr: p}, TypeError, "argument 'optimizer'"),
        ({"heads": [nn.Identity()]}, ValueError, "argument 'heads': expected 2 callables, one for each model, got 1"),
        ({"heads": [1, 2]}, TypeError, "argument 'heads'"),
        ({"heads": 5}, TypeError, "argument 'heads'"),
    ],
)
def test_wrong_options_are_errors(options, error, message):
    with pytest.raises(error, match=f"AdaMerging: {message}"):
        AdaMerging(*family(2), **options)


def test_wrong_models_are_errors():
    model, base, models = family(2)
    with pytest.raises(TypeError, match=r"argument 'model': expected a torch\.nn\.Module or a callable"):
        AdaMerging(None, base, models)
    with pytest.raises(ValueError, match=r"argument 'base': expected names of the model's parameters.*'9.weight'"):
        AdaMerging(model, {"9.weight": torch.zeros(1)}, [{"9.weight": torch.zeros(1)}])
    with pytest.raises(ValueError, match=r"argument 'base': expected shape \(6, 4\) for tensor '0.weight'"):
        AdaMerging(model, {"0.weight": torch.zeros(1)}, [{"0.weight": torch.zeros(1)}])
    with pytest.raises(ValueError, match="argument 'models': expected at least one model"):
        AdaMerging(model, base, [])
    with pytest.raises(TypeError, match="argument 'models': expected a list of state dicts"):
        AdaMerging(model, base, base)
    with pytest.raises(ValueError, match="at least one floating-point parameter"):
        AdaMerging(model, {"1.running_mean": torch.zeros(6)}, [{"1.running_mean": torch.zeros(6)}])
    models[1]["4.bias"][1] = torch.inf
    merging = AdaMerging(model, base, models)
    with pytest.raises(ValueError, match=r"NaN or an infinity in tensor '4.bias' of model 1"):
        merging.merged()
    with pytest.raises(ValueError, match=r"NaN or an infinity in tensor '4.bias' of model 1"):
        merging.step(batches(2))
