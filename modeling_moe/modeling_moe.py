# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module defines the decoder, in the order in which a token passes through it.

# B rows, S tokens per row, T = B*S tokens, H hidden, I expert width, E experts, K choices per token
ids -> embed -> [decoder layer] x L -> norm -> lm_head
decoder layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))     mlp: MoEBlock or MoEMLP, by config.mlp_layer_types
                (model_layer.py; norms before, after or both, by config.norm_placement)
MoEBlock:       routing = capacity(gate(tokens));  y = experts(tokens, routing.index, routing.weight) + shared_experts(tokens)
training:       loss = cross entropy + sum of (coefficient * router loss), the mean over sparse layers
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import AttentionBase
from .attention_catalogue import attention_support
from .attention_latent import MoELatentAttention
from .checkpoint_layout import register_expert_layout
from .compatibility import CACHE_NAMES, cache_keyword, is_paged, one_cache, refuse_unknown
from .configuration_moe import MoEConfig
from .model_checkpoints import CheckpointModel
from .model_embeddings import RotaryEmbeddings, ScaledEmbedding
from .model_experts import (
    ExpertParameters,
    StackedExperts,
    default_experts,
    detached_parameters,
    init_experts,
    merged_parameters,
)
from .model_generation import MoEGenerationMixin
from .model_inputs import loss_weights, prepare_inputs, token_embeddings
from .model_layer import MoEDecoderLayer
from .model_mlp import MoEMLP, OutputBias
from .model_norms import init_norm, make_norm
from .model_outputs import MoECausalLMOutput, MoEModelOutput, record_router_logits, router_recorders
from .router import Router, RoutingContext
from .router_balancing import KindTotals, RouterTotals, update_routers
from .router_block import Routed
from .router_catalogue import router_class
from .router_kinds import KINDS, slots
from .router_losses import COEFFICIENTS, AttachLoss, TokenWeights, loss_share, predicts_label
from .router_statistics import RouterStatistics, Statistics, layer_statistics, model_statistics, unpack


# transformers looks for this decorator in the text of the file that defines the models
@use_experts_implementation
class ExpertsBase(StackedExperts):
    """Routed experts in plain PyTorch, by which every other implementation is tested.

    Experts with a gate have `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I); experts without a gate have
    `up_proj` (E, I, H) and `down_proj`. With biases there are `gate_up_proj_bias` (E, 2I) or `up_proj_bias` (E, I), and
    `down_proj_bias` (E, H). H is `moe_latent_size` if that is set, else `hidden_size`.
    """

    if TYPE_CHECKING:

        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            """The decorator of transformers adds this method."""
            raise NotImplementedError

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        hidden, width = config.moe_latent_size or config.hidden_size, config.moe_intermediate_size
        self.up_name, rows = ("gate_up_proj", 2 * width) if config.gated_experts else ("up_proj", width)
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(self.num_experts, rows, hidden)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        if config.mlp_bias:
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Computes the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers, expert ids; `num_experts` and above mark an empty assignment.
            top_k_weights: (T, K) factors on the experts' outputs.

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        # one unbind: with an index per expert, each backward would fill a gradient of the whole tensor
        up, down = getattr(self, self.up_name).unbind(0), self.down_proj.unbind(0)
        output, top_k_index = torch.zeros_like(hidden_states), top_k_index.long()
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            if len(token) == 0:
                continue
            up_bias = getattr(self, f"{self.up_name}_bias")[expert] if self.has_bias else None
            down_bias = self.down_proj_bias[expert] if self.has_bias else None
            states = nn.functional.linear(hidden_states[token], up[expert], up_bias)
            states = self._apply_gate(states) if self.has_gate else self.act_fn(states)
            states = nn.functional.linear(states, down[expert], down_bias)
            states = states * top_k_weights[token, choice, None]
            output = output.index_add(0, token, states.to(output.dtype))
        return output


