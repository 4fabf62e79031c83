"""Test-time style shifting: move samples of unknown style to the nearest source style."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern import _checks
from shiftkern.errors import ArgumentError, ArgumentTypeError
from shiftkern.norm import channel_moments, style_shift
from shiftkern.tta.base import Method, find_submodule

Styles = Mapping[str, tuple[Tensor, Tensor]]


class StyleShifting(Method):
    """Test-time style shifting (158): re-style what is far from every source style. Nothing is trained.

    At each named layer, the style of a sample is the mean and standard deviation of each channel of the layer's
    output. Where its distance to every source style exceeds `threshold`, the output is re-normalised to the nearest
    source style; other samples pass unchanged.

    Parameters
    ----------
    model : nn.Module
        Maps a batch to logits. Not changed: the layers' outputs are replaced while `forward` runs.
    styles : mapping of str to (Tensor, Tensor)
        Dotted layer name -> (style_mean, style_std), each (S, C): the source styles, from `collect_styles`.
    threshold : float, optional
        L2 distance of [mean, std] above which to shift, at least 0. None: shift every sample.
    eps : float
        Added to variances.
    seed : int
        Seed of the method's generator; nothing is drawn from it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        `styles` empty or of the wrong form, a layer that does not exist, a negative threshold; see `Method`.

    References
    ----------
    Test-Time Style Shifting: Handling Arbitrary Styles in Domain Generalization (Park et al., ICML 2023).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import StyleShifting, collect_styles
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> source = [torch.rand(20, 1, 8, 8), torch.rand(20, 1, 8, 8)]
    >>> method = StyleShifting(model, collect_styles(model, ["0"], [source]))
    >>> method(5 * torch.rand(3, 1, 8, 8)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self, model: nn.Module, styles: Styles, threshold: float | None = None, *, eps: float = 1e-5, seed: int = 0
    ) -> None:
        threshold = _checks.threshold("StyleShifting", "threshold", threshold)
        eps = _checks.positive("StyleShifting", "eps", eps)
        super().__init__(model, seed=seed)
        if not isinstance(styles, Mapping):
            expected = "a mapping of layer name to (style_mean, style_std)"
            raise self._error("styles", expected, type(styles).__name__, ArgumentTypeError)
        if not styles:
            raise self._error("styles", "at least one layer", "none")
        self.layers = tuple(styles)
        self.threshold = threshold
        self.eps = eps
        with torch.inference_mode(False):
            checked = [self._checked(layer, styles[layer]) for layer in self.layers]
        # By number, since a buffer's name may not hold the dots of a layer's.
        for i, (mean, std) in enumerate(checked):
            self.register_buffer(f"style_mean_{i}", mean)
            self.register_buffer(f"style_std_{i}", std)
        self._start()

    def _checked(self, layer: object, style: object) -> tuple[Tensor, Tensor]:
        find_submodule("StyleShifting", "styles", self.model, layer)
        if not isinstance(style, tuple | list) or len(style) != 2 or not all(isinstance(t, Tensor) for t in style):
            expected = f"a pair of tensors (style_mean, style_std) for layer {layer!r}"
            raise self._error("styles", expected, type(style).__name__, ArgumentTypeError)
        mean, std = (t.detach().clone() for t in style)
        if mean.dim() != 2 or mean.shape != std.shape or mean.numel() == 0 or not mean.is_floating_point():
            expected = f"style_mean and style_std of equal shape (S, C) for layer {layer!r}"
            raise self._error("styles", expected, f"shapes {tuple(mean.shape)} and {tuple(std.shape)}")
        if not (mean.isfinite().all() and std.isfinite().all() and (std >= 0).all()):
            raise self._error("styles", f"finite values and style_std >= 0 for layer {layer!r}", "other values")
        return mean, std

    def _adapt(self, x: Tensor) -> Tensor:
        with ExitStack() as hooks:
            for i, layer in enumerate(self.layers):
                mean, std = self.get_buffer(f"style_mean_{i}"), self.get_buffer(f"style_std_{i}")
                hooks.enter_context(self._shifted(layer, mean, std))
            return super()._adapt(x)

    @contextmanager
    def _shifted(self, layer: str, mean: Tensor, std: Tensor) -> Iterator[None]:
        def shift(_: nn.Module, __: object, output: Tensor) -> Tensor:
            return style_shift(output, mean, std, threshold=self.threshold, eps=self.eps)

        handle = self.model.get_submodule(layer).register_forward_hook(shift)
        try:
            yield
        finally:
            handle.remove()


