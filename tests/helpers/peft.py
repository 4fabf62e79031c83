"""Models and settings with which every method of fine-tuning is held to the common contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shiftkern.peft import Config, inject
from shiftkern.peft._adapter import METHODS


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Linear layers with and without bias; smooth, so that finite differences make sense."""
    return fixed(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8, bias=False)), dtype)


def cnn(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Convolutions with padding, stride and groups, normalizations, a linear layer."""
    layers = [
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.Tanh(),
        nn.Conv2d(8, 8, 2, stride=2, groups=2, bias=False),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Linear(32, 8),
        nn.LayerNorm(8),
    ]
    return fixed(nn.Sequential(*layers), dtype)


def words(dtype: torch.dtype = torch.float32) -> nn.Module:
    """An embedding with a padding entry, and a linear layer."""
    return fixed(nn.Sequential(nn.Embedding(11, 8, padding_idx=0), nn.Linear(8, 8)), dtype)


def pair(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear layers with equally many inputs."""
    return fixed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)), dtype)


def fixed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fill a model with numbers that depend on nothing but the order of its tensors."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                value.copy_(0.5 + noise.square())
            elif value.dim() == 1:
                value.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            else:
                value.copy_(noise / value[0].numel() ** 0.5)
    return model.to(dtype).eval()


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def pictures(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Case:
    """One setting of a method: arguments of its config, a model, an input, and whether it starts at the identity.

    ``smooth`` is False where gradients are not those of finite differences: masks pass them straight through.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[torch.dtype], nn.Module] = mlp
    inputs: Callable[[torch.dtype], Tensor] = rows
    identity: bool = True
    smooth: bool = True

    def config(self, method: str) -> Config:
        return METHODS[method](**self.options)

    def injected(self, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        return inject(self.model(dtype), self.config(method))

    def trained(self, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A model whose adapters have moved away from their start."""
        return train(self.injected(method, dtype))


def train(model: nn.Module, size: float = 0.1, seed: int = 5) -> nn.Module:
    """Move everything that is trained by a random step, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(size * step.to(parameter.dtype))
    return model


CNN = {"model": cnn, "inputs": pictures}
WORDS = {"model": words, "inputs": tokens}

#: Settings by method; a method that is not here is held to the contract with its defaults on ``mlp``.
CASES: dict[str, list[Case]] = {
    "ADALINK": [
        Case({"r": 2, "target_modules": ["0"]}, **WORDS),
        Case({"r": 3, "target_modules": "all-linear"}),
        Case({"r": 2, "target_modules": ["1"], "width": 16}),
    ],
    "ADAPTERBIAS": [
        Case({"target_modules": ["0", "2"]}),
        Case({"target_modules": ["1"], "seed": 3}, **WORDS),
        Case({"target_modules": ["0", "1"], "shared": True}, model=pair),
    ],
    "BITFIT": [
        Case(),
        Case({"target_modules": ["0", "1", "3", "4", "6", "7"]}, **CNN),
    ],
    "BOFT": [
        Case({"block_size": 2, "factors": 3}),
        Case({"block_size": 4, "factors": 1, "target_modules": ["0", "3", "6"]}, **CNN),
    ],
    "CLOVER": [
        # Layers of the model in the parts of projections: their widths fit, which is all that counts here.
        Case({"heads": 4, "q": "0", "k": "0", "v": "2", "o": "0"}),
        Case({"heads": 4, "kv_heads": 2, "q": "0", "k": "2", "v": "2", "target_modules": ["0"], "rotary": True}),
        Case({"heads": 2, "fused": "0", "kv_heads": 1, "rotary": True}),
    ],
    "DIFF_PRUNING": [
        Case(),
        Case({"structured": False, "start": 0.1, "target_modules": ["0", "3", "4", "6", "7"]}, **CNN),
        # The entry of padding gets no gradient, as torch has it.
        Case({"target_modules": ["0", "1"]}, words, lambda dtype: tokens(dtype).clamp(min=1)),
    ],
    "ETHER": [
        Case({"blocks": 2}, identity=False),
        Case({"blocks": 2, "plus": True}),
        Case({"blocks": 4, "plus": True, "two_sided": True}),
        Case({"blocks": 2, "two_sided": True, "target_modules": ["0", "3", "6"]}, identity=False, **CNN),
    ],
    "FISH": [
        Case({"mask": {"0": [1, 5, 127, 128, 143], "2": range(0, 128, 3)}}),
        Case(
            {
                "mask": {"0": [3, 290], "3": [0, 8], "4": [1, 9], "6": [255, 256]},
                "target_modules": ["0", "3", "4", "6"],
            },
            **CNN,
        ),
        Case({"mask": {"0": [12, 60, 80]}, "target_modules": ["0"]}, **WORDS),
    ],
    "GOFT": [
        Case(),
        Case({"topology": "butterfly", "scale": True}),
        Case({"topology": "brick", "layers": 3}),
        Case({"quasi": True, "scale": True}),
        Case({"quasi": True, "target_modules": ["0", "3", "6"]}, **CNN),
    ],
    "HOULSBY": [
        Case({"bottleneck": 4, "target_modules": "all-linear"}, identity=False),
        Case(
            {"bottleneck": 4, "std": 0.1, "target_modules": ["1"], "width": 16, "approximate": "none"}, identity=False
        ),
    ],
    "HRA": [
        Case({"r": 4}),
        Case({"r": 3, "orthogonalize": True}, identity=False),
        Case({"r": 2, "target_modules": ["0", "3", "6"]}, **CNN),
    ],
    "IA3": [
        Case(),
        Case({"feedforward_modules": ["2"]}),
        Case({"target_modules": ["0", "3", "6"], "feedforward_modules": ["0", "6"]}, **CNN),
        Case({"target_modules": ["0", "1"]}, **WORDS),
    ],
    "INTRINSIC_DIMENSION": [
        Case({"d": 12}),
        Case({"d": 7, "projection": "dense", "bias": False}),
        Case({"d": 9, "projection": "sparse"}),
        Case({"d": 20, "target_modules": ["0", "1", "3", "4", "6", "7"]}, **CNN),
        Case({"d": 5, "target_modules": ["0", "1"], "projection": "dense"}, **WORDS),
    ],
    "KADAPTATION": [
        Case({"terms": 3, "size": 4, "target_modules": ["0", "2"]}),
        Case({"terms": 2, "size": 8, "bias": False, "scale": 2.0, "target_modules": "all-linear"}),
    ],
    "LORA": [
        Case({"r": 2, "alpha": 3.0}),
        Case({"r": 2, "freeze_a": True}),
        Case({"r": 2, "target_modules": ["0", "3", "6"]}, **CNN),
        Case({"r": 2, "target_modules": ["0", "1"]}, **WORDS),
    ],
    "MASK": [
        Case({"target_modules": ["0", "2"]}, smooth=False),
        Case({"target_modules": ["0", "3", "6"], "start": 0.001, "threshold": 0.0}, smooth=False, **CNN),
    ],
    "MELORA": [
        Case({"r": 2, "n": 4, "alpha": 3.0}),
        Case({"r": 1, "n": 1}),
        Case({"r": 1, "n": 8}),
    ],
    "OFT": [
        Case({"block_size": 4}),
        Case({"block_size": 4, "method": "neumann"}),
        Case({"block_size": 2, "target_modules": ["0", "3", "6"]}, **CNN),
    ],
    "PASTA": [
        Case({"tokens": [2, 3, 7], "vectors": 5, "target_modules": ["0", "1"]}, identity=False, **WORDS),
    ],
    "PEGO": [
        Case({"r": 2, "count": 3, "target_modules": "all-linear"}),
        Case({"r": 1, "count": 1, "target_modules": ["1"]}, **WORDS),
    ],
    "PHM": [
        Case(),
        Case({"n": 2}),
        Case({"n": 8, "target_modules": ["1"]}, **WORDS),
    ],
    "POLY": [
        Case({"n_tasks": 3, "task": 1, "r": 2}),
        Case({"n_tasks": 2, "task": 0, "r": 1, "specific": 2, "cross": True}),
        Case({"n_tasks": 1, "r": 2, "common": 0}),
    ],
    "PST": [
        Case({"sparsity": 0.0, "r": 2, "mask_r": 2}, smooth=False),
        Case({"sparsity": 0.25, "r": 2, "mask_r": 2}, identity=False, smooth=False),
        Case(
            {"sparsity": 0.5, "r": 1, "mask_r": 1, "target_modules": ["0", "3", "6"]},
            identity=False,
            smooth=False,
            **CNN,
        ),
    ],
    "S2FT": [
        Case({"v": 0.5, "d": 0.3, "o": 0.0, "head_dim": 4, "v_modules": ["0"], "d_modules": ["2"]}),
        Case({"u": 0.3, "o": 0.4, "d": 0.0, "head_dim": 4, "u_modules": ["0"], "o_modules": ["2"]}),
    ],
    "SALT": [
        Case({"r": 3, "rank": 2}),
        Case({"r": 0.25, "rank": 2, "relu": "full"}),
        Case({"r": 8, "rank": 1}),
        Case({"r": 0, "rank": 2, "std": 0.01, "target_modules": ["0", "3", "6"]}, identity=False, **CNN),
    ],
    "SSF": [
        Case(identity=False),
        Case({"std": 0.0}),
        Case({"target_modules": ["0", "1", "3", "4", "6", "7"]}, identity=False, **CNN),
    ],
    "TTC": [
        Case({"channels": {"0": [1, 4, 7], "2": [0, 1]}, "target_modules": "all-linear"}),
        Case({"channels": {"1": [1, 15]}, "target_modules": ["1"]}),
        Case({"channels": {n: [1, 3] for n in "01367"}, "target_modules": list("01367")}, **CNN),
        Case({"channels": {"3": [1, 3]}, "target_modules": ["3"]}, **CNN),
    ],
}


def cases() -> list[tuple[str, Case]]:
    return [(method, case) for method in METHODS for case in CASES.get(method, [Case()])]