class MoEExperts(ExpertsBase):
    """Routed experts, computed by the implementation that `config._experts_implementation` names."""

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        # transformers' decorator sets these two for the class; here they follow the configuration
        self.has_gate, self.has_bias = config.gated_experts, config.mlp_bias
        self.gate_clamp = None
        if config.swiglu_limit is not None:
            alpha = config.swiglu_alpha
            self.gate_clamp = (None if alpha is None else float(alpha), float(config.swiglu_limit))
        # transformers' experts functions skip out-of-range ids only if this flag is set, and the flag costs a masking pass
        self._is_expert_parallel = config.has_empty_slots

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gates: torch.Tensor | None = None,
        frozen: bool = False,
    ) -> torch.Tensor:
        """Computes the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers, expert ids; `num_experts` and above mark an empty assignment.
            top_k_weights: (T, K) factors on the experts' outputs.
            gates: (G, E) weights by which the E experts are merged into G experts, of which the ids are then; None without.
            frozen: whether the experts' weights get no gradient.

        Returns:
            (T, H) in the dtype of `hidden_states`.

        Raises:
            ValueError: for `gates` with LoRA on the experts and dropout, which a merged weight cannot have.
        """
        experts = self
        if gates is not None:
            experts = self._with(merged_parameters(self, gates), len(gates))
        elif frozen:
            experts = self._with(detached_parameters(self), self.num_experts)
        return ExpertsBase.forward(experts, hidden_states, top_k_index, top_k_weights)

    def _with(self, parameters: ExpertParameters, num_experts: int) -> "MoEExperts":
        """Returns experts that compute with other parameters, tensors through which gradients flow."""
        experts = MoEExperts.__new__(MoEExperts)
        experts.__dict__.update(self.__dict__, _parameters=parameters.weights, low_rank=parameters.low_rank)
        experts.num_experts = num_experts
        return experts

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Maps (R, 2I), gate first, to (R, I): `act(gate) * up`, clamped with `swiglu_limit`, or gpt-oss's clamped gate."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.gate_clamp is None:
            return self.act_fn(gate) * up
        alpha, limit = self.gate_clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if alpha is None:
            return self.act_fn(gate) * up
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class MoEBlock(Routed, nn.Module):
    """A sparse feed-forward network: the router chooses experts for each token, and shared experts see every token."""

    def __init__(self, config: MoEConfig, layer_idx: int = 0):
        super().__init__()
        self.config = config
        router = router_class(config, layer_idx)
        self.add_router(router, config, layer_idx, controlled=layer_idx >= config.num_hash_layers)
        self.mix = router.mix
        self.experts = MoEExperts(config)
        # Nemotron-H's names
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if (latent := config.moe_latent_size) is not None:
            self.fc1_latent_proj = nn.Linear(config.hidden_size, latent, bias=config.mlp_bias)
            self.fc2_latent_proj = nn.Linear(latent, config.hidden_size, bias=config.mlp_bias)
        self.shared_experts = self.shared_expert_gate = None
        if config.has_shared_experts:
            self.shared_experts = MoEMLP(config, config.shared_expert_intermediate_size, config.gated_experts)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        self.output_bias = OutputBias(config.hidden_size) if config.moe_output_bias else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: RoutingContext | None = None,
        token_weights: TokenWeights | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None, torch.Tensor | None]:
        """Maps (B, S, H) to (B, S, H).

        Returns:
            The output, the router's statistics if `token_weights` is given, else None, and what the router passes on to the
            next sparse layer (T, N), or None.
        """
        context = context or RoutingContext(hidden_states.shape[0])
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        chosen, routing = self.route(tokens, context)
        latents = tokens if self.fc1_latent_proj is None else self.fc1_latent_proj(tokens)
        output = self.mix(self.experts, latents, routing, context, self.config)
        if self.fc2_latent_proj is not None:
            output = self.fc2_latent_proj(output)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
            output = output + shared
            if self.config.shared_expert_combination_strategy == "average":
                output = output / 2
        output = self.output_bias(output).view_as(hidden_states)
        if token_weights is None:
            return output, None, chosen.carried
        return output, layer_statistics(self, chosen, routing, context, token_weights), chosen.carried


def feed_forward(config: MoEConfig, layer_idx: int) -> MoEBlock | MoEMLP:
    """Makes the feed-forward network of a layer, sparse or dense by `config.mlp_layer_types`."""
    if config.mlp_layer_types[layer_idx] == "sparse":
        return MoEBlock(config, layer_idx)
    return MoEMLP(config, config.intermediate_size, config.gated_mlp)


class MoEPreTrainedModel(CheckpointModel):
    """Base class of all models: how transformers initialises, splits, records and compiles them."""

    # transformers annotates the base class of configurations, and its own models narrow it in this way
    config: MoEConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # and the router logits
    _can_record_outputs = {
        "hidden_states": MoEDecoderLayer,
        "attentions": [AttentionBase, MoELatentAttention],
    }

    def __init__(self, config: MoEConfig, *args, **kwargs):
        # a field may have been assigned after the configuration was checked
        config.validate()
        for name, supported in attention_support(config).items():
            setattr(self, name, supported)
        self._can_record_outputs = (type(self)._can_record_outputs or {}) | router_recorders(config)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        if init_norm(module):
            return
        super()._init_weights(module)
        if isinstance(module, StackedExperts):
            init_experts(module, self.config.initializer_range)
        elif isinstance(module, (Router, AttentionBase, OutputBias)):
            module.init_weights(self.config.initializer_range)
        elif isinstance(module, KindTotals):
            for buffer in module.buffers():
                init.zeros_(buffer)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Chooses the experts implementation as transformers does, whose default is this package's if it is imported."""
        if requested_experts is None:
            requested_experts = default_experts(self.config)
        return super().get_correct_experts_implementation(requested_experts)

    def update_routers(self) -> None:
        """Steps the routers' controllers: call it once after each optimizer step.

        [`~modeling_moe.router_balancing.update_routers`] does the work.
        """
        update_routers(self)


