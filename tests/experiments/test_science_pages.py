"""These tests make the tables of the science pages of the stored runs, without training."""

from pathlib import Path

import pytest
from experiments import collapse, collapse_table, router_comparison, router_table
from experiments.collapse import CollapseArguments, collapse_experiment
from experiments.router_comparison import ComparisonArguments, compare_routers

from modeling_moe.router_catalogue import ROUTERS


ROOT = Path(__file__).parents[2]
SCIENCE = ROOT / "docs" / "science"


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Lets a run that is not stored fail."""
    for module in (router_comparison, collapse):
        monkeypatch.setattr(module, "load_corpus", lambda *args: pytest.fail("a run is not stored"))


def test_the_page_of_routers_is_that_of_the_stored_runs():
    results = compare_routers(ComparisonArguments(runs_file=str(SCIENCE / "runs" / "routers.jsonl")))
    used = {result.entry.fields.get("router_type", "topk") for result in results}
    assert used | {"sparsemixer"} == set(ROUTERS)  # the row sparsemixer names it by router_gradient
    rows, ranked = router_table.standings(results, results[0].entry.name)
    page = (SCIENCE / "routers.md").read_text(encoding="utf-8")
    for part in router_table.markdown(rows, ranked, results[0].entry.name).split("\n\n"):
        assert part.strip() in page


def test_the_page_of_collapse_is_that_of_the_stored_runs():
    result = collapse_experiment(CollapseArguments(runs_file=str(SCIENCE / "runs" / "collapse.jsonl")))
    page = (SCIENCE / "collapse.md").read_text(encoding="utf-8")
    for part in collapse_table.markdown(result).split("\n\n"):
        assert part.strip() in page
