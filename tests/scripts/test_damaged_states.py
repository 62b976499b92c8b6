"""scripts/finetune.py answers damaged checkpoints and impossible numbers in one line, and no file is lost."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.builders import sample_text, tiny_model
from tests.scripts.test_finetune import finetune, mistake, small


STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class Hostile:
    """Unpickling an instance creates a folder."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def damages(folder) -> dict[str, bytes | None]:
    """Returns contents of a damaged state file by name; None means that the file is missing."""
    whole = b"".join(bytes([number % 251]) for number in range(4000))
    return {"empty": b"", "garbled": whole, "hostile": pickle.dumps(Hostile(folder / "ran")), "missing": None}


def two_steps(folder, output) -> list:
    """Returns the flags of a run of two steps, with the model and the text in `folder`."""
    flags = small(folder / "model", folder / "text.txt", output, steps=2)
    return [*flags, "--save_steps", "2", "--eval_fraction", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """Returns a folder with a model, a text, and the result of two steps in `out`."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(sample_text(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        finetune(patch, *two_steps(folder, folder / "out"))
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch, capsys):
    """Copies the result of two steps; returns the checkpoint's folder, and a function that resumes and returns the complaint."""
    shutil.copytree(trained / "out", tmp_path / "out")
    flags = two_steps(trained, tmp_path / "out")

    def resume(*more) -> str:
        return mistake(monkeypatch, capsys, *flags, "--max_steps", "3", "--resume_from_checkpoint", "true", *more)

    return tmp_path / "out" / "checkpoint-2", resume


def test_damaged_states_are_named_in_one_line(run, tmp_path):
    folder, resume = run
    for name in STATES:
        kept = (folder / name).read_bytes()
        possible = damages(tmp_path) | {"truncated": kept[: len(kept) // 2]}
        # one function reads the three files
        for damage in possible if name == STATES[0] else ("hostile", "missing"):
            content = possible[damage]
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            line = resume()
            assert f"checkpoint-2/{name} is" in line, (name, damage)
            assert "resume from another checkpoint, or give this one as model_name_or_path" in line
            (folder / name).write_bytes(kept)
        torch.save({"other": [1, 2]}, folder / name)
        assert f"checkpoint-2/{name} " in resume()
        torch.save([torch.ones(2)], folder / name)
        assert f"checkpoint-2/{name} " in resume()
        (folder / name).write_bytes(kept)
    assert not (tmp_path / "ran").exists()


def test_an_optimizer_state_of_another_shape_is_refused(run):
    folder, resume = run
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][1]["exp_avg"] = torch.ones(3, 5)
    torch.save(state, folder / "optimizer.pt")
    assert "optimizer.pt is not of this run's optimizer (exp_avg of parameter 1 has shape (3, 5), not (" in resume()
    assert "it is of another kind" in resume("--optim", "sgd")
    state["param_groups"][0]["params"].pop()
    torch.save(state, folder / "optimizer.pt")
    assert "another number of parameters" in resume()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"global_step": "x"}', '{"global_step": -1}', '{"step": 1}', "[" * 100_000, "\0"]
)
def test_a_damaged_trainer_state_is_refused(content, run):
    folder, resume = run
    (folder / "trainer_state.json").write_text(content)
    assert "trainer_state.json is damaged" in resume("--resume_from_checkpoint", folder)
    assert "holds no complete checkpoint" in resume()


def test_damaged_weights_of_a_checkpoint_are_refused(run):
    folder, resume = run
    kept = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(kept[:-1000])
    assert "its weights cannot be loaded" in resume()
    (folder / "model.safetensors").write_bytes(kept)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if ".mlp.gate.weight" in name)
    save_file({other: tensors[other] for other in tensors if other != name}, folder / "model.safetensors")
    assert name in resume()
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, folder / "model.safetensors")
    assert "size mismatch" in resume()


def test_another_schedule_is_warned_about(run, trained, monkeypatch, caplog):
    folder, resume = run
    assert "is at step 2, past max_steps 1: raise max_steps" in resume("--max_steps", "1")
    flags = [*two_steps(trained, folder.parent), "--max_steps", "3"]
    finetune(monkeypatch, *flags, "--resume_from_checkpoint", "true")
    assert "was planned to end at step 2, and this run ends at 3" in caplog.text
    caplog.clear()
    finetune(monkeypatch, *flags, "--resume_from_checkpoint", "true", "--lr_scheduler_type", "constant")
    assert "was planned to end" not in caplog.text


