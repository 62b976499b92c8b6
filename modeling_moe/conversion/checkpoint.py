# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""From folder to folder: a checkpoint of any family opened as a MoE, and one written with all that belongs to it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..cli import UserError
from ..configuration_moe import MoEConfig
from ..files import copy_companions
from ..modeling_moe import MoEForCausalLM, name_code
from ..streaming import Source, State, check_hashes, open_source, write_checkpoint
from ..utils.loading import parse_dtype
from .families import moe_config, source_config
from .importer import import_state
from .targets import TARGETS, export_plan
from .verification import Verification, verify


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the words of this package, none of it read.

    Attributes:
        config: of the model; its dtype is that of the tensors.
        state: tensors as a MoE checkpoint has them on disk.
        source: the files that they come from.
        source_config: what config.json says there.
    """

    config: MoEConfig
    state: State
    source: Source
    source_config: PreTrainedConfig

    def identity(self) -> dict:
        """What tells this source from another, for the recipe of what is made from it."""
        files = [self.source.folder / self.source.gguf_file] if self.source.gguf_file else []
        files = files or sorted(self.source.folder.glob("*.safetensors"))
        stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        return {"name": self.source.folder.name, "files": stats, "config": self.source_config.to_diff_dict()}


def cast(state: State, config: MoEConfig, dtype: torch.dtype) -> State:
    """The tensors in `dtype`, but for integers and those that routers keep in fp32."""
    with torch.device("meta"):
        kept = MoEForCausalLM(config)._keep_in_fp32_modules_strict or set()

    def target(name: str) -> torch.dtype:
        if not state[name].dtype.is_floating_point or name.rpartition(".")[2] in kept:
            return state[name].dtype
        return dtype

    return {name: tensor.to(target(name)) for name, tensor in state.items()}


def open_checkpoint(name_or_path: str, gguf_file: str | None = None, dtype: str = "auto") -> Checkpoint:
    """Opens a checkpoint by folder or Hub name; reads headers alone, and all bytes where hashes lie beside them.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES`, or of this package.
        gguf_file: name of the GGUF file in that folder.
        dtype: to cast to as it is read; `auto` keeps the source's.

    Raises:
        UserError: if it is damaged, quantised, of an unknown family, or has what cannot be held.
    """
    parse_dtype(dtype)
    source = open_source(name_or_path, gguf_file)
    described = source_config(source.folder, gguf_file)
    config = moe_config(described)
    state = import_state(source.state, described, config)
    check_hashes(source.folder)
    wanted = parse_dtype(dtype)
    if wanted is not None:
        state = cast(state, config, wanted)
    config.dtype = state["model.embed_tokens.weight"].dtype
    return Checkpoint(config, state, source, described)


def _write_moe(folder: Path, config: MoEConfig) -> None:
    """config.json with the code that loads the model where this package is not installed."""
    config.architectures = [MoEForCausalLM.__name__]
    name_code(config)
    with torch.device("meta"):
        custom_object_save(MoEForCausalLM(config), folder, config=config)
    config.save_pretrained(folder)


def save_checkpoint(
    output_dir: str | Path,
    config: MoEConfig,
    state: State,
    origin: Checkpoint,
    recipe: dict,
    target: str = "moe",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint, tokenizer, chat template, generation config and code included.

    Args:
        output_dir: written whole or not at all; an interrupted run goes on where it was.
        config: of the result.
        state: of the result, as a MoE checkpoint.
        origin: where tokenizer and generation config come from.
        recipe: all that was chosen; it is kept in conversion.json.
        target: format to write: `moe`, or a key of `TARGETS`.
        overwrite: replace `output_dir`.
        max_shard_size: largest file, unless a tensor is larger.
        check: looks at the finished folder before it takes its place, and raises if it will not do.

    Raises:
        UserError: if the target cannot hold the model, or `output_dir` cannot be written.
    """
    written_config: PreTrainedConfig = config
    if target != "moe":
        written_config = export_plan(config, target)
        state = TARGETS[target].tensors(state, config)

    def finish(folder: Path) -> None:
        if target == "moe":
            _write_moe(folder, config)
        else:
            written_config.save_pretrained(folder)
        copy_companions(origin.source.folder, folder, origin.source.gguf_file)
        if not (folder / "generation_config.json").exists():
            GenerationConfig.from_model_config(written_config).save_pretrained(folder)
        if check is not None:
            check(folder)

    recipe = json.loads(json.dumps(recipe, default=str))
    write_checkpoint(output_dir, state, recipe, finish, overwrite, max_shard_size)


def convert_checkpoint(
    name_or_path: str,
    output_dir: str | Path,
    target: str = "moe",
    gguf_file: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    check: bool = False,
) -> tuple[MoEConfig, Verification | None]:
    """Writes a checkpoint of one family in the format of another, with the same logits.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES`, or of this package.
        output_dir: written whole or not at all; an interrupted run goes on where it was.
        target: `moe`, or a key of `TARGETS`.
        gguf_file: name of the GGUF file in that folder.
        dtype: of the result; `auto` keeps the source's.
        overwrite: replace `output_dir`.
        check: run source and result on a short text.

    Returns:
        The model's configuration in the words of this package, and how the result compares if `check` is set.

    Raises:
        UserError: if the source cannot be read or held, or the target cannot hold it.
    """
    checkpoint = open_checkpoint(name_or_path, gguf_file, dtype)
    if target == "moe" and checkpoint.source_config.model_type == MoEConfig.model_type and dtype == "auto":
        raise UserError(f"{name_or_path} is in this format already: name another target")
    recipe = {"source": checkpoint.identity(), "target": target, "dtype": dtype}
    save_checkpoint(output_dir, checkpoint.config, checkpoint.state, checkpoint, recipe, target, overwrite)
    return checkpoint.config, verify(name_or_path, output_dir, gguf_file, dtype) if check else None
