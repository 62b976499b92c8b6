# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""A saved model or adapter goes to the Hub, after it was loaded and a process without this package has loaded it too."""

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import PreTrainedModel

from ..configuration_moe import MoEConfig
from ..utils.errors import UserError
from ..utils.lineage import CONVERSION, FINETUNING
from ..utils.loading import load_model
from ..utils.locations import read_json, refuse_outside
from ..utils.trust import foreign_code
from .card import is_hub_name, own_card
from .files import CARD, published_files
from .wording import plain


def first_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits (12, V) of a prompt of 8 tokens in one pass, and of 4 tokens that `generate` writes after it with a cache."""
    ids = torch.arange(8)[None]
    with torch.no_grad():
        prompt = model(ids).logits[0]
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
        written = model.generate(ids, attention_mask=ids >= 0, return_dict_in_generate=True, **options)
    return torch.cat([prompt, *written.logits])


# transformers and PEFT write the path of a model into these
NAMING_FILES = ("config.json", "tokenizer_config.json", "adapter_config.json")
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


@dataclass(frozen=True)
class Published:
    """What a push has uploaded, or would upload.

    Attributes:
        files: names and sizes in bytes.
        left_out: names of the files in the folder that do not belong to the model.
    """

    files: dict[str, int]
    left_out: list[str]


def refuse_foreign_code(folder: str | Path, trust_remote_code: bool = False) -> None:
    """Refuses a checkpoint with code that this package did not write, unless the user trusts it.

    Raises:
        UserError: names the code and the flag.
    """
    if not trust_remote_code and (foreign := foreign_code(folder)):
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise UserError(
            f"{folder} brings code that this version of modeling_moe did not write, {foreign[0]}{more}: save the model "
            "again, take the file away, or read it and pass --trust_remote_code true to run and publish it"
        )


def check_without_package(folder: str | Path, *, trust_remote_code: bool = False) -> float:
    """Loads a folder in a process that cannot import this package, by the code that was saved with it.

    Args:
        folder: of a causal LM, as `save_pretrained` writes it.
        trust_remote_code: whether code may run that this package did not write.

    Returns:
        Largest difference between that process' logits and this one's, in fp32.

    Raises:
        UserError: if the folder holds foreign code, a tensor is missing or not finite, or the process cannot load it.
    """
    refuse_foreign_code(folder, trust_remote_code)
    model = load_model(str(folder)).eval()
    _refuse_not_finite(model.state_dict(), folder)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "logits.pt"
        command = [sys.executable, "-c", CLEAN_PROCESS, str(Path(folder).resolve()), str(output)]
        # an empty standard input: nothing can answer a question
        result = subprocess.run(command, cwd=temporary, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if result.returncode != 0:
            cause = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f"{folder} does not load without this package: {cause}. Save it again with save_pretrained"
            )
        got = torch.load(output)
    # the same experts functions in both: that process has transformers' own
    model.set_experts_implementation("grouped_mm")
    return (got.float() - first_logits(model).float()).abs().max().item()


def _refuse_not_finite(tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder} is damaged: {name} holds numbers that are not finite")


def _check_adapter(folder: Path, base_model: str | None) -> None:
    """Refuses an adapter whose base others cannot load, or whose weights are missing, damaged or not finite."""
    base = base_model or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not is_hub_name(base):
        raise UserError(
            f"the adapter's base model is {base!r}, which others do not have: pass --base_model owner/name"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors: save the adapter with save_pretrained")
    try:
        with safe_open(weights, framework="pt") as tensors:
            _refuse_not_finite({name: tensors.get_tensor(name) for name in tensors.keys()}, folder)  # noqa: SIM118
    except UserError:
        raise
    except Exception as error:  # SafetensorError has no base class of its own
        raise UserError(f"{weights} is damaged: {error}") from error


def _check_model(folder: Path, trust_remote_code: bool) -> None:
    if read_json(folder / "config.json").get("model_type") != MoEConfig.model_type:
        model = load_model(str(folder), trust_remote_code=trust_remote_code)
        _refuse_not_finite(model.state_dict(), folder)
        return
    difference = check_without_package(folder, trust_remote_code=trust_remote_code)
    if not difference <= 1e-3:
        raise UserError(
            f"{folder} computes something else by its own code (logits differ by {difference:.1e}): save it again"
        )


def check_repo_id(repo_id: str) -> None:
    """Refuses what is not a name on the Hub with an owner.

    Raises:
        UserError: says what a name is.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id {repo_id!r} is no name on the Hub: {error}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id {repo_id!r} is no name on the Hub: write owner/name")


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A description whose fields for files and models, which older releases of transformers fill in, tell no folder."""
    return {
        name: plain(value) if isinstance(value, str) and name.endswith(("_path", "_file")) else value
        for name, value in values.items()
    }


def _contents(folder: Path, files: list[str], card: str | None, base_model: str | None) -> dict[str, bytes | Path]:
    """What is uploaded under each name: the file, or other bytes where it would tell paths of this machine."""
    contents: dict[str, bytes | Path] = {name: folder / name for name in files}
    for name in {CONVERSION, FINETUNING, *NAMING_FILES} & set(files):
        values = read_json(folder / name)
        told = plain(values) if name not in NAMING_FILES else _without_paths(values)
        if told != values:
            contents[name] = (json.dumps(told, indent=2) + "\n").encode()
    if card is not None:
        contents[CARD] = card.encode()
    if base_model is not None and "adapter_config.json" in contents:
        config = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": base_model}
        contents["adapter_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return dict(sorted(contents.items()))


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    *,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    **card_options: Any,
) -> Published:
    """Checks a saved model or adapter, makes a card if it has none of the user's, and uploads both.

    Args:
        folder: of a causal LM, as `save_pretrained` writes it, with its tokenizer; or of a LoRA adapter.
        repo_id: `owner/name` on the Hub; made if it is not there.
        private: whether a new repository is private.
        dry_run: check, upload nothing and write nothing.
        trust_remote_code: whether code beside the weights may run, and go up, that this package did not write.
        base_model: Hub name of what the model was made from; of an adapter it takes the place of the one that was saved.
        card_options: `license`, `language` and `metrics`, see [`~modeling_moe.hub.write_model_card`].

    Raises:
        UserError: if the folder is no model's, is damaged, holds foreign code, does not load without this package, or to
            something else; if the license is not known; or if the Hub refuses. The folder is then as it was.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if base_model is not None and not is_hub_name(base_model):
        raise UserError(f"base_model {base_model!r} is no name on the Hub: write owner/name")
    is_model, is_adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if not folder.is_dir() or not (is_model or is_adapter):
        raise UserError(f"{folder} has no config.json and no adapter_config.json: give the folder of a saved model")
    if is_model and is_adapter:
        raise UserError(f"{folder} holds a model and an adapter: move one of them into a folder of its own")
    refuse_outside(folder)
    refuse_foreign_code(folder, trust_remote_code)
    told = {"repo_id": repo_id, "base_model": base_model, **card_options}
    card = own_card(folder, trust_remote_code=trust_remote_code, **told)
    files, left_out = published_files(folder, card)
    if is_model:
        _check_model(folder, trust_remote_code)
    else:
        _check_adapter(folder, base_model)
    contents = _contents(folder, files, card, base_model)
    if not dry_run:
        _upload(repo_id, private, contents)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in contents.items()}
    return Published(sizes, [name for name in left_out if name not in sizes])


def _upload(repo_id: str, private: bool, contents: dict[str, bytes | Path]) -> None:
    operations = [
        CommitOperationAdd(name, str(data) if isinstance(data, Path) else data) for name, data in contents.items()
    ]
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Upload with modeling_moe")
    except Exception as error:  # of the Hub, the network and the token: they have no common class
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the upload to {repo_id} failed, and the folder is as it was: {cause}") from error
