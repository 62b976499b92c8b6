"""Dense checkpoints upcycled: the same function where that is claimed, reproducible, whole or not there."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import llama, mistral, qwen2, qwen3

from modeling_moe.cli import UserError
from modeling_moe.conversion import to_moe
from modeling_moe.files import whole_folder
from modeling_moe.upcycling import UpcyclingOptions, make_plan, upcycle, upcycle_checkpoint


SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": llama.LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True),
    "llama-tied": llama.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "mistral": mistral.MistralConfig(**SIZE, sliding_window=4),
    "qwen2": qwen2.Qwen2Config(**SIZE),
    "qwen3": qwen3.Qwen3Config(**SIZE, head_dim=12),
}
IDS = torch.arange(3, 21).view(2, 9)


def source_model(name: str):
    model = AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "bias" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def upcycled(source, **options):
    options = UpcyclingOptions(**({"num_experts": 5, "num_experts_per_tok": 3} | options))
    return upcycle(to_moe(source), make_plan(source.config, options, torch.float32).config, options)


@pytest.mark.parametrize(
    "options",
    [{}, {"shared_expert": True}, {"shared_expert": True, "noise": 0.1, "norm_topk_prob": False}, {"router_std": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_modes_equal_the_dense_model(name, options):
    source = source_model(name)
    model = upcycled(source, **options)
    assert UpcyclingOptions(**options).inexactness() == ""
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)
    assert model.config.num_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"norm_topk_prob": False}], ids=str)
def test_inexact_modes_say_so(options):
    source = source_model("llama")
    assert UpcyclingOptions(**options).inexactness() != ""
    assert (upcycled(source, **options)(IDS).logits - source(IDS).logits).abs().max() > 1e-3


def test_noise_is_relative_to_each_weight():
    source = source_model("llama-tied")
    experts = upcycled(source, noise=0.1).model.layers[1].mlp.experts
    dense = source.model.layers[1].mlp
    moved = experts.down_proj - dense.down_proj.weight
    torch.testing.assert_close(moved.std() / dense.down_proj.weight.std(), torch.tensor(0.1), atol=0.01, rtol=0)
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


def test_shared_expert_is_the_dense_network():
    source = source_model("llama")
    block = upcycled(source, shared_expert=True).model.layers[0].mlp
    assert torch.equal(block.shared_experts.down_proj.weight, source.model.layers[0].mlp.down_proj.weight)
    assert not block.experts.down_proj.any()
    assert not block.experts.down_proj_bias.any()


def test_seeds():
    source = source_model("llama-tied")
    first, same, other = (upcycled(source, noise=0.1, seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], same[name]) for name in first)
    name = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.1.mlp.gate.weight"])
    # an expert's noise depends on its own seed alone: more experts leave the first ones as they are
    more = upcycled(source, noise=0.1, seed=7, num_experts=6).state_dict()
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(more[name][:5], first[name])


def test_router_gets_gradient_from_the_first_step():
    model = upcycled(source_model("llama-tied"), noise=0.1).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.mlp.gate.weight.grad.abs().max() > 0 for layer in model.model.layers)


def test_checkpoint_folder(tmp_path):
    source = source_model("llama-tied")
    source.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer_config.json").write_text('{"any": "thing"}')
    options = UpcyclingOptions(num_experts=4, num_experts_per_tok=2)
    upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", options)
    assert (tmp_path / "moe" / "tokenizer_config.json").read_text() == '{"any": "thing"}'
    assert {"modeling_moe.py", "routing.py"} <= {file.name for file in (tmp_path / "moe").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    torch.testing.assert_close(model(IDS).logits, source(IDS).logits, atol=1e-5, rtol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "moe"]


def test_bf16_stays_bf16(tmp_path):
    source_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions(num_experts=4))
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(tmp_path / "moe").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3: it must lie between 1 and"),
        ({"method": "magic"}, "method 'magic' is unknown: it must be one of copy"),
        ({"noise": -1.0}, "noise is -1.0: it must be 0 or positive"),
    ],
)
def test_bad_options_leave_nothing(tmp_path, options, message):
    source_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions(**options))
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_sparse_source_is_refused():
    from transformers import MixtralConfig

    with pytest.raises(UserError, match="model_type 'mixtral' cannot be upcycled: it must be one of llama"):
        make_plan(MixtralConfig(), UpcyclingOptions(), torch.float32)


def test_crash_while_writing_leaves_nothing(tmp_path, monkeypatch):
    source_model("llama").save_pretrained(tmp_path / "dense")

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modeling_moe.upcycling.run.copy_companions", disk_full)
    with pytest.raises(OSError, match="No space left"):
        upcycle_checkpoint(str(tmp_path / "dense"), tmp_path / "moe", UpcyclingOptions())
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_failed_replacement_keeps_what_was_there(tmp_path, monkeypatch):
    """Overwriting fails at the last moment, when the old folder has already stepped aside."""
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("1")
    rename = Path.rename

    def fails_for_the_new_one(path, target):
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="Input/output"), whole_folder(tmp_path / "moe", overwrite=True) as folder:
        (folder / "new").write_text("2")
    assert [file.name for file in tmp_path.rglob("*")] == ["moe", "precious"]
