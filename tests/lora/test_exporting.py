"""These tests export saved adapters for servers, and compare the exported files with the trained model by plain arithmetic."""

import json
import logging
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)

from modeling_moe import MoEForCausalLM
from modeling_moe.conversion import convert_checkpoint
from modeling_moe.lora import Comparison, ExportAdapterArguments, export_adapter, moe_lora_config
from modeling_moe.lora.export_check import _refuse_other
from modeling_moe.utils.errors import Interrupted, UserError
from tests.builders import tiny_config
from tests.lora.checkpoints import IDS, TARGETS, build, fill


SCRIPT = Path(__file__).parents[2] / "scripts" / "export_adapter.py"
ALL = ["q_proj", "v_proj", "o_proj"]
EXPERTS = {"target_modules": ALL, "target_parameters": TARGETS}


def our_model(**fields):
    """Returns a model that every target can hold, with rows of experts that a scale and a rename change."""
    defaults = {
        "vocab_size": 64,
        "mlp_layer_types": ["sparse"] * 3,
        "routed_scaling_factor": 2.0,
        "norm_topk_prob": True,
    }
    return MoEForCausalLM(tiny_config(**(defaults | fields)))


def save_adapter(folder: Path, kind: str, zero: bool = False, dtype=torch.float32, model=None, **fields) -> None:
    """Saves a base model and an adapter on it."""
    model = model or (our_model() if kind == "moe" else build(kind))
    model.to(dtype).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    adapted = get_peft_model(base, LoraConfig(**({"r": 2, "lora_alpha": 3} | EXPERTS | fields)))
    if not zero:
        fill(adapted, 0.2, only="lora_")
    adapted.save_pretrained(folder / "adapter")


def export(folder: Path, **fields):
    arguments = {"model_name_or_path": str(folder / "adapter"), "output_dir": str(folder / "out")}
    return export_adapter(ExportAdapterArguments(**(arguments | fields)))


def trained_logits(folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder / "adapter").eval()(IDS).logits


def by_hand(served: Path, adapter: Path) -> torch.Tensor:
    """Returns the logits of a served model whose tensors on disk have each exported update added one by one."""
    weights = load_file(served / "model.safetensors")
    factors, config = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    for key, a in factors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            b = factors[key.replace(".lora_A.", ".lora_B.")]
            weights[name] = weights[name].float() + config["lora_alpha"] / config["r"] * b.float() @ a.float()
    copy = served.parent / "by_hand"
    copy.mkdir()
    (copy / "config.json").write_text((served / "config.json").read_text())
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_merged(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, trained_logits(folder), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_factors_by_expert_add_up_to_the_trained_model(kind, tmp_path):
    model = deepseek() if kind == "deepseek_v3" else None
    targets = ["q_a_proj", "q_b_proj", "o_proj"] if model else ALL
    save_adapter(tmp_path, kind, model=model, target_modules=targets)
    found = export(tmp_path)
    assert found.change > 1e-2
    assert found.served_change == pytest.approx(found.change, rel=1e-3)
    torch.testing.assert_close(
        by_hand(tmp_path / "base", tmp_path / "out"), trained_logits(tmp_path), atol=2e-5, rtol=1e-5
    )


def deepseek():
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=1,
        head_dim=4,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    fill(model, 0.3)
    return model


def test_names_ranks_and_fields_are_those_that_servers_read(tmp_path):
    save_adapter(tmp_path, "mixtral", rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 5})
    export(tmp_path, server="sglang")
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0"
    assert factors[f"{prefix}.block_sparse_moe.experts.3.w1.lora_A.weight"].shape == (4, 16)
    assert factors[f"{prefix}.block_sparse_moe.experts.3.w2.lora_B.weight"].shape == (16, 4)
    assert {tensor.shape[0] for key, tensor in factors.items() if "lora_A" in key} == {4}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # servers fuse q, k and v, and fail where one of them has no factors
    assert not factors[f"{prefix}.self_attn.k_proj.lora_B.weight"].any()
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    assert not {"rank_pattern", "alpha_pattern", "target_parameters"} & set(config)
    torch.testing.assert_close(
        by_hand(tmp_path / "base", tmp_path / "out"), trained_logits(tmp_path), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("target", "fields"), [
    ("mixtral", {}),
    ("qwen3_moe", {"qk_norm": "head"}),
    ("qwen2_moe", {"norm_topk_prob": False, "head_dim": 8, "num_shared_experts": 1}),
])  # fmt: skip
def test_an_adapter_follows_its_base_model_to_another_family(target, fields, tmp_path):
    """The scale of the routed experts, and the doubled shared expert of Qwen2-MoE, are folded into factors too."""
    shared = {
        "target_parameters": TARGETS,
        "target_modules": [*ALL, "shared_experts.down_proj", "shared_experts.up_proj"],
    }
    more = shared if "num_shared_experts" in fields else {}
    save_adapter(tmp_path, "moe", model=our_model(**fields), **more)
    convert_checkpoint(str(tmp_path / "base"), tmp_path / "served", target)
    found = export(tmp_path, server="llama.cpp", served_model=str(tmp_path / "served"))
    assert found.error < 1e-4
    got = by_hand(tmp_path / "served", tmp_path / "out")
    torch.testing.assert_close(got, trained_logits(tmp_path), atol=3e-5, rtol=1e-5)


