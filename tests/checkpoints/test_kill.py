"""A run that is killed at any moment and repeated until it succeeds writes the bytes of an uninterrupted run."""

import json
import os
import subprocess
import sys


SCRIPT = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path

import torch

from modeling_moe.checkpoints import LazyTensor, check_hashes, write_checkpoint

root, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
clock = random.Random(0)


def tensor(seed):
    def load(index):
        time.sleep(0.002)
        return torch.randn(500, 500, generator=torch.Generator().manual_seed(seed))

    return LazyTensor((500, 500), torch.float32, load)


def finish(folder):
    for number in range(10):
        (folder / f"file{number}").write_text("x" * number)
        time.sleep(0.002)


def write(output_dir, count=40):
    state = {f"t{number}": tensor(number) for number in range(count)}
    write_checkpoint(output_dir, state, {"count": count}, finish, overwrite=True, max_shard_size="2MB", progress=False)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


start = time.monotonic()
write(root / "reference")
write(root / "old", 1)
whole_run = time.monotonic() - start
expected, out = contents(root / "reference"), root / "out"
old = contents(root / "old")
killed = resumed = 0
while killed < kills:
    if not (root / ".out.replaced").exists():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(root / "old", out)
    child = os.fork()
    if not child:
        write(out)
        os._exit(0)
    time.sleep(clock.uniform(0, 0.7 * whole_run))
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed += 1
        resumed += (root / ".out.partial" / "SHA256SUMS").exists()
    if not out.exists():
        assert contents(root / ".out.replaced") == old
    else:
        assert contents(out) in (old, expected)
write(out)
assert contents(out) == expected
assert len(check_hashes(out, progress=False)) == 20
assert sorted(file.name for file in root.iterdir()) == ["old", "out", "reference"]
print(json.dumps({"killed": killed, "resumed": resumed}))
"""


def test_killed_at_any_moment(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["killed"] == 8
    assert counts["resumed"] >= 2
