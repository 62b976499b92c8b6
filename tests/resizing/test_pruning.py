"""These tests check dropped and merged experts against hand-made weights, and on texts for which nothing changes."""

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints.lazy_tensor import LazyTensor
from modeling_moe.resizing.pruning import PruningOptions, kept_experts, merge, prune
from modeling_moe.resizing.usage import LayerUsage, Usage, measure_usage
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config


IDS = torch.arange(3, 43).view(2, 20)
BATCHES = [{"input_ids": IDS}]
LOAD = torch.tensor([0.3, 0.6, 0.0, 0.9, 0.1, 0.2], dtype=torch.float64)


def source_model(dtype=torch.float64, **fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**({"num_experts": 6, "num_experts_per_tok": 2} | fields))).to(dtype)
    model.set_experts_implementation("eager")
    return model.eval()


def never_chooses(model, experts) -> MoEForCausalLM:
    """Returns a model whose routers never choose these experts.

    Their rows are shrunk, so that their logits are 0, while the others have a bias of 8.
    """
    for block in model.model.sparse_blocks():
        with torch.no_grad():
            block.gate.bias.fill_(8.0)
            block.gate.bias[experts] = 0.0
            block.gate.weight[experts] *= 0.01
    return model


def state_of(model):
    return {name: LazyTensor.of(t) for name, t in revert_weight_conversion(model, model.state_dict()).items()}


def shrunk(function, model, usage, **options) -> MoEForCausalLM:
    state, config = function(state_of(model), model.config, usage, PruningOptions(**options))
    dtype = next(model.parameters()).dtype
    small = MoEForCausalLM(config).to(dtype)
    small.load_state_dict({name: tensor.read() for name, tensor in state.items()})
    small.set_experts_implementation("eager")
    return small.eval()


def usage_of(load=LOAD, mass=None, reap=None) -> Usage:
    layer = LayerUsage(load, load if mass is None else mass, load if reap is None else reap)
    return Usage({0: layer, 2: layer}, 40)


@pytest.mark.parametrize("function", [prune, merge])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp_bias": True, "num_shared_experts": 1},
        {"mlp_bias": True, "gated_mlp": False},
        {"scoring_func": "sigmoid", "norm_topk_prob": False, "router_selection_bias": True},
        {"num_null_experts": 2, "num_experts_per_tok": 4},
        {"router_expert_scale": True, "moe_latent_size": 10},
    ],
    ids=str,
)
def test_same_logits_where_the_dropped_were_never_used(fields, function):
    model = never_chooses(source_model(router_bias=True, **fields), [1, 4])
    usage = measure_usage(model, BATCHES)
    assert not any(usage.of(layer).load[[1, 4]].any() for layer in (0, 2))
    for score in ("reap", "load", "mass"):
        small = shrunk(function, model, usage, keep=4, score=score)
        assert small.config.num_experts == 4
        with torch.no_grad():
            torch.testing.assert_close(small(IDS).logits, model(IDS).logits, atol=1e-10, rtol=1e-10)
        assert small.config.num_params() == sum(p.numel() for p in small.parameters())


def test_plain_softmax_loses_its_denominator():
    model = source_model(router_bias=True, norm_topk_prob=False)
    for block in model.model.sparse_blocks():
        block.gate.bias.data.fill_(5.0)
        block.gate.bias.data[[1, 4]] = 0.0
    usage = measure_usage(model, BATCHES)
    assert not any(usage.of(layer).load[[1, 4]].any() for layer in (0, 2))
    small = shrunk(prune, model, usage, keep=4)
    assert (small(IDS).logits - model(IDS).logits).abs().max() > 1e-5
    options = PruningOptions(keep=4)
    assert "softmax" in options.reason_not_exact(model.config)
    assert "softmax" not in options.reason_not_exact(tiny_config())
    assert "selection bias" in options.reason_not_exact(tiny_config(router_selection_bias=True))


def test_best_of_each_score_stay():
    config = tiny_config(num_experts=6)
    usage = usage_of(mass=LOAD.flip(0), reap=torch.tensor([6.0, 5, 4, 3, 2, 1]))
    found = {
        score: kept_experts(config, usage, PruningOptions(keep=3, score=score)) for score in ("load", "mass", "reap")
    }
    assert found == {
        "load": {0: [0, 1, 3], 2: [0, 1, 3]},
        "mass": {0: [2, 4, 5], 2: [2, 4, 5]},
        "reap": {0: [0, 1, 2], 2: [0, 1, 2]},
    }
    grouped = tiny_config(num_experts=6, n_group=2, topk_group=1)
    assert kept_experts(grouped, usage, PruningOptions(keep=4, score="load"))[0] == [0, 1, 3, 5]


def test_pruned_weights_are_the_kept_ones_to_the_last_bit():
    model = source_model(torch.bfloat16, num_experts_per_tok=5, router_selection_bias=True, mlp_bias=True)
    for block in model.model.sparse_blocks():
        block.gate.e_score_correction_bias.copy_(torch.randn(6))
    small = shrunk(prune, model, usage_of(), keep=3)
    assert (small.config.num_experts_per_tok, small.config.expected_experts_per_tok) == (3, 3)
    before, rows = model.state_dict(), 0
    for name, tensor in small.state_dict().items():
        expected = before[name][[0, 1, 3]] if ".experts." in name or ".gate." in name else before[name]
        rows += expected is not before[name]
        assert torch.equal(tensor, expected)
    assert rows == 2 * 6


