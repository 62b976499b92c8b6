"""These tests compare capacity with a queue of assignments, and decoding with one pass."""

import math
from fractions import Fraction

import pytest
import torch
from transformers import DynamicCache, StaticCache

from modeling_moe.router import Routing, RoutingContext
from modeling_moe.router_capacity import Capacity, count_dropped
from tests.builders import tiny_config


ROWS, LENGTH, SLOTS, IDLE = 3, 12, 3, 2
OUTPUTS = 5 + IDLE
MODES = {
    "factor": {"capacity_factor": 0.6},
    "factor above 1": {"capacity_factor": 1.25},
    "factor on tokens": {"capacity_factor": 1.1, "capacity_includes_k": False},
    "absolute": {"expert_capacity": 3},
    "running": {"capacity_factor": 0.7, "capacity_running": True},
    "running on tokens": {"capacity_factor": 1.3, "capacity_running": True, "capacity_includes_k": False},
    "k_major": {"capacity_factor": 0.6, "capacity_priority": "k_major"},
    "probability": {"capacity_factor": 0.6, "capacity_priority": "probability"},
    "absolute by probability": {"expert_capacity": 3, "capacity_priority": "probability"},
}
REMEMBERING = ("absolute", "running", "running on tokens")
NO_PADDING = torch.ones(ROWS, LENGTH, dtype=torch.long)
PADDED_RIGHT = (torch.arange(LENGTH) < torch.tensor([[12], [7], [10]])).long()
PADDED_LEFT = PADDED_RIGHT.flip(1)


def limited(fields: dict) -> tuple[Capacity, object]:
    """Returns the capacity of layer 2, with one factor for training and evaluation."""
    both = {"eval_capacity_factor": fields.get("capacity_factor"), "allow_noncausal": True, "num_null_experts": IDLE}
    config = tiny_config(**(both | fields))
    return Capacity(config, layer_idx=2), config


def random_routing(tokens=ROWS * LENGTH) -> Routing:
    """Returns a routing to distinct experts, more often the first ones; some are null experts, some assignments are empty."""
    index = (torch.rand(tokens, OUTPUTS) - 0.1 * torch.arange(OUTPUTS)).topk(SLOTS).indices
    index[torch.rand(tokens, SLOTS) < 0.1] = OUTPUTS
    weight = torch.rand(tokens, SLOTS, dtype=torch.float64).masked_fill(index == OUTPUTS, 0.0)
    logits = torch.randn(tokens, OUTPUTS, dtype=torch.float64)
    return Routing(logits, weight, index, logits.softmax(-1))


def piece(routing: Routing, mask: torch.Tensor, part: slice) -> tuple[Routing, torch.Tensor]:
    """Returns the tokens of all rows at the positions `part`."""
    rows, length = mask.shape

    def cut(tensor):
        return tensor.unflatten(0, (rows, length))[:, part].flatten(0, 1)

    return Routing(*map(cut, routing[:4])), cut(mask.flatten())


def queue(index: list, weight: list, mask: list, config) -> list:
    """Returns the indices of one sequence after all assignments have queued for their experts."""
    slots = len(index[0])
    factor, assignments = config.capacity_factor, slots if config.capacity_includes_k else 1

    def limit(tokens):
        if config.expert_capacity is not None:
            return config.expert_capacity
        return math.ceil(Fraction(str(factor)) * tokens * assignments / config.num_experts)

    visits = [(t, k) for t in range(len(index)) for k in range(slots)]
    if config.capacity_priority != "token":
        visits.sort(key=lambda visit: visit[1])
    if config.capacity_priority == "probability":
        visits.sort(key=lambda visit: (visit[1], -max(weight[visit[0]])))
    taken, result = [0] * config.num_experts, [list(row) for row in index]
    for t, k in visits:
        expert = index[t][k]
        if not mask[t] or expert >= config.num_experts:
            continue
        if taken[expert] < limit(sum(mask[: t + 1]) if config.capacity_running else sum(mask)):
            taken[expert] += 1
        else:
            result[t][k] = OUTPUTS
    return result


