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
import torch
import yaml
from experiments import router_comparison as comparison
from experiments.router_comparison import (
    ComparisonArguments,
    Corpus,
    RouterEntry,
    batches,
    build,
    compare_routers,
    held_out_scores,
    load_entries,
    router_config,
    smoothed,
)

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
    """Returns flags for two routers, three steps and one domain."""
    (tmp_path / "routers.yaml").write_text(yaml.safe_dump({"model": MODEL, "routers": ENTRIES}, sort_keys=False))
    (tmp_path / "words.txt").write_text(sample_text(), encoding="utf-8")
    return {
        "routers_file": tmp_path / "routers.yaml",
        "data": f"words={tmp_path / 'words.txt'}",
        "steps": 3,
        "batch_size": 2,
        "length": 16,
        "eval_batches": 2,
    }


def compare(monkeypatch, flags) -> None:
    argv = ["compare_routers.py"]
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(ROOT / "scripts" / "compare_routers.py"), run_name="__main__")


def routers_of(path) -> list[dict]:
    return [{**router, "seconds": None} for router in json.loads(path.read_text())["routers"]]


def test_json_png_markdown_and_table(flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    files = {"output_json": tmp_path / "r.json", "plot": tmp_path / "r.png", "markdown": tmp_path / "r.md"}
    compare(monkeypatch, flags | files)
    plain, soft = routers_of(files["output_json"])
    assert (plain["causal"], soft["causal"]) == (True, False)
    assert (plain["mean_experts"], soft["mean_experts"]) == (2, 4)
    assert soft["max_vio"] == pytest.approx(0, abs=1e-6)
    assert plain["dropped_share"] > 0
    assert soft["dropped_share"] is None
    for router in (plain, soft):
        assert len(router["losses"]) == len(router["max_vios"]) == 3
        assert router["train_loss"] == pytest.approx(sum(router["losses"]) / 3)
        assert router["losses"][0] == pytest.approx(math.log(257), abs=0.2)
        assert 0 < router["token_entropy"] <= router["marginal_entropy"] + 1e-6 <= math.log(4) + 2e-6
    assert files["plot"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    header, rule, first, second = files["markdown"].read_text().splitlines()
    assert header == "| router | config line | causal | source | held-out | experts | MaxVio | H token / marginal |"
    assert rule.count("---") == 8
    assert first.startswith(r"| plain | `router_type='topk', capacity_factor=1.0` | yes | a\|b | ")
    assert f"| no | c | {soft['held_out_loss']:.3f} | {soft['mean_experts']:.1f} | {soft['max_vio']:.2f} |" in second
    assert f"{plain['train_loss']:.3f}" in capsys.readouterr().out


def test_seed_decides_and_processes_do_not(flags, tmp_path, monkeypatch):
    flags["only"] = "plain"
    for name, more in {"a": {}, "b": {}, "c": {"workers": 2}, "d": {"seed": 1}}.items():
        compare(monkeypatch, flags | more | {"output_json": tmp_path / name})
    a, b, c, d = (routers_of(tmp_path / name) for name in "abcd")
    assert len(a) == 1
    assert a == b == c
    assert a[0]["losses"] != d[0]["losses"]


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


@pytest.mark.parametrize("fields", [{"router_type": "noisy_topk"}, {"num_null_experts": 2}, {"num_shared_experts": 1}])
def test_models_share_all_weights_but_the_routers(fields):
    models = [build(router_config(MODEL, RouterEntry("", f, "")), MODEL, seed=3) for f in ({}, fields)]
    plain, other = (dict(model.named_parameters()) for model in models)
    shared = [name for name in plain if ".gate." not in name]
    assert len(shared) > 10
    for name in shared:
        assert torch.equal(plain[name], other[name]), name
    if fields.get("router_type") == "noisy_topk":
        assert not any(value.any() for name, value in other.items() if ".gate." in name)


def test_batches_are_sequences_of_the_text_whose_task_is_the_domain():
    domains = {"low": np.arange(100, dtype=np.uint8), "high": np.arange(100, 240, dtype=np.uint8)}
    args = ComparisonArguments(batch_size=3, length=8)
    drawn = list(batches(domains, args, 40, seed=0))
    ids, tasks = torch.cat([batch["input_ids"] for batch in drawn]), torch.cat([batch["task_ids"] for batch in drawn])
    assert tasks.tolist() == [0, 1] * 60
    assert torch.equal(ids, ids[:, :1] + torch.arange(8))
    assert torch.equal(ids >= 100, (tasks == 1)[:, None].expand_as(ids))
    assert len(set(ids[:, 0].tolist())) > 60


@pytest.mark.parametrize(("size", "entropy"), [(0.0, math.log(4)), (100.0, 0.0)])
def test_held_out_scores_of_a_router_whose_logits_are_known(size, entropy):
    model = build(router_config(MODEL, RouterEntry("", {}, "")), MODEL, seed=0)
    logits = torch.tensor([size, 0.0, -size, -size])
    for block in model.model.sparse_blocks():
        block.gate.logits = lambda states, context: logits.expand(len(states), 4)
    text = np.arange(200, dtype=np.uint8)
    args = ComparisonArguments(batch_size=2, length=16, eval_batches=2)
    scores = held_out_scores(model, Corpus({}, {"a": text}), args)
    assert scores["mean_experts"] == 2
    assert scores["max_vio"] == pytest.approx(1.0)
    assert scores["token_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert scores["marginal_entropy"] == pytest.approx(entropy, abs=1e-6)


def test_smoothed_is_the_mean_of_the_last_values():
    assert smoothed([1.0, 3.0, 8.0, 1.0], window=2).tolist() == pytest.approx([1.0, 2.0, 5.5, 4.5])


def test_runs_that_were_finished_were_run_again(flags, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs.jsonl"
    flags |= {"runs_file": runs, "output_json": tmp_path / "out.json"}
    train, trained = comparison.train_router, []

    def stop_at_second(entry, *args):
        trained.append(entry.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(entry, *args)

    monkeypatch.setattr(comparison, "train_router", stop_at_second)
    with pytest.raises(SystemExit) as exit_info:
        compare(monkeypatch, flags)
    assert exit_info.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"compare_routers.py: stopped: repeat the command to continue; finished runs are in {runs}"
    compare(monkeypatch, flags)
    assert trained == ["plain", "all to all", "all to all"]
    results = json.loads((tmp_path / "out.json").read_text())["routers"]
    (tmp_path / "out.json").unlink()
    runs.unlink()
    compare(monkeypatch, flags)
    for kept, new in zip(results, json.loads((tmp_path / "out.json").read_text())["routers"], strict=True):
        assert {name: value for name, value in kept.items() if name != "seconds"} == {
            name: value for name, value in new.items() if name != "seconds"
        }
    for change in ({"steps": 4}, {"seed": 1}):
        with pytest.raises(SystemExit):
            compare(monkeypatch, flags | change)
        assert "holds runs with other arguments: name another file" in capsys.readouterr().err
    runs.write_text("{}\n")
    with pytest.raises(SystemExit):
        compare(monkeypatch, flags)
    assert "does not hold a run in line 1: remove the line" in capsys.readouterr().err


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
