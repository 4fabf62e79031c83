"""Test-time adaptation: every method is a module around a model whose forward adapts and predicts.

Examples
--------
>>> import torch
>>> from torch import nn
>>> from shiftkern import tta
>>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
>>> method = tta.Tent(model)
>>> for batch in torch.rand(3, 16, 3):
...     logits = method(batch)
>>> method.collapse_monitor.predictions
48
>>> method.reset()
"""

from shiftkern.tta.augment import Augment
from shiftkern.tta.base import GradientMethod, Method
from shiftkern.tta.batch_norm import AlphaBN, BatchNormAdapt, Source, UnMix
from shiftkern.tta.cotta import CoTTA
from shiftkern.tta.lame import lame
from shiftkern.tta.losses import class_correlation_loss, softmax_entropy, symmetric_cross_entropy
from shiftkern.tta.monitor import CollapseMonitor
from shiftkern.tta.osuda import OSUDA
from shiftkern.tta.output import LAME
from shiftkern.tta.rmt import RMT
from shiftkern.tta.style import StyleShifting, collect_styles
from shiftkern.tta.tent import Tent

__all__ = [
    "LAME",
    "OSUDA",
    "RMT",
    "AlphaBN",
    "Augment",
    "BatchNormAdapt",
    "CoTTA",
    "CollapseMonitor",
    "GradientMethod",
    "Method",
    "Source",
    "StyleShifting",
    "Tent",
    "UnMix",
    "class_correlation_loss",
    "collect_styles",
    "lame",
    "softmax_entropy",
    "symmetric_cross_entropy",
]
