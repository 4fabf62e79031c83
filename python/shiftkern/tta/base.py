"""What every test-time adaptation method shares: wrapping, stepping, resetting, saving.

A method is a module around a model. It adapts the model it was given in place, as the papers' code does, so nothing
is copied that need not be; `unwrap()` gives the model back as it was. The rules that all methods keep:

* `forward` adapts and predicts, in train and in eval mode; the wrapped model itself always runs in eval mode.
* A step that raises (a wrong shape, a NaN) leaves the method as it was before the call.
* `reset()` restores the state after construction to the bit.
* `state_dict()` is complete: parameters, statistics, optimizer, generator, monitor, and the source values that
  `reset()` needs. Loaded into a new method around any model of the same architecture, the stream continues to the bit.
* Random numbers come from the method's own CPU generator; the global one is never touched.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shiftkern import _checks
from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.norm import convert_norm, revert_norm
from shiftkern.norm.batch_norm import BatchNormReplacement
from shiftkern.tta.monitor import CollapseMonitor

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Method(nn.Module):
    """Base class of the methods: a module around a model whose forward adapts and predicts.

    A subclass checks its options, calls this constructor, converts the model's norm layers if it needs to, and calls
    `_start()`; where the layers' forward is not all there is to it, it overrides `_adapt(x)`, which returns logits (or
    probabilities, with `_predicts_probabilities`).

    Parameters
    ----------
    model : nn.Module
        Maps a batch to logits (N, K) or (N, K, *spatial). Adapted in place.
    seed : int
        Seed of the method's own generator.

    Attributes
    ----------
    model : nn.Module
        The wrapped model.
    collapse_monitor : CollapseMonitor
        `mean_entropy` and `top_class_share` of the predictions since the last reset.
    generator : torch.Generator
        The method's source of random numbers, on the CPU.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        `model` is not a module, `seed` not an integer; in `forward` also a batch that is not a non-empty
        floating-point tensor and a prediction that is not finite. All derive from ValueError or TypeError.
    """

    _predicts_probabilities = False

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise self._error("model", "a torch.nn.Module", type(model).__name__, ArgumentTypeError)
        if isinstance(model, Method):
            raise self._error("model", "a plain model", f"the method {type(model).__name__} (use its unwrap())")
        seed = _checks.integer(type(self).__name__, "seed", seed, 0)
        if seed >= 2**64:
            raise self._error("seed", "an integer below 2**64", repr(seed))
        self.model = model
        self.collapse_monitor = CollapseMonitor()
        self.generator = torch.Generator().manual_seed(seed)
        self._converted = False
        self._unwrapped = False
        self._pending: dict[str, Any] | None = None
        self._user_training = {name: module.training for name, module in model.named_modules()}
        self._user_requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.register_load_state_dict_post_hook(_finish_load)  # type: ignore[no-untyped-call]

    # ---- what a subclass uses ----------------------------------------------------------------------------------------

    def _error(self, name: str, expected: str, got: str, kind: type[Exception] = ArgumentError) -> Exception:
        return kind(f"{type(self).__name__}: argument '{name}': expected {expected}, got {got}")

    def _convert(self, kind: str, **options: Any) -> None:
        """Convert the model's BatchNorm layers; raise if it has none."""
        name = type(self.model).__name__
        if any(isinstance(m, BatchNormReplacement) for m in self.model.modules()):
            got = f"{name} whose layers are converted already (another method's unwrap() or revert_norm undoes it)"
            raise self._error("model", "a model with BatchNorm layers", got)
        if not any(isinstance(m, _BatchNorm) for m in self.model.modules()):
            raise self._error("model", "a model with BatchNorm layers", f"{name} without any")
        with torch.inference_mode(False):
            self.model = convert_norm(self.model, kind, **options)
        self._converted = True

    def _start(self) -> None:
        """Finish construction: set the flags and remember the state that `reset()` restores."""
        with torch.inference_mode(False), torch.no_grad():
            self._configure()
            self._source = {name: tensor.detach().clone() for name, tensor in self._own_tensors()}
            self._generator_start = self.generator.get_state()

    def _configure(self) -> None:
        """Set the training and requires_grad flags this method needs."""
        self.train(self.training)

    def _derive(self) -> None:
        """Rebuild, in a reset, the parts that are copies of others (an EMA teacher)."""

    def _adapt(self, x: Tensor) -> Tensor:
        """Adapt on the batch and predict. Runs without grad and outside inference mode."""
        return self._logits(self.model(x))

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters and buffers except a teacher's, which are derived from the model's."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if not name.startswith("teacher."):
                yield name, tensor

    def _source_values(self) -> dict[Tensor, Tensor]:
        """Source value of each of the model's tensors, by the tensor itself: a shared one has several names."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {tensor: self._source[f"model.{name}"] for name, tensor in named}

    def _logits(self, output: object) -> Tensor:
        """Check what the model returned."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
            raise self._error("model", "a model that returns a floating-point tensor of logits", got, ArgumentTypeError)
        if output.is_nested or output.layout is not torch.strided:
            got = _checks.describe(output)
            raise self._error("model", "a model that returns a dense (strided) tensor", got, ArgumentTypeError)
        if output.dim() < 2 or output.numel() == 0:
            expected = "a model that returns logits of shape (N, K) or (N, K, *spatial)"
            raise self._error("model", expected, f"shape {tuple(output.shape)}")
        return output

    def _finite(self, probs: Tensor) -> Tensor:
        """Raise if a prediction is NaN, before anything learns from it."""
        bad = probs.flatten(1).isnan().any(1)
        if bad.any():
            got = f"NaN or infinite logits for {int(bad.sum())} of {len(bad)} samples (state unchanged)"
            raise self._error("x", "a batch with finite predictions", got)
        return probs

    def _probabilities(self, output: Tensor) -> Tensor:
        """Probabilities of a prediction in float32 or better, checked to be finite."""
        wide = torch.promote_types(output.dtype, torch.float32)
        probs = output.to(wide) if self._predicts_probabilities else output.softmax(1, dtype=wide)
        return self._finite(probs)

    # ---- the public face ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        r"""Adapt on the batch `x` and return its predictions.

        Parameters
        ----------
        x : Tensor
            Floating point, shape (N, ...) with N >= 1, whatever the model takes.

        Returns
        -------
        Tensor
            Logits (N, K) or (N, K, \*spatial) without a gradient; LAME returns probabilities.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            `x` is not a non-empty floating-point tensor, or the predictions are not finite. The state is unchanged.
        """
        if self._unwrapped:
            raise ArgumentError(f"{type(self).__name__}: unwrap() has ended this method: wrap the model again")
        if not isinstance(x, Tensor):
            raise self._error("x", "a torch.Tensor", type(x).__name__, ArgumentTypeError)
        if not x.is_floating_point():
            raise self._error("x", "a floating-point tensor", str(x.dtype), ArgumentTypeError)
        if x.dim() == 0 or x.numel() == 0:
            raise self._error("x", "a batch of at least one sample", f"shape {tuple(x.shape)}")
        # A caller in inference mode would hand us tensors autograd cannot save, and make our state such tensors.
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone() if x.is_inference() else x.detach()
            before = self._backup()
            try:
                output = self._adapt(x)
                self.collapse_monitor.update(self._probabilities(output))
            except BaseException:
                self._rollback(before)
                raise
        return output

    def reset(self) -> None:
        """Restore the state after construction to the bit: model, optimizer, generator, monitor and flags."""
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in self._own_tensors():
                tensor.copy_(self._source[name])
            for p in self.parameters():
                p.grad = None
            self._derive()
            self.generator.set_state(self._generator_start)
            self.collapse_monitor.clear()
            self._configure()

    def unwrap(self) -> nn.Module:
        """Return the model as it was before wrapping: values, layer types and flags. This ends the method."""
        self.reset()
        model = revert_norm(self.model) if self._converted else self.model
        with torch.inference_mode(False), torch.no_grad():
            # revert_norm restores what the layers held when wrapped; the source may have come from a loaded state.
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if f"model.{name}" in self._source:
                    tensor.copy_(self._source[f"model.{name}"])
        for name, module in model.named_modules():
            module.training = self._user_training.get(name, module.training)
        for name, p in model.named_parameters():
            p.requires_grad_(self._user_requires_grad.get(name, p.requires_grad))
        self._unwrapped = True
        return model

    def train(self, mode: bool = True) -> Method:
        """Set the method's flag; the model inside stays in eval mode, where its dropout is off."""
        super().train(mode)
        for child in self.children():
            child.eval()
        return self

    # ---- failed steps ------------------------------------------------------------------------------------------------

    def _backup(self) -> dict[str, Any]:
        """What a step may change before it can no longer fail: the norm layers' statistics and the generator."""
        return {
            "tensors": {name: buffer.clone() for name, buffer in self.named_buffers()},
            "generator": self.generator.get_state(),
        }

    def _rollback(self, before: dict[str, Any]) -> None:
        now = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, value in before["tensors"].items():
            now[name].copy_(value)
        self.generator.set_state(before["generator"])

    # ---- saving ------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """Everything `state_dict` needs beside parameters and buffers; only tensors and plain Python values."""
        now = dict(self._own_tensors())
        return {
            "method": type(self).__name__,
            "generator": self.generator.get_state(),
            "generator_start": self._generator_start.clone(),
            "monitor": dict(self.collapse_monitor.state()),
            # Only what adaptation has changed: the rest of the source is in the state dict already.
            "source": {name: value.clone() for name, value in self._source.items() if not _same_bits(value, now[name])},
        }

    def set_extra_state(self, state: Any) -> None:
        """Keep the extra state until the children are loaded too, see `_restore`."""
        if not isinstance(state, dict) or state.get("method") != type(self).__name__:
            got = state.get("method") if isinstance(state, dict) else type(state).__name__
            raise self._error("state_dict", f"the state of a {type(self).__name__}", f"that of {got}")
        self._pending = copy.deepcopy(state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over an extra state, after parameters and buffers were loaded."""
        self._source = {name: tensor.detach().clone() for name, tensor in self._own_tensors()}
        for name, value in state["source"].items():
            self._source[name].copy_(value)
        self._generator_start = state["generator_start"].cpu()
        self.generator.set_state(state["generator"].cpu())
        self.collapse_monitor.load_state(state["monitor"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Method:
        """Move what is not registered along with `.to()`."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._source = {name: fn(value) for name, value in self._source.items()}
        return self


class GradientMethod(Method):
    """A method that takes optimizer steps on an unsupervised loss.

    A subclass implements `_loss(x)`, returning the prediction and a scalar loss, `_trained()`, the parameters to
    train, and may implement `_after_step()`.

    Parameters
    ----------
    model : nn.Module
        Maps a batch to logits. Adapted in place.
    lr : float
        Learning rate.
    steps : int
        Optimizer steps per batch. The prediction is that of the last step, made before its update.
    optimizer : callable
        ``optimizer(parameters, lr=lr)`` returns a torch optimizer.
    seed : int
        Seed of the method's own generator.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
        The optimizer; `reset()` builds a new one.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A wrong option; in `forward` also a loss or gradient that is not finite, raised before the update.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        steps: int,
        optimizer: OptimizerFactory,
        seed: int,
    ) -> None:
        lr = _checks.positive(type(self).__name__, "lr", lr)
        steps = _checks.positive_int(type(self).__name__, "steps", steps)
        super().__init__(model, seed=seed)
        if not callable(optimizer):
            got = type(optimizer).__name__
            raise self._error("optimizer", "a callable (parameters, lr=) -> Optimizer", got, ArgumentTypeError)
        self.lr = lr
        self.steps = steps
        self._make_optimizer = optimizer

    def _loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction and the scalar loss to descend. Runs with grad."""
        raise NotImplementedError

    def _trained(self) -> list[nn.Parameter]:
        """Return the parameters to train, each once."""
        raise NotImplementedError

    def _after_step(self) -> None:
        """Run after each update; must not fail."""

    def _configure(self) -> None:
        super()._configure()
        self.requires_grad_(False)
        trained = self._trained()
        for p in trained:
            p.requires_grad_(True)
        self.optimizer = self._make_optimizer(trained, lr=self.lr)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            got = type(self.optimizer).__name__
            raise self._error("optimizer", "a callable that returns a torch optimizer", got, ArgumentTypeError)

    def _adapt(self, x: Tensor) -> Tensor:
        if any(p.dtype == torch.float16 for p in self._trained()):
            # Adam's eps is 0 in float16 and small steps vanish: the first update would end in NaN.
            raise self._error("model", "trained parameters in float32, float64 or bfloat16", "float16")
        for _ in range(self.steps):
            with torch.enable_grad():
                output, loss = self._loss(x)
            output = output.detach()
            self._probabilities(output)  # an infinite loss could hide behind a custom loss function
            self._descend(loss)
            self._after_step()
        return output

    def _descend(self, loss: Tensor) -> None:
        trained = self._trained()
        if not loss.requires_grad:
            raise self._error("model", "logits that depend on the trained parameters", "logits without a gradient")
        # autograd.grad, not backward: gradients a user has accumulated elsewhere stay as they are.
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in gradients if g is not None)
        if not finite:
            raise self._error("x", "a batch with finite loss and gradient", f"loss {float(loss)} (state unchanged)")
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        self.optimizer.step()
        for p in trained:
            p.grad = None

    def _backup(self) -> dict[str, Any]:
        before = super()._backup()
        if self.steps > 1:
            # With a single step the update comes last and nothing after it can fail: no copy of the model needed.
            before["tensors"].update((name, p.detach().clone()) for name, p in self.named_parameters())
            before["optimizer"] = copy.deepcopy(self.optimizer.state_dict())
        return before

    def _rollback(self, before: dict[str, Any]) -> None:
        super()._rollback(before)
        if "optimizer" in before:
            self._load_optimizer(before["optimizer"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        # A new optimizer, since load_state_dict(assign=True) replaces the parameters the old one holds.
        self._configure()
        self.optimizer.load_state_dict(state)

    def get_extra_state(self) -> dict[str, Any]:
        """Everything `state_dict` needs beside parameters and buffers, the optimizer's state included."""
        return {**super().get_extra_state(), "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._load_optimizer(state["optimizer"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Method:
        super()._apply(fn, recurse)
        for moments in self.optimizer.state.values():
            for key, value in moments.items():
                if isinstance(value, Tensor) and value.dim() > 0:  # Adam keeps its 0-d step count on the CPU
                    moments[key] = fn(value)
        return self


class FeatureTap:
    """Reads the features of a model: the input of its last Linear, or the output of a named submodule.

    Parameters
    ----------
    op : str
        Name for error messages.
    model : nn.Module
        The model to read from.
    features : str or None
        Dotted name of the submodule whose output to read. None: the input of the last `nn.Linear`, in the order of
        `model.modules()`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        No submodule of that name, or no Linear to default to.
    """

    def __init__(self, op: str, model: nn.Module, features: str | None) -> None:
        self.of_input = features is None
        if features is None:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            if not linear:
                expected, got = "the dotted name of a submodule", f"None for a {type(model).__name__} without nn.Linear"
                raise ArgumentError(f"{op}: argument 'features': expected {expected}, got {got}")
            features = linear[-1]
        else:
            find_submodule(op, "features", model, features)
        self.op = op
        self.name = features

    @contextmanager
    def read(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect the features (N, D) of the forward passes made inside the block."""
        found: list[Tensor] = []
        module = model.get_submodule(self.name)

        def keep(value: object) -> None:
            if not isinstance(value, Tensor) or value.dim() < 2:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ArgumentError(f"{self.op}: features of {self.name!r}: expected a tensor (N, D, ...), got {got}")
            found[:] = [value.flatten(1)]  # a layer used twice: the last use is nearest to the logits

        if self.of_input:
            handle = module.register_forward_pre_hook(lambda _, args: keep(args[0] if args else None))
        else:
            handle = module.register_forward_hook(lambda _, __, output: keep(output))
        try:
            yield found
        finally:
            handle.remove()

    def __call__(self, model: nn.Module, x: Tensor) -> tuple[object, Tensor]:
        """Run the model; return its output and the features (N, D)."""
        with self.read(model) as found:
            output = model(x)
        if not found or found[0].shape[0] != x.shape[0]:
            got = "no call of it" if not found else f"{found[0].shape[0]} rows for {x.shape[0]} samples"
            raise ArgumentError(f"{self.op}: features of {self.name!r}: expected one row per sample, got {got}")
        return output, found[0]


def find_submodule(op: str, argument: str, model: nn.Module, name: object) -> nn.Module:
    """Return the submodule of that dotted name; if there is none, raise an error that lists candidates."""
    if not isinstance(name, str):
        got = type(name).__name__
        raise ArgumentTypeError(f"{op}: argument '{argument}': expected the dotted name of a submodule, got {got}")
    modules: dict[str, nn.Module] = {key: module for key, module in model.named_modules() if key}
    if name not in modules:
        close = ", ".join(repr(key) for key in difflib.get_close_matches(name, modules, n=10, cutoff=0.0))
        _checks.refuse(op, argument, f"the name of a submodule such as {close or '(it has none)'}", repr(name))
    return modules[name]


def _finish_load(module: nn.Module, _: object) -> None:
    """Post hook of load_state_dict: here the children's tensors are in place."""
    assert isinstance(module, Method)
    if module._pending is not None:
        state, module._pending = module._pending, None
        with torch.inference_mode(False), torch.no_grad():
            module._restore(state)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # Not torch.equal on the values: it takes -0.0 for 0.0 and NaN for different from itself.
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
