"""These tests fine-tune with each means for long runs and with all of them, and resume each run, bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_moe.training import (
    CollapseError,
    DataArguments,
    FinetuneArguments,
    LongRunArguments,
    LoraArguments,
    ModelArguments,
    finetune,
)
from modeling_moe.utils.errors import UserError
from tests.builders import save_llama, tiny_model
from tests.training.families import tiny


SAMPLES = {"sample_steps": 2, "sample_prompts": ["the old", "Weg"], "sample_tokens": 4}
MEANS = {
    "roles": {"role_rates": ["router=0.5", "expert=sqrt_share"], "role_decays": ["attention=0.2"]},
    "load": {"role_rates": ["expert=load"]},
    "muon": {"muon": True, "role_rates": ["router=0.5"]},
    "average": {"router_average": 0.7},
    "samples": SAMPLES,
    "collapse": {"collapse_steps": 2, "collapse_patience": 4, "collapse_entropy": 0.01},
}
MEANS["all"] = {
    **{name: value for means in MEANS.values() for name, value in means.items()},
    "role_rates": ["router=0.5", "expert=load", "embedding=0.3"],
}
MODELS = {
    # with everything that draws random numbers or moves by itself
    "own": lambda: tiny_model(
        attention_dropout=0.1, router_jitter_noise=0.1, scoring_func="sigmoid", router_selection_bias=True,
        router_bias_update_rate=0.125,
    ),
    "mixtral": lambda: tiny("mixtral", vocab_size=300, router_aux_loss_coef=0.02, attention_dropout=0.1),
}  # fmt: skip


@pytest.fixture
def run(tokenizer, text_file, tmp_path):
    """Returns a function that fine-tunes a model for six steps, with a checkpoint after three, and returns the folder."""

    def start(model, means, output="out", lora=False, **fields):
        source = tmp_path / f"{model}_model"
        if not source.exists():
            MODELS[model]().save_pretrained(source)
            tokenizer.save_pretrained(source)
        options = {"max_steps": 6, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "weight_decay": 0.1}
        args = FinetuneArguments(
            str(tmp_path / output), learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **(options | fields),
        )  # fmt: skip
        finetune(
            ModelArguments(str(source), method="lora" if lora else "full", dtype="float32", eval_fraction=0.1),
            DataArguments([f"wiki={text_file}"], max_length=16),
            LoraArguments(lora_r=2),
            args,
            run_args=LongRunArguments(**MEANS.get(means, {})),
        )
        return tmp_path / output

    return start


def tensors(folder) -> dict[str, torch.Tensor]:
    """Returns all tensors of a checkpoint: weights, the optimizer's state, averages."""
    found = dict(load_file(folder / "model.safetensors"))
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    found |= {f"{number}.{key}": value for number, values in state.items() for key, value in values.items()}
    if (folder / "router_average.pt").is_file():
        average = torch.load(folder / "router_average.pt", weights_only=True)
        found |= {f"average.{name}": value for name, value in average.items()}
    return found


