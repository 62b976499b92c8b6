"""These tests compare packed sequences with single ones: outputs, gradients, drops and caches."""

import pytest
import torch

from modeling_moe import MoEForCausalLM
from modeling_moe.model_packing import find_beginnings, running_min, running_sum
from modeling_moe.modeling_moe import MoEBlock
from modeling_moe.router import RoutingContext
from tests.builders import eager_block, tiny_config
from tests.core.test_catalogue import ALL, CAUSAL, model_of


LENGTHS = ((5, 3, 4), (2, 9, 1))  # of the sequences of each row
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(2))
TASKS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [2] * 2 + [0] * 9 + [1]])
PARTS = [(row, sum(ns[:i]), sum(ns[: i + 1])) for row, ns in enumerate(LENGTHS) for i in range(len(ns))]
POSITIONS = torch.tensor([[i for n in row for i in range(n)] for row in LENGTHS])
BEGINS = POSITIONS == 0
HALF = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5}
KINDS = ALL | {
    "capacity_without_k": {**HALF, "capacity_includes_k": False},
    "capacity_of_top_p": {**HALF, "router_type": "top_p"},
    "capacity_of_null_experts": {"num_null_experts": 3, **HALF},
    "running_with_k_2": {"num_experts_per_tok": 2, "capacity_running": True, **HALF},
    "one_place": {"expert_capacity": 1},
    "one_place_by_choice": {"expert_capacity": 1, "capacity_priority": "k_major", "allow_noncausal": True},
    "soft_with_slots": {"router_type": "soft_moe", "slots_per_expert": 3, "allow_noncausal": True},
    "segments_of_one": {"router_type": "lory", "segment_length": 1},
}  # fmt: skip
# in training these routers assign the tokens of the whole batch together, packed or not
BATCH_WIDE = ("sinkhorn", "base_layer")
REMEMBER = ["lory", "absolute_capacity", "running_capacity"]


