# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module runs a source model on text to initialise routers and to group neurons that are active together.

# D domains, N tokens sampled, H hidden, I intermediate, E experts, G granularity, R = E / G replicas of the dense
network
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_moe import MoEConfig
from ..data import token_ids
from ..utils.errors import UserError
from ..utils.seeds import generator_for
from .clustering import balanced_clusters, kmeans
from .options import UpcyclingOptions
from .request import Part, Place, place_generator, rows_of_router


# tokens of a block, which the model reads on its own
BLOCK_LENGTH = 512
# share of the neurons that count as active for a token
ACTIVE_SHARE = 0.1
# names of the modules that are one part of each layer, in any model
NAMES: dict[Part, re.Pattern[str]] = {
    "mlp": re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.mlp$"),
    "self_attn": re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(?:self_attn|attn|attention)$"),
}
KINDS: dict[Part, str] = {"mlp": "feed-forward networks", "self_attn": "attention"}
# part -> the options that give its number of replicas
COUNTED: dict[Part, str] = {"mlp": "num_experts / granularity", "self_attn": "attention_experts"}
DOWN_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h")


@dataclass
class LayerInputs:
    """Holds statistics of the inputs of a layer's feed-forward network, or of its attention.

    Attributes:
        means: (D, H) fp64, mean input of each domain; all domains have the same number of tokens.
        sample: (N, H) fp32, inputs drawn from all domains.
        gram: (H, H) fp64, sum of x xᵀ over all inputs x; None unless requested.
        active: (N, I) bool, whether a neuron is active for a token of `sample`: one of the tenth of the neurons with
            the largest magnitude at the input of the down projection; None unless requested.
    """

    means: torch.Tensor
    sample: torch.Tensor
    gram: torch.Tensor | None = None
    active: torch.Tensor | None = None


class _Recorder:
    """Records the inputs of one part of a layer with forward hooks.

    Attributes:
        domain: domain of the block that the model reads next.
        drawn: (S - 1,) bool, which tokens of that block are sampled, the first token excluded.
    """

    def __init__(self, num_domains: int, gram: bool):
        self.num_domains, self.wants_gram = num_domains, gram
        self.domain, self.drawn = 0, torch.zeros(0, dtype=torch.bool)
        self.sums: torch.Tensor | None = None
        self.gram: torch.Tensor | None = None
        self.sample: list[torch.Tensor] = []
        self.active: list[torch.Tensor] = []

    def see_input(self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Adds the input (1, S, H), the first argument or `hidden_states`, without the first token."""
        states = (args[0] if args else kwargs["hidden_states"])[0, 1:].detach()
        self.sample.append(states[self.drawn.to(states.device)].float().cpu())
        states = states.double()
        if self.sums is None:
            hidden = states.shape[-1]
            self.sums = states.new_zeros(self.num_domains, hidden)
            self.gram = states.new_zeros(hidden, hidden) if self.wants_gram else None
        self.sums[self.domain] += states.sum(dim=0)
        if self.gram is not None:
            self.gram += states.T @ states

    def see_neurons(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Adds the down projection's input (1, S, I), without the first token."""
        neurons = args[0][0, 1:].detach()
        neurons = neurons[self.drawn.to(neurons.device)].abs()
        top = neurons.topk(max(1, round(ACTIVE_SHARE * neurons.shape[-1])), dim=-1).indices
        self.active.append(torch.zeros_like(neurons, dtype=torch.bool).scatter(1, top, True).cpu())

    def inputs(self, tokens: int) -> LayerInputs:
        """Returns the statistics of everything recorded; `tokens` is the number of tokens of each domain."""
        if self.sums is None:
            raise RuntimeError("a part of a layer was not called: the model skips one of its layers.")
        gram = None if self.gram is None else self.gram.cpu()
        active = torch.cat(self.active) if self.active else None
        return LayerInputs(self.sums.cpu() / tokens, torch.cat(self.sample), gram, active)


def parts_of_layers(model: PreTrainedModel, part: Part) -> dict[int, nn.Module]:
    """Returns the feed-forward network of each layer, dense or sparse, or the attention of each layer.

    Raises:
        UserError: if the model does not name these modules as the supported families do.
    """
    found = {int(m[1]): module for name, module in model.named_modules() if (m := NAMES[part].search(name))}
    if len(found) != model.config.num_hidden_layers:
        raise UserError(
            f"calibration_data cannot be used with this {model.config.model_type} model: it has {KINDS[part]} under "
            f"{len(found)} of its {model.config.num_hidden_layers} layers; choose router_init random and split random"
        )
    return found


def _down_projection(network: nn.Module, layer: int) -> nn.Module:
    for name in DOWN_PROJECTIONS:
        if isinstance(found := getattr(network, name, None), nn.Module):
            return found
    raise UserError(f"split 'clustered' needs a dense network in layer {layer} of the source: choose split random")


class _Block(NamedTuple):
    """Holds tokens that the model reads in one pass: their domain, their ids (S,), and which are sampled (S - 1,)."""

    domain: int
    ids: torch.Tensor
    drawn: torch.Tensor


def _cut_blocks(ids: list[torch.Tensor], length: int, seed: int, samples: int) -> list[_Block]:
    """Cuts the token ids of each domain into blocks, and draws `samples` tokens, at most all, from all blocks."""
    blocks = [(domain, block) for domain, tokens in enumerate(ids) for block in tokens.split(length)]
    sizes = [len(block) - 1 for _, block in blocks]
    order = torch.randperm(sum(sizes), generator=generator_for(seed, "sample"))
    drawn = torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, order[:samples], True).split(sizes)
    return [_Block(domain, block, chosen) for (domain, block), chosen in zip(blocks, drawn, strict=True)]


