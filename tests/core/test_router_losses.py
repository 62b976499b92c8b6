"""These tests compare router losses with literals, with transformers' loss, and with float64 loops."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_moe.router import Routing, RoutingContext, expert_load, masked_mean, num_real_tokens
from modeling_moe.router_losses import (
    COEFFICIENTS,
    RouterLosses,
    balance,
    importance_loss,
    load_balancing_loss,
    load_loss,
    loss_share,
    router_entropy_loss,
    router_losses,
    router_z_loss,
    sequence_balance_loss,
)
from tests.builders import tiny_config


# each with the arguments that it reads; K is 2 in these tests
LOSSES = {
    "balance": load_balancing_loss,
    "z": lambda routing, token_mask=None, batch_size=1, num_experts=None: router_z_loss(routing, token_mask),
    "sequence_balance": sequence_balance_loss,
    "importance": lambda routing, token_mask=None, batch_size=1, num_experts=None: importance_loss(
        routing, token_mask, num_experts
    ),
    "load": lambda routing, token_mask=None, batch_size=1, num_experts=None: load_loss(
        routing, token_mask, num_experts
    ),
    "entropy": lambda routing, token_mask=None, batch_size=1, num_experts=None: router_entropy_loss(
        routing, token_mask
    ),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# three sequences of four tokens: padded on the right, not at all, on the left
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]).flatten()


def routing_of(logits: torch.Tensor, index: torch.Tensor) -> Routing:
    """Returns a routing whose tensors are functions of the logits; the index is a constant."""
    probs = logits.softmax(-1)
    weight = torch.nn.functional.pad(probs, (0, 1)).gather(-1, index)
    return Routing(logits, weight, index, probs, logits.sigmoid())


def random_routing(tokens=12, outputs=5, top_k=2, requires_grad=False) -> Routing:
    """Returns a routing to experts that do not depend on the probabilities, with one empty assignment."""
    index = torch.rand(tokens, outputs).argsort(-1)[:, :top_k]
    index[1, -1] = outputs
    return routing_of(torch.randn(tokens, outputs, dtype=torch.float64, requires_grad=requires_grad), index)


def best_routing(tokens=12, outputs=5, top_k=2) -> Routing:
    logits = torch.randn(tokens, outputs, dtype=torch.float64)
    return routing_of(logits, logits.topk(top_k).indices)


def cast(routing: Routing, dtype: torch.dtype) -> Routing:
    return Routing(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in routing[:5]))


def real_tokens(routing: Routing, mask) -> list[int]:
    return [t for t in range(len(routing.index)) if mask is None or mask[t]]


def balance_in_loops(routing: Routing, mask=None, rows=1, num_experts=None, unbiased=False) -> float:
    """Computes `N sum_i c_i / T P_i` per row, averaged; `unbiased` counts the best K experts and divides by K."""
    outputs, length = routing.probs.shape[1], len(routing.probs) // rows
    losses = []
    for row in range(rows):
        tokens = [t for t in real_tokens(routing, mask) if row * length <= t < (row + 1) * length]
        if not tokens:
            continue
        counts, probs = [0.0] * outputs, [0.0] * outputs
        for t in tokens:
            chosen = routing.index[t].tolist()
            if unbiased:
                chosen = sorted(range(outputs), key=lambda i: -routing.probs[t, i].item())[: len(chosen)]
            for i in chosen:
                if i < outputs:
                    counts[i] += 1
            for i in range(outputs):
                probs[i] += routing.probs[t, i].item() / len(tokens)
        if num_experts is not None:
            idle = sum(counts[num_experts:]) / max(1, outputs - num_experts)
            counts[num_experts:] = [idle] * (outputs - num_experts)
        divisor = sum(counts) if unbiased else len(tokens)
        losses.append(outputs * sum(c / divisor * p for c, p in zip(counts, probs, strict=True)))
    return sum(losses) / len(losses)


def variation_in_loops(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def test_balance_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    routing = Routing(probs.log(), probs[:, :1], torch.tensor([[0], [0]]), probs)
    # both tokens to expert 0: f = (1, 0, 0), P_0 = 0.65
    torch.testing.assert_close(load_balancing_loss(routing), torch.tensor(3 * 0.65))


def test_balance_with_null_experts_by_hand():
    load, probs = torch.tensor([2.0, 2.0, 4.0, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    tokens = torch.tensor(4.0)  # of two choices each
    # experts 2 and 3 are null: f = (1/2, 1/2, 1/2, 1/2)
    torch.testing.assert_close(balance(load, tokens, probs, 2), torch.tensor(2.0))
    torch.testing.assert_close(balance(load, tokens, probs), torch.tensor(4 * (0.05 + 0.1 + 0.3)))


@pytest.mark.parametrize(("loss", "normalised"), [(load_balancing_loss, False), (sequence_balance_loss, True)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_extremes(loss, normalised, top_k):
    """The loss is K in balance and E in collapse; DeepSeek's loss is divided by K."""
    divisor = top_k if normalised else 1
    uniform = torch.full((4, 4), 0.25)
    turns = (torch.arange(4)[:, None] + torch.arange(top_k)) % 4
    # the sequence loss chooses by probability, so that equal probabilities would be ambiguous
    balanced = uniform + 1e-6 * torch.eye(4)[turns].sum(1)
    torch.testing.assert_close(
        loss(Routing(balanced, balanced[:, :top_k], turns, balanced)), torch.tensor(top_k / divisor)
    )
    one = torch.eye(4)[:top_k].sum(0).expand(4, -1) / top_k
    collapsed = Routing(one, one[:, :top_k], torch.arange(top_k).expand(4, -1), one)
    torch.testing.assert_close(loss(collapsed), torch.tensor(4.0 / divisor))


