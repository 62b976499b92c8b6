"""These tests run scripts/collapse.py with tiny models, and check verdicts on made-up runs."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from experiments import collapse as experiment
from experiments.byte_models import Trained, model_config
from experiments.collapse import CURES_FILE, Cell, CollapseArguments, CollapseResult, Cure, load_cures
from experiments.collapse_table import has_collapsed, markdown, outcomes, sensitivity, verdicts
from experiments.intervals import ranking

from modeling_moe.utils.errors import UserError
from tests.builders import sample_text


ROOT = Path(__file__).parents[2]
CONTENT = {
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.0,
        "router_z_loss_coef": 0.0,
    },
    "learning_rates": [0.001, 0.01],
    "cures": [
        {"name": "balance", "varied": ["router_aux_loss_coef"], "coefficients": [0.01, 1.0], "source": "a"},
        {
            "name": "noise",
            "fields": {"router_type": "noisy_topk"},
            "varied": ["router_importance_loss_coef", "router_load_loss_coef"],
            "coefficients": [0.5],
            "source": "b|c",
        },
    ],
}


@pytest.fixture
def flags(tmp_path):
    """Returns flags for two cures, two learning rates, three steps and two seeds."""
    (tmp_path / "cures.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    (tmp_path / "words.txt").write_text(sample_text(), encoding="utf-8")
    return {
        "cures_file": tmp_path / "cures.yaml",
        "data": f"words={tmp_path / 'words.txt'}",
        "steps": 3,
        "batch_size": 2,
        "length": 16,
        "eval_batches": 2,
        "seeds": 2,
    }


def collapse(monkeypatch, flags) -> None:
    argv = ["collapse.py"]
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(ROOT / "scripts" / "collapse.py"), run_name="__main__")


def test_tables_picture_and_a_second_part_after_an_interruption(flags, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    files = {"runs_file": tmp_path / "r.jsonl", "plot": tmp_path / "c.png", "markdown": tmp_path / "c.md"}
    train, trained = experiment.train_cell, []

    def stop_at_third(cell, fields, seed, *args):
        trained.append((cell, seed, fields))
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(cell, fields, seed, *args)

    monkeypatch.setattr(experiment, "train_cell", stop_at_third)
    with pytest.raises(SystemExit) as exit_info:
        collapse(monkeypatch, flags | files)
    assert exit_info.value.code == 130
    collapse(monkeypatch, flags | files)
    assert trained[2] == trained[3] == (Cell("balance", 0.01, 0.001), 0, {"router_aux_loss_coef": 0.01})
    assert len(trained) == 1 + 2 * 8
    assert [seed for _, seed, _ in trained] == [0] * 9 + [1] * 8
    noise = {"router_type": "noisy_topk", "router_importance_loss_coef": 0.5, "router_load_loss_coef": 0.5}
    assert trained[-1] == (Cell("noise", 0.5, 0.01), 1, noise)
    assert files["plot"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = files["markdown"].read_text()
    header, _, balance, noisy, _, second, _, none, *_ = page.splitlines()
    assert header == "| cure | field | rate 0.001 | rate 0.01 | source |"
    assert balance.startswith("| balance | `router_aux_loss_coef` | ")
    assert noisy.endswith(r" | b\|c |")
    assert second == "| cure | coefficient | rate 0.001 | rate 0.01 |"
    assert none.startswith("| none |  | ")
    assert "/2) " in none
    assert "balance" in capsys.readouterr().out
    # a new coefficient alone is trained, and the table of the stored runs needs no text
    changed = flags["cures_file"].read_text().replace("- 1.0", "- 1.0\n  - 2.0")
    flags["cures_file"].write_text(changed)
    collapse(monkeypatch, flags | files)
    assert [cell.coefficient for cell, _, _ in trained[17:]] == [2.0] * 4
    # nothing is missing, so that no text is read
    monkeypatch.setattr(experiment, "load_corpus", lambda *args: pytest.fail("the text was read"))
    collapse(monkeypatch, flags | files)
    with pytest.raises(SystemExit):
        collapse(monkeypatch, flags | files | {"steps": 4})
    assert "holds runs with other arguments: name another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rates:", "rates:", "must contain 'model', 'learning_rates' and 'cures'"),
        ("- 0.001", "- 1e-3", "'learning_rates' must be a list of numbers (write 0.001, not 1e-3)"),
        ("- 0.5", "- many", "cure 2: 'coefficients' must be a list of numbers"),
        ("source: a", "sauce: a", "cure 1: it must have 'name', 'varied', 'coefficients' and 'source'"),
        ("source: a", "source: a\n  colour: red", "'colour' is unknown"),
        ("varied:", "varied: router_z_loss_coef #", "'varied' must be a list"),
        ("name: noise", "name: balance", "give each cure a different name"),
        ("name: noise", "name: none", "give each cure a different name"),
        ("router_load_loss_coef", "router_laod_loss_coef", "cure 'noise': MoEConfig has no field"),
        ("model:", "model: [", "is not YAML"),
    ],
)
def test_a_misspelt_file_is_refused_before_training(old, new, message, flags, monkeypatch, capsys):
    content = flags["cures_file"].read_text()
    assert old in content
    changed = content.replace(old, new, 1)
    if old == "varied:":
        changed = content.replace("varied:\n  - router_aux_loss_coef", "varied: router_aux_loss_coef", 1)
    flags["cures_file"].write_text(changed)
    monkeypatch.setattr(experiment, "train_cell", lambda *args: pytest.fail("a model was trained"))
    with pytest.raises(SystemExit) as exit_info:
        collapse(monkeypatch, flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="seeds is 1: it must be at least 2 to compute an interval"):
        CollapseArguments(seeds=1)
    with pytest.raises(UserError, match="only 'faith' is not in"):
        experiment.collapse_experiment(CollapseArguments(only=["faith"]))
    with pytest.raises(UserError, match=r"missing.yaml does not exist"):
        load_cures("missing.yaml")


def test_shipped_cures_are_valid():
    model, rates, cures = load_cures(str(CURES_FILE))
    assert len(rates) == 3
    assert len(cures) > 10
    plain = model_config(model, "model")
    assert plain.router_aux_loss_coef == plain.router_z_loss_coef == 0
    for cure in cures:
        for coefficient in cure.coefficients:
            config = model_config(model | cure.at(coefficient), cure.name)
            assert all(getattr(config, name) == coefficient for name in cure.varied)


def trained(loss: float, starved: float) -> Trained:
    return Trained("", 0.0, loss, 1.0, starved, 1.0, 1.5, 1.0, None, 0.0, [], [])


def test_verdicts_on_made_up_runs():
    cures = [
        Cure("works", ["router_z_loss_coef"], [1.0, 2.0], "s"),
        Cure("fails", ["router_aux_loss_coef"], [1.0], "s"),
    ]
    seeds = [0.0, 0.3, -0.2]
    noise = [[0.0, 0.001, -0.001], [0.001, -0.001, 0.0], [-0.001, 0.0, 0.001], [0.0, -0.001, 0.001]]
    cells = {
        Cell("none", 0.0, 0.1): (2.0, [0.5, 0.25, 0.625]),
        Cell("works", 1.0, 0.1): (1.9, [0.0, 0.249, 0.125]),
        Cell("works", 2.0, 0.1): (2.0, [0.0, 0.0, 0.25]),
        Cell("fails", 1.0, 0.1): (2.1, [0.5, 0.5, 0.5]),
    }
    runs = {
        cell: [trained(loss + seed + jitter, share) for seed, jitter, share in zip(seeds, row, shares, strict=True)]
        for (cell, (loss, shares)), row in zip(cells.items(), noise, strict=True)
    }
    result = CollapseResult(cures, [0.1], runs)
    found = outcomes(result)
    assert [found[cell].collapsed for cell in cells] == [3, 0, 1, 3]
    assert [found[cell].other_loss for cell in cells] == [False, True, False, True]
    assert [found[cell].other_share for cell in cells] == [False, True, True, False]
    assert found[Cell("works", 1.0, 0.1)].text == "12%* (0/3) -0.100*"
    assert found[Cell("none", 0.0, 0.1)].text == "46% (3/3) 2.033"
    assert verdicts(result) == [
        ["works", "`router_z_loss_coef`", "1", "s"],
        ["fails", "`router_aux_loss_coef`", "none", "s"],
    ]
    assert "| fails | 1 | 50% (3/3) +0.100* |" in markdown(result)
    # t of 6 degrees of freedom at 1 - 0.05 / 3 / 2 times the error of a difference of two means over three seeds
    half = 3.287 * ranking({str(cell): [run.held_out_loss for run in own] for cell, own in runs.items()}).deviation
    assert f"a difference of {half * (2 / 3) ** 0.5:.3f} nats, or of" in sensitivity(result)[0]
    assert has_collapsed(trained(1.0, 0.25))
    assert not has_collapsed(replace(trained(1.0, 0.25), starved_share=0.249))


def test_runs_without_cure_alone_have_no_differences():
    result = CollapseResult([], [0.1], {Cell("none", 0.0, 0.1): [trained(2.0, 0.5), trained(2.1, 0.0)]})
    assert outcomes(result)[Cell("none", 0.0, 0.1)].text == "25% (1/2) 2.050"


def test_runs_on_different_texts_are_refused(flags, tmp_path, monkeypatch, capsys):
    flags |= {"runs_file": tmp_path / "r.jsonl", "only": "noise"}
    collapse(monkeypatch, flags)
    lines = flags["runs_file"].read_text().splitlines()
    other = json.loads(lines[0])
    other["run"]["trained"]["text"] = "another"
    flags["runs_file"].write_text("\n".join([json.dumps(other), *lines[1:]]))
    with pytest.raises(SystemExit):
        collapse(monkeypatch, flags)
    assert "holds runs of seed 0 on different texts" in capsys.readouterr().err
