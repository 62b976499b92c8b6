"""The recorder sees the choices of every form of routed attention beside those of feed-forward networks."""

import pytest
import torch

import modeling_moe
from modeling_moe.monitoring import active_share, experts_per_token, idle_parameters, sparse_layers
from modeling_moe.monitoring.observing import observe
from tests.core.attention_variants import VARIANTS, model_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_choices_are_seen(variant):
    model = model_of(variant).eval()
    ids = torch.randint(3, 99, (2, 9))
    events = []
    with observe(model, lambda event: events.append(event)), torch.no_grad():
        outputs = model(ids, output_router_logits=True)
    seen = [event for event in events if "self_attn" in event.layer.name]
    assert len(seen) == 3
    view = model.config.attention_routing
    for event, load in zip(seen, outputs.attention_expert_load, strict=True):
        assert event.layer.num_experts == view.num_experts
        assert torch.equal(event.arrived, event.index)
        counts = torch.bincount(event.index.flatten(), minlength=view.num_experts)
        assert torch.equal(counts.to(load), load)
    assert len(events) == 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_watch_counts_them(variant):
    model = model_of(variant).eval()
    with modeling_moe.watch(model) as routing, torch.no_grad():
        model(torch.randint(3, 99, (2, 9)))
    assert routing is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parameters_of_a_token_are_those_that_the_configuration_counts(variant):
    model = model_of(variant)
    config, total = model.config, model.num_parameters()
    for layer in sparse_layers(model):
        assert layer.experts.config.scoring_func == layer.router.scoring_func
        assert experts_per_token(config, layer.experts) == layer.router.top_k
    idle = sum(idle_parameters(layer.experts, layer.router.top_k) for layer in sparse_layers(model))
    assert total - idle == config.num_active_params()
    embeddings = model.model.embed_tokens.weight.numel()
    share = (config.num_active_params() - embeddings) / model.num_parameters(exclude_embeddings=True)
    assert active_share(model) == pytest.approx(share)
