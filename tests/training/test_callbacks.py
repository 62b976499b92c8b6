"""These tests run MoECallback in a Trainer."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, default_data_collator

import modeling_moe.training
from modeling_moe.router_balancing import FORGOTTEN, RouterTotals, forget_counts, update_routers
from modeling_moe.training import MoECallback
from tests.builders import tiny_model, training_arguments


RATE = 0.125
CHECKPOINTING = {
    "none": {},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


def statistics(model) -> torch.Tensor:
    """Returns what the sparse layers have counted since the last step, (sparse layers, E)."""
    return next(m for m in model.modules() if isinstance(m, RouterTotals)).kinds["mlp"].statistics


class LoadRecorder(TrainerCallback):
    """Keeps the counts of the sparse layers before the optimizer step, and the scales of the attached losses."""

    def __init__(self):
        self.scales = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Copies the counts (sparse layers, E) and the scale."""
        self.load = statistics(model).clone()
        self.scales += [m.router_loss_scale for m in model.modules() if "router_loss_scale" in vars(m)]


def biased_model(**fields):
    return tiny_model(router_selection_bias=True, router_bias_update_rate=RATE, router_aux_loss_coef=0.0, **fields)


def biases(model) -> torch.Tensor:
    """Returns the selection biases (sparse layers, E)."""
    names = [name for name in model.state_dict() if name.endswith("e_score_correction_bias")]
    return torch.stack([model.state_dict()[name] for name in names if "original_module" not in name])


def train(model, ids: torch.Tensor, tmp_path, callbacks=(), **fields) -> LoadRecorder:
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    recorder = LoadRecorder()
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path, **fields),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[*callbacks, recorder],
    )
    trainer.train()
    return recorder


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_bias_moves_once_per_step_by_all_micro_batches(checkpointing, tmp_path):
    model, ids = biased_model(), torch.randint(3, 300, (8, 11))
    load = model.eval()(ids, output_router_logits=True).expert_load
    assert load.sum() == 2 * 8 * 11 * 3
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4} | CHECKPOINTING[checkpointing]
    recorder = train(model, ids, tmp_path, **fields)
    torch.testing.assert_close(recorder.load, load)
    torch.testing.assert_close(biases(model), RATE * torch.sign(load.mean(dim=-1, keepdim=True) - load))
    assert not statistics(model).any()


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_without_the_callback_the_bias_stays_and_the_model_says_so(optim, tmp_path, caplog):
    modeling_moe.training.disable()
    model = biased_model()
    train(model, torch.randint(3, 300, (8, 11)), tmp_path, max_steps=3, learning_rate=0.1, optim=optim)
    assert not biases(model).any()
    assert FORGOTTEN in caplog.text


def test_bias_moves_at_every_step(tmp_path):
    model, ids = biased_model(), torch.randint(3, 300, (8, 11))
    train(model, ids, tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    steps = biases(model) / RATE
    # three moves of +-1: the load of 44 tokens times 3 slots never equals its mean, 26.4
    assert set(steps.abs().flatten().tolist()) <= {1.0, 3.0}


def test_bias_moves_in_a_peft_model(tmp_path):
    model, ids = biased_model(), torch.randint(3, 300, (8, 11))
    load = model.eval()(ids, output_router_logits=True).expert_load
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp.gate"]))
    train(peft_model, ids, tmp_path)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(biases(merged), RATE * torch.sign(load.mean(dim=-1, keepdim=True) - load))


@pytest.mark.parametrize("peft", [False, True])
def test_attached_losses_are_scaled_while_training_only(peft, tmp_path):
    model, ids = biased_model(), torch.randint(3, 300, (8, 11))
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if peft else model
    recorder = train(trained, ids, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert recorder.scales == [0.25]
    assert model.model.router_loss_scale == 1.0


def test_the_last_step_of_an_epoch_has_what_is_left(tmp_path):
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3}
    recorder = train(biased_model(), torch.randint(3, 300, (12, 11)), tmp_path, **fields)
    assert recorder.scales == [0.25, 0.5, 0.25]


def test_passing_the_callback_too_steps_once(tmp_path):
    """This controller moves the biases by a target minus the load, so a second step without load would move them too."""
    ids, after = torch.randint(3, 300, (8, 11)), []
    for callbacks in ((), (MoECallback(),)):
        model = biased_model(router_controller="proportional", num_null_experts=3, expected_experts_per_tok=2)
        train(model, ids, tmp_path, callbacks)
        after.append(biases(model))
    assert after[0].any()
    assert torch.equal(*after)


def test_a_step_that_the_scaler_of_fp16_skips_moves_no_bias(tmp_path):
    model, callback = biased_model().train(), MoECallback()
    given = {"model": model, "optimizer": SimpleNamespace(step_was_skipped=True)}
    for skipped in (True, False):
        given["optimizer"].step_was_skipped = skipped
        model(torch.randint(3, 300, (4, 11)))
        callback.on_optimizer_step(training_arguments(tmp_path), None, None, **given)
        assert biases(model).any() != skipped


def test_attached_losses_survive_the_scale_of_fp16(tmp_path):
    ids = torch.randint(3, 300, (4, 11))
    gradients = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = tiny_model(router_z_loss_coef=1.0).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        MoECallback().on_step_begin(
            training_arguments(tmp_path),
            SimpleNamespace(global_step=0),
            None,
            model=model,
            optimizer=SimpleNamespace(scaler=scaler),
            train_dataloader=[None],
        )
        loss = model(ids).logits.logsumexp(-1).mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        gradients.append(model.model.sparse_blocks()[0].gate.weight.grad)
    torch.testing.assert_close(*gradients)


def test_an_accelerate_loop_needs_one_call():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, ids = biased_model(), torch.randint(3, 300, (8, 11))
    load = model.eval()(ids, output_router_logits=True).expert_load
    model.train()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    for batch in ids.split(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            update_routers(prepared)
    torch.testing.assert_close(biases(model), RATE * torch.sign(load.mean(dim=-1, keepdim=True) - load))


def test_dense_model_is_left_alone(tmp_path):
    model, ids = tiny_model(mlp_layer_types=["dense"] * 3), torch.randint(3, 300, (8, 11))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    args = training_arguments(tmp_path)
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=default_data_collator)
    assert trainer.train().global_step == 1


def test_counts_of_an_abandoned_step_do_not_move_the_bias(tmp_path):
    """A Trainer drops the counts, and so does a loop that calls `forget_counts`."""
    torch.manual_seed(0)
    model, ids = biased_model(), torch.randint(3, 300, (8, 11))
    alone = biased_model()
    alone.load_state_dict(model.state_dict())
    train(alone, ids, tmp_path / "alone", max_steps=1)
    for _ in range(50):  # more than the step counts
        model.train()(torch.full_like(ids, 7), labels=ids)
    assert statistics(model).any()
    train(model, ids, tmp_path / "after", max_steps=1)
    assert torch.equal(biases(model), biases(alone))
    model.train()(ids, labels=ids)
    forget_counts(model)
    update_routers(model)
    assert torch.equal(biases(model), biases(alone))
