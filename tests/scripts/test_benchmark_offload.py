"""These tests run scripts/benchmark.py --what offload at a tiny size: results, a model that differs, and misuse."""

import json
import math

import pytest
from moe_benchmark import BenchmarkArguments, OffloadRunner, offload
from moe_benchmark.contestants import ACCELERATE, ALL_SLOTS, QUARTER, WHOLE

from modeling_moe.utils.errors import UserError


def test_table_and_json(benchmark, tmp_path):
    path = tmp_path / "offload.json"
    flags = ("--what", "offload", "--presets", "tiny", "--dtypes", "float32", "--rounds", "2", "--output", path)
    code, printed, errors = benchmark(*flags)
    assert code == 0, errors
    assert "the experts on disk" in printed
    (result,) = json.loads(path.read_text())["results"]
    assert list(result["times"]) == [WHOLE, ALL_SLOTS, QUARTER, ACCELERATE]
    assert list(result["ratios"]) == ["slots for all/whole", "quarter/whole", "Accelerate/quarter"]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in result["ratios"].values())
    assert result["loads"]["Zipf"] >= 1


def test_a_model_that_computes_something_else_fails(monkeypatch):
    def changed(self, root, slots):
        model = load(self, root, slots)
        model.lm_head.weight.data[0] += 1
        return model

    load = OffloadRunner._slots
    monkeypatch.setattr(OffloadRunner, "_slots", changed)
    args = BenchmarkArguments(what="offload", presets=["tiny"], dtypes=["float32"], rounds=1)
    result = OffloadRunner(args).measure(args.cases()[0])
    assert set(result.failures) == {ALL_SLOTS, QUARTER}
    assert set(result.times) == {WHOLE, ACCELERATE}


def test_pages_leave_the_cache_and_misuse_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 4096)
    offload.drop_pages(tmp_path)
    assert (tmp_path / "file").read_bytes() == b"x" * 4096
    with pytest.raises(UserError, match="decodes one text on the CPU"):
        BenchmarkArguments(what="offload", tokens=[4])
