"""The switches of routers are compared with formulas in float64, and with the routers of transformers that they come from."""

import importlib

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from modeling_moe import MoEForCausalLM
from modeling_moe.router import Router, RoutingContext
from modeling_moe.router_balancing import QuantileController
from modeling_moe.router_catalogue import router_class
from tests.builders import tiny_config


SIZE = {"hidden_size": 8, "num_experts": 5, "num_experts_per_tok": 3}
SIGMOID = {"scoring_func": "sigmoid", "router_selection_bias": True}


def router_of(**fields) -> Router:
    """Returns a float64 router in evaluation mode, in which every parameter and the selection bias is random."""
    config = tiny_config(**SIZE, **fields)
    return randomised(router_class(config)(config))


def randomised(module: nn.Module) -> nn.Module:
    module = module.double().eval()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.normal_()
    return module


def tokens_of(count: int = 17) -> torch.Tensor:
    return torch.randn(count, 8, dtype=torch.float64)


def spread(weight: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Puts weights (T, K) into the columns of their experts (T, 5)."""
    return weight.new_zeros(len(weight), 5).scatter(-1, index, weight)


def their_router(model_type: str, name: str, **fields) -> nn.Module:
    """Returns a random float64 router of transformers; the test is skipped if this release has no such family."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {model_type}")
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = CONFIG_MAPPING[model_type]()
    for field, value in fields.items():
        setattr(config, field, value)
    return randomised(getattr(module, name)(config))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_bias_on_logits_by_the_formula(scoring, norm):
    """I = topk(z + b), w = score(z)_I (Kolibri has the sigmoid)."""
    fields = {"scoring_func": scoring, "router_selection_bias": True, "router_selection_bias_on": "logits"}
    router, tokens = router_of(norm_topk_prob=norm, **fields), tokens_of()
    routing = router(tokens)
    z = tokens @ router.weight.T
    scores = {"softmax": z.softmax(-1), "sigmoid": z.sigmoid(), "sqrtsoftplus": z.exp().log1p().sqrt()}[scoring]
    index = (z + router.e_score_correction_bias.double()).argsort(dim=-1, descending=True)[:, :3]
    assert torch.equal(routing.index, index)
    weight = scores.gather(-1, index)
    torch.testing.assert_close(routing.weight, weight / weight.sum(-1, keepdim=True) if norm else weight)
    # the bias on scores chooses other experts
    on_scores = (scores + router.e_score_correction_bias.double()).argsort(dim=-1, descending=True)[:, :3]
    assert not torch.equal(on_scores, index)


@pytest.mark.parametrize("norm", [False, True])
def test_a_bias_on_logits_equals_kolibri(norm):
    theirs = their_router("kolibri1", "Kolibri1TopKRouter", **SIZE, norm_topk_prob=norm)
    router = router_of(norm_topk_prob=norm, router_selection_bias_on="logits", **SIGMOID)
    router.load_state_dict(theirs.state_dict())
    tokens = tokens_of()
    (logits, weight, index), routing = theirs(tokens), router(tokens)
    torch.testing.assert_close(routing.logits, logits.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        spread(routing.weight, routing.index), spread(weight, index).double(), atol=1e-5, rtol=1e-5
    )


def test_groups_are_chosen_by_logits_too():
    config = tiny_config(
        **SIZE | {"num_experts": 6}, n_group=3, topk_group=2, router_selection_bias_on="logits", **SIGMOID
    )
    router, tokens = randomised(router_class(config)(config)), tokens_of()
    biased = tokens @ router.weight.T + router.e_score_correction_bias.double()
    for row, index in zip(biased, router(tokens).index, strict=True):
        strength = row.view(3, 2).sum(-1)
        eligible = [expert for group in strength.topk(2).indices.tolist() for expert in (2 * group, 2 * group + 1)]
        best = sorted(eligible, key=lambda expert: -row[expert])[:3]
        assert set(index.tolist()) == set(best)


def test_the_quantile_bias_on_logits_is_measured_on_logits():
    """In balance by the controller's rule, each expert gets K / E of the tokens."""
    router = router_of(
        router_selection_bias_on="logits", router_controller="quantile", router_ema_decay=0.1, **SIGMOID
    )
    tokens, controller = tokens_of(400) + 0.5, QuantileController()
    router.e_score_correction_bias.zero_()
    before = router(tokens).index.flatten().bincount(minlength=5)
    for _ in range(60):
        controller.step_layer(router, controller.observe(router, router(tokens), None))
    after = router(tokens).index.flatten().bincount(minlength=5)
    assert (before - 240).abs().max() > 50
    assert (after - 240).abs().max() < 10


@pytest.mark.parametrize(("scale", "cap"), [(0.3, None), (1.0, 0.7), (2.5, 1.5)])
def test_logits_are_scaled_and_then_bounded(scale, cap):
    """z' = c z, then cap * tanh(z' / cap)."""
    router = router_of(router_logit_scale=scale, router_logit_softcapping=cap, router_bias=True)
    tokens = tokens_of()
    expected = scale * (tokens @ router.weight.T + router.bias)
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    routing = router(tokens)
    torch.testing.assert_close(routing.logits, expected)
    torch.testing.assert_close(routing.probs, expected.softmax(-1))
    torch.testing.assert_close(routing.weight, expected.gather(-1, routing.index).softmax(-1))


