"""These tests compare routers of K experts per token with their papers' equations and with transformers' routers."""

import itertools
import math

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HashRouter, DeepseekV4TopKRouter
from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from modeling_moe import MoEForCausalLM
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import Router, RoutingContext
from modeling_moe.router_assigned import hash_table
from modeling_moe.router_catalogue import router_class
from modeling_moe.router_losses import load_loss
from tests.builders import tiny_config


def router_of(layer_idx: int = 0, **fields) -> Router:
    """Returns a float64 router in training mode, with random parameters of standard deviation 1."""
    config = tiny_config(**({"hidden_size": 8} | fields))
    router = router_class(config, layer_idx)(config, layer_idx).double()
    router.init_weights(1.0)
    return router


def block_of(**fields) -> MoEBlock:
    """Returns a float64 sparse block in training mode, with eager experts and random parameters."""
    block = MoEBlock(tiny_config(hidden_size=8, experts_implementation="eager", **fields)).double()
    block.gate.init_weights(1.0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.7)
    return block


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def expert_output(block: MoEBlock, expert: int, token: torch.Tensor) -> torch.Tensor:
    """Computes one expert's SwiGLU of one token (H,)."""
    gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
    return block.experts.down_proj[expert] @ (gate * gate.sigmoid() * up)


def spread(routing, outputs: int) -> torch.Tensor:
    """Puts weights (T, K) into the columns of their experts (T, outputs)."""
    return routing.weight.new_zeros(len(routing.weight), outputs).scatter(-1, routing.index, routing.weight)


