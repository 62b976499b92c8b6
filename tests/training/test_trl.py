"""These tests run TRL's trainers, which bypass the model's head: router losses, biases, and saved models."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from modeling_moe.router_balancing import RouterTotals
from modeling_moe.training import CollapseStop, RouterAverageMixin, SampleCallback, moe_muon, scale_by_load
from tests.builders import tiny_model, training_arguments
from tests.training.families import tiny
from tests.training.test_restoring import differing, shards


trl = pytest.importorskip("trl")

RATE = 0.125
BIAS = {"router_selection_bias": True, "router_bias_update_rate": RATE}
SUMS = {
    "router_z_loss_coef": 0.3,
    "router_entropy_loss_coef": 2.0,
    "router_aux_loss_coef": 100.0,
    "router_aux_loss_scope": "sequence",
}
NONE = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
COMMON = ("output_dir", "use_cpu", "max_steps", "max_grad_norm", "optim", "save_strategy", "disable_tqdm")
LENGTHS = (5, 9, 17, 6, 12, 8, 20, 7)


def rows() -> list[dict]:
    """Returns eight texts of unequal lengths."""
    return [{"input_ids": torch.randint(3, 300, (length,)).tolist()} for length in LENGTHS]


def arguments(config, tmp_path, **fields):
    """Returns TRL's arguments for one plain SGD step."""
    common = training_arguments(tmp_path).to_dict()
    defaults = {name: common[name] for name in COMMON} | {"per_device_train_batch_size": 8, "report_to": "none"}
    return config(**(defaults | {"bf16": False, "gradient_checkpointing": False} | fields))


class Recorder(TrainerCallback):
    """Keeps the routers' gradients as one vector, and the counts of the sparse layers for the controllers."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Copies gradients and counts."""
        gates = [gate for name, gate in model.named_parameters() if ".mlp.gate." in name and gate.grad is not None]
        self.routers = torch.cat([gate.grad.flatten() for gate in gates])
        totals = next(module for module in model.modules() if isinstance(module, RouterTotals)).kinds["mlp"]
        self.load = None if totals.statistics is None else totals.statistics.clone()


def sft(model, data: list[dict], tokenizer, tmp_path, peft_config=None, **fields) -> tuple:
    """Returns trainer and recorder after one step."""
    recorder = Recorder()
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, tmp_path, **fields),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[recorder],
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, recorder


def router_loss_gradients(data: list[dict]) -> torch.Tensor:
    """Returns the routers' gradients of the losses of `SUMS`, as the mean over single sequences, by autograd."""
    model = tiny_model(**SUMS).train()
    for row in data:
        loss = model.model(torch.tensor([row["input_ids"]]), attach_router_loss=False).router_loss
        (loss / len(data)).backward()
    return torch.cat([block.gate.weight.grad.flatten() for block in model.model.sparse_blocks()])


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("fields", [{}, {"label_smoothing_factor": 0.1}], ids=["labels", "label_smoothing"])
def test_sft_adds_the_router_losses_once_whatever_the_split(fields, split, tokenizer, tmp_path):
    data = rows()
    fields = fields | {"per_device_train_batch_size": 8 // split, "gradient_accumulation_steps": split}
    with_losses = sft(tiny_model(**SUMS), data, tokenizer, tmp_path, **fields)[1].routers
    without = sft(tiny_model(**NONE), data, tokenizer, tmp_path, **fields)[1].routers
    expected = router_loss_gradients(data)
    assert expected.norm() > 10 * without.norm()
    torch.testing.assert_close(with_losses - without, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_sft_without_padding_is_with_padding(tokenizer, tmp_path):
    data = rows()
    padded, free = (
        sft(tiny_model(**SUMS), data, tokenizer, tmp_path, max_length=None, padding_free=padding_free)[1].routers
        for padding_free in (False, True)
    )
    torch.testing.assert_close(free, padded, rtol=0, atol=1e-5 * padded.abs().max().item())


def test_a_saved_checkpoint_generates_in_batch(tokenizer, tmp_path):
    trainer, _ = sft(tiny_model(**SUMS), rows(), tokenizer, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert model.config.output_router_logits  # TRL saves the flag
    alone = torch.randint(3, 300, (1, 5))
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), alone], dim=1), torch.randint(3, 300, (1, 8))])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(alone, **options)[0, -4:]
    for cache in (None, "static"):
        text = model.generate(batch, attention_mask=mask, cache_implementation=cache, **options)
        assert text.shape == (2, 12)
        assert torch.equal(text[0, -4:], expected)


