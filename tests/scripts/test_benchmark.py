"""These tests run scripts/benchmark.py on a tiny shape, and test the parts of the benchmark."""

import json

import pytest
import torch
from moe_benchmark.cases import Case, default_cases, make_cases
from moe_benchmark.check import Disagreement, recorded, refuse_disagreement, relative_errors
from moe_benchmark.contestants import TRANSFORMERS, skip_reason
from moe_benchmark.measure import Clock, Contestant, interleave, saved_bytes
from moe_benchmark.presets import EXPERT_SWEEP, PRESETS, Preset
from moe_benchmark.results import Result, compare_cases
from moe_benchmark.routing import ROUTINGS, route
from moe_benchmark.workloads import BlockWorkload, ExpertsWorkload


CPU = torch.device("cpu")


@pytest.mark.parametrize("level", ["experts", "block", "model"])
def test_table_and_json(level, benchmark, tmp_path):
    path = tmp_path / "result.json"
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 2, 24, "--rounds", 1, "--output", path]
    code, printed, _ = benchmark("--level", level, *flags)
    assert code == 0
    report = json.loads(path.read_text())
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert report["machine"]["torch"] == torch.__version__
    assert report["not_run"] == report["failed"] == []
    results = {result["case"]["mode"]: result for result in report["results"]}
    assert set(results) == {"forward", "forward_backward", "decode"}
    for result in results.values():
        assert {"moe", *TRANSFORMERS} <= set(result["times"])
        assert all(len(times) == 1 for times in result["times"].values())
        assert result["error"] is None
        assert result["ratios"]["ours/transformers"] > 0
        assert result["backends"]["moe"] in printed
        assert ("ours/limit" in result["ratios"]) == (level != "model")
        assert result["skipped"] == {"liger": "needs CUDA", "sonicmoe": "needs CUDA"}
    training = results["forward_backward"]
    assert 0 < training["ratios"]["saved/grouped_mm"] < 1
    assert {"gradient of x", "gradient of weight", "gradient of gate_up_proj", "gradient of down_proj"} < set(
        training["errors"]["moe"]
    )
    assert results["decode"]["case"]["tokens"] == 2
    assert "formers" in printed
    assert "not measured, liger: needs CUDA" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_saved_bytes_of_the_experts(benchmark, tmp_path):
    path = tmp_path / "result.json"
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 24, "--modes", "forward_backward", "--rounds", 1]
    code, *_ = benchmark(*flags, "--implementations", "moe", "moe_recompute", "--output", path)
    (result,) = json.loads(path.read_text())["results"]
    assignments, width = 24 * PRESETS["tiny"].per_token, 2 * PRESETS["tiny"].intermediate
    assert code == 0
    assert result["saved_bytes"]["moe"] - result["saved_bytes"]["moe_recompute"] == 4 * assignments * width


def test_comparisons_and_budget(benchmark, tmp_path):
    path = tmp_path / "result.json"
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 24, "--modes", "forward", "--rounds", 1]
    flags += ["--implementations", "moe", "grouped_mm", "--output", path]
    code, printed, _ = benchmark(*flags, "--routing", *ROUTINGS)
    assert code == 0
    assert len(json.loads(path.read_text())["comparisons"]) == 2
    assert "experts tiny float32 T=24 all_to_one forward" in printed

    code, printed, _ = benchmark(*flags, "--budget_s", 1e-9)
    assert code == 0
    assert json.loads(path.read_text())["not_run"] == ["experts tiny float32 T=24 balanced forward"]
    assert "not run, the budget of 1e-09 s was spent: experts tiny" in printed


