"""Attention upcycled to a mixture of attention heads computes the dense attention, alone and beside upcycled networks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models import gemma3, llama, olmo2, qwen2, qwen3

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.commands import plan as plan_command
from modeling_moe.commands import upcycle as upcycle_command
from modeling_moe.conversion import load_state
from modeling_moe.hub.card import card_to_publish
from modeling_moe.upcycling import UpcyclingOptions, make_plan, upcycle_checkpoint
from modeling_moe.upcycling.assembly import assemble
from modeling_moe.upcycling.plan import sparse_config
from tests.builders import SHAPE, SMALLEST, tiny_config, train_tokenizer
from tests.upcycling.test_upcycle import FAMILIES, IDS, SIZE, save_source


ALONE = {"layers": "none", "attention_experts": 5, "attention_experts_per_tok": 3}
MODES = {
    "alone": ALONE,
    "one per token": {"layers": "none", "attention_experts": 2, "attention_experts_per_tok": 1, "router_init": "zero"},
    "with copies": {"num_experts": 3, "attention_experts": 4},
    "with virtual groups": {
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "granularity": 4,
        "layers": "every:2",
        "attention_experts": 3,
        "attention_experts_per_tok": 3,
    },
    "with a shared expert": {"num_experts": 3, "shared_expert": True, "attention_experts": 3},
}
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def upcycled(tmp_path, **options):
    plan, _ = upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions(**options))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values()), info
    return plan, model.eval()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_the_dense_model(mode, tmp_path):
    source = save_source("llama", tmp_path / "dense")
    plan, model = upcycled(tmp_path, **MODES[mode])
    assert plan.reason_not_exact is None
    assert model.config.routed_attention == "moa"
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, **EXACT)
    assert plan.params == model.num_parameters() == model.config.num_params()
    assert plan.bytes_on_disk == sum(t.nbytes for t in load_file(tmp_path / "moe" / "model.safetensors").values())
    # generation with a cache, of the dense model's heads
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    text, expected = (net.generate(IDS, **arguments) for net in (model, source))
    assert torch.equal(text.sequences, expected.sequences)
    assert text.past_key_values.layers[0].keys.shape == expected.past_key_values.layers[0].keys.shape


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])
def test_every_family_equals_its_dense_model(name, tmp_path):
    """The families have biases, norms of heads or of whole projections, windows, soft caps and partial rotations."""
    source = save_source(name, tmp_path / "dense")
    plan, model = upcycled(tmp_path, **ALONE)
    assert plan.reason_not_exact is None
    # sdpa omits Gemma 2's soft cap in transformers 5.17
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, **EXACT)


HOSTILE = {
    "one key head": llama.LlamaConfig(**SIZE | {"num_key_value_heads": 1}),
    "a key head for each query head": qwen3.Qwen3Config(**SIZE | {"num_key_value_heads": 4, "head_dim": 8}),
    "wide heads": qwen3.Qwen3Config(**SIZE | {"num_attention_heads": 2, "head_dim": 22}),
    "an odd hidden size": llama.LlamaConfig(**SIZE | {"hidden_size": 30, "num_attention_heads": 6, "head_dim": 14}),
    "windows in some layers": gemma3.Gemma3TextConfig(
        **SIZE | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "biases": qwen2.Qwen2Config(**SIZE | {"num_key_value_heads": 1}),
    "norms after the layer": olmo2.Olmo2Config(**SIZE | {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shapes(name, tmp_path):
    source = save_source(None, tmp_path / "dense", config=HOSTILE[name])
    _, model = upcycled(tmp_path, **ALONE)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected, got = (net(IDS, attention_mask=mask, position_ids=positions).logits for net in (source, model))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **EXACT)


def dense_state(model: MoEForCausalLM) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}


OWN = {
    "sinks": {"attention_sinks": True, "attn_implementation": "eager"},
    "soft cap": {"attn_logit_softcapping": 0.5, "attn_implementation": "eager"},
    "clip": {"clip_qkv": 0.1},
    "clip of biases": {"clip_qkv": 0.1, "qkv_bias": True},
    "norm after rotation": {"qk_norm": "head", "qk_norm_after_rope": True},
    "inverse layer index": {"scale_attn_by_inverse_layer_idx": True, "attention_multiplier": 0.4},
    "scaled by position": {
        "llama_4_scaling_beta": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "original_max_position_embeddings": 4},
    },
    "output bias": {"attention_output_bias": True},
}


@pytest.mark.parametrize("name", OWN)
def test_every_switch_of_attention_is_honoured(name):
    """Also those that no dense family of the conversions has, in the model that the plan's configuration makes."""
    dense = tiny_config(mlp_layer_types=["dense"] * 3, **OWN[name])
    source = MoEForCausalLM(dense).eval()
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            if "norm" in key or "bias" in key or "sinks" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    options = UpcyclingOptions(**ALONE)
    config = sparse_config(dense, options, torch.float32)
    model = load_state(config, assemble([dense_state(source)], config, options, {}))
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, **EXACT)


