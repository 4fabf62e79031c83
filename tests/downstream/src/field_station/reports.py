"""A small language model for reports: attention by shiftkern, adapters by shiftkern or peft, merged per station."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from shiftkern import attention, merge, peft

WINDOW = 4


def windowed(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    """Attention to the last few tokens, in the form that transformers calls."""
    out = attention.sliding_window_attention(q, k, v, (WINDOW - 1, 0), scale=options.get("scaling"), enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("field_window", windowed)


def writer(implementation: str = "field_window", seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=29, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tune(model: nn.Module, tokens: Tensor, steps: int = 20, lr: float = 0.01) -> list[float]:
    """Train what is trainable; returns the losses."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def station(base: LlamaForCausalLM, config: peft.Config, tokens: Tensor) -> nn.Module:
    model: nn.Module = peft.inject(base, config)
    tune(model, tokens)
    return model


def one_of_all(base: dict[str, Tensor], stations: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = merge.ties(base, stations, density=0.5)
    return merged