def gradients_agree(got: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Compares the gradients of the same random projection of two tensors."""
    direction = torch.randn_like(expected)
    ours = torch.autograd.grad((got * direction).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# topk


def test_renormalised_softmax_is_topk_then_softmax():
    router = router_of()
    logits = double(16, 5).requires_grad_()
    routing = router.route(logits, RoutingContext())
    chosen = torch.tensor([sorted(range(5), key=lambda e, row=row: -row[e])[:3] for row in logits.tolist()])
    assert torch.equal(routing.index, chosen)
    expected = logits.gather(-1, chosen).softmax(-1)
    torch.testing.assert_close(routing.weight, expected, atol=1e-15, rtol=0)
    gradients_agree(routing.weight, expected, [logits], 1e-15)


@pytest.mark.parametrize("norm", [False, True])
def test_switch_has_a_router_gradient_without_renormalisation_alone(norm):
    router = router_of(num_experts=3, num_experts_per_tok=1, norm_topk_prob=norm)
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    routing = router.route(logits, RoutingContext())
    routing.weight.sum().backward()
    assert routing.index.tolist() == [[2]]
    expected = [[0.0, 0.0, 0.0]] if norm else [[-0.05989202, -0.16280340, 0.22269542]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)
    assert routing.weight.item() == pytest.approx(1.0 if norm else 0.6652409557748219, abs=1e-15)


def deepseek_v4(router_cls) -> nn.Module:
    theirs = router_cls(
        DeepseekV4Config(hidden_size=8, vocab_size=99, n_routed_experts=5, num_experts_per_tok=3)
    ).double()
    nn.init.normal_(theirs.weight)
    return theirs


def test_sqrtsoftplus_equals_deepseek_v4():
    theirs = deepseek_v4(DeepseekV4TopKRouter)
    theirs.e_score_correction_bias.normal_()
    router = router_of(scoring_func="sqrtsoftplus", router_selection_bias=True, routed_scaling_factor=1.5)
    router.load_state_dict(theirs.state_dict())
    tokens = double(17, 8).requires_grad_()
    (logits, weight, index), routing = theirs(tokens), router(tokens)
    torch.testing.assert_close(routing.logits, logits)
    expected = torch.zeros(17, 5, dtype=torch.float64).scatter(-1, index, weight)
    torch.testing.assert_close(spread(routing, 5), expected)
    gradients_agree(spread(routing, 5), expected, [tokens], 1e-12)


def test_hash_scored_equals_deepseek_v4():
    theirs = deepseek_v4(DeepseekV4HashRouter)
    router = router_of(router_type="hash_scored", scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)
    theirs.tid2eid.copy_(router.table)
    router.weight = theirs.weight
    tokens, ids = double(17, 8).requires_grad_(), torch.randint(99, (17,))
    logits, weight, index = theirs(tokens, ids)
    routing = router(tokens, RoutingContext(input_ids=ids))
    assert torch.equal(routing.index, index)
    torch.testing.assert_close(routing.logits, logits)
    torch.testing.assert_close(routing.weight, weight)
    gradients_agree(routing.weight, weight, [tokens, router.weight], 1e-12)


def test_the_best_expert_makes_a_groups_strength_as_in_deepseek_v2():
    shape = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5}
    theirs = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=8, num_attention_heads=4, n_routed_experts=12, topk_method="group_limited_greedy", **shape
        )
    )
    nn.init.normal_(theirs.weight)
    router = router_of(num_experts=12, group_score="max", norm_topk_prob=False, **shape).float()
    router.weight = theirs.weight
    tokens = torch.randn(64, 8)
    _, weight, index = theirs(tokens)
    routing = router(tokens)
    torch.testing.assert_close(spread(routing, 12), torch.zeros(64, 12).scatter(-1, index, weight))
    by_two = router_of(num_experts=12, group_score="top2sum", norm_topk_prob=False, **shape).float()
    by_two.weight = theirs.weight
    assert not torch.equal(by_two(tokens).index, routing.index)


# noisy_topk


def shazeer_chance(clean: torch.Tensor, noisy: torch.Tensor, std: torch.Tensor, top_k: int) -> torch.Tensor:
    """Computes eq. 8-9 of arXiv:1701.06538, one element at a time."""
    rows = []
    for t in range(clean.shape[0]):
        row = []
        for i in range(clean.shape[1]):
            others = sorted((noisy[t, j] for j in range(clean.shape[1]) if j != i), key=lambda z: -z.item())
            row.append((1 + torch.erf((clean[t, i] - others[top_k - 1]) / std[t, i] / math.sqrt(2))) / 2)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def noisy_router(**fields) -> Router:
    router = router_of(router_type="noisy_topk", **fields)
    with torch.no_grad():
        router.weight.normal_()
        router.noise_weight.normal_()
    return router


@pytest.mark.parametrize("top_k", [1, 3])
def test_noisy_logits_and_chance_are_the_papers(top_k):
    router, tokens = noisy_router(num_experts_per_tok=top_k), double(11, 8)
    torch.manual_seed(1)
    routing = router(tokens)
    torch.manual_seed(1)
    std = torch.log1p((tokens @ router.noise_weight.T).exp()) + 0.01
    clean = tokens @ router.weight.T
    noisy = clean + torch.randn_like(std) * std
    torch.testing.assert_close(routing.logits, noisy)
    assert torch.equal(routing.index, noisy.topk(top_k).indices)
    torch.testing.assert_close(routing.weight, noisy.topk(top_k).values.softmax(-1))
    torch.testing.assert_close(routing.selection_probability, shazeer_chance(clean, noisy, std, top_k))


def test_chance_is_how_often_fresh_noise_of_one_expert_selects_it():
    router, draws = noisy_router(), 20000
    clean, std = double(2, 5), double(2, 5).exp()
    noisy = clean + std * double(2, 5)
    chance = router.selection_probability(clean, noisy, std)
    for t, i in itertools.product(range(2), range(5)):
        again = noisy[t].repeat(draws, 1)
        again[:, i] = clean[t, i] + std[t, i] * double(draws)
        frequency = (again.topk(3).indices == i).any(-1).double().mean().item()
        p = chance[t, i].item()
        assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / draws) + 1e-4


def test_noise_is_learned_through_weights_and_load_loss():
    router, tokens = noisy_router(), double(9, 8)
    torch.manual_seed(1)
    routing = router(tokens)
    torch.manual_seed(1)
    std = torch.log1p((tokens @ router.noise_weight.T).exp()) + 0.01
    clean = tokens @ router.weight.T
    noisy = clean + torch.randn_like(std) * std
    gradients_agree(
        routing.weight, noisy.topk(3).values.softmax(-1), [router.weight, router.noise_weight], tolerance=1e-12
    )
    load = shazeer_chance(clean, noisy, std, 3).sum(0)
    cv = ((load - load.mean()) ** 2).mean() / load.mean() ** 2
    torch.testing.assert_close(load_loss(routing), cv)
    gradients_agree(load_loss(routing), cv, [router.weight, router.noise_weight], 1e-9)


def test_noisy_gates_start_at_zero_and_evaluation_has_no_noise():
    config = tiny_config(router_type="noisy_topk")
    gate = MoEForCausalLM(config).model.layers[0].mlp.gate
    assert not gate.weight.any()
    assert not gate.noise_weight.any()
    router, tokens = noisy_router().eval(), double(6, 8)
    routing = router(tokens)
    torch.testing.assert_close(routing.logits, tokens @ router.weight.T)
    assert routing.selection_probability is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"router_selection_bias": True}, "router_selection_bias=False"),
        ({"num_experts": 6, "n_group": 2, "topk_group": 1}, "n_group=1"),
    ],
)
def test_noise_is_refused_where_its_chance_would_be_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(router_type="noisy_topk", **fields)


# gumbel_topk


@pytest.mark.parametrize(("scoring", "temperature"), [("softmax", 1.0), ("softmax", 2.0), ("sigmoid", 1.0)])
def test_gumbel_draws_without_replacement_as_plackett_luce(scoring, temperature):
    router = router_of(
        router_type="gumbel_topk",
        num_experts=4,
        num_experts_per_tok=2,
        router_temperature=temperature,
        scoring_func=scoring,
    )
    draws, logits = 20000, [0.5, -1.0, 1.5, 0.0]
    routing = router.route(torch.tensor([logits], dtype=torch.float64).expand(draws, -1), RoutingContext())
    score = [math.exp(z) if scoring == "softmax" else 1 / (1 + math.exp(-z)) for z in logits]
    strength = [s ** (1 / temperature) for s in score]
    total = sum(strength)
    seen = [tuple(pair) for pair in routing.index.tolist()]
    for first, second in itertools.permutations(range(4), 2):
        p = strength[first] / total * strength[second] / (total - strength[first])
        assert abs(seen.count((first, second)) / draws - p) <= 4 * math.sqrt(p * (1 - p) / draws)
    chosen = torch.tensor(score, dtype=torch.float64)[routing.index]
    torch.testing.assert_close(routing.weight, chosen / chosen.sum(-1, keepdim=True))


def test_gumbel_takes_the_best_in_evaluation():
    router, logits = router_of(router_type="gumbel_topk").eval(), double(50, 5)
    assert torch.equal(router.route(logits, RoutingContext()).index, logits.topk(3).indices)


# gshard


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("second", [-2.0, -0.5, 1.0])
def test_gshard_keeps_the_second_expert_with_twice_its_share(norm, scaling, second):
    """The second expert is kept with probability 2 g_2, g_2 its share of the two best scores."""
    router = router_of(
        router_type="gshard",
        num_experts=3,
        num_experts_per_tok=2,
        norm_topk_prob=norm,
        routed_scaling_factor=scaling,
    )
    draws = 20000
    logits = torch.tensor([[1.0, -3.0, second]], dtype=torch.float64).expand(draws, -1)
    routing = router.route(logits, RoutingContext())
    share = math.exp(second) / (math.exp(1) + math.exp(second))
    p = min(1.0, 2 * share)
    kept = routing.index[:, 1] != 3
    assert abs(kept.double().mean().item() - p) <= 4 * math.sqrt(p * (1 - p) / draws)
    assert not routing.weight[~kept, 1].any()
    assert (routing.index[:, 0] != 3).all()
    mass = 1.0 if norm else (math.exp(1) + math.exp(second)) / (math.exp(1) + math.exp(second) + math.exp(-3))
    expected = torch.tensor([1 - share, share], dtype=torch.float64) * mass * scaling
    torch.testing.assert_close(routing.weight[kept][0], expected)
    torch.testing.assert_close(routing.weight[:, 0], expected[0].expand(draws))
    evaluated = router.eval().route(logits, RoutingContext())
    assert (evaluated.index != 3).all()
    torch.testing.assert_close(evaluated.weight, expected.expand(draws, 2))


def test_gshard_never_drops_the_first_expert():
    """A selection bias can put the expert with the smaller weight first, which is then kept."""
    router = router_of(router_type="gshard", num_experts_per_tok=2, router_selection_bias=True)
    router.e_score_correction_bias[4] = 10.0
    routing = router.route(torch.tensor([[3.0, 0.0, 0.0, 0.0, 1.0]]).expand(500, -1), RoutingContext())
    assert (routing.index == torch.tensor([4, 0])).all()


def test_gshard_needs_two_experts():
    with pytest.raises(ValueError, match="num_experts_per_tok is 3: router_type='gshard' chooses 2"):
        tiny_config(router_type="gshard")


# sparsemixer


def sparsemixer_router(**fields) -> Router:
    return router_of(router_gradient="sparsemixer", router_jitter_noise=0.1, num_experts_per_tok=2, **fields)


def test_sparsemixer_equals_phimoe_in_evaluation():
    router, logits = sparsemixer_router(num_experts=16).eval(), double(200, 16)
    routing = router.route(logits, RoutingContext())
    weight, index = sparsemixer(logits, 0.1, training=False)
    assert torch.equal(routing.index, index)
    torch.testing.assert_close(routing.weight, weight, atol=1e-15, rtol=0)


def test_sparsemixer_equals_phimoe_in_training(monkeypatch):
    """The router equals transformers' SparseMixer, which multiplies by 0.3333 where the paper has 1/3."""
    router = sparsemixer_router(num_experts=16)
    # logits are close to their maximum, so that several experts can be drawn
    logits = (3 + 0.3 * double(200, 16)).requires_grad_()
    exponentials = [torch.empty(200, 16, dtype=torch.float64).exponential_() for _ in range(2)]
    uniforms = [torch.rand(200, 1, dtype=torch.float64) for _ in range(2)]

    def same_draws(call):
        draws, rolls = iter(exponentials), iter(uniforms)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "exponential_", lambda _: next(draws).clone())
            patch.setattr(torch, "rand_like", lambda _: next(rolls).clone())
            patch.setattr(torch.Tensor, "uniform_", lambda x: x)
            return call()

    routing = same_draws(lambda: router.route(logits, RoutingContext()))
    weight, index = same_draws(lambda: sparsemixer(logits, 0.1, training=True))
    assert torch.equal(routing.index, index)
    assert not torch.equal(index[:, 0], logits.argmax(-1))
    torch.testing.assert_close(routing.weight, weight, atol=1e-3, rtol=0)
    gradients_agree(routing.weight, weight, [logits], 1e-12)