def test_the_report_names_the_back_end_that_ran(benchmark, tmp_path):
    """moe_loop asks for the loop, and moe_recompute leaves the choice to the package."""
    path = tmp_path / "result.json"
    flags = ["--presets", "tiny", "--dtypes", "float32", "--tokens", 24, "--modes", "forward_backward", "--rounds", 1]
    flags += ["--implementations", "moe_recompute", "moe_loop", "--output", path]
    code, *_ = benchmark(*flags)
    (result,) = json.loads(path.read_text())["results"]
    assert code == 0
    assert result["backends"] == {"moe_recompute": "native", "moe_loop": "loop"}
    assert result["tiles"] == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "tpu"], "device 'tpu' is unknown"),
        (["--device", "cuda"], "torch finds no GPU"),
        (["--level", "layer"], "level 'layer' is unknown"),
        (["--presets", "huge"], "presets 'huge' is unknown"),
        (["--dtypes", "int8"], "dtypes 'int8' is unknown"),
        (["--routing", "random"], "routing 'random' is unknown"),
        (["--modes", "backward"], "modes 'backward' is unknown"),
        (["--tokens", "0"], "tokens is 0: it must be at least 1"),
        (["--rounds", "0"], "rounds is 0"),
        (["--threads", "-1"], "threads is -1"),
        (["--level", "block", "--routing", "zipf"], "a router chooses"),
        (["--what", "lora", "--modes", "forward"], "omit routing, modes and level"),
        (["--what", "lora", "--presets", "gpt_oss_20b"], "gpt_oss_20b has only experts"),
        (["--level", "model", "--presets", "gpt_oss_20b"], "gpt_oss_20b has only experts"),
        (["--implementations", "eager"], "at least one must belong to this package"),
        (["--implementations", "moe", "fastest"], "'fastest' is not registered"),
        (["--output", "/missing/folder/result.json"], "make the folder"),
    ],
)
def test_mistakes(flags, message, benchmark):
    if message == "torch finds no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, printed, complaint = benchmark(*flags)
    assert code == 2
    assert printed == ""
    assert len(complaint.strip().splitlines()) == 1
    assert message in complaint


@pytest.mark.parametrize("family", ["gated", "gpt_oss"])
def test_oracle_agrees_with_eager_in_float64(family):
    preset = Preset(12, 10, 4, 2, family)
    workload = ExpertsWorkload(preset, torch.float64, CPU)
    workload.prepare(Case("experts", "", "float64", 200, "zipf", "forward_backward"))
    workload.ours.config._experts_implementation = "eager"
    parameters = list(workload.ours.parameters())
    differentiated = [*workload.inputs(), *parameters]
    with recorded(workload.ours) as calls:
        output = workload.forward(workload.ours)
    grads = dict(zip(differentiated, torch.autograd.grad(output, differentiated, workload.grad), strict=True))
    errors = relative_errors(calls, grads)
    assert len(errors) == 3 + len(parameters)
    assert max(errors.values()) < 1e-12

    grads[parameters[-1]][1] *= 1.1
    with pytest.raises(Disagreement, match="down_proj"):
        refuse_disagreement(relative_errors(calls, grads), 1e-4, "the pass")


def test_balanced_loads_differ_by_one_at_most():
    preset = Preset(8, 8, 7, 3)
    index, weight = route("balanced", 100, preset)
    load = torch.bincount(index.flatten(), minlength=7)
    assert load.max() - load.min() <= 1
    torch.testing.assert_close(weight.sum(-1), torch.ones(100))
    assert (weight > 0).all()


def test_zipf_loads_fall_with_the_expert():
    first = route("zipf", 20_000, Preset(8, 8, 16, 1))[0].flatten()
    share = torch.bincount(first, minlength=16) / len(first)
    odds = 1 / torch.arange(1, 17)
    torch.testing.assert_close(share, odds / odds.sum(), atol=0.015, rtol=0)


def test_all_to_one_sends_all_first_choices_to_one_expert():
    index, _ = route("all_to_one", 50, Preset(8, 8, 16, 4))
    assert (index == torch.arange(4)).all()
    assert (route("all_to_one", 50, Preset(8, 8, 16, 1))[0] == 0).all()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("per_token", [1, 4, 8])
def test_routing_is_seeded_and_distinct(routing, per_token):
    preset = Preset(8, 8, 8, per_token)
    index, weight = route(routing, 33, preset, seed=1)
    assert index.shape == weight.shape == (33, per_token)
    assert index.dtype == torch.int64
    assert all(row.unique().numel() == per_token for row in index)
    again, weight_again = route(routing, 33, preset, seed=1)
    assert torch.equal(index, again)
    assert torch.equal(weight, weight_again)
    assert per_token == 1 or not torch.equal(weight, route(routing, 33, preset, seed=2)[1])


def test_saved_bytes_counts_each_storage_once_and_no_input():
    x = torch.randn(10, 6, requires_grad=True)
    weight = torch.randn(4, 6, requires_grad=True)

    def forward():
        h = x @ weight.T  # saves x and weight
        a = h.sigmoid()  # saves a
        return (a * a.view(4, 10).t() * x[:, :4]).sum()  # saves a and its alias, their product, and an alias of x

    assert saved_bytes(forward, [x, weight]) == 2 * 10 * 4 * 4
    assert saved_bytes(forward, [x]) == 2 * 10 * 4 * 4 + 4 * 6 * 4
    assert saved_bytes(lambda: x.detach() @ weight.detach().T, [x, weight]) == 0