class MoEModel(MoEPreTrainedModel):
    """The decoder without a head.

    The arguments of `forward`:
        input_ids: (B, S) int64 token ids; exactly one of `input_ids` and `inputs_embeds` is given.
        attention_mask: (B, S), 0 at padding; or another mask that transformers' mask functions accept, such as bool
            (B, 1, S, S'), true where a token attends, with which the routers treat every token as real.
        position_ids: (B, S) or (1, S) int64. A restart begins a new sequence of a packed row; each sequence is routed by
            itself, except that `base_layer` and `sinkhorn` in training assign the tokens of the whole batch together.
            `cu_seq_lens_q`, which FlashAttention reads, marks sequences too.
        cache: key-value cache with earlier tokens; `past_key_values` is another name for it.
        inputs_embeds: (B, S, H) embeddings of the tokens.
        use_cache: whether to return a cache.
        output_router_logits: whether to return the router logits (T, E), the load-balancing loss and the experts' load.
        attach_router_loss: whether the router losses reach the gradient in training through the hidden states, whatever
            loss the caller computes from them; a caller that adds `router_loss` sets it to False.
        label_mask: (B, S), true where a token predicts a label. A sequence's weight in the router losses is its number of
            labels; without `label_mask` all sequences have the same weight.
        task_ids: (B,) or (B, S) int64, task of each sequence or token, for the routers that need it.

    `forward` raises ValueError for embeddings with a NaN, for `task_ids` of another shape, and if continuous batching
    would change the model's output; it raises TypeError for a keyword argument that nothing reads.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        embedding = ScaledEmbedding if config.scale_embeddings else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        learned = config.position_embedding_type == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(
            MoEDecoderLayer(config, i, feed_forward(config, i)) for i in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config, eps=config.final_norm_eps)
        self.rotary_emb = RotaryEmbeddings(config)
        self.gradient_checkpointing = False
        self.slots = slots(config)
        # kinds of routers whose losses have a gradient
        self.learned_kinds = frozenset(
            kind for kind in self.slots if any(part.router.differentiable for part in self.routed_modules(kind))
        )
        self.carries = router_class(config).carries
        self.router_totals = RouterTotals(
            {kind: (KINDS[kind].view(config), len(self.routed_modules(kind))) for kind in self.slots}
        )
        self._keep_in_fp32_modules_strict = {
            f"{KINDS[kind].gate}.{name}"
            for kind in self.slots
            for module in self.routed_modules(kind)
            for name in module.gate.kept_in_fp32
        }
        # factor that a trainer puts on attached router losses, such as 1 / gradient accumulation steps
        self.router_loss_scale = 1.0
        self.post_init()

    @property
    def has_router_losses(self) -> bool:
        """Says whether any router loss has a coefficient and a gradient."""
        routed = [(kind, module) for kind in self.slots for module in self.routed_modules(kind)]
        if any(module.router.adds_loss for _, module in routed):
            return True
        learned = [module.routing_config for kind, module in routed if kind in self.learned_kinds]
        return any(getattr(config, name) > 0 for config in learned for name in COEFFICIENTS.values())

    def sparse_blocks(self) -> list[MoEBlock]:
        """Returns the sparse feed-forward networks, from the first layer to the last."""
        return self.routed_modules("mlp")

    def routed_modules(self, kind: str) -> list[Any]:
        """Returns the modules with routers of a kind of [`~modeling_moe.router_kinds.KINDS`], from the first layer to the last."""
        # by attributes: a layer may be wrapped
        layers: Any = self.layers
        return [module for layer in layers for module in KINDS[kind].routed(layer)]

    @record_router_logits
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        attach_router_loss: bool = True,
        label_mask: torch.Tensor | None = None,
        task_ids: torch.LongTensor | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoEModelOutput:
        """Runs the decoder; the docstring of the class explains the arguments."""
        cache = one_cache(self, cache, past_key_values)
        refuse_unknown(self, kwargs)
        if is_paged(cache):
            self.config.refuse_continuous_batching(self.training)
        embeds = token_embeddings(self.embed_tokens, input_ids, inputs_embeds, self.training)
        inputs = prepare_inputs(
            self.config,
            embeds,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            task_ids=task_ids,
            cu_seq_lens=kwargs.get("cu_seq_lens_q"),
        )
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        measured = self.training or output_router_logits
        token_weights = loss_weights(embeds, inputs.context, label_mask) if measured else None
        hidden_states = self._embed(embeds, inputs.position_ids)
        position_embeddings = self.rotary_emb.for_each_type(hidden_states, inputs.position_ids)

        statistics: Statistics = {}
        carried = None
        # as in transformers, `layers` may be cut after the model was made
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=False):
            output = layer(
                hidden_states,
                carried,
                attention_mask=inputs.attention_masks[layer_type],
                position_ids=inputs.position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings[layer_type],
                routing_context=inputs.context,
                token_weights=token_weights,
                **cache_keyword(inputs.cache),
                **kwargs,
            )
            hidden_states, carried, of_layer = unpack(output, self.slots, self.carries)
            for kind, found in of_layer.items():
                statistics.setdefault(kind, []).extend(found)

        hidden_states = self.norm(hidden_states)
        routers = model_statistics(self, statistics)
        if attach_router_loss and routers.router_loss is not None:
            hidden_states = AttachLoss.apply(hidden_states, self.router_loss_scale * routers.router_loss)
            routers = routers._replace(router_loss=None)
        return MoEModelOutput(last_hidden_state=hidden_states, **cache_keyword(inputs.cache), **routers._asdict())

    def _embed(self, states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Returns the input (B, S, H) of the first layer: the embeddings, scaled, with positions and dropout."""
        if self.config.embedding_multiplier != 1.0:
            states = states * self.config.embedding_multiplier
        if self.embed_positions is not None:
            states = states + self.embed_positions(position_ids)
        if self.config.embd_pdrop:
            states = nn.functional.dropout(states, self.config.embd_pdrop, self.training)
        return states


