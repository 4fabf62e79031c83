"""Parameter-efficient fine-tuning: adapters of a frozen model that can be merged, switched, saved and taken out."""

from shiftkern.peft._adapter import Config
from shiftkern.peft._files import load, save
from shiftkern.peft._model import (
    adapted_layers,
    delete_adapter,
    describe,
    disable_adapter,
    inject,
    merge,
    merge_and_unload,
    penalty,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from shiftkern.peft.adalink import AdaLinkConfig
from shiftkern.peft.adapter_bias import AdapterBiasConfig
from shiftkern.peft.bitfit import BitFitConfig
from shiftkern.peft.boft import BOFTConfig
from shiftkern.peft.clover import CLOVERConfig, CloverFactors, CloverPruned, clover_decompose, clover_prune
from shiftkern.peft.diff_pruning import DiffPruningConfig, finalize_diff_pruning
from shiftkern.peft.ether import ETHERConfig
from shiftkern.peft.fish import FISHConfig, fish_mask
from shiftkern.peft.goft import GOFTConfig
from shiftkern.peft.houlsby import HoulsbyConfig
from shiftkern.peft.hra import HRAConfig
from shiftkern.peft.ia3 import IA3Config
from shiftkern.peft.intrinsic_dimension import IntrinsicDimensionConfig
from shiftkern.peft.kronecker import KroneckerConfig
from shiftkern.peft.lora import LoRAConfig
from shiftkern.peft.mask_tuning import MaskTuningConfig, mask_backward
from shiftkern.peft.melora import MELoRAConfig
from shiftkern.peft.oft import OFTConfig
from shiftkern.peft.pasta import PASTAConfig
from shiftkern.peft.pego import PEGOConfig, pego_penalty
from shiftkern.peft.phm import PHMConfig, PHMLinear
from shiftkern.peft.poly import PolyConfig, set_task
from shiftkern.peft.project_and_probe import ProjectAndProbe
from shiftkern.peft.reversible import ReversibleBlock, ReversibleSequence, meft_block, reversible_sequence
from shiftkern.peft.s2ft import S2FTConfig
from shiftkern.peft.salt import SALTConfig
from shiftkern.peft.sparse_pst import SparsePSTConfig, cubic_sparsity, set_sparsity
from shiftkern.peft.ssf import SSFConfig
from shiftkern.peft.ttc import TTCConfig, ttc_channels

__all__ = [
    "AdaLinkConfig",
    "AdapterBiasConfig",
    "BOFTConfig",
    "BitFitConfig",
    "CLOVERConfig",
    "CloverFactors",
    "CloverPruned",
    "Config",
    "DiffPruningConfig",
    "ETHERConfig",
    "FISHConfig",
    "GOFTConfig",
    "HRAConfig",
    "HoulsbyConfig",
    "IA3Config",
    "IntrinsicDimensionConfig",
    "KroneckerConfig",
    "LoRAConfig",
    "MELoRAConfig",
    "MaskTuningConfig",
    "OFTConfig",
    "PASTAConfig",
    "PEGOConfig",
    "PHMConfig",
    "PHMLinear",
    "PolyConfig",
    "ProjectAndProbe",
    "ReversibleBlock",
    "ReversibleSequence",
    "S2FTConfig",
    "SALTConfig",
    "SSFConfig",
    "SparsePSTConfig",
    "TTCConfig",
    "adapted_layers",
    "clover_decompose",
    "clover_prune",
    "cubic_sparsity",
    "delete_adapter",
    "describe",
    "disable_adapter",
    "finalize_diff_pruning",
    "fish_mask",
    "inject",
    "load",
    "mask_backward",
    "meft_block",
    "merge",
    "merge_and_unload",
    "pego_penalty",
    "penalty",
    "reversible_sequence",
    "save",
    "set_adapter",
    "set_sparsity",
    "set_task",
    "trainable_parameters",
    "ttc_channels",
    "unload",
    "unmerge",
]
