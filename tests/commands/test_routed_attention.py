"""Commands on models with routed attention tell its experts from those of feed-forward networks, or refuse the model."""

import json

import pytest
import torch

from modeling_moe import MoEForCausalLM
from tests.builders import sample_text, train_tokenizer
from tests.core.attention_variants import VARIANTS, model_of


IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    """Saves a model of a variant with networks of one kind, and returns the folder."""

    def save(variant: str, kind: str):
        folder = tmp_path / f"{variant}-{kind}"
        model_of(variant, vocab_size=300, mlp_layer_types=[kind] * 3).save_pretrained(folder)
        train_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_report_names_the_place_of_each_layer(variant, moe, saved, tmp_path):
    text, found = tmp_path / "text.txt", tmp_path / "load.json"
    text.write_text(sample_text(20), encoding="utf-8")
    flags = ["--data", f"words={text}", "--max_length", 32, "--max_tokens", 128, "--output_json", found]
    code, printed, complaint = moe("report", "--model_name_or_path", saved(variant, "sparse"), *flags)
    assert code == 0, complaint
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows == [f"{layer} {part}" for layer in range(3) for part in ("self_attn", "mlp")]
    layers = json.loads(found.read_text())["words"]
    names = [f"model.layers.{layer}.{part}.experts" for layer in range(3) for part in ("self_attn", "mlp")]
    assert [layer["name"] for layer in layers] == names


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_resizing_changes_the_networks_alone(variant, moe, saved, tmp_path):
    source, grown = saved(variant, "sparse"), tmp_path / "grown"
    flags = ["--output_dir", grown, "--method", "grow", "--num_experts", 10]
    assert moe("resize", "--model_name_or_path", source, *flags)[0] == 0
    before, after = (MoEForCausalLM.from_pretrained(folder).eval() for folder in (source, grown))
    assert (after.config.num_experts, after.config.attention_experts) == (10, before.config.attention_experts)
    torch.testing.assert_close(after(IDS).logits, before(IDS).logits, rtol=0, atol=1e-4)
    code, _, complaint = moe("resize", "--model_name_or_path", saved(variant, "dense"), *flags, "--overwrite")
    assert code == 2
    assert f"has experts inside attention alone (routed_attention is '{variant}'), whose number" in complaint


@pytest.mark.parametrize("variant", VARIANTS)
def test_families_without_routed_attention_are_refused_as_targets(variant, moe, saved, tmp_path):
    flags = ["--model_name_or_path", saved(variant, "sparse"), "--output_dir", tmp_path / "result"]
    code, _, complaint = moe("convert", *flags, "--target", "mixtral")
    assert code == 2
    assert f"target mixtral cannot hold this model for routed_attention='{variant}'" in complaint
    assert "no target holds this model, so keep target moe" in moe("convert", *flags, "--target", "auto")[2]
    assert not (tmp_path / "result").exists()
