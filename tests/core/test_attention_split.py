"""Processes that split a model with routed attention by tensor and expert parallelism compute the gradients of one process."""

import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config
from tests.core.attention_variants import VARIANTS as FORMS
from tests.ranks import needs_transformers, run_ranks


MOA = {
    "routed_attention": "moa",
    "attention_experts": 4,
    "attention_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
COMMON = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    # losses that are means over tokens: each process has the whole batch here
    "router_aux_loss_coef": 0.1,
}
VARIANTS = {"heads": MOA | {"qk_norm": "head"}, "whole": MOA | {"attention_bias": True, "qk_norm": "full"}}
# each process computes their attention whole
VARIANTS |= {form: fields for form, fields in FORMS.items() if form != "moa"}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


def compare(rank: int, folder: str) -> None:
    for name in VARIANTS:
        whole = MoEForCausalLM.from_pretrained(f"{folder}/{name}").train()
        sizes = DistributedConfig(tp_size=2, ep_size=2)
        split = MoEForCausalLM.from_pretrained(f"{folder}/{name}", distributed_config=sizes).train()
        losses = [model(IDS, labels=IDS).loss for model in (whole, split)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        for loss in losses:
            loss.backward()
        gradients = {key: parameter.grad for key, parameter in split.named_parameters()}
        for key, parameter in whole.named_parameters():
            found, place = gradients[key], f"{name}: {key}"
            assert (found is None) == (parameter.grad is None), place
            if found is not None:
                found = found.full_tensor() if isinstance(found, DTensor) else found
                torch.testing.assert_close(
                    found, parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, place=place: f"{place}: {text}"
                )


@needs_transformers("5.24", "this way to split experts")
def test_split_models_have_the_gradients_of_one_process(tmp_path):
    for name, fields in VARIANTS.items():
        torch.manual_seed(0)
        model = MoEForCausalLM(tiny_config(**(COMMON | fields)))
        model.save_pretrained(tmp_path / name)
        split = any("self_attn" in key for key in model.config.base_model_tp_plan)
        assert split == (name == "heads")
        assert not any("self_attn" in key for key in model.config.base_model_ep_plan)
    run_ranks(compare, 2, str(tmp_path))
