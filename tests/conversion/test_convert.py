"""A written checkpoint equals the source, and an unusable source is refused before any byte is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, BloomConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models import gpt2, llama, mixtral, qwen3_moe

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.conversion import convert_checkpoint, moe_config, open_checkpoint, to_moe, verify
from modeling_moe.utils.errors import UserError
from tests.builders import SIZE, tiny_config


CONFIGS = {
    "llama": llama.LlamaConfig(**SIZE),
    "llama-tied": llama.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "gpt2": gpt2.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mixtral": mixtral.MixtralConfig(**SIZE, num_local_experts=4),
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig(
        **SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
    ),
}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))


def save_source(name, folder, dtype=torch.float32, **arguments):
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()
    model.save_pretrained(folder, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_converted_folder(name, tmp_path):
    source = save_source(name, tmp_path / "source", max_shard_size="40KB")
    generation = '{"do_sample": true,  "temperature": 0.3, "eos_token_id": [2, 7]}'
    (tmp_path / "source" / "generation_config.json").write_text(generation)
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "source" / "tokenizer_config.json").write_text('{"any":  "thing"}')
    config = convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe").config
    assert (tmp_path / "moe" / "generation_config.json").read_text() == generation
    assert (tmp_path / "moe" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "moe" / "tokenizer_config.json").read_text() == '{"any":  "thing"}'
    assert {"modeling_moe.py", "router.py", "conversion.json"} <= {file.name for file in (tmp_path / "moe").iterdir()}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert config.num_params() == model.num_parameters() == source.num_parameters()
    torch.testing.assert_close(model.eval()(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["moe", "source"]


def test_there_and_back(tmp_path):
    source = save_source("qwen3_moe", tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    verification = convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", target="qwen3_moe").verification
    assert verification is None
    first, back = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(model) is type(source)
    assert torch.equal(model(IDS).logits, source(IDS).logits)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_bf16(dtype, tmp_path):
    stored = torch.bfloat16 if dtype == "auto" else torch.float32
    save_source("llama", tmp_path / "source", stored)
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", dtype=dtype)
    source, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16) for name in ("source", "moe")
    )
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {torch.bfloat16}
    assert torch.equal(model(IDS).logits, source(IDS).logits)


def test_to_moe_keeps_generation_config():
    source = AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    source.generation_config.temperature = 0.3
    model = to_moe(source)
    assert model.generation_config.temperature == 0.3
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_configuration_class_of_a_checkpoints_own_code_becomes_this_packages_class(tmp_path):
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    own_class = get_class_from_dynamic_module("configuration_moe.MoEConfig", str(tmp_path))
    source = own_class.from_pretrained(tmp_path)
    assert not isinstance(source, MoEConfig)
    config = moe_config(source)
    assert type(config) is MoEConfig
    expected = MoEConfig.from_pretrained(tmp_path)
    assert moe_config(expected) is expected
    assert {**config.to_dict(), "_name_or_path": ""} == {**expected.to_dict(), "_name_or_path": ""}


def test_verify_reports_the_difference_of_source_and_result(tmp_path):
    from tests.builders import train_tokenizer

    tokenizer = train_tokenizer()
    config = mixtral.MixtralConfig(**SIZE | {"vocab_size": len(tokenizer)}, num_local_experts=4)
    source = AutoModelForCausalLM.from_config(config)
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    verification = convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", check=True).verification
    assert verification.largest_difference < 1e-5
    assert verification.source_loss == pytest.approx(verification.result_loss, abs=1e-5)
    least, most = verification.router_spread
    assert 0 <= least < 1 < most <= 4
    with torch.no_grad():
        source.lm_head.weight.mul_(2)
    source.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    other = verify(tmp_path / "other", tmp_path / "moe")
    assert other.largest_difference > 0.1
    assert abs(other.source_loss - other.result_loss) > 1e-3


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE = {
    "missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        "no tensor for model.layers.1.mlp.up_proj.weight",
    ),
    "head": (lambda t: t.pop("lm_head.weight"), "no tensor for lm_head.weight: set tie_word_embeddings"),
    "left over": (lambda t: t.update(extra=torch.ones(2)), "a tensor extra that its config.json does not account for"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"model.norm.weight has shape \(31,\) where its config.json asks for \(32,\)",
    ),
    "quantised": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "model.norm.weight is int8, so this is a quantised source",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_source_is_refused(name, tmp_path):
    change, message = DAMAGE[name]
    save_source("llama", tmp_path / "source")
    change_tensors(tmp_path / "source", change)
    with pytest.raises(UserError, match=message):
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_quantised_config_is_refused(tmp_path):
    save_source("llama", tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": BitsAndBytesConfig(load_in_8bit=True).to_dict()}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantization_config is set .* dequantise the source first"):
        open_checkpoint(str(tmp_path / "source"))


def test_changed_file_is_refused(tmp_path):
    save_source("llama", tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    change_tensors(tmp_path / "moe", lambda t: t["model.norm.weight"].mul_(2))
    with pytest.raises(UserError, match=r"model.safetensors"):
        convert_checkpoint(str(tmp_path / "moe"), tmp_path / "back", target="qwen2_moe")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "gguf"}, "target 'gguf' is unknown: it must be moe, auto or one of mixtral"),
        ({"target": "mixtral"}, "target mixtral cannot hold this model"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
    ],
)
def test_unwritable_results_are_refused(arguments, message, tmp_path):
    save_source("llama", tmp_path / "source")
    with pytest.raises(UserError, match=message):
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", **arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_unknown_sources(tmp_path):
    with pytest.raises(UserError, match="model_type 'bloom' has no conversion: it must be one of deepseek, "):
        moe_config(BloomConfig())
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    with pytest.raises(UserError, match="there is no such folder"):
        convert_checkpoint(str(tmp_path / "nowhere"), tmp_path / "moe")
    save_source("llama", tmp_path / "source")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    with pytest.raises(UserError, match="is in this format already"):
        convert_checkpoint(str(tmp_path / "moe"), tmp_path / "again")


def test_full_output_dir_survives(tmp_path):
    save_source("llama", tmp_path / "source")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("1")
    for overwrite, message in ((False, r"output_dir .* is not empty"), (True, "holds precious, which no run of this")):
        with pytest.raises(UserError, match=message):
            convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", overwrite=overwrite)
        assert (tmp_path / "moe" / "precious").read_text() == "1"
    (tmp_path / "moe" / "precious").unlink()
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe", dtype="bfloat16", overwrite=True)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
