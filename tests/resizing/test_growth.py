"""These tests check that a grown model has an equal function in float64, and that the new experts can be used."""

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints.lazy_tensor import LazyTensor
from modeling_moe.resizing.growth import GrowthOptions, grow, release_experts
from modeling_moe.resizing.usage import measure_usage
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config


IDS = torch.arange(3, 43).view(2, 20)
EXACT = GrowthOptions(noise=0.0)


def source_model(dtype=torch.float64, **fields) -> MoEForCausalLM:
    """Returns a float64 model with random weights and biases that runs transformers' eager experts."""
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**({"num_experts": 6} | fields)))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "bias" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model = model.to(dtype).eval()
    model.set_experts_implementation("eager")
    return model


def state_of(model):
    return {name: LazyTensor.of(t) for name, t in revert_weight_conversion(model, model.state_dict()).items()}


def loaded(state, config, dtype=torch.float64) -> MoEForCausalLM:
    model = MoEForCausalLM(config).to(dtype)
    model.load_state_dict({name: tensor.read() for name, tensor in state.items()})
    model.set_experts_implementation("eager")
    return model.eval()


def grown(model, options=EXACT, usage=None) -> MoEForCausalLM:
    dtype = next(model.parameters()).dtype
    return loaded(*grow(state_of(model), model.config, options, usage), dtype)


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs).logits


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"router_selection_bias": True, "norm_topk_prob": False},
        {"scoring_func": "sigmoid", "router_selection_bias": True},
        {"scoring_func": "sigmoid", "norm_topk_prob": False, "num_experts_per_tok": 1},
        {"scoring_func": "sqrtsoftplus", "norm_topk_prob": False, "routed_scaling_factor": 0.7},
        {"num_shared_experts": 1, "shared_expert_gate": True, "mlp_bias": True, "router_bias": True},
        {"gated_mlp": False, "mlp_bias": True},
        {"scoring_func": "sigmoid", "router_selection_bias": True, "n_group": 3, "topk_group": 2},
        {"n_group": 3, "topk_group": 2, "group_score": "max", "norm_topk_prob": False},
        {"router_type": "gumbel_topk"},
        {"router_type": "task", "num_tasks": 2},
        {"router_selection_bias": True, "router_selection_bias_on": "logits", "router_expert_scale": True},
        {"moe_latent_size": 10, "router_logit_softcapping": 1.0, "router_input_norm": True},
    ],
    ids=str,
)
def test_clones_keep_the_function(fields, factor):
    model = source_model(**fields)
    kwargs = {"task_ids": torch.tensor([0, 1])} if "num_tasks" in fields else {}
    big = grown(model, GrowthOptions(noise=0.0, factor=factor))
    assert big.config.num_experts == 6 * factor
    assert big.config.num_experts_per_tok == model.config.num_experts_per_tok * factor
    assert big.config.num_params() == sum(p.numel() for p in big.parameters())
    torch.testing.assert_close(logits(big, **kwargs), logits(model, **kwargs), atol=1e-10, rtol=1e-10)
    assert GrowthOptions(factor=factor).reason_not_exact() is None


def test_noise_parts_the_clones_and_keeps_the_function():
    model = source_model()
    for factor in (2, 3):
        big = grown(model, GrowthOptions(noise=0.5, factor=factor))
        down = big.model.layers[0].mlp.experts.down_proj.unflatten(0, (factor, 6))
        assert not torch.equal(down[0], down[1])
        shift = (down[0] - down[-1]).std() / 2
        torch.testing.assert_close(shift, 0.5 * down[0].std(), rtol=0.2, atol=0)
        torch.testing.assert_close(logits(big), logits(model), atol=1e-10, rtol=1e-10)
    big(IDS, labels=IDS).loss.backward()
    gradient = big.model.layers[0].mlp.experts.gate_up_proj.grad
    assert (gradient[:6] - gradient[-6:]).abs().max() > 1e-3 * gradient.abs().max()


def test_weights_are_copied_to_the_last_bit():
    model = source_model(torch.bfloat16, router_selection_bias=True, scoring_func="sigmoid")
    big = grown(model)
    for name, tensor in model.state_dict().items():
        copies = big.state_dict()[name]
        assert copies.dtype == tensor.dtype
        whole = copies if copies.shape == tensor.shape else copies.unflatten(0, (2, 6))
        assert torch.equal(whole, tensor.expand_as(whole))
    assert sum(t.shape[:1] == (12,) for t in big.state_dict().values()) == 8


def test_nothing_is_read_before_it_is_asked_for():
    def refuse(index):
        raise AssertionError("read")

    model = source_model(gated_mlp=False, mlp_bias=True)
    unread = {name: LazyTensor(t.shape, t.dtype, refuse) for name, t in state_of(model).items()}
    for options in (GrowthOptions(), GrowthOptions(mode="masked")):
        state, config = grow(unread, model.config, options)
        expected = state_of(MoEForCausalLM(config))
        assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in expected.items()}


