"""Memory does not grow with the checkpoint, as measured on a copied checkpoint of 12 GB and an imported one of 5 GB."""

import json
import subprocess
import sys

import pytest


MEASURE = """
import json, os, resource, shutil, sys, time
from pathlib import Path

import torch

from modeling_moe.checkpoints import LazyTensor, open_source, write_checkpoint

root = Path(sys.argv[1])
torch.set_num_threads(1)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def copied():
    start = time.monotonic()
    for file in (root / "out").glob("*.safetensors"):
        with open(file, "rb") as source_file, open(root / "copy", "wb") as copy:
            shutil.copyfileobj(source_file, copy, 1 << 24)
            copy.flush()
            os.fsync(copy.fileno())
        (root / "copy").unlink()
    return time.monotonic() - start


def report(write):
    # a disk is slow where nothing was written before, so the first round is not counted
    before = peak()
    for _ in range(2):
        shutil.rmtree(root / "out", ignore_errors=True)
        start = time.monotonic()
        written = write()
        write_time = time.monotonic() - start
        used = peak() - before
        copy_time = copied()
    print(json.dumps({"written": written, "peak": used, "write_time": write_time, "copy_time": copy_time}))
"""

COPIED = (
    MEASURE
    + """
from modeling_moe.checkpoints.safetensors_format import make_header


def announced(*shape):
    return LazyTensor(shape, torch.bfloat16, None)


dense = {"model.embed_tokens.weight": announced(128000, 2048)}
for layer in range(15):
    for name, shape in {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}.items():
        dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] = announced(*shape)
source = root / "source"
source.mkdir()
with open(source / "model.safetensors", "wb") as file:
    file.write(make_header(dense))
    file.truncate(file.tell() + sum(tensor.nbytes for tensor in dense.values()))


def write():
    state = open_source(source).state
    result = {"model.embed_tokens.weight": state.pop("model.embed_tokens.weight")}
    for name, tensor in state.items():
        for expert in range(8):
            result[name.replace("mlp.", f"mlp.experts.{expert}.")] = tensor
    result["columns"] = LazyTensor.cat([tensor[:, 512:1024] for name, tensor in state.items() if "down" in name])
    write_checkpoint(root / "out", result, {}, lambda folder: None)
    return sum(tensor.nbytes for tensor in result.values())


report(write)
"""
)

# writes a random checkpoint with the fields of GLM-4.5-Air, but with a smaller width and fewer layers and experts
GLM = """
import os, sys
from pathlib import Path

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from modeling_moe.checkpoints import LazyTensor
from modeling_moe.checkpoints.safetensors_format import make_header

shape = {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 128}
config = Glm4MoeConfig(**shape, n_routed_experts=32, attention_bias=True, use_qk_norm=True, dtype="bfloat16")
with torch.device("meta"):
    model = Glm4MoeForCausalLM(config)
published = revert_weight_conversion(model, model.state_dict())
tensors = {name: LazyTensor(tuple(tensor.shape), torch.bfloat16, None) for name, tensor in published.items()}
noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
noise = memoryview(noise.view(torch.uint8).numpy())
source = Path(sys.argv[1]) / "source"
config.save_pretrained(source)
with open(source / "model.safetensors", "wb") as file:
    file.write(make_header(tensors))
    for number, tensor in enumerate(tensors.values()):
        start, left = number * 4099 * 2 % len(noise), tensor.nbytes
        while left:
            left -= file.write(noise[start : start + left])
            start = 0
    # the time of writing the result would contain the time of writing the source otherwise
    file.flush()
    os.fsync(file.fileno())
"""

IMPORTED = (
    MEASURE
    + """
from modeling_moe.conversion import open_checkpoint, save_checkpoint


def write():
    checkpoint = open_checkpoint(str(root / "source"))
    save_checkpoint(root / "out", checkpoint.config, checkpoint.state, checkpoint, {})
    return sum(tensor.nbytes for tensor in checkpoint.state.values())


report(write)
name = "model.layers.7.mlp.experts.31.up_proj.weight"
wanted = open_checkpoint(str(root / "source")).state[name].read()
got = open_source(root / "out").state[name].read()
assert torch.equal(got, wanted) and wanted.std() > 0.01
"""
)

LOADED_IN_4BIT = """
import json, resource, sys

import torch
from transformers import AutoModelForCausalLM

from modeling_moe.lora import Experts4bitConfig, is_in_4bit

torch.set_num_threads(1)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/source", quantization_config=Experts4bitConfig())
used = peak() - before
assert is_in_4bit(model)
state = model.state_dict()
experts = sum(tensor.nbytes for name, tensor in state.items() if ".experts." in name)
print(json.dumps({"peak": used, "experts": experts, "model": sum(tensor.nbytes for tensor in state.values())}))
"""


def run(script: str, folder) -> str:
    """Returns what a script prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(script: str, folder) -> dict[str, float]:
    """Returns bytes written, peak of memory in bytes, and the seconds of writing and of copying; prints them."""
    found = json.loads(run(script, folder))
    print(
        f"\n{found['written'] / 1e9:.1f} GB written at {found['written'] / found['write_time'] / 1e9:.2f} GB/s, "
        f"{found['copy_time'] / found['write_time']:.2f} of the speed of copying them; "
        f"{found['peak'] / 1e9:.2f} GB of memory at most"
    )
    return found


@pytest.mark.slow
def test_peak_memory(tmp_path):
    found = measured(COPIED, tmp_path)
    assert found["written"] > 12e9
    assert found["peak"] < 1e9


@pytest.mark.slow
def test_peak_memory_of_an_imported_family(tmp_path):
    """The largest tensor, the embedding, has 0.62 GB."""
    run(GLM, tmp_path)
    found = measured(IMPORTED, tmp_path)
    assert found["written"] > 5e9
    assert found["peak"] < 0.7e9


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_peak_memory_of_loading_in_4_bits(tmp_path):
    """Loading 5.6 GB takes less memory than the 4-bit model has bytes, since weights left in 16 bits stay in the file.

    The peak is that of the experts in 4 bits, one expert in 16 bits, and the libraries that are imported meanwhile.
    """
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run(GLM, tmp_path)
    found = json.loads(run(LOADED_IN_4BIT, tmp_path))
    print("\n" + ", ".join(f"{name} {number / 1e9:.2f} GB" for name, number in found.items()))
    assert found["experts"] < found["peak"] < found["experts"] + 0.62e9
    assert found["peak"] < found["model"]


@pytest.fixture(autouse=True)
def remove_files(tmp_path):
    yield
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