def even_noise(monkeypatch) -> None:
    """Replaces noise by one number for all tokens, so that the length of a row does not shift the draws."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.4))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x: x.fill_(0.7))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda x, low, high: x.fill_(low + 0.3 * (high - low)))


def packed_model(name: str, training: bool) -> MoEForCausalLM:
    """Returns a float64 model without router losses, since losses of a batch are not sums over sequences."""
    ALL.setdefault(name, KINDS[name])
    model = model_of(name).double().train(training)
    model.model.router_loss_scale = 0.0
    return model


def tasks_of(name: str, row=slice(None), part=slice(None)) -> dict:
    return {"task_ids": TASKS[row, part]} if KINDS[name].get("router_type") in ("task", "mmoe") else {}


def run(model, ids, **fields) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = model(ids, use_cache=False, output_router_logits=True, **fields)
    return out.logits, out.dropped_share


def gradients(model) -> dict[str, torch.Tensor]:
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", KINDS)
def test_a_packed_sequence_has_the_logits_drops_and_gradients_that_it_has_alone(name, training, monkeypatch):
    if training and name in BATCH_WIDE:
        pytest.skip("see test_what_shares_out_a_batch_does_not_care_how_it_lies")
    model = packed_model(name, training)
    even_noise(monkeypatch)
    got, drops = run(model, IDS, position_ids=POSITIONS, **tasks_of(name))
    (got.square().sum() / 100).backward()
    got_grads, logits, dropped = gradients(model), torch.zeros_like(got), 0.0
    for row, start, end in PARTS:
        part = slice(start, end)
        alone, share = run(model, IDS[row : row + 1, part], **tasks_of(name, slice(row, row + 1), part))
        (alone.square().sum() / 100).backward()
        logits[row, part] = alone[0].detach()
        if share is not None and "top_p" not in name:  # whose tokens differ in their number of assignments
            dropped = dropped + share * (end - start) / IDS.numel()
    torch.testing.assert_close(got.detach(), logits, atol=1e-9, rtol=1e-8)
    expected = gradients(model)
    assert got_grads.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(got_grads[key], grad, atol=1e-9, rtol=1e-7, msg=key)
    if drops is not None and "top_p" not in name and "null" not in name:
        torch.testing.assert_close(drops, dropped)
        assert training or name == "token_capacity" or drops.any() or KINDS[name].get("expert_capacity") == 4


@pytest.mark.parametrize("name", BATCH_WIDE)
def test_what_shares_out_a_batch_does_not_care_how_it_lies(name):
    """Returns the sequences packed into rows, and one sequence per row with padding."""
    model = packed_model(name, training=True)
    got, _ = run(model, IDS, position_ids=POSITIONS)
    rows, mask = torch.zeros(len(PARTS), 9, dtype=torch.long), torch.zeros(len(PARTS), 9, dtype=torch.long)
    for i, (row, start, end) in enumerate(PARTS):
        rows[i, : end - start], mask[i, : end - start] = IDS[row, start:end], 1
    padded, _ = run(model, rows, attention_mask=mask)
    for i, (row, start, end) in enumerate(PARTS):
        torch.testing.assert_close(got[row, start:end], padded[i, : end - start], atol=1e-9, rtol=1e-8)


def test_one_sequence_a_row_with_positions_is_what_it_is_without():
    for name in ("lory", "token_capacity", "probability", "expert_choice", "soft_moe"):
        model = packed_model(name, training=False)
        expected, _ = run(model, IDS)
        got, _ = run(model, IDS, position_ids=torch.arange(12)[None])
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["softmax", *REMEMBER, "token_capacity"])
def test_a_cache_that_a_packed_pass_makes_joins_no_sequences(name):
    """Packed sequences do not see each other with `use_cache`, which is on by default."""
    model = packed_model(name, training=False)
    expected, _ = run(model, IDS, position_ids=POSITIONS)
    out = model(IDS, position_ids=POSITIONS)
    assert out.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(out.logits, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "deepseek_v3", "lory", "token_capacity", "expert_choice", "soft_moe"])
def test_a_mask_that_numbers_the_sequences_weighs_all_tokens_alike(name):
    """A mask that numbers the sequences 1, 2, 3 gives the results of a mask of ones."""
    results = []
    for mask in (torch.ones_like(IDS), BEGINS.cumsum(1)):
        model = packed_model(name, training=True)
        model.model.router_loss_scale = 1.0
        even = model(IDS, attention_mask=mask, labels=IDS, use_cache=False)
        totals = model.model.router_totals.kinds["mlp"].statistics
        results.append((even.loss, even.aux_loss, even.logits, *([] if totals is None else [totals])))
        torch.manual_seed(0)
    for value, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)


def block_diagonal(past: int = 0) -> torch.Tensor:
    """Returns a mask (2, 1, S - past, S) in which a token sees its sequence up to itself."""
    sequence = BEGINS.cumsum(1)
    seen = (sequence[:, :, None] == sequence[:, None]) & torch.ones(12, 12).tril().bool()
    return seen[:, None, past:]


@pytest.mark.parametrize("name", REMEMBER)
def test_decoding_after_a_packed_prefill_goes_on_with_the_last_sequence(name):
    model, cache, got = packed_model(name, training=False), None, []
    expected, _ = run(model, IDS, position_ids=POSITIONS)
    # one chunk ends within a sequence, one at the end of a sequence; single tokens follow
    for start, end in ((0, 6), (6, 8), (8, 10), (10, 11), (11, 12)):
        out = model(
            IDS[:1, start:end], position_ids=POSITIONS[:1, start:end], past_key_values=cache, use_cache=True,
            attention_mask=block_diagonal(start)[:1, :, : end - start, :end],
        )  # fmt: skip
        cache, got = out.past_key_values, [*got, out.logits]
    torch.testing.assert_close(torch.cat(got, dim=1), expected[:1], atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("name", [*REMEMBER, "token_capacity", "probability", "expert_choice"])
def test_padding_before_packed_sequences_changes_nothing(name):
    model = packed_model(name, training=False)
    expected, _ = run(model, IDS, position_ids=POSITIONS)
    pad = torch.nn.functional.pad
    seen = pad(block_diagonal(), (3, 0, 3, 0))
    seen[..., :3, :3] |= torch.eye(3).bool()  # each sees itself, lest the softmax be empty
    got, _ = run(model, pad(IDS, (3, 0)), position_ids=pad(POSITIONS, (3, 0)), attention_mask=seen)
    torch.testing.assert_close(got[:, 3:], expected, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("name", [*REMEMBER, "token_capacity", "k_major", "expert_choice", "soft_moe"])
def test_cu_seq_lens_mark_sequences_as_positions_do(name):
    """Sequences marked by `cu_seq_lens` alone are routed as single ones; rotary embeddings depend on distances alone."""
    model = packed_model(name, training=False)
    ids, lengths = IDS.flatten()[None], torch.tensor([n for row in LENGTHS for n in row])
    cu_seq_lens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    expected, _ = run(model, ids, position_ids=POSITIONS.flatten()[None])
    sequence = torch.repeat_interleave(torch.arange(6), lengths)
    seen = (sequence[:, None] == sequence) & torch.ones(24, 24).tril().bool()
    got, _ = run(model, ids, attention_mask=seen[None, None], cu_seq_lens_q=cu_seq_lens)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # angles are fp32


@pytest.mark.parametrize("name", [*REMEMBER, "token_capacity", "k_major", "probability", "expert_choice", "soft_moe"])
def test_a_block_with_padding_between_packed_sequences(name):
    """A block without attention routes packed sequences as single ones, also with padding in the mask."""
    block = eager_block(**KINDS[name]).eval()
    states, mask = torch.randn(2, 12, 32).double(), torch.ones(2, 12, dtype=torch.long)
    mask[0, 3:5] = mask[0, 9] = mask[1, 0] = 0
    begins = BEGINS & (mask > 0)
    got = block(states, RoutingContext(2, mask.flatten(), begins=begins.flatten()))[0]
    for row, start, end in PARTS:
        real = mask[row, start:end] > 0
        alone = block(states[row : row + 1, start:end][:, real])[0]
        torch.testing.assert_close(got[row, start:end][real], alone[0])


@pytest.mark.parametrize("name", ["token_capacity", "running_capacity", "k_major", "probability", "expert_choice"])
def test_packed_rows_compile_in_one_graph(name):
    torch.compiler.reset()
    block = MoEBlock(tiny_config(**ALL[name], experts_implementation="moe")).eval()
    block.gate.init_weights(0.5)
    for parameter in block.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    states, context = torch.randn(2, 12, 32), RoutingContext(2, begins=BEGINS.flatten())
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(states, context)[0]
    torch.testing.assert_close(got, block(states, context)[0])


@pytest.mark.parametrize(
    ("positions", "mask", "begins"),
    [
        ([0, 1, 2, 3], None, [1, 0, 0, 0]),
        ([0, 1, 0, 1], None, [1, 0, 1, 0]),
        ([0, 0, 0, 1], None, [1, 1, 1, 0]),
        ([4, 5, 0, 1], None, [0, 0, 1, 0]),  # goes on with what a cache holds
        ([0, 1, 7, 8], None, [1, 0, 1, 0]),  # a later piece of another text
        ([1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0]),  # `generate` fills the left with ones
        ([0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 0]),
        ([0, 1, 1, 2], [1, 1, 0, 1], [1, 0, 0, 0]),  # a hole that positions do not count
        ([0, 1, 2, 3], [1, 1, 0, 1], [1, 0, 0, 0]),  # one that they count
        ([0, 1, 2, 0], [1, 1, 0, 1], [1, 0, 0, 1]),
    ],
)
def test_where_sequences_begin(positions, mask, begins):
    mask = None if mask is None else torch.tensor([mask])
    got = find_beginnings((1, 4), torch.tensor([positions]), mask)
    assert got[0].long().tolist() == begins


def test_where_sequences_begin_by_cumulated_lengths():
    assert find_beginnings((2, 3), None) is None
    got = find_beginnings((1, 6), None, cu_seq_lens=torch.tensor([0, 2, 5, 6, 6], dtype=torch.int32))
    assert got.long().tolist() == [[0, 0, 1, 0, 0, 1]]


def test_running_sums_and_minima_start_anew():
    values = torch.randint(-50, 50, (2, 12, 3))
    for running, whole in ((running_sum, torch.cumsum), (running_min, lambda x, dim: x.cummin(dim=dim).values)):
        got = running(values, BEGINS)
        for row, start, end in PARTS:
            assert torch.equal(got[row, start:end], whole(values[row, start:end], dim=0))
        assert torch.equal(running(values, None), whole(values, dim=1))


@pytest.mark.parametrize("shape", [(1, 12), (2, 11), (24,), (2, 12, 1)])
def test_tasks_of_another_shape_are_refused_by_name(shape):
    with pytest.raises(
        ValueError, match=r"task_ids has shape .*: give one task for each sequence, \(2,\), or for each"
    ):
        packed_model("task", training=False)(IDS, task_ids=torch.zeros(shape, dtype=torch.long))


def test_every_causal_router_is_packed_above():
    assert set(CAUSAL) < set(KINDS)
