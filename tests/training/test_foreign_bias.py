"""These tests move the selection biases of transformers' own MoE models; oracles are hand counts and this package's model."""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer

from modeling_moe import MoEForCausalLM
from modeling_moe.conversion import to_moe
from modeling_moe.monitoring import observe
from modeling_moe.training import balance
from modeling_moe.training.nan_stop import NanStopMixin
from modeling_moe.utils.errors import UserError
from tests.builders import training_arguments
from tests.training.families import tiny
from tests.training.test_foreign_balance import CHECKPOINTING, pad, padded_batch, rows, skip_unread


RATE = 0.125
# the bias lies in the router, in the block, in a module inside the router, and is a buffer or a parameter
HAND_COUNTED = ("deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe", "lfm2_moe", "laguna", "kolibri1", "hy_v3")
HAND_COUNTED = tuple(family for family in HAND_COUNTED if family in CONFIG_MAPPING)  # older releases lack some


def random_model(family: str, **fields):
    """Returns a tiny fp32 model in training mode whose router logits are not small."""
    model = tiny(family, **fields).train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def biases(model) -> dict[str, torch.Tensor]:
    """Returns the selection biases of a model by name."""
    names = ("correction_bias", "expert_bias")
    return {name: x.clone() for name, x in model.state_dict().items() if name.endswith(names)}


def counted_load(model, batch: dict) -> list[torch.Tensor]:
    """Returns the tokens (E,) sent to each expert of each layer, counted one by one, padding left out."""
    loads = []

    def count(event) -> None:
        load = torch.zeros(event.layer.num_experts)
        for token, chosen in enumerate(event.index.tolist()):
            for expert in chosen:
                load[expert] += int(batch["attention_mask"].flatten()[token])
        loads.append(load)

    with observe(model, count), torch.no_grad():
        model(**batch)
    return loads


@pytest.mark.parametrize("steps", [0, 1])
def test_biases_that_nobody_stepped_stayed_without_a_word(steps, caplog):
    model = random_model("deepseek_v3")
    with balance(model, router_bias_update_rate=RATE) as handle:
        for _ in range(steps):
            model(**padded_batch())
            handle.step()
        model(**padded_batch())
    assert ("Balance.step was not called" in caplog.text) == (steps == 0)


