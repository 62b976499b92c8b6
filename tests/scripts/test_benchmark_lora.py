"""These tests run scripts/benchmark.py --what lora at tiny sizes: results, and reports of a disagreement with PEFT."""

import json
import math

import pytest
import torch
from moe_benchmark import BenchmarkArguments, LoraRunner, lora
from moe_benchmark.cases import Case, lora_cases
from moe_benchmark.presets import PRESETS


TINY, TOKENS = PRESETS["tiny"], (1, 24, 128)
OTHERS = ["PEFT", "full", "full, grouped_mm", "attention", "attention, grouped_mm"]


@pytest.fixture
def script(benchmark, tmp_path):
    """Runs the script on the tiny model; returns exit code, standard output, standard error and results."""

    def run(*flags):
        path = tmp_path / "lora.json"
        flags = ["--what", "lora", "--presets", "tiny", "--rounds", "1", "--output", path, *flags]
        return *benchmark(*flags), json.loads(path.read_text())

    return run


def test_cases():
    cpu = lora_cases("cpu", [], [], [])
    assert [case.tokens for case in cpu] == [1, 1, 64, 64, 512, 512]
    assert {(case.preset, case.dtype) for case in cpu} == {("cpu_lora", "float32")}
    assert PRESETS["cpu_lora"].expert_elements == 3 * 256 * 256
    cuda = lora_cases("cuda", [], [], [])
    assert {case.tokens for case in cuda} == {32768, 4096}
    assert {(case.preset, case.dtype) for case in cuda} == {("qwen3_30b_a3b", "bfloat16")}
    assert lora.RANK["cuda"] == 16
    asked = BenchmarkArguments(what="lora", presets=["tiny", "olmoe"], dtypes=["float16"], tokens=[8]).cases()
    modes = ("forward", "forward_backward")
    assert asked == [
        Case("lora", preset, "float16", 8, "router", mode) for preset in ("tiny", "olmoe") for mode in modes
    ]


def test_table_and_json(script):
    code, printed, _, report = script("--tokens", *TOKENS)
    assert code == 0
    assert max(map(len, printed.splitlines())) <= 100
    results = report["results"]
    passes = [(result["case"]["tokens"], result["case"]["mode"]) for result in results]
    assert passes == [(count, mode) for count in TOKENS for mode in ("forward", "forward_backward")]
    for result in results:
        training = result["case"]["mode"] == "forward_backward"
        assert list(result["times"]) == ["moe", *OTHERS]
        assert list(result["ratios"]) == [f"ours/{name}" for name in OTHERS] + ["saved/PEFT"] * training
        assert set(result["saved_bytes"]) == ({"moe", *OTHERS} if training else set())
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in result["ratios"].values())
        assert result["errors"]["moe"]["largest"] < 1e-5
        assert result["backends"] == {"moe": "native"}
    # in each of the two layers, PEFT keeps a copy of all experts with the update added
    saved = [result["saved_bytes"] for result in results if result["saved_bytes"]]
    copies = 2 * 4 * TINY.experts * TINY.expert_elements
    assert saved[0]["moe"] < copies < saved[0]["PEFT"]
    assert all(each["moe"] < each["PEFT"] - copies for each in saved)
    rows = [line.split() for line in printed.splitlines() if line.startswith("tiny ")]
    assert [row[:3] for row in rows] == [["tiny", "fp32", str(count)] for _ in range(2) for count in TOKENS]
    assert [row[-2] == "-" for row in rows] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_sixteen_bits_are_compared_with_float32(dtype, script):
    code, _, _, report = script("--tokens", 256, "--dtypes", dtype)
    assert code == 0
    for result in report["results"]:
        assert 1e-5 < result["errors"]["moe"]["largest"] < {"bfloat16": 3e-2, "float16": 1e-2}[dtype]
        assert "PEFT" in result["times"]


def scaled(name, contestant, tokens, factor):
    """Returns a method of the passes that is slightly wrong for one contestant: in the logits or in a small gradient."""
    method = getattr(lora._Pass, name)

    def wrong(self):
        result = method(self)
        if self.name != contestant or self.ids.numel() != tokens:
            return result
        return factor * result if name == "forward" else (*result[:-2], factor * result[-2], result[-1])

    return wrong


@pytest.mark.parametrize(
    ("method", "factor", "error"),
    [
        ("forward", float("nan"), "nan"),
        ("forward_backward", 1.01, "1.0e-02"),
        ("forward_backward", float("nan"), "nan"),
    ],
)
def test_disagreement_is_recorded_and_the_run_goes_on(method, factor, error, script, monkeypatch):
    monkeypatch.setattr(lora._Pass, method, scaled(method, "moe", 24, factor))
    code, printed, _, report = script("--tokens", 24, 128)
    case = f"lora tiny float32 T=24 router {method}"
    assert code == 1
    assert report["failed"] == [case]
    for result in report["results"]:
        wrong = (result["case"]["tokens"], result["case"]["mode"]) == (24, method)
        assert ("moe" in result["times"]) == (not wrong)
        assert set(OTHERS) < {*result["times"], "moe"}
        assert wrong == ("moe" in result["failures"])
        if wrong:
            assert "disagrees with PEFT's own code in float32 in " in result["error"]
            assert f"by {error}" in result["error"]
            assert result["ratios"] == {}
    assert f"FAILED, {case}: moe: LoRA by moe" in " ".join(printed.split())


@pytest.mark.slow
def test_wrong_peft_is_left_out(script, monkeypatch):
    """The reference is PEFT in float32, so PEFT in bfloat16 may be wrong without failing our implementation."""
    forward = lora._Pass.forward

    def wrong(self):
        in_bfloat16 = self.name == "PEFT" and self.model.dtype == torch.bfloat16
        return (1.5 if in_bfloat16 else 1.0) * forward(self)

    monkeypatch.setattr(lora._Pass, "forward", wrong)
    code, _, _, report = script("--tokens", 24, "--dtypes", "bfloat16")
    assert code == 0
    first, second = report["results"]
    assert "disagrees with PEFT's own code" in first["skipped"]["PEFT"]
    assert "PEFT" not in first["times"]
    assert "ours/full" in first["ratios"]
    assert "ours/PEFT" not in first["ratios"]
    assert "ours/PEFT" in second["ratios"]


def test_the_check_uses_the_experts_of_the_reference():
    """If rounding changes the experts of a token, bfloat16 is compared with the experts that float32 chooses."""
    runner = LoraRunner(BenchmarkArguments(what="lora", rounds=1))
    case = Case("lora", "tiny", "bfloat16", 512, "router", "forward")
    runner._load(case)
    outcome, index = runner._reference(case)
    model, each = runner.models["moe"], runner.passes["moe"]
    with lora._routes(model) as chosen:
        free = each.outcome("forward")
    assert any((mine != theirs).any() for mine, theirs in zip(chosen, index, strict=True))
    with lora._routes(model, index) as chosen:
        fixed = each.outcome("forward")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(chosen, index, strict=True))
    free_error, fixed_error = (lora._differences(actual, outcome)["output"] for actual in (free, fixed))
    assert fixed_error < free_error
