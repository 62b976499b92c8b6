"""These tests cover PEFT's prompt learning and transformers' own adapter methods.

transformers 5.24 needs PEFT 0.22 for `add_adapter`; loading an adapter works with earlier releases too.
"""

import json

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM
from transformers.integrations import peft as mixin

from modeling_moe import MoEForCausalLM
from modeling_moe.lora import moe_lora_config
from tests.builders import tiny_config
from tests.lora.checkpoints import fill


IDS = torch.arange(3, 21).view(2, 9)
TOO_OLD = Version(peft.__version__) < Version(getattr(mixin, "MIN_PEFT_VERSION", "0"))
CONFIGS = {
    "attention": lambda model: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "experts": lambda model: moe_lora_config(model, r=2, experts=True, router=True),
}
EACH_CONFIG = pytest.mark.parametrize("kind", CONFIGS)


@pytest.fixture
def folders(tmp_path, kind):
    """Saves a base model and an adapter, and returns the folder and the logits of the adapted model."""
    model = MoEForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, CONFIGS[kind](model)).eval()
    fill(adapted, 0.2, only="lora_")
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path, adapted(IDS).logits.detach()


@pytest.mark.parametrize(
    ("kind", "use_cache"),
    # a prefix is a cache: PEFT 0.21 cannot generate with a prefix and use_cache=False, for any model
    [(PromptTuningConfig, True), (PromptTuningConfig, False), (PromptEncoderConfig, True), (PrefixTuningConfig, True)],
)
def test_virtual_tokens_are_there_in_every_step(kind, use_cache):
    torch.manual_seed(0)
    model = get_peft_model(
        MoEForCausalLM(tiny_config(eos_token_id=None)), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    model.eval()
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    ids = IDS
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        text = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, use_cache=use_cache
        )
    assert torch.equal(text, ids)


@EACH_CONFIG
def test_peft_loads_the_adapter(folders, kind):
    folder, expected = folders
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)
    torch.testing.assert_close(PeftModel.from_pretrained(model, folder / "adapter").eval()(IDS).logits, expected)


@pytest.mark.parametrize("kind", ["attention"])
def test_transformers_loads_the_adapter(folders, kind):
    folder, expected = folders
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.load_adapter(folder / "adapter")
    torch.testing.assert_close(model.eval()(IDS).logits, expected)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder / "adapter").eval()(IDS).logits, expected)


@EACH_CONFIG
def test_adding_an_adapter_works_or_names_the_peft_it_needs(kind):
    model = MoEForCausalLM(tiny_config())
    if TOO_OLD:
        with pytest.raises(ValueError, match="version of PEFT you are using is not compatible"):
            model.add_adapter(CONFIGS[kind](model))
    else:
        model.add_adapter(CONFIGS[kind](model))
        assert any("lora_A" in name for name, _ in model.named_parameters())