def test_a_gate_on_the_output_of_heads_is_refused():
    dense = tiny_config(mlp_layer_types=["dense"] * 3, attn_output_gate=True)
    with pytest.raises(ValueError, match="attn_output_gate"):
        sparse_config(dense, UpcyclingOptions(**ALONE), torch.float32)


def test_seeds_noise_and_names_on_disk(tmp_path):
    save_source("qwen2", tmp_path / "dense")
    runs = {
        "first": {"seed": 7},
        "same": {"seed": 7},
        "other": {"seed": 8},
        "more": {"seed": 7, "attention_experts": 5},
        "plain": {"seed": 7, "noise": 0.0},
    }
    results = {}
    for name, changes in runs.items():
        options = {"num_experts": 3, "attention_experts": 3, "noise": 0.1} | changes
        plan, _ = upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / name, UpcyclingOptions(**options))
        results[name] = load_file(tmp_path / name / "model.safetensors")
        assert bool(plan.reason_not_exact) == (name != "plain")
    first = results["first"]
    assert {name: tensor.shape for name, tensor in first.items() if "layers.1.self_attn" in name} == {
        f"model.layers.1.self_attn.{name}": torch.Size(shape)
        for name, shape in {
            "gate.weight": [3, 32],
            **{f"experts.{e}.up_proj.weight": [32, 32] for e in range(3)},
            **{f"experts.{e}.down_proj.weight": [32, 32] for e in range(3)},
            "k_proj.weight": [16, 32],
            "k_proj.bias": [16],
            "v_proj.weight": [16, 32],
            "v_proj.bias": [16],
            "q_bias": [32],
        }.items()
    }
    assert all(torch.equal(first[name], results["same"][name]) for name in first)
    inside = "model.layers.0.self_attn."
    for name in (f"{inside}gate.weight", f"{inside}experts.2.up_proj.weight", f"{inside}experts.2.down_proj.weight"):
        assert not torch.equal(first[name], results["other"][name])
    # the noise of an expert depends on the seed and on that expert alone
    assert all(torch.equal(first[name], results["more"][name]) for name in first if f"{inside}experts." in name)
    # the two routers of a layer, and two experts, have random numbers of their own
    assert not torch.equal(first[f"{inside}gate.weight"], first["model.layers.0.mlp.gate.weight"])
    plain = results["plain"]
    noise = [
        (first[f"{inside}experts.{e}.up_proj.weight"] - plain[f"{inside}experts.{e}.up_proj.weight"]) for e in (0, 1)
    ]
    assert not torch.equal(*noise)
    weight = plain[f"{inside}experts.0.up_proj.weight"]
    assert noise[0].std().item() == pytest.approx(0.1 * weight.std().item(), rel=0.1)


def test_feed_forward_experts_are_those_without_attention_experts(tmp_path):
    save_source("llama", tmp_path / "dense")
    for name, experts in (("with", 3), ("without", 0)):
        options = UpcyclingOptions(num_experts=3, noise=0.1, attention_experts=experts)
        upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / name, options)
    both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(both[name], alone[name]) for name in alone if ".self_attn." not in name)