@pytest.mark.parametrize("mask", [NO_PADDING, PADDED_RIGHT, PADDED_LEFT], ids=["all", "right", "left"])
@pytest.mark.parametrize("mode", MODES)
def test_capacity_is_a_queue_for_each_sequence(mode, mask):
    capacity, config = limited(MODES[mode])
    dropped = 0
    for _ in range(10):
        routing = random_routing()
        got = capacity(routing, RoutingContext(ROWS, mask.flatten()), training=True)
        index, weight = (tensor.unflatten(0, (ROWS, LENGTH)).tolist() for tensor in (routing.index, routing.weight))
        expected = [queue(*row, config) for row in zip(index, weight, mask.tolist(), strict=True)]
        expected = torch.tensor(expected).flatten(0, 1)
        assert torch.equal(got.index, expected)
        assert torch.equal(got.weight, routing.weight.masked_fill(expected == OUTPUTS, 0.0))
        dropped += (expected != routing.index).sum()
    assert dropped > 0


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        # two tokens choose (0, 1), the third (1, 0); each expert has one place
        ({}, [[0, 1], [5, 5], [5, 5]]),
        ({"capacity_priority": "k_major"}, [[0, 5], [5, 5], [1, 5]]),
        ({"capacity_priority": "probability"}, [[5, 5], [0, 5], [1, 5]]),
    ],
)
def test_who_finds_room_by_hand(fields, kept):
    config = tiny_config(num_experts_per_tok=2, expert_capacity=1, allow_noncausal=True, **fields)
    probs = torch.full((3, 5), 0.2)
    weight = torch.tensor([[0.5, 0.4], [0.9, 0.1], [0.6, 0.4]])
    routing = Routing(probs, weight, torch.tensor([[0, 1], [0, 1], [1, 0]]), probs)
    assert Capacity(config)(routing, RoutingContext(), training=True).index.tolist() == kept


@pytest.mark.parametrize(
    ("fields", "tokens", "places"),
    [
        ({"capacity_factor": 1.0}, 5, 3),
        ({"capacity_factor": 1.0, "capacity_includes_k": False}, 5, 1),
        ({"capacity_factor": 1.0, "capacity_includes_k": False}, 6, 2),
        ({"capacity_factor": 1.25}, 5, 4),
        # 0.55 * 100 is 55.00000000000001 in fp64
        ({"capacity_factor": 0.55, "capacity_includes_k": False}, 500, 55),
        ({"expert_capacity": 4}, 9, 4),
    ],
)
def test_places_of_an_expert_that_all_want(fields, tokens, places):
    capacity, _ = limited(fields)
    logits = torch.zeros(tokens, OUTPUTS)
    routing = Routing(logits, torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.long), logits.softmax(-1))
    kept = capacity(routing, RoutingContext(), training=True).index[:, 0] == 0
    assert kept.tolist() == [True] * places + [False] * (tokens - places)


def test_training_and_evaluation_have_factors_of_their_own():
    config = tiny_config(capacity_factor=0.2, num_null_experts=IDLE)
    routing = random_routing()
    assert Capacity(config)(routing, RoutingContext(ROWS), training=False) is routing
    assert (Capacity(config)(routing, RoutingContext(ROWS), training=True).index != routing.index).any()
    config = tiny_config(eval_capacity_factor=0.2, num_null_experts=IDLE)
    assert Capacity(config)(routing, RoutingContext(ROWS), training=True) is routing
    assert (Capacity(config)(routing, RoutingContext(ROWS), training=False).index != routing.index).any()


@pytest.mark.parametrize("mode", MODES)
def test_an_expert_without_weights_is_never_full(mode):
    capacity, _ = limited(MODES[mode])
    routing = random_routing()
    routing = routing._replace(index=torch.full_like(routing.index, 5))
    assert torch.equal(capacity(routing, RoutingContext(ROWS), training=True).index, routing.index)


@pytest.mark.parametrize("mode", ["factor", "absolute", "running"])
def test_what_later_tokens_choose_changes_nothing_before(mode):
    capacity, _ = limited(MODES[mode])
    one, other = random_routing(LENGTH), random_routing(LENGTH)
    for cut in range(1, LENGTH):
        index = torch.cat([one.index[:cut], other.index[cut:]])
        got = capacity(one._replace(index=index), RoutingContext(), training=True).index[:cut]
        assert torch.equal(got, capacity(one, RoutingContext(), training=True).index[:cut])


@pytest.mark.parametrize("mode", ["k_major", "probability"])
def test_later_tokens_matter_where_the_configuration_says_so(mode):
    capacity, _ = limited(MODES[mode])
    changed = 0
    for _ in range(20):
        one, other = random_routing(LENGTH), random_routing(LENGTH)
        mixed = Routing(*(torch.cat([a[:6], b[6:]]) for a, b in zip(one[:4], other[:4], strict=True)))
        before, after = (capacity(r, RoutingContext(), training=True).index[:6] for r in (one, mixed))
        changed += not torch.equal(before, after)
    assert changed > 0


def by_chunks(capacity, routing, mask, ends, cache):
    """Returns the indices (B, S, K) of consecutive pieces of all rows, one call per piece."""
    starts = [0, *ends[:-1]]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        tokens, token_mask = piece(routing, mask, slice(start, end))
        context = RoutingContext(len(mask), token_mask, cache=cache)
        parts.append(capacity(tokens, context, training=False).index.unflatten(0, (len(mask), -1)))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "ends", [[LENGTH], [4, 5, 6, 12], list(range(1, LENGTH + 1))], ids=["whole", "chunks", "single"]
)
@pytest.mark.parametrize("mask", [NO_PADDING, PADDED_RIGHT, PADDED_LEFT], ids=["all", "right", "left"])
@pytest.mark.parametrize("mode", REMEMBERING)
def test_chunks_with_a_cache_equal_one_call(mode, mask, ends):
    capacity, _ = limited(MODES[mode])
    for _ in range(5):
        routing = random_routing()
        expected = capacity(routing, RoutingContext(ROWS, mask.flatten()), training=False).index
        assert (expected != routing.index).any()
        assert torch.equal(by_chunks(capacity, routing, mask, ends, DynamicCache()).flatten(0, 1), expected)