class MoEForCausalLM(MoEPreTrainedModel, MoEGenerationMixin):
    """The decoder with a language-model head.

    With labels, `loss` is the cross entropy plus the weighted router losses in training, and the cross entropy alone in
    evaluation. Without labels the router losses reach the gradient through the hidden states.
    """

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    # transformers annotates pairs of strings, and reads pairs of lists
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyrefly: ignore[bad-assignment]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.model = MoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        task_ids: torch.LongTensor | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoECausalLMOutput:
        """Runs the decoder and the head; [`MoEModel`] explains the arguments that it shares.

        Args:
            labels: (B, S) token ids to predict, which are shifted here; -100 is ignored.
            logits_to_keep: number of last positions whose logits (B, kept, V) are computed, 0 for all positions; or a tensor
                of positions.
        """
        cache = one_cache(self, cache, past_key_values)
        refuse_unknown(self, kwargs)
        outputs: MoEModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=(
                self.config.output_router_logits if output_router_logits is None else output_router_logits
            ),
            attach_router_loss=labels is None,
            label_mask=None if labels is None else predicts_label(labels, **kwargs),
            task_ids=task_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = outputs.last_hidden_state
        assert states is not None  # optional in transformers' class only
        logits = self._head(states[:, kept])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            if outputs.router_loss is not None:
                loss = loss + loss_share(labels.to(loss.device), **kwargs) * outputs.router_loss.to(loss.device)

        return MoECausalLMOutput(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            expert_load=outputs.expert_load,
            dropped_share=outputs.dropped_share,
            attention_expert_load=outputs.attention_expert_load,
            attention_router_logits=outputs.attention_router_logits,
            depth_load=outputs.depth_load,
            depth_router_logits=outputs.depth_router_logits,
            **cache_keyword(outputs.cache),
        )

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps hidden states (B, S, H) to logits (B, S, V)."""
        logits = self.lm_head(hidden_states)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        if (softcap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits


# The heads below make a MoEModel: transformers' generic heads look the decoder up in the auto classes, where a process that
# runs this file from a checkpoint does not find it.


class MoEForSequenceClassification(GenericForSequenceClassification, MoEPreTrainedModel):
    """The decoder with a linear head on each sequence's last token."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MoEConfig):
        MoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MoEModel(config)
        assert config.num_labels is not None  # optional in transformers' annotation only
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class MoEForTokenClassification(GenericForTokenClassification, MoEPreTrainedModel):
    """The decoder with a linear head on each token."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: MoEConfig):
        MoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MoEModel(config)
        self.dropout = nn.Dropout(0.1)
        assert config.num_labels is not None  # optional in transformers' annotation only
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MoEForQuestionAnswering(GenericForQuestionAnswering, MoEPreTrainedModel):
    """The decoder with a linear head for the first and the last token of an answer."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: MoEConfig):
        MoEPreTrainedModel.__init__(self, config)
        self.model = MoEModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


MODELS = (
    MoEModel,
    MoEForCausalLM,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEForQuestionAnswering,
)
register_expert_layout(MoEConfig.model_type)
# the label smoothing of `Trainer` shifts the labels for the classes named here alone
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoEConfig.model_type] = MoEForCausalLM.__name__

__all__ = ["MoEPreTrainedModel", *(model.__name__ for model in MODELS)]
