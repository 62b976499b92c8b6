"""These tests check that texts written in training are logged, and that the training is equal without them, bit for bit."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from modeling_moe.monitoring import RoutingCallback
from modeling_moe.training import SampleCallback
from modeling_moe.training.sampling import aside
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_model, training_arguments
from tests.training.families import tiny


class Tracker(TrainerCallback):
    """Keeps what a tracker would get."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keeps the texts."""
        self.seen += [(state.global_step, name, text) for name, text in logs.items() if name.startswith("sample/")]


# every source of randomness in training
RANDOM = {"attention_dropout": 0.1, "router_jitter_noise": 0.1, "router_aux_loss_coef": 0.1}
MODELS = {
    "own": lambda: tiny_model(
        **RANDOM, scoring_func="sigmoid", router_selection_bias=True, router_bias_update_rate=0.125
    ),
    "mixtral": lambda: tiny("mixtral", vocab_size=300, **RANDOM, output_router_logits=True),
}


def train(model, tokenizer, folder, *callbacks, **fields) -> tuple[Trainer, Tracker]:
    ids = torch.randint(4, 290, (24, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 0.05, "per_device_train_batch_size": 2}
    args = training_arguments(folder, gradient_accumulation_steps=2, **(options | fields))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    tracker = Tracker()
    trainer = Trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[tracker])
    for callback in callbacks:
        callback.add_to(trainer)
    trainer.train()
    return trainer, tracker


@pytest.mark.parametrize("name", MODELS)
def test_a_training_with_samples_equals_one_without_bit_for_bit(name, tokenizer, tmp_path):
    plain, other = MODELS[name](), MODELS[name]()
    without, _ = train(plain, tokenizer, tmp_path / "a")
    callback = SampleCallback(["the old mill", "Weg"], every=2, max_new_tokens=8, seed=3)
    trainer, tracker = train(other, tokenizer, tmp_path / "b", callback)
    assert all(
        torch.equal(*pair) for pair in zip(plain.state_dict().values(), other.state_dict().values(), strict=True)
    )
    states = [trainer.optimizer.state_dict()["state"] for trainer in (without, trainer)]
    assert all(torch.equal(states[0][n][key], states[1][n][key]) for n in states[0] for key in states[0][n])
    assert [(step, name) for step, name, _ in tracker.seen] == [(s, f"sample/{i}") for s in (2, 4, 6) for i in (0, 1)]
    assert all(text.startswith("the old mill") for _, name, text in tracker.seen if name == "sample/0")
    assert len({text for _, name, text in tracker.seen if name == "sample/0"}) == 3  # the weights have changed
    history = [entry for entry in trainer.state.log_history if "sample/0" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "sample/1" in json.dumps(json.loads((tmp_path / "state.json").read_text())["log_history"])


def test_equal_seeds_write_equal_texts_and_modes_are_put_back(tokenizer):
    model = tiny("mixtral", vocab_size=300).train()
    model.model.layers[0].eval()

    def written(**options):
        torch.rand(1)
        return SampleCallback(["the old"], 1, max_new_tokens=12, **options).sample(
            model, tokenizer, torch.device("cpu")
        )

    assert written() == written()
    assert written() != written(seed=1)
    assert written(temperature=0.0) == written(temperature=0.0, seed=1)
    assert model.training
    assert not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("samples_first", [True, False])
def test_samples_and_routing_in_one_step_leave_each_log_as_it_is_alone(samples_first, tokenizer, tmp_path):
    """`Trainer.log` takes the log of a step for done, of which the loss and the routing are still to come."""

    def logged(*callbacks, logging_steps=3):
        trainer, _ = train(MODELS["mixtral"](), tokenizer, tmp_path, *callbacks, logging_steps=logging_steps)
        kept = [{k: v for k, v in entry.items() if "train_" not in k} for entry in trainer.state.log_history]
        return [entry for entry in kept if not any(k.startswith("sample/") for k in entry) and len(entry) > 2]

    def samples():
        return [SampleCallback([text], every=every, max_new_tokens=2) for text, every in (("a", 1), ("Weg", 2))]

    def both(**options):
        return [*samples(), RoutingCallback(**options)] if samples_first else [RoutingCallback(**options), *samples()]

    alone = logged(RoutingCallback(every=2))
    assert [entry["step"] for entry in alone if "routing/max_violation" in entry] == [2, 4, 6]
    assert [entry["step"] for entry in alone if "loss" in entry] == [2, 3, 4, 6]
    assert logged(*both(every=2)) == alone
    assert logged(*both()) == logged(RoutingCallback())


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_only_the_device_that_is_put_back_is_seeded(device, monkeypatch):
    """A machine with two GPUs, each of which counts as its state what it was seeded with."""
    states, current = {0: 10, 1: 11}, [0]

    class Entered:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *exc_info):
            current[0] = self.before

    monkeypatch.setattr(torch.accelerator, "device_index", Entered)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: states.update(dict.fromkeys(states, seed)))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: states.update({current[0]: seed}))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device.index: state}))
    model, before = torch.nn.Linear(1, 1), torch.get_rng_state()
    with aside(model, torch.device(device), 7):
        first = torch.rand(3)
        assert states == {0: 10, 1: 11 if device == "cpu" else 7}
    assert states == {0: 10, 1: 11}
    assert torch.equal(torch.get_rng_state(), before)
    with aside(model, torch.device(device), 7):
        assert torch.equal(torch.rand(3), first)


def test_mistakes(tokenizer, tmp_path):
    for options, message in [
        ({"prompts": ["a"], "every": 0}, "sample_steps is 0: it must be at least 1"),
        ({"prompts": ["a"], "every": 1, "max_new_tokens": 0}, "sample_tokens is 0"),
        ({"prompts": [], "every": 1}, "sample_prompts needs texts that are not empty"),
        ({"prompts": ["a"], "every": 1, "temperature": -1.0}, "sample_temperature is -1.0"),
    ]:
        with pytest.raises(UserError, match=message):
            SampleCallback(**options)
    with pytest.raises(UserError, match=r"sample_prompts: .* tokens, and sample_tokens is 999"):
        train(tiny_model(), tokenizer, tmp_path, SampleCallback(["a"], 1, max_new_tokens=999))
    with pytest.raises(UserError, match="sample_prompts needs a tokenizer"):
        train(tiny_model(), None, tmp_path, SampleCallback(["a"], 1))
    trainer = Trainer(
        model=tiny_model(), args=training_arguments(tmp_path), callbacks=[SampleCallback(["a"], 1)],
        train_dataset=[{"input_ids": [4], "labels": [4]}],
    )  # fmt: skip
    with pytest.raises(ValueError, match="SampleCallback reaches no log: call SampleCallback"):
        trainer.train()
