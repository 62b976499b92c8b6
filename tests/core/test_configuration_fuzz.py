"""Tests random configurations: each is refused by a ValueError that names a field, or makes a correct model.

A case is one seed, and `check(seed, folder)` runs it alone.
"""

import dataclasses
import json
import math
import random
import typing

import pytest
import torch

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.configuration_derived import PER_LAYER, derived_fields
from modeling_moe.configuration_fields import Range, settings_of
from modeling_moe.router_catalogue import ROUTERS, router_class
from tests.selection import by_default


SETTINGS = settings_of(MoEConfig)
FIELDS = {field.name: field for field in dataclasses.fields(MoEConfig) if field.name in SETTINGS}
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
# usual values by field; values of other fields are drawn from type and range
USUAL = {
    "vocab_size": [3, 61, 128],
    "hidden_size": [8, 24, 40],
    "intermediate_size": [1, 7, 20],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "num_key_value_heads": [None, 1, 2, 4],
    "head_dim": [None, 2, 6, 12],
    "hidden_act": ["silu", "gelu", "relu2", "xielu", "gelu_pytorch_tanh", "nope", ""],
    "max_position_embeddings": [16, 32, 64],
    "initializer_range": [0.2, 0.02, 0],
    "rms_norm_eps": [1e-6, 1e-5, 1e-12],
    "attention_multiplier": [None, 0.3, 1],
    "kv_lora_rank": [None, None, 8],
    "q_lora_rank": [None, 6],
    "qk_nope_head_dim": [None, 4],
    "qk_rope_head_dim": [None, 4],
    "v_head_dim": [None, 5],
    "sliding_window": [None, 2, 3, 8],
    "layer_types": [
        None,
        None,
        ["full_attention", "sliding_attention"],
        ["full_attention"] * 2,
        ["sliding_attention"] * 3,
        ["linear_attention"] * 2,
    ],
    "mlp_layer_types": [None, None, ["sparse", "dense"], ["dense"] * 2, ["sparse"], ["mlp", "sparse"]],
    "no_rope_layers": [None, [1, 0], [0, 0], [2, 1], []],
    "num_experts": [1, 2, 4, 6],
    "num_experts_per_tok": [1, 2, 3, 4],
    "moe_intermediate_size": [None, 1, 6],
    "num_shared_experts": [0, 0, 1, 2],
    "shared_expert_intermediate_size": [None, 0, 5],
    "router_type": [*ROUTERS, "nope"],
    "scoring_func": ["softmax", "sigmoid", "sqrtsoftplus", "relu"],
    "n_group": [1, 1, 2],
    "topk_group": [1, 1, 2],
    "num_null_experts": [0, 0, 2],
    "num_copy_experts": [0, 0, 1],
    "expected_experts_per_tok": [None, 1, 1.5],
    "router_bias_update_rate": [0, 1e-3],
    "router_jitter_noise": [0, 0.01],
    "max_experts_per_tok": [None, None, 2],
    "router_temperature": [1.0, 0.5],
    "router_threshold": [0.0, 0.1],
    "routed_scaling_factor": [1.0, 2.5],
    "num_hash_layers": [0, 0, 1],
    "num_tasks": [1, 3],
    "slots_per_expert": [1, 2],
    "segment_length": [4, 16],
    "expert_capacity": [None, None, 2],
    "capacity_factor": [None, 1.0],
    "eval_capacity_factor": [None, None, 1.5],
    "pad_token_id": [None, 0, -1, 60],
    "bos_token_id": [None, 1],
    "eos_token_id": [None, 2, [1, 2]],
    "rope_parameters": [
        None,
        None,
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "linear"},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        {"rope_type": "nope"},
        {"full_attention": {"rope_theta": 1e4}},
        {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3}},
        {"full_attention": 3, "sliding_attention": []},
    ],
}
# values that no number of a model has; Python refuses to write 10**5000
HOSTILE = [math.nan, math.inf, -math.inf, -1, 0, 1, -3, 10**9, 10**30, 10**5000, 1e30, 1.5, -0.5, 1e-300]
HOSTILE += [None, True, False, "x", "", "1", [], [1], ["x"], {}, {"a": 1}, 2**31, 2**63]


