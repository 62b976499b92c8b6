"""These tests run scripts/gpu_check.sh and its parts on a fake GPU, and check the lines and that no failure is lost."""

import json
import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import triton
from moe_benchmark import lora as benchmark_lora
from moe_benchmark.gpu import (
    capturing,
    comparison,
    compilations,
    correctness,
    environment,
    kernels,
    lora,
    memory,
    sweep,
    tile_table,
)
from moe_benchmark.gpu.results import DeviceLost, Results, read
from moe_benchmark.gpu.sizes import TINY, Comparison
from moe_benchmark.gpu.timing import launch_times

from modeling_moe.dispatch import interface
from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.dispatch.backends.triton import launching, row_tiles
from modeling_moe.dispatch.backends.triton.backend import INTERPRETED, TritonBackend
from modeling_moe.dispatch.backends.triton.tiles import CONFIGS
from modeling_moe.dispatch.problem import Combined
from modeling_moe.utils.errors import UserError
from tests.benchmark.fake_cuda import faked


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton does not interpret its kernels here")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results.jsonl", "part")


@pytest.fixture
def gpu():
    """Fakes a GPU for one test."""
    with faked():
        yield


@pytest.fixture
def run_part(results, gpu):
    """Runs a part at the tiny size, some fields of which may be replaced, and returns the lines."""

    def run(module, **changes):
        results.part = module.__name__.rsplit(".", 1)[1]
        module.run(results, TINY._replace(**changes))
        return [row for row in read(results.path) if row["part"] == results.part]

    return run


def errors(rows):
    return [row["error"] for row in rows if "error" in row]


# ---- each part once; those that interpret many kernels are slow


def test_environment(run_part):
    rows = run_part(environment)
    assert not errors(rows)
    assert rows[0]["torch"] == torch.__version__
    found = {key: value for row in rows for key, value in row.items()}
    assert (found["gpu"], found["capability"], found["stated_tflops"]) == ("NVIDIA H200", [9, 0], 989.0)
    assert found["copy_tbs"] > 0
    assert {row["product"] for row in rows if row.get("tflops", 0) > 0} == {"bfloat16", "float32", "tf32"}


def test_what_is_missing_is_named(run_part, monkeypatch):
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    assert {"missing": "gguf", "left_out": "the part science"}.items() <= next(
        row for row in run_part(environment) if row.get("missing") == "gguf"
    ).items()


@pytest.mark.slow
def test_correctness(run_part):
    rows = run_part(correctness)
    assert not errors(rows)
    passed = [row["check"] for row in rows if row.get("passed")]
    for name in ("moe", "moe_grouped_mm", "grouped_mm"):
        assert f"gradients in float32, {name}" in passed
        assert f"gradients in float16, {name}" in passed
    assert {
        "the back end is triton",
        "the back end is triton (decode)",
        "no synchronisation: experts, forward and backward",
        "no synchronisation: experts, decoding",
        "no synchronisation: block with its router, forward and backward",
        "training step of a block in a CUDA graph",
        "training step of a model in a CUDA graph",
        "torch.compile, fullgraph",
        "generated tokens equal those of eager",
        "LoRA equals PEFT's own code",
        "nothing is compiled after the first steps",
        "experts in 4 bits",
    } <= set(passed)


@pytest.mark.slow
def test_comparison(run_part):
    rows = run_part(comparison)
    assert not errors(rows)
    training, decoding = rows
    assert {"moe", "moe_recompute", "grouped_mm", "dense"} <= set(training["ms"])
    assert training["backends"]["moe"] == "triton"
    assert training["disagreement"]["moe"]["gradient of down_proj"] < 1e-4
    assert 0 < training["ratios"]["saved/grouped_mm"] < 1
    assert {"moe (graph)", "grouped_mm (graph)"} <= set(decoding["ms"])
    assert decoding["backends"]["moe"] == "triton (decode)"
    assert decoding["limit_ms"] > 0


@pytest.mark.slow
def test_kernels(run_part):
    rows = run_part(kernels)
    assert not errors(rows)
    names = [row["kernel"] for row in rows if row.get("scenario") == "train" and "kernel" in row]
    assert names.index("project_up") < names.index("multiply") < names.index("gate_backward")
    assert names.count("weight_gradient") == 2
    assert {"decode_up", "decode_down"} <= {row.get("kernel") for row in rows}
    whole = [row for row in rows if "whole_ms" in row]
    assert [row["scenario"] for row in whole] == ["train", "lora", "decode"]
    # six products of an assignment with an expert's matrices of 3 H I elements, forward and backward
    train = whole[0]
    assert train["tflops"] * train["whole_ms"] * 1e9 == pytest.approx(6 * 27 * 3 * 32 * 24, rel=1e-6)