@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK * (torch.arange(12) < 8)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("num_experts", [None, 5, 3])
def test_balance_losses_in_loops(mask, rows, num_experts):
    routing = random_routing()
    fields = {"token_mask": mask, "batch_size": rows, "num_experts": num_experts}
    for loss, unbiased in ((load_balancing_loss, False), (sequence_balance_loss, True)):
        expected = balance_in_loops(routing, mask, rows, num_experts, unbiased)
        assert loss(routing, **fields).item() == pytest.approx(expected, rel=1e-12)


def test_the_sequence_loss_counts_the_best_and_not_the_chosen():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    routing = Routing(probs.log(), torch.ones(2, 1), torch.tensor([[2], [2]]), probs)
    torch.testing.assert_close(sequence_balance_loss(routing), torch.tensor(3 * 0.55))
    torch.testing.assert_close(load_balancing_loss(routing), torch.tensor(3 * 0.15))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("rows", [1, 3])
def test_balance_does_not_grow_with_the_experts_of_a_token(mask, rows):
    """With `top_k` the loss is K times that of the shares of the assignments, however many experts the tokens use."""
    probs = random_routing().probs
    every = torch.arange(5).expand(12, -1)
    one, all_of_five = Routing(probs, probs[:, :1], every[:, :1], probs), Routing(probs, probs, every, probs)
    fields = {"token_mask": mask, "batch_size": rows, "top_k": 3}
    assert load_balancing_loss(all_of_five, **fields).item() == pytest.approx(3)
    assert load_balancing_loss(one, **fields) == pytest.approx(3 * load_balancing_loss(one, mask, rows))
    assert load_balancing_loss(Routing(probs, probs, every * 0 + 5, probs), **fields) == 0
    # one assignment is less than K of them
    single = Routing(*(tensor[:1] for tensor in one[:4]))
    assert load_balancing_loss(single, top_k=3).item() == pytest.approx(3 * 5 * probs[0, 0].item())


