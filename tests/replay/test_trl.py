"""These tests give routing replay to TRL's trainers."""

import pytest
import torch
from datasets import Dataset

from modeling_moe.monitoring import observe
from modeling_moe.replay import RoutingReplayCallback, record_routing
from tests.builders import train_tokenizer
from tests.training.families import tiny
from tests.training.test_trl import arguments


trl = pytest.importorskip("trl")
PROMPTS = ["der Weg führt", "über die Brücke", "to the old mill", "the Brücke"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def longer(completions, **_) -> list[float]:
    """Rewards the number of letters."""
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("trainer", "config", "family"),
    [
        ("GRPOTrainer", "GRPOConfig", "mixtral"),
        ("GRPOTrainer", "GRPOConfig", "deepseek_v3"),
        pytest.param("GRPOTrainer", "GRPOConfig", "qwen3_moe", marks=pytest.mark.slow),
        pytest.param("RLOOTrainer", "RLOOConfig", "mixtral", marks=pytest.mark.slow),
    ],
)
def test_a_policy_is_trained_with_the_experts_of_its_rollout(trainer, config, family, tokenizer, tmp_path):
    model, events = tiny(family, vocab_size=300), []
    args = arguments(
        getattr(trl, config), tmp_path, max_completion_length=6, num_generations=2, max_steps=2, logging_steps=1, beta=0.0,
        per_device_train_batch_size=4, learning_rate=0.5, num_iterations=2,
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
    # all tokens but the last one of each answer, which is no input of the rollout
    assert all(0.75 < entry["replay/coverage"] < 1 for entry in logs)
    # in the first step the policy is that of the rollout, afterwards its routers have moved
    assert logs[0]["replay/flipped"] < 0.02
    assert logs[1]["replay/flipped"] > logs[0]["replay/flipped"]
    assert any(training for training, _ in events)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_preferences_are_trained_with_recorded_experts(tokenizer, tmp_path):
    model = tiny("mixtral", vocab_size=300)
    rows = [{"prompt": "to the", "chosen": " old mill", "rejected": " Brücke"}] * 4
    args = arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=4, logging_steps=1)
    run = trl.DPOTrainer(
        model=model,
        ref_model=tiny("mixtral", vocab_size=300),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    with record_routing(run.ref_model) as recorder, torch.no_grad():
        for row in run.train_dataset:
            for answer in ("chosen_ids", "rejected_ids"):
                run.ref_model(torch.tensor([row["prompt_ids"] + row[answer]]), use_cache=False)
    run.add_callback(RoutingReplayCallback(recorder.store))
    run.train()
    assert any(entry.get("replay/coverage") == 1 for entry in run.state.log_history)