@pytest.mark.slow
def test_sweep(run_part):
    rows = run_part(sweep)
    assert not errors(rows)
    groups = tile_table.fields_swept(rows)
    fields = [(scenario, field) for *_, scenario, field in groups]
    assert fields == [
        *(("train", field) for field in ("persistent", "gradient", "down", "gate", "up")),
        ("lora", "narrow"),
        *(("decode", field) for field in ("up", "down", "num_warps")),
    ]
    for lines in groups.values():
        assert [row["current"] for row in lines] == [True, False]
        assert lines[0]["value"] != lines[1]["value"]
        assert all(row["ms"] == sum(row["each_ms"]) > 0 for row in lines)
    assert len({row["block_m"] for row in rows if "both_ms" in row}) == 2
    family, numbers, table = tile_table.propose(rows)
    assert (family, numbers) == ("hopper", "float32")
    assert [most for most, _ in table[:-2]] == [most for most, _ in CONFIGS[family][numbers][:-2]]


@pytest.mark.slow
def test_lora(run_part, monkeypatch):
    chosen = {name: benchmark_lora.CONTESTANTS[name] for name in (benchmark_lora.OURS, benchmark_lora.PEFT)}
    monkeypatch.setattr(benchmark_lora, "CONTESTANTS", chosen)
    rows = run_part(lora)
    assert not errors(rows)
    assert [row["scenario"] for row in rows[:2]] == ["lora", "train"]
    assert rows[2]["lora_over_full"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    assert set(rows[3]["ms"]) == {"moe", "PEFT"}


def test_memory(run_part):
    rows = {row["implementation"]: row for row in run_part(memory)}
    assert not errors(rows.values())
    assert rows["moe_recompute"]["saved_bytes"] < rows["moe"]["saved_bytes"] < rows["grouped_mm"]["saved_bytes"]
    assert rows["moe"]["gradient_bytes"] == 4 * 5 * 3 * 32 * 24
    assert rows["liger"]["skipped"]


PRECOMPILE = """
import sys
from moe_benchmark.gpu import precompile
from moe_benchmark.gpu.results import Results
from moe_benchmark.gpu.sizes import TINY
calls, record = precompile.calls, precompile.record
precompile.describe_gpu = lambda: "sm_90"
precompile.calls = lambda size: [call for call in calls(size) if call.name == "tiny" and call.scenario == "decode"]
def spoilt(*arguments):
    launches = record(*arguments)
    return [launches[0], launches[1]._replace(options=launches[1].options | {"num_warps": 3})]
precompile.record = spoilt
results = Results(sys.argv[1], "precompile")
precompile.run(results, TINY._replace(swept=(), crossover=()))
results.put(entered_cuda=__import__("torch").cuda.is_initialized())
"""


def test_precompilation_for_a_gpu_that_is_not_here(tmp_path):
    path, cache = tmp_path / "results.jsonl", tmp_path / "cache"
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PRECOMPILE, path]
    subprocess.run(command, cwd=ROOT, env=environ | {"TRITON_CACHE_DIR": str(cache)}, check=True)
    first, *failed, last, after = read(path)
    assert first["target"] == "sm_90"
    assert last["compiled"] == first["kernels"] == 2
    assert [row["kernel"] for row in failed] == ["decode_down"]
    assert "power of 2" in failed[0]["error"]
    assert {file.suffix for file in cache.rglob("decode_up*")} >= {".cubin", ".json"}
    assert after["entered_cuda"] is False


