# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module writes a checkpoint with all its files: weights, configuration, tokenizer, code and recipe."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..checkpoints import Source, State, write_checkpoint
from ..checkpoints.writer import refuse_full_disk
from ..configuration_moe import MoEConfig
from ..model_checkpoints import name_code
from ..modeling_moe import MoEForCausalLM
from ..utils.companions import copy_companions, find_companions
from ..utils.folders import ResultFolder
from ..utils.lineage import lineage_of
from ..utils.loading import load_tokenizer
from ..utils.prediction_files import ENTRY
from .older_names import save_for_older_readers, warn_of_masked_groups
from .opening import Checkpoint
from .prediction_layers import restored
from .targets.catalogue import TARGETS, export_plan
from .tokenizer_files import keep_tokenizer


logger = logging.get_logger(__name__)


def result_folder(
    output_dir: str | Path, overwrite: bool, checkpoints: Sequence[Checkpoint], nbytes: int
) -> ResultFolder:
    """Checks where a result will be written, before anything is read or written.

    Args:
        output_dir: folder of the result.
        overwrite: whether to replace the result of an earlier run.
        checkpoints: sources of the result.
        nbytes: size of the result's weights in bytes.

    Raises:
        UserError: if the folder may not be written, see [`ResultFolder`], or the result does not fit on the disk.
    """
    folder = ResultFolder(output_dir, overwrite, [checkpoint.source.folder for checkpoint in checkpoints])
    refuse_full_disk(folder, nbytes)
    return folder


def _write_moe(folder: Path, config: MoEConfig) -> None:
    """Writes config.json, and the code that loads the model where this package is not installed."""
    config.architectures = [MoEForCausalLM.__name__]
    name_code(config)
    with torch.device("meta"):
        # pyrefly: ignore[bad-argument-type]: transformers annotates a dict, but documents and takes a configuration
        custom_object_save(MoEForCausalLM(config), folder, config=config)
    config.save_pretrained(folder)


def save_checkpoint(
    output_dir: str | Path | ResultFolder,
    config: MoEConfig,
    state: State,
    origin: Checkpoint,
    recipe: dict[str, Any],
    target: str = "moe",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    check: Callable[[Path], Mapping[str, Any] | None] | None = None,
    *,
    trust_remote_code: bool = False,
    same_weights: bool = False,
) -> None:
    """Writes a checkpoint with tokenizer, chat template, generation config and code.

    Args:
        output_dir: folder that is written whole or not at all, where an interrupted run continues; or the object that
            [`result_folder`] returned.
        config: configuration of the result.
        state: tensors of the result with names and layout of a MoE checkpoint.
        origin: checkpoint from which tokenizer and generation config are taken.
        recipe: sources and options of the result; it is kept in conversion.json.
        target: format of the result: `moe`, or a key of `TARGETS`.
        overwrite: whether to replace the result of an earlier run.
        max_shard_size: size limit of a file; a larger tensor gets its own file.
        check: receives the complete folder before it replaces `output_dir`, raises if the result is not usable, and
            returns what it measured, for conversion.json.
        trust_remote_code: whether code that the source's tokenizer brings may run.
        same_weights: whether `state` holds the weights of `origin`, so that the origin's layers which predict further tokens
            still belong to them. Otherwise these layers are left out, and a warning says so.

    Raises:
        UserError: if the target cannot hold the model, or `output_dir` cannot be written.
    """
    written_config: PreTrainedConfig = config
    prediction = origin.prediction_for(target) if same_weights else None
    if target != "moe":
        written_config, further = restored(export_plan(config, target), prediction)
        state = TARGETS[target].tensors(state, config)
        warn_of_masked_groups(written_config, state)
        state = state | further
    elif prediction is not None:
        recipe = recipe | {ENTRY: prediction.record()}
    if origin.prediction is not None and not same_weights:
        logger.warning(
            f"The layers that predict further tokens ({len(origin.prediction.state)} tensors of {origin.source.folder}) are "
            "left out: they were trained for the unchanged weights."
        )

    write_tokenizer = _tokenizer_writer(origin.source, target != "moe", trust_remote_code)

    def finish(folder: Path) -> None:
        if target == "moe":
            _write_moe(folder, config)
        else:
            save_for_older_readers(written_config, folder)
        write_tokenizer(folder)
        if not (folder / "generation_config.json").exists():
            GenerationConfig.from_model_config(written_config).save_pretrained(folder)

    if origin.without_effect:
        recipe = recipe | {"fields_without_effect": dict(origin.without_effect)}
    recipe = json.loads(json.dumps(recipe | {"lineage": lineage_of(origin.source.folder)}, default=str))
    sources = (origin.source.folder,)
    beside = prediction.state if prediction is not None and target == "moe" else None
    write_checkpoint(
        output_dir, state, recipe, finish, overwrite, max_shard_size, sources=sources, check=check, beside=beside
    )


def _tokenizer_writer(source: Source, older_readers: bool, trust_remote_code: bool) -> Callable[[Path], None]:
    """Returns a function that writes the source's tokenizer and generation config into a folder.

    A damaged tokenizer raises an error here, and not after hours of writing weights.
    """
    tokenizer = None
    if source.gguf_file:
        tokenizer = load_tokenizer(str(source.folder), source.gguf_file, trust_remote_code=trust_remote_code)
    else:
        find_companions(source.folder)

    def write(folder: Path) -> None:
        if tokenizer is None:
            copy_companions(source.folder, folder)
        else:
            tokenizer.save_pretrained(folder)
        keep_tokenizer(
            source.folder, folder, source.gguf_file, older_readers=older_readers, trust_remote_code=trust_remote_code
        )

    return write
