"""What transformers' own adapter methods do with our model; the documentation uses PEFT's API alone.

transformers 5.24 asks for PEFT 0.22 in `add_adapter` and the like; loading an adapter works with earlier ones too.
"""

import json

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import peft as mixin

from modeling_moe import MoEForCausalLM
from modeling_moe.lora import moe_lora_config
from tests.conftest import tiny_config
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
    """A base model, and an adapter of it by PEFT, saved; and the logits of both together."""
    model = MoEForCausalLM(tiny_config()).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, CONFIGS[kind](model)).eval()
    fill(adapted, 0.2, only="lora_")
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path, adapted(IDS).logits.detach()


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
