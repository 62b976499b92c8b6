"""A case of scripts/benchmark.py that fails is recorded, the run continues, and the file keeps all earlier results."""

import json
from pathlib import Path

import pytest
import torch
from moe_benchmark import BenchmarkArguments, Report, Runner
from moe_benchmark.cases import Case
from moe_benchmark.results import Result
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


GROUPED_MM = ALL_EXPERTS_FUNCTIONS["grouped_mm"]


def scaled(factor):
    """Returns grouped_mm with a wrong scale."""
    return lambda *args: factor * GROUPED_MM(*args)


def detached(module, hidden_states, top_k_index, top_k_weights):
    """Returns right outputs without a gradient for the router."""
    return GROUPED_MM(module, hidden_states, top_k_index, top_k_weights.detach() + 0 * top_k_weights)


def broken(*args):
    """Raises an error."""
    raise ValueError("two words")


def only(tokens, function):
    """Returns `function` for calls with this number of tokens, and grouped_mm for other calls."""
    return lambda module, x, *rest: (function if len(x) == tokens else GROUPED_MM)(module, x, *rest)


@pytest.mark.parametrize(
    ("name", "function", "mode", "message"),
    [
        ("moe", scaled(1.001), "forward", "disagrees with the float64 oracle in output by 1.0e-03"),
        ("moe", scaled(float("nan")), "decode", "in output by nan"),
        ("other", scaled(1.001), "forward", "other in experts tiny"),
        ("moe", detached, "forward_backward", "in gradient of weight by 1.0e+00"),
        ("moe", broken, "forward", "two words"),
    ],
)
def test_failing_case_is_recorded_and_the_run_goes_on(
    name, function, mode, message, implementation, benchmark, tmp_path
):
    implementation(name, only(24, function))
    path = tmp_path / "result.json"
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 24, 40, "--modes", mode, "--rounds", 1]
    flags += ["--implementations", *dict.fromkeys(["moe", name]), "grouped_mm", "--output", path]
    code, printed, complaint = benchmark(*flags)
    assert code == 1
    report = json.loads(path.read_text())
    wrong, right = report["results"]
    assert report["failed"] == [f"experts tiny float32 T=24 balanced {mode}"]
    assert report["not_run"] == []
    assert set(wrong["failures"]) == {name}
    assert message in wrong["failures"][name]["message"]
    assert message in wrong["error"]
    for numbers in ("times", "errors", "saved_bytes", "median_ms"):
        assert name not in wrong[numbers]
    assert "grouped_mm" in wrong["times"]
    assert {"moe", name, "grouped_mm"} <= set(right["times"])
    assert right["failures"] == {}
    assert f"FAILED, experts tiny float32 T=24 balanced {mode}: {name}: " in " ".join(printed.split())
    assert [line.split()[1] for line in printed.splitlines() if line.startswith(name)].count("FAILED") == 1
    assert "Traceback" in complaint
    assert complaint.splitlines()[-1] == "benchmark.py: this package failed in 1 cases, listed last"


@pytest.mark.parametrize("calls", [1, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (2, 3))])
def test_failure_after_the_check_takes_the_times_out(calls, implementation, benchmark, tmp_path):
    """A case calls an implementation four times: to check, to warm up, to time, and to count saved bytes."""
    calls_made = []

    def function(*args):
        calls_made.append(args)
        return broken() if len(calls_made) > calls else GROUPED_MM(*args)

    implementation("moe", function)
    path = tmp_path / "result.json"
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 24, "--modes", "forward_backward", "--rounds", 1]
    code, *_ = benchmark(*flags, "--implementations", "moe", "grouped_mm", "--output", path)
    (result,) = json.loads(path.read_text())["results"]
    assert code == 1
    assert len(calls_made) == calls + 1
    assert result["failures"]["moe"]["message"] == "two words"
    assert "in broken" in result["failures"]["moe"]["traceback"]
    assert set(result["times"]) == {"grouped_mm", "copy", "dense"}
    assert set(result["saved_bytes"]) == {"grouped_mm"}


def test_file_is_whole_after_each_case(implementation, benchmark, tmp_path):
    path, found = tmp_path / "result.json", {}

    def function(module, x, *rest):
        if len(x) not in found:
            found[len(x)] = json.loads(path.read_text())
        if len(x) == 56:
            raise KeyboardInterrupt
        return GROUPED_MM(module, x, *rest)

    implementation("moe", function)
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 24, 40, 56, 72, "--modes", "forward"]
    code, printed, _ = benchmark(*flags, "--rounds", 1, "--implementations", "moe", "--output", path)
    assert code == 130
    report = json.loads(path.read_text())
    assert report["stopped"] == "it was interrupted"
    cases = [f"experts tiny float32 T={count} balanced forward" for count in (24, 40, 56, 72)]
    for done, content in enumerate([found[24], found[40], found[56]]):
        assert [result["case"]["tokens"] for result in content["results"]] == [24, 40][:done]
        assert content["not_run"] == cases[done:]
    assert report["results"] == found[56]["results"]
    assert report["not_run"] == cases[2:]
    assert f"not run, it was interrupted: {cases[3]}" in printed
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_file_outlives_a_failed_write(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    case = Case("experts", "tiny", "float32", 24, "balanced", "forward")
    report = Report({}, [case], path)
    before = path.read_text()
    monkeypatch.setattr(Path, "write_text", lambda self, text: exec("raise OSError('no space left')"))
    with pytest.raises(OSError, match="no space"):
        report.add(Result(case))
    assert path.read_text() == before


def test_lost_gpu_ends_the_run(implementation, monkeypatch):
    """After a CUDA error that persists, the rest of the case fails too, and no further case starts."""

    def lost(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def function(*args):
        runner.device = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        implementation("grouped_mm", lost)
        lost()

    runner = Runner(BenchmarkArguments(implementations=["moe", "batched_mm", "grouped_mm"], rounds=1))
    implementation("batched_mm", function)
    cases = [Case("experts", "tiny", "float32", count, "balanced", "forward") for count in (24, 40)]
    (result,) = runner.run(cases)
    assert set(result.failures) >= {"batched_mm", "grouped_mm"}
    assert runner.stopped == f"the GPU was lost in {cases[0]}: CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match=r"start another process.*illegal memory access"):
        runner.measure(cases[1])


@pytest.mark.slow
def test_wrong_foreign_implementation_is_left_out(implementation, benchmark, tmp_path):
    implementation("batched_mm", scaled(1.01))
    implementation("grouped_mm", broken)
    path = tmp_path / "result.json"
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 24, "--modes", "forward", "--rounds", 1]
    code, *_ = benchmark(*flags, "--implementations", "moe", "batched_mm", "grouped_mm", "--output", path)
    (result,) = json.loads(path.read_text())["results"]
    assert code == 0
    assert set(result["times"]) == {"moe", "copy", "dense"}
    assert "disagrees" in result["skipped"]["batched_mm"]
    assert result["skipped"]["grouped_mm"] == "two words"
    assert "ours/transformers" not in result["ratios"]
