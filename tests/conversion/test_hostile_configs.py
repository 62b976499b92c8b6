"""A false configuration is refused in one sentence, or converted to what transformers computes of the same folder."""

import copy
import json
import math
import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_moe.conversion import load_state, open_checkpoint
from modeling_moe.utils.errors import UserError
from tests.conversion import test_families_attention as attention_variants
from tests.conversion import test_families_bias_routed as bias_routed
from tests.conversion import test_families_dense as dense
from tests.conversion import test_families_router as router
from tests.conversion import test_families_softmax as softmax
from tests.conversion import test_families_sparse as sparse
from tests.conversion import test_wrappers as wrappers
from tests.conversion.test_families_equal import SOURCES


# transformers has no class for DeepSeek's first family
SPARSE = [name for name in sparse.CONFIGS if name.partition("-")[0] != "deepseek"]
# the auto class knows Mistral 4 as the text model of a wrapper only
ATTENTION = [name for name in attention_variants.CONFIGS if name.partition("-")[0] != "mistral4"]
# the auto class knows the text model of Qwen3-Omni's thinker in newer releases of transformers only
WRAPPERS = [name for name in wrappers.SOURCES if "thinker" not in name]
VARIANTS = [*dense.SOURCES, *SPARSE, *bias_routed.CONFIGS, *ATTENTION, *softmax.CONFIGS, *router.CONFIGS, *WRAPPERS]
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
JUNK = [None, "x", [], {}, True, math.nan, math.inf, 1e30, -1, 0, 0.5, 10**5, [1], "1"]
NAMES = ["x", "gelu", "silu", "relu", "default", "yarn", "linear", "full_attention", None, 3]
# fields that are optional in a configuration
ADDED = {
    "rope_theta": [100.0, -1, "x", None, math.nan],
    "rope_scaling": [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": math.nan},
        {"type": "su"},
        "x",
    ],
    "head_dim": [8, 16, 7, 0, -8],
    "partial_rotary_factor": [0.5, 1.0, 2.0, -1, 0],
    "sliding_window": [1, 0, -1, 4, 2],
    "layer_types": [["full_attention"] * 3, ["sliding_attention"] * 3, ["x"] * 3, ["full_attention"] * 2],
    "num_key_value_heads": [1, 4, 3, 0],
    "use_sliding_window": [True, False],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True],
    "attention_multiplier": [0.5],
    "n_group": [2],
    "unknown_field": [1],
}
# fields that are the library's bookkeeping
KEPT = {"architectures", "transformers_version", "model_type", "dtype"}


