"""This module builds random source models of sparse families and checks that a MoE made from one computes what it computes."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.checkpoint_layout import fuse_experts
from modeling_moe.checkpoints import LazyTensor, State
from modeling_moe.conversion.families.catalogue import SPARSE_FAMILIES, moe_config
from tests import builders


# fields of tiny sources: their sizes, and sizes of latent attention with DeepSeek's names of the experts' fields
SIZE = builders.SIZE | {"num_hidden_layers": 3}
LATENT = SIZE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 8,
}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Adds noise to norms, biases, correction biases and sinks, which are constant in a new model."""
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if any(word in key for word in ("norm", "bias", "sinks")):
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model.eval()


def random_source(config: PreTrainedConfig) -> PreTrainedModel:
    """Returns a source model in which every parameter and each router's correction bias is random."""
    return randomised(AutoModelForCausalLM.from_config(copy.deepcopy(config)))


def padded_batch(side: str) -> dict[str, torch.Tensor]:
    """Returns a batch of 3 texts of 9, 7 and 4 tokens, padded on one side; 9 tokens are beyond a window of 4."""
    ids = torch.randint(3, 99, (3, 9))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 5)):
        columns = slice(0, padding) if side == "left" else slice(9 - padding, 9)
        ids[row, columns], mask[row, columns] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def lazy(tensors: dict[str, torch.Tensor]) -> State:
    """Returns tensors in memory as a state whose tensors are read when they are asked for."""
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


def mapped(config: PreTrainedConfig, state: State) -> tuple[MoEConfig, dict[str, torch.Tensor]]:
    """Returns a source's MoE configuration and weights, and asserts that each tensor has the announced shape and dtype."""
    target = moe_config(config)
    tensors = {}
    for name, tensor in SPARSE_FAMILIES[config.model_type].tensors(state, target).items():
        tensors[name] = tensor.read()
        assert (tensors[name].shape, tensors[name].dtype) == (tensor.shape, tensor.dtype), name
    for layer in range(target.num_hidden_layers):
        fuse_experts(tensors, f"model.layers.{layer}.mlp.experts.", target.num_experts)
    if target.tie_word_embeddings:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return target, tensors


def imported(config: PreTrainedConfig, state: State) -> MoEForCausalLM:
    """Returns the MoE made from a source's configuration and tensors."""
    target, tensors = mapped(config, state)
    model = MoEForCausalLM(target)
    model.load_state_dict(tensors)
    return model.eval()


def check_logits(source: nn.Module, config: PreTrainedConfig, side: str) -> None:
    """Compares fp32 logits and router logits of the real tokens of a batch padded on one side."""
    model = imported(config, lazy(source.state_dict()))
    batch = padded_batch(side)
    expected, got = (net(**batch, output_router_logits=True) for net in (source, model))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], expected.logits[real], **TOLERANCE)
    assert len(got.router_logits) == model.config.mlp_layer_types.count("sparse") > 0
    # Llama's class records no router logits, and many classes do only in newer releases of transformers
    assert "router_logits" in expected or not hasattr(source.config, "output_router_logits")
    for mine, theirs in zip(got.router_logits, expected.get("router_logits", got.router_logits), strict=True):
        torch.testing.assert_close(mine[real.flatten()], theirs[real.flatten()], **TOLERANCE)


def check_text(source: nn.Module, config: PreTrainedConfig) -> None:
    """Compares 12 generated tokens of a left-padded batch, decoded with a cache."""
    model = imported(config, lazy(source.state_dict()))
    batch = padded_batch("left")
    arguments = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    expected = source.generate(**batch, **arguments)
    assert torch.equal(model.generate(**batch, **arguments), expected)


def check_disk(source: PreTrainedModel, config: PreTrainedConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Compares fp32 logits of a MoE made from the files that the source writes; returns the tensors of these files."""
    source.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    model = imported(config, lazy(tensors))
    ids = torch.randint(3, 99, (2, 9))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, **TOLERANCE)
    return tensors


def bf16_outputs(source: PreTrainedModel, folder: Path):
    """Returns the outputs, with router logits, of the MoE and of the source in bf16, with routers in fp32 in both."""
    # the source goes through a file, because `.to(bfloat16)` would round the rotary frequencies
    source.save_pretrained(folder)
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **EAGER)
    for module_name, module in source.named_modules():
        if module_name.endswith((".mlp.gate", ".mlp.router", ".block_sparse_moe.router")):
            # routers of a MoE are always fp32
            module.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    target, tensors = mapped(source.config, lazy(source.state_dict()))
    model = AutoModelForCausalLM.from_config(target, dtype=torch.bfloat16, **EAGER).eval()
    model.load_state_dict(tensors)
    ids = torch.randint(3, 99, (2, 9))
    return tuple(net(ids, output_router_logits=True) for net in (model, source))


def check_reading(source: nn.Module, config: PreTrainedConfig) -> None:
    """Asserts that a conversion reads nothing before it is asked for, and of fused experts only the expert's part."""
    read = []

    def recorded(key: str, tensor: torch.Tensor) -> LazyTensor:
        def load(index):
            read.append(key)
            return tensor[index]

        return LazyTensor(tuple(tensor.shape), tensor.dtype, load)

    state = {key: recorded(key, tensor) for key, tensor in source.state_dict().items()}
    ours = SPARSE_FAMILIES[config.model_type].tensors(state, moe_config(config))
    assert read == []
    ours["model.layers.1.mlp.experts.2.up_proj.weight"].read()
    assert [key.rpartition(".")[2] for key in read] == ["gate_up_proj"]
