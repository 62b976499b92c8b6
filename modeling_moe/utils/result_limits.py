# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A result that is too large to be meant is refused by arithmetic, before anything is built that grows with it."""

import torch

from ..configuration_moe import MoEConfig
from .errors import UserError
from .sizes import size_text


LARGEST = 10**15
MOST_EXPERTS = 100_000


def refuse_vast(config: MoEConfig, dtype: torch.dtype) -> None:
    """Refuses the result of a slip in the number of experts.

    Args:
        config: of the result.
        dtype: of its weights.

    Raises:
        UserError: if the weights take more than a petabyte, or all layers together have more than 100,000 experts, each
            of which is three tensors in the checkpoint.
    """
    if (nbytes := config.num_params() * dtype.itemsize) > LARGEST:
        raise UserError(f"the result would take {size_text(nbytes)}, more than a petabyte: ask for fewer experts")
    experts = (config.num_hidden_layers - len(config.mlp_only_layers)) * config.num_experts
    if experts > MOST_EXPERTS:
        raise UserError(
            f"num_experts is {config.num_experts:,}, {experts:,} in all layers: at most {MOST_EXPERTS:,} can be written"
        )
