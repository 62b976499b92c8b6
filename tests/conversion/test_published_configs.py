"""Published config.json files are planned: what transformers does not read is reported, what it may read stays refused."""

import json
import textwrap
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from modeling_moe.commands import convert as command
from modeling_moe.commands import plan as plan_command
from modeling_moe.conversion import FAMILIES, convert_checkpoint, fields_without_effect, moe_config, open_checkpoint
from modeling_moe.conversion.families.catalogue import refuse_to_run, source_config
from modeling_moe.conversion.families.reading import reads
from modeling_moe.conversion.families.wrappers import text_values
from modeling_moe.utils.errors import UserError
from modeling_moe.utils.json_files import read_json
from tests import builders
from tests.conversion.published_configs import DEEPSEEK, PUBLISHED
from tests.conversion.test_families_sparse import DEEPSEEK as DEEPSEEK_MOE


def opened(folder, values: dict):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return source_config(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_planned(name, tmp_path):
    values, without_effect = PUBLISHED[name]
    source = opened(tmp_path, values)
    if values["model_type"] not in FAMILIES:
        with pytest.raises(UserError, match="has no conversion"):
            moe_config(source)
        return
    config = moe_config(source)
    assert config.vocab_size == values["vocab_size"]
    assert config.num_hidden_layers == values.get("num_hidden_layers", values.get("n_layer"))
    # a conversion may read a field too, for instance to refuse other values
    found = set(fields_without_effect(source))
    assert found <= without_effect
    assert not any(reads(source, field) for field in without_effect)
    assert found == without_effect or values["model_type"] == "minimax_m2"


# a published configuration -> number of experts, experts of a token, and some fields that transformers does not read
EXPERTS: dict[str, tuple[int, int, set[str]]] = {
    "Kimi-K2-Instruct": (384, 8, set()),
    "Phi-3.5-MoE-instruct": (16, 2, set()),
    "Trinity-Nano": (128, 8, {"score_func", "route_norm", "use_grouped_mm"}),
    "ERNIE-4.5-21B-A3B": (64, 6, {"moe_gate", "moe_use_aux_free"}),
    "Hunyuan-A13B": (64, 8, {"use_cla", "moe_intermediate_size", "norm_type"}),
    "dots.llm1": (128, 6, {"use_sliding_window"}),
    "Granite-3.1-3B-A800M": (40, 8, set()),
    "Qwen3-VL-30B-A3B": (128, 8, set()),
    "Qwen3-Omni-30B-A3B": (128, 8, set()),
    "GLM-4.7-Flash": (64, 4, set()),
    "K-EXAONE-236B-A23B": (128, 8, {"is_moe_layer"}),
    "DBRX-instruct": (
        16,
        4,
        {"router_aux_loss_coef", "attn_config.rope_theta"},
    ),
}
PUBLISHED_MOE = read_json(Path(__file__).with_name("published_moe.json"))


@pytest.mark.parametrize("name", PUBLISHED_MOE)
def test_published_moe_configs_are_planned(name, tmp_path):
    values, (experts, chosen, without_effect) = PUBLISHED_MOE[name], EXPERTS[name]
    source = opened(tmp_path, values)
    config = moe_config(source)
    assert (config.num_experts, config.num_experts_per_tok) == (experts, chosen)
    text = text_values(values)
    assert config.num_hidden_layers == text.get("num_hidden_layers", text.get("n_layers"))
    assert without_effect <= set(fields_without_effect(source))


def test_a_twin_of_a_family_under_another_name_is_that_family(tmp_path):
    """Kimi-K2 is DeepSeek-V3 with a model type of its own, for which no trust in code is asked."""
    values = PUBLISHED_MOE["Kimi-K2-Instruct"]
    twin = moe_config(opened(tmp_path, values))
    assert twin.to_dict() == moe_config(opened(tmp_path, values | {"model_type": "deepseek_v3"})).to_dict()
    with pytest.raises(UserError, match="scoring_func"):
        moe_config(opened(tmp_path, values | {"scoring_func": "softmax"}))
    with pytest.raises(UserError, match="hidden_size"):
        opened(tmp_path, values | {"hidden_size": "x"})


def test_a_source_that_transformers_does_not_load_is_not_compared(tmp_path):
    source = opened(tmp_path / "omni", PUBLISHED_MOE["Qwen3-Omni-30B-A3B"])
    with pytest.raises(UserError, match="save its thinker alone"):
        refuse_to_run(source)
    refuse_to_run(opened(tmp_path / "kimi", PUBLISHED_MOE["Kimi-K2-Instruct"]))


def test_old_spellings_of_rope_are_those_of_transformers(tmp_path):
    for name, kind in (
        ("a Llama with old linear rope", "linear"),
        ("Qwen2.5-7B with yarn", "yarn"),
        ("DeepSeek-V3", "yarn"),
    ):
        source = opened(tmp_path, PUBLISHED[name][0])
        rope = moe_config(source).rope_parameters
        assert rope["rope_type"] == kind
        assert rope["factor"] == PUBLISHED[name][0]["rope_scaling"]["factor"]
        assert rope["rope_theta"] == PUBLISHED[name][0]["rope_theta"]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Llama-2-7b", "partial_rotary_factor", 0.5),
        ("Llama-2-7b", "sliding_window", 128),
        ("Llama-2-7b", "layer_types", ["sliding_attention"] * 32),
        ("Llama-2-7b", "attention_chunk_size", 64),
        ("Mistral-7B-v0.3", "sliding_window", "x"),
        ("Qwen3-30B-A3B", "partial_rotary_factor", 0.5),
        ("Qwen2.5-7B", "use_mrope", True),
        ("Mixtral-8x7B", "quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("DeepSeek-V3", "rope_interleave", False),
        ("DeepSeek-V3", "partial_rotary_factor", 0.5),
    ],
)
def test_what_transformers_may_read_stays_refused(name, field, value, tmp_path):
    values = PUBLISHED[name][0]
    assert moe_config(opened(tmp_path, values))
    with pytest.raises(UserError, match=field):
        moe_config(opened(tmp_path, values | {field: value}))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) & set(CONFIG_MAPPING)))
