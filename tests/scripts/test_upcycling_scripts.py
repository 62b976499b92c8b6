"""These tests run the scripts that measure upcycled models before and after training."""

import json
from pathlib import Path

import pytest
from experiments import upcycling_initial_loss as initial_loss
from experiments import virtual_groups

from tests.builders import save_llama
from tests.experiments.upcycling_design import TINY, write_design


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(run_script):
    """Runs a script with flags by name."""

    def run(name, **flags):
        argv = []
        for flag, value in flags.items():
            argv += [f"--{flag}", *(value if isinstance(value, list) else [value])]
        return run_script(name, *argv)

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("dense"), intermediate_size=160)


def test_table(run, dense, tmp_path):
    flags = {"model_name_or_path": dense, "tokens": 32, "output_json": tmp_path / "table.json"}
    code, out, _ = run("upcycling_table.py", **flags, only=["copy", "virtual groups, Megatron"])
    assert code == 0
    record = json.loads((tmp_path / "table.json").read_text())
    exact, megatron = record["results"]
    assert exact["reason_not_exact"] is None
    assert exact["largest_difference"] < 1e-4
    assert "scaling='megatron'" in megatron["reason_not_exact"]
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") == 7}
    assert "│ yes " in rows["copy"]
    assert "│ no " in rows["virtual groups, Megatron"]
    assert f"{megatron['delta_loss']:+.4f}" in rows["virtual groups, Megatron"]
    assert f"dense loss {record['dense_loss']:.4f}" in out


def test_a_broken_claim_fails_after_the_table(run, dense, monkeypatch):
    monkeypatch.setattr(initial_loss, "TOLERANCE", -1.0)
    code, out, err = run("upcycling_table.py", model_name_or_path=dense, tokens=32, only=["copy", "drop .5"])
    assert code == 2
    assert "drop .5" in out
    assert len(err.strip().splitlines()[-1:]) == 1
    assert "methods claim to compute the dense function" in err
    assert "copy (" in err.splitlines()[-1]
    assert "drop .5 (" not in err


@pytest.fixture
def small(tmp_path):
    """Returns flags for two arms and one extension of the grid at most."""
    comparison = TINY["comparison"] | {"arms": ["dense", "exact"], "pairs": [["exact", "dense"]]}
    growth = TINY["growth"] | {"arms": ["E=2", "E=4", "E=8", "E=16"], "seeds": 2}
    arms = TINY["arms"] | {"virtual groups, exact": TINY["arms"]["exact"]}
    search = TINY["search"] | {"rates": [1e-2, 1e-1, 1.0]}
    path = write_design(tmp_path, comparison=comparison, growth=growth, arms=arms, search=search)
    return {"design": path, "runs_file": tmp_path / "runs.jsonl", "dense_dir": tmp_path / "dense"}


def test_experiment_trains_once_and_reports_again(run, small, tmp_path):
    code, out, _ = run("upcycling_experiment.py", **small, markdown=tmp_path / "one.md")
    assert code == 0
    assert "exact" in out
    text = (tmp_path / "one.md").read_text()
    assert "| exact | dense | " in text
    runs = small["runs_file"].read_text()
    code, *_ = run("upcycling_experiment.py", **small | {"dense_dir": "no"}, markdown=tmp_path / "two.md")
    assert code == 0
    assert (tmp_path / "two.md").read_text() == text
    assert small["runs_file"].read_text() == runs


def test_growth_writes_table_and_picture(run, small, tmp_path):
    flags = small | {"costs_file": tmp_path / "costs.jsonl"}
    code, out, _ = run("expert_growth.py", **flags, plot=tmp_path / "growth.png", markdown=tmp_path / "growth.md")
    assert code == 0
    assert "a + b ln E" in out
    assert "| E=16 | " in (tmp_path / "growth.md").read_text()
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_virtual_groups_are_watched(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(virtual_groups, "STEPS", (0, 1))
    code, out, _ = run("virtual_groups.py", **small, groups_file=tmp_path / "groups.jsonl")
    assert code == 0
    assert "100.0% (100.0% to 100.0%)" in out
    assert len((tmp_path / "groups.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("name", ["upcycling_experiment.py", "expert_growth.py", "virtual_groups.py"])
def test_experiments_refuse_in_one_line(run, tmp_path, name):
    code, _, err = run(name, design=tmp_path / "no.yaml")
    assert code == 2
    assert err.splitlines()[-1].startswith(f"{name}: design {tmp_path / 'no.yaml'} does not hold a design")
