"""These tests merge saved adapters, compare the result with base and adapter, and check what is refused."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_moe import MoEForCausalLM
from modeling_moe.conversion import convert_checkpoint
from modeling_moe.lora import moe_lora_config
from modeling_moe.lora.merging import MergeArguments, merge_adapter
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config, train_tokenizer
from tests.lora.checkpoints import TARGETS, build, fill, train


SCRIPT = Path(__file__).parents[2] / "scripts" / "merge_adapter.py"
IDS = torch.arange(3, 39).view(2, 18)
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": TARGETS}


def model_of(kind: str):
    """Returns a dense model, a MoE of transformers, or a MoE of this package."""
    return MoEForCausalLM(tiny_config(vocab_size=64)) if kind == "moe" else build(kind)


def save_adapter(folder: Path, kind: str, dtype=torch.float32, **fields) -> torch.Tensor:
    """Saves a base model and an adapter, and returns the logits of the adapted model."""
    model_of(kind).to(dtype).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, **(EXPERTS | fields)))
    fill(model, 0.2, only="lora_")
    train(model.float() if dtype == torch.float32 else model, steps=1)
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return model.eval()(IDS).logits


def merge(folder: Path, **fields):
    return merge_adapter(MergeArguments(str(folder / "adapter"), str(folder / "merged"), **fields))


CASES = {
    "moe": ("moe", {}),
    "moe-router": ("moe", {"modules_to_save": ["gate"], "target_parameters": TARGETS}),
    "moe-embedding": ("moe", {"modules_to_save": ["embed_tokens"]}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-router": ("qwen3_moe", {"target_parameters": [*TARGETS, "mlp.gate.weight"]}),
    "mixtral": ("mixtral", {}),
    "olmoe": ("olmoe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "qwen3": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "target_parameters": None}),
    "llama-dora": ("llama", {"target_modules": "all-linear", "target_parameters": None, "use_dora": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_merged_folder_computes_what_base_and_adapter_compute(name, tmp_path):
    kind, fields = CASES[name]
    expected = save_adapter(tmp_path, kind, **fields)
    merge(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert (AutoModelForCausalLM.from_pretrained(tmp_path / "base")(IDS).logits - expected).abs().max() > 1e-3
        torch.testing.assert_close(model.eval()(IDS).logits, expected, atol=5e-6, rtol=1e-5)


def test_experts_and_routers_trained_by_our_recipe_are_merged(tmp_path):
    model_of("moe").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, moe_lora_config(base, r=2, experts=True, router=True))
    fill(model, 0.2, only="lora_")
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(IDS).logits, model.eval()(IDS).logits, atol=5e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_adapter_that_peft_trained_without_this_package_is_merged(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "other", kind)
    paths = [tmp_path / "base", tmp_path / "other" / "adapter", tmp_path / "adapter", tmp_path / "logits.pt"]
    script = [sys.executable, Path(__file__).with_name("checkpoints.py"), *map(str, paths)]
    subprocess.run(script, check=True, cwd=tmp_path)
    merge(tmp_path)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(logits, torch.load(tmp_path / "logits.pt")["here"], atol=5e-6, rtol=1e-5)


def test_the_base_models_dtype_is_kept_and_rounded_to_once(tmp_path):
    save_adapter(tmp_path, "moe", dtype=torch.bfloat16)
    merged = merge(tmp_path)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors["model.layers.0.mlp.experts.1.down_proj.weight"].dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    for (key, got), expected in zip(merged.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got.float(), expected, atol=1e-3, rtol=2**-7, msg=key)


def test_tokenizer_and_generation_config_come_along(tmp_path):
    tokenizer = train_tokenizer()
    base = MoEForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    base.generation_config.temperature = 0.3
    base.generation_config.do_sample = True
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(**EXPERTS)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    merge(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("über").input_ids == tokenizer("über").input_ids
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.temperature == 0.3
    assert (tmp_path / "merged" / "modeling_moe.py").is_file()


def test_the_adapters_own_tokenizer_comes_before_the_bases(tmp_path):
    save_adapter(tmp_path, "llama", target_parameters=None)
    for name in ("base", "adapter"):
        tokenizer = train_tokenizer()
        tokenizer.chat_template = name
        tokenizer.save_pretrained(tmp_path / name)
    merge(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "adapter"


DAMAGE = {
    "garbled": ({"adapter_model.safetensors": b"x" * 100}, "the adapter of .* cannot be loaded"),
    "truncated": (
        {"adapter_model.safetensors": b"\x08" + b"\0" * 7 + b"{}      "[:4]},
        "the adapter of .* cannot be loaded",
    ),
    "gone": ({"adapter_model.safetensors": None}, "has no adapter_model.safetensors"),
    "a pickle of junk": ({"adapter_model.safetensors": None, "adapter_model.bin": b"junk"}, "cannot be loaded"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_of_an_adapter_are_one_sentence(tmp_path, kind):
    """Each kind of damage ends in one line, without a traceback or a request to the Hub."""
    save_adapter(tmp_path, "llama", target_parameters=None)
    files, message = DAMAGE[kind]
    for name, content in files.items():
        file = tmp_path / "adapter" / name
        file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        merge(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_holds_nan_is_named(tmp_path):
    save_adapter(tmp_path, "llama", target_parameters=None)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{name} in .* holds NaN or infinity"):
        merge(tmp_path)


@pytest.mark.parametrize("name", ["finetuning.json", "adapter_model.safetensors"])
def test_a_link_beside_an_adapter_brings_nothing_of_this_machine(tmp_path, name):
    """A file of the adapter that is a link out of the folder is refused, and nothing is written."""
    save_adapter(tmp_path, "llama", target_parameters=None)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "adapter" / name).unlink(missing_ok=True)
    (tmp_path / "adapter" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"{name} is a link that leads outside the folder"):
        merge(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    save_adapter(tmp_path, "llama", target_parameters=None)
    with pytest.raises(UserError, match="holds an adapter: merge that one first"):
        merge(tmp_path, base_model=str(tmp_path / "adapter"))


def test_further_tokens_of_the_adapter_are_kept(tmp_path):
    model_of("moe").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, LoraConfig(**EXPERTS, modules_to_save=["embed_tokens", "lm_head"]))
    fill(model, 0.2, only="lora_")
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path)
    ids = IDS + 31
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, atol=5e-6, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(tmp_path, "moe")
    MoEForCausalLM(
        tiny_config(vocab_size=64, num_hidden_layers=2, mlp_layer_types=["sparse", "dense"])
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"for which the base model has no place: give the model that it was trained on"
    ):
        merge(tmp_path, base_model=str(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path):
    save_adapter(tmp_path, "moe")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith("q_proj.lora_B.weight")))
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"does not fit the base model\. Found missing adapter keys .*q_proj\.lora_B"):
        merge(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_what_is_no_weight_is_refused(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(UserError, match="PROMPT_TUNING, which cannot be merged into weights"):
        merge(tmp_path)


def test_convert_names_the_command_that_merges_an_adapter(tmp_path):
    save_adapter(tmp_path, "llama", target_parameters=None)
    with pytest.raises(UserError, match=r"is an adapter of .*base: merge it first: moe merge_adapter"):
        convert_checkpoint(str(tmp_path / "adapter"), tmp_path / "moe")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "/nowhere"], "there is no such folder"),
        (
            ["--model_name_or_path", "{}/base"],
            "holds a whole model and no adapter: use it as it is, or train with `moe finetune --merge_lora false`",
        ),
        (["--model_name_or_path", "{}/adapter", "--base_model", "/nowhere"], "there is no such folder"),
        (["--model_name_or_path", "{}/adapter", "--output_dir", "{}/base/x"], "contain each other"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    save_adapter(tmp_path, "llama", target_parameters=None)
    flags = [flag.format(tmp_path) for flag in flags]
    output = [] if "--output_dir" in flags else ["--output_dir", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", ["merge_adapter.py", *flags, *output])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    complaint = [line for line in capsys.readouterr().err.splitlines() if line.startswith("merge_adapter.py: ")]
    assert stop.value.code == 2
    assert len(complaint) == 1
    assert message in complaint[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_script_merges_and_prints_what_came_out(tmp_path, monkeypatch, capsys):
    save_adapter(tmp_path, "moe")
    flags = ["--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", ["merge_adapter.py", *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert f"{model.num_parameters():,}" in capsys.readouterr().out
