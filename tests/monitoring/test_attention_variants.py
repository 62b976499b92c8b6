"""The recorder sees, and replay repeats, the choices of every form of routed attention beside those of feed-forward networks."""

import pytest
import torch

import modeling_moe
from modeling_moe.monitoring import active_share, experts_per_token, idle_parameters, sparse_layers
from modeling_moe.monitoring.observing import observe
from modeling_moe.replay import RoutingStore, record_routing, replay_routing
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


def choices_in(model, run) -> dict[str, torch.Tensor]:
    """Returns the experts of each token in each layer while `run` is called, in the order in which attention reads them."""
    found: dict[str, torch.Tensor] = {}
    with observe(model, lambda event: found.update({event.layer.name: event.index.clone()})):
        run()
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_repeats_the_choices_or_is_refused(variant):
    rollout, model, store = model_of(variant).eval(), model_of(variant).train(), RoutingStore()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for kind in rollout.model.slots:
            for block in rollout.model.routed_modules(kind):
                for tensor in block.gate.state_dict().values():
                    tensor.add_(0.5 * torch.randn_like(tensor))
    with record_routing(rollout, store):
        recorded = choices_in(rollout, lambda: rollout(ids))
    live = choices_in(model, lambda: model(ids))
    if variant == "routing_transformer":
        refused = pytest.raises(
            ValueError, match=r"self_attn.experts cannot be replayed, .*: choose another router_type or"
        )
        with refused, replay_routing(model, store):
            model(ids)
        return
    with replay_routing(model, store):
        replayed = choices_in(model, lambda: model(ids, labels=ids).loss.backward())
    parts = 6 if variant == "switch_head" else 1
    assert len(recorded) == 5
    for name, index in recorded.items():
        width = parts if "self_attn" in name else 1
        # a head reads its own places, in which the order says nothing
        wanted, found, alone = (
            x.unflatten(1, (width, -1)).sort(dim=-1).values for x in (index, replayed[name], live[name])
        )
        assert torch.equal(found, wanted)
        assert not torch.equal(alone, wanted)
    assert all(block.gate.weight.grad.any() for block in model.model.routed_modules("attention"))
