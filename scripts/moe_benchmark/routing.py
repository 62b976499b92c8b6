# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes artificial routings: balanced, skewed, and all to one expert.

# T tokens, E experts, K experts per token. Each function returns (T, K) int64 with distinct experts in a row.
"""

from collections.abc import Callable

import torch

from .presets import Preset


def _balanced(tokens: int, preset: Preset, generator: torch.Generator) -> torch.Tensor:
    """Returns expert ids whose loads differ by at most one, in an order that no kernel can exploit."""
    slots = torch.arange(tokens * preset.per_token).view(tokens, preset.per_token) % preset.experts
    names = torch.randperm(preset.experts, generator=generator)
    return names[slots][torch.randperm(tokens, generator=generator)]


def _zipf(tokens: int, preset: Preset, generator: torch.Generator) -> torch.Tensor:
    """Returns K expert ids per token, drawn without replacement from p(e) ~ 1 / (e + 1)."""
    odds = 1 / torch.arange(1, preset.experts + 1, dtype=torch.float32)
    return torch.multinomial(odds.expand(tokens, -1), preset.per_token, generator=generator)


def _all_to_one(tokens: int, preset: Preset, generator: torch.Generator) -> torch.Tensor:
    """Returns expert k as every token's k-th choice, so that expert 0 is the first choice of all tokens."""
    return torch.arange(preset.per_token).repeat(tokens, 1)


ROUTINGS: dict[str, Callable[[int, Preset, torch.Generator], torch.Tensor]] = {
    "balanced": _balanced,
    "zipf": _zipf,
    "all_to_one": _all_to_one,
}


def route(routing: str, tokens: int, preset: Preset, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes a routing on the CPU.

    Args:
        routing: key of `ROUTINGS`.
        tokens: number of tokens T.
        preset: shape with E and K.
        seed: seed of the choices and of the routing weights.

    Returns:
        Expert ids (T, K) int64, and positive routing weights (T, K) fp32 whose rows sum to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    index = ROUTINGS[routing](tokens, preset, generator)
    weight = torch.randn(tokens, preset.per_token, generator=generator).softmax(dim=-1)
    return index, weight
