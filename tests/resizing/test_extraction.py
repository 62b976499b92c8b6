"""This test checks that a model of one task's experts has equal logits to the last bit."""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.resizing import extract_task
from tests.builders import tiny_config


IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(3))
FIELDS = {"router_type": "task", "num_tasks": 3, "router_jitter_noise": 0.1, "routed_scaling_factor": 1.7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"norm_topk_prob": False, "num_shared_experts": 1, "mlp_bias": True}], ids=str)
def test_bitwise_equal(fields, dtype, tmp_path):
    MoEForCausalLM(tiny_config(**FIELDS, **fields)).save_pretrained(tmp_path / "whole")
    model = MoEForCausalLM.from_pretrained(tmp_path / "whole", dtype=dtype).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = set()
    for task in range(3):
        extracted = extract_task(model, task)
        expected = model(IDS, task_ids=torch.tensor([task, task])).logits
        assert torch.equal(extracted(IDS).logits, expected)
        assert extracted.dtype == dtype
        assert extracted.config.num_experts == 3
        chosen.add(tuple(extracted.model.layers[0].mlp.gate.expert_weight.tolist()))
    assert len(chosen) == 3
    extracted.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert loaded.model.layers[0].mlp.gate.expert_weight.dtype == torch.float32
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "task", "message"),
    [
        ({}, 3, "task is 3: it must be between 0 and num_tasks - 1"),
        ({"router_type": "topk", "num_tasks": 1}, 0, "router_type='task'"),
    ],
)
def test_what_cannot_be_extracted(fields, task, message):
    model = MoEForCausalLM(tiny_config(**(FIELDS | fields)))
    with pytest.raises(ValueError, match=message):
        extract_task(model, task)
