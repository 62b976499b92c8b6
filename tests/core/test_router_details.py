"""Details of routers that a fault of one line would change: constants of the papers, and thresholds of warnings."""

import logging
from types import SimpleNamespace

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import RoutingContext
from modeling_moe.router_balancing import QuantileController, update_routers
from modeling_moe.router_batch import SinkhornRouter, sinkhorn
from tests.builders import eager_block, tiny_config


def test_the_quantile_bias_is_recentred():
    """A common shift of the selection bias changes no choice, but it grows without bound if nothing removes it."""
    router = SimpleNamespace(e_score_correction_bias=torch.tensor([0.3, -0.1, 0.2]), ema_decay=0.5)
    totals = torch.tensor([8.0, 4.0, 2.0, 4.0])  # three quantiles times 4 tokens, and the 4
    QuantileController().step_layer(router, totals)
    moved = (torch.tensor([0.3, -0.1, 0.2]) - torch.tensor([2.0, 1.0, 0.5])) / 2
    torch.testing.assert_close(router.e_score_correction_bias, moved - moved.mean())


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_soft_moe_is_scaled_by_the_routed_scaling_factor(factor):
    states = torch.randn(2, 11, 32).double()
    blocks: list[MoEBlock] = []
    for scaling in (1.0, factor):
        torch.manual_seed(1)
        blocks.append(eager_block(router_type="soft_moe", allow_noncausal=True, routed_scaling_factor=scaling))
    plain, scaled = (block(states, RoutingContext(2))[0] for block in blocks)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(scaled, factor * plain)


def test_sinkhorns_iterations_are_enough_for_its_choice():
    """Scores that favour few experts sharply take tens of iterations: half as many choose other experts."""
    torch.manual_seed(11)
    scores = (5 * torch.randn(32, 4).double() + torch.linspace(6, -6, 4).double()).softmax(-1)
    converged, enough, few = (
        sinkhorn(scores, iterations).topk(2).indices.sort().values
        for iterations in (5000, SinkhornRouter.iterations, SinkhornRouter.iterations // 2)
    )
    assert torch.equal(enough, converged)
    assert not torch.equal(few, converged)


@pytest.mark.parametrize(("dropped", "warned"), [(9, False), (10, False), (11, True), (50, True)])
def test_drops_are_warned_of_above_a_tenth(dropped, warned, caplog):
    model = MoEForCausalLM(tiny_config(capacity_factor=4.0, router_aux_loss_coef=0.0))
    model.train()(torch.arange(3, 15)[None])
    model.model.router_totals.kinds["mlp"].dropped = torch.tensor([float(dropped), 100.0])
    with caplog.at_level(logging.WARNING):
        update_routers(model)
    assert (f"{dropped}% of the experts' assignments were dropped" in caplog.text) == warned
