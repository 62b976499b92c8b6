"""These tests show that each warning of a RoutingCallback comes once when it should, and not in a healthy run."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Trainer, TrainerCallback, default_data_collator

from modeling_moe.monitoring import RoutingCallback, sparse_layers
from modeling_moe.monitoring.warnings import Reading, RoutingWarnings, selection_biases
from modeling_moe.router_balancing import update_routers
from modeling_moe.training import MoECallback
from tests.builders import SIZE, tiny_model, training_arguments


EXPERTS = 8
DEAD = "got no token"
COLLAPSE = "collapses"
DROPPED = "are dropped"
NO_GRADIENT = "gets no gradient"
IDLE_BIAS = "never moves"


def layer(number: int = 0, load=None, entropy: float | None = 1.0, dropped: float = 0.0) -> SimpleNamespace:
    """Returns figures of a layer; `entropy` is a share of log E."""
    load = torch.full((EXPERTS,), 100.0, dtype=torch.float64) if load is None else torch.tensor(load).double()
    return SimpleNamespace(
        layer=number,
        name=f"layers.{number}.mlp.experts",
        num_experts=EXPERTS,
        load=load,
        tokens=int(load.sum()) // 2,
        marginal_entropy=None if entropy is None else entropy * math.log(EXPERTS),
        dropped_share=dropped,
    )


def said(readings: list[Reading], model=None) -> list[list[str]]:
    """Returns the warnings after each reading."""
    model = tiny_model() if model is None else model
    warnings = RoutingWarnings.of(model, sparse_layers(model))
    return [warnings.judge(reading) for reading in readings]


def of(*layers, gradients=None, whole: float = 1.0) -> Reading:
    return Reading(layers, gradients or {}, whole)


def test_collapse_is_said_once():
    entropies = [0.99, 0.9, 0.8, 0.7, 0.6, 0.5]
    found = said([of(layer(entropy=entropy), layer(1)) for entropy in entropies])
    assert [len(messages) for messages in found] == [0, 0, 0, 1, 0, 0]
    assert "layer 0:" in found[3][0]
    assert "70%" in found[3][0]
    assert "router_aux_loss_coef" in found[3][0]


@pytest.mark.parametrize(
    "entropies",
    [
        [0.99, 0.97, 0.93, 0.9, 0.95],  # the experts become different
        [0.62, 0.6, 0.64, 0.61, 0.6],  # low from the start, and not falling
        [0.5, 0.6, 0.7, 0.8],  # recovers
        [None, None],
        [math.nan, math.nan],
    ],
)
def test_no_collapse(entropies):
    assert not any(said([of(layer(entropy=entropy)) for entropy in entropies]))


def test_dead_experts_are_named_once():
    load = [0, 200, 200, 0, 100, 100, 100, 100]
    found = said([of(layer(2), layer(5, load))] * 5)
    assert [len(messages) for messages in found] == [0, 0, 1, 0, 0]
    assert "2 of 16 experts" in found[2][0]
    assert "layer 5: experts 0, 3)" in found[2][0]


def test_experts_that_get_tokens_now_and_then_are_not_dead():
    empty = [0, 200, 100, 100, 100, 100, 100, 100]
    assert not any(said([of(layer(load=empty)), of(layer(load=empty)), of(layer())] * 3))
    other = [100, 0, 100, 100, 100, 100, 100, 200]
    assert not any(said([of(layer(load=empty)), of(layer(load=other))] * 3))


def test_a_few_tokens_show_no_dead_experts():
    assert not any(said([of(layer(load=[0, 9, 3, 4, 0, 2, 1, 5]))] * 5))


def test_drops_are_said_once():
    found = said([of(layer(dropped=share), layer(1)) for share in (0.0, 0.1, 0.3, 0.4)])
    assert [len(messages) for messages in found] == [0, 0, 1, 0]
    assert found[2][0].startswith("30% of the assignments are dropped in layer 0")
    assert "capacity_factor" in found[2][0]


def test_a_router_without_gradient_is_said_once():
    idle = of(layer(0), layer(1), gradients={layer(0).name: 0.0, layer(1).name: 0.5})
    found = said([idle] * 4)
    assert [len(messages) for messages in found] == [0, 0, 1, 0]
    assert "The router of layer 0 gets no gradient" in found[2][0]


def test_no_gradient_at_all_or_once_is_no_defect_of_the_router():
    name = layer(0).name
    assert not any(said([of(layer(0), gradients={name: 0.0}, whole=0.0)] * 4))
    assert not any(said([of(layer(0), gradients={name: norm}) for norm in (0.0, 0.0, 0.1, 0.0, 0.0, 0.2)]))
    # the loss scaler of fp16 skips steps
    assert not any(said([of(layer(0), gradients={name: 0.0}, whole=math.inf)] * 4))


def test_a_bias_that_skipped_steps_leave_alone_is_in_order():
    model = tiny_model(router_selection_bias=True, router_bias_update_rate=0.1)
    skipped = [of(layer(0), whole=math.inf)] * 5
    assert [len(messages) for messages in said([*skipped, *[of(layer(0))] * 4], model)] == [0] * 7 + [1, 0]


def test_what_a_frozen_router_does_has_no_remedy():
    model = tiny_model()
    for block in model.model.sparse_blocks():
        block.gate.requires_grad_(False)
    names = [found.name for found in sparse_layers(model)]
    load = [0, 200, 200, 0, 100, 100, 100, 100]
    readings = []
    for entropy in (0.9, 0.7, 0.5, 0.4):
        bad = layer(0, load, entropy)
        bad.name = names[0]
        readings.append(of(bad))
    assert not any(said(readings, model))
    # with a trained router
    assert sum(map(len, said(readings))) == 2


def deepseek(**fields) -> DeepseekV3ForCausalLM:
    """Returns a tiny model with a selection bias; skips the test where transformers does not declare its router."""
    torch.manual_seed(0)
    size = SIZE | {"num_key_value_heads": 4}
    experts = {
        "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 16, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    }  # fmt: skip
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**(size | experts | fields)))
    if sparse_layers(model)[0].router is None:
        pytest.skip("this release of transformers does not declare the router of DeepSeek-V3")
    return model


def warned(model, tmp_path, caplog, *callbacks: TrainerCallback, rows: int = 64, **fields) -> list[str]:
    """Trains a model, and returns what its RoutingCallback has warned of."""
    ids = torch.randint(3, 99, (rows, 24), generator=torch.Generator().manual_seed(0)).tolist()
    settings = {"max_steps": 6, "logging_steps": 1, "learning_rate": 0.05, "per_device_train_batch_size": 8} | fields
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, **settings),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        data_collator=default_data_collator,
        callbacks=[*callbacks, RoutingCallback()],
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    return [record.message for record in caplog.records if "monitoring.callback" in record.name]


HEALTHY = {
    "softmax": {},
    "top_1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "capacity": {"capacity_factor": 4.0},
    "bias": {"router_selection_bias": True, "router_bias_update_rate": 0.001, "scoring_func": "sigmoid"},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_gets_no_warning(name, tmp_path, caplog):
    assert warned(tiny_model(**HEALTHY[name]), tmp_path, caplog, MoECallback()) == []


def test_a_constant_weight_leaves_the_router_without_gradient(tmp_path, caplog):
    model = deepseek(num_experts_per_tok=1, norm_topk_prob=True)
    (message,) = warned(model, tmp_path, caplog, MovesBias())
    assert "The router of layer 1 gets no gradient" in message


def test_a_frozen_router_is_no_reason_to_warn(tmp_path, caplog):
    model = tiny_model(router_selection_bias=True)
    for block in model.model.sparse_blocks():
        block.gate.requires_grad_(False)
    assert warned(model, tmp_path, caplog, MoECallback()) == []


def test_full_experts_are_said(tmp_path, caplog):
    (message,) = warned(tiny_model(capacity_factor=0.5), tmp_path, caplog)
    assert DROPPED in message


def test_full_experts_are_said_once(tmp_path, caplog):
    model = tiny_model(capacity_factor=0.5)
    warned(model, tmp_path, caplog, MoECallback())
    assert sum("dropped" in record.message for record in caplog.records) == 1
    caplog.clear()
    other = tiny_model(capacity_factor=0.5)
    # the first log comes after the third step
    warned(other, tmp_path, caplog, logging_steps=3)
    update_routers(other)
    assert sum("dropped" in record.message for record in caplog.records) == 1


def test_equal_experts_in_a_warm_up_are_in_order(tmp_path, caplog):
    coefficients = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    model = tiny_model(num_experts=8, num_experts_per_tok=2, **coefficients)
    for block in model.model.sparse_blocks():
        for weight in block.experts.parameters():
            weight.data[:] = weight.data[:1].clone()
    fields = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1000, "optim": "adamw_torch"}
    assert warned(model, tmp_path, caplog, MoECallback(), learning_rate=1e-3, **fields) == []


class MovesBias(TrainerCallback):
    """Moves the selection bias of a model of transformers, as its update would."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        """Moves the bias of the sparse layer."""
        model.model.layers[1].mlp.gate.e_score_correction_bias[0] += 0.001


def test_a_bias_that_nothing_moves_is_said(tmp_path, caplog):
    model = deepseek()
    assert set(selection_biases(model, sparse_layers(model))) == {"model.layers.1.mlp.experts"}
    (message,) = warned(model, tmp_path, caplog)
    assert "The selection bias of layer 1 never moves" in message


def test_a_bias_that_moves_is_in_order(tmp_path, caplog):
    assert warned(deepseek(), tmp_path, caplog, MovesBias()) == []


def test_selection_biases_of_this_package_and_of_a_trained_bias():
    model = tiny_model(router_selection_bias=True, router_bias_update_rate=0.1)
    biases = selection_biases(model, sparse_layers(model))
    assert set(biases) == {f"model.layers.{number}.mlp.experts" for number in (0, 2)}
    model.train()(torch.randint(3, 99, (2, 9)))
    update_routers(model)
    assert all(bias.any() for bias in biases.values())
    # the bias of a linear router is trained
    assert selection_biases(tiny_model(), sparse_layers(tiny_model())) == {}


def attending(number: int = 0, **figures) -> SimpleNamespace:
    """Returns figures of the experts of attention in a layer."""
    found = layer(number, **figures)
    found.name = f"layers.{number}.self_attn.experts"
    return found


def test_experts_of_attention_are_told_from_those_of_the_network():
    name = "layers.0.self_attn.experts"
    load = [0, 200, 200, 0, 100, 100, 100, 100]
    found = said([of(attending(load=load, dropped=0.3), layer(0, dropped=0.2), layer(1, dropped=0.5))] * 3)
    (dropped,) = found[0]
    assert "dropped in layers 0 self_attn, 0 mlp, 1:" in dropped
    (dead,) = found[2]
    assert "in layer 0 self_attn (in layer 0 self_attn: experts 0, 3)" in dead
    idle = of(attending(), layer(0), gradients={name: 0.5, layer(0).name: 0.0})
    assert "The router of layer 0 mlp gets no gradient" in said([idle] * 3)[2][0]
    fallen = [of(attending(entropy=entropy), layer(0)) for entropy in (0.99, 0.7)]
    assert "collapses in layer 0 self_attn:" in said(fallen)[1][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"routed_attention": "moa", "attention_experts": 5, "attention_bias": True},
        {"num_shared_experts": 1, "mlp_bias": True},
    ],
)
def test_the_frozen_biases_under_an_adapter_choose_no_experts(fields):
    model = tiny_model(router_selection_bias=True, **fields)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".gate.weight" in name)
    layers = sparse_layers(model)
    biases = selection_biases(model, layers)
    assert biases.keys() == {layer.name for layer in layers}
    for found in layers:
        assert biases[found.name] is found.router.e_score_correction_bias


class RichGetRicher(TrainerCallback):
    """Makes the routers ever surer of two experts, as a vicious circle without a balance loss would."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        """Adds the mean token to the rows of two experts."""
        for block in model.model.sparse_blocks():
            block.gate.weight.data[2:] *= 0.5
            block.gate.weight.data[:2] += 0.3 * block.mean_token / block.mean_token.norm()


def test_a_collapsing_run_is_said(tmp_path, caplog):
    model = tiny_model(num_experts=8, num_experts_per_tok=2, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)

    def keep(block, args):
        block.mean_token = args[0].detach().flatten(0, 1).mean(dim=0)

    for block in model.model.sparse_blocks():
        block.register_forward_pre_hook(keep)
    found = warned(model, tmp_path, caplog, RichGetRicher(), max_steps=20)
    assert sum(COLLAPSE in message for message in found) == 1
