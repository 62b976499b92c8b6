"""These tests run RoutingCallback in Trainers of transformers and TRL."""

import gc
import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer import DEFAULT_CALLBACKS

from modeling_moe.monitoring import FiguresCallback, RoutingCallback, max_violation
from modeling_moe.training import MoECallback
from tests.builders import SIZE, GradientRecorder, tiny_model, training_arguments


CHECKPOINTING = {
    "none": {},
    "non_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
KEY = "routing/layer_02/max_violation"


class Tracker(TrainerCallback):
    """A tracker, by transformers' public API, that keeps what it is to log on the main process."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Copies the log."""
        if state.is_world_process_zero:
            self.logged.append({**logs, "step": state.global_step})

    @property
    def routing(self) -> list[dict]:
        """The logs with figures of the routing."""
        return [entry for entry in self.logged if KEY in entry]


@pytest.fixture
def tracker(monkeypatch):
    """Puts a tracker where `report_to="trackio"` puts its own."""
    tracker = Tracker()
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", tracker)
    return tracker


def token_ids(rows: int = 8) -> torch.Tensor:
    return torch.randint(3, 99, (rows, 11), generator=torch.Generator().manual_seed(0))


def make_trainer(model, tmp_path, callbacks, ids=None, **fields) -> Trainer:
    ids = token_ids() if ids is None else ids
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    settings = {"logging_steps": 1, "report_to": "trackio"} | fields
    return Trainer(
        model=model,
        args=training_arguments(tmp_path, **settings),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def train(model, tmp_path, callbacks=None, **fields) -> Trainer:
    trainer = make_trainer(model, tmp_path, [RoutingCallback()] if callbacks is None else callbacks, **fields)
    trainer.train(fields.get("resume_from_checkpoint"))
    return trainer


def mixtral(**fields) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**(SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2} | fields)))


