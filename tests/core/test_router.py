"""These tests compare routers with literals and with transformers' routers."""

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import Routing, expert_load
from modeling_moe.router_topk import TopKRouter
from tests.builders import tiny_config


def router_with(logits: torch.Tensor, **fields) -> tuple[TopKRouter, torch.Tensor]:
    """Returns a router, and tokens for which the router computes exactly these logits (T, E)."""
    num_experts = logits.shape[-1]
    config = tiny_config(num_experts=num_experts, hidden_size=num_experts, num_experts_per_tok=2, **fields)
    router = TopKRouter(config).to(logits.dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router.eval(), logits


def test_softmax_by_hand():
    router, tokens = router_with(torch.tensor([[0.0, 2.0, 1.0, -1.0]], dtype=torch.float64), norm_topk_prob=False)
    routing = router(tokens)
    exp = torch.tensor([1.0, 7.38905609893065, 2.718281828459045, 0.36787944117144233], dtype=torch.float64)
    assert routing.index.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.probs, (exp / exp.sum())[None])
    torch.testing.assert_close(routing.weight, (exp / exp.sum())[None, [1, 2]])


def test_renormalised_weights_are_the_softmax_of_the_chosen_logits():
    router, tokens = router_with(torch.tensor([[0.0, 2.0, 1.0, -1.0]], dtype=torch.float64), routed_scaling_factor=3.0)
    expected = 3 * torch.tensor([[2.0, 1.0]], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(router(tokens).weight, expected)


def test_sigmoid_by_hand():
    """The bias decides which group of experts (0-1 or 2-3) is chosen, and has no effect on the weights."""
    router, tokens = router_with(
        torch.tensor([[3.0, 1.0, -1.0, 0.0]], dtype=torch.float64),
        scoring_func="sigmoid",
        router_selection_bias=True,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
    )
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    routing = router(tokens)
    assert sorted(routing.index[0].tolist()) == [2, 3]
    scores = {2: 0.2689414213699951, 3: 0.5}
    expected = [[2.5 * scores[i] / sum(scores.values()) for i in routing.index[0].tolist()]]
    torch.testing.assert_close(routing.weight, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("norm", [True, False])
def test_equals_transformers_softmax_routers(norm):
    config = tiny_config(norm_topk_prob=norm)
    router, tokens = TopKRouter(config), torch.randn(17, 32)
    torch.nn.init.normal_(router.weight)
    theirs = (MixtralTopKRouter if norm else Qwen3MoeTopKRouter)(config)
    theirs.weight = router.weight
    logits, weight, index = theirs(tokens)
    routing = router(tokens)
    torch.testing.assert_close(routing.logits, logits)
    torch.testing.assert_close(routing.weight, weight)
    assert torch.equal(routing.index, index)


@pytest.mark.parametrize(("groups", "eligible"), [(1, 1), (4, 2)])
def test_equals_deepseek_v3_block(groups, eligible):
    """A block equals transformers' sparse block in outputs, and in the gradients of tokens and router."""
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=32,
            moe_intermediate_size=24,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=groups,
            topk_group=eligible,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    config = tiny_config(
        num_experts=8,
        num_shared_experts=2,
        scoring_func="sigmoid",
        router_selection_bias=True,
        n_group=groups,
        topk_group=eligible,
        routed_scaling_factor=2.5,
        experts_implementation="eager",
    )
    block = MoEBlock(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        theirs.gate.e_score_correction_bias.normal_(std=0.2)
    block.load_state_dict(theirs.state_dict())
    tokens = torch.randn(2, 7, 32, requires_grad=True)
    expected, got = theirs(tokens), block(tokens)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(expected)
    for parameter in ("gate.weight", "experts.gate_up_proj", "shared_experts.up_proj.weight"):
        grads = [
            torch.autograd.grad((out * direction).sum(), m.get_parameter(parameter), retain_graph=True)[0]
            for m, out in ((theirs, expected), (block, got))
        ]
        torch.testing.assert_close(grads[1], grads[0], atol=1e-4, rtol=1e-4)


def test_routing_is_fp32_in_a_bf16_model_and_under_autocast():
    router = TopKRouter(tiny_config()).eval()
    torch.nn.init.normal_(router.weight)
    tokens = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(tokens)
    torch.testing.assert_close(routing.logits, tokens @ router.weight.T)
    routing = router.to(torch.bfloat16)(tokens.to(torch.bfloat16))
    assert {t.dtype for t in (routing.logits, routing.weight, routing.probs)} == {torch.float32}


def test_jitter_touches_the_router_alone():
    config = tiny_config(router_jitter_noise=0.3)
    router, tokens = TopKRouter(config), torch.randn(6, 32)
    torch.nn.init.normal_(router.weight)
    before = tokens.clone()
    first, second = router(tokens).logits, router(tokens).logits
    assert torch.equal(tokens, before)
    assert not torch.equal(first, second)
    clean = router.eval()(tokens).logits
    assert torch.equal(router(tokens).logits, clean)


def test_gradient_reaches_the_router_through_the_weights():
    router = TopKRouter(tiny_config(hidden_size=6)).double()
    torch.nn.init.normal_(router.weight)
    tokens = torch.randn(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(router, {"weight": w}, tokens).weight, router.weight
    )


def test_expert_load_counts_real_tokens_and_no_empty_slots():
    routing = Routing(
        logits=torch.zeros(3, 4),
        weight=torch.ones(3, 2),
        index=torch.tensor([[0, 1], [1, 4], [3, 1]]),  # 4: empty
        probs=torch.full((3, 4), 0.25),
    )
    assert expert_load(routing).tolist() == [1, 3, 0, 1]
    assert expert_load(routing, torch.tensor([1, 1, 0])).tolist() == [1, 2, 0, 0]
