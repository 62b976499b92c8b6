# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A wheel, installed where no repository is near, runs every command of `moe` on tiny models."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.commands.main import COMMANDS
from tests.builders import sample_text, tiny_config, train_tokenizer


ROOT = Path(__file__).parents[2]
FOLDERS = ("modeling_moe", "scripts", "configuration", "model_cards")
# ends a process that opens a file of the repository, be it a module or data
GUARD = """
import os, sys
folders = tuple(os.path.join(os.path.realpath({root!r}), name) + os.sep for name in {folders!r})
def forbid(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and os.path.realpath(arguments[0]).startswith(folders):
        os.write(2, f"opened {{arguments[0]}}\\n".encode())
        os._exit(99)
sys.addaudithook(forbid)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


def inherited() -> dict[str, str]:
    """Returns this process's environment without PYTHONPATH, by which pip would take the clone for the installed wheel."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check", "--quiet"]
    result = subprocess.run(command, env=inherited(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Builds the wheel from a copy of the tree, since a build leaves files beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("wheel")
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built)
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """Returns a virtual environment with the wheel, which finds the other packages among those of this process."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    # a folder named in a .pth file is searched last, and its own .pth files, such as an editable install's, are not read
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "sitecustomize.py").write_text(GUARD.format(root=str(ROOT), folders=FOLDERS))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Returns a folder with a tiny dense model, a MoE, an adapter and a text."""
    folder, tokenizer = tmp_path_factory.mktemp("place"), train_tokenizer()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **size)).save_pretrained(folder / "dense")
    MoEForCausalLM(tiny_config(vocab_size=300)).save_pretrained(folder / "moe")
    # a new adapter has factors of zero, which export_adapter refuses
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(MoEForCausalLM.from_pretrained(folder / "moe"), config)
    adapted.save_pretrained(folder / "adapter")
    for name in ("dense", "moe", "adapter"):
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text(sample_text(200), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(environment, place) -> Run:
    """Runs a program of the environment in the folder with the models; fails where the program fails."""

    def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [environment / "bin" / program, *arguments],
            cwd=place,
            env=inherited() | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    return run_program


def test_the_wheel_has_every_module_and_file_of_data(wheel):
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT) for path in (ROOT / "modeling_moe").rglob("*.*") if path.is_file()}
    data = {Path("modeling_moe") / path.relative_to(ROOT) for path in (ROOT / "configuration").rglob("*.*")}
    benchmark = {path.relative_to(ROOT / "scripts") for path in (ROOT / "scripts" / "moe_benchmark").glob("*.py")}
    expected = {str(path) for path in package | data | benchmark if "__pycache__" not in path.parts}
    assert found == expected | {"moe_command/__init__.py"}


def test_a_process_that_opens_a_file_of_the_repository_ends(run):
    """Else the tests below show nothing."""
    result = run("python", "-c", f"open({str(ROOT / 'modeling_moe' / '__init__.py')!r})")
    assert result.returncode == 99
    result = run("python", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import modeling_moe")
    assert result.returncode == 99


def test_help_lists_the_commands_without_importing_torch(run):
    """torch and transformers take seconds to import."""
    script = "import sys, moe_command; sys.argv = ['moe', *sys.argv[1:]]; moe_command.main(); print(*sys.modules)"
    *printed, modules = run("python", "-c", script, "--help").stdout.splitlines()
    assert {"argparse", "torch", "transformers", "modeling_moe"}.isdisjoint(modules.split())
    commands = {line.split()[0] for line in printed if line.startswith("  ")}
    assert commands == set(COMMANDS)
    assert run("moe", "--help").stdout.splitlines() == printed
    mistake = run("moe", "upcyle")
    assert (mistake.returncode, mistake.stderr) == (
        2,
        "moe: 'upcyle' is no command: did you mean 'upcycle'? (see moe --help)\n",
    )


TEXT = ["--data", "wiki=text.txt", "--max_length", "32"]
TRAINING = ["--max_steps", "1", "--use_cpu", "--disable_tqdm", "true", "--eval_fraction", "0", *TEXT]
# command -> arguments, and what it prints
RUNS = {
    "upcycle": (["--model_name_or_path", "dense", "--output_dir", "up", "--num_experts", "2", "--verify"], "dense"),
    "plan": (["--model_name_or_path", "dense", "--num_experts", "2"], "memory to train"),
    "convert": (["--model_name_or_path", "dense", "--output_dir", "converted"], "sparse layers"),
    "resize": (["--model_name_or_path", "moe", "--output_dir", "larger", "--method", "grow"], "same function"),
    "finetune": (["sft_lora", "--model_name_or_path", "moe", "--output_dir", "tuned", *TRAINING], "training loss"),
    "merge_adapter": (["--model_name_or_path", "adapter", "--output_dir", "merged"], "parameters"),
    "export_adapter": (["--model_name_or_path", "adapter", "--output_dir", "served", "--merged"], "when served"),
    "eval": (["--model_name_or_path", "moe", *TEXT], "bits per byte"),
    "report": (["--model_name_or_path", "moe", *TEXT, "--output_json", "load.json"], "experts in use"),
    "generate": (["--model_name_or_path", "moe", "--prompt", "the old", "--max_new_tokens", "2"], "the old"),
    "chat": (["--model_name_or_path", "moe", "--prompt", "the old", "--max_new_tokens", "2"], "the old"),
    "push": (["--model_name_or_path", "moe", "--repo_id", "you/moe", "--dry_run", "--license", "mit"], "router.py"),
    "presets": ([], "olmoe_1b_7b"),
    "benchmark": (
        ["--presets", "tiny", "--dtypes", "float32", "--tokens", "24", "--modes", "forward", "--rounds", "1"],
        "experts tiny float32 T=24",
    ),
    "env": (["--json"], '"grouped_mm"'),
}


def test_every_command_is_run():
    # tests/serving runs the server, which ends only when it is stopped
    assert set(RUNS) == set(COMMANDS) - {"serve"}


# runs commands in one process, since each start imports torch and transformers, and prints a line of JSON for each command
IN_ONE_PROCESS = """
import contextlib, io, json, sys
import moe_command

for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv, code, printed, complaints = ["moe", name, *arguments], 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        try:
            moe_command.main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([name, code, printed.getvalue(), complaints.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def results(run) -> dict[str, tuple[int, str, str]]:
    """Returns each command's exit code, standard output and standard error; fails where the process ends early."""
    arguments = {name: flags for name, (flags, _) in RUNS.items()}
    process = run("python", "-c", IN_ONE_PROCESS, json.dumps(arguments))
    assert process.returncode == 0, process.stderr
    return {name: tuple(rest) for name, *rest in map(json.loads, process.stdout.splitlines())}


@pytest.mark.parametrize("command", RUNS)
def test_command(command, results):
    code, printed, complaints = results[command]
    assert not code, complaints
    assert RUNS[command][1] in printed


def test_a_new_model_is_made_from_the_name_of_a_preset(run, place):
    """A module is what `accelerate launch -m` and `torchrun -m` start."""
    flags = ["pretrain", "--model_name_or_path", "moe_tiny", "--tokenizer_name", "dense", "--output_dir", "new"]
    result = run("python", "-m", "modeling_moe", "finetune", *flags, *TRAINING)
    assert result.returncode == 0, result.stderr
    assert json.loads((place / "new" / "config.json").read_text())["num_experts"] == 8
