"""Every form of routed attention is causal, decodes as in one pass, ignores padding, packs, checkpoints, compiles and is saved."""

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers.cache_utils import StaticCache

from modeling_moe import MoEForCausalLM
from tests.builders import tiny_config
from tests.core.attention_variants import VARIANTS, model_of


# name -> variant and fields
CASES = {
    "moa": ("moa", {}),
    "moa, all": ("moa", {"attention_bias": True, "qk_norm": "head", "sliding_window": 3}),
    "switch_head": ("switch_head", {}),
    "switch_head, all": ("switch_head", {"attention_bias": True, "qk_norm": "head", "sliding_window": 3}),
    "switch_head, capacity": ("switch_head", {"expert_capacity": 2}),
    "moh": ("moh", {}),
    "moh, unit": ("moh", {"attention_head_gates": "unit", "sliding_window": 3}),
    "moh, capacity": ("moh", {"expert_capacity": 2}),
    "routing_transformer": ("routing_transformer", {}),
    "routing_transformer, window": ("routing_transformer", {"attention_cluster_window": 2}),
    "routing_transformer, sliding": ("routing_transformer", {"attention_cluster_window": 2, "sliding_window": 4}),
}
PLAIN = [name for name in CASES if "," not in name]


def case(name: str, **fields) -> MoEForCausalLM:
    variant, own = CASES[name]
    return model_of(variant, **own, **fields).double()


def ids_of(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_decoding_equals_one_pass(name):
    model, ids = case(name).eval(), ids_of()
    expected = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    chunk = model(ids[:, 4:6], cache=first.cache, use_cache=True)
    steps = [model(ids[:, i : i + 1], cache=chunk.cache, use_cache=True).logits for i in range(6, 9)]
    torch.testing.assert_close(torch.cat([first.logits, chunk.logits, *steps], dim=1), expected, rtol=0, atol=1e-10)
    if "capacity" not in name and "routing_transformer" not in name:
        static = StaticCache(config=model.config, max_cache_len=12)
        steps = [model(ids[:, i : i + 1], cache=static, use_cache=True).logits for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_later_tokens_and_other_rows_change_nothing(name):
    model, ids = case(name), ids_of()
    for cut in (1, 4, 8):
        other = ids.clone()
        other[0, cut:], other[1] = 5, 7
        for mode in (model.train(), model.eval()):
            before, after = mode(ids).logits, mode(other).logits
            torch.testing.assert_close(before[0, :cut], after[0, :cut], rtol=0, atol=1e-12)
            assert not torch.equal(before[0, cut:], after[0, cut:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_padding_changes_nothing(name, side):
    model, ids = case(name).eval(), ids_of(1, 6)
    pads = torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    alone = model(ids, output_router_logits=True)
    beside = model(padded, attention_mask=mask, position_ids=positions, output_router_logits=True)
    torch.testing.assert_close(beside.logits[mask > 0], alone.logits[0], rtol=0, atol=1e-10)
    assert torch.equal(beside.attention_expert_load, alone.attention_expert_load)
    torch.testing.assert_close(beside.aux_loss, alone.aux_loss)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_decoding_after_left_padding_equals_decoding_alone(name):
    model, ids = case(name).eval(), ids_of(1, 8)
    expected = model(ids).logits[0, 5:]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    first = model(padded[:, :7], attention_mask=mask[:, :7], position_ids=positions[:, :7], use_cache=True)
    found = []
    for i in range(7, 10):
        step = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
        found.append(model(padded[:, i : i + 1], cache=first.cache, use_cache=True, **step).logits[0])
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", *PLAIN])
@torch.no_grad()
def test_a_prepared_mask_means_the_same_to_all_attention_functions(name):
    model = (MoEForCausalLM(tiny_config()) if name == "plain" else case(name).float()).eval()
    ids = ids_of()
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    # the first two tokens of a row are seen by themselves alone
    seen[0, :, 2:, :2] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=added).logits
    assert not torch.allclose(expected, model(ids).logits)
    for function in ("sdpa", "eager"):
        model.set_attn_implementation(function)
        for mask in (seen, added, {"full_attention": seen}):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, rtol=0, atol=2e-5)
        with pytest.raises(ValueError, match=r"attention_mask is \(2, 1, 9, 9\) of torch.int64: give bool"):
            model(ids, attention_mask=seen.long())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moa, all", "switch_head, all", "moh, unit"])
@torch.no_grad()
def test_flex_attention_equals_sdpa(name):
    model, ids, mask = case(name).float().eval(), ids_of(), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("flex_attention")
    got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask > 0], expected[mask > 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_packed_sequences_are_as_alone(name):
    model, ids = case(name).eval(), ids_of(1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions).logits[0]
    expected = torch.cat([model(ids[:, :4]).logits[0], model(ids[:, 4:]).logits[0]])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)


def gradients_of_step(model, ids, call=None) -> dict[str, torch.Tensor]:
    model.train()
    outputs = (model if call is None else call)(ids, labels=ids)
    outputs.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"loss": outputs.loss.detach()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    model, ids = case(name, router_seq_aux_loss_coef=0.1, router_aux_loss_coef=0.1), ids_of()
    expected = gradients_of_step(model, ids)
    assert expected.keys() - {"loss"} == {name for name, _ in model.named_parameters()}
    totals = [buffer.clone() for buffer in model.model.router_totals.buffers()]
    model.model.router_totals.reset()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients_of_step(model, ids)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)
    # a recomputed layer is observed once
    for mine, theirs in zip(model.model.router_totals.buffers(), totals, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="its own grouped_mm fallback has no compiled backward"
)
@pytest.mark.parametrize("name", [*PLAIN, "routing_transformer, sliding"])
def test_a_training_step_compiles_without_graph_breaks(name):
    model, ids = case(name).float(), ids_of()
    expected = gradients_of_step(model, ids)
    torch.compiler.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients_of_step(model, ids, call)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_counted(name):
    model = case(name)
    config = model.config
    assert config.num_params() == model.num_parameters()
    idle = sum(
        parameter.numel() // count * (count - per_token)
        for part, count, per_token in (
            ("mlp", config.num_experts, config.num_experts_per_tok),
            ("self_attn", config.attention_experts, config.attention_experts_per_tok),
        )
        for key, parameter in model.named_parameters()
        if f"{part}.experts." in key
    )
    assert config.num_active_params() == config.num_params() - idle


