"""These tests run scripts/benchmark.py --device cuda on a simulated GPU: order of the cases, results and tables."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from moe_benchmark import Report, contestants, facts, lora
from moe_benchmark.cases import Case, default_cases
from moe_benchmark.contestants import pin_liger
from moe_benchmark.measure import Contestant, Failure, interleave
from moe_benchmark.presets import PRESETS
from moe_benchmark.results import Result
from moe_benchmark.roofline import PEAKS, floor_ms, weight_bytes
from moe_benchmark.routing import ROUTINGS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests.benchmark.fake_cuda import faked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which gpu_check.sh measures")
@pytest.mark.parametrize("captures", [True, False])
def test_decoding_on_a_gpu(captures, benchmark, tmp_path, monkeypatch):
    """On a simulated GPU with interpreted kernels, our implementation fails if a CUDA graph cannot capture it."""
    path = tmp_path / "result.json"
    flags = ["--device", "cuda", "--presets", "tiny", "--tokens", 2, "--dtypes", "float16", "--case_s", 0.01]
    with faked():
        if not captures:
            monkeypatch.setattr(torch.cuda, "graph", lambda graph: int("two words"))
        code, printed, _ = benchmark(*flags, "--implementations", "moe", "grouped_mm", "--output", path)
    (result,) = json.loads(path.read_text())["results"]
    assert code == (0 if captures else 1)
    assert result["backends"] == {"moe": "triton (decode)"}
    assert result["tiles"] == "hopper"
    assert result["peak_bytes"] == {"moe": 1000, "grouped_mm": 1000}
    assert min(map(len, result["times"].values())) >= 3
    assert {"moe", "grouped_mm"} < set(result["times"])
    assert ("moe (graph)" in result["times"]) == ("grouped_mm (graph)" in result["times"]) == captures
    assert set(result["failures"]) == (set() if captures else {"moe (graph)"})
    assert captures or result["skipped"] == {"grouped_mm (graph)": result["failures"]["moe (graph)"]["message"]}
    assert "triton (decode), hopper tiles" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_liger_is_pinned_where_it_is_imported(monkeypatch):
    monkeypatch.delenv("LIGER_FUSED_MOE_AUTOTUNE", raising=False)
    seen = []
    monkeypatch.setattr(
        contestants.importlib,
        "import_module",
        lambda name: seen.append((name, os.environ["LIGER_FUSED_MOE_AUTOTUNE"])) or exec("raise ImportError"),
    )
    assert "LIGER_FUSED_MOE_AUTOTUNE" not in os.environ
    with pytest.raises(ImportError):
        ALL_EXPERTS_FUNCTIONS["liger"](None, None, None, None)
    assert seen == [("liger_kernel.ops", "0")]
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "1")
    assert pin_liger() == "LIGER_FUSED_MOE_AUTOTUNE=1"


def test_facts_of_a_gpu(monkeypatch):
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    liger = SimpleNamespace(name="liger_kernel", version="0.8.5")
    monkeypatch.setattr(facts, "distributions", lambda: [liger])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=140 * 2**30))
    found = facts.machine_facts("cuda")
    assert found["liger_kernel"] == "0.8.5 with LIGER_FUSED_MOE_AUTOTUNE=0"
    assert found["stated_peak"] == "989 TFLOP/s, 4.8 TB/s"
    assert found["gpu_gib"] == 140


def test_no_warm_up_is_measured_on_a_gpu():
    """The first of four calls is a warm-up that is left out, however long it takes, and three calls are measured."""

    class SlowClock:
        device = torch.device("cuda")
        milliseconds = iter([1000.0, 1.0, 2.0, 3.0])

        def time(self, run):
            return next(self.milliseconds)

    times, failed = interleave([Contestant("a", lambda: None)], SlowClock(), rounds=None, seconds=0, cold=False)
    assert times == {"a": [1.0, 2.0, 3.0]}
    assert failed == {}


def test_floors_are_those_of_the_table():
    """The floors were computed by hand from the stated peak and bandwidth of an H100: Qwen3-30B-A3B at 32k tokens."""
    preset, peak = PRESETS["qwen3_30b_a3b"], PEAKS["H100"]
    forward = floor_ms(preset, 32768, 128, "forward", 2, peak)
    assert forward["compute"] == pytest.approx(2.50, abs=0.01)
    assert forward["memory"] == pytest.approx(1.84, abs=0.01)
    assert forward["floor"] == forward["compute"]
    training = floor_ms(preset, 32768, 128, "forward_backward", 2, peak)
    assert training["compute"] == pytest.approx(2.50 + 5.00, abs=0.02)
    assert training["memory"] == pytest.approx(1.84 + 3.57, abs=0.02)
    assert weight_bytes(preset, 8, "decode", 2) / 3.35e12 == pytest.approx(22.5e-6, abs=1e-7)
    assert weight_bytes(preset, 128, "forward_backward", 2) == 3 * 6 * 128 * 2048 * 768


def gpu_result(mode, tokens):
    """Returns the result of a case on a GPU in which all texts have their largest width."""
    case = Case("experts", "deepseek_v2_lite", "bfloat16", tokens, "all_to_one", mode)
    names = ["moe", "moe_recompute", "eager", "grouped_mm", "batched_mm", "liger"]
    graphs = [f"{name} (graph)" for name in ("moe", "grouped_mm", "batched_mm")] if mode == "decode" else []
    times = {name: [1234.5 + place] for place, name in enumerate(names + graphs)} | {"copy": [0.16], "dense": [999.5]}
    floors = floor_ms(PRESETS[case.preset], tokens, 8, mode, 2, PEAKS["H100"])
    memory = {name: 2**37 + place for place, name in enumerate(names)}
    backends = {"moe": "triton (decode)" if mode == "decode" else "triton"}
    return Result(
        case, times, {"sonicmoe": "needs CUDA"}, {}, backends, "hopper", saved_bytes=memory, peak_bytes=memory,
        weight_bytes=100, copied_bytes=800, floors_ms=floors,
    )  # fmt: skip


def test_report_of_a_gpu(capsys, monkeypatch):
    case = Case("experts", "qwen3_30b_a3b", "bfloat16", 1, "balanced", "decode")
    times = {"moe": [0.4], "grouped_mm": [0.8], "moe (graph)": [0.1], "grouped_mm (graph)": [0.3], "copy": [0.16]}
    floors = floor_ms(PRESETS[case.preset], 1, 8, "decode", 2, PEAKS["H100"])
    result = Result(
        case, times, {"liger": "out of memory"}, {}, {"moe": "triton (decode)"}, "hopper", floors_ms=floors
    )
    result.peak_bytes = {"moe": 2**30, "grouped_mm": 2**31}
    result.weight_bytes, result.copied_bytes = 100, 800
    assert result.ratios() == pytest.approx(
        {
            "ours/transformers": 0.5,
            "ours/transformers (graph)": 1 / 3,
            "ours/limit": 20.0,
            "ours/limit (graph)": 5.0,
            "ours/roofline": 0.1 / floors["floor"],
            "peak/grouped_mm": 0.5,
        }
    )
    monkeypatch.delenv("COLUMNS", raising=False)
    report = Report({"gpu": "NVIDIA H100"}, [case, case])
    report.add(result)
    report.stopped = "the budget of 450 s was spent"
    report.print()
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert f"{case}: triton (decode), hopper tiles, 1 rounds" in printed
    assert ["moe", "0.4", "1.00", "20.00", f"{0.4 / floors['floor']:.2f}", "1"] in lines
    assert ["moe", "(graph)", "0.1", "1.00", "5.00", f"{0.1 / floors['floor']:.2f}", "-"] in lines
    assert ["grouped_mm", "(graph)", "0.3", "0.33", "15.00", f"{0.3 / floors['floor']:.2f}", "-"] in lines
    roofline = f"{0.1 / floors['floor']:.2f}"
    assert ["qwen3_30b_a3b", "bf16", "1", "balanced", "moe", "(graph)", "0.1", "0.33", "5.00", roofline, "-"] in lines
    assert "not measured, liger: out of memory" in printed
    assert "not run, the budget of 450 s was spent: experts qwen3_30b_a3b" in printed


def test_report_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    results = [
        gpu_result(mode, tokens) for mode, tokens in (("forward_backward", 32768), ("forward", 4096), ("decode", 16))
    ]
    failed = gpu_result("decode", 1)
    failed.drop("moe", Failure("an illegal memory access was encountered " * 5, "", False))
    results.append(failed)
    for mode in ("forward", "forward_backward"):
        case = Case("lora", "deepseek_v2_lite", "bfloat16", 32768, "router", mode)
        numbers = dict.fromkeys(lora.CONTESTANTS, 2**37)
        results.append(
            Result(case, {name: [1234.5] for name in lora.CONTESTANTS}, saved_bytes=numbers, peak_bytes=numbers)
        )
    report = Report({"cpu": "a processor with a long name " * 5}, [result.case for result in results])
    report.results = results
    report.print()
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 100
    # each case and contestant has one line, which is not broken
    for result in results:
        for name in {*result.times, *result.failures} - {"copy"}:
            assert any(line.startswith(f"{name} ") and len(line.split()) > 2 for line in printed.splitlines())
    lines = [line for line in printed.splitlines() if line.startswith("deepseek_v2_lite ")]
    assert len(lines) == 4 + 2 + 2
    assert [line.split()[4:6] for line in lines if "FAILED" in line] == [["moe", "FAILED"]]


def test_gpu_measures_first_what_matters():
    cuda = default_cases("cuda", "experts")
    assert len(cuda) == len(set(cuda))
    assert {case.tokens for case in cuda} == {1, 16, 128, 1024, 4096, 32768}
    assert {case.routing for case in cuda} == set(ROUTINGS)
    first = [(32768, "forward_backward"), (32768, "forward"), (4096, "forward_backward"), (4096, "forward")]
    first += [(1, "decode"), (16, "decode")]
    presets = [
        "qwen3_30b_a3b",
        "mixtral_8x7b",
        "gpt_oss_20b",
        "olmoe",
        "deepseek_v3",
        "qwen3_next",
        "deepseek_v2_lite",
    ]
    # all presets come before uneven routing and before small numbers of tokens
    expected = [Case("experts", preset, "bfloat16", *size) for preset in presets for size in _balanced(first)]
    assert cuda[: len(expected)] == expected
    assert [case.routing for case in cuda[len(expected) :]] == ["zipf"] * 4 + ["all_to_one"] * 4 + ["balanced"] * 28
    assert {case.tokens for case in cuda[-28:]} == {1024, 128}


def _balanced(sizes):
    return [(tokens, "balanced", mode) for tokens, mode in sizes]
