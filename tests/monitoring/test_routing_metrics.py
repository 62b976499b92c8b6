"""These tests compare routing metrics with literals and loops."""

import math

import pytest
import torch

from modeling_moe.monitoring.routing_metrics import (
    co_activation,
    dead_experts,
    dropped_share,
    entropies,
    expert_domain_share,
    gate_margin,
    load_variation,
    max_violation,
    mean_experts,
    normalised_balance,
    summary,
)
from modeling_moe.router import Routing, RoutingContext
from modeling_moe.router_capacity import Capacity, count_dropped
from tests.builders import tiny_config


TOKENS, EXPERTS, OUTPUTS, SLOTS = 14, 5, 7, 3
MASKS = [None, (torch.arange(TOKENS) % 4 > 0).long(), torch.arange(TOKENS) < 9]
masks = pytest.mark.parametrize("mask", MASKS, ids=["all", "some", "first"])


def random_routing() -> Routing:
    """Returns a routing with five experts, two experts without weights, and three assignments per token, some empty."""
    logits = torch.randn(TOKENS, OUTPUTS, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(-1)
    index = torch.rand(TOKENS, OUTPUTS).argsort(-1)[:, :SLOTS]
    index[torch.rand(TOKENS, SLOTS) < 0.2] = OUTPUTS
    weight = torch.nn.functional.pad(probs, (0, 1)).gather(-1, index)
    return Routing(logits, weight, index, probs)


def routing_with(probs: torch.Tensor, top_k: int = 1) -> Routing:
    weight, index = probs.topk(top_k)
    return Routing(probs, weight, index, probs)


def real_tokens(mask) -> list[int]:
    return [t for t in range(TOKENS) if mask is None or mask[t]]


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


@pytest.mark.parametrize(
    ("load", "violation", "variation", "dead"),
    [
        ([3.0, 3.0, 3.0, 3.0], 0.0, 0.0, 0.0),
        ([8.0, 0.0, 0.0, 0.0], 3.0, math.sqrt(3), 0.75),
        ([1.0, 2.0, 3.0], 0.5, math.sqrt(2 / 3) / 2, 0.0),
        ([0.0, 0.0], 0.0, 0.0, 1.0),
    ],
)
def test_load_by_hand(load, violation, variation, dead):
    # a second layer shows that each layer is measured separately
    both = torch.tensor([load, [1.0] * len(load)])
    torch.testing.assert_close(max_violation(both), torch.tensor([violation, 0.0]))
    torch.testing.assert_close(load_variation(both), torch.tensor([variation, 0.0]))
    torch.testing.assert_close(dead_experts(both), torch.tensor([dead, 0.0]))


@masks
def test_mean_experts_in_loops(mask):
    routing, tokens = random_routing(), real_tokens(mask)
    for num_experts in (None, EXPERTS):
        count = sum(i < (num_experts or OUTPUTS) for t in tokens for i in routing.index[t].tolist())
        assert mean_experts(routing, mask, num_experts).item() == pytest.approx(count / len(tokens))


@masks
def test_dropped_share_in_loops_and_as_counted(mask):
    config = tiny_config(num_null_experts=2, expert_capacity=2)
    before = random_routing()
    after = Capacity(config)(before, RoutingContext(token_mask=mask), training=True)
    had = [(t, k) for t in real_tokens(mask) for k in range(SLOTS) if before.index[t, k] < OUTPUTS]
    lost = [(t, k) for t, k in had if after.index[t, k] == OUTPUTS]
    assert lost
    assert dropped_share(before, after, mask).item() == pytest.approx(len(lost) / len(had))
    counts = count_dropped(before, after, mask)
    assert summary(before, mask, EXPERTS, counts)["dropped_share"].item() == pytest.approx(len(lost) / len(had))


@pytest.mark.parametrize("top_k", [1, 2])
def test_normalised_balance_is_one_in_balance_and_experts_over_choices_in_collapse(top_k):
    uniform = torch.full((4, 4), 0.25, dtype=torch.float64)
    turns = (torch.arange(4)[:, None] + torch.arange(top_k)) % 4
    assert normalised_balance(Routing(uniform, uniform[:, :top_k], turns, uniform)).item() == pytest.approx(1)
    one = torch.eye(4, dtype=torch.float64)[:top_k].sum(0).expand(4, -1) / top_k
    collapsed = Routing(one, one[:, :top_k], torch.arange(top_k).expand(4, -1), one)
    assert normalised_balance(collapsed).item() == pytest.approx(4 / top_k)
    nothing = normalised_balance(collapsed, torch.zeros(4))
    assert nothing.item() == 0


@masks
def test_entropies_in_loops(mask):
    routing, tokens = random_routing(), real_tokens(mask)
    probs = [routing.probs[t].tolist() for t in tokens]
    token = sum(map(entropy, probs)) / len(tokens)
    marginal = entropy([sum(column) / len(tokens) for column in zip(*probs, strict=True)])
    assert [x.item() for x in entropies(routing, mask)] == pytest.approx([token, marginal, marginal - token])


SURE = 0.9999 * torch.eye(4, dtype=torch.float64) + 0.0001 / 4


@pytest.mark.parametrize(
    ("probs", "token", "marginal"),
    [
        (SURE, 0.0, math.log(4)),
        (SURE[[2, 2, 2, 2]], 0.0, 0.0),
        (torch.full((4, 4), 0.25, dtype=torch.float64), math.log(4), math.log(4)),
        (torch.eye(4, dtype=torch.float64), 0.0, math.log(4)),
    ],
    ids=["sure and balanced", "collapsed", "undecided", "certain"],
)
def test_entropies_tell_states_of_a_router_apart(probs, token, marginal):
    got = [x.item() for x in entropies(routing_with(probs))]
    assert got == pytest.approx([token, marginal, marginal - token], abs=2e-3)


@masks
def test_gate_margin_in_loops(mask):
    routing, tokens = random_routing(), real_tokens(mask)
    ordered = [sorted(routing.probs[t].tolist(), reverse=True) for t in tokens]
    expected = sum(row[SLOTS - 1] - row[SLOTS] for row in ordered) / len(tokens)
    assert gate_margin(routing, mask).item() == pytest.approx(expected)


def test_gate_margin_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]])
    assert gate_margin(routing_with(probs)).item() == pytest.approx((0.5 + 0.1) / 2)
    assert gate_margin(routing_with(probs, 2)).item() == pytest.approx((0.1 + 0.3) / 2)
    assert gate_margin(routing_with(probs, 3)).item() == 0