def test_load_best_model_at_end_uses_the_mean_eval_loss(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    flags = small(checkpoint, text_file, tmp_path / "out", steps=4)
    flags += ["--data", f"a={text_file}", f"b={text_file}", "--eval_fraction", "0.2", "--save_steps", "2"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end", "true"]
    finetune(
        monkeypatch, *flags, "--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--save_total_limit", "3"
    )
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = {}
    for row in state["log_history"]:
        losses.setdefault(row["step"], []).extend(row[name] for name in ("eval_a_loss", "eval_b_loss") if name in row)
    means = {step: sum(values) / 2 for step, values in losses.items() if values}
    best = min(means, key=means.get)
    assert state["best_metric"] == pytest.approx(means[best])
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    saved, kept = (
        load_file(f / "model.safetensors") for f in (tmp_path / "out", tmp_path / "out" / f"checkpoint-{best}")
    )
    assert all(torch.equal(saved[name], kept[name]) for name in kept)


def test_overwrite_keeps_files_that_no_run_wrote(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    flags = [*small(checkpoint, text_file, output, steps=1), "--overwrite"]
    (output / "checkpoint-9").mkdir(parents=True)
    (output / "checkpoint-9" / "mine.txt").write_text("mine")
    finetune(monkeypatch, *flags, "--save_steps", "1")
    (output / "checkpoint-1" / "notes.txt").write_text("mine")
    (output / "precious.safetensors.bak").write_text("mine")
    finetune(monkeypatch, *flags)
    left = {
        str(path.relative_to(output)) for path in output.rglob("*") if path.is_file() and path.read_bytes() == b"mine"
    }
    assert left == {"checkpoint-9/mine.txt", "checkpoint-1/notes.txt", "precious.safetensors.bak"}
    shutil.copytree(checkpoint, tmp_path / "other")
    line = mistake(monkeypatch, capsys, *small(checkpoint, text_file, tmp_path / "other"), "--overwrite")
    assert "which no fine-tuning wrote: choose another" in line
    line = mistake(monkeypatch, capsys, *small(checkpoint, text_file, checkpoint), "--overwrite")
    assert "is the folder of the model to train" in line


def test_a_missing_output_dir_is_refused(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    flags = small(checkpoint, text_file, tmp_path / "out")
    at = flags.index("--output_dir")
    assert "output_dir is missing" in mistake(monkeypatch, capsys, *flags[:at], *flags[at + 2 :])


BAD = {
    "gradient_accumulation_steps": ["0", "-1", "x", "nan"],
    "per_device_train_batch_size": ["0", "-2"],
    "per_device_eval_batch_size": ["0"],
    "learning_rate": ["nan", "-1", "inf", "x"],
    "weight_decay": ["nan", "-1"],
    "max_grad_norm": ["nan", "-1"],
    "num_train_epochs": ["nan", "-3", "inf"],
    "max_steps": ["-5", "1.5"],
    "adam_beta1": ["1", "nan", "-1"],
    "adam_epsilon": ["-1"],
    "warmup_steps": ["-1", "nan"],
    "lr_scheduler_type": ["steps"],
    "optim": ["adam_of_mine"],
    "save_strategy": ["often"],
    "save_steps": ["-1", "nan"],
    "logging_steps": ["0", "-1", "nan"],
    "save_total_limit": ["0", "-1"],
    "seed": ["-1", "99999999999999999999"],
    "data_seed": ["-1"],
    "dataloader_num_workers": ["-1"],
    "deepspeed": ["/nonexistent.json"],
    "fsdp_config": ["/nonexistent.json"],
    "accelerator_config": ["/nonexistent.json"],
    "gradient_checkpointing_kwargs": ["{", "[]"],
    "label_smoothing_factor": ["-1", "2", "nan"],
    "freeze_experts": ["0-99999999999", "-1", "0-", ","],
    "eval_fraction": ["nan", "-1", "1"],
    "max_length": ["-1", "0", "nan"],
    "lora_r": ["-1"],
    "lora_alpha": ["x"],
    "lora_dropout": ["2", "nan", "-1"],
    "fsdp_size": ["-1", "0", "3"],
    "eval_strategy": ["steps "],
    "use_cpu": ["perhaps"],
    "dtype": ["int8"],
    "method": ["all"],
    "lora_rank_per": ["layer"],
    "metric_for_best_model": [],
    "report_to": ["nobody"],
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_numbers_are_refused_in_one_line(name, checkpoint, text_file, tmp_path, monkeypatch, capsys):
    for value in BAD[name]:
        method = ["--method", "lora"] if name.startswith("lora") else []
        flags = [*small(checkpoint, text_file, tmp_path / "out", steps=1), *method, f"--{name}={value}"]
        line = mistake(monkeypatch, capsys, *flags)
        assert name.removesuffix("_kwargs") in line.lower().replace("loraconfig", "") or value in line, line
        assert not list((tmp_path / "out").glob("*"))
