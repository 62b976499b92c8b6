"""These tests check the routers that read what the router of the sparse layer before has passed on."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING

from modeling_moe import MoEForCausalLM
from modeling_moe.monitoring import observe
from modeling_moe.replay import record_routing, replay_routing
from modeling_moe.router import RoutingContext
from modeling_moe.router_catalogue import router_class
from tests.builders import tiny_config
from tests.core.test_catalogue import IDS, model_of
from tests.ranks import run_ranks
from tests.selection import by_default


NAMES = pytest.mark.parametrize("name", ["dag", "dag_null", "zaya"])
# layers with and without experts in every order
LAYERS = {"num_hidden_layers": 5, "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse"]}
ZAYA = {"router_type": "zaya", "num_experts_per_tok": 1, "router_hidden_size": 16, "router_selection_bias": True}
# name in transformers -> name here
ZAYA_NAMES = {
    "down_proj.weight": "reduce_weight",
    "down_proj.bias": "reduce_bias",
    "router_states_scale": "carried_scale",
    "router_mlp.norm.weight": "norm_scale",
    "router_mlp.fc1.weight": "first_weight",
    "router_mlp.fc1.bias": "first_bias",
    "router_mlp.fc2.weight": "second_weight",
    "router_mlp.fc2.bias": "second_bias",
    "router_mlp.out_proj.weight": "weight",
    "balancing_biases": "e_score_correction_bias",
}


def seen(model, **batch) -> list:
    """Returns for each sparse layer the router, the router's input and the routing in one pass."""
    passes = []
    hooks = [
        block.gate.register_forward_hook(lambda gate, args, routing: passes.append((gate, args[0], routing)))
        for block in model.model.sparse_blocks()
    ]
    model(IDS, **batch)
    for hook in hooks:
        hook.remove()
    return passes


def gradients_of(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_dag_adds_the_edges_from_the_experts_of_the_layer_before():
    model = model_of("dag", **LAYERS).double().eval()
    before = None
    for gate, states, routing in seen(model):
        logits = torch.einsum("th,eh->te", states, gate.weight)
        if before is not None:
            for token, (ids, probs) in enumerate(zip(before.index, before.probs, strict=True)):
                for expert in ids.tolist():
                    logits[token] += probs[expert] * gate.transition[:, expert]
        torch.testing.assert_close(routing.logits, logits, atol=1e-12, rtol=1e-12)
        assert torch.equal(routing.index.sort().values, logits.topk(3).indices.sort().values)
        before = routing
    # the edges matter
    for block in model.model.sparse_blocks():
        if block.gate.transition is not None:
            block.gate.transition.data.zero_()
    assert not torch.equal(seen(model)[-1][2].index, before.index)


def test_a_new_dag_is_a_top_k_router():
    torch.manual_seed(0)
    plain = MoEForCausalLM(tiny_config()).eval()
    torch.manual_seed(0)
    dag = MoEForCausalLM(tiny_config(router_type="dag")).eval()
    missing = dag.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["model.layers.2.mlp.gate.transition"]
    assert torch.equal(dag(IDS).logits, plain(IDS).logits)


def zaya_routers(layer: int) -> tuple[nn.Module, nn.Module]:
    """Returns the router of this package and that of transformers with equal random weights, in float64."""
    from transformers.models.zaya.modeling_zaya import ZayaRouter as TheirRouter

    config = tiny_config(**ZAYA, num_null_experts=1, rms_norm_eps=1e-5, mlp_layer_types=["sparse"] * 3)
    theirs = TheirRouter(CONFIG_MAPPING["zaya"](hidden_size=32, router_hidden_size=16, num_experts=5), layer)
    ours = router_class(config)(config, layer)
    ours.init_weights(0.1)
    # the null expert begins with the bias -1
    assert torch.equal(ours.e_score_correction_bias, theirs.balancing_biases)
    # transformers' own norm rounds to fp32
    theirs.router_mlp.norm = nn.RMSNorm(16, eps=1e-5)
    for name, tensor in theirs.state_dict().items():
        tensor.normal_(std=0.05 if name == "balancing_biases" else 0.4)
    ours.load_state_dict({ZAYA_NAMES[name]: tensor for name, tensor in theirs.state_dict().items()})
    return ours.double(), theirs.double()


def test_zaya_computes_what_the_router_of_transformers_computes():
    """Three layers in a chain, in float64: logits, experts, weights, what is passed on, and all gradients."""
    carried = theirs_carried = None
    chosen = []
    for layer in range(3):
        ours, theirs = zaya_routers(layer)
        states = torch.randn(2, 17, 32, dtype=torch.float64)
        leaf, their_leaf = (states.clone().requires_grad_() for _ in range(2))
        routing = ours(leaf.flatten(0, 1), RoutingContext(2, carried=carried))
        logits, weights, index, theirs_carried = theirs(their_leaf, theirs_carried)
        carried = routing.carried
        chosen.append(routing.index)
        # transformers sends a skipped token to expert 0, with weight 0
        assert torch.equal(routing.index.masked_fill(routing.index == 5, 0), index)
        mine, other = [routing.logits, routing.weight, carried], [logits, weights, theirs_carried.flatten(0, 1)]
        direction = torch.randn_like(logits)
        parameters = [leaf, *ours.parameters()]
        mine += torch.autograd.grad((mine[0] * direction).sum() + mine[1].sum(), parameters, retain_graph=True)
        theirs_by_name = {ZAYA_NAMES[name]: parameter for name, parameter in theirs.named_parameters()}
        their_parameters = [their_leaf, *(theirs_by_name[name] for name, _ in ours.named_parameters())]
        other += torch.autograd.grad(
            (other[0] * direction).sum() + other[1].sum(), their_parameters, retain_graph=True
        )
        for one, two in zip(mine, other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-11)
    assert set(torch.cat(chosen).flatten().tolist()) == set(range(6))


@NAMES
def test_the_gradient_reaches_the_router_of_the_layer_before(name):
    model = model_of(name, **LAYERS, router_aux_loss_coef=0.0, router_z_loss_coef=0.0).double().train()
    first, second, _ = (routing for _, _, routing in seen(model))
    part = second.logits.square().sum()
    (gradient,) = torch.autograd.grad(part, first.carried, retain_graph=True)
    assert gradient.abs().max() > 1e-6
    # every parameter trains, as DDP demands
    assert all(gradient.abs().max() > 0 for gradient in gradients_of(model).values())


@pytest.mark.parametrize("use_reentrant", [True, False])
@NAMES
def test_checkpointing_changes_no_gradient(name, use_reentrant):
    model = model_of(name, **LAYERS).double().train()
    expected = gradients_of(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for key, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-12, rtol=1e-10, msg=key)


@pytest.mark.parametrize("name", by_default(["zaya"], ["zaya", "dag"]))
def test_the_model_trains_compiled(name):
    model = model_of(name).train()
    expected = gradients_of(model)
    model.zero_grad()
    torch.compiler.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, labels=IDS).loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-5, rtol=1e-4, msg=key)


