"""Publishing: what is uploaded, and what is refused before anything is."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_moe import MoEForCausalLM
from modeling_moe.cli import UserError
from modeling_moe.hub import check_without_package, push, push_folder
from tests.conftest import tiny_config


class Hub:
    """Takes notes in the place of the Hub."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        self.calls.append(("upload", repo_id, set(allow_patterns)))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    return hub


@pytest.fixture
def folder(tmp_path):
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "checkpoint-3").mkdir()
    (tmp_path / "model" / "checkpoint-3" / "optimizer.pt").write_text("big")
    (tmp_path / "model" / "training_args.bin").write_text("private")
    return tmp_path / "model"


def test_push_uploads_the_model_with_code_and_card(hub, folder):
    files = push_folder(folder, "you/moe", private=True)
    assert hub.calls[0] == ("create", "you/moe", {"private": True, "exist_ok": True})
    assert hub.calls[1] == ("upload", "you/moe", set(files))
    assert {"README.md", "config.json", "model.safetensors", "modeling_moe.py", "routing.py"} <= files.keys()
    assert not any("checkpoint-3" in name or name == "training_args.bin" for name in files)
    assert files["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert 'from_pretrained("you/moe"' in (folder / "README.md").read_text()


def test_dry_run_uploads_nothing_and_keeps_a_card(hub, folder):
    (folder / "README.md").write_text("my own card")
    assert "README.md" in push_folder(folder, "you/moe", dry_run=True)
    assert hub.calls == []
    assert (folder / "README.md").read_text() == "my own card"


def test_both_ways_of_loading_agree(folder):
    assert check_without_package(folder) == 0


def test_missing_code_is_refused(hub, folder):
    (folder / "routing.py").unlink()
    with pytest.raises(UserError, match="does not load without this package"):
        push_folder(folder, "you/moe")
    assert hub.calls == []


def test_other_code_is_refused(hub, folder):
    code = (folder / "routing.py").read_text()
    (folder / "routing.py").write_text(
        code.replace("return weight * self.scaling", "return 2 * weight * self.scaling")
    )
    with pytest.raises(UserError, match="computes something else by its own code"):
        push_folder(folder, "you/moe")
    assert hub.calls == []


def test_code_that_decodes_without_its_cache_is_refused(hub, folder):
    """As that of before 0.2.0 on transformers 5.24: a pass over the whole text is right, `generate` is not."""
    code = (folder / "attention.py").read_text()
    (folder / "attention.py").write_text(code.replace("if cache is not None:", "if cache is not None and False:"))
    with pytest.raises(UserError, match="computes something else by its own code"):
        push_folder(folder, "you/moe")
    assert hub.calls == []


def test_script_checks_and_lists(folder, monkeypatch, capsys):
    flags = ["--model_name_or_path", str(folder), "--repo_id", "you/moe", "--dry_run", "true"]
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *flags])
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "push_to_hub.py"), run_name="__main__")
    assert "modeling_moe.py" in capsys.readouterr().out


def test_damaged_weights_are_refused(hub, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts.1.down_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its config\.json"):
        push_folder(folder, "you/moe")
    assert hub.calls == []
