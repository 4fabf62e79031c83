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
        31,
        "Towards Explaining Distribution Shifts",
        "Towards Explaining Distribution Shifts",
        "ot",
        "shiftkern.ot.sparse_shift_map",
        (
            "tests/ot/test_sparse_shift_map.py::test_maps_of_features_are_the_defined_ones",
            "tests/ot/test_sparse_shift_map.py::test_clusters_move_as_a_whole",
        ),
        "code",  # squared distances throughout
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
        218,
        "Style Projection",
        "Parameter-Free Style Projection for Arbitrary Style Transfer",
        "ot",
        "shiftkern.ot.style_projection",
        ("tests/ot/test_style_projection.py::test_equals_the_published_form",),
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
        278,
        "PUTM",
        "Prototypes-oriented Transductive Few-shot Learning with Conditional Transport",
        "ot",
        "shiftkern.ot.putm",
        ("tests/ot/test_putm.py::test_equals_the_loop_written_out",),
        "code",
        "works",
    ),
    Method(
        336,
        "Error-free DSF",
        "Generalized Neural Sorting Networks with Error-Free Differentiable Swap Functions",
        "ot",
        "shiftkern.ot.diffsort",
        (
            "tests/ot/test_diffsort.py::test_error_free_is_hard_sorting",
            "tests/ot/test_diffsort.py::test_gradient_equals_autograd_through_dense_matrices",
        ),
        "paper",
        "works",
    ),
    Method(
        360,
        "Multi-SK",
        "Preserving Modality Structure Improves Multi-Modal Learning",
        "ot",
        "shiftkern.ot.multi_assign",
        ("tests/ot/test_multi_assign.py::test_equals_the_published_iteration",),
        "paper",  # normalised exactly, without the code's guard in the denominators
        "works",
    ),
    Method(
        378,
        "SWAP",
        "SWAP: Sparse Entropic Wasserstein Regression for Robust Network Pruning",
        "ot",
        "shiftkern.ot.swap_prune",
        (
            "tests/ot/test_swap_prune.py::test_steps_are_those_of_the_loop",
            "tests/ot/test_swap_prune.py::test_a_step_goes_down_the_gradient_that_autograd_finds",
        ),
        "paper",  # the code's step is not the gradient of its objective
        "works",
    ),
    Method(
        382,
        "PT-MAP",
        "Leveraging the Feature Distribution in Transfer-based Few-Shot Learning",
        "ot",
        "shiftkern.ot.pt_map",
        ("tests/ot/test_pt_map.py::test_result_is_the_published_one",),
        "code",
        "works",
    ),
    Method(
        400,
        "SeLa",
        "Self-labelling via simultaneous clustering and representation learning",
        "ot",
        "shiftkern.ot.sela_assign",
        ("tests/ot/test_sela_assign.py::test_plan_is_the_published_one",),
        "code",
        "works",
    ),
    Method(
        466,
        "WCoRD",
        "Wasserstein Contrastive Representation Distillation",
        "ot",
        "shiftkern.ot.wcord_loss",
        (
            "tests/ot/test_wcord_loss.py::test_local_term_is_the_cost_of_the_entropic_plan",
            "tests/ot/test_wcord_loss.py::test_global_term_is_the_mean_difference_of_scores",
        ),
        "paper",
        "partial",  # only the abstract could be checked; the critic's form is ours
    ),
    Method(
        471,
        "CT",
        "Exploiting Chain Rule and Bayes' Theorem to Compare Probability Distributions",
        "ot",
        "shiftkern.ot.conditional_transport",
        ("tests/ot/test_conditional_transport.py::test_equals_the_definition",),
        "paper",
        "works",
    ),
    Method(
        478,
        "Monotonic DiffSort",
        "Monotonic Differentiable Sorting Networks",
        "ot",
        "shiftkern.ot.diffsort",
        (
            "tests/ot/test_diffsort.py::test_equals_dense_matrices",
            "tests/ot/test_diffsort.py::test_one_comparator_by_hand",
            "tests/ot/test_diffsort.py::test_monotone_but_for_the_logistic_function",
        ),
        "paper",
        "works",
    ),
    Method(
        526,
        "EMO",
        "EMO: Earth Mover Distance Optimization for Auto-Regressive Language Modeling",
        "ot",
        "shiftkern.ot.emo_loss",
        ("tests/ot/test_emo_loss.py::test_demd_is_the_loop", "tests/ot/test_emo_loss.py::test_published_composition"),
        "code",
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
