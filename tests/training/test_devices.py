"""These tests train in bf16 by autocast, on a GPU if there is one, and count how often the experts are cast."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, default_data_collator

from modeling_moe.dispatch import interface
from modeling_moe.dispatch.backends.triton import casting
from modeling_moe.training import finetuning
from modeling_moe.training.callbacks import CastOnceCallback
from tests.builders import tiny_model, training_arguments
from tests.conftest import NEEDS_TRITON
from tests.dispatch.kinds import fastest
from tests.dispatch.test_casting import MATRICES, count_casts


class Gradients(TrainerCallback):
    """Keeps all gradients of the last optimizer step in `named`."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Copies the gradients."""
        self.named = {name: parameter.grad.cpu().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def backends(monkeypatch) -> list[tuple[str, torch.dtype]]:
    """Lists the back end and dtype of each call of the operator."""
    seen, operator = [], interface.experts

    def spy(*arguments):
        tensors, *_, backend, _ = arguments
        seen.append((backend, tensors[0].dtype))
        return operator(*arguments)

    monkeypatch.setattr(interface, "experts", spy)
    return seen


def one_layer():
    return tiny_model(num_hidden_layers=1, mlp_layer_types=["sparse"], router_aux_loss_coef=0.0)


def trainer_of(model, rows: torch.Tensor, tmp_path, callbacks=(), **fields) -> Trainer:
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    args = training_arguments(tmp_path, **fields)
    args._n_gpu = min(args.n_gpu, 1)  # with several GPUs `Trainer` would split the batch
    return Trainer(
        model=model, args=args, train_dataset=data, data_collator=default_data_collator, callbacks=[*callbacks]
    )


def train(tmp_path, rows: torch.Tensor, use_cpu: bool, **fields) -> dict[str, torch.Tensor]:
    recorder = Gradients()
    trainer_of(one_layer(), rows, tmp_path, [recorder], use_cpu=use_cpu, **fields).train()
    return recorder.named


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_bf16(checkpointing, device, backends, tmp_path):
    rows = torch.randint(3, 300, (8, 11))
    expected = train(tmp_path, rows, use_cpu=True)
    backends.clear()
    got = train(tmp_path, rows, use_cpu=device == "cpu", bf16=True, gradient_checkpointing=checkpointing)
    assert backends == [(fastest(device, torch.bfloat16), torch.bfloat16)] * (1 + checkpointing)
    for name, gradient in expected.items():
        assert got[name].dtype == torch.float32
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 0.1, f"{name}: {error}"


@NEEDS_TRITON
@pytest.mark.parametrize(("callbacks", "casts"), [([], 2 * 2 * 2), ([CastOnceCallback()], 2)], ids=["each", "once"])
def test_casts_of_two_steps(callbacks, casts, device, tmp_path):
    """In two steps of two micro-batches, experts are cast in each forward and backward pass, or once per step."""
    model = one_layer()
    model.set_experts_implementation("moe_triton")
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": True}
    rows = torch.randint(3, 300, (16, 11))
    trainer = trainer_of(model, rows, tmp_path, callbacks, use_cpu=device == "cpu", **fields)
    experts = model.model.layers[0].mlp.experts
    assert count_casts(experts, trainer.train) == dict.fromkeys(MATRICES, casts)


class Watch(TrainerCallback):
    """Keeps how many `cast_once` are open at the events of a `Trainer`, and fails in the given step."""

    def __init__(self, fails: int | None = None):
        self.fails, self.seen = fails, []

    def on_substep_end(self, args, state, control, **kwargs):
        """Counts between two micro-batches."""
        self.seen.append(("micro-batch", len(casting._open)))
        if state.global_step == self.fails:
            raise ZeroDivisionError

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Counts after the optimizer step."""
        self.seen.append(("optimizer", len(casting._open)))


def test_open_while_a_step_is_computed(tmp_path):
    watch, caster = Watch(), CastOnceCallback()
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    rows = torch.randint(3, 300, (16, 11))
    trainer_of(one_layer(), rows, tmp_path, [caster, watch], **fields).train()
    assert watch.seen == [("micro-batch", 1), ("optimizer", 0)] * 2
    failing = trainer_of(one_layer(), rows, tmp_path, [caster, Watch(fails=1)], **fields)
    with pytest.raises(ZeroDivisionError):
        failing.train()
    assert len(casting._open) == 1
    trainer_of(one_layer(), rows, tmp_path, [caster, watch], **fields).train()
    assert watch.seen == [("micro-batch", 1), ("optimizer", 0)] * 4
    assert not casting._open


def test_finetuning_closes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "_casts_once", lambda *_: True)
    watch = Watch(fails=0)
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = trainer_of(one_layer(), torch.randint(3, 300, (8, 11)), tmp_path, [watch], **fields)
    with pytest.raises(ZeroDivisionError):
        finetuning._train(trainer, trainer.model, None)
    assert watch.seen == [("micro-batch", 1)]
    assert not casting._open


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"bf16": False, "fp16": True}, True),
        ({"bf16": False}, False),
        ({"device": torch.device("cpu")}, False),
        ({"torch_compile": True}, False),
        ({"is_fsdp_enabled": True}, False),
        ({"is_deepspeed_enabled": True}, False),
    ],
)
def test_where_finetuning_casts_once(change, expected):
    args = {"bf16": True, "fp16": False, "device": torch.device("cuda"), "torch_compile": False}
    trainer = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | change
    trainer["args"] = SimpleNamespace(**{name: change.get(name, value) for name, value in args.items()})
    assert finetuning._casts_once(SimpleNamespace(**trainer), torch.nn.Identity()) is expected