def test_sparsemixer_draws_distinct_experts_whatever_their_number():
    router = router_of(router_gradient="sparsemixer", router_jitter_noise=0.1, num_experts_per_tok=5)
    index = router(double(50, 8)).index
    assert torch.equal(index.sort(-1).values, torch.arange(5).expand(50, 5))


@pytest.mark.parametrize(
    "fields",
    [
        {"scoring_func": "sigmoid"},
        {"norm_topk_prob": True},
        {"router_selection_bias": True},
        {"num_experts": 6, "n_group": 2, "topk_group": 2},
    ],
)
def test_sparsemixer_refuses_fields_it_would_ignore(fields):
    with pytest.raises(ValueError, match=next(iter(reversed(fields))).replace("topk_group", "n_group")):
        sparsemixer_router(**fields)


# hierarchical

TWO_LEVELS = {
    "router_type": "hierarchical",
    "num_experts": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
}


def two_level_weights(router: Router, tokens: torch.Tensor, norm: bool) -> torch.Tensor:
    """Computes the weights (T, E) from the gates of all groups."""
    dtype = torch.float64
    rows = []
    for token in tokens.to(dtype):
        outer = router.group_weight.to(dtype) @ token
        groups = sorted(range(4), key=lambda g, z=outer: -z[g].item())[:2]
        places = [torch.zeros((), dtype=dtype)] * 12
        for g in groups:
            inner = router.weight[3 * g : 3 * g + 3].to(dtype) @ token
            best = sorted(range(3), key=lambda e, z=inner: -z[e].item())[:2]
            outer_sum = sum(outer[i].exp() for i in (groups if norm else range(4)))
            inner_sum = sum(inner[i].exp() for i in (best if norm else range(3)))
            for e in best:
                places[3 * g + e] = outer[g].exp() / outer_sum * inner[e].exp() / inner_sum
        rows.append(torch.stack(places))
    return torch.stack(rows)


