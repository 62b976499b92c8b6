# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module lets a decoder layer process only some tokens, which a router chooses: causal Mixture-of-Depths.

Mixture-of-Depths (Raposo et al., arXiv:2404.02258) computes `y_t = r_t f(x)_t + x_t` for chosen tokens and `y_t = x_t` for
the others. f is what attention and feed-forward network add to the residual stream, and chosen tokens attend to chosen
tokens alone. Here r is the sigmoid of the router's logit, where the paper has the logit itself.

The paper chooses the C best tokens of a sequence, so that a later token takes an earlier token's place. By default a token
is chosen here if its score exceeds a threshold, which follows the score that the share `depth_capacity` of the tokens
exceeds (Expert Threshold, arXiv:2603.11535, with the layer as its only expert). That choice is the token's own, in training
and in decoding.

# B rows, S tokens per row, T = B*S tokens, n chosen tokens of the row that has most, H hidden
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention_catalogue import ROUTED_ATTENTION
from .configuration_fields import HAS_DEPTH, Range, setting
from .router import Routing, RoutingContext, extend_history, history_layer
from .router_block import Routed
from .router_catalogue import ROUTERS, router_class
from .router_losses import TokenWeights
from .router_statistics import LayerOutput, RouterStatistics, Statistics, layer_statistics
from .router_view import Replaced, RoutingView


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class DepthFields:
    """These fields determine which layers process only some tokens, and which tokens."""

    depth_layers: list[int] | None = setting(
        None,
        "For each layer 1 if a router chooses the tokens that the layer processes and 0 if it processes all tokens "
        "(Mixture-of-Depths, arXiv:2404.02258); None lets all layers process all tokens.",
        choices=(0, 1),
    )
    depth_capacity: float | int = setting(
        0.125,
        "The share of the tokens that a layer with a 1 in depth_layers processes.",
        Range(0, 1, open_below=True),
        conditions=(HAS_DEPTH,),
    )
    depth_router: Literal["expert_threshold", "expert_choice"] = setting(
        "expert_threshold",
        'The router of depth_layers: "expert_threshold" chooses the tokens above a learned threshold, "expert_choice" the '
        "best tokens of each sequence, as published, which is not causal.",
        conditions=(HAS_DEPTH,),
    )


# fields declared with `by_router` that the routers of depth read
READS = frozenset({"router_jitter_noise"})
# attribute -> what the routers of depth read in its place; one expert knows no imbalance
_OWN: Replaced = {
    "num_experts": lambda config: 1,
    "num_experts_per_tok": lambda config: config.depth_capacity,
    "expected_experts_per_tok": lambda config: config.depth_capacity,
    "router_type": lambda config: config.depth_router,
    "num_hash_layers": lambda config: 0,
    "scoring_func": lambda config: "sigmoid",
    "norm_topk_prob": lambda config: False,
    "router_controller": lambda config: None,
    "router_aux_loss_coef": lambda config: 0.0,
    "router_seq_aux_loss_coef": lambda config: 0.0,
    "router_importance_loss_coef": lambda config: 0.0,
    "router_load_loss_coef": lambda config: 0.0,
    "router_entropy_loss_coef": lambda config: 0.0,
    # behind what the routers of feed-forward networks and of attention store
    "history_before": lambda config: (
        lambda layer: (
            config.mlp_layer_types.count("sparse") + config.num_hidden_layers + sum(config.depth_layers[:layer])
        )
    ),
}


def depth_view(config: Any) -> RoutingView:
    """Returns the configuration as the routers of depth read it: one expert, which `depth_capacity` of the tokens use."""
    return RoutingView(config, _OWN, READS)


