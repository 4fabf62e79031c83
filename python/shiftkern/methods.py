"""Which published methods the library holds, by the number of the project's catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """
    One published method.

    Attributes
    ----------
    id : int
        Number in the catalogue.
    system : str
        The method's name.
    paper : str
        Title of the paper.
    module : str
        Domain of the library.
    api : str
        Public name that imports.
    tests : tuple of str
        pytest ids of the tests that hold it to its formula.
    follows : {"paper", "code"}
        Which one we follow where the paper and its authors' code differ.
    status : {"works", "partial"}
        ``"works"`` only where the tests check it against an independent oracle of the stated formula.
    """

    id: int
    system: str
    paper: str
    module: str
    api: str
    tests: tuple[str, ...]
    follows: Literal["paper", "code"]
    status: Literal["works", "partial"]


METHODS: tuple[Method, ...] = (
    Method(
        4,
        "RMT",
        "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
        "tta",
        "shiftkern.tta.RMT",
        ("tests/tta/test_rmt.py",),
        "paper",
        "partial",
    ),
    Method(
        61,
        "CoTTA",
        "Continual Test-Time Domain Adaptation",
        "tta",
        "shiftkern.tta.CoTTA",
        ("tests/tta/test_cotta.py",),
        "paper",
        "partial",
    ),
    Method(
        127,
        "OSUDA",
        "Adapting Off-the-Shelf Source Segmenter for Target Medical Image Segmentation",
        "norm",
        "shiftkern.tta.OSUDA",
        ("tests/tta/test_osuda.py",),
        "paper",
        "partial",
    ),
    Method(
        158,
        "TSB (test-time style shifting + style balancing)",
        "Test-Time Style Shifting: Handling Arbitrary Styles in Domain Generalization",
        "norm",
        "shiftkern.norm.style_shift",
        ("tests/norm/test_style_shift.py",),
        "paper",
        "partial",
    ),
    Method(
        215,
        "LAME",
        "Parameter-free Online Test-time Adaptation",
        "tta",
        "shiftkern.tta.lame",
        ("tests/tta/test_lame.py",),
        "paper",
        "partial",
    ),
    Method(
        251,
        "alpha-BN / Core",
        "Test-time Batch Statistics Calibration for Covariate Shift",
        "norm",
        "shiftkern.norm.mixed_batch_norm",
        ("tests/norm/test_mixed_batch_norm.py",),
        "paper",
        "partial",
    ),
    Method(
        538,
        "UnMix-TNS",
        "Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation",
        "norm",
        "shiftkern.norm.unmix_norm",
        ("tests/norm/test_unmix_norm.py",),
        "code",  # the variance cross-term is left out unless asked for
        "partial",
    ),
)
"""All methods, by id."""
