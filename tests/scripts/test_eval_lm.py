"""These tests run scripts/eval_lm.py on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.builders import tiny_model


SCRIPT = Path(__file__).parents[2] / "scripts" / "eval_lm.py"


def eval_lm(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["eval_lm.py", *map(str, flags)])
    monkeypatch.setenv("COLUMNS", "160")
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_scores_of_each_domain(checkpoint, text_file, tmp_path, monkeypatch, capsys):
    short, result = tmp_path / "short.txt", tmp_path / "scores.json"
    short.write_text("der Weg über die Brücke")
    flags = ["--model_name_or_path", checkpoint, "--data", f"a={text_file}", f"b={short}", "--max_length", 32]
    eval_lm(monkeypatch, *flags, "--output_json", result)
    scores = json.loads(result.read_text())
    assert set(scores) == {"a", "b"}
    assert len(scores["a"]["expert_share"]) == 5
    assert sum(scores["a"]["expert_share"]) == pytest.approx(1)
    assert scores["b"]["bytes"] <= len(short.read_bytes())
    output = capsys.readouterr().out
    assert f"{scores['a']['perplexity']:.3f}" in output
    assert f"{scores['b']['max_vio']:.3f}" in output
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".txt") == ["checkpoint", "scores.json"]

    eval_lm(monkeypatch, *flags, "--output_json", result)
    assert json.loads(result.read_text()) == scores


def test_dense_model_has_no_experts_columns(text_file, tokenizer, tmp_path, monkeypatch, capsys):
    tiny_model(mlp_layer_types=["dense"] * 3).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    eval_lm(monkeypatch, "--model_name_or_path", tmp_path / "dense", "--data", f"a={text_file}", "--max_length", 64)
    output = capsys.readouterr().out
    assert "bits per byte" in output
    assert "MaxVio" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "a=missing.txt"], "missing.txt does not exist"),
        (["--data", "a=b.txt", "a=c.txt"], "'a' twice"),
        (["--max_tokens", "3"], "max_tokens 3 is less than"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--max_length", "1"], "max_length is 1"),
        (["--max_length", "65"], "max_length is 65, more than the model's 64 positions"),
        (["--output_json", "/missing/folder/scores.json"], "make the folder"),
        (["--model_name_or_path", "/missing/model"], "/missing/model"),
    ],
)
def test_mistakes(flags, message, checkpoint, text_file, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_info:
        eval_lm(monkeypatch, "--model_name_or_path", checkpoint, "--data", f"a={text_file}", *flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