def test_lora_with_sft_trains_the_routers_and_moves_their_biases(tokenizer, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp.gate"], r=2)
    data = rows()
    fields = {"router_aux_loss_scope": "sequence", "router_aux_loss_coef": 100.0}
    trainer, recorder = sft(tiny_model(**BIAS, **fields), data, tokenizer, tmp_path, config)
    _, without = sft(tiny_model(**BIAS, **NONE), data, tokenizer, tmp_path, config)
    assert recorder.routers.norm() > 10 * without.routers.norm()
    buffers = trainer.model.merge_and_unload().named_buffers()
    biases = torch.stack([buffer for name, buffer in buffers if name.endswith("e_score_correction_bias")])
    load = recorder.load
    assert load.sum() == 2 * 3 * sum(LENGTHS)
    torch.testing.assert_close(biases, RATE * torch.sign(load.mean(dim=-1, keepdim=True) - load))


PREFERENCES = [
    {"prompt": "der Weg", "chosen": " führt über die Brücke", "rejected": " to the old mill to"},
    {"prompt": "the old mill the old", "chosen": " 日本", "rejected": " Weg"},
    {"prompt": "über", "chosen": " the old", "rejected": " die Brücke die Brücke 🙂"},
    {"prompt": "to the", "chosen": " mill der Weg führt", "rejected": " old"},
]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_dpo_trains_the_routers_and_counts_no_reference_pass(adapter, tokenizer, tmp_path):
    gradients = []
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp.gate"], r=2) if adapter else None
    for split, coefficients in ((1, SUMS), (2, SUMS), (1, NONE)):
        recorder = Recorder()
        trainer = trl.DPOTrainer(
            model=tiny_model(**BIAS, **coefficients),
            ref_model=None if adapter else tiny_model(**BIAS),
            args=arguments(
                trl.DPOConfig, tmp_path, per_device_train_batch_size=4 // split, gradient_accumulation_steps=split
            ),
            train_dataset=Dataset.from_list(PREFERENCES),
            processing_class=tokenizer,
            callbacks=[recorder],
            peft_config=config,
        )
        trainer.train()
        gradients.append(recorder.routers)
        rows = trainer.train_dataset
        tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"] + row["rejected_ids"]) for row in rows)
        assert recorder.load.sum() == 2 * 3 * tokens
    whole, split, without = gradients
    assert whole.norm() > 10 * without.norm()
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5 * whole.abs().max().item())


@pytest.mark.slow
def test_sft_resumed_without_transformers_own_experts(tokenizer, tmp_path, monkeypatch):
    shards(monkeypatch)
    data, models = rows(), [tiny("mixtral", vocab_size=300) for _ in range(2)]
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    for model, resume in zip(models, (None, str(tmp_path / "checkpoint-2")), strict=True):
        args = arguments(trl.SFTConfig, tmp_path, learning_rate=0.1, lr_scheduler_type="constant", **steps)
        trainer = trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=resume)
    assert len(list((tmp_path / "checkpoint-2").glob("*.safetensors"))) > 1
    assert differing(*models) == []


class LongSFT(RouterAverageMixin, trl.SFTTrainer):
    """TRL's trainer with averaged routers."""


def test_a_long_run(tokenizer, tmp_path):
    """TRL's trainer takes groups by role, Muon, rates by load, averaged routers, samples and the stop at collapse."""
    model = tiny("mixtral", vocab_size=300)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = moe_muon(model, 1e-2, rates={"router": 0.5, "embedding": 0.0}, weight_decays={"embedding": 0.0})
    scale_by_load(model, optimizer)
    stop = CollapseStop(every=1, patience=3, min_entropy=0.0, max_violation=0.01)
    data = Dataset.from_list(rows())
    fields = {"max_steps": 6, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = LongSFT(
        model=model, args=arguments(trl.SFTConfig, tmp_path, **fields), train_dataset=data, eval_dataset=data,
        processing_class=tokenizer, callbacks=[stop], optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.average_routers(0.5)
    SampleCallback(["the old"], every=2, max_new_tokens=3).add_to(trainer)
    trainer.train()
    assert stop.reason.startswith("step 3: the routing of layer_00")
    assert [entry["step"] for entry in trainer.state.log_history if "sample/0" in entry] == [2]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "model.layers.0.mlp.experts.gate_up_proj" in changed
    assert not {name for name in changed if "embed" in name or "lm_head" in name}
    gate = model.model.layers[0].mlp.gate.weight
    with trainer.averaged():
        averaged = gate.detach().clone()
    assert not torch.equal(averaged, gate)
