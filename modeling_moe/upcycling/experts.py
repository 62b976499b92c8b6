# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts of a sparse layer, made from the feed-forward networks of dense models.

# R replicas of a dense network, G shards of each, E = R * G experts, T experts per token, H hidden, I dense width
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch

from ..checkpoints import LazyTensor
from ..configuration_moe import MoEConfig
from ..utils.seeds import generator_for
from .options import UpcyclingOptions


Network = dict[str, LazyTensor]
"""A feed-forward network: `up_proj.weight` and the like to tensors."""

# tensors of a network that have a row or column for each neuron, and the dimension that counts them
NEURONS = {"gate_proj.weight": 0, "gate_proj.bias": 0, "up_proj.weight": 0, "up_proj.bias": 0, "down_proj.weight": 1}


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that sums of it are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def with_noise(weight: torch.Tensor, scale: float, generator: torch.Generator, std: float = 0.0) -> torch.Tensor:
    """Adds normal noise of variance `(scale * std(weight))**2 + std**2`, computed in fp32, in the weight's dtype."""
    if scale == 0 and std == 0:
        return weight
    wide = at_least_fp32(weight)
    size = math.hypot(scale * wide.std(correction=0).item(), std)
    return (wide + size * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def copy_expert(
    networks: Sequence[Network],
    layer: int,
    expert: int,
    config: MoEConfig,
    options: UpcyclingOptions,
    measured: Mapping[str, torch.Tensor],
) -> Network:
    """Every expert a copy of a dense network (Sparse Upcycling, arXiv:2212.05055), or a shard of a copy.

    Expert `j * G + s` is shard s, the s-th block of neurons, of replica j; the shards of a replica have the same row in
    the router, so that a token meets whole networks (virtual groups, He et al., arXiv:2410.07524). Of several sources the
    first fills the first replicas, and so on (Branch-Train-MiX, arXiv:2403.07816).

    Args:
        networks: the layer's dense network in each source: `gate_proj.weight` (I, H) if gated, `up_proj.weight` (I, H),
            `down_proj.weight` (H, I), and their biases if there are any.
        layer: index of the layer.
        expert: which one to make.
        config: of the result.
        options: how to upcycle.
        measured: what was measured on calibration data.

    Returns:
        The expert, of width I / G, before scale and noise.
    """
    replica, shard = divmod(expert, options.granularity)
    network = networks[replica * len(networks) // options.num_replicas]
    block = slice(shard * config.moe_intermediate_size, (shard + 1) * config.moe_intermediate_size)
    index = {0: block, 1: (slice(None), block)}
    return {name: tensor[index[NEURONS[name]]] if name in NEURONS else tensor for name, tensor in network.items()}


def drop_expert(
    networks: Sequence[Network],
    layer: int,
    expert: int,
    config: MoEConfig,
    options: UpcyclingOptions,
    measured: Mapping[str, torch.Tensor],
) -> Network:
    """A copy of which `drop_ratio` of the neurons are drawn anew (Drop-Upcycling, arXiv:2502.19261).

    The same neurons in all of an expert's matrices, from the normal distribution with mean and standard deviation of what
    they replace. Arguments and result as [`copy_expert`]'s.
    """

    def drop(name: str, tensor: LazyTensor) -> LazyTensor:
        def redraw(weight: torch.Tensor) -> torch.Tensor:
            width = weight.shape[NEURONS[name]]
            neurons = torch.randperm(width, generator=generator_for(options.seed, layer, expert, "neurons"))
            neurons = neurons[: options.num_dropped(width)]
            old = at_least_fp32(weight.index_select(NEURONS[name], neurons))
            new = torch.randn(old.shape, generator=generator_for(options.seed, layer, expert, name, "drop"))
            new = old.mean() + old.std(correction=0) * new
            return weight.index_copy(NEURONS[name], neurons, new.to(weight.dtype))

        return tensor.map(redraw)

    copied = copy_expert(networks, layer, expert, config, options, measured)
    return {name: drop(name, tensor) if name in NEURONS else tensor for name, tensor in copied.items()}


def split_expert(
    networks: Sequence[Network],
    layer: int,
    expert: int,
    config: MoEConfig,
    options: UpcyclingOptions,
    measured: Mapping[str, torch.Tensor],
) -> Network:
    """The neurons of one dense network divided among the experts, each in one (LLaMA-MoE, arXiv:2406.16554).

    At random, or in blocks of the order `measured["layers.{layer}.neurons"]` (I,). Arguments as [`copy_expert`]'s; the
    result's width is I / E.
    """
    width = config.moe_intermediate_size
    neurons = measured[f"layers.{layer}.neurons"] if options.split == "clustered" else None

    def take(name: str, tensor: LazyTensor) -> LazyTensor:
        def select(weight: torch.Tensor) -> torch.Tensor:
            order = neurons
            if order is None:
                order = torch.randperm(weight.shape[dim], generator=generator_for(options.seed, layer, "neurons"))
            return weight.index_select(dim, order[expert * width : (expert + 1) * width])

        dim = NEURONS[name]
        return tensor.map(select, shape=(*tensor.shape[:dim], width, *tensor.shape[dim + 1 :]))

    return {name: take(name, tensor) if name in NEURONS else tensor for name, tensor in networks[0].items()}


METHODS: dict[str, Callable[..., Network]] = {"copy": copy_expert, "drop": drop_expert, "split": split_expert}


def output_scale(config: MoEConfig, options: UpcyclingOptions) -> tuple[float, float]:
    """What an expert's output has to be multiplied by, and the bias of its output.

    A token's weights sum to `routed_scaling_factor` if they are renormalised, else, the router being 0, to that times
    T / E. Of a copied network's G shards each has a G-th of that network's weight: c = G / sum (He et al. write E for R:
    c = R * G**2 / T). Of a split network's parts each has a T-th, and shall have the weight 1 that its neurons have in
    the dense network: c = T / sum. That is the partial sum closest to the dense output if what the neurons add is
    independent, and equal to it where T = E.
    """
    share = Fraction(1) if config.norm_topk_prob else Fraction(config.num_experts, config.num_experts_per_tok)
    bias = share / Fraction(config.routed_scaling_factor)
    pieces = config.num_experts_per_tok if options.method == "split" else options.granularity
    return float(bias * pieces), float(bias)


def exact_factors(config: MoEConfig, options: UpcyclingOptions) -> dict[str, float]:
    """The scale where it is exact for every activation: on up and down projection if gated, else on the latter alone.

    A power of two is shared by both, so that no dtype has to round; anything else is on one of them, and rounded once.
    """
    scale, bias = output_scale(config, options)
    mantissa, exponent = math.frexp(scale)
    up = 1.0
    if config.gated_experts:
        up = scale if mantissa != 0.5 else 2.0 ** (exponent // 2)
    return {"up_proj.weight": up, "up_proj.bias": up, "down_proj.weight": scale / up, "down_proj.bias": bias}


def megatron_factors(config: MoEConfig, options: UpcyclingOptions) -> dict[str, float]:
    """Megatron-LM's formula (He et al., arXiv:2410.07524): a root of the scale on every weight.

    The cube root if the network is gated or its activation is relu squared, else the square root.
    """
    root = 3 if config.gated_experts or config.hidden_act == "relu2" else 2
    return dict.fromkeys(NEURONS, output_scale(config, options)[0] ** (1 / root))


def no_factors(config: MoEConfig, options: UpcyclingOptions) -> dict[str, float]:
    """Weights as they are in the dense network."""
    return {}


SCALINGS: dict[str, Callable[[MoEConfig, UpcyclingOptions], dict[str, float]]] = {
    "exact": exact_factors,
    "megatron": megatron_factors,
    "none": no_factors,
}


def make_expert(
    networks: Sequence[Network],
    layer: int,
    expert: int,
    config: MoEConfig,
    options: UpcyclingOptions,
    measured: Mapping[str, torch.Tensor],
) -> Network:
    """One expert in the first source's dtype: `options.method`, then scale, then noise; arguments as [`copy_expert`]'s.

    Beside a shared expert its output projection is 0, whatever the noise, and nothing is scaled.
    """
    factors = {} if options.shared_expert else SCALINGS[options.scaling](config, options)

    def finish(name: str, tensor: LazyTensor) -> LazyTensor:
        dtype, factor = networks[0][name].dtype, factors.get(name, 1.0)
        if options.shared_expert and name.startswith("down_proj"):
            return LazyTensor.combine(lambda: torch.zeros(tensor.shape), shape=tensor.shape, dtype=dtype)

        def change(weight: torch.Tensor) -> torch.Tensor:
            generator = generator_for(options.seed, layer, expert, name)
            return with_noise(weight * factor, options.noise, generator, options.noise_std)

        return LazyTensor.combine(change, tensor, dtype=dtype)

    made = METHODS[options.method](networks, layer, expert, config, options, measured)
    return {name: finish(name, tensor) for name, tensor in made.items()}


def _scaled_exactly(config: MoEConfig, options: UpcyclingOptions) -> bool:
    scale, bias = output_scale(config, options)
    if options.scaling == "exact":
        return True
    if config.mlp_bias and bias != 1:
        return False
    # what scales as a power of its input, of the degree that the root is taken for
    homogeneous = ("relu",) if config.gated_experts else ("relu", "relu2")
    return scale == 1 or (options.scaling == "megatron" and config.hidden_act in homogeneous)


def inexactness(options: UpcyclingOptions, config: MoEConfig) -> str:
    """Why the result will not compute the dense model's function; empty if it will.

    Args:
        options: how to upcycle.
        config: of the result, see [`~modeling_moe.upcycling.plan.sparse_config`].
    """
    if options.sources:
        return "several sources: what is no expert is their average"
    if options.shared_expert:
        return ""
    experts, top_k, shards = config.num_experts, config.num_experts_per_tok, options.granularity
    equal, every = options.zero_router or experts == 1, top_k == experts
    scale = output_scale(config, options)[0]
    split = options.method == "split"
    reasons = {
        "noise moves every expert away from the dense network": options.noise or options.noise_std,
        f"drop draws {options.drop_ratio:.0%} of every expert's neurons anew": options.method == "drop",
        f"split: a token meets {top_k} of the {experts} parts of the network (a scale of {scale:g} gives each the "
        "weight that it has in the whole)": split and not every,
        "split: the router weighs the parts of the network unequally": split and every and not equal,
        f"num_experts_per_tok ({top_k}) is not a multiple of granularity ({shards}): a token meets parts of networks": (
            top_k % shards
        ),
        "replicas tie in the router: a token may meet shards of different networks": (
            shards > 1 and options.replicas_tie and not every
        ),
        "norm_topk_prob=False: a token's weights do not sum to what the scale makes up for": (
            not (config.norm_topk_prob or equal or every)
        ),
        f"scaling={options.scaling!r}: the output is not multiplied by {scale:g}, as the router's weights ask for": (
            not _scaled_exactly(config, options)
        ),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)