def test_a_declared_field_is_one_that_the_model_reads(name):
    config = CONFIG_MAPPING[name]()
    assert not reads(config, "mystery_scale")
    declared = set(config.to_dict()) - {"transformers_version", "model_type"}
    assert all(reads(config, field) for field in declared)
    assert all(reads(config, alias) for alias in config.attribute_map)


def test_the_plan_and_conversion_json_name_the_fields(tmp_path, capsys):
    config = LlamaConfig(**builders.SIZE, activation="swiglu", neftune_noise_alpha=5.0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    arguments = ["--model_name_or_path", str(tmp_path / "source")]
    command.main([*arguments, "--output_dir", str(tmp_path / "moe"), "--dry_run", "true"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "does not read these fields of config.json" in text
    assert "activation ('swiglu'), neftune_noise_alpha (5.0)" in text
    assert not (tmp_path / "moe").exists()
    plan_command.main([*arguments, "--num_experts", "4"])
    assert "activation, neftune_noise_alpha" in capsys.readouterr().out
    convert_checkpoint(str(tmp_path / "source"), tmp_path / "moe")
    recipe = json.loads((tmp_path / "moe" / "conversion.json").read_text())["recipe"]
    assert recipe["fields_without_effect"] == {"activation": "swiglu", "neftune_noise_alpha": 5.0}
    assert "activation" not in json.loads((tmp_path / "moe" / "config.json").read_text())


REMOTE_CONFIG = """
from transformers import PreTrainedConfig


class DeepseekConfig(PreTrainedConfig):
    model_type = "deepseek"

    def __init__(self, declared_gate=None, max_position_embeddings=64, **kwargs):
        self.declared_gate = declared_gate
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)
"""
REMOTE_MODEL = """
class DeepseekModel:
    def __init__(self, config):
        self.scale = getattr(config, "scale_that_is_read", None)
        self.other = config.other_that_is_read
"""


def remote_source(folder, **fields) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "configuration_deepseek.py").write_text(textwrap.dedent(REMOTE_CONFIG))
    (folder / "modeling_deepseek.py").write_text(textwrap.dedent(REMOTE_MODEL))
    code = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
    (folder / "config.json").write_text(json.dumps(DEEPSEEK_MOE | fields | {"auto_map": code}))


@pytest.mark.parametrize("field", ["declared_gate", "scale_that_is_read", "other_that_is_read"])
def test_trusted_code_that_reads_a_field_refuses_it(field, tmp_path):
    remote_source(tmp_path, **{field: 0.5})
    with pytest.raises(UserError, match=field):
        moe_config(source_config(tmp_path, trust_remote_code=True))


def test_code_that_does_not_read_a_field_counts_only_if_it_is_trusted(tmp_path):
    remote_source(tmp_path, unread_note="x")
    assert fields_without_effect(source_config(tmp_path, trust_remote_code=True)) == {"unread_note": "x"}
    with pytest.raises(UserError, match="unread_note"):
        moe_config(source_config(tmp_path))
    (tmp_path / "modeling_deepseek.py").write_text("def broken(:")
    with pytest.raises(UserError, match="unread_note"):
        moe_config(source_config(tmp_path, trust_remote_code=True))


def test_code_in_place_of_a_class_of_transformers_is_judged_where_it_is_trusted(tmp_path, monkeypatch):
    """With permission, transformers builds DeepSeek-V3's configuration from the checkpoint's code and not from its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    remote_source(tmp_path / "source")
    text = REMOTE_CONFIG.replace("DeepseekConfig", "DeepseekV3Config").replace('"deepseek"', '"deepseek_v3"')
    (tmp_path / "source" / "configuration_deepseek.py").write_text(text)
    file = tmp_path / "source" / "config.json"
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    values = DEEPSEEK | {"rope_scaling": None, "unread_note": "x", "scale_that_is_read": 2.0}
    file.write_text(json.dumps(values | {"auto_map": code}))
    local = source_config(tmp_path / "source")
    assert fields_without_effect(local) == {"unread_note": "x", "scale_that_is_read": 2.0}
    remote = source_config(tmp_path / "source", trust_remote_code=True)
    if type(remote) is type(local):
        pytest.skip("this release of transformers prefers its own class")
    assert not reads(remote, "unread_note")
    assert reads(remote, "scale_that_is_read")
    assert reads(remote, "declared_gate")


def test_an_unknown_field_of_a_checkpoint_does_not_stop_it(tmp_path):
    LlamaForCausalLM(LlamaConfig(**builders.SIZE, mystery_scale=2.0)).save_pretrained(tmp_path)
    assert open_checkpoint(str(tmp_path)).without_effect == {"mystery_scale": 2.0}
