"""These tests run scripts/benchmark.py --what watching at a tiny size: results, and the report of a changed loss."""

import json
import math

import pytest
from moe_benchmark import BenchmarkArguments, WatchingRunner, watching
from moe_benchmark.cases import watching_cases

from modeling_moe.utils.errors import UserError


NAMES = ["not logged", "moe", "Mixtral, not logged", "Mixtral"]


def test_cases():
    cpu = watching_cases("cpu", [], [], [])
    assert {(case.preset, case.tokens) for case in cpu} == {
        (preset, tokens) for preset in ("cpu_demo", "cpu_fine") for tokens in (512, 2048)
    }
    assert {(case.preset, case.dtype) for case in watching_cases("cuda", [], [], [])} == {("olmoe", "bfloat16")}
    asked = BenchmarkArguments(what="watching", presets=["tiny"], dtypes=["float32"], tokens=[24]).cases()
    assert [str(case) for case in asked] == ["watching tiny float32 T=24 router forward_backward"]


def test_table_and_json(benchmark, tmp_path):
    path = tmp_path / "watching.json"
    flags = ("--what", "watching", "--presets", "tiny", "--tokens", 24, "--rounds", "2", "--output", path)
    code, printed, _ = benchmark(*flags)
    assert code == 0
    assert "logged, over not logged" in printed
    (result,) = json.loads(path.read_text())["results"]
    assert list(result["times"]) == NAMES
    assert list(result["ratios"]) == ["logged/not logged", "logged/Mixtral, not logged"]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in result["ratios"].values())


def test_a_loss_that_logging_changes_fails(monkeypatch):
    run = watching._Training.run
    changed = lambda training: run(training) + (training.session is not None)  # noqa: E731
    monkeypatch.setattr(watching._Training, "run", changed)
    args = BenchmarkArguments(what="watching", presets=["tiny"], tokens=[24], rounds=1)
    result = WatchingRunner(args).measure(args.cases()[0])
    assert set(result.failures) == {"moe", "Mixtral"}


def test_a_preset_without_a_router_is_refused():
    with pytest.raises(UserError, match="gpt_oss_20b has only experts"):
        BenchmarkArguments(what="watching", presets=["gpt_oss_20b"])
