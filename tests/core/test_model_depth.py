"""Layers that process only chosen tokens equal a loop over tokens, and such a model decodes, trains, packs and is saved as others."""

import math

import pytest
import torch
from transformers.cache_utils import StaticCache
from transformers.models.llama.modeling_llama import rotate_half

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.model_depth import Chosen, HoledCache
from modeling_moe.monitoring import expert_drift, watch
from modeling_moe.replay import RoutingStore, record_routing, replay_routing
from modeling_moe.router import RoutingContext
from modeling_moe.router_balancing import forget_counts
from tests.builders import tiny_config
from tests.processes import run_without_package


DEPTH = {"depth_layers": [0, 1, 1], "depth_capacity": 0.5}
VARIANTS = {
    "sparse": {"mlp_layer_types": ["sparse"] * 3},
    "dense": {"mlp_layer_types": ["dense"] * 3},
    "window": {"sliding_window": 3},
    "both windows": {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "parallel": {"norm_placement": "parallel"},
    "learned positions": {"position_embedding_type": "learned"},
    "latent": {
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "routed attention": {
        "routed_attention": "moa",
        "attention_experts": 5,
        "attention_experts_per_tok": 3,
        "num_attention_heads": 12,
    },
    "experts of each head": {
        "routed_attention": "switch_head",
        "attention_experts": 3,
        "num_attention_heads": 2,
    },
    "heads as experts": {
        "routed_attention": "moh",
        "attention_experts": 4,
        "num_attention_heads": 6,
    },
    "choices carried": {"router_type": "dag", "mlp_layer_types": ["sparse"] * 3},
    "states carried": {
        "router_type": "zaya",
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
        "depth_layers": [1, 0, 1],
    },
    "eager": {"attn_implementation": "eager"},
    "first layer": {"depth_layers": [1, 1, 0]},
}


def model_of(**fields) -> MoEForCausalLM:
    """Returns a float64 model in evaluation whose routers have chosen about half of the tokens."""
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**(DEPTH | fields))).double().eval()
    for layer in model.model.layers:
        if layer.depth is not None and "threshold" in layer.depth.gate.state_dict():
            layer.depth.gate.threshold.fill_(0.55)
        if layer.is_sparse and layer.mlp.router.carries:
            for parameter in layer.mlp.gate.parameters():
                torch.nn.init.normal_(parameter, std=0.5)  # what is carried counts for nothing in a new model
    return model