def hooks(model) -> int:
    """Returns the number of hooks on a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def figures(entry: dict) -> dict:
    """Returns the figures of the routing in a log."""
    return {name: value for name, value in entry.items() if name.startswith("routing/")}


def test_figures_reach_the_trackers_the_history_and_the_saved_state(tracker, tmp_path):
    trainer = train(tiny_model(), tmp_path, max_steps=4, logging_steps=2, save_strategy="steps", save_steps=4)
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4]
    assert len(figures(history[0])) > 20
    assert [figures(entry) for entry in tracker.routing] == [figures(entry) for entry in history]
    assert [figures(entry) for entry in saved] == [figures(entry) for entry in history]
    # the last log of a Trainer, which sums the training up, has nothing that was logged before
    assert not figures(tracker.logged[-1])


def test_figures_reach_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = str(tmp_path / "events")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", folder)
        trainer = train(tiny_model(), tmp_path, report_to="tensorboard", max_steps=2)
    reader = events.EventAccumulator(folder)
    reader.Reload()
    expected = [entry[KEY] for entry in trainer.state.log_history if KEY in entry]
    assert [event.value for event in reader.Scalars(f"train/{KEY}")] == pytest.approx(expected)
    assert {"train/routing/max_violation", "train/routing/router_grad_norm"} <= set(reader.Tags()["scalars"])


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_reading_is_of_all_micro_batches_once(checkpointing, tracker, tmp_path):
    model, recorder = tiny_model(), GradientRecorder()
    output = model.eval()(token_ids(), output_router_logits=True)
    load = output.expert_load
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4} | CHECKPOINTING[checkpointing]
    train(model, tmp_path, [RoutingCallback(), recorder], max_grad_norm=0.01, **fields)
    (entry,) = tracker.routing
    assert [entry[f"routing/layer_0{layer}/max_violation"] for layer in (0, 2)] == pytest.approx(
        max_violation(load).tolist()
    )
    norms = {int(name.split(".")[2]): gradient.norm().item() for name, gradient in recorder.gradients.items()}
    for layer, norm in norms.items():
        assert entry[f"routing/layer_0{layer}/router_grad_norm"] == pytest.approx(norm)
    assert entry["routing/router_grad_norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5)


@pytest.mark.parametrize("scope", ["batch", "global"])
def test_router_losses_are_logged_by_name(scope, tracker, tmp_path):
    coefficients = {"router_z_loss_coef": 0.1, "router_entropy_loss_coef": 0.1, "router_seq_aux_loss_coef": 0.0}
    model = tiny_model(router_aux_loss_coef=0.5, router_aux_loss_scope=scope, **coefficients)
    train(model, tmp_path, [MoECallback(), RoutingCallback()], ids=token_ids(), learning_rate=0.0)
    (entry,) = tracker.routing
    output = model.train().model(token_ids(), attach_router_loss=False)
    losses = {name: entry[f"routing/{name}_loss"] for name in ("balance", "z", "entropy")}
    assert losses["balance"] == pytest.approx(output.aux_loss.item(), rel=1e-5)
    weighted = 0.5 * losses["balance"] + 0.1 * losses["z"] + 0.1 * losses["entropy"]
    assert weighted == pytest.approx(output.router_loss.item(), rel=1e-5)
    assert "routing/sequence_balance_loss" not in entry


def test_a_model_of_transformers_shows_its_own_loss(tracker, tmp_path):
    model = mixtral(output_router_logits=True)
    expected = model.train()(token_ids(), output_router_logits=True).aux_loss.item()
    train(model, tmp_path, learning_rate=0.0)
    assert tracker.logged[0]["routing/aux_loss"] == pytest.approx(expected)
    assert tracker.logged[0]["routing/layer_01/router_grad_norm"] > 0


class Generates(TrainerCallback):
    """Generates text before each step, in training mode, as trainers that learn from rewards do."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        """Generates."""
        model.train()
        model.generate(token_ids()[:2], max_new_tokens=3, do_sample=False)


def test_evaluation_and_generation_are_not_counted(tracker, tmp_path):
    train(tiny_model(), tmp_path / "alone", max_steps=3)
    alone = [figures(entry) for entry in tracker.routing]
    tracker.logged.clear()
    fields = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    train(tiny_model(), tmp_path / "both", [RoutingCallback(), Generates()], **fields)
    assert [figures(entry) for entry in tracker.routing] == alone
    assert not any(figures(entry) for entry in tracker.logged if "eval_loss" in entry)


def test_every_makes_the_trainer_log(tracker, tmp_path):
    train(tiny_model(), tmp_path, [RoutingCallback(every=2)], max_steps=7, logging_steps=3)
    steps = {entry["step"]: KEY in entry for entry in tracker.logged[:-1]}
    assert steps == {2: True, 3: False, 4: True, 6: True}
    # what came after the last log is in the summary
    assert KEY in tracker.logged[-1]
    assert "train_runtime" in tracker.logged[-1]


def test_a_log_per_epoch_has_the_figures(tracker, tmp_path):
    fields = {"max_steps": 4, "logging_strategy": "epoch", "per_device_train_batch_size": 4}
    train(tiny_model(), tmp_path, **fields)
    assert [entry["step"] for entry in tracker.routing] == [2, 4]


def test_no_log_is_said(tracker, tmp_path, caplog):
    model = tiny_model()
    train(model, tmp_path, logging_strategy="no")
    assert "logging_strategy is no" in caplog.text
    assert not tracker.routing


def test_a_resumed_run_logs_what_the_whole_run_logged(tracker, tmp_path):
    fields = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    train(tiny_model(), tmp_path, **fields)
    whole = [figures(entry) for entry in tracker.routing]
    tracker.logged.clear()
    train(tiny_model(), tmp_path, **fields, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [figures(entry) for entry in tracker.routing] == whole[1:]


def test_the_console_shows_the_figures_of_the_model_only(tracker, tmp_path, capsys):
    trainer = train(tiny_model(), tmp_path)
    printed = capsys.readouterr().out
    assert "routing/max_violation" in printed
    assert "routing/layer_" not in printed
    assert KEY in trainer.state.log_history[0]


def test_add_to_puts_the_callback_before_the_trackers_of_a_trainer(tracker, tmp_path, capsys):
    trainer = make_trainer(tiny_model(), tmp_path, None)
    RoutingCallback().add_to(trainer)
    RoutingCallback().add_to(trainer)
    trainer.train()
    assert [len(figures(entry)) > 20 for entry in tracker.logged] == [True, False]
    assert "routing/layer_" not in capsys.readouterr().out
    assert sum(isinstance(callback, RoutingCallback) for callback in trainer.callback_handler.callbacks) == 1


def test_a_callback_that_comes_too_late_is_refused(tracker, tmp_path):
    with pytest.raises(ValueError, match="comes after the trackers"):
        make_trainer(tiny_model(), tmp_path, [RoutingCallback])
    trainer = make_trainer(tiny_model(), tmp_path, None)
    trainer.add_callback(RoutingCallback())
    with pytest.raises(ValueError, match="comes after the trackers"):
        trainer.train()
    callback = RoutingCallback()
    make_trainer(tiny_model(), tmp_path, [callback])
    with pytest.raises(ValueError, match="comes after the trackers"):
        make_trainer(tiny_model(), tmp_path, [callback])


def test_a_second_callback_has_no_effect(tracker, tmp_path):
    model = tiny_model()
    train(model, tmp_path / "one")
    one = [figures(entry) for entry in tracker.logged]
    tracker.logged.clear()
    train(tiny_model(), tmp_path / "two", [RoutingCallback(), RoutingCallback()])
    assert [figures(entry) for entry in tracker.logged] == one


def test_other_trainers_do_not_change(tracker, tmp_path):
    before = list(DEFAULT_CALLBACKS)
    waiting = RoutingCallback()
    assert before != DEFAULT_CALLBACKS
    other = make_trainer(tiny_model(), tmp_path, None)
    other.train()
    assert not any(figures(entry) for entry in tracker.logged)
    train(tiny_model(), tmp_path, [waiting])
    assert before == DEFAULT_CALLBACKS
    assert len(tracker.routing) == 1
    unused = RoutingCallback()
    del unused
    gc.collect()
    assert before == DEFAULT_CALLBACKS


class Figure(FiguresCallback):
    """Adds one figure to each log."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def publish(self, args, state, logs):
        """Returns the step."""
        return {self.name: state.global_step}


