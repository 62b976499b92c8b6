# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the base class of routers, which choose experts for each token, and the [`Routing`] that they return.

A router computes `score -> select -> weigh`. A new router overrides one of these three methods, and adds its name to
`modeling_moe.router_catalogue.ROUTERS`. Routers compute in fp32 whatever the model's dtype is, in fp64 in an fp64 model.

# B rows, S tokens per row, T = B*S tokens, H hidden, E experts, Z experts without weights (null and copy), K choices per token
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


# fields that [`Router.logits`] reads
LOGIT_READS = frozenset({"router_bias", "router_input_norm", "router_logit_scale", "router_logit_softcapping"})
# fields that the base class of routers reads, unless a subclass overrides the method that reads the field
FRAME_READS = LOGIT_READS | frozenset(
    {
        "scoring_func",
        "norm_topk_prob",
        "routed_scaling_factor",
        "router_expert_scale",
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
    """These fields configure all routers, unless a router's class says that it does not read them."""

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
    router_input_norm: bool = setting(
        False,
        "Divides the router's input by its root mean square, and multiplies it by a learned scale and by hidden_size**-0.5, as "
        "in Gemma 4.",
        by_router=True,
    )
    router_logit_scale: float | int = setting(
        1.0, "The factor on the router logits, as in Muse Spark.", POSITIVE, by_router=True
    )
    router_logit_softcapping: float | int | None = setting(
        None,
        "Bounds the router logits by cap * tanh(logit / cap), after router_logit_scale, as in Laguna.",
        POSITIVE,
        by_router=True,
    )
    norm_topk_prob: bool = setting(
        None,
        "Divides the weights of a token's chosen experts by their sum.",
        by_router=True,
        follows="the default of the router's paper, True for router_type='topk'",
    )
    routed_scaling_factor: float | int = setting(
        1.0, "The factor on the weights of the routed experts, applied after norm_topk_prob.", POSITIVE, by_router=True
    )
    router_expert_scale: bool = setting(
        False,
        "Multiplies the weight of each expert by a learned factor of the expert, after norm_topk_prob, as in Gemma 4.",
        by_router=True,
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
    """The experts and the weights that a router has chosen for T tokens.

    Attributes:
        logits: (T, E + Z) fp32 router logits; transformers records them as `router_logits`.
        weight: (T, K) fp32 factor on the output of each chosen expert, which carries the gradient; 0 in an empty assignment.
        index: (T, K) int64 ids of the chosen experts: E experts with weights, then null experts, then copy experts. `E + Z`
            marks an empty assignment, dropped or unused. The experts skip ids of E and more.
        probs: (T, E + Z) fp32 scores normalised to sum 1.
        selection_probability: (T, E + Z) fp32 probability that the noise selects an expert, differentiable; None without
            noise.
        mixture: fp32 tensor that [`Router.mix`] reads beside the others, or None; by default the (T, E + Z) weights that
            `router_gradient="dense"` differentiates in training.
        carried: (T, N) fp32 numbers that the router of the next sparse layer reads, with their gradient; None from most
            routers.
    """

    logits: torch.Tensor
    weight: torch.Tensor
    index: torch.Tensor
    probs: torch.Tensor
    selection_probability: torch.Tensor | None = None
    mixture: torch.Tensor | None = None
    carried: torch.Tensor | None = None


class RoutingContext(NamedTuple):
    """The properties of a batch that a router may read beside the hidden states; tensors are ordered row by row.

    Attributes:
        batch_size: number B of equally long rows that the T tokens form.
        token_mask: (T,), 0 at padding; None without padding.
        input_ids: (T,) int64 token ids; None if the model was given embeddings.
        task_ids: (T,) int64 task of each token; None if the batch names no task.
        cache: the model's key-value cache, in which a router stores what later tokens need; None without a cache.
        begins: (T,) bool, true where a sequence begins; a row can hold several sequences. None if each row is one sequence.
            A row whose first token begins no sequence continues the last sequence in the cache.
        carried: (T, N) what the router of the sparse layer before has passed on ([`Routing`]); None in the first sparse layer.
        places: (T,) int64 place of each token among all tokens of the batch, in a layer that processes only some
            (`depth_layers`), -1 at padding; None in a layer that processes all.
    """

    batch_size: int = 1
    token_mask: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None
    task_ids: torch.Tensor | None = None
    cache: Any = None
    begins: torch.Tensor | None = None
    carried: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def by_row(self, values: Any) -> Any:
        """Reshapes `values` (T, ...) to (B, S, ...); None stays None."""
        return None if values is None else values.unflatten(0, (self.batch_size, -1))

    def sequences(self, tokens: int, device: torch.device | str) -> torch.Tensor:
        """Returns a number (T,) int64 for each token's sequence: the position in the batch of the sequence's first token."""
        length = tokens // self.batch_size
        number = torch.arange(self.batch_size, device=device)[:, None] * length
        if self.begins is None:
            return number.expand(-1, length).flatten()
        return (number + first_columns(self.begins.view(self.batch_size, -1))).flatten()


def expert_load(routing: Routing, token_mask: torch.Tensor | None = None, batch_size: int = 1) -> torch.Tensor:
    """Returns the number of tokens sent to each expert, without gradient.

    Args:
        routing: routing of T tokens.
        token_mask: (T,), 0 at padding, which is excluded; None without padding.
        batch_size: number B of equally long rows, each counted by itself.

    Returns:
        (E + Z,), or (B, E + Z) for more than one row, in the dtype of the probabilities. Empty assignments are excluded.
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
    """Returns the mean of `values` (T, ...) over tokens, weighted by `token_mask` (T,); 0 if all weights are 0."""
    if token_mask is None:
        return values.sum(dim=0) / max(len(values), 1)
    mask = token_mask.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    # not a matrix product, which autocast would run in bf16; `where`, since a NaN at padding times 0 is a NaN
    total = mask.sum()
    # weights of the tokens of one layer can sum to less than 1
    return (mask * values).where(mask > 0, 0.0).sum(dim=0) / total.where(total > 0, 1.0)


def history_layer(config: Any, layer_idx: int) -> int:
    """Returns the index of the extra cache layer in which a router of layer `layer_idx` stores its routing history.

    The extra layers follow the layers of keys, one per router.
    """
    return config.num_hidden_layers + config.history_before(layer_idx)


def extend_history(cache: Any, layer: int, states: torch.Tensor) -> torch.Tensor:
    """Appends the states of new tokens to a router's history in the cache, and returns the whole history.

    The history is stored as an extra layer of the key-value cache, so that beam search and speculative decoding reorder and
    crop it together with the keys.

    Args:
        cache: key-value cache of transformers; None if the sequence begins with these tokens and no cache is kept.
        layer: index of the extra layer ([`history_layer`]).
        states: (B, S, N) states of the new tokens.

    Returns:
        (B, S', N) states of all S' tokens in the cache.

    Raises:
        ValueError: for a static cache, which cannot get an extra layer.
    """
    if cache is None:
        return states
    if cache.is_compileable:
        raise ValueError(
            "this routing stores what earlier tokens chose, for which a static cache has no room: use a dynamic cache "
            "(leave cache_implementation unset)."
        )
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    return cache.layers[layer].update(states[:, None], states[:, None, :, :0])[0][:, 0]


def softmax_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the softmax of logits (T, E), as scores and as probabilities."""
    probs = logits.softmax(dim=-1)
    return probs, probs


def sigmoid_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sigmoid of logits (T, E) as scores, and scores normalised to sum 1 as probabilities.

    DeepSeek-V3 (arXiv:2412.19437, eq. 15).
    """
    scores = logits.sigmoid()
    return scores, renormalise(scores)


def sqrt_softplus_scores(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `sqrt(softplus(logits))` (T, E) as scores, and scores normalised to sum 1 as probabilities (DeepSeek-V4)."""
    scores = nn.functional.softplus(logits).sqrt()
    return scores, renormalise(scores)


# scoring_func -> function from logits (T, E) to scores (T, E) and probabilities (T, E)
SCORING_FUNCS = {"softmax": softmax_scores, "sigmoid": sigmoid_scores, "sqrtsoftplus": sqrt_softplus_scores}


def fp32_linear(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes `tokens @ weight.T + bias` in fp32, or in fp64 for fp64 tokens, also under autocast."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with maybe_autocast(tokens.device.type, enabled=False):
        return nn.functional.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def router_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a router's tensors in a model of `dtype`: fp32, or fp64 in an fp64 model.

    Under DeepSpeed it is `dtype`: DeepSpeed demands one dtype for all weights, and steps fp32 copies of them.
    """
    if not dtype.is_floating_point or deepspeed_config() is not None:
        return dtype
    return torch.promote_types(dtype, torch.float32)


def renormalise(weight: torch.Tensor) -> torch.Tensor:
    """Divides weights (T, K) by their sum; weights that are all 0 stay 0, since sigmoid scores can underflow to 0."""
    return weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)


def dense_gradient(experts: nn.Module, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns zeros (T, H) whose gradient reaches the weights (T, E) as if every expert were computed, and nothing else.

    It is DenseMixer's straight-through estimator (Yao et al. 2025, "DenseMixer: improving MoE post-training with precise
    router gradient"), and costs E / K times the experts' forward.
    """
    index = torch.arange(weight.shape[-1], device=weight.device).expand_as(weight)
    output = experts(hidden_states.detach(), index, weight, frozen=True)
    return output - output.detach()


class Router(nn.Module):
    """Base class of all routers: a linear gate (E + Z, H) and a scoring function. Subclasses implement `select`.

    A subclass overrides the methods in which it differs, but never `forward`, and sets the class variables by which the
    configuration knows its properties.
    """

    # whether a token's routing never depends on later tokens or other sequences, in training and in evaluation
    causal: ClassVar[bool] = True
    # whether a token's routing depends on no other token in evaluation
    per_token: ClassVar[bool] = True
    # whether the number of experts differs between tokens
    variable_k: ClassVar[bool] = False
    # whether the router reads what the router of the sparse layer before has passed on
    carries: ClassVar[bool] = False
    # whether the logits and the probabilities have a gradient; the training loss leaves out losses of routers without one
    differentiable: ClassVar[bool] = True
    # whether each token uses all experts, whatever `num_experts_per_tok` is
    uses_all_experts: ClassVar[bool] = False
    # value of `norm_topk_prob` if the configuration gives none
    norm_topk_prob_default: ClassVar[bool] = True
    # fields declared with `by_router` that the router reads; the configuration refuses others that differ from their defaults
    reads: ClassVar[frozenset[str]] = FRAME_READS | CAPACITY_READS
    # argument of the model's forward that the router requires, beside the tokens
    required_input: ClassVar[str | None] = None
    # controller that the router requires, a key of `modeling_moe.router_balancing.CONTROLLERS`
    default_controller: ClassVar[str | None] = None

    def __init__(self, config: Any, layer_idx: int = 0):
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
        self.logit_scale, self.logit_cap = config.router_logit_scale, config.router_logit_softcapping
        self.norm_eps = config.rms_norm_eps
        self.input_scale = self._scale("router_input_norm", config.router_input_norm, config.hidden_size)
        self.expert_scale = self._scale("router_expert_scale", config.router_expert_scale, self.num_outputs)

    def _scale(self, field: str, wanted: bool, size: int) -> nn.Parameter | None:
        """Returns a new learned scale (size,); None if it is not wanted, or only another layer's router reads its field."""
        return nn.Parameter(torch.empty(size)) if wanted and field in self.reads else None

    @classmethod
    def validate(cls, config: Any) -> None:
        """Checks a configuration that chooses this router.

        Raises:
            ValueError: if the router cannot serve the configuration; the message names the field and the remedy.
        """

    def init_weights(self, std: float) -> None:
        """Fills the parameters and buffers of a new model."""
        init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)
        for scale in (self.input_scale, self.expert_scale):
            if scale is not None:
                init.ones_(scale)

    def resize_vocabulary(self, vocab_size: int) -> None:
        """Adapts the router to token ids below `vocab_size`; a router that reads no ids does nothing."""

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext | None = None) -> Routing:
        """Routes tokens (T, H).

        The block calls no other method of the gate in a pass, because PEFT and offloading wrap `forward` alone.
        """
        routing = self.decide(hidden_states, context or RoutingContext())
        if self.training and self.gradient == "dense":
            routing = routing._replace(mixture=self.dense_weight(routing))
        return routing

    def decide(self, hidden_states: torch.Tensor, context: RoutingContext) -> Routing:
        """Returns the routing of tokens (T, H)."""
        return self.route(self.logits(hidden_states, context), context)

    def logits(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Returns the router logits (T, E + Z) of tokens (T, H)."""
        logits = self.project(hidden_states, context)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.logit_cap is None else (logits / self.logit_cap).tanh() * self.logit_cap

    def project(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Returns the router logits (T, E + Z) of tokens (T, H) before `router_logit_scale` and `router_logit_softcapping`."""
        return fp32_linear(self.jittered(self.normed(hidden_states)), self.weight, self.bias)

    def normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns tokens (T, H) as the gate reads them: in fp32, normed and scaled with `router_input_norm`, else unchanged."""
        if self.input_scale is None:
            return hidden_states
        states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        states = states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + self.norm_eps)
        return states * (self.input_scale.to(states.dtype) * states.shape[-1] ** -0.5)

    def jittered(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Multiplies tokens (T, H) by the noise of `router_jitter_noise` in training."""
        if not self.training or self.jitter_noise <= 0:
            return hidden_states
        return hidden_states * torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)

    def route(self, logits: torch.Tensor, context: RoutingContext) -> Routing:
        """Returns the routing for router logits (T, E + Z)."""
        scores, probs = self.score(logits)
        with torch.no_grad():
            index = self.select(self.ranking(scores, logits), context)  # (T, K)
        return Routing(logits, self.weigh(scores, index), index, probs)

    def score(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scores (T, E + Z) that choose and weigh the experts, and probabilities (T, E + Z) of sum 1."""
        return SCORING_FUNCS[self.scoring_func](logits)

    def ranking(self, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Returns the numbers (T, E + Z) by which `select` chooses: the scores."""
        return scores

    def select(self, scores: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Chooses experts (T, K) by scores (T, E + Z), without gradient; the id `num_outputs` is an empty assignment."""
        raise NotImplementedError

    def weigh(self, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Returns the weights (T, K) of the chosen experts, 0 in an empty assignment and for a null expert."""
        weight = scores.gather(-1, index.clamp(max=self.num_outputs - 1))
        if self.variable_k or self.num_null:
            copies = (index >= self.num_experts + self.num_null) & (index < self.num_outputs)
            weight = weight.where((index < self.num_experts) | copies, 0.0)
        if self.norm_topk_prob:
            weight = renormalise(weight)
        return self.scaled(weight, index)

    def scaled(self, weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Multiplies the weights (T, K) of experts `index` by `routed_scaling_factor` and by the experts' learned factors."""
        weight = weight * self.scaling
        if self.expert_scale is None:
            return weight
        factor = self.expert_scale.to(weight.dtype).expand(len(index), -1)
        return weight * factor.gather(-1, index.clamp(max=self.num_outputs - 1))

    def dense_weight(self, routing: Routing) -> torch.Tensor:
        """Returns the weights (T, E + Z) that a token would have with every expert, for `router_gradient="dense"`."""
        scores = routing.probs if self.norm_topk_prob else self.score(routing.logits)[0]
        return self.scaled(scores, torch.arange(self.num_outputs, device=scores.device).expand_as(scores))

    @staticmethod
    def mix(
        experts: nn.Module, hidden_states: torch.Tensor, routing: Routing, context: RoutingContext, config: Any
    ) -> torch.Tensor:
        """Runs the experts and returns the weighted sum (T, H) of the chosen experts' outputs; a copy expert returns the token.

        The method is static: it reads nothing of the router but the routing.

        Args:
            experts: module that is called as [`~modeling_moe.modeling_moe.MoEExperts`] is, and not used otherwise.
            hidden_states: (T, H).
            routing: routing of the tokens, after capacity.
            context: context of the tokens.
            config: the model's configuration.
        """
        index, weight = routing.index, routing.weight
        real = index < config.num_experts
        if config.num_copy_experts:
            # some of transformers' experts functions recognise an empty assignment by the weight 0
            weight = weight.where(real, 0.0)
        if getattr(experts, "num_experts", config.num_experts) < config.num_experts:
            # transformers' expert parallelism has no empty assignment: expert 0 gets the token, with weight 0
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

    @property
    def adds_loss(self) -> bool:
        """Says whether this router adds a loss of its own in training."""
        return type(self).auxiliary_loss is not Router.auxiliary_loss

    def auxiliary_loss(self, routing: Routing, token_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a scalar that this router adds to the training loss, weight included; None if it adds no loss."""

    @property
    def kept_in_fp32(self) -> set[str]:
        """Returns the names of the parameters and buffers that stay fp32 when the model has another floating dtype."""
        if router_dtype(torch.bfloat16) != torch.float32:
            return set()
        return {name for name, tensor in self.state_dict().items() if tensor.is_floating_point()}

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Keeps weights and buffers in fp32 or fp64 when the model is cast.

        In bf16 a small update of a weight or of the selection bias is lost: 0.5 + 0.001 = 0.5.
        """

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == router_dtype(moved.dtype) else tensor.to(moved.device, torch.float32)

        return super()._apply(kept, recurse)
