"""These tests compare routers that choose for many tokens at once with float64 loops and exact optima."""

import itertools
import math

import pytest
import torch

from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import RoutingContext, expert_load
from modeling_moe.router_balancing import CONTROLLERS, column_quantile
from modeling_moe.router_batch import balanced_assignment, sinkhorn
from tests.builders import eager_block, router_of_logits, tiny_config


def expert_output(block: MoEBlock, expert: int, token: torch.Tensor) -> torch.Tensor:
    gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
    return block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)


def used(routing) -> list[set[int]]:
    return [{i for i in row if i < routing.probs.shape[-1]} for row in routing.index.tolist()]


@pytest.mark.parametrize("router_type", ["expert_choice", "sinkhorn", "base_layer"])
def test_refused_unless_noncausal_is_meant(router_type):
    fields = {"router_type": router_type, "num_experts_per_tok": 1}
    with pytest.raises(ValueError, match="a causal language model must not see: set allow_noncausal=True"):
        tiny_config(**fields)
    assert tiny_config(**fields, allow_noncausal=True).router_type == router_type


MASKS = {
    "all": None,
    "padding": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]),
    "empty": torch.tensor([[0] * 7, [1] * 7]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_expert_choice_against_the_paper(mask, top_k):
    """The block computes the paper's S = softmax(X W); G, I = TopK(S^T, C); y_t = sum of G_ej f_e(x_t)."""
    block = eager_block(router_type="expert_choice", allow_noncausal=True, num_experts_per_tok=top_k)
    states = torch.randn(2, 7, 32).double()
    expected, load = torch.zeros_like(states), torch.zeros(5)
    for row in range(2):
        real = [t for t in range(7) if mask is None or mask[row, t]]
        scores = {t: (block.gate.weight @ states[row, t]).softmax(-1) for t in real}
        for expert in range(5):
            best = sorted(real, key=lambda t: -scores[t][expert].item())[: math.ceil(len(real) * top_k / 5)]
            load[expert] += len(best)
            for t in best:
                expected[row, t] += scores[t][expert] * expert_output(block, expert, states[row, t])
    context = RoutingContext(2, None if mask is None else mask.flatten())
    torch.testing.assert_close(block(states, context)[0], expected)
    assert expert_load(block.gate(states.flatten(0, 1), context)).tolist() == load.tolist()


def test_expert_choice_takes_the_earlier_of_equal_tokens():
    router = router_of_logits(4, router_type="expert_choice", allow_noncausal=True)
    assert used(router(torch.zeros(6, 4).double())) == [{0, 1, 2, 3}] * 3 + [set()] * 3


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_expert_threshold_takes_what_exceeds_it(scoring_func):
    router = router_of_logits(4, router_type="expert_threshold", scoring_func=scoring_func)
    router.threshold.copy_(torch.tensor([0.1, 0.25, 0.5, 0.9]))
    logits = torch.randn(30, 4).double()
    scores = logits.softmax(-1) if scoring_func == "softmax" else 1 / (1 + torch.exp(-logits))
    routing = router(logits)
    expected = [{i for i in range(4) if row[i] > (0.1, 0.25, 0.5, 0.9)[i]} for row in scores.tolist()]
    assert used(routing) == expected
    weight = torch.zeros(30, 5).double().scatter(1, routing.index, routing.weight)[:, :4]
    chosen = torch.tensor([[i in row for i in range(4)] for row in expected])
    torch.testing.assert_close(weight, scores * chosen)


def test_threshold_average_by_hand():
    router = router_of_logits(2, router_type="expert_threshold", num_experts_per_tok=1, router_ema_decay=0.9)
    controller = CONTROLLERS["threshold"]
    # the sums are quantiles times tokens, then the number of tokens
    expected = {(2.0, 4.0, 10.0): [0.2, 0.4], (5.0, 1.0, 10.0): [0.23, 0.37], (0.0, 0.0, 0.0): [0.23, 0.37]}
    for total, threshold in expected.items():
        controller.step([router], torch.tensor([total]).double())
        torch.testing.assert_close(router.threshold, torch.tensor(threshold).double())
    assert router.threshold_steps == 2


def test_threshold_fills_the_experts_evenly():
    router = router_of_logits(8, router_type="expert_threshold", router_ema_decay=0.9)
    controller = CONTROLLERS["threshold"]
    preference = torch.randn(8).double()
    for _ in range(200):
        logits = torch.randn(512, 8).double() + preference
        controller.step([router], controller.observe(router, router(logits), None)[None])
    load = expert_load(router(torch.randn(50_000, 8).double() + preference)) / 50_000
    torch.testing.assert_close(load, torch.full((8,), 2 / 8).double(), rtol=0.1, atol=0)
    assert abs(load.sum() - 2) < 0.1


@pytest.mark.parametrize("mask", [None, [1, 1, 0, 1, 1, 0, 1, 1, 1, 1], [0] * 10], ids=["all", "padding", "empty"])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_column_quantile_against_a_sort(mask, share):
    values = torch.randn(10, 3).double()
    real = [t for t in range(10) if mask is None or mask[t]]
    quantile = column_quantile(values, share, None if mask is None else torch.tensor(mask))
    expected = [0.0] * 3
    if real:
        place = round(len(real) * share) - 1
        columns = [sorted((values[t, i].item() for t in real), reverse=True) for i in range(3)]
        expected = [column[place] * len(real) for column in columns]
    torch.testing.assert_close(quantile, torch.tensor([*expected, len(real)]).double())


def test_sinkhorn_fills_rows_and_columns():
    plan = sinkhorn(torch.randn(24, 5).double().softmax(-1), 200)
    torch.testing.assert_close(plan.sum(1), torch.full((24,), 1 / 24).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(plan.sum(0), torch.full((5,), 1 / 5).double(), rtol=0, atol=1e-6)


def test_sinkhorn_only_scales():
    scores = torch.rand(6, 4).double() + 0.1
    ratio = sinkhorn(scores, 50) / scores
    torch.testing.assert_close(ratio * ratio[0, 0], ratio[:, :1] * ratio[:1])


def test_sinkhorn_leaves_padding_out():
    scores, mask = torch.randn(10, 4).double().softmax(-1), torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 0, 1])
    plan = sinkhorn(scores, 200, mask)
    torch.testing.assert_close(plan[mask > 0], sinkhorn(scores[mask > 0], 200))
    torch.testing.assert_close(plan[mask > 0].sum(0), torch.full((4,), 1 / 4).double(), rtol=0, atol=1e-6)