@pytest.mark.parametrize("norm", [True, False])
def test_hierarchical_weights_are_the_products_of_both_gates(norm):
    router = router_of(norm_topk_prob=norm, routed_scaling_factor=1.5, **TWO_LEVELS)
    tokens = double(9, 8).requires_grad_()
    routing = router(tokens)
    expected = 1.5 * two_level_weights(router, tokens, norm)
    got = spread(routing, 12)
    torch.testing.assert_close(got, expected)
    gradients_agree(got, expected, [router.weight, router.group_weight, tokens], 1e-12)
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(9, dtype=torch.float64))
    assert torch.equal(routing.probs > 0, routing.logits > float("-inf"))
    assert ((routing.probs > 0).sum(-1) == 6).all()


@pytest.mark.parametrize("norm", [True, False])
def test_hierarchical_gradient(norm):
    router, tokens = router_of(norm_topk_prob=norm, **TWO_LEVELS), double(3, 8)

    def outputs(weight, group_weight, tokens):
        routing = torch.func.functional_call(router, {"weight": weight, "group_weight": group_weight}, tokens)
        return routing.weight, routing.probs

    assert torch.autograd.gradcheck(outputs, (router.weight, router.group_weight, tokens.requires_grad_()))


def test_hierarchical_gates_of_groups_not_chosen_are_not_computed():
    router, tokens = router_of(**TWO_LEVELS), double(6, 8).abs()
    with torch.no_grad():
        # every token chooses groups 0 and 2
        router.group_weight.copy_(torch.tensor([[2.0], [-1.0], [1.0], [-2.0]]).expand(-1, 8))
        router.weight[3:6] = router.weight[9:12] = float("nan")
    routing = router(tokens)
    (routing.weight.square().sum() + routing.probs.square().sum()).backward()
    rows = router.weight.grad.unflatten(0, (4, 3))
    assert not rows[[1, 3]].any()
    assert rows[[0, 2]].abs().amax(-1).min() > 0
    assert routing.weight.isfinite().all()
    assert router.group_weight.grad.isfinite().all()


