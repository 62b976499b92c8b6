"""SwitchHead equals an einsum of the paper's equations, its losses are those of each head, and its dropout masks logits."""

import pytest
import torch

from modeling_moe.attention_switch_head import SwitchHeadRouter
from modeling_moe.router import RoutingContext
from modeling_moe.router_losses import router_losses, weigh_tokens
from tests.builders import tiny_config
from tests.core.attention_variants import (
    HIDDEN,
    LENGTH,
    ROWS,
    VARIANTS,
    assert_equal,
    attend,
    attention_of,
    heads_of,
    inputs_of,
    model_of,
)


HEADS, EXPERTS, TOP_K = 3, 4, 2
FIELDS = VARIANTS["switch_head"]


def selection(logits: torch.Tensor, top_k: int = TOP_K) -> torch.Tensor:
    """Returns sigmoid scores (..., E) of the `top_k` largest logits, 0 elsewhere."""
    kept = torch.zeros_like(logits).scatter(-1, logits.topk(top_k, dim=-1).indices, 1.0)
    return logits.sigmoid() * kept


def oracle(attention, x: torch.Tensor, rotary, source: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    """Computes the paper's equations, with scores (B, S, n, E) of both sides that are 0 for experts without the token."""
    bias = (lambda name: getattr(attention, name)) if attention.o_bias is not None else (lambda name: 0.0)
    value_experts = attention.experts.up_proj.unflatten(0, (HEADS, EXPERTS))  # (n, E, D, H)
    output_experts = attention.experts.down_proj.unflatten(0, (HEADS, EXPERTS))  # (n, E, H, D)
    value = torch.einsum("bsne,bsh,nedh->bsnd", source, x, value_experts)
    if attention.v_bias is not None:
        value = value + attention.v_bias.view(HEADS, -1)
    query, key = (heads_of(proj(x), HEADS, rotary) for proj in (attention.q_proj, attention.k_proj))
    return torch.einsum("bsne,bsnd,nehd->bsh", destination, attend(query, key, value), output_experts) + bias("o_bias")


def sides(attention, x: torch.Tensor) -> list[torch.Tensor]:
    """Returns the logits (B, S, n, E) of the source and of the destination side."""
    return list((x @ attention.gate.weight.T).unflatten(-1, (2, HEADS, EXPERTS)).unbind(2))


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"qkv_bias": True}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_equations_in_output_and_gradients(fields, masked):
    attention = attention_of("switch_head", **fields)
    arguments = inputs_of(attention, masked)
    x = arguments["hidden_states"]
    scores = [selection(logits) for logits in sides(attention, x)]
    expected = oracle(attention, x, arguments["position_embeddings"], *scores)
    assert_equal(attention, arguments, expected)


def test_a_dropped_assignment_adds_nothing():
    attention = attention_of("switch_head")
    attention.capacity.absolute = 2
    arguments = inputs_of(attention)
    x = arguments["hidden_states"]
    context = RoutingContext(ROWS)
    _, routing = attention.route(x.flatten(0, 1), context)
    outputs = 2 * HEADS * EXPERTS
    assert (routing.index == outputs).any()
    gates = routing.weight.new_zeros(ROWS * LENGTH, outputs + 1).scatter_add(1, routing.index, routing.weight)
    scores = gates[:, :-1].view(ROWS, LENGTH, 2, HEADS, EXPERTS).unbind(2)
    expected = oracle(attention, x, arguments["position_embeddings"], *scores)
    assert_equal(attention, arguments, expected, routing_context=context)


def test_unused_experts_get_no_gradient():
    attention = attention_of("switch_head")
    with torch.no_grad():
        rows = attention.gate.weight.view(2, HEADS, EXPERTS, -1)
        rows.zero_()
        rows[:, :, 2:] = -1.0
    arguments = inputs_of(attention)
    arguments["hidden_states"] = arguments["hidden_states"].detach().abs()
    attention(**arguments)[0].square().sum().backward()
    for matrices in (attention.experts.up_proj, attention.experts.down_proj):
        used = matrices.grad.view(HEADS, EXPERTS, -1).abs().amax(dim=-1) > 0
        assert used.tolist() == [[True, True, False, False]] * HEADS


