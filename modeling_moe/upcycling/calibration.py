# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""What a source model makes of text: routers that know its domains, and neurons that are active together.

# D domains, N tokens sampled, H hidden, I intermediate, E experts, G granularity, R = E / G replicas of the dense network
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_moe import MoEConfig
from ..data import DataArguments, cut_documents
from ..utils.errors import UserError
from ..utils.seeds import generator_for
from .clustering import balanced_clusters, kmeans
from .options import UpcyclingOptions


BLOCK_LENGTH = 512
ACTIVE_SHARE = 0.1
FEED_FORWARD = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.mlp$")
DOWN_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h")


@dataclass
class LayerInputs:
    """What entered the feed-forward network of a layer.

    Attributes:
        means: (D, H) fp64, of each domain's inputs; all domains have the same number of tokens.
        sample: (N, H) fp32, inputs drawn from all domains.
        gram: (H, H) fp64, sum of x xᵀ over all inputs x; None unless asked for.
        active: (N, I) bool, for the tokens of `sample`, the neurons of largest magnitude at the entry of the down
            projection, a tenth of each token's; None unless asked for.
    """

    means: torch.Tensor
    sample: torch.Tensor
    gram: torch.Tensor | None = None
    active: torch.Tensor | None = None


class _Recorder:
    """Hooks of one layer; `domain` and `drawn` (tokens of the block,) bool tell what passes next."""

    def __init__(self, num_domains: int, gram: bool):
        self.num_domains, self.wants_gram = num_domains, gram
        self.domain, self.drawn = 0, torch.zeros(0, dtype=torch.bool)
        self.sums: Any = None
        self.gram: Any = None
        self.sample, self.active = [], []

    def see_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Adds the network's input (1, S, H), but for the first token's."""
        states = args[0][0, 1:].detach()
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
        """Adds the down projection's input (1, S, I), but for the first token's."""
        neurons = args[0][0, 1:].detach()
        neurons = neurons[self.drawn.to(neurons.device)].abs()
        top = neurons.topk(max(1, round(ACTIVE_SHARE * neurons.shape[-1])), dim=-1).indices
        self.active.append(torch.zeros_like(neurons, dtype=torch.bool).scatter(1, top, True).cpu())

    def inputs(self, tokens: int) -> LayerInputs:
        """What was seen, with `tokens` of each domain."""
        gram = None if self.gram is None else self.gram.cpu()
        active = torch.cat(self.active) if self.active else None
        return LayerInputs(self.sums.cpu() / tokens, torch.cat(self.sample), gram, active)


def load_domains(calibration_data: list[str]) -> dict[str, datasets.Dataset]:
    """Documents of each domain.

    Args:
        calibration_data: `domain=source` each, see [`~modeling_moe.data.DataArguments`].

    Raises:
        UserError: if one is malformed, does not exist or holds no text.
    """
    try:
        return DataArguments(data=calibration_data).load()
    except UserError as error:
        raise UserError(f"calibration_data: {error}") from error


def token_ids(documents: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int, name: str) -> torch.Tensor:
    """The first tokens (`tokens`,) int64 of a domain, with the tokenizer's eos, if it has one, after each document.

    Raises:
        UserError: if the domain has fewer.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    pieces: Any = cut_documents(documents)
    for piece in pieces:
        ids += tokenizer(piece["text"], add_special_tokens=False, verbose=False).input_ids + eos * piece["end"]
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise UserError(
        f"calibration_tokens is {tokens}, but domain {name!r} of calibration_data has {len(ids)} tokens: lower it or "
        "give more text"
    )


