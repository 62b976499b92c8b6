# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module uploads a saved model or adapter to the Hub after checking that it loads, here and without this package."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import GenerationMixin, PreTrainedModel

from ..configuration_moe import MoEConfig
from ..model_experts import experts_of_transformers
from ..utils.clean_process import tensor_from_clean_process
from ..utils.errors import UserError
from ..utils.json_files import json_text, read_json
from ..utils.lineage import CONVERSION, FINETUNING
from ..utils.loading import load_model
from ..utils.locations import refuse_outside
from ..utils.trust import foreign_code
from .card import card_to_publish, is_on_hub, reason_without_license
from .files import CARD, published_files
from .pictures import ASSETS, report_pictures, take_pictures
from .wording import without_paths


def first_logits(model: PreTrainedModel) -> torch.Tensor:
    """Returns logits (12, V): of a prompt of 8 tokens in one pass, and of 4 tokens that `generate` adds with a cache."""
    ids = torch.arange(8)[None]
    with torch.no_grad():
        prompt = model(ids).logits[0]
        if not isinstance(model, GenerationMixin):
            raise TypeError(f"{type(model).__name__} cannot generate text")
        written = model.generate(
            ids,
            attention_mask=ids >= 0,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return torch.cat([prompt, *written.logits])


# transformers and PEFT write paths of this machine into these files
FILES_WITH_PATHS = ("config.json", "tokenizer_config.json", "adapter_config.json")
CLEAN_PROCESS = f"""
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
{inspect.getsource(first_logits)}
folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(first_logits(model), output)
"""


@dataclass(frozen=True)
class Published:
    """The result of a push, or of a dry run.

    Attributes:
        files: names of the uploaded files to sizes in bytes.
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
    """Loads a folder in a process that cannot import this package, by the code that was saved with the model.

    Args:
        folder: folder of a causal LM, as `save_pretrained` writes it.
        trust_remote_code: whether code that this package did not write may run.

    Returns:
        Largest difference between the logits of that process and of this one, compared in fp32.

    Raises:
        UserError: if the folder holds foreign code, a tensor is missing or not finite, or the process cannot load it.
    """
    refuse_foreign_code(folder, trust_remote_code)
    model = load_model(str(folder)).eval()
    _refuse_not_finite(model.state_dict(), folder)
    got = tensor_from_clean_process(
        CLEAN_PROCESS,
        Path(folder).resolve(),
        failure=f"{folder} does not load without this package: {{cause}}. Save it again with save_pretrained",
    )
    # the other process only has transformers' experts functions, so this one uses them too
    model.set_experts_implementation(experts_of_transformers(model.config))
    return (got.float() - first_logits(model).float()).abs().max().item()


def _refuse_not_finite(tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder} is damaged: {name} holds numbers that are not finite")


def _reason_without_base(folder: Path, base_model: str | None) -> str | None:
    """Returns a sentence if the base model of the adapter in a folder is not on the Hub; None if it is."""
    base = base_model or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and is_on_hub(base):
        return None
    return f"the adapter's base model is {base!r}, which others do not have: pass --base_model owner/name"


def _check_adapter(folder: Path) -> None:
    """Refuses an adapter whose weights are missing, damaged or not finite."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors: save the adapter with save_pretrained")
    try:
        with safe_open(weights, framework="pt") as tensors:
            _refuse_not_finite({name: tensors.get_tensor(name) for name in tensors.keys()}, folder)  # noqa: SIM118
    except UserError:
        raise
    except Exception as error:  # SafetensorError derives directly from Exception
        raise UserError(f"{weights} is damaged: {error}") from error


def _check_model(folder: Path, trust_remote_code: bool) -> None:
    """Refuses a model that does not load, or whose saved code computes other logits than this package."""
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
    """Refuses a text that is not a Hub name `owner/name`.

    Raises:
        UserError: gives the form of a name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo_id {repo_id!r} is no name on the Hub: {error}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"repo_id {repo_id!r} is no name on the Hub: write owner/name")


def _without_path_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a description in which fields for files and models, set by older transformers, name no folder."""
    return {
        name: without_paths(value) if isinstance(value, str) and name.endswith(("_path", "_file")) else value
        for name, value in values.items()
    }


