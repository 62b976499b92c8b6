# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module counts the parameters of any Mixture of Experts in transformers that a token does not use.

# E experts, K experts per token
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .layers import count_experts, experts_modules


# names of K in transformers' configurations
TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


def experts_per_token(config: PreTrainedConfig) -> int | None:
    """Returns the number K of experts of a network that a token is sent to; None if no field says so, or layers differ."""
    text: Any = config.get_text_config()
    found = next((value for name in TOP_K_NAMES if (value := getattr(text, name, None)) is not None), None)
    if isinstance(found, list) and len(set(map(str, found))) == 1:
        found = found[0]
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def idle_parameters(experts: nn.Module, top_k: int) -> float:
    """Returns the number of parameters of a layer's experts that a token does not use.

    Args:
        experts: the E experts of a network, or of attention, which know themselves how many of their matrices a token uses.
        top_k: number of experts of a network that a token is sent to.
    """
    size = sum(parameter.numel() for parameter in experts.parameters(recurse=False))
    used = getattr(experts, "matrices_per_tok", top_k)
    return size * max(0.0, 1 - used / count_experts(experts))


def active_parameters(config: Any, experts: Sequence[nn.Module], total: int) -> int | None:
    """Returns the number of a model's parameters that a token uses: all but those of routed experts it is not sent to.

    Args:
        config: the model's configuration.
        experts: the modules of routed experts, one for each sparse layer that can be reached.
        total: number of all parameters.

    Returns:
        The number; None if the configuration does not name K, or no sparse layer can be reached.
    """
    if hasattr(config, "num_active_params"):
        # the routers of this package's model decide how many experts a token uses, whatever the head is
        return total - (config.num_params() - config.num_active_params())
    top_k = experts_per_token(config)
    if not experts:
        return total if top_k is None else None
    return None if top_k is None else round(total - sum(idle_parameters(module, top_k) for module in experts))


def embedding_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the embeddings of tokens and positions, and the language-model head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [module for module in (*tables, model.get_output_embeddings()) if module is not None]


def active_share(model: Any) -> float:
    """Returns the share of a model's parameters, without embeddings, that one token uses.

    Args:
        model: any model of transformers, with or without an adapter.

    Returns:
        A number in (0, 1]; 1.0 for a dense model, and for a configuration that does not name K.
    """
    top_k = experts_per_token(model.config)
    if top_k is None:
        return 1.0
    idle = sum(idle_parameters(module, top_k) for module in experts_modules(model))
    return 1 - idle / max(1, model.num_parameters(exclude_embeddings=True))