@pytest.mark.parametrize("how", ["fp32", "bf16", "autocast"])
def test_hierarchical_routing_is_fp32_whatever_the_model(how):
    router = router_of(**TWO_LEVELS).to(torch.bfloat16 if how == "bf16" else torch.float32)
    tokens = torch.randn(9, 8).to(router.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        routing = router(tokens)
    assert {t.dtype for t in (routing.logits, routing.weight, routing.probs)} == {torch.float32}
    expected = two_level_weights(router, tokens, True).float()
    torch.testing.assert_close(spread(routing, 12), expected, atol=1e-5, rtol=1e-5)
    routing.weight.square().sum().backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_group": 1, "topk_group": 1}, "n_group of at least 2"),
        ({"num_experts_per_tok": 3}, "multiple of topk_group"),
        ({"scoring_func": "sigmoid"}, "scoring_func='softmax'"),
    ],
)
def test_hierarchical_refuses_what_it_cannot_serve(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**(TWO_LEVELS | fields))


# hash


def test_hash_looks_up_the_table_with_equal_weights():
    router, ids = router_of(router_type="hash", routed_scaling_factor=2.0), torch.tensor([4, 98, 0, 4])
    routing = router(double(4, 8), RoutingContext(input_ids=ids))
    assert list(router.parameters()) == []
    assert torch.equal(routing.index, router.table[ids])
    assert torch.equal(routing.index[0], routing.index[3])
    torch.testing.assert_close(routing.weight, torch.full((4, 3), 2 / 3, dtype=torch.float64))
    for row, probs in zip(routing.index.tolist(), routing.probs.tolist(), strict=True):
        assert probs == [pytest.approx(1 / 3) if e in row else 0 for e in range(5)]