@pytest.mark.parametrize("mode", REMEMBERING)
def test_counts_follow_a_reordered_and_cropped_cache(mode):
    capacity, _ = limited(MODES[mode])
    routing, beams = random_routing(), torch.tensor([2, 0, 2])
    cache = DynamicCache()
    by_chunks(capacity, routing, NO_PADDING, [9], cache)
    cache.layers[capacity.history].crop(-2)
    cache.reorder_cache(beams)
    chosen = Routing(*(t.unflatten(0, (ROWS, LENGTH))[beams].flatten(0, 1) for t in routing[:4]))
    expected = capacity(chosen, RoutingContext(ROWS), training=False).index.unflatten(0, (ROWS, LENGTH))[:, 7:]
    tokens, _ = piece(chosen, NO_PADDING, slice(7, LENGTH))
    got = capacity(tokens, RoutingContext(ROWS, cache=cache), training=False).index
    assert torch.equal(got.view_as(expected), expected)


@pytest.mark.parametrize("mode", ["factor", "k_major"])
def test_a_limit_that_counts_no_earlier_tokens_leaves_the_cache_alone(mode):
    capacity, config = limited(MODES[mode])
    cache = StaticCache(config, max_cache_len=32)
    layers = len(cache.layers)
    capacity(random_routing(), RoutingContext(ROWS, cache=cache), training=False)
    assert len(cache.layers) == layers


@pytest.mark.parametrize("mode", REMEMBERING)
def test_static_cache_is_refused(mode):
    capacity, config = limited(MODES[mode])
    context = RoutingContext(ROWS, cache=StaticCache(config, max_cache_len=32))
    with pytest.raises(ValueError, match="dynamic cache"):
        capacity(random_routing(), context, training=False)


@pytest.mark.parametrize("mode", MODES)
def test_rows_and_padding_do_not_matter_to_others(mode):
    capacity, _ = limited(MODES[mode])
    routing = random_routing()
    whole = capacity(routing, RoutingContext(ROWS, PADDED_RIGHT.flatten()), training=True)
    for row, length in enumerate(PADDED_RIGHT.sum(1).tolist()):
        part = slice(row * LENGTH, row * LENGTH + length)
        alone = capacity(Routing(*(t[part] for t in routing[:4])), RoutingContext(), training=True)
        assert torch.equal(alone.index, whole.index[part])


def test_kept_weights_keep_their_gradient_and_dropped_ones_lose_it():
    capacity, _ = limited(MODES["factor"])
    routing = random_routing()
    weight = routing.weight.clone().requires_grad_()
    got = capacity(routing._replace(weight=weight), RoutingContext(ROWS), training=True)
    got.weight.sum().backward()
    assert torch.equal(weight.grad, (got.index == routing.index).double())
    assert not weight.grad.all()


@pytest.mark.parametrize("mask", [None, PADDED_LEFT])
def test_count_dropped(mask):
    capacity, _ = limited(MODES["factor"])
    before = random_routing()
    after = capacity(before, RoutingContext(ROWS, None if mask is None else mask.flatten()), training=True)
    dropped = made = 0
    for t in range(ROWS * LENGTH):
        for k in range(SLOTS):
            if before.index[t, k] < OUTPUTS and (mask is None or mask.flatten()[t]):
                made += 1
                dropped += int(after.index[t, k] == OUTPUTS)
    counts = count_dropped(before, after, None if mask is None else mask.flatten())
    assert counts.tolist() == [dropped, made]
    assert dropped > 0


@pytest.mark.parametrize("mode", MODES)
def test_the_only_token_of_a_sequence_loses_no_expert_however_small_the_factor(mode):
    """A sequence of one token keeps all experts, in decoding and in one pass."""
    fields = {name: 1e-6 if name == "capacity_factor" else value for name, value in MODES[mode].items()}
    capacity, _ = limited(fields | ({"capacity_includes_k": False} if "factor" in mode else {}))
    routing = random_routing()
    alone = capacity(routing, RoutingContext(ROWS * LENGTH), training=True)
    assert torch.equal(alone.index, routing.index)
    assert torch.equal(alone.weight, routing.weight)
    if capacity.priority == "token":
        rows = capacity(routing, RoutingContext(ROWS), training=True).index.unflatten(0, (ROWS, LENGTH))
        assert torch.equal(rows[:, 0], routing.index.unflatten(0, (ROWS, LENGTH))[:, 0])
