"""Mixtures of heads equal the paper's equations, with any number of shared heads, and the gates have a gradient."""

import pytest
import torch

from modeling_moe.attention_moh import head_gates
from modeling_moe.router import RoutingContext
from tests.core.attention_variants import ROWS, assert_equal, attend, attention_of, heads_of, inputs_of, model_of


# name -> fields, and numbers of shared heads, of routed heads and of chosen heads
CASES = {
    "two shared": ({}, 2, 4, 3),
    "one shared": ({"attention_experts": 5}, 1, 5, 3),
    "none shared": ({"attention_experts": 6}, 0, 6, 3),
    "one routed": ({"attention_experts": 1, "attention_experts_per_tok": 1}, 5, 1, 1),
    "all chosen": ({"attention_experts_per_tok": 4}, 2, 4, 4),
    "biases": ({"attention_bias": True}, 2, 4, 3),
}
HEADS = 6


def gates_of(attention, x: torch.Tensor, shared: int, routed: int, top_k: int, unit: bool) -> torch.Tensor:
    """Computes the gates (T, n) by the paper's equations, or scaled as the released vision models have them."""
    gate = attention.gate
    probs = (x @ gate.weight.T).softmax(dim=-1)
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(top_k, dim=-1).indices, 1.0)
    of_routed = probs * kept
    if unit:
        of_routed = top_k * of_routed / of_routed.sum(dim=-1, keepdim=True)
    if shared == 0:
        return of_routed
    alpha = (x @ gate.kind_weight.T).softmax(dim=-1) * (2 if unit else 1)
    of_shared = torch.ones(len(x), 1, dtype=x.dtype) if shared == 1 else (x @ gate.shared_weight.T).softmax(dim=-1)
    of_shared = of_shared * (shared if unit else 1)
    return torch.cat([alpha[:, :1] * of_shared, alpha[:, 1:] * of_routed], dim=-1)


def all_gates(routing) -> torch.Tensor:
    return head_gates(routing.index, routing.weight, routing.mixture, 4)


def oracle(attention, x: torch.Tensor, rotary, gates: torch.Tensor) -> torch.Tensor:
    query = heads_of(attention.q_proj(x), HEADS, rotary)
    key, value = heads_of(attention.k_proj(x), 2, rotary), heads_of(attention.v_proj(x), 2)
    outputs = attend(query, key, value)  # (B, S, n, D)
    matrices = attention.o_proj.weight.unflatten(1, (HEADS, -1))  # (H, n, D)
    total = torch.einsum("bsn,bsnd,hnd->bsh", gates.unflatten(0, x.shape[:2]), outputs, matrices)
    return total if attention.o_proj.bias is None else total + attention.o_proj.bias


@pytest.mark.parametrize("kind", ["softmax", "unit"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_equations_in_output_and_gradients(name, kind):
    fields, *numbers = CASES[name]
    attention = attention_of("moh", **fields, attention_head_gates=kind)
    arguments = inputs_of(attention)
    x = arguments["hidden_states"]
    gates = gates_of(attention, x.flatten(0, 1), *numbers, kind == "unit")
    assert ((gates > 0).sum(dim=-1) == numbers[0] + numbers[2]).all()
    assert_equal(attention, arguments, oracle(attention, x, arguments["position_embeddings"], gates))


def test_unit_gates_have_the_mean_one():
    """A dense model whose gates are equal computes what it computed without gates, if all heads are used."""
    attention = attention_of("moh", attention_experts_per_tok=4, attention_head_gates="unit")
    with torch.no_grad():
        for weight in (attention.gate.weight, attention.gate.kind_weight, attention.gate.shared_weight):
            weight.zero_()
    gates = all_gates(attention.gate(torch.randn(5, 32, dtype=torch.float64)))
    torch.testing.assert_close(gates, torch.ones_like(gates))


def test_a_dropped_head_adds_nothing():
    attention = attention_of("moh")
    attention.capacity.absolute = 3
    arguments = inputs_of(attention)
    x, context = arguments["hidden_states"], RoutingContext(ROWS)
    chosen, routing = attention.route(x.flatten(0, 1), context)
    gates, before = all_gates(routing), all_gates(chosen)
    assert ((gates == 0) & (before > 0)).any()
    assert torch.equal(gates[:, :2], before[:, :2])  # shared heads have no capacity
    expected = oracle(attention, x, arguments["position_embeddings"], gates)
    assert_equal(attention, arguments, expected, routing_context=context)


def test_unused_heads_get_no_gradient():
    attention = attention_of("moh", num_key_value_heads=6)
    with torch.no_grad():
        attention.gate.weight.fill_(1.0)
        attention.gate.weight[3] = -1.0
    arguments = inputs_of(attention)
    arguments["hidden_states"] = arguments["hidden_states"].detach().abs()
    attention(**arguments)[0].sum().backward()
    for rows in (attention.q_proj.weight.grad, attention.v_proj.weight.grad, attention.o_proj.weight.grad.T):
        assert rows.unflatten(0, (HEADS, -1)).flatten(1).any(dim=1).tolist() == [True] * 5 + [False]


def test_the_router_learns_from_the_task_alone():
    model = model_of("moh", router_aux_loss_coef=0, router_z_loss_coef=0, mlp_layer_types=["dense"] * 3).train()
    ids = torch.randint(3, 99, (2, 9))
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for parameter in layer.self_attn.gate.parameters():
            assert parameter.grad.any()
