"""Families that one switch of the router or of the experts opens are imported with equal logits: Kolibri and PhiMoE."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING

from modeling_moe.conversion.families.catalogue import SPARSE_FAMILIES
from modeling_moe.conversion.targets.catalogue import TARGETS
from modeling_moe.utils.errors import UserError
from tests.builders import tiny_config
from tests.conversion import harness
from tests.conversion.harness import SIZE, TOLERANCE, imported, lazy, moe_config


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.4],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "short_mscale": 1.24,
    "long_mscale": 1.24,
    "original_max_position_embeddings": 32,
}
KOLIBRI = SIZE | {
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "head_dim": 12,
}
KOLIBRI.pop("intermediate_size")
VALUES = {
    "kolibri1": KOLIBRI
    | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "kolibri1-renormalised": KOLIBRI
    | {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3, "norm_topk_prob": True},
    "phimoe": SIZE
    | {"num_local_experts": 5, "lm_head_bias": True, "attention_bias": True, "router_jitter_noise": 0.3},
    "phimoe-window": SIZE | {"num_local_experts": 4, "sliding_window": 4},
    "phimoe-longrope": SIZE | {"num_local_experts": 4, "rope_parameters": LONGROPE},
}
# the oldest supported releases of transformers lack Kolibri
CONFIGS = {
    name: CONFIG_MAPPING[name.partition("-")[0]](**copy.deepcopy(values))
    for name, values in VALUES.items()
    if name.partition("-")[0] in CONFIG_MAPPING
}


def random_source(name: str):
    config = copy.deepcopy(CONFIGS[name])
    return harness.random_source(config), config


@pytest.mark.parametrize("name", CONFIGS)
def test_from_disk(name, tmp_path):
    tensors = harness.check_disk(*random_source(name), tmp_path)
    assert any(".experts.0." in key for key in tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_bitwise(name, tmp_path):
    got, expected = harness.bf16_outputs(random_source(name)[0], tmp_path)
    assert torch.equal(got.logits, expected.logits)


def test_correction_bias_of_kolibri_stays_fp32():
    if "kolibri1" not in CONFIGS:
        pytest.skip("this release of transformers has no Kolibri")
    state = lazy({"model.layers.1.moe.router.expert_bias": torch.randn(5).to(torch.bfloat16)})
    tensors = SPARSE_FAMILIES["kolibri1"].tensors(state, moe_config(copy.deepcopy(CONFIGS["kolibri1"])))
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].read().dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_experts_per_tok", 3),
        ("rope_parameters", LONGROPE | {"long_mscale": 1.3}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}),
    ],
)
def test_what_phimoe_cannot_be_converted_with_is_refused(field, value):
    config = copy.deepcopy(CONFIGS["phimoe"])
    moe_config(config)
    setattr(config, field, value)
    with pytest.raises(UserError, match=field):
        moe_config(config)


def test_long_texts_of_phimoe_are_rotated_as_transformers_rotates_them():
    """transformers' class has the short factors at every length; the code that Microsoft published has the long ones too."""
    config = copy.deepcopy(CONFIGS["phimoe-longrope"])
    source = harness.random_source(config)
    model = imported(config, lazy(source.state_dict()))
    ids = torch.randint(3, 99, (1, 40))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, **TOLERANCE)


# a switch -> the value that changes it, with what it needs
SWITCHES = {
    "router_selection_bias_on": ("logits", {"router_selection_bias": True, "scoring_func": "sigmoid"}),
    "router_logit_scale": (0.5, {}),
    "router_logit_softcapping": (5.0, {}),
    "router_input_norm": (True, {}),
    "router_expert_scale": (True, {}),
    "shared_expert_combination_strategy": ("average", {"num_shared_experts": 1}),
    "moe_latent_size": (8, {}),
    "swiglu_alpha": (None, {"swiglu_limit": 7.0}),
    "dense_swiglu_limit": (7.0, {}),
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_a_family_without_a_switch_refuses_it_by_name(target, name):
    value, needed = SWITCHES[name]
    plain, switched = tiny_config(**needed), tiny_config(**needed, **{name: value})
    reasons = TARGETS[target].reasons(switched)
    assert any(reason.startswith(f"{name}={value!r} ({target} has ") for reason in reasons), reasons
    assert not any(reason.startswith(f"{name}=") for reason in TARGETS[target].reasons(plain))
