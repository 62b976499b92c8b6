# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""The record of a fine-tuning has the settings, the losses and the numbers of parameters that a model card shows."""

import json

import pytest
from peft import get_peft_model

from modeling_moe.data import DataArguments
from modeling_moe.lora import moe_lora_config, trainable_parameters
from modeling_moe.training import FinetuneArguments, LoraArguments, ModelArguments, finetune, trained_parameters
from modeling_moe.training.record import logged_losses
from tests.builders import sample_text, tiny_model, train_tokenizer


def test_losses_are_means_of_quarters_by_name():
    log = [{"loss": float(step), "routing/z_loss": 10.0 - step, "routing/max_violation": 9.0} for step in range(1, 9)]
    log += [
        {"eval_loss": 7.0, "eval_wiki_loss": 7.0},
        {"train_loss": 4.5, "train_runtime": 1.0},
        {"learning_rate": 1.0},
    ]
    losses = {name: tuple(change) for name, change in logged_losses(log).items()}
    assert losses == {"loss": (1.5, 7.5), "routing/z_loss": (8.5, 2.5)}
    assert logged_losses([{"loss": 3.0}])["loss"] == (3.0, 3.0)
    assert logged_losses([]) == {}


def test_the_trained_share_is_of_the_model_without_the_adapter():
    """PEFT counts the adapter in the denominator too, so its percentage is another number."""
    model = tiny_model()
    total = model.num_parameters()
    config = moe_lora_config(model, r=4)
    expected = trainable_parameters(model, config)
    adapted = get_peft_model(model, config)
    counts = trained_parameters(adapted)
    assert sum(all_ for _, all_ in counts.values()) == total
    assert sum(trained for trained, _ in counts.values()) == sum(expected.values())
    theirs_trained, theirs_all = adapted.get_nb_trainable_parameters()
    assert theirs_trained == sum(expected.values())
    assert theirs_all > total


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_record_of_a_run(method, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    train_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(sample_text(200), encoding="utf-8")
    args = FinetuneArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    finetune(
        ModelArguments(str(tmp_path / "model"), method=method, eval_fraction=0),
        DataArguments([f"wiki={tmp_path / 'text.txt'}"], max_length=32),
        LoraArguments(lora_r=2, lora_target_modules=["q_proj"]),
        args,
    )
    record = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert (record["max_length"], record["batch_size"], record["tokens"]) == (32, 6, 2 * 6 * 32)
    assert record["data"] == {"wiki": str(tmp_path / "text.txt")}
    assert record["loss"]["loss"].keys() == {"first", "last"}
    assert record["parameters"] == tiny_model().num_parameters()
    if method == "lora":
        assert (record["lora_r"], record["lora_target_modules"], record["lora_alpha"]) == (2, ["q_proj"], 32)
        assert 0 < record["trained_parameters"] < record["parameters"]
    else:
        assert not [name for name in record if "lora" in name]
        assert record["trained_parameters"] == record["parameters"]