# keys beside the declared fields
INHERITED = ["dtype", "num_labels", "first_k_dense_replace", "mlp_only_layers", "n_routed_experts", "n_shared_experts"]
INHERITED += ["id2label", "is_encoder_decoder", "per_layer_config", "rope_theta", "rope_scaling", "qk_head_dim"]


def drawn(name: str, rng: random.Random):
    """Draws a value of a field; most values are valid."""
    if name in USUAL:
        return rng.choice(USUAL[name])
    kind, limits = FIELDS[name].type, SETTINGS[name].limits
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return rng.choice(options)
    literals = [value for option in options for value in typing.get_args(option)]
    if literals:
        return rng.choice([None, *literals])
    if kind is bool or bool in options:
        return rng.random() < 0.5
    if isinstance(limits, Range):
        return inside(limits, rng)
    return FIELDS[name].default


def inside(limits: Range, rng: random.Random) -> float:
    """Draws a number in the range, near its lower end or 1."""
    low = max(limits.lowest, 1e-3) if limits.open_below else limits.lowest
    return min(
        limits.highest if not limits.open_above else limits.highest * 0.9, low + rng.choice([0, 0.1, 0.5, 1, 4])
    )


def fields_of(seed: int) -> dict:
    """Draws arguments of a configuration: a few fields, in every third case with one or two hostile values."""
    rng = random.Random(seed)
    fields = dict(SMALL)
    for name in rng.sample(list(FIELDS), rng.choice([1, 1, 2, 3, 6, 12])):
        fields[name] = drawn(name, rng)
    if seed % 5 == 0:
        fields |= {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6}
    if seed % 4 == 0:
        fields |= {"router_type": rng.choice(list(ROUTERS)), "allow_noncausal": True}
        fields |= {"hierarchical": {"n_group": 2, "topk_group": 1}, "uniform": {"num_experts_per_tok": 4}}.get(
            fields["router_type"], {}
        )
    if seed % 3 == 0:
        for name in rng.sample([*FIELDS, *INHERITED], rng.choice([1, 1, 2])):
            fields[name] = rng.choice(HOSTILE)
    return fields


def named(error: ValueError) -> None:
    """Fails unless the message is one line that names a field."""
    text = str(error)
    assert any(name in text for name in [*FIELDS, *INHERITED]), text
    assert "\n" not in text, text


def built(fields: dict) -> MoEConfig | None:
    """Returns the configuration, or None if it is refused by a sentence that names a field."""
    try:
        return MoEConfig(**fields)
    except ValueError as error:
        return named(error)


def check(seed: int, folder) -> str:
    """Runs a case and returns how it ended; any exception is a fault."""
    fields = fields_of(seed)
    config = built(fields)
    if config is None:
        return "refused"
    assert MoEConfig(**config.to_dict()).to_dict() == config.to_dict()
    text = config.to_json_string()
    again = MoEConfig.from_dict(json.loads(text, parse_constant=pytest.fail))
    assert again.to_dict() == config.to_dict()
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_params()
    if config.num_params() > 3e6 or config.max_position_embeddings > 2**16:
        return "large"
    run(config, seed, folder)
    return "run"


