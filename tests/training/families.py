"""This module builds a tiny model of every causal LM with experts in the installed transformers."""

import inspect
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# field of transformers' configurations -> a small value
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    # two digits, so that sorting by name and by number differ
    "num_experts": 12,
    "num_local_experts": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# model type -> further fields that it needs
ALSO = {
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_expand": 2, "mamba_d_head": 16},
    "dots3_note_text": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "beam": {"num_hidden_layers": 4},
    "flint": {"num_hidden_layers": 4},
    "inkling2_text": {"unpadded_vocab_size": 60},
    "inkling2_loop_text": {"unpadded_vocab_size": 60},
    "gemma4_text": {"enable_moe_block": True, "num_key_value_heads": 2, "top_k_experts": 2},
}
# dbrx: the default configuration gives no model that runs; deepseek_v4: a `Trainer` cannot read its own config.json
BROKEN = {"dbrx", "deepseek_v4"}


def model_class(model_type: str) -> type[PreTrainedModel]:
    """Returns the causal LM class of a model type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def families() -> list[str]:
    """Returns the model types with a module `experts`; a model type with a separate text model is left out."""
    names, root = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, Path(transformers.__file__).parent / "models"
    found = []
    for model_type in sorted(names.keys() - BROKEN - {"moe"}):
        module = model_type_to_module_name(model_type)
        file = root / module / f"modeling_{module}.py"
        text = (
            file.read_text("utf-8")
            if file.is_file()
            else inspect.getsource(inspect.getmodule(model_class(model_type)))
        )
        if "self.experts = " in text and f"{model_type}_text" not in names:
            found.append(model_type)
    return found


def tiny(model_type: str, **fields) -> PreTrainedModel:
    """Returns a tiny fp32 model; equal fields give equal weights."""
    config_class = CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map}
    small = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:
        small["num_key_value_heads"] = small["num_attention_heads"]
    torch.manual_seed(0)
    return model_class(model_type)(config_class(**small | ALSO.get(model_type, {}) | fields)).float()
