# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The decoder, in the order a token passes it.

# B batch, S sequence, T = B*S tokens, H hidden, I expert width, E experts, K experts per token
ids -> embed -> [decoder layer] x L -> norm -> lm_head
decoder layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))     mlp: MoEBlock or MoEMLP, by config.mlp_layer_types
                (norms before, after or both, by config.norm_placement)
MoEBlock:       routing = capacity(gate(tokens));  y = experts(tokens, routing.index, routing.weight) + shared_experts(tokens)
training:       loss = cross entropy + sum of (coefficient * router loss), the mean over sparse layers
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import MoEAttention
from .attention_latent import MoELatentAttention
from .checkpoint_code import name_own_router, own_classes, save_own_code, warn_of_other_class
from .checkpoint_damage import refuse_damaged
from .checkpoint_layout import fill_experts, register_expert_layout
from .compatibility import (
    CACHE_NAMES,
    GenerationInputs,
    __version__,
    cache_keyword,
    is_paged,
    refuse_unknown,
    takes_cache,
    warn_of_old_code,
)
from .configuration_moe import MoEConfig
from .model_embeddings import RotaryEmbeddings, ScaledEmbedding
from .model_norms import PLACEMENTS, init_norm, make_norm
from .model_outputs import MoECausalLMOutput, MoEModelOutput, detach_router_logits
from .model_packing import find_beginnings
from .router import Router, Routing, RoutingContext, router_dtype
from .router_balancing import CONTROLLERS, RouterTotals, update_routers, warn_of_unused
from .router_capacity import Capacity
from .router_catalogue import router_class
from .router_losses import COEFFICIENTS, AttachLoss, TokenWeights, loss_share, predicts_label, weigh_tokens
from .router_statistics import RouterStatistics, layer_statistics, model_statistics, pack, unpack


class MoEMLP(nn.Module):
    """Feed-forward network of a dense layer, and of the shared experts."""

    def __init__(self, config: MoEConfig, intermediate_size: int, gated: bool):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias) if gated else None
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., H) to (..., H)."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_experts_implementation
class ExpertsBase(nn.Module):
    """The routed experts' weights, one tensor for all experts, and the eager forward that is every backend's oracle.

    Gated: `gate_up_proj` (E, 2I, H), gate first, and `down_proj` (E, H, I); not gated: `up_proj` (E, I, H). With
    biases: `gate_up_proj_bias` (E, 2I) or `up_proj_bias` (E, I), and `down_proj_bias` (E, H).
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.up_name, rows = ("gate_up_proj", 2 * width) if config.gated_experts else ("up_proj", width)
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(self.num_experts, rows, hidden)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        if config.mlp_bias:
            self.register_parameter(f"{self.up_name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        # `Trainer` resumes by `load_state_dict`, which knows nothing of the layout on disk
        missing, errors = fill_experts(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys.extend(missing)
        error_msgs.extend(errors)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sums the chosen experts' outputs.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) expert ids; `num_experts` and above mark an empty slot.
            top_k_weights: (T, K) factors on the experts' outputs.

        Returns:
            (T, H) in the dtype of `hidden_states`.
        """
        # one unbind: indexing expert by expert would make each backward fill the whole tensor
        up, down = getattr(self, self.up_name).unbind(0), self.down_proj.unbind(0)
        output, top_k_index = torch.zeros_like(hidden_states), top_k_index.long()
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if len(token) == 0:
                continue
            up_bias = getattr(self, f"{self.up_name}_bias")[expert] if self.has_bias else None
            down_bias = self.down_proj_bias[expert] if self.has_bias else None
            states = nn.functional.linear(hidden_states[token], up[expert], up_bias)
            states = self._apply_gate(states) if self.has_gate else self.act_fn(states)
            states = nn.functional.linear(states, down[expert], down_bias)
            states = states * top_k_weights[token, slot, None]
            output = output.index_add(0, token, states.to(output.dtype))
        return output


