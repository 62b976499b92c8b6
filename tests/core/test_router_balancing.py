"""These tests check that controllers step once per optimizer step, over all micro-batches, whatever is recomputed."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_moe import MoEForCausalLM
from modeling_moe.router_balancing import FORGOTTEN, update_routers
from tests.builders import tiny_config


FIELDS = {
    "scoring_func": "sigmoid",
    "router_selection_bias": True,
    "router_bias_update_rate": 0.001,
    "router_aux_loss_coef": 0.0,
    "router_z_loss_coef": 0.0,
}
IDS = torch.arange(3, 23).view(2, 10)


def blocks(model):
    return [layer.mlp for layer in model.model.layers if layer.is_sparse]


def test_step_by_hand():
    model = MoEForCausalLM(tiny_config(**FIELDS))
    statistics = model.model.router_totals.kinds["mlp"].statistics
    statistics[0] = torch.tensor([4.0, 0.0, 2.0, 2.0, 2.0])
    model.update_routers()
    expected = torch.tensor([-0.001, 0.001, 0.0, 0.0, 0.0])
    torch.testing.assert_close(blocks(model)[0].gate.e_score_correction_bias, expected)
    assert not statistics.any()
    assert not blocks(model)[1].gate.e_score_correction_bias.any()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "non-reentrant", "reentrant"])
def test_load_is_counted_once_and_over_micro_batches(checkpointing):
    model = MoEForCausalLM(tiny_config(**FIELDS)).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for _ in range(2):
        model(IDS, attention_mask=mask, labels=IDS).loss.backward()
    assert model.model.router_totals.kinds["mlp"].statistics.sum(dim=-1).tolist() == [2 * 3 * mask.sum()] * 2


def test_evaluation_counts_nothing():
    model = MoEForCausalLM(tiny_config(**FIELDS)).eval()
    model(IDS, labels=IDS, output_router_logits=True)
    assert not model.model.router_totals.kinds["mlp"].statistics.any()


def test_it_balances():
    """The bias alone balances the load of a batch that is repeated."""
    model = MoEForCausalLM(tiny_config(**(FIELDS | {"router_bias_update_rate": 0.02}))).train()
    ids = torch.randint(3, 99, (8, 16))

    def violation():
        load = model(ids, output_router_logits=True).expert_load
        return (load.max(-1).values / load.mean(-1)).mean().item() - 1

    before = violation()
    for _ in range(60):
        violation()
        model.update_routers()
    assert violation() < 0.3 * before


def test_models_without_bias_are_left_alone():
    model = MoEForCausalLM(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    update_routers(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_bias_is_saved_in_fp32_and_its_counter_is_not(tmp_path):
    model = MoEForCausalLM(tiny_config(**FIELDS))
    blocks(model)[0].gate.e_score_correction_bias.fill_(0.123456789)
    model.model.router_totals.kinds["mlp"].statistics.fill_(3)
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(
        blocks(loaded)[0].gate.e_score_correction_bias, torch.full((5,), 0.123456789, dtype=torch.float32)
    )
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert not loaded.model.router_totals.kinds["mlp"].statistics.any()


def train(model, steps: int = 2, accumulate: int = 1, update: bool = False, optimizer=torch.optim.AdamW):
    """Trains in a plain loop, with or without `update_routers`."""
    optimizer = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    for _ in range(steps):
        for _ in range(accumulate):
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
            with torch.no_grad():
                model.eval()(input_ids=IDS)
        optimizer.step()
        optimizer.zero_grad()
        if update:
            update_routers(model)


def only_attention(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1.self_attn" in name
    return model


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))


GLOBAL = {"router_aux_loss_scope": "global", "router_aux_loss_coef": 0.01}


@pytest.mark.parametrize("fields", [FIELDS, GLOBAL], ids=["bias", "global balance"])
@pytest.mark.parametrize("prepare", [lambda model: model, only_attention, with_lora], ids=["all", "frozen", "lora"])
def test_a_selection_bias_that_never_moves_is_said_once(fields, prepare, caplog):
    train(prepare(MoEForCausalLM(tiny_config(**fields))), steps=4)
    assert caplog.text.count(FORGOTTEN) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_any_optimizer_of_torch_is_noticed(optimizer, caplog):
    train(MoEForCausalLM(tiny_config(**FIELDS)), optimizer=optimizer)
    assert FORGOTTEN in caplog.text


@pytest.mark.parametrize("prepare", [lambda model: model, only_attention, with_lora], ids=["all", "frozen", "lora"])
def test_a_fused_optimizer_is_noticed(prepare, caplog):
    """`Trainer` takes fused AdamW by default, which writes to the parameters without a trace in their version counters."""
    model = prepare(MoEForCausalLM(tiny_config(**FIELDS)))
    fused = partial(torch.optim.AdamW, fused=True)
    train(model, steps=1, accumulate=3, optimizer=fused)
    assert FORGOTTEN not in caplog.text
    train(model, steps=2, optimizer=fused)
    assert caplog.text.count(FORGOTTEN) == 1


def test_no_false_alarm(caplog):
    train(MoEForCausalLM(tiny_config(**FIELDS)), steps=1, accumulate=3)
    train(MoEForCausalLM(tiny_config(**FIELDS)), steps=3, accumulate=2, update=True)
    train(MoEForCausalLM(tiny_config()), steps=3)
    assert FORGOTTEN not in caplog.text


def write_weights_back(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})


def freeze_embeddings(model):
    model.model.embed_tokens.requires_grad_(False)


def freeze_all(model):
    model.requires_grad_(False)


def write_text(model):
    model.eval().generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize(
    "between", [write_weights_back, freeze_embeddings, freeze_all, write_text, torch.nn.Module.double]
)
def test_passes_without_a_step_give_no_alarm_whatever_comes_between(between, caplog, tmp_path):
    model = MoEForCausalLM(tiny_config(**FIELDS)).train()
    model(IDS, labels=IDS).loss.backward()
    between(model)
    model.zero_grad()
    model.train()(IDS, labels=IDS)
    model.save_pretrained(tmp_path)
    assert model.model.router_totals.kinds["mlp"].statistics.any()
    assert FORGOTTEN not in caplog.text


@pytest.mark.parametrize("mode", [FakeTensorMode, partial(torch.device, "meta")], ids=["fake", "meta"])
def test_a_model_without_numbers_gives_no_alarm(mode, caplog):
    with mode():
        model, ids = MoEForCausalLM(tiny_config(**FIELDS)).train(), torch.zeros(1, 4, dtype=torch.long)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    assert FORGOTTEN not in caplog.text


def test_layers_that_thaw_between_steps_hide_no_step(caplog):
    model = only_attention(MoEForCausalLM(tiny_config(**FIELDS)))
    train(model, steps=1)
    model.requires_grad_(True)
    assert FORGOTTEN not in caplog.text
    model.train()(IDS, labels=IDS)
    assert caplog.text.count(FORGOTTEN) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_saved_after_its_only_step_warns_once(compiled, caplog, tmp_path):
    model = MoEForCausalLM(tiny_config(**FIELDS)).train()
    model.save_pretrained(tmp_path)
    assert FORGOTTEN not in caplog.text
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = torch.compile(model, backend="eager") if compiled else model
    run(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert caplog.text.count(FORGOTTEN) == 1


def test_dropped_assignments_are_said_once_for_each_model_whatever_the_share(caplog):
    for model in (MoEForCausalLM(tiny_config(capacity_factor=1.0)) for _ in range(2)):
        for dropped in (20.0, 30.0, 40.0):
            model.model.router_totals.kinds["mlp"].dropped.copy_(torch.tensor([dropped, 100.0]))
            update_routers(model)
    said = [record.getMessage() for record in caplog.records if "assignments were dropped" in record.getMessage()]
    assert [message.partition(" of")[0] for message in said] == ["20%", "20%"]