def test_a_layer_that_a_pipeline_does_not_hold_is_refused():
    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

    model = model_of("dag").eval()
    model.model.layers[0] = PipelineIdentityLayer()
    with pytest.raises(ValueError, match="set pp_size to 1"):
        model(IDS)


def test_a_replayed_choice_is_what_the_next_layer_reads():
    model = model_of("dag", **LAYERS).double().eval()
    other = model_of("dag", **LAYERS).double().eval()
    for block in other.model.sparse_blocks():
        block.gate.weight.data.normal_(std=0.5)
    with record_routing(other) as recorder:
        other(IDS)
    with replay_routing(model, recorder.store):
        passes = seen(model)
    for _, _, routing in passes:
        chosen = torch.zeros_like(routing.probs).scatter(-1, routing.index, 1.0)
        assert torch.equal(routing.carried, routing.probs * chosen)


@NAMES
def test_the_recorder_sees_every_layer(name):
    model, events = model_of(name, **LAYERS).eval(), []
    with observe(model, lambda event: events.append(event.logits.shape)):
        model(IDS)
    assert events == [(IDS.numel(), model.config.num_router_outputs)] * 3


def seeded(name: str) -> MoEForCausalLM:
    torch.manual_seed(0)
    return model_of(name, **LAYERS).double().train()


def rank_main(rank: int, folder: str) -> None:
    for name in ("dag", "zaya"):
        model = seeded(name)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model(IDS, labels=IDS).loss.backward()
        grads = {
            key: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for key, p in model.named_parameters()
        }
        torch.save(grads, f"{folder}/{name}{rank}.pt")


@pytest.mark.slow
def test_two_processes_that_share_the_weights_get_the_gradients_of_one(tmp_path):
    run_ranks(rank_main, 2, str(tmp_path))
    for name in ("dag", "zaya"):
        expected = gradients_of(seeded(name))
        got = torch.load(tmp_path / f"{name}1.pt")
        assert got.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(got[key].double(), gradient, atol=1e-6, rtol=1e-5, msg=key)


def test_a_copy_of_the_model_gives_its_logits():
    model = model_of("zaya", **LAYERS).eval()
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
