# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""MoEConfig: one declared configuration for every sparse decoder this package holds."""

import difflib
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils import logging

from .compatibility import CACHE_NAMES
from .losses import LOSSES
from .normalization import PLACEMENTS
from .routers import ROUTERS, router_class
from .routing import SCORING_FUNCS, Router


logger = logging.get_logger(__name__)


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
        sliding_window: window in tokens of the layers whose type is `"sliding_attention"`.
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
        router_type: how experts are chosen; a key of `modeling_moe.routers.ROUTERS`, whose classes give paper and equation.
        allow_noncausal: permit routing in which a token's experts depend on later tokens (`expert_choice`, `soft`; `base`
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
        expected_experts_per_tok: real experts of a token that `router_controller="pid"` aims at; all K if not given.
        router_selection_bias: add the fp32 buffer `e_score_correction_bias` to the scores that choose the experts, not
            to those that weigh them (DeepSeek-V3, arXiv:2408.15664).
        router_controller: what moves that bias once per optimizer step: `"bias"` by the sign of the imbalance (DeepSeek-V3),
            `"pid"` in proportion to it (LongCat-Flash), `"quantile"` to where it would vanish (Megatron-LM).
        router_bias_update_rate: step of `"bias"` (the controller, if this is positive and none is named) and of `"pid"`.
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
        router_sparsity_coef: `relu`: where the coefficient of its loss begins.
        router_sparsity_step: `relu`: factor by which the coefficient moves, once per optimizer step.
        hash_seed: `hash`: seed of the tables.
        num_hash_layers: so many first layers have `router_type="hash_scored"` (DeepSeek-V4).
        num_tasks: `task` and `task_gate`: tasks that `task_ids` may name.
        slots_per_expert: `soft`: means of tokens that an expert processes.
        segment_length: `segment`: tokens that share a merged expert.
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

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    norm_type: Literal["rms", "rms_fp32", "rms_plus_one", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    position_embedding_type: Literal["rope", "learned"] = "rope"
    rope_fp32: bool = False
    no_rope_layers: list[int] | None = None
    scale_embeddings: bool = False
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    final_logit_softcapping: float | int | None = None
    embd_pdrop: float | int = 0.0
    resid_pdrop: float | int = 0.0
    attention_bias: bool = False
    qkv_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    clip_qkv: float | None = None
    attention_dropout: float | int = 0.0
    attention_multiplier: float | int | None = None
    scale_attn_by_inverse_layer_idx: bool = False
    attn_logit_softcapping: float | int | None = None
    attention_sinks: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    gated_mlp: bool = True
    mlp_bias: bool = False
    mlp_layer_types: list[str] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    gated_experts: bool | None = None
    swiglu_limit: float | int | None = None
    swiglu_alpha: float | int = 1.702
    num_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    experts_recompute: bool = False
    router_type: str = "topk"
    allow_noncausal: bool = False
    scoring_func: str = "softmax"
    router_bias: bool = False
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | int = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["top2sum", "max"] = "top2sum"
    num_null_experts: int = 0
    num_copy_experts: int = 0
    expected_experts_per_tok: float | int | None = None
    router_selection_bias: bool = False
    router_controller: Literal["bias", "pid", "quantile"] | None = None
    router_bias_update_rate: float | int = 0.0
    router_ema_decay: float | int = 0.99
    router_jitter_noise: float | int = 0.0
    router_gradient: Literal["topk", "dense", "sparsemixer"] = "topk"
    router_temperature: float | int = 1.0
    router_top_p: float | int = 0.4
    max_experts_per_tok: int | None = None
    router_threshold: float | int = 0.0
    router_threshold_mode: Literal["fixed", "learned", "budget"] = "budget"
    router_cutoff: float | int = 0.01
    router_sparsity_coef: float | int = 1e-8
    router_sparsity_step: float | int = 1.2
    hash_seed: int = 0
    num_hash_layers: int = 0
    num_tasks: int = 1
    slots_per_expert: int = 1
    segment_length: int = 256
    capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    expert_capacity: int | None = None
    capacity_running: bool = False
    capacity_includes_k: bool = True
    capacity_priority: Literal["token", "k_major", "probability"] = "token"
    router_aux_loss_coef: float | int = 0.01
    router_aux_loss_scope: Literal["sequence", "batch", "global"] = "batch"
    router_z_loss_coef: float | int = 0.001
    router_seq_aux_loss_coef: float | int = 0.0
    router_importance_loss_coef: float | int = 0.0
    router_load_loss_coef: float | int = 0.0
    router_entropy_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._refuse_misspelt(kwargs)
        for alias in self.attribute_map:
            if alias in kwargs:
                setattr(self, alias, kwargs.pop(alias))
        self._fill_defaults()
        self._fill_router_defaults()
        # `@strict` runs the checks too, but wraps what they say in an error of its own that is no ValueError
        self.validate_moe()
        self.validate_routing()
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)
        if self.num_experts_per_tok == 1 and self.norm_topk_prob and "sparse" in self.mlp_layer_types:
            logger.warning_once(
                "num_experts_per_tok=1 with norm_topk_prob=True gives every expert the weight 1: the router gets no "
                "gradient from the task. Set norm_topk_prob=False unless the router is meant to stay as it is."
            )

    def convert_rope_params_to_dict(self, **kwargs):
        """As transformers' own, which in 5.17 puts a theta beside the parameters of each kind of attention."""
        if not set(self.layer_types).intersection(self.rope_parameters or ()):
            return super().convert_rope_params_to_dict(**kwargs)
        self.standardize_rope_params()
        return kwargs

    def _fill_defaults(self) -> None:
        """Gives the fields left None the value that others imply."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.kv_lora_rank is not None:
            self.head_dim = self.qk_rope_head_dim
        self._fill_head_dim()
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.layer_types is None:
            attention = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [attention] * self.num_hidden_layers
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.gated_experts is None:
            self.gated_experts = self.gated_mlp
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.num_shared_experts * self.moe_intermediate_size

    def _fill_head_dim(self) -> None:
        if self.head_dim is not None:
            return
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}): change one of them or set head_dim."
            )
        self.head_dim = self.hidden_size // self.num_attention_heads

    def _fill_router_defaults(self) -> None:
        if self.norm_topk_prob is None:
            self.norm_topk_prob = router_class(self).norm_topk_prob_default
        if self.router_controller is None and self.router_bias_update_rate:
            self.router_controller = "bias"
        if self.expected_experts_per_tok is None:
            self.expected_experts_per_tok = self.num_experts_per_tok

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
        if "sparse" not in self.mlp_layer_types:
            return {}
        names = ["gate_up_proj" if self.gated_experts else "up_proj", "down_proj"]
        names += [f"{name}_bias" for name in names] * self.mlp_bias
        plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in names}
        return plan | {"layers.*.mlp.experts": "ep_dispatch_experts"}

    def _tensor_parallel_plan(self) -> dict[str, str]:
        sparse = "sparse" in self.mlp_layer_types
        # a norm over all heads needs the gathered projection
        colwise, rowwise = "colwise", "rowwise"
        if self.qk_norm == "full":
            colwise, rowwise = "colwise_gather_output", "rowwise_split_input"
        plan = {"layers.*.self_attn.o_proj": rowwise}
        if self.kv_lora_rank is None:
            plan |= {f"layers.*.self_attn.{name}_proj": colwise for name in "qkv"}
        else:
            queries = "q_proj" if self.q_lora_rank is None else "q_b_proj"
            plan |= {f"layers.*.self_attn.{name}": colwise for name in (queries, "kv_b_proj")}
            plan["layers.*.self_attn.kv_a_proj_with_mqa"] = "mla_kv_a_proj"
        if self.qk_norm == "head":
            plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        networks = [("mlp", self.gated_mlp)] * ("dense" in self.mlp_layer_types)
        networks += [("mlp.shared_experts", self.gated_experts)] * (self.has_shared_experts and sparse)
        for network, gated in networks:
            plan |= {f"layers.*.{network}.{name}_proj": "colwise" for name in ["gate"] * gated + ["up"]}
            plan[f"layers.*.{network}.down_proj"] = "rowwise"
        if sparse and not self.mlp_bias:
            up, split = ("gate_up_proj", "packed_colwise") if self.gated_experts else ("up_proj", "colwise")
            plan[f"layers.*.mlp.experts.{up}"] = split
            plan["layers.*.mlp.experts.down_proj"] = "rowwise"
            plan["layers.*.mlp.experts"] = "moe_tp_experts"
        return plan

    def validate_moe(self):
        """Checks what the types cannot say; run on construction, and by `@strict` on saving."""
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}): choose a divisor."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: the rotary embedding needs an even number of at least 2.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown: choose one of {', '.join(sorted(ACT2FN))}.")
        for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
            if getattr(self, name) is not None and len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} names {len(getattr(self, name))} layers and num_hidden_layers is "
                    f"{self.num_hidden_layers}: give one entry for each layer."
                )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention but sliding_window is not set: set it, in tokens.")
        if self.attention_sinks and self.attn_logit_softcapping is not None:
            raise ValueError("attention_sinks and attn_logit_softcapping exclude each other: unset one of them.")
        if self.swiglu_limit is not None and not self.gated_experts:
            raise ValueError("swiglu_limit clamps the gate of gated experts: set gated_experts=True or unset it.")
        self._validate_latent_attention()
        self._validate_ranges()

    def _validate_latent_attention(self) -> None:
        if self.kv_lora_rank is None:
            return
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if (getattr(self, name) or 0) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: kv_lora_rank (latent attention) needs it positive."
                )
        plain = {"qkv_bias": False, "qk_norm": None, "clip_qkv": None, "attention_sinks": False}
        plain |= {"position_embedding_type": "rope", "no_rope_layers": None, "rope_fp32": False}
        plain |= {"scale_attn_by_inverse_layer_idx": False, "attn_logit_softcapping": None}
        plain |= {"num_key_value_heads": self.num_attention_heads}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: latent attention (kv_lora_rank) holds {value!r} alone."
                )

    def _validate_ranges(self) -> None:
        for name in (
            *LOSSES,
            "router_bias_update_rate",
            "router_jitter_noise",
            "attention_dropout",
            "num_shared_experts",
            "shared_expert_intermediate_size",
            "num_null_experts",
            "num_copy_experts",
            "num_hash_layers",
            "router_cutoff",
            "router_sparsity_coef",
            "embd_pdrop",
            "resid_pdrop",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be 0 (off) or positive.")
        for name in (
            "router_temperature",
            "router_top_p",
            "router_sparsity_step",
            "num_tasks",
            "slots_per_expert",
            "segment_length",
            "capacity_factor",
            "eval_capacity_factor",
            "expert_capacity",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "logits_scaling",
            "swiglu_limit",
        ):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}: it must be positive.")

    def validate_routing(self):
        """Checks the fields of the router; run as `validate_moe` is."""
        experts, top_k, outputs = self.num_experts, self.num_experts_per_tok, self.num_router_outputs
        router = router_class(self)
        if self.scoring_func not in SCORING_FUNCS:
            raise ValueError(
                f"scoring_func {self.scoring_func!r} is unknown: choose one of {', '.join(SCORING_FUNCS)}."
            )
        if experts < 1:
            raise ValueError(f"num_experts is {experts}: a sparse layer needs at least 1.")
        if not 1 <= top_k <= outputs:
            raise ValueError(f"num_experts_per_tok is {top_k}: it must lie between 1 and num_experts ({outputs}).")
        if self.n_group < 1 or experts % self.n_group:
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
                self.router_gradient == "dense" and (self.num_copy_experts or router.mix is not Router.mix),
                f"router_gradient='dense' cannot compute copy experts, nor {name}: set it to 'topk'.",
            ),
            (
                self.router_bias and router.logits is not Router.logits,
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
                self.max_experts_per_tok is not None and not router.bounded,
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
                self.router_controller in ("bias", "pid") and not self.router_bias_update_rate,
                f"router_controller={self.router_controller!r} needs a step: set router_bias_update_rate.",
            ),
            (
                self.capacity_running and self.capacity_priority != "token",
                "capacity_running follows the order of the tokens: set capacity_priority='token'.",
            ),
            (
                self.has_capacity and router.mix is not Router.mix,
                f"{name} drops no token: leave the capacity fields unset.",
            ),
        ]
        for refused, message in rules:
            if refused:
                raise ValueError(message)

    def refuse_continuous_batching(self) -> None:
        """Raises unless a token's output is the same when the tokens of many sequences lie in one row, their keys in pages.

        Raises:
            ValueError: names the field that makes the tokens depend on their neighbours in the row, or has no pages.
        """
        router = router_class(self)
        capacity = next(
            (name for name in ("expert_capacity", "eval_capacity_factor") if getattr(self, name) is not None), None
        )
        reason = None
        if self.kv_lora_rank is not None:
            reason = "kv_lora_rank is set, and the pages have no room for latents"
        elif not router.per_token and "sparse" in self.mlp_layer_types:
            reason = f"router_type={self.router_type!r} mixes the tokens of a row"
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
    def leaves_slots_empty(self) -> bool:
        """Whether a token may have fewer than K experts with weights."""
        return self.num_router_outputs > self.num_experts or self.has_capacity or router_class(self).variable_k

    @property
    def controller(self) -> str | None:
        """Key in `modeling_moe.balancing.CONTROLLERS` of what moves the routers' buffers, if anything does."""
        return self.router_controller or router_class(self).own_controller

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
        self.mlp_only_layers = list(range(value))

    @property
    def mlp_only_layers(self) -> list[int]:
        """Indices of the dense layers (Qwen's name for `mlp_layer_types`)."""
        return [i for i, kind in enumerate(self.mlp_layer_types) if kind == "dense"]

    @mlp_only_layers.setter
    def mlp_only_layers(self, value: list[int]):
        self.mlp_layer_types = ["dense" if i in value else "sparse" for i in range(self.num_hidden_layers)]
        self.base_model_tp_plan = self._tensor_parallel_plan()

    def _mlp_params(self, width: int, gated: bool) -> int:
        weights = self.hidden_size * width * (3 if gated else 2)
        return weights + self.mlp_bias * (width * (2 if gated else 1) + self.hidden_size)

    def _norm_params(self) -> int:
        return self.hidden_size * (2 if self.norm_type == "layer" else 1)

    def _latent_attention_params(self) -> int:
        heads, hidden = self.num_attention_heads, self.hidden_size
        latents = self.kv_lora_rank + (self.q_lora_rank or 0)
        queries = heads * self.qk_head_dim * (self.q_lora_rank or hidden)
        keys = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        compressions = hidden * (latents + self.qk_rope_head_dim) + latents
        biases = (latents + self.qk_rope_head_dim + hidden) * self.attention_bias
        return queries + keys + compressions + biases + heads * self.v_head_dim * hidden

    def _attention_params(self) -> int:
        if self.kv_lora_rank is not None:
            return self._latent_attention_params()
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        params = 2 * self.hidden_size * (queries + keys)
        if self.attention_bias or self.qkv_bias:
            params += queries + 2 * keys
        if self.attention_bias:
            params += self.hidden_size
        if self.attention_sinks:
            params += self.num_attention_heads
        return params + {None: 0, "head": 2 * self.head_dim, "full": queries + keys}[self.qk_norm]

    def _router_params(self, layer_idx: int) -> int:
        with torch.device("meta"):
            router = router_class(self, layer_idx)(self, layer_idx)
        return sum(parameter.numel() for parameter in router.parameters())

    def _params_with(self, experts: int) -> int:
        """Parameters of the causal LM if a sparse layer had `experts` routed experts and its router all of them."""
        dense = self._mlp_params(self.intermediate_size, self.gated_mlp)
        sparse = experts * self._mlp_params(self.moe_intermediate_size, self.gated_experts)
        if self.has_shared_experts:
            sparse += self._mlp_params(self.shared_expert_intermediate_size, self.gated_experts)
            sparse += self.shared_expert_gate * self.hidden_size
        layers = sum({"dense": dense, "sparse": sparse}[kind] for kind in self.mlp_layer_types)
        layers += sum(self._router_params(i) for i, kind in enumerate(self.mlp_layer_types) if kind == "sparse")
        norms = sum(name is not None for name in PLACEMENTS[self.norm_placement]) * self._norm_params()
        layers += self.num_hidden_layers * (self._attention_params() + norms)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        if self.position_embedding_type == "learned":
            embeddings += self.max_position_embeddings * self.hidden_size
        return embeddings + layers + self._norm_params()

    def num_params(self) -> int:
        """Number of parameters of `MoEForCausalLM`, a tied head counted once."""
        return self._params_with(self.num_experts)

    def num_active_params(self) -> int:
        """Number of parameters that one token uses: all but the routed experts it is not sent to."""
        return self._params_with(min(self.num_experts_per_tok, self.num_experts))


__all__ = ["MoEConfig"]
