"""Optimal transport, assignment and differentiable sorting.

Sinkhorn's iteration in one pass over the costs (given, batched, or computed between points on the fly), and the methods
that are built on it. NumPy or torch in, the same kind out.
"""

from shiftkern.ot.conditional_transport import conditional_transport
from shiftkern.ot.diffsort import diffsort
from shiftkern.ot.emd_1d import emd_1d
from shiftkern.ot.emo_loss import emo_loss
from shiftkern.ot.linear_assignment import linear_assignment
from shiftkern.ot.multi_assign import multi_assign
from shiftkern.ot.proximal_ot import ProximalResult, proximal_ot
from shiftkern.ot.pt_map import PTMapResult, pt_map
from shiftkern.ot.putm import PutmResult, putm
from shiftkern.ot.result import SinkhornResult
from shiftkern.ot.sela_assign import sela_assign
from shiftkern.ot.sinkhorn import sinkhorn, sinkhorn_batch, sinkhorn_partial, sinkhorn_samples
from shiftkern.ot.sinkhorn_assign import sinkhorn_assign
from shiftkern.ot.sinkhorn_divergence import sinkhorn_divergence
from shiftkern.ot.sinkhorn_sharded import ShardedSinkhornResult, sinkhorn_sharded
from shiftkern.ot.soft_rank import soft_rank, soft_sort
from shiftkern.ot.sparse_shift_map import SparseShiftMap, sparse_shift_map
from shiftkern.ot.style_projection import style_projection
from shiftkern.ot.swap_prune import SwapResult, cubic_sparsity, swap_prune
from shiftkern.ot.wcord_loss import WCoRDCritic, wcord_loss

__all__ = [
    "PTMapResult",
    "ProximalResult",
    "PutmResult",
    "ShardedSinkhornResult",
    "SinkhornResult",
    "SparseShiftMap",
    "SwapResult",
    "WCoRDCritic",
    "conditional_transport",
    "cubic_sparsity",
    "diffsort",
    "emd_1d",
    "emo_loss",
    "linear_assignment",
    "multi_assign",
    "proximal_ot",
    "pt_map",
    "putm",
    "sela_assign",
    "sinkhorn",
    "sinkhorn_assign",
    "sinkhorn_batch",
    "sinkhorn_divergence",
    "sinkhorn_partial",
    "sinkhorn_samples",
    "sinkhorn_sharded",
    "soft_rank",
    "soft_sort",
    "sparse_shift_map",
    "style_projection",
    "swap_prune",
    "wcord_loss",
]