def test_an_adapter_on_gpt_oss_is_written_for_vllm_in_its_own_stacked_form(tmp_path):
    save_adapter(tmp_path, "gpt_oss")
    assert export(tmp_path).error < 1e-4
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    experts = "base_model.model.model.layers.0.mlp.experts"
    assert factors[f"{experts}.base_layer.lora_B.weight"].shape == (16, 8)
    assert factors[f"{experts}.lora_A.weight"].shape == (8, 8)
    for server in ("sglang", "llama.cpp"):
        with pytest.raises(UserError, match=r"has no adapter on .*experts.*: write a merged model with --merged true"):
            export(tmp_path, server=server, overwrite=True)


def test_an_adapter_on_gpt_oss_follows_it_to_this_packages_model(tmp_path):
    config = GptOssConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    fill(model, 0.3)
    save_adapter(tmp_path, "gpt_oss", model=model)
    convert_checkpoint(str(tmp_path / "base"), tmp_path / "served", "moe")
    export(tmp_path, served_model=str(tmp_path / "served"), merged=True)
    assert_merged(tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_served_model_can_be_written_with_the_adapter_merged(kind, tmp_path):
    save_adapter(tmp_path, kind)
    export(tmp_path, merged=True, server="llama.cpp")
    assert_merged(tmp_path)


def test_a_merged_model_in_16_bits_is_rounded_once(tmp_path):
    save_adapter(tmp_path, "qwen3_moe", dtype=torch.bfloat16)
    found = export(tmp_path, merged=True)
    assert found.error < 1e-5 * found.change
    assert 0 < found.rounding < found.change
    merged = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.experts.1.down_proj.weight"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    expected = exact.model.layers[0].mlp.experts.down_proj[1]
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, expected.bfloat16())


@pytest.mark.parametrize("fault", ["scaled", "written"])
def test_a_merge_in_16_bits_that_is_a_little_wrong_is_refused(fault, tmp_path, monkeypatch):
    """Rounding to 16 bits changes the logits by more than either fault does, so no bound on the logits alone finds them."""
    from modeling_moe.lora import exporting

    save_adapter(tmp_path, "qwen3_moe", dtype=torch.bfloat16, target_modules=[])
    merged, write = exporting._merged, exporting.write_checkpoint
    if fault == "scaled":
        monkeypatch.setattr(exporting, "_merged", lambda update, w: merged(replace(update, scaling=1.6), w))
    else:

        def faulty(folder, state, *args, **kwargs):
            name = "model.layers.1.mlp.experts.2.up_proj.weight"
            write(folder, state | {name: state[name].map(lambda w: w + 0.004 * (w == w.max()))}, *args, **kwargs)

        monkeypatch.setattr(exporting, "write_checkpoint", faulty)
    message = "the result differs by" if fault == "scaled" else "experts.2.up_proj.weight of the merged model is not"
    with pytest.raises(UserError, match=message):
        export(tmp_path, merged=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_rounding_hides_is_not_merged(tmp_path):
    save_adapter(tmp_path, "qwen3_moe", dtype=torch.bfloat16, lora_alpha=0.002)
    with pytest.raises(UserError, match=r"rounding the merged weights .*: serve the adapter without merging it"):
        export(tmp_path, merged=True)
    assert not (tmp_path / "out").exists()
    assert export(tmp_path).error < 0.02 * export(tmp_path, overwrite=True).change


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="are not finite"):
        _refuse_other(Comparison(float("nan"), 1.0, 0.0, 0.0), 1.0, "adapter")


