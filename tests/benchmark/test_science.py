"""These tests check part science: equal tokens, exact starts, held-out text, recorded failures, and complete seeds."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments.flops import flops_per_token
from experiments.intervals import interval
from moe_benchmark.gpu import science
from moe_benchmark.gpu.results import Results, read
from moe_benchmark.gpu.science import (
    ARMS,
    DENSE,
    LEAST_STEPS,
    MARGIN,
    Arguments,
    Plan,
    Probe,
    Training,
    build,
    main,
    make_plan,
    read_setting,
    shuffled,
    train_seeds,
)
from moe_benchmark.gpu.science_report import markdown, read_lines
from moe_benchmark.gpu.science_text import (
    installed_sources,
    is_held_out,
    make_blocks,
    read_text,
    sources_in,
)
from moe_benchmark.gpu.weights import join, keep, model_path, split
from torch.utils.flop_counter import FlopCounterMode

from modeling_moe.dispatch.backends import BACKENDS
from modeling_moe.utils.errors import UserError
from tests.builders import WORDS, save_llama, train_tokenizer


FINE, COARSE = (arm for arm in ARMS if arm != DENSE)
SMALL = {"rows": 4, "length": 16, "held_out": 4, "characters": 20_000, "device": "cpu", "dtype": "float32"}


def lines_of(seed: int, count: int = 30) -> str:
    """Returns paragraphs of random words, different for each seed."""
    choice = random.Random(seed).choices
    return "".join(" ".join(choice(WORDS, k=8)) + (".\n\n" if number % 3 == 2 else ".\n") for number in range(count))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Makes a random Llama and 60 small files."""
    folder = tmp_path_factory.mktemp("science")
    save_llama(folder / "model", intermediate_size=64)
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"module_{number}.py").write_text(lines_of(number), encoding="utf-8")
    return Arguments(weights=str(folder / "model"), text_dir=str(folder / "text"), **SMALL)


def results_in(folder: Path) -> Results:
    return Results(folder / "results.jsonl", "science")


@pytest.fixture(scope="module")
def lines(arguments, tmp_path_factory):
    """Returns the lines of a whole run of two seeds, started by the command line."""
    path = tmp_path_factory.mktemp("run") / "outputs" / "results.jsonl"
    flags = {"weights": arguments.weights, "text_dir": arguments.text_dir, "results": path, **SMALL}
    flags |= {"steps": 6, "seeds": 2, "evaluations": 2, "rate": 1e-2}
    main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    return read(path)


def evaluations(lines: list[dict], arm: str, seed: int) -> dict[int, dict]:
    return {
        line["step"]: line for line in lines if (line.get("arm"), line.get("seed")) == (arm, seed) and "step" in line
    }


def test_all_arms_train_on_equal_tokens_in_an_equal_order(lines):
    (plan,) = (line for line in lines if line.get("what") == "plan")
    orders = set()
    for seed in (1, 2):
        runs = {arm: evaluations(lines, arm, seed) for arm in ARMS}
        assert [sorted(runs[arm]) for arm in (FINE, COARSE)] == [[0, 3, 6]] * 2
        assert set(runs[DENSE]) == {0, 3, 6, *plan["dense_steps"].values()}
        for step in (3, 6):
            assert {run[step]["tokens"] for run in runs.values()} == {step * 4 * 16}
            assert len({run[step]["batches"] for run in runs.values()}) == 1
        orders.add(runs[DENSE][6]["batches"])
    assert len(orders) == 2


def test_the_dense_model_is_scored_where_it_has_spent_what_a_mixture_spends(lines):
    (plan,) = (line for line in lines if line.get("what") == "plan")
    for arm in (FINE, COARSE):
        spent = evaluations(lines, arm, 1)[6]["flops"]
        dense = evaluations(lines, DENSE, 1)[plan["dense_steps"][arm]]
        step_flops = plan["flops"][DENSE] * plan["tokens_per_step"]
        assert abs(dense["flops"] - spent) <= step_flops / 2
    assert plan["dense_steps"][COARSE] > plan["steps"]


