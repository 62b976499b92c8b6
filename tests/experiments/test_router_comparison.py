"""These tests run scripts/compare_routers.py with tiny models, and check the measurements."""

import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from experiments import router_comparison as comparison
from experiments.byte_models import Trained
from experiments.router_comparison import (
    ComparisonArguments,
    RouterEntry,
    RouterResult,
    compare_routers,
    load_entries,
    router_config,
)
from experiments.router_table import markdown, standings, summary, told_apart

from modeling_moe.router_catalogue import ROUTERS, router_class
from modeling_moe.utils.errors import UserError
from tests.builders import sample_text


ROOT = Path(__file__).parents[2]
MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ENTRIES = [
    {"name": "plain", "fields": {"router_type": "topk", "capacity_factor": 1.0}, "source": "a|b", "highlight": True},
    {"name": "all to all", "fields": {"router_type": "soft_moe", "allow_noncausal": True}, "source": "c"},
]


@pytest.fixture
def flags(tmp_path):
    """Returns flags for two routers, three steps, two seeds and one domain."""
    (tmp_path / "routers.yaml").write_text(yaml.safe_dump({"model": MODEL, "routers": ENTRIES}, sort_keys=False))
    (tmp_path / "words.txt").write_text(sample_text(), encoding="utf-8")
    return {
        "routers_file": tmp_path / "routers.yaml",
        "data": f"words={tmp_path / 'words.txt'}",
        "steps": 3,
        "batch_size": 2,
        "length": 16,
        "eval_batches": 2,
        "seeds": 2,
    }


def compare(monkeypatch, flags) -> None:
    argv = ["compare_routers.py"]
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(ROOT / "scripts" / "compare_routers.py"), run_name="__main__")


def runs_of(path) -> list[list[dict]]:
    """Returns the runs of each router without their times."""
    return [[{**run, "seconds": None} for run in router["runs"]] for router in json.loads(path.read_text())["routers"]]