def test_tests_are_recorded_one_by_one(tmp_path):
    path, files = tmp_path / "results.jsonl", tmp_path / "some"
    files.mkdir()
    (files / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 + 1 == 3\n"
        "def test_left_out(): pytest.skip('no reason')\n"
    )
    (files / "test_without.py").write_text("raise ModuleNotFoundError(\"No module named 'bitsandbytes'\")\n")
    (files / "test_broken.py").write_text("import nothing_of_that_name\n")
    code = (
        "import sys; from moe_benchmark.gpu import kernel_tests; from moe_benchmark.gpu.results import "
        "Results; from moe_benchmark.gpu.sizes import TINY; "
        f"kernel_tests.run(Results({str(path)!r}, 'tests'), TINY._replace(tests=('-q', {str(files)!r})))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    rows = read(path)
    (without,) = (row for row in rows if "skipped" in row)
    assert (without["check"], without["skipped"]) == ("tests of test_without.py", "bitsandbytes is not installed")
    failed = {row["test"].rsplit("/", 1)[-1]: row["error"] for row in rows if "test" in row}
    assert set(failed) == {"test_broken.py", "test_some.py::test_bad"}
    assert "nothing_of_that_name" in failed["test_broken.py"]
    assert "1 + 1" in failed["test_some.py::test_bad"]
    assert rows[-1]["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert rows[-1]["reasons_to_skip"] == {"no reason": 1}
    assert rows[-1]["error"]


# ---- what fails is recorded, and the rest goes on


@pytest.mark.slow
def test_a_failing_case(run_part, monkeypatch):
    def decode(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(TritonBackend, "decode", decode)
    training, decoding = run_part(comparison)
    assert training["ms"]["moe"] > 0
    assert "out of resource" in decoding["error"]
    assert "moe" not in decoding["ms"]
    assert decoding["ms"]["grouped_mm"] > 0


def test_a_wrong_result(run_part, monkeypatch):
    forward = TritonBackend.forward

    def wrong(*arguments, **options):
        output, h = forward(*arguments, **options)
        return Combined(output * 1.05, h)

    monkeypatch.setattr(TritonBackend, "forward", wrong)
    rows = run_part(comparison, comparison=TINY.comparison[:1])
    assert "disagrees" in errors(rows)[0]
    assert "moe" not in rows[0]["ms"]
    monkeypatch.setattr(correctness, "CHECKS", (correctness.gradients_in_float32, correctness.gradients_in_16_bits))
    found = {row["check"]: row.get("passed") for row in run_part(correctness) if "check" in row}
    assert [name for name, passed in found.items() if not passed] == [
        "gradients in float32, moe",
        "gradients in float16, moe",
    ]


def test_another_back_end_is_noticed(run_part, monkeypatch):
    monkeypatch.setattr(interface, "choose", lambda *_: BACKENDS["loop"])
    monkeypatch.setattr(correctness, "CHECKS", (correctness.back_end,))
    rows = run_part(correctness)
    assert len(errors(rows)) == len(rows) == 6


def test_a_synchronisation_is_noticed(run_part, monkeypatch):
    precision_of = row_tiles.precision_of

    def waits(dtype):
        torch.ones(1, device="cuda").item()
        return precision_of(dtype)

    monkeypatch.setattr(row_tiles, "precision_of", waits)
    monkeypatch.setattr(correctness, "CHECKS", (correctness.no_synchronisation,))
    rows = run_part(correctness)
    failed = [row["check"] for row in rows if "error" in row]
    assert failed == [
        f"no synchronisation: {name}, forward and backward" for name in ("experts", "block with its router")
    ]
    assert all("synchronizing" in error for error in errors(rows))
    assert [row["check"] for row in rows if row.get("passed")] == ["no synchronisation: experts, decoding"]


@pytest.mark.slow
def test_a_graph_that_does_something_else_is_noticed(run_part, monkeypatch):
    monkeypatch.setattr(capturing, "capture", lambda call: lambda: None)
    monkeypatch.setattr(correctness, "CHECKS", (capturing.training_step_in_a_graph,))
    block, model = run_part(correctness)
    assert "experts.down_proj" in block["different"]
    assert not block["passed"]
    assert not model["passed"]


@pytest.mark.slow
def test_a_compilation_in_a_later_step_is_noticed(run_part, monkeypatch):
    run, seen = launching.Launch.run, set()

    def compile_and_run(launch):
        key = (launch.name, launch.grid)
        if key not in seen:
            seen.add(key)
            triton.knobs.runtime.jit_post_compile_hook(fn=types.SimpleNamespace(name=launch.name))
        run(launch)

    monkeypatch.setattr(launching.Launch, "run", compile_and_run)
    monkeypatch.setattr(correctness, "CHECKS", (correctness.no_compilation_later,))
    (row,) = run_part(correctness)
    assert "project_up" in row["later"]
    assert row["error"]
    assert triton.knobs.runtime.jit_post_compile_hook is None


def test_compiled_and_loaded_kernels_are_counted():
    with compilations.cache_use() as counts:
        for hit in (True, True, False):
            triton.knobs.compilation.listener(cache_hit=hit, src=None, metadata=None, metadata_group=None, times=None)
    assert counts == {"loaded": 2, "compiled": 1}
    assert triton.knobs.compilation.listener is None


@pytest.mark.slow
def test_a_tile_for_which_there_is_no_room(run_part, monkeypatch):
    run = sweep.passes.run

    def refuse(problem, config=None):
        if config is not None and config.gradient.BLOCK_N == 256:
            raise RuntimeError("out of resource: shared memory, Required: 294912, Hardware limit: 232448")
        return run(problem, config)

    monkeypatch.setattr(sweep.passes, "run", refuse)
    rows = run_part(sweep, crossover=(), swept=TINY.swept[:1])
    (refused,) = (row for row in rows if "refused" in row)
    assert refused["value"][:5] == [64, 256, 16, 4, 3]
    assert not errors(rows)
    assert rows[-1]["field"] == "up"


def test_what_there_is_no_time_for(tmp_path, gpu):
    results = Results(tmp_path / "results.jsonl", "part", until=0)
    for module in (correctness, comparison, kernels, sweep, lora, memory):
        module.run(results, TINY)
    rows = read(results.path)
    assert not errors(rows)
    assert {row["not_run"] for row in rows if isinstance(row.get("not_run"), str)} >= {"generation", "back end"}
    assert not any("ms" in row or "check" in row for row in rows)


def test_a_lost_gpu_ends_the_part(results):
    def lose():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLost, match="illegal memory access"), results.attempt(case=1):
        lose()
    with results.attempt(case=2):
        raise RuntimeError("anything else")
    assert [row["case"] for row in read(results.path)] == [1, 2]
    assert "RuntimeError: anything else" in errors(read(results.path))[1]


@pytest.mark.slow
def test_a_lost_gpu_ends_the_comparison(run_part, monkeypatch):
    def decode(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize(*_):
        if TritonBackend.decode is decode:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    first, second = Comparison("tiny", 2, "decode", dtype="float32"), Comparison("tiny", 9, "forward", dtype="float32")
    monkeypatch.setattr(TritonBackend, "decode", decode)
    with pytest.raises(DeviceLost):
        run_part(comparison, comparison=(first, second))


def test_numbers_that_json_has_not(results):
    results.put(loss=float("nan"), worst=float("inf"), shape=(2, 3), dtype=torch.float32)
    assert json.loads(results.path.read_text(), parse_constant=pytest.fail)["loss"] == "nan"
    (row,) = read(results.path)
    assert (row["worst"], row["shape"], row["dtype"]) == ("inf", [2, 3], "torch.float32")


def test_results_that_are_none(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(UserError, match="run `bash scripts/gpu_check"):
        read(path)
    path.write_text('{"part": "a"}\n{"pa')
    with pytest.raises(UserError, match="line 2"):
        read(path)


def test_launches_that_differ_from_call_to_call(gpu, monkeypatch):
    calls = []

    def call():
        calls.append(1)
        for _ in range(len(calls) % 2 + 1):
            launching.launch(None, (1,), {})

    monkeypatch.setattr(launching.Launch, "run", lambda launch: None)
    with pytest.raises(RuntimeError, match="3 equal calls made 4 launches"):
        launch_times(call, 3)


# ---- the shell script

STUB = """#!/usr/bin/env bash
# a python3 in which the parts do what the test requests, and everything else is real
case "$3" in
    sweep) exec sleep 60 ;;
    kernels) kill -9 $$ ;;
    lora) echo '{"part": "lora", "at_s": 1.0, "ms": 2.5}' >>"$5/results.jsonl"; exit 0 ;;
    memory) exit 3 ;;
esac
exec PYTHON -m tests.benchmark.fake_cuda "$@"
"""


@pytest.fixture
def shell(tmp_path):
    """Runs scripts/gpu_check.sh with a fake GPU, and returns exit code, output and lines."""
    stub = tmp_path / "bin" / "python3"
    stub.parent.mkdir()
    stub.write_text(STUB.replace("PYTHON", sys.executable))
    stub.chmod(0o755)

    def run(*flags, script=None):
        if script is not None:
            stub.write_text(script)
        environ = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
        command = ["bash", ROOT / "scripts" / "gpu_check.sh", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        path = tmp_path / "out" / "results.jsonl"
        return done.returncode, done.stdout or done.stderr, read(path) if path.exists() else []

    return run


def test_parts_that_hang_or_die_leave_the_others_alone(shell, tmp_path):
    # a repeated part replaces its own lines and no others
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text(
        '{"part": "memory", "old": 1}\n{"part": "environment", "old": 1}\n'
    )
    parts = ["--part", "sweep", "--part", "kernels", "--part", "memory", "--part", "lora"]
    code, printed, rows = shell("--limit", "2", *parts)
    assert code == 1
    assert "old" in rows[0]
    assert len(rows) == 5
    found = {row["part"]: row.get("error") for row in rows}
    assert found == {
        "environment": None,
        "sweep": "over its limit of 2 s",
        "kernels": "killed by signal 9",
        "memory": "ended with code 3 before its end",
        "lora": None,
    }
    table = printed[printed.index("FAILED sweep") :].splitlines()
    assert all(len(line) <= 100 for line in table)
    assert any("GPU check" in line for line in table)
    assert table[-1].startswith("└")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["log.txt", "results.jsonl"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--part", "nothing"], "unknown part nothing"),
        (["--part"], "--part needs a value"),
        (["--limit", "soon"], "--limit soon is not a number"),
        (["--size", "huge"], "unknown size huge"),
        (["all"], "unknown argument all"),
    ],
)
def test_mistakes_are_answered_in_one_line(shell, flags, complaint):
    code, printed, rows = shell(*flags)
    assert code == 2
    assert complaint in printed
    assert len(printed.splitlines()) == 1
    assert not rows


def test_the_limits_leave_time(shell):
    code, printed, _ = shell("--help")
    assert code == 0
    limits = [int(line.split()[1]) for line in printed.splitlines() if line.split()[2:3] == ["s"]]
    assert len(limits) == 9
    assert sum(limits) < 480
    text = (ROOT / "scripts" / "gpu_check.sh").read_text()
    for line in printed.splitlines():
        name, *rest = line.split() or [""]
        if rest[1:2] == ["s"]:
            assert f"[{name}]={rest[0]}" in text


# ---- all of it, and the page on it


def test_report_script(run_part, results, monkeypatch, tmp_path, capsys):
    run_part(kernels, kernels=TINY.kernels[2:])
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(results.path), "--output", str(page)])
    runpy.run_path(str(ROOT / "scripts" / "gpu_report.py"), run_name="__main__")
    assert "forward, 32,768 tokens: at most 5 ms: -: not measured" in capsys.readouterr().out
    assert "| tiny | 2 | float32 | decode |" in page.read_text()


def test_report_script_without_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys, "argv", ["gpu_report.py", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "page.md")]
    )
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "gpu_report.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "run `bash scripts/gpu_check.sh` first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_of_it(shell, tmp_path, monkeypatch):
    """The whole check runs on a fake GPU in minutes, and its page is written."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    script = f'#!/usr/bin/env bash\nexec {sys.executable} -m tests.benchmark.fake_cuda "$@"\n'
    code, printed, rows = shell("--size", "tiny", "--limit", "900", script=script)
    assert not errors(rows), printed
    assert code == 0
    ended = [row["part"] for row in rows if row.get("ended")]
    assert ended == [
        "environment",
        "precompile",
        "tests",
        "correctness",
        "comparison",
        "kernels",
        "sweep",
        "lora",
        "memory",
    ]
    page = tmp_path / "speed.md"
    results = tmp_path / "out" / "results.jsonl"
    command = [sys.executable, ROOT / "scripts" / "gpu_report.py", results, "--output", page]
    subprocess.run(command, cwd=tmp_path, check=True)
    headings = [line for line in page.read_text().splitlines() if line.startswith("## ")]
    expected = ["Targets", "Against others", "Kernels", "LoRA on experts", "Memory", "Tiles", "Correctness", "Machine"]
    assert headings == [f"## {name}" for name in expected]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends(shell):
    code, printed, rows = shell(script=f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    assert code == 2
    assert "torch finds no GPU" in printed
    assert rows == []
    assert "precompile" not in printed