def router_of(**fields) -> SwitchHeadRouter:
    config = tiny_config(**(FIELDS | fields))
    router = SwitchHeadRouter(config.attention_routing)
    router.init_weights(0.02)
    return router.double()


def test_selection_weights_begin_with_one_norm():
    torch.manual_seed(0)
    router = router_of(hidden_size=512)
    norms = router.weight.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.02 * 512**0.5))


def test_large_logits_are_told_apart():
    router = router_of()
    logits = torch.arange(24, dtype=torch.float64).expand(5, -1) + 60  # all sigmoids are 1
    index = router.route(logits, RoutingContext()).index.view(5, 2 * HEADS, TOP_K)
    best = torch.arange(0, 24, EXPERTS)[:, None] + torch.tensor([3, 2])
    assert torch.equal(index, best.expand(5, -1, -1))


def test_expert_dropout_masks_logits_in_training_alone():
    torch.manual_seed(0)
    router = router_of(attention_expert_dropout=0.5, attention_experts=8)
    tokens = torch.randn(4000, HIDDEN, dtype=torch.float64)
    best = router(tokens).logits.unflatten(-1, (2 * HEADS, 8)).argmax(dim=-1)
    first = torch.arange(2 * HEADS) * 8

    def chosen() -> torch.Tensor:
        routing = router(tokens)
        scores = routing.logits.sigmoid().gather(1, routing.index)
        torch.testing.assert_close(routing.weight, scores)  # dropout selects, and does not scale
        return (routing.index.view(-1, 2 * HEADS, TOP_K) == (best + first)[..., None]).any(dim=-1).double().mean()

    assert abs(chosen() - 0.5) < 0.02
    router.eval()
    assert chosen() == 1


def test_the_regulariser_is_the_entropy_of_the_mean_of_each_head():
    torch.manual_seed(0)
    model = model_of("switch_head", attention_entropy_loss_coef=0.3, router_aux_loss_coef=0, router_z_loss_coef=0)
    model = model.double().train()
    assert model.model.has_router_losses
    ids = torch.randint(3, 99, (2, 9))
    outputs = model(ids, labels=ids, output_router_logits=True)
    plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    losses = []
    for logits in outputs.attention_router_logits:
        for head in range(2 * HEADS):
            mean = logits[:, head * EXPERTS : (head + 1) * EXPERTS].softmax(dim=-1).mean(dim=0)
            losses.append((mean * mean.log()).sum())
    torch.testing.assert_close(outputs.loss, plain + 0.3 * torch.stack(losses).mean(), rtol=1e-6, atol=0)
    assert not model_of("switch_head", router_aux_loss_coef=0, router_z_loss_coef=0).model.has_router_losses


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_the_losses_are_the_means_of_single_heads(scope):
    """A head's logits in a router of its own have the losses of which the router of all heads gives the mean."""
    torch.manual_seed(0)
    coefficients = {
        "router_z_loss_coef": 0.1,
        "router_seq_aux_loss_coef": 0.1,
        "router_entropy_loss_coef": 0.1,
        "router_aux_loss_scope": scope,
    }
    router = router_of(**coefficients)
    view = tiny_config(**(FIELDS | coefficients)).attention_routing
    logits = torch.randn(10, 2 * HEADS * EXPERTS, dtype=torch.float64)
    mask = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 0, 0], dtype=torch.float64)
    context = RoutingContext(2, token_mask=mask)
    weights = weigh_tokens(mask.view(2, 5))
    together = router_losses(router.route(logits, context), context, view, weights)
    alone = tiny_config(
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, scoring_func="sigmoid", norm_topk_prob=False, **coefficients
    )
    router.parts, router.top_k = 1, TOP_K
    each = [router_losses(router.route(part, context), context, alone, weights) for part in logits.split(EXPERTS, 1)]
    for name in ("balance", "z", "sequence_balance", "entropy"):
        expected = torch.stack([getattr(losses, name) for losses in each]).mean()
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-10, atol=1e-12)


def test_the_cache_holds_mixed_values():
    model = model_of("switch_head").eval()
    cache = model(torch.randint(3, 99, (2, 9)), use_cache=True).cache
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, HEADS, 9, 12)
