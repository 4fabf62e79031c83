"""Merging of fine-tuned models: task vectors, alignment of neurons, learned coefficients, files of any size."""

from shiftkern.merge.activation_matching import ActivationMatch, activation_matching
from shiftkern.merge.ada_merging import AdaMerging
from shiftkern.merge.apply_permutation import apply_permutation
from shiftkern.merge.atlas import ATLAS
from shiftkern.merge.atm import atm
from shiftkern.merge.bitdelta import SignedTaskVector, bitdelta, bitdelta_compress, bitdelta_decompress
from shiftkern.merge.branch_train_mix import branch_train_mix
from shiftkern.merge.breadcrumbs import breadcrumbs
from shiftkern.merge.compeft import TernaryTaskVector, compeft_compress, compeft_decompress
from shiftkern.merge.concrete import ConcreteMerging, concrete
from shiftkern.merge.config import MergeConfig, read_config
from shiftkern.merge.cross_layer_alignment import cross_layer_alignment
from shiftkern.merge.dare import dare
from shiftkern.merge.della import della
from shiftkern.merge.delta_edit import delta_edit
from shiftkern.merge.edit_ridge import edit_ridge
from shiftkern.merge.files import MergeReport, merge_files
from shiftkern.merge.grow import grow, grow_cores
from shiftkern.merge.iso_c import iso_c
from shiftkern.merge.iso_cts import iso_cts
from shiftkern.merge.layer_costs import layer_costs
from shiftkern.merge.momentum_interpolation import MomentumInterpolation
from shiftkern.merge.otfusion import otfusion
from shiftkern.merge.otfusion_layer import FusedLayer, otfusion_layer
from shiftkern.merge.pad_layers import pad_layers
from shiftkern.merge.pcb import pcb
from shiftkern.merge.renormalize import renormalize
from shiftkern.merge.sens_merging import SensMergingResult, sens_merging
from shiftkern.merge.sequential_spec import sequential_spec
from shiftkern.merge.slerp import slerp
from shiftkern.merge.soup import soup
from shiftkern.merge.sparse_prediction import sparse_prediction
from shiftkern.merge.task_arithmetic import task_arithmetic
from shiftkern.merge.ties import ties
from shiftkern.merge.transfer_trajectory import transfer_trajectory
from shiftkern.merge.weight_matching import WeightMatchingResult, weight_matching
from shiftkern.merge.widen import widen
from shiftkern.merge.wise_ft import wise_ft

__all__ = [
    "ATLAS",
    "ActivationMatch",
    "AdaMerging",
    "ConcreteMerging",
    "FusedLayer",
    "MergeConfig",
    "MergeReport",
    "MomentumInterpolation",
    "SensMergingResult",
    "SignedTaskVector",
    "TernaryTaskVector",
    "WeightMatchingResult",
    "activation_matching",
    "apply_permutation",
    "atm",
    "bitdelta",
    "bitdelta_compress",
    "bitdelta_decompress",
    "branch_train_mix",
    "breadcrumbs",
    "compeft_compress",
    "compeft_decompress",
    "concrete",
    "cross_layer_alignment",
    "dare",
    "della",
    "delta_edit",
    "edit_ridge",
    "grow",
    "grow_cores",
    "iso_c",
    "iso_cts",
    "layer_costs",
    "merge_files",
    "otfusion",
    "otfusion_layer",
    "pad_layers",
    "pcb",
    "read_config",
    "renormalize",
    "sens_merging",
    "sequential_spec",
    "slerp",
    "soup",
    "sparse_prediction",
    "task_arithmetic",
    "ties",
    "transfer_trajectory",
    "weight_matching",
    "widen",
    "wise_ft",
]
