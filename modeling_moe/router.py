# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""How a token chooses its experts: the contract, and the frame that every router fills.

A router is `score -> select -> weigh` and returns a [`Routing`]; a new one overrides one of the three and adds its name to
`modeling_moe.router_catalogue.ROUTERS`. Router arithmetic is fp32 whatever the model's dtype (fp64 for an fp64 model).

# B sequences, T tokens, H hidden, E experts, Z experts without weights (null and copy), K slots per token
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.integrations import deepspeed_config
from transformers.utils.generic import maybe_autocast

from .configuration_fields import POSITIVE, Range, setting
from .model_packing import first_columns


# fields that the frame of a router reads, unless a subclass overrides the method that does
FRAME_READS = frozenset(
    {
        "scoring_func",
        "router_bias",
        "norm_topk_prob",
        "routed_scaling_factor",
        "router_jitter_noise",
        "router_gradient",
        "router_aux_loss_scope",
    }
)
# fields by which [`~modeling_moe.router_capacity.Capacity`] limits any router that assigns tokens to experts
CAPACITY_READS = frozenset(
    {
        "capacity_factor",
        "eval_capacity_factor",
        "expert_capacity",
        "capacity_running",
        "capacity_includes_k",
        "capacity_priority",
    }
)


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class RouterFields:
    """Router."""

    allow_noncausal: bool = setting(
        False,
        "Permits routing in which a token's experts depend on later tokens. A causal language model can learn to read the "
        "later tokens from this routing, which is why it is refused by default.",
        effect="training",
    )
    scoring_func: str = setting(
        "softmax",
        'The function from router logits to scores: "softmax", "sigmoid" (DeepSeek-V3) or "sqrtsoftplus" (DeepSeek-V4).',
        choices=("softmax", "sigmoid", "sqrtsoftplus"),
        by_router=True,
    )
    router_bias: bool = setting(False, "Adds a learned bias to the router logits, as in gpt-oss.", by_router=True)
    norm_topk_prob: bool = setting(
        None,
        "Divides the weights of a token's chosen experts by their sum.",
        by_router=True,
        follows="the default of the router's paper, True for router_type='topk'",
    )
    routed_scaling_factor: float | int = setting(
        1.0, "The factor on the weights of the routed experts, applied after norm_topk_prob.", POSITIVE, by_router=True
    )
    num_null_experts: int = setting(
        0,
        "The number of extra router outputs that do nothing, so that tokens can use fewer than num_experts_per_tok experts "
        "(AdaMoE, arXiv:2406.13233).",
        Range(0, 2**16),
        by_router=True,
    )
    num_copy_experts: int = setting(
        0,
        "The number of extra router outputs that return the token unchanged (LongCat-Flash, arXiv:2509.01322).",
        Range(0, 2**16),
        by_router=True,
    )
    router_jitter_noise: float | int = setting(
        0.0,
        "Multiplies the router's input in training by uniform noise between 1 - router_jitter_noise and "
        "1 + router_jitter_noise, as in Switch; router_gradient='sparsemixer' draws experts whose logit is within twice this "
        "relative distance of the largest.",
        Range(0, 1),
        effect="training",
        by_router=True,
    )
    router_gradient: Literal["topk", "dense", "sparsemixer"] = setting(
        "topk",
        'The gradient of the router: "topk" through the weights of the chosen experts, "dense" through the weights of all '
        'experts, which are all computed in training (DenseMixer), or "sparsemixer", which draws the experts (GRIN, '
        "arXiv:2409.12136).",
        by_router=True,
    )


class Routing(NamedTuple):
    """What a router decides for T tokens.

    Attributes:
        logits: (T, E + Z) fp32, the router's raw scores; transformers records them as `router_logits`.
        weight: (T, K) fp32, factor on each chosen expert's output; carries the gradient, 0 in an empty slot.
        index: (T, K) int64, the chosen experts: below E routed ones, then null experts, then copy experts; `E + Z` marks
            an empty slot (dropped or unused). The experts skip all that is E or more.
        probs: (T, E + Z) fp32, scores normalised to sum 1.
        selection_probability: (T, E + Z) fp32, probability that the noise selects an expert, differentiable; None without noise.
        mixture: fp32, what [`Router.mix`] needs beside the others, if anything: by default (T, E + Z), the weights that
            `router_gradient="dense"` differentiates in training.
    """

    logits: torch.Tensor
    weight: torch.Tensor
    index: torch.Tensor
    probs: torch.Tensor
    selection_probability: torch.Tensor | None = None
    mixture: torch.Tensor | None = None


