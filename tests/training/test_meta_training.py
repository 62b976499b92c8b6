"""These tests check that a `Trainer` meta-trains routers: its step is that of first-order MAML over the rows."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from modeling_moe import MoEForCausalLM
from modeling_moe.data import DataArguments
from modeling_moe.training import (
    FinetuneArguments,
    LoraArguments,
    MetaArguments,
    ModelArguments,
    adapt_router,
    finetune,
    router_parameters,
)
from modeling_moe.training.finetuning import FinetuneTrainer
from modeling_moe.training.meta_training import without_support_labels
from modeling_moe.utils.errors import UserError
from tests.builders import sample_text, tiny_config, tiny_model, train_tokenizer, training_arguments


ROWS = torch.randint(3, 99, (2, 14), generator=torch.Generator().manual_seed(1))
META = MetaArguments(meta_support_tokens=5, meta_learning_rate=2.0, meta_steps=2)


def test_a_step_is_that_of_first_order_maml(tmp_path):
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)).train()
    twin = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in router_parameters(model))
    data = without_support_labels(Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()}), 5)
    args = training_arguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.5, weight_decay=0.0
    )
    trainer = FinetuneTrainer(model=model, args=args, train_dataset=data, data_collator=default_data_collator)
    trainer.meta = META
    trainer.train()
    # the mean over the 16 predicted tokens of both rows, each at the weights that are adapted to the row
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    total = dict.fromkeys(router_parameters(twin), 0.0)
    for row in ROWS.split(1):
        with adapt_router(twin, row[:, :5], learning_rate=2.0, steps=2):
            logits = twin.eval()(row[:, 5:]).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, row[:, 6:].flatten(), reduction="sum") / 16
            gradients = torch.autograd.grad(loss, list(router_parameters(twin).values()))
        total = {name: total[name] + gradient for name, gradient in zip(total, gradients, strict=True)}
    for name, parameter in model.named_parameters():
        expected = before[name] - 0.5 * total[name] if name in total else before[name]
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5, msg=name)
        assert (name in total) == (not torch.equal(parameter, before[name]))


def test_the_inner_passes_have_the_mixed_precision_of_the_outer_one(tmp_path):
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config())
    twin = copy.deepcopy(model).eval()
    data = without_support_labels(Dataset.from_dict({"input_ids": ROWS.tolist(), "labels": ROWS.tolist()}), 5)
    args = training_arguments(tmp_path, per_device_train_batch_size=1, bf16=True)
    trainer = FinetuneTrainer(model=model, args=args, train_dataset=data, data_collator=default_data_collator)
    trainer.meta, passes, logits = META, [], []
    # accelerate wraps the model's forward pass, around that of the decoder
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append((kwargs["input_ids"], torch.is_autocast_enabled("cpu"))),
        with_kwargs=True,
    )
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output.detach().clone()))
    trainer.train()
    assert [(ids.shape[1], autocast) for ids, autocast in passes] == [(5, True), (5, True), (9, True)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(twin(passes[0][0]).logits, logits[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a tiny model, a tokenizer and a text."""
    folder = tmp_path_factory.mktemp("meta")
    tiny_model().save_pretrained(folder / "moe")
    train_tokenizer().save_pretrained(folder / "moe")
    (folder / "text.txt").write_text(sample_text(200))
    return folder


def run(folder, output, meta=META, method="router", **fields):
    defaults = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
    }
    args = FinetuneArguments(output_dir=str(output), use_cpu=True, report_to="none", **(defaults | fields))
    return finetune(
        ModelArguments(model_name_or_path=str(folder / "moe"), method=method),
        DataArguments(data=[f"text={folder / 'text.txt'}"], max_length=32),
        LoraArguments(),
        args,
        meta_args=meta,
    )


def test_a_run_is_recorded_and_differs_from_router_training(folder, tmp_path):
    run(folder, tmp_path / "meta")
    run(folder, tmp_path / "plain", MetaArguments())
    records = [json.loads((tmp_path / name / "finetuning.json").read_text()) for name in ("meta", "plain")]
    assert records[0]["meta_training"] == {"meta_support_tokens": 5, "meta_learning_rate": 2.0, "meta_steps": 2}
    assert "meta_training" not in records[1]
    source, meta, plain = (
        MoEForCausalLM.from_pretrained(path).state_dict()
        for path in (folder / "moe", tmp_path / "meta", tmp_path / "plain")
    )
    for name, tensor in source.items():
        router = ".mlp.gate." in name
        assert torch.equal(meta[name], tensor) != router
        assert torch.equal(meta[name], plain[name]) != router


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "full"}, "set method router in the place of full"),
        ({"per_device_train_batch_size": 2}, "set per_device_train_batch_size 1"),
        ({"meta": MetaArguments(meta_support_tokens=31)}, "must leave 2 tokens of max_length 32"),
    ],
)
def test_what_does_not_allow_it_is_refused(fields, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"meta_support_tokens": 1}, "must be at least 2"),
        ({"meta_support_tokens": 8, "meta_learning_rate": 0.0}, "must be positive"),
        ({"meta_steps": 2}, "has no effect without meta_support_tokens"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MetaArguments(**fields)
