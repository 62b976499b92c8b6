# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""No command runs Python code that a checkpoint brings without --trust_remote_code true, whatever stdin answers."""

import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, dynamic_module_utils

from modeling_moe import MoEForCausalLM
from modeling_moe.commands.main import COMMANDS as MOE
from modeling_moe.commands.main import run_command
from modeling_moe.hub import check_without_package
from modeling_moe.utils.earlier_code import EARLIER
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_config, load_model, load_tokenizer
from modeling_moe.utils.trust import foreign_code, known_code
from tests.builders import tiny_config, train_tokenizer


SCRIPTS = Path(__file__).parents[1] / "scripts"
CODE = """
from pathlib import Path
Path({marker!r}).write_text("the code ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, *args, **kwargs):
    raise AssertionError("this generate is not asked for")
"""
KINDS = ("model", "model elsewhere", "tokenizer", "tokenizer elsewhere", "outside", "generate")
# a standard class can load these kinds of models, so no code is needed
NEEDLESS = ("generate",)
OUTPUT = ["--output_dir", "OUT"]
COMMANDS = {
    "generate": ["--prompt", "a", "--max_new_tokens", "1"],
    "chat": ["--prompt", "a", "--max_new_tokens", "1"],
    "eval_lm": ["--data", "text=TEXT", "--max_length", "16"],
    "finetune": ["--data", "text=TEXT", "--max_length", "16", "--max_steps", "1", "--use_cpu", "true", *OUTPUT],
    "convert": ["--verify", "true", *OUTPUT],
    "upcycle": ["--verify", "true", "--num_experts", "2", *OUTPUT],
    "resize": ["--method", "grow", *OUTPUT],
    "plan": ["--num_experts", "2"],
    "router_report": ["--data", "text=TEXT", "--max_length", "16"],
    "merge_adapter": [*OUTPUT],
    "export_adapter": [*OUTPUT],
    "serve": ["--port", "8767"],
    "push_to_hub": ["--repo_id", "you/evil", "--dry_run", "true", "--license", "mit"],
    "upcycling_table": ["--data", "text=TEXT"],
}


def edit_json(file: Path, **values) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | values))


def bring_code(folder: Path, kind: str, marker: Path) -> None:
    """Turns a Llama checkpoint into one whose config.json names code that writes `marker`."""
    code = CODE.format(marker=str(marker))
    place, module = folder, "evil"
    if kind == "outside":
        place, module = folder.parent, "../evil"
    if kind == "generate":
        place = folder / "custom_generate"
        place.mkdir()
    (place / ("generate.py" if kind == "generate" else "evil.py")).write_text(code)
    prefix = "someone/repo--" if kind.endswith("elsewhere") else ""
    if kind.startswith("tokenizer"):
        names = [f"{prefix}{module}.EvilTokenizer", None]
        edit_json(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": names})
    elif kind != "generate":
        names = {"AutoConfig": f"{prefix}{module}.EvilConfig", "AutoModelForCausalLM": f"{prefix}{module}.EvilModel"}
        edit_json(folder / "config.json", model_type="evil", auto_map=names)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("llama") / "model", train_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    sizes = {"hidden_size": 32, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(request, llama, tmp_path, monkeypatch):
    """Returns a checkpoint of a kind and the file that its code would write; stdin answers yes to everything."""
    folder, marker = tmp_path / "evil" / "model", tmp_path / "marker"
    shutil.copytree(llama, folder)
    bring_code(folder, request.param, marker)
    monkeypatch.setattr(dynamic_module_utils, "TIME_OUT_REMOTE_CODE", 15)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    return request.param, folder, marker


def run_script(monkeypatch, name: str, folder: Path) -> int:
    text = folder.parent / "text.txt"
    text.write_text("a text of some words, more words than a block has.\n" * 4000)
    if name in ("merge_adapter", "export_adapter"):
        (folder.parent / "adapter").mkdir()
        known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
        edit_json(folder.parent / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder), **known)
        save_file({"a": torch.zeros(1)}, folder.parent / "adapter" / "adapter_model.safetensors")
        folder = folder.parent / "adapter"
    if name == "serve":

        def instead(**options):
            assert not options["trust_remote_code"]

        monkeypatch.setattr("transformers.cli.serve.Serve", instead)
    places = {"text=TEXT": f"text={text}", "OUT": str(folder.parent / "out")}
    flags = ["--model_name_or_path", str(folder), *(places.get(flag, flag) for flag in COMMANDS[name])]
    try:
        start(monkeypatch, name, flags)
    except SystemExit as stop:
        return stop.code
    return 0


def start(monkeypatch, name: str, flags: list[str]) -> None:
    """Runs a script, or the command of `moe` that has no script."""
    script = SCRIPTS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [script.name, *flags])
    if script.exists():
        runpy.run_path(str(script), run_name="__main__")
    else:
        run_command(name, sys.argv)