class RoutingContext(NamedTuple):
    """What a router may know beside the tokens; all that has T entries is in the tokens' order, row after row.

    Attributes:
        batch_size: number B of equally long rows the T tokens lie in.
        token_mask: (T,), 0 for tokens that do not count (padding); None if all count.
        input_ids: (T,) int64, None if the model was given embeddings.
        task_ids: (T,) int64, None if the batch names no task.
        cache: the model's key-value cache, in which a router keeps what later tokens of a sequence need; None without.
        begins: (T,) bool, whether a token begins a sequence, of which a row can hold several; None if each row is one.
            A row whose first token begins none continues the last sequence that the cache holds.
    """

    batch_size: int = 1
    token_mask: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    task_ids: torch.Tensor | None = None
    cache: Any = None
    begins: torch.Tensor | None = None

    def by_row(self, values: Any) -> Any:
        """`values` (T, ...) as (B, S, ...); None stays None."""
        return None if values is None else values.unflatten(0, (self.batch_size, -1))

    def sequences(self, tokens: int, device: torch.device | str) -> torch.Tensor:
        """Number (T,) int64 of each token's sequence: how many tokens lie before the first one of it in the batch."""
        length = tokens // self.batch_size
        number = torch.arange(self.batch_size, device=device)[:, None] * length
        if self.begins is None:
            return number.expand(-1, length).flatten()
        return (number + first_columns(self.begins.view(self.batch_size, -1))).flatten()


def expert_load(routing: Routing, token_mask: torch.Tensor | None = None, batch_size: int = 1) -> torch.Tensor:
    """Number of tokens sent to each expert, without gradient.

    Args:
        routing: of T tokens.
        token_mask: (T,), 0 for tokens that do not count (padding).
        batch_size: number B of equally long sequences to count apart.

    Returns:
        (E + Z,), or (B, E + Z) for more than one sequence, in the dtype of the logits. Empty slots count for no expert.
    """
    outputs = routing.probs.shape[-1]
    ones = torch.ones_like(routing.weight) if token_mask is None else token_mask[:, None].expand_as(routing.weight)
    counts = routing.probs.new_zeros(batch_size, outputs + 1)
    index, ones = (x.reshape(batch_size, -1) for x in (routing.index, ones.to(counts.dtype)))
    counts = counts.scatter_add(1, index, ones)[:, :outputs].detach()
    return counts[0] if batch_size == 1 else counts


