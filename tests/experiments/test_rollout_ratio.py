"""These tests run scripts/rollout_ratio.py with small models, and check what replay does to the ratio of a rollout."""

import json
import runpy
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "scripts" / "rollout_ratio.py"
SMALL = ["--num_hidden_layers", "2", "--answers", "16", "--answer_tokens", "24", "--seeds", "1"]


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *SMALL, *map(str, flags)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_replay_is_exact_and_makes_the_ratio_close_to_one(monkeypatch, tmp_path, capsys):
    file = tmp_path / "ratio.json"
    run(monkeypatch, "--families", "mixtral", "moe", "--output_json", file)
    results = json.loads(file.read_text())["results"]
    assert [one["family"] for one in results] == ["mixtral", "moe"]
    for one in results:
        without, replayed = one["without"], one["replayed"]
        assert 0.002 < without["different"] < 0.1
        assert replayed["different"] == 0
        assert replayed["flipped"] > 0.002
        assert replayed["variance"] < 0.3 * without["variance"]
        assert replayed["divergence"] < 0.3 * without["divergence"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "│ replayed" in line]
    assert [f"{one['replayed']['variance']:.2e}" in line for one, line in zip(results, lines, strict=True)] == [
        True,
        True,
    ]


def test_an_unknown_family_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--families", "llama")
    assert stop.value.code == 2
    assert "families: 'llama' is none of mixtral, qwen3_moe, moe" in capsys.readouterr().err
