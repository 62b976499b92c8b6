"""These tests run scripts/upcycle.py, scripts/convert.py, scripts/resize.py and the scripts of the demo."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from modeling_moe import MoEForCausalLM
from modeling_moe.checkpoints import safetensors_format
from tests.builders import SHAPE, tiny_config


ROOT = Path(__file__).parents[2]
SIZE = SHAPE | {"intermediate_size": 48, "max_position_embeddings": 2048}


@pytest.fixture
def run(run_script):
    return run_script


@pytest.fixture
def dense(tmp_path):
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZE)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_dry_run_prints_the_plan_and_writes_nothing(run, dense, tmp_path):
    flags = ["--model_name_or_path", dense, "--output_dir", tmp_path / "moe", "--num_experts", 4, "--dry_run"]
    code, out, _ = run("upcycle.py", *flags)
    assert code == 0
    assert not (tmp_path / "moe").exists()
    run("upcycle.py", *flags[:-1])
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert config["num_experts"] == 4
    assert f"{model.num_parameters():,}" in out
    assert f"{model.config.num_active_params():,}" in out
    assert "computes the dense function │ yes" in out


def test_dry_run_gives_the_reason_for_another_function(run, dense, tmp_path):
    flags = ["--model_name_or_path", dense, "--output_dir", tmp_path / "moe", "--noise", "0.1", "--dry_run", "true"]
    assert "no: noise moves every expert" in run("upcycle.py", *flags)[1]


def test_convert(run, tmp_path):
    source = AutoModelForCausalLM.from_config(MixtralConfig(**SIZE, num_local_experts=4)).eval()
    source.save_pretrained(tmp_path / "mixtral")
    flags = ["--model_name_or_path", tmp_path / "mixtral", "--output_dir", tmp_path / "moe", "--target", "moe"]
    code, out, _ = run("convert.py", *flags)
    assert code == 0
    assert f"{source.num_parameters():,}" in out
    ids = torch.arange(3, 12)[None]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("upcycle.py", ["--num_experts", 65536], "num_experts is 65,536, 131,072 in all layers: at most 100,000 can"),
        ("upcycle.py", ["--num_experts", 10**6], "num_experts is 1000000"),
        ("upcycle.py", ["--num_experts", 10**15], "num_experts"),
        ("upcycle.py", ["--num_experts", 10**30], "num_experts"),
        ("upcycle.py", ["--verify", "true"], "tokenizer"),
        (
            "upcycle.py",
            ["--overwrite", "true", "--output_dir", "SOURCE"],
            "contain each other: choose another output_dir",
        ),
        (
            "convert.py",
            ["--overwrite", "true", "--output_dir", "PARENT"],
            "contain each other: choose another output_dir",
        ),
        ("resize.py", ["--overwrite", "true", "--output_dir", "SOURCE/x"], "has no sparse layer"),
        ("upcycle.py", ["--num_experts", "1"], "num_experts_per_tok is 2: it must lie between 1 and num_experts (1)"),
        ("upcycle.py", ["--num_experts", "many"], "invalid int value: 'many'"),
        ("upcycle.py", ["--num_expert", "4"], "did you mean 'num_experts'?"),
        ("upcycle.py", ["--dtype", "int3"], "dtype 'int3' is unknown"),
        ("upcycle.py", ["--model_name_or_path", "/nowhere"], "model_name_or_path '/nowhere': there is no such folder"),
        ("convert.py", ["--target", "gguf"], "target 'gguf' is unknown: it must be one of moe, auto, mixtral"),
        ("resize.py", [], "has no sparse layer: upcycle it first"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, dense, tmp_path, script, flags, message):
    places = {"SOURCE": dense, "PARENT": tmp_path, "SOURCE/x": dense / "x"}
    flags = [places.get(flag, flag) for flag in flags]
    code, _, err = run(script, "--model_name_or_path", dense, "--output_dir", tmp_path / "moe", *flags)
    complaint = [line for line in err.splitlines() if line.startswith(script)]
    assert code == 2
    assert len(complaint) == 1
    assert message in complaint[0]
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_full_output_dir_survives(run, dense, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("1")
    flags = ["--model_name_or_path", dense, "--output_dir", tmp_path / "moe"]
    code, _, err = run("upcycle.py", *flags)
    assert code == 2
    assert "is not empty: choose another, or pass --overwrite" in err
    code, _, err = run("upcycle.py", *flags, "--overwrite", "true")
    assert code == 2
    assert "holds precious, which no run of this package wrote" in err
    assert (tmp_path / "moe" / "precious").read_text() == "1"
    (tmp_path / "moe" / "precious").unlink()
    for _ in range(2):
        assert run("upcycle.py", *flags, "--overwrite", "true")[0] == 0


@pytest.mark.parametrize(("flag", "value"), [("--factor", 10**5), ("--factor", 10**30), ("--num_experts", 4 * 10**5)])
def test_a_vast_growth_is_refused_at_once(run, dense, tmp_path, flag, value):
    assert (
        run("upcycle.py", "--model_name_or_path", dense, "--output_dir", tmp_path / "moe", "--num_experts", 4)[0] == 0
    )
    flags = ["--model_name_or_path", tmp_path / "moe", "--output_dir", tmp_path / "larger", "--method", "grow"]
    start = time.monotonic()
    code, _, err = run("resize.py", *flags, flag, value)
    assert code == 2
    assert "num_experts" in err.splitlines()[-1]
    assert time.monotonic() - start < 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(run, dense, tmp_path, monkeypatch):
    flags = [
        "--model_name_or_path",
        dense,
        "--output_dir",
        tmp_path / "moe",
        "--num_experts",
        4,
        "--max_shard_size",
        "20KB",
    ]
    read, count = safetensors_format._read_rows, 0

    def stop(*arguments):
        nonlocal count
        count += 1
        if count > 20:
            raise KeyboardInterrupt
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_format, "_read_rows", stop)
        code, _, err = run("upcycle.py", *flags)
    assert code == 130
    assert "upcycle.py: stopped: give the same command again, it goes on after shard" in err.splitlines()[-1]
    assert run("upcycle.py", *flags)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_recipe_and_help(run, dense, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {dense}\noutput_dir: {tmp_path / 'moe'}\nnum_experts: 4\n")
    assert run("upcycle.py", recipe, "--num_experts", "6")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.num_experts == 6
    recipe.write_text(recipe.read_text().replace("num_experts", "num_exprts"))
    code, _, err = run("upcycle.py", recipe)
    assert code == 2
    assert "num_exprts" in err
    code, out, _ = run("upcycle.py", "--help")
    assert code == 0
    assert "python scripts/upcycle.py --model_name_or_path" in out


def test_demo_data_holds_out_what_it_does_not_train_on(run, tmp_path):
    assert run("demo_data.py", "--output_dir", tmp_path / "data")[0] == 0
    for domain in ("manual", "code"):
        train, held_out = (
            (tmp_path / "data" / f"{domain}_{part}.txt").read_text("utf-8") for part in ("train", "eval")
        )
        assert len(train) > 300_000
        paragraphs = [text for text in held_out.split("\n\n") if len(text) > 200]
        assert len(paragraphs) > 30
        assert not any(text in train for text in paragraphs)


def test_demo_data_from_a_file(run, tmp_path):
    lines = [f"line {i} of my own text\n" for i in range(5000)]
    (tmp_path / "mine.txt").write_text("".join(lines))
    assert run("demo_data.py", "--output_dir", tmp_path / "data", "--data", f"mine={tmp_path / 'mine.txt'}")[0] == 0
    train, held_out = (set((tmp_path / "data" / f"mine_{part}.txt").open()) for part in ("train", "eval"))
    assert train | held_out == set(lines)
    assert not train & held_out
    assert held_out


def scores(loss: float) -> dict:
    return {"wiki": {"loss": loss, "perplexity": 2.0, "bits_per_byte": 1.0, "expert_share": [0.5, 0.5]}}


def test_demo_report_refuses_an_upcycling_that_changed_the_loss(run, tmp_path):
    MoEForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    record = {"base_model": "/home/me/upcycled", "data": {"wiki": "/home/me/wiki_train.txt"}}
    (tmp_path / "model" / "finetuning.json").write_text(json.dumps(record))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "routing_load.png").write_bytes(b"picture")
    flags = ["--model_dir", tmp_path / "model", "--scores_dir", tmp_path, "--base_model", "some/base"]
    flags += ["--report_dir", tmp_path / "report", "--license", "mit", "--data_license", "PSF-2.0"]
    for stage, loss in (("dense", 3.0), ("before", 3.0), ("after", 2.5)):
        (tmp_path / f"{stage}.json").write_text(json.dumps(scores(loss)))
    code, out, _ = run("demo_report.py", *flags)
    assert code == 0
    assert "2.5000" in out
    card = (tmp_path / "model" / "README.md").read_text()
    assert "2.500" in card
    assert "| wiki | wiki_train.txt | PSF-2.0 |" in card
    assert "](assets/routing_load.png)" in card
    assert (tmp_path / "model" / "assets" / "routing_load.png").read_bytes() == b"picture"
    (tmp_path / "before.json").write_text(json.dumps(scores(3.01)))
    code, _, err = run("demo_report.py", *flags)
    assert code == 2
    assert "upcycling changed the loss on wiki by 0.0100" in err