def test_interleaved_turns():
    order = []
    contestants = [
        Contestant(name, lambda name=name: order.append(name), lambda name=name: order.append(f"prepare {name}"))
        for name in "ab"
    ]

    def exhausted():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    clock = Clock(CPU)
    times, failed = interleave([*contestants, Contestant("c", exhausted)], clock, rounds=3, seconds=0, cold=True)
    assert order == ["prepare a", "a", "prepare b", "b"] * 4
    assert {name: len(measured) for name, measured in times.items()} == {"a": 3, "b": 3}
    assert {name: (failure.message, failure.out_of_memory) for name, failure in failed.items()} == {
        "c": ("out of memory", True)
    }

    order.clear()
    times, _ = interleave(contestants, clock, rounds=None, seconds=0, cold=False)
    assert len(order) == 4
    assert {name: len(measured) for name, measured in times.items()} == {"a": 1, "b": 1}


def test_ratios_are_medians_over_rounds():
    case = Case("experts", "cpu_e8", "float32", 2048, "balanced", "forward_backward")
    times = {"moe": [1.0, 8.0, 3.0], "grouped_mm": [2.0, 8.0, 4.0], "eager": [9.0, 9.0, 9.0], "dense": [1.0, 4.0, 3.0]}
    result = Result(case, times | {"copy": [1.0] * 3}, saved_bytes={"moe": 27, "grouped_mm": 100}, copied_bytes=100)
    ratios = {"ours/transformers": 0.75, "ours/limit": 1.0, "saved/grouped_mm": 0.27}
    assert result.ratios() == pytest.approx(ratios)

    many = Case("experts", "cpu_e64", "float32", 2048, "balanced", "forward_backward")
    slower = {"moe": [9.0], "dense": [3.0], "copy": [1.0]}
    (comparison,) = compare_cases([result, Result(many, slower, copied_bytes=100, weight_bytes=300)])
    assert (comparison.case, comparison.base) == (many, case)
    assert comparison.ratio == pytest.approx((9 - 3) / 3 / (3 / 3))


def test_decode_limit_is_bytes_over_bandwidth():
    case = Case("experts", "cpu_fine", "float32", 1, "balanced", "decode")
    result = Result(case, {"moe": [6.0], "copy": [4.0]}, weight_bytes=50, copied_bytes=100)
    assert result.limit_ms == 2.0
    assert result.ratios() == {"ours/limit": 3.0}


@pytest.mark.parametrize("name", PRESETS)
def test_modules_of_every_preset(name):
    preset, meta = PRESETS[name], torch.device("meta")
    experts = ExpertsWorkload(preset, torch.bfloat16, meta).ours
    assert experts.down_proj[0].numel() == preset.hidden * preset.intermediate
    assert len(experts.gate_up_proj) == preset.experts
    if preset.family == "gated":
        block = BlockWorkload(preset, torch.bfloat16, meta)
        assert block.theirs.experts.gate_up_proj.shape == block.ours.experts.gate_up_proj.shape
        assert block.theirs.gate.top_k == preset.per_token


def test_quadratic_and_copying_implementations_are_skipped():
    case = Case("experts", "cpu_fine", "float32", 2048, "balanced", "forward_backward")
    assert skip_reason("eager", case, CPU, 4) == "its backward is quadratic in experts"
    assert skip_reason("batched_mm", case, CPU, 4) == "would copy over 2 GB of weights"
    few = Case("experts", "cpu_e8", "float32", 16, "balanced", "forward_backward")
    assert skip_reason("eager", few, CPU, 4) is None
    assert skip_reason("batched_mm", few, CPU, 4) is None
    assert skip_reason("moe_triton", few, CPU, 4) == "needs CUDA"


def test_default_cases_cover_both_cpu_shapes():
    cpu = default_cases("cpu", "experts")
    assert len(cpu) == len(set(cpu))
    for preset in ("cpu_fine", "cpu_coarse"):
        for dtype in ("float32", "bfloat16"):
            for mode in ("forward", "forward_backward"):
                assert Case("experts", preset, dtype, 2048, "balanced", mode) in cpu
            assert all(Case("experts", preset, dtype, tokens, "balanced", "decode") in cpu for tokens in (1, 16))
    assert {case.preset for case in cpu} >= set(EXPERT_SWEEP)
    assert any(case.routing == "all_to_one" for case in cpu)
    assert {case.preset for case in make_cases("cuda", "block", [], [], [], [], [])}.isdisjoint({"gpt_oss_20b"})
