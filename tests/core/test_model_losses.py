"""These tests check when the model adds router losses, and with which weights."""

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from modeling_moe import MoEForCausalLM
from modeling_moe.conversion import to_moe
from modeling_moe.conversion.targets.catalogue import export_plan
from modeling_moe.router import expert_load
from modeling_moe.router_losses import balance
from tests.builders import tiny_config


IDS = torch.arange(3, 39).view(4, 9)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS_OF_ROW = (LABELS[:, 1:] != -100).sum(dim=1, keepdim=True)
ROUTER = "model.layers.2.mlp.gate.weight"


def model_of(**fields) -> MoEForCausalLM:
    coefficients = {"router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.3}
    return MoEForCausalLM(tiny_config(**(coefficients | fields))).train()


def losses_by_hand(model, weight_of_row=LABELS_OF_ROW):
    """Computes the mean over sparse layers of the weighted losses, from the routings."""
    routings = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: routings.append(out))
        for layer in model.model.layers
        if layer.is_sparse
    ]
    model(IDS, attention_mask=MASK)
    for hook in hooks:
        hook.remove()
    mask = MASK.flatten()
    share = (MASK / MASK.sum(dim=1, keepdim=True) * weight_of_row / weight_of_row.sum()).flatten()
    total = 0
    for routing in routings:
        # each token weighs as much as any other in the balance of a batch
        probs = (mask[:, None] * routing.probs).sum(dim=0) / mask.sum()
        total += 0.7 * balance(expert_load(routing, mask), mask.sum(), probs)
        total += 0.3 * (share * routing.logits.logsumexp(dim=-1).square()).sum()
    return total / len(routings)


def gradient(model, loss):
    return torch.autograd.grad(loss, model.get_parameter(ROUTER), retain_graph=True)[0]


@pytest.mark.parametrize("scope", ["batch", "sequence", "global"])
@pytest.mark.parametrize(
    ("router", "fields"),
    [
        ("topk", {}),
        ("gshard", {"num_experts_per_tok": 2}),
        ("top_p", {"router_top_p": 0.9}),
        ("continuous", {"router_threshold_mode": "fixed", "router_threshold": -1.0}),
        ("remoe", {}),
        ("expert_threshold", {}),
    ],
)
def test_the_balance_of_every_router_is_k_times_the_normalised_one(router, fields, scope):
    """Versions before 0.4.0 saved the coefficient of the normalised loss; loading divides it by K, which is exact so."""
    model = MoEForCausalLM(
        tiny_config(router_type=router, router_aux_loss_scope=scope, **({"num_experts_per_tok": 3} | fields))
    ).train()
    routings = []
    for block in model.model.sparse_blocks():
        block.gate.register_forward_hook(lambda module, args, out: routings.append(out))
    out = model(IDS[:1])
    shares = [load / load.sum() for load in out.expert_load]
    expected = [len(f) * (f * r.probs.mean(dim=0)).sum() for f, r in zip(shares, routings, strict=True)]
    torch.testing.assert_close(out.aux_loss, model.config.num_experts_per_tok * sum(expected) / len(expected))


@pytest.mark.parametrize("flag", [False, True])
def test_training_loss_is_cross_entropy_plus_router_losses(flag):
    model = model_of()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    out = model(**batch, output_router_logits=flag)
    cross_entropy = model.eval()(**batch).loss
    torch.testing.assert_close(out.loss, cross_entropy + losses_by_hand(model.train()))


def test_evaluation_loss_has_no_router_loss():
    model = model_of().eval()
    out = model(IDS, attention_mask=MASK, labels=LABELS, output_router_logits=True)
    logits = out.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, LABELS[:, 1:].flatten()))
    assert out.aux_loss > 0


def test_collapse_of_layers_onto_different_experts_is_seen():
    """Two layers that each use other experts look balanced when pooled; the average over layers shows the collapse."""
    model = model_of(num_experts=6, num_experts_per_tok=3).eval()
    with torch.no_grad():
        for layer, experts in ((0, [0, 1, 2]), (2, [3, 4, 5])):
            gate = model.model.layers[layer].mlp.gate
            gate.weight.zero_()
            gate.forward = _constant_router(gate, experts)
    assert model(IDS, output_router_logits=True).aux_loss == pytest.approx(6.0, abs=1e-3)