def test_a_merged_model_has_the_weights_of_the_served_model_and_not_of_the_base_model(tmp_path):
    save_adapter(tmp_path, "qwen3_moe")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    served.save_pretrained(tmp_path / "served")
    export(tmp_path, merged=True, served_model=str(tmp_path / "served"), verify=False)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    exact = load_file(tmp_path / "base" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(weights["model.norm.weight"], exact.bfloat16())


def test_a_served_model_of_another_size_is_refused_without_a_comparison(tmp_path):
    save_adapter(tmp_path, "qwen3_moe")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "base").config
    config.moe_intermediate_size = 12
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    for merged in (True, False):
        with pytest.raises(
            UserError, match=r"has .*experts.0.* with the shape .*12.*, and the adapter updates one with .*8"
        ):
            export(tmp_path, served_model=str(tmp_path / "wide"), verify=False, merged=merged)
        assert not (tmp_path / "out").exists()


def test_a_merged_model_gets_the_tokenizer_and_the_record_of_the_adapter(tmp_path, tokenizer):
    save_adapter(tmp_path, "qwen3_moe")
    for name, template in (("base", "old"), ("adapter", "new")):
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    (tmp_path / "adapter" / "finetuning.json").write_text("{}")
    export(tmp_path, merged=True, verify=False)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "new"
    assert (tmp_path / "out" / "finetuning.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(
        AutoTokenizer.from_pretrained(tmp_path / "base")
    )


def test_an_interrupted_merge_does_not_go_on_with_another_adapter(tmp_path, monkeypatch):
    from modeling_moe.lora import exporting

    save_adapter(tmp_path, "qwen3_moe")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_bring_along", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted):
            export(tmp_path, merged=True, verify=False)
    assert not (tmp_path / "out").exists()
    save_adapter(tmp_path, "qwen3_moe", lora_alpha=7)
    with pytest.raises(UserError, match="overwrite"):
        export(tmp_path, merged=True, verify=False)
    export(tmp_path, merged=True, verify=False, overwrite=True)
    assert_merged(tmp_path)


