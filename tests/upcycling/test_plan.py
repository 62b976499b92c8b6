"""These tests compare the plan with the planned model, and check that impossible options are refused."""

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MixtralConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.upcycling import METHODS, UpcyclingOptions, make_plan
from modeling_moe.upcycling.experts import SCALINGS
from modeling_moe.upcycling.plan import GROUPS
from modeling_moe.utils.command_line import parse
from modeling_moe.utils.errors import UserError


SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MEASURED = {"calibration_data": ["text=file"]}


def plan_of(source=None, dtype=torch.bfloat16, further=(), **options):
    return make_plan(source or LlamaConfig(**SIZE), UpcyclingOptions(**options), dtype, further)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "split", "num_experts": 5},
        {"layers": "every:2", "shared_expert": True, "granularity": 4},
        {"method": "drop", "granularity": 2, "router_init": "kmeans", **MEASURED},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}], ids=str
)
def test_figures_are_those_of_the_model(fields, options):
    plan = plan_of(LlamaConfig(**SIZE, **fields), **options)
    model = MoEForCausalLM(plan.config)
    assert plan.params == sum(parameter.numel() for parameter in model.parameters())
    assert plan.params == sum(group.params for group in plan.groups)
    assert plan.bytes_on_disk == 2 * plan.params == sum(group.nbytes for group in plan.groups)
    assert plan.dense_params < plan.params
    assert plan.active_params == plan.config.num_active_params()
    assert plan.config.dtype == torch.bfloat16


def test_groups():
    plan = plan_of(num_experts=8, granularity=4, layers="0,1,3", shared_expert=True)
    groups = {group.name: group for group in plan.groups}
    assert list(groups) == [group for group in GROUPS if group != "attention experts"]
    assert {name: group.count for name, group in groups.items()} == {
        "embedding": "1",
        "output head": "1",
        "attention": "4",
        "routers": "3",
        "routed experts": "3 x 8",
        "shared experts": "3",
        "dense networks": "1",
        "norms": "9",
    }
    assert groups["attention"].params == 4 * (2 * 32 * 32 + 2 * 32 * 16)
    assert groups["routers"].params == 3 * 8 * 32
    assert groups["routed experts"].params == 3 * 8 * 3 * 10 * 32
    assert groups["shared experts"].params == 3 * groups["dense networks"].params == 3 * 3 * 40 * 32
    assert groups["norms"].nbytes == 2 * 9 * 32
    assert [group.name for group in plan_of(LlamaConfig(**SIZE, tie_word_embeddings=True)).groups] == [
        "embedding",
        "attention",
        "routers",
        "routed experts",
        "norms",
    ]


def test_memory():
    assert plan_of(dtype=torch.float32).bytes_to_train == 16 * plan_of().params
    assert plan_of().bytes_to_train == 8 * plan_of().params
    # keys and values of 4 layers with 2 heads of 8
    assert plan_of().cache_bytes() == 1000 * 2 * 4 * 2 * 8 * 2
    window = MistralConfig(**SIZE, sliding_window=16)
    assert plan_of(window).cache_bytes() == 16 * 2 * 4 * 2 * 8 * 2
    assert plan_of(window).cache_bytes(10) == 10 * 2 * 4 * 2 * 8 * 2


def test_configuration():
    plan = plan_of(
        num_experts=12,
        num_experts_per_tok=6,
        granularity=2,
        layers="every:2",
        norm_topk_prob=False,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.25,
    )
    config = plan.config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (12, 6, 20)
    assert (config.norm_topk_prob, config.router_aux_loss_coef, config.router_z_loss_coef) == (False, 0.5, 0.25)
    # every:2 is Qwen's decoder_sparse_step: the second and the fourth layer
    assert config.mlp_layer_types == ["dense", "sparse", "dense", "sparse"]
    assert not config.has_shared_experts
    assert "norm_topk_prob=False" in (plan.reason_not_exact or "")
    shared = plan_of(num_experts=4, granularity=2, shared_expert=True)
    assert (shared.config.num_shared_experts, shared.config.shared_expert_intermediate_size) == (1, 40)
    assert shared.reason_not_exact is None
    assert plan_of(layers="3, 1").config.mlp_layer_types == config.mlp_layer_types