def _constant_router(gate, experts):
    from modeling_moe.router import Routing

    def forward(tokens, context):
        logits = torch.full((len(tokens), gate.num_experts), -20.0)
        logits[:, experts] = 0.0
        probs = logits.softmax(-1)
        index = torch.tensor(experts).expand(len(tokens), -1)
        return Routing(logits, probs.gather(-1, index), index, probs)

    return forward


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    model = model_of()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_micro_batches_sum_to_the_whole_batch():
    """The z-loss is a sum over tokens weighted by labels, so that micro-batches add up exactly."""
    model = model_of(router_aux_loss_coef=0.0)
    labels = LABELS
    count = (labels[:, 1:] != -100).sum()
    whole = gradient(model, model(IDS, labels=labels, num_items_in_batch=count).loss)
    halves = sum(
        gradient(model, model(IDS[rows], labels=labels[rows], num_items_in_batch=count).loss)
        for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(halves, whole, atol=1e-6, rtol=1e-5)


def test_balance_loss_is_not_multiplied_by_micro_batches():
    model = model_of(router_aux_loss_coef=1.0, router_z_loss_coef=0.0)
    count = (LABELS[:, 1:] != -100).sum()
    by_rows = [{"input_ids": IDS[i : i + 1], "labels": LABELS[i : i + 1]} for i in range(4)]

    def aux_part(batches):
        model.config.router_aux_loss_coef = 1.0
        with_aux = sum(model(**b, num_items_in_batch=count).loss for b in batches)
        model.config.router_aux_loss_coef = 0.0
        return with_aux - sum(model(**b, num_items_in_batch=count).loss for b in batches)

    whole = aux_part([{"input_ids": IDS, "labels": LABELS}])
    assert 0.9 < (aux_part(by_rows) / whole).item() < 1.5


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_losses_arrive_when_the_head_is_bypassed(reentrant):
    """A trainer that computes a loss from the decoder's states trains the routers, once."""
    model = model_of()
    expected = gradient(model, losses_by_hand(model, torch.ones(4, 1)))
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.model(IDS, attention_mask=MASK).last_hidden_state.mul(0).sum().backward()
    torch.testing.assert_close(model.get_parameter(ROUTER).grad, expected, atol=1e-6, rtol=1e-5)
    model.zero_grad()
    model.model.router_loss_scale = 0.25
    model(IDS, attention_mask=MASK).logits.mul(0).sum().backward()
    torch.testing.assert_close(model.get_parameter(ROUTER).grad, 0.25 * expected, atol=1e-6, rtol=1e-5)


def test_a_trainers_own_balance_loss_is_not_added_to_ours():
    model = model_of()
    out = model.model(IDS, output_router_logits=True)
    assert not any(logits.requires_grad for logits in out.router_logits)
    assert not out.aux_loss.requires_grad
    free = model_of(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    assert all(logits.requires_grad for logits in free.model(IDS, output_router_logits=True).router_logits)


def test_dense_model_has_no_router_loss():
    model = MoEForCausalLM(tiny_config(mlp_layer_types=["dense"] * 3)).train()
    out = model(IDS, labels=IDS, output_router_logits=True)
    assert out.aux_loss is None
    assert out.router_logits == ()


def test_generation_with_the_flag_saved_on():
    model = model_of(output_router_logits=True).eval()
    text = model.generate(IDS[:2], attention_mask=MASK[:2], max_new_tokens=3, do_sample=False)
    assert text.shape == (2, 12)


HF_SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 3,
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.7,
    "output_router_logits": True,
}
# transformers' class and its configuration
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**HF_SIZE, num_local_experts=5)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**HF_SIZE, num_experts=5, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True),
    ),
    "qwen3_moe_not_renormalised": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(**HF_SIZE, num_experts=5, moe_intermediate_size=24, head_dim=8, norm_topk_prob=False),
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**HF_SIZE, num_experts=5)),
}
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0
PADDED[2, 7:] = 0


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_loss_is_that_of_transformers_at_the_same_coefficient(family, padded):
    """Loss, `aux_loss` and router gradient of a one-layer model are those of transformers, whatever tokens have labels."""
    cls, config = FAMILIES[family]
    theirs = cls(config)
    ours = to_moe(theirs)
    theirs.set_experts_implementation("eager")  # serves float64
    assert ours.config.router_aux_loss_coef == config.router_aux_loss_coef
    batch = {"input_ids": IDS, "labels": IDS}
    if padded:
        labels = IDS.masked_fill(PADDED == 0, -100)
        labels[1, :5] = -100  # a prompt
        batch = {"input_ids": IDS, "labels": labels, "attention_mask": PADDED}
    results = []
    for model in (theirs.double().train(), ours.double().train()):
        out = model(**batch)
        out.loss.backward()
        router = next(p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
        results.append((out.loss.detach(), out.aux_loss.detach(), router.grad))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got.double(), expected.double(), atol=1e-6, rtol=1e-6)
    # in evaluation too, although only transformers adds the balance loss to the loss there
    expected, got = (model.eval()(**batch).aux_loss for model in (theirs, ours))
    torch.testing.assert_close(got.double(), expected.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_keeps_the_coefficient_in_both_directions(family):
    cls, config = FAMILIES[family]
    ours = to_moe(cls(config)).config
    assert ours.router_aux_loss_coef == config.router_aux_loss_coef
    assert export_plan(ours, config.model_type).router_aux_loss_coef == config.router_aux_loss_coef