def test_hash_tables_are_distinct_in_a_row_and_repeatable():
    def table(**fields):
        return router_of(router_type="hash", **fields).table

    first = table()
    assert first.shape == (99, 3)
    assert first.unique().tolist() == [0, 1, 2, 3, 4]
    assert all(len(set(row)) == 3 for row in first.tolist())
    assert torch.equal(first, table())
    others = [first, table(layer_idx=2), table(hash_seed=1)]
    for a, b in itertools.combinations(others, 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balanced_hash_evens_out_a_zipf_vocabulary(top_k):
    counts = torch.tensor([1000 // rank for rank in range(1, 41)])[torch.randperm(40)]
    table = hash_table(40, 5, top_k, seed=3, counts=counts)
    received = [0] * 5
    for token, experts in enumerate(table.tolist()):
        assert len(set(experts)) == top_k
        for expert in experts:
            received[expert] += counts[token].item()
    assert sum(received) == top_k * counts.sum()
    assert max(received) - min(received) <= counts.max()
    drawn = hash_table(40, 5, top_k, seed=3)
    load = torch.zeros(5, dtype=torch.long).index_add(0, drawn.flatten(), counts.repeat_interleave(top_k))
    assert max(received) - min(received) < load.max() - load.min()


def test_counts_are_one_for_each_token_id():
    with pytest.raises(ValueError, match=r"counts has shape \(39,\).*40 token ids"):
        hash_table(40, 5, 2, seed=0, counts=torch.ones(39))


def test_hash_layers_differ_and_balanced_tables_are_saved(tmp_path):
    model = MoEForCausalLM(tiny_config(router_type="hash")).eval()
    gates = [block.gate for block in model.model.sparse_blocks()]
    assert not torch.equal(gates[0].table, gates[1].table)
    drawn = gates[0].table.clone()
    gates[0].set_counts(torch.arange(99))
    assert torch.equal(gates[0].table, hash_table(99, 5, 3, seed=0, counts=torch.arange(99)))
    assert not torch.equal(gates[0].table, drawn)
    model.save_pretrained(tmp_path)
    again = MoEForCausalLM.from_pretrained(tmp_path)
    for block, gate in zip(again.model.sparse_blocks(), gates, strict=True):
        assert torch.equal(block.gate.table, gate.table)
    ids = torch.randint(3, 99, (2, 6))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("router_type", ["hash", "hash_scored"])
def test_hash_needs_token_ids(router_type):
    model = MoEForCausalLM(tiny_config(router_type=router_type))
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))


def test_the_first_layers_can_be_hash_layers():
    model = MoEForCausalLM(tiny_config(num_hash_layers=1))
    names = [type(block.gate).__name__ for block in model.model.sparse_blocks()]
    assert names == ["ScoredHashRouter", "TopKRouter"]


# task, mmoe, uniform


def test_all_tokens_of_a_task_share_experts():
    router, tokens = router_of(router_type="task", num_tasks=4, num_experts=16), double(12, 8)
    task = torch.tensor([0, 3, 1, 2] * 3)
    routing = router(tokens, RoutingContext(task_ids=task))
    for t, n in enumerate(task.tolist()):
        logits = router.weight @ router.task_embedding[n]
        chosen = sorted(range(16), key=lambda e, z=logits: -z[e].item())[:3]
        assert routing.index[t].tolist() == chosen
        torch.testing.assert_close(routing.weight[t], logits[chosen].softmax(-1))
    routing.weight[:, 0].sum().backward()
    assert router.task_embedding.grad.abs().sum(-1).min() > 0


@pytest.mark.parametrize("router_type", ["task", "mmoe"])
def test_task_ids_are_one_for_each_sequence_or_each_token(router_type):
    model = MoEForCausalLM(tiny_config(router_type=router_type, num_tasks=3)).double().eval()
    ids, task = torch.randint(3, 99, (2, 5)), torch.tensor([0, 2])
    expected = model(ids, task_ids=task).logits
    assert torch.equal(model(ids, task_ids=task[:, None].expand(2, 5)).logits, expected)
    assert not torch.equal(model(ids, task_ids=torch.tensor([0, 1])).logits[1], expected[1])
    mixed = model(ids, task_ids=torch.tensor([[0, 0, 0, 0, 1], [2, 2, 2, 2, 2]])).logits
    torch.testing.assert_close(mixed[0, :4], expected[0, :4])
    torch.testing.assert_close(mixed[1], expected[1])
    assert not torch.equal(mixed[0, 4], expected[0, 4])
    with pytest.raises(ValueError, match="task_ids"):
        model(ids)


def test_mmoe_over_all_experts_mixes_them():
    """The block computes `y = sum_i softmax(W_task x)_i f_i(x)`."""
    block = block_of(router_type="mmoe", num_tasks=2, num_experts=4, num_experts_per_tok=4)
    tokens, task = double(6, 8), torch.tensor([0, 1, 1, 0, 1, 0])
    got = block(tokens[None], RoutingContext(task_ids=task))[0][0]
    rows = []
    for token, n in zip(tokens, task.tolist(), strict=True):
        gate = block.gate.weight[4 * n : 4 * n + 4] @ token
        total = sum(z.exp() for z in gate)
        rows.append(sum(gate[i].exp() / total * expert_output(block, i, token) for i in range(4)))
    expected = torch.stack(rows)
    torch.testing.assert_close(got, expected)
    gradients_agree(got, expected, [block.gate.weight, block.experts.down_proj], 1e-10)


def test_fixed_weights_mix_all_experts():
    block = block_of(router_type="uniform", num_experts=4, num_experts_per_tok=4)
    tokens = double(6, 8)
    expected = torch.stack(
        [sum(block.gate.expert_weight[i] * expert_output(block, i, token) for i in range(4)) for token in tokens]
    )
    torch.testing.assert_close(block(tokens[None])[0][0], expected)
    gradients_agree(block(tokens[None])[0][0], expected, [block.gate.expert_weight], 1e-10)
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        tiny_config(router_type="uniform")


# experts without weights


@pytest.mark.parametrize("norm", [True, False])
def test_null_experts_do_nothing_and_copy_experts_return_the_token(norm):
    block = block_of(num_null_experts=2, num_copy_experts=1, norm_topk_prob=norm, routed_scaling_factor=1.5)
    tokens = double(40, 8).requires_grad_()
    got = block(tokens[None])[0][0]
    rows, kinds = [], set()
    for token in tokens:
        logits = block.gate.weight @ token
        probs = logits.exp() / sum(z.exp() for z in logits)
        chosen = sorted(range(8), key=lambda e, z=logits: -z[e].item())[:3]
        working = [e for e in chosen if e < 5 or e == 7]
        total = sum(probs[e] for e in working) if norm else 1
        row = torch.zeros(8, dtype=torch.float64)
        for e in working:
            row = row + 1.5 * probs[e] / total * (token if e == 7 else expert_output(block, e, token))
        rows.append(row)
        kinds |= {(sum(e < 5 for e in chosen), 7 in chosen)}
    assert len(kinds) > 3
    expected = torch.stack(rows)
    torch.testing.assert_close(got, expected)
    gradients_agree(got, expected, [tokens, block.gate.weight, block.experts.gate_up_proj], 1e-9)


def test_a_token_with_null_experts_alone_passes_nothing_and_no_nan():
    block = block_of(num_null_experts=3).float()
    with torch.no_grad():
        block.gate.weight.fill_(-1)[5:].fill_(1)
    tokens = torch.rand(1, 4, 8)
    tokens[:, 2:] *= -1
    tokens.requires_grad_()
    output = block(tokens)[0]
    output.square().sum().backward()
    assert not output[:, :2].any()
    assert not tokens.grad[:, :2].any()
    assert tokens.grad[:, 2:].isfinite().all()
    assert tokens.grad[:, 2:].any()
    assert block.gate.weight.grad.isfinite().all()


def test_copy_experts_equal_longcat_flash():
    theirs = LongcatFlashMoE(
        LongcatFlashConfig(
            hidden_size=8,
            expert_ffn_hidden_size=24,
            n_routed_experts=5,
            zero_expert_num=3,
            moe_topk=3,
            routed_scaling_factor=6.0,
        )
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
        theirs.router.e_score_correction_bias.normal_(std=0.2)
    block = block_of(
        num_copy_experts=3, norm_topk_prob=False, routed_scaling_factor=6.0, router_selection_bias=True
    ).float()
    block.load_state_dict(
        {
            "gate.weight": theirs.router.classifier.weight,
            "gate.e_score_correction_bias": theirs.router.e_score_correction_bias,
            "experts.gate_up_proj": theirs.experts.gate_up_proj[:5],
            "experts.down_proj": theirs.experts.down_proj,
        }
    )
    tokens = torch.randn(2, 9, 8, requires_grad=True)
    expected, got = theirs(tokens), block(tokens)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    gradients_agree(got, expected, [tokens], 1e-4)


# router_gradient="dense"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.5},
        {"scoring_func": "sigmoid"},
        {"num_null_experts": 2},
    ],
)
def test_dense_gradient_changes_the_routers_alone(fields):
    """The gradient of every expert's weight is `dL/dw_e = <dL/dO, f_e(x)>`."""
    block, tokens = block_of(router_gradient="dense", **fields), double(7, 8)
    plain = block_of(**fields)
    plain.load_state_dict(block.state_dict())
    scaling = fields.get("routed_scaling_factor", 1.0)
    got, standard = block(tokens[None])[0][0], plain(tokens[None])[0][0]
    assert torch.equal(got, standard)
    direction = torch.randn_like(got)
    (got * direction).sum().backward()
    (standard * direction).sum().backward()
    for name, parameter in block.experts.named_parameters():
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, plain.experts.get_parameter(name).grad)

    weight = block.gate.weight.detach().requires_grad_()
    total = 0.0
    for token, upstream in zip(tokens, direction, strict=True):
        logits = weight @ token
        scores = logits.sigmoid() if fields.get("scoring_func") == "sigmoid" else logits.exp()
        probs = scores / scores.sum()
        total = total + sum(
            scaling * probs[e] * (upstream @ expert_output(block, e, token).detach()) for e in range(5)
        )
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(block.gate.weight.grad, expected)
    assert not torch.allclose(plain.gate.weight.grad, expected)


