# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts FLOPs, by which the experiments give all arms equal compute."""

from modeling_moe.configuration_moe import MoEConfig


def flops_per_token(config: MoEConfig, length: int) -> float:
    """Returns the FLOPs of a token, forward and backward: 6 for each parameter it uses, routers among them, and
    attention within `length`.
    """
    params = config.num_active_params()
    if not config.tie_word_embeddings:
        # embeddings are looked up, not multiplied
        params -= config.vocab_size * config.hidden_size
    # scores and values over half of the sequence on average: 2 products of 2 FLOPs, times 3 with the backward pass
    width = config.num_attention_heads * config.head_dim
    return 6 * params + 12 * config.num_hidden_layers * width * length / 2