def test_any_number_of_callbacks_add_figures_to_one_log(tracker, tmp_path):
    callbacks = [Figure("one"), RoutingCallback(), Figure("two"), Figure("three")]
    trainer = make_trainer(tiny_model(), tmp_path, callbacks[:3], max_steps=2)
    callbacks[3].add_to(trainer)
    trainer.train()
    assert [KEY in entry for entry in tracker.logged] == [True, True, False]
    for entry in (*tracker.logged, *trainer.state.log_history):
        assert {entry[name] for name in ("one", "two", "three")} == {entry["step"]}
    with pytest.raises(ValueError, match="Figure comes after the trackers"):
        make_trainer(tiny_model(), tmp_path, [callbacks[0]])


class Fails(TrainerCallback):
    """Ends the training by an exception."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Fails at the second step."""
        if state.global_step == 1:
            raise RuntimeError("the disk is full")


def test_the_model_is_left_without_hooks(tracker, tmp_path):
    model = tiny_model()
    before = hooks(model)
    train(model, tmp_path / "whole")
    assert hooks(model) == before
    callback, failing = RoutingCallback(), Fails()
    trainer = make_trainer(model, tmp_path / "failed", [callback, failing], max_steps=3)
    with pytest.raises(RuntimeError, match="disk is full"):
        trainer.train()
    callback.close()
    assert hooks(model) == before
    tracker.logged.clear()
    trainer.remove_callback(failing)
    trainer.train()
    assert [entry["step"] for entry in tracker.routing] == [1, 2, 3]
    assert hooks(model) == before


def test_a_dense_model_gets_one_warning(tracker, tmp_path, caplog):
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    with caplog.at_level(logging.WARNING):
        train(model, tmp_path, max_steps=3)
    said = [record.message for record in caplog.records if "modeling_moe" in record.name]
    assert said == ["LlamaForCausalLM is a dense model: there is no routing to see."]
    assert not any(figures(entry) for entry in tracker.logged)


class RunsCopies(Trainer):
    """Runs copies of the experts, as nn.DataParallel does in a Trainer with several GPUs and no launcher."""

    def compute_loss(self, model, *args, **kwargs):
        """Runs the model with copies of its experts."""
        blocks = [block for block in model.modules() if hasattr(block, "experts")]
        experts = [block.experts for block in blocks]
        for block, own in zip(blocks, experts, strict=True):
            block.experts = own._replicate_for_data_parallel()
            for name, weight in own.named_parameters():
                setattr(block.experts, name, weight)
        try:
            return super().compute_loss(model, *args, **kwargs)
        finally:
            for block, own in zip(blocks, experts, strict=True):
                block.experts = own


@pytest.mark.parametrize("build", [tiny_model, mixtral])
def test_a_routing_that_cannot_be_read_ends_no_training(build, tracker, tmp_path, caplog, monkeypatch):
    def run(kind=Trainer):
        model = build()
        monkeypatch.setattr("tests.monitoring.test_callback.Trainer", kind)
        caplog.clear()
        train(model, tmp_path, max_steps=3)
        assert not hooks(model)
        assert not any(figures(entry) for entry in tracker.logged)
        return [record.message for record in caplog.records if "modeling_moe.monitoring" in record.name]

    goes_on = "The training goes on, and its routing is logged no more: "
    (message,) = run(RunsCopies)
    assert message.startswith(f"{goes_on}nn.DataParallel runs copies")
    for place in ("watching.add_pass", "callback.RouterGradientMeter.measure", "callback.RoutingWatch.read"):
        with monkeypatch.context() as patch:
            patch.setattr(f"modeling_moe.monitoring.{place}", lambda *_, **__: {}["odd"])
            assert run() == [f"{goes_on}KeyError: 'odd'"]


def test_sft_trainer_logs_the_routing(tracker, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    common = training_arguments(tmp_path).to_dict()
    names = ("output_dir", "use_cpu", "max_steps", "optim", "save_strategy", "disable_tqdm")
    args = trl.SFTConfig(
        **{name: common[name] for name in names}, bf16=False, logging_steps=1, report_to="trackio",
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    model = tiny_model()
    load = model.eval()(token_ids(), output_router_logits=True).expert_load
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in token_ids().tolist()]),
        processing_class=tokenizer,
        callbacks=[RoutingCallback()],
    )
    trainer.train()
    (entry,) = tracker.routing
    assert entry[KEY] == pytest.approx(max_violation(load)[1].item())
    assert entry["routing/z_loss"] > 0
    assert entry["routing/router_grad_norm"] > 0


def test_an_adapter_with_frozen_routers_has_no_router_gradient(tracker, tmp_path, caplog):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    train(model, tmp_path, max_steps=4)
    assert len(tracker.routing) == 4
    assert not any("grad_norm" in name for name in figures(tracker.routing[0]))
    assert not [record for record in caplog.records if "monitoring" in record.name]


@pytest.mark.parametrize("every", [0, -3])
def test_every_below_one_is_refused(every):
    with pytest.raises(ValueError, match="must be at least 1"):
        RoutingCallback(every=every)
