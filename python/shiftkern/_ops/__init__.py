"""The operators ``torch.ops.shiftkern.*``: one module per domain, all registered by importing this package."""

from shiftkern._ops import attention, merge, neighborhood, norm, ot, rotation, shift, sort, tta

__all__ = ["attention", "merge", "neighborhood", "norm", "ot", "rotation", "shift", "sort", "tta"]
