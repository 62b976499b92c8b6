"""These tests check that router losses reach transformers' `Trainer` once, and in training only."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, default_data_collator

import modeling_moe.training
from tests.builders import GradientRecorder, tiny_model, training_arguments


BALANCE = {"router_aux_loss_coef": 100.0, "router_z_loss_coef": 0.0}
BOTH = {"router_aux_loss_coef": 100.0, "router_z_loss_coef": 3.0}
NONE = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
ACCUMULATE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
HIDE_LABELS = {"label_smoothing_factor": 0.1}


@pytest.fixture
def ids() -> torch.Tensor:
    """Returns token ids (8, 41)."""
    return torch.randint(3, 300, (8, 41))


def gradients(coefficients: dict, ids: torch.Tensor, tmp_path, **fields) -> torch.Tensor:
    """Returns the routers' gradients in one step of a Trainer, as one vector."""
    recorder = GradientRecorder()
    trainer = Trainer(
        model=tiny_model(**coefficients),
        args=training_arguments(tmp_path, **fields),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}),
        data_collator=default_data_collator,
        callbacks=[recorder],
    )
    trainer.train()
    return torch.cat([gradient.flatten() for gradient in recorder.gradients.values()])


def router_loss_gradients(coefficients: dict, ids: torch.Tensor) -> torch.Tensor:
    """Returns the routers' gradients of the router losses alone, by autograd."""
    model = tiny_model(**coefficients).train()
    model.model(ids, attach_router_loss=False).router_loss.backward()
    return torch.cat([layer.mlp.gate.weight.grad.flatten() for layer in model.model.layers if layer.is_sparse])


@pytest.mark.parametrize("trainer_fields", [{}, HIDE_LABELS], ids=["labels", "hidden_labels"])
def test_router_losses_arrive_once(trainer_fields, ids, tmp_path):
    with_losses = gradients(BOTH, ids, tmp_path, **trainer_fields)
    without = gradients(NONE, ids, tmp_path, **trainer_fields)
    expected = router_loss_gradients(BOTH, ids)
    assert expected.norm() > 10 * without.norm()
    torch.testing.assert_close(with_losses - without, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("trainer_fields", [{}, HIDE_LABELS], ids=["labels", "hidden_labels"])
def test_accumulation_over_equal_micro_batches(trainer_fields, ids, tmp_path):
    ids = ids[:1].expand(8, -1)
    whole = gradients(BOTH, ids, tmp_path, **trainer_fields)
    accumulated = gradients(BOTH, ids, tmp_path, **trainer_fields, **ACCUMULATE)
    torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-5 * whole.abs().max())


@pytest.mark.parametrize(("trainer_fields", "times"), [({}, 1), (HIDE_LABELS, 4)], ids=["labels", "hidden_labels"])
def test_without_the_callback_attached_losses_add_up_over_micro_batches(trainer_fields, times, ids, tmp_path):
    modeling_moe.training.disable()
    ids = ids[:1].expand(8, -1)
    expected = router_loss_gradients(BOTH, ids)
    accumulated = gradients(BOTH, ids, tmp_path, **trainer_fields, **ACCUMULATE)
    without = gradients(NONE, ids, tmp_path, **trainer_fields, **ACCUMULATE)
    torch.testing.assert_close(accumulated - without, times * expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("trainer_fields", [{}, HIDE_LABELS], ids=["labels", "hidden_labels"])
def test_accumulation_does_not_multiply_the_balance_loss(trainer_fields, ids, tmp_path):
    # f * P of micro-batches differs from that of the batch, so only the sizes are compared
    whole = gradients(BALANCE, ids, tmp_path, **trainer_fields)
    accumulated = gradients(BALANCE, ids, tmp_path, **trainer_fields, **ACCUMULATE)
    ratio = (accumulated @ whole / (whole @ whole)).item()
    assert 0.7 < ratio < 1.4


def test_label_smoothing_predicts_the_next_token(ids, tmp_path):
    """transformers shifts the labels only for the classes in its list of causal LMs."""
    trainer = Trainer(model=tiny_model(**NONE).eval(), args=training_arguments(tmp_path, label_smoothing_factor=1e-6))
    inputs = {"input_ids": ids, "labels": ids}
    expected = trainer.model(**inputs).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(inputs)), expected, rtol=1e-4, atol=0)


def test_eval_loss_holds_no_router_loss(ids, tmp_path):
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    losses = [
        Trainer(
            model=tiny_model(**coefficients),
            args=training_arguments(tmp_path),
            eval_dataset=rows,
            data_collator=default_data_collator,
        ).evaluate()["eval_loss"]
        for coefficients in (BOTH, NONE)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("flag", [False, True])
def test_predict_returns_the_logits_alone(flag, ids, tmp_path):
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    model = tiny_model(output_router_logits=flag, **BOTH)
    trainer = Trainer(model=model, args=training_arguments(tmp_path), data_collator=default_data_collator)
    expected = model.eval()(ids).logits
    torch.testing.assert_close(torch.from_numpy(trainer.predict(rows).predictions), expected)