def collect_styles(
    model: nn.Module,
    layers: Sequence[str],
    domains: Iterable[Iterable[Tensor | Sequence[Tensor]]],
    *,
    eps: float = 1e-5,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Collect the source styles for `StyleShifting`: one centroid per source domain and layer.

    A sample's style is the mean and ``sqrt(var + eps)`` of each channel over its positions (biased variance); a
    domain's centroid is the average over its samples. The model runs in eval mode and keeps its flags.

    Parameters
    ----------
    model : nn.Module
        The source model.
    layers : sequence of str
        Dotted names of the submodules whose outputs (N, C, *spatial) to describe.
    domains : iterable of iterables
        One iterable of batches per source domain. A batch is an input tensor or a sequence starting with one.
    eps : float
        Added to variances.

    Returns
    -------
    dict of str to (Tensor, Tensor)
        Layer -> (style_mean, style_std), each (number of domains, C).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A layer that does not exist or does not return a tensor (N, C, *spatial), no domain, a domain without samples.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from shiftkern.tta import collect_styles
    >>> photos, sketches = [torch.rand(8, 1, 6, 6)], [torch.rand(8, 1, 6, 6), torch.rand(2, 1, 6, 6)]
    >>> mean, std = collect_styles(nn.Sequential(nn.Conv2d(1, 4, 3)), ["0"], [photos, sketches])["0"]
    >>> mean.shape, std.shape
    (torch.Size([2, 4]), torch.Size([2, 4]))
    """
    op = "collect_styles"
    eps = _checks.positive(op, "eps", eps)
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise ArgumentTypeError(f"{op}: argument 'layers': expected a non-empty list of names, got {layers!r}")
    if not isinstance(model, nn.Module):
        _checks.refuse_type(op, "model", "a torch.nn.Module", _checks.describe(model))
    modules = {layer: find_submodule(op, "layers", model, layer) for layer in layers}
    training = {module: module.training for module in model.modules()}
    centroids: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    seen: dict[str, object] = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, layer=layer: seen.__setitem__(layer, output))
        for layer, module in modules.items()
    ]
    try:
        model.eval()
        with torch.no_grad():
            for number, domain in enumerate(_batches(op, domains)):
                sums: dict[str, tuple[Tensor, Tensor]] = {}
                count = 0
                for batch in _batches(op, domain):
                    x = batch[0] if isinstance(batch, Sequence) and batch else batch
                    if not isinstance(x, Tensor):
                        _checks.refuse_type(
                            op, "domains", "batches that are or begin with a tensor", _checks.describe(batch)
                        )
                    seen.clear()
                    model(x)
                    count += x.shape[0]
                    for layer in layers:
                        mean, std = _style(op, layer, seen.get(layer), eps)
                        old = sums.get(layer, (torch.zeros_like(mean[0]), torch.zeros_like(std[0])))
                        sums[layer] = (old[0] + mean.sum(0), old[1] + std.sum(0))
                if count == 0:
                    raise ArgumentError(f"{op}: argument 'domains': expected samples in domain {number}, got none")
                for layer in layers:
                    centroids[layer].append((sums[layer][0] / count, sums[layer][1] / count))
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    if not centroids[layers[0]]:
        raise ArgumentError(f"{op}: argument 'domains': expected at least one domain, got none")
    return {
        layer: (torch.stack([mean for mean, _ in pairs]), torch.stack([std for _, std in pairs]))
        for layer, pairs in centroids.items()
    }


def _batches(op: str, value: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(value)
    except TypeError:
        _checks.refuse_type(op, "domains", "an iterable of iterables of batches", _checks.describe(value))


def _style(op: str, layer: str, output: object, eps: float) -> tuple[Tensor, Tensor]:
    if not isinstance(output, Tensor) or output.dim() < 3:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        expected = f"layer {layer!r} to return a tensor (N, C, *spatial)"
        raise ArgumentError(f"{op}: argument 'layers': expected {expected}, got {got}")
    moments = channel_moments(output, per_instance=True)
    return moments.mean.to(output.dtype), (moments.var() + eps).sqrt().to(output.dtype)