def test_top_k_of_groups_is_lowered():
    model = source_model(num_experts_per_tok=3, n_group=2, topk_group=1)
    small = shrunk(prune, model, usage_of(), keep=4)
    assert small.config.num_experts_per_tok == 2
    assert small(IDS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merged_weights_are_means_by_load(dtype):
    model = source_model(dtype, mlp_bias=True)
    for block in model.model.sparse_blocks():
        with torch.no_grad():
            block.experts.gate_up_proj_bias.normal_()
            # 0 is nearest to 3, and 2 and 4 to 1; 5 has the opposite direction
            block.gate.weight.zero_()
            block.gate.weight[:, :3] = torch.tensor(
                [[2.0, 1, 0], [0, 1, 1], [0, 9, 8], [1, 0, 0], [0, 0, 1], [-1, 0, 0]]
            )
    load = torch.tensor([0.3, 0.6, 0.0, 0.9, 0.2, 0.7], dtype=torch.float64)
    small = shrunk(merge, model, usage_of(load), keep=3)
    for layer in (0, 2):
        old, new = model.model.layers[layer].mlp, small.model.layers[layer].mlp
        assert torch.equal(new.gate.weight, old.gate.weight[[1, 3, 5]])
        for name, tensor in old.experts.named_parameters():
            wide = tensor.double()
            expected = [0.75 * wide[1] + 0.25 * wide[4], 0.75 * wide[3] + 0.25 * wide[0], wide[5]]
            got = new.experts.get_parameter(name)
            assert got.dtype == dtype
            # bf16 is rounded once
            tolerance = {torch.float64: 1e-12, torch.bfloat16: 2**-8}[dtype]
            torch.testing.assert_close(got.double(), torch.stack(expected), rtol=tolerance, atol=1e-9)
            assert torch.equal(got[2], tensor[5])


def test_a_merged_expert_has_the_mean_factor_of_its_members():
    """Experts 0 and 1 differ in their factors alone: the merged expert's output is the mean of theirs."""
    model = source_model(router_expert_scale=True, num_null_experts=1)
    scales = [1.0, 2.0, 1.5, 3.0, 6.0, 0.5, 9.0]
    with torch.no_grad():
        for block in model.model.sparse_blocks():
            block.gate.weight.copy_(torch.eye(7, 32))
            block.gate.weight[0, 1] = 5.0
            block.gate.expert_scale.copy_(torch.tensor(scales))
            for tensor in block.experts.parameters():
                tensor[0] = tensor[1]
    load = torch.tensor([0.1, 0.6, 0.2, 0.9, 0.2, 0.7], dtype=torch.float64)
    pruned, merged = (shrunk(function, model, usage_of(load), keep=5) for function in (prune, merge))
    for layer in (0, 2):
        old, new = model.model.layers[layer].mlp, merged.model.layers[layer].mlp
        assert torch.equal(new.gate.weight, old.gate.weight[1:])
        torch.testing.assert_close(new.experts.down_proj[0], old.experts.down_proj[1])
        assert pruned.model.layers[layer].mlp.gate.expert_scale.tolist() == scales[1:]
        expected = torch.tensor([(0.6 * 2 + 0.1 * 1) / 0.7, *scales[2:]], dtype=torch.float64)
        torch.testing.assert_close(new.gate.expert_scale.detach(), expected)


def test_unused_experts_merge_into_the_kept_one_as_it_is():
    model = source_model()
    small = shrunk(merge, model, usage_of(torch.zeros(6)), keep=1, score="load")
    assert torch.equal(small.model.layers[0].mlp.experts.down_proj[0], model.model.layers[0].mlp.experts.down_proj[0])


def test_merge_stays_within_groups():
    model = source_model(n_group=2, topk_group=2)
    with torch.no_grad():
        for block in model.model.sparse_blocks():
            # expert 0 is most similar to expert 5, which is in the other group
            block.gate.weight[0] = block.gate.weight[5]
    load = torch.tensor([1.0, 2, 0, 0, 0, 3], dtype=torch.float64)
    small = shrunk(merge, model, usage_of(load), keep=2)
    old, new = (m.model.layers[2].mlp.experts.down_proj for m in (model, small))
    torch.testing.assert_close(new, torch.stack([old[0] / 3 + 2 * old[1] / 3, old[5]]), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"router_type": "hash"}, {}, "router_type='hash'"),
        ({"router_type": "task"}, {}, "extract_task"),
        ({"router_type": "hierarchical", "n_group": 2, "num_experts_per_tok": 2}, {}, "router_type='hierarchical'"),
        ({"num_hash_layers": 1}, {}, "num_hash_layers=1"),
        ({"n_group": 2}, {"keep": 3}, "multiple of n_group"),
        ({}, {"keep": 0}, "keep is 0"),
        ({}, {"keep": 6}, "from 1 to 5"),
        ({}, {"score": "luck"}, "score 'luck' is unknown"),
        ({"num_experts": 8}, {}, "the usage has 6 experts"),
        ({"mlp_layer_types": ["sparse"] * 3}, {}, "lacks layer 1"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_refused(fields, options, message):
    config = tiny_config(**({"num_experts": 6} | fields))
    for function in (prune, merge):
        with pytest.raises(UserError, match=message):
            function({}, config, usage_of(), PruningOptions(**options))
