"""These tests check upcycling of folders: equal functions, equal bytes, resuming after a kill, and early refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models import gemma2, gpt2, gpt_neox, llama, mistral, olmo2, phi3, qwen2, qwen3

from modeling_moe.upcycling import UpcyclingOptions, upcycle_checkpoint
from modeling_moe.utils.errors import UserError
from tests.builders import SHAPE, train_tokenizer


SIZE = SHAPE | {"pad_token_id": 0}
FAMILIES = {
    "llama": llama.LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True),
    "llama-tied": llama.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "mistral": mistral.MistralConfig(**SIZE, sliding_window=4),
    "qwen2": qwen2.Qwen2Config(**SIZE),
    "qwen3": qwen3.Qwen3Config(**SIZE, head_dim=12),
    "phi3": phi3.Phi3Config(**SIZE),
    "olmo2": olmo2.Olmo2Config(**SIZE),
    "gemma2": gemma2.Gemma2Config(**SIZE, head_dim=8, sliding_window=4),
    "gpt2": gpt2.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=40),
    "gpt_neox": gpt_neox.GPTNeoXConfig(**{k: v for k, v in SIZE.items() if k != "num_key_value_heads"}),
}
IDS = torch.arange(3, 21).view(2, 9)


def save_source(name, folder, dtype=torch.float32, config=None):
    model = AutoModelForCausalLM.from_config(config or FAMILIES[name]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key or "bias" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    # eager attention, because sdpa omits Gemma 2's soft cap in transformers 5.17
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 5, "num_experts_per_tok": 3},
        {"num_experts": 16, "num_experts_per_tok": 8, "granularity": 4},
        {"num_experts": 5, "num_experts_per_tok": 3, "shared_expert": True, "noise": 0.1, "norm_topk_prob": False},
    ],
    ids=["copy", "virtual groups", "shared"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_modes_equal_the_dense_model(name, options, tmp_path):
    source = save_source(name, tmp_path / "dense")
    plan, _ = upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions(**options))
    assert plan.reason_not_exact is None
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(model.eval()(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)
    assert plan.params == model.num_parameters()
    assert plan.bytes_on_disk == sum(t.nbytes for t in load_file(tmp_path / "moe" / "model.safetensors").values())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "moe"]


def test_several_sources(tmp_path):
    sources = [save_source("llama", tmp_path / name) for name in ("math", "code", "law")]
    options = UpcyclingOptions(
        num_experts=3,
        sources=[str(tmp_path / "code"), str(tmp_path / "law")],
        source_weights=[0.5, 0.25, 0.25],
    )
    upcycle_checkpoint(str(tmp_path / "math"), tmp_path / "moe", options)
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    name = "mlp.down_proj.weight"
    for expert, source in enumerate(sources):
        dense = source.state_dict()[f"model.layers.1.{name}"]
        assert torch.equal(tensors[f"model.layers.1.{name.replace('mlp.', f'mlp.experts.{expert}.')}"], dense)
    first, *rest = (source.model.embed_tokens.weight for source in sources)
    torch.testing.assert_close(tensors["model.embed_tokens.weight"], 0.5 * first + 0.25 * rest[0] + 0.25 * rest[1])


def test_sources_that_do_not_fit(tmp_path):
    save_source("qwen2", tmp_path / "first")
    save_source(None, tmp_path / "second", config=qwen2.Qwen2Config(**SIZE | {"vocab_size": 98}))
    options = UpcyclingOptions(num_experts=2, sources=[str(tmp_path / "second")])
    with pytest.raises(UserError, match=r"vocab_size is 98 in .*second"):
        upcycle_checkpoint(str(tmp_path / "first"), tmp_path / "moe", options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "second"]


@pytest.fixture
def with_text(tmp_path):
    """Makes a dense model with a tokenizer, and two domains of text."""
    tokenizer = train_tokenizer()
    save_source(None, tmp_path / "dense", config=llama.LlamaConfig(**SIZE | {"vocab_size": len(tokenizer)}))
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "a.txt").write_text("a router decides which expert a token is sent to. " * 40)
    (tmp_path / "b.txt").write_text("def load(path): return open(path).read() " * 40)
    return {"calibration_data": [f"{name}={tmp_path / name}.txt" for name in "ab"], "calibration_tokens": 200}


@pytest.mark.parametrize("router", ["text", "kmeans", "ridge"])
def test_measured_routers_and_verification(with_text, router, tmp_path):
    options = UpcyclingOptions(num_experts=4, router_init=router, **with_text)
    _, verification = upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", options, check=True)
    assert verification.largest_difference < 1e-4
    assert verification.source_loss == pytest.approx(verification.result_loss, abs=1e-5)
    rows = load_file(tmp_path / "moe" / "model.safetensors")["model.layers.0.mlp.gate.weight"]
    random = UpcyclingOptions(num_experts=4)
    upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "random", random)
    assert not torch.equal(
        rows, load_file(tmp_path / "random" / "model.safetensors")["model.layers.0.mlp.gate.weight"]
    )


def test_wrong_result_is_not_kept(with_text, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_moe.upcycling.upcycle.TOLERANCE", 0.0)
    with pytest.raises(UserError, match="the logits of the result differ from"):
        upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions(), check=True)
    assert not (tmp_path / "moe").exists()


def test_seeds(tmp_path):
    save_source("llama-tied", tmp_path / "dense")
    results = []
    for run, options in enumerate([{"seed": 7}, {"seed": 7}, {"seed": 8}, {"seed": 7, "num_experts": 6}]):
        options = UpcyclingOptions(noise=0.1, **({"num_experts": 5} | options))
        upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / str(run), options)
        results.append(load_file(tmp_path / str(run) / "model.safetensors"))
    first, same, other, more = results
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name in ("model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.3.up_proj.weight"):
        assert not torch.equal(first[name], other[name])
    # the noise of an expert depends only on that expert's seed
    assert all(torch.equal(first[name], more[name]) for name in first if ".experts." in name)


def test_router_gets_gradient_from_the_first_step(tmp_path):
    save_source("llama-tied", tmp_path / "dense")
    upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions(noise=0.1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").train()
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.model.layers)


def test_bf16_is_bitwise_the_dense_model(tmp_path):
    source = save_source("llama-tied", tmp_path / "dense", torch.bfloat16)
    # the weighted sum of several experts is rounded
    options = UpcyclingOptions(num_experts=4, num_experts_per_tok=1)
    upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", options)
    arguments = {"dtype": torch.bfloat16, "experts_implementation": "eager", "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", **arguments)
    assert {p.dtype for name, p in model.named_parameters() if "mlp.gate." not in name} == {torch.bfloat16}
    assert torch.equal(model(IDS).logits, source(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3: it must lie between 1 and"),
        ({"method": "magic"}, "method 'magic' is unknown: it must be one of copy"),
        ({"noise": -1.0}, "noise is -1.0: it must be 0 or positive"),
        ({"router_init": "ridge"}, "router_init='ridge' measures the dense model on text: give calibration_data"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, options, message):
    save_source("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions(**options))
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_sparse_source_is_refused(tmp_path):
    save_source(None, tmp_path / "moe", config=MixtralConfig(**SIZE, num_local_experts=4))
    with pytest.raises(UserError, match="model_type 'mixtral' cannot be upcycled: it must be one of"):
        upcycle_checkpoint(str(tmp_path / "moe"), tmp_path / "again", UpcyclingOptions())


SCRIPT = Path(__file__).parents[2] / "scripts" / "upcycle.py"


@pytest.mark.slow
def test_killed_run_goes_on(tmp_path):
    """After SIGKILL in the middle of the script, the repeated command ends with the bytes of an uninterrupted run."""
    config = llama.LlamaConfig(**SIZE | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6})
    save_source(None, tmp_path / "dense", config=config)
    flags = ["--model_name_or_path", tmp_path / "dense", "--num_experts", "8", "--max_shard_size", "30MB"]
    flags += ["--attention_experts", "3"]
    command = [sys.executable, SCRIPT, *map(str, flags), "--noise", "0.1", "--output_dir"]
    partial = tmp_path / ".moe.partial"
    process = subprocess.Popen([*command, str(tmp_path / "moe")], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(partial.glob("*.safetensors"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "moe").exists()
    listed = (partial / "SHA256SUMS").read_text().split()[1::2]
    kept = {name: os.stat(partial / name).st_ino for name in listed}
    assert len(kept) >= 2
    for output in ("moe", "whole"):
        subprocess.run([*command, str(tmp_path / output)], check=True, capture_output=True)
    assert {name: os.stat(tmp_path / "moe" / name).st_ino for name in kept} == kept
    files = {file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*") if file.is_file()}
    assert files == {file.relative_to(tmp_path / "moe") for file in (tmp_path / "moe").rglob("*") if file.is_file()}
    assert all((tmp_path / "moe" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes() for file in files)
    assert json.loads((tmp_path / "moe" / "conversion.json").read_text())["recipe"]["options"]["noise"] == 0.1
    assert not partial.exists()