@pytest.mark.parametrize("masked", [False, True])
def test_balance_is_transformers_for_one_layer(masked):
    routing = best_routing()
    theirs = load_balancing_loss_func((routing.logits,), 5, 2, MASK.view(3, 4) if masked else None)
    mine = load_balancing_loss(routing, MASK if masked else None)
    torch.testing.assert_close(mine, theirs.double(), atol=1e-6, rtol=1e-6)


def test_gradients_of_micro_batches_with_the_global_load_add_up():
    routing = random_routing(requires_grad=True)

    def gradients(load_of):
        total = 0
        for part in (slice(0, 4), slice(4, 12)):
            piece = Routing(*(tensor[part] for tensor in routing[:5]))
            loss = balance(*load_of(piece, MASK[part]), masked_mean(piece.probs, MASK[part]))
            total = total + loss * MASK[part].sum() / MASK.sum()
        return torch.autograd.grad(total, routing.logits, retain_graph=True)[0]

    whole = torch.autograd.grad(load_balancing_loss(routing, MASK), routing.logits, retain_graph=True)[0]

    def load_of(piece, mask):
        return expert_load(piece, mask), num_real_tokens(piece, mask)

    of_step = load_of(routing, MASK)
    torch.testing.assert_close(gradients(lambda piece, mask: of_step), whole, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(gradients(load_of), whole)


def test_z_loss_by_hand_and_its_gradient():
    routing = random_routing(requires_grad=True)
    expected = sum(torch.log(row.exp().sum()) ** 2 for row in routing.logits) / len(routing.logits)
    torch.testing.assert_close(router_z_loss(routing), expected)
    grad = torch.autograd.grad(router_z_loss(routing), routing.logits)[0]
    lse = routing.logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(grad, 2 * lse * routing.probs / len(lse))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("num_experts", [None, 3])
def test_importance_and_load_in_loops(mask, num_experts):
    routing = random_routing()
    importance, load, chance = ([0.0] * 5 for _ in range(3))
    for t in real_tokens(routing, mask):
        for k, i in enumerate(routing.index[t].tolist()):
            if i < 5:
                importance[i] += routing.weight[t, k].item()
                load[i] += 1
        for i in range(5):
            chance[i] += routing.selection_probability[t, i].item()
    fields = {"token_mask": mask, "num_experts": num_experts}
    silent = routing._replace(selection_probability=None)
    for got, values in [
        (importance_loss(routing, **fields), importance),
        (load_loss(routing, **fields), chance),
        (load_loss(silent, **fields), load),
    ]:
        assert got.item() == pytest.approx(variation_in_loops(values[:num_experts]), rel=1e-7)


@pytest.mark.parametrize("loss", [importance_loss, load_loss])
def test_variation_extremes(loss):
    probs = torch.full((8, 4), 0.25)
    weight, turns = torch.ones(8, 1), torch.arange(8)[:, None] % 4
    assert loss(Routing(probs, weight, turns, probs)).item() == 0
    # (8, 0, 0, 0): population variance 12, mean 2
    torch.testing.assert_close(loss(Routing(probs, weight, turns * 0, probs)), torch.tensor(3.0))


def test_null_experts_do_not_spoil_the_balance_of_real_ones():
    probs = torch.full((6, 5), 0.2)
    index = torch.arange(6)[:, None] % 3
    routing = Routing(probs, torch.ones(6, 1), index, probs)
    assert importance_loss(routing, num_experts=3).item() == 0
    assert load_loss(routing, num_experts=3).item() == 0


def test_entropy_in_loops_and_its_extremes():
    routing = random_routing()
    tokens = real_tokens(routing, MASK)
    expected = -sum(p * math.log(p) for t in tokens for p in routing.probs[t].tolist()) / len(tokens)
    assert router_entropy_loss(routing, MASK).item() == pytest.approx(expected, rel=1e-12)
    uniform, sure = torch.full((4, 4), 0.25), torch.eye(4)
    assert router_entropy_loss(routing._replace(probs=uniform)).item() == pytest.approx(math.log(4))
    assert router_entropy_loss(routing._replace(probs=sure)).item() == 0


@each_loss
def test_gradient_with_a_constant_index(loss):
    routing = random_routing(requires_grad=True)
    fields = {"token_mask": MASK, "batch_size": 3, "num_experts": 4}
    assert torch.autograd.gradcheck(
        lambda logits: loss(routing_of(logits, routing.index), **fields), routing.logits.detach().requires_grad_()
    )


@each_loss
def test_padding_changes_nothing(loss):
    routing = random_routing(requires_grad=True)
    mask = torch.tensor([1] * 8 + [0] * 4)
    short = Routing(*(tensor[:8] for tensor in routing[:5]))
    torch.testing.assert_close(loss(routing, token_mask=mask), loss(short))
    grad = torch.autograd.grad(loss(routing, token_mask=mask), routing.logits, retain_graph=True)[0]
    assert not grad[8:].any()
    assert grad[:8].any()


@each_loss
@pytest.mark.parametrize("rows", [1, 3])
def test_only_padding_gives_zero_and_a_finite_gradient(loss, rows):
    routing = random_routing(requires_grad=True)
    value = loss(routing, token_mask=torch.zeros(12), batch_size=rows)
    assert value.item() == 0
    assert not torch.autograd.grad(value, routing.logits)[0].any()


@each_loss
@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fp32_under_autocast(loss, chance, masked):
    routing = cast(random_routing(tokens=201), torch.float32)
    routing = routing if chance else routing._replace(selection_probability=None)
    fields = {"token_mask": torch.arange(201) % 3 > 0 if masked else None, "batch_size": 3, "num_experts": 4}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(routing, **fields)
    assert got.dtype == torch.float32
    assert torch.equal(got, loss(routing, **fields))


@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_router_losses_computes_each_loss_by_its_name(scope):
    config = tiny_config(
        router_type="noisy_topk", router_aux_loss_scope=scope, **dict.fromkeys(COEFFICIENTS.values(), 0.1)
    )
    routing = random_routing(outputs=5)
    got = router_losses(routing, RoutingContext(3, MASK), config)
    expected = {name: loss(routing, token_mask=MASK, batch_size=3) for name, loss in LOSSES.items()}
    rows = 3 if scope == "sequence" else 1
    expected["balance"] = torch.tensor(balance_in_loops(routing, MASK, rows), dtype=torch.float64)
    assert got.auxiliary is None
    for name, value in expected.items():
        torch.testing.assert_close(getattr(got, name), value)
    total = got._replace(auxiliary=torch.tensor(5.0)).weighted_sum(config)
    torch.testing.assert_close(total, 5 + 0.1 * sum(expected.values()))


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_coefficient_weighs_the_loss_of_its_name(name):
    config = tiny_config(
        router_type="noisy_topk", **(dict.fromkeys(COEFFICIENTS.values(), 0.0) | {COEFFICIENTS[name]: 0.3})
    )
    losses = router_losses(random_routing(outputs=5), RoutingContext(3), config)
    computed = {field for field, value in losses._asdict().items() if value is not None}
    assert computed == {"balance", name}
    torch.testing.assert_close(losses.weighted_sum(config), 0.3 * getattr(losses, name))


def test_only_the_balance_is_computed_without_a_coefficient():
    config = tiny_config(**dict.fromkeys(COEFFICIENTS.values(), 0.0))
    got = router_losses(random_routing(), RoutingContext(3), config)
    assert got == RouterLosses(balance=got.balance)
    assert got.weighted_sum(config) is None


def test_shares_of_micro_batches_sum_to_one():
    labels = torch.tensor([[5, 6, 7, -100], [-100, 5, 6, 7]])
    # no token predicts the first label of a row
    assert [float(loss_share(row[None], num_items_in_batch=5)) for row in labels] == pytest.approx([0.4, 0.6])
    shifted = torch.tensor([[6, 7, -100, -100]])
    assert float(loss_share(labels, shift_labels=shifted, num_items_in_batch=torch.tensor(8))) == 0.25
    assert loss_share(labels) == 1.0
