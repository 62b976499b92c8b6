"""These tests compare routers with different numbers of experts per token with their papers' definitions in float64."""

import math

import pytest
import torch

from modeling_moe.router import RoutingContext
from modeling_moe.router_balancing import CONTROLLERS
from modeling_moe.router_variable_k import remoe_loss
from tests.builders import router_of_logits, tiny_config


def dense(routing) -> torch.Tensor:
    """Returns the weights (T, E) of all experts, 0 for unused experts."""
    experts = routing.probs.shape[-1]
    return torch.zeros(len(routing.index), experts + 1).double().scatter(1, routing.index, routing.weight)[:, :experts]


def used(routing) -> list[set[int]]:
    return [{i for i in row if i < routing.probs.shape[-1]} for row in routing.index.tolist()]


def top_p_by_definition(logits: list[float], top_p: float) -> set[int]:
    total = sum(math.exp(x) for x in logits)
    probs = [math.exp(x) / total for x in logits]
    chosen, mass = set(), 0.0
    for expert in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass >= top_p:
            break
        chosen.add(expert)
        mass += probs[expert]
    return chosen


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.7, 0.95])
def test_top_p_takes_the_smallest_set(top_p):
    logits = 2 * torch.randn(50, 7).double()
    routing = router_of_logits(7, router_type="top_p", router_top_p=top_p).eval()(logits)
    assert used(routing) == [top_p_by_definition(row, top_p) for row in logits.tolist()]


@pytest.mark.parametrize(
    ("top_p", "experts", "weights"),
    [(0.5, {2}, [0, 0, 0.5, 0]), (0.51, {0, 2}, [0.25, 0, 0.5, 0]), (0.9, {0, 1, 2, 3}, [0.25, 0.125, 0.5, 0.125])],
)
def test_top_p_by_hand(top_p, experts, weights):
    logits = torch.tensor([[2.0, 1.0, 4.0, 1.0]]).double().log()
    # the best expert alone has half of the mass; 1e-9 covers rounding
    routing = router_of_logits(4, router_type="top_p", router_top_p=top_p - 1e-9).eval()(logits)
    assert used(routing) == [experts]
    torch.testing.assert_close(dense(routing), torch.tensor([weights]).double())


@pytest.mark.parametrize("top_p", [1.0])
def test_top_p_of_one_uses_all_even_if_one_is_certain(top_p):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [100.0, 0.0, 0.0, 0.0]]).double()
    assert used(router_of_logits(4, router_type="top_p", router_top_p=top_p).eval()(logits)) == [{0, 1, 2, 3}] * 2


def test_top_p_renormalises_when_told():
    router = router_of_logits(4, router_type="top_p", router_top_p=0.6, norm_topk_prob=True).eval()
    weight = dense(router(torch.tensor([[2.0, 1.0, 4.0, 1.0]]).double().log()))
    torch.testing.assert_close(weight, torch.tensor([[1 / 3, 0, 2 / 3, 0]]).double())


@pytest.mark.parametrize(
    "fields",
    [
        {"router_type": "top_p", "router_top_p": 0.9},
        {"router_type": "remoe"},
        {"router_type": "continuous", "router_threshold_mode": "fixed", "router_cutoff": 0.4},
        {"router_type": "expert_threshold"},
    ],
    ids=lambda fields: fields["router_type"],
)
def test_at_most_the_best_experts(fields):
    logits = torch.randn(40, 7).double()
    everyone = used(router_of_logits(7, **fields).eval()(logits))
    limited = router_of_logits(7, max_experts_per_tok=2, **fields).eval()(logits)
    assert limited.index.shape == (40, 2)
    expected = [
        set(sorted(chosen, key=lambda i: -row[i])[:2]) for chosen, row in zip(everyone, logits.tolist(), strict=True)
    ]
    assert used(limited) == expected
    assert max(map(len, everyone)) > 2


def test_fixed_threshold_by_hand():
    router = router_of_logits(
        3,
        router_type="continuous",
        router_threshold_mode="fixed",
        router_threshold=1.0,
        router_temperature=0.5,
        router_cutoff=0.2,
    ).eval()
    routing = router(torch.tensor([[1.0, 2.0, 0.0]]).double())
    # sigmoid(0), sigmoid(2), and sigmoid(-2) = 0.119 below the cutoff
    torch.testing.assert_close(dense(routing), torch.tensor([[0.5, 0.8807970779778823, 0.0]]).double())
    assert used(routing) == [{0, 1}]


def test_learned_threshold_starts_where_told_and_gets_the_formulas_gradient():
    router = router_of_logits(
        4, router_type="continuous", router_threshold_mode="learned", router_threshold=0.3, router_cutoff=0.0
    ).eval()
    logits, factor = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    (factor * router(logits).weight).sum().backward()
    tau = torch.tensor([0.3]).double().requires_grad_()
    (factor / (1 + torch.exp(tau - logits))).sum().backward()
    torch.testing.assert_close(router.tau.grad, tau.grad, rtol=1e-6, atol=0)