def _contents(folder: Path, files: list[str], card: str | None, base_model: str | None) -> dict[str, bytes | Path]:
    """Returns for each uploaded name the file, or bytes without the paths of this machine that the file contains."""
    contents: dict[str, bytes | Path] = {name: folder / name for name in files}
    for name in {CONVERSION, FINETUNING, *FILES_WITH_PATHS} & set(files):
        values = read_json(folder / name)
        published = _without_path_fields(values) if name in FILES_WITH_PATHS else without_paths(values)
        if published != values:
            contents[name] = json_text(published).encode()
    if card is not None:
        contents[CARD] = card.encode()
    if base_model is not None and "adapter_config.json" in contents:
        config = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": base_model}
        contents["adapter_config.json"] = json_text(config).encode()
    return dict(sorted(contents.items()))


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    dry_run: bool = False,
    *,
    trust_remote_code: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    report: str | Path | None = None,
) -> Published:
    """Checks a saved model or adapter, writes a card unless the user has written one, and uploads both.

    Args:
        folder: folder of a causal LM, as `save_pretrained` writes it, with the tokenizer; or of a LoRA adapter.
        repo_id: `owner/name` on the Hub; the repository is created if it does not exist.
        private: whether a new repository is private.
        dry_run: whether to check only, without uploading or writing anything.
        trust_remote_code: whether code in the folder that this package did not write may run and be uploaded.
        base_model: Hub name of the base model; for an adapter it replaces the name that was saved.
        license: the Hub's identifier, see [`~modeling_moe.hub.write_model_card`].
        language: metadata of the card.
        metrics: results, see [`~modeling_moe.hub.write_model_card`].
        report: folder that `moe report --output_dir` wrote, whose pictures of the routing the card shows.

    Raises:
        UserError: if the folder holds no model, is damaged, holds foreign code, does not load without this package or
            computes other logits then; if the license is not known; or if the Hub refuses. The folder is then unchanged.
    """
    folder = Path(folder)
    is_model = _check_folder(folder, repo_id, base_model, trust_remote_code)
    pictures = {} if report is None else report_pictures(Path(report))
    card = card_to_publish(
        folder,
        repo_id=repo_id,
        base_model=base_model,
        language=language,
        license=license,
        metrics=metrics,
        pictures=pictures,
        trust_remote_code=trust_remote_code,
    )
    if card is None and pictures:
        raise UserError(f"{folder / CARD} is your own card, to which no picture is added: omit report")
    missing = [reason_without_license(card), None if is_model else _reason_without_base(folder, base_model)]
    if any(missing):
        raise UserError("; ".join(filter(None, missing)))
    files, left_out = published_files(folder, card)
    if is_model:
        _check_model(folder, trust_remote_code)
    else:
        _check_adapter(folder)
    contents = _contents(folder, files, card, base_model)
    contents |= {f"{ASSETS}/{name}": picture for name, picture in pictures.items()}
    if not dry_run:
        _upload(repo_id, private, contents)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        if report is not None:
            take_pictures(report, folder)
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in contents.items()}
    return Published(sizes, [name for name in left_out if name not in sizes])


def _check_folder(folder: Path, repo_id: str, base_model: str | None, trust_remote_code: bool) -> bool:
    """Checks names and folder before anything is loaded; returns whether the folder holds a model, not an adapter."""
    check_repo_id(repo_id)
    if base_model is not None and not is_on_hub(base_model):
        raise UserError(f"base_model {base_model!r} is no name on the Hub: write owner/name")
    is_model, is_adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if not folder.is_dir() or not (is_model or is_adapter):
        raise UserError(f"{folder} has no config.json and no adapter_config.json: give the folder of a saved model")
    if is_model and is_adapter:
        raise UserError(f"{folder} holds a model and an adapter: move one of them into a folder of its own")
    refuse_outside(folder)
    refuse_foreign_code(folder, trust_remote_code)
    return is_model


def _upload(repo_id: str, private: bool, contents: dict[str, bytes | Path]) -> None:
    operations = [
        CommitOperationAdd(name, str(data) if isinstance(data, Path) else data) for name, data in contents.items()
    ]
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Upload with modeling_moe")
    except Exception as error:  # errors of the Hub, the network and the token have no common class
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the upload to {repo_id} failed, and the folder is as it was: {cause}") from error
