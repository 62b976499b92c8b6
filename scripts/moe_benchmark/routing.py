# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Which tokens go to which experts, made up: evenly, unevenly, and as badly as can be.

# T tokens, E experts, K experts per token. Each returns (T, K) int64, distinct experts in a row.
"""

from collections.abc import Callable

import torch

from .presets import Preset


def _balanced(tokens: int, preset: Preset, generator: torch.Generator) -> torch.Tensor:
    """Loads that differ by one at most, in an order that no kernel can profit from."""
    slots = torch.arange(tokens * preset.per_token).view(tokens, preset.per_token) % preset.experts
    names = torch.randperm(preset.experts, generator=generator)
    return names[slots][torch.randperm(tokens, generator=generator)]


def _zipf(tokens: int, preset: Preset, generator: torch.Generator) -> torch.Tensor:
    """K draws without replacement from p(e) ~ 1 / (e + 1)."""
    odds = 1 / torch.arange(1, preset.experts + 1, dtype=torch.float32)
    return torch.multinomial(odds.expand(tokens, -1), preset.per_token, generator=generator)


def _all_to_one(tokens: int, preset: Preset, generator: torch.Generator) -> torch.Tensor:
    """Every token's k-th choice is expert k, its first one expert 0: a token cannot take an expert twice."""
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
        tokens: T.
        preset: gives E and K.
        seed: of the experts' draw and of the weights.

    Returns:
        Expert ids (T, K) int64 and positive weights (T, K) fp32 whose rows sum to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    index = ROUTINGS[routing](tokens, preset, generator)
    weight = torch.randn(tokens, preset.per_token, generator=generator).softmax(dim=-1)
    return index, weight
