# Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
"""This module opens checkpoints of any family as MoE checkpoints, and writes checkpoints with all their files."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from ..checkpoints import Source, State, fingerprint, open_source, write_checkpoint
from ..checkpoints.writer import refuse_full_disk
from ..configuration_moe import MoEConfig
from ..model_checkpoints import name_code
from ..modeling_moe import MoEForCausalLM
from ..utils.companions import copy_companions, find_companions
from ..utils.errors import UserError
from ..utils.folders import ResultFolder
from ..utils.json_files import read_json
from ..utils.limits import LAYERS
from ..utils.lineage import lineage_of
from ..utils.loading import load_tokenizer, parse_dtype
from .families.catalogue import fields_without_effect, moe_config, source_config
from .families.export import AUTO, TARGETS, choose_target, export_plan, refuse_server
from .families.wrappers import left_out, text_source, text_values
from .importing import import_state
from .older_names import save_for_older_readers
from .plain_transformers import PlainComparison, compare_in_plain_transformers
from .prediction_layers import ENTRY, PredictionLayers, kept_prediction_layers, prediction_layers, restored
from .tokenizer_files import keep_tokenizer
from .verification import Verification, verification_ids, verify


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A source checkpoint under this package's names, with no tensor read.

    Attributes:
        config: configuration of the model; its dtype is the dtype of the tensors.
        state: tensors with names and layout of a MoE checkpoint on disk.
        source: the files that hold the tensors.
        source_config: configuration as the source's config.json gives it.
        prediction: layers that predict further tokens, which no model of this package computes; None if there are none.
        without_effect: fields of config.json that neither this package nor the source's own model reads.
    """

    config: MoEConfig
    state: State
    source: Source
    source_config: PreTrainedConfig
    prediction: PredictionLayers | None = None
    without_effect: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> dict[str, int]:
        """Parameters of the parts of a multimodal source that are not its text model, such as model.visual; else empty."""
        return left_out(self.source.state, self.source_config)

    def identity(self) -> dict[str, Any]:
        """Returns name, file hashes and configuration of the source, for a result's recipe; reads all weights.

        Raises:
            UserError: if a file differs from the hash beside it.
        """
        beside = self.prediction.files if self.prediction else ()
        files = fingerprint(self.source.folder, (*self.source.files, *beside))
        identity = {"name": self.source.folder.name, "files": files, "config": self.source_config.to_diff_dict()}
        return identity | ({"left_out": self.left_out} if self.left_out else {})

    def prediction_for(self, target: str) -> PredictionLayers | None:
        """Returns the layers that predict further tokens if a format can hold them: this package's, or their own family's."""
        held = self.prediction is not None and target in ("moe", self.prediction.model_type)
        return self.prediction if held else None

    def notes(self, target: str) -> list[str]:
        """Returns a sentence for each thing that a conversion to `target` leaves out or does not read."""
        notes = []
        if self.left_out:
            shown = ", ".join(f"{name} ({count:,} parameters)" for name, count in self.left_out.items())
            notes.append(f"Only the text model is converted; these parts of the source are left out: {shown}.")
        if self.without_effect:
            shown = ", ".join(f"{name} ({value!r:.60})" for name, value in self.without_effect.items())
            notes.append(
                f"The source's model does not read these fields of config.json, which are kept only in conversion.json: {shown}."
            )
        if self.prediction is not None and self.prediction_for(target) is None:
            notes.append(
                f"The layers that predict further tokens ({len(self.prediction.state)} tensors) are left out: target {target} "
                f"cannot hold them; moe and {self.prediction.model_type or 'the family that published them'} can."
            )
        return notes


def cast(state: State, config: MoEConfig, dtype: torch.dtype) -> State:
    """Casts floating tensors to `dtype`, except those that routers of this package keep in fp32."""
    with torch.device("meta"):
        kept = MoEForCausalLM(config)._keep_in_fp32_modules_strict or set()

    def target(name: str) -> torch.dtype:
        if not state[name].dtype.is_floating_point or name.rpartition(".")[2] in kept:
            return state[name].dtype
        return dtype

    return {name: tensor.to(target(name)) for name, tensor in state.items()}


# if a configuration asks for more than this many times the parameters in the checkpoint, the two do not belong together
LARGEST_RATIO = 8


