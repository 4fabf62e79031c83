"""Normalization statistics: measured in one pass, mixed between source and target, applied in one pass.

Tensors are ``(N, C, *spatial)`` in float32, float64, float16 or bfloat16, contiguous or channels-last without a copy.
Statistics are per channel and float64.
"""

from shiftkern.norm.batch_norm import AlphaBatchNorm, DecayBatchNorm, mixed_batch_norm, mixed_batch_norm_
from shiftkern.norm.convert import convert_norm, revert_norm
from shiftkern.norm.ema import ema_update_
from shiftkern.norm.moments import Moments, all_reduce_moments, channel_moments, merge_moments
from shiftkern.norm.style import StyleShift, style_shift
from shiftkern.norm.unmix import UnMixTNS, unmix_norm

__all__ = [
    "AlphaBatchNorm",
    "DecayBatchNorm",
    "Moments",
    "StyleShift",
    "UnMixTNS",
    "all_reduce_moments",
    "channel_moments",
    "convert_norm",
    "ema_update_",
    "merge_moments",
    "mixed_batch_norm",
    "mixed_batch_norm_",
    "revert_norm",
    "style_shift",
    "unmix_norm",
]
