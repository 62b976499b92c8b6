# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the experts of a sparse layer from the feed-forward networks of dense models.

# R replicas of a dense network, G shards of each, E = R * G experts, K experts per token, H hidden, I dense width
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch

from ..checkpoints import LazyTensor
from ..configuration_moe import MoEConfig
from .options import UpcyclingOptions
from .request import LayerRequest, Network


# tensors of a network that have a row or column for each neuron, and the dimension of the neurons
NEURONS = {"gate_proj.weight": 0, "gate_proj.bias": 0, "up_proj.weight": 0, "up_proj.bias": 0, "down_proj.weight": 1}


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in fp32, or unchanged if its dtype is wider; sums are computed in this dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def with_noise(weight: torch.Tensor, scale: float, generator: torch.Generator, std: float = 0.0) -> torch.Tensor:
    """Returns the weight plus normal noise of variance `(scale * std(weight))**2 + std**2`.

    The sum is computed in fp32 and returned in the weight's dtype.
    """
    if scale == 0 and std == 0:
        return weight
    wide = at_least_fp32(weight)
    size = math.hypot(scale * wide.std(correction=0).item(), std)
    return (wide + size * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def copy_expert(request: LayerRequest, expert: int) -> Network:
    """Returns a copy of a dense network (Sparse Upcycling, arXiv:2212.05055), or a shard of a copy.

    Expert `j * G + s` is shard s, the s-th block of neurons, of replica j. The shards of a replica have one row in the
    router, so that a token is sent to whole networks (virtual groups, He et al., arXiv:2410.07524). With several
    sources the first source fills the first replicas, the second source the next ones (Branch-Train-MiX,
    arXiv:2403.07816).

    Returns:
        The expert, of width I / G, before scale and noise.
    """
    networks, options, width = request.networks, request.options, request.config.moe_intermediate_size
    replica, shard = divmod(expert, options.granularity)
    network = networks[replica * len(networks) // options.num_replicas]
    block = slice(shard * width, (shard + 1) * width)
    index = {0: block, 1: (slice(None), block)}
    return {name: tensor[index[NEURONS[name]]] if name in NEURONS else tensor for name, tensor in network.items()}


def drop_expert(request: LayerRequest, expert: int) -> Network:
    """Returns a copy in which a share `drop_ratio` of the neurons is drawn anew (Drop-Upcycling, arXiv:2502.19261).

    The neurons are the same ones in all of an expert's matrices. New values come from a normal distribution with the
    mean and standard deviation of the values that they replace.
    """
    options = request.options

    def drop(name: str, tensor: LazyTensor) -> LazyTensor:
        def redraw(weight: torch.Tensor) -> torch.Tensor:
            width = weight.shape[NEURONS[name]]
            neurons = torch.randperm(width, generator=request.generator(expert, "neurons"))
            neurons = neurons[: options.num_dropped(width)]
            old = at_least_fp32(weight.index_select(NEURONS[name], neurons))
            new = torch.randn(old.shape, generator=request.generator(expert, name, "drop"))
            new = old.mean() + old.std(correction=0) * new
            return weight.index_copy(NEURONS[name], neurons, new.to(weight.dtype))

        return tensor.map(redraw)

    copied = copy_expert(request, expert)
    return {name: drop(name, tensor) if name in NEURONS else tensor for name, tensor in copied.items()}


def split_expert(request: LayerRequest, expert: int) -> Network:
    """Returns a part of a dense network, whose neurons are divided among the experts (LLaMA-MoE, arXiv:2406.16554).

    The neurons are divided at random, or in equal blocks of [`LayerRequest.neuron_order`].

    Returns:
        The expert, of width I / E, before scale and noise.
    """
    width = request.config.moe_intermediate_size
    measured = request.neuron_order if request.options.split == "clustered" else None

    def take(name: str, tensor: LazyTensor) -> LazyTensor:
        def select(weight: torch.Tensor) -> torch.Tensor:
            order = measured
            if order is None:
                order = torch.randperm(weight.shape[dim], generator=request.generator("neurons"))
            return weight.index_select(dim, order[expert * width : (expert + 1) * width])

        dim = NEURONS[name]
        return tensor.map(select, shape=(*tensor.shape[:dim], width, *tensor.shape[dim + 1 :]))

    return {name: take(name, tensor) if name in NEURONS else tensor for name, tensor in request.networks[0].items()}


# method -> function from the layer's request and an expert id to that expert
METHODS: dict[str, Callable[[LayerRequest, int], Network]] = {
    "copy": copy_expert,
    "drop": drop_expert,
    "split": split_expert,
}


def output_scale(config: MoEConfig, options: UpcyclingOptions) -> tuple[float, float]:
    """Returns the factor on an expert's output that restores the dense output, and the factor on its output bias.

    The routing weights of a token sum to `routed_scaling_factor` if they are renormalised; otherwise, with a router of
    zeros, to that times K / E. Each of the G shards of a copied network has a G-th of the network's weight, so that c
    = G / sum (He et al. write E for R: c = R * G**2 / K). Each part of a split network has a K-th, and shall have the
    weight 1 of its neurons in the dense network: c = K / sum. That is the partial sum closest to the dense output if
    the contributions of the neurons are independent, and equals it where K = E.
    """
    share = Fraction(1) if config.norm_topk_prob else Fraction(config.num_experts, config.num_experts_per_tok)
    bias = share / Fraction(config.routed_scaling_factor)
    pieces = config.num_experts_per_tok if options.method == "split" else options.granularity
    return float(bias * pieces), float(bias)


def exact_factors(config: MoEConfig, options: UpcyclingOptions) -> dict[str, float]:
    """Returns a factor for each tensor that scales the output exactly, whatever the activation.

    The scale is on the up and down projection if the network is gated, else on the down projection alone. Both share a
    power of two, so that no dtype has to round; any other scale is on one of them, and is rounded once.
    """
    scale, bias = output_scale(config, options)
    mantissa, exponent = math.frexp(scale)
    up = 1.0
    if config.gated_experts:
        up = scale if mantissa != 0.5 else 2.0 ** (exponent // 2)
    return {"up_proj.weight": up, "up_proj.bias": up, "down_proj.weight": scale / up, "down_proj.bias": bias}


def megatron_factors(config: MoEConfig, options: UpcyclingOptions) -> dict[str, float]:
    """Returns Megatron-LM's factors (He et al., arXiv:2410.07524): a root of the scale on every weight.

    The root is the cube root if the network is gated or its activation is the squared ReLU, else the square root.
    """
    root = 3 if config.gated_experts or config.hidden_act == "relu2" else 2
    return dict.fromkeys(NEURONS, output_scale(config, options)[0] ** (1 / root))


def no_factors(config: MoEConfig, options: UpcyclingOptions) -> dict[str, float]:
    """Returns no factors: the weights remain those of the dense network."""
    return {}


# scaling -> function that returns the factor of each tensor; a tensor without an entry is not scaled
SCALINGS: dict[str, Callable[[MoEConfig, UpcyclingOptions], dict[str, float]]] = {
    "exact": exact_factors,
    "megatron": megatron_factors,
    "none": no_factors,
}


def make_expert(request: LayerRequest, expert: int) -> Network:
    """Returns an expert in the first source's dtype: made by `options.method`, then scaled, then with noise.

    Beside a shared expert the output projection is 0 whatever the noise, and nothing is scaled.
    """
    options, networks = request.options, request.networks
    factors = {} if options.shared_expert else SCALINGS[options.scaling](request.config, options)

    def finish(name: str, tensor: LazyTensor) -> LazyTensor:
        dtype, factor = networks[0][name].dtype, factors.get(name, 1.0)
        if options.shared_expert and name.startswith("down_proj"):
            return LazyTensor.combine(lambda: torch.zeros(tensor.shape), shape=tensor.shape, dtype=dtype)

        def change(weight: torch.Tensor) -> torch.Tensor:
            return with_noise(weight * factor, options.noise, request.generator(expert, name), options.noise_std)

        return LazyTensor.combine(change, tensor, dtype=dtype)

    made = METHODS[options.method](request, expert)
    return {name: finish(name, tensor) for name, tensor in made.items()}


def _scaled_exactly(config: MoEConfig, options: UpcyclingOptions) -> bool:
    scale, bias = output_scale(config, options)
    if options.scaling == "exact":
        return True
    if config.mlp_bias and bias != 1:
        return False
    # activations under which a factor c on every weight multiplies the output by c to the power of the root's degree
    homogeneous = ("relu",) if config.gated_experts else ("relu", "relu2")
    return scale == 1 or (options.scaling == "megatron" and config.hidden_act in homogeneous)


def reason_not_exact(options: UpcyclingOptions, config: MoEConfig) -> str | None:
    """Returns why the result will not compute the dense model's function, or None if it will.

    Args:
        options: how to upcycle.
        config: configuration of the result, see [`~modeling_moe.upcycling.plan.sparse_config`].
    """
    if options.sources:
        return "several sources: every tensor outside the experts is an average of the sources"
    reasons = {}
    if "sparse" in config.mlp_layer_types and not options.shared_expert:
        reasons = _reasons_of_networks(options, config)
    noisy = options.attention_experts and (options.noise or options.noise_std)
    reasons["noise moves every expert of attention away from the dense attention"] = noisy
    return "; ".join(reason for reason, holds in reasons.items() if holds) or None


def _reasons_of_networks(options: UpcyclingOptions, config: MoEConfig) -> dict[str, object]:
    """Returns why the experts of feed-forward networks would not compute the dense network: reason -> whether it holds."""
    experts, top_k, shards = config.num_experts, config.num_experts_per_tok, options.granularity
    equal, every = options.zero_router or experts == 1, top_k == experts
    scale = output_scale(config, options)[0]
    split = options.method == "split"
    return {
        "noise moves every expert away from the dense network": options.noise or options.noise_std,
        f"drop draws {options.drop_ratio:.0%} of every expert's neurons anew": options.method == "drop",
        f"split: a token is sent to {top_k} of the {experts} parts of the network (a scale of {scale:g} gives each part "
        "the weight that it has in the whole network)": split and not every,
        "split: the router weighs the parts of the network unequally": split and every and not equal,
        f"num_experts_per_tok ({top_k}) is not a multiple of granularity ({shards}): a token is sent to parts of "
        "networks": top_k % shards,
        "replicas tie in the router: a token may be sent to shards of different networks": (
            shards > 1 and options.replicas_tie and not every
        ),
        "norm_topk_prob=False: a token's routing weights do not have the sum that the scale assumes": (
            not (config.norm_topk_prob or equal or every)
        ),
        f"scaling={options.scaling!r}: the output is not multiplied by {scale:g}, which the routing weights require": (
            not _scaled_exactly(config, options)
        ),
    }
