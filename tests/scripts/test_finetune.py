"""These tests run scripts/finetune.py on a tiny model, which learns and is saved with the trained weights."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import modeling_moe
from modeling_moe.hub import check_without_package
from modeling_moe.monitoring.report import read_history
from tests.builders import tiny_model, train_tokenizer
from tests.data.test_documents import MARKED


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configuration" / "recipes"


def finetune(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "scripts" / "finetune.py"), run_name="__main__")


def small(checkpoint, text_file, output_dir, steps=12):
    flags = f"--max_length 32 --max_steps {steps} --learning_rate 1e-2 --use_cpu --disable_tqdm true"
    flags += " --gradient_accumulation_steps 2 --save_strategy steps --save_steps 6"
    paths = ["--model_name_or_path", checkpoint, "--data", f"wiki={text_file}", "--output_dir", output_dir]
    return [*paths, *flags.split()]


def mistake(monkeypatch, capsys, *flags) -> str:
    """Runs the script with flags that it refuses; returns the last line of standard error."""
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, *flags)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 40)[None]).logits


def held_out_loss(output: str) -> float:
    (line,) = [line for line in output.splitlines() if "held-out loss, wiki" in line]
    return float(line.split("│")[2])


def test_full(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    finetune(monkeypatch, RECIPES / "sft_full.yaml", *small(checkpoint, text_file, output))
    assert held_out_loss(capsys.readouterr().out) < 5.0
    saved = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logits(saved), logits(AutoModelForCausalLM.from_pretrained(output / "checkpoint-12")))
    assert not torch.allclose(logits(saved), logits(tiny_model()))
    assert saved.config.use_cache  # which `Trainer` turns off for checkpointing
    assert len(AutoTokenizer.from_pretrained(output)) == 300
    assert not (output / ".partial").exists()


def test_merged_lora_is_the_adapter_on_its_base(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    finetune(monkeypatch, RECIPES / "sft_lora.yaml", *small(checkpoint, text_file, output))
    assert held_out_loss(capsys.readouterr().out) < 5.5
    saved = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, output / "checkpoint-12")
    torch.testing.assert_close(logits(saved), logits(adapted), rtol=1e-4, atol=1e-4)
    assert saved.config.use_cache
    changed = {name for name, parameter in saved.named_parameters() if not torch.equal(parameter, before[name])}
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
    assert {next((part for part in parts if part in name), name) for name in changed} == set(parts)
    assert not (output / "adapter_config.json").exists()


def test_adapter(checkpoint, text_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    flags = ["--method", "lora", "--merge_lora", "false", "--lora_experts", "false", "--lora_router", "false"]
    finetune(monkeypatch, *small(checkpoint, text_file, output), *flags)
    assert (output / "adapter_config.json").exists()
    assert not (output / "config.json").exists()
    adapted = AutoModelForCausalLM.from_pretrained(output)
    assert not torch.allclose(logits(adapted), logits(tiny_model()))
    assert all(
        "experts" not in name and "gate" not in name for name, _ in adapted.named_parameters() if "lora" in name
    )


@pytest.mark.parametrize("weights", ["experts", "all"])
def test_adapter_on_weights_in_4_bits(weights, checkpoint, text_file, tmp_path, monkeypatch, capsys):
    """A run that was resumed ends with the adapter of one that was not; the adapter fits the 16-bit model too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    flags = ["--method", "lora", "--load_in_4bit", weights]
    assert "set merge_lora false" in mistake(
        monkeypatch, capsys, *small(checkpoint, text_file, tmp_path / "merged", steps=2), *flags
    )
    # outside training, bitsandbytes refuses linear layers this narrow on a CPU
    flags += ["--merge_lora", "false", "--eval_fraction", "0" if weights == "all" else "0.05"]
    finetune(monkeypatch, *small(checkpoint, text_file, tmp_path / "whole"), *flags)
    assert "experts" in capsys.readouterr().out
    finetune(monkeypatch, *small(checkpoint, text_file, tmp_path / "resumed"), *flags)
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-12")
    for file in tmp_path.glob("resumed/adapter_*"):
        file.unlink()
    finetune(
        monkeypatch, *small(checkpoint, text_file, tmp_path / "resumed"), *flags, "--resume_from_checkpoint", "true"
    )
    names = ("whole", "resumed")
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert not torch.allclose(logits(adapted), logits(tiny_model()))


