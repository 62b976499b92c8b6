"""These tests try every family of transformers with its default configuration, and measure the memory of pruning."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_moe.resizing.skeleton import groups_of, reduce, skeleton


REFUSED = {
    "deepseek_v4": "tid2eid is a table",
    "jetmoe": "which does not follow transformers' experts interface",
    "llama4_text": "which does not follow transformers' experts interface",
    "longcat_flash": "which does not follow transformers' experts interface",
}
# the default configuration of these families describes no whole model, or a dense one
NEEDS_FIELDS = {
    "dbrx",
    "dots1",
    "gemma4",
    "gemma4_text",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "llama4",
    "qwen4_exp",
    "qwen4_exp_text",
}


def sparse_families() -> list[str]:
    """Returns the model types of transformers' causal LMs whose source holds experts."""
    found = []
    for model_type, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = classes if isinstance(classes, str) else classes[0]
        source = inspect.getsourcefile(getattr(transformers, name)) if hasattr(transformers, name) else None
        text = Path(source).read_text() if source else ""
        if re.search(r"use_experts_implementation|class \w*Experts\(|SparseMoe|\bMoE\(", text):
            found.append(model_type)
    return found


def why_refused(model_type: str) -> str | None:
    """Returns why a family cannot be pruned to about half of its experts; None if it can."""
    try:
        before = skeleton(CONFIG_MAPPING[model_type]())
        groups = groups_of(before.config).count
        after = reduce(before, max(before.num_experts // 2 // groups, 2) * groups).after
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    assert after.num_experts < before.num_experts
    return None


@pytest.mark.slow
def test_which_families_can_be_pruned(capsys):
    """Every family with its default configuration, at full size and without data, can be pruned or is refused by name."""
    reasons = {model_type: why_refused(model_type) for model_type in sparse_families()}
    works = [model_type for model_type, reason in reasons.items() if reason is None]
    refused = {model_type: reason for model_type, reason in reasons.items() if reason is not None}
    with capsys.disabled():
        print(f"\n{len(works)} families can be pruned: {', '.join(works)}", *refused.items(), sep="\n")
    for model_type, reason in REFUSED.items():
        assert reason in refused.pop(model_type)
    assert "deepseek_v3" in works
    unknown = {name for name, reason in refused.items() if "is a dense model" not in reason} - NEEDS_FIELDS
    assert not unknown


MEMORY = """
import json, os, resource, sys
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_moe.checkpoints import LazyTensor
from modeling_moe.checkpoints.safetensors_format import make_header
from modeling_moe.resizing import GrowthOptions, PruningOptions, ResizeOptions, Usage, resize_checkpoint
from modeling_moe.resizing.usage import LayerUsage

root, fused = Path(sys.argv[1]), sys.argv[2] == "fused"
config = MixtralConfig(
    vocab_size=1000, hidden_size=2048, intermediate_size=4096, num_hidden_layers=6, num_local_experts=8, head_dim=64,
    num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16", architectures=["MixtralForCausalLM"],
)
with torch.device("meta"):
    state = MixtralForCausalLM(config).state_dict()
if not fused:
    one = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in range(6):
        for expert in range(8):
            for name, shape in {"w1": (4096, 2048), "w2": (2048, 4096), "w3": (4096, 2048)}.items():
                one[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"] = torch.empty(shape, device="meta")
    state = one
announced = {name: LazyTensor(tuple(tensor.shape), torch.bfloat16, None) for name, tensor in state.items()}
source = root / "source"
config.save_pretrained(source)
with open(source / "model.safetensors", "wb") as file:
    file.write(make_header(announced))
    file.truncate(file.tell() + sum(tensor.nbytes for tensor in announced.values()))
score = torch.arange(8.0, dtype=torch.float64)
Usage({layer: LayerUsage(score, score, score) for layer in range(6)}, 1, 2).save(root / "use.json")


# the memory in use here, not the peak of the imports, which the run could hide behind
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
options = ResizeOptions(method="prune", usage_json=str(root / "use.json"))
_, size, _ = resize_checkpoint(str(source), root / "small", options, GrowthOptions(), PruningOptions(keep=4))
print(json.dumps({"written": sum(file.stat().st_size for file in (root / "small").iterdir()), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_peak_memory(layout, tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path), layout]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"\n{layout}: {found['written'] / 1e9:.2f} GB written, {found['peak'] / 1e9:.2f} GB of memory at most")
    assert found["written"] > 1.2e9
    assert found["peak"] < 0.4e9
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