def test_dense_gradient_of_the_tokens_is_through_chosen_experts_and_router():
    block, tokens = block_of(router_gradient="dense"), double(7, 8).requires_grad_()
    got = block(tokens[None])[0][0]
    routing = block.gate(tokens)
    rows = []
    for t in range(7):
        chosen = sum(
            routing.weight[t, k].detach() * expert_output(block, routing.index[t, k].item(), tokens[t])
            for k in range(3)
        )
        every = sum(routing.probs[t, e] * expert_output(block, e, tokens[t]).detach() for e in range(5))
        rows.append(chosen + every - every.detach())
    gradients_agree(got, torch.stack(rows), [tokens, block.gate.weight], 1e-10)


def test_dense_gradient_is_for_training():
    block, tokens = block_of(router_gradient="dense").eval(), double(1, 7, 8)
    plain = block_of().eval()
    plain.load_state_dict(block.state_dict())
    grads = [torch.autograd.grad(m(tokens)[0].square().sum(), m.gate.weight)[0] for m in (block, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_topk_prob": False},
        {"scoring_func": "sigmoid"},
        {"scoring_func": "sigmoid", "norm_topk_prob": False},
        {"scoring_func": "sqrtsoftplus", "norm_topk_prob": False, "routed_scaling_factor": 1.5},
        {"router_type": "hierarchical", "num_experts": 6, "num_experts_per_tok": 6, "n_group": 3, "topk_group": 3},
        {"router_type": "mmoe", "num_tasks": 2},
        {"router_type": "hash_scored", "norm_topk_prob": False, "scoring_func": "sigmoid"},
        {"router_type": "remoe"},
    ],
    ids=str,
)
def test_dense_gradient_is_the_exact_one_where_all_experts_are_chosen(fields):
    fields = {"num_experts_per_tok": 5} | fields
    block, tokens = block_of(router_gradient="dense", **fields), double(1, 7, 8)
    plain = block_of(**fields)
    plain.load_state_dict(block.state_dict())
    context = RoutingContext(input_ids=torch.arange(7), task_ids=torch.arange(7) % 2)
    for model in (block, plain):
        model(tokens, context)[0].square().sum().backward()
    for name, parameter in block.gate.named_parameters():
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, plain.gate.get_parameter(name).grad)