def test_flags():
    (options,) = parse(
        [UpcyclingOptions],
        None,
        [
            "--method",
            "drop",
            "--sources",
            "./law",
            "./code",
            "--source_weights",
            "0.5",
            "0.3",
            "0.2",
            "--norm_topk_prob",
            "false",
            "--layers",
            "0,2",
        ],
    )
    assert options == UpcyclingOptions(
        method="drop",
        sources=["./law", "./code"],
        source_weights=[0.5, 0.3, 0.2],
        norm_topk_prob=False,
        layers="0,2",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method 'magic' is unknown: it must be one of copy, drop, split"),
        ({"scaling": "cube"}, "scaling 'cube' is unknown: it must be one of exact, megatron, none"),
        ({"router_init": "guess"}, "router_init 'guess' is unknown"),
        ({"noise": -1.0}, "noise is -1.0: it must be 0 or positive"),
        ({"noise_std": -1.0}, "noise_std is -1.0: it must be 0 or positive"),
        ({"router_std": -0.1}, "router_std is -0.1: it must be 0 or positive"),
        ({"num_experts": 0}, "num_experts is 0: it must be positive"),
        ({"granularity": 0}, "granularity is 0: it must be positive"),
        ({"router_logit_std": 0.0}, "router_logit_std is 0.0: it must be positive"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9: it must lie between 1 and"),
        ({"granularity": 3, "num_experts": 9}, r"granularity \(3\) does not divide the dense network's width \(40\)"),
        ({"granularity": 5}, r"granularity \(5\) does not divide num_experts \(8\)"),
        ({"method": "split", "num_experts": 6}, r"num_experts \(6\) does not divide the dense network's width 40"),
        ({"method": "split", "granularity": 2}, "granularity is 2: method split divides by num_experts alone"),
        ({"method": "drop", "drop_ratio": 0.0}, "drop_ratio is 0.0: it must be above 0"),
        ({"method": "drop", "drop_ratio": float("nan")}, "drop_ratio is nan: it must be above 0"),
        ({"noise": float("nan")}, "noise is nan: it must be 0 or positive"),
        ({"noise_std": float("inf")}, "noise_std is inf: it must be 0 or positive"),
        ({"source_weights": [float("nan")]}, r"source_weights are \[nan\]: give weights"),
        ({"method": "drop", "drop_ratio": 1.1}, "drop_ratio is 1.1: .* at most 1"),
        ({"method": "drop", "drop_ratio": 0.1, "granularity": 8}, "large enough to draw one of an expert's 5 neurons"),
        ({"layers": "every:0"}, "layers is 'every:0': it must be all"),
        ({"layers": "every:two"}, "layers is 'every:two': it must be all"),
        ({"layers": "not every:2"}, "layers is 'not every:2': it must be all"),
        ({"layers": ""}, "layers is '': it must be all"),
        ({"layers": "every:5"}, "layers is 'every:5': it must name at least one layer, between 0 and 3"),
        ({"layers": "1,4"}, "layers is '1,4': it must name at least one layer, between 0 and 3"),
        ({"layers": "-1"}, "layers is '-1': it must name at least one layer, between 0 and 3"),
        ({"router_init": "ridge"}, "router_init='ridge' measures the dense model on text: give calibration_data"),
        ({"method": "split", "split": "clustered"}, "split='clustered' measures the dense model"),
        ({"split": "clustered", **MEASURED}, "split='clustered' has no effect with method='copy'"),
        ({"source_weights": [0.5, 0.5]}, "source_weights has 2 entries for 1 sources"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 9}, r"num_experts / granularity \(9\) is not a multiple of the 2 sources"),
        ({"num_experts": 8, "granularity": 8}, r"num_experts / granularity \(1\) is not a multiple of the 2 sources"),
        ({"method": "split"}, "sources cannot be given with method split"),
        ({"source_weights": [1.0]}, "source_weights has 1 entries for 2 sources"),
        ({"source_weights": [1.0, 1.0]}, r"source_weights are \[1.0, 1.0\]: give weights of 0 or more that sum to 1"),
        ({"source_weights": [1.5, -0.5]}, "give weights of 0 or more"),
    ],
    ids=str,
)
def test_bad_sources_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        plan_of(further=[LlamaConfig(**SIZE)], sources=["./law"], **options)


def test_sources_of_another_kind_are_refused():
    with pytest.raises(UserError, match="model_type 'mixtral' cannot be upcycled: it must be one of"):
        plan_of(MixtralConfig())
    with pytest.raises(UserError, match="model_type 'mixtral' cannot be upcycled"):
        plan_of(further=[MixtralConfig()], sources=["./law"])
    with pytest.raises(UserError, match=r"vocab_size is 100 in ./law and 99 in the first source"):
        plan_of(further=[LlamaConfig(**(SIZE | {"vocab_size": 100}))], sources=["./law"])


def test_every_choice_exists():
    assert all(plan_of(method=name).config for name in METHODS)
    assert all(plan_of(scaling=name).config for name in SCALINGS)
