"""MoEConfig.replace and MoEConfig.from_preset make new, checked configurations."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_moe import MoEConfig, configuration_presets
from modeling_moe.utils.presets import presets
from tests.builders import tiny_config


def test_replace_leaves_the_old_configuration_alone_and_derives_anew():
    config = tiny_config(mlp_layer_types=None, moe_intermediate_size=None, num_shared_experts=1)
    other = config.replace(num_hidden_layers=2, intermediate_size=50, num_local_experts=7)
    assert (other.mlp_layer_types, other.moe_intermediate_size, other.num_experts) == (["sparse"] * 2, 50, 7)
    assert other.shared_expert_intermediate_size == 50
    assert (config.num_hidden_layers, config.moe_intermediate_size, config.num_experts) == (3, 40, 5)
    assert config.replace().to_dict() == config.to_dict()


def test_replace_keeps_what_was_chosen():
    config = tiny_config(my_note="x", attn_implementation="eager", num_labels=4)
    other = config.replace(intermediate_size=50, num_hidden_layers=2)
    assert (other.moe_intermediate_size, other.mlp_layer_types) == (24, ["sparse", "dense"])
    assert (other.my_note, other._attn_implementation, other.num_labels) == ("x", "eager", 4)
    assert config.replace(mlp_only_layers=[0]).mlp_layer_types == ["dense", "sparse", "sparse"]
    assert config.replace(num_labels=3).num_labels == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_expert": 4}, "unknown field 'num_expert' in MoEConfig: did you mean 'num_experts'"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9: it must lie between 1 and num_experts"),
        ({"router_top_p": 0.9}, "router_top_p is 0.9, which nothing reads"),
        ({"to_dict": 1}, "to_dict is no field that can be set"),
    ],
    ids=str,
)
def test_replace_refuses_what_a_new_configuration_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config().replace(**changes)


def test_a_preset_is_its_file_with_changes():
    config = MoEConfig.from_preset("olmoe_1b_7b", num_hidden_layers=2, vocab_size=100)
    expected = MoEConfig.from_pretrained(presets()["olmoe_1b_7b"]).replace(num_hidden_layers=2, vocab_size=100)
    assert config.to_dict() == expected.to_dict()
    assert (config.num_experts, config.num_hidden_layers, len(config.layer_types)) == (64, 2, 2)
    assert config.architectures == ["MoEForCausalLM"]


def test_presets_are_files_by_name():
    files = presets()
    assert list(files) == sorted(files)
    assert {file.stem for file in (Path(__file__).parents[2] / "configuration" / "models").iterdir()} == set(files)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("olmoe_1b_7", r"there is no preset 'olmoe_1b_7' among .*moe_tiny.*: did you mean 'olmoe_1b_7b'\?"),
        ("llama", r"there is no preset 'llama' among .*: choose one of them\."),
    ],
)
def test_an_unknown_preset_is_refused_with_the_names(name, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_preset(name)


def test_the_code_of_a_checkpoint_has_no_presets_and_says_so(tmp_path):
    source = Path(configuration_presets.__file__)
    shutil.copy(source, tmp_path / source.name)
    code = "from configuration_presets import preset_files; preset_files()"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ValueError: presets come with the package and not with a checkpoint: install modeling_moe." in ran.stderr
