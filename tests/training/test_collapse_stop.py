"""These tests check that a training ends when the routing of a layer has collapsed, and only then."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from modeling_moe.training import CollapseStop, load_entropy
from modeling_moe.utils.errors import UserError
from tests.builders import save_llama, tiny_model, training_arguments
from tests.training.families import tiny


def collapse(model, layer: int) -> None:
    """Lets the router of a layer of Mixtral send all tokens to experts 0 and 1, which no gradient changes."""
    gate = model.model.layers[layer].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
    gate.weight.requires_grad_(False)


def train(model, tmp_path, stop, steps=12, **fields) -> Trainer:
    ids = torch.randint(4, 60, (16, 12), generator=torch.Generator().manual_seed(0))
    args = training_arguments(tmp_path, max_steps=steps, learning_rate=0.01, per_device_train_batch_size=2, **fields)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    stops = stop if isinstance(stop, list) else [stop]
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=stops)
    trainer.train(resume_from_checkpoint=fields.get("resume_from_checkpoint"))
    return trainer


def test_the_spread_of_a_load():
    assert load_entropy(torch.tensor([5.0, 5.0, 5.0, 5.0]), 2) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([0.0, 7.0, 7.0, 0.0]), 2) == pytest.approx(0.0)
    half = load_entropy(torch.tensor([2.0, 1.0, 1.0, 0.0]), 1)
    assert half == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert load_entropy(torch.tensor([3.0, 3.0]), 2) == 1.0
    assert load_entropy(torch.zeros(4), 1) == 1.0


def test_it_stops_after_the_readings_in_a_row_and_names_the_layer(tmp_path, caplog):
    model = tiny("mixtral", num_hidden_layers=3)
    collapse(model, 1)
    stop = CollapseStop(every=2, patience=3, min_entropy=0.1)
    trainer = train(model, tmp_path, stop)
    assert trainer.state.global_step == 6
    assert stop.reason.startswith(
        "step 6: the routing of layer_01 (load entropy 0.00, below 0.1) has collapsed in 3 readings in a row: raise"
    )
    assert (tmp_path / "checkpoint-6" / "model.safetensors").is_file()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_is_well_is_trained_to_the_end_and_one_spike_is_no_collapse(tmp_path):
    stop = CollapseStop(every=1, patience=2, min_entropy=0.1)
    model = tiny("mixtral")
    first = model.model.layers[0].mlp.gate
    weights = iter([torch.zeros_like(first.weight), first.weight.detach().clone()] * 3)
    first.weight.requires_grad_(False)

    def change(module, args):
        module.weight.data.copy_(next(weights))

    first.register_forward_pre_hook(change)
    trainer = train(model, tmp_path, stop, steps=6)
    assert trainer.state.global_step == 6
    assert stop.reason is None


def test_max_violation_and_a_model_of_this_package(tmp_path):
    stop = CollapseStop(every=1, patience=2, min_entropy=0.0, max_violation=0.01)
    trainer = train(tiny_model(), tmp_path, stop)
    assert trainer.state.global_step == 2
    assert "MaxVio" in stop.reason
    assert "layer_00" in stop.reason
    assert "layer_02" in stop.reason


def test_a_resumed_run_stops_at_the_step_of_an_uninterrupted_one(tmp_path):
    def run(folder, steps, **fields):
        model = tiny("mixtral")
        collapse(model, 0)
        stop = CollapseStop(every=2, patience=3, min_entropy=0.1)
        options = {"save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "constant"}
        return train(model, folder, stop, steps, **options, **fields), stop

    whole, stop = run(tmp_path / "whole", 12)
    run(tmp_path / "parts", 5)
    resumed, again = run(tmp_path / "parts", 12, resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert whole.state.global_step == resumed.state.global_step == 6
    assert again.reason == stop.reason


def test_a_checkpoint_of_a_run_without_the_callback_is_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    train(tiny("mixtral"), tmp_path, TrainerCallback(), 2, **options)
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer = train(tiny("mixtral"), tmp_path, CollapseStop(every=1), 4, resume_from_checkpoint=checkpoint, **options)
    assert trainer.state.global_step == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "collapse_steps is 0: it must be at least 1"),
        ({"patience": 0}, "collapse_patience is 0"),
        ({"min_entropy": 1.5}, "collapse_entropy is 1.5: it must be from 0 to 1"),
        ({"max_violation": 0}, "collapse_violation is 0: it must be above 0"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        CollapseStop(**options)


def test_a_dense_model_is_refused(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "dense"))
    with pytest.raises(UserError, match="collapse_steps has no effect: LlamaForCausalLM is a dense model"):
        train(dense, tmp_path, CollapseStop())


@pytest.mark.parametrize("resumed", [False, True])
def test_two_in_one_trainer_are_refused(tmp_path, resumed):
    options = {}
    if resumed:
        train(tiny("mixtral"), tmp_path, CollapseStop(every=1), 2, save_strategy="steps", save_steps=2)
        options["resume_from_checkpoint"] = str(tmp_path / "checkpoint-2")
    model = tiny("mixtral")
    with pytest.raises(UserError, match="the Trainer has two CollapseStop callbacks: give it one"):
        train(model, tmp_path, [CollapseStop(every=1), CollapseStop(every=2)], 4, **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_serves_two_trainings_of_a_trainer(tmp_path):
    stop = CollapseStop(every=1)
    trainer = train(tiny("mixtral"), tmp_path, stop, 2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert stop.reason is None
