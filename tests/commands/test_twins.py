# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""Commands open Kimi-K2, for which transformers has no class, as DeepSeek-V3, and run none of the code that it brings."""

import json

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints import open_source
from modeling_moe.commands.plan import PlanArguments, plan_upcycling
from modeling_moe.commands.serve import ServeArguments, serve
from modeling_moe.conversion import convert_checkpoint
from modeling_moe.hub.card import write_model_card
from modeling_moe.resizing.pruning_any import open_any
from modeling_moe.upcycling import UpcyclingOptions
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.loading import load_config, load_model
from tests.builders import sample_text, train_tokenizer
from tests.conversion.harness import LATENT


CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModelForCausalLM": "modeling.DeepseekV3ForCausalLM",
}


@pytest.fixture
def source(tmp_path):
    """Returns a tiny DeepSeek-V3, and a folder in which it is a Kimi-K2 whose code may not run."""
    torch.manual_seed(0)
    config = DeepseekV3Config(**LATENT | {"vocab_size": 300, "n_group": 1, "topk_group": 1, "n_shared_experts": 1})
    model, folder = DeepseekV3ForCausalLM(config).eval(), tmp_path / "kimi"
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "kimi_k2", "auto_map": CODE}))
    (folder / "modeling.py").write_text("raise SystemExit('the code runs')")
    return model, folder


@pytest.mark.parametrize("trust", [False, True])
def test_the_model_loads_and_computes_what_deepseek_v3_computes(source, trust):
    model, folder = source
    config = load_config(str(folder), trust_remote_code=trust)
    assert (type(config), config.name_or_path) == (DeepseekV3Config, str(folder))
    ids = torch.randint(3, 99, (2, 9))
    got = load_model(str(folder), trust_remote_code=trust)
    assert torch.equal(got(ids).logits, model(ids).logits)


def test_it_is_converted_and_compared(source, tmp_path):
    model, folder = source
    done = convert_checkpoint(str(folder), tmp_path / "moe", check=True)
    assert done.verification is not None
    ids = torch.randint(3, 99, (2, 9))
    got = MoEForCausalLM.from_pretrained(tmp_path / "moe").eval()(ids).logits
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_report_card_and_pruning_read_it(source, tmp_path, moe):
    _, folder = source
    (tmp_path / "text.txt").write_text(sample_text(40), encoding="utf-8")
    table = tmp_path / "load.json"
    flags = ("--data", f"a={tmp_path / 'text.txt'}", "--max_length", 32, "--output_json", table)
    code, _, errors = moe("report", "--model_name_or_path", folder, *flags)
    assert code == 0, errors
    (found,) = json.loads(table.read_text()).values()
    assert [layer["layer"] for layer in found] == [1, 2]
    assert "| Routed experts | 6 of width 24 |" in write_model_card(folder).text
    assert open_any(open_source(str(folder))).skeleton.model.config.model_type == "deepseek_v3"


def test_a_plan_names_the_family_that_computes_it(source):
    _, folder = source
    with pytest.raises(UserError, match="deepseek_v3"):
        plan_upcycling(PlanArguments(str(folder)), UpcyclingOptions())


def test_transformers_serve_is_not_started_on_a_name_that_it_does_not_know(source):
    _, folder = source
    with pytest.raises(UserError, match=r"model_type 'kimi_k2': write 'deepseek_v3' into config\.json"):
        serve(ServeArguments(str(folder)))