def test_json_png_markdown_and_table(flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    files = {"output_json": tmp_path / "r.json", "plot": tmp_path / "r.png", "markdown": tmp_path / "r.md"}
    compare(monkeypatch, flags | files)
    routers = json.loads(files["output_json"].read_text())["routers"]
    assert [router["causal"] for router in routers] == [True, False]
    plain, soft = runs_of(files["output_json"])
    assert len(plain) == len(soft) == 2
    for run in (*plain, *soft):
        assert run["losses"][0] == pytest.approx(math.log(257), abs=0.2)
        assert len(run["losses"]) == len(run["max_vios"]) == 1
        assert run["train_loss"] == pytest.approx(run["losses"][0])
        assert 0 < run["token_entropy"] <= run["marginal_entropy"] + 2e-5 <= math.log(4) + 4e-5
    assert [run["mean_experts"] for run in plain + soft] == [2, 2, 4, 4]
    assert [run["text"] for run in plain] == [run["text"] for run in soft]
    assert plain[0]["text"] != plain[1]["text"]
    assert all(run["dropped_share"] > 0 for run in plain)
    assert all(run["dropped_share"] is None and run["max_vio"] == pytest.approx(0, abs=1e-5) for run in soft)
    assert files["plot"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    header, rule, first, second, _, *sources = files["markdown"].read_text().splitlines()
    assert header.startswith("| router | place | held-out | minus plain | p | experts | MaxVio | starved | ")
    assert rule.count("---") == 9
    mean = sum(run["held_out_loss"] for run in plain) / 2
    half = 12.7062 * abs(plain[0]["held_out_loss"] - mean)
    assert first.startswith(f"| plain | - | {mean:.3f} ± {half:.3f} | - | - | 2.0 | ")
    assert second.startswith("| all to all (not causal) | - | ")
    assert sources[2] == r"| plain | `capacity_factor=1.0` | a\|b |"
    assert f"{mean:.3f} ± " in capsys.readouterr().out


def test_seed_decides_and_processes_do_not(flags, tmp_path, monkeypatch):
    flags["only"] = "plain"
    for name, more in {"a": {}, "b": {}, "c": {"workers": 2}, "d": {"seed": 1}}.items():
        compare(monkeypatch, flags | more | {"output_json": tmp_path / name})
    a, b, c, d = (runs_of(tmp_path / name)[0] for name in "abcd")
    assert a == b == c
    assert a[0] != a[1] == d[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("router_type:", "router_tpye:", "no field 'router_tpye'"),
        ("router_type: topk", "router_type: topkk", "router_type 'topkk' is unknown"),
        ("highlight:", "highlihgt:", "'highlihgt' is unknown"),
        ("highlight: true", "highlight: 3", "'highlight' must be a bool"),
        ("source: c", "sauce: c", "must have 'name', 'fields' and 'source'"),
        ("name: all to all", "name: plain", "two routers have the name 'plain'"),
        ("model:", "modle:", "must contain 'model'"),
        ("hidden_size: 16", "hidden_sice: 16", "no field 'hidden_sice'"),
        ("hidden_size: 16", "hidden_size: wide", "hidden_size"),
        ("router_type: soft_moe", "router_type: task", "has num_tasks=1, but the data have 2 domains"),
        ("model:", "model: [", "is not YAML"),
    ],
)
def test_misspelt_file_ends_with_code_2(old, new, message, flags, tmp_path, monkeypatch, capsys):
    content = flags["routers_file"].read_text()
    assert old in content
    flags["routers_file"].write_text(content.replace(old, new, 1))
    (tmp_path / "more.txt").write_text(sample_text(), encoding="utf-8")
    with pytest.raises(SystemExit) as exit_info:
        compare(monkeypatch, flags | {"data": [flags["data"], f"more={tmp_path / 'more.txt'}"]})
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"only": "plane"}, "only 'plane' is not in"),
        ({"baseline": "plane"}, "baseline 'plane' is not trained: choose one of plain, all to all"),
        ({"seeds": 0}, "seeds is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"length": 100000}, "length is 100000, but a part of"),
        ({"routers_file": "missing.yaml"}, "missing.yaml does not exist"),
        ({"plot": "/missing/folder/r.png"}, "make the folder /missing/folder"),
    ],
)
def test_mistakes(more, message, flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        compare(monkeypatch, flags | more)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_shipped_file_has_every_router_and_valid_configurations():
    model, entries = load_entries(str(ROOT / "configuration" / "routers.yaml"))
    assert {router_class(router_config(model, entry)) for entry in entries} == set(ROUTERS.values())


def test_runs_that_were_finished_were_run_again(flags, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs.jsonl"
    flags |= {"runs_file": runs, "output_json": tmp_path / "out.json"}
    train, trained = comparison.train_router, []

    def stop_at_second(entry, seed, *args):
        trained.append((entry.name, seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(entry, seed, *args)

    monkeypatch.setattr(comparison, "train_router", stop_at_second)
    with pytest.raises(SystemExit) as exit_info:
        compare(monkeypatch, flags)
    assert exit_info.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"compare_routers.py: stopped: repeat the command to continue; finished runs are in {runs}"
    compare(monkeypatch, flags)
    assert trained == [("plain", 0), ("all to all", 0), ("all to all", 0), ("plain", 1), ("all to all", 1)]
    kept = runs_of(tmp_path / "out.json")
    # one more seed
    compare(monkeypatch, flags | {"seeds": 3})
    assert trained[5:] == [("plain", 2), ("all to all", 2)]
    runs.unlink()
    compare(monkeypatch, flags)
    assert runs_of(tmp_path / "out.json") == kept
    with pytest.raises(SystemExit):
        compare(monkeypatch, flags | {"steps": 4})
    assert "holds runs with other arguments: name another file" in capsys.readouterr().err
    lines = runs.read_text().splitlines()
    other = json.loads(lines[0])
    other["run"]["trained"]["text"] = "another"
    runs.write_text("\n".join([json.dumps(other), *lines[1:]]))
    with pytest.raises(SystemExit):
        compare(monkeypatch, flags)
    assert "holds runs of seed 0 on different texts: name another file" in capsys.readouterr().err
    runs.write_text("{}\n")
    with pytest.raises(SystemExit):
        compare(monkeypatch, flags)
    assert "does not hold a run in line 1: remove the line" in capsys.readouterr().err


def test_a_router_whose_fields_changed_is_trained_again(flags, tmp_path, monkeypatch):
    flags |= {"runs_file": tmp_path / "runs.jsonl", "seeds": 1}
    compare(monkeypatch, flags)
    content = flags["routers_file"].read_text()
    flags["routers_file"].write_text(content.replace("capacity_factor: 1.0", "capacity_factor: 2.0"))
    compare(monkeypatch, flags)
    lines = [json.loads(line)["run"] for line in flags["runs_file"].read_text().splitlines()]
    assert [(run["name"], run["fields"].get("capacity_factor")) for run in lines] == [
        ("plain", 1.0),
        ("all to all", None),
        ("plain", 2.0),
    ]


def result(name: str, losses: list[float], causal: bool = True) -> RouterResult:
    """Returns a result with given held-out losses."""
    runs = [Trained("", 0.0, loss, 0.5, 0.25, 1.0, 1.5, 2.0, None, 0.0, [1.0], [0.5]) for loss in losses]
    return RouterResult(RouterEntry(name, {}, "s"), causal, runs)


def test_the_ranking_of_made_up_losses():
    rng = np.random.default_rng(0)
    means = {"a": 2.0, "b": 2.001, "c": 1.5, "d": 2.5}
    seeds = rng.normal(0.0, 0.3, size=5)
    results = [result(name, (mean + seeds + rng.normal(0, 0.01, 5)).tolist()) for name, mean in means.items()]
    rows, ranked = standings([*results, result("e", [1.0] * 5, causal=False)], "a")
    assert rows[0].result.entry.name == "c"
    assert [row.result.entry.name for row in rows][3:] == ["d", "e"]
    places = {row.result.entry.name: row.place for row in rows}
    assert places == {"a": "2-3", "b": "2-3", "c": "1", "d": "4", "e": "-"}
    stars = {row.result.entry.name: row.p_text.endswith("*") for row in rows}
    assert stars == {"a": False, "b": False, "c": True, "d": True, "e": False}
    assert [row.difference for row in rows if row.result.entry.name in "ae"] == [None, None]
    assert ranked is not None
    assert told_apart(rows) == (5, 6)
    assert "Tukey's test tells 5 of 6 pairs apart." in summary(rows, ranked)
    # the seeds' own effect is in the intervals of the losses, and not in those of the differences
    assert rows[0].difference_text.startswith("-0.5")
    assert rows[0].loss.high - rows[0].loss.mean > 0.1
    assert "- Paired t-tests with Holm's correction" in markdown(rows, ranked, "a")


def test_one_seed_has_no_intervals():
    rows, ranked = standings([result("a", [2.0]), result("b", [1.0])], "a")
    assert ranked is None
    assert [(row.loss_text, row.place, row.difference_text, row.p_text) for row in rows] == [
        ("1.000", "-", "-", "-"),
        ("2.000", "-", "-", "-"),
    ]


@pytest.mark.slow
def test_workers_ended_minutes_after_their_parent(flags, tmp_path):
    flags |= {"steps": 100_000, "workers": 2, "runs_file": tmp_path / "runs.jsonl"}
    command = [sys.executable, str(ROOT / "scripts" / "compare_routers.py")]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]),
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while "routers: " not in process.stderr.read(1) + process.stderr.readline():
            assert process.poll() is None
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert time.monotonic() - began < 30
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].endswith(f"finished runs are in {tmp_path / 'runs.jsonl'}")


def test_the_routers_of_the_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"only 'plane' is not in .*routers.yaml: choose one of topk"):
        compare_routers(ComparisonArguments(only=["plane"]))
