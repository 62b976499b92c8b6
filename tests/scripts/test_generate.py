"""scripts/generate.py: which code runs a checkpoint."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from modeling_moe import MoEForCausalLM
from tests.conftest import tiny_config
from tests.core.test_compatibility import OLD
from tests.training.conftest import train_tokenizer


SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"


@pytest.fixture
def has_old_code():
    return runpy.run_path(str(SCRIPT), run_name="a module")["has_old_code"]


def save(folder: Path, old: bool) -> str:
    """A checkpoint with its code, that of version 0.1.0 or of today."""
    MoEForCausalLM(tiny_config()).save_pretrained(folder)
    if old:
        (folder / "compatibility.py").unlink()
    return str(folder)


def test_old_code_is_known(has_old_code, tmp_path):
    assert has_old_code(str(OLD))  # by its configuration alone, as on the Hub
    assert has_old_code(save(tmp_path / "old", old=True))  # though `code_version` is there
    assert not has_old_code(save(tmp_path / "new", old=False))


@pytest.mark.parametrize("old", [True, False])
def test_of_an_adapter_the_base_tells(has_old_code, old, tmp_path):
    base = save(tmp_path / "base", old)
    adapted = get_peft_model(MoEForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert has_old_code(str(tmp_path / "adapter")) == old


@pytest.mark.parametrize("old", [True, False])
def test_old_code_gives_way_to_the_package(old, tmp_path):
    folder, tokenizer = tmp_path / "model", train_tokenizer()
    MoEForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if old:
        (folder / "compatibility.py").unlink()
        (folder / "modeling_moe.py").write_text("raise AssertionError('the code of the checkpoint ran')")
    command = [sys.executable, SCRIPT, "--model_name_or_path", folder, "--prompt", "a", "--max_new_tokens", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    module = result.stdout.partition(".")[0]
    assert module == ("modeling_moe" if old else "transformers_modules")
