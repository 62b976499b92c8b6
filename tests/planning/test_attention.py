"""These tests plan models with routed attention: experts of attention are counted apart from those of networks."""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.commands.plan_tables import print_model_plan
from modeling_moe.monitoring import active_share
from modeling_moe.planning import simulated_model
from modeling_moe.planning.memory import whole_bytes
from modeling_moe.planning.parallelism import Parallelism
from modeling_moe.planning.plan import make_plan
from modeling_moe.planning.sizes import Tensors, sizes_of
from tests.builders import tiny_config
from tests.core.attention_variants import VARIANTS
from tests.planning.test_figures import request


def config_of(variant: str, kind: str):
    return tiny_config(**VARIANTS[variant], mlp_layer_types=[kind] * 3, hidden_size=64, moe_intermediate_size=64)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_of_attention_are_counted_and_never_divided(variant, kind):
    config = config_of(variant, kind)
    model, sizes = MoEForCausalLM(config), sizes_of(simulated_model(config, torch.float32))
    matrices = {
        part: sum(tensor.numel() for name, tensor in model.named_parameters() if f"{part}.experts." in name)
        for part in ("mlp", "self_attn")
    }
    groups = [sizes.groups.get(name, Tensors()) for name in ("routed experts", "attention experts")]
    assert [group.params for group in groups] == list(matrices.values())
    assert bool(matrices["self_attn"]) == (variant in ("moa", "switch_head"))
    assert (sizes.total, sizes.active) == (model.num_parameters(), config.num_active_params())
    idle = config.num_params() - config.num_active_params()
    assert active_share(model) == pytest.approx(1 - idle / model.num_parameters(exclude_embeddings=True))
    sparse = kind == "sparse"
    assert (sizes.num_experts, sizes.top_k, sizes.sparse_layers) == ((5, 3, 3) if sparse else (0, None, 0))
    assert whole_bytes(sizes, Parallelism(ep_size=5), trained=False)[0] == matrices["mlp"] * 4 / 5


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_is_printed(variant, kind, capsys):
    plan = make_plan(config_of(variant, kind), request(train=["lora", "qlora"], recompute=["none"], limits=False))
    print_model_plan(plan)
    printed, has_matrices = capsys.readouterr().out, kind == "sparse" or variant in ("moa", "switch_head")
    assert ("all, experts in 4 bits" in printed) == has_matrices
    assert [training.method for training in plan.training] == ["lora", "qlora"][: 1 + has_matrices]
    assert any("none to hold in 4 bits: choose lora" in note for note in plan.notes) == (not has_matrices)
