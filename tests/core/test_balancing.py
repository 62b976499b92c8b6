"""DeepSeek-V3's bias: one step per optimizer step, over all micro-batches, whatever is recomputed."""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.balancing import update_routers
from tests.conftest import tiny_config


FIELDS = {
    "scoring_func": "sigmoid",
    "router_selection_bias": True,
    "router_bias_update_rate": 0.001,
    "router_aux_loss_coef": 0.0,
    "router_z_loss_coef": 0.0,
}
IDS = torch.arange(3, 23).view(2, 10)


def blocks(model):
    return [layer.mlp for layer in model.model.layers if layer.is_sparse]


def test_step_by_hand():
    model = MoEForCausalLM(tiny_config(**FIELDS))
    statistics = model.model.router_totals.statistics
    statistics[0] = torch.tensor([4.0, 0.0, 2.0, 2.0, 2.0])
    model.update_routers()
    expected = torch.tensor([-0.001, 0.001, 0.0, 0.0, 0.0])
    torch.testing.assert_close(blocks(model)[0].gate.e_score_correction_bias, expected)
    assert not statistics.any()
    assert not blocks(model)[1].gate.e_score_correction_bias.any()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_load_is_counted_once_and_over_micro_batches(checkpointing):
    model = MoEForCausalLM(tiny_config(**FIELDS)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for _ in range(2):
        model(IDS, attention_mask=mask, labels=IDS).loss.backward()
    assert model.model.router_totals.statistics.sum(dim=-1).tolist() == [2 * 3 * mask.sum()] * 2


def test_evaluation_counts_nothing():
    model = MoEForCausalLM(tiny_config(**FIELDS)).eval()
    model(IDS, labels=IDS, output_router_logits=True)
    assert not model.model.router_totals.statistics.any()


def test_it_balances():
    """Fed the same tokens, the bias alone evens out the load."""
    model = MoEForCausalLM(tiny_config(**(FIELDS | {"router_bias_update_rate": 0.02}))).train()
    ids = torch.randint(3, 99, (8, 16))

    def violation():
        load = model(ids, output_router_logits=True).expert_load
        return (load.max(-1).values / load.mean(-1)).mean().item() - 1

    before = violation()
    for _ in range(60):
        violation()
        model.update_routers()
    assert violation() < 0.3 * before


def test_models_without_bias_are_left_alone():
    model = MoEForCausalLM(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update_routers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bias_is_saved_in_fp32_and_its_counter_is_not(tmp_path):
    model = MoEForCausalLM(tiny_config(**FIELDS))
    blocks(model)[0].gate.e_score_correction_bias.fill_(0.123456789)
    model.model.router_totals.statistics.fill_(3)
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(
        blocks(loaded)[0].gate.e_score_correction_bias, torch.full((5,), 0.123456789, dtype=torch.float32)
    )
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert not loaded.model.router_totals.statistics.any()
