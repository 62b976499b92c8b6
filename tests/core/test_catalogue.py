"""These tests check each router: causality, decoding, empty assignments, precision, saving and compilation."""

import logging

import pytest
import torch
import transformers
from packaging import version
from transformers.utils import logging as transformers_logging

from modeling_moe import MoEForCausalLM
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import RoutingContext
from modeling_moe.router_balancing import CONTROLLERS, exact_global_balance
from modeling_moe.router_catalogue import ROUTERS
from tests.builders import eager_block, tiny_config
from tests.selection import by_default


SIGMOID_BIAS = {"scoring_func": "sigmoid", "router_selection_bias": True, "router_bias_update_rate": 0.01}
# name -> fields; every router of the catalogue, and variants of routers
CAUSAL = {
    "softmax": {},
    "softmax_norm_off": {"norm_topk_prob": False},
    "switch": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "deepseek_v2": {"num_experts": 6, "n_group": 3, "topk_group": 2, "group_score": "max"},
    "deepseek_v3": {"num_experts": 6, "n_group": 3, "topk_group": 2, **SIGMOID_BIAS},
    "deepseek_v4": {"scoring_func": "sqrtsoftplus", "router_selection_bias": True, "num_hash_layers": 1},
    "quantile": {"router_selection_bias": True, "router_controller": "quantile"},
    "jitter": {"router_jitter_noise": 0.1},
    "noisy_topk": {"router_type": "noisy_topk", "router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1},
    "gumbel_topk": {"router_type": "gumbel_topk"},
    "gshard": {"router_type": "gshard", "num_experts_per_tok": 2},
    "sparsemixer": {"router_gradient": "sparsemixer", "router_jitter_noise": 0.1, "num_experts_per_tok": 2},
    "dense_gradient": {"router_gradient": "dense"},
    "hierarchical": {"router_type": "hierarchical", "num_experts": 6, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 2},
    "hash": {"router_type": "hash"},
    "hash_scored": {"router_type": "hash_scored"},
    "task": {"router_type": "task", "num_tasks": 3},
    "mmoe": {"router_type": "mmoe", "num_tasks": 3, "num_experts_per_tok": 5},
    "uniform": {"router_type": "uniform", "num_experts_per_tok": 5},
    "null": {"num_null_experts": 3},
    "null_and_copy": {"num_null_experts": 2, "num_copy_experts": 2, "norm_topk_prob": False,
                      "router_selection_bias": True, "router_controller": "proportional", "router_bias_update_rate": 0.1,
                      "expected_experts_per_tok": 2},
    "top_p": {"router_type": "top_p", "router_entropy_loss_coef": 1e-4},
    "continuous": {"router_type": "continuous"},
    "continuous_learned": {"router_type": "continuous", "router_threshold_mode": "learned", "max_experts_per_tok": 4},
    "remoe": {"router_type": "remoe", "router_sparsity_coef": 0.01},
    "expert_threshold": {"router_type": "expert_threshold"},
    "lory": {"router_type": "lory", "segment_length": 3},
    "dag": {"router_type": "dag"},
    "dag_null": {"router_type": "dag", "num_null_experts": 2, "scoring_func": "sigmoid", "router_input_norm": True},
    "dag_hashed": {"router_type": "dag", "num_hash_layers": 1, "num_hidden_layers": 4, "mlp_layer_types": ["sparse"] * 4},
    "zaya": {"router_type": "zaya", "num_experts_per_tok": 1, "router_hidden_size": 16, "router_selection_bias": True,
             "num_null_experts": 1},
    "absolute_capacity": {"expert_capacity": 4},
    "running_capacity": {"capacity_factor": 0.7, "eval_capacity_factor": 0.7, "capacity_running": True},
    "token_capacity": {"capacity_factor": 0.7, "eval_capacity_factor": 0.7},
}  # fmt: skip
# name -> fields, and whether the router is causal in evaluation
NONCAUSAL = {
    "expert_choice": ({"router_type": "expert_choice"}, False),
    "soft_moe": ({"router_type": "soft_moe"}, False),
    "k_major": ({"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "capacity_priority": "k_major"}, False),
    "probability": ({"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "capacity_priority": "probability"}, False),
    "sinkhorn": ({"router_type": "sinkhorn"}, True),
    "base_layer": ({"router_type": "base_layer", "num_experts_per_tok": 1, "scoring_func": "sigmoid"}, True),
}
ALL = CAUSAL | {name: {"allow_noncausal": True, **fields} for name, (fields, _) in NONCAUSAL.items()}
IDS = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(1))
TASKS = torch.tensor([0, 2, 1])
CAUSAL_NAMES = pytest.mark.parametrize("name", CAUSAL)
ALL_NAMES = pytest.mark.parametrize("name", ALL)


def model_of(name: str, **fields) -> MoEForCausalLM:
    model = MoEForCausalLM(tiny_config(**(ALL[name] | fields)))
    with torch.no_grad():
        for block in model.model.sparse_blocks():
            for parameter in block.gate.parameters():
                parameter.normal_(std=0.5)  # some start at 0, which says nothing
    return model


def batch_of(name: str, ids=IDS) -> dict:
    tasks = {"task_ids": TASKS[: len(ids)]} if ALL[name].get("router_type") in ("task", "mmoe") else {}
    return {"input_ids": ids, **tasks}


def logits_of(model, name, ids=IDS):
    torch.manual_seed(7)  # the same noise for each call
    return model(**batch_of(name, ids)).logits.detach()


def routings_of(model, name, ids=IDS) -> list:
    """Returns the routing of each sparse layer in one pass."""
    routings = []
    hooks = [
        block.gate.register_forward_hook(lambda module, args, routing: routings.append(routing))
        for block in model.model.sparse_blocks()
    ]
    model(**batch_of(name, ids))
    for hook in hooks:
        hook.remove()
    return routings


@ALL_NAMES
def test_losses_without_a_gradient_are_no_part_of_the_training_loss(name):
    model = model_of(name, router_aux_loss_coef=0.3, router_z_loss_coef=0.2).train()
    learned = [block.router.differentiable for block in model.model.sparse_blocks()]
    assert [routing.probs.requires_grad for routing in routings_of(model, name)] == learned
    outputs = model(**batch_of(name), labels=IDS)
    plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert (outputs.loss > plain + 0.01) == any(learned) == model.model.has_router_losses
    assert outputs.aux_loss > 0.01  # the figure remains


def leaks(name: str, training: bool) -> bool:
    """Says whether a change of the last tokens or of one row changes the output for earlier tokens or other rows."""
    model = model_of(name).double().train(training)
    noticed = False
    for _ in range(3):
        torch.manual_seed(int(torch.randint(1000, ())))
        before = logits_of(model, name)
        changed = IDS.clone()
        changed[:, -1] = torch.randint(3, 99, (3,))
        noticed |= not torch.equal(logits_of(model, name, changed)[:, :-1], before[:, :-1])
        changed = IDS.clone()
        changed[2] = torch.randint(3, 99, (12,))
        noticed |= not torch.equal(logits_of(model, name, changed)[:2], before[:2])
    return noticed


def test_the_list_is_the_catalogue():
    listed = {fields.get("router_type", "topk") for fields in ALL.values()} | {"sparsemixer"}
    assert listed == set(ROUTERS)
    classes = {
        fields.get("router_type"): ROUTERS[fields["router_type"]] for fields in ALL.values() if "router_type" in fields
    }
    refused = {"expert_choice", "soft_moe", "sinkhorn", "base_layer"}
    assert {name for name, router in classes.items() if not router.causal} == refused


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@CAUSAL_NAMES
def test_no_token_sees_a_later_one_or_another_row(name, training):
    assert not leaks(name, training)


@pytest.mark.parametrize("name", NONCAUSAL)
def test_what_is_refused_does_leak(name):
    fields, causal_evaluation = NONCAUSAL[name]
    with pytest.raises(ValueError, match="allow_noncausal=True if that is meant"):
        tiny_config(**fields)
    assert leaks(name, training=True)
    assert leaks(name, training=False) != causal_evaluation


# a plain capacity factor depends on the length of the sequence
@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "token_capacity"])
def test_decoding_equals_one_pass(name):
    model = model_of(name).double().eval()
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[0, :3] = 0
    tasks = {key: value for key, value in batch_of(name).items() if key == "task_ids"}
    expected = model(ids, attention_mask=mask, **tasks).logits
    cache, got = None, []
    for start, end in ((0, 5), (5, 7), *((i, i + 1) for i in range(7, 12))):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True,
            position_ids=position_ids, **tasks,
        )  # fmt: skip
        cache, got = out.past_key_values, [*got, out.logits]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, **tasks).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(got, dim=1)[real], expected[real], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["lory", "absolute_capacity", "running_capacity"])
