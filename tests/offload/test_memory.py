"""A model of 5.6 GB is loaded and used in the memory of its weights beside the experts, and of the slots."""

import json

import pytest
import torch

from tests.checkpoints.test_memory import GLM, run


# 4 experts per token, so that 500 MB hold the experts of one token in each layer
SOURCE = GLM.replace("n_routed_experts=32,", "n_routed_experts=32, num_experts_per_tok=4,")

USE = """
import json, os, resource, sys, threading, time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from modeling_moe.offload import from_pretrained_offloaded, offload_statistics

root = Path(sys.argv[1])
torch.set_num_threads(1)


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


before, peaks, done = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, [anonymous()], threading.Event()


def sample():
    while not done.wait(0.005):
        peaks.append(anonymous())


watcher = threading.Thread(target=sample)
watcher.start()
start = time.monotonic()
model = LOAD
loaded = time.monotonic() - start
with torch.no_grad():
    logits = model(torch.arange(3, 9)[None], use_cache=False).logits
done.set()
watcher.join()
torch.save(logits, root / "NAME.pt")
parameters = [parameter for parameter in model.parameters() if not parameter.is_meta]
found = {
    "resident": sum(parameter.nbytes for parameter in parameters),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    "anonymous": max(peaks) - peaks[0],
    "load_time": loaded,
    "largest": max(parameter.nbytes for parameter in parameters),
}
print(json.dumps(found))
"""


def use(folder, name: str, load: str) -> dict[str, float]:
    """Loads the model in a process of its own, saves logits, and returns bytes and seconds; prints them."""
    found = json.loads(run(USE.replace("LOAD", load).replace("NAME", name), folder).splitlines()[-1])
    print(
        f"\n{name}: {found['resident'] / 1e9:.2f} GB of parameters in the model, {found['peak'] / 1e9:.2f} GB of memory at "
        f"most, {found['anonymous'] / 1e9:.2f} GB of them anonymous; loaded in {found['load_time']:.1f} s"
    )
    return found


@pytest.mark.slow
def test_peak_memory(tmp_path):
    run(SOURCE, tmp_path)
    found = use(tmp_path, "offloaded", 'from_pretrained_offloaded(root / "source", budget="500MB")')
    whole = use(
        tmp_path, "whole", 'AutoModelForCausalLM.from_pretrained(root / "source", experts_implementation="moe")'
    )
    assert whole["resident"] > 5e9
    assert found["resident"] < 2e9
    assert found["peak"] < found["resident"] + 0.5e9 + found["largest"]
    assert found["anonymous"] < found["resident"] + 0.5e9 + found["largest"]
    assert torch.equal(torch.load(tmp_path / "offloaded.pt"), torch.load(tmp_path / "whole.pt"))


@pytest.fixture(autouse=True)
def remove_files(tmp_path):
    yield
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
