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
        ("tests/tta/test_rmt.py::test_a_stream_written_out",),
        "paper",
        "works",
    ),
    Method(
        61,
        "CoTTA",
        "Continual Test-Time Domain Adaptation",
        "tta",
        "shiftkern.tta.CoTTA",
        ("tests/tta/test_cotta.py::test_a_stream_written_out",),
        "code",  # the confidence threshold is held against the batch's mean, not each sample
        "works",
    ),
    Method(
        127,
        "OSUDA",
        "Adapting Off-the-Shelf Source Segmenter for Target Medical Image Segmentation",
        "norm",
        "shiftkern.tta.OSUDA",
        (
            "tests/norm/test_decay_batch_norm.py",
            "tests/tta/test_osuda.py::test_statistics_decay_exponentially",
            "tests/tta/test_osuda.py::test_steps_equal_the_hand_written_ones",
        ),
        "paper",
        "works",
    ),
    Method(
        158,
        "TSB (test-time style shifting + style balancing)",
        "Test-Time Style Shifting: Handling Arbitrary Styles in Domain Generalization",
        "norm",
        "shiftkern.norm.style_shift",
        ("tests/norm/test_style_shift.py", "tests/tta/test_style.py::test_shifts_what_is_far_to_the_nearest"),
        "paper",
        "partial",  # style shifting at test time; style balancing, the training half, is not here
    ),
    Method(
        215,
        "LAME",
        "Parameter-free Online Test-time Adaptation",
        "tta",
        "shiftkern.tta.lame",
        (
            "tests/tta/test_lame.py::test_fixed_point_is_the_published_one",
            "tests/tta/test_output.py::test_the_fixed_point_in_float64",
        ),
        "paper",
        "works",
    ),
    Method(
        251,
        "alpha-BN / Core",
        "Test-time Batch Statistics Calibration for Covariate Shift",
        "norm",
        "shiftkern.norm.mixed_batch_norm",
        (
            "tests/norm/test_mixed_batch_norm.py",
            "tests/tta/test_batch_norm.py::test_alpha_mixes_the_statistics",
            "tests/tta/test_losses.py::test_class_correlation_is_the_mean_off_diagonal_product",
        ),
        "paper",
        "works",
    ),
    Method(
        538,
        "UnMix-TNS",
        "Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation",
        "norm",
        "shiftkern.norm.unmix_norm",
        ("tests/norm/test_unmix_norm.py", "tests/tta/test_batch_norm.py::test_unmix_follows_the_published_form"),
        "code",  # the variance cross-term is left out unless asked for
        "works",
    ),
)
"""All methods, by id."""
