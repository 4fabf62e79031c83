"""Losses of test-time adaptation: unsupervised functions of logits.

All of them take logits of shape (N, K) or (N, K, *spatial) with the classes in dimension 1.
"""

from __future__ import annotations

from torch import Tensor

from shiftkern import _checks
from shiftkern.errors import ArgumentError


def check_logits(op: str, name: str, logits: object) -> Tensor:
    """Return `logits` if it is a floating-point tensor (N, K, ...), raise otherwise."""
    logits = _checks.tensor(op, name, logits)
    if logits.dim() < 2 or logits.numel() == 0:
        expected = "a non-empty tensor of shape (N, K) or (N, K, *spatial)"
        raise ArgumentError(f"{op}: argument '{name}': expected {expected}, got shape {tuple(logits.shape)}")
    return logits


def softmax_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of the softmax of each sample, in nats.

    Parameters
    ----------
    logits : Tensor
        Shape (N, K) or (N, K, \*spatial), floating point.

    Returns
    -------
    Tensor
        Shape (N,): one value per sample; for dense predictions the mean over the positions.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Not a non-empty floating-point tensor with at least two dimensions.

    Examples
    --------
    >>> import torch
    >>> from shiftkern.tta import softmax_entropy
    >>> softmax_entropy(torch.zeros(1, 4)).exp()
    tensor([4.])
    """
    log_p = check_logits("softmax_entropy", "logits", logits).log_softmax(1)
    return _per_sample(-(log_p.exp() * log_p).sum(1))


def symmetric_cross_entropy(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Symmetric cross-entropy between two predictions, one value per sample.

    With p the softmax of `logits` and q the softmax of `teacher_logits`:
    ``-1/2 sum_c q_c log p_c - 1/2 sum_c p_c log q_c``. Differentiable in both arguments; detach the teacher when it
    is not trained.

    Parameters
    ----------
    logits, teacher_logits : Tensor
        Equal shapes (N, K) or (N, K, \*spatial), floating point.

    Returns
    -------
    Tensor
        Shape (N,): one value per sample; for dense predictions the mean over the positions.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Not floating-point tensors, fewer than two dimensions, empty, or different shapes.

    References
    ----------
    Robust Mean Teacher for Continual and Gradual Test-Time Adaptation (Döbler et al., CVPR 2023).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.tta import symmetric_cross_entropy
    >>> symmetric_cross_entropy(torch.zeros(2, 4), torch.zeros(2, 4)).exp()
    tensor([4., 4.])
    """
    op = "symmetric_cross_entropy"
    check_logits(op, "logits", logits)
    check_logits(op, "teacher_logits", teacher_logits)
    if logits.shape != teacher_logits.shape:
        expected, got = tuple(logits.shape), tuple(teacher_logits.shape)
        raise ArgumentError(f"{op}: argument 'teacher_logits': expected shape {expected} as logits, got {got}")
    log_p, log_q = logits.log_softmax(1), teacher_logits.log_softmax(1)
    return _per_sample(-0.5 * (log_q.exp() * log_p + log_p.exp() * log_q).sum(1))


def class_correlation_loss(logits: Tensor) -> Tensor:
    r"""Core loss of alpha-BN (251): mean off-diagonal correlation between the classes' softmax outputs.

    With P the (M, K) matrix of softmax outputs, M counting samples and positions, the class correlation matrix is
    ``R = P^T P / M`` and the loss the mean of its K (K - 1) off-diagonal entries. It is zero exactly when every
    prediction is one-hot and largest, ``1 / K^2``, when every prediction is uniform. The paper was not at hand: this
    is the formula of the catalogue.

    Parameters
    ----------
    logits : Tensor
        Shape (N, K) or (N, K, \*spatial) with K >= 2, floating point.

    Returns
    -------
    Tensor
        Shape (): the loss of the batch. Differentiable.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Not a non-empty floating-point tensor with at least two dimensions and two classes.

    Notes
    -----
    The sum of all entries of R is 1, so the off-diagonal mean needs the trace alone: O(M K), no (K, K) matrix.

    References
    ----------
    Test-time Batch Statistics Calibration for Covariate Shift (You, Li, Zhao, 2021).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.tta import class_correlation_loss
    >>> class_correlation_loss(torch.zeros(3, 2))
    tensor(0.2500)
    """
    op = "class_correlation_loss"
    p = check_logits(op, "logits", logits).softmax(1)
    classes = p.shape[1]
    if classes < 2:
        raise ArgumentError(f"{op}: argument 'logits': expected at least 2 classes in dimension 1, got {classes}")
    # sum_{j != k} p_j p_k = sum_j p_j (1 - p_j): no cancellation for confident predictions.
    return (p * (1 - p)).sum(1).mean() / (classes * (classes - 1))


def _per_sample(values: Tensor) -> Tensor:
    return values if values.dim() == 1 else values.flatten(1).mean(1)
