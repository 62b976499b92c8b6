"""These tests run scripts/upcycling_table.py and scripts/upcycling_experiment.py."""

import json
from pathlib import Path

import pytest
from experiments import upcycling_initial_loss as initial_loss

from tests.builders import save_llama


ROOT = Path(__file__).parents[2]
SMALL = {
    "layers": 1,
    "facts": 4,
    "facts_per_row": 2,
    "fact_rows": 1,
    "prose_rows": 1,
    "prose_pool": 2,
    "held_out_rows": 2,
    "steps": 2,
    "sweep_steps": 1,
    "rates": [1e-3, 1e-2],
    "seeds": 2,
}


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


def test_experiment(run, dense, tmp_path):
    flags = SMALL | {"model_name_or_path": dense, "only": ["dense", "virtual groups, exact"]}
    code, out, _ = run("upcycling_experiment.py", **flags, output_json=tmp_path / "one.json")
    assert code == 0
    record = json.loads((tmp_path / "one.json").read_text())
    assert len(record["runs"]) == 4
    assert len(record["claims"]) == len(record["comparisons"]) == 3
    for claim in record["claims"]:
        assert claim in out
    assert "virtual groups, exact" in out
    code, *_ = run("upcycling_experiment.py", **flags, workers=2, output_json=tmp_path / "two.json")
    assert code == 0
    again = json.loads((tmp_path / "two.json").read_text())
    assert again["claims"] == record["claims"]


def test_experiment_refuses_in_one_line(run, dense):
    code, _, err = run("upcycling_experiment.py", model_name_or_path=dense, layers=2)
    assert code == 2
    assert err.splitlines()[-1].startswith("upcycling_experiment.py: layers is 2")