def test_beams_and_speculation_carry_the_history(name):
    model = model_of(name).eval()
    ids = IDS[:1]
    length = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    for fields in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}):
        cached = model.generate(ids, **length, **fields)
        plain = model.generate(ids, **length, use_cache=False, **({} if "prompt" in next(iter(fields)) else fields))
        assert torch.equal(cached, plain)
    with pytest.raises(ValueError, match="use a dynamic cache"):
        model.generate(ids, **length, cache_implementation="static", disable_compile=True)


# all experts take part in these
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("soft_moe", "lory", "dense_gradient")])
def test_empty_slots_cost_nothing_and_get_no_gradient(name):
    """Experts that no token chose have a gradient of exactly 0, and empty assignments have the weight 0."""
    model = model_of(name).train()
    routings = []
    for block in model.model.sparse_blocks():
        block.gate.register_forward_hook(lambda module, args, routing: routings.append(routing))
    model(**batch_of(name, IDS[:, :3]), labels=IDS[:, :3]).loss.backward()
    for block, routing in zip(model.model.sparse_blocks(), routings, strict=True):
        empty = (routing.index < 0) | (routing.index >= routing.logits.shape[-1])
        assert not routing.weight[empty].any()
        unused = [e for e in range(block.gate.num_experts) if not (routing.index == e).any()]
        assert not block.experts.gate_up_proj.grad[unused].any()
        assert block.experts.gate_up_proj.grad.isfinite().all()