def _run_blocks(model: PreTrainedModel, blocks: list[_Block], recorders: Collection[_Recorder]) -> None:
    for block in tqdm(blocks, desc="calibrating"):
        for recorder in recorders:
            recorder.domain, recorder.drawn = block.domain, block.drawn
        model.base_model(input_ids=block.ids[None].to(model.device), use_cache=False)


@torch.no_grad()
def collect_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: dict[str, datasets.Dataset],
    tokens_per_domain: int,
    places: Sequence[Place],
    seed: int,
    samples: int = 2048,
    gram: bool = False,
    neurons: bool = False,
) -> dict[Place, LayerInputs]:
    """Runs a model on text and collects statistics of the inputs of its feed-forward networks, and of its attention.

    The text is cut into blocks, and the model reads each block on its own. The first token of a block is left out of
    all statistics: it attends to nothing but itself, and its state is often an outlier.

    Args:
        model: a causal LM, dense or sparse, in evaluation mode, on the device to run on.
        tokenizer: tokenizer of the model.
        domains: documents of each domain, see [`~modeling_moe.data.calibration_text.load_domains`].
        tokens_per_domain: number of tokens read of each domain.
        places: what to record.
        seed: seed of the sample.
        samples: number of tokens, over all domains, whose inputs are kept, the same tokens in all layers; all tokens
            if there are fewer. They take `samples * H` floats a layer.
        gram: also sum x xᵀ, in `H * H` doubles a layer.
        neurons: also record which neurons of the feed-forward networks are active.

    Returns:
        Statistics by place, on the CPU.

    Raises:
        UserError: if a domain has too few tokens, or the modules to record are not found.
    """
    if tokens_per_domain < 2:
        raise UserError(f"calibration_tokens is {tokens_per_domain}: it must be at least 2")
    modules = {part: parts_of_layers(model, part) for part in dict(places)}
    recorders, hooks = {place: _Recorder(len(domains), gram) for place in places}, []
    length = min(BLOCK_LENGTH, getattr(model.config, "max_position_embeddings", BLOCK_LENGTH))
    ids = [token_ids(documents, tokenizer, tokens_per_domain, name) for name, documents in domains.items()]
    blocks = _cut_blocks(ids, length, seed, samples)
    try:
        for (part, layer), recorder in recorders.items():
            module = modules[part][layer]
            hooks.append(module.register_forward_pre_hook(recorder.see_input, with_kwargs=True))
            if neurons and part == "mlp":
                down = _down_projection(module, layer)
                hooks.append(down.register_forward_pre_hook(recorder.see_neurons))
        _run_blocks(model, blocks, recorders.values())
    finally:
        for hook in hooks:
            hook.remove()
    recorded = sum(len(block.drawn) for block in blocks) // len(domains)
    return {place: recorder.inputs(recorded) for place, recorder in recorders.items()}


