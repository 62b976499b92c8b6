"""An export is loaded by transformers without this package, and a result with other logits is refused."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from modeling_moe import MoEConfig, MoEForCausalLM
from modeling_moe.commands.convert import main
from modeling_moe.conversion import convert_checkpoint, saving
from modeling_moe.conversion.targets.catalogue import TARGETS
from modeling_moe.utils.clean_process import tensor_from_clean_process
from modeling_moe.utils.errors import UserError
from tests.builders import train_tokenizer
from tests.conversion.test_families_export import MOE, SIGMOID, randomised


@pytest.fixture
def source(tmp_path):
    """A GLM-4-like model whose bf16 weights would give other logits in bf16, so that the check must compute in fp32."""
    tokenizer = train_tokenizer()
    fields = SIGMOID | {"vocab_size": len(tokenizer), "routed_scaling_factor": 2.5, "num_shared_experts": 1}
    randomised(MoEForCausalLM(MoEConfig(**MOE | fields))).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_command_writes_what_most_servers_run_and_checks_it(source, tmp_path, capsys, monkeypatch):
    """The result has several shards, and `--verify` goes with `--check`."""
    write = saving.write_checkpoint

    def small(output_dir, state, recipe, finish, overwrite, _, **more):
        write(output_dir, state, recipe, finish, overwrite, "20KB", **more)

    monkeypatch.setattr(saving, "write_checkpoint", small)
    arguments = ["--model_name_or_path", source, "--output_dir", tmp_path / "result", "--target", "auto", "--verify"]
    main([*map(str, arguments), "--check", "transformers"])
    assert len(list((tmp_path / "result").glob("*.safetensors"))) > 1
    assert AutoConfig.from_pretrained(tmp_path / "result").model_type == "glm4_moe"
    told = " ".join(capsys.readouterr().out.split())
    assert "glm4_moe holds this model exactly" in told
    assert (
        "Served by vLLM, transformers. Not by llama.cpp: it converts only checkpoints with GLM's own tokenizer."
        in told
    )
    found = json.loads((tmp_path / "result" / "conversion.json").read_text())["verification"]
    assert found["in_plain_transformers"]["largest_difference"] < 1e-4
    # --verify computes in the dtype of the weights
    assert found["largest_difference"] < 1


def test_a_dtype_that_rounds_is_refused_with_the_check(source, tmp_path):
    with pytest.raises(
        UserError, match="dtype bfloat16 rounds weights, which can change the chosen experts: convert to"
    ):
        convert_checkpoint(str(source), tmp_path / "result", "glm4_moe", dtype="bfloat16", check_plain=True)


def test_a_tokenizer_of_another_model_is_named(source, tmp_path):
    config = MoEConfig.from_pretrained(source).replace(vocab_size=8)
    randomised(MoEForCausalLM(config)).save_pretrained(source)
    with pytest.raises(UserError, match=r"the tokenizer has a token .* they do not belong together"):
        convert_checkpoint(str(source), tmp_path / "result", "glm4_moe", check_plain=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_export_with_other_logits_is_not_written(source, tmp_path, monkeypatch):
    target = TARGETS["glm4_moe"]

    def wrong(state, config):
        tensors = target.tensors(state, config)
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        return tensors | {name: tensors[name].map(lambda bias: bias.flip(0))}

    monkeypatch.setitem(TARGETS, "glm4_moe", replace(target, tensors=wrong))
    with pytest.raises(UserError, match="transformers computes other logits from the export: they differ by"):
        convert_checkpoint(str(source), tmp_path / "result", "glm4_moe", check_plain=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_export_without_a_tensor_is_not_written(source, tmp_path, monkeypatch):
    target = TARGETS["glm4_moe"]

    def incomplete(state, config):
        return {
            name: tensor for name, tensor in target.tensors(state, config).items() if "layers.1.mlp.gate" not in name
        }

    monkeypatch.setitem(TARGETS, "glm4_moe", replace(target, tensors=incomplete))
    with pytest.raises(UserError, match=r"does not load in transformers without this package: .*layers\.1\.mlp\.gate"):
        convert_checkpoint(str(source), tmp_path / "result", "glm4_moe", check_plain=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_target_moe_has_no_check_in_plain_transformers(tmp_path):
    randomised(MoEForCausalLM(MoEConfig(**MOE))).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="transformers alone does not know target moe"):
        convert_checkpoint(str(tmp_path / "source"), tmp_path / "result", dtype="bfloat16", check_plain=True)


def test_the_other_process_cannot_import_this_package():
    with pytest.raises(UserError, match="failed: ModuleNotFoundError: import of modeling_moe halted"):
        tensor_from_clean_process("import modeling_moe", failure="failed: {cause}")
