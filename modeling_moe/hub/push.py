# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A saved model to the Hub, after a process without this package has shown that it can load it."""

import inspect
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..cli import UserError
from .card import write_model_card


LEFT_OUT = (
    "checkpoint-*",
    "runs",
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "training_args.bin",
    ".*",
    "__pycache__",
)


def first_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits (12, V) of a prompt of 8 tokens in one pass, and of 4 tokens that `generate` writes after it with a cache."""
    ids = torch.arange(8)[None]
    with torch.no_grad():
        prompt = model(ids).logits[0]
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
        written = model.generate(ids, attention_mask=ids >= 0, return_dict_in_generate=True, **options)
    return torch.cat([prompt, *written.logits])


# None in sys.modules makes the import fail, as it does where the package is not installed
CLEAN_PROCESS = f"""
import sys
sys.modules["modeling_moe"] = None
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
{inspect.getsource(first_logits)}
folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(first_logits(model), output)
"""


def published_files(folder: str | Path) -> dict[str, int]:
    """Names and sizes in bytes of the files that a push uploads: not a trainer's checkpoints and states."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatch(part, pattern) for part in name.parts for pattern in LEFT_OUT):
            files[name.as_posix()] = path.stat().st_size
    return files


def check_without_package(folder: str | Path) -> float:
    """Loads a folder in a process that cannot import this package, by the code that was saved with it.

    Args:
        folder: of a causal LM, as `save_pretrained` writes it.

    Returns:
        Largest difference between that process' logits and this one's, in fp32.

    Raises:
        UserError: if the process cannot load it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "logits.pt"
        command = [sys.executable, "-c", CLEAN_PROCESS, str(Path(folder).resolve()), str(output)]
        result = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if result.returncode != 0:
            cause = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{folder} does not load without this package: {cause}. Save it again with save_pretrained"
            )
        got = torch.load(output)
    # the same experts functions in both: that process has transformers' own
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    expected = first_logits(model)
    return (got.float() - expected.float()).abs().max().item()


def push_folder(folder: str | Path, repo_id: str, private: bool = False, dry_run: bool = False) -> dict[str, int]:
    """Checks a saved model, adds a card if it has none, and uploads it.

    Args:
        folder: of a causal LM, as `save_pretrained` writes it, with its tokenizer.
        repo_id: `owner/name` on the Hub; made if it is not there.
        private: whether a new repository is private.
        dry_run: check, and upload nothing.

    Returns:
        Names and sizes in bytes of the files uploaded.

    Raises:
        UserError: if the folder is no model's, or does not load without this package, or to something else.
    """
    folder = Path(folder)
    if not (folder / "README.md").is_file():
        write_model_card(folder, repo_id=repo_id)
    difference = check_without_package(folder)
    if difference > 1e-3:
        raise UserError(
            f"{folder} computes something else by its own code (logits differ by {difference:.1e}): save it again"
        )
    files = published_files(folder)
    if not dry_run:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(files))
    return files