def _for_replicas(domain_rows: torch.Tensor, place: Place, options: UpcyclingOptions) -> torch.Tensor:
    """Returns rows (R, H) from those of the domains (D, H); noise separates the replicas of one domain."""
    rows = domain_rows.repeat_interleave(options.num_replicas // len(domain_rows), dim=0)
    if len(rows) == len(domain_rows):
        return rows
    noise = torch.randn(rows.shape, generator=place_generator(options.seed, place, "router"), dtype=rows.dtype)
    return rows + options.router_std * rows.std() * noise


def text_rows(inputs: LayerInputs, place: Place, options: UpcyclingOptions) -> torch.Tensor:
    """Returns the direction of each domain's mean input, minus the mean over domains, which shifts all logits alike.

    The length of the mean is dropped: without a bias, a domain with a longer mean would attract the tokens of others.
    """
    directions = nn.functional.normalize(inputs.means)
    return _for_replicas(directions - directions.mean(dim=0), place, options)


def ridge_rows(inputs: LayerInputs, place: Place, options: UpcyclingOptions) -> torch.Tensor:
    """Returns the ridge regression of the one-hot, centred domain on the input (DUME, arXiv:2603.29765).

    The rows are `(XᵀX + lambda * trace(XᵀX) / H * I)⁻¹ XᵀY` with `lambda = ridge_lambda`. All domains have the same
    number of tokens, so that XᵀY is that number times the centred means; the factor is omitted, because rows are
    scaled later.
    """
    gram = inputs.gram
    if gram is None:
        raise ValueError("ridge_rows needs the Gram matrix: collect the inputs with gram=True.")
    centred = inputs.means - inputs.means.mean(dim=0)
    ridge = options.ridge_lambda * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return _for_replicas(torch.linalg.solve(gram + ridge, centred.T).T, place, options)


def kmeans_rows(inputs: LayerInputs, place: Place, options: UpcyclingOptions) -> torch.Tensor:
    """Returns the centroids of spherical k-means on the inputs, minus the mean of the centroids.

    The nearest centroid has the largest logit: distance on the sphere is a function of the dot product, and neither
    the length of a token nor a vector that is subtracted from all rows changes which logit is the largest.
    """
    replicas = options.num_replicas
    if len(inputs.sample) < replicas:
        raise UserError(
            f"calibration_tokens is {options.calibration_tokens}: {len(inputs.sample)} inputs do not make {replicas} "
            "k-means clusters; raise it"
        )
    centroids = kmeans(inputs.sample, replicas, place_generator(options.seed, place, "router"))
    return centroids - centroids.mean(dim=0)


# router_init -> function that returns rows (R, H) of a layer, at any scale
MEASURED_ROUTERS: dict[str, Callable[[LayerInputs, Place, UpcyclingOptions], torch.Tensor]] = {
    "text": text_rows,
    "kmeans": kmeans_rows,
    "ridge": ridge_rows,
}


def logit_std(rows: torch.Tensor, states: torch.Tensor) -> float:
    """Returns the standard deviation of a token's router logits, averaged over tokens.

    Args:
        rows: rows of the router (R, H), in any float dtype.
        states: inputs of the router (N, H) fp32.
    """
    return (states @ rows.float().T).std(dim=1, correction=0).mean().item()


def group_neurons(active: torch.Tensor, groups: int, generator: torch.Generator) -> torch.Tensor:
    """Returns a permutation (I,) int64 of the neurons; each block of I / `groups` neurons tends to be active together.

    The similarity of two neurons is the correlation of their activity over the tokens; balanced k-means groups them.

    Args:
        active: (N, I) bool, whether each neuron is active for each token.
        groups: number of groups, a divisor of I.
        generator: source of the random numbers.
    """
    activity = active.T.float()
    clusters = balanced_clusters(activity - activity.mean(dim=1, keepdim=True), groups, generator)
    return clusters.argsort(stable=True)


def _check_domains(num_domains: int, options: UpcyclingOptions, counted: str) -> None:
    if options.router_init in ("text", "ridge") and (num_domains < 2 or options.num_replicas % num_domains):
        raise UserError(
            f"calibration_data has {num_domains} domain(s), but router_init {options.router_init!r} needs at least 2, of "
            f"which {counted} ({options.num_replicas}) is a multiple: change one of them"
        )


def _scaled_rows(inputs: LayerInputs, place: Place, options: UpcyclingOptions) -> torch.Tensor:
    """Returns router rows (R, H) fp32 whose logits have the standard deviation `router_logit_std`."""
    rows = MEASURED_ROUTERS[options.router_init](inputs, place, options).float()
    if not (std := logit_std(rows, inputs.sample)) > 0:
        raise UserError(
            f"router_init {options.router_init!r} finds no difference between domains or clusters in layer {place[1]}: give "
            "calibration_data whose domains differ, and at least 2 replicas (num_experts / granularity, or attention_experts)"
        )
    return rows * (options.router_logit_std / std)


def _places(config: MoEConfig, options: UpcyclingOptions) -> dict[Part, list[int]]:
    """Returns the parts of layers that are measured, each with the indices of the layers; a part without layers is left out."""
    layers: dict[Part, list[int]] = {
        "mlp": [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"],
        "self_attn": list(range(config.num_hidden_layers)) if options.attention_experts else [],
    }
    if options.router_init not in MEASURED_ROUTERS:
        layers["self_attn"] = []  # only the neurons of networks are grouped
    return {part: indices for part, indices in layers.items() if indices}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: dict[str, datasets.Dataset],
    config: MoEConfig,
    options: UpcyclingOptions,
) -> dict[str, torch.Tensor]:
    """Measures on text what the initial routers and the groups of neurons need; all tensors are small.

    In `text` and `ridge` routers the replicas r with `r // (R / D) == d` belong to domain d.

    Args:
        model: the source, in evaluation mode, on the device to run on.
        tokenizer: tokenizer of the source.
        domains: documents of each domain, see [`~modeling_moe.data.calibration_text.load_domains`].
        config: configuration of the result; it has as many layers as the source.
        options: `router_init`, `split`, and the options that they use.

    Returns:
        For each sparse layer i of the result `layers.{i}.router` (R, H) fp32, if `router_init` is measured, with
        logits whose standard deviation is `router_logit_std`, see [`logit_std`], and likewise
        `layers.{i}.attention_router` for each layer with attention experts; and `layers.{i}.neurons` (I,) int64 if
        `split` is clustered, see [`group_neurons`], the I / E neurons of the first expert first.

    Raises:
        UserError: if the text is too short, does not fit the number of experts, or its domains do not differ.
    """
    if not options.needs_text:
        return {}
    routed, split = options.router_init in MEASURED_ROUTERS, options.split == "clustered"
    by_part = {"mlp": options, "self_attn": options.for_attention()}
    places = _places(config, options)
    for part in places:
        _check_domains(len(domains), by_part[part], COUNTED[part])
    inputs = collect_inputs(
        model,
        tokenizer,
        domains,
        options.calibration_tokens,
        [(part, layer) for part, layers in places.items() for layer in layers],
        options.seed,
        samples=max(2048, *(32 * by_part[part].num_replicas for part in places)),
        gram=options.router_init == "ridge",
        neurons=split,
    )
    measured = {}
    for place, seen in inputs.items():
        if routed:
            measured[rows_of_router(place)] = _scaled_rows(seen, place, by_part[place[0]])
        if seen.active is not None:
            generator = place_generator(options.seed, place, "neurons")
            measured[f"layers.{place[1]}.neurons"] = group_neurons(seen.active, config.num_experts, generator)
    return measured
