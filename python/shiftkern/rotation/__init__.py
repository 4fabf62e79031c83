"""Rotations of feature vectors by fused kernels: plane rotations, reflections, Cayley blocks, butterflies."""

from shiftkern.rotation.boundless_das import BoundlessDAS
from shiftkern.rotation.butterfly_rotate import butterfly_rotate
from shiftkern.rotation.cayley import cayley
from shiftkern.rotation.cayley_rotate import cayley_rotate
from shiftkern.rotation.das import DAS
from shiftkern.rotation.givens_mix import givens_mix, invert_blocks
from shiftkern.rotation.givens_rotate import givens_pairs, givens_rotate
from shiftkern.rotation.householder_chain import householder_chain
from shiftkern.rotation.householder_reflect import householder_reflect
from shiftkern.rotation.orthogonality import orthogonality_error, orthogonality_penalty
from shiftkern.rotation.polar import polar
from shiftkern.rotation.sandwich import SandwichLinear, SandwichNet
from shiftkern.rotation.to_matrix import to_matrix

__all__ = [
    "DAS",
    "BoundlessDAS",
    "SandwichLinear",
    "SandwichNet",
    "butterfly_rotate",
    "cayley",
    "cayley_rotate",
    "givens_mix",
    "givens_pairs",
    "givens_rotate",
    "householder_chain",
    "householder_reflect",
    "invert_blocks",
    "orthogonality_error",
    "orthogonality_penalty",
    "polar",
    "to_matrix",
]
