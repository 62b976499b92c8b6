"""These tests compare what an observation sees with what the model computes, and check that the model does not notice it."""

import copy
import io

import pytest
import torch
from transformers import PreTrainedModel

from modeling_moe.monitoring import observe
from modeling_moe.monitoring.batches import padding_of
from modeling_moe.monitoring.observing import in_backward
from tests.builders import tiny_model
from tests.training.families import tiny


IDS = torch.arange(3, 31).view(2, 14)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def mixtral() -> PreTrainedModel:
    return tiny("mixtral")


BUILD = pytest.mark.parametrize("build", [tiny_model, mixtral])


def hooks(model) -> list[tuple]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


def results(model) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    output.loss.backward()
    return [output.logits.detach(), *(value.grad for value in model.parameters() if value.grad is not None)]


@BUILD
def test_the_model_does_not_notice(build):
    model = build().train()
    before, expected, keys = hooks(model), results(model), list(model.state_dict())
    seen = []
    with observe(model, seen.append) as observation, observe(model, seen.append):
        inside = results(model)
        assert list(model.state_dict()) == keys
    observation.remove()
    assert hooks(model) == before
    assert len(seen) == 2 * len(observation.layers)
    for one, other in zip(expected, inside, strict=True):
        assert torch.equal(one, other)


@BUILD
def test_a_pass_has_what_the_experts_get(build):
    model = build().eval()
    calls, seen = [], []
    layers = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
    for module in layers:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
        )
    with observe(model, seen.append):
        logits = model(input_ids=IDS, attention_mask=MASK, output_router_logits=True).router_logits
    for event, call, recorded in zip(seen, calls, logits, strict=True):
        for got, want in zip((event.hidden_states, event.arrived, event.weight), call, strict=True):
            assert torch.equal(got, want)
        assert torch.equal(event.index, event.arrived)
        assert torch.equal(event.logits, recorded)
        assert event.token_mask.equal(MASK.flatten().bool())
        assert event.batch_size == 2
        assert (event.probs is not None) == (build is tiny_model)
        assert not event.training
        assert not event.recomputed


@BUILD
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_repeated_pass_is_told(build, use_reentrant):
    model, seen = build().train(), []
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    other = torch.ones_like(IDS)
    with observe(model, seen.append):
        # two passes before one backward, each with its own mask
        losses = [model(input_ids=IDS, attention_mask=mask, labels=IDS).loss for mask in (MASK, other)]
        sum(losses).backward()
    half = len(seen) // 2
    assert [event.recomputed for event in seen] == [False] * half + [True] * half
    assert all(event.training for event in seen)
    for first, again in zip(seen[:half], reversed(seen[half:]), strict=True):
        assert first.layer is again.layer
        # what the batch says of its tokens is known where the model runs
        assert first.token_mask is not None
        assert (again.token_mask is not None) == (build is tiny_model)
        if build is tiny_model:
            assert torch.equal(first.token_mask, again.token_mask)
        assert torch.equal(first.index, again.index)
        assert torch.equal(first.weight, again.weight)
        assert again.weight.requires_grad


def test_backward_is_told_from_forward():
    """The name is private to PyTorch: this test fails if it goes."""
    said = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            said.append(in_backward())
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            said.append(in_backward())
            return gradient

    Identity.apply(torch.ones(1, requires_grad=True)).backward()
    assert said == [False, True]
    assert not in_backward()


def test_a_pass_without_gradient_does_not_train():
    model, seen = tiny_model().train(), []
    with observe(model, seen.append):
        model(input_ids=IDS)
        with torch.no_grad():
            model(input_ids=IDS)
        model.eval()
        model(input_ids=IDS)
    assert [event.training for event in seen[::2]] == [True, False, False]


def _four_dimensions() -> torch.Tensor:
    return torch.ones(14, 14).tril().bool()[None, None] & MASK[:, None, None].bool()


