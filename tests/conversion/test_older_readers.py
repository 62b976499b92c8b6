"""transformers 4 reads an export: the old names are in the files, and the logits are ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.testing_utils import CaptureLogger

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.conversion import convert_checkpoint
from modeling_moe.conversion.older_names import (
    OLDER_CLAMP,
    logger,
    older_names,
    save_for_older_readers,
    warn_of_masked_groups,
)
from modeling_moe.conversion.targets.catalogue import TARGETS, export_plan
from tests.conversion.test_families_export import (
    ALTERNATING,
    CLAMPED,
    EXPRESSIBLE,
    GROUPS,
    LATENT,
    LLAMA3_ROPE,
    MOA,
    MOE,
    MULTIPLIERS,
    SIGMOID,
    WINDOWS,
    export,
    randomised,
)


OLDER = ["transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"]
ATTENTION = ["attention_dropout", "num_attention_heads", "num_key_value_heads", "rope_theta", "sliding_window"]
BASIC = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act", "max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings", "num_experts_per_tok", "torch_dtype"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "rope_scaling"),
]
SHARED = [*BASIC, "output_router_logits", "router_aux_loss_coef"]
DEEPSEEK = [
    *(
        *BASIC,
        *ATTENTION[:-1],
        "moe_intermediate_size",
        "n_shared_experts",
        "n_routed_experts",
        "routed_scaling_factor",
    ),
    *("n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob", "attention_bias"),
]
QWEN = ["num_experts", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"]
# arguments of the configuration classes of transformers 4.57, and head_dim, which its models read
READ_BY_OLDER = {
    "mixtral": [*SHARED, *ATTENTION, "head_dim", "num_local_experts", "router_jitter_noise"],
    "qwen2_moe": [
        *(*SHARED, *ATTENTION, *QWEN, "use_sliding_window", "max_window_layers"),
        *("shared_expert_intermediate_size", "qkv_bias"),
    ],
    "qwen3_moe": [*SHARED, *ATTENTION, *QWEN, "use_sliding_window", "head_dim", "attention_bias"],
    "granitemoeshared": [
        *(*SHARED, *ATTENTION[:-1], *MULTIPLIERS, "num_local_experts", "attention_bias", "shared_intermediate_size"),
    ],
    "deepseek_v3": [*DEEPSEEK, *LATENT, "rope_interleave"],
    "glm4_moe": [*DEEPSEEK, "use_qk_norm", "partial_rotary_factor", "head_dim"],
    "minimax_m2": [*SHARED, *ATTENTION[:-1], "num_local_experts", "head_dim", "router_jitter_noise", "rotary_dim"],
    "gpt_oss": [*SHARED, *ATTENTION, "num_local_experts", "head_dim", "layer_types", "attention_bias"],
    "jetmoe": [
        *({*BASIC, *ATTENTION[:-1]} - {"hidden_act"}),
        *("kv_channels", "num_local_experts", "activation_function", "output_router_logits", "aux_loss_coef"),
    ],
    "olmoe": [*SHARED, *ATTENTION[:-1], "num_experts", "attention_bias", "clip_qkv", "norm_topk_prob"],
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "original_max_position_embeddings": 16,
}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0},
    "yarn": YARN | {"beta_fast": 4.0, "beta_slow": 1.0, "mscale": 0.7, "mscale_all_dim": 0.7, "truncate": False},
    "longrope": LONGROPE,
    "llama3": LLAMA3_ROPE,
}
PLAIN = {
    "mixtral": {},
    "qwen2_moe": {"qkv_bias": True},
    "qwen3_moe": {"qk_norm": "head"},
    "granitemoeshared": {"num_shared_experts": 1},
    "deepseek_v3": LATENT | SIGMOID,
    "glm4_moe": SIGMOID,
    "minimax_m2": SIGMOID | {"qk_norm": "full"},
    # transformers 4 has the published clamp as constants
    "gpt_oss": CLAMPED | OLDER_CLAMP,
    "olmoe": {"qk_norm": "full"},
    "jetmoe": MOA,
}


# transformers 4 leaves the chosen groups of these exports where a selection bias is negative
GROUPED = ["deepseek_v3", "glm4_moe"]
# transformers 4.57 has no class for this family
NEWER = {"minimax_m2"}


def test_every_target_is_tested():
    assert set(READ_BY_OLDER) == set(PLAIN) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_config_json_of_an_export_lacks_no_name_that_transformers_4_reads(target, tmp_path):
    config = MoEConfig(**MOE | PLAIN[target] | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    config.dtype = torch.bfloat16
    plan = export_plan(config, target)
    save_for_older_readers(plan, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not set(READ_BY_OLDER[target]) - set(written)
    assert written["rope_theta"] == 500.0
    assert written["rope_scaling"] is None
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert {written[name] for name in ("num_experts", "num_local_experts") if name in written} == {5}
    # the old names do not change what transformers 5 reads
    windows = {"max_window_layers": 3} if target == "qwen2_moe" else {}
    read = AutoConfig.from_pretrained(tmp_path).to_dict() | {"_name_or_path": ""}
    assert read == plan.to_dict() | windows


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_embedding_is_written_under_old_names(kind, tmp_path):
    plan = export_plan(MoEConfig(**MOE | {"rope_parameters": ROPES[kind]}), "mixtral")
    save_for_older_readers(plan, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == ROPES[kind]["rope_theta"]
    assert written["rope_scaling"]["type"] == written["rope_scaling"]["rope_type"] == kind
    assert {name: written["rope_scaling"][name] for name in ROPES[kind] if name != "rope_theta"} | {
        "rope_theta": written["rope_theta"]
    } == ROPES[kind]
    assert written.get("original_max_position_embeddings") == (16 if kind == "longrope" else None)
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {name: value for name, value in read.items() if name != "type"} == plan.rope_parameters


def test_a_warning_names_windows_that_transformers_4_applies_in_all_layers(tmp_path):
    plan = export_plan(MoEConfig(**MOE | {"qkv_bias": True, "sliding_window": 4, "layer_types": WINDOWS}), "qwen2_moe")
    assert older_names(plan)["max_window_layers"] == 1
    with CaptureLogger(logger) as captured:
        save_for_older_readers(plan, tmp_path)
    assert "transformers 4 applies it in all" in captured.out


@pytest.mark.parametrize("width", [8, 12])
def test_a_warning_names_a_head_width_of_granite_that_transformers_4_does_not_read(width, tmp_path):
    plan = export_plan(MoEConfig(**MOE | {"head_dim": width}), "granitemoeshared")
    with CaptureLogger(logger) as captured:
        save_for_older_readers(plan, tmp_path)
    assert ("head_dim 12, which transformers 4 does not read" in captured.out) == (width == 12)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, ["'swiglu_limit': 1.5", "'swiglu_alpha': 1.3"]), ({"swiglu_limit": 7.0, "swiglu_alpha": 1.702}, [])],
)
def test_a_warning_names_a_clamp_that_transformers_4_does_not_read(fields, expected, tmp_path):
    windows = {"sliding_window": 4, "layer_types": ALTERNATING}
    plan = export_plan(MoEConfig(**MOE | CLAMPED | windows | fields), "gpt_oss")
    with CaptureLogger(logger) as captured:
        save_for_older_readers(plan, tmp_path)
    assert all(text in captured.out for text in expected)
    assert bool(captured.out) == bool(expected)
    # transformers 4 reads the layer types of gpt-oss
    assert "applies it in all" not in captured.out


@pytest.mark.parametrize("lowest", [-0.2, 0.0])
@pytest.mark.parametrize("target", GROUPED)
def test_a_warning_names_a_negative_selection_bias_beside_groups_of_experts(target, lowest, tmp_path):
    model = MoEForCausalLM(MoEConfig(**MOE | EXPRESSIBLE[target][1]))
    for layer in model.model.sparse_blocks():
        layer.gate.e_score_correction_bias[1] = lowest
    model.save_pretrained(tmp_path / "moe")
    with CaptureLogger(logger) as captured:
        convert_checkpoint(str(tmp_path / "moe"), tmp_path / "export", target)
    assert ("2 of 3 groups of experts (n_group), and its lowest selection bias is -0.2" in captured.out) == (
        lowest < 0
    )


def test_no_warning_names_a_negative_selection_bias_where_every_group_is_chosen(tmp_path):
    plan = export_plan(MoEConfig(**MOE | LATENT | GROUPS | {"topk_group": 3}), "deepseek_v3")
    bias = {"model.layers.0.mlp.gate.e_score_correction_bias": LazyTensor.of(torch.tensor([-1.0, 0.0]))}
    with CaptureLogger(logger) as captured:
        warn_of_masked_groups(plan, bias)
    assert not captured.out


@pytest.fixture(scope="module")
def older_transformers(tmp_path_factory) -> Path:
    """Returns a folder with transformers 4.57; skips the test if it cannot be installed."""
    folder = tmp_path_factory.mktemp("older")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *OLDER]
    # pip's constraints could exclude the old release
    done = subprocess.run(install, env=os.environ | {"PIP_CONSTRAINT": "/dev/null"}, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"transformers 4.57 cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def read_by_older(site: Path, folder: Path) -> dict[str, dict]:
    """Returns what transformers 4.57 computes of every model in `folder`, by name."""
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    reader = [sys.executable, Path(__file__).with_name("older_reader.py"), folder]
    done = subprocess.run(reader, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {path.name: torch.load(path / "theirs.pt") for path in folder.iterdir()}
    assert {result["version"] for result in results.values()} == {"4.57.6"}
    return results


POSITIVE = "positive biases"


def exports() -> dict[str, tuple[str, dict]]:
    """Returns targets and fields, except two of which an export warns: windows in some layers, and Granite's head_dim."""
    cases = {
        name: (target, fields | (OLDER_CLAMP if target == "gpt_oss" else {}))
        for name, (target, fields) in EXPRESSIBLE.items()
        if fields.get("layer_types") != WINDOWS and target not in NEWER and name != "granitemoeshared-head_dim"
    }
    for target in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
        fields = PLAIN[target]
        cases |= {f"{target}-{kind}": (target, fields | {"rope_parameters": rope}) for kind, rope in ROPES.items()}
    cases |= {f"{target}-{POSITIVE}": EXPRESSIBLE[target] for target in GROUPED}
    return cases | {"qwen2_moe-all-windows": ("qwen2_moe", {"qkv_bias": True, "sliding_window": 4})}


