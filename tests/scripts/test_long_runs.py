"""scripts/finetune.py is killed in a long run with every means, goes on to equal weights, and ends at a collapse in one line."""

import os
import signal
import subprocess
import sys

import torch
from safetensors.torch import load_file

from tests.builders import tiny_model
from tests.scripts.test_finetune import KILL, RANDOM, RECIPES, ROOT, finetune, history, mistake, small


def test_a_killed_run_resumes_exactly(text_file, tokenizer, tmp_path, monkeypatch, capsys):
    """The process is killed while it writes the second checkpoint."""
    torch.use_deterministic_algorithms(False)  # as in the process that is killed
    tiny_model(**RANDOM).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = (
        "--max_length 32 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 8 --save_steps 2"
    )
    flags += (
        " --save_strategy steps --learning_rate 1e-2 --use_cpu --disable_tqdm true --sample_steps 3 --sample_tokens 4"
    )
    flags += " --logging_steps 2 --gradient_checkpointing false"
    shared = [RECIPES / "long_run.yaml", "--model_name_or_path", tmp_path / "model", "--data", f"wiki={text_file}"]
    shared += [*flags.split(), "--role_rates", "router=0.5", "expert=load"]
    finetune(monkeypatch, *shared, "--output_dir", tmp_path / "whole")
    flags = [*shared, "--output_dir", tmp_path / "killed"]
    command = [sys.executable, "-c", KILL, "_save_rng_state", 4, ROOT / "scripts" / "finetune.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([str(part) for part in command], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-4" / "router_average.pt").is_file()
    assert not (tmp_path / "killed" / "checkpoint-4" / "trainer_state.json").is_file()
    finetune(monkeypatch, *flags, "--resume_from_checkpoint", "true")
    assert history(tmp_path / "killed", "checkpoint-8") == history(tmp_path / "whole", "checkpoint-8")
    for file in ("model.safetensors", "checkpoint-8/model.safetensors"):
        expected, weights = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    first, second = (
        torch.load(tmp_path / name / "checkpoint-8" / "optimizer.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    assert first["param_groups"] == second["param_groups"]
    for number, state in first["state"].items():
        assert all(torch.equal(value, second["state"][number][key]) for key, value in state.items())
    assert "sample/0" in capsys.readouterr().out


def test_a_collapse_ends_the_command_in_one_line(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    flags = ["--collapse_steps", "1", "--collapse_patience", "2", "--collapse_violation", "0.01"]
    line = mistake(monkeypatch, capsys, *small(checkpoint, text_file, tmp_path / "out"), *flags)
    assert line.startswith("finetune.py: step 2: the routing of layer_00 (MaxVio")
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert not (tmp_path / "out" / "model.safetensors").exists()