def num_real_tokens(routing: Routing, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the number of tokens, padding excluded, as a scalar in the dtype of the probabilities."""
    if token_mask is None:
        return routing.probs.new_full((), len(routing.probs))
    return token_mask.to(routing.probs.dtype).sum()


def masked_mean(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens (dimension 0 of `values`) that count; 0 if none does."""
    if token_mask is None:
        return values.sum(dim=0) / max(len(values), 1)
    mask = token_mask.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    # no matrix product: autocast would run it in bf16; padding may hold a NaN, which times 0 is one
    return (mask * values).where(mask > 0, 0.0).sum(dim=0) / mask.sum().clamp(min=1)


def history_layer(config, layer_idx: int) -> int:
    """Index of the layer in the cache that holds what a sparse layer keeps of earlier tokens; the layers leave no gap."""
    return config.num_hidden_layers + config.mlp_layer_types[:layer_idx].count("sparse")


def extend_history(cache, slot: int, states: torch.Tensor) -> torch.Tensor:
    """Keeps `states` (B, S, N) of the newest tokens in the cache, after those of earlier ones, and returns all.

    They lie in a layer of their own of transformers' cache, which so reorders, repeats and crops them with the keys.

    Args:
        cache: as `generate` makes it; None for a sequence that begins here.
        slot: index of that layer, see [`history_layer`].
        states: (B, S, N).

    Returns:
        (B, S', N) with S' the tokens that the cache then holds.

    Raises:
        ValueError: for a cache of fixed size, which has no such layers.
    """
    if cache is None:
        return states
    if cache.is_compileable:
        raise ValueError(
            "this routing keeps what earlier tokens chose, which a static cache has no room for: use a dynamic cache "
            "(leave cache_implementation unset)."
        )
    while len(cache.layers) <= slot:
        cache.layers.append(DynamicLayer())
    return cache.layers[slot].update(states[:, None], states[:, None, :, :0])[0][:, 0]


def softmax_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (T, E), which both choose and weigh."""
    probs = logits.softmax(dim=-1)
    return probs, probs


def sigmoid_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A sigmoid of each logit (T, E), and the same normalised to sum 1 (DeepSeek-V3, arXiv:2412.19437, eq. 15)."""
    scores = logits.sigmoid()
    return scores, renormalise(scores)


def sqrt_softplus_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`sqrt(softplus(logit))` (T, E), and the same normalised to sum 1 (DeepSeek-V4)."""
    scores = nn.functional.softplus(logits).sqrt()
    return scores, renormalise(scores)


# scoring_func -> logits (T, E) to scores (T, E) and probs (T, E)
SCORING_FUNCS = {"softmax": softmax_scores, "sigmoid": sigmoid_scores, "sqrtsoftplus": sqrt_softplus_scores}


def fp32_linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`tokens @ weight.T + bias` in fp32 at least, under autocast too."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with maybe_autocast(tokens.device.type, enabled=False):
        return nn.functional.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def router_dtype(dtype: torch.dtype) -> torch.dtype:
    """A router in a model of `dtype` has this one: fp32 at least.

    DeepSpeed wants one dtype for all weights, and steps copies of them in fp32: under it a router has the model's.
    """
    if not dtype.is_floating_point or deepspeed_config() is not None:
        return dtype
    return torch.promote_types(dtype, torch.float32)


def renormalise(weight: torch.Tensor) -> torch.Tensor:
    """Weights (T, K) divided by their sum; all 0 stays 0, to which sigmoid scores can underflow."""
    return weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)


def dense_gradient(experts: nn.Module, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Zeros (T, H) whose gradient reaches the weights (T, E) as if every expert had been computed, and nothing else.

    DenseMixer's straight-through estimator (Yao et al. 2025, "DenseMixer: improving MoE post-training with precise
    router gradient"), at the cost of E / K times the experts' forward.
    """
    index = torch.arange(weight.shape[-1], device=weight.device).expand_as(weight)
    output = experts(hidden_states.detach(), index, weight, frozen=True)
    return output - output.detach()


class Router(nn.Module):
    """A linear gate (E + Z, H), scored by `scoring_func`; what it leaves open is `select`.

    A subclass overrides what differs, but never `forward`, and declares in the class variables what the configuration has to know.
    """

    # the routing of a token depends on no later token and no other sequence, in training and in evaluation
    causal: ClassVar[bool] = True
    # in evaluation the routing of a token depends on no other token
    per_token: ClassVar[bool] = True
    # number of experts differs from token to token
    variable_k: ClassVar[bool] = False
    # each token uses all experts, whatever `num_experts_per_tok` is
    uses_all_experts: ClassVar[bool] = False
    # value of `norm_topk_prob` where the configuration gives none
    norm_topk_prob_default: ClassVar[bool] = True
    # fields declared with `by_router` that the router reads; the configuration refuses others that differ from their defaults
    reads: ClassVar[frozenset[str]] = FRAME_READS | CAPACITY_READS
    # argument of the model's forward that the router cannot do without, beside the tokens
    required_input: ClassVar[str | None] = None
    # controller that the router cannot do without, a key of `modeling_moe.router_balancing.CONTROLLERS`
    default_controller: ClassVar[str | None] = None

    def __init__(self, config, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_experts = config.num_experts
        self.num_null = config.num_null_experts
        self.num_copies = config.num_copy_experts
        self.num_outputs = self.num_experts + self.num_null + self.num_copies
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.jitter_noise = config.router_jitter_noise
        self.gradient = config.router_gradient
        self.weight = nn.Parameter(torch.empty(self.num_outputs, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(self.num_outputs)) if config.router_bias else None

    @classmethod
    def validate(cls, config) -> None:
        """Raises ValueError, naming field and remedy, for a configuration that this router cannot serve."""

    def init_weights(self, std: float) -> None:
        """Fills the parameters and buffers of a new model."""
        init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Makes room for the token ids below `vocab_size`; a router that does not look at ids has nothing to do."""

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext | None = None) -> Routing:
        """Routes tokens (T, H).

        The block calls nothing else, neither before nor after: what wraps a router (PEFT, offloading) wraps this alone.
        """
        routing = self.decide(hidden_states, context or RoutingContext())
        if self.training and self.gradient == "dense":
            routing = routing._replace(mixture=self.dense_weight(routing))
        return routing

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        """The routing of tokens (T, H)."""
        return self.route(self.logits(hidden_states, context), context)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Raw scores (T, E + Z) of tokens (T, H)."""
        return fp32_linear(self.jittered(hidden_states), self.weight, self.bias)

    def jittered(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Tokens (T, H) times the noise of `router_jitter_noise`, in training."""
        if not self.training or self.jitter_noise <= 0:
            return hidden_states
        return hidden_states * torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        """From raw scores (T, E + Z) to the routing."""
        scores, probs = self.score(logits)
        with torch.no_grad():
            index = self.select(scores, context)  # (T, K)
        return Routing(logits, self.weigh(scores, index), index, probs)

    def score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (T, E + Z) that choose and weigh the experts, and the same normalised to sum 1."""
        return SCORING_FUNCS[self.scoring_func](logits)

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Experts (T, K) chosen by scores (T, E + Z); `num_outputs` leaves a slot empty."""
        raise NotImplementedError

    def weigh(self, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Weights (T, K) of the chosen experts, 0 in an empty slot and for a null expert."""
        weight = scores.gather(-1, index.clamp(max=self.num_outputs - 1))
        if self.variable_k or self.num_null:
            copies = (index >= self.num_experts + self.num_null) & (index < self.num_outputs)
            weight = weight.where((index < self.num_experts) | copies, 0.0)
        if self.norm_topk_prob:
            weight = renormalise(weight)
        return weight * self.scaling

    def dense_weight(self, routing: Routing) -> torch.Tensor:
        """Weights (T, E + Z) that `router_gradient="dense"` differentiates: those of a token that chose every expert."""
        scores = routing.probs if self.norm_topk_prob else self.score(routing.logits)[0]
        return scores * self.scaling

    @staticmethod
    def mix(
        experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext, config: Any
    ) -> torch.Tensor:
        """Output (T, H) for tokens (T, H): the weighted sum of the chosen experts', a copy expert's being the token.

        It sees no router: whatever it needs of one is in the routing.

        Args:
            experts: called as [`~modeling_moe.modeling_moe.MoEExperts`] says, and not otherwise used.
            hidden_states: (T, H).
            routing: of these tokens, after capacity.
            context: of these tokens.
            config: the model's configuration.
        """
        index, weight = routing.index, routing.weight
        real = index < config.num_experts
        if config.num_copy_experts:
            # some of transformers' functions tell an empty slot by its weight
            weight = weight.where(real, 0.0)
        if getattr(experts, "num_experts", config.num_experts) < config.num_experts:
            # transformers' exchange between processes knows no empty slot: an expert gets the token, with weight 0
            index, weight = index.where(real, 0), weight.where(real, 0.0)
        if routing.mixture is not None:
            dense = dense_gradient(experts, hidden_states, routing.mixture)
            return experts(hidden_states, index, weight.detach()) + dense
        output = experts(hidden_states, index, weight)
        if config.num_copy_experts:
            first = config.num_experts + config.num_null_experts
            copies = (routing.index >= first) & (routing.index < config.num_router_outputs)
            share = (routing.weight * copies).sum(dim=-1, keepdim=True)  # (T, 1)
            output = output + (share * hidden_states).to(output.dtype)
        return output

    def auxiliary_loss(self, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor | None:
        """A scalar that this router adds to the training loss, its weight included; None if it has none."""

    @property
    def kept_in_fp32(self) -> set[str]:
        """The names of the parameters and buffers that stay fp32 when the model has another floating dtype."""
        if router_dtype(torch.bfloat16) != torch.float32:
            return set()
        return {name for name, tensor in self.state_dict().items() if tensor.is_floating_point()}

    def _apply(self, fn, recurse=True):
        """Keeps weights and buffers in fp32 at least when the model is cast.

        In bf16 a small update is lost, 0.5 + 0.001 = 0.5, of a weight as of the selection bias.
        """

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == router_dtype(moved.dtype) else tensor.to(moved.device, torch.float32)

        return super()._apply(kept, recurse)