@pytest.mark.slow
def test_transformers_4_computes_what_the_exported_model_computes(older_transformers, tmp_path):
    ids, expected = torch.randint(3, 99, (2, 40)), {}
    (tmp_path / "exports").mkdir()
    for name, (target, fields) in exports().items():
        model = randomised(MoEForCausalLM(MoEConfig(**MOE | fields)))
        if name.endswith(POSITIVE):
            for layer in model.model.sparse_blocks():
                layer.gate.e_score_correction_bias.abs_()
        model.save_pretrained(tmp_path / "moe" / name)
        export(tmp_path / "moe" / name, target, tmp_path / "exports" / name)
        torch.save(ids, tmp_path / "exports" / name / "ids.pt")
        with torch.no_grad():
            expected[name] = model(ids).logits
    results = read_by_older(older_transformers, tmp_path / "exports")
    assert set(results) == set(expected)
    wrong = {
        name: (results[name]["logits"] - logits).abs().max().item()
        for name, logits in expected.items()
        if not torch.allclose(results[name]["logits"], logits, atol=1e-5, rtol=1e-5)
    }
    # the export warns of these two; docs/conversion.md says why transformers 4 computes other logits
    assert sorted(wrong) == GROUPED, wrong


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in TARGETS if target not in NEWER])
def test_transformers_4_loads_a_tokenizer_that_transformers_5_saved(target, older_transformers, tmp_path):
    from tests.builders import train_tokenizer

    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.chat_template = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
    model = randomised(MoEForCausalLM(MoEConfig(**MOE | PLAIN[target] | {"vocab_size": len(tokenizer)})))
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    folder, text = tmp_path / "exports" / target, "über die <tool> Brücke<eos> 🙂"
    convert_checkpoint(str(tmp_path / "moe"), folder, target)
    ids = torch.randint(3, 99, (1, 9))
    torch.save(ids, folder / "ids.pt")
    (folder / "text.txt").write_text(text, "utf-8")
    theirs = read_by_older(older_transformers, tmp_path / "exports")[target]
    assert theirs["tokens"] == AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids
    assert json.loads(theirs["specials"]) == tokenizer.special_tokens_map | {"additional_special_tokens": ["<tool>"]}
    assert theirs["chat"] == tokenizer.chat_template
    with torch.no_grad():
        torch.testing.assert_close(theirs["logits"], model(ids).logits, atol=1e-5, rtol=1e-5)
