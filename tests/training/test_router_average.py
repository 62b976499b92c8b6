"""These tests check the moving average of routers against its definition, and its use in evaluation and checkpoints."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from modeling_moe.training import RouterAverage, RouterAverageMixin
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_model, training_arguments
from tests.training.families import tiny


class AveragingTrainer(RouterAverageMixin, Trainer):
    """A `Trainer` with averaged routers."""


class Follow(TrainerCallback):
    """Computes the average of a router in float64, and keeps the router that each evaluation uses."""

    def __init__(self, decay):
        self.decay, self.average, self.seen = decay, None, []

    def on_train_begin(self, args, state, control, model, **kwargs):
        """Begins with the weights."""
        self.gate = model.model.layers[0].mlp.gate.weight
        self.average = self.gate.detach().double()

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the average."""
        self.average = self.decay * self.average + (1 - self.decay) * self.gate.detach().double()

    def on_prediction_step(self, args, state, control, **kwargs):
        """Compares."""
        self.seen.append((self.gate.detach().double() - self.average).abs().max().item())


def data():
    ids = torch.randint(4, 60, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make(model, folder, decay, *callbacks, **fields):
    options = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    args = training_arguments(folder, **(options | fields))
    held_out = {"a": data().select(range(2)), "b": data().select(range(2, 4))}
    trainer = AveragingTrainer(
        model=model, args=args, train_dataset=data(), eval_dataset=held_out, callbacks=list(callbacks)
    )
    if decay is not None:
        trainer.average_routers(decay)
    return trainer


@pytest.mark.parametrize("build", [lambda: tiny("mixtral"), tiny_model])
def test_evaluations_use_the_average_and_the_training_does_not_change(build, tmp_path):
    plain, averaged = build(), build()
    make(plain, tmp_path / "a", None, eval_strategy="steps", eval_steps=2).train()
    follow = Follow(0.7)
    trainer = make(averaged, tmp_path / "b", 0.7, follow, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), averaged.parameters(), strict=True))
    assert len(follow.seen) >= 6  # both sets at three steps
    assert max(follow.seen) < 1e-6
    assert (follow.gate.double() - follow.average).abs().max() > 1e-3
    with trainer.averaged(), trainer.averaged():
        inside = follow.gate.detach().clone()
    torch.testing.assert_close(inside.double(), follow.average, rtol=0, atol=1e-6)
    assert torch.equal(follow.gate, plain.model.layers[0].mlp.gate.weight)


def test_a_later_decay_replaces_an_earlier_one(tmp_path):
    follow = Follow(0.7)
    trainer = make(tiny("mixtral"), tmp_path, 0.2, follow)
    trainer.average_routers(0.7)
    trainer.train()
    average = trainer.router_average.state_dict()["model.layers.0.mlp.gate.weight"]
    torch.testing.assert_close(average.double(), follow.average, rtol=0, atol=1e-6)


def test_a_router_in_16_bits_is_averaged_in_float32():
    """A step of 1 - 0.999 would be lost in bfloat16."""
    model = tiny("mixtral").bfloat16()
    gate = model.model.layers[0].mlp.gate.weight
    average = RouterAverage(model, 0.999)
    with torch.no_grad():
        before = gate.float()
        gate += 1.0
    for _ in range(100):
        average.update()
    expected = gate.float() + (before - gate.float()) * 0.999**100
    torch.testing.assert_close(average.state_dict()["model.layers.0.mlp.gate.weight"], expected, rtol=0, atol=1e-5)


def test_a_resumed_run_has_the_average_of_an_uninterrupted_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole, resumed = tiny("mixtral"), tiny("mixtral")
    first = make(whole, tmp_path / "whole", 0.7, **options)
    first.train()
    second = make(resumed, tmp_path / "resumed", 0.7, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), resumed.parameters(), strict=True))
    states = [trainer.router_average.state_dict() for trainer in (first, second)]
    assert states[0].keys() == {f"model.layers.{n}.mlp.gate.weight" for n in range(2)}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_best_checkpoint_brings_its_average(tmp_path):
    model = tiny("mixtral")
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "a_loss", "greater_is_better": True}
    trainer = make(model, tmp_path, 0.7, **options, **best)  # the worst one, which is not the last
    trainer.train()
    assert trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-6")
    saved = torch.load(f"{trainer.state.best_model_checkpoint}/router_average.pt", weights_only=True)
    assert all(torch.equal(saved[name], value) for name, value in trainer.router_average.state_dict().items())


def test_mistakes(tmp_path):
    model = tiny("mixtral")
    for decay in (-0.1, 1.0):
        with pytest.raises(UserError, match=f"router_average is {decay}: it must be at least 0 and below 1"):
            RouterAverage(model, decay)
    with pytest.raises(UserError, match="the saved average is that of other routers: model"):
        RouterAverage(model, 0.5).load_state_dict({})
    make(model, tmp_path, None, save_strategy="steps", save_steps=3).train()
    with pytest.raises(UserError, match="checkpoint-3 holds no average of the routers: omit router_average"):
        make(model, tmp_path, 0.7).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="router_average has no effect: the model trains no router"):
        RouterAverage(model, 0.5)
