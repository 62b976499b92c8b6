# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module extracts from a model with task-level routing the experts that one task uses."""

import copy

import torch

from ..configuration_fields import field_defaults
from ..modeling_moe import MoEForCausalLM
from ..router import RouterFields, RoutingContext
from ..router_assigned import AssignedFields
from ..router_balancing import BalancingFields
from ..router_topk import TopKFields


@torch.no_grad()
def extract_task(model: MoEForCausalLM, task: int) -> MoEForCausalLM:
    """Returns a model with only the experts that a task uses; for that task its logits are equal to the last bit.

    Task-level routing sends all tokens of a task to the same K experts of a layer with the same weights, so that these
    experts can be served alone (Kudugunta et al., arXiv:2110.03742).

    Args:
        model: model with `router_type="task"`, on any device; it is not changed.
        task: id of the task, as in `task_ids`.

    Returns:
        A model with K experts in each sparse layer and `router_type="uniform"`, in evaluation mode, with the
        dtypes of `model`.

    Raises:
        ValueError: if the model does not route by task, or has no such task.
    """
    config = model.config
    if config.router_type != "task" or config.num_hash_layers or config.has_capacity:
        raise ValueError("extract_task needs a model with router_type='task' in all sparse layers, without capacity.")
    if not 0 <= task < config.num_tasks:
        raise ValueError(f"task is {task}: it must be between 0 and num_tasks - 1 ({config.num_tasks - 1}).")
    plain = field_defaults(RouterFields, TopKFields, AssignedFields, BalancingFields)
    state = model.state_dict()
    for layer, block in enumerate(model.model.layers):
        if not block.is_sparse:
            continue
        gate, prefix = block.mlp.gate, f"model.layers.{layer}.mlp"
        gate.training, was_training = False, gate.training
        context = RoutingContext(task_ids=torch.tensor([task], device=gate.weight.device))
        routing = gate(gate.task_embedding[:1], context)
        gate.training = was_training
        experts, order = routing.index[0].sort()
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.gate.")}
        state[f"{prefix}.gate.expert_weight"] = routing.weight[0, order]
        for name, _ in block.mlp.experts.named_parameters():
            state[f"{prefix}.experts.{name}"] = state[f"{prefix}.experts.{name}"][experts]
    extracted = MoEForCausalLM(config.replace(**plain, router_type="uniform", num_experts=config.num_experts_per_tok))
    # `assign` keeps the dtypes of the tensors
    extracted.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    extracted.tie_weights()
    extracted.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    return extracted.eval()
