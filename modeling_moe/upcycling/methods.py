# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The weights of a sparse layer, made from those of a dense one.

# E experts, H hidden, I width of the dense network and of each expert
"""

import hashlib
from collections.abc import Callable

import torch

from ..configuration_moe import MoEConfig
from ..modeling_moe import MoEForCausalLM
from .options import UpcyclingOptions


Weights = dict[str, torch.Tensor]


def generator_for(seed: int, *path: object) -> torch.Generator:
    """A generator of its own for each (layer, expert), so that none depends on the order of the work."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def with_noise(weight: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """`weight + scale * std(weight) * N(0, 1)`, computed in fp32, in the weight's dtype."""
    if scale == 0:
        return weight
    noise = torch.randn(weight.shape, generator=generator)
    return (weight.float() + scale * weight.float().std() * noise).to(weight.dtype)


def copy_experts(mlp: Weights, layer: int, config: MoEConfig, options: UpcyclingOptions) -> Weights:
    """Every expert a copy of the dense network (Sparse Upcycling, arXiv:2212.05055).

    With `norm_topk_prob` the result is the dense network exactly, whatever the router says.

    Args:
        mlp: the dense network: `gate_proj.weight` (I, H) if gated, `up_proj.weight` (I, H), `down_proj.weight` (H, I),
            and their biases if there are any.
        layer: index of the layer.
        config: of the result.
        options: noise, shared expert and seed.

    Returns:
        Weights of the block but for its router, under the block's names.
    """
    up_parts = ["gate_proj", "up_proj"] if config.gated_experts else ["up_proj"]
    fused = "gate_up_proj" if config.gated_experts else "up_proj"
    experts: Weights = {}
    for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
        suffix = "_bias" if kind == "bias" else ""
        for target, parts in ((fused, up_parts), ("down_proj", ["down_proj"])):
            dense = torch.cat([mlp[f"{part}.{kind}"] for part in parts])
            if options.shared_expert and target == "down_proj":
                dense = torch.zeros_like(dense)
            stack = dense.new_empty(config.num_experts, *dense.shape)
            for expert in range(config.num_experts):
                stack[expert] = with_noise(
                    dense, options.noise, generator_for(options.seed, layer, expert, target, kind)
                )
            experts[f"experts.{target}{suffix}"] = stack
    if options.shared_expert:
        experts |= {f"shared_experts.{name}": weight for name, weight in mlp.items()}
    return experts


METHODS: dict[str, Callable[[Weights, int, MoEConfig, UpcyclingOptions], Weights]] = {"copy": copy_experts}


def upcycle(dense: MoEForCausalLM, config: MoEConfig, options: UpcyclingOptions) -> MoEForCausalLM:
    """Makes every layer of a model sparse.

    Args:
        dense: a MoE model whose layers are all dense, see [`~modeling_moe.conversion.to_moe`].
        config: of the result, see [`make_plan`].
        options: how to upcycle.

    Returns:
        In evaluation mode; all weights but the experts and routers are shared with `dense`.
    """
    weights: Weights = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(dense.model.layers):
        block = METHODS[options.method](layer.mlp.state_dict(), index, config, options)
        router = torch.randn(
            config.num_experts, config.hidden_size, generator=generator_for(options.seed, index, "router")
        )
        block["gate.weight"] = (options.router_std * router).to(dense.dtype)
        weights |= {f"model.layers.{index}.mlp.{name}": tensor for name, tensor in block.items()}
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    model.model.rotary_emb = dense.model.rotary_emb
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = dense.generation_config
    return model.eval()
