"""These tests check the facts experiment: cut models are exact, arms have equal compute, and claims need intervals."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from experiments.facts_data import (
    DIGITS,
    Rows,
    cut,
    entering_states,
    make_facts,
    positions,
    prose_rows,
    shuffled,
    tail_model,
)
from experiments.intervals import Comparison
from experiments.upcycling_facts import (
    ARMS,
    FactsArguments,
    Job,
    Run,
    active_width,
    arm_model,
    batches,
    best_rates,
    compare,
    facts_experiment,
    finished_runs,
    prepare,
    recall,
    settings_of,
    steps_of,
    train,
    trainable,
)
from transformers.core_model_loading import revert_weight_conversion

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.checkpoints import LazyTensor
from modeling_moe.conversion import load_state
from modeling_moe.utils.errors import UserError
from tests.builders import save_llama, tiny_config, train_tokenizer


DENSE = {"mlp_layer_types": ["dense"] * 3}
RUN = Run("dense", 1, 1e-3, 4, 8, 3.0, 2.0, 0.5, 0.1, 1.0)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("dense"), intermediate_size=160, num_hidden_layers=3)
    return FactsArguments(
        model_name_or_path=str(folder),
        layers=2,
        facts=8,
        facts_per_row=2,
        fact_rows=2,
        prose_rows=1,
        prose_pool=4,
        held_out_rows=3,
        steps=4,
        sweep_steps=2,
        rates=[1e-4, 1e-2],
        seeds=2,
    )


@pytest.fixture(scope="module")
def data(arguments):
    return prepare(arguments)


def dense_model(**fields) -> MoEForCausalLM:
    return MoEForCausalLM(tiny_config(**(DENSE | fields))).eval()


def state_of(model):
    state = {name: LazyTensor.of(t) for name, t in revert_weight_conversion(model, model.state_dict()).items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"embedding_multiplier": 3.0, "scale_embeddings": True, "final_logit_softcapping": 5.0},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 4},
        {"no_rope_layers": [1, 1, 0]},
        {"norm_placement": "post"},
    ],
)
@pytest.mark.parametrize("layer", [1, 2])
def test_the_tail_on_cached_states_is_the_model_on_the_kept_tokens(fields, layer):
    model, ids, kept = dense_model(**fields), torch.arange(3, 43).view(2, 20), torch.tensor([5, 8, 60, 98])
    states = entering_states(model.config, state_of(model), layer, ids)
    tail = load_state(*tail_model(model.config, state_of(model), layer, kept))
    with torch.no_grad():
        expected, got = model(ids).logits, tail(inputs_embeds=states).logits
    assert len(tail.model.layers) == 3 - layer
    torch.testing.assert_close(got, expected[..., kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{"position_embedding_type": "learned"}, {"scale_attn_by_inverse_layer_idx": True}])
def test_a_model_that_cannot_be_cut_is_refused(fields):
    with pytest.raises(UserError, match="cannot be cut in two"):
        cut(tiny_config(**(DENSE | fields)), {}, 0, 1)


def router_params(config: MoEConfig) -> int:
    sparse = config.mlp_layer_types.count("sparse")
    return sparse * config.num_experts * config.hidden_size


def test_all_arms_have_the_same_active_parameters_or_fewer_steps(data):
    dense, state = MoEConfig(**data.config), {name: LazyTensor.of(t) for name, t in data.weights.items()}
    width, layers = dense.intermediate_size, dense.num_hidden_layers
    per_neuron = 3 * dense.hidden_size * layers
    for arm in ARMS:
        config, made = arm_model(arm, dense, state, 0)
        active = config.num_active_params() - (router_params(config) if ARMS[arm] else 0)
        assert active - dense.num_active_params() == (active_width(arm, width) - width) * per_neuron
        assert steps_of(arm, 900, width) * active_width(arm, width) == 900 * width
        load_state(config, made)
    assert [active_width(arm, width) for arm in ARMS] == [width] * 4 + [width + width // 8]


def test_exact_arms_start_as_the_dense_model_and_others_do_not(data, arguments):
    runs = {arm: train(Job(arm, 1, 1e-3, 1, 8), data, arguments) for arm in ARMS}
    loss = {arm: run.initial_prose_loss for arm, run in runs.items()}
    for arm in ("virtual groups, exact", "drop .1 and shared expert"):
        assert loss[arm] == pytest.approx(loss["dense"], abs=1e-5)
    for arm in ("virtual groups, Megatron", "drop .5"):
        assert abs(loss[arm] - loss["dense"]) > 1e-3


def test_facts_in_a_row_do_not_see_each_other(data, arguments):
    model = load_state(MoEConfig(**data.config), {name: LazyTensor.of(t) for name, t in data.weights.items()})
    batch = next(batches(data, arguments, Job("dense", 1, 1e-3, 1, 8)))
    length = data.facts.states.shape[2]
    with torch.no_grad():
        packed = model(
            inputs_embeds=batch["inputs_embeds"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        alone = model(inputs_embeds=batch["inputs_embeds"][:2].unflatten(1, (2, length)).flatten(0, 1)).logits
        prose = model(inputs_embeds=batch["inputs_embeds"][2:]).logits
    torch.testing.assert_close(packed[:2].unflatten(1, (2, length)).flatten(0, 1), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[2:], prose, atol=1e-5, rtol=1e-5)


def test_labels_are_the_digits_and_the_prose(data, arguments):
    batch = next(batches(data, arguments, Job("dense", 1, 1e-3, 1, 8)))
    length = data.facts.states.shape[2]
    facts = batch["labels"][:2].unflatten(1, (2, length))
    assert (facts[..., :-DIGITS] == -100).all()
    assert (facts[..., -DIGITS:] >= 0).all()
    assert (batch["labels"][2:] >= 0).all()
    assert positions(1, 6, 2).tolist() == [[0, 1, 2, 0, 1, 2]]


def test_batches_are_the_same_for_all_arms_of_a_seed_and_differ_between_seeds(data, arguments):
    first, again, other = (list(batches(data, arguments, Job("dense", seed, 1e-3, 2, 8))) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["inputs_embeds"], b["inputs_embeds"])
    assert not torch.equal(first[0]["labels"], other[0]["labels"])


def test_a_short_run_meets_the_first_facts_alone(data, arguments):
    first = data.facts.labels[0, :5, -DIGITS:]
    for batch in batches(data, arguments, Job("dense", 0, 1e-3, 6, 5)):
        met = batch["labels"][:2].unflatten(1, (2, -1)).flatten(0, 1)[:, -DIGITS:]
        assert (met[:, None] == first).all(dim=-1).any(dim=1).all()


def test_every_index_comes_before_one_comes_again():
    order = shuffled(5, 3, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(order) for _ in range(5)]).tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:10]


def test_the_same_job_gives_the_same_run(data, arguments):
    before = {name: tensor.clone() for name, tensor in data.weights.items()}
    for arm in ("dense", "drop .5"):
        a, b, c = (
            replace(train(Job(arm, seed, 1e-2, 3, 8), data, arguments), seconds=0.0, seed=0) for seed in (1, 1, 2)
        )
        assert a == b
        assert a.recall_bits != c.recall_bits
    for name, tensor in data.weights.items():
        assert torch.equal(tensor, before[name])


def test_training_teaches_facts(data, arguments):
    short, long = (train(Job("virtual groups, exact", 1, 1e-2, steps, 8), data, arguments) for steps in (1, 60))
    assert long.recall_bits > short.recall_bits + 1
    assert long.exact_match > short.exact_match


def test_only_networks_and_routers_train():
    model = MoEForCausalLM(tiny_config())
    parameters = trainable(model)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(parameters) == len(names)
    assert {"model.layers.0.mlp.gate.weight", "model.layers.1.mlp.up_proj.weight"} < names
    assert all(".mlp." in name for name in names)


def test_recall():
    digits = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]])
    labels = torch.cat([torch.full((2, 2), -100), digits], dim=1)
    logits = torch.zeros(2, 8, 10)
    logits[0, 1:7] = torch.nn.functional.one_hot(digits[0], 10) * 100.0
    logits[1, :, 9] = 1e-4

    class Fixed(torch.nn.Module):
        def forward(self, inputs_embeds, use_cache):
            return type("Output", (), {"logits": logits})

    bits, exact = recall(Fixed(), Rows(torch.zeros(2, 8, 4), labels))
    assert bits == pytest.approx(math.log2(10) / 2, abs=1e-4)
    assert exact == 0.5


def test_facts():
    tokenizer = train_tokenizer()
    facts = make_facts(tokenizer, 20, 3, 0)
    rows = facts.flatten(0, 1)
    assert (rows[:, 0] == tokenizer.eos_token_id).all()
    texts = tokenizer.batch_decode(rows[:, 1:])
    names, numbers = zip(*(text.split(":") for text in texts), strict=True)
    assert len(set(names)) == 60
    assert all(number.isdigit() and len(number) == DIGITS for number in numbers)
    assert len(set(numbers)) == 60
    assert torch.equal(make_facts(tokenizer, 20, 2, 0), facts[:2])
    assert not torch.equal(make_facts(tokenizer, 20, 1, 1), facts[:1])


def test_held_out_prose_is_not_in_the_training_text():
    tokenizer = train_tokenizer()
    pool, held_out = prose_rows(tokenizer, 64, (2000, 50), 0)
    trained = tokenizer.decode(pool.flatten())
    texts = tokenizer.batch_decode(held_out)
    assert not any(text[16:-16] in trained for text in texts)
    with pytest.raises(UserError, match="held_out_rows is 10000000"):
        prose_rows(tokenizer, 64, (2, 10_000_000), 0)


def test_a_claim_needs_an_interval_without_0():
    below = Comparison("prose_loss", "a", "b", -0.5, -0.9, -0.1)
    assert below.claim == "prose_loss of a is below b: -0.500 (95% interval -0.900 to -0.100)"
    assert Comparison("prose_loss", "a", "b", 0.5, 0.1, 0.9).claim.startswith("prose_loss of a is above b: +0.500")
    assert Comparison("prose_loss", "a", "b", -0.5, -1.1, 0.1).claim.startswith("no claim on prose_loss, a against b")
    assert not Comparison("prose_loss", "a", "b", float("nan"), float("nan"), float("nan")).holds


def test_seeds_are_paired():
    exact = {1: 1.0, 2: 2.0, 3: 4.0}
    runs = [replace(RUN, arm="virtual groups, exact", seed=seed, recall_bits=bits) for seed, bits in exact.items()]
    runs += [replace(RUN, seed=seed, recall_bits=bits - 0.5) for seed, bits in reversed(exact.items())]
    comparisons = {comparison.metric: comparison for comparison in compare(runs)}
    assert asdict(comparisons["recall_bits"]) == {
        "metric": "recall_bits",
        "first": "virtual groups, exact",
        "second": "dense",
        "mean": 0.5,
        "low": 0.5,
        "high": 0.5,
    }
    assert not comparisons["prose_loss"].holds


def test_the_rate_with_the_most_recall_wins():
    bits = {1e-4: float("nan"), 1e-3: 0.2, 1e-2: 0.4, 1e-1: float("nan")}
    assert best_rates([replace(RUN, learning_rate=rate, recall_bits=value) for rate, value in bits.items()]) == {
        "dense": 1e-2
    }


def test_whole_experiment_and_its_second_part_after_an_interruption(arguments, tmp_path):
    args = replace(arguments, only=["dense", "drop .1 and shared expert"], runs_file=str(tmp_path / "runs.jsonl"))
    result = facts_experiment(args)
    assert result.steps == {"dense": 4, "drop .1 and shared expert": 4}
    assert [(run.arm, run.seed) for run in result.runs] == [(arm, seed) for seed in (1, 2) for arm in args.arms]
    assert all(run.learning_rate == result.rates[run.arm] for run in result.runs)
    assert len(result.sweeps) == 4
    assert {run.facts for run in result.sweeps} == {4}
    assert {run.facts for run in result.runs} == {8}
    assert {comparison.first for comparison in result.comparisons} == {"drop .1 and shared expert"}
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == 8
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:6]) + "\n")
    again = facts_experiment(args)
    assert again.runs[:2] == result.runs[:2]
    assert [replace(run, seconds=0.0) for run in again.runs] == [replace(run, seconds=0.0) for run in result.runs]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 8


def test_runs_of_other_arguments_are_refused(arguments, tmp_path):
    args = replace(arguments, runs_file=str(tmp_path / "runs.jsonl"))
    line = json.dumps({"settings": settings_of(args), "run": asdict(RUN)})
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    assert finished_runs(args) == {RUN.job: RUN}
    assert finished_runs(replace(args, steps=9, seeds=3, workers=2)) == {RUN.job: RUN}
    with pytest.raises(UserError, match="other arguments"):
        finished_runs(replace(args, seed=1))
    (tmp_path / "runs.jsonl").write_text(line + "\n" + line[:20] + "\n")
    with pytest.raises(UserError, match="does not hold a run in line 2"):
        finished_runs(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seeds": 1}, "seeds is 1"),
        ({"facts": 3}, "facts is 3: it must be at least 4"),
        ({"prose_pool": 0}, "prose_pool is 0"),
        ({"rates": [0.0]}, "rates is"),
        ({"only": ["dence"]}, "only 'dence' is unknown"),
        ({"runs_file": "no/where/runs.jsonl"}, "make the folder"),
    ],
)
def test_bad_arguments(arguments, changes, message):
    with pytest.raises(UserError, match=message):
        replace(arguments, **changes)


def test_more_layers_than_there_are(arguments):
    with pytest.raises(UserError, match="layers is 3"):
        prepare(replace(arguments, layers=3))
