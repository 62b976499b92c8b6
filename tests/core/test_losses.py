"""Router losses against literals, transformers' own and a loop."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_moe.losses import load_balancing_loss, router_z_loss
from modeling_moe.routing import Routing


def random_routing(tokens=11, experts=5, top_k=2, requires_grad=False) -> Routing:
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=requires_grad)
    probs = logits.softmax(-1)
    weight, index = probs.topk(top_k)
    return Routing(logits, weight, index, probs)


def test_balance_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])
    routing = Routing(probs.log(), probs[:, :1], torch.tensor([[0], [0]]), probs)
    # both tokens to expert 0: f = (1, 0, 0), P_0 = 0.65
    torch.testing.assert_close(load_balancing_loss(routing), torch.tensor(3 * 0.65))


def test_balance_extremes():
    uniform = torch.full((4, 4), 0.25)
    balanced = Routing(uniform, uniform[:, :1], torch.arange(4)[:, None], uniform)
    torch.testing.assert_close(load_balancing_loss(balanced), torch.tensor(1.0))
    one = torch.eye(4)[[0, 0, 0, 0]]
    collapsed = Routing(one, one[:, :1], torch.zeros(4, 1, dtype=torch.long), one)
    torch.testing.assert_close(load_balancing_loss(collapsed), torch.tensor(4.0))


@pytest.mark.parametrize("masked", [False, True])
def test_balance_is_transformers_for_one_layer_but_for_k(masked):
    routing = random_routing(tokens=12)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]) if masked else None
    theirs = load_balancing_loss_func((routing.logits,), 5, 2, mask)
    mine = load_balancing_loss(routing, None if mask is None else mask.flatten())
    torch.testing.assert_close(2 * mine, theirs.double(), atol=1e-6, rtol=1e-6)


def test_padding_changes_nothing():
    routing = random_routing(requires_grad=True)
    mask = torch.tensor([1] * 8 + [0] * 3)
    short = Routing(*(tensor[:8] for tensor in routing))
    for loss in (load_balancing_loss, router_z_loss):
        torch.testing.assert_close(loss(routing, mask), loss(short))
        grad = torch.autograd.grad(loss(routing, mask), routing.logits, retain_graph=True)[0]
        assert not grad[8:].any()
        assert grad[:8].any()


def test_only_padding_gives_zero():
    routing = random_routing()
    for loss in (load_balancing_loss, router_z_loss):
        assert loss(routing, torch.zeros(11)).item() == 0


def test_z_loss_by_hand_and_its_gradient():
    routing = random_routing(requires_grad=True)
    expected = sum(torch.log(row.exp().sum()) ** 2 for row in routing.logits) / len(routing.logits)
    torch.testing.assert_close(router_z_loss(routing), expected)
    grad = torch.autograd.grad(router_z_loss(routing), routing.logits)[0]
    lse = routing.logits.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(grad, 2 * lse * routing.probs / len(lse))


@pytest.mark.parametrize("masked", [False, True])
def test_fp32_under_autocast(masked):
    routing = Routing(*(t.float() if t.is_floating_point() else t for t in random_routing(tokens=200)))
    mask = torch.arange(200) % 3 > 0 if masked else None
    for loss in (load_balancing_loss, router_z_loss):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = loss(routing, mask)
        assert torch.equal(got, loss(routing, mask))