def test_several_sources_fill_experts_and_share_the_rest(tmp_path):
    sources = [save_source("qwen2", tmp_path / name) for name in ("math", "code")]
    options = UpcyclingOptions(
        layers="none", attention_experts=4, sources=[str(tmp_path / "code")], source_weights=[0.75, 0.25]
    )
    plan, _ = upcycle_checkpoint(str(tmp_path / "math"), tmp_path / "moe", options)
    assert plan.reason_not_exact.startswith("several sources")
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    math, code = (source.state_dict() for source in sources)
    prefix = "model.layers.1.self_attn."
    for expert, source in enumerate((math, math, code, code)):
        assert torch.equal(tensors[f"{prefix}experts.{expert}.up_proj.weight"], source[f"{prefix}q_proj.weight"])
        assert torch.equal(tensors[f"{prefix}experts.{expert}.down_proj.weight"], source[f"{prefix}o_proj.weight"])
    for ours, theirs in (("k_proj.weight", "k_proj.weight"), ("q_bias", "q_proj.bias")):
        expected = 0.75 * math[f"{prefix}{theirs}"] + 0.25 * code[f"{prefix}{theirs}"]
        torch.testing.assert_close(tensors[f"{prefix}{ours}"], expected)


def test_both_routers_and_all_chosen_experts_get_gradient(tmp_path):
    save_source("llama", tmp_path / "dense")
    _, model = upcycled(tmp_path, num_experts=3, attention_experts=3, noise=0.1)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    for layer in model.model.layers:
        for part in (layer.self_attn.gate.weight, layer.mlp.gate.weight, *layer.self_attn.experts.parameters()):
            assert part.grad.abs().max() > 0


@pytest.mark.parametrize("router", ["text", "kmeans", "ridge"])
def test_measured_routers(router, tmp_path):
    tokenizer = train_tokenizer()
    save_source(None, tmp_path / "dense", config=llama.LlamaConfig(**SIZE | {"vocab_size": len(tokenizer)}))
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "a.txt").write_text("a router decides which expert a token is sent to. " * 40)
    (tmp_path / "b.txt").write_text("def load(path): return open(path).read() " * 40)
    text = {"calibration_data": [f"{name}={tmp_path / name}.txt" for name in "ab"], "calibration_tokens": 200}
    options = UpcyclingOptions(num_experts=4, attention_experts=6, router_init=router, router_logit_std=0.7, **text)
    _, verification = upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", options, check=True)
    assert verification.largest_difference < 1e-4
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    rows = [tensors[f"model.layers.1.{part}.gate.weight"] for part in ("self_attn", "mlp")]
    assert [row.shape for row in rows] == [(6, 32), (4, 32)]
    # alone, attention is measured on the same inputs
    alone = UpcyclingOptions(layers="none", attention_experts=6, router_init=router, router_logit_std=0.7, **text)
    upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "alone", alone)
    again = load_file(tmp_path / "alone" / "model.safetensors")["model.layers.1.self_attn.gate.weight"]
    torch.testing.assert_close(again, rows[0])
    recorded = json.loads((tmp_path / "moe" / "conversion.json").read_text())["recipe"]["measured"]
    assert {"layers.1.router", "layers.1.attention_router"} <= set(recorded)


def test_the_plan_counts_attention_experts():
    plan = make_plan(llama.LlamaConfig(**SHAPE), UpcyclingOptions(**MODES["with copies"]), torch.bfloat16)
    groups = {group.name: group for group in plan.groups}
    assert {
        name: group.count for name, group in groups.items() if "experts" in name or name in ("routers", "attention")
    } == {
        "attention": "2",
        "attention experts": "2 x 4",
        "routers": "4",
        "routed experts": "2 x 3",
    }
    assert groups["attention experts"].params == 2 * 4 * 2 * 32 * 32
    assert groups["attention"].params == 2 * 2 * 16 * 32
    assert groups["routers"].params == 2 * (4 + 3) * 32
    assert plan.params == sum(group.params for group in plan.groups) == MoEForCausalLM(plan.config).num_parameters()
    unused = 2 * (2 * 2 * 32 * 32 + 1 * 3 * 32 * 40)
    assert plan.active_params == plan.params - unused
    dense = make_plan(llama.LlamaConfig(**SHAPE), UpcyclingOptions(num_experts=3), torch.bfloat16)
    assert plan.cache_bytes() == dense.cache_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_experts": 2, "attention_experts_per_tok": 3},
            "attention_experts_per_tok is 3: it must lie between",
        ),
        ({"attention_experts": -1}, "attention_experts is -1: it must be 0 or positive"),
        ({"attention_experts_per_tok": 3}, "attention_experts_per_tok has no effect .* set attention_experts"),
        ({"layers": "none"}, "layers is 'none': set attention_experts"),
        (ALONE | {"num_experts": 16}, "num_experts has no effect with layers='none'"),
        (ALONE | {"shared_expert": True}, "shared_expert has no effect with layers='none'"),
        (ALONE | {"sources": ["other"]}, r"attention_experts \(5\) is not a multiple of the 2 sources"),
    ],
    ids=str,
)
def test_refused_options(options, message):
    further = [llama.LlamaConfig(**SHAPE) for _ in options.get("sources", [])]
    with pytest.raises(ValueError, match=message):
        make_plan(llama.LlamaConfig(**SHAPE), UpcyclingOptions(**options), torch.float32, further)