@pytest.mark.parametrize("name", CASES)
def test_is_saved_and_loaded(name, tmp_path):
    model, ids = case(name).float().train(), ids_of()
    model(ids, labels=ids).loss.backward()
    model.update_routers()
    model.eval().save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    theirs = loaded.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(theirs[key], tensor), key
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_model_is_pickled_and_copied(variant):
    model, ids = model_of(variant).eval(), ids_of()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(ids).logits, model(ids).logits)
        routed = other.model.layers[0].self_attn
        # the copy's routers read the copy's configuration
        other.config.router_aux_loss_coef = 0.25
        assert routed.routing_config.router_aux_loss_coef == 0.25 != model.config.router_aux_loss_coef
        assert routed.routing_config.num_experts == model.model.layers[0].self_attn.routing_config.num_experts


def test_a_missing_expert_of_a_head_is_named(tmp_path):
    model_of("switch_head").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    # 3 heads with 4 experts each
    del tensors["model.layers.1.self_attn.experts.11.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.self_attn.experts.11.up_proj.weight"):
        MoEForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_generates_as_without_a_cache(name):
    model, ids = case(name).eval(), ids_of(2, 5)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    beams = options | {"num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_losses_without_a_gradient_are_no_part_of_the_training_loss(variant, kind):
    fields = {"mlp_layer_types": [kind] * 3, "router_aux_loss_coef": 0, "router_z_loss_coef": 0.2}
    model, ids = model_of(variant, **fields).train(), ids_of()
    outputs = model(ids, labels=ids, output_router_logits=True)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    logits = [outputs.router_logits] if kind == "sparse" else []
    if variant != "routing_transformer":
        # the heads of switch_head choose by themselves
        parts = 6 if variant == "switch_head" else 1
        logits.append([each.unflatten(-1, (parts, -1)) for each in outputs.attention_router_logits])
    for routers in logits:
        expected = expected + 0.2 * torch.stack([each.logsumexp(dim=-1).square().mean() for each in routers]).mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert model.model.has_router_losses == bool(logits)
    assert outputs.aux_loss > 0.5  # the figure remains


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("side", ["left", "right", None])
@torch.no_grad()
def test_an_assistant_changes_no_token(name, side):
    model, assistant, ids = (
        case(name).eval(),
        case(name, num_hidden_layers=1, mlp_layer_types=["sparse"]).eval(),
        ids_of(1, 5),
    )
    pads = torch.zeros(1, 2, dtype=torch.long)
    ids = {"left": torch.cat([pads, ids], dim=1), "right": torch.cat([ids, pads], dim=1), None: ids}[side]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    options["attention_mask"] = (ids > 0).long()
    expected = model.generate(ids, use_cache=False, **options)
    for helper in ({"assistant_model": model}, {"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(ids, **helper, **options), expected)


@pytest.mark.parametrize("variant", ["switch_head", "moh"])
def test_the_selection_bias_moves_and_selects(variant):
    model = model_of(variant, router_selection_bias=True, router_bias_update_rate=0.1).train()
    load = model(ids_of(), labels=ids_of()).attention_expert_load
    model.update_routers()
    for layer, tokens in zip(model.model.layers, load, strict=True):
        gate = layer.self_attn.gate
        torch.testing.assert_close(gate.e_score_correction_bias, 0.1 * torch.sign(tokens.mean() - tokens))
    gate.e_score_correction_bias.fill_(-100)
    gate.e_score_correction_bias[1] = 100
    assert (gate(torch.randn(20, 32)).index == 1).any(dim=-1).all()


@pytest.mark.parametrize("name", ["switch_head", "moh"])
def test_the_global_balance_counts_all_processes_choices(name):
    model, ids = case(name, router_aux_loss_scope="global", router_aux_loss_coef=0.3).train(), ids_of()
    found = gradients_of_step(model, ids)
    assert found["loss"].isfinite()
    load = model.model.router_totals.kinds["attention"].load
    assert load.shape[0] == 3
    assert (load.sum(dim=-1) == ids.numel() * model.config.attention_routing.num_experts_per_tok).all()


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        ("switch_head", {"num_key_value_heads": 1}, r"num_key_value_heads \(1\) is not num_attention_heads \(3\)"),
        ("switch_head", {"attention_head_gates": "unit"}, "attention_head_gates is 'unit', which nothing reads"),
        ("switch_head", {"router_selection_bias": True, "router_controller": "quantile"}, "'quantile'"),
        ("moh", {"attention_experts": 7}, r"attention_experts \(7\) .* at most num_attention_heads \(6\)"),
        ("moh", {"attention_expert_dropout": 0.1}, "attention_expert_dropout is 0.1, which nothing reads"),
        ("moh", {"attention_entropy_loss_coef": 0.1}, "attention_entropy_loss_coef is 0.1, which nothing reads"),
        ("moh", {"attention_cluster_window": 3}, "attention_cluster_window is 3, which nothing reads"),
        ("moh", {"attn_output_gate": True}, "attn_output_gate is True, which nothing reads"),
        (
            "routing_transformer",
            {"mlp_layer_types": ["dense"] * 3, "expert_capacity": 2},
            "expert_capacity is 2, which nothing reads",
        ),
        (
            "routing_transformer",
            {"mlp_layer_types": ["dense"] * 3, "router_jitter_noise": 0.1},
            "router_jitter_noise is 0.1, which nothing reads",
        ),
        ("routing_transformer", {"attention_experts": 1, "attention_experts_per_tok": 2}, "attention_experts_per_tok"),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(variant, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**(VARIANTS[variant] | fields))


@pytest.mark.parametrize("variant", VARIANTS)
def test_routers_stay_fp32_in_a_bf16_model(variant):
    model, ids = model_of(variant).to(torch.bfloat16).train(), ids_of()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.logits.isfinite().all()
    gate = model.model.layers[0].self_attn.gate
    assert {tensor.dtype for tensor in gate.state_dict().values()} == {torch.float32}