def check_depth(config: Any) -> None:
    """Checks the fields of Mixture-of-Depths against the others.

    Raises:
        ValueError: for a router that is not causal without `allow_noncausal`, or a feed-forward network or attention whose
            routing would need the tokens that a layer skips.
    """
    if not HAS_DEPTH.holds(config):
        return
    if not ROUTERS[config.depth_router].causal and not config.allow_noncausal:
        raise ValueError(
            f"depth_router={config.depth_router!r} chooses among all tokens of a sequence, so that the choice reveals later "
            "tokens, which a causal language model must not see: set allow_noncausal=True if that is meant."
        )
    kinds = zip(config.depth_layers, config.mlp_layer_types, strict=True)
    if any(depth and kind == "sparse" for depth, kind in kinds) and not router_class(config).per_token:
        raise ValueError(
            f"router_type={config.router_type!r} routes a token by the tokens before, some of which depth_layers skips: "
            "choose a router_type that routes each token by itself, or let the layers of depth_layers be dense."
        )
    if config.routed_attention is not None and ROUTED_ATTENTION[config.routed_attention].routes_mask:
        raise ValueError(
            f"routed_attention={config.routed_attention!r} remembers the routing of all tokens, some of which depth_layers skips: "
            "choose another routed_attention, or unset depth_layers."
        )
    if config.expert_capacity is not None or config.capacity_running:
        name = "capacity_running" if config.expert_capacity is None else "expert_capacity"
        raise ValueError(
            f"{name} counts the tokens before in the cache, some of which depth_layers skips: unset {name} or depth_layers."
        )