def test_a_reloaded_configuration_is_the_planned_one(tmp_path):
    save_source(None, tmp_path / "dense", config=llama.LlamaConfig(**SMALLEST | {"pad_token_id": 0}))
    plan, model = upcycled(tmp_path, **ALONE)
    assert MoEConfig.from_pretrained(tmp_path / "moe").to_diff_dict() == model.config.to_diff_dict()
    assert (plan.config.num_key_value_heads, plan.config.num_attention_heads, plan.config.head_dim) == (1, 6, 8)
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("mode", ["alone", "with copies"])
def test_card_tells_how_attention_was_upcycled_and_what_a_token_uses(mode, tmp_path):
    save_source("llama", tmp_path / "dense")
    plan, model = upcycled(tmp_path, **MODES[mode])
    card = card_to_publish(tmp_path / "moe", repo_id="you/model", license="mit")
    config = model.config
    for text in (
        "Mixture-of-Experts language model",
        f"`moa`, {config.attention_experts} experts in every layer, {config.attention_experts_per_tok} per token",
        f"{plan.active_params:,}",
        f"| Attention experts | {config.attention_experts} |",
    ):
        assert text in card
    assert ("Routed experts" in card) == (mode == "with copies")
    assert ("| Method | copy |" in card) == (mode == "with copies")


@pytest.mark.parametrize("command", ["plan", "upcycle"])
@pytest.mark.parametrize("mode", ["alone", "with copies"])
def test_commands_plan_attention_experts(command, mode, tmp_path, capsys):
    save_source("llama", tmp_path / "dense")
    flags = [f"--{name}={value}" for name, value in MODES[mode].items()]
    flags += ["--dry_run=true", f"--output_dir={tmp_path / 'moe'}"] if command == "upcycle" else []
    main = {"plan": plan_command.main, "upcycle": upcycle_command.main}[command]
    main([f"--model_name_or_path={tmp_path / 'dense'}", *flags])
    printed = " ".join(capsys.readouterr().out.split())
    options = MODES[mode]
    assert f"attention experts │ 2 x {options['attention_experts']}" in printed.replace("|", "│")
    told = (
        f"attention experts, per token │ {options['attention_experts']}, {options.get('attention_experts_per_tok', 2)}"
    )
    assert told in printed
    assert "computes the dense function │ yes" in printed
    assert ("experts, per token │ 3, 2" in printed) == (mode == "with copies")
    assert not (tmp_path / "moe").exists()


def test_nothing_is_read_before_it_is_asked_for():
    dense = tiny_config(mlp_layer_types=["dense"] * 3, qkv_bias=True)
    read = []

    def recorded(name: str, tensor: torch.Tensor) -> LazyTensor:
        def load(index):
            read.append(name)
            return tensor[index]

        return LazyTensor(tuple(tensor.shape), tensor.dtype, load)

    state = {name: recorded(name, tensor) for name, tensor in MoEForCausalLM(dense).state_dict().items()}
    options = UpcyclingOptions(**ALONE, noise=0.1)
    made = assemble([state], sparse_config(dense, options, torch.float32), options, {})
    assert read == []
    made["model.layers.1.self_attn.experts.3.down_proj.weight"].read()
    made["model.layers.1.self_attn.q_bias"].read()
    assert read == ["model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.q_proj.bias"]