def test_a_result_without_checkpoints_holds_the_log(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    flags = [
        *small(checkpoint, text_file, output),
        "--save_strategy",
        "no",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
    ]
    finetune(monkeypatch, *flags)
    entries = read_history(str(output))
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]
    assert not list(output.glob("checkpoint-*"))
    # the result has no optimizer to go on with
    assert "is not a complete checkpoint" in mistake(monkeypatch, capsys, *flags, "--resume_from_checkpoint", output)


# kills a process as `kill -9` does, when it calls a method of `Trainer` at a given step
KILL = """
import os, runpy, signal, sys
from transformers import Trainer
method, step, script, *sys.argv[1:] = sys.argv[1:]
original = getattr(Trainer, method)
def last(self, *args, **kwargs):
    if self.state.global_step == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
setattr(Trainer, method, last)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""
RANDOM = {
    "router_selection_bias": True,
    "router_bias_update_rate": 0.01,
    "router_jitter_noise": 0.1,
    "attention_dropout": 0.1,
}


def history(output: Path, checkpoint: str) -> list[dict]:
    """Returns the logged losses of a checkpoint with all digits."""
    log = json.loads((output / checkpoint / "trainer_state.json").read_text())["log_history"]
    return [
        {name: row[name] for name in ("step", "loss", "grad_norm", "learning_rate")} for row in log if "loss" in row
    ]


@pytest.mark.parametrize(
    ("method", "killed_in", "step"),
    # the first run is killed between two checkpoints, the second one while it writes a checkpoint in the second epoch
    [
        ("full", "training_step", 15),
        pytest.param("lora", "_save_rng_state", 16, marks=pytest.mark.slow),
    ],
)
def test_killed_run_resumes_exactly(method, killed_in, step, text_file, tokenizer, tmp_path, monkeypatch, capsys):
    torch.use_deterministic_algorithms(False)  # as in the process that is killed
    tiny_model(**RANDOM, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = f"--method {method} --max_length 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    flags += " --max_steps 20 --save_steps 4 --logging_steps 5 --eval_fraction 0 --use_cpu --disable_tqdm true"
    flags += " --learning_rate 1e-2 --save_strategy steps"
    shared = ["--model_name_or_path", tmp_path / "model", "--data", f"wiki={text_file}", *flags.split()]
    finetune(monkeypatch, *shared, "--output_dir", tmp_path / "whole")
    flags = [*shared, "--output_dir", tmp_path / "killed"]
    command = [sys.executable, "-c", KILL, killed_in, step, ROOT / "scripts" / "finetune.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([str(part) for part in command], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert "checkpoint-12" in left
    assert ("checkpoint-16" in left) == (killed_in == "_save_rng_state")
    finetune(monkeypatch, *flags, "--resume_from_checkpoint", "true")
    whole, resumed = (history(tmp_path / name, "checkpoint-20") for name in ("whole", "killed"))
    assert resumed == whole
    assert [row["step"] for row in whole] == [1, 4, 5, 8, 10, 12, 15, 16, 20]
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert any(weights[name].any() for name in weights if name.endswith("e_score_correction_bias"))


def test_resumes_transformers_own_experts(text_file, tokenizer, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    config = MixtralConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--eval_fraction", "0", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    for name, steps, more in [("whole", 4, []), ("parts", 2, []), ("parts", 4, ["--resume_from_checkpoint", "true"])]:
        paths = small(tmp_path / "model", text_file, tmp_path / name, steps=steps)
        finetune(monkeypatch, *paths, *flags, *more)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_overwrite_deletes_another_runs_checkpoints(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=6))
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=1), "--overwrite", "--save_steps", "1")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    error = mistake(monkeypatch, capsys, *small(output / "checkpoint-1", text_file, output), "--overwrite")
    assert "is a checkpoint in output_dir, which overwrite deletes" in error
    assert (output / "checkpoint-1" / "config.json").is_file()


def changed(checkpoint: Path, output: Path) -> set[str]:
    """Returns the names of the parameters that differ."""
    before = dict(AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters())
    after = AutoModelForCausalLM.from_pretrained(output).named_parameters()
    return {name for name, parameter in after if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize(("method", "part"), [("router", ".mlp.gate."), ("attention", ".self_attn.")])
def test_a_method_trains_its_part(method, part, checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    recipe = RECIPES / f"sft_{method}.yaml"
    finetune(monkeypatch, recipe, *small(checkpoint, text_file, output, steps=2))
    names = {name for name, _ in AutoModelForCausalLM.from_pretrained(checkpoint).named_parameters() if part in name}
    assert changed(checkpoint, output) == names
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ all")]
    size = sum(tiny_model().get_parameter(name).numel() for name in names)
    assert line.split("│")[2].strip() == f"{size:,}"


def test_method_without_its_part(text_file, tokenizer, tmp_path, monkeypatch, capsys):
    tiny_model(mlp_layer_types=["dense"] * 3).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    error = mistake(monkeypatch, capsys, *small(tmp_path / "dense", text_file, tmp_path / "out"), "--method", "router")
    assert "method router finds no router in this model" in error


def test_frozen_experts_stay(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output, experts = tmp_path / "out", (0, 1, 3)
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=3), "--freeze_experts", "0-1,3")
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (checkpoint, output))
    for name, tensor in after.items():
        if ".experts." in name:
            same = [expert for expert in range(5) if torch.equal(tensor[expert], before[name][expert])]
            assert tuple(same) == experts
    error = mistake(monkeypatch, capsys, *small(checkpoint, text_file, tmp_path / "two"), "--freeze_experts", "4-5")
    assert "cannot be frozen: name some of the 5 there" in error


def test_nan_stops_and_keeps_the_checkpoint(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    flags = ["--save_steps", "1", "--learning_rate", "1e30", "--lr_scheduler_type", "constant"]
    error = mistake(monkeypatch, capsys, *small(checkpoint, text_file, output), *flags)
    assert error.startswith("finetune.py: step 2: ")
    assert " model." in error
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert len(history(output, "checkpoint-1")) == 1
    assert not (output / "model.safetensors").exists()


def test_bad_weights_are_not_saved(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    flags = ["--save_steps", "1", "--learning_rate", "1e38", "--lr_scheduler_type", "constant"]  # 1e39 / 10 overflows
    error = mistake(monkeypatch, capsys, *small(checkpoint, text_file, output), *flags)
    assert error.startswith("finetune.py: step 1: the weight model.embed_tokens.weight is not finite; ")
    assert not list(output.glob("checkpoint-*"))


def test_conversations(text_file, tmp_path, monkeypatch, capsys, tokenizer):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = train_tokenizer()
    tokenizer.chat_template = MARKED
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "to the mill"}, {"role": "assistant", "content": "der Weg über die Brücke"}]
    (tmp_path / "chats").mkdir()
    for name in ("a", "b"):
        rows = "".join(json.dumps({"id": i, "messages": turns}) + "\n" for i in range(60))
        (tmp_path / "chats" / f"{name}.jsonl").write_text(rows)
    output = tmp_path / "out"
    finetune(
        monkeypatch,
        *small(tmp_path / "model", text_file, output),
        *["--data", f"chat={tmp_path / 'chats'}", f"wiki={text_file}", "--eval_fraction", "0.2"],
    )
    printed = capsys.readouterr()
    assert "held-out loss, chat" in printed.out
    assert "The loss is on ALL tokens" not in printed.err
    assert AutoTokenizer.from_pretrained(output).chat_template == MARKED


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_report_to_what_is_not_installed(name, checkpoint, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    error = mistake(monkeypatch, capsys, *small(checkpoint, text_file, tmp_path / "out"), "--report_to", name)
    assert f"requires {name} to be installed" in error
    assert not (tmp_path / "out").exists()


def test_same_seed_same_model(checkpoint, text_file, tmp_path, monkeypatch):
    for name in ("one", "two"):
        finetune(monkeypatch, *small(checkpoint, text_file, tmp_path / name, steps=2), "--method", "lora")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(logits(one), logits(two), rtol=0, atol=0)


def test_lora_without_the_routers_loses_no_bias(text_file, tokenizer, tmp_path, monkeypatch, capsys):
    tiny_model(**RANDOM).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--method", "lora", "--lora_router", "false"]
    error = mistake(monkeypatch, capsys, *small(tmp_path / "model", text_file, tmp_path / "out"), *flags)
    assert "lora_router false would lose the selection biases that the routers' controller" in error


def test_overwritten_adapter_leaves_nothing_behind(checkpoint, text_file, tmp_path, monkeypatch):
    output, lora = tmp_path / "out", ["--method", "lora", "--overwrite"]
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=1), *lora, "--merge_lora", "false")
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=1), *lora)
    assert not (output / "adapter_config.json").exists()
    assert [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]


def test_reloads_without_the_package(checkpoint, text_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    finetune(monkeypatch, *small(checkpoint, text_file, output, steps=1), "--method", "lora")
    assert check_without_package(output) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "wiki"], "write domain=source"),
        (["--data", "wiki=missing.txt"], "missing.txt does not exist"),
        (["--method", "qlora"], "it must be one of full, lora, router, attention"),
        (["--method", "router", "--freeze_experts", "0"], "freeze_experts needs method full"),
        (["--load_in_4bit", "experts"], "load_in_4bit needs method lora"),
        (
            ["--load_in_4bit", "experts", "--method", "lora", "--fsdp_size", "2"],
            "and each process holds the model",
        ),
        (["--freeze_experts", "3-1"], "freeze_experts '3-1' is not a list of experts"),
        (["--freeze_experts", "0,x"], "freeze_experts '0,x' is not a list of experts"),
        (["--resume_from_checkpoint", "missing"], "missing is not a complete checkpoint"),
        (["--report_to", "paper"], "paper is not supported"),
        (["--eval_fraction", "1.5"], "eval_fraction is 1.5"),
        (["--max_length", "100000"], "lower it"),
        (["--metric_for_best_model", "nope"], "metric_for_best_model nope is not computed: choose one of "),
        (["--eval_accumulation_steps", "0"], "eval_accumulation_steps is 0"),
        (["--label_names", "x"], "label_names is ['x']"),
        (["--max_length", "65"], "max_length is 65, more than the model's 64 positions"),
        (["--method", "lora", "--lora_target_modules", "wqkv"], "lora_target_modules wqkv match no layer"),
        (["--resume_from_checkpoint", "true"], "does not exist, omit resume_from_checkpoint"),
        (["--dtype", "float12"], "finetune.py: dtype 'float12' is unknown"),
        (["--learnin_rate", "1"], "learnin_rate"),
        (["--model_name_or_path", "/missing/model"], "/missing/model"),
    ],
)
def test_mistakes(flags, message, checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, *small(checkpoint, text_file, output), *flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_liger_kernel", "true"], "liger"),
        (["--optim", "galore_adamw"], "optim galore_adamw cannot be used"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type warmup_stable_decay cannot be used"),
        (["--max_steps", "-1", "--num_train_epochs", "0"], "no step was trained, so nothing is saved"),
    ],
)
def test_what_a_trainer_finds_late_is_refused_before_training(
    flags, message, checkpoint, text_file, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, *small(checkpoint, text_file, tmp_path / "out"), *flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_unknown_recipe_key(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("methode: full\n")
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, recipe, *small(checkpoint, text_file, tmp_path / "out"))
    assert exit_info.value.code == 2
    assert "methode" in capsys.readouterr().err


def test_occupied_output_dir(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, *small(checkpoint, text_file, output))
    assert exit_info.value.code == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["cpu", "cpu2", "single_gpu", "ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_reads_its_configuration(name):
    path = ROOT / "configuration" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == {"cpu": 1, "cpu2": 2, "single_gpu": 1}.get(name, 8)


@pytest.mark.slow
def test_two_processes(text_file, tokenizer, tmp_path):
    model, output = tiny_model(router_selection_bias=True, router_bias_update_rate=0.125), tmp_path / "out"
    model.save_pretrained(tmp_path / "biased")
    tokenizer.save_pretrained(tmp_path / "biased")
    config = ROOT / "configuration" / "accelerate" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--multi_gpu"]
    command += ["--num_processes", 2, "--main_process_port", 0, ROOT / "scripts" / "finetune.py", "--method", "lora"]
    command += small(tmp_path / "biased", text_file, output, steps=1)
    subprocess.run([str(part) for part in command], check=True)
    biases = [v for k, v in load_file(output / "model.safetensors").items() if k.endswith("e_score_correction_bias")]
    assert all((bias.abs() <= 0.125).all() and bias.any() for bias in biases)
    assert len(biases) == 2


def test_help_shows_examples(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, "--help")
    assert exit_info.value.code == 0
    assert "python scripts/finetune.py sft_lora --model" in capsys.readouterr().out


def test_a_result_records_its_base_model_data_and_license(checkpoint, text_file, tmp_path, monkeypatch):
    output, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    (checkpoint / "conversion.json").write_text('{"recipe": {"lineage": {"license": "mit"}}}')
    monkeypatch.chdir(tmp_path)
    flags = small("checkpoint", "sample.txt", output, steps=2)
    finetune(monkeypatch, *flags, "--method", "router", "--seed", "5")
    record = json.loads((output / "finetuning.json").read_text())
    loss, change = record.pop("eval_loss"), record.pop("loss")["loss"]
    assert all(5 < mean < 7 for mean in change.values())
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    routers = sum(p.numel() for name, p in model.named_parameters() if ".gate." in name)
    assert record == {
        "base_model": str(checkpoint.resolve()),
        "method": "router",
        "data": {"wiki": str((tmp_path / "sample.txt").resolve())},
        "steps": 2,
        "tokens": 2 * 16 * 32,
        "trained_parameters": routers,
        "parameters": model.num_parameters(),
        "max_length": 32,
        "batch_size": 16,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch_fused",
        "seed": 5,
        "modeling_moe_version": modeling_moe.__version__,
    }
    assert 5 < loss["wiki"] < 7
    assert (output / "conversion.json").read_bytes() == (checkpoint / "conversion.json").read_bytes()
    (checkpoint / "conversion.json").unlink()
    finetune(monkeypatch, *flags, "--overwrite")
    assert not (output / "conversion.json").exists()


def test_an_adapter_names_its_base_by_an_absolute_path(checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finetune(monkeypatch, *small("checkpoint", text_file, "out", steps=1), "--method", "lora", "--merge_lora", "false")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoint.resolve())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_recipes_raise_no_warning_of_deprecated_names(checkpoint, text_file, tmp_path, monkeypatch, recwarn):
    finetune(monkeypatch, RECIPES / "sft_full.yaml", *small(checkpoint, text_file, tmp_path / "out", steps=1))
    assert [str(w.message) for w in recwarn if "is deprecated and will be removed" in str(w.message)] == []


def test_bf16_on_a_cpu_needs_use_cpu(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    flags = [flag for flag in small(checkpoint, text_file, tmp_path / "out") if flag != "--use_cpu"]
    if not torch.cuda.is_available():
        assert "add --use_cpu true" in mistake(monkeypatch, capsys, *flags, "--bf16", "true")
