"""These tests give routing replay to TRL's trainers."""

import pytest
import torch
from datasets import Dataset
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from modeling_moe.monitoring import observe
from modeling_moe.replay import RoutingReplayCallback, RoutingStore, record_routing
from tests.builders import train_tokenizer
from tests.monitoring.test_callback import Tracker
from tests.training.families import tiny
from tests.training.test_trl import arguments


trl = pytest.importorskip("trl")
FIGURES = ("replay/coverage", "replay/flipped")
PROMPTS = ["der Weg führt", "über die Brücke", "to the old mill", "the Brücke"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def tracker(monkeypatch):
    """Puts a tracker where `report_to="trackio"` puts its own."""
    tracker = Tracker()
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", tracker)
    return tracker


def longer(completions, **_) -> list[float]:
    """Rewards the number of letters."""
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("trainer", "config", "family"),
    [
        ("GRPOTrainer", "GRPOConfig", "mixtral"),
        ("GRPOTrainer", "GRPOConfig", "deepseek_v3"),
        pytest.param("GRPOTrainer", "GRPOConfig", "qwen3_moe", marks=pytest.mark.slow),
        ("RLOOTrainer", "RLOOConfig", "mixtral"),
    ],
)
def test_a_policy_is_trained_with_the_experts_of_its_rollout(trainer, config, family, tokenizer, tracker, tmp_path):
    model, events = tiny(family, vocab_size=300), []
    args = arguments(
        getattr(trl, config), tmp_path, max_completion_length=6, num_generations=2, max_steps=2, logging_steps=1, beta=0.0,
        per_device_train_batch_size=4, learning_rate=0.5, num_iterations=2, report_to="trackio",
    )  # fmt: skip
    callback = RoutingReplayCallback()
    run = getattr(trl, trainer)(
        model=model,
        reward_funcs=longer,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    with observe(model, lambda event: events.append((event.training, event.index.detach().clone()))):
        run.train()
    logs = [entry for entry in run.state.log_history if "replay/coverage" in entry]
    assert len(logs) == 2
    assert [{name: entry[name] for name in FIGURES} for entry in tracker.logged[:2]] == [
        {name: entry[name] for name in FIGURES} for entry in logs
    ]
    # all tokens but the last one of each answer, which is no input of the rollout
    assert all(0.75 < entry["replay/coverage"] < 1 for entry in logs)
    # in the first step the policy is that of the rollout, afterwards its routers have moved
    assert logs[0]["replay/flipped"] < 0.02
    assert logs[1]["replay/flipped"] > logs[0]["replay/flipped"]
    assert any(training for training, _ in events)
    assert not any(module._forward_pre_hooks for module in model.modules())


ANSWERS = {"prompt": "to the", "chosen": " old mill", "rejected": " Brücke"}
LABELLED = [
    {"prompt": "to the", "completion": " old mill", "label": True},
    {"prompt": "der Weg", "completion": " Brücke", "label": False},
]


@pytest.mark.parametrize(
    ("trainer", "config", "rows"),
    [
        ("DPOTrainer", "DPOConfig", [ANSWERS] * 4),
        ("KTOTrainer", "KTOConfig", LABELLED * 2),
    ],
)
def test_preferences_are_trained_with_recorded_experts(trainer, config, rows, tokenizer, tracker, tmp_path):
    model, store = tiny("mixtral", vocab_size=300), RoutingStore()
    args = arguments(
        getattr(trl, config), tmp_path, per_device_train_batch_size=4, logging_steps=1, report_to="trackio"
    )
    run = getattr(trl, trainer)(
        model=model,
        ref_model=tiny("mixtral", vocab_size=300),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[RoutingReplayCallback(store)],
    )
    with torch.no_grad():
        for parameter in run.ref_model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0
    # KTO estimates the divergence on the answers of other prompts
    answers = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")
    with record_routing(run.ref_model, store), torch.no_grad():
        for row in run.train_dataset:
            for answer in (row[name] for name in answers if name in row):
                run.ref_model(torch.tensor([row["prompt_ids"] + answer]), use_cache=False)
    run.train()
    assert tracker.logged[0]["replay/coverage"] == 1
    assert tracker.logged[0]["replay/flipped"] > 0


def test_a_training_without_any_recorded_text_warns(tokenizer, tmp_path, caplog):
    run = trl.SFTTrainer(
        model=tiny("mixtral", vocab_size=300),
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=Dataset.from_list([{"input_ids": [3, 4, 5, 6]}] * 4),
        processing_class=tokenizer,
        callbacks=[RoutingReplayCallback()],
    )
    run.train()
    assert "give the callback a store of recorded texts, RoutingReplayCallback(store)" in caplog.text


def test_figures_reach_tensorboard(tokenizer, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model, ids = tiny("mixtral", vocab_size=300), torch.randint(3, 300, (4, 9))
    with record_routing(model) as recorder, torch.no_grad():
        model(ids, use_cache=False)
    run = trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path, logging_steps=1, report_to="tensorboard"),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in ids.tolist()]),
        processing_class=tokenizer,
    )
    RoutingReplayCallback(recorder.store).add_to(run)
    run.train()
    reader = events.EventAccumulator(str(tmp_path / "events"))
    reader.Reload()
    assert [reader.Scalars(f"train/{name}")[0].value for name in FIGURES] == [1, 0]
