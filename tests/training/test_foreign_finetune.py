"""These tests run `finetune` on transformers' own MoE models, which it balances."""

import logging
from pathlib import Path

import pytest
import torch
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
            str(source), method="full" if lora is None else "lora", dtype="float32", eval_fraction=0.0, overwrite=True
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
