# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Tests that a checkpoint without one of its tensors is refused by the tensor's name, for all ways to store and load it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

from modeling_moe import MoEForCausalLM, MoEForSequenceClassification, MoEModel
from modeling_moe.checkpoint_damage import CheckpointError, refuse_missing
from tests.builders import tiny_config


IDS = torch.arange(3, 21).view(2, 9)
EXPERT = "model.layers.2.mlp.experts.3."
ROUTER = "model.layers.2.mlp.gate.weight"
ROUTERS = {
    "selection bias": {"scoring_func": "sigmoid", "router_selection_bias": True},
    "hash": {"router_type": "hash"},
    "remoe": {"router_type": "remoe"},
    "threshold": {"router_type": "expert_threshold"},
}


def edit(folder: Path, change, file: str = "model.safetensors") -> None:
    """Applies `change` to the tensors of a file and writes them again."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def lose(name: str):
    """Returns a function that removes all tensors whose names contain `name`."""
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if name in key]


def rename(old: str, new: str):
    """Returns a function that replaces `old` by `new` in all names."""
    return lambda tensors: [
        tensors.update({key.replace(old, new): tensors.pop(key)}) for key in list(tensors) if old in key
    ]


@pytest.fixture
def saved(tmp_path):
    """Returns the folder of a tiny model."""
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name",
    [
        ROUTER,
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        f"{EXPERT}up_proj.weight",
    ],
)
def test_one_missing_tensor_is_refused_by_name(saved, name):
    edit(saved, lose(name))
    with pytest.raises(CheckpointError, match=f"it has no {name}"):
        MoEForCausalLM.from_pretrained(saved)
    if name == "lm_head.weight":
        MoEModel.from_pretrained(saved)
        return
    with pytest.raises(CheckpointError, match=f"it has no {name.removeprefix('model.')}"):
        MoEModel.from_pretrained(saved)


@pytest.mark.parametrize("name", [".experts.", ".layers.", "."])
def test_all_experts_or_all_layers_missing_are_refused(saved, name):
    edit(saved, lose(name))
    with pytest.raises(CheckpointError, match=r"it has no .* \(and \d+ more\)"):
        MoEForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_missing_buffer_of_a_router_is_refused(kind, tmp_path):
    MoEForCausalLM(tiny_config(**ROUTERS[kind])).save_pretrained(tmp_path)
    names = [name for name in load_file(tmp_path / "model.safetensors") if "layers.2.mlp.gate." in name]
    assert names
    for name in names:
        shutil.copytree(tmp_path, tmp_path / name)
        edit(tmp_path / name, lose(name))
        with pytest.raises(CheckpointError, match=f"it has no {name}"):
            MoEForCausalLM.from_pretrained(tmp_path / name)


def test_an_expert_of_another_number_is_not_taken_for_the_missing_one(saved):
    edit(saved, rename("experts.1.", "experts.7."))
    with pytest.raises(CheckpointError, match=r"it has no model.layers.0.mlp.experts.1.down_proj.weight"):
        MoEForCausalLM.from_pretrained(saved)


def test_an_expert_too_many_is_named(saved):
    edit(saved, lambda t: t.update({k.replace("experts.1.", "experts.5."): t[k].clone() for k in list(t)}))
    with pytest.raises(CheckpointError, match=r"experts.5.down_proj.weight, beyond num_experts = 5"):
        MoEForCausalLM.from_pretrained(saved)


def test_a_bias_that_nothing_takes_is_refused(saved):
    edit(saved, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(48)}))
    for model_class in (MoEForCausalLM, MoEModel):
        with pytest.raises(CheckpointError, match=r"nothing takes its layers.1.self_attn.q_proj.bias"):
            model_class.from_pretrained(saved)


def test_layers_beyond_the_last_one_are_named_in_a_warning(saved, caplog):
    expected = MoEForCausalLM.from_pretrained(saved)(IDS).logits
    edit(saved, lambda t: t.update({k.replace("layers.1.", "layers.3."): t[k].clone() for k in list(t)}))
    assert torch.equal(MoEForCausalLM.from_pretrained(saved)(IDS).logits, expected)
    assert "has more than the 3 layers asked for: layers.3.input_layernorm.weight (and 8 more)" in caplog.text


def stored(kind: str, saved: Path, folder: Path, name: str) -> dict:
    """Stores a checkpoint without the tensor `name` in one of transformers' formats; returns the arguments to load it."""
    model = MoEForCausalLM.from_pretrained(saved)
    options: dict = {}
    if kind == "subfolder":
        options, place = {"subfolder": "sub"}, folder / "sub"
    else:
        place = folder
    if kind == "variant":
        options = {"variant": "old"}
    model.save_pretrained(place, max_shard_size="20KB" if kind == "sharded" else "5GB", variant=options.get("variant"))
    for file in place.glob("*.safetensors"):
        edit(place, lose(name), file.name)
    if kind == "bin":
        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
    if kind == "hub":
        commit = "0123456789" * 4
        cached = folder / "cache" / "models--us--model"
        shutil.copytree(place, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        options = {"cache_dir": str(folder / "cache"), "local_files_only": True}
    if kind in ("cpu", "meta"):
        options = {"device_map": kind}
    if kind == "bf16":
        options = {"dtype": torch.bfloat16}
    return options


@pytest.mark.parametrize("name", [ROUTER, f"{EXPERT}up_proj.weight"], ids=["router", "expert"])
@pytest.mark.parametrize("kind", ["sharded", "variant", "subfolder", "bin", "cpu", "meta", "bf16", "hub"])
def test_damage_is_named_however_it_is_stored_and_loaded(saved, tmp_path, kind, name):
    whole = stored(kind, saved, tmp_path / "whole", "nothing")
    MoEForCausalLM.from_pretrained("us/model" if kind == "hub" else tmp_path / "whole", **whole)
    options = stored(kind, saved, tmp_path / "damaged", name)
    with pytest.raises(CheckpointError, match=f"it has no {name}"):
        MoEForCausalLM.from_pretrained("us/model" if kind == "hub" else tmp_path / "damaged", **options)


def test_an_empty_state_dict_asks_for_a_new_model():
    model = MoEForCausalLM.from_pretrained(None, config=tiny_config(), state_dict={})
    assert model.lm_head.weight.std() > 0


def test_a_damaged_state_dict_is_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    MoEForCausalLM.from_pretrained(None, config=tiny_config(), state_dict=dict(tensors))
    for name in (ROUTER, "lm_head.weight", f"{EXPERT}up_proj.weight"):
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(CheckpointError, match=f"the checkpoint state_dict .* it has no {name}"):
            MoEForCausalLM.from_pretrained(None, config=tiny_config(), state_dict=left)


def test_a_folder_without_a_configuration_is_judged_by_the_one_that_is_given(saved):
    (saved / "config.json").unlink()
    MoEModel.from_pretrained(saved, config=tiny_config())
    edit(saved, lose(ROUTER))
    with pytest.raises(CheckpointError, match=f"it has no {ROUTER}"):
        MoEForCausalLM.from_pretrained(saved, config=tiny_config())


def test_a_damaged_base_under_an_adapter_is_refused(saved, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(MoEForCausalLM.from_pretrained(saved), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.save_pretrained(tmp_path / "adapter")
    MoEForCausalLM.from_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "damaged")
    lora = "layers.0.self_attn.q_proj.lora_B"
    edit(tmp_path / "damaged", lose(lora), "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"damaged .*it has no model.{lora}"):
        MoEForCausalLM.from_pretrained(tmp_path / "damaged")
    for name in (ROUTER, f"{EXPERT}up_proj.weight"):
        edit(saved, lose(name))
        with pytest.raises(CheckpointError, match=f"model .*it has no {name}"):
            MoEForCausalLM.from_pretrained(tmp_path / "adapter")


def test_a_damaged_checkpoint_in_4_bits_is_refused(saved, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = MoEForCausalLM.from_pretrained(saved, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model.save_pretrained(tmp_path / "small")
    MoEForCausalLM.from_pretrained(tmp_path / "small")
    edit(tmp_path / "small", lose("model.layers.1.input_layernorm.weight"))
    with pytest.raises(CheckpointError, match=r"it has no model.layers.1.input_layernorm.weight"):
        MoEForCausalLM.from_pretrained(tmp_path / "small")


def test_a_head_for_another_task_may_be_new(saved, tmp_path):
    decoder = MoEForCausalLM.from_pretrained(saved).model
    model = MoEForSequenceClassification.from_pretrained(saved, num_labels=3)
    assert torch.equal(model.model(IDS).last_hidden_state, decoder(IDS).last_hidden_state)
    model.save_pretrained(tmp_path / "classifier")
    # config.architectures names a language model
    MoEForCausalLM.from_pretrained(tmp_path / "classifier")
    decoder.save_pretrained(tmp_path / "headless")
    MoEForCausalLM.from_pretrained(tmp_path / "headless")


def test_a_head_that_was_saved_and_is_missing_is_refused(tmp_path):
    MoEForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"score.weight has shape \(3, 32\) .*\(5, 32\).*ignore_mismatched_sizes"
    ):
        MoEForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = MoEForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (5, 32)
    edit(tmp_path, lose("score.weight"))
    with pytest.raises(CheckpointError, match=r"it has no score.weight"):
        MoEForSequenceClassification.from_pretrained(tmp_path)


def test_ignore_mismatched_sizes_makes_no_new_experts(saved):
    with pytest.raises(CheckpointError, match="ignore_mismatched_sizes is for heads"):
        MoEForCausalLM.from_pretrained(saved, moe_intermediate_size=16, ignore_mismatched_sizes=True)


def test_parameters_that_an_argument_asks_for_are_not_made_up(saved):
    with pytest.raises(CheckpointError, match=r"it has no model.layers.0.mlp.gate.bias"):
        MoEForCausalLM.from_pretrained(saved, router_bias=True)
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp"):
        MoEForCausalLM.from_pretrained(saved, first_k_dense_replace=1)
    # a new selection bias is always 0
    model = MoEForCausalLM.from_pretrained(saved, router_selection_bias=True)
    assert not model.model.layers[0].mlp.gate.e_score_correction_bias.any()


def test_a_tied_head_is_not_missing(tmp_path):
    MoEForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    MoEForCausalLM.from_pretrained(tmp_path)
    edit(tmp_path, lose("embed_tokens"))
    with pytest.raises(CheckpointError, match="it has no"):
        MoEForCausalLM.from_pretrained(tmp_path)


def test_transformers_own_classes_are_refused_by_the_same_function(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model, info = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    refuse_missing(model, info, tmp_path, new_head=False)
    edit(tmp_path, lose("layers.1.block_sparse_moe.experts"))
    model, info = MixtralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    with pytest.raises(CheckpointError, match=r"it has no model.layers.1.block_sparse_moe.experts.0.w"):
        refuse_missing(model, info, tmp_path)


def test_a_head_is_not_new_where_none_may_be(tmp_path):
    MoEModel(tiny_config()).save_pretrained(tmp_path)
    model, info = MoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    with pytest.raises(CheckpointError, match=r"it has no lm_head.weight"):
        refuse_missing(model, info, tmp_path, new_head=False)


def test_without_architectures_a_head_for_a_task_may_be_new_and_a_language_models_not(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["architectures"]
    (saved / "config.json").write_text(json.dumps(config))
    edit(saved, lose("lm_head.weight"))
    MoEForSequenceClassification.from_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"it has no lm_head.weight"):
        MoEForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "state dict"])
@pytest.mark.parametrize("name", [ROUTER, EXPERT + "up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_were_written_as_integers_are_refused_by_name(saved, name, kind):
    """transformers would use the integers as weights without a warning: 0.3 would become 0."""
    edit(saved, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    where, options = saved, {}
    if kind != "safetensors":
        tensors, config = load_file(saved / "model.safetensors"), MoEForCausalLM.config_class.from_pretrained(saved)
        if kind == "bin":
            torch.save(tensors, saved / "pytorch_model.bin")
            (saved / "model.safetensors").unlink()
        else:
            where, options = None, {"state_dict": tensors, "config": config}
    with pytest.raises(CheckpointError, match=f"{name} is of integers or truth values"):
        MoEForCausalLM.from_pretrained(where, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_any_floating_type_are_taken(saved, dtype):
    edit(saved, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].to(dtype)}))
    got = MoEForCausalLM.from_pretrained(saved).model.layers[2].mlp.gate.weight
    assert torch.equal(got, load_file(saved / "model.safetensors")[ROUTER].float())