def other_value(choose: random.Random, value: Any) -> Any:
    """Returns another value that a user could have written in place of a value."""
    if isinstance(value, bool):
        return choose.choice([not value, not value, None, "x", 2])
    if isinstance(value, int):
        near = [value + 1, value - 1, value * 2, value // 2, 1, 2, 3, float(value), str(value)]
        return choose.choice([*near, value + 1, value * 2, value // 2, *JUNK])
    if isinstance(value, float):
        return choose.choice([value * 2, value / 2, -value, 0.0, 1.0, 1.5, str(value), *JUNK])
    if isinstance(value, str):
        return choose.choice(NAMES)
    if isinstance(value, list):
        inner = [other_value(choose, entry) if choose.random() < 0.5 else entry for entry in value]
        return choose.choice(
            [value[:-1], value + value[-1:], value[::-1], [], None, "x", {}, [None] * len(value), inner]
        )
    if not isinstance(value, dict) or not value:
        return choose.choice([0, 1, 2, 3, 4, 7, "x", True, 0.5, [], {}])
    changed, key = dict(value), choose.choice(sorted(value))
    kind = choose.random()
    if kind < 0.15:
        del changed[key]
    elif kind < 0.25:
        changed["extra"] = 1
    elif kind < 0.35:
        return choose.choice([None, {}, "x", []])
    else:
        changed[key] = other_value(choose, changed[key])
    return changed


def mutated(choose: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration with one or two fields changed, removed or added."""
    values = copy.deepcopy(values)
    for _ in range(choose.choice([1, 1, 1, 2])):
        if choose.random() < 0.2:
            name = choose.choice(sorted(ADDED))
            values[name] = choose.choice(ADDED[name])
            continue
        name = choose.choice(sorted(set(values) - KEPT))
        if choose.random() < 0.12:
            del values[name]
        else:
            values[name] = other_value(choose, values[name])
    return values


def save_source(variant: str, folder) -> str:
    """Saves a model of a variant; returns the attention implementation for the comparison."""
    torch.manual_seed(0)
    if variant in dense.SOURCES:
        model = dense.random_source(dense.source_config(variant))
    elif variant in WRAPPERS:
        model = wrappers.wrapper(variant)
    else:
        model, _ = SOURCES[variant](variant)
    model.save_pretrained(folder)
    return "eager" if variant.startswith(("gemma2", "gpt_oss", "flint", "granitemoe_swa")) else "sdpa"


def theirs(folder, attention: str) -> torch.Tensor | None:
    """Returns transformers' logits, or None if its model does not load completely or fails."""
    try:
        wrapped = "text_config" in json.loads((folder / "config.json").read_text())
        auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, attn_implementation=attention, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        return model.eval()(IDS).logits
    except Exception:
        return None


@torch.no_grad()
def outcome(folder, attention: str) -> str:
    """Returns `refused`, `equal`, or `not computed by transformers`; any other outcome fails the test.

    Raises:
        AssertionError: if the converted model computes something else than transformers.
    """
    try:
        checkpoint = open_checkpoint(str(folder))
        model = load_state(checkpoint.config, checkpoint.state)
    except UserError:
        return "refused"
    expected = theirs(folder, attention)
    if expected is None:
        return "not computed by transformers"
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(IDS).logits, expected, atol=2e-4, rtol=1e-4)
    return "equal"


def run(variant: str, folder, cases: int) -> dict[str, int]:
    """Returns the number of cases for each outcome."""
    attention = save_source(variant, folder)
    file = folder / "config.json"
    written = json.loads(file.read_text())
    text = written.get("text_config")
    choose, counts = random.Random(variant), {"refused": 0, "equal": 0, "not computed by transformers": 0}
    assert outcome(folder, attention) == "equal"
    for _ in range(cases):
        values = mutated(choose, written) if text is None else written | {"text_config": mutated(choose, text)}
        file.write_text(json.dumps(values))
        try:
            counts[outcome(folder, attention)] += 1
        except Exception as error:
            changed = {k: values.get(k, "taken away") for k in {*values, *written} if values.get(k) != written.get(k)}
            raise AssertionError(f"{variant} with {changed}: {type(error).__name__} {error}") from error
    return counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_false_configuration_is_refused_or_converted_correctly(variant, tmp_path):
    run(variant, tmp_path / "source", 2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_300_false_configurations_are_refused_or_converted_correctly(variant, tmp_path):
    counts = run(variant, tmp_path / "source", 300)
    assert counts["refused"] > 100
    assert counts["equal"] > 20
    assert counts["not computed by transformers"] < 15


def with_fields(variant: str, folder, **fields) -> str:
    attention = save_source(variant, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return attention


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        (
            "llama",
            {"vocab_size": 98},
            r"has shape \(99, 32\) where its config.json asks for \(98, 32\): vocab_size is 98 there",
        ),
        (
            "llama",
            {"hidden_size": 36},
            r"has shape \(99, 32\) where its config.json asks for \(99, 36\): hidden_size is 36",
        ),
        ("llama", {"intermediate_size": 44}, r"mlp\..*_proj\.weight has shape .*: intermediate_size is 44 there"),
        ("llama", {"num_attention_heads": 8}, r"_proj\.weight has shape .* where its config.json asks for"),
        (
            "qwen3_moe",
            {"num_experts": 4, "num_local_experts": 4},
            r"a tensor .*experts\.4\..* that its config.json does not",
        ),
        ("qwen3_moe", {"num_experts": 6, "num_local_experts": 6}, r"no tensor for .*experts\.5\."),
        ("qwen3_moe-renormalised", {"sliding_window": 0}, "sliding_window is 0 .*: set use_sliding_window to false"),
        (
            "deepseek_v2",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5 .* rotates whole heads: remove it",
        ),
        ("gpt2", {"n_inner": 0}, "intermediate_size is 0"),
        ("phi3-long", {"original_max_position_embeddings": 1}, r"(original_max_position_embeddings|config\.json)"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": math.nan}}, "rope_theta"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ("llama", {"hidden_size": 10**9}, "."),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ],
)
def test_a_false_field_is_refused_by_name(variant, fields, message, tmp_path):
    with_fields(variant, tmp_path / "source", **fields)
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(tmp_path / "source"))


def test_null_for_norm_topk_prob_is_false_as_in_transformers(tmp_path):
    attention = with_fields("deepseek_v3", tmp_path / "source", norm_topk_prob=None)
    assert open_checkpoint(str(tmp_path / "source")).config.norm_topk_prob is False
    assert outcome(tmp_path / "source", attention) == "equal"
