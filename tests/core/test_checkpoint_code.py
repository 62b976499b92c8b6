# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Tests that a user's router or model class is saved with its code, or that a warning says that it is not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoint_code import import_own_router
from modeling_moe.hub.facts import model_facts
from modeling_moe.router_catalogue import ROUTERS
from modeling_moe.router_topk import TopKRouter
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_model
from tests.builders import tiny_config
from tests.processes import run_without_package


IDS = torch.arange(3, 21).view(2, 9)
SOURCE = """
import torch
from modeling_moe.router_catalogue import ROUTERS
from modeling_moe.router_topk import TopKRouter
from modeling_moe import (
    MoEForCausalLM,
    Routing,
)


class WorstRouter(TopKRouter):
    def select(self, scores, context):
        return (-scores).topk(self.top_k, dim=-1).indices


class ShiftedLM(MoEForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 1
        return output


ROUTERS["worst"] = WorstRouter
"""
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, again = sys.argv[1:]
for place in (folder, again):
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    torch.save(model(torch.arange(3, 21).view(2, 9)).logits, place + "/logits.pt")
    model.save_pretrained(again)
print(type(model).__name__)
"""


def own_module(folder: Path, source: str = SOURCE, name: str = "my_worst"):
    """Imports a user's file as if its folder were on the path."""
    file = folder / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mine(tmp_path):
    """Imports a user's module with a router and a model class."""
    module = own_module(tmp_path)
    yield module
    for name in ("my_worst", "modeling_moe.my_worst"):
        sys.modules.pop(name, None)
    ROUTERS.pop("worst", None)


@pytest.mark.slow
def test_a_users_router_is_saved_with_its_code(mine, tmp_path):
    model = MoEForCausalLM(tiny_config(router_type="worst")).eval()
    model.save_pretrained(tmp_path / "model")
    assert (
        json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]["MoERouter"] == "my_worst.WorstRouter"
    )
    run_without_package(LOAD, tmp_path, tmp_path / "model", tmp_path / "again")
    for folder in ("model", "again"):
        torch.testing.assert_close(torch.load(tmp_path / folder / "logits.pt"), model(IDS).logits)


def test_a_users_model_class_is_saved_with_its_code_and_the_packages(mine, tmp_path, caplog):
    model = mine.ShiftedLM(tiny_config(router_type="worst")).eval()
    model.save_pretrained(tmp_path / "model")
    printed = run_without_package(LOAD, tmp_path, tmp_path / "model", tmp_path / "again")
    assert printed.endswith("ShiftedLM\n")
    for folder in ("model", "again"):
        torch.testing.assert_close(torch.load(tmp_path / folder / "logits.pt"), model(IDS).logits)
    # a process that has imported the package loads the checkpoint with the package's class
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "was saved from the class ShiftedLM of my_worst.py, and is loaded as MoEForCausalLM" in caplog.text


def test_a_checkpoints_router_is_added_by_a_visible_call_alone(mine, tmp_path):
    model = MoEForCausalLM(tiny_config(router_type="worst")).eval()
    model.save_pretrained(tmp_path / "model")
    del ROUTERS["worst"]
    with pytest.raises(ValueError, match="if it is yours, import what registers it in ROUTERS"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=False)
    import_own_router(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "my_worst.py").read_text() == (tmp_path / "model" / "my_worst.py").read_text()


def test_the_commands_add_a_checkpoints_router_where_code_may_run_and_only_there(mine, tmp_path):
    model = MoEForCausalLM(tiny_config(router_type="worst")).eval()
    model.save_pretrained(tmp_path / "model")
    del ROUTERS["worst"]
    with pytest.raises(UserError, match="--trust_remote_code true"):
        load_model(str(tmp_path / "model"))
    # a card, too, is written of a model whose router the checkpoint brings
    with pytest.raises(UserError, match="--trust_remote_code true"):
        model_facts(tmp_path / "model")
    assert "worst" not in ROUTERS
    assert model_facts(tmp_path / "model", trust_remote_code=True).is_sparse
    ROUTERS.pop("worst")
    loaded = load_model(str(tmp_path / "model"), trust_remote_code=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_checkpoint_without_code_of_a_router_says_so(tmp_path):
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="brings no code of a router: import what registers 'topk'"):
        import_own_router(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import modeling_moe.router", "write `from modeling_moe.MODULE import NAME`"),
        ("from modeling_moe.training import MoECallback", "imports MoECallback from modeling_moe.training"),
        ("import my_worst_helper", "imports my_worst_helper, which no installed package has"),
        (
            "from modeling_moe.monitoring.routing_metrics import load_entropy",
            "from modeling_moe.monitoring.routing_metrics, which does not travel",
        ),
        ("from .router import Router", None),
    ],
)
def test_a_file_that_would_not_run_in_a_checkpoint_is_named(tmp_path, caplog, line, reason):
    (tmp_path / "my_worst_helper.py").write_text("")
    sys.path.insert(0, str(tmp_path))
    try:
        # the condition is false, so that the import does nothing in this test
        own_module(tmp_path, f"{SOURCE}\nif False:\n    {line}\n")
        MoEForCausalLM(tiny_config(router_type="worst")).save_pretrained(tmp_path / "model")
    finally:
        sys.path.remove(str(tmp_path))
        ROUTERS.pop("worst")
    assert (tmp_path / "model" / "my_worst.py").is_file() == (reason is None)
    # auto_map does not name a file that is not saved
    assert ("MoERouter" in (tmp_path / "model" / "config.json").read_text()) == (reason is None)
    assert ("WorstRouter is saved without its code" in caplog.text) == (reason is not None)
    assert reason is None or reason in caplog.text


