# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module declares the fields that modeling_moe.py reads: sizes, feed-forward networks and experts.

modeling_moe.py imports the configuration, so that it cannot declare them itself.
"""

from dataclasses import dataclass
from typing import Literal

from transformers.activations import ACT2FN

from .configuration_fields import POSITIVE, PROBABILITY, SPARSE, Condition, Range, setting


_TOKEN_ID = Range(-1, 2**31)
_SHARED = Condition(lambda config: config.has_shared_experts, "set num_shared_experts above 0")


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class ModelFields:
    """These fields configure the sizes of a model and its feed-forward networks."""

    vocab_size: int = setting(32000, "The number of tokens in the vocabulary.", Range(1, 2**28))
    hidden_size: int = setting(1024, "The number of features of the residual stream.", Range(1, 2**20))
    intermediate_size: int = setting(
        2816, "The number of hidden features of a dense feed-forward network.", Range(1, 2**24)
    )
    num_hidden_layers: int = setting(16, "The number of decoder layers.", Range(1, 10_000))
    hidden_act: str = setting(
        "silu",
        "The activation function of all feed-forward networks, by its name in transformers' ACT2FN; experts with swiglu_limit "
        "and swiglu_alpha do not use it.",
        choices=ACT2FN,
    )
    initializer_range: float = setting(
        0.02, "The standard deviation of new weights.", Range(0, 100), effect="training"
    )
    residual_multiplier: float | int = setting(
        1.0,
        "The factor on what attention and feed-forward networks add to the residual stream, as in Granite.",
        POSITIVE,
    )
    resid_pdrop: float | int = setting(
        0.0,
        "The dropout probability in training of what attention and feed-forward networks add to the residual stream.",
        PROBABILITY,
        effect="training",
    )
    gated_mlp: bool = setting(
        True,
        "Computes dense feed-forward networks as down(act(gate(x)) * up(x)); False computes them as down(act(up(x))).",
        conditions=(
            Condition(
                lambda config: "dense" in config.mlp_layer_types or config.gated_experts == config.gated_mlp,
                "give mlp_layer_types a dense layer",
            ),
        ),
    )
    dense_swiglu_limit: float | int | None = setting(
        None,
        "Computes dense networks and shared experts that have a gate as down(act(gate) * up) with gate at most this limit and "
        "up between -limit and limit, as in DeepSeek-V4.",
        POSITIVE,
        conditions=(
            Condition(
                lambda config: (
                    (config.gated_mlp and "dense" in config.mlp_layer_types)
                    or (config.gated_experts and config.has_shared_experts and "sparse" in config.mlp_layer_types)
                ),
                "have a dense layer with gated_mlp=True, or shared experts with gated_experts=True",
            ),
        ),
    )
    mlp_bias: bool = setting(False, "Adds biases to all projections of feed-forward networks, experts included.")
    mlp_layer_types: list[str] = setting(
        None,
        "The type of each layer's feed-forward network: sparse (experts) or dense. first_k_dense_replace (DeepSeek) and "
        "mlp_only_layers (Qwen) are accepted instead.",
        choices=("sparse", "dense"),
        follows="sparse for all layers",
    )
    lm_head_bias: bool = setting(False, "Adds a bias to the logits in the language-model head, as in PhiMoE.")
    logits_scaling: float | int = setting(1.0, "The divisor of the logits, as in Granite.", POSITIVE)
    final_logit_softcapping: float | int | None = setting(
        None, "Bounds the logits by cap * tanh(logit / cap), as in Gemma 2.", POSITIVE
    )
    tie_word_embeddings: bool = setting(False, "Lets the language-model head share the weight of the token embedding.")
    use_cache: bool = setting(True, "Returns a key-value cache from the forward pass.", effect="training")
    output_router_logits: bool = setting(
        False,
        "Returns router logits and load-balancing loss from the forward pass; it does not switch a loss on or off.",
        effect="training",
    )
    pad_token_id: int | None = setting(None, "The id of the padding token.", _TOKEN_ID, effect="training")
    bos_token_id: int | None = setting(None, "The id of the token that begins a text.", _TOKEN_ID, effect="training")
    eos_token_id: int | list[int] | None = setting(
        None, "The id, or the ids, of the token that ends a text.", _TOKEN_ID, effect="training"
    )


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class ExpertFields:
    """These fields configure the experts of sparse layers."""

    num_experts: int = setting(
        8,
        "The number of routed experts of a sparse layer; num_local_experts and n_routed_experts are other names for it.",
        Range(1, 2**16),
    )
    num_experts_per_tok: int = setting(2, "The number of experts that a token is sent to.", Range(1, 2**17))
    moe_intermediate_size: int = setting(
        None, "The number of hidden features of a routed expert.", Range(1, 2**24), follows="intermediate_size"
    )
    gated_experts: bool = setting(
        None,
        "Computes routed and shared experts as down(act(gate(x)) * up(x)); False computes them as down(act(up(x))).",
        conditions=(SPARSE,),
        follows="gated_mlp",
    )
    swiglu_limit: float | int | None = setting(
        None,
        "Computes experts as down((up + 1) * gate * sigmoid(swiglu_alpha * gate)) with gate at most this limit and up between "
        "-limit and limit, as in gpt-oss; None clamps nothing and uses hidden_act.",
        POSITIVE,
        conditions=(SPARSE,),
    )
    swiglu_alpha: float | int | None = setting(
        1.702,
        "The slope of the sigmoid in gpt-oss's clamped SwiGLU; None computes down(act(gate) * up) of the clamped gate and up, "
        "as in DeepSeek-V4.",
        POSITIVE,
        conditions=(Condition(lambda config: config.swiglu_limit is not None, "set swiglu_limit"),),
    )
    moe_latent_size: int | None = setting(
        None,
        "The number of features that routed experts read and write, between one projection of the token before them and one "
        "of their weighted sum, as in Nemotron-3's LatentMoE; router and shared experts read the token. No dense network can be "
        "upcycled to it exactly. None gives the experts hidden_size features.",
        Range(1, 2**20),
        conditions=(SPARSE,),
    )
    num_shared_experts: int = setting(
        0,
        "The number of experts that every token passes through, computed as one network; n_shared_experts is another name for "
        "it.",
        Range(0, 2**16),
        effect="detail",
        conditions=(SPARSE,),
    )
    shared_expert_intermediate_size: int = setting(
        None,
        "The number of hidden features of all shared experts together.",
        Range(0, 2**24),
        conditions=(SPARSE,),
        follows="num_shared_experts * moe_intermediate_size",
    )
    shared_expert_gate: bool = setting(
        False,
        "Multiplies the output of the shared experts by the sigmoid of a learned projection of the token, as in Qwen2-MoE.",
        conditions=(SPARSE, _SHARED),
    )
    shared_expert_combination_strategy: Literal["sum", "average"] = setting(
        "sum",
        'How the outputs of routed and shared experts are combined: "sum", or "average", half the sum, as in Cohere2-MoE.',
        conditions=(SPARSE, _SHARED),
    )
    moe_output_bias: bool = setting(
        False,
        "Adds a bias to the output of sparse feed-forward networks, after the sum over experts, as in JetMoE.",
        conditions=(SPARSE,),
    )
    experts_recompute: bool = setting(
        False,
        "Computes the first projection of the experts again in the backward pass instead of keeping its result, which saves "
        "memory for about 22% more arithmetic of the experts in training; the experts functions of this package read it.",
        effect="training",
        conditions=(SPARSE,),
    )
