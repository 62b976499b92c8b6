# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module assembles a sparse checkpoint from dense ones; a tensor is read only when the result is written."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from ..checkpoints import LazyTensor, State
from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from .attention import BIASES, EXPERTS, attention_expert
from .experts import at_least_fp32, make_expert
from .options import UpcyclingOptions
from .request import LayerRequest, Network, Part
from .router_init import router_weight


# beginning of the names of the tensors of one part of a layer
PART = re.compile(r"model\.layers\.(\d+)\.(mlp|self_attn)\.")
# fields in which sources may differ, because the function that the weights compute does not depend on them
FREE_FIELDS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "resid_pdrop",
    "transformers_version",
    "use_cache",
}


def refuse_mismatch(configs: Sequence[MoEConfig], names: Sequence[str]) -> None:
    """Refuses sources of different architectures.

    Args:
        configs: configurations of the dense sources as `MoEConfig`, the first source first.
        names: a name for each source, for the message.

    Raises:
        UserError: if a source differs from the first one; the message names the source and the field.
    """
    first = configs[0].to_dict()
    for config, name in zip(configs[1:], names[1:], strict=True):
        other = config.to_dict()
        for field in sorted((first.keys() | other.keys()) - FREE_FIELDS):
            if first.get(field) != other.get(field):
                raise UserError(
                    f"{field} is {other.get(field)!r} in {name} and {first.get(field)!r} in {names[0]}: sources must be of "
                    "one architecture"
                )


def refuse_different_tensors(sources: Sequence[State], names: Sequence[str]) -> None:
    """Refuses checkpoints that differ in the names or shapes of their tensors.

    Args:
        sources: checkpoints under this package's names.
        names: a name for each source after the first, for the message.

    Raises:
        UserError: if a source differs from the first one; the message names the tensor and the source.
    """
    for source, name in zip(sources[1:], names, strict=True):
        for tensor in sorted(sources[0].keys() ^ source.keys()):
            raise UserError(
                f"{tensor} is in {'the first source' if tensor in sources[0] else name} alone: all must have it"
            )
        for tensor, expected in sources[0].items():
            if source[tensor].shape != expected.shape:
                raise UserError(
                    f"{tensor} has shape {source[tensor].shape} in {name} and {expected.shape} in the first source: sources "
                    "must be of one architecture"
                )


def average(tensors: Sequence[LazyTensor], weights: Sequence[float] | None = None) -> LazyTensor:
    """Returns the weighted sum of tensors in the dtype of the first one, computed in fp32; without weights, the mean."""
    if len(tensors) == 1:
        return tensors[0]
    shares = weights or [1 / len(tensors)] * len(tensors)

    def weigh(*read: torch.Tensor) -> torch.Tensor:
        total = shares[0] * at_least_fp32(read[0])
        for share, tensor in zip(shares[1:], read[1:], strict=True):
            total += share * at_least_fp32(tensor)
        return total

    return LazyTensor.combine(weigh, *tensors)


