# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""From folder to folder: a checkpoint of any family opened as a MoE, and one written with all that belongs to it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..checkpoints import Source, State, fingerprint, open_source, write_checkpoint
from ..checkpoints.writer import refuse_full_disk
from ..configuration_moe import MoEConfig
from ..model_checkpoints import name_code
from ..modeling_moe import MoEForCausalLM
from ..utils.companions import copy_companions, find_companions
from ..utils.errors import UserError
from ..utils.folders import ResultFolder
from ..utils.limits import LAYERS
from ..utils.lineage import lineage_of
from ..utils.loading import load_tokenizer, parse_dtype
from ..utils.locations import read_json
from .families.catalogue import moe_config, source_config
from .families.export import TARGETS, export_plan
from .importing import import_state
from .older_names import save_for_older_readers
from .tokenizer_files import keep_tokenizer
from .verification import Verification, verification_ids, verify


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
        """What tells this source from another, for the recipe of what is made from it; it reads all bytes of the weights.

        Raises:
            UserError: if a file differs from the hash beside it.
        """
        files = fingerprint(self.source.folder, self.source.files)
        return {"name": self.source.folder.name, "files": files, "config": self.source_config.to_diff_dict()}


def cast(state: State, config: MoEConfig, dtype: torch.dtype) -> State:
    """The tensors in `dtype`, but for integers and those that routers keep in fp32."""
    with torch.device("meta"):
        kept = MoEForCausalLM(config)._keep_in_fp32_modules_strict or set()

    def target(name: str) -> torch.dtype:
        if not state[name].dtype.is_floating_point or name.rpartition(".")[2] in kept:
            return state[name].dtype
        return dtype

    return {name: tensor.to(target(name)) for name, tensor in state.items()}


# a checkpoint has this many times fewer numbers than its configuration asks for only if the two do not belong together
SLACK = 8


def _refuse_more_layers(source: Source) -> None:
    """Refuses a config.json with more layers than tensors, before anything is built that has so many layers."""
    if source.gguf_file or not (source.folder / "config.json").is_file():
        return
    values = read_json(source.folder / "config.json")
    for name in LAYERS:
        if isinstance(values.get(name), int | float) and values[name] > len(source.state):
            raise UserError(
                f"{name} is {values[name]} in {source.folder / 'config.json'}, but the checkpoint has "
                f"{len(source.state)} tensors: the two do not belong together, download both again"
            )


def _refuse_other_size(config: MoEConfig, source: Source) -> None:
    """Refuses a configuration of far more parameters than the checkpoint has, before a model of it is built."""
    held = sum(tensor.numel for tensor in source.state.values())
    if config.num_params() > SLACK * held:
        raise UserError(
            f"the configuration in {source.folder} asks for {config.num_params():,} parameters where the checkpoint has "
            f"{held:,}: the two do not belong together, download both again"
        )