class MoEExperts(ExpertsBase):
    """The routed experts, their forward chosen by `config._experts_implementation`."""

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        # transformers' decorator sets these for the class; here they are the config's
        self.has_gate, self.has_bias = config.gated_experts, config.mlp_bias
        limit = config.swiglu_limit
        self.gate_clamp = None if limit is None else (float(config.swiglu_alpha), float(limit))
        # under this flag alone transformers' functions skip ids beyond the last expert, at some cost
        self._is_expert_parallel = config.has_empty_slots

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        gates: torch.Tensor | None = None,
        frozen: bool = False,
    ) -> torch.Tensor:
        """Sums the chosen experts' outputs; arguments as of [`ExpertsBase`], and:

        Args:
            gates: (G, E); where given there are G experts, whose weights are these means of the E experts' weights.
            frozen: lets no gradient reach the experts' weights.

        Raises:
            ValueError: for `gates` under LoRA on the experts with dropout, which merged weights cannot have.
        """
        experts = self if gates is None and not frozen else self._changed(gates)
        return ExpertsBase.forward(experts, hidden_states, top_k_index, top_k_weights)

    def _changed(self, gates: torch.Tensor | None) -> "MoEExperts":
        """Experts whose weights are means of these by gates (G, E), or these without gradient."""
        # `modeling_moe.lora` leaves the factors of its updates here
        updates: dict[str, Any] = self.__dict__.get("low_rank", {})
        names = [self.up_name, "down_proj", *([f"{self.up_name}_bias", "down_proj_bias"] if self.has_bias else [])]
        # read as attributes: PEFT and quantizers put what they compute in a parameter's place
        weights = {name: getattr(self, name) for name in names}
        if gates is None:
            weights = {name: weight.detach() for name, weight in weights.items()}
            updates = {name: x._replace(a=x.a.detach(), b=x.b.detach()) for name, x in updates.items()}
        else:
            for name, update in updates.items():
                if update.dropout:
                    raise ValueError("router_type='lory' merges the experts' weights: set lora_dropout to 0.")
                weights[name] = weights[name] + update.scaling * (update.b @ update.a).to(weights[name].dtype)
            weights = {name: torch.tensordot(gates.to(w.dtype), w, dims=1) for name, w in weights.items()}
            updates = {}
        changed = MoEExperts.__new__(MoEExperts)
        changed.__dict__.update(self.__dict__, _parameters=weights, low_rank=updates)
        if gates is not None:
            changed.num_experts = len(gates)
        return changed

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """From (R, 2I), the gate first, to (R, I): `act(gate) * up`, or gpt-oss's clamped gate."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.gate_clamp is None:
            return self.act_fn(gate) * up
        alpha, limit = self.gate_clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))


class MoEBlock(nn.Module):
    """Sparse feed-forward network: each token passes the experts its router chooses, and the shared ones."""

    def __init__(self, config: MoEConfig, layer_idx: int = 0):
        super().__init__()
        self.config = config
        router = router_class(config, layer_idx)
        self.gate, self.mix = router(config, layer_idx), router.mix
        # transformers makes a model in the dtype it is to have
        if (dtype := router_dtype(torch.get_default_dtype())) != torch.get_default_dtype():
            self.gate.to(dtype)
        self.capacity = Capacity(config, layer_idx)
        self.experts = MoEExperts(config)
        self.shared_experts = self.shared_expert_gate = None
        if config.has_shared_experts:
            self.shared_experts = MoEMLP(config, config.shared_expert_intermediate_size, config.gated_experts)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)
        name = config.controller
        self.controller = None if name is None or layer_idx < config.num_hash_layers else CONTROLLERS[name]

    @property
    def router(self) -> Router:
        """The router itself, where PEFT has put a layer of its own in the gate's place."""
        router: Any = self.gate
        while not hasattr(router, "auxiliary_loss"):
            router = router.base_layer
        return router

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: RoutingContext | None = None,
        token_weights: TokenWeights | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """Maps (B, S, H) to (B, S, H), and measures the router where the tokens' weights in the losses are given."""
        context = context or RoutingContext(hidden_states.shape[0])
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        # what wraps or hooks a gate may hand on a plain tuple
        chosen = Routing(*self.gate(tokens, context))
        routing = self.capacity(chosen, context, self.training)
        output = self.mix(self.experts, tokens, routing, context, self.config)
        if self.shared_expert_gate is not None:
            output = output + self.shared_expert_gate(tokens).sigmoid() * self.shared_experts(tokens)
        elif self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        output = output.view_as(hidden_states)
        if token_weights is None:
            return output, None
        return output, layer_statistics(self, chosen, routing, context, token_weights)


class MoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense or a sparse feed-forward network, each added to the stream.

    The norms stand before or after them, or both, by `config.norm_placement`; with `"parallel"` both networks see the
    layer's input.
    """

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__()
        self.is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        attention = MoEAttention if config.kv_lora_rank is None else MoELatentAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = (
            MoEBlock(config, layer_idx)
            if self.is_sparse
            else MoEMLP(config, config.intermediate_size, config.gated_mlp)
        )
        self.parallel = config.norm_placement == "parallel"
        self.norm_names = PLACEMENTS[config.norm_placement]
        for name in self.norm_names:
            if name is not None:
                setattr(self, name, make_norm(config))
        self.resid_pdrop, self.residual_multiplier = config.resid_pdrop, config.residual_multiplier

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        routing_context: RoutingContext | None = None,
        token_weights: TokenWeights | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, ...]:
        """Maps (B, S, H) to (B, S, H), packed with the router's statistics ([`~modeling_moe.router_statistics.pack`])."""
        before_attention, after_attention, before_mlp, after_mlp = self.norm_names
        attended, _ = self.self_attn(
            hidden_states=self._normed(before_attention, hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        attended = self._update(self._normed(after_attention, attended))
        residual = hidden_states if self.parallel else hidden_states + attended
        statistics = None
        states = self._normed(before_mlp, residual)
        if self.is_sparse:
            # the layer's own argument: checkpointing in training takes the cache away
            context = (routing_context or RoutingContext(len(states)))._replace(cache=cache)
            states, statistics = self.mlp(states, context, token_weights)
        else:
            states = self.mlp(states)
        states = self._update(self._normed(after_mlp, states))
        # in GPT-NeoX's order, which tells in bf16
        hidden_states = (states + attended) + residual if self.parallel else residual + states
        return pack(hidden_states, statistics)

    def _normed(self, name: str | None, states: torch.Tensor) -> torch.Tensor:
        return states if name is None else getattr(self, name)(states)

    def _update(self, states: torch.Tensor) -> torch.Tensor:
        """What a network adds to the stream."""
        if self.resid_pdrop:
            states = nn.functional.dropout(states, self.resid_pdrop, self.training)
        return states if self.residual_multiplier == 1.0 else states * self.residual_multiplier


class MoEPreTrainedModel(PreTrainedModel):
    """What all MoE models share: how transformers initialises, saves, splits, records and compiles them."""

    config: MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": MoEDecoderLayer,
        "attentions": [MoEAttention, MoELatentAttention],
    }

    def __init__(self, config: MoEConfig, *args, **kwargs):
        # a field may have been assigned since the configuration was made
        config.validate()
        # torch's own attention function knows neither
        self._supports_sdpa = config.attn_logit_softcapping is None and not config.attention_sinks
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        if init_norm(module):
            return
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ExpertsBase):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, Router):
            module.init_weights(std)
        elif isinstance(module, MoEAttention) and module.sinks is not None:
            init.normal_(module.sinks, mean=0.0, std=std)
        elif isinstance(module, RouterTotals):
            for buffer in module.buffers():
                init.zeros_(buffer)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As transformers' own, but the default is this package's dispatch wherever the package is imported."""
        if requested_experts is None and "moe" in ALL_EXPERTS_FUNCTIONS:
            requested_experts = "moe"
        return super().get_correct_experts_implementation(requested_experts)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As transformers' own, but a checkpoint that lacks a tensor, or has one that nothing takes, is refused.

        A head may be new where the checkpoint was saved from a class without it.

        Raises:
            CheckpointError: names the first tensor that is missing, misshapen or too many.
        """
        with refuse_damaged(cls, pretrained_model_name_or_path, kwargs) as check:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            check(model, info)
        warn_of_old_code(model.config)
        warn_of_other_class(model)
        return (model, info) if output_loading_info else model

    def tie_weights(self, *args, **kwargs) -> None:
        """As transformers' own, which in loading hands over the names of the tensors that the checkpoint lacks."""
        super().tie_weights(*args, **kwargs)
        if kwargs.get("missing_keys"):
            self._missing_at_load = set(kwargs["missing_keys"])

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves weights, configuration and the code to load them where this package is not installed.

        Raises:
            ValueError: for `push_to_hub=True` with a router or a class of one's own, whose code would come too late.
        """
        warn_of_unused(self)
        name_code(self.config)
        own = own_classes(self)
        if not own:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise ValueError(f"{own[0].__name__} is your own code: save first, and call push_to_hub after that.")
        name_own_router(self.config)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_own_code(self, save_directory)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As transformers' own; a table from token ids to experts grows too, and its old ids keep their experts."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, Router):
                module.resize_vocabulary(self.config.vocab_size)
        return embeddings

    def update_routers(self) -> None:
        """See [`~modeling_moe.router_balancing.update_routers`]; call it once after each optimizer step."""
        update_routers(self)


class MoEModel(MoEPreTrainedModel):
    """The decoder without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        embedding = ScaledEmbedding if config.scale_embeddings else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_positions = None
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(MoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.rotary_emb = RotaryEmbeddings(config)
        self.gradient_checkpointing = False
        outputs = config.num_router_outputs
        self.router_totals = RouterTotals(
            len(self.sparse_blocks()),
            statistics=CONTROLLERS[config.controller].size(outputs) if config.controller is not None else 0,
            load=outputs if config.router_aux_loss_scope == "global" else 0,
            drops=config.has_capacity,
        )
        self._keep_in_fp32_modules_strict = {
            f"mlp.gate.{name}"
            for block in self.sparse_blocks()
            for name, tensor in block.gate.state_dict().items()
            if tensor.is_floating_point() and router_dtype(torch.bfloat16) == torch.float32
        }
        # factor on router losses that attach themselves: the trainer's own, such as 1 / gradient accumulation steps
        self.router_loss_scale = 1.0
        self.post_init()

    @property
    def has_router_losses(self) -> bool:
        """Whether any router loss has a weight."""
        adds_loss = router_class(self.config).auxiliary_loss is not Router.auxiliary_loss
        return bool(self.sparse_blocks()) and (
            adds_loss or any(getattr(self.config, name) > 0 for name in COEFFICIENTS.values())
        )

    def sparse_blocks(self) -> list[MoEBlock]:
        """The sparse feed-forward networks, from the first layer to the last."""
        return [layer.mlp for layer in self.layers if layer.is_sparse]

    @takes_cache
    @detach_router_logits
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoEModelOutput:
        """Runs the decoder.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S), 0 at padding; or what transformers' mask utilities accept, of which the router losses
                cannot tell the padding: every token counts.
            position_ids: (B, S) or (1, S); restarts mark packed sequences, each of which is routed as if it were alone
                (but by `base_layer` and `sinkhorn` in training, which share out the tokens of the whole batch). So do
                `cu_seq_lens_q`, which FlashAttention reads.
            cache: of earlier tokens; `past_key_values` is another name for it.
            inputs_embeds: (B, S, H), in the place of `input_ids`.
            use_cache: whether to return a cache.
            output_router_logits: return the routers' logits (T, E), the balance loss and the experts' load.
            attach_router_loss: in training, let the router losses reach the gradient through the hidden states,
                whatever loss is computed from them; a caller that adds `router_loss` itself sets it to False.
            label_mask: (B, S), true where a token predicts a label: in the router losses a sequence weighs as many as it
                has; without, all weigh the same.
            task_ids: (B,) or (B, S), the task of each sequence or token, for the routers that ask for it.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, or the latter holds a NaN. For
                `task_ids` of another shape.
                Or if continuous batching would change what this model computes.
            TypeError: for a keyword argument that nothing reads.
        """
        refuse_unknown(self, kwargs)
        if is_paged(cache):
            self.config.refuse_continuous_batching(self.training)
        inputs_embeds = self._embeddings(input_ids, inputs_embeds)
        packing, masked_cache = position_ids, cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            masked_cache = cache
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = positions[None]

        # transformers looks for packed sequences where there is no cache; a new one says nothing, so it may stay out
        causal_masks = self._causal_masks(attention_mask, inputs_embeds, masked_cache, position_ids)
        hidden_states = self._embed(inputs_embeds, position_ids)
        position_embeddings = self.rotary_emb.for_each_type(hidden_states, position_ids)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        context = self._routing_context(inputs_embeds, input_ids, attention_mask, task_ids)
        context = context._replace(begins=self._beginnings(inputs_embeds, context, packing, **kwargs))
        token_weights = None
        if self.training or output_router_logits:
            token_weights = self._token_weights(inputs_embeds, context, label_mask)

        statistics: list[RouterStatistics] = []
        # as in transformers, `layers` may be cut after the model was made
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=False):
            output = layer(
                hidden_states,
                attention_mask=causal_masks[layer_type],
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings[layer_type],
                routing_context=context,
                token_weights=token_weights,
                **cache_keyword(cache),
                **kwargs,
            )
            hidden_states, of_layer = unpack(output)
            if of_layer is not None:
                statistics.append(of_layer)

        hidden_states = self.norm(hidden_states)
        routers = model_statistics(self, statistics)
        if attach_router_loss and routers.router_loss is not None:
            hidden_states = AttachLoss.apply(hidden_states, self.router_loss_scale * routers.router_loss)
            routers = routers._replace(router_loss=None)
        return MoEModelOutput(last_hidden_state=hidden_states, **cache_keyword(cache), **routers._asdict())

    def _embeddings(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, S, H) of the tokens, as given or looked up."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            return self.embed_tokens(input_ids)
        self._refuse_nan(inputs_embeds)
        return inputs_embeds

    def _embed(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What enters the first layer, (B, S, H)."""
        states = inputs_embeds
        if self.config.embedding_multiplier != 1.0:
            states = states * self.config.embedding_multiplier
        if self.embed_positions is not None:
            states = states + self.embed_positions(position_ids)
        if self.config.embd_pdrop:
            states = nn.functional.dropout(states, self.config.embd_pdrop, self.training)
        return states

    def _refuse_nan(self, inputs_embeds: torch.Tensor) -> None:
        # on an accelerator the look costs a synchronisation, which decoding cannot afford
        if is_tracing(inputs_embeds) or not (self.training or inputs_embeds.device.type == "cpu"):
            return
        if inputs_embeds.isnan().any():
            row, position = inputs_embeds.isnan().any(dim=-1).nonzero()[0].tolist()
            raise ValueError(
                f"inputs_embeds has a NaN in row {row} at position {position}: check what computes the embeddings."
            )

    def _causal_masks(self, attention_mask, inputs_embeds, cache, position_ids) -> dict:
        """One mask for each attention type in use, unless `generate` has prepared them."""
        if isinstance(attention_mask, dict):
            return attention_mask
        functions = {
            "full_attention": create_causal_mask,
            "sliding_attention": create_sliding_window_causal_mask,
        }
        return {
            layer_type: functions[layer_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **cache_keyword(cache),
            )
            for layer_type in set(self.config.layer_types)
        }

    def _routing_context(self, inputs_embeds, input_ids, attention_mask, task_ids) -> RoutingContext:
        """What the routers may know of this batch; a mask over cached tokens too is cut to the last S."""
        batch_size, length = inputs_embeds.shape[:2]
        token_mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            # some callers number the sequences in it
            token_mask = attention_mask[:, -length:].reshape(-1) > 0
        if task_ids is not None:
            if task_ids.shape not in ((batch_size,), (batch_size, length)):
                raise ValueError(
                    f"task_ids has shape {tuple(task_ids.shape)}: give one task for each sequence, ({batch_size},), or for "
                    f"each token, ({batch_size}, {length})."
                )
            task_ids = (task_ids if task_ids.dim() == 2 else task_ids[:, None]).expand(-1, length).reshape(-1)
        if input_ids is not None:
            input_ids = input_ids.reshape(-1)
        return RoutingContext(batch_size, token_mask, input_ids, task_ids)

    def _beginnings(self, inputs_embeds, context, position_ids, cu_seq_lens_q=None, **_) -> torch.Tensor | None:
        """Whether a token begins a sequence (T,); None where each row is one, or goes on with one by a single token."""
        if inputs_embeds.shape[1] == 1:
            return None
        shape, token_mask = inputs_embeds.shape[:2], context.by_row(context.token_mask)
        begins = find_beginnings(shape, position_ids, token_mask, cu_seq_lens_q)
        return None if begins is None else begins.flatten()

    def _token_weights(self, inputs_embeds, context, label_mask) -> TokenWeights:
        """What each token counts in the router losses, in fp32 at least."""
        dtype = torch.promote_types(inputs_embeds.dtype, torch.float32)
        mask = torch.ones(inputs_embeds.shape[:2], dtype=dtype, device=inputs_embeds.device)
        if context.token_mask is not None:
            mask = context.token_mask.view(mask.shape).to(mask)
        return weigh_tokens(mask, context.by_row(context.begins), label_mask)


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head.

    In training with labels, `loss` is the cross entropy plus the weighted router losses; in evaluation it is the
    cross entropy alone. Without labels the router losses still reach the gradient, see [`MoEModel`].
    """

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.model = MoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoECausalLMOutput:
        """Runs decoder and head; arguments as of [`MoEModel`], and:

        Args:
            labels: (B, S), token ids to predict, shifted here; -100 is ignored.
            logits_to_keep: compute the logits (B, kept, V) of the last so many positions only (0: all), or of those
                listed in a tensor.
        """
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
        logits = self._head(outputs.last_hidden_state[:, kept])

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
            **cache_keyword(outputs.cache),
        )

    @takes_cache
    def prepare_inputs_for_generation(self, input_ids, cache=None, inputs_embeds=None, **kwargs):
        """As transformers' own; a text that outgrows the short factors of a LongRoPE is read again with the long ones."""
        rope: dict = self.config.rope_parameters or {}
        if (
            cache is not None
            and rope.get("rope_type") == "longrope"
            and 0 < cache.get_seq_length() <= rope["original_max_position_embeddings"] < input_ids.shape[1]
        ):
            cache, kwargs["next_sequence_length"] = None, None
        # by name: transformers asks the signature whether a prompt may be embeddings
        inputs = GenerationInputs(
            super().prepare_inputs_for_generation(
                input_ids, inputs_embeds=inputs_embeds, **cache_keyword(cache), **kwargs
            )
        )
        if (tasks := inputs.get("task_ids")) is not None and tasks.dim() == 2:
            # (B, S) of the prompt: a new token has the task of the last one
            seen = 0 if cache is None else int(cache.get_seq_length())
            given = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            columns = torch.arange(seen, seen + given.shape[1], device=tasks.device)
            inputs["task_ids"] = tasks[:, columns.clamp(max=tasks.shape[1] - 1)]
        return inputs

    def generate(self, *args, **kwargs):
        """As transformers' own; the release's `generate` knows one name of the cache, this one both."""
        named = {name: kwargs.pop(name) for name in CACHE_NAMES if kwargs.get(name) is not None}
        if len(named) > 1:
            raise TypeError(f"generate() got a cache as {' and as '.join(named)}: give one.")
        for cache in named.values():
            kwargs |= cache_keyword(cache)
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As transformers' own, behind `generate_batch` and its server; ValueError where it would change the text."""
        self.config.refuse_continuous_batching(self.training)
        return super().init_continuous_batching(*args, **kwargs)

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (B, S, V) of states (B, S, H)."""
        logits = self.lm_head(hidden_states)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        if (softcap := self.config.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits


# The heads below build MoEModel themselves: transformers' generic ones look it up in the auto classes, which a process
# that runs this file from a checkpoint does not have.


class MoEForSequenceClassification(GenericForSequenceClassification, MoEPreTrainedModel):
    """The decoder with a linear head on each sequence's last token."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MoEConfig):
        MoEPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MoEModel(config)
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
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class MoEForQuestionAnswering(GenericForQuestionAnswering, MoEPreTrainedModel):
    """The decoder with a linear head for the start and the end of an answer."""

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
AUTO_MAP = {"AutoConfig": "configuration_moe.MoEConfig"} | {
    model._auto_class: f"modeling_moe.{model.__name__}" for model in MODELS
}


def name_code(config: MoEConfig) -> None:
    """Names in a configuration the code that travels with the weights: its classes and its version."""
    config.auto_map, config.code_version = dict(AUTO_MAP), __version__


register_expert_layout(MoEConfig.model_type)
# the label smoothing of `Trainer` shifts the labels for the classes named here alone
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoEConfig.model_type] = MoEForCausalLM.__name__

__all__ = ["MoEPreTrainedModel", *(model.__name__ for model in MODELS)]