def _refuse_more_layers(source: Source) -> None:
    """Refuses a config.json with more layers than tensors, before a model with that many layers is built."""
    if source.gguf_file or not (source.folder / "config.json").is_file():
        return
    values = text_values(read_json(source.folder / "config.json"))
    for name in LAYERS:
        if isinstance(values.get(name), int | float) and values[name] > len(source.state):
            raise UserError(
                f"{name} is {values[name]} in {source.folder / 'config.json'}, but the checkpoint has "
                f"{len(source.state)} tensors: the two do not belong together, download both again"
            )


def _refuse_other_size(config: MoEConfig, source: Source) -> None:
    """Refuses a configuration with far more parameters than the checkpoint, before a model with them is built."""
    held = sum(tensor.numel for tensor in source.state.values())
    if config.num_params() > LARGEST_RATIO * held:
        raise UserError(
            f"the configuration in {source.folder} asks for {config.num_params():,} parameters where the checkpoint has "
            f"{held:,}: the two do not belong together, download both again"
        )


def open_checkpoint(
    name_or_path: str, gguf_file: str | None = None, dtype: str = "auto", *, trust_remote_code: bool = False
) -> Checkpoint:
    """Opens a checkpoint by folder or Hub name and reads only the headers of the files.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES` or of this package; or path of a GGUF file.
        gguf_file: name of the GGUF file in the folder, if the model is one.
        dtype: dtype to which tensors are cast while they are read; `auto` keeps the source's.
        trust_remote_code: whether code that the source's configuration brings may run.

    Raises:
        UserError: if the source is damaged, quantised, of an unknown family, or has a feature that a MoE cannot have.
    """
    parse_dtype(dtype)
    source = open_source(name_or_path, gguf_file)
    _refuse_more_layers(source)
    described = source_config(source.folder, source.gguf_file, trust_remote_code=trust_remote_code)
    try:
        config = moe_config(described)
        without_effect = fields_without_effect(described)
    except (TypeError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        # a field of a wrong type can make the family's code raise any of these
        raise UserError(
            f"the configuration in {source.folder} cannot be converted: {type(error).__name__} {error}"
        ) from error
    _refuse_other_size(config, source)
    state = import_state(source.state, described, config)
    if described.model_type == MoEConfig.model_type:
        prediction = kept_prediction_layers(source.folder)
    else:
        prediction = prediction_layers(source.state, described)
    wanted = parse_dtype(dtype)
    if wanted is not None:
        state = cast(state, config, wanted)
        if prediction is not None:
            prediction = replace(prediction, state=cast(prediction.state, config, wanted))
    config.dtype = state["model.embed_tokens.weight"].dtype
    return Checkpoint(config, state, source, described, prediction, without_effect)


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
        state = TARGETS[target].tensors(state, config) | further
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


def _resolved_target(checkpoint: Checkpoint, target: str, dtype: str, server: str | None) -> str:
    """Returns the name of a target; of `auto`, the target that [`choose_target`] chooses.

    Raises:
        UserError: if the target cannot hold the model or is the format and dtype that the source already has, or if the
            server is not known to compute the target exactly.
    """
    if target == AUTO:
        return choose_target(checkpoint.config, server).target
    if target != "moe":
        export_plan(checkpoint.config, target)
        if server is not None:
            refuse_server(checkpoint.config, target, server)
    elif server is not None:
        raise UserError(
            f"server {server} needs an export: set target to {AUTO} or to a family; target moe is served by `moe serve`, "
            "and by vLLM where this package is installed"
        )
    elif checkpoint.source_config.model_type == MoEConfig.model_type and dtype == "auto":
        raise UserError(f"{checkpoint.source.folder} is in this format already: name another target")
    return target


class Conversion(NamedTuple):
    """What a conversion wrote.

    Attributes:
        config: the model's configuration as a `MoEConfig`.
        verification: the comparison of source and result, or None if it was not asked for.
        target: format of the result; never `auto`.
        plain: the comparison of source and result in transformers without this package, or None if it was not asked for.
    """

    config: MoEConfig
    verification: Verification | None
    target: str
    plain: PlainComparison | None


class ConversionPlan(NamedTuple):
    """What a conversion would write.

    Attributes:
        config: the model's configuration as a `MoEConfig`.
        nbytes: size of the result's weights in bytes, before a target merges or adds tensors.
        target: format of the result; never `auto`.
        notes: sentences on what the result leaves out, see [`Checkpoint.notes`].
    """

    config: MoEConfig
    nbytes: int
    target: str
    notes: list[str]


def plan_conversion(
    name_or_path: str,
    target: str = "moe",
    gguf_file: str | None = None,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    server: str | None = None,
) -> ConversionPlan:
    """Checks whether [`convert_checkpoint`] can convert a checkpoint, from the headers of the files alone.

    Raises:
        UserError: as [`convert_checkpoint`].
    """
    checkpoint = open_checkpoint(name_or_path, gguf_file, dtype, trust_remote_code=trust_remote_code)
    target = _resolved_target(checkpoint, target, dtype, server)
    return ConversionPlan(checkpoint.config, _result_bytes(checkpoint, target), target, checkpoint.notes(target))


def _rounds(checkpoint: Checkpoint, target: str) -> bool:
    """Returns whether a conversion rounds weights: by a factor that it multiplies in, or by dequantising."""
    quantised = getattr(text_source(checkpoint.source_config), "quantization_config", None) is not None
    return TARGETS[target].rounds(checkpoint.config) or quantised


def _result_bytes(checkpoint: Checkpoint, target: str) -> int:
    prediction = checkpoint.prediction_for(target)
    return sum(tensor.nbytes for tensor in checkpoint.state.values()) + (prediction.nbytes if prediction else 0)


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
    check_plain: bool = False,
    server: str | None = None,
) -> Conversion:
    """Converts a checkpoint of one family to the format of another, with equal logits.

    Args:
        name_or_path: folder or Hub name of a model of one of `FAMILIES` or of this package.
        output_dir: folder that is written whole or not at all; an interrupted run continues where it was.
        target: format of the result: `moe`, a key of `TARGETS`, or `auto`, see
            [`~modeling_moe.conversion.choose_target`].
        gguf_file: name of the GGUF file in the folder, if the model is one.
        dtype: dtype of the result; `auto` keeps the source's.
        overwrite: whether to replace the result of an earlier run at `output_dir`.
        check: whether to run source and result on a short text before the result replaces `output_dir`.
        trust_remote_code: whether code that the source brings may run.
        check_plain: whether to run the source here, and the result in transformers in a process without this package, on a
            short text in fp32 before the result replaces `output_dir`.
        server: key of `SERVERS` of the server that will run the export. A target that the server is not known to compute
            exactly is refused, and `auto` takes one of those that it is.

    Raises:
        UserError: if the source cannot be read or held, the target cannot hold it, `server` does not compute the target
            exactly, or the result computes other logits in transformers.
    """
    checkpoint = open_checkpoint(name_or_path, gguf_file, dtype, trust_remote_code=trust_remote_code)
    target = _resolved_target(checkpoint, target, dtype, server)
    if check_plain and target == "moe":
        raise UserError("transformers alone does not know target moe: check another target, or verify this one")
    if check_plain and dtype not in ("auto", "float32"):
        raise UserError(
            f"the check in transformers compares in fp32, and dtype {dtype} rounds weights, which can change the chosen "
            "experts: convert to that dtype with target moe first, then export the result with the check"
        )
    if check or check_plain:
        # a missing tokenizer raises an error here, and not after hours of writing weights
        input_ids = verification_ids(name_or_path, gguf_file, trust_remote_code=trust_remote_code)
    folder = result_folder(output_dir, overwrite, [checkpoint], _result_bytes(checkpoint, target))
    for note in checkpoint.notes(target):
        logger.warning(note)
    verification = plain = None

    def compare(result: Path) -> dict[str, Any]:
        nonlocal verification, plain
        if check:
            verification = verify(name_or_path, result, gguf_file, dtype, trust_remote_code=trust_remote_code)
        if check_plain:
            weights = checkpoint.state["model.embed_tokens.weight"].dtype
            rounded = weights if _rounds(checkpoint, target) else None
            plain = compare_in_plain_transformers(
                name_or_path, result, input_ids, gguf_file, rounded, trust_remote_code=trust_remote_code
            )
        measured = asdict(verification) if verification else {}
        return measured | ({"in_plain_transformers": plain._asdict()} if plain else {})

    save_checkpoint(
        folder,
        checkpoint.config,
        checkpoint.state,
        checkpoint,
        {"source": checkpoint.identity(), "target": target, "dtype": dtype},
        target,
        check=compare if check or check_plain else None,
        trust_remote_code=trust_remote_code,
        same_weights=True,
    )
    return Conversion(checkpoint.config, verification, target, plain)