@ALL_NAMES
def test_routing_its_weights_and_buffers_are_fp32_in_a_bf16_model(name, tmp_path):
    model_of(name).save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for model in (loaded, model_of(name).to(torch.bfloat16)):
        for block in model.model.sparse_blocks():
            tensors = block.gate.state_dict().values()
            assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} <= {torch.float32}
            assert {parameter.dtype for parameter in block.experts.parameters()} == {torch.bfloat16}
        routings = routings_of(model, name)
        assert {t.dtype for r in routings for t in (r.logits, r.weight, r.probs)} == {torch.float32}
        for routing in routings:
            torch.testing.assert_close(routing.probs.sum(-1), torch.ones(len(routing.probs)))


@ALL_NAMES
def test_saved_and_loaded_with_its_state(name, tmp_path):
    model = model_of(name).train()
    for _ in range(2):
        model(**batch_of(name), labels=IDS).loss.backward()
        model.update_routers()
    model.save_pretrained(tmp_path)
    loaded = MoEForCausalLM.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    if (controller := model.config.controller) is not None:
        fresh = model_of(name).state_dict()
        moved = [key for key in before if not torch.equal(before[key], fresh[key])]
        assert moved, controller
    # BLAS may round differently, because the matrices are aligned differently
    torch.testing.assert_close(logits_of(loaded.eval(), name), logits_of(model.eval(), name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@ALL_NAMES
def test_the_scaling_factor_multiplies_what_the_experts_give(name, training):
    """`routed_scaling_factor` multiplies outputs and gradients; `uniform` ignored it, and `lory` scaled merged weights."""
    results = []
    for factor in (1.0, 2.5):
        torch.manual_seed(3)
        block = eager_block(**ALL[name], routed_scaling_factor=factor).train(training)
        tasks = torch.tensor([0] * 5 + [1] * 5) if name in ("task", "mmoe") else None
        states, context = torch.randn(2, 5, 32).double(), RoutingContext(2, None, torch.arange(10), tasks)
        torch.manual_seed(4)  # for the noise
        output = block(states, context)[0]
        output.sum().backward()
        results.append((output.detach(), [p.grad for p in block.gate.parameters()]))
    (plain, gradients), (scaled, scaled_gradients) = results
    torch.testing.assert_close(scaled, 2.5 * plain)
    for gradient, other in zip(gradients, scaled_gradients, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None:
            torch.testing.assert_close(other, 2.5 * gradient)


def test_every_controller_is_used_above():
    # tests/core/test_attention_routing_transformer.py has the controller of centroids, which no router of networks uses
    assert {tiny_config(**fields).controller for fields in ALL.values()} - {None} == set(CONTROLLERS) - {"centroids"}


# transformers before 5.23 cannot trace the backward of the product that `hierarchical` takes from it
OLD = version.parse(transformers.__version__) < version.parse("5.23")
COMPILED = [n for n in CAUSAL if n != "lory" and not (n == "hierarchical" and OLD)]


# routers that differ from another one by a number or a flag
VARIANTS = (
    "softmax_norm_off",
    "dag_null",
    "dag_hashed",
    "switch",
    "deepseek_v2",
    "quantile",
    "jitter",
    "null",
    "continuous_learned",
)


@pytest.mark.parametrize("name", by_default([name for name in COMPILED if name not in VARIANTS], COMPILED))
def test_compiles_in_one_graph(name):
    torch.compiler.reset()
    block = MoEBlock(tiny_config(**CAUSAL[name], experts_implementation="moe")).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if hasattr(block.gate, "init_weights"):
        block.gate.init_weights(0.5)
    context = RoutingContext(
        2, None, torch.arange(10), torch.tensor([0] * 5 + [1] * 5) if name in ("task", "mmoe") else None
    )
    states = torch.randn(2, 5, 32)
    expected = block(states, context)[0]
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(states, context)[0]
    torch.testing.assert_close(got, expected)


def test_global_balance_of_micro_batches_is_exact():
    fields = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.0, "router_aux_loss_scope": "global"}
    model = model_of("softmax", **fields).double().train()
    gates = [block.gate.weight for block in model.model.sparse_blocks()]
    ids = torch.randint(3, 99, (4, 12))  # a quarter and three quarters are exact in binary
    count = ids[:, 1:].numel()

    def gradients(batches):
        with exact_global_balance(model, batches):
            for batch in batches:
                model(**batch, labels=batch["input_ids"], num_items_in_batch=count).loss.backward()
        model.update_routers()
        grads = [gate.grad.clone() for gate in gates]
        model.zero_grad()
        return grads

    whole, split = gradients([{"input_ids": ids}]), gradients([{"input_ids": ids[:1]}, {"input_ids": ids[1:]}])
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)
    # without counting first, a micro-batch knows earlier micro-batches alone
    for batch in (ids[:1], ids[1:]):
        model(batch, labels=batch, num_items_in_batch=count).loss.backward()
    assert not torch.allclose(gates[0].grad, whole[0], atol=1e-12)
    model.update_routers()
    assert not model.model.router_totals.kinds["mlp"].load.any()


def test_many_drops_are_told_once(caplog, monkeypatch):
    transformers_logging.warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = model_of("softmax", capacity_factor=0.3).train()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            share = model(IDS, labels=IDS).dropped_share
            model.update_routers()
    assert ((share > 0.1) & (share < 1)).all()
    assert sum("assignments were dropped: raise the capacity" in record.message for record in caplog.records) == 1
    assert model.eval()(IDS, output_router_logits=True).dropped_share.tolist() == [0, 0]


def test_dropped_tokens_pass_on_their_residual():
    model = model_of("softmax", expert_capacity=1).eval()
    block, states = model.model.sparse_blocks()[0], torch.randn(1, 9, 32)
    output = block(states)[0]
    assert (output.abs().sum(-1) == 0).any()
    assert (output.abs().sum(-1) > 0).any()


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "moe", "moe_grouped_mm"])
@pytest.mark.parametrize("name", ["null_and_copy", "top_p", "running_capacity", "expert_choice"])
def test_transformers_experts_skip_empty_slots_too(name, implementation):
    """transformers' experts functions give the outputs and gradients of the eager loop for each router."""
    model, results = model_of(name).train(), []
    for experts in ("eager", implementation):
        model.set_experts_implementation(experts)
        model.zero_grad()
        logits = model(**batch_of(name)).logits
        (logits.square().sum() / 1000).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
