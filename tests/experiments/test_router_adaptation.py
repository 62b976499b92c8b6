"""These tests run the adaptation experiment at the smallest size, and check its bookkeeping."""

import json
from pathlib import Path

import pytest
from experiments import router_adaptation as experiment
from experiments.language_words import LANGUAGES
from experiments.router_adaptation import ARMS, IN_CONTEXT, AdaptationArguments, Run, comparisons, markdown, split
from experiments.text_domains import DOMAINS, domain_bytes

from modeling_moe.utils.errors import Interrupted, UserError


SMALLEST = {
    "seeds": 2,
    "steps": 2,
    "router_steps": 1,
    "rows": 2,
    "length": 24,
    "support": 12,
    "draws": 1,
    "queries": 1,
}


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RATES", (0.1, 1.0))
    # Debian's dictionaries need not be here
    kinds = dict(zip(LANGUAGES, list(DOMAINS) * 3, strict=False))
    monkeypatch.setattr(experiment, "language_bytes", lambda language: domain_bytes(kinds[language]))
    monkeypatch.setattr(experiment, "refuse_missing_languages", lambda: None)
    return AdaptationArguments(**SMALLEST, runs_file=str(tmp_path / "runs.jsonl"))


def test_languages_are_split_without_overlap_and_differ_between_seeds():
    for seed in range(5):
        parts = split(seed)
        assert [len(part) for part in parts] == [26, 6, 8]
        assert sorted([*parts.training, *parts.validation, *parts.held_out]) == sorted(LANGUAGES)
    assert split(0) == split(0) != split(1)


def test_runs_are_repeatable_kept_and_compared(arguments, tmp_path):
    runs = experiment.compare(arguments)
    assert [run.seed for run in runs] == [0, 1]
    for run in runs:
        assert set(run.losses) == {*ARMS, IN_CONTEXT}
        assert all(set(losses) == set(run.held_out) for losses in run.losses.values())
        assert run.losses["frozen, one step"] != run.losses["frozen"]
        assert run.losses["router training"] != run.losses["meta-training"]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert experiment.compare(arguments) == runs
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines
    assert experiment.run_seed(1, arguments) == runs[1]


def test_the_tables_hold_means_and_corrected_comparisons():
    losses = {arm: {"a": 2.0 + place, "b": 4.0 + place} for place, arm in enumerate((*ARMS, IN_CONTEXT))}
    runs = [
        Run(
            seed,
            ["a", "b"],
            {"frozen": 1.0, "plain": 3.0, "meta": 10.0},
            {a: {d: v + seed * 0.1 for d, v in x.items()} for a, x in losses.items()},
        )
        for seed in range(3)
    ]
    found = {(first, second): (difference, p) for first, second, difference, p in comparisons(runs)}
    difference, _ = found["meta-training, one step", "frozen"]
    assert difference.mean == pytest.approx(5.0)
    assert found["router training, one step", "router training"][0].mean == pytest.approx(1.0)
    assert all(p >= difference.p_value for difference, p in found.values())
    table = markdown(runs)
    assert "| frozen | 3.1000 |  |" in table
    assert "| meta-training, one step | 8.1000 | 10 |" in table


def test_the_page_shows_the_stored_runs(monkeypatch):
    def train(*_):
        raise AssertionError("the page's runs lack a seed")

    monkeypatch.setattr(experiment, "run_seed", train)
    science = Path(__file__).parents[2] / "docs" / "science"
    stored, page = (
        science / "runs" / "router_adaptation.jsonl",
        (science / "router-adaptation.md").read_text(encoding="utf-8"),
    )
    seeds = len(stored.read_text(encoding="utf-8").splitlines())
    assert f"--seeds {seeds} " in page
    assert markdown(experiment.compare(AdaptationArguments(seeds=seeds, runs_file=str(stored)))) in page


def test_runs_of_other_arguments_are_refused(arguments, tmp_path):
    (tmp_path / "runs.jsonl").write_text(
        json.dumps({"settings": {"steps": 3}, "run": {"seed": 0, "held_out": [], "rates": {}, "losses": {}}}) + "\n"
    )
    with pytest.raises(UserError, match="name another file"):
        experiment.compare(arguments)


def test_ctrl_c_says_how_to_go_on(arguments, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_seed", stopped)
    with pytest.raises(Interrupted, match="repeat the command to continue"):
        experiment.compare(arguments)


@pytest.mark.parametrize("fields", [{"seeds": 1}, {"steps": 0}, {"draws": 0}])
def test_arguments_out_of_range_are_refused(fields):
    (name,) = fields
    with pytest.raises(UserError, match=f"{name} is {fields[name]}"):
        AdaptationArguments(**fields)