@pytest.mark.parametrize("merged", [True, False])
def test_only_an_earlier_result_is_replaced(merged, tmp_path, monkeypatch):
    from modeling_moe.lora import exporting

    save_adapter(tmp_path, "qwen3_moe")
    export(tmp_path, merged=merged, verify=False)
    with pytest.raises(UserError, match=r"output_dir .* is not empty: .* pass --overwrite"):
        export(tmp_path, merged=merged, verify=False)

    def files():
        return {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "compare", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            export(tmp_path, merged=merged, overwrite=True)
    assert files() == before
    export(tmp_path, merged=merged, verify=False, overwrite=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        export(tmp_path, merged=merged, verify=False, overwrite=True)
    for source in ("base", "adapter"):
        with pytest.raises(UserError, match="contain each other"):
            export(tmp_path, merged=merged, overwrite=True, output_dir=str(tmp_path / source / "out"))


def test_a_merged_model_leaves_out_the_layers_that_predict_further_tokens_with_one_sentence(tmp_path, caplog):
    save_adapter(tmp_path, "moe")
    save_file({"mtp.norm.weight": torch.ones(3)}, tmp_path / "base" / "mtp.safetensors")
    ours = logging.getLogger("modeling_moe")
    ours.addHandler(caplog.handler)
    export(tmp_path, merged=True, verify=False)
    ours.removeHandler(caplog.handler)
    assert "The merged model gets no layers that predict further tokens" in caplog.text
    assert not (tmp_path / "out" / "mtp.safetensors").exists()


def test_a_family_that_stores_all_experts_in_one_tensor_gets_a_short_sentence(tmp_path):
    save_adapter(tmp_path, "moe")
    convert_checkpoint(str(tmp_path / "base"), tmp_path / "served", "granitemoeshared")
    with pytest.raises(
        UserError, match=r"input_linear.weight of the served model is made of \d+ tensors .*convert"
    ) as caught:
        export(tmp_path, served_model=str(tmp_path / "served"), merged=True)
    assert len(str(caught.value)) < 400


def test_an_untrained_adapter_is_refused(tmp_path):
    save_adapter(tmp_path, "qwen3_moe", zero=True)
    with pytest.raises(UserError, match=r"each lora_B in .* is zero, so the adapter changes nothing"):
        export(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["dropped", "doubled", "renamed"])
def test_an_export_that_changes_the_model_otherwise_is_refused(damage, tmp_path, monkeypatch):
    """The check reads the written files, so a fault of the writer cannot hide from it."""
    from modeling_moe.lora import exporting

    write = exporting._write_tensors

    def faulty(file, state):
        write(file, state)
        factors = load_file(file)
        for key in [key for key in factors if ".experts." in key and ".lora_B." in key]:
            other = key.replace(".experts.0.", ".experts.1.") if ".experts.0." in key else key
            faults = {"dropped": 0 * factors[key], "doubled": 2 * factors[key], "renamed": factors[other]}
            factors[key] = faults[damage].clone()
        save_file(factors, file, {"format": "pt"})

    monkeypatch.setattr(exporting, "_write_tensors", faulty)
    save_adapter(tmp_path, "qwen3_moe", target_modules=[])
    message = "changes no logit of the served model" if damage == "dropped" else "the result differs by"
    with pytest.raises(UserError, match=message):
        export(tmp_path)
    assert not (tmp_path / "out").exists()


REFUSED = {
    "router": (
        {"modules_to_save": ["mlp.gate"]},
        r"trains modules that are trained in full \(modules_to_save: mlp.gate\)",
    ),
    "low-rank router": (
        {"target_parameters": [*TARGETS, "mlp.gate.weight"]},
        r"vllm has no adapter on .*mlp.gate.weight",
    ),
    "head": ({"target_modules": ["lm_head"]}, r"trains the embedding or head lm_head"),
    "embedding": ({"target_modules": ["embed_tokens"]}, r"trains the embedding or head model.embed_tokens"),
    "dora": ({"target_parameters": None, "use_dora": True}, r"trains the magnitudes of DoRA"),
    "bias": ({"bias": "lora_only"}, r"trains biases \(bias: lora_only\)"),
    "rank": ({"r": 513, "target_parameters": None}, r"rank 513 .* is above 512"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_server_loads_is_refused_by_name(name, tmp_path):
    fields, message = REFUSED[name]
    save_adapter(tmp_path, "qwen3_moe", **fields)
    with pytest.raises(UserError, match=message) as caught:
        export(tmp_path, verify=False)
    assert "moe merge_adapter" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_our_recipe_with_routers_names_the_remedy_and_without_them_is_exported(tmp_path):
    our_model().save_pretrained(tmp_path / "base")
    convert_checkpoint(str(tmp_path / "base"), tmp_path / "served", "mixtral")
    for router in (True, False):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapted = get_peft_model(base, moe_lora_config(base, r=6, router=router, rank_per="token"))
        fill(adapted, 0.2, only="lora_")
        adapted.save_pretrained(tmp_path / "adapter")
        if router:
            with pytest.raises(UserError, match=r"modules_to_save: mlp.gate.*moe merge_adapter"):
                export(tmp_path, served_model=str(tmp_path / "served"))
    export(tmp_path, served_model=str(tmp_path / "served"))
    got = by_hand(tmp_path / "served", tmp_path / "out")
    torch.testing.assert_close(got, trained_logits(tmp_path), atol=3e-5, rtol=1e-5)


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    save_adapter(tmp_path, "moe", model=our_model())
    with pytest.raises(UserError, match=r"vllm has no adapters on a model of the type moe: convert .* --merged true"):
        export(tmp_path)
    build("qwen3").save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="served_model is a qwen3, to which no model can be converted"):
        export(tmp_path, served_model=str(tmp_path / "dense"))
    build("mixtral").save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="as --base_model"):
        export(tmp_path, base_model=str(tmp_path / "other"))


def test_a_served_model_of_other_weights_is_refused(tmp_path):
    save_adapter(tmp_path, "qwen3_moe")
    other = build("qwen3_moe")
    fill(other, 0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"differ by .* without any adapter"):
        export(tmp_path, served_model=str(tmp_path / "other"))


def test_memory_holds_the_factors_of_one_matrix(tmp_path, monkeypatch):
    """Writing reads the second factors of each matrix once and in a row, however many experts share them."""
    from modeling_moe.lora import factors

    reads = []
    read = factors.Factors.read_b
    monkeypatch.setattr(factors.Factors, "read_b", lambda self: reads.append(self.parameter) or read(self))
    save_adapter(tmp_path, "qwen3_moe")
    export(tmp_path, verify=False)
    assert len(reads) <= 2 * len(set(reads))


def test_the_script_prints_the_change(tmp_path, monkeypatch, capsys):
    save_adapter(tmp_path, "qwen3_moe")
    flags = ["--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["export_adapter.py", *flags, "--server", "llama.cpp"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capsys.readouterr().out
    assert "change of the logits when served" in shown
    assert "convert_lora_to_gguf.py" in shown
