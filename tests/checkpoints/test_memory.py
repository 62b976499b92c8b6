"""Memory does not grow with the checkpoint, as measured on a checkpoint of 12 GB."""

import json
import subprocess
import sys

import pytest


SCRIPT = """
import json, os, resource, shutil, sys, time
from pathlib import Path

import torch

from modeling_moe.checkpoints import LazyTensor, open_source, write_checkpoint
from modeling_moe.checkpoints.safetensors_format import make_header

root, layers = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def announced(*shape):
    return LazyTensor(shape, torch.bfloat16, None)


dense = {"model.embed_tokens.weight": announced(128000, 2048)}
for layer in range(layers):
    for name, shape in {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192)}.items():
        dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] = announced(*shape)
source = root / "source"
source.mkdir()
with open(source / "model.safetensors", "wb") as file:
    file.write(make_header(dense))
    file.truncate(file.tell() + sum(tensor.nbytes for tensor in dense.values()))

before = peak()
state = open_source(source).state
result = {"model.embed_tokens.weight": state.pop("model.embed_tokens.weight")}
for name, tensor in state.items():
    for expert in range(8):
        result[name.replace("mlp.", f"mlp.experts.{expert}.")] = tensor
result["columns"] = LazyTensor.cat([tensor[:, 512:1024] for name, tensor in state.items() if "down" in name])
written = sum(tensor.nbytes for tensor in result.values())
start = time.monotonic()
write_checkpoint(root / "out", result, {}, lambda folder: None)
write_time = time.monotonic() - start
used = peak() - before

start = time.monotonic()
for file in (root / "out").iterdir():
    with open(file, "rb") as source_file, open(root / "copy", "wb") as copy:
        shutil.copyfileobj(source_file, copy, 1 << 24)
        copy.flush()
        os.fsync(copy.fileno())
    (root / "copy").unlink()
copy_time = time.monotonic() - start
print(json.dumps({"written": written, "peak": used, "write_time": write_time, "copy_time": copy_time}))
"""


@pytest.mark.slow
def test_peak_memory(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(
        f"\n{found['written'] / 1e9:.1f} GB written at {found['written'] / found['write_time'] / 1e9:.2f} GB/s, "
        f"{found['copy_time'] / found['write_time']:.2f} of the speed of copying them; "
        f"{found['peak'] / 1e9:.2f} GB of memory at most"
    )
    assert found["written"] > 12e9
    assert found["peak"] < 1e9


@pytest.fixture(autouse=True)
def remove_files(tmp_path):
    yield
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