def test_every_arm_starts_as_the_dense_model_and_learns(lines):
    exact = [line for line in lines if line.get("what") == "exact"]
    assert [line["arm"] for line in exact] == [FINE, COARSE]
    assert all(line["passed"] and line["largest_difference"] < 1e-4 for line in exact)
    for arm in ARMS:
        for seed in (1, 2):
            run = evaluations(lines, arm, seed)
            # seed 2 starts from the weights of seed 1's start: no run changes them
            assert run[0]["loss"] == pytest.approx(evaluations(lines, DENSE, 1)[0]["loss"], abs=1e-5)
            assert run[6]["loss"] < run[0]["loss"] - 0.05


def test_a_run_gives_a_report(lines):
    text = markdown(lines)
    assert text.count("| dense |") == 1 + len(evaluations(lines, DENSE, 1))
    assert f"the fp32 logits of {FINE} differ from the dense model's" in text
    assert "means over 2 seeds" in text
    assert "Not counted" not in text
    assert "Failed" not in text


def test_a_method_that_does_not_start_exact_is_an_error(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(science, "TOLERANCE", -1.0)
    science.run(results_in(tmp_path), args=replace(arguments, steps=1, seeds=1, evaluations=1))
    failed = [line for line in read(tmp_path / "results.jsonl") if "error" in line]
    assert {line["arm"] for line in failed} == {FINE, COARSE}
    assert f"exact of {FINE}: {FINE} computes the dense function at step 0: no" in markdown(failed)


def test_a_failing_arm_is_recorded_and_the_others_run(arguments, tmp_path, monkeypatch):
    def failing(setting, arm, seed):
        if arm == FINE and seed == 2:
            raise RuntimeError("out of everything")
        return build(setting, arm, seed)

    monkeypatch.setattr(science, "build", failing)
    science.run(results_in(tmp_path), args=replace(arguments, steps=2, seeds=2, evaluations=1))
    lines = read(tmp_path / "results.jsonl")
    assert [line["failed"] for line in lines if line.get("what") == "seed"] == [[], [FINE]]
    assert all(2 in evaluations(lines, arm, 2) for arm in (DENSE, COARSE))
    assert not evaluations(lines, FINE, 2)
    text = markdown(lines)
    assert f"- arm of {FINE}, seed 2: RuntimeError: out of everything" in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {FINE}") and "one seed" in line)
    assert row.count("(one seed)") == 2


def test_an_arm_that_fails_when_it_is_timed_is_not_planned(arguments, tmp_path, monkeypatch):
    def failing(setting, arm, results):
        if arm == COARSE:
            raise RuntimeError("no kernel")
        return Probe(0.0, 1.0, 0.0)

    monkeypatch.setattr(science, "probe", failing)
    # the clock says that two arms take 2 s a step, which allows about 25 steps
    science.run(results_in(tmp_path), args=replace(arguments, seconds=60.0, seeds=1))
    lines = read(tmp_path / "results.jsonl")
    (plan,) = (line for line in lines if line.get("what") == "plan")
    assert list(plan["flops"]) == [DENSE, FINE]
    assert "probe of 8 experts, K=2: RuntimeError: no kernel" in markdown(lines)


def test_without_the_dense_model_nothing_is_trained(arguments, tmp_path, monkeypatch):
    def failing(setting, arm, results):
        raise RuntimeError("no memory")

    monkeypatch.setattr(science, "probe", failing)
    with pytest.raises(UserError, match="dense model could not be trained"):
        science.run(results_in(tmp_path), args=arguments)
    assert "Nothing was trained." in markdown(read(tmp_path / "results.jsonl"))


def test_an_arm_is_timed(arguments, tmp_path):
    results = results_in(tmp_path)
    setting = read_setting(arguments, results)
    found = science.probe(setting, COARSE, results)
    assert min(found.build_s, found.step_s, found.evaluation_s) > 0
    line = read(results.path)[-1]
    assert (line["what"], line["arm"]) == ("probe", COARSE)
    assert line["backend"] in BACKENDS
    assert line["step_s"] == found.step_s


def test_what_is_planned_fits_the_seconds():
    args = Arguments(device="cpu", evaluations=4)
    flops = {DENSE: 1.0, FINE: 1.01, COARSE: 1.6}
    probes = {DENSE: Probe(1.0, 0.1, 0.5), FINE: Probe(4.0, 0.2, 1.0), COARSE: Probe(4.0, 0.15, 1.0)}
    plan = make_plan(args, flops, probes, 280.0)
    assert plan.seeds == 3
    assert plan.dense_steps == {DENSE: plan.steps, FINE: round(1.01 * plan.steps), COARSE: round(1.6 * plan.steps)}

    def seconds(steps: int) -> float:
        longer = replace(plan, steps=steps, dense_steps={arm: round(steps * ratio) for arm, ratio in flops.items()})
        spent = 0.0
        for arm, probe in probes.items():
            stops = longer.stops(arm, args.evaluations)
            spent += probe.build_s + len(stops) * probe.evaluation_s + stops[-1] * probe.step_s
        return plan.seeds * spent

    assert seconds(plan.steps) <= MARGIN * 280 < seconds(plan.steps + 2)
    assert make_plan(args, flops, probes, 80.0).seeds == 2
    assert make_plan(args, flops, probes, 80.0).steps >= LEAST_STEPS
    with pytest.raises(UserError, match="one seed needs"):
        make_plan(args, flops, probes, 20.0)
    assert make_plan(replace(args, steps=7), flops, {}, 0.0).steps == 7


def test_a_seed_that_there_is_no_time_for_is_not_begun(arguments, tmp_path):
    results = results_in(tmp_path)
    setting = read_setting(arguments, results)
    flops = dict.fromkeys(ARMS, 1.0)
    plan = Plan(1, 3, dict.fromkeys(ARMS, 1), flops)
    left = iter([100.0, 0.0, 0.0])
    train_seeds(setting, plan, lambda: next(left), results)
    seeds = [line for line in read(results.path) if line.get("what") == "seed"]
    assert [(line["seed"], line.get("finished")) for line in seeds] == [(1, True), (2, None)]
    assert read_lines(seeds).left_out == [f"seed 2: {seeds[1]['not_run']}"]


def test_updates_below_bf16s_precision_add_up(arguments, tmp_path):
    setting = read_setting(replace(arguments, dtype="bfloat16", rate=1e-5, warmup=0.0), results_in(tmp_path))
    training = Training(build(setting, COARSE, 1), setting.args, 1)
    block = training.model.model.sparse_blocks()[0]
    assert (block.experts.down_proj.dtype, block.gate.weight.dtype) == (torch.bfloat16, torch.float32)
    master = next(
        m for m, p in zip(training.masters, training.parameters, strict=True) if p is block.experts.down_proj
    )
    before, rounded = master.detach().clone(), block.experts.down_proj.detach().clone()
    # AdamW updates the weights before they are rounded
    assert torch.equal(before, build(setting, COARSE, 1).model.sparse_blocks()[0].experts.down_proj)
    for _ in range(8):
        training.step(setting.training[:4])
    moved = (master - before).abs()
    # Adam moves each weight by at most the learning rate, and in one direction on one batch
    assert moved.median() > 4e-5
    assert torch.equal(block.experts.down_proj, master.bfloat16())
    # a single step of 1e-5 is less than half a unit in the last place of weights above 0.01
    changed = block.experts.down_proj != rounded
    assert 0.0 < changed.float().mean() < 0.5
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_the_rate_rises_and_stays(arguments, tmp_path):
    setting = read_setting(replace(arguments, rate=1e-3, warmup=0.5), results_in(tmp_path))
    training, rates = Training(build(setting, DENSE, 1), setting.args, 4), []
    for _ in range(4):
        training.step(setting.training[:2])
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


def test_flops_are_those_of_the_products(arguments, tmp_path):
    setting = read_setting(arguments, results_in(tmp_path))
    model, ids = build(setting, DENSE, 1), setting.training[:4]
    # the counter counts only plain products
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    attention = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    # half of these are masked, and backward costs twice as much as forward
    counted = 3 * (counter.get_total_flops() - attention / 2) / ids.numel()
    assert attention > 0
    assert flops_per_token(setting.config, 16) == pytest.approx(counted, rel=0.02)
    more = flops_per_token(setting.arm_config(COARSE), 16) - flops_per_token(setting.config, 16)
    assert more == 6 * 2 * (3 * 32 * 64 + 8 * 32)


def test_held_out_text_is_not_trained_on(tmp_path):
    for package in ("a", "b"):
        (tmp_path / package / "core").mkdir(parents=True)
        for number in range(80):
            text = lines_of(number) + f"version of {package}\n\n" * (number % 2)
            (tmp_path / package / "core" / f"module_{number}.py").write_text(text, encoding="utf-8")
    (tmp_path / "a" / "core" / "latin.py").write_bytes(b"\xff\xfe\xff")
    paths = sources_in(tmp_path)
    # a copy of a file in another package is on the side of the file
    assert all(is_held_out(path) == is_held_out(tmp_path / "b" / "core" / path.name) for path in paths)
    text = read_text(paths, 10**9, 10**9)
    assert (text.unread, text.copies) == (1, 40)
    assert len(text.training) + len(text.held_out) >= 80
    trained = {paragraph.strip() for document in text.training for paragraph in document.split("\n\n")}
    held_out = [paragraph for document in text.held_out for paragraph in document.split("\n\n")]
    assert held_out
    assert not trained & {paragraph.strip() for paragraph in held_out}
    assert text.removed > 0
    assert read_text(paths[::-1], 10**9, 10**9) == text


def test_text_is_read_as_far_as_it_is_wanted(arguments):
    paths = sources_in(Path(arguments.text_dir))
    text = read_text(paths, 3000, 1500)
    size = max(len(document) for document in (*text.training, *text.held_out))
    assert 3000 <= sum(map(len, text.training)) < 3000 + size
    assert len(text.training) < len(paths) / 2
    with pytest.raises(UserError, match="held_out is 99999"):
        make_blocks(text, train_tokenizer(), 16, 99_999)
    with pytest.raises(UserError, match="text_dir contains too few files"):
        make_blocks(replace(text, held_out=[]), train_tokenizer(), 16, 2)


def test_installed_packages_are_text():
    paths = installed_sources()
    assert len(paths) > 1000
    assert any(path.parts[-2:] == ("optim", "adamw.py") for path in paths)
    assert any(path.name == "argparse.py" for path in paths)
    text = read_text(paths, 300_000, 60_000)
    assert sum(map(len, text.training)) >= 300_000
    assert text.held_out


def test_parts_of_a_file_are_joined_and_checked(tmp_path):
    file, carried, kept = tmp_path / "model.gguf", tmp_path / "carried", tmp_path / "kept"
    file.write_bytes(random.Random(0).randbytes(1001))
    first, second, digest = split(file, carried)
    assert (first.stat().st_size, second.stat().st_size) == (500, 501)
    tail = second.read_bytes()
    second.unlink()
    # the first call
    with pytest.raises(UserError, match=r"the parts 0 of model.gguf, which do not form that file"):
        model_path(carried, kept)
    # the second call, to which only the other part is transferred
    first.unlink()
    digest.unlink()
    second.write_bytes(tail)
    assert model_path(carried, kept) == (kept, "model.gguf")
    assert model_path(kept, kept) == (kept, "model.gguf")
    assert (kept / "model.gguf").read_bytes() == file.read_bytes()
    (kept / "model.gguf").unlink()
    (kept / "model.gguf.1").write_bytes(tail[:-1] + b"x")
    with pytest.raises(UserError, match="do not form that file"):
        join(kept)
    assert not (kept / "model.gguf").exists()
    assert keep(tmp_path / "nothing", kept) == []
    with pytest.raises(UserError, match=r"contains 0 .sha256 files"):
        join(tmp_path / "nothing")


def test_a_whole_model_needs_no_parts(arguments, tmp_path):
    assert model_path(Path(arguments.weights), tmp_path) == (Path(arguments.weights), None)
    (tmp_path / "model.gguf").write_bytes(b"")
    assert model_path(tmp_path, tmp_path / "kept") == (tmp_path, "model.gguf")


@pytest.mark.parametrize("field", ["seeds", "rows", "length", "seconds", "dtype"])
def test_impossible_arguments_are_refused(field):
    with pytest.raises(UserError, match=field):
        Arguments(**{field: "int8" if field == "dtype" else 0})


LOSSES = {
    # arm -> seed -> losses at steps 10 and 16
    DENSE: {1: (2.0, 1.95), 2: (2.1, 2.07), 3: (2.2, 2.12)},
    COARSE: {1: (1.9, None), 2: (2.01, None), 3: (2.13, None)},
}


def made_lines(seeds=(1, 2, 3), batches=lambda arm, seed: "same") -> list[dict]:
    """Returns lines of finished seeds, as the part writes them."""
    lines = [
        {"what": "setting", "dtype": "bfloat16", "rate": 3e-4},
        {"what": "text", "model": "m", "training_tokens": 5000, "training_files": 9, "held_out_tokens": 64},
        {
            "what": "plan",
            "steps": 10,
            "seeds": 3,
            "tokens_per_step": 64,
            "flops": {DENSE: 1e9, COARSE: 1.6e9},
            "dense_steps": {DENSE: 10, COARSE: 16},
            "parameters": {DENSE: 135e6, COARSE: 600e6},
            "stops": {DENSE: [10, 16], COARSE: [10]},
        },
    ]
    for seed in seeds:
        for arm, losses in LOSSES.items():
            for step, loss in zip((10, 16), losses[seed], strict=True):
                if loss is not None:
                    lines.append(
                        {"what": "evaluation", "arm": arm, "seed": seed, "step": step, "tokens": step * 64}
                        | {
                            "flops": 1e15,
                            "loss": loss,
                            "max_vio": None,
                            "training_s": 2.0,
                            "batches": batches(arm, seed),
                        }
                    )
        lines.append({"what": "seed", "seed": seed, "finished": True})
    return [{"part": "science"} | line for line in lines]


def row_of(text: str, arm: str) -> list[str]:
    return [cell.strip() for cell in next(row for row in text.splitlines() if row.startswith(f"| {arm} |")).split("|")]


def test_the_report_has_both_comparisons_with_their_intervals():
    text = markdown(made_lines())
    cells = row_of(text, COARSE)
    for cell, values in zip(cells[6:8], ((-0.1, -0.09, -0.07), (-0.05, -0.06, 0.01)), strict=True):
        mean, low, high = interval(values)
        assert cell == f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
    assert (cells[2], cells[3], cells[4], cells[5]) == ("600", "1.600", "320 (1.00x)", "2.0133")
    assert f"held-out loss at equal tokens of {COARSE} is below dense: -0.087 (95% interval -0.125 to -0.049)" in text
    assert f"no claim on held-out loss at equal FLOPs, {COARSE} against dense: -0.033" in text
    assert "| dense | 1,024 | 1.00 | 2.0467 | 1.9500, 2.0700, 2.1200 |" in text


def test_the_report_says_which_arm_is_worse():
    lines = made_lines()
    for line in lines:
        if line.get("arm") == COARSE:
            line["loss"] += 1.0
    assert f"held-out loss at equal tokens of {COARSE} is above dense: +0.913" in markdown(lines)


def test_an_unfinished_seed_is_left_out():
    lines = made_lines()[:-1]
    text = markdown(lines)
    assert "- seed 3: it was not finished" in text
    assert "means over 2 seeds" in text
    assert row_of(text, COARSE)[5] == "1.9550"
    one = markdown(made_lines(seeds=(1,)))
    assert row_of(one, COARSE)[6:8] == ["-0.1000 (one seed)", "-0.0500 (one seed)"]
    assert "interval -" not in one


def test_a_seed_whose_arms_met_other_batches_is_left_out():
    text = markdown(made_lines(batches=lambda arm, seed: arm if seed == 2 else "same"))
    assert "- seed 2: its arms were trained on different batches" in text
    assert "means over 2 seeds" in text


def test_only_the_last_run_counts():
    first = made_lines()
    first[4]["loss"] = "nan"
    first.append({"part": "science", "what": "arm", "arm": DENSE, "seed": 3, "error": "RuntimeError: gone"})
    assert markdown(first + made_lines()) == markdown(made_lines())
    assert markdown([{"part": "lora", "what": "setting"}]) == ""


def test_every_index_comes_before_one_comes_again():
    order = shuffled(5, 3, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(order) for _ in range(5)]).tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == [0, 1, 2, 3, 4]
    assert drawn[:5] != drawn[5:10]
