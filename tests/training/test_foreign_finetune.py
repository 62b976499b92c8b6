"""These tests run `finetune` on transformers' own MoE models, which it balances."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from modeling_moe.training import (
    BalanceArguments,
    DataArguments,
    FinetuneArguments,
    LoraArguments,
    ModelArguments,
    balances_of,
    finetune,
)
from modeling_moe.utils.errors import UserError
from tests.builders import save_llama, tiny_model
from tests.training.test_foreign_bias import biases, random_model


class Spy(TrainerCallback):
    """Keeps what balances the model while it trains, and the last router losses."""

    settings = None
    losses: dict = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        """Reads the handle."""
        for handle in balances_of(model):
            self.settings, self.losses = handle.settings, handle.losses()


@pytest.fixture
def run(tmp_path, tokenizer, text_file):
    """Returns a function that saves a model, fine-tunes it for two steps, and returns the spy and the saved model."""

    def start(model, balance_args: BalanceArguments | None = None, lora: LoraArguments | None = None, **fields):
        source, out = tmp_path / "source", tmp_path / "out"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        args = FinetuneArguments(
            output_dir=str(out),
            use_cpu=True,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            disable_tqdm=True,
            report_to="none",
            **fields,
        )
        model_args = ModelArguments(
            str(source), method="full" if lora is None else "lora", dtype="float32", eval_fraction=0.2, overwrite=True
        )
        data = DataArguments(data=[f"wiki={text_file}"], max_length=16)
        spy = Spy()
        finetune(model_args, data, lora or LoraArguments(), args, [spy], balance_args)
        return spy, AutoModelForCausalLM.from_pretrained(out)

    return start


def test_the_loss_is_on_by_default_and_the_flag_switches_it_off(run):
    spy, saved = run(random_model("mixtral", vocab_size=300, router_aux_loss_coef=0.5))
    assert spy.settings.router_aux_loss_coef == 0.5
    assert spy.losses["balance"] > 1
    assert not saved.config.output_router_logits
    again, other = run(
        random_model("mixtral", vocab_size=300, router_aux_loss_coef=0.5), BalanceArguments(router_aux_loss_coef=0.0)
    )
    assert again.settings is None
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(saved.get_parameter(gate), other.get_parameter(gate))
    assert run(random_model("deepseek_v3", vocab_size=300))[0].settings is None  # its configuration has no coefficient


@pytest.mark.parametrize(("method", "warned"), [("full", True), ("merged", True), ("adapter", False)])
def test_a_fine_tuned_model_announces_no_layer_that_predicts_further_tokens(method, warned, run, tmp_path, caplog):
    """transformers drops these layers and keeps their number in config.json."""
    ours = logging.getLogger("modeling_moe")
    ours.addHandler(caplog.handler)
    lora = None if method == "full" else LoraArguments(merge_lora=method == "merged")
    run(random_model("deepseek_v3", vocab_size=300, num_mtp_layers=1), lora=lora)
    ours.removeHandler(caplog.handler)
    assert ("The fine-tuned model gets no layers that predict further tokens" in caplog.text) == warned
    config = tmp_path / "out" / "config.json"
    assert not config.exists() or json.loads(config.read_text())["num_nextn_predict_layers"] == 0


def test_a_fine_tuned_model_of_this_package_gets_no_layers_that_predict_further_tokens(run, tmp_path, caplog):
    ours = logging.getLogger("modeling_moe")
    ours.addHandler(caplog.handler)
    (tmp_path / "source").mkdir()
    save_file({"mtp.norm.weight": torch.ones(3)}, tmp_path / "source" / "mtp.safetensors")
    run(tiny_model())
    ours.removeHandler(caplog.handler)
    assert "The fine-tuned model gets no layers that predict further tokens" in caplog.text
    assert not list((tmp_path / "out").glob("mtp*"))


def test_the_bias_moves_and_is_saved(run):
    _, saved = run(random_model("deepseek_v3", vocab_size=300), BalanceArguments(router_bias_update_rate=0.125))
    (bias,) = biases(saved).values()
    assert {abs(x) for x in bias.tolist()} <= {0.0, 0.125, 0.25}
    assert bias.any()


def test_a_bias_that_an_adapter_would_lose_is_refused(run):
    rate = BalanceArguments(router_bias_update_rate=0.125)
    with pytest.raises(UserError, match="method full if the biases are not part of the routers"):
        run(random_model("minimax_m2", vocab_size=300), rate, LoraArguments(lora_r=2))  # held by the block
    with pytest.raises(UserError, match="set lora_router true"):
        run(random_model("deepseek_v3", vocab_size=300), rate, LoraArguments(lora_r=2, lora_router=False))
    _, merged = run(random_model("deepseek_v3", vocab_size=300), rate, LoraArguments(lora_r=2))
    assert any(x.any() for x in biases(merged).values())


def test_a_router_that_cannot_be_read_is_trained_without_the_loss(run, caplog):
    model = random_model("phimoe", vocab_size=300)
    with caplog.at_level(logging.WARNING):
        assert run(model)[0].settings is None
    assert "The run has no balance loss" in caplog.text
    with pytest.raises(UserError, match="neither softmax nor sigmoid"):
        run(model, BalanceArguments(router_aux_loss_coef=0.1))


def test_flags_that_nothing_reads_are_refused(run, tmp_path):
    flag = BalanceArguments(router_aux_loss_coef=0.1)
    with pytest.raises(UserError, match=r"set it in the model's config\.json"):
        run(tiny_model(), flag)
    dense = AutoModelForCausalLM.from_pretrained(save_llama(Path(tmp_path / "llama")))
    with pytest.raises(UserError, match="router_aux_loss_coef has no effect: LlamaForCausalLM is a dense model"):
        run(dense, flag)


@pytest.mark.parametrize("lora", [None, LoraArguments(lora_r=2)], ids=["full", "lora"])
def test_the_configuration_is_saved_unchanged_and_the_record_names_the_balance(lora, run, tmp_path):
    model = random_model("mixtral", vocab_size=300, router_aux_loss_coef=0.5, output_router_logits=True)
    run(model, BalanceArguments(router_z_loss_coef=0.25), lora)
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "source" / "config.json").read_text()
    record = json.loads((tmp_path / "out" / "finetuning.json").read_text())
    assert record["balance"] == {
        "router_aux_loss_coef": 0.5,
        "router_aux_loss_scope": "batch",
        "router_z_loss_coef": 0.25,
    }


def test_the_flag_switches_off_the_loss_that_the_configuration_asks_for(run, tmp_path):
    records = []
    for asks in (True, False):
        model = random_model("mixtral", vocab_size=300, router_aux_loss_coef=5.0, output_router_logits=asks)
        run(model, BalanceArguments(router_aux_loss_coef=0.0), eval_strategy="steps", eval_steps=1)
        records.append(json.loads((tmp_path / "out" / "finetuning.json").read_text()))
    assert not any("balance" in record for record in records)
    # the evaluation loss is the cross entropy in both runs
    assert records[0]["loss"]["loss"] == records[1]["loss"]["loss"]
    assert records[0]["eval_loss"] == records[1]["eval_loss"]


def test_a_resumed_run_in_bf16_keeps_the_bits_of_its_biases_and_weights(tmp_path, tokenizer, text_file):
    model = random_model("minimax_m2", vocab_size=300).bfloat16()
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == 2

    def start(folder: str, resume: str | None = None, *callbacks: TrainerCallback) -> dict:
        args = FinetuneArguments(
            output_dir=str(tmp_path / folder), use_cpu=True, max_steps=4, save_steps=2, report_to="none",
            per_device_train_batch_size=2, disable_tqdm=True, learning_rate=1e-2, resume_from_checkpoint=resume,
        )  # fmt: skip
        model_args = ModelArguments(str(tmp_path / "source"), dtype="bfloat16", eval_fraction=0.0)
        data = DataArguments(data=[f"wiki={text_file}"], max_length=16)
        rate = BalanceArguments(router_bias_update_rate=0.001)
        finetune(model_args, data, LoraArguments(), args, callbacks, rate)
        return load_file(tmp_path / folder / "model.safetensors")

    expected = start("whole")
    start("part", None, Stop())
    got = start("part", "true")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    moved = [tensor for name, tensor in got.items() if name.endswith("correction_bias")]
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in moved)
