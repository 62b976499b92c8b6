"""These tests resume a `Trainer` or load its best checkpoint, and compare the weights with an unbroken run."""

import functools

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer, TrainerCallback, default_data_collator

import modeling_moe.training
from modeling_moe.training.restoring import RestoreHook, RestoringError, restore_hook
from tests.builders import tiny_model, training_arguments
from tests.training.families import families, tiny


QUICK = ("deepseek_v3", "gpt_oss", "mixtral", "ours")
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in ("ours", *families())]


def make(kind: str) -> PreTrainedModel:
    return tiny_model() if kind == "ours" else tiny(kind)


def trainer(model: PreTrainedModel, output_dir, **fields) -> Trainer:
    ids = torch.randint(3, 60, (16, 9), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    defaults = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    defaults |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    args = training_arguments(output_dir, **(defaults | fields))
    return Trainer(model, args, default_data_collator, train_dataset=rows, eval_dataset=rows)


def shards(monkeypatch) -> None:
    """Makes models save shards of 20 kB, which divide the experts of a layer."""
    save = functools.partialmethod(PreTrainedModel.save_pretrained, max_shard_size="20KB")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


def differing(model: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    state = other.state_dict()
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_trainer_resumes_without_its_experts(kind, sharded, tmp_path, monkeypatch, caplog):
    if sharded:
        shards(monkeypatch)
    whole = make(kind)
    trainer(whole, tmp_path).train()
    assert (len(list((tmp_path / "checkpoint-2").glob("*.safetensors"))) > 1) == sharded
    resumed = make(kind)
    caplog.clear()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert restore_hook(resumed) is not None
    assert differing(resumed, whole) == []
    assert any(".experts." in name for name in differing(whole, make(kind)))
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


class Spoil(TrainerCallback):
    """Makes the evaluation loss rise with every step, so that the first checkpoint is the best."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Replaces the loss that the trainer compares."""
        metrics["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["mixtral", "ours", "qwen3_moe"])
def test_the_best_model_was_not_loaded(kind, sharded, tmp_path, monkeypatch, caplog):
    if sharded:
        shards(monkeypatch)
    best = make(kind)
    trainer(best, tmp_path / "best", max_steps=2).train()
    model, fields = make(kind), {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trained = trainer(model, tmp_path / "out", **fields)
    trained.add_callback(Spoil())
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-2")
    assert differing(model, best) == []
    assert "missing keys" not in caplog.text


def test_an_optimizer_keeps_the_parameters_that_are_restored(tmp_path):
    model = make("mixtral")
    trained = trainer(model, tmp_path, max_steps=2)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    trained.train()
    model.load_state_dict(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_names_of_the_model_itself_pass_as_they_are(tmp_path):
    model, other = make("mixtral"), make("mixtral")
    trainer(model, tmp_path)
    other.load_state_dict({name: tensor + 1 for name, tensor in other.state_dict().items()})
    model.load_state_dict(other.state_dict())
    assert differing(model, other) == []
    result = model.load_state_dict({"model.norm.weight": torch.ones(32)}, strict=False)
    assert "lm_head.weight" in result.missing_keys


def test_our_model_needs_no_callback_to_resume_and_to_load_the_best(tmp_path):
    modeling_moe.training.disable()
    whole, resumed = make("ours"), make("ours")
    trainer(whole, tmp_path).train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert restore_hook(resumed) is None
    assert differing(resumed, whole) == []
    best, middle = make("ours"), make("ours")
    trainer(middle, tmp_path / "middle", max_steps=2).train()
    fields = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trained = trainer(best, tmp_path / "best", **fields)
    trained.add_callback(Spoil())
    trained.train()
    assert differing(best, middle) == []


LACKS = {
    "mixtral": ["model.layers.1.block_sparse_moe.experts.10.w2.weight", "model.layers.0.block_sparse_moe.gate.weight"],
    "gpt_oss": ["model.layers.1.mlp.router.weight", "model.layers.0.mlp.experts.down_proj"],
    "qwen3_moe": ["model.layers.0.mlp.experts.3.up_proj.weight", "model.norm.weight"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in LACKS.items() for name in names])
def test_a_checkpoint_that_lacks_a_tensor_was_resumed_from(kind, name, tmp_path):
    trainer(make(kind), tmp_path, max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    model = make(kind)
    layer = name.rpartition(".experts")[0].removesuffix("block_sparse_moe")
    with pytest.raises(RestoringError, match="is not complete: it") as error:
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert layer in str(error.value)
    with pytest.raises(RuntimeError, match="Missing key"):
        make_hooked(kind).load_state_dict(tensors)


def make_hooked(kind: str) -> PreTrainedModel:
    model = make(kind)
    modeling_moe.training.MoECallback().on_init_end(None, None, None, model=model)
    assert isinstance(restore_hook(model), RestoreHook)
    return model


def test_model_init_resumed_without_its_experts(tmp_path):
    trainer(make("mixtral"), tmp_path, max_steps=2).train()
    resumed = trainer(make("mixtral"), tmp_path)
    by_init = Trainer(
        None, resumed.args, default_data_collator, resumed.train_dataset, model_init=lambda: make("mixtral")
    )
    with pytest.raises(RestoringError, match="model_init"):
        by_init.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_dense_model_is_left_alone(tmp_path):
    model = make("qwen3_moe")
    modeling_moe.training.MoECallback().on_init_end(None, None, None, model=model.lm_head)
    assert restore_hook(model.lm_head) is None


def test_a_wrapped_model_takes_the_names_on_disk(tmp_path):
    model, other = make_hooked("mixtral"), make("mixtral")
    other.load_state_dict({name: tensor * 2 for name, tensor in other.state_dict().items()})
    other.save_pretrained(tmp_path)
    saved = {f"module.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    wrapped = torch.nn.ModuleDict({"module": model})
    assert wrapped.load_state_dict(saved).missing_keys == []
    assert differing(model, other) == []


def test_what_transformers_cannot_turn_back_is_refused(monkeypatch):
    model = make_hooked("mixtral")
    monkeypatch.setattr("modeling_moe.training.restoring.revert_weight_conversion", lambda model, state: {})
    with pytest.raises(RestoringError, match=r"MixtralForCausalLM: .* other experts: load the model itself"):
        model.load_state_dict({"model.layers.0.block_sparse_moe.gate.weight": torch.ones(12, 32)}, strict=False)
