# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Taking out of a model what one task of it uses."""

import copy

import torch

from ..configuration_moe import MoEConfig
from ..modeling_moe import MoEForCausalLM
from ..router import RoutingContext


# fields of a router that an extracted model has no use for, and what they are then
_PLAIN = {
    "router_type": "uniform",
    "num_tasks": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "router_selection_bias": False,
    "router_controller": None,
    "router_bias_update_rate": 0.0,
    "router_jitter_noise": 0.0,
    "router_gradient": "topk",
}


@torch.no_grad()
def extract_task(model: MoEForCausalLM, task: int) -> MoEForCausalLM:
    """The model of one task, with the experts that it uses and no other; its logits are the same to the last bit.

    Task-level routing sends all tokens of a task to the same K experts of a layer with the same weights, so that they can
    be served alone (Kudugunta et al., arXiv:2110.03742).

    Args:
        model: with `router_type="task"`, on any device; it is left as it is.
        task: as in `task_ids`.

    Returns:
        A model with K experts in each sparse layer and `router_type="uniform"`, in evaluation mode, of the same dtype.

    Raises:
        ValueError: for a model that routes otherwise, or a task that it does not have.
    """
    config = model.config
    if config.router_type != "task" or config.num_hash_layers or config.has_capacity:
        raise ValueError("extract_task needs a model with router_type='task' in all sparse layers, without capacity.")
    if not 0 <= task < config.num_tasks:
        raise ValueError(f"task is {task}: it must lie between 0 and num_tasks - 1 ({config.num_tasks - 1}).")
    fields = config.to_dict() | _PLAIN | {"num_experts": config.num_experts_per_tok}
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
    extracted = MoEForCausalLM(MoEConfig(**fields))
    # takes the tensors' own dtypes over
    extracted.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    extracted.tie_weights()
    extracted.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    return extracted.eval()
