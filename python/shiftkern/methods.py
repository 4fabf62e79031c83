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
        15,
        "WiSE-FT",
        "Robust fine-tuning of zero-shot models",
        "merge",
        "shiftkern.merge.wise_ft",
        (
            "tests/merge/test_wise_ft.py::test_equals_the_line",
            "tests/merge/test_wise_ft.py::test_fisher_information_takes_the_place_of_the_coefficients",
        ),
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
        34,
        "Momentum-based Weight Interpolation",
        "Momentum-based Weight Interpolation of Strong Zero-Shot Models for Continual Learning",
        "merge",
        "shiftkern.merge.MomentumInterpolation",
        ("tests/merge/test_momentum_interpolation.py::test_equals_the_recurrence",),
        "paper",
        "partial",
    ),
    Method(
        50,
        "Rethinking Model Re-Basin",
        "Rethinking Model Re-Basin and Linear Mode Connectivity",
        "merge",
        "shiftkern.merge.renormalize",
        (
            "tests/merge/test_renormalize.py::test_statistics_on_the_data_are_the_goals",
            "tests/merge/test_renormalize.py::test_equals_the_formula_layer_by_layer",
        ),
        "paper",
        "works",
    ),
    Method(
        54,
        "TransNeXt",
        "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        "attention",
        "shiftkern.attention.aggregated_attention",
        ("tests/attention/test_aggregated_attention.py::test_equals_the_formula",),
        "code",
        "partial",  # aggregated attention; the channel mixer ConvGLU is not here
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
        71,
        "AdaMerging",
        "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        "merge",
        "shiftkern.merge.AdaMerging",
        (
            "tests/merge/test_ada_merging.py::test_gradient_is_that_of_autograd_through_the_sum",
            "tests/merge/test_ada_merging.py::test_adam_steps_written_out",
            "tests/merge/test_ada_merging.py::test_defaults_are_those_of_the_paper",
        ),
        "code",  # coefficients are clamped in the forward pass
        "works",
    ),
    Method(
        76,
        "Iso-C / Iso-CTS",
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "merge",
        "shiftkern.merge.iso_c",
        (
            "tests/merge/test_iso_c.py::test_equals_numpy",
            "tests/merge/test_iso_cts.py::test_equals_numpy",
        ),
        "paper",
        "works",
    ),
    Method(
        82,
        "MALMEN",
        "Massive Editing for Large Language Models via Meta Learning",
        "merge",
        "shiftkern.merge.edit_ridge",
        ("tests/merge/test_edit_ridge.py::test_equals_the_normal_equations",),
        "paper",
        "partial",
    ),
    Method(
        86,
        "WIDEN",
        "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement",
        "merge",
        "shiftkern.merge.widen",
        (
            "tests/merge/test_widen.py::test_equals_the_loops",
            "tests/merge/test_widen.py::test_scores_are_not_normalised",
        ),
        "code",  # scores are not normalised after they were overwritten
        "works",
    ),
    Method(
        89,
        "TCSR",
        "Incorporating Transformer Designs into Convolutions for Lightweight Image Super-Resolution",
        "attention",
        "shiftkern.attention.neighborhood",
        ("tests/attention/test_neighborhood.py::test_equals_the_definition",),
        "paper",
        "partial",  # neighborhood attention; the grouped shift of the network's FFN is not here
    ),
    Method(
        108,
        "ZeroI2V",
        "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video",
        "attention",
        "shiftkern.attention.shifted_heads",
        (
            "tests/attention/test_shifted_heads.py::test_equals_loops_over_channels",
            "tests/attention/test_shifted_heads.py::test_the_folded_layer_returns_what_both_layers_did",
        ),
        "code",
        "works",
    ),
    Method(
        117,
        "aTLAS",
        "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling",
        "merge",
        "shiftkern.merge.ATLAS",
        ("tests/merge/test_atlas.py::test_training_is_that_of_autograd_through_the_sum",),
        "paper",
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
        131,
        "Sens-Merging",
        "Sens-Merging: Sensitivity-Guided Parameter Balancing for Merging Large Language Models",
        "merge",
        "shiftkern.merge.sens_merging",
        ("tests/merge/test_sens_merging.py::test_formula_in_plain_loops",),
        "paper",
        "partial",
    ),
    Method(
        150,
        "GMT / FGMT",
        "Transferring Learning Trajectories of Neural Networks",
        "merge",
        "shiftkern.merge.transfer_trajectory",
        ("tests/merge/test_transfer_trajectory.py::test_equals_the_definition",),
        "code",
        "works",
    ),
    Method(
        155,
        "PCB-Merging",
        "Parameter Competition Balancing for Model Merging",
        "merge",
        "shiftkern.merge.pcb",
        ("tests/merge/test_pcb.py::test_equals_the_formula",),
        "paper",  # magnitudes are not clipped first
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
        171,
        "Delta editing",
        "A Unified View of Delta Parameter Editing in Post-Trained Large-Scale Models",
        "merge",
        "shiftkern.merge.delta_edit",
        (
            "tests/merge/test_delta_edit.py::test_dare_marks_what_is_dropped",
            "tests/merge/test_delta_edit.py::test_blocks_of_magnitudes",
            "tests/merge/test_delta_edit.py::test_first_directions",
            "tests/merge/test_bitdelta.py::test_equals_the_formula",
        ),
        "paper",
        "works",
    ),
    Method(
        186,
        "ComPEFT",
        "ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization",
        "merge",
        "shiftkern.merge.compeft_compress",
        ("tests/merge/test_compeft.py::test_equals_the_formula",),
        "paper",
        "works",
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
        244,
        "KV Shifting Attention",
        "KV Shifting Attention Enhances Language Modeling",
        "attention",
        "shiftkern.attention.kv_shift",
        (
            "tests/attention/test_kv_shift.py::test_equals_the_formula",
            "tests/attention/test_kv_shift.py::test_parts_have_the_bits_of_the_whole",
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
        254,
        "Poly-encoder",
        "Poly-encoders: Transformer Architectures and Pre-training Strategies for "
        "Fast and Accurate Multi-sentence Scoring",
        "attention",
        "shiftkern.attention.poly_encoder",
        ("tests/attention/test_poly_encoder.py::test_equals_loops",),
        "code",
        "works",
    ),
    Method(
        270,
        "CLAFusion",
        "On Cross-Layer Alignment for Model Fusion of Heterogeneous Neural Networks",
        "merge",
        "shiftkern.merge.cross_layer_alignment",
        (
            "tests/merge/test_cross_layer_alignment.py::test_equals_all_sequences",
            "tests/merge/test_layer_costs.py::test_cka",
            "tests/merge/test_pad_layers.py::test_network_computes_the_same",
        ),
        "code",
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
        282,
        "ARM-Net (ARMOR)",
        "ARM-Net: Adaptive Relation Modeling Network for Structured Data",
        "attention",
        "shiftkern.attention.arm_gate",
        ("tests/attention/test_arm_gate.py::test_equals_loops",),
        "paper",
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
        343,
        "BTX",
        "Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM",
        "merge",
        "shiftkern.merge.branch_train_mix",
        ("tests/merge/test_branch_train_mix.py::test_names_shapes_and_values",),
        "paper",
        "partial",
    ),
    Method(
        344,
        "Ptr-Net",
        "Pointer Networks",
        "attention",
        "shiftkern.attention.pointer",
        ("tests/attention/test_pointer.py::test_equals_loops",),
        "paper",
        "works",
    ),
    Method(
        354,
        "Git Re-Basin",
        "Git Re-Basin: Merging Models modulo Permutation Symmetries",
        "merge",
        "shiftkern.merge.weight_matching",
        (
            "tests/merge/test_weight_matching.py::test_equals_coordinate_descent_with_matrices",
            "tests/merge/test_weight_matching.py::test_planted_permutation_is_found",
        ),
        "paper",
        "works",
    ),
    Method(
        356,
        "BiPE",
        "Two Stones Hit One Bird: Bilevel Positional Encoding for Better Length Extrapolation",
        "attention",
        "shiftkern.attention.bilevel_positions",
        ("tests/attention/test_bilevel_positions.py::test_equals_a_scan",),
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
        369,
        "TGATE",
        "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models",
        "attention",
        "shiftkern.attention.GatedCache",
        ("tests/attention/test_gated_cache.py::test_any_schedule",),
        "code",
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
        385,
        "Mango",
        "Reusing Pretrained Models by Multi-linear Operators for Efficient Training",
        "merge",
        "shiftkern.merge.grow",
        ("tests/merge/test_grow.py::test_equals_the_full_map",),
        "paper",
        "works",
    ),
    Method(
        390,
        "Convergent Learning",
        "Convergent Learning: Do different neural networks learn the same representations?",
        "merge",
        "shiftkern.merge.activation_matching",
        (
            "tests/merge/test_activation_matching.py::test_correlations_and_matching",
            "tests/merge/test_sparse_prediction.py::test_equals_lasso",
        ),
        "paper",
        "works",
    ),
    Method(
        391,
        "Task Arithmetic",
        "Editing Models with Task Arithmetic",
        "merge",
        "shiftkern.merge.task_arithmetic",
        (
            "tests/merge/test_task_arithmetic.py::test_equals_the_sum",
            "tests/merge/test_task_arithmetic.py::test_analogies",
        ),
        "paper",
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
        401,
        "OT Fusion",
        "Model Fusion via Optimal Transport",
        "merge",
        "shiftkern.merge.otfusion",
        (
            "tests/merge/test_otfusion_layer.py::test_equals_the_formula",
            "tests/merge/test_otfusion.py::test_own_permutation_comes_back",
        ),
        "paper",
        "works",
    ),
    Method(
        422,
        "Concrete Subspace",
        "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion",
        "merge",
        "shiftkern.merge.ConcreteMerging",
        (
            "tests/merge/test_concrete.py::test_training_is_that_of_autograd_through_the_formula",
            "tests/merge/test_concrete.py::test_defaults_are_those_of_the_paper",
        ),
        "code",  # masks are rescaled by their mean
        "partial",
    ),
    Method(
        463,
        "XCiT (XCA)",
        "XCiT: Cross-Covariance Image Transformers",
        "attention",
        "shiftkern.attention.cross_covariance_attention",
        ("tests/attention/test_cross_covariance_attention.py::test_equals_loops_over_channels",),
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
        490,
        "CCAN",
        "Context-Aware Cross-Attention for Non-Autoregressive Translation",
        "attention",
        "shiftkern.attention.local_global_attention",
        ("tests/attention/test_local_global_attention.py::test_equals_loops_over_keys",),
        "code",
        "works",
    ),
    Method(
        511,
        "Re-ttention",
        "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape",
        "attention",
        "shiftkern.attention.Reattention",
        (
            "tests/attention/test_reattention.py::test_capture_is_what_it_says",
            "tests/attention/test_reattention.py::test_rho_grows_after_use",
            "tests/attention/test_reattention.py::test_each_step_is_what_is_due",
        ),
        "code",  # rho is not clamped
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