def run(config: MoEConfig, seed: int, folder) -> None:
    """Checks that logits and gradients are finite, and that logits are equal after loading and when decoded token by token."""
    torch.manual_seed(seed)
    model = MoEForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (2, 9))
    router = router_class(config)
    tasks = {"task_ids": torch.tensor([0, config.num_tasks - 1])} if config.router_type in ("task", "mmoe") else {}
    with torch.no_grad():
        logits = model(ids, **tasks).logits
        assert logits.isfinite().all()
        model.save_pretrained(folder)
        loaded = MoEForCausalLM.from_pretrained(folder).eval()
        assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
        scale = max(logits.abs().max().item(), 1e-6)
        # the last bit of a small product depends on where in memory, or in the file, a weight lies
        torch.testing.assert_close(loaded(ids, **tasks).logits, logits, rtol=0, atol=1e-6 * scale)
        by_length = config.eval_capacity_factor is not None and not config.capacity_running
        if router.causal and config.capacity_priority == "token" and not by_length:
            first = model(ids[:, :4], **tasks, use_cache=True)
            cache, steps = first.cache, [first.logits]
            steps += [model(ids[:, i : i + 1], **tasks, cache=cache, use_cache=True).logits for i in range(4, 9)]
            torch.testing.assert_close(torch.cat(steps, dim=1), logits, rtol=0, atol=1e-4 * scale)
    loss = model.train()(ids, labels=ids, **tasks).loss
    assert loss.isfinite()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("seed", by_default(range(60), range(120)))
def test_a_random_configuration_is_refused_by_name_or_right(seed, tmp_path):
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(16))
def test_thousands_of_random_configurations_are_refused_by_name_or_right(block, tmp_path):
    ends = [check(seed, tmp_path / str(seed)) for seed in range(1000 + 200 * block, 1200 + 200 * block)]
    # some cases are refused and some are not
    assert ends.count("run") > 50 < ends.count("refused")


def assigned(config: MoEConfig, changes: dict) -> MoEConfig | None:
    """Returns the configuration after assignments and a check, or None if a sentence that names a field refuses them."""
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        config.validate()
    except ValueError as error:
        return named(error)
    return config


def outcomes(seed: int) -> list[dict | None]:
    """Makes a change in a new configuration, by assignment, and at loading; returns the three results, None if refused."""
    rng = random.Random(seed)
    fields = fields_of(3 * seed + 1)
    if (config := built(fields)) is None:
        config = built(fields := dict(SMALL))
    # a field with its derived value counts as derived
    fields = {name: value for name, value in fields.items() if name not in derived_fields(config)}
    changes = {name: drawn(name, rng) for name in rng.sample(sorted(set(FIELDS) - ORDERED), rng.choice([1, 1, 2, 3]))}
    if rng.random() < 0.2:
        changes[rng.choice(sorted(set(FIELDS) - ORDERED))] = rng.choice(HOSTILE)
    anew = built(fields | changes)
    by_assignment = assigned(built(fields), changes)
    try:
        loaded = MoEConfig.from_dict(built(fields).to_dict(), **changes)
    except ValueError:
        loaded = None
    return [None if config is None else config.to_dict() for config in (anew, by_assignment, loaded)]


# fields that a new configuration treats in another way than an assignment does: use_sliding_window=False unsets the
# window, theta has a default, latent attention sets head_dim, and lists are cut
ORDERED = {"head_dim", "use_sliding_window", "sliding_window", "rope_parameters", "num_hidden_layers", *PER_LAYER}


@pytest.mark.parametrize("seed", by_default(range(40), range(60)))
def test_a_field_assigned_or_given_at_load_is_as_in_a_new_configuration(seed):
    anew, by_assignment, loaded = outcomes(seed)
    assert by_assignment == anew
    assert loaded == anew


@pytest.mark.slow
def test_thousands_of_changes_are_as_in_a_new_configuration():
    for seed in range(1000, 4000):
        anew, by_assignment, loaded = outcomes(seed)
        assert by_assignment == anew, seed
        assert loaded == anew, seed


def test_the_bias_of_a_noisy_router_is_initialised():
    model = MoEForCausalLM(MoEConfig(**SMALL, router_type="noisy_topk", router_bias=True))
    assert all(not block.gate.bias.any() for block in model.model.sparse_blocks())
