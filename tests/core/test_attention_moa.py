"""Mixtures of attention heads equal an einsum of their equations, and a model of them decodes, trains, packs and is saved as others."""

import math

import pytest
import torch
from safetensors import safe_open
from transformers.cache_utils import StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.attention_catalogue import attention_class
from modeling_moe.attention_moa import MixtureOfAttentionHeads
from modeling_moe.router import RoutingContext
from modeling_moe.router_losses import weigh_tokens
from tests.builders import tiny_config


# 4 heads of an expert on 2 key heads, 3 experts of 5 per token
MOA = {
    "routed_attention": "moa",
    "attention_experts": 5,
    "attention_experts_per_tok": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
VARIANTS = {
    "plain": {},
    "one head of an expert": {"num_attention_heads": 6},
    "one expert": {"attention_experts": 1, "attention_experts_per_tok": 1, "num_attention_heads": 4},
    "all experts": {"attention_experts_per_tok": 5, "num_attention_heads": 10},
    "biases": {"attention_bias": True},
    "qkv bias": {"qkv_bias": True},
    "head norm": {"qk_norm": "head"},
    "norm after rope": {"qk_norm": "head", "qk_norm_after_rope": True},
    "full norm": {"qk_norm": "full"},
    "clip": {"clip_qkv": 0.3},
    "sinks": {"attention_sinks": True},
    "softcap": {"attn_logit_softcapping": 0.7},
    "window": {"sliding_window": 3},
    "scale": {"attention_multiplier": 0.5, "scale_attn_by_inverse_layer_idx": True},
    "no rope": {"position_embedding_type": "learned"},
}
ONLY_EAGER = ("sinks", "softcap")
ROWS, LENGTH = 2, 7


def make(name: str, layer: int = 1) -> MixtureOfAttentionHeads:
    """Returns the attention of a variant in float64, with random weights."""
    torch.manual_seed(0)
    config = tiny_config(**(MOA | VARIANTS[name]))
    # transformers' eager attention computes the softmax in fp32
    config._attn_implementation = "eager" if name in ONLY_EAGER else "sdpa"
    attention = attention_class(config)(config, layer)
    assert isinstance(attention, MixtureOfAttentionHeads)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention.double()


def heads_of(attention, states: torch.Tensor, norm, rotary) -> torch.Tensor:
    """Returns projections (B, S, ..., width) as rotated heads (B, S, ..., heads, D) with norm and clip."""
    config = attention.config
    if config.qk_norm == "full":
        states = norm(states)
    states = states.unflatten(-1, (-1, config.head_dim))
    if config.qk_norm == "head" and not config.qk_norm_after_rope:
        states = norm(states)
    if config.clip_qkv is not None:
        states = states.clamp(-config.clip_qkv, config.clip_qkv)
    if rotary is not None:
        cos, sin = (x.view(*x.shape[:2], *[1] * (states.dim() - 3), -1) for x in rotary)
        states = states * cos + rotate_half(states) * sin
    return norm(states) if config.qk_norm_after_rope else states


def oracle(attention, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, rotary) -> torch.Tensor:
    """Computes `sum_s w_s attention(x W_Q^(I_s), K, V) W_O^(I_s) + b` head by head, from the equations."""
    config, experts = attention.config, attention.experts
    index, weight = index.unflatten(0, x.shape[:2]), weight.unflatten(0, x.shape[:2])  # (B, S, K)
    query = torch.einsum("bsh,bskdh->bskd", x, experts.up_proj[index])
    if attention.q_bias is not None:
        query = query + attention.q_bias
    query = heads_of(attention, query, attention.q_norm, rotary)  # (B, S, K, n, D)
    key = heads_of(attention, attention.k_proj(x), attention.k_norm, rotary)  # (B, S, G, D)
    value = attention.v_proj(x)
    if config.clip_qkv is not None:
        value = value.clamp(-config.clip_qkv, config.clip_qkv)
    value = value.unflatten(-1, (-1, config.head_dim))
    group = query.shape[3] // key.shape[2]
    outputs = []
    for head in range(query.shape[3]):
        scores = torch.einsum("bskd,btd->bskt", query[..., head, :], key[:, :, head // group]) * attention.scaling
        if config.attn_logit_softcapping is not None:
            scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        hidden = (distance < 0) | (distance >= (config.sliding_window or 10**6))
        scores = scores.masked_fill(hidden[:, None], -math.inf)
        if config.attention_sinks:
            sink = attention.sinks[head].expand(*scores.shape[:-1], 1)
            probabilities = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            probabilities = scores.softmax(dim=-1)
        outputs.append(torch.einsum("bskt,btd->bskd", probabilities, value[:, :, head // group]))
    attended = torch.stack(outputs, dim=3).flatten(3)  # (B, S, K, n * D)
    output = torch.einsum("bsk,bskd,bskhd->bsh", weight, attended, experts.down_proj[index])
    return output if attention.o_bias is None else output + attention.o_bias


def inputs(attention) -> dict:
    """Returns the arguments of attention for whole rows: states, rotary embedding and mask."""
    torch.manual_seed(1)
    states = torch.randn(ROWS, LENGTH, 32, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(LENGTH)[None]
    rotary = None
    if attention.rotates:
        rotary = tuple(x.double() for x in LlamaRotaryEmbedding(attention.config)(torch.zeros(1), positions))
    distance = positions.T - positions
    hidden = (distance < 0) | (distance >= (attention.sliding_window or 10**6))
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(hidden, -math.inf)[None, None]
    return {"hidden_states": states, "position_embeddings": rotary, "attention_mask": mask}


def gradients(output: torch.Tensor, attention, states: torch.Tensor) -> dict[str, torch.Tensor]:
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    named = dict(attention.named_parameters()) | {"x": states}
    found = torch.autograd.grad((output * upstream).sum(), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_equations_in_output_and_gradients(name):
    attention = make(name)
    arguments = inputs(attention)
    states, rotary = arguments["hidden_states"], arguments["position_embeddings"]
    output, probabilities, statistics = attention(**arguments)
    tokens = states.flatten(0, 1)
    logits = tokens @ attention.gate.weight.T
    best = logits.topk(attention.top_k, dim=-1)
    weight = best.values.softmax(dim=-1)  # over the chosen logits, as JetMoE writes it
    expected = oracle(attention, states, best.indices, weight, rotary)
    eager = name in ONLY_EAGER
    torch.testing.assert_close(output, expected, rtol=1e-4 if eager else 1e-9, atol=1e-5 if eager else 1e-12)
    if eager:
        assert probabilities.shape == (ROWS, attention.config.num_attention_heads, LENGTH, LENGTH)
    assert statistics == []
    mine, theirs = gradients(output, attention, states), gradients(expected, attention, states)
    assert mine["experts.up_proj"].any()
    for key, gradient in theirs.items():
        close = {"rtol": 1e-4, "atol": 1e-4} if eager else {"rtol": 1e-8, "atol": 1e-11}
        torch.testing.assert_close(mine[key], gradient, **close, msg=lambda text, key=key: f"{key}: {text}")


def test_a_dropped_assignment_adds_nothing():
    attention = make("plain")
    attention.capacity.absolute = 2
    arguments = inputs(attention)
    states, rotary = arguments["hidden_states"], arguments["position_embeddings"]
    context = RoutingContext(ROWS)
    _, routing = attention.route(states.flatten(0, 1), context)
    empty = routing.index == attention.router.num_outputs
    assert empty.any()
    assert empty.all(dim=-1).any()  # a token without any expert
    expected = oracle(attention, states, routing.index.masked_fill(empty, 0), routing.weight, rotary)
    output, _, _ = attention(**arguments, routing_context=context)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-12)


def test_unused_experts_get_no_gradient():
    attention = make("plain")
    with torch.no_grad():
        attention.gate.weight.zero_()
        attention.gate.weight[3:] = -1.0
    arguments = inputs(attention)
    arguments["hidden_states"] = arguments["hidden_states"].detach().abs()
    attention(**arguments)[0].sum().backward()
    for matrices in (attention.experts.up_proj, attention.experts.down_proj):
        assert matrices.grad[:3].any()
        assert not matrices.grad[3:].any()


def model_of(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(**(MOA | fields)))


@pytest.mark.parametrize(
    "fields",
    [{}, {"mlp_layer_types": ["dense"] * 3}, {"attention_bias": True, "qk_norm": "full", "attention_sinks": True}],
    ids=["plain", "dense networks", "with biases"],
)
def test_parameters_are_counted(fields):
    config = model_of(**fields).config
    model = MoEForCausalLM(config)
    assert config.num_params() == model.num_parameters()
    idle = sum(
        parameter.numel() // parameter.shape[0] * (parameter.shape[0] - per_token)
        for part, per_token in (("mlp", config.num_experts_per_tok), ("self_attn", config.attention_experts_per_tok))
        for name, parameter in model.named_parameters()
        if f"{part}.experts." in name
    )
    assert config.num_active_params() == config.num_params() - idle


def test_the_cache_holds_the_key_heads_alone():
    model = model_of().eval()
    cache = model(torch.randint(3, 99, (2, 9)), use_cache=True).cache
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (2, 2, 9, 12)


@pytest.mark.parametrize(
    "fields", [{}, {"sliding_window": 3}, {"expert_capacity": 2}, {"attention_sinks": True}], ids=str
)
def test_decoding_equals_one_pass(fields):
    model = model_of(**fields).double().eval()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        steps = [model(ids[:, i : i + 1], cache=first.cache, use_cache=True).logits for i in range(4, 9)]
        torch.testing.assert_close(torch.cat([first.logits, *steps], dim=1), expected, rtol=0, atol=1e-10)
        if "expert_capacity" not in fields:
            static = StaticCache(config=model.config, max_cache_len=12)
            steps = [model(ids[:, i : i + 1], cache=static, use_cache=True).logits for i in range(9)]
            torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0, atol=1e-10)


def test_later_tokens_and_other_rows_change_nothing():
    model = model_of().double()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 6:], other[1] = 5, 7
    for mode in (model.train(), model.eval()):
        before, after = mode(ids), mode(other)
        torch.testing.assert_close(before.logits[0, :6], after.logits[0, :6], rtol=0, atol=1e-12)
        assert not torch.equal(before.logits[0, 6:], after.logits[0, 6:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = model_of().double().eval()
    ids = torch.randint(3, 99, (1, 6), generator=torch.Generator().manual_seed(1))
    pads = torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    alone = model(ids, output_router_logits=True)
    beside = model(padded, attention_mask=mask, position_ids=positions, output_router_logits=True)
    torch.testing.assert_close(beside.logits[mask > 0], alone.logits[0], rtol=0, atol=1e-10)
    assert torch.equal(beside.attention_expert_load, alone.attention_expert_load)
    torch.testing.assert_close(beside.aux_loss, alone.aux_loss)


def test_packed_sequences_are_as_alone():
    model = model_of(expert_capacity=2).double().eval()
    ids = torch.randint(3, 99, (1, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions).logits[0]
    expected = torch.cat([model(ids[:, :4]).logits[0], model(ids[:, 4:]).logits[0]])
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-10)


def step(model, ids, **arguments) -> dict[str, torch.Tensor]:
    outputs = model.train()(ids, labels=ids, **arguments)
    outputs.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"loss": outputs.loss.detach()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model = model_of(router_seq_aux_loss_coef=0.1, router_aux_loss_coef=0.1).double()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = step(model, ids)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_the_router_losses_of_both_kinds_are_added():
    model = model_of(router_aux_loss_coef=0.3, router_z_loss_coef=0.2, mlp_layer_types=["sparse", "dense", "sparse"])
    model = model.double().train()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = model(ids, labels=ids, output_router_logits=True)
    plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    z = sum(
        torch.stack([logits.logsumexp(dim=-1).square().mean() for logits in routers]).mean()
        for routers in (outputs.router_logits, outputs.attention_router_logits)
    )
    balance = 0.0
    for routers, load in (
        (outputs.router_logits, outputs.expert_load),
        (outputs.attention_router_logits, outputs.attention_expert_load),
    ):
        shares = torch.stack([logits.softmax(dim=-1).mean(dim=0) for logits in routers])
        balance = balance + (load / ids.numel() * shares).sum(dim=-1).mean() * load.shape[1]
    assert (len(outputs.router_logits), len(outputs.attention_router_logits)) == (2, 3)
    assert outputs.expert_load.shape == (2, 5)
    assert outputs.attention_expert_load.shape == (3, 5)
    assert outputs.attention_expert_load.sum(dim=-1).tolist() == [ids.numel() * 3] * 3
    torch.testing.assert_close(outputs.aux_loss, balance)
    torch.testing.assert_close(outputs.loss, plain + 0.3 * balance + 0.2 * z, rtol=1e-6, atol=0)


def test_the_loss_of_attention_alone_trains_its_router():
    model = model_of(mlp_layer_types=["dense"] * 3, router_z_loss_coef=0.5).train()
    assert model.model.has_router_losses
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = model(ids, output_router_logits=True)
    assert outputs.expert_load is None
    assert outputs.router_logits == ()
    (outputs.logits * 0).sum().backward()  # the router losses reach the gradient through the hidden states
    assert all(layer.self_attn.gate.weight.grad.any() for layer in model.model.layers)


@pytest.mark.parametrize("scope", ["batch", "global"])
@pytest.mark.parametrize("dense", [False, True])
def test_controllers_move_the_selection_bias_of_attention(scope, dense):
    kinds = ["dense"] * 3 if dense else None
    fields = {"router_selection_bias": True, "router_bias_update_rate": 0.1, "router_aux_loss_scope": scope}
    model = model_of(**fields, mlp_layer_types=kinds).train()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    load = model(ids, labels=ids).attention_expert_load
    model.update_routers()
    for layer, tokens in zip(model.model.layers, load, strict=True):
        expected = 0.1 * torch.sign(tokens.mean() - tokens)
        torch.testing.assert_close(layer.self_attn.gate.e_score_correction_bias, expected)
    assert not any(buffer.any() for buffer in model.model.router_totals.buffers())


def test_is_saved_expert_by_expert_and_loaded(tmp_path):
    model = model_of(attention_bias=True, attention_sinks=True, attention_experts=4).eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for expert in range(4):
        assert shapes[f"model.layers.1.self_attn.experts.{expert}.up_proj.weight"] == [48, 32]
        assert shapes[f"model.layers.1.self_attn.experts.{expert}.down_proj.weight"] == [32, 48]
    loaded = MoEForCausalLM.from_pretrained(tmp_path).eval()
    for (name, mine), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)


def test_statistics_are_those_of_the_router():
    attention = make("plain").train()
    mask = torch.ones(ROWS, LENGTH, dtype=torch.float64)
    _, _, (statistics,) = attention(**inputs(attention), token_weights=weigh_tokens(mask))
    assert statistics.load.sum() == ROWS * LENGTH * 3
    assert statistics.tokens == ROWS * LENGTH


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_experts_per_tok": 6}, "attention_experts_per_tok is 6"),
        ({"num_attention_heads": 8}, r"num_attention_heads \(8\) is not a multiple"),
        ({"num_key_value_heads": 4, "num_attention_heads": 6 * 3}, "num_attention_heads"),
        ({"attn_output_gate": True}, "attn_output_gate is True, which nothing reads: unset routed_attention"),
        ({"routed_attention": None}, "attention_experts is 5, which nothing reads: set routed_attention"),
        ({"routed_attention": "mao"}, "routed_attention 'mao' is unknown: choose one of None, moa"),
        ({"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 5}, "kv_lora_rank"),
        (
            {"mlp_layer_types": ["dense"] * 3, "scoring_func": "sigmoid"},
            "scoring_func is 'sigmoid', which nothing reads",
        ),
        ({"mlp_layer_types": ["dense"] * 3, "routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0"),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**(MOA | fields))


def test_the_configuration_survives_a_file(tmp_path):
    config = tiny_config(**MOA)
    config.save_pretrained(tmp_path)
    assert MoEConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    plain = config.replace(routed_attention=None, attention_experts=8, attention_experts_per_tok=2)
    assert plain.routed_attention is None


def test_the_router_of_networks_keeps_its_own_fields():
    config = tiny_config(
        **MOA, scoring_func="sigmoid", norm_topk_prob=False, routed_scaling_factor=2.5, num_null_experts=2
    )
    view = config.attention_routing
    assert (view.num_experts, view.num_experts_per_tok, view.num_router_outputs) == (5, 3, 5)
    assert (view.scoring_func, view.norm_topk_prob, view.routed_scaling_factor) == ("softmax", True, 1.0)
    config.router_aux_loss_coef = 0.7
    assert view.router_aux_loss_coef == 0.7
    assert (config.num_router_outputs, config.scoring_func) == (7, "sigmoid")


def test_the_graph_is_compiled_whole_in_evaluation_and_training():
    model = model_of(router_selection_bias=True, router_bias_update_rate=0.1).eval()
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(ids).logits
        torch.testing.assert_close(found, model(ids).logits)
    expected = step(model, ids)
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
