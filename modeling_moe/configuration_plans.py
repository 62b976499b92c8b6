# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module makes the plans by which transformers splits a model over processes: expert and tensor parallelism."""

from typing import Any


def expert_parallel_plan(config: Any) -> dict[str, str]:
    """Returns the rule of expert parallelism for each parameter or module of the base model, by its name."""
    if "sparse" not in config.mlp_layer_types:
        return {}
    names = ["gate_up_proj" if config.gated_experts else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] * config.mlp_bias
    plan = {f"layers.*.mlp.experts.{name}": "grouped_gemm" for name in names}
    return plan | {"layers.*.mlp.experts": "ep_dispatch_experts"}


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """Returns the rule of tensor parallelism for each parameter or module of the base model, by its name."""
    plan, sparse = _attention_plan(config), "sparse" in config.mlp_layer_types
    networks = [("mlp", config.gated_mlp)] * ("dense" in config.mlp_layer_types)
    networks += [("mlp.shared_experts", config.gated_experts)] * (config.has_shared_experts and sparse)
    for network, gated in networks:
        plan |= {f"layers.*.{network}.{name}_proj": "colwise" for name in ["gate"] * gated + ["up"]}
        plan[f"layers.*.{network}.down_proj"] = "rowwise"
    if sparse and not config.mlp_bias:
        up, split = ("gate_up_proj", "packed_colwise") if config.gated_experts else ("up_proj", "colwise")
        plan[f"layers.*.mlp.experts.{up}"] = split
        plan["layers.*.mlp.experts.down_proj"] = "rowwise"
        plan["layers.*.mlp.experts"] = "moe_tp_experts"
    return plan


def _attention_plan(config: Any) -> dict[str, str]:
    """Returns the part of the plan that splits attention."""
    if config.routed_attention is not None:
        return _routed_attention_plan(config)
    # a norm over all heads needs the gathered projection
    colwise, rowwise = "colwise", "rowwise"
    if config.qk_norm == "full":
        colwise, rowwise = "colwise_gather_output", "rowwise_split_input"
    plan = {"layers.*.self_attn.o_proj": rowwise}
    if config.kv_lora_rank is None:
        projections = ["q", "k", "v"] + ["gate"] * config.attn_output_gate
        plan |= {f"layers.*.self_attn.{name}_proj": colwise for name in projections}
    else:
        queries = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        plan |= {f"layers.*.self_attn.{name}": colwise for name in (queries, "kv_b_proj")}
        plan["layers.*.self_attn.kv_a_proj_with_mqa"] = "mla_kv_a_proj"
    if config.qk_norm == "head":
        plan |= {f"layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
    return plan


def _routed_attention_plan(config: Any) -> dict[str, str]:
    """Returns the part of the plan that splits the heads of each expert; empty where each process computes all of them.

    Vectors that all experts share, over all heads of an expert, cannot be split by a rule of a module.
    """
    shared = config.attention_bias or config.qkv_bias or config.attention_sinks or config.qk_norm == "full"
    if config.routed_attention != "moa" or shared:
        return {}
    prefix = "layers.*.self_attn"
    plan = {f"{prefix}.{name}_proj": "colwise" for name in "kv"}
    plan |= {f"{prefix}.experts.up_proj": "colwise", f"{prefix}.experts.down_proj": "rowwise"}
    if config.qk_norm == "head":
        plan |= {f"{prefix}.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
    return plan | {f"{prefix}.experts": "moe_tp_experts"}