IN_A_FUNCTION = SOURCE.replace('"worst"] = WorstRouter', '"worst"] = type("Unreachable", (WorstRouter,), {})')


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("router", SOURCE, "has the name of a file of ours, so rename it"),
        ("my-worst", SOURCE, "has a name that no import can use, so rename it"),
        ("my_worst", IN_A_FUNCTION, "has no class of that name outside its functions, so define it there"),
    ],
)
def test_a_router_that_no_import_finds_is_named(tmp_path, caplog, name, source, reason):
    own_module(tmp_path, source, name)
    try:
        MoEForCausalLM(tiny_config(router_type="worst")).save_pretrained(tmp_path / "model")
    finally:
        ROUTERS.pop("worst")
        sys.modules.pop(name)
    assert reason in caplog.text
    assert "MoERouter" not in (tmp_path / "model" / "config.json").read_text()
    assert "class Router(" in (tmp_path / "model" / "router.py").read_text()
    assert "def _own_router" not in (tmp_path / "model" / "router_catalogue.py").read_text()


def test_statements_beside_an_import_are_kept(tmp_path):
    """Imports share a line with other statements, rename, are indented, or span several lines."""
    name = 'a "quoted" type'
    module = own_module(
        tmp_path,
        "from __future__ import annotations\n"
        "SIGN = '\u00b1'; from modeling_moe.router_topk import TopKRouter as Base; SHIFT = -1\n"
        "try:\n    from modeling_moe.router import (\n        Routing,\n        renormalise as even,\n    )\n"
        "finally:\n    pass\n"
        "class Mine(Base):\n"
        "    def select(self, scores, context):\n"
        "        return (SHIFT * scores).topk(self.top_k, dim=-1).indices\n",
    )
    ROUTERS[name] = module.Mine
    try:
        model = MoEForCausalLM(tiny_config(router_type=name)).eval()
        model.save_pretrained(tmp_path / "model")
        del ROUTERS[name]
        import_own_router(tmp_path / "model")
        loaded = MoEForCausalLM.from_pretrained(tmp_path / "model").eval()
        assert ROUTERS[name] is not module.Mine
    finally:
        ROUTERS.pop(name, None)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    compile((tmp_path / "model" / "router_catalogue.py").read_text(), "router_catalogue.py", "exec")


def test_classes_of_a_notebook_are_saved_without_their_code_and_a_warning_says_so(tmp_path, caplog, monkeypatch):
    mine = type("Mine", (MoEForCausalLM,), {"__module__": "__main__"})
    monkeypatch.setitem(ROUTERS, "worst", type("MyRouter", (TopKRouter,), {"__module__": "__main__"}))
    mine(tiny_config(router_type="worst")).save_pretrained(tmp_path)
    for name in ("Mine", "MyRouter"):
        assert f"{name} is saved without its code" in caplog.text
    assert "it is defined in __main__, so put it in a file of its own and import that" in caplog.text
    # transformers does not save the package's files for a subclass
    assert (tmp_path / "modeling_moe.py").is_file()


def test_a_users_code_is_not_pushed_before_it_is_saved(mine, tmp_path):
    with pytest.raises(ValueError, match="save first, and call push_to_hub after that"):
        MoEForCausalLM(tiny_config(router_type="worst")).save_pretrained(tmp_path / "model", push_to_hub=True)


def test_routers_of_the_package_are_not_a_users_code(tmp_path):
    assert ROUTERS["topk"] is TopKRouter
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    assert "def _own_router" not in (tmp_path / "router_catalogue.py").read_text()
    assert "MoERouter" not in (tmp_path / "config.json").read_text()