@pytest.mark.parametrize("options", [{"keep_top_k": True}, {"router_noise": 0.5}], ids=str)
def test_inexact_options_say_so(options):
    options = GrowthOptions(**options)
    assert options.reason_not_exact()
    model = source_model()
    big = grown(model, options)
    assert (logits(big) - logits(model)).abs().max() > 1e-3
    assert big.config.num_experts_per_tok == (3 if options.keep_top_k else 6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"scoring_func": "sigmoid", "norm_topk_prob": False},
        {"scoring_func": "sigmoid", "router_selection_bias": True, "n_group": 3, "topk_group": 2},
        {"scoring_func": "sqrtsoftplus", "router_selection_bias": True, "router_bias": True},
        {"num_shared_experts": 1, "mlp_bias": True, "gated_mlp": False},
    ],
    ids=str,
)
def test_masked_experts_are_unseen_until_released(fields):
    model = source_model(**fields)
    options = GrowthOptions(mode="masked", num_experts=10, noise=0.3, router_noise=0.5)
    assert options.reason_not_exact() is None
    big = grown(model, options)
    assert big.config.num_experts_per_tok == 3
    torch.testing.assert_close(logits(big), logits(model), atol=1e-10, rtol=1e-10)
    for layer in (0, 2):
        for name, old in model.model.layers[layer].mlp.experts.named_parameters():
            new = big.model.layers[layer].mlp.experts.get_parameter(name)
            assert torch.equal(new[:6], old)
            assert torch.equal(new[6:], old[:4]) == name.endswith("bias")
    release_experts(big, [6, 7])
    bias = big.model.layers[0].mlp.gate.e_score_correction_bias
    torch.testing.assert_close(bias[6:8], bias[:6].mean().expand(2))
    load = big(IDS, output_router_logits=True).expert_load
    assert load[:, 6:8].sum() > 0
    assert load[:, 8:].sum() == 0
    assert (logits(big) - logits(model)).abs().max() > 1e-3


def test_masked_experts_copy_the_busiest():
    model = source_model()
    usage = measure_usage(model, [{"input_ids": IDS}])
    big = grown(model, GrowthOptions(mode="masked", num_experts=8, noise=0.0), usage)
    for layer in (0, 2):
        busiest = usage.of(layer).load.argsort(descending=True)[:2]
        down = big.model.layers[layer].mlp.experts.down_proj
        assert torch.equal(down[6:], down[busiest])
    with pytest.raises(UserError, match="usage has no effect"):
        grow(state_of(model), model.config, EXACT, usage)


def test_noise_has_one_seed_for_each_expert():
    model = source_model()
    experts = [
        grown(model, GrowthOptions(mode="masked", noise=0.1, seed=seed)).model.layers[0].mlp.experts.down_proj
        for seed in (0, 0, 1)
    ]
    assert torch.equal(experts[0], experts[1])
    assert not torch.equal(experts[0], experts[2])
    shifts = experts[0][6:] - experts[0][:6]
    assert (shifts[0] - shifts[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"router_type": "hash"}, {}, "router_type='hash'"),
        ({"router_type": "top_p"}, {}, "needs router_type topk"),
        ({"router_type": "expert_choice", "allow_noncausal": True}, {}, "needs router_type topk"),
        ({"router_type": "hierarchical", "n_group": 2, "num_experts_per_tok": 2}, {}, "needs router_type topk"),
        ({"num_hash_layers": 1}, {}, "num_hash_layers=1"),
        ({"router_gradient": "sparsemixer", "router_jitter_noise": 0.1}, {}, "router_gradient='sparsemixer'"),
        ({"num_null_experts": 2}, {}, "num_null_experts"),
        ({"capacity_factor": 2.0}, {}, "capacity"),
        ({}, {"num_experts": 9}, "multiple of the model's 6"),
        ({}, {"num_experts": 6}, "growth to . experts is impossible"),
        ({}, {"factor": 0}, "growth to . experts is impossible"),
        ({}, {"mode": "split"}, "mode 'split' is unknown"),
        ({}, {"noise": -1.0}, "noise is -1.0"),
        ({"norm_topk_prob": False}, {"mode": "masked"}, "use mode='clone'"),
        ({"router_selection_bias": True}, {"mode": "masked"}, "use mode='clone'"),
        (
            {"scoring_func": "sigmoid", "router_selection_bias": True, "router_controller": "quantile"},
            {"mode": "masked"},
            "quantile",
        ),
        ({"n_group": 3, "scoring_func": "sigmoid"}, {"mode": "masked", "num_experts": 9}, "multiple of 2"),
    ],
    ids=str,
)
def test_what_cannot_grow_is_refused(fields, options, message):
    config = tiny_config(**({"num_experts": 6, "topk_group": fields.get("n_group", 1)} | fields))
    with pytest.raises(UserError, match=message):
        grow({}, config, GrowthOptions(**options))


def test_what_cannot_be_released_is_refused():
    with pytest.raises(UserError, match="router_selection_bias"):
        release_experts(source_model(), [0])
    with pytest.raises(UserError, match="from 0 to 5"):
        release_experts(source_model(router_selection_bias=True), [6])
