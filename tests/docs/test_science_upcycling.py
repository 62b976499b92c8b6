"""The tables on the pages about upcycling are those of the stored runs."""

import pytest
from experiments import continued_training, expert_growth_report, upcycling_comparison, virtual_groups
from experiments.continued_training import DESIGN_FILE, Runs, RunsArguments
from experiments.design import Design
from experiments.expert_growth import grow
from experiments.upcycling_comparison import compare

from tests.docs.blocks import ROOT


RUNS = ROOT / "docs" / "science" / "runs"


def page(name: str) -> str:
    return (ROOT / "docs" / "science" / name).read_text(encoding="utf-8")


class MissingRun(Exception):
    """A run of the shipped design is not in docs/science/runs."""


@pytest.fixture
def stored(monkeypatch):
    """Returns the shipped design and the stored runs; a missing run raises MissingRun."""

    def train(*args):
        raise MissingRun

    monkeypatch.setattr(continued_training, "train_dense", train)
    design = Design.read(DESIGN_FILE)
    return design, Runs(design, RunsArguments(dense_dir="no"))


def test_the_comparison_on_the_page_is_that_of_the_runs(stored):
    design, runs = stored
    assert upcycling_comparison.report(design, compare(design, runs)) in page("upcycling.md")


def test_the_virtual_groups_on_the_page_are_those_of_the_runs(stored):
    watched = virtual_groups.watch_all(*stored, str(RUNS / "virtual_groups.jsonl"))
    assert virtual_groups.report(watched) in page("upcycling.md")


def test_the_growth_on_the_page_is_that_of_the_runs(stored):
    design, runs = stored
    assert expert_growth_report.report(design, grow(design, runs, str(RUNS / "expert_costs.jsonl"))) in page(
        "expert-growth.md"
    )
