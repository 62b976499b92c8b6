"""Processes that split a mixture of attention heads by tensor and expert parallelism compute the gradients of one process."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config
from tests.ranks import needs_transformers, run_ranks


MOA = {
    "routed_attention": "moa",
    "attention_experts": 4,
    "attention_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    # losses that are means over tokens: each process has the whole batch here
    "router_aux_loss_coef": 0.1,
}
VARIANTS = {"heads": {"qk_norm": "head"}, "whole": {"attention_bias": True, "qk_norm": "full"}}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


def compare(rank: int, folder: str, sizes: dict[str, int]) -> None:
    whole = MoEForCausalLM.from_pretrained(folder).train()
    split = MoEForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).train()
    losses = [model(IDS, labels=IDS).loss for model in (whole, split)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in split.named_parameters()}
    for name, parameter in whole.named_parameters():
        found = gradients[name]
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            found = found.full_tensor() if isinstance(found, DTensor) else found
            torch.testing.assert_close(
                found, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@needs_transformers("5.24", "this way to split experts")
@pytest.mark.parametrize("name", VARIANTS)
def test_split_models_have_the_gradients_of_one_process(name, tmp_path):
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**(MOA | VARIANTS[name])))
    model.save_pretrained(tmp_path)
    split = any("self_attn.experts" in key for key in model.config.base_model_tp_plan)
    assert split == (name == "heads")
    assert not any("self_attn" in key for key in model.config.base_model_ep_plan)
    run_ranks(compare, 2, str(tmp_path), {"tp_size": 2, "ep_size": 2})