def ids_of(rows: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def choices(outputs, rows: int) -> list[list[bool]]:
    """Returns whether each token (rows of S) was chosen, for each layer with a router of depth."""
    return [(logits.sigmoid() > 0.55).view(rows, -1) for logits in outputs.depth_router_logits]


def oracle(layer, states: torch.Tensor, rotary) -> torch.Tensor:
    """Computes `y_t = r_t f(x)_t + x_t` token by token; chosen tokens attend to chosen tokens before them."""
    attention, rows = layer.self_attn, []
    before_attention, _, before_mlp, _ = layer.norm_names
    width, groups = attention.head_dim, attention.num_key_value_groups
    for row in range(len(states)):
        outputs, keys, values = [], [], []
        for t in range(states.shape[1]):
            x = states[row, t]
            r = torch.sigmoid(layer.depth.gate.weight[0] @ x)
            if r <= layer.depth.gate.threshold[0]:
                outputs.append(x)
                continue
            cos, sin = (part[0, t] for part in rotary)
            normed = getattr(layer, before_attention)(x)
            query, key = (
                heads * cos + rotate_half(heads) * sin
                for heads in (p(normed).view(-1, width) for p in (attention.q_proj, attention.k_proj))
            )
            keys.append((t, key))
            values.append(attention.v_proj(normed).view(-1, width))
            attended = []
            for head in range(len(query)):
                seen = [i for i, (place, _) in enumerate(keys) if t - place < (attention.sliding_window or math.inf)]
                scores = torch.stack([query[head] @ keys[i][1][head // groups] * attention.scaling for i in seen])
                mixed = torch.stack([values[i][head // groups] for i in seen])
                attended.append(scores.softmax(dim=0) @ mixed)
            attended = attention.o_proj(torch.cat(attended))
            read = x if layer.parallel else x + attended
            normed = getattr(layer, before_mlp)(read)[None, None]
            network = layer.mlp(normed, RoutingContext(1), None)[0] if layer.is_sparse else layer.mlp(normed)
            outputs.append(x + r * (attended + network[0, 0]))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["sparse", "dense", "window", "parallel"])
def test_a_layer_equals_the_equation_in_output_and_gradients(name):
    model = model_of(**VARIANTS[name])
    model.set_experts_implementation("eager")
    layer, ids = model.model.layers[1], ids_of()
    seen = {}
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, x=args[0]), with_kwargs=True)
    layer.register_forward_hook(lambda *args: seen.update(y=args[-1][0]))
    model(ids, use_cache=False)
    x = seen["x"].detach().requires_grad_()
    arguments = {name: value for name, value in seen.items() if name not in ("x", "y")}
    found, expected = layer(x, **arguments)[0], oracle(layer, x, seen["position_embeddings"])
    moved = (found != x).any(dim=-1)
    assert 4 < moved.sum() < 18
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    upstream = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    both = [
        torch.autograd.grad((y * upstream).sum(), list(weights.values()), allow_unused=True) for y in (found, expected)
    ]
    assert both[0][list(weights).index("depth.gate.weight")].abs().max() > 1e-3
    for name, mine, theirs in zip(weights, *both, strict=True):
        if mine is None or theirs is None:
            assert not any(gradient is not None and gradient.any() for gradient in (mine, theirs)), name
        else:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_equals_one_pass(name):
    model, ids = model_of(**VARIANTS[name]), ids_of(length=12)
    exact = 1e-6 if name == "eager" else 1e-10  # transformers' eager attention computes the softmax in fp32
    with torch.no_grad():
        whole = model(ids, use_cache=False, output_router_logits=True)
        cached = model(ids, use_cache=True).logits
        for rows in (slice(0, 2), slice(0, 1)):  # a row alone skips layers in some steps
            for steps in ([1] * 12, [5, 1, 4, 2]):
                cache, parts, first = None, [], 0
                for length in steps:
                    outputs = model(ids[rows, first : first + length], cache=cache, use_cache=True)
                    cache, first = outputs.cache, first + length
                    parts.append(outputs.logits)
                torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits[rows], rtol=0, atol=exact)
    assert all(0 < chosen.sum() < ids.numel() for chosen in choices(whole, 2))
    torch.testing.assert_close(cached, whole.logits, rtol=0, atol=exact)


def test_a_skipped_step_computes_nothing():
    model, ids = model_of(), ids_of(rows=1)
    layer, calls = model.model.layers[2], []
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    cache = model(ids, use_cache=True).cache
    keys = cache.layers[2].keys.shape[2]
    layer.depth.gate.threshold.fill_(1.0)
    model(ids[:, :1], cache=cache, use_cache=True)
    assert len(calls) == 1
    assert (keys, cache.layers[2].keys.shape[2], cache.get_seq_length()) == (9, 10, 10)
    assert not cache.layers[2].keys[:, :, -1].any()


def test_only_chosen_tokens_are_computed():
    model, ids, widths = model_of(), ids_of(rows=3), {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *a, i=index: widths.update({i: a[-1][0].shape[1]}))
    outputs = model(ids, use_cache=False, output_router_logits=True)
    expected = [int(chosen.sum(dim=1).max()) for chosen in choices(outputs, 3)]
    assert [widths[1], widths[2]] == expected
    assert widths[0] == 9
    assert max(expected) < 9
    # sparse network of layer 2: K assignments of each chosen token
    assert outputs.expert_load[1].sum() == 3 * outputs.depth_load[1].item()
    assert outputs.depth_load[:, 0].tolist() == [chosen.sum().item() for chosen in choices(outputs, 3)]


@pytest.mark.parametrize("depth_layers", [[0, 1, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("name", ["choices carried", "states carried"])
def test_a_skipped_token_carries_on_what_it_carried_before(name, depth_layers):
    fields = {"mlp_layer_types": ["sparse"] * 3, "depth_layers": depth_layers}
    model, ids, passes = model_of(**(VARIANTS[name] | fields)), ids_of(rows=3), []
    for block in model.model.sparse_blocks():
        block.gate.register_forward_hook(lambda gate, args, routing: passes.append((args[1].carried, routing.carried)))
    chosen = choices(model(ids, output_router_logits=True, use_cache=False), 3)
    marked = [torch.ones_like(ids).bool()] * (3 - len(chosen)) + chosen
    known, skipped = {}, 0
    for layer, (before, after) in enumerate(passes):
        for row in range(3):
            places = marked[layer][row].nonzero().flatten().tolist()
            for n, place in enumerate(places):
                if layer > 0:
                    found = before.unflatten(0, (3, -1))[row, n]
                    assert torch.equal(found, known.get((row, place), torch.zeros_like(found)))
                    skipped += not marked[layer - 1][row, place]
                known[row, place] = after.unflatten(0, (3, -1))[row, n]
    assert skipped > 2


def test_later_tokens_and_other_rows_change_nothing():
    model, ids = model_of(), ids_of()
    other = ids.clone()
    other[0, 6:], other[1] = 5, 7
    for mode in (model.train(), model.eval()):
        before, after = mode(ids), mode(other)
        forget_counts(model)
        torch.testing.assert_close(before.logits[0, :6], after.logits[0, :6], rtol=0, atol=1e-12)
        assert not torch.equal(before.logits[0, 6:], after.logits[0, 6:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_nothing(side, implementation):
    model = model_of(sliding_window=4, attn_implementation=implementation)
    ids, pads = ids_of(1, 6), torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([pads, ids] if side == "left" else [ids, pads], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    alone = model(ids, output_router_logits=True)
    for cache in (False, True):
        beside = model(padded, attention_mask=mask, position_ids=positions, output_router_logits=True, use_cache=cache)
        torch.testing.assert_close(beside.logits[mask > 0], alone.logits[0], rtol=0, atol=1e-6)
        for name in ("depth_load", "expert_load"):
            assert torch.equal(getattr(beside, name), getattr(alone, name))
        torch.testing.assert_close(beside.aux_loss, alone.aux_loss)


def test_packed_sequences_are_as_alone():
    model, ids = model_of(capacity_factor=0.6, eval_capacity_factor=0.6), ids_of(1, 11)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    packed = model(ids, position_ids=positions, output_router_logits=True)
    expected = torch.cat([model(ids[:, :4]).logits[0], model(ids[:, 4:]).logits[0]])
    torch.testing.assert_close(packed.logits[0], expected, rtol=0, atol=1e-10)
    assert packed.dropped_share[1] > 0


def step(model, ids) -> dict[str, torch.Tensor]:
    outputs = model.train()(ids, labels=ids)
    outputs.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"loss": outputs.loss.detach()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["window", "choices carried", "states carried"])
def test_checkpointing_gives_the_same_gradients(name, reentrant):
    model, ids = model_of(**VARIANTS[name], router_aux_loss_coef=0.1, router_z_loss_coef=0.1), ids_of()
    expected = step(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = step(model, ids)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_losses_of_one_expert_are_the_z_loss_alone():
    model = model_of(**VARIANTS["dense"], router_z_loss_coef=0.3).train()
    ids = ids_of()
    outputs = model(ids, labels=ids, output_router_logits=True)
    plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    z = torch.stack([logits.square().mean() for logits in outputs.depth_router_logits]).mean()
    torch.testing.assert_close(outputs.loss, plain + 0.3 * z, rtol=1e-6, atol=0)
    assert outputs.aux_loss is None
    assert outputs.expert_load is None


@pytest.mark.parametrize("labels", [0, 2, 9])
def test_losses_inside_a_layer_are_means_over_the_chosen_tokens(labels):
    """Of one sequence, whose tokens weigh less than 1 with few labels, and without any."""
    fields = {"router_z_loss_coef": 0.1, "router_aux_loss_coef": 0.1, "router_aux_loss_scope": "sequence"}
    model = model_of(mlp_layer_types=["sparse"] * 3, **fields).train()
    ids = ids_of(rows=1)
    given = {} if not labels else {"labels": ids.where(torch.arange(9) >= 9 - labels, -100)}
    found = []
    model.model.layers[1].mlp.register_forward_hook(lambda block, args, output: found.append(output[1]))
    outputs = model(ids, output_router_logits=True, **given)
    logits, (statistics,) = outputs.router_logits[1], found
    assert 0 < len(logits) < ids.numel()
    probs = logits.softmax(dim=-1)
    balance = len(statistics.load) * (statistics.load / len(logits) * probs.mean(dim=0)).sum()
    torch.testing.assert_close(statistics.losses.z, logits.logsumexp(dim=-1).square().mean(), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(statistics.losses.balance, balance, atol=1e-10, rtol=1e-10)


def test_the_threshold_follows_the_capacity():
    model = model_of(**VARIANTS["dense"], depth_capacity=0.25, router_ema_decay=0.5).train()
    ids = ids_of(8, 32)
    for _ in range(8):
        logits = model(ids, output_router_logits=True).depth_router_logits
        model.update_routers()
    scores = logits[0].detach().sigmoid().flatten()
    expected = scores.sort(descending=True).values[64 - 1]
    torch.testing.assert_close(model.model.layers[1].depth.gate.threshold[0], expected)
    share = model.eval()(ids, output_router_logits=True).depth_load[:, 0] / ids.numel()
    torch.testing.assert_close(share, torch.full_like(share, 0.25), rtol=0, atol=0.02)


def test_a_layer_without_chosen_tokens_passes_them_on():
    model, ids = model_of(), ids_of()
    for layer in model.model.layers[1:]:
        layer.depth.gate.threshold.fill_(1.0)
    model.model.layers[0].register_forward_hook(lambda *args: seen.append(args[-1][0]))
    seen: list[torch.Tensor] = []
    for mode in (model.train(), model.eval()):
        outputs = mode(ids, output_router_logits=True)
        expected = model.lm_head(model.model.norm(seen[-1]))
        assert torch.equal(outputs.logits, expected)
        assert not outputs.depth_load.any()
    gradients = step(model, ids)
    assert not gradients["model.layers.1.self_attn.q_proj.weight"].any()
    assert gradients["model.layers.0.self_attn.q_proj.weight"].any()


def test_the_published_form_takes_the_best_tokens_of_each_sequence():
    with pytest.raises(
        ValueError, match=r"depth_router='expert_choice' chooses among all tokens.*allow_noncausal=True"
    ):
        tiny_config(**DEPTH, depth_router="expert_choice")
    model = model_of(depth_router="expert_choice", depth_capacity=0.3, allow_noncausal=True)
    ids, mask = ids_of(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    outputs = model(ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    assert outputs.depth_load[:, 0].tolist() == [3 + 2] * 2  # ceil(0.3 * 10) and ceil(0.3 * 6)
    layer, logits = model.model.layers[1], outputs.depth_router_logits[0].view(2, 10)
    routing = layer.depth.gate(torch.zeros(20, 32).double(), RoutingContext(2))
    assert routing.index.view(2, 10).eq(0).sum(dim=1).tolist() == [3, 3]
    assert not torch.equal(model(ids[:, :-1]).logits, model(ids).logits[:, :-1])
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", ["sparse", "window", "choices carried"])
def test_a_compiled_model_equals_the_plain_one(name):
    model, ids = model_of(**VARIANTS[name]), ids_of()
    model.set_experts_implementation("grouped_mm" if torch.cuda.is_available() else "batched_mm")
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "assisted"]
)
def test_generation_with_a_cache_equals_generation_without(arguments):
    model, ids = model_of(), ids_of(1, 8).repeat(1, 2)
    wanted = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = {name: value for name, value in arguments.items() if name == "num_beams"}
    expected = model.generate(ids, **wanted, **plain, use_cache=False)
    assert torch.equal(model.generate(ids, **wanted, **arguments), expected)


def test_is_saved_and_loaded(tmp_path):
    model, ids = model_of().float(), ids_of()
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.model.layers[1].depth.gate.threshold.item() == pytest.approx(0.55)
    config = MoEConfig.from_pretrained(tmp_path)
    assert config.depth_layers == [0, 1, 1]
    assert MoEConfig.from_pretrained(tmp_path, num_hidden_layers=2).depth_layers == [0, 1]


@pytest.mark.parametrize(
    "name", ["sparse", "dense", "latent", "routed attention", "experts of each head", "choices carried"]
)
def test_parameters_are_counted(name):
    model = model_of(**VARIANTS[name])
    config = model.config
    assert config.num_params() == model.num_parameters()
    plain = config.replace(depth_layers=None, depth_capacity=0.125)
    whole = config.replace(depth_capacity=1.0)
    assert whole.num_active_params() == plain.num_active_params() + 2 * 32
    saved = whole.num_active_params() - config.num_active_params()
    half = [config.replace(depth_layers=layers).num_active_params() for layers in ([0, 1, 0], [0, 0, 1])]
    assert saved == sum(whole.num_active_params() - 32 - each for each in half)
    assert saved > 0


def test_low_rank_adapters_train_beside_the_router():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        model_of().float(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["depth.gate"])
    )
    ids = ids_of()
    model.train()(ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layers.1.self_attn.q_proj.lora_B" in name for name in trained)
    assert any("layers.1.depth.gate" in name for name in trained)


def test_a_static_cache_is_refused():
    model = model_of()
    with pytest.raises(ValueError, match="static cache has no room"):
        model(ids_of(), cache=StaticCache(config=model.config, max_cache_len=16))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_masks_is_refused(implementation):
    with pytest.raises(ValueError, match="does not support"):
        MoEForCausalLM._from_config(tiny_config(**DEPTH), attn_implementation=implementation)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="depth_layers is set, and the pages have no place"):
        tiny_config(**DEPTH).refuse_continuous_batching()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth_layers": [0, 1]}, "depth_layers names 2 layers"),
        ({"depth_layers": [0, 2, 1]}, "depth_layers has the entry 2: choose among 0, 1"),
        ({"depth_layers": None}, "depth_capacity is 0.5, which nothing reads: give depth_layers a 1"),
        ({"depth_layers": [0, 0, 0]}, "depth_capacity is 0.5, which nothing reads"),
        ({"depth_capacity": 0.0}, "depth_capacity is 0.0: it must be above 0"),
        ({"depth_router": "topk"}, "depth_router"),
        ({"expert_capacity": 2}, "expert_capacity counts the tokens before"),
        ({"eval_capacity_factor": 1.0, "capacity_running": True}, "capacity_running counts the tokens before"),
        ({"router_type": "lory", "norm_topk_prob": None}, "router_type='lory' routes a token by the tokens before"),
        (
            {"routed_attention": "routing_transformer", "attention_experts_per_tok": 1},
            "routed_attention='routing_transformer' remembers the routing of all tokens",
        ),
    ],
    ids=str,
)
def test_contradictions_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**(DEPTH | fields))


def test_chosen_tokens_are_gathered_and_spread():
    marked = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]]).bool()
    chosen = Chosen.of(marked)
    assert chosen.columns.tolist() == [[1, 3], [2, 0]]
    assert chosen.real.tolist() == [[True, True], [True, False]]
    values = torch.arange(8.0).view(2, 4, 1) + 1
    assert chosen.gather(values)[..., 0].tolist() == [[2, 4], [7, 5]]
    assert chosen.spread(chosen.gather(values))[..., 0].tolist() == [[0, 2, 0, 4], [0, 0, 7, 0]]
    assert HoledCache([1, 2], chosen).index(2) == 1


def test_a_watch_counts_the_chosen_tokens():
    model, ids, mask = model_of(**VARIANTS["sparse"]), ids_of(3), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    with watch(model) as routing:
        outputs = model(ids, attention_mask=mask, output_router_logits=True)
    for layer, load, tokens in zip(
        routing.read().layers, outputs.expert_load, [23, *outputs.depth_load[:, 0].tolist()], strict=True
    ):
        assert (layer.tokens, layer.notes) == (tokens, ())
        torch.testing.assert_close(layer.load, load, check_dtype=False)


def test_what_follows_single_tokens_is_refused():
    model = model_of()
    for follow in (
        record_routing,
        lambda model: replay_routing(model, RoutingStore()),
        lambda x: expert_drift(x, x, {}),
    ):
        with pytest.raises(
            ValueError, match=r"model\.layers\.2\.mlp\.experts gets only the tokens that depth_layers chooses"
        ):
            follow(model)
    record_routing(model_of(depth_layers=[0, 1, 0])).remove()


OWN_CODE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
torch.save(model(torch.arange(3, 21).view(2, 9)).logits, sys.argv[1] + "/logits.pt")
"""


def test_a_process_without_the_package_computes_the_same(tmp_path):
    model = model_of().float()
    model.save_pretrained(tmp_path / "model")
    run_without_package(OWN_CODE, tmp_path, tmp_path / "model")
    torch.testing.assert_close(
        torch.load(tmp_path / "model" / "logits.pt"), model(torch.arange(3, 21).view(2, 9)).logits
    )