def log(folder) -> list[dict]:
    """Returns the log of a run, without times."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "_second" not in name}
        for entry in entries
    ]


@pytest.mark.parametrize(
    ("model", "means"),
    [
        ("own", "all"),
        ("mixtral", "all"),
        *(pytest.param("mixtral", means, marks=pytest.mark.slow) for means in MEANS if means != "all"),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_stopped(model, means, run, tmp_path):
    whole = run(model, means, "whole")
    (tmp_path / "parts").mkdir()
    shutil.copytree(whole / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    parts = run(model, means, "parts", resume_from_checkpoint="true")
    expected, found = tensors(whole / "checkpoint-6"), tensors(parts / "checkpoint-6")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    results = [load_file(folder / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert log(whole / "checkpoint-6") == log(parts / "checkpoint-6")
    assert json.loads((whole / "finetuning.json").read_text())["long_run"].keys() == MEANS[means].keys()


def test_samples_and_readings_do_not_change_the_training_and_the_others_do(run):
    plain = load_file(run("mixtral", "none", "none", eval_strategy="no") / "checkpoint-6" / "model.safetensors")
    for means in ("samples", "collapse", "average", "load", "muon"):
        weights = load_file(run("mixtral", means, means, eval_strategy="no") / "checkpoint-6" / "model.safetensors")
        equal = all(torch.equal(weights[name], plain[name]) for name in plain)
        assert equal == (means in ("samples", "collapse", "average")), means


def test_the_result_holds_the_averaged_routers_and_the_checkpoint_the_trained_ones(run):
    out = run("mixtral", "average")
    result, trained = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, out / "checkpoint-6"))
    average = torch.load(out / "checkpoint-6" / "router_average.pt", weights_only=True)
    for name, parameter in result.named_parameters():
        is_router = name in average
        assert torch.equal(parameter, average[name] if is_router else trained.get_parameter(name))
        assert not is_router or not torch.equal(parameter, trained.get_parameter(name))
    last = [entry["eval_wiki_loss"] for entry in log(out / "checkpoint-6") if "eval_wiki_loss" in entry][-1]
    assert last == pytest.approx(json.loads((out / "finetuning.json").read_text())["eval_loss"]["wiki"], abs=1e-6)


def test_groups_in_the_optimizer_of_a_run(run):
    state = torch.load(run("mixtral", "roles") / "checkpoint-6" / "optimizer.pt", weights_only=True)
    found = {(group["role"], group["initial_lr"], group["weight_decay"]) for group in state["param_groups"]}
    assert found == {
        ("other", 1e-2, 0.0), ("attention", 1e-2, 0.2), ("embedding", 1e-2, 0.1), ("router", 5e-3, 0.1),
        ("expert", 1e-2 * (2 / 12) ** 0.5, 0.1),
    }  # fmt: skip


def test_a_collapsed_run_ends_without_a_result(run, tmp_path, monkeypatch):
    monkeypatch.setitem(MEANS, "strict", {"collapse_steps": 1, "collapse_patience": 2, "collapse_violation": 0.01})
    with pytest.raises(
        CollapseError, match=r"step 2: the routing of layer_00 .* has collapsed in 2 readings in a row"
    ):
        run("mixtral", "strict")
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_lora_by_role_with_an_average(run, monkeypatch):
    monkeypatch.setitem(MEANS, "lora", {"role_rates": ["expert=share", "router=2"], "router_average": 0.7, **SAMPLES})
    out = run("mixtral", "lora", lora=True)
    state = torch.load(out / "checkpoint-6" / "optimizer.pt", weights_only=True)
    rates = {(group["role"], group["initial_lr"]) for group in state["param_groups"]}
    assert rates == {("attention", 1e-2), ("router", 2e-2), ("expert", 1e-2 * (2 / 12))}
    average = torch.load(out / "checkpoint-6" / "router_average.pt", weights_only=True)
    result = AutoModelForCausalLM.from_pretrained(out)
    for name, value in average.items():
        name = name.replace("base_model.model.", "").replace(".modules_to_save.default", "")
        assert torch.equal(result.get_parameter(name), value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"role_rates": ["gate=0.5"]},
            "role_rates 'gate=0.5': write ROLE=VALUE once for each role, of other, attention",
        ),
        ({"role_rates": ["router=1", "router=2"]}, "role_rates 'router=2': write ROLE=VALUE once"),
        ({"role_rates": ["router=fast"]}, "'fast' is no number and none of sqrt_share, share, load: write router=0.1"),
        ({"role_decays": ["expert=load"]}, "role_decays 'expert=load': 'load' is no number: write expert=0.1"),
        ({"role_rates": ["router=load"]}, "role_rates router=load: load is for experts, give a number"),
        ({"sample_steps": 5}, "sample_steps and sample_prompts need each other"),
        ({"router_average": 1.0}, "router_average is 1.0: it must be at least 0 and below 1"),
        ({"sample_tokens": 8}, "sample_tokens has no effect without sample_steps: give both or none"),
        ({"collapse_violation": 3.0}, "collapse_violation has no effect without collapse_steps: give both or none"),
        ({"collapse_steps": 0}, "collapse_steps is 0: it must be at least 1"),
        ({"sample_steps": 1, "sample_prompts": ["a"], "sample_tokens": 0}, "sample_tokens is 0"),
    ],
)
def test_mistakes_in_the_arguments(fields, message):
    with pytest.raises(UserError, match=message):
        LongRunArguments(**fields)


def test_mistakes_that_the_model_shows(run, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "llama", lambda: AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "llama")))
    monkeypatch.setitem(MEANS, "shared", {"role_rates": ["shared=2"]})
    for number, (model, means, fields, message) in enumerate(
        [
            ("mixtral", "shared", {}, "rate shared has no effect: the model trains no parameter of this role"),
            ("mixtral", "muon", {"optim": "sgd"}, "muon true replaces optim sgd: omit one of them"),
            ("mixtral", "muon", {"optim": "adamw_torch_8bit"}, "muon true replaces optim adamw_torch_8bit"),
            ("mixtral", "muon", {"lora": True}, "Muon cannot train an adapter"),
            ("mixtral", "load", {"lora": True}, "the optimizer does not step the experts' own weights"),
            ("llama", "collapse", {}, "collapse_steps has no effect: LlamaForCausalLM is a dense model"),
            ("llama", "average", {}, "router_average has no effect: the model trains no router"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            run(model, means, f"out{number}", **fields)
        assert not list((tmp_path / f"out{number}").glob("**/*.safetensors"))


def test_another_optimizer_does_not_go_on_from_a_checkpoint(run):
    run("mixtral", "none")
    with pytest.raises(
        UserError, match=r"optimizer.pt is not of this run's optimizer .*: give the flags of the first run"
    ):
        run("mixtral", "muon", resume_from_checkpoint="true")