def feed_forwards(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The feed-forward network of each layer, dense or sparse.

    Raises:
        UserError: if they are not where all supported families have them.
    """
    found = {int(m[1]): module for name, module in model.named_modules() if (m := FEED_FORWARD.search(name))}
    if len(found) != model.config.num_hidden_layers:
        raise UserError(
            f"calibration_data cannot be used with this {model.config.model_type} model: it has feed-forward networks "
            f"under {len(found)} of its {model.config.num_hidden_layers} layers; choose router_init random and split "
            "random"
        )
    return found


def _down_projection(network: nn.Module, layer: int) -> nn.Module:
    for name in DOWN_PROJECTIONS:
        if isinstance(found := getattr(network, name, None), nn.Module):
            return found
    raise UserError(f"split 'clustered' needs a dense network in layer {layer} of the source: choose split random")


@torch.no_grad()
def collect_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: dict[str, datasets.Dataset],
    tokens_per_domain: int,
    layers: list[int],
    seed: int,
    samples: int = 2048,
    gram: bool = False,
    neurons: bool = False,
) -> dict[int, LayerInputs]:
    """Runs a model on text and keeps statistics of what enters its feed-forward networks, after norm and attention.

    The text is cut into blocks, each read on its own. A block's first token counts nowhere: it attends to nothing but
    itself, and its state is often an outlier.

    Args:
        model: a causal LM, dense or sparse, in evaluation mode, on the device to run on.
        tokenizer: of the model.
        domains: documents of each domain, rows of `text`, see [`load_domains`].
        tokens_per_domain: tokens read of each.
        layers: indices of the layers to look at.
        seed: of the sample.
        samples: tokens of all domains of which the states themselves are kept, the same for all layers; all tokens if
            there are no more. Memory is `samples * H` floats a layer.
        gram: also sum x xᵀ, in `H * H` doubles a layer.
        neurons: also keep which neurons are active.

    Returns:
        Statistics by layer, on the CPU.

    Raises:
        UserError: if a domain has too few tokens or the model no such networks.
    """
    if tokens_per_domain < 2:
        raise UserError(f"calibration_tokens is {tokens_per_domain}: it must be at least 2")
    networks, recorders, hooks = feed_forwards(model), {layer: _Recorder(len(domains), gram) for layer in layers}, []
    length = min(BLOCK_LENGTH, getattr(model.config, "max_position_embeddings", BLOCK_LENGTH))
    ids = [token_ids(documents, tokenizer, tokens_per_domain, name) for name, documents in domains.items()]
    blocks = [(domain, block) for domain, tokens in enumerate(ids) for block in tokens.split(length)]
    counted = [len(block) - 1 for _, block in blocks]
    order = torch.randperm(sum(counted), generator=generator_for(seed, "sample"))
    drawn = torch.zeros(sum(counted), dtype=torch.bool).index_fill(0, order[:samples], True).split(counted)
    try:
        for layer, recorder in recorders.items():
            hooks.append(networks[layer].register_forward_pre_hook(recorder.see_input))
            if neurons:
                down = _down_projection(networks[layer], layer)
                hooks.append(down.register_forward_pre_hook(recorder.see_neurons))
        for (domain, block), chosen in zip(tqdm(blocks, desc="calibrating"), drawn, strict=True):
            for recorder in recorders.values():
                recorder.domain, recorder.drawn = domain, chosen
            model.base_model(input_ids=block[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: recorder.inputs(sum(counted) // len(domains)) for layer, recorder in recorders.items()}


def _for_replicas(domain_rows: torch.Tensor, layer: int, options: UpcyclingOptions) -> torch.Tensor:
    """Rows (R, H) from those of the domains (D, H), made unequal by noise where several replicas share a domain."""
    rows = domain_rows.repeat_interleave(options.num_replicas // len(domain_rows), dim=0)
    if len(rows) == len(domain_rows):
        return rows
    noise = torch.randn(rows.shape, generator=generator_for(options.seed, layer, "router"), dtype=rows.dtype)
    return rows + options.router_std * rows.std() * noise


def text_rows(inputs: LayerInputs, layer: int, options: UpcyclingOptions) -> torch.Tensor:
    """The direction of each domain's mean input, less the mean over domains, which adds the same to all logits of a token.

    The direction alone: without a bias, a domain with a longer mean would draw the others' tokens.
    """
    directions = nn.functional.normalize(inputs.means)
    return _for_replicas(directions - directions.mean(dim=0), layer, options)


def ridge_rows(inputs: LayerInputs, layer: int, options: UpcyclingOptions) -> torch.Tensor:
    """Ridge regression of the domain, one-hot and centred, on the input (DUME, arXiv:2603.29765).

    `(XᵀX + lambda * trace(XᵀX) / H * I)⁻¹ XᵀY`, `lambda` being `ridge_lambda`. As all domains have the same number of
    tokens, XᵀY is that number times the centred means; the factor is left out, for the rows are scaled anyway.
    """
    gram: Any = inputs.gram
    centred = inputs.means - inputs.means.mean(dim=0)
    ridge = options.ridge_lambda * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return _for_replicas(torch.linalg.solve(gram + ridge, centred.T).T, layer, options)


def kmeans_rows(inputs: LayerInputs, layer: int, options: UpcyclingOptions) -> torch.Tensor:
    """Centroids of spherical k-means on the inputs, less their mean.

    The largest logit is exactly that of the nearest centroid: on the sphere distance is the dot product, which needs no
    bias, and neither a token's length nor a vector taken from all rows changes which is largest.
    """
    replicas = options.num_replicas
    if len(inputs.sample) < replicas:
        raise UserError(
            f"calibration_tokens is {options.calibration_tokens}: {len(inputs.sample)} inputs do not make {replicas} "
            "k-means clusters; raise it"
        )
    centroids = kmeans(inputs.sample, replicas, generator_for(options.seed, layer, "router"))
    return centroids - centroids.mean(dim=0)


# router_init -> rows (R, H) of a layer, at any scale
MEASURED_ROUTERS: dict[str, Callable[[LayerInputs, int, UpcyclingOptions], torch.Tensor]] = {
    "text": text_rows,
    "kmeans": kmeans_rows,
    "ridge": ridge_rows,
}


def logit_std(rows: torch.Tensor, states: torch.Tensor) -> float:
    """Standard deviation of a token's logits, the mean over tokens.

    Args:
        rows: of the router (R, H), any float dtype.
        states: (N, H) fp32.
    """
    return (states @ rows.float().T).std(dim=1, correction=0).mean().item()


def group_neurons(active: torch.Tensor, groups: int, generator: torch.Generator) -> torch.Tensor:
    """A permutation (I,) int64 of the neurons in which each group of I / `groups` is active together.

    Neurons are alike by the correlation of their activity over the tokens; balanced k-means groups them.

    Args:
        active: (N, I) bool.
        groups: a divisor of I.
        generator: of the random numbers.
    """
    activity = active.T.float()
    clusters = balanced_clusters(activity - activity.mean(dim=1, keepdim=True), groups, generator)
    return clusters.argsort(stable=True)


def _check_domains(num_domains: int, options: UpcyclingOptions) -> None:
    if options.router_init in ("text", "ridge") and (num_domains < 2 or options.num_replicas % num_domains):
        raise UserError(
            f"calibration_data has {num_domains} domain(s), but router_init {options.router_init!r} needs at least 2, of "
            f"which num_experts / granularity ({options.num_replicas}) is a multiple: change one of them"
        )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: dict[str, datasets.Dataset],
    config: MoEConfig,
    options: UpcyclingOptions,
) -> dict[str, torch.Tensor]:
    """What routers and the split of the neurons take from text; all small.

    Of `text` and `ridge` routers the replicas r with `r // (R / D) == d` belong to domain d.

    Args:
        model: the source; in evaluation mode, on the device to run on.
        tokenizer: of the source.
        domains: documents of each domain, see [`load_domains`].
        config: of the result; its layers are the source's.
        options: `router_init`, `split`, and what they need.

    Returns:
        For each sparse layer i of the result `layers.{i}.router` (R, H) fp32, if `router_init` is measured, with
        logits whose standard deviation is `router_logit_std`, see [`logit_std`]; and `layers.{i}.neurons` (I,) int64
        if `split` is clustered, see [`group_neurons`], the I / E neurons of the first expert first.

    Raises:
        UserError: if the text is too short, does not fit the number of experts, or holds nothing to tell apart.
    """
    if not options.needs_text:
        return {}
    _check_domains(len(domains), options)
    routed, split = options.router_init in MEASURED_ROUTERS, options.split == "clustered"
    inputs = collect_inputs(
        model,
        tokenizer,
        domains,
        options.calibration_tokens,
        [i for i, kind in enumerate(config.mlp_layer_types) if kind == "sparse"],
        options.seed,
        samples=max(2048, 32 * options.num_replicas),
        gram=options.router_init == "ridge",
        neurons=split,
    )
    measured = {}
    for layer, seen in inputs.items():
        if routed:
            rows = MEASURED_ROUTERS[options.router_init](seen, layer, options).float()
            if not (std := logit_std(rows, seen.sample)) > 0:
                raise UserError(
                    f"router_init {options.router_init!r} finds nothing to tell apart in layer {layer}: give "
                    "calibration_data whose domains differ, and at least 2 replicas (num_experts / granularity)"
                )
            measured[f"layers.{layer}.router"] = rows * (options.router_logit_std / std)
        if split:
            generator = generator_for(options.seed, layer, "neurons")
            measured[f"layers.{layer}.neurons"] = group_neurons(seen.active, config.num_experts, generator)
    return measured