def test_every_program_that_takes_a_model_is_tried():
    """This fails if a script or a command that takes a model is added without being tested here."""
    modules = {
        name: SCRIPTS.parent / "modeling_moe" / "commands" / f"{command.module}.py" for name, command in MOE.items()
    }
    scripts = {script.stem: script.read_text() for script in SCRIPTS.glob("*.py")}
    texts = dict(scripts)
    for script, text in scripts.items():
        if command := re.search(r'run_command\("(\w+)"', text):
            texts[script] = modules[command[1]].read_text()
    started = {command[1] for text in scripts.values() if (command := re.search(r'run_command\("(\w+)"', text))}
    texts |= {name: modules[name].read_text() for name in modules.keys() - started - {"presets"}}
    # the help of presets names the flag in an example
    taking = {name for name, text in texts.items() if "model_name_or_path" in text}
    assert {"upcycle", "eval_lm", "push_to_hub", "plan", "router_report"} <= taking
    assert taking <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_flag_that_its_refusal_names(name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, name, ["--help"])
    assert "--trust_remote_code [TRUST_REMOTE_CODE]" in capsys.readouterr().out


@pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_runs_code_without_the_flag(name, checkpoint, monkeypatch, capsys):
    """No script asks on stdin, and none runs the code."""
    kind, folder, marker = checkpoint
    code = run_script(monkeypatch, name, folder)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}.py: ")]
    assert not marker.exists()
    if code == 2:
        assert len(errors) == 1
    # merge_adapter copies the tokenizer without loading it, export_adapter and plan need none, and resize refuses a dense
    # model first
    without = ("merge_adapter", "export_adapter", "plan", "resize")
    if kind not in NEEDLESS and not (kind.startswith("tokenizer") and name in without):
        assert code == 2
        assert "--trust_remote_code true" in errors[0]


@pytest.mark.parametrize("checkpoint", [kind for kind in KINDS if kind not in NEEDLESS], indirect=True)
def test_loading_names_the_flag_and_asks_nothing(checkpoint):
    kind, folder, marker = checkpoint
    loaders = [load_tokenizer] if kind.startswith("tokenizer") else [load_config, load_model]
    for load in loaders:
        with pytest.raises(UserError, match="--trust_remote_code true"):
            load(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("checkpoint", KINDS, indirect=True)
def test_what_transformers_would_run_is_listed(checkpoint):
    kind, folder, _ = checkpoint
    listed = foreign_code(folder)
    expected = {
        "model": ["evil.py"],
        "tokenizer": ["evil.py"],
        "generate": ["custom_generate/generate.py"],
        "outside": ["config.json: ../evil.EvilConfig", "config.json: ../evil.EvilModel"],
        "model elsewhere": [
            "evil.py",
            "config.json: someone/repo--evil.EvilConfig",
            "config.json: someone/repo--evil.EvilModel",
        ],
        "tokenizer elsewhere": ["evil.py", "tokenizer_config.json: someone/repo--evil.EvilTokenizer"],
    }
    assert listed == expected[kind]


@pytest.mark.parametrize("kind", ["model", pytest.param("tokenizer", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trusted", [False, True])
def test_only_the_flag_decides_whatever_stdin_answers(kind, trusted, llama, tmp_path):
    folder, marker = tmp_path / "evil" / "model", tmp_path / "marker"
    shutil.copytree(llama, folder)
    bring_code(folder, kind, marker)
    flags = ["--model_name_or_path", folder, "--prompt", "a", "--max_new_tokens", "1"]
    flags += ["--trust_remote_code", "true"] if trusted else []
    command = [sys.executable, SCRIPTS / "generate.py", *flags]
    result = subprocess.run(command, input="y\n" * 1000, capture_output=True, text=True)
    assert marker.exists() == trusted
    assert result.returncode == (0 if trusted else 2), result.stderr
    assert trusted or result.stderr.count("--trust_remote_code true") == 1
    assert "Traceback" not in result.stderr


def test_own_code_is_known_by_its_hash_and_edited_code_is_not(tmp_path):
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    assert foreign_code(tmp_path) == []
    with open(tmp_path / "router.py", "a") as file:
        file.write("\n# a line more\n")
    assert foreign_code(tmp_path) == ["router.py"]
    with pytest.raises(UserError, match=r"router\.py.*--trust_remote_code true"):
        check_without_package(tmp_path)


def test_code_of_an_earlier_version_is_known_by_its_hash():
    for version, files in EARLIER.items():
        assert {"modeling_moe.py", "configuration_moe.py"} <= files.keys(), version
        assert all(digest in known_code()[name] for name, digest in files.items())


def test_own_code_under_a_foreign_name_is_foreign(tmp_path):
    """A known file under another name is foreign: router.py saved as attention.py is another program."""
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    shutil.copyfile(tmp_path / "router.py", tmp_path / "attention.py")
    assert foreign_code(tmp_path) == ["attention.py"]


@pytest.mark.parametrize("name", ["generate", "eval_lm", "finetune", "push_to_hub", "convert", "router_report"])
def test_a_foreign_router_of_our_own_model_type_does_not_run(name, tmp_path, monkeypatch, capsys):
    """The model type is this package's, but config.json names foreign code for the router."""
    folder, marker, tokenizer = tmp_path / "evil" / "model", tmp_path / "marker", train_tokenizer()
    MoEForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    names = json.loads((folder / "config.json").read_text())["auto_map"] | {"MoERouter": "evil.EvilModel"}
    edit_json(folder / "config.json", router_type="evil", auto_map=names)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 1000))
    assert run_script(monkeypatch, name, folder) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}.py: ")]
    assert len(errors) == 1
    assert not marker.exists()