class Chosen(NamedTuple):
    """The tokens that a layer processes, row by row in their order; rows with fewer than n are padded with other tokens.

    Attributes:
        columns: (B, n) int64 place of each token in the row, each place once.
        real: (B, n) bool, false at padding.
        length: number S of tokens in a row.
    """

    columns: torch.Tensor
    real: torch.Tensor
    length: int

    @classmethod
    def of(cls, marked: torch.Tensor) -> "Chosen":
        """Returns the tokens that `marked` (B, S) bool marks, at least one per row with padding.

        A compiled graph has one shape: it processes all places, and only the marked ones count.
        """
        length = marked.shape[1]
        most = length if torch.compiler.is_compiling() else max(int(marked.sum(dim=1).max()), 1)
        columns = (~marked).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        return cls(columns, marked.gather(1, columns), length)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Takes (B, n, ...) of the chosen tokens from (B, S, ...) or (1, S, ...)."""
        values = values.expand(len(self.columns), *values.shape[1:])
        index = self.columns.view(*self.columns.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(*self.columns.shape, *values.shape[2:]))

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Puts (B, ..., n, D) of the chosen tokens into their places in (B, ..., S, D), which is 0 elsewhere."""
        shape = [len(self.columns), *[1] * (values.dim() - 3), -1, 1]
        index, real = self.columns.view(shape), self.real.view(shape)
        zeros = values.new_zeros(*values.shape[:-2], self.length, values.shape[-1])
        return zeros.scatter(-2, index.expand_as(values), values.where(real, 0.0))

    def context(self, context: RoutingContext) -> RoutingContext:
        """Returns what the routers inside the layer know of the chosen tokens."""

        def taken(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else self.gather(context.by_row(values)).flatten(0, 1)

        begins = None
        if context.begins is not None:
            # a sequence begins with the first of its tokens that is chosen
            number = self.gather(context.by_row(context.begins).long().cumsum(dim=1))
            begins = ((number.diff(dim=1, prepend=torch.zeros_like(number[:, :1])) > 0) & self.real).flatten()
        rows = torch.arange(len(self.columns), device=self.columns.device)[:, None] * self.length
        return context._replace(
            token_mask=self.real.flatten(),
            places=(rows + self.columns).where(self.real, -1).flatten(),
            input_ids=taken(context.input_ids),
            task_ids=taken(context.task_ids),
            begins=begins,
            carried=taken(context.carried),
        )

    def carried(self, values: torch.Tensor | None, context: RoutingContext) -> torch.Tensor | None:
        """Returns what all tokens carry (B*S, N): chosen tokens `values` (B*n, N), the others what they carried before, or 0."""
        if values is None:
            return context.carried
        values = values.unflatten(0, (len(self.columns), -1))
        before = context.by_row(context.carried)
        if before is None:
            before = values.new_zeros(len(values), self.length, values.shape[-1])
        values = values.where(self.real[..., None], self.gather(before))
        return before.scatter(1, self.columns[..., None].expand_as(values), values).flatten(0, 1)

    def weights(self, weights: TokenWeights | None) -> TokenWeights | None:
        """Returns the weights of the chosen tokens in the router losses."""
        if weights is None:
            return None
        weight, sequence = (self.gather(x.view(len(self.columns), -1)) for x in (weights.weight, weights.sequence))
        return weights._replace(weight=(weight * self.real).flatten(), sequence=sequence.flatten())

    def mask(self, mask: torch.Tensor | None, known: torch.Tensor | None, keys: int) -> torch.Tensor | None:
        """Returns the attention mask of chosen tokens over chosen tokens.

        Args:
            mask: (B or 1, 1, S, S') mask of transformers over all tokens, of bool or to be added; None for causal attention.
            known: (B, S'') bool, whether a token in the cache is chosen, these tokens included; None without a cache.
            keys: number S' of keys in the cache, the last of S'' tokens.

        Returns:
            (B, 1, n, n), or (B, 1, n, S') with a cache; None for causal attention.
        """
        if known is None and mask is None:
            return None  # causal, since the padding comes last
        if mask is None:
            assert known is not None
            places = torch.arange(keys, device=known.device)
            mask = (places <= self.columns[:, None, :, None] + (keys - self.length)).expand(-1, 1, -1, -1)
        else:
            mask = self.gather(mask.expand(len(self.columns), -1, -1, -1).transpose(1, 2)).transpose(1, 2)
        seen = self.real
        if known is None:
            mask = self.gather(mask.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            seen = known[:, -keys:]
        # the padding attends to everything: a softmax over nothing would be NaN
        hidden, padding = ~seen[:, None, None], ~self.real[:, None, :, None]
        if mask.dtype == torch.bool:
            return (mask & ~hidden) | padding
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min).masked_fill(padding, 0.0)


class HoledCache:
    """Stands for the key-value cache in one layer, and stores zeros for the tokens that the layer skips.

    Every layer's cache then has the tokens at their places, which beams, assistants and masks rely on.
    """

    def __init__(self, cache: Cache, chosen: Chosen):
        self.cache, self.chosen = cache, chosen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adds keys and values (B, heads, n, D) of chosen tokens, and returns those of all tokens (B, heads, S', D)."""
        return self.cache.update(self.chosen.spread(key), self.chosen.spread(value), *args, **kwargs)


class Updates(NamedTuple):
    """What a layer computes for its tokens.

    Attributes:
        attended: (B, n, H) what attention adds to the residual stream.
        residual: (B, n, H) the residual stream after attention; None where attention and network are parallel as in GPT-NeoX.
        network: (B, n, H) what the feed-forward network adds.
        carried: (B*n, N) what the tokens carry to the next sparse layer ([`~modeling_moe.router.Routing`]), or None.
        statistics: measurements of the routers in attention and network.
    """

    attended: torch.Tensor
    residual: torch.Tensor | None
    network: torch.Tensor
    carried: torch.Tensor | None
    statistics: Statistics


# (states, context, token weights, arguments of attention) -> updates
Compute = Callable[[torch.Tensor, RoutingContext, TokenWeights | None, dict[str, Any]], Updates]


class DepthRouting(Routed, nn.Module):
    """The router of one layer, which chooses the tokens that the layer processes."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        view = depth_view(config)
        self.add_router(router_class(view), view, layer_idx)
        self.history = history_layer(view, layer_idx)

    def forward(
        self,
        compute: Compute,
        hidden_states: torch.Tensor,
        context: RoutingContext,
        token_weights: TokenWeights | None,
        arguments: dict[str, Any],
    ) -> LayerOutput:
        """Adds to the chosen tokens of (B, S, H) the updates of the layer, each times the token's score.

        A skipped token carries on what the router of the sparse layer before has passed on for it.

        Args:
            compute: computes what attention and what the feed-forward network add to (B, n, H).
            hidden_states: (B, S, H).
            context: what routers know of all tokens.
            token_weights: weights of all tokens in the router losses; None if nothing is measured.
            arguments: arguments of attention for all tokens.

        Returns:
            (B, S, H), what all tokens carry, and the statistics of this router and of the routers inside the layer.

        Raises:
            ValueError: for a static cache, which has no place for which tokens were chosen.
        """
        choice, routing = self.route(hidden_states.flatten(0, 1), context)
        marked = routing.index[:, 0] == 0
        if context.token_mask is not None:
            marked = marked & (context.token_mask > 0)
        marked, cache = context.by_row(marked), arguments["cache"]
        known = None
        if cache is not None:
            known = extend_history(cache, self.history, marked[..., None].to(hidden_states.dtype))[..., 0] > 0
        if self._skips(marked, cache, token_weights):
            return LayerOutput(hidden_states, context.carried, {})
        chosen = Chosen.of(marked)
        updates = compute(
            chosen.gather(hidden_states),
            chosen.context(context),
            chosen.weights(token_weights),
            self._arguments(chosen, known, arguments),
        )
        weight = chosen.gather(context.by_row(routing.weight))  # (B, n, 1)
        update = (weight * (updates.attended + updates.network)).to(hidden_states.dtype)
        statistics = updates.statistics
        if token_weights is not None:
            statistics = statistics | {"depth": [self._statistics(choice, routing, context, token_weights)]}
        carried = chosen.carried(updates.carried, context)
        return LayerOutput(hidden_states + chosen.spread(update), carried, statistics)

    def _skips(self, marked: torch.Tensor, cache: Cache | None, token_weights: TokenWeights | None) -> bool:
        """Says whether the layer has nothing to do, and stores the zeros of skipped tokens in the cache if so."""
        # somebody may record the probabilities of eager attention
        measured = self.training or token_weights is not None or self.config._attn_implementation == "eager"
        if measured or torch.compiler.is_compiling() or bool(marked.any()):
            return False
        if cache is not None:
            layer: Any = cache.layers[self.layer_idx]
            if not layer.is_initialized or layer.keys.dim() != 4:
                return False  # attention alone knows the widths
            shape = [len(marked), layer.keys.shape[1], marked.shape[1]]
            zeros = (x.new_zeros(*shape, x.shape[-1]) for x in (layer.keys, layer.values))
            cache.update(*zeros, self.layer_idx)
        return True

    def _arguments(self, chosen: Chosen, known: torch.Tensor | None, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of attention for chosen tokens: with their positions, their mask and a cache with holes."""
        cache, mask = arguments["cache"], arguments["attention_mask"]
        keys = chosen.length
        if mask is not None:
            keys = mask.shape[-1]
        elif cache is not None and cache.layers[self.layer_idx].is_initialized:
            keys += cache.layers[self.layer_idx].keys.shape[-2]
        changed: dict[str, Any] = {"attention_mask": chosen.mask(mask, known, keys)}
        if cache is not None:
            changed["cache"] = HoledCache(cache, chosen)
        if (positions := arguments["position_ids"]) is not None:
            changed["position_ids"] = chosen.gather(positions)
        if (rotary := arguments["position_embeddings"]) is not None:
            changed["position_embeddings"] = tuple(chosen.gather(x) for x in rotary)
        return arguments | changed

    def _statistics(
        self, choice: Routing, routing: Routing, context: RoutingContext, weights: TokenWeights
    ) -> RouterStatistics:
        """Measures the router; one expert has no balance to lose."""
        found = layer_statistics(self, choice, routing, context, weights)
        return found._replace(losses=found.losses._replace(balance=None))
