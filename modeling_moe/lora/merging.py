# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module merges a saved adapter into its base model, and writes the result as a model."""

import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

from ..checkpoints.damage import refuse_not_finite
from ..conversion.tokenizer_files import keep_tokenizer
from ..utils.companions import copy_companions
from ..utils.errors import UserError
from ..utils.folder_checks import refuse_overlap
from ..utils.folders import whole_folder
from ..utils.limits import refuse_vast_adapter
from ..utils.lineage import FINETUNING, lineage_of
from ..utils.loading import adapter_base, has_tokenizer, load_model, load_tokenizer, one_line_for
from ..utils.locations import local_folder, refuse_outside
from ..utils.prediction_files import leave_out_prediction
from .enabling import enable


@dataclass
class MergeArguments:
    """The arguments of `merge_adapter`: the adapter, the base model and the folder to write."""

    model_name_or_path: str = field(metadata={"help": "folder or Hub name of the adapter"})
    output_dir: str = field(metadata={"help": "folder to write; a failed run leaves no part of it"})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub name of the base model; the default is the one that adapter_config.json names"
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the result of an earlier run in output_dir"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run Python code that the checkpoint brings"})


def adapter_folder(name: str) -> Path:
    """Returns the folder of an adapter, which is downloaded if it is not a local folder."""
    folder = local_folder(name)
    if not Path(folder).is_dir():
        try:
            folder = snapshot_download(folder, ignore_patterns=["checkpoint-*", "*.pt", "*.pth", "*.bin"])
        except (OSError, ValueError) as error:
            raise UserError(
                f"model_name_or_path {name} is neither a folder nor an adapter that the Hub gives: {error}"
            ) from error
    if not (Path(folder) / "adapter_config.json").is_file():
        if (Path(folder) / "config.json").is_file():
            raise UserError(
                f"{folder} holds a whole model and no adapter: use it as it is, or train with `moe finetune --merge_lora false`, "
                "which saves the adapter"
            )
        raise UserError(f"{folder} holds no adapter_config.json: give the folder of a LoRA adapter")
    refuse_outside(folder)
    refuse_vast_adapter(folder)
    return Path(folder)


def _load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter; a tensor that is not finite is a UserError."""
    if not any((Path(folder) / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise UserError(f"{folder} has no adapter_model.safetensors: save the adapter with save_pretrained")
    with one_line_for("the adapter", str(folder)):
        weights = load_peft_weights(str(folder), device="cpu")
    for name, tensor in weights.items():
        refuse_not_finite(tensor, f"{name} in {folder}", "the adapter is damaged, train it again")
    return weights


def _fit_embeddings(model: PreTrainedModel, adapter: dict[str, torch.Tensor]) -> None:
    """Resizes the embeddings of the base model to those of an adapter that was trained with added tokens."""
    rows = [tensor.shape[0] for name, tensor in adapter.items() if name.endswith("embed_tokens.weight")]
    if rows and rows[0] != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows[0], mean_resizing=False)


def apply_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Puts a saved adapter onto its base model, and refuses an adapter that does not fit.

    PEFT alone goes on with random numbers for the tensors that an adapter lacks. Calls [`~modeling_moe.lora.enable`].

    Args:
        model: the base model, which is changed.
        folder: folder of the adapter.

    Raises:
        UserError: if the adapter is damaged, has a tensor for which the model has no place, or lacks one that the
            model needs.
    """
    enable()
    saved = _load_weights(folder)
    _fit_embeddings(model, saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except (ImportError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"the adapter in {folder} does not fit the base model: {error}") from error
    if missing := [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]:
        raise UserError(f"the adapter in {folder} does not fit the base model. {missing[0][:300]}")
    held = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    if lost := sorted(set(saved) - set(held)):
        raise UserError(
            f"the adapter in {folder} has {lost[0]} ({len(lost)} such tensors), for which the base model has no place: give "
            "the model that it was trained on as --base_model"
        )
    return adapted


def merge_adapter(args: MergeArguments) -> PreTrainedModel:
    """Writes a base model and an adapter as one model in the base model's dtypes, with tokenizer and generation
    config.

    Args:
        args: the adapter, the base model and the folder to write.

    Returns:
        The merged model, in memory.

    Raises:
        UserError: if the adapter or the base model cannot be loaded, they do not fit each other or cannot be merged,
            or `output_dir` cannot be written.
    """
    folder = adapter_folder(args.model_name_or_path)
    named = args.base_model or adapter_base(folder)
    if named is None:  # `adapter_folder` has found an adapter_config.json
        raise UserError(f"{folder} names no base model: pass --base_model")
    base = local_folder(named)
    if (Path(base) / "adapter_config.json").is_file():
        raise UserError(f"the base model {base} holds an adapter: merge that one first, or name another --base_model")
    refuse_overlap(args.output_dir, folder)
    refuse_overlap(args.output_dir, base, "base_model")
    lineage = lineage_of(base) if Path(base).is_dir() else {"base_model": base}
    recipe = {"method": "merge", "adapter": str(folder), "base_model": base, "lineage": lineage}
    with whole_folder(args.output_dir, recipe, args.overwrite) as partial:
        adapted = apply_adapter(load_model(base, trust_remote_code=args.trust_remote_code), folder)
        if not hasattr(adapted, "merge_and_unload"):
            kind = PeftConfig.from_pretrained(str(folder)).peft_type
            raise UserError(
                f"the adapter in {folder} is a {kind}, which cannot be merged into weights: only LoRA and its kin can"
            )
        merged = adapted.merge_and_unload(safe_merge=True)
        leave_out_prediction(merged, base, "The merged model")
        merged.save_pretrained(partial)
        _bring_along(folder, base, partial, args.trust_remote_code)
    return merged


def _bring_along(folder: Path, base: str, partial: Path, trust_remote_code: bool) -> None:
    """Copies the tokenizer of the adapter, or else of the base model, and the record of the adapter's training."""
    if (folder / FINETUNING).is_file():
        shutil.copyfile(folder / FINETUNING, partial / FINETUNING)
    source = folder if has_tokenizer(str(folder)) else Path(base)
    if source.is_dir():
        copy_companions(source, partial)
        keep_tokenizer(source, partial, trust_remote_code=trust_remote_code)
    else:
        load_tokenizer(base, trust_remote_code=trust_remote_code).save_pretrained(partial)
