# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Balancing without gradient: controllers that move the routers' buffers once per optimizer step."""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def update_expert_bias(model: nn.Module) -> None:
    """Moves every selection bias by `router_bias_update_rate` towards balance and starts a new count.

    `b_i += rate * sign(mean(load) - load_i)`, auxiliary-loss-free balancing (arXiv:2408.15664, algorithm 1). `load`
    is what the layer's router sent to expert i in training since the last call, over all micro-batches and all ranks.
    Call it once after every optimizer step; [`~modeling_moe.training.MoECallback`] does so in a `Trainer`. Does
    nothing for layers without a selection bias.

    Args:
        model: any model that holds sparse blocks, wrapped or not.
    """
    blocks: list[Any] = [m for m in model.modules() if getattr(m, "expert_load", None) is not None]
    if not blocks:
        return
    device = blocks[0].expert_load.device
    load = torch.stack([block.expert_load.to(device) for block in blocks])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(load)
    for block, counts in zip(blocks, load, strict=True):
        bias = block.gate.e_score_correction_bias
        bias += block.bias_update_rate * torch.sign(counts.mean() - counts).to(bias.device)
        block.expert_load.zero_()
