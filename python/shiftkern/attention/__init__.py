"""Sparse attention that skips what is masked, statistics that make up for it, and relatives of attention."""

from shiftkern.attention.aggregated_attention import aggregated_attention
from shiftkern.attention.arm_gate import arm_gate
from shiftkern.attention.bilevel_positions import bilevel_positions
from shiftkern.attention.block_mask import BlockMask
from shiftkern.attention.cross_covariance_attention import cross_covariance_attention
from shiftkern.attention.entmax import entmax
from shiftkern.attention.gated_cache import GatedCache, gated_cache
from shiftkern.attention.kv_shift import KVShiftState, kv_shift, kv_shift_init
from shiftkern.attention.local_global_attention import LocalGlobalAttention, local_global_attention
from shiftkern.attention.merge_state import merge_state, merge_states
from shiftkern.attention.neighborhood import neighborhood
from shiftkern.attention.pointer import pointer
from shiftkern.attention.poly_encoder import PolyEncoder, poly_encoder
from shiftkern.attention.reattention import (
    Reattention,
    ReattentionProcessor,
    ReattentionState,
    reattention_capture,
    reattention_step,
)
from shiftkern.attention.select_mask import SelectedMask, select_mask
from shiftkern.attention.shifted_heads import fold_adapter, shifted_heads
from shiftkern.attention.sliding_window_attention import sliding_window_attention
from shiftkern.attention.sparse_attention import attention_lse, sparse_attention
from shiftkern.attention.topk_block_mask import topk_block_mask

__all__ = [
    "BlockMask",
    "GatedCache",
    "KVShiftState",
    "LocalGlobalAttention",
    "PolyEncoder",
    "Reattention",
    "ReattentionProcessor",
    "ReattentionState",
    "SelectedMask",
    "aggregated_attention",
    "arm_gate",
    "attention_lse",
    "bilevel_positions",
    "cross_covariance_attention",
    "entmax",
    "fold_adapter",
    "gated_cache",
    "kv_shift",
    "kv_shift_init",
    "local_global_attention",
    "merge_state",
    "merge_states",
    "neighborhood",
    "pointer",
    "poly_encoder",
    "reattention_capture",
    "reattention_step",
    "select_mask",
    "shifted_heads",
    "sliding_window_attention",
    "sparse_attention",
    "topk_block_mask",
]