@pytest.mark.parametrize("family", HAND_COUNTED)
def test_bias_moves_by_a_hand_count(family):
    model, batch = random_model(family), padded_batch()
    before = biases(model)
    loads = counted_load(model, batch)
    assert len(before) == len(loads)
    with balance(model, router_aux_loss_coef=0.0, router_bias_update_rate=RATE) as handle:
        assert biases(model).keys() == before.keys()
        assert all(torch.equal(x, before[name]) for name, x in biases(model).items())  # probing changes nothing
        model(**batch)
        handle.step()
    for (name, bias), load in zip(biases(model).items(), loads, strict=True):
        expected = before[name].flatten() + RATE * torch.sign(load.mean() - load)
        assert torch.equal(bias.flatten(), expected)
        assert bias.any()
    after = biases(model)
    model(**batch)
    assert all(torch.equal(x, after[name]) for name, x in biases(model).items())  # detached


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text", "mixtral"])
def test_a_vector_that_does_not_choose_experts_is_no_bias(family):
    """gpt-oss adds a bias to its logits; Gemma 4 scales each expert's weights."""
    model = random_model(family).requires_grad_(False)
    before = deepcopy(model.state_dict())
    with pytest.raises(UserError, match="omit router_bias_update_rate"):
        balance(model, router_bias_update_rate=RATE)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def trained(model, folder, trainer=Trainer, steps: int = 10, **fields):
    """Returns the Trainer after some steps of two micro-batches."""
    args = training_arguments(
        folder,
        max_steps=steps,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **fields,
    )
    run = trainer(model=model, args=args, train_dataset=Dataset.from_list(rows()), data_collator=pad)
    run.train()
    return run


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_ten_steps_give_the_bias_of_our_model(kind, tmp_path):
    theirs = random_model("deepseek_v3")
    skip_unread(theirs)
    config = to_moe(deepcopy(theirs)).config
    losses = {"router_aux_loss_coef": 0.1, "router_seq_aux_loss_coef": 0.05, "router_aux_loss_scope": "sequence"}
    for name, value in losses.items():
        setattr(config, name, value)
    config.router_z_loss_coef, config.router_bias_update_rate, config.router_controller = 0.0, RATE, "bias"
    ours = MoEForCausalLM(config)
    ours.load_state_dict(to_moe(deepcopy(theirs)).state_dict(), strict=False)
    trained(ours, tmp_path / "ours")
    fields = {} if kind == "none" else {"gradient_checkpointing": True}
    if fields:
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": CHECKPOINTING[kind]}
    with balance(theirs, **losses, router_bias_update_rate=RATE):
        trained(theirs, tmp_path / "theirs", **fields)
    got, expected = biases(theirs), biases(ours)
    assert len(got) == len(expected) == 1
    for bias, oracle in zip(got.values(), expected.values(), strict=True):
        assert torch.equal(bias, oracle)
        assert len(bias.unique()) > 2
    for name, parameter in to_moe(theirs).named_parameters():
        torch.testing.assert_close(parameter, ours.get_parameter(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["minimax_m2", "ernie4_5_moe"])
def test_bias_is_saved_and_resumed_exactly(family, tmp_path):
    whole = random_model(family)
    with balance(whole, router_bias_update_rate=RATE):
        trained(whole, tmp_path / "whole", steps=4)
    part = random_model(family)
    with balance(part, router_bias_update_rate=RATE):
        trained(part, tmp_path / "part", steps=4, save_strategy="steps", save_steps=2)
    resumed = random_model(family)
    with balance(resumed, router_bias_update_rate=RATE):
        args = {"steps": 4, "save_strategy": "no"}
        checkpoint = str(tmp_path / "part" / "checkpoint-2")

        class Resuming(Trainer):
            def train(self):
                return super().train(resume_from_checkpoint=checkpoint)

        trained(resumed, tmp_path / "resumed", Resuming, **args)
    saved = tmp_path / "saved"
    whole.save_pretrained(saved)
    for other in (part, resumed, AutoModelForCausalLM.from_pretrained(saved)):
        assert all(torch.equal(x, biases(whole)[name]) for name, x in biases(other).items())
    assert any(x.any() for x in biases(whole).values())


def test_a_bf16_bias_becomes_fp32_and_moves(caplog):
    model = random_model("minimax_m2").bfloat16()
    bias = model.model.layers[0].mlp.e_score_correction_bias
    assert bias.dtype == torch.bfloat16
    with torch.no_grad():
        bias.fill_(0.5)
    with balance(model, router_bias_update_rate=0.001) as handle:
        assert "2 selection biases are now float32 instead of torch.bfloat16" in caplog.text
        for _ in range(3):
            model(**padded_batch()).loss.backward()
            handle.step()
    moved = model.model.layers[0].mlp.e_score_correction_bias
    assert moved.dtype == torch.float32
    steps = (moved - 0.5) / 0.001
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.round().abs().max() in (1, 2, 3)


def test_a_router_in_fp32_beside_experts_in_bf16_is_verified(tmp_path):
    """transformers loads ERNIE's gates in fp32 always."""
    random_model("ernie4_5_moe").bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16").train()
    dtypes = {weight.dtype for weight in model.model.layers[1].mlp.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}
    with balance(model, router_aux_loss_coef=0.1, router_bias_update_rate=RATE) as handle:
        assert len(handle._scorings.known) == len(handle._observation.layers)  # no pass has to wait for the device
        model(**padded_batch()).loss.backward()
        handle.step()
    assert all(bias.any() for bias in biases(model).values())


def test_the_loss_of_transformers_is_off_where_only_the_bias_moves():
    model = random_model("ernie4_5_moe", output_router_logits=True, router_aux_loss_coef=3.0)
    plain = model(**padded_batch(), output_router_logits=False).loss
    with balance(model, router_aux_loss_coef=0.0, router_bias_update_rate=RATE):
        torch.testing.assert_close(model(**padded_batch()).loss, plain)
    assert model(**padded_batch()).loss > plain + 1


def test_an_abandoned_step_moves_nothing(tmp_path):
    model = random_model("deepseek_v3")
    with balance(model, router_bias_update_rate=RATE) as handle:
        model(**padded_batch())
        handle.forget()
        handle.step()
        assert not any(x.any() for x in biases(model).values())
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
        with pytest.raises(UserError, match="not finite"):
            trained(model, tmp_path, type("Stopping", (NanStopMixin, Trainer), {}))
        assert not any(x.any() for x in biases(model).values())


def test_a_reference_pass_does_not_count():
    model, batch = random_model("deepseek_v3"), padded_batch()
    expected = random_model("deepseek_v3")
    with balance(model, router_bias_update_rate=RATE) as one, balance(expected, router_bias_update_rate=RATE) as two:
        with torch.no_grad():
            model(**padded_batch(5))
        model(**batch)
        expected(**batch)
        one.step()
        two.step()
    assert all(torch.equal(x, biases(expected)[name]) for name, x in biases(model).items())


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_bias_moves_in_the_copy_that_peft_trains_and_saves(family, tmp_path):
    expected = random_model(family)
    with balance(expected, router_bias_update_rate=RATE) as handle:
        expected(**padded_batch())
        handle.step()
    adapted = get_peft_model(random_model(family), LoraConfig(target_modules=["o_proj"], modules_to_save=["mlp.gate"]))
    with balance(adapted, router_bias_update_rate=RATE) as handle:
        assert all(bias.is_in_adapter(adapted) for bias in handle.biases)
        adapted(**padded_batch())
        handle.step()
    adapted.save_pretrained(tmp_path)
    again = type(adapted).from_pretrained(random_model(family), tmp_path)
    merged = again.merge_and_unload()
    assert all(torch.equal(x, biases(expected)[name]) for name, x in biases(merged).items())


def test_an_adapter_without_the_bias_says_so(caplog):
    adapted = get_peft_model(random_model("minimax_m2"), LoraConfig(target_modules=["o_proj"]))
    with balance(adapted, router_bias_update_rate=RATE):
        assert "the adapter does not hold the selection biases" in caplog.text
