# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""MoEConfig: one declared configuration for every sparse decoder this package holds."""

import difflib
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .attention_rope import KINDS, check_numbers, check_shape
from .compatibility import CACHE_NAMES, __version__, saved_by_earlier_version
from .configuration_counts import params_with
from .configuration_derived import PER_LAYER, first_layers, follow, settle
from .configuration_fields import number, plain_errors, shown
from .configuration_plans import expert_parallel_plan, tensor_parallel_plan
from .router import SCORING_FUNCS, Router
from .router_catalogue import ROUTERS, current_value, divide_old_coefficient, router_class


logger = logging.get_logger(__name__)


@plain_errors
@strict
class MoEConfig(PreTrainedConfig):
    r"""Configuration of a [`MoEModel`]: a decoder whose feed-forward networks are, layer by layer, dense or sparse.

    The names are transformers' own. It holds every family of `modeling_moe.conversion.FAMILIES` exactly: with all layers
    dense Llama, Qwen, Phi, Gemma, GPT-2 and others, with sparse ones Mixtral, Qwen-MoE, OLMoE, DeepSeek and gpt-oss.

    Args:
        vocab_size: entries of the embedding.
        hidden_size: width H of the residual stream.
        intermediate_size: width of a dense feed-forward network.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads; all of them if not given.
        head_dim: width of a head, even; `hidden_size / num_attention_heads` if not given.
        hidden_act: activation of all feed-forward networks, a name in transformers' `ACT2FN`.
        max_position_embeddings: longest sequence the rotary embedding is meant for.
        initializer_range: standard deviation of new weights.
        rms_norm_eps: epsilon of every norm but those of latents (1e-6).
        norm_type: `"rms"` (Llama), `"rms_fp32"` (OLMo2: multiplied before the cast), `"rms_plus_one"` (Gemma: by 1 + weight) or
            `"layer"` (a layer norm with bias: GPT-2, GPT-NeoX).
        norm_placement: norms `"pre"` attention and feed-forward network; `"post"` them, before the sum (OLMo2); both
            (`"sandwich"`, Gemma 2 and 3); or before two networks that both see the layer's input (`"parallel"`, GPT-NeoX).
        tie_word_embeddings: whether the head shares the embedding's weight.
        rope_parameters: rotary embedding as transformers defines it, `rope_theta` and `rope_type` included.
        position_embedding_type: `"rope"`, or `"learned"` vectors added to the embedding (GPT-2).
        rope_fp32: rotate queries and keys in fp32 (OLMo2), which tells in bf16.
        no_rope_layers: for each layer 1 if it rotates queries and keys and 0 if not (SmolLM3); all do if not given.
        scale_embeddings: multiply the embedding by sqrt(hidden_size), rounded to its dtype (Gemma).
        embedding_multiplier: factor on what enters the first layer (Granite).
        residual_multiplier: factor on what attention and feed-forward networks add to the stream (Granite).
        logits_scaling: divisor of the logits (Granite).
        final_logit_softcapping: bound of the logits, by tanh (Gemma 2).
        embd_pdrop: dropout of what enters the first layer.
        resid_pdrop: dropout of what attention and feed-forward networks add to the stream.
        attention_bias: biases on the query, key, value and output projections (Llama's switch).
        qkv_bias: biases on query, key and value only (Qwen2).
        qk_norm: RMS norm of queries and keys: `"head"` per head (Qwen3), `"full"` over all heads (OLMoE), or none.
        clip_qkv: clamp queries, keys and values to [-clip_qkv, clip_qkv] (OLMoE).
        attention_dropout: dropout of the attention probabilities.
        attention_multiplier: factor on the products of queries and keys; 1 / sqrt(their width) if not given.
        scale_attn_by_inverse_layer_idx: divide that factor by the layer's number, counted from 1 (GPT-2).
        attn_logit_softcapping: bound of those products, by tanh (Gemma 2); sdpa cannot compute it.
        attention_sinks: a learned logit for each head that takes part in the softmax and nothing else (gpt-oss); sdpa cannot
            compute it.
        kv_lora_rank: width to which keys and values are compressed together: multi-head latent attention (DeepSeek-V2,
            arXiv:2405.04434). Plain attention if not given. Its rotary part is not interleaved here.
        q_lora_rank: the same for queries, which are not compressed if not given.
        qk_nope_head_dim: width of a head's queries and keys that does not rotate, in latent attention.
        qk_rope_head_dim: width that does; `head_dim` is this then.
        v_head_dim: width of a head's values.
        sliding_window: window in tokens, 2 or more, of the layers whose type is `"sliding_attention"`; given with none of
            them it is refused. (With 1 transformers' cache keeps all tokens, and decoding differs from one pass.)
        use_sliding_window: False ignores `sliding_window` (Qwen's switch).
        layer_types: `"full_attention"` or `"sliding_attention"` for each layer; all sliding if there is a window.
        gated_mlp: dense feed-forward networks are `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        mlp_bias: biases in every feed-forward network, experts included.
        mlp_layer_types: `"sparse"` or `"dense"` for each layer; all sparse if not given. `first_k_dense_replace` and
            `mlp_only_layers` are accepted in its place.
        num_experts: routed experts E of a sparse layer (also `num_local_experts`, `n_routed_experts`).
        num_experts_per_tok: experts K that a token is sent to.
        moe_intermediate_size: width of a routed expert; `intermediate_size` if not given.
        gated_experts: as `gated_mlp`, for routed and shared experts; `gated_mlp` if not given.
        swiglu_limit: experts compute `(up + 1) * gate * sigmoid(swiglu_alpha * gate)` with gate and up clamped to this limit
            (gpt-oss).
        swiglu_alpha: see there.
        num_shared_experts: experts every token passes through (also `n_shared_experts`), computed as one network.
        shared_expert_intermediate_size: its width; `num_shared_experts * moe_intermediate_size` if not given.
        shared_expert_gate: scale the shared experts by a sigmoid of a learned projection (Qwen2-MoE).
        experts_recompute: compute the experts' first projection again in backward rather than keep it: no activation
            of a routed expert is kept then, for 22% more arithmetic in their training (by this package's dispatch alone).
        router_type: how experts are chosen; a key of `modeling_moe.router_catalogue.ROUTERS`, whose classes give paper and equation.
        allow_noncausal: permit routing in which a token's experts depend on later tokens (`expert_choice`, `soft_moe`; `base_layer`
            and `sinkhorn` in training; capacity by probability or choice). A causal language model learns to cheat by it.
        scoring_func: `"softmax"`, `"sigmoid"` (DeepSeek-V3) or `"sqrtsoftplus"` (DeepSeek-V4).
        router_bias: a bias on the router's logits (gpt-oss).
        norm_topk_prob: divide a token's K weights by their sum; if not given, as the router's paper does (`topk`: True).
        routed_scaling_factor: factor on the weights, after the division.
        n_group: groups of experts of which `topk_group` stay eligible for a token (DeepSeek-V3); 1 switches it off.
            The outer level of `router_type="hierarchical"`.
        topk_group: eligible groups.
        group_score: strength of a group: its two best experts together (`"top2sum"`, DeepSeek-V3) or the best (`"max"`, V2).
        num_null_experts: further outputs of the router that do nothing, so that tokens use fewer real experts.
        num_copy_experts: further outputs of the router that return the token.
        expected_experts_per_tok: real experts of a token that `router_controller="proportional"` aims at; all K if not given.
        router_selection_bias: add the fp32 buffer `e_score_correction_bias` to the scores that choose the experts, not
            to those that weigh them (DeepSeek-V3, arXiv:2408.15664).
        router_controller: what moves that bias once per optimizer step: `"bias"` by the sign of the imbalance (DeepSeek-V3),
            `"proportional"` in proportion to it (LongCat-Flash), `"quantile"` to where it would vanish (Megatron-LM).
        router_bias_update_rate: step of `"bias"` (the controller, if this is positive and none is named) and of `"proportional"`.
        router_ema_decay: decay of the moving averages of `"quantile"` and of `router_type="expert_threshold"`.
        router_jitter_noise: multiply the router's input, and nothing else, by U[1 - noise, 1 + noise] in training (Switch).
        router_gradient: `"topk"` through the chosen experts' weights; `"dense"`, from all experts at the cost of computing
            them (DenseMixer); `"sparsemixer"`, which draws the experts (see `SparseMixerRouter`; `router_type="topk"`).
        router_temperature: of the draw of `gumbel_topk`, and of the gate of `continuous`.
        router_top_p: probability that the experts of `top_p` sum to.
        max_experts_per_tok: most experts of a token where the number varies; all if not given.
        router_threshold: `continuous`: tau, fixed or where it begins.
        router_threshold_mode: `continuous`: `"fixed"`, `"learned"`, or `"budget"`, a tau for each token at which its weights
            sum to `num_experts_per_tok`.
        router_cutoff: `continuous`: weights up to this are left out.
        router_sparsity_coef: `remoe`: where the coefficient of its loss begins.
        router_sparsity_step: `remoe`: factor by which the coefficient moves, once per optimizer step.
        hash_seed: `hash`: seed of the tables.
        num_hash_layers: so many first layers have `router_type="hash_scored"` (DeepSeek-V4).
        num_tasks: `task` and `mmoe`: tasks that `task_ids` may name.
        slots_per_expert: `soft_moe`: means of tokens that an expert processes.
        segment_length: `lory`: tokens that share a merged expert.
        capacity_factor: in training, an expert takes `ceil(factor * n * K / E)` of a sequence's n tokens; no limit if not
            given. Dropped tokens pass on their residual.
        eval_capacity_factor: the same in evaluation; no limit if not given.
        expert_capacity: tokens of a sequence that an expert takes, in training and evaluation, in the place of the factors.
        capacity_running: the factors count the tokens so far, so that decoding equals one pass.
        capacity_includes_k: whether the factor is on `n * K` (Megatron-LM) or on n (Switch).
        capacity_priority: who finds room: `"token"`, in the order of the sequence; `"k_major"`, all first choices before all
            second ones (GShard); `"probability"`, the surest tokens first (V-MoE). The last two are not causal.
        router_aux_loss_coef: weight of the load-balancing loss, in training (Switch, arXiv:2101.03961, eq. 4).
            transformers' loss of the same name is `num_experts_per_tok` times larger.
        router_aux_loss_scope: balance of what: each `"sequence"`, the `"batch"`, or `"global"`: all ranks and micro-batches of
            an optimizer step so far (arXiv:2501.11873); steps end with `update_routers`, which `MoECallback` calls.
        router_z_loss_coef: weight of the router's z-loss, in training (ST-MoE, arXiv:2202.08906, eq. 5).
        router_seq_aux_loss_coef: weight of DeepSeek-V3's sequence-wise balance loss; 1e-4 there.
        router_importance_loss_coef: weight of Shazeer's importance loss (arXiv:1701.06538); 0.1 there.
        router_load_loss_coef: weight of Shazeer's load loss, which has a gradient with `router_type="noisy_topk"`.
        router_entropy_loss_coef: weight of the entropy of a token's probabilities (with `top_p`, 1e-4).
        output_router_logits: return the router's logits and the balance loss. It does not switch any loss on or off.

    A field that is left None and follows from others (`modeling_moe.configuration_derived.DERIVED`) follows them when they are
    assigned later, too. What the fields are together is checked when a model is made, and on saving.

    Raises:
        ValueError: for a value that no model can have; the message names the field and the remedy.

    Example:
        >>> from modeling_moe import MoEConfig, MoEForCausalLM
        >>> config = MoEConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_experts=8)
        >>> config.num_params(), config.num_active_params()
        (86649088, 34744576)
        >>> MoEForCausalLM(config).num_parameters()
        86649088
    """

    model_type = "moe"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = [*CACHE_NAMES, "aux_loss", "router_logits", "expert_load", "dropped_share"]
    attribute_map = {
        "num_local_experts": "num_experts",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = number(32000, 1, 2**28)
    hidden_size: int = number(1024, 1, 2**20)
    intermediate_size: int = number(2816, 1, 2**24)
    num_hidden_layers: int = number(16, 1, 10_000)
    num_attention_heads: int = number(16, 1, 2**16)
    num_key_value_heads: int | None = number(None, 1, 2**16)
    head_dim: int | None = number(None, 2, 2**20)
    hidden_act: str = "silu"
    max_position_embeddings: int = number(4096, 1, 2**31)
    initializer_range: float = number(0.02, 0, 100)
    rms_norm_eps: float = number(1e-6, 1e-30, 1)
    norm_type: Literal["rms", "rms_fp32", "rms_plus_one", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    position_embedding_type: Literal["rope", "learned"] = "rope"
    rope_fp32: bool = False
    no_rope_layers: list[int] | None = None
    scale_embeddings: bool = False
    embedding_multiplier: float | int = number(1.0, 1e-6, 1e6)
    residual_multiplier: float | int = number(1.0, 1e-6, 1e6)
    logits_scaling: float | int = number(1.0, 1e-6, 1e6)
    final_logit_softcapping: float | int | None = number(None, 1e-6, 1e6)
    embd_pdrop: float | int = number(0.0, 0, below=1)
    resid_pdrop: float | int = number(0.0, 0, below=1)
    attention_bias: bool = False
    qkv_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    clip_qkv: float | int | None = number(None, 1e-6, 1e6)
    attention_dropout: float | int = number(0.0, 0, below=1)
    attention_multiplier: float | int | None = number(None, 1e-6, 1e6)
    scale_attn_by_inverse_layer_idx: bool = False
    attn_logit_softcapping: float | int | None = number(None, 1e-6, 1e6)
    attention_sinks: bool = False
    kv_lora_rank: int | None = number(None, 1, 2**20)
    q_lora_rank: int | None = number(None, 1, 2**20)
    qk_nope_head_dim: int | None = number(None, 1, 2**20)
    qk_rope_head_dim: int | None = number(None, 2, 2**20)
    v_head_dim: int | None = number(None, 1, 2**20)
    sliding_window: int | None = number(None, 2, 2**31)
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    gated_mlp: bool = True
    mlp_bias: bool = False
    mlp_layer_types: list[str] | None = None
    num_experts: int = number(8, 1, 2**16)
    num_experts_per_tok: int = number(2, 1, 2**17)
    moe_intermediate_size: int | None = number(None, 1, 2**24)
    gated_experts: bool | None = None
    swiglu_limit: float | int | None = number(None, 1e-6, 1e6)
    swiglu_alpha: float | int = number(1.702, 1e-6, 1e6)
    num_shared_experts: int = number(0, 0, 2**16)
    shared_expert_intermediate_size: int | None = number(None, 0, 2**24)
    shared_expert_gate: bool = False
    experts_recompute: bool = False
    router_type: str = "topk"
    allow_noncausal: bool = False
    scoring_func: str = "softmax"
    router_bias: bool = False
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | int = number(1.0, 1e-6, 1e6)
    n_group: int = number(1, 1, 2**16)
    topk_group: int = number(1, 1, 2**16)
    group_score: Literal["top2sum", "max"] = "top2sum"
    num_null_experts: int = number(0, 0, 2**16)
    num_copy_experts: int = number(0, 0, 2**16)
    expected_experts_per_tok: float | int | None = number(None, above=0, highest=2**17)
    router_selection_bias: bool = False
    router_controller: Literal["bias", "proportional", "quantile"] | None = None
    router_bias_update_rate: float | int = number(0.0, 0, 1e6)
    router_ema_decay: float | int = number(0.99, 0, below=1)
    router_jitter_noise: float | int = number(0.0, 0, 1)
    router_gradient: Literal["topk", "dense", "sparsemixer"] = "topk"
    router_temperature: float | int = number(1.0, 1e-6, 1e6)
    router_top_p: float | int = number(0.4, above=0, highest=1)
    max_experts_per_tok: int | None = number(None, 1, 2**16)
    router_threshold: float | int = number(0.0, -1e6, 1e6)
    router_threshold_mode: Literal["fixed", "learned", "budget"] = "budget"
    router_cutoff: float | int = number(0.01, 0, 1)
    router_sparsity_coef: float | int = number(1e-8, 0, 1e6)
    router_sparsity_step: float | int = number(1.2, 1, 1e6)
    hash_seed: int = number(0, 0, 2**32)
    num_hash_layers: int = number(0, 0, 10_000)
    num_tasks: int = number(1, 1, 2**16)
    slots_per_expert: int = number(1, 1, 2**16)
    segment_length: int = number(256, 1, 2**31)
    capacity_factor: float | int | None = number(None, 1e-6, 1e6)
    eval_capacity_factor: float | int | None = number(None, 1e-6, 1e6)
    expert_capacity: int | None = number(None, 1, 2**31)
    capacity_running: bool = False
    capacity_includes_k: bool = True
    capacity_priority: Literal["token", "k_major", "probability"] = "token"
    router_aux_loss_coef: float | int = number(0.01, 0, 1e6)
    router_aux_loss_scope: Literal["sequence", "batch", "global"] = "batch"
    router_z_loss_coef: float | int = number(0.001, 0, 1e6)
    router_seq_aux_loss_coef: float | int = number(0.0, 0, 1e6)
    router_importance_loss_coef: float | int = number(0.0, 0, 1e6)
    router_load_loss_coef: float | int = number(0.0, 0, 1e6)
    router_entropy_loss_coef: float | int = number(0.0, 0, 1e6)
    output_router_logits: bool = False
    pad_token_id: int | None = number(None, -1, 2**31)
    bos_token_id: int | None = number(None, -1, 2**31)
    eos_token_id: int | list[int] | None = number(None, -1, 2**31)

    # names that earlier versions gave the values of fields
    _current_value = staticmethod(current_value)

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        self._refuse_reserved(kwargs)
        self._take_aliases(kwargs)
        self._take_dense_layers(kwargs)
        self._check_inherited(kwargs)
        if not self.use_sliding_window:
            self.sliding_window = None
        settle(self)
        if saved_by_earlier_version({"transformers_version": self.transformers_version} | kwargs):
            divide_old_coefficient(self)
        # before transformers reads them, which takes them to be right
        self.validate_layer_type()
        self.validate_moe()
        self.validate_routing()
        check_shape(self)
        super().__post_init__(**kwargs)
        if self.num_experts_per_tok == 1 and self.norm_topk_prob and "sparse" in self.mlp_layer_types:
            logger.warning_once(
                "num_experts_per_tok=1 with norm_topk_prob=True gives every expert the weight 1: the router gets no "
                "gradient from the task. Set norm_topk_prob=False unless the router is meant to stay as it is."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if "_derived" in self.__dict__ and name in self.__dataclass_fields__:
            follow(self, name)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers' own, but what the overrides imply is derived anew, and the result is checked as a new one is.

        Lists that name more layers than `num_hidden_layers` are cut to the first ones.

        Raises:
            ValueError: for a value that no model can have; the message names the field and the remedy.
        """
        result = super().from_dict(config_dict | first_layers(config_dict), **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    def convert_rope_params_to_dict(self, **kwargs):
        """As transformers' own, which in 5.17 puts a theta beside the parameters of each kind of attention."""
        if not set(self.layer_types).intersection(self.rope_parameters or ()):
            return super().convert_rope_params_to_dict(**kwargs)
        self.standardize_rope_params()
        return kwargs

    def _take_aliases(self, kwargs: dict[str, Any]) -> None:
        for alias, name in self.attribute_map.items():
            if alias not in kwargs:
                continue
            value, held = kwargs.pop(alias), getattr(self, name)
            if held not in (value, self.__dataclass_fields__[name].default):
                raise ValueError(f"{alias} is {shown(value)} and {name} {shown(held)}: they name one thing, give one.")
            setattr(self, alias, value)

    def _take_dense_layers(self, kwargs: dict[str, Any]) -> None:
        given = [kwargs.pop(name, None) for name in ("first_k_dense_replace", "mlp_only_layers")]
        if given == [None, None]:
            return
        kinds = self._kinds_of_layers(*given)
        if self.mlp_layer_types not in (None, kinds):
            raise ValueError(
                "mlp_layer_types names other dense layers than first_k_dense_replace and mlp_only_layers do: give one."
            )
        self.mlp_layer_types = kinds

    def _kinds_of_layers(self, first: int | None, dense: list[int] | None) -> list[str]:
        """`mlp_layer_types` of a model whose first layers, and those listed, are dense."""
        layers = range(self.num_hidden_layers)
        first, dense = 0 if first is None else first, [] if dense is None else dense
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"first_k_dense_replace is {shown(first)}: it must be a number of layers, 0 or more.")
        if not isinstance(dense, list) or not all(
            isinstance(i, int) and not isinstance(i, bool) and i in layers for i in dense
        ):
            raise ValueError(
                f"mlp_only_layers is {shown(dense)}: it must list layers from 0 to {self.num_hidden_layers - 1}."
            )
        return ["dense" if i < first or i in set(dense) else "sparse" for i in layers]

    def _check_inherited(self, kwargs: dict[str, Any]) -> None:
        """What transformers' own part of the configuration takes without a look, or ends at with another error."""
        for name, value in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            dtype = getattr(torch, value, None) if isinstance(value, str) else value
            if value is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise ValueError(f"{name} is {shown(value)}: it must be the name of a floating-point dtype of torch.")
        labels = kwargs.get("num_labels")
        if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int) or not 0 <= labels < 2**20):
            raise ValueError(f"num_labels is {shown(labels)}: it must be from 0 to {2**20 - 1}.")
        labels = self.id2label
        if labels is not None and not (
            isinstance(labels, dict) and all(isinstance(key, int) or str(key).isdecimal() for key in labels)
        ):
            raise ValueError(f"id2label is {shown(labels)}: it must be a dictionary whose keys are integers.")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder is True: the model has no encoder, set it to False.")

    @classmethod
    def _refuse_reserved(cls, kwargs: dict[str, Any]) -> None:
        """Keys that would replace a method, or that this model cannot follow."""
        if kwargs.get("per_layer_config"):
            raise ValueError(
                "per_layer_config is not read: say what layers differ in by layer_types, mlp_layer_types and "
                "no_rope_layers."
            )
        for name in kwargs:
            held = getattr(cls, name, None)
            if callable(held) or (isinstance(held, property) and held.fset is None):
                raise ValueError(f"{name} is no field that can be set: remove it, it follows from the others.")

    @classmethod
    def _refuse_misspelt(cls, kwargs: dict) -> None:
        """transformers keeps unknown keys; one letter away from a field they are a mistake that would be ignored."""
        declared = [name for name in cls.__annotations__ if not name.endswith("_token_id")]
        for name in kwargs:
            if hasattr(cls, name) or name in cls.attribute_map or name.endswith("_token_id"):
                continue
            if close := difflib.get_close_matches(name, declared, n=1, cutoff=0.85):
                raise ValueError(f"unknown field {name!r} in MoEConfig: did you mean {close[0]!r}?")

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """transformers' plan of expert parallelism."""
        return expert_parallel_plan(self)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """transformers' plan of tensor parallelism."""
        return tensor_parallel_plan(self) | self.__dict__.get("_added_to_plan", {})

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, value: dict[str, str]):
        # transformers 5.19 adds the embedding of a tied head
        own = tensor_parallel_plan(self)
        self.__dict__["_added_to_plan"] = {name: rule for name, rule in value.items() if own.get(name) != rule}

    def validate_layer_type(self):
        """Checks the lists that have an entry for each layer; run on construction, by a model, and on saving."""
        allowed = {"layer_types": KINDS, "mlp_layer_types": ("sparse", "dense"), "no_rope_layers": (0, 1)}
        for name in PER_LAYER:
            if (entries := getattr(self, name)) is None:
                continue
            if len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} names {len(entries)} layers and num_hidden_layers is {self.num_hidden_layers}: give one "
                    "entry for each layer."
                )
            for entry in entries:
                if entry not in allowed[name]:
                    choices = ", ".join(map(str, allowed[name]))
                    raise ValueError(f"{name} has the entry {shown(entry)}: choose among {choices}.")
        slides = "sliding_attention" in self.layer_types
        if slides and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention but sliding_window is not set: set it, in tokens.")
        if self.sliding_window is not None and not (slides and self.use_sliding_window):
            raise ValueError(
                f"sliding_window is {self.sliding_window} and no layer uses it: leave layer_types unset or give it a "
                "sliding_attention, with use_sliding_window=True, or unset sliding_window."
            )

    def validate_moe(self):
        """Checks what types and ranges cannot say; run as `validate_layer_type` is."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): choose a divisor."
            )
        if self.kv_lora_rank is not None:
            self._validate_latent_attention()
        if self.head_dim is None:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): change one of them or set head_dim."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: the rotary embedding needs an even number of at least 2.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown: choose one of {', '.join(sorted(ACT2FN))}.")
        if self.attention_sinks and self.attn_logit_softcapping is not None:
            raise ValueError("attention_sinks and attn_logit_softcapping exclude each other: unset one of them.")
        if self.swiglu_limit is not None and not self.gated_experts:
            raise ValueError("swiglu_limit clamps the gate of gated experts: set gated_experts=True or unset it.")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id} and vocab_size {self.vocab_size}: it must lie within the vocabulary."
            )

    def validate_rope(self):
        """Checks the numbers of `rope_parameters`, then as transformers does; run as `validate_layer_type` is."""
        check_numbers(self)
        super().validate_rope()

    def validate_size(self):
        """Refuses a model that no machine holds, before anything of it is made; run as `validate_layer_type` is."""
        if (params := self.num_params()) > 2**49:
            raise ValueError(
                f"vocab_size, hidden_size, num_hidden_layers, num_experts and the widths make {params:.1e} parameters, "
                "more than a petabyte: one of them is too large."
            )

    def _validate_latent_attention(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if (getattr(self, name) or 0) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: kv_lora_rank (latent attention) needs it positive."
                )
        plain = {"qkv_bias": False, "qk_norm": None, "clip_qkv": None, "attention_sinks": False}
        plain |= {"position_embedding_type": "rope", "no_rope_layers": None, "rope_fp32": False}
        plain |= {"scale_attn_by_inverse_layer_idx": False, "attn_logit_softcapping": None}
        plain |= {"num_key_value_heads": self.num_attention_heads, "head_dim": self.qk_rope_head_dim}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: latent attention (kv_lora_rank) holds {value!r} alone."
                )

    def validate_routing(self):
        """Checks the fields of the router; run as `validate_layer_type` is."""
        experts, top_k, outputs = self.num_experts, self.num_experts_per_tok, self.num_router_outputs
        router = router_class(self)
        if self.scoring_func not in SCORING_FUNCS:
            raise ValueError(
                f"scoring_func {self.scoring_func!r} is unknown: choose one of {', '.join(SCORING_FUNCS)}."
            )
        if not 1 <= top_k <= outputs:
            raise ValueError(f"num_experts_per_tok is {top_k}: it must lie between 1 and num_experts ({outputs}).")
        if not 0 < self.expected_experts_per_tok <= top_k:
            raise ValueError(
                f"expected_experts_per_tok is {self.expected_experts_per_tok}: it must be above 0 and at most "
                f"num_experts_per_tok ({top_k})."
            )
        if experts % self.n_group:
            raise ValueError(f"n_group ({self.n_group}) does not divide num_experts ({experts}): choose a divisor.")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}: it must lie between 1 and n_group ({self.n_group}).")
        if self.n_group > 1 and top_k > self.topk_group * (experts // self.n_group):
            raise ValueError(
                f"num_experts_per_tok ({top_k}) exceeds the experts of topk_group={self.topk_group} groups of "
                f"{experts // self.n_group}: raise topk_group or lower num_experts_per_tok."
            )
        if self.max_experts_per_tok is not None and not 1 <= self.max_experts_per_tok <= experts:
            raise ValueError(
                f"max_experts_per_tok is {self.max_experts_per_tok}: it must lie between 1 and num_experts ({experts})."
            )
        self._refuse_noncausal(router)
        self._refuse_unused(router)
        router.validate(self)

    def _refuse_noncausal(self, router: type[Router]) -> None:
        reason = None
        if not router.causal:
            reason = (
                f"router_type={self.router_type!r}: {router.__name__} chooses among all tokens of a sequence or batch"
            )
        elif self.capacity_priority != "token":
            reason = f"capacity_priority={self.capacity_priority!r}: a later token can take an earlier one's place"
        if reason is not None and not self.allow_noncausal:
            raise ValueError(
                f"{reason}, so that a token's experts tell of later tokens, which a causal language model must not see: set "
                "allow_noncausal=True if that is meant."
            )

    def _refuse_unused(self, router: type[Router]) -> None:
        """Fields that would be ignored together are refused."""
        name, topk = router.__name__, issubclass(router, ROUTERS["topk"])
        idle = self.num_null_experts + self.num_copy_experts
        rules = [
            (
                self.router_gradient == "sparsemixer"
                and (self.router_type != "topk" or self.router_jitter_noise <= 0),
                "router_gradient='sparsemixer' draws the experts itself, among those within router_jitter_noise: set "
                "router_type='topk' and a positive router_jitter_noise (0.01).",
            ),
            (
                idle and (router is not ROUTERS["topk"] or self.n_group > 1 or self.num_hash_layers),
                "num_null_experts and num_copy_experts need router_type='topk' without n_group or num_hash_layers: set "
                "them to 0 or change these.",
            ),
            (
                self.router_gradient == "dense"
                and (self.num_copy_experts or router.mix is not Router.mix or router.forward is not Router.forward),
                f"router_gradient='dense' cannot compute copy experts, nor {name}: set it to 'topk'.",
            ),
            (
                self.router_bias and (router.logits is not Router.logits or not router.uses_router_bias),
                f"router_bias has no effect with {name}: set it to False.",
            ),
            (
                self.router_selection_bias and not topk,
                f"router_selection_bias has no effect with {name}: set it to False.",
            ),
            (
                self.n_group > 1 and not (topk or self.router_type == "hierarchical"),
                f"n_group has no effect with {name}: set it to 1.",
            ),
            (
                self.max_experts_per_tok is not None and not router.limits_experts,
                f"max_experts_per_tok has no effect with {name}: leave it unset.",
            ),
            (
                self.router_seq_aux_loss_coef and router.variable_k,
                f"router_seq_aux_loss_coef counts a fixed number of experts, which {name} has not: set it to 0, and "
                "router_aux_loss_scope='sequence' for a balance of each sequence.",
            ),
            (
                self.router_controller is not None and not self.router_selection_bias,
                "router_controller and router_bias_update_rate move a bias that is not there: set "
                "router_selection_bias=True.",
            ),
            (
                self.router_controller in ("bias", "proportional") and not self.router_bias_update_rate,
                f"router_controller={self.router_controller!r} needs a step: set router_bias_update_rate.",
            ),
            (
                self.capacity_running and self.capacity_priority != "token",
                "capacity_running follows the order of the tokens: set capacity_priority='token'.",
            ),
            (
                self.has_capacity and router.mix is not Router.mix,
                f"{name} drops no token: leave capacity_factor, eval_capacity_factor and expert_capacity unset.",
            ),
        ]
        for refused, message in rules:
            if refused:
                raise ValueError(message)

    def refuse_continuous_batching(self, training: bool = False) -> None:
        """Raises unless a token's output is the same when the tokens of many sequences lie in one row, their keys in pages.

        Args:
            training: whether the model is in training mode, in which other fields count.

        Raises:
            ValueError: names the field that makes the tokens depend on their neighbours in the row, or has no pages.
        """
        router = router_class(self)
        factor = "capacity_factor" if training else "eval_capacity_factor"
        capacity = next((name for name in ("expert_capacity", factor) if getattr(self, name) is not None), None)
        reason = None
        if self.kv_lora_rank is not None:
            reason = "kv_lora_rank is set, and the pages have no room for latents"
        elif not (router.per_token and (router.causal or not training)) and "sparse" in self.mlp_layer_types:
            reason = f"router_type={self.router_type!r} mixes the tokens of a row"
        elif router.required_input is not None and "sparse" in self.mlp_layer_types:
            reason = f"router_type={self.router_type!r} asks for {router.required_input}, which a request cannot give"
        elif capacity is not None:
            reason = f"{capacity} counts the tokens of a row"
        elif dynamic := self._rope_types().intersection(("dynamic", "longrope")):
            reason = f"rope_parameters has rope_type={dynamic.pop()!r}, which follows the longest sequence of a row"
        elif self.attn_logit_softcapping is not None and "flash" not in (self._attn_implementation or ""):
            reason = "attn_logit_softcapping is set, which only flash attention applies to pages"
        if reason is not None:
            raise ValueError(f"continuous batching would change the text, because {reason}: call `generate` instead.")

    def _rope_types(self) -> set[str]:
        rope: dict = self.rope_parameters or {}
        by_kind = [rope.get(kind) or {} for kind in self.layer_types]
        return {parameters["rope_type"] for parameters in (rope, *by_kind) if "rope_type" in parameters}

    def rotates(self, layer_idx: int) -> bool:
        """Whether the queries and keys of a layer carry a rotary embedding."""
        return self.position_embedding_type == "rope" and (
            self.no_rope_layers is None or bool(self.no_rope_layers[layer_idx])
        )

    @property
    def qk_head_dim(self) -> int | None:
        """Width of a head's queries and keys in latent attention, by which transformers knows that values differ."""
        return None if self.kv_lora_rank is None else self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_router_outputs(self) -> int:
        """Experts that a router chooses among, those without weights included."""
        return self.num_experts + self.num_null_experts + self.num_copy_experts

    @property
    def has_capacity(self) -> bool:
        """Whether an expert can be full."""
        limits = (self.capacity_factor, self.eval_capacity_factor, self.expert_capacity)
        return any(limit is not None for limit in limits)

    @property
    def has_empty_slots(self) -> bool:
        """Whether a token may have fewer than K experts with weights."""
        return self.num_router_outputs > self.num_experts or self.has_capacity or router_class(self).variable_k

    @property
    def controller(self) -> str | None:
        """Key in `modeling_moe.router_balancing.CONTROLLERS` of what moves the routers' buffers, if anything does."""
        return self.router_controller or router_class(self).default_controller

    @property
    def has_shared_experts(self) -> bool:
        """Whether a sparse layer also sends every token through shared experts."""
        return self.shared_expert_intermediate_size > 0

    @property
    def first_k_dense_replace(self) -> int:
        """Number of leading dense layers (DeepSeek's name for part of `mlp_layer_types`)."""
        return next((i for i, kind in enumerate(self.mlp_layer_types) if kind != "dense"), self.num_hidden_layers)

    @first_k_dense_replace.setter
    def first_k_dense_replace(self, value: int):
        self.mlp_layer_types = self._kinds_of_layers(value, None)

    @property
    def mlp_only_layers(self) -> list[int]:
        """Indices of the dense layers (Qwen's name for `mlp_layer_types`)."""
        return [i for i, kind in enumerate(self.mlp_layer_types) if kind == "dense"]

    @mlp_only_layers.setter
    def mlp_only_layers(self, value: list[int]):
        self.mlp_layer_types = self._kinds_of_layers(None, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as transformers does, and the version of this package, by which a later one knows old values."""
        return super().to_dict() | {"code_version": __version__}

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        for name in ("_derived", "_added_to_plan"):
            d.pop(name, None)

    def num_params(self) -> int:
        """Number of parameters of `MoEForCausalLM`, a tied head counted once."""
        return params_with(self, self.num_experts)

    def num_active_params(self) -> int:
        """Number of parameters that one token uses: all but the routed experts it is not sent to."""
        return params_with(self, min(self.num_experts_per_tok, self.num_experts))


__all__ = ["MoEConfig"]
