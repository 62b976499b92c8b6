"""These tests check checkpoints with more or fewer experts, read from and written into folders."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.hub import write_model_card
from modeling_moe.resizing import GrowthOptions, PruningOptions, ResizeOptions, resize_checkpoint
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config, train_tokenizer


IDS = torch.randint(3, 99, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def moe(tmp_path):
    tokenizer = train_tokenizer()
    model = MoEForCausalLM(tiny_config(vocab_size=len(tokenizer), num_experts=6, num_experts_per_tok=2)).eval()
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    (tmp_path / "text.txt").write_text("a router decides which expert a token is sent to. " * 40)
    return model


def resize(tmp_path, options, growth=None, pruning=None):
    arguments = [ResizeOptions(**options), growth or GrowthOptions(), pruning or PruningOptions()]
    _, size, reason = resize_checkpoint(str(tmp_path / "moe"), tmp_path / "new", *arguments)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.num_parameters() == size.parameters
    assert (model.config.num_experts, model.config.num_experts_per_tok) == size[2:]
    return model.eval(), reason


@pytest.mark.parametrize("mode", ["clone", "masked"])
def test_growth_keeps_the_function(moe, mode, tmp_path):
    model, reason = resize(tmp_path, {"method": "grow"}, GrowthOptions(mode=mode))
    assert model.config.num_experts == 12
    assert reason is None
    torch.testing.assert_close(model(IDS).logits, moe(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "new" / "tokenizer.json").exists()
    card = write_model_card(tmp_path / "new").text
    assert f"| Mode | {mode} |" in card
    assert "the source's function by construction" in card
    assert "REAP" not in card


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_fewer_experts(moe, method, tmp_path):
    options = {"method": method, "data": [f"mine={tmp_path / 'text.txt'}"], "tokens": 200}
    model, reason = resize(tmp_path, options, pruning=PruningOptions(keep=3))
    assert model.config.num_experts == 3
    assert "tokens of a dropped expert are sent to other experts" in reason
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "new"))
    kept = [
        expert
        for expert in range(6)
        if any(
            torch.equal(row, before["model.layers.0.mlp.gate.weight"][expert])
            for row in after["model.layers.0.mlp.gate.weight"]
        )
    ]
    assert len(kept) == 3
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    equal = [torch.equal(after[name.format(new)], before[name.format(old)]) for new, old in enumerate(kept)]
    assert all(equal) == (method == "prune")
    card = write_model_card(tmp_path / "new").text
    assert f"| Method | {method} |\n| Experts kept in each layer | 3 |" in card
    assert f"layer 0: {', '.join(map(str, kept))}; layer " in card
    assert "| Exactness | does not compute the source's function" in card
    assert not re.search(r"\| (Mode|Factor|Noise|Seed) \|", card)


def test_one_task(tmp_path):
    model = MoEForCausalLM(tiny_config(router_type="task", num_tasks=3)).eval()
    model.save_pretrained(tmp_path / "moe")
    extracted, reason = resize(tmp_path, {"method": "extract", "task": 1})
    assert reason is None
    assert torch.equal(extracted(IDS).logits, model(IDS, task_ids=torch.tensor([1, 1])).logits)


def test_a_model_of_transformers(tmp_path):
    source = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    ).eval()
    source.save_pretrained(tmp_path / "moe")
    model, _ = resize(tmp_path, {"method": "grow"}, GrowthOptions(factor=3))
    assert model.config.num_experts == 12
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "shrink"}, "method 'shrink' is unknown: it must be one of grow, prune, merge, extract"),
        ({"method": "prune"}, "method 'prune' ranks the experts by their use on a text: give data or usage_json"),
        ({"method": "extract"}, "method 'extract' keeps the experts of one task: give task"),
        ({"method": "extract", "task": 0}, "extract_task needs a model with router_type='task'"),
        ({"method": "merge", "data": ["mine=/nowhere"]}, "^data /nowhere does not exist"),
        ({"method": "merge", "data": ["mine"]}, "^data 'mine' is malformed"),
        ({"method": "prune", "data": ["mine=/nowhere"], "tokens": 0}, "tokens is 0: it must be positive"),
        ({"method": "prune", "data": ["mine=/nowhere"], "tokens": -4}, "tokens is -4: it must be positive"),
    ],
)
def test_mistakes_leave_nothing(moe, options, message, tmp_path):
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        resize(tmp_path, options)
    assert sorted(file.name for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", ["prune", "merge"])
def test_a_wrong_keep_is_refused_before_the_text_is_read(moe, method, tmp_path):
    """The message must not come after the whole text has been measured."""
    with pytest.raises(UserError, match="keep is 0: it must be a multiple"):
        resize(tmp_path, {"method": method, "data": ["mine=/nowhere"]}, pruning=PruningOptions(keep=0))


def test_dense_source_is_refused(tmp_path):
    MoEForCausalLM(tiny_config(mlp_layer_types=["dense"] * 3)).save_pretrained(tmp_path / "moe")
    with pytest.raises(UserError, match="no sparse layer"):
        resize(tmp_path, {"method": "grow"})