def open_checkpoint(
    name_or_path: str, gguf_file: str | None = None, dtype: str = "auto", *, trust_remote_code: bool = False
) -> Checkpoint:
    """Opens a checkpoint by folder or Hub name; reads headers alone.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES`, or of this package; or path of a GGUF file.
        gguf_file: name of the GGUF file in that folder.
        dtype: to cast to as it is read; `auto` keeps the source's.
        trust_remote_code: run code that the source's configuration brings.

    Raises:
        UserError: if it is damaged, quantised, of an unknown family, or has what cannot be held.
    """
    parse_dtype(dtype)
    source = open_source(name_or_path, gguf_file)
    _refuse_more_layers(source)
    described = source_config(source.folder, source.gguf_file, trust_remote_code=trust_remote_code)
    try:
        config = moe_config(described)
    except (TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        # a field of another type than its family's is read by any code
        raise UserError(
            f"the configuration in {source.folder} cannot be held: {type(error).__name__} {error}"
        ) from error
    _refuse_other_size(config, source)
    state = import_state(source.state, described, config)
    wanted = parse_dtype(dtype)
    if wanted is not None:
        state = cast(state, config, wanted)
    config.dtype = state["model.embed_tokens.weight"].dtype
    return Checkpoint(config, state, source, described)


def result_folder(
    output_dir: str | Path, overwrite: bool, checkpoints: Sequence[Checkpoint], nbytes: int
) -> ResultFolder:
    """Looks at where a result will go before anything is read or written.

    Args:
        output_dir: of the result.
        overwrite: replace what an earlier run wrote there.
        checkpoints: what the result is made from.
        nbytes: of the result's weights.

    Raises:
        UserError: if it may not be written, see [`ResultFolder`], or does not fit on the disk.
    """
    folder = ResultFolder(output_dir, overwrite, [checkpoint.source.folder for checkpoint in checkpoints])
    refuse_full_disk(folder, nbytes)
    return folder


def _write_moe(folder: Path, config: MoEConfig) -> None:
    """config.json with the code that loads the model where this package is not installed."""
    config.architectures = [MoEForCausalLM.__name__]
    name_code(config)
    with torch.device("meta"):
        custom_object_save(MoEForCausalLM(config), folder, config=config)
    config.save_pretrained(folder)


def save_checkpoint(
    output_dir: str | Path | ResultFolder,
    config: MoEConfig,
    state: State,
    origin: Checkpoint,
    recipe: dict,
    target: str = "moe",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    check: Callable[[Path], None] | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Writes a checkpoint, tokenizer, chat template, generation config and code included.

    Args:
        output_dir: written whole or not at all; an interrupted run goes on where it was. What [`result_folder`] made
            is not looked at again.
        config: of the result.
        state: of the result, as a MoE checkpoint.
        origin: where tokenizer and generation config come from.
        recipe: all that was chosen; it is kept in conversion.json.
        target: format to write: `moe`, or a key of `TARGETS`.
        overwrite: replace `output_dir`.
        max_shard_size: largest file, unless a tensor is larger.
        check: looks at the finished folder before it takes its place, and raises if it will not do.
        trust_remote_code: run code that the source's tokenizer brings.

    Raises:
        UserError: if the target cannot hold the model, or `output_dir` cannot be written.
    """
    written_config: PreTrainedConfig = config
    if target != "moe":
        written_config = export_plan(config, target)
        state = TARGETS[target].tensors(state, config)

    gguf_file, tokenizer = origin.source.gguf_file, None
    # what is wrong with a tokenizer is known now, not after hours of writing
    if not gguf_file:
        find_companions(origin.source.folder)
    else:
        tokenizer = load_tokenizer(str(origin.source.folder), gguf_file, trust_remote_code=trust_remote_code)

    def finish(folder: Path) -> None:
        if target == "moe":
            _write_moe(folder, config)
        else:
            save_for_older_readers(written_config, folder)
        if tokenizer is None:
            copy_companions(origin.source.folder, folder)
        else:
            tokenizer.save_pretrained(folder)
        keep_tokenizer(
            origin.source.folder, folder, gguf_file, older_readers=target != "moe", trust_remote_code=trust_remote_code
        )
        if not (folder / "generation_config.json").exists():
            GenerationConfig.from_model_config(written_config).save_pretrained(folder)

    recipe = json.loads(json.dumps(recipe | {"lineage": lineage_of(origin.source.folder)}, default=str))
    sources = (origin.source.folder,)
    write_checkpoint(output_dir, state, recipe, finish, overwrite, max_shard_size, sources=sources, check=check)


def convert_checkpoint(
    name_or_path: str,
    output_dir: str | Path,
    target: str = "moe",
    gguf_file: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    check: bool = False,
    *,
    trust_remote_code: bool = False,
) -> tuple[MoEConfig, Verification | None]:
    """Writes a checkpoint of one family in the format of another, with the same logits.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES`, or of this package.
        output_dir: written whole or not at all; an interrupted run goes on where it was.
        target: `moe`, or a key of `TARGETS`.
        gguf_file: name of the GGUF file in that folder.
        dtype: of the result; `auto` keeps the source's.
        overwrite: replace what an earlier run wrote at `output_dir`.
        check: run source and result on a short text before the result takes its place.
        trust_remote_code: run code that the source brings.

    Returns:
        The model's configuration in the words of this package, and how the result compares if `check` is set.

    Raises:
        UserError: if the source cannot be read or held, or the target cannot hold it.
    """
    checkpoint = open_checkpoint(name_or_path, gguf_file, dtype, trust_remote_code=trust_remote_code)
    if target != "moe":
        export_plan(checkpoint.config, target)
    elif checkpoint.source_config.model_type == MoEConfig.model_type and dtype == "auto":
        raise UserError(f"{name_or_path} is in this format already: name another target")
    if check:
        # a source without a tokenizer is known now, not after hours of writing
        verification_ids(name_or_path, gguf_file, trust_remote_code=trust_remote_code)
    nbytes = sum(tensor.nbytes for tensor in checkpoint.state.values())
    folder = result_folder(output_dir, overwrite, [checkpoint], nbytes)
    verification = None

    def compare(result: Path) -> None:
        nonlocal verification
        verification = verify(name_or_path, result, gguf_file, dtype, trust_remote_code=trust_remote_code)

    save_checkpoint(
        folder,
        checkpoint.config,
        checkpoint.state,
        checkpoint,
        {"source": checkpoint.identity(), "target": target, "dtype": dtype},
        target,
        check=compare if check else None,
        trust_remote_code=trust_remote_code,
    )
    return checkpoint.config, verification