def budget(**fields):
    return router_of_logits(
        6, **({"router_type": "continuous", "router_threshold_mode": "budget", "router_cutoff": 0} | fields)
    ).eval()


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_budget_is_spent(temperature, top_k):
    router = budget(router_temperature=temperature, num_experts_per_tok=top_k)
    weight = router(5 * torch.randn(30, 6).double()).weight
    torch.testing.assert_close(weight.sum(-1), torch.full((30,), float(top_k)).double(), rtol=0, atol=1e-10)


def test_budget_gradient():
    router = budget(router_temperature=0.7)
    logits = torch.randn(4, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router(x).weight, logits)
    weight = router(logits).weight
    g = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(weight, logits, g)
    slope = (weight * (1 - weight) / 0.7).detach()
    expected = slope * (g - (slope * g).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected)


def test_budget_becomes_top_k():
    logits = torch.stack([torch.randperm(6) for _ in range(20)]).double()
    expected = (logits >= 4).double()
    errors = [(dense(budget(router_temperature=t)(logits)) - expected).abs().max() for t in (1.0, 0.1, 0.01)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_budget_of_all_experts_is_refused():
    with pytest.raises(ValueError, match=r"num_experts_per_tok .* below num_experts"):
        tiny_config(router_type="continuous", num_experts_per_tok=5)


def test_relu_by_hand():
    routing = router_of_logits(3, router_type="remoe").eval()(
        torch.tensor([[1.5, -2.0, 0.25], [-1.0, -0.1, 0.0]]).double()
    )
    torch.testing.assert_close(dense(routing), torch.tensor([[1.5, 0.0, 0.25], [0.0, 0.0, 0.0]]).double())
    assert used(routing) == [{0, 2}, set()]
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(2).double())


@pytest.mark.parametrize("masked", [False, True])
def test_relu_loss_against_the_paper(masked):
    """The loss is equation 10: the mean over tokens of `sum_e f_e w_te`, `f_e = E / (K T) sum_t [w_te > 0]`."""
    router = router_of_logits(5, router_type="remoe", router_sparsity_coef=0.5).eval()
    logits = torch.randn(12, 5).double().requires_grad_()
    mask = torch.tensor([1, 1, 0, 1] * 3) if masked else None
    loss = router.auxiliary_loss(router(logits), mask)

    copy = logits.detach().requires_grad_()
    real = [t for t in range(12) if mask is None or mask[t]]
    expected = 0.0
    for expert in range(5):
        busy = sum(int(copy[t, expert] > 0) for t in real) * 5 / (2 * len(real))
        expected = expected + sum(busy * copy[t, expert].clamp(min=0) for t in real) / len(real)
    torch.testing.assert_close(loss, 0.5 * expected)
    gradients = [torch.autograd.grad(value, x)[0] for value, x in ((loss, logits), (0.5 * expected, copy))]
    torch.testing.assert_close(*gradients)


def test_relu_loss_of_no_token_is_zero():
    routing = router_of_logits(5, router_type="remoe").eval()(torch.randn(4, 5).double())
    assert remoe_loss(routing, 2, torch.zeros(4)) == 0


@pytest.mark.parametrize(("used_per_layer", "factor"), [((3, 2), 1.2), ((3, 1), 1.0), ((2, 1), 1 / 1.2)])
def test_sparsity_by_hand(used_per_layer, factor):
    """The coefficient moves by the mean over layers of the experts that 4 tokens use, at a target of 2 per token."""
    routers = [router_of_logits(5, router_type="remoe", router_sparsity_coef=0.01).eval() for _ in used_per_layer]
    controller = CONTROLLERS["sparsity"]
    totals = []
    for router, active in zip(routers, used_per_layer, strict=True):
        logits = torch.full((5, 5), -1.0).double()
        logits[:, :active] = 1.0
        logits[4] = 1.0
        totals.append(controller.observe(router, router(logits), torch.tensor([1, 1, 1, 1, 0])))
    controller.step(routers, torch.stack(totals).float())
    for router in routers:
        torch.testing.assert_close(router.sparsity_coef, torch.tensor([0.01 * factor]), check_dtype=False)


@pytest.mark.parametrize("router_type", ["top_p", "continuous", "remoe", "expert_threshold"])
def test_a_token_is_routed_by_itself(router_type):
    router = router_of_logits(5, router_type=router_type).eval().train()
    logits = torch.randn(8, 5).double()
    alone = torch.cat([dense(router(row[None], RoutingContext())) for row in logits])
    torch.testing.assert_close(dense(router(logits, RoutingContext(2))), alone)


@pytest.mark.parametrize("field", ["num_null_experts", "num_copy_experts"])
def test_experts_without_weights_are_refused(field):
    with pytest.raises(ValueError, match=field):
        tiny_config(router_type="top_p", **{field: 1})