def sinkhorn_by_loop(scores: list[list[float]], iterations: int) -> list[list[float]]:
    tokens, experts = len(scores), len(scores[0])
    plan = [list(row) for row in scores]
    for _ in range(iterations):
        columns = [sum(row[e] for row in plan) for e in range(experts)]
        plan = [[row[e] / columns[e] / experts for e in range(experts)] for row in plan]
        plan = [[x / sum(row) / tokens for x in row] for row in plan]
    return plan


def test_sinkhorn_chooses_by_the_plan_in_training_and_by_the_scores_in_evaluation():
    router = router_of_logits(4, router_type="sinkhorn", allow_noncausal=True, norm_topk_prob=False)
    logits = torch.randn(16, 4).double() + torch.tensor([2.0, 0.0, 0.0, -2.0]).double()
    scores = logits.softmax(-1)
    best = {True: sinkhorn_by_loop(scores.tolist(), 500), False: scores.tolist()}
    assert used(router.train()(logits)) != used(router.eval()(logits))
    for training, criterion in best.items():
        routing = router.train(training)(logits)
        assert used(routing) == [set(sorted(range(4), key=lambda i: -row[i])[:2]) for row in criterion]
        torch.testing.assert_close(routing.weight, scores.gather(1, routing.index))


def best_total(scores: list[list[float]]) -> float:
    """Returns the highest sum of scores of all assignments with at most ceil(T / E) tokens per expert."""
    tokens, experts = len(scores), len(scores[0])
    return max(
        sum(row[e] for row, e in zip(scores, choice, strict=True))
        for choice in itertools.product(range(experts), repeat=tokens)
        if max(map(choice.count, range(experts))) <= math.ceil(tokens / experts)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("shape", [(6, 3), (5, 2), (3, 5), (7, 3), (4, 1)], ids=str)
def test_assignment_against_enumeration(shape, spread, seed):
    torch.manual_seed(seed)
    scores = spread * torch.randn(*shape).double() + torch.randn(shape[-1]).double()
    index = balanced_assignment(scores)
    assert index.bincount(minlength=shape[1]).max() <= math.ceil(shape[0] / shape[1])
    total = scores.gather(1, index[:, None]).sum().item()
    step = 1e-3 * (scores.max() - scores.min()).item()
    assert total >= best_total(scores.tolist()) - shape[0] * step


def test_assignment_of_no_token():
    assert balanced_assignment(torch.zeros(0, 4)).shape == (0,)


CROWDS = {
    "equal": lambda: torch.zeros(2048, 8),
    "far from zero": lambda: torch.full((2048, 8), 1000.0),
    "equal tokens": lambda: torch.randn(1, 8).expand(2048, 8),
    "similar tokens": lambda: torch.randn(1, 8) + 0.01 * torch.randn(2048, 8),
    "many experts": lambda: torch.randn(1, 64).expand(2048, 64),
    "not a number": lambda: torch.full((2048, 8), float("nan")),
}


@pytest.mark.timeout(60)  # without smaller and smaller steps it would not end
@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS)
def test_assignment_ends(crowd):
    scores = crowd()
    index = balanced_assignment(scores)
    experts = scores.shape[1]
    assert index.bincount(minlength=experts).tolist() == [2048 // experts] * experts


def test_base_balances_in_training_and_takes_the_best_in_evaluation():
    router = router_of_logits(
        3, router_type="base_layer", allow_noncausal=True, num_experts_per_tok=1, scoring_func="sigmoid"
    ).train()
    logits = torch.randn(8, 3).double() + torch.tensor([3.0, 0.0, 0.0]).double()
    mask = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1])
    logits[mask == 0] = torch.tensor([0.0, 9.0, 0.0]).double()
    routing = router(logits, RoutingContext(2, mask))
    index = routing.index[:, 0]
    assert index[mask > 0].bincount(minlength=3).tolist() == [2, 2, 2]
    total = logits[mask > 0].gather(1, index[mask > 0, None]).sum().item()
    best = best_total(logits[mask > 0].tolist())
    assert best - 6e-3 * (logits.max() - logits.min()).item() <= total <= best + 1e-9
    torch.testing.assert_close(routing.weight, 1 / (1 + torch.exp(-logits.gather(1, routing.index))))
    routing = router.eval()(logits)
    assert routing.index[:, 0].tolist() == [row.index(max(row)) for row in logits.tolist()]
    torch.testing.assert_close(routing.weight, 1 / (1 + torch.exp(-logits.gather(1, routing.index))))


def test_base_is_for_one_expert_per_token():
    with pytest.raises(ValueError, match="num_experts_per_tok is 2"):
        tiny_config(router_type="base_layer", allow_noncausal=True, num_experts_per_tok=2)
