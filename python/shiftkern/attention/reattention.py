"""Re-ttention: sparse attention whose statistics are those of full attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shiftkern._checks import flag, integer, number, one_of, positive, refuse, refuse_type
from shiftkern._ops import attention as _ops
from shiftkern.attention.block_mask import BlockMask
from shiftkern.attention.sparse_attention import arguments, check_heads, check_mask

__all__ = ["Reattention", "ReattentionProcessor", "ReattentionState", "reattention_capture", "reattention_step"]

_MODES = ("rho", "merge", "residual")
_ROWS = ("rho", "share", "lse_full", "lse_rest")
_OUTPUTS = ("rest", "difference")


@dataclass
class ReattentionState:
    """What a pass of full attention leaves for the sparse steps that follow.

    Made by :func:`reattention_capture`, for one mask and one shape of the queries.

    Attributes
    ----------
    rho, share : Tensor
        ``(B, H, N)``: share of the kept pairs in the sum of all, ``exp(lse_kept - lse_full)``, and of the others.
    lse_full, lse_rest : Tensor
        ``(B, H, N)``: log-sum-exp of all pairs, and of those that are not kept.
    rest : Tensor or None
        ``(B, H, N, D)``: attention over the pairs that are not kept. For the modes ``"rho"`` and ``"merge"``.
    difference : Tensor or None
        ``(B, H, N, D)``: ``out - sparse``. For the mode ``"residual"``.
    digest : str
        Digest of the mask.
    scale : float
        Factor of the scores.
    steps : int
        Sparse steps taken since.
    """

    rho: Tensor
    share: Tensor
    lse_full: Tensor
    lse_rest: Tensor
    rest: Tensor | None
    difference: Tensor | None
    digest: str
    scale: float
    steps: int = 0

    @property
    def lse_kept(self) -> Tensor:
        """Log-sum-exp of the kept pairs, ``(B, H, N)``."""
        return self.lse_full + self.rho.log()

    @property
    def complement(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of attention over the pairs that are not kept; 0 and ``-inf`` where there are none."""
        if self.rest is None:
            refuse("ReattentionState", "mode", "a capture for 'rho' or 'merge'", "one for 'residual' alone")
        return self.rest, self.lse_rest

    @property
    def residual(self) -> Tensor:
        """``out - rho * sparse``, what the pairs that are not kept contribute, ``(B, H, N, D)``."""
        out, _ = self.complement
        return (out * self.share[..., None]).to(out.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, digest and number of steps by name."""
        tensors = {name: value for name in (*_ROWS, *_OUTPUTS) if (value := getattr(self, name)) is not None}
        return {**tensors, "digest": self.digest, "scale": self.scale, "steps": self.steps}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ReattentionState:
        """Rebuild a state from :meth:`state_dict`; shapes are checked when it is used."""
        op = "ReattentionState.from_state_dict"
        if not isinstance(state, Mapping):
            refuse_type(op, "state", "a mapping from state_dict()", type(state).__name__)
        for name in (*_ROWS, "digest", "scale", "steps"):
            if name not in state:
                refuse(op, "state", f"an entry '{name}'", f"entries {sorted(map(str, state))}")
        tensors = {name: state.get(name) for name in (*_ROWS, *_OUTPUTS)}
        for name, value in tensors.items():
            if not isinstance(value, Tensor) and (value is not None or name in _ROWS):
                refuse_type(op, name, "a torch.Tensor", type(value).__name__)
        if not isinstance(state["digest"], str):
            refuse_type(op, "digest", "a str", type(state["digest"]).__name__)
        scale = number(op, "scale", state["scale"])
        return cls(**tensors, digest=state["digest"], scale=scale, steps=integer(op, "steps", state["steps"], 0))  # type: ignore[arg-type]

    def _check(self, op: str, mask: BlockMask, q: Tensor, v: Tensor, scale: float) -> None:
        if self.scale != scale:
            refuse(op, "scale", f"the scale of the capture, {self.scale}", scale)
        if self.digest != mask.digest:
            refuse(op, "mask", f"the mask of the capture, {self.digest}", f"another one, {mask.digest}")
        rows, wide = tuple(q.shape[:3]), (*q.shape[:3], v.shape[3])
        for name in (*_ROWS, *_OUTPUTS):
            value = getattr(self, name)
            shape = wide if name in _OUTPUTS else rows
            if value is not None and tuple(value.shape) != shape:
                refuse(op, "q", f"the shape of the capture, {name} {tuple(value.shape)}", f"q {tuple(q.shape)}")
            if value is not None and value.device != q.device:
                refuse(op, "q", f"the device of the capture, {value.device}", str(q.device))
        kept = self.difference if self.rest is None else self.rest
        if kept is not None and kept.dtype != q.dtype:
            refuse_type(op, "q", f"the dtype of the capture, {kept.dtype}", str(q.dtype))


def reattention_capture(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    mode: str | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, ReattentionState]:
    """Full attention, and the state that lets :func:`reattention_step` stand in for it with the kept pairs alone.

    Per row, ``rho = exp(lse_kept - lse_full)`` and ``residual = out - rho * sparse``.

    Parameters
    ----------
    q, k, v : Tensor
        ``(B, H, N, D)``, ``(B, H, M, D)`` and ``(B, H, M, Dv)`` of one float dtype, in any layout whose last axis is
        dense.
    mask : BlockMask
        Pairs that the steps will keep.
    mode : {"rho", "merge", "residual"}, optional
        Keep only what this mode of the step needs: a third less memory.
    scale : float, optional
        Factor of the scores, ``1 / sqrt(D)`` by default.
    enable_gqa : bool
        Whether ``k`` and ``v`` may have fewer heads, each for several heads of ``q``.

    Returns
    -------
    out : Tensor
        ``(B, H, N, Dv)``: attention over **all** pairs.
    state : ReattentionState
        For :func:`reattention_step`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Shapes, dtypes or devices that do not belong together, a mask of other tokens, or an unknown mode.
    NotDifferentiableError
        When a gradient is asked for.

    Notes
    -----
    Both sums in one call, O(N M D) time and O(N D) memory: about the time of dense attention for masks of blocks and
    windows, up to twice that where single pairs are scattered, as keys that part of a panel of queries keeps are seen
    twice.

    References
    ----------
    Chen et al.: Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape (2025).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import BlockMask, reattention_capture, reattention_step
    >>> q, k, v = torch.randn(3, 1, 2, 256, 32).unbind()
    >>> mask = BlockMask.sliding_window(256, 256, 16, 16, block=(32, 32))
    >>> full, state = reattention_capture(q, k, v, mask)
    >>> again = reattention_step(q, k, v, mask, state, ramp=0.0)
    >>> torch.allclose(again, full, atol=1e-5)
    True
    """
    op = "reattention_capture"
    check_heads(op, q, k, v, enable_gqa)
    check_mask(op, mask, q, k)
    wanted = None if mode is None else one_of(op, "mode", mode, _MODES)
    for_rest, for_difference = wanted != "residual", wanted in (None, "residual")
    spread = arguments(op, mask, q, scale)
    out, rho, share, lse_full, lse_rest, rest, difference = _ops.reattention_capture(
        q, k, v, for_rest, for_difference, *spread
    )
    kept = rest if for_rest else None, difference if for_difference else None
    return out, ReattentionState(rho, share, lse_full, lse_rest, *kept, digest=mask.digest, scale=spread[-1])


def reattention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    state: ReattentionState,
    *,
    ramp: float = 0.04,
    mode: str = "rho",
    clamp: float | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention over the kept pairs, reshaped by the statistics of the last full pass.

    - ``"rho"`` (Re-ttention): ``rho * sparse + residual``, with ``rho`` raised by ``ramp`` after every step.
    - ``"residual"`` (DiTFastAttn): ``sparse + difference``, the case of ``rho = 1``.
    - ``"merge"`` (this library's): the kept pairs of now and the others of then, merged by their log-sum-exps. Weights
      always sum to one, and nothing needs a ramp.

    Parameters
    ----------
    q, k, v : Tensor
        As in :func:`reattention_capture`, of the shapes it saw.
    mask : BlockMask
        The mask of the capture; another one is an error.
    state : ReattentionState
        Its ``steps`` are counted up in place.
    ramp : float
        What ``rho`` grows by from step to step; the first one after a capture uses ``rho`` as captured. Used by mode
        ``"rho"`` alone.
    mode : {"rho", "merge", "residual"}
        As above.
    clamp : float, optional
        Upper bound of the raised ``rho``; by default there is none, as in the authors' code.
    scale, enable_gqa
        As in :func:`reattention_capture`.

    Returns
    -------
    Tensor
        ``(B, H, N, Dv)``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A mask, shape, dtype or device other than the capture's, a state without what the mode needs, or bad numbers.
    NotDifferentiableError
        When a gradient is asked for.

    Notes
    -----
    O(kept pairs * D), in one pass: nothing but the output is written.

    References
    ----------
    Chen et al.: Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape (2025). Yuan et al.:
    DiTFastAttn: Attention Compression for Diffusion Transformer Models (2024).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import BlockMask, reattention_capture, reattention_step
    >>> q, k, v = torch.randn(3, 1, 2, 32, 8)
    >>> mask = BlockMask.sliding_window(32, 32, 4, 4)
    >>> full, state = reattention_capture(q, k, v, mask)
    >>> again = reattention_step(q, k, v, mask, state, mode="merge")
    >>> bool(torch.allclose(again, full, atol=1e-5))  # the same tokens as in the full pass
    True
    """
    op = "reattention_step"
    check_heads(op, q, k, v, enable_gqa)
    check_mask(op, mask, q, k)
    if not isinstance(state, ReattentionState):
        refuse_type(op, "state", "a ReattentionState from reattention_capture", type(state).__name__)
    spread = arguments(op, mask, q, scale)
    state._check(op, mask, q, v, spread[-1])
    one_of(op, "mode", mode, _MODES)
    ramp = number(op, "ramp", ramp)
    bound = None if clamp is None else positive(op, "clamp", clamp)
    carried = state.difference if mode == "residual" else state.rest
    if carried is None:
        refuse(op, "state", f"a capture for mode {mode!r}", "one for another mode")
    rho = share = lse_rest = None
    if mode == "rho":
        rho = state.rho + ramp * state.steps if ramp and state.steps else state.rho
        if bound is not None:
            rho = rho.clamp(max=min(bound, torch.finfo(rho.dtype).max))
        share = state.share
    elif mode == "merge":
        lse_rest = state.lse_rest
    out: Tensor = _ops.reattention_step(q, k, v, carried, rho, share, lse_rest, *spread)
    state.steps += 1
    return out


class Reattention(nn.Module):
    """Attention for one layer of a diffusion model: full at first and now and then, sparse in between.

    Step ``s`` of a prompt, counted from 0, is full for ``s < full_steps`` and whenever ``s - full_steps`` is a multiple
    of ``refresh_every``; the last full step before a sparse one captures the statistics that
    :func:`reattention_step` then uses. One object serves one layer, and each call is one sampling step.

    Parameters
    ----------
    mask : BlockMask
        Pairs that sparse steps keep. The paper keeps 3 to 6 % in a static window.
    full_steps : int
        Full steps at the beginning of a prompt, at least 1: the paper has 5 of 20, and 10 or 15 of 50.
    refresh_every : int or None
        Steps from one capture to the next; ``None`` for never again.
    ramp, mode, clamp, scale, enable_gqa
        As in :func:`reattention_step`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Numbers out of range, an unknown mode, or no mask. Calls raise as :func:`reattention_step` does.

    Notes
    -----
    The state belongs to a prompt, so it is not part of ``state_dict``. Call :meth:`reset` before each prompt.

    References
    ----------
    Chen et al.: Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape (2025).

    Examples
    --------
    >>> import torch
    >>> from shiftkern.attention import BlockMask, Reattention
    >>> mask = BlockMask.sliding_window(256, 256, 16, 16, block=(32, 32))
    >>> attention = Reattention(mask, full_steps=2, refresh_every=3)
    >>> q, k, v = torch.randn(3, 1, 2, 256, 32).unbind()
    >>> for step in range(6):
    ...     full = attention.is_full(step)
    ...     out = attention(q, k, v)
    ...     print(step, "full" if full else "sparse")
    0 full
    1 full
    2 full
    3 sparse
    4 sparse
    5 full
    """

    def __init__(
        self,
        mask: BlockMask,
        *,
        full_steps: int = 5,
        refresh_every: int | None = 5,
        ramp: float = 0.04,
        mode: str = "rho",
        clamp: float | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        super().__init__()
        op = "Reattention"
        if not isinstance(mask, BlockMask):
            refuse_type(op, "mask", "a BlockMask", type(mask).__name__)
        self.mask = mask
        self.full_steps = integer(op, "full_steps", full_steps, 1)
        self.refresh_every = None if refresh_every is None else integer(op, "refresh_every", refresh_every, 1)
        self.ramp = number(op, "ramp", ramp)
        self.mode = one_of(op, "mode", mode, _MODES)
        self.clamp = None if clamp is None else positive(op, "clamp", clamp)
        self.scale = None if scale is None else number(op, "scale", scale)
        self.enable_gqa = flag(op, "enable_gqa", enable_gqa)
        self.step = 0
        self.state: ReattentionState | None = None

    def extra_repr(self) -> str:
        """Return what the module prints of itself."""
        schedule = f"full_steps={self.full_steps}, refresh_every={self.refresh_every}"
        return f"{self.mask!r}, {schedule}, ramp={self.ramp}, mode={self.mode!r}"

    def reset(self) -> None:
        """Begin a new prompt."""
        self.step, self.state = 0, None

    def is_full(self, step: int) -> bool:
        """Whether a step, counted from 0, attends to all pairs."""
        after = step - self.full_steps
        return after < 0 or (self.refresh_every is not None and after % self.refresh_every == 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, in the way that is due at this step, ``(B, H, N, D)`` in and out."""
        common: dict[str, Any] = {"scale": self.scale, "enable_gqa": self.enable_gqa}
        if not self.is_full(self.step):
            if self.state is None:
                refuse("Reattention", "step", "a captured state (call reset() before a prompt)", "none")
            out = reattention_step(
                q, k, v, self.mask, self.state, ramp=self.ramp, mode=self.mode, clamp=self.clamp, **common
            )
        elif self.is_full(self.step + 1):
            check_heads("Reattention", q, k, v, self.enable_gqa)
            check_mask("Reattention", self.mask, q, k)
            out = scaled_dot_product_attention(q, k, v, **common)
        else:
            out, self.state = reattention_capture(q, k, v, self.mask, mode=self.mode, **common)
        self.step += 1
        return out


class ReattentionProcessor:
    """A :class:`Reattention` in the place of the attention processor of a diffusers-style attention module.

    Follows the protocol of ``diffusers.models.attention_processor.Attention``: projections ``to_q``, ``to_k``,
    ``to_v`` and ``to_out``, number of ``heads``, and whatever norms the module has. Cross-attention, and
    self-attention with an attention mask, cannot be sparse by a block mask; they raise.

    Parameters
    ----------
    attention : Reattention
        One for each module: it holds the module's state.

    Raises
    ------
    ArgumentTypeError
        No :class:`Reattention`. A call raises :class:`ArgumentError` for cross-attention or a mask.

    Examples
    --------
    A transformer's self-attention blocks get one each::

        processors = [ReattentionProcessor(Reattention(mask)) for _ in transformer.transformer_blocks]
        for block, processor in zip(transformer.transformer_blocks, processors):
            block.attn1.set_processor(processor)
        ...
        for processor in processors:  # before each prompt
            processor.attention.reset()
    """

    def __init__(self, attention: Reattention) -> None:
        if not isinstance(attention, Reattention):
            refuse_type("ReattentionProcessor", "attention", "a Reattention", type(attention).__name__)
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        """Run the module's self-attention, ``(B, N, C)`` or ``(B, C, height, width)`` in and out."""
        op = "ReattentionProcessor"
        for name, value in (("encoder_hidden_states", encoder_hidden_states), ("attention_mask", attention_mask)):
            if value is not None:
                refuse(op, name, "None: only self-attention over all tokens", f"shape {tuple(value.shape)}")
        # Rotary embeddings and the like would be left out silently. `scale` is that of adapters, which act in the
        # projections; diffusers' own processors leave it alone, too.
        for name, value in (("image_rotary_emb", image_rotary_emb), *others.items()):
            if value is not None:
                refuse(op, name, "None: this processor knows no such argument", type(value).__name__)
        residual, picture = hidden_states, hidden_states.shape if hidden_states.dim() == 4 else None
        if getattr(attn, "spatial_norm", None) is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if picture is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if getattr(attn, "group_norm", None) is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            projection(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if getattr(attn, "norm_q", None) is not None:
            q = attn.norm_q(q)
        if getattr(attn, "norm_k", None) is not None:
            k = attn.norm_k(k)
        # Norms may compute in a wider type than projections, as under autocast.
        out = self.attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2).to(hidden_states.dtype)
        for layer in attn.to_out:
            out = layer(out)
        if picture is not None:
            out = out.transpose(1, 2).reshape(picture)
        if getattr(attn, "residual_connection", False):
            out = out + residual
        result: Tensor = out / getattr(attn, "rescale_output_factor", 1.0)
        return result