def _on_disk(experts: Sequence[Network]) -> State:
    """Returns the experts under their names on disk.

    Experts that servers cannot run (ungated, or with biases) are fused, see `modeling_moe.checkpoint_layout`.
    """
    fused = ("up_proj",) if "gate_proj.weight" not in experts[0] else ()
    state: State = {}
    for index, expert in enumerate(experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            if f"{name}.weight" in expert and name not in fused:
                state[f"experts.{index}.{name}.weight"] = expert[f"{name}.weight"]
    for name in fused:
        state[f"experts.{name}"] = LazyTensor.stack([expert[f"{name}.weight"] for expert in experts])
    if "up_proj.bias" in experts[0]:
        parts, name = (["up_proj"], "up_proj") if fused else (["gate_proj", "up_proj"], "gate_up_proj")
        biases = [LazyTensor.cat([expert[f"{part}.bias"] for part in parts]) for expert in experts]
        state[f"experts.{name}_bias"] = LazyTensor.stack(biases)
        state["experts.down_proj_bias"] = LazyTensor.stack([expert["down_proj.bias"] for expert in experts])
    return state


def sparse_block(request: LayerRequest) -> State:
    """Returns router, experts and shared expert of a layer, under the names that the block gives them."""
    config, options, networks = request.config, request.options, request.networks
    experts = [make_expert(request, expert) for expert in range(config.num_experts)]
    block = {"gate.weight": router_weight(request)} | _on_disk(experts)
    if options.shared_expert:
        for name in networks[0]:
            block[f"shared_experts.{name}"] = average([network[name] for network in networks], options.source_weights)
    return block


def attention_block(request: LayerRequest) -> State:
    """Returns router, experts and shared tensors of a layer's attention, under the names that attention gives them."""
    options, networks = request.options, request.networks
    block: State = {"gate.weight": router_weight(request)}
    for expert in range(options.num_experts):
        tensors = attention_expert(request, expert)
        block |= {f"experts.{expert}.{name}": tensor for name, tensor in tensors.items()}
    for name in networks[0]:
        if name not in EXPERTS:
            shared = average([network[name] for network in networks], options.source_weights)
            block[BIASES.get(name, name)] = shared
    return block


def _request(
    prefix: str,
    sources: Sequence[State],
    config: MoEConfig,
    options: UpcyclingOptions,
    measured: Mapping[str, torch.Tensor],
) -> LayerRequest | None:
    """Returns the request for the part of a layer whose tensors begin with `prefix`; None if the part stays dense."""
    match = PART.match(prefix)
    if match is None:
        return None
    layer, part = int(match[1]), match[2]
    if not (options.attention_experts if part == "self_attn" else config.mlp_layer_types[layer] == "sparse"):
        return None
    names = [key for key in sources[0] if key.startswith(prefix)]
    networks = [{key.removeprefix(prefix): source[key] for key in names} for source in sources]
    if part == "self_attn":
        return LayerRequest(networks, layer, config, options.for_attention(), measured, "self_attn")
    return LayerRequest(networks, layer, config, options, measured)


# part of a layer -> function that makes its tensors
BLOCKS: dict[Part, Callable[[LayerRequest], State]] = {"mlp": sparse_block, "self_attn": attention_block}


def assemble(
    sources: Sequence[State], config: MoEConfig, options: UpcyclingOptions, measured: Mapping[str, torch.Tensor]
) -> State:
    """Assembles a sparse checkpoint from dense ones; no weight is read.

    Args:
        sources: dense checkpoints of one architecture under this package's names: the first one, then
            `options.sources`.
        config: configuration of the result, see [`~modeling_moe.upcycling.plan.sparse_config`]; its `mlp_layer_types`
            says which layers become sparse.
        options: how to upcycle.
        measured: tensors measured on calibration data. For routers that are not random, `layers.{i}.router` (R, H), and
            `layers.{i}.attention_router` (R, H) of attention experts; for `split="clustered"`, `layers.{i}.neurons` (I,)
            int64, an order in which the neurons of an expert are adjacent.

    Returns:
        The checkpoint with the names and shapes of a checkpoint on disk, in the first source's dtypes, the routers in
        `config.dtype`. All tensors outside experts and routers are averages of the sources.

    Raises:
        UserError: if the sources differ in the names or shapes of their tensors.
    """
    refuse_different_tensors(sources, options.sources or [])
    prefixes = dict.fromkeys(match.group() for name in sources[0] if (match := PART.match(name)))
    made = {prefix: _request(prefix, sources, config, options, measured) for prefix in prefixes}
    state: State = {}
    for name in sources[0]:
        match = PART.match(name)
        request = made[match.group()] if match is not None else None
        if match is None or request is None:
            state[name] = average([source[name] for source in sources], options.source_weights)
        elif f"{match.group()}gate.weight" not in state:
            block = BLOCKS[request.part](request)
            state |= {f"{match.group()}{key}": tensor for key, tensor in block.items()}
    return state