@masks
def test_co_activation_in_loops(mask):
    routing, tokens = random_routing(), real_tokens(mask)
    expected = torch.zeros(OUTPUTS, OUTPUTS, dtype=torch.float64)
    for t in tokens:
        chosen = [i for i in routing.index[t].tolist() if i < OUTPUTS]
        for i in chosen:
            for j in chosen:
                expected[i, j] += 1 / len(tokens)
    torch.testing.assert_close(co_activation(routing, mask), expected)


def test_co_activation_counts_exactly_under_autocast():
    routing = routing_with(torch.rand(999, OUTPUTS), SLOTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = co_activation(routing)
    assert torch.equal(got.diagonal(), routing.index.flatten().bincount(minlength=OUTPUTS) / 999)


@masks
def test_expert_domain_share_in_loops(mask):
    routing, tokens = random_routing(), real_tokens(mask)
    domain = torch.arange(TOKENS) % 3
    counts = torch.zeros(4, OUTPUTS, dtype=torch.float64)
    for t in tokens:
        for i in routing.index[t].tolist():
            if i < OUTPUTS:
                counts[domain[t], i] += 1
    got = expert_domain_share(routing, domain, 4, mask)
    torch.testing.assert_close(got[:3], counts[:3] / counts[:3].sum(-1, keepdim=True))
    assert not got[3].any()


@masks
def test_summary_is_of_the_experts_with_weights(mask):
    routing, tokens = random_routing(), real_tokens(mask)
    load = [0] * EXPERTS
    for t in tokens:
        for i in routing.index[t].tolist():
            if i < EXPERTS:
                load[i] += 1
    mean = sum(load) / EXPERTS
    got = summary(routing, mask, EXPERTS)
    assert "dropped_share" not in got
    assert got["max_violation"].item() == pytest.approx(max(load) / mean - 1)
    assert got["load_variation"].item() == pytest.approx(
        math.sqrt(sum((c - mean) ** 2 for c in load) / EXPERTS) / mean
    )
    assert got["dead_experts"].item() == load.count(0) / EXPERTS
    assert got["mean_experts"].item() == pytest.approx(sum(load) / len(tokens))
    for name, value in zip(("token", "marginal"), entropies(routing, mask)[:2], strict=True):
        assert torch.equal(got[f"{name}_entropy"], value)
    assert torch.equal(got["gate_margin"], gate_margin(routing, mask))


@pytest.mark.parametrize("mask", [None, torch.ones(TOKENS), torch.zeros(TOKENS)])
def test_summary_is_finite_without_gradient(mask):
    got = summary(random_routing(), mask, EXPERTS, torch.zeros(2))
    assert all(value.dim() == 0 and value.isfinite() and not value.requires_grad for value in got.values())


def test_summary_never_waits_for_the_device():
    """No metric waits for the device: on the meta device there are no values to read."""
    routing = Routing(*(tensor.detach().to("meta") for tensor in random_routing()[:4]))
    got = summary(routing, torch.ones(TOKENS, device="meta"), EXPERTS, torch.ones(2, device="meta"))
    assert {value.device.type for value in got.values()} == {"meta"}
