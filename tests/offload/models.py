"""This module builds tiny models of several families with random weights, and runs them in all the ways of inference."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_moe import MoEForCausalLM
from tests.builders import SIZE, tiny_config


EXPERTS, TOP_K = 7, 3
_THEIRS = SIZE | {"moe_intermediate_size": 24, "head_dim": 8, "num_experts_per_tok": TOP_K}
THEIRS = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
    # biases, and matrices that are transposed
    "gpt_oss": {"num_local_experts": EXPERTS},
}
MODELS = ("ours", *THEIRS)


def build(name: str, dtype: torch.dtype = torch.float32, implementation: str = "moe", **fields):
    """Builds a tiny model in evaluation mode; equal arguments give equal weights."""
    torch.manual_seed(0)
    if name == "ours":
        config = tiny_config(num_experts=EXPERTS, num_experts_per_tok=TOP_K, **fields)
        model = MoEForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **_THEIRS | THEIRS[name] | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.set_experts_implementation(implementation)
    return model.to(dtype).eval()


def copy_of(model):
    """Returns a model with a configuration of its own, so that offloading it leaves the other one as it is."""
    return copy.deepcopy(model)


@torch.no_grad()
def outputs(model) -> dict[str, torch.Tensor]:
    """Returns logits of a long batch with padding, and the logits and tokens of decoding one and three sequences."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 99, (3, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    several = {"input_ids": tokens, "attention_mask": mask}
    results = {"prefill": model(**several).logits}
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "min_new_tokens": 5}
    for name, inputs in (("several", several), ("one", {"input_ids": tokens[1:2], "attention_mask": mask[1:2]})):
        generated = model.generate(**inputs, max_new_tokens=5, **settings)
        results |= {f"{name} tokens": generated.sequences, f"{name} logits": torch.stack(generated.logits)}
    return results


def fill_slots_with_nan(model) -> None:
    """Fills all slots with NaN, which shows when memory is read that no expert was copied to."""
    for module in model.modules():
        if offloaded := module.__dict__.get("offloaded"):
            for tensor in offloaded.cache.slots.tensors.values():
                tensor.fill_(float("nan"))
