"""Small networks, and copies of them whose units are reordered by hand."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int, seed: int = 0, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return filled(nn.Sequential(*layers[:-1]), generator).to(dtype)


def convnet(*, seed: int = 0, width: int = 6, norm: bool = True) -> nn.Sequential:
    """Two convolutions on images of 2 x 8 x 8, and two linear layers behind the flattened result."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, width + 2, 3, padding=1), nn.BatchNorm2d(width + 2), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.Flatten(), nn.Linear((width + 2) * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3)]
    return filled(nn.Sequential(*(la for la in layers if norm or not isinstance(la, nn.BatchNorm2d))), generator).eval()


def filled(module: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    """Random parameters and running statistics, of usual sizes."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                value.fill_(7)
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            else:
                fan = value[0].numel() if value.dim() > 1 else 4
                value.copy_(torch.randn(value.shape, generator=generator) / fan**0.5)
    return module


def reordered(module: nn.Sequential, seed: int = 0) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Copy of a chain whose hidden units are shuffled, and the shuffles by the name of their layer.

    Layer by layer on plain tensors, without any spec: unit ``i`` of the copy is unit ``order[i]`` of the original.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    weighted = [name for name, layer in module.named_children() if hasattr(layer, "weight") and layer.weight.dim() > 1]
    orders: dict[str, Tensor] = {}
    order: Tensor | None = None
    for name, _ in module.named_children():
        own = [key for key in state if key.startswith(f"{name}.") and state[key].dim() > 0]
        if name in weighted:
            weight = state[f"{name}.weight"]
            if order is not None:
                groups = weight.reshape(weight.shape[0], len(order), -1)
                weight = groups[:, order].reshape(weight.shape)
                state[f"{name}.weight"] = weight
            order = None
            if name != weighted[-1]:
                order = torch.randperm(weight.shape[0], generator=generator)
                orders[name] = order
        if order is not None:
            for key in own:
                state[key] = state[key][order]
    twin = copy.deepcopy(module)
    twin.load_state_dict(state)
    return twin, orders
