"""Checkpoints that earlier versions saved load to the same numbers."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from modeling_moe import MoEConfig, MoEForCausalLM
from tests.builders import tiny_config


GOLDEN = Path(__file__).parent / "golden"
# what version 0.1.0 saved is in test_compatibility.py
SAVED = ["moe_0.3.0_topk", "moe_0.3.0_segment", "moe_0.3.0_task_gate"]
OLD_NAMES = {
    "router_type": {
        "task_gate": "mmoe",
        "fixed": "uniform",
        "relu": "remoe",
        "base": "base_layer",
        "soft": "soft_moe",
        "segment": "lory",
    },
    "router_controller": {"pid": "proportional"},
}
# fields that a router cannot do without
NEEDED = {
    "fixed": {"num_experts_per_tok": 5},
    "base": {"num_experts_per_tok": 1, "allow_noncausal": True},
    "soft": {"allow_noncausal": True},
    "pid": {"router_selection_bias": True, "router_bias_update_rate": 0.1},
}
PAIRS = [(field, old, new) for field, names in OLD_NAMES.items() for old, new in names.items()]


@pytest.fixture
def warnings_seen(caplog, monkeypatch):
    """Returns a function that lists the warnings with a given text, those included that come once in a process."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers_logging.warning_once.cache_clear()
    return lambda word: [record.getMessage() for record in caplog.records if word in record.getMessage()]


@pytest.mark.parametrize(("field", "old", "new"), PAIRS)
def test_an_old_name_loads_with_one_warning_and_is_saved_as_the_new_one(field, old, new, tmp_path, warnings_seen):
    fields = NEEDED.get(old, {})
    config = tiny_config(**fields, **{field: old})
    assert getattr(config, field) == new
    assert warnings_seen("old name") == [f"{field}={old!r} is an old name: write {field}={new!r}."]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved[field] == new
    (tmp_path / "config.json").write_text(json.dumps(saved | {field: old}))
    assert getattr(MoEConfig.from_pretrained(tmp_path), field) == new
    assert getattr(MoEConfig.from_pretrained(tmp_path, **{field: old}), field) == new
    assert len(warnings_seen("old name")) == 1


@pytest.mark.parametrize("name", SAVED)
def test_what_an_earlier_version_saved_goes_on_as_before(name, warnings_seen, tmp_path):
    """Logits and the training loss are those that version 0.3.0 computed; the coefficient has its new meaning."""
    folder = GOLDEN / name
    expected = load_file(folder / "expected.safetensors")
    inputs = {key: expected[key] for key in ("input_ids", "task_ids") if key in expected}
    model = MoEForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(model(**inputs).logits, expected["logits"], atol=1e-5, rtol=1e-5)
    out = model.train()(**inputs, labels=inputs["input_ids"])
    torch.testing.assert_close(out.loss, expected["loss"], atol=1e-6, rtol=1e-6)
    old = json.loads((folder / "config.json").read_text())
    used = old["num_experts"] if name == "moe_0.3.0_segment" else old["num_experts_per_tok"]
    torch.testing.assert_close(out.aux_loss, used * expected["aux_loss"], atol=1e-6, rtol=1e-6)
    assert model.config.router_aux_loss_coef == old["router_aux_loss_coef"] / used
    assert len(warnings_seen("before 0.4.0")) == 1
    model.save_pretrained(tmp_path)
    again = MoEForCausalLM.from_pretrained(tmp_path).train()
    assert again.config.router_aux_loss_coef == model.config.router_aux_loss_coef
    torch.testing.assert_close(
        again(**inputs, labels=inputs["input_ids"]).loss, expected["loss"], atol=1e-6, rtol=1e-6
    )
    assert len(warnings_seen("before 0.4.0")) == 1


def test_only_a_coefficient_that_an_earlier_version_saved_is_divided(tmp_path, warnings_seen):
    coefficient = 0.03
    config = tiny_config(router_aux_loss_coef=coefficient)
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    hand_written = {"model_type": "moe", "router_aux_loss_coef": coefficient, "num_experts_per_tok": 3}
    for contents in (saved, saved | {"code_version": "0.10.0"}, saved | {"code_version": "1.0.0"}, hand_written):
        file.write_text(json.dumps(contents))
        assert MoEConfig.from_pretrained(tmp_path).router_aux_loss_coef == coefficient
        assert MoEConfig.from_json_file(file).router_aux_loss_coef == coefficient
    assert MoEConfig(**config.to_dict()).router_aux_loss_coef == coefficient
    assert not warnings_seen("before 0.4.0")
    for contents in (saved | {"code_version": "0.3.0"}, {k: v for k, v in saved.items() if k != "code_version"}):
        file.write_text(json.dumps(contents))
        assert MoEConfig.from_pretrained(tmp_path).router_aux_loss_coef == coefficient / 3
        assert MoEConfig.from_json_file(file).router_aux_loss_coef == coefficient / 3
        # what the caller gives has the present meaning
        assert MoEConfig.from_pretrained(tmp_path, router_aux_loss_coef=0.5).router_aux_loss_coef == 0.5
    assert len(warnings_seen("before 0.4.0")) == 1
