"""These tests check the runs of the upcycling experiments: exact starts, equal FLOPs, held-out text, resumed files."""

from dataclasses import replace

import pytest
import torch
from experiments.byte_text import PERIOD, RATES, TEST, batches, byte_text
from experiments.continued_training import (
    DESIGN_FILE,
    Job,
    Runs,
    RunsArguments,
    arm_model,
    dense_state,
    held_out_loss,
    run_job,
    train_dense,
)
from experiments.design import Design
from experiments.flops import flops_per_token
from experiments.python_text import library_documents, without_seen
from transformers import AutoModelForCausalLM

from modeling_moe.utils.errors import UserError
from tests.experiments.upcycling_design import TINY, write_design


@pytest.fixture(scope="module")
def design(tmp_path_factory):
    return Design.read(write_design(tmp_path_factory.mktemp("design")))


@pytest.fixture(scope="module")
def dense(design, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    train_dense(design, folder)
    return folder


def test_held_out_rows_come_from_other_documents():
    text, documents = byte_text(64, 20, 30), library_documents()
    whole = bytes(text.training.tolist())
    assert text.rates.shape == (20, 64)
    assert text.test.shape == (30, 64)
    for part, rows in ((RATES, text.rates), (TEST, text.test)):
        own = "\n".join(documents[part::PERIOD]).encode()
        assert sum(bytes(row.tolist()) in own for row in rows) > 0.5 * len(rows)
        assert not any(bytes(row.tolist()) in whole for row in rows)
    assert documents[RATES].encode()[:2000] not in whole
    assert documents[1].encode() in whole


def test_paragraphs_of_the_training_text_are_removed():
    assert without_seen(["a\n\nb\n\nc", "b"], ["x\n\n b"]) == (["a\n\nc"], 2)


def test_too_little_held_out_text_is_refused():
    with pytest.raises(UserError, match=r"test_rows is 1000000, but the held-out text has \d+ rows of 64 bytes"):
        byte_text(64, 1, 1_000_000)


def test_batches_are_equal_for_equal_seeds_and_come_from_the_text():
    text = torch.arange(100, dtype=torch.uint8)
    first, second, other = (next(batches(text, 8, 50, 0, "arms", seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(first, first[:, :1] + torch.arange(8))
    assert first.max() == 99


def test_exact_arms_start_as_the_dense_model_and_others_do_not(design, dense):
    state, rows = dense_state(design, dense), design.text.test
    llama = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    expected = held_out_loss(llama, rows)
    start = {arm: held_out_loss(arm_model(design, arm, state, 1), rows) for arm in design.arms}
    for arm in ("dense", "exact", "shared", "E=2", "E=16"):
        assert start[arm] == pytest.approx(expected, abs=1e-5)
    for arm in ("Megatron", "drop"):
        assert abs(start[arm] - expected) > 1e-4


def test_the_loss_is_the_mean_over_all_predicted_bytes(design, dense):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    rows = design.text.training[: 40 * 16].view(40, 16).long()
    with torch.no_grad():
        expected = model(input_ids=rows, labels=rows).loss.item()
    assert held_out_loss(model, rows) == pytest.approx(expected, abs=1e-6)


def test_all_arms_have_equal_flops(design):
    large = replace(design, training=replace(design.training, steps=10_000))
    dense = flops_per_token(design.dense_config, 16)
    for arm in design.arms:
        assert large.steps(arm) * large.flops(arm) == pytest.approx(10_000 * dense, rel=1e-3)
    router = 2 * 8 * 16  # layers, experts, hidden
    assert design.flops("exact") - dense == 6 * router
    assert large.steps("shared") < large.steps("exact") < large.steps("dense") == 10_000


def test_equal_jobs_give_equal_runs_and_all_parameters_are_trained(design, dense):
    for arm in ("dense", "exact"):
        one, two, other = (replace(run_job(Job(arm, seed, 1e-2), design, str(dense)), seconds=0) for seed in (1, 1, 2))
        assert one == two
        assert one.test_loss != other.test_loss
        assert one.test_loss < one.initial_loss
        assert (one.steps, one.learning_rate) == (design.steps(arm), 1e-2)


def test_runs_are_kept_and_bound_to_their_design_and_dense_model(design, tmp_path):
    args = RunsArguments(runs_file=str(tmp_path / "runs.jsonl"), dense_dir=str(tmp_path / "dense"))
    jobs = [Job("dense", 1, 1e-2), Job("exact", 1, 1e-2)]
    (first,) = Runs(design, args).of(jobs[:1], "")
    both = Runs(design, args).of(jobs, "")
    assert both[0] == first
    assert [run.job for run in both] == jobs
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="holds runs with other arguments"):
        Runs(replace(design, training=replace(design.training, steps=5)), args)
    with pytest.raises(UserError, match="runs of arm 'exact' with other options"):
        Runs(replace(design, arms=design.arms | {"exact": design.arms["exact"] | {"router_std": 1.0}}), args)
    Runs(replace(design, arms=design.arms | {"drop": design.arms["exact"]}), args)
    other = replace(design, training=replace(design.training, dense_steps=4))
    with pytest.raises(UserError, match="holds a dense model of another design"):
        dense_state(other, tmp_path / "dense")
    # finished runs are read without a dense model; a missing run needs the one that they start from
    assert Runs(design, replace(args, dense_dir=str(tmp_path / "none"))).of(jobs, "") == both
    train_dense(other, tmp_path / "other")
    (tmp_path / "other" / "design.json").write_text((tmp_path / "dense" / "design.json").read_text())
    moved = Runs(design, replace(args, dense_dir=str(tmp_path / "other")))
    with pytest.raises(UserError, match="start from another dense model"):
        moved.of([Job("dense", 2, 1e-2)], "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"dense": None}}, "has no options: add it to arms"),
        ({"search": {"rates": [1e-3]}}, "does not hold a design"),
        ({"more": 1}, "does not hold a design"),
        ({"training": TINY["training"] | {"step": 1}}, "does not hold a design"),
    ],
)
def test_bad_designs_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Design.read(write_design(tmp_path, **changes))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(UserError, match="workers is 0"):
        RunsArguments(workers=0)
    with pytest.raises(UserError, match="make the folder"):
        RunsArguments(runs_file=str(tmp_path / "no" / "runs.jsonl"))
    with pytest.raises(UserError, match="does not hold a design"):
        Design.read(tmp_path / "no.yaml")


def test_the_shipped_design_can_be_built():
    design = Design.read(DESIGN_FILE)
    main = range(1, 1 + design.comparison.most_seeds)
    assert not {*design.search.seeds, *design.comparison.pilot_seeds} & {*main}
    for first, second in design.comparison.pairs:
        assert {first, second} <= {*design.comparison.arms}
    for arm in design.arms:
        assert design.steps(arm) * design.flops(arm) == pytest.approx(
            design.training.steps * flops_per_token(design.dense_config, design.training.length), rel=0.01
        )
    active = {design.config(arm).num_experts_per_tok for arm in design.growth.arms}
    assert len(active) == 1
    experts = [design.config(arm).num_experts for arm in design.growth.arms]
    assert experts == [2, 4, 8, 16, 32]