def test_a_cap_equals_laguna():
    fields = SIZE | {"moe_router_logit_softcapping": 1.5}
    theirs = their_router("laguna", "LagunaTopKRouter", **fields)
    router = router_of(router_logit_softcapping=1.5, norm_topk_prob=True, **SIGMOID)
    router.load_state_dict(theirs.state_dict())
    tokens = tokens_of()
    (logits, weight, index), routing = theirs(tokens), router(tokens)
    torch.testing.assert_close(routing.logits, logits.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        spread(routing.weight, routing.index), spread(weight, index).double(), atol=1e-5, rtol=1e-5
    )


def test_a_scale_equals_muse_spark():
    if "muse_spark" not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no muse_spark")
    from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkTopkRouter

    config = MuseSparkTextConfig()
    values = {"hidden_size": 8, "num_local_experts": 5, "num_experts_per_tok": 3}
    for field, value in (values | {"output_multiplier": 0.4, "routed_scaling_factor": 2.5}).items():
        setattr(config, field, value)
    theirs = randomised(MuseSparkTopkRouter(config))
    router = router_of(router_logit_scale=0.4, routed_scaling_factor=2.5, **SIGMOID)
    router.load_state_dict(theirs.state_dict())
    tokens = tokens_of()
    (logits, weight, index), routing = theirs(tokens), router(tokens)
    torch.testing.assert_close(routing.logits, logits.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        spread(routing.weight, routing.index), spread(weight, index).double(), atol=1e-5, rtol=1e-5
    )


def test_normed_input_and_scales_of_experts_equal_gemma4():
    """Logits and weights, with the gradients of the tokens and of both learned scales."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    theirs = randomised(Gemma4TextRouter(Gemma4TextConfig(hidden_size=8, num_experts=5, top_k_experts=3)))
    router = router_of(router_input_norm=True, router_expert_scale=True)
    names = {"weight": "proj.weight", "input_scale": "scale", "expert_scale": "per_expert_scale"}
    router.load_state_dict({mine: theirs.get_parameter(other) for mine, other in names.items()})
    tokens, direction = tokens_of(), torch.randn(17, 5, dtype=torch.float64)
    gradients = []
    for module in (theirs, router):
        leaf = tokens.clone().requires_grad_()
        _, weight, index = module(leaf) if module is theirs else module(leaf)[:3]
        found = spread(weight.double(), index)
        (found * direction).sum().backward()
        keys = names.values() if module is theirs else names
        gradients.append([found.detach(), leaf.grad, *(module.get_parameter(key).grad for key in keys)])
    for other, mine in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(mine, other.double(), atol=1e-5, rtol=1e-5)


def test_new_scales_change_nothing_but_the_root_mean_square():
    """A new model's scales are 1: the weights are those of a router without scales of experts."""
    config = tiny_config(**SIZE, router_expert_scale=True)
    router = router_class(config)(config).double()
    router.init_weights(1.0)
    plain = router_of()
    plain.load_state_dict({"weight": router.weight})
    tokens = tokens_of()
    assert torch.equal(router(tokens).weight, plain(tokens).weight)


@pytest.mark.parametrize("norm", [False, True])
def test_the_dense_gradient_knows_the_scales_of_experts(norm):
    router, tokens = router_of(router_expert_scale=True, router_gradient="dense", norm_topk_prob=norm), tokens_of()
    mixture = router.train()(tokens).mixture
    torch.testing.assert_close(mixture, (tokens @ router.weight.T).softmax(-1) * router.expert_scale)


def test_null_experts_weigh_nothing_whatever_their_scale():
    router, tokens = router_of(router_expert_scale=True, num_null_experts=2), tokens_of()
    routing = router(tokens)
    assert (routing.index >= 5).any()
    assert (routing.weight[routing.index >= 5] == 0).all()
    assert (routing.weight[routing.index < 5] != 0).all()


def test_a_router_has_only_the_scales_that_it_reads():
    """Layers that draw experts read no scale, beside hash layers that do."""
    config = tiny_config(
        num_hash_layers=1, router_type="hierarchical", n_group=5, topk_group=3, router_expert_scale=True
    )
    first, last = (MoEForCausalLM(config).model.layers[i].mlp.gate for i in (0, 2))
    assert first.expert_scale.tolist() == [1.0] * 5
    assert last.expert_scale is None


def test_scales_stay_fp32_in_a_bf16_model():
    fields = {"router_input_norm": True, "router_expert_scale": True}
    model = MoEForCausalLM(tiny_config(**fields)).to(torch.bfloat16)
    gate = model.model.layers[0].mlp.gate
    assert gate.input_scale.dtype == gate.expert_scale.dtype == torch.float32
    routing = gate(torch.randn(4, 32, dtype=torch.bfloat16), RoutingContext())
    assert routing.logits.dtype == routing.weight.dtype == torch.float32