@BUILD
@pytest.mark.parametrize(
    "call",
    [
        lambda model: model(IDS, MASK),
        lambda model: model.model(input_ids=IDS, attention_mask=MASK),
        lambda model: model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK.bool()),
        lambda model: model(input_ids=IDS, attention_mask=_four_dimensions()),
        lambda model: model(input_ids=IDS, attention_mask=torch.where(_four_dimensions(), 0.0, -1e9)),
        lambda model: model(input_ids=IDS, attention_mask={"full_attention": _four_dimensions()}),
    ],
    ids=["by_position", "backbone", "embeddings", "four_dimensions", "added", "dictionary"],
)
def test_padding_is_found(build, call, request):
    if build is mixtral and request.node.callspec.id.startswith("dictionary"):
        pytest.skip("Mixtral has one kind of attention, and takes no dictionary")
    model, seen = build().eval(), []
    with observe(model, seen.append):
        call(model)
    for event in seen:
        assert event.note is None
        assert torch.equal(event.token_mask, MASK.flatten().bool())


class BlockMask:
    """A mask that is no tensor, such as that of flex attention."""


def test_padding_that_cannot_be_told_is_said():
    why = "padding cannot be told from BlockMask as attention_mask, and counts as tokens"
    assert padding_of(BlockMask(), 2, 14).unknown == why
    assert padding_of({"full_attention": BlockMask()}, 2, 14).unknown == why
    assert "a mask of shape (3, 14)" in padding_of(torch.ones(3, 14), 2, 14).unknown
    assert padding_of(None, 2, 14) == (None, None)

    model, seen = mixtral().eval(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    with observe(model, seen.append):
        model(input_ids=IDS, attention_mask=BlockMask())
    assert [(event.token_mask, event.note) for event in seen] == [(None, why)] * 2


def test_all_tokens_of_a_packed_row_are_real():
    model, seen = mixtral().eval(), []
    positions = torch.arange(7).repeat(2)[None]
    with observe(model, seen.append):
        model(input_ids=IDS[:1], position_ids=positions)
    assert all(event.token_mask is None and event.note is None for event in seen)


def test_capacity_drops_after_the_choice():
    model, seen = tiny_model(capacity_factor=0.5).train(), []
    with observe(model, seen.append):
        model(input_ids=IDS, attention_mask=MASK)
    for event in seen:
        dropped = event.arrived != event.index
        assert dropped.any()
        assert (event.arrived[dropped] == 5).all()
        # weight is the router's own, before the drop
        assert (event.weight[dropped] > 0).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"router_type": "soft_moe", "allow_noncausal": True, "num_experts_per_tok": 5},
        {"router_type": "lory", "num_experts_per_tok": 5},
    ],
)
def test_a_router_that_mixes_is_seen_by_its_routing(fields):
    try:
        model, seen = tiny_model(**fields).train(), []
    except ValueError as error:
        pytest.fail(str(error))
    with observe(model, seen.append):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for event in seen:
        assert event.hidden_states.shape == (28, 32)
        assert event.index.shape == event.weight.shape == (28, 5)
        assert torch.equal(event.index, torch.arange(5).expand(28, 5))
        assert event.arrived is event.index


def test_the_dense_gradient_is_no_pass():
    model, seen = tiny_model(router_gradient="dense").train(), []
    with observe(model, seen.append):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(seen) == 2
    assert all(event.index.shape == (28, 3) for event in seen)


@BUILD
def test_weights_can_be_replaced(build):
    model = build().train()
    with observe(model, lambda event: event.weight * 0):
        none = model(input_ids=IDS, labels=IDS)
        none.loss.backward()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            assert all(value.grad is None or not value.grad.any() for value in layer.mlp.experts.parameters())
    with observe(model, lambda event: event.weight.clone()):
        same = model(input_ids=IDS).logits
    assert torch.equal(same, model(input_ids=IDS).logits)


@BUILD
def test_an_exception_leaves_no_mask_behind(build):
    model, seen = build().eval(), []
    with observe(model, seen.append):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=IDS + 10_000, attention_mask=MASK)
        model.model(input_ids=IDS)
    assert len(seen) == 2
    assert all(event.token_mask is None for event in seen)


@BUILD
def test_copies_of_an_observed_model_are_not_observed(build):
    model, seen = build(), []
    with observe(model, seen.append):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copied, loaded):
            other(input_ids=IDS)
        assert seen == []
        model(input_ids=IDS)
    assert len(seen) == 2


def test_copies_that_run_side_by_side_are_refused():
    model = mixtral()
    with observe(model, lambda event: None):
        # as nn.DataParallel copies modules
        experts = model.model.layers[0].mlp.experts._replicate_for_data_parallel()
        with pytest.raises(ValueError, match=r"^nn\.DataParallel runs copies"):
            experts(torch.zeros(1, 32), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))
