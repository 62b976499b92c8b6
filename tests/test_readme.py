"""The README's Python, run in its order on a tiny model, with a Hub that only takes notes; and docstring examples."""

import doctest
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.utils.hub

from modeling_moe import MoEForCausalLM
from modeling_moe.router_catalogue import ROUTERS
from tests.conftest import tiny_config
from tests.training.conftest import train_tokenizer


README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def uploads(monkeypatch):
    """File names by repository of everything that is pushed."""
    files = {}

    def create_commit(repo_id, operations, **kwargs):
        files.setdefault(repo_id, set()).update(operation.path_in_repo for operation in operations)

    api = SimpleNamespace(
        create_repo=lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id),
        create_commit=create_commit,
        create_branch=lambda **kwargs: None,
    )
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda *args, **kwargs: api)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: _NoCard())
    return files


class _NoCard:
    def save(self, path):
        Path(path).write_text("card")


def test_python_blocks(tmp_path, monkeypatch, uploads, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer()
    MoEForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained("outputs/demo/model")
    tokenizer.save_pretrained("outputs/demo/model")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 8
    monkeypatch.setitem(ROUTERS, "epsilon_greedy", None)  # so that it is taken out again
    exec("\n".join(blocks), {})
    assert "tensor" in capsys.readouterr().out
    assert {"model.safetensors", "config.json", "modeling_moe.py", "router.py", "tokenizer.json"} <= uploads[
        "you/my-moe"
    ]


def test_every_command_and_module_exists():
    text = README.read_text(encoding="utf-8")
    for script in set(re.findall(r"scripts/\w+\.(?:py|sh)", text)):
        assert (README.parent / script).is_file(), script
    inside = text.partition("## Inside")[2].partition("configuration/")[0]
    for name in re.findall(r"^  (\w+(?:\.py|/))", inside, flags=re.MULTILINE):
        assert (README.parent / "modeling_moe" / name).exists(), name


@pytest.mark.parametrize("module", ["configuration_moe", "dispatch.interface", "evaluation.hf_metrics"])
def test_docstring_examples(module):
    result = doctest.testmod(import_module(f"modeling_moe.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
