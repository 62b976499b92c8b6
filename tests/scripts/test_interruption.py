"""A signal stops scripts/finetune.py, which saves a checkpoint, and a resumed run ends with the weights of an unstopped one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from modeling_moe.training.interruption import SaveOnInterrupt
from tests.builders import tiny_model
from tests.scripts.test_finetune import RANDOM, ROOT, finetune, small


def signals_at(monkeypatch, step: int, *numbers: int) -> None:
    """Makes the process send signals to itself in the middle of a step."""
    training_step, sent = Trainer.training_step, []

    def stop(self, *args, **kwargs):
        if self.state.global_step == step and not sent:
            sent.append(True)
            for number in numbers:
                os.kill(os.getpid(), number)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop)


def stopped(monkeypatch, capsys, *flags) -> str:
    """Runs the script until it is stopped; returns the last line of standard error."""
    with pytest.raises(SystemExit) as exit_info:
        finetune(monkeypatch, *flags)
    assert exit_info.value.code == 130
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint(number, text_file, tokenizer, tmp_path, monkeypatch, capsys):
    tiny_model(**RANDOM).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--save_strategy", "no", "--eval_fraction", "0"]
    model = tmp_path / "model"
    finetune(monkeypatch, *small(model, text_file, tmp_path / "whole", steps=5), *flags)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signals_at(patch, 2, number)
        line = stopped(patch, capsys, *small(model, text_file, tmp_path / "out", steps=5), *flags)
    assert line.startswith("finetune.py: stopped: step 3 is saved: to go on, add")
    assert "--resume_from_checkpoint true" in line
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    resume = ["--resume_from_checkpoint", "true"]
    finetune(monkeypatch, *small(model, text_file, tmp_path / "out", steps=5), *flags, *resume)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_second_ctrl_c_stops_at_once(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    signals_at(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    line = stopped(monkeypatch, capsys, *small(checkpoint, text_file, tmp_path / "out", steps=5))
    assert "--resume_from_checkpoint true go on after the last checkpoint" in line
    assert not list((tmp_path / "out").glob("checkpoint-*"))


RANK = """
import os, runpy, signal, sys
from transformers import Trainer
script, *sys.argv[1:] = sys.argv[1:]
original = Trainer.training_step
def stop(self, *args, **kwargs):
    if self.state.global_step == 2 and os.environ["RANK"] == "1" and self.args.resume_from_checkpoint is None:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args, **kwargs)
Trainer.training_step = stop
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def launched(folder: Path, *flags, config: bool = False) -> subprocess.CompletedProcess:
    """Starts two processes by torchrun, or by accelerate with the configuration for CPUs."""
    (folder / "rank.py").write_text(RANK)
    script = [folder / "rank.py", ROOT / "scripts" / "finetune.py"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        *script,
        *flags,
    ]
    if config:
        file = ROOT / "configuration" / "accelerate" / "cpu2.yaml"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--main_process_port", 0]
        command = [*launch, *script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, check=False, timeout=200
    )


@pytest.mark.slow
def test_ranks_stopped_after_different_steps(checkpoint, text_file, tmp_path):
    flags = [*small(checkpoint, text_file, tmp_path / "out", steps=5), "--eval_fraction", "0"]
    run = launched(tmp_path, *flags)
    assert run.returncode != 0
    assert "stopped: step 3 is saved" in run.stderr
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    assert launched(tmp_path, *flags, "--resume_from_checkpoint", "true").returncode == 0


@pytest.mark.slow
def test_two_processes_on_the_cpu_need_use_cpu(checkpoint, text_file, tmp_path):
    flags = [flag for flag in small(checkpoint, text_file, tmp_path / "out", steps=1) if flag != "--use_cpu"]
    run = launched(tmp_path, *flags)
    assert run.returncode != 0
    assert "2 processes were started without a GPU, and each would train alone: add --use_cpu true" in run.stderr
    assert not (tmp_path / "out").exists()
    run = launched(tmp_path, *flags, "--use_cpu", "true", config=True)
    assert run.returncode == 0
    assert [line.split("│")[2].strip() for line in run.stdout.splitlines() if "processes" in line] == ["2"]


def test_a_worker_that_loads_data_says_nothing_when_it_is_stopped(monkeypatch):
    said = []
    monkeypatch.setattr(os, "write", lambda *message: said.append(message))
    stopping = SaveOnInterrupt()
    with stopping.listening():
        monkeypatch.setattr(os, "getpid", lambda: -1)  # a forked worker has the same handlers
        signal.raise_signal(signal.SIGINT)
        assert not said
        monkeypatch.undo()
        monkeypatch.setattr(os, "write", lambda *message: said.append(message))
        signal.raise_signal(signal.SIGINT)
    assert len(said) == 1
